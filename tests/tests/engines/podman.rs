//! podman with runc: `podman container checkpoint` and `restore`, in place, by archives, and into a new name. Debian's crun, which it
//! takes by default, was built without checkpoints.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;

use standstill_tests::container::{Place, EXIT, LIMIT};
use standstill_tests::process;
use standstill_tests::skip::skip;

use super::{can_start, must};

/// podman with storage of its own.
struct Podman {
    place: Place,
    base: Vec<String>,
}

impl Podman {
    fn new(test: &str) -> Option<Podman> {
        let place = Place::new(test, &["podman", "runc", "conmon"])?;
        let path = |name: &str| place.folder.join(name).display().to_string();
        let base = [
            ["--root", &path("root")],
            ["--runroot", &path("runroot")],
            ["--tmpdir", &path("tmpdir")],
            ["--storage-driver", "vfs"],
            ["--runtime", "runc"],
            ["--cgroup-manager", "cgroupfs"],
            ["--events-backend", "file"],
        ];
        let base = base.concat().into_iter().map(str::to_owned).collect();
        let podman = Podman { place, base };
        podman.must(&["import", &podman.place.tar().display().to_string(), "busybox"]);
        Some(podman)
    }

    fn args<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        self.base.iter().map(String::as_str).chain(args.iter().copied()).collect()
    }

    fn must(&self, args: &[&str]) -> String {
        must(&self.place, "podman", &self.args(args))
    }

    /// Starts container `one`; its `/data` is ours.
    fn start(&self, test: &str, options: &[&str], command: &[&str]) -> bool {
        let group = format!("/{}", self.place.name);
        let volume = format!("{}:/data", self.place.rootfs.join("data").display());
        // limits cannot be raised everywhere
        let limits = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"];
        let run = ["run", "-d", "--name", "one", "--cgroup-parent", &group, "-v", &volume];
        let all = [&run[..], &limits, options, &["busybox"], command].concat();
        can_start(test, self.place.run("podman", &self.args(&all)))
    }

    fn state(&self, name: &str, what: &str) -> String {
        self.must(&["inspect", "--format", &format!("{{{{.State.{what}}}}}"), name]).trim().to_owned()
    }

    /// It runs, has lost no number, and has its files.
    fn is_whole(&self, name: &str) {
        assert_eq!(self.state(name, "Status"), "running");
        self.place.counts();
        self.place.counted_all();
        assert_eq!(self.must(&["exec", name, "cat", "/dev/shm/kept"]), "kept\n");
        self.must(&["exec", name, "ls", "/changed"]);
    }

    fn end(&self, name: &str) {
        self.must(&["kill", "--signal", "TERM", name]);
        self.place.said_bye();
        assert!(process::within(LIMIT, || self.state(name, "Status") == "exited"));
        assert_eq!(self.state(name, "ExitCode"), EXIT.to_string());
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = self.place.run("podman", &self.args(&["rm", "--force", "--all", "--time", "0"]));
    }
}

const COUNTER: [&str; 2] = ["/bin/sh", "/work.sh"];

#[test]
fn in_place() {
    let Some(podman) = Podman::new("podman") else { return };
    if !podman.start("podman", &["--network", "none"], &COUNTER) {
        return;
    }
    podman.place.counts();
    podman.must(&["exec", "one", "touch", "/changed"]);
    podman.must(&["container", "checkpoint", "--leave-running", "one"]);
    podman.is_whole("one");
    podman.must(&["container", "checkpoint", "one"]);
    assert_eq!(podman.state("one", "Status"), "exited");
    podman.must(&["container", "restore", "one"]);
    podman.is_whole("one");
    podman.must(&["container", "checkpoint", "--keep", "--print-stats", "one"]);
    podman.must(&["container", "restore", "--keep", "--print-stats", "one"]);
    podman.is_whole("one");
    let log = |name: &str| podman.place.run("find", &["root", "-path", "*userdata*", "-name", name]);
    for name in ["dump.log", "restore.log"] {
        assert!(log(name).is_ok_and(|found| !found.is_empty()), "--keep keeps {name}");
    }
    podman.end("one");
}

#[test]
fn by_archives_and_into_a_new_name() {
    let Some(podman) = Podman::new("podman-archive") else { return };
    if !podman.start("podman-archive", &["--network", "none"], &COUNTER) {
        return;
    }
    podman.place.counts();
    podman.must(&["exec", "one", "touch", "/changed"]);
    let archive = |name: &str| podman.place.folder.join(name).display().to_string();
    podman.must(&["container", "checkpoint", "--export", &archive("a.tar.gz"), "one"]);
    podman.must(&["rm", "one"]);
    podman.must(&["container", "restore", "--import", &archive("a.tar.gz")]);
    podman.is_whole("one");
    // memory first, while it runs; then what has changed
    let pre = ["container", "checkpoint", "--pre-checkpoint", "--export", &archive("pre.tar.gz"), "one"];
    let mut with = vec!["container", "checkpoint", "--export"];
    let b = archive("b.tar.gz");
    with.push(&b);
    let tracked = match podman.place.run("podman", &podman.args(&pre)) {
        Ok(_) => {
            podman.is_whole("one");
            with.push("--with-previous");
            true
        }
        Err(output) => {
            assert!(output.text.contains("not support") || output.text.contains("missing"), "{}", output.text);
            skip("podman-pre", "memory cannot be tracked here");
            false
        }
    };
    podman.must(&[&with[..], &["one"]].concat());
    podman.must(&["rm", "one"]);
    let previous = archive("pre.tar.gz");
    let mut restore = vec!["container", "restore", "--import", &b, "--name", "two"];
    if tracked {
        restore.extend(["--import-previous", &previous]);
    }
    podman.must(&restore);
    podman.is_whole("two");
    podman.end("two");
}

#[test]
fn connections_to_others() {
    let Some(podman) = Podman::new("podman-tcp") else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
    let port = listener.local_addr().unwrap_or_else(|e| panic!("{e}")).port().to_string();
    let script = "n=0; while :; do n=$((n+1)); echo $n; sleep 0.02; done | nc 127.0.0.1 $0 > /data/count";
    if !podman.start("podman-tcp", &["--network", "host"], &["/bin/sh", "-c", script, &port]) {
        return;
    }
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap_or_else(|e| panic!("{e}"));
        let lines = BufReader::new(stream.try_clone().unwrap_or_else(|e| panic!("{e}"))).lines();
        for (line, number) in lines.map_while(Result::ok).zip(1..) {
            assert_eq!(line, format!("{number}"), "a line is lost or there twice");
            if writeln!(stream, "{line}").is_err() {
                break;
            }
        }
    });
    podman.place.counts();
    let refused = podman.place.run("podman", &podman.args(&["container", "checkpoint", "one"]));
    assert!(refused.is_err(), "a connection is carried only if that is asked for");
    assert_eq!(podman.state("one", "Status"), "running");
    podman.place.counts();
    podman.must(&["container", "checkpoint", "--tcp-established", "one"]);
    podman.must(&["container", "restore", "--tcp-established", "one"]);
    podman.place.counts();
    podman.place.counted_all();
    podman.must(&["rm", "--force", "--time", "0", "one"]);
    peer.join().unwrap_or_else(|_| panic!("the peer found something wrong"));
}
