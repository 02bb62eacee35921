//! What prctl(2) and personality(2) say of a process, and its names.

use super::support::*;

/// Persona, dumpable, the parent's death signal, huge pages.
pub(super) fn personality() {
    let shared = Shared::new();
    let get = |option| {
        let mut value = 0i32;
        unsafe { sys(libc::prctl(option, &raw mut value, 0, 0, 0)) };
        value
    };
    let set = |option, value: u64| {
        unsafe { sys(libc::prctl(option, value, 0, 0, 0)) };
    };
    let child = fork(|| {
        set(libc::PR_SET_PDEATHSIG, libc::SIGUSR2 as u64);
        set(libc::PR_SET_THP_DISABLE, 1);
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!(get(libc::PR_GET_PDEATHSIG), libc::SIGUSR2);
        check_eq!(unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) }, 1);
        0
    });
    shared.wait(0, 1);
    unsafe { sys(libc::personality((libc::ADDR_NO_RANDOMIZE | libc::UNAME26) as u64)) };
    set(libc::PR_SET_CHILD_SUBREAPER, 1);
    set(libc::PR_SET_DUMPABLE, 0);
    ready();
    check_eq!(unsafe { libc::personality(0xffff_ffff) }, libc::ADDR_NO_RANDOMIZE | libc::UNAME26);
    check_eq!(unsafe { libc::prctl(libc::PR_GET_DUMPABLE, 0, 0, 0, 0) }, 0);
    check_eq!(get(libc::PR_GET_CHILD_SUBREAPER), 1);
    check_eq!(unsafe { libc::prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0) }, 0);
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}

/// Names: of the process and its threads, command line, environment, program, and the kernel's gift to it.
pub(super) fn names() {
    let shared = Shared::new();
    let name = |name: &std::ffi::CStr| {
        unsafe { sys(libc::prctl(libc::PR_SET_NAME, name.as_ptr(), 0, 0, 0)) };
    };
    let thread = std::thread::spawn(move || {
        name(c"a ) (thread");
        shared.set(0, 1);
        shared.wait(1, 1);
        check_eq!(proc_self("comm"), "a ) (thread\n");
    });
    shared.wait(0, 1);
    name(c"its own name");
    let facts = || {
        let bytes = |name: &str| did(std::fs::read(format!("/proc/self/{name}")));
        (bytes("cmdline"), bytes("environ"), bytes("auxv"), bytes("comm"), did(std::fs::read_link("/proc/self/exe")))
    };
    let before = facts();
    check!(!before.0.is_empty() && !before.2.is_empty());
    ready();
    check_eq!(facts(), before);
    shared.set(1, 1);
    check!(thread.join().is_ok());
}
