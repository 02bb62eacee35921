//! Memory: private, shared, copy-on-write, of files; how areas lie, and what was advised about them.

use std::os::fd::AsRawFd as _;

use super::support::{self, *};

/// Private memory with rights of every kind, one page of them with content and no rights at all.
pub(super) fn private() {
    const SIZE: usize = 4 << 20;
    let area = map(0, SIZE, RW, PRIVATE);
    fill(area, SIZE, 1);
    let protect = |page: usize, prot| unsafe { sys(libc::mprotect(area.add(page * 4096).cast(), 4096, prot)) };
    protect(100, libc::PROT_READ);
    protect(200, libc::PROT_NONE);
    protect(300, libc::PROT_READ | libc::PROT_EXEC);
    // never touched, and touched and given back
    let untouched = map(0, SIZE, RW, PRIVATE);
    let given_back = map(0, SIZE, RW, PRIVATE);
    fill(given_back, SIZE, 2);
    unsafe { sys(libc::madvise(given_back.cast(), SIZE / 2, libc::MADV_DONTNEED)) };
    // read only: the kernel's page of zeroes
    let read = map(0, SIZE, RW, PRIVATE);
    check!((0..SIZE).all(|i| unsafe { read.add(i).read_volatile() } == 0));
    // moved elsewhere, and made larger there
    let moved = map(0, 8192, RW, PRIVATE);
    fill(moved, 8192, 3);
    let moved = unsafe { libc::mremap(moved.cast(), 8192, 1 << 20, libc::MREMAP_MAYMOVE) }.cast::<u8>();
    let before = support::layout();
    ready();
    check_layout(&before);
    protect(200, libc::PROT_READ);
    check!(filled(area, SIZE, 1));
    check!((0..SIZE).all(|i| unsafe { untouched.add(i).read_volatile() } == 0));
    check!((0..SIZE / 2).all(|i| unsafe { given_back.add(i).read_volatile() } == 0));
    check!((SIZE / 2..SIZE).all(|i| unsafe { given_back.add(i).read_volatile() } == pattern(i, 2)));
    check!((0..SIZE).all(|i| unsafe { read.add(i).read_volatile() } == 0));
    check!(filled(moved, 8192, 3));
}

/// Pages with content between pages without, so many that the kernel tells of them in several parts.
pub(super) fn fragmented() {
    let areas = [(700, 4), (3000, 3)].map(|(runs, step)| (map(0, runs * step * 4096, RW, PRIVATE), runs, step));
    let word = |area: *mut u8, page: usize| unsafe { area.add(page * 4096).cast::<usize>() };
    for (area, runs, step) in areas {
        for page in (0..runs * step).filter(|page| !page.is_multiple_of(step)) {
            unsafe { word(area, page).write_volatile(page) };
        }
    }
    ready();
    for (area, runs, step) in areas {
        let good = |page: usize| unsafe { word(area, page).read_volatile() } == if page.is_multiple_of(step) { 0 } else { page };
        check!((0..runs * step).all(good));
    }
}

/// So much memory that several fill it at a restore; none of them is left behind.
pub(super) fn large() {
    const SIZE: usize = 96 << 20;
    let area = map(0, SIZE, RW, PRIVATE);
    let words = SIZE / 8;
    (0..words).for_each(|n| unsafe { area.cast::<usize>().add(n).write_volatile(n * 7 + 1) });
    ready();
    check!((0..words).all(|n| unsafe { area.cast::<usize>().add(n).read_volatile() } == n * 7 + 1));
    check_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) }, -1);
    check_eq!(did(std::fs::read_dir("/proc/self/task")).count(), 1);
}

/// The physical pages of an area (0: none).
fn frames(area: *const u8, pages: usize) -> Vec<u64> {
    use std::os::unix::fs::FileExt as _;
    let map = did(std::fs::File::open("/proc/self/pagemap"));
    let mut bytes = vec![0; pages * 8];
    did(map.read_exact_at(&mut bytes, area as u64 / 4096 * 8));
    let words = bytes.chunks_exact(8).map(|b| b.try_into().map_or(0, u64::from_ne_bytes));
    words.map(|w| if w >> 63 == 1 { w & ((1 << 55) - 1) } else { 0 }).collect()
}

/// Pages that parent and child wrote after a fork are their own; all others are still one page of memory for both.
pub(super) fn cow() {
    const PAGES: usize = 256;
    let shared = Shared::new();
    let area = map(0, PAGES * 4096, RW, PRIVATE);
    fill(area, PAGES * 4096, 9);
    let write = |page: usize, value: u8| unsafe { area.add(page * 4096).write_volatile(value) };
    let child = fork(|| {
        write(3, 33);
        shared.set(0, 1);
        shared.wait(0, 2);
        for (n, frame) in frames(area, PAGES).into_iter().enumerate() {
            shared.set(n + 8, frame);
        }
        shared.set(0, 3);
        shared.wait(0, 4);
        check_eq!(unsafe { area.add(3 * 4096).read_volatile() }, 33);
        write(3, pattern(3 * 4096, 9));
        check!(filled(area, PAGES * 4096, 9));
        0
    });
    shared.wait(0, 1);
    write(5, 55);
    ready();
    shared.set(0, 2);
    shared.wait(0, 3);
    let own = frames(area, PAGES);
    let same = own.iter().enumerate().filter(|(n, f)| **f != 0 && shared.get(n + 8) == **f).count();
    check!(same >= PAGES - 2);
    check!(own[3] != shared.get(11) && own[5] != shared.get(13));
    check_eq!(unsafe { area.add(5 * 4096).read_volatile() }, 55);
    write(5, pattern(5 * 4096, 9));
    check!(filled(area, PAGES * 4096, 9));
    shared.set(0, 4);
    check_eq!(wait(child), 0);
}

/// Memory that processes share: one of them has a part of it only, another has it twice, one has fewer rights.
pub(super) fn shared() {
    const SIZE: usize = 1 << 20;
    let control = Shared::new();
    let area = map(0, SIZE, RW, SHARED);
    fill(area, SIZE, 5);
    let hole = map(0, SIZE, RW, SHARED);
    unsafe { hole.add(70 * 4096).write_volatile(7) };
    let zero = did(std::fs::File::options().read(true).write(true).open("/dev/zero"));
    let of_zero = map_file(0, 8192, RW, libc::MAP_SHARED, zero.as_raw_fd(), 0);
    drop(zero);
    fill(of_zero, 8192, 6);
    let part = fork(|| {
        unsafe { sys(libc::munmap(area.cast(), SIZE / 2)) };
        control.add(0);
        control.wait(1, 1);
        check_eq!(unsafe { area.add(SIZE - 1).read_volatile() }, 99);
        unsafe { area.add(SIZE - 2).write_volatile(98) };
        check!(filled(of_zero, 8192, 6));
        unsafe { of_zero.write_volatile(66) };
        0
    });
    let twice = fork(|| {
        // the same memory again, elsewhere
        let again = unsafe { libc::mremap(area.cast(), 0, SIZE, libc::MREMAP_MAYMOVE) }.cast::<u8>();
        check!(again != area);
        unsafe { sys(libc::mprotect(area.cast(), SIZE, libc::PROT_READ)) };
        control.add(0);
        control.wait(1, 1);
        unsafe { again.add(10).write_volatile(11) };
        check_eq!(unsafe { area.add(10).read_volatile() }, 11);
        0
    });
    control.wait(0, 2);
    ready();
    check!(filled(area, SIZE, 5));
    check_eq!(unsafe { hole.add(70 * 4096).read_volatile() }, 7);
    check!((0..70 * 4096).all(|i| unsafe { hole.add(i).read_volatile() } == 0));
    unsafe { area.add(SIZE - 1).write_volatile(99) };
    control.set(1, 1);
    check_eq!(wait(part), 0);
    check_eq!(wait(twice), 0);
    check_eq!(unsafe { area.add(SIZE - 2).read_volatile() }, 98);
    check_eq!(unsafe { area.add(10).read_volatile() }, 11);
    check_eq!(unsafe { of_zero.read_volatile() }, 66);
}

/// Areas of files: private with changes, shared for writing, shared for reading, from the middle, past the end.
pub(super) fn file() {
    let bytes: Vec<u8> = (0..40960u32).map(|i| (i / 7) as u8).collect();
    did(std::fs::write("mapped", &bytes));
    let both = did(std::fs::File::options().read(true).write(true).open("mapped"));
    let reading = did(std::fs::File::open("mapped"));
    let private = map_file(0, 40960, RW, libc::MAP_PRIVATE, reading.as_raw_fd(), 0);
    unsafe { private.add(5000).write_volatile(201) };
    let shared = map_file(0, 8192, RW, libc::MAP_SHARED, both.as_raw_fd(), 8192);
    unsafe { shared.add(1).write_volatile(202) };
    let seen = map_file(0, 40960, libc::PROT_READ, libc::MAP_SHARED, reading.as_raw_fd(), 0);
    let past = map_file(0, 16384, RW, libc::MAP_PRIVATE, reading.as_raw_fd(), 36864);
    unsafe { past.add(2).write_volatile(203) };
    drop((both, reading));
    let before = support::layout();
    ready();
    check_layout(&before);
    let at = |area: *mut u8, i: usize| unsafe { area.add(i).read_volatile() };
    check!((0..40960).all(|i| at(private, i)
        == if i == 5000 {
            201
        } else if i == 8193 {
            202
        } else {
            bytes[i]
        }));
    check_eq!(at(seen, 8193), 202);
    unsafe { shared.add(3).write_volatile(204) };
    check_eq!(at(seen, 8195), 204);
    check_eq!(did(std::fs::read("mapped"))[8195], 204);
    check_eq!((at(past, 1), at(past, 2)), (bytes[36865], 203));
    unsafe { private.add(3).write_volatile(205) };
    check_eq!(did(std::fs::read("mapped"))[3], bytes[3]);
}

/// A file that has no name any more, and lives in memory areas only.
pub(super) fn file_deleted() {
    did(std::fs::write("gone", [77u8; 12288]));
    let file = did(std::fs::File::options().read(true).write(true).open("gone"));
    let shared = map_file(0, 12288, RW, libc::MAP_SHARED, file.as_raw_fd(), 0);
    let private = map_file(0, 12288, RW, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
    did(std::fs::remove_file("gone"));
    drop(file);
    unsafe { private.add(100).write_volatile(78) };
    ready();
    check!((0..12288).all(|i| unsafe { shared.add(i).read_volatile() } == 77));
    check_eq!(unsafe { private.add(100).read_volatile() }, 78);
    unsafe { shared.add(5000).write_volatile(79) };
    check_eq!(unsafe { private.add(5000).read_volatile() }, 79);
    check!(!std::path::Path::new("gone").exists());
}

/// Guard pages, a stack that grows, areas at both ends of the address space, neighbours, and code.
pub(super) fn layout() {
    let guard = map(0, 1 << 20, libc::PROT_NONE, PRIVATE);
    let grows = map(0x1_2345_0000, 32768, RW, PRIVATE | libc::MAP_GROWSDOWN);
    fill(grows, 32768, 4);
    let low = map(0x10_0000, 4096, RW, PRIVATE);
    let high = map(0x7000_0000_0000, 4096, RW, PRIVATE);
    fill(low, 4096, 5);
    fill(high, 4096, 6);
    // one area beside another, shared beside private
    let first = map(0x2_0000_0000, 4096, RW, PRIVATE);
    let second = map(0x2_0000_1000, 4096, RW, SHARED);
    let third = map(0x2_0000_2000, 4096, libc::PROT_READ, PRIVATE);
    fill(first, 4096, 7);
    fill(second, 4096, 8);
    let code = map(0, 4096, RW, PRIVATE);
    // mov eax, 4711; ret
    unsafe { code.copy_from([0xb8, 0x67, 0x12, 0, 0, 0xc3].as_ptr(), 6) };
    unsafe { sys(libc::mprotect(code.cast(), 4096, libc::PROT_READ | libc::PROT_EXEC)) };
    let before = support::layout();
    ready();
    check_layout(&before);
    check!(filled(grows, 32768, 4) && filled(low, 4096, 5) && filled(high, 4096, 6));
    check!(filled(first, 4096, 7) && filled(second, 4096, 8));
    check_eq!(unsafe { third.read_volatile() }, 0);
    let call: extern "C" fn() -> i32 = unsafe { std::mem::transmute(code) };
    check_eq!(call(), 4711);
    unsafe { sys(libc::mprotect(guard.cast(), 1 << 20, libc::PROT_READ)) };
    check!((0..1 << 20).all(|i| unsafe { guard.add(i).read_volatile() } == 0));
    // one page below, as a stack does
    unsafe { grows.sub(4000).write_volatile(1) };
}

/// Locks and advice.
pub(super) fn advice() {
    const SIZE: usize = 65536;
    let new = |advice: i32, seed: u8| {
        let area = map(0, SIZE, RW, PRIVATE);
        fill(area, SIZE, seed);
        let r = unsafe { libc::madvise(area.cast(), SIZE, advice) };
        // a kernel may have been built without one of them
        check!(r == 0 || errno() == libc::EINVAL);
        // so that the kernel joins no two of them
        map(0, 4096, libc::PROT_NONE, PRIVATE);
        area
    };
    let areas: Vec<*mut u8> = [
        libc::MADV_DONTFORK,
        libc::MADV_DONTDUMP,
        libc::MADV_WIPEONFORK,
        libc::MADV_HUGEPAGE,
        libc::MADV_NOHUGEPAGE,
        libc::MADV_MERGEABLE,
        libc::MADV_SEQUENTIAL,
        libc::MADV_RANDOM,
    ]
    .into_iter()
    .zip(1..)
    .map(|(advice, seed)| new(advice, seed))
    .collect();
    let locked = map(0, SIZE, RW, PRIVATE);
    fill(locked, SIZE, 50);
    unsafe { sys(libc::mlock(locked.cast(), SIZE)) };
    let (before, size) = (support::layout(), status(&["VmLck"]));
    ready();
    check_layout(&before);
    check_eq!(status(&["VmLck"]), size);
    check!(areas.iter().zip(1..).all(|(area, seed)| filled(*area, SIZE, seed)));
    check!(filled(locked, SIZE, 50));
    // advice is followed, not only remembered
    let child = fork(|| i32::from((0..SIZE).any(|i| unsafe { areas[2].add(i).read_volatile() } != 0)));
    check_eq!(wait(child), 0);
}

/// The heap keeps its end, and can still grow.
pub(super) fn brk() {
    let at = unsafe { libc::sbrk(1 << 20) }.cast::<u8>();
    check!(at as isize != -1);
    fill(at, 1 << 20, 12);
    let end = unsafe { libc::sbrk(0) };
    ready();
    // the allocator may have grown it by then, never shrunk it
    check!(unsafe { libc::sbrk(0) } >= end);
    check!(filled(at, 1 << 20, 12));
    check!(unsafe { libc::sbrk(4096) } as isize != -1);
}

/// A terabyte of addresses with little in it; what was never touched takes no memory afterwards either.
pub(super) fn sparse() {
    const SIZE: usize = 1 << 40;
    let area = map(0, SIZE, RW, PRIVATE | libc::MAP_NORESERVE);
    let places = [0, 4096 * 3, 1 << 20, 1 << 30, (1 << 35) + 8192, SIZE - 4096];
    for (n, &at) in places.iter().enumerate() {
        fill(unsafe { area.add(at) }, 4096, n as u8);
    }
    let shared = map(0, 1 << 34, RW, SHARED | libc::MAP_NORESERVE);
    fill(unsafe { shared.add(1 << 33) }, 4096, 40);
    ready();
    for (n, &at) in places.iter().enumerate() {
        check!(filled(unsafe { area.add(at) }, 4096, n as u8));
    }
    check!(filled(unsafe { shared.add(1 << 33) }, 4096, 40));
    check_eq!(unsafe { area.add(1 << 25).read_volatile() }, 0);
    check_eq!(unsafe { shared.add(1 << 25).read_volatile() }, 0);
    let kib: u64 = did(status(&["VmRSS"])[0].split_whitespace().nth(1).unwrap_or("").parse());
    check!(kib < 100 << 10);
}

/// A deep stack, in use.
pub(super) fn stack() {
    fn deeper(depth: u64) -> u64 {
        let mut frame = [depth; 512];
        std::hint::black_box(&mut frame);
        let below = if depth == 0 {
            ready();
            0
        } else {
            deeper(depth - 1)
        };
        check!(frame.iter().all(|&w| w == depth));
        below + frame[7]
    }
    check_eq!(deeper(700), 700 * 701 / 2);
    // and it still grows
    fn more(depth: u64) -> u64 {
        let mut frame = [depth; 1024];
        std::hint::black_box(&mut frame);
        if depth == 0 {
            0
        } else {
            more(depth - 1) + frame[3]
        }
    }
    check_eq!(more(600), 600 * 601 / 2);
}
