//! Programs that count what they get right, in mid-work: a database with its clients, a cache under load, threads and
//! processes of several languages, relays.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use standstill_tests::process;
use standstill_tests::program::{eventually, folder, free_port, program, Program};
use standstill_tests::skip::skip;

/// How often each is dumped before it is restored.
const DUMPS: u32 = 10;

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}

/// Starts it, has it carried while it counts, twice, and it goes on counting.
fn counts(name: &str, command: &mut Command, at: PathBuf, options: &[&str]) {
    let mut program = Program::start(name, at, command);
    eventually(name, || program.count() > 100 || !process::alive(program.pid));
    for dumps in [DUMPS, 1] {
        program.carry(dumps, options, || {});
        program.moves(100);
    }
    program.survive(options, |p| p.moves(20));
}

#[test]
fn memcached() {
    let (Some(python), Some(path)) = (program("python3"), program("memcached")) else { return };
    let (at, port) = (folder("memcached"), free_port().to_string());
    let mut command = Command::new(python);
    command.arg(script("memcached.py")).arg(path).arg(&at).arg(port);
    counts("memcached", &mut command, at, &["--tcp-established"]);
}

#[test]
fn node() {
    let Some(path) = program("node") else { return };
    let at = folder("node");
    counts("node", Command::new(path).arg(script("workers.js")).arg(&at), at, &[]);
}

/// With its rings: its own files are read and written by threads of the kernel that poll.
#[test]
fn node_rings() {
    let Some(path) = program("node") else { return };
    let at = folder("node_rings");
    let mut command = Command::new(path);
    command.env("UV_USE_IO_URING", "1").arg(script("workers.js")).arg(&at);
    counts("node with rings", &mut command, at, &[]);
}

#[test]
fn pools() {
    let (Some(path), Some(_), Some(_)) = (program("python3"), program("make"), program("cc")) else { return };
    let at = folder("pools");
    counts("python3", Command::new(path).arg(script("pool.py")).arg(&at), at, &[]);
}

#[test]
fn relays() {
    let (Some(path), Some(_), Some(_)) = (program("python3"), program("socat"), program("nc")) else { return };
    // the next one, too
    let port = loop {
        let port = free_port();
        if port < u16::MAX && std::net::TcpListener::bind(("127.0.0.1", port + 1)).is_ok() {
            break port.to_string();
        }
    };
    let at = folder("relays");
    counts("relays", Command::new(path).arg(script("relays.py")).arg(&at).arg(port), at, &["--tcp-established"]);
}

fn java(collector: &str) {
    let (Some(java), Some(javac)) = (program("java"), program("javac")) else { return };
    let at = folder(collector);
    let compiled = Command::new(javac).arg("-d").arg(&at).arg(script("Pool.java")).status();
    assert!(compiled.is_ok_and(|s| s.success()), "javac");
    let mut command = Command::new(java);
    command.arg(format!("-XX:+Use{collector}")).args(["-Xmx160m", "-cp"]).arg(&at).arg("Pool").arg(&at);
    counts("java", &mut command, at, &[]);
}

#[test]
fn java_serial() {
    java("SerialGC");
}

#[test]
fn java_g1() {
    java("G1GC");
}

/// Its heap is mapped three times.
#[test]
fn java_z() {
    java("ZGC");
}

/// Where the programs of PostgreSQL are.
fn postgres_programs() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    versions.map(|v| v.path().join("bin")).find(|p| p.join("pgbench").is_file() && p.join("initdb").is_file())
}

/// Number of a user and its group.
fn user(name: &str) -> Option<(u32, u32)> {
    let text = fs::read_to_string("/etc/passwd").ok()?;
    let fields: Vec<&str> = text.lines().find(|l| l.starts_with(&format!("{name}:")))?.split(':').collect();
    Some((fields.get(2)?.parse().ok()?, fields.get(3)?.parse().ok()?))
}

/// Under its own user, with clients in the tree that bench it, and System V shared memory.
#[test]
fn postgres() {
    use std::os::unix::process::CommandExt as _;
    let (Some(programs), Some((uid, gid))) = (postgres_programs(), user("postgres")) else {
        skip("postgres", "it is not installed (tests/run installs it)");
        return;
    };
    let at = folder("postgres");
    // its own user must get here
    let work = at.join("work");
    fs::create_dir(&work).unwrap_or_else(|e| panic!("{e}"));
    for path in [&at, &work] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    }
    std::os::unix::fs::chown(&work, Some(uid), Some(gid)).unwrap_or_else(|e| panic!("{e}"));
    let copy = work.join("run.sh");
    fs::copy(script("postgres.sh"), &copy).unwrap_or_else(|e| panic!("{e}"));
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    let ask = |question: &str| {
        let mut psql = Command::new(programs.join("psql"));
        psql.arg("-h").arg(&work).args(["-U", "postgres", "-Atc", question]);
        process::run(&mut psql, std::time::Duration::from_secs(30))
            .map(|o| o.text.trim().to_owned())
            .unwrap_or_default()
    };
    let transactions = || ask("select count(*) from pgbench_history").parse().unwrap_or(0u64);
    let mut command = Command::new("/bin/bash");
    command.arg(&copy).arg(&programs).arg(&work).uid(uid).gid(gid).env("HOME", &work);
    let mut program = Program::start("postgres", at.clone(), &mut command);
    eventually("postgres", || work.join("ready").exists() && transactions() > 50);
    let moves = || {
        let before = transactions();
        eventually("transactions", || transactions() > before + 50);
    };
    for dumps in [DUMPS, 1] {
        program.carry(dumps, &[], || {});
        moves();
    }
    program.survive(&[], |_| moves());
    assert!(
        !work.join("failed").exists(),
        "a client failed: {}",
        fs::read_to_string(work.join("bench")).unwrap_or_default()
    );
    // what each of them did is there wholly or not at all
    let sums = "select (select sum(abalance) from pgbench_accounts) - (select sum(delta) from pgbench_history), \
                (select sum(bbalance) from pgbench_branches) - (select sum(tbalance) from pgbench_tellers)";
    assert_eq!(ask(sums), "0|0");
    fs::write(work.join("stop"), "").unwrap_or_else(|e| panic!("{e}"));
    program.gone();
    assert!(!work.join("failed").exists());
}
