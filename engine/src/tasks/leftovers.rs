//! What an engine that was killed left in a task: a trampoline in the zero tail of `[vdso]`, and its executor's area, which
//! carries a name. The next dump takes both away, when no thread can come back to them.

use std::ops::Range;

use crate::error::{At, Error, Result};
use crate::plan::Plan;
use crate::proc::maps::{Vma, VmaName};
use crate::sys::memory;
use crate::tracee::{Stopped, AREA_NAME};

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

/// Unmaps what dead engines left.
pub fn remove(areas: &[Vma], plan: &mut Plan) {
    for range in left(areas) {
        plan.call("area of a dead engine", libc::SYS_munmap, &[range.start.into(), (range.end - range.start).into()]);
    }
}
