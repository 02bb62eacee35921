//! Tests of the areas' parser: texts from real tasks, and hostile ones.

use super::*;

const SMAPS: &[u8] = b"55d0b9a4c000-55d0b9a4d000 r--p 00002000 fe:00 18504                      /usr/bin/cat\n\
Size:                  4 kB\nKernelPageSize:        4 kB\nMMUPageSize:           4 kB\nRss:                   4 kB\n\
Anonymous:             0 kB\nSwap:                  8 kB\nLocked:                0 kB\nTHPeligible:           0\n\
ProtectionKey:         3\nVmFlags: rd mr mw me sd \n\
7ffce801f000-7ffce8040000 rw-p 00000000 00:00 0                          [stack]\n\
Size:                132 kB\nKernelPageSize:        4 kB\nRss:                  12 kB\nAnonymous:            12 kB\n\
VmFlags: rd wr mr mw me gd ac zz \n\
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\nVmFlags: ex \n";

fn one(line: &str) -> Vma {
    let areas = parse(line.as_bytes()).unwrap();
    assert_eq!(areas.len(), 1);
    areas.into_iter().next().unwrap()
}

#[test]
fn smaps() {
    let areas = parse(SMAPS).unwrap();
    assert_eq!(areas.len(), 3);
    let cat = &areas[0];
    assert_eq!((cat.start, cat.end, cat.size()), (0x55d0_b9a4_c000, 0x55d0_b9a4_d000, 4096));
    assert_eq!((cat.read, cat.write, cat.exec, cat.shared), (true, false, false, false));
    assert_eq!((cat.offset, cat.dev_major, cat.dev_minor, cat.inode), (0x2000, 0xfe, 0, 18504));
    assert_eq!((cat.kernel_page_size_kb, cat.rss_kb, cat.swap_kb, cat.protection_key), (4, 4, 8, Some(3)));
    assert_eq!(cat.name(), VmaName::File(b"/usr/bin/cat"));
    assert!(cat.vm_flags.contains(VmFlags::READ | VmFlags::SOFT_DIRTY) && !cat.vm_flags.contains(VmFlags::WRITE));
    assert_eq!(format!("{:?}", cat.vm_flags), "VmFlags(rd mr mw me sd)");
    assert_eq!(areas[1].name(), VmaName::Stack);
    assert!(areas[1].vm_flags.contains(VmFlags::GROWS_DOWN | VmFlags::ACCOUNT));
    assert_eq!(areas[1].unknown_flags, [*b"zz"]);
    assert_eq!(areas[2].name(), VmaName::Vsyscall);
    assert_eq!(areas[2].end, 0xffff_ffff_ff60_1000);
}

#[test]
fn names() {
    let with =
        |name: &str| one(&format!("7fa611d74000-7fa611d75000 rw-s 00000000 00:01 9                          {name}\n"));
    assert_eq!(one("7fa611d74000-7fa611d75000 rw-p 00000000 00:00 0 \n").name(), VmaName::Anonymous);
    assert_eq!(one("7fa611d74000-7fa611d75000 rw-p 00000000 00:00 0").name(), VmaName::Anonymous);
    assert_eq!(with("[heap]").name(), VmaName::Heap);
    assert_eq!(with("[vdso]").name(), VmaName::Vdso);
    assert_eq!(with("[vvar]").name(), VmaName::Vvar);
    assert_eq!(with("[vvar_vclock]").name(), VmaName::VvarVclock);
    assert_eq!(with("[new thing]").name(), VmaName::UnknownSpecial(b"[new thing]"));
    assert_eq!(with("[anon:my name]").name(), VmaName::NamedAnonymous(b"my name"));
    assert_eq!(with("[anon_shmem:x]").name(), VmaName::NamedSharedAnonymous(b"x"));
    assert_eq!(with("/dev/zero (deleted)").name(), VmaName::SharedAnonymous);
    assert_eq!(with("/dev/zero").name(), VmaName::File(b"/dev/zero"));
    assert_eq!(with("/SYSV00001234 (deleted)").name(), VmaName::SysV(0x1234));
    assert_eq!(with("/SYSVffffffff (deleted)").name(), VmaName::SysV(u32::MAX));
    assert_eq!(with("/SYSV0000123 (deleted)").name(), VmaName::File(b"/SYSV0000123"));
    assert_eq!(with("/SYSV00001234").name(), VmaName::File(b"/SYSV00001234"));
    assert_eq!(with("/memfd:a\\012b (deleted)").name(), VmaName::Memfd(b"a\nb"));
    assert_eq!(with("/anon_hugepage (deleted)").name(), VmaName::AnonymousHuge);
    assert_eq!(with("//anon_hugepage (deleted)").name(), VmaName::AnonymousHuge);
    assert_eq!(with("/[aio] (deleted)").name(), VmaName::AioRing);
    assert_eq!(with("anon_inode:[io_uring]").name(), VmaName::AnonInode(b"[io_uring]"));
    assert_eq!(with("socket:[4711]").name(), VmaName::Socket(4711));
    let area = with("/tmp/we ird\\012x\\040 (deleted)");
    assert!(area.deleted && area.shared);
    assert_eq!(area.name(), VmaName::File(b"/tmp/we ird\nx\\040"));
}

#[test]
fn own_maps_and_smaps_agree() {
    let mut buffer = Vec::new();
    crate::proc::read_proc(std::path::Path::new("/proc/self/smaps"), &mut buffer).unwrap();
    let areas = parse(&buffer).unwrap();
    assert!(areas.iter().any(|area| area.name() == VmaName::Stack));
    assert!(areas.iter().all(|area| !area.vm_flags.is_empty() && area.unknown_flags.is_empty()));
    assert!(areas.iter().all(|area| area.read == area.vm_flags.contains(VmFlags::READ)));
    crate::proc::read_proc(std::path::Path::new("/proc/self/maps"), &mut buffer).unwrap();
    let maps = parse(&buffer).unwrap();
    assert!(maps.iter().all(|area| area.vm_flags.is_empty()));
    assert!(maps.iter().any(|area| area.path.as_deref().is_some_and(|path| path.ends_with(b"libc.so.6"))));
}

#[test]
fn hostile() {
    assert_eq!(parse(b""), Ok(Vec::new()));
    let line = &SMAPS[..SMAPS.iter().position(|&b| b == b'\n').unwrap()];
    for length in 1..line.len() - 35 {
        assert!(parse(&line[..length]).is_err() || length > 42, "{}", String::from_utf8_lossy(&line[..length]));
    }
    for bad in [
        "\n",
        "Rss: 4 kB\n",
        "zz\n",
        "1-1 rw-p 0 0:0 0\n",
        "2-1 rw-p 0 0:0 0\n",
        "1-2 rw-q 0 0:0 0\n",
        "1-2 rw-pp 0 0:0 0\n",
        "1-2 rw-p 0 00 0\n",
        "1-2 rw-p 0 100000000:0 0\n",
        "11111111111111111-2 rw-p 0 0:0 0\n",
        "1-2 rw-p 0 0:0 99999999999999999999\n",
        "1-2 rw-p 0 0:0 0\nRss: -4 kB\n",
        "1-2 rw-p 0 0:0 0\nVmFlags: rdx\n",
        "1-2 rw-p 0 0:0 0\nnonsense\n",
        "1-2 rw-p 0 0:0 0\nNonsense\n",
    ] {
        assert!(parse(bad.as_bytes()).is_err(), "{bad}");
    }
    assert_eq!(parse(b"1-2 rw-p 0 0:0 0 /\xff\xfe\n").unwrap()[0].path.as_deref(), Some(&b"/\xff\xfe"[..]));
}

/// Not a benchmark, but an alarm: 30,000 areas, twenty lines each, take some tens of milliseconds.
#[test]
fn many_areas() {
    let mut text = Vec::new();
    for n in 0..30_000u64 {
        let start = 0x7f00_0000_0000 + n * 8192;
        text.extend(format!("{:x}-{:x} rw-p 00000000 00:00 0 \n", start, start + 4096).as_bytes());
        for key in ["Size", "KernelPageSize", "MMUPageSize", "Rss", "Pss", "Pss_Dirty", "Shared_Clean", "Shared_Dirty"]
        {
            text.extend(format!("{:<16}{:>8} kB\n", format!("{key}:"), 4).as_bytes());
        }
        for key in ["Private_Clean", "Private_Dirty", "Referenced", "Anonymous", "KSM", "LazyFree", "AnonHugePages"] {
            text.extend(format!("{:<16}{:>8} kB\n", format!("{key}:"), 0).as_bytes());
        }
        text.extend(b"THPeligible:           0\nVmFlags: rd wr mr mw me ac \n");
    }
    let before = std::time::Instant::now();
    let areas = parse(&text).unwrap();
    let took = before.elapsed();
    assert_eq!(areas.len(), 30_000);
    println!("{} bytes in {took:?}", text.len());
    assert!(took < std::time::Duration::from_secs(5));
}

#[test]
fn a_text_in_pieces_is_the_same() {
    let area = |n: usize| {
        format!(
            "{:x}000-{:x}000 rw-p 00000000 00:00 0 \nSize: 4 kB\nKernelPageSize: 4 kB\nVmFlags: rd wr mr mw me ac \n",
            n,
            n + 1
        )
    };
    let text: String = (16..40).map(|n| area(n * 2)).collect();
    let whole = parse(text.as_bytes()).unwrap();
    assert_eq!(whole.len(), 24);
    for cut in 0..text.len() {
        let cut = whole_areas(&text.as_bytes()[..cut]);
        let mut both = parse(&text.as_bytes()[..cut]).unwrap();
        both.extend(parse(&text.as_bytes()[cut..]).unwrap());
        assert_eq!(both.len(), whole.len());
        assert!(both.iter().zip(&whole).all(|(a, b)| (a.start, a.end, a.vm_flags) == (b.start, b.end, b.vm_flags)));
    }
    assert_eq!(whole_areas(b""), 0);
    assert_eq!(whole_areas(b"\nVmFlags: rd"), 0);
}
