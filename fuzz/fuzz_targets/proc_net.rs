//! `/proc/net/unix`, `netlink` and `packet`: each reads what the others would be given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill::proc::net;

fuzz_target!(|text: &[u8]| {
    let _ = net::parse_unix(text);
    let _ = net::parse_netlink(text);
    let _ = net::parse_packet(text);
    let _ = net::parse_ping(text);
    let _ = net::parse_igmp(text);
    let _ = net::parse_igmp6(text);
});
