//! System V shared memory of the host's IPC namespace. Every guest marks its segments for removal before it checks, so that
//! nothing stays behind it, however it ends.

use super::support::*;

const MB: usize = 1 << 20;

fn get(key: i32, size: usize, flags: i32) -> i32 {
    unsafe { sys(libc::shmget(key, size, libc::IPC_CREAT | libc::IPC_EXCL | flags)) }
}

fn attach(id: i32, at: usize, flags: i32) -> *mut u8 {
    let p = unsafe { libc::shmat(id, at as *const libc::c_void, flags) };
    check!(p as isize != -1);
    p.cast()
}

fn stat(id: i32) -> libc::shmid_ds {
    unsafe {
        let mut ds: libc::shmid_ds = std::mem::zeroed();
        sys(libc::shmctl(id, libc::IPC_STAT, &raw mut ds));
        ds
    }
}

fn remove(id: i32) {
    unsafe { sys(libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut())) };
}

/// What a check compares of a segment.
fn facts(id: i32) -> (i32, u32, u32, u32, u32, u32, usize, u64) {
    let ds = stat(id);
    let p = ds.shm_perm;
    (p.__key, p.uid, p.gid, p.cuid, p.cgid, u32::from(p.mode), ds.shm_segsz, ds.shm_nattch)
}

/// A key that no other run has.
fn key() -> i32 {
    0x5300_0000 | std::process::id() as i32
}

unsafe fn put(at: *mut u8, offset: usize, text: &[u8]) {
    unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), at.add(offset), text.len()) }
}

unsafe fn is(at: *const u8, offset: usize, text: &[u8]) -> bool {
    (0..text.len()).all(|i| unsafe { at.add(offset + i).read_volatile() } == text[i])
}

/// With a key, an owner and a mode, an odd size, holes, attached by parent and child, who write to each other; attached
/// twice, for reading too.
pub(super) fn shared() {
    let size = 8 * MB + 1000;
    let id = get(key(), size, 0o640);
    unsafe {
        let mut ds = stat(id);
        ds.shm_perm.uid = 1234;
        ds.shm_perm.gid = 4321;
        sys(libc::shmctl(id, libc::IPC_SET, &raw mut ds));
    }
    let at = attach(id, 0, 0);
    let only = attach(id, 0, libc::SHM_RDONLY);
    unsafe {
        put(at, 5 * MB, b"in the middle");
        put(at, size - 3, b"end");
    }
    let up = Shared::new();
    let child = fork(|| {
        up.set(0, 1);
        eventually("the parent's word", || unsafe { is(at, 0, b"to the child") });
        unsafe { put(at, 4096, b"to the parent") };
        0
    });
    up.wait(0, 1);
    let before = facts(id);
    check_eq!(before.7, 4);
    ready();
    check_eq!(facts(id), before);
    remove(id);
    unsafe {
        check!(is(only, 5 * MB, b"in the middle"));
        check!(is(at, size - 3, b"end"));
        check!(is(at, 3 * MB, &[0; 100]));
        put(at, 0, b"to the child");
    }
    eventually("the child's word", || unsafe { is(only, 4096, b"to the parent") });
    check_eq!(wait(child), 0);
    check_eq!(unsafe { libc::mprotect(only.cast(), 4096, RW) }, -1);
    check_eq!(unsafe { libc::shmdt(only.cast()) }, 0);
    check_eq!(stat(id).shm_nattch, 1);
}

/// Marked for removal while it is attached; by a process that is dead by now.
pub(super) fn removed() {
    let pipe = super::pipes::pipe(0);
    let maker = fork(|| {
        let id = get(key(), MB, 0o600);
        super::pipes::write(pipe.1, &id.to_le_bytes());
        0
    });
    check_eq!(wait(maker), 0);
    let id = i32::from_le_bytes(did(did(super::pipes::read(pipe.0)).as_slice().try_into()));
    let at = attach(id, 0x7000_0000_0000, 0);
    remove(id);
    unsafe { put(at, 100, b"for the last one") };
    let before = facts(id);
    ready();
    check_eq!(facts(id), before);
    check_eq!(at as usize, 0x7000_0000_0000);
    unsafe {
        check!(is(at, 100, b"for the last one"));
        check_eq!(libc::shmdt(at.cast()), 0);
        check_eq!(libc::shmctl(id, libc::IPC_STAT, [0u8; 256].as_mut_ptr().cast()), -1);
    }
}

/// Cut by mprotect, with a hole, with a part that was moved, code in it.
pub(super) fn pieces() {
    let id = get(libc::IPC_PRIVATE, 64 << 10, 0o600);
    let at = attach(id, 0, libc::SHM_EXEC);
    let whole = attach(id, 0, 0);
    remove(id);
    for page in 0..16 {
        unsafe { put(whole, page << 12, format!("page {page}").as_bytes()) };
    }
    let moved = unsafe {
        let room = map(0, 8192, RW, PRIVATE);
        let moved = libc::mremap(at.add(8 << 12).cast(), 8192, 8192, libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED, room);
        check_eq!(moved.cast::<u8>(), room);
        sys(libc::munmap(at.add(2 << 12).cast(), 4096));
        sys(libc::mprotect(at.add(4 << 12).cast(), 4096, libc::PROT_READ));
        sys(libc::mprotect(at.add(5 << 12).cast(), 4096, libc::PROT_NONE));
        room
    };
    // something else where a part was
    let other = map(at as usize + (2 << 12), 4096, RW, PRIVATE);
    unsafe { put(other, 0, b"not shared") };
    let maps = || did(std::fs::read_to_string("/proc/self/maps"));
    let of_segment = |text: String| text.lines().filter(|l| l.contains("/SYSV")).map(str::to_owned).collect::<Vec<_>>();
    let before = of_segment(maps());
    let attached = stat(id).shm_nattch;
    ready();
    check_eq!(of_segment(maps()), before);
    check_eq!(stat(id).shm_nattch, attached);
    unsafe {
        check!(is(moved, 0, b"page 8") && is(moved, 4096, b"page 9"));
        check!(is(at, 3 << 12, b"page 3") && is(at, 4 << 12, b"page 4"));
        check!(is(other, 0, b"not shared"));
        put(whole, 15 << 12, b"still shared");
        check!(is(at, 15 << 12, b"still shared"));
        sys(libc::mprotect(at.add(5 << 12).cast(), 4096, RW));
        check!(is(at, 5 << 12, b"page 5"));
    }
}

/// Of huge pages, if this machine has some.
pub(super) fn huge() {
    let id = unsafe { libc::shmget(libc::IPC_PRIVATE, 4 * MB, libc::IPC_CREAT | libc::SHM_HUGETLB | 0o600) };
    if id < 0 {
        ready();
        return;
    }
    let at = attach(id, 0, 0);
    remove(id);
    unsafe { put(at, 3 * MB, b"huge") };
    let before = facts(id);
    ready();
    check_eq!(facts(id), before);
    unsafe {
        check!(is(at, 3 * MB, b"huge"));
        check!(is(at, 0, &[0; 64]));
        put(at, 0, b"more");
    }
}
