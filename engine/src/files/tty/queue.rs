//! Data under way in a terminal pair that the tree has both sides of.
//!
//! A terminal has no way to look at what waits in it: it must be read, and written again from the other side. So that is
//! done inside the task that holds the master, by one plan, whose second half runs even if the engine is gone by then:
//! modes that change nothing (no echo, no signals, no editing), read, modes in which lines end as they ended, write, the
//! modes that were. All tasks stand still, so nobody else has a part in it. A poll(2) of a side for which nothing has
//! arrived lets the kernel carry over what was written.
//!
//! Not kept: half a line, if nothing else waits; an end of file (^D) that waits in the queue; which part of the data had been pushed by a change of modes.
//! Refused: more data than fits into some reads, and a master whose holder is in the background of that very terminal, since
//! such a task may not read.

use standstill_images::proto::TtyDataEntry;
use standstill_restorer::plan::{Code, Expect};

use super::{terminal, Dumped};
use crate::error::{At, Call, Error, Place, Result};
use crate::plan::{Arg, At as Op, Data, Plan};
use crate::tracee::Infected;

/// Bytes of one read: a terminal's buffer has as many.
const PART: usize = 4096;
/// Reads of one side.
const PARTS: usize = 3;
const TIOCGPTPEER: u64 = 0x5441;
/// How long the kernel may take to carry on with what a poll(2) saw half of.
const SETTLE: u64 = 2_000_000;

/// What is read from one side.
struct Side {
    id: u32,
    reads: Vec<(Op, Data)>,
}

/// Reads what waits in the pairs whose masters this task holds.
pub(super) fn read(host: &mut Infected<'_>, ttys: &mut Dumped) -> Result<()> {
    let pid = host.pid();
    let masters: Vec<(u32, i32)> = ttys
        .copies
        .iter()
        .filter(|(id, held)| *id & 1 == 1 && held.pid == pid && ttys.copies.contains_key(&(*id ^ 1)))
        .map(|(&id, held)| (id, held.fd))
        .collect();
    for (id, fd) in masters {
        read_pair(host, ttys, id, fd).at(Place::Item("terminal", u64::from(id >> 1)))?;
    }
    Ok(())
}

fn read_pair(host: &mut Infected<'_>, ttys: &mut Dumped, id: u32, fd: i32) -> Result<()> {
    let info = |id: u32| ttys.infos.iter().find(|info| info.id == id);
    let held = ttys.copies.get(&id).ok_or(Error::Gone)?;
    let (Some(master), Some(slave)) = (info(id), info(id ^ 1)) else { return Ok(()) };
    let Some(modes) = &slave.termios else { return Ok(()) };
    let waiting = rustix::io::ioctl_fionread(&held.copy).call("ioctl(FIONREAD)")?;
    let other = ttys.copies.get(&(id ^ 1)).ok_or(Error::Gone)?;
    if waiting == 0 && rustix::io::ioctl_fionread(&other.copy).call("ioctl(FIONREAD)")? == 0 {
        return Ok(());
    }
    let mut plan = Plan::new();
    let raw = plan.bytes(&terminal::all_bytes(modes)?);
    let lines = plan.bytes(&terminal::lines_alone(modes)?);
    let old = plan.bytes(&terminal::encode(modes)?);
    let (off, on) = (plan.bytes(&0u32.to_ne_bytes()), plan.bytes(&1u32.to_ne_bytes()));
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC | libc::O_NONBLOCK;
    let what = "data under way in a terminal";
    let peer = plan.call(what, libc::SYS_ioctl, &[fd.into(), TIOCGPTPEER.into(), flags.into()]);
    let set = |plan: &mut Plan, request: u64, value: Data| {
        plan.always(what, libc::SYS_ioctl, &[fd.into(), request.into(), value.into()]);
    };
    plan.call(what, libc::SYS_ioctl, &[fd.into(), terminal::TCSETS.into(), raw.into()]);
    if master.packet_mode {
        set(&mut plan, terminal::TIOCPKT, off);
    }
    let from_slave = reads(id ^ 1, peer.into(), PARTS, &mut plan);
    // the master is not opened anew: no read that could wait
    let parts = usize::try_from(waiting).unwrap_or(0).div_ceil(PART).min(PARTS);
    let from_master = reads(id, fd.into(), parts, &mut plan);
    // what came from the master had been written by the slave
    writes(&from_master, peer.into(), &mut plan);
    arrive(fd.into(), &mut plan);
    set(&mut plan, terminal::TCSETS, lines);
    writes(&from_slave, fd.into(), &mut plan);
    arrive(peer.into(), &mut plan);
    set(&mut plan, terminal::TCSETS, old);
    if master.packet_mode {
        set(&mut plan, terminal::TIOCPKT, on);
    }
    plan.always(what, libc::SYS_close, &[peer.into()]);
    let mut plans = vec![plan];
    plans.resize_with(host.threads().len(), Plan::new);
    host.start(plans)?;
    let answers = host.finish()?;
    let answers = answers.first().ok_or(Error::Gone)?;
    for side in [from_slave, from_master] {
        let mut data = Vec::new();
        for (op, room) in &side.reads {
            let result = answers.result(*op);
            match usize::try_from(result) {
                Ok(n) => data.extend_from_slice(answers.bytes(*room).get(..n).ok_or(Error::Gone)?),
                Err(_) if result == -i64::from(libc::EAGAIN) => break,
                Err(_) => {
                    let errno = i32::try_from(-result).unwrap_or(libc::EIO);
                    let source = std::io::Error::from_raw_os_error(errno);
                    return Err(Error::Plan { operation: what.into(), call: "read", source });
                }
            }
        }
        if data.len() >= PART * (PARTS - 1) {
            let what = format!("{} bytes and more {what}", data.len());
            return Err(Error::refused(what, "dump once more, when they have been read"));
        }
        if !data.is_empty() {
            ttys.data.push(TtyDataEntry { tty_id: side.id, data });
        }
    }
    Ok(())
}

fn reads(id: u32, fd: Arg, parts: usize, plan: &mut Plan) -> Side {
    let reads = (0..parts).map(|n| {
        if n > 0 {
            arrive(fd, plan);
        }
        let room = plan.room(PART);
        (plan.ask("data under way in a terminal", libc::SYS_read, &[fd, room.into(), PART.into()]), room)
    });
    Side { id, reads: reads.collect() }
}

/// A read that failed makes a write of an impossible length, which does nothing.
fn writes(side: &Side, to: Arg, plan: &mut Plan) {
    for (op, room) in &side.reads {
        plan.always("data under way in a terminal", libc::SYS_write, &[to, (*room).into(), (*op).into()]);
    }
}

/// Has the kernel carry over what was written to the other side of `fd`.
fn arrive(fd: Arg, plan: &mut Plan) {
    // struct pollfd: the descriptor, then POLLIN
    let poll = plan.room(16);
    plan.op(Code::Store, 0, &[poll.into(), fd], Expect::Any, [0; 2], "descriptor");
    plan.even_if_orphaned();
    let events = u32::from(libc::POLLIN.unsigned_abs());
    plan.op(Code::Store, 0, &[Arg::Data(poll.offset + 4), events.into()], Expect::Any, [0; 2], "events");
    plan.even_if_orphaned();
    let at_once = plan.words(&[0, 0]);
    let moment = plan.words(&[0, SETTLE]);
    plan.always("arrival of data", libc::SYS_ppoll, &[poll.into(), 1.into(), at_once.into(), 0.into(), 8.into()]);
    plan.always("arrival of data", libc::SYS_nanosleep, &[moment.into(), 0.into()]);
}
