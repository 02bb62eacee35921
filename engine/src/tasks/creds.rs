//! Credentials of a thread: ids, groups, capabilities, securebits, no_new_privs (credentials(7), capabilities(7)).
//!
//! Read from /proc/PID/task/TID/status; only the securebits must be asked for in the thread. Image: `core-N.img`
//! (`thread_core.creds`). They are set last, since they take away what everything else needs; the order is fixed by what
//! each step still allows. Security labels are not kept yet.

use standstill_images::proto::CredsEntry;

use crate::error::{Error, Result};
use crate::namespaces::user::Users;
use crate::plan::{At, Plan};
use crate::proc::status::{Ids, Status};
use crate::tracee::Answers;

const PR_SET_NO_NEW_PRIVS: i32 = 38;
const PR_GET_SECUREBITS: i32 = 27;
const PR_SET_SECUREBITS: i32 = 28;
const PR_CAPBSET_DROP: i32 = 24;
const PR_CAP_AMBIENT: i32 = 47;
const PR_CAP_AMBIENT_RAISE: i32 = 2;
const SECBIT_NO_SETUID_FIXUP: u32 = 1 << 2;
const CAPS: u32 = 64;

/// Asks for the securebits of the thread that runs the plan.
pub fn ask(plan: &mut Plan) -> At {
    plan.call("securebits", libc::SYS_prctl, &[PR_GET_SECUREBITS.into()])
}

fn halves(caps: u64) -> Vec<u32> {
    vec![caps as u32, (caps >> 32) as u32]
}

/// The tree's own numbers for ids.
fn ids(of: Ids, inner: impl Fn(u32) -> u32) -> Ids {
    Ids {
        real: inner(of.real),
        effective: inner(of.effective),
        saved: inner(of.saved),
        filesystem: inner(of.filesystem),
    }
}

/// What a task of ours has in a user namespace in which these are the ids: `status` as we see it.
#[must_use]
pub fn inside(status: Status, users: &Users) -> Status {
    Status {
        uid: ids(status.uid, |id| users.user(id)),
        gid: ids(status.gid, |id| users.group(id)),
        groups: status.groups.iter().map(|id| users.group(*id)).collect(),
        ..status
    }
}

/// The credentials as an image entry, with the tree's own ids.
pub fn entry(status: &Status, securebits: At, answers: &Answers, users: &Users) -> CredsEntry {
    let (u, g) = (ids(status.uid, |id| users.user(id)), ids(status.gid, |id| users.group(id)));
    CredsEntry {
        uid: u.real,
        gid: g.real,
        euid: u.effective,
        egid: g.effective,
        suid: u.saved,
        sgid: g.saved,
        fsuid: u.filesystem,
        fsgid: g.filesystem,
        cap_inh: halves(status.cap_inheritable),
        cap_prm: halves(status.cap_permitted),
        cap_eff: halves(status.cap_effective),
        cap_bnd: halves(status.cap_bounding),
        secbits: u32::try_from(answers.result(securebits)).unwrap_or(0),
        groups: status.groups.iter().map(|id| users.group(*id)).collect(),
        lsm_profile: None,
        lsm_sockcreate: None,
        apparmor_data: None,
        no_new_privs: status.no_new_privs.then_some(1),
        cap_amb: halves(status.cap_ambient),
    }
}

fn whole(half: &[u32], what: &str) -> Result<u64> {
    match half {
        [] => Ok(0),
        [low] => Ok(u64::from(*low)),
        [low, high] => Ok(u64::from(*low) | u64::from(*high) << 32),
        _ => Err(Error::lie("core", format!("{what} capabilities of {} words", half.len()))),
    }
}

fn capset(eff: u64, prm: u64, inh: u64, plan: &mut Plan) {
    const VERSION_3: u32 = 0x2008_0522;
    let header = plan.words(&[u64::from(VERSION_3)]);
    let words = [eff as u32, prm as u32, inh as u32, (eff >> 32) as u32, (prm >> 32) as u32, (inh >> 32) as u32];
    let data = plan.bytes(&words.map(u32::to_le_bytes).concat());
    plan.call("capabilities", libc::SYS_capset, &[header.into(), data.into()]);
}

/// What `now` may have takes effect again, in a task whose effective user was changed.
pub fn take_permitted(now: &Status, plan: &mut Plan) {
    capset(now.cap_permitted, now.cap_permitted, now.cap_inheritable, plan);
}

/// Adds to `plan` what turns the credentials `now` (those of the engine, which its tasks are born with) into the image's.
pub fn restore(e: &CredsEntry, now: &Status, plan: &mut Plan) -> Result<()> {
    let label = "credentials";
    let (inh, prm, eff) =
        (whole(&e.cap_inh, "inheritable")?, whole(&e.cap_prm, "permitted")?, whole(&e.cap_eff, "effective")?);
    let (bnd, amb) = (whole(&e.cap_bnd, "bounding")?, whole(&e.cap_amb, "ambient")?);
    let valid = now.cap_bounding | now.cap_permitted;
    if prm & !valid != 0 {
        let missing: Vec<_> = (0..CAPS).filter(|c| (prm & !valid) >> c & 1 == 1).map(|c| c.to_string()).collect();
        return Err(Error::Usage {
            what: format!(
                "the task has capabilities that this process lacks (numbers {}); restore with them",
                missing.join(", ")
            ),
        });
    }
    if e.groups != now.groups {
        let list: Vec<u8> = e.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
        let data = plan.bytes(&list);
        plan.call("supplementary groups", libc::SYS_setgroups, &[e.groups.len().into(), data.into()]);
    }
    let ids = Ids { real: e.uid, effective: e.euid, saved: e.suid, filesystem: e.fsuid };
    let gids = Ids { real: e.gid, effective: e.egid, saved: e.sgid, filesystem: e.fsgid };
    let ids_change = ids != now.uid || gids != now.gid;
    if ids_change {
        plan.call("securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS.into(), SECBIT_NO_SETUID_FIXUP.into()]);
        plan.call("group ids", libc::SYS_setresgid, &[gids.real.into(), gids.effective.into(), gids.saved.into()]);
        plan.call("group id for files", libc::SYS_setfsgid, &[gids.filesystem.into()]);
        plan.call("user ids", libc::SYS_setresuid, &[ids.real.into(), ids.effective.into(), ids.saved.into()]);
        plan.call("user id for files", libc::SYS_setfsuid, &[ids.filesystem.into()]);
    }
    for cap in (0..CAPS).filter(|c| now.cap_bounding >> c & 1 == 1 && bnd >> c & 1 == 0) {
        plan.call("bounding set", libc::SYS_prctl, &[PR_CAPBSET_DROP.into(), cap.into(), 0.into(), 0.into(), 0.into()]);
    }
    if ids_change || e.secbits != 0 {
        plan.call("securebits", libc::SYS_prctl, &[PR_SET_SECUREBITS.into(), e.secbits.into()]);
    }
    let eff_now = if ids_change { !0 } else { now.cap_effective };
    if ids_change || (inh, prm, eff) != (now.cap_inheritable, now.cap_permitted, eff_now) {
        capset(eff, prm, inh, plan);
    }
    for cap in (0..CAPS).filter(|c| amb >> c & 1 == 1) {
        let args = [PR_CAP_AMBIENT.into(), PR_CAP_AMBIENT_RAISE.into(), cap.into(), 0.into(), 0.into()];
        plan.call("ambient capabilities", libc::SYS_prctl, &args);
    }
    if e.no_new_privs.unwrap_or(0) != 0 {
        plan.call(label, libc::SYS_prctl, &[PR_SET_NO_NEW_PRIVS.into(), 1.into(), 0.into(), 0.into(), 0.into()]);
    }
    Ok(())
}
