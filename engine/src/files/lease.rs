//! Leases on files: fcntl(2) with F_SETLEASE.
//!
//! A lease is of an open file. Its holder is told by a signal (SIGIO, or what F_SETSIG says) when somebody opens the file in a
//! way that conflicts, and has `/proc/sys/fs/lease-break-time` seconds to give it up or to downgrade it. `fdinfo` shows it behind
//! `lock:` as ACTIVE, with its kind, or as BREAKING, with the kind that it is to become.
//!
//! Image: a [`FileLockEntry`] of `filelocks.img` as for other locks ([`super::locks`]); `type` has [`BREAKING`] added to what a
//! lease that is being broken is to become.
//!
//! Order: all leases of all tasks are taken before any is broken again, since nobody gets a lease on a file while another
//! one is broken there. A lease is broken as it was, by opening the file without waiting; while that is done the open file
//! has no owner, so that nobody gets a signal twice. A dump opens no file that has a write lease: that would break it.
//!
//! Not kept: the time that is left until the kernel breaks a lease itself (it begins anew); what a lease was that is now broken to
//! nothing, which makes no difference; the one who waits in open(2). Refused: delegations, leases on files in memory,
//! write leases on deleted files and on files that are mapped too, which could not be taken again (EAGAIN): the mapping counts
//! as another open file.
//!
//! Man pages: fcntl(2), fcntl_locking(2), proc_sys_fs(5).

use standstill_images::proto::{FileLockEntry, FownEntry};

use super::locks::Held;
use super::{own, owner_of, RestoreFiles};
use crate::error::{At, Error, Place, Result};
use crate::plan::Plan;
use crate::sys::calls;
use std::os::fd::AsFd;

/// Of the type of an entry: somebody waits for the file.
pub(super) const BREAKING: u32 = 4;
const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const NONE: u32 = libc::F_UNLCK as u32;
const F_SETLEASE: i32 = 1024;

/// Is this the type of a lease?
pub(super) fn is_type(kind: u32) -> bool {
    matches!(kind & !BREAKING, READ | WRITE) || kind == BREAKING | NONE
}

fn is_breaking(e: &FileLockEntry) -> bool {
    e.r#type & BREAKING != 0
}

/// What a lease was before it was broken.
fn before(e: &FileLockEntry, flags: u32) -> u32 {
    match e.r#type & !BREAKING {
        kind if !is_breaking(e) => kind,
        NONE if flags & libc::O_ACCMODE as u32 == libc::O_RDONLY as u32 => READ,
        _ => WRITE,
    }
}

/// Takes leases, in a task that has all of its descriptors.
pub(super) fn take(held: &[Held], cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    for Held { entry, file } in held {
        let flags = cx.entry(*file)?.reg.as_ref().map_or(0, |reg| reg.flags);
        let kind = before(entry, flags);
        let what = format!("lease through descriptor {}", entry.fd);
        if cx.users.are_own() {
            // a file of somebody whom the namespace does not know can be leased with a capability outside of it only
            cx.leases.borrow_mut().push(Held { entry: FileLockEntry { r#type: kind, ..*entry }, file: *file });
            if is_breaking(entry) {
                plan.call(what, libc::SYS_fcntl, &[entry.fd.into(), libc::F_SETOWN.into(), 0.into()]);
            }
            continue;
        }
        plan.call(what.clone(), libc::SYS_fcntl, &[entry.fd.into(), F_SETLEASE.into(), kind.into()]);
        if is_breaking(entry) {
            plan.call(what, libc::SYS_fcntl, &[entry.fd.into(), libc::F_SETOWN.into(), 0.into()]);
        }
    }
    Ok(())
}

/// Takes those that tasks cannot: through the same open files, when nobody opens anything any more.
pub(super) fn take_for_tasks(cx: &RestoreFiles<'_>) -> Result<()> {
    for Held { entry, file } in cx.leases.take() {
        let fd = cx.opened.get(&file).ok_or(Error::Gone)?;
        calls::set_lease(fd.as_fd(), entry.r#type.cast_signed()).at(Place::File(file))?;
    }
    Ok(())
}

/// Breaks again those that were broken. When this is reached, all tasks have taken theirs.
pub(super) fn break_again(held: &[Held], cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    for Held { entry, file } in held.iter().filter(|held| is_breaking(&held.entry)) {
        let way = match entry.r#type & !BREAKING {
            READ => libc::O_RDONLY,
            _ => libc::O_WRONLY,
        };
        let path = plan.string(format!("/proc/self/fd/{}", entry.fd).as_bytes());
        let flags = way | libc::O_NONBLOCK | libc::O_CLOEXEC;
        let args = [libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()];
        let what = format!("breaking the lease through descriptor {}", entry.fd);
        plan.call_exact(what, libc::SYS_openat, &args, -i64::from(libc::EWOULDBLOCK));
        let owner: Option<&FownEntry> = owner_of(cx.entry(*file)?);
        own(owner.ok_or(Error::Gone)?, entry.fd, plan);
    }
    Ok(())
}
