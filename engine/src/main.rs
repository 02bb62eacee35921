//! The command-line program.

fn main() {
    // nothing else in this program waits for children
    standstill::sys::ptrace::alone();
    std::process::exit(standstill::cli::main(std::env::args_os().collect()));
}
