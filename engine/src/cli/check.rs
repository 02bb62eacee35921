//! `check`: under the name `criu` the words and exit codes of CRIU 4.2, else a table that says what a lack costs.

use super::print;
use crate::check::{self, Category, Complaint, Feature, Lack, Line};
use crate::options::{Options, Persona};
use std::fmt::Write as _;
use tracing::{error, warn};

/// Looks; zero if all is there that has to be.
pub fn run(options: &Options) -> i32 {
    match (options.personality, &options.check_feature) {
        (Persona::Criu, None) => as_criu(options),
        (Persona::Standstill, None) => as_table(&check::report(), options.json),
        (persona, Some(name)) => one(persona, name, options.json),
    }
}

fn one(persona: Persona, name: &str, json: bool) -> i32 {
    if persona == Persona::Standstill && name == "list" {
        for feature in check::FEATURES {
            print(&format!("{}\n", feature.name));
        }
        return 0;
    }
    match check::feature(name).filter(|f| persona == Persona::Standstill || f.named_by_criu) {
        None => {
            error!("Unknown feature {name}");
            1
        }
        Some(feature) => {
            let found = ask(persona, feature);
            match (found, json) {
                (found, true) => return as_table(&[Line { feature, found }], true),
                (Ok(()), false) => print(&format!("{name} is supported\n")),
                (Err(lack), false) => {
                    complain(feature, lack);
                    if persona == Persona::Standstill {
                        error!("{name} is missing ({}): {}; {}", lack.reason(), feature.cost, remedy(feature, lack));
                    }
                }
            }
            i32::from(found.is_err())
        }
    }
}

/// CRIU takes raw sockets for supported where the kernel only says that it has no such module.
fn ask(persona: Persona, feature: &Feature) -> check::Found {
    match (feature.probe)() {
        Err(Lack(nix::errno::Errno::ENOENT)) if persona == Persona::Criu && feature.name == "net_diag_raw" => Ok(()),
        found => found,
    }
}

fn complain(feature: &Feature, lack: Lack) {
    match feature.complaint {
        Complaint::Silent => {}
        Complaint::Warn(text) => warn!("{text}"),
        Complaint::Error(text) => error!("{text}"),
        Complaint::ErrorReason(text) => error!("{text}: {}", lack.0.desc()),
        Complaint::Message(text) => print(&format!("{text}\n")),
    }
}

fn as_criu(options: &Options) -> i32 {
    let of = |category: Category| check::FEATURES.iter().filter(move |f| f.category == category);
    for feature in of(Category::Required) {
        if let Err(lack) = ask(Persona::Criu, feature) {
            complain(feature, lack);
            warn!("Does not look good.");
            return 1;
        }
    }
    let mut missing = false;
    let mut look = |feature: &Feature| {
        if let Err(lack) = ask(Persona::Criu, feature) {
            complain(feature, lack);
            missing |= feature.category != Category::Optional;
        }
    };
    if options.check_extra {
        of(Category::Extra).for_each(&mut look);
    }
    if options.check_experimental {
        of(Category::Experimental).for_each(&mut look);
    }
    of(Category::Optional).for_each(&mut look);
    if missing {
        print("Looks good but some kernel features are missing\n");
        print("which, depending on your process tree, may cause\n");
        print("dump or restore failure.\n");
    } else {
        print("Looks good.\n");
    }
    i32::from(missing)
}

/// Where the kernel only forbids it, root comes first.
fn remedy(feature: &Feature, lack: Lack) -> String {
    match lack.0 {
        nix::errno::Errno::EPERM | nix::errno::Errno::EACCES => format!("root; or {}", feature.remedy),
        _ => feature.remedy.to_owned(),
    }
}

fn as_table(lines: &[Line], json: bool) -> i32 {
    let missing = |l: &&Line| l.found.is_err();
    let fatal = lines.iter().filter(missing).any(|l| l.feature.category == Category::Required);
    if json {
        let rows: Vec<_> = lines
            .iter()
            .map(|l| {
                serde_json::json!({
                    "feature": l.feature.name,
                    "required": l.feature.category == Category::Required,
                    "found": l.found.is_ok(),
                    "reason": l.found.err().map(Lack::reason),
                    "cost": l.feature.cost,
                    "remedy": l.found.map_or_else(|lack| remedy(l.feature, lack), |()| l.feature.remedy.to_owned()),
                })
            })
            .collect();
        print(&format!("{}\n", serde_json::Value::Array(rows)));
        return i32::from(fatal || (lines.len() == 1 && lines[0].found.is_err()));
    }
    let mut text = format!("{:26}{:7}WITHOUT IT, THIS IS LOST\n", "FEATURE", "FOUND");
    for l in lines {
        let _ =
            writeln!(text, "{:26}{:7}{}", l.feature.name, if l.found.is_ok() { "yes" } else { "NO" }, l.feature.cost);
        if let Err(lack) = l.found {
            let _ = writeln!(text, "{:33}({}) needs: {}", "", lack.reason(), remedy(l.feature, lack));
        }
    }
    let count = lines.iter().filter(missing).count();
    let _ = match (count, fatal) {
        (0, _) => writeln!(text, "All {} features are there.", lines.len()),
        (n, false) => writeln!(text, "{n} of {} features are missing; none that every program needs.", lines.len()),
        (n, true) => writeln!(text, "{n} of {} features are missing, some that every program needs.", lines.len()),
    };
    // asked only where there may be some: the driver's libraries are loaded for it
    let cuda = lines.iter().any(|l| l.feature.name == "cuda" && l.found.is_ok());
    for gpu in cuda.then(standstill_gpu::Management::load).flatten().and_then(|m| m.gpus()).unwrap_or_default() {
        let _ = writeln!(text, "GPU {} {}: {} MiB, {} MiB free", gpu.uuid, gpu.name, gpu.total >> 20, gpu.free >> 20);
    }
    print(&text);
    i32::from(fatal)
}
