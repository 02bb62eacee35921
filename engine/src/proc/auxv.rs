//! `/proc/PID/auxv`: what the kernel told the program at its start, pairs of native words.
//!
//! Kept whole, because a restore gives it back with PR_SET_MM_MAP byte for byte. Empty for a kernel thread.
//!
//! Man pages: getauxval(3), proc_pid_auxv(5).

use super::{ParseError, Place};

/// The auxiliary vector of a 64-bit task.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Auxv {
    /// Type and value of each entry, without the AT_NULL that ends them.
    pub entries: Vec<(u64, u64)>,
}

impl Auxv {
    /// The value of the first entry of a type, such as `AT_SYSINFO_EHDR`.
    #[must_use]
    pub fn get(&self, kind: u64) -> Option<u64> {
        self.entries.iter().find(|entry| entry.0 == kind).map(|entry| entry.1)
    }

    /// All words, with AT_NULL, as the `mm` image keeps them.
    #[must_use]
    pub fn words(&self) -> Vec<u64> {
        self.entries.iter().flat_map(|&(kind, value)| [kind, value]).chain([0, 0]).collect()
    }
}

/// Reads the file.
///
/// # Errors
/// If it is not made of pairs of words, or does not end with AT_NULL though it is not empty.
pub fn parse(bytes: &[u8]) -> Result<Auxv, ParseError> {
    let at = Place::first("/proc/PID/auxv");
    let mut entries = Vec::with_capacity(bytes.len() / 16);
    for pair in bytes.chunks(16) {
        let word = |range: std::ops::Range<usize>| {
            pair.get(range).and_then(|word: &[u8]| word.try_into().ok()).map(u64::from_ne_bytes)
        };
        let (Some(kind), Some(value)) = (word(0..8), word(8..16)) else { return Err(at.malformed("a pair of words")) };
        if kind == 0 {
            return Ok(Auxv { entries });
        }
        entries.push((kind, value));
    }
    if entries.is_empty() {
        Ok(Auxv { entries })
    } else {
        Err(at.missing("AT_NULL"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own() {
        let mut buffer = Vec::new();
        crate::proc::read_proc(std::path::Path::new("/proc/self/auxv"), &mut buffer).unwrap();
        let auxv = parse(&buffer).unwrap();
        assert_eq!(auxv.get(6), Some(4096));
        assert!(auxv.get(33).is_some());
        assert_eq!(auxv.words().len(), auxv.entries.len() * 2 + 2);
        assert_eq!(auxv.get(0), None);
    }

    #[test]
    fn hostile() {
        assert_eq!(parse(b""), Ok(Auxv::default()));
        assert!(parse(&[1; 16]).is_err());
        for length in 1..16 {
            assert!(parse(&[0; 16][..length]).is_err());
            assert!(parse(&[&[1; 16][..], &[1; 16][..length]].concat()).is_err());
        }
        assert_eq!(parse(&[[1; 16], [0; 16]].concat()).unwrap().entries.len(), 1);
    }
}
