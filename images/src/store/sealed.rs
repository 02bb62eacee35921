//! Images that are encrypted, in whatever store they are.
//!
//! [`SealedStore`] is a store on a store: what is written through it is sealed with a [`Key`], and what is read through it
//! has been checked. Names of images, their number and about how long they are can be seen without the key; nothing else
//! can, and nothing can be changed without being found.
//!
//! An image is a head and chunks:
//!
//! ```text
//! head     16 bytes  "sealed images 1\n"
//!          16 bytes  the checkpoint's identity, random
//!          32 bytes  the image's salt, random
//!          16 bytes  tells another key from changed bytes
//! chunk    64 KiB of the image, and 16 bytes tag; the last one is shorter or as long, and is there also if the image is empty
//! ```
//!
//! The cipher is AES-256-GCM. Each image has a key of its own: HKDF-SHA256 of the user's key, with the image's salt, the
//! checkpoint's identity and the image's name; so a nonce only has to differ within one image, and is the number of the
//! chunk and whether it is the last one (the STREAM construction). Identity and name are associated data, too. So chunks
//! that were swapped, left out, cut off or taken from elsewhere do not open, nor does an image under another name.
//!
//! `sealed.img` ([`MANIFEST`]) is written last, when the store is committed. It is sealed like an image and lists all images
//! of the checkpoint with their sizes and salts, and the identity of the checkpoint that this one builds on: an image that
//! is missing, is of another checkpoint, or was sealed another time, is found, and a checkpoint that was not committed is
//! none.
//!
//! The key is erased from memory when the last copy of it is dropped. What the cipher makes of it is not: it is
//! in structures of the `ring` crate, which has no way to do that.
//!
//! Not kept: holes. Pages of zeros are as long as others, unless they are packed.
//!
//! Sources: RFC 5869 (HKDF), NIST SP 800-38D (GCM), Hoang, Reyhanitabar, Rogaway, Vizár: Online Authenticated-Encryption and
//! its Nonce-Reuse Misuse-Resistance, 2015 (STREAM).

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use rayon::prelude::*;
use ring::aead::{Aad, LessSafeKey, Nonce, UnboundKey, AES_256_GCM};
use ring::hkdf::{Salt, HKDF_SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroizing;

use super::{check_name, ImageOutput, Named, ReadAt, Store, LARGEST_READ};
use crate::error::{Error, Result, SealFault};

mod manifest;

use manifest::{Manifest, Sealed};

/// The list of images, written last.
pub const MANIFEST: &str = "sealed.img";

const MAGIC: &[u8; 16] = b"sealed images 1\n";
const HEAD: usize = 80;
/// Bytes of an image that are sealed together.
const CHUNK: usize = 64 << 10;
const TAG: usize = 16;
const SEALED_CHUNK: usize = CHUNK + TAG;
/// Chunks that are sealed or opened side by side, and then written or handed on.
const BATCH: usize = 64;

/// What a checkpoint is sealed with: 32 bytes. A copy is the same key.
#[derive(Clone)]
pub struct Key(Arc<Zeroizing<[u8; 32]>>);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// This key.
    #[must_use]
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(Arc::new(Zeroizing::new(bytes)))
    }

    /// What is in a key file: 32 bytes, or 64 hexadecimal digits with or without an end of line.
    #[must_use]
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut key = Zeroizing::new([0; 32]);
        if text.len() == 32 {
            key.copy_from_slice(text);
            return Some(Self(Arc::new(key)));
        }
        let digits = text.strip_suffix(b"\n").unwrap_or(text);
        if digits.len() != 64 {
            return None;
        }
        let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = value(pair[0])? << 4 | value(pair[1])?;
        }
        Some(Self(Arc::new(key)))
    }

    /// A new key as text, with an end of line.
    ///
    /// # Errors
    /// If the system has no random numbers.
    pub fn generate() -> Result<Zeroizing<String>> {
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(random()?);
        let mut text = Zeroizing::new(String::with_capacity(65));
        for byte in key.iter() {
            for digit in [byte >> 4, byte & 0xf] {
                text.push(char::from_digit(digit.into(), 16).unwrap_or('0'));
            }
        }
        text.push('\n');
        Ok(text)
    }
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| sealed(MANIFEST, SealFault::Random))?;
    Ok(bytes)
}

fn sealed(image: &str, source: SealFault) -> Error {
    Error::Sealed { image: image.to_owned(), source }
}

/// How long an image is in the store.
fn sealed_size(size: u64) -> u64 {
    let chunks = size.div_ceil(CHUNK as u64).max(1);
    HEAD as u64 + size + chunks * TAG as u64
}

/// How long an image is that is so long in the store.
fn plain_size(sealed: u64) -> Option<u64> {
    let body = sealed.checked_sub(HEAD as u64)?;
    let chunks = body.div_ceil(SEALED_CHUNK as u64).max(1);
    let size = body.checked_sub(chunks * TAG as u64)?;
    (sealed_size(size) == sealed).then_some(size)
}

/// What opens and closes the chunks of one image.
struct Cipher {
    key: LessSafeKey,
    aad: Vec<u8>,
    head: [u8; HEAD],
}

impl Cipher {
    fn new(key: &Key, checkpoint: &[u8; 16], salt: &[u8; 32], name: &str) -> Result<Self> {
        let made = Salt::new(HKDF_SHA256, salt).extract(key.0.as_slice());
        let expand = |purpose: &[u8]| -> std::result::Result<UnboundKey, ring::error::Unspecified> {
            Ok(made.expand(&[purpose, checkpoint, name.as_bytes()], &AES_256_GCM)?.into())
        };
        // neither of these can fail for a name that was checked
        let failed = |_| sealed(name, SealFault::Key);
        let key = LessSafeKey::new(expand(b"standstill image").map_err(failed)?);
        let check = LessSafeKey::new(expand(b"standstill check").map_err(failed)?);
        let mut aad = checkpoint.to_vec();
        aad.extend_from_slice(name.as_bytes());
        let tag = check
            .seal_in_place_separate_tag(nonce(0, true), Aad::from(&aad), &mut [])
            .map_err(|_| sealed(name, SealFault::Key))?;
        let mut head = [0; HEAD];
        head[..16].copy_from_slice(MAGIC);
        head[16..32].copy_from_slice(checkpoint);
        head[32..64].copy_from_slice(salt);
        head[64..].copy_from_slice(tag.as_ref());
        Ok(Self { key, aad, head })
    }

    /// Seals what is in all but the last bytes of a chunk, and puts the tag there.
    fn seal(&self, number: u32, last: bool, chunk: &mut [u8]) -> io::Result<()> {
        let (content, room) = chunk.split_at_mut(chunk.len() - TAG);
        let tag = self
            .key
            .seal_in_place_separate_tag(nonce(number, last), Aad::from(&self.aad), content)
            .map_err(|_| io::Error::other(SealFault::Chunk { number }))?;
        room.copy_from_slice(tag.as_ref());
        Ok(())
    }

    /// Opens a chunk where it is.
    fn open<'a>(&self, number: u32, last: bool, chunk: &'a mut [u8]) -> std::result::Result<&'a [u8], SealFault> {
        let opened = self.key.open_in_place(nonce(number, last), Aad::from(&self.aad), chunk);
        opened.map(|content| &*content).map_err(|_| SealFault::Chunk { number })
    }

    /// Seals whole chunks; the last of them may be the last of the image, which may be shorter.
    fn seal_all(&self, first: u32, last: bool, content: &[u8]) -> io::Result<Vec<u8>> {
        let count = content.len().div_ceil(CHUNK).max(1);
        let mut out = vec![0; content.len() + count * TAG];
        let one = |(at, chunk): (usize, &mut [u8])| {
            let content = content.get(at * CHUNK..).unwrap_or_default();
            chunk[..content.len().min(CHUNK)].copy_from_slice(&content[..content.len().min(CHUNK)]);
            let number = u32::try_from(at).ok().and_then(|at| first.checked_add(at));
            let number = number.ok_or(io::ErrorKind::FileTooLarge)?;
            self.seal(number, last && at + 1 == count, chunk)
        };
        if count == 1 {
            one((0, &mut out))?;
        } else {
            out.par_chunks_mut(SEALED_CHUNK).enumerate().try_for_each(one)?;
        }
        Ok(out)
    }
}

fn nonce(number: u32, last: bool) -> Nonce {
    let mut bytes = [0; 12];
    bytes[7..11].copy_from_slice(&number.to_be_bytes());
    bytes[11] = u8::from(last);
    Nonce::assume_unique_for_key(bytes)
}

/// A store whose images are sealed.
#[derive(Clone)]
pub struct SealedStore {
    inner: Arc<dyn Store>,
    key: Key,
    checkpoint: [u8; 16],
    parent: Option<Arc<Self>>,
    images: Named<Sealed>,
    writing: bool,
}

impl SealedStore {
    /// A new checkpoint in a store. A sealed one that was there is none any more. If the store has a parent, it must be sealed
    /// with the same key.
    ///
    /// # Errors
    /// If the parent cannot be opened, or the store fails.
    pub fn create(inner: Arc<dyn Store>, key: Key) -> Result<Self> {
        inner.remove(MANIFEST)?;
        let parent = match inner.parent()? {
            Some(parent) => Some(Arc::new(Self::open(parent, key.clone())?)),
            None => None,
        };
        let checkpoint = random()?;
        Ok(Self { inner, key, checkpoint, parent, images: Named::default(), writing: true })
    }

    /// A checkpoint that was committed. All of its images are there and have the sizes that they should have; what is in them
    /// is checked where it is read.
    ///
    /// # Errors
    /// If it is not sealed, or with another key, or something of it is missing.
    pub fn open(inner: Arc<dyn Store>, key: Key) -> Result<Self> {
        if !is_sealed(&*inner)? {
            return Err(sealed("the checkpoint", SealFault::NotSealed));
        }
        let image = inner.open(MANIFEST)?;
        let (cipher, checkpoint, _) = open_head(&*image, &key, MANIFEST, None)?;
        let size = plain_size(image.len()).ok_or_else(|| sealed(MANIFEST, SealFault::Size))?;
        let input = SealedInput { image, cipher, size };
        let manifest = Manifest::decode(&input.all(MANIFEST)?).ok_or_else(|| sealed(MANIFEST, SealFault::Manifest))?;
        for (name, entry) in &manifest.images {
            let there = match inner.open(name) {
                Err(error) if error.is_missing() => return Err(sealed(name, SealFault::Gone)),
                result => result?.len(),
            };
            if there != sealed_size(entry.size) {
                return Err(sealed(name, SealFault::Size));
            }
        }
        let parent = match manifest.parent {
            Some(identity) => Some(Arc::new(Self::open_parent(&*inner, &key, identity)?)),
            None => None,
        };
        let images = Named::from(manifest.images);
        Ok(Self { inner, key, checkpoint, parent, images, writing: false })
    }

    fn open_parent(inner: &dyn Store, key: &Key, identity: [u8; 16]) -> Result<Self> {
        let parent = inner.parent()?.ok_or_else(|| sealed("the parent", SealFault::Gone))?;
        let parent = Self::open(parent, key.clone())?;
        if parent.checkpoint != identity {
            return Err(sealed("the parent", SealFault::Checkpoint));
        }
        Ok(parent)
    }

    /// Reads everything, the checkpoints that this one builds on included; how many bytes.
    ///
    /// # Errors
    /// If anything is missing or was changed.
    pub fn verify(&self) -> Result<u64> {
        let mut bytes = 0;
        for name in self.list()? {
            let (input, _) = self.input(&name)?;
            let mut buffer = vec![0; BATCH * CHUNK];
            let mut at = 0;
            // an empty image has a chunk, too
            loop {
                let left = usize::try_from(input.size - at).unwrap_or(usize::MAX).min(buffer.len());
                input.read(&mut buffer[..left], at).map_err(|source| failed(&name, source))?;
                at += left as u64;
                if at == input.size {
                    break;
                }
            }
            bytes += at;
        }
        Ok(bytes + self.parent.as_ref().map_or(Ok(0), |parent| parent.verify())?)
    }

    fn input(&self, name: &str) -> Result<(SealedInput, u64)> {
        let entry = self.images.get(name)?;
        let image = match self.inner.open(name) {
            Err(error) if error.is_missing() => return Err(sealed(name, SealFault::Gone)),
            result => result?,
        };
        if image.len() != sealed_size(entry.size) {
            return Err(sealed(name, SealFault::Size));
        }
        let (cipher, _, _) = open_head(&*image, &self.key, name, Some((&self.checkpoint, &entry.salt)))?;
        Ok((SealedInput { image, cipher, size: entry.size }, entry.size))
    }
}

/// Whether what is in a store is a sealed checkpoint.
///
/// # Errors
/// If that cannot be told.
pub fn is_sealed(store: &dyn Store) -> Result<bool> {
    store.exists(MANIFEST)
}

/// Whether these are the bytes of a sealed image.
#[must_use]
pub fn looks_sealed(bytes: &[u8]) -> bool {
    bytes.starts_with(MAGIC)
}

/// Reads the head of an image; `expected` are the identity and the salt that it must have.
fn open_head(
    image: &dyn ReadAt,
    key: &Key,
    name: &str,
    expected: Option<(&[u8; 16], &[u8; 32])>,
) -> Result<(Cipher, [u8; 16], [u8; 32])> {
    let mut head = [0; HEAD];
    match image.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(sealed(name, SealFault::Size)),
        result => result.map_err(|source| failed(name, source))?,
    }
    let (mut checkpoint, mut salt) = ([0; 16], [0; 32]);
    checkpoint.copy_from_slice(&head[16..32]);
    salt.copy_from_slice(&head[32..64]);
    if head[..16] != *MAGIC {
        return Err(sealed(name, SealFault::Head));
    }
    if expected.is_some_and(|expected| expected != (&checkpoint, &salt)) {
        return Err(sealed(name, SealFault::Checkpoint));
    }
    let cipher = Cipher::new(key, &checkpoint, &salt, name)?;
    if cipher.head != head {
        return Err(sealed(name, SealFault::Key));
    }
    Ok((cipher, checkpoint, salt))
}

/// An error of reading: what is wrong with a chunk is said as such.
pub(super) fn failed(name: &str, source: io::Error) -> Error {
    match source.get_ref().and_then(|inner| inner.downcast_ref::<SealFault>()) {
        Some(fault) => sealed(name, *fault),
        None => Error::Io { image: name.to_owned(), operation: "read", source },
    }
}

impl Store for SealedStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        self.input(name)?.0.all(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        Ok(Box::new(self.input(name)?.0))
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        if name == MANIFEST || !self.writing {
            return Err(Error::Name { name: name.to_owned() });
        }
        self.images.remove(name)?;
        let salt = random()?;
        let cipher = Cipher::new(&self.key, &self.checkpoint, &salt, name)?;
        let mut inner = self.inner.create(name)?;
        let failed = |source| Error::Io { image: name.to_owned(), operation: "write", source };
        inner.write_all(&cipher.head).map_err(failed)?;
        Ok(Box::new(SealedOutput {
            name: name.to_owned(),
            inner,
            cipher,
            salt,
            content: Vec::new(),
            chunks: 0,
            size: 0,
            images: self.images.clone(),
        }))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        self.images.exists(name)
    }

    /// The images of the checkpoint; while it is being written also what else is there.
    fn list(&self) -> Result<Vec<String>> {
        if self.writing {
            let mut names = self.inner.list()?;
            names.retain(|name| name != MANIFEST);
            return Ok(names);
        }
        Ok(self.images.names())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.images.remove(name)?;
        self.inner.remove(name)
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        Ok(self.parent.clone().map(|parent| -> Arc<dyn Store> { parent }))
    }

    fn commit(&self) -> Result<()> {
        if self.writing {
            let parent = self.parent.as_ref().map(|parent| parent.checkpoint);
            let images = self.images.all();
            let content = Manifest { parent, images }.encode();
            let cipher = Cipher::new(&self.key, &self.checkpoint, &random()?, MANIFEST)?;
            let mut output = self.inner.create(MANIFEST)?;
            let failed = |source| Error::Io { image: MANIFEST.to_owned(), operation: "write", source };
            output.write_all(&cipher.head).map_err(failed)?;
            output.write_all(&cipher.seal_all(0, true, &content).map_err(failed)?).map_err(failed)?;
            output.finish()?;
        }
        self.inner.commit()
    }
}

struct SealedOutput {
    name: String,
    inner: Box<dyn ImageOutput>,
    cipher: Cipher,
    salt: [u8; 32],
    /// What is not sealed yet.
    content: Vec<u8>,
    chunks: u32,
    size: u64,
    images: Named<Sealed>,
}

impl Write for SealedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        if self.content.len() == BATCH * CHUNK {
            // more follows, so none of these is the last
            let out = self.cipher.seal_all(self.chunks, false, &self.content)?;
            self.inner.write_all(&out)?;
            self.chunks = self.chunks.checked_add(BATCH as u32).ok_or(io::ErrorKind::FileTooLarge)?;
            self.content.clear();
        }
        let part = &bytes[..bytes.len().min(BATCH * CHUNK - self.content.len())];
        self.content.extend_from_slice(part);
        self.size += part.len() as u64;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for SealedOutput {
    fn finish(mut self: Box<Self>) -> Result<()> {
        let write = self.cipher.seal_all(self.chunks, true, &self.content).and_then(|out| self.inner.write_all(&out));
        write.map_err(|source| Error::Io { image: self.name.clone(), operation: "write", source })?;
        self.inner.finish()?;
        let entry = Sealed { size: self.size, salt: self.salt };
        self.images.put(&self.name, entry);
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

struct SealedInput {
    image: Box<dyn ReadAt>,
    cipher: Cipher,
    size: u64,
}

impl SealedInput {
    /// Reads the chunks that have these bytes. Where nothing is asked for, the chunk there is looked at all the same.
    fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let chunk = CHUNK as u64;
        let last = self.size.div_ceil(chunk).max(1) - 1;
        let first = (offset / chunk).min(last);
        let count = (end.div_ceil(chunk).max(first + 1) - first).min(last + 1 - first);
        // a batch at a time, each to its place
        let mut at = first;
        let mut rest = buffer;
        let mut skip = usize::try_from(offset - first * chunk).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        while at < first + count {
            let n = (first + count - at).min(BATCH as u64);
            let begin = HEAD as u64 + at * SEALED_CHUNK as u64;
            let stop = if at + n > last { sealed_size(self.size) } else { begin + n * SEALED_CHUNK as u64 };
            let length = usize::try_from(stop - begin).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            let mut chunks = vec![0; length];
            self.image.read_exact_at(&mut chunks, begin)?;
            let content = (length - usize::try_from(n).unwrap_or(0) * TAG).saturating_sub(skip).min(rest.len());
            let (room, after) = std::mem::take(&mut rest).split_at_mut(content);
            // the first piece of room is shorter if the first chunk is not wanted from its begin
            let head = (CHUNK - skip).min(room.len());
            let (front, back) = room.split_at_mut(head);
            let mut rooms: Vec<&mut [u8]> = vec![front];
            rooms.extend(back.chunks_mut(CHUNK));
            rooms.resize_with(usize::try_from(n).unwrap_or(0), Default::default);
            let one = |(k, (chunk, room)): (usize, (&mut [u8], &mut &mut [u8]))| -> io::Result<()> {
                let number = at + k as u64;
                let is_last = number == last;
                let number = u32::try_from(number).map_err(|_| io::ErrorKind::FileTooLarge)?;
                let content = self
                    .cipher
                    .open(number, is_last, chunk)
                    .map_err(|fault| io::Error::new(io::ErrorKind::InvalidData, fault))?;
                let from = if k == 0 { skip } else { 0 };
                let length = room.len();
                room.copy_from_slice(content.get(from..from + length).ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            };
            if n == 1 {
                one((0, (&mut chunks, &mut rooms[0])))?;
            } else {
                chunks.par_chunks_mut(SEALED_CHUNK).zip(rooms.par_iter_mut()).enumerate().try_for_each(one)?;
            }
            (at, skip, rest) = (at + n, 0, after);
        }
        Ok(())
    }

    fn all(&self, name: &str) -> Result<Bytes> {
        let io = |kind: io::ErrorKind| Error::Io { image: name.to_owned(), operation: "read", source: kind.into() };
        if self.size > LARGEST_READ {
            return Err(io(io::ErrorKind::FileTooLarge));
        }
        let size = usize::try_from(self.size).map_err(|_| io(io::ErrorKind::FileTooLarge))?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(size).map_err(|_| io(io::ErrorKind::OutOfMemory))?;
        bytes.resize(size, 0);
        self.read(&mut bytes, 0).map_err(|source| failed(name, source))?;
        Ok(bytes.into())
    }
}

impl ReadAt for SealedInput {
    fn len(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.read(buffer, offset)
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

#[cfg(test)]
mod tests;
