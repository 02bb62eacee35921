//! Where images are.
//!
//! A [`Store`] knows names and bytes, nothing of what is in them: [`FolderStore`] is a folder as CRIU has it,
//! [`MemoryStore`] holds everything in memory, and so do those in [`held`], as files. Metadata are small and are read as a
//! whole; pages are read where they lie ([`ReadAt`]).

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use rustix::fs::{AtFlags, Mode, OFlags, CWD};
use rustix::io::Errno;

use crate::error::{Error, Result};

pub mod held;
pub mod sealed;
pub mod stream;

/// The largest image that is read as a whole. Pages and archives are never read so.
pub const LARGEST_READ: u64 = 2 << 30;

/// A place that images are kept in.
pub trait Store: Send + Sync {
    /// All bytes of an image. A copy of what is returned costs nothing.
    ///
    /// # Errors
    /// If it is missing, cannot be read, or is larger than [`LARGEST_READ`].
    fn read(&self, name: &str) -> Result<Bytes>;

    /// An image to read parts of.
    ///
    /// # Errors
    /// If it is missing or cannot be opened.
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>>;

    /// A new image, in place of one of the same name.
    ///
    /// # Errors
    /// If it cannot be created.
    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>>;

    /// Whether there is an image of this name.
    ///
    /// # Errors
    /// If that cannot be told.
    fn exists(&self, name: &str) -> Result<bool>;

    /// The names of all images, sorted.
    ///
    /// # Errors
    /// If they cannot be told.
    fn list(&self) -> Result<Vec<String>>;

    /// Removes an image; one that is not there is no error.
    ///
    /// # Errors
    /// If it cannot be removed.
    fn remove(&self, name: &str) -> Result<()>;

    /// The checkpoint that this one builds on.
    ///
    /// # Errors
    /// If it is there and cannot be opened.
    fn parent(&self) -> Result<Option<Arc<dyn Store>>>;

    /// Makes everything that was finished last, as far as the store was asked to.
    ///
    /// # Errors
    /// If that fails.
    fn commit(&self) -> Result<()>;
}

/// A store that has several owners.
impl<S: Store + ?Sized> Store for Arc<S> {
    fn read(&self, name: &str) -> Result<Bytes> {
        (**self).read(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        (**self).open(name)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        (**self).create(name)
    }

    fn exists(&self, name: &str) -> Result<bool> {
        (**self).exists(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        (**self).list()
    }

    fn remove(&self, name: &str) -> Result<()> {
        (**self).remove(name)
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        (**self).parent()
    }

    fn commit(&self) -> Result<()> {
        (**self).commit()
    }
}

/// An image that is being written. It is complete only when it is finished.
pub trait ImageOutput: Write + Send {
    /// Ends the image.
    ///
    /// # Errors
    /// If it cannot be written as a whole.
    fn finish(self: Box<Self>) -> Result<()>;

    /// The file behind it, if there is one: for system calls that move data without a copy. What they write follows what
    /// was written before.
    fn as_file(&self) -> Option<&File>;
}

/// An image that is read in parts.
#[allow(clippy::len_without_is_empty)]
pub trait ReadAt: Send + Sync {
    /// How long it is.
    fn len(&self) -> u64;

    /// Fills `buffer` with what is at `offset`.
    ///
    /// # Errors
    /// If it ends before that, or cannot be read.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// The file behind it, if there is one.
    fn as_file(&self) -> Option<&File>;
}

/// Refuses names that would leave the store.
///
/// # Errors
/// If no image can have this name.
pub fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 255 || name == "." || name == ".." || name.contains(['/', '\0']) {
        return Err(Error::Name { name: name.to_owned() });
    }
    Ok(())
}

fn failed<'a>(image: &'a str, operation: &'static str) -> impl FnOnce(Errno) -> Error + 'a {
    move |errno| match errno {
        Errno::NOENT => Error::Missing { image: image.to_owned() },
        errno => Error::Io { image: image.to_owned(), operation, source: errno.into() },
    }
}

/// A folder of images.
#[derive(Debug)]
pub struct FolderStore {
    folder: OwnedFd,
    durable: bool,
}

impl FolderStore {
    /// Opens a folder.
    ///
    /// # Errors
    /// If it cannot be opened, or is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let folder = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| Error::Io {
                image: path.display().to_string(),
                operation: "open the folder",
                source: errno.into(),
            })?;
        Ok(Self::from_fd(folder))
    }

    /// Uses a folder that is open already.
    #[must_use]
    pub fn from_fd(folder: OwnedFd) -> Self {
        Self { folder, durable: false }
    }

    /// Chooses whether images must survive a loss of power once they are finished and the store is committed.
    #[must_use]
    pub fn durable(self, durable: bool) -> Self {
        Self { durable, ..self }
    }

    /// Makes `parent` point to another folder, or removes the link; a relative path is relative to this one.
    ///
    /// # Errors
    /// If the link cannot be made.
    pub fn set_parent(&self, path: Option<&Path>) -> Result<()> {
        match rustix::fs::unlinkat(&self.folder, PARENT, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed(PARENT, "replace")(errno)),
        }
        match path {
            Some(path) => rustix::fs::symlinkat(path, &self.folder, PARENT).map_err(failed(PARENT, "link")),
            None => Ok(()),
        }
    }

    fn file(&self, name: &str) -> Result<(File, u64)> {
        check_name(name)?;
        // NONBLOCK: a fifo in the folder must not stop us; it has no effect on a file.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        let file = rustix::fs::openat(&self.folder, name, flags, Mode::empty()).map_err(failed(name, "open"))?;
        let file = File::from(file);
        let failed = |source| Error::Io { image: name.to_owned(), operation: "open", source };
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")));
        }
        Ok((file, metadata.len()))
    }
}

/// Name of the link to the checkpoint that one builds on.
const PARENT: &str = "parent";

impl AsFd for FolderStore {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

impl Store for FolderStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        let (file, size) = self.file(name)?;
        let failed = |source| Error::Io { image: name.to_owned(), operation: "read", source };
        if size > LARGEST_READ {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let mut bytes = Vec::new();
        let reserve = usize::try_from(size).unwrap_or(usize::MAX);
        bytes.try_reserve_exact(reserve).map_err(|_| failed(io::ErrorKind::OutOfMemory.into()))?;
        (&file).take(LARGEST_READ).read_to_end(&mut bytes).map_err(failed)?;
        Ok(bytes.into())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        let (file, size) = self.file(name)?;
        Ok(Box::new(FolderInput { file, size }))
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        // NOFOLLOW: the folder may be writable for others than us.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NOCTTY;
        let file =
            rustix::fs::openat(&self.folder, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed(name, "create"))?;
        Ok(Box::new(FolderOutput { name: name.to_owned(), file: file.into(), durable: self.durable }))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        check_name(name)?;
        match rustix::fs::statat(&self.folder, name, AtFlags::empty()) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(failed(name, "find")(errno)),
        }
    }

    fn list(&self) -> Result<Vec<String>> {
        let failed = |errno: Errno| Error::Io { image: ".".to_owned(), operation: "list", source: errno.into() };
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let Ok(name) = entry.file_name().to_str() else { continue };
            if name != "." && name != ".." {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        match rustix::fs::unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(failed(name, "remove")(errno)),
        }
    }

    /// The folder that `parent` in this one points to.
    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.folder, PARENT, flags, Mode::empty()) {
            Ok(folder) => Ok(Some(Arc::new(Self::from_fd(folder)))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(failed(PARENT, "open")(errno)),
        }
    }

    fn commit(&self) -> Result<()> {
        if self.durable {
            rustix::fs::fsync(&self.folder).map_err(failed(".", "make durable"))?;
        }
        Ok(())
    }
}

struct FolderOutput {
    name: String,
    file: File,
    durable: bool,
}

impl Write for FolderOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl ImageOutput for FolderOutput {
    fn finish(self: Box<Self>) -> Result<()> {
        if self.durable {
            self.file.sync_all().map_err(|source| Error::Io {
                image: self.name.clone(),
                operation: "make durable",
                source,
            })?;
        }
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

struct FolderInput {
    file: File,
    size: u64,
}

impl ReadAt for FolderInput {
    fn len(&self) -> u64 {
        self.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(&self.file, buffer, offset)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// What is known of images, by name. A copy is the same.
#[derive(Debug)]
pub(crate) struct Named<T>(Arc<Mutex<BTreeMap<String, T>>>);

impl<T> Clone for Named<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T> Default for Named<T> {
    fn default() -> Self {
        Self::from(BTreeMap::new())
    }
}

impl<T> From<BTreeMap<String, T>> for Named<T> {
    fn from(all: BTreeMap<String, T>) -> Self {
        Self(Arc::new(Mutex::new(all)))
    }
}

impl<T: Clone> Named<T> {
    fn with<R>(&self, act: impl FnOnce(&mut BTreeMap<String, T>) -> R) -> R {
        // The map is whole at any time, also if another thread panicked.
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn find(&self, name: &str) -> Option<T> {
        self.with(|all| all.get(name).cloned())
    }

    pub(crate) fn get(&self, name: &str) -> Result<T> {
        check_name(name)?;
        self.find(name).ok_or_else(|| Error::Missing { image: name.to_owned() })
    }

    pub(crate) fn put(&self, name: &str, one: T) {
        self.with(|all| all.insert(name.to_owned(), one));
    }

    pub(crate) fn exists(&self, name: &str) -> Result<bool> {
        check_name(name)?;
        Ok(self.with(|all| all.contains_key(name)))
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.with(|all| all.keys().cloned().collect())
    }

    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        self.with(|all| all.remove(name));
        Ok(())
    }

    pub(crate) fn all(&self) -> BTreeMap<String, T> {
        self.with(|all| all.clone())
    }
}

/// Images in memory. A copy of the store is the same store.
#[derive(Debug, Clone, Default)]
pub struct MemoryStore {
    images: Named<Bytes>,
    parent: Option<Arc<Self>>,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same store, which builds on another.
    #[must_use]
    pub fn on(self, parent: Self) -> Self {
        Self { parent: Some(Arc::new(parent)), ..self }
    }

    /// Puts a whole image in.
    ///
    /// # Errors
    /// If no image can have this name.
    pub fn insert(&self, name: &str, bytes: impl Into<Bytes>) -> Result<()> {
        check_name(name)?;
        self.images.put(name, bytes.into());
        Ok(())
    }
}

impl Store for MemoryStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        self.images.get(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        Ok(Box::new(self.read(name)?))
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        Ok(Box::new(MemoryOutput { name: name.to_owned(), bytes: Vec::new(), store: self.clone() }))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        self.images.exists(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(self.images.names())
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.images.remove(name)
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        Ok(self.parent.clone().map(|parent| -> Arc<dyn Store> { parent }))
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }
}

struct MemoryOutput {
    name: String,
    bytes: Vec<u8>,
    store: MemoryStore,
}

impl Write for MemoryOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for MemoryOutput {
    fn finish(self: Box<Self>) -> Result<()> {
        self.store.insert(&self.name, self.bytes)
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

impl ReadAt for Bytes {
    fn len(&self) -> u64 {
        self.as_ref().len() as u64
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let begin = usize::try_from(offset).ok();
        let end = begin.and_then(|begin| begin.checked_add(buffer.len()));
        let part = begin.zip(end).and_then(|(begin, end)| self.get(begin..end));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

#[cfg(test)]
mod tests;
