//! Where the images of a dump go, and where those of a restore come from: the one place that opens a [`Store`].
//!
//! A store that the caller gives ([`Options::store`]) comes first, then a stream ([`Channel`]), then a streamer
//! ([`Options::stream`]), else it is the folder [`Options::images_dir`]. A dump
//! writes each image once, some of them side by side, the inventory last, and then commits the store: what a store does there
//! (flush, wait for an answer) is done before a tree that is to be killed is killed, and an error there leaves the tree
//! running. A restore reads what it needs, as often as it likes; what has no files behind it is gathered into memory
//! ([`GatheredStore`] says what that costs). Who encrypts or packs images, or keeps them elsewhere, is a store, or a store
//! around a store, and adds a line here.
//!
//! What needs a folder is refused by name: chains by a path, snapshots, series, freeing pages of images.

use std::fmt;
use std::sync::Arc;

use standstill_images::store::held::GatheredStore;
use standstill_images::store::sealed::{self, SealedStore};
use standstill_images::{FolderStore, Images, Store};

use crate::error::{Call, Error, Result};
use crate::options::{Options, Persona};
use crate::stages::{Stage, Stages};

mod channel;
pub mod keys;
mod storage;
mod streamer;

pub use channel::Channel;

/// A store among the options.
#[derive(Clone)]
pub struct Given(pub Arc<dyn Store>);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given")
    }
}

/// Where a dump writes to.
pub(crate) fn for_dump(opts: &Options, stages: &Stages<'_>) -> Result<Images> {
    refuse(opts)?;
    match (&opts.store, &opts.to) {
        (Some(given), _) => to_write(opts, given.0.clone()),
        (None, Some(channel)) => to_write(opts, channel.send(opts)?),
        (None, None) if opts.stream => {
            stages.reach(Stage::PreStream, None)?;
            to_write(opts, Arc::new(streamer::Capture::connect(opts)?))
        }
        (None, None) => to_write(opts, Arc::new(folder(opts)?)),
    }
}

/// Seals what is written, if there is a key.
fn to_write(opts: &Options, store: Arc<dyn Store>) -> Result<Images> {
    let Some(key) = &opts.key else {
        // a sealed checkpoint that was there is none any more; as criu, nobody has made one
        if opts.personality == Persona::Standstill {
            store.remove(sealed::MANIFEST)?;
            if let Some(parent) = store.parent()? {
                refuse_sealed(&*parent)?;
            }
        }
        return Ok(Images::new(store));
    };
    keys::refuse(&[
        (opts.snapshot, "--snapshot", "it reads its own images while it writes others"),
        (opts.auto_dedup, "--auto-dedup", "nothing can be taken out of what is sealed"),
        (opts.use_page_server, "--page-server", "pages would be sent as they are"),
        (opts.lazy_pages, "--lazy-pages", "pages would be sent as they are"),
        (opts.every.is_some(), "--every", "which of a series is whole is not told without the key"),
        (opts.display_gpus, "--display-gpus", "it reads the image folder"),
    ])?;
    Ok(Images::new(SealedStore::create(store, key.clone())?))
}

/// Opens what is sealed. All of it is brought into memory, so that whatever was changed is found before anything is made.
fn to_read(opts: &Options, store: Arc<dyn Store>) -> Result<Images> {
    let Some(key) = &opts.key else {
        if opts.personality == Persona::Standstill {
            refuse_sealed(&*store)?;
        }
        // what comes from elsewhere may not come: that is to be known before anything is made
        if opts.from.as_ref().is_some_and(|from| from.url().is_some()) {
            return Ok(Images::new(GatheredStore::all(store)?));
        }
        return Ok(Images::new(GatheredStore::new(store)));
    };
    keys::refuse(&[
        (opts.lazy_pages, "--lazy-pages", "the daemon reads pages as they are"),
        (opts.auto_dedup, "--auto-dedup", "nothing can be taken out of what is sealed"),
        (opts.display_gpus, "--display-gpus", "it reads the image folder"),
    ])?;
    let store = SealedStore::open(store, key.clone())?;
    Ok(Images::new(GatheredStore::all(Arc::new(store))?))
}

fn refuse_sealed(store: &dyn Store) -> Result<()> {
    if sealed::is_sealed(store)? {
        return Err(Error::Usage { what: "it is sealed: give the key with --key-file or --key-fd".into() });
    }
    Ok(())
}

/// Where a restore reads from.
pub(crate) fn for_restore(opts: &Options, stages: &Stages<'_>) -> Result<Images> {
    refuse(opts)?;
    match (&opts.store, &opts.from) {
        (Some(given), _) => to_read(opts, given.0.clone()),
        (None, Some(channel)) => to_read(opts, channel.receive(opts)?),
        (None, None) if opts.stream => {
            stages.reach(Stage::PreStream, None)?;
            to_read(opts, Arc::new(streamer::Serve::connect(opts)?))
        }
        (None, None) => to_read(opts, Arc::new(FolderStore::open(&opts.images_dir)?)),
    }
}

/// What only a folder can do.
fn refuse(opts: &Options) -> Result<()> {
    if opts.keeps_images() {
        return Ok(());
    }
    // CRIU does not look for a parent when it streams
    let is_criu = opts.personality == Persona::Criu;
    let asked = [
        (opts.prev_images_dir.is_some() && !is_criu, "--prev-images-dir"),
        (opts.snapshot, "--snapshot"),
        (opts.every.is_some(), "--every"),
        (opts.auto_dedup, "--auto-dedup"),
        (opts.display_gpus, "--display-gpus"),
    ];
    if let Some((_, name)) = asked.iter().find(|(asked, _)| *asked) {
        return Err(Error::Usage { what: format!("{name} is about a folder of images, and there is none") });
    }
    if opts.store.is_some() || is_criu {
        return Ok(());
    }
    let asked = [
        (
            opts.stream && opts.key.is_some(),
            "--key-file",
            "a streamer cannot be asked what it has (--to can be sealed)",
        ),
        (opts.track_mem, "--track-mem", "a later dump could not find this one to build on"),
        (opts.use_page_server, "--page-server", "pages are in the stream"),
        (opts.lazy_pages, "--lazy-pages", "pages are in the stream"),
    ];
    match asked.iter().find(|(asked, ..)| *asked) {
        Some((_, name, why)) => Err(Error::Usage { what: format!("{name} does not go with a stream: {why}") }),
        None => Ok(()),
    }
}

/// The folder that images go to, linked to the checkpoint that they build on.
fn folder(opts: &Options) -> Result<FolderStore> {
    let folder = FolderStore::open(&opts.images_dir)?;
    if let Some(parent) = &opts.prev_images_dir {
        // an absolute path stays one when it is joined
        let there = rustix::fs::stat(opts.images_dir.join(parent)).map(|s| (s.st_dev, s.st_ino)).ok();
        let here = rustix::fs::fstat(&folder).call("fstat")?;
        if there == Some((here.st_dev, here.st_ino)) {
            return Err(Error::Usage {
                what: "a checkpoint cannot build on itself: --prev-images-dir is the image folder".into(),
            });
        }
    }
    folder.set_parent(opts.prev_images_dir.as_deref())?;
    if let (Some(parent), None) = (&opts.prev_images_dir, folder.parent()?) {
        let what = format!("there is no checkpoint to build on: {} (seen from the image folder)", parent.display());
        return Err(Error::Usage { what });
    }
    Ok(folder)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use standstill_images::{ImageKind, MemoryStore};

    #[test]
    fn what_was_given_comes_before_the_folder() {
        let memory = MemoryStore::new();
        let given = Some(Given(Arc::new(memory.clone())));
        let opts = Options { store: given, images_dir: "/nonexistent".into(), ..Options::default() };
        let images = for_dump(&opts, &Stages::new(&opts, None)).unwrap();
        images.create_raw(ImageKind::Pages, 1u32).unwrap().finish().unwrap();
        assert!(memory.exists("pages-1.img").unwrap());
        let pages = for_restore(&opts, &Stages::new(&opts, None)).unwrap().open_raw(ImageKind::Pages, 1u32).unwrap();
        assert!(pages.as_file().is_some(), "it was gathered");
        let chained = Options { prev_images_dir: Some("../1".into()), ..opts };
        assert!(for_dump(&chained, &Stages::new(&chained, None))
            .err()
            .unwrap()
            .to_string()
            .contains("--prev-images-dir"));
    }
}
