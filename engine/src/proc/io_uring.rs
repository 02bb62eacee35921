//! The io_uring part of `/proc/PID/fdinfo/N`.
//!
//! The kernel prints the tables (buffers, files, pending work) only if it can take the ring's lock at once: for a ring
//! whose thread is at work it leaves them out. A stopped task's rings are not at work, unless they have an SQPOLL thread.
//! What is printed has changed with the kernels; lines that this program does not know are kept in [`IoUring::other`].
//!
//! Man page: io_uring_setup(2); source of truth: what `fdinfo` of the running kernel says.

use super::{split_once, unescape_octal, ParseError, Place, Words};

/// A completed request that found no room in the ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OverflowedCqe {
    /// What the program gave with the request.
    pub user_data: u64,
    /// Result.
    pub res: i32,
    /// IORING_CQE_F_.
    pub flags: u32,
}

/// A ring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoUring {
    /// Entries of the submission queue, less one.
    pub sq_mask: u32,
    /// Head of the submission queue, as the ring has it.
    pub sq_head: u32,
    /// Tail of it.
    pub sq_tail: u32,
    /// Head, as the kernel has it.
    pub cached_sq_head: u32,
    /// Entries of the completion queue, less one.
    pub cq_mask: u32,
    /// Head of the completion queue.
    pub cq_head: u32,
    /// Tail of it.
    pub cq_tail: u32,
    /// Tail, as the kernel has it.
    pub cached_cq_tail: u32,
    /// Submitted and not taken, one line each as printed.
    pub sqes: Vec<Vec<u8>>,
    /// Completed and not taken, one line each as printed.
    pub cqes: Vec<Vec<u8>>,
    /// Thread that polls for submissions, or -1.
    pub sq_thread: i32,
    /// Its CPU, or -1.
    pub sq_thread_cpu: i32,
    /// Number of registered files; none if the kernel could not say.
    pub user_files: Option<u32>,
    /// Those that there are: slot and path (before 6.x only its last part).
    pub files: Vec<(u32, Vec<u8>)>,
    /// Number of registered buffers; none if the kernel could not say.
    pub user_bufs: Option<u32>,
    /// Those that there are: slot, address, length.
    pub bufs: Vec<(u32, u64, u64)>,
    /// Registered credentials (lines as printed).
    pub personalities: Vec<Vec<u8>>,
    /// Requests that wait in poll, one line each as printed.
    pub poll_list: Vec<Vec<u8>>,
    /// Completed requests that found no room.
    pub cq_overflow: Vec<OverflowedCqe>,
    /// Busy polling of network devices is on.
    pub napi: bool,
    /// Keys and values that this program does not know.
    pub other: Vec<(Vec<u8>, Vec<u8>)>,
    section: Section,
}

/// The list that indented lines belong to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Section {
    #[default]
    None,
    Sqes,
    Cqes,
    Files,
    Bufs,
    Personalities,
    Poll,
    Overflow,
}

impl IoUring {
    /// Nothing pending, nothing registered, as far as the kernel says. It does not print requests that its workers carry
    /// out, nor (6.18) registered credentials: this is a reason to refuse when false, and no proof when true.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.sq_head == self.sq_tail
            && self.cq_head == self.cq_tail
            && self.cached_sq_head == self.sq_head
            && self.cached_cq_tail == self.cq_tail
            && self.user_files == Some(0)
            && self.user_bufs == Some(0)
            && self.personalities.is_empty()
            && self.poll_list.is_empty()
            && self.cq_overflow.is_empty()
    }

    /// A thread polls for submissions, and there are some that it has not taken.
    #[must_use]
    pub fn is_polled_for(&self) -> bool {
        self.sq_thread > 0 && self.sq_head != self.sq_tail
    }

    /// How many requests were completed, as far as it shows.
    #[must_use]
    pub fn completed(&self) -> (u32, usize) {
        (self.cached_cq_tail, self.cq_overflow.len())
    }

    /// Takes one line. Lists follow their key on lines that begin with space.
    pub(super) fn line(&mut self, at: Place, line: &[u8]) -> Result<(), ParseError> {
        // behind a large completion
        if line.is_empty() {
            return Ok(());
        }
        if line.first().is_some_and(u8::is_ascii_whitespace) {
            return self.item(at, line);
        }
        let (key, value) = split_once(line, b':').ok_or_else(|| at.malformed("a line of an io_uring"))?;
        self.section = Section::None;
        match key {
            b"SqMask" => self.sq_mask = at.uint(value, 16, "SqMask")?,
            b"SqHead" => self.sq_head = at.uint(value, 10, "SqHead")?,
            b"SqTail" => self.sq_tail = at.uint(value, 10, "SqTail")?,
            b"CachedSqHead" => self.cached_sq_head = at.uint(value, 10, "CachedSqHead")?,
            b"CqMask" => self.cq_mask = at.uint(value, 16, "CqMask")?,
            b"CqHead" => self.cq_head = at.uint(value, 10, "CqHead")?,
            b"CqTail" => self.cq_tail = at.uint(value, 10, "CqTail")?,
            b"CachedCqTail" => self.cached_cq_tail = at.uint(value, 10, "CachedCqTail")?,
            b"SqThread" => self.sq_thread = at.int(value, "SqThread")?,
            b"SqThreadCpu" => self.sq_thread_cpu = at.int(value, "SqThreadCpu")?,
            b"SQEs" => self.section = Section::Sqes,
            b"CQEs" => self.section = Section::Cqes,
            b"UserFiles" => {
                self.user_files = Some(at.uint(value, 10, "UserFiles")?);
                self.section = Section::Files;
            }
            b"UserBufs" => {
                self.user_bufs = Some(at.uint(value, 10, "UserBufs")?);
                self.section = Section::Bufs;
            }
            b"Personalities" => self.section = Section::Personalities,
            b"PollList" => self.section = Section::Poll,
            b"CqOverflowList" => self.section = Section::Overflow,
            b"NAPI" => self.napi = value.trim_ascii() != b"disabled",
            _ => self.other.push((key.to_vec(), value.trim_ascii().to_vec())),
        }
        Ok(())
    }

    fn item(&mut self, at: Place, line: &[u8]) -> Result<(), ParseError> {
        let text = line.trim_ascii();
        match self.section {
            Section::None => return Err(at.malformed("a line of an io_uring")),
            Section::Sqes => self.sqes.push(text.to_vec()),
            Section::Cqes => self.cqes.push(text.to_vec()),
            Section::Personalities => self.personalities.push(text.to_vec()),
            Section::Poll => self.poll_list.push(text.to_vec()),
            Section::Files => {
                let (slot, path) = split_once(text, b':').ok_or_else(|| at.malformed("UserFiles"))?;
                let path = path.trim_ascii_start();
                if path != b"<none>" {
                    self.files.push((at.uint(slot, 10, "UserFiles")?, unescape_octal(path)));
                }
            }
            Section::Bufs => {
                let (slot, place) = split_once(text, b':').ok_or_else(|| at.malformed("UserBufs"))?;
                if place.trim_ascii() != b"<none>" {
                    let (address, length) = split_once(place, b'/').ok_or_else(|| at.malformed("UserBufs"))?;
                    let slot = at.uint(slot, 10, "UserBufs")?;
                    self.bufs.push((slot, at.uint(address, 16, "UserBufs")?, at.uint(length, 10, "UserBufs")?));
                }
            }
            Section::Overflow => self.cq_overflow.push(overflowed(at, text)?),
        }
        Ok(())
    }
}

/// `user_data=7, res=-11, flags=0`.
fn overflowed(at: Place, text: &[u8]) -> Result<OverflowedCqe, ParseError> {
    const FIELD: &str = "CqOverflowList";
    let mut words = Words::new(text);
    let mut next = |key: &[u8]| {
        let word = words.next().unwrap_or_default();
        let word = word.strip_suffix(b",").unwrap_or(word);
        word.strip_prefix(key).ok_or_else(|| at.malformed(FIELD))
    };
    Ok(OverflowedCqe {
        user_data: at.uint(next(b"user_data=")?, 10, FIELD)?,
        res: at.int(next(b"res=")?, FIELD)?,
        flags: at.uint(next(b"flags=")?, 16, FIELD)?,
    })
}
