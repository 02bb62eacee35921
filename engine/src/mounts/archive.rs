//! Reading tar archives: those of GNU tar, with long names and sparse files, and headers of pax.
//!
//! The library `tar` knows headers; its reader takes a line feed in an extended attribute for the end of it, so what is
//! between the headers is read here.
//!
//! Sources: tar(5) of libarchive, pax(1p), the GNU tar manual ("Basic Tar Format", "Old GNU Format").

use std::io::{ErrorKind, Read};

use crate::error::{Call, Error, Result};

/// How errors name the archive.
pub const IMAGE: &str = "tmpfs-dev.tar.gz.img";

const BLOCK: usize = 512;
/// No more is read for the sake of one file's names and attributes.
const MOST: u64 = 16 << 20;

/// One file of an archive.
pub struct Entry {
    /// Its header.
    pub header: tar::Header,
    /// Its name.
    pub path: Vec<u8>,
    /// What it links to, if it is a link.
    pub link: Vec<u8>,
    /// Records of pax.
    pub pax: Vec<(String, Vec<u8>)>,
    /// How long the file is.
    pub size: u64,
    /// Where it has data: start and length.
    pub pieces: Vec<(u64, u64)>,
}

/// An archive that is being read.
pub struct Archive<R> {
    from: R,
    /// Data of the current file that was not read.
    left: u64,
    /// What fills its last block.
    padding: u64,
}

fn lie(what: &str) -> Error {
    Error::lie(IMAGE, what.to_owned())
}

impl<R: Read> Archive<R> {
    /// Nothing is read yet.
    pub fn new(from: R) -> Self {
        Archive { from, left: 0, padding: 0 }
    }

    /// A block; none at the end.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            match self.from.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(lie("it ends within a block")),
                Ok(n) => filled += n,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e).call("read"),
            }
        }
        Ok(Some(block))
    }

    /// The next file; what is left of the one before must be skipped first.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        let (mut path, mut link) = (None, None);
        let mut pax = Vec::new();
        loop {
            let Some(block) = self.block()? else { return Ok(None) };
            if block == [0; BLOCK] {
                return Ok(None);
            }
            let header = tar::Header::from_byte_slice(&block).clone();
            let sum =
                block[..148].iter().chain(&block[156..]).map(|&b| u32::from(b)).sum::<u32>() + 8 * u32::from(b' ');
            if header.cksum().ok() != Some(sum) {
                return Err(lie("a header with a wrong sum"));
            }
            let size = header.entry_size().call("tar")?;
            self.begin(size);
            match header.entry_type() {
                tar::EntryType::XHeader => pax.extend(records(&self.all()?)?),
                tar::EntryType::XGlobalHeader => self.skip_rest()?,
                tar::EntryType::GNULongName => path = Some(until_zero(&self.all()?)),
                tar::EntryType::GNULongLink => link = Some(until_zero(&self.all()?)),
                _ => return self.entry(header, path, link, pax).map(Some),
            }
        }
    }

    fn entry(
        &mut self,
        header: tar::Header,
        path: Option<Vec<u8>>,
        link: Option<Vec<u8>>,
        pax: Vec<(String, Vec<u8>)>,
    ) -> Result<Entry> {
        let of = |key: &str| pax.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.clone());
        if pax.iter().any(|(key, _)| key.starts_with("GNU.sparse.")) {
            return Err(lie("a sparse file in a format of pax"));
        }
        let mut data = self.left;
        if let Some(size) = of("size") {
            data = std::str::from_utf8(&size).ok().and_then(|s| s.parse().ok()).ok_or_else(|| lie("a size"))?;
            self.begin(data);
        }
        let (mut size, mut pieces) = (data, vec![(0, data)]);
        if header.entry_type() == tar::EntryType::GNUSparse {
            (size, pieces) = self.sparse(&header)?;
            let sum = pieces.iter().try_fold(0u64, |sum, (_, len)| sum.checked_add(*len));
            let ordered = pieces.windows(2).all(|p| p[0].0.checked_add(p[0].1).is_some_and(|end| end <= p[1].0));
            let fits = pieces.last().is_none_or(|(start, len)| start.checked_add(*len).is_some_and(|end| end <= size));
            if sum != Some(data) || !ordered || !fits {
                return Err(lie("a sparse file whose pieces do not fit"));
            }
        }
        let path = of("path").or(path).unwrap_or_else(|| header.path_bytes().into_owned());
        let link = of("linkpath").or(link).or_else(|| header.link_name_bytes().map(|l| l.into_owned()));
        Ok(Entry { path, link: link.unwrap_or_default(), pax, size, pieces, header })
    }

    /// Where a sparse file has data: in the header, and in blocks behind it.
    fn sparse(&mut self, header: &tar::Header) -> Result<(u64, Vec<(u64, u64)>)> {
        let gnu = header.as_gnu().ok_or_else(|| lie("a sparse file without its header"))?;
        let mut pieces = Vec::new();
        let mut add = |list: &[tar::GnuSparseHeader]| -> Result<()> {
            for piece in list.iter().take_while(|piece| !piece.is_empty()) {
                pieces.push((piece.offset().call("tar")?, piece.length().call("tar")?));
            }
            Ok(())
        };
        add(&gnu.sparse)?;
        let mut more = gnu.is_extended();
        let mut blocks = 0;
        while more {
            let mut next = tar::GnuExtSparseHeader::new();
            *next.as_mut_bytes() = self.block()?.ok_or_else(|| lie("it ends within a file"))?;
            add(next.sparse())?;
            more = next.is_extended();
            blocks += 1;
            if blocks * BLOCK as u64 > MOST {
                return Err(lie("a sparse file with too many pieces"));
            }
        }
        Ok((gnu.real_size().call("tar")?, pieces))
    }

    fn begin(&mut self, size: u64) {
        self.left = size;
        self.padding = size.wrapping_neg() % BLOCK as u64;
    }

    /// All data of the current file.
    fn all(&mut self) -> Result<Vec<u8>> {
        if self.left > MOST {
            return Err(lie("too long a header"));
        }
        let mut bytes = vec![0; usize::try_from(self.left).unwrap_or(0)];
        self.read_data(&mut bytes)?;
        self.skip_rest()?;
        Ok(bytes)
    }

    /// The next data of the current file.
    pub fn read_data(&mut self, buffer: &mut [u8]) -> Result<()> {
        self.left = self.left.checked_sub(buffer.len() as u64).ok_or_else(|| lie("a file with too little data"))?;
        self.from.read_exact(buffer).call("read")
    }

    /// Leaves the current file.
    pub fn skip_rest(&mut self) -> Result<()> {
        let len = self.left.checked_add(self.padding).ok_or_else(|| lie("a size"))?;
        let skipped = std::io::copy(&mut self.from.by_ref().take(len), &mut std::io::sink()).call("read")?;
        if skipped != len {
            return Err(lie("it ends within a file"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }
}

fn until_zero(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&b| b == 0).next().unwrap_or_default().to_vec()
}

/// `len key=value\n`, again and again.
fn records(mut bytes: &[u8]) -> Result<Vec<(String, Vec<u8>)>> {
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let bad = || lie("a record of pax");
        let digits = bytes.iter().take(20).position(|&b| b == b' ').ok_or_else(bad)?;
        let len: usize = std::str::from_utf8(&bytes[..digits]).ok().and_then(|d| d.parse().ok()).ok_or_else(bad)?;
        let record = bytes.get(digits + 1..len).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(bad)?;
        let equals = record.iter().position(|&b| b == b'=').ok_or_else(bad)?;
        all.push((String::from_utf8_lossy(&record[..equals]).into_owned(), record[equals + 1..].to_vec()));
        bytes = &bytes[len..];
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile() {
        let read = |bytes: &[u8]| {
            let mut archive = Archive::new(bytes);
            while archive.next_entry()?.is_some() {
                archive.skip_rest()?;
            }
            Ok::<_, Error>(())
        };
        assert!(read(&[]).is_ok());
        assert!(read(&[0; 1024]).is_ok());
        assert!(read(&[1; 512]).is_err());
        assert!(read(&[0; 100]).is_err());
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::MAX);
        header.set_cksum();
        assert!(read(header.as_bytes()).is_err());
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_cksum();
        assert!(read(header.as_bytes()).is_err());
        header.set_entry_type(tar::EntryType::GNUSparse);
        if let Some(gnu) = header.as_gnu_mut() {
            gnu.sparse[0].set_offset(u64::MAX);
            gnu.sparse[0].set_length(u64::MAX);
            gnu.set_real_size(1);
        }
        header.set_cksum();
        assert!(read(header.as_bytes()).is_err());
        for bad in [&b"x"[..], b"5 a=b\n", b"99 a=b\n", b"6 a-b\n", b"0 a=b\n", b"18446744073709551615 a=\n", b" =\n"] {
            assert!(records(bad).is_err(), "{bad:?}");
        }
        assert_eq!(records(b"9 a=1\n=2\n").unwrap(), [("a".to_owned(), b"1\n=2".to_vec())]);
    }
}
