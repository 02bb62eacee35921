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
    /// One task, 1 MiB.
    Small,
    /// One task, 256 MiB.
    Mib256,
    /// One task, 1 GiB.
    Gib1,
    /// A task and 99 children, each with 4 MiB that nobody shares.
    Tasks100,
    /// One task with 500 threads.
    Threads500,
    /// One task with 30,000 areas of a page each, none of which touches another.
    Areas30000,
    /// One task, 1 GiB, which it writes to when it is told.
    Writing,
    /// The same, to a few pages, with memory that comes later.
    Late,
}

impl Guest {
    /// In the order of the table.
    pub(crate) const ALL: [Guest; 8] = [
        Guest::Small,
        Guest::Mib256,
        Guest::Gib1,
        Guest::Tasks100,
        Guest::Threads500,
        Guest::Areas30000,
        Guest::Writing,
        Guest::Late,
    ];

    /// As it is called.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Guest::Small => "small",
            Guest::Mib256 => "256MiB",
            Guest::Gib1 => "1GiB",
            Guest::Tasks100 => "100tasks",
            Guest::Threads500 => "500threads",
            Guest::Areas30000 => "30000areas",
            Guest::Writing => "writing",
            Guest::Late => "late",
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

    /// As a reader of the results wants to have it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Guest::Small => "small (1 MiB)",
            Guest::Mib256 => "256 MiB",
            Guest::Gib1 => "1 GiB",
            Guest::Tasks100 => "100 tasks of 4 MiB",
            Guest::Threads500 => "500 threads",
            Guest::Areas30000 => "30,000 areas",
            Guest::Writing => "1 GiB, goes on",
            Guest::Late => "1 GiB, later",
        }
    }

    /// Memory that each of its tasks fills.
    fn own(self) -> u64 {
        match self {
            Guest::Small | Guest::Threads500 => 1 << 20,
            Guest::Tasks100 => 4 << 20,
            Guest::Mib256 => 256 << 20,
            Guest::Gib1 | Guest::Writing | Guest::Late => 1 << 30,
            Guest::Areas30000 => AREAS as u64 * PAGE as u64,
        }
    }

    /// Memory that it fills, all tasks together.
    pub(crate) fn bytes(self) -> u64 {
        self.own() * if self == Guest::Tasks100 { TASKS } else { 1 }
    }

    /// What a dump or a restore of it may touch besides that memory.
    pub(crate) fn overhead(self) -> u64 {
        match self {
            Guest::Small | Guest::Mib256 | Guest::Gib1 | Guest::Writing | Guest::Late => 32 << 20,
            Guest::Tasks100 | Guest::Threads500 | Guest::Areas30000 => 192 << 20,
        }
    }

    /// How many times faster than CRIU a dump and a restore are to be; of what goes on, a snapshot's freeze and a pre-dump.
    pub(crate) fn wanted(self) -> (f64, f64) {
        match self {
            Guest::Small => (6.0, 2.5),
            Guest::Writing => (20.0, 20.0),
            Guest::Mib256 | Guest::Gib1 | Guest::Late => (2.0, 2.0),
            Guest::Tasks100 | Guest::Areas30000 => (3.0, 3.0),
            Guest::Threads500 => (4.0, 4.0),
        }
    }

    /// How often it is measured.
    pub(crate) fn rounds(self) -> usize {
        match self {
            Guest::Small => 21,
            Guest::Mib256 | Guest::Tasks100 | Guest::Threads500 | Guest::Areas30000 => 9,
            Guest::Gib1 | Guest::Writing | Guest::Late => 5,
        }
    }
}

const PAGE: usize = 4096;
const TASKS: u64 = 100;
const THREADS: usize = 500;
const AREAS: usize = 30_000;

/// Is that program, from ready to checked.
pub(crate) fn run(kind: Guest, dir: &Path) -> Result<()> {
    setsid().context("setsid")?;
    close_inherited()?;
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block().context("sigprocmask")?;
    let mut children = Vec::new();
    if kind == Guest::Tasks100 {
        for n in 1..TASKS {
            children.push(child(kind, n, &end, dir)?);
        }
        for n in 1..TASKS {
            while !dir.join(format!("ready-{n}")).exists() {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
    if kind == Guest::Threads500 {
        for _ in 1..THREADS {
            std::thread::Builder::new().stack_size(64 << 10).spawn(|| loop {
                std::thread::park();
            })?;
        }
    }
    let mut memory = Memory::new(kind, 0)?;
    if matches!(kind, Guest::Writing | Guest::Late) {
        end.add(Signal::SIGUSR1);
        end.add(Signal::SIGUSR2);
        end.thread_block().context("sigprocmask")?;
    }
    std::fs::write(dir.join("ready"), "")?;
    for turn in 0.. {
        let every = match end.wait().context("sigwait")? {
            Signal::SIGUSR1 if kind == Guest::Late => 32 << 10,
            Signal::SIGUSR1 => 100,
            Signal::SIGUSR2 => 1,
            _ => break,
        };
        let took = memory.write(every, turn);
        let done = dir.join("written.new");
        std::fs::write(&done, took.as_nanos().to_string())?;
        std::fs::rename(done, dir.join("written"))?;
    }

    memory.check()?;
    for pid in children {
        nix::sys::signal::kill(pid, Signal::SIGTERM).context("a child is gone")?;
        let status = waitpid(pid, None).context("a child is not ours")?;
        ensure!(status == WaitStatus::Exited(pid, 0), "a child ended with {status:?}");
    }
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    ensure!(threads == if kind == Guest::Threads500 { THREADS } else { 1 }, "there are {threads} threads");
    std::fs::write(dir.join("ok"), "")?;
    Ok(())
}

/// Pages whose every byte is known: the first words say which page of which task it is.
struct Memory {
    /// Pieces of the address space, in order.
    pieces: Vec<&'static mut [u8]>,
    task: u64,
}

impl Memory {
    fn new(kind: Guest, task: u64) -> Result<Memory> {
        let bytes = usize::try_from(kind.own())?;
        let pieces = if kind == Guest::Areas30000 { separate_pages()? } else { vec![anonymous(bytes)?] };
        let mut memory = Memory { pieces, task };
        for (n, page) in memory.pieces.iter_mut().flat_map(|p| p.chunks_exact_mut(PAGE)).enumerate() {
            page.fill(0x5a);
            page[..8].copy_from_slice(&(n as u64).to_le_bytes());
            page[8..16].copy_from_slice(&task.to_le_bytes());
        }
        Ok(memory)
    }

    /// Writes a word that says what it said before to one page of so many; how long that took.
    fn write(&mut self, every: usize, turn: usize) -> std::time::Duration {
        let began = std::time::Instant::now();
        let pages = self.pieces.iter_mut().flat_map(|p| p.chunks_exact_mut(PAGE)).enumerate();
        for (n, page) in pages.skip(turn % every).step_by(every) {
            page[..8].copy_from_slice(&std::hint::black_box(n as u64).to_le_bytes());
        }
        began.elapsed()
    }

    fn check(&self) -> Result<()> {
        for (n, page) in self.pieces.iter().flat_map(|p| p.chunks_exact(PAGE)).enumerate() {
            let whole = page[..8] == (n as u64).to_le_bytes()
                && page[8..16] == self.task.to_le_bytes()
                && page[16..].iter().all(|b| *b == 0x5a);
            ensure!(whole, "page {n} of task {} has changed", self.task);
        }
        Ok(())
    }
}

fn anonymous(bytes: usize) -> Result<&'static mut [u8]> {
    let map = memmap2::MmapOptions::new().len(bytes).map_anon().context("mmap")?;
    let map: &'static mut memmap2::MmapMut = Box::leak(Box::new(map));
    Ok(&mut map[..])
}

/// Areas of a page each, with a page of nothing between them.
#[allow(unsafe_code)]
fn separate_pages() -> Result<Vec<&'static mut [u8]>> {
    let all = anonymous(AREAS * 2 * PAGE)?;
    let mut pages = Vec::with_capacity(AREAS);
    for pair in all.chunks_exact_mut(2 * PAGE) {
        let (page, gap) = pair.split_at_mut(PAGE);
        let gap = std::ptr::NonNull::new(gap.as_mut_ptr().cast()).context("address")?;
        // SAFETY: the gap is a page of a mapping that is never freed, and nobody uses that page.
        unsafe { nix::sys::mman::munmap(gap, PAGE) }.context("munmap")?;
        pages.push(page);
    }
    Ok(pages)
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

/// A copy of this process that has memory of its own, waits for SIGTERM, and checks it.
#[allow(unsafe_code)]
fn child(kind: Guest, task: u64, end: &SigSet, dir: &Path) -> Result<Pid> {
    // SAFETY: there is one thread only, so no lock is held by another one that the copy lacks.
    match unsafe { nix::unistd::fork() }.context("fork")? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let life = || {
                let memory = Memory::new(kind, task)?;
                std::fs::write(dir.join(format!("ready-{task}")), "")?;
                end.wait().context("sigwait")?;
                memory.check()
            };
            std::process::exit(i32::from(life().is_err()))
        }
    }
}
