//! Images by themselves: each is there, as long as it was, and decodes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use rayon::prelude::*;
use standstill_images::pages::packed::PackedPages;
use standstill_images::pages::{PageChain, PageMap, Place};
use standstill_images::proto::{InventoryEntry, StandstillImageEntry};
use standstill_images::{crc_of, Error as ImageError, Header, Id, ImageKind, Images, Payload, ReadAt};

use super::{image_fault, Report};
use crate::memory::PAGE;

/// How much is read at a time.
const PIECE: usize = 1 << 20;
/// More checkpoints than this are not followed by a restore.
const LONGEST: usize = 1024;

/// What one image is found to be.
#[derive(Default)]
struct Found {
    bytes: u64,
    faults: Vec<(String, String)>,
    /// The pages image that a pagemap tells of.
    pages: Option<u32>,
    /// How much memory it stands for.
    memory: u64,
}

/// Reads all images of a checkpoint and of those that it builds on. Returns how many bytes of memory its tasks have in them.
pub(super) fn check(images: &Images, report: &mut Report) -> u64 {
    let mut memory = 0;
    let (mut next, mut prefix) = (Some(images.clone()), String::new());
    while let Some(images) = next.take() {
        let own = layer(&images, &prefix, report);
        if prefix.is_empty() {
            memory = own;
        }
        prefix.push_str("parent/");
        report.checkpoints += 1;
        if report.checkpoints > LONGEST {
            report.damage("parent", "checkpoints build on each other in a ring, or are too many");
            break;
        }
        match images.parent() {
            Ok(parent) => next = parent,
            Err(e) => {
                report.damage("parent", image_fault(&e).1);
            }
        }
    }
    memory
}

/// One checkpoint.
fn layer(images: &Images, prefix: &str, report: &mut Report) -> u64 {
    let names = match images.store().list() {
        Ok(names) => names,
        Err(e) => {
            report.damage(prefix, image_fault(&e).1);
            return 0;
        }
    };
    let kind_of = |name: &String| ImageKind::from_file_name(name).filter(|(kind, _)| kind.header() != Header::Service);
    let mut all: Vec<(String, ImageKind, Id)> =
        names.iter().filter_map(|name| kind_of(name).map(|(kind, id)| (name.clone(), kind, id))).collect();
    let inventory: Option<InventoryEntry> = match images.read_one(ImageKind::Inventory, ()) {
        Ok(inventory) => Some(inventory),
        // the checkpoint itself is asked for its own afterwards
        Err(e) if !prefix.is_empty() => {
            report.damage(format!("{prefix}inventory.img"), image_fault(&e).1);
            None
        }
        Err(_) => None,
    };
    let mut sums: BTreeMap<String, StandstillImageEntry> = BTreeMap::new();
    for sum in inventory.map(|inventory| inventory.standstill_images).unwrap_or_default() {
        sums.insert(String::from_utf8_lossy(&sum.name).into_owned(), sum);
    }
    for name in sums.keys().filter(|name| !names.contains(name)) {
        report.damage(format!("{prefix}{name}"), "it is missing");
    }
    // the largest first, so that none is left for the end
    all.sort_by_key(|(_, kind, _)| !matches!(kind, ImageKind::Pages | ImageKind::Pagemap | ImageKind::ShmemPagemap));
    let found: Vec<(&String, ImageKind, Id, Found)> =
        all.par_iter().map(|(name, kind, id)| (name, *kind, *id, image(images, *kind, *id, sums.get(name)))).collect();
    let mut memory = 0;
    let told: BTreeSet<u64> = found.iter().filter_map(|(.., found)| found.pages.map(u64::from)).collect();
    let any_broken = found.iter().any(|(_, kind, _, f)| kind.payload() == Payload::Pagemap && !f.faults.is_empty());
    for (name, kind, id, found) in found {
        report.images += 1;
        report.bytes += found.bytes;
        if kind == ImageKind::Pagemap {
            memory += found.memory;
        }
        let orphan = kind == ImageKind::Pages && !any_broken && id.0.is_some_and(|id| !told.contains(&id));
        for (image, what) in found.faults {
            report.damage(format!("{prefix}{image}"), what);
        }
        if orphan {
            report.damage(format!("{prefix}{name}"), "no pagemap tells what its pages are");
        }
    }
    memory
}

fn image(images: &Images, kind: ImageKind, id: Id, sum: Option<&StandstillImageEntry>) -> Found {
    let mut found = Found::default();
    if let Err(e) = look(images, kind, id, sum, &mut found) {
        found.faults.push(image_fault(&e));
    }
    found
}

fn look(
    images: &Images,
    kind: ImageKind,
    id: Id,
    sum: Option<&StandstillImageEntry>,
    found: &mut Found,
) -> Result<(), ImageError> {
    let name = kind.file_name(id)?;
    if kind.is_raw() {
        let raw = images.open_raw(kind, id)?;
        found.bytes = raw.len();
        let size = same_size(&name, found, sum);
        let crc = read_through(&name, raw.as_ref(), sum.and_then(|sum| sum.crc).is_some() && size)?;
        same_sum(&name, crc, found, sum);
        if matches!(kind, ImageKind::TmpfsImg | ImageKind::TmpfsDev) && found.faults.is_empty() {
            if let Err(e) = archive(raw.as_ref()) {
                found.faults.push((name, format!("the archive in it: {e}")));
            }
        }
        return Ok(());
    }
    let image = images.open(kind, id)?;
    found.bytes = image.bytes().len() as u64;
    if same_size(&name, found, sum) {
        let crc = sum.and_then(|sum| sum.crc).map(|_| crc_of(image.bytes()));
        same_sum(&name, crc, found, sum);
    }
    image.check()?;
    if kind.payload() == Payload::Pagemap {
        pages(images, kind, id, &name, found)?;
    }
    Ok(())
}

/// Has it the size that it was written with?
fn same_size(name: &str, found: &mut Found, sum: Option<&StandstillImageEntry>) -> bool {
    match sum {
        Some(sum) if sum.size != found.bytes => {
            let what = format!("it has {} bytes, and had {} when it was written", found.bytes, sum.size);
            found.faults.push((name.to_owned(), what));
            false
        }
        _ => true,
    }
}

fn same_sum(name: &str, crc: Option<u32>, found: &mut Found, sum: Option<&StandstillImageEntry>) {
    if let (Some(now), Some(then)) = (crc, sum.and_then(|sum| sum.crc)) {
        if now != then {
            let what = format!("it is not what was written: its CRC-32 is {now:08x}, and was {then:08x}");
            found.faults.push((name.to_owned(), what));
        }
    }
}

/// Reads it to the end, for the disk to say what it cannot, and sums it up if somebody wants that.
fn read_through(name: &str, raw: &dyn ReadAt, summed: bool) -> Result<Option<u32>, ImageError> {
    let mut buffer = vec![0; PIECE];
    let mut hasher = summed.then(crc32fast::Hasher::new);
    let mut at = 0;
    while at < raw.len() {
        let len = usize::try_from(raw.len() - at).unwrap_or(PIECE).min(PIECE);
        raw.read_exact_at(&mut buffer[..len], at).map_err(|source| ImageError::Io {
            image: name.to_owned(),
            operation: "read",
            source,
        })?;
        if let Some(hasher) = &mut hasher {
            hasher.update(&buffer[..len]);
        }
        at += len as u64;
    }
    Ok(hasher.map(crc32fast::Hasher::finalize))
}

/// Bytes of an image, one after another.
struct Stream<'a> {
    raw: &'a dyn ReadAt,
    at: u64,
}

impl std::io::Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let left = usize::try_from(self.raw.len() - self.at).unwrap_or(usize::MAX);
        let len = left.min(buffer.len());
        self.raw.read_exact_at(&mut buffer[..len], self.at)?;
        self.at += len as u64;
        Ok(len)
    }
}

/// An archive of a file system, to its end.
fn archive(raw: &dyn ReadAt) -> std::io::Result<()> {
    let unpacked = flate2::read::MultiGzDecoder::new(Stream { raw, at: 0 });
    let mut archive = tar::Archive::new(std::io::BufReader::new(unpacked));
    for entry in archive.entries()? {
        std::io::copy(&mut entry?, &mut std::io::sink())?;
    }
    // what follows the last entry belongs to the stream all the same
    let mut rest = archive.into_inner();
    let mut buffer = vec![0; PIECE];
    while rest.read(&mut buffer)? > 0 {}
    Ok(())
}

/// A pagemap, what it says of its pages image, and that all of its parents' pages are there.
fn pages(images: &Images, kind: ImageKind, id: Id, name: &str, found: &mut Found) -> Result<(), ImageError> {
    let map = PageMap::read(images, kind, id, PAGE)?;
    found.pages = Some(map.pages_id());
    found.memory = map.runs().iter().map(|run| run.bytes(PAGE)).sum();
    let pages_name = ImageKind::Pages.file_name(map.pages_id())?;
    let image = match images.open_raw(ImageKind::Pages, map.pages_id()) {
        Ok(image) => Some(image),
        Err(e) if e.is_missing() => None,
        Err(e) => return Err(e),
    };
    let len = image.as_ref().map_or(0, |image| image.len());
    if len > map.content() {
        let what = format!("it tells of {} bytes of {pages_name}, which has {len}", map.content());
        found.faults.push((name.to_owned(), what));
    }
    if let (Some(image), false) = (image, map.blocks().list().is_empty()) {
        let packed = PackedPages::new(pages_name.clone(), image, map.blocks().clone());
        let mut buffer = Vec::new();
        for (number, block) in packed.blocks().iter().enumerate() {
            buffer.resize(usize::try_from(block.bytes).unwrap_or(0), 0);
            if let Err(e) = packed.unpack(number, &mut buffer) {
                found.faults.push((pages_name, format!("block {number}: {e}")));
                break;
            }
        }
    }
    if map.runs().iter().any(|run| run.place == Place::Parent) {
        PageChain::open(images, kind, id, PAGE)?.located()?;
    }
    Ok(())
}
