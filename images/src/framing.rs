//! One image as entries: header, sized messages, and the raw bytes that follow some of them.
//!
//! [`Reader`] walks over the bytes of an image, [`Writer`] puts them out. What follows an entry is known from the entry
//! itself ([`WithPayload`]), so neither can get out of step without noticing.

use std::io::Write;

use crate::error::{Error, Malformed, Result};
use crate::payload::{decode, put_message, Cursor, WithPayload};
use crate::proto::{GhostChunkEntry, GhostFileEntry, PagemapEntry, PagemapHead};
use crate::schema;
use crate::table::{Header, ImageKind, Payload, MAGIC_COMMON, MAGIC_SERVICE};

/// A message that can be an entry of an image.
pub trait Entry: prost::Message + prost::Name + Default {}

impl<T: prost::Message + prost::Name + Default> Entry for T {}

/// The content of a deleted file.
#[derive(Debug, Clone, PartialEq)]
pub enum GhostContent<'a> {
    /// All of it.
    Whole(&'a [u8]),
    /// The parts that are not holes.
    Chunks(Vec<(GhostChunkEntry, &'a [u8])>),
}

/// What the next entry of an image must be.
fn expected(kind: ImageKind, entries: usize) -> Option<&'static str> {
    match (kind.payload(), entries) {
        (Payload::Pagemap, 0) => Some("pagemap_head"),
        (Payload::Ghost, 1..) => Some("ghost_chunk_entry"),
        _ => kind.entry(),
    }
}

/// Whether the kind's entries can be read and written without what follows them.
fn stands_alone(kind: ImageKind) -> bool {
    match kind.payload() {
        Payload::None | Payload::Pagemap | Payload::Ghost => true,
        Payload::PipeData
        | Payload::SocketQueue
        | Payload::IpcShm
        | Payload::IpcMsg
        | Payload::IpcSem
        | Payload::TcpStream
        | Payload::BpfMap => false,
    }
}

/// Reads the kind of an image from its magics.
///
/// # Errors
/// If it has none of those in the table.
pub(crate) fn kind_of(name: &str, bytes: &[u8]) -> Result<ImageKind> {
    let mut cursor = Cursor::new(bytes);
    let at = |offset: u64, source| Error::Malformed { image: name.to_owned(), entry: 0, offset, source };
    let mut magic = cursor.take_u32().map_err(|source| at(0, source))?;
    if magic == MAGIC_COMMON || magic == MAGIC_SERVICE {
        magic = cursor.take_u32().map_err(|source| at(4, source))?;
    }
    ImageKind::from_magic(magic).ok_or_else(|| at(cursor.at() - 4, Malformed::UnknownMagic { found: magic }))
}

/// Reads one image.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    kind: ImageKind,
    name: &'a str,
    bytes: Cursor<'a>,
    entries: usize,
}

impl<'a> Reader<'a> {
    /// Begins to read; `name` is for errors only.
    ///
    /// # Errors
    /// If the image does not begin with its magics.
    pub fn new(kind: ImageKind, name: &'a str, bytes: &'a [u8]) -> Result<Self> {
        let mut reader = Self { kind, name, bytes: Cursor::new(bytes), entries: 0 };
        let mut magics = match kind.header() {
            Header::Common => vec![MAGIC_COMMON, kind.magic()],
            Header::Service => vec![MAGIC_SERVICE, kind.magic()],
            Header::Own => vec![kind.magic()],
            Header::Raw => Vec::new(),
        };
        for expected in magics.drain(..) {
            let begin = reader.bytes.at();
            let found = reader.bytes.take_u32().map_err(|source| reader.error(begin, source))?;
            if found != expected {
                return Err(reader.error(begin, Malformed::Magic { found, expected }));
            }
        }
        Ok(reader)
    }

    /// The kind of the image.
    #[must_use]
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// An error at the entry that comes next.
    pub(crate) fn error(&self, offset: u64, source: Malformed) -> Error {
        Error::Malformed { image: self.name.to_owned(), entry: self.entries, offset, source }
    }

    fn type_error(&self, found: &'static str) -> Error {
        let expected = match expected(self.kind, self.entries) {
            Some(expected) if expected != found => expected,
            Some(_) => "entries with payload",
            None => "raw data",
        };
        Error::EntryType { image: self.name.to_owned(), expected, found }
    }

    /// The bytes of the next entry's message, or none at the end. What may follow the message stays to be read.
    ///
    /// # Errors
    /// If the image ends in the middle of the entry.
    pub fn next_bytes(&mut self) -> Result<Option<&'a [u8]>> {
        if self.bytes.rest().is_empty() {
            return Ok(None);
        }
        let begin = self.bytes.at();
        let bytes = self.bytes.take_sized().map_err(|source| self.error(begin, source))?;
        self.entries += 1;
        Ok(Some(bytes))
    }

    /// Checks the next entry, of whatever type the image's kind says, and passes it; none at the end.
    pub(crate) fn check_next(&mut self) -> Result<Option<()>> {
        let wanted = expected(self.kind, self.entries).and_then(schema::message);
        let begin = self.bytes.at();
        let message = wanted.ok_or_else(|| self.error(begin, Malformed::Raw))?;
        let Some(bytes) = self.next_bytes()? else { return Ok(None) };
        schema::check(message, bytes).map_err(|source| {
            self.entries -= 1;
            self.error(begin, source)
        })?;
        Ok(Some(()))
    }

    /// Where the entry with this number begins, if all entries before it are there.
    pub(crate) fn offset_of(&mut self, entry: usize) -> Result<u64> {
        while self.entries < entry && self.next_bytes()?.is_some() {}
        Ok(self.bytes.at())
    }

    /// The next entry, or none at the end.
    ///
    /// # Errors
    /// If it is malformed, or of another type, or one with a payload.
    pub fn next_entry<T: Entry>(&mut self) -> Result<Option<T>> {
        if !stands_alone(self.kind) {
            return Err(self.type_error(T::NAME));
        }
        self.typed()
    }

    fn typed<T: Entry>(&mut self) -> Result<Option<T>> {
        if expected(self.kind, self.entries) != Some(T::NAME) {
            return Err(self.type_error(T::NAME));
        }
        let begin = self.bytes.at();
        let Some(bytes) = self.next_bytes()? else { return Ok(None) };
        match decode(bytes) {
            Ok(entry) => Ok(Some(entry)),
            Err(source) => {
                self.entries -= 1;
                Err(self.error(begin, source))
            }
        }
    }

    /// The next entry and what follows it, or none at the end.
    ///
    /// # Errors
    /// As [`Self::next_entry`], or if what follows is cut short.
    pub fn next_with_payload<T: WithPayload>(&mut self) -> Result<Option<(T, T::Payload<'a>)>> {
        if stands_alone(self.kind) {
            return Err(self.type_error(T::NAME));
        }
        let Some(entry) = self.typed::<T>()? else { return Ok(None) };
        let begin = self.bytes.at();
        let payload = entry.read_payload(&mut self.bytes);
        let payload = payload.map_err(|source| {
            let entry = self.entries.saturating_sub(1);
            Error::Malformed { image: self.name.to_owned(), entry, offset: begin, source }
        })?;
        Ok(Some((entry, payload)))
    }

    /// Takes raw bytes.
    ///
    /// # Errors
    /// If fewer are left.
    pub fn take(&mut self, size: u64) -> Result<&'a [u8]> {
        let begin = self.bytes.at();
        self.bytes.take(size).map_err(|source| self.error(begin, source))
    }

    /// Lets other code of this crate take bytes, and puts the place into its errors.
    pub(crate) fn with_cursor<T>(
        &mut self,
        read: impl FnOnce(&mut Cursor<'a>) -> std::result::Result<T, Malformed>,
    ) -> Result<T> {
        let begin = self.bytes.at();
        read(&mut self.bytes).map_err(|source| self.error(begin, source))
    }

    /// Everything that is left, which ends the image.
    pub fn rest(&mut self) -> &'a [u8] {
        self.bytes.take_rest()
    }

    /// All entries.
    ///
    /// # Errors
    /// As [`Self::next_entry`].
    pub fn all<T: Entry>(mut self) -> Result<Vec<T>> {
        let mut entries = Vec::new();
        while let Some(entry) = self.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// The only entry.
    ///
    /// # Errors
    /// As [`Self::next_entry`], and if there is another number of entries.
    pub fn one<T: Entry>(mut self) -> Result<T> {
        let first = self.next_entry()?;
        let begin = self.bytes.at();
        let more = self.next_bytes()?.is_some();
        match first {
            Some(entry) if !more => Ok(entry),
            first => {
                let found = usize::from(first.is_some()) + usize::from(more);
                Err(self.error(begin, Malformed::EntryCount { found, expected: 1 }))
            }
        }
    }

    /// All entries, each with what follows it.
    ///
    /// # Errors
    /// As [`Self::next_with_payload`].
    pub fn all_with_payload<T: WithPayload>(mut self) -> Result<Vec<(T, T::Payload<'a>)>> {
        let mut entries = Vec::new();
        while let Some(entry) = self.next_with_payload()? {
            entries.push(entry);
        }
        Ok(entries)
    }

    /// A pagemap: its head and its entries.
    ///
    /// # Errors
    /// As [`Self::next_entry`], and if there is no head.
    pub fn pagemap(mut self) -> Result<(PagemapHead, Vec<PagemapEntry>)> {
        let Some(head) = self.next_entry()? else {
            return Err(self.error(self.bytes.at(), Malformed::EntryCount { found: 0, expected: 1 }));
        };
        Ok((head, self.all()?))
    }

    /// A deleted file: what it was and what was in it.
    ///
    /// # Errors
    /// As [`Self::next_entry`], and if there is no entry.
    pub fn ghost(mut self) -> Result<(GhostFileEntry, GhostContent<'a>)> {
        let Some(entry) = self.next_entry::<GhostFileEntry>()? else {
            return Err(self.error(self.bytes.at(), Malformed::EntryCount { found: 0, expected: 1 }));
        };
        if !entry.chunks.unwrap_or(false) {
            return Ok((entry, GhostContent::Whole(self.rest())));
        }
        let mut chunks = Vec::new();
        while let Some(chunk) = self.next_entry::<GhostChunkEntry>()? {
            let bytes = self.take(chunk.len)?;
            chunks.push((chunk, bytes));
        }
        Ok((entry, GhostContent::Chunks(chunks)))
    }
}

/// How many bytes a writer collects before it hands them on.
const BUFFER: usize = 64 * 1024;

/// Writes one image. Nothing is complete before its output is finished.
#[derive(Debug)]
#[must_use = "an image is complete only when it is finished"]
pub struct Writer<W> {
    kind: ImageKind,
    name: String,
    entries: usize,
    buffer: Vec<u8>,
    to: W,
}

impl<W: Write> Writer<W> {
    /// Begins to write; `name` is for errors only.
    pub fn new(kind: ImageKind, name: impl Into<String>, to: W) -> Self {
        let mut buffer = Vec::new();
        match kind.header() {
            Header::Common => buffer.extend_from_slice(&MAGIC_COMMON.to_le_bytes()),
            Header::Service => buffer.extend_from_slice(&MAGIC_SERVICE.to_le_bytes()),
            Header::Own | Header::Raw => {}
        }
        if !kind.is_raw() {
            buffer.extend_from_slice(&kind.magic().to_le_bytes());
        }
        Self { kind, name: name.into(), entries: 0, buffer, to }
    }

    /// The kind of the image.
    #[must_use]
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    fn type_error(&self, found: &'static str) -> Error {
        let expected = match expected(self.kind, self.entries) {
            Some(expected) if expected != found => expected,
            Some(_) => "entries with payload",
            None => "raw data",
        };
        Error::EntryType { image: self.name.clone(), expected, found }
    }

    fn io(&self, source: std::io::Error) -> Error {
        Error::Io { image: self.name.clone(), operation: "write", source }
    }

    fn put<T: Entry>(&mut self, entry: &T) -> Result<()> {
        if expected(self.kind, self.entries) != Some(T::NAME) {
            return Err(self.type_error(T::NAME));
        }
        let begin = self.buffer.len();
        put_message(entry, &mut self.buffer);
        // What we would not read, we do not write.
        let written = self.buffer.get(begin + 4..).unwrap_or(&[]);
        if let Some(Err(source)) = schema::message(T::NAME).map(|message| schema::check(message, written)) {
            self.buffer.truncate(begin);
            return Err(Error::Malformed { image: self.name.clone(), entry: self.entries, offset: 0, source });
        }
        self.entries += 1;
        Ok(())
    }

    fn flush_if_full(&mut self) -> Result<()> {
        if self.buffer.len() >= BUFFER {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.to.write_all(&self.buffer).map_err(|source| self.io(source))?;
        self.buffer.clear();
        Ok(())
    }

    /// Adds an entry. In a pagemap the first is a `PagemapHead`; in a ghost file the first is a `GhostFileEntry`, and
    /// its content or chunks follow through [`Self::write_raw`].
    ///
    /// # Errors
    /// If the entry does not belong into this image, has an unknown enum value, or cannot be written.
    pub fn write<T: Entry>(&mut self, entry: &T) -> Result<()> {
        if !stands_alone(self.kind) {
            return Err(self.type_error(T::NAME));
        }
        self.put(entry)?;
        self.flush_if_full()
    }

    /// Adds an entry and what follows it.
    ///
    /// # Errors
    /// As [`Self::write`], and if the payload's size is not what the entry says.
    pub fn write_with_payload<T: WithPayload>(&mut self, entry: &T, payload: &T::Payload<'_>) -> Result<()> {
        if stands_alone(self.kind) {
            return Err(self.type_error(T::NAME));
        }
        let begin = self.buffer.len();
        self.put(entry)?;
        if let Err((stated, given)) = entry.write_payload(payload, &mut self.buffer) {
            self.buffer.truncate(begin);
            self.entries -= 1;
            return Err(Error::Payload { image: self.name.clone(), stated, given });
        }
        self.flush_if_full()
    }

    /// Adds raw bytes: of a raw image, or what is in a ghost file.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write_raw(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() < BUFFER {
            self.buffer.extend_from_slice(bytes);
            return self.flush_if_full();
        }
        self.flush()?;
        self.to.write_all(bytes).map_err(|source| self.io(source))
    }

    /// What is written to, with nothing left in the buffer.
    pub(crate) fn flushed(&mut self) -> Result<&W> {
        self.flush()?;
        Ok(&self.to)
    }

    /// Writes what is still in the buffer, and gives back what was written to.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn into_inner(mut self) -> Result<W> {
        self.flush()?;
        self.to.flush().map_err(|source| self.io(source))?;
        Ok(self.to)
    }
}
