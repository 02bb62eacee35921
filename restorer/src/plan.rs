//! The layout of plans: what engine and executor both see in the memory that they share.
//!
//! Everything is `repr(C)`, its size is asserted, and addresses are plain numbers of the *task's* address space.

use core::sync::atomic::{AtomicU32, AtomicU64};

/// What an operation does.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The system call `nr` with six operands.
    Syscall = 0,
    /// `preadv`-like: fill `args[1]..+args[2]` from descriptor `args[0]` at offset `args[3]`, whole or fail with -ENODATA.
    ReadFull = 1,
    /// Copy `args[2]` bytes from `args[1]` to `args[0]`.
    Copy = 2,
    /// `clone3` with the `clone_args` at `args[0]` of size `args[1]`; the child goes on with the control at `args[2]`.
    Clone = 3,
    /// Announce stage `args[0]` in the [`Arena`] at `args[1]`, and wait until the engine lets it go on.
    Stage = 4,
    /// Receive `args[2]` descriptors from the socket `args[0]` and move them to numbers from `args[1]` on.
    ReceiveFds = 5,
    /// Make POSIX timers with clock `args[0]` and event `args[1]`, and delete them, until one has the id `args[2]`.
    TimerCreate = 6,
    /// Wait for as long as the engine lives; ends by ptrace only.
    Park = 7,
    /// Store the 64-bit word `args[1]` at `args[0]`.
    Store = 8,
    /// Wait (`wait4`) for the child `args[0]` and expect that its status is `args[1]`.
    Reap = 9,
    /// `args[2]` bytes at `args[0]` to the terminal, pipe or socket `args[1]`, whole or fail.
    WriteFull = 10,
    /// Ends the process with status `args[0]`.
    Exit = 11,
    /// Wait until the 32-bit word at `args[0]` is not zero, for as long as the engine lives.
    Await = 12,
    /// Fill memory from files: the pieces of the [`Queue`] at `args[0]`, whose vectors are at `args[1]`. `args[3]` helpers are
    /// made with `clone3` from the `clone_args` at `args[2]`, take pieces as well, and are gone at the end. One that cannot
    /// be made is done without.
    Fill = 13,
    /// Wait until the [`Guard`] at `args[0]` is over, or the engine is dead: then run the list that was chosen.
    Guard = 14,
    /// The 64-bit word at `args[0]` + `args[1]` is the result.
    Load = 15,
    /// Copy `args[3]` bytes from `args[2]` to `args[0]` + `args[1]`.
    Place = 16,
    /// Bring an io_uring to where it was, by the [`Turn`] at `args[0]`: its rings are mapped at `args[1]`, its SQEs at `args[2]`,
    /// and `args[3]` is a descriptor of any file.
    Turn = 17,
    /// What `fdinfo` says of the io_uring `args[0]`, whose path is at `args[1]`, if its last submission and its last completion
    /// were still there: the first bytes, at `args[2]`, at most `args[3]` of them. `args[4]` is where the words of a ring
    /// are, 16 bits each: heads and tails of submissions and completions.
    Peek = 18,
    /// The first group of provided buffers that the io_uring `args[0]` has, or -ENOENT. The word at `args[1]` and those behind it
    /// are a `struct io_uring_buf_status`.
    Groups = 19,
}

/// How an operand is read.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The value itself.
    Imm = 0,
    /// An offset from the base of the shared memory.
    PlanAddr = 1,
    /// The result of the operation with this index, in the same plan.
    Slot = 2,
}

/// Which results let the plan go on.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// Any result.
    Any = 0,
    /// A result that is no error.
    NonNegative = 1,
    /// `want[0]` alone.
    Exact = 2,
    /// `want[0]`, `want[1]`, or a result that is no error.
    Tolerate = 3,
}

/// One operation.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Op {
    /// A [`Code`].
    pub code: u32,
    /// The system call's number, for [`Code::Syscall`].
    pub nr: u32,
    /// How each operand is read: [`Kind`].
    pub kinds: [u8; 6],
    /// An [`Expect`].
    pub expect: u8,
    /// Not zero: it is run even if an operation before it failed or the engine is gone. The result of an operation that
    /// was not run reads as -1.
    pub always: u8,
    /// The operands.
    pub args: [u64; 6],
    /// What [`Expect`] compares with.
    pub want: [i64; 2],
}
const _: () = assert!(core::mem::size_of::<Op>() == 80);

/// The state of one task or thread that runs plans.
#[repr(C)]
pub struct Control {
    /// The engine counts it up to start the plan; the executor waits for that.
    pub turn: AtomicU32,
    /// The last turn that the executor ended.
    pub done: AtomicU32,
    /// What a task does whose engine is gone: 0 return to its program, 1 exit, 2 go on with its plan.
    pub orphan: u32,
    /// Zero.
    pub reserved: u32,
    /// Address of the [`Owner`] that tells whether the engine lives.
    pub owner: u64,
    /// First operation of the plan.
    pub ops: u64,
    /// Number of operations.
    pub count: u64,
    /// Results, a word an operation.
    pub results: u64,
    /// What [`Kind::PlanAddr`] counts from.
    pub base: u64,
    /// Index of the operation that failed, plus one; 0 when none did.
    pub failed: AtomicU32,
    /// Index of the operation that is being run.
    pub at: AtomicU32,
    /// The result of the failed operation.
    pub failure: AtomicU64,
    /// Where the registers of the interrupted program are kept (XSAVE area, 64-aligned); 0 for none.
    pub xsave: u64,
    /// Machine code that returns to the interrupted program.
    pub way_back: u64,
    /// Where stages are counted: address of the [`Arena`].
    pub arena: u64,
}
const _: () = assert!(core::mem::size_of::<Control>() == 96);

/// A robust futex that the engine's thread owns: the kernel sets [`OWNER_DIED`] in its word when that thread is gone
/// (set_robust_list(2)). One serves all threads that share the memory.
#[repr(C)]
pub struct Owner {
    /// The futex word: the engine thread's id.
    pub word: AtomicU32,
    /// Not zero: when the engine is dead, tasks wait until this is zero again, since a guard is putting things in order.
    pub hold: AtomicU32,
    /// The robust list's node, in the engine's addresses.
    pub next: AtomicU64,
}
const _: () = assert!(core::mem::size_of::<Owner>() == 16);
/// Offset of [`Owner::word`] from [`Owner::next`], as the kernel's robust list wants it.
pub const WORD_FROM_NODE: i64 = -8;

/// Number of stages that a restore can have.
pub const STAGES: usize = 16;

/// What all tasks of a restore share.
#[repr(C)]
pub struct Arena {
    /// How many tasks reached each stage.
    pub arrived: [AtomicU32; STAGES],
    /// Stages up to this one may be left.
    pub go: AtomicU32,
    /// Not zero once any task failed: everyone exits.
    pub failed: AtomicU32,
    /// Counted up at every arrival and failure; the engine waits on it.
    pub news: AtomicU32,
    /// Zero.
    pub reserved: u32,
}
const _: () = assert!(core::mem::size_of::<Arena>() == 80);

/// Pieces of memory that anyone may fill who has the time.
#[repr(C)]
pub struct Queue {
    /// The first piece that nobody has taken.
    pub next: AtomicU64,
    /// Zero, or what went wrong: a negative errno.
    pub failed: AtomicU64,
    /// Number of pieces; they follow.
    pub count: u64,
    /// Zero.
    pub reserved: u64,
}
const _: () = assert!(core::mem::size_of::<Queue>() == 32);

/// One piece: a range of a file that goes to some places in memory, one after the other.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// The file.
    pub fd: u64,
    /// Where it begins there.
    pub offset: u64,
    /// Its first vector.
    pub first: u64,
    /// Number of vectors (`struct iovec`: address and length), at most 1024.
    pub count: u64,
}
const _: () = assert!(core::mem::size_of::<Piece>() == 32);

/// How an io_uring is brought to where it was: requests that do nothing advance its heads and tails, all of them in the kernel's
/// own memory as well.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Its descriptor.
    pub fd: u32,
    /// Entries of its submission queue.
    pub entries: u32,
    /// Bytes of an SQE.
    pub sqe_size: u32,
    /// Not zero: a thread of the kernel polls for submissions.
    pub polled: u32,
    /// Where the array of indices is; 0 for none.
    pub sq_array: u32,
    /// Where the head of submissions is; its tail, and those of completions.
    pub sq_head: u32,
    /// Tail of submissions.
    pub sq_tail: u32,
    /// Head of completions.
    pub cq_head: u32,
    /// Tail of completions.
    pub cq_tail: u32,
    /// Completions without a submission.
    pub alone: u32,
    /// Submissions with a completion that is taken at once.
    pub taken: u32,
    /// Submissions without a completion.
    pub quiet: u32,
    /// Submissions whose completions find no room, that many…
    pub overflow: u32,
    /// Zero.
    pub reserved: u32,
    /// … and where what they are to be is: two words each, user data and result.
    pub list: u64,
}
const _: () = assert!(core::mem::size_of::<Turn>() == 64);

/// From this length on, memory is asked for before it is filled (MADV_POPULATE_WRITE): one system call instead of a fault
/// for each page.
pub const POPULATE_FROM: u64 = 32 << 10;

/// Operations that a guard may have to run.
#[repr(C)]
pub struct List {
    /// Address of the first.
    pub ops: u64,
    /// How many there are.
    pub count: AtomicU32,
    /// Zero.
    pub reserved: u32,
}

/// What a guard reads: it runs one of two lists, the last operation first, when its engine is dead.
#[repr(C)]
pub struct Guard {
    /// Not zero: the guard is not needed any more.
    pub over: AtomicU32,
    /// Which list is run: 0 none, 1 the first, 2 the second.
    pub choice: AtomicU32,
    /// How many descriptors were sent.
    pub sent: AtomicU32,
    /// Number of the socket that they come through.
    pub socket: u32,
    /// The number that the first descriptor gets; those after it follow.
    pub first: u64,
    /// The lists.
    pub lists: [List; 2],
}
const _: () = assert!(core::mem::size_of::<Guard>() == 56);

/// Where in the executor a thread leaves it: with the address of its [`Control`] in `rbx` it takes the extended state that it
/// came with, and the way back.
pub const LEAVE: u64 = 16;

/// FUTEX_OWNER_DIED: the kernel sets it in [`Owner::word`] when the engine's thread is gone (futex(2)).
pub const OWNER_DIED: u32 = 0x4000_0000;
/// How often the executor looks at [`Owner::hold`]: it gives up after that.
pub const HOLD_LOOKS: u32 = 250;
/// How long the executor sleeps before it looks at [`Owner::word`] again, in nanoseconds.
pub const PATIENCE_NS: i64 = 20_000_000;
