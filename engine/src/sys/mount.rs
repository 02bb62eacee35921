//! The mount API as far as rustix lacks it: mount_setattr(2), sharing copied by move_mount(2), threads in other mount
//! namespaces.
//!
//! Man pages: mount_setattr(2), move_mount(2), open_tree(2), mount_namespaces(7).

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use crate::error::{Call, Error, Result};

/// Propagation as mount(2) and mount_setattr(2) have it.
pub mod propagation {
    /// Events go nowhere and come from nowhere.
    pub const PRIVATE: u64 = libc::MS_PRIVATE;
    /// The same, and cannot be bound.
    pub const UNBINDABLE: u64 = libc::MS_UNBINDABLE;
    /// Events come from a master only.
    pub const SLAVE: u64 = libc::MS_SLAVE;
    /// A group of peers.
    pub const SHARED: u64 = libc::MS_SHARED;
}

const MOVE_MOUNT_SET_GROUP: u32 = 0x100;

/// struct mount_attr.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

fn setattr(mount: BorrowedFd<'_>, flags: i32, attr: &MountAttr, call: &'static str) -> Result<()> {
    let size = std::mem::size_of::<MountAttr>();
    // SAFETY: an empty path, and a structure of the size that is said.
    let r = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags | libc::AT_EMPTY_PATH,
            std::ptr::from_ref(attr),
            size,
        )
    };
    if r < 0 {
        return Err(Error::last(call));
    }
    Ok(())
}

/// Sets and clears MOUNT_ATTR_* of one mount.
pub fn set_attributes(mount: BorrowedFd<'_>, set: u64, clear: u64) -> Result<()> {
    setattr(mount, 0, &MountAttr { set, clear, ..Default::default() }, "mount_setattr")
}

/// Changes the propagation of one mount, or of it and all below it.
pub fn set_propagation(mount: BorrowedFd<'_>, propagation: u64, recursive: bool) -> Result<()> {
    const AT_RECURSIVE: i32 = 0x8000;
    let flags = if recursive { AT_RECURSIVE } else { 0 };
    setattr(mount, flags, &MountAttr { propagation, ..Default::default() }, "mount_setattr(propagation)")
}

/// Gives `to`, which is private, the peers and the master of `from` (5.15).
pub fn copy_sharing(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH
        | MoveMountFlags::from_bits_retain(MOVE_MOUNT_SET_GROUP);
    rustix::mount::move_mount(from, c"", to, c"", flags).call("move_mount(MOVE_MOUNT_SET_GROUP)")
}

/// A detached mount of what `path` leads to from `base` on, without what is mounted below it.
pub fn clone_tree(base: BorrowedFd<'_>, path: &[u8]) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_NO_AUTOMOUNT
        | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    rustix::mount::open_tree(base, path, flags)
}

/// Puts a detached mount, or one that is mounted elsewhere, on top of what `place` stands for.
pub fn attach(mount: BorrowedFd<'_>, place: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, c"", place, c"", flags).call("move_mount")
}

/// The id of the mount that a descriptor is on.
pub fn id_of(fd: BorrowedFd<'_>) -> Result<u64> {
    let wanted = rustix::fs::StatxFlags::MNT_ID;
    Ok(rustix::fs::statx(fd, c"", rustix::fs::AtFlags::EMPTY_PATH, wanted).call("statx")?.stx_mnt_id)
}

/// The same of a number that is ours.
pub fn of_number(fd: i32) -> Result<u64> {
    let wanted = rustix::fs::StatxFlags::MNT_ID;
    let path = format!("/proc/self/fd/{fd}");
    Ok(rustix::fs::statx(rustix::fs::CWD, path, rustix::fs::AtFlags::empty(), wanted).call("statx")?.stx_mnt_id)
}

/// A new tmpfs, mounted nowhere.
pub fn scratch() -> Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let fs = rustix::mount::fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).call("fsopen")?;
    rustix::mount::fsconfig_create(std::os::fd::AsFd::as_fd(&fs)).call("fsconfig(FSCONFIG_CMD_CREATE)")?;
    rustix::mount::fsmount(std::os::fd::AsFd::as_fd(&fs), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
        .call("fsmount")
}

/// Runs `work` in a thread with a root and a working folder of its own, which may enter other namespaces: the process
/// stays where it is. It takes over the span of logs, not the namespaces of the caller's thread.
pub fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    super::thread::apart(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).call("unshare(CLONE_FS)")?;
        work()
    })
}

/// Enters a mount namespace; only for threads that [`apart`] made.
pub fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNS).call("setns(mnt)")
}

/// Enters a new mount namespace, a copy of the current one in which all mounts are private; only for threads that
/// [`apart`] made.
pub fn enter_private_copy() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).call("unshare(CLONE_NEWNS)")?;
    make_private()
}

/// Makes all mounts of this namespace private.
pub fn make_private() -> Result<()> {
    let folder = rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", folder, rustix::fs::Mode::empty()).call("open(/)")?;
    set_propagation(std::os::fd::AsFd::as_fd(&root), propagation::PRIVATE, true)
}
