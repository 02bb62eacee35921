//! `/proc/PID/status` and `/proc/PID/task/TID/status`: identity, credentials, signals.
//!
//! Fields that depend on the kernel's configuration or on a task that still has memory are `Option`s. Memory sizes other
//! than those that say something for a restore are not kept. `State` may change between two reads; what a stopped task
//! is made of does not.
//!
//! Man page: proc_pid_status(5).

use super::{split_once, Lines, ParseError, Place, Words};

const FILE: &str = "/proc/PID/status";

/// The scheduler's word for a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskState {
    /// R.
    Running,
    /// S: may be interrupted.
    Sleeping,
    /// D: may not.
    DiskSleep,
    /// T: by a signal.
    Stopped,
    /// t: by a tracer.
    TracingStop,
    /// Z: ended, and its parent has not asked.
    Zombie,
    /// X: ended, and about to vanish.
    Dead,
    /// P: a kernel thread, parked.
    Parked,
    /// I: a kernel thread, idle.
    Idle,
}

impl TaskState {
    /// From the letter in `stat` and `status`.
    #[must_use]
    pub fn from_letter(letter: u8) -> Option<Self> {
        Some(match letter {
            b'R' => Self::Running,
            b'S' => Self::Sleeping,
            b'D' => Self::DiskSleep,
            b'T' => Self::Stopped,
            b't' => Self::TracingStop,
            b'Z' => Self::Zombie,
            b'X' | b'x' => Self::Dead,
            b'P' => Self::Parked,
            b'I' => Self::Idle,
            _ => return None,
        })
    }
}

/// User or group identities, in the order of the kernel's text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ids {
    /// Real.
    pub real: u32,
    /// Effective.
    pub effective: u32,
    /// Saved.
    pub saved: u32,
    /// For file systems.
    pub filesystem: u32,
}

/// Shadow stack features of a thread on x86 (since 6.6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadFeatures {
    /// A shadow stack is in use.
    pub shadow_stack: bool,
    /// The program may write it.
    pub shadow_stack_write: bool,
    /// There is a feature that this program does not know.
    pub unknown: bool,
}

/// What the file says. Sets of signals and capabilities are bit masks, bit 0 first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The name, not escaped.
    pub name: Vec<u8>,
    /// Mask for new files; none if the task has given up its file system state, as a zombie has.
    pub umask: Option<u32>,
    /// State.
    pub state: TaskState,
    /// Thread group.
    pub tgid: i32,
    /// NUMA group, or 0.
    pub ngid: i32,
    /// Thread.
    pub pid: i32,
    /// Parent.
    pub ppid: i32,
    /// Tracer, or 0.
    pub tracer_pid: i32,
    /// Users.
    pub uid: Ids,
    /// Groups.
    pub gid: Ids,
    /// Size of the descriptor table; zero for a zombie.
    pub fd_size: u64,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Thread group in each PID namespace, from the reader's to the task's own.
    pub ns_tgid: Vec<i32>,
    /// Thread in each PID namespace.
    pub ns_pid: Vec<i32>,
    /// Process group in each PID namespace.
    pub ns_pgid: Vec<i32>,
    /// Session in each PID namespace.
    pub ns_sid: Vec<i32>,
    /// A kernel thread (since 6.8).
    pub kthread: Option<bool>,
    /// Locked memory in KiB; this and the next are there only while the task has memory.
    pub vm_locked_kb: Option<u64>,
    /// Pinned memory in KiB.
    pub vm_pinned_kb: Option<u64>,
    /// Present memory in KiB.
    pub vm_rss_kb: Option<u64>,
    /// Memory in swap in KiB.
    pub vm_swap_kb: Option<u64>,
    /// hugetlb memory in KiB.
    pub hugetlb_kb: Option<u64>,
    /// A core file is being written.
    pub core_dumping: Option<bool>,
    /// Transparent huge pages are not disabled by prctl.
    pub thp_enabled: Option<bool>,
    /// Number of threads.
    pub threads: u32,
    /// Signals queued for this user, and the most there may be.
    pub sig_queue: (u64, u64),
    /// Pending for the thread.
    pub sig_pending: u64,
    /// Pending for the process.
    pub shared_pending: u64,
    /// Blocked.
    pub sig_blocked: u64,
    /// Ignored.
    pub sig_ignored: u64,
    /// Caught.
    pub sig_caught: u64,
    /// Inheritable capabilities.
    pub cap_inheritable: u64,
    /// Permitted capabilities.
    pub cap_permitted: u64,
    /// Effective capabilities.
    pub cap_effective: u64,
    /// Bounding set.
    pub cap_bounding: u64,
    /// Ambient capabilities.
    pub cap_ambient: u64,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filters.
    pub seccomp: Option<u32>,
    /// Number of seccomp filters (since 5.9).
    pub seccomp_filters: Option<u32>,
    /// PR_GET_SPECULATION_CTRL for store bypass, in the kernel's words.
    pub store_bypass: Option<Vec<u8>>,
    /// PR_GET_SPECULATION_CTRL for indirect branches, in the kernel's words.
    pub indirect_branch: Option<Vec<u8>>,
    /// Shadow stack features; none where the kernel or CPU has none.
    pub thread_features: Option<ThreadFeatures>,
    /// Those that can no longer be changed.
    pub thread_features_locked: Option<ThreadFeatures>,
    /// Processors that the thread may run on, as a list ("0-1,4").
    pub cpus_allowed_list: Vec<u8>,
    /// Memory nodes that it may use, as a list.
    pub mems_allowed_list: Vec<u8>,
}

/// Fields as they come in; those that must be there are checked at the end.
#[derive(Default)]
struct Draft {
    name: Option<Vec<u8>>,
    umask: Option<u32>,
    state: Option<TaskState>,
    tgid: Option<i32>,
    ngid: Option<i32>,
    pid: Option<i32>,
    ppid: Option<i32>,
    tracer_pid: Option<i32>,
    uid: Option<Ids>,
    gid: Option<Ids>,
    fd_size: Option<u64>,
    groups: Option<Vec<u32>>,
    ns_tgid: Option<Vec<i32>>,
    ns_pid: Option<Vec<i32>>,
    ns_pgid: Option<Vec<i32>>,
    ns_sid: Option<Vec<i32>>,
    kthread: Option<bool>,
    vm_locked_kb: Option<u64>,
    vm_pinned_kb: Option<u64>,
    vm_rss_kb: Option<u64>,
    vm_swap_kb: Option<u64>,
    hugetlb_kb: Option<u64>,
    core_dumping: Option<bool>,
    thp_enabled: Option<bool>,
    threads: Option<u32>,
    sig_queue: Option<(u64, u64)>,
    sig_pending: Option<u64>,
    shared_pending: Option<u64>,
    sig_blocked: Option<u64>,
    sig_ignored: Option<u64>,
    sig_caught: Option<u64>,
    cap_inheritable: Option<u64>,
    cap_permitted: Option<u64>,
    cap_effective: Option<u64>,
    cap_bounding: Option<u64>,
    cap_ambient: Option<u64>,
    no_new_privs: Option<bool>,
    seccomp: Option<u32>,
    seccomp_filters: Option<u32>,
    store_bypass: Option<Vec<u8>>,
    indirect_branch: Option<Vec<u8>>,
    thread_features: Option<ThreadFeatures>,
    thread_features_locked: Option<ThreadFeatures>,
    cpus_allowed_list: Option<Vec<u8>>,
    mems_allowed_list: Option<Vec<u8>>,
}

impl Status {
    /// Whether it has memory pinned.
    #[must_use]
    pub fn pins(&self) -> bool {
        self.vm_pinned_kb.unwrap_or(0) > 0
    }
}

/// Reads the file.
///
/// # Errors
/// If a field is malformed, there twice, or missing though every kernel from 5.x on prints it.
pub fn parse(text: &[u8]) -> Result<Status, ParseError> {
    let mut draft = Draft::default();
    let mut lines = Lines::new(FILE, text);
    for (place, line) in lines.by_ref() {
        let (key, value) = split_once(line, b':').ok_or_else(|| place.malformed("a line of key and value"))?;
        draft.field(place, key, value)?;
    }
    draft.finish(lines.place())
}

impl Draft {
    fn field(&mut self, at: Place, key: &[u8], value: &[u8]) -> Result<(), ParseError> {
        match key {
            b"Name" => {
                let name = unescape_name(value.strip_prefix(b"\t").unwrap_or(value));
                at.once(&mut self.name, name, "Name")
            }
            b"Umask" => at.once(&mut self.umask, at.uint(value, 8, "Umask")?, "Umask"),
            b"State" => {
                let letter = value.trim_ascii_start().first().copied();
                let state = letter.and_then(TaskState::from_letter).ok_or_else(|| at.malformed("State"))?;
                at.once(&mut self.state, state, "State")
            }
            b"Tgid" => at.once(&mut self.tgid, at.int(value, "Tgid")?, "Tgid"),
            b"Ngid" => at.once(&mut self.ngid, at.int(value, "Ngid")?, "Ngid"),
            b"Pid" => at.once(&mut self.pid, at.int(value, "Pid")?, "Pid"),
            b"PPid" => at.once(&mut self.ppid, at.int(value, "PPid")?, "PPid"),
            b"TracerPid" => at.once(&mut self.tracer_pid, at.int(value, "TracerPid")?, "TracerPid"),
            b"Uid" => at.once(&mut self.uid, ids(at, value, "Uid")?, "Uid"),
            b"Gid" => at.once(&mut self.gid, ids(at, value, "Gid")?, "Gid"),
            b"FDSize" => at.once(&mut self.fd_size, at.uint(value, 10, "FDSize")?, "FDSize"),
            b"Groups" => {
                let groups = Words::new(value).map(|word| at.uint(word, 10, "Groups")).collect::<Result<_, _>>()?;
                at.once(&mut self.groups, groups, "Groups")
            }
            b"NStgid" => at.once(&mut self.ns_tgid, ints(at, value, "NStgid")?, "NStgid"),
            b"NSpid" => at.once(&mut self.ns_pid, ints(at, value, "NSpid")?, "NSpid"),
            b"NSpgid" => at.once(&mut self.ns_pgid, ints(at, value, "NSpgid")?, "NSpgid"),
            b"NSsid" => at.once(&mut self.ns_sid, ints(at, value, "NSsid")?, "NSsid"),
            b"Kthread" => at.once(&mut self.kthread, at.flag(value, "Kthread")?, "Kthread"),
            b"VmPin" => at.once(&mut self.vm_pinned_kb, kb(at, value, "VmPin")?, "VmPin"),
            b"VmLck" => at.once(&mut self.vm_locked_kb, kb(at, value, "VmLck")?, "VmLck"),
            b"VmRSS" => at.once(&mut self.vm_rss_kb, kb(at, value, "VmRSS")?, "VmRSS"),
            b"VmSwap" => at.once(&mut self.vm_swap_kb, kb(at, value, "VmSwap")?, "VmSwap"),
            b"HugetlbPages" => at.once(&mut self.hugetlb_kb, kb(at, value, "HugetlbPages")?, "HugetlbPages"),
            b"CoreDumping" => at.once(&mut self.core_dumping, at.flag(value, "CoreDumping")?, "CoreDumping"),
            b"THP_enabled" => at.once(&mut self.thp_enabled, at.flag(value, "THP_enabled")?, "THP_enabled"),
            b"Threads" => at.once(&mut self.threads, at.uint(value, 10, "Threads")?, "Threads"),
            b"SigQ" => {
                let (now, most) = split_once(value, b'/').ok_or_else(|| at.malformed("SigQ"))?;
                at.once(&mut self.sig_queue, (at.uint(now, 10, "SigQ")?, at.uint(most, 10, "SigQ")?), "SigQ")
            }
            b"NoNewPrivs" => at.once(&mut self.no_new_privs, at.flag(value, "NoNewPrivs")?, "NoNewPrivs"),
            b"Seccomp" => at.once(&mut self.seccomp, at.uint(value, 10, "Seccomp")?, "Seccomp"),
            b"Seccomp_filters" => {
                at.once(&mut self.seccomp_filters, at.uint(value, 10, "Seccomp_filters")?, "Seccomp_filters")
            }
            _ => self.mask_or_words(at, key, value),
        }
    }

    fn mask_or_words(&mut self, at: Place, key: &[u8], value: &[u8]) -> Result<(), ParseError> {
        let (slot, field) = match key {
            b"SigPnd" => (&mut self.sig_pending, "SigPnd"),
            b"ShdPnd" => (&mut self.shared_pending, "ShdPnd"),
            b"SigBlk" => (&mut self.sig_blocked, "SigBlk"),
            b"SigIgn" => (&mut self.sig_ignored, "SigIgn"),
            b"SigCgt" => (&mut self.sig_caught, "SigCgt"),
            b"CapInh" => (&mut self.cap_inheritable, "CapInh"),
            b"CapPrm" => (&mut self.cap_permitted, "CapPrm"),
            b"CapEff" => (&mut self.cap_effective, "CapEff"),
            b"CapBnd" => (&mut self.cap_bounding, "CapBnd"),
            b"CapAmb" => (&mut self.cap_ambient, "CapAmb"),
            _ => return self.words(at, key, value),
        };
        at.once(slot, at.uint(value, 16, field)?, field)
    }

    fn words(&mut self, at: Place, key: &[u8], value: &[u8]) -> Result<(), ParseError> {
        let text = || value.trim_ascii().to_vec();
        match key {
            b"Speculation_Store_Bypass" => at.once(&mut self.store_bypass, text(), "Speculation_Store_Bypass"),
            b"SpeculationIndirectBranch" => at.once(&mut self.indirect_branch, text(), "SpeculationIndirectBranch"),
            b"Cpus_allowed_list" => at.once(&mut self.cpus_allowed_list, text(), "Cpus_allowed_list"),
            b"Mems_allowed_list" => at.once(&mut self.mems_allowed_list, text(), "Mems_allowed_list"),
            b"x86_Thread_features" => at.once(&mut self.thread_features, features(value), "x86_Thread_features"),
            b"x86_Thread_features_locked" => {
                at.once(&mut self.thread_features_locked, features(value), "x86_Thread_features_locked")
            }
            _ => Ok(()),
        }
    }

    fn finish(self, at: Place) -> Result<Status, ParseError> {
        Ok(Status {
            name: self.name.ok_or_else(|| at.missing("Name"))?,
            umask: self.umask,
            state: self.state.ok_or_else(|| at.missing("State"))?,
            tgid: self.tgid.ok_or_else(|| at.missing("Tgid"))?,
            ngid: self.ngid.unwrap_or(0),
            pid: self.pid.ok_or_else(|| at.missing("Pid"))?,
            ppid: self.ppid.ok_or_else(|| at.missing("PPid"))?,
            tracer_pid: self.tracer_pid.ok_or_else(|| at.missing("TracerPid"))?,
            uid: self.uid.ok_or_else(|| at.missing("Uid"))?,
            gid: self.gid.ok_or_else(|| at.missing("Gid"))?,
            fd_size: self.fd_size.ok_or_else(|| at.missing("FDSize"))?,
            groups: self.groups.ok_or_else(|| at.missing("Groups"))?,
            ns_tgid: self.ns_tgid.unwrap_or_default(),
            ns_pid: self.ns_pid.unwrap_or_default(),
            ns_pgid: self.ns_pgid.unwrap_or_default(),
            ns_sid: self.ns_sid.unwrap_or_default(),
            kthread: self.kthread,
            vm_locked_kb: self.vm_locked_kb,
            vm_pinned_kb: self.vm_pinned_kb,
            vm_rss_kb: self.vm_rss_kb,
            vm_swap_kb: self.vm_swap_kb,
            hugetlb_kb: self.hugetlb_kb,
            core_dumping: self.core_dumping,
            thp_enabled: self.thp_enabled,
            threads: self.threads.ok_or_else(|| at.missing("Threads"))?,
            sig_queue: self.sig_queue.ok_or_else(|| at.missing("SigQ"))?,
            sig_pending: self.sig_pending.ok_or_else(|| at.missing("SigPnd"))?,
            shared_pending: self.shared_pending.ok_or_else(|| at.missing("ShdPnd"))?,
            sig_blocked: self.sig_blocked.ok_or_else(|| at.missing("SigBlk"))?,
            sig_ignored: self.sig_ignored.ok_or_else(|| at.missing("SigIgn"))?,
            sig_caught: self.sig_caught.ok_or_else(|| at.missing("SigCgt"))?,
            cap_inheritable: self.cap_inheritable.ok_or_else(|| at.missing("CapInh"))?,
            cap_permitted: self.cap_permitted.ok_or_else(|| at.missing("CapPrm"))?,
            cap_effective: self.cap_effective.ok_or_else(|| at.missing("CapEff"))?,
            cap_bounding: self.cap_bounding.ok_or_else(|| at.missing("CapBnd"))?,
            cap_ambient: self.cap_ambient.ok_or_else(|| at.missing("CapAmb"))?,
            no_new_privs: self.no_new_privs.ok_or_else(|| at.missing("NoNewPrivs"))?,
            seccomp: self.seccomp,
            seccomp_filters: self.seccomp_filters,
            store_bypass: self.store_bypass,
            indirect_branch: self.indirect_branch,
            thread_features: self.thread_features,
            thread_features_locked: self.thread_features_locked,
            cpus_allowed_list: self.cpus_allowed_list.unwrap_or_default(),
            mems_allowed_list: self.mems_allowed_list.unwrap_or_default(),
        })
    }
}

fn ids(at: Place, value: &[u8], field: &'static str) -> Result<Ids, ParseError> {
    let mut words = Words::new(value);
    let mut next = || at.next_uint(&mut words, 10, field);
    Ok(Ids { real: next()?, effective: next()?, saved: next()?, filesystem: next()? })
}

fn ints(at: Place, value: &[u8], field: &'static str) -> Result<Vec<i32>, ParseError> {
    Words::new(value).map(|word| at.int(word, field)).collect()
}

fn kb(at: Place, value: &[u8], field: &'static str) -> Result<u64, ParseError> {
    at.uint(value.strip_suffix(b" kB").unwrap_or(value), 10, field)
}

fn features(value: &[u8]) -> ThreadFeatures {
    let mut found = ThreadFeatures::default();
    for word in Words::new(value) {
        match word {
            b"shstk" => found.shadow_stack = true,
            b"wrss" => found.shadow_stack_write = true,
            _ => found.unknown = true,
        }
    }
    found
}

/// In this file, and no other, the kernel writes a newline of the name as `\n` and a backslash as `\\`.
fn unescape_name(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, tail @ ..] = rest {
        rest = match rest {
            [b'\\', b'n', after @ ..] => {
                out.push(b'\n');
                after
            }
            [b'\\', b'\\', after @ ..] => {
                out.push(b'\\');
                after
            }
            _ => {
                out.push(*first);
                tail
            }
        };
    }
    out
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
