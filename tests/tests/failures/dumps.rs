//! Dumps that fail.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::program::eventually;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

use crate::support::*;

/// A program whose child is asked to be dumped.
pub(crate) fn not_a_session_leader() -> Option<String> {
    let mut program = counting("if ($child = fork) { waitpid $child, 0; exit }");
    let child = process::children(program.pid).first().copied()?;
    let text = dump_of_fails(&program, child, &[], |_| {});
    // the remedy for who has no other
    let images = images(&program);
    let options = ["-t", &child.to_string(), "-j", "-R"];
    let done = process::run(&mut Engine::ours().command("dump", &images, &options), standstill_tests::program::LIMIT);
    assert_eq!(done.ok()?.code, Some(0));
    program.moves(20);
    program.tree = process::tree(program.pid);
    Some(text)
}

/// Its terminal's other end is held by somebody else.
pub(crate) fn terminal_outside() -> Option<String> {
    let holder = counting(
        "require POSIX; my $master = POSIX::open('/dev/ptmx', 2); my ($number, $off) = (pack('i', 0), pack('i', 0)); \
         open(my $m, '+<&=', $master); ioctl($m, 0x40045431, $off); ioctl($m, 0x80045430, $number); \
         if (!($child = fork)) { POSIX::setsid(); open(STDIN, '+<', '/dev/pts/' . unpack('i', $number)) or die; close $m; } \
         else { $SIG{CHLD} = 'IGNORE'; sleep while 1; }",
    );
    let child = process::children(holder.pid).first().copied()?;
    let text = dump_of_fails(&holder, child, &[], |_| {});
    Some(text)
}

pub(crate) fn socket_outside() -> Option<String> {
    let holder = counting(
        "use Socket; socketpair(A, B, AF_UNIX, SOCK_STREAM, 0); \
         if ($child = fork) { close A; waitpid $child, 0; exit } close B; require POSIX; POSIX::setsid()",
    );
    let child = process::children(holder.pid).first().copied()?;
    Some(dump_of_fails(&holder, child, &[], |_| {}))
}

const LISTEN: &str =
    "use Socket; socket(L, PF_INET, SOCK_STREAM, 0); bind(L, sockaddr_in(0, inet_aton('127.0.0.1'))); \
     listen(L, 5); socket(C, PF_INET, SOCK_STREAM, 0); connect(C, getsockname(L)) or die;";

pub(crate) fn connected() -> Option<String> {
    let mut program = counting(&format!("{LISTEN} accept(A, L)"));
    let text = dump_fails(&program, &[]);
    carried(&mut program, &["--tcp-established"]);
    Some(text)
}

pub(crate) fn unaccepted() -> Option<String> {
    let program = counting(LISTEN);
    Some(dump_fails(&program, &["--tcp-established"]))
}

pub(crate) fn locked() -> Option<String> {
    let mut program = counting("open(F, '>', 'locked'); flock(F, 2) or die");
    let text = dump_fails(&program, &[]);
    carried(&mut program, &["--file-locks"]);
    Some(text)
}

pub(crate) fn linked_elsewhere() -> Option<String> {
    let mut program = counting("open(F, '>', 'gone'); print F 'x'; link 'gone', 'other'; unlink 'gone'");
    let text = dump_fails(&program, &[]);
    carried(&mut program, &["--link-remap"]);
    Some(text)
}

pub(crate) fn large_and_deleted() -> Option<String> {
    let mut program = counting("open(F, '>', 'gone'); print F 'x' x 3000000; F->flush; unlink 'gone'");
    let text = dump_fails(&program, &[]);
    carried(&mut program, &["--ghost-limit", "4M"]);
    Some(text)
}

pub(crate) fn traced() -> Option<String> {
    let program = counting("");
    let strace = standstill_tests::program::program("strace")?;
    let pid = program.pid.to_string();
    let mut tracer = Command::new(strace).args(["-qq", "-e", "none", "-p", &pid]).spawn().ok()?;
    let traced = || {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        !status.contains("TracerPid:\t0\n")
    };
    eventually("strace", traced);
    let text = dump_fails(&program, &[]);
    assert!(traced(), "the debugger was thrown out");
    process::signal(i32::try_from(tracer.id()).unwrap_or(0), libc::SIGINT);
    let _ = tracer.wait();
    let mut program = program;
    carried(&mut program, &[]);
    Some(text)
}

pub(crate) fn nested_namespace() -> Option<String> {
    let nested = "unshare --uts sleep 1000 & exec \"$@\"";
    let program = counting_as("namespace", "", |c| wrapped(c, &["sh", "-c", nested, "sh"]));
    let other =
        |pid: &i32| fs::read_link(format!("/proc/{pid}/ns/uts")).ok() != fs::read_link("/proc/self/ns/uts").ok();
    eventually("a namespace", || process::children(program.pid).iter().any(other));
    Some(dump_fails(&program, &[]))
}

pub(crate) fn no_such_process() -> Option<String> {
    let program = counting("");
    Some(dump_of_fails(&program, 4_194_000, &[], |_| {}))
}

pub(crate) fn kernel_thread() -> Option<String> {
    let program = counting("");
    if !fs::read_to_string("/proc/2/comm").is_ok_and(|n| n.trim() == "kthreadd") {
        skip("kernel_thread", "none can be seen here");
        return None;
    }
    Some(dump_of_fails(&program, 2, &[], |_| {}))
}

/// The shell that starts the engine is to be dumped.
pub(crate) fn ourselves() -> Option<String> {
    let program = counting("");
    let images = images(&program);
    let mut shell = Command::new("sh");
    shell.args(["-c", "\"$0\" dump -t $$ -D \"$1\" -o dump.log -j; exit $?"]).arg(Engine::ours().path()).arg(&images);
    let text = fails(&mut shell, &images.join("dump.log"));
    assert!(!images.join("inventory.img").exists());
    Some(text)
}

pub(crate) fn thread() -> Option<String> {
    let mut run = Run::start("threads");
    let tid = process::threads(run.pid).into_iter().find(|&t| t != run.pid)?;
    let images = run.images("images");
    fs::create_dir_all(&images).ok()?;
    let mut command = Engine::ours().command("dump", &images, &["-t", &tid.to_string()]);
    let text = fails(&mut command, &images.join("dump.log"));
    run.check(standstill_tests::guests::support::How::Running);
    Some(text)
}

pub(crate) fn no_capability() -> Option<String> {
    let program = counting("");
    Some(dump_of_fails(&program, program.pid, &[], |c| with_less_power(c, POWERLESS)))
}

/// Somebody else's engine, and somebody else's folder.
pub(crate) fn another_user() -> Option<String> {
    let program = counting("");
    for folder in [program.folder.clone(), images(&program)] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).ok()?;
    }
    let copy = program.folder.join("engine");
    Some(dump_of_fails(&program, program.pid, &[], |c| as_nobody(c, &copy)))
}

pub(crate) fn no_folder() -> Option<String> {
    let program = counting("");
    let missing = program.folder.join("missing");
    let pid = program.pid.to_string();
    let text = fails(&mut Engine::ours().command("dump", &missing, &["-t", &pid]), &missing);
    program.moves(20);
    Some(text)
}

pub(crate) fn no_work_folder() -> Option<String> {
    let program = counting("");
    let missing = program.folder.join("missing");
    Some(dump_fails(&program, &["-W", &missing.display().to_string()]))
}

/// A small file system for images.
pub(crate) struct Small(pub(crate) PathBuf);

impl Small {
    pub(crate) fn mount(path: PathBuf, options: &str) -> Option<Small> {
        fs::create_dir_all(&path).ok()?;
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", options, "standstill-small"]).arg(&path).status();
        if !status.is_ok_and(|s| s.success()) {
            skip("failures", "a tmpfs cannot be mounted here");
            return None;
        }
        Some(Small(path))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

pub(crate) fn read_only() -> Option<String> {
    let program = counting("");
    let small = Small::mount(images(&program), "ro")?;
    let text = dump_fails(&program, &[]);
    drop(small);
    Some(text)
}

/// There is room for one more file each time.
pub(crate) fn disk_full() -> Option<String> {
    let mut program =
        counting("open(F, '>', 'gone'); print F 'x' x 30000; F->flush; unlink 'gone'; pipe(R, W); syswrite(W, 'abc')");
    let mut last = None;
    let mut files = 2;
    loop {
        let path = images(&program);
        let small = Small::mount(path.clone(), &format!("size=100m,nr_inodes={files}"))?;
        let pid = program.pid.to_string();
        let mut command = Engine::ours().command("dump", &path, &["-R", "-t", &pid]);
        let output = process::run(&mut command, standstill_tests::program::LIMIT).ok()?;
        if output.code == Some(0) {
            break;
        }
        assert_eq!(output.code, Some(1), "{}", output.text);
        assert!(output.text.contains("No space left on device"), "{files} files: {}", output.text);
        assert!(!path.join("inventory.img").exists(), "a checkpoint in {files} files");
        program.moves(3);
        drop(small);
        last = Some(output.text);
        files += 1;
        assert!(files < 100, "it never fits");
    }
    assert!(files > 12, "there are more images than {files}");
    carried(&mut program, &[]);
    last
}

/// Somebody types ^C in the middle.
pub(crate) fn interrupted() -> Option<String> {
    let mut program = counting("");
    let script = program.folder.join("script");
    fs::write(&script, "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION = pre-dump ] && kill -INT $PPID\nexit 0\n").ok()?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).ok()?;
    let text = dump_fails(&program, &["--action-script", &script.display().to_string()]);
    carried(&mut program, &[]);
    Some(text)
}

/// A task that waits in vfork(2) for a child that is stopped.
pub(crate) fn never_stops() -> Option<String> {
    use std::os::unix::process::CommandExt as _;
    let program = counting("");
    let at = program.folder.clone();
    let mut parent = Command::new(standstill_tests::engine::programs().join("guest"));
    // SAFETY of the guest's own: it waits for a child that shares its memory
    parent.arg("tree_vfork_stopped").arg(&at).process_group(0);
    let parent = parent.spawn().ok()?;
    let pid = i32::try_from(parent.id()).unwrap_or(0);
    let child = || process::children(pid).first().copied();
    eventually("the child", || child().is_some_and(|c| process::state(c) == Some('T')));
    let text = dump_of_fails(&program, pid, &["-j", "--timeout", "1"], |_| {});
    let child = child()?;
    assert_eq!(process::state(child), Some('T'), "the child was let go");
    process::end(&[child, pid]);
    Some(text)
}
