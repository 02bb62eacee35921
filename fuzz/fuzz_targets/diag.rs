//! Answers of NETLINK_SOCK_DIAG: the first byte says of which kind.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::sys::diag::{inet, netlink, packet, unix, wire};

const SEQUENCE: u32 = 1;

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, datagram)) = bytes.split_first() else { return };
    match kind % 4 {
        0 => check(datagram, unix::parse, |socket| {
            let _ = socket.address();
        }),
        1 => check(datagram, inet::parse, |_| ()),
        2 => check(datagram, netlink::parse, |_| ()),
        _ => check(datagram, packet::parse, |_| ()),
    }
});

fn check<T>(datagram: &[u8], read: fn(&[u8]) -> Result<T, wire::Malformed>, look: fn(&T)) {
    let mut sockets = Vec::new();
    let _ = wire::parse_datagram(datagram, SEQUENCE, read, &mut sockets);
    assert!(sockets.len() <= datagram.len() / 16);
    sockets.iter().for_each(look);
    let _ = read(datagram);
}
