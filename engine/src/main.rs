//! The command-line program.

fn main() {
    std::process::exit(standstill::cli::main(std::env::args_os().collect()));
}
