//! Timers that are descriptors.

use super::pipes::read;
use super::support::*;

/// Far away, expired, off, by several clocks, at a time of day.
pub(super) fn timerfd() {
    let new = |clock, flags, absolute: bool, value: (i64, i64), interval: i64| {
        let fd = unsafe { sys(libc::timerfd_create(clock, libc::TFD_NONBLOCK | flags)) };
        let spec = libc::itimerspec {
            it_value: libc::timespec { tv_sec: value.0, tv_nsec: value.1 },
            it_interval: libc::timespec { tv_sec: interval, tv_nsec: 0 },
        };
        let how = if absolute { libc::TFD_TIMER_ABSTIME } else { 0 };
        unsafe { sys(libc::timerfd_settime(fd, how, &raw const spec, std::ptr::null_mut())) };
        fd
    };
    let left = |fd| {
        let mut now: libc::itimerspec = unsafe { std::mem::zeroed() };
        unsafe { sys(libc::timerfd_gettime(fd, &raw mut now)) };
        (now.it_value.tv_sec, now.it_interval.tv_sec)
    };
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    unsafe { sys(libc::clock_gettime(libc::CLOCK_REALTIME, &raw mut now)) };
    let far = new(libc::CLOCK_MONOTONIC, libc::TFD_CLOEXEC, false, (100_000, 0), 7);
    let boot = new(libc::CLOCK_BOOTTIME, 0, false, (90_000, 0), 0);
    let day = new(libc::CLOCK_REALTIME, 0, true, (now.tv_sec + 80_000, 0), 0);
    let off = new(libc::CLOCK_MONOTONIC, 0, false, (0, 0), 0);
    let expired = new(libc::CLOCK_MONOTONIC, 0, false, (0, 1), 50_000);
    eventually("an expiry", || left(expired).0 <= 50_000);
    std::thread::sleep(std::time::Duration::from_millis(2));
    ready();
    let (value, interval) = left(far);
    check!(value > 90_000 && value <= 100_000 && interval == 7);
    let (value, interval) = left(boot);
    check!(value > 80_000 && value <= 90_000 && interval == 0);
    check!(left(day).0 > 70_000 && left(day).0 <= 80_000);
    check_eq!(left(off), (0, 0));
    check_eq!(read(off), Err(libc::EAGAIN));
    check_eq!(read(expired), Ok(1u64.to_ne_bytes().to_vec()));
    let (value, interval) = left(expired);
    check!(value > 40_000 && value <= 50_000 && interval == 50_000);
    check_eq!(unsafe { libc::fcntl(far, libc::F_GETFD) }, libc::FD_CLOEXEC);
}
