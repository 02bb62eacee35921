//! LXC: `lxc-checkpoint`, which drives CRIU's command line. The container has a veth in a bridge, which
//! LXC looks for in the network that /sys shows: it is this machine's.

use std::fs;

use standstill_tests::container::{errors, Place, LIMIT};
use standstill_tests::process;

use super::{can_start, must};

const ADDRESS: &str = "10.253.77.2";

/// A bridge; it goes with this.
struct Bridge<'p> {
    place: &'p Place,
    name: String,
}

impl Drop for Bridge<'_> {
    fn drop(&mut self) {
        let _ = self.place.run("ip", &["link", "del", &self.name]);
    }
}

fn config(place: &Place, bridge: &str) -> String {
    let rootfs = place.rootfs.display();
    format!(
        "lxc.uts.name = before\n\
         lxc.rootfs.path = dir:{rootfs}\n\
         lxc.net.0.type = veth\n\
         lxc.net.0.link = {bridge}\n\
         lxc.net.0.flags = up\n\
         lxc.net.0.ipv4.address = {ADDRESS}/24\n\
         lxc.console.path = none\n\
         lxc.tty.max = 0\n\
         lxc.autodev = 1\n\
         lxc.mount.auto = proc:mixed sys:ro cgroup:ro\n\
         lxc.mount.entry = tmpfs dev/shm tmpfs rw,nosuid,nodev,create=dir 0 0\n\
         lxc.signal.halt = SIGTERM\n\
         lxc.init.cmd = /bin/sh /work.sh\n"
    )
}

#[test]
fn checkpoint_and_restore() {
    let test = "lxc";
    let Some(place) = Place::new(test, &["lxc-start", "lxc-checkpoint"]) else { return };
    let bridge = Bridge { place: &place, name: format!("ss{}", std::process::id()) };
    must(&place, "ip", &["link", "add", &bridge.name, "type", "bridge"]);
    must(&place, "ip", &["link", "set", &bridge.name, "up"]);
    let home = place.folder.join("lxc");
    let own = home.join(&place.name);
    fs::create_dir_all(&own).unwrap_or_else(|e| panic!("{e}"));
    fs::write(own.join("config"), config(&place, &bridge.name)).unwrap_or_else(|e| panic!("{e}"));
    let (home, name) = (home.display().to_string(), place.name.as_str());
    let which = ["-P", &home, "-n", name];
    if !can_start(test, place.run("lxc-start", &[&which[..], &["-d", "-l", "INFO", "-o", "start.log"]].concat())) {
        return;
    }
    let lxc = |program: &str, args: &[&str]| place.run(program, &[&which[..], args].concat());
    let state = || lxc("lxc-info", &["-s", "-H"]).unwrap_or_else(|o| panic!("{}", o.text)).trim().to_owned();
    let checkpoint = |turn: &str, args: &[&str]| {
        // it takes none that has been used
        let images = place.folder.join(turn);
        let done = lxc("lxc-checkpoint", &[args, &["-D", &images.display().to_string(), "-v"]].concat());
        if let Err(output) = done {
            let logs = ["dump.log", "restore.log"].map(|log| errors(&images.join(log)));
            panic!("lxc-checkpoint {}: {}\n{}", args.join(" "), output.text, logs.join("\n"));
        }
    };
    place.counts();
    for turn in ["first", "second"] {
        checkpoint(turn, &["-s"]);
        assert!(process::within(LIMIT, || state() == "STOPPED"), "it is {}", state());
        checkpoint(turn, &["-r"]);
        assert_eq!(state(), "RUNNING");
        place.counts();
        place.counted_all();
        let inside = |args: &[&str]| {
            lxc("lxc-attach", &[&["--"], args].concat()).unwrap_or_else(|o| panic!("{args:?}: {}", o.text))
        };
        assert_eq!(inside(&["/bin/cat", "/dev/shm/kept"]), "kept\n");
        let page = inside(&["/bin/wget", "-q", "-O", "-", "http://127.0.0.1:8080/count"]);
        assert!(page.starts_with("1\n2\n"), "{page}");
        let addresses = inside(&["/bin/ip", "addr", "show", "dev", "eth0"]);
        assert!(addresses.contains(ADDRESS) && addresses.contains(",UP,"), "{addresses}");
        let bridged = must(&place, "ip", &["-br", "link", "show", "master", &bridge.name]);
        assert!(bridged.lines().count() == 1 && bridged.contains(",UP"), "{bridged}");
    }
    let _ = lxc("lxc-stop", &["--timeout", "20"]);
    place.said_bye();
    assert!(process::within(LIMIT, || state() == "STOPPED"));
}
