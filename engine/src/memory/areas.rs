//! Memory areas as image entries (`mm-N.img`).
//!
//! Read from /proc/PID/smaps, whose VmFlags say what maps cannot. Files behind areas are opened through
//! /proc/PID/map_files, which leads to the mapped file even if its name is gone. What is not kept: mseal, memory policy,
//! protection keys of areas, userfaultfd registrations (refused). Man pages: mmap(2), madvise(2), proc_pid_smaps(5).

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use rustix::fs::FileType;
use standstill_images::proto::VmaEntry;

use super::{status, sysv};
use crate::error::{At, Call, Error, Place, Result};
use crate::files::{io_uring, memfd, regular, DumpFiles};
use crate::proc::maps::{VmFlags, Vma, VmaName};
use crate::sockets::packet;
use crate::tracee::AREA_NAME;

const MADVICE: [(VmFlags, u32); 8] = [
    (VmFlags::SEQUENTIAL, 2),
    (VmFlags::RANDOM, 1),
    (VmFlags::DONT_COPY, 10),
    (VmFlags::DONT_DUMP, 16),
    (VmFlags::MERGEABLE, 12),
    (VmFlags::HUGEPAGE, 14),
    (VmFlags::NO_HUGEPAGE, 15),
    (VmFlags::WIPE_ON_FORK, 18),
];

/// The ids of files behind areas, by what smaps says of the file: device, inode, path. An area of a file that was met before
/// needs no look at the file.
#[derive(Debug, Default)]
pub struct Known(HashMap<(u32, u32, u64, Vec<u8>, bool), u32>);

/// Turns the areas of a task into entries.
pub fn entries(pid: i32, areas: &[Vma], known: &mut Known, files: &mut DumpFiles<'_>) -> Result<Vec<VmaEntry>> {
    let mut all: Vec<VmaEntry> = Vec::with_capacity(areas.len());
    for area in areas {
        // what an engine left that was killed while it was in the task; nobody runs there any more
        if area.name() == VmaName::NamedSharedAnonymous(AREA_NAME) {
            continue;
        }
        let entry = entry(pid, area, known, files).at(Place::Area(area.start, area.end))?;
        // [vvar] and [vvar_vclock] are one area in images
        if let Some(last) = all
            .last_mut()
            .filter(|l| l.status & status::VVAR != 0 && entry.status & status::VVAR != 0 && l.end == entry.start)
        {
            last.end = entry.end;
            continue;
        }
        all.push(entry);
    }
    Ok(all)
}

fn entry(pid: i32, area: &Vma, known: &mut Known, files: &mut DumpFiles<'_>) -> Result<VmaEntry> {
    let flag = |f| area.vm_flags.contains(f);
    let mut e = VmaEntry {
        start: area.start,
        end: area.end,
        pgoff: 0,
        shmid: 0,
        prot: u32::from(area.read) | u32::from(area.write) << 1 | u32::from(area.exec) << 2,
        flags: if area.shared { libc::MAP_SHARED as u32 } else { libc::MAP_PRIVATE as u32 },
        status: status::REGULAR,
        fd: -1,
        madv: None,
        fdflags: None,
    };
    for (vm, map) in [
        (VmFlags::GROWS_DOWN, libc::MAP_GROWSDOWN),
        (VmFlags::LOCKED, libc::MAP_LOCKED),
        (VmFlags::NO_RESERVE, libc::MAP_NORESERVE),
        (VmFlags::HUGETLB, libc::MAP_HUGETLB),
    ] {
        if flag(vm) {
            e.flags |= map as u32;
        }
    }
    if flag(VmFlags::HUGETLB) && area.kernel_page_size_kb > 0 {
        e.flags |= (area.kernel_page_size_kb * 1024).trailing_zeros() << 26;
    }
    let madvice = MADVICE.iter().filter(|(f, _)| flag(*f)).fold(0u64, |bits, (_, n)| bits | 1 << n);
    e.madv = (madvice != 0).then_some(madvice);
    let protected = flag(VmFlags::UFFD_WP) && !files.memory_is_tracked;
    if flag(VmFlags::UFFD_MISSING) || flag(VmFlags::UFFD_MINOR) || protected {
        return Err(Error::refused(
            "memory that a userfaultfd watches",
            "end the userfaultfd handling before the dump",
        ));
    }
    if flag(VmFlags::SHADOW_STACK) {
        return Err(Error::refused(
            "a shadow stack",
            "start the program with shadow stacks off (GLIBC_TUNABLES=glibc.cpu.x86_shstk=off)",
        ));
    }
    let anonymous = status::REGULAR | status::ANON_PRIVATE;
    match area.name() {
        VmaName::Anonymous | VmaName::NamedAnonymous(_) | VmaName::Stack => e.status = anonymous,
        VmaName::Heap => e.status = anonymous | status::HEAP,
        VmaName::Vdso => e.status = anonymous | status::VDSO,
        VmaName::Vvar | VmaName::VvarVclock => {
            e.status = anonymous | status::VVAR;
            e.madv = Some(1 << 16);
        }
        VmaName::Vsyscall => e.status = status::VSYSCALL | status::ANON_PRIVATE,
        VmaName::AnonymousHuge if !area.shared => e.status = anonymous,
        VmaName::SharedAnonymous
        | VmaName::NamedSharedAnonymous(_)
        | VmaName::AnonymousHuge
        | VmaName::Memfd(_)
        | VmaName::File(_) => {
            file_area(pid, area, known, files, &mut e)?;
            return Ok(e);
        }
        VmaName::SysV(_) => {
            sysv::area(pid, area, files, &mut e)?;
            return Ok(e);
        }
        VmaName::AioRing => {
            e.status = status::AIORING;
            return Ok(e);
        }
        VmaName::Socket(ino) => {
            e.status = status::REGULAR | status::SOCKET;
            (e.shmid, e.pgoff, e.fdflags) = (packet::mapped(ino, files).into(), area.offset, Some(libc::O_RDWR as u32));
            return Ok(e);
        }
        VmaName::AnonInode(_) if io_uring::is_ring(area) => {
            e.status = status::REGULAR | status::IO_URING;
            (e.shmid, e.pgoff) = (io_uring::mapped(area, files)?.into(), area.offset);
            return Ok(e);
        }
        VmaName::AnonInode(name) => {
            return Err(Error::refused(
                format!("a mapping of {}", String::from_utf8_lossy(name)),
                "let the program unmap it before the dump",
            ));
        }
        VmaName::Uprobes => {
            return Err(Error::refused("an area of uprobes", "remove the probes from the program before the dump"))
        }
        VmaName::UnknownSpecial(name) => {
            return Err(Error::refused(
                format!("the area {}", String::from_utf8_lossy(name)),
                "this kernel's special area is not known",
            ));
        }
    }
    if e.flags & libc::MAP_PRIVATE as u32 != 0 {
        e.flags |= libc::MAP_ANONYMOUS as u32;
    } else {
        return Err(Error::refused("shared memory of an unknown kind", "unmap it before the dump"));
    }
    if flag(VmFlags::DROPPABLE) {
        e.flags = e.flags & !(libc::MAP_PRIVATE as u32) | 0x8;
    }
    Ok(e)
}

/// An area with a file behind it, shared anonymous memory among them.
fn file_area(pid: i32, area: &Vma, known: &mut Known, files: &mut DumpFiles<'_>, e: &mut VmaEntry) -> Result<()> {
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", area.start, area.end);
    let seen = rustix::fs::lstat(&link).call("lstat(/proc/PID/map_files)")?;
    e.fdflags = Some(match seen.st_mode & 0o600 {
        0o600 => libc::O_RDWR as u32,
        0o200 => libc::O_WRONLY as u32,
        _ => libc::O_RDONLY as u32,
    });
    e.pgoff = area.offset;
    e.status = status::REGULAR | if area.shared { status::FILE_SHARED } else { status::FILE_PRIVATE };
    let device = area.vm_flags.contains(VmFlags::PFN_MAP) || area.vm_flags.contains(VmFlags::IO);
    // smaps prints a newline as \012, and so does a name that has these four letters
    let key = match (area.name(), &area.path) {
        (VmaName::File(_), Some(path)) if !device && !path.iter().any(|c| b"\n\\".contains(c)) => {
            Some((area.dev_major, area.dev_minor, area.inode, path.clone(), area.deleted))
        }
        _ => None,
    };
    if let Some(&id) = key.as_ref().and_then(|key| known.0.get(key)) {
        e.shmid = u64::from(id);
        return Ok(());
    }
    let target = rustix::fs::readlink(&link, Vec::new()).call("readlink(/proc/PID/map_files)")?.into_bytes();
    let stat = rustix::fs::stat(&link).call("stat(/proc/PID/map_files)")?;
    if matches!(area.name(), VmaName::File(_)) && device {
        return Err(Error::refused(
            format!("memory of the device {}", String::from_utf8_lossy(&target)),
            "let the program unmap the device before the dump",
        ));
    }
    let in_memory = target.starts_with(b"/memfd:")
        || matches!(area.name(), VmaName::SharedAnonymous | VmaName::NamedSharedAnonymous(_) | VmaName::AnonymousHuge);
    let kind = FileType::from_raw_mode(stat.st_mode);
    let id = if in_memory && kind == FileType::RegularFile {
        e.status |= status::MEMFD;
        // what was mapped when a seal forbade writing must not be writable later
        if area.shared && !area.vm_flags.contains(VmFlags::MAY_WRITE) {
            e.fdflags = Some(libc::O_RDONLY as u32);
        }
        let file: OwnedFd = File::open(&link).call("open(/proc/PID/map_files)")?.into();
        memfd::mapped(files, file, &target, &stat)?
    } else {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(&link, flags, rustix::fs::Mode::empty()).call("open(/proc/PID/map_files)")?;
        let id = regular::mapped(files, file, &target, &stat)?;
        key.and_then(|key| known.0.insert(key, id));
        id
    };
    e.shmid = u64::from(id);
    Ok(())
}

/// What a pre-dump needs of an area whose memory is private: where it is, and what it is; `None` for others. Hugetlb
/// memory is for the dump, too.
pub fn outline(area: &Vma) -> Option<VmaEntry> {
    let of = match area.name() {
        VmaName::Anonymous | VmaName::NamedAnonymous(_) | VmaName::Stack | VmaName::Heap => status::ANON_PRIVATE,
        VmaName::Memfd(_) | VmaName::File(_) | VmaName::SharedAnonymous | VmaName::NamedSharedAnonymous(_) => {
            status::FILE_PRIVATE
        }
        VmaName::Vdso
        | VmaName::Vvar
        | VmaName::VvarVclock
        | VmaName::Vsyscall
        | VmaName::Uprobes
        | VmaName::SysV(_)
        | VmaName::AnonymousHuge
        | VmaName::AioRing
        | VmaName::AnonInode(_)
        | VmaName::Socket(_)
        | VmaName::UnknownSpecial(_) => return None,
    };
    let anonymous = if of == status::ANON_PRIVATE { libc::MAP_ANONYMOUS } else { 0 };
    (!area.shared).then(|| VmaEntry {
        start: area.start,
        end: area.end,
        prot: u32::from(area.read) | u32::from(area.write) << 1 | u32::from(area.exec) << 2,
        flags: (libc::MAP_PRIVATE | anonymous) as u32,
        status: status::REGULAR | of,
        fd: -1,
        ..Default::default()
    })
}

/// Areas whose pages are stored with the task.
pub fn has_pages(e: &VmaEntry) -> bool {
    is_private(e) || e.status & status::AIORING != 0
}

/// Private areas hold pages of the task's own.
pub fn is_private(e: &VmaEntry) -> bool {
    e.status & status::REGULAR != 0 && e.status & (status::ANON_PRIVATE | status::FILE_PRIVATE) != 0
}
