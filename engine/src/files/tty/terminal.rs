//! What ioctl_tty(2) reads and sets of a terminal, in the form that images have.
//!
//! The kernel's `struct termios` is four words of flags, the line discipline, and 19 control characters. CRIU writes the
//! characters four to a word, into a list of 19 words of which five count.

use std::os::fd::BorrowedFd;

use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use standstill_images::proto::{TermiosEntry, WinsizeEntry};

use crate::error::{Call, Error, Result};
use crate::sys::calls;

/// Size of the kernel's `struct termios`.
const TERMIOS: usize = 36;
/// Control characters in it.
const NCCS: usize = 19;

const TCGETS: u64 = 0x5401;
pub(super) const TCSETS: u64 = 0x5402;
const TIOCEXCL: u64 = 0x540c;
const TIOCGPGRP: u64 = 0x540f;
pub(super) const TIOCSPGRP: u64 = 0x5410;
pub(super) const TIOCSCTTY: u64 = 0x540e;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCSWINSZ: u64 = 0x5414;
pub(super) const TIOCPKT: u64 = 0x5420;
const TIOCGSID: u64 = 0x5429;
const TIOCGLCKTRMIOS: u64 = 0x5456;
const TIOCSLCKTRMIOS: u64 = 0x5457;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPKT: u64 = 0x8004_5438;
const TIOCGPTLCK: u64 = 0x8004_5439;
const TIOCGEXCL: u64 = 0x8004_5440;

/// Asks for one int; a terminal for which the question makes no sense answers 0.
fn int(tty: BorrowedFd<'_>, call: &'static str, request: u64) -> Result<i32> {
    let mut answer = [0; 4];
    match calls::ioctl(tty, call, request, &mut answer) {
        Ok(_) => Ok(i32::from_ne_bytes(answer)),
        Err(e) if e.errno() == libc::ENOTTY => Ok(0),
        Err(e) => Err(e),
    }
}

/// Session that the pair belongs to, by its master; 0 for none.
pub(super) fn session(master: BorrowedFd<'_>) -> Result<i32> {
    int(master, "ioctl(TIOCGSID)", TIOCGSID)
}

/// Foreground group of the pair, by its master; 0 for none.
pub(super) fn foreground(master: BorrowedFd<'_>) -> Result<i32> {
    int(master, "ioctl(TIOCGPGRP)", TIOCGPGRP)
}

/// Nobody else may open it (TIOCEXCL).
pub(super) fn exclusive(tty: BorrowedFd<'_>) -> Result<bool> {
    Ok(int(tty, "ioctl(TIOCGEXCL)", TIOCGEXCL)? != 0)
}

/// The master reads a byte of state before each packet.
pub(super) fn packet_mode(tty: BorrowedFd<'_>) -> Result<bool> {
    Ok(int(tty, "ioctl(TIOCGPKT)", TIOCGPKT)? != 0)
}

/// The slave cannot be opened yet.
pub(super) fn locked(tty: BorrowedFd<'_>) -> Result<bool> {
    Ok(int(tty, "ioctl(TIOCGPTLCK)", TIOCGPTLCK)? != 0)
}

/// Number of the pair, by its master.
pub(super) fn index(master: BorrowedFd<'_>) -> Result<u32> {
    let mut answer = [0; 4];
    calls::ioctl(master, "ioctl(TIOCGPTN)", TIOCGPTN, &mut answer)?;
    Ok(u32::from_ne_bytes(answer))
}

/// The device of the terminal itself, whatever name it was opened by (TIOCGDEV).
pub(super) fn device(tty: BorrowedFd<'_>) -> Result<u64> {
    const TIOCGDEV: u64 = 0x8004_5432;
    let mut answer = [0; 4];
    calls::ioctl(tty, "ioctl(TIOCGDEV)", TIOCGDEV, &mut answer)?;
    Ok(u64::from(u32::from_ne_bytes(answer)))
}

/// Sets or clears the lock.
pub(super) fn lock(master: BorrowedFd<'_>, locked: bool) -> Result<()> {
    calls::ioctl(master, "ioctl(TIOCSPTLCK)", TIOCSPTLCK, &mut i32::from(locked).to_ne_bytes()).map(drop)
}

/// Turns packet mode on.
pub(super) fn set_packet_mode(master: BorrowedFd<'_>) -> Result<()> {
    calls::ioctl(master, "ioctl(TIOCPKT)", TIOCPKT, &mut 1i32.to_ne_bytes()).map(drop)
}

/// Lets nobody else open it.
pub(super) fn set_exclusive(tty: BorrowedFd<'_>) -> Result<()> {
    calls::ioctl_value(tty, "ioctl(TIOCEXCL)", TIOCEXCL, 0).map(drop)
}

/// Modes; none if the terminal was hung up, after which it answers nothing but EIO.
pub(super) fn modes(tty: BorrowedFd<'_>) -> Result<Option<TermiosEntry>> {
    let mut raw = [0; TERMIOS];
    match calls::ioctl(tty, "ioctl(TCGETS)", TCGETS, &mut raw) {
        Ok(_) => Ok(Some(decode(&raw))),
        Err(e) if e.errno() == libc::EIO => Ok(None),
        Err(e) => Err(e),
    }
}

/// Which modes cannot be changed.
pub(super) fn locked_modes(tty: BorrowedFd<'_>) -> Result<TermiosEntry> {
    let mut raw = [0; TERMIOS];
    calls::ioctl(tty, "ioctl(TIOCGLCKTRMIOS)", TIOCGLCKTRMIOS, &mut raw)?;
    Ok(decode(&raw))
}

/// Size of the window.
pub(super) fn window(tty: BorrowedFd<'_>) -> Result<WinsizeEntry> {
    let mut raw = [0; 8];
    calls::ioctl(tty, "ioctl(TIOCGWINSZ)", TIOCGWINSZ, &mut raw)?;
    let at = |i: usize| u32::from(u16::from_ne_bytes([raw[i], raw[i + 1]]));
    Ok(WinsizeEntry { ws_row: at(0), ws_col: at(2), ws_xpixel: at(4), ws_ypixel: at(6) })
}

/// Sets modes.
pub(super) fn set_modes(tty: BorrowedFd<'_>, modes: &TermiosEntry) -> Result<()> {
    let mut raw = encode(modes)?;
    unstopped(|| calls::ioctl(tty, "ioctl(TCSETS)", TCSETS, &mut raw).map(drop))
}

/// Modes that pass every byte as it is.
pub(super) fn raw_modes() -> TermiosEntry {
    let mut cc = [0u32; NCCS];
    // VTIME 0, VMIN 1: the sixth and seventh of the characters
    cc[1] = u32::from_le_bytes([0, 0, 1, 0]);
    TermiosEntry { c_cflag: libc::CS8 | libc::CREAD | libc::B38400, c_cc: cc.to_vec(), ..Default::default() }
}

/// Modes as the kernel has them that pass every byte as it is; all else stays, flow control too: to switch it off would
/// start what was stopped.
pub(super) fn all_bytes(modes: &TermiosEntry) -> Result<[u8; TERMIOS]> {
    let mut raw = encode(&TermiosEntry { c_lflag: 0, ..quiet(modes) })?;
    // VTIME and VMIN
    (raw[17 + 5], raw[17 + 6]) = (0, 1);
    Ok(raw)
}

/// The same, but lines end where they end with `modes`.
pub(super) fn lines_alone(modes: &TermiosEntry) -> Result<[u8; TERMIOS]> {
    if modes.c_lflag & libc::ICANON == 0 {
        return all_bytes(modes);
    }
    let mut raw = encode(&quiet(modes))?;
    // no character but those that end a line means anything
    for (n, c) in raw[17..].iter_mut().enumerate() {
        if n != libc::VEOL && n != libc::VEOL2 {
            *c = 0;
        }
    }
    Ok(raw)
}

fn quiet(modes: &TermiosEntry) -> TermiosEntry {
    let (c_iflag, c_lflag) = (modes.c_iflag & libc::IXON, modes.c_lflag & libc::ICANON);
    TermiosEntry { c_iflag, c_oflag: 0, c_lflag, ..modes.clone() }
}

/// Sets modes in which lines end where they end with `modes`, and nothing else happens to bytes.
pub(super) fn set_lines_alone(tty: BorrowedFd<'_>, modes: &TermiosEntry) -> Result<()> {
    let mut raw = lines_alone(modes)?;
    unstopped(|| calls::ioctl(tty, "ioctl(TCSETS)", TCSETS, &mut raw).map(drop))
}

/// Sets which modes cannot be changed. Only the machine's administrator may; what is so already needs no right.
pub(super) fn set_locked_modes(tty: BorrowedFd<'_>, modes: &TermiosEntry) -> Result<()> {
    let mut raw = encode(modes)?;
    match calls::ioctl(tty, "ioctl(TIOCSLCKTRMIOS)", TIOCSLCKTRMIOS, &mut raw) {
        Err(e) if e.errno() == libc::EPERM && encode(&locked_modes(tty)?)? == raw => Ok(()),
        other => other.map(drop),
    }
}

/// Sets the size of the window.
pub(super) fn set_window(tty: BorrowedFd<'_>, window: &WinsizeEntry) -> Result<()> {
    let mut raw = Vec::with_capacity(8);
    for n in [window.ws_row, window.ws_col, window.ws_xpixel, window.ws_ypixel] {
        let n = u16::try_from(n).map_err(|_| Error::lie("tty-info.img", format!("a window has a size of {n}")))?;
        raw.extend_from_slice(&n.to_ne_bytes());
    }
    unstopped(|| calls::ioctl(tty, "ioctl(TIOCSWINSZ)", TIOCSWINSZ, &mut raw).map(drop))
}

/// Runs `change` so that a change to our own terminal, made from the background, does not stop us (SIGTTOU).
fn unstopped<T>(change: impl FnOnce() -> Result<T>) -> Result<T> {
    let ttou = SigSet::from_iter([Signal::SIGTTOU]);
    let before = ttou.thread_swap_mask(SigmaskHow::SIG_BLOCK).call("pthread_sigmask")?;
    let result = change();
    before.thread_set_mask().call("pthread_sigmask")?;
    result
}

fn decode(raw: &[u8; TERMIOS]) -> TermiosEntry {
    let word = |i: usize| u32::from_ne_bytes([raw[i], raw[i + 1], raw[i + 2], raw[i + 3]]);
    let mut c_cc = vec![0; NCCS];
    for (i, byte) in raw[17..].iter().enumerate() {
        c_cc[i / 4] |= u32::from(*byte) << (8 * (i % 4));
    }
    TermiosEntry {
        c_iflag: word(0),
        c_oflag: word(4),
        c_cflag: word(8),
        c_lflag: word(12),
        c_line: raw[16].into(),
        c_ispeed: 0,
        c_ospeed: 0,
        c_cc,
    }
}

pub(super) fn encode(modes: &TermiosEntry) -> Result<[u8; TERMIOS]> {
    let lie = |what: &str| Error::lie("tty-info.img", format!("a terminal has {what}"));
    if modes.c_cc.len() < NCCS {
        return Err(lie("too few control characters"));
    }
    let mut raw = [0; TERMIOS];
    for (i, word) in [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag].into_iter().enumerate() {
        raw[4 * i..4 * i + 4].copy_from_slice(&word.to_ne_bytes());
    }
    raw[16] = u8::try_from(modes.c_line).map_err(|_| lie("an unknown line discipline"))?;
    for (to, from) in raw[17..].iter_mut().zip(modes.c_cc.iter().flat_map(|word| word.to_le_bytes())) {
        *to = from;
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_the_kernel_and_of_images_are_the_same() {
        let raw: [u8; TERMIOS] = std::array::from_fn(|i| i as u8 + 1);
        let entry = decode(&raw);
        assert_eq!(entry.c_cc.len(), NCCS);
        assert_eq!(entry.c_cc[0], 0x1514_1312);
        assert_eq!(encode(&entry).unwrap(), raw);
    }

    #[test]
    fn modes_of_criu_are_read() {
        // as in the fixture "sockets": what follows the 19 characters is what lay in memory
        let cc = [
            360_651_781,
            65540,
            1_708_817,
            370_609_938,
            0,
            0,
            0,
            0,
            3_863_436_592,
            21876,
            49,
            0,
            2_604_420_288,
            32694,
            1,
            2,
            3,
            4,
            5,
        ];
        let entry = TermiosEntry {
            c_iflag: 1280,
            c_oflag: 5,
            c_cflag: 191,
            c_lflag: 35377,
            c_cc: cc.to_vec(),
            ..Default::default()
        };
        let raw = encode(&entry).unwrap();
        // VEOF is ^D, VMIN 1
        assert_eq!((raw[17 + 4], raw[17 + 6]), (4, 1));
        assert!(encode(&TermiosEntry { c_cc: vec![0; 3], ..entry }).is_err());
    }
}
