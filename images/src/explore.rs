//! Views of a whole checkpoint for people, as crit's `x` prints them: the tree of tasks, their descriptors, their memory,
//! and which of it was resident.

use std::collections::HashMap;
use std::fmt::Write as _;

use crate::error::Result;
use crate::images::Images;
use crate::json::quoted;
use crate::proto::{
    CoreEntry, FdTypes, FdinfoEntry, FileEntry, FsEntry, MmEntry, PipeEntry, PstreeEntry, RegFileEntry,
    TaskKobjIdsEntry, UnixSkEntry, VmaEntry,
};
use crate::table::ImageKind;

/// A view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// The tree of tasks.
    Ps,
    /// Descriptors, working directory and root of each task.
    Fds,
    /// Areas of each task's memory.
    Mems,
    /// Pages of each task that are in the checkpoint, and the areas they are in.
    Rss,
}

// Bits of an area's status.
const REGULAR: u32 = 1 << 0;
const STACK: u32 = 1 << 1;
const VSYSCALL: u32 = 1 << 2;
const VDSO: u32 = 1 << 3;
const FILE_PRIVATE: u32 = 1 << 6;
const FILE_SHARED: u32 = 1 << 7;
const ANON_SHARED: u32 = 1 << 8;
const SYSVIPC: u32 = 1 << 10;
const SOCKET: u32 = 1 << 11;
const MAP_GROWSDOWN: u32 = 0x100;

/// A view of these images, as text.
///
/// # Errors
/// If an image is missing or malformed.
pub fn view(images: &Images, view: View) -> Result<String> {
    let tasks: Vec<PstreeEntry> = images.read_entries(ImageKind::Pstree, ())?;
    let mut out = String::new();
    match view {
        View::Ps => ps(images, &tasks, &mut out)?,
        View::Fds => fds(images, &tasks, &mut out)?,
        View::Mems => mems(images, &tasks, &mut out)?,
        View::Rss => rss(images, &tasks, &mut out)?,
    }
    Ok(out)
}

/// Adds a line. Writing to a String cannot fail.
macro_rules! line {
    ($out:expr, $($format:tt)*) => {{ let _ = writeln!($out, $($format)*); }};
}

fn ps(images: &Images, tasks: &[PstreeEntry], out: &mut String) -> Result<()> {
    let mut places: HashMap<u32, usize> = HashMap::new();
    let mut comms = Vec::new();
    for (place, task) in tasks.iter().enumerate() {
        places.insert(task.pid, place);
        let core = images.open(ImageKind::Core, task.pid)?.reader()?.next_entry::<CoreEntry>()?;
        let comm = core.and_then(|core| core.tc).map(|tc| tc.comm).unwrap_or_default();
        comms.push(String::from_utf8_lossy(&comm).into_owned());
    }
    let mut kids: HashMap<usize, Vec<usize>> = HashMap::new();
    let mut roots = Vec::new();
    // Of two tasks with one pid the later counts, so that each task has one parent and the tree no ring.
    for (place, task) in tasks.iter().enumerate().filter(|(place, task)| places.get(&task.pid) == Some(place)) {
        match places.get(&task.ppid) {
            Some(parent) if task.ppid != 0 => kids.entry(*parent).or_default().push(place),
            _ => roots.push(place),
        }
    }
    line!(out, "{:>7}{:>7}{:>7}   COMM", "PID", "PGID", "SID");
    let mut next: Vec<(usize, usize)> = roots.iter().rev().map(|root| (*root, 0)).collect();
    while let Some((place, depth)) = next.pop() {
        if let (Some(task), Some(comm)) = (tasks.get(place), comms.get(place)) {
            line!(out, "{:>7}{:>7}{:>7}   {:indent$}{comm}", task.pid, task.pgid, task.sid, "", indent = 4 * depth);
        }
        next.extend(kids.get(&place).into_iter().flatten().rev().map(|kid| (*kid, depth + 1)));
    }
    Ok(())
}

/// Names of open files, from the image of all files or from those of each kind that were before it.
struct Files<'a> {
    images: &'a Images,
    files: HashMap<u32, FileEntry>,
    regular: Option<HashMap<u32, RegFileEntry>>,
    pipes: Option<HashMap<u32, PipeEntry>>,
    unix: Option<HashMap<u32, UnixSkEntry>>,
}

impl<'a> Files<'a> {
    fn new(images: &'a Images) -> Result<Self> {
        let files: Vec<FileEntry> = images.read_entries_if_there(ImageKind::Files, ())?;
        let files = files.into_iter().rev().map(|file| (file.id, file)).collect();
        Ok(Self { images, files, regular: None, pipes: None, unix: None })
    }

    fn regular(&mut self, id: u32) -> Result<String> {
        let file = match self.files.get(&id) {
            Some(file) => file.reg.as_ref(),
            None => old(&mut self.regular, self.images, ImageKind::RegFiles, |file: &RegFileEntry| file.id)?.get(&id),
        };
        let name = file.map(|file| String::from_utf8_lossy(&file.name).into_owned());
        Ok(name.filter(|name| !name.is_empty()).unwrap_or_else(|| "unknown path".to_owned()))
    }

    fn pipe(&mut self, id: u32) -> Result<String> {
        let pipe = match self.files.get(&id) {
            Some(file) => file.pipe.as_ref(),
            None => old(&mut self.pipes, self.images, ImageKind::Pipes, |pipe: &PipeEntry| pipe.id)?.get(&id),
        };
        Ok(pipe.map_or_else(|| "pipe[?]".to_owned(), |pipe| format!("pipe[{}]", pipe.pipe_id)))
    }

    fn unix(&mut self, id: u32) -> Result<String> {
        let socket = match self.files.get(&id) {
            Some(file) => file.usk.as_ref(),
            None => old(&mut self.unix, self.images, ImageKind::Unixsk, |socket: &UnixSkEntry| socket.id)?.get(&id),
        };
        let Some(socket) = socket else { return Ok("unix[?]".to_owned()) };
        let name = if socket.name.is_empty() { String::new() } else { format!(" {}", quoted(&socket.name)) };
        Ok(format!("unix[{} ({}){name}]", socket.ino, socket.peer))
    }

    fn descriptor(&mut self, entry: &FdinfoEntry) -> Result<String> {
        match entry.r#type() {
            FdTypes::Reg => self.regular(entry.id),
            FdTypes::Pipe => self.pipe(entry.id),
            FdTypes::Unixsk => self.unix(entry.id),
            other => Ok(format!("{}.{}", other.as_str_name(), entry.id)),
        }
    }
}

/// An image of one kind of files, read when it is first needed.
fn old<'a, T: crate::Entry>(
    kept: &'a mut Option<HashMap<u32, T>>,
    images: &Images,
    kind: ImageKind,
    id: impl Fn(&T) -> u32,
) -> Result<&'a HashMap<u32, T>> {
    if kept.is_none() {
        let entries: Vec<T> = images.read_entries_if_there(kind, ())?;
        *kept = Some(entries.into_iter().rev().map(|entry| (id(&entry), entry)).collect());
    }
    Ok(kept.get_or_insert_with(HashMap::new))
}

fn fds(images: &Images, tasks: &[PstreeEntry], out: &mut String) -> Result<()> {
    let mut files = Files::new(images)?;
    for task in tasks {
        // What is dead has no descriptors.
        let Some(ids) = images.read_one_if_there::<TaskKobjIdsEntry>(ImageKind::Ids, task.pid)? else { continue };
        line!(out, "{}", task.pid);
        for entry in images.read_entries::<FdinfoEntry>(ImageKind::Fdinfo, ids.files_id)? {
            line!(out, "\t{:>7}: {}", entry.fd, files.descriptor(&entry)?);
        }
        let fs: FsEntry = images.read_one(ImageKind::Fs, task.pid)?;
        line!(out, "\t{:>7}: {}", "cwd", files.regular(fs.cwd_id)?);
        line!(out, "\t{:>7}: {}", "root", files.regular(fs.root_id)?);
    }
    Ok(())
}

fn mems(images: &Images, tasks: &[PstreeEntry], out: &mut String) -> Result<()> {
    let mut files = Files::new(images)?;
    let mut shared: HashMap<u64, usize> = HashMap::new();
    for task in tasks {
        let Some(mm) = images.read_one_if_there::<MmEntry>(ImageKind::Mm, task.pid)? else { continue };
        line!(out, "{}", task.pid);
        line!(out, "\t{:<36}    {}", "exe", files.regular(mm.exe_file_id)?);
        for area in &mm.vmas {
            let mut what = area_of(area, &mut files, &mut shared)?;
            if area.status & REGULAR == 0 {
                what.push_str(" *");
            }
            let right = |bit, letter| if area.prot & bit != 0 { letter } else { '-' };
            let range = format!("{:08x}-{:08x}", area.start, area.end);
            line!(out, "\t{range:<36}{}{}{}{what}", right(1, 'r'), right(2, 'w'), right(4, 'x'));
        }
    }
    Ok(())
}

fn area_of(area: &VmaEntry, files: &mut Files<'_>, shared: &mut HashMap<u64, usize>) -> Result<String> {
    let is = |bits| area.status & bits != 0;
    let mut number = || {
        let next = shared.len() + 1;
        *shared.entry(area.shmid).or_insert(next)
    };
    Ok(if is(SYSVIPC) {
        format!(" ips[{:x}]", number())
    } else if is(ANON_SHARED) {
        format!(" shmem[{:x}]", number())
    } else if is(SOCKET) {
        format!(" packet[{:x}]", number())
    } else if is(FILE_PRIVATE | FILE_SHARED) {
        let mut name = format!(" {}", file_of(area, files)?);
        if area.pgoff != 0 {
            let _ = write!(name, " + {:#x}", area.pgoff);
        }
        if is(FILE_SHARED) {
            name.push_str(" (s)");
        }
        name
    } else if is(STACK) {
        " [stack]".to_owned()
    } else if is(VSYSCALL) {
        " [vsyscall]".to_owned()
    } else if is(VDSO) {
        " [vdso]".to_owned()
    } else if area.flags & MAP_GROWSDOWN != 0 {
        " [stack?]".to_owned()
    } else {
        String::new()
    })
}

/// The name of the file that an area maps.
fn file_of(area: &VmaEntry, files: &mut Files<'_>) -> Result<String> {
    match u32::try_from(area.shmid) {
        Ok(id) => files.regular(id),
        Err(_) => Ok("unknown path".to_owned()),
    }
}

fn rss(images: &Images, tasks: &[PstreeEntry], out: &mut String) -> Result<()> {
    let mut files = Files::new(images)?;
    for task in tasks {
        let Some(mm) = images.read_one_if_there::<MmEntry>(ImageKind::Mm, task.pid)? else { continue };
        let (_, entries) = images.read_pagemap(ImageKind::Pagemap, task.pid)?;
        line!(out, "{}", task.pid);
        let areas = &mm.vmas;
        let mut next = 0;
        let mut shown = None;
        for entry in entries {
            let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
            while areas.get(next).is_some_and(|area| area.end <= entry.vaddr) {
                next += 1;
            }
            let end = entry.vaddr.saturating_add(pages.saturating_mul(4096));
            let mut what = String::new();
            while let Some(area) = areas.get(next).filter(|area| area.start < end) {
                if shown == Some(next) {
                    what.push_str(" ~");
                } else {
                    let size = area.end.saturating_sub(area.start) >> 12;
                    let _ = write!(what, " {:08x} / {size:<8}", area.start);
                    if area.status & (FILE_PRIVATE | FILE_SHARED) != 0 {
                        let _ = write!(what, " {}", file_of(area, &mut files)?);
                    }
                    shown = Some(next);
                }
                let _ = write!(what, "\n\t{:23}", "");
                next += 1;
            }
            next = next.saturating_sub(1);
            line!(out, "{:<24}{what}", format!("\t{:x} / {pages:<8}", entry.vaddr));
        }
    }
    Ok(())
}
