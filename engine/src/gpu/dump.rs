//! CUDA tasks in a dump: found, locked, checkpointed, and brought back. What it is all about: the [parent](super).

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use standstill_gpu::{Driver, Gpu, Management, State, Uuid};
use standstill_images::proto::{StandstillGpuDevice, StandstillGpuEntry, StandstillGpuTask, StandstillGpuUse};
use standstill_images::{ImageKind, Images};

use super::{guard, running};
use crate::error::{At, Call, Error, Result};
use crate::guard::Guard;
use crate::options::Options;
use crate::sys::ptrace;
use crate::tasks::freeze::{self, Frozen};
use crate::tasks::pids::Inner;
use crate::tracee::Stopped;

/// A CUDA task.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) pid: i32,
    /// When it was started, which tells it from others that get its id.
    pub(super) started: u64,
    /// Its restore thread.
    pub(super) tid: i32,
    /// The state that it was found in.
    pub(super) found: State,
    /// What that thread blocks.
    pub(super) mask: u64,
    /// Who holds it is alone at work on the task's CUDA.
    pub(super) turn: Arc<OwnedFd>,
    uses: Vec<(Uuid, Option<u64>)>,
}

/// The CUDA tasks of a tree, locked; when it is dropped they are as they were found.
#[derive(Debug)]
pub struct Cuda {
    driver: Arc<Driver>,
    version: Option<String>,
    gpus: Vec<Gpu>,
    tasks: Vec<Task>,
    over: bool,
}

/// Is there anything of NVIDIA's on this machine?
fn is_here() -> bool {
    let devices = || std::fs::read_dir("/dev").into_iter().flatten().flatten();
    std::path::Path::new("/proc/driver/nvidia").exists()
        || devices().any(|e| e.file_name().as_encoded_bytes().starts_with(b"nvidia"))
}

/// Whether a task has the driver's library mapped, and whether it has one of its devices open.
fn has_cuda(pid: i32) -> (bool, bool) {
    let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let paths =
        || maps.split(|b| *b == b'\n').filter_map(|l| l.iter().position(|b| *b == b'/').and_then(|at| l.get(at..)));
    let is_library =
        |path: &[u8]| path.rsplit(|b| *b == b'/').next().is_some_and(|name| name.starts_with(b"libcuda.so"));
    let links = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let mut links = links.filter_map(|entry| std::fs::read_link(entry.path()).ok());
    let holds = links.any(|link| link.as_os_str().as_encoded_bytes().starts_with(b"/dev/nvidia"))
        || paths().any(|path| path.starts_with(b"/dev/nvidia"));
    (paths().any(is_library), holds)
}

/// All processes of a tree that runs.
fn tree(root: i32) -> Vec<i32> {
    let (mut all, mut buffer) = (vec![root], Vec::new());
    let mut at = 0;
    while let Some(&pid) = all.get(at) {
        let children = freeze::children_of(pid, &freeze::threads_of(pid), &mut buffer).unwrap_or_default();
        all.extend(children.into_iter().filter(|c| !all.contains(c)).collect::<Vec<_>>());
        at += 1;
    }
    all
}

fn status(tid: i32) -> Result<crate::proc::status::Status> {
    let mut buffer = Vec::new();
    crate::proc::read_proc(format!("/proc/{tid}/status").as_ref(), &mut buffer).map_err(|_| Error::Gone).task(tid)?;
    Ok(crate::proc::status::parse(&buffer)?)
}

/// When a process was started.
pub(super) fn started(pid: i32) -> Result<u64> {
    let mut buffer = Vec::new();
    crate::proc::read_proc(format!("/proc/{pid}/stat").as_ref(), &mut buffer).map_err(|_| Error::Gone).task(pid)?;
    Ok(crate::proc::stat::parse(&buffer)?.starttime)
}

/// Waits until nobody else of us is at work on a task's CUDA: what a dead engine left is undone by its guard, which holds
/// the same. It is a lock of the task's pidfd, so that it needs no name and ends with those who hold it. A kernel older than
/// 6.9 has one inode for all pidfds: there all CUDA tasks have one turn, which we may have already (`ours`).
fn turn(pid: i32, limit: Duration, ours: &[Task]) -> Result<Arc<OwnedFd>> {
    let process = crate::sys::calls::pidfd_open(pid, 0).task(pid)?;
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|s| (s.st_dev, s.st_ino)).call("fstat");
    let wanted = inode(&process)?;
    for task in ours {
        if inode(&task.turn)? == wanted {
            return Ok(task.turn.clone());
        }
    }
    let began = Instant::now();
    loop {
        match rustix::fs::flock(&process, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(Arc::new(process)),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) if began.elapsed() < limit => {
                crate::sys::interrupt::check()?;
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let what = "a task whose CUDA another dump is at work on, or brings back";
                return Err(Error::refused(what, "try again when that is over")).task(pid);
            }
            Err(e) => return Err(e).call("flock").task(pid),
        }
    }
}

impl Cuda {
    /// Finds the CUDA tasks below `root`, which runs, and locks them; none if there are none. `guard` is for them alone.
    pub fn lock(opts: &Options, root: i32, guard: &Guard<'_>) -> Result<Option<Cuda>> {
        if !is_here() {
            return Ok(None);
        }
        let found: Vec<(i32, bool)> = tree(root)
            .into_iter()
            .map(|pid| (pid, has_cuda(pid)))
            .filter(|(_, (library, device))| *library || *device)
            .map(|(pid, (_, device))| (pid, device))
            .collect();
        if found.is_empty() {
            return Ok(None);
        }
        let driver = match Driver::load() {
            Ok(driver) => Arc::new(driver),
            Err(e) => match found.iter().find(|(_, device)| *device) {
                Some((pid, _)) => return Err(Error::from(e)).task(*pid),
                // a program may have the library, and no GPU to go with it
                None => {
                    tracing::debug!("{e}");
                    return Ok(None);
                }
            },
        };
        let management = Management::load();
        let gpus = management.and_then(|m| m.gpus()).unwrap_or_default();
        let limit = Duration::from_secs(opts.gpu_timeout.unwrap_or(opts.timeout).into());
        let mut tasks = Vec::new();
        for (pid, _) in found {
            // it says so of processes that have not begun with CUDA
            let Ok(tid) = driver.restore_thread(pid) else { continue };
            let turn = turn(pid, limit, &tasks)?;
            let state = driver.state(pid).map_err(Error::from).task(pid)?;
            if matches!(state, State::Failed | State::Between(_)) {
                let what = format!("a task whose CUDA is in the driver's {state}");
                return Err(Error::refused(what, "end it, or wait until the driver is done with it")).task(pid);
            }
            let users = |gpu: &Gpu| gpu.users.iter().find(|u| u.pid == pid).map(|u| (gpu.uuid, u.bytes));
            let uses = gpus.iter().filter_map(users).collect();
            let mask = status(tid)?.sig_blocked;
            tasks.push(Task { pid, started: started(pid)?, tid, found: state, mask, turn, uses });
        }
        if tasks.is_empty() {
            return Ok(None);
        }
        let version = management.and_then(|m| m.driver());
        let cuda = Cuda { driver, version, gpus, tasks, over: false };
        cuda.check_memory()?;
        guard::register(guard, &cuda.tasks)?;
        let to_lock: Vec<i32> = cuda.tasks.iter().filter(|t| t.found == State::Running).map(|t| t.pid).collect();
        tracing::info!("CUDA tasks {to_lock:?} are locked");
        let driver = cuda.driver.clone();
        let locked = running::side_by_side(&to_lock, move |pid| driver.lock(pid, limit), || Ok(()));
        locked.into_iter().collect::<Result<()>>()?;
        Ok(Some(cuda))
    }

    /// What is on GPUs must find room in the memory of this machine.
    fn check_memory(&self) -> Result<()> {
        let used: u64 = self
            .tasks
            .iter()
            .filter(|t| t.found != State::Checkpointed)
            .flat_map(|t| t.uses.iter().filter_map(|(_, bytes)| *bytes))
            .sum();
        let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let available = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
        let kib = available.and_then(|v| v.trim().strip_suffix("kB")?.trim().parse::<u64>().ok());
        let Some(free) = kib.map(|kib| kib.saturating_mul(1024)) else { return Ok(()) };
        if used > free {
            return Err(Error::Usage {
                what: format!(
                    "the tree has {} MiB on GPUs, which come into the memory of this machine first, and {} MiB of that are \
                     free: free some, or dump when less is in use",
                    used >> 20,
                    free >> 20
                ),
            });
        }
        Ok(())
    }

    /// Whether a task is one of these.
    pub fn has(&self, pid: i32) -> bool {
        self.tasks.iter().any(|t| t.pid == pid)
    }

    fn pairs(&self, of: impl Fn(&Task) -> bool) -> Vec<(i32, i32)> {
        self.tasks.iter().filter(|t| of(t)).map(|t| (t.pid, t.tid)).collect()
    }

    /// Checkpoints all of them, in a tree that stands still and of which nothing was read but what the stop told.
    pub fn checkpoint(&mut self, frozen: &mut [Frozen]) -> Result<()> {
        let alive: HashMap<i32, usize> = frozen.iter().enumerate().map(|(i, f)| (f.pid, i)).collect();
        self.tasks.retain(|t| alive.contains_key(&t.pid));
        let tasks = self.pairs(|t| t.found != State::Checkpointed);
        let driver = self.driver.clone();
        let done = running::with_threads(&tasks, ptrace::SYSGOOD, move |pid| driver.checkpoint(pid))?;
        done.into_iter().collect::<Result<()>>()?;
        for (pid, tid) in tasks {
            let threads = alive.get(&pid).and_then(|i| frozen.get_mut(*i)).map(|f| &mut f.threads);
            let Some(threads) = threads else { return Err(Error::Gone).task(pid) };
            read_again(threads, tid).task(pid)?;
            let known = |tid: &i32| threads.iter().any(|t| t.tid() == *tid);
            let mut now = freeze::threads_of(pid);
            now.retain(|tid| !known(tid) && !freeze::is_kernels(pid, *tid, &mut Vec::new()));
            if let Some(new) = now.first() {
                let what = format!("a task whose CUDA driver started thread {new} while it was checkpointed");
                return Err(Error::refused(what, "try again")).task(pid);
            }
        }
        Ok(())
    }

    /// The plugin's name in the inventory, and our record.
    pub fn write(&self, images: &Images, pids: &Inner) -> Result<()> {
        let device = |gpu: &Gpu| StandstillGpuDevice {
            uuid: gpu.uuid.to_string().into_bytes(),
            name: gpu.name.clone().into_bytes(),
            bytes: gpu.total,
        };
        let task = |t: &Task| StandstillGpuTask {
            pid: pids.unsigned(t.pid),
            restore_tid: pids.unsigned(t.tid),
            state: t.found.number(),
            r#use: t
                .uses
                .iter()
                .map(|(uuid, bytes)| StandstillGpuUse { uuid: uuid.to_string().into_bytes(), bytes: *bytes })
                .collect(),
        };
        let entry = StandstillGpuEntry {
            cuda: u32::try_from(self.driver.version()).unwrap_or(0),
            driver: self.version.as_ref().map(|v| v.clone().into_bytes()),
            device: self.gpus.iter().map(device).collect(),
            task: self.tasks.iter().map(task).collect(),
        };
        Ok(images.write_one(ImageKind::StandstillGpu, (), &entry)?)
    }

    /// Brings them back in a tree that stands still, with nothing of ours in it any more, and is to go on.
    pub fn resume(&mut self, all: &mut [Vec<Stopped>]) -> Result<()> {
        let back: HashMap<i32, State> = self.tasks.iter().map(|t| (t.pid, t.found)).collect();
        let tasks = self.pairs(|t| t.found != State::Checkpointed);
        let driver = self.driver.clone();
        let to = move |pid: i32| back.get(&pid).copied().unwrap_or(State::Running);
        let done = running::with_threads(&tasks, ptrace::SYSGOOD, move |pid| driver.bring_back(pid, to(pid)))?;
        done.into_iter().collect::<Result<()>>()?;
        for threads in all {
            let tid = threads.first().and_then(|leader| tasks.iter().find(|t| t.0 == leader.tid())).map(|t| t.1);
            if let Some(tid) = tid {
                read_again(threads, tid).task(tid)?;
            }
        }
        self.over = true;
        Ok(())
    }

    /// They are dead: nothing is to be brought back.
    pub fn tasks_end(&mut self) {
        self.over = true;
    }
}

/// A thread has run: its registers are others.
fn read_again(threads: &mut [Stopped], tid: i32) -> Result<()> {
    threads.iter_mut().find(|t| t.tid() == tid).ok_or(Error::Gone)?.read_again()
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let tasks: Vec<(i32, State)> = self.tasks.iter().map(|t| (t.pid, t.found)).collect();
        let pids: Vec<i32> = tasks.iter().map(|t| t.0).collect();
        let driver = self.driver.clone();
        let back = move |pid: i32| {
            let to = tasks.iter().find(|t| t.0 == pid).map_or(State::Running, |t| t.1);
            driver.bring_back(pid, to)
        };
        for result in running::side_by_side(&pids, back, || Ok(())) {
            if let Err(e) = result {
                tracing::error!("CUDA could not be brought back: {}", e.chain());
            }
        }
    }
}
