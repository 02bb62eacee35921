//! Pages that go to a server: ours and CRIU's, one by one and in chains, encrypted, by RPC; servers that break off.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use standstill_images::proto::{CriuOpts, CriuPageServerInfo, CriuReq, CriuReqType};
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::program::free_port;
use standstill_tests::rpc::{options, request, Client};
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

const LIMIT: Duration = Duration::from_secs(60);
const GUEST: &str = "memory_large";
/// With shared memory, which has pagemaps of its own.
const SHARED: &str = "memory_shared";

/// A page server that waits for its client.
struct Server {
    child: Child,
    port: String,
    log: PathBuf,
}

/// Waits until someone listens at this port.
fn wait_for_port(port: u16) -> String {
    let at = format!(":{port:04X} ");
    let listens = |line: &str| line.split_whitespace().nth(3) == Some("0A") && line.contains(&at);
    let found = process::within(Duration::from_secs(10), || {
        fs::read_to_string("/proc/self/net/tcp").unwrap_or_default().lines().any(listens)
    });
    assert!(found, "nobody listens at {port}");
    port.to_string()
}

impl Server {
    fn start(engine: &Engine, images: &Path, options: &[&str]) -> Server {
        fs::create_dir_all(images).unwrap_or_else(|e| panic!("{e}"));
        let log = images.join("page-server.log");
        let _ = fs::remove_file(&log);
        let port = free_port();
        let number = port.to_string();
        let all = [&["--port", &number], options].concat();
        let mut command = engine.command("page-server", images, &all);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.unwrap_or_else(|e| panic!("page-server: {e}"));
        Server { child, port: wait_for_port(port), log }
    }

    /// Its exit code, when it is done.
    fn end(&mut self) -> Option<i32> {
        let mut status = None;
        process::within(LIMIT, || {
            status = self.child.try_wait().unwrap_or_else(|e| panic!("{e}"));
            status.is_some()
        });
        status.unwrap_or_else(|| panic!("the page server does not end: {:?}", fs::read_to_string(&self.log))).code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a dump needs to be told of a server at this port.
fn to_port(port: &str) -> Vec<String> {
    ["--page-server", "--address", "127.0.0.1", "--port", port].map(str::to_owned).to_vec()
}

/// A guest is dumped to a server and restored from what that has.
fn carried(guest: &str, client: &Engine, server: &Engine, more: &[&str]) {
    let mut run = Run::start(guest);
    let images = run.images("1");
    let mut pages = Server::start(server, &images, more);
    let to = to_port(&pages.port);
    let all: Vec<&str> = to.iter().map(String::as_str).chain(more.iter().copied()).collect();
    run.dump_with(client, &images, &all);
    assert_eq!(pages.end(), Some(0), "{:?}", fs::read_to_string(&pages.log));
    assert!(images.join("pages-65537.img").exists());
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

fn criu(test: &str) -> Option<Engine> {
    Engine::criu().inspect_err(|why| skip(test, why)).ok()
}

#[test]
fn ours() {
    carried(GUEST, &Engine::ours(), &Engine::ours(), &[]);
    carried(SHARED, &Engine::ours(), &Engine::ours(), &[]);
}

#[test]
fn ours_to_criu() {
    let Some(criu) = criu("page_server::ours_to_criu") else { return };
    carried(GUEST, &Engine::ours(), &criu, &[]);
    carried(SHARED, &Engine::ours(), &criu, &[]);
}

#[test]
fn criu_to_ours() {
    let Some(criu) = criu("page_server::criu_to_ours") else { return };
    carried(GUEST, &criu, &Engine::ours(), &[]);
    carried(SHARED, &criu, &Engine::ours(), &[]);
}

/// An authority, a certificate for this host and one of another authority; nothing if they cannot be made here.
fn certificates(folder: &Path) -> Option<()> {
    let run = |command: &str| {
        let done = Command::new("sh").arg("-ec").arg(command).current_dir(folder).stderr(Stdio::null()).status();
        done.is_ok_and(|status| status.success()).then_some(())
    };
    fs::create_dir_all(folder).ok()?;
    for name in ["ca", "other"] {
        let new = "openssl req -x509 -newkey rsa:2048 -nodes -days 2";
        run(&format!("{new} -keyout {name}.key -out {name}.pem -subj /CN={name}"))?;
    }
    run("openssl req -newkey rsa:2048 -nodes -keyout key.pem -out request -subj /CN=localhost")?;
    run("printf 'basicConstraints=CA:FALSE\\n' > extensions")?;
    run("openssl x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -out cert.pem -days 2 -extfile extensions")
}

fn tls(folder: &Path, authority: &str) -> Vec<String> {
    let at = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let (ca, cert, key) = (at(authority), at("cert.pem"), at("key.pem"));
    ["--tls", "--tls-cacert", &ca, "--tls-cert", &cert, "--tls-key", &key].map(str::to_owned).to_vec()
}

#[test]
fn encrypted() {
    let folder = process::scratch("certificates");
    if certificates(&folder).is_none() {
        return skip("page_server::encrypted", "no openssl to make certificates with");
    }
    let options = tls(&folder, "ca.pem");
    let mut all: Vec<&str> = options.iter().map(String::as_str).collect();
    all.push("--tls-no-cn-verify");
    carried(GUEST, &Engine::ours(), &Engine::ours(), &all);
    match Engine::criu() {
        Ok(criu) => {
            carried(GUEST, &Engine::ours(), &criu, &all);
            carried(GUEST, &criu, &Engine::ours(), &all);
        }
        Err(why) => skip("page_server::encrypted with CRIU", &why),
    }
    let _ = fs::remove_dir_all(&folder);
}

/// A certificate that is not for the address, or of a stranger, and a key that is none: refused, and the program goes on.
#[test]
fn strangers() {
    let folder = process::scratch("strangers");
    if certificates(&folder).is_none() {
        return skip("page_server::strangers", "no openssl to make certificates with");
    }
    let (good, other) = (tls(&folder, "ca.pem"), tls(&folder, "other.pem"));
    let mut no_key = good.clone();
    no_key[6] = no_key[4].clone();
    let mut run = Run::start(GUEST);
    for (client, no_name, why) in
        [(&good, false, "not for 127.0.0.1"), (&other, true, "UnknownIssuer"), (&no_key, true, "key")]
    {
        let images = run.images(if no_name { "2" } else { "1" });
        let all: Vec<&str> = good.iter().map(String::as_str).chain(["--tls-no-cn-verify"]).collect();
        let mut server = Server::start(&Engine::ours(), &images, &all);
        let to = to_port(&server.port);
        let name = no_name.then_some("--tls-no-cn-verify");
        let all: Vec<&str> = to.iter().chain(client).map(String::as_str).chain(name).collect();
        let failed = Engine::ours().dump(run.pid, &images, &all).expect_err("the dump was to fail");
        assert!(failed.text.contains(why), "{failed}");
        if why != "key" {
            assert_eq!(server.end(), Some(1));
        }
        assert!(!images.join("inventory.img").exists());
    }
    run.check(How::Running);
    let _ = fs::remove_dir_all(&folder);
}

/// Pre-dumps and a dump, each to a server; what was replaced is freed there.
#[test]
fn chain() {
    chain_with(&Engine::ours());
    match Engine::criu() {
        Ok(criu) => chain_with(&criu),
        Err(why) => skip("page_server::chain with CRIU's server", &why),
    }
}

fn chain_with(server: &Engine) {
    let engine = Engine::ours();
    let mut run = Run::start("track_words");
    let mut names: Vec<String> = Vec::new();
    for n in 1..=4 {
        let name = format!("{n}");
        let (there, here) = (run.images(&format!("there{n}")), run.images(&format!("here{n}")));
        fs::create_dir_all(&here).unwrap_or_else(|e| panic!("{e}"));
        let last = names.last().map(|last| (format!("../there{last}"), format!("../here{last}")));
        let (mut of_server, mut of_client) = (vec!["--auto-dedup"], vec!["--track-mem"]);
        if let Some((there, here)) = &last {
            of_server.extend(["--prev-images-dir", there]);
            of_client.extend(["--prev-images-dir", here]);
        }
        let mut pages = Server::start(server, &there, &of_server);
        let to = to_port(&pages.port);
        of_client.extend(to.iter().map(String::as_str));
        if n < 4 {
            let pid = run.pid.to_string();
            of_client.extend(["-t", &pid]);
            let output = process::run(&mut engine.command("pre-dump", &here, &of_client), LIMIT);
            let output = output.unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(output.code, Some(0), "{}", output.text);
        } else {
            run.look();
            engine.dump(run.pid, &here, &of_client).unwrap_or_else(|e| panic!("{e}"));
        }
        assert_eq!(pages.end(), Some(0), "{:?}", fs::read_to_string(&pages.log));
        names.push(name);
    }
    let (here, there) = (run.images("here4"), run.images("there4"));
    for image in fs::read_dir(&here).into_iter().flatten().flatten() {
        let to = there.join(image.file_name());
        if image.path().extension().is_some_and(|e| e == "img") && !to.exists() {
            fs::copy(image.path(), to).unwrap_or_else(|e| panic!("{e}"));
        }
    }
    run.is_dumped(&there);
    run.restore(&engine, &there);
    run.check(How::Restored);
}

/// A server that takes so many bytes and then breaks off: the program goes on, and nothing is a checkpoint.
#[test]
fn broken_off() {
    let mut run = Run::start(GUEST);
    for bytes in [0, 1, 32, 40, 100_000, 1_000_000, usize::MAX] {
        let images = run.images(&bytes.to_string());
        let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
        let port = listener.local_addr().map(|a| a.port()).unwrap_or_default().to_string();
        let server = std::thread::spawn(move || {
            let Ok((mut stream, _)) = listener.accept() else { return };
            let mut left = bytes;
            let mut buffer = [0; 4096];
            let mut first = true;
            while left > 0 {
                let room = buffer.len().min(left);
                match stream.read(&mut buffer[..room]) {
                    Ok(n @ 1..) => left -= n,
                    // it waits for the last word
                    _ => break,
                }
                if std::mem::take(&mut first) && bytes > 32 {
                    let _ = stream.write_all(&[0]);
                }
                if bytes == usize::MAX && buffer[..2] == [0x23, 0x10] {
                    // everything has come, and could not be kept
                    let _ = stream.write_all(&(-1i32).to_le_bytes());
                    break;
                }
            }
        });
        let to = to_port(&port);
        let all: Vec<&str> = to.iter().map(String::as_str).collect();
        let failed = Engine::ours().dump(run.pid, &images, &all);
        assert!(failed.is_err(), "a dump to a server that breaks off after {bytes} bytes");
        assert!(!images.join("inventory.img").exists());
        let _ = server.join();
    }
    let to = to_port("1");
    let all: Vec<&str> = to.iter().map(String::as_str).collect();
    let failed = Engine::ours().dump(run.pid, &run.images("nobody"), &all).expect_err("nobody listens");
    assert!(failed.text.contains("Failed to connect to the page server"), "{failed}");
    run.look();
    run.check(How::Running);
}

/// What is no client: each is one clear error.
#[test]
fn strange_clients() {
    let images = process::scratch("strange-clients");
    let message = |command: u32, pages: u64, address: u64, target: u64| {
        let mut bytes = [0u8; 32];
        bytes[..4].copy_from_slice(&command.to_le_bytes());
        for (room, word) in bytes[8..].chunks_mut(8).zip([pages, address, target]) {
            room.copy_from_slice(&word.to_le_bytes());
        }
        bytes.to_vec()
    };
    let open = message(4, 0, 0, 7 << 8 | 1);
    let cases = [
        (Vec::new(), "not flushed"),
        (vec![1; 31], "closed unexpectedly"),
        (message(99, 0, 0, 0), "Unknown command 99"),
        (message(4, 0, 0, 77), "Unknown pagemap type"),
        (message(7, 1, 0x1000, 7), "none are served"),
        ([open.clone(), message(0x0004_0006, u64::MAX, 0x1000, 7 << 8 | 1)].concat(), "without end"),
        ([open.clone(), message(0x0004_0006, 1, 0x1001, 7 << 8 | 1)].concat(), "pagemap-7.img"),
        ([open.clone(), message(0x00ff_0006, 1, 0x1000, 7 << 8 | 1)].concat(), "flags 0xff"),
        ([open, message(0x0004_0006, 2, 0x1000, 7 << 8 | 1), vec![7; 5000]].concat(), "closed unexpectedly"),
    ];
    for (bytes, why) in cases {
        let mut server = Server::start(&Engine::ours(), &images, &[]);
        let mut stream =
            std::net::TcpStream::connect(format!("127.0.0.1:{}", server.port)).unwrap_or_else(|e| panic!("{e}"));
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        assert_eq!(server.end(), Some(1), "{why}");
        let log = fs::read_to_string(&server.log).unwrap_or_default();
        assert!(log.contains(why), "{why}: {log}");
    }
    let _ = fs::remove_dir_all(images);
}

/// In the background, with a pidfile; and over a socket that both were given.
#[test]
fn in_the_background() {
    let mut run = Run::start(GUEST);
    let images = run.images("1");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let engine = Engine::ours();
    let port = free_port();
    let all = ["--daemon", "--pidfile", "pid", "--port", &port.to_string(), "--address", "127.0.0.1"];
    let output = process::run(&mut engine.command("page-server", &images, &all), LIMIT);
    assert_eq!(output.map(|o| o.code).ok(), Some(Some(0)));
    let pid: i32 = fs::read_to_string(images.join("pid")).unwrap_or_default().parse().unwrap_or(0);
    assert!(process::alive(pid), "the server is not there");
    let to = to_port(&wait_for_port(port));
    let to: Vec<&str> = to.iter().map(String::as_str).collect();
    run.dump_with(&engine, &images, &to);
    assert!(process::within(LIMIT, || !process::alive(pid)), "the server is still there");
    run.restore(&engine, &images);
    run.check(How::Restored);
}

#[test]
fn over_a_socket() {
    let mut run = Run::start(GUEST);
    let images = run.images("1");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap_or_else(|e| panic!("{e}"));
    for end in [&ours, &theirs] {
        // inherited by who is started
        rustix::io::fcntl_setfd(end, rustix::io::FdFlags::empty()).unwrap_or_else(|e| panic!("{e}"));
    }
    let engine = Engine::ours();
    let fd = theirs.as_raw_fd().to_string();
    let mut server = engine.command("page-server", &images, &["--ps-socket", &fd]);
    let mut server = server.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap_or_else(|e| panic!("{e}"));
    let fd = ours.as_raw_fd().to_string();
    run.dump_with(&engine, &images, &["--page-server", "--ps-socket", &fd]);
    let mut code = None;
    process::within(LIMIT, || {
        code = server.try_wait().ok().flatten().map(|status| status.code());
        code.is_some()
    });
    assert_eq!(code, Some(Some(0)));
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// A server that a client asks for over RPC, and a dump over RPC to it.
#[test]
fn by_rpc() {
    let mut run = Run::start(GUEST);
    let images = run.images("1");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let client = Client::swrk(&Engine::ours(), &[]);
    let ps = CriuPageServerInfo { address: Some("127.0.0.1".into()), port: Some(0), ..Default::default() };
    let opts = CriuOpts { ps: Some(ps), log_file: Some("server.log".into()), ..options(&images) };
    let asked = CriuReq { keep_open: Some(true), ..request(CriuReqType::PageServerChld, opts) };
    let answer = client.call(&asked);
    let ps = answer.ps.clone().unwrap_or_default();
    assert!(answer.success && answer.r#type() == CriuReqType::PageServer, "{answer:?}");
    let (pid, port) = (ps.pid.unwrap_or(0), ps.port.unwrap_or(0));
    assert!(process::alive(pid) && port > 0, "{ps:?}");

    let ps = CriuPageServerInfo { address: Some("127.0.0.1".into()), port: Some(port), ..Default::default() };
    let opts = CriuOpts { ps: Some(ps), pid: Some(run.pid), ..options(&images) };
    run.look();
    let answer = Client::swrk(&Engine::ours(), &[]).call(&request(CriuReqType::Dump, opts));
    assert!(answer.success, "{answer:?}");
    let wait = CriuReq { pid: u32::try_from(pid).ok(), ..request(CriuReqType::WaitPid, CriuOpts::default()) };
    let ended = client.call(&wait);
    assert!(ended.success && ended.status == Some(0), "{ended:?}");
    run.is_dumped(&images);
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

/// The server is killed while pages come, at any moment: the program goes on.
#[test]
fn killed() {
    let mut run = Run::start(GUEST);
    let mut refused = 0;
    for n in 0..12 {
        let images = run.images("1");
        let mut server = Server::start(&Engine::ours(), &images, &[]);
        let to = to_port(&server.port);
        let mut all: Vec<&str> = to.iter().map(String::as_str).collect();
        all.push("-R");
        let pid = run.pid;
        let dump = std::thread::scope(|s| {
            let dump = s.spawn(|| Engine::ours().dump(pid, &images, &all));
            std::thread::sleep(Duration::from_millis(n * 4));
            let _ = server.child.kill();
            dump.join()
        });
        match dump {
            Ok(Ok(_)) => {}
            Ok(Err(_)) => {
                refused += 1;
                assert!(!images.join("inventory.img").exists());
            }
            Err(_) => panic!("the dump panicked"),
        }
    }
    assert!(refused > 0, "no server was killed in time");
    run.look();
    run.check(How::Running);
}
