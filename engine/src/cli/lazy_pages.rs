//! `lazy-pages`: brings the memory of a tree that is restored with `--lazy-pages` when it is first touched.
//!
//! Order: images are read and, with `--page-server`, the other host is connected to; the socket listens; with `--daemon` it goes on
//! in the background (`lazy-pages-worker`) and the pidfile is written; scripts hear `status-ready`, `--status-fd` gets its
//! byte. It ends when all memory is there.
//!
//! Man page: criu(8).

use super::outcome::Run;
use super::{page_server, reason, service, swrk};
use crate::memory::late::SOCKET;
use crate::options::Options;
use crate::transfer::lazy;
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use tracing::error;

/// The verb; the result is the exit code.
pub fn run(options: &Options) -> i32 {
    page_server::end(&Run::begin("lazy-pages", options), start)
}

fn code(result: Result<(), String>) -> i32 {
    match result {
        Ok(()) => 0,
        Err(text) => {
            error!("{text}");
            1
        }
    }
}

fn start(options: &Options) -> Result<(), String> {
    if options.restore_detach {
        let socket = listen(options)?;
        let mut command = service::again("lazy-pages-worker", socket.as_fd());
        page_server::pass_on(options, &mut command);
        let child = command.spawn().map_err(|e| format!("Can't run in the background: {}", reason(&e)))?;
        return service::write_pidfile(options, child.id()).and_then(|()| page_server::ready(options));
    }
    let ready = lazy::prepare(options).map_err(|e| e.chain())?;
    let socket = listen(options)?;
    page_server::ready(options)?;
    let served = lazy::serve(ready, socket.as_fd());
    served.map_err(|e| e.chain())
}

fn listen(options: &Options) -> Result<OwnedFd, String> {
    let path = options.in_work_dir(SOCKET.as_ref());
    let _ = std::fs::remove_file(&path);
    let listener =
        UnixListener::bind(&path).map_err(|e| format!("Can't bind to {}: {}", path.display(), reason(&e)))?;
    Ok(listener.into())
}

/// The verb `lazy-pages-worker`.
pub fn run_worker(rest: &[OsString], options: &Options) -> i32 {
    let Some(socket) = rest.first().and_then(swrk::inherited) else { return 1 };
    let _ = rustix::process::setsid();
    let _ = crate::log::open(crate::log::Target::default());
    let served = lazy::prepare(options).and_then(|ready| lazy::serve(ready, socket.as_fd()));
    code(served.map_err(|e| e.chain()))
}
