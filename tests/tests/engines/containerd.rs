//! containerd: `ctr containers checkpoint` and `ctr containers restore`, `ctr tasks checkpoint`.

use std::fs;

use standstill_tests::container::{Daemon, Place, LIMIT};
use standstill_tests::process;
use standstill_tests::skip::skip;

use super::{can_start, must};

const IMAGE: &str = "docker.io/library/busybox:latest";

#[test]
fn checkpoint_and_restore() {
    let test = "containerd";
    let Some(place) = Place::new(test, &["containerd", "ctr"]) else { return };
    let path = |name: &str| place.folder.join(name).display().to_string();
    // what it would ask the machine for, and tests do not need
    let without =
        ["grpc.v1.cri", "snapshotter.v1.btrfs", "snapshotter.v1.zfs", "snapshotter.v1.aufs", "internal.v1.opt"];
    let without: Vec<String> = without.iter().map(|name| format!("\"io.containerd.{name}\"")).collect();
    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"{}\"\ndisabled_plugins = [{}]\n[grpc]\naddress = \"{}\"\n[ttrpc]\naddress = \"{}\"\n",
        path("containerd"),
        path("state"),
        without.join(", "),
        path("sock"),
        path("sock.ttrpc")
    );
    fs::write(place.folder.join("config.toml"), config).unwrap_or_else(|e| panic!("{e}"));
    let socket = path("sock");
    let daemon = Daemon::start(&place, "containerd", &["-c", &path("config.toml")], &["ctr", "-a", &socket, "version"]);
    let _daemon = match daemon {
        Ok(daemon) => daemon,
        Err(e) => return skip(test, &format!("containerd does not start here: {e}")),
    };
    let base = ["-a", &socket, "--namespace", &place.name];
    let ctr = |args: &[&str]| must(&place, "ctr", &[&base, args].concat());
    ctr(&["images", "import", "--snapshotter", "native", &place.image(IMAGE).display().to_string()]);
    let data = place.rootfs.join("data");
    let mount = format!("type=bind,src={},dst=/data,options=rbind:rw", data.display());
    let run = ["run", "-d", "--snapshotter", "native", "--mount", &mount, IMAGE, "one", "/bin/sh", "/work.sh"];
    if !can_start(test, place.run("ctr", &[&base[..], &run].concat())) {
        return;
    }
    let state = |name: &str| {
        let list = ctr(&["tasks", "ls"]);
        let line = list.lines().find(|line| line.starts_with(name)).map(str::to_owned);
        line.and_then(|line| line.split_whitespace().last().map(str::to_owned))
    };
    let gone = |name: &str| {
        assert!(process::within(LIMIT, || state(name).as_deref() != Some("RUNNING")), "{name} still runs");
        let _ = place.run("ctr", &[&base[..], &["tasks", "rm", name]].concat());
        ctr(&["containers", "rm", name]);
    };
    place.counts();
    ctr(&["tasks", "exec", "--exec-id", "a", "one", "touch", "/changed"]);

    // it runs on; the checkpoint with all that belongs to it becomes an image
    ctr(&["containers", "checkpoint", "--rw", "--image", "--task", "one", "checkpoint"]);
    assert_eq!(state("one").as_deref(), Some("RUNNING"));
    place.counts();
    place.counted_all();
    ctr(&["tasks", "kill", "-s", "KILL", "one"]);
    gone("one");
    ctr(&["containers", "restore", "--rw", "--live", "two", "checkpoint"]);
    assert_eq!(state("two").as_deref(), Some("RUNNING"));
    place.counts();
    let all = place.counted();
    let back = all.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
    assert_eq!(back, 1, "it goes on once from where it was at the checkpoint: {all:?}");
    assert_eq!(ctr(&["tasks", "exec", "--exec-id", "b", "two", "cat", "/dev/shm/kept"]), "kept\n");
    ctr(&["tasks", "exec", "--exec-id", "c", "two", "ls", "/changed"]);

    // with its end, into a folder
    ctr(&["tasks", "checkpoint", "--exit", "--image-path", &path("images"), "--work-path", &path("work"), "two"]);
    assert!(place.folder.join("images/inventory.img").exists());
    gone("two");
}
