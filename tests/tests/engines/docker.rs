//! Docker: `checkpoint create` and `start --checkpoint` of an experimental daemon, without a network of its own.

use std::fs;

use serde_json::json;
use standstill_tests::container::{Daemon, Place, EXIT, LIMIT};
use standstill_tests::process;
use standstill_tests::skip::skip;

use super::{can_start, must};

#[test]
fn create_and_start() {
    let test = "docker";
    let Some(place) = Place::new(test, &["dockerd", "docker", "ctr"]) else { return };
    let path = |name: &str| place.folder.join(name).display().to_string();
    let socket = format!("unix://{}", path("sock"));
    let config = json!({
        "experimental": true, "storage-driver": "vfs", "iptables": false, "ip6tables": false, "bridge": "none",
        "data-root": path("docker"), "exec-root": path("exec"), "pidfile": path("pid"), "hosts": [&socket],
        "cgroup-parent": format!("/{}", place.name),
        // limits cannot be raised everywhere
        "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 1024, "Soft": 1024}}
    });
    fs::write(place.folder.join("daemon.json"), config.to_string()).unwrap_or_else(|e| panic!("{e}"));
    let daemon = Daemon::start(
        &place,
        "dockerd",
        &["--config-file", &path("daemon.json")],
        &["docker", "-H", &socket, "version"],
    );
    let _daemon = match daemon {
        Ok(daemon) => daemon,
        Err(e) => return skip(test, &format!("dockerd does not start here: {e}")),
    };
    let docker = |args: &[&str]| must(&place, "docker", &[&["-H", &socket], args].concat());
    docker(&["import", &place.tar().display().to_string(), "busybox"]);
    let volume = format!("{}:/data", place.rootfs.join("data").display());
    let run = ["-H", &socket, "run", "-d", "--name", "one", "--network", "none", "-v", &volume];
    if !can_start(test, place.run("docker", &[&run[..], &["busybox", "/bin/sh", "/work.sh"]].concat())) {
        return;
    }
    let state =
        |what: &str| docker(&["inspect", "--format", &format!("{{{{.State.{what}}}}}"), "one"]).trim().to_owned();
    // Docker hands each checkpoint to containerd, deletes it there without waiting, and fails over what is still there
    let containerd = path("exec/containerd/containerd.sock");
    let ctr = |args: &[&str]| must(&place, "ctr", &[&["-a", &containerd, "-n", "moby"], args].concat());
    let forget = || {
        for digest in ctr(&["content", "ls", "-q"]).lines() {
            ctr(&["content", "rm", digest]);
        }
    };
    let create = |args: &[&str]| {
        forget();
        docker(&[&["checkpoint", "create"], args].concat());
    };
    let start = |name: &str| {
        forget();
        docker(&["start", "--checkpoint", name, "one"]);
    };
    place.counts();
    docker(&["exec", "one", "touch", "/changed"]);

    create(&["--leave-running", "one", "first"]);
    assert_eq!(state("Running"), "true");
    place.counts();
    for name in ["second", "third"] {
        create(&["one", name]);
        assert_eq!(state("Running"), "false");
        start(name);
        place.counts();
        place.counted_all();
    }
    let list = docker(&["checkpoint", "ls", "one"]);
    assert!(["first", "second", "third"].iter().all(|name| list.contains(name)), "{list}");
    assert_eq!(docker(&["exec", "one", "cat", "/dev/shm/kept"]), "kept\n");
    docker(&["exec", "one", "ls", "/changed"]);
    docker(&["kill", "--signal", "TERM", "one"]);
    place.said_bye();
    assert!(process::within(LIMIT, || state("Running") == "false"));
    assert_eq!(state("ExitCode"), EXIT.to_string());
    docker(&["rm", "--force", "one"]);
}
