//! Which capabilities we have, and what to do about those that are missing.
//!
//! Man pages: capabilities(7), proc_pid_status(5).

use super::{print, Verb};
use crate::options::{Options, Persona};
use std::ffi::OsStr;

const CAP_SYS_PTRACE: u32 = 19;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_CHECKPOINT_RESTORE: u32 = 40;

/// Capabilities that a dump or restore uses, with what cannot be done without them.
const WANTED: &[(u32, &str, &str)] = &[
    (CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "stop and read tasks of other users"),
    (12, "CAP_NET_ADMIN", "carry TCP connections"),
    (18, "CAP_SYS_CHROOT", "restore a root folder"),
    (7, "CAP_SETUID", "restore users"),
    (6, "CAP_SETGID", "restore groups"),
];

/// The effective set, as the kernel shows it; nothing if that cannot be read.
pub fn effective() -> u64 {
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("CapEff:"));
    line.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

/// May this verb be tried? If not, says what is missing.
pub fn enough(verb: Verb, options: &Options, program: &OsStr) -> bool {
    let caps = effective();
    let has = |cap: u32| caps & (1 << cap) != 0;
    let root = nix::unistd::geteuid().is_root();
    let program = super::shown(program);
    let either = has(CAP_CHECKPOINT_RESTORE) || has(CAP_SYS_ADMIN);
    if options.personality == Persona::Criu {
        if !either {
            print("CRIU needs to have the CAP_SYS_ADMIN or the CAP_CHECKPOINT_RESTORE capability: \n");
            print(&format!("setcap cap_checkpoint_restore+eip {program}\n"));
        } else if !root && !options.unprivileged {
            print("Running as non-root requires '--unprivileged'\n");
            print("Please consult the documentation for limitations when running as non-root\n");
        }
        return either && (root || options.unprivileged);
    }
    // the others only look, or read and write files
    if !matches!(verb, Verb::Dump | Verb::PreDump | Verb::Restore) {
        return true;
    }
    if !either {
        tracing::error!(
            "CAP_CHECKPOINT_RESTORE is missing (CAP_SYS_ADMIN would do): run as root, or once as root: \
             setcap cap_checkpoint_restore,cap_sys_ptrace+eip {program}"
        );
        return false;
    }
    for (_, name, what) in WANTED.iter().filter(|(cap, ..)| !has(*cap)) {
        tracing::warn!("{name} is missing: cannot {what}");
    }
    true
}
