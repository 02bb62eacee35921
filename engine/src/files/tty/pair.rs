//! Making a terminal pair again: both sides, with the number it had.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{fchmod, fchown, Gid, Mode, OFlags, Uid};
use standstill_images::proto::{TtyFileEntry, TtyInfoEntry};

use super::super::paths::open_below;
use super::super::{set_status_flags, RestoreFiles};
use super::{settle, terminal, OPEN_FLAGS};
use crate::error::{At, Call, Error, Place, Result};
use crate::sys::calls;

/// Makes pair `index`, and opens all that the image has of it.
pub(super) fn open(index: u32, cx: &mut RestoreFiles<'_>) -> Result<()> {
    let side = |id: u32| {
        let mut list: Vec<TtyFileEntry> =
            cx.entries.values().filter_map(|e| e.tty).filter(|e| e.tty_info_id == id).collect();
        list.sort_by_key(|e| e.id);
        list
    };
    let (masters, slaves) = (side(index << 1 | 1), side(index << 1));
    if masters.len() > 1 {
        return Err(Error::lie("files.img", format!("terminal {index} has {} masters", masters.len())));
    }
    let entry = masters.first();
    let (flags, name) = (entry.map_or(libc::O_RDWR as u32, |e| e.flags), name(entry, &slaves, cx)?);
    let master = match &mut cx.mounts {
        Some(made) => {
            let beside = open_below(made.root()?, &name, libc::O_PATH as u32).call("open")?;
            match made.terminals.take(index, beside.as_fd())? {
                Some(master) => master,
                None => make_master(index, flags, &name, made.root()?)?,
            }
        }
        None => make_master(index, flags, &name, rustix::fs::CWD)?,
    };
    terminal::lock(master.as_fd(), false)?;
    let (master_info, slave_info) = (cx.ttys.infos.get(&(index << 1 | 1)), cx.ttys.infos.get(&(index << 1)));
    let open_slave = |flags: u32| {
        calls::open_pty_peer(master.as_fd(), flags & OPEN_FLAGS | (libc::O_NOCTTY | libc::O_CLOEXEC) as u32)
    };
    let mut opened = Vec::new();
    for slave in &slaves {
        opened.push((slave.id, open_slave(slave.flags)?));
    }
    if let (Some((_, slave)), Some(info)) = (opened.first(), slave_info) {
        let mode = slaves[0].regf_id.and_then(|id| cx.entries.get(&id)?.reg.as_ref()?.mode);
        belongs(slave.as_fd(), info, mode)?;
    }
    if let Some(data) =
        [index << 1, index << 1 | 1].iter().any(|id| cx.ttys.data.contains_key(id)).then_some(&cx.ttys.data)
    {
        let slave = open_slave(libc::O_RDWR as u32)?;
        terminal::set_modes(master.as_fd(), &terminal::raw_modes())?;
        // What was read from one side had been written to the other.
        under_way(slave.as_fd(), master.as_fd(), data.get(&(index << 1 | 1)))?;
        if let Some(modes) = slave_info.and_then(|info| info.termios.as_ref()) {
            terminal::set_lines_alone(master.as_fd(), modes)?;
        }
        under_way(master.as_fd(), slave.as_fd(), data.get(&(index << 1)))?;
    }
    for info in [slave_info, master_info].into_iter().flatten() {
        settle(master.as_fd(), info)?;
    }
    for ((_, fd), slave) in opened.iter().zip(&slaves) {
        set_status_flags(fd.as_fd(), slave.flags)?;
    }
    if slave_info.is_some_and(|info| info.exclusive) {
        if let Some((_, slave)) = opened.first() {
            terminal::set_exclusive(slave.as_fd())?;
        }
    }
    let hung_up = master_info.is_none() && slave_info.is_some_and(|info| info.termios.is_none());
    if let Some(info) = master_info {
        if info.packet_mode {
            terminal::set_packet_mode(master.as_fd())?;
        }
        if info.exclusive {
            terminal::set_exclusive(master.as_fd())?;
        }
        if info.locked {
            terminal::lock(master.as_fd(), true)?;
        }
    }
    cx.opened.extend(opened);
    match entry {
        Some(e) => {
            set_status_flags(master.as_fd(), e.flags)?;
            cx.opened.insert(e.id, master);
        }
        // Closing its master hangs a slave up.
        None if hung_up => {}
        None => cx.ttys.orphan_masters.push(master),
    }
    Ok(())
}

/// By which name masters are made: the old one, or the one beside the slave's.
fn name(master: Option<&TtyFileEntry>, slaves: &[TtyFileEntry], cx: &RestoreFiles<'_>) -> Result<Vec<u8>> {
    let name = |e: &TtyFileEntry| Some(cx.entries.get(&e.regf_id?)?.reg.as_ref()?.name.clone());
    if let Some(name) = master.and_then(name) {
        return Ok(name);
    }
    let beside = slaves.first().and_then(name).and_then(|name| {
        let folder = name.rsplitn(2, |&b| b == b'/').nth(1)?;
        Some([folder, b"/ptmx"].concat())
    });
    let is_there = |name: &Vec<u8>| match &cx.mounts {
        Some(made) => made.root().is_ok_and(|root| open_below(root, name, libc::O_PATH as u32).is_ok()),
        None => Path::new(std::ffi::OsStr::from_bytes(name)).exists(),
    };
    Ok(beside.filter(is_there).unwrap_or_else(|| b"/dev/ptmx".to_vec()))
}

/// Opens `name` until the pair has the right number: the kernel gives the lowest that is free.
pub fn make_master(index: u32, flags: u32, name: &[u8], root: BorrowedFd<'_>) -> Result<OwnedFd> {
    let flags = OFlags::from_bits_retain(flags & OPEN_FLAGS) | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut lower = Vec::new();
    loop {
        let place = || Place::Path(std::ffi::OsStr::from_bytes(name).into());
        let master = if root.as_raw_fd() == libc::AT_FDCWD {
            rustix::fs::open(name, flags, Mode::empty())
        } else {
            open_below(root, name, flags.bits())
        };
        let master = master.call("open").at(place())?;
        let got = terminal::index(master.as_fd()).at(place())?;
        if got == index {
            return Ok(master);
        }
        if got > index {
            let what = format!("terminal {index} is in use: close it, or restore with a devpts of its own");
            return Err(Error::Changed { what });
        }
        lower.push(master);
    }
}

/// Owner and mode of a slave's name.
fn belongs(slave: BorrowedFd<'_>, info: &TtyInfoEntry, mode: Option<u32>) -> Result<()> {
    let now = rustix::fs::fstat(slave).call("fstat")?;
    if let (Some(uid), Some(gid)) = (info.uid, info.gid) {
        if (uid, gid) != (now.st_uid, now.st_gid) {
            fchown(slave, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid))).call("fchown")?;
        }
    }
    match mode {
        Some(mode) if mode & 0o7777 != now.st_mode & 0o7777 => {
            fchmod(slave, Mode::from_raw_mode(mode & 0o7777)).call("fchmod")
        }
        _ => Ok(()),
    }
}

/// Puts bytes back that were under way, into `side`, and sees them arrive at `other`: the kernel carries them over in its own
/// time, and with the modes that the terminal has then. It promises no delivery: what does not fit is named, and lost.
fn under_way(side: BorrowedFd<'_>, other: BorrowedFd<'_>, bytes: Option<&Vec<u8>>) -> Result<()> {
    let Some(bytes) = bytes else { return Ok(()) };
    let before = rustix::fs::fcntl_getfl(side).call("fcntl(F_GETFL)")?;
    rustix::fs::fcntl_setfl(side, before | OFlags::NONBLOCK).call("fcntl(F_SETFL)")?;
    let mut rest = bytes.as_slice();
    while let Some(n) = rustix::io::write(side, rest).ok().filter(|&n| n > 0) {
        rest = &rest[n..];
    }
    if !rest.is_empty() {
        tracing::warn!(lost = rest.len(), "data under way in a terminal did not fit");
    }
    let written = (bytes.len() - rest.len()) as u64;
    // has the kernel carry over what it has not begun with; the end of what is no whole line yet is not counted
    let mut poll = [rustix::event::PollFd::from_borrowed_fd(other, rustix::event::PollFlags::IN)];
    let _ = rustix::event::poll(&mut poll, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }));
    let began = std::time::Instant::now();
    while rustix::io::ioctl_fionread(other).call("ioctl(FIONREAD)")? < written {
        if began.elapsed() > std::time::Duration::from_millis(5) {
            break;
        }
        std::thread::sleep(std::time::Duration::from_micros(100));
    }
    rustix::fs::fcntl_setfl(side, before).call("fcntl(F_SETFL)")
}
