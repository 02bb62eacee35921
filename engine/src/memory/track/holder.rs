//! Who keeps the watch over memory between two commands: a process of ours with nothing in it but the executor.
//!
//! It has the userfaultfds, and a memfd that says which pass they mark, and waits for the end of the tree's root. It is in
//! no session, process group or folder of anybody's and has no standard streams; its parent is the next subreaper, or init.
//! A command finds it by its name and takes copies of its descriptors (pidfd_getfd(2)). It is killed by the last dump, by
//! `standstill untrack`, or by whoever ends the control group that it was started in; then the kernel drops all protection,
//! and the next dump is whole.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use serde_json::{json, Value};
use standstill_restorer::plan::{Code, Expect};

use crate::error::{Call, Result};
use crate::plan::arena::Arena;
use crate::plan::Plan;
use crate::sys::futex::RobustList;
use crate::sys::uffd::Uffd;
use crate::sys::{calls, spawn};

/// The name it goes by (/proc/PID/comm).
const NAME: &str = "standstill-mem";
/// Where the program of the holder is loaded; there is nothing else in it.
const BASE: u64 = 0x1000_0000_0000;
/// Its descriptors: the executor's memory, the record, the pidfd of the root, then the userfaultfds.
const RECORD: i32 = spawn::FIRST_FD + 1;
const ROOT: i32 = spawn::FIRST_FD + 2;
const WATCHES: i32 = spawn::FIRST_FD + 3;
/// A record is some words for each process of a tree.
const LONGEST_RECORD: u64 = 4 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// A holder that runs.
#[derive(Debug)]
pub struct Holder {
    pidfd: OwnedFd,
    file: File,
    record: Record,
}

/// What its memfd says, as JSON.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Record {
    run: String,
    root: (i32, u64),
    /// Pid, start time, and number of the descriptor in the holder.
    processes: Vec<(i32, u64, i32)>,
}

/// Where the name of the last pass is in a record, and how much room it has, filled up with spaces: it changes in one write
/// within a page, so that an engine that is killed leaves the one or the other.
const RUN_AT: u64 = 8;
const RUN_ROOM: usize = 40;

impl Record {
    fn text(&self) -> String {
        let processes: Vec<Value> = self.processes.iter().map(|(pid, start, fd)| json!([pid, start, fd])).collect();
        let run = padded(&self.run);
        json!({ "run": run, "root": [self.root.0, self.root.1], "processes": processes }).to_string()
    }

    fn parse(text: &[u8]) -> Option<Record> {
        let value: Value = serde_json::from_slice(text).ok()?;
        let int = |v: &Value| v.as_i64().and_then(|n| i32::try_from(n).ok());
        let root = (int(value["root"].get(0)?)?, value["root"].get(1)?.as_u64()?);
        let process = |v: &Value| Some((int(v.get(0)?)?, v.get(1)?.as_u64()?, int(v.get(2)?)?));
        let processes = value["processes"].as_array()?.iter().map(process).collect::<Option<Vec<_>>>()?;
        Some(Record { run: value["run"].as_str()?.trim_end().to_owned(), root, processes })
    }
}

impl Holder {
    /// The holder of the tree whose root is `root`, if there is one.
    pub fn find(root: i32) -> Result<Option<Holder>> {
        let start = start_of(root);
        for entry in std::fs::read_dir("/proc").call("open(/proc)")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            let comm = std::fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
            if comm.strip_suffix(b"\n") != Some(NAME.as_bytes()) {
                continue;
            }
            if let Some(holder) = Holder::open(pid) {
                if Some(holder.record.root) == start.map(|start| (root, start)) {
                    return Ok(Some(holder));
                }
            }
        }
        Ok(None)
    }

    /// A process with the right name, if it is really one of ours: of our user, and its program is no file.
    fn open(pid: i32) -> Option<Holder> {
        use std::os::unix::fs::MetadataExt;
        let pidfd = calls::pidfd_open(pid, 0).ok()?;
        let owner = std::fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        let program = std::fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        if owner != rustix::process::geteuid().as_raw() || program.as_os_str() != "/memfd:standstill (deleted)" {
            return None;
        }
        let file = File::from(calls::pidfd_getfd(pidfd.as_fd(), RECORD).ok()?);
        let len = file.metadata().ok()?.len().min(LONGEST_RECORD);
        let mut text = vec![0; usize::try_from(len).ok()?];
        file.read_exact_at(&mut text, 0).ok()?;
        let record = Record::parse(&text)?;
        Some(Holder { pidfd, file, record })
    }

    /// The name of the last pass; empty while there is none whose marks could be believed.
    #[must_use]
    pub fn run(&self) -> &str {
        &self.record.run
    }

    /// The processes whose memory is watched: pid, start time, descriptor.
    pub fn processes(&self) -> impl Iterator<Item = (i32, u64, i32)> + '_ {
        self.record.processes.iter().copied()
    }

    /// A copy of one of its descriptors.
    pub fn descriptor(&self, fd: i32) -> Result<OwnedFd> {
        calls::pidfd_getfd(self.pidfd.as_fd(), fd)
    }

    /// Notes which pass the marks are of.
    pub fn set_run(&mut self, run: &str) -> Result<()> {
        self.record.run = run.to_owned();
        self.file.write_all_at(padded(run).as_bytes(), RUN_AT).call("write")
    }

    /// Ends it, and with it all watches that nobody has a copy of.
    pub fn end(self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }

    /// Starts a holder, which has copies of all these watches.
    pub fn start(root: (i32, u64), run: &str, processes: &[(i32, u64, &Uffd)]) -> Result<()> {
        let numbered = (WATCHES..).zip(processes).map(|(fd, (pid, start, _))| (*pid, *start, fd));
        let record = Record { run: run.to_owned(), root, processes: numbered.collect() };
        let file = File::from(spawn::memfd(c"standstill-record", 0)?);
        file.write_all_at(record.text().as_bytes(), 0).call("write")?;
        let robust = RobustList::new()?;
        let mut arena = Arena::new(BASE, Arena::size_for(2, 64, 4096), &robust)?;
        let (first, second) = (arena.slot()?, arena.slot()?);
        let pidfd = calls::pidfd_open(root.0, 0)?;
        let watches = processes.iter().map(|(_, _, uffd)| uffd.as_fd());
        let inherit: Vec<BorrowedFd<'_>> =
            [arena.fd(), file.as_fd(), pidfd.as_fd()].into_iter().chain(watches).collect();
        let boot = arena.boot(first);
        // an intermediate, whose end leaves the holder to init; its own parent, the keeper, is invisible to a host program
        let kept = spawn::spawn_kept(&spawn::Spawn::helper(arena.load_at(), boot, &inherit))?;
        drop(inherit);
        let made = (|| {
            let mut plan = Plan::new();
            plan.call("session of its own", libc::SYS_setsid, &[]);
            let top = plan.string(b"/");
            plan.call("no folder", libc::SYS_chdir, &[top.into()]);
            plan.call("no standard streams", libc::SYS_close_range, &[0.into(), 2.into(), 0.into()]);
            let name = plan.string(NAME.as_bytes());
            plan.call("its name", libc::SYS_prctl, &[libc::PR_SET_NAME.into(), name.into()]);
            let (stack, size) = arena.stack(second);
            let args = plan.words(&[0, 0, 0, 0, 0, stack, size, 0, 0, 0, 0]);
            let child = [args.into(), 88.into(), arena.control(second).into()];
            plan.op(Code::Clone, 0, &child, Expect::NonNegative, [0; 2], "the holder");
            arena.load(first, 0, plan)?;
            arena.finish(first, LIMIT, || Ok(()))?;
            let mut wait = Plan::new();
            let poll = wait.bytes(&[ROOT.to_le_bytes(), 1_i32.to_le_bytes()].concat());
            wait.ask("the end of the root", libc::SYS_poll, &[poll.into(), 1.into(), (-1).into()]);
            wait.op(Code::Exit, 0, &[0.into()], Expect::Any, [0; 2], "its own end");
            arena.load(second, 0, wait)
        })();
        // from here on the holder does not mind our end
        if made.is_ok() {
            arena.release();
        }
        let mut end = Plan::new();
        end.op(Code::Exit, 0, &[0.into()], Expect::Any, [0; 2], "the end of the intermediate");
        if made.is_err() || arena.load(first, 0, end).is_err() {
            arena.cancel();
        }
        drop(kept);
        made
    }
}

fn padded(run: &str) -> String {
    format!("{run:RUN_ROOM$}")
}

fn start_of(pid: i32) -> Option<u64> {
    let mut buffer = Vec::new();
    crate::proc::read_proc(format!("/proc/{pid}/stat").as_ref(), &mut buffer).ok()?;
    crate::proc::stat::parse(&buffer).ok().map(|s| s.starttime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_go_there_and_back() {
        let record = Record { run: "a-b".into(), root: (7, 1 << 40), processes: vec![(7, 1, 6), (9, 2, 7)] };
        let mut text = record.text();
        assert_eq!(Record::parse(text.as_bytes()), Some(record.clone()));
        // the name alone changes
        let at = usize::try_from(RUN_AT).unwrap_or(0);
        text.replace_range(at..at + RUN_ROOM, &padded(""));
        assert_eq!(Record::parse(text.as_bytes()), Some(Record { run: String::new(), ..record }));
        for wrong in
            ["", "{}", "[]", r#"{"run":1,"root":[1,2],"processes":[]}"#, r#"{"run":"","root":[1],"processes":[]}"#]
        {
            assert_eq!(Record::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
