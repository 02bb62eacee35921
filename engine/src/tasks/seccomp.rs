//! seccomp: strict mode and filters, per thread (seccomp(2)).
//!
//! Filters are read by ptrace (PTRACE_SECCOMP_GET_FILTER), newest first. Image: `seccomp.img` has one list for the whole
//! tree, each filter naming the one that was installed before it; `thread_core` has the mode and the thread's newest
//! filter. A process whose threads all have the same filters is restored through its leader with
//! SECCOMP_FILTER_FLAG_TSYNC. While plans still run, the engine holds the filters off with PTRACE_O_SUSPEND_SECCOMP.

use standstill_images::proto::{SeccompEntry, SeccompFilter, ThreadCoreEntry};

use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::sys::ptrace;

/// Mode 1: read, write, exit and sigreturn only.
pub const STRICT: i32 = 1;
/// Mode 2: BPF filters.
pub const FILTER: i32 = 2;
const TSYNC: u32 = 1;

/// Filters as they were read, oldest first, each with its flags.
pub type Chain = Vec<(Vec<u8>, u32)>;

/// Reads the filters of a stopped thread, oldest first.
pub fn read(tid: i32) -> Result<Chain> {
    let mut chain = Vec::new();
    // PTRACE_SECCOMP_GET_FILTER counts from the oldest
    while let Some((code, flags)) = ptrace::seccomp_filter(tid, chain.len())? {
        chain.push((code, u32::try_from(flags).unwrap_or(0)));
    }
    Ok(chain)
}

/// Adds the filters of one process to the list; answers the index of each thread's last link (see
/// [`ThreadCoreEntry::seccomp_filter`]), `None` for threads that get theirs by TSYNC.
pub fn add(chains: &[Chain], all: &mut Vec<SeccompFilter>) -> Vec<Option<u32>> {
    let same = chains.len() > 1 && chains.iter().all(|c| *c == chains[0]);
    chains
        .iter()
        .enumerate()
        .map(|(i, chain)| {
            if chain.is_empty() || (same && i > 0) {
                return None;
            }
            let mut last = None;
            // newest first in the file, so that `prev` leads from a filter to the one installed after it
            for (code, flags) in chain.iter().rev() {
                let flags = if same { flags | TSYNC } else { *flags };
                all.push(SeccompFilter { filter: code.clone(), prev: last, flags: Some(flags) });
                last = u32::try_from(all.len() - 1).ok();
            }
            last
        })
        .collect()
}

/// Installs what the thread had. Filters not yet checked against the image's list may not loop.
pub fn restore(core: &ThreadCoreEntry, all: &SeccompEntry, plan: &mut Plan) -> Result<()> {
    const SET_MODE_STRICT: u32 = 0;
    const SET_MODE_FILTER: u32 = 1;
    match core.seccomp_mode.unwrap_or(0) {
        0 => {}
        STRICT => {
            plan.call("seccomp", libc::SYS_seccomp, &[SET_MODE_STRICT.into(), 0.into(), 0.into()]);
        }
        FILTER => {
            let mut next = core.seccomp_filter;
            let mut steps = 0;
            while let Some(i) = next {
                let filter = all
                    .seccomp_filters
                    .get(i as usize)
                    .ok_or_else(|| Error::lie("seccomp.img", format!("filter {i} is missing")))?;
                steps += 1;
                if steps > all.seccomp_filters.len() {
                    return Err(Error::lie("seccomp.img", "filters follow each other in a circle"));
                }
                let len = filter.filter.len() / 8;
                let code = plan.bytes(&filter.filter);
                // struct sock_fprog, whose pointer is made of the plan's base in the task
                let program = plan.words(&[len as u64, 0]);
                plan.pointer(program, 8, code);
                let flags = filter.flags.unwrap_or(0);
                plan.call("seccomp filter", libc::SYS_seccomp, &[SET_MODE_FILTER.into(), flags.into(), program.into()]);
                next = filter.prev;
            }
        }
        mode => return Err(Error::lie("core", format!("seccomp mode {mode}"))),
    }
    Ok(())
}
