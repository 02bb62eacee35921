//! The images of a store, by kind: what the engine reads and writes checkpoints with.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::Result;
use crate::framing::{Entry, Reader, Writer};
use crate::payload::WithPayload;
use crate::proto::{PagemapEntry, PagemapHead, StandstillImageEntry};
use crate::store::{FolderStore, ImageOutput, ReadAt, Store};
use crate::sums::{self, Sums};
use crate::table::{Id, ImageKind};

/// The images of a store. A copy is cheap and is the same store.
#[derive(Clone)]
pub struct Images {
    store: Arc<dyn Store>,
    sums: Sums,
}

impl std::fmt::Debug for Images {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Images")
    }
}

impl Images {
    /// The images of this store.
    pub fn new(store: impl Store + 'static) -> Self {
        Self { store: Arc::new(store), sums: Sums::default() }
    }

    /// The images of a folder that is there.
    ///
    /// # Errors
    /// If the folder cannot be opened.
    pub fn open_folder(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::new(FolderStore::open(path)?))
    }

    /// Where they are.
    #[must_use]
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The images of the checkpoint that this one builds on.
    ///
    /// # Errors
    /// If it is there and cannot be opened.
    pub fn parent(&self) -> Result<Option<Self>> {
        Ok(self.store.parent()?.map(|store| Self { store, sums: Sums::default() }))
    }

    /// Whether there is such an image.
    ///
    /// # Errors
    /// If that cannot be told, or the number does not belong to the kind.
    pub fn exists(&self, kind: ImageKind, id: impl Into<Id>) -> Result<bool> {
        self.store.exists(&kind.file_name(id)?)
    }

    /// An image, to walk over its entries; its content stays in memory as long as this is there.
    ///
    /// # Errors
    /// If it is missing or cannot be read.
    pub fn open(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Image> {
        let name = kind.file_name(id)?;
        let bytes = self.store.read(&name)?;
        Ok(Image { kind, name, bytes })
    }

    /// As [`Self::open`], with nothing if the image is missing.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn open_if_there(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Option<Image>> {
        if_there(self.open(kind, id))
    }

    /// A raw image (pages, archives), to read parts of.
    ///
    /// # Errors
    /// If it is missing or cannot be opened.
    pub fn open_raw(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Box<dyn ReadAt>> {
        self.store.open(&kind.file_name(id)?)
    }

    /// All entries of an image.
    ///
    /// # Errors
    /// If it is missing, cannot be read, or is malformed.
    pub fn read_entries<T: Entry>(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Vec<T>> {
        self.open(kind, id)?.reader()?.all()
    }

    /// All entries of an image, none if it is missing.
    ///
    /// # Errors
    /// If it cannot be read, or is malformed.
    pub fn read_entries_if_there<T: Entry>(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Vec<T>> {
        Ok(if_there(self.read_entries(kind, id))?.unwrap_or_default())
    }

    /// The only entry of an image.
    ///
    /// # Errors
    /// If it is missing, cannot be read, is malformed, or has another number of entries.
    pub fn read_one<T: Entry>(&self, kind: ImageKind, id: impl Into<Id>) -> Result<T> {
        self.open(kind, id)?.reader()?.one()
    }

    /// The only entry of an image, or nothing if the image is missing.
    ///
    /// # Errors
    /// If it cannot be read, is malformed, or has another number of entries.
    pub fn read_one_if_there<T: Entry>(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Option<T>> {
        if_there(self.read_one(kind, id))
    }

    /// The head and the entries of a pagemap; [`crate::pages`] makes sense of them.
    ///
    /// # Errors
    /// If it is missing, cannot be read, or is malformed.
    pub fn read_pagemap(&self, kind: ImageKind, id: impl Into<Id>) -> Result<(PagemapHead, Vec<PagemapEntry>)> {
        self.open(kind, id)?.reader()?.pagemap()
    }

    /// A new image, in place of one of the same name.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(&self, kind: ImageKind, id: impl Into<Id>) -> Result<ImageWriter> {
        let name = kind.file_name(id)?;
        let output = self.sums.watch(&name, self.store.create(&name)?)?;
        Ok(ImageWriter { writer: Writer::new(kind, name, output) })
    }

    /// A new raw image, to write to without our buffer.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create_raw(&self, kind: ImageKind, id: impl Into<Id>) -> Result<Box<dyn ImageOutput>> {
        let name = kind.file_name(id)?;
        self.sums.watch(&name, self.store.create(&name)?)
    }

    /// A new image with these entries.
    ///
    /// # Errors
    /// If an entry does not belong into it, or it cannot be written.
    pub fn write_entries<T: Entry>(
        &self,
        kind: ImageKind,
        id: impl Into<Id>,
        entries: impl IntoIterator<Item = T>,
    ) -> Result<()> {
        let mut image = self.create(kind, id)?;
        for entry in entries {
            image.write(&entry)?;
        }
        image.finish()
    }

    /// A new image with one entry.
    ///
    /// # Errors
    /// As [`Self::write_entries`].
    pub fn write_one<T: Entry>(&self, kind: ImageKind, id: impl Into<Id>, entry: &T) -> Result<()> {
        let mut image = self.create(kind, id)?;
        image.write(entry)?;
        image.finish()
    }

    /// Removes an image; one that is not there is no error.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self, kind: ImageKind, id: impl Into<Id>) -> Result<()> {
        self.store.remove(&kind.file_name(id)?)
    }

    /// All images that are there but the inventory, which takes this list; the sums of those that were written through here.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn written(&self) -> Result<Vec<StandstillImageEntry>> {
        sums::list(&*self.store, &self.sums)
    }

    /// Makes everything that was finished last, as far as the store was asked to.
    ///
    /// # Errors
    /// If that fails.
    pub fn commit(&self) -> Result<()> {
        self.store.commit()
    }
}

fn if_there<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.is_missing() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The content of one image.
#[derive(Debug, Clone)]
pub struct Image {
    kind: ImageKind,
    name: String,
    bytes: Bytes,
}

impl Image {
    /// An image from its bytes, for what is not in a store; `name` is for errors only.
    pub fn new(kind: ImageKind, name: impl Into<String>, bytes: impl Into<Bytes>) -> Self {
        Self { kind, name: name.into(), bytes: bytes.into() }
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ImageKind {
        self.kind
    }

    /// Its file name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All of its bytes, header included.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Its entries.
    ///
    /// # Errors
    /// If it does not begin with its magics.
    pub fn reader(&self) -> Result<Reader<'_>> {
        Reader::new(self.kind, &self.name, &self.bytes)
    }
}

/// A new image of a store.
#[must_use = "an image is complete only when it is finished"]
pub struct ImageWriter {
    writer: Writer<Box<dyn ImageOutput>>,
}

impl ImageWriter {
    /// Adds an entry: see [`Writer::write`].
    ///
    /// # Errors
    /// As there.
    pub fn write<T: Entry>(&mut self, entry: &T) -> Result<()> {
        self.writer.write(entry)
    }

    /// Adds an entry and what follows it.
    ///
    /// # Errors
    /// If the entry does not belong into this image, the sizes differ, or it cannot be written.
    pub fn write_with_payload<T: WithPayload>(&mut self, entry: &T, payload: &T::Payload<'_>) -> Result<()> {
        self.writer.write_with_payload(entry, payload)
    }

    /// Adds raw bytes: of a raw image, or what is in a ghost file.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn write_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.writer.write_raw(bytes)
    }

    /// Writes out what is in the buffer and lends the file behind the image, if there is one: what system calls add to it
    /// follows what was written.
    ///
    /// # Errors
    /// If the buffer cannot be written.
    pub fn as_file(&mut self) -> Result<Option<&File>> {
        self.writer.flushed().map(|output| output.as_file())
    }

    /// Ends the image.
    ///
    /// # Errors
    /// If it cannot be written as a whole.
    pub fn finish(self) -> Result<()> {
        self.writer.into_inner()?.finish()
    }
}
