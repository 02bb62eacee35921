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
mod late;
mod machine;
mod programs;
mod report;
mod rounds;
mod running;

use anyhow::{bail, ensure, Context as _, Result};
use clap::Parser;
use guests::Guest;
use programs::Program;
use report::{median, Row, Run};
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
    /// Run everything with real-time priority, guests too, so that other programs on the machine count less
    #[arg(long)]
    realtime: bool,
    /// Every figure, not medians alone
    #[arg(long)]
    all: bool,
    /// Write RESULTS.md and results.svg into this folder
    #[arg(long, value_name = "FOLDER")]
    report: Option<PathBuf>,
    /// Be the program that is dumped
    #[arg(long, hide = true, num_args = 2, value_names = ["KIND", "DIR"])]
    guest: Option<Vec<String>>,
}

/// Measures something with words of its own: rows, and these.
type Measure = fn(&Program, Option<&Program>, usize, &machine::Dir) -> Result<(Vec<Row>, Vec<String>)>;

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
    if args.realtime {
        machine::realtime().context("sched_setscheduler")?;
    }
    let before = machine::load();
    println!("{}", machine::describe());
    println!(
        "ours: {}{}",
        ours.path.display(),
        other.as_ref().map_or(String::new(), |o| format!("; other: {} ({})", o.path.display(), o.name))
    );
    println!("medians of whole processes in milliseconds; frozen: how long the tree stood still\n");

    let programs: Vec<&Program> = std::iter::once(&ours).chain(&other).collect();
    let cases = if args.cases.is_empty() { Guest::ALL.to_vec() } else { args.cases };
    println!("{:20} {:26}{:>14}{:>14}   ratio (of the best)", "work", "step", shorten(&ours.name), name_of(&other));
    let mut rows = Vec::new();
    let mut notes = Vec::new();
    let mut failures = 0;
    for case in cases {
        if let Some(why) = machine::too_small_for(case) {
            println!("{:20} left out: {why}", case.title());
            continue;
        }
        let with_words = match case {
            Guest::Writing => Some(running::run as Measure),
            Guest::Late => Some(late::run as Measure),
            _ => None,
        };
        if let Some(run) = with_words {
            match run(&ours, other.as_ref(), args.rounds.unwrap_or(case.rounds()), &dir) {
                Ok((measured, said)) => {
                    print_rows(&measured, args.all);
                    said.iter().for_each(|line| println!("{:20} {line}", case.title()));
                    rows.extend(measured);
                    notes.extend(said);
                }
                Err(e) => {
                    println!("{:20} {e:#}", case.title());
                    failures += 1;
                }
            }
            continue;
        }
        let samples = rounds::run(case, &programs, args.rounds.unwrap_or(case.rounds()), &dir);
        let measured = rows_of(case, &samples);
        print_rows(&measured, args.all);
        rows.extend(measured);
        failures += failed(case, &samples);
    }
    drop(dir);
    if let Some(folder) = &args.report {
        let run = Run {
            machine: machine::describe(),
            command: command_line(),
            load: (before, machine::load()),
            other: other.as_ref().map_or("nobody".to_owned(), |o| o.name.clone()),
            notes,
        };
        report::write(folder, &run, &rows)?;
    }
    if failures > 0 {
        bail!("{failures} rounds failed");
    }
    Ok(())
}

/// How to measure this once more, without the paths of this machine.
fn command_line() -> String {
    let args: Vec<String> = std::env::args().skip(1).collect();
    format!("CRIU=criu cargo run --release -p standstill-benches -- {}", args.join(" "))
}

fn name_of(program: &Option<Program>) -> &str {
    program.as_ref().map_or("", |p| shorten(&p.name))
}

fn shorten(name: &str) -> &str {
    match name.char_indices().rev().nth(12) {
        Some((from, _)) => &name[from..],
        None => name,
    }
}

/// What the rounds of a case say.
fn rows_of(case: Guest, samples: &[Vec<Result<Sample>>]) -> Vec<Row> {
    type Figure = fn(&Sample) -> Option<Duration>;
    let (dump, restore) = case.wanted();
    let figures: [(&str, Figure, Option<f64>); 3] = [
        ("dump", |s| Some(s.dump), Some(dump)),
        ("frozen", |s| s.frozen, None),
        ("restore", |s| Some(s.restore), Some(restore)),
    ];
    let of = |n: usize, figure: Figure| {
        let samples = samples.get(n).into_iter().flatten().flatten();
        let mut values: Vec<f64> = samples.filter_map(figure).map(|d| d.as_secs_f64() * 1e3).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let row =
        |(step, figure, wanted)| Row { work: case.title(), step, ours: of(0, figure), theirs: of(1, figure), wanted };
    figures.into_iter().map(row).collect()
}

fn print_rows(rows: &[Row], all: bool) {
    let number = |v: Option<f64>| v.map_or("-".to_owned(), |v| format!("{v:.2}"));
    for r in rows {
        let ratios = r.ratio().zip(r.ratio_of_best());
        println!(
            "{:20} {:26}{:>14}{:>14}{}",
            r.work,
            r.step,
            number(median(&r.ours)),
            number(median(&r.theirs)),
            ratios.map_or(String::new(), |(m, best)| format!("{m:>8.2} ({best:.2})"))
        );
        for values in [&r.ours, &r.theirs].into_iter().filter(|v| all && !v.is_empty()) {
            println!("{:46}{}", "", values.iter().map(|v| format!(" {v:.2}")).collect::<String>());
        }
    }
}

/// How many rounds failed, and why the first one did.
fn failed(case: Guest, samples: &[Vec<Result<Sample>>]) -> usize {
    let failed: Vec<&anyhow::Error> = samples.iter().flatten().filter_map(|s| s.as_ref().err()).collect();
    if let Some(e) = failed.first() {
        println!("{:20} {} rounds failed; the first: {e:#}", case.title(), failed.len());
    }
    failed.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_name() {
        assert_eq!(shorten("CRIU 4.2"), "CRIU 4.2");
        assert_eq!(shorten("/somewhere/else/criu"), "ere/else/criu");
    }
}
