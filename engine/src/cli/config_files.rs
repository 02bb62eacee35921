//! Configuration files: options, one a line, without their dashes.
//!
//! Read in this order, later ones win: /etc/criu/default.conf, $HOME/.criu/default.conf, the file that $CRIU_CONFIG_FILE
//! names, the file of --config; then the command line or RPC. --config and --no-default-config keep the first two out.
//! A line is an option, then, if it takes one, its value: a word, or anything in double quotes with `\"` for a quote.
//! `#` begins a comment.
//!
//! Man page: criu(8), "Configuration files".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// A file whose lines cannot be read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ConfigError {
    #[error("{path}:{line}: Unsupported configuration file format. Please consult man page criu(8)")]
    Format { path: String, line: usize },
    #[error("Can't read configuration file {path}")]
    Read { path: String, source: std::io::Error },
}

/// What the command line says about configuration files.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Choice {
    /// --config.
    pub file: Option<PathBuf>,
    /// --no-default-config.
    pub no_default: bool,
}

/// The files to read, in order, each with whether the caller named it.
pub fn files(choice: &Choice, env: impl Fn(&str) -> Option<OsString>) -> Vec<(PathBuf, bool)> {
    let mut files = Vec::new();
    if !choice.no_default && choice.file.is_none() {
        files.push((PathBuf::from("/etc/criu/default.conf"), false));
        match env("HOME") {
            Some(home) => files.push((Path::new(&home).join(".criu/default.conf"), false)),
            None => {
                tracing::info!("Unable to get $HOME directory, local configuration file will not be used.");
            }
        }
    }
    files.extend(env("CRIU_CONFIG_FILE").map(|f| (PathBuf::from(f), false)));
    files.extend(choice.file.clone().map(|f| (f, true)));
    files
}

/// The words that a file stands for.
pub fn read(path: &Path) -> Result<Vec<OsString>, ConfigError> {
    let name = || path.display().to_string();
    let bytes = std::fs::read(path).map_err(|source| ConfigError::Read { path: name(), source })?;
    tracing::debug!("Parsing config file {}", path.display());
    let mut words = Vec::new();
    for (i, line) in bytes.split(|b| *b == b'\n').enumerate() {
        words.extend(statement(line).ok_or_else(|| ConfigError::Format { path: name(), line: i + 1 })?);
    }
    Ok(words)
}

/// No, one or two words; `None` if the line makes no sense.
fn statement(line: &[u8]) -> Option<Vec<OsString>> {
    let line = line.trim_ascii();
    if line.is_empty() || line[0] == b'#' {
        return Some(Vec::new());
    }
    let end = line.iter().position(u8::is_ascii_whitespace).unwrap_or(line.len());
    let mut option = OsString::from("--");
    option.push(OsStr::from_bytes(&line[..end]));
    let rest = line[end..].trim_ascii_start();
    match rest {
        [] | [b'#', ..] => Some(vec![option]),
        [b'"', quoted @ ..] => Some(vec![option, quoted_value(quoted)?]),
        _ => {
            let value = rest.split(|b| *b == b'#').next()?.trim_ascii_end();
            if value.contains(&b' ') {
                return None;
            }
            Some(vec![option, unescape(value)])
        }
    }
}

fn quoted_value(text: &[u8]) -> Option<OsString> {
    let end = (0..text.len()).find(|i| text[*i] == b'"' && (*i == 0 || text[*i - 1] != b'\\'))?;
    match text[end + 1..].trim_ascii_start() {
        [] | [b'#', ..] => Some(unescape(&text[..end])),
        _ => None,
    }
}

fn unescape(text: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(text.len());
    for (i, b) in text.iter().enumerate() {
        if *b != b'\\' || text.get(i + 1) != Some(&b'"') {
            out.push(*b);
        }
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Option<Vec<String>> {
        statement(line.as_bytes()).map(|w| w.into_iter().map(|w| w.to_string_lossy().into_owned()).collect())
    }

    #[test]
    fn lines() {
        let some = |w: &[&str]| Some(w.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>());
        assert_eq!(words(""), some(&[]));
        assert_eq!(words("  # all comment"), some(&[]));
        assert_eq!(words("tcp-established"), some(&["--tcp-established"]));
        assert_eq!(words("no-restore-sibling   # why"), some(&["--no-restore-sibling"]));
        assert_eq!(words("\tverbosity 4 "), some(&["--verbosity", "4"]));
        assert_eq!(words("work-dir\t/tmp # here"), some(&["--work-dir", "/tmp"]));
        assert_eq!(words("lsm-profile \"\" # none"), some(&["--lsm-profile", ""]));
        assert_eq!(words("lsm-profile \"something\"# c"), some(&["--lsm-profile", "something"]));
        assert_eq!(words("work-dir \"/a dir/with \\\"q\\\"\""), some(&["--work-dir", "/a dir/with \"q\""]));
        assert_eq!(words("a b c d"), None);
        assert_eq!(words("work-dir \"/a\" more"), None);
        assert_eq!(words("work-dir \"/a"), None);
        assert_eq!(words("work-dir \""), None);
    }

    #[test]
    fn order_of_files() {
        let env = |name: &str| match name {
            "HOME" => Some(OsString::from("/h")),
            "CRIU_CONFIG_FILE" => Some(OsString::from("/e")),
            _ => None,
        };
        let paths = |choice: Choice| -> Vec<String> {
            files(&choice, env).into_iter().map(|(p, _)| p.display().to_string()).collect()
        };
        assert_eq!(paths(Choice::default()), ["/etc/criu/default.conf", "/h/.criu/default.conf", "/e"]);
        assert_eq!(paths(Choice { file: None, no_default: true }), ["/e"]);
        assert_eq!(paths(Choice { file: Some("/c".into()), no_default: false }), ["/e", "/c"]);
    }
}
