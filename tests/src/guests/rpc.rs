//! A program that has itself dumped, by the service that the test names in the file `ask`: the service's socket and the
//! folder for images, one a line.

use std::os::fd::AsRawFd as _;

use standstill_images::proto::{CriuOpts, CriuReq, CriuReqType, CriuResp};

use super::support::*;
use crate::rpc::Client;

/// Asks if it is asked to, and checks the answer: whether it comes after a restore is part of it.
pub(super) fn asks_for_itself() {
    say_ready();
    let (ask, check) = (folder().join("ask"), folder().join("check"));
    let text = loop {
        if asked(&check).is_some() {
            return;
        }
        match std::fs::read_to_string(&ask) {
            Ok(text) if text.ends_with('\n') => break text,
            _ => std::thread::sleep(std::time::Duration::from_millis(2)),
        }
    };
    let mut lines = text.lines();
    let (socket, images) = (lines.next().unwrap_or(""), lines.next().unwrap_or(""));
    let Ok(images) = std::fs::File::open(images) else { fail("no folder for images") };
    let opts = CriuOpts {
        images_dir_fd: images.as_raw_fd(),
        leave_running: Some(text.contains("running")),
        log_level: Some(4),
        log_file: Some("rpc.log".into()),
        ..CriuOpts::default()
    };
    let Ok(client) = Client::connect(std::path::Path::new(socket)) else { fail("no service") };
    let request = CriuReq { r#type: CriuReqType::Dump.into(), opts: Some(opts), ..CriuReq::default() };
    let answer: CriuResp = client.call(&request);
    let what = format!("{} {:?} {:?}", answer.success, answer.dump, answer.cr_errmsg);
    if !answer.success {
        fail(&what);
    }
    let restored = answer.dump.and_then(|d| d.restored) == Some(true);
    // the other end is gone after a restore, and after a dump
    check!(client.receive().is_none());
    let how = wait_for_check();
    check_eq!(restored, how == How::Restored);
}
