//! System V shared memory: shmget(2), shmctl(2), shmat(2).

use std::fs::File;
use std::os::fd::OwnedFd;

use crate::error::{Call, Error, Result};

/// What shmctl(IPC_STAT) says of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// IPC_PRIVATE (0) also for one that is to be removed.
    pub key: u32,
    /// Owner.
    pub uid: u32,
    /// The owner's group.
    pub gid: u32,
    /// Who made it.
    pub cuid: u32,
    /// The group of the one who made it.
    pub cgid: u32,
    /// Permissions, SHM_DEST, SHM_LOCKED.
    pub mode: u32,
    /// In bytes, as it was asked for.
    pub size: u64,
    /// The process that made it.
    pub creator: i32,
    /// When it was made or last changed.
    pub changed: i64,
    /// How often it is attached now.
    pub attached: u64,
}

fn ds(id: i32) -> Result<libc::shmid_ds> {
    // SAFETY: a structure of integers, which may be zero; the kernel fills it in.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of the size that IPC_STAT writes.
    match unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut ds) } {
        -1 => Err(Error::last("shmctl(IPC_STAT)")),
        _ => Ok(ds),
    }
}

/// The segment with this id.
pub fn stat(id: i32) -> Result<Segment> {
    Ok(segment(&ds(id)?))
}

/// All segments of this thread's IPC namespace, by id.
pub fn all() -> Result<Vec<(i32, Segment)>> {
    const SHM_STAT: i32 = 13;
    const SHM_INFO: i32 = 14;
    let mut found = Vec::new();
    // SAFETY: a structure of integers, which may be zero.
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `struct shm_info`, which SHM_INFO writes, is smaller.
    let last = unsafe { libc::shmctl(0, SHM_INFO, &raw mut ds) };
    if last < 0 {
        return Err(Error::last("shmctl(SHM_INFO)"));
    }
    for index in 0..=last {
        // SAFETY: the pointer is to a structure of the size that SHM_STAT writes.
        match unsafe { libc::shmctl(index, SHM_STAT, &raw mut ds) } {
            id @ 0.. => found.push((id, segment(&ds))),
            _ => match Error::last("shmctl(SHM_STAT)") {
                // nothing has this index
                e if [libc::EINVAL, libc::EIDRM].contains(&e.errno()) => {}
                e => return Err(e),
            },
        }
    }
    Ok(found)
}

fn segment(ds: &libc::shmid_ds) -> Segment {
    let p = &ds.shm_perm;
    Segment {
        key: p.__key.cast_unsigned(),
        uid: p.uid,
        gid: p.gid,
        cuid: p.cuid,
        cgid: p.cgid,
        mode: u32::from(p.mode),
        size: ds.shm_segsz as u64,
        creator: ds.shm_cpid,
        changed: ds.shm_ctime,
        attached: ds.shm_nattch,
    }
}

/// A new segment: its id.
pub fn create(key: u32, size: usize, flags: i32) -> Result<i32> {
    // SAFETY: no memory is touched.
    match unsafe { libc::shmget(key.cast_signed(), size, flags | libc::IPC_CREAT | libc::IPC_EXCL) } {
        -1 => Err(Error::last("shmget")),
        id => Ok(id),
    }
}

/// As [`create`], with this user and group as the ones who make it.
pub fn create_as(uid: u32, gid: u32, key: u32, size: usize, flags: i32) -> Result<i32> {
    as_creator(uid, gid, || create(key, size, flags))
}

/// Does something as this user and group.
pub fn as_creator<T>(uid: u32, gid: u32, make: impl FnOnce() -> Result<T>) -> Result<T> {
    let (own_uid, own_gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    if (uid, gid) == (own_uid, own_gid) {
        return make();
    }
    // raw calls: for this thread alone
    let set = |uid: u32, gid: u32| {
        // SAFETY: they change what the kernel knows of this thread, no memory; -1 leaves an id as it is.
        let failed = unsafe {
            // the group while there is still power to change it, and after there is power again
            libc::syscall(libc::SYS_setresgid, -1, gid, -1) < 0 || libc::syscall(libc::SYS_setresuid, -1, uid, -1) < 0
        };
        if failed {
            Err(Error::last("setresuid"))
        } else {
            Ok(())
        }
    };
    let made = set(uid, gid).and_then(|()| make());
    // SAFETY: as above; the real and the saved user are still the engine's, so that the way back is always open.
    unsafe {
        libc::syscall(libc::SYS_setresuid, -1, own_uid, -1);
        libc::syscall(libc::SYS_setresgid, -1, own_gid, -1);
    }
    made
}

/// Gives it an owner and permissions, and locks it into memory if its mode says so.
pub fn set(id: i32, uid: u32, gid: u32, mode: u32) -> Result<()> {
    let mut ds = ds(id)?;
    ds.shm_perm.uid = uid;
    ds.shm_perm.gid = gid;
    ds.shm_perm.mode = (mode & 0o777) as _;
    // SAFETY: the structure is whole, and only read.
    if unsafe { libc::shmctl(id, libc::IPC_SET, &raw mut ds) } < 0 {
        return Err(Error::last("shmctl(IPC_SET)"));
    }
    const SHM_LOCKED: u32 = 0o2000;
    // SAFETY: no memory of ours is touched.
    if mode & SHM_LOCKED != 0 && unsafe { libc::shmctl(id, libc::SHM_LOCK, std::ptr::null_mut()) } < 0 {
        return Err(Error::last("shmctl(SHM_LOCK)"));
    }
    Ok(())
}

/// Marks it to be removed when nobody has it attached any more.
pub fn remove(id: i32) -> Result<()> {
    // SAFETY: no memory of ours is touched.
    match unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) } {
        -1 => Err(Error::last("shmctl(IPC_RMID)")),
        _ => Ok(()),
    }
}

/// The file behind a segment, open for both. `len` is its size in whole pages of its kind.
pub fn open(id: i32, len: u64) -> Result<OwnedFd> {
    // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
    let at = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    if at as isize == -1 {
        return Err(Error::last("shmat"));
    }
    let start = at as u64;
    let link = format!("/proc/self/map_files/{start:x}-{:x}", start + len);
    let file = File::options().read(true).write(true).open(link).call("open(/proc/self/map_files)");
    // SAFETY: what was attached above, into which nobody has a pointer.
    unsafe { libc::shmdt(at) };
    Ok(file?.into())
}
