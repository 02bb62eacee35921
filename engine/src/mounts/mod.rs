//! Mount namespaces: the mounts of a tree that has its own.
//!
//! The kernel exposes them in `/proc/PID/mountinfo`. Images: `mountpoints-N.img` has one `MntEntry` a mount, N is the
//! namespace's id; `tmpfs-dev-D.tar.gz.img` what is in the tmpfs with the device number D (`tmpfs.rs`). Flags are those of
//! mount(2), also for propagation; super block flags are apart; a device number has 20 bits for the minor part. A mount
//! whose root was deleted says so. `ext_key` names what is brought from outside: a name that the caller gave, or one of two
//! that begin with `CRIU:`.
//!
//! - `table.rs`: mounts as data, what follows from them, what cannot be carried.
//! - `order.rs`: which mount is made from which, and in what order they are put together.
//! - `dump.rs`: reads namespaces, opens hidden mounts, writes images.
//! - `restore.rs`: makes super blocks, binds, puts trees together, shares them, leaves the old root.
//! - `tmpfs.rs`: the archive of a tmpfs; `archive.rs` reads it.
//!
//! Ordering: at dump after the freeze, since content must stand still. At restore after the root task exists and before
//! any file is opened; a descriptor of each mount stays until then, since what is hidden has no path.
//!
//! Not kept: times of change (ctime), what is in a mount that the kernel fills (proc, sysfs, cgroup: others carry that).
//!
//! Sources: mount_namespaces(7), proc_pid_mountinfo(5), the kernel's Documentation/filesystems/sharedsubtree.rst.

pub mod archive;
pub mod dump;
pub mod order;
pub mod restore;
pub mod table;
mod terminals;
#[cfg(test)]
mod tests;
pub mod tmpfs;
