//! What guests share: the protocol, checks that end the guest, and a few calls.

use std::fmt::Display;
use std::io::Write as _;
use std::panic::Location;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Ends the guest unless this holds.
macro_rules! check {
    ($c:expr) => {
        if !$c {
            let errno = std::io::Error::last_os_error();
            $crate::guests::support::fail(format_args!("{}:{}: {} ({errno})", file!(), line!(), stringify!($c)))
        }
    };
}

/// Ends the guest unless these are equal.
macro_rules! check_eq {
    ($a:expr, $b:expr) => {
        match (&$a, &$b) {
            (a, b) => {
                if a != b {
                    $crate::guests::support::fail(format_args!(
                        "{}:{}: {} is {a:?}, not {b:?}",
                        file!(),
                        line!(),
                        stringify!($a)
                    ))
                }
            }
        }
    };
}

/// What was done to the guest while it waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It was never dead.
    Running,
    /// It was dumped, killed and restored.
    Restored,
}

/// The guest's folder, as it is called from inside the guest.
static FOLDER: OnceLock<PathBuf> = OnceLock::new();

/// Begins: a session of its own, nothing open but the standard descriptors, in its folder.
pub fn begin(folder: PathBuf) {
    unsafe {
        libc::close_range(3, u32::MAX, 0);
        libc::setsid();
    }
    if std::env::set_current_dir(&folder).is_err() || FOLDER.set(folder).is_err() {
        std::process::exit(2);
    }
}

/// Where the guest's files are.
pub fn folder() -> &'static Path {
    FOLDER.get().map_or(Path::new("."), PathBuf::as_path)
}

/// Says that the state stands, and waits until it is to be checked.
pub fn ready() -> How {
    say_ready();
    wait_for_check()
}

/// The first half of [`ready`].
pub fn say_ready() {
    let new = folder().join("ready.new");
    let pid = std::process::id().to_string();
    check!(std::fs::write(&new, pid).and_then(|()| std::fs::rename(&new, folder().join("ready"))).is_ok());
}

/// The second half of [`ready`].
pub fn wait_for_check() -> How {
    let path = folder().join("check");
    loop {
        if let Some(how) = asked(&path) {
            return how;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What the test has asked for, if it has.
pub fn asked(path: &Path) -> Option<How> {
    match std::fs::read(path) {
        Ok(text) if text == b"running" => Some(How::Running),
        Ok(text) if text == b"restored" => Some(How::Restored),
        _ => None,
    }
}

/// Ends the guest, well: the first word counts, so a child that failed is not overruled.
pub fn succeed() -> ! {
    conclude("ok", 0)
}

/// Ends the guest, with the check that failed.
pub fn fail(what: impl Display) -> ! {
    conclude(&what.to_string(), 1)
}

fn conclude(word: &str, code: i32) -> ! {
    let new = folder().join(format!("result.{}", std::process::id()));
    let done = std::fs::File::create(&new).and_then(|mut f| f.write_all(word.as_bytes()));
    if done.is_ok() {
        // a link fails if there is a result already
        let _ = std::fs::hard_link(&new, folder().join("result"));
    }
    let _ = std::fs::remove_file(&new);
    unsafe { libc::_exit(code) }
}

/// The result of a call that cannot fail in this guest.
#[track_caller]
pub fn sys<T: Into<i64> + Copy>(result: T) -> T {
    if result.into() < 0 {
        let errno = std::io::Error::last_os_error();
        let at = Location::caller();
        fail(format_args!("{}:{}: a call failed ({errno})", at.file(), at.line()));
    }
    result
}

/// As [`sys`], for results of std.
#[track_caller]
pub fn did<T, E: Display>(result: Result<T, E>) -> T {
    match result {
        Ok(value) => value,
        Err(e) => {
            let at = Location::caller();
            fail(format_args!("{}:{}: {e}", at.file(), at.line()))
        }
    }
}

/// The error of the last call.
pub fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

/// Waits until something holds, for ten seconds at most.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        if began.elapsed() > Duration::from_secs(10) {
            let at = Location::caller();
            fail(format_args!("{}:{}: {what}: not within ten seconds", at.file(), at.line()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs `child` in a child process, which ends with its result; for guests that have one thread only.
pub fn fork(child: impl FnOnce() -> i32) -> i32 {
    let pid = sys(unsafe { libc::fork() });
    if pid == 0 {
        let code = child();
        unsafe { libc::_exit(code) }
    }
    pid
}

/// The status of a child that ends.
#[track_caller]
pub fn wait(pid: i32) -> i32 {
    let mut status = 0;
    loop {
        let r = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if r == pid {
            return status;
        }
        if errno() != libc::EINTR {
            let at = Location::caller();
            fail(format_args!("{}:{}: waitpid({pid}): {}", at.file(), at.line(), std::io::Error::last_os_error()));
        }
    }
}

/// The thread's id.
pub fn gettid() -> i32 {
    unsafe { libc::gettid() }
}

/// 512 numbers that parent, children and threads share.
#[derive(Clone, Copy)]
pub struct Shared(&'static [AtomicU64; 512]);

impl Shared {
    /// One page of shared anonymous memory.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Shared {
        let at = map(0, 4096, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        Shared(unsafe { &*at.cast() })
    }

    /// One of the numbers.
    pub fn get(&self, n: usize) -> u64 {
        self.0[n].load(Ordering::SeqCst)
    }

    /// Sets one.
    pub fn set(&self, n: usize, value: u64) {
        self.0[n].store(value, Ordering::SeqCst);
    }

    /// Adds one to one, and gives what it was.
    pub fn add(&self, n: usize) -> u64 {
        self.0[n].fetch_add(1, Ordering::SeqCst)
    }

    /// Waits, as long as it takes, for a number.
    pub fn wait(&self, n: usize, value: u64) {
        while self.get(n) != value {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A new area; at `at` exactly unless that is 0.
#[track_caller]
pub fn map(at: usize, size: usize, prot: i32, flags: i32) -> *mut u8 {
    map_file(at, size, prot, flags, -1, 0)
}

/// A new area of a file.
#[track_caller]
pub fn map_file(at: usize, size: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let area = unsafe { libc::mmap(at as *mut libc::c_void, size, prot, flags | fixed, fd, offset) };
    if area == libc::MAP_FAILED {
        let errno = std::io::Error::last_os_error();
        let place = Location::caller();
        fail(format_args!("{}:{}: mmap: {errno}", place.file(), place.line()));
    }
    area.cast()
}

/// Readable and writable.
pub const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
/// Private memory of no file.
pub const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
/// Shared memory of no file.
pub const SHARED: i32 = libc::MAP_SHARED | libc::MAP_ANONYMOUS;

/// Fills memory with bytes that depend on their place and on `seed`.
pub fn fill(area: *mut u8, size: usize, seed: u8) {
    for i in 0..size {
        unsafe { area.add(i).write_volatile(pattern(i, seed)) };
    }
}

/// Whether [`fill`]'s bytes are still there.
pub fn filled(area: *const u8, size: usize, seed: u8) -> bool {
    (0..size).all(|i| unsafe { area.add(i).read_volatile() } == pattern(i, seed))
}

/// The byte that [`fill`] puts at a place.
pub fn pattern(i: usize, seed: u8) -> u8 {
    (i.wrapping_mul(31) ^ (i >> 12).wrapping_mul(7)) as u8 ^ seed
}

/// A text of /proc/self.
pub fn proc_self(name: &str) -> String {
    String::from_utf8_lossy(&did(std::fs::read(format!("/proc/thread-self/{name}")))).into_owned()
}

/// The lines of /proc/thread-self/status that begin with one of these.
pub fn status(names: &[&str]) -> Vec<String> {
    let text = proc_self("status");
    text.lines().filter(|l| names.iter().any(|n| l.starts_with(n))).map(str::to_owned).collect()
}

/// An area of memory, as far as a program can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Area {
    from: u64,
    to: u64,
    /// Rights, file, offset, and what was advised.
    what: String,
}

/// Where, with which rights, and of which file the areas of memory are, and what was advised about them. Left out: the
/// kernel's own notes (sd: soft-dirty, which a checkpoint changes; ac: accounted, which CRIU's way into a task changes), the
/// numbers of files without a name, and that CRIU restores shared memory as memfds, the heap, which checking uses too, and
/// where the kernel keeps two areas that could be one.
pub fn layout() -> Vec<Area> {
    let text = did(std::fs::read_to_string("/proc/self/smaps"));
    let mut all: Vec<Area> = Vec::new();
    let mut heap = false;
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let Some(flags) = line.strip_prefix("VmFlags: ") {
            let Some(mut last) = all.pop_if(|_| !heap) else { continue };
            let kept: Vec<&str> = flags.split_whitespace().filter(|f| *f != "sd" && *f != "ac").collect();
            last.what.push_str(&kept.join(" "));
            match all.last_mut() {
                Some(before) if before.to == last.from && before.what == last.what && last.what.contains(" 0 |") => {
                    before.to = last.to;
                }
                _ => all.push(last),
            }
        } else if let Some((from, to)) = words.first().and_then(|w| w.split_once('-')) {
            let number = |hex| u64::from_str_radix(hex, 16);
            let (Ok(from), Ok(to)) = (number(from), number(to)) else { continue };
            heap = line.ends_with("[heap]");
            if !heap {
                let inode = if line.ends_with("(deleted)") { "-" } else { words[4] };
                let what = format!(
                    "{} {} {inode} | {} ",
                    words[1],
                    words[2],
                    words[5..].join(" ").replace("/memfd:/dev/zero", "/dev/zero")
                );
                all.push(Area { from, to, what });
            }
        }
    }
    all
}

/// Ends the guest unless its areas are as they were.
pub fn check_layout(before: &[Area]) {
    let now = layout();
    let only = |a: &[Area], b: &[Area]| -> Vec<String> {
        a.iter().filter(|x| !b.contains(x)).map(|x| format!("{:x}-{:x} {}", x.from, x.to, x.what)).collect()
    };
    let (new, gone) = (only(&now, before), only(before, &now));
    if now != before {
        fail(format_args!("areas that are new: {new:#?}, that are gone: {gone:#?}"));
    }
}
