//! Threads that wait in the kernel, in every way: nobody hears of the checkpoint.
//!
//! A wait ends as if nothing had happened. After a restore the kernel no longer knows of a wait that restart_syscall(2) would
//! have resumed: it begins again, or, if it is a sleep that tells what is left of it, may end with EINTR.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::pipes::pipe;
use super::signals::{act, mask};
use super::support::*;

const SHORT: Duration = Duration::from_millis(1200);

/// How a wait ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum End {
    /// With this result.
    Result(i64),
    /// With this error.
    Error(i32),
}

fn end(r: i64) -> End {
    if r < 0 {
        End::Error(errno())
    } else {
        End::Result(r)
    }
}

/// A wait under way.
struct Wait {
    name: &'static str,
    expected: End,
    /// After a restore it may also end with EINTR.
    lost: bool,
    /// After a restore there may be room for this much: the same bytes take less of a buffer when they come in one piece.
    room: Option<i64>,
    /// It ends by itself after [`SHORT`], and not before.
    timed: bool,
    thread: std::thread::JoinHandle<(End, Duration)>,
}

impl Wait {
    fn new(name: &'static str, expected: End, timed: bool, call: impl FnOnce() -> i64 + Send + 'static) -> Wait {
        let work = move || {
            let began = Instant::now();
            let ended = end(call());
            (ended, began.elapsed())
        };
        let thread = did(std::thread::Builder::new().name(name.to_owned()).spawn(work));
        Wait { name, expected, lost: false, room: None, timed, thread }
    }
    fn lost(mut self) -> Wait {
        self.lost = true;
        self
    }
    fn or_room(mut self, bytes: i64) -> Wait {
        self.room = Some(bytes);
        self
    }
    fn check(self, how: How) {
        let Ok((ended, took)) = self.thread.join() else { fail(format_args!("{}: panicked", self.name)) };
        if self.lost && how == How::Restored && ended == End::Error(libc::EINTR) {
            return;
        }
        if how == How::Restored && self.room.is_some_and(|bytes| ended == End::Result(bytes)) {
            return;
        }
        if ended != self.expected {
            fail(format_args!("{}: ended with {ended:?}, not {:?}, after {took:?}", self.name, self.expected));
        }
        if self.timed && (took < SHORT - Duration::from_millis(20)) {
            fail(format_args!("{}: ended after {took:?}", self.name));
        }
    }
}

fn short() -> libc::timespec {
    libc::timespec { tv_sec: 1, tv_nsec: 200_000_000 }
}

fn futex(word: &AtomicU32, operation: i32, limit: *const libc::timespec) -> i64 {
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, 0, limit, 0, u32::MAX) }
}

fn set_of(signal: i32) -> libc::sigset_t {
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    unsafe { libc::sigaddset(&raw mut set, signal) };
    set
}

/// All of them at once, a thread for each; half end by themselves, half by an event after the checkpoint.
pub(super) fn waits() {
    static NEVER: AtomicU32 = AtomicU32::new(0);
    static WOKEN: AtomicU32 = AtomicU32::new(0);
    let min = libc::SIGRTMIN();
    mask(libc::SIG_BLOCK, &[min + 1, min + 2]);
    let (input, output) = (libc::POLLIN, libc::EPOLLIN as u32);
    let epoll_of = move |fd: i32| {
        let epoll = unsafe { sys(libc::epoll_create1(0)) };
        let mut event = libc::epoll_event { events: output, u64: 1 };
        unsafe { sys(libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &raw mut event)) };
        epoll
    };
    let ends: Vec<(i32, i32)> = (0..8).map(|_| pipe(0)).collect();
    let out: Vec<i32> = ends.iter().map(|p| p.0).collect();
    let (e_none, e_event) = (epoll_of(out[0]), epoll_of(out[1]));
    let one_event = |epoll, limit| unsafe {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        i64::from(libc::epoll_wait(epoll, &raw mut event, 1, limit))
    };
    let poll = move |fd, limit: i32| unsafe {
        let mut p = libc::pollfd { fd, events: input, revents: 0 };
        i64::from(libc::poll(&raw mut p, 1, limit))
    };
    let select = |fd: i32, limit: Option<libc::timeval>| unsafe {
        let mut set: libc::fd_set = std::mem::zeroed();
        libc::FD_SET(fd, &raw mut set);
        let mut limit = limit;
        let limit = limit.as_mut().map_or(std::ptr::null_mut(), std::ptr::from_mut);
        i64::from(libc::select(fd + 1, &raw mut set, std::ptr::null_mut(), std::ptr::null_mut(), limit))
    };
    let child = fork_beside();
    let (o2, o3, o4, o5) = (out[2], out[3], out[4], out[5]);
    let (result, error) = (End::Result, End::Error);
    let until = {
        let mut t: libc::timespec = unsafe { std::mem::zeroed() };
        unsafe { sys(libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t)) };
        let nanos = t.tv_nsec + 250_000_000;
        libc::timespec { tv_sec: t.tv_sec + 1 + nanos / 1_000_000_000, tv_nsec: nanos % 1_000_000_000 }
    };
    let all = vec![
        Wait::new("epoll_wait, limit", result(0), true, move || one_event(e_none, 1200)),
        Wait::new("epoll_wait, event", result(1), false, move || one_event(e_event, -1)),
        Wait::new("poll, limit", result(0), true, move || poll(o2, 1200)),
        Wait::new("poll, event", result(1), false, move || poll(o3, -1)),
        Wait::new("select, limit", result(0), true, move || {
            select(o2, Some(libc::timeval { tv_sec: 1, tv_usec: 200_000 }))
        }),
        Wait::new("select, event", result(1), false, move || select(o4, None)),
        Wait::new("nanosleep", result(0), true, || unsafe {
            i64::from(libc::nanosleep(&short(), std::ptr::null_mut()))
        }),
        Wait::new("nanosleep, rest in its place", result(0), true, || {
            let mut time = short();
            let at = &raw mut time;
            i64::from(unsafe { libc::nanosleep(at, at) })
        }),
        Wait::new("nanosleep, rest elsewhere", result(0), true, || {
            let (time, mut rest) = (short(), short());
            let r = unsafe { libc::nanosleep(&raw const time, &raw mut rest) };
            // what it says is left is less than all of it
            if r != 0 && rest.tv_sec == time.tv_sec && rest.tv_nsec >= time.tv_nsec {
                return -2;
            }
            i64::from(r)
        })
        .lost(),
        Wait::new("clock_nanosleep", result(0), true, || {
            let null = std::ptr::null_mut();
            i64::from(unsafe { libc::clock_nanosleep(libc::CLOCK_MONOTONIC, 0, &short(), null) })
        }),
        Wait::new("clock_nanosleep, absolute", result(0), false, move || {
            i64::from(unsafe {
                libc::clock_nanosleep(
                    libc::CLOCK_MONOTONIC,
                    libc::TIMER_ABSTIME,
                    &raw const until,
                    std::ptr::null_mut(),
                )
            })
        }),
        Wait::new("futex, limit", error(libc::ETIMEDOUT), true, || futex(&NEVER, libc::FUTEX_WAIT, &short())),
        Wait::new("futex, woken", result(0), false, || loop {
            let r = futex(&WOKEN, libc::FUTEX_WAIT, std::ptr::null());
            // the kernel may wake without reason; an error is an error
            if r != 0 || WOKEN.load(Ordering::SeqCst) != 0 {
                break r;
            }
        }),
        Wait::new("sigtimedwait, limit", error(libc::EAGAIN), true, move || unsafe {
            i64::from(libc::sigtimedwait(&set_of(min + 1), std::ptr::null_mut(), &short()))
        }),
        Wait::new("sigwaitinfo, signal", result(i64::from(min + 2)), false, move || unsafe {
            i64::from(libc::sigwaitinfo(&set_of(min + 2), std::ptr::null_mut()))
        }),
        Wait::new("read", result(1), false, move || {
            let mut byte = 0u8;
            unsafe { libc::read(o5, (&raw mut byte).cast(), 1) as i64 }
        }),
        Wait::new("waitid", result(0), false, move || unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            i64::from(libc::waitid(libc::P_PID, child as u32, &raw mut info, libc::WEXITED))
        }),
    ];
    let pthreads: Vec<_> = all.iter().map(|w| std::os::unix::thread::JoinHandleExt::as_pthread_t(&w.thread)).collect();
    let signalled = all.iter().position(|w| w.name.starts_with("sigwaitinfo")).map(|n| pthreads[n]);
    std::thread::sleep(Duration::from_millis(20));
    let how = ready();
    for n in [1, 3, 4, 5] {
        super::pipes::write(ends[n].1, b"x");
    }
    WOKEN.store(1, Ordering::SeqCst);
    futex(&WOKEN, libc::FUTEX_WAKE, std::ptr::null());
    unsafe { libc::syscall(libc::SYS_futex, WOKEN.as_ptr(), libc::FUTEX_WAKE, 9, 0, 0, 0) };
    if let Some(thread) = signalled {
        check_eq!(unsafe { libc::pthread_kill(thread, min + 2) }, 0);
    }
    unsafe { sys(libc::kill(child, libc::SIGKILL)) };
    for wait in all {
        wait.check(how);
    }
}

/// A child that sleeps until it is killed.
fn fork_beside() -> i32 {
    fork(|| loop {
        unsafe { libc::pause() };
    })
}

// Sets an alarm and reads, in assembly: the handler can tell where it came between the two.
std::arch::global_asm!(
    ".global standstill_alarm_and_read",
    "standstill_alarm_and_read:", // (alarm, descriptor, buffer)
    "mov r8, rsi",
    "mov r9, rdx",
    "mov rsi, rdi",
    "xor edi, edi",
    "xor edx, edx",
    "mov eax, {setitimer}",
    "syscall",
    ".global standstill_alarm_is_set",
    "standstill_alarm_is_set:",
    "mov rdi, r8",
    "mov rsi, r9",
    "mov edx, 1",
    "mov eax, {read}",
    ".global standstill_alarm_reads",
    "standstill_alarm_reads:",
    "syscall",
    "ret",
    setitimer = const libc::SYS_setitimer,
    read = const libc::SYS_read,
);

unsafe extern "C" {
    fn standstill_alarm_and_read(alarm: *const libc::itimerval, fd: i32, byte: *mut u8) -> i64;
    fn standstill_alarm_is_set();
    fn standstill_alarm_reads();
}

/// One alarm, so many microseconds from now.
fn shot(micros: i64) -> libc::itimerval {
    libc::itimerval {
        it_interval: libc::timeval { tv_sec: 0, tv_usec: 0 },
        it_value: libc::timeval { tv_sec: 0, tv_usec: micros },
    }
}

/// Where a thread was preempted between its alarm and its read, nothing would end the read: it gets another alarm. A read
/// that had begun gets none, also where it is about to begin again.
extern "C" fn alarm_again_if_early(_: i32, _: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    let at = unsafe { (*context).uc_mcontext.gregs[libc::REG_RIP as usize] } as usize;
    if (standstill_alarm_is_set as *const () as usize..standstill_alarm_reads as *const () as usize).contains(&at) {
        let (alarm, null) = (shot(1000), std::ptr::null_mut::<libc::itimerval>());
        unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const alarm, null) };
    }
}

/// A read that only an alarm ends, over and over: whatever comes between, the read ends with EINTR, each time.
pub(super) fn alarm() {
    static ROUNDS: AtomicU64 = AtomicU64::new(0);
    static FAILED: AtomicI32 = AtomicI32::new(0);
    act(libc::SIGALRM, alarm_again_if_early as *const () as usize, libc::SA_SIGINFO, &[]);
    mask(libc::SIG_BLOCK, &[libc::SIGALRM]);
    let (out, _into) = pipe(0);
    std::thread::spawn(move || {
        mask(libc::SIG_UNBLOCK, &[libc::SIGALRM]);
        for round in 0u64.. {
            // one shot, to this thread's process: no second alarm comes to the rescue
            let alarm = shot(500 + (round * 7919 % 3000) as i64);
            let mut byte = 0u8;
            let r = unsafe { standstill_alarm_and_read(&raw const alarm, out, &raw mut byte) };
            if r != i64::from(-libc::EINTR) {
                FAILED.store(1, Ordering::SeqCst);
            }
            ROUNDS.store(round + 1, Ordering::SeqCst);
        }
    });
    eventually("alarms", || ROUNDS.load(Ordering::SeqCst) > 3);
    ready();
    let seen = ROUNDS.load(Ordering::SeqCst);
    eventually("alarms go on", || ROUNDS.load(Ordering::SeqCst) > seen + 3);
    check_eq!(FAILED.load(Ordering::SeqCst), 0);
}

/// Sockets with a time limit: a stop would end their calls with EINTR, which no program expects without a handler.
pub(super) fn sockets() {
    let pair = || {
        let mut fds = [0; 2];
        unsafe { sys(libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr())) };
        let limit = libc::timeval { tv_sec: 1, tv_usec: 200_000 };
        for fd in fds {
            for name in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
                let size = size_of::<libc::timeval>() as u32;
                sys(unsafe { libc::setsockopt(fd, libc::SOL_SOCKET, name, (&raw const limit).cast(), size) });
            }
        }
        (fds[0], fds[1])
    };
    let (idle, reads, full) = (pair(), pair(), pair());
    let junk = vec![0u8; 4096];
    while unsafe { libc::send(full.0, junk.as_ptr().cast(), 4096, libc::MSG_DONTWAIT) } > 0 {}
    let receive = |fd: i32| {
        let mut byte = 0u8;
        unsafe { libc::recv(fd, (&raw mut byte).cast(), 1, 0) as i64 }
    };
    let all = vec![
        Wait::new("recv, limit", End::Error(libc::EAGAIN), true, move || receive(idle.0)),
        Wait::new("read, limit", End::Error(libc::EAGAIN), true, move || {
            let mut byte = 0u8;
            unsafe { libc::read(reads.0, (&raw mut byte).cast(), 1) as i64 }
        }),
        Wait::new("send, limit", End::Error(libc::EAGAIN), true, move || {
            let junk = [0u8; 4096];
            unsafe { libc::send(full.0, junk.as_ptr().cast(), 4096, 0) as i64 }
        })
        .or_room(4096),
    ];
    std::thread::sleep(Duration::from_millis(20));
    let how = ready();
    for wait in all {
        wait.check(how);
    }
}
