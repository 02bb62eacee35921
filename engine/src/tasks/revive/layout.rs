//! Where the kernel believes the parts of a task's memory to be: the vdso moved to its place (mremap(2)), and the numbers in
//! /proc/PID/stat, the auxiliary vector and the executable (PR_SET_MM_MAP, prctl(2)). From `mm-N.img`; after the areas
//! are made, before anything that takes power away.

use standstill_restorer::plan::{Code, Expect};

use super::Script;
use crate::error::{Error, Result};
use crate::memory::vdso;
use crate::plan::Plan;
use crate::tasks::tree::Alive;

impl Script<'_> {
    /// Where a part of our vdso waits.
    pub(super) fn parked_at(&self, at: u64) -> u64 {
        at - self.birth.vdso.layout.start() + self.parked.start()
    }

    pub(super) fn place_vdso(&self, alive: &Alive, plan: &mut Plan) -> Result<()> {
        let wanted = alive.memory.vdso();
        if wanted.vdso == 0 {
            return Ok(());
        }
        let ours = &self.birth.vdso;
        let old = alive.memory.vdso_bytes();
        let shift = |at: u64| self.parked_at(at);
        let same_vvar = wanted.vvar == 0 || wanted.vvar_end - wanted.vvar == ours.layout.vvar_end - ours.layout.vvar;
        let same_place = wanted.vvar == 0
            || wanted.vdso.wrapping_sub(wanted.vvar) == ours.layout.vdso.wrapping_sub(ours.layout.vvar);
        if old == ours.bytes && same_vvar && same_place {
            for &(start, len) in &ours.pieces {
                let to = wanted.vdso.wrapping_add(start).wrapping_sub(ours.layout.vdso);
                const MAYMOVE_FIXED: u32 = 3;
                let args = [shift(start).into(), len.into(), len.into(), MAYMOVE_FIXED.into(), to.into()];
                plan.call_exact("vdso", libc::SYS_mremap, &args, to as i64);
            }
            return Ok(());
        }
        let code = vdso::redirect(old, &ours.bytes, self.parked.vdso)?;
        let data = plan.bytes(&code);
        let len = (code.len() as u64).next_multiple_of(4096);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        plan.call(
            "old vdso",
            libc::SYS_mmap,
            &[wanted.vdso.into(), len.into(), 3.into(), flags.into(), (-1).into(), 0.into()],
        );
        plan.op(Code::Copy, 0, &[wanted.vdso.into(), data.into(), code.len().into()], Expect::Any, [0; 2], "old vdso");
        plan.call("old vdso", libc::SYS_mprotect, &[wanted.vdso.into(), len.into(), 5.into()]);
        Ok(())
    }

    /// prctl(PR_SET_MM_MAP): the numbers in /proc/PID/stat, the auxiliary vector, the executable.
    pub(super) fn describe_memory(&self, alive: &Alive, plan: &mut Plan) -> Result<()> {
        const PR_SET_MM: i32 = 35;
        const PR_SET_MM_MAP: i32 = 14;
        const PR_SET_THP_DISABLE: i32 = 41;
        let mm = &alive.memory.mm;
        let mut auxv = mm.mm_saved_auxv.clone();
        // an odd end, or none at all: CRIU cuts the vector at 44 words
        auxv.truncate(auxv.len() & !1);
        if auxv.len() < 2 || auxv[auxv.len() - 2] != 0 {
            auxv.extend([0, 0]);
        }
        // the kernel keeps 44 words or more, as its version has it; what does not fit ends where CRIU ends it
        if auxv.len() > 48 {
            auxv.truncate(46);
            auxv.extend([0, 0]);
        }
        let vector = plan.words(&auxv);
        let exe = *self
            .table
            .exes
            .get(&mm.exe_file_id)
            .ok_or_else(|| Error::lie("mm", format!("executable {:#x} is missing", mm.exe_file_id)))?;
        let words = [
            mm.mm_start_code,
            mm.mm_end_code,
            mm.mm_start_data,
            mm.mm_end_data,
            mm.mm_start_brk,
            mm.mm_brk,
            mm.mm_start_stack,
            mm.mm_arg_start,
            mm.mm_arg_end,
            mm.mm_env_start,
            mm.mm_env_end,
            0,
            (auxv.len() * 8) as u64 | (exe as u64) << 32,
        ];
        let map = plan.words(&words);
        plan.pointer(map, 88, vector);
        plan.call(
            "memory map",
            libc::SYS_prctl,
            &[PR_SET_MM.into(), PR_SET_MM_MAP.into(), map.into(), 104.into(), 0.into()],
        );
        if mm.thp_disabled == Some(true) {
            plan.call(
                "huge pages",
                libc::SYS_prctl,
                &[PR_SET_THP_DISABLE.into(), 1.into(), 0.into(), 0.into(), 0.into()],
            );
        }
        Ok(())
    }
}
