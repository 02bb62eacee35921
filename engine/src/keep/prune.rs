//! Removes the oldest checkpoints of a series: those that neither are to be kept nor have something that others build on.
//!
//! A series is what `dump --every` makes, or whoever else numbers the folders of checkpoints: their names are numbers, the
//! highest the last. What is younger than the last whole one is not looked at: it may be in the making. A folder that holds
//! checkpoints of others, or nothing of ours, is not touched.
//!
//! The youngest goes first, so that what builds on another one goes before it, and of each its inventory ([`super::remove`]):
//! so whoever is killed in between leaves checkpoints that are whole, and folders that are none.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::{find, has_images, parents, remove, Checkpoint};
use crate::error::{Error, Result};

/// What is to go.
#[derive(Debug, Default)]
pub struct Plan {
    /// Checkpoints that stay, oldest first: those to be kept, and what they build on.
    pub kept: Vec<Checkpoint>,
    /// What goes, in the order in which it does.
    pub removed: Vec<Checkpoint>,
}

/// The number that a folder of a series has.
fn number(name: &Path) -> Option<u64> {
    let text = name.to_str()?;
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The folders of a series that have nothing in them: a dump that ended before its first image.
fn empty(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let nothing = |path: &Path| std::fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
    let names = entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()) && nothing(&e.path()));
    names.map(|e| PathBuf::from(e.file_name())).filter(|name| number(name).is_some()).collect()
}

/// Finds what can go if the last `keep` whole checkpoints are to stay.
///
/// # Errors
/// If the folder is no series, or cannot be read.
pub fn plan(folder: &Path, keep: usize) -> Result<Plan> {
    let usage = |what: String| Err(Error::Usage { what });
    if keep == 0 {
        return usage("at least one checkpoint is kept".into());
    }
    if has_images(folder) {
        return usage(format!("{} is a checkpoint itself, and no series of them", folder.display()));
    }
    let all = find(folder)?;
    let mut series: Vec<(u64, Checkpoint)> =
        all.iter().filter_map(|found| Some((number(&found.name)?, found.clone()))).collect();
    if series.is_empty() {
        let what = "is no series of checkpoints: none of its folders that have one is called by a number";
        return usage(format!("{} {what}", folder.display()));
    }
    for name in empty(folder) {
        let found = Checkpoint::read(&folder.join(&name), name.clone());
        series.extend(number(&name).map(|number| (number, found)));
    }
    series.sort_by(|(a, x), (b, y)| (a, &x.name).cmp(&(b, &y.name)));
    let whole: Vec<usize> = (0..series.len()).filter(|n| series[*n].1.standing.is_whole()).collect();
    let Some(&last) = whole.last() else { return Ok(Plan::default()) };
    let spared: HashSet<usize> = whole.iter().rev().take(keep).copied().chain(last..series.len()).collect();

    // what those build on, and checkpoints that are not of the series
    let own = |found: &Checkpoint| series.iter().any(|(_, member)| member.name == found.name);
    let others = all.iter().filter(|found| !own(found));
    let mut needed: Vec<PathBuf> = Vec::new();
    for found in spared.iter().map(|n| &series[*n].1).chain(others.clone()) {
        needed.extend(parents(&found.folder).unwrap_or_default());
    }
    needed.extend(others.filter_map(|found| std::fs::canonicalize(&found.folder).ok()));

    let mut plan = Plan::default();
    for (n, (_, member)) in series.into_iter().enumerate() {
        let place = std::fs::canonicalize(&member.folder).unwrap_or_else(|_| member.folder.clone());
        if spared.contains(&n) || needed.iter().any(|path| path.starts_with(&place)) {
            plan.kept.push(member);
        } else {
            plan.removed.push(member);
        }
    }
    plan.removed.reverse();
    Ok(plan)
}

/// Removes what the plan says.
///
/// # Errors
/// If something cannot be removed; what was removed before that is gone.
pub fn carry_out(plan: &Plan) -> Result<()> {
    plan.removed.iter().try_for_each(|found| remove(&found.folder))
}

#[cfg(test)]
mod tests {
    use super::super::testing::{fake, scratch};
    use super::super::Standing;
    use super::*;

    fn names(all: &[Checkpoint]) -> Vec<String> {
        all.iter().map(|found| found.name.display().to_string()).collect()
    }

    #[test]
    fn the_oldest_go_but_not_what_is_built_on() {
        let folder = scratch("prune");
        fake(&folder, "000001", None, false);
        fake(&folder, "000002", Some("../000001"), false);
        fake(&folder, "000003", None, false);
        fake(&folder, "000004", Some("../000003"), true);
        fake(&folder, "000005", Some("../000004"), false);
        fake(&folder, "000006", None, false);
        std::fs::create_dir(folder.join("000000")).unwrap();
        std::fs::create_dir(folder.join("2026")).unwrap();
        std::fs::write(folder.join("2026/letter"), "dear").unwrap();
        // in the making
        std::fs::create_dir(folder.join("000007")).unwrap();
        std::fs::write(folder.join("000007/core-1.img"), "").unwrap();

        let found = plan(&folder, 2).unwrap();
        assert_eq!(names(&found.removed), ["000002", "000001", "000000"]);
        assert_eq!(names(&found.kept), ["000003", "000004", "000005", "000006", "000007"]);
        let more = plan(&folder, 3).unwrap();
        // 5, 6 and 3, which is whole by itself
        assert_eq!(names(&more.removed), ["000002", "000001", "000000"]);
        let one = plan(&folder, 1).unwrap();
        assert_eq!(names(&one.removed), ["000005", "000004", "000003", "000002", "000001", "000000"]);
        assert!(plan(&folder, 100).unwrap().removed.iter().all(|c| c.name == Path::new("000000")));

        // somebody else builds on the first; its own folder is none of a series
        fake(&folder, "other", Some("../000001"), false);
        assert_eq!(names(&plan(&folder, 1).unwrap().removed), ["000005", "000004", "000003", "000002", "000000"]);
        std::fs::remove_dir_all(folder.join("other")).unwrap();

        carry_out(&found).unwrap();
        let left = find(&folder).unwrap();
        assert_eq!(names(&left), ["000003", "000004", "000005", "000006", "000007"]);
        assert!(folder.join("2026/letter").exists());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_no_series_is_refused() {
        let folder = scratch("prune-none");
        assert!(matches!(plan(&folder, 1), Err(Error::Usage { .. })));
        fake(&folder, "images", None, false);
        assert!(matches!(plan(&folder, 1), Err(Error::Usage { .. })));
        assert!(matches!(plan(&folder.join("images"), 1), Err(Error::Usage { .. })));
        fake(&folder, "1", None, false);
        assert!(matches!(plan(&folder, 0), Err(Error::Usage { .. })));
        assert!(plan(&folder, 1).unwrap().removed.is_empty());
        // without a whole one nothing can be told
        std::fs::remove_file(folder.join("1/inventory.img")).unwrap();
        std::fs::write(folder.join("1/core-1.img"), "").unwrap();
        assert!(plan(&folder, 1).unwrap().removed.is_empty());
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// Whoever is killed between two removals, or within one, leaves nothing that is half a checkpoint and looks whole.
    #[test]
    fn at_each_moment_what_is_left_is_whole_or_none() {
        let folder = scratch("prune-moments");
        fake(&folder, "1", None, false);
        fake(&folder, "2", Some("../1"), false);
        fake(&folder, "3", Some("../2"), false);
        fake(&folder, "4", None, false);
        let found = plan(&folder, 1).unwrap();
        for gone in &found.removed {
            // the first step of its removal
            std::fs::remove_file(gone.folder.join("inventory.img")).unwrap();
            let broken = |c: &Checkpoint| c.standing == Standing::Incomplete && c.folder.join("inventory.img").exists();
            let left = find(&folder).unwrap();
            assert!(!left.iter().any(broken), "{left:?}");
            remove(&gone.folder).unwrap();
            assert!(!find(&folder).unwrap().iter().any(broken));
        }
        assert_eq!(names(&find(&folder).unwrap()), ["4"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
