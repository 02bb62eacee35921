//! What an engine that was killed left in a task: a trampoline in the zero tail of `[vdso]`, its executor's area, which
//! carries a name, and the zombies of [copies](crate::tracee::Copied). The next dump takes them away, areas when no thread can
//! come back to them.

use std::ops::Range;

use crate::error::{At, Error, Result};
use crate::plan::Plan;
use crate::proc::maps::{Vma, VmaName};
use crate::sys::memory;
use crate::tasks::freeze::Frozen;
use crate::tracee::{Stopped, AREA_NAME, COPY_NAME};

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

/// Takes the zombies of copies out of a tree that was stopped: parent, and id.
pub fn take_copies(frozen: &mut Vec<Frozen>) -> Result<Vec<(i32, i32)>> {
    let mut copies = Vec::new();
    for f in frozen.iter().filter(|f| f.stat.comm == COPY_NAME) {
        if f.dead.is_none() {
            let what = "a copy of a task that an earlier, killed dump made";
            return Err(Error::refused(what, "try again in a moment")).task(f.pid);
        }
        copies.push((f.parent, f.pid));
    }
    frozen.retain(|f| !copies.iter().any(|(_, copy)| *copy == f.pid));
    Ok(copies)
}

/// Unmaps what dead engines left, and waits for its copies.
pub fn remove(pid: i32, areas: &[Vma], copies: &[(i32, i32)], plan: &mut Plan) {
    for (_, copy) in copies.iter().filter(|(parent, _)| *parent == pid) {
        let flags = libc::__WALL | libc::WNOHANG;
        plan.ask("a dead copy", libc::SYS_wait4, &[(*copy).into(), 0.into(), flags.into(), 0.into()]);
    }
    for range in left(areas) {
        plan.call("area of a dead engine", libc::SYS_munmap, &[range.start.into(), (range.end - range.start).into()]);
    }
}
