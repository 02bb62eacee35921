//! Live values in registers of every kind, across the checkpoint: of a thread that computes, and of one in a call.

use std::arch::asm;
use std::sync::atomic::AtomicU32;

use super::support::*;

/// What is put into the registers, and what came back.
#[repr(C, align(64))]
struct Values {
    vectors: [[u8; 64]; 32],
    masks: [u64; 8],
    general: [u64; 8],
    x87: [f64; 4],
    mxcsr: u32,
    control: u16,
}

impl Values {
    fn new(seed: u8) -> Values {
        let mut v = Values::empty();
        for (n, vector) in v.vectors.iter_mut().enumerate() {
            for (i, byte) in vector.iter_mut().enumerate() {
                *byte = (n * 67 + i * 3) as u8 ^ seed;
            }
        }
        for n in 0..8u64 {
            v.masks[n as usize] = (0x0123_4567_89ab_cdef_u64 ^ u64::from(seed)).rotate_left(n as u32 * 5);
            v.general[n as usize] = 0xfeed_0000_0000_0000 + n * 0x1_0001 + u64::from(seed);
        }
        v.x87 = [1.0 / 3.0, 2.5, -7e300, f64::from(seed)];
        // round towards zero, nothing unmasked, a flag that is set
        v.mxcsr = 0x7fa0;
        v.control = 0x0f7f;
        v
    }
    fn empty() -> Values {
        unsafe { std::mem::zeroed() }
    }
}

/// Loads as much of `v` as the CPU has registers for, waits until `gate` is not 0 (with `call`, inside system calls),
/// and stores all of it into `out`.
macro_rules! hold {
    ($call:literal, $v:expr, $out:expr, $gate:expr, $load:literal, $store:literal, $feature:literal) => {{
        #[target_feature(enable = $feature)]
        unsafe fn hold(v: &Values, out: &mut Values, gate: &AtomicU32) {
            unsafe {
                asm!(
                    "push rbx", "push rbp",
                    $load,
                    "fninit", "fldcw [rdi + {control}]", "ldmxcsr [rdi + {mxcsr}]",
                    "fld qword ptr [rdi + {x87}]", "fld qword ptr [rdi + {x87} + 8]",
                    "fld qword ptr [rdi + {x87} + 16]", "fld qword ptr [rdi + {x87} + 24]",
                    "mov rbx, [rdi + {general}]", "mov rbp, [rdi + {general} + 8]",
                    "mov r8, [rdi + {general} + 16]", "mov r9, [rdi + {general} + 24]",
                    "mov r10, [rdi + {general} + 32]", "mov r13, [rdi + {general} + 40]",
                    "mov r14, [rdi + {general} + 48]", "mov r15, [rdi + {general} + 56]",
                    "push rsi", "push rdi",
                    "2:",
                    $call,
                    "pause",
                    "cmp dword ptr [r12], 0",
                    "je 2b",
                    "pop rdi", "pop rsi",
                    "mov [rsi + {general}], rbx", "mov [rsi + {general} + 8], rbp",
                    "mov [rsi + {general} + 16], r8", "mov [rsi + {general} + 24], r9",
                    "mov [rsi + {general} + 32], r10", "mov [rsi + {general} + 40], r13",
                    "mov [rsi + {general} + 48], r14", "mov [rsi + {general} + 56], r15",
                    "fstp qword ptr [rsi + {x87} + 24]", "fstp qword ptr [rsi + {x87} + 16]",
                    "fstp qword ptr [rsi + {x87} + 8]", "fstp qword ptr [rsi + {x87}]",
                    "fnstcw [rsi + {control}]", "stmxcsr [rsi + {mxcsr}]",
                    $store,
                    "fninit",
                    "mov dword ptr [rsp - 8], 0x1f80", "ldmxcsr [rsp - 8]",
                    "pop rbp", "pop rbx",
                    general = const std::mem::offset_of!(Values, general),
                    x87 = const std::mem::offset_of!(Values, x87),
                    control = const std::mem::offset_of!(Values, control),
                    mxcsr = const std::mem::offset_of!(Values, mxcsr),
                    in("rdi") v, in("rsi") out, in("r12") gate.as_ptr(),
                    out("rax") _, out("rcx") _, out("rdx") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                    out("r13") _, out("r14") _, out("r15") _,
                    out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                    out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                    out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                    out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                    out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                );
            }
        }
        unsafe { hold($v, $out, $gate) }
    }};
}

/// sched_yield, which leaves all registers but rax, rcx and r11 alone.
macro_rules! each_width {
    ($call:literal, $v:expr, $out:expr, $gate:expr) => {
        if is_x86_feature_detected!("avx512bw") {
            hold!($call, $v, $out, $gate,
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\nvmovdqu64 zmm\\n, [rdi + \\n * 64]\n.endr\n.irp n,1,2,3,4,5,6,7\nkmovq k\\n, [rdi + 2048 + \\n * 8]\n.endr",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\nvmovdqu64 [rsi + \\n * 64], zmm\\n\n.endr\n.irp n,1,2,3,4,5,6,7\nkmovq [rsi + 2048 + \\n * 8], k\\n\n.endr\nvzeroupper",
                "avx512f,avx512bw");
            (32, 64)
        } else if is_x86_feature_detected!("avx") {
            hold!($call, $v, $out, $gate,
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nvmovdqu ymm\\n, [rdi + \\n * 64]\n.endr",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nvmovdqu [rsi + \\n * 64], ymm\\n\n.endr\nvzeroupper",
                "avx");
            (16, 32)
        } else {
            hold!($call, $v, $out, $gate,
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu xmm\\n, [rdi + \\n * 64]\n.endr",
                ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\nmovdqu [rsi + \\n * 64], xmm\\n\n.endr",
                "sse2");
            (16, 16)
        }
    };
}

fn hold_and_check(seed: u8, calls: bool, gate: &AtomicU32) {
    let (v, mut out) = (Values::new(seed), Values::empty());
    let (registers, width): (usize, usize) = if calls {
        each_width!("mov eax, 24\nsyscall", &v, &mut out, gate)
    } else {
        each_width!("", &v, &mut out, gate)
    };
    for n in 0..registers {
        check_eq!((n, &out.vectors[n][..width]), (n, &v.vectors[n][..width]));
    }
    if registers == 32 {
        check_eq!(out.masks[1..], v.masks[1..]);
    }
    check_eq!(out.general, v.general);
    check_eq!(out.x87, v.x87);
    check_eq!(out.control, v.control);
    check_eq!(out.mxcsr & 0xffc0, v.mxcsr & 0xffc0);
}

/// Vectors of the largest width, masks, x87, control words, general registers.
pub(super) fn registers() {
    static GATE: AtomicU32 = AtomicU32::new(0);
    let shared = Shared::new();
    let work = move |seed, calls| {
        std::thread::spawn(move || {
            shared.add(0);
            hold_and_check(seed, calls, &GATE);
        })
    };
    let all = [work(0x11, false), work(0x77, true), work(0xd3, true)];
    shared.wait(0, 3);
    std::thread::sleep(std::time::Duration::from_millis(5));
    ready();
    GATE.store(1, std::sync::atomic::Ordering::SeqCst);
    for thread in all {
        check!(thread.join().is_ok());
    }
}

/// The same of the group leader, which a checkpoint has more to do in than in other threads, and leaves last.
pub(super) fn leader() {
    static GATE: AtomicU32 = AtomicU32::new(0);
    let other = std::thread::spawn(|| {
        std::thread::sleep(std::time::Duration::from_millis(5));
        ready();
        GATE.store(1, std::sync::atomic::Ordering::SeqCst);
    });
    hold_and_check(0x5a, false, &GATE);
    check!(other.join().is_ok());
}

/// The segment bases, one of which the C library does not use.
pub(super) fn base() {
    const ARCH_SET_GS: i32 = 0x1001;
    let area = map(0, 4096, RW, PRIVATE);
    unsafe { area.add(8).cast::<u64>().write(0x6773_6261_7365) };
    sys(unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, area) });
    let read = || {
        let value: u64;
        unsafe { asm!("mov {}, gs:[8]", out(reg) value, options(nostack, readonly)) };
        value
    };
    ready();
    check_eq!(read(), 0x6773_6261_7365);
    thread_local! { static MARK: std::cell::Cell<u64> = const { std::cell::Cell::new(5) }; }
    check_eq!(MARK.get(), 5);
}
