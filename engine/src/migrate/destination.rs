//! The destination's side: images arrive, the tree is made of them and held until the source says whose it is.

use std::collections::{HashMap, HashSet};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use standstill_images::store::stream;
use standstill_images::FolderStore;

use super::journal::{Journal, State};
use super::late::{self, Late};
use super::members::{Members, Standing};
use super::wire::{Channel, Heard, Message, Request, PATIENCE};
use super::{lock, safe_name, Heart, Told};
use crate::error::{At, Call, Error, Place, Result};
use crate::options::Options;
use crate::restore;
use crate::stages::{Listener, Stage, Stages};

/// How long what is killed may take to end.
const ENDING: Duration = Duration::from_secs(30);
/// Passes that a source may send.
const MOST_PASSES: usize = 1000;

/// A host that takes trees.
#[derive(Clone)]
pub struct Receive {
    /// Where images and journals go: a folder for each migration.
    pub folder: PathBuf,
    /// How trees are restored, besides what their source asks for.
    pub options: Options,
    /// Take one tree, and return when it has ended.
    pub once: bool,
}

/// What the source has decided, and to whom to say what came of it.
struct Decision {
    commit: bool,
    answer: Channel,
}

/// What all connections share.
struct Shared {
    receive: Receive,
    told: Told,
    /// Migrations whose images are arriving, or whose trees are being made.
    busy: Mutex<HashSet<String>>,
    /// Those whose trees are held.
    held: Mutex<HashMap<String, Sender<Decision>>>,
    /// Connections over which their memory comes.
    pages: Mutex<HashMap<String, Channel>>,
    /// There is one more of these.
    pages_came: Condvar,
}

/// Takes trees, each connection in a thread of its own. Returns on errors of the listener, or when the only tree has ended.
pub fn run(listener: &TcpListener, receive: &Receive, told: &Told) -> Result<()> {
    std::fs::create_dir_all(&receive.folder).call("mkdir").at(Place::Path(receive.folder.clone()))?;
    let shared = Arc::new(Shared {
        receive: receive.clone(),
        told: told.clone(),
        busy: Mutex::default(),
        held: Mutex::default(),
        pages: Mutex::default(),
        pages_came: Condvar::new(),
    });
    let (ends, ended) = mpsc::channel();
    listener.set_nonblocking(receive.once).call("fcntl(O_NONBLOCK)")?;
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                let (shared, ends) = (shared.clone(), ends.clone());
                std::thread::spawn(move || {
                    if let Some(pid) = shared.serve(stream) {
                        // an own child: nobody else asks how it ended
                        let _ = crate::sys::calls::wait_child(pid, libc::__WALL);
                        (shared.told)(&format!("process {pid} has ended"));
                        let _ = ends.send(());
                    }
                });
            }
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {
                if ended.recv_timeout(Duration::from_millis(50)).is_ok() {
                    return Ok(());
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e).call("accept"),
        }
    }
}

impl Shared {
    /// One connection. The root of a tree that runs now, as a child of ours.
    fn serve(&self, stream: TcpStream) -> Option<i32> {
        let served = Channel::accept(stream, &self.receive.options).and_then(|channel| self.hear(channel));
        served.unwrap_or_else(|e| {
            (self.told)(&e.chain());
            None
        })
    }

    fn hear(&self, mut channel: Channel) -> Result<Option<i32>> {
        let result = match channel.hear()? {
            Some(Message::Hello { id, needs, request }) => {
                (self.told)(&format!("{} has a tree to come ({id})", channel.peer()));
                let lacking = needs.lacking();
                if !lacking.is_empty() {
                    channel.say(&Message::Lacking { reasons: lacking })?;
                    return Ok(None);
                }
                if safe_name(&id).is_none() || !lock(&self.busy).insert(id.clone()) {
                    return Err(Error::Usage {
                        what: format!("{} sends an id that is taken, or is none", channel.peer()),
                    });
                }
                let arrived = Arrival::new(self, &id, channel.clone(), request).and_then(|mut arrival| arrival.take());
                lock(&self.pages).remove(&id);
                lock(&self.busy).remove(&id);
                arrived
            }
            Some(Message::Pages { id }) => {
                if lock(&self.busy).contains(&id) {
                    lock(&self.pages).insert(id, channel);
                    self.pages_came.notify_all();
                }
                return Ok(None);
            }
            Some(Message::Commit { id }) => self.decided(&id, true, &mut channel),
            Some(Message::Abort { id }) => self.decided(&id, false, &mut channel),
            Some(other) => Err(channel.nonsense(&other)),
            None => return Ok(None),
        };
        if let Err(e) = &result {
            // it may be gone
            let _ = channel.say(&Message::Failed { what: e.chain() });
        }
        result
    }

    fn journal(&self, id: &str) -> Result<(Journal, PathBuf)> {
        let name = safe_name(id).ok_or_else(|| Error::Usage { what: "this is no id of a migration".into() })?;
        let folder = self.receive.folder.join(name);
        Ok((Journal::read(&folder)?, folder))
    }

    /// A decision over a connection of its own.
    fn decided(&self, id: &str, commit: bool, channel: &mut Channel) -> Result<Option<i32>> {
        let heart = Heart::start(channel);
        loop {
            let held = lock(&self.held).get(id).cloned();
            if let Some(held) = held {
                drop(heart);
                // if it has been decided meanwhile, the connection ends, and who asks asks again
                let _ = held.send(Decision { commit, answer: channel.clone() });
                return Ok(None);
            }
            if !lock(&self.busy).contains(id) {
                break;
            }
            // its images are arriving, or its tree is being made
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(heart);
        let (mut journal, folder) = match self.journal(id) {
            Err(_) if !commit => return channel.say(&Message::Ended).map(|()| None),
            other => other?,
        };
        if journal.late && matches!(journal.state, State::Prepared | State::Committing) {
            // who was to bring its memory is gone
            late::end(&mut journal, &folder)?;
            remove_images(&folder);
        }
        match (journal.state, commit) {
            // it has all of its memory: the source may not know
            (State::Done, false) if journal.late => {
                channel.say(&Message::Running { pid: journal.tree.root() }).map(|()| None)
            }
            (State::Aborted, true) if journal.late => {
                Err(Error::Usage { what: "not all of its memory had come: it was ended here".into() })
            }
            (State::Done, true) => channel.say(&Message::Running { pid: journal.tree.root() }).map(|()| None),
            (State::Committing, true) if journal.tree.standing() == Standing::Whole => {
                journal.enter(State::Done, &folder)?;
                channel.say(&Message::Running { pid: journal.tree.root() }).map(|()| None)
            }
            (State::Prepared | State::Committing, true) => {
                let heart = Heart::start(channel);
                // what is left of one that was being let go
                journal.tree.end(ENDING)?;
                journal.enter(State::Committing, &folder)?;
                let pid = self.restore_again(&mut journal, &folder)?;
                drop(heart);
                channel.say(&Message::Running { pid })?;
                Ok(Some(pid))
            }
            (State::Moving, true) => Err(Error::Usage { what: "not all of it has arrived".into() }),
            (State::Aborted, true) => {
                Err(Error::Usage { what: "it was called off, and its images are removed".into() })
            }
            (State::Done | State::Committing, false) => {
                Err(Error::Usage { what: "it is decided already: its tree is the one here".into() })
            }
            (State::Moving | State::Prepared | State::Aborted, false) => {
                journal.tree.end(ENDING)?;
                journal.enter(State::Aborted, &folder)?;
                remove_images(&folder);
                channel.say(&Message::Ended).map(|()| None)
            }
        }
    }

    fn options(&self, images: &Path, request: &Request) -> Options {
        Options {
            images_dir: images.to_owned(),
            work_dir: images.parent().map(Path::to_owned),
            restore_detach: true,
            tcp_established: request.tcp_established,
            file_locks: request.file_locks,
            ext_unix_sk: request.ext_unix_sk,
            link_remap: request.link_remap,
            ..self.receive.options.clone()
        }
    }

    /// From the images of one that was prepared: nobody has to be asked any more.
    fn restore_again(&self, journal: &mut Journal, folder: &Path) -> Result<i32> {
        let images = journal.images.clone().ok_or(Error::Gone)?;
        let options = self.options(&folder.join(images), &journal.request.clone().unwrap_or_default());
        let report = restore::run(&options)?;
        journal.tree = Members::of_tree(report.pid);
        journal.enter(State::Done, folder)?;
        remove_images(folder);
        Ok(report.pid)
    }
}

/// The images of one migration, and its tree.
struct Arrival<'a> {
    shared: &'a Shared,
    id: String,
    folder: PathBuf,
    journal: Journal,
    channel: Channel,
}

impl<'a> Arrival<'a> {
    fn new(shared: &'a Shared, id: &str, channel: Channel, request: Request) -> Result<Arrival<'a>> {
        use std::os::unix::fs::DirBuilderExt as _;
        let folder = shared.receive.folder.join(id);
        std::fs::DirBuilder::new().mode(0o700).create(&folder).call("mkdir").at(Place::Path(folder.clone()))?;
        let journal = Journal { request: Some(request), ..Journal::new(id, channel.peer()) };
        journal.write(&folder)?;
        Ok(Arrival { shared, id: id.to_owned(), folder, journal, channel })
    }

    /// Takes images until the last have come, then the tree; where it is called off, nothing of it stays.
    fn take(&mut self) -> Result<Option<i32>> {
        let last = self.images().inspect_err(|_| self.forget())?;
        let Some((last, is_late)) = last else {
            self.forget();
            // who has hung up does not hear it
            let _ = self.channel.say(&Message::Ended);
            return Ok(None);
        };
        self.tree(&last, is_late)
    }

    fn forget(&mut self) {
        remove_images(&self.folder);
        if let Err(e) = self.journal.enter(State::Aborted, &self.folder) {
            (self.shared.told)(&e.chain());
        }
    }

    /// The name of the last images, and whether there are pages behind them; none if there are no more to come.
    fn images(&mut self) -> Result<Option<(String, bool)>> {
        self.channel.say(&Message::Ready)?;
        let mut known: HashSet<String> = HashSet::new();
        loop {
            match self.channel.hear()? {
                Some(Message::Working) => {}
                Some(Message::Probe { size }) => {
                    let mut left = std::io::Read::take(&mut self.channel, size.into());
                    std::io::copy(&mut left, &mut std::io::sink()).call("recv")?;
                    self.channel.say(&Message::Arrived)?;
                }
                Some(Message::Images { name, parent, last, late }) => {
                    let fine = |name: &String| safe_name(name).is_some() && name != "journal";
                    if !fine(&name) || known.len() >= MOST_PASSES || parent.as_ref().is_some_and(|p| !known.contains(p))
                    {
                        return Err(Error::Usage {
                            what: "images with a name, or a parent, that they cannot have".into(),
                        });
                    }
                    let folder = self.folder.join(&name);
                    std::fs::create_dir(&folder).call("mkdir").at(Place::Path(folder.clone()))?;
                    let store = FolderStore::open(&folder)?;
                    store.set_parent(parent.map(|p| Path::new("..").join(p)).as_deref())?;
                    let room = rustix::fs::statvfs(&folder).call("statvfs")?;
                    stream::receive(&mut self.channel, &store, room.f_bavail * room.f_frsize)?;
                    known.insert(name.clone());
                    if last {
                        return Ok(Some((name, late)));
                    }
                    self.channel.say(&Message::Arrived)?;
                }
                Some(Message::Abort { .. }) | None => return Ok(None),
                Some(other) => return Err(self.channel.nonsense(&other)),
            }
        }
    }

    /// Who brings memory behind the commit.
    fn late(&self, options: &Options) -> Result<Late> {
        let there = lock(&self.shared.pages);
        let waited = self.shared.pages_came.wait_timeout_while(there, PATIENCE, |pages| !pages.contains_key(&self.id));
        let (mut there, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let pages = there.remove(&self.id);
        drop(there);
        let seconds = PATIENCE.as_secs();
        let pages = pages.ok_or(Error::Timeout { what: "the source's connection for pages", seconds })?;
        Late::start(options, &self.folder, &pages)
    }

    /// Makes the tree, holds it, and does what is decided.
    fn tree(&mut self, last: &str, is_late: bool) -> Result<Option<i32>> {
        let options = self.shared.options(&self.folder.join(last), &self.journal.request.clone().unwrap_or_default());
        let options = Options { lazy_pages: is_late, ..options };
        self.journal.images = Some(last.into());
        self.journal.late = is_late;
        let late = match is_late {
            true => Some(self.late(&options).inspect_err(|_| self.forget())?),
            false => None,
        };
        let (sender, decisions) = mpsc::channel();
        let hold = Hold {
            arrival: Mutex::new(Held {
                journal: &mut self.journal,
                decisions,
                sender: Some(sender),
                heart: Some(Heart::start(&self.channel)),
                answer: self.channel.clone(),
                committed: false,
            }),
            shared: self.shared,
            folder: &self.folder,
            id: &self.id,
        };
        let result = restore::run_with(&options, &Stages::new(&options, Some(&hold)));
        let Held { committed, answer, heart, .. } = hold.arrival.into_inner().unwrap_or_else(PoisonError::into_inner);
        drop(heart);
        let mut answer = answer;
        let pid = match (result, late) {
            (Ok(report), Some(late)) => return self.rest(late, report.pid, &mut answer),
            (Ok(report), None) => {
                self.journal.enter(State::Done, &self.folder)?;
                remove_images(&self.folder);
                report.pid
            }
            // the source has ended: what failed at the last step is tried once more
            (Err(e), None) if committed => {
                (self.shared.told)(&format!("{}: once more, from the images", e.chain()));
                let heart = Heart::start(&answer);
                let again = self.shared.restore_again(&mut self.journal, &self.folder);
                drop(heart);
                match again {
                    Ok(pid) => pid,
                    Err(e) => {
                        let _ = answer.say(&Message::Failed { what: e.chain() });
                        return Err(e);
                    }
                }
            }
            (Err(e), _) => {
                self.forget();
                match matches!(e.cause(), Error::Stage { what, .. } if what == CALLED_OFF) {
                    true => answer.say(&Message::Ended)?,
                    false => {
                        let _ = answer.say(&Message::Failed { what: e.chain() });
                    }
                }
                (self.shared.told)(&e.chain());
                return Ok(None);
            }
        };
        (self.shared.told)(&format!("process {pid} runs here now"));
        // who asked may be gone; it asks again then
        let _ = answer.say(&Message::Running { pid });
        Ok(Some(pid))
    }

    /// It runs: until all of its memory is there.
    fn rest(&mut self, late: Late, pid: i32, answer: &mut Channel) -> Result<Option<i32>> {
        (self.shared.told)(&format!("process {pid} runs here now, its memory is on the way"));
        // who does not hear it does not give pages either
        let _ = answer.say(&Message::Running { pid });
        match late.wait() {
            Ok(()) => {
                self.journal.enter(State::Done, &self.folder)?;
                remove_images(&self.folder);
                (self.shared.told)(&format!("all memory of process {pid} is here"));
                Ok(Some(pid))
            }
            Err(e) => {
                // the daemon may have failed before it could know the tree
                late::end(&mut self.journal, &self.folder)?;
                (self.shared.told)(&format!("process {pid} was ended: {}", e.chain()));
                let _ = crate::sys::calls::wait_child(pid, libc::__WALL);
                self.forget();
                Ok(None)
            }
        }
    }
}

const CALLED_OFF: &str = "the source keeps its tree";

/// Between a tree that is whole and one that runs: the source decides.
struct Hold<'a> {
    arrival: Mutex<Held<'a>>,
    shared: &'a Shared,
    folder: &'a Path,
    id: &'a str,
}

struct Held<'a> {
    journal: &'a mut Journal,
    decisions: Receiver<Decision>,
    sender: Option<Sender<Decision>>,
    heart: Option<Heart>,
    answer: Channel,
    committed: bool,
}

impl Listener for Hold<'_> {
    fn reached(&self, stage: Stage, root: Option<i32>) -> Result<()> {
        let (Stage::PostRestore, Some(root)) = (stage, root) else { return Ok(()) };
        let mut held = lock(&self.arrival);
        held.heart = None;
        held.journal.tree = Members::of_tree(root);
        held.journal.enter(State::Prepared, self.folder)?;
        if let Some(sender) = held.sender.take() {
            lock(&self.shared.held).insert(self.id.to_owned(), sender);
        }
        // even if this fails, it may have been heard
        let said = held.answer.say(&Message::Prepared);
        let decision = self.wait(&held, said.is_ok());
        lock(&self.shared.held).remove(self.id);
        held.answer = decision.answer;
        if !decision.commit {
            return Err(Error::Stage { stage: "post-restore", what: CALLED_OFF.into() });
        }
        held.journal.enter(State::Committing, self.folder)?;
        held.committed = true;
        Ok(())
    }
}

impl Hold<'_> {
    /// Until somebody decides, however long it takes.
    fn wait(&self, held: &Held<'_>, connected: bool) -> Decision {
        let mut channel = connected.then(|| held.answer.clone());
        loop {
            let Some(there) = &mut channel else {
                match held.decisions.recv_timeout(Duration::from_secs(3600)) {
                    Ok(decision) => return decision,
                    Err(RecvTimeoutError::Timeout) => continue,
                    // the sender lives in the table of those that are held, until we are back
                    Err(RecvTimeoutError::Disconnected) => {
                        return Decision { commit: false, answer: held.answer.clone() };
                    }
                }
            };
            match held.decisions.try_recv() {
                Ok(decision) => return decision,
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => {}
            }
            match there.hear_at_once() {
                Ok(Heard::Message(Message::Commit { id })) if id == self.id => {
                    return Decision { commit: true, answer: there.clone() };
                }
                Ok(Heard::Message(Message::Abort { id })) if id == self.id => {
                    return Decision { commit: false, answer: there.clone() };
                }
                Ok(Heard::Message(_)) => {}
                Ok(Heard::Nothing) => there.wait_briefly(),
                Ok(Heard::End) | Err(_) => {
                    (self.shared.told)(&format!(
                        "in doubt: the source of {} is gone, its tree is held here until the source resumes",
                        self.id
                    ));
                    channel = None;
                }
            }
        }
    }
}

fn remove_images(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}
