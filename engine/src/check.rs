//! What this kernel can do, found by asking it and not by its version number.
//!
//! One table holds every feature: CRIU's name where CRIU has one, how to ask, what CRIU says where it is missing, what its
//! lack costs, what helps. `criu check` reads the table in CRIU's three categories, `standstill check` prints it, and an
//! embedding program asks for one feature by name. The engine itself does not ask in advance what a call would tell it
//! anyway: a check takes some milliseconds, a small dump should not take much more.
//!
//! Questions are in `check/probes.rs`, those that need raw calls in `sys/probe.rs`. None leaves anything behind; some are
//! asked by a thread in a mount or network namespace of its own, some by a child.

mod netlink;
mod probes;
mod table;

use nix::errno::Errno;

pub use table::FEATURES;

/// When CRIU looks at a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Category {
    /// Always: without it nothing works.
    Required,
    /// With --extra: some programs need it.
    Extra,
    /// With --experimental.
    Experimental,
    /// At the end, and its lack does not count.
    Optional,
    /// Only when asked for by name.
    Named,
    /// Not at all: this engine makes use of it, CRIU does not know it.
    Ours,
}

/// What CRIU prints where a feature is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Complaint {
    /// Nothing.
    Silent,
    /// A warning.
    Warn(&'static str),
    /// An error.
    Error(&'static str),
    /// An error, followed by what the kernel said.
    ErrorReason(&'static str),
    /// Plain text on standard output.
    Message(&'static str),
}

/// What stands against a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lack(pub Errno);

impl From<Errno> for Lack {
    fn from(e: Errno) -> Self {
        Self(e)
    }
}

impl From<std::io::Error> for Lack {
    fn from(e: std::io::Error) -> Self {
        Self(Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))
    }
}

impl Lack {
    /// The kernel answered, and the answer is no.
    pub const ABSENT: Self = Self(Errno::EOPNOTSUPP);

    /// What the kernel said.
    pub fn reason(self) -> &'static str {
        match self.0 {
            Errno::EOPNOTSUPP => "not there",
            e => e.desc(),
        }
    }
}

/// A question's answer.
pub type Found = Result<(), Lack>;

/// One feature.
#[derive(Debug)]
pub struct Feature {
    /// CRIU's name for --feature where it has one.
    pub name: &'static str,
    /// Does `criu check --feature` know it?
    pub named_by_criu: bool,
    /// When CRIU looks at it.
    pub category: Category,
    /// Asks the kernel.
    pub probe: fn() -> Found,
    /// What CRIU says where it is missing.
    pub complaint: Complaint,
    /// What cannot be carried, or gets slower, without it.
    pub cost: &'static str,
    /// What a person can do.
    pub remedy: &'static str,
}

/// A feature by its name.
pub fn feature(name: &str) -> Option<&'static Feature> {
    FEATURES.iter().find(|f| f.name == name)
}

/// Has this kernel the feature of this name? `None` if nobody knows such a feature.
pub fn has(name: &str) -> Option<bool> {
    feature(name).map(|f| (f.probe)().is_ok())
}

/// The names that `criu check --feature` knows.
pub fn criu_feature_names() -> impl Iterator<Item = &'static str> {
    FEATURES.iter().filter(|f| f.named_by_criu).map(|f| f.name)
}

/// Those of a category that this kernel lacks.
pub fn lacking(category: Category) -> Vec<&'static Feature> {
    FEATURES.iter().filter(|feature| feature.category == category && (feature.probe)().is_err()).collect()
}

/// What one line of a report says.
#[derive(Debug)]
pub struct Line {
    /// Which feature.
    pub feature: &'static Feature,
    /// What the kernel answered.
    pub found: Found,
}

/// Asks for everything.
pub fn report() -> Vec<Line> {
    FEATURES.iter().map(|feature| Line { feature, found: (feature.probe)() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_known() {
        let mut names: Vec<_> = FEATURES.iter().map(|f| f.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
        assert_eq!(criu_feature_names().count(), 45);
        assert_eq!(has("no such thing"), None);
    }

    #[test]
    fn questions_leave_nothing_behind() {
        let fds = || std::fs::read_dir("/proc/self/fd").map(Iterator::count).unwrap_or(0);
        let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let (fds_before, mounts_before) = (fds(), mounts());
        for line in report() {
            println!("{:26} {:?}", line.feature.name, line.found);
        }
        assert_eq!(mounts(), mounts_before);
        // other tests open and close their own meanwhile
        assert!(fds() <= fds_before + 8, "{} descriptors, were {fds_before}", fds());
    }
}
