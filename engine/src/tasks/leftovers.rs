//! What an engine that was killed left in a task: a trampoline in the zero tail of `[vdso]`, its executor's area, which
//! carries a name, and the zombies of [copies](crate::tracee::Copied). The next dump takes them away, areas when no thread can
//! come back to them.

use std::ops::Range;
use std::time::{Duration, Instant};

use crate::cgroups::freezer::Freezer;
use crate::error::{At, Error, Result};
use crate::plan::Plan;
use crate::proc::maps::{Vma, VmaName};
use crate::sys::memory;
use crate::tasks::freeze::{self, Frozen};
use crate::tracee::{Stopped, AREA_NAME, COPY_NAME};

/// A dead copy: its parent, and its id.
pub type Copy = (i32, i32);

/// How long the copy of a dead engine may take to end.
const COPY_LIMIT: Duration = Duration::from_secs(2);
/// How much of a thread's stack is looked at for addresses to return to.
const STACK: usize = 64 << 10;

/// Fails while a thread is in `range`, or its stack has an address that leads there: it has not found its way back yet.
pub fn none_in(thread: &Stopped, range: &Range<u64>) -> Result<()> {
    let r = &thread.registers;
    let mut inside = range.contains(&r.ip) || range.contains(&r.sp);
    if !inside {
        let mut stack = vec![0; STACK];
        // up to the end of the stack's area, whatever of it can be read
        let n = memory::read_remote(thread.tid(), r.sp & !7, &mut stack).unwrap_or(0);
        inside = stack[..n]
            .chunks_exact(8)
            .filter_map(|w| w.try_into().ok())
            .any(|w| range.contains(&u64::from_le_bytes(w)));
    }
    if inside {
        return Err(Error::refused("a task that an earlier, killed dump has not left yet", "try again in a moment"))
            .task(thread.tid());
    }
    Ok(())
}

fn left(areas: &[Vma]) -> impl Iterator<Item = Range<u64>> + '_ {
    areas.iter().filter(|a| a.name() == VmaName::NamedSharedAnonymous(AREA_NAME)).map(|a| a.start..a.end)
}

/// Checks that nobody is in an area that a dead engine left.
pub fn check_areas(areas: &[Vma], threads: &[Stopped]) -> Result<()> {
    for range in left(areas) {
        threads.iter().try_for_each(|thread| none_in(thread, &range))?;
    }
    Ok(())
}

/// Stops the tree below `root`, as [`freeze::freeze`] does, and takes the zombies of copies out of it: parent, and id. A copy
/// that has not seen yet that its engine is dead is given time for that.
pub fn freeze(root: i32, limit: Duration, mut freezer: Option<&mut Freezer<'_>>) -> Result<(Vec<Frozen>, Vec<Copy>)> {
    let began = Instant::now();
    loop {
        let mut frozen = freeze::freeze(root, limit, freezer.as_deref_mut())?;
        let is_copy = |f: &Frozen| f.stat.comm == COPY_NAME;
        match frozen.iter().find(|f| is_copy(f) && f.dead.is_none()).map(|f| f.pid) {
            None => {
                let copies = frozen.iter().filter(|f| is_copy(f)).map(|f| (f.parent, f.pid)).collect();
                frozen.retain(|f| !is_copy(f));
                return Ok((frozen, copies));
            }
            Some(pid) if began.elapsed() > COPY_LIMIT => {
                let what = "a copy of a task that another snapshot has made";
                return Err(Error::refused(what, "wait until that snapshot is complete")).task(pid);
            }
            Some(_) => {
                drop(frozen);
                std::thread::sleep(COPY_LIMIT / 100);
            }
        }
    }
}

/// Unmaps what dead engines left, and waits for its copies.
pub fn remove(pid: i32, areas: &[Vma], copies: &[Copy], plan: &mut Plan) {
    for (_, copy) in copies.iter().filter(|(parent, _)| *parent == pid) {
        let flags = libc::__WALL | libc::WNOHANG;
        plan.ask("a dead copy", libc::SYS_wait4, &[(*copy).into(), 0.into(), flags.into(), 0.into()]);
    }
    for range in left(areas) {
        plan.call("area of a dead engine", libc::SYS_munmap, &[range.start.into(), (range.end - range.start).into()]);
    }
}
