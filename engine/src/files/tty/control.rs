//! Sessions and the terminals that control them.

use std::os::fd::OwnedFd;

use standstill_images::proto::TtyInfoEntry;

use super::super::RestoreFiles;
use super::{is_inherited, terminal};
use crate::error::{Call, Result};
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
    let mut of_session: Vec<&TtyInfoEntry> =
        cx.ttys.infos.values().filter(|i| i.sid == leader && leader != 0 && i.termios.is_some()).collect();
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

/// Lets a session leader take the terminal that it has as `fd`, once all process groups of its session are there.
pub fn take_control(fd: i32, foreground: u32, plan: &mut Plan) {
    plan.call("taking the controlling terminal", libc::SYS_ioctl, &[fd.into(), terminal::TIOCSCTTY.into(), 0.into()]);
    if foreground != 0 {
        let group = plan.bytes(&foreground.to_ne_bytes());
        let args = [fd.into(), terminal::TIOCSPGRP.into(), group.into()];
        // a group that has no member left
        plan.call_or("foreground group of the terminal", libc::SYS_ioctl, &args, [libc::ESRCH, libc::ESRCH]);
    }
}
