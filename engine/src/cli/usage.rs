//! The usage text, made from the table of options, and the version.

use super::getopt::Arg;
use super::table::{known, Opt, Section};
use crate::options::{refusal, Persona};
use std::fmt::Write as _;

/// The version of CRIU whose behaviour the name `criu` stands for.
pub const CRIU_VERSION: &str = "4.2";

const SECTIONS: &[(Section, &str)] = &[
    (Section::Generic, "Dump and restore"),
    (Section::External, "Things outside the tree"),
    (Section::Special, "Resources that need a word"),
    (Section::Memory, "Memory"),
    (Section::Server, "Servers"),
    (Section::Check, "Check"),
    (Section::Logging, "Logging"),
    (Section::Config, "Configuration files"),
    (Section::Ours, "Not in CRIU"),
    (Section::Other, "Other"),
];

/// What `--version` prints.
pub fn version(persona: Persona) -> String {
    let ours = env!("CARGO_PKG_VERSION");
    match persona {
        Persona::Criu => format!("Version: {CRIU_VERSION}\n"),
        Persona::Standstill => format!("Version: {ours}\nCRIU: {CRIU_VERSION}\n"),
    }
}

/// The verbs, one a line.
pub fn short(persona: Persona) -> String {
    let mut lines = vec![
        ("dump -t PID [-D DIR] [OPTIONS]", "bring a process tree to a standstill, into images"),
        ("pre-dump -t PID [-D DIR] [OPTIONS]", "take its memory while it runs, for a quicker dump"),
        ("restore [-D DIR] [OPTIONS]", "start it again"),
        ("check [--feature NAME] [OPTIONS]", "what this kernel can do"),
        ("page-server [OPTIONS]", "receive pages of a dump"),
        ("lazy-pages -D DIR [OPTIONS]", "hand out pages of a restore on demand"),
        ("service [OPTIONS]", "do all this for others, over a socket"),
        ("dedup -D DIR", "free pages that newer images replace"),
        ("cpuinfo dump|check -D DIR", "write down this CPU, or compare with it"),
    ];
    if persona == Persona::Standstill {
        lines.push(("keygen FILE", "make a key for --key-file"));
        lines.push(("untrack -t PID", "end what pre-dump left running: the tracking of memory"));
        lines.push(("image VERB ...", "look into images"));
        lines.push(("list [DIR] [--json]", "the checkpoints below a folder"));
        lines.push(("verify DIR [OPTIONS]", "is a checkpoint whole, and could this host restore it?"));
        lines.push(("prune DIR --keep N [--dry-run] [--json]", "remove the oldest of a series"));
        lines.push(("demo", "see it work, on a program of its own"));
        lines.push(("migrate", "move a running tree to a host that receives (own options, see --help)"));
        lines.push(("receive", "take trees that migrate (own options, see --help)"));
    }
    let mut text = String::from("\nUsage:\n");
    for (verb, what) in lines {
        let _ = writeln!(text, "  {} {verb:36} {what}", persona.program());
    }
    text
}

/// The last line after a mistake.
pub const HINT: &str = "\nTry -h|--help for more info\n";

/// All of it.
pub fn long(persona: Persona) -> String {
    let mut text = short(persona);
    text += "\nSwitches that are on by default, or in a configuration file, are turned off by --no-NAME.\n";
    let (opts, _) = known(persona);
    for (section, title) in SECTIONS {
        let lines: String = opts.iter().filter(|o| o.section == *section).map(|o| line(o)).collect();
        if !lines.is_empty() {
            let _ = write!(text, "\n{title}:\n{lines}");
        }
        if *section == Section::Check {
            text += &features();
        }
    }
    text
}

fn line(opt: &Opt) -> String {
    let s = &opt.spelling;
    let mut left = match s.short {
        Some(letter) => format!("  -{}|--{}", char::from(letter), s.long),
        None => format!("     --{}", s.long),
    };
    match s.arg {
        Arg::No => {}
        Arg::Required => left += &format!(" {}", opt.meta),
        Arg::Optional => left += &format!("[={}]", opt.meta),
    }
    let gap = if left.len() < 34 { String::new() } else { format!("\n{:34}", "") };
    let refused = refusal(s.long).map_or("", |_| " (not yet: refused)");
    format!("{left:34}{gap} {}{refused}\n", opt.help)
}

fn features() -> String {
    let (mut text, mut width) = (String::from("     features:"), 14);
    for name in crate::check::criu_feature_names() {
        if width + name.len() > 78 {
            (text, width) = (text + "\n               ", 15);
        }
        let _ = write!(text, " {name}");
        width += name.len() + 1;
    }
    text + "\n"
}
