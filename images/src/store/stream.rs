//! All images of a checkpoint over one connection.
//!
//! A stream is a header and records; numbers are little-endian:
//!
//! ```text
//! header   "standstill images 2\n"
//! record   u8 type, u32 image, u32 size, then `size` bytes
//!   1 open   the image's name; its number is how many were opened before it
//!   2 data   the next bytes of the image, at most 1 MiB
//!   3 close  u64: how long the image is
//!   4 end    u64: how long all images are together; `image` is how many there are; u32: the CRC-32 of all bytes before it
//! ```
//!
//! Several images may be open at a time, so that they can be written by several threads and none has to be held back until
//! its size is known. [`StreamStore`] is the sender; [`receive`] puts what arrives into another store.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use crc32fast::Hasher;

use super::{check_name, ImageOutput, ReadAt, Store};
use crate::error::{Error, Malformed, RecordFault, Result};

const HEADER: &[u8; 20] = b"standstill images 2\n";
const OPEN: u8 = 1;
const DATA: u8 = 2;
const CLOSE: u8 = 3;
const END: u8 = 4;

/// How long the body of an end record is.
const END_SIZE: u32 = 12;
/// The most data in one record.
const LARGEST: usize = 1 << 20;
/// The most images that may be open at a time: each may be a file.
const MOST_OPEN: usize = 512;

/// Sends images. They can be written, not read.
#[derive(Clone)]
pub struct StreamStore {
    sender: Arc<Mutex<Sender>>,
}

struct Sender {
    to: Box<dyn Write + Send>,
    sum: Hasher,
    names: Vec<String>,
    open: usize,
    bytes: u64,
    ended: bool,
}

impl StreamStore {
    /// Begins a stream.
    ///
    /// # Errors
    /// If nothing can be written.
    pub fn new(to: impl Write + Send + 'static) -> Result<Self> {
        let mut to: Box<dyn Write + Send> = Box::new(to);
        // who cannot take anything says so now
        to.write_all(HEADER).and_then(|()| to.flush()).map_err(failed("the stream", "send"))?;
        let mut sum = Hasher::new();
        sum.update(HEADER);
        let sender = Sender { to, sum, names: Vec::new(), open: 0, bytes: 0, ended: false };
        Ok(Self { sender: Arc::new(Mutex::new(sender)) })
    }

    fn sender(&self) -> MutexGuard<'_, Sender> {
        // After a panic in the middle of a record the other side finds the stream malformed.
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn failed<'a>(image: &'a str, operation: &'static str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { image: image.to_owned(), operation, source }
}

impl Sender {
    fn record(&mut self, kind: u8, image: u32, body: &[u8]) -> io::Result<()> {
        let size = u32::try_from(body.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.begin(kind, image, size)?;
        self.send(body)
    }

    fn begin(&mut self, kind: u8, image: u32, size: u32) -> io::Result<()> {
        let mut head = [kind, 0, 0, 0, 0, 0, 0, 0, 0];
        head[1..5].copy_from_slice(&image.to_le_bytes());
        head[5..].copy_from_slice(&size.to_le_bytes());
        self.send(&head)
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.sum.update(bytes);
        self.to.write_all(bytes)
    }

    fn end(&mut self) -> io::Result<()> {
        let images = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.ended = true;
        self.begin(END, images, END_SIZE)?;
        self.send(&self.bytes.to_le_bytes())?;
        let sum = self.sum.clone().finalize();
        self.to.write_all(&sum.to_le_bytes())?;
        self.to.flush()
    }
}

impl Store for StreamStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        Err(Error::Missing { image: name.to_owned() })
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        Err(Error::Missing { image: name.to_owned() })
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        let mut sender = self.sender();
        let refuse = |kind: io::ErrorKind| failed(name, "send")(kind.into());
        if sender.ended {
            return Err(refuse(io::ErrorKind::BrokenPipe));
        }
        if sender.names.iter().any(|sent| sent == name) {
            return Err(refuse(io::ErrorKind::AlreadyExists));
        }
        let number = u32::try_from(sender.names.len()).map_err(|_| refuse(io::ErrorKind::QuotaExceeded))?;
        if sender.open >= MOST_OPEN {
            return Err(refuse(io::ErrorKind::QuotaExceeded));
        }
        sender.record(OPEN, number, name.as_bytes()).map_err(failed(name, "send"))?;
        sender.names.push(name.to_owned());
        sender.open += 1;
        Ok(Box::new(StreamOutput { name: name.to_owned(), number, size: 0, store: self.clone() }))
    }

    fn exists(&self, _: &str) -> Result<bool> {
        Ok(false)
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn remove(&self, name: &str) -> Result<()> {
        if self.sender().names.iter().any(|sent| sent == name) {
            return Err(failed(name, "take back")(io::ErrorKind::Unsupported.into()));
        }
        Ok(())
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        Ok(None)
    }

    /// Ends the stream. Every image must be finished by then.
    fn commit(&self) -> Result<()> {
        let mut sender = self.sender();
        if sender.open > 0 || sender.ended {
            return Err(failed("the stream", "end")(io::ErrorKind::InvalidInput.into()));
        }
        sender.end().map_err(failed("the stream", "send"))
    }
}

struct StreamOutput {
    name: String,
    number: u32,
    size: u64,
    store: StreamStore,
}

impl Write for StreamOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = bytes.get(..LARGEST).unwrap_or(bytes);
        if !part.is_empty() {
            let mut sender = self.store.sender();
            sender.record(DATA, self.number, part)?;
            sender.bytes += part.len() as u64;
            self.size += part.len() as u64;
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for StreamOutput {
    fn finish(self: Box<Self>) -> Result<()> {
        let mut sender = self.store.sender();
        sender.record(CLOSE, self.number, &self.size.to_le_bytes()).map_err(failed(&self.name, "send"))?;
        sender.open -= 1;
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

/// What a stream held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// How many images.
    pub images: u32,
    /// How long they are together.
    pub bytes: u64,
}

/// Reads a stream to its end and puts the images into a store; nothing after the end is read. After an error what arrived
/// stays there: it is no checkpoint, and the caller removes it.
///
/// # Errors
/// If the stream is malformed or ends early, if the images are longer than `limit` together, or if the store fails.
pub fn receive(from: impl Read, into: &dyn Store, limit: u64) -> Result<Received> {
    Receiver { from, at: 0, body: Vec::new(), sum: Hasher::new() }.run(into, limit)
}

struct Receiver<R> {
    from: R,
    at: u64,
    body: Vec<u8>,
    sum: Hasher,
}

impl<R: Read> Receiver<R> {
    fn fault(&self, fault: RecordFault) -> Error {
        Error::Stream { offset: self.at, source: Malformed::Record(fault) }
    }

    fn fill<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(|source| self.read_error(source))?;
        self.sum.update(&bytes);
        self.at += N as u64;
        Ok(bytes)
    }

    fn read_error(&self, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => self.fault(RecordFault::End),
            _ => failed("the stream", "receive")(source),
        }
    }

    /// The next record: its type and image. Its body is in `self.body`, whose size is bounded.
    fn record(&mut self) -> Result<(u8, u32)> {
        let head: [u8; 9] = self.fill()?;
        let [kind, image @ .., s0, s1, s2, s3] = head;
        let size = u32::from_le_bytes([s0, s1, s2, s3]) as usize;
        let largest = match kind {
            OPEN => 255,
            DATA => LARGEST,
            CLOSE => 8,
            END => END_SIZE as usize,
            _ => return Err(self.fault(RecordFault::Type)),
        };
        if size > largest {
            return Err(self.fault(RecordFault::TooLarge));
        }
        self.body.resize(size, 0);
        let mut body = std::mem::take(&mut self.body);
        let read = self.from.read_exact(&mut body);
        self.body = body;
        read.map_err(|source| self.read_error(source))?;
        // all but the sum itself, which comes last
        let summed = if kind == END { self.body.get(..8).unwrap_or(&self.body) } else { &self.body };
        self.sum.update(summed);
        self.at += size as u64;
        Ok((kind, u32::from_le_bytes(image)))
    }

    /// The number in the body of a close record, or the first of an end record.
    fn stated(&self, size: u32) -> Result<u64> {
        match self.body.first_chunk() {
            Some(number) if self.body.len() == size as usize => Ok(u64::from_le_bytes(*number)),
            _ => Err(self.fault(RecordFault::Size)),
        }
    }

    fn run(mut self, into: &dyn Store, limit: u64) -> Result<Received> {
        let header: [u8; HEADER.len()] = self.fill()?;
        if header != *HEADER {
            return Err(self.fault(RecordFault::Header));
        }
        let mut open: BTreeMap<u32, (String, Box<dyn ImageOutput>, u64)> = BTreeMap::new();
        let mut names = BTreeSet::new();
        let mut received = Received { images: 0, bytes: 0 };
        loop {
            let (kind, image) = self.record()?;
            match kind {
                OPEN => {
                    let name = std::str::from_utf8(&self.body).map_err(|_| self.fault(RecordFault::Name))?;
                    if check_name(name).is_err() {
                        return Err(self.fault(RecordFault::Name));
                    }
                    let name = name.to_owned();
                    if image != received.images || open.len() >= MOST_OPEN || !names.insert(name.clone()) {
                        return Err(self.fault(RecordFault::Image));
                    }
                    received.images = image.checked_add(1).ok_or_else(|| self.fault(RecordFault::Image))?;
                    let output = into.create(&name)?;
                    open.insert(image, (name, output, 0));
                }
                DATA => {
                    let size = self.body.len() as u64;
                    received.bytes += size;
                    if received.bytes > limit {
                        return Err(self.fault(RecordFault::Limit));
                    }
                    let (name, output, so_far) = open.get_mut(&image).ok_or_else(|| self.fault(RecordFault::Image))?;
                    output.write_all(&self.body).map_err(failed(name, "write"))?;
                    *so_far += size;
                }
                CLOSE => {
                    let stated = self.stated(8)?;
                    let (_, output, size) = open.remove(&image).ok_or_else(|| self.fault(RecordFault::Image))?;
                    if stated != size {
                        return Err(self.fault(RecordFault::Size));
                    }
                    output.finish()?;
                }
                // Other types are refused where the record is read.
                _ => {
                    let stated = self.stated(END_SIZE)?;
                    if self.body.last_chunk() != Some(&self.sum.clone().finalize().to_le_bytes()) {
                        return Err(self.fault(RecordFault::Sum));
                    }
                    if !open.is_empty() || image != received.images || stated != received.bytes {
                        return Err(self.fault(RecordFault::End));
                    }
                    into.commit()?;
                    return Ok(received);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    /// A sink that can be looked into.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn stream() -> Vec<u8> {
        let sink = Sink::default();
        let store = StreamStore::new(sink.clone()).unwrap();
        let mut a = store.create("a.img").unwrap();
        let mut b = store.create("b.img").unwrap();
        a.write_all(b"one ").unwrap();
        b.write_all(&[7; 100]).unwrap();
        a.write_all(b"two").unwrap();
        b.finish().unwrap();
        assert!(store.commit().is_err(), "an image is open");
        a.finish().unwrap();
        store.create("empty").unwrap().finish().unwrap();
        assert!(store.create("empty").is_err(), "sent already");
        store.commit().unwrap();
        assert!(store.create("late").is_err());
        let bytes = sink.0.lock().unwrap().clone();
        bytes
    }

    #[test]
    fn arrives_as_sent() {
        let mut bytes = stream();
        bytes.extend_from_slice(b"what follows");
        let mut from = bytes.as_slice();
        let store = MemoryStore::new();
        assert_eq!(receive(&mut from, &store, 1000).unwrap(), Received { images: 3, bytes: 107 });
        assert_eq!(from, b"what follows");
        assert_eq!(store.list().unwrap(), ["a.img", "b.img", "empty"]);
        assert_eq!(store.read("a.img").unwrap().as_ref(), b"one two");
        assert_eq!(store.read("b.img").unwrap().as_ref(), [7; 100]);
        assert!(matches!(
            receive(bytes.as_slice(), &MemoryStore::new(), 106),
            Err(Error::Stream { source: Malformed::Record(RecordFault::Limit), .. })
        ));
    }

    #[test]
    fn large_images_go_in_parts() {
        let sink = Sink::default();
        let store = StreamStore::new(sink.clone()).unwrap();
        let mut large = store.create("pages-1.img").unwrap();
        let content: Vec<u8> = (0..3_000_000_u32).map(|place| place.to_le_bytes()[1]).collect();
        large.write_all(&content).unwrap();
        large.finish().unwrap();
        store.commit().unwrap();
        let arrived = MemoryStore::new();
        receive(sink.0.lock().unwrap().as_slice(), &arrived, u64::MAX).unwrap();
        assert_eq!(arrived.read("pages-1.img").unwrap(), content);
    }

    #[test]
    fn every_cut_and_every_change_is_found() {
        let bytes = stream();
        for size in 0..bytes.len() {
            let error = receive(&bytes[..size], &MemoryStore::new(), 1000).unwrap_err();
            assert!(matches!(error, Error::Stream { source: Malformed::Record(RecordFault::End), .. }), "{size}");
        }
        for place in 0..bytes.len() {
            for bits in [0xff, 1, 4, 0x80] {
                let mut bytes = bytes.clone();
                bytes[place] ^= bits;
                let error = receive(bytes.as_slice(), &MemoryStore::new(), 1000).unwrap_err();
                assert!(matches!(error, Error::Stream { .. }), "{place}: {error}");
            }
        }
    }

    #[test]
    fn lies_are_refused() {
        let record = |kind: u8, image: u32, size: u32, body: &[u8]| {
            let mut bytes = HEADER.to_vec();
            bytes.push(kind);
            bytes.extend_from_slice(&image.to_le_bytes());
            bytes.extend_from_slice(&size.to_le_bytes());
            bytes.extend_from_slice(body);
            match receive(bytes.as_slice(), &MemoryStore::new(), u64::MAX).unwrap_err() {
                Error::Stream { source: Malformed::Record(fault), .. } => fault,
                other => panic!("{other}"),
            }
        };
        assert_eq!(record(OPEN, 1, 1, b"a"), RecordFault::Image);
        assert_eq!(record(OPEN, 0, 2, b".."), RecordFault::Name);
        assert_eq!(record(OPEN, 0, 5, b"../..."), RecordFault::Name);
        assert_eq!(record(OPEN, 0, u32::MAX, b"a"), RecordFault::TooLarge);
        assert_eq!(record(DATA, 0, 1, b"a"), RecordFault::Image);
        assert_eq!(record(DATA, 0, u32::MAX, b"a"), RecordFault::TooLarge);
        assert_eq!(record(CLOSE, 0, 8, &[0; 8]), RecordFault::Image);
        assert_eq!(record(CLOSE, 0, 1, &[0]), RecordFault::Size);
        assert_eq!(record(END, 0, 8, &[0; 8]), RecordFault::Size);
        assert_eq!(record(END, 0, 12, &[0; 12]), RecordFault::Sum);
        let ended = |image: u32, bytes: u64| {
            let mut body = bytes.to_le_bytes().to_vec();
            let mut sum = Hasher::new();
            for part in [HEADER.as_slice(), &[END], &image.to_le_bytes(), &END_SIZE.to_le_bytes(), &body] {
                sum.update(part);
            }
            body.extend_from_slice(&sum.finalize().to_le_bytes());
            record(END, image, END_SIZE, &body)
        };
        assert_eq!(ended(1, 0), RecordFault::End);
        assert_eq!(ended(0, 1), RecordFault::End);
        assert_eq!(record(9, 0, 0, b""), RecordFault::Type);
    }
}
