//! The executor: the only code of Standstill that runs inside a task.
//!
//! Built by the engine's build script into one flat, position-independent piece without data, relocations or heap.
//! Entered with the address of a [`plan::Control`] (System V calling convention, own stack), it waits for turns and runs
//! plans. When its engine is gone it restores the floating point state that it found and takes the way back, or exits.
#![no_std]
#![no_main]

#[path = "plan.rs"]
#[allow(dead_code)]
mod plan;

use core::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use plan::{Arena, Code, Control, Expect, Kind, Op, Piece, Queue};

const WRITE: usize = 1;
const PREAD64: usize = 17;
const MADVISE: usize = 28;
const RECVMSG: usize = 47;
const EXIT_GROUP: usize = 231;
const WAIT4: usize = 61;
const DUP3: usize = 292;
const PREADV: usize = 295;
const CLOSE: usize = 3;
const FUTEX: usize = 202;
const TIMER_CREATE: usize = 222;
const TIMER_DELETE: usize = 226;
const POPULATE_WRITE: usize = 23;
const FUTEX_WAIT: usize = 0;
const FUTEX_WAKE: usize = 1;
const EINTR: i64 = -4;
const EAGAIN: i64 = -11;
const ENODATA: i64 = -61;
const EPROTO: i64 = -71;
const ECANCELED: i64 = -125;

core::arch::global_asm!(
    ".section .text.entry,\"ax\",@progbits",
    ".globl entry",
    "entry:",
    "jmp 5f",
    // plan::LEAVE, with rbx = control: back into the program
    ".org {leave}",
    "4:",
    "mov r12, [rbx + 72]", // xsave
    "test r12, r12",
    "jz 3f",
    "mov eax, -1",
    "mov edx, -1",
    "xrstor64 [r12]",
    "3:",
    "jmp qword ptr [rbx + 80]", // way_back
    // rdi = control; keep the extended state of an interrupted program
    "5:",
    "mov rbx, rdi",
    "mov r12, [rbx + 72]",
    "test r12, r12",
    "jz 2f",
    "mov eax, -1",
    "mov edx, -1",
    "xsave64 [r12]",
    "2:",
    "cld",
    "and rsp, -16",
    "mov rdi, rbx",
    "call {work}",
    // the engine is gone
    "jmp 4b",
    leave = const plan::LEAVE,
    work = sym work,
);
const _: () = assert!(core::mem::offset_of!(Control, xsave) == 72 && core::mem::offset_of!(Control, way_back) == 80);

#[inline(always)]
unsafe fn syscall(nr: usize, a: [usize; 6]) -> i64 {
    let r: i64;
    // SAFETY: what a system call does to the task is what the plan asks for.
    unsafe {
        core::arch::asm!("syscall", inlateout("rax") nr as i64 => r, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2],
            in("r10") a[3], in("r8") a[4], in("r9") a[5], lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    r
}

/// clone3: the child takes its stack from the clone_args and goes on in `start` with `state`.
#[inline(always)]
unsafe fn clone(args: usize, size: usize, start: usize, state: usize) -> i64 {
    let r: i64;
    // SAFETY: the child has a stack of its own and never returns into this frame.
    unsafe {
        core::arch::asm!(
            "syscall", "test rax, rax", "jnz 2f",
            "xor ebp, ebp", "mov rdi, r12", "and rsp, -16", "call r13", "ud2", "2:",
            inlateout("rax") 435i64 => r, in("rdi") args, in("rsi") size, in("r12") state, in("r13") start,
            lateout("rcx") _, lateout("r11") _);
    }
    r
}

/// A cloned task begins here.
unsafe extern "C" fn start(control: *const Control) -> ! {
    // SAFETY: the engine gave this address to this task alone.
    unsafe {
        work(control);
        loop {
            syscall(EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
        }
    }
}

unsafe fn alive(c: &Control) -> bool {
    // SAFETY: the engine keeps the owner mapped beside the control.
    unsafe { (*(c.owner as *const plan::Owner)).word.load(Relaxed) & plan::OWNER_DIED == 0 }
}

/// Sleeps while `word` is `value`, for a while at most.
///
/// Not by FUTEX_WAIT with a limit: a stop in there would overwrite the task's one restart block, in which the kernel keeps
/// the rest of the program's own interrupted sleep. futex_waitv(2) (5.16) leaves that alone.
unsafe fn wait_while(word: &core::sync::atomic::AtomicU32, value: u32) {
    #[repr(C)]
    struct Waiter {
        value: u64,
        address: u64,
        flags: u32,
        reserved: u32,
    }
    const FUTEX_WAITV: usize = 449;
    const CLOCK_GETTIME: usize = 228;
    const CLOCK_MONOTONIC: usize = 1;
    const FUTEX2_SIZE_U32: u32 = 2;
    const ENOSYS: i64 = -38;
    let waiter = Waiter { value: value as u64, address: word as *const _ as u64, flags: FUTEX2_SIZE_U32, reserved: 0 };
    let mut until = [0i64; 2];
    // SAFETY: everything that the calls read or write lives on this stack, but for the word, which the caller keeps.
    unsafe {
        syscall(CLOCK_GETTIME, [CLOCK_MONOTONIC, until.as_mut_ptr() as usize, 0, 0, 0, 0]);
        until[1] += plan::PATIENCE_NS;
        if until[1] >= 1_000_000_000 {
            until[1] -= 1_000_000_000;
            until[0] += 1;
        }
        let args = [&waiter as *const Waiter as usize, 1, 0, until.as_ptr() as usize, CLOCK_MONOTONIC, 0];
        if syscall(FUTEX_WAITV, args) == ENOSYS {
            let patience: [i64; 2] = [0, plan::PATIENCE_NS];
            syscall(FUTEX, [word as *const _ as usize, FUTEX_WAIT, value as usize, patience.as_ptr() as usize, 0, 0]);
        }
    }
}

unsafe fn wake(word: &core::sync::atomic::AtomicU32) {
    // SAFETY: a wake touches no memory.
    unsafe {
        syscall(FUTEX, [word as *const _ as usize, FUTEX_WAKE, i32::MAX as usize, 0, 0, 0]);
    }
}

/// Takes turns until the engine is gone.
unsafe extern "C" fn work(control: *const Control) {
    // SAFETY: the engine keeps the control mapped for as long as the executor is in the task.
    unsafe {
        let c = &*control;
        let mut last = 0;
        loop {
            let turn = c.turn.load(Acquire);
            if turn == last {
                if !alive(c) {
                    break;
                }
                wait_while(&c.turn, turn);
                continue;
            }
            last = turn;
            run(c);
            c.done.store(turn, Release);
            wake(&c.done);
            if c.arena != 0 && c.failed.load(Relaxed) != 0 {
                break;
            }
        }
        let hold = &(*(c.owner as *const plan::Owner)).hold;
        let mut looks = 0;
        while hold.load(Acquire) != 0 && looks < plan::HOLD_LOOKS && !alive(c) {
            wait_while(hold, 1);
            looks += 1;
        }
        if c.orphan != 0 {
            syscall(EXIT_GROUP, [1, 0, 0, 0, 0, 0]);
        }
    }
}

unsafe fn run(c: &Control) {
    // SAFETY: ops, results and count describe memory that the engine wrote for this control.
    unsafe {
        let results = c.results as *mut i64;
        let mut i = 0usize;
        while i < c.count as usize {
            results.add(i).write(-1);
            i += 1;
        }
        let mut ending = false;
        i = 0;
        while i < c.count as usize {
            let op = &*(c.ops as *const Op).add(i);
            // a guard runs on
            ending = ending || (c.orphan != 2 && !alive(c));
            if ending && op.always == 0 {
                i += 1;
                continue;
            }
            if !ending {
                c.at.store(i as u32, Release);
            }
            let r = step(c, op);
            *results.add(i) = r;
            let good = match op.expect {
                e if e == Expect::NonNegative as u8 => r >= 0 || r < -4095,
                e if e == Expect::Exact as u8 => r == op.want[0],
                e if e == Expect::Tolerate as u8 => r >= 0 || r < -4095 || r == op.want[0] || r == op.want[1],
                _ => true,
            };
            if !good && !ending {
                c.failure.store(r as u64, Relaxed);
                c.failed.store(i as u32 + 1, Release);
                if c.arena != 0 {
                    let arena = &*(c.arena as *const Arena);
                    arena.failed.store(1, SeqCst);
                    arena.news.fetch_add(1, SeqCst);
                    wake(&arena.news);
                    wake(&arena.go);
                }
                ending = true;
            }
            i += 1;
        }
    }
}

unsafe fn operand(c: &Control, op: &Op, n: usize) -> usize {
    let v = op.args[n];
    (if op.kinds[n] == Kind::PlanAddr as u8 {
        c.base.wrapping_add(v)
    } else if op.kinds[n] == Kind::Slot as u8 {
        // SAFETY: the engine checked the index against the plan's length.
        unsafe { *(c.results as *const u64).add(v as usize) }
    } else {
        v
    }) as usize
}

unsafe fn step(c: &Control, op: &Op) -> i64 {
    // SAFETY: addresses in operands are the engine's business; the kernel checks those of system calls.
    unsafe {
        let a = [operand(c, op, 0), operand(c, op, 1), operand(c, op, 2), operand(c, op, 3), operand(c, op, 4), operand(c, op, 5)];
        match op.code {
            x if x == Code::Syscall as u32 => syscall(op.nr as usize, a),
            x if x == Code::ReadFull as u32 => transfer(PREAD64, a),
            x if x == Code::WriteFull as u32 => transfer(WRITE, [a[1], a[0], a[2], 0, 0, 0]),
            x if x == Code::Copy as u32 => {
                copy(a[0], a[1], a[2]);
                0
            }
            x if x == Code::Store as u32 => {
                (a[0] as *mut u64).write_unaligned(a[1] as u64);
                0
            }
            x if x == Code::Load as u32 => (a[0].wrapping_add(a[1]) as *const i64).read_unaligned(),
            x if x == Code::Clone as u32 => clone(a[0], a[1], start as *const () as usize, a[2]),
            x if x == Code::Stage as u32 => stage(c, a[0]),
            x if x == Code::ReceiveFds as u32 => receive(a[0], a[1], a[2]),
            x if x == Code::TimerCreate as u32 => timer(a[0], a[1], a[2] as i32),
            x if x == Code::Reap as u32 => {
                let mut status = 0i32;
                let r = loop {
                    let r = syscall(WAIT4, [a[0], &mut status as *mut i32 as usize, 0x4000_0000, 0, 0, 0]);
                    if r != EINTR {
                        break r;
                    }
                };
                if r < 0 { r } else if status as usize == a[1] { 0 } else { EPROTO }
            }
            x if x == Code::Park as u32 => {
                let never = core::sync::atomic::AtomicU32::new(0);
                while alive(c) {
                    if c.arena != 0 && (*(c.arena as *const Arena)).failed.load(Relaxed) != 0 {
                        return ECANCELED;
                    }
                    wait_while(&never, 0);
                }
                ECANCELED
            }
            x if x == Code::Await as u32 => {
                let word = &*(a[0] as *const core::sync::atomic::AtomicU32);
                loop {
                    if word.load(Acquire) != 0 {
                        return 0;
                    }
                    if !alive(c) {
                        return ECANCELED;
                    }
                    wait_while(word, 0);
                }
            }
            x if x == Code::Guard as u32 => guard(c, a[0]),
            x if x == Code::Exit as u32 => loop {
                syscall(EXIT_GROUP, [a[0], 0, 0, 0, 0, 0]);
            },
            x if x == Code::Fill as u32 => fill(c, a),
            x if x == Code::Place as u32 => {
                copy(a[0].wrapping_add(a[1]), a[2], a[3]);
                0
            }
            x if x == Code::Turn as u32 => turn(c, &*(a[0] as *const plan::Turn), a[1], a[2], a[3]),
            x if x == Code::Peek as u32 => peek(a),
            x if x == Code::Groups as u32 => groups(a[0], a[1] as *mut u32),
            _ => EPROTO,
        }
    }
}

unsafe fn transfer(nr: usize, mut a: [usize; 6]) -> i64 {
    let whole = a[2] as i64;
    while a[2] > 0 {
        // SAFETY: as every system call of a plan.
        let n = unsafe { syscall(nr, a) };
        if n == EINTR {
            continue;
        }
        if n <= 0 {
            return if n == 0 { ENODATA } else { n };
        }
        a[1] += n as usize;
        a[2] -= n as usize;
        a[3] += n as usize;
    }
    whole
}

/// What helpers of [`Code::Fill`] need; the one who makes them waits for them.
struct Filling {
    control: *const Control,
    queue: *const Queue,
    vectors: *mut [usize; 2],
}

const HELPERS: usize = 64;
const CLONE_ARGS: usize = 88;

unsafe fn fill(c: &Control, a: [usize; 6]) -> i64 {
    let filling = Filling { control: c, queue: a[0] as *const Queue, vectors: a[1] as *mut [usize; 2] };
    let count = if a[3] < HELPERS { a[3] } else { HELPERS };
    let mut pids = core::mem::MaybeUninit::<[i32; HELPERS]>::uninit();
    let pids = pids.as_mut_ptr() as *mut i32;
    // SAFETY: the engine checked that queue, vectors and clone_args lie in the plan's data; `pids` has room for `count`.
    unsafe {
        let mut n = 0;
        while n < count {
            let pid = clone(a[2] + n * CLONE_ARGS, CLONE_ARGS, help as *const () as usize, &filling as *const Filling as usize);
            pids.add(n).write(pid as i32);
            n += 1;
        }
        take_pieces(&filling);
        n = 0;
        while n < count {
            let pid = *pids.add(n);
            // __WALL: their end sends no signal
            while pid > 0 && syscall(WAIT4, [pid as usize, 0, 0x4000_0000, 0, 0, 0]) == EINTR {}
            n += 1;
        }
        (*filling.queue).failed.load(SeqCst) as i64
    }
}

/// A helper: another process in the same memory, until no piece is left.
unsafe extern "C" fn help(filling: *const Filling) -> ! {
    // SAFETY: the one who made us keeps this until we have ended.
    unsafe {
        take_pieces(&*filling);
        loop {
            syscall(EXIT_GROUP, [0, 0, 0, 0, 0, 0]);
        }
    }
}

unsafe fn take_pieces(filling: &Filling) {
    // SAFETY: queue and vectors are the engine's, in shared memory that stays; each piece is taken once.
    unsafe {
        let queue = &*filling.queue;
        let c = &*filling.control;
        loop {
            if !alive(c) || (c.arena != 0 && (*(c.arena as *const Arena)).failed.load(Relaxed) != 0) {
                queue.failed.store(ECANCELED as u64, SeqCst);
                return;
            }
            let n = queue.next.fetch_add(1, SeqCst);
            if n >= queue.count || queue.failed.load(Relaxed) != 0 {
                return;
            }
            let piece = *((filling.queue as *const u8).add(core::mem::size_of::<Queue>()) as *const Piece).add(n as usize);
            let r = read_piece(&piece, filling.vectors.add(piece.first as usize));
            if r < 0 {
                queue.failed.store(r as u64, SeqCst);
            }
        }
    }
}

unsafe fn read_piece(piece: &Piece, mut vectors: *mut [usize; 2]) -> i64 {
    // SAFETY: as every system call of a plan; vectors are counted, and changed by nobody else.
    unsafe {
        let mut left = piece.count as usize;
        let mut n = 0;
        while n < left {
            let [address, len] = *vectors.add(n);
            if len as u64 >= plan::POPULATE_FROM {
                // a kernel before 5.14 does not know it, and faults pages in as they are filled
                syscall(MADVISE, [address, len, POPULATE_WRITE, 0, 0, 0]);
            }
            n += 1;
        }
        let mut offset = piece.offset as usize;
        while left > 0 {
            let r = syscall(PREADV, [piece.fd as usize, vectors as usize, left, offset, 0, 0]);
            if r == EINTR {
                continue;
            }
            if r <= 0 {
                return if r == 0 { ENODATA } else { r };
            }
            let mut done = r as usize;
            offset += done;
            while left > 0 && done >= (*vectors)[1] {
                done -= (*vectors)[1];
                vectors = vectors.add(1);
                left -= 1;
            }
            if left > 0 {
                (*vectors)[0] += done;
                (*vectors)[1] -= done;
            }
        }
        0
    }
}

unsafe fn stage(c: &Control, n: usize) -> i64 {
    if c.arena == 0 || n >= plan::STAGES {
        return EPROTO;
    }
    // SAFETY: the engine keeps the arena mapped in every task.
    unsafe {
        let arena = &*(c.arena as *const Arena);
        arena.arrived[n].fetch_add(1, SeqCst);
        arena.news.fetch_add(1, SeqCst);
        wake(&arena.news);
        loop {
            let go = arena.go.load(Acquire);
            if arena.failed.load(Relaxed) != 0 {
                return ECANCELED;
            }
            if go as usize >= n {
                return 0;
            }
            if !alive(c) {
                return ECANCELED;
            }
            wait_while(&arena.go, go);
        }
    }
}

#[repr(C)]
struct Message {
    name: usize,
    namelen: usize,
    iov: usize,
    iovlen: usize,
    control: usize,
    controllen: usize,
    flags: usize,
}

/// Receives descriptors, at most 64 a message, and moves them to `to`, `to + 1`, …
unsafe fn receive(socket: usize, to: usize, count: usize) -> i64 {
    // SAFETY: all buffers are on this stack, and sized as the message says.
    unsafe {
        let mut got = 0usize;
        while got < count {
            let mut byte = [0u8; 8];
            let iov = [byte.as_mut_ptr() as usize, 1usize];
            let mut room = core::mem::MaybeUninit::<[u64; 2 + 32]>::uninit();
            let mut m = Message { name: 0, namelen: 0, iov: iov.as_ptr() as usize, iovlen: 1,
                control: room.as_mut_ptr() as usize, controllen: 16 + 4 * 64, flags: 0 };
            let r = syscall(RECVMSG, [socket, &mut m as *mut Message as usize, 0, 0, 0, 0]);
            if r == EINTR {
                continue;
            }
            if r <= 0 {
                return if r == 0 { ENODATA } else { r };
            }
            let len = *(room.as_ptr() as *const u64) as usize;
            if len < 20 || len > 16 + 4 * 64 || m.flags & 8 != 0 {
                return EPROTO;
            }
            let fds = (len - 16) / 4;
            let first = (room.as_ptr() as *const i32).add(4);
            let mut i = 0;
            while i < fds {
                let fd = *first.add(i) as usize;
                let target = to + got;
                if fd != target {
                    let r = syscall(DUP3, [fd, target, 0, 0, 0, 0]);
                    if r < 0 {
                        return r;
                    }
                    syscall(CLOSE, [fd, 0, 0, 0, 0, 0]);
                }
                got += 1;
                i += 1;
            }
        }
        got as i64
    }
}

/// Takes descriptors until the guard is over or the engine is dead. What was sent before that is there still.
unsafe fn guard(c: &Control, at: usize) -> i64 {
    // SAFETY: the engine laid out guard, lists and owner in memory that stays mapped here.
    unsafe {
        let g = &*(at as *const plan::Guard);
        let owner = &(*(c.owner as *const plan::Owner)).word;
        let mut got = 0;
        loop {
            let word = owner.load(Acquire);
            let sent = g.sent.load(Acquire);
            if got < sent {
                let r = receive(g.socket as usize, g.first as usize + got as usize, (sent - got) as usize);
                if r < 0 {
                    return r;
                }
                got = sent;
                continue;
            }
            if g.over.load(Acquire) != 0 {
                return 0;
            }
            if word & plan::OWNER_DIED != 0 {
                break;
            }
            wait_while(owner, word);
        }
        let choice = g.choice.load(Acquire) as usize;
        if choice == 0 || choice > 2 {
            return 0;
        }
        let list = &*g.lists.as_ptr().add(choice - 1);
        let mut left = list.count.load(Acquire) as usize;
        while left > 0 {
            left -= 1;
            step(c, &*(list.ops as *const Op).add(left));
        }
        0
    }
}

unsafe fn timer(clock: usize, event: usize, wanted: i32) -> i64 {
    // SAFETY: `id` lives across the call, `event` is the plan's.
    unsafe {
        let mut id = wanted;
        loop {
            let r = syscall(TIMER_CREATE, [clock, event, &mut id as *mut i32 as usize, 0, 0, 0]);
            if r == EAGAIN {
                continue;
            }
            if r < 0 {
                return r;
            }
            if id == wanted {
                return 0;
            }
            syscall(TIMER_DELETE, [id as usize, 0, 0, 0, 0, 0]);
            if id > wanted {
                return EPROTO;
            }
        }
    }
}

const IO_URING_ENTER: usize = 426;
const IO_URING_REGISTER: usize = 427;

/// One word of a ring, which the kernel uses too.
unsafe fn word<'a>(ring: usize, offset: u32) -> &'a core::sync::atomic::AtomicU32 {
    // SAFETY: the engine maps the ring, and offsets are those that the kernel gives.
    unsafe { &*((ring + offset as usize) as *const core::sync::atomic::AtomicU32) }
}

/// Brings a new io_uring to where another one was.
unsafe fn turn(c: &Control, t: &plan::Turn, rings: usize, sqes: usize, file: usize) -> i64 {
    const SKIP_SUCCESS: u8 = 1 << 6;
    // SAFETY: rings and SQEs are mapped as large as the kernel made them for so many entries.
    unsafe {
        let mut i = 0;
        while t.sq_array != 0 && i < t.entries {
            word(rings, t.sq_array + 4 * i).store(i, Relaxed);
            i += 1;
        }
        let r = complete_alone(c, t, rings, file);
        if r < 0 {
            return r;
        }
        let mut kind = 0;
        while kind < 3 {
            let mut left = if kind == 0 { t.taken } else if kind == 1 { t.quiet } else { t.overflow };
            // IORING_OP_NOP is all zeros
            i = 0;
            while left > 0 && i < t.entries {
                let sqe = (sqes + (i * t.sqe_size) as usize) as *mut u8;
                let mut byte = 0;
                while byte < t.sqe_size as usize {
                    sqe.add(byte).write_volatile(0);
                    byte += 1;
                }
                if kind == 1 {
                    sqe.add(1).write_volatile(SKIP_SUCCESS);
                }
                i += 1;
            }
            let mut done = 0;
            while left > 0 {
                if !alive(c) || (c.arena != 0 && (*(c.arena as *const Arena)).failed.load(Relaxed) != 0) {
                    return ECANCELED;
                }
                let tail = word(rings, t.sq_tail).load(Relaxed);
                // one by one, where each is another
                let n = if kind == 2 { 1 } else if left < t.entries { left } else { t.entries };
                if kind == 2 {
                    let sqe = sqes + ((tail & (t.entries - 1)) * t.sqe_size) as usize;
                    let wanted = (t.list as *const u64).add(2 * done);
                    // length and IORING_NOP_INJECT_RESULT: the result; then the user data
                    ((sqe + 24) as *mut u32).write_volatile(*wanted.add(1) as u32);
                    ((sqe + 28) as *mut u32).write_volatile(1);
                    ((sqe + 32) as *mut u64).write_volatile(*wanted);
                }
                let r = submit(c, t, rings, n, if kind == 0 { n } else { 0 });
                if r < 0 {
                    return r;
                }
                if kind == 0 {
                    word(rings, t.cq_head).store(word(rings, t.cq_tail).load(Acquire), Release);
                }
                left -= n;
                done += 1;
            }
            kind += 1;
        }
        0
    }
}

/// Submits the next `n` SQEs, and waits until the kernel has taken them and `completions` are there.
unsafe fn submit(c: &Control, t: &plan::Turn, rings: usize, n: u32, completions: u32) -> i64 {
    const SQ_WAKEUP: usize = 2;
    // SAFETY: as in `turn`.
    unsafe {
        let tail = word(rings, t.sq_tail).load(Relaxed).wrapping_add(n);
        let wanted = word(rings, t.cq_tail).load(Acquire).wrapping_add(completions);
        word(rings, t.sq_tail).store(tail, SeqCst);
        if t.polled == 0 {
            loop {
                let r = syscall(IO_URING_ENTER, [t.fd as usize, n as usize, 0, 0, 0, 0]);
                if r == EINTR {
                    continue;
                }
                return if r == n as i64 { 0 } else if r < 0 { r } else { EPROTO };
            }
        }
        loop {
            let head = word(rings, t.sq_head);
            let seen = head.load(Acquire);
            if seen == tail && word(rings, t.cq_tail).load(Acquire) == wanted {
                return 0;
            }
            let r = syscall(IO_URING_ENTER, [t.fd as usize, n as usize, 0, SQ_WAKEUP, 0, 0]);
            if r < 0 && r != EINTR && r != EAGAIN {
                return r;
            }
            if !alive(c) {
                return ECANCELED;
            }
            const SCHED_YIELD: usize = 24;
            syscall(SCHED_YIELD, [0; 6]);
        }
    }
}

/// Completions that no submission brings: registered files with tags tell when they are not registered any more.
unsafe fn complete_alone(c: &Control, t: &plan::Turn, rings: usize, file: usize) -> i64 {
    const REGISTER_FILES2: usize = 13;
    const UNREGISTER_FILES: usize = 3;
    const AT_ONCE: usize = 64;
    // SAFETY: the kernel reads the arrays, which live here, and only as far as they are filled.
    unsafe {
        let mut fds = core::mem::MaybeUninit::<[u32; AT_ONCE]>::uninit();
        let mut tags = core::mem::MaybeUninit::<[u64; AT_ONCE]>::uninit();
        let mut i = 0;
        while i < AT_ONCE {
            (fds.as_mut_ptr() as *mut u32).add(i).write_volatile(file as u32);
            (tags.as_mut_ptr() as *mut u64).add(i).write_volatile(1);
            i += 1;
        }
        let mut left = t.alone as usize;
        while left > 0 {
            if !alive(c) {
                return ECANCELED;
            }
            // a queue of completions has room for two at least
            let mut n = if left < AT_ONCE { left } else { AT_ONCE };
            if n > t.entries as usize {
                n = t.entries as usize;
            }
            let wanted = word(rings, t.cq_tail).load(Acquire).wrapping_add(n as u32);
            let table = [n as u64, 0, fds.as_ptr() as u64, tags.as_ptr() as u64];
            let args = [t.fd as usize, REGISTER_FILES2, table.as_ptr() as usize, 32, 0, 0];
            let r = syscall(IO_URING_REGISTER, args);
            if r < 0 {
                return r;
            }
            let r = syscall(IO_URING_REGISTER, [t.fd as usize, UNREGISTER_FILES, 0, 0, 0, 0]);
            if r < 0 {
                return r;
            }
            while word(rings, t.cq_tail).load(Acquire) != wanted {
                if !alive(c) {
                    return ECANCELED;
                }
                let r = syscall(IO_URING_ENTER, [t.fd as usize, 0, 0, 1, 0, 0]);
                if r < 0 && r != EINTR {
                    return r;
                }
            }
            word(rings, t.cq_head).store(wanted, Release);
            left -= n;
        }
        0
    }
}

/// The kernel prints what is in the queues, and how it does tells how large entries are. Heads are set back for that moment, in
/// which no code of the program runs; the kernel has its own idea of them.
unsafe fn peek(a: [usize; 6]) -> i64 {
    const MMAP: usize = 9;
    const MUNMAP: usize = 11;
    const OPEN: usize = 2;
    const READ: usize = 0;
    const O_CLOEXEC: usize = 0o2_000_000;
    let at = |n: usize| (a[4] >> (16 * n) & 0xffff) as u32;
    // SAFETY: the words that are changed are in the page that is mapped here, and are put back.
    unsafe {
        let ring = syscall(MMAP, [0, 4096, 3, 1, a[0], 0]);
        if ring < 0 && ring >= -4095 {
            return ring;
        }
        let fd = syscall(OPEN, [a[1], O_CLOEXEC, 0, 0, 0, 0]);
        let mut r = fd;
        if fd >= 0 {
            let (sq, cq) = (word(ring as usize, at(0)), word(ring as usize, at(2)));
            let found = [sq.load(SeqCst), cq.load(SeqCst)];
            let tails = [word(ring as usize, at(1)).load(SeqCst), word(ring as usize, at(3)).load(SeqCst)];
            if found[0] == tails[0] {
                sq.store(tails[0].wrapping_sub(1), SeqCst);
            }
            if found[1] == tails[1] {
                cq.store(tails[1].wrapping_sub(1), SeqCst);
            }
            r = syscall(READ, [fd as usize, a[2], a[3], 0, 0, 0]);
            sq.store(found[0], SeqCst);
            cq.store(found[1], SeqCst);
            syscall(CLOSE, [fd as usize, 0, 0, 0, 0, 0]);
        }
        syscall(MUNMAP, [ring as usize, 4096, 0, 0, 0, 0]);
        r
    }
}

unsafe fn groups(fd: usize, status: *mut u32) -> i64 {
    const REGISTER_PBUF_STATUS: usize = 26;
    const ENOENT: i64 = -2;
    // SAFETY: the engine has made room for the structure.
    unsafe {
        // a kernel that does not know the question says so before it looks at its address
        if syscall(IO_URING_REGISTER, [fd, REGISTER_PBUF_STATUS, 1, 1, 0, 0]) != -14 {
            return ENOENT;
        }
        let mut group = 0;
        while group < 1 << 16 {
            status.write_volatile(group);
            if syscall(IO_URING_REGISTER, [fd, REGISTER_PBUF_STATUS, status as usize, 1, 0, 0]) != ENOENT {
                return group as i64;
            }
            group += 1;
        }
        ENOENT
    }
}

/// Copies without calling a `memcpy`: the blob has nothing to link with.
unsafe fn copy(to: usize, from: usize, n: usize) {
    // SAFETY: the plan names memory that is mapped in this task.
    unsafe {
        core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rdi") to => _, inout("rsi") from => _, options(nostack, preserves_flags));
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    loop {
        // SAFETY: exit_group takes no memory.
        unsafe { syscall(EXIT_GROUP, [134, 0, 0, 0, 0, 0]) };
    }
}
