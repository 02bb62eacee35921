//! `/proc/PID/timers`: POSIX timers, needed before they can be asked about one by one.
//!
//! The value that comes with the signal is printed as a pointer. Since 6.15 a timer can be made with a wanted
//! identity (PR_TIMER_CREATE_RESTORE_IDS), so identities need not be dense.
//!
//! Man pages: proc_pid_timers(5), timer_create(2).

use super::{split_once, Lines, ParseError, Place};

/// How a timer tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notify {
    /// SIGEV_NONE.
    None,
    /// SIGEV_SIGNAL.
    Signal,
    /// SIGEV_THREAD, for the kernel the same as a signal.
    Thread,
}

/// One timer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PosixTimer {
    /// Identity.
    pub id: i32,
    /// Signal.
    pub signal: i32,
    /// What the program gave: a number or a pointer.
    pub value: u64,
    /// How it tells.
    pub notify: Notify,
    /// It tells one thread (SIGEV_THREAD_ID), not the process.
    pub to_thread: bool,
    /// Thread or process, in the PID namespace of the reader.
    pub pid: i32,
    /// Clock.
    pub clock_id: i32,
}

/// Reads the file.
///
/// # Errors
/// If a timer is not four lines in the kernel's order.
pub fn parse(text: &[u8]) -> Result<Vec<PosixTimer>, ParseError> {
    let mut timers = Vec::new();
    let mut lines = Lines::new("/proc/PID/timers", text);
    while let Some((at, line)) = lines.next() {
        let id = at.int(value(at, line, b"ID", "ID")?, "ID")?;
        let (at, line) = lines.next().ok_or_else(|| at.missing("signal"))?;
        let (signal, pointer) =
            split_once(value(at, line, b"signal", "signal")?, b'/').ok_or_else(|| at.malformed("signal"))?;
        let (signal, pointer) = (at.int(signal, "signal")?, at.uint(pointer, 16, "signal")?);
        let (at, line) = lines.next().ok_or_else(|| at.missing("notify"))?;
        let (notify, to_thread, pid) = notify(at, value(at, line, b"notify", "notify")?)?;
        let (at, line) = lines.next().ok_or_else(|| at.missing("ClockID"))?;
        let clock_id = at.int(value(at, line, b"ClockID", "ClockID")?, "ClockID")?;
        timers.push(PosixTimer { id, signal, value: pointer, notify, to_thread, pid, clock_id });
    }
    Ok(timers)
}

fn value<'a>(at: Place, line: &'a [u8], key: &[u8], field: &'static str) -> Result<&'a [u8], ParseError> {
    match split_once(line, b':') {
        Some((found, value)) if found == key => Ok(value),
        _ => Err(at.missing(field)),
    }
}

/// `signal/pid.11695`.
fn notify(at: Place, value: &[u8]) -> Result<(Notify, bool, i32), ParseError> {
    let bad = || at.malformed("notify");
    let (how, whom) = split_once(value.trim_ascii(), b'/').ok_or_else(bad)?;
    let (what, number) = split_once(whom, b'.').ok_or_else(bad)?;
    let how = match how {
        b"none" => Notify::None,
        b"signal" => Notify::Signal,
        b"thread" => Notify::Thread,
        _ => return Err(bad()),
    };
    let to_thread = match what {
        b"tid" => true,
        b"pid" => false,
        _ => return Err(bad()),
    };
    Ok((how, to_thread, at.int(number, "notify")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &[u8] = b"ID: 1\nsignal: 0/0000000000001234\nnotify: none/pid.11695\nClockID: 1\nID: 0\n\
        signal: 10/00007fffffffffff\nnotify: signal/tid.11695\nClockID: -6\n";

    #[test]
    fn real() {
        let timers = parse(REAL).unwrap();
        let first = PosixTimer {
            id: 1,
            signal: 0,
            value: 0x1234,
            notify: Notify::None,
            to_thread: false,
            pid: 11695,
            clock_id: 1,
        };
        assert_eq!(timers[0], first);
        assert_eq!((timers[1].notify, timers[1].to_thread, timers[1].clock_id), (Notify::Signal, true, -6));
    }

    #[test]
    fn hostile() {
        assert_eq!(parse(b""), Ok(Vec::new()));
        for length in 1..55 {
            assert!(parse(&REAL[..length]).is_err());
        }
        assert!(parse(b"ID: 1\nsignal: 1\n").is_err());
        assert!(parse(b"ID: 1\nsignal: 1/x\n").is_err());
        assert!(parse(b"ID: 99999999999\n").is_err());
        assert!(parse(b"ID: 1\nsignal: 0/0\nnotify: new/pid.1\nClockID: 1\n").is_err());
        assert!(parse(b"ID: 1\nsignal: 0/0\nnotify: none/pid.1\n\xff: 1\n").is_err());
    }
}
