//! The page server: takes the pages of a dump elsewhere into its own folder (`page-server`), or gives those of its folder
//! to a restore elsewhere (`page-server --lazy-pages`).
//!
//! Images: `pagemap-N.img`, `pagemap-shmem-N.img` and a `pages-M.img` of each. M begins high, as CRIU has it, since the
//! dump may write its other images into the same folder. Pages of zeros stay holes in the file. The folder's parent is what
//! the link `parent` leads to when a pagemap is begun; a page that is said to be there and is not is an error. One connection is
//! served, to its end. What came over one that broke is no checkpoint.
//!
//! With `--auto-dedup` what was replaced is freed in the parents when everything has arrived.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};

use standstill_images::pages::{PageMap, PageMapWriter, PageState, PE_LAZY, PE_PARENT, PE_PRESENT};
use standstill_images::{FolderStore, ImageKind, ImageOutput, Images};

use super::link::{self, Link, Side};
use super::source::{answer_with_pages, Local, Pages};
use super::wire::{Command, Message, Target};
use crate::error::{Call, Error, Result};
use crate::memory::drain::write_content;
use crate::memory::{dedup, PAGE};
use crate::options::Options;

/// Numbers of pages images begin behind this one.
const BASE: u32 = 0x10000;
/// Bytes that are given at once.
const MOST_AT_ONCE: usize = 4 << 20;
/// Bytes that are received and written at once.
const BUFFER: usize = 256 << 10;

fn wrong(what: impl Into<String>) -> Error {
    Error::Peer { what: what.into() }
}

/// A socket for a server: one that others connect to, or one that is connected.
#[derive(Debug)]
pub struct Socket {
    /// The socket.
    pub fd: OwnedFd,
    /// Whether someone has to connect first.
    pub listens: bool,
}

/// The socket that the options name, and its port.
pub fn socket(opts: &Options) -> Result<(Socket, u16)> {
    if let Some(fd) = opts.ps_socket {
        tracing::info!("Reusing ps socket {fd}");
        let socket = Socket { fd: crate::sys::calls::dup_number(fd)?, listens: false };
        return Ok((socket, opts.port.unwrap_or(0)));
    }
    let (listener, port) = link::listen(opts)?;
    Ok((Socket { fd: listener.into(), listens: true }, port))
}

/// The folder of the images, linked to the one that they build on, if that is said.
pub fn open_images(opts: &Options) -> Result<Images> {
    let folder = FolderStore::open(&opts.images_dir)?;
    if let Some(parent) = &opts.prev_images_dir {
        folder.set_parent(Some(parent))?;
    }
    Ok(Images::new(folder))
}

/// Serves one who connects, or is connected.
pub fn run(socket: Socket, opts: &Options) -> Result<()> {
    let images = open_images(opts)?;
    let link = if socket.listens {
        let link = link::accept(socket.fd.as_fd(), opts)?;
        drop(socket);
        link
    } else {
        Link::new(socket.fd, opts, Side::Server)?
    };
    let served = serve(&link, &images, opts);
    link.end();
    if served.is_ok() && opts.ps_socket.is_none() {
        link.wait_for_end();
    }
    tracing::info!("Session over");
    served
}

/// Gives pages to one who connects, until it has them all.
pub fn run_for(socket: Socket, opts: &Options, from: &mut dyn Pages) -> Result<()> {
    let link =
        if socket.listens { link::accept(socket.fd.as_fd(), opts)? } else { Link::new(socket.fd, opts, Side::Server)? };
    give(&link, from)
}

/// The same over a connection.
pub fn give(link: &Link, from: &mut dyn Pages) -> Result<()> {
    let mut buffer = vec![0; MOST_AT_ONCE];
    while let Some(message) = link.message()? {
        match message.command {
            Command::Get => answer_with_pages(link, from, &message, &mut buffer)?,
            Command::Close(_) => {
                link.send(&0i32.to_le_bytes())?;
                link.end();
                return Ok(());
            }
            _ => return Err(wrong("the other side is to ask for pages, and does something else")),
        }
    }
    Err(wrong("The other side is gone before it had all pages"))
}

/// Serves one connection.
pub fn serve(link: &Link, images: &Images, opts: &Options) -> Result<()> {
    let mut session = Session {
        link,
        images,
        pages_id: BASE,
        open: None,
        buffer: vec![0; BUFFER],
        lazy: opts.lazy_pages.then(|| Local::new(images.clone())),
    };
    let mut received = 0;
    while let Some(message) = link.message()? {
        if let Command::Close(_) = message.command {
            let finished = session.finish(opts);
            let status: i32 = if finished.is_ok() { 0 } else { -1 };
            link.send(&status.to_le_bytes())?;
            tracing::info!("{received} pages received");
            return finished;
        }
        received += session.one(&message)?;
    }
    if opts.lazy_pages {
        return Ok(());
    }
    Err(wrong("The data were not flushed"))
}

struct Session<'a> {
    link: &'a Link,
    images: &'a Images,
    pages_id: u32,
    open: Option<Open>,
    buffer: Vec<u8>,
    lazy: Option<Local>,
}

/// A pagemap that is being received.
struct Open {
    target: Target,
    map: PageMapWriter,
    pages: Box<dyn ImageOutput>,
    written: u64,
    parent: Option<PageMap>,
}

impl Open {
    fn new(images: &Images, target: Target, pages_id: u32) -> Result<Open> {
        let parent = match images.parent()? {
            Some(parent) if parent.exists(target.kind, target.id)? => {
                Some(PageMap::read(&parent, target.kind, target.id, PAGE)?)
            }
            _ => None,
        };
        let map = PageMapWriter::create(images, target.kind, target.id, pages_id, PAGE)?;
        let pages = images.create_raw(ImageKind::Pages, pages_id)?;
        Ok(Open { target, map, pages, written: 0, parent })
    }

    fn finish(self) -> Result<()> {
        if let Some(file) = self.pages.as_file() {
            // pages of zeros at the end were not written
            rustix::fs::ftruncate(file, self.written).call("ftruncate")?;
        }
        self.pages.finish()?;
        Ok(self.map.finish()?)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        let file: Option<&File> = self.pages.as_file();
        match file {
            Some(file) => write_content(file, bytes, self.written)?,
            None => self.pages.write_all(bytes).call("write(pages)")?,
        }
        self.written += bytes.len() as u64;
        Ok(())
    }
}

impl Session<'_> {
    fn one(&mut self, message: &Message) -> Result<u64> {
        match message.command {
            Command::Get => {
                let lazy = self.lazy.as_mut().ok_or_else(|| wrong("pages are asked for, and none are served"))?;
                answer_with_pages(self.link, lazy, message, &mut self.buffer)?;
                Ok(0)
            }
            _ if self.lazy.is_some() => Err(wrong("pages are sent to a server that has none to take (--lazy-pages)")),
            Command::Open(answer) => {
                let target = self.target(message)?;
                let has_parent = self.begin(target)?;
                if answer {
                    self.link.send(&[has_parent.into()])?;
                }
                Ok(0)
            }
            Command::HasParent => {
                let target = self.target(message)?;
                let parent = self.images.parent()?;
                let has = parent.map_or(Ok(false), |parent| parent.exists(target.kind, target.id))?;
                self.link.send(&i32::from(has).to_le_bytes())?;
                Ok(0)
            }
            Command::Add(flags) => self.add(message, flags),
            Command::Close(_) => Ok(0),
        }
    }

    fn target(&self, message: &Message) -> Result<Target> {
        Target::from_wire(message.target).ok_or_else(|| wrong("Unknown pagemap type received"))
    }

    /// Begins a pagemap; whether the parent has it.
    fn begin(&mut self, target: Target) -> Result<bool> {
        tracing::info!("Opening {:?} {}", target.kind, target.id);
        if let Some(before) = self.open.take() {
            before.finish()?;
        }
        self.pages_id = self.pages_id.wrapping_add(1);
        let open = Open::new(self.images, target, self.pages_id)?;
        let has_parent = open.parent.is_some();
        self.open = Some(open);
        Ok(has_parent)
    }

    fn add(&mut self, message: &Message, flags: u32) -> Result<u64> {
        const PRESENT_LAZY: u32 = PE_PRESENT | PE_LAZY;
        let state = match flags {
            PE_PRESENT => PageState::Present,
            PRESENT_LAZY => PageState::PresentLazy,
            PE_PARENT => PageState::Parent,
            PE_LAZY => PageState::Lazy,
            _ => return Err(wrong(format!("pages with flags {flags:#x}"))),
        };
        let target = self.target(message)?;
        if self.open.as_ref().is_none_or(|open| open.target != target) {
            tracing::warn!("Deprecated IO w/o open");
            self.begin(target)?;
        }
        let Some(open) = &mut self.open else { return Err(Error::Gone) };
        let bytes = message.pages.checked_mul(PAGE).ok_or_else(|| wrong("a run without end"))?;
        open.map.add(message.address, message.pages, state)?;
        if let (PageState::Parent, Some(parent)) = (state, &open.parent) {
            covered(parent, message.address, bytes)?;
        }
        if !matches!(state, PageState::Present | PageState::PresentLazy) {
            return Ok(0);
        }
        let mut left = bytes;
        while left > 0 {
            let n = usize::try_from(left).unwrap_or(BUFFER).min(BUFFER);
            let room = &mut self.buffer[..n];
            self.link.receive(room)?;
            open.put(room)?;
            left -= n as u64;
        }
        Ok(message.pages)
    }

    fn finish(&mut self, opts: &Options) -> Result<()> {
        if let Some(open) = self.open.take() {
            open.finish()?;
        }
        self.images.commit()?;
        if opts.auto_dedup && self.lazy.is_none() {
            dedup::free_in_parents(self.images)?;
        }
        Ok(())
    }
}

/// An error if the parent does not have all of a run.
fn covered(parent: &PageMap, address: u64, bytes: u64) -> Result<()> {
    let mut at = address;
    for run in parent.in_range(address..address.saturating_add(bytes)) {
        if run.address != at {
            break;
        }
        at = run.end(PAGE);
    }
    match at {
        at if at >= address + bytes => Ok(()),
        missing => Err(wrong(format!("Missing {missing:x} in parent pagemap"))),
    }
}
