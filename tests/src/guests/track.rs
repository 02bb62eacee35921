//! Memory that is written between the passes of dirty tracking, in every way that could fool the marks. Each guest goes on
//! changing its memory until it is asked, and knows what must be in every word of it.

use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::support::*;

/// A number that looks random.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A place for the words of a page: it holds `value` at its beginning, its middle and its end.
fn write(page: *mut u8, value: u64) {
    for at in [0, 2048, 4088] {
        unsafe { page.add(at).cast::<u64>().write_volatile(value) };
    }
}

fn holds(page: *const u8, value: u64) -> bool {
    [0, 2048, 4088].iter().all(|at| unsafe { page.add(*at).cast::<u64>().read_volatile() } == value)
}

/// Does `turn` again and again until the check is asked for.
fn until_asked(mut turn: impl FnMut(u64)) {
    say_ready();
    let path = folder().join("check");
    let mut n = 0;
    while asked(&path).is_none() {
        n += 1;
        turn(n);
        std::thread::sleep(std::time::Duration::from_micros(300));
    }
}

/// Single pages here and there, by the program itself and, through system calls, by the kernel.
pub(super) fn words() {
    const PAGES: usize = 2048;
    let area = map(0, PAGES * 4096, RW, PRIVATE);
    let file = did(std::fs::File::options().read(true).write(true).create(true).truncate(true).open("source"));
    let page = |n: usize| unsafe { area.add(n * 4096) };
    let mut expected = vec![0u64; PAGES];
    let mut state = 88_172_645_463_325_252;
    until_asked(|turn| {
        for _ in 0..16 {
            let n = next(&mut state) as usize % PAGES;
            expected[n] = turn << 32 | n as u64;
            write(page(n), expected[n]);
        }
        // the kernel writes this one
        let n = next(&mut state) as usize % PAGES;
        expected[n] = turn << 32 | 0x8000_0000 | n as u64;
        let mut bytes = vec![0u8; 4096];
        write(bytes.as_mut_ptr(), expected[n]);
        use std::os::unix::fs::FileExt as _;
        did(file.write_all_at(&bytes, 0));
        check_eq!(unsafe { libc::pread(file.as_raw_fd(), page(n).cast(), 4096, 0) }, 4096);
    });
    for (n, value) in expected.iter().enumerate() {
        check!(holds(page(n), *value));
    }
}

/// Pages that the kernel writes behind the program's back: they are registered with an io_uring, for a while.
pub(super) fn pinned() {
    use super::io_uring::{Pages, Ring, Sqe, READ_FIXED};
    use std::os::unix::fs::FileExt as _;
    const PAGES: usize = 64;
    let area = Pages::new(PAGES);
    area.fill(0);
    let file = did(std::fs::File::options().read(true).write(true).create(true).truncate(true).open("source"));
    let ring = Ring::new(4, 0, 0, false);
    let mut expected = vec![0u64; PAGES];
    let mut state = 88_172_645_463_325_252;
    let mut registered = false;
    let vector = [area.at(0) as usize, PAGES * 4096];
    until_asked(|turn| {
        if turn % 128 == 1 {
            check_eq!(ring.register(0, vector.as_ptr().cast(), 1), 0);
            registered = true;
        } else if turn % 128 == 97 {
            // IORING_UNREGISTER_BUFFERS
            check_eq!(ring.register(1, std::ptr::null(), 0), 0);
            registered = false;
        }
        let n = next(&mut state) as usize % PAGES;
        expected[n] = turn << 32 | n as u64;
        let mut bytes = vec![0u8; 4096];
        write(bytes.as_mut_ptr(), expected[n]);
        did(file.write_all_at(&bytes, 0));
        if registered {
            let (fd, address) = (file.as_raw_fd(), area.at(n) as u64);
            check_eq!(ring.run(Sqe { op: READ_FIXED, fd, address, length: 4096, ..Sqe::default() }), 4096);
        } else {
            write(area.at(n), expected[n]);
        }
    });
    for (n, value) in expected.iter().enumerate() {
        check!(holds(area.at(n), *value));
    }
}

/// All pages again and again, as fast as can be, by two threads: more than any pass could copy. In between it looks whether
/// anyone has given it children.
pub(super) fn flood() {
    const PAGES: usize = 4096;
    static CHILDREN: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: libc::c_int) {
        CHILDREN.fetch_add(1, Ordering::SeqCst);
    }
    let handler = count as extern "C" fn(libc::c_int);
    unsafe { libc::signal(libc::SIGCHLD, handler as libc::sighandler_t) };
    static END: AtomicBool = AtomicBool::new(false);
    // what a thread has written last, and where, is in its own memory: an image that is not of one moment shows
    let writer = |seed: u64| {
        let area = map(0, PAGES * 4096, RW, PRIVATE);
        let page = |n: usize| unsafe { area.add(n * 4096) };
        let (mut turn, mut at) = (0u64, PAGES);
        while !END.load(Ordering::Relaxed) {
            if at == PAGES {
                (turn, at) = (turn + 1, 0);
            }
            write(page(at), seed + turn);
            at += 1;
        }
        (0..PAGES).all(|n| {
            // the turn that wrote it; in turn 0, which ends before any page, and for the rest of turn 1, none has
            let turn = if n < at { turn } else { turn.saturating_sub(1) };
            holds(page(n), if turn == 0 { 0 } else { seed + turn })
        })
    };
    let threads = [1u64 << 40, 1 << 50].map(|seed| std::thread::spawn(move || writer(seed)));
    until_asked(|_| {
        let children = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) };
        check_eq!((children, errno()), (-1, libc::ECHILD));
    });
    END.store(true, Ordering::Relaxed);
    for thread in threads {
        check!(matches!(thread.join(), Ok(true)));
    }
    check_eq!(CHILDREN.load(Ordering::SeqCst), 0);
    let left = unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG | libc::__WALL) };
    check_eq!((left, errno()), (-1, libc::ECHILD));
}

/// Pages given back (MADV_DONTNEED, MADV_FREE), areas unmapped and mapped again at the same place, read before they are
/// written, with and without rights.
pub(super) fn given_back() {
    const PAGES: usize = 512;
    let area = map(0, PAGES * 4096, RW, PRIVATE);
    let page = |n: usize| unsafe { area.add(n * 4096) };
    let mut expected = vec![Some(0u64); PAGES];
    let mut state = 0x9e37_79b9_7f4a_7c15;
    until_asked(|turn| {
        for _ in 0..8 {
            let n = next(&mut state) as usize % PAGES;
            let value = turn << 32 | n as u64;
            let advise = |advice| unsafe { sys(libc::madvise(page(n).cast(), 4096, advice)) };
            let protect = |prot| unsafe { sys(libc::mprotect(page(n).cast(), 4096, prot)) };
            match next(&mut state) % 7 {
                0 => {
                    advise(libc::MADV_DONTNEED);
                    expected[n] = Some(0);
                }
                1 => {
                    advise(libc::MADV_FREE);
                    // until it is written, it has what it had, or nothing
                    expected[n] = expected[n].filter(|v| *v == 0);
                }
                2 => {
                    advise(libc::MADV_DONTNEED);
                    check_eq!(unsafe { page(n).read_volatile() }, 0);
                    expected[n] = Some(0);
                }
                3 => {
                    unsafe { sys(libc::munmap(page(n).cast(), 4096)) };
                    replace(page(n), 4096, RW, PRIVATE);
                    expected[n] = Some(0);
                }
                4 => {
                    write(page(n), value);
                    protect(libc::PROT_NONE);
                    std::thread::yield_now();
                    protect(libc::PROT_READ | libc::PROT_WRITE);
                    expected[n] = Some(value);
                }
                _ => {
                    write(page(n), value);
                    expected[n] = Some(value);
                }
            }
        }
    });
    for (n, value) in expected.iter().enumerate() {
        if let Some(value) = value {
            check!(holds(page(n), *value));
        }
    }
}

/// Maps an area in place of what is there.
fn replace(at: *mut u8, size: usize, prot: i32, flags: i32) {
    let there = unsafe { libc::mmap(at.cast(), size, prot, flags | libc::MAP_FIXED, -1, 0) };
    check!(there == at.cast());
}

/// Areas that move (mremap) to places where others were before.
pub(super) fn moved() {
    const PAGES: usize = 64;
    const PLACES: usize = 8;
    // places side by side, of which some have an area
    let room = map(0, PLACES * PAGES * 4096, libc::PROT_NONE, PRIVATE | libc::MAP_NORESERVE);
    let place = |n: usize| unsafe { room.add(n * PAGES * 4096) };
    let mut areas: Vec<Option<Vec<u64>>> = vec![None; PLACES];
    for n in [0, 3, 5] {
        replace(place(n), PAGES * 4096, RW, PRIVATE);
        areas[n] = Some(vec![0; PAGES]);
    }
    let mut state = 0x2545_f491_4f6c_dd1d;
    until_asked(|turn| {
        let from = next(&mut state) as usize % PLACES;
        let to = next(&mut state) as usize % PLACES;
        if areas[from].is_some() && areas[to].is_none() {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            let size = PAGES * 4096;
            let there = unsafe { libc::mremap(place(from).cast(), size, size, flags, place(to)) };
            check!(there == place(to).cast());
            replace(place(from), size, libc::PROT_NONE, PRIVATE | libc::MAP_NORESERVE);
            areas.swap(from, to);
        }
        for (n, area) in areas.iter_mut().enumerate() {
            let Some(words) = area else { continue };
            let p = next(&mut state) as usize % PAGES;
            words[p] = turn << 32 | (n * PAGES + p) as u64;
            write(unsafe { place(n).add(p * 4096) }, words[p]);
        }
    });
    for (n, area) in areas.iter().enumerate() {
        for (p, word) in area.iter().flatten().enumerate() {
            check!(holds(unsafe { place(n).add(p * 4096) }, *word));
        }
    }
}

/// Children that are made between passes: parent and child write the same pages, each for itself, and memory that they
/// share, both.
pub(super) fn forked() {
    const PAGES: usize = 256;
    let control = Shared::new();
    let common = map(0, PAGES * 4096, RW, SHARED);
    let area = map(0, PAGES * 4096, RW, PRIVATE);
    let own = |n: usize| unsafe { area.add(n * 4096) };
    let both = |n: usize| unsafe { common.add(n * 4096) };
    let mut expected = vec![0u64; PAGES];
    let mut children: Vec<i32> = Vec::new();
    let mut state = 0x1234_5678_9abc_def1;
    until_asked(|turn| {
        if turn % 50 == 1 {
            if children.len() == 3 {
                let old = children.remove(0);
                unsafe { sys(libc::kill(old, libc::SIGKILL)) };
                check_eq!(wait(old), libc::SIGKILL);
            }
            let number = turn;
            let seen = expected.clone();
            children.push(fork(move || live_as_child(&control, common, area, number, seen)));
        }
        let n = next(&mut state) as usize % PAGES;
        expected[n] = turn << 32 | n as u64;
        write(own(n), expected[n]);
        // the first half of what is shared is the parent's
        write(both(n / 2), expected[n]);
    });
    control.set(0, 1);
    for child in children {
        check_eq!(wait(child), 0);
    }
    for (n, value) in expected.iter().enumerate() {
        check!(holds(own(n), *value));
    }
}

fn live_as_child(control: &Shared, common: *mut u8, area: *mut u8, number: u64, mut expected: Vec<u64>) -> i32 {
    let pages = expected.len();
    let mut state = number | 1;
    let mut turn = 0;
    while control.get(0) == 0 {
        turn += 1;
        let n = next(&mut state) as usize % pages;
        expected[n] = number << 48 | turn << 16 | n as u64;
        write(unsafe { area.add(n * 4096) }, expected[n]);
        unsafe { common.add((pages / 2 + n / 2) * 4096).cast::<u64>().write_volatile(expected[n]) };
        std::thread::sleep(std::time::Duration::from_micros(500));
    }
    for (n, value) in expected.iter().enumerate() {
        check!(holds(unsafe { area.add(n * 4096) }, *value));
    }
    0
}

/// Private pages of a file: written, given back (the file's content is back), written again.
pub(super) fn of_file() {
    const PAGES: usize = 256;
    let mut bytes = vec![0u8; PAGES * 4096];
    for (n, page) in bytes.chunks_mut(4096).enumerate() {
        write(page.as_mut_ptr(), n as u64);
    }
    did(std::fs::write("content", &bytes));
    let file = did(std::fs::File::open("content"));
    let area = map_file(0, PAGES * 4096, RW, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
    let page = |n: usize| unsafe { area.add(n * 4096) };
    let mut expected: Vec<u64> = (0..PAGES as u64).collect();
    let mut state = 0x0dd0_feed_beef_cafe;
    until_asked(|turn| {
        let n = next(&mut state) as usize % PAGES;
        if next(&mut state).is_multiple_of(3) {
            unsafe { sys(libc::madvise(page(n).cast(), 4096, libc::MADV_DONTNEED)) };
            expected[n] = n as u64;
        } else {
            expected[n] = turn << 32 | n as u64;
            write(page(n), expected[n]);
        }
    });
    for (n, value) in expected.iter().enumerate() {
        check!(holds(page(n), *value));
    }
}

/// Huge pages, of which single small ones are written.
pub(super) fn huge() {
    const SIZE: usize = 8 << 20;
    let area = map(0, SIZE, RW, PRIVATE);
    unsafe { sys(libc::madvise(area.cast(), SIZE, libc::MADV_HUGEPAGE)) };
    fill(area, SIZE, 3);
    let mut expected = vec![None; SIZE / 4096];
    let mut state = 0x5555_1234_8888_7777;
    until_asked(|turn| {
        let n = next(&mut state) as usize % expected.len();
        expected[n] = Some(turn << 32 | n as u64);
        write(unsafe { area.add(n * 4096) }, turn << 32 | n as u64);
    });
    for (n, value) in expected.iter().enumerate() {
        let page = unsafe { area.add(n * 4096) };
        match value {
            Some(value) => check!(holds(page, *value)),
            None => check!((0..4096).all(|i| unsafe { page.add(i).read_volatile() } == pattern(n * 4096 + i, 3))),
        }
    }
}

/// A stack that grows and is given back, in a thread and in the first task.
pub(super) fn stacks() {
    fn deep(levels: usize, turn: u64) -> u64 {
        let mut room = [0u64; 512];
        room[levels % 512] = turn;
        let below = if levels == 0 { turn } else { deep(levels - 1, turn) };
        check_eq!(std::hint::black_box(&room)[levels % 512], turn);
        below
    }
    let count = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let n = count.fetch_add(1, Ordering::Relaxed);
                check_eq!(deep(n as usize % 100, n), n);
            }
        });
        let mut longest = 0;
        until_asked(|turn| {
            longest = (longest + 1) % 900;
            check_eq!(deep(longest, turn), turn);
        });
        stop.store(true, Ordering::Relaxed);
    });
}

/// A child that becomes another program (execve) between passes, again and again, with the same pid.
pub(super) fn exec() {
    let program = did(std::ffi::CString::new("/bin/sh").map_err(|e| e.to_string()));
    let words = ["sh", "-c", "x=0; while [ $x -lt 30 ]; do x=$((x+1)); done; exec /bin/sh -c \"$1\" sh \"$1\"", "sh"];
    let script =
        "x=0; while [ $x -lt 30 ]; do x=$((x+1)); done; [ $x = 30 ] || exit 9; exec /bin/sh -c \"$1\" sh \"$1\"";
    let text = |t: &str| did(std::ffi::CString::new(t).map_err(|e| e.to_string()));
    let all: Vec<std::ffi::CString> = words.iter().map(|w| text(w)).chain([text(script)]).collect();
    let mut pointers: Vec<*const libc::c_char> = all.iter().map(|w| w.as_ptr()).collect();
    pointers.push(std::ptr::null());
    let child = fork(|| {
        unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
        127
    });
    until_asked(|_| {
        let mut status = 0;
        check_eq!(unsafe { libc::waitpid(child, &raw mut status, libc::WNOHANG) }, 0);
    });
    sys(unsafe { libc::kill(child, libc::SIGKILL) });
    check_eq!(wait(child), libc::SIGKILL);
}
