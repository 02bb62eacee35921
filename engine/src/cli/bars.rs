//! Bars on a terminal: one line that says which phase a dump or restore is in, with a bar where memory is moved.
//!
//! Only under our own name, only where standard error is a terminal, and not beside a log that goes there too. The line is
//! gone when the work is done.

use std::io::IsTerminal as _;
use std::sync::Arc;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::options::{Options, Persona};
use crate::progress::{explain, Event, Hook, Listener, Step};

/// From this level on the log says so much that a bar would be torn.
const TALKATIVE: u32 = 3;
/// What is over sooner shows nothing.
const PATIENCE: Duration = Duration::from_millis(150);

/// The same options, with bars in them if there are to be any.
pub fn with_bars(options: &Options) -> Options {
    let mut options = options.clone();
    match options.progress {
        Listener::Unsaid | Listener::Bars if fit(&options) => options.progress = Listener::Hook(hook()),
        Listener::Unsaid | Listener::Bars => options.progress = Listener::Nobody,
        Listener::Nobody | Listener::Json(_) | Listener::Hook(_) => {}
    }
    options
}

fn fit(options: &Options) -> bool {
    let log_is_elsewhere = options.log_file.is_some() || options.log_level < TALKATIVE;
    options.personality == Persona::Standstill && !options.swrk && log_is_elsewhere && std::io::stderr().is_terminal()
}

fn hook() -> Hook {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let words = style("{prefix} {msg}");
    let bytes = style("{prefix} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    bar.set_style(words.clone());
    Hook(Arc::new(move |event: &Event| {
        if event.since < PATIENCE && event.step != Step::Start {
            return;
        }
        match event.step {
            Step::Start => {
                bar.set_prefix(event.verb.name());
                bar.set_message(explain(event.verb, event.phase));
                bar.set_style(bytes.clone());
                bar.set_length(event.total);
                bar.set_position(0);
                bar.reset_eta();
            }
            Step::Progress => bar.set_position(event.bytes),
            Step::Phase(_) => {
                bar.set_prefix(event.verb.name());
                bar.set_message(format!("{}: done", explain(event.verb, event.phase)));
                bar.set_style(words.clone());
            }
            Step::Done | Step::Failed => bar.finish_and_clear(),
        }
    }))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}
