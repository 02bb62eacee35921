#![allow(clippy::unwrap_used)]
//! Namespaces are built with the kernel's own means or with ip(8), dumped, made again, and compared by what a second dump says.

use std::path::Path;
use std::process::Command;

use standstill_images::FolderStore;

use super::*;
use crate::options::External;

/// Are we who may make namespaces?
fn may() -> bool {
    let may = rustix::process::geteuid().is_root() && create().is_ok();
    if !may {
        eprintln!("skipped: it needs root, and CAP_SYS_ADMIN");
    }
    may
}

fn has(program: &str) -> bool {
    let has = crate::sockets::netlock::find(program).is_some();
    if !has {
        eprintln!("skipped: there is no {program}");
    }
    has
}

fn run(namespace: &OwnedFd, command: &str) -> String {
    inside(namespace.as_fd(), || {
        let output = Command::new("/bin/sh").args(["-ec", command]).output().call("sh")?;
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    })
    .unwrap()
}

struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> (Folder, Images) {
        let path = std::env::temp_dir().join(format!("standstill-network-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        let images = Images::new(FolderStore::open(&path).unwrap());
        (Folder(path), images)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Every image of the folder.
fn content(folder: &Path) -> std::collections::BTreeMap<String, Vec<u8>> {
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap());
    files.map(|f| (f.file_name().into_string().unwrap(), std::fs::read(f.path()).unwrap())).collect()
}

fn restore(images: &Images, opts: &Options, ids: &[u32]) -> Result<Networks> {
    let mut networks = Networks::read(images, opts, ids, false)?;
    for &id in ids {
        networks.set(id, create()?);
    }
    networks.prepare(opts, &|| Ok(()))?;
    networks.fill(opts, &|| Ok(()))?;
    Ok(networks)
}

/// Dumps, makes again, dumps again: what `ip` and the like say must be the same, and so must the images.
fn there_and_back(name: &str, spaces: &[OwnedFd], opts: &Options, questions: &[&str]) {
    let (folder, images) = Folder::new(name);
    let (again_folder, again_images) = Folder::new(&format!("{name}-again"));
    let before: Vec<_> = spaces.iter().flat_map(|s| questions.iter().map(|q| run(s, q))).collect();
    let ids: Vec<u32> = (0..spaces.len()).map(|i| 10 + i as u32).collect();
    let all: Vec<_> = ids.iter().copied().zip(spaces.iter().map(AsFd::as_fd)).collect();
    ids.iter().for_each(|id| dump(&images, opts, *id, &all, &Default::default()).unwrap());
    let networks = restore(&images, opts, &ids).unwrap();
    let made: Vec<_> = ids.iter().map(|id| networks.fds[id].try_clone().unwrap()).collect();
    let ask = || made.iter().flat_map(|s| questions.iter().map(|q| run(s, q))).collect::<Vec<_>>();
    let mut after = ask();
    // whether there is a carrier, the kernel finds out within a second
    let started = Instant::now();
    while after != before && started.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(50));
        after = ask();
    }
    for (before, after) in before.iter().zip(&after) {
        assert_eq!(before, after);
    }
    let all: Vec<_> = ids.iter().copied().zip(made.iter().map(AsFd::as_fd)).collect();
    ids.iter().for_each(|id| dump(&again_images, opts, *id, &all, &Default::default()).unwrap());
    let (first, second) = (content(&folder.0), content(&again_folder.0));
    assert_eq!(first.keys().collect::<Vec<_>>(), second.keys().collect::<Vec<_>>());
    for (name, bytes) in &first {
        // addresses say when they were made, and so do routes that end, tracked connections how long they last
        if !["ifaddr", "route6", "netns-ct"].iter().any(|kind| name.starts_with(kind)) {
            assert!(without_moments(name, bytes) == without_moments(name, &second[name]), "{name} differs");
        }
    }
}

#[test]
fn an_empty_one_comes_back_as_it_is() {
    if may() {
        there_and_back("empty", &[create().unwrap()], &Options::default(), &[]);
    }
}

#[test]
fn links_addresses_routes_and_rules_come_back() {
    if !may() || !has("ip") {
        return;
    }
    let space = create().unwrap();
    run(
        &space,
        "ip link set lo up
         ip link add left type veth peer name right
         ip link set left address 02:00:00:00:00:07 mtu 1400
         ip addr add 10.1.0.1/24 dev left; ip addr add 10.1.0.2/24 dev left
         ip -6 addr add fd00:1::1/64 dev left nodad; ip -6 addr add fd00:1::2/64 dev left preferred_lft 1000 valid_lft 5000
         ip link set left up; ip link set right up
         ip route add 10.9.0.0/16 via 10.1.0.7; ip route add 10.8.0.0/16 via 10.9.0.1 onlink dev left table 77 metric 5
         ip route add 10.7.0.0/16 nexthop via 10.1.0.8 weight 2 nexthop via 10.1.0.9
         ip -6 route add fd00:9::/32 via fd00:1::7; ip route add blackhole 10.6.0.0/16
         ip rule add from 10.1.0.2 lookup 77 pref 100; ip -6 rule add from fd00:1::2 lookup 77 pref 101
         ip link add bridge type bridge; ip link add port type veth peer name other; ip link set port master bridge
         ip link set bridge up; ip link set port up; ip link set other up
         ip link add upper link left type macvlan mode bridge; ip link set upper up
         echo 1 > /proc/sys/net/ipv4/conf/left/proxy_arp; echo 0 > /proc/sys/net/ipv6/conf/right/accept_ra
         echo 2 > /proc/sys/net/ipv4/conf/all/rp_filter; echo 1 > /proc/sys/net/ipv4/conf/all/forwarding
         echo 77 > /proc/sys/net/unix/max_dgram_qlen; echo '5 6' > /proc/sys/net/ipv4/ping_group_range
         for link in left right bridge port other upper; do
           until ip -o addr show dev $link | grep fe80 | grep -vq tentative; do sleep 0.1; done
         done",
    );
    let questions = [
        "ip -o link | sed 's/ qlen.*link/ link/'",
        "ip -o addr | sed 's/valid_lft.*//' | sort",
        "ip route show table all | sort",
        "ip -6 route show table all | sed 's/ expires [0-9]*sec//' | sort",
        "ip rule; ip -6 rule",
        "cat /proc/sys/net/ipv4/conf/left/* /proc/sys/net/ipv6/conf/right/* 2>/dev/null | grep -v :",
        "cat /proc/sys/net/ipv4/conf/all/* /proc/sys/net/unix/max_dgram_qlen /proc/sys/net/ipv4/ping_group_range",
    ];
    there_and_back("links", &[space], &Options::default(), &questions);
}

#[test]
fn a_veth_pair_between_two_namespaces_comes_back() {
    if !may() || !has("ip") {
        return;
    }
    let (one, other) = (create().unwrap(), create().unwrap());
    {
        use std::os::fd::AsRawFd;
        let fd = other.as_raw_fd();
        run(&one, &format!("ip link add near type veth peer name far netns /proc/{}/fd/{fd}", std::process::id()));
    }
    run(&one, "ip link set lo up; ip addr add 10.2.0.1/24 dev near; ip link set near up");
    run(&other, "ip addr add 10.2.0.2/24 dev far; ip link set far up");
    run(&one, "until ip -o addr show dev near | grep fe80 | grep -vq tentative; do sleep 0.1; done");
    run(&other, "until ip -o addr show dev far | grep fe80 | grep -vq tentative; do sleep 0.1; done");
    let questions = ["ip -o link | sed 's/ qlen.*link/ link/'", "ip -o addr | sed 's/valid_lft.*//' | sort"];
    there_and_back("pair", &[one, other], &Options::default(), &questions);
}

#[test]
fn a_veth_to_the_outside_needs_to_be_told() {
    if !may() || !has("ip") {
        return;
    }
    let (space, outside) = (create().unwrap(), create().unwrap());
    {
        use std::os::fd::AsRawFd;
        let fd = outside.as_raw_fd();
        run(&space, &format!("ip link add in type veth peer name out netns /proc/{}/fd/{fd}", std::process::id()));
        run(&space, "ip link set in up; ip addr add 10.3.0.1/24 dev in");
    }
    let (_folder, images) = Folder::new("outside");
    dump(&images, &Options::default(), 1, &[(1, space.as_fd())], &Default::default()).unwrap();
    // the host is a namespace of its own here
    let host = create().unwrap();
    run(&host, "ip link add br9 type bridge");
    inside(host.as_fd(), || {
        let error = restore(&images, &Options::default(), &[1]).unwrap_err().chain();
        assert!(error.contains("--external veth[in]:NAME"), "{error}");
        let opts = Options { external: vec![External::parse("veth[in]:out7@br9")], ..Options::default() };
        restore(&images, &opts, &[1]).map(drop)
    })
    .unwrap();
    // the pair went with its namespace, whose last descriptor is closed: that it was there is seen while it is
    inside(host.as_fd(), || {
        let opts = Options { external: vec![External::parse("veth[in]:out8@br9")], ..Options::default() };
        let networks = restore(&images, &opts, &[1])?;
        let links = run(&own()?, "ip -o link show master br9");
        assert!(links.contains("out8@") && links.contains("UP"), "{links}");
        assert!(run(&networks.fds[&1], "ip -o addr show dev in").contains("10.3.0.1/24"));
        Ok(())
    })
    .unwrap();
    // one that is there is moved in
    run(&host, "ip link add mine type veth peer name rest");
    inside(host.as_fd(), || {
        let opts = Options { external: vec![External::parse("netdev[in]:mine")], ..Options::default() };
        let networks = restore(&images, &opts, &[1])?;
        assert!(run(&networks.fds[&1], "ip -o addr show dev in").contains("10.3.0.1/24"));
        assert!(!run(&own()?, "ip -o link").contains("mine"));
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_macvlan_finds_its_parent() {
    if !may() || !has("ip") {
        return;
    }
    let host = create().unwrap();
    let (space, _folder, images) = {
        let space = create().unwrap();
        use std::os::fd::AsRawFd;
        run(&host, "ip link add parent type bridge; ip link set parent up; ip link add mac0 link parent type macvlan");
        run(&host, &format!("ip link set mac0 netns /proc/{}/fd/{}", std::process::id(), space.as_raw_fd()));
        run(&space, "ip link set mac0 up");
        let (folder, images) = Folder::new("macvlan");
        dump(&images, &Options::default(), 1, &[(1, space.as_fd())], &Default::default()).unwrap();
        (space, folder, images)
    };
    drop(space);
    inside(host.as_fd(), || {
        let error = restore(&images, &Options::default(), &[1]).unwrap_err().chain();
        assert!(error.contains("a macvlan parent for mac0 is required"), "{error}");
        let opts = Options { external: vec![External::parse("macvlan[mac0]:parent")], ..Options::default() };
        // the old link, with the same address, ends some time after the last descriptor of its namespace
        let started = Instant::now();
        let networks = loop {
            match restore(&images, &opts, &[1]) {
                Err(e) if e.errno() == libc::EADDRINUSE && started.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                other => break other?,
            }
        };
        assert!(run(&networks.fds[&1], "ip -o -d link show mac0").contains("macvlan mode vepa"));
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_persistent_tap_comes_back() {
    if !may() || !has("ip") || !Path::new("/dev/net/tun").exists() {
        return;
    }
    let space = create().unwrap();
    run(&space, "ip tuntap add dev tap5 mode tap user 7 group 8 multi_queue; ip tuntap add dev tun6 mode tun pi");
    run(&space, "ip link set tap5 up; ip addr add 10.4.0.1/24 dev tap5");
    let questions = ["ip -o -d link show tap5", "ip -o -d link show tun6", "ip tuntap list | sort"];
    there_and_back("tap", &[space], &Options::default(), &questions);
}

#[test]
fn what_cannot_be_carried_is_refused_by_name() {
    if !may() || !has("ip") {
        return;
    }
    let refusal = |commands: &str| {
        let space = create().unwrap();
        run(&space, commands);
        let (_folder, images) = Folder::new("refused");
        dump(&images, &Options::default(), 1, &[(1, space.as_fd())], &Default::default()).unwrap_err().chain()
    };
    let error = refusal("ip link add tunnel type vxlan id 5 dstport 0");
    assert!(error.contains("the network link tunnel (vxlan, type 1) cannot be carried"), "{error}");
    let error = refusal("ip link set lo up; ip nexthop add id 1 blackhole");
    assert!(error.contains("a next hop object"), "{error}");
}

#[test]
fn a_firewall_and_connections_come_back() {
    if !may() || !has("ip") || !has("nft") {
        return;
    }
    let space = create().unwrap();
    run(
        &space,
        "ip link set lo up
         nft add table inet mine; nft 'add chain inet mine in { type filter hook input priority 0 ; }'
         nft add rule inet mine in ct state established,related accept; nft add rule inet mine in ip saddr 1.2.3.4 drop
         nft 'add set inet mine some { type ipv4_addr; }'; nft add element inet mine some '{ 10.0.0.1, 10.0.0.2 }'",
    );
    let mut questions = vec!["nft list ruleset"];
    if has("iptables-legacy") {
        run(&space, "iptables-legacy -A INPUT -s 9.8.7.6 -j DROP; ip6tables-legacy -P FORWARD DROP");
        questions.extend(["iptables-legacy-save | grep -v '^#'", "ip6tables-legacy-save | grep -v '^#'"]);
    }
    // a connection that is tracked
    inside(space.as_fd(), || {
        let listener = std::net::TcpListener::bind("127.0.0.1:7000").call("bind")?;
        let _client = std::net::TcpStream::connect("127.0.0.1:7000").call("connect")?;
        let _server = listener.accept().call("accept")?;
        let (folder, images) = Folder::new("tracked");
        let here = own()?;
        dump(&images, &Options::default(), 1, &[(1, here.as_fd())], &Default::default())?;
        assert!(content(&folder.0).contains_key("netns-ct-1.img"));
        let networks = restore(&images, &Options::default(), &[1])?;
        let (second, again) = Folder::new("tracked-again");
        dump(&again, &Options::default(), 1, &[(1, networks.fds[&1].as_fd())], &Default::default())?;
        let image = &content(&second.0)["netns-ct-1.img"];
        let messages = netlink::messages(image)?;
        // 127.0.0.1, the port: the tuple of the connection is among them
        assert!(messages.iter().any(|m| m.windows(2).any(|w| w == 7000u16.to_be_bytes())));
        Ok(())
    })
    .unwrap();
    let fresh = create().unwrap();
    run(&fresh, "nft add table inet mine; nft 'add chain inet mine in { type filter hook input priority 0 ; }'");
    there_and_back("firewall", &[space], &Options::default(), &questions);
}

/// iptables-save notes when it ran, and packets are counted: neighbours are looked for all the time.
fn without_moments(name: &str, bytes: &[u8]) -> Vec<u8> {
    if !name.contains("tables") || name.starts_with("nftables") {
        return bytes.to_vec();
    }
    let text = String::from_utf8_lossy(bytes);
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split('[').next().unwrap_or("").to_owned() + "\n").collect::<String>().into_bytes()
}

#[test]
fn bad_images_are_told() {
    if !may() {
        return;
    }
    let space = create().unwrap();
    let (folder, images) = Folder::new("bad");
    dump(&images, &Options::default(), 1, &[(1, space.as_fd())], &Default::default()).unwrap();
    for (name, bytes) in [
        ("ifaddr-1.img", &b"\x22\x12\x36\x47\x10\0\0\0\x14\0\0\0"[..]),
        ("route-1.img", b"junk"),
        ("rule-1.img", b"\x86"),
        ("netns-ct-1.img", &[255; 40]),
        ("netdev-1.img", &[0; 20]),
    ] {
        let path = folder.0.join(name);
        let good = std::fs::read(&path).ok();
        std::fs::write(&path, bytes).unwrap();
        let error = restore(&images, &Options::default(), &[1]).unwrap_err().chain();
        assert!(error.contains(name), "{error}");
        match good {
            Some(good) => std::fs::write(&path, good).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
    }
    restore(&images, &Options::default(), &[1]).unwrap();
}
