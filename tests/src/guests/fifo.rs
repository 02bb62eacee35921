//! Named pipes, with data in them.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use super::pipes::{read, write};
use super::support::*;

/// One that is open in two processes, one opened for both directions, one without a reader.
pub(super) fn fifo() {
    for name in [c"one", c"both"] {
        sys(unsafe { libc::mkfifo(name.as_ptr(), 0o600) });
    }
    let open = |name: &str, r, w| did(File::options().read(r).write(w).custom_flags(libc::O_NONBLOCK).open(name));
    let out = open("one", true, false);
    let into = open("one", false, true);
    let both = open("both", true, true);
    write(into.as_raw_fd(), b"in the fifo");
    write(both.as_raw_fd(), b"to myself");
    ready();
    check_eq!(read(out.as_raw_fd()), Ok(b"in the fifo".to_vec()));
    check_eq!(read(both.as_raw_fd()), Ok(b"to myself".to_vec()));
    write(into.as_raw_fd(), b"more");
    check_eq!(read(out.as_raw_fd()), Ok(b"more".to_vec()));
    check_eq!(read(out.as_raw_fd()), Err(libc::EAGAIN));
    // a newcomer meets the others
    let late = open("one", false, true);
    write(late.as_raw_fd(), b"late");
    check_eq!(read(out.as_raw_fd()), Ok(b"late".to_vec()));
}
