//! io_uring: where the words of a ring are, and questions that change nothing.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use super::memory::{read_remote, Shared};
use crate::error::{Error, Result};

/// Offsets of the rings (mmap(2)).
pub const OFF_SQ_RING: u64 = 0;
/// The same memory on every kernel that has IORING_FEAT_SINGLE_MMAP.
pub const OFF_CQ_RING: u64 = 0x800_0000;
/// The submissions themselves.
pub const OFF_SQES: u64 = 0x1000_0000;

/// IORING_SETUP_.
#[allow(missing_docs)]
pub mod setup {
    pub const IOPOLL: u32 = 1 << 0;
    pub const SQPOLL: u32 = 1 << 1;
    pub const SQ_AFF: u32 = 1 << 2;
    pub const CQSIZE: u32 = 1 << 3;
    pub const R_DISABLED: u32 = 1 << 6;
    pub const SUBMIT_ALL: u32 = 1 << 7;
    pub const SQE128: u32 = 1 << 10;
    pub const CQE32: u32 = 1 << 11;
    pub const SINGLE_ISSUER: u32 = 1 << 12;
    pub const DEFER_TASKRUN: u32 = 1 << 13;
    pub const TASKRUN_FLAG: u32 = 1 << 9;
    pub const NO_SQARRAY: u32 = 1 << 16;
}

/// Codes of io_uring_register(2).
#[allow(missing_docs)]
pub mod code {
    pub const REGISTER_EVENTFD: u32 = 4;
    pub const UNREGISTER_EVENTFD: u32 = 5;
    pub const REGISTER_PROBE: u32 = 8;
    pub const ENABLE_RINGS: u32 = 12;
    pub const REGISTER_FILES2: u32 = 13;
    pub const FILES_UPDATE2: u32 = 14;
    pub const REGISTER_BUFFERS2: u32 = 15;
    pub const BUFFERS_UPDATE: u32 = 16;
    pub const REGISTER_RING_FDS: u32 = 20;
    pub const REGISTER_MEM_REGION: u32 = 34;
    pub const USE_REGISTERED_RING: u32 = 1 << 31;
}

/// IORING_ENTER_GETEVENTS.
pub const GETEVENTS: u32 = 1;
/// IORING_ENTER_SQ_WAKEUP.
pub const SQ_WAKEUP: u32 = 2;
const EXT_ARG: u32 = 1 << 3;

/// Where the words of a ring are, from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words {
    /// Head of submissions.
    pub sq_head: u32,
    /// Tail of submissions.
    pub sq_tail: u32,
    /// Submissions that were none.
    pub sq_dropped: u32,
    /// Head of completions.
    pub cq_head: u32,
    /// Tail of completions.
    pub cq_tail: u32,
    /// What the program wants (IORING_CQ_EVENTFD_DISABLED).
    pub cq_flags: u32,
    /// Completions that were lost.
    pub cq_overflow: u32,
    /// The completions themselves.
    pub cqes: u32,
    /// With large completions there is twice as much room before them, too, which is behind them.
    pub doubled: bool,
}

/// Makes a ring for one request, for a moment: its parameters.
fn sample(flags: u32) -> Result<[u32; 30]> {
    let mut parameters = [0u32; 30];
    parameters[2] = flags;
    // SAFETY: a `struct io_uring_params` is 120 bytes, which the kernel reads and writes.
    let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(|| Error::last("io_uring_setup"))?;
    // SAFETY: made right now, and ours alone.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
    Ok(parameters)
}

/// Where they are on this kernel.
pub fn words() -> Result<Words> {
    static KNOWN: OnceLock<Words> = OnceLock::new();
    if let Some(words) = KNOWN.get() {
        return Ok(*words);
    }
    let parameters = sample(0)?;
    // ten words, then two structures of ten words each
    let (sq, cq) = (&parameters[10..20], &parameters[20..30]);
    let words = Words {
        sq_head: sq[0],
        sq_tail: sq[1],
        sq_dropped: sq[5],
        cq_head: cq[0],
        cq_tail: cq[1],
        cq_flags: cq[6],
        cq_overflow: cq[4],
        cqes: cq[5],
        // where the indices are behind two completions; a kernel without large ones has none to look for
        doubled: sample(setup::CQE32).is_ok_and(|p| p[16] == 2 * (p[25] + 16 * p[1])),
    };
    let offsets = [words.sq_head, words.sq_tail, words.cq_head, words.cq_tail];
    if offsets.iter().any(|&at| at >= 4096) {
        return Err(Error::Usage { what: "this kernel lays out the rings of an io_uring in an unknown way".into() });
    }
    Ok(*KNOWN.get_or_init(|| words))
}

/// What io_uring_register(2) says to a question that it cannot answer, since the answer has no room: an errno.
pub fn ask(ring: BorrowedFd<'_>, code: u32) -> i32 {
    // SAFETY: nothing is mapped at address 1, so that the kernel can neither read nor write anything.
    match unsafe { libc::syscall(libc::SYS_io_uring_register, ring.as_raw_fd(), code, 1, 1) } {
        -1 => std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
        _ => 0,
    }
}

/// Does the ring poll for completions (IORING_SETUP_IOPOLL)? Only others look at the time limit of a wait.
pub fn polls(ring: BorrowedFd<'_>) -> bool {
    // struct io_uring_getevents_arg: no mask, and a limit that is nowhere
    let argument = [0u64, 0, 1];
    // SAFETY: the kernel reads 24 bytes of `argument`, and nothing at address 1.
    let r = unsafe {
        let flags = GETEVENTS | EXT_ARG;
        libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 0, 0, flags, argument.as_ptr(), 24)
    };
    r == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::EEXIST)
}

/// What io_uring_enter(2) says to one who wants to wait for no completion: an errno, or 0.
pub fn enter(ring: BorrowedFd<'_>) -> i32 {
    // SAFETY: no memory is given.
    match unsafe { libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), 0, 0, GETEVENTS, 0, 0) } {
        -1 => std::io::Error::last_os_error().raw_os_error().unwrap_or(0),
        _ => 0,
    }
}

/// How many pages there are to be mapped at an offset, `most` at most; none if nothing can. Some kernels map more, and then there
/// is nothing behind it.
pub fn pages(ring: BorrowedFd<'_>, offset: u64, most: usize) -> usize {
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    let fits = |pages: usize| {
        let last = |m: &Shared| (m.address() + m.len() - 1) as u64;
        let mapped = Shared::map(ring, offset, pages * 4096);
        mapped.is_ok_and(|m| read_remote(own, last(&m), &mut [0]).is_ok())
    };
    let (mut low, mut high) = (0, most + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) {
            low = middle;
        } else {
            high = middle;
        }
    }
    low
}
