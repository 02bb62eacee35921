//! Processes: who is whose child, groups and sessions, zombies, stopped ones, orphans.

use super::support::*;

/// Who one is to the others.
fn kin() -> (i32, i32, i32, i32) {
    unsafe { (libc::getpid(), libc::getppid(), libc::getpgrp(), libc::getsid(0)) }
}

/// In a child: says that it is there, waits, and has the same kin afterwards.
fn stand(shared: Shared) {
    let before = kin();
    shared.add(0);
    shared.wait(1, 1);
    check_eq!(kin(), before);
}

fn all_well(children: &[i32]) {
    for &child in children {
        check_eq!(wait(child), 0);
    }
}

/// Three children with two children each.
pub(super) fn tree() {
    let shared = Shared::new();
    let child = || {
        let below: Vec<i32> = (0..2)
            .map(|_| {
                fork(|| {
                    stand(shared);
                    0
                })
            })
            .collect();
        stand(shared);
        all_well(&below);
        0
    };
    let children: Vec<i32> = (0..3).map(|_| fork(child)).collect();
    shared.wait(0, 9);
    let before = kin();
    ready();
    check_eq!(kin(), before);
    shared.set(1, 1);
    all_well(&children);
}

/// A hundred processes: fifty one below the other, each with one more child.
pub(super) fn hundred() {
    fn down(depth: u32, shared: Shared) -> Vec<i32> {
        if depth == 0 {
            return Vec::new();
        }
        let leaf = fork(|| {
            stand(shared);
            0
        });
        let next = fork(|| {
            let below = down(depth - 1, shared);
            stand(shared);
            all_well(&below);
            0
        });
        vec![leaf, next]
    }
    let shared = Shared::new();
    let children = down(50, shared);
    shared.wait(0, 100);
    ready();
    shared.set(1, 1);
    all_well(&children);
}

/// Groups and sessions: leaders, members, a group that a sibling leads.
pub(super) fn sessions() {
    let shared = Shared::new();
    let group = |g: i32| unsafe { sys(libc::setpgid(0, g)) };
    let leader = fork(|| {
        group(0);
        stand(shared);
        0
    });
    shared.wait(0, 1);
    let member = fork(|| {
        group(leader);
        stand(shared);
        0
    });
    let session = fork(|| {
        unsafe { sys(libc::setsid()) };
        let inside = fork(|| {
            stand(shared);
            0
        });
        let other_group = fork(|| {
            group(0);
            stand(shared);
            0
        });
        stand(shared);
        all_well(&[inside, other_group]);
        0
    });
    shared.wait(0, 5);
    ready();
    shared.set(1, 1);
    all_well(&[leader, member, session]);
}

/// Processes whose parent is gone; one whose session's leader is gone, one whose group's leader is gone.
pub(super) fn orphans() {
    let shared = Shared::new();
    unsafe { sys(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)) };
    let me = std::process::id() as i32;
    for (n, lead) in [(10, 0), (11, 1), (12, 2)] {
        let parent = fork(|| {
            match lead {
                1 => drop(unsafe { sys(libc::setsid()) }),
                2 => drop(unsafe { sys(libc::setpgid(0, 0)) }),
                _ => {}
            }
            shared.set(n, 0);
            fork(|| {
                eventually("a new parent", || unsafe { libc::getppid() } == me);
                shared.set(n, std::process::id().into());
                stand(shared);
                0
            });
            0
        });
        check_eq!(wait(parent), 0);
    }
    shared.wait(0, 3);
    let orphans: Vec<i32> = (10..13).map(|n| shared.get(n) as i32).collect();
    ready();
    let mut reaper = 0i32;
    unsafe { sys(libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut reaper, 0, 0, 0)) };
    check_eq!(reaper, 1);
    shared.set(1, 1);
    all_well(&orphans);
    // and it still is who takes orphans in
    let parent = fork(|| {
        let pid = fork(|| 5);
        shared.set(20, pid as u64);
        0
    });
    check_eq!(wait(parent), 0);
    check_eq!(libc::WEXITSTATUS(wait(shared.get(20) as i32)), 5);
}

/// Orphans in the sessions of tasks beside them, one of which lives: all are children of who takes orphans in.
pub(super) fn orphan_of_session() {
    sys(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) });
    let me = std::process::id() as i32;
    let shared = Shared::new();
    let session = |slot: usize, lives: bool| {
        fork(|| {
            sys(unsafe { libc::setsid() });
            let between = fork(|| {
                let orphan = fork(|| {
                    eventually("another parent", || unsafe { libc::getppid() } == me);
                    stand(shared);
                    0
                });
                shared.set(slot, orphan as u64);
                0
            });
            check_eq!(wait(between), 0);
            if lives {
                stand(shared);
            }
            0
        })
    };
    let leaders = [session(10, true), session(11, false)];
    eventually("all", || shared.get(0) == 3);
    let dead = || {
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let flags = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        sys(unsafe { libc::waitid(libc::P_PID, leaders[1] as u32, &raw mut info, flags) });
        unsafe { info.si_pid() == leaders[1] }
    };
    eventually("a zombie", dead);
    let orphans = [10, 11].map(|slot| shared.get(slot) as i32);
    let sessions =
        || [leaders[0], orphans[0], orphans[1]].map(|pid| unsafe { (libc::getsid(pid), libc::getpgid(pid)) });
    let expected = [leaders[0], leaders[0], leaders[1]].map(|leader| (leader, leader));
    check_eq!(sessions(), expected);
    ready();
    check_eq!(sessions(), expected);
    check!(dead());
    let mut subreaper = 0;
    sys(unsafe { libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut subreaper, 0, 0, 0) });
    check_eq!(subreaper, 1);
    shared.set(1, 1);
    all_well(&[leaders[0], leaders[1], orphans[0], orphans[1]]);
    check_eq!(unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) }, -1);
    check_eq!(errno(), libc::ECHILD);
}

/// A child that stands still stays so, one that went on again goes on.
pub(super) fn stopped() {
    let shared = Shared::new();
    let stand_still = fork(|| {
        shared.add(0);
        loop {
            shared.add(2);
            if shared.get(1) == 1 {
                return 3;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    });
    let again = fork(|| {
        stand(shared);
        4
    });
    shared.wait(0, 2);
    let stop = |pid| {
        unsafe { sys(libc::kill(pid, libc::SIGSTOP)) };
        eventually("a stop", || state(pid) == 'T');
    };
    stop(stand_still);
    stop(again);
    unsafe { sys(libc::kill(again, libc::SIGCONT)) };
    let turns = shared.get(2);
    ready();
    std::thread::sleep(std::time::Duration::from_millis(30));
    check_eq!(state(stand_still), 'T');
    check_eq!(shared.get(2), turns);
    shared.set(1, 1);
    check_eq!(libc::WEXITSTATUS(wait(again)), 4);
    unsafe { sys(libc::kill(stand_still, libc::SIGCONT)) };
    check_eq!(libc::WEXITSTATUS(wait(stand_still)), 3);
}

fn state(pid: i32) -> char {
    let text = did(std::fs::read_to_string(format!("/proc/{pid}/stat")));
    text.rsplit(')').next().and_then(|t| t.trim().chars().next()).unwrap_or('?')
}

/// Children that ended and that nobody has waited for.
pub(super) fn zombies() {
    let shared = Shared::new();
    let well = fork(|| 0);
    let seven = fork(|| 7);
    let killed = fork(|| loop {
        std::thread::sleep(std::time::Duration::from_secs(1));
    });
    unsafe { sys(libc::kill(killed, libc::SIGKILL)) };
    // a zombie below a child, and one that leads its group
    let parent = fork(|| {
        let below = fork(|| 9);
        eventually("a zombie", || state(below) == 'Z');
        stand(shared);
        check_eq!(libc::WEXITSTATUS(wait(below)), 9);
        0
    });
    let leader = fork(|| {
        unsafe { sys(libc::setpgid(0, 0)) };
        11
    });
    for pid in [well, seven, killed, leader] {
        eventually("a zombie", || state(pid) == 'Z');
    }
    shared.wait(0, 1);
    ready();
    shared.set(1, 1);
    check_eq!(wait(well), 0);
    check_eq!(libc::WEXITSTATUS(wait(seven)), 7);
    check_eq!(libc::WTERMSIG(wait(killed)), libc::SIGKILL);
    check_eq!(libc::WEXITSTATUS(wait(leader)), 11);
    check_eq!(wait(parent), 0);
}

/// Children of vfork(2), one after the other, each of which takes its time before it ends: a parent that waits for such a
/// child cannot be stopped, and is nobody's to wait for.
pub(super) fn vforks() {
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        let nap = libc::timespec { tv_sec: 0, tv_nsec: 30_000_000 };
        unsafe {
            libc::syscall(libc::SYS_nanosleep, &raw const nap, 0);
            libc::syscall(libc::SYS_exit, 7);
        }
        0
    }
    let shared = Shared::new();
    let parents: Vec<i32> = (0..3)
        .map(|n| {
            fork(|| {
                let mut stack = vec![0u8; 64 << 10];
                let top = unsafe { stack.as_mut_ptr().add(64 << 10) }.cast();
                let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
                while shared.get(3) == 0 {
                    let pid = unsafe { sys(libc::clone(child, top, flags, std::ptr::null_mut())) };
                    check_eq!(wait(pid), 7 << 8);
                    shared.add(n);
                }
                0
            })
        })
        .collect();
    let each = |rounds: u64| {
        let before: Vec<u64> = (0..3).map(|n| shared.get(n)).collect();
        eventually("children", || (0..3).all(|n| shared.get(n) >= before[n] + rounds));
    };
    each(2);
    ready();
    each(2);
    shared.set(3, 1);
    all_well(&parents);
}

/// A child of vfork(2) that stops itself: its parent cannot be stopped. For a test that ends both.
pub(super) fn vfork_stopped() {
    extern "C" fn child(_: *mut libc::c_void) -> i32 {
        unsafe {
            libc::syscall(libc::SYS_kill, libc::syscall(libc::SYS_getpid), libc::SIGSTOP);
            libc::syscall(libc::SYS_exit, 0);
        }
        0
    }
    let mut stack = vec![0u8; 64 << 10];
    let top = unsafe { stack.as_mut_ptr().add(64 << 10) }.cast();
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    unsafe { sys(libc::clone(child, top, flags, std::ptr::null_mut())) };
}
