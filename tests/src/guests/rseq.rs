//! Restartable sequences stay registered: the kernel goes on to say which CPU a thread is on.

use std::arch::asm;

use super::support::*;

/// Where the C library has its thread's `struct rseq`, if it has one.
fn area() -> Option<*mut u32> {
    // __rseq_offset and __rseq_size are there since glibc 2.35
    let symbol = |name: &std::ffi::CStr| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let (offset, size) = (symbol(c"__rseq_offset"), symbol(c"__rseq_size"));
    if offset.is_null() || size.is_null() || unsafe { *size.cast::<u32>() } == 0 {
        return None;
    }
    let thread: *mut u8;
    unsafe { asm!("mov {}, fs:0", out(reg) thread, options(nostack, readonly)) };
    Some(unsafe { thread.offset(*offset.cast::<isize>()) }.cast())
}

/// The kernel refuses to register it again, and keeps the CPU's number in it.
fn check_registered(own: Option<*mut u32>) {
    let Some(at) = own else { return };
    let r = unsafe { libc::syscall(libc::SYS_rseq, at, 32, 0, 0x5305_3053) };
    check!(r == -1 && (errno() == libc::EBUSY || errno() == libc::EINVAL));
    for _ in 0..1000 {
        let (before, now, after) =
            unsafe { (at.add(1).read_volatile(), libc::sched_getcpu(), at.add(1).read_volatile()) };
        check!(before as i32 >= 0);
        if before == after {
            check_eq!(now, before as i32);
        }
    }
}

/// Of the C library in two threads, and one's own where that has none.
pub(super) fn rseq() {
    let shared = Shared::new();
    let own = |registered: Option<*mut u32>| {
        registered.or_else(|| {
            let at = map(0, 4096, RW, PRIVATE).cast::<u32>();
            let r = unsafe { libc::syscall(libc::SYS_rseq, at, 32, 0, 0x5305_3053) };
            (r == 0).then_some(at)
        })
    };
    let thread = std::thread::spawn(move || {
        let at = own(area());
        shared.set(0, 1);
        shared.wait(1, 1);
        check_registered(at);
    });
    shared.wait(0, 1);
    let at = own(area());
    check_registered(at);
    ready();
    check_registered(at);
    shared.set(1, 1);
    check!(thread.join().is_ok());
}
