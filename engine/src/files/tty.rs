//! Terminals: pairs of pseudoterminals, the terminal of a shell job, and terminals that the caller brings.
//!
//! An open terminal is three entries: a [`TtyFileEntry`] and a `REG` entry with its name and mode in `files.img`, and one
//! [`TtyInfoEntry`] a terminal in `tty-info.img`: modes, window, session, foreground group. The two sides of a pair have
//! infos of their own, numbered 2·index for the slave and 2·index+1 for the master. A terminal that was hung up has an
//! info without modes.
//!
//! Whose terminal a slave is, the kernel tells only those that have it; `/proc/PID/stat` of the tree tells as well.
//!
//! At restore the engine makes a pair when the first descriptor of either side is asked for, and opens all of them:
//! masters by `/dev/ptmx` until the number is the old one, slaves by TIOCGPTPEER. A slave whose master is not in the image
//! - comes from our standard input with `--shell-job`, opened anew, with modes and window of the image;
//! - gets a new pair whose master is handed to the RPC peer, where that asked for it ([`Restored::orphan_masters`]);
//! - is hung up again, where it was.
//!
//! A terminal that `--external tty[RDEV:DEV]` names at dump is what `--inherit-fd fd[N]:tty[RDEV:DEV]` gives at restore.
//!
//! A session's controlling terminal is for its leader to take: see [`controlling`] and [`take_control`].
//!
//! The console, virtual consoles and serial lines are opened by their names, and get their modes. `/dev/tty` is opened by
//! a task of the session ([`open_controlling`]), and the engine takes it from there.
//!
//! Not kept: a line that is being typed; what is under way on a line that is no pair.
//!
//! Man pages: pty(7), ioctl_tty(2), credentials(7).

mod control;
pub mod pair;
mod queue;
mod terminal;

pub use control::{
    controlling, open_controlling, opens_late, plan_controlling, set_foreground, take_control, Controlling,
};

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{major, minor, Mode, OFlags};
use standstill_images::proto::{
    FdTypes, FileEntry, PstreeEntry, RegFileEntry, TtyDataEntry, TtyFileEntry, TtyInfoEntry, TtyPtyEntry, TtyType,
};
use standstill_images::ImageKind;

use super::{magic_link, regular, set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::namespaces::user::Users;
use crate::plan::Plan;
use crate::proc::stat;
use crate::sys::calls;
use crate::tracee::Infected;

/// As CRIU: above are the numbers of terminals of other kinds.
const MOST: u32 = 1000;
/// Numbers of terminals that are no pairs, as CRIU has them; one of each.
const CONSOLE: u32 = 1002;
const VT: u32 = 1004;
const CONTROLLING: u32 = 1006;
const SERIAL: u32 = 1010;
/// Number of the first terminal from outside, less one.
const EXTERNAL: u32 = 1012;
/// Number of the first more of a kind, of which CRIU can have one.
const MORE: u32 = 1100;
/// O_LARGEFILE of the kernel, which libc has as 0.
const LARGE: u32 = 0x8000;
const OPEN_FLAGS: u32 = (libc::O_ACCMODE | libc::O_NONBLOCK | libc::O_APPEND) as u32 | LARGE;

/// What a dump remembers: infos in the order they were found, and a descriptor of each.
#[derive(Debug, Default)]
pub struct Dumped {
    infos: Vec<TtyInfoEntry>,
    copies: BTreeMap<u32, Held>,
    external: u32,
    simple: Vec<(u64, u32)>,
    data: Vec<TtyDataEntry>,
}

/// Who has a terminal open.
#[derive(Debug)]
struct Held {
    pid: i32,
    fd: i32,
    copy: OwnedFd,
}

impl Dumped {
    /// Reads what waits in the pairs whose masters this task holds; it stays there.
    pub fn read_queues(&mut self, host: &mut Infected<'_>) -> Result<()> {
        queue::read(host, self)
    }
}

/// What a restore remembers.
#[derive(Debug, Default)]
pub struct Restored {
    /// Masters of pairs that the RPC peer is to have (`orphan_pts_master`).
    pub orphan_masters: Vec<OwnedFd>,
    infos: HashMap<u32, TtyInfoEntry>,
    data: HashMap<u32, Vec<u8>>,
    root: Option<PstreeEntry>,
    /// Who opens `/dev/tty`, and as which descriptor, by file.
    openers: HashMap<u32, (i32, i32)>,
}

/// Owners are the tree's: from here on, ours.
pub fn translate(users: &Users, cx: &mut Restored) {
    for info in cx.infos.values_mut() {
        info.uid = info.uid.map(|uid| users.outer_user(uid));
        info.gid = info.gid.map(|gid| users.outer_group(gid));
    }
}

impl Dumped {
    /// The number of a terminal that is no pair.
    fn number(&mut self, usual: u32, device: u64) -> u32 {
        let known = self.simple.iter().position(|known| *known == (device, usual));
        let at = known.unwrap_or_else(|| {
            self.simple.push((device, usual));
            self.simple.len() - 1
        });
        let first = self.simple.iter().position(|(_, kind)| *kind == usual) == Some(at);
        if first {
            usual
        } else {
            MORE + u32::try_from(at).unwrap_or(0)
        }
    }
}

/// Is this device a terminal?
pub fn is_tty(rdev: u64) -> bool {
    matches!(major(rdev), 4 | 5 | 128..=143 | 188 | 204)
}

/// What a terminal is, by its device.
enum Kind {
    Master,
    Slave(u32),
    External,
    /// One that is opened by its name: the console, a virtual console, a serial line.
    Simple(TtyType, u32),
    /// `/dev/tty`: the terminal that the session of who opened it had.
    Controlling,
    Other(&'static str),
}

fn kind(d: &Descriptor, cx: &DumpFiles<'_>) -> Kind {
    let key = external_key(d.stat.st_rdev, d.stat.st_dev);
    if cx.opts.external_has(&key) || cx.opts.inherited_fd(&key).is_some() {
        return Kind::External;
    }
    match (major(d.stat.st_rdev), minor(d.stat.st_rdev)) {
        (5, 2) | (128..=135, _) => Kind::Master,
        (136, index) => Kind::Slave(index),
        (5, 0) => Kind::Controlling,
        (5, 1) => Kind::Simple(TtyType::Console, CONSOLE),
        (4, 0..=63) => Kind::Simple(TtyType::Vt, VT),
        (4 | 188 | 204, _) => Kind::Simple(TtyType::Serial, SERIAL),
        _ => Kind::Other("a terminal of an unknown kind"),
    }
}

fn external_key(rdev: u64, dev: u64) -> String {
    format!("tty[{rdev:x}:{dev:x}]")
}

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    let mut device = d.stat.st_rdev;
    let (index, kind, r#type) = match kind(d, cx) {
        Kind::Master => (terminal::index(d.copy.as_fd())?, 1, TtyType::Pty),
        Kind::Slave(index) => (index, 0, TtyType::Pty),
        Kind::External => {
            cx.ttys.external += 1;
            (EXTERNAL + cx.ttys.external, 0, TtyType::ExtTty)
        }
        Kind::Simple(kind, number) => (cx.ttys.number(number, device), 0, kind),
        Kind::Controlling => {
            device = terminal::device(d.copy.as_fd())?;
            (cx.ttys.number(CONTROLLING, device), 0, TtyType::Ctty)
        }
        Kind::Other(what) => return Err(d.refused(what, "close it before the dump, or name it by --external")),
    };
    if r#type == TtyType::Pty && index > MOST {
        return Err(
            d.refused("a terminal with a number above 1000", "run the program where terminals have lower numbers")
        );
    }
    let tty_info_id = index << 1 | kind;
    match cx.ttys.infos.iter().find(|info| info.id == tty_info_id) {
        Some(info) if info.dev != u32::try_from(d.stat.st_dev).ok() => {
            return Err(d.refused("a terminal with the number of another one", "run the program with one devpts only"));
        }
        Some(info) if info.termios.is_some() != terminal::modes(d.copy.as_fd())?.is_some() => {
            return Err(reused(index))
        }
        Some(_) => {}
        None => {
            let info = info(d, tty_info_id, index, r#type, device, &cx.tree)?;
            cx.ttys.infos.push(info);
            let copy = d.copy.try_clone().call("dup")?;
            cx.ttys.copies.insert(tty_info_id, Held { pid: d.pid, fd: d.fd, copy });
        }
    }
    let regf_id = (r#type != TtyType::ExtTty).then(|| cx.new_id());
    if let Some(id) = regf_id {
        let name = d.link.strip_suffix(b" (deleted)").unwrap_or(&d.link).to_vec();
        let reg = RegFileEntry {
            id,
            flags: d.flags,
            pos: 0,
            fown: d.fown,
            name,
            mode: Some(d.stat.st_mode),
            ..Default::default()
        };
        cx.add(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(reg), ..Default::default() });
    }
    let tty = TtyFileEntry { id, tty_info_id, flags: d.flags, fown: d.fown, regf_id };
    Ok(FileEntry { r#type: FdTypes::Tty as i32, id, tty: Some(tty), ..Default::default() })
}

/// A terminal was hung up, and its number given to another one.
fn reused(index: u32) -> Error {
    Error::refused(
        format!("a terminal that was hung up, beside a new one with the same number {index}"),
        "let the old one be closed",
    )
}

/// State of the terminal itself.
fn info(d: &Descriptor, id: u32, index: u32, r#type: TtyType, device: u64, tree: &[i32]) -> Result<TtyInfoEntry> {
    let tty = d.copy.as_fd();
    let number = |n: u64| {
        u32::try_from(n)
            .map_err(|_| d.refused("a terminal on a device with a large number", "the image format has no room for it"))
    };
    let mut info = TtyInfoEntry {
        id,
        r#type: r#type as i32,
        rdev: number(d.stat.st_rdev)?,
        dev: Some(number(d.stat.st_dev)?),
        uid: Some(d.stat.st_uid),
        gid: Some(d.stat.st_gid),
        pty: (r#type == TtyType::Pty).then_some(TtyPtyEntry { index }),
        ..Default::default()
    };
    info.termios = terminal::modes(tty)?;
    if info.termios.is_none() {
        return Ok(info);
    }
    info.termios_locked = Some(terminal::locked_modes(tty)?);
    info.winsize = Some(terminal::window(tty)?);
    info.exclusive = terminal::exclusive(tty)?;
    let (sid, pgrp) = if r#type == TtyType::Pty && id & 1 == 1 {
        info.packet_mode = terminal::packet_mode(tty)?;
        info.locked = terminal::locked(tty)?;
        (terminal::session(tty)?, terminal::foreground(tty)?)
    } else {
        owner(d.pid, device, tree)?
    };
    if r#type == TtyType::Ctty && sid == 0 {
        return Err(d.refused("/dev/tty of a terminal that no session has any more", "close it before the dump"));
    }
    (info.sid, info.pgrp) = (sid.unsigned_abs(), pgrp.unsigned_abs());
    Ok(info)
}

/// Session and foreground group of a slave, as the tasks that have it for their terminal say; zeros if none has.
fn owner(first: i32, device: u64, tree: &[i32]) -> Result<(i32, i32)> {
    let (major, minor) = (major(device), minor(device));
    let device = (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12);
    let mut text = Vec::new();
    for pid in std::iter::once(first).chain(tree.iter().copied()) {
        crate::proc::read_proc(format!("/proc/{pid}/stat").as_ref(), &mut text)
            .call("read(/proc/PID/stat)")
            .task(pid)?;
        let stat = stat::parse(&text)?;
        if stat.tty_nr as u32 == device {
            return Ok((stat.session, stat.tpgid.max(0)));
        }
    }
    Ok((0, 0))
}

/// Checks that all terminals have what they need, and writes `tty-info.img`.
pub fn finish(cx: &mut DumpFiles<'_>) -> Result<()> {
    let Dumped { infos, copies, data, .. } = std::mem::take(&mut cx.ttys);
    if infos.is_empty() {
        return Ok(());
    }
    if let Some(info) = infos.iter().find(|i| i.termios.is_none() && copies.contains_key(&(i.id ^ 1))) {
        return Err(reused(info.id >> 1));
    }
    let mut alone = 0;
    for info in infos.iter().filter(|info| info.termios.is_some()) {
        let leader = i32::try_from(info.sid).unwrap_or(0);
        if leader != 0 && !cx.tree.contains(&leader) && !cx.opts.shell_job {
            let fd = copies.get(&info.id).map_or(-1, |held| held.fd);
            let name = if info.id & 1 == 1 { "ptmx" } else { "pts" };
            let what = format!(
                "Found dangling tty with sid {} pgid {} ({name}) on peer fd {fd}: Task attached to shell terminal. Consider \
                 using --shell-job option. More details on http://criu.org/Simple_loop",
                info.sid, info.pgrp
            );
            return Err(Error::Usage { what });
        }
        let elsewhere = |other: &TtyInfoEntry| other.sid == info.sid && other.r#type() != TtyType::Ctty;
        if info.r#type() == TtyType::Ctty && cx.tree.contains(&leader) && !infos.iter().any(elsewhere) {
            let what = format!("/dev/tty of session {}, whose terminal nobody in the tree has open,", info.sid);
            return Err(Error::refused(
                what,
                "close it before the dump, or let the session leader keep its terminal open",
            ));
        }
        let Some(TtyPtyEntry { index }) = info.pty else { continue };
        let other = copies.get(&(info.id ^ 1));
        if info.id & 1 == 0 && other.is_none() {
            alone += 1;
            without_master(index, cx.opts.shell_job || cx.opts.orphan_pts_master, alone)?;
        }
    }
    if !data.is_empty() {
        cx.images.write_entries(ImageKind::TtyData, (), data)?;
    }
    let inner = |id: u32| cx.pids.unsigned(i32::try_from(id).unwrap_or(0));
    let infos = infos.into_iter().map(|info| TtyInfoEntry {
        sid: inner(info.sid),
        pgrp: inner(info.pgrp),
        uid: info.uid.map(|id| cx.users.user(id)),
        gid: info.gid.map(|id| cx.users.group(id)),
        ..info
    });
    Ok(cx.images.write_entries(ImageKind::TtyInfo, (), infos)?)
}

/// May this slave, the `count`th, be without a master?
fn without_master(index: u32, allowed: bool, count: usize) -> Result<()> {
    if !allowed {
        let what = format!("Found slave peer index {index} without correspond master peer; --shell-job lets the terminal of the caller take its place");
        return Err(Error::Usage { what });
    }
    if count > 1 {
        return Err(Error::Usage { what: format!("Only one slave external peer is allowed (index {index})") });
    }
    Ok(())
}

/// Reads `tty-info.img` and `tty-data.img`.
pub fn read(cx: &mut RestoreFiles<'_>) -> Result<()> {
    let lie = |what: String| Error::lie("tty-info.img", what);
    let mut infos = HashMap::new();
    for info in cx.images.read_entries_if_there::<TtyInfoEntry>(ImageKind::TtyInfo, ())? {
        let (id, pty) = (info.id, info.r#type() == TtyType::Pty);
        if pty != info.pty.is_some() || info.pty.is_some_and(|pty| pty.index > MOST || pty.index != id >> 1) {
            return Err(lie(format!("terminal {id} is of a type that does not fit its number")));
        }
        if info.termios.is_some() != info.termios_locked.is_some() || info.termios.is_some() != info.winsize.is_some() {
            return Err(lie(format!("terminal {id} has half of its state")));
        }
        if infos.insert(id, info).is_some() {
            return Err(lie(format!("terminal {id} is there twice")));
        }
    }
    for entry in cx.entries.values().filter_map(|e| e.tty.as_ref()) {
        if !infos.contains_key(&entry.tty_info_id) {
            return Err(lie(format!("terminal {} of file {:#x} is missing", entry.tty_info_id, entry.id)));
        }
    }
    if infos.is_empty() {
        return Ok(());
    }
    for data in cx.images.read_entries_if_there::<TtyDataEntry>(ImageKind::TtyData, ())? {
        if !infos.contains_key(&data.tty_id) {
            return Err(Error::lie("tty-data.img", format!("terminal {} is missing", data.tty_id)));
        }
        cx.ttys.data.insert(data.tty_id, data.data);
    }
    cx.ttys.root = cx.images.read_entries_if_there::<PstreeEntry>(ImageKind::Pstree, ())?.into_iter().next();
    let alone = infos.values().filter(|info| is_orphan(info, &infos));
    for (i, info) in alone.enumerate() {
        without_master(info.id >> 1, cx.opts.shell_job || cx.opts.orphan_pts_master, i + 1)?;
    }
    cx.ttys.infos = infos;
    Ok(())
}

/// A slave in use whose master is elsewhere?
fn is_orphan(info: &TtyInfoEntry, infos: &HashMap<u32, TtyInfoEntry>) -> bool {
    info.pty.is_some() && info.id & 1 == 0 && info.termios.is_some() && !infos.contains_key(&(info.id | 1))
}

/// Does the terminal of the caller take its place?
fn is_inherited(info: &TtyInfoEntry, cx: &RestoreFiles<'_>) -> bool {
    is_orphan(info, &cx.ttys.infos) && !cx.opts.orphan_pts_master
}

fn info_of(id: u32, cx: &RestoreFiles<'_>) -> Result<TtyInfoEntry> {
    cx.ttys.infos.get(&id).cloned().ok_or_else(|| Error::lie("tty-info.img", format!("terminal {id} is missing")))
}

/// Opens one, and all others of its pair.
pub fn open(e: &TtyFileEntry, cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let info = info_of(e.tty_info_id, cx)?;
    match info.r#type() {
        TtyType::Pty if is_inherited(&info, cx) => inherited(e, &info, libc::STDIN_FILENO),
        TtyType::Pty => {
            pair::open(info.id >> 1, cx).at(Place::Item("terminal", u64::from(info.id >> 1)))?;
            cx.opened.remove(&e.id).ok_or(Error::Gone)
        }
        TtyType::ExtTty => {
            let key = external_key(info.rdev.into(), info.dev.unwrap_or(0).into());
            let missing = || Error::Usage {
                what: format!("the terminal {key} comes from outside: give --inherit-fd fd[N]:{key}"),
            };
            let fd = calls::dup_number(cx.opts.inherited_fd(&key).ok_or_else(missing)?)?;
            settle(fd.as_fd(), &info)?;
            set_status_flags(fd.as_fd(), e.flags)?;
            Ok(fd)
        }
        TtyType::Console | TtyType::Vt | TtyType::Serial => {
            let missing = || Error::lie("files.img", format!("terminal {:#x} has no name", e.id));
            let reg = cx.entry(e.regf_id.ok_or_else(missing)?)?.reg.clone().ok_or_else(missing)?;
            let fd = regular::open_as(cx, &reg, e.flags & OPEN_FLAGS | libc::O_NOCTTY as u32)?;
            settle(fd.as_fd(), &info)?;
            set_status_flags(fd.as_fd(), e.flags)?;
            Ok(fd)
        }
        TtyType::Ctty => {
            let &(pid, number) = cx.ttys.openers.get(&e.id).ok_or(Error::Gone)?;
            let fd = calls::pidfd_getfd(calls::pidfd_open(cx.hosts.id(pid)?, 0)?.as_fd(), number)?;
            set_status_flags(fd.as_fd(), e.flags)?;
            Ok(fd)
        }
        TtyType::Unknown => Err(Error::lie("tty-info.img", format!("terminal {} is of no type", info.id))),
    }
}

/// Sets modes and window.
fn settle(tty: BorrowedFd<'_>, info: &TtyInfoEntry) -> Result<()> {
    if let Some(modes) = &info.termios_locked {
        terminal::set_locked_modes(tty, modes)?;
    }
    if let Some(modes) = &info.termios {
        terminal::set_modes(tty, modes)?;
    }
    if let Some(window) = &info.winsize {
        terminal::set_window(tty, window)?;
    }
    Ok(())
}

/// The caller's terminal in the place of a slave: opened anew, so that the shell keeps flags of its own.
fn inherited(e: &TtyFileEntry, info: &TtyInfoEntry, number: i32) -> Result<OwnedFd> {
    let ours = calls::dup_number(number)?;
    if !rustix::termios::isatty(&ours) {
        let what = "Don't have tty to inherit session from, aborting: the standard input is no terminal".to_owned();
        return Err(Error::Usage { what });
    }
    let flags = OFlags::from_bits_retain(e.flags & OPEN_FLAGS) | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = match rustix::fs::open(magic_link(ours.as_fd()), flags, Mode::empty()) {
        Ok(fd) => fd,
        // Somebody else's terminal, as after su(1): share the open file, as CRIU always does.
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::NXIO | rustix::io::Errno::IO) => ours,
        Err(e) => return Err(e).call("open(/proc/self/fd/0)"),
    };
    settle(fd.as_fd(), info)?;
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Makes the group of the root task the foreground group of a terminal that was inherited.
pub fn in_task(e: &TtyFileEntry, fd: i32, cx: &RestoreFiles<'_>, plan: &mut Plan) -> Result<()> {
    let info = info_of(e.tty_info_id, cx)?;
    let Some(root) = cx.ttys.root.as_ref().filter(|root| root.sid != root.pid) else { return Ok(()) };
    if is_inherited(&info, cx) {
        let ours = nix::unistd::getpgrp().as_raw().unsigned_abs();
        let group = plan.bytes(&if root.pgid == root.pid { root.pgid } else { ours }.to_ne_bytes());
        let args = [fd.into(), terminal::TIOCSPGRP.into(), group.into()];
        // ENOTTY: a terminal, but not the one of our session
        plan.call_or("foreground group of the terminal", libc::SYS_ioctl, &args, [libc::ENOTTY, libc::ENOTTY]);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
