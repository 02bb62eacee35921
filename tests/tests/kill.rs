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
use standstill_tests::process;
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
        Watch { run, masks, children: process::own_children() }
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
        self.run.check(How::Running);
    }
}

fn within(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let began = Instant::now();
    while !holds() {
        if began.elapsed() > limit {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
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
    let watch = Watch::start("storm");
    let images = watch.run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = watch.run.pid.to_string();
    let dump = Engine::ours().command("dump", &images, &["-R", "-t", &pid]);
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
        watch.check(&format!("killed at request {n}"));
    }
    eprintln!("killed at each of {n} requests");
    assert!(n > 20, "only {n} requests");
    watch.end();
}

#[test]
fn a_dump_killed_at_random() {
    let _alone = alone();
    let watch = Watch::start("storm");
    let images = watch.run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let pid = watch.run.pid.to_string();
    let engine = Engine::ours();
    let dump = || {
        let mut command = engine.command("dump", &images, &["-R", "-t", &pid]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap_or_else(|e| panic!("{e}"))
    };
    let mut longest = Duration::ZERO;
    for _ in 0..5 {
        let began = Instant::now();
        let status = dump().wait().unwrap_or_else(|e| panic!("{e}"));
        assert!(status.success(), "a dump that nobody disturbs failed");
        longest = longest.max(began.elapsed());
    }
    let mut state = seed();
    let (kills, mut hit) = (number("STANDSTILL_KILLS", 200), 0);
    for n in 0..kills {
        let mut child = dump();
        let micros = u64::try_from(longest.as_micros()).unwrap_or(u64::MAX);
        std::thread::sleep(Duration::from_micros(random(&mut state) % micros));
        let _ = child.kill();
        let status = child.wait().unwrap_or_else(|e| panic!("{e}"));
        hit += u64::from(!status.success());
        watch.check(&format!("random kill {n}"));
    }
    eprintln!("{hit} of {kills} dumps were killed in time");
    assert!(hit * 4 > kills, "only {hit} of {kills} dumps were killed in time");
    watch.end();
}

/// What a killed restore came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// Nobody is there.
    Nothing,
    /// The guest goes on.
    Whole,
    /// The engine was killed between letting one process go and the other, which no request does at once.
    Part,
}

/// Waits until it is clear what a killed restore came to; then the guest is dumped again, so that it is dead.
fn outcome(run: &mut Run, images: &Path, children: &HashSet<i32>, when: &str) -> Outcome {
    let before = beats(run);
    let mut left = BTreeSet::new();
    let mut seen = None;
    let settled = within(Duration::from_secs(10), || {
        left = process::own_children().difference(children).copied().filter(|&c| process::reap(c).is_none()).collect();
        let there = run.tree.iter().filter(|&&p| process::alive(p)).count();
        let goes_on = beats(run).iter().zip(&before).all(|(now, then)| now != then);
        let traced = run.tree.iter().any(|&p| !matches!(field(p, p, "TracerPid").as_str(), "" | "0"));
        seen = match there {
            0 if left.is_empty() => Some(Outcome::Nothing),
            n if n == run.tree.len() && goes_on && !traced => Some(Outcome::Whole),
            _ => None,
        };
        // the child ends the guest when it finds its parent gone
        seen.is_some()
    });
    let part = run.file("result").exists();
    if !settled || part {
        let texts: Vec<String> = left.iter().chain(&run.tree).map(|p| process::describe(*p)).collect();
        process::end(&run.tree);
        assert!(part, "{when}: left behind: {left:?}\n{}", texts.concat());
        let _ = fs::remove_file(run.file("result"));
        return Outcome::Part;
    }
    if seen == Some(Outcome::Whole) {
        run.dump(&Engine::ours(), images);
        return Outcome::Whole;
    }
    Outcome::Nothing
}

#[test]
fn a_restore_killed_at_each_request() {
    let Some(()) = strace("a_restore_killed_at_each_request") else { return };
    let _alone = alone();
    let children = process::own_children();
    let mut run = Run::start("storm");
    let images = run.images("images");
    fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
    // each is let go by a request of its own
    let threads: usize = run.tree.iter().map(|&p| process::threads(p).len()).sum();
    run.dump(&Engine::ours(), &images);
    let trace = run.folder.join("strace");
    let restore = Engine::ours().command("restore", &images, &["-d"]);
    let (mut whole, mut part, mut n) = (0, 0, 0);
    while whole < 3 {
        n += 1;
        assert!(n < 5000, "a restore of one process does not need {n} requests");
        if !killed_at(n, &restore, &trace) {
            whole += 1;
        }
        part += usize::from(outcome(&mut run, &images, &children, &format!("killed at request {n}")) == Outcome::Part);
    }
    eprintln!("killed at each of {n} requests; {part} times half of the tree was let go");
    assert!(part <= threads, "{part} times only half of the tree was let go");
    run.restore(&Engine::ours(), &images);
    run.check(How::Restored);
}

#[test]
fn a_restore_killed_at_random() {
    let _alone = alone();
    let children = process::own_children();
    let mut run = Run::start("storm");
    let images = run.images("images");
    let engine = Engine::ours();
    fs::write(run.file("engines-die"), "").unwrap_or_else(|e| panic!("{e}"));
    run.dump(&engine, &images);
    let began = Instant::now();
    run.restore(&engine, &images);
    let micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
    run.dump(&engine, &images);
    let mut state = seed();
    let (kills, mut whole, mut part) = (number("STANDSTILL_KILLS", 200) / 2, 0, 0);
    for n in 0..kills {
        let mut command = engine.command("restore", &images, &["-d"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_micros(random(&mut state) % micros));
        let _ = child.kill();
        let _ = child.wait();
        match outcome(&mut run, &images, &children, &format!("random kill {n}")) {
            Outcome::Nothing => {}
            Outcome::Whole => whole += 1,
            Outcome::Part => part += 1,
        }
    }
    eprintln!("{whole} of {kills} restores were done before they were killed, {part} were half done");
    assert!(part * 20 <= kills, "{part} of {kills} times half of the tree was let go");
    run.restore(&engine, &images);
    run.check(How::Restored);
}
