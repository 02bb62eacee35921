//! `restore`: the engine does it, this file says how it went, and becomes what it was told to.

use super::bars::with_bars;
use super::dump::human_time;
use super::{print, reason};
use crate::options::{Options, Persona};
use std::os::unix::process::CommandExt as _;
use std::time::Instant;
use tracing::{error, info};

/// Restores a tree. The exit code is our own, or that of the restored program if we stayed its parent.
pub fn run(options: &Options) -> i32 {
    if !super::supported(options) {
        return 1;
    }
    let start = Instant::now();
    let report = match crate::restore::run(&with_bars(options)) {
        Ok(report) => report,
        Err(e) => {
            error!("{}", e.chain());
            error!("Restoring FAILED.");
            return 1;
        }
    };
    info!("Restore finished successfully. Tasks resumed.");
    if options.personality == Persona::Standstill && options.restore_detach {
        let from = match options.from.as_ref().and_then(|from| from.url()) {
            Some(url) => url.to_owned(),
            None if options.keeps_images() => options.images_dir.display().to_string(),
            None => "a stream".to_owned(),
        };
        print(&format!("restored from {from} in {}\n", human_time(start.elapsed())));
    }
    if options.display_gpus {
        super::print_gpus(options);
    }
    if let Some((program, args)) = options.exec_cmd.split_first() {
        let mut command = std::process::Command::new(program);
        command.args(args).current_dir(options.work_dir());
        let error = crate::sys::calls::plain_signals(&mut command).exec();
        error!("Failed to exec command {}: {}", super::shown(program), reason(&error));
        return 1;
    }
    match options.personality {
        // CRIU waits for the program, but does not hand its exit code on
        Persona::Criu => 0,
        Persona::Standstill => report.exit_code.unwrap_or(0),
    }
}
