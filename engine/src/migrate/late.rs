//! At the destination of a tree whose memory comes behind the commit: who brings it, and what is done if that one dies.
//!
//! The [daemon](crate::transfer::lazy) runs in a thread of `receive`. When `receive` is killed the kernel would close the userfaultfds,
//! and tasks would go on with zeros in the place of what had not come. So a [guard](crate::guard) has copies of them, and becomes the
//! program `standstill end-tree FOLDER`: by the journal in that folder it kills the tree, with what it forked meanwhile. Until it is
//! done, whoever touches what is missing waits.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use super::journal::{Journal, State};
use super::wire::Channel;
use crate::error::{At, Call, Error, Place, Result};
use crate::guard::{Choice, Guard};
use crate::memory::late::SOCKET;
use crate::options::Options;
use crate::sys::futex::RobustList;
use crate::transfer::lazy::{self, remote::Remote, Keeper};

/// The internal verb.
pub const VERB: &str = "end-tree";
/// How long what is killed may take to end.
const ENDING: Duration = Duration::from_secs(30);

/// Brings memory, in a thread of its own.
pub struct Late {
    listener: UnixListener,
    socket: PathBuf,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Late {
    /// Listens in the folder of a migration for the restore of these options; pages come over `pages`.
    pub fn start(options: &Options, folder: &Path, pages: &Channel) -> Result<Late> {
        let socket = folder.join(SOCKET);
        let listener = UnixListener::bind(&socket).call("bind").at(Place::Path(socket.clone()))?;
        let heard = listener.try_clone().call("dup")?;
        let ready = lazy::prepare_with(options, Some(Remote::over(pages.link(), false)))?;
        let folder = folder.to_owned();
        let (begun, begins) = mpsc::channel();
        let run = move || {
            let robust = RobustList::new()?;
            let watch = Watch { guard: Guard::new(&robust), folder };
            let begin = watch.begin();
            let watches = begin.is_ok();
            let _ = begun.send(begin);
            if !watches {
                return Err(Error::Gone);
            }
            let served = lazy::serve_with(ready, heard.as_fd(), &watch);
            if served.is_err() {
                // the guard would do the same
                if let Ok(mut journal) = Journal::read(&watch.folder) {
                    end(&mut journal, &watch.folder)?;
                }
                watch.guard.choose(Choice::Nothing);
            }
            served
        };
        let thread = std::thread::Builder::new().name("late".into()).spawn(run).call("clone")?;
        let late = Late { listener, socket, thread: Some(thread) };
        begins.recv().unwrap_or(Err(Error::Gone))?;
        Ok(late)
    }

    /// Until all memory is there; if it is an error, the tree has ended.
    pub fn wait(mut self) -> Result<()> {
        self.thread.take().map_or(Ok(()), |thread| thread.join().unwrap_or(Err(Error::Gone)))
    }
}

impl Drop for Late {
    fn drop(&mut self) {
        // a restore that failed before it called
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// The guard, and where the journal is.
struct Watch<'a> {
    guard: Guard<'a>,
    folder: PathBuf,
}

impl Watch<'_> {
    /// From here on the tree ends if we die.
    fn begin(&self) -> Result<()> {
        let words = [VERB.to_owned(), self.folder.to_string_lossy().into_owned()];
        match self.guard.register_own_program(&words, &[])? {
            true => Ok(()),
            false => Err(Error::Usage {
                what: "there is no standstill on PATH, which would end the tree if this program is killed".into(),
            }),
        }
    }
}

impl Keeper for Watch<'_> {
    fn keep(&self, uffd: BorrowedFd<'_>) -> Result<()> {
        self.guard.hold(uffd).map(drop)
    }

    /// It needs nobody any more. That is known here before the source hears of it and ends its own.
    fn all_there(&self) -> Result<()> {
        let mut journal = Journal::read(&self.folder)?;
        journal.enter(State::Done, &self.folder)?;
        self.guard.choose(Choice::Nothing);
        Ok(())
    }
}

/// Kills a tree that does not have all of its memory, with all that it has forked.
pub fn end(journal: &mut Journal, folder: &Path) -> Result<()> {
    journal.tree.end_with_children(ENDING)?;
    journal.enter(State::Aborted, folder)
}

/// The internal verb: its exit code.
pub fn run(words: &[OsString]) -> i32 {
    let Some(folder) = words.first().map(PathBuf::from) else { return 2 };
    let Ok(mut journal) = Journal::read(&folder) else { return 1 };
    match journal.state {
        State::Done => 0,
        _ => i32::from(end(&mut journal, &folder).is_err()),
    }
}
