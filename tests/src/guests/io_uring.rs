//! Rings for asynchronous requests (io_uring), by raw system calls.

use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::support::*;

pub(super) const SQPOLL: u32 = 1 << 1;
pub(super) const CQSIZE: u32 = 1 << 3;
pub(super) const R_DISABLED: u32 = 1 << 6;
pub(super) const SQE128: u32 = 1 << 10;
pub(super) const CQE32: u32 = 1 << 11;
pub(super) const SINGLE_ISSUER: u32 = 1 << 12;
pub(super) const DEFER_TASKRUN: u32 = 1 << 13;
pub(super) const NO_SQARRAY: u32 = 1 << 16;

pub(super) const NOP: u8 = 0;
pub(super) const READ_FIXED: u8 = 4;
pub(super) const POLL_ADD: u8 = 6;
pub(super) const POLL_REMOVE: u8 = 7;
pub(super) const TIMEOUT: u8 = 11;
pub(super) const READ: u8 = 22;
pub(super) const WRITE: u8 = 23;

pub(super) const FIXED_FILE: u8 = 1 << 0;
pub(super) const ASYNC: u8 = 1 << 4;
pub(super) const SKIP_SUCCESS: u8 = 1 << 6;

const GETEVENTS: u32 = 1;
const SQ_WAKEUP: u32 = 2;
pub(super) const REGISTERED_RING: u32 = 1 << 4;

/// struct io_uring_sqe.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct Sqe {
    pub(super) op: u8,
    pub(super) flags: u8,
    pub(super) priority: u16,
    pub(super) fd: i32,
    pub(super) offset: u64,
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) op_flags: u32,
    pub(super) data: u64,
    pub(super) buffer: u16,
    pub(super) personality: u16,
    pub(super) file_index: u32,
    pub(super) more: [u64; 2],
}

/// A ring, mapped.
pub(super) struct Ring {
    pub(super) fd: i32,
    pub(super) flags: u32,
    entries: [u32; 2],
    sq: Vec<u32>,
    cq: Vec<u32>,
    pub(super) ring: *mut u8,
    other: *mut u8,
    pub(super) sqes: *mut u8,
}

// Threads take turns.
unsafe impl Sync for Ring {}

impl Ring {
    /// One of this kind; `split` maps its completions once more.
    pub(super) fn new(entries: u32, completions: u32, flags: u32, split: bool) -> Ring {
        let mut p = [0u32; 30];
        (p[1], p[2]) = (completions, flags | if completions > 0 { CQSIZE } else { 0 });
        let fd = unsafe { sys(libc::syscall(libc::SYS_io_uring_setup, entries, p.as_mut_ptr())) } as i32;
        let (sq, cq) = (p[10..20].to_vec(), p[20..30].to_vec());
        let cqes = cq[5] + p[1] * if flags & CQE32 != 0 { 32 } else { 16 };
        let end = if flags & NO_SQARRAY != 0 { cqes } else { (sq[6] + p[0] * 4).max(cqes) };
        let map = |len: u32, offset: i64| unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
            let at = libc::mmap(std::ptr::null_mut(), len as usize, 3, flags, fd, offset);
            check!(at != libc::MAP_FAILED);
            at.cast::<u8>()
        };
        let ring = map(end, 0);
        let other = if split { map(end, 0x800_0000) } else { ring };
        let sqes = map(p[0] * if flags & SQE128 != 0 { 128 } else { 64 }, 0x1000_0000);
        Ring { fd, flags, entries: [p[0], p[1]], sq, cq, ring, other, sqes }
    }

    fn word(&self, at: u32) -> &AtomicU32 {
        unsafe { &*self.ring.add(at as usize).cast() }
    }

    /// Heads and tails: of submissions, of completions.
    pub(super) fn words(&self) -> [u32; 4] {
        [self.sq[0], self.sq[1], self.cq[0], self.cq[1]].map(|at| self.word(at).load(Ordering::SeqCst))
    }

    /// Puts a request into the queue.
    pub(super) fn push(&self, sqe: Sqe) {
        let [head, tail, ..] = self.words();
        check!(tail.wrapping_sub(head) < self.entries[0]);
        let slot = tail & (self.entries[0] - 1);
        let size = if self.flags & SQE128 != 0 { 128 } else { 64 };
        unsafe { self.sqes.add(slot as usize * size).cast::<Sqe>().write_volatile(sqe) };
        if self.flags & NO_SQARRAY == 0 {
            self.word(self.sq[6] + 4 * slot).store(slot, Ordering::SeqCst);
        }
        self.word(self.sq[1]).store(tail.wrapping_add(1), Ordering::SeqCst);
    }

    /// Submits, and waits for completions.
    pub(super) fn enter(&self, fd: i32, submit: u32, wait: u32, flags: u32) -> i64 {
        let flags = flags | if wait > 0 { GETEVENTS } else { 0 };
        unsafe { libc::syscall(libc::SYS_io_uring_enter, fd, submit, wait, flags, 0, 0) }
    }

    /// The next completion: data, result, flags.
    pub(super) fn take(&self) -> Option<(u64, i32, u32)> {
        let [.., head, tail] = self.words();
        if head == tail {
            return None;
        }
        let size = if self.flags & CQE32 != 0 { 32 } else { 16 };
        let at = self.cq[5] as usize + (head & (self.entries[1] - 1)) as usize * size;
        let cqe = unsafe { self.other.add(at) };
        let found =
            unsafe { (cqe.cast::<u64>().read(), cqe.add(8).cast::<i32>().read(), cqe.add(12).cast::<u32>().read()) };
        self.word(self.cq[0]).store(head.wrapping_add(1), Ordering::SeqCst);
        Some(found)
    }

    /// One request, from the beginning to its completion.
    pub(super) fn run(&self, sqe: Sqe) -> i32 {
        self.push(sqe);
        if self.flags & SQPOLL != 0 {
            self.enter(self.fd, 1, 0, SQ_WAKEUP);
            self.enter(self.fd, 0, 1, SQ_WAKEUP);
        } else {
            check_eq!(self.enter(self.fd, 1, 1, 0), 1);
        }
        let Some((data, result, _)) = self.take() else { fail("no completion") };
        check_eq!(data, sqe.data);
        result
    }

    pub(super) fn nops(&self, data: std::ops::Range<u64>) {
        data.for_each(|data| check_eq!(self.run(Sqe { op: NOP, data, ..Sqe::default() }), 0));
    }

    pub(super) fn register(&self, code: u32, argument: *const u8, count: u32) -> i64 {
        unsafe { libc::syscall(libc::SYS_io_uring_register, self.fd, code, argument, count) }
    }
}

/// A pipe: the end to read from, and the other.
pub(super) fn pipe() -> [OwnedFd; 2] {
    let mut fds = [0; 2];
    unsafe { sys(libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC)) };
    fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

fn nop(data: u64) -> Sqe {
    Sqe { op: NOP, data, ..Sqe::default() }
}

/// Rings that were never used, or whose queues have gone round; completions that nobody has taken, requests that were not
/// submitted; one that a child has, too; one that an epoll watches.
pub(super) fn rings() {
    let fresh = Ring::new(4, 0, 0, false);
    let round = Ring::new(8, 0, 0, true);
    round.nops(0..29);
    (30..35).for_each(|n| round.push(nop(n)));
    check_eq!(round.enter(round.fd, 5, 0, 0), 5);
    check_eq!(round.take(), Some((30, 0, 0)));
    (40..43).for_each(|n| round.push(nop(n)));
    let shared = Ring::new(4, 0, 0, false);
    shared.nops(0..3);
    let epoll = unsafe { sys(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 5 };
    unsafe { sys(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fresh.fd, &raw mut event)) };
    let flag = Shared::new();
    let child = fork(|| {
        flag.set(1, 1);
        flag.wait(0, 1);
        shared.nops(100..103);
        0
    });
    flag.wait(1, 1);
    let before = [&fresh, &round, &shared].map(Ring::words);
    ready();
    check_eq!([&fresh, &round, &shared].map(Ring::words), before);
    let mut found = libc::epoll_event { events: 0, u64: 0 };
    check_eq!(unsafe { libc::epoll_wait(epoll, &raw mut found, 1, 0) }, 0);
    fresh.push(nop(1));
    check_eq!(fresh.enter(fresh.fd, 1, 0, 0), 1);
    check_eq!(unsafe { libc::epoll_wait(epoll, &raw mut found, 1, 1000) }, 1);
    check_eq!({ found.u64 }, 5);
    check_eq!(fresh.take(), Some((1, 0, 0)));
    fresh.nops(2..20);
    (31..35).for_each(|n| check_eq!(round.take(), Some((n, 0, 0))));
    check_eq!(round.take(), None);
    check_eq!(round.enter(round.fd, 3, 3, 0), 3);
    (40..43).for_each(|n| check_eq!(round.take(), Some((n, 0, 0))));
    round.nops(50..90);
    flag.set(0, 1);
    check_eq!(wait(child), 0);
    check_eq!(shared.words(), [6; 4]);
    shared.nops(200..210);
}

/// Every size of entries, with an array of indices or without; queues of different sizes; one that is disabled still;
/// completions that found no room.
pub(super) fn shapes() {
    let kinds = [NO_SQARRAY, SQE128, CQE32, SQE128 | CQE32, NO_SQARRAY | CQE32, NO_SQARRAY | SQE128];
    let rings: Vec<Ring> = kinds.iter().map(|&flags| Ring::new(4, 0, flags, false)).collect();
    let large: Vec<Ring> = kinds.iter().map(|&flags| Ring::new(256, 2048, flags, false)).collect();
    let unused = Ring::new(4, 0, NO_SQARRAY, false);
    rings.iter().chain(&large).for_each(|ring| ring.nops(0..11));
    for ring in &large {
        (20..40).for_each(|n| ring.push(nop(n)));
        check_eq!(ring.enter(ring.fd, 20, 0, 0), 20);
    }
    let disabled = Ring::new(4, 0, R_DISABLED, false);
    disabled.push(nop(1));
    let full = Ring::new(4, 0, 0, false);
    for n in 0..11 {
        full.push(Sqe { op: 22, fd: -1, data: n, ..Sqe::default() });
        check_eq!(full.enter(full.fd, 1, 0, 0), 1);
    }
    let all: Vec<&Ring> = rings.iter().chain(&large).chain([&unused, &disabled, &full]).collect();
    let before: Vec<_> = all.iter().map(|ring| ring.words()).collect();
    ready();
    check_eq!(all.iter().map(|ring| ring.words()).collect::<Vec<_>>(), before);
    for ring in &large {
        (20..40).for_each(|n| check_eq!(ring.take(), Some((n, 0, 0))));
    }
    unused.nops(0..13);
    rings.iter().chain(&large).for_each(|ring| ring.nops(100..1000));
    check_eq!(disabled.enter(disabled.fd, 1, 0, 0), -1);
    check_eq!(errno(), libc::EBADFD);
    check_eq!(disabled.register(12, std::ptr::null(), 0), 0);
    check_eq!(disabled.enter(disabled.fd, 1, 1, 0), 1);
    check_eq!(disabled.take(), Some((1, 0, 0)));
    for n in 0..11 {
        if n == 8 {
            // makes room, into which the kernel puts what waits
            check_eq!(full.enter(full.fd, 0, 1, 0), 0);
        }
        check_eq!(full.take(), Some((n, -libc::EBADF, 0)));
    }
    full.nops(0..9);
}

/// More completions than submissions, and the other way round.
pub(super) fn counts() {
    // more completions than submissions: a poll that goes on
    let many = Ring::new(4, 0, 0, false);
    let event = unsafe { sys(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) };
    many.push(Sqe { op: POLL_ADD, fd: event, op_flags: 1, length: 1, data: 1, ..Sqe::default() });
    check_eq!(many.enter(many.fd, 1, 0, 0), 1);
    for _ in 0..7 {
        unsafe { check_eq!(libc::write(event, [1u64].as_ptr().cast(), 8), 8) };
        check_eq!(many.enter(many.fd, 0, 1, 0), 0);
        check!(many.take().is_some_and(|(data, result, more)| (data, result, more & 2) == (1, 1, 2)));
    }
    many.push(Sqe { op: POLL_REMOVE, address: 1, data: 2, fd: -1, ..Sqe::default() });
    check_eq!(many.enter(many.fd, 1, 2, 0), 1);
    while many.take().is_some() {}
    unsafe { libc::close(event) };
    let few = Ring::new(4, 0, 0, false);
    (0..9).for_each(|_| {
        few.push(Sqe { flags: SKIP_SUCCESS, ..nop(3) });
        check_eq!(few.enter(few.fd, 1, 0, 0), 1);
    });
    few.nops(0..2);
    let before = [many.words(), few.words()];
    check!(before[0][3] > before[0][0] && before[1][3] < before[1][0]);
    ready();
    check_eq!([many.words(), few.words()], before);
    many.nops(0..13);
    few.nops(0..13);
}

/// Registered files and buffers, with slots that are empty; an eventfd; descriptors of rings, in two threads; workers of the
/// kernel that have nothing to do.
pub(super) fn registered() {
    let [from, to] = pipe();
    let ring = Ring::new(8, 0, 0, false);
    let other = did(std::fs::File::create("registered"));
    let files = [-1, other.as_raw_fd(), -1];
    check_eq!(ring.register(2, files.as_ptr().cast(), 3), 0);
    let memory = Pages::new(4);
    let vectors = [[memory.at(0) as usize, 5000], [0, 0], [memory.at(2) as usize, 100]];
    check_eq!(ring.register(0, vectors.as_ptr().cast(), 3), 0);
    let event = unsafe { sys(libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)) };
    check_eq!(ring.register(4, (&raw const event).cast(), 1), 0);
    let second = Ring::new(4, 0, 0, false);
    // a worker
    unsafe { check_eq!(libc::write(to.as_raw_fd(), b"work".as_ptr().cast(), 4), 4) };
    let mut buffer = [0u8; 8];
    let address = buffer.as_mut_ptr() as u64;
    let read_from_pipe =
        Sqe { op: READ, flags: ASYNC, fd: from.as_raw_fd(), address, length: 8, data: 3, ..Sqe::default() };
    check_eq!(second.run(read_from_pipe), 4);
    check_eq!(ring.run(nop(1)), 0);
    let count = || {
        let mut count = [0u64];
        let read = unsafe { libc::read(event, count.as_mut_ptr().cast(), 8) };
        if read == 8 {
            count[0]
        } else {
            0
        }
    };
    check_eq!(count(), 1);
    let own = |ring: &Ring, slot: u64| {
        let update = [slot, ring.fd as u64];
        check_eq!(ring.register(20, update.as_ptr().cast(), 1), 1);
    };
    own(&ring, 3);
    own(&second, 0);
    let flag = Shared::new();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            own(&second, 5);
            flag.set(0, 1);
            flag.wait(1, 1);
            second.push(nop(70));
            check_eq!(second.enter(5, 1, 1, REGISTERED_RING), 1);
            check_eq!(second.take(), Some((70, 0, 0)));
        });
        flag.wait(0, 1);
        memory.fill(b'a');
        ready();
        check_eq!(count(), 0);
        let write = |file: i32, at: usize, length: u32| Sqe {
            op: WRITE,
            flags: FIXED_FILE,
            fd: file,
            address: memory.at(at) as u64,
            length,
            data: 9,
            ..Sqe::default()
        };
        check_eq!(ring.run(write(1, 0, 5000)), 5000);
        check_eq!(count(), 1);
        check_eq!(did(std::fs::read("registered")), vec![b'a'; 5000]);
        check_eq!(ring.run(write(0, 0, 1)), -libc::EBADF);
        let file = did(std::fs::File::open("/dev/zero"));
        let read = |buffer: u16, at: u64, length: u32| Sqe {
            op: READ_FIXED,
            fd: file.as_raw_fd(),
            address: at,
            length,
            buffer,
            data: 4,
            ..Sqe::default()
        };
        check_eq!(ring.run(read(2, memory.at(2) as u64, 100)), 100);
        check_eq!(ring.run(read(2, memory.at(2) as u64, 101)), -libc::EFAULT);
        check_eq!(ring.run(read(1, memory.at(1) as u64, 1)), -libc::EFAULT);
        check_eq!(unsafe { std::slice::from_raw_parts(memory.at(2), 101) }, [vec![0; 100], vec![b'a']].concat());
        ring.push(nop(7));
        check_eq!(ring.enter(3, 1, 1, REGISTERED_RING), 1);
        check_eq!(ring.take(), Some((7, 0, 0)));
        second.push(nop(8));
        check_eq!(second.enter(0, 1, 1, REGISTERED_RING), 1);
        check_eq!(second.take(), Some((8, 0, 0)));
        check_eq!(second.run(Sqe { op: WRITE, fd: to.as_raw_fd(), address, length: 4, ..Sqe::default() }), 4);
        check_eq!(second.run(read_from_pipe), 4);
        flag.set(1, 1);
    });
}

/// Rings that only one thread may use, which is not the first: one of them with completions that it puts off, one that was
/// made disabled.
pub(super) fn issuers() {
    let flag = Shared::new();
    let thread = |n: usize, flags: u32| {
        let flag = &flag;
        move || {
            let ring = Ring::new(8, 0, flags, false);
            if flags & R_DISABLED != 0 {
                check_eq!(ring.register(12, std::ptr::null(), 0), 0);
            }
            ring.nops(0..13);
            let update = [2, ring.fd as u64];
            check_eq!(ring.register(20, update.as_ptr().cast(), 1), 1);
            let words = ring.words();
            flag.set(n, 1);
            flag.wait(9, 1);
            check_eq!(ring.words(), words);
            ring.nops(20..40);
            ring.push(nop(50));
            check_eq!(ring.enter(2, 1, 1, REGISTERED_RING), 1);
            check_eq!(ring.take(), Some((50, 0, 0)));
            let [from, to] = pipe();
            let mut byte = [0u8; 1];
            let address = byte.as_mut_ptr() as u64;
            ring.push(Sqe { op: READ, fd: from.as_raw_fd(), address, length: 1, data: 60, ..Sqe::default() });
            check_eq!(ring.enter(ring.fd, 1, 0, 0), 1);
            unsafe { check_eq!(libc::write(to.as_raw_fd(), b"x".as_ptr().cast(), 1), 1) };
            check_eq!(ring.enter(ring.fd, 0, 1, 0), 0);
            check_eq!(ring.take(), Some((60, 1, 0)));
            let fd = ring.fd;
            std::thread::scope(|scope| {
                let other = scope.spawn(move || unsafe {
                    // IORING_REGISTER_PROBE, into no room
                    (libc::syscall(libc::SYS_io_uring_register, fd, 8, 1, 1), errno())
                });
                check_eq!(other.join().ok(), Some((-1, libc::EEXIST)));
            });
        }
    };
    std::thread::scope(|scope| {
        let kinds = [SINGLE_ISSUER, SINGLE_ISSUER | DEFER_TASKRUN, SINGLE_ISSUER | DEFER_TASKRUN | R_DISABLED];
        for (n, flags) in kinds.into_iter().enumerate() {
            scope.spawn(thread(n, flags));
        }
        (0..kinds.len()).for_each(|n| flag.wait(n, 1));
        ready();
        flag.set(9, 1);
    });
}

/// A thread of the kernel polls for submissions.
pub(super) fn polled() {
    let ring = Ring::new(8, 0, SQPOLL, false);
    ring.nops(0..21);
    let words = ring.words();
    let threads = || did(std::fs::read_dir("/proc/self/task")).count();
    let before = threads();
    ready();
    check_eq!(ring.words(), words);
    check_eq!(threads(), before);
    ring.nops(30..60);
}

/// Rings that are used all the time, however often they are dumped, and whoever is killed meanwhile: by one thread and by
/// another that alone may, with registered files, buffers and descriptors, and one that the kernel polls.
pub(super) fn busy() {
    let counters = super::storm::counters();
    let done = |_: u64| asked(&folder().join("check")).is_some();
    let beat = |n: usize| counters[n].fetch_add(1, Ordering::Relaxed);
    // a stop may end a wait
    let patient = |ring: &Ring, fd: i32, flags: u32, data: u64| {
        let submitted = ring.enter(fd, 1, 0, flags);
        check!(submitted == 1 || errno() == libc::EINTR);
        eventually("a completion", || {
            ring.enter(fd, u32::from(submitted != 1 && flags & SQ_WAKEUP == 0), 0, flags);
            ring.words()[2] != ring.words()[3]
        });
        let found = ring.take();
        check!(found.is_some_and(|(found, result, _)| (found, result) == (data, 0)));
        check_eq!(ring.take(), None);
    };
    std::thread::scope(|scope| {
        for (thread, flags) in [(0, 0), (1, SINGLE_ISSUER | DEFER_TASKRUN), (2, SQPOLL)] {
            scope.spawn(move || {
                let ring = Ring::new(4, 0, flags, false);
                let memory = Pages::new(2);
                let vectors = [[memory.at(0) as usize, 4096], [memory.at(1) as usize, 10]];
                check_eq!(ring.register(0, vectors.as_ptr().cast(), 2), 0);
                let file = did(std::fs::File::create(format!("file-{thread}")));
                let files = [-1, file.as_raw_fd()];
                check_eq!(ring.register(2, files.as_ptr().cast(), 2), 0);
                let wake = if flags == SQPOLL { SQ_WAKEUP } else { 0 };
                let (fd, registered) = match thread {
                    1 => {
                        let update = [4, ring.fd as u64];
                        check_eq!(ring.register(20, update.as_ptr().cast(), 1), 1);
                        (4, REGISTERED_RING)
                    }
                    _ => (ring.fd, 0),
                };
                for turn in 1.. {
                    if turn % 64 == 0 && done(turn) {
                        break;
                    }
                    ring.push(nop(turn));
                    patient(&ring, fd, wake | registered, turn);
                    beat(thread);
                    if thread == 0 {
                        beat(3);
                        beat(4);
                    }
                    std::thread::sleep(std::time::Duration::from_micros(300));
                }
            });
        }
        ready();
    });
}

/// Requests that change open files while their program stands still: workers of the kernel carry them out, or a thread that
/// polls for them. One file has a name, another has none.
pub(super) fn writes() {
    let counters = super::storm::counters();
    let done = || asked(&folder().join("check")).is_some();
    std::thread::scope(|scope| {
        for (thread, flags, slow, deleted) in [(0, 0, ASYNC, false), (1, SQPOLL, 0, false), (2, 0, ASYNC, true)] {
            scope.spawn(move || {
                let ring = Ring::new(4, 0, flags, false);
                let name = format!("file-{thread}");
                let file = did(std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&name));
                if deleted {
                    did(std::fs::remove_file(&name));
                }
                let (mut bytes, mut found) = (vec![0u8; 300_000], Vec::new());
                for turn in 1u64.. {
                    if done() {
                        break;
                    }
                    bytes.fill(turn as u8);
                    let length = bytes.len() as u32 - turn as u32 % 1000;
                    did(file.set_len(0));
                    let (fd, address) = (file.as_raw_fd(), bytes.as_ptr() as u64);
                    ring.push(Sqe { op: WRITE, flags: slow, fd, address, length, data: turn, ..Sqe::default() });
                    let wake = if flags == SQPOLL { SQ_WAKEUP } else { 0 };
                    let submitted = ring.enter(ring.fd, 1, 0, wake);
                    check_eq!(submitted, 1);
                    eventually("a completion", || {
                        ring.enter(ring.fd, 0, 0, GETEVENTS | wake);
                        ring.words()[2] != ring.words()[3]
                    });
                    check_eq!(ring.take().map(|(data, result, _)| (data, result)), Some((turn, length as i32)));
                    found.resize(length as usize + 1, 0);
                    let n = did(std::os::unix::fs::FileExt::read_at(&file, &mut found, 0));
                    check_eq!(n, length as usize);
                    check!(found[..n].iter().all(|byte| *byte == turn as u8));
                    counters.iter().skip(thread).step_by(3).for_each(|c| {
                        c.fetch_add(1, Ordering::Relaxed);
                    });
                }
            });
        }
        ready();
    });
}

/// Requests under way, each kind in its own guest.
fn in_flight(sqe: Sqe) {
    let ring = Ring::new(4, 0, 0, false);
    ring.push(sqe);
    check_eq!(ring.enter(ring.fd, 1, 0, 0), 1);
    ready();
    check_eq!(ring.take(), None);
}

/// A poll.
pub(super) fn poll_in_flight() {
    let [from, _to] = pipe();
    in_flight(Sqe { op: POLL_ADD, fd: from.as_raw_fd(), op_flags: 1, data: 1, ..Sqe::default() });
}

/// A timeout.
pub(super) fn timeout_in_flight() {
    let limit = [1000i64, 0];
    in_flight(Sqe { op: TIMEOUT, fd: -1, address: limit.as_ptr() as u64, length: 1, data: 1, ..Sqe::default() });
}

/// What a worker carries out.
pub(super) fn open_in_flight() {
    // the other end of a pipe with a name, for which an open waits
    check_eq!(unsafe { libc::mkfifo(c"fifo".as_ptr(), 0o600) }, 0);
    let address = c"fifo".as_ptr() as u64;
    in_flight(Sqe { op: 18, flags: ASYNC, fd: libc::AT_FDCWD, address, data: 1, ..Sqe::default() });
}

/// A ring in the program's own memory (IORING_SETUP_NO_MMAP).
pub(super) fn own_memory() {
    let memory = Pages::new(2);
    let mut p = [0u32; 30];
    p[2] = 1 << 14;
    let place = |at: *mut u8| [at as usize as u32, (at as usize >> 32) as u32];
    p[18..20].copy_from_slice(&place(memory.at(0)));
    p[28..30].copy_from_slice(&place(memory.at(1)));
    unsafe { sys(libc::syscall(libc::SYS_io_uring_setup, 4, p.as_mut_ptr())) };
    ready();
}

/// Provided buffers.
pub(super) fn provided() {
    let ring = Ring::new(4, 0, 0, false);
    let memory = Pages::new(1);
    let address = memory.at(0) as u64;
    let provide = Sqe { op: 31, fd: 2, address, length: 100, buffer: 9, ..Sqe::default() };
    check_eq!(ring.run(provide), 0);
    ready();
    ring.nops(0..3);
}

/// A registered file that is open nowhere else.
pub(super) fn hidden_file() {
    let ring = Ring::new(4, 0, 0, false);
    let file = did(std::fs::File::create("hidden"));
    let fd = file.as_raw_fd();
    check_eq!(ring.register(2, (&raw const fd).cast(), 1), 0);
    drop(file);
    ready();
    let write = Sqe { op: WRITE, flags: FIXED_FILE, fd: 0, address: b"x".as_ptr() as u64, length: 1, ..Sqe::default() };
    check_eq!(ring.run(write), 1);
}

/// Whole pages.
pub(super) struct Pages(*mut u8, usize);

impl Pages {
    pub(super) fn new(count: usize) -> Pages {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let at = unsafe { libc::mmap(std::ptr::null_mut(), count * 4096, 3, flags, -1, 0) };
        check!(at != libc::MAP_FAILED);
        Pages(at.cast(), count)
    }
    pub(super) fn at(&self, page: usize) -> *mut u8 {
        unsafe { self.0.add(page * 4096) }
    }
    pub(super) fn fill(&self, byte: u8) {
        unsafe { self.0.write_bytes(byte, self.1 * 4096) };
    }
}
