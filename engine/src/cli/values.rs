//! Words of the command line as numbers, sizes, texts and paths.
//!
//! Under the name `criu` numbers are read as C's `atoi` does, since that is what CRIU's callers met: leading digits count
//! and the rest is nobody's business. Under our own name a number is a number or an error.

use crate::options::{OptionError, Persona};
use std::ffi::OsStr;
use std::path::PathBuf;

/// What C's `atoi` makes of it, without its overflow.
pub(super) fn atoi(bytes: &[u8]) -> i32 {
    let text = bytes.trim_ascii_start();
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        rest => (false, rest),
    };
    let mut n = 0i64;
    for d in digits.iter().take_while(|b| b.is_ascii_digit()) {
        n = (n * 10 + i64::from(d - b'0')).min(i64::from(u32::MAX));
    }
    let n = if negative { -n } else { n };
    i32::try_from(n).unwrap_or(if negative { i32::MIN } else { i32::MAX })
}

fn invalid(option: &'static str, v: &OsStr) -> OptionError {
    OptionError::Invalid { option, value: v.to_string_lossy().into_owned() }
}

/// A number.
pub(super) fn number(persona: Persona, option: &'static str, v: &OsStr) -> Result<i32, OptionError> {
    match persona {
        Persona::Criu => Ok(atoi(v.as_encoded_bytes())),
        Persona::Standstill => v.to_str().and_then(|t| t.parse().ok()).ok_or_else(|| invalid(option, v)),
    }
}

/// A number of bytes, with K, M or G.
pub(super) fn size(persona: Persona, option: &'static str, v: &OsStr) -> Result<u64, OptionError> {
    let bytes = v.as_encoded_bytes();
    let shift = match bytes.iter().find(|b| b"KMG".contains(b)) {
        None => 0,
        // CRIU looks for K first, then M, then G, anywhere
        Some(_) if bytes.contains(&b'K') => 10,
        Some(_) if bytes.contains(&b'M') => 20,
        Some(_) => 30,
    };
    let n = match persona {
        Persona::Criu => u64::try_from(atoi(bytes)).map_err(|_| invalid(option, v))?,
        Persona::Standstill => {
            let digits = if shift == 0 { bytes } else { &bytes[..bytes.len() - 1] };
            let digits = std::str::from_utf8(digits).ok().filter(|d| !d.starts_with('+'));
            digits.and_then(|d| d.parse().ok()).ok_or_else(|| invalid(option, v))?
        }
    };
    n.checked_mul(1 << shift).ok_or_else(|| invalid(option, v))
}

/// Text, which is what most options and CRIU's RPC hold.
pub(super) fn text<'a>(option: &'static str, v: &'a OsStr) -> Result<&'a str, OptionError> {
    v.to_str().ok_or_else(|| invalid(option, v))
}

/// A path.
pub(super) fn path(v: &OsStr) -> PathBuf {
    PathBuf::from(v)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (text, n) in [("12", 12), (" -3x", -3), ("x", 0), ("99999999999", i32::MAX), ("erbosity=0", 0), ("+7", 7)] {
            assert_eq!(atoi(text.as_bytes()), n, "{text}");
        }
        assert_eq!(number(Persona::Criu, "tree", OsStr::new("5x")), Ok(5));
        assert!(number(Persona::Standstill, "tree", OsStr::new("5x")).is_err());
    }

    #[test]
    fn sizes() {
        for persona in [Persona::Criu, Persona::Standstill] {
            for (text, n) in [("1M", 1 << 20), ("3K", 3 << 10), ("2G", 2 << 30), ("17", 17), ("0", 0)] {
                assert_eq!(size(persona, "ghost-limit", OsStr::new(text)), Ok(n), "{text}");
            }
            assert!(size(persona, "ghost-limit", OsStr::new("-1")).is_err());
        }
        for text in ["1MB", "M", "", "1T", "+1", "99999999999999999999G"] {
            assert!(size(Persona::Standstill, "ghost-limit", OsStr::new(text)).is_err(), "{text}");
        }
        assert_eq!(size(Persona::Criu, "ghost-limit", OsStr::new("1MB")), Ok(1 << 20));
    }
}
