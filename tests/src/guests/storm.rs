//! Busy threads, a child, and a rain of signals: what a dump is most likely to harm. Every step is checked as it is made, and
//! a counter for each thread, in a file, shows from outside that it goes on.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use super::pipes::{pipe, write};
use super::signals::{act, mask};
use super::support::*;

static HANDLED: AtomicU64 = AtomicU64::new(0);
static OUTSTANDING: AtomicI64 = AtomicI64::new(0);
static INTERRUPTED: AtomicU64 = AtomicU64::new(0);
static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn ticked(_: i32) {
    // vector registers are used here too
    let sum: f64 = (1..20).map(|n| std::hint::black_box(f64::from(n))).sum();
    check_eq!(sum, 190.0);
    HANDLED.fetch_add(1, Ordering::Relaxed);
}

extern "C" fn answered(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    check_eq!(unsafe { (*info).si_value().sival_ptr } as u64, 0x00c0_ffee);
    OUTSTANDING.fetch_sub(1, Ordering::Relaxed);
}

/// The threads' counters, which whoever watches may map too.
pub(super) fn counters() -> &'static [AtomicU64; 512] {
    use std::os::fd::AsRawFd as _;
    let file = did(std::fs::File::options().read(true).write(true).create(true).truncate(false).open("counters"));
    did(file.set_len(4096));
    let area = map_file(0, 4096, RW, libc::MAP_SHARED, file.as_raw_fd(), 0);
    unsafe { &*area.cast() }
}

/// Runs until it is asked to check, however often it is dumped.
///
/// A dump that is killed between the stop of a thread and the next thing it does (microseconds) cannot take back that the
/// kernel has ended the thread's epoll_wait with EINTR, as a stop signal would have (signal(7)). That alone is forgiven, if
/// the test says so by a file.
pub(super) fn storm() {
    let counters = counters();
    let beat = |n: usize| counters[n].fetch_add(1, Ordering::Relaxed);
    let parent = std::process::id() as i32;
    let child = fork(|| {
        while counters[8].load(Ordering::Relaxed) == 0 {
            check_eq!(unsafe { libc::getppid() }, parent);
            beat(4);
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
        0
    });
    let with_info = answered as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    act(libc::SIGALRM, ticked as extern "C" fn(i32) as usize, libc::SA_RESTART, &[]);
    act(libc::SIGRTMIN(), with_info, libc::SA_SIGINFO | libc::SA_RESTART, &[]);
    mask(libc::SIG_BLOCK, &[libc::SIGUSR2]);
    let going = || !STOP.load(Ordering::Relaxed);
    let mut all = Vec::new();
    // numbers
    all.push(std::thread::spawn(move || {
        let (mut x, mut y, mut turns) = (0.5f64, [1.0f64; 16], 0u64);
        while going() {
            for value in &mut y {
                *value = std::hint::black_box(*value * 1.000_000_1);
            }
            check!(y.iter().all(|v| *v == y[0]));
            x = std::hint::black_box(3.9 * x * (1.0 - x));
            check!(x > 0.0 && x < 1.0);
            turns += 1;
            if turns % 2000 == 0 {
                beat(0);
                std::thread::sleep(std::time::Duration::from_micros(300));
            }
        }
    }));
    // bytes through a pipe
    let (out, into) = pipe(0);
    all.push(std::thread::spawn(move || {
        let mut n = 0u32;
        while going() {
            write(into, &n.to_ne_bytes());
            n = n.wrapping_add(1);
            if n.is_multiple_of(64) {
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        }
        unsafe { libc::close(into) };
    }));
    all.push(std::thread::spawn(move || {
        let mut expected = 0u32;
        loop {
            let mut bytes = [0u8; 4];
            let n = unsafe { libc::read(out, bytes.as_mut_ptr().cast(), 4) };
            if n == 0 {
                break;
            }
            check_eq!(n, 4);
            check_eq!(u32::from_ne_bytes(bytes), expected);
            expected = expected.wrapping_add(1);
            beat(1);
        }
    }));
    // signals to a thread that waits, which must not hear of anything else
    let epoll = unsafe { sys(libc::epoll_create1(0)) };
    let target = std::thread::spawn(move || {
        mask(libc::SIG_BLOCK, &[libc::SIGALRM, libc::SIGRTMIN()]);
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        while going() {
            let r = unsafe { libc::epoll_wait(epoll, &raw mut event, 1, 2) };
            if r < 0 && errno() == libc::EINTR {
                INTERRUPTED.fetch_add(1, Ordering::Relaxed);
            } else {
                check_eq!(r, 0);
            }
            mask(libc::SIG_UNBLOCK, &[libc::SIGRTMIN()]);
            mask(libc::SIG_BLOCK, &[libc::SIGRTMIN()]);
            beat(2);
        }
        mask(libc::SIG_UNBLOCK, &[libc::SIGRTMIN()]);
    });
    let thread = std::os::unix::thread::JoinHandleExt::as_pthread_t(&target);
    all.push(std::thread::spawn(move || {
        while going() {
            let value = libc::sigval { sival_ptr: 0x00c0_ffee as *mut libc::c_void };
            if OUTSTANDING.load(Ordering::Relaxed) < 100 {
                OUTSTANDING.fetch_add(1, Ordering::Relaxed);
                check_eq!(unsafe { libc::pthread_sigqueue(thread, libc::SIGRTMIN(), value) }, 0);
            }
            beat(3);
            std::thread::sleep(std::time::Duration::from_micros(500));
        }
    }));
    let every = libc::timeval { tv_sec: 0, tv_usec: 1500 };
    let timer = libc::itimerval { it_interval: every, it_value: every };
    let null = std::ptr::null_mut::<libc::itimerval>();
    sys(unsafe { libc::syscall(libc::SYS_setitimer, libc::ITIMER_REAL, &raw const timer, null) });
    let blocked = status(&["SigBlk"]);
    ready();
    check_eq!(status(&["SigBlk"]), blocked);
    let seen = HANDLED.load(Ordering::Relaxed);
    eventually("alarms go on", || HANDLED.load(Ordering::Relaxed) > seen);
    STOP.store(true, Ordering::Relaxed);
    counters[8].store(1, Ordering::Relaxed);
    check_eq!(wait(child), 0);
    for thread in all {
        check!(thread.join().is_ok());
    }
    check!(target.join().is_ok());
    check_eq!(OUTSTANDING.load(Ordering::Relaxed), 0);
    if !folder().join("engines-die").exists() {
        check_eq!(INTERRUPTED.load(Ordering::Relaxed), 0);
    }
}
