//! Which checkpoints lie below a folder, and in what state ([`find`]); which of a series can go is in [`prune`].
//!
//! A folder with images is a checkpoint, or was to become one: its inventory is written last and durably, so one without it is
//! none. What it builds on is where its link `parent` leads; it is whole if all of those are there, too. A pre-dump is
//! complete in itself, but has memory alone. When it was made is the time of its inventory.
//!
//! Nothing here reads memory, or all of an image: whether the content is sound is what `verify` finds out.

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use standstill_images::proto::{CoreEntry, InventoryEntry, PstreeEntry, TaskKobjIdsEntry};
use standstill_images::store::sealed;
use standstill_images::{FolderStore, ImageKind, Images, Store as _};

use crate::error::{At as _, Call as _, Error, Place, Result};
use crate::gpu;
use crate::namespaces::Own;

pub mod prune;

/// A restore follows no more parents than this.
const LONGEST: usize = 1024;
/// Folders in folders, deeper than anybody keeps checkpoints.
const DEEPEST: usize = 16;

/// What a folder with images is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It can be restored.
    Whole,
    /// It is sealed: what is in it only its key can tell.
    Sealed,
    /// It has memory alone, for a dump to build on.
    PreDump,
    /// Nothing: its dump did not come to its end, or something that it builds on is missing.
    Incomplete,
}

impl Standing {
    /// In one word.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Sealed => "sealed",
            Self::PreDump => "pre-dump",
            Self::Incomplete => "incomplete",
        }
    }
}

/// A folder with images.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// How it is called below the folder that was looked at: `.` is that itself.
    pub name: PathBuf,
    /// Where it is.
    pub folder: PathBuf,
    /// What it is good for.
    pub standing: Standing,
    /// If it is incomplete: why.
    pub why: Option<String>,
    /// When it was completed.
    pub when: Option<SystemTime>,
    /// The first process.
    pub root: Option<u32>,
    /// Its name.
    pub command: Option<String>,
    /// How many processes there are.
    pub tasks: usize,
    /// How much room it takes on the disk.
    pub bytes: u64,
    /// What it builds on, as its link says.
    pub parent: Option<PathBuf>,
    /// Its memory is packed.
    pub compressed: bool,
    /// It has CUDA in it.
    pub gpu: bool,
    /// Namespaces that the tree has of its own.
    pub namespaces: Vec<&'static str>,
}

/// Is this folder, by its name, part of the checkpoint above it: memory that a snapshot copied ahead?
fn is_part(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = name.strip_prefix("snapshot-").and_then(|rest| rest.strip_suffix(".pre"));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Are there images of a checkpoint in it?
fn has_images(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let is_image = |name: &str| name.ends_with(".img") && ImageKind::from_file_name(name).is_some();
    entries.filter_map(|e| e.file_name().into_string().ok()).any(|name| is_image(&name))
}

/// All that is below a folder, links not followed: how much room it takes.
fn room(folder: &Path, depth: usize) -> u64 {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let Ok(metadata) = entry.metadata() else { continue };
        if !metadata.is_dir() {
            bytes += metadata.blocks() * 512;
        } else if depth > 0 && is_part(&entry.path()) {
            bytes += room(&entry.path(), depth - 1);
        }
    }
    bytes
}

/// The inventory of a folder.
fn inventory(folder: &Path) -> Result<InventoryEntry> {
    Ok(Images::open_folder(folder)?.read_one(ImageKind::Inventory, ())?)
}

/// The folders that this one builds on, the nearest first.
///
/// # Errors
/// If one is missing, or they build on each other in a ring.
fn parents(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = Vec::new();
    let mut at = folder.to_owned();
    while at.join("parent").symlink_metadata().is_ok() {
        let link = at.join("parent");
        at = std::fs::canonicalize(&link).call("open").at(Place::Path(link))?;
        if all.len() >= LONGEST || all.contains(&at) {
            return Err(Error::lie("parent", "checkpoints build on each other in a ring, or are too many"));
        }
        all.push(at.clone());
    }
    Ok(all)
}

/// What a folder with images is good for, and why it is no more than that.
pub(crate) fn standing(folder: &Path) -> (Standing, Option<String>) {
    let judge = || -> Result<Standing> {
        let store = FolderStore::open(folder)?;
        if sealed::is_sealed(&store)? && store.exists("inventory.img")? {
            parents(folder)?;
            return Ok(Standing::Sealed);
        }
        let own = inventory(folder)?;
        for parent in parents(folder)? {
            inventory(&parent).at(Place::Path(parent))?;
        }
        // an older CRIU notes the mode of its pre-dumps in dumps on top of them, too
        let memory_alone = own.pre_dump_mode.is_some() && !Images::open_folder(folder)?.exists(ImageKind::Files, ())?;
        Ok(if memory_alone { Standing::PreDump } else { Standing::Whole })
    };
    match judge() {
        Ok(standing) => (standing, None),
        Err(e) => (Standing::Incomplete, Some(e.chain())),
    }
}

impl Standing {
    /// Can it be restored, and all that it builds on is there? Of what is sealed that is believed.
    #[must_use]
    pub fn is_whole(self) -> bool {
        match self {
            Self::Whole | Self::Sealed => true,
            Self::PreDump | Self::Incomplete => false,
        }
    }
}

/// Has this folder a checkpoint that can be restored, and so has all that it builds on?
pub fn is_whole(folder: &Path) -> bool {
    standing(folder).0.is_whole()
}

impl Checkpoint {
    /// What there is to say of a folder with images.
    fn read(folder: &Path, name: PathBuf) -> Checkpoint {
        let (standing, why) = standing(folder);
        let mut found = Checkpoint {
            name,
            folder: folder.to_owned(),
            standing,
            why,
            when: std::fs::metadata(folder.join("inventory.img")).and_then(|m| m.modified()).ok(),
            root: None,
            command: None,
            tasks: 0,
            bytes: room(folder, DEEPEST),
            parent: std::fs::read_link(folder.join("parent")).ok(),
            compressed: false,
            gpu: false,
            namespaces: Vec::new(),
        };
        // of one that is damaged, as much as can be read
        if let Ok(images) = Images::open_folder(folder) {
            let own = inventory(folder).unwrap_or_default();
            found.compressed = own.compress.is_some();
            let plugins = own.plugins_entry.as_ref().map_or(&[][..], |p| &p.plugins);
            found.gpu = plugins.iter().any(|plugin| plugin.as_slice() == gpu::PLUGIN);
            found.tree(&images, own.root_ids.as_ref());
        }
        found
    }

    fn tree(&mut self, images: &Images, engine: Option<&TaskKobjIdsEntry>) {
        let tasks: Vec<PstreeEntry> = images.read_entries_if_there(ImageKind::Pstree, ()).unwrap_or_default();
        self.tasks = tasks.len();
        let Some(root) = tasks.first().map(|task| task.pid) else { return };
        self.root = Some(root);
        let core: Option<CoreEntry> = images.read_one(ImageKind::Core, root).ok();
        let comm = core.and_then(|core| core.tc).map(|tc| tc.comm);
        self.command = comm.map(|comm| String::from_utf8_lossy(&comm).trim_end_matches('\0').to_owned());
        let ids: Option<TaskKobjIdsEntry> = images.read_one(ImageKind::Ids, root).ok();
        if let Some((ids, engine)) = ids.zip(engine) {
            self.namespaces = Own::of(&ids, engine).kinds().map(crate::namespaces::Kind::file).collect();
        }
    }
}

/// Names with numbers in them in the order of the numbers.
fn natural(path: &Path) -> Vec<(String, u128, String)> {
    let text = path.to_string_lossy().into_owned();
    let mut parts = Vec::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (word, after) = rest.split_at(rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len()));
        let (digits, next) = after.split_at(after.find(|c: char| !c.is_ascii_digit()).unwrap_or(after.len()));
        // of numbers that are the same the text decides
        parts.push((
            word.to_owned(),
            digits.parse().unwrap_or(if digits.is_empty() { 0 } else { u128::MAX }),
            digits.to_owned(),
        ));
        rest = next;
    }
    parts
}

fn walk(folder: &Path, name: &Path, depth: usize, all: &mut Vec<Checkpoint>) -> Result<()> {
    let mut below = Vec::new();
    for entry in std::fs::read_dir(folder).call("open").at(Place::Path(folder.to_owned()))? {
        let entry = entry.call("getdents").at(Place::Path(folder.to_owned()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && !is_part(&entry.path()) {
            below.push(entry.file_name());
        }
    }
    if has_images(folder) {
        let own = if name.as_os_str().is_empty() { Path::new(".") } else { name };
        all.push(Checkpoint::read(folder, own.to_owned()));
    }
    for entry in below {
        let (folder, name) = (folder.join(&entry), name.join(&entry));
        match walk(&folder, &name, depth.saturating_sub(1), all) {
            // one that nobody may look into, or that has gone meanwhile
            Err(e) if depth > 0 => tracing::warn!("{}", e.chain()),
            other => other?,
        }
    }
    Ok(())
}

/// All checkpoints in a folder and below it, by name. If it is one itself, what that builds on elsewhere follows.
///
/// # Errors
/// If the folder cannot be read.
pub fn find(folder: &Path) -> Result<Vec<Checkpoint>> {
    let mut all = Vec::new();
    walk(folder, Path::new(""), DEEPEST, &mut all)?;
    all.sort_by_cached_key(|found| (found.name != Path::new("."), natural(&found.name)));
    if all.first().is_some_and(|first| first.name == Path::new(".")) {
        let known: HashSet<PathBuf> = all.iter().filter_map(|c| std::fs::canonicalize(&c.folder).ok()).collect();
        let elsewhere = parents(folder).unwrap_or_default().into_iter().filter(|p| !known.contains(p) && !is_part(p));
        all.extend(elsewhere.map(|parent| Checkpoint::read(&parent, parent.clone())).collect::<Vec<_>>());
    }
    Ok(all)
}

/// Removes a checkpoint: its inventory first, so that half of it is none, whatever happens meanwhile.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    let absent = |e: &std::io::Error| e.kind() == std::io::ErrorKind::NotFound;
    let place = || Place::Path(folder.to_owned());
    match std::fs::remove_file(folder.join("inventory.img")) {
        Err(e) if !absent(&e) => return Err(e).call("unlink").at(place()),
        Err(_) => {}
        // gone before anything else is, also if the machine goes down
        Ok(()) => std::fs::File::open(folder).and_then(|folder| folder.sync_all()).call("fsync").at(place())?,
    }
    match std::fs::remove_dir_all(folder) {
        Err(e) if !absent(&e) => Err(e).call("rmdir").at(place()),
        _ => Ok(()),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A folder with a checkpoint in it that has no tasks.
    pub(crate) fn fake(folder: &Path, name: &str, parent: Option<&str>, pre_dump: bool) {
        let at = folder.join(name);
        std::fs::create_dir_all(&at).unwrap();
        let images = Images::open_folder(&at).unwrap();
        let pre_dump_mode = pre_dump.then_some(1);
        let inventory = InventoryEntry { img_version: 2, pre_dump_mode, ..Default::default() };
        if let Some(parent) = parent {
            std::os::unix::fs::symlink(parent, at.join("parent")).unwrap();
        }
        images.write_one(ImageKind::Inventory, (), &inventory).unwrap();
    }

    /// A folder of the test's own.
    pub(crate) fn scratch(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("standstill-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir(&folder).unwrap();
        folder
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{fake, scratch};
    use super::*;

    fn names(folder: &Path) -> Vec<(String, Standing)> {
        find(folder).unwrap().iter().map(|c| (c.name.display().to_string(), c.standing)).collect()
    }

    #[test]
    fn each_is_found_and_judged() {
        let folder = scratch("keep-find");
        assert!(find(&folder).unwrap().is_empty());
        assert!(find(&folder.join("nothing")).is_err());
        fake(&folder, "10", Some("../9"), false);
        fake(&folder, "9", Some("../2"), true);
        fake(&folder, "2", None, true);
        // one that builds on memory copied ahead, in a folder of its own
        fake(&folder, "deep/er/a", Some("snapshot-1.pre"), false);
        fake(&folder, "deep/er/a/snapshot-1.pre", None, true);
        std::fs::create_dir(folder.join("logs")).unwrap();
        std::fs::write(folder.join("logs/dump.log"), "x").unwrap();
        std::os::unix::fs::symlink(".", folder.join("again")).unwrap();
        let all = [
            ("2".to_owned(), Standing::PreDump),
            ("9".to_owned(), Standing::PreDump),
            ("10".to_owned(), Standing::Whole),
            ("deep/er/a".to_owned(), Standing::Whole),
        ];
        assert_eq!(names(&folder), all);
        // by itself it is listed with what it builds on
        let chain = find(&folder.join("10")).unwrap();
        let ends = |n: usize, name: &str| chain[n].folder.ends_with(name);
        assert!(chain.len() == 3 && chain[0].name == Path::new(".") && ends(1, "9") && ends(2, "2"), "{chain:?}");
        assert_eq!(chain[0].parent.as_deref(), Some(Path::new("../9")));

        std::fs::remove_file(folder.join("2/inventory.img")).unwrap();
        std::fs::write(folder.join("2/core-1.img"), "").unwrap();
        let found = find(&folder).unwrap();
        assert!(found[..3].iter().all(|c| c.standing == Standing::Incomplete), "{found:?}");
        assert!(found[2].why.as_ref().is_some_and(|why| why.contains("inventory.img is missing")), "{found:?}");
        std::fs::remove_dir_all(folder.join("9")).unwrap();
        assert_eq!(names(&folder)[1], ("10".to_owned(), Standing::Incomplete));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn rings_end() {
        let folder = scratch("keep-ring");
        fake(&folder, "a", Some("../b"), false);
        fake(&folder, "b", Some("../a"), false);
        fake(&folder, "c", Some("../c"), false);
        assert!(names(&folder).iter().all(|(_, standing)| *standing == Standing::Incomplete));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn sealed_ones_are_believed() {
        let folder = scratch("keep-sealed");
        std::fs::create_dir(folder.join("1")).unwrap();
        std::fs::write(folder.join("1").join(sealed::MANIFEST), "sealed").unwrap();
        std::fs::write(folder.join("1/core-1.img"), "sealed").unwrap();
        assert_eq!(names(&folder), [("1".to_owned(), Standing::Incomplete)]);
        std::fs::write(folder.join("1/inventory.img"), "sealed").unwrap();
        assert_eq!(names(&folder), [("1".to_owned(), Standing::Sealed)]);
        assert!(is_whole(&folder.join("1")) && !is_whole(&folder));
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn numbers_count() {
        let mut all = ["a10", "a9", "a", "b", "a09", "10", "9"].map(PathBuf::from);
        all.sort_by_cached_key(|path| natural(path));
        assert_eq!(all, ["9", "10", "a", "a09", "a9", "a10", "b"].map(PathBuf::from));
    }
}
