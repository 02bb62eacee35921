//! Interest lists.

use super::pipes::{pipe, read, write};
use super::support::*;

fn events(epoll: i32) -> Vec<(u32, u64)> {
    let mut all = [libc::epoll_event { events: 0, u64: 0 }; 16];
    let n = unsafe { sys(libc::epoll_wait(epoll, all.as_mut_ptr(), 16, 0)) };
    let mut seen: Vec<(u32, u64)> = all[..n as usize].iter().map(|e| (e.events, e.u64)).collect();
    seen.sort_unstable_by_key(|e| e.1);
    seen
}

/// Edge and level triggered, one-shot, one inside another, a copy that is closed, a file that is watched under another
/// number.
pub(super) fn epoll() {
    let (input, edge, once) = (libc::EPOLLIN as u32, libc::EPOLLET as u32, libc::EPOLLONESHOT as u32);
    let epoll = unsafe { sys(libc::epoll_create1(libc::EPOLL_CLOEXEC)) };
    let outer = unsafe { sys(libc::epoll_create1(0)) };
    let add = |to: i32, fd: i32, events: u32, data: u64| {
        let mut event = libc::epoll_event { events, u64: data };
        unsafe { sys(libc::epoll_ctl(to, libc::EPOLL_CTL_ADD, fd, &raw mut event)) };
    };
    let (level, edges, shots, quiet) = (pipe(0), pipe(0), pipe(0), pipe(0));
    add(epoll, level.0, input, 0xabcd_ef12_3456_7801);
    add(epoll, edges.0, input | edge, 2);
    add(epoll, shots.0, input | once, 3);
    add(epoll, quiet.0, 0, 4);
    add(outer, epoll, input, 5);
    write(level.1, b"x");
    write(shots.1, b"x");
    // the one-shot is spent
    check_eq!(events(epoll).len(), 2);
    ready();
    check_eq!(events(outer), vec![(input, 5)]);
    let now = events(epoll);
    check_eq!(now, vec![(input, 0xabcd_ef12_3456_7801)]);
    write(edges.1, b"x");
    check_eq!(events(epoll), vec![(input, 2), (input, 0xabcd_ef12_3456_7801)]);
    check_eq!(events(epoll), vec![(input, 0xabcd_ef12_3456_7801)]);
    check_eq!(read(level.0), Ok(b"x".to_vec()));
    check_eq!(events(epoll), vec![]);
    unsafe { libc::close(quiet.1) };
    check_eq!(events(epoll), vec![(libc::EPOLLHUP as u32, 4)]);
    let mut event = libc::epoll_event { events: input, u64: 33 };
    unsafe { sys(libc::epoll_ctl(epoll, libc::EPOLL_CTL_MOD, shots.0, &raw mut event)) };
    check!(events(epoll).contains(&(input, 33)));
}
