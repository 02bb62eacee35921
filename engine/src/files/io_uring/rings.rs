//! The memory of a ring: how large it is, and what is in it.

use std::os::fd::BorrowedFd;

use standstill_images::proto::StandstillIoUringEntry;

use crate::error::Result;
use crate::sys::io_uring::{self as sys, setup, Words};
use crate::sys::memory::Shared;

const PAGE: usize = 4096;
/// The most pages that rings of the largest size take.
const MOST_PAGES: usize = 1 << 18;
/// Completions begin at a cache line, and so does what follows them.
const LINE: usize = 64;

/// What a ring is made of.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) flags: u32,
    pub(super) sq_entries: u32,
    pub(super) cq_entries: u32,
}

impl Shape {
    pub(super) fn of(e: &StandstillIoUringEntry) -> Shape {
        Shape { flags: e.setup, sq_entries: e.sq_entries, cq_entries: e.cq_entries }
    }

    fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub(super) fn cqe_size(&self) -> usize {
        if self.has(setup::CQE32) {
            32
        } else {
            16
        }
    }

    pub(super) fn sqe_size(&self) -> usize {
        if self.has(setup::SQE128) {
            128
        } else {
            64
        }
    }

    pub(super) fn cqes(&self) -> usize {
        self.cq_entries as usize * self.cqe_size()
    }

    pub(super) fn sqes(&self) -> usize {
        self.sq_entries as usize * self.sqe_size()
    }

    /// Where the indices are, behind the completions, and how many bytes; nothing if there are none.
    pub(super) fn array(&self, words: &Words) -> Option<(usize, usize)> {
        let at = self.end(words).next_multiple_of(LINE);
        (!self.has(setup::NO_SQARRAY)).then_some((at, self.sq_entries as usize * 4))
    }

    /// Where completions end.
    fn end(&self, words: &Words) -> usize {
        let before = words.cqes as usize;
        self.cqes() + if words.doubled && self.has(setup::CQE32) { 2 * before } else { before }
    }

    /// Bytes of the rings, in whole pages.
    pub(super) fn rings(&self, words: &Words) -> usize {
        let end = self.end(words);
        self.array(words).map_or(end, |(at, len)| at + len).next_multiple_of(PAGE)
    }

    /// The flags, with those that the sizes of what can be mapped tell; `None` if nothing can. Of small rings, the sizes are the
    /// same whatever they are: then [`Shape::by_text`] knows.
    pub(super) fn by_size(mut self, ring: BorrowedFd<'_>) -> Option<u32> {
        let sqes = sys::pages(ring, sys::OFF_SQES, MOST_PAGES) * PAGE;
        let rings = sys::pages(ring, sys::OFF_SQ_RING, MOST_PAGES) * PAGE;
        let words = sys::words().ok()?;
        if sqes == 0 || rings == 0 {
            return None;
        }
        if sqes > self.sqes().next_multiple_of(PAGE) {
            self.flags |= setup::SQE128;
        }
        let plain = Shape { flags: self.flags | setup::NO_SQARRAY, ..self };
        let with = Shape { flags: self.flags, ..self };
        if rings > with.rings(&words) {
            self.flags |= setup::CQE32;
        } else if rings < with.rings(&words) && rings == plain.rings(&words) {
            self.flags |= setup::NO_SQARRAY;
        }
        if self.has(setup::CQE32) && rings < self.rings(&words) {
            self.flags |= setup::NO_SQARRAY;
        }
        Some(self.flags)
    }

    /// The flags that the text of `fdinfo` tells, with an entry in each queue. Of a ring without an array it shows no
    /// submission: then what is in their memory tells how large they are.
    pub(super) fn by_text(mut self, text: &[u8], behind: &[u8]) -> u32 {
        let line = |key: &[u8]| text.split(|&b| b == b'\n').find(|line| line.windows(key.len()).any(|w| w == key));
        let has = |line: &[u8], word: &[u8]| line.windows(word.len()).any(|w| w == word);
        match line(b": opcode:") {
            Some(line) if has(line, b", e0:") => self.flags |= setup::SQE128,
            None if behind.iter().any(|&b| b != 0) => self.flags |= setup::SQE128,
            Some(_) | None => {}
        }
        if line(b": user_data:").is_some_and(|line| has(line, b", extra1:")) {
            self.flags |= setup::CQE32;
        }
        self.flags
    }
}

/// What was in the rings.
#[derive(Debug)]
pub(super) struct Content {
    rings: Shared,
    sqes: Shared,
    words: Words,
    shape: Shape,
}

impl Content {
    pub(super) fn map(ring: BorrowedFd<'_>, shape: Shape) -> Result<Content> {
        let words = sys::words()?;
        let rings = Shared::map(ring, sys::OFF_SQ_RING, shape.rings(&words))?;
        let sqes = Shared::map(ring, sys::OFF_SQES, shape.sqes().next_multiple_of(PAGE))?;
        Ok(Content { rings, sqes, words, shape })
    }

    /// What lies behind submissions of the smaller size, as far as larger ones would reach.
    pub(super) fn behind(&self) -> Vec<u8> {
        let small = self.shape.sq_entries as usize * 64;
        let mut bytes = vec![0; small.min(self.sqes.len().saturating_sub(small))];
        self.sqes.read(self.sqes.len().min(small), &mut bytes);
        bytes
    }

    fn word(&self, at: u32) -> u32 {
        let mut bytes = [0; 4];
        self.rings.read(at as usize, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(super) fn dropped(&self) -> u32 {
        self.word(self.words.sq_dropped)
    }

    pub(super) fn lost(&self) -> u32 {
        self.word(self.words.cq_overflow)
    }

    pub(super) fn sqes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.shape.sqes()];
        self.sqes.read(0, &mut bytes);
        bytes
    }

    pub(super) fn cqes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.shape.cqes()];
        self.rings.read(self.words.cqes as usize, &mut bytes);
        bytes
    }

    /// The indices. All zeros, if the SQEs show that others than the first were used, are those of a ring without an array:
    /// then each stands at its own place, where nobody changes it.
    pub(super) fn array(&self, submitted: u32) -> Vec<u8> {
        let Some((at, len)) = self.shape.array(&self.words) else { return Vec::new() };
        let mut bytes = vec![0; len];
        self.rings.read(at, &mut bytes);
        let others = self.sqes().get(self.shape.sqe_size()..).is_some_and(|rest| rest.iter().any(|&b| b != 0));
        if bytes.iter().all(|&b| b == 0) && (others || submitted < 2) {
            bytes = (0..self.shape.sq_entries).flat_map(u32::to_le_bytes).collect();
        }
        bytes
    }

    /// Everything into the entry.
    pub(super) fn into_entry(self, e: &mut StandstillIoUringEntry) {
        (e.sq_head, e.sq_tail) = (self.word(self.words.sq_head), self.word(self.words.sq_tail));
        (e.cq_head, e.cq_tail) = (self.word(self.words.cq_head), self.word(self.words.cq_tail));
        (e.sq_dropped, e.cq_overflow) = (self.dropped(), self.lost());
        e.cq_flags = self.word(self.words.cq_flags);
        (e.cqes, e.sqes) = (self.cqes(), self.sqes());
        e.sq_array = self.array(e.sq_head);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_tells_large_entries() {
        let shape = Shape { flags: 0, sq_entries: 4, cq_entries: 8 };
        let small = b"SQEs:\t1\n    0: opcode:NOP, fd:0, user_data:0\nCQEs:\t1\n    7: user_data:0, res:0, flag:0\n";
        assert_eq!(shape.by_text(small, &[1]), 0);
        let large =
            b"SQEs:\t1\n    0: opcode:NOP, fd:0, user_data:0, e0:0x0\nCQEs:\t1\n    7: user_data:0, res:0, flag:0, \
            extra1:0, extra2:0\n\n";
        assert_eq!(shape.by_text(large, &[0]), setup::SQE128 | setup::CQE32);
        let none = b"SQEs:\t1\nCQEs:\t1\n    7: user_data:0, res:0, flag:0\n";
        assert_eq!((shape.by_text(none, &[0]), shape.by_text(none, &[0, 1])), (0, setup::SQE128));
    }

    #[test]
    fn the_array_lies_behind_the_completions() {
        let words = Words {
            sq_head: 0,
            sq_tail: 4,
            sq_dropped: 32,
            cq_head: 8,
            cq_tail: 12,
            cq_flags: 40,
            cq_overflow: 44,
            cqes: 64,
            doubled: true,
        };
        let shape = Shape { flags: 0, sq_entries: 8, cq_entries: 16 };
        assert_eq!(shape.array(&words), Some((320, 32)));
        assert_eq!(shape.rings(&words), 4096);
        let large = Shape { flags: setup::CQE32, ..shape };
        assert_eq!(large.array(&words), Some((640, 32)));
        let none = Shape { flags: setup::NO_SQARRAY, sq_entries: 128, cq_entries: 252 };
        assert_eq!((none.array(&words), none.rings(&words)), (None, 4096));
    }
}
