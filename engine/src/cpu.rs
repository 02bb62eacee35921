//! What this CPU can do (`cpuinfo.img`), and whether it can do what the one could on which a tree was dumped.
//!
//! The cpuid instruction says it, in words of 32 flags. The image has 19 such words in an order of its own ([`WORDS`]), which was that
//! of an older kernel's; 12 in version 1. Three flags are no CPU's but the kernel's, and always the same on 64 bits. Of the
//! state that XSAVE saves the image has the components and two sizes: for those that are in use, and for all. It says of the
//! components that SSE and the first of MPX are not there, which they are: CRIU takes a number for a mask, and one who writes
//! them down is refused by it.
//!
//! What is compared (`--cpu-cap`): `fpu` components, sizes and four flags, `ins` the flags of instructions ([`INSTRUCTIONS`]), which
//! may be more here, `cpu` all flags, which may not. Under our own name a dump always writes it, and a restore that was asked for
//! nothing compares instructions and components, unless the image is not there.
//!
//! Sources: Intel SDM vol. 2 (CPUID), AMD APM vol. 3 appendix E, arch/x86/include/asm/cpufeatures.h.

use standstill_images::proto::cpuinfo_x86_entry::Vendor;
use standstill_images::proto::{CpuinfoEntry, CpuinfoX86Entry};
use standstill_images::{ImageKind, Images};

use crate::error::{Error, Result};
use crate::options::{CpuCap, Options, Persona};
use crate::sys::cpu;

const IMAGE: &str = "cpuinfo.img";
const VERSION: u32 = 2;
const OLD_WORDS: usize = 12;
const ALL_WORDS: usize = 19;

/// Which register.
#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Register::{Eax, Ebx, Ecx, Edx};

/// Words that a leaf of cpuid gives: number in the image, leaf, its part, register. Those that are not here are zero.
const WORDS: &[(usize, u32, u32, Register)] = &[
    (0, 1, 0, Edx),
    (1, 0x8000_0001, 0, Edx),
    (4, 1, 0, Ecx),
    (6, 0x8000_0001, 0, Ecx),
    (9, 7, 0, Ebx),
    (10, 0xd, 1, Eax),
    (11, 7, 0, Ecx),
    (13, 0x8000_0008, 0, Ebx),
    (14, 6, 0, Eax),
    (15, 0x8000_000a, 0, Edx),
    (16, 0xf, 0, Edx),
    (17, 0x8000_0007, 0, Ebx),
    (18, 7, 0, Edx),
];

/// A flag: its word, its bit.
type Flag = (usize, u32);

const FPU: Flag = (0, 0);
const FXSR: Flag = (0, 24);
const OSXSAVE: Flag = (4, 27);
const XSAVE: Flag = (4, 26);
const XSAVES: Flag = (10, 3);
/// Of the kernel: `rep` is fast, there is a long `nop`, there is cpuid.
const REP_GOOD: Flag = (3, 16);
const NOPL: Flag = (3, 20);
const CPUID: Flag = (3, 25);
const ERMS: Flag = (9, 9);
/// The part of the cache's monitoring that has a leaf of its own, and where that goes.
const CACHE_MONITOR: Flag = (16, 1);
const CACHE_MONITOR_WORD: usize = 12;

/// The flags that say which instructions there are, by word, as /proc/cpuinfo calls them.
const INSTRUCTIONS: &[(usize, &[(u32, &str)])] = &[
    (
        0,
        &[
            (0, "fpu"),
            (4, "tsc"),
            (8, "cx8"),
            (11, "sep"),
            (15, "cmov"),
            (19, "clflush"),
            (23, "mmx"),
            (24, "fxsr"),
            (25, "sse"),
            (26, "sse2"),
        ],
    ),
    (1, &[(11, "syscall"), (22, "mmxext"), (27, "rdtscp"), (30, "3dnowext"), (31, "3dnow")]),
    (3, &[(16, "rep_good"), (20, "nopl")]),
    (
        4,
        &[
            (0, "pni"),
            (1, "pclmulqdq"),
            (3, "monitor"),
            (9, "ssse3"),
            (13, "cx16"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (27, "osxsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (6, &[(5, "abm"), (6, "sse4a"), (7, "misalignsse"), (8, "3dnowprefetch"), (11, "xop"), (16, "fma4"), (21, "tbm")]),
    (
        9,
        &[
            (0, "fsgsbase"),
            (3, "bmi1"),
            (4, "hle"),
            (5, "avx2"),
            (8, "bmi2"),
            (9, "erms"),
            (11, "rtm"),
            (14, "mpx"),
            (16, "avx512f"),
            (17, "avx512dq"),
            (18, "rdseed"),
            (19, "adx"),
            (23, "clflushopt"),
            (26, "avx512pf"),
            (27, "avx512er"),
            (28, "avx512cd"),
            (29, "sha_ni"),
            (30, "avx512bw"),
            (31, "avx512vl"),
        ],
    ),
    (10, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1")]),
    (
        11,
        &[
            (1, "avx512vbmi"),
            (6, "avx512_vbmi2"),
            (8, "gfni"),
            (9, "vaes"),
            (10, "vpclmulqdq"),
            (11, "avx512_vnni"),
            (12, "avx512_bitalg"),
            (13, "tme"),
            (14, "avx512_vpopcntdq"),
            (22, "rdpid"),
        ],
    ),
    (13, &[(0, "clzero")]),
    (18, &[(2, "avx512_4vnniw"), (3, "avx512_4fmaps")]),
];

/// Components of the state that XSAVE saves, each with the flag without which it is not there: x87, SSE, AVX, two of MPX, three of
/// AVX-512, protection keys.
const COMPONENTS: &[(u32, Flag)] = &[
    (0, FPU),
    (1, (0, 25)),
    (2, (4, 28)),
    (3, (9, 14)),
    (4, (9, 14)),
    (5, (9, 16)),
    (6, (9, 16)),
    (7, (9, 16)),
    (9, (11, 3)),
];

/// SSE and the first of MPX.
const LEFT_OUT: u64 = 0b1010;

fn has(words: &[u32], (word, bit): Flag) -> bool {
    words.get(word).is_some_and(|flags| flags >> bit & 1 == 1)
}

/// What this CPU can do.
fn host() -> Result<CpuinfoX86Entry> {
    let text = |words: &[u32]| -> String {
        let bytes = words.iter().flat_map(|word| word.to_le_bytes()).take_while(|&byte| byte != 0);
        bytes.map(char::from).collect()
    };
    let [highest, b, c, d] = cpu::leaf(0, 0);
    let name = text(&[b, d, c]);
    let vendor = match name.as_str() {
        "GenuineIntel" => Vendor::Intel,
        "AuthenticAMD" | "HygonGenuine" => Vendor::Amd,
        _ => return Err(Error::Changed { what: format!("Unsupported CPU vendor {name}") }),
    };
    let [signature, ..] = cpu::leaf(1, 0);
    let part = |from: u32, bits: u32| signature >> from & ((1 << bits) - 1);
    let (mut family, mut model) = (part(8, 4), part(4, 4));
    if family == 0xf {
        family += part(20, 8);
    }
    if family >= 6 {
        model += part(16, 4) << 4;
    }
    let [highest_extended, ..] = cpu::leaf(0x8000_0000, 0);
    let there = |leaf: u32| leaf <= if leaf < 0x8000_0000 { highest } else { highest_extended };
    let mut words = vec![0u32; ALL_WORDS];
    for &(word, leaf, part, register) in WORDS.iter().filter(|(_, leaf, ..)| there(*leaf)) {
        words[word] = cpu::leaf(leaf, part)[register as usize];
    }
    if has(&words, CACHE_MONITOR) {
        words[CACHE_MONITOR_WORD] = cpu::leaf(0xf, 1)[Edx as usize];
    }
    let mut set = |(word, bit): Flag, on: bool| {
        let flags = &mut words[word];
        *flags = if on { *flags | 1 << bit } else { *flags & !(1 << bit) };
    };
    set(CPUID, true);
    set(NOPL, true);
    if !there(0xd) {
        set(XSAVE, false);
    }
    match vendor {
        Vendor::Intel if family == 6 => set(REP_GOOD, true),
        Vendor::Intel if family == 15 => [REP_GOOD, ERMS].into_iter().for_each(|flag| set(flag, false)),
        Vendor::Amd => {
            set((0, 31), false);
            // the first of the family have it from a stepping on
            let of_k8 = (0x0f48..0x0f50).contains(&signature) || signature >= 0x0f58;
            if family > 0xf || (family == 0xf && of_k8) {
                set(REP_GOOD, true);
            }
        }
        Vendor::Intel | Vendor::Unknown => {}
    }
    let model_id = (highest_extended >= 0x8000_0004).then(|| {
        let words: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| cpu::leaf(leaf, 0)).collect();
        text(&words).trim_start_matches(' ').to_owned()
    });
    let (mut components, mut size, mut size_max) = (0, 0, 0);
    if has(&words, XSAVE) {
        let [low, b, c, high] = cpu::leaf(0xd, 0);
        let all = u64::from(low) | u64::from(high) << 32;
        let there = COMPONENTS.iter().filter(|(_, flag)| has(&words, *flag));
        components = there.fold(0, |set, (bit, _)| set | 1 << bit) & all & !LEFT_OUT;
        (size, size_max) = (b, c);
    }
    Ok(CpuinfoX86Entry {
        vendor_id: vendor.into(),
        cpu_family: family,
        model,
        stepping: part(0, 4),
        capability_ver: VERSION,
        capability: words,
        model_id: model_id.filter(|name| !name.is_empty()).map(String::into_bytes),
        xfeatures_mask: Some(components),
        xsave_size: Some(size),
        xsave_size_max: Some(size_max),
    })
}

/// Writes the image.
pub fn dump(images: &Images) -> Result<()> {
    let entry = CpuinfoEntry { x86_entry: vec![host()?], ..CpuinfoEntry::default() };
    Ok(images.write_one(ImageKind::Cpuinfo, (), &entry)?)
}

/// Writes it if the options of a dump want it.
pub fn dump_if_wanted(opts: &Options, images: &Images) -> Result<()> {
    let by_default = opts.personality == Persona::Standstill && opts.cpu_cap != CpuCap::NONE;
    if by_default || opts.cpu_cap.has(CpuCap::IMAGE) {
        dump(images)?;
    }
    Ok(())
}

/// The verb `cpuinfo check`: compares with the image what is asked for, and all if nothing is.
pub fn check_all(opts: &Options, images: &Images) -> Result<()> {
    check(images, if opts.cpu_cap == CpuCap::NONE { CpuCap::ALL } else { opts.cpu_cap })
}

/// Compares with the image what is asked for.
pub fn check(images: &Images, caps: CpuCap) -> Result<()> {
    if !images.exists(ImageKind::Cpuinfo, ())? {
        return Err(Error::Changed { what: "No cpuinfo image".into() });
    }
    let then = read(images)?;
    let now = host()?;
    compare(&filled(then, &now)?, &now, caps)
}

/// Compares with it what the options of a restore want.
pub fn check_if_wanted(opts: &Options, images: &Images) -> Result<()> {
    if opts.cpu_cap.has(CpuCap::IMAGE) {
        return check(images, opts.cpu_cap);
    }
    if opts.personality == Persona::Criu || opts.cpu_cap == CpuCap::NONE || !images.exists(ImageKind::Cpuinfo, ())? {
        return Ok(());
    }
    let now = host()?;
    let then = filled(read(images)?, &now)?;
    compare(&then, &now, CpuCap::INS)?;
    components(&then, &now)
}

fn read(images: &Images) -> Result<CpuinfoX86Entry> {
    let mut entry: CpuinfoEntry = images.read_one(ImageKind::Cpuinfo, ())?;
    match (entry.x86_entry.pop(), entry.x86_entry.len()) {
        (Some(one), 0) => Ok(one),
        (one, more) => {
            let count = more + usize::from(one.is_some());
            let what = format!("No x86 related cpuinfo in image, corruption (n_x86_entry = {count})");
            Err(Error::lie(IMAGE, what))
        }
    }
}

/// With what this CPU says where an older image says nothing.
fn filled(mut then: CpuinfoX86Entry, now: &CpuinfoX86Entry) -> Result<CpuinfoX86Entry> {
    let lie = |what: String| Err(Error::lie(IMAGE, what));
    match Vendor::try_from(then.vendor_id) {
        Ok(Vendor::Intel | Vendor::Amd) => {}
        Ok(Vendor::Unknown) | Err(_) => return lie(format!("Unknown cpu vendor {}", then.vendor_id)),
    }
    let expected = match then.capability_ver {
        1 => OLD_WORDS,
        2 => ALL_WORDS,
        version => return lie(format!("Image carries unknown capability version {version}")),
    };
    if then.capability.len() != expected {
        return lie(format!("Image carries {} words while {expected} expected", then.capability.len()));
    }
    then.capability.extend(now.capability.iter().skip(expected));
    then.xfeatures_mask = then.xfeatures_mask.or(now.xfeatures_mask);
    then.xsave_size = then.xsave_size.or(now.xsave_size);
    then.xsave_size_max = then.xsave_size_max.or(now.xsave_size_max);
    Ok(then)
}

fn compare(then: &CpuinfoX86Entry, now: &CpuinfoX86Entry, caps: CpuCap) -> Result<()> {
    let changed = |what: String| Err(Error::Changed { what });
    if caps.has(CpuCap::FPU) {
        let lacks =
            [FPU, FXSR, OSXSAVE, XSAVES].map(|f| u8::from(has(&then.capability, f) && !has(&now.capability, f)));
        if lacks.contains(&1) {
            let [fpu, fxsr, osxsave, xsaves] = lacks;
            return changed(format!(
                "FPU feature required by image is not supported on host \
                 (fpu:{fpu} fxsr:{fxsr} osxsave:{osxsave} xsaves:{xsaves})"
            ));
        }
        components(then, now)?;
        let sizes = [("", then.xsave_size, now.xsave_size), ("max ", then.xsave_size_max, now.xsave_size_max)];
        if let Some((which, then, now)) = sizes.into_iter().find(|(_, then, now)| then != now) {
            return changed(format!("CPU xsave {which}size mismatch ({}/{})", then.unwrap_or(0), now.unwrap_or(0)));
        }
    }
    if caps.has(CpuCap::INS) {
        let missing: Vec<&str> = missing(&then.capability, &now.capability).collect();
        if !missing.is_empty() {
            return changed(format!(
                "CPU instruction capabilities do not match run time: this CPU lacks {}; restore on one that has this, or with \
                 --cpu-cap=none if the program does without",
                missing.join(", ")
            ));
        }
    }
    if caps.has(CpuCap::CPU) && then.capability != now.capability {
        return changed("CPU capabilities do not match run time".into());
    }
    Ok(())
}

fn components(then: &CpuinfoX86Entry, now: &CpuinfoX86Entry) -> Result<()> {
    match then.xfeatures_mask.unwrap_or(0) & !now.xfeatures_mask.unwrap_or(0) {
        0 => Ok(()),
        more => Err(Error::Changed { what: format!("CPU xfeatures has unsupported bits ({more:#x})") }),
    }
}

/// Instructions that were there then and are not now.
fn missing<'a>(then: &'a [u32], now: &'a [u32]) -> impl Iterator<Item = &'static str> + 'a {
    let all = INSTRUCTIONS.iter().flat_map(|(word, flags)| flags.iter().map(move |(bit, name)| ((*word, *bit), *name)));
    all.filter(|(flag, _)| has(then, *flag) && !has(now, *flag)).map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use standstill_images::MemoryStore;

    const EVERYTHING: CpuCap = CpuCap::ALL;

    fn against(change: impl FnOnce(&mut CpuinfoX86Entry), caps: CpuCap) -> Result<()> {
        let images = Images::new(MemoryStore::new());
        let mut entry = host().unwrap();
        change(&mut entry);
        let image = CpuinfoEntry { x86_entry: vec![entry], ..CpuinfoEntry::default() };
        images.write_one(ImageKind::Cpuinfo, (), &image).unwrap();
        check(&images, caps)
    }

    #[test]
    fn it_is_as_itself() {
        let images = Images::new(MemoryStore::new());
        assert!(check(&images, EVERYTHING).unwrap_err().chain().contains("No cpuinfo image"));
        dump(&images).unwrap();
        check(&images, EVERYTHING).unwrap();
        let cpu = host().unwrap();
        // as the kernel says it
        let text = std::fs::read_to_string("/proc/cpuinfo").unwrap();
        let value = |name: &str| {
            let line = text.lines().find(|line| line.split(':').next().map(str::trim) == Some(name));
            line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.trim().to_owned())
        };
        assert_eq!(value("cpu family"), Some(cpu.cpu_family.to_string()));
        assert_eq!(value("model"), Some(cpu.model.to_string()));
        assert_eq!(value("stepping"), Some(cpu.stepping.to_string()));
        assert_eq!(
            value("model name"),
            cpu.model_id.clone().and_then(|name| Some(String::from_utf8(name).ok()?.trim().to_owned()))
        );
        let flags = value("flags").unwrap();
        for flag in ["avx2", "avx512f", "sse4_2", "rdrand", "bmi2", "sha_ni", "fsgsbase", "xsavec", "gfni", "rdpid"] {
            let word = |name: &&(usize, &[(u32, &'static str)])| name.1.iter().any(|(_, n)| *n == flag);
            let (word, bits) = INSTRUCTIONS.iter().find(word).unwrap();
            let bit = bits.iter().find(|(_, n)| *n == flag).unwrap().0;
            assert_eq!(has(&cpu.capability, (*word, bit)), flags.split(' ').any(|f| f == flag), "{flag}");
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        // no CPU has Intel's and AMD's
        let more = |e: &mut CpuinfoX86Entry| {
            e.capability[6] |= 1 << 21 | 1 << 16;
            e.capability[18] |= 1 << 2;
        };
        let error = against(more, CpuCap::INS).unwrap_err().chain();
        assert!(error.contains("do not match run time: this CPU lacks fma4, tbm, avx512_4vnniw;"), "{error}");
        against(more, CpuCap::FPU).unwrap();
        against(more, CpuCap::NONE).unwrap();
        assert!(against(|e| e.capability[14] ^= 1, CpuCap::CPU).is_err());
        against(|e| e.capability[14] ^= 1, CpuCap::INS).unwrap();
        // more may be here
        against(|e| e.capability[4] &= !1, CpuCap::INS).unwrap();
    }

    #[test]
    fn state_must_fit() {
        let error = |change: fn(&mut CpuinfoX86Entry)| against(change, CpuCap::FPU).unwrap_err().chain();
        assert!(error(|e| e.xfeatures_mask = Some(1 << 60)).contains("unsupported bits (0x1000000000000000)"));
        assert!(error(|e| e.xsave_size = Some(7)).contains("CPU xsave size mismatch (7/"));
        assert!(error(|e| e.xsave_size_max = Some(8)).contains("CPU xsave max size mismatch (8/"));
        against(|e| (e.xfeatures_mask, e.xsave_size, e.xsave_size_max) = (None, None, None), CpuCap::FPU).unwrap();
    }

    #[test]
    fn images_that_nobody_writes() {
        let error = |change: fn(&mut CpuinfoX86Entry)| against(change, EVERYTHING).unwrap_err().chain();
        assert!(error(|e| e.vendor_id = 0).contains("Unknown cpu vendor 0"));
        assert!(error(|e| e.capability_ver = 3).contains("unknown capability version 3"));
        assert!(error(|e| e.capability.truncate(18)).contains("Image carries 18 words while 19 expected"));
        against(
            |e| {
                e.capability_ver = 1;
                e.capability.truncate(12);
            },
            EVERYTHING,
        )
        .unwrap();
        let images = Images::new(MemoryStore::new());
        images.write_one(ImageKind::Cpuinfo, (), &CpuinfoEntry::default()).unwrap();
        assert!(check(&images, EVERYTHING).unwrap_err().chain().contains("(n_x86_entry = 0)"));
    }
}
