//! Hierarchies of cgroups: those that guests make for themselves, and any other.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::PathBuf;

/// A hierarchy, mounted where nobody else sees it. The mount goes with this.
#[derive(Debug)]
pub struct Hierarchy(OwnedFd);

fn fd(result: i64) -> io::Result<OwnedFd> {
    match i32::try_from(result) {
        // SAFETY: a descriptor that was just made, and that nobody else has.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Hierarchy {
    /// Mounts one: `name=…` for a named one, which is made if it is not there, nothing for v2, else a controller of v1.
    ///
    /// # Errors
    /// If it cannot be had.
    pub fn mount(name: &str) -> io::Result<Hierarchy> {
        let mut turns = 0;
        loop {
            match Hierarchy::mount_once(name) {
                // one that is just going away
                Err(e) if e.raw_os_error() == Some(libc::EBUSY) && turns < 1000 => turns += 1,
                other => return other,
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    fn mount_once(name: &str) -> io::Result<Hierarchy> {
        const FSCONFIG_SET_FLAG: i32 = 0;
        const FSCONFIG_SET_STRING: i32 = 1;
        const FSCONFIG_CMD_CREATE: i32 = 6;
        let kind = if name.is_empty() { c"cgroup2" } else { c"cgroup" };
        // SAFETY: all strings live over the calls.
        unsafe {
            let context = fd(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 1))?;
            let set = |command: i32, key: Option<&str>, value: Option<&str>| {
                let text = |t: Option<&str>| t.map(CString::new).transpose().unwrap_or_default();
                let (key, value) = (text(key), text(value));
                let at = |t: &Option<CString>| t.as_ref().map_or(std::ptr::null(), |t| t.as_ptr());
                let r = libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, at(&key), at(&value), 0);
                if r < 0 {
                    Err(io::Error::last_os_error())
                } else {
                    Ok(())
                }
            };
            match name.strip_prefix("name=") {
                Some(name) => {
                    set(FSCONFIG_SET_FLAG, Some("none"), None)?;
                    set(FSCONFIG_SET_STRING, Some("name"), Some(name))?;
                }
                None if name.is_empty() => {}
                None => set(FSCONFIG_SET_FLAG, Some(name), None)?,
            }
            set(FSCONFIG_CMD_CREATE, None, None)?;
            Ok(Hierarchy(fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), 1, 0))?))
        }
    }

    /// A path in it.
    pub fn path(&self, below: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{below}", self.0.as_raw_fd()))
    }

    /// Makes a group.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn make(&self, group: &str) -> io::Result<()> {
        fs::create_dir(self.path(group))
    }

    /// Moves a process, or with 0 the one that asks, into a group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn enter(&self, group: &str, pid: i32) -> io::Result<()> {
        fs::write(self.path(&format!("{group}/cgroup.procs")), pid.to_string())
    }

    /// Empties these groups, and removes them, the last first.
    pub fn clear(&self, groups: &[&str]) {
        for group in groups.iter().rev() {
            let text = fs::read_to_string(self.path(&format!("{group}/cgroup.procs"))).unwrap_or_default();
            for pid in text.lines().filter_map(|l| l.parse().ok()) {
                let _ = self.enter("", pid);
            }
            let _ = fs::remove_dir(self.path(group));
        }
        // the kernel takes a little longer: a hierarchy whose last mount goes before its groups are all gone stays
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// The path of a group in one hierarchy, in a text like that of /proc/PID/cgroup.
pub fn group_in(text: &str, hierarchy: &str) -> Option<String> {
    let fields = text.lines().map(|l| l.splitn(3, ':').collect::<Vec<_>>());
    fields.filter(|f| f.get(1) == Some(&hierarchy)).find_map(|f| f.get(2).map(|p| (*p).to_owned()))
}

/// The group that a process is in.
pub fn group_of(pid: i32, hierarchy: &str) -> Option<String> {
    group_in(&fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default(), hierarchy)
}
