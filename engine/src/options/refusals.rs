//! What can be asked for but not done yet, refused by name before anything is touched.
//!
//! This is the only such list: the command line, RPC and the library all pass through it. When something starts to work,
//! its line goes. Options without a line here work.

use super::{NamespaceKind, Options};

/// One thing that is refused.
#[derive(Debug)]
pub struct Refusal {
    /// The long option's name, without dashes.
    pub option: &'static str,
    /// Was it asked for?
    pub asked: fn(&Options) -> bool,
    /// Why not, and what to do instead.
    pub reason: &'static str,
}

/// The refusal of an option, if it has one.
pub fn refusal(option: &str) -> Option<&'static Refusal> {
    REFUSALS.iter().find(|r| r.option == option)
}

const fn refuse(option: &'static str, asked: fn(&Options) -> bool, reason: &'static str) -> Refusal {
    Refusal { option, asked, reason }
}

/// The list.
#[rustfmt::skip]
pub const REFUSALS: &[Refusal] = &[
    refuse("compress", |o| o.compress && (o.use_page_server || o.lazy_pages), "pages are sent as they are"),
    refuse("join-ns", |o| o.join_ns.iter().any(|j| j.kind != NamespaceKind::Net), "only network namespaces can be joined yet"),
    refuse("lsm-profile", |o| o.lsm_profile.is_some(), "security labels are not restored yet"),
    refuse("libdir", |o| o.libdir.is_some(), "there are no plugins"),
];
