//! Freeing pages that a newer checkpoint of a chain replaces: `--auto-dedup`, and the verb `dedup`.
//!
//! A page that is present in a checkpoint is read from there; what its parents have of it is never read again through this
//! chain, so its blocks are given back to the file system (fallocate(2), FALLOC_FL_PUNCH_HOLE). The parents' pagemaps stay
//! as they are: the parents cannot be restored by themselves any more. Where holes cannot be punched, and of packed pages, nothing is
//! freed.

use std::fs::File;

use rustix::fs::FallocateFlags;
use standstill_images::pages::{PageMap, Place};
use standstill_images::{Id, ImageKind, Images};

use super::PAGE;
use crate::error::{Call, Error, Result};

/// Frees what the newest checkpoint replaces in all that it builds on; how many bytes.
pub fn free_in_parents(images: &Images) -> Result<u64> {
    free_in_some_parents(images, usize::MAX)
}

/// The same, in the nearest ones only.
pub fn free_in_some_parents(images: &Images, nearest: usize) -> Result<u64> {
    let mut freed = 0;
    for (kind, id) in pagemaps(images)? {
        let map = PageMap::read(images, kind, id, PAGE)?;
        let mut parents = parents(images, kind, id)?;
        parents.truncate(nearest);
        for run in map.runs().iter().filter(|r| matches!(r.place, Place::Pages(_))) {
            for layer in &parents {
                freed += layer.free(run.address..run.end(PAGE))?;
            }
        }
    }
    Ok(freed)
}

/// Frees, in every checkpoint of a chain, what a newer one replaces; how many bytes.
pub fn free_in_chain(images: Images) -> Result<u64> {
    let mut freed = free_in_parents(&images)?;
    let mut next = images.parent()?;
    while let Some(images) = next {
        freed += free_in_parents(&images)?;
        next = images.parent()?;
    }
    Ok(freed)
}

/// Frees the pages that a restore has read, in the newest checkpoint and in all that it builds on; how many bytes.
pub fn free_all(images: &Images) -> Result<u64> {
    let mut freed = 0;
    for (kind, id) in pagemaps(images)? {
        let newest = Layer::read(images, kind, id)?;
        for layer in std::iter::once(newest).chain(parents(images, kind, id)?) {
            freed += layer.free(0..!(PAGE - 1))?;
        }
    }
    Ok(freed)
}

fn pagemaps(images: &Images) -> Result<Vec<(ImageKind, Id)>> {
    let names = images.store().list()?;
    let all = names.iter().filter_map(|name| ImageKind::from_file_name(name));
    Ok(all.filter(|(kind, _)| matches!(kind, ImageKind::Pagemap | ImageKind::ShmemPagemap)).collect())
}

/// The pagemaps of one task in the checkpoints that this one builds on, the nearest first.
fn parents(images: &Images, kind: ImageKind, id: Id) -> Result<Vec<Layer>> {
    let mut all = Vec::new();
    let mut next = images.parent()?;
    // a ring of parents is found out by whoever reads pages
    while let Some(images) = next.filter(|_| all.len() < 1024) {
        if !images.exists(kind, id)? {
            break;
        }
        all.push(Layer::read(&images, kind, id)?);
        next = images.parent()?;
    }
    Ok(all)
}

/// One task in one checkpoint.
struct Layer {
    map: PageMap,
    pages: File,
}

impl Layer {
    fn read(images: &Images, kind: ImageKind, id: Id) -> Result<Layer> {
        let map = PageMap::read(images, kind, id, PAGE)?;
        let pages = open(images, map.pages_id())?;
        Ok(Layer { map, pages })
    }

    fn free(&self, range: std::ops::Range<u64>) -> Result<u64> {
        let mut freed = 0;
        for run in self.map.in_range(range) {
            let Place::Pages(offset) = run.place else { continue };
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(&self.pages, hole, offset, run.bytes(PAGE)) {
                Ok(()) => freed += run.bytes(PAGE),
                Err(rustix::io::Errno::OPNOTSUPP) => break,
                Err(e) => return Err(e).call("fallocate(FALLOC_FL_PUNCH_HOLE)"),
            }
        }
        Ok(freed)
    }
}

fn open(images: &Images, id: u32) -> Result<File> {
    use std::os::fd::AsRawFd;
    let pages = images.open_raw(ImageKind::Pages, id)?;
    let file = pages.as_file().ok_or(Error::Usage { what: "pages that are in no file cannot be freed".into() })?;
    File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).call("open(pages)")
}
