//! Two checkpoints of one program that only waited in between: they say the same, but for `EXCEPTIONS`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use base64::engine::general_purpose::STANDARD;
use base64::Engine as _;
use serde_json::Value;
use standstill_images::json::{self, Style};
use standstill_images::ImageKind;

/// What may differ: the beginning of an image's name, the end of a field's path (empty: all fields), and why.
const EXCEPTIONS: &[(&str, &str, &str)] = &[
    ("stats", "", "how long it took"),
    ("pages", "", "the program ran in between, on its stack"),
    ("pagemap", "", "the program ran in between, on its stack"),
    ("timens", "", "clocks went on"),
    ("inventory", "dump_criu_run_id", "a name of this one dump"),
    ("inventory", "dump_uptime", "clocks went on"),
    ("inventory", "standstill_images", "the images themselves are compared"),
    ("core", "gpregs", "the program ran in between"),
    ("core", "fpregs", "the program ran in between"),
    ("core", "tc.flags", "the kernel's flags of a task: a restored one was cloned and has not called exec"),
    ("core", "vusec", "timers went on"),
    ("core", "vsec", "timers went on"),
    ("core", "vnsec", "timers went on"),
    ("core", "overrun", "timers went on"),
    ("files", "tfd.vsec", "timers went on"),
    ("files", "tfd.vnsec", "timers went on"),
    ("files", "tfd.ticks", "timers went on"),
    ("files", "standstill_peer.pid", "the id of one that is gone may be somebody else's by now"),
    ("ids", "time_ns_id", "a plain restore enters a time namespace of its own, so that clocks go on"),
    ("ids", "cgroup_ns_id", "numbers of namespaces: that of time comes before it"),
    ("ipcns-shm", "standstill_changed", "it was made again"),
    ("ipcns-shm", "standstill_creator", "it was made again, by whoever restores"),
    ("ghost-file", "atim.tv_sec", "it was read for the dump"),
    ("ghost-file", "atim.tv_usec", "it was read for the dump"),
];

/// O_TMPFILE without O_DIRECTORY: how a file was made, which is not what it is.
const HOW_IT_WAS_MADE: u64 = 0o20_000_000 | 0o200_000;

/// Fields that hold numbers which only say what is the same as what: kernels and dumps choose them anew. They are compared
/// by the order in which they are first seen.
const NUMBERS: &[&[&str]] = &[&["pipe_id"], &["shmid"], &["ino", "peer", "inode"]];

/// What differs, one line each, but for what has a reason to.
pub fn checkpoints(first: &Path, second: &Path) -> Vec<String> {
    let (first, second) = (Checkpoint::read(first), Checkpoint::read(second));
    let mut all = Vec::new();
    let files: BTreeSet<&String> = first.0.keys().chain(second.0.keys()).collect();
    for file in files {
        match (first.0.get(file), second.0.get(file)) {
            (Some(a), Some(b)) => differences(file, "", a, b, &mut all),
            (Some(_), None) => all.push(format!("{file} is in the first one only")),
            (None, Some(_)) => all.push(format!("{file} is in the second one only")),
            (None, None) => {}
        }
    }
    all
}

/// Images by name.
struct Checkpoint(BTreeMap<String, Value>);

impl Checkpoint {
    fn read(folder: &Path) -> Checkpoint {
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let Some((kind, _)) = ImageKind::from_file_name(&name) else { continue };
            if kind.is_raw() || excepted(&name, "") {
                continue;
            }
            let bytes = fs::read(entry.path()).unwrap_or_else(|e| panic!("{name}: {e}"));
            let value = json::decode(&name, &bytes, Style { pretty: false, payload: true });
            let value = value.unwrap_or_else(|e| panic!("{name}: {e}"));
            all.insert(name, value);
        }
        assert!(!all.is_empty(), "no images in {}", folder.display());
        let mut seen = vec![BTreeMap::new(); NUMBERS.len()];
        for value in all.values_mut() {
            settle(value);
            rename(value, &mut seen);
        }
        Checkpoint(all)
    }
}

/// Gives one form to what can be said in several.
fn settle(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                match (key.as_str(), &mut *value) {
                    // the kernel lists them by where they lie in its memory
                    ("tfd", Value::Array(watches)) => {
                        watches.sort_by_key(|w| w["tfd"].as_u64());
                        for watch in watches {
                            // errors and hang-ups: asked for or not, but that a spent one-shot waits for nothing, until it
                            // is added again
                            watch["events"] = (watch["events"].as_u64().unwrap_or(0) | 0x18).into();
                        }
                    }
                    // two areas, or one that is as long as both: nobody can tell
                    ("vmas", Value::Array(areas)) => join(areas),
                    // hierarchies of other programs come and go
                    ("ctls", Value::Array(members)) => {
                        members.retain(|m| m["name"].as_str().is_some_and(of_a_guest));
                    }
                    ("controllers", Value::Array(all)) => {
                        all.retain(|c| c["cnames"][0].as_str().is_some_and(of_a_guest));
                    }
                    ("name", Value::String(name)) => *name = unnamed(name),
                    ("flags", Value::Number(n)) => {
                        let flags = n.as_u64().unwrap_or(0);
                        if flags & HOW_IT_WAS_MADE == HOW_IT_WAS_MADE {
                            *value = (flags & !HOW_IT_WAS_MADE).into();
                        }
                    }
                    _ => {}
                }
                settle(value);
            }
            // a timer may just be over at one of the two: its signal waits in that image
            if let Some(Value::Array(signals)) = fields.get_mut("signals") {
                signals.retain(|s| !from_a_timer(s));
            }
            fields.retain(|key, value| key != "signals" || *value != Value::Array(Vec::new()));
        }
        Value::Array(values) => values.iter_mut().for_each(settle),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Whether a hierarchy of cgroups is one that a guest made.
fn of_a_guest(name: &str) -> bool {
    name.starts_with("name=standstill-guest-")
}

/// Whether a waiting signal is what a timer sends: SI_TIMER, or SIGALRM from the kernel.
fn from_a_timer(signal: &Value) -> bool {
    let text: String = signal["siginfo"].as_str().unwrap_or_default().split_whitespace().collect();
    let Ok(bytes) = STANDARD.decode(text) else { return false };
    let int = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, i32::from_ne_bytes);
    let (number, code) = (int(0), int(8));
    code == libc::SI_TIMER || (number == libc::SIGALRM && code == libc::SI_KERNEL)
}

/// A file that has lost its name: its last one may have got an ending that nobody else uses, and the kernel makes up one
/// (#INODE) for a file that never had any.
fn unnamed(name: &str) -> String {
    let name = name.strip_suffix(".cr_link").unwrap_or(name);
    match name.rsplit_once("/#") {
        Some((folder, number)) if number.bytes().all(|b| b.is_ascii_digit()) => format!("{folder}/#"),
        _ => name.to_owned(),
    }
}

/// Joins private areas without a file that lie side by side and differ in nothing else.
fn join(areas: &mut Vec<Value>) {
    let rest = |area: &Value| {
        let mut area = area.clone();
        area["start"] = Value::Null;
        area["end"] = Value::Null;
        area
    };
    let mut joined: Vec<Value> = Vec::new();
    for area in areas.drain(..) {
        match joined.last_mut() {
            Some(last) if last["end"] == area["start"] && area["shmid"] == 0 && rest(last) == rest(&area) => {
                last["end"] = area["end"].clone();
            }
            _ => joined.push(area),
        }
    }
    *areas = joined;
}

/// Gives new numbers to what `NUMBERS` lists.
fn rename(value: &mut Value, seen: &mut [BTreeMap<u64, u64>]) {
    match value {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                match (NUMBERS.iter().position(|names| names.contains(&key.as_str())), value.as_u64()) {
                    (Some(kind), Some(number)) if number != 0 => {
                        let next = seen[kind].len() as u64 + 1;
                        *value = (*seen[kind].entry(number).or_insert(next)).into();
                    }
                    _ => rename(value, seen),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|v| rename(v, seen)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn excepted(file: &str, path: &str) -> bool {
    EXCEPTIONS.iter().any(|(image, field, _)| file.starts_with(image) && (field.is_empty() || path.ends_with(field)))
}

fn differences(file: &str, path: &str, a: &Value, b: &Value, all: &mut Vec<String>) {
    if excepted(file, path) || a == b {
        return;
    }
    match (a, b) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            for key in keys {
                let null = Value::Null;
                let (a, b) = (a.get(key).unwrap_or(&null), b.get(key).unwrap_or(&null));
                differences(file, &format!("{path}.{key}"), a, b, all);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (a, b)) in a.iter().zip(b).enumerate() {
                differences(file, &format!("{path}[{n}]"), a, b, all);
            }
        }
        _ => all.push(format!("{file} {path}: {} / {}", short(a), short(b))),
    }
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((n, _)) => format!("{}…", &text[..n]),
        None => text,
    }
}
