//! Two checkpoints of one program that only waited in between: they say the same, but for [`EXCEPTIONS`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

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
    ("core", "gpregs", "the program ran in between"),
    ("core", "fpregs", "the program ran in between"),
];

/// Fields that hold numbers which only say what is the same as what: kernels and dumps choose them anew. They are compared
/// by the order in which they are first seen.
const NAMES: &[&str] = &[];

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
        Checkpoint(all)
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
