//! Tests of the status parser: a text from this kind of kernel, and hostile ones.

use super::*;

const REAL: &[u8] =
    b"Name:\tcat\nUmask:\t0022\nState:\tR (running)\nTgid:\t11610\nNgid:\t0\nPid:\t11610\nPPid:\t11608\n\
TracerPid:\t0\nUid:\t0\t1\t2\t3\nGid:\t0\t0\t0\t4294967295\nFDSize:\t256\nGroups:\t4 24 1000 \nNStgid:\t11610\t5\n\
NSpid:\t11610\t5\nNSpgid:\t11608\t3\nNSsid:\t2787\t0\nKthread:\t0\nVmPeak:\t    3060 kB\nVmSize:\t    3060 kB\n\
VmLck:\t       0 kB\nVmRSS:\t    1764 kB\nVmSwap:\t       0 kB\nHugetlbPages:\t       0 kB\nCoreDumping:\t0\n\
THP_enabled:\t1\nuntag_mask:\t0xffffffffffffffff\nThreads:\t1\nSigQ:\t1/96365\nSigPnd:\t0000000000000000\n\
ShdPnd:\t0000000000000200\nSigBlk:\t0000000000000001\nSigIgn:\t0000000001001000\nSigCgt:\tfffffffe00000000\n\
CapInh:\t0000000000000000\nCapPrm:\t000001fffeffffff\nCapEff:\t000001fffeffffff\nCapBnd:\t000001fffeffffff\n\
CapAmb:\t0000000000000000\nNoNewPrivs:\t0\nSeccomp:\t2\nSeccomp_filters:\t3\n\
Speculation_Store_Bypass:\tvulnerable\nSpeculationIndirectBranch:\talways enabled\nCpus_allowed:\t3\n\
Cpus_allowed_list:\t0-1\nMems_allowed:\t00000000,00000001\nMems_allowed_list:\t0\nvoluntary_ctxt_switches:\t0\n\
nonvoluntary_ctxt_switches:\t0\nx86_Thread_features:\tshstk wrss \nx86_Thread_features_locked:\tshstk new \n";

#[test]
fn real() {
    let status = parse(REAL).unwrap();
    assert_eq!((&status.name[..], status.umask, status.state), (&b"cat"[..], Some(0o22), TaskState::Running));
    assert_eq!((status.tgid, status.pid, status.ppid, status.tracer_pid), (11610, 11610, 11608, 0));
    assert_eq!(status.uid, Ids { real: 0, effective: 1, saved: 2, filesystem: 3 });
    assert_eq!(status.gid.filesystem, u32::MAX);
    assert_eq!(status.groups, [4, 24, 1000]);
    assert_eq!(status.ns_pid, [11610, 5]);
    assert_eq!(status.ns_sid, [2787, 0]);
    assert_eq!((status.vm_rss_kb, status.vm_locked_kb, status.hugetlb_kb), (Some(1764), Some(0), Some(0)));
    assert_eq!((status.thp_enabled, status.kthread, status.threads), (Some(true), Some(false), 1));
    assert_eq!(status.sig_queue, (1, 96365));
    assert_eq!((status.shared_pending, status.sig_caught), (0x200, 0xffff_fffe_0000_0000));
    assert_eq!(status.cap_bounding, 0x1ff_feff_ffff);
    assert_eq!((status.seccomp, status.seccomp_filters, status.no_new_privs), (Some(2), Some(3), false));
    assert_eq!(status.store_bypass.as_deref(), Some(&b"vulnerable"[..]));
    assert_eq!(status.cpus_allowed_list, b"0-1");
    let on = ThreadFeatures { shadow_stack: true, shadow_stack_write: true, unknown: false };
    assert_eq!(status.thread_features, Some(on));
    assert!(status.thread_features_locked.unwrap().unknown);
}

#[test]
fn names() {
    let text = [&b"Name:\ta) b\\n\\\\x\\ \xff"[..], &REAL[9..]].concat();
    assert_eq!(parse(&text).unwrap().name, b"a) b\n\\x\\ \xff");
    let text = [&b"Name:\t: \t"[..], &REAL[9..]].concat();
    assert_eq!(parse(&text).unwrap().name, b": \t");
}

#[test]
fn own_and_all_others() {
    let mut buffer = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let path = entry.path().join("status");
        if crate::proc::read_proc(&path, &mut buffer).is_ok() {
            parse(&buffer).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        }
    }
}

#[test]
fn hostile() {
    assert_eq!(parse(b"").unwrap_err().to_string(), "/proc/PID/status, line 0: Name is missing");
    let last = REAL.windows(9).position(|w| w == b"Seccomp:\t").unwrap();
    for length in 0..last - 1 {
        assert!(parse(&REAL[..length]).is_err(), "{length}");
    }
    let twice = [REAL, b"Pid:\t1\n"].concat();
    assert!(parse(&twice).unwrap_err().to_string().ends_with("Pid is there twice"));
    for (from, to) in
        [("Tgid:\t11610", "Tgid:\t99999999999"), ("R (running)", "Q (what)"), ("1/96365", "1"), ("0022", "0082")]
    {
        let text = String::from_utf8(REAL.to_vec()).unwrap().replace(from, to);
        assert!(parse(text.as_bytes()).is_err(), "{to}");
    }
    assert!(parse(b"\n").is_err());
}
