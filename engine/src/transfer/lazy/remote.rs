//! Pages of a server elsewhere: requests go out as they come, answers come back in the same order.

use std::sync::mpsc::{channel, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use standstill_images::pages::PE_PRESENT;

use crate::error::{Error, Result};
use crate::memory::PAGE;
use crate::options::Options;
use crate::transfer::link::{self, Link};
use crate::transfer::wire::{Command, Message};

/// A request that waits for its answer.
struct Request {
    asked: Message,
    answer: Sender<Result<Vec<u8>>>,
}

/// A connection to a server that gives pages.
#[derive(Debug)]
pub struct Remote {
    link: Arc<Link>,
    /// Held while a request is sent, so that they are noted in the order in which they go.
    requests: Mutex<Option<Sender<Request>>>,
    keep_open: bool,
}

impl Remote {
    /// Connects.
    pub fn connect(opts: &Options) -> Result<Remote> {
        Ok(Remote::over(Arc::new(link::connect(opts)?), opts.ps_socket.is_some()))
    }

    /// Over a connection, which is used by others afterwards if it is to be kept open.
    pub fn over(link: Arc<Link>, keep_open: bool) -> Remote {
        let (requests, waiting) = channel();
        let of_reader = link.clone();
        std::thread::spawn(move || read_answers(&of_reader, &waiting));
        Remote { link, requests: Mutex::new(Some(requests)), keep_open }
    }

    /// Asks for pages of a task; at least one comes, if there is no error.
    pub fn read(&self, id: u32, address: u64, bytes: u64) -> Result<Vec<u8>> {
        let asked = Message { command: Command::Get, pages: bytes / PAGE, address, target: id.into() };
        let (answer, wait) = channel();
        {
            let requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(requests) = &*requests else { return Err(lost()) };
            requests.send(Request { asked, answer }).map_err(|_| lost())?;
            self.link.send(&asked.encode())?;
        }
        wait.recv().map_err(|_| lost())?
    }

    /// Says that no more is wanted, if all has come.
    pub fn finish(&self, all: bool) {
        // the reader has nothing more to wait for
        *self.requests.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if !all {
            return self.link.cut();
        }
        let close = Message { command: Command::Close(self.keep_open), pages: 0, address: 0, target: 0 };
        let mut status = [0; 4];
        let said = self.link.send(&close.encode()).and_then(|()| self.link.receive(&mut status));
        if let Err(e) = said {
            tracing::warn!("the page server does not answer: {e}");
        }
        self.link.end();
    }
}

fn lost() -> Error {
    Error::Peer { what: "Remote side closed connection".into() }
}

fn read_answers(link: &Link, waiting: &Receiver<Request>) {
    for Request { asked, answer } in waiting {
        let read = read_answer(link, &asked);
        let broken = read.is_err();
        // who asked may be gone
        let _ = answer.send(read);
        if broken {
            return link.cut();
        }
    }
}

fn read_answer(link: &Link, asked: &Message) -> Result<Vec<u8>> {
    let message = link.message()?.ok_or_else(lost)?;
    let wrong = |what: &str| Error::Peer { what: format!("the page server answers with {what}") };
    if message.command != Command::Add(PE_PRESENT) || (message.address, message.target) != (asked.address, asked.target)
    {
        return Err(wrong("something else than what it was asked for"));
    }
    if message.pages == 0 || message.pages > asked.pages {
        return Err(wrong("another number of pages"));
    }
    let mut pages = vec![0; usize::try_from(message.pages * PAGE).map_err(|_| wrong("too much"))?];
    link.receive(&mut pages)?;
    Ok(pages)
}
