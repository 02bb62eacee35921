//! The sample program of `demo`: it counts, checks itself, and says so in a file.
//!
//! Threads: the one that counts and asks the child; a ring of [`RING`] that hand a token from pipe to pipe; one that stamps
//! memory; one that waits for SIGTERM. A pipe that nobody reads holds a letter. All of it is checked at the end.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// It counts.
pub(super) const RUNS: &str = "runs";
/// It has ended and all was well.
pub(super) const OK: &str = "ok";

/// Length of the line in the file.
const LINE: usize = 160;
/// Threads that hand the token on.
const RING: usize = 4;
/// Words of memory: 64 MiB.
const WORDS: usize = 8 << 20;
/// Words of a page.
const PAGE: usize = 512;
/// How long a step of counting takes, and one of the ring.
const STEP: Duration = Duration::from_millis(5);
/// The letter in the pipe that nobody reads.
const LETTER: &[u8] = b"To be read after the restore. ";

/// What the program says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct State {
    /// How far it has counted.
    pub(super) counter: u64,
    /// [`RUNS`], [`OK`], or what is wrong.
    pub(super) verdict: String,
}

impl State {
    /// As a line of the length [`LINE`]; the counter is there twice, so that a reader knows a torn line.
    fn line(&self) -> Vec<u8> {
        let mut text = format!("{} {} {}", self.counter, self.counter, self.verdict.replace('\n', " "));
        while text.len() >= LINE {
            text.pop();
        }
        let mut line = text.into_bytes();
        line.resize(LINE - 1, b' ');
        line.push(b'\n');
        line
    }

    fn parse(line: &str) -> Option<State> {
        let mut words = line.strip_suffix('\n')?.splitn(3, ' ');
        let (counter, again) = (words.next()?.parse().ok()?, words.next()?.parse::<u64>().ok()?);
        (counter == again).then(|| State { counter, verdict: words.next().unwrap_or_default().trim_end().to_owned() })
    }

    /// The file's line, if there is a whole one.
    pub(super) fn read(path: &Path) -> Option<State> {
        let text = std::fs::read_to_string(path).ok()?;
        if text.len() == LINE {
            State::parse(&text)
        } else {
            None
        }
    }
}

type Fallible<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Counts until SIGTERM comes or something is wrong; the file has the verdict.
pub(super) fn run(path: &Path) -> i32 {
    let Ok(file) = std::fs::OpenOptions::new().write(true).create_new(true).open(path) else { return 1 };
    let mut counter = 0;
    let verdict = match play(&file, &mut counter) {
        Ok(()) => OK.to_owned(),
        Err(e) => e.to_string(),
    };
    let good = verdict == OK;
    let said = file.write_all_at(&State { counter, verdict }.line(), 0);
    i32::from(!good || said.is_err())
}

fn play(file: &File, counter: &mut u64) -> Fallible<()> {
    use std::os::fd::AsRawFd as _;
    nix::unistd::setsid()?;
    close_all_above(file.as_raw_fd())?;
    // threads inherit the mask
    let mut end = nix::sys::signal::SigSet::empty();
    end.add(nix::sys::signal::SIGTERM);
    end.thread_block()?;
    let asked = Arc::new(AtomicBool::new(false));
    {
        let asked = Arc::clone(&asked);
        std::thread::spawn(move || {
            let _ = end.wait();
            asked.store(true, Ordering::SeqCst);
        });
    }
    let mut child = Echo::start()?;
    let (mut letters, mut mailbox) = pipe()?;
    mailbox.write_all(LETTER)?;
    let all = Arc::new(All { end: AtomicBool::new(false), complaint: Mutex::new(None) });
    let mut threads = ring(&all)?;
    let memory = Memory::new();
    threads.push(spawn(&all, move |all| memory.stamp(all)));

    while !asked.load(Ordering::SeqCst) {
        *counter += 1;
        child.ask(*counter)?;
        if let Some(wrong) = all.complaint() {
            return Err(wrong.into());
        }
        file.write_all_at(&State { counter: *counter, verdict: RUNS.to_owned() }.line(), 0)?;
        std::thread::sleep(STEP);
    }
    all.end.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().map_err(|_| "a thread panicked")?;
    }
    if let Some(wrong) = all.complaint() {
        return Err(wrong.into());
    }
    drop(mailbox);
    let mut letter = Vec::new();
    letters.read_to_end(&mut letter)?;
    if letter != LETTER {
        return Err(format!("the letter in the pipe has {} bytes and not {}", letter.len(), LETTER.len()).into());
    }
    child.end()
}

fn pipe() -> Fallible<(File, File)> {
    let (reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    Ok((reader.into(), writer.into()))
}

/// Descriptors that whoever started us left open are not ours to carry.
fn close_all_above(last: i32) -> std::io::Result<()> {
    let open: Vec<i32> =
        std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|fd| fd.file_name().to_str()?.parse().ok()).collect();
    for fd in open.into_iter().filter(|fd| *fd > 2 && *fd != last) {
        // the one that listed them is closed already
        let _ = nix::unistd::close(fd);
    }
    Ok(())
}

/// What the threads share.
struct All {
    end: AtomicBool,
    complaint: Mutex<Option<String>>,
}

impl All {
    fn ends(&self) -> bool {
        self.end.load(Ordering::SeqCst)
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn spawn(all: &Arc<All>, work: impl FnOnce(&All) -> Fallible<()> + Send + 'static) -> JoinHandle<()> {
    let all = Arc::clone(all);
    std::thread::spawn(move || {
        if let Err(e) = work(&all) {
            all.complaint.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(e.to_string());
        }
    })
}

/// Threads in a ring: each takes a token from its pipe, adds one, and puts it into the next one's. A token that came to
/// the wrong thread, or twice, has the wrong remainder.
fn ring(all: &Arc<All>) -> Fallible<Vec<JoinHandle<()>>> {
    let (mut readers, mut writers) = (Vec::new(), Vec::new());
    for _ in 0..RING {
        let (reader, writer) = pipe()?;
        readers.push(reader);
        writers.push(writer);
    }
    writers[0].write_all(&0u64.to_le_bytes())?;
    // thread n reads pipe n and writes pipe n + 1
    writers.rotate_left(1);
    let ring = readers.into_iter().zip(writers).enumerate();
    let threads = ring.map(|(n, (mut reader, mut writer))| {
        spawn(all, move |all| loop {
            let mut word = [0; 8];
            match reader.read_exact(&mut word) {
                // the one before us has gone
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof && all.ends() => return Ok(()),
                other => other?,
            }
            let token = u64::from_le_bytes(word);
            if token % RING as u64 != n as u64 {
                return Err(format!("thread {n} got token {token}").into());
            }
            if all.ends() {
                return Ok(());
            }
            std::thread::sleep(STEP);
            writer.write_all(&(token + 1).to_le_bytes())?;
        })
    });
    Ok(threads.collect())
}

/// Memory of which every word is known: page, place and round make it.
struct Memory {
    words: Vec<u64>,
    rounds: Vec<u64>,
}

/// The word at a place of a page in a round (a splitmix64 step, so that nothing compresses it).
fn word(page: usize, place: usize, round: u64) -> u64 {
    let mut x = ((page * PAGE + place) as u64 ^ round << 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ x >> 27
}

impl Memory {
    fn new() -> Memory {
        let words = (0..WORDS).map(|i| word(i / PAGE, i % PAGE, 0)).collect();
        Memory { words, rounds: vec![0; WORDS / PAGE] }
    }

    /// Checks some pages and writes the next round into them, again and again; then checks all.
    fn stamp(mut self, all: &All) -> Fallible<()> {
        let mut next = 0;
        while !all.ends() {
            for page in next..next + 32 {
                self.check(page)?;
                self.rounds[page] += 1;
                let round = self.rounds[page];
                for (place, at) in self.words[page * PAGE..][..PAGE].iter_mut().enumerate() {
                    *at = word(page, place, round);
                }
            }
            next = (next + 32) % self.rounds.len();
            std::thread::sleep(STEP);
        }
        (0..self.rounds.len()).try_for_each(|page| self.check(page))
    }

    fn check(&self, page: usize) -> Fallible<()> {
        let (words, round) = (&self.words[page * PAGE..][..PAGE], self.rounds[page]);
        match words.iter().enumerate().position(|(place, w)| *w != word(page, place, round)) {
            Some(place) => Err(format!("word {place} of page {page} is not that of round {round}").into()),
            None => Ok(()),
        }
    }
}

/// The child, asked over two pipes.
struct Echo {
    child: Child,
    to: ChildStdin,
    from: ChildStdout,
}

impl Echo {
    fn start() -> Fallible<Echo> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["demo", "--guest-child"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let (to, from) = (child.stdin.take().ok_or("no pipe")?, child.stdout.take().ok_or("no pipe")?);
        Ok(Echo { child, to, from })
    }

    fn ask(&mut self, n: u64) -> Fallible<()> {
        let mut answer = [0; 8];
        self.to.write_all(&n.to_le_bytes())?;
        self.from.read_exact(&mut answer)?;
        let answer = u64::from_le_bytes(answer);
        if answer != !n {
            return Err(format!("the child answered {answer} to {n}").into());
        }
        Ok(())
    }

    fn end(mut self) -> Fallible<()> {
        drop(self.to);
        let status = self.child.wait()?;
        if !status.success() {
            return Err(format!("the child ended with {status}").into());
        }
        Ok(())
    }
}

/// The child: answers each number with its complement until nobody asks.
pub(super) fn run_child() -> i32 {
    let (mut from, mut to) = (std::io::stdin().lock(), std::io::stdout().lock());
    let mut number = [0; 8];
    while from.read_exact(&mut number).is_ok() {
        let answer = (!u64::from_le_bytes(number)).to_le_bytes();
        if to.write_all(&answer).and_then(|()| to.flush()).is_err() {
            return 1;
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines() {
        for verdict in [RUNS, OK, &"x".repeat(500)] {
            let state = State { counter: 712, verdict: verdict.to_owned() };
            let line = state.line();
            assert_eq!(line.len(), LINE);
            let read = State::parse(std::str::from_utf8(&line).expect("ASCII")).expect("a line");
            assert_eq!(read.counter, 712);
            assert!(verdict.starts_with(&read.verdict));
        }
        assert_eq!(State::parse("12 13 runs\n"), None);
        assert_eq!(State::parse("12 12 runs"), None);
    }

    #[test]
    fn a_changed_word_is_found() {
        let mut memory = Memory::new();
        assert!(memory.check(7).is_ok());
        memory.words[7 * PAGE + 3] ^= 1;
        assert!(memory.check(7).is_err());
    }
}
