//! Registrations for expedited memory barriers.

use super::support::*;

const REGISTER_GLOBAL: i32 = 1 << 2;
const PRIVATE_EXPEDITED: i32 = 1 << 3;
const REGISTER_PRIVATE: i32 = 1 << 4;
const SYNC_CORE: i32 = 1 << 5;
const REGISTER_SYNC_CORE: i32 = 1 << 6;
const GET_REGISTRATIONS: i32 = 1 << 9;

fn membarrier(command: i32) -> i64 {
    unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) }
}

/// They hold, and what was not asked for is still refused.
pub(super) fn registrations() {
    sys(membarrier(REGISTER_GLOBAL));
    sys(membarrier(REGISTER_PRIVATE));
    let core = membarrier(REGISTER_SYNC_CORE) == 0;
    let before = membarrier(GET_REGISTRATIONS);
    ready();
    check_eq!(membarrier(GET_REGISTRATIONS), before);
    sys(membarrier(PRIVATE_EXPEDITED));
    if core {
        sys(membarrier(SYNC_CORE));
    }
}
