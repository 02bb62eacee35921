//! Files of one line or one table that need no type of their own: numbers, names, maps of identities, the system call.
//!
//! | file | function |
//! |---|---|
//! | `task/TID/children` | [`children`] |
//! | `comm` | [`comm`] |
//! | `cmdline`, `environ` | [`strings`] |
//! | `uid_map`, `gid_map`, `projid_map` | [`id_map`] |
//! | `setgroups` | [`setgroups`] |
//! | `syscall` | [`syscall`] |
//! | `personality`, `coredump_filter` | [`hex`] |
//! | `timerslack_ns`, `sessionid`, `/proc/sys/kernel/yama/ptrace_scope`, most of `/proc/sys` | [`unsigned`] |
//! | `oom_score_adj`, `/proc/sys/kernel/sched_rt_runtime_us` | [`signed`] |
//! | `loginuid` | [`loginuid`] |
//! | `/proc/sys/kernel/sem`, `/proc/sys/net/ipv4/tcp_rmem` | [`numbers`] |
//! | `timens_offsets` | [`timens_offsets`] |
//! | `autogroup` | [`autogroup_nice`] |
//!
//! Man page: proc(5) and the pages of the files.

use super::{int, split_once, Lines, ParseError, Place, Words};

/// Reads `/proc/PID/task/TID/children`. While the task runs, the kernel may leave children out.
///
/// # Errors
/// If a word is no number.
pub fn children(text: &[u8]) -> Result<Vec<i32>, ParseError> {
    let at = Place::first("/proc/PID/task/TID/children");
    Words::new(text.trim_ascii_end()).map(|word| at.int(word, "a child")).collect()
}

/// Reads `/proc/PID/comm`: everything but the newline that ends it.
#[must_use]
pub fn comm(text: &[u8]) -> &[u8] {
    text.strip_suffix(b"\n").unwrap_or(text)
}

/// Reads `/proc/PID/cmdline` or `/proc/PID/environ`: strings that end with NUL. The program may have overwritten them.
pub fn strings(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    let body = text.strip_suffix(b"\0").unwrap_or(text);
    body.split(|&b| b == 0).take(if text.is_empty() { 0 } else { usize::MAX })
}

/// A range of identities in a user namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// First inside.
    pub inside: u32,
    /// First outside: in the reader's user namespace, or its parent if the task is in the reader's.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Reads `/proc/PID/uid_map`, `gid_map` or `projid_map`. Empty where none was written yet.
///
/// # Errors
/// If a line is not three numbers, or a range goes beyond what there is.
pub fn id_map(text: &[u8]) -> Result<Vec<IdRange>, ParseError> {
    Lines::new("/proc/PID/uid_map", text)
        .map(|(at, line)| {
            let mut words = Words::new(line);
            let mut next = |field| at.next_uint::<u32>(&mut words, 10, field);
            let range = IdRange { inside: next("ID inside")?, outside: next("ID outside")?, count: next("length")? };
            let fits = |first: u32| range.count != 0 && first.checked_add(range.count).is_some();
            if words.next().is_some() || !fits(range.inside) || !fits(range.outside) {
                return Err(at.malformed("length"));
            }
            Ok(range)
        })
        .collect()
}

/// Reads `/proc/PID/setgroups`: whether setgroups(2) is allowed.
///
/// # Errors
/// If it is neither `allow` nor `deny`.
pub fn setgroups(text: &[u8]) -> Result<bool, ParseError> {
    match text.trim_ascii() {
        b"allow" => Ok(true),
        b"deny" => Ok(false),
        _ => Err(Place::first("/proc/PID/setgroups").malformed("allow or deny")),
    }
}

/// What a task does in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyscallState {
    /// It runs; the kernel cannot say.
    Running,
    /// It is blocked, but not in a system call.
    Blocked {
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
    /// It is in a system call.
    InSyscall {
        /// Number.
        number: i64,
        /// Arguments.
        arguments: [u64; 6],
        /// Stack pointer.
        sp: u64,
        /// Instruction pointer.
        pc: u64,
    },
}

/// Reads `/proc/PID/syscall`.
///
/// # Errors
/// If it is none of the three forms.
pub fn syscall(text: &[u8]) -> Result<SyscallState, ParseError> {
    let at = Place::first("/proc/PID/syscall");
    let mut words = Words::new(text.trim_ascii_end());
    let first = at.word(&mut words, "the number of a system call")?;
    if first == b"running" {
        return Ok(SyscallState::Running);
    }
    let number = at.int(first, "the number of a system call")?;
    let mut next = |field| at.next_uint::<u64>(&mut words, 16, field);
    let state = if number == -1 {
        SyscallState::Blocked { sp: next("the stack pointer")?, pc: next("the instruction pointer")? }
    } else {
        let mut arguments = [0; 6];
        for argument in &mut arguments {
            *argument = next("an argument")?;
        }
        SyscallState::InSyscall {
            number,
            arguments,
            sp: next("the stack pointer")?,
            pc: next("the instruction pointer")?,
        }
    };
    match words.next() {
        None => Ok(state),
        Some(_) => Err(at.malformed("the instruction pointer")),
    }
}

/// Reads a file that is one hexadecimal number: `personality`, `coredump_filter`.
///
/// # Errors
/// If it is not, or does not fit.
pub fn hex<T: TryFrom<u64>>(file: &'static str, text: &[u8]) -> Result<T, ParseError> {
    Place::first(file).uint(text, 16, "the number")
}

/// Reads a file that is one unsigned decimal number.
///
/// # Errors
/// If it is not, or does not fit.
pub fn unsigned<T: TryFrom<u64>>(file: &'static str, text: &[u8]) -> Result<T, ParseError> {
    Place::first(file).uint(text, 10, "the number")
}

/// Reads a file that is one signed decimal number.
///
/// # Errors
/// If it is not, or does not fit.
pub fn signed<T: TryFrom<i64>>(file: &'static str, text: &[u8]) -> Result<T, ParseError> {
    Place::first(file).int(text, "the number")
}

/// Reads a file that is one line of signed decimal numbers.
///
/// # Errors
/// If it is not, or one does not fit.
pub fn numbers<T: TryFrom<i64>>(file: &'static str, text: &[u8]) -> Result<Vec<T>, ParseError> {
    let at = Place::first(file);
    Words::new(text.trim_ascii_end()).map(|word| at.int(word, "a number")).collect()
}

/// Reads `/proc/PID/loginuid`; none if it was never set.
///
/// # Errors
/// If it is no number.
pub fn loginuid(text: &[u8]) -> Result<Option<u32>, ParseError> {
    let uid = Place::first("/proc/PID/loginuid").uint(text, 10, "the user")?;
    Ok((uid != u32::MAX).then_some(uid))
}

/// Offsets of the clocks in a time namespace, in seconds and nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets {
    /// CLOCK_MONOTONIC.
    pub monotonic: (i64, u32),
    /// CLOCK_BOOTTIME.
    pub boottime: (i64, u32),
}

/// Reads `/proc/PID/timens_offsets`: those of the namespace for children.
///
/// # Errors
/// If a clock is missing or not known.
pub fn timens_offsets(text: &[u8]) -> Result<TimeOffsets, ParseError> {
    let (mut monotonic, mut boottime) = (None, None);
    let mut lines = Lines::new("/proc/PID/timens_offsets", text);
    for (at, line) in lines.by_ref() {
        let mut words = Words::new(line);
        let slot = match at.word(&mut words, "the clock")? {
            b"monotonic" | b"1" => &mut monotonic,
            b"boottime" | b"7" => &mut boottime,
            _ => return Err(at.malformed("the clock")),
        };
        let seconds = at.next_int(&mut words, "seconds")?;
        let nanos: u32 = at.next_uint(&mut words, 10, "nanoseconds")?;
        if nanos >= 1_000_000_000 {
            return Err(at.malformed("nanoseconds"));
        }
        at.once(slot, (seconds, nanos), "the clock")?;
    }
    let at = lines.place();
    Ok(TimeOffsets {
        monotonic: monotonic.ok_or_else(|| at.missing("monotonic"))?,
        boottime: boottime.ok_or_else(|| at.missing("boottime"))?,
    })
}

/// Reads `/proc/PID/autogroup`: the nice value of the group. Empty text where a task has none.
///
/// # Errors
/// If it is not `/autogroup-N nice M`.
pub fn autogroup_nice(text: &[u8]) -> Result<Option<i32>, ParseError> {
    let text = text.trim_ascii();
    if text.is_empty() {
        return Ok(None);
    }
    let bad = || Place::first("/proc/PID/autogroup").malformed("nice");
    let (_, nice) = split_once(text, b' ').ok_or_else(bad)?;
    let nice = nice.strip_prefix(b"nice ").and_then(int).and_then(|n| i32::try_from(n).ok());
    nice.map(Some).ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists() {
        assert_eq!(children(b"12 345 \n"), Ok(vec![12, 345]));
        assert_eq!(children(b""), Ok(Vec::new()));
        assert!(children(b"1 x").is_err() && children(b"99999999999").is_err());
        assert_eq!(comm(b"a\nb\n"), b"a\nb");
        assert_eq!(comm(b""), b"");
        assert_eq!(strings(b"a\0\0b\0").collect::<Vec<_>>(), [&b"a"[..], b"", b"b"]);
        assert_eq!(strings(b"").count(), 0);
        assert_eq!(strings(b"\0").count(), 1);
        assert_eq!(numbers("sem", b"32000\t1024000000\t500\t-1\n"), Ok(vec![32000i64, 1_024_000_000, 500, -1]));
    }

    #[test]
    fn identities() {
        let all = IdRange { inside: 0, outside: 0, count: u32::MAX };
        assert_eq!(id_map(b"         0          0 4294967295\n"), Ok(vec![all]));
        assert_eq!(id_map(b"0 1000 1\n1 100000 65536\n").unwrap().len(), 2);
        for bad in ["\n", "0 0", "0 0 0", "1 0 4294967295", "0 1 4294967295", "0 0 4294967296", "0 0 1 1"] {
            assert!(id_map(bad.as_bytes()).is_err(), "{bad}");
        }
        assert_eq!((setgroups(b"allow\n"), setgroups(b"deny\n")), (Ok(true), Ok(false)));
        assert!(setgroups(b"").is_err());
        assert_eq!((loginuid(b"4294967295"), loginuid(b"1000")), (Ok(None), Ok(Some(1000))));
    }

    #[test]
    fn system_calls() {
        assert_eq!(syscall(b"running\n"), Ok(SyscallState::Running));
        assert_eq!(syscall(b"-1 0x7ffc 0x7f15\n"), Ok(SyscallState::Blocked { sp: 0x7ffc, pc: 0x7f15 }));
        let text = b"0 0x3 0x7f15a1ff8000 0x20000 0x22 0xffffffff 0x0 0x7ffc7fdfeb38 0x7f15a21742ad\n";
        let SyscallState::InSyscall { number, arguments, pc, .. } = syscall(text).unwrap() else { panic!() };
        assert_eq!((number, arguments[1], arguments[5], pc), (0, 0x7f15_a1ff_8000, 0, 0x7f15_a217_42ad));
        for length in 0..text.len() - 14 {
            assert!(syscall(&text[..length]).is_err());
        }
        assert!(syscall(b"-1 0x1 0x2 0x3").is_err());
    }

    #[test]
    fn one_number() {
        assert_eq!(hex::<u32>("/proc/PID/personality", b"00040000\n"), Ok(0x0004_0000));
        assert_eq!(unsigned::<u64>("/proc/PID/timerslack_ns", b"50000\n"), Ok(50000));
        assert_eq!(signed::<i16>("/proc/PID/oom_score_adj", b"-1000\n"), Ok(-1000));
        let error = unsigned::<u8>("/proc/sys/kernel/yama/ptrace_scope", b"256\n").unwrap_err();
        assert_eq!(error.to_string(), "/proc/sys/kernel/yama/ptrace_scope, line 1: the number cannot be read");
        assert!(unsigned::<u8>("x", b"").is_err() && hex::<u8>("x", b"\xff").is_err());
    }

    #[test]
    fn clocks_and_groups() {
        let offsets = timens_offsets(b"monotonic           0         0\nboottime          -86400 999999999\n").unwrap();
        assert_eq!((offsets.monotonic, offsets.boottime), ((0, 0), (-86400, 999_999_999)));
        for bad in
            ["", "monotonic 0 0\n", "monotonic 0 1000000000\nboottime 0 0", "new 0 0", "monotonic 0 0\nmonotonic 0 0\n"]
        {
            assert!(timens_offsets(bad.as_bytes()).is_err());
        }
        assert_eq!(autogroup_nice(b"/autogroup-10 nice -5\n"), Ok(Some(-5)));
        assert_eq!(autogroup_nice(b""), Ok(None));
        assert!(autogroup_nice(b"/autogroup-10").is_err());
    }
}
