//! x86-64 machine code that the engine writes into a task, and never runs itself.
//!
//! - [`way_back`]: sets the signal mask and all general registers of an interrupted program, then jumps to where it was.
//!   It needs no stack and nothing outside itself: everything is an immediate or lies behind its own code, so a task
//!   can take it when its engine is dead.
//! - [`trampoline`]: one system call, then the way back. The engine stops the task behind the call; a task whose engine
//!   died meanwhile just returns.
//! - [`boot`]: the first instructions of a fresh process: map the shared memory, jump into the executor.

/// The general registers, in the kernel's `user_regs_struct` order (ptrace(2), sys/user.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub bp: u64,
    pub bx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub ax: u64,
    pub cx: u64,
    pub dx: u64,
    pub si: u64,
    pub di: u64,
    pub orig_ax: u64,
    pub ip: u64,
    pub cs: u64,
    pub flags: u64,
    pub sp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}
const _: () = assert!(core::mem::size_of::<Registers>() == 27 * 8);

/// Room that [`way_back`] and [`trampoline`] need, in bytes.
pub const STUB_SIZE: usize = 320;
/// Room that [`boot`] needs, in bytes.
pub const BOOT_SIZE: usize = 256;

/// Machine code being written.
struct Code<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Code<N> {
    fn new() -> Self {
        Code { bytes: [0; N], len: 0 }
    }
    fn put(&mut self, more: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.len..self.len + more.len()) {
            room.copy_from_slice(more);
        }
        self.len += more.len();
    }
    /// `mov reg, imm64`, reg numbered as the instruction set does (rax rcx rdx rbx rsp rbp rsi rdi r8 … r15).
    fn mov(&mut self, reg: u8, value: u64) {
        self.put(&[0x48 | (reg >> 3), 0xb8 | (reg & 7)]);
        self.put(&value.to_le_bytes());
    }
    fn syscall(&mut self) {
        self.put(&[0x0f, 0x05]);
    }
}

const AX: u8 = 0;
const CX: u8 = 1;
const DX: u8 = 2;
const BX: u8 = 3;
const SP: u8 = 4;
const BP: u8 = 5;
const SI: u8 = 6;
const DI: u8 = 7;

/// Appends the way back to `code`, whose first byte will lie at `at`.
///
/// The program's stack pointer comes first: from then on a signal may come at any instruction, and its frame goes where
/// the program would have had it. So nothing here may use a stack, and the flags are made without one.
fn put_way_back<const N: usize>(code: &mut Code<N>, at: u64, regs: &Registers, mask: u64) {
    const OVERFLOW: u64 = 1 << 11;
    const DIRECTION: u64 = 1 << 10;
    // data first (jumped over), so that its addresses are known: mask, ip
    code.put(&[0xeb, 16]);
    let data = at + code.len as u64;
    code.put(&mask.to_le_bytes());
    code.put(&regs.ip.to_le_bytes());
    code.mov(SP, regs.sp);
    // rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8)
    code.mov(AX, 14);
    code.mov(DI, 2);
    code.mov(SI, data);
    code.mov(DX, 0);
    code.mov(10, 8);
    code.syscall();
    // OF: 0x7f + 1 overflows, xor does not; SF, ZF, AF, PF, CF: sahf; DF: std or cld
    if regs.flags & OVERFLOW != 0 {
        code.put(&[0xb0, 0x7f, 0xfe, 0xc0]); // mov al, 0x7f; inc al
    } else {
        code.put(&[0x31, 0xc0]); // xor eax, eax
    }
    code.put(&[0xb4, regs.flags as u8, 0x9e]); // mov ah, low byte; sahf
    code.put(&[if regs.flags & DIRECTION != 0 { 0xfd } else { 0xfc }]);
    for (reg, value) in [
        (AX, regs.ax),
        (CX, regs.cx),
        (DX, regs.dx),
        (BX, regs.bx),
        (BP, regs.bp),
        (SI, regs.si),
        (DI, regs.di),
        (8, regs.r8),
        (9, regs.r9),
        (10, regs.r10),
        (11, regs.r11),
        (12, regs.r12),
        (13, regs.r13),
        (14, regs.r14),
        (15, regs.r15),
    ] {
        code.mov(reg, value);
    }
    // jmp [rip + disp32]
    let end = at + code.len as u64 + 6;
    let distance = (data + 8).wrapping_sub(end) as i64 as i32;
    code.put(&[0xff, 0x25]);
    code.put(&distance.to_le_bytes());
}

/// Code that returns to the program that `regs` was taken from and sets its signal mask; to lie at `at`.
pub fn way_back(at: u64, regs: &Registers, mask: u64) -> [u8; STUB_SIZE] {
    let mut code = Code::new();
    put_way_back(&mut code, at, regs, mask);
    code.bytes
}

/// A system call instruction, and the way back behind it; to lie at `at`. The engine sets the call's registers.
pub fn trampoline(at: u64, regs: &Registers, mask: u64) -> [u8; STUB_SIZE] {
    let mut code = Code::new();
    code.syscall();
    put_way_back(&mut code, at, regs, mask);
    code.bytes
}

/// What a fresh process maps before it runs the executor.
#[derive(Clone, Copy, Debug)]
pub struct Boot {
    /// Descriptor of the shared memory.
    pub fd: u64,
    /// Where code and data go.
    pub address: u64,
    /// Bytes of code (read and execute), at the start.
    pub code: u64,
    /// Bytes of data (read and write), behind the code.
    pub data: u64,
    /// Where the executor is entered.
    pub entry: u64,
    /// Its argument: address of the first [`crate::plan::Control`].
    pub control: u64,
    /// Its stack.
    pub stack: u64,
}

/// The first code of a fresh process.
pub fn boot(b: &Boot) -> [u8; BOOT_SIZE] {
    const MMAP: u64 = 9;
    const SHARED_FIXED_NOREPLACE: u64 = 0x1 | 0x10_0000;
    let mut code = Code::new();
    for (at, len, prot, offset) in [(b.address, b.code, 1 | 4, 0), (b.address + b.code, b.data, 1 | 2, b.code)] {
        code.mov(AX, MMAP);
        code.mov(DI, at);
        code.mov(SI, len);
        code.mov(DX, prot);
        code.mov(10, SHARED_FIXED_NOREPLACE);
        code.mov(8, b.fd);
        code.mov(9, offset);
        code.syscall();
    }
    code.mov(SP, b.stack);
    code.mov(DI, b.control);
    code.mov(AX, b.entry);
    code.put(&[0xff, 0xe0]); // jmp rax
    code.bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stubs_fit() {
        let regs = Registers { flags: 1 << 11, ..Registers::default() };
        let stub = trampoline(0x7000_0000, &regs, !0);
        // room is left behind the last instruction, so nothing was cut off
        assert_eq!(stub[STUB_SIZE - 8..], [0; 8]);
        assert_eq!(stub[..4], [0x0f, 0x05, 0xeb, 16]);
        let boot =
            boot(&Boot { fd: 3, address: 1 << 46, code: 1 << 20, data: 1 << 30, entry: !0, control: !0, stack: !0 });
        assert_eq!(boot[BOOT_SIZE - 8..], [0; 8]);
    }
}
