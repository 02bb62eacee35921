//! Robust futexes: the kernel still marks them when their owner ends.

use std::sync::atomic::{AtomicU64, Ordering};

use super::support::*;

/// A robust mutex of the C library, whose owner ends after the checkpoint.
pub(super) fn robust() {
    let shared = Shared::new();
    let area = map(0, 4096, RW, SHARED);
    let mutex = area.cast::<libc::pthread_mutex_t>();
    unsafe {
        let mut attributes: libc::pthread_mutexattr_t = std::mem::zeroed();
        libc::pthread_mutexattr_init(&raw mut attributes);
        libc::pthread_mutexattr_setrobust(&raw mut attributes, libc::PTHREAD_MUTEX_ROBUST);
        libc::pthread_mutexattr_setpshared(&raw mut attributes, libc::PTHREAD_PROCESS_SHARED);
        check_eq!(libc::pthread_mutex_init(mutex, &raw const attributes), 0);
    }
    let child = fork(|| {
        check_eq!(unsafe { libc::pthread_mutex_lock(mutex) }, 0);
        shared.set(0, 1);
        shared.wait(1, 1);
        // ends with the lock held
        0
    });
    let list = || {
        let (mut head, mut size) = (0u64, 0u64);
        sys(unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut size) });
        (head, size)
    };
    shared.wait(0, 1);
    let before = list();
    check!(before.0 != 0);
    // a thread's end clears its id, and wakes who waits for that: that is how join works
    static DONE: AtomicU64 = AtomicU64::new(0);
    let thread = std::thread::spawn(move || {
        shared.wait(1, 1);
        DONE.store(1, Ordering::SeqCst);
    });
    ready();
    check_eq!(list(), before);
    shared.set(1, 1);
    check_eq!(wait(child), 0);
    check_eq!(unsafe { libc::pthread_mutex_lock(mutex) }, libc::EOWNERDEAD);
    check!(thread.join().is_ok() && DONE.load(Ordering::SeqCst) == 1);
}
