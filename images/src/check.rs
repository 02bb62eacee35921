//! Whether an image is one: every entry by its message's table of fields, and what follows each.

use crate::error::Result;
use crate::images::Image;
use crate::proto::{
    BpfmapDataEntry, IpcMsgEntry, IpcSemEntry, IpcShmEntry, PipeDataEntry, SkPacketEntry, TcpStreamEntry,
};
use crate::table::Payload;

impl Image {
    /// Reads all of it, and returns how many entries it has. A raw image is none of these.
    ///
    /// # Errors
    /// If it does not begin with its magics, an entry is cut short or malformed, or what follows one is.
    pub fn check(&self) -> Result<usize> {
        let mut reader = self.reader()?;
        Ok(match self.kind().payload() {
            Payload::None => {
                let mut count = 0;
                while reader.check_next()?.is_some() {
                    count += 1;
                }
                count
            }
            Payload::Pagemap => reader.pagemap()?.1.len(),
            Payload::PipeData => reader.all_with_payload::<PipeDataEntry>()?.len(),
            Payload::SocketQueue => reader.all_with_payload::<SkPacketEntry>()?.len(),
            Payload::IpcShm => reader.all_with_payload::<IpcShmEntry>()?.len(),
            Payload::IpcMsg => reader.all_with_payload::<IpcMsgEntry>()?.len(),
            Payload::IpcSem => reader.all_with_payload::<IpcSemEntry>()?.len(),
            Payload::TcpStream => reader.all_with_payload::<TcpStreamEntry>()?.len(),
            Payload::BpfMap => reader.all_with_payload::<BpfmapDataEntry>()?.len(),
            Payload::Ghost => {
                reader.ghost()?;
                1
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{FdinfoEntry, InventoryEntry, PipeDataEntry};
    use crate::{ImageKind, Images, MemoryStore};

    #[test]
    fn whole_and_cut() {
        let images = Images::new(MemoryStore::default());
        let entry = FdinfoEntry { id: 7, flags: 0, r#type: 1, fd: 3, ..Default::default() };
        images.write_entries(ImageKind::Fdinfo, 1_u32, [entry.clone(), entry]).unwrap();
        let mut pipe = images.create(ImageKind::PipesData, ()).unwrap();
        pipe.write_with_payload(&PipeDataEntry { pipe_id: 1, bytes: 3, ..Default::default() }, &b"abc".as_slice())
            .unwrap();
        pipe.finish().unwrap();
        for (kind, id, count) in [(ImageKind::Fdinfo, Some(1_u64), 2), (ImageKind::PipesData, None, 1)] {
            let image = images.open(kind, crate::Id(id)).unwrap();
            assert_eq!(image.check().unwrap(), count);
            let whole = image.bytes().clone();
            for end in 0..whole.len() {
                let cut = Image::new(kind, "cut.img", whole.slice(..end));
                // between two entries nobody can tell
                let fewer = cut.check().map(|found| found < count);
                assert!(fewer.unwrap_or(true), "{kind} cut at {end}");
            }
            for at in 0..8 {
                let mut bytes = whole.to_vec();
                bytes[at] ^= 1;
                assert!(Image::new(kind, "changed.img", bytes).check().is_err(), "{kind}, byte {at}");
            }
        }
    }

    #[test]
    fn sums_are_of_what_was_written() {
        let images = Images::new(MemoryStore::default());
        images.write_one(ImageKind::Inventory, (), &InventoryEntry { img_version: 2, ..Default::default() }).unwrap();
        let entry = FdinfoEntry { id: 7, flags: 0, r#type: 1, fd: 3, ..Default::default() };
        images.write_one(ImageKind::Fdinfo, 1_u32, &entry).unwrap();
        images.write_one(ImageKind::Fdinfo, 1_u32, &entry).unwrap();
        let all = images.written().unwrap();
        let bytes = images.open(ImageKind::Fdinfo, 1_u32).unwrap().bytes().clone();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].name.as_slice(), all[0].size), (b"fdinfo-1.img".as_slice(), bytes.len() as u64));
        assert_eq!(all[0].crc, Some(crate::crc_of(&bytes)));
    }
}
