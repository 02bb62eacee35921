//! Messages to and from an RPC peer: a unix socket of type seqpacket, one protobuf message a packet, no frame around it.
//!
//! What comes is believed in nothing: a packet that is not a request is an error, and no memory is taken for more than a
//! packet can hold. What goes stays under 1 KiB, since clients read into buffers of that size: a message that is too long
//! is cut. Fields that we do not know are warned of by number; a later client may have asked for something in them.
//!
//! Man pages: unix(7), recv(2).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::MsgFlags;
use prost::Message as _;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use standstill_images::proto::{CriuReq, CriuResp};

use super::Fault;

/// More than a request is long, less than would hurt.
const REQUEST_LIMIT: usize = 4 << 20;
/// The longest answer.
const ANSWER_LIMIT: usize = 1023;

/// A connection to one who asks.
#[derive(Debug)]
pub struct Connection(OwnedFd);

/// A request as bytes; an error says why it is none.
pub fn decode(bytes: &[u8]) -> Result<CriuReq, Fault> {
    let request = CriuReq::decode(bytes).map_err(|e| Fault::bad(format!("not a request: {e}")))?;
    for field in standstill_images::unknown_fields("criu_req", bytes) {
        tracing::warn!("the request has a field that is not known: {field}");
    }
    Ok(request)
}

/// An answer as bytes, short enough, its message on one line.
pub fn encode(mut answer: CriuResp) -> Vec<u8> {
    if let Some(text) = &mut answer.cr_errmsg {
        *text = text.trim().replace(|c: char| c.is_control(), " ");
    }
    let excess = answer.encoded_len().saturating_sub(ANSWER_LIMIT);
    if let Some(text) = answer.cr_errmsg.as_mut().filter(|_| excess > 0) {
        let mark = "…";
        let mut keep = text.len().saturating_sub(excess + mark.len());
        while !text.is_char_boundary(keep) {
            keep -= 1;
        }
        text.truncate(keep);
        text.push_str(mark);
    }
    answer.encode_to_vec()
}

impl Connection {
    /// Takes a socket that is connected.
    pub fn new(socket: OwnedFd) -> Connection {
        Connection(socket)
    }

    /// The socket.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// The next request; `None` when the peer is gone.
    pub fn receive(&self) -> Result<Option<CriuReq>, Fault> {
        let lost = |e: nix::errno::Errno| Fault::plain(format!("Can't read request: {}", e.desc()));
        let recv = |buffer: &mut [u8], flags| loop {
            match nix::sys::socket::recv(self.0.as_raw_fd(), buffer, flags) {
                Err(nix::errno::Errno::EINTR) => {}
                Err(nix::errno::Errno::ECONNRESET) => return Ok(0),
                other => return other.map_err(lost),
            }
        };
        let len = recv(&mut [], MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC)?;
        if len > REQUEST_LIMIT {
            return Err(Fault::bad(format!("a request of {len} bytes is too long")));
        }
        let mut bytes = vec![0; len];
        let len = recv(&mut bytes, MsgFlags::MSG_TRUNC)?;
        if len == 0 {
            tracing::info!("Client exited unexpectedly");
            return Ok(None);
        }
        decode(&bytes).map(Some)
    }

    /// Sends an answer, and a descriptor with it if there is one.
    pub fn send(&self, answer: CriuResp, file: Option<BorrowedFd<'_>>) -> Result<(), Fault> {
        let bytes = encode(answer);
        let files: Vec<BorrowedFd<'_>> = file.into_iter().collect();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return Err(Fault::plain("Can't send a descriptor".into()));
        }
        let packet = [std::io::IoSlice::new(&bytes)];
        let sent = rustix::net::sendmsg(&self.0, &packet, &mut control, SendFlags::NOSIGNAL);
        sent.map(drop).map_err(|e| Fault::plain(format!("Can't send response: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_short_and_their_text_is_one_line() {
        for len in [0, 10, 900, 960, 1000, 5000, 100_000] {
            let text = format!("two\nlines {}", "ä".repeat(len));
            let bytes = encode(CriuResp { cr_errmsg: Some(text), cr_errno: Some(3), ..CriuResp::default() });
            assert!(bytes.len() <= ANSWER_LIMIT, "{len}: {}", bytes.len());
            let back = CriuResp::decode(bytes.as_slice()).unwrap();
            let text = back.cr_errmsg.unwrap();
            assert!(text.starts_with("two lines") && !text.contains('\n'), "{text}");
            assert_eq!(text.ends_with('…'), len > 500);
        }
    }

    #[test]
    fn what_is_no_request() {
        for bytes in [&[0xff, 0xff, 0xff, 0xff, 0xff][..], &[0x08], &[0x12, 0x7f, 0x08]] {
            assert_eq!(decode(bytes).unwrap_err().errno, Some(libc::EBADRQC), "{bytes:?}");
        }
        assert_eq!(decode(&[]).unwrap().r#type, 0);
        assert_eq!(decode(&[0x08, 0x63]).unwrap().r#type, 0x63);
        let unknown = standstill_images::unknown_fields("criu_req", &[0x08, 1, 0x12, 3, 0xf8, 0x07, 1, 0x78, 2]);
        assert_eq!(unknown, ["criu_opts.127", "criu_req.15"]);
    }
}
