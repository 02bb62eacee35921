//! Mounts of cgroup hierarchies that nobody else sees: fsopen(2), fsconfig(2), fsmount(2), cgroups(7).
//!
//! Such a mount needs no place, so that none must be made and taken away again; it is gone with its descriptor.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::mount::{self, FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::error::{Call, Result};

/// How long a hierarchy may take to go away.
const GOES_AWAY: Duration = Duration::from_secs(2);

/// A mount of the hierarchy with these controllers, as /proc/PID/cgroup names them: `name=…` for a named one, an empty
/// name for v2. A named hierarchy that is not there is made by this, and is gone when it has neither groups nor mounts.
pub fn mount<'n>(names: impl Iterator<Item = &'n str>) -> Result<OwnedFd> {
    let names: Vec<&str> = names.collect();
    let began = Instant::now();
    loop {
        match mount_once(&names) {
            // one that is just going away: the kernel begins the call again, which it then says was made already
            Err(e) if e.errno() == libc::EBUSY && began.elapsed() < GOES_AWAY => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

fn mount_once(names: &[&str]) -> Result<OwnedFd> {
    let v2 = names.iter().all(|n| n.is_empty());
    let context = mount::fsopen(if v2 { "cgroup2" } else { "cgroup" }, FsOpenFlags::FSOPEN_CLOEXEC).call("fsopen")?;
    if !names.iter().any(|n| !n.is_empty() && !n.starts_with("name=")) && !v2 {
        mount::fsconfig_set_flag(&context, "none").call("fsconfig(none)")?;
    }
    for name in names.iter().filter(|n| !n.is_empty()) {
        match name.strip_prefix("name=") {
            Some(name) => mount::fsconfig_set_string(&context, "name", name).call("fsconfig(name)")?,
            None => mount::fsconfig_set_flag(&context, *name).call("fsconfig(controller)")?,
        }
    }
    mount::fsconfig_create(&context).call("fsconfig(FSCONFIG_CMD_CREATE)")?;
    mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).call("fsmount")
}
