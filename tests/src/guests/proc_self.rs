//! Open files and folders under /proc that belong to the program itself, and to its child.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::AsRawFd as _;

use super::support::*;

/// They are those of the same process afterwards.
pub(super) fn proc_self() {
    let shared = Shared::new();
    let child = fork(|| {
        shared.set(0, 1);
        shared.wait(1, 1);
        0
    });
    shared.wait(0, 1);
    let pid = std::process::id();
    let mut stat = did(File::open("/proc/self/stat"));
    let maps = did(File::open(format!("/proc/{pid}/maps")));
    let mut about = did(File::open(format!("/proc/self/fdinfo/{}", stat.as_raw_fd())));
    let folder = did(File::open("/proc/self/fd"));
    let mut childs = did(File::open(format!("/proc/{child}/stat")));
    let root = did(File::open("/proc"));
    let version = did(File::open("/proc/version"));
    let links = || {
        [&stat, &maps, &folder, &childs, &root, &version]
            .map(|f| did(std::fs::read_link(format!("/proc/self/fd/{}", f.as_raw_fd()))))
    };
    let before = links();
    ready();
    check_eq!(links(), before);
    let mut text = String::new();
    did(stat.seek(SeekFrom::Start(0)));
    did(stat.read_to_string(&mut text));
    check!(text.starts_with(&format!("{pid} (")));
    text.clear();
    did(about.read_to_string(&mut text));
    check!(text.starts_with("pos:"));
    text.clear();
    did(childs.read_to_string(&mut text));
    check!(text.starts_with(&format!("{child} (")));
    shared.set(1, 1);
    check_eq!(wait(child), 0);
}
