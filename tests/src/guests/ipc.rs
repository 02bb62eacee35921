//! An IPC namespace of the guest's own: shared memory, queues, semaphores, limits.

use super::support::*;

const KEY: i32 = 0x5150;

fn next(kind: &str, id: i32) {
    did(std::fs::write(format!("/proc/sys/kernel/{kind}_next_id"), id.to_string()));
}

fn send(queue: i32, kind: i64, bytes: &[u8]) {
    let message = [&kind.to_ne_bytes(), bytes].concat();
    unsafe { sys(libc::msgsnd(queue, message.as_ptr().cast(), bytes.len(), libc::IPC_NOWAIT)) };
}

fn receive(queue: i32, kind: i64) -> (i64, Vec<u8>) {
    let mut buffer = vec![0u8; 8 + 20_000];
    let got = unsafe { libc::msgrcv(queue, buffer.as_mut_ptr().cast(), 20_000, kind, libc::IPC_NOWAIT) };
    check!(got >= 0);
    let kind = i64::from_ne_bytes(did(buffer[..8].try_into()));
    (kind, buffer[8..8 + usize::try_from(got).unwrap_or(0)].to_vec())
}

fn limits() -> Vec<String> {
    let names = ["kernel/sem", "kernel/msgmax", "kernel/msgmnb", "kernel/msgmni", "kernel/shmmax", "kernel/shmmni"];
    let more = ["kernel/shm_rmid_forced", "fs/mqueue/queues_max", "fs/mqueue/msg_max"];
    let all = names.iter().chain(&more);
    all.map(|name| did(std::fs::read_to_string(format!("/proc/sys/{name}")))).collect()
}

/// What the kernel lists of everything, without processes and times.
fn listed() -> Vec<Vec<String>> {
    // by name: key, id, mode, sizes, owner and creator
    let columns = ["key", "shmid", "msqid", "semid", "perms", "size", "nattch", "cbytes", "qnum", "nsems"];
    let columns = [&columns[..], &["uid", "gid", "cuid", "cgid"]].concat();
    let mut all = Vec::new();
    for kind in ["shm", "msg", "sem"] {
        let text = did(std::fs::read_to_string(format!("/proc/sysvipc/{kind}")));
        let mut lines = text.lines().map(|l| l.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        let head = lines.next().unwrap_or_default();
        for line in lines {
            let fields = head.iter().zip(line).filter(|(name, _)| columns.contains(&name.as_str()));
            all.push(fields.map(|(name, value)| format!("{kind}.{name}={value}")).collect());
        }
    }
    all
}

fn ds<T>() -> T {
    unsafe { std::mem::zeroed() }
}

/// Objects with and without keys, with owners and modes, gaps between their numbers; shared memory that is attached, and
/// such that is not, and one that is to be removed; a child that shares it all.
pub(super) fn namespace() {
    unsafe { sys(libc::unshare(libc::CLONE_NEWIPC)) };
    did(std::fs::write("/proc/sys/kernel/msgmnb", "40000"));
    did(std::fs::write("/proc/sys/kernel/msgmax", "12000"));
    did(std::fs::write("/proc/sys/kernel/sem", "200 200000000 5000000 12345"));
    did(std::fs::write("/proc/sys/fs/mqueue/msg_max", "9"));

    let make = libc::IPC_CREAT | libc::IPC_EXCL;
    let (attached, loose, doomed, at, gone) = unsafe {
        next("shm", 77);
        let attached = sys(libc::shmget(KEY, 3 * 4096 + 5, make | 0o640));
        check_eq!(attached, 77);
        let loose = sys(libc::shmget(KEY + 1, 10_000, make | 0o600));
        let mut owner: libc::shmid_ds = ds();
        sys(libc::shmctl(loose, libc::IPC_STAT, &raw mut owner));
        (owner.shm_perm.uid, owner.shm_perm.gid) = (1234, 4321);
        sys(libc::shmctl(loose, libc::IPC_SET, &raw mut owner));
        let doomed = sys(libc::shmget(libc::IPC_PRIVATE, 4096, make | 0o600));
        let attach = |id: i32| {
            let at = libc::shmat(id, std::ptr::null(), 0);
            check!(at as isize != -1);
            at.cast::<u8>()
        };
        let (at, gone) = (attach(attached), attach(doomed));
        let other = attach(loose);
        other.add(9_999).write_volatile(9);
        check_eq!(libc::shmdt(other.cast()), 0);
        sys(libc::shmctl(doomed, libc::IPC_RMID, std::ptr::null_mut()));
        (attached, loose, doomed, at, gone)
    };
    unsafe {
        at.add(3 * 4096).write_volatile(3);
        gone.write_volatile(4);
    }
    let (queue, empty) = unsafe {
        next("msg", 1_000_005);
        let queue = sys(libc::msgget(KEY, make | 0o622));
        let mut owner: libc::msqid_ds = ds();
        sys(libc::msgctl(queue, libc::IPC_STAT, &raw mut owner));
        (owner.msg_perm.uid, owner.msg_qbytes) = (1234, 30_000);
        sys(libc::msgctl(queue, libc::IPC_SET, &raw mut owner));
        (queue, sys(libc::msgget(libc::IPC_PRIVATE, make | 0o600)))
    };
    check_eq!(queue, 1_000_005);
    let large: Vec<u8> = (0..11_000).map(|i| pattern(i, 5)).collect();
    send(queue, 7, b"seven");
    send(queue, 3, &large);
    send(queue, i64::MAX, b"");
    // less than what is in there already
    did(std::fs::write("/proc/sys/kernel/msgmnb", "20000"));
    let semaphores = unsafe {
        next("sem", 9);
        let set = sys(libc::semget(KEY, 3, make | 0o606));
        let mut values = [1u16, 0, 32_767];
        sys(libc::semctl(set, 0, libc::SETALL, values.as_mut_ptr()));
        set
    };
    check_eq!(semaphores, 9);
    // waits for what the parent gives after the restore
    let up = Shared::new();
    let child = fork(|| {
        unsafe { libc::shmdt(gone.cast()) };
        up.set(0, 1);
        let mut take = libc::sembuf { sem_num: 1, sem_op: -1, sem_flg: 0 };
        if unsafe { libc::semop(semaphores, &raw mut take, 1) } < 0 {
            return 1;
        }
        i32::from(unsafe { at.add(3 * 4096).read_volatile() } != 5)
    });
    up.wait(0, 1);
    let before = (limits(), listed());
    ready();
    check_eq!((limits(), listed()), before);
    unsafe {
        check_eq!(at.add(3 * 4096).read_volatile(), 3);
        check_eq!(gone.read_volatile(), 4);
        let other = libc::shmat(loose, std::ptr::null(), libc::SHM_RDONLY).cast::<u8>();
        check!(other as isize != -1);
        check_eq!((other.read_volatile(), other.add(9_999).read_volatile()), (0, 9));
        check_eq!(libc::shmdt(gone.cast()), 0);
        let mut owner: libc::shmid_ds = ds();
        check_eq!(libc::shmctl(doomed, libc::IPC_STAT, &raw mut owner), -1);
        check_eq!(sys(libc::shmget(KEY, 0, 0)), attached);
    }
    check_eq!(receive(queue, 3), (3, large));
    check_eq!(receive(queue, 0), (7, b"seven".to_vec()));
    check_eq!(receive(queue, 0), (i64::MAX, Vec::new()));
    let mut facts: libc::msqid_ds = ds();
    unsafe { sys(libc::msgctl(queue, libc::IPC_STAT, &raw mut facts)) };
    check_eq!((facts.msg_qbytes, facts.msg_perm.uid), (30_000, 1234));
    unsafe { sys(libc::msgctl(empty, libc::IPC_STAT, &raw mut facts)) };
    check_eq!(facts.msg_qnum, 0);
    let mut values = [0u16; 3];
    unsafe {
        sys(libc::semctl(semaphores, 0, libc::GETALL, values.as_mut_ptr()));
        check_eq!(values, [1, 0, 32_767]);
        at.add(3 * 4096).write_volatile(5);
        let mut give = libc::sembuf { sem_num: 1, sem_op: 1, sem_flg: 0 };
        sys(libc::semop(semaphores, &raw mut give, 1));
    }
    check_eq!(wait(child), 0);
}

fn open_queue(name: &std::ffi::CStr, flags: i32, mode: u32, most: i64, size: i64) -> i32 {
    let mut wanted: libc::mq_attr = ds();
    (wanted.mq_maxmsg, wanted.mq_msgsize) = (most, size);
    sys(unsafe { libc::mq_open(name.as_ptr(), flags, mode, &raw const wanted) })
}

fn put(queue: i32, bytes: &[u8], priority: u32) {
    unsafe { sys(libc::mq_send(queue, bytes.as_ptr().cast(), bytes.len(), priority)) };
}

/// The next message, and its priority; or the error.
fn take(queue: i32) -> Result<(Vec<u8>, u32), i32> {
    let (mut bytes, mut priority) = (vec![0u8; 20_000], 0);
    let got = unsafe { libc::mq_receive(queue, bytes.as_mut_ptr().cast(), bytes.len(), &raw mut priority) };
    if got < 0 {
        return Err(errno());
    }
    bytes.truncate(usize::try_from(got).unwrap_or(0));
    Ok((bytes, priority))
}

/// Modes, owners, sizes of queues, and of each descriptor what it is open for.
fn queues(all: &[i32]) -> Vec<[i64; 8]> {
    let one = |&queue: &i32| unsafe {
        let (mut stat, mut now): (libc::stat, libc::mq_attr) = (ds(), ds());
        sys(libc::fstat(queue, &raw mut stat));
        sys(libc::mq_getattr(queue, &raw mut now));
        let flags = sys(libc::fcntl(queue, libc::F_GETFL)) & (libc::O_ACCMODE | libc::O_NONBLOCK);
        let [mode, uid, gid] = [stat.st_mode, stat.st_uid, stat.st_gid].map(i64::from);
        [mode, uid, gid, now.mq_flags, now.mq_maxmsg, now.mq_msgsize, now.mq_curmsgs, flags.into()]
    };
    all.iter().map(one).collect()
}

/// POSIX message queues: with messages, of somebody else, without a name, one nobody has open, limits that were lowered; descriptors
/// that are shared, and for one way only; a child that waits for a message.
pub(super) fn posix() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWIPC) });
    did(std::fs::write("/proc/sys/fs/mqueue/msgsize_max", "16384"));
    let make = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
    let full = open_queue(c"/full", make | libc::O_NONBLOCK, 0o640, 6, 16_384);
    let large: Vec<u8> = (0..16_000).map(|i| pattern(i, 7)).collect();
    for (bytes, priority) in
        [(&b"low"[..], 1), (b"high", 32_000), (b"", 5), (&large, 5), (b"high too", 32_000), (b"z", 0)]
    {
        put(full, bytes, priority);
    }
    did(std::fs::write("/proc/sys/fs/mqueue/msgsize_max", "4096"));
    did(std::fs::write("/proc/sys/fs/mqueue/msg_max", "5"));
    let reader = open_queue(c"/full", libc::O_RDONLY | libc::O_NONBLOCK | libc::O_CLOEXEC, 0, 0, 0);
    let writer = open_queue(c"/full", libc::O_WRONLY, 0, 0, 0);
    // two of one name, of which one is gone
    let nameless = open_queue(c"/name", make, 0o600, 2, 10);
    put(nameless, b"of the old", 1);
    sys(unsafe { libc::mq_unlink(c"/name".as_ptr()) });
    let named = open_queue(c"/name", make, 0o622, 3, 11);
    sys(unsafe { libc::fchown(named, 1234, 4321) });
    put(named, b"of the new", 2);
    // nobody has it
    let loose = open_queue(c"/loose", make, 0o600, 4, 12);
    put(loose, b"nobody's", 3);
    unsafe { libc::close(loose) };
    let waited = open_queue(c"/waited", make, 0o600, 1, 8);
    let child = fork(|| match take(waited) {
        Ok((bytes, 4)) if bytes == b"at last" => 0,
        _ => 1,
    });
    let all = [full, reader, writer, nameless, named, waited];
    let before = queues(&all);
    check_eq!(before[0][6], 6);
    ready();
    check_eq!(queues(&all), before);
    check_eq!(did(std::fs::read_to_string("/proc/sys/fs/mqueue/msg_max")).trim(), "5");
    check_eq!(unsafe { libc::fcntl(reader, libc::F_GETFD) }, libc::FD_CLOEXEC);
    check_eq!(unsafe { libc::mq_send(full, b"x".as_ptr().cast(), 1, 0) }, -1);
    check_eq!(errno(), libc::EAGAIN);
    for (bytes, priority) in
        [(&b"high"[..], 32_000), (b"high too", 32_000), (b"", 5), (&large, 5), (b"low", 1), (b"z", 0)]
    {
        check_eq!(take(reader), Ok((bytes.to_vec(), priority)));
    }
    check_eq!(take(full), Err(libc::EAGAIN));
    check_eq!(take(writer), Err(libc::EBADF));
    put(writer, b"one more", 9);
    check_eq!(take(reader), Ok((b"one more".to_vec(), 9)));
    check_eq!(take(nameless), Ok((b"of the old".to_vec(), 1)));
    check_eq!(take(named), Ok((b"of the new".to_vec(), 2)));
    let again = open_queue(c"/name", libc::O_RDWR | libc::O_NONBLOCK, 0, 0, 0);
    put(named, b"same", 7);
    check_eq!(take(again), Ok((b"same".to_vec(), 7)));
    let loose = open_queue(c"/loose", libc::O_RDONLY, 0, 0, 0);
    check_eq!(take(loose), Ok((b"nobody's".to_vec(), 3)));
    put(waited, b"at last", 4);
    check_eq!(wait(child), 0);
}

/// A POSIX message queue of whose next message a signal is to tell: what that carries is shown to nobody.
pub(super) fn posix_notify() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWIPC) });
    let queue = open_queue(c"/standstill", libc::O_CREAT | libc::O_RDWR, 0o600, 2, 10);
    let mut event: libc::sigevent = ds();
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, libc::SIGURG);
    sys(unsafe { libc::syscall(libc::SYS_mq_notify, queue, &raw const event) } as i32);
    ready();
    put(queue, b"x", 1);
    check_eq!(take(queue), Ok((b"x".to_vec(), 1)));
}
