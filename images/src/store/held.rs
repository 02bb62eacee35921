//! Images that are held in memory, for a restore whose images are in no folder.
//!
//! A restore wants pages in files: tasks read them straight to where they belong (`preadv(2)`). [`HeldStore`] is memory in which
//! a large image is a file without a name (memfd_create(2)), filled while it arrives and sealed when it is finished, and
//! [`GatheredStore`] brings what another store has no files for into such memory when it is asked for.
//!
//! What it costs: the images take their size in memory (it can be swapped, and counts to the control group of whoever holds
//! them) until the store is dropped, beside the memory of the program that is restored.
//!
//! Man pages: memfd_create(2), fcntl(2) on seals.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use bytes::Bytes;
use rustix::fs::{MemfdFlags, SealFlags};

use super::{check_name, ImageOutput, Named, ReadAt, Store, LARGEST_READ};
use crate::error::{Error, Result};

/// Images up to this size are no files: a checkpoint has many small ones, and descriptors are few.
const SMALL: usize = 64 << 10;
/// What one thread brings at a time.
const PIECE: usize = 4 << 20;
/// How many threads bring one large image. What they wait for is mostly another host.
const THREADS: u64 = 4;
/// How many images are brought at a time.
const SIDE_BY_SIDE: usize = 8;

/// Images in memory, the large ones as files. A copy of the store is the same store.
#[derive(Debug, Clone, Default)]
pub struct HeldStore {
    images: Named<Held>,
}

#[derive(Debug, Clone)]
enum Held {
    Small(Bytes),
    Large(Arc<Whole>),
}

/// A file that nobody changes any more.
#[derive(Debug)]
struct Whole {
    file: File,
    size: u64,
}

fn failed<'a>(image: &'a str, operation: &'static str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { image: image.to_owned(), operation, source }
}

fn memory_file() -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    Ok(File::from(rustix::fs::memfd_create("standstill image", flags)?))
}

impl Whole {
    fn seal(file: File, size: u64) -> io::Result<Arc<Whole>> {
        rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
        Ok(Arc::new(Whole { file, size }))
    }
}

impl HeldStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Brings an image from elsewhere, as a file only if it is large.
    fn bring_whole(&self, name: &str, from: &dyn ReadAt) -> Result<()> {
        if from.len() > SMALL as u64 {
            return self.bring(name, from);
        }
        let mut bytes = vec![0; usize::try_from(from.len()).unwrap_or(SMALL)];
        from.read_exact_at(&mut bytes, 0).map_err(|source| super::sealed::failed(name, source))?;
        self.images.put(name, Held::Small(bytes.into()));
        Ok(())
    }

    /// Brings an image from elsewhere.
    fn bring(&self, name: &str, from: &dyn ReadAt) -> Result<()> {
        let (file, size) = (memory_file().map_err(failed(name, "hold"))?, from.len());
        file.set_len(size).map_err(failed(name, "hold"))?;
        let pieces = size.div_ceil(PIECE as u64);
        let every = pieces.clamp(1, THREADS);
        let bring = |first: u64| -> io::Result<()> {
            let mut buffer = Vec::new();
            for piece in (first..pieces).step_by(usize::try_from(every).unwrap_or(1)) {
                let at = piece * PIECE as u64;
                buffer.resize(usize::try_from(size - at).unwrap_or(PIECE).min(PIECE), 0);
                from.read_exact_at(&mut buffer, at)?;
                file.write_all_at(&buffer, at)?;
            }
            Ok(())
        };
        let done = std::thread::scope(|scope| {
            let others: Vec<_> = (1..every).map(|first| scope.spawn(move || bring(first))).collect();
            let mine = bring(0);
            let theirs = others.into_iter().map(|t| t.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into())));
            theirs.fold(mine, io::Result::and)
        });
        done.map_err(|source| super::sealed::failed(name, source))?;
        self.images.put(name, Held::Large(Whole::seal(file, size).map_err(failed(name, "hold"))?));
        Ok(())
    }
}

impl Store for HeldStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        let whole = match self.images.get(name)? {
            Held::Small(bytes) => return Ok(bytes),
            Held::Large(whole) => whole,
        };
        if whole.size > LARGEST_READ {
            return Err(failed(name, "read")(io::ErrorKind::FileTooLarge.into()));
        }
        let mut bytes = vec![0; usize::try_from(whole.size).unwrap_or(usize::MAX)];
        FileExt::read_exact_at(&whole.file, &mut bytes, 0).map_err(failed(name, "read"))?;
        Ok(bytes.into())
    }

    /// The image as a file, whatever its size.
    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        match self.images.get(name)? {
            Held::Large(whole) => Ok(Box::new(whole)),
            Held::Small(bytes) => {
                self.bring(name, &bytes)?;
                match self.images.get(name)? {
                    Held::Large(whole) => Ok(Box::new(whole)),
                    Held::Small(bytes) => Ok(Box::new(bytes)),
                }
            }
        }
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        let to = Output { name: name.to_owned(), small: Vec::new(), large: None, size: 0, store: self.clone() };
        Ok(Box::new(to))
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
        Ok(None)
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }
}

struct Output {
    name: String,
    small: Vec<u8>,
    large: Option<File>,
    size: u64,
    store: HeldStore,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(file) = &mut self.large {
            let written = file.write(bytes)?;
            self.size += written as u64;
            return Ok(written);
        }
        if self.small.len() + bytes.len() > SMALL {
            let mut file = memory_file()?;
            file.write_all(&self.small)?;
            file.write_all(bytes)?;
            (self.small, self.large) = (Vec::new(), Some(file));
        } else {
            self.small.extend_from_slice(bytes);
        }
        self.size += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for Output {
    fn finish(self: Box<Self>) -> Result<()> {
        let held = match self.large {
            None => Held::Small(self.small.into()),
            Some(file) => Held::Large(Whole::seal(file, self.size).map_err(failed(&self.name, "hold"))?),
        };
        self.store.images.put(&self.name, held);
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

impl ReadAt for Arc<Whole> {
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

/// A store as a restore needs it: every image that is opened is a file. What has none in the store behind is gathered into
/// memory, in parts, by several threads, and once.
#[derive(Clone)]
pub struct GatheredStore {
    from: Arc<dyn Store>,
    held: HeldStore,
    below: Option<Arc<Self>>,
}

impl GatheredStore {
    /// The images of another store.
    #[must_use]
    pub fn new(from: Arc<dyn Store>) -> Self {
        Self { from, held: HeldStore::new(), below: None }
    }

    /// The images of another store and of those that it builds on, all of which are brought now, several at a time: what
    /// is wrong with any of them, the store behind says now and not later.
    ///
    /// # Errors
    /// If one of them does not come.
    pub fn all(from: Arc<dyn Store>) -> Result<Self> {
        let below = match from.parent()? {
            Some(parent) => Some(Arc::new(Self::all(parent)?)),
            None => None,
        };
        let this = Self { below, ..Self::new(from) };
        let (names, next) = (this.from.list()?, AtomicUsize::new(0));
        let bring = || -> Result<()> {
            while let Some(name) = names.get(next.fetch_add(1, Ordering::Relaxed)) {
                this.held.bring_whole(name, &*this.from.open(name)?)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..names.len().min(SIDE_BY_SIDE)).map(|_| scope.spawn(bring)).collect();
            let mine = bring();
            let gone = || Error::Io { image: "images".into(), operation: "read", source: io::ErrorKind::Other.into() };
            let theirs = others.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(gone())));
            theirs.fold(mine, Result::and)
        })?;
        Ok(this)
    }
}

impl Store for GatheredStore {
    fn read(&self, name: &str) -> Result<Bytes> {
        if self.held.exists(name)? {
            return self.held.read(name);
        }
        self.from.read(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        if self.held.exists(name)? {
            return self.held.open(name);
        }
        let image = self.from.open(name)?;
        if image.as_file().is_some() {
            return Ok(image);
        }
        self.held.bring(name, &*image)?;
        self.held.open(name)
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        self.held.remove(name)?;
        self.from.create(name)
    }

    fn exists(&self, name: &str) -> Result<bool> {
        self.from.exists(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        self.from.list()
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.held.remove(name)?;
        self.from.remove(name)
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        if let Some(below) = &self.below {
            return Ok(Some(below.clone()));
        }
        Ok(self.from.parent()?.map(|parent| -> Arc<dyn Store> { Arc::new(Self::new(parent)) }))
    }

    fn commit(&self) -> Result<()> {
        self.from.commit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;

    fn content(size: usize) -> Vec<u8> {
        (0..size).map(|place| place.to_le_bytes()[1]).collect()
    }

    fn is_file_with(image: &dyn ReadAt, wanted: &[u8]) {
        let file = image.as_file().unwrap();
        assert_eq!(image.len(), wanted.len() as u64);
        let mut found = vec![0; wanted.len()];
        FileExt::read_exact_at(file, &mut found, 0).unwrap();
        assert!(found == wanted);
        assert!(file.write_at(b"x", 0).is_err(), "it is sealed");
        assert!(file.set_len(wanted.len() as u64 + 1).is_err());
    }

    #[test]
    fn every_image_opens_as_a_file() {
        let store = HeldStore::new();
        for size in [0, 1, SMALL, SMALL + 1, 3 << 20] {
            let wanted = content(size);
            let mut image = store.create("i").unwrap();
            for part in wanted.chunks(50_000) {
                image.write_all(part).unwrap();
            }
            image.finish().unwrap();
            assert!(store.read("i").unwrap() == wanted);
            is_file_with(&*store.open("i").unwrap(), &wanted);
            assert!(store.read("i").unwrap() == wanted, "also when it is a file");
        }
    }

    #[test]
    fn what_has_no_file_is_gathered() {
        let memory = MemoryStore::new();
        for (name, size) in [("empty", 0), ("one", PIECE), ("many", 5 * PIECE + 17)] {
            memory.insert(name, content(size)).unwrap();
        }
        let store = GatheredStore::new(Arc::new(memory.clone()));
        for (name, size) in [("empty", 0), ("one", PIECE), ("many", 5 * PIECE + 17)] {
            is_file_with(&*store.open(name).unwrap(), &content(size));
            memory.insert(name, b"changed".as_slice()).unwrap();
            is_file_with(&*store.open(name).unwrap(), &content(size));
        }
        assert!(store.open("none").err().is_some_and(|e| e.is_missing()));
    }

    #[test]
    fn all_at_once_and_what_is_below() {
        let below = MemoryStore::new();
        below.insert("below", content(2 * PIECE)).unwrap();
        let memory = MemoryStore::new().on(below.clone());
        let sizes = [0, 1, SMALL, SMALL + 1, PIECE, 2 * PIECE + 9];
        for (n, size) in sizes.into_iter().enumerate() {
            memory.insert(&n.to_string(), content(size)).unwrap();
        }
        let store = GatheredStore::all(Arc::new(memory.clone())).unwrap();
        for name in memory.list().unwrap() {
            memory.insert(&name, b"changed".as_slice()).unwrap();
        }
        below.insert("below", b"changed".as_slice()).unwrap();
        for (n, size) in sizes.into_iter().enumerate() {
            assert!(store.read(&n.to_string()).unwrap() == content(size));
            is_file_with(&*store.open(&n.to_string()).unwrap(), &content(size));
        }
        assert!(store.parent().unwrap().unwrap().read("below").unwrap() == content(2 * PIECE));
    }

    /// An image that ends early.
    struct Short;

    impl ReadAt for Short {
        fn len(&self) -> u64 {
            9 << 20
        }
        fn read_exact_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
            if offset > 0 {
                Err(io::ErrorKind::UnexpectedEof.into())
            } else {
                Ok(())
            }
        }
        fn as_file(&self) -> Option<&File> {
            None
        }
    }

    #[test]
    fn a_part_that_does_not_come_is_an_error() {
        let store = HeldStore::new();
        assert!(matches!(store.bring("i", &Short), Err(Error::Io { .. })));
        assert!(!store.exists("i").unwrap());
    }
}
