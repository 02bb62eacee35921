//! What the two sides of a migration say to each other.
//!
//! ```text
//! greeting   "standstill migrate 1\n", by who connects
//! message    u32 size (little-endian, at most 1 MiB), then so many bytes of JSON: an object with the field "say"
//! ```
//!
//! With `--tls` all of this goes through TLS, with the certificates and checks of page servers ([`crate::transfer::tls`]).
//!
//! After [`Message::Images`] comes a stream of images ([`standstill_images::store::stream`]), which says itself where it ends.
//! Unknown fields of a message are ignored, an unknown message is an error.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::lock;
use crate::error::{Call, Error, Result};
use crate::needs::Needs;
use crate::options::Options;
use crate::transfer::link::{Link, Side};

const GREETING: &[u8; 21] = b"standstill migrate 1\n";
/// The longest message.
const LONGEST: usize = 1 << 20;
/// How long the other side may say nothing. Who works long says so in between ([`Message::Working`]).
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How the tree is to be restored: what was asked of the dump.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Request {
    /// Established TCP connections are carried.
    pub tcp_established: bool,
    /// Locks on files are carried.
    pub file_locks: bool,
    /// Unix sockets may have their other end outside of the tree.
    pub ext_unix_sk: bool,
    /// Deleted files may be linked back.
    pub link_remap: bool,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "kebab-case")]
pub enum Message {
    /// A tree is to come, if what it needs is there.
    Hello {
        /// Which migration.
        id: String,
        /// What it needs.
        needs: Box<Needs>,
        /// How it is to be restored.
        request: Request,
    },
    /// It may come.
    Ready,
    /// It may not: all that is missing.
    Lacking {
        /// In words, one for each.
        reasons: Vec<String>,
    },
    /// So many bytes follow, for no other purpose than to be timed.
    Probe {
        /// How many.
        size: u32,
    },
    /// A stream of images follows.
    Images {
        /// Their folder's name.
        name: String,
        /// The pass that they build on.
        parent: Option<String>,
        /// The tree stands still, and these are to be restored.
        last: bool,
        /// Pages that are not in them are given over a connection of their own ([`Message::Pages`]).
        #[serde(default)]
        late: bool,
    },
    /// From here on this connection is one of a page server's ([`crate::transfer::wire`]), which is who connected.
    Pages {
        /// Which migration.
        id: String,
    },
    /// They, or the bytes of a probe, have arrived.
    Arrived,
    /// It goes on.
    Working,
    /// The tree is whole and is held.
    Prepared,
    /// It did not work, and nothing is left of it.
    Failed {
        /// Why.
        what: String,
    },
    /// The source's tree has ended: the destination's is the one.
    Commit {
        /// Which migration.
        id: String,
    },
    /// The source's tree goes on: the destination's is to end.
    Abort {
        /// Which migration.
        id: String,
    },
    /// The destination's tree runs.
    Running {
        /// The root's process id there.
        pid: i32,
    },
    /// The destination's tree has ended, and its images are removed.
    Ended,
}

/// A connection to the other side. A copy is the same connection. It is heard in one thread at a time; messages of several
/// threads do not mix.
#[derive(Clone)]
pub struct Channel {
    link: Arc<Link>,
    sending: Arc<Mutex<()>>,
    peer: String,
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Channel({})", self.peer)
    }
}

impl Channel {
    /// Calls the other side; `options` say whether it is encrypted, and how.
    pub fn connect(to: &str, limit: Duration, options: &Options) -> Result<Channel> {
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in to.to_socket_addrs().call("getaddrinfo")? {
            match TcpStream::connect_timeout(&address, limit) {
                Ok(stream) => {
                    let mut channel = Channel::new(stream, to, options, Side::Client, PATIENCE)?;
                    channel.write_all(GREETING).call("send")?;
                    return Ok(channel);
                }
                Err(e) => last = e,
            }
        }
        Err(last).call("connect")
    }

    /// Takes a call.
    pub fn accept(stream: TcpStream, options: &Options) -> Result<Channel> {
        let peer = stream.peer_addr().map_or_else(|_| "somebody".to_owned(), |a| a.to_string());
        let mut channel = Channel::new(stream, &peer, options, Side::Server, PATIENCE)?;
        let mut greeting = [0; GREETING.len()];
        channel.read_exact(&mut greeting).call("recv")?;
        match &greeting == GREETING {
            true => Ok(channel),
            false => Err(Error::Usage { what: format!("{peer} does not speak of migrations") }),
        }
    }

    fn new(stream: TcpStream, peer: &str, options: &Options, side: Side, patience: Duration) -> Result<Channel> {
        // who is called is known by the host that was named; who calls, by those who signed for him
        let host = peer.rsplit_once(':').map(|(host, _)| host.trim_matches(['[', ']']).to_owned());
        let options = match side {
            Side::Client => Options { address: host, ..options.clone() },
            Side::Server => Options { tls_no_cn_verify: true, ..options.clone() },
        };
        let link = Link::patient(stream.into(), &options, side, Some(patience))?;
        Ok(Channel { link: Arc::new(link), sending: Arc::default(), peer: peer.to_owned() })
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Says something.
    pub fn say(&mut self, message: &Message) -> Result<()> {
        let body = serde_json::to_vec(message).map_err(io::Error::from).call("a message")?;
        let size = u32::try_from(body.len()).ok().filter(|n| *n as usize <= LONGEST);
        let size = size.ok_or_else(|| Error::Usage { what: "a message that is too long".into() })?;
        let mut bytes = size.to_le_bytes().to_vec();
        bytes.extend(body);
        self.write_all(&bytes).call("send")
    }

    /// Hears what the other side says; none if it hangs up instead.
    pub fn hear(&mut self) -> Result<Option<Message>> {
        let mut first = [0];
        match self.read(&mut first).call("recv")? {
            0 => Ok(None),
            _ => self.rest(first[0]).map(Some),
        }
    }

    /// The same, if it says something at once.
    pub fn hear_at_once(&mut self) -> Result<Heard> {
        let mut first = [0];
        match self.link.some_now(&mut first).call("recv")? {
            None => Ok(Heard::Nothing),
            Some(0) => Ok(Heard::End),
            Some(_) => self.rest(first[0]).map(Heard::Message),
        }
    }

    /// What it goes over, for another use.
    pub fn link(&self) -> Arc<Link> {
        self.link.clone()
    }

    /// Until it says something, or some time has passed.
    pub fn wait_briefly(&self) {
        self.link.wait_briefly();
    }

    fn rest(&mut self, first: u8) -> Result<Message> {
        let mut others = [0; 3];
        self.read_exact(&mut others).call("recv")?;
        let size = u32::from_le_bytes([first, others[0], others[1], others[2]]) as usize;
        if size > LONGEST {
            return Err(Error::Usage { what: format!("{} says something of {size} bytes", self.peer) });
        }
        let mut body = vec![0; size];
        self.read_exact(&mut body).call("recv")?;
        parse(&body).map_err(|what| Error::Usage { what: format!("{} says what is no message: {what}", self.peer) })
    }

    /// Hears what comes of something that may take long, [`Message::Failed`] too.
    pub fn outcome(&mut self) -> Result<Message> {
        loop {
            match self.hear()? {
                Some(Message::Working) => {}
                Some(message) => return Ok(message),
                None => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).call("recv"),
            }
        }
    }

    /// The same; that it failed is an error.
    pub fn answer(&mut self) -> Result<Message> {
        match self.outcome()? {
            Message::Failed { what } => Err(Error::Usage { what: format!("{} says: {what}", self.peer) }),
            message => Ok(message),
        }
    }

    /// Hears an answer that can be only one.
    pub fn expect(&mut self, wanted: &Message) -> Result<()> {
        match self.answer()? {
            message if message == *wanted => Ok(()),
            other => Err(self.nonsense(&other)),
        }
    }

    /// What it said has no place here.
    pub fn nonsense(&self, message: &Message) -> Error {
        Error::Usage { what: format!("{} says what has no place here: {message:?}", self.peer) }
    }
}

/// A message from its JSON.
pub fn parse(body: &[u8]) -> std::result::Result<Message, String> {
    serde_json::from_slice(body).map_err(|e| e.to_string())
}

/// What was heard without waiting.
#[derive(Debug)]
pub enum Heard {
    /// Nothing so far.
    Nothing,
    /// The other side has hung up.
    End,
    /// This.
    Message(Message),
}

impl Read for Channel {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.link.some(buffer)
    }
}

impl Write for Channel {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _one = lock(&self.sending);
        self.link.send_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn pair() -> (Channel, Channel) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let there =
            std::thread::spawn(move || Channel::accept(listener.accept().unwrap().0, &Options::default()).unwrap());
        let here = Channel::connect(&to, PATIENCE, &Options::default()).unwrap();
        (here, there.join().unwrap())
    }

    #[test]
    fn messages_arrive() {
        let (mut here, mut there) = pair();
        assert!(matches!(there.hear_at_once().unwrap(), Heard::Nothing));
        let message = Message::Images { name: "last".into(), parent: None, last: true, late: false };
        here.say(&message).unwrap();
        assert_eq!(there.hear().unwrap(), Some(message));
        for said in [Message::Working, Message::Working, Message::Prepared] {
            there.say(&said).unwrap();
        }
        here.expect(&Message::Prepared).unwrap();
        there.say(&Message::Failed { what: "no room".into() }).unwrap();
        assert!(here.answer().unwrap_err().chain().contains("no room"));
        there.say(&Message::Ended).unwrap();
        assert!(here.expect(&Message::Arrived).unwrap_err().chain().contains("no place here"));
        drop(there);
        assert_eq!(here.hear().unwrap(), None);
        assert!(here.answer().is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        let (mut here, mut there) = pair();
        here.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(there.hear().unwrap_err().chain().contains("4294967295 bytes"));
        let (mut here, mut there) = pair();
        here.write_all(b"\x02\0\0\0{}").unwrap();
        assert!(there.hear().unwrap_err().chain().contains("no message"));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n\r\n\r\n").unwrap();
        assert!(Channel::accept(listener.accept().unwrap().0, &Options::default())
            .unwrap_err()
            .chain()
            .contains("does not speak"));
    }

    /// While one thread waits for what is said, others say something.
    #[test]
    fn both_directions() {
        let (mut here, mut there) = pair();
        std::thread::scope(|scope| {
            let mut waits = here.clone();
            let heard = scope.spawn(move || waits.hear());
            for _ in 0..100 {
                here.say(&Message::Working).unwrap();
                assert_eq!(there.hear().unwrap(), Some(Message::Working));
            }
            there.say(&Message::Arrived).unwrap();
            assert_eq!(heard.join().unwrap().unwrap(), Some(Message::Arrived));
        });
    }

    #[test]
    fn silence_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let patience = Duration::from_millis(200);
        let mut here = Channel::new(stream, "there:1", &Options::default(), Side::Client, patience).unwrap();
        assert!(here.hear().unwrap_err().chain().contains("has said nothing"));
    }
}
