//! `swrk FD`: serves the program that started us, over a socket that it left open for us.

use crate::options::Options;
use crate::rpc::Session;
use crate::transfer::server::Socket;
use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::Path;
use tracing::error;

/// Serves one connection; the result is the exit code.
pub fn run(rest: &[OsString], options: Options) -> i32 {
    let [fd] = rest else {
        eprintln!("Usage: criu swrk <fd>");
        return 1;
    };
    match inherited(fd) {
        Some(socket) => serve(socket, true, options),
        None => 255,
    }
}

/// A descriptor that was left open for us, by its number.
pub(super) fn inherited(fd: &OsString) -> Option<OwnedFd> {
    let fd = super::values::atoi(fd.as_encoded_bytes());
    let socket = crate::sys::calls::dup_number(fd);
    if let Err(e) = &socket {
        error!("Can't recv request: descriptor {fd}: {}", e.chain());
        return None;
    }
    // nobody who is restored is to have it
    let _ = nix::unistd::close(fd);
    socket.ok()
}

/// Serves a connection. `is_parent`: the client started us.
pub(super) fn serve(socket: OwnedFd, is_parent: bool, options: Options) -> i32 {
    match Session::new(socket, is_parent, options, config_file, page_server) {
        Ok(session) => session.serve(),
        Err(fault) => {
            error!("{}", fault.text);
            255
        }
    }
}

fn page_server(options: &Options, socket: &Socket) -> Result<std::process::Child, String> {
    super::page_server::background(options, socket)
        .map_err(|e| format!("Can't run in the background: {}", super::reason(&e)))
}

fn config_file(options: Options, path: &Path) -> Result<Options, String> {
    super::parse::apply_config_file(options, path)
        .map_err(|_| format!("the configuration file {} has a mistake", path.display()))
}
