//! Sessions and the terminals that control them.

use std::os::fd::OwnedFd;

use standstill_images::proto::{TtyInfoEntry, TtyType};

use super::super::RestoreFiles;
use super::{is_inherited, terminal, OPEN_FLAGS};
use crate::error::{Call, Error, Result};
use crate::plan::Plan;
use crate::sys::calls;

/// The terminal that a session has.
#[derive(Debug)]
pub struct Controlling {
    /// A descriptor of it.
    pub terminal: OwnedFd,
    /// Its foreground group; 0 for none.
    pub foreground: u32,
}

/// The terminal of the session that task `leader` of the image leads, if there is one to take.
pub fn controlling(leader: u32, cx: &mut RestoreFiles<'_>) -> Result<Option<Controlling>> {
    let mut of_session: Vec<&TtyInfoEntry> = cx
        .ttys
        .infos
        .values()
        .filter(|i| i.sid == leader && leader != 0 && i.termios.is_some() && i.r#type() != TtyType::Ctty)
        .collect();
    // slaves first
    of_session.sort_by_key(|info| (info.id & 1, info.id));
    let Some(info) = of_session.into_iter().find(|info| !is_inherited(info, cx)).cloned() else { return Ok(None) };
    let entry = cx.entries.values().filter_map(|e| e.tty).filter(|e| e.tty_info_id == info.id).min_by_key(|e| e.id);
    let Some(entry) = entry else { return Ok(None) };
    let fd = cx.open(entry.id)?;
    let terminal = if info.id & 1 == 1 && info.pty.is_some() {
        calls::open_pty_peer(fd, (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u32)?
    } else {
        fd.try_clone_to_owned().call("dup")?
    };
    Ok(Some(Controlling { terminal, foreground: info.pgrp }))
}

/// Lets a session leader take the terminal that it has as `fd`. Only who is cloned afterwards has it, too.
pub fn take_control(fd: i32, plan: &mut Plan) {
    plan.call("taking the controlling terminal", libc::SYS_ioctl, &[fd.into(), terminal::TIOCSCTTY.into(), 0.into()]);
}

/// Sets the foreground group of a terminal, once all groups are there.
pub fn set_foreground(fd: i32, foreground: u32, plan: &mut Plan) {
    if foreground != 0 {
        let group = plan.bytes(&foreground.to_ne_bytes());
        let args = [fd.into(), terminal::TIOCSPGRP.into(), group.into()];
        // a group that has no member left
        plan.call_or("foreground group of the terminal", libc::SYS_ioctl, &args, [libc::ESRCH, libc::ESRCH]);
    }
}

/// True for `/dev/tty`, which only a task of the session can open.
pub fn opens_late(id: u32, cx: &RestoreFiles<'_>) -> bool {
    let info = cx.entries.get(&id).and_then(|e| e.tty.as_ref()).and_then(|e| cx.ttys.infos.get(&e.tty_info_id));
    info.is_some_and(|info| info.r#type() == TtyType::Ctty)
}

/// Says who opens `/dev/tty`, as descriptors from `number` on: a task of the session, which `member` finds.
pub fn plan_controlling(
    ids: &[u32],
    mut number: i32,
    member: impl Fn(u32) -> Option<i32>,
    cx: &mut RestoreFiles<'_>,
) -> Result<()> {
    for &id in ids.iter().filter(|&&id| opens_late(id, cx)).collect::<Vec<_>>() {
        let info = cx.entry(id)?.tty.as_ref().and_then(|e| cx.ttys.infos.get(&e.tty_info_id)).ok_or(Error::Gone)?;
        let pid = member(info.sid).ok_or_else(|| {
            Error::lie("tty-info.img", format!("/dev/tty of session {}, which nobody is in", info.sid))
        })?;
        cx.ttys.openers.insert(id, (pid, number));
        number += 1;
    }
    Ok(())
}

/// Opens in task `pid` what it is to open for others: before the engine takes it.
pub fn open_controlling(pid: i32, cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    let mut all: Vec<_> = cx.ttys.openers.iter().filter(|(_, (opener, _))| *opener == pid).collect();
    all.sort_unstable();
    for (&id, &(_, number)) in all {
        let entry = cx.entry(id)?.tty.as_ref().ok_or(Error::Gone)?;
        let flags = entry.flags & OPEN_FLAGS | (libc::O_NOCTTY | libc::O_CLOEXEC) as u32;
        let path = plan.string(b"/dev/tty");
        let args = [libc::AT_FDCWD.into(), path.into(), flags.into(), 0.into()];
        let fd = plan.call("/dev/tty", libc::SYS_openat, &args);
        let args = [fd.into(), number.into(), libc::O_CLOEXEC.into()];
        plan.call_exact("/dev/tty", libc::SYS_dup3, &args, number.into());
        plan.call("/dev/tty", libc::SYS_close, &[fd.into()]);
    }
    Ok(())
}
