//! Dump, then restore, of sockets that this very process holds.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};
use standstill_images::{Images, MemoryStore};

use super::*;
use crate::files::RestoreFiles;
use crate::options::Options;

fn socket(kind: SocketType) -> OwnedFd {
    net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

fn pair(kind: SocketType) -> (OwnedFd, OwnedFd) {
    net::socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

fn send(fd: &OwnedFd, text: &[u8]) {
    net::send(fd, text, SendFlags::DONTWAIT).unwrap();
}

fn recv(fd: impl AsFd) -> Vec<u8> {
    let mut buffer = vec![0; 4096];
    let (len, _) = net::recv(fd, &mut buffer[..], RecvFlags::DONTWAIT).unwrap();
    buffer.truncate(len);
    buffer
}

fn local(fd: impl AsFd) -> SocketAddrUnix {
    net::getsockname(fd).unwrap().try_into().unwrap()
}

fn remote(fd: impl AsFd) -> SocketAddrUnix {
    net::getpeername(fd).unwrap().unwrap().try_into().unwrap()
}

/// A folder of one test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("standstill-unix-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> SocketAddrUnix {
        SocketAddrUnix::new(self.0.join(name)).unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn bound(kind: SocketType, address: &SocketAddrUnix) -> OwnedFd {
    let fd = socket(kind);
    net::bind(&fd, address).unwrap();
    fd
}

fn connected(kind: SocketType, address: &SocketAddrUnix) -> OwnedFd {
    let fd = socket(kind);
    net::connect(&fd, address).unwrap();
    fd
}

/// The file ids of what was dumped, in the order given.
fn try_dump(opts: &Options, images: &Images, fds: &[&OwnedFd]) -> Result<Vec<u32>> {
    let me = std::process::id() as i32;
    let pidfd = calls::pidfd_open(me, 0)?;
    let mut cx = DumpFiles::new(opts, images, vec![me], 1);
    let mut ids = Vec::new();
    for fd in fds {
        let d = Descriptor::read(me, pidfd.as_fd(), fd.as_raw_fd(), &mut Vec::new())?;
        ids.push(cx.descriptor(&d)?.id);
    }
    cx.finish()?;
    Ok(ids)
}

/// Dumps these, closes them, and makes them again.
fn again<const N: usize>(fds: [OwnedFd; N]) -> [OwnedFd; N] {
    let (opts, images) = (Options::default(), Images::new(MemoryStore::new()));
    let ids = try_dump(&opts, &images, &fds.each_ref()).unwrap();
    drop(fds);
    let mut made = super::super::once_free(|| {
        let mut cx = RestoreFiles::read(&opts, &images)?;
        let mut made: BTreeMap<u32, OwnedFd> = BTreeMap::new();
        for id in &ids {
            made.insert(*id, cx.open(*id)?.try_clone_to_owned().unwrap());
        }
        Ok(made)
    });
    std::array::from_fn(|n| made.remove(&ids[n]).unwrap())
}

fn status(fd: BorrowedFd<'_>) -> rustix::fs::OFlags {
    rustix::fs::fcntl_getfl(fd).unwrap()
}

#[test]
fn a_pair_with_data_both_ways() {
    for kind in [SocketType::STREAM, SocketType::DGRAM, SocketType::SEQPACKET] {
        let (a, b) = pair(kind);
        send(&a, b"to b");
        send(&a, b" and more");
        send(&b, b"to a");
        rustix::fs::fcntl_setfl(&b, rustix::fs::OFlags::NONBLOCK).unwrap();
        let [a, b] = again([a, b]);
        assert!(!status(a.as_fd()).contains(rustix::fs::OFlags::NONBLOCK));
        assert!(status(b.as_fd()).contains(rustix::fs::OFlags::NONBLOCK));
        if kind == SocketType::STREAM {
            assert_eq!(recv(&b), b"to b and more");
        } else {
            assert_eq!((recv(&b), recv(&b)), (b"to b".to_vec(), b" and more".to_vec()));
        }
        assert_eq!(recv(&a), b"to a");
        send(&a, b"alive");
        assert_eq!(recv(&b), b"alive");
    }
}

#[test]
fn descriptors_in_flight() {
    use std::io::Read;
    let (a, b) = pair(SocketType::STREAM);
    let (reader, writer) = pair(SocketType::STREAM);
    send(&writer, b"inside");
    let message = [reader, a.try_clone().unwrap()];
    queue::send(a.as_fd(), true, b"x", &message).unwrap();
    drop(message);
    let [a, b, writer] = again([a, b, writer]);
    let got = queue::peek(b.as_fd(), true, false, None).unwrap().remove(0);
    assert_eq!((got.bytes.as_slice(), got.rights.len()), (&b"x"[..], 2));
    send(&writer, b" and on");
    let mut text = vec![0; 13];
    std::os::unix::net::UnixStream::from(got.rights[0].try_clone().unwrap()).read_exact(&mut text).unwrap();
    assert_eq!(text, b"inside and on");
    send(&got.rights[1], b"through the copy");
    drop(a);
    assert_eq!(recv(&b), b"x");
    assert_eq!(recv(&b), b"through the copy");
}

#[test]
fn half_closed_and_severed() {
    let (a, b) = pair(SocketType::STREAM);
    send(&a, b"last words");
    net::shutdown(&a, Shutdown::Write).unwrap();
    let [a, b] = again([a, b]);
    assert_eq!((recv(&b), recv(&b)), (b"last words".to_vec(), Vec::new()));
    assert!(net::send(&a, b"x", SendFlags::NOSIGNAL).is_err());
    send(&b, b"the other way");
    assert_eq!(recv(&a), b"the other way");

    for kind in [SocketType::STREAM, SocketType::SEQPACKET, SocketType::DGRAM] {
        let (a, b) = pair(kind);
        send(&a, b"one");
        send(&a, b"two");
        drop(a);
        let [b] = again([b]);
        match kind {
            SocketType::STREAM => assert_eq!(recv(&b), b"onetwo"),
            _ => assert_eq!((recv(&b), recv(&b)), (b"one".to_vec(), b"two".to_vec())),
        }
        match kind {
            SocketType::DGRAM => {
                assert_eq!(net::send(&b, b"x", SendFlags::NOSIGNAL), Err(rustix::io::Errno::CONNREFUSED))
            }
            _ => assert!(recv(&b).is_empty()),
        }
    }
}

#[test]
fn listening_accepted_and_waiting() {
    for kind in [SocketType::STREAM, SocketType::SEQPACKET] {
        for name in [None, Some(format!("standstill-test-{}-{}", kind.as_raw(), std::process::id()))] {
            let folder = Folder::new("listen");
            let address = name
                .as_ref()
                .map_or_else(|| folder.path("l"), |n| SocketAddrUnix::new_abstract_name(n.as_bytes()).unwrap());
            let listening = bound(kind, &address);
            net::listen(&listening, 7).unwrap();
            if name.is_none() {
                std::fs::set_permissions(folder.0.join("l"), std::os::unix::fs::PermissionsExt::from_mode(0o640))
                    .unwrap();
            }
            let client = connected(kind, &address);
            let server = net::accept(&listening).unwrap();
            send(&client, b"hello");
            let waiting = connected(kind, &address);
            let [listening, client, server, waiting] = again([listening, client, server, waiting]);
            assert_eq!(recv(&server), b"hello");
            assert_eq!((local(&server), remote(&client)), (address.clone(), address.clone()));
            let late = net::accept(&listening).unwrap();
            send(&waiting, b"at last");
            assert_eq!(recv(&late), b"at last");
            let more = connected(kind, &address);
            drop((net::accept(&listening).unwrap(), more));
            if name.is_none() {
                let mode = rustix::fs::stat(folder.0.join("l")).unwrap().st_mode;
                assert_eq!(mode & 0o7777, 0o640);
            }
        }
    }
}

#[test]
fn accepted_from_one_that_is_gone() {
    let folder = Folder::new("gone");
    let address = folder.path("l");
    let listening = bound(SocketType::STREAM, &address);
    net::listen(&listening, 7).unwrap();
    let own = folder.path("own");
    let client = bound(SocketType::STREAM, &own);
    net::connect(&client, &address).unwrap();
    let first = net::accept(&listening).unwrap();
    let other = connected(SocketType::STREAM, &address);
    let second = net::accept(&listening).unwrap();
    drop(listening);
    std::fs::remove_file(folder.0.join("l")).unwrap();
    std::fs::write(folder.0.join("l"), "another file").unwrap();
    let [client, first, other, second] = again([client, first, other, second]);
    assert_eq!((local(&first), local(&second), local(&client)), (address.clone(), address.clone(), own.clone()));
    assert_eq!((remote(&first), remote(&other)), (own, address));
    send(&other, b"x");
    assert_eq!(recv(&second), b"x");
    assert_eq!(std::fs::read(folder.0.join("l")).unwrap(), b"another file");
}

#[test]
fn datagrams_by_name() {
    let folder = Folder::new("dgram");
    let abstracted =
        SocketAddrUnix::new_abstract_name(format!("standstill-dgram-{}", std::process::id()).as_bytes()).unwrap();
    let (middle, end) = (bound(SocketType::DGRAM, &folder.path("middle")), bound(SocketType::DGRAM, &abstracted));
    // one that is bound where nothing is any more, with something to read from nobody who is left
    let removed = bound(SocketType::DGRAM, &folder.path("removed"));
    let passing = connected(SocketType::DGRAM, &folder.path("removed"));
    send(&passing, b"from one that left");
    drop(passing);
    std::fs::remove_file(folder.0.join("removed")).unwrap();
    let first = connected(SocketType::DGRAM, &folder.path("middle"));
    send(&first, b"one");
    send(&first, b"two");
    net::connect(&middle, &abstracted).unwrap();
    send(&middle, b"on");
    let [first, middle, end, removed] = again([first, middle, end, removed]);
    assert_eq!((recv(&middle), recv(&middle), recv(&end)), (b"one".to_vec(), b"two".to_vec(), b"on".to_vec()));
    assert_eq!(recv(&removed), b"from one that left");
    assert_eq!(local(&removed), folder.path("removed"));
    assert!(!folder.0.join("removed").exists());
    assert_eq!(remote(&first), folder.path("middle"));
    send(&middle, b"again");
    assert_eq!(recv(&end), b"again");
}

#[test]
fn a_relative_path_and_one_connected_to_itself() {
    let folder = Folder::new("relative");
    let address = SocketAddrUnix::new("below/sock").unwrap();
    std::fs::create_dir(folder.0.join("below")).unwrap();
    let (a, there) = (socket(SocketType::DGRAM), folder.0.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_FS).unwrap();
            std::env::set_current_dir(there).unwrap();
            net::bind(&a, &address).unwrap();
            net::connect(&a, &address).unwrap();
        });
    });
    send(&a, b"to myself");
    let [a] = again([a]);
    assert_eq!((local(&a), remote(&a)), (address.clone(), address));
    assert_eq!(recv(&a), b"to myself");
    assert!(folder.0.join("below/sock").exists());
}

#[test]
fn peers_outside_the_tree() {
    let folder = Folder::new("outside");
    let outside = bound(SocketType::DGRAM, &folder.path("outside"));
    let inside = connected(SocketType::DGRAM, &folder.path("outside"));
    let (half, _other) = pair(SocketType::STREAM);
    let (mut opts, images) = (Options::default(), Images::new(MemoryStore::new()));
    let refused = |opts: &Options, fd| {
        matches!(try_dump(opts, &Images::new(MemoryStore::new()), &[fd]), Err(Error::Refused { .. }))
    };
    assert!(refused(&opts, &inside) && refused(&opts, &half));
    opts.ext_unix_sk = true;
    assert!(refused(&opts, &half));
    let ids = try_dump(&opts, &images, &[&inside]).unwrap();
    drop(inside);
    let mut cx = RestoreFiles::read(&opts, &images).unwrap();
    net::send(cx.open(ids[0]).unwrap(), b"from inside", SendFlags::empty()).unwrap();
    assert_eq!(recv(&outside), b"from inside");
    opts.ext_unix_sk = false;
    let mut cx = RestoreFiles::read(&opts, &images).unwrap();
    assert!(cx.open(ids[0]).is_err());
}

#[test]
fn peers_come_first() {
    let socket = |ino, peer| {
        let usk = UnixSkEntry { ino, peer, opts: options::unknown(), fown: no_owner(), ..UnixSkEntry::default() };
        FileEntry { id: ino, usk: Some(usk), ..FileEntry::default() }
    };
    let order = |peers: &[(u32, u32)]| -> Vec<u32> {
        let entries = peers.iter().map(|&(ino, peer)| socket(ino, peer)).collect();
        peers_first(entries).iter().map(|e| e.id).collect()
    };
    // a chain, a pair, one that sends to itself, a ring, one whose peer is not there
    assert_eq!(order(&[(1, 2), (2, 3), (3, 0)]), [3, 2, 1]);
    assert_eq!(order(&[(1, 2), (2, 1), (3, 2)]), [1, 2, 3]);
    assert_eq!(order(&[(1, 1), (2, 9)]), [1, 2]);
    let mut ring = order(&[(1, 2), (2, 3), (3, 1)]);
    ring.sort_unstable();
    assert_eq!(ring, [1, 2, 3]);
}
