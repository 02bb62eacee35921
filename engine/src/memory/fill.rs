//! Filling the memory of a task from pages images, as one operation of its plan.
//!
//! What lies in one piece in a file may belong to many places in memory: preadv(2) moves it with one call. Runs are cut
//! into pieces that anyone can take: the task itself, and, where there is enough to do, helpers, which are processes
//! in the same memory (CLONE_VM) that end before the operation does. Memory is asked for in bulk (MADV_POPULATE_WRITE)
//! before it is filled; a fault for each page costs more than the page's bytes.
//!
//! Helpers get ids that nobody has and that no task of the tree is to have: an id that a helper holds when a thread of the
//! tree is to be born would end the restore. A helper that cannot be made is done without.

use std::collections::HashSet;

use standstill_restorer::plan::{Code, Expect};

use crate::plan::{Data, Plan};
use crate::tasks::pids;

/// Bytes of a piece, about.
const PIECE: u64 = 2 << 20;
/// Vectors of a piece: the kernel takes no more at once (IOV_MAX).
const VECTORS: usize = 1024;
/// Less than this is not worth a helper.
const WORTH_A_HELPER: u64 = 8 << 20;
/// The executor knows no more.
const MOST_HELPERS: usize = 63;
const STACK: usize = 4096;

/// Who may help, for all tasks of a tree.
#[derive(Debug, Default)]
pub struct Helpers {
    count: usize,
    taken: HashSet<i32>,
    next: i32,
}

impl Helpers {
    /// As many as there are processors besides the one that the task runs on, or one less than `jobs` says. `taken` are
    /// all ids of the tree.
    pub fn new(jobs: Option<usize>, taken: HashSet<i32>) -> Helpers {
        let processors = || std::thread::available_parallelism().map_or(1, usize::from);
        let count = (jobs.unwrap_or_else(processors).max(1) - 1).min(MOST_HELPERS);
        let limit = pids::limit();
        Helpers { count: if limit.is_some() { count } else { 0 }, taken, next: limit.unwrap_or(0) }
    }

    /// Ids that nobody has now.
    fn ids(&mut self, n: usize) -> Vec<i32> {
        let mut ids = Vec::with_capacity(n);
        while ids.len() < n {
            let Some(id) = pids::unused(self.next, &self.taken) else { break };
            self.next = id;
            ids.push(id);
        }
        ids
    }
}

/// A range of a file, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    fd: i32,
    offset: u64,
    address: u64,
    bytes: u64,
}

/// What is to be filled, in the order in which it is found.
#[derive(Debug, Default)]
pub struct Filling {
    runs: Vec<Run>,
    bytes: u64,
}

impl Filling {
    /// Adds `bytes` at `offset` of a file, for `address`.
    pub fn add(&mut self, fd: i32, offset: u64, address: u64, bytes: u64) {
        self.bytes += bytes;
        match self.runs.last_mut() {
            Some(r) if (r.fd, r.offset + r.bytes, r.address + r.bytes) == (fd, offset, address) => r.bytes += bytes,
            _ => self.runs.push(Run { fd, offset, address, bytes }),
        }
    }

    /// Pieces, each with its vectors (address and length).
    fn pieces(&self) -> (Vec<[u64; 4]>, Vec<u64>) {
        let mut pieces: Vec<[u64; 4]> = Vec::new();
        let mut vectors: Vec<u64> = Vec::new();
        // where the last piece ends in its file, and its bytes
        let (mut end, mut size) = ((-1, 0), 0);
        for run in &self.runs {
            let mut done = 0;
            while done < run.bytes {
                let at = (run.fd, run.offset + done);
                let bytes = (run.bytes - done).min(PIECE);
                match pieces.last_mut() {
                    Some(p) if end == at && size + bytes <= PIECE && p[3] < VECTORS as u64 => p[3] += 1,
                    _ => {
                        pieces.push([run.fd as u64, at.1, vectors.len() as u64 / 2, 1]);
                        size = 0;
                    }
                }
                vectors.extend([run.address + done, bytes]);
                done += bytes;
                size += bytes;
                end = (at.0, at.1 + bytes);
            }
        }
        (pieces, vectors)
    }

    /// Adds the operation, if there is anything to do.
    pub fn finish(self, helpers: &mut Helpers, plan: &mut Plan) {
        if self.runs.is_empty() {
            return;
        }
        let (pieces, vectors) = self.pieces();
        let mut queue = vec![0, 0, pieces.len() as u64, 0];
        queue.extend(pieces.iter().flatten());
        let queue = plan.words(&queue);
        let vectors = plan.words(&vectors);
        let wanted = helpers.count.min((self.bytes / WORTH_A_HELPER) as usize).min(pieces.len().saturating_sub(1));
        let ids = helpers.ids(wanted);
        let args = births(&ids, plan);
        let operands = [queue.into(), vectors.into(), args.into(), ids.len().into()];
        plan.op(Code::Fill, 0, &operands, Expect::NonNegative, [0; 2], "pages of areas");
    }
}

/// `struct clone_args` (clone3(2)) of each helper, one behind the other.
fn births(ids: &[i32], plan: &mut Plan) -> Data {
    const WORDS: usize = 11;
    const STACK_AT: u64 = 40;
    const SET_TID_AT: u64 = 64;
    let flags = (libc::CLONE_VM | libc::CLONE_FILES | libc::CLONE_FS) as u64;
    let all: Vec<u64> = ids.iter().flat_map(|_| [flags, 0, 0, 0, 0, 0, STACK as u64, 0, 0, 1, 0]).collect();
    let args = plan.words(&all);
    for (n, id) in ids.iter().enumerate() {
        let stack = plan.room(STACK);
        let tid = plan.bytes(&id.to_le_bytes());
        let at = (n * WORDS * 8) as u64;
        plan.pointer(args, at + STACK_AT, stack);
        plan.pointer(args, at + SET_TID_AT, tid);
    }
    args
}

/// About how many operations' room it takes to fill `bytes` bytes.
pub fn operations(bytes: u64) -> usize {
    usize::try_from(bytes / PIECE).unwrap_or(0) + 64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_together_in_the_file_is_one_piece() {
        let mut f = Filling::default();
        f.add(7, 0, 0x1000, 0x1000);
        f.add(7, 0x1000, 0x2000, 0x1000);
        f.add(7, 0x2000, 0x9000, 0x3000);
        f.add(7, 0x6000, 0x20000, 0x1000);
        f.add(8, 0x7000, 0x30000, 0x1000);
        let (pieces, vectors) = f.pieces();
        assert_eq!(pieces, [[7, 0, 0, 2], [7, 0x6000, 2, 1], [8, 0x7000, 3, 1]]);
        assert_eq!(vectors, [0x1000, 0x2000, 0x9000, 0x3000, 0x20000, 0x1000, 0x30000, 0x1000]);
    }

    #[test]
    fn much_is_many_pieces() {
        let mut f = Filling::default();
        f.add(7, 0, 0x100_0000, 5 * PIECE);
        let (pieces, vectors) = f.pieces();
        assert_eq!((pieces.len(), vectors.len()), (5, 10));
        assert_eq!(pieces[4], [7, 4 * PIECE, 4, 1]);
        let mut f = Filling::default();
        for n in 0..3000 {
            f.add(7, n * 4096, n * 8192, 4096);
        }
        let (pieces, _) = f.pieces();
        assert_eq!(
            pieces.iter().map(|p| p[3]).collect::<Vec<_>>(),
            [512; 5].into_iter().chain([440]).collect::<Vec<_>>()
        );
    }

    #[test]
    fn helpers_have_ids_of_their_own() {
        let taken: HashSet<i32> = HashSet::from([1, 2]);
        let mut helpers = Helpers::new(Some(4), taken);
        helpers.next = 32_000;
        helpers.taken.insert(31_999);
        let ids = helpers.ids(3);
        assert_eq!(ids.len(), 3);
        assert!(ids.iter().all(|id| *id < 31_999 && !pids::in_use(*id)));
    }

    #[test]
    fn little_is_done_alone() {
        let mut f = Filling::default();
        f.add(7, 0, 0x1000, 0x1000);
        let mut plan = Plan::new();
        f.finish(&mut Helpers { count: 3, taken: HashSet::new(), next: 30_000 }, &mut plan);
        assert_eq!(plan.len(), 1);
        Filling::default().finish(&mut Helpers::default(), &mut plan);
        assert_eq!(plan.len(), 1);
    }
}
