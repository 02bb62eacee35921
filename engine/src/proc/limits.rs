//! `/proc/PID/limits`: the resource limits, readable without any capability over the task.
//!
//! Rows are found by name, not by order, and every limit that a restore would set must be there.
//!
//! Man pages: proc_pid_limits(5), getrlimit(2).

use super::{Lines, ParseError, Words};

/// Number of limits, `RLIM_NLIMITS`.
pub const COUNT: usize = 16;

/// "No limit": `RLIM_INFINITY`.
pub const UNLIMITED: u64 = u64::MAX;

/// Names in the kernel's text, at the index that is the `RLIMIT_` number (x86, arm and most others).
pub const NAMES: [&str; COUNT] = [
    "Max cpu time",
    "Max file size",
    "Max data size",
    "Max stack size",
    "Max core file size",
    "Max resident set",
    "Max processes",
    "Max open files",
    "Max locked memory",
    "Max address space",
    "Max file locks",
    "Max pending signals",
    "Max msgqueue size",
    "Max nice priority",
    "Max realtime priority",
    "Max realtime timeout",
];

/// A limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limit {
    /// What holds now.
    pub current: u64,
    /// What it may be raised to.
    pub maximum: u64,
}

/// Reads the file. The index of a limit is its `RLIMIT_` number.
///
/// # Errors
/// If a limit is missing, there twice, or not known to this program.
pub fn parse(text: &[u8]) -> Result<[Limit; COUNT], ParseError> {
    let mut found = [None; COUNT];
    let mut lines = Lines::new("/proc/PID/limits", text);
    lines
        .next()
        .filter(|(_, head)| head.starts_with(b"Limit "))
        .ok_or_else(|| lines.place().missing("the head line"))?;
    for (at, line) in lines.by_ref() {
        let row = NAMES.iter().zip(&mut found).find_map(|(name, slot)| {
            let rest = line.strip_prefix(name.as_bytes()).filter(|rest| rest.first() == Some(&b' '))?;
            Some((*name, slot, rest))
        });
        let Some((name, slot, rest)) = row else { return Err(at.malformed("the name of a limit")) };
        let mut words = Words::new(rest);
        let mut value = || match at.word(&mut words, name)? {
            b"unlimited" => Ok(UNLIMITED),
            number => at.uint(number, 10, name),
        };
        let limit = Limit { current: value()?, maximum: value()? };
        at.once(slot, limit, name)?;
    }
    let mut limits = [Limit::default(); COUNT];
    for ((slot, limit), name) in found.iter().zip(&mut limits).zip(NAMES) {
        *limit = slot.ok_or_else(|| lines.place().missing(name))?;
    }
    Ok(limits)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REAL: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
Max cpu time              unlimited            unlimited            seconds   \n\
Max file size             unlimited            unlimited            bytes     \n\
Max data size             unlimited            unlimited            bytes     \n\
Max stack size            8388608              unlimited            bytes     \n\
Max core file size        0                    unlimited            bytes     \n\
Max resident set          unlimited            unlimited            bytes     \n\
Max processes             96365                96365                processes \n\
Max open files            20000                20000                files     \n\
Max locked memory         8388608              8388608              bytes     \n\
Max address space         unlimited            unlimited            bytes     \n\
Max file locks            unlimited            unlimited            locks     \n\
Max pending signals       96365                96365                signals   \n\
Max msgqueue size         819200               819200               bytes     \n\
Max nice priority         0                    0                    \n\
Max realtime priority     0                    0                    \n\
Max realtime timeout      unlimited            unlimited            us        \n";

    #[test]
    fn real() {
        let limits = parse(REAL.as_bytes()).unwrap();
        assert_eq!(limits[3], Limit { current: 8_388_608, maximum: UNLIMITED });
        assert_eq!(limits[7], Limit { current: 20000, maximum: 20000 });
        assert_eq!(limits[13], Limit { current: 0, maximum: 0 });
        assert_eq!(limits[15].current, UNLIMITED);
    }

    #[test]
    fn own() {
        let mut buffer = Vec::new();
        crate::proc::read_proc(std::path::Path::new("/proc/self/limits"), &mut buffer).unwrap();
        let limits = parse(&buffer).unwrap();
        let open = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        assert_eq!(limits[7].current, open.current.unwrap_or(UNLIMITED));
    }

    #[test]
    fn hostile() {
        for length in 0..REAL.len() - 30 {
            assert!(parse(&REAL.as_bytes()[..length]).is_err());
        }
        let extra = "Max new thing             0                    0                    \n";
        let (twice, unknown) = (format!("{REAL}{}", &REAL[80..160]), format!("{REAL}{extra}"));
        assert!(parse(twice.as_bytes()).is_err());
        assert!(parse(unknown.as_bytes()).is_err());
        assert!(parse(REAL.replace("819200 ", "-1 ").as_bytes()).is_err());
        assert!(parse(b"\xff\n").is_err());
    }
}
