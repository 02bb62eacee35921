//! Resource limits and scheduling.

use super::support::*;

/// Every limit that can be lowered without trouble.
pub(super) fn limits() {
    let set = |what: libc::__rlimit_resource_t, soft: u64, hard: u64| {
        // nobody may raise one without a capability
        let mut now = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        unsafe { sys(libc::getrlimit(what, &raw mut now)) };
        let hard = hard.min(now.rlim_max);
        let limit = libc::rlimit { rlim_cur: soft.min(hard), rlim_max: hard };
        unsafe { sys(libc::setrlimit(what, &raw const limit)) };
    };
    set(libc::RLIMIT_CORE, 0, 1 << 20);
    set(libc::RLIMIT_NOFILE, 200, 300);
    set(libc::RLIMIT_FSIZE, 1 << 30, 1 << 31);
    set(libc::RLIMIT_STACK, 4 << 20, 64 << 20);
    set(libc::RLIMIT_MSGQUEUE, 1000, 2000);
    set(libc::RLIMIT_SIGPENDING, 500, 600);
    set(libc::RLIMIT_RTTIME, 1 << 40, libc::RLIM_INFINITY);
    did(std::fs::write("/proc/self/oom_score_adj", "77"));
    let before = (proc_self("limits"), proc_self("oom_score_adj"));
    ready();
    check_eq!((proc_self("limits"), proc_self("oom_score_adj")), before);
}

/// Niceness and scheduling policy, thread by thread.
pub(super) fn sched() {
    let shared = Shared::new();
    let facts = || unsafe {
        let mut p: libc::sched_param = std::mem::zeroed();
        sys(libc::sched_getparam(0, &raw mut p));
        (libc::sched_getscheduler(0), p.sched_priority, libc::getpriority(libc::PRIO_PROCESS, 0))
    };
    let work = move |nice: i32, policy: i32, priority: i32| {
        std::thread::spawn(move || {
            let p = libc::sched_param { sched_priority: priority };
            unsafe {
                sys(libc::setpriority(libc::PRIO_PROCESS, 0, nice));
                sys(libc::sched_setscheduler(0, policy, &raw const p));
            }
            let before = facts();
            shared.add(0);
            shared.wait(1, 1);
            check_eq!(facts(), before);
        })
    };
    let all = [
        work(7, libc::SCHED_OTHER, 0),
        work(3, libc::SCHED_BATCH, 0),
        work(0, libc::SCHED_IDLE, 0),
        work(0, libc::SCHED_RR, 5),
        work(0, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, 9),
    ];
    shared.wait(0, 5);
    unsafe { sys(libc::setpriority(libc::PRIO_PROCESS, 0, 2)) };
    let before = facts();
    ready();
    check_eq!(facts(), before);
    shared.set(1, 1);
    for thread in all {
        check!(thread.join().is_ok());
    }
}
