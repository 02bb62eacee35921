//! JSON as text, byte for byte as crit writes it: ASCII only, a space after every colon, and after a comma where lines
//! are not broken.

use serde_json::Value;

/// Appends a value; `indent` is the number of spaces a level, or none for one line.
pub(super) fn write(value: &Value, indent: Option<usize>, out: &mut String) {
    write_at(value, indent, 0, out);
}

fn write_at(value: &Value, indent: Option<usize>, level: usize, out: &mut String) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(true) => out.push_str("true"),
        Value::Bool(false) => out.push_str("false"),
        Value::Number(number) => out.push_str(&number.to_string()),
        Value::String(text) => write_string(text, out),
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Array(items) => {
            out.push('[');
            for (place, item) in items.iter().enumerate() {
                separate(place, indent, level + 1, out);
                write_at(item, indent, level + 1, out);
            }
            break_line(indent, level, out);
            out.push(']');
        }
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Object(fields) => {
            out.push('{');
            for (place, (name, field)) in fields.iter().enumerate() {
                separate(place, indent, level + 1, out);
                write_string(name, out);
                out.push_str(": ");
                write_at(field, indent, level + 1, out);
            }
            break_line(indent, level, out);
            out.push('}');
        }
    }
}

fn separate(place: usize, indent: Option<usize>, level: usize, out: &mut String) {
    if place > 0 {
        out.push_str(if indent.is_some() { "," } else { ", " });
    }
    break_line(indent, level, out);
}

fn break_line(indent: Option<usize>, level: usize, out: &mut String) {
    if let Some(indent) = indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * level));
    }
}

fn write_string(text: &str, out: &mut String) {
    use std::fmt::Write as _;
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            ' '..='~' => out.push(character),
            _ => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    // Writing to a String cannot fail.
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_python_writes_it() {
        let value: Value =
            serde_json::from_str(r#"{"a": [1, -2, {"b": [], "c": {}}], "d": "é\u0001😀\u007f\"\n"}"#).unwrap();
        let mut line = String::new();
        write(&value, None, &mut line);
        assert_eq!(line, r#"{"a": [1, -2, {"b": [], "c": {}}], "d": "\u00e9\u0001\ud83d\ude00\u007f\"\n"}"#);
        let mut lines = String::new();
        write(&serde_json::json!({"a": [1, 2]}), Some(4), &mut lines);
        assert_eq!(lines, "{\n    \"a\": [\n        1,\n        2\n    ]\n}");
    }
}
