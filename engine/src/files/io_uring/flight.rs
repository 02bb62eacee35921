//! Is there a request under way, and which?

use std::time::{Duration, Instant};

use rustix::fs::FileType;

use crate::error::Result;
use crate::files::Descriptor;
use crate::proc;
use crate::proc::fdinfo::FdDetail;
use crate::proc::io_uring::IoUring;

/// How long requests may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// How often descriptors are read again because they are not what they were.
const MOST_READS: u32 = 5;

/// The descriptors of a task with rings, which stands still, when the kernel has carried out what it could without the task.
/// `before` is what was read already.
pub fn settled(
    pid: i32,
    before: Vec<Descriptor>,
    mut read: impl FnMut() -> Result<Vec<Descriptor>>,
) -> Result<Vec<Descriptor>> {
    let began = Instant::now();
    let mut before = before;
    for _ in 0..MOST_READS {
        while (before.iter().any(polled_for) || has_busy_worker(pid)) && began.elapsed() < PATIENCE {
            std::thread::sleep(Duration::from_micros(500));
            before = read()?;
        }
        let now = read()?;
        if same_files(&before, &now) {
            return Ok(now);
        }
        before = now;
    }
    Ok(before)
}

fn polled_for(d: &Descriptor) -> bool {
    matches!(&d.info.detail, FdDetail::IoUring(info) if info.is_polled_for())
}

/// Is what a task has open the same as before, in what requests may change and is in its entries?
pub(super) fn same_files(before: &[Descriptor], now: &[Descriptor]) -> bool {
    let same = |(a, b): (&Descriptor, &Descriptor)| {
        let count = |d: &Descriptor| match &d.info.detail {
            FdDetail::Eventfd { count, .. } => Some(*count),
            _ => None,
        };
        let content = |d: &Descriptor| {
            let s = &d.stat;
            (FileType::from_raw_mode(s.st_mode) == FileType::RegularFile).then_some((
                s.st_size,
                s.st_mtime,
                s.st_mtime_nsec,
                s.st_nlink,
                s.st_mode,
            ))
        };
        let file = |d: &Descriptor| (d.fd, d.stat.st_dev, d.stat.st_ino, d.flags, d.cloexec, d.info.pos);
        file(a) == file(b) && a.link == b.link && content(a) == content(b) && count(a) == count(b)
    };
    before.len() == now.len() && before.iter().zip(now).all(same)
}

/// What is known of a ring's requests at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen<'a> {
    pub(super) info: &'a IoUring,
    /// Submissions that were none.
    pub(super) dropped: u32,
    /// Completions that were lost.
    pub(super) lost: u32,
    /// SQEs and CQEs as they lie in the rings, used ones too, and the size of each.
    pub(super) sqes: (&'a [u8], usize),
    pub(super) cqes: (&'a [u8], usize),
}

/// Requests that nothing but the count tells of, and that may take as long as they want.
const HIDDEN: [u8; 4] = [46, 50, 51, 53];
const SKIP_SUCCESS: u8 = 1 << 6;

impl Seen<'_> {
    /// How many more requests were submitted than completed.
    fn missing(&self) -> i32 {
        let i = self.info;
        let submitted = i.cached_sq_head.wrapping_sub(self.dropped);
        let listed = u32::try_from(i.cq_overflow.len()).unwrap_or(u32::MAX);
        let completed = i.cached_cq_tail.wrapping_add(self.lost).wrapping_add(listed);
        submitted.wrapping_sub(completed).cast_signed()
    }

    /// The kind of a request that is under way; `None` if there is none. `timeouts` tells whether any ring of the machine has one.
    pub(super) fn under_way(&self, workers: bool, last: bool, timeouts: impl Fn() -> bool) -> Option<String> {
        if let Some(line) = self.info.poll_list.first() {
            let op = line.strip_prefix(b"op=").and_then(|rest| rest.split(|b| !b.is_ascii_digit()).next());
            let op = op.and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok());
            return Some(op.map_or("a request that waits".into(), |op: u8| format!("{} that waits", name(op))));
        }
        if workers {
            return Some("a request that a worker carries out".into());
        }
        if self.info.is_polled_for() {
            return Some("a request that its polling thread has not taken yet".into());
        }
        match self.missing() {
            0 => None,
            // more than one completion for some
            ..0 => timeouts().then(|| "maybe a timeout".into()),
            _ if last && self.leaves_out() && !timeouts() => None,
            _ => Some(self.unanswered().map_or("a request".into(), |op| name(op).into())),
        }
    }

    fn entries((bytes, size): (&[u8], usize)) -> impl DoubleEndedIterator<Item = &[u8]> {
        bytes.chunks_exact(size.max(1))
    }

    /// The program leaves out completions, and has not made requests lately that could hide behind that.
    fn leaves_out(&self) -> bool {
        let any = |f: fn(&[u8]) -> bool| Self::entries(self.sqes).any(f);
        any(|sqe| sqe[1] & SKIP_SUCCESS != 0) && !any(|sqe| HIDDEN.contains(&sqe[0]))
    }

    /// The code of a request that has no completion among those that can be seen; the last ones first.
    fn unanswered(&self) -> Option<u8> {
        let data = |entry: &[u8], at: usize| entry.get(at..at + 8).map(<[u8]>::to_vec);
        let answered: Vec<_> = Self::entries(self.cqes).filter_map(|cqe| data(cqe, 0)).collect();
        let open = |sqe: &&[u8]| sqe[0] != 0 && data(sqe, 32).is_some_and(|data| !answered.contains(&data));
        Self::entries(self.sqes).rev().find(open).map(|sqe| sqe[0])
    }
}

/// Does a ring of this machine have a timeout? Where nobody can tell, maybe.
pub(super) fn timeouts() -> bool {
    let mut text = Vec::new();
    if proc::read_proc("/proc/timer_list".as_ref(), &mut text).is_err() {
        return true;
    }
    let found = |name: &[u8]| text.windows(name.len()).any(|w| w == name);
    found(b"io_timeout_fn") || found(b"io_link_timeout_fn")
}

/// Is a worker of the process carrying out a request?
pub(super) fn has_busy_worker(pid: i32) -> bool {
    let mut text = Vec::new();
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    threads.map(|entry| entry.path()).any(|path| {
        // one that has not run yet does not have its name
        let kernels = proc::read_proc(&path.join("stat"), &mut text).is_ok()
            && proc::stat::parse(&text).is_ok_and(|stat| stat.flags & 0x10 != 0);
        kernels
            && proc::read_proc(&path.join("comm"), &mut text).is_ok()
            && !text.starts_with(b"iou-sqp-")
            && proc::read_proc(&path.join("wchan"), &mut text).is_ok()
            && !text.starts_with(b"io_wq_worker")
    })
}

/// What the code of a request asks for.
fn name(op: u8) -> &'static str {
    match op {
        1 | 4 | 22 | 49 | 60 => "a read",
        2 | 5 | 23 | 61 => "a write",
        3 | 8 => "an fsync",
        6 => "a poll",
        9 | 26 | 47 | 48 => "a send",
        10 | 27 | 58 => "a receive",
        11 => "a timeout",
        15 => "a timeout of another request",
        13 => "an accept",
        16 => "a connect",
        18 | 28 => "an open",
        19 => "a close",
        30 | 33 => "a splice",
        40 => "a message to another ring",
        46 => "a command of a driver",
        50 => "a wait for a process",
        51 | 53 => "a wait for a futex",
        59 => "a wait of an epoll",
        _ => "a request",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen<'a>(info: &'a IoUring, sqes: &'a [u8], cqes: &'a [u8]) -> Seen<'a> {
        Seen { info, dropped: 0, lost: 0, sqes: (sqes, 64), cqes: (cqes, 16) }
    }

    #[test]
    fn requests_are_counted() {
        let mut info = IoUring::default();
        (info.cached_sq_head, info.cached_cq_tail) = (3, u32::MAX);
        let (mut sqes, mut cqes) = (vec![0; 128], vec![0; 32]);
        (sqes[0], sqes[32], sqes[64], sqes[96]) = (22, 7, 11, 9);
        cqes[0] = 7;
        let what = seen(&info, &sqes, &cqes).under_way(false, true, || false);
        assert_eq!(what.as_deref(), Some("a timeout"));
        info.cached_cq_tail = 3;
        assert_eq!(seen(&info, &sqes, &cqes).under_way(false, true, || true), None);
        // one of them was to have no completion
        info.cached_cq_tail = 2;
        sqes[1] = SKIP_SUCCESS;
        assert_eq!(seen(&info, &sqes, &cqes).under_way(false, true, || false), None);
        assert!(seen(&info, &sqes, &cqes).under_way(false, true, || true).is_some());
        assert!(seen(&info, &sqes, &cqes).under_way(false, false, || false).is_some());
        info.cached_cq_tail = 5;
        assert_eq!(seen(&info, &sqes, &cqes).under_way(false, true, || false), None);
        assert!(seen(&info, &sqes, &cqes).under_way(true, true, || false).is_some());
    }

    #[test]
    fn what_waits_has_a_name() {
        let mut info = IoUring::default();
        info.poll_list.push(b"op=6, task_works=0".to_vec());
        assert_eq!(seen(&info, &[], &[]).under_way(false, true, || false).as_deref(), Some("a poll that waits"));
    }
}
