//! Signals: actions, masks, queues, alternate stacks, handlers in progress.

use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

use super::support::*;

static COUNT: AtomicU64 = AtomicU64::new(0);
static VALUES: AtomicU64 = AtomicU64::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static PLACE: AtomicU64 = AtomicU64::new(0);

extern "C" fn count(_: i32) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    let here = 0u8;
    PLACE.store(&raw const here as u64, Ordering::SeqCst);
}

extern "C" fn take(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    // base 100: which values, in which order
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    let _ = VALUES.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |v| Some(v * 100 + value));
    CODE.store(unsafe { (*info).si_code }, Ordering::SeqCst);
}

extern "C" fn wait_inside(_: i32) {
    COUNT.fetch_add(1, Ordering::SeqCst);
    ready();
    COUNT.fetch_add(1, Ordering::SeqCst);
}

pub(super) fn act(signal: i32, handler: usize, flags: i32, blocked: &[i32]) {
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = flags;
    for &s in blocked {
        unsafe { libc::sigaddset(&raw mut action.sa_mask, s) };
    }
    unsafe { sys(libc::sigaction(signal, &raw const action, std::ptr::null_mut())) };
}

pub(super) fn mask(how: i32, signals: &[i32]) {
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    for &s in signals {
        unsafe { libc::sigaddset(&raw mut set, s) };
    }
    unsafe { sys(libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut())) };
}

/// The kernel's record of every action.
fn all_actions() -> Vec<[u64; 4]> {
    (1..=64)
        .map(|signal| {
            let mut action = [0u64; 4];
            let null = std::ptr::null::<u64>();
            sys(unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, null, action.as_mut_ptr(), 8) });
            action
        })
        .collect()
}

/// Handlers with flags and masks of every kind, ignored signals, blocked signals.
pub(super) fn actions() {
    let (min, plain) = (libc::SIGRTMIN(), count as extern "C" fn(i32) as usize);
    let with_info = take as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    act(libc::SIGUSR1, plain, libc::SA_RESTART, &[libc::SIGUSR2, libc::SIGTERM]);
    act(libc::SIGUSR2, with_info, libc::SA_SIGINFO | libc::SA_NODEFER, &[]);
    act(libc::SIGHUP, plain, libc::SA_RESETHAND | libc::SA_ONSTACK, &[libc::SIGCHLD]);
    act(libc::SIGCHLD, plain, libc::SA_NOCLDSTOP | libc::SA_NOCLDWAIT, &[]);
    act(libc::SIGINT, libc::SIG_IGN, 0, &[]);
    act(min, plain, 0, &[min + 1, min + 30]);
    act(min + 30, with_info, libc::SA_SIGINFO, &[]);
    mask(libc::SIG_BLOCK, &[libc::SIGUSR1, min + 5, min + 30]);
    let names = ["SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd"];
    let before = (all_actions(), status(&names));
    ready();
    check_eq!(all_actions(), before.0);
    check_eq!(status(&names), before.1);
    let raise = |s| unsafe { sys(libc::raise(s)) };
    raise(libc::SIGHUP);
    raise(libc::SIGINT);
    raise(libc::SIGUSR1);
    check_eq!(COUNT.load(Ordering::SeqCst), 1);
    mask(libc::SIG_UNBLOCK, &[libc::SIGUSR1]);
    check_eq!(COUNT.load(Ordering::SeqCst), 2);
    check_eq!(all_actions()[libc::SIGHUP as usize - 1][0], 0);
}

/// Signals in the queues of the process and of a thread, with their values, codes and order.
pub(super) fn pending() {
    let min = libc::SIGRTMIN();
    let all = [min + 1, min + 2, libc::SIGUSR1];
    let with_info = take as extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) as usize;
    for s in all {
        act(s, with_info, libc::SA_SIGINFO, &[]);
    }
    mask(libc::SIG_BLOCK, &all);
    let shared = Shared::new();
    let queue = |value: usize| {
        let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
        unsafe { sys(libc::sigqueue(libc::getpid(), min + 1, value)) };
    };
    queue(11);
    queue(12);
    queue(13);
    unsafe { sys(libc::kill(libc::getpid(), libc::SIGUSR1)) };
    let thread = std::thread::spawn(move || {
        let queue = |value: usize| {
            let value = libc::sigval { sival_ptr: value as *mut libc::c_void };
            let r = unsafe { libc::pthread_sigqueue(libc::pthread_self(), min + 2, value) };
            check_eq!(r, 0);
        };
        queue(21);
        queue(22);
        shared.set(0, 1);
        shared.wait(1, 1);
        mask(libc::SIG_UNBLOCK, &[min + 2]);
        check_eq!(VALUES.load(Ordering::SeqCst), 2122);
        check_eq!(CODE.load(Ordering::SeqCst), libc::SI_QUEUE);
        VALUES.store(0, Ordering::SeqCst);
    });
    shared.wait(0, 1);
    let before = status(&["SigPnd", "ShdPnd"]);
    ready();
    check_eq!(status(&["SigPnd", "ShdPnd"]), before);
    shared.set(1, 1);
    check!(thread.join().is_ok());
    mask(libc::SIG_UNBLOCK, &[min + 1]);
    check_eq!(VALUES.load(Ordering::SeqCst), 11_1213);
    mask(libc::SIG_UNBLOCK, &[libc::SIGUSR1]);
    check_eq!(CODE.load(Ordering::SeqCst), libc::SI_USER);
    check_eq!(COUNT.load(Ordering::SeqCst), 6);
}

/// Alternate stacks, one a thread, and one that is in use.
pub(super) fn stack() {
    const SIZE: usize = 65536;
    act(libc::SIGUSR1, count as extern "C" fn(i32) as usize, libc::SA_ONSTACK, &[]);
    let shared = Shared::new();
    let own = |go_on: &dyn Fn()| {
        let at = map(0, SIZE, RW, PRIVATE);
        let stack = libc::stack_t { ss_sp: at.cast(), ss_flags: 0, ss_size: SIZE };
        unsafe { sys(libc::sigaltstack(&raw const stack, std::ptr::null_mut())) };
        go_on();
        let mut now: libc::stack_t = unsafe { std::mem::zeroed() };
        unsafe { sys(libc::sigaltstack(std::ptr::null(), &raw mut now)) };
        check_eq!((now.ss_sp.cast(), now.ss_size, now.ss_flags), (at, SIZE, 0));
        unsafe { sys(libc::raise(libc::SIGUSR1)) };
        let place = PLACE.load(Ordering::SeqCst) as usize;
        check!(place >= at as usize && place < at as usize + SIZE);
    };
    let thread = std::thread::spawn(move || {
        own(&|| {
            shared.set(0, 1);
            shared.wait(1, 1);
        });
        shared.set(2, 1);
    });
    shared.wait(0, 1);
    own(&|| {
        ready();
    });
    shared.set(1, 1);
    check!(thread.join().is_ok());
    check_eq!(COUNT.load(Ordering::SeqCst), 2);
}

/// The checkpoint comes while a handler runs, on its own stack; it returns to where it was, with the mask of before.
pub(super) fn handler() {
    const SIZE: usize = 1 << 20;
    let at = map(0, SIZE, RW, PRIVATE);
    let stack = libc::stack_t { ss_sp: at.cast(), ss_flags: 0, ss_size: SIZE };
    unsafe { sys(libc::sigaltstack(&raw const stack, std::ptr::null_mut())) };
    act(libc::SIGUSR2, wait_inside as extern "C" fn(i32) as usize, libc::SA_ONSTACK, &[libc::SIGHUP]);
    mask(libc::SIG_BLOCK, &[libc::SIGINT]);
    let before = status(&["SigBlk"]);
    let numbers: Vec<f64> = (1..50).map(|n| 1.0 / f64::from(n)).collect();
    let sum: f64 = std::hint::black_box(&numbers).iter().sum();
    unsafe { sys(libc::raise(libc::SIGUSR2)) };
    check_eq!(std::hint::black_box(&numbers).iter().sum::<f64>(), sum);
    check_eq!(COUNT.load(Ordering::SeqCst), 2);
    check_eq!(status(&["SigBlk"]), before);
}
