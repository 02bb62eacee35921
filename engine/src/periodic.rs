//! A checkpoint every so often (`dump --every`), and the last whole one of them (`restore` of their folder).
//!
//! Each is in a folder of its own, `000001` and so on, and whole once its inventory is there, which is written last and
//! durably: so a dump that was killed leaves a folder that nobody takes for a checkpoint, and the next series removes it. With
//! `--track-mem` each builds on the one before it; a chain is as long as so many are kept, and then a whole one begins the next.
//! What is not needed any more goes behind a dump: its inventory first, so that half of it is none.

use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{poll, PollFd, PollFlags};
use standstill_images::proto::InventoryEntry;
use standstill_images::{ImageKind, Images};

use crate::dump::{self, DumpReport};
use crate::error::{At as _, Call as _, Error, Place, Result};
use crate::options::{FinalState, Options, Persona};
use crate::sys::calls;

/// How many are kept if nothing is said.
pub const DEFAULT_KEEP: u32 = 2;
/// A chain is never longer.
const LONGEST: usize = 1 << 16;

fn name(number: u32) -> String {
    format!("{number:06}")
}

/// The numbers of all folders of a series, in order.
fn numbers(folder: &Path) -> Vec<u32> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let number = |e: std::fs::DirEntry| {
        let text = e.file_name().into_string().ok()?;
        let number = text.parse().ok()?;
        (name(number) == text && e.file_type().ok()?.is_dir()).then_some(number)
    };
    let mut all: Vec<u32> = entries.filter_map(number).collect();
    all.sort_unstable();
    all
}

/// Whether a folder has a checkpoint, and so have all that it builds on.
fn is_whole(folder: &Path) -> bool {
    let mut at = folder.to_owned();
    for _ in 0..LONGEST {
        let inventory =
            Images::open_folder(&at).and_then(|images| images.read_one::<InventoryEntry>(ImageKind::Inventory, ()));
        if !inventory.is_ok_and(|inventory| inventory.pre_dump_mode.is_none()) {
            return false;
        }
        match std::fs::read_link(at.join("parent")) {
            Ok(parent) => at = at.join(parent),
            Err(_) => return true,
        }
    }
    false
}

/// The last whole checkpoint of the series in a folder.
pub fn last_whole(folder: &Path) -> Option<PathBuf> {
    numbers(folder).into_iter().rev().map(|n| folder.join(name(n))).find(|folder| is_whole(folder))
}

/// What to restore instead of a folder that has no checkpoint but a series of them: the same options, with another folder.
pub fn instead(opts: &Options) -> Option<Options> {
    if opts.personality == Persona::Criu || !opts.keeps_images() || opts.images_dir.join("inventory.img").exists() {
        return None;
    }
    let images_dir = last_whole(&opts.images_dir)?;
    tracing::info!("the last whole checkpoint is {}", images_dir.display());
    Some(Options { images_dir, work_dir: Some(opts.work_dir().to_owned()), ..opts.clone() })
}

fn remove(folder: &Path) -> Result<()> {
    let absent = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    match std::fs::remove_file(folder.join("inventory.img")) {
        Err(e) if !absent(&e) => return Err(e).call("unlink").at(Place::Path(folder.to_owned())),
        _ => {}
    }
    match std::fs::remove_dir_all(folder) {
        Err(e) if !absent(&e) => Err(e).call("rmdir").at(Place::Path(folder.to_owned())),
        _ => Ok(()),
    }
}

/// Has the process ended, now or within `wait`?
fn ended(process: &impl std::os::fd::AsFd, wait: Duration) -> Result<bool> {
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let limit = rustix::time::Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(n) => return Ok(n > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e).call("poll"),
        }
    }
}

/// Dumps the tree `every` so often until it ends, and keeps the last `keep` checkpoints at least. `done` hears of each one.
///
/// A dump that fails is tried again when the next one is due; if none was whole yet, that ends it.
pub fn run(opts: &Options, every: Duration, keep: u32, mut done: impl FnMut(&Path, &DumpReport)) -> Result<()> {
    let root = opts.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    let usage = |what: &str| Err(Error::Usage { what: what.into() });
    if opts.prev_images_dir.is_some() {
        return usage("--every makes its own chains: leave out --prev-images-dir");
    }
    if !opts.keeps_images() {
        return usage("--every makes folders: leave out --to and --stream");
    }
    if opts.final_state == FinalState::Stop {
        return usage("--every is of a tree that goes on: leave out --leave-stopped");
    }
    let process = calls::pidfd_open(root, 0).map_err(|e| match e.errno() {
        libc::ESRCH => Error::NoProcess { pid: root },
        _ => e,
    })?;
    let folder = &opts.images_dir;
    for half in numbers(folder).into_iter().map(|n| folder.join(name(n))).filter(|f| !is_whole(f)) {
        remove(&half)?;
    }
    let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
    let mut number = numbers(folder).last().copied().unwrap_or(0);
    // whole ones of this series, by chains
    let mut chains: Vec<Vec<u32>> = Vec::new();
    loop {
        let began = Instant::now();
        number = number.checked_add(1).ok_or(Error::Usage { what: "there are no more numbers for folders".into() })?;
        let into = folder.join(name(number));
        let parent = chains.last().filter(|chain| opts.track_mem && chain.len() < keep).and_then(|chain| chain.last());
        let one = Options {
            images_dir: into.clone(),
            work_dir: Some(opts.work_dir().to_owned()),
            prev_images_dir: parent.map(|n| Path::new("..").join(name(*n))),
            final_state: FinalState::Run,
            ..opts.clone()
        };
        let made = std::fs::DirBuilder::new().mode(0o700).create(&into).call("mkdir").at(Place::Path(into.clone()));
        match made.and_then(|()| dump::run(&one)) {
            Ok(report) => {
                done(&into, &report);
                match chains.last_mut() {
                    Some(chain) if one.prev_images_dir.is_some() => chain.push(number),
                    _ => chains.push(vec![number]),
                }
                prune(folder, &mut chains, keep)?;
            }
            Err(e) => {
                remove(&into)?;
                if ended(&process, Duration::ZERO)? {
                    return Ok(());
                }
                if chains.is_empty() || matches!(e.cause(), Error::Interrupted) {
                    return Err(e);
                }
                tracing::error!("{}", e.chain());
                // pages that it has marked are in no checkpoint
                chains.push(Vec::new());
            }
        }
        if ended(&process.as_fd(), every.saturating_sub(began.elapsed()))? {
            return Ok(());
        }
    }
}

/// Removes all before the chain that the oldest of those to keep is in; what earlier series left goes first.
fn prune(folder: &Path, chains: &mut Vec<Vec<u32>>, keep: usize) -> Result<()> {
    chains.retain(|chain| !chain.is_empty());
    while chains.len() > 1 && chains.iter().skip(1).map(Vec::len).sum::<usize>() >= keep {
        chains.remove(0);
    }
    let own: usize = chains.iter().map(Vec::len).sum();
    let first = chains.first().and_then(|chain| chain.first()).copied().unwrap_or(0);
    // while this series has too few, the last ones of an earlier one stay
    let mut older: Vec<u32> = numbers(folder).into_iter().filter(|n| *n < first).collect();
    if own < keep {
        let spared = keep - own;
        let mut needed = older.len().saturating_sub(spared);
        // … with what they build on
        while needed > 0 && older.get(needed).is_some_and(|n| folder.join(name(*n)).join("parent").exists()) {
            needed -= 1;
        }
        older.truncate(needed);
    }
    // the newest first: what builds on another goes before it
    older.iter().rev().try_for_each(|n| remove(&folder.join(name(*n))))
}

/// `90`, `90s`, `500ms`, `5m`, `2h`, `1d`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at_checked(digits)?;
    let number: u64 = number.parse().ok()?;
    let seconds = |n: u64| number.checked_mul(n).map(Duration::from_secs);
    let duration = match unit {
        "ms" => Some(Duration::from_millis(number)),
        "" | "s" => seconds(1),
        "m" | "min" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86_400),
        _ => None,
    };
    duration.filter(|d| !d.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        assert_eq!(parse_duration("90"), Some(Duration::from_secs(90)));
        assert_eq!(parse_duration("500ms"), Some(Duration::from_millis(500)));
        assert_eq!(parse_duration("2h"), Some(Duration::from_secs(7200)));
        for bad in ["", "0", "s", "-1s", "1.5s", "1y", "99999999999999999999", "18446744073709551615d", "1\u{e4}"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    fn fake(folder: &Path, number: u32, parent: Option<u32>) {
        let at = folder.join(name(number));
        std::fs::create_dir(&at).unwrap();
        let images = Images::open_folder(&at).unwrap();
        let inventory = InventoryEntry { img_version: 2, ..Default::default() };
        images.write_one(ImageKind::Inventory, (), &inventory).unwrap();
        if let Some(parent) = parent {
            std::os::unix::fs::symlink(Path::new("..").join(name(parent)), at.join("parent")).unwrap();
        }
    }

    #[test]
    fn what_is_whole_and_what_goes() {
        let folder = std::env::temp_dir().join(format!("standstill-periodic-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        assert_eq!(last_whole(&folder), None);
        fake(&folder, 1, None);
        fake(&folder, 2, Some(1));
        fake(&folder, 3, None);
        fake(&folder, 4, Some(3));
        fake(&folder, 5, None);
        std::fs::create_dir(folder.join("7")).unwrap();
        std::fs::create_dir(folder.join(name(6))).unwrap();
        assert_eq!(numbers(&folder), [1, 2, 3, 4, 5, 6]);
        assert_eq!(last_whole(&folder), Some(folder.join(name(5))));
        // half an inventory is none
        std::fs::write(folder.join(name(5)).join("inventory.img"), b"\x16").unwrap();
        assert_eq!(last_whole(&folder), Some(folder.join(name(4))));
        // of a chain all must be there
        std::fs::remove_file(folder.join(name(3)).join("inventory.img")).unwrap();
        assert_eq!(last_whole(&folder), Some(folder.join(name(2))));
        let mut chains = vec![vec![3, 4], vec![5, 6]];
        prune(&folder, &mut chains, 3).unwrap();
        assert_eq!(chains, [vec![3, 4], vec![5, 6]]);
        assert_eq!(numbers(&folder), [3, 4, 5, 6]);
        prune(&folder, &mut chains, 2).unwrap();
        assert_eq!(numbers(&folder), [5, 6]);
        // a new series spares the chain of the last one
        fake(&folder, 7, Some(6));
        fake(&folder, 8, None);
        prune(&folder, &mut vec![vec![8]], 2).unwrap();
        assert_eq!(numbers(&folder), [6, 7, 8]);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
