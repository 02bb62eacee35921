//! General registers and the extended (XSAVE) state of a thread.
//!
//! The kernel gives and takes them by ptrace: NT_PRSTATUS, and NT_X86_XSTATE in XSAVE's standard format, whose component
//! offsets depend on the CPU. The image (`thread_info_x86` in `core-N.img`) has named arrays instead. AMX tiles have no
//! field there and are refused while they are in use. Man page: ptrace(2); Intel SDM vol. 1, ch. 13.

use standstill_images::proto::{UserX86CetEntry, UserX86FpregsEntry, UserX86RegsEntry, UserX86XsaveEntry};
use standstill_restorer::arch::Registers;

use crate::error::{Error, Result};
use crate::sys::cpu::component;
use crate::tracee::undo_winding;

const FXSAVE: usize = 512;
const HEADER_BV: usize = 512;
const XSAVE_AREA: usize = 576;
const TILES: u64 = 1 << 17 | 1 << 18;

/// Components with a field in the image: bit, name, bytes in the image.
const FIELDS: [(u32, &str, usize); 7] = [
    (2, "AVX (ymm)", 256),
    (3, "MPX bound registers", 64),
    (4, "MPX configuration", 64),
    (5, "AVX-512 opmasks", 64),
    (6, "AVX-512 upper halves (zmm)", 512),
    (7, "AVX-512 registers 16 to 31 (zmm)", 1024),
    (9, "protection keys (pkru)", 8),
];

/// The registers as an image entry; `native` is 64-bit mode.
pub fn to_entry(r: &Registers) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.bp,
        bx: r.bx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.ax,
        cx: r.cx,
        dx: r.dx,
        si: r.si,
        di: r.di,
        orig_ax: r.orig_ax,
        ip: r.ip,
        cs: r.cs,
        flags: r.flags,
        sp: r.sp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: Some(1),
    }
}

/// An image entry as registers. A system call that was wound back at dump is given to the kernel to restart.
pub fn from_entry(e: &UserX86RegsEntry) -> Result<Registers> {
    if e.mode == Some(2) || e.cs != 0x33 {
        return Err(Error::refused("a 32-bit task", "Standstill restores 64-bit x86 tasks only"));
    }
    let r = Registers {
        r15: e.r15,
        r14: e.r14,
        r13: e.r13,
        r12: e.r12,
        bp: e.bp,
        bx: e.bx,
        r11: e.r11,
        r10: e.r10,
        r9: e.r9,
        r8: e.r8,
        ax: e.ax,
        cx: e.cx,
        dx: e.dx,
        si: e.si,
        di: e.di,
        orig_ax: u64::MAX,
        ip: e.ip,
        cs: e.cs,
        flags: e.flags,
        sp: e.sp,
        ss: e.ss,
        fs_base: e.fs_base,
        gs_base: e.gs_base,
        ds: e.ds,
        es: e.es,
        fs: e.fs,
        gs: e.gs,
    };
    let wound_back = e.orig_ax as i64 >= 0 && e.orig_ax == e.ax;
    Ok(if wound_back { undo_winding(r) } else { r })
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|x| x.try_into().ok()).map_or(0, u32::from_le_bytes)
}
fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|x| x.try_into().ok()).map_or(0, u64::from_le_bytes)
}
fn u32s(b: &[u8], at: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| u32_at(b, at + i * 4)).collect()
}
fn u64s(b: &[u8], at: usize, n: usize) -> Vec<u64> {
    (0..n).map(|i| u64_at(b, at + i * 8)).collect()
}

/// The extended state as an image entry.
pub fn xstate_to_entry(x: &[u8]) -> Result<UserX86FpregsEntry> {
    let bv = u64_at(x, HEADER_BV);
    if bv & TILES == TILES {
        return Err(Error::refused(
            "AMX tile registers in use",
            "let the program release its tiles (TILERELEASE) before the dump",
        ));
    }
    let have = |bit: u32| {
        let c = component(bit);
        (c.size > 0 && c.offset + c.size <= x.len()).then_some(c.offset)
    };
    let words = |bit, n| have(bit).map_or_else(Vec::new, |at| u64s(x, at, n));
    let xsave = (x.len() >= XSAVE_AREA).then(|| UserX86XsaveEntry {
        xstate_bv: bv,
        ymmh_space: have(2).map_or_else(Vec::new, |at| u32s(x, at, 64)),
        bndreg_state: words(3, 8),
        bndcsr_state: words(4, 8),
        opmask_reg: words(5, 8),
        zmm_upper: words(6, 64),
        hi16_zmm: words(7, 128),
        pkru: have(9).map_or_else(Vec::new, |at| u32s(x, at, 2)),
        cet: None::<UserX86CetEntry>,
    });
    Ok(UserX86FpregsEntry {
        cwd: u32_at(x, 0) & 0xffff,
        swd: u32_at(x, 0) >> 16,
        twd: u32_at(x, 4) & 0xffff,
        fop: u32_at(x, 4) >> 16,
        rip: u64_at(x, 8),
        rdp: u64_at(x, 16),
        mxcsr: u32_at(x, 24),
        mxcsr_mask: u32_at(x, 28),
        st_space: u32s(x, 32, 32),
        xmm_space: u32s(x, 160, 64),
        padding: Vec::new(),
        xsave,
    })
}

/// Lays an image entry over `base`, the state of a fresh thread on this CPU, so that it can be set by ptrace.
pub fn xstate_from_entry(e: &UserX86FpregsEntry, mut base: Vec<u8>) -> Result<Vec<u8>> {
    let lie = |what: &str| Error::lie("core", what.to_owned());
    if base.len() < FXSAVE || e.st_space.len() != 32 || e.xmm_space.len() != 64 {
        return Err(lie("floating point registers are not of the size that x86-64 has"));
    }
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(room) = base.get_mut(at..at + bytes.len()) {
            room.copy_from_slice(bytes);
        }
    };
    put(0, &(e.cwd as u16).to_le_bytes());
    put(2, &(e.swd as u16).to_le_bytes());
    put(4, &(e.twd as u16).to_le_bytes());
    put(6, &(e.fop as u16).to_le_bytes());
    put(8, &e.rip.to_le_bytes());
    put(16, &e.rdp.to_le_bytes());
    put(24, &e.mxcsr.to_le_bytes());
    for (i, w) in e.st_space.iter().enumerate() {
        put(32 + i * 4, &w.to_le_bytes());
    }
    // the last 24 words are the kernel's and software's, not registers
    for (i, w) in e.xmm_space.iter().take(64).enumerate() {
        put(160 + i * 4, &w.to_le_bytes());
    }
    let Some(xsave) = &e.xsave else { return Ok(base) };
    let mut bv = xsave.xstate_bv | 3;
    let bytes32 = |v: &[u32]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let bytes64 = |v: &[u64]| v.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let contents = [
        bytes32(&xsave.ymmh_space),
        bytes64(&xsave.bndreg_state),
        bytes64(&xsave.bndcsr_state),
        bytes64(&xsave.opmask_reg),
        bytes64(&xsave.zmm_upper),
        bytes64(&xsave.hi16_zmm),
        bytes32(&xsave.pkru),
    ];
    for ((bit, name, size), content) in FIELDS.iter().zip(&contents) {
        if bv >> bit & 1 == 0 {
            continue;
        }
        let c = component(*bit);
        if content.is_empty() {
            bv &= !(1 << bit);
            continue;
        }
        if content.len() != *size {
            return Err(lie(&format!("{name}: {} bytes instead of {size}", content.len())));
        }
        if c.size == 0 || c.offset + size > base.len() {
            return Err(Error::refused(
                format!("{name}, which the checkpoint has in use and this CPU lacks,"),
                "restore on a CPU with the features of the one that it was dumped on",
            ));
        }
        base[c.offset..c.offset + size].copy_from_slice(content);
    }
    let known = FIELDS.iter().fold(3u64, |m, (bit, ..)| m | 1 << bit);
    if base.len() >= XSAVE_AREA {
        base[HEADER_BV..HEADER_BV + 8].copy_from_slice(&(bv & known).to_le_bytes());
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xstate_survives_the_image() {
        let mut x = vec![0u8; 2696];
        for (i, b) in x.iter_mut().enumerate().take(416) {
            *b = (i * 7) as u8;
        }
        x[28..32].fill(0);
        let ymm = component(2);
        x[ymm.offset] = 9;
        x[HEADER_BV] = 7;
        let entry = xstate_to_entry(&x).unwrap();
        let back = xstate_from_entry(&entry, vec![0; x.len()]).unwrap();
        assert_eq!(back[..24], x[..24]);
        assert_eq!(back[32..416], x[32..416]);
        assert_eq!(back[ymm.offset], 9);
        assert_eq!(back[HEADER_BV], 7);
    }

    #[test]
    fn a_short_array_is_a_lie() {
        let mut x = vec![0u8; 2696];
        x[HEADER_BV] = 7;
        let mut entry = xstate_to_entry(&x).unwrap();
        entry.xsave.as_mut().unwrap().ymmh_space.pop();
        assert!(xstate_from_entry(&entry, x).is_err());
    }
}
