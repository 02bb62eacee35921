//! Programs that people run: dumped while they work, dead, restored, and right.

mod scripts;
mod terminals;

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use standstill_tests::process;
use standstill_tests::program::{eventually, folder, free_port, program, Program, LIMIT};

/// A client of Redis, as far as this test needs one.
struct Redis(BufReader<TcpStream>);

impl Redis {
    fn connect(port: u16) -> Option<Redis> {
        let stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).ok()?;
        stream.set_read_timeout(Some(LIMIT)).ok()?;
        Some(Redis(BufReader::new(stream)))
    }

    fn send(&mut self, words: &[&str]) {
        let mut text = format!("*{}\r\n", words.len());
        for word in words {
            text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.0.get_mut().write_all(text.as_bytes()).unwrap_or_else(|e| panic!("{e}"));
    }

    /// The next answer: a line, or the text that a line announced.
    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap_or_else(|e| panic!("{e}"));
        let line = line.trim_end();
        match line.strip_prefix('$').and_then(|n| n.parse::<usize>().ok()) {
            Some(size) => {
                let mut bytes = vec![0; size + 2];
                self.0.read_exact(&mut bytes).unwrap_or_else(|e| panic!("{e}"));
                bytes.truncate(size);
                String::from_utf8_lossy(&bytes).into_owned()
            }
            None => line.to_owned(),
        }
    }

    fn ask(&mut self, words: &[&str]) -> String {
        self.send(words);
        self.answer()
    }
}

fn value(n: u32) -> String {
    format!("value-{n}-{}", "x".repeat(n as usize % 50))
}

#[test]
fn redis() {
    const KEYS: u32 = 200_000;
    let Some(path) = program("redis-server") else { return };
    let (folder, port) = (folder("redis"), free_port());
    let text = port.to_string();
    let start = |folder: std::path::PathBuf| {
        let mut command = Command::new(&path);
        command.args(["--port", &text, "--bind", "127.0.0.1", "--io-threads", "4", "--io-threads-do-reads", "yes"]);
        command.args(["--appendonly", "yes", "--appendfsync", "everysec", "--save", "", "--logfile", "redis.log"]);
        Program::start("redis-server", folder, &mut command)
    };
    let mut server = start(folder);
    let mut client = None;
    eventually("redis-server", || {
        client = Redis::connect(port);
        client.is_some()
    });
    let Some(mut client) = client else { return };
    for block in 0..KEYS / 1000 {
        for n in block * 1000..(block + 1) * 1000 {
            client.send(&["SET", &format!("key-{n}"), &value(n)]);
        }
        for _ in 0..1000 {
            assert_eq!(client.answer(), "+OK");
        }
    }
    assert_eq!(client.ask(&["DBSIZE"]), format!(":{KEYS}"));
    // a connection would have to be carried; this is not what is tested here
    drop(client);
    eventually("the end of the connection", || {
        Redis::connect(port).is_some_and(|mut c| c.ask(&["INFO", "clients"]).contains("connected_clients:1\r"))
    });
    std::thread::sleep(Duration::from_millis(50));
    server.dump(&[]);
    assert!(Redis::connect(port).is_none(), "somebody else answers");
    server.restore(&[]);
    let Some(mut client) = Redis::connect(port) else { panic!("nobody answers") };
    assert_eq!(client.ask(&["DBSIZE"]), format!(":{KEYS}"));
    for block in 0..KEYS / 1000 {
        for n in block * 1000..(block + 1) * 1000 {
            client.send(&["GET", &format!("key-{n}")]);
        }
        for n in block * 1000..(block + 1) * 1000 {
            assert_eq!(client.answer(), value(n), "key-{n}");
        }
    }
    // what it writes from now on goes to where the file ended
    assert_eq!(client.ask(&["SET", "afterwards", "yes"]), "+OK");
    assert_eq!(client.ask(&["CONFIG", "SET", "appendfsync", "always"]), "+OK");
    assert_eq!(client.ask(&["SET", "at-last", "yes"]), "+OK");
    client.send(&["SHUTDOWN"]);
    drop(client);
    server.gone();
    // a new server reads all of it from the file
    let mut again = start(server.folder.clone());
    let mut size = String::new();
    eventually("a new redis-server", || {
        size = Redis::connect(port).map(|mut c| c.ask(&["DBSIZE"])).unwrap_or_default();
        size.starts_with(':')
    });
    assert_eq!(size, format!(":{}", KEYS + 2));
    if let Some(mut client) = Redis::connect(port) {
        client.send(&["SHUTDOWN"]);
    }
    again.gone();
}

#[test]
fn python() {
    let Some(path) = program("python3") else { return };
    let folder = folder("python");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs/worker.py");
    let mut program = Program::start("python3", folder.clone(), Command::new(path).arg(script).arg(&folder));
    eventually("python3", || folder.join("ready").exists());
    // an open transaction is a lock on the database
    program.dump(&["--file-locks"]);
    program.restore(&["--file-locks"]);
    process::signal(program.pid, libc::SIGTERM);
    eventually("python's word", || folder.join("result").exists() || !process::alive(program.pid));
    assert_eq!(fs::read_to_string(folder.join("result")).unwrap_or_default(), "ok");
    program.gone();
}

#[test]
fn bash_pipeline() {
    let Some(path) = program("bash") else { return };
    const LINES: u64 = 150_000;
    let folder = folder("bash");
    let script = "seq 1 $1 | while read n; do echo $((n * 3)); done | tee copy | sort -n | tail -n 1 >last; \
                  echo ${PIPESTATUS[@]} >statuses; mv statuses result";
    let lines = LINES.to_string();
    let mut program = Program::start("bash", folder.clone(), Command::new(path).args(["-c", script, "bash", &lines]));
    let size = || fs::metadata(folder.join("copy")).map_or(0, |m| m.len());
    eventually("the stream", || size() > 100_000);
    program.dump(&[]);
    assert!(!folder.join("result").exists(), "it was over before it was dumped");
    let before = size();
    program.restore(&[]);
    eventually("the end of the stream", || folder.join("result").exists() || !process::alive(program.pid));
    assert!(size() > before, "it was not in mid-stream");
    assert_eq!(fs::read_to_string(folder.join("result")).unwrap_or_default(), "0 0 0 0 0\n");
    assert_eq!(fs::read_to_string(folder.join("last")).unwrap_or_default(), format!("{}\n", LINES * 3));
    let copy = fs::read_to_string(folder.join("copy")).unwrap_or_default();
    let mut n = 0;
    for line in copy.lines() {
        n += 1;
        assert_eq!(line.parse(), Ok(n * 3), "line {n}");
    }
    assert_eq!(n, LINES);
    program.gone();
}

/// The whole answer to a request.
fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

#[test]
fn nginx() {
    let Some(path) = program("nginx") else { return };
    let (folder, port) = (folder("nginx"), free_port());
    let at = folder.display();
    let page = "a page\n".repeat(10_000);
    fs::write(folder.join("page"), &page).unwrap_or_else(|e| panic!("{e}"));
    let config = format!(
        "daemon off; worker_processes 2; pid {at}/pid; error_log {at}/error.log;\n\
         events {{ worker_connections 64; }}\n\
         http {{ access_log {at}/access.log; client_body_temp_path {at}/body; proxy_temp_path {at}/proxy;\n\
         fastcgi_temp_path {at}/fastcgi; uwsgi_temp_path {at}/uwsgi; scgi_temp_path {at}/scgi;\n\
         limit_req_zone $uri zone=all:1m rate=10000r/s;\n\
         server {{ listen 127.0.0.1:{port}; root {at}; limit_req zone=all burst=1000;\n\
         location = /worker {{ add_header X-Worker $pid always; return 200; }} }} }}\n"
    );
    fs::write(folder.join("nginx.conf"), config).unwrap_or_else(|e| panic!("{e}"));
    // workers are another user's, who must get to the page
    let open = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
    fs::set_permissions(&folder, open).unwrap_or_else(|e| panic!("{e}"));
    let mut command = Command::new(path);
    command.arg("-c").arg(folder.join("nginx.conf")).arg("-p").arg(&folder);
    let mut server = Program::start("nginx", folder.clone(), &mut command);
    eventually("nginx", || get(port, "/page").is_some_and(|a| a.ends_with(&page)));
    eventually("two workers", || process::children(server.pid).len() == 2);
    // connections that were closed are gone for the workers too
    std::thread::sleep(Duration::from_millis(100));
    server.dump(&[]);
    assert!(get(port, "/page").is_none(), "somebody else answers");
    server.restore(&[]);
    let mut workers = BTreeSet::new();
    for n in 0..2000 {
        let answer = get(port, if n % 50 == 0 { "/page" } else { "/worker" }).unwrap_or_default();
        assert!(answer.starts_with("HTTP/1.1 200 "), "request {n}: {answer}");
        if n % 50 == 0 {
            assert!(answer.ends_with(&page));
        } else if let Some(line) = answer.lines().find_map(|l| l.strip_prefix("X-Worker: ")) {
            workers.insert(line.to_owned());
        }
    }
    let own: BTreeSet<String> = process::children(server.pid).iter().map(ToString::to_string).collect();
    assert!(workers.is_subset(&own), "{workers:?} answered, {own:?} are the workers");
    // the master still rules: new workers for the old ones
    process::signal(server.pid, libc::SIGHUP);
    eventually("new workers", || {
        let now: BTreeSet<String> = process::children(server.pid).iter().map(ToString::to_string).collect();
        now.len() == 2 && now.is_disjoint(&own)
    });
    assert!(get(port, "/page").is_some_and(|a| a.ends_with(&page)));
    server.tree.retain(|&p| p == server.pid);
    process::signal(server.pid, libc::SIGQUIT);
    server.gone();
}
