//! The list of a sealed checkpoint's images. It is read only after its own seal was found whole; what is wrong with it then
//! was written by who has the key, and is refused all the same.
//!
//! ```text
//! "manifest 1\n", u8: 1 if there is a parent, 16 bytes: the parent's identity or zeros
//! u32: how many images; for each: u8: length of the name, the name, u64: size, 32 bytes: salt
//! ```
//!
//! Numbers are little-endian; names are sorted.

use std::collections::BTreeMap;

use crate::store::check_name;

const MAGIC: &[u8; 11] = b"manifest 1\n";

/// An image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sealed {
    /// How long it is.
    pub(super) size: u64,
    /// What its key is made with.
    pub(super) salt: [u8; 32],
}

/// The list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest {
    /// Identity of the checkpoint that this one builds on.
    pub(super) parent: Option<[u8; 16]>,
    /// All images by name.
    pub(super) images: BTreeMap<String, Sealed>,
}

impl Manifest {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(u8::from(self.parent.is_some()));
        out.extend_from_slice(&self.parent.unwrap_or_default());
        let count = u32::try_from(self.images.len()).unwrap_or(u32::MAX);
        out.extend_from_slice(&count.to_le_bytes());
        for (name, image) in &self.images {
            // names of images are at most 255 bytes
            out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
            out.extend_from_slice(name.as_bytes());
            out.extend_from_slice(&image.size.to_le_bytes());
            out.extend_from_slice(&image.salt);
        }
        out
    }

    pub(super) fn decode(mut bytes: &[u8]) -> Option<Self> {
        let mut take = |count: usize| {
            let (taken, rest) = bytes.split_at_checked(count)?;
            bytes = rest;
            Some(taken)
        };
        if take(MAGIC.len())? != MAGIC {
            return None;
        }
        let has_parent = take(1)?[0];
        let identity: [u8; 16] = take(16)?.try_into().ok()?;
        let parent = match has_parent {
            0 if identity == [0; 16] => None,
            1 => Some(identity),
            _ => return None,
        };
        let count = u32::from_le_bytes(take(4)?.try_into().ok()?);
        let mut images = BTreeMap::new();
        for _ in 0..count {
            let length = take(1)?[0];
            let name = std::str::from_utf8(take(length.into())?).ok()?;
            check_name(name).ok()?;
            let size = u64::from_le_bytes(take(8)?.try_into().ok()?);
            let salt: [u8; 32] = take(32)?.try_into().ok()?;
            // no file is longer, and sizes are computed with
            if size > i64::MAX as u64 / 2
                || images.last_key_value().is_some_and(|(last, _): (&String, _)| last.as_str() >= name)
            {
                return None;
            }
            images.insert(name.to_owned(), Sealed { size, salt });
        }
        bytes.is_empty().then_some(Self { parent, images })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_and_nothing_else() {
        let image = |size| Sealed { size, salt: [size as u8; 32] };
        let images: BTreeMap<_, _> = [("a.img".to_owned(), image(7)), ("b".to_owned(), image(0))].into();
        for parent in [None, Some([3; 16])] {
            let manifest = Manifest { parent, images: images.clone() };
            let bytes = manifest.encode();
            assert_eq!(Manifest::decode(&bytes), Some(manifest));
            for size in 0..bytes.len() {
                assert_eq!(Manifest::decode(&bytes[..size]), None, "{size}");
            }
            let mut more = bytes.clone();
            more.push(0);
            assert_eq!(Manifest::decode(&more), None);
        }
        // a count that nothing follows takes no memory
        let mut bytes = Manifest { parent: None, images: BTreeMap::new() }.encode();
        let count = bytes.len() - 4;
        bytes[count..].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Manifest::decode(&bytes), None);
    }
}
