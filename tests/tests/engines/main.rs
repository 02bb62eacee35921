//! Container engines, with our program as their `criu`: they are not to notice. A machine without one of them skips its tests.
//!
//! What needs no checkpoint, to start a daemon and a container, is the machine's affair: where that fails, the test is skipped by
//! the words of who failed.

mod containerd;
mod docker;
mod lxc;
mod podman;
mod runc;

use standstill_tests::container::Place;
use standstill_tests::process::Output;
use standstill_tests::skip::skip;

/// Runs a command, which must succeed; what it prints.
fn must(place: &Place, program: &str, args: &[&str]) -> String {
    place.run(program, args).unwrap_or_else(|o| panic!("{program} {}: {:?}\n{}", args.join(" "), o.code, o.text))
}

/// Starts a container; false, and the test is skipped, if that cannot be done here.
fn can_start(test: &str, started: Result<String, Output>) -> bool {
    match started {
        Ok(_) => true,
        Err(output) => {
            eprintln!("{}", output.text);
            let first = output.text.lines().find(|l| !l.is_empty()).unwrap_or_default();
            skip(test, &format!("no container can be started here: {first}"));
            false
        }
    }
}
