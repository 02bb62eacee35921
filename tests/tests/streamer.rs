//! `--stream`: a streamer of our own that keeps images in memory, and what becomes of dumps and restores when it fails.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

const LIMIT: Duration = Duration::from_secs(60);

type Images = BTreeMap<String, Vec<u8>>;

/// The next name, if there is one to come.
fn request(socket: &mut UnixStream) -> Option<String> {
    let mut size = [0; 4];
    socket.read_exact(&mut size).ok()?;
    let mut message = vec![0; usize::try_from(u32::from_le_bytes(size)).unwrap_or(0)];
    socket.read_exact(&mut message).unwrap_or_else(|e| panic!("half a request: {e}"));
    // field 1, a string
    let (head, name) = message.split_at(2);
    assert_eq!((head[0], usize::from(head[1])), (0x0a, name.len()), "{message:?}");
    Some(String::from_utf8_lossy(name).into_owned())
}

/// The end of a pipe that comes with one byte.
fn pipe(socket: &UnixStream) -> File {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0; 1];
    let got = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC);
    assert_eq!(got.map(|got| got.bytes), Ok(1));
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    assert_eq!(fds.len(), 1);
    fds.remove(0).into()
}

fn listen(folder: &Path, name: &str) -> UnixListener {
    std::fs::create_dir_all(folder).unwrap_or_else(|e| panic!("{e}"));
    let path = folder.join(name);
    let _ = std::fs::remove_file(&path);
    UnixListener::bind(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Takes the images of one dump, as many at a time as come. `reads`: how much of each is read before it is let go.
fn capture(folder: &Path, reads: u64) -> JoinHandle<Images> {
    let listener = listen(folder, "streamer-capture.sock");
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap_or_else(|e| panic!("{e}"));
        let images: Arc<Mutex<Images>> = Arc::default();
        let mut readers = Vec::new();
        while let Some(name) = request(&mut socket) {
            let (pipe, images) = (pipe(&socket), images.clone());
            readers.push(std::thread::spawn(move || {
                let mut bytes = Vec::new();
                pipe.take(reads).read_to_end(&mut bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
                let before = images.lock().unwrap_or_else(|e| panic!("{e}")).insert(name.clone(), bytes);
                assert!(before.is_none(), "{name} came twice");
            }));
        }
        for reader in readers {
            reader.join().unwrap_or_else(|_| panic!("a reader"));
        }
        Arc::into_inner(images).and_then(|images| images.into_inner().ok()).unwrap_or_default()
    })
}

/// Gives images to one restore, each once; how many were wanted. `writes`: how much of each is written.
fn serve(folder: &Path, mut images: Images, writes: usize) -> JoinHandle<usize> {
    let listener = listen(folder, "streamer-serve.sock");
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap_or_else(|e| panic!("{e}"));
        let mut given: Vec<String> = Vec::new();
        while let Some(name) = request(&mut socket) {
            assert!(!given.contains(&name), "{name} is wanted twice");
            let image = images.remove(&name);
            let answer: &[u8] = if image.is_some() { &[2, 0, 0, 0, 8, 1] } else { &[2, 0, 0, 0, 8, 0] };
            if socket.write_all(answer).is_err() {
                break;
            }
            let Some(image) = image else { continue };
            let mut pipe = pipe(&socket);
            // who is wrong with an image reads no more of it
            let _ = pipe.write_all(image.get(..writes).unwrap_or(&image));
            given.push(name);
        }
        given.len()
    })
}

const ALL: u64 = u64::MAX;
const WHOLE: usize = usize::MAX;

/// Dumps the guest through a streamer, and it is dead then. What came is also in the folder that is returned.
fn captured(run: &mut Run, engine: &Engine, more: &[&str]) -> Images {
    let folder = run.images("capture");
    let streamer = capture(&folder, ALL);
    run.look();
    let options = [run.options().0, &["--stream"], more].concat();
    if let Err(e) = engine.dump(run.pid, &folder, &options) {
        panic!("{e}");
    }
    let images = streamer.join().unwrap_or_else(|_| panic!("the streamer failed"));
    assert!(images.contains_key("inventory.img"));
    assert!(!folder.join("inventory.img").exists() && folder.join("stats-dump").exists());
    let there = run.images("there");
    std::fs::create_dir_all(&there).unwrap_or_else(|e| panic!("{e}"));
    for (name, bytes) in &images {
        std::fs::write(there.join(name), bytes).unwrap_or_else(|e| panic!("{e}"));
    }
    run.is_dumped(&there);
    images
}

/// Restores it through a streamer.
fn served(run: &mut Run, engine: &Engine, images: Images) {
    let folder = run.images("serve");
    let streamer = serve(&folder, images, WHOLE);
    run.restore_with(engine, &folder, &["--stream"]);
    assert!(streamer.join().is_ok_and(|given| given > 5), "the streamer failed");
}

fn both_ways(name: &str, from: &Engine, to: &Engine) {
    let mut run = Run::start(name);
    let images = captured(&mut run, from, &[]);
    served(&mut run, to, images);
    run.check(How::Restored);
}

macro_rules! streamed {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                both_ways(stringify!($name), &Engine::ours(), &Engine::ours());
            }
        )*
    };
}

streamed! {
    files_deleted
    memfd
    memory_cow
    memory_private
    mount_tmpfs
    packed_kinds
    pipes_full
    sysv
    tree
}

#[test]
fn with_criu() {
    let criu = match Engine::criu() {
        Ok(criu) => criu,
        Err(why) => return skip("streamer::with_criu", &why),
    };
    for name in ["memory_private", "pipes", "files_deleted", "tree", "threads"] {
        both_ways(name, &criu, &Engine::ours());
    }
    for name in ["memfd", "pipes", "files_deleted", "tree", "threads"] {
        both_ways(name, &Engine::ours(), &criu);
    }
}

/// Nobody there, or somebody who goes or stops: an error, and the guest goes on.
#[test]
fn a_streamer_that_fails_a_dump() {
    let mut run = Run::start("memory_large");
    let (engine, folder) = (Engine::ours(), run.images("capture"));
    let fails = |says: &str, more: &[&str]| {
        let options = [&["--stream"], more].concat();
        match engine.dump(run.pid, &folder, &options) {
            Ok(_) => panic!("it was dumped"),
            Err(e) => assert!(e.code == Some(1) && e.text.contains(says), "{e}"),
        }
    };
    fails("streamer-capture.sock", &[]);
    drop(listen(&folder, "streamer-capture.sock"));
    fails("Connection refused", &[]);
    let streamer = capture(&folder, 100);
    fails("Broken pipe", &[]);
    drop(streamer.join());
    let listener = listen(&folder, "streamer-capture.sock");
    fails("the other side did nothing for 2 s", &["--timeout", "2"]);
    drop(listener);
    run.check(How::Running);
}

/// An image that ends early, a streamer that goes or stops: an error, and nothing is left.
#[test]
fn a_streamer_that_fails_a_restore() {
    let mut run = Run::start("tree");
    let images = captured(&mut run, &Engine::ours(), &[]);
    let folder = run.images("serve");
    std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{e}"));
    let fails = |says: &str, more: &[&str]| {
        let mut command = Engine::ours().command("restore", &folder, &["--stream", "-d"]);
        let output = process::run(command.args(more), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert!(output.code == Some(1) && output.text.contains(says), "{says}: {output:?}");
    };
    fails("streamer-serve.sock", &[]);
    for (writes, lacks) in [(0, ""), (4, ""), (100, ""), (WHOLE, "pstree.img"), (WHOLE, "inventory.img")] {
        let mut some = images.clone();
        some.remove(lacks);
        let streamer = serve(&folder, some, writes);
        fails(if lacks.is_empty() { "image " } else { lacks }, &[]);
        assert!(streamer.join().is_ok(), "the streamer failed");
    }
    let listener = listen(&folder, "streamer-serve.sock");
    fails("the other side did nothing for 2 s", &["--timeout", "2"]);
    drop(listener);
    assert!(process::wait_gone(&run.tree, LIMIT).is_ok(), "something was started");
    served(&mut run, &Engine::ours(), images);
    run.check(How::Restored);
}

/// As CRIU: what cannot be streamed, and the stage before.
#[test]
fn options() {
    let mut run = Run::start("pipes");
    let images = run.images("images");
    std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let criu = run.folder.join("criu");
    std::os::unix::fs::symlink(Engine::ours().path(), &criu).unwrap_or_else(|e| panic!("{e}"));
    let output = process::run(std::process::Command::new(&criu).args(["check", "--stream"]), LIMIT);
    let output = output.unwrap_or_else(|e| panic!("{e}"));
    assert!(output.text.contains("--stream cannot be used with the check command"), "{output:?}");
    for option in ["--track-mem", "--auto-dedup", "--snapshot"] {
        match Engine::ours().dump(run.pid, &images, &["--stream", "-R", option]) {
            Ok(_) => panic!("{option} was taken"),
            Err(e) => assert!(e.text.contains(option), "{e}"),
        }
    }
    let (script, told) = (run.folder.join("script"), run.folder.join("told"));
    let text = format!("#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION >>{}\n", told.display());
    std::fs::write(&script, text).unwrap_or_else(|e| panic!("{e}"));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, mode).unwrap_or_else(|e| panic!("{e}"));
    let all = captured(&mut run, &Engine::ours(), &["--action-script", &script.to_string_lossy()]);
    let stages = std::fs::read_to_string(&told).unwrap_or_default();
    assert_eq!(stages.lines().take(2).collect::<Vec<_>>(), ["pre-stream", "pre-dump"]);
    served(&mut run, &Engine::ours(), all);
    run.check(How::Restored);
}
