//! timerfd_create(2): timers that are read.
//!
//! `fdinfo` shows clock, expirations that nobody has read, flags of the last timerfd_settime(2), time left and interval. A
//! [`TimerfdEntry`] of `files.img` is one open file. A periodic timer that has expired shows no time left until someone
//! looks: timerfd_gettime(2) makes the kernel count and go on, and changes nothing that a program sees, so the dump looks
//! before it reads.
//!
//! A relative timer is armed by the first task that has it, as the last thing, so that its time left counts from there.
//! An absolute one (TFD_TIMER_ABSTIME) is armed by the engine: the kernel keeps deadlines in the host's clocks whichever
//! time namespace asks, so the engine's clock plus the time left is right in all of them, and flags such as
//! TFD_TIMER_CANCEL_ON_SET are kept. As with CRIU the time left goes on, also for the wall clock: a restore a day later
//! rings a day later. Unread expirations are set by TFD_IOC_SET_TICKS.
//!
//! Not kept: that the wall clock was set while nobody read (ECANCELED).
//!
//! Man pages: timerfd_create(2), time_namespaces(7).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::time::{clock_gettime, timerfd_create, timerfd_gettime, timerfd_settime};
use rustix::time::{ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use standstill_images::proto::{FdTypes, FileEntry, TimerfdEntry};

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{Call, Error, Result};
use crate::plan::Plan;
use crate::proc::fdinfo::{self, FdDetail};
use crate::sys::calls;

const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
const ABSOLUTE: u32 = libc::TFD_TIMER_ABSTIME as u32;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, _cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    timerfd_gettime(&d.copy).call("timerfd_gettime")?;
    let mut text = Vec::new();
    let path = format!("/proc/self/fdinfo/{}", d.copy.as_raw_fd());
    crate::proc::read_proc(path.as_ref(), &mut text).call("read(/proc/self/fdinfo/N)")?;
    let FdDetail::Timerfd(timer) = fdinfo::parse(&text)?.detail else {
        return Err(d.refused("a timerfd that the kernel does not show", "mount a /proc that shows it"));
    };
    let tfd = TimerfdEntry {
        id,
        flags: d.flags,
        fown: d.fown,
        clockid: timer.clock_id.unsigned_abs(),
        ticks: timer.ticks,
        settime_flags: timer.settime_flags,
        vsec: timer.value.0,
        vnsec: timer.value.1.into(),
        isec: timer.interval.0,
        insec: timer.interval.1.into(),
    };
    Ok(FileEntry { r#type: FdTypes::Timerfd as i32, id, tfd: Some(tfd), ..Default::default() })
}

/// Which clock a timer counts by, and the one to read for it.
fn clock(e: &TimerfdEntry) -> Result<(TimerfdClockId, ClockId)> {
    match i32::try_from(e.clockid) {
        Ok(libc::CLOCK_REALTIME) => Ok((TimerfdClockId::Realtime, ClockId::Realtime)),
        Ok(libc::CLOCK_MONOTONIC) => Ok((TimerfdClockId::Monotonic, ClockId::Monotonic)),
        Ok(libc::CLOCK_BOOTTIME) => Ok((TimerfdClockId::Boottime, ClockId::Boottime)),
        Ok(libc::CLOCK_REALTIME_ALARM) => Ok((TimerfdClockId::RealtimeAlarm, ClockId::Realtime)),
        Ok(libc::CLOCK_BOOTTIME_ALARM) => Ok((TimerfdClockId::BoottimeAlarm, ClockId::Boottime)),
        _ => Err(Error::lie("files.img", format!("a timerfd counts by clock {}", e.clockid))),
    }
}

/// Time left and interval. An image of CRIU's may have a periodic timer that has expired with no time left.
fn times(e: &TimerfdEntry) -> Result<Itimerspec> {
    let time = |seconds: u64, nanos: u64| {
        let good = nanos < 1_000_000_000 && i64::try_from(seconds).is_ok();
        good.then_some(Timespec { tv_sec: seconds as i64, tv_nsec: nanos as i64 })
            .ok_or_else(|| Error::lie("files.img", format!("a timerfd has {seconds} s and {nanos} ns")))
    };
    let it_interval = time(e.isec, e.insec)?;
    let expired = (e.vsec, e.vnsec) == (0, 0) && e.ticks != 0;
    let it_value = if expired { it_interval } else { time(e.vsec, e.vnsec)? };
    Ok(Itimerspec { it_interval, it_value })
}

/// Opens one; armed if its deadline is absolute.
pub fn open(e: &TimerfdEntry, _cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let (kind, source) = clock(e)?;
    let mut times = times(e)?;
    let fd = timerfd_create(kind, TimerfdFlags::CLOEXEC).call("timerfd_create")?;
    set_status_flags(fd.as_fd(), e.flags)?;
    if e.settime_flags & ABSOLUTE != 0 {
        if times.it_value != Timespec::default() {
            times.it_value = clock_gettime(source)
                .checked_add(times.it_value)
                .ok_or_else(|| Error::lie("files.img", format!("a timerfd has {} s left", e.vsec)))?;
        }
        let flags = TimerfdTimerFlags::from_bits_retain(e.settime_flags);
        timerfd_settime(&fd, flags, &times).call("timerfd_settime")?;
        if e.ticks != 0 {
            calls::ioctl(fd.as_fd(), "ioctl(TFD_IOC_SET_TICKS)", TFD_IOC_SET_TICKS, &mut e.ticks.to_ne_bytes())?;
        }
    }
    Ok(fd)
}

/// Arms a relative one.
pub fn in_task(e: &TimerfdEntry, fd: i32, plan: &mut Plan) -> Result<()> {
    if e.settime_flags & ABSOLUTE != 0 {
        return Ok(());
    }
    let times = times(e)?;
    let fields = [times.it_interval.tv_sec, times.it_interval.tv_nsec, times.it_value.tv_sec, times.it_value.tv_nsec];
    let spec = plan.words(&fields.map(|n| n as u64));
    plan.call(
        "arming a timerfd",
        libc::SYS_timerfd_settime,
        &[fd.into(), e.settime_flags.into(), spec.into(), 0.into()],
    );
    if e.ticks != 0 {
        let ticks = plan.words(&[e.ticks]);
        plan.call("expirations of a timerfd", libc::SYS_ioctl, &[fd.into(), TFD_IOC_SET_TICKS.into(), ticks.into()]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::testing::{descriptor, dump, in_task, open};
    use super::*;
    use crate::options::Options;
    use crate::proc::fdinfo::Timerfd;

    fn spec(value: Duration, interval: Duration) -> Itimerspec {
        let time = |d: Duration| Timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos().into() };
        Itimerspec { it_interval: time(interval), it_value: time(value) }
    }

    fn timer(clock: TimerfdClockId) -> OwnedFd {
        timerfd_create(clock, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC).unwrap()
    }

    fn restored(fd: &OwnedFd) -> OwnedFd {
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let again = open(&mut files, ids[0]);
        in_task(&files, ids[0], &again);
        again
    }

    fn state(fd: &OwnedFd) -> Timerfd {
        match descriptor(fd).info.detail {
            FdDetail::Timerfd(timer) => timer,
            other => panic!("{other:?}"),
        }
    }

    fn read(fd: &OwnedFd) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn a_relative_timer_goes_on() {
        let fd = timer(TimerfdClockId::Monotonic);
        timerfd_settime(&fd, TimerfdTimerFlags::empty(), &spec(Duration::from_secs(1000), Duration::new(7, 5)))
            .unwrap();
        let again = state(&restored(&fd));
        assert_eq!((again.clock_id, again.settime_flags, again.ticks, again.interval), (1, 0, 0, (7, 5)));
        assert!((990..1000).contains(&again.value.0), "{again:?}");
    }

    #[test]
    fn a_disarmed_timer_stays_so() {
        assert_eq!(state(&restored(&timer(TimerfdClockId::Boottime))), state(&timer(TimerfdClockId::Boottime)));
    }

    #[test]
    fn an_absolute_timer_keeps_deadline_and_flags() {
        let fd = timer(TimerfdClockId::Realtime);
        let now = clock_gettime(ClockId::Realtime).tv_sec as u64;
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&fd, flags, &spec(Duration::from_secs(now + 500), Duration::ZERO)).unwrap();
        let again = state(&restored(&fd));
        assert_eq!((again.clock_id, again.settime_flags), (0, 3));
        assert!((490..500).contains(&again.value.0), "{again:?}");
    }

    #[test]
    fn unread_expirations_come_back() {
        let fd = timer(TimerfdClockId::Monotonic);
        timerfd_settime(&fd, TimerfdTimerFlags::empty(), &spec(Duration::from_nanos(1), Duration::from_secs(3000)))
            .unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let again = restored(&fd);
        let left = timerfd_gettime(&again).unwrap();
        assert_eq!(read(&again), 1);
        assert!((2990..3000).contains(&left.it_value.tv_sec), "{left:?}");
        assert_eq!(read(&fd), 1, "the program's is as it was");

        timerfd_settime(&fd, TimerfdTimerFlags::empty(), &spec(Duration::from_nanos(1), Duration::ZERO)).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        let again = restored(&fd);
        assert_eq!(read(&again), 1);
        assert_eq!(rustix::io::read(&again, &mut [0; 8]).unwrap_err(), rustix::io::Errno::AGAIN);
    }

    #[test]
    fn a_strange_clock_is_a_lie() {
        let e = TimerfdEntry { clockid: 42, ..Default::default() };
        assert!(matches!(clock(&e), Err(Error::Lie { .. })));
    }
}
