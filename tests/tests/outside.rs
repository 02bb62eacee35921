//! What is not carried but given: `--external` at dump, `--inherit-fd` at restore, as users of CRIU have it. Where a CRIU 4 is at hand,
//! it gets our images, and we get its.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::program::{self, eventually, Program};
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

/// Somebody whose namespaces a program can be in.
struct Holder(Child);

impl Holder {
    /// With new namespaces of these kinds, as options of `unshare`.
    fn new(kinds: &[&str]) -> Holder {
        let mut command = Command::new("unshare");
        // one that has others' children go
        command.args(kinds).args(["--fork", "--kill-child", "perl", "-e", "$SIG{CHLD} = 'IGNORE'; sleep 1 while 1"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let holder = Holder(command.spawn().unwrap_or_else(|e| panic!("unshare: {e}")));
        let children = format!("/proc/{0}/task/{0}/children", holder.0.id());
        eventually("the holder", || fs::read_to_string(&children).is_ok_and(|text| !text.trim().is_empty()));
        holder
    }

    fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/{name}", self.0.id()))
    }

    fn inode(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap_or_else(|e| panic!("{name}: {e}")).ino()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // unshare sees to it that its child goes as well
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn namespace_of(pid: i32, name: &str) -> u64 {
    fs::metadata(format!("/proc/{pid}/ns/{name}")).unwrap_or_else(|e| panic!("{pid}: {name}: {e}")).ino()
}

/// The innermost id of a process.
fn inner(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ids = status.lines().find_map(|l| l.strip_prefix("NSpid:")).unwrap_or_default();
    ids.split_whitespace().last().unwrap_or_default().to_owned()
}

/// Who lives in a PID namespace.
fn within(inode: u64) -> Vec<i32> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = all.filter_map(|e| e.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| fs::metadata(format!("/proc/{pid}/ns/pid")).is_ok_and(|m| m.ino() == inode)).collect()
}

/// A program that counts, and has a child.
fn counting(name: &str) -> Program {
    let mut command = Command::new("perl");
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/count.pl"));
    command.arg("fork or do { sleep 1 while 1 };");
    Program::start(name, program::folder(name), &mut command)
}

/// Restored, where it has another id with us.
fn restored_by(program: &mut Program, engine: &Engine, options: &[&str]) {
    let pidfile = program.folder.join("pidfile");
    let _ = fs::remove_file(&pidfile);
    let path = pidfile.display().to_string();
    let images = program.folder.join("images");
    engine.restore(&images, &[options, &["--pidfile", &path]].concat()).unwrap_or_else(|e| panic!("{e}"));
    let text = fs::read_to_string(&pidfile).unwrap_or_else(|e| panic!("{path}: {e}"));
    program.pid = text.trim().parse().unwrap_or_else(|e| panic!("{text}: {e}"));
    program.tree = process::tree(program.pid);
    assert_eq!(program.tree.len(), 2);
}

/// A program in a PID namespace that is somebody else's, and goes on in that, or in another one.
#[test]
fn a_pid_namespace() {
    for (dumps, restores) in pairs("a_pid_namespace") {
        let (first, second) = (Holder::new(&["--pid"]), Holder::new(&["--pid"]));
        let open = |holder: &Holder| -> OwnedFd {
            File::open(holder.path("pid_for_children")).unwrap_or_else(|e| panic!("{e}")).into()
        };
        let [of_first, of_second] = [open(&first), open(&second)];
        let enter = |fd: &OwnedFd| {
            nix::sched::setns(fd, nix::sched::CloneFlags::CLONE_NEWPID).unwrap_or_else(|e| panic!("{e}"));
        };
        let own: OwnedFd = File::open("/proc/thread-self/ns/pid").unwrap_or_else(|e| panic!("{e}")).into();
        enter(&of_first);
        let mut program = counting("pid-namespace");
        enter(&own);
        program.moves(20);
        let id = inner(program.pid);
        let images = program.folder.join("images");
        fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        match Engine::ours().dump(program.pid, &images, &[]) {
            Ok(_) => panic!("it was dumped"),
            Err(e) => assert!(e.text.contains("not the init of its PID namespace"), "{e}"),
        }
        program.moves(20);
        let inode = first.inode("pid_for_children");
        let external = format!("pid[{inode}]:pod");
        program.tree = process::tree(program.pid);
        let dump = |program: &Program, engine: &Engine| {
            engine.dump(program.pid, &images, &["--external", &external]).unwrap_or_else(|e| panic!("{e}"));
            if let Err(left) = process::wait_gone(&program.tree, program::LIMIT) {
                panic!("{left:?} are still there");
            }
        };
        dump(&program, &dumps);
        let option = inherit(&of_first, "pod");
        let before = within(inode);
        if !dumps.is_criu && !restores.is_criu {
            let fails = |options: &[&str], word: &str| match restores.restore(&images, options) {
                Ok(_) => panic!("it was restored"),
                Err(e) => {
                    assert!(e.text.contains(word), "{e}");
                    assert!(process::within(program::LIMIT, || within(inode) == before), "{:?}", within(inode));
                }
            };
            fails(&[], "Unable to find an external pidns: pod");
            // at the last moment
            let script = program.folder.join("says-no");
            fs::write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != post-restore ]\n")
                .and_then(|()| fs::set_permissions(&script, PermissionsExt::from_mode(0o755)))
                .unwrap_or_else(|e| panic!("{e}"));
            fails(&["--inherit-fd", &option, "--action-script", &script.display().to_string()], "post-restore");
        }
        restored_by(&mut program, &restores, &["--inherit-fd", &option]);
        program.moves(20);
        assert_eq!((namespace_of(program.pid, "pid"), inner(program.pid)), (inode, id.clone()));
        dump(&program, &dumps);
        // somebody else's
        restored_by(&mut program, &restores, &["--inherit-fd", &inherit(&of_second, "pod")]);
        program.moves(20);
        assert_eq!((namespace_of(program.pid, "pid"), inner(program.pid)), (second.inode("pid_for_children"), id));
    }
}

/// Namespaces that a restore joins.
#[test]
fn joined_namespaces() {
    let holder = Holder::new(&["--uts", "--ipc", "--time"]);
    let mut program = counting("joined");
    program.moves(20);
    let path = |name: &str| holder.path(name).display().to_string();
    let [uts, ipc, time] =
        [format!("uts:{}", path("uts")), format!("ipc:{}", path("ipc")), format!("time:{}", path("time_for_children"))];
    let options = ["--join-ns", &uts, "--join-ns", &ipc, "--join-ns", &time];
    // from ours, and from where it is then
    for _ in 0..2 {
        program.dump(&[]);
        program.restore(&options);
        program.moves(20);
        for pid in &program.tree {
            for (name, there) in [("uts", "uts"), ("ipc", "ipc"), ("time", "time_for_children")] {
                assert_eq!(namespace_of(*pid, name), holder.inode(there), "{name} of {pid}");
            }
        }
    }
}
