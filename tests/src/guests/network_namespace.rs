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

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNGETIFF: u64 = 0x8004_54d2;
const TUNSETQUEUE: u64 = 0x4004_54d9;
/// IFF_…
const TUN: u16 = 1;
const TAP: u16 = 2;
const NO_PI: u16 = 0x1000;
const MULTI_QUEUE: u16 = 0x100;
const PERSIST: u16 = 0x800;
const DETACH_QUEUE: u16 = 0x400;

fn request(file: &std::fs::File, call: u64, name: &str, flags: u16) -> Result<(String, u16), i32> {
    use std::os::fd::AsRawFd as _;
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    if unsafe { libc::ioctl(file.as_raw_fd(), call, request.as_mut_ptr()) } < 0 {
        return Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    // IFF_NOFILTER has the place of IFF_NO_PI
    let of_link = |flags: u16| if call == TUNGETIFF { flags & !NO_PI } else { flags };
    let name: Vec<u8> = request[..16].iter().copied().take_while(|b| *b != 0).collect();
    Ok((String::from_utf8_lossy(&name).into_owned(), of_link(u16::from_ne_bytes([request[16], request[17]]))))
}

fn tun_file(name: &str, flags: u16) -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt as _;
    let file = std::fs::File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
    let file = did(file);
    check!(request(&file, TUNSETIFF, name, flags).is_ok());
    file
}

/// A program that is at the other end of tun and tap links: attached, with several queues, with one that is detached, with none.
pub(super) fn tuns() {
    sys(unsafe { libc::unshare(libc::CLONE_NEWNET) });
    let none = did(std::fs::File::options().read(true).write(true).open("/dev/net/tun"));
    let mut one = tun_file("one", TUN | NO_PI);
    let two = [tun_file("two", TUN | MULTI_QUEUE), tun_file("two", TUN | MULTI_QUEUE)];
    check!(request(&two[1], TUNSETQUEUE, "", DETACH_QUEUE).is_ok());
    run("ip link set lo up; ip tuntap add dev kept mode tap; ip link set kept address 02:00:00:00:00:09 up
         ip addr add 10.7.0.1/24 dev one; ip link set one up mtu 1300; ip route add 10.8.0.0/16 via 10.7.0.9
         ip link set two up; ip addr add 10.9.0.1/24 dev two");
    let kept = tun_file("kept", TAP | NO_PI);
    let socket = did(UdpSocket::bind("10.7.0.1:700"));
    ready();
    check_eq!(request(&none, TUNGETIFF, "", 0), Err(libc::EBADFD));
    check_eq!(request(&one, TUNGETIFF, "", 0), Ok(("one".to_owned(), TUN)));
    let name = || "two".to_owned();
    check_eq!(request(&two[0], TUNGETIFF, "", 0), Ok((name(), TUN | MULTI_QUEUE)));
    check_eq!(request(&two[1], TUNGETIFF, "", 0), Ok((name(), TUN | MULTI_QUEUE | DETACH_QUEUE)));
    check_eq!(request(&kept, TUNGETIFF, "", 0), Ok(("kept".to_owned(), TAP | PERSIST)));
    // what is sent to the link is read here, and what is written here is received from it
    let mut packet = [0; 2000];
    let mut next = |port: u16| loop {
        match one.read(&mut packet) {
            Ok(n) if n == 32 && packet[9] == 17 && packet[22..24] == port.to_be_bytes() => break packet[..n].to_vec(),
            Ok(_) => {}
            // no more is there
            Err(e) => check_eq!(e.kind(), std::io::ErrorKind::WouldBlock),
        }
    };
    did(socket.send_to(b"over", "10.7.0.9:701"));
    let sent = next(701);
    check_eq!(sent[28..], *b"over");
    did(socket.send_to(b"past", "10.8.1.1:702"));
    check_eq!(next(702)[28..], *b"past");
    // the same back: addresses and ports change places, which leaves the sums as they are
    let mut back = sent.clone();
    back[12..16].copy_from_slice(&sent[16..20]);
    back[16..20].copy_from_slice(&sent[12..16]);
    back[20..22].copy_from_slice(&sent[22..24]);
    back[22..24].copy_from_slice(&sent[20..22]);
    // no sum of the datagram
    back[26..28].fill(0);
    did(one.write_all(&back));
    let mut bytes = [0; 8];
    let (n, from) = did(socket.recv_from(&mut bytes));
    check_eq!((&bytes[..n], from.to_string().as_str()), (&b"over"[..], "10.7.0.9:701"));
    check!(run("ip -o link show one").contains("mtu 1300"));
    check!(run("ip -o link show kept").contains("02:00:00:00:00:09"));
    // a link ends with its file, unless it is to stay
    drop((one, two, kept));
    eventually("the end of the links", || {
        let left = run("ip -o link");
        left.contains("kept") && !left.contains("one:") && !left.contains("two:")
    });
}

/// A persistent link of the network that is not the tree's: a file is attached to it again.
pub(super) fn tun_outside() {
    run("ip tuntap add dev mine mode tun; ip addr add 10.7.0.1/24 dev mine; ip link set mine up");
    let mut file = tun_file("mine", TUN | NO_PI);
    let socket = did(UdpSocket::bind("10.7.0.1:700"));
    ready();
    check_eq!(request(&file, TUNGETIFF, "", 0), Ok(("mine".to_owned(), TUN | PERSIST)));
    did(socket.send_to(b"over", "10.7.0.9:701"));
    let mut packet = [0; 2000];
    eventually("the packet", || {
        file.read(&mut packet).is_ok_and(|n| n == 32 && packet[0] == 0x45 && packet[28..32] == *b"over")
    });
}
