//! `verify`: is a checkpoint whole, and could this host restore it? What it looks at is in [`crate::verify`].

use super::dump::human_size;
use super::metrics::Figures;
use super::outcome::{self, Run};
use super::print;
use crate::options::Options;
use crate::verify::{self, Report};
use serde_json::{json, Value};
use std::fmt::Write as _;

/// An image is missing, cut or wrong, or the folder could not be read.
pub const DAMAGED: i32 = 1;
/// All images are whole, and this host lacks something that a restore needs.
pub const LACKING: i32 = 2;

/// Looks; the result is the exit code.
pub fn run(options: &Options) -> i32 {
    let asked = Run::begin("verify", options);
    if asked.is_refused() {
        return DAMAGED;
    }
    match verify::run(options) {
        Ok(report) => {
            if options.json {
                asked.done(Figures { bytes: Some(report.bytes), ..Figures::default() }, as_json(options, &report));
            } else {
                print(&as_text(&report));
            }
            match (report.damaged.is_empty(), report.lacking.is_empty()) {
                (false, _) => DAMAGED,
                (true, false) => LACKING,
                (true, true) => 0,
            }
        }
        Err(e) => {
            asked.failed(&e);
            DAMAGED
        }
    }
}

fn as_json(options: &Options, report: &Report) -> Value {
    let damaged: Vec<Value> =
        report.damaged.iter().map(|(image, what)| json!({ "image": image, "what": what })).collect();
    json!({
        "images": options.images_dir,
        "whole": report.damaged.is_empty(),
        "pre_dump": report.pre_dump,
        "checkpoints": report.checkpoints,
        "files": report.images,
        "tasks": report.tasks,
        "damaged": damaged,
        "lacking": report.lacking,
    })
}

fn as_text(report: &Report) -> String {
    let mut text = String::new();
    for (image, all) in &report.damaged {
        for what in all {
            let _ = writeln!(text, "damaged: {image}: {what}");
        }
    }
    for what in &report.lacking {
        let _ = writeln!(text, "lacking here: {}", what.replace('\n', "; "));
    }
    let size = human_size(report.bytes);
    let parents = match report.checkpoints.saturating_sub(1) {
        0 => String::new(),
        n => format!(" (with those of {n} that it builds on)"),
    };
    let _ = write!(text, "{} images{parents}, {size}, {} processes: ", report.images, report.tasks);
    text.push_str(match (report.damaged.len(), report.lacking.len(), report.pre_dump) {
        (0, _, true) => "whole; memory alone, for a dump to build on\n",
        (0, 0, false) => "whole, and this host has all that a restore needs\n",
        (0, _, false) => "whole; this host lacks something\n",
        _ => "DAMAGED\n",
    });
    text.lines().map(|line| outcome::printable(line) + "\n").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said() {
        let mut report = Report { checkpoints: 2, images: 12, bytes: 2048, tasks: 1, ..Report::default() };
        let fine =
            "12 images (with those of 1 that it builds on), 2.0 KiB, 1 processes: whole, and this host has all that a \
                    restore needs\n";
        assert_eq!(as_text(&report), fine);
        report.lacking.push("a\nb".into());
        assert!(as_text(&report).starts_with("lacking here: a; b\n12 images"));
        report.damaged.insert("core-1.img".into(), vec!["it is \u{1b}missing".into()]);
        let text = as_text(&report);
        assert!(text.starts_with("damaged: core-1.img: it is ?missing\n") && text.ends_with("DAMAGED\n"), "{text}");
    }
}
