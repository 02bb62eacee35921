//! The engine is killed (SIGKILL), at every step and at random: a dump harms nobody, a restore leaves all or nothing.
//!
//! $STANDSTILL_KILLS says how many random kills there are (200), $STANDSTILL_SEED which.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process::{self, within};
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

/// Who is left behind can be told only if nobody else starts processes.
static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> std::sync::MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What a watcher knows of the guest that all this is done to.
struct Watch {
    run: Run,
    /// Blocked signals, as each thread had them when nobody had touched it.
    masks: BTreeMap<i32, BTreeSet<String>>,
    /// Our own children then.
    children: HashSet<i32>,
    /// It has connections, in a network of its own.
    connected: bool,
}

/// The counters that the guest's threads, and its child, count up.
fn beats(run: &Run) -> Vec<Vec<u8>> {
    let bytes = fs::read(run.file("counters")).unwrap_or_default();
    bytes.chunks(8).take(5).map(<[u8]>::to_vec).collect()
}

fn field(pid: i32, tid: i32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/status")).unwrap_or_default();
    text.lines().find_map(|l| l.strip_prefix(name)).unwrap_or("").trim_start_matches(':').trim().to_owned()
}

impl Watch {
    fn start(name: &str) -> Watch {
        let run = Run::start(name);
        fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
        let mut masks: BTreeMap<i32, BTreeSet<String>> = BTreeMap::new();
        for _ in 0..300 {
            for tid in process::threads(run.pid) {
                masks.entry(tid).or_default().insert(field(run.pid, tid, "SigBlk"));
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        Watch { run, masks, children: process::own_children(), connected: name == "tcp_streams" }
    }

    /// The guest goes on, and nothing of the engine is left.
    fn check(&self, when: &str) {
        let pid = self.run.pid;
        if let Ok(why) = fs::read_to_string(self.run.file("result")) {
            let status = process::reap(pid);
            panic!("{when}: the guest failed: {why} (status of its first process: {status:x?})");
        }
        let before = beats(&self.run);
        let mut waiting = String::new();
        let fine = within(Duration::from_secs(10), || {
            waiting.clear();
            if !process::alive(pid) {
                panic!("{when}: the guest is dead, with status {:x?}", process::reap(pid));
            }
            for (&tid, masks) in &self.masks {
                let tracer = field(pid, tid, "TracerPid");
                if tracer != "0" {
                    waiting.push_str(&format!("thread {tid} is traced by {tracer}; "));
                }
                let mask = field(pid, tid, "SigBlk");
                if !masks.contains(&mask) {
                    waiting.push_str(&format!("thread {tid} blocks {mask}; "));
                }
            }
            if self.connected && locks().is_some_and(|n| n != 0) {
                waiting.push_str("connections are locked; ");
            }
            for (n, (now, then)) in beats(&self.run).iter().zip(&before).enumerate() {
                if now == then {
                    waiting.push_str(&format!("its counter {n} stands still; "));
                }
            }
            let left: Vec<i32> = process::own_children().difference(&self.children).copied().collect();
            for child in left {
                if process::reap(child).is_none() {
                    waiting.push_str(&format!("process {child} is left behind; "));
                }
            }
            waiting.is_empty()
        });
        let texts = || self.run.tree.iter().map(|p| process::describe(*p)).collect::<String>();
        assert!(fine, "{when}: {waiting}\n{}", texts());
    }

    /// The last dump is left alone: it succeeds, and removes what dead engines have left in the guest.
    fn end(mut self) {
        let images = self.run.images("last");
        self.run.dump_running(&Engine::ours(), &images);
        self.check("at the end");
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.run.pid)).unwrap_or_default();
        let leaked: Vec<&str> = maps.lines().filter(|l| l.contains("anon_shmem:standstill")).collect();
        assert!(leaked.is_empty(), "left in the guest: {leaked:#?}");
        let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let copies: Vec<i32> =
            process::children(self.run.pid).into_iter().filter(|p| name(p).starts_with("standstill")).collect();
        assert!(copies.is_empty(), "left with the guest: {copies:?}");
        self.run.check(How::Running);
    }
}

/// strace, if it is there and may trace; `inject` kills at a ptrace request.
fn strace(test: &str) -> Option<()> {
    let tried = Command::new("strace").args(["-e", "trace=none", "true"]).stderr(Stdio::null()).status();
    match tried {
        Ok(status) if status.success() => Some(()),
        Ok(status) => {
            skip(test, &format!("strace cannot trace here ({status})"));
            None
        }
        Err(e) => {
            skip(test, &format!("strace: {e}"));
            None
        }
    }
}

/// Runs the engine under strace; it is killed when it makes its `n`th ptrace request, and true says that it was.
fn killed_at(n: u32, engine: &Command, trace: &Path) -> bool {
    let mut last = String::new();
    for _ in 0..20 {
        let mut command = Command::new("strace");
        // with its threads, and without the tasks that it restores, which it must be able to trace itself
        command.args(["-f", "-q", "-b", "execve", "-e", "trace=ptrace"]);
        command.args(["-e", &format!("inject=ptrace:signal=KILL:when={n}"), "-o"]);
        command.arg(trace).arg(engine.get_program()).args(engine.get_args());
        let output = process::run(&mut command, Duration::from_secs(60)).unwrap_or_else(|e| panic!("strace: {e}"));
        match output.code {
            Some(0) => return false,
            Some(137) => return true,
            // somebody else has got one of the ids, for a moment
            Some(1) if output.text.contains("File exists") => {
                last = format!("{}\n{}", output.text, process::users(&process::numbers(&output.text)));
                std::thread::sleep(Duration::from_millis(100));
            }
            other => panic!("request {n}: the engine ended with {other:?}:\n{}", output.text),
        }
    }
    panic!("request {n}: the ids of the guest are in use all the time:\n{last}")
}

/// How many locks there are in our network; `None` if nobody can tell.
fn locks() -> Option<usize> {
    let output = Command::new("nft").args(["list", "tables"]).output().ok().filter(|o| o.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).lines().filter(|l| l.contains("CRIU-")).count())
}

/// A number that looks random, and is the same for the same seed.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let seed = number("STANDSTILL_SEED", now.map_or(1, |d| d.as_secs()));
    eprintln!("seed {seed}");
    seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

#[test]
fn a_dump_killed_at_each_request() {
    let Some(()) = strace("a_dump_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("storm", "dump", &["-R"]);
}

#[test]
fn a_pre_dump_killed_at_each_request() {
    let Some(()) = strace("a_pre_dump_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("storm", "pre-dump", &[]);
}

/// Of a program that writes so fast that it is copied on write.
#[test]
fn a_snapshot_killed_at_each_request() {
    let Some(()) = strace("a_snapshot_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("track_flood", "dump", &["-R", "--snapshot"]);
}

#[test]
fn a_dump_of_connections_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_connections_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("tcp_streams", "dump", &["-R", "--tcp-established", "--network-lock", "nftables"]);
}

#[test]
fn a_dump_of_rings_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_rings_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("io_uring_busy", "dump", &["-R"]);
}

/// Of a thread that computes: what is in its registers is in no memory that could be compared.
#[test]
fn a_dump_of_registers_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_registers_killed_at_each_request") else { return };
    let _alone = alone();
    for guest in ["registers_leader", "registers"] {
        each_request_of_a_dump(guest, "dump", &["-R"]);
    }
}

/// What the kernel has a holder of, and no dump may let go or answer: locks, watches with events, a terminal with text.
#[test]
fn a_dump_of_locks_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_locks_killed_at_each_request") else { return };
    let _alone = alone();
    for guest in ["locks_waiting", "lease"] {
        each_request_of_a_dump(guest, "dump", &["-R", "--file-locks"]);
    }
}

#[test]
fn a_dump_of_watches_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_watches_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("inotify", "dump", &["-R"]);
}

#[test]
fn a_dump_of_terminals_killed_at_each_request() {
    let Some(()) = strace("a_dump_of_terminals_killed_at_each_request") else { return };
    let _alone = alone();
    each_request_of_a_dump("tty_data", "dump", &["-R"]);
}

/// Ends what a pre-dump that was complete has left running on purpose: the next one has to make it again.
fn untrack(images: &Path, pid: &str) {
    let mut command = Engine::ours().command("untrack", images, &["-t", pid]);
    let output = process::run(&mut command, Duration::from_secs(60));
    assert!(output.is_ok_and(|o| o.code.is_some()), "untrack did not end");
}

/// How many descriptors a program has.
fn descriptors(pid: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

fn each_request_of_a_dump(guest: &str, verb: &str, options: &[&str]) {
    let watch = Watch::start(guest);
    let images = watch.run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = watch.run.pid.to_string();
    let dump = Engine::ours().command(verb, &images, &[&["-t", &pid][..], options].concat());
    let open = descriptors(&pid);
    let trace = watch.run.folder.join("strace");
    // how many there are differs a little from run to run
    let mut whole = 0;
    let mut n = 0;
    while whole < 5 {
        n += 1;
        assert!(n < 5000, "a dump of one process does not need {n} requests");
        if !killed_at(n, &dump, &trace) {
            whole += 1;
        }
        if verb == "pre-dump" {
            untrack(&images, &pid);
            // the executor closes what it opened within the time in which it sees that its engine is dead
            assert!(within(Duration::from_secs(5), || descriptors(&pid) == open), "request {n}: a descriptor is left");
        }
        watch.check(&format!("killed at request {n}"));
    }
    eprintln!("killed at each of {n} requests");
    assert!(n > 20, "only {n} requests");
    watch.end();
}

#[test]
fn a_dump_killed_at_random() {
    let _alone = alone();
    random_kills_of_a_dump("storm", &[]);
}

#[test]
fn a_dump_of_connections_killed_at_random() {
    let _alone = alone();
    random_kills_of_a_dump("tcp_streams", &["--tcp-established", "--network-lock", "nftables"]);
}

fn random_kills_of_a_dump(guest: &str, options: &[&str]) {
    let watch = Watch::start(guest);
    let images = watch.run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = watch.run.pid.to_string();
    let mut dump = Engine::ours().command("dump", &images, &[&["-R", "-t", &pid][..], options].concat());
    let mut moments = Moments::of(&mut dump);
    let (kills, mut hit) = (number("STANDSTILL_KILLS", 200), 0);
    for n in 0..kills {
        hit += u64::from(moments.kill(&mut dump));
        watch.check(&format!("random kill {n}"));
    }
    eprintln!("{hit} of {kills} dumps were killed in time");
    assert!(hit * 4 > kills, "only {hit} of {kills} dumps were killed in time");
    watch.end();
}

/// What a killed engine left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Nobody is there.
    Nothing,
    /// The guest goes on.
    Whole,
}

/// Waits until it is clear what a killed restore, or a dump that was to kill, came to: all of it, or nothing.
fn outcome(run: &Run, children: &HashSet<i32>, when: &str) -> Outcome {
    let before = beats(run);
    let mut left = BTreeSet::new();
    let mut seen = None;
    let settled = within(Duration::from_secs(10), || {
        assert!(!run.file("result").exists(), "{when}: {}", fs::read_to_string(run.file("result")).unwrap_or_default());
        left = process::own_children().difference(children).copied().filter(|&c| process::reap(c).is_none()).collect();
        let there = run.tree.iter().filter(|&&p| process::exists(p)).count();
        let alive = run.tree.iter().filter(|&&p| process::alive(p)).count();
        let goes_on = beats(run).iter().zip(&before).all(|(now, then)| now != then);
        let traced = run.tree.iter().any(|&p| !matches!(field(p, p, "TracerPid").as_str(), "" | "0"));
        left.retain(|child| !run.tree.contains(child));
        seen = match (there, alive) {
            (0, 0) if left.is_empty() => Some(Outcome::Nothing),
            (_, n) if n == run.tree.len() && goes_on && !traced && left.is_empty() => Some(Outcome::Whole),
            _ => None,
        };
        seen.is_some()
    });
    if !settled {
        let texts: Vec<String> = left.iter().chain(&run.tree).map(|p| process::describe(*p)).collect();
        process::end(&run.tree);
        panic!("{when}: half a tree, or somebody else, is left behind: {left:?}\n{}", texts.concat());
    }
    seen.unwrap_or(Outcome::Nothing)
}

/// While nobody is there, nobody may answer for a guest's connections; while it is, nothing may be in their way.
fn check_locks(run: &Run, seen: Outcome, when: &str) {
    let locked = usize::from(seen == Outcome::Nothing);
    let fine = !run.is("tcp_streams") || within(Duration::from_secs(5), || locks().is_none_or(|n| n == locked));
    assert!(fine, "{when}: {:?} locks, not {locked}", locks());
}

/// As [`outcome`] of a restore; then the guest is dumped again, so that it is dead.
fn restored(run: &mut Run, images: &Path, children: &HashSet<i32>, when: &str) -> Outcome {
    let seen = outcome(run, children, when);
    check_locks(run, seen, when);
    if seen == Outcome::Whole {
        run.dump(&Engine::ours(), images);
    }
    seen
}

/// A guest that is dumped, with the children that we had before it, and a note for it that engines die.
fn dumped(name: &str) -> (Run, std::path::PathBuf, HashSet<i32>) {
    let children = process::own_children();
    let mut run = Run::start(name);
    let images = run.images("images");
    fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
    run.dump(&Engine::ours(), &images);
    (run, images, children)
}

/// Random moments within the time that an engine takes. How long that is differs with what else the machine does, so it is
/// learned all the time: from each engine that was done before its moment came, and a little more after each that was not.
struct Moments {
    longest: Duration,
    state: u64,
}

impl Moments {
    /// For engines that take that long.
    fn within(longest: Duration) -> Moments {
        Moments { longest, state: seed() }
    }

    /// For an engine that may run undisturbed first.
    fn of(command: &mut Command) -> Moments {
        let mut longest = Duration::ZERO;
        for _ in 0..5 {
            let began = Instant::now();
            let mut child = start(command);
            let status = child.wait().unwrap_or_else(|e| panic!("{e}"));
            assert!(status.success(), "an engine that nobody disturbs failed");
            longest = longest.max(began.elapsed());
        }
        Moments::within(longest)
    }

    /// Starts an engine, and kills it at such a moment; true if it was not done by then.
    fn kill(&mut self, command: &mut Command) -> bool {
        let began = Instant::now();
        let mut child = start(command);
        let micros = u64::try_from(self.longest.as_micros()).unwrap_or(u64::MAX).max(1);
        let moment = Duration::from_micros(random(&mut self.state) % micros);
        while let Some(left) = moment.checked_sub(began.elapsed()) {
            if matches!(child.try_wait(), Ok(Some(_))) {
                self.longest = (self.longest + began.elapsed()) / 2;
                break;
            }
            std::thread::sleep(left.min(Duration::from_micros(200)));
        }
        let _ = child.kill();
        let hit = !child.wait().is_ok_and(|s| s.success());
        if hit {
            self.longest += self.longest / 16;
        }
        hit
    }
}

fn start(command: &mut Command) -> std::process::Child {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|e| panic!("{e}"))
}

#[test]
fn a_restore_killed_at_each_request() {
    let Some(()) = strace("a_restore_killed_at_each_request") else { return };
    let _alone = alone();
    for guest in ["storm", "tcp_streams"] {
        let (mut run, images, children) = dumped(guest);
        let trace = run.folder.join("strace");
        let options: &[&str] = if guest == "storm" { &["-d"] } else { &["-d", "--tcp-established"] };
        let restore = Engine::ours().command("restore", &images, options);
        let (mut whole, mut n) = (0, 0);
        while whole < 3 {
            n += 1;
            assert!(n < 5000, "a restore does not need {n} requests");
            if !killed_at(n, &restore, &trace) {
                whole += 1;
            }
            restored(&mut run, &images, &children, &format!("{guest} killed at request {n}"));
        }
        eprintln!("{guest}: killed at each of {n} requests");
        run.restore(&Engine::ours(), &images);
        run.check(How::Restored);
    }
}

#[test]
fn a_restore_killed_at_random() {
    let _alone = alone();
    for guest in ["storm", "tcp_streams"] {
        let (mut run, images, children) = dumped(guest);
        let engine = Engine::ours();
        let began = Instant::now();
        run.restore(&engine, &images);
        let mut moments = Moments::within(began.elapsed());
        run.dump(&engine, &images);
        let (kills, mut whole) = (number("STANDSTILL_KILLS", 200) / 4, 0);
        for n in 0..kills {
            let options: &[&str] = if guest == "storm" { &["-d"] } else { &["-d", "--tcp-established"] };
            moments.kill(&mut engine.command("restore", &images, options));
            let when = format!("{guest}, random kill {n}");
            whole += usize::from(restored(&mut run, &images, &children, &when) == Outcome::Whole);
        }
        eprintln!("{guest}: {whole} of {kills} restores were done before they were killed");
        run.restore(&engine, &images);
        run.check(How::Restored);
    }
}

/// A dump that ends the guest: it goes on, or is in the images and all of it is dead.
fn brought_back(run: &mut Run, images: &Path, children: &HashSet<i32>, when: &str) -> Outcome {
    let seen = outcome(run, children, when);
    check_locks(run, seen, when);
    if seen == Outcome::Nothing {
        run.restore(&Engine::ours(), images);
    }
    seen
}

#[test]
fn a_dump_that_kills_killed_at_each_request() {
    let Some(()) = strace("a_dump_that_kills_killed_at_each_request") else { return };
    let _alone = alone();
    for (guest, options) in
        [("storm", &[][..]), ("tcp_streams", &["--tcp-established", "--network-lock", "nftables"][..])]
    {
        let (mut run, images, children) = dumped(guest);
        run.restore(&Engine::ours(), &images);
        let pid = run.pid.to_string();
        let dump = Engine::ours().command("dump", &images, &[&["-t", &pid][..], options].concat());
        let trace = run.folder.join("strace");
        let (mut whole, mut n) = (0, 0);
        while whole < 3 {
            n += 1;
            assert!(n < 5000, "a dump does not need {n} requests");
            if !killed_at(n, &dump, &trace) {
                whole += 1;
            }
            brought_back(&mut run, &images, &children, &format!("{guest} killed at request {n}"));
        }
        eprintln!("{guest}: killed at each of {n} requests");
        run.check(How::Restored);
    }
}

#[test]
fn a_dump_that_kills_killed_at_random() {
    let _alone = alone();
    for (guest, options) in
        [("storm", &[][..]), ("tcp_streams", &["--tcp-established", "--network-lock", "nftables"][..])]
    {
        let (mut run, images, children) = dumped(guest);
        let engine = Engine::ours();
        run.restore(&engine, &images);
        let began = Instant::now();
        run.dump(&engine, &images);
        let mut moments = Moments::within(began.elapsed());
        run.restore(&engine, &images);
        let pid = run.pid.to_string();
        let (kills, mut dead) = (number("STANDSTILL_KILLS", 200) / 4, 0);
        for n in 0..kills {
            let mut dump = engine.command("dump", &images, &[&["-t", &pid][..], options].concat());
            moments.kill(&mut dump);
            let when = format!("{guest}, random kill {n}");
            dead += usize::from(brought_back(&mut run, &images, &children, &when) == Outcome::Nothing);
        }
        eprintln!("{guest}: {dead} of {kills} dumps were done before they were killed");
        run.check(How::Restored);
    }
}
