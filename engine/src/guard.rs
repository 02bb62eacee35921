//! The guard: a tiny process that undoes what a dead engine cannot.
//!
//! What the engine changes outside of itself and of the tasks that it holds (repair mode of a connection, a firewall rule, a
//! name) stays when it is killed; so does half a tree, if it is killed while it lets a tree go or ends it. So before
//! such a change the engine says how it is undone: a system call on descriptors that the guard has got copies of. The guard
//! is a fresh process with nothing in it but the executor. It sleeps on the robust futex that the engine's thread owns, so
//! that the kernel wakes it when that thread is dead, for whatever reason; then it runs the list that was chosen, the last
//! operation first, whatever single ones return, and ends. When the engine is done, the guard just ends.
//!
//! There are two lists: one that puts everything back, and one that brings a decision to its end. Which of them counts, if
//! any, is one word in shared memory ([`Guard::choose`]), so a change of mind is one store, and happened or did not.
//!
//! It is started when something is first to be undone, has a session of its own, all signals blocked, none of the
//! program's descriptors, and gives nobody a SIGCHLD ([`crate::sys::spawn::Kept`]). It does not survive a SIGKILL of its own
//! (of a whole control group, say).
//!
//! Man pages: set_robust_list(2), unix(7), pidfd_send_signal(2).

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use standstill_restorer::arch::Boot;
use standstill_restorer::plan::{self, Code, Control, List as RawList, Owner};

use crate::error::{At, Call, Error, Place, Result};
use crate::plan::Plan;
use crate::sys::futex::{self, RobustList};
use crate::sys::memory::{bytes_of, Shared};
use crate::sys::ptrace;
use crate::sys::spawn::{self, Kept, Spawn, FIRST_FD};
use crate::tracee::{write_control, BLOB};

const PAGE: usize = 4096;
/// Where its memory lies: anywhere, in a process with nothing else in it.
const BASE: u64 = 0x1000_0000_0000;
const STACK: usize = 16 << 10;
/// Room for a list; only what is written costs memory.
const LIST_ROOM: usize = 16 << 20;
const DATA_ROOM: usize = 32 << 20;
/// The first number of a descriptor that is sent to it.
const FIRST_HELD: i32 = 16;

/// The program that a guard can become, to do more than make system calls: the very file that runs as the engine, or, in a
/// program that embeds the library, `standstill` on PATH.
fn own_program() -> Option<PathBuf> {
    if ptrace::is_alone() {
        return Some("/proc/self/exe".into());
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&folders).map(|f| f.join("standstill")).find(|p| p.is_file())
}

/// Which list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum List {
    /// What puts everything back.
    Undo,
    /// What brings to an end what was decided.
    End,
}

/// What the guard does if the engine dies now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Nothing.
    Nothing,
    /// [`List::Undo`]: so it begins.
    Undo,
    /// [`List::End`].
    End,
}

/// A descriptor that the guard has a copy of: its number there.
#[derive(Clone, Copy, Debug)]
pub struct Held(u64);

/// One thing to do.
#[derive(Debug)]
pub enum Act<'a> {
    /// setsockopt(2): level, name and value.
    SocketOption(Held, i32, i32, &'a [u8]),
    /// SIGKILL to the process of a pidfd.
    Kill(Held),
    /// sendto(2) of a message to where the socket is connected to.
    Send(Held, &'a [u8]),
    /// pwrite(2) of bytes at an offset.
    WriteAt(Held, u64, &'a [u8]),
    /// The guard becomes a shell that runs this script: to be registered before all else, as nothing is done after it.
    Script(Held),
    /// The guard becomes this program, an executable file, with these words and this environment: nothing is done after it.
    Program(Held, &'a [String], &'a [(OsString, OsString)]),
    /// The guard enters the network namespace of a descriptor: to be registered right behind a script that is to run there.
    EnterNetwork(Held),
    /// unlink(2).
    Remove(&'a Path),
    /// unlinkat(2) of a name in a folder; true for a folder.
    RemoveIn(Held, &'a [u8], bool),
    /// shmctl(2) with IPC_RMID.
    RemoveSegment(i32),
    /// clock_nanosleep(2): what was done before it, which is registered behind it, is given this time.
    Pause(Duration),
}

/// The guard of one dump or restore, if one is needed.
#[derive(Debug)]
pub struct Guard<'r> {
    robust: &'r RobustList,
    running: RefCell<Option<Running>>,
}

#[derive(Debug)]
struct Running {
    memory: Shared,
    layout: Layout,
    socket: OwnedFd,
    /// Bytes of data written.
    data: usize,
    /// It must be there until the guard was told that it is over.
    _process: Kept,
}

/// Where things lie in the shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    code: usize,
    owner: usize,
    control: usize,
    guard: usize,
    stack: usize,
    plan: usize,
    lists: [usize; 2],
    data: usize,
    len: usize,
}

impl Layout {
    fn new() -> Layout {
        let code = BLOB.len().next_multiple_of(PAGE);
        let owner = code;
        let control = owner + size_of::<Owner>().next_multiple_of(64);
        let guard = control + size_of::<Control>().next_multiple_of(64);
        let stack = guard + size_of::<plan::Guard>().next_multiple_of(64);
        let plan = stack + STACK;
        let first = plan + PAGE;
        let data = first + 2 * LIST_ROOM;
        Layout {
            code,
            owner,
            control,
            guard,
            stack,
            plan,
            lists: [first, first + LIST_ROOM],
            data,
            len: (data + DATA_ROOM).next_multiple_of(PAGE),
        }
    }
}

impl<'r> Guard<'r> {
    /// A guard that is not there yet. `robust` is of this thread, which the guard watches.
    pub fn new(robust: &'r RobustList) -> Guard<'r> {
        Guard { robust, running: RefCell::new(None) }
    }

    /// Has something been registered?
    pub fn is_running(&self) -> bool {
        self.running.borrow().is_some()
    }

    fn with<T>(&self, run: impl FnOnce(&mut Running) -> Result<T>) -> Result<T> {
        let mut running = self.running.borrow_mut();
        let guard = match &mut *running {
            Some(guard) => guard,
            none => none.insert(Running::start(self.robust).at(Place::Step("starting the guard process"))?),
        };
        run(guard)
    }

    /// Gives the guard a copy of a descriptor, and starts it if it is not there.
    pub fn hold(&self, fd: BorrowedFd<'_>) -> Result<Held> {
        self.with(|guard| guard.send(fd).at(Place::Step("the guard process")))
    }

    /// Adds to a list what is to be done; when this returns, it will be.
    pub fn register(&self, list: List, act: &Act<'_>) -> Result<()> {
        self.with(|guard| guard.add(list, act))
    }

    /// What is undone by `standstill` with these words, an internal verb first, and this environment: to be registered before
    /// all else. False if there is no such program.
    pub fn register_own_program(&self, words: &[String], environment: &[(OsString, OsString)]) -> Result<bool> {
        let Some(program) = own_program() else { return Ok(false) };
        let file = File::open(&program).call("open").at(Place::Path(program))?;
        let held = self.hold(file.as_fd())?;
        let words: Vec<String> = std::iter::once("standstill".to_owned()).chain(words.iter().cloned()).collect();
        self.register(List::Undo, &Act::Program(held, &words, environment))?;
        Ok(true)
    }

    /// Adds a process to those that a list kills.
    pub fn register_kill(&self, list: List, pid: i32) -> Result<()> {
        let process = crate::sys::calls::pidfd_open(pid, 0).task(pid)?;
        let held = self.hold(process.as_fd())?;
        self.register(list, &Act::Kill(held))
    }

    /// From now on, this is what is done.
    pub fn choose(&self, choice: Choice) {
        if let Some(guard) = &*self.running.borrow() {
            let word = match choice {
                Choice::Nothing => 0,
                Choice::Undo => 1,
                Choice::End => 2,
            };
            guard.words().choice.store(word, Ordering::SeqCst);
        }
    }
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if let Some(guard) = self.running.borrow_mut().take() {
            guard.words().over.store(1, Ordering::SeqCst);
            futex::wake(&guard.memory.at::<Owner>(guard.layout.owner).word);
            self.robust.release(&guard.memory, guard.layout.owner);
        }
    }
}

impl Running {
    fn start(robust: &RobustList) -> Result<Running> {
        let layout = Layout::new();
        let fd = spawn::memfd(c"standstill-guard", 0)?;
        rustix::fs::ftruncate(&fd, layout.len as u64).call("ftruncate")?;
        let memory = Shared::map(fd.as_fd(), 0, layout.len)?;
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .call("socketpair")?;
        memory.write(0, BLOB);
        write_guard(&memory, &layout)?;
        robust.own_and_wake(&memory, layout.owner);
        let boot = Boot {
            fd: 0,
            address: BASE,
            code: layout.code as u64,
            data: (layout.len - layout.code) as u64,
            entry: BASE,
            control: BASE + layout.control as u64,
            stack: BASE + (layout.stack + STACK) as u64,
        };
        let inherit = [fd.as_fd(), theirs.as_fd()];
        match spawn::spawn_kept(&Spawn::helper(BASE - (64 << 10), boot, &inherit)) {
            Ok(process) => Ok(Running { memory, layout, socket: ours, data: 0, _process: process }),
            Err(e) => {
                robust.release(&memory, layout.owner);
                Err(e)
            }
        }
    }

    fn words(&self) -> &plan::Guard {
        self.memory.at(self.layout.guard)
    }

    /// Its copy of a descriptor. What was sent counts even if the guard has not taken it when the engine dies.
    fn send(&mut self, fd: BorrowedFd<'_>) -> Result<Held> {
        let number = self.words().sent.load(Ordering::Relaxed);
        let fds = [fd];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        loop {
            match rustix::net::sendmsg(&self.socket, &[std::io::IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)
            {
                Err(rustix::io::Errno::INTR) => {}
                other => break other.map(drop).call("sendmsg")?,
            }
        }
        self.words().sent.store(number + 1, Ordering::SeqCst);
        futex::wake(&self.memory.at::<Owner>(self.layout.owner).word);
        Ok(Held(u64::from(number) + FIRST_HELD as u64))
    }

    /// Bytes for an operation: their address in the guard.
    fn bytes(&mut self, bytes: &[u8]) -> Result<u64> {
        let at = self.data.next_multiple_of(8);
        if at + bytes.len() > DATA_ROOM {
            return Err(full());
        }
        self.data = at + bytes.len();
        self.memory.write(self.layout.data + at, bytes);
        Ok(BASE + (self.layout.data + at) as u64)
    }

    fn add(&mut self, list: List, act: &Act<'_>) -> Result<()> {
        const AT_FDCWD: u64 = libc::AT_FDCWD as i64 as u64;
        let (nr, args) = match *act {
            Act::SocketOption(Held(fd), level, name, value) => {
                let at = self.bytes(value)?;
                (libc::SYS_setsockopt, [fd, level as u64, name as u64, at, value.len() as u64, 0])
            }
            Act::Kill(Held(fd)) => (libc::SYS_pidfd_send_signal, [fd, libc::SIGKILL as u64, 0, 0, 0, 0]),
            Act::Send(Held(fd), message) => {
                let at = self.bytes(message)?;
                let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
                (libc::SYS_sendto, [fd, at, message.len() as u64, flags as u64, 0, 0])
            }
            Act::WriteAt(Held(fd), offset, bytes) => {
                let at = self.bytes(bytes)?;
                (libc::SYS_pwrite64, [fd, at, bytes.len() as u64, offset, 0, 0])
            }
            Act::Script(Held(fd)) => {
                let shell = self.bytes(b"/bin/sh\0")?;
                let script = self.bytes(format!("/proc/self/fd/{fd}\0").as_bytes())?;
                let path = self.bytes(b"PATH=/usr/sbin:/usr/bin:/sbin:/bin\0")?;
                let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
                let argv = self.bytes(&words(&[shell, script, 0]))?;
                let envp = self.bytes(&words(&[path, 0]))?;
                (libc::SYS_execve, [shell, argv, envp, 0, 0, 0])
            }
            Act::Program(Held(fd), arguments, environment) => {
                let file = self.bytes(format!("/proc/self/fd/{fd}\0").as_bytes())?;
                let mut argv = Vec::new();
                for word in arguments {
                    argv.push(self.bytes(&[word.as_bytes(), &[0]].concat())?);
                }
                let mut envp = Vec::new();
                for (name, value) in environment {
                    envp.push(self.bytes(&[name.as_encoded_bytes(), b"=", value.as_encoded_bytes(), &[0]].concat())?);
                }
                let words = |words: &[u64]| words.iter().chain(&[0]).flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
                let argv = self.bytes(&words(&argv))?;
                let envp = self.bytes(&words(&envp))?;
                (libc::SYS_execve, [file, argv, envp, 0, 0, 0])
            }
            Act::EnterNetwork(Held(fd)) => (libc::SYS_setns, [fd, libc::CLONE_NEWNET as u64, 0, 0, 0, 0]),
            Act::Remove(path) => {
                use std::os::unix::ffi::OsStrExt;
                let at = self.bytes(&[path.as_os_str().as_bytes(), &[0]].concat())?;
                (libc::SYS_unlinkat, [AT_FDCWD, at, 0, 0, 0, 0])
            }
            Act::RemoveIn(Held(fd), name, is_folder) => {
                let at = self.bytes(&[name, &[0]].concat())?;
                let flags = if is_folder { libc::AT_REMOVEDIR } else { 0 };
                (libc::SYS_unlinkat, [fd, at, flags as u64, 0, 0, 0])
            }
            Act::RemoveSegment(id) => (libc::SYS_shmctl, [id as u64, libc::IPC_RMID as u64, 0, 0, 0, 0]),
            Act::Pause(time) => {
                let words = [time.as_secs(), time.subsec_nanos().into()];
                let at = self.bytes(&words.map(u64::to_le_bytes).concat())?;
                (libc::SYS_clock_nanosleep, [libc::CLOCK_MONOTONIC as u64, 0, at, 0, 0, 0])
            }
        };
        let op = plan::Op {
            code: Code::Syscall as u32,
            nr: nr as u32,
            kinds: [0; 6],
            expect: 0,
            always: 0,
            args,
            want: [0; 2],
        };
        let which = if list == List::Undo { 0 } else { 1 };
        let count = &self.words().lists[which].count;
        let n = count.load(Ordering::Relaxed) as usize;
        if (n + 1) * size_of::<plan::Op>() > LIST_ROOM {
            return Err(full());
        }
        self.memory.write(self.layout.lists[which] + n * size_of::<plan::Op>(), bytes_of(&op));
        count.store(n as u32 + 1, Ordering::SeqCst);
        Ok(())
    }
}

fn full() -> Error {
    Error::Usage { what: "there is too much to undo for the memory of the guard process".into() }
}

/// What the guard finds when it starts: its control, its plan, empty lists.
fn write_guard(memory: &Shared, layout: &Layout) -> Result<()> {
    let own = plan::Guard {
        over: 0.into(),
        choice: 1.into(),
        sent: 0.into(),
        socket: FIRST_FD as u32 + 1,
        first: FIRST_HELD as u64,
        lists: layout.lists.map(|at| RawList { ops: BASE + at as u64, count: 0.into(), reserved: 0 }),
    };
    // written as its parts: it is made of atomics, which cannot be copied
    let words: &plan::Guard = memory.at(layout.guard);
    words.choice.store(1, Ordering::SeqCst);
    let at = |offset: usize| layout.guard + offset;
    memory.write(at(std::mem::offset_of!(plan::Guard, socket)), &own.socket.to_le_bytes());
    memory.write(at(std::mem::offset_of!(plan::Guard, first)), &own.first.to_le_bytes());
    for (n, list) in own.lists.iter().enumerate() {
        let list_at = std::mem::offset_of!(plan::Guard, lists) + n * size_of::<RawList>();
        memory.write(at(list_at + std::mem::offset_of!(RawList, ops)), &list.ops.to_le_bytes());
    }

    let mut plan = Plan::new();
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    let limit = plan.words(&[limit, limit]);
    let root = plan.string(b"/");
    plan.ask("standard descriptors", libc::SYS_close_range, &[0.into(), 2.into(), 0.into()]);
    plan.ask("a session of its own", libc::SYS_setsid, &[]);
    plan.ask("folder", libc::SYS_chdir, &[root.into()]);
    plan.ask("limit of open files", libc::SYS_prlimit64, &[0.into(), libc::RLIMIT_NOFILE.into(), limit.into()]);
    // it is to be done before the kernel, which comes to that later, lets the dead engine's tasks go
    let priority = plan.words(&[1]);
    plan.ask("priority", libc::SYS_sched_setscheduler, &[0.into(), libc::SCHED_FIFO.into(), priority.into()]);
    let guard = BASE + layout.guard as u64;
    plan.op(Code::Guard, 0, &[guard.into()], plan::Expect::Any, [0; 2], "guard");
    plan.op(Code::Exit, 0, &[0.into()], plan::Expect::Any, [0; 2], "end");
    plan.check()?;
    let ops = plan.ops_bytes();
    let results = layout.plan + ops.len().next_multiple_of(64);
    let data = results + (plan.len() * 8).next_multiple_of(64);
    memory.write(layout.plan, &ops);
    memory.write(data, plan.data());
    let address = |offset: usize| BASE + offset as u64;
    let control = Control {
        turn: 1.into(),
        done: 0.into(),
        orphan: 2,
        reserved: 0,
        owner: address(layout.owner),
        ops: address(layout.plan),
        count: plan.len() as u64,
        results: address(results),
        base: address(data),
        failed: 0.into(),
        at: 0.into(),
        failure: 0.into(),
        xsave: 0,
        way_back: 0,
        arena: 0,
    };
    write_control(memory, layout.control, &control);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::calls;

    fn children() -> String {
        std::fs::read_to_string(format!("/proc/self/task/{}/children", rustix::thread::gettid().as_raw_nonzero()))
            .unwrap()
    }

    #[test]
    fn a_guard_that_is_not_needed_leaves_no_trace() {
        std::thread::spawn(|| {
            let robust = RobustList::new().unwrap();
            let file = std::env::temp_dir().join(format!("standstill-guard-kept-{}", std::process::id()));
            std::fs::write(&file, "").unwrap();
            let guard = Guard::new(&robust);
            drop(Guard::new(&robust));
            assert!(!guard.is_running());
            guard.register(List::Undo, &Act::Remove(&file)).unwrap();
            assert!(guard.is_running());
            assert_ne!(children(), "");
            // what is not reported to those who wait for any child
            assert_eq!(calls::wait_child(-1, libc::WNOHANG).unwrap_err().errno(), libc::ECHILD);
            drop(guard);
            assert_eq!(children(), "");
            std::fs::remove_file(&file).unwrap();
        })
        .join()
        .unwrap();
    }

    /// A thread that ends without a word to its guard.
    fn orphan(choice: Choice) -> (bool, bool) {
        static TURN: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let turn = TURN.fetch_add(1, Ordering::Relaxed);
        let name = |n: u32| std::env::temp_dir().join(format!("standstill-guard-{}-{turn}-{n}", std::process::id()));
        let files = [name(0), name(1)];
        let folder = std::fs::File::open(std::env::temp_dir()).unwrap();
        for file in &files {
            std::fs::write(file, "").unwrap();
        }
        let process = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    // ends with the thread, and not before
                    let robust: &'static RobustList = Box::leak(Box::new(RobustList::new().unwrap()));
                    let guard = Guard::new(robust);
                    guard.register(List::Undo, &Act::Remove(&files[0])).unwrap();
                    let held = guard.hold(folder.as_fd()).unwrap();
                    use std::os::unix::ffi::OsStrExt;
                    let name = files[1].file_name().unwrap().as_bytes();
                    guard.register(List::End, &Act::RemoveIn(held, name, false)).unwrap();
                    guard.choose(choice);
                    let running = guard.running.borrow_mut().take().unwrap();
                    std::mem::forget(guard);
                    running
                })
                .join()
                .unwrap()
        });
        // waits for its end
        drop(process);
        let left = files.each_ref().map(|file| file.exists());
        for file in files {
            let _ = std::fs::remove_file(file);
        }
        (left[0], left[1])
    }

    #[test]
    fn what_was_chosen_is_done() {
        assert_eq!(orphan(Choice::Undo), (false, true));
        assert_eq!(orphan(Choice::End), (true, false));
        assert_eq!(orphan(Choice::Nothing), (true, true));
    }
}
