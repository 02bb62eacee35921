//! Pure parsers for the texts under `/proc`: bytes in, typed values out.
//!
//! No parser here does I/O, panics, loops without consuming input, or allocates more than a small multiple of the text
//! that it was given. Each is also a fuzz target of the same stem (`fuzz/fuzz_targets/proc_*.rs`). The one function that
//! touches the system is [`read_proc`], which fills a buffer that callers reuse.
//!
//! Names are bytes: the kernel prints whatever a program chose. Where the kernel's own escaping is ambiguous, the module
//! says so and names the exact source to use instead.
//!
//! Man pages: proc(5), proc_pid_*(5).

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::path::Path;

use rustix::fd::AsFd;
use rustix::fs::{Mode, OFlags};

pub mod auxv;
pub mod cgroup;
pub mod fdinfo;
pub mod io_uring;
pub mod limits;
pub mod links;
pub mod locks;
pub mod maps;
pub mod mountinfo;
pub mod net;
pub mod simple;
pub mod stat;
pub mod status;
pub mod timers;

/// A text under `/proc` is not what this program understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{file}, line {line}: {problem}")]
pub struct ParseError {
    /// The file as the manual names it, for example `/proc/PID/smaps`.
    pub file: &'static str,
    /// The line, counted from one.
    pub line: usize,
    /// What is wrong there.
    pub problem: Problem,
}

/// What is wrong with a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The text ends before a field that must be there.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// The field is there and does not read as what it should be, or does not fit.
    #[error("{0} cannot be read")]
    Malformed(&'static str),
    /// The field is there a second time.
    #[error("{0} is there twice")]
    Twice(&'static str),
    /// The text goes on where it should have ended.
    #[error("there is more after {0}")]
    Trailing(&'static str),
}

/// The most that [`read_proc`] takes: a million areas in `smaps` are less than this.
const MOST: usize = 2 << 30;

/// Reads one file under `/proc` to its end, into `buffer`, whose former content goes.
///
/// The kernel makes such a text while it is read, so it is read in one pass and never sought.
///
/// # Errors
/// Whatever `open` or `read` say; `ESRCH` and `ENOENT` mean that the task is gone. `EFBIG` for more than 2 GiB.
pub fn read_proc(path: &Path, buffer: &mut Vec<u8>) -> Result<(), rustix::io::Errno> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?;
    read_all(file, buffer)
}

/// Reads one file to its end, relative to an open folder such as `/proc/PID`.
///
/// # Errors
/// As [`read_proc`].
pub fn read_proc_at(folder: impl AsFd, name: &Path, buffer: &mut Vec<u8>) -> Result<(), rustix::io::Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = rustix::fs::openat(folder, name, flags, Mode::empty())?;
    read_all(file, buffer)
}

/// Reads an open file from where it stands to its end.
pub(crate) fn read_all(file: impl AsFd, buffer: &mut Vec<u8>) -> Result<(), rustix::io::Errno> {
    buffer.clear();
    loop {
        if buffer.capacity() - buffer.len() < 4096 {
            let more = buffer.capacity().clamp(16 << 10, 16 << 20);
            buffer.try_reserve(more).map_err(|_| rustix::io::Errno::NOMEM)?;
        }
        match rustix::io::read(&file, rustix::buffer::spare_capacity(buffer)) {
            Ok(0) => return Ok(()),
            Ok(_) if buffer.len() > MOST => return Err(rustix::io::Errno::FBIG),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Where a parser stands: which file, which line. Makes the errors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    file: &'static str,
    line: usize,
}

impl Place {
    /// A text of one line, or its first.
    pub(crate) fn first(file: &'static str) -> Self {
        Self { file, line: 1 }
    }

    /// An error here.
    pub(crate) fn error(self, problem: Problem) -> ParseError {
        ParseError { file: self.file, line: self.line, problem }
    }

    /// "`field` cannot be read", here.
    pub(crate) fn malformed(self, field: &'static str) -> ParseError {
        self.error(Problem::Malformed(field))
    }

    /// "`field` is missing", here.
    pub(crate) fn missing(self, field: &'static str) -> ParseError {
        self.error(Problem::Missing(field))
    }

    /// The next word of a line, which must be there.
    pub(crate) fn word<'a>(self, words: &mut Words<'a>, field: &'static str) -> Result<&'a [u8], ParseError> {
        words.next().ok_or_else(|| self.missing(field))
    }

    /// The next word of a line as an unsigned number.
    pub(crate) fn next_uint<T: TryFrom<u64>>(
        self,
        words: &mut Words<'_>,
        radix: u8,
        field: &'static str,
    ) -> Result<T, ParseError> {
        self.uint(self.word(words, field)?, radix, field)
    }

    /// The next word of a line as a signed decimal number.
    pub(crate) fn next_int<T: TryFrom<i64>>(self, words: &mut Words<'_>, field: &'static str) -> Result<T, ParseError> {
        self.int(self.word(words, field)?, field)
    }

    /// These bytes, without the space around them, as an unsigned number.
    pub(crate) fn uint<T: TryFrom<u64>>(self, text: &[u8], radix: u8, field: &'static str) -> Result<T, ParseError> {
        uint(text.trim_ascii(), radix).and_then(|n| T::try_from(n).ok()).ok_or_else(|| self.malformed(field))
    }

    /// These bytes, without the space around them, as a signed decimal number.
    pub(crate) fn int<T: TryFrom<i64>>(self, text: &[u8], field: &'static str) -> Result<T, ParseError> {
        int(text.trim_ascii()).and_then(|n| T::try_from(n).ok()).ok_or_else(|| self.malformed(field))
    }

    /// "0" or "1".
    pub(crate) fn flag(self, text: &[u8], field: &'static str) -> Result<bool, ParseError> {
        match text.trim_ascii() {
            b"0" => Ok(false),
            b"1" => Ok(true),
            _ => Err(self.malformed(field)),
        }
    }

    /// Stores a value that a text may give only once.
    pub(crate) fn once<T>(self, slot: &mut Option<T>, value: T, field: &'static str) -> Result<(), ParseError> {
        match slot.replace(value) {
            None => Ok(()),
            Some(_) => Err(self.error(Problem::Twice(field))),
        }
    }
}

/// The lines of a text with their places. A last line without a newline counts.
pub(crate) struct Lines<'a> {
    rest: &'a [u8],
    place: Place,
}

impl<'a> Lines<'a> {
    /// Starts at the first line.
    pub(crate) fn new(file: &'static str, text: &'a [u8]) -> Self {
        Self { rest: text, place: Place { file, line: 0 } }
    }

    /// The place of the line given last.
    pub(crate) fn place(&self) -> Place {
        self.place
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = (Place, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let (line, rest) = split_once(self.rest, b'\n').unwrap_or((self.rest, &[]));
        self.rest = rest;
        self.place.line = self.place.line.saturating_add(1);
        Some((self.place, line))
    }
}

/// The words of a line, separated by spaces or tabs.
#[derive(Clone, Debug)]
pub(crate) struct Words<'a> {
    rest: &'a [u8],
}

impl<'a> Words<'a> {
    /// Starts at the first word.
    pub(crate) fn new(line: &'a [u8]) -> Self {
        Self { rest: line }
    }

    /// What is left, with the space before it.
    pub(crate) fn exact_rest(&self) -> &'a [u8] {
        self.rest
    }
}

impl<'a> Iterator for Words<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let start = self.rest.iter().position(|&b| !is_blank(b)).unwrap_or(self.rest.len());
        let text = self.rest.get(start..).unwrap_or_default();
        let (word, rest) = text.split_at(text.iter().position(|&b| is_blank(b)).unwrap_or(text.len()));
        self.rest = rest;
        (!word.is_empty()).then_some(word)
    }
}

/// The kernel separates by these and escapes no other space: a carriage return may be part of a name.
fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

/// What is before and after the first `separator`.
pub(crate) fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|&b| b == separator)?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

/// `digits` as an unsigned number: no sign, no space, at least one digit, nothing else. "0x" may precede radix 16.
pub(crate) fn uint(digits: &[u8], radix: u8) -> Option<u64> {
    let digits = match digits {
        [b'0', b'x', rest @ ..] if radix == 16 => rest,
        all => all,
    };
    if digits.is_empty() {
        return None;
    }
    let mut number = 0u64;
    for &byte in digits {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'z' => byte - b'a' + 10,
            b'A'..=b'Z' => byte - b'A' + 10,
            _ => return None,
        };
        if digit >= radix {
            return None;
        }
        number = number.checked_mul(u64::from(radix))?.checked_add(u64::from(digit))?;
    }
    Some(number)
}

/// `digits` as a decimal number with an optional minus.
pub(crate) fn int(digits: &[u8]) -> Option<i64> {
    match digits {
        [b'-', rest @ ..] => 0i64.checked_sub_unsigned(uint(rest, 10)?),
        all => i64::try_from(uint(all, 10)?).ok(),
    }
}

/// Bytes from pairs of hexadecimal digits.
pub(crate) fn hex_bytes(text: &[u8]) -> Option<Vec<u8>> {
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.chunks_exact(2).map(|pair| uint(pair, 16).and_then(|n| u8::try_from(n).ok())).collect()
}

/// Turns `\ooo` (three octal digits, as the kernel writes) back into the byte. Everything else stays.
pub(crate) fn unescape_octal(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        if let [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..] = rest {
            out.push((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        assert_eq!(uint(b"18446744073709551615", 10), Some(u64::MAX));
        assert_eq!(uint(b"18446744073709551616", 10), None);
        assert_eq!(uint(b"0xff", 16), Some(255));
        for bad in [&b""[..], b"-1", b"+1", b" 1", b"0x", b"8\xff"] {
            assert_eq!(uint(bad, if bad == b"0x" { 16 } else { 10 }), None);
        }
        assert_eq!(uint(b"8", 8), None);
        assert_eq!(int(b"-9223372036854775808"), Some(i64::MIN));
        assert_eq!(int(b"-9223372036854775809"), None);
        assert_eq!(int(b"9223372036854775808"), None);
        assert_eq!(int(b"--1"), None);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape_octal(b"a\\040b\\012\\134\\9\\0"), b"a b\n\\\\9\\0");
        assert_eq!(unescape_octal(b"\\777"), b"\\777");
        assert_eq!(hex_bytes(b"a7c4"), Some(vec![0xa7, 0xc4]));
        assert_eq!(hex_bytes(b"a7c"), None);
        assert_eq!(hex_bytes(b"0x"), None);
    }

    #[test]
    fn lines_and_words() {
        let lines: Vec<_> = Lines::new("t", b"a\n\nb").map(|(p, l)| (p.line, l)).collect();
        assert_eq!(lines, [(1, &b"a"[..]), (2, b""), (3, b"b")]);
        let words: Vec<_> = Words::new(b"  a\tb  ").collect();
        assert_eq!(words, [&b"a"[..], b"b"]);
    }

    #[test]
    fn reads_and_reuses() {
        let mut buffer = b"old".to_vec();
        read_proc(Path::new("/proc/self/smaps"), &mut buffer).unwrap();
        assert!(buffer.len() > 4096 && buffer.ends_with(b"\n"));
        read_proc(Path::new("/proc/self/comm"), &mut buffer).unwrap();
        assert!(buffer.len() < 20);
        assert!(read_proc(Path::new("/proc/0/comm"), &mut buffer).is_err());
    }

    #[test]
    fn messages_name_the_place() {
        let error = Place { file: "/proc/PID/smaps", line: 12 }.malformed("the end of an area");
        assert_eq!(error.to_string(), "/proc/PID/smaps, line 12: the end of an area cannot be read");
    }
}
