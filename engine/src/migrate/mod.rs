//! A tree moves to another host while it runs: `standstill migrate` at the source, `standstill receive` at the destination.
//!
//! ```text
//! source                                   destination
//! what the tree needs                 →    what is lacking, or: ready
//! passes of memory, the tree runs     →    images arrive
//! the tree stands still; the rest     →    images arrive, the tree is made, whole, and held
//!                                     ←    prepared
//! journal: committing
//! the tree is killed, and is gone
//! commit                              →    journal: committing; the tree goes on
//! journal: done                       ←    running
//! ```
//!
//! **One side at any time.** The destination's tree goes on only after a commit, and the source commits only after it has seen
//! the last process of its own tree end. Until it has begun to kill, any failure (a lost connection, a killed engine, a
//! destination that cannot) leaves the source running, as after any dump that fails; afterwards the destination has the
//! images, and its journal says so.
//!
//! **In doubt.** A destination that has said "prepared" and hears no more holds its tree: it cannot know whether the source
//! has ended. A source whose commit gets no answer says so and ends. `migrate --resume FOLDER` decides then, by what is left of the
//! source's tree once everybody who worked on it is gone: if it lives, the destination's is ended, if not, it goes on, made
//! anew from the images if need be. Resuming again changes nothing.
//!
//! **Not moved**: files (the destination has the same, or a shared file system), and the network's addresses, which action scripts
//! move: `post-dump` at the source comes before the commit, `pre-resume` at the destination right after it.
//!
//! **Connections** go along with `--tcp-established` when their address does: packets are held up at the source from the moment
//! that the tree stands still, and at the destination until its tree is let go. A script takes the address away behind
//! `post-dump`, gives it to the destination before `pre-restore`, and turns routes at `pre-resume`.
//!
//! **Memory behind the commit** (post-copy, hybrid). The source commits while its tree still stands there: the destination's goes
//! on at once, over a [daemon](crate::transfer::lazy) inside of `receive`, and the source gives pages over a second connection
//! until all are there; only then it ends its tree. So:
//! - From the commit on the source's tree never goes on by itself: if the engine dies, the guard ends it.
//! - If `receive` dies, its guard ends the tree there ([`late`]), so that nobody goes on with zeros in the place of what had not come.
//! - If the connection breaks, the destination ends its tree, and when it has said so the source lets its own go on from the cut:
//!   what the other did in between is lost. Until it has said so, or that it has all, the source holds its tree.
//! - If a host is lost before all is there, the tree is lost. Who cannot have that takes another strategy.
//!
//! Not here yet: several trees at one cut.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

pub mod destination;
pub mod journal;
pub mod late;
pub mod members;
pub mod source;
pub mod wire;

use wire::{Channel, Message};

/// How memory gets to the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// All of it while the tree stands still.
    StopAndCopy,
    /// In passes while the tree runs, until what is left is little or does not get less.
    PreCopy,
    /// Behind the commit: the tree goes on at the destination, and memory comes when it is touched, or before.
    PostCopy,
    /// One pass while the tree runs, and what it writes meanwhile behind the commit.
    Hybrid,
    /// One of the first two, by what is measured: they alone lose nothing when one of the hosts is lost.
    Auto,
}

impl Strategy {
    /// Whether memory comes behind the commit.
    pub fn is_late(self) -> bool {
        matches!(self, Strategy::PostCopy | Strategy::Hybrid)
    }
}

/// One pass.
#[derive(Debug, Clone, Serialize)]
pub struct Pass {
    /// Bytes sent.
    pub bytes: u64,
    /// How long taking and sending them took, in seconds.
    pub seconds: f64,
    /// How long the tree stood still for it, in seconds.
    pub frozen_seconds: f64,
}

/// How a migration went.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Which it was.
    pub id: String,
    /// Which way was taken.
    pub strategy: Strategy,
    /// The passes, the last of which was taken while the tree stood still.
    pub passes: Vec<Pass>,
    /// Bytes a second that the network carried.
    pub bandwidth: f64,
    /// How long the tree would stand still, by what was known when it was stopped, in seconds.
    pub predicted_seconds: f64,
    /// How long nobody ran, in seconds.
    pub downtime_seconds: f64,
    /// How long all took, in seconds.
    pub total_seconds: f64,
    /// The root's process id at the destination, as seen from there.
    pub pid: i32,
}

/// What is told on the way.
pub type Told = Arc<dyn Fn(&str) + Send + Sync>;

/// Says that somebody works, until it is dropped: who hears nothing for long gives up.
struct Heart {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

/// How often.
const BEAT: Duration = Duration::from_secs(2);

impl Heart {
    fn start(channel: &Channel) -> Heart {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut channel, stopped) = (channel.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            let mut next = Instant::now() + BEAT;
            while !stopped.load(Ordering::Acquire) {
                std::thread::park_timeout(next.saturating_duration_since(Instant::now()));
                if Instant::now() >= next {
                    if channel.say(&Message::Working).is_err() {
                        return;
                    }
                    next += BEAT;
                }
            }
        });
        Heart { stop, thread: Some(thread) }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// What a mutex holds; who panicked while it held it left whole values.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder's name from outside: letters, digits and dashes, so that it leads nowhere else.
fn safe_name(name: &str) -> Option<PathBuf> {
    let safe = |c: char| c.is_ascii_alphanumeric() || c == '-';
    (!name.is_empty() && name.len() <= 64 && name.chars().all(safe)).then(|| PathBuf::from(name))
}
