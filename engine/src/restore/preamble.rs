//! What the first task does before its own plan.

use standstill_images::proto::TimensEntry;
use standstill_restorer::plan::{Code, Expect};

use crate::error::{Call, Result};
use crate::memory::rebuild::unmap_all_but;
use crate::memory::vdso::Layout;
use crate::plan::arena::Arena;
use crate::plan::{Arg, Plan};
use crate::proc;
use crate::sys::spawn;
use crate::tasks::revive::Birth;

/// What becomes of the clocks.
pub(super) enum Clocks<'c> {
    /// They are ours.
    Stay,
    /// They go on from where they were; a number of /proc.
    GoOn(&'c TimensEntry, i32),
    /// They are those of this namespace, by its number.
    Join(i32),
}

/// What the first task does before its own plan: takes the descriptors, empties its memory, parks the vdso, enters a time
/// namespace in which the clocks go on from the dump.
pub(super) fn write(
    arena: &Arena<'_>,
    birth: &Birth,
    parked: Layout,
    base: i32,
    fds: usize,
    clocks: Clocks<'_>,
    pid: i32,
) -> Result<Plan> {
    let mut buf = Vec::new();
    proc::read_proc(format!("/proc/{pid}/maps").as_ref(), &mut buf).call("read(/proc/PID/maps)")?;
    let fresh = Layout::of(&proc::maps::parse(&buf)?);
    let mut plan = Plan::new();
    let hard = birth.limits.get(7).map_or(4096, |l| l.maximum);
    let limit = plan.words(&[hard, hard]);
    plan.call("room for descriptors", libc::SYS_prlimit64, &[0.into(), 7.into(), limit.into(), 0.into()]);
    let socket = spawn::FIRST_FD + 1;
    plan.call("standard descriptors", libc::SYS_close_range, &[0.into(), 2.into(), 0.into()]);
    plan.op(
        Code::ReceiveFds,
        0,
        &[socket.into(), base.into(), fds.into()],
        Expect::Exact,
        [fds as i64, 0],
        "descriptors",
    );
    plan.call("our descriptors", libc::SYS_close_range, &[0.into(), (base - 1).into(), 0.into()]);
    let (from, to) = arena.range();
    unmap_all_but([(from, to), (fresh.start(), fresh.start() + fresh.span())].into_iter(), &mut plan);
    for &(start, len) in &birth.vdso.pieces {
        let there = start - birth.vdso.layout.start() + fresh.start();
        let target = start - birth.vdso.layout.start() + parked.start();
        plan.call_exact(
            "vdso",
            libc::SYS_mremap,
            &[there.into(), len.into(), len.into(), 3.into(), target.into()],
            target as i64,
        );
    }
    match clocks {
        Clocks::Stay => {}
        Clocks::GoOn(clocks, proc_at) => time_namespace(clocks, proc_at, &mut plan)?,
        Clocks::Join(fd) => {
            plan.call("time namespace", libc::SYS_setns, &[fd.into(), libc::CLONE_NEWTIME.into()]);
        }
    }
    Ok(plan)
}

/// A time namespace whose clocks go on from the image (time_namespaces(7)).
fn time_namespace(clocks: &TimensEntry, proc_at: i32, plan: &mut Plan) -> Result<()> {
    if !std::path::Path::new("/proc/self/ns/time").exists() {
        tracing::warn!("this kernel has no time namespaces: monotonic clocks will jump");
        return Ok(());
    }
    let own = proc::simple::timens_offsets(
        &std::fs::read("/proc/self/timens_offsets").call("read(/proc/self/timens_offsets)")?,
    )?;
    let line = |name: &str, image: &standstill_images::proto::Timespec, clock, own: (i64, u32)| {
        let now = rustix::time::clock_gettime(clock);
        let nanos = |sec: i64, nsec: i64| i128::from(sec) * 1_000_000_000 + i128::from(nsec);
        let host = nanos(now.tv_sec, now.tv_nsec) - nanos(own.0, own.1.into());
        let offset = nanos(i64::try_from(image.tv_sec).unwrap_or(0), i64::try_from(image.tv_nsec).unwrap_or(0)) - host;
        format!("{name} {} {}\n", offset.div_euclid(1_000_000_000), offset.rem_euclid(1_000_000_000))
    };
    let text = line("monotonic", &clocks.monotonic, rustix::time::ClockId::Monotonic, own.monotonic)
        + &line("boottime", &clocks.boottime, rustix::time::ClockId::Boottime, own.boottime);
    plan.call("time namespace", libc::SYS_unshare, &[libc::CLONE_NEWTIME.into()]);
    let path = plan.string(b"self/timens_offsets");
    let data = plan.bytes(text.as_bytes());
    let fd = plan.call(
        "offsets of clocks",
        libc::SYS_openat,
        &[proc_at.into(), path.into(), libc::O_WRONLY.into(), 0.into()],
    );
    plan.call("offsets of clocks", libc::SYS_write, &[Arg::Result(fd.0), data.into(), text.len().into()]);
    plan.call("offsets of clocks", libc::SYS_close, &[Arg::Result(fd.0)]);
    let path = plan.string(b"self/ns/time_for_children");
    let fd =
        plan.call("time namespace", libc::SYS_openat, &[proc_at.into(), path.into(), libc::O_RDONLY.into(), 0.into()]);
    plan.call("time namespace", libc::SYS_setns, &[Arg::Result(fd.0), libc::CLONE_NEWTIME.into()]);
    plan.call("time namespace", libc::SYS_close, &[Arg::Result(fd.0)]);
    Ok(())
}
