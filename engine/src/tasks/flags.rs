//! Flags of areas, read before a tree is stopped.
//!
//! What `maps` does not say of an area (that it is locked, not to be inherited, what madvise(2) asked for) only `smaps` does, and
//! that counts every page: some 26 ms for 1 GiB in small pages, far more than all else that a snapshot needs the tree stopped
//! for. So a snapshot reads it before, and looks again afterwards.
//!
//! Flags are taken over only if each area in the freeze is, as far as `maps` tells, one that was there before, or a part of
//! one that has grown or was cut: the kernel merges areas only if their flags are the same. Otherwise `smaps` is read in the freeze. If
//! flags differ afterwards, someone has changed them in between, it cannot be said when, and the snapshot is taken anew, with
//! `smaps` read in the freeze.
//!
//! Man page: proc_pid_smaps(5).

use std::collections::HashMap;

use rayon::prelude::*;

use crate::error::{At, Call, Result};
use crate::proc::{self, maps::VmFlags, maps::Vma};

/// Areas with their flags, by process: pid, and when it began.
#[derive(Debug, Default)]
pub struct Ahead {
    tasks: HashMap<i32, (u64, Vec<Vma>)>,
}

impl Ahead {
    /// Reads the areas of running processes; who is gone by now is left out.
    pub fn read(processes: &[(i32, u64)]) -> Ahead {
        let one = |&(pid, start): &(i32, u64)| Some((pid, (start, areas(pid, "smaps").ok()?)));
        Ahead { tasks: processes.par_iter().filter_map(one).collect() }
    }

    /// The areas of a stopped process with their flags, if they are known.
    pub fn of(&self, pid: i32, start: u64) -> Result<Option<Vec<Vma>>> {
        let Some((_, known)) = self.tasks.get(&pid).filter(|(began, _)| *began == start) else { return Ok(None) };
        let mut areas = areas(pid, "maps")?;
        Ok(adopt(known, &mut areas).then_some(areas))
    }

    /// Whether the flags of a process that runs again are what they were before it was stopped.
    pub fn still_so(&self, pid: i32) -> bool {
        let Some((_, known)) = self.tasks.get(&pid) else { return true };
        // who is gone by now has changed none
        let Ok(now) = areas(pid, "smaps") else { return true };
        let mut at = 0;
        now.iter().all(|area| match before(known, &mut at, area) {
            Some(old) => without_watch(old.vm_flags) == without_watch(area.vm_flags),
            None => true,
        })
    }
}

/// The areas of a process, by `maps` or `smaps`.
pub fn areas(pid: i32, file: &str) -> Result<Vec<Vma>> {
    let mut text = Vec::new();
    proc::read_proc(format!("/proc/{pid}/{file}").as_ref(), &mut text).call("read(/proc/PID/maps)").task(pid)?;
    Ok(proc::maps::parse(&text)?)
}

/// The first of the areas before that this one is, or was a part of. Both are in order: the search goes on from `at`.
fn before<'a>(known: &'a [Vma], at: &mut usize, area: &Vma) -> Option<&'a Vma> {
    while known.get(*at).is_some_and(|k| k.end <= area.start) {
        *at += 1;
    }
    known.get(*at..)?.iter().take_while(|k| k.start < area.end).find(|k| is_same(k, area))
}

/// The same file at the same place, or none; the same access.
fn is_same(a: &Vma, b: &Vma) -> bool {
    let access = |v: &Vma| (v.read, v.write, v.exec, v.shared);
    let file = |v: &Vma| (v.dev_major, v.dev_minor, v.inode, v.deleted);
    let place = |v: &Vma| if v.inode == 0 { 0 } else { v.offset.wrapping_sub(v.start) };
    access(a) == access(b) && file(a) == file(b) && place(a) == place(b) && a.path == b.path
}

/// Gives areas the flags that are known of them; false if something is not known.
fn adopt(known: &[Vma], areas: &mut [Vma]) -> bool {
    let mut at = 0;
    areas.iter_mut().all(|area| match before(known, &mut at, area) {
        Some(old) => {
            area.vm_flags = old.vm_flags;
            area.unknown_flags.clone_from(&old.unknown_flags);
            area.kernel_page_size_kb = old.kernel_page_size_kb;
            true
        }
        None => false,
    })
}

/// Our own watch over memory comes and goes, and so does what the kernel notes for itself.
fn without_watch(flags: VmFlags) -> VmFlags {
    flags.without(VmFlags::UFFD_WP).without(VmFlags::SOFT_DIRTY)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(start: u64, end: u64, flags: VmFlags) -> Vma {
        Vma { start, end, read: true, vm_flags: flags, ..Vma::default() }
    }

    #[test]
    fn flags_go_to_what_was_there() {
        let none = VmFlags::default();
        let known = [
            area(0x1000, 0x4000, VmFlags::LOCKED),
            area(0x8000, 0x9000, none),
            Vma { inode: 7, offset: 0x3000, ..area(0xa000, 0xb000, VmFlags::DONT_COPY) },
        ];
        // grown, cut in two, as it was
        let mut areas = [
            area(0x2000, 0x3000, none),
            area(0x3000, 0x5000, none),
            area(0x8000, 0xa000, none),
            Vma { inode: 7, offset: 0x3000, ..area(0xa000, 0xb000, none) },
        ];
        assert!(adopt(&known, &mut areas));
        let flags = areas.each_ref().map(|a| a.vm_flags);
        assert_eq!(flags, [VmFlags::LOCKED, VmFlags::LOCKED, none, VmFlags::DONT_COPY]);
        // new; another access; another place in the file
        let mut write = area(0x1000, 0x4000, none);
        write.write = true;
        let moved = Vma { inode: 7, offset: 0x4000, ..area(0xa000, 0xb000, none) };
        for other in [area(0x5000, 0x6000, none), write, moved] {
            assert!(!adopt(&known, &mut [other]));
        }
    }
}
