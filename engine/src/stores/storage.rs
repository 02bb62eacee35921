//! A checkpoint in object storage: `dump --to URL`, `restore --from URL`, with `--storage-option KEY=VALUE`.
//!
//! The work is done by the crate `standstill-storage`, whose head says what is sent in which order, what is checked, how
//! often something is tried again, and what is left of a dump that fails. Here it is joined to the engine: a storage is
//! reached, and found to allow writing, before a tree is touched; a signal that ends a dump in order ends waiting for the
//! storage too; a restore fetches everything before it makes anything.
//!
//! Without the cargo feature `storage` nothing of it is built in, and a URL is refused.

use std::sync::Arc;

use standstill_images::Store;

use crate::error::Result;
use crate::options::Options;

/// Whether this names a storage: `SCHEME://…`.
pub(super) fn is_url(text: &str) -> bool {
    text.split_once("://").is_some_and(|(scheme, _)| {
        !scheme.is_empty() && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
    })
}

#[cfg(feature = "storage")]
fn settings(opts: &Options) -> standstill_storage::Settings {
    let interrupted = || crate::sys::interrupt::check().is_err();
    standstill_storage::Settings { options: opts.storage_options.clone(), interrupted: Some(Arc::new(interrupted)) }
}

/// A new checkpoint.
#[cfg(feature = "storage")]
pub(super) fn create(url: &str, opts: &Options) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(standstill_storage::ObjectStorage::create(url, &settings(opts))?))
}

/// One that is there.
#[cfg(feature = "storage")]
pub(super) fn open(url: &str, opts: &Options) -> Result<Arc<dyn Store>> {
    Ok(Arc::new(standstill_storage::ObjectStorage::open(url, &settings(opts))?))
}

#[cfg(not(feature = "storage"))]
pub(super) fn create(url: &str, _: &Options) -> Result<Arc<dyn Store>> {
    let what = format!("{url}: this program was built without object storage (cargo feature `storage`)");
    Err(crate::error::Error::Usage { what })
}

#[cfg(not(feature = "storage"))]
pub(super) fn open(url: &str, opts: &Options) -> Result<Arc<dyn Store>> {
    create(url, opts)
}

#[cfg(test)]
mod tests {
    use super::is_url;

    #[test]
    fn urls() {
        let all = [
            ("s3://b/p", true),
            ("file:///p", true),
            ("folder", false),
            ("-", false),
            ("://", false),
            ("a/b://c", false),
        ];
        for (text, yes) in all {
            assert_eq!(is_url(text), yes, "{text}");
        }
    }
}
