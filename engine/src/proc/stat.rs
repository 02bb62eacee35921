//! `/proc/PID/stat` and `/proc/PID/task/TID/stat`: all 52 fields.
//!
//! The name stands in parentheses and is not escaped: it may hold spaces, parentheses and newlines, so the last `)` of
//! the text ends it. Addresses are zero for a reader without ptrace rights over the task.
//!
//! Man page: proc_pid_stat(5).

use super::status::TaskState;
use super::{uint, ParseError, Place, Problem, Words};

macro_rules! stat_fields {
    ($($(#[$doc:meta])* $name:ident: $type:ty = $read:ident;)*) => {
        /// What the file says, in its order.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub struct Stat {
            /// 1: the thread.
            pub pid: i32,
            /// 2: its name.
            pub comm: Vec<u8>,
            /// 3: its state.
            pub state: TaskState,
            $($(#[$doc])* pub $name: $type,)*
        }

        fn tail(at: Place, pid: i32, comm: Vec<u8>, state: TaskState, words: &mut Words<'_>) -> Result<Stat, ParseError> {
            Ok(Stat { pid, comm, state, $($name: stat_fields!(@$read at, words, stringify!($name)),)* })
        }
    };
    (@unsigned $at:ident, $words:ident, $name:expr) => { $at.next_uint($words, 10, $name)? };
    (@signed $at:ident, $words:ident, $name:expr) => { $at.next_int($words, $name)? };
}

stat_fields! {
    /// 4: parent.
    ppid: i32 = signed;
    /// 5: process group.
    pgrp: i32 = signed;
    /// 6: session.
    session: i32 = signed;
    /// 7: controlling terminal's device, as the kernel encodes it for programs; 0 for none.
    tty_nr: i32 = signed;
    /// 8: foreground process group of that terminal, or -1.
    tpgid: i32 = signed;
    /// 9: PF_ flags of the task.
    flags: u64 = unsigned;
    /// 10: minor faults.
    minflt: u64 = unsigned;
    /// 11: those of children that were waited for.
    cminflt: u64 = unsigned;
    /// 12: major faults.
    majflt: u64 = unsigned;
    /// 13: those of children.
    cmajflt: u64 = unsigned;
    /// 14: time in user mode, in ticks.
    utime: u64 = unsigned;
    /// 15: time in the kernel.
    stime: u64 = unsigned;
    /// 16: the first for children.
    cutime: i64 = signed;
    /// 17: the second for children.
    cstime: i64 = signed;
    /// 18: priority as the kernel counts.
    priority: i64 = signed;
    /// 19: nice.
    nice: i64 = signed;
    /// 20: threads.
    num_threads: i64 = signed;
    /// 21: always 0.
    itrealvalue: i64 = signed;
    /// 22: ticks since boot at start, in the reader's time namespace.
    starttime: u64 = unsigned;
    /// 23: size of the address space in bytes.
    vsize: u64 = unsigned;
    /// 24: present pages.
    rss: i64 = signed;
    /// 25: limit for the former.
    rsslim: u64 = unsigned;
    /// 26: start of code.
    startcode: u64 = unsigned;
    /// 27: end of code.
    endcode: u64 = unsigned;
    /// 28: start of the stack.
    startstack: u64 = unsigned;
    /// 29: stack pointer, where it may be known.
    kstkesp: u64 = unsigned;
    /// 30: instruction pointer, likewise.
    kstkeip: u64 = unsigned;
    /// 31: pending signals, first 31 only.
    signal: u64 = unsigned;
    /// 32: blocked signals, first 31 only.
    blocked: u64 = unsigned;
    /// 33: ignored signals, first 31 only.
    sigignore: u64 = unsigned;
    /// 34: caught signals, first 31 only.
    sigcatch: u64 = unsigned;
    /// 35: 1 while it waits.
    wchan: u64 = unsigned;
    /// 36: always 0.
    nswap: u64 = unsigned;
    /// 37: always 0.
    cnswap: u64 = unsigned;
    /// 38: signal for the parent when it ends; -1 for a thread that is not the leader.
    exit_signal: i32 = signed;
    /// 39: last CPU.
    processor: i32 = signed;
    /// 40: real-time priority.
    rt_priority: u32 = unsigned;
    /// 41: scheduling policy.
    policy: u32 = unsigned;
    /// 42: delays by block devices, in ticks.
    delayacct_blkio_ticks: u64 = unsigned;
    /// 43: guest time.
    guest_time: u64 = unsigned;
    /// 44: guest time of children.
    cguest_time: i64 = signed;
    /// 45: start of initialised data.
    start_data: u64 = unsigned;
    /// 46: end of it.
    end_data: u64 = unsigned;
    /// 47: start of the break.
    start_brk: u64 = unsigned;
    /// 48: start of arguments.
    arg_start: u64 = unsigned;
    /// 49: end of them.
    arg_end: u64 = unsigned;
    /// 50: start of the environment.
    env_start: u64 = unsigned;
    /// 51: end of it.
    env_end: u64 = unsigned;
    /// 52: how it ended, as waitpid gives it; for readers with ptrace rights.
    exit_code: i32 = signed;
}

/// Reads the file.
///
/// # Errors
/// If one of the 52 fields is missing or malformed. Fields that a newer kernel adds behind them are let pass.
pub fn parse(text: &[u8]) -> Result<Stat, ParseError> {
    let at = Place::first("/proc/PID/stat");
    let open = text.iter().position(|&b| b == b'(').ok_or_else(|| at.missing("comm"))?;
    let close = text.iter().rposition(|&b| b == b')').ok_or_else(|| at.missing("comm"))?;
    let pid = text.get(..open).and_then(|pid| uint(pid.trim_ascii(), 10)).and_then(|pid| i32::try_from(pid).ok());
    let comm = text.get(open + 1..close).ok_or_else(|| at.malformed("comm"))?;
    let mut words = Words::new(text.get(close + 1..).unwrap_or_default());
    let &[letter] = at.word(&mut words, "state")? else { return Err(at.malformed("state")) };
    let state = TaskState::from_letter(letter).ok_or_else(|| at.error(Problem::Malformed("state")))?;
    tail(at, pid.ok_or_else(|| at.malformed("pid"))?, comm.to_vec(), state, &mut words)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &[u8] = b"11612 (cat) R 11608 11608 2787 0 -1 4194304 100 0 0 0 0 0 0 0 20 0 1 0 63499 3133440 412 \
        18446744073709551615 94844047282176 94844047302057 140722353543392 0 0 0 0 0 0 0 0 0 17 1 0 0 0 0 0 94844047318064 \
        94844047319680 94844922339328 140722353552095 140722353552115 140722353552115 140722353553387 0\n";

    #[test]
    fn real() {
        let stat = parse(REAL).unwrap();
        assert_eq!((stat.pid, &stat.comm[..], stat.state), (11612, &b"cat"[..], TaskState::Running));
        assert_eq!((stat.ppid, stat.tpgid, stat.rsslim), (11608, -1, u64::MAX));
        assert_eq!((stat.exit_signal, stat.env_end, stat.exit_code), (17, 140722353553387, 0));
        assert_eq!((stat.starttime, stat.num_threads, stat.nice), (63499, 1, 0));
    }

    #[test]
    fn name_that_looks_like_the_rest() {
        let tail = REAL.strip_prefix(b"11612 (cat)").unwrap();
        let text = [&b"9683 (a) b\n\\x) Z 1 ("[..], b")", tail].concat();
        assert_eq!(parse(&text).unwrap().comm, b"a) b\n\\x) Z 1 (");
        let text = [&b"1 (\xff\x00)"[..], tail].concat();
        assert_eq!(parse(&text).unwrap().comm, b"\xff\x00");
    }

    #[test]
    fn own() {
        let mut buffer = Vec::new();
        crate::proc::read_proc(std::path::Path::new("/proc/self/stat"), &mut buffer).unwrap();
        assert_eq!(parse(&buffer).unwrap().pid, i32::try_from(std::process::id()).unwrap());
    }

    #[test]
    fn hostile() {
        for length in 0..REAL.len() - 2 {
            assert!(parse(&REAL[..length]).is_err(), "{length}");
        }
        for bad in [&b")("[..], b"1 )(", b"(", b"99999999999 (a) R", b"1 (a) Q 1", b"1 (a) RR 1"] {
            assert!(parse(bad).is_err());
        }
        let error = parse(b"1 (a) R 1 2 99999999999999999999").unwrap_err();
        assert_eq!(error.to_string(), "/proc/PID/stat, line 1: session cannot be read");
    }
}
