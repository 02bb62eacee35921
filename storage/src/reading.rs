//! A checkpoint that is read: pieces of objects, each of which is compared with what was written.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use standstill_images::store::LARGEST_READ;
use standstill_images::{Error, ReadAt, Result};

use crate::manifest::Object;
use crate::runtime::Runtime;
use crate::writing::{text, Remote};
use crate::{sum, Sum, MANIFEST, PIECE};

/// The longest manifest: of some hundred TiB.
const LONGEST: u64 = 256 << 20;
/// How often a piece is fetched that did not come, or is wrong.
const TRIES: usize = 2;
/// Pieces of an image that are kept for who reads beside them.
const KEPT: usize = 8;

/// The bytes of the manifest, if there is one.
pub(crate) async fn manifest(remote: &Remote) -> object_store::Result<Option<Bytes>> {
    let answer = match remote.storage.get(&remote.path(MANIFEST)).await {
        Err(object_store::Error::NotFound { .. }) => return Ok(None),
        result => result?,
    };
    if answer.meta.size > LONGEST {
        let source = io::Error::from(io::ErrorKind::FileTooLarge).into();
        return Err(object_store::Error::Generic { store: "storage", source });
    }
    answer.bytes().await.map(Some)
}

async fn fetch(remote: Arc<Remote>, name: String, range: Range<u64>, wanted: Sum) -> io::Result<Bytes> {
    let Ok(_permit) = Arc::clone(&remote.in_flight).acquire_owned().await else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut problem = String::new();
    for _ in 0..TRIES {
        match remote.storage.get_range(&remote.path(&name), range.clone()).await {
            Ok(bytes) if bytes.len() as u64 == range.end - range.start && sum(&bytes) == wanted => return Ok(bytes),
            Ok(_) => {
                problem = format!("bytes {} to {} are not those that were written", range.start, range.end);
            }
            Err(error @ object_store::Error::NotFound { .. }) => return Err(io::Error::other(text(&error))),
            Err(error) => problem = text(&error),
        }
    }
    Err(io::Error::other(problem))
}

/// A piece that is there, or that somebody is fetching.
type Slot = Arc<Mutex<Option<Bytes>>>;

pub(crate) struct Input {
    remote: Arc<Remote>,
    runtime: Arc<Runtime>,
    name: String,
    object: Object,
    kept: Mutex<VecDeque<(usize, Slot)>>,
}

impl Input {
    pub(crate) fn new(remote: Arc<Remote>, runtime: Arc<Runtime>, name: &str, object: Object) -> Self {
        Self { remote, runtime, name: name.to_owned(), object, kept: Mutex::default() }
    }

    fn range(&self, piece: usize) -> Range<u64> {
        let begin = piece as u64 * PIECE as u64;
        begin..self.object.size.min(begin + PIECE as u64)
    }

    fn request(
        &self,
        piece: usize,
    ) -> io::Result<impl std::future::Future<Output = io::Result<Bytes>> + Send + 'static> {
        let wanted = *self.object.sums.get(piece).ok_or(io::ErrorKind::UnexpectedEof)?;
        Ok(fetch(Arc::clone(&self.remote), self.name.clone(), self.range(piece), wanted))
    }

    fn piece(&self, piece: usize) -> io::Result<Bytes> {
        let slot = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            match kept.iter().find(|(number, _)| *number == piece) {
                Some((_, slot)) => Arc::clone(slot),
                None => {
                    let slot = Slot::default();
                    kept.push_back((piece, Arc::clone(&slot)));
                    if kept.len() > KEPT {
                        kept.pop_front();
                    }
                    slot
                }
            }
        };
        // who wants the same piece waits for the first of them
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = &*slot {
            return Ok(bytes.clone());
        }
        let bytes = self.runtime.run(self.request(piece)?)??;
        *slot = Some(bytes.clone());
        Ok(bytes)
    }

    /// All of it; pieces side by side.
    pub(crate) fn all(&self) -> Result<Bytes> {
        let failed = |source| Error::Io { image: self.name.clone(), operation: "read", source };
        if self.object.size > LARGEST_READ {
            return Err(failed(io::ErrorKind::FileTooLarge.into()));
        }
        let mut tasks = Vec::new();
        for piece in 0..self.object.sums.len() {
            tasks.push(self.runtime.handle().spawn(self.request(piece).map_err(failed)?));
        }
        let mut all = Vec::new();
        for task in tasks {
            let bytes =
                self.runtime.run(task).map_err(failed)?.map_err(|e| failed(io::Error::other(e)))?.map_err(failed)?;
            if bytes.len() as u64 == self.object.size {
                return Ok(bytes);
            }
            all.extend_from_slice(&bytes);
        }
        Ok(all.into())
    }
}

impl ReadAt for Input {
    fn len(&self) -> u64 {
        self.object.size
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.object.size);
        end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let number = usize::try_from(at / PIECE as u64).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            let skip = usize::try_from(at % PIECE as u64).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            let bytes = self.piece(number)?;
            let there = bytes.get(skip..).unwrap_or_default();
            let count = there.len().min(rest.len());
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (room, after) = std::mem::take(&mut rest).split_at_mut(count);
            room.copy_from_slice(&there[..count]);
            (at, rest) = (at + count as u64, after);
        }
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}
