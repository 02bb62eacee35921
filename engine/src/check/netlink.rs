//! The few netlink questions of a check: a request out, its acknowledgement in.
//!
//! Man pages: netlink(7), rtnetlink(7), sock_diag(7).

use nix::errno::Errno;
use nix::sys::socket::{
    recv, sendto, setsockopt, socket, sockopt, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType,
};
use nix::sys::time::TimeVal;
use std::os::fd::AsRawFd as _;

/// Asks, and wants an answer.
const REQUEST_ACK: u16 = 1 | 4;
/// Asks for all there is.
const REQUEST_DUMP: u16 = 1 | 0x300;
const ERROR: u16 = 2;
const DONE: u16 = 3;

/// An attribute, padded to four bytes.
pub(super) fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    let mut out = [len.to_ne_bytes(), kind.to_ne_bytes()].concat();
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// A message.
pub(super) fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut out = len.to_ne_bytes().to_vec();
    out.extend(kind.to_ne_bytes());
    out.extend(flags.to_ne_bytes());
    out.extend(sequence.to_ne_bytes());
    out.extend([0; 4]);
    out.extend_from_slice(body);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

/// A request that is acknowledged.
pub(super) fn request(kind: u16, extra_flags: u16, body: &[u8]) -> Vec<u8> {
    message(kind, REQUEST_ACK | extra_flags, 1, body)
}

/// A request for a list.
pub(super) fn dump_request(kind: u16, body: &[u8]) -> Vec<u8> {
    message(kind, REQUEST_DUMP, 1, body)
}

/// Sends, and waits for the first error, the end of a list, or the acknowledgement. Data on the way goes to `look`.
pub(super) fn ask(protocol: SockProtocol, bytes: &[u8], mut look: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
    let sk = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    // the kernel answers at once; this only keeps a check from hanging for ever
    setsockopt(&sk, sockopt::ReceiveTimeout, &TimeVal::new(2, 0))?;
    sendto(sk.as_raw_fd(), bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
    let mut buf = vec![0u8; 64 << 10];
    loop {
        let len = match recv(sk.as_raw_fd(), &mut buf, MsgFlags::empty()) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        let mut rest = &buf[..len];
        while let Some(head) = rest.first_chunk::<16>() {
            let [a, b, c, d, e, f, ..] = *head;
            let size = usize::try_from(u32::from_ne_bytes([a, b, c, d])).unwrap_or(usize::MAX);
            let body = rest.get(16..size).ok_or(Errno::EBADMSG)?;
            match u16::from_ne_bytes([e, f]) {
                ERROR => {
                    let code = body.first_chunk::<4>().map_or(0, |c| i32::from_ne_bytes(*c));
                    return if code == 0 { Ok(()) } else { Err(Errno::from_raw(code.saturating_neg())) };
                }
                DONE => return Ok(()),
                kind => look(kind, body),
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
    }
}
