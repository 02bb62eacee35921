//! Bars on a terminal: one line that says which phase a dump or restore is in, with a bar where memory is moved.
//!
//! Only under our own name, only where standard error is a terminal, and not beside a log that goes there too. The line is
//! gone when the work is done.

use std::io::IsTerminal as _;
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::options::{Options, Persona};
use crate::progress::{explain, Event, Hook, Listener, Step};

/// From this level on the log says so much that a bar would be torn.
const TALKATIVE: u32 = 3;

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
    let words = style("{prefix}: {wide_msg}");
    let bytes = style("{prefix}: {msg} [{wide_bar}] {bytes}/{total_bytes} {eta}");
    let shown = Mutex::new("");
    Hook(Arc::new(move |event: &Event| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        match event.step {
            // what is over soon shows nothing
            Step::Start => {}
            Step::Progress => {
                if *shown != event.phase {
                    bar.set_style(bytes.clone());
                    bar.set_prefix(event.verb.name());
                    bar.set_length(event.total);
                    bar.reset_eta();
                    bar.set_message(explain(event.verb, event.phase));
                    *shown = event.phase;
                }
                bar.set_position(event.bytes);
            }
            Step::Phase(_) if !shown.is_empty() => {
                bar.set_style(words.clone());
                bar.set_message(format!("{}: done", explain(event.verb, event.phase)));
            }
            Step::Phase(_) => {}
            Step::Done | Step::Failed => bar.finish_and_clear(),
        }
    }))
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> ")
}
