//! `service`: serves whoever connects to a socket in the file system.
//!
//! One process listens (`service`, or `service-loop` behind it with `--daemon`); each connection is served by a process of
//! its own (`service-worker`), which becomes its client before it reads a request. Both verbs are internal: their
//! arguments are descriptors. The processes are made by starting this program again, since a `fork` is not safe where
//! libraries have threads; what is restored belongs to the worker, and to init when that ends.
//!
//! Order: the socket listens, then (with `--daemon`) the loop runs, then the pidfile is written, then scripts hear
//! `status-ready` and `--status-fd` gets its byte. A socket that was left behind at the same path is removed; any other file
//! there is an error.
//!
//! Man pages: criu(8), unix(7).

use super::{reason, swrk};
use crate::options::Options;
use crate::stages::{Stage, Stages};
use crate::sys::calls;
use std::ffi::OsString;
use std::fs::Permissions;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use tracing::{error, info, warn};

const DEFAULT_ADDRESS: &str = "criu_service.socket";

/// The verb `service`; the result is the exit code. It returns only with `--daemon`, or by an error.
pub fn run(options: &Options) -> i32 {
    match start(options) {
        Ok(()) => 0,
        Err(text) => {
            error!("{text}");
            1
        }
    }
}

fn start(options: &Options) -> Result<(), String> {
    let socket = listen(options)?;
    let pid = if options.restore_detach { Some(daemon(socket.as_fd())?) } else { None };
    write_pidfile(options, pid.unwrap_or(std::process::id()))?;
    Stages::new(options, None).reach(Stage::StatusReady, None).map_err(|e| e.to_string())?;
    if let Some(fd) = options.status_fd {
        crate::rpc::folders::say_ready(fd)
            .map_err(|e| format!("Unable to write into the status fd: {}", reason(&e)))?;
    }
    match pid {
        Some(_) => Ok(()),
        None => accept(socket),
    }
}

/// Writes the pidfile, if one is wanted.
pub(super) fn write_pidfile(options: &Options, pid: u32) -> Result<(), String> {
    let Some(path) = &options.pidfile else { return Ok(()) };
    let path = options.in_work_dir(path);
    let file = std::fs::File::options().write(true).create_new(true).open(&path);
    let written = file.and_then(|mut file| write!(file, "{pid}"));
    written.map_err(|e| format!("Can't write pidfile {}: {}", path.display(), reason(&e)))
}

fn listen(options: &Options) -> Result<OwnedFd, String> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let path = match &options.address {
        Some(address) => PathBuf::from(address),
        None => {
            warn!("Binding to local dir address!");
            PathBuf::from(DEFAULT_ADDRESS)
        }
    };
    let path = options.in_work_dir(&path);
    let failed = |what: &str, e: rustix::io::Errno| format!("Can't {what} {}: {e}", path.display());
    if std::fs::symlink_metadata(&path).is_ok_and(|m| m.file_type().is_socket()) {
        let _ = std::fs::remove_file(&path);
    }
    let address = SocketAddrUnix::new(&path).map_err(|e| failed("bind to", e))?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(|e| failed("initialize service socket", e))?;
    rustix::net::bind(&socket, &address).map_err(|e| failed("bind to", e))?;
    info!("The service socket is bound to {}", path.display());
    // who is served is decided for each client
    std::fs::set_permissions(&path, Permissions::from_mode(0o666))
        .map_err(|e| format!("Can't change permissions of the service socket: {}", reason(&e)))?;
    rustix::net::listen(&socket, 16).map_err(|e| failed("listen at", e))?;
    Ok(socket)
}

/// This program once more, with one of the internal verbs and one descriptor.
pub(super) fn again(verb: &str, socket: BorrowedFd<'_>) -> Command {
    let mut command = Command::new("/proc/self/exe");
    let name = std::env::args_os().next().unwrap_or_else(|| OsString::from("standstill"));
    std::os::unix::process::CommandExt::arg0(&mut command, name);
    command.arg("--no-default-config").arg(format!("-v{}", crate::log::level()));
    command.arg(verb).arg(socket.as_raw_fd().to_string()).stdin(Stdio::null());
    // the service is told by its own configuration, its clients by their requests
    command.env_remove("CRIU_CONFIG_FILE");
    calls::inheriting(&mut command, socket);
    command
}

/// Starts the loop in the background; its process id.
fn daemon(socket: BorrowedFd<'_>) -> Result<u32, String> {
    let mut command = again("service-loop", socket);
    command.stdout(Stdio::null());
    match crate::log::file() {
        Some(log) => command.stderr(log),
        None => command.stderr(Stdio::null()),
    };
    let child = command.spawn().map_err(|e| format!("Can't run service server in the background: {}", reason(&e)))?;
    Ok(child.id())
}

/// The verb `service-loop`: what `--daemon` leaves behind.
pub fn run_loop(rest: &[OsString]) -> i32 {
    let Some(socket) = rest.first().and_then(swrk::inherited) else { return 1 };
    let _ = rustix::process::setsid();
    let _ = crate::log::open(crate::log::Target::default());
    match accept(socket) {
        Ok(()) => 0,
        Err(text) => {
            error!("{text}");
            1
        }
    }
}

/// Gives each connection a worker, for ever.
fn accept(listening: OwnedFd) -> Result<(), String> {
    loop {
        info!("Waiting for connection...");
        let socket = match rustix::net::accept_with(&listening, rustix::net::SocketFlags::CLOEXEC) {
            Ok(socket) => socket,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(e) => return Err(format!("Can't accept connection: {e}")),
        };
        info!("Connected.");
        let mut command = again("service-worker", socket.as_fd());
        if let Some(log) = crate::log::file() {
            command.stderr(log);
        }
        match command.spawn() {
            Ok(mut worker) => {
                // its end is waited for aside, so that nothing of it stays
                std::thread::spawn(move || {
                    let pid = worker.id();
                    if let Ok(status) = worker.wait() {
                        info!("Worker(pid {pid}) ended with {status}");
                    }
                });
            }
            Err(e) => error!("Can't fork a child: {}", reason(&e)),
        }
    }
}

/// The verb `service-worker`: serves one connection as its client.
pub fn run_worker(rest: &[OsString], options: Options) -> i32 {
    let Some(socket) = rest.first().and_then(swrk::inherited) else { return 1 };
    if let Err(fault) = crate::rpc::become_client(socket.as_fd()) {
        error!("{}", fault.text);
        return 1;
    }
    swrk::serve(socket, false, options)
}
