//! Packed pages on their way back into tasks.
//!
//! A task reads plain pages by itself, straight from the image. Packed pages are unpacked by the engine, blocks side by side,
//! and written to where they belong with process_vm_writev(2): measured, that takes half the time of a memfd in between,
//! and no memory. So a task whose areas are mapped asks for it ([`ask`]: its pid into one pipe) and waits for a byte in a
//! pipe of its own. When the engine dies, that pipe ends, the byte does not come, and the task exits as after any other
//! operation that failed.
//!
//! Ordering: after the areas of a task are there and writable, before its children that share them are cloned, and before
//! areas get their rights.
//!
//! Not kept: which anonymous pages of zeros were there.
//!
//! Man pages: process_vm_writev(2), pipe(2).

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rayon::prelude::*;
use rustix::pipe::PipeFlags;
use standstill_images::pages::packed::PackedPages;
use standstill_images::pages::Located;
use standstill_images::proto::VmaEntry;
use standstill_restorer::plan::{Code, Expect};

use super::rebuild::{Content, Memory};
use super::{status, PAGE};
use crate::error::{At, Call, Error, Place, Result};
use crate::plan::Plan;
use crate::progress::Counter;
use crate::sys::memory as remote;

/// What ends the wait for requests.
const STOP: u32 = u32::MAX;

/// Numbers of the pipes, in a task.
#[derive(Debug, Clone, Copy)]
pub struct Pipes {
    /// Where it asks.
    pub ask: i32,
    /// Where it waits.
    pub wait: i32,
}

/// Pages that a task is waiting for.
#[derive(Debug, Clone)]
pub struct Request {
    /// Which task.
    pub pid: u32,
    /// Which pages.
    pub content: Vec<Content>,
}

/// The tasks' ends of the pipes.
#[derive(Debug)]
pub struct TaskEnds {
    /// Where all ask.
    pub ask: OwnedFd,
    /// Where each waits, by pid.
    pub waits: Vec<(u32, OwnedFd)>,
}

/// The engine's ends of the pipes.
#[derive(Debug)]
pub struct Unpacker {
    requests: File,
    stop: File,
    answers: HashMap<u32, File>,
}

impl Unpacker {
    /// For these tasks.
    pub fn new(pids: &[u32]) -> Result<(Unpacker, TaskEnds)> {
        let pipe = || rustix::pipe::pipe_with(PipeFlags::CLOEXEC).call("pipe2");
        let (requests, ask) = pipe()?;
        let stop = File::from(ask.try_clone().call("fcntl(F_DUPFD_CLOEXEC)")?);
        let mut answers = HashMap::new();
        let mut waits = Vec::new();
        for &pid in pids {
            let (wait, answer) = pipe()?;
            answers.insert(pid, File::from(answer));
            waits.push((pid, wait));
        }
        Ok((Unpacker { requests: requests.into(), stop, answers }, TaskEnds { ask, waits }))
    }

    /// Does what tasks ask for while `during` runs; `host` says which id a task has with us.
    pub fn serve<T>(
        self,
        requests: &[Request],
        memories: &HashMap<u32, &Memory>,
        host: impl Fn(i32) -> Result<i32> + Send,
        counter: &Counter,
        during: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        if requests.is_empty() {
            return during();
        }
        // our end of the pipe stays open until all is over: a write into one without readers would be a signal
        let Unpacker { requests: from, mut stop, mut answers } = self;
        let mut from = &from;
        std::thread::scope(|scope| {
            // when it fails, all answers are dropped, and the tasks with them
            let unpacking = scope.spawn(move || -> Result<()> {
                for _ in requests {
                    let mut pid = [0; 4];
                    from.read_exact(&mut pid).call("read")?;
                    let pid = u32::from_ne_bytes(pid);
                    if pid == STOP {
                        break;
                    }
                    let request = requests.iter().find(|r| r.pid == pid).ok_or(Error::Gone)?;
                    let memory = memories.get(&pid).ok_or(Error::Gone)?;
                    let task = i32::try_from(pid).unwrap_or(0);
                    fill(memory, host(task)?, &request.content, counter).task(task)?;
                    answers.remove(&pid).ok_or(Error::Gone)?.write_all(&[1]).call("write")?;
                }
                Ok(())
            });
            let result = during();
            let _ = stop.write_all(&STOP.to_ne_bytes());
            match unpacking.join() {
                Ok(unpacked) => unpacked.and(result),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }
}

/// The operations with which a task has its packed pages written.
pub fn ask(pid: u32, pipes: Pipes, plan: &mut Plan) {
    let word = plan.bytes(&pid.to_ne_bytes());
    plan.op(
        Code::WriteFull,
        0,
        &[word.into(), pipes.ask.into(), 4.into()],
        Expect::NonNegative,
        [0; 2],
        "packed pages",
    );
    let room = plan.bytes(&[0]);
    plan.call_exact("packed pages", libc::SYS_read, &[pipes.wait.into(), room.into(), 1.into()], 1);
}

/// Writes packed pages into a task.
fn fill(memory: &Memory, pid: i32, content: &[Content], counter: &Counter) -> Result<()> {
    content.par_iter().try_for_each(|run| {
        let packed = memory.packed(run.layer).ok_or(Error::Gone)?;
        each_block(packed, run.offset..run.offset + run.bytes, |done, bytes| {
            remote::write_remote(pid, run.address + done, bytes)?;
            counter.add(bytes.len() as u64);
            Ok(())
        })
        .at(Place::Area(run.address, run.address + run.bytes))
    })
}

/// Copies a part of what blocks unpack to into a file that is empty there.
pub fn copy(from: &PackedPages, range: Range<u64>, to: &File, at: u64) -> Result<()> {
    each_block(from, range, |done, bytes| match bytes.iter().any(|&byte| byte != 0) {
        true => to.write_all_at(bytes, at + done).call("pwrite"),
        false => Ok(()),
    })
}

/// Unpacks a part of what blocks unpack to, side by side; `put` gets what comes from one block, and its place in the part.
fn each_block(from: &PackedPages, range: Range<u64>, put: impl Fn(u64, &[u8]) -> Result<()> + Sync) -> Result<()> {
    let blocks = from.blocks();
    let first = blocks.partition_point(|block| block.at + u64::from(block.bytes) <= range.start);
    let after = blocks.partition_point(|block| block.at < range.end);
    let one = |buffer: &mut Vec<u8>, number: usize| -> Result<()> {
        let Some(block) = blocks.get(number) else { return Ok(()) };
        buffer.resize(usize::try_from(block.bytes).unwrap_or(0), 0);
        from.unpack(number, buffer).call("read(pages)")?;
        let (begin, end) = (block.at.max(range.start), (block.at + buffer.len() as u64).min(range.end));
        let within = |place: u64| usize::try_from(place - block.at).unwrap_or(usize::MAX);
        put(begin - range.start, buffer.get(within(begin)..within(end)).unwrap_or_default())
    };
    if after.saturating_sub(first) < 2 {
        return (first..after).try_for_each(|number| one(&mut Vec::new(), number));
    }
    (first..after).into_par_iter().try_for_each_init(Vec::new, one)
}

/// Leaves out pages that are known to be zeros, where an area is zeros anyway: all but those of a file.
pub fn without_zeros(located: Vec<Located>, areas: &[VmaEntry]) -> Vec<Located> {
    if !located.iter().any(|pages| pages.zero) {
        return located;
    }
    let of_file = |e: &&VmaEntry| e.status & (status::FILE_PRIVATE | status::FILE_SHARED | status::VDSO) != 0;
    let files: Vec<&VmaEntry> = areas.iter().filter(of_file).collect();
    let mut kept = Vec::with_capacity(located.len());
    for pages in located {
        if !pages.zero {
            kept.push(pages);
            continue;
        }
        let end = pages.address + pages.pages * PAGE;
        for area in files.iter().filter(|e| e.start < end && pages.address < e.end) {
            let address = pages.address.max(area.start);
            let offset = pages.offset.map(|offset| offset + (address - pages.address));
            kept.push(Located { address, pages: (end.min(area.end) - address) / PAGE, offset, ..pages });
        }
    }
    kept
}
