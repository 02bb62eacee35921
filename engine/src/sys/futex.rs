//! Futexes in shared memory, and the robust list that tells tasks that their engine is gone (futex(2),
//! set_robust_list(2), Documentation/locking/robust-futex-ABI.rst).

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use standstill_restorer::plan::{Owner, OWNER_DIED, WORD_FROM_NODE};

use crate::error::{Error, Result};
use crate::sys::memory::Shared;

impl crate::sys::memory::SharedPart for Owner {}

/// FUTEX_WAITERS: somebody is to be woken when the owner dies.
const WAITERS: u32 = 0x8000_0000;

/// Sleeps while `word` is `value`, at most for `patience`.
pub fn wait(word: &AtomicU32, value: u32, patience: Duration) {
    let time =
        libc::timespec { tv_sec: patience.as_secs() as libc::time_t, tv_nsec: patience.subsec_nanos() as libc::c_long };
    // SAFETY: word and time live across the call.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, value, &raw const time, 0, 0) };
}

/// Wakes everyone who sleeps on `word`.
pub fn wake(word: &AtomicU32) {
    // SAFETY: a wake reads no memory.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX, 0, 0, 0) };
}

#[repr(C)]
struct Head {
    first: usize,
    offset: i64,
    pending: usize,
}

/// This thread's robust list, ours for as long as this lives; the one it had before comes back when it is dropped.
///
/// Must stay in the thread that made it, and must live longer than the tracees that read its words.
#[derive(Debug)]
pub struct RobustList {
    head: Box<std::cell::UnsafeCell<Head>>,
    before: (usize, usize),
    thread: u32,
    nodes: std::cell::RefCell<Vec<usize>>,
}

impl std::fmt::Debug for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "robust list")
    }
}

impl RobustList {
    /// Takes over this thread's robust list.
    pub fn new() -> Result<RobustList> {
        let head = Box::new(std::cell::UnsafeCell::new(Head { first: 0, offset: WORD_FROM_NODE, pending: 0 }));
        let at = head.get();
        let (mut old, mut len) = (0usize, 0usize);
        // SAFETY: `old` and `len` are places for the answers; `head` is boxed and lives until drop gives the old one back.
        unsafe {
            (*at).first = at as usize;
            if libc::syscall(libc::SYS_get_robust_list, 0, &raw mut old, &raw mut len) != 0 {
                return Err(Error::last("get_robust_list"));
            }
            if libc::syscall(libc::SYS_set_robust_list, at, size_of::<Head>()) != 0 {
                return Err(Error::last("set_robust_list"));
            }
            let thread = libc::syscall(libc::SYS_gettid) as u32;
            Ok(RobustList { head, before: (old, len), thread, nodes: Default::default() })
        }
    }

    /// Owns the word at `offset` of `memory`, until [`RobustList::release`] or the end of this thread.
    pub fn own(&self, memory: &Shared, offset: usize) {
        let owner: &Owner = memory.at(offset);
        owner.word.store(self.thread, Ordering::SeqCst);
        let node = owner.next.as_ptr() as usize;
        // SAFETY: only this thread and, when it dies, the kernel walk the list.
        unsafe {
            let head = self.head.get();
            owner.next.store((*head).first as u64, Ordering::SeqCst);
            (*head).first = node;
        }
        self.nodes.borrow_mut().push(node);
    }

    /// As [`RobustList::own`], for somebody who sleeps on the word itself: the kernel wakes them at once.
    pub fn own_and_wake(&self, memory: &Shared, offset: usize) {
        self.own(memory, offset);
        let owner: &Owner = memory.at(offset);
        owner.word.fetch_or(WAITERS, Ordering::SeqCst);
    }

    /// Gives up the word as if this thread had ended.
    pub fn abandon(&self, memory: &Shared, offset: usize) {
        let owner: &Owner = memory.at(offset);
        owner.word.store(OWNER_DIED, Ordering::SeqCst);
        wake(&owner.word);
        self.release(memory, offset);
    }

    /// Gives up the word; call before the memory is unmapped.
    pub fn release(&self, memory: &Shared, offset: usize) {
        let owner: &Owner = memory.at(offset);
        let node = owner.next.as_ptr() as usize;
        let mut nodes = self.nodes.borrow_mut();
        let Some(i) = nodes.iter().position(|&n| n == node) else { return };
        let next = owner.next.load(Ordering::SeqCst) as usize;
        // nodes[i] was linked in front of nodes[i-1]; its predecessor in the list is nodes[i+1], or the head
        // SAFETY: every node in `nodes` lies in memory that is still mapped, since release comes before unmapping.
        unsafe {
            match nodes.get(i + 1) {
                Some(&before) => *(before as *mut u64) = next as u64,
                None => (*self.head.get()).first = next,
            }
        }
        nodes.remove(i);
    }
}

impl Drop for RobustList {
    fn drop(&mut self) {
        // SAFETY: gives back the list that this thread had.
        unsafe { libc::syscall(libc::SYS_set_robust_list, self.before.0, self.before.1) };
    }
}
