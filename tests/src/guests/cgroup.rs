//! Cgroups, in a hierarchy of the guest's own, which needs no controllers; it is gone when its groups are.

use std::os::unix::fs::{chown, MetadataExt as _, PermissionsExt};

use super::support::*;
use crate::cgroup::{group_in, group_of, Hierarchy};

/// A name that no other run has, by the guest's first process.
fn name_of(pid: i32) -> String {
    format!("name=standstill-guest-{pid}")
}

fn name() -> String {
    name_of(std::process::id() as i32)
}

fn own(name: &str) -> Option<String> {
    group_in(&did(std::fs::read_to_string("/proc/thread-self/cgroup")), name)
}

/// Leaves the groups and removes them.
fn clean_up(name: &str, groups: &[&str]) {
    did(Hierarchy::mount(name)).clear(groups);
    // others would stumble over it while it goes
    eventually("the end of a hierarchy", || {
        std::thread::sleep(std::time::Duration::from_millis(30));
        let gone = own(name).is_none();
        if !gone {
            // it goes with its last mount
            drop(Hierarchy::mount(name));
        }
        gone
    });
}

/// Parent and child in different groups, a group with nobody in it, an owner, a mode, a setting.
pub(super) fn groups() {
    let name = name();
    let groups = ["a", "a/b", "a/empty"];
    let up = Shared::new();
    let child = fork(|| {
        up.set(1, 1);
        up.wait(0, 1);
        i32::from(own(&name_of(unsafe { libc::getppid() })) != Some("/a/b".into()))
    });
    up.wait(1, 1);
    {
        let hierarchy = did(Hierarchy::mount(&name));
        groups.iter().for_each(|group| did(hierarchy.make(group)));
        let empty = hierarchy.path("a/empty");
        did(chown(&empty, Some(1000), Some(1001)));
        did(std::fs::set_permissions(&empty, PermissionsExt::from_mode(0o711)));
        did(std::fs::write(hierarchy.path("a/notify_on_release"), "1"));
        did(hierarchy.enter("a", 0));
        did(hierarchy.enter("a/b", child));
    }
    ready();
    check_eq!(own(&name), Some("/a".into()));
    check_eq!(group_of(child, &name), Some("/a/b".into()));
    {
        let hierarchy = did(Hierarchy::mount(&name));
        let facts = did(std::fs::metadata(hierarchy.path("a/empty")));
        check_eq!((facts.uid(), facts.gid(), facts.mode() & 0o777), (1000, 1001, 0o711));
        check_eq!(did(std::fs::read_to_string(hierarchy.path("a/notify_on_release"))), "1\n");
    }
    up.set(0, 1);
    check_eq!(wait(child), 0);
    clean_up(&name, &groups);
}

/// A namespace whose root is one group, and the guest below it.
pub(super) fn namespace() {
    let name = name();
    let groups = ["root", "root/below"];
    {
        let hierarchy = did(Hierarchy::mount(&name));
        groups.iter().for_each(|group| did(hierarchy.make(group)));
        did(hierarchy.enter("root", 0));
        unsafe { sys(libc::unshare(libc::CLONE_NEWCGROUP)) };
        did(hierarchy.enter("root/below", 0));
    }
    let up = Shared::new();
    let child = fork(|| {
        up.set(0, 1);
        unsafe { libc::pause() };
        0
    });
    up.wait(0, 1);
    check_eq!(own(&name), Some("/below".into()));
    ready();
    check_eq!(own(&name), Some("/below".into()));
    check_eq!(group_of(child, &name), Some("/below".into()));
    check_eq!(group_of(1, &name), Some("/..".into()));
    unsafe { sys(libc::kill(child, libc::SIGKILL)) };
    check_eq!(wait(child), libc::SIGKILL);
    let outside = did(std::fs::File::open(format!("/proc/{}/ns/cgroup", unsafe { libc::getppid() })));
    unsafe { sys(libc::setns(std::os::fd::AsRawFd::as_raw_fd(&outside), libc::CLONE_NEWCGROUP)) };
    check_eq!(own(&name), Some("/root/below".into()));
    clean_up(&name, &groups);
}

/// Threads in other groups than their process.
pub(super) fn threads() {
    let name = name();
    let groups = ["a", "a/t", "a/u"];
    let hierarchy = did(Hierarchy::mount(&name));
    groups.iter().for_each(|group| did(hierarchy.make(group)));
    did(hierarchy.enter("a", 0));
    let up = std::sync::Arc::new(Shared::new());
    let start = |group: &'static str, n: usize| {
        let (name, theirs) = (name.clone(), up.clone());
        let work = move || {
            theirs.set(n, gettid() as u64);
            theirs.wait(2, 1);
            check_eq!(own(&name), Some(format!("/{group}")));
        };
        let thread = did(std::thread::Builder::new().spawn(work));
        eventually("a thread", || up.get(n) != 0);
        did(std::fs::write(hierarchy.path(&format!("{group}/tasks")), up.get(n).to_string()));
        thread
    };
    let all = [start("a/t", 0), start("a/u", 1)];
    drop(hierarchy);
    ready();
    check_eq!(own(&name), Some("/a".into()));
    up.set(2, 1);
    for thread in all {
        check!(thread.join().is_ok());
    }
    clean_up(&name, &groups);
}
