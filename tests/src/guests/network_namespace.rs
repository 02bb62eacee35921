//! Network namespaces of a tree's own: what is in them, and sockets in them.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};

use super::support::*;

/// Runs commands of a shell here: what they say.
fn run(commands: &str) -> String {
    let output = did(Command::new("/bin/sh")
        .args(["-ec", &format!("PATH=$PATH:/usr/sbin:/sbin; {commands}")])
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .output());
    if !output.status.success() {
        fail(format_args!("{commands}: {}", String::from_utf8_lossy(&output.stderr)));
    }
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Carriers come, and IPv6 addresses are ready, some time after a link is up.
fn wait_for_addresses(links: &[&str]) {
    for link in links {
        eventually("an address of its own", || {
            let said = run(&format!("ip -o addr show dev {link}; ip -o link show dev {link}"));
            said.contains("fe80") && !said.contains("tentative") && !said.contains("NO-CARRIER")
        });
    }
}

fn setting(name: &str) -> String {
    did(std::fs::read_to_string(format!("/proc/sys/net/{name}"))).trim().to_owned()
}

/// A connection within this namespace, each end with four bytes that it has not read.
fn connection(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = did(TcpListener::bind(address));
    let mut client = did(TcpStream::connect(did(listener.local_addr())));
    let (mut server, _) = did(listener.accept());
    did(client.write_all(b"here"));
    did(server.write_all(b"back"));
    (listener, client, server)
}

fn check_connection((listener, client, server): &mut (TcpListener, TcpStream, TcpStream)) {
    let mut bytes = [0; 4];
    did(client.read_exact(&mut bytes));
    check_eq!(bytes, *b"back");
    did(server.read_exact(&mut bytes));
    check_eq!(bytes, *b"here");
    did(server.write_all(b"more"));
    did(client.read_exact(&mut bytes));
    check_eq!(bytes, *b"more");
    let mut other = did(TcpStream::connect(did(listener.local_addr())));
    did(did(listener.accept()).0.write_all(b"next"));
    did(other.read_exact(&mut bytes));
    check_eq!(bytes, *b"next");
}

/// Links, addresses, routes, rules, settings, a firewall, and connections in it.
pub(super) fn namespace() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    run("ip link set lo up
         ip link add left type veth peer name right; ip link set left address 02:00:00:00:00:07 mtu 1400
         ip addr add 10.1.0.1/24 dev left; ip addr add 10.1.0.2/24 dev left; ip -6 addr add fd00:1::1/64 dev left nodad
         ip link set left up; ip link set right up
         ip link add bridge type bridge; ip link add port type veth peer name other
         ip link set port master bridge; ip link set bridge up; ip link set port up; ip link set other up
         ip route add 10.9.0.0/16 via 10.1.0.7; ip route add 10.8.0.0/16 dev left metric 5
         ip -6 route add fd00:9::/32 via fd00:1::7; ip rule add from 10.1.0.2 lookup main pref 100
         nft add table inet mine; nft 'add chain inet mine in { type filter hook input priority 0 ; }'
         nft add rule inet mine in ct state established accept; nft add rule inet mine in ip saddr 1.2.3.4 drop");
    did(std::fs::write("/proc/sys/net/ipv4/conf/left/proxy_arp", "1"));
    did(std::fs::write("/proc/sys/net/ipv4/ip_forward", "1"));
    did(std::fs::write("/proc/sys/net/unix/max_dgram_qlen", "77"));
    wait_for_addresses(&["left", "right", "bridge", "port", "other"]);
    let say = || {
        run("ip -o link | sed 's/ qlen.*link/ link/'; ip -o addr | sed 's/valid_lft.*//' | sort
             ip route | sort; ip -6 route | sort; ip rule; nft list ruleset")
    };
    let before = say();
    let mut over_v4 = connection("10.1.0.1:0");
    let mut over_v6 = connection("[fd00:1::1]:0");
    let datagrams = did(UdpSocket::bind("10.1.0.2:0"));
    let bound = did(datagrams.local_addr());
    let namespace = did(std::fs::File::open("/proc/self/ns/net"));
    ready();
    eventually("what there was", || say() == before);
    check_eq!(setting("ipv4/conf/left/proxy_arp"), "1");
    check_eq!(setting("ipv4/ip_forward"), "1");
    check_eq!(setting("unix/max_dgram_qlen"), "77");
    check_connection(&mut over_v4);
    check_connection(&mut over_v6);
    check_eq!(did(datagrams.local_addr()), bound);
    did(did(UdpSocket::bind("127.0.0.1:0")).send_to(b"x", bound));
    check_eq!(did(datagrams.recv(&mut [0; 4])), 1);
    // what it has open is where it is
    let inode = |file: std::fs::Metadata| std::os::unix::fs::MetadataExt::ino(&file);
    check_eq!(inode(did(namespace.metadata())), inode(did(std::fs::metadata("/proc/self/ns/net"))));
}

/// Two namespaces, and a connection from one to the other.
pub(super) fn several() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    let (out, into) = super::pipes::pipe(0);
    let (answer, say) = super::pipes::pipe(0);
    let child = fork(|| {
        sys(unsafe { libc::unshare(libc::CLONE_NEWNET) });
        run("ip link set lo up");
        super::pipes::write(say, b"n");
        // the link is here, and so is the way back
        check_eq!(super::pipes::read(out), Ok(b"l".to_vec()));
        run("ip addr add 10.2.0.2/24 dev far; ip link set far up");
        wait_for_addresses(&["far"]);
        let listener = did(TcpListener::bind("10.2.0.2:7000"));
        super::pipes::write(say, b"b");
        let (mut server, _) = did(listener.accept());
        did(server.write_all(b"away"));
        super::pipes::write(say, b"c");
        let mut bytes = [0; 4];
        did(server.read_exact(&mut bytes));
        check_eq!(bytes, *b"home");
        check!(run("ip -o addr show dev far").contains("10.2.0.2/24"));
        check!(!run("ip -o link").contains("near"));
        0
    });
    check_eq!(super::pipes::read(answer), Ok(b"n".to_vec()));
    run(&format!("ip link set lo up; ip link add near type veth peer name far netns {child}"));
    run("ip addr add 10.2.0.1/24 dev near; ip link set near up");
    super::pipes::write(into, b"l");
    check_eq!(super::pipes::read(answer), Ok(b"b".to_vec()));
    wait_for_addresses(&["near"]);
    let mut client = did(TcpStream::connect("10.2.0.2:7000"));
    check_eq!(super::pipes::read(answer), Ok(b"c".to_vec()));
    ready();
    let mut bytes = [0; 4];
    did(client.read_exact(&mut bytes));
    check_eq!(bytes, *b"away");
    did(client.write_all(b"home"));
    check_eq!(wait(child), 0);
    check!(run("ip -o addr show dev near").contains("10.2.0.1/24"));
}
