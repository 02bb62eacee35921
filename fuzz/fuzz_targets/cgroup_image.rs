//! `cgroup.img`, and new roots for what it says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use standstill::cgroups::image::Image;
use standstill::cgroups::roots;
use standstill::options::CgroupRoot;
use standstill_images::proto::CgroupEntry;

fuzz_target!(|input: (&[u8], [&str; 2])| {
    let Ok(entry) = CgroupEntry::decode(input.0) else { return };
    let Ok(mut image) = Image::read(entry) else { return };
    let _ = roots::rewrite(&mut image, &input.1.map(CgroupRoot::parse));
});
