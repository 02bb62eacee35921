//! The messages between CRIU and its page server, as bytes.
//!
//! A message is 32 bytes, little-endian: u32 command, 4 bytes that nobody reads, u64 pages, u64 address, u64 target. The
//! low 16 bits of the command say what is asked, the high ones are flags of a pagemap entry. The target is a number and,
//! in its lowest byte, what the number is of: 1 a task, 2 shared memory (old versions had other numbers for both). In a
//! request for pages it is the number of a task alone.
//!
//! | command | what it asks | then |
//! |---|---|---|
//! | 1, 2, 6 | a run of pages: present, in the parent, or as the flags say | present ones follow |
//! | 3, 4 | begin the pagemap of a target | 4: one byte comes back, 1 if the parent has it |
//! | 5 | has the parent this target? | four bytes come back, 1 if so |
//! | 7 | send pages of a task | command 6 comes back, with as many pages as there are at once, then they |
//! | 0x1023, 0x1024 | everything is sent | four bytes come back, 0 if everything arrived |

use standstill_images::ImageKind;

/// How long a message is.
pub const LEN: usize = 32;

const ADD: u32 = 1;
const HOLE: u32 = 2;
const OPEN: u32 = 3;
const OPEN_AND_ANSWER: u32 = 4;
const HAS_PARENT: u32 = 5;
const ADD_AS: u32 = 6;
const GET: u32 = 7;
const CLOSE: u32 = 0x1023;
const FORCE_CLOSE: u32 = 0x1024;
const MASK: u32 = 0xffff;

const OF_TASK: u64 = 1;
const OF_SHARED: u64 = 2;

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// A run of pages, with the flags of its pagemap entry.
    Add(u32),
    /// Begin a pagemap; `true`: an answer is waited for.
    Open(bool),
    /// Has the parent this target?
    HasParent,
    /// Send pages.
    Get,
    /// All is sent. `true`: the connection may stay open, the session is over all the same.
    Close(bool),
}

/// One message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// What is asked.
    pub command: Command,
    /// How many pages.
    pub pages: u64,
    /// Address of the first one.
    pub address: u64,
    /// Whose.
    pub target: u64,
}

/// A command that nobody knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Unknown command {0}")]
pub struct Unknown(pub u32);

/// What pages belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Target {
    /// Kind of the pagemap.
    pub kind: ImageKind,
    /// Its number.
    pub id: u32,
}

impl Target {
    /// The pages of a task.
    pub fn task(id: u32) -> Target {
        Target { kind: ImageKind::Pagemap, id }
    }

    /// As a message has it.
    pub fn to_wire(self) -> u64 {
        let kind = if self.kind == ImageKind::ShmemPagemap { OF_SHARED } else { OF_TASK };
        u64::from(self.id) << 8 | kind
    }

    /// From a message; nothing if it is of no kind, or its number is too large for an image.
    pub fn from_wire(word: u64) -> Option<Target> {
        let kind = match word & 0xff {
            OF_TASK | 10 | 11 | 16 | 17 => ImageKind::Pagemap,
            OF_SHARED | 27 | 28 | 29 | 32 | 33 | 34 => ImageKind::ShmemPagemap,
            _ => return None,
        };
        Some(Target { kind, id: u32::try_from(word >> 8).ok()? })
    }
}

impl Message {
    /// A command without pages.
    pub fn about(command: Command, target: Target) -> Message {
        Message { command, pages: 0, address: 0, target: target.to_wire() }
    }

    /// Its bytes.
    pub fn encode(&self) -> [u8; LEN] {
        let command = match self.command {
            Command::Add(flags) => flags << 16 | ADD_AS,
            Command::Open(true) => OPEN_AND_ANSWER,
            Command::Open(false) => OPEN,
            Command::HasParent => HAS_PARENT,
            Command::Get => GET,
            Command::Close(false) => CLOSE,
            Command::Close(true) => FORCE_CLOSE,
        };
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&command.to_le_bytes());
        for (room, word) in bytes[8..].chunks_exact_mut(8).zip([self.pages, self.address, self.target]) {
            room.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// From its bytes.
    ///
    /// # Errors
    /// If the command is none.
    pub fn decode(bytes: &[u8; LEN]) -> Result<Message, Unknown> {
        use standstill_images::pages::{PE_PARENT, PE_PRESENT};
        let word = |at: usize| bytes[at..].iter().take(8).rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let raw = word(0) as u32;
        let command = match raw & MASK {
            ADD => Command::Add(PE_PRESENT),
            HOLE => Command::Add(PE_PARENT),
            ADD_AS => Command::Add(raw >> 16),
            OPEN => Command::Open(false),
            OPEN_AND_ANSWER => Command::Open(true),
            HAS_PARENT => Command::HasParent,
            GET => Command::Get,
            CLOSE => Command::Close(false),
            FORCE_CLOSE => Command::Close(true),
            _ => return Err(Unknown(raw)),
        };
        Ok(Message { command, pages: word(8), address: word(16), target: word(24) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let commands = [
            Command::Add(6),
            Command::Open(false),
            Command::Open(true),
            Command::HasParent,
            Command::Get,
            Command::Close(false),
            Command::Close(true),
        ];
        for command in commands {
            let message = Message { command, pages: 3, address: 0x7fff_0000_1000, target: 0x12_3401 };
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn the_bytes_are_crius() {
        let message =
            Message { command: Command::Add(4), pages: 2, address: 0x40_0000, target: Target::task(7).to_wire() };
        let mut expected = [0u8; LEN];
        expected[..4].copy_from_slice(&[6, 0, 4, 0]);
        (expected[8], expected[18]) = (2, 0x40);
        expected[24..26].copy_from_slice(&[1, 7]);
        assert_eq!(message.encode(), expected);
        let mut unread = expected;
        unread[4..8].fill(0xaa);
        assert_eq!(Message::decode(&unread), Ok(message));
    }

    #[test]
    fn old_numbers_and_none() {
        let shared = Target { kind: ImageKind::ShmemPagemap, id: 9 };
        assert_eq!(Target::from_wire(9 << 8 | 34), Some(shared));
        assert_eq!(Target::from_wire(shared.to_wire()), Some(shared));
        assert_eq!(Target::from_wire(7 << 8 | 11), Some(Target::task(7)));
        assert_eq!(Target::from_wire(7 << 8 | 99), None);
        assert_eq!(Target::from_wire(u64::MAX - 0xfe), None);
        let mut bytes = [0; LEN];
        bytes[0] = 0x77;
        assert_eq!(Message::decode(&bytes), Err(Unknown(0x77)));
    }
}
