//! Timers: the three interval timers, and POSIX timers of every kind.

use std::sync::atomic::{AtomicU64, Ordering};

use super::signals::{act, mask};
use super::support::*;

static TICKS: AtomicU64 = AtomicU64::new(0);

extern "C" fn tick(_: i32) {
    TICKS.fetch_add(1, Ordering::SeqCst);
}

fn time(seconds: i64, micros: i64) -> libc::timeval {
    libc::timeval { tv_sec: seconds, tv_usec: micros }
}

/// setitimer(2): two far away, one that ticks all the time.
pub(super) fn interval() {
    act(libc::SIGALRM, tick as extern "C" fn(i32) as usize, libc::SA_RESTART, &[]);
    let set = |which: i32, value, interval| {
        let new = libc::itimerval { it_interval: interval, it_value: value };
        let null = std::ptr::null_mut::<libc::itimerval>();
        sys(unsafe { libc::syscall(libc::SYS_setitimer, which, &raw const new, null) });
    };
    let get = |which: i32| {
        let mut now: libc::itimerval = unsafe { std::mem::zeroed() };
        sys(unsafe { libc::syscall(libc::SYS_getitimer, which, &raw mut now) });
        now
    };
    set(libc::ITIMER_VIRTUAL, time(1000, 0), time(7, 70));
    set(libc::ITIMER_PROF, time(2000, 0), time(8, 80));
    set(libc::ITIMER_REAL, time(0, 10_000), time(0, 10_000));
    eventually("ticks", || TICKS.load(Ordering::SeqCst) > 1);
    ready();
    let now = get(libc::ITIMER_VIRTUAL);
    check!(now.it_value.tv_sec > 900 && now.it_value.tv_sec <= 1000);
    check_eq!((now.it_interval.tv_sec, now.it_interval.tv_usec / 100), (7, 0));
    let now = get(libc::ITIMER_PROF);
    check!(now.it_value.tv_sec > 1900 && now.it_value.tv_sec <= 2000 && now.it_interval.tv_sec == 8);
    let seen = TICKS.load(Ordering::SeqCst);
    eventually("ticks go on", || TICKS.load(Ordering::SeqCst) > seen + 2);
}

fn create(clock: i32, how: i32, signal: i32, value: usize) -> i32 {
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = how;
    event.sigev_signo = signal;
    event.sigev_value = libc::sigval { sival_ptr: value as *mut libc::c_void };
    event.sigev_notify_thread_id = gettid();
    let mut id = 0i32;
    sys(unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id) });
    id
}

fn settime(id: i32, value: i64, interval: i64) {
    let new = libc::itimerspec {
        it_interval: libc::timespec { tv_sec: interval / 1_000_000_000, tv_nsec: interval % 1_000_000_000 },
        it_value: libc::timespec { tv_sec: value / 1_000_000_000, tv_nsec: value % 1_000_000_000 },
    };
    let null = std::ptr::null_mut::<libc::itimerspec>();
    sys(unsafe { libc::syscall(libc::SYS_timer_settime, id, 0, &raw const new, null) });
}

/// What is left, and how often.
fn gettime(id: i32) -> (i64, i64) {
    let mut now: libc::itimerspec = unsafe { std::mem::zeroed() };
    sys(unsafe { libc::syscall(libc::SYS_timer_gettime, id, &raw mut now) });
    let nanos = |t: libc::timespec| t.tv_sec * 1_000_000_000 + t.tv_nsec;
    (nanos(now.it_value), nanos(now.it_interval))
}

/// timer_create(2): ids with gaps, clocks, notices of every kind, armed and not.
pub(super) fn posix() {
    const S: i64 = 1_000_000_000;
    let min = libc::SIGRTMIN();
    act(min, tick as extern "C" fn(i32) as usize, libc::SA_RESTART, &[]);
    mask(libc::SIG_BLOCK, &[min + 1, min + 2]);
    let gap = create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0);
    let far = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, min + 1, 1);
    let gap2 = create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0);
    let quiet = create(libc::CLOCK_REALTIME, libc::SIGEV_NONE, 0, 2);
    let off = create(libc::CLOCK_REALTIME, libc::SIGEV_SIGNAL, min + 1, 3);
    let ticking = create(libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL, min, 4);
    let thread = create(libc::CLOCK_BOOTTIME, libc::SIGEV_THREAD_ID, min + 2, 0x1234_5678_9abc);
    settime(far, 5000 * S, 3 * S);
    settime(quiet, 100 * S, 0);
    settime(ticking, S / 100, S / 100);
    settime(thread, 3000 * S, 0);
    for id in [gap, gap2] {
        sys(unsafe { libc::syscall(libc::SYS_timer_delete, id) });
    }
    let list = did(std::fs::read_to_string("/proc/self/timers"));
    eventually("ticks", || TICKS.load(Ordering::SeqCst) > 1);
    ready();
    check_eq!(did(std::fs::read_to_string("/proc/self/timers")), list);
    let (left, interval) = gettime(far);
    check!(left > 4800 * S && left <= 5000 * S);
    check_eq!(interval, 3 * S);
    let (left, interval) = gettime(quiet);
    check!(left > 0 && left <= 100 * S && interval == 0);
    check_eq!(gettime(off), (0, 0));
    let seen = TICKS.load(Ordering::SeqCst);
    eventually("ticks go on", || TICKS.load(Ordering::SeqCst) > seen + 2);
    settime(ticking, 0, 0);
    // the notice still carries its value, to this thread
    settime(thread, 1, 0);
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    unsafe {
        libc::sigaddset(&raw mut set, min + 2);
        check_eq!(libc::sigwaitinfo(&raw const set, &raw mut info), min + 2);
        check_eq!(info.si_value().sival_ptr as u64, 0x1234_5678_9abc);
    }
    let next = create(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0);
    check!(next != far && next != quiet && next != off && next != ticking && next != thread);
}
