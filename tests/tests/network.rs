//! Connections to somebody who is not dumped, and restores into a network that is not as it was.

use std::io::{Read, Write};
use std::net::{SocketAddrV6, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;

/// Who is left behind can be told only if nobody else starts processes.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Bytes that go each way.
const ALL: u64 = 100 << 20;

/// The byte at a place of what the client sends.
struct Sequence(u64);

impl Sequence {
    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            // xorshift: no run of bytes comes twice
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            *byte = self.0.to_le_bytes()[3];
        }
    }
}

/// FNV-1a.
fn hash(mut hash: u64, bytes: &[u8]) -> u64 {
    for byte in bytes {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    }
    hash
}

/// Bytes in queues that are worth a dump.
const ENOUGH: u64 = 10_000;

/// What is in the queues of a connection of a process, as its kernel lists it.
fn on_the_way(pid: i32, port: u16) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default();
    let established = text
        .lines()
        .map(|l| l.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() > 4 && words[1].ends_with(&format!(":{port:04X}")) && words[3] == "01");
    let bytes = |hex: &str| u64::from_str_radix(hex, 16).unwrap_or(0);
    established.filter_map(|words| words[4].split_once(':').map(|(sent, received)| bytes(sent) + bytes(received))).sum()
}

/// A client outside of the tree sends 100 MiB to a server that sends them back; the server is dumped, dead and restored, several
/// times, with data on the way both ways. No byte is lost or comes twice.
#[test]
fn a_client_outside_keeps_its_connection() {
    let _alone = alone();
    let mut run = Run::start("tcp_echo");
    let port: u16 = std::fs::read_to_string(run.file("port")).unwrap_or_default().parse().unwrap_or(0);
    let mut to = TcpStream::connect(("127.0.0.1", port)).unwrap_or_else(|e| panic!("{e}"));
    let mut from = to.try_clone().unwrap_or_else(|e| panic!("{e}"));
    for stream in [&to, &from] {
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap_or_else(|e| panic!("{e}"));
    }
    let sends = std::thread::spawn(move || {
        let (mut sequence, mut sum, mut bytes) =
            (Sequence(88_172_645_463_325_252), 0xcbf2_9ce4_8422_2325, vec![0; 64 << 10]);
        let mut left = ALL;
        while left > 0 {
            let n = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            sequence.fill(&mut bytes[..n]);
            sum = hash(sum, &bytes[..n]);
            to.write_all(&bytes[..n]).unwrap_or_else(|e| panic!("sending, with {left} left: {e}"));
            left -= n as u64;
        }
        to.shutdown(std::net::Shutdown::Write).unwrap_or_else(|e| panic!("{e}"));
        sum
    });
    let got = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counts = got.clone();
    let receives = std::thread::spawn(move || {
        let (mut sum, mut bytes) = (0xcbf2_9ce4_8422_2325, vec![0; 64 << 10]);
        loop {
            match from.read(&mut bytes) {
                Ok(0) => return sum,
                Ok(n) => {
                    sum = hash(sum, &bytes[..n]);
                    counts.fetch_add(n as u64, std::sync::atomic::Ordering::Relaxed);
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => panic!("receiving: {e}"),
            }
            // slower than it sends, so that all queues are full
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    let engine = Engine::ours();
    let (mut dumps, mut full) = (0, 0);
    loop {
        let so_far = got.load(std::sync::atomic::Ordering::Relaxed);
        if so_far > ALL / 8 * (dumps + 1) && (on_the_way(run.pid, port) > ENOUGH || receives.is_finished()) {
            dumps += 1;
            let images = run.images(&format!("images-{dumps}"));
            run.dump(&engine, &images);
            // the client meets silence
            std::thread::sleep(Duration::from_millis(300));
            let size = |name: &str| -> u64 {
                let all = std::fs::read_dir(&images).into_iter().flatten().flatten();
                let named = all.filter(|e| e.file_name().to_string_lossy().starts_with(name));
                named.filter_map(|e| e.metadata().ok()).map(|m| m.len()).sum()
            };
            // who sends may not have had its turn since we looked
            full += u32::from(size("tcp-stream-") > ENOUGH);
            run.restore(&engine, &images);
        }
        if receives.is_finished() || dumps == 6 {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let (sent, received) = (sends.join(), receives.join());
    assert_eq!(got.load(std::sync::atomic::Ordering::Relaxed), ALL);
    assert_eq!(sent.ok(), received.ok(), "the hashes differ");
    assert!(full >= 4, "there were {dumps} dumps, {full} of them with data on the way");
    run.check(How::Restored);
}

/// Nothing of a restore is left: no process, no rule, and the images restore when the way is free.
fn refused_then_restored(
    run: &mut Run,
    images: &std::path::Path,
    options: &[&str],
    words: &[&str],
    free: impl FnOnce(),
) {
    let engine = Engine::ours();
    let children = process::own_children();
    match engine.restore(images, options) {
        Ok(_) => panic!("{words:?}: it was restored"),
        Err(e) => {
            assert_eq!(e.code, Some(1), "{e}");
            let errors: Vec<&str> = e.text.lines().filter(|l| l.contains("Error") && !l.contains("FAILED")).collect();
            for word in words {
                assert!(errors.iter().any(|l| l.contains(word)), "nothing about {word:?} in:\n{e}");
            }
        }
    }
    assert_eq!(process::own_children(), children, "processes are left behind");
    assert!(!process::exists(run.pid), "the guest is half there");
    free();
    run.restore(&engine, images);
    run.check(How::Restored);
}

fn dumped(name: &str) -> (Run, std::path::PathBuf) {
    let mut run = Run::start(name);
    let images = run.images("images");
    run.dump(&Engine::ours(), &images);
    (run, images)
}

#[test]
fn a_port_in_use() {
    let _alone = alone();
    let (mut run, images) = dumped("inet_bound");
    let taken = TcpListener::bind("127.0.0.1:7004").unwrap_or_else(|e| panic!("{e}"));
    refused_then_restored(&mut run, &images, &[], &["the port of TCP socket", "7004", "is in use"], || drop(taken));
}

/// Takes a connection that the guest had; the packets that are sent for it meet the lock of the dump.
fn taken(run: &Run) -> OwnedFd {
    let text = std::fs::read_to_string(run.file("ends")).unwrap_or_default();
    let ends: Vec<SocketAddrV6> = text.split_whitespace().filter_map(|end| end.parse().ok()).collect();
    let [from, to] = ends[..] else { panic!("{text:?} are no two ends") };
    process::connect_from(from, to).unwrap_or_else(|e| panic!("{text}: {e}"))
}

#[test]
fn a_connection_that_somebody_has() {
    let _alone = alone();
    let (mut run, images) = dumped("tcp_states");
    let taken = taken(&run);
    let words = ["the connection from", "is somebody else's now"];
    refused_then_restored(&mut run, &images, &["--tcp-established"], &words, || drop(taken));
}

#[test]
fn an_interface_that_is_gone() {
    let _alone = alone();
    if !Command::new("ip").arg("-V").status().is_ok_and(|s| s.success()) {
        standstill_tests::skip::skip("an_interface_that_is_gone", "there is no ip(8)");
        return;
    }
    let ip = |words: &str| {
        let status = Command::new("ip").args(words.split_whitespace()).status();
        assert!(status.is_ok_and(|s| s.success()), "ip {words}");
    };
    process::private_network();
    ip("link add standstill0 type veth peer name standstill1");
    let mut run = Run::start("inet_device");
    let images = run.images("images");
    run.dump(&Engine::ours(), &images);
    ip("link del standstill0");
    let words = ["SO_BINDTODEVICE", "No such device"];
    refused_then_restored(&mut run, &images, &[], &words, || {
        ip("link add standstill0 type veth peer name standstill1")
    });
}

/// After a dump and its restore, and after a restore that failed, there is no table of ours.
#[test]
fn no_rule_is_left() {
    let _alone = alone();
    if !Command::new("nft").arg("-v").status().is_ok_and(|s| s.success()) {
        standstill_tests::skip::skip("no_rule_is_left", "there is no nft(8)");
        return;
    }
    let (mut run, images) = dumped("tcp_states");
    assert_eq!(rules(), 1, "connections are locked while nobody has them");
    let taken = taken(&run);
    let refused = Engine::ours().restore(&images, &["--tcp-established"]);
    assert!(refused.is_err());
    assert_eq!(rules(), 1, "a restore that failed leaves the lock of the dump, and no other");
    drop(taken);
    run.restore(&Engine::ours(), &images);
    assert_eq!(rules(), 0, "the restore lifts it");
    run.check(How::Restored);
}

/// Tables that nft(8) lists.
fn rules() -> usize {
    let output = Command::new("nft").args(["list", "tables"]).output().unwrap_or_else(|e| panic!("nft: {e}"));
    String::from_utf8_lossy(&output.stdout).lines().filter(|l| l.contains("CRIU-")).count()
}
