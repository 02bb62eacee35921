//! The machine: a mount namespace in which both programs find what they need, and memory that is warm.

use crate::guests::Guest;
use anyhow::{Context as _, Result};
use nix::mount::{mount, umount2, MntFlags, MsFlags};
use nix::sched::{unshare, CloneFlags};
use std::path::{Path, PathBuf};

/// Where guests and images are; goes when it goes.
#[derive(Debug)]
pub(crate) struct Dir {
    path: PathBuf,
    mounted: bool,
}

impl Dir {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        if self.mounted {
            let _ = umount2(&self.path, MntFlags::MNT_DETACH);
        }
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// A mount namespace with a tmpfs on /run (CRIU keeps its findings there) and one for images; orphans come to us.
pub(crate) fn prepare(dir: Option<PathBuf>) -> Result<Dir> {
    let tmpfs = |at: &Path, options: &str| {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::MS_NOSUID, Some(options))
            .with_context(|| format!("tmpfs on {}", at.display()))
    };
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("private mounts")?;
    tmpfs("/run".as_ref(), "mode=755")?;
    nix::sys::prctl::set_child_subreaper(true).context("subreaper")?;
    let mounted = dir.is_none();
    let path = dir.unwrap_or_else(std::env::temp_dir).join(format!("standstill-benches-{}", std::process::id()));
    std::fs::create_dir(&path).with_context(|| path.display().to_string())?;
    let dir = Dir { path, mounted };
    if mounted {
        tmpfs(dir.path(), "mode=700,size=75%")?;
    }
    Ok(dir)
}

/// Real-time priority for this thread, and for all that it starts from now on.
#[allow(unsafe_code)]
pub(crate) fn realtime() -> nix::Result<()> {
    let parameters = libc::sched_param { sched_priority: 10 };
    // SAFETY: the kernel reads one structure, which outlives the call.
    nix::errno::Errno::result(unsafe { libc::sched_setscheduler(0, libc::SCHED_RR, &raw const parameters) }).map(drop)
}

/// Kernel, processors, memory.
pub(crate) fn describe() -> String {
    let kernel = nix::sys::utsname::uname().map_or(String::new(), |u| u.release().to_string_lossy().into_owned());
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    format!("Linux {kernel}, {cpus} processors ({}), {} GiB of memory free", model(), available() >> 30)
}

/// What /proc/cpuinfo calls the processor.
fn model() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("model name"));
    line.map_or("of unknown kind", |l| l.trim_start_matches([' ', '\t', ':'])).to_owned()
}

/// How many tasks wanted a processor during the last minute.
pub(crate) fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0)
}

/// Bytes that can be had without swapping.
fn available() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix(" kB")?.parse::<u64>().ok()).unwrap_or(0) << 10
}

/// Why a case cannot be measured here.
pub(crate) fn too_small_for(case: Guest) -> Option<String> {
    // a chain has its memory up to three times
    let copies = if case == Guest::Writing { 6 } else { 3 };
    let needed = case.bytes() * copies + (256 << 20);
    let free = available();
    (free < needed).then(|| format!("needs {} MiB of memory, {} are free", needed >> 20, free >> 20))
}

/// Touches as much memory as the next step will need, and frees it, so that the host has given it to us.
pub(crate) fn warm(bytes: u64) {
    let len = usize::try_from(bytes).unwrap_or(0);
    let mut memory: Vec<u8> = Vec::with_capacity(len);
    memory.resize(len, 1);
    std::hint::black_box(&memory);
}
