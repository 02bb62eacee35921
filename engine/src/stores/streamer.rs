//! `--stream`: images to and from a streamer, as criu-image-streamer is one.
//!
//! The streamer listens on a socket in the image folder: `streamer-capture.sock` for a dump, `streamer-serve.sock` for a
//! restore. All requests go over one connection, one after another: u32 size, little-endian, then a message of
//! `img-streamer.proto`.
//!
//! - Dump: a request with the image's name, then the end to read of a pipe (SCM_RIGHTS, beside one byte of data). The image is what
//!   is written into that pipe until it is closed; several may be open at a time.
//! - Restore: a request with the name; the answer says whether there is such an image. If there is, the end to write of a pipe is
//!   sent, and the image comes out of it. The streamer gives each image once and hears the next request when it is through with
//!   the one before, so each is taken whole and is held ([`HeldStore`]).
//!
//! No more images: the connection is closed. A streamer that fails says nothing; its pipes break. What it has kept, nobody
//! says either: a tree that is to be killed is killed when all was written. There are no chains: nothing asks for a parent.
//! As in [`super::channel`], nobody is waited for longer than `--timeout`.
//!
//! Statistics stay in the folder. `pre-stream` is told before the connection is made.
//!
//! Man pages: unix(7), pipe(7). Protocol: README.md and proto/criu/img-streamer.proto of
//! <https://github.com/checkpoint-restore/criu-image-streamer>.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, IoSlice, Read as _, Write};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::bytes::Bytes;
use prost::Message as _;
use rustix::event::PollFlags;
use rustix::fs::OFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::pipe::PipeFlags;
use standstill_images::store::held::HeldStore;
use standstill_images::{ImageOutput, ReadAt, Store};

use super::channel::{limit, patiently, Outlet};
use crate::error::{At, Call, Place, Result};
use crate::options::Options;

type ImageError = standstill_images::Error;
type ImageResult<T> = std::result::Result<T, ImageError>;

const CAPTURE: &str = "streamer-capture.sock";
const SERVE: &str = "streamer-serve.sock";
/// The largest answer that makes sense.
const LARGEST_REPLY: u32 = 1 << 10;
const BUFFER: usize = 256 << 10;

/// The name of an image that comes, or is wanted.
#[derive(Clone, PartialEq, prost::Message)]
struct Request {
    #[prost(string, required, tag = "1")]
    filename: String,
}

/// Whether there is the image that was wanted.
#[derive(Clone, PartialEq, prost::Message)]
struct Reply {
    #[prost(bool, required, tag = "1")]
    exists: bool,
}

/// The connection.
#[derive(Debug)]
struct Link {
    socket: UnixStream,
    limit: Option<Duration>,
}

fn failed<'a>(image: &'a str, operation: &'static str) -> impl FnOnce(io::Error) -> ImageError + 'a {
    move |source| ImageError::Io { image: image.to_owned(), operation, source }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // after a panic in the middle of a request the streamer finds it malformed
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Link {
    fn connect(opts: &Options, name: &'static str) -> Result<Link> {
        let path = opts.images_dir.join(name);
        // through the folder: an address has room for 108 bytes
        let folder = File::open(&opts.images_dir).call("open").at(Place::Path(opts.images_dir.clone()))?;
        let address = format!("/proc/self/fd/{}/{name}", folder.as_raw_fd());
        let socket = UnixStream::connect(address)
            .call("connect")
            .at(Place::Path(path))
            .at(Place::Step("Unable to connect to image streamer socket"))?;
        let limit = limit(opts);
        socket.set_nonblocking(true).call("fcntl(F_SETFL)")?;
        Ok(Link { socket, limit })
    }

    fn request(&mut self, name: &str) -> io::Result<()> {
        let message = Request { filename: name.to_owned() }.encode_to_vec();
        let size = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let bytes = [&size.to_le_bytes(), message.as_slice()].concat();
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let sent = patiently(self.socket.as_fd(), PollFlags::OUT, self.limit, || {
                Ok(rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL)?)
            })?;
            rest = &rest[sent..];
        }
        Ok(())
    }

    fn reply(&mut self) -> io::Result<bool> {
        let mut size = [0; 4];
        self.read_exact(&mut size)?;
        let size = u32::from_le_bytes(size);
        if size > LARGEST_REPLY {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut message = vec![0; usize::try_from(size).unwrap_or(0)];
        self.read_exact(&mut message)?;
        let reply = Reply::decode(message.as_slice()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(reply.exists)
    }

    fn read_exact(&mut self, mut room: &mut [u8]) -> io::Result<()> {
        while !room.is_empty() {
            match patiently(self.socket.as_fd(), PollFlags::IN, self.limit, || (&self.socket).read(room))? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => room = &mut std::mem::take(&mut room)[n..],
            }
        }
        Ok(())
    }

    fn give(&mut self, end: BorrowedFd<'_>) -> io::Result<()> {
        let ends = [end];
        patiently(self.socket.as_fd(), PollFlags::OUT, self.limit, || {
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(&ends));
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
            Ok(())
        })
    }
}

/// A pipe: the end to read, the end to write. Ours must not block; the streamer's is its own business.
fn pipe() -> io::Result<(File, File)> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    Ok((read.into(), write.into()))
}

fn do_not_block(end: &File) -> io::Result<()> {
    Ok(rustix::fs::fcntl_setfl(end, OFlags::NONBLOCK)?)
}

/// A streamer that takes the images of a dump.
pub(super) struct Capture {
    link: Mutex<Option<Link>>,
}

impl Capture {
    pub(super) fn connect(opts: &Options) -> Result<Capture> {
        Ok(Capture { link: Mutex::new(Some(Link::connect(opts, CAPTURE)?)) })
    }

    fn begin(&self, name: &str) -> io::Result<Outlet> {
        let mut link = held(&self.link);
        let link = link.as_mut().ok_or(io::ErrorKind::BrokenPipe)?;
        let (read, write) = pipe()?;
        do_not_block(&write)?;
        link.request(name)?;
        link.give(read.as_fd())?;
        Ok(Outlet::of_pipe(write, link.limit))
    }
}

impl Store for Capture {
    fn read(&self, name: &str) -> ImageResult<Bytes> {
        Err(ImageError::Missing { image: name.to_owned() })
    }

    fn open(&self, name: &str) -> ImageResult<Box<dyn ReadAt>> {
        Err(ImageError::Missing { image: name.to_owned() })
    }

    fn create(&self, name: &str) -> ImageResult<Box<dyn ImageOutput>> {
        let pipe = self.begin(name).map_err(failed(name, "send"))?;
        Ok(Box::new(Output { pipe }))
    }

    fn exists(&self, _: &str) -> ImageResult<bool> {
        Ok(false)
    }

    fn list(&self) -> ImageResult<Vec<String>> {
        Ok(Vec::new())
    }

    fn remove(&self, _: &str) -> ImageResult<()> {
        Ok(())
    }

    fn parent(&self) -> ImageResult<Option<Arc<dyn Store>>> {
        Ok(None)
    }

    /// There are no more images.
    fn commit(&self) -> ImageResult<()> {
        tracing::info!("Dismissing the image streamer");
        *held(&self.link) = None;
        Ok(())
    }
}

/// An image on its way.
struct Output {
    pipe: Outlet,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pipe.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for Output {
    fn finish(self: Box<Self>) -> ImageResult<()> {
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// A streamer that has the images of a restore.
pub(super) struct Serve {
    asked: Mutex<Asked>,
    store: HeldStore,
}

struct Asked {
    link: Link,
    missing: HashSet<String>,
}

impl Serve {
    pub(super) fn connect(opts: &Options) -> Result<Serve> {
        let link = Link::connect(opts, SERVE)?;
        Ok(Serve { asked: Mutex::new(Asked { link, missing: HashSet::new() }), store: HeldStore::new() })
    }

    /// Whether there is such an image; it is held then.
    fn fetch(&self, name: &str) -> ImageResult<bool> {
        let mut asked = held(&self.asked);
        if self.store.exists(name)? {
            return Ok(true);
        }
        if asked.missing.contains(name) {
            return Ok(false);
        }
        let failed = || failed(name, "receive");
        asked.link.request(name).map_err(failed())?;
        if !asked.link.reply().map_err(failed())? {
            asked.missing.insert(name.to_owned());
            return Ok(false);
        }
        let (read, write) = pipe().map_err(failed())?;
        do_not_block(&read).map_err(failed())?;
        asked.link.give(write.as_fd()).map_err(failed())?;
        drop(write);
        let mut output = self.store.create(name)?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let n = patiently(read.as_fd(), PollFlags::IN, asked.link.limit, || (&read).read(&mut buffer));
            match n.map_err(failed())? {
                0 => break,
                n => output.write_all(&buffer[..n]).map_err(failed())?,
            }
        }
        output.finish()?;
        Ok(true)
    }

    fn fetched(&self, name: &str) -> ImageResult<()> {
        match self.fetch(name)? {
            true => Ok(()),
            false => Err(ImageError::Missing { image: name.to_owned() }),
        }
    }
}

impl Store for Serve {
    fn read(&self, name: &str) -> ImageResult<Bytes> {
        self.fetched(name)?;
        self.store.read(name)
    }

    fn open(&self, name: &str) -> ImageResult<Box<dyn ReadAt>> {
        self.fetched(name)?;
        self.store.open(name)
    }

    fn create(&self, name: &str) -> ImageResult<Box<dyn ImageOutput>> {
        Err(failed(name, "create")(io::ErrorKind::Unsupported.into()))
    }

    fn exists(&self, name: &str) -> ImageResult<bool> {
        self.fetch(name)
    }

    /// What was asked for: nobody can ask a streamer what it has.
    fn list(&self) -> ImageResult<Vec<String>> {
        self.store.list()
    }

    fn remove(&self, name: &str) -> ImageResult<()> {
        Err(failed(name, "remove")(io::ErrorKind::Unsupported.into()))
    }

    fn parent(&self) -> ImageResult<Option<Arc<dyn Store>>> {
        Ok(None)
    }

    fn commit(&self) -> ImageResult<()> {
        Ok(())
    }
}
