//! Freeing pages that a newer checkpoint of a chain replaces: `--auto-dedup`, and the verb `dedup`.
//!
//! A page that is present in a checkpoint is read from there; what its parents have of it is never read again through this
//! chain, so its blocks are given back to the file system (fallocate(2), FALLOC_FL_PUNCH_HOLE). The parents' pagemaps stay
//! as they are: the parents cannot be restored by themselves any more. Where holes cannot be punched nothing is freed.

use std::fs::File;

use rustix::fs::FallocateFlags;
use standstill_images::pages::{PageMap, Place};
use standstill_images::{Id, ImageKind, Images};

use super::PAGE;
use crate::error::{Call, Error, Result};

/// Frees what the newest checkpoint replaces in all that it builds on; how many bytes.
pub fn free_in_parents(images: &Images) -> Result<u64> {
    let mut freed = 0;
    let Some(parent) = images.parent()? else { return Ok(0) };
    for (kind, id) in pagemaps(images)? {
        let map = PageMap::read(images, kind, id, PAGE)?;
        for run in map.runs().iter().filter(|r| matches!(r.place, Place::Pages(_))) {
            freed += free(&parent, kind, id, (run.address, run.end(PAGE)))?;
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
        freed += free(images, kind, id, (0, u64::MAX & !(PAGE - 1)))?;
    }
    Ok(freed)
}

fn pagemaps(images: &Images) -> Result<Vec<(ImageKind, Id)>> {
    let mut all = Vec::new();
    for name in images.store().list()? {
        let Some((kind @ (ImageKind::Pagemap | ImageKind::ShmemPagemap), id)) = ImageKind::from_file_name(&name) else {
            continue;
        };
        all.push((kind, id));
    }
    Ok(all)
}

/// Frees a range of addresses in a checkpoint and in those that it builds on.
fn free(images: &Images, kind: ImageKind, id: Id, (start, end): (u64, u64)) -> Result<u64> {
    let mut freed = 0;
    let mut next: Option<Images> = None;
    for _ in 0..1024 {
        let images = next.as_ref().unwrap_or(images);
        if !images.exists(kind, id)? {
            return Ok(freed);
        }
        let map = PageMap::read(images, kind, id, PAGE)?;
        let mut file = None;
        for run in map.in_range(start..end) {
            let Place::Pages(offset) = run.place else { continue };
            let file = match &file {
                Some(file) => file,
                None => file.insert(open(images, map.pages_id())?),
            };
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            match rustix::fs::fallocate(file, hole, offset, run.bytes(PAGE)) {
                Ok(()) => freed += run.bytes(PAGE),
                Err(rustix::io::Errno::OPNOTSUPP) => return Ok(freed),
                Err(e) => return Err(e).call("fallocate(FALLOC_FL_PUNCH_HOLE)"),
            }
        }
        match images.parent()? {
            Some(parent) => next = Some(parent),
            None => return Ok(freed),
        }
    }
    Ok(freed)
}

fn open(images: &Images, id: u32) -> Result<File> {
    use std::os::fd::AsRawFd;
    let pages = images.open_raw(ImageKind::Pages, id)?;
    let file = pages.as_file().ok_or(Error::Usage { what: "pages that are in no file cannot be freed".into() })?;
    File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).call("open(pages)")
}
