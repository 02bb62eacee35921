//! Sums of images, taken while they are written: the inventory has them, and whoever reads a checkpoint can tell whether it is
//! as it was ([`crate::Images::written`]). They guard against disks and copies, not against people.

use std::fs::File;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use crc32fast::Hasher;

use crate::error::Result;
use crate::proto::StandstillImageEntry;
use crate::store::{ImageOutput, Named, Store};
use crate::table::{Header, ImageKind};

/// The sum of an image that was written through here.
#[derive(Debug, Clone, Copy)]
struct Sum {
    size: u64,
    crc: u32,
}

/// Sums by name.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sums(Named<Sum>);

impl Sums {
    /// Sums up what is written, until the image is finished.
    pub(crate) fn watch(&self, name: &str, output: Box<dyn ImageOutput>) -> Result<Box<dyn ImageOutput>> {
        self.0.remove(name)?;
        let (hasher, bypassed) = (Hasher::new(), AtomicBool::new(false));
        Ok(Box::new(Summed { output, name: name.to_owned(), hasher, size: 0, bypassed, sums: self.clone() }))
    }
}

struct Summed {
    output: Box<dyn ImageOutput>,
    name: String,
    hasher: Hasher,
    size: u64,
    /// Somebody has the file itself.
    bypassed: AtomicBool,
    sums: Sums,
}

impl Write for Summed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.output.write(bytes)?;
        if let Some(bytes) = bytes.get(..written) {
            self.hasher.update(bytes);
        }
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

impl ImageOutput for Summed {
    fn finish(self: Box<Self>) -> Result<()> {
        self.output.finish()?;
        if !self.bypassed.into_inner() {
            self.sums.0.put(&self.name, Sum { size: self.size, crc: self.hasher.finalize() });
        }
        Ok(())
    }

    fn as_file(&self) -> Option<&File> {
        let file = self.output.as_file();
        if file.is_some() {
            self.bypassed.store(true, Ordering::Relaxed);
        }
        file
    }
}

/// All images of a store that are part of a checkpoint, but its inventory.
pub(crate) fn list(store: &dyn Store, sums: &Sums) -> Result<Vec<StandstillImageEntry>> {
    let mut all = Vec::new();
    for name in store.list()? {
        let Some((kind, _)) = ImageKind::from_file_name(&name) else { continue };
        if kind == ImageKind::Inventory || kind.header() == Header::Service {
            continue;
        }
        let (size, crc) = match sums.0.find(&name) {
            Some(sum) => (sum.size, Some(sum.crc)),
            None => match store.open(&name) {
                Ok(image) => (image.len(), None),
                // a store that cannot be read before it is complete
                Err(_) => continue,
            },
        };
        all.push(StandstillImageEntry { name: name.into_bytes(), size, crc });
    }
    Ok(all)
}

/// The CRC-32 that sums have.
#[must_use]
pub fn crc_of(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}
