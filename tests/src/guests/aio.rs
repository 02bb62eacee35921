//! Contexts of asynchronous input and output.

use std::fs::File;
use std::os::fd::AsRawFd as _;

use super::support::*;

/// struct iocb.
#[repr(C)]
#[derive(Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: i32,
    opcode: u16,
    priority: i16,
    fd: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    event: u32,
}

const WRITE: u16 = 1;

/// struct io_event.
#[repr(C)]
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    more: i64,
}

struct Context(u64);

impl Context {
    fn new(requests: u32) -> Context {
        let mut context = 0u64;
        unsafe { sys(libc::syscall(libc::SYS_io_setup, requests, &raw mut context)) };
        Context(context)
    }

    fn submit(&self, file: &File, data: u64) {
        static BYTE: u8 = b'x';
        let buffer = std::ptr::from_ref(&BYTE) as u64;
        let request =
            Request { data, opcode: WRITE, fd: file.as_raw_fd() as u32, buffer, bytes: 1, ..Request::default() };
        let list = [&raw const request];
        check_eq!(unsafe { libc::syscall(libc::SYS_io_submit, self.0, 1, list.as_ptr()) }, 1);
    }

    fn fetch(&self, most: usize) -> Vec<u64> {
        let mut events = [Event::default(); 64];
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let most = most.min(64);
        let n =
            unsafe { sys(libc::syscall(libc::SYS_io_getevents, self.0, 0, most, events.as_mut_ptr(), &raw const now)) };
        events[..n as usize].iter().inspect(|e| check_eq!(e.result, 1)).map(|e| e.data).collect()
    }

    /// Size, head, tail.
    fn ring(&self) -> [u32; 3] {
        let ring = self.0 as *const u32;
        unsafe { [1, 2, 3].map(|n| ring.add(n).read_volatile()) }
    }
}

/// One that was never used, one with events that nobody has fetched, one whose ring has gone round, one that was destroyed
/// before; in a child too.
pub(super) fn contexts() {
    let null = did(File::options().write(true).open("/dev/null"));
    let gone = Context::new(8);
    let (fresh, some, round) = (Context::new(64), Context::new(10), Context::new(16));
    unsafe { sys(libc::syscall(libc::SYS_io_destroy, gone.0)) };
    (0..5).for_each(|n| some.submit(&null, n));
    check_eq!(some.fetch(2), [0, 1]);
    let [size, ..] = round.ring();
    let total = u64::from(size) + u64::from(size) / 2;
    for n in 0..total {
        round.submit(&null, n);
        if n >= 70 {
            check_eq!(round.fetch(1), [n - 70]);
        }
    }
    let [_, head, tail] = round.ring();
    check!(tail < head);
    let shared = Shared::new();
    let child = fork(|| {
        let own = Context::new(4);
        own.submit(&null, 77);
        shared.set(0, 1);
        shared.wait(1, 1);
        i32::from(own.fetch(4) != [77])
    });
    shared.wait(0, 1);
    let before = [&fresh, &some, &round].map(Context::ring);
    ready();
    check_eq!([&fresh, &some, &round].map(Context::ring), before);
    check!(fresh.fetch(4).is_empty());
    fresh.submit(&null, 9);
    check_eq!(fresh.fetch(4), [9]);
    check_eq!(some.fetch(64), [2, 3, 4]);
    let mut all = Vec::new();
    while all.len() < 70 {
        all.extend(round.fetch(64));
    }
    check_eq!(all, (total - 70..total).collect::<Vec<_>>());
    for n in 0..3 * u64::from(size) {
        round.submit(&null, n);
        check_eq!(round.fetch(64), [n]);
    }
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}
