//! What a dump and a pre-dump begin with: a place without old images, the thread that traces, the threads that copy.

use rayon::prelude::*;
use standstill_images::{ImageKind, Images};

use crate::error::{Error, Result};
use crate::options::Options;
use crate::sys::{interrupt, thread};

/// Runs `work` in a thread of its own: all of ptrace belongs to one thread, which outlives its tracees.
pub(crate) fn with_own_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // SIGINT and the like end a dump in order, where that can be seen to; the threads that we start have them blocked, too
    let _interrupts = interrupt::Watch::new()?;
    thread::apart(work)
}

/// An older checkpoint in the same folder is none any more: its inventory goes first, then all else of it, so that nothing
/// of it can be taken for part of the new one. What is not an image stays.
pub(crate) fn remove_old_images(opts: &Options, images: &Images) -> Result<()> {
    images.remove(ImageKind::Inventory, ())?;
    if opts.keeps_images() {
        super::snapshot::remove_old(&opts.images_dir)?;
    }
    crate::transfer::client::remove_notes(images)?;
    for name in images.store().list()? {
        if name.ends_with(".img") && ImageKind::from_file_name(&name).is_some() {
            images.store().remove(&name)?;
        }
    }
    Ok(())
}

/// The threads that read and copy side by side: rayon's, or as many as `--jobs` says.
pub(crate) struct Workers {
    own: Option<rayon::ThreadPool>,
}

impl Workers {
    pub(crate) fn new(opts: &Options) -> Result<Workers> {
        let make = |n: std::num::NonZeroUsize| {
            rayon::ThreadPoolBuilder::new()
                .num_threads(n.get())
                .build()
                .map_err(|e| Error::Usage { what: e.to_string() })
        };
        Ok(Workers { own: opts.jobs.map(make).transpose()? })
    }

    pub(super) fn install<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        match &self.own {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }

    /// One thing is done here, without waking anyone; more are done side by side.
    pub(super) fn each<T: Sync>(&self, all: &[T], f: impl Fn(&T) -> Result<()> + Sync + Send) -> Result<()> {
        match all {
            [] => Ok(()),
            [one] if self.own.is_none() => f(one),
            _ => self.install(|| all.par_iter().try_for_each(f)),
        }
    }
}
