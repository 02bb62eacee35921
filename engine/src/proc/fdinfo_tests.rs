//! Tests of the descriptors' parser: texts from this kind of kernel, made-up ones where it has no such kind, hostile ones.

use super::*;
use crate::proc::locks::LockKind;

const COMMON: &str = "pos:\t0\nflags:\t02000002\nmnt_id:\t17\nino:\t1038\n";

fn read(text: &str) -> FdInfo {
    let info = parse(format!("{COMMON}{text}").as_bytes()).unwrap();
    assert_eq!((info.pos, info.flags, info.mnt_id, info.ino), (0, 0o2_000_002, 17, Some(1038)));
    assert_eq!(info.other, []);
    info
}

#[test]
fn plain_with_locks() {
    let info = parse(
        b"pos:\t-1\nflags:\t02100000\nmnt_id:\t27\nino:\t10014084\nlock:\t1: FLOCK  ADVISORY  READ 11695 fe:00:10014084 0 EOF\n\
          lock:\t2: OFDLCK ADVISORY  READ -1 fe:00:10014660 100 EOF\n",
    )
    .unwrap();
    assert_eq!((info.pos, info.flags, info.locks.len()), (-1, 0o2_100_000, 2));
    assert_eq!((info.locks[0].kind, info.locks[1].kind), (LockKind::Flock, LockKind::Ofd));
    assert_eq!(info.detail, FdDetail::None);
}

#[test]
fn eventfd_and_signalfd() {
    let info = read("eventfd-count:             1234\neventfd-id: 1\neventfd-semaphore: 1\n");
    assert_eq!(info.detail, FdDetail::Eventfd { count: 0x1234, id: Some(1), semaphore: Some(true) });
    let info = read("eventfd-count: fffffffffffffffe\n");
    assert_eq!(info.detail, FdDetail::Eventfd { count: u64::MAX - 1, id: None, semaphore: None });
    assert_eq!(read("sigmask:\t0000000000004002\n").detail, FdDetail::Signalfd(0x4002));
}

#[test]
fn epoll() {
    let info = read(
        "tfd:        4 events: 80000019 data: ffffffffffffffff  pos:0 ino:40e sdev:10\n\
         tfd:        5 events:       19 data:                7  pos:-3 ino:40e sdev:10\n",
    );
    let FdDetail::Epoll(targets) = info.detail else { panic!() };
    let first = EpollTarget { tfd: 4, events: 0x8000_0019, data: u64::MAX, pos: 0, ino: 0x40e, sdev: 0x10 };
    assert_eq!(targets[0], first);
    assert_eq!((targets[1].data, targets[1].pos), (7, -3));
}

#[test]
fn inotify() {
    let info = read(
        "inotify wd:14 ino:3c4a7 sdev:fe00000 mask:fff ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000\n\
         inotify wd:f ino:1 sdev:15 mask:800 ignored_mask:0 \n",
    );
    let FdDetail::Inotify(watches) = info.detail else { panic!() };
    assert_eq!((watches[0].wd, watches[0].ino, watches[0].sdev, watches[0].mask), (0x14, 0x3c4a7, 0xfe0_0000, 0xfff));
    let handle = FileHandle { kind: 1, bytes: vec![0xa7, 0xc4, 3, 0, 0, 0, 0, 0] };
    assert_eq!(watches[0].handle, Some(handle));
    assert_eq!((watches[1].wd, &watches[1].handle), (15, &None));
}

#[test]
fn fanotify() {
    let info = read(
        "fanotify flags:200 event-flags:8000\nfanotify mnt_id:1b mflags:0 mask:20 ignored_mask:0\n\
         fanotify ino:3c4a7 sdev:fe00000 mflags:40 mask:20 ignored_mask:1 fhandle-bytes:8 fhandle-type:1 f_handle:a7c4030000000000\n\
         fanotify sdev:fe00000 mflags:0 mask:100 ignored_mask:0\n\
         fanotify mnt_ns:4026531832 mflags:0 mask:1000000 ignored_mask:0\n",
    );
    let FdDetail::Fanotify(group) = info.detail else { panic!() };
    assert_eq!((group.flags, group.event_flags, group.marks.len()), (0x200, 0x8000, 4));
    assert_eq!(group.marks[3].target, FanotifyTarget::MountNamespace(4_026_531_832));
    assert_eq!(group.marks[0].target, FanotifyTarget::Mount(0x1b));
    assert!(matches!(group.marks[1].target, FanotifyTarget::Inode { ino: 0x3c4a7, handle: Some(_), .. }));
    assert_eq!((group.marks[1].mflags, group.marks[1].ignored_mask), (0x40, 1));
    assert_eq!(group.marks[2].target, FanotifyTarget::Filesystem(0xfe0_0000));
}

#[test]
fn timerfd_and_pidfd() {
    let info = read("clockid: 0\nticks: 3\nsettime flags: 01\nit_value: (2999, 999935969)\nit_interval: (1, 2)\n");
    let timer = Timerfd { clock_id: 0, ticks: 3, settime_flags: 1, value: (2999, 999_935_969), interval: (1, 2) };
    assert_eq!(info.detail, FdDetail::Timerfd(timer));
    assert_eq!(read("Pid:\t11695\nNSpid:\t11695\t7\n").detail, FdDetail::Pidfd { pid: 11695, ns_pid: vec![11695, 7] });
    assert_eq!(read("Pid:\t-1\n").detail, FdDetail::Pidfd { pid: -1, ns_pid: Vec::new() });
}

#[test]
fn io_uring() {
    let idle = "SqMask:\t0x3\nSqHead:\t0\nSqTail:\t0\nCachedSqHead:\t0\nCqMask:\t0x7\nCqHead:\t0\nCqTail:\t0\n\
        CachedCqTail:\t0\nSQEs:\t0\nCQEs:\t0\nSqThread:\t-1\nSqThreadCpu:\t-1\nSqTotalTime:\t0\nSqWorkTime:\t0\n\
        UserFiles:\t0\nUserBufs:\t0\nPollList:\nCqOverflowList:\nNAPI:\tdisabled\n";
    let FdDetail::IoUring(ring) = read(idle).detail else { panic!() };
    assert!(ring.is_idle() && !ring.napi);
    assert_eq!((ring.sq_mask, ring.cq_mask, ring.sq_thread), (3, 7, -1));
    let busy = "SqMask:\t0x3\nSqHead:\t1\nSqTail:\t2\nCachedSqHead:\t1\nCqMask:\t0x7\nCqHead:\t0\nCqTail:\t1\n\
        CachedCqTail:\t1\nSQEs:\t1\n    1: opcode:READ, fd:3, flags:0, off:0, addr:0x0, rw_flags:0x0, buf_index:0 user_data:7\n\
        CQEs:\t1\n    0: user_data:9, res:-11, flag:0\nUserFiles:\t2\n    0: /tmp/a\\040b\\134c\n    2: pipe:[237908]\n\
        UserBufs:\t2\n    0: 0x7f0000000000/4096\n    1: <none>\nPersonalities:\n    1\n\tUid:\t\t0\nPollList:\n  op=6, task_works=0\n\
        CqOverflowList:\n  user_data=7, res=-11, flags=2\nNAPI:\tenabled\n";
    let FdDetail::IoUring(ring) = read(busy).detail else { panic!() };
    assert!(!ring.is_idle() && ring.napi);
    assert_eq!(ring.files, [(0, b"/tmp/a b\\c".to_vec()), (2, b"pipe:[237908]".to_vec())]);
    assert_eq!(ring.bufs, [(0, 0x7f00_0000_0000, 4096)]);
    assert_eq!((ring.sqes.len(), ring.cqes.len(), ring.poll_list.len(), ring.personalities.len()), (1, 1, 1, 2));
    assert_eq!(ring.cq_overflow[0].res, -11);
    assert!(parse(format!("{COMMON}SqMask:\t0x3\n  floating\n").as_bytes()).is_err());
    assert!(parse(format!("{COMMON}SqMask:\t0x3\nCqOverflowList:\n  user=1\n").as_bytes()).is_err());
}

#[test]
fn devices_and_others() {
    assert_eq!(read("iff:\ttt0\n").detail, FdDetail::Tun(b"tt0".to_vec()));
    assert_eq!(read("iff:\t\n").detail, FdDetail::Tun(Vec::new()));
    assert_eq!(read("scm_fds: 1\n").detail, FdDetail::UnixSocket { scm_fds: 1 });
    let info = read("pending:\t0\ntotal:\t1\nAPI:\taa:0:80000000000001ff\n");
    let api = b"aa:0:80000000000001ff".to_vec();
    assert_eq!(info.detail, FdDetail::Userfaultfd { pending: 0, total: 1, api });
    let info = read(
        "map_type:\t2\nkey_size:\t4\nvalue_size:\t8\nmax_entries:\t16\nmap_flags:\t0x10\nmap_extra:\t0x0\nmemlock:\t440\n\
         map_id:\t25\nfrozen:\t0\nowner_prog_type:\t5\nowner_jited:\t1\n",
    );
    let FdDetail::BpfMap(map) = info.detail else { panic!() };
    assert_eq!((map.map_type, map.key_size, map.value_size, map.map_flags, map.map_id), (2, 4, 8, 0x10, 25));
    assert_eq!(map.owner_prog_type, Some(5));
    let info = read(
        "prog_type:\t1\nprog_jited:\t1\nprog_tag:\t59f4a931744dcdc6\nmemlock:\t4096\nprog_id:\t97\nrun_time_ns:\t0\n\
         run_cnt:\t0\nrecursion_misses:\t0\nverified_insns:\t2\n",
    );
    assert_eq!(info.detail, FdDetail::BpfProgram { prog_type: 1, id: 97 });
    assert!(matches!(read("drm-driver:\ti915\ndrm-client-id:\t7\n").detail, FdDetail::Drm(lines) if lines.len() == 2));
    let dmabuf = FdDetail::DmaBuf { size: 4096, exporter: b"system".to_vec() };
    assert_eq!(read("size:\t4096\ncount:\t3\nexp_name:\tsystem\n").detail, dmabuf);
    assert!(matches!(read("link_type:\ttracing\nlink_id:\t3\n").detail, FdDetail::BpfLink(lines) if lines.len() == 2));
}

#[test]
fn own() {
    let mut buffer = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fdinfo").unwrap().flatten() {
        if crate::proc::read_proc(&entry.path(), &mut buffer).is_ok() {
            let mut info = parse(&buffer).unwrap();
            // another test's terminal: the kernel's note of its number, which a dump asks for otherwise
            info.other.retain(|(name, _)| name != b"tty-index");
            assert_eq!(info.other, [], "{}", String::from_utf8_lossy(&buffer));
        }
    }
}

#[test]
fn hostile() {
    assert!(parse(b"").is_err());
    let info = parse(format!("{COMMON}new-thing:\tx\nno colon \u{ff}\n").as_bytes()).unwrap();
    assert_eq!(info.other.len(), 2);
    for bad in [
        "pos:\t1\n",
        "tfd: 4 events: x\n",
        "tfd: 4 events:\n",
        "tfd:\n",
        "tfd: 99999999999\n",
        "inotify wd:1\n",
        "inotify wd:100000000 ino:1 sdev:1 mask:1\n",
        "inotify wd:1 ino:1 sdev:1 mask:1 fhandle-bytes:ffffffff fhandle-type:1 f_handle:00\n",
        "inotify wd:1 ino:1 sdev:1 mask:1 fhandle-bytes:1 fhandle-type:1 f_handle:0\n",
        "inotify wd:1 ino:1 sdev:1 mask:1 new:1\n",
        "fanotify flags:1\n",
        "fanotify ino:1 mflags:0 mask:1 ignored_mask:0\n",
        "it_value: (1, 1000000000)\n",
        "it_value: 1\n",
        "eventfd-count: x\n",
        "eventfd-semaphore: 2\n",
        "tfd: 1 events: 1 data: 1\neventfd-count: 1\n",
        "sigmask:\t10000000000000000\n",
        "lock:\t1\n",
    ] {
        assert!(parse(format!("{COMMON}{bad}").as_bytes()).is_err(), "{bad}");
    }
}
