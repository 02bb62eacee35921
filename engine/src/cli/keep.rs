//! `list` and `prune`: which checkpoints there are, and which of them can go. What they do is in [`crate::keep`].

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::UNIX_EPOCH;

use clap::Parser;
use serde_json::{json, Value};
use tracing::error;

use super::dump::human_size;
use super::outcome::{self, printable};
use super::{parse_words, print};
use crate::error::Result;
use crate::keep::{self, prune, Checkpoint, Standing};

/// List the checkpoints in a folder and below it.
#[derive(Debug, Parser)]
#[command(name = "standstill list", bin_name = "standstill list")]
struct ListArguments {
    /// The folder: one checkpoint, or one of many.
    #[arg(value_name = "DIR", default_value = ".")]
    folder: PathBuf,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Remove the oldest checkpoints of a series, but none that others build on.
#[derive(Debug, Parser)]
#[command(name = "standstill prune", bin_name = "standstill prune")]
struct PruneArguments {
    /// The folder of the series, as `dump --every` makes it: its checkpoints are in folders called by numbers.
    #[arg(value_name = "DIR")]
    folder: PathBuf,
    /// How many whole checkpoints stay.
    #[arg(long, value_name = "N")]
    keep: std::num::NonZeroUsize,
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    dry_run: bool,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

/// Prints what a verb has found; the result is the exit code.
fn end(verb: &str, json: bool, result: Result<(Value, String)>) -> i32 {
    match result {
        Ok((facts, _)) if json => outcome::say(&outcome::done(verb, facts)),
        Ok((_, text)) => print(&text),
        Err(e) => {
            error!("{}", e.chain());
            if json {
                outcome::say(&outcome::failed(verb, &e));
            }
            return 1;
        }
    }
    0
}

/// Runs `list` with the words behind the verb.
pub fn run_list(arguments: &[OsString]) -> i32 {
    let arguments: ListArguments = match parse_words("standstill list", arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let found = keep::find(&arguments.folder);
    let shown = found.map(|all| {
        let rows: Vec<Value> = all.iter().map(as_json).collect();
        (json!({ "folder": arguments.folder, "checkpoints": rows }), table(&all))
    });
    end("list", arguments.json, shown)
}

fn seconds(found: &Checkpoint) -> Option<u64> {
    found.when.and_then(|when| when.duration_since(UNIX_EPOCH).ok()).map(|since| since.as_secs())
}

fn as_json(found: &Checkpoint) -> Value {
    json!({
        "name": found.name,
        "folder": found.folder,
        "state": found.standing.name(),
        "why": found.why,
        "when": seconds(found).map(outcome::moment),
        "root": found.root,
        "command": found.command,
        "tasks": found.tasks,
        "bytes": found.bytes,
        "parent": found.parent,
        "compressed": found.compressed,
        "gpu": found.gpu,
        "namespaces": found.namespaces,
    })
}

/// A table; what a checkpoint has not takes no room in it.
fn table(all: &[Checkpoint]) -> String {
    if all.is_empty() {
        return "no checkpoints\n".to_owned();
    }
    let mut rows: Vec<[String; 9]> =
        vec![["NAME", "STATE", "WHEN", "ROOT", "TASKS", "SIZE", "PARENT", "COMMAND", "WITH"].map(str::to_owned)];
    for found in all {
        let root = found.root.map_or_else(|| "-".to_owned(), |pid| pid.to_string());
        let tasks = found.root.map_or_else(|| "-".to_owned(), |_| found.tasks.to_string());
        let mut with: Vec<String> = Vec::new();
        with.extend(found.compressed.then(|| "compressed".to_owned()));
        with.extend(found.gpu.then(|| "gpu".to_owned()));
        with.extend((!found.namespaces.is_empty()).then(|| format!("namespaces {}", found.namespaces.join(","))));
        rows.push([
            printable(&found.name.to_string_lossy()),
            found.standing.name().to_owned(),
            seconds(found).map_or_else(|| "-".to_owned(), outcome::moment),
            root,
            tasks,
            human_size(found.bytes),
            found.parent.as_ref().map_or_else(|| "-".to_owned(), |parent| printable(&parent.to_string_lossy())),
            printable(found.command.as_deref().unwrap_or("-")),
            with.join(", "),
        ]);
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (n, cell) in row.iter().enumerate() {
            let width = rows.iter().map(|row| row[n].chars().count()).max().unwrap_or(0);
            line.push_str(&format!("{cell:width$}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    for found in all.iter().filter(|found| found.standing == Standing::Incomplete) {
        let why = found.why.as_deref().unwrap_or_default();
        text.push_str(&format!("{}: {}\n", printable(&found.name.to_string_lossy()), printable(why)));
    }
    text
}

/// Runs `prune` with the words behind the verb.
pub fn run_prune(arguments: &[OsString]) -> i32 {
    let arguments: PruneArguments = match parse_words("standstill prune", arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    end("prune", arguments.json, pruned(&arguments))
}

fn pruned(arguments: &PruneArguments) -> Result<(Value, String)> {
    let plan = prune::plan(&arguments.folder, arguments.keep.get())?;
    if !arguments.dry_run {
        prune::carry_out(&plan)?;
    }
    let bytes: u64 = plan.removed.iter().map(|found| found.bytes).sum();
    let names = |all: &[Checkpoint]| all.iter().map(|found| found.name.clone()).collect::<Vec<_>>();
    let facts = json!({
        "folder": arguments.folder,
        "dry_run": arguments.dry_run,
        "removed": names(&plan.removed),
        "kept": names(&plan.kept),
        "bytes": bytes,
    });
    let word = if arguments.dry_run { "would be removed" } else { "removed" };
    let mut text = String::new();
    for found in &plan.removed {
        let name = printable(&found.name.to_string_lossy());
        text.push_str(&format!("{name} {word} ({}, {})\n", found.standing.name(), human_size(found.bytes)));
    }
    text.push_str(&format!("{} {word}, {} stay: {}\n", plan.removed.len(), plan.kept.len(), human_size(bytes)));
    Ok((facts, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_lines_up() {
        let folder = keep::testing::scratch("list-table");
        keep::testing::fake(&folder, "1", None, true);
        keep::testing::fake(&folder, "a\u{1b}[2J", Some("../gone"), false);
        let text = table(&keep::find(&folder).unwrap());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].starts_with("NAME   STATE       WHEN"), "{text}");
        assert!(lines[1].starts_with("1      pre-dump    2"), "{text}");
        assert!(lines[2].starts_with("a?[2J  incomplete  2") && lines[2].contains("../gone"), "{text}");
        assert!(lines[3].starts_with("a?[2J: ") && lines[3].contains("parent"), "{text}");
        assert_eq!(table(&[]), "no checkpoints\n");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
