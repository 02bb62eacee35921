//! UTS namespaces: host name and domain name (`utsns-N.img`, uts_namespaces(7)).
//!
//! Read with uname(2) and written with sethostname(2) and setdomainname(2), inside the namespace. Release, version and
//! machine are the kernel's own. The order among namespaces does not matter.

use standstill_images::proto::UtsnsEntry;
use standstill_images::{ImageKind, Images};

use super::{inside, Kind};
use crate::error::{Call, Result};

/// Writes the names of the namespace of process `pid`.
pub fn dump(pid: i32, id: u32, images: &Images) -> Result<()> {
    let entry = inside(pid, Kind::Uts, || {
        let names = rustix::system::uname();
        Ok(UtsnsEntry {
            nodename: names.nodename().to_bytes().to_vec(),
            domainname: names.domainname().to_bytes().to_vec(),
        })
    })?;
    Ok(images.write_one(ImageKind::Utsns, id, &entry)?)
}

/// Gives the namespace of process `pid` its names.
pub fn restore(pid: i32, id: u32, images: &Images) -> Result<()> {
    let entry: UtsnsEntry = images.read_one(ImageKind::Utsns, id)?;
    inside(pid, Kind::Uts, || {
        rustix::system::sethostname(&entry.nodename).call("sethostname")?;
        rustix::system::setdomainname(&entry.domainname).call("setdomainname")
    })
}
