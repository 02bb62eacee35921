//! The way options are written: that of getopt_long(3), as CRIU's callers depend on it.
//!
//! Options and other words may come in any order until `--`; `-v4` and `-vvv` are one option with a joined value, so
//! `-verbosity=0` is `-v` with the value `erbosity=0`; a long option may be cut as long as it stays unique; `--x=value`
//! and `--x value` are the same where a value is required; `--no-x` turns a switch off. Messages are those of the C
//! library, without the program's name.
//!
//! Man page: getopt_long(3).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Does an option take a value?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// No.
    No,
    /// Yes: joined, or the next word.
    Required,
    /// Only if it is joined.
    Optional,
}

/// How an option can be written.
#[derive(Debug, Clone, Copy)]
pub struct Spelling {
    /// Without dashes.
    pub long: &'static str,
    /// Without a dash.
    pub short: Option<u8>,
    /// Does it take a value?
    pub arg: Arg,
    /// Can it be written with `no-`?
    pub negatable: bool,
}

/// What is wrong with the way something is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum GetoptError {
    #[error("unrecognized option '--{0}'")]
    Unknown(String),
    #[error("option '--{given}' is ambiguous; possibilities:{candidates}")]
    Ambiguous { given: String, candidates: String },
    #[error("option '--{0}' requires an argument")]
    NeedsValue(String),
    #[error("option '--{0}' doesn't allow an argument")]
    NoValueAllowed(String),
    #[error("invalid option -- '{0}'")]
    UnknownShort(char),
    #[error("option requires an argument -- '{0}'")]
    ShortNeedsValue(char),
}

/// An option that was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// Its place in the table.
    pub index: usize,
    /// False if it was written with `no-`.
    pub on: bool,
    /// Its value.
    pub value: Option<OsString>,
    /// Was it written with one dash?
    pub short: bool,
}

/// Reads words one option at a time; other words are collected on the way.
#[derive(Debug)]
pub struct Scanner<'a> {
    words: &'a [OsString],
    table: &'a [Spelling],
    next: usize,
    /// What is left of a group of short options.
    cluster: &'a [u8],
    words_only: bool,
    /// Words that are no options, in their order.
    pub rest: Vec<OsString>,
}

impl<'a> Scanner<'a> {
    /// `words` without the program's name.
    pub fn new(words: &'a [OsString], table: &'a [Spelling]) -> Self {
        Self { words, table, next: 0, cluster: &[], words_only: false, rest: Vec::new() }
    }

    fn take_word(&mut self) -> Option<&'a OsString> {
        let word = self.words.get(self.next)?;
        self.next += 1;
        Some(word)
    }

    fn short(&mut self) -> Option<Result<Given, GetoptError>> {
        let (&letter, tail) = self.cluster.split_first()?;
        self.cluster = tail;
        let Some(index) = self.table.iter().position(|s| s.short == Some(letter)) else {
            return Some(Err(GetoptError::UnknownShort(char::from(letter))));
        };
        let joined = if tail.is_empty() { None } else { Some(OsStr::from_bytes(tail).to_owned()) };
        let value = match self.table[index].arg {
            Arg::No => None,
            Arg::Optional => joined,
            Arg::Required => match joined.or_else(|| self.take_word().cloned()) {
                None => return Some(Err(GetoptError::ShortNeedsValue(char::from(letter)))),
                value => value,
            },
        };
        if self.table[index].arg != Arg::No {
            self.cluster = &[];
        }
        Some(Ok(Given { index, on: true, value, short: true }))
    }

    fn long(&mut self, word: &[u8]) -> Result<Given, GetoptError> {
        let (name, joined) = match word.iter().position(|b| *b == b'=') {
            Some(i) => (&word[..i], Some(OsString::from_vec(word[i + 1..].to_vec()))),
            None => (word, None),
        };
        let (index, on) = self.lookup(name, word)?;
        let full = || if on { self.table[index].long.to_owned() } else { format!("no-{}", self.table[index].long) };
        let value = match (self.table[index].arg, joined) {
            (Arg::No, Some(_)) => return Err(GetoptError::NoValueAllowed(full())),
            (Arg::Required, None) => {
                let full = full();
                Some(self.take_word().cloned().ok_or(GetoptError::NeedsValue(full))?)
            }
            (_, joined) => joined,
        };
        Ok(Given { index, on, value, short: false })
    }

    /// An exact name, else the only one that begins so.
    fn lookup(&self, name: &[u8], word: &[u8]) -> Result<(usize, bool), GetoptError> {
        let mut candidates = Vec::new();
        for (index, spelling) in self.table.iter().enumerate() {
            if spelling.long.as_bytes() == name {
                return Ok((index, true));
            }
            if spelling.long.as_bytes().starts_with(name) {
                candidates.push((index, true));
            }
            if spelling.negatable {
                let negated = format!("no-{}", spelling.long);
                if negated.as_bytes() == name {
                    return Ok((index, false));
                }
                if negated.as_bytes().starts_with(name) {
                    candidates.push((index, false));
                }
            }
        }
        let given = String::from_utf8_lossy(word).into_owned();
        match candidates.as_slice() {
            [] => Err(GetoptError::Unknown(given)),
            [one] => Ok(*one),
            many => Err(GetoptError::Ambiguous {
                given,
                candidates: many
                    .iter()
                    .map(|(i, on)| format!(" '--{}{}'", if *on { "" } else { "no-" }, self.table[*i].long))
                    .collect(),
            }),
        }
    }
}

impl Iterator for Scanner<'_> {
    type Item = Result<Given, GetoptError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if !self.cluster.is_empty() {
                return self.short();
            }
            let word = self.take_word()?;
            match word.as_bytes() {
                _ if self.words_only => self.rest.push(word.clone()),
                b"--" => self.words_only = true,
                [b'-', b'-', name @ ..] => return Some(self.long(name)),
                [b'-', letters @ ..] if !letters.is_empty() => self.cluster = letters,
                _ => self.rest.push(word.clone()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn spelling(long: &'static str, short: Option<u8>, arg: Arg, negatable: bool) -> Spelling {
        Spelling { long, short, arg, negatable }
    }

    const TABLE: &[Spelling] = &[
        spelling("tree", Some(b't'), Arg::Required, false),
        spelling("track-mem", None, Arg::No, true),
        spelling("verbosity", Some(b'v'), Arg::Optional, false),
        spelling("shell-job", Some(b'j'), Arg::No, true),
        spelling("tls", None, Arg::No, true),
        spelling("tls-key", None, Arg::Required, false),
    ];

    fn scan(line: &str) -> (Vec<String>, Vec<OsString>) {
        let words: Vec<OsString> = line.split(' ').filter(|w| !w.is_empty()).map(OsString::from).collect();
        let mut scanner = Scanner::new(&words, TABLE);
        let mut found = Vec::new();
        for given in scanner.by_ref() {
            match given {
                Err(e) => {
                    found.push(e.to_string());
                    break;
                }
                Ok(g) => found.push(format!(
                    "{}{}{}",
                    if g.on { "" } else { "!" },
                    TABLE[g.index].long,
                    g.value.map_or(String::new(), |v| format!("={}", v.to_string_lossy()))
                )),
            }
        }
        (found, scanner.rest)
    }

    #[test]
    fn words_and_options_in_any_order() {
        let (found, rest) = scan("-j dump -t 5 --tls-key=k --track-mem x -- -v --foo");
        assert_eq!(found, ["shell-job", "tree=5", "tls-key=k", "track-mem"]);
        assert_eq!(rest, ["dump", "x", "-v", "--foo"]);
    }

    #[test]
    fn joined_values_and_clusters() {
        assert_eq!(scan("-v4 -vvv -v -jt7").0, ["verbosity=4", "verbosity=vv", "verbosity", "shell-job", "tree=7"]);
        assert_eq!(scan("-verbosity=0").0, ["verbosity=erbosity=0"]);
        assert_eq!(scan("--verbosity=4 --verbosity 4").0, ["verbosity=4", "verbosity"]);
    }

    #[test]
    fn prefixes_and_negation() {
        assert_eq!(
            scan("--verb --tls --no-tls --no-shell --tls-k x").0,
            ["verbosity", "tls", "!tls", "!shell-job", "tls-key=x"]
        );
        assert_eq!(scan("--tr").0, ["option '--tr' is ambiguous; possibilities: '--tree' '--track-mem'"]);
    }

    #[test]
    fn messages_of_the_c_library() {
        for (line, text) in [
            ("--foo=1", "unrecognized option '--foo=1'"),
            ("-jq", "invalid option -- 'q'"),
            ("-t", "option requires an argument -- 't'"),
            ("--tre", "option '--tree' requires an argument"),
            ("--no-shell=1", "option '--no-shell-job' doesn't allow an argument"),
        ] {
            assert_eq!(scan(line).0.last().map(String::as_str), Some(text), "{line}");
        }
        assert_eq!(scan("- dump").1, ["-", "dump"]);
    }
}
