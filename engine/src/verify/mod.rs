//! Is a checkpoint whole, and could this host restore it? Nothing is started, made or changed.
//!
//! 1. **Content** ([`content`]): each image of the checkpoint, and of those that it builds on, is read to its end. It must be there,
//!    with the size and the sum that the inventory has of it (dumps of ours note them), decode in every entry, and what its
//!    pagemaps say of pages must be in the pages images; packed blocks are unpacked. Pages that are not packed have no sum: a
//!    bit that flipped there is not seen.
//! 2. **Whole** (`restore::examine`): all that a restore reads before it makes anything, by the same readers.
//! 3. **References** ([`references`]): what a restore would find out only while it opens files and makes tasks: each id
//!    leads to something, and each image belongs to something.
//! 4. **This host**: what it lacks. Errors of the readers that are not about images ([`is_damage`]), [`Needs`], and the files that are
//!    open, mapped or executed, which must be those of the dump. Files of a tree with mounts of its own are looked for by its restore.

use std::collections::BTreeMap;

use standstill_images::proto::InventoryEntry;
use standstill_images::{Error as ImageError, ImageKind};

use crate::error::{Error, Place, Result};
use crate::keep::{self, Standing};
use crate::namespaces;
use crate::needs::Needs;
use crate::options::Options;
use crate::periodic;
use crate::restore::examine::{examine, Examined};
use crate::stages::Stages;
use crate::stores;

mod content;
mod references;

/// What was found.
#[derive(Debug, Default)]
pub struct Report {
    /// How many checkpoints there are: this one, and those that it builds on.
    pub checkpoints: usize,
    /// How many images were read.
    pub images: usize,
    /// How many bytes they have.
    pub bytes: u64,
    /// How many processes come back.
    pub tasks: usize,
    /// It has memory alone, and is for a dump to build on.
    pub pre_dump: bool,
    /// Images that are missing, cut or wrong, by name, and how.
    pub damaged: BTreeMap<String, Vec<String>>,
    /// What this host lacks.
    pub lacking: Vec<String>,
}

impl Report {
    fn damage(&mut self, image: impl Into<String>, what: impl Into<String>) {
        let (all, what) = (self.damaged.entry(image.into()).or_default(), what.into());
        if !all.contains(&what) {
            all.push(what);
        }
    }

    /// Sorts an error of a reader: an image that is known to be damaged needs no second reason.
    fn add(&mut self, error: &Error) {
        if !is_damage(error) {
            let what = error.chain();
            if !self.lacking.contains(&what) {
                self.lacking.push(what);
            }
            return;
        }
        let (image, what) = fault(error);
        if !self.damaged.contains_key(&image) {
            self.damage(image, what);
        }
    }
}

/// Is an error about the images, or about this host?
fn is_damage(error: &Error) -> bool {
    match error.cause() {
        Error::Image(_) | Error::Lie { .. } | Error::Proc(_) => true,
        Error::In { .. }
        | Error::Sys { .. }
        | Error::Refused { .. }
        | Error::Plan { .. }
        | Error::NoProcess { .. }
        | Error::IdInUse { .. }
        | Error::Stage { .. }
        | Error::Gone
        | Error::Moving { .. }
        | Error::Timeout { .. }
        | Error::Usage { .. }
        | Error::Changed { .. }
        | Error::Peer { .. }
        | Error::Gpu(_)
        | Error::InDoubt { .. }
        | Error::Interrupted => false,
    }
}

/// The image that an error is about, and what it says of it.
fn fault(error: &Error) -> (String, String) {
    let (mut at, mut task) = (error, None);
    while let Error::In { place, source } = at {
        if let Place::Task(pid) = place {
            // the last one is the process, or the thread in it
            task = Some(*pid);
        }
        at = source;
    }
    match at {
        Error::Image(source) => image_fault(source),
        Error::Lie { image, what } => match task {
            _ if image.ends_with(".img") => ((*image).to_owned(), what.clone()),
            Some(pid) => (format!("{image}-{pid}.img"), what.clone()),
            None => (format!("{image}.img"), what.clone()),
        },
        other => (".".to_owned(), other.chain()),
    }
}

fn image_fault(error: &ImageError) -> (String, String) {
    let image = match error {
        ImageError::Malformed { image, .. }
        | ImageError::Missing { image }
        | ImageError::Io { image, .. }
        | ImageError::EntryType { image, .. }
        | ImageError::Payload { image, .. } => image.clone(),
        _ => ".".to_owned(),
    };
    let mut what = match error {
        ImageError::Missing { .. } => "it is missing".to_owned(),
        ImageError::Malformed { entry, offset, .. } => format!("entry {entry}, byte {offset}"),
        ImageError::Io { operation, .. } => format!("cannot {operation} it"),
        other => other.to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(e) = cause {
        what.push_str(": ");
        what.push_str(&e.to_string());
        cause = e.source();
    }
    (image, what)
}

/// Looks at the checkpoint in `opts.images_dir`, or the last whole one of a series there. What a restore is to be told, `opts` says, too.
///
/// # Errors
/// If the folder, or whatever else it is in, cannot be opened.
pub fn run(opts: &Options) -> Result<Report> {
    let of_series = periodic::instead(opts);
    let opts = of_series.as_ref().unwrap_or(opts);
    let images = stores::for_restore(opts, &Stages::new(opts, None))?;
    let mut report = Report::default();
    let memory = content::check(&images, &mut report);
    // without one it is none, however whole the rest is
    if let Err(e) = images.read_one::<InventoryEntry>(ImageKind::Inventory, ()) {
        report.add(&e.into());
        return Ok(report);
    }
    report.pre_dump = opts.has_folder() && keep::standing(&opts.images_dir).0 == Standing::PreDump;
    if report.pre_dump {
        return Ok(report);
    }
    let mut wrong = Vec::new();
    let examined = examine(opts, &images, &mut |e| wrong.push(e));
    wrong.iter().for_each(|e| report.add(e));
    let Some(examined) = examined else { return Ok(report) };
    report.tasks = examined.tree.alive().count();
    references::check(&images, &examined, &mut report);
    this_host(opts, &examined, memory, &mut report);
    Ok(report)
}

fn this_host(opts: &Options, examined: &Examined<'_>, memory: u64, report: &mut Report) {
    let Examined { tree, own, files, .. } = examined;
    let sockets = || files.entries.values().filter_map(|entry| entry.isk.as_ref());
    report.lacking.extend(Needs::of_checkpoint(tree, own, sockets(), memory).lacking());
    let connections = sockets().filter(|e| crate::sockets::inet::is_connection(e)).count();
    if connections > 0 && !opts.tcp_established && !opts.tcp_close {
        report.lacking.push(format!("{connections} TCP connections: restore with --tcp-established, or --tcp-close"));
    }
    if own.has(namespaces::Kind::Mnt) {
        return;
    }
    // the file of a terminal is looked for by another name
    let of_terminals: Vec<u32> =
        files.entries.values().filter_map(|entry| entry.tty.as_ref().and_then(|tty| tty.regf_id)).collect();
    let mut all: Vec<_> = files.entries.values().filter_map(|entry| entry.reg.as_ref()).collect();
    all.retain(|reg| !of_terminals.contains(&reg.id));
    all.sort_by_key(|reg| reg.id);
    for reg in all {
        if let Err(e) = crate::files::regular::is_there(files, reg) {
            report.add(&e);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::At as _;

    #[test]
    fn whose_fault_it_is() {
        let lie: Result<()> = Err(Error::lie("mm", "an area"));
        let lie = lie.task(7).unwrap_err();
        assert!(is_damage(&lie));
        assert_eq!(fault(&lie), ("mm-7.img".to_owned(), "an area".to_owned()));
        let missing = Error::from(ImageError::Missing { image: "fs-1.img".into() });
        assert_eq!(fault(&missing), ("fs-1.img".to_owned(), "it is missing".to_owned()));
        let taken: Result<()> = Err(Error::IdInUse { pid: 7 });
        assert!(!is_damage(&taken.task(7).unwrap_err()));
    }
}
