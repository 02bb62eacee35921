//! What is restored before its memory is there (`lazy-pages`): how soon it answers, and when all has come.
//!
//! A round is a guest for each program: dumped, restored whole, asked for something that touches a few pages, dumped once more,
//! restored with `--lazy-pages` from a daemon that listens already, asked the same, and checked when the daemon has gone.

use crate::guests::Guest;
use crate::machine::{warm, Dir};
use crate::programs::Program;
use crate::report::{median, Row};
use crate::rounds::{clear, command, wait_until, Running};
use anyhow::{ensure, Context as _, Result};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Milliseconds from the start of the restore, one for each round.
#[derive(Debug, Default)]
struct Figures {
    whole: Vec<f64>,
    answer: Vec<f64>,
    all: Vec<f64>,
}

/// Measures it: rows, and what else is to be said.
pub(crate) fn run(
    ours: &Program,
    other: Option<&Program>,
    rounds: usize,
    dir: &Dir,
) -> Result<(Vec<Row>, Vec<String>)> {
    let programs: Vec<&Program> = std::iter::once(ours).chain(other).collect();
    let mut figures: Vec<Figures> = programs.iter().map(|_| Figures::default()).collect();
    for round in 0..=rounds {
        for (program, figures) in programs.iter().zip(&mut figures) {
            // the first one only makes everyone warm
            let mut ignored = Figures::default();
            let figures = if round == 0 { &mut ignored } else { figures };
            once(program, dir.path(), figures).with_context(|| program.name.clone())?;
        }
    }
    let of = |n: usize, figure: fn(&Figures) -> &Vec<f64>| {
        let mut values = figures.get(n).map(figure).cloned().unwrap_or_default();
        values.sort_by(f64::total_cmp);
        values
    };
    let row = |step, figure: fn(&Figures) -> &Vec<f64>| Row {
        work: Guest::Late.title(),
        step,
        ours: of(0, figure),
        theirs: of(1, figure),
        wanted: None,
    };
    let rows = vec![
        row("restored whole, answers", |f| &f.whole),
        row("lazy restore, answers", |f| &f.answer),
        row("lazy restore, all there", |f| &f.all),
    ];
    let middle = |figure: fn(&Figures) -> &Vec<f64>| median(&of(0, figure)).unwrap_or(0.0);
    let (whole, answer, all) = (middle(|f| &f.whole), middle(|f| &f.answer), middle(|f| &f.all));
    let note = format!(
        "With its memory later it answers after {answer:.1} ms, 1/{:.0} of the {whole:.0} ms after which it answers when it is restored whole; \
         the background brings {:.0} MiB a second.",
        whole / answer,
        1024.0 / ((all - answer) / 1e3)
    );
    Ok((rows, vec![note]))
}

fn milliseconds(began: Instant) -> f64 {
    began.elapsed().as_secs_f64() * 1e3
}

fn once(program: &Program, dir: &Path, figures: &mut Figures) -> Result<()> {
    clear(dir)?;
    let mut guest = Running::start(Guest::Late, dir)?;
    let content = Guest::Late.bytes() + Guest::Late.overhead();
    let pid = guest.pid.to_string();
    let images = dir.join("images");
    let dumped = |guest: &mut Running| {
        let _ = std::fs::remove_dir_all(&images);
        std::fs::create_dir(&images)?;
        command(program, &images, "dump", &["-t", &pid])?;
        guest.reap();
        ensure!(!guest.lives(), "the guest lives after its dump");
        warm(content);
        Ok(())
    };
    dumped(&mut guest)?;
    let began = Instant::now();
    command(program, &images, "restore", &["-d"])?;
    guest.write(false, dir)?;
    figures.whole.push(milliseconds(began));

    dumped(&mut guest)?;
    let mut daemon = Command::new(&program.path);
    daemon.args(["lazy-pages", "-D"]).arg(&images).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut daemon = daemon.spawn().context("lazy-pages")?;
    wait_until("the daemon's socket", || Ok(images.join("lazy-pages.socket").exists()), || true)?;
    // its last steps into its wait, as with guests: nothing tells of them
    std::thread::sleep(Duration::from_millis(20));
    let began = Instant::now();
    command(program, &images, "restore", &["-d", "--lazy-pages"])?;
    guest.write(false, dir)?;
    figures.answer.push(milliseconds(began));
    ensure!(daemon.wait()?.success(), "the daemon failed");
    figures.all.push(milliseconds(began));
    guest.check(dir)
}
