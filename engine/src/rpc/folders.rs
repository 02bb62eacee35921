//! What a request names in the client's world, opened: folders for images and work, descriptors, the configuration file.
//!
//! A client's descriptor N is `/proc/PID/fd/N`. The folder of the images is held open from here on, since the client may be
//! in the tree that is killed.
//!
//! The folder of the images is that of the request's configuration file, else `images_dir_fd`, else `images_dir`. The work
//! folder is that of the request's configuration file, else `work_dir_fd`, else that of the other configuration files, else
//! the folder of the images. A configuration file that is not there is none.
//!
//! Man page: proc_pid_fd(5).

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use standstill_images::proto::CriuOpts;

use super::request::{self, Client, Purpose};
use super::Fault;
use crate::options::Options;
use crate::sys::calls;

/// Applies a configuration file to options; an error says what is wrong with it.
pub type ReadConfig = fn(Options, &Path) -> Result<Options, String>;

/// Options that are ready to be obeyed, and what they need to stay open.
#[derive(Debug)]
pub struct Prepared {
    /// The options.
    pub options: Options,
    _held: Vec<File>,
}

/// The log's name if nobody says one.
const LOG_FILE: &str = "criu.log";

/// Everything that a request asks for.
pub fn prepare(
    base: &Options,
    req: &CriuOpts,
    client: Client,
    purpose: Purpose,
    config: ReadConfig,
) -> Result<Prepared, Fault> {
    let mut o = request::options(base, req, client, purpose)?;
    let mut held = Vec::new();
    let own = configured(&mut o, req, config)?;
    // to look at the kernel takes no folder, unless a log is wanted in one
    if purpose != Purpose::Check || (req.log_file.is_some() && !o.log_to_stderr) {
        folders(&mut o, &own, req, client, purpose, &mut held)?;
        log(&mut o, &own, req)?;
    }
    if let Some(fd) = req.status_fd {
        let path = format!("/proc/{}/fd/{fd}", client.pid);
        let file = File::options().write(true).open(&path);
        let file = file.map_err(|e| Fault::bad(format!("Can't reopen status fd {path}: {e}")))?;
        o.status_fd = Some(file.as_raw_fd());
        held.push(file);
    }
    if let Some(fd) = req.pidfd_store_sk {
        let socket = calls::pidfd_open(client.pid, 0).and_then(|pidfd| calls::pidfd_getfd(pidfd.as_fd(), fd));
        let socket = socket.map_err(|e| Fault::bad(format!("Can't get the pidfd store {fd}: {e}")))?;
        o.pidfd_store_sk = Some(socket.as_raw_fd());
        held.push(socket.into());
    }
    if let Some(text) = o.conflict(purpose == Purpose::Restore) {
        return Err(Fault::bad(text.into()));
    }
    for inherited in &o.inherit_fds {
        if std::fs::symlink_metadata(format!("/proc/self/fd/{}", inherited.fd)).is_err() {
            return Err(Fault::bad(format!("Can't fstat inherit fd {}: Bad file descriptor", inherited.fd)));
        }
    }
    Ok(Prepared { options: o, _held: held })
}

/// What the request's own configuration file says of folders and the log.
#[derive(Debug, Default)]
struct Own {
    images_dir: Option<PathBuf>,
    work_dir: Option<PathBuf>,
    log_file: Option<PathBuf>,
}

/// Applies the configuration file that the request names. The level of the log stays the request's.
fn configured(o: &mut Options, req: &CriuOpts, config: ReadConfig) -> Result<Own, Fault> {
    let Some(path) = &req.config_file else { return Ok(Own::default()) };
    tracing::debug!("Would overwrite RPC settings with values from {path}");
    let level = o.log_level;
    let asked = Options { images_dir: PathBuf::new(), work_dir: None, log_file: None, ..o.clone() };
    let mut changed = config(asked, Path::new(path)).map_err(Fault::bad)?;
    let some = |path: &Path| (!path.as_os_str().is_empty()).then(|| path.to_owned());
    let own = Own {
        images_dir: some(&changed.images_dir),
        work_dir: changed.work_dir.clone(),
        log_file: changed.log_file.clone(),
    };
    changed.images_dir.clone_from(&o.images_dir);
    changed.work_dir = own.work_dir.clone().or(o.work_dir.take());
    changed.log_file = own.log_file.clone().or(o.log_file.take());
    changed.log_level = level;
    *o = changed;
    Ok(own)
}

fn folders(
    o: &mut Options,
    own: &Own,
    req: &CriuOpts,
    client: Client,
    purpose: Purpose,
    held: &mut Vec<File>,
) -> Result<(), Fault> {
    let of_client = |fd: i32| PathBuf::from(format!("/proc/{}/fd/{fd}", client.pid));
    let number = Some(req.images_dir_fd).filter(|&fd| fd != -1);
    let images = own.images_dir.clone().or(number.map(of_client)).or(req.images_dir.as_ref().map(PathBuf::from));
    let images = match images {
        Some(path) => Some(open(&path, "images directory", held)?),
        None if purpose == Purpose::Check => None,
        None => return Err(Fault::bad("Neither images_dir_fd nor images_dir was passed by RPC client.".into())),
    };
    let work = own.work_dir.clone().or(req.work_dir_fd.map(of_client)).or(o.work_dir.clone());
    o.work_dir = match work {
        Some(path) => Some(open(&path, "work_dir", held)?),
        None => None,
    };
    match images {
        Some(images) => o.images_dir = images,
        None if o.work_dir.is_some() => {}
        None => return Err(Fault::bad("images-dir or work-dir is required when using log file".into())),
    }
    Ok(())
}

/// Opens a folder for as long as the request lasts. Its path is its name where that leads to it from here, else the
/// descriptor.
fn open(path: &Path, what: &str, held: &mut Vec<File>) -> Result<PathBuf, Fault> {
    let bad = |e: std::io::Error| Fault::bad(format!("Can't open {what} {}: {e}", path.display()));
    let folder = File::open(path).map_err(bad)?;
    let found = folder.metadata().map_err(bad)?;
    if !found.is_dir() {
        return Err(Fault::bad(format!("Can't open {what} {}: it is no folder", path.display())));
    }
    let through = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    held.push(folder);
    let same = |name: &PathBuf| std::fs::metadata(name).is_ok_and(|m| (m.dev(), m.ino()) == (found.dev(), found.ino()));
    Ok(std::fs::read_link(&through).ok().filter(same).unwrap_or(through))
}

/// Opens the log: by the configuration file, else by the request, else by the other configuration files.
fn log(o: &mut Options, own: &Own, req: &CriuOpts) -> Result<(), Fault> {
    let to_stderr = o.log_to_stderr && own.log_file.is_none() && req.log_file.is_none();
    if to_stderr {
        o.log_file = None;
    } else if o.log_file.is_none() {
        o.log_file = Some(PathBuf::from(LOG_FILE));
    }
    crate::log::set_level(o.log_level);
    let file = o.log_file.as_deref().map(|f| if f == Path::new("-") { f.into() } else { o.in_work_dir(f) });
    let shown = o.log_file.clone().unwrap_or_default();
    crate::log::open(crate::log::Target { file, per_pid: o.log_pid, mirror_errors: false })
        .map_err(|e| Fault::bad(format!("Can't create log file {}: {e}", shown.display())))
}

/// Writes one zero byte to a descriptor that the caller named, and closes it: what was asked for is ready.
pub fn say_ready(fd: i32) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = File::from(calls::dup_number(fd).map_err(|e| std::io::Error::from_raw_os_error(e.errno()))?);
    file.write_all(&[0])?;
    nix::unistd::close(fd)?;
    nix::unistd::close(file.into_raw_fd())?;
    Ok(())
}
