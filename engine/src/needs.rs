//! What a tree needs of the host that it is to come to, and what of that a host lacks: asked of a tree that runs, before a
//! migration touches it, and of a checkpoint (`verify`).
//!
//! This is not all that a restore needs, but what most often is missing: kernel features, instructions of the processor, room,
//! process ids, ports, and the files whose code is mapped. A restore that fails for another reason leaves the source running.
//!
//! Sources: proc(5), among it `/proc/net/tcp` and `/proc/cpuinfo`.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use procfs::process::{MMapPath, MemoryMap, Process};
use procfs::Current as _;
use serde::{Deserialize, Serialize};

use standstill_images::proto::{core_entry::March, InetSkEntry};

use crate::check;
use crate::error::{Error, Result};
use crate::migrate::members;
use crate::namespaces::{self, Own};
use crate::sockets;
use crate::tasks::tree::Tree;

/// Instructions that a program may have found at its start, and goes on to use (flags of `/proc/cpuinfo`).
const INSTRUCTIONS: &[&str] = &[
    "sse4_1",
    "sse4_2",
    "ssse3",
    "popcnt",
    "aes",
    "pclmulqdq",
    "movbe",
    "xsave",
    "xsavec",
    "xsaves",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi1",
    "bmi2",
    "lzcnt",
    "abm",
    "adx",
    "sha_ni",
    "rdrand",
    "rdseed",
    "erms",
    "fsrm",
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx512_bf16",
    "avx512_fp16",
    "avx_vnni",
    "vaes",
    "vpclmulqdq",
    "gfni",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "rtm",
    "hle",
    "pku",
    "ospke",
    "user_shstk",
    "rdpid",
    "fsgsbase",
];

/// A file whose code or data is mapped.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileNeed {
    /// Where it is.
    pub path: PathBuf,
    /// How long it is.
    pub size: u64,
}

/// What a tree needs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Needs {
    /// The machine's architecture.
    pub architecture: String,
    /// Instructions that the source has.
    pub instructions: BTreeSet<String>,
    /// Bytes of memory that its tasks use.
    pub memory: u64,
    /// Ids of processes and threads, unless they are in a pid namespace of their own.
    pub pids: BTreeSet<i32>,
    /// Ports of TCP on which somebody of the tree listens, unless it has a network of its own.
    pub ports: BTreeSet<u16>,
    /// Mapped files, unless it has mounts of its own.
    pub files: BTreeSet<FileNeed>,
}

fn instructions() -> BTreeSet<String> {
    let cpus = procfs::CpuInfo::current().ok();
    let flags = cpus.as_ref().and_then(|cpus| cpus.flags(0)).unwrap_or_default();
    flags.into_iter().filter(|f| INSTRUCTIONS.contains(f)).map(str::to_owned).collect()
}

/// As the standard library calls it.
fn architecture(of: March) -> &'static str {
    match of {
        March::Unknown => "an unknown architecture",
        March::X8664 => "x86_64",
        March::Arm => "arm",
        March::Aarch64 => "aarch64",
        March::Ppc64 => "powerpc64",
        March::S390 => "s390x",
        March::Mips => "mips",
        March::Loongarch64 => "loongarch64",
        March::Riscv64 => "riscv64",
    }
}

fn failed(e: procfs::ProcError) -> Error {
    match e {
        procfs::ProcError::NotFound(_) => Error::Gone,
        e => Error::Changed { what: format!("/proc: {e}") },
    }
}

fn shares(process: &Process, kind: &str) -> bool {
    let link = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
    link(&process.pid.to_string()) == link("self")
}

fn ports_of(sockets: &BTreeSet<u64>) -> BTreeSet<u16> {
    let listening =
        |e: &procfs::net::TcpNetEntry| e.state == procfs::net::TcpState::Listen && sockets.contains(&e.inode);
    let all = [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten();
    all.filter(listening).map(|e| e.local_address.port()).collect()
}

impl Needs {
    /// What the tree below a process needs. It runs meanwhile: this is for advice, not for proof.
    pub fn of_tree(root: i32) -> Result<Needs> {
        let process = Process::new(root).map_err(|e| match e {
            procfs::ProcError::NotFound(_) => Error::NoProcess { pid: root },
            e => failed(e),
        })?;
        let mut needs =
            Needs { architecture: std::env::consts::ARCH.to_owned(), instructions: instructions(), ..Needs::default() };
        let (own_pids, own_net, own_mounts) =
            (!shares(&process, "pid"), !shares(&process, "net"), !shares(&process, "mnt"));
        let (mut sockets, mut next) = (BTreeSet::new(), vec![root]);
        while let Some(pid) = next.pop() {
            next.extend(members::children(pid));
            // one that ends meanwhile needs nothing
            let Ok(process) = Process::new(pid) else { continue };
            if let Ok(memory) = process.statm() {
                needs.memory += memory.resident * procfs::page_size();
            }
            if !own_pids {
                needs.pids.insert(pid);
                needs.pids.extend(process.tasks().into_iter().flatten().flatten().map(|t| t.tid));
            }
            if !own_net {
                for fd in process.fd().into_iter().flatten().flatten() {
                    if let procfs::process::FDTarget::Socket(inode) = fd.target {
                        sockets.insert(inode);
                    }
                }
            }
            if !own_mounts {
                let maps: Vec<MemoryMap> = process.maps().map(|m| m.into_iter().collect()).unwrap_or_default();
                for map in maps {
                    let MMapPath::Path(path) = map.pathname else { continue };
                    let there = std::fs::metadata(&path).ok();
                    let same = there.filter(|m| m.is_file() && m.ino() == map.inode);
                    needs.files.extend(same.map(|m| FileNeed { path, size: m.len() }));
                }
            }
        }
        needs.ports = ports_of(&sockets);
        Ok(needs)
    }

    /// What the tree of a checkpoint needs, whose namespaces and sockets are these. Files are not among it: a checkpoint says more
    /// of them than their size.
    pub fn of_checkpoint<'a>(
        tree: &Tree,
        own: &Own,
        sockets: impl Iterator<Item = &'a InetSkEntry>,
        memory: u64,
    ) -> Needs {
        let mut needs = Needs { memory, ..Needs::default() };
        let core = tree.alive().find_map(|(_, _, a)| a.threads.first().map(|(_, core)| core.mtype()));
        needs.architecture = core.map_or(std::env::consts::ARCH, architecture).to_owned();
        if !own.has(namespaces::Kind::Pid) {
            // a session or group of ours, which a job of the shell goes into, is none that has to be free
            let (sid, pgid) = crate::tasks::release::own_session_and_group();
            needs.pids.extend(tree.ids().into_iter().filter(|id| *id > 0 && *id != sid && *id != pgid));
        }
        if !own.has(namespaces::Kind::Net) {
            let listening = sockets.filter(|e| sockets::inet::listens(e));
            needs.ports.extend(listening.filter_map(|e| u16::try_from(e.src_port).ok()).filter(|port| *port != 0));
        }
        needs
    }

    /// What of it this host lacks, in words.
    pub fn lacking(&self) -> Vec<String> {
        let mut lacking = Vec::new();
        let here = std::env::consts::ARCH;
        if self.architecture != here {
            lacking.push(format!("the tree is of {}, this machine is {here}", self.architecture));
        }
        let missing: Vec<String> = self.instructions.difference(&instructions()).cloned().collect();
        if !missing.is_empty() {
            lacking.push(format!("the processor here lacks {}, which the tree may use", missing.join(", ")));
        }
        for feature in check::lacking(check::Category::Required) {
            lacking.push(format!("the kernel here lacks {}: {}", feature.name, feature.remedy));
        }
        let free = procfs::Meminfo::current().ok().and_then(|m| m.mem_available);
        if let Some(free) = free.filter(|free| *free < self.memory) {
            lacking.push(format!(
                "the tree uses {} MiB of memory, {} MiB are free here",
                self.memory >> 20,
                free >> 20
            ));
        }
        let last = std::fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|text| text.trim().parse().ok());
        if let Some(above) = self.pids.last().filter(|pid| last.is_some_and(|last: i32| **pid >= last)) {
            lacking.push(format!(
                "process ids go up to {above}, and end before {} here: raise /proc/sys/kernel/pid_max",
                last.unwrap_or(0)
            ));
        }
        let taken: Vec<String> =
            self.pids.iter().filter(|pid| PathBuf::from(format!("/proc/{pid}")).exists()).map(i32::to_string).collect();
        if !taken.is_empty() {
            let what = "start the tree in a pid namespace of its own to be free of this";
            lacking.push(format!("process ids in use here: {} ({what})", taken.join(", ")));
        }
        let all = [procfs::net::tcp(), procfs::net::tcp6()].into_iter().flatten().flatten();
        let listening = all.filter(|e| e.state == procfs::net::TcpState::Listen).map(|e| e.local_address.port());
        let taken: BTreeSet<u16> = listening.filter(|port| self.ports.contains(port)).collect();
        for port in taken {
            lacking.push(format!("somebody here listens on port {port}"));
        }
        for file in &self.files {
            let path = file.path.display();
            match std::fs::metadata(&file.path) {
                Err(e) => lacking.push(format!("{path}: {e}")),
                Ok(m) if m.len() != file.size => {
                    lacking.push(format!("{path} has {} bytes here, {} at the source", m.len(), file.size));
                }
                Ok(_) => {}
            }
        }
        lacking
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_here_lacks_its_ids_alone() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let me = i32::try_from(std::process::id()).unwrap();
        let needs = Needs::of_tree(me).unwrap();
        assert!(needs.pids.contains(&me) && needs.ports.contains(&port) && needs.memory > 0);
        let program = std::env::current_exe().unwrap();
        assert!(needs.files.iter().any(|f| f.path == program));
        let text = needs.lacking().join("\n");
        assert!(text.contains(&format!("port {port}")) && text.contains(&me.to_string()), "{text}");
        let elsewhere = Needs { pids: BTreeSet::new(), ports: BTreeSet::new(), ..needs };
        assert_eq!(elsewhere.lacking(), Vec::<String>::new());
    }

    #[test]
    fn what_is_missing_is_named() {
        let needs = Needs {
            architecture: "vax".into(),
            instructions: BTreeSet::from(["polyf".to_owned()]),
            memory: 1 << 60,
            files: BTreeSet::from([
                FileNeed { path: "/nonexistent/x".into(), size: 1 },
                FileNeed { path: "/bin/sh".into(), size: 1 },
            ]),
            ..Needs::default()
        };
        let lacking = needs.lacking();
        assert_eq!(lacking.len(), 5, "{lacking:#?}");
        assert!(lacking[4].starts_with("/nonexistent/x: ") && lacking[3].contains("1 at the source"), "{lacking:#?}");
        assert!(matches!(Needs::of_tree(i32::MAX), Err(Error::NoProcess { .. })));
    }
}
