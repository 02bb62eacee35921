//! Memory: areas, their pages, and what the vdso needs.

pub mod aio;
pub mod areas;
pub mod compress;
pub mod dedup;
pub mod drain;
pub mod fill;
pub mod late;
pub mod rebuild;
pub mod scan;
pub mod sysv;
pub mod track;
pub mod unpack;
pub mod vdso;

/// Bits of `vma_entry.status`: what an area is.
#[allow(missing_docs)]
pub mod status {
    pub const REGULAR: u32 = 1 << 0;
    pub const VSYSCALL: u32 = 1 << 2;
    pub const VDSO: u32 = 1 << 3;
    pub const HEAP: u32 = 1 << 5;
    pub const FILE_PRIVATE: u32 = 1 << 6;
    pub const FILE_SHARED: u32 = 1 << 7;
    pub const ANON_SHARED: u32 = 1 << 8;
    pub const ANON_PRIVATE: u32 = 1 << 9;
    pub const SYSVIPC: u32 = 1 << 10;
    pub const SOCKET: u32 = 1 << 11;
    pub const VVAR: u32 = 1 << 12;
    pub const AIORING: u32 = 1 << 13;
    pub const MEMFD: u32 = 1 << 14;
    pub const SHSTK: u32 = 1 << 15;
    pub const GUARD: u32 = 1 << 16;
    pub const UPROBES: u32 = 1 << 17;
    /// A ring of an io_uring; ours, which CRIU does not know.
    pub const IO_URING: u32 = 1 << 27;
}

/// Bits of `pagemap_entry.flags`.
#[allow(missing_docs)]
pub mod page {
    pub const PARENT: u32 = 1;
    pub const LAZY: u32 = 2;
    pub const PRESENT: u32 = 4;
}

/// How memory is written.
#[derive(Debug, Clone, Default)]
pub struct Writing {
    /// Packed in blocks of so many pages.
    pub packed: Option<u32>,
    /// Where pages go instead of into images.
    pub server: Option<std::sync::Arc<crate::transfer::client::Client>>,
    /// Who counts what is written.
    pub counter: crate::progress::Counter,
}

/// Bytes of a page on x86-64.
pub const PAGE: u64 = 4096;
