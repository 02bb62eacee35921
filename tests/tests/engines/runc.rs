//! runc (`runc checkpoint`, `runc restore`), through CRIU's RPC.

use std::fs;
use std::io::{BufRead as _, BufReader, IoSliceMut, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc;

use serde_json::{json, Value};
use standstill_tests::container::{errors, Place, EXIT, LIMIT};
use standstill_tests::process::{self, Patience};
use standstill_tests::skip::skip;

/// A container of runc's; it ends with this.
struct Container {
    place: Place,
    name: String,
}

/// What is different from one test to the next.
struct Kind<'k> {
    namespaces: &'k [&'k str],
    args: &'k [&'k str],
    terminal: bool,
}

const ORDINARY: Kind<'_> =
    Kind { namespaces: &["pid", "network", "ipc", "uts", "mount"], args: &["/bin/sh", "/work.sh"], terminal: false };

fn config(kind: &Kind<'_>) -> Value {
    let caps = json!(["CAP_KILL", "CAP_NET_BIND_SERVICE", "CAP_NET_ADMIN"]);
    let quiet = json!(["nosuid", "noexec", "nodev"]);
    let mut config = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": kind.terminal, "user": {"uid": 0, "gid": 0}, "args": kind.args, "env": ["PATH=/bin"], "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true
        },
        "root": {"path": "rootfs", "readonly": false},
        "hostname": "before",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": quiet},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": kind.namespaces.iter().map(|name| json!({"type": name})).collect::<Vec<_>>(),
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"]
        }
    });
    if kind.namespaces.contains(&"user") {
        let ids = json!([{"containerID": 0, "hostID": 70000, "size": 2000}]);
        config["linux"]["uidMappings"] = ids.clone();
        config["linux"]["gidMappings"] = ids;
    }
    config
}

impl Container {
    /// A container that is not started; none, and the test is skipped, if there is no runc.
    fn new(test: &str, kind: &Kind<'_>) -> Option<Container> {
        let place = Place::new(test, &["runc"])?;
        let name = place.name.clone();
        let text = config(kind).to_string();
        fs::write(place.folder.join("config.json"), text).unwrap_or_else(|e| panic!("{e}"));
        Some(Container { place, name })
    }

    /// One that runs.
    fn started(test: &str, kind: &Kind<'_>) -> Option<Container> {
        let container = Container::new(test, kind)?;
        if kind.namespaces.contains(&"user") {
            container.place.run("chown", &["-R", "70000:70000", "rootfs"]).unwrap_or_else(|o| panic!("{}", o.text));
        }
        if let Err(output) = container.detached(&["run"], &[]) {
            skip(test, "runc cannot start such a container here, without us");
            eprintln!("{output}");
            return None;
        }
        Some(container)
    }

    fn command(&self, args: &[&str]) -> std::process::Command {
        let mut command = self.place.command("runc");
        command.arg("--root").arg(self.place.folder.join("state")).args(args);
        command
    }

    /// Runs runc; what the container inherits is /dev/null, and what runc says is in its log.
    fn runc(&self, args: &[&str]) -> Result<(), String> {
        let log = self.place.folder.join("runc.log");
        let _ = fs::remove_file(&log);
        let mut command = self.place.command("runc");
        command.arg("--root").arg(self.place.folder.join("state")).arg("--log").arg(&log).args(args);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{e}"));
        let code = wait(&mut child);
        if code == Some(0) {
            return Ok(());
        }
        let said = fs::read_to_string(&log).unwrap_or_default();
        let logs = ["dump.log", "restore.log"].map(|name| errors(&self.place.folder.join("work").join(name)));
        Err(format!("runc {}: {code:?}\n{said}\n{}", args.join(" "), logs.join("\n")))
    }

    /// `runc VERB -d …`.
    fn detached(&self, verb: &[&str], options: &[&str]) -> Result<(), String> {
        self.runc(&[verb, &["-d"], options, &[&self.name]].concat())
    }

    fn checkpoint(&self, images: &str, options: &[&str]) -> Result<(), String> {
        self.runc(
            &[&["checkpoint", "--image-path", images, "--work-path", "work"][..], options, &[&self.name]].concat(),
        )
    }

    fn restore(&self, images: &str, options: &[&str]) -> Result<(), String> {
        self.detached(&["restore"], &[&["--image-path", images, "--work-path", "work"][..], options].concat())
    }

    /// What a command in the container prints.
    fn exec(&self, args: &[&str]) -> String {
        let mut command = self.command(&["exec", "--cap", "CAP_NET_ADMIN", &self.name]);
        let output = process::run(command.args(args), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(0), "{args:?}: {}", output.text);
        output.text
    }

    /// The state that runc says it is in; none if it knows no such container.
    fn state(&self) -> Option<String> {
        let output = process::run(&mut self.command(&["state", &self.name]), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        let value: Value = serde_json::from_str(&output.text).ok().filter(|_| output.code == Some(0))?;
        value["status"].as_str().map(str::to_owned)
    }

    /// Its socket listens, its tmpfs has its file, it counts, and has lost no number.
    fn is_whole(&self) {
        assert_eq!(self.state().as_deref(), Some("running"));
        self.place.counts();
        // runc has CRIU make the network, and leave it empty
        self.exec(&["ip", "link", "set", "lo", "up"]);
        let page = self.exec(&["wget", "-q", "-O", "-", "http://127.0.0.1:8080/count"]);
        assert!(page.starts_with("1\n2\n"), "{page}");
        assert_eq!(self.exec(&["cat", "/dev/shm/kept"]), "kept\n");
        self.place.counted_all();
    }

    fn end(&self) {
        self.runc(&["kill", &self.name, "TERM"]).unwrap_or_else(|e| panic!("{e}"));
        self.place.said_bye();
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = process::run(&mut self.command(&["delete", "--force", &self.name]), LIMIT);
    }
}

fn wait(child: &mut Child) -> Option<i32> {
    let mut patience = Patience::of(LIMIT);
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return status.code();
        }
        if patience.over() {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn ok(result: Result<(), String>) {
    result.unwrap_or_else(|e| panic!("{e}"));
}

/// There and back, with one folder for all checkpoints.
fn carried(test: &str, kind: &Kind<'_>) {
    let Some(container) = Container::started(test, kind) else { return };
    container.place.counts();
    for _ in 0..2 {
        ok(container.checkpoint("images", &[]));
        assert_eq!(container.state(), None, "it is dead, and runc has forgotten it");
        ok(container.restore("images", &[]));
        container.is_whole();
    }
    container.end();
}

#[test]
fn twice_into_one_folder() {
    carried("runc", &ORDINARY);
}

#[test]
fn with_namespaces_of_users_and_cgroups() {
    let namespaces = ["pid", "network", "ipc", "uts", "mount", "user", "cgroup"];
    carried("runc-user", &Kind { namespaces: &namespaces, ..ORDINARY });
}

#[test]
fn in_the_foreground_it_has_its_exit_code() {
    let Some(container) = Container::started("runc-foreground", &ORDINARY) else { return };
    container.place.counts();
    ok(container.checkpoint("images", &[]));
    let mut command = container.command(&["restore", "--image-path", "images", "--work-path", "work", &container.name]);
    let mut runc = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{e}"));
    container.place.counts();
    container.end();
    assert_eq!(wait(&mut runc), Some(EXIT));
}

#[test]
fn it_goes_on_and_can_be_restored_later() {
    let Some(container) = Container::started("runc-running", &ORDINARY) else { return };
    container.place.counts();
    ok(container.checkpoint("images", &["--leave-running"]));
    container.is_whole();
    ok(container.runc(&["delete", "--force", &container.name]));
    ok(container.restore("images", &[]));
    container.place.counts();
    let all = container.place.counted();
    let back = all.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert_eq!(back, 1, "it goes on once from where it was at the checkpoint: {all:?}");
    container.end();
}

#[test]
fn memory_that_was_dumped_before() {
    let Some(container) = Container::started("runc-pre", &ORDINARY) else { return };
    container.place.counts();
    if let Err(e) = container.checkpoint("1", &["--pre-dump"]) {
        if e.contains("CRIU is missing features") {
            skip("runc-pre", "memory cannot be tracked here");
            return;
        }
        panic!("{e}");
    }
    ok(container.checkpoint("2", &["--pre-dump", "--parent-path", "../1"]));
    container.is_whole();
    ok(container.checkpoint("3", &["--parent-path", "../2"]));
    ok(container.restore("3", &[]));
    container.is_whole();
    container.end();
}

/// Sends back every line, and checks that they are 1, 2, …; each that came is told of.
fn echo(listener: &TcpListener, told: &mpsc::Sender<u64>) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    let Ok(reader) = stream.try_clone() else { return };
    for (line, number) in BufReader::new(reader).lines().map_while(Result::ok).zip(1..) {
        assert_eq!(line, format!("{number}"), "a line is lost or there twice");
        if writeln!(stream, "{line}").is_err() || told.send(number).is_err() {
            return;
        }
    }
}

#[test]
fn connections_to_others() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
    let port = listener.local_addr().unwrap_or_else(|e| panic!("{e}")).port().to_string();
    let script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done | nc 127.0.0.1 $0 > /data/count";
    let kind =
        Kind { namespaces: &["pid", "ipc", "uts", "mount"], args: &["/bin/sh", "-c", script, &port], ..ORDINARY };
    let Some(container) = Container::started("runc-tcp", &kind) else { return };
    let (tell, told) = mpsc::channel();
    let peer = std::thread::spawn(move || echo(&listener, &tell));
    container.place.counts();
    if container.place.command("iptables").arg("--version").output().is_err() {
        skip("runc-tcp", "there is no iptables, with which CRIU locks connections");
        return;
    }
    // without the option it is refused, and goes on
    let error = container.checkpoint("images", &[]).expect_err("a connection is carried only if that is asked for");
    assert!(error.contains("tcp-established"), "{error}");
    assert_eq!(container.state().as_deref(), Some("running"));
    container.place.counts();
    ok(container.checkpoint("images", &["--tcp-established"]));
    while told.try_recv().is_ok() {}
    ok(container.restore("images", &["--tcp-established"]));
    container.place.counts();
    container.place.counted_all();
    told.recv_timeout(LIMIT).unwrap_or_else(|e| panic!("the peer hears nothing: {e}"));
    drop(container);
    drop(told);
    peer.join().unwrap_or_else(|_| panic!("the peer found something wrong"));
}

#[test]
fn of_a_restore_that_fails_nothing_is_left() {
    let Some(container) = Container::started("runc-fails", &ORDINARY) else { return };
    container.place.counts();
    ok(container.checkpoint("images", &[]));
    let busybox = container.place.rootfs.join("bin/busybox");
    let aside = container.place.rootfs.join("aside");
    fs::rename(&busybox, &aside).unwrap_or_else(|e| panic!("{e}"));
    let error = container.restore("images", &[]).expect_err("the program is not there");
    assert!(error.contains("busybox"), "{error}");
    assert_eq!(container.state(), None);
    let groups = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    let left: Vec<_> = groups.map(|g| g.path().join(&container.name)).filter(|g| g.exists()).collect();
    assert!(left.is_empty(), "{left:?}");
    fs::rename(&aside, &busybox).unwrap_or_else(|e| panic!("{e}"));
    ok(container.restore("images", &[]));
    container.is_whole();
    container.end();
}

/// The master of a terminal, as runc sends it.
fn master(listener: &UnixListener) -> fs::File {
    use nix::sys::socket::{recvmsg, ControlMessageOwned, MsgFlags};
    let (stream, _) = listener.accept().unwrap_or_else(|e| panic!("{e}"));
    let mut name = [0; 256];
    let mut space = nix::cmsg_space!([std::os::fd::RawFd; 4]);
    let mut parts = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)
        .unwrap_or_else(|e| panic!("{e}"));
    for control in message.cmsgs().unwrap_or_else(|e| panic!("{e}")) {
        if let ControlMessageOwned::ScmRights(fds) = control {
            return own(fds[0]);
        }
    }
    panic!("no terminal came")
}

#[allow(unsafe_code)]
fn own(fd: i32) -> fs::File {
    // SAFETY: a descriptor that has just been received is nobody else's.
    fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Types a line, and waits until the answer is there.
fn ask(terminal: &mut fs::File, line: &str, answer: &str) {
    terminal.write_all(line.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    let mut heard = Vec::new();
    let mut patience = Patience::of(LIMIT);
    while !String::from_utf8_lossy(&heard).contains(answer) {
        let mut buffer = [0; 4096];
        let mut poll = [nix::poll::PollFd::new(std::os::fd::AsFd::as_fd(terminal), nix::poll::PollFlags::POLLIN)];
        match nix::poll::poll(&mut poll, nix::poll::PollTimeout::from(100u8)) {
            Ok(n) if n > 0 => {
                let n = terminal.read(&mut buffer).unwrap_or_else(|e| panic!("{e}"));
                heard.extend_from_slice(&buffer[..n]);
            }
            _ => {}
        }
        assert!(!patience.over(), "no {answer:?} in {:?}", String::from_utf8_lossy(&heard));
    }
}

#[test]
fn a_terminal_whose_master_is_outside() {
    let kind = Kind { args: &["/bin/sh"], terminal: true, ..ORDINARY };
    let Some(container) = Container::new("runc-terminal", &kind) else { return };
    let socket = container.place.folder.join("console");
    let listener = UnixListener::bind(&socket).unwrap_or_else(|e| panic!("{e}"));
    let console = ["--console-socket", "console"];
    ok(container.detached(&["run"], &console));
    let mut terminal = master(&listener);
    ask(&mut terminal, "x=$((40+2)); tty; stty rows 33\n", "/dev/pts/0");
    ok(container.checkpoint("images", &["--shell-job"]));
    drop(terminal);
    ok(container.restore("images", &[&console[..], &["--shell-job"]].concat()));
    let mut terminal = master(&listener);
    ask(&mut terminal, "echo it is $x\n", "it is 42");
    ask(&mut terminal, "stty size < /dev/console\n", "33 ");
    // who prints this is in the foreground already
    ask(&mut terminal, "sh -c 'echo go$((1+1)); sleep 1000'\n", "go2");
    ask(&mut terminal, "\x03", "/ #");
    ask(&mut terminal, "exit\n", "exit");
    assert!(process::within(LIMIT, || container.state().as_deref() == Some("stopped")));
}

/// The checkpoint of a container that CRIU 4.2 made through runc; at the end it checks itself and exits with 0.
#[test]
fn a_checkpoint_of_criu() {
    let Some(container) = Container::new("runc-criu", &ORDINARY) else { return };
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/checkpoints/container");
    let folder = &container.place.folder;
    let script = format!(
        "rm -r rootfs && mkdir -p images rootfs/proc rootfs/sys rootfs/dev rootfs/tmp rootfs/etc && \
         cp {0}/images/* images/ && cp {0}/config.json . && cp {0}/guest rootfs/ && chmod 755 rootfs/guest && \
         chmod 600 images/* config.json",
        from.display()
    );
    container.place.run("sh", &["-c", &script]).unwrap_or_else(|o| panic!("{}", o.text));
    let mut command = container.command(&["restore", "--image-path", "images", "--work-path", "work", &container.name]);
    let mut runc = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{e}"));
    let log = folder.join("work/restore.log");
    let began = process::within(LIMIT, || {
        container.state().as_deref() == Some("running") || runc.try_wait().is_ok_and(|s| s.is_some())
    });
    assert!(began, "{}", errors(&log));
    if !std::is_x86_feature_detected!("avx512f") {
        assert_ne!(wait(&mut runc), Some(0));
        skip("runc-criu", "this CPU has no AVX-512, which the checkpoint uses");
        return;
    }
    ok(container.runc(&["kill", &container.name, "TERM"]));
    assert_eq!(wait(&mut runc), Some(0), "{}", errors(&log));
}
