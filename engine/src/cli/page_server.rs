//! `page-server`: takes the pages of a dump elsewhere, or gives those of a folder to a restore elsewhere.
//!
//! With `--daemon` it goes on in the background: this program, started again by an internal verb (`page-server-worker`), whose
//! arguments are descriptors. The socket listens before that, so whoever was told that the server is ready can connect.
//!
//! Order: the socket listens, with `--daemon` the worker runs and the pidfile is written, scripts hear `status-ready`,
//! `--status-fd` gets its byte, then one connection is served.
//!
//! Man page: criu(8).

use super::metrics::Figures;
use super::outcome::Run;
use super::{reason, service, swrk};
use crate::error::Error;
use crate::options::Options;
use crate::stages::{Stage, Stages};
use crate::transfer::server::{self, Socket};
use serde_json::json;
use std::ffi::OsString;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use tracing::error;

/// The verb; the result is the exit code.
pub fn run(options: &Options) -> i32 {
    end(&Run::begin("page-server", options), start)
}

/// Does the work of a verb that serves others, and says how that went.
pub(super) fn end(run: &Run<'_>, serve: impl FnOnce(&Options) -> Result<(), String>) -> i32 {
    if run.is_refused() {
        return 1;
    }
    match serve(&run.options()) {
        Ok(()) => {
            run.done(Figures::default(), json!({}));
            0
        }
        Err(what) => {
            run.failed(&Error::Usage { what });
            1
        }
    }
}

fn start(options: &Options) -> Result<(), String> {
    let (socket, _) = server::socket(options).map_err(|e| e.chain())?;
    if options.restore_detach {
        let child = background(options, &socket).map_err(|e| format!("Can't run in the background: {}", reason(&e)))?;
        if let Err(text) = service::write_pidfile(options, child.id()).and_then(|()| ready(options)) {
            let mut child = child;
            let _ = child.kill().and_then(|()| child.wait());
            return Err(text);
        }
        return Ok(());
    }
    ready(options)?;
    server::run(socket, options).map_err(|e| e.chain())
}

/// Tells that one can connect.
pub(super) fn ready(options: &Options) -> Result<(), String> {
    Stages::new(options, None).reach(Stage::StatusReady, None).map_err(|e| e.to_string())?;
    options.say_ready().map_err(|e| e.chain())
}

/// Starts a server that goes on without us.
pub(super) fn background(options: &Options, socket: &Socket) -> std::io::Result<Child> {
    let mut command = service::again("page-server-worker", socket.fd.as_fd());
    command.arg(if socket.listens { "listening" } else { "connected" });
    pass_on(options, &mut command);
    command.spawn()
}

/// What a server in the background has to know of the options, and where its messages go.
pub(super) fn pass_on(options: &Options, command: &mut Command) {
    command.arg("--images-dir").arg(&options.images_dir).arg("--work-dir").arg(options.work_dir());
    let switches = [
        (options.auto_dedup, "--auto-dedup"),
        (options.lazy_pages, "--lazy-pages"),
        (options.use_page_server, "--page-server"),
        (options.tls, "--tls"),
        (options.tls_no_cn_verify, "--tls-no-cn-verify"),
    ];
    command.args(switches.iter().filter(|(on, _)| *on).map(|(_, name)| name));
    let paths = [
        (&options.prev_images_dir, "--prev-images-dir"),
        (&options.tls_cacert, "--tls-cacert"),
        (&options.tls_cacrl, "--tls-cacrl"),
        (&options.tls_cert, "--tls-cert"),
        (&options.tls_key, "--tls-key"),
    ];
    for (path, name) in paths {
        if let Some(path) = path {
            command.arg(name).arg(path);
        }
    }
    if let Some(address) = &options.address {
        command.arg("--address").arg(address);
    }
    if let Some(port) = options.port.filter(|&port| port != 0) {
        command.arg("--port").arg(port.to_string());
    }
    command.stdout(Stdio::null());
    match crate::log::file() {
        Some(log) => command.stderr(log),
        None => command.stderr(Stdio::null()),
    };
}

/// The verb `page-server-worker`.
pub fn run_worker(rest: &[OsString], options: &Options) -> i32 {
    let [fd, kind] = rest else { return 1 };
    let Some(fd) = swrk::inherited(fd) else { return 1 };
    let _ = rustix::process::setsid();
    let _ = crate::log::open(crate::log::Target::default());
    match server::run(Socket { fd, listens: kind == "listening" }, options) {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            1
        }
    }
}
