//! The source's side: who has the tree until it commits.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use standstill_images::proto::InventoryEntry;
use standstill_images::store::stream::StreamStore;
use standstill_images::{FolderStore, ImageKind, Images, Store as _};

use super::journal::{Journal, State};
use super::members::{Members, Standing};
use super::wire::{Channel, Message, Request};
use super::{lock, Heart, Pass, Report, Strategy, Told};
use crate::error::{At, Call, Error, Place, Result};
use crate::memory::{track, PAGE};
use crate::needs::Needs;
use crate::options::{FinalState, Options};
use crate::sockets::netlock;
use crate::stages::{Listener, Stage, Stages};
use crate::sys::interrupt;
use crate::transfer::server;
use crate::transfer::source::Pages;
use crate::{dump, pre_dump};

/// How long a connection may take to be made.
const CALL: Duration = Duration::from_secs(10);
/// How long the destination is called again when a commit gets no answer.
const RETRY: Duration = Duration::from_secs(10);
/// How long what is killed may take to end.
const ENDING: Duration = Duration::from_secs(30);
/// Bytes that measure the network.
const PROBE: u32 = 8 << 20;
/// So little is not worth another pass.
const LITTLE: u64 = 4 << 20;
/// A standstill that nobody minds.
const UNNOTICED: f64 = 0.1;
/// What a dump and a restore take besides memory, in seconds, and how fast they write and read it, in bytes a second: for
/// predictions.
const FIXED: f64 = 0.045;
const COPIES: f64 = 1.0e9;

/// A migration that is asked for.
#[derive(Debug, Clone)]
pub struct Migrate {
    /// What and how to dump; `images_dir` is a folder for this migration alone.
    pub options: Options,
    /// Where to: HOST:PORT.
    pub to: String,
    /// Which way.
    pub strategy: Strategy,
    /// The most passes while the tree runs.
    pub most_passes: u32,
}

/// What was sent, and how fast.
struct Sent {
    bytes: u64,
    took: Duration,
}

/// Sends the images in a folder.
fn send(channel: &mut Channel, folder: &Path, parent: Option<&str>, last: bool, late: bool) -> Result<Sent> {
    let began = Instant::now();
    let name = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    channel.say(&Message::Images { name, parent: parent.map(str::to_owned), last, late })?;
    let (from, to) = (FolderStore::open(folder)?, StreamStore::new(channel.clone())?);
    let mut bytes = 0;
    let mut buffer = vec![0; 1 << 20];
    for name in from.list()?.into_iter().filter(|name| name.ends_with(".img")) {
        let (image, mut out) = (from.open(&name)?, to.create(&name)?);
        let mut at = 0;
        while at < image.len() {
            let n = usize::try_from(image.len() - at).unwrap_or(usize::MAX).min(buffer.len());
            let failed = |e: std::io::Result<()>| e.call("send").at(Place::Path(folder.join(&name)));
            failed(image.read_exact_at(&mut buffer[..n], at))?;
            failed(std::io::Write::write_all(&mut out, &buffer[..n]))?;
            at += n as u64;
        }
        out.finish()?;
        bytes += at;
    }
    to.commit()?;
    Ok(Sent { bytes, took: began.elapsed() })
}

/// Moves a tree. When this returns an error, the source's tree runs, but for [`Error::InDoubt`].
pub fn run(migrate: &Migrate, told: &Told) -> Result<Report> {
    let root = migrate.options.required_pid().map_err(|e| Error::Usage { what: e.to_string() })?;
    let needs = Needs::of_tree(root)?;
    let folder = migrate.options.images_dir.clone();
    let id = dump::run_id();
    let mut channel =
        Channel::connect(&migrate.to, CALL, &migrate.options).at(Place::Step("calling the destination"))?;
    let request = Request {
        tcp_established: migrate.options.tcp_established,
        file_locks: migrate.options.file_locks,
        ext_unix_sk: migrate.options.ext_unix_sk,
        link_remap: migrate.options.link_remap,
    };
    let memory = needs.memory;
    channel.say(&Message::Hello { id: id.clone(), needs: Box::new(needs), request })?;
    match channel.answer()? {
        Message::Ready => {}
        Message::Lacking { reasons } => {
            return Err(Error::Usage { what: format!("{} cannot take it: {}", migrate.to, reasons.join("; ")) });
        }
        other => return Err(channel.nonsense(&other)),
    }
    let journal = Mutex::new(Journal::new(&id, &migrate.to));
    let mut source = Source { migrate, root, folder, journal, channel, told, passes: Vec::new(), bandwidth: 0.0 };
    source.change(|journal| journal.state = State::Moving)?;
    let result = source.all(memory);
    match &result {
        Err(e) if !matches!(e.cause(), Error::InDoubt { .. }) => source.abort(),
        _ => {}
    }
    result
}

struct Source<'a> {
    migrate: &'a Migrate,
    root: i32,
    folder: PathBuf,
    journal: Mutex<Journal>,
    channel: Channel,
    told: &'a Told,
    passes: Vec<Pass>,
    bandwidth: f64,
}

impl Source<'_> {
    fn change(&self, change: impl FnOnce(&mut Journal)) -> Result<()> {
        let mut journal = lock(&self.journal);
        change(&mut journal);
        journal.write(&self.folder)
    }

    fn all(&mut self, memory: u64) -> Result<Report> {
        let began = Instant::now();
        self.probe()?;
        let whole = self.standstill(memory as f64);
        let mut strategy = self.migrate.strategy;
        if strategy == Strategy::Auto {
            strategy = if whole <= UNNOTICED { Strategy::StopAndCopy } else { Strategy::PreCopy };
        }
        (self.told)(&format!(
            "{} MiB of memory, the network carries {:.0} MiB/s: {}",
            memory >> 20,
            self.bandwidth / 1048576.0,
            match strategy {
                Strategy::PreCopy => format!("pre-copy (stop and copy would take {:.0} ms)", whole * 1000.0),
                Strategy::PostCopy => "post-copy".to_owned(),
                Strategy::Hybrid => "one pass, then post-copy".to_owned(),
                Strategy::StopAndCopy | Strategy::Auto => format!("stop and copy, {:.0} ms", whole * 1000.0),
            }
        ));
        let predicted = match strategy {
            Strategy::PreCopy => self.copy_while_it_runs(self.migrate.most_passes)?,
            Strategy::Hybrid => self.copy_while_it_runs(1).map(|_| FIXED)?,
            Strategy::PostCopy => FIXED,
            Strategy::StopAndCopy | Strategy::Auto => whole,
        };
        interrupt::check()?;
        let Ended { frozen, at: ended, late } = self.last_pass(strategy.is_late())?;
        let (pid, downtime) = match late {
            // it ran there while the tree still stood here
            Some(Late { running, at }) => (running, at + frozen - ended),
            None => {
                let pid = self.commit()?;
                (pid, frozen + ended.elapsed())
            }
        };
        self.change(|journal| journal.state = State::Done)?;
        self.clean();
        Ok(Report {
            id: self.id(),
            strategy,
            passes: std::mem::take(&mut self.passes),
            bandwidth: self.bandwidth,
            predicted_seconds: predicted,
            downtime_seconds: downtime.as_secs_f64(),
            total_seconds: began.elapsed().as_secs_f64(),
            pid,
        })
    }

    fn peer(&self) -> Peer<'_> {
        Peer { to: &self.migrate.to, options: &self.migrate.options }
    }

    fn id(&self) -> String {
        lock(&self.journal).id.clone()
    }

    /// How long the tree stands still for so many bytes: they are written, sent, and read.
    fn standstill(&self, bytes: f64) -> f64 {
        bytes / self.bandwidth + 2.0 * bytes / COPIES + FIXED
    }

    /// How fast the network is.
    fn probe(&mut self) -> Result<()> {
        let began = Instant::now();
        self.channel.say(&Message::Probe { size: PROBE })?;
        std::io::Write::write_all(&mut self.channel, &vec![0; PROBE as usize]).call("send")?;
        self.channel.expect(&Message::Arrived)?;
        self.bandwidth = f64::from(PROBE) / began.elapsed().as_secs_f64().max(1e-6);
        Ok(())
    }

    fn name(&self, pass: usize) -> Option<String> {
        (pass > 0).then(|| format!("pass-{pass}"))
    }

    fn options(&self, name: &str, parent: Option<String>) -> Result<Options> {
        let images_dir = self.folder.join(name);
        std::fs::create_dir_all(&images_dir).call("mkdir").at(Place::Path(images_dir.clone()))?;
        let prev_images_dir = parent.map(|parent| PathBuf::from("..").join(parent));
        Ok(Options { images_dir, work_dir: Some(self.folder.clone()), prev_images_dir, ..self.migrate.options.clone() })
    }

    /// Passes while the tree runs; how long it will stand still, by what was seen.
    fn copy_while_it_runs(&mut self, most_passes: u32) -> Result<f64> {
        let mut before: Option<(u64, Duration)> = None;
        loop {
            let n = self.passes.len() + 1;
            let (name, parent) = (self.name(n).unwrap_or_default(), self.name(n - 1));
            let options = self.options(&name, parent.clone())?;
            let began = Instant::now();
            let heart = Heart::start(&self.channel);
            let report = pre_dump::run(&options).at(Place::Item("pass", n as u64))?;
            drop(heart);
            let sent = send(&mut self.channel, &options.images_dir, parent.as_deref(), false, false)?;
            self.channel.expect(&Message::Arrived)?;
            if sent.bytes >= u64::from(PROBE) {
                self.bandwidth = sent.bytes as f64 / sent.took.as_secs_f64().max(1e-6);
            }
            let took = began.elapsed();
            let pages = (report.pages + report.shared_pages) * PAGE;
            self.passes.push(Pass {
                bytes: sent.bytes,
                seconds: took.as_secs_f64(),
                frozen_seconds: report.frozen.as_secs_f64(),
            });
            // what this pass found was written while the one before it was on its way
            let rate = before.map_or(0.0, |(_, while_it)| pages as f64 / while_it.as_secs_f64().max(1e-6));
            (self.told)(&format!(
                "pass {n}: {} MiB in {:.0} ms{}",
                sent.bytes >> 20,
                took.as_secs_f64() * 1000.0,
                if before.is_some() { format!(", {:.0} MiB/s are written", rate / 1048576.0) } else { String::new() }
            ));
            let enough = match before {
                _ if n >= most_passes as usize => true,
                Some((pages_before, _)) => pages <= LITTLE || pages as f64 > 0.8 * pages_before as f64,
                None => pages <= LITTLE,
            };
            if enough {
                let left = (rate * took.as_secs_f64()).min(pages as f64);
                return Ok(self.standstill(left));
            }
            before = Some((pages, took));
            interrupt::check()?;
        }
    }

    /// The tree stands still, goes over, and is killed here. How long it has stood still, and when it had ended.
    fn last_pass(&mut self, late: bool) -> Result<Ended> {
        let parent = self.name(self.passes.len());
        let options =
            Options { final_state: FinalState::Kill, lazy_pages: late, ..self.options("last", parent.clone())? };
        let began = Instant::now();
        let handover = Handover {
            parent,
            folder: options.images_dir.clone(),
            late,
            heart: Mutex::new(Some(Heart::start(&self.channel))),
            sent: Mutex::new(0),
            pages: Mutex::new(None),
            running: Mutex::new(None),
            source: self,
        };
        let report = dump::run_with(&options, &Stages::new(&options, Some(&handover)))?;
        let at = Instant::now();
        let sent = *lock(&handover.sent);
        let running = lock(&handover.running).take();
        self.passes.push(Pass {
            bytes: sent,
            seconds: began.elapsed().as_secs_f64(),
            frozen_seconds: report.frozen.as_secs_f64(),
        });
        let tree = lock(&self.journal).tree.clone();
        if !tree.wait_gone(ENDING) {
            return Err(in_doubt(&self.folder, "what was killed here has not ended"));
        }
        Ok(Ended { frozen: report.frozen, at, late: running })
    }

    /// The tree has ended here.
    fn commit(&mut self) -> Result<i32> {
        let id = self.id();
        hand_over(Some(self.channel.clone()), self.peer(), &id).map_err(|e| in_doubt(&self.folder, &e.chain()))
    }

    /// Nobody waits for the tree's packets here any more, and its images are elsewhere.
    fn clean(&self) {
        if let Err(e) = unlock(&self.folder.join("last")) {
            tracing::warn!("the lock of its connections is left: {}", e.chain());
        }
        remove_images(&self.folder);
    }

    /// The tree goes on here.
    fn abort(&mut self) {
        let id = self.id();
        let told = self.channel.say(&Message::Abort { id: id.clone() }).and_then(|()| wait_end(&mut self.channel));
        if told.is_err() {
            let _ = call_off(self.peer(), &id);
        }
        if let Err(e) = self.change(|journal| journal.state = State::Aborted) {
            tracing::warn!("{}", e.chain());
        }
        if !self.passes.is_empty() {
            // nobody builds on these passes
            let _ = track::end(self.root);
        }
        remove_images(&self.folder);
    }
}

/// The tree has ended here.
struct Ended {
    /// How long it stood still before.
    frozen: Duration,
    at: Instant,
    late: Option<Late>,
}

/// The destination's tree ran before that.
struct Late {
    running: i32,
    at: Instant,
}

/// At the end of the dump: the destination gets all, and says whether it has it.
struct Handover<'a> {
    source: &'a Source<'a>,
    parent: Option<String>,
    folder: PathBuf,
    late: bool,
    heart: Mutex<Option<Heart>>,
    sent: Mutex<u64>,
    /// The connection for pages that come behind the commit.
    pages: Mutex<Option<(Channel, i32)>>,
    running: Mutex<Option<Late>>,
}

impl Listener for Handover<'_> {
    fn reached(&self, stage: Stage, root: Option<i32>) -> Result<()> {
        let (Stage::PostDump, Some(root)) = (stage, root) else { return Ok(()) };
        drop(lock(&self.heart).take());
        let mut channel = self.source.channel.clone();
        *lock(&self.sent) = send(&mut channel, &self.folder, self.parent.as_deref(), true, self.late)?.bytes;
        if !self.late {
            return self.prepared(root);
        }
        let migrate = self.source.migrate;
        let mut pages =
            Channel::connect(&migrate.to, CALL, &migrate.options).at(Place::Step("a connection for pages"))?;
        pages.say(&Message::Pages { id: self.source.id() })?;
        *lock(&self.pages) = Some((pages, root));
        Ok(())
    }

    fn gives_pages(&self) -> bool {
        self.late
    }

    /// Gives pages until all are there, and commits meanwhile. If it is an error, the destination's tree has ended, or never was.
    fn give_pages(&self, from: &mut (dyn Pages + Send), decide: &dyn Fn() -> Result<()>) -> Result<()> {
        let Some((pages, root)) = lock(&self.pages).take() else { return Err(Error::Gone) };
        let (id, peer) = (self.source.id(), self.source.peer());
        let (given, running) = std::thread::scope(|scope| {
            let link = pages.link();
            let giving = scope.spawn(move || {
                let given = server::give(&link, from);
                if given.is_err() {
                    // the other side is to know at once
                    link.cut();
                }
                given
            });
            let committed = self.prepared(root).and_then(|()| decide());
            let running = committed.map(|()| {
                let running = hand_over(Some(self.source.channel.clone()), peer, &id);
                running.map(|running| Late { running, at: Instant::now() })
            });
            if running.is_err() {
                pages.link().cut();
            }
            (giving.join().unwrap_or(Err(Error::Gone)), running)
        });
        match (running?, given) {
            (_, Err(e)) => {
                (self.source.told)(&format!("{}: it is asked whether its tree has ended", e.chain()));
                let running = self.whose(peer, &id).ok_or(e)?;
                *lock(&self.running) = Some(Late { running, at: Instant::now() });
            }
            (Ok(late), Ok(())) => *lock(&self.running) = Some(late),
            // it has all: the commit is said again when our tree has ended
            (Err(_), Ok(())) => {}
        }
        Ok(())
    }
}

impl Handover<'_> {
    /// Waits until the destination holds the whole tree; from here on only the destination's may go on by itself.
    fn prepared(&self, root: i32) -> Result<()> {
        self.source.channel.clone().expect(&Message::Prepared).at(Place::Step("restoring at the destination"))?;
        interrupt::check()?;
        self.source.change(|journal| {
            journal.tree = Members::of_tree(root);
            journal.engine = journal.workers();
            journal.late = self.late;
            journal.state = State::Committing;
        })
    }

    /// The destination's tree, if it has all of its memory; none if it has ended. Whoever cannot be reached may have it: our
    /// tree stands until we know.
    fn whose(&self, peer: Peer<'_>, id: &str) -> Option<i32> {
        let mut waits = false;
        loop {
            match insist(None, peer, &Message::Abort { id: id.to_owned() }) {
                Ok(Message::Ended) => return None,
                Ok(Message::Running { pid }) => return Some(pid),
                other => {
                    let why = other.map_or_else(|e| e.chain(), |message| format!("it says {message:?}"));
                    if !std::mem::replace(&mut waits, true) {
                        (self.source.told)(&format!(
                            "in doubt: the destination may have the tree, which is held here until it answers ({why})"
                        ));
                    }
                    std::thread::sleep(RETRY / 10);
                }
            }
        }
    }
}

fn in_doubt(folder: &Path, what: &str) -> Error {
    Error::InDoubt { folder: folder.to_owned(), what: what.to_owned() }
}

/// Takes away what locks the connections of a tree that is elsewhere.
fn unlock(last: &Path) -> Result<()> {
    let images = Images::new(FolderStore::open(last)?);
    let inventory: Option<InventoryEntry> = images.read_one_if_there(ImageKind::Inventory, ())?;
    inventory.map_or(Ok(()), |inventory| netlock::unlock_here(&inventory))
}

fn remove_images(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name == "last" || name.starts_with("pass-") {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The destination, and how it is called.
#[derive(Clone, Copy)]
struct Peer<'a> {
    to: &'a str,
    options: &'a Options,
}

/// Says what is decided until there is an answer: over a connection that is there, then over new ones.
fn insist(channel: Option<Channel>, peer: Peer<'_>, decision: &Message) -> Result<Message> {
    let to = peer.to;
    let began = Instant::now();
    let mut channel = channel;
    loop {
        let said = match channel.take() {
            Some(channel) => Ok(channel),
            None => Channel::connect(to, CALL, peer.options),
        };
        let answer = said.and_then(|mut channel| {
            channel.say(decision)?;
            channel.outcome()
        });
        match answer {
            Ok(Message::Failed { what }) => return Err(Error::Usage { what: format!("{to} says: {what}") }),
            Ok(message) => return Ok(message),
            Err(e) if began.elapsed() > RETRY => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

/// Says that the source's tree has ended, until the destination's runs; its root's id there.
fn hand_over(channel: Option<Channel>, peer: Peer<'_>, id: &str) -> Result<i32> {
    let to = peer.to;
    match insist(channel, peer, &Message::Commit { id: id.to_owned() })? {
        Message::Running { pid } => Ok(pid),
        other => Err(Error::Usage { what: format!("{to} says what has no place here: {other:?}") }),
    }
}

/// Says that the source's tree goes on, until the destination's has ended.
fn call_off(peer: Peer<'_>, id: &str) -> Result<()> {
    let to = peer.to;
    match insist(None, peer, &Message::Abort { id: id.to_owned() })? {
        Message::Ended => Ok(()),
        other => Err(Error::Usage { what: format!("{to} says what has no place here: {other:?}") }),
    }
}

fn wait_end(channel: &mut Channel) -> Result<()> {
    loop {
        match channel.hear()? {
            Some(Message::Ended) | None => return Ok(()),
            Some(_) => {}
        }
    }
}

/// How a migration stands after [`resume`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumed {
    /// The tree runs at the destination, with this id.
    There(i32),
    /// It runs here.
    Here,
    /// It had ended by itself here, before anything was decided; the destination's was ended.
    Nowhere,
}

/// Decides a migration that was broken off, by the journal in its folder and what is left of the tree.
/// `to` is where the destination is now, if not where it was; `options` say whether connections are encrypted, and how.
pub fn resume(folder: &Path, to: Option<&str>, options: &Options) -> Result<Resumed> {
    let mut journal = Journal::read(folder)?;
    let to = to.unwrap_or(&journal.peer).to_owned();
    let peer = Peer { to: &to, options };
    // while somebody works on the tree, what it looks like says nothing; a holder of tracking does not count, and stays
    let patient = Instant::now();
    while journal.engine.standing() != Standing::Gone && patient.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(20));
    }
    match (journal.state, journal.tree.standing()) {
        (State::Done, _) => hand_over(None, peer, &journal.id).map(Resumed::There),
        (State::Committing, left @ (Standing::Gone | Standing::Part)) => {
            if left == Standing::Part {
                // it was decided that it ends, and some have
                journal.tree.end(ENDING)?;
            }
            let pid = hand_over(None, peer, &journal.id).map_err(|e| match journal.late {
                // what was left of its memory ended with it
                true => e,
                false => in_doubt(folder, &e.chain()),
            })?;
            journal.enter(State::Done, folder)?;
            if let Err(e) = unlock(&folder.join("last")) {
                tracing::warn!("the lock of its connections is left: {}", e.chain());
            }
            remove_images(folder);
            Ok(Resumed::There(pid))
        }
        (State::Moving | State::Prepared | State::Aborted | State::Committing, _) => {
            call_off(peer, &journal.id)?;
            journal.enter(State::Aborted, folder)?;
            remove_images(folder);
            let root_lives = journal.tree == Members::default() || journal.tree.standing() == Standing::Whole;
            Ok(if root_lives { Resumed::Here } else { Resumed::Nowhere })
        }
    }
}
