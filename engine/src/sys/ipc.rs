//! System V semaphores and message queues: semget(2), semctl(2), msgget(2), msgctl(2), msgrcv(2); and what a namespace has of
//! them and of shared memory.

use super::shm;
use crate::error::{Error, Result};

/// Owner, creator, key and mode of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // as in struct ipc_perm
pub struct Perm {
    pub key: u32,
    pub uid: u32,
    pub gid: u32,
    pub cuid: u32,
    pub cgid: u32,
    pub mode: u32,
}

impl Perm {
    fn of(p: &libc::ipc_perm) -> Perm {
        Perm {
            key: p.__key.cast_unsigned(),
            uid: p.uid,
            gid: p.gid,
            cuid: p.cuid,
            cgid: p.cgid,
            mode: u32::from(p.mode),
        }
    }
}

/// A message queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queue {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    pub perm: Perm,
    /// The most bytes that it may hold.
    pub most: u64,
    /// Number of messages.
    pub messages: u64,
}

/// A set of semaphores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Semaphores {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    pub perm: Perm,
    /// How many there are.
    pub count: u64,
}

/// `union semun`, whose pointer is all that is used.
#[repr(C)]
union Semun {
    pointer: *mut libc::c_void,
}

/// Which indices have none: EINVAL, or one that was removed meanwhile.
fn none() -> bool {
    let errno = std::io::Error::last_os_error().raw_os_error();
    [Some(libc::EINVAL), Some(libc::EIDRM)].contains(&errno)
}

/// All sets of semaphores of this thread's namespace.
pub fn semaphores() -> Result<Vec<Semaphores>> {
    const SEM_INFO: i32 = 19;
    const SEM_STAT: i32 = 18;
    let mut all = Vec::new();
    // SAFETY: a structure of integers, which may be zero.
    let mut info: libc::seminfo = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a structure of the size that SEM_INFO writes.
    let last = unsafe { libc::semctl(0, 0, SEM_INFO, Semun { pointer: (&raw mut info).cast() }) };
    if last < 0 {
        return Err(Error::last("semctl(SEM_INFO)"));
    }
    for index in 0..=last {
        // SAFETY: as above, with SEM_STAT.
        let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        let id = unsafe { libc::semctl(index, 0, SEM_STAT, Semun { pointer: (&raw mut ds).cast() }) };
        match id {
            0.. => all.push(Semaphores { id, perm: Perm::of(&ds.sem_perm), count: ds.sem_nsems as u64 }),
            _ if none() => {}
            _ => return Err(Error::last("semctl(SEM_STAT)")),
        }
    }
    Ok(all)
}

/// The values of a set.
pub fn values(set: &Semaphores) -> Result<Vec<u16>> {
    let mut values = vec![0u16; usize::try_from(set.count).unwrap_or(0)];
    // SAFETY: there is room for as many values as the set has, which cannot change.
    match unsafe { libc::semctl(set.id, 0, libc::GETALL, Semun { pointer: values.as_mut_ptr().cast() }) } {
        -1 => Err(Error::last("semctl(GETALL)")),
        _ => Ok(values),
    }
}

/// A new set with these values: its id.
pub fn make_semaphores(perm: &Perm, values: &[u16]) -> Result<i32> {
    let count = i32::try_from(values.len()).unwrap_or(i32::MAX);
    let flags = (perm.mode & 0o777).cast_signed() | libc::IPC_CREAT | libc::IPC_EXCL;
    let id = shm::as_creator(perm.cuid, perm.cgid, || {
        // SAFETY: integers only.
        match unsafe { libc::semget(perm.key.cast_signed(), count, flags) } {
            -1 => Err(Error::last("semget")),
            id => Ok(id),
        }
    })?;
    let mut values = values.to_vec();
    // SAFETY: there are as many values as the new set has, which are only read.
    if unsafe { libc::semctl(id, 0, libc::SETALL, Semun { pointer: values.as_mut_ptr().cast() }) } < 0 {
        return Err(Error::last("semctl(SETALL)"));
    }
    // SAFETY: a structure of integers, which may be zero; the kernel fills it in.
    let mut ds: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the pointers are to a structure of the size that both requests have.
    unsafe {
        if libc::semctl(id, 0, libc::IPC_STAT, Semun { pointer: (&raw mut ds).cast() }) < 0 {
            return Err(Error::last("semctl(IPC_STAT)"));
        }
        (ds.sem_perm.uid, ds.sem_perm.gid) = (perm.uid, perm.gid);
        ds.sem_perm.mode = (perm.mode & 0o777) as _;
        if libc::semctl(id, 0, libc::IPC_SET, Semun { pointer: (&raw mut ds).cast() }) < 0 {
            return Err(Error::last("semctl(IPC_SET)"));
        }
    }
    Ok(id)
}

/// All message queues of this thread's namespace.
pub fn queues() -> Result<Vec<Queue>> {
    const MSG_INFO: i32 = 12;
    const MSG_STAT: i32 = 11;
    let mut all = Vec::new();
    // SAFETY: structures of integers, which may be zero.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: `struct msginfo`, which MSG_INFO writes, is smaller.
    let last = unsafe { libc::msgctl(0, MSG_INFO, &raw mut ds) };
    if last < 0 {
        return Err(Error::last("msgctl(MSG_INFO)"));
    }
    for index in 0..=last {
        // SAFETY: the pointer is to a structure of the size that MSG_STAT writes.
        match unsafe { libc::msgctl(index, MSG_STAT, &raw mut ds) } {
            id @ 0.. => {
                all.push(Queue { id, perm: Perm::of(&ds.msg_perm), most: ds.msg_qbytes, messages: ds.msg_qnum })
            }
            _ if none() => {}
            _ => return Err(Error::last("msgctl(MSG_STAT)")),
        }
    }
    Ok(all)
}

/// A message of a queue, by its place, which stays there: its type, and its bytes, at most `most`.
pub fn message(queue: i32, place: u64, most: usize) -> Result<(i64, Vec<u8>)> {
    const MSG_COPY: i32 = 0o40_000;
    let mut words = vec![0u64; 1 + most.div_ceil(8)];
    let place = i64::try_from(place).unwrap_or(i64::MAX);
    // SAFETY: behind the word of the type there is room for `most` bytes.
    let got = unsafe { libc::msgrcv(queue, words.as_mut_ptr().cast(), most, place, libc::IPC_NOWAIT | MSG_COPY) };
    if got < 0 {
        return Err(Error::last("msgrcv(MSG_COPY)"));
    }
    let bytes: Vec<u8> = words[1..].iter().flat_map(|w| w.to_ne_bytes()).take(got.cast_unsigned()).collect();
    Ok((words[0].cast_signed(), bytes))
}

/// A new queue: its id.
pub fn make_queue(perm: &Perm) -> Result<i32> {
    let flags = (perm.mode & 0o777).cast_signed() | libc::IPC_CREAT | libc::IPC_EXCL;
    shm::as_creator(perm.cuid, perm.cgid, || {
        // SAFETY: integers only.
        match unsafe { libc::msgget(perm.key.cast_signed(), flags) } {
            -1 => Err(Error::last("msgget")),
            id => Ok(id),
        }
    })
}

/// Gives a queue its owner and mode, and the most that it may hold.
pub fn set_queue(id: i32, perm: &Perm, most: u64) -> Result<()> {
    // SAFETY: a structure of integers, which may be zero; the kernel fills it in.
    let mut ds: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the pointers are to a structure of the size that both requests have.
    unsafe {
        if libc::msgctl(id, libc::IPC_STAT, &raw mut ds) < 0 {
            return Err(Error::last("msgctl(IPC_STAT)"));
        }
        (ds.msg_perm.uid, ds.msg_perm.gid) = (perm.uid, perm.gid);
        ds.msg_perm.mode = (perm.mode & 0o777) as _;
        ds.msg_qbytes = most;
        if libc::msgctl(id, libc::IPC_SET, &raw mut ds) < 0 {
            return Err(Error::last("msgctl(IPC_SET)"));
        }
    }
    Ok(())
}

/// Puts a message into a queue.
pub fn send(queue: i32, kind: i64, bytes: &[u8]) -> Result<()> {
    let mut words = vec![kind.cast_unsigned()];
    words.extend(bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    }));
    // SAFETY: behind the word of the type there are as many bytes as are sent.
    match unsafe { libc::msgsnd(queue, words.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT) } {
        -1 => Err(Error::last("msgsnd")),
        _ => Ok(()),
    }
}
