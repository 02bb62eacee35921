//! What a side of a migration knows for sure, in a file that survives the side: `journal.json` in its folder, replaced as a
//! whole, and on the disk before the step that it tells of is taken.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::members::Members;
use crate::error::{At, Call, Error, Place, Result};

/// Its name in the folder.
const NAME: &str = "journal.json";

/// How far a migration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Memory is on its way; the source has the tree.
    Moving,
    /// The destination has made the tree, and holds it. Only the source can say whose it is.
    Prepared,
    /// The source ends its tree; when it has ended, the destination's is the one.
    Committing,
    /// The destination's tree runs.
    Done,
    /// The source's tree runs, the destination's is gone.
    Aborted,
}

/// All that has to be known to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// Which migration.
    pub id: String,
    /// How far it is.
    pub state: State,
    /// The other side, as it can be reached.
    pub peer: String,
    /// The tree on this side, as soon as it stands still.
    pub tree: Members,
    /// Who works on it: the engine, and what undoes what a dead engine cannot.
    pub engine: Members,
    /// The images of the last pass, below the folder.
    pub images: Option<PathBuf>,
    /// Its memory comes behind the commit: until it is done, both sides are needed.
    #[serde(default)]
    pub late: bool,
    /// What the destination was asked for, which it needs to start anew.
    pub request: Option<super::wire::Request>,
}

impl Journal {
    /// A new one.
    pub fn new(id: &str, peer: &str) -> Journal {
        Journal {
            id: id.to_owned(),
            state: State::Moving,
            peer: peer.to_owned(),
            tree: Members::default(),
            engine: Members::default(),
            images: None,
            late: false,
            request: None,
        }
    }

    /// Reads the one in a folder.
    pub fn read(folder: &Path) -> Result<Journal> {
        let path = folder.join(NAME);
        let at = || Place::Path(path.clone());
        let text = std::fs::read(&path).call("open").at(at())?;
        serde_json::from_slice(&text)
            .map_err(|e| Error::Changed { what: format!("this is no journal of a migration: {e}") })
            .at(at())
    }

    /// Puts it into a folder; when this returns, it is on the disk.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let (path, new) = (folder.join(NAME), folder.join("journal.new"));
        let written = || -> std::io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec_pretty(self)?)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(folder)?.sync_all()
        };
        written().call("write").at(Place::Path(path.clone()))
    }

    /// Writes that it is in another state.
    pub fn enter(&mut self, state: State, folder: &Path) -> Result<()> {
        self.state = state;
        self.write(folder)
    }

    /// The processes that work on it: this one and its children, without the tree itself.
    pub fn workers(&self) -> Members {
        let me = i32::try_from(std::process::id()).unwrap_or(0);
        let others = super::members::children(me).into_iter().filter(|pid| !self.tree.has(*pid));
        Members::of(std::iter::once(me).chain(others))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let folder = std::env::temp_dir().join(format!("standstill-journal-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut journal = Journal::new("an-id", "10.0.0.2:4711");
        journal.enter(State::Committing, &folder).unwrap();
        assert_eq!(Journal::read(&folder).unwrap(), journal);
        std::fs::write(folder.join(NAME), "{}").unwrap();
        let e = Journal::read(&folder).unwrap_err().chain();
        assert!(e.contains("journal.json") && e.contains("no journal of a migration"), "{e}");
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(Journal::read(&folder).unwrap_err().chain().contains("No such file"));
    }
}
