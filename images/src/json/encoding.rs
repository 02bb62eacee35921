//! Bytes as text: base64 in lines, and quoted-printable.

use base64::engine::general_purpose::STANDARD;
use base64::Engine as _;

/// How many bytes make a line of 76 characters.
const BASE64_LINE: usize = 57;

/// Base64 in lines of 76 characters, each ended by a newline.
pub(super) fn base64(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len() / 3 * 4 + bytes.len() / BASE64_LINE + 8);
    for line in bytes.chunks(BASE64_LINE) {
        STANDARD.encode_string(line, &mut out);
        out.push('\n');
    }
    out
}

/// Base64, in which white space means nothing.
pub(super) fn from_base64(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    STANDARD.decode(digits).ok()
}

/// The longest line of quoted-printable, its soft break included.
const QUOTED_LINE: usize = 76;

/// Quoted-printable text. A newline stays one; unlike crit, a carriage return never does, as some would be lost.
pub(crate) fn quoted(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(bytes.len());
    let mut column = 0;
    for (place, byte) in bytes.iter().enumerate() {
        let next = bytes.get(place + 1);
        if *byte == b'\n' {
            out.push('\n');
            column = 0;
            continue;
        }
        let ends_line = matches!(next, None | Some(b'\n'));
        let plain = match byte {
            b'=' => false,
            b' ' | b'\t' => !ends_line,
            b'.' => column > 0 || !matches!(next, None | Some(b'\n' | b'\r' | 0)),
            b'!'..=b'~' => true,
            _ => false,
        };
        let width = if plain { 1 } else { 3 };
        if column + width >= QUOTED_LINE && !(plain && ends_line) {
            out.push_str("=\n");
            column = 0;
        }
        if plain {
            out.push(char::from(*byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "={byte:02X}");
        }
        column += width;
    }
    out
}

/// The bytes of quoted-printable text; what is not of that form stands for itself.
pub(super) fn from_quoted(text: &str) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'=' {
            out.push(*byte);
            continue;
        }
        let hex = |digit: Option<&u8>| digit.and_then(|digit| char::from(*digit).to_digit(16));
        if let Some(tail) = rest.strip_prefix(b"\n").or_else(|| rest.strip_prefix(b"\r\n")) {
            rest = tail;
        } else if let (Some(high), Some(low)) = (hex(rest.first()), hex(rest.get(1))) {
            out.extend(u8::try_from(high << 4 | low));
            rest = rest.get(2..).unwrap_or(&[]);
        } else {
            out.push(b'=');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_both_ways() {
        assert_eq!(base64(b""), "");
        assert_eq!(base64(b"a"), "YQ==\n");
        assert_eq!(base64(b"ab"), "YWI=\n");
        assert_eq!(base64(b"abc"), "YWJj\n");
        for size in 0..200_u8 {
            let bytes: Vec<u8> = (0..size).map(|byte| byte.wrapping_mul(37)).collect();
            let text = base64(&bytes);
            assert!(text.lines().all(|line| line.len() <= 76));
            assert_eq!(from_base64(&text), Some(bytes));
        }
        for wrong in ["Y", "YQ", "YQ=", "Y===", "YQ==YQ==", "Y!==", "=", "é"] {
            assert_eq!(from_base64(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn quoted_both_ways() {
        assert_eq!(quoted(b"\0abstract"), "=00abstract");
        assert_eq!(quoted(b"a=b "), "a=3Db=20");
        for size in 0..300_usize {
            for step in [1, 7, 32, 61] {
                let bytes: Vec<u8> = (0..size).map(|place| u8::try_from(place * step % 256).unwrap()).collect();
                let text = quoted(&bytes);
                assert!(text.is_ascii());
                assert_eq!(from_quoted(&text), bytes);
            }
        }
    }
}
