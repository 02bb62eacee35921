use std::os::fd::AsRawFd;

use nix::mount::{mount, MsFlags};
use nix::sched::{unshare, CloneFlags};
use rustix::fs::{fchmod, fchown, Gid, Uid};
use standstill_images::proto::WinsizeEntry;
use standstill_images::{Images, MemoryStore};

use super::super::testing::{dump, open};
use super::pair::make_master;
use super::*;
use crate::options::{External, InheritFd, Options};

/// Gives this thread a devpts of its own, so that numbers are free; false, and why, where that is not allowed.
fn own_devpts() -> bool {
    let none = None::<&str>;
    let done = unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
        .and_then(|()| mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none))
        .and_then(|()| {
            mount(Some("devpts"), "/dev/pts", Some("devpts"), MsFlags::empty(), Some("newinstance,ptmxmode=0666"))
        });
    if let Err(e) = done {
        eprintln!("skipped: no devpts for the test ({e})");
    }
    done.is_ok()
}

/// Pair `index`, its slave opened.
fn new_pair(index: u32) -> (OwnedFd, OwnedFd) {
    let master = make_master(index, libc::O_RDWR as u32, b"/dev/pts/ptmx", rustix::fs::CWD).unwrap();
    terminal::lock(master.as_fd(), false).unwrap();
    let slave = calls::open_pty_peer(master.as_fd(), (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as u32).unwrap();
    (master, slave)
}

fn read_some(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = [0; 64];
    let n = rustix::io::read(fd, &mut bytes).unwrap();
    bytes[..n].to_vec()
}

#[test]
fn a_pair_comes_back_with_modes_and_window() {
    if !own_devpts() {
        return;
    }
    let (master, slave) = new_pair(2);
    let mut modes = terminal::modes(slave.as_fd()).unwrap().unwrap();
    modes.c_lflag &= !libc::ECHO;
    modes.c_cc[0] = 0x0102_0304;
    terminal::set_modes(slave.as_fd(), &modes).unwrap();
    let window = WinsizeEntry { ws_row: 41, ws_col: 137, ws_xpixel: 3, ws_ypixel: 4 };
    terminal::set_window(master.as_fd(), &window).unwrap();
    terminal::set_packet_mode(master.as_fd()).unwrap();
    fchmod(&slave, Mode::from_raw_mode(0o620)).unwrap();
    fchown(&slave, Some(Uid::from_raw(1234)), Some(Gid::from_raw(56))).unwrap();
    let again =
        rustix::fs::open(magic_link(slave.as_fd()), OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())
            .unwrap();
    let opts = Options::default();
    let (images, ids) = dump(&opts, &[&slave, &master, &again]).unwrap();
    drop((master, slave, again));

    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let (slave, master, again) = (open(&mut files, ids[0]), open(&mut files, ids[1]), open(&mut files, ids[2]));
    assert!(controlling(0, &mut files).unwrap().is_none());
    drop(files);
    assert_eq!(terminal::index(master.as_fd()).unwrap(), 2);
    assert_eq!(terminal::modes(slave.as_fd()).unwrap().unwrap(), modes);
    assert_eq!(terminal::window(slave.as_fd()).unwrap(), window);
    assert!(terminal::packet_mode(master.as_fd()).unwrap());
    assert!(!terminal::locked(master.as_fd()).unwrap());
    let stat = rustix::fs::fstat(&slave).unwrap();
    assert_eq!((stat.st_mode & 0o7777, stat.st_uid, stat.st_gid), (0o620, 1234, 56));
    assert_eq!(rustix::fs::readlink(magic_link(slave.as_fd()), Vec::new()).unwrap().to_bytes(), b"/dev/pts/2");
    assert!(rustix::fs::fcntl_getfl(&again).unwrap().contains(OFlags::NONBLOCK));
    rustix::io::write(&master, b"typed\n").unwrap();
    assert_eq!(read_some(&slave), b"typed\n");
}

#[test]
fn data_under_way_comes_back_from_an_image() {
    if !own_devpts() {
        return;
    }
    let (master, slave) = new_pair(0);
    let opts = Options::default();
    let (images, ids) = dump(&opts, &[&master, &slave]).unwrap();
    let data =
        [TtyDataEntry { tty_id: 1, data: b"out\r\n".to_vec() }, TtyDataEntry { tty_id: 0, data: b"in\n".to_vec() }];
    images.write_entries(ImageKind::TtyData, (), data).unwrap();
    drop((master, slave));
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let (master, slave) = (open(&mut files, ids[0]), open(&mut files, ids[1]));
    assert_eq!(read_some(&master), b"out\r\n");
    assert_eq!(read_some(&slave), b"in\n");
}

#[test]
fn a_slave_alone_needs_a_word_of_the_caller() {
    if !own_devpts() {
        return;
    }
    let (master, slave) = new_pair(0);
    let error = dump(&Options::default(), &[&slave]).unwrap_err().to_string();
    assert!(error.contains("Found slave peer index 0 without correspond master peer"), "{error}");
    let opts = Options { shell_job: true, ..Options::default() };
    let (images, ids) = dump(&opts, &[&slave]).unwrap();
    assert!(RestoreFiles::read(&Options::default(), &images).is_err(), "the restore needs the word as well");

    // Another terminal takes its place.
    let (_other, stand_in) = new_pair(1);
    terminal::set_window(master.as_fd(), &WinsizeEntry { ws_row: 5, ws_col: 6, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    let files = RestoreFiles::read(&opts, &images).unwrap();
    let entry = files.entry(ids[0]).unwrap().tty.unwrap();
    let info = info_of(entry.tty_info_id, &files).unwrap();
    let fd = inherited(&entry, &info, stand_in.as_raw_fd()).unwrap();
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_rdev, rustix::fs::fstat(&stand_in).unwrap().st_rdev);
    assert_eq!(terminal::modes(fd.as_fd()).unwrap(), info.termios);
    let (reader, _writer) = rustix::pipe::pipe().unwrap();
    let error = inherited(&entry, &info, reader.as_raw_fd()).unwrap_err().to_string();
    assert!(error.contains("Don't have tty to inherit session from"), "{error}");
}

#[test]
fn an_orphan_slave_gets_a_master_for_the_peer() {
    if !own_devpts() {
        return;
    }
    let (master, slave) = new_pair(3);
    let opts = Options { orphan_pts_master: true, ..Options::default() };
    let (images, ids) = dump(&opts, &[&slave]).unwrap();
    drop((master, slave));
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let slave = open(&mut files, ids[0]);
    rustix::io::write(&slave, b"x").unwrap();
    assert_eq!(read_some(&files.ttys.orphan_masters[0]), b"x");
}

#[test]
fn a_terminal_that_was_hung_up_is_so_again() {
    if !own_devpts() {
        return;
    }
    let (master, slave) = new_pair(0);
    drop(master);
    let opts = Options::default();
    let (images, ids) = dump(&opts, &[&slave]).unwrap();
    drop(slave);
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let slave = open(&mut files, ids[0]);
    assert_eq!(terminal::modes(slave.as_fd()).unwrap(), None);
    assert_eq!(rustix::io::read(&slave, &mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_number_that_is_taken_is_named() {
    if !own_devpts() {
        return;
    }
    let (_master, _slave) = new_pair(0);
    let error = make_master(0, libc::O_RDWR as u32, b"/dev/pts/ptmx", rustix::fs::CWD).unwrap_err();
    assert!(matches!(&error, Error::Changed { what } if what.contains("terminal 0 is in use")), "{error:?}");
}

#[test]
fn a_terminal_from_outside_is_what_the_caller_gives() {
    if !own_devpts() {
        return;
    }
    let (_master, slave) = new_pair(0);
    let stat = rustix::fs::fstat(&slave).unwrap();
    let key = external_key(stat.st_rdev, stat.st_dev);
    let opts = Options { external: vec![External { key: key.clone(), value: None }], ..Options::default() };
    let (images, ids) = dump(&opts, &[&slave]).unwrap();
    let (_other, given) = new_pair(1);
    let opts = Options { inherit_fds: vec![InheritFd { fd: given.as_raw_fd(), id: key }], ..Options::default() };
    let mut files = RestoreFiles::read(&opts, &images).unwrap();
    let fd = open(&mut files, ids[0]);
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_rdev, rustix::fs::fstat(&given).unwrap().st_rdev);
}

#[test]
fn lies_are_found() {
    let opts = Options::default();
    let info = |id| TtyInfoEntry {
        id,
        r#type: TtyType::Pty as i32,
        pty: Some(TtyPtyEntry { index: 0 }),
        ..Default::default()
    };
    let whole = |id| TtyInfoEntry { winsize: Some(WinsizeEntry::default()), ..info(id) };
    for infos in [vec![info(0), info(0)], vec![info(8)], vec![whole(0)], vec![TtyInfoEntry { pty: None, ..info(0) }]] {
        let images = Images::new(MemoryStore::new());
        images.write_entries(ImageKind::TtyInfo, (), infos).unwrap();
        assert!(matches!(RestoreFiles::read(&opts, &images), Err(Error::Lie { .. })));
    }
}
