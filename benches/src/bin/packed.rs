//! Packed memory: what it takes and what it saves, by content and by size of blocks.
//!
//! `cargo run --release -p standstill-benches --bin packed -- [--mib 256] [--rounds 5] [--dir /dev/shm]` dumps one task with
//! so much memory of a kind, restores it and lets it check itself, plain and packed in blocks of several sizes, by turns. Whole
//! processes are measured, as a caller sees them; sizes are what the pages images take, holes left out.

use anyhow::{ensure, Context as _, Result};
use clap::Parser;
use nix::sys::signal::{kill, SigSet, Signal};
use nix::unistd::{setsid, Pid};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

#[path = "../programs.rs"]
#[allow(dead_code)] // the other program is compared with CRIU too
mod programs;

const KINDS: [&str; 5] = ["zeros", "text", "heap", "noise", "mixed"];
const BLOCKS: [Option<&str>; 6] = [None, Some("4K"), Some("64K"), Some("256K"), Some("1M"), Some("4M")];
const MIB: usize = 1 << 20;

/// Packed memory: times and sizes.
#[derive(Parser)]
struct Args {
    /// How much memory
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// Rounds of each case
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Where images go
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
    /// Be the program that is dumped
    #[arg(long, hide = true)]
    guest: Option<String>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.guest {
        Some(kind) => guest(kind, args.mib * MIB, &args.dir),
        None => measure(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e:#}");
            ExitCode::FAILURE
        }
    }
}

/// A word of memory of a kind.
fn word(kind: &str, place: usize) -> u64 {
    let noise =
        |n: usize| (n as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    match kind {
        "text" => {
            let text =
                b"Nothing is written here that anybody would want to read, and it goes on for a while like this. ";
            let from = (place * 8 + (noise(place / 512) % 61) as usize) % (text.len() - 8);
            text[from..from + 8].try_into().map_or(0, u64::from_le_bytes)
        }
        // pointers, small numbers, flags
        "heap" => match place % 6 {
            0 => 0x7f12_a000_0000 + (noise(place) & 0xf_fff0),
            1 => noise(place) & 0xff,
            3 => 0x55aa_0000_1000 + (place as u64 / 512 * 64),
            4 => noise(place) % 1000,
            5 => 0x1_0000_0001,
            _ => 0,
        },
        "noise" => noise(place),
        "mixed" => word(["zeros", "text", "heap", "noise"][place / 8192 % 4], place),
        _ => 0,
    }
}

/// Has memory of a kind until SIGTERM comes, then checks it.
fn guest(kind: &str, bytes: usize, dir: &Path) -> Result<()> {
    let mut end = SigSet::empty();
    end.add(Signal::SIGTERM);
    end.thread_block()?;
    setsid()?;
    // written first, so that zeros have pages of their own
    let mut memory = vec![u64::MAX; bytes / 8];
    memory.iter_mut().enumerate().for_each(|(place, value)| *value = word(kind, place));
    std::fs::write(dir.join("ready"), "")?;
    end.wait()?;
    ensure!(memory.iter().enumerate().all(|(place, value)| *value == word(kind, place)), "the memory is another");
    std::fs::write(dir.join("ok"), "")?;
    Ok(())
}

/// What a round took.
struct Sample {
    dump: Duration,
    restore: Duration,
    bytes: u64,
}

fn measure(args: &Args) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "dumping and restoring needs root");
    let program = programs::ours()?.path;
    let dir = args.dir.join(format!("standstill-packed-{}", std::process::id()));
    println!("{} MiB, medians of {} rounds", args.mib, args.rounds);
    println!("{:8} {:>8} {:>10} {:>12} {:>10}", "content", "block", "dump ms", "restore ms", "MiB");
    for kind in KINDS {
        let mut samples: Vec<Vec<Sample>> = BLOCKS.iter().map(|_| Vec::new()).collect();
        for round in 0..args.rounds {
            for turn in 0..BLOCKS.len() {
                let which = (round + turn) % BLOCKS.len();
                std::fs::create_dir_all(&dir)?;
                let sample = once(args, kind, BLOCKS[which], &program, &dir);
                std::fs::remove_dir_all(&dir)?;
                samples[which].push(sample.with_context(|| format!("{kind}, {:?}", BLOCKS[which]))?);
            }
        }
        for (block, samples) in BLOCKS.iter().zip(samples) {
            let median = |of: fn(&Sample) -> Duration| {
                let mut times: Vec<Duration> = samples.iter().map(of).collect();
                times.sort();
                times.get(times.len() / 2).map_or(0.0, |time| time.as_secs_f64() * 1e3)
            };
            let mib = samples.first().map_or(0.0, |s| s.bytes as f64 / MIB as f64);
            let block = block.unwrap_or("plain");
            println!("{kind:8} {block:>8} {:>10.1} {:>12.1} {mib:>10.1}", median(|s| s.dump), median(|s| s.restore));
        }
    }
    Ok(())
}

fn once(args: &Args, kind: &str, block: Option<&str>, program: &Path, dir: &Path) -> Result<Sample> {
    let images = dir.join("images");
    std::fs::create_dir_all(&images)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--guest", kind, "--mib", &args.mib.to_string(), "--dir"]).arg(dir).current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn()?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let result = (|| {
        wait_for(&dir.join("ready"))?;
        let more = block.map_or(Vec::new(), |block| vec!["--compress", "--compress-block", block]);
        let dump = run(program, &images, "dump", &[&["-t", &pid.to_string()][..], &more].concat())?;
        child.wait()?;
        let bytes = pages(&images)?;
        let restore = run(program, &images, "restore", &["-d"])?;
        kill(pid, Signal::SIGTERM)?;
        wait_for(&dir.join("ok"))?;
        Ok(Sample { dump, restore, bytes })
    })();
    if result.is_err() {
        let _ = kill(pid, Signal::SIGKILL);
        let _ = child.wait();
    }
    result
}

fn wait_for(file: &Path) -> Result<()> {
    let start = Instant::now();
    while !file.exists() {
        ensure!(start.elapsed() < Duration::from_secs(60), "{} did not come", file.display());
        std::thread::sleep(Duration::from_millis(1));
    }
    // its last steps
    std::thread::sleep(Duration::from_millis(20));
    Ok(())
}

/// Runs a verb, and says how long that took.
fn run(program: &Path, images: &Path, verb: &str, more: &[&str]) -> Result<Duration> {
    let mut command = Command::new(program);
    command.arg(verb).arg("-D").arg(images).args(["-o", &format!("{verb}.log")]).args(more);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let start = Instant::now();
    let status = command.status()?;
    let took = start.elapsed();
    let log = || std::fs::read_to_string(images.join(format!("{verb}.log"))).unwrap_or_default();
    ensure!(status.success(), "{verb} failed: {}", log());
    Ok(took)
}

/// What the pages images take.
fn pages(images: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(images)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("pages-") {
            bytes += entry.metadata()?.blocks() * 512;
        }
    }
    Ok(bytes)
}
