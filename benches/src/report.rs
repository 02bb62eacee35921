//! What was measured, as a table on the terminal, as `RESULTS.md`, and drawn as `results.svg`.
//!
//! A [`Row`] is one thing that was measured of both programs.

use anyhow::{Context as _, Result};
use std::fmt::Write as _;
use std::path::Path;

/// What is below this line in `RESULTS.md` was written by hand, and is kept.
const KEPT: &str = "<!-- written by hand from here on; the bench program keeps it -->";

/// One thing that both programs did.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// The work.
    pub(crate) work: &'static str,
    /// Which part of it.
    pub(crate) step: &'static str,
    /// Milliseconds, sorted.
    pub(crate) ours: Vec<f64>,
    /// The other program's, sorted.
    pub(crate) theirs: Vec<f64>,
    /// The ratio that is aimed at.
    pub(crate) wanted: Option<f64>,
}

impl Row {
    /// Theirs over ours, by medians: above 1 we are faster.
    pub(crate) fn ratio(&self) -> Option<f64> {
        Some(median(&self.theirs)? / median(&self.ours)?)
    }

    /// The same by the best of each, which noise does not reach.
    pub(crate) fn ratio_of_best(&self) -> Option<f64> {
        Some(self.theirs.first()? / self.ours.first()?)
    }
}

/// What a reader needs to know of the run.
#[derive(Debug)]
pub(crate) struct Run {
    /// Kernel, processors, memory.
    pub(crate) machine: String,
    /// How it was started.
    pub(crate) command: String,
    /// What else ran, before and after.
    pub(crate) load: (f64, f64),
    /// The other program.
    pub(crate) other: String,
    /// What is to be said besides.
    pub(crate) notes: Vec<String>,
}

/// Of sorted values.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let (upper, lower) = (values.get(values.len() / 2)?, values.get(values.len().saturating_sub(1) / 2)?);
    Some((upper + lower) / 2.0)
}

/// Writes `RESULTS.md` and `results.svg` into a folder.
pub(crate) fn write(folder: &Path, run: &Run, rows: &[Row]) -> Result<()> {
    let path = folder.join("RESULTS.md");
    let old = std::fs::read_to_string(&path).unwrap_or_default();
    let kept = old.split_once(KEPT).map_or("\n", |(_, kept)| kept);
    let text = format!("{}\n{KEPT}{kept}", table(run, rows));
    std::fs::write(&path, text).with_context(|| path.display().to_string())?;
    let path = folder.join("results.svg");
    std::fs::write(&path, drawing(run, rows)).with_context(|| path.display().to_string())
}

fn table(run: &Run, rows: &[Row]) -> String {
    let other = &run.other;
    let mut text = String::from("# Results\n\n");
    let _ = writeln!(text, "![theirs over ours](results.svg)\n");
    let _ = writeln!(text, "- Machine: {}.", run.machine);
    let _ = writeln!(text, "- Command: `{}`", run.command);
    let _ = writeln!(text, "- Load average before and after: {:.1} and {:.1}.{}", run.load.0, run.load.1, busy(run));
    let _ = writeln!(
        text,
        "- Times are milliseconds of whole commands, medians, with the best in parentheses; `frozen` is how long the\n  \
         tree stood still. A ratio is theirs over ours: above 1, Standstill is faster. Every restored program checked\n  \
         its memory, threads and children in every round.\n"
    );
    let _ = writeln!(text, "| work | step | {other} | Standstill | ratio | ratio of the best | wanted | rounds |");
    let _ = writeln!(text, "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    let number = |v: Option<f64>| v.map_or(String::new(), |v| format!("{v:.2}"));
    let times = |v: &[f64]| match (median(v), v.first()) {
        (Some(m), Some(best)) => format!("{m:.1} ({best:.1})"),
        _ => "-".to_owned(),
    };
    for r in rows {
        let (theirs, ours) = (times(&r.theirs), times(&r.ours));
        let (ratio, best, wanted) = (number(r.ratio()), number(r.ratio_of_best()), number(r.wanted));
        let rounds = r.ours.len().min(r.theirs.len());
        let _ =
            writeln!(text, "| {} | {} | {theirs} | {ours} | {ratio} | {best} | {wanted} | {rounds} |", r.work, r.step);
    }
    if !run.notes.is_empty() {
        text.push('\n');
    }
    for note in &run.notes {
        let _ = writeln!(text, "- {note}");
    }
    text
}

/// Said where a reader should not trust the last digit.
fn busy(run: &Run) -> &'static str {
    if run.load.0.max(run.load.1) > 1.5 {
        " Other programs ran meanwhile: trust the best more than the medians."
    } else {
        ""
    }
}

/// A bar for each ratio, a line where both are equal, a mark at what is aimed at.
fn drawing(run: &Run, rows: &[Row]) -> String {
    const LEFT: f64 = 230.0;
    const WIDTH: f64 = 480.0;
    const STEP: f64 = 26.0;
    const TOP: f64 = 58.0;
    let rows: Vec<(&Row, f64)> = rows.iter().filter_map(|r| Some((r, r.ratio()?))).collect();
    let largest = rows.iter().fold(2.0, |l: f64, (r, ratio)| l.max(*ratio).max(r.wanted.unwrap_or(0.0)));
    let x = |ratio: f64| LEFT + ratio / largest * WIDTH;
    let height = TOP + STEP * rows.len() as f64 + 34.0;
    let bottom = TOP + STEP * rows.len() as f64;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 900 {height:.0}\" font-family=\"sans-serif\" \
         font-size=\"13\">\n<rect width=\"900\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"17\">Times faster than {}</text>\n\
         <text x=\"16\" y=\"44\" fill=\"#666666\">time of {} over time of Standstill, medians of whole commands; \
         a dark mark is what is aimed at</text>\n",
        escape(&run.other),
        escape(&run.other)
    );
    for (n, (r, ratio)) in rows.iter().enumerate() {
        let y = TOP + STEP * n as f64;
        let colour = match r.step {
            "dump" | "third pre-dump, 1% written" => "#3b6ea8",
            "restore" => "#4f9d69",
            _ => "#b9a24a",
        };
        let ours = median(&r.ours).unwrap_or(0.0);
        let _ = writeln!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}, {}</text>\n\
             <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"17\" fill=\"{colour}\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\">{ratio:.1}  ({ours:.1} ms)</text>",
            LEFT - 8.0,
            y + 15.0,
            escape(r.work),
            r.step,
            y + 2.0,
            ratio / largest * WIDTH,
            x(ratio.max(r.wanted.unwrap_or(0.0))) + 8.0,
            y + 15.0,
        );
        if let Some(wanted) = r.wanted {
            let at = x(wanted);
            let (from, to) = (y, y + 21.0);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{from:.1}\" y2=\"{to:.1}\" stroke=\"#222222\" \
                 stroke-width=\"2\"/>"
            );
        }
    }
    let one = x(1.0);
    let _ = writeln!(
        svg,
        "<line x1=\"{one:.1}\" x2=\"{one:.1}\" y1=\"{TOP}\" y2=\"{bottom:.1}\" stroke=\"#aa3333\" \
         stroke-dasharray=\"4 3\"/>\n<text x=\"{one:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#aa3333\">1: as \
         fast</text>\n</svg>",
        bottom + 18.0
    );
    svg
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row() -> Row {
        Row { work: "small <1 MiB>", step: "dump", ours: vec![1.0, 2.0], theirs: vec![6.0, 9.0], wanted: Some(6.0) }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[1.0, 2.0]), Some(1.5));
        assert_eq!(median(&[1.0, 2.0, 9.0]), Some(2.0));
    }

    #[test]
    fn a_ratio_is_theirs_over_ours() {
        assert_eq!(row().ratio(), Some(5.0));
        assert_eq!(row().ratio_of_best(), Some(6.0));
    }

    #[test]
    fn what_was_written_by_hand_is_kept() {
        let folder = std::env::temp_dir().join(format!("standstill-report-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let run =
            Run { machine: "a".into(), command: "b".into(), load: (0.0, 0.0), other: "CRIU".into(), notes: Vec::new() };
        write(&folder, &run, &[row()]).unwrap();
        let path = folder.join("RESULTS.md");
        let text = std::fs::read_to_string(&path).unwrap() + "by hand\n";
        std::fs::write(&path, &text).unwrap();
        write(&folder, &run, &[row()]).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        let svg = std::fs::read_to_string(folder.join("results.svg")).unwrap();
        assert!(svg.contains("small &lt;1 MiB&gt;, dump") && svg.trim_end().ends_with("</svg>"));
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
