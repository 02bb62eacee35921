//! The programs that are dumped: this one, started once more. Each says that it is ready by making a file, waits for
//! SIGTERM, checks itself, and says in another file that all is well.

use anyhow::{ensure, Context as _, Result};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{waitpid, WaitStatus};
use nix::unistd::{setsid, ForkResult, Pid};
use std::path::Path;

/// A program to dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guest {
    /// One task, a page of memory of its own.
    Small,
    /// One task, 256 MiB.
    Mib256,
    /// One task, 1 GiB.
    Gib1,
    /// A task and 99 children.
    Tasks100,
    /// One task with 500 threads.
    Threads500,
}

impl Guest {
    /// In the order of the table.
    pub(crate) const ALL: [Guest; 5] = [Guest::Small, Guest::Mib256, Guest::Gib1, Guest::Tasks100, Guest::Threads500];

    /// As it is called.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Guest::Small => "small",
            Guest::Mib256 => "256MiB",
            Guest::Gib1 => "1GiB",
            Guest::Tasks100 => "100tasks",
            Guest::Threads500 => "500threads",
        }
    }

    /// By its name.
    pub(crate) fn from_name(name: &str) -> Result<Guest> {
        let all = || Guest::ALL.map(Guest::name).join(", ");
        Guest::ALL
            .into_iter()
            .find(|g| g.name() == name)
            .with_context(|| format!("no case {name}; there are: {}", all()))
    }

    /// Memory that it fills.
    pub(crate) fn bytes(self) -> u64 {
        match self {
            Guest::Small | Guest::Threads500 | Guest::Tasks100 => 4096,
            Guest::Mib256 => 256 << 20,
            Guest::Gib1 => 1 << 30,
        }
    }

    /// What a dump or a restore of it may touch besides that memory.
    pub(crate) fn overhead(self) -> u64 {
        match self {
            Guest::Small | Guest::Mib256 | Guest::Gib1 => 32 << 20,
            Guest::Tasks100 | Guest::Threads500 => 192 << 20,
        }
    }

    /// How often it is measured.
    pub(crate) fn rounds(self) -> usize {
        match self {
            Guest::Small => 21,
            Guest::Mib256 | Guest::Tasks100 | Guest::Threads500 => 9,
            Guest::Gib1 => 5,
        }
    }
}

const PAGE: usize = 4096;

/// Is that program, from ready to checked.
pub(crate) fn run(kind: Guest, dir: &Path) -> Result<()> {
    setsid().context("setsid")?;
    close_inherited()?;
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block().context("sigprocmask")?;
    let mut memory = vec![0x5a_u8; usize::try_from(kind.bytes())?];
    for (n, page) in memory.chunks_exact_mut(PAGE).enumerate() {
        page[..8].copy_from_slice(&(n as u64).to_le_bytes());
    }
    let mut children = Vec::new();
    match kind {
        Guest::Small | Guest::Mib256 | Guest::Gib1 => {}
        Guest::Tasks100 => {
            for _ in 1..100 {
                children.push(child(&end)?);
            }
        }
        Guest::Threads500 => {
            for _ in 1..500 {
                std::thread::Builder::new().stack_size(64 << 10).spawn(|| loop {
                    std::thread::park();
                })?;
            }
        }
    }
    std::fs::write(dir.join("ready"), "")?;
    end.wait().context("sigwait")?;

    for (n, page) in memory.chunks_exact(PAGE).enumerate() {
        let whole = page[..8] == (n as u64).to_le_bytes() && page[8..].iter().all(|b| *b == 0x5a);
        ensure!(whole, "page {n} has changed");
    }
    for pid in children {
        nix::sys::signal::kill(pid, Signal::SIGTERM).context("a child is gone")?;
        let status = waitpid(pid, None).context("a child is not ours")?;
        ensure!(status == WaitStatus::Exited(pid, 0), "a child ended with {status:?}");
    }
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    ensure!(threads == if kind == Guest::Threads500 { 500 } else { 1 }, "there are {threads} threads");
    std::fs::write(dir.join("ok"), "")?;
    Ok(())
}

/// Descriptors that whoever started us left open are not ours to carry.
fn close_inherited() -> Result<()> {
    let open: Vec<i32> =
        std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2) {
        // the one that listed them is closed already
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// A copy of this process that waits for SIGTERM.
#[allow(unsafe_code)]
fn child(end: &SigSet) -> Result<Pid> {
    // SAFETY: there is one thread only, so no lock is held by another one that the copy lacks.
    match unsafe { nix::unistd::fork() }.context("fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = i32::from(end.wait().is_err());
            std::process::exit(code)
        }
    }
}
