//! How a verb ended, for programs (`--json`): one object on standard output, the last line that is printed.
//!
//! `verb` and `result` (`done` or `failed`) are in each, the facts of the verb beside them; of a failure `error` is the chain of
//! causes, the outermost first. Errors are in the log, or on standard error, as without `--json`.

use super::print;
use crate::error::Error;
use serde_json::{json, Map, Value};

/// The object of a verb that came to its end.
pub fn done(verb: &str, facts: Value) -> Value {
    object(verb, "done", facts)
}

/// The object of a verb that did not.
pub fn failed(verb: &str, error: &Error) -> Value {
    object(verb, "failed", json!({ "error": error.links() }))
}

fn object(verb: &str, result: &str, facts: Value) -> Value {
    let mut all = Map::new();
    all.insert("verb".into(), verb.into());
    all.insert("result".into(), result.into());
    if let Value::Object(facts) = facts {
        all.extend(facts);
    }
    all.into()
}

/// Prints an object, on a line of its own.
pub fn say(object: &Value) {
    print(&format!("{object}\n"));
}

/// What comes from images and names of files does nothing to a terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// A moment, as people and programs read it: RFC 3339, UTC, whole seconds.
pub fn moment(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // days since 0000-03-01, in eras of 400 years (a leap day is the last of its year then)
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{:04}-{month:02}-{date:02}T{hour:02}:{minute:02}:{second:02}Z", era * 400 + year + next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_735_689_600, "2025-01-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(moment(seconds), text);
        }
    }

    #[test]
    fn objects() {
        let said = done("list", json!({ "folder": "x" }));
        assert_eq!(said.to_string(), r#"{"verb":"list","result":"done","folder":"x"}"#);
        let error = Error::Usage { what: "no".into() };
        assert_eq!(failed("list", &error).to_string(), r#"{"verb":"list","result":"failed","error":["no"]}"#);
    }
}
