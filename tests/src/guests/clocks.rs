//! Clocks go on, through the vdso and through calls, and never backwards.

use super::support::*;

fn read(clock: i32) -> i64 {
    let mut t: libc::timespec = unsafe { std::mem::zeroed() };
    unsafe { sys(libc::clock_gettime(clock, &raw mut t)) };
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

fn call(clock: i32) -> i64 {
    let mut t: libc::timespec = unsafe { std::mem::zeroed() };
    sys(unsafe { libc::syscall(libc::SYS_clock_gettime, clock, &raw mut t) });
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

/// All clocks that the vdso knows, before and after; both ways agree.
pub(super) fn clocks() {
    let clocks = [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_MONOTONIC_COARSE];
    let used = read(libc::CLOCK_PROCESS_CPUTIME_ID);
    let before = clocks.map(read);
    ready();
    let after = clocks.map(read);
    for n in 0..clocks.len() {
        check!(after[n] >= before[n] && after[n] < before[n] + 600_000_000_000);
        let (first, second, third) = (read(clocks[n]), call(clocks[n]), read(clocks[n]));
        check!(first <= second && second <= third);
    }
    check!(read(libc::CLOCK_PROCESS_CPUTIME_ID) > 0 && used > 0);
    check!(unsafe { libc::sched_getcpu() } >= 0);
    check!(unsafe { libc::time(std::ptr::null_mut()) } >= before[0] / 1_000_000_000);
}
