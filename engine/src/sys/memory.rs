//! Memory of other tasks, and memory that a task and the engine share.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use crate::error::{Call, Error, Result};

/// Opens `/proc/PID/mem` for writing: it writes read-only pages too, as a debugger does.
pub fn open_memory(pid: i32) -> Result<File> {
    File::options().read(true).write(true).open(format!("/proc/{pid}/mem")).call("open(/proc/PID/mem)")
}

/// Reads `buf.len()` bytes at `address` of a task.
pub fn read_at(mem: &File, address: u64, buf: &mut [u8]) -> Result<()> {
    mem.read_exact_at(buf, address).call("read(/proc/PID/mem)")
}

/// Writes to a task's memory.
pub fn write_at(mem: &File, address: u64, buf: &[u8]) -> Result<()> {
    mem.write_all_at(buf, address).call("write(/proc/PID/mem)")
}

/// process_vm_readv(2) of one range; how many bytes could be read.
pub fn read_remote(pid: i32, address: u64, buf: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote = libc::iovec { iov_base: address as *mut _, iov_len: buf.len() };
    // SAFETY: `local` is `buf`; the kernel checks the remote side.
    let n = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
    usize::try_from(n).map_err(|_| Error::last("process_vm_readv"))
}

/// process_vm_readv(2) of many ranges into one buffer, in order; how many bytes could be read.
pub fn read_remote_ranges(pid: i32, ranges: &[(u64, usize)], buf: &mut [u8]) -> Result<usize> {
    let local = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let remote: Vec<_> = ranges.iter().map(|&(a, n)| libc::iovec { iov_base: a as *mut _, iov_len: n }).collect();
    // SAFETY: `local` is `buf`; the kernel checks the remote side.
    let n =
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, remote.as_ptr(), remote.len() as libc::c_ulong, 0) };
    usize::try_from(n).map_err(|_| Error::last("process_vm_readv"))
}

/// process_vm_writev(2): writes all of `bytes` at `address` of a task, where that is writable.
pub fn write_remote(pid: i32, address: u64, bytes: &[u8]) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let local = libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (address + done as u64) as *mut _, iov_len: rest.len() };
        // SAFETY: `local` is `rest`, which is only read; the kernel checks the remote side.
        let n = unsafe { libc::process_vm_writev(pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(n) {
            Ok(n) if n > 0 => done += n,
            _ => return Err(Error::last("process_vm_writev")),
        }
    }
    Ok(())
}

/// Memory that this process shares with others; unmapped when dropped.
#[derive(Debug)]
pub struct Shared {
    at: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only reached through raw copies and atomics.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps `len` bytes of `fd` from `offset`, for reading and writing.
    pub fn map(fd: BorrowedFd<'_>, offset: u64, len: usize) -> Result<Shared> {
        // SAFETY: a new mapping at a place of the kernel's choice touches nothing that exists.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        NonNull::new(p.cast()).map(|at| Shared { at, len }).ok_or(Error::Gone)
    }

    /// New anonymous shared memory of `len` bytes.
    pub fn anonymous(len: usize) -> Result<Shared> {
        // SAFETY: as in `map`.
        let p = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(Error::last("mmap"));
        }
        NonNull::new(p.cast()).map(|at| Shared { at, len }).ok_or(Error::Gone)
    }

    /// Asks for all of its pages from `offset` on at once, which costs less than a fault for each (MADV_POPULATE_WRITE, kernel
    /// 5.14). Where that does not work they come one by one.
    pub fn populate(&self, offset: usize) {
        const MADV_POPULATE_WRITE: libc::c_int = 23;
        let from = offset.next_multiple_of(4096).min(self.len);
        // SAFETY: the range is in the mapping; nothing in it changes.
        unsafe { libc::madvise(self.at.as_ptr().add(from).cast(), self.len - from, MADV_POPULATE_WRITE) };
    }

    /// Bytes mapped.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True for a mapping of no bytes, which cannot exist.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Our address of it.
    pub fn address(&self) -> usize {
        self.at.as_ptr() as usize
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "write past the shared memory");
        // SAFETY: the range was checked; raw copies make no references, so a concurrent writer is no aliasing.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at.as_ptr().add(offset), bytes.len()) }
    }

    /// Copies from `offset` into `bytes`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "read past the shared memory");
        // SAFETY: as in `write`.
        unsafe { std::ptr::copy_nonoverlapping(self.at.as_ptr().add(offset), bytes.as_mut_ptr(), bytes.len()) }
    }

    /// A structure that both sides use through atomics only.
    ///
    /// # Panics
    /// When it does not lie within the memory or is not aligned.
    pub fn at<T: SharedPart>(&self, offset: usize) -> &T {
        assert!(
            offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.len),
            "structure past the shared memory"
        );
        assert_eq!((self.address() + offset) % align_of::<T>(), 0, "structure not aligned");
        // SAFETY: in bounds and aligned; T is made of integers and atomics, for which every bit pattern is good.
        unsafe { &*self.at.as_ptr().add(offset).cast() }
    }
}

/// Structures of the plan language that lie in shared memory.
pub trait SharedPart {}
/// One word.
#[repr(transparent)]
#[derive(Debug)]
pub struct SharedWord(pub std::sync::atomic::AtomicU32);
impl SharedPart for SharedWord {}
impl SharedPart for standstill_restorer::plan::Control {}
impl SharedPart for standstill_restorer::plan::Arena {}
impl SharedPart for standstill_restorer::plan::Guard {}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: nobody can have a reference into it any more: `at` borrows self.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

/// A plain structure as bytes.
pub fn bytes_of<T: Copy>(value: &T) -> &[u8] {
    // SAFETY: used with repr(C) structures without padding only (their sizes are asserted in the restorer crate).
    unsafe { std::slice::from_raw_parts((value as *const T).cast(), size_of::<T>()) }
}
