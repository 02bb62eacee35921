//! Memory whose pages shrink, do not shrink, are zeros, and change from one to the other within a block.

use std::os::fd::AsRawFd as _;

use super::support::*;

/// Bytes that nothing packs, of a place.
fn noise(i: usize) -> u8 {
    ((i as u64 / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (i % 8 * 8)) as u8
        ^ (i as u64).wrapping_mul(0xbf58_476d) as u8
}

/// What is at a place of mixed memory: zeros, noise and text by turns of a few pages.
fn mixed(i: usize) -> u8 {
    match (i / 4096 * 7 + i / 65536) % 11 {
        0..=3 => 0,
        4..=6 => noise(i),
        _ => b"not much to say "[i % 16],
    }
}

fn put(area: *mut u8, len: usize, content: fn(usize) -> u8) {
    (0..len).for_each(|i| unsafe { area.add(i).write_volatile(content(i)) });
}

fn is(area: *const u8, len: usize, content: fn(usize) -> u8) -> bool {
    (0..len).all(|i| unsafe { area.add(i).read_volatile() } == content(i))
}

fn text(i: usize) -> u8 {
    b"All work and no play. "[i % 22]
}

fn zero(_: usize) -> u8 {
    0
}

/// Private and shared memory of every kind, and pages of a file that were overwritten with zeros.
pub(super) fn kinds() {
    const SIZE: usize = 5 << 20;
    let kinds = [zero, text, noise, mixed];
    let private = kinds.map(|content| {
        let area = map(0, SIZE, RW, PRIVATE);
        put(area, SIZE, content);
        area
    });
    let shared = kinds.map(|content| {
        let area = map(0, SIZE / 5, RW, SHARED);
        put(area, SIZE / 5, content);
        area
    });
    // a page here and there: short runs
    let spots = map(0, SIZE, RW, PRIVATE);
    (0..SIZE).step_by(3 * 4096).for_each(|at| unsafe { spots.add(at + 17).write_volatile(mixed(at) | 1) });
    did(std::fs::write("mapped", vec![77u8; 64 * 4096]));
    let file = did(std::fs::File::open("mapped"));
    let of_file = map_file(0, 64 * 4096, RW, libc::MAP_PRIVATE, file.as_raw_fd(), 0);
    drop(file);
    put(unsafe { of_file.add(8 * 4096) }, 4 * 4096, zero);
    let protected = map(0, 1 << 20, RW, PRIVATE);
    put(protected, 1 << 20, mixed);
    unsafe { sys(libc::mprotect(protected.cast(), 1 << 19, libc::PROT_NONE)) };
    unsafe { sys(libc::mprotect(protected.add(1 << 19).cast(), 1 << 19, libc::PROT_READ)) };
    ready();
    for (area, content) in private.into_iter().zip(kinds) {
        check!(is(area, SIZE, content));
    }
    for (area, content) in shared.into_iter().zip(kinds) {
        check!(is(area, SIZE / 5, content));
    }
    for at in (0..SIZE).step_by(4096) {
        let wanted = if at % (3 * 4096) == 0 { mixed(at) | 1 } else { 0 };
        check_eq!(unsafe { spots.add(at + 17).read_volatile() }, wanted);
    }
    for page in 0..64 {
        let wanted = if (8..12).contains(&page) { 0 } else { 77 };
        check_eq!(unsafe { of_file.add(page * 4096 + 5).read_volatile() }, wanted);
    }
    unsafe { sys(libc::mprotect(protected.cast(), 1 << 19, libc::PROT_READ)) };
    check!(is(protected, 1 << 20, mixed));
}

/// A parent, children and grandchildren that share memory copy-on-write, and changed some of it, to zeros and from zeros.
pub(super) fn family() {
    const SIZE: usize = 3 << 20;
    let shared = Shared::new();
    let area = map(0, SIZE, RW, PRIVATE);
    put(area, SIZE, mixed);
    let own = |who: usize| {
        for page in (who..SIZE / 4096).step_by(37) {
            let value = if page % 2 == 0 { 0 } else { who as u8 };
            (0..4096).for_each(|i| unsafe { area.add(page * 4096 + i).write_volatile(value) });
        }
    };
    let holds = |who: usize| {
        (0..SIZE).all(|i| {
            let page = i / 4096;
            let changed = page >= who && (page - who).is_multiple_of(37);
            let wanted = if !changed {
                mixed(i)
            } else if page % 2 == 0 {
                0
            } else {
                who as u8
            };
            unsafe { area.add(i).read_volatile() == wanted }
        })
    };
    let member = |who: usize| {
        own(who);
        shared.add(0);
        shared.wait(1, 1);
        i32::from(!holds(who))
    };
    let children: Vec<i32> = (1..4)
        .map(|who| {
            fork(|| {
                // before its own pages differ, so that it shares with the child
                let child = fork(|| member(who + 10));
                let code = member(who);
                check_eq!(wait(child), 0);
                code
            })
        })
        .collect();
    shared.wait(0, 6);
    ready();
    check!(is(area, SIZE, mixed));
    shared.set(1, 1);
    for child in children {
        check_eq!(wait(child), 0);
    }
}
