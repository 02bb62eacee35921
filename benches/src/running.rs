//! What is taken of a program that goes on: a snapshot, pre-dumps, and what their tracking costs the program.
//!
//! CRIU 4.2 has neither snapshots nor, where the kernel has no soft-dirty bits, pre-dumps: both are held against its whole dump
//! of the same program, which goes on after it (`--leave-running`). A round is one guest: whole dumps by all, a snapshot, three pre-dumps with one
//! page of a hundred written before each, and the dump on top of them, which is restored and checked.

use crate::guests::Guest;
use crate::machine::{warm, Dir};
use crate::programs::Program;
use crate::report::{median, Row};
use crate::rounds::{clear, command, stats, Running};
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::time::Duration;

/// Milliseconds of everything that is measured, one for each round.
#[derive(Debug, Default)]
struct Figures {
    their_dump: Vec<f64>,
    their_frozen: Vec<f64>,
    our_dump: Vec<f64>,
    snapshot: Vec<f64>,
    snapshot_frozen: Vec<f64>,
    pre_dump: Vec<f64>,
    pre_dump_frozen: Vec<f64>,
    untracked: Vec<f64>,
    tracked: Vec<f64>,
    tracked_again: Vec<f64>,
}

/// Measures it: rows, and what else is to be said.
pub(crate) fn run(
    ours: &Program,
    other: Option<&Program>,
    rounds: usize,
    dir: &Dir,
) -> Result<(Vec<Row>, Vec<String>)> {
    let mut figures = Figures::default();
    for round in 0..=rounds {
        // the first one only makes everyone warm
        let mut ignored = Figures::default();
        once(ours, other, dir.path(), if round == 0 { &mut ignored } else { &mut figures })?;
    }
    for values in figures.all() {
        values.sort_by(f64::total_cmp);
    }
    let work = Guest::Writing.title();
    let (frozen, pre_dump) = Guest::Writing.wanted();
    let rows = vec![
        Row {
            work,
            step: "snapshot, frozen",
            ours: figures.snapshot_frozen.clone(),
            theirs: figures.their_frozen.clone(),
            wanted: Some(frozen),
        },
        Row {
            work,
            step: "third pre-dump, 1% written",
            ours: figures.pre_dump.clone(),
            theirs: figures.their_dump.clone(),
            wanted: Some(pre_dump),
        },
    ];
    Ok((rows, figures.notes()))
}

impl Figures {
    fn all(&mut self) -> [&mut Vec<f64>; 10] {
        [
            &mut self.their_dump,
            &mut self.their_frozen,
            &mut self.our_dump,
            &mut self.snapshot,
            &mut self.snapshot_frozen,
            &mut self.pre_dump,
            &mut self.pre_dump_frozen,
            &mut self.untracked,
            &mut self.tracked,
            &mut self.tracked_again,
        ]
    }

    fn notes(&self) -> Vec<String> {
        let of = |values: &[f64]| median(values).unwrap_or(0.0);
        let pages = Guest::Writing.bytes() as f64 / 4096.0;
        vec![
            format!(
                "A snapshot takes {:.0} ms, of which the program stands still for {:.1} ms; our own whole dump of it, {:.0} ms.",
                of(&self.snapshot),
                of(&self.snapshot_frozen),
                of(&self.our_dump)
            ),
            format!(
                "The third pre-dump takes {:.1} ms, of which the program stands still for {:.1} ms: 1/{:.0} of our own whole dump.",
                of(&self.pre_dump),
                of(&self.pre_dump_frozen),
                of(&self.our_dump) / of(&self.pre_dump)
            ),
            format!(
                "What tracking costs the program: to write once to each page of 1 GiB takes it {:.1} ms; {:.1} ms the first time \
                 after a pre-dump ({:.2} microseconds a page more), and {:.1} ms the second time.",
                of(&self.untracked),
                of(&self.tracked),
                (of(&self.tracked) - of(&self.untracked)) * 1e3 / pages,
                of(&self.tracked_again)
            ),
        ]
    }
}

fn milliseconds(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

fn once(ours: &Program, other: Option<&Program>, dir: &Path, figures: &mut Figures) -> Result<()> {
    clear(dir)?;
    let mut guest = Running::start(Guest::Writing, dir)?;
    let pid = guest.pid.to_string();
    let content = Guest::Writing.bytes() + Guest::Writing.overhead();
    let take = |program: &Program, name: &str, verb: &str, more: &[&str]| {
        let images = dir.join(name);
        std::fs::create_dir(&images)?;
        warm(content);
        let took = command(program, &images, verb, &[&["-t", &pid], more].concat())?;
        let frozen = stats(&images).context("stats-dump")?.unwrap_or_default();
        Ok::<_, anyhow::Error>((milliseconds(took), milliseconds(frozen)))
    };
    // the tmpfs is to hold two at most
    let drop_images = |name: &str| std::fs::remove_dir_all(dir.join(name));
    if let Some(other) = other {
        let (took, frozen) = take(other, "theirs", "dump", &["--leave-running"])?;
        figures.their_dump.push(took);
        figures.their_frozen.push(frozen);
        drop_images("theirs")?;
    }
    figures.our_dump.push(take(ours, "ours", "dump", &["--leave-running"])?.0);
    drop_images("ours")?;
    let (took, frozen) = take(ours, "snapshot", "dump", &["--leave-running", "--snapshot"])?;
    figures.snapshot.push(took);
    figures.snapshot_frozen.push(frozen);
    drop_images("snapshot")?;

    guest.write(true, dir)?;
    figures.untracked.push(milliseconds(guest.write(true, dir)?));
    take(ours, "1", "pre-dump", &[])?;
    guest.write(false, dir)?;
    take(ours, "2", "pre-dump", &["--prev-images-dir", "../1"])?;
    guest.write(false, dir)?;
    let (took, frozen) = take(ours, "3", "pre-dump", &["--prev-images-dir", "../2"])?;
    figures.pre_dump.push(took);
    figures.pre_dump_frozen.push(frozen);
    figures.tracked.push(milliseconds(guest.write(true, dir)?));
    figures.tracked_again.push(milliseconds(guest.write(true, dir)?));
    take(ours, "4", "dump", &["--prev-images-dir", "../3"])?;
    guest.reap();
    ensure!(!guest.lives(), "the guest lives after its dump");
    command(ours, &dir.join("4"), "restore", &["-d"])?;
    guest.check(dir)
}
