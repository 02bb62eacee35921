//! Memory that comes when it is first touched: from images, from a page server, from a dump that waits; with CRIU's programs as the
//! other side; and what becomes of a tree whose memory cannot come.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::program::free_port;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// Guests that compare all of /proc/PID/smaps.
const LOOK_AT_AREAS: [&str; 3] = ["memory_advice", "memory_private", "memory_layout"];
const LIMIT: Duration = Duration::from_secs(60);

/// Something that runs beside the test.
struct Beside {
    child: Child,
    log: PathBuf,
}

impl Beside {
    fn start(engine: &Engine, verb: &str, images: &Path, options: &[&str]) -> Beside {
        let mut command = engine.command(verb, images, options);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        Beside { child: child.unwrap_or_else(|e| panic!("{verb}: {e}")), log: images.join(format!("{verb}.log")) }
    }

    /// A daemon that listens.
    fn daemon(engine: &Engine, images: &Path, options: &[&str]) -> Beside {
        let socket = images.join("lazy-pages.socket");
        let _ = fs::remove_file(&socket);
        let mut daemon = Beside::start(engine, "lazy-pages", images, options);
        daemon.wait_for("its socket", || socket.exists());
        daemon
    }

    fn wait_for(&mut self, what: &str, mut holds: impl FnMut() -> bool) {
        let child = &mut self.child;
        let found = process::within(LIMIT, || holds() || matches!(child.try_wait(), Ok(Some(_))));
        assert!(found && holds(), "no {what}: {:?}", fs::read_to_string(&self.log));
    }

    /// Its exit code, when it is done.
    fn end(&mut self) -> Option<i32> {
        let mut status = None;
        process::within(LIMIT, || {
            status = self.child.try_wait().unwrap_or_else(|e| panic!("{e}"));
            status.is_some()
        });
        status.unwrap_or_else(|| panic!("it does not end: {:?}", fs::read_to_string(&self.log))).code()
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn listens(port: u16) -> bool {
    let at = format!(":{port:04X} ");
    let text = fs::read_to_string("/proc/self/net/tcp").unwrap_or_default();
    text.lines().any(|line| line.split_whitespace().nth(3) == Some("0A") && line.contains(&at))
}

fn to_port(port: u16) -> Vec<String> {
    ["--page-server", "--address", "127.0.0.1", "--port", &port.to_string()].map(str::to_owned).to_vec()
}

fn strings(all: &[String]) -> Vec<&str> {
    all.iter().map(String::as_str).collect()
}

fn criu(test: &str) -> Option<Engine> {
    Engine::criu().inspect_err(|why| skip(test, why)).ok()
}

/// A guest is dumped, and restored with memory that comes from its images.
fn carried(guest: &str, restore: &Engine, daemon: &Engine, dump: &[&str]) {
    let mut run = Run::start(guest);
    let images = run.images("1");
    run.dump_with(&Engine::ours(), &images, dump);
    let mut pages = Beside::daemon(daemon, &images, &[]);
    run.restore_with(restore, &images, &["--lazy-pages"]);
    if LOOK_AT_AREAS.contains(&guest) {
        // who brings memory can be seen in /proc as long as it does
        assert_eq!(pages.end(), Some(0));
    }
    run.check(How::Restored);
    assert_eq!(pages.end(), Some(0), "{:?}", fs::read_to_string(&pages.log));
}

macro_rules! from_images {
    ($($guest:ident)*) => {
        mod from_images {
            use super::*;

            $(
                #[test]
                fn $guest() {
                    carried(stringify!($guest), &Engine::ours(), &Engine::ours(), &[]);
                }
            )*
        }
    };
}

from_images! {
    memory_advice
    memory_brk
    memory_fragmented
    memory_large
    memory_layout
    memory_private
    memory_shared
    memory_sparse
    rseq
    storm
    threads
    track_flood
    track_forked
    track_given_back
    track_moved
    tree
}

#[test]
fn packed() {
    carried("memory_large", &Engine::ours(), &Engine::ours(), &["--compress"]);
}

#[test]
fn with_crius_daemon() {
    let Some(criu) = criu("lazy::with_crius_daemon") else { return };
    for guest in ["memory_large", "memory_fragmented", "threads"] {
        carried(guest, &Engine::ours(), &criu, &[]);
    }
}

#[test]
fn crius_restore() {
    let Some(criu) = criu("lazy::crius_restore") else { return };
    for guest in ["memory_large", "memory_fragmented", "threads"] {
        carried(guest, &criu, &Engine::ours(), &[]);
    }
}

/// A server elsewhere has the pages.
fn from_server(server: &Engine, daemon: &Engine) {
    let mut run = Run::start("memory_large");
    let images = run.images("1");
    run.dump(&Engine::ours(), &images);
    let port = free_port();
    let mut pages = Beside::start(server, "page-server", &images, &["--lazy-pages", "--port", &port.to_string()]);
    pages.wait_for("server", || listens(port));
    let mut daemon = Beside::daemon(daemon, &images, &strings(&to_port(port)));
    run.restore_with(&Engine::ours(), &images, &["--lazy-pages"]);
    run.check(How::Restored);
    assert_eq!(daemon.end(), Some(0), "{:?}", fs::read_to_string(&daemon.log));
    assert_eq!(pages.end(), Some(0), "{:?}", fs::read_to_string(&pages.log));
}

#[test]
fn from_a_server() {
    from_server(&Engine::ours(), &Engine::ours());
    let Some(criu) = criu("lazy::from_a_server with CRIU's daemon") else { return };
    from_server(&Engine::ours(), &criu);
}

/// A dump that waits with its memory, at this port.
fn waiting(run: &Run, images: &Path, port: u16) -> Beside {
    fs::create_dir_all(images).unwrap_or_else(|e| panic!("{e}"));
    let (pid, number) = (run.pid.to_string(), port.to_string());
    let all = ["-t", &pid, "--lazy-pages", "--address", "127.0.0.1", "--port", &number];
    let mut dump = Beside::start(&Engine::ours(), "dump", images, &all);
    let log = dump.log.clone();
    let serves = || fs::read_to_string(&log).is_ok_and(|text| text.contains("Starting lazy pages server"));
    dump.wait_for("pages", serves);
    assert!(images.join("inventory.img").exists());
    dump
}

/// From one PID namespace into the next, while the source waits.
#[test]
fn from_a_dump_that_waits() {
    let mut run = Run::start("pid_namespace");
    let (images, port) = (run.images("1"), free_port());
    run.look();
    let old = run.tree.clone();
    let mut dump = waiting(&run, &images, port);
    let mut daemon = Beside::daemon(&Engine::ours(), &images, &strings(&to_port(port)));
    run.restore_with(&Engine::ours(), &images, &["--lazy-pages"]);
    assert_eq!(daemon.end(), Some(0), "{:?}", fs::read_to_string(&daemon.log));
    assert_eq!(dump.end(), Some(0), "{:?}", fs::read_to_string(&dump.log));
    assert!(process::wait_gone(&old, LIMIT).is_ok(), "the source is still there");
    run.check(How::Restored);
}

/// Who asks for nothing, or for what is not there, or goes: the source goes on.
#[test]
fn nobody_takes_it() {
    let mut run = Run::start("memory_large");
    let mut get = [0u8; 32];
    get[0] = 7;
    get[8] = 1;
    for (n, bytes) in [&[][..], &[1; 5], &[9; 32], &get].into_iter().enumerate() {
        let (images, port) = (run.images(&n.to_string()), free_port());
        let mut dump = waiting(&run, &images, port);
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap_or_else(|e| panic!("{e}"));
        stream.write_all(bytes).unwrap_or_else(|e| panic!("{e}"));
        drop(stream);
        assert_eq!(dump.end(), Some(1), "{:?}", fs::read_to_string(&dump.log));
    }
    let (images, port) = (run.images("killed"), free_port());
    let mut dump = waiting(&run, &images, port);
    let _ = dump.child.kill();
    let _ = dump.child.wait();
    let failed = Engine::ours().restore(&images, &[]).expect_err("memory is missing");
    assert!(failed.text.contains("--lazy-pages"), "{failed}");
    run.check(How::Running);
}

/// Without a daemon, or with one that goes at once: one clear error, and nothing is left.
#[test]
fn nobody_brings_it() {
    let mut run = Run::start("memory_large");
    let images = run.images("1");
    run.dump(&Engine::ours(), &images);
    let failed = Engine::ours().restore(&images, &["--lazy-pages"]).expect_err("there is no daemon");
    assert!(failed.text.contains("lazy-pages.socket"), "{failed}");
    let listener = std::os::unix::net::UnixListener::bind(images.join("lazy-pages.socket"));
    let listener = listener.unwrap_or_else(|e| panic!("{e}"));
    let gone = std::thread::spawn(move || listener.accept().map(drop));
    // whether it is seen depends on the moment; if it is not, the tree runs without its memory, as with CRIU
    if Engine::ours().restore(&images, &["--lazy-pages"]).is_ok() {
        process::end(&process::tree(run.pid));
        let _ = process::wait_gone(&[run.pid], LIMIT);
    }
    let _ = gone.join();
    assert!(!process::alive(run.pid));
    let mut daemon = Beside::daemon(&Engine::ours(), &images, &[]);
    run.restore_with(&Engine::ours(), &images, &["--lazy-pages"]);
    run.check(How::Restored);
    assert_eq!(daemon.end(), Some(0));
}

/// A source that answers some requests and then is gone: nobody goes on with zeros.
#[test]
fn the_source_is_lost() {
    let mut run = Run::start("memory_large");
    let images = run.images("1");
    run.dump(&Engine::ours(), &images);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
    let port = listener.local_addr().map(|a| a.port()).unwrap_or_default();
    let source = std::thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let _ = stream.read(&mut [0; 7]);
    });
    let mut daemon = Beside::daemon(&Engine::ours(), &images, &strings(&to_port(port)));
    let restored = Engine::ours().restore(&images, &["--lazy-pages"]);
    assert_eq!(daemon.end(), Some(1));
    let log = fs::read_to_string(&daemon.log).unwrap_or_default();
    assert!(log.contains("closed") || log.contains("other side"), "{log}");
    if restored.is_ok() {
        // it ends by itself as soon as it touches what is missing
        let (new, check) = (run.file("check.new"), run.file("check"));
        let _ = fs::write(&new, "restored").and_then(|()| fs::rename(&new, &check));
        let gone = process::wait_gone(&[run.pid], LIMIT);
        assert!(gone.is_ok(), "it goes on");
        assert!(!fs::read_to_string(run.file("result")).is_ok_and(|result| result == "ok"));
    }
    let _ = source.join();
    run.tree.clear();
}
