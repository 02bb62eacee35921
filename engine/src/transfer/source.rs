//! Where pages that are asked for come from.

use std::collections::HashMap;

use standstill_images::pages::PageChain;
use standstill_images::{ImageKind, Images};

use super::link::Link;
use super::wire::{Command, Message};
use crate::error::{Call, Error, Result};
use crate::memory::PAGE;

/// Whoever has pages of tasks.
pub trait Pages {
    /// Fills the buffer, whose length is one of whole pages, with what task `id` has from `address` on; how many bytes are
    /// there without a gap, 0 if there is not a page.
    fn read(&mut self, id: u32, address: u64, buffer: &mut [u8]) -> Result<usize>;
}

/// The images of a folder.
#[derive(Debug)]
pub struct Local {
    images: Images,
    chains: HashMap<u32, Chain>,
}

struct Chain(PageChain);

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Chain")
    }
}

impl Local {
    /// What these images have.
    pub fn new(images: Images) -> Local {
        Local { images, chains: HashMap::new() }
    }
}

impl Pages for Local {
    fn read(&mut self, id: u32, address: u64, buffer: &mut [u8]) -> Result<usize> {
        if !self.chains.contains_key(&id) {
            let chain = PageChain::open(&self.images, ImageKind::Pagemap, id, PAGE)?;
            self.chains.insert(id, Chain(chain));
        }
        let Some(Chain(chain)) = self.chains.get(&id) else { return Err(Error::Gone) };
        read_chain(chain, address, buffer)
    }
}

/// Reads what a chain of checkpoints has from `address` on, as far as there is no gap; how many bytes.
pub fn read_chain(chain: &PageChain, address: u64, buffer: &mut [u8]) -> Result<usize> {
    let Some(end) = address.checked_add(buffer.len() as u64) else { return Ok(0) };
    let mut done: usize = 0;
    for run in chain.located_in(address..end)? {
        let bytes = usize::try_from(run.pages * PAGE).unwrap_or(usize::MAX);
        let (true, Some(offset)) = (run.address == address + done as u64, run.offset) else { break };
        let Some(room) = buffer.get_mut(done..done.saturating_add(bytes)) else { break };
        match (run.zero, chain.pages(run.layer)) {
            (true, _) => room.fill(0),
            (false, Some(pages)) => pages.read_exact_at(room, offset).call("read(pages)")?,
            (false, None) => break,
        }
        done += bytes;
    }
    Ok(done)
}

/// Answers a request for pages.
pub fn answer_with_pages(link: &Link, from: &mut dyn Pages, message: &Message, buffer: &mut [u8]) -> Result<()> {
    let id = u32::try_from(message.target).map_err(|_| unknown(message))?;
    let most = usize::try_from(message.pages.saturating_mul(PAGE)).unwrap_or(usize::MAX).min(buffer.len());
    let room = &mut buffer[..most];
    let n = from.read(id, message.address, room)?;
    if n == 0 {
        return Err(unknown(message));
    }
    let command = Command::Add(standstill_images::pages::PE_PRESENT);
    link.send(&Message { command, pages: n as u64 / PAGE, ..*message }.encode())?;
    link.send(&room[..n])
}

fn unknown(message: &Message) -> Error {
    Error::Peer {
        what: format!("a page at {:x} of task {} is asked for, which is not there", message.address, message.target),
    }
}
