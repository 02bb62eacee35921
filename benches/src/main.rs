//! Standstill against CRIU, on the same work, in turn.
//!
//! `cargo run --release -p standstill-benches` measures whole processes: from the start of the command `dump` or `restore`
//! to its end, with all that a caller waits for. `frozen` is what the program itself says in `stats-dump`: how long the
//! tree stood still. Every round starts a fresh guest, dumps it with one program, restores it with the same, and lets the
//! guest check itself; the programs take turns, and who begins changes every round.
//!
//! What would lie, and what is done about it:
//! - On a virtual machine the first touch of memory is slow, and freed memory goes back to the host within seconds. So
//!   what a step will need is touched and freed right before that step.
//! - CRIU keeps what it found out about the kernel only if /run is a tmpfs. So all of this runs in a mount namespace with
//!   one there. Images go to a tmpfs too, unless `--dir` says otherwise.
//! - How far all this can be trusted shows `--self`, which measures one program against itself.

mod guests;
mod machine;
mod programs;
mod rounds;

use anyhow::{bail, ensure, Context as _, Result};
use clap::Parser;
use guests::Guest;
use programs::Program;
use rounds::Sample;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Standstill against CRIU: the same work, in turn.
#[derive(Parser)]
struct Args {
    /// Rounds of each case (more for small cases, fewer for large ones, if not given)
    #[arg(long)]
    rounds: Option<usize>,
    /// Only these cases, with commas between them
    #[arg(long, value_delimiter = ',', value_parser = Guest::from_name)]
    cases: Vec<Guest>,
    /// Measure one program against itself, to see what differences mean nothing
    #[arg(long = "self")]
    against_itself: bool,
    /// Measure against this program instead of CRIU (another build, say)
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// Where images go, instead of a tmpfs
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Every figure, not medians alone
    #[arg(long)]
    all: bool,
    /// Be the program that is dumped
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "DIR"])]
    guest: Option<Vec<String>>,
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    if let Some([kind, dir]) = args.guest.as_deref() {
        return guests::run(Guest::from_name(kind)?, dir.as_ref());
    }
    ensure!(nix::unistd::geteuid().is_root(), "dumping and restoring needs root");
    let ours = programs::ours()?;
    let other = if args.against_itself {
        Some(Program { name: "itself".to_owned(), ..ours.clone() })
    } else if let Some(path) = &args.against {
        Some(Program { name: path.display().to_string(), path: path.canonicalize().context("no such program")? })
    } else {
        programs::criu()?
    };
    if other.is_none() {
        println!("No CRIU 4 or newer in $CRIU or on the PATH: these are our figures alone.\n");
    }
    let dir = machine::prepare(args.dir)?;
    println!("{}", machine::describe());
    println!(
        "ours: {}{}",
        ours.path.display(),
        other.as_ref().map_or(String::new(), |o| format!("; other: {} ({})", o.path.display(), o.name))
    );
    println!("medians of whole processes in milliseconds; frozen: how long the tree stood still\n");

    let programs: Vec<&Program> = std::iter::once(&ours).chain(&other).collect();
    let cases = if args.cases.is_empty() { Guest::ALL.to_vec() } else { args.cases };
    head(&programs);
    let mut failures = 0;
    for case in cases {
        if let Some(why) = machine::too_small_for(case) {
            println!("{:10} left out: {why}", case.name());
            continue;
        }
        let samples = rounds::run(case, &programs, args.rounds.unwrap_or(case.rounds()), &dir);
        failures += table(case, &samples, args.all);
    }
    drop(dir);
    if failures > 0 {
        bail!("{failures} rounds failed");
    }
    Ok(())
}

fn head(programs: &[&Program]) {
    let names: String = programs.iter().map(|p| format!("{:>14}", shorten(&p.name))).collect();
    println!("{:10} {:8}{names}{}", "case", "step", if programs.len() > 1 { "   ratio" } else { "" });
}

fn shorten(name: &str) -> &str {
    match name.char_indices().rev().nth(12) {
        Some((from, _)) => &name[from..],
        None => name,
    }
}

/// Prints a case; the result is the number of failed rounds.
fn table(case: Guest, samples: &[Vec<Result<Sample>>], all: bool) -> usize {
    type Figure = fn(&Sample) -> Option<Duration>;
    let figures: [(&str, Figure); 3] =
        [("dump", |s| Some(s.dump)), ("frozen", |s| s.frozen), ("restore", |s| Some(s.restore))];
    for (step, figure) in figures {
        let of = |samples: &Vec<Result<Sample>>| {
            let mut values: Vec<f64> =
                samples.iter().flatten().filter_map(figure).map(|d| d.as_secs_f64() * 1e3).collect();
            values.sort_by(f64::total_cmp);
            values
        };
        let values: Vec<Vec<f64>> = samples.iter().map(of).collect();
        let medians: Vec<Option<f64>> = values.iter().map(|v| median(v)).collect();
        let shown: String =
            medians.iter().map(|m| m.map_or(format!("{:>14}", "-"), |m| format!("{m:>14.2}"))).collect();
        let ratio = match medians.as_slice() {
            [Some(ours), Some(other)] => format!("{:>8.2}", ours / other),
            _ => String::new(),
        };
        println!("{:10} {step:8}{shown}{ratio}", case.name());
        for values in values.iter().filter(|v| all && !v.is_empty()) {
            println!("{:20}{}", "", values.iter().map(|v| format!(" {v:.2}")).collect::<String>());
        }
    }
    let failed: Vec<&anyhow::Error> = samples.iter().flatten().filter_map(|s| s.as_ref().err()).collect();
    if let Some(e) = failed.first() {
        println!("{:10} {} rounds failed; the first: {e:#}", case.name(), failed.len());
    }
    failed.len()
}

/// Of sorted values.
fn median(values: &[f64]) -> Option<f64> {
    let (upper, lower) = (values.get(values.len() / 2)?, values.get(values.len().saturating_sub(1) / 2)?);
    Some((upper + lower) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
    }

    #[test]
    fn the_end_of_a_name() {
        assert_eq!(shorten("CRIU 4.2"), "CRIU 4.2");
        assert_eq!(shorten("/somewhere/else/criu"), "ere/else/criu");
    }
}
