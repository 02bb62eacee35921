//! A checkpoint that is written. The order, and what is left of one that fails, is said at the head of the crate.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use object_store::path::Path;
use object_store::{MultipartUpload, ObjectStore, PutPayload};
use standstill_images::store::check_name;
use standstill_images::{Error, ImageOutput, ReadAt, Result, Store};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use crate::connect::{connect, Settings};
use crate::manifest::{self, Object};
use crate::runtime::Runtime;
use crate::{reading, sum, CLEAN_UP, INVENTORY, IN_FLIGHT, MANIFEST, MARKER, PART, PIECE};

/// Images as objects. A copy is the same storage.
#[derive(Clone)]
pub struct ObjectStorage {
    shared: Arc<Shared>,
}

struct Shared {
    remote: Arc<Remote>,
    url: String,
    writing: bool,
    state: Mutex<State>,
    // dropped last: it runs what the others left
    runtime: Arc<Runtime>,
}

/// What requests need; they do not hold the thread that they run in.
pub(crate) struct Remote {
    pub(crate) storage: Arc<dyn ObjectStore>,
    pub(crate) prefix: Path,
    pub(crate) in_flight: Arc<Semaphore>,
    /// The first failure of a request that nobody waited for.
    failed: Mutex<Option<String>>,
    /// Uploads that will not be completed.
    orphans: Mutex<Vec<Box<dyn MultipartUpload>>>,
}

#[derive(Default)]
struct State {
    /// Objects below the prefix.
    there: BTreeSet<String>,
    images: BTreeMap<String, Object>,
    pending: Vec<(String, JoinHandle<object_store::Result<()>>)>,
    inventory: Option<Bytes>,
    /// Something was written, or may have been.
    begun: bool,
    committed: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // what is in these is whole at any time, also if another thread panicked
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An error and its causes, each once.
pub(crate) fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let more = source.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        next = source.source();
    }
    text
}

pub(crate) fn failed(image: &str, operation: &'static str, source: &dyn std::error::Error) -> Error {
    io_failed(image, operation, io::Error::other(text(source)))
}

fn io_failed(image: &str, operation: &'static str, source: io::Error) -> Error {
    Error::Io { image: image.to_owned(), operation, source }
}

impl Remote {
    pub(crate) fn path(&self, name: &str) -> Path {
        self.prefix.child(name)
    }

    fn fail(&self, error: &object_store::Error) {
        lock(&self.failed).get_or_insert_with(|| text(error));
    }

    async fn put(&self, name: &str, bytes: Bytes) -> object_store::Result<()> {
        self.storage.put(&self.path(name), PutPayload::from(bytes)).await.map(|_| ())
    }

    /// The objects below the prefix, and how long they are.
    pub(crate) async fn list(&self) -> object_store::Result<BTreeMap<String, u64>> {
        let prefix = (!self.prefix.as_ref().is_empty()).then_some(&self.prefix);
        let all = self.storage.list_with_delimiter(prefix).await?;
        let named = all.objects.into_iter().filter_map(|o| Some((o.location.filename()?.to_owned(), o.size)));
        Ok(named.collect())
    }

    async fn remove(&self, name: &str) -> object_store::Result<()> {
        match self.storage.delete(&self.path(name)).await {
            Err(object_store::Error::NotFound { .. }) => Ok(()),
            result => result,
        }
    }
}

impl ObjectStorage {
    fn start(url: &str, settings: &Settings, writing: bool) -> Result<(Arc<Remote>, Arc<Runtime>)> {
        let (storage, prefix) =
            connect(url, settings, writing).map_err(|source| io_failed(url, "reach", io::Error::other(source)))?;
        let never = || Arc::new(|| false) as crate::runtime::Interrupted;
        let interrupted = settings.interrupted.clone().unwrap_or_else(never);
        let runtime = Runtime::start(interrupted).map_err(|source| io_failed(url, "reach", source))?;
        let in_flight = Arc::new(Semaphore::new(IN_FLIGHT));
        let remote = Remote { storage, prefix, in_flight, failed: Mutex::default(), orphans: Mutex::default() };
        Ok((Arc::new(remote), Arc::new(runtime)))
    }

    /// A new checkpoint below a URL. One that was there is none any more.
    ///
    /// # Errors
    /// If the storage cannot be reached, or does not let us list, write and remove.
    pub fn create(url: &str, settings: &Settings) -> Result<Self> {
        let (remote, runtime) = Self::start(url, settings, true)?;
        let state = Mutex::default();
        let made = Self { shared: Arc::new(Shared { remote, url: url.to_owned(), writing: true, state, runtime }) };
        let there = made.request(url, "list", |remote| async move { remote.list().await })?;
        lock(&made.shared.state).there = there.into_keys().collect();
        made.remove(INVENTORY)?;
        made.remove(MANIFEST)?;
        lock(&made.shared.state).begun = true;
        let marker = Bytes::from_static(b"a checkpoint is being written, or was not written to its end\n");
        made.request(MARKER, "write", |remote| async move { remote.put(MARKER, marker).await })?;
        lock(&made.shared.state).there.insert(MARKER.to_owned());
        Ok(made)
    }

    /// A checkpoint that was committed. All of its objects are there and have the sizes that they should have.
    ///
    /// # Errors
    /// If there is none, or the storage cannot be reached.
    pub fn open(url: &str, settings: &Settings) -> Result<Self> {
        let (remote, runtime) = Self::start(url, settings, false)?;
        let state = Mutex::default();
        let made = Self { shared: Arc::new(Shared { remote, url: url.to_owned(), writing: false, state, runtime }) };
        let text = made.request(MANIFEST, "read", |remote| async move { reading::manifest(&remote).await })?;
        let Some(text) = text else {
            let what = "there is no checkpoint, or it was not written to its end: no manifest.json";
            return Err(io_failed(url, "read", io::Error::other(what)));
        };
        let images = manifest::decode(&text)
            .ok_or_else(|| io_failed(MANIFEST, "read", io::Error::other("it is no list of a checkpoint's images")))?;
        let there = made.request(url, "list", |remote| async move { remote.list().await })?;
        compare(&images, &there)?;
        lock(&made.shared.state).images = images;
        Ok(made)
    }

    /// Sends a request and waits for it.
    fn request<T, F>(&self, name: &str, operation: &'static str, send: impl FnOnce(Arc<Remote>) -> F) -> Result<T>
    where
        T: Send + 'static,
        F: std::future::Future<Output = object_store::Result<T>> + Send + 'static,
    {
        let done = self.shared.runtime.run(send(Arc::clone(&self.shared.remote)));
        done.map_err(|source| io_failed(name, operation, source))?.map_err(|error| failed(name, operation, &error))
    }

    /// An error if a request that nobody waits for has failed: what follows is of no use.
    fn check(&self) -> io::Result<()> {
        match &*lock(&self.shared.remote.failed) {
            Some(text) => Err(io::Error::other(text.clone())),
            None => Ok(()),
        }
    }

    /// Waits until all that was finished is there.
    fn settle(&self) -> Result<()> {
        let pending = std::mem::take(&mut lock(&self.shared.state).pending);
        for (name, task) in pending {
            let done = self.shared.runtime.run(task).map_err(|source| io_failed(&name, "write", source))?;
            done.map_err(|error| failed(&name, "write", &error))?.map_err(|error| failed(&name, "write", &error))?;
        }
        Ok(())
    }

    fn input(&self, name: &str) -> Result<reading::Input> {
        check_name(name)?;
        let object = lock(&self.shared.state).images.get(name).cloned();
        let object = object.ok_or_else(|| Error::Missing { image: name.to_owned() })?;
        if self.shared.writing {
            self.settle()?;
        }
        let (remote, runtime) = (Arc::clone(&self.shared.remote), Arc::clone(&self.shared.runtime));
        Ok(reading::Input::new(remote, runtime, name, object))
    }
}

/// What is there must be what was sent.
fn compare(images: &BTreeMap<String, Object>, there: &BTreeMap<String, u64>) -> Result<()> {
    for (name, object) in images {
        let what = match there.get(name) {
            Some(size) if *size == object.size => continue,
            Some(size) => format!("it has {size} bytes in the storage instead of {}", object.size),
            None => "it is not in the storage".to_owned(),
        };
        return Err(io_failed(name, "find", io::Error::other(what)));
    }
    Ok(())
}

impl Store for ObjectStorage {
    fn read(&self, name: &str) -> Result<Bytes> {
        if let Some(bytes) = lock(&self.shared.state).inventory.clone().filter(|_| name == INVENTORY) {
            return Ok(bytes);
        }
        self.input(name)?.all()
    }

    fn open(&self, name: &str) -> Result<Box<dyn ReadAt>> {
        if let Some(bytes) = lock(&self.shared.state).inventory.clone().filter(|_| name == INVENTORY) {
            return Ok(Box::new(bytes));
        }
        Ok(Box::new(self.input(name)?))
    }

    fn create(&self, name: &str) -> Result<Box<dyn ImageOutput>> {
        check_name(name)?;
        if !self.shared.writing || name == MANIFEST || name == MARKER {
            return Err(Error::Name { name: name.to_owned() });
        }
        self.check().map_err(|source| io_failed(name, "create", source))?;
        // an upload of the same name that is not over yet could be over after this one
        if lock(&self.shared.state).images.contains_key(name) {
            self.settle()?;
        }
        let (buffer, sums, parts) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Box::new(Output { name: name.to_owned(), to: self.clone(), buffer, size: 0, sums, upload: None, parts }))
    }

    fn exists(&self, name: &str) -> Result<bool> {
        check_name(name)?;
        let state = lock(&self.shared.state);
        Ok(state.images.contains_key(name) || (name == INVENTORY && state.inventory.is_some()))
    }

    /// The images of the checkpoint; while it is being written also what else is there.
    fn list(&self) -> Result<Vec<String>> {
        let state = lock(&self.shared.state);
        let mut names: BTreeSet<String> = state.images.keys().cloned().collect();
        names.extend(state.inventory.iter().map(|_| INVENTORY.to_owned()));
        names.extend(state.there.iter().filter(|name| *name != MARKER && *name != MANIFEST).cloned());
        Ok(names.into_iter().collect())
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_name(name)?;
        self.settle()?;
        let there = {
            let mut state = lock(&self.shared.state);
            state.images.remove(name);
            if name == INVENTORY {
                state.inventory = None;
            }
            state.there.contains(name)
        };
        if there {
            let object = name.to_owned();
            self.request(name, "remove", |remote| async move { remote.remove(&object).await })?;
            lock(&self.shared.state).there.remove(name);
        }
        Ok(())
    }

    fn parent(&self) -> Result<Option<Arc<dyn Store>>> {
        Ok(None)
    }

    fn commit(&self) -> Result<()> {
        if !self.shared.writing {
            return Ok(());
        }
        self.settle()?;
        self.check().map_err(|source| io_failed(&self.shared.url, "write", source))?;
        let (mut images, inventory) = {
            let state = lock(&self.shared.state);
            (state.images.clone(), state.inventory.clone())
        };
        let there = self.request(&self.shared.url, "list", |remote| async move { remote.list().await })?;
        compare(&images, &there)?;
        if let Some(bytes) = &inventory {
            images.insert(INVENTORY.to_owned(), object_of(bytes));
        }
        let text = Bytes::from(manifest::encode(&images));
        let size = text.len() as u64;
        lock(&self.shared.state).there.insert(MANIFEST.to_owned());
        self.request(MANIFEST, "write", |remote| async move { remote.put(MANIFEST, text).await })?;
        let found = self.request(MANIFEST, "find", |remote| async move {
            let path = remote.path(MANIFEST);
            remote.storage.head(&path).await.map(|meta| meta.size)
        })?;
        if found != size {
            let what = format!("it has {found} bytes in the storage instead of {size}");
            return Err(io_failed(MANIFEST, "find", io::Error::other(what)));
        }
        if let Some(bytes) = inventory {
            lock(&self.shared.state).there.insert(INVENTORY.to_owned());
            self.request(INVENTORY, "write", |remote| async move { remote.put(INVENTORY, bytes).await })?;
        }
        lock(&self.shared.state).committed = true;
        if let Err(error) = self.request(MARKER, "remove", |remote| async move { remote.remove(MARKER).await }) {
            tracing::warn!("{}", text_of(&error));
        }
        Ok(())
    }
}

fn text_of(error: &Error) -> String {
    text(error)
}

fn object_of(bytes: &[u8]) -> Object {
    Object { size: bytes.len() as u64, sums: bytes.chunks(PIECE).map(sum).collect() }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let state = std::mem::take(&mut *lock(&self.state));
        if !state.begun || state.committed {
            return;
        }
        state.pending.iter().for_each(|(_, task)| task.abort());
        let remote = Arc::clone(&self.remote);
        self.runtime.run_for(CLEAN_UP, async move {
            // those that were aborted leave their uploads here
            tokio::task::yield_now().await;
            if state.there.contains(INVENTORY) {
                let _ = remote.remove(INVENTORY).await;
            }
            let mut rest = JoinSet::new();
            for mut upload in std::mem::take(&mut *lock(&remote.orphans)) {
                rest.spawn(async move { upload.abort().await });
            }
            for name in state.images.into_keys().chain([MANIFEST.to_owned(), MARKER.to_owned()]) {
                let remote = Arc::clone(&remote);
                rest.spawn(async move { remote.remove(&name).await });
            }
            while rest.join_next().await.is_some() {}
        });
    }
}

/// An upload that is left to be aborted if it is not completed, whatever becomes of the task that has it.
struct Upload {
    upload: Option<Box<dyn MultipartUpload>>,
    remote: Arc<Remote>,
}

impl Drop for Upload {
    fn drop(&mut self) {
        lock(&self.remote.orphans).extend(self.upload.take());
    }
}

struct Output {
    name: String,
    to: ObjectStorage,
    buffer: Vec<u8>,
    size: u64,
    sums: Vec<crate::Sum>,
    upload: Option<Upload>,
    parts: Vec<JoinHandle<object_store::Result<()>>>,
}

impl Output {
    /// Sends what is in the buffer. Waits while enough is on its way.
    fn send_part(&mut self) -> io::Result<()> {
        self.to.check()?;
        let (runtime, remote) = (&self.to.shared.runtime, &self.to.shared.remote);
        if self.upload.is_none() {
            let (begin, path) = (Arc::clone(remote), remote.path(&self.name));
            let upload = runtime.run(async move { begin.storage.put_multipart(&path).await })?;
            let upload = upload.map_err(|error| io::Error::other(text(&error)))?;
            self.upload = Some(Upload { upload: Some(upload), remote: Arc::clone(remote) });
        }
        let Some(upload) = self.upload.as_mut().and_then(|upload| upload.upload.as_mut()) else { return Ok(()) };
        self.sums.extend(self.buffer.chunks(PIECE).map(sum));
        let permits = Arc::clone(&remote.in_flight);
        let permit = runtime.run(permits.acquire_owned())?.map_err(io::Error::other)?;
        let part = upload.put_part(PutPayload::from(Bytes::from(std::mem::take(&mut self.buffer))));
        let remote = Arc::clone(remote);
        self.parts.push(runtime.handle().spawn(async move {
            let done = part.await;
            drop(permit);
            if let Err(error) = &done {
                remote.fail(error);
            }
            done
        }));
        Ok(())
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.buffer.len() == PART {
            self.send_part()?;
        }
        let part = &bytes[..bytes.len().min(PART - self.buffer.len())];
        self.buffer.extend_from_slice(part);
        self.size += part.len() as u64;
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ImageOutput for Output {
    fn finish(mut self: Box<Self>) -> Result<()> {
        let name = self.name.clone();
        let shared = Arc::clone(&self.to.shared);
        if name == INVENTORY {
            if self.upload.is_some() {
                return Err(io_failed(&name, "write", io::ErrorKind::FileTooLarge.into()));
            }
            lock(&shared.state).inventory = Some(std::mem::take(&mut self.buffer).into());
            return Ok(());
        }
        let remote = Arc::clone(&shared.remote);
        let task = if self.upload.is_some() {
            self.send_part().map_err(|source| io_failed(&name, "write", source))?;
            let (parts, upload) = (std::mem::take(&mut self.parts), self.upload.take());
            shared.runtime.handle().spawn(async move {
                let done = complete(parts, upload).await;
                done.inspect_err(|error| remote.fail(error))
            })
        } else {
            self.sums.extend(self.buffer.chunks(PIECE).map(sum));
            let permits = Arc::clone(&remote.in_flight);
            let permit = shared.runtime.run(permits.acquire_owned());
            let permit = permit.and_then(|permit| permit.map_err(io::Error::other));
            let permit = permit.map_err(|source| io_failed(&name, "write", source))?;
            let (bytes, object) = (Bytes::from(std::mem::take(&mut self.buffer)), name.clone());
            shared.runtime.handle().spawn(async move {
                let done = remote.put(&object, bytes).await;
                drop(permit);
                done.inspect_err(|error| remote.fail(error))
            })
        };
        let object = Object { size: self.size, sums: std::mem::take(&mut self.sums) };
        let mut state = lock(&shared.state);
        state.pending.push((name.clone(), task));
        state.there.insert(name.clone());
        state.images.insert(name, object);
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        None
    }
}

async fn complete(
    parts: Vec<JoinHandle<object_store::Result<()>>>,
    upload: Option<Upload>,
) -> object_store::Result<()> {
    for part in parts {
        match part.await {
            Ok(done) => done?,
            Err(source) => return Err(object_store::Error::JoinError { source }),
        }
    }
    if let Some(mut upload) = upload {
        if let Some(this) = &mut upload.upload {
            this.complete().await?;
        }
        upload.upload = None;
    }
    Ok(())
}

impl Drop for Output {
    fn drop(&mut self) {
        self.parts.iter().for_each(JoinHandle::abort);
    }
}
