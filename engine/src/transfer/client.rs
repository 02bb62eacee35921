//! The side that has pages, and sends them to a page server (`dump --page-server`).
//!
//! Pagemaps are sent one after another, whoever's they are: the pages of one are read by all threads, a window of pieces
//! while the one before is sent, so that a slow server holds reading back. What the server's parent does not have is sent
//! although it has not changed.
//!
//! A dump that the next one may build on needs to know what the server has: `sent-N.img`, in the folder of the images, is
//! the pagemap of task N as it was sent. CRIU has no such file, and does not look at ours.

use std::sync::{Mutex, PoisonError};

use standstill_images::pages::{PageMap, PageState, PE_LAZY, PE_PARENT, PE_PRESENT};
use standstill_images::proto::{PagemapEntry, PagemapHead};
use standstill_images::{Image, ImageKind, Images, Writer};

use super::link::{self, Link};
use super::wire::{Command, Message, Target};
use crate::error::{Error, Result};
use crate::memory::compress::{self, Part, Stretch};
use crate::memory::PAGE;
use crate::options::Options;
use crate::progress::Counter;
use crate::sys::interrupt;

/// Pieces of a window, for each thread.
const WINDOW: usize = 2;

/// A connection to a page server.
#[derive(Debug)]
pub struct Client {
    link: Link,
    one: Mutex<()>,
    keep_open: bool,
    note: bool,
}

/// The flags of a pagemap entry.
pub fn flags(state: PageState) -> u32 {
    match state {
        PageState::Present => PE_PRESENT,
        PageState::PresentLazy => PE_PRESENT | PE_LAZY,
        PageState::Parent => PE_PARENT,
        PageState::Lazy => PE_LAZY,
    }
}

impl Client {
    /// Connects to the server, if the options name one. `note`: another dump may build on this one.
    pub fn connect(opts: &Options, note: bool) -> Result<Option<Client>> {
        if !opts.use_page_server {
            return Ok(None);
        }
        let link = link::connect(opts)?;
        Ok(Some(Client { link, one: Mutex::new(()), keep_open: opts.ps_socket.is_some(), note }))
    }

    /// Sends a pagemap, which is told whether the server has a parent of it, and its pages. `read` fills a buffer with parts,
    /// one after another. Not to be called by several of a pool's threads at a time.
    pub fn send<F>(
        &self,
        target: Target,
        stretches: impl FnOnce(bool) -> Vec<Stretch>,
        read: F,
        counter: &Counter,
    ) -> Result<Vec<Stretch>>
    where
        F: Fn(&[Part], &mut [u8]) -> Result<()> + Sync,
    {
        use rayon::prelude::*;
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        self.link.send(&Message::about(Command::Open(true), target).encode())?;
        let mut answer = [0];
        self.link.receive(&mut answer)?;
        let stretches = stretches(answer != [0]);
        let batches = compress::batches(&stretches, 1);
        let read_all = |window: &[Vec<Part>]| match window {
            [] => Ok(Vec::new()),
            [only] => Ok(vec![encode(only, target, &stretches, &read)?]),
            many => many.par_iter().map(|batch| encode(batch, target, &stretches, &read)).collect::<Result<Vec<_>>>(),
        };
        let mut windows = batches.chunks(WINDOW * rayon::current_num_threads()).peekable();
        let mut ready = read_all(windows.peek().copied().unwrap_or_default())?;
        while windows.next().is_some() {
            let send = || {
                ready.iter().try_for_each(|Encoded { bytes, cuts, pages }| {
                    self.link.send_cut(bytes, cuts)?;
                    counter.add(*pages);
                    Ok(())
                })
            };
            ready = match windows.peek() {
                Some(next) => {
                    let (sent, next) = rayon::join(send, || read_all(next));
                    sent.and(next)?
                }
                None => {
                    send()?;
                    Vec::new()
                }
            };
        }
        Ok(stretches)
    }

    /// Notes what the server has now of a task, for the next dump.
    pub fn note(&self, images: &Images, id: u32, sent: &[Stretch]) -> Result<()> {
        if !self.note {
            return Ok(());
        }
        let name = note_name(id);
        let mut image = Writer::new(ImageKind::Pagemap, name.clone(), images.store().create(&name)?);
        image.write(&PagemapHead { pages_id: 0 })?;
        for stretch in sent {
            // no image of pages goes with it, so nothing may be said to be in one
            let flags = PE_PARENT;
            let (vaddr, nr_pages) = (stretch.address, Some(stretch.bytes / PAGE));
            image.write(&PagemapEntry { vaddr, nr_pages, flags: Some(flags), ..PagemapEntry::default() })?;
        }
        Ok(image.into_inner()?.finish()?)
    }

    /// Everything is sent: waits until the server has it.
    pub fn finish(&self) -> Result<()> {
        let close = Message { command: Command::Close(self.keep_open), pages: 0, address: 0, target: 0 };
        self.link.send(&close.encode())?;
        let mut status = [0; 4];
        self.link.receive(&mut status)?;
        if !self.keep_open {
            self.link.end();
        }
        match i32::from_le_bytes(status) {
            0 => Ok(()),
            status => Err(Error::Peer { what: format!("The page server could not keep all pages: it says {status}") }),
        }
    }
}

/// Parts as they are sent.
struct Encoded {
    bytes: Vec<u8>,
    /// Where messages begin and end.
    cuts: Vec<usize>,
    /// How many bytes of pages are in there.
    pages: u64,
}

fn encode(
    parts: &[Part],
    target: Target,
    stretches: &[Stretch],
    read: &(impl Fn(&[Part], &mut [u8]) -> Result<()> + Sync),
) -> Result<Encoded> {
    interrupt::check()?;
    let state = |part: &Part| stretches.get(part.of).map(|stretch| stretch.state).ok_or(Error::Gone);
    let mut stored = Vec::with_capacity(parts.len());
    for part in parts {
        if compress::is_stored(state(part)?) {
            stored.push(*part);
        }
    }
    let mut pages = vec![0; stored.iter().map(Part::len).sum()];
    read(&stored, &mut pages)?;
    let mut bytes = Vec::with_capacity(pages.len() + parts.len() * super::wire::LEN);
    let (mut rest, mut cuts) = (pages.as_slice(), Vec::with_capacity(parts.len() * 2));
    for part in parts {
        let (len, state) = (part.len(), state(part)?);
        let run = Command::Add(flags(state));
        let message =
            Message { command: run, pages: len as u64 / PAGE, address: part.address, target: target.to_wire() };
        cuts.push(bytes.len());
        bytes.extend_from_slice(&message.encode());
        cuts.push(bytes.len());
        if compress::is_stored(state) {
            let (content, after) = rest.split_at(len);
            bytes.extend_from_slice(content);
            rest = after;
        }
    }
    Ok(Encoded { bytes, cuts, pages: pages.len() as u64 })
}

const NOTE: &str = "sent-";

fn note_name(id: u32) -> String {
    format!("{NOTE}{id}.img")
}

/// Takes the notes of an older dump out of a folder.
pub fn remove_notes(images: &Images) -> Result<()> {
    for name in images.store().list()? {
        if name.starts_with(NOTE) && name.ends_with(".img") {
            images.store().remove(&name)?;
        }
    }
    Ok(())
}

/// What a server has of a task, if that was noted in these images.
pub fn noted(images: &Images, id: u32) -> Result<Option<PageMap>> {
    let name = note_name(id);
    if !images.store().exists(&name)? {
        return Ok(None);
    }
    let image = Image::new(ImageKind::Pagemap, name.clone(), images.store().read(&name)?);
    let (head, entries) = image.reader()?.pagemap()?;
    Ok(Some(PageMap::new(&name, &head, &entries, PAGE, Some(0))?))
}
