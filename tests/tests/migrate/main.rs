//! Trees that move: two receivers on one host, and guests with process ids of their own that go back and forth.
//!
//! $STANDSTILL_MIGRATIONS says how many migrations are killed at random moments (10).

mod redis;

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process::{self, within};
use standstill_tests::run::Run;

const LIMIT: Duration = Duration::from_secs(60);

/// A host that takes trees.
struct Host {
    folder: PathBuf,
    address: String,
    server: Option<Child>,
    said: Arc<Mutex<Vec<String>>>,
    options: Vec<String>,
    /// What it is started with, to be where it is to be.
    on: Vec<String>,
}

/// A command of ours, started by another if there is one.
fn command_on(on: &[String]) -> Command {
    match on.split_first() {
        Some((program, arguments)) => {
            let mut command = Command::new(program);
            command.args(arguments).arg(Engine::ours().path());
            command
        }
        None => Command::new(Engine::ours().path()),
    }
}

impl Host {
    fn start(folder: &Path, options: &[&str]) -> Host {
        Host::start_on(folder, options, &[], "127.0.0.1:0")
    }

    fn start_on(folder: &Path, options: &[&str], on: &[String], address: &str) -> Host {
        let mut host = Host {
            folder: folder.to_owned(),
            address: address.into(),
            on: on.to_vec(),
            server: None,
            said: Arc::default(),
            options: options.iter().map(|o| (*o).to_owned()).collect(),
        };
        host.begin();
        host
    }

    /// Listens, at the same port as before if there was one.
    fn begin(&mut self) {
        let mut command = command_on(&self.on);
        command.args(["receive", "--listen", &self.address, "-D"]).arg(&self.folder).args(&self.options);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut server = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        let mut lines = BufReader::new(server.stdout.take().unwrap_or_else(|| panic!("no output"))).lines();
        let first = lines.next().and_then(Result::ok).unwrap_or_default();
        self.address = first.strip_prefix("listening on ").unwrap_or_else(|| panic!("it says {first}")).to_owned();
        let said = self.said.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                said.lock().unwrap_or_else(|e| e.into_inner()).push(line);
            }
        });
        self.server = Some(server);
    }

    /// The server is killed, and what watches over its trees with it if that is asked for.
    fn kill(&mut self, with_guards: bool) {
        let Some(mut server) = self.server.take() else { return };
        let guards = if with_guards { guards(server.id() as i32) } else { Vec::new() };
        let _ = server.kill();
        for pid in guards {
            process::signal(pid, libc::SIGKILL);
        }
        let _ = server.wait();
    }

    fn said(&self) -> String {
        self.said.lock().unwrap_or_else(|e| e.into_inner()).join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill(false);
    }
}

/// Children of an engine that are none of the tree's, which has a pid namespace of its own.
fn guards(engine: i32) -> Vec<i32> {
    let space = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    process::children(engine).into_iter().filter(|pid| space(&pid.to_string()) == space("self")).collect()
}

/// How a migration ended.
struct Moved {
    code: Option<i32>,
    text: String,
    /// What it says of itself with --json.
    report: serde_json::Value,
}

fn migrate(on: &[String], arguments: &[&str]) -> Moved {
    let mut command = command_on(on);
    command.arg("migrate").args(arguments);
    let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("migrate: {e}"));
    let report = output.text.lines().find_map(|l| serde_json::from_str(l).ok()).unwrap_or_default();
    Moved { code: output.code, text: output.text, report }
}

impl Moved {
    fn pid(&self) -> i32 {
        self.report["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(0)
    }
}

/// Is it about to end? When its tracer dies nobody has a hand on it any more, and SIGKILL is there before it can run.
fn is_killed(pid: i32, pending: &str) -> bool {
    const PF_EXITING: u64 = 4;
    let killed = u64::from_str_radix(pending, 16).is_ok_and(|set| set & 1 << (libc::SIGKILL - 1) != 0);
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6)).map(str::parse::<u64>);
    killed || !matches!(flags, Some(Ok(flags)) if flags & PF_EXITING == 0)
}

/// Is it still in the executor, which holds it until the guard of a dead engine has done what was decided?
fn is_held(pid: i32) -> bool {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let hex = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).ok();
    let at = read("syscall").split_whitespace().last().and_then(hex);
    let maps = read("maps");
    // in a dump that is code without a file, which the program itself never runs
    let is_there = |line: &str| {
        let range = line.split_whitespace().next().and_then(|range| range.split_once('-'));
        let range = range.and_then(|(from, to)| Some(hex(from)?..hex(to)?));
        line.contains("/dev/zero") && range.is_some_and(|range| at.is_some_and(|at| range.contains(&at)))
    };
    maps.contains("/memfd:standstill") || maps.lines().any(is_there)
}

/// Processes that lead the guest, with nobody's hand on them.
fn running(run: &Run) -> Vec<i32> {
    let files = run.file("").to_string_lossy().trim_end_matches('/').to_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if !String::from_utf8_lossy(&line).contains(&files) {
            continue;
        }
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name: &str| status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("").trim().to_owned();
        // the root alone is 1 in its namespace
        let leads = field("NSpid:").split_whitespace().last() == Some("1");
        if leads
            && field("TracerPid:") == "0"
            && !field("State:").starts_with('Z')
            && !field("State:").starts_with('X')
            && !is_killed(pid, &field("SigPnd:"))
            && !is_held(pid)
        {
            found.push(pid);
        }
    }
    found
}

#[test]
fn there_and_back() {
    for guest in ["moving_words", "moving_family"] {
        let mut run = Run::start(guest);
        let hosts = ["a", "b"].map(|name| Host::start(&run.images(name), &[]));
        for (n, strategy) in
            ["stop-and-copy", "pre-copy", "auto", "post-copy", "hybrid", "pre-copy"].into_iter().enumerate()
        {
            let pid = run.pid.to_string();
            let to = &hosts[n % 2];
            let folder = run.images(&format!("source-{n}"));
            let folder = folder.to_string_lossy();
            let moved =
                migrate(&[], &["-t", &pid, "--to", &to.address, "--strategy", strategy, "-D", &folder, "--json"]);
            assert_eq!(moved.code, Some(0), "{guest} by {strategy}: {}\n{}", moved.text, to.said());
            assert!(within(LIMIT, || !process::alive(run.pid)), "it is still here");
            assert_eq!(running(&run), [moved.pid()]);
            let report = &moved.report;
            let passes = report["passes"].as_array().map_or(0, Vec::len);
            assert!(passes == 1 || strategy != "stop-and-copy", "{report}");
            assert!(report["downtime_seconds"].as_f64().is_some_and(|s| s > 0.0), "{report}");
            run.pid = moved.pid();
            run.look();
            // no images are left on either side
            for side in [Path::new(&*folder).to_owned(), to.folder.clone()] {
                let images = Command::new("find").arg(&side).args(["-name", "*.img"]).output();
                let images = images.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
                assert_eq!(images.unwrap_or_else(|e| panic!("{e}")), "");
            }
        }
        run.check(How::Restored);
    }
}

#[test]
fn what_the_destination_lacks() {
    let mut run = Run::start("eventfd");
    let host = Host::start(&run.images("host"), &[]);
    let moved = migrate(&[], &["-t", &run.pid.to_string(), "--to", &host.address]);
    assert_eq!(moved.code, Some(1), "{}", moved.text);
    assert!(
        moved.text.contains("process ids in use here") && moved.text.contains(&run.pid.to_string()),
        "{}",
        moved.text
    );
    let moved = migrate(&[], &["-t", &run.pid.to_string(), "--to", "127.0.0.1:1"]);
    assert!(moved.code == Some(1) && moved.text.contains("Connection refused"), "{}", moved.text);
    let moved = migrate(&[], &["-t", "999999999", "--to", &host.address]);
    assert!(moved.code == Some(1) && moved.text.contains("no process 999999999"), "{}", moved.text);
    run.check(How::Running);
}

#[test]
fn who_may_be_reached() {
    let folder = process::scratch("who_may_be_reached");
    let mut command = Command::new(Engine::ours().path());
    command.args(["receive", "--listen", "0.0.0.0:0", "-D"]).arg(&folder);
    let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert!(output.code == Some(1) && output.text.contains("--insecure"), "{}", output.text);
    let _ = fs::remove_dir_all(folder);
}

/// Passes connections on to an address, and cuts the second of them, which is that for pages, after so many bytes.
fn cutting(to: &str, after: usize) -> String {
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
    let address = listener.local_addr().map(|a| a.to_string()).unwrap_or_default();
    let to = to.to_owned();
    std::thread::spawn(move || {
        for (n, here) in listener.incoming().map_while(Result::ok).enumerate() {
            let Ok(there) = TcpStream::connect(&to) else { return };
            let pass = move |mut from: TcpStream, mut into: TcpStream, most: usize| {
                let (mut buffer, mut passed) = ([0; 16384], 0);
                while let Ok(n @ 1..) = from.read(&mut buffer) {
                    passed += n;
                    if passed > most || into.write_all(&buffer[..n]).is_err() {
                        break;
                    }
                }
                for side in [from, into] {
                    let _ = side.shutdown(Shutdown::Both);
                }
            };
            let both = here.try_clone().and_then(|h| there.try_clone().map(|t| (h, t)));
            let Ok((back_to, back_from)) = both else { return };
            let most = if n == 1 { after } else { usize::MAX };
            std::thread::spawn(move || pass(here, there, most));
            std::thread::spawn(move || pass(back_from, back_to, usize::MAX));
        }
    });
    address
}

/// The connection over which memory comes breaks, before the destination's tree is whole, and while it runs: it is ended, and the source's goes on.
#[test]
fn pages_that_do_not_come() {
    let mut run = Run::start("moving_words");
    let host = Host::start(&run.images("host"), &[]);
    for (strategy, after) in [("post-copy", 200), ("post-copy", 100_000), ("post-copy", 2_000_000), ("hybrid", 200)] {
        let through = cutting(&host.address, after);
        let moved = migrate(&[], &["-t", &run.pid.to_string(), "--to", &through, "--strategy", strategy]);
        assert_eq!(moved.code, Some(1), "{strategy} {after}: {}\n{}", moved.text, host.said());
        assert_eq!(running(&run), [run.pid], "{strategy} {after}: {}", moved.text);
        run.look();
    }
    run.check(How::Running);
}

#[test]
fn what_is_told_as_json() {
    let folder = process::scratch("told_as_json");
    let mut command = Command::new(Engine::ours().path());
    command.args(["receive", "--json", "--listen", "127.0.0.1:0", "-D"]).arg(&folder);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut server = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    let mut lines = BufReader::new(server.stdout.take().unwrap_or_else(|| panic!("no output"))).lines();
    let mut next = || -> serde_json::Value {
        let line = lines.next().and_then(Result::ok).unwrap_or_default();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{line}: {e}"))
    };
    let first = next();
    assert_eq!((&first["verb"], &first["result"]), (&"receive".into(), &"listening".into()), "{first}");
    let address = first["address"].as_str().unwrap_or_default().to_owned();
    let moved = migrate(&[], &["--to", &address, "-t", &std::process::id().to_string()]);
    assert_eq!(moved.code, Some(1), "{}", moved.text);
    let said = next();
    assert!(said["result"] == "told" && said["text"].as_str().is_some_and(|t| t.contains("a tree to come")), "{said}");
    let _ = server.kill();
    let _ = server.wait();
    let _ = fs::remove_dir_all(folder);
}

/// A destination that says no when all is there: the tree goes on where it is, and nothing of it stays there.
#[test]
fn a_destination_that_cannot() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut run = Run::start("moving_words");
    let script = run.file("says-no");
    let text = "#!/bin/sh\nif test $CRTOOLS_SCRIPT_ACTION = pre-restore; then exit 7; fi\n";
    fs::write(&script, text).unwrap_or_else(|e| panic!("{e}"));
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    let host = Host::start(&run.images("host"), &["--action-script", &script.to_string_lossy()]);
    for strategy in ["stop-and-copy", "pre-copy", "post-copy", "hybrid"] {
        let moved = migrate(&[], &["-t", &run.pid.to_string(), "--to", &host.address, "--strategy", strategy]);
        assert_eq!(moved.code, Some(1), "{}", moved.text);
        assert!(moved.text.contains("exit status: 7"), "{}", moved.text);
        assert_eq!(running(&run), [run.pid]);
    }
    run.check(How::Running);
}

#[derive(Default)]
struct Over(AtomicBool);

struct End<'a>(&'a Over);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0 .0.store(true, Ordering::Relaxed);
    }
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Engines, and what watches over their trees, killed on either side at any moment: never two run, and one when it was resumed.
#[test]
fn killed_at_random() {
    assert_eq!(killed(&["pre-copy", "stop-and-copy"], true), 0);
}

/// With memory that comes behind the commit, who loses a side in between has lost the tree: never two run, and if one does, it
/// has all of its memory. A guard that is killed too cannot end a tree whose memory does not come any more.
#[test]
fn killed_behind_the_commit() {
    killed(&["post-copy", "hybrid"], false);
}

/// How many trees were lost.
fn killed(strategies: &[&str], guards_may_be: bool) -> u32 {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|n| n.parse().ok()).unwrap_or(default);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("STANDSTILL_SEED", now.map_or(1, |d| d.as_secs()));
    eprintln!("seed {seed}");
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut run = Run::start("moving_words");
    let mut hosts = ["a", "b"].map(|name| Host::start(&run.images(name), &[]));
    let began = Instant::now();
    let moved =
        migrate(&[], &["-t", &run.pid.to_string(), "--to", &hosts[1].address, "--strategy", "pre-copy", "--json"]);
    assert_eq!(moved.code, Some(0), "{}", moved.text);
    run.pid = moved.pid();
    let (mut longest, mut there, mut doubts, mut lost) = (began.elapsed(), 0, 0, 0);
    for n in 0..number("STANDSTILL_MIGRATIONS", 10) {
        let folder = run.images(&format!("source-{n}"));
        let to = &mut hosts[n as usize % 2];
        let mut command = Command::new(Engine::ours().path());
        command.args(["migrate", "-t", &run.pid.to_string(), "--to", &to.address, "-D"]).arg(&folder);
        let strategy = strategies[random(&mut state) as usize % strategies.len()];
        let is_late = matches!(strategy, "post-copy" | "hybrid");
        command.args(["--strategy", strategy]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let (who, guards_too) = (random(&mut state) % 3, guards_may_be && random(&mut state).is_multiple_of(2));
        let moment = Duration::from_micros(random(&mut state) % u64::try_from(longest.as_micros()).unwrap_or(1).max(1));
        let over = Over::default();
        let (code, two) = std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                let mut most: HashSet<i32> = HashSet::new();
                while !over.0.load(Ordering::Relaxed) {
                    let now = running(&run);
                    if now.len() > most.len() {
                        most = now.into_iter().collect();
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
                most
            });
            // also if what follows panics
            let end = End(&over);
            let mut source = command.spawn().unwrap_or_else(|e| panic!("{e}"));
            std::thread::sleep(moment);
            if who != 1 {
                let watching = if guards_too { guards(source.id() as i32) } else { Vec::new() };
                let _ = source.kill();
                for pid in watching {
                    process::signal(pid, libc::SIGKILL);
                }
            }
            if who != 0 {
                to.kill(guards_too);
                to.begin();
            }
            let code = source.wait().map(|s| s.code()).unwrap_or(None);
            // whatever it was, asking again decides it
            if folder.join("journal.json").exists() {
                let resumed = migrate(&[], &["--resume", &folder.to_string_lossy()]);
                assert!(resumed.code == Some(0) || is_late, "{n}: {}\n{}", resumed.text, to.said());
                let again = migrate(&[], &["--resume", &folder.to_string_lossy()]);
                assert_eq!(again.code, resumed.code, "{n}, again: {}", again.text);
                assert!(again.text == resumed.text || resumed.code != Some(0), "{n}, again: {}", again.text);
            }
            drop(end);
            (code, watcher.join().unwrap_or_default())
        });
        let what = format!("migration {n}, {who} killed after {moment:?} (guards too: {guards_too}), exit {code:?}");
        assert!(two.len() <= 1, "{what}: {two:?} ran");
        let mut now = Vec::new();
        let one = within(Duration::from_secs(if is_late { 2 } else { 10 }), || {
            now = running(&run);
            now.len() == 1
        });
        if is_late && now.is_empty() {
            lost += 1;
            run = Run::start("moving_words");
            continue;
        }
        assert!(one, "{what}: {now:?} run\n{}", to.said());
        doubts += u32::from(code == Some(3));
        if now[0] != run.pid {
            there += 1;
            run.pid = now[0];
        } else if code.is_none() || code == Some(0) {
            longest += longest / 16;
        }
        run.look();
    }
    eprintln!("{there} were moved, {doubts} were in doubt, {lost} were lost");
    run.check(How::Restored);
    lost
}
