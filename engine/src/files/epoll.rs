//! epoll(7): which files a program waits for.
//!
//! An epoll remembers each file together with the number under which it was added, also when that number is closed or
//! has become another file. `fdinfo` lists numbers, events and data; whether a number still means the same file only
//! kcmp(2) can say (KCMP_EPOLL_TFD). Where it does not, another number of the same task that does is written instead; a
//! file that the task has no number for any more cannot be added again, and is refused. An [`EventpollFileEntry`] of
//! `files.img` is one epoll with all that it watches.
//!
//! The engine makes the epoll, empty. Adding is left to the first task that has it, once all of its descriptors are in
//! place, since numbers count, and a signalfd waits for the signals of whoever adds it.
//!
//! A one-shot that has fired shows no events. The kernel lets none be added so: it waits for errors and hang-ups at least.
//! Those are added first, and what is ready by then is taken out, which puts them to rest again.
//!
//! Not kept: what was ready is found anew (an edge that was taken already is reported once more, as with CRIU), a one-shot
//! at rest may report an error or hang-up that comes later. Busy polling is refused.
//!
//! Man pages: epoll(7), epoll_ctl(2), kcmp(2), ioctl_eventpoll(2).

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use standstill_images::proto::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry};

use super::{set_status_flags, Descriptor, DumpFiles, RestoreFiles};
use crate::error::{At, Call, Error, Place, Result};
use crate::plan::Plan;
use crate::proc::fdinfo::{EpollTarget, FdDetail};
use crate::sys::calls;

/// Events that say how to report, not what.
const HOW: u32 = (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;

/// Dumps one.
pub fn dump(d: &Descriptor, id: u32, cx: &mut DumpFiles<'_>) -> Result<FileEntry> {
    refuse_busy_polling(d)?;
    let targets: &[EpollTarget] = match &d.info.detail {
        FdDetail::Epoll(targets) => targets,
        _ => &[],
    };
    let sent = d.in_flight() && !cx.tree.contains(&d.pid);
    let numbers = if sent { resolve_in_flight(d, targets, &cx.tree)? } else { resolve(d, targets)? };
    let tfd = targets.iter().zip(numbers).map(|(target, tfd)| EventpollTfdEntry {
        id: 0,
        tfd: tfd.unsigned_abs(),
        events: target.events,
        data: target.data,
        dev: Some(target.sdev),
        inode: Some(target.ino),
        pos: Some(target.pos as u64),
    });
    let epfd = EventpollFileEntry { id, flags: d.flags, fown: d.fown, tfd: tfd.collect() };
    Ok(FileEntry { r#type: FdTypes::Eventpoll as i32, id, epfd: Some(epfd), ..Default::default() })
}

/// The number in the task for each target: the one it was added with if that is still the same file.
fn resolve(d: &Descriptor, targets: &[EpollTarget]) -> Result<Vec<i32>> {
    let mut numbers: Vec<Option<i32>> = Vec::with_capacity(targets.len());
    for (i, target) in targets.iter().enumerate() {
        numbers.push(is_target(d, d.pid, target.tfd, targets, i)?.then_some(target.tfd));
    }
    let mut taken: HashSet<i32> = numbers.iter().flatten().copied().collect();
    let mut open: Option<Vec<i32>> = None;
    for (i, target) in targets.iter().enumerate() {
        if numbers[i].is_some() {
            continue;
        }
        if open.is_none() {
            open = Some(open_numbers(d.pid)?);
        }
        for &fd in open.iter().flatten() {
            if !taken.contains(&fd) && is_target(d, d.pid, fd, targets, i)? {
                taken.insert(fd);
                numbers[i] = Some(fd);
                break;
            }
        }
        if numbers[i].is_none() {
            let what = format!(
                "an epoll that waits for a file which was descriptor {} of task {}, and is not open there now",
                target.tfd, d.pid
            );
            return Err(Error::refused(what, "let the program remove it from the epoll before it closes it"))
                .at(Place::Fd(d.fd));
        }
    }
    Ok(numbers.into_iter().flatten().collect())
}

/// The same for an epoll that was sent away and not received yet: any task of the tree may have its targets, which must have
/// the numbers still that they were added with.
fn resolve_in_flight(d: &Descriptor, targets: &[EpollTarget], tree: &[i32]) -> Result<Vec<i32>> {
    for (i, target) in targets.iter().enumerate() {
        let mut found = false;
        for &pid in tree {
            found = found || is_target(d, pid, target.tfd, targets, i)?;
        }
        if !found {
            let what = format!("an epoll in flight that waits for descriptor {}, which no task has now", target.tfd);
            return Err(Error::refused(what, "let the program receive it before the dump"));
        }
    }
    Ok(targets.iter().map(|target| target.tfd).collect())
}

/// Is `fd` of a task what the epoll has as its `i`th target?
fn is_target(d: &Descriptor, pid: i32, fd: i32, targets: &[EpollTarget], i: usize) -> Result<bool> {
    let tfd = targets[i].tfd;
    let before = targets[..i].iter().filter(|t| t.tfd == tfd).count();
    match calls::same_epoll_target((pid, fd), (d.pid, d.fd), tfd, u32::try_from(before).unwrap_or(u32::MAX)) {
        // The number is closed, or the task is dead.
        Err(e) if [libc::EBADF, libc::ESRCH].contains(&e.errno()) => Ok(false),
        other => other,
    }
}

/// Numbers that a task has open.
fn open_numbers(pid: i32) -> Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).call("readdir(/proc/PID/fd)")? {
        let name = entry.call("readdir(/proc/PID/fd)")?.file_name();
        numbers.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

/// Settings of busy polling (Linux 6.9) have no place in the entry.
fn refuse_busy_polling(d: &Descriptor) -> Result<()> {
    const EPIOCGPARAMS: u64 = 0x8008_8a02;
    let mut params = [0; 8];
    if calls::ioctl(d.copy.as_fd(), "ioctl(EPIOCGPARAMS)", EPIOCGPARAMS, &mut params).is_ok() && params != [0; 8] {
        return Err(d.refused("an epoll with busy polling", "set its EPIOCSPARAMS back to zero before the dump"));
    }
    Ok(())
}

/// Opens one, empty.
pub fn open(e: &EventpollFileEntry, _cx: &mut RestoreFiles<'_>) -> Result<OwnedFd> {
    let fd = epoll::create(epoll::CreateFlags::CLOEXEC).call("epoll_create1")?;
    set_status_flags(fd.as_fd(), e.flags)?;
    Ok(fd)
}

/// Adds what an epoll in flight watches. No task has it; but a thread with descriptors of its own can have its targets at the
/// numbers that count, and an epoll waits for files, not for numbers.
pub fn in_flight(e: &EventpollFileEntry, fd: BorrowedFd<'_>, targets: &[BorrowedFd<'_>]) -> Result<()> {
    let numbers = e.tfd.iter().map(|t| i32::try_from(t.tfd)).collect::<Result<Vec<_>, _>>();
    let numbers = numbers.map_err(|_| Error::lie("files.img", "an epoll watches a descriptor past all numbers"))?;
    let most = numbers.iter().copied().max().unwrap_or(0);
    let add = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES).call("unshare(CLONE_FILES)")?;
        // out of the way of numbers that are about to be taken
        let epoll = calls::dup_above(fd, most)?;
        let files = targets.iter().map(|&t| calls::dup_above(t, most)).collect::<Result<Vec<_>>>()?;
        for ((target, file), &number) in e.tfd.iter().zip(&files).zip(&numbers) {
            calls::epoll_add_as(epoll.as_fd(), file.as_fd(), number, target.events, target.data)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| scope.spawn(add).join().unwrap_or(Err(Error::Gone)))
}

/// Adds what it watches, by the task's own numbers.
pub fn in_task(e: &EventpollFileEntry, fd: i32, plan: &mut Plan) -> Result<()> {
    let fired = |t: &&EventpollTfdEntry| t.events & libc::EPOLLONESHOT as u32 != 0 && t.events & !HOW == 0;
    let at_rest: Vec<_> = e.tfd.iter().filter(fired).collect();
    for target in &at_rest {
        add(target, fd, plan)?;
    }
    if !at_rest.is_empty() {
        let events = plan.room(at_rest.len() * 12);
        let wait = [fd.into(), events.into(), at_rest.len().into(), 0.into(), 0.into(), 8.into()];
        plan.call("one-shots of an epoll that have fired", libc::SYS_epoll_pwait, &wait);
    }
    e.tfd.iter().filter(|t| !fired(t)).try_for_each(|target| add(target, fd, plan))
}

fn add(target: &EventpollTfdEntry, fd: i32, plan: &mut Plan) -> Result<()> {
    let tfd = i32::try_from(target.tfd)
        .map_err(|_| Error::lie("files.img", format!("an epoll watches descriptor {}", target.tfd)))?;
    // struct epoll_event is packed on x86-64
    let event = plan.bytes(&[&target.events.to_ne_bytes()[..], &target.data.to_ne_bytes()].concat());
    let args = [fd.into(), libc::EPOLL_CTL_ADD.into(), tfd.into(), event.into()];
    plan.call(format!("adding descriptor {tfd} to an epoll"), libc::SYS_epoll_ctl, &args);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use rustix::event::epoll::{EventData, EventFlags};
    use rustix::event::{eventfd, EventfdFlags};
    use rustix::pipe::PipeFlags;

    use super::super::testing::{descriptor, dump, in_task, open};
    use super::*;
    use crate::options::Options;

    /// Dumps, and restores beside the original: the numbers are still those of this process.
    fn restored(fd: &OwnedFd) -> OwnedFd {
        let opts = Options::default();
        let (images, ids) = dump(&opts, &[fd]).unwrap();
        let mut files = RestoreFiles::read(&opts, &images).unwrap();
        let again = open(&mut files, ids[0]);
        in_task(&files, ids[0], &again);
        again
    }

    fn targets(fd: &OwnedFd) -> Vec<(i32, u32, u64)> {
        let FdDetail::Epoll(targets) = descriptor(fd).info.detail else { return Vec::new() };
        let mut list: Vec<_> = targets.iter().map(|t| (t.tfd, t.events, t.data)).collect();
        list.sort_unstable();
        list
    }

    fn ready(fd: &OwnedFd) -> Vec<u64> {
        let mut events = Vec::with_capacity(8);
        epoll::wait(fd, rustix::buffer::spare_capacity(&mut events), Some(&rustix::event::Timespec::default()))
            .unwrap();
        events.iter().map(|e: &epoll::Event| e.data.u64()).collect()
    }

    fn counter() -> OwnedFd {
        eventfd(0, EventfdFlags::CLOEXEC).unwrap()
    }

    #[test]
    fn an_empty_one_comes_back() {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        assert_eq!(targets(&restored(&ep)), []);
    }

    #[test]
    fn events_and_data_come_back() {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (a, b) = (counter(), counter());
        epoll::add(&ep, &a, EventData::new_u64(u64::MAX), EventFlags::IN | EventFlags::ET).unwrap();
        epoll::add(&ep, &b, EventData::new_u64(7), EventFlags::OUT | EventFlags::EXCLUSIVE).unwrap();
        let again = restored(&ep);
        assert_eq!(targets(&again), targets(&ep));
        assert_eq!(ready(&again), [7]);
    }

    #[test]
    fn a_number_that_was_closed_is_found_under_another() {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let first = counter();
        let second = first.try_clone().unwrap();
        epoll::add(&ep, &first, EventData::new_u64(1), EventFlags::IN).unwrap();
        let number = first.as_raw_fd();
        drop(first);
        assert_eq!(targets(&ep)[0].0, number);
        rustix::io::write(&second, &1u64.to_ne_bytes()).unwrap();
        let again = restored(&ep);
        assert_eq!(targets(&again)[0].0, second.as_raw_fd());
        assert_eq!(ready(&again), [1]);
    }

    #[test]
    fn a_file_that_is_open_nowhere_in_the_task_is_refused() {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let gone = counter();
        epoll::add(&ep, &gone, EventData::new_u64(1), EventFlags::IN).unwrap();
        // The number goes, the open file stays: in a mapping, a message under way, another process.
        let (ours, theirs) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::DGRAM,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        let sent = [gone.as_fd()];
        control.push(rustix::net::SendAncillaryMessage::ScmRights(&sent));
        rustix::net::sendmsg(&ours, &[std::io::IoSlice::new(b"x")], &mut control, rustix::net::SendFlags::empty())
            .unwrap();
        drop(gone);
        let error = dump(&Options::default(), &[&ep]).unwrap_err();
        assert_eq!(error.errno(), libc::ENOTSUP, "{error:?}");
        drop(theirs);
    }

    #[test]
    fn a_one_shot_that_has_fired_rests() {
        let ep = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        drop(writer);
        epoll::add(&ep, &reader, EventData::new_u64(1), EventFlags::IN | EventFlags::ONESHOT).unwrap();
        assert_eq!(ready(&ep), [1]);
        assert_eq!(targets(&ep)[0].1, libc::EPOLLONESHOT as u32);
        let again = restored(&ep);
        assert_eq!(targets(&again), targets(&ep));
        assert!(ready(&again).is_empty(), "the hang-up was reported before the dump");
    }

    #[test]
    fn one_in_another_comes_back() {
        let (outer, inner) =
            (epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(), epoll::create(epoll::CreateFlags::CLOEXEC).unwrap());
        epoll::add(&outer, &inner, EventData::new_u64(5), EventFlags::IN).unwrap();
        let again = restored(&outer);
        assert_eq!(targets(&again), targets(&outer));
    }
}
