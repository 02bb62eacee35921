//! Where the images of a dump go, and where those of a restore come from: the one place that opens a [`Store`].
//!
//! A store that the caller gives ([`Options::store`]) comes first, else it is the folder [`Options::images_dir`]. A dump
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
use standstill_images::{FolderStore, Images, Store};

use crate::error::{Call, Error, Result};
use crate::options::Options;

/// A store among the options.
#[derive(Clone)]
pub struct Given(pub Arc<dyn Store>);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Given")
    }
}

/// Where a dump writes to.
pub(crate) fn for_dump(opts: &Options) -> Result<Images> {
    refuse(opts)?;
    match &opts.store {
        Some(given) => Ok(Images::new(given.0.clone())),
        None => Ok(Images::new(folder(opts)?)),
    }
}

/// Where a restore reads from.
pub(crate) fn for_restore(opts: &Options) -> Result<Images> {
    refuse(opts)?;
    match &opts.store {
        Some(given) => Ok(Images::new(GatheredStore::new(given.0.clone()))),
        None => Ok(Images::new(FolderStore::open(&opts.images_dir)?)),
    }
}

/// What only a folder can do.
fn refuse(opts: &Options) -> Result<()> {
    if opts.has_folder() {
        return Ok(());
    }
    let asked = [
        (opts.prev_images_dir.is_some(), "--prev-images-dir"),
        (opts.snapshot, "--snapshot"),
        (opts.every.is_some(), "--every"),
        (opts.auto_dedup, "--auto-dedup"),
        (opts.display_gpus, "--display-gpus"),
    ];
    match asked.iter().find(|(asked, _)| *asked) {
        Some((_, name)) => Err(Error::Usage { what: format!("{name} is about a folder of images, and there is none") }),
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
        let images = for_dump(&opts).unwrap();
        images.create_raw(ImageKind::Pages, 1u32).unwrap().finish().unwrap();
        assert!(memory.exists("pages-1.img").unwrap());
        let pages = for_restore(&opts).unwrap().open_raw(ImageKind::Pages, 1u32).unwrap();
        assert!(pages.as_file().is_some(), "it was gathered");
        let chained = Options { prev_images_dir: Some("../1".into()), ..opts };
        assert!(for_dump(&chained).err().unwrap().to_string().contains("--prev-images-dir"));
    }
}
