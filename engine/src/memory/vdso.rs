//! The kernel's code in every process, `[vdso]`, and its data, `[vvar]`.
//!
//! A fresh process has the running kernel's. If the image's is the same, byte for byte, both are moved to where they were
//! (mremap(2)). If the kernel is another one, programs still have addresses into the old code; so the old code stays where
//! it was, and each of its functions begins with a jump to the function of that name in the new one, which lies elsewhere.
//! Man page: vdso(7).

use std::collections::BTreeMap;

use goblin::elf::Elf;

use crate::error::{Call, Error, Result};
use crate::proc::maps::{Vma, VmaName};

/// Where a process has vdso and vvar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// First address of `[vvar]` (with `[vvar_vclock]`); equal to `vvar_end` if there is none.
    pub vvar: u64,
    /// First address behind it.
    pub vvar_end: u64,
    /// First address of `[vdso]`; equal to `vdso_end` if there is none.
    pub vdso: u64,
    /// First address behind it.
    pub vdso_end: u64,
}

impl Layout {
    /// From a process's areas.
    pub fn of(areas: &[Vma]) -> Layout {
        let mut l = Layout::default();
        for area in areas {
            match area.name() {
                VmaName::Vvar | VmaName::VvarVclock => {
                    if l.vvar == l.vvar_end {
                        l.vvar = area.start;
                    }
                    l.vvar_end = area.end;
                }
                VmaName::Vdso => (l.vdso, l.vdso_end) = (area.start, area.end),
                _ => {}
            }
        }
        l
    }

    /// The same pieces, moved so that they begin at `to`.
    pub fn moved(&self, to: u64) -> Layout {
        let from = self.start();
        let shift = |a: u64| if a == 0 { 0 } else { a - from + to };
        Layout {
            vvar: shift(self.vvar),
            vvar_end: shift(self.vvar_end),
            vdso: shift(self.vdso),
            vdso_end: shift(self.vdso_end),
        }
    }

    /// The lowest address.
    pub fn start(&self) -> u64 {
        match (self.vvar, self.vdso) {
            (0, v) | (v, 0) => v,
            (a, b) => a.min(b),
        }
    }

    /// From lowest to highest address, both pieces.
    pub fn span(&self) -> u64 {
        self.vdso_end.max(self.vvar_end) - self.start()
    }
}

/// The running kernel's vdso, from this process.
pub fn own() -> Result<&'static [u8]> {
    use std::sync::OnceLock;
    static OWN: OnceLock<Vec<u8>> = OnceLock::new();
    if let Some(bytes) = OWN.get() {
        return Ok(bytes);
    }
    let mut text = Vec::new();
    crate::proc::read_proc("/proc/self/maps".as_ref(), &mut text).call("read(/proc/self/maps)")?;
    let l = Layout::of(&crate::proc::maps::parse(&text)?);
    let mut bytes = vec![0; usize::try_from(l.vdso_end - l.vdso).unwrap_or(0)];
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    if !bytes.is_empty() && crate::sys::memory::read_remote(own, l.vdso, &mut bytes)? != bytes.len() {
        return Err(Error::Gone);
    }
    Ok(OWN.get_or_init(|| bytes))
}

/// The functions that a vdso offers, by name.
fn functions(image: &[u8]) -> Result<BTreeMap<String, u64>> {
    let bad = |_| Error::lie("pages", "the vdso is no ELF image");
    let elf = Elf::parse(image).map_err(bad)?;
    let mut all = BTreeMap::new();
    for symbol in elf.dynsyms.iter().filter(|s| s.is_function() && s.st_value != 0 && s.st_shndx != 0) {
        if let Some(name) = elf.dynstrtab.get_at(symbol.st_name) {
            if symbol.st_value + JUMP as u64 <= image.len() as u64 {
                all.insert(name.to_owned(), symbol.st_value);
            }
        }
    }
    Ok(all)
}

const JUMP: usize = 12;

/// The old code with a jump to the new code at the start of each function. `new_at` is where the new vdso lies.
pub fn redirect(old: &[u8], new: &[u8], new_at: u64) -> Result<Vec<u8>> {
    let (from, to) = (functions(old)?, functions(new)?);
    let mut code = old.to_vec();
    for (name, &at) in &from {
        let Some(target) = to.get(name) else {
            return Err(Error::refused(format!("a vdso with the function {name}"), "restore on a kernel that has it"));
        };
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        // movabs rax, target; jmp rax
        let mut jump = vec![0x48, 0xb8];
        jump.extend_from_slice(&(new_at + target).to_le_bytes());
        jump.extend_from_slice(&[0xff, 0xe0]);
        if let Some(room) = code.get_mut(at..at + JUMP) {
            room.copy_from_slice(&jump);
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_function_jumps() {
        let image = own().unwrap();
        let code = redirect(image, image, 0x7000_0000).unwrap();
        let time = functions(image).unwrap()["__vdso_clock_gettime"];
        assert_eq!(code[time as usize..time as usize + 2], [0x48, 0xb8]);
    }

    #[test]
    fn what_is_no_elf_is_refused() {
        assert!(redirect(&[7; 4096], own().unwrap(), 0).is_err());
    }
}
