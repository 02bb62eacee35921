//! What is not carried but given: `--external` at dump, `--inherit-fd` at restore, as users of CRIU have it. Where a CRIU 4 is at hand,
//! it gets our images, and we get its.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::program::eventually;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// Who dumps and who restores.
fn pairs(test: &str) -> Vec<(Engine, Engine)> {
    let mut all = vec![(Engine::ours(), Engine::ours())];
    match (Engine::criu(), Engine::criu()) {
        (Ok(dumps), Ok(restores)) => all.extend([(dumps, Engine::ours()), (Engine::ours(), restores)]),
        (Err(why), _) | (_, Err(why)) => skip(test, &why),
    }
    all
}

/// A program started by us gets it.
fn given(fd: &OwnedFd) -> String {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap_or_else(|e| panic!("{e}"));
    fd.as_raw_fd().to_string()
}

/// The option that says which one stands for `key`.
fn inherit(fd: &OwnedFd, key: &str) -> String {
    format!("fd[{}]:{key}", given(fd))
}

/// Numbers, links and fdinfo of what a process has open.
fn open_files(pid: i32) -> Vec<(String, PathBuf, String)> {
    let names = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let one = |e: fs::DirEntry| {
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", e.file_name().display())).ok()?;
        Some((e.path().display().to_string(), fs::read_link(e.path()).ok()?, info))
    };
    names.filter_map(one).collect()
}

/// A dump that must fail, with these words, and the guest goes on; and one that must work, with these options.
fn refused_then_dumped(run: &mut Run, engine: &Engine, images: &Path, word: &str, options: &[&str]) {
    if !word.is_empty() {
        match engine.dump(run.pid, images, &[]) {
            Ok(_) => panic!("it was dumped"),
            Err(e) => assert!(e.text.contains(word), "nothing about {word:?} in:\n{e}"),
        }
        assert!(!images.join("inventory.img").exists());
    }
    run.dump_with(engine, images, options);
}

/// The same for restore.
fn refused_then_restored(run: &mut Run, engine: &Engine, images: &Path, word: &str, options: &[&str]) {
    match engine.restore(images, &[]) {
        Ok(_) => panic!("it was restored"),
        Err(e) => assert!(e.text.contains(word), "nothing about {word:?} in:\n{e}"),
    }
    // CRIU leaves what it had made to be waited for
    let _ = process::wait_gone(&[run.pid], Duration::from_secs(10));
    run.restore_with(engine, images, options);
}

/// Does the guest answer?
fn answers(mut stream: impl Read + Write) {
    stream.write_all(b"ping").unwrap_or_else(|e| panic!("{e}"));
    let mut answer = [0; 4];
    stream.read_exact(&mut answer).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(&answer, b"ping");
}

fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap_or_else(|e| panic!("{e}"));
    stream
}

#[test]
fn a_connection() {
    for (dumps, restores) in pairs("a_connection") {
        let mut run = Run::start("outside");
        let ours = patient(UnixStream::connect(run.file("socket")).unwrap_or_else(|e| panic!("{e}")));
        answers(&ours);
        // the one that it accepted came last
        let sockets = open_files(run.pid).into_iter().filter_map(|(fd, link, _)| {
            let number: u32 = fd.rsplit('/').next()?.parse().ok()?;
            let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned();
            Some((number, inode))
        });
        let (_, inode) = sockets.max().unwrap_or_else(|| panic!("no socket"));
        let images = run.images("images");
        let external = format!("unix[{inode}]");
        refused_then_dumped(&mut run, &dumps, &images, "--ext-unix-sk", &["--external", &external]);
        drop(ours);
        let (here, there) = UnixStream::pair().unwrap_or_else(|e| panic!("{e}"));
        there.set_nonblocking(true).unwrap_or_else(|e| panic!("{e}"));
        let there = OwnedFd::from(there);
        let option = inherit(&there, &format!("socket:[{inode}]"));
        refused_then_restored(&mut run, &restores, &images, "--ext-unix-sk", &["--inherit-fd", &option]);
        drop(there);
        answers(patient(here));
        run.check(How::Restored);
    }
}

/// What `attach` names is opened by the guest.
fn attach(run: &Run, path: &str) {
    fs::write(run.file("attach.new"), path).unwrap_or_else(|e| panic!("{e}"));
    fs::rename(run.file("attach.new"), run.file("attach")).unwrap_or_else(|e| panic!("{e}"));
    eventually("the guest", || run.file("attached").exists());
}

/// A terminal: its master, its slave, and the slave's name.
fn terminal() -> (File, OwnedFd, String) {
    let pair = nix::pty::openpty(None, None).unwrap_or_else(|e| panic!("{e}"));
    let name = rustix::termios::ttyname(&pair.slave, Vec::new()).unwrap_or_else(|e| panic!("{e}"));
    (pair.master.into(), pair.slave, name.to_string_lossy().into_owned())
}

fn heard(run: &Run, master: &mut File, word: &str) {
    let _ = fs::remove_file(run.file("heard"));
    writeln!(master, "{word}").unwrap_or_else(|e| panic!("{e}"));
    eventually("the guest to hear it", || {
        fs::read_to_string(run.file("heard")).is_ok_and(|text| text == format!("{word}\n"))
    });
}

#[test]
fn a_terminal() {
    for (dumps, restores) in pairs("a_terminal") {
        let mut run = Run::start("outside");
        let (mut master, slave, name) = terminal();
        attach(&run, &name);
        heard(&run, &mut master, "before");
        let stat = rustix::fs::fstat(&slave).unwrap_or_else(|e| panic!("{e}"));
        let key = format!("tty[{:x}:{:x}]", stat.st_rdev, stat.st_dev);
        let images = run.images("images");
        refused_then_dumped(&mut run, &dumps, &images, "", &["--external", &key]);
        let (mut other, stand_in, _) = terminal();
        let option = inherit(&stand_in, &key);
        run.restore_with(&restores, &images, &["--inherit-fd", &option]);
        drop((master, slave));
        heard(&run, &mut other, "after");
        run.check(How::Restored);
    }
}

#[test]
fn a_pipe() {
    for (dumps, restores) in pairs("a_pipe") {
        let mut run = Run::start("outside");
        let (reads, writes) = std::io::pipe().unwrap_or_else(|e| panic!("{e}"));
        attach(&run, &format!("/proc/{}/fd/{}", std::process::id(), reads.as_raw_fd()));
        let mut writes = File::from(OwnedFd::from(writes));
        heard(&run, &mut writes, "before");
        let reads = OwnedFd::from(reads);
        let inode = rustix::fs::fstat(&reads).unwrap_or_else(|e| panic!("{e}")).st_ino;
        let images = run.images("images");
        run.dump_with(&dumps, &images, &[]);
        drop((reads, writes));
        let (reads, writes) = std::io::pipe().unwrap_or_else(|e| panic!("{e}"));
        let reads = OwnedFd::from(reads);
        rustix::io::ioctl_fionbio(&reads, true).unwrap_or_else(|e| panic!("{e}"));
        let option = inherit(&reads, &format!("pipe:[{inode}]"));
        run.restore_with(&restores, &images, &["--inherit-fd", &option]);
        drop(reads);
        heard(&run, &mut File::from(OwnedFd::from(writes)), "after");
        run.check(How::Restored);
    }
}

/// Another file stands for one that a task had open: by `file[MOUNT:INODE]`, and by its path.
#[test]
fn a_file() {
    for (dumps, restores) in pairs("a_file") {
        for external in [true, false] {
            let mut run = Run::start("outside");
            let path = run.file("data");
            let inode = fs::metadata(&path).unwrap_or_else(|e| panic!("{e}")).ino();
            let files = open_files(run.pid);
            let (_, _, info) =
                files.iter().find(|f| f.1 == path).unwrap_or_else(|| panic!("it is not open: {files:?}"));
            let mount = info.lines().find_map(|l| l.strip_prefix("mnt_id:")).unwrap_or_default().trim();
            let mount: u32 = mount.parse().unwrap_or_else(|e| panic!("{mount}: {e}"));
            let images = run.images("images");
            let key = if external {
                format!("file[{mount:x}:{inode:x}]")
            } else {
                path.display().to_string().trim_start_matches('/').to_owned()
            };
            let options = ["--external", &key];
            run.dump_with(&dumps, &images, if external { &options } else { &[] });
            fs::remove_file(&path).unwrap_or_else(|e| panic!("{e}"));
            let other = run.file("other");
            fs::write(&other, "stands").unwrap_or_else(|e| panic!("{e}"));
            let file: OwnedFd = File::open(&other).unwrap_or_else(|e| panic!("{e}")).into();
            let option = inherit(&file, &key);
            // CRIU cuts the first letter off
            refused_then_restored(&mut run, &restores, &images, &key[1..], &["--inherit-fd", &option]);
            run.check(How::Restored);
            assert_eq!(fs::read_to_string(run.file("last")).unwrap_or_default(), "stands");
        }
    }
}
