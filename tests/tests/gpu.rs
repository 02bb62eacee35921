//! CUDA tasks, with a driver that the test builds (`tests/gpu/fake.c`) and a program of the driver's interface that checks
//! itself (`tests/gpu/counter.c`): dump, death, restore; every failure; engines that die in every step.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process::{self, within};
use standstill_tests::skip::skip;

const LIMIT: Duration = Duration::from_secs(30);
const A: &str = "GPU-11111111-2222-3333-4444-555555555555";
const B: &str = "GPU-66666666-7777-8888-9999-aaaaaaaaaaaa";

/// The folder with what is built of tests/gpu, or why it cannot be.
fn built() -> Result<&'static Path, String> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("gpu");
        // a folder that stays: the programs of the next run may be the same
        let folder = standstill_tests::engine::programs().join("gpu");
        let own = folder.join(std::process::id().to_string());
        std::fs::create_dir_all(&own).map_err(|e| e.to_string())?;
        let cc = |name: &str, file: &str, more: &[&str]| {
            let to = folder.join(name);
            std::fs::create_dir_all(to.parent().unwrap_or(&folder)).map_err(|e| e.to_string())?;
            let new = own.join("new");
            let mut command = Command::new("cc");
            command
                .args(["-std=gnu11", "-O1", "-pthread", "-o"])
                .arg(&new)
                .arg(source.join(file))
                .args(more)
                .arg("-ldl");
            let output = process::run(&mut command, LIMIT).map_err(|_| "there is no C compiler here".to_owned())?;
            assert_eq!(output.code, Some(0), "{file}: {}", output.text);
            std::fs::rename(&new, &to).map_err(|e| e.to_string())
        };
        let library = ["-shared", "-fPIC"];
        cc("counter", "counter.c", &[])?;
        cc("step", "step.c", &[])?;
        cc("new/libcuda.so.1", "fake.c", &library)?;
        cc("new/libnvidia-ml.so.1", "fake.c", &library)?;
        cc("old/libcuda.so.1", "fake.c", &["-shared", "-fPIC", "-DOLD"])?;
        cc("old/libnvidia-ml.so.1", "fake.c", &["-shared", "-fPIC", "-DOLD"])?;
        let _ = std::fs::remove_dir(&own);
        Ok(folder)
    });
    built.as_deref().map_err(Clone::clone)
}

/// A CUDA program, and its machine.
struct Fake {
    folder: PathBuf,
    device: PathBuf,
    programs: &'static Path,
    processes: usize,
    pid: i32,
    known: Vec<i32>,
}

impl Fake {
    fn start(test: &str, processes: usize) -> Option<Fake> {
        process::adopt();
        let programs = match built() {
            Ok(programs) => programs,
            Err(why) => {
                skip(test, &why);
                return None;
            }
        };
        let folder = process::scratch("gpu");
        let name = folder.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let device = Path::new("/dev").join(format!("nvidia-{name}"));
        for sub in ["cuda", "files"] {
            std::fs::create_dir_all(folder.join(sub)).unwrap_or_else(|e| panic!("{e}"));
        }
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let zero = rustix::fs::makedev(1, 5);
        if let Err(e) = rustix::fs::mknodat(rustix::fs::CWD, &device, rustix::fs::FileType::CharacterDevice, mode, zero)
        {
            skip(test, &format!("no device file can be made here: {e}"));
            let _ = std::fs::remove_dir_all(&folder);
            return None;
        }
        let mut fake = Fake { folder, device, programs, processes, pid: 0, known: Vec::new() };
        fake.config("gpus", &format!("{A} Fake-100 {}\n{B} Fake-100 {}\n", 1u64 << 30, 1u64 << 30));
        fake.config("device", &fake.device.display().to_string());
        let mut command = Command::new(programs.join("counter"));
        command.arg(fake.folder.join("files")).args([processes.to_string(), "3".to_owned()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        fake.environment(&mut command);
        #[allow(clippy::zombie_processes)]
        let child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        fake.pid = i32::try_from(child.id()).unwrap_or(0);
        fake.counts();
        fake.known = process::tree(fake.pid);
        assert_eq!(fake.known.len(), processes);
        Some(fake)
    }

    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("FAKE_CUDA_DIR", self.folder.join("cuda")).env("LD_LIBRARY_PATH", self.programs.join("new"))
    }

    fn config(&self, name: &str, text: &str) {
        let (new, to) = (self.folder.join("cuda/half"), self.folder.join("cuda").join(name));
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &to)).unwrap_or_else(|e| panic!("{e}"));
    }

    fn forget(&self, name: &str) {
        let _ = std::fs::remove_file(self.folder.join("cuda").join(name));
    }

    fn images(&self) -> PathBuf {
        let images = self.folder.join("images");
        std::fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
        images
    }

    fn count(&self, n: usize) -> Option<i64> {
        i64::try_from(std::fs::metadata(self.folder.join(format!("files/count-{n}"))).ok()?.len()).ok()
    }

    /// Every process counts on.
    fn counts(&self) {
        let before: Vec<_> = (0..self.processes).map(|n| self.count(n).unwrap_or(0)).collect();
        // one that was restored begins with less
        let more = |now: i64, before: i64| now != before && now > 2;
        let more = || before.iter().enumerate().all(|(n, before)| self.count(n).is_some_and(|now| more(now, *before)));
        let on = within(LIMIT, more);
        assert!(on, "it does not count on: {} {:?}", self.results(), process::describe(self.pid));
    }

    /// Nobody is at work on their CUDA: the guard of an engine that was killed, which follows the plan as all do, is done.
    fn is_let_alone(&self) {
        for pid in process::tree(self.pid) {
            let pid = rustix::process::Pid::from_raw(pid).expect("a process");
            let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty());
            let process = process.unwrap_or_else(|e| panic!("{e}"));
            let free = || rustix::fs::flock(&process, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok();
            assert!(within(LIMIT, free), "somebody is still at work on {pid:?}");
        }
    }

    fn results(&self) -> String {
        let one = |n| std::fs::read_to_string(self.folder.join(format!("files/result-{n}"))).unwrap_or_default();
        (0..self.processes).map(one).collect::<Vec<_>>().join(", ")
    }

    fn command(&self, verb: &str, more: &[&str]) -> Command {
        let mut command = Engine::ours().command(verb, &self.images(), more);
        self.environment(&mut command);
        command
    }

    /// Exit code, and what was said.
    fn run(&self, verb: &str, more: &[&str]) -> (Option<i32>, String) {
        self.run_as(self.command(verb, more), verb)
    }

    fn run_as(&self, mut command: Command, verb: &str) -> (Option<i32>, String) {
        let log = self.images().join(format!("{verb}.log"));
        let _ = std::fs::remove_file(&log);
        let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
        let log = std::fs::read_to_string(log).unwrap_or_default();
        (output.code, output.text + &log)
    }

    fn dump(&self, more: &[&str]) -> (Option<i32>, String) {
        let pid = self.pid.to_string();
        self.run("dump", &[&["-t", &pid], more].concat())
    }

    /// Dumps it, and it is dead then.
    fn dump_dead(&mut self) {
        self.known = process::tree(self.pid);
        let (code, text) = self.dump(&[]);
        assert_eq!(code, Some(0), "{text}");
        process::wait_gone(&self.known, LIMIT).unwrap_or_else(|left| panic!("{left:?} are still there"));
    }

    fn restore(&self, more: &[&str]) -> (Option<i32>, String) {
        self.run("restore", &[&["-d"], more].concat())
    }

    /// Nothing of it is there.
    fn is_gone(&self) {
        assert!(process::wait_gone(&self.known, LIMIT).is_ok(), "a failed restore left something");
    }

    /// It checks all of its device memory, and ends.
    fn check(&mut self) {
        self.counts();
        self.known.extend(process::tree(self.pid));
        std::fs::write(self.folder.join("files/check"), "").unwrap_or_else(|e| panic!("{e}"));
        let done = || (0..self.processes).all(|n| self.folder.join(format!("files/result-{n}")).exists());
        assert!(within(LIMIT, done), "no result: {}", self.results());
        assert!(self.results().split(", ").all(|r| r.starts_with("ok ")), "{}", self.results());
        let _ = process::wait_gone(&self.known, LIMIT);
    }

    /// What NVIDIA's tool would do.
    fn step(&self, step: &str) -> String {
        let mut command = Command::new(self.programs.join("step"));
        self.environment(command.arg(step).arg(self.pid.to_string()));
        let output = process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(0), "{step}: {}", output.text);
        output.text.trim().to_owned()
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("cuda/log")).unwrap_or_default()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.device);
        process::clean_up(self.pid, &mut self.known, &self.folder);
    }
}

#[test]
fn dead_and_restored() {
    let Some(mut fake) = Fake::start("dead_and_restored", 3) else { return };
    for _ in 0..2 {
        fake.dump_dead();
        let (code, text) = fake.restore(&[]);
        assert_eq!(code, Some(0), "{text}");
        fake.counts();
    }
    // all are locked before one is checkpointed, and none is unlocked before all are restored
    let log = fake.log();
    let steps: Vec<&str> = log.lines().filter_map(|l| l.split(' ').next()).collect();
    let once = ["lock", "checkpoint", "restore", "unlock"].map(|step| [step; 3]).concat();
    assert_eq!(steps, [once.clone(), once].concat());
    fake.check();
}

#[test]
fn left_running() {
    let Some(mut fake) = Fake::start("left_running", 2) else { return };
    for _ in 0..3 {
        let (code, text) = fake.dump(&["-R", "--display-gpus"]);
        assert_eq!(code, Some(0), "{text}");
        assert!(text.contains(A) && text.contains("Fake-100") && text.contains("3 MiB on"), "{text}");
        fake.counts();
    }
    // what was written is a checkpoint, although the program went on behind it
    for pid in process::tree(fake.pid).into_iter().rev() {
        process::signal(pid, libc::SIGKILL);
    }
    fake.is_gone();
    let (code, text) = fake.restore(&[]);
    // it counts on from where it was dumped
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

#[test]
fn the_images_say_so() {
    let Some(mut fake) = Fake::start("the_images_say_so", 1) else { return };
    fake.dump_dead();
    let show = |name: &str| {
        let mut command = Command::new(Engine::ours().path());
        command.args(["image", "show"]).arg(fake.images().join(name));
        process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}")).text
    };
    let inventory = show("inventory.img");
    assert!(inventory.contains("\"cuda_plugin\""), "{inventory}");
    let record = show("standstill-gpu.img");
    for word in [A, B, "Fake-100", "580.65.06", "\"restore_tid\"", "\"cuda\": 13000"] {
        assert!(record.contains(word), "{word} is not in {record}");
    }
    // as of CRIU, which has no such image
    std::fs::remove_file(fake.images().join("standstill-gpu.img")).unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

/// What the driver says no to: the dump fails with these words, and the program goes on with its GPU.
#[test]
fn refused_dumps() {
    let Some(mut fake) = Fake::start("refused_dumps", 2) else { return };
    let cases = [
        ("lock error 801", &["cuCheckpointProcessLock", "801", "managed memory"][..]),
        ("lock error 600", &["--gpu-timeout"]),
        ("lock error 401", &["the process is running"]),
        ("checkpoint error 801", &["managed memory", "MIG"]),
        ("checkpoint error 2", &["not enough memory"]),
        ("checkpoint error 999", &["cuCheckpointProcessCheckpoint says", "999"]),
        ("checkpoint leave 0", &["NVIDIA device", "/dev/nvidia-", "left it behind"]),
    ];
    for (plan, words) in cases {
        fake.config("plan", plan);
        let (code, text) = fake.dump(&[]);
        fake.forget("plan");
        assert_eq!(code, Some(1), "{plan}: {text}");
        for word in words {
            assert!(text.contains(word), "{plan}: nothing about {word:?} in {text}");
        }
        assert!(!fake.images().join("inventory.img").exists(), "{plan}: a refused dump left an inventory");
        fake.counts();
    }
    fake.dump_dead();
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

#[test]
fn a_lock_that_takes_too_long() {
    let Some(mut fake) = Fake::start("a_lock_that_takes_too_long", 1) else { return };
    fake.config("busy", "");
    // until it is in there
    std::thread::sleep(Duration::from_millis(20));
    let (code, text) = fake.dump(&["--gpu-timeout", "1"]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("within 1000 ms") && text.contains("--gpu-timeout"), "{text}");
    fake.forget("busy");
    fake.check();
}

#[test]
fn no_driver_and_an_old_one() {
    let Some(mut fake) = Fake::start("no_driver_and_an_old_one", 1) else { return };
    let pid = fake.pid.to_string();
    let mut command = fake.command("dump", &["-t", &pid]);
    command.env("LD_LIBRARY_PATH", fake.programs.join("old"));
    let (code, text) = fake.run_as(command, "dump");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("550.54.15 (CUDA 12.4)") && text.contains("driver 570"), "{text}");
    fake.counts();
    if Command::new("nvidia-smi").output().is_ok() {
        return skip("no_driver", "there is a driver here");
    }
    let mut command = fake.command("dump", &["-t", &pid]);
    command.env_remove("LD_LIBRARY_PATH");
    let (code, text) = fake.run_as(command, "dump");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("there is no NVIDIA driver"), "{text}");
    fake.dump_dead();
    let mut command = fake.command("restore", &["-d"]);
    command.env_remove("LD_LIBRARY_PATH");
    let (code, text) = fake.run_as(command, "restore");
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("there is no NVIDIA driver"), "{text}");
    fake.is_gone();
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

#[test]
fn more_on_the_gpu_than_this_machine_has() {
    let Some(mut fake) = Fake::start("more_on_the_gpu_than_this_machine_has", 1) else { return };
    // a file with a hole: device memory that a process of this id has, as far as anybody asks
    let vram = fake.folder.join(format!("cuda/vram/{A}/{}", fake.pid));
    let length = std::fs::metadata(&vram).unwrap_or_else(|e| panic!("{e}")).len();
    let set = |n| std::fs::File::options().write(true).open(&vram).and_then(|f| f.set_len(n));
    set(1 << 42).unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = fake.dump(&[]);
    set(length).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("4194304 MiB on GPUs") && text.contains("MiB of that are free"), "{text}");
    assert!(!fake.log().contains("lock"), "it was locked first");
    fake.check();
}

/// A process that dies in the middle: the dump fails, the others go on.
#[test]
fn a_task_that_dies() {
    for plan in ["lock kill 0", "checkpoint kill 0", "checkpoint hang 0"] {
        let Some(fake) = Fake::start("a_task_that_dies", 1) else { return };
        fake.config("plan", plan);
        let (code, text) = fake.dump(&[]);
        assert_eq!(code, Some(1), "{plan}: {text}");
        assert!(text.contains("ended"), "{plan}: {text}");
    }
}

/// What the driver cannot do at a restore: an error, nothing is left, and it can be done once more.
#[test]
fn failed_restores() {
    let Some(mut fake) = Fake::start("failed_restores", 2) else { return };
    fake.dump_dead();
    let cases = [
        ("restore error 2", &["not enough memory on the GPU"][..]),
        ("restore error 101", &["do not match", "--gpu-map"]),
        ("restore error 999", &["cuCheckpointProcessRestore says"]),
        ("restore kill 0", &["ended"]),
        ("restore fail 0", &["999"]),
        ("unlock error 999", &["cuCheckpointProcessUnlock says"]),
    ];
    for (plan, words) in cases {
        fake.config("plan", plan);
        let (code, text) = fake.restore(&[]);
        fake.forget("plan");
        assert_eq!(code, Some(1), "{plan}: {text}");
        for word in words {
            assert!(text.contains(word), "{plan}: nothing about {word:?} in {text}");
        }
        fake.is_gone();
    }
    // other GPUs than those of the checkpoint
    let before = format!("{A} Fake-100 {}\n{B} Fake-100 {}\n", 1u64 << 30, 1u64 << 30);
    let other = [
        (format!("{B} Fake-100 {}\n", 1u64 << 30), &[A, B, "--gpu-map"][..], &[][..]),
        (format!("{A} Fake-200 {}\n", 1u64 << 30), &["Fake-100", "Fake-200"], &[]),
        (format!("{A} Fake-100 1000\n"), &["needs 6 MiB on the GPU", "are free"], &[]),
        (before.clone(), &["is not in the checkpoint"], &["GPU-00000000-2222-3333-4444-555555555555"]),
    ];
    for (gpus, words, map) in other {
        fake.config("gpus", &gpus);
        let map: Vec<String> = map.iter().map(|old| format!("{old}={B}")).collect();
        let options: Vec<&str> = map.iter().flat_map(|m| ["--gpu-map", m.as_str()]).collect();
        let (code, text) = fake.restore(&options);
        assert_eq!(code, Some(1), "{gpus}: {text}");
        for word in words {
            assert!(text.contains(word), "{gpus}: nothing about {word:?} in {text}");
        }
        fake.is_gone();
    }
    // one in the place of the other
    fake.config("gpus", &format!("{B} Fake-100 {}\n", 1u64 << 30));
    let map = format!("{A}={B}");
    let (code, text) = fake.restore(&["--gpu-map", &map]);
    assert_eq!(code, Some(0), "{text}");
    fake.counts();
    assert!(fake.folder.join(format!("cuda/vram/{B}/{}", fake.pid)).exists(), "it is not on the other GPU");
    fake.check();
}

#[test]
fn a_record_that_lies() {
    let Some(mut fake) = Fake::start("a_record_that_lies", 1) else { return };
    fake.dump_dead();
    let record = fake.images().join("standstill-gpu.img");
    let good = std::fs::read(&record).unwrap_or_else(|e| panic!("{e}"));
    for n in (8..good.len()).step_by(3) {
        let mut bad = good.clone();
        bad[n] ^= 0x55;
        std::fs::write(&record, &bad).unwrap_or_else(|e| panic!("{e}"));
        let (code, text) = fake.restore(&["-v0"]);
        // some of it is only shown
        if code == Some(0) {
            fake.known = process::tree(fake.pid);
            process::end(&fake.known);
        } else {
            assert_eq!(code, Some(1), "{text}");
            assert!(!text.contains("panicked"), "{text}");
            fake.is_gone();
        }
    }
    std::fs::write(&record, &good).unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

/// Engines that are killed before and behind every step of the driver, and anywhere else: the program goes on with its GPU.
#[test]
fn killed_engines() {
    let Some(mut fake) = Fake::start("killed_engines", 2) else { return };
    let mask = |fake: &Fake| {
        let of = |tid| std::fs::read_to_string(format!("/proc/{}/task/{tid}/status", fake.pid)).unwrap_or_default();
        let blocked = |tid| of(tid).lines().find(|l| l.starts_with("SigBlk")).map(str::to_owned);
        process::threads(fake.pid).into_iter().map(|tid| (tid, blocked(tid))).collect::<Vec<_>>()
    };
    let before = mask(&fake);
    for step in ["lock", "checkpoint", "restore", "unlock"] {
        for when in ["die-before 0", "die-after 0", "late 0", "late 100"] {
            fake.config("plan", &format!("{step} {when}"));
            let (code, text) = fake.dump(&["-R"]);
            assert_eq!(code, Some(128 + libc::SIGKILL), "{step} {when}: {text}");
            fake.is_let_alone();
            fake.counts();
            let same = within(LIMIT, || mask(&fake) == before);
            assert!(same, "{step} {when}: {:?} is not {before:?}", mask(&fake));
        }
    }
    let pid = fake.pid.to_string();
    for n in 0..30u64 {
        let mut command = fake.command("dump", &["-R", "-t", &pid]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(Duration::from_micros(n * 1_901));
        let _ = child.kill();
        child.wait().unwrap_or_else(|e| panic!("{e}"));
        fake.counts();
    }
    let same = within(LIMIT, || mask(&fake) == before);
    assert!(same, "{:?} is not {before:?}", mask(&fake));
    fake.check();
}

/// A restore whose engine is killed in a step of the driver leaves nothing.
#[test]
fn killed_restores() {
    let Some(mut fake) = Fake::start("killed_restores", 2) else { return };
    fake.dump_dead();
    for step in ["restore", "unlock"] {
        for when in ["before", "after"] {
            fake.config("plan", &format!("{step} die-{when} 0"));
            let (code, text) = fake.restore(&[]);
            assert_eq!(code, Some(128 + libc::SIGKILL), "{step} {when}: {text}");
            fake.is_gone();
        }
    }
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

/// A task that somebody has locked, or checkpointed, is so behind a dump that leaves it running, or fails, or was killed; a
/// restore ends with it running.
#[test]
fn found_locked_or_checkpointed() {
    let Some(mut fake) = Fake::start("found_locked_or_checkpointed", 1) else { return };
    for (steps, state, fails) in [(&["lock"][..], "1", "checkpoint error 999"), (&["checkpoint"], "2", "")] {
        for step in steps {
            assert_eq!(fake.step(step), "0");
        }
        assert_eq!(fake.step("state"), state);
        let (code, text) = fake.dump(&["-R"]);
        assert_eq!(code, Some(0), "{text}");
        assert_eq!(fake.step("state"), state);
        if !fails.is_empty() {
            fake.config("plan", fails);
            let (code, text) = fake.dump(&["-R"]);
            assert_eq!(code, Some(1), "{text}");
            assert_eq!(fake.step("state"), state);
            fake.config("plan", "checkpoint die-after 0");
            let (code, text) = fake.dump(&["-R"]);
            assert_eq!(code, Some(128 + libc::SIGKILL), "{text}");
            assert!(within(LIMIT, || fake.step("state") == state), "{}", fake.step("state"));
        }
    }
    fake.dump_dead();
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    assert_eq!(fake.step("state"), "0");
    fake.check();
}

/// CRIU with its plugin restores what we dumped. The plugin finds no GPU here, so that what it would do is done by hand.
#[test]
fn to_criu() {
    let plugins = Engine::criu().map(|criu| (criu.path().with_file_name("../plugins/cuda"), criu));
    let (plugins, criu) = match plugins {
        Ok((plugins, criu)) if plugins.join("cuda_plugin.so").exists() => (plugins, criu),
        Ok(_) => return skip("to_criu", "CRIU's CUDA plugin is not beside it"),
        Err(why) => return skip("to_criu", &why),
    };
    let Some(mut fake) = Fake::start("to_criu", 1) else { return };
    fake.dump_dead();
    // without it, it says what is needed
    let without = criu.restore(&fake.images(), &["-L", &fake.folder.join("files").display().to_string()]);
    match without {
        Ok(_) => panic!("CRIU did not ask for its plugin"),
        Err(e) => assert!(e.text.contains("cuda_plugin"), "{e}"),
    }
    let with = criu.restore(&fake.images(), &["-L", &plugins.display().to_string()]);
    with.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(fake.step("state"), "2");
    assert_eq!((fake.step("restore"), fake.step("unlock")), ("0".to_owned(), "0".to_owned()));
    fake.check();
}

/// Dumped again and again, in chains, until it dies; then on from the last whole checkpoint.
#[test]
fn again_and_again() {
    let Some(mut fake) = Fake::start("again_and_again", 2) else { return };
    let pid = fake.pid.to_string();
    let mut command = fake.command("dump", &["-t", &pid, "--every", "50ms", "--track-mem"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut series = command.spawn().unwrap_or_else(|e| panic!("{e}"));
    let fifth = fake.images().join("000005/inventory.img");
    let there = within(LIMIT, || std::fs::metadata(&fifth).is_ok_and(|m| m.len() > 0));
    for pid in process::tree(fake.pid).into_iter().rev() {
        process::signal(pid, libc::SIGKILL);
    }
    let status = series.wait().unwrap_or_else(|e| panic!("{e}"));
    assert!(there && status.success(), "{status}");
    fake.is_gone();
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}

#[test]
fn maps_that_are_none() {
    for map in ["x", "GPU-1=GPU-2", &format!("{A}="), &format!("{A}={A}x")] {
        let mut command = Engine::ours().command("restore", Path::new("/"), &["--gpu-map", map]);
        let output = process::run(command.args(["-W", "/nonexistent"]), LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(output.code, Some(1), "{map}: {}", output.text);
        assert!(output.text.contains("gpu-map"), "{map}: {}", output.text);
    }
}

/// What `check` says with a driver, with an old one, and with none.
#[test]
fn check_says_so() {
    let Some(mut fake) = Fake::start("check_says_so", 1) else { return };
    let check = |library: &str| {
        let mut command = Command::new(Engine::ours().path());
        fake.environment(command.arg("check"));
        command.env("LD_LIBRARY_PATH", fake.programs.join(library));
        process::run(&mut command, LIMIT).unwrap_or_else(|e| panic!("{e}")).text
    };
    let line = |text: &str| text.lines().find(|l| l.starts_with("cuda ")).unwrap_or_default().to_owned();
    let text = check("new");
    assert!(line(&text).contains("yes"), "{text}");
    assert!(text.contains(&format!("GPU {A} Fake-100: 1024 MiB, ")), "{text}");
    for other in ["old", "none"] {
        let text = check(other);
        let real = other == "none" && Path::new("/proc/driver/nvidia").exists();
        assert!(real || line(&text).contains("NO"), "{text}");
    }
    fake.check();
}

#[test]
fn another_plugin() {
    let Some(mut fake) = Fake::start("another_plugin", 1) else { return };
    fake.dump_dead();
    let inventory = fake.images().join("inventory.img");
    let good = std::fs::read(&inventory).unwrap_or_else(|e| panic!("{e}"));
    let at = good.windows(11).position(|w| w == b"cuda_plugin").unwrap_or_else(|| panic!("no plugin"));
    let mut other = good.clone();
    other[at..at + 11].copy_from_slice(b"else_plugin");
    std::fs::write(&inventory, &other).unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("needs the plugin else_plugin"), "{text}");
    std::fs::write(&inventory, &good).unwrap_or_else(|e| panic!("{e}"));
    let (code, text) = fake.restore(&[]);
    assert_eq!(code, Some(0), "{text}");
    fake.check();
}
