//! Redis under a load of writes goes back and forth between two hosts, which are network namespaces: its address moves along,
//! and the connections of its clients, who are on a third host, notice nothing but a pause.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{setns, CloneFlags};
use standstill_tests::process::{self, within};
use standstill_tests::program::program;
use standstill_tests::skip::skip;

use super::{migrate, Host, LIMIT};

/// Where the clients find it.
const SERVICE: &str = "10.99.0.1:6379";
const CLIENTS: usize = 50;
const THREADS: usize = 5;

/// Three hosts: two that the service is on in turn, one for its clients, who reach it by way of the one that it is on.
struct Hosts {
    names: [String; 3],
}

impl Hosts {
    /// None if networks cannot be made here.
    fn make(test: &str) -> Option<Hosts> {
        let me = std::process::id();
        let hosts = Hosts { names: ["a", "b", "c"].map(|name| format!("standstill-{me}-{name}")) };
        let [a, b, c] = &hosts.names;
        if !Command::new("ip").args(["netns", "add", a]).status().is_ok_and(|s| s.success()) {
            skip(test, "ip cannot make network namespaces");
            return None;
        }
        ip(&["netns", "add", b]);
        ip(&["netns", "add", c]);
        ip(&["-n", a, "link", "add", "to-b", "type", "veth", "peer", "name", "to-a", "netns", b]);
        ip(&["-n", a, "link", "add", "to-c", "type", "veth", "peer", "name", "to-a", "netns", c]);
        ip(&["-n", b, "link", "add", "to-c", "type", "veth", "peer", "name", "to-b", "netns", c]);
        for (host, link, address) in [
            (a, "to-b", "10.98.3.1/24"),
            (b, "to-a", "10.98.3.2/24"),
            (a, "to-c", "10.98.1.2/24"),
            (c, "to-a", "10.98.1.1/24"),
            (b, "to-c", "10.98.2.2/24"),
            (c, "to-b", "10.98.2.1/24"),
            (c, "lo", "10.97.0.1/32"),
            (a, "lo", "10.99.0.1/32"),
        ] {
            ip(&["-n", host, "link", "set", link, "up"]);
            ip(&["-n", host, "addr", "add", address, "dev", link]);
        }
        ip(&["-n", b, "link", "set", "lo", "up"]);
        ip(&["-n", a, "route", "add", "default", "via", "10.98.1.1"]);
        ip(&["-n", b, "route", "add", "default", "via", "10.98.2.1"]);
        ip(&["-n", c, "route", "add", "10.99.0.1", "via", "10.98.1.2", "src", "10.97.0.1"]);
        Some(hosts)
    }

    fn path(&self, n: usize) -> String {
        format!("/run/netns/{}", self.names[n])
    }

    /// What a program is started with to be on a host.
    fn on(&self, n: usize) -> Vec<String> {
        vec!["nsenter".into(), format!("--net={}", self.path(n))]
    }

    /// Scripts that take the address along: to a host before connections are made again there, away from one when it is
    /// decided that it gives the service away, and the clients' way when it goes on.
    fn script(&self, folder: &Path, n: usize) -> String {
        use std::os::unix::fs::PermissionsExt as _;
        let (here, clients) = (&self.names[n], &self.names[2]);
        let way = ["10.98.1.2", "10.98.2.2"][n];
        let text = format!(
            "#!/bin/sh\nset -e\ncase $CRTOOLS_SCRIPT_ACTION in\n\
             pre-restore) ip -n {here} addr add 10.99.0.1/32 dev lo;;\n\
             pre-resume) ip -n {clients} route replace 10.99.0.1 via {way} src 10.97.0.1;;\n\
             post-dump) ip -n {here} addr del 10.99.0.1/32 dev lo;;\nesac\n"
        );
        let path = folder.join(format!("script-{n}"));
        fs::write(&path, text).unwrap_or_else(|e| panic!("{e}"));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
        path.to_string_lossy().into_owned()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "del", name]).status();
        }
    }
}

fn ip(arguments: &[&str]) {
    let output = process::run(Command::new("ip").args(arguments), LIMIT).unwrap_or_else(|e| panic!("ip: {e}"));
    assert_eq!(output.code, Some(0), "ip {}: {}", arguments.join(" "), output.text);
}

/// A connection, and how often it has counted its own key up.
struct Client {
    connection: BufReader<TcpStream>,
    key: String,
    count: u64,
}

impl Client {
    fn connect(key: String) -> Option<Client> {
        let stream = TcpStream::connect(SERVICE).ok()?;
        stream.set_read_timeout(Some(LIMIT)).ok()?;
        stream.set_nodelay(true).ok()?;
        Some(Client { connection: BufReader::new(stream), key, count: 0 })
    }

    fn ask(&mut self, words: &str) -> String {
        let mut line = String::new();
        let asked = self.connection.get_mut().write_all(format!("{words}\r\n").as_bytes());
        asked.and_then(|()| self.connection.read_line(&mut line)).unwrap_or_else(|e| panic!("{}: {e}", self.key));
        line.trim_end().to_owned()
    }

    /// What was counted is there, and nothing else.
    fn count(&mut self) {
        self.count += 1;
        let answer = self.ask(&format!("INCR {}", self.key));
        assert_eq!(answer, format!(":{}", self.count), "{}: a write was lost, or came twice", self.key);
    }
}

/// Clients on their host count until they are told to end; the longest pause that one of them saw.
fn load(network: &str, thread: usize, end: &AtomicBool) -> (u64, Duration) {
    let network = fs::File::open(network).unwrap_or_else(|e| panic!("{network}: {e}"));
    setns(network.as_fd(), CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("setns: {e}"));
    let name = |n: usize| format!("client-{thread}-{n}");
    let connect = |n| Client::connect(name(n)).unwrap_or_else(|| panic!("{} cannot connect", name(n)));
    let mut clients: Vec<Client> = (0..CLIENTS / THREADS).map(connect).collect();
    let (mut all, mut longest) = (0, Duration::ZERO);
    while !end.load(Ordering::Relaxed) {
        for client in &mut clients {
            let began = Instant::now();
            client.count();
            longest = longest.max(began.elapsed());
            all += 1;
        }
    }
    (all, longest)
}

#[test]
fn redis_under_load() {
    let test = "redis_under_load";
    let Some(path) = program("redis-server") else { return };
    let Some(hosts) = Hosts::make(test) else { return };
    process::adopt();
    let turns: usize = std::env::var("STANDSTILL_MIGRATIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(10);
    let folder = process::scratch(test);
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let on = hosts.on(0);
    let mut command = Command::new(&on[0]);
    command.arg(&on[1]).arg(&path).args([
        "--bind",
        "10.99.0.1",
        "--save",
        "",
        "--enable-debug-command",
        "yes",
        "--protected-mode",
        "no",
    ]);
    command.arg("--dir").arg(&folder).args(["--logfile", "redis.log"]);
    command.stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let pid = process::spawn_in_namespaces(&mut command, nix::libc::CLONE_NEWPID).unwrap_or_else(|e| panic!("{e}"));
    let scripts = [0, 1].map(|n| hosts.script(&folder, n));
    let servers = [(0, "10.98.3.1:0"), (1, "10.98.3.2:0")].map(|(n, at)| {
        let options = ["--insecure", "--action-script", &scripts[n]];
        Host::start_on(&folder.join(format!("host-{n}")), &options, &hosts.on(n), at)
    });
    let network = hosts.path(2);
    let mut table = Vec::new();
    let end = AtomicBool::new(false);
    std::thread::scope(|scope| {
        struct End<'a>(&'a AtomicBool);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let ends = End(&end);
        // 200 MiB
        let filled = scope.spawn(|| {
            let network = fs::File::open(&network).unwrap_or_else(|e| panic!("{network}: {e}"));
            setns(network.as_fd(), CloneFlags::CLONE_NEWNET).unwrap_or_else(|e| panic!("setns: {e}"));
            let mut client = None;
            let there = within(LIMIT, || {
                client = Client::connect("filler".into());
                client.is_some()
            });
            assert!(there, "redis does not answer");
            client.unwrap_or_else(|| panic!("no client")).ask("DEBUG POPULATE 200000 key 1000")
        });
        assert_eq!(filled.join().unwrap_or_default(), "+OK");
        let clients: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (network, end) = (&network, &end);
                scope.spawn(move || load(network, thread, end))
            })
            .collect();
        let (mut pid, mut at) = (pid, 0);
        for strategy in ["stop-and-copy", "pre-copy", "post-copy", "hybrid"] {
            for turn in 0..turns {
                let (from, to) = (at, 1 - at);
                let text = pid.to_string();
                let moved = migrate(
                    &hosts.on(from),
                    &[
                        &["-t", &text, "--to", &servers[to].address, "--strategy", strategy, "--json"][..],
                        &["--tcp-established", "--action-script", &scripts[from]],
                    ]
                    .concat(),
                );
                assert_eq!(moved.code, Some(0), "{strategy}, {turn}: {}\n{}", moved.text, servers[to].said());
                (pid, at) = (moved.pid(), to);
                let number = |name: &str| moved.report[name].as_f64().unwrap_or(0.0) * 1000.0;
                table.push((
                    strategy,
                    number("downtime_seconds"),
                    number("predicted_seconds"),
                    number("total_seconds"),
                ));
                assert!(clients.iter().all(|client| !client.is_finished()), "a client has ended");
            }
        }
        drop(ends);
        let (mut all, mut longest) = (0, Duration::ZERO);
        for client in clients {
            let (count, pause) = client.join().unwrap_or_else(|e| std::panic::resume_unwind(e));
            all += count;
            longest = longest.max(pause);
        }
        eprintln!("{all} writes over {CLIENTS} connections, none lost; the longest pause {longest:?}");
        process::end(&process::tree(pid));
    });
    eprintln!("strategy         downtime  predicted      total (ms)");
    for (strategy, down, predicted, total) in table {
        eprintln!("{strategy:<14}{down:>11.1}{predicted:>11.1}{total:>11.1}");
    }
    let _ = fs::remove_dir_all(folder);
}
