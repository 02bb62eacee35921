//! The tree of a restore: who makes whom, in which session and group (`pstree.img`, setsid(2), setpgid(2)).
//!
//! A session can only be inherited or begun, so a task whose session is that of its parent's former life must be made
//! before its parent calls setsid; [`Tree`] says for each child whether it is. A process group needs a living leader to be
//! joined: where the leader is gone, a helper plays it and ends before the program runs.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rayon::prelude::*;
use standstill_images::proto::{CoreEntry, PstreeEntry, TaskKobjIdsEntry};
use standstill_images::{ImageKind, Images};

use super::{core, pids};
use crate::error::{At, Error, Result};
use crate::memory::rebuild::Memory;

/// So many images are worth being read side by side.
const MANY: usize = 32;

/// One process of the tree, or a helper.
#[derive(Debug)]
pub struct Node {
    /// Its pid.
    pub pid: i32,
    /// Index of its parent; `None` for the root.
    pub parent: Option<usize>,
    /// Its children, in the order of the image.
    pub children: Vec<usize>,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The session that it must be born in, if it is not any.
    pub born_sid: Option<i32>,
    /// Who takes in the children of a helper or a zombie when it ends; `None`: its parent.
    pub orphans_to: Option<usize>,
    /// What it is.
    pub kind: Kind,
}

/// What a node is.
#[derive(Debug)]
pub enum Kind {
    /// Runs, or is stopped by job control.
    Alive(Box<Alive>),
    /// Ended, and not waited for: its wait status.
    Dead {
        /// Wait status.
        status: i32,
        /// Name.
        comm: Vec<u8>,
    },
    /// Ours, for the time of the restore.
    Helper,
}

/// A task that will run.
#[derive(Debug)]
pub struct Alive {
    /// Threads, the leader first: id and image.
    pub threads: Vec<(i32, CoreEntry)>,
    /// Ids of shared objects.
    pub ids: TaskKobjIdsEntry,
    /// Memory.
    pub memory: Memory,
}

/// The tree; parents come before their children.
#[derive(Debug)]
pub struct Tree {
    /// All nodes; the root is the first.
    pub nodes: Vec<Node>,
}

impl Tree {
    /// Reads and checks `pstree.img` and what belongs to each task. With `job` (`--shell-job`), the session and group of the
    /// root are those given: our own. With `lazy`, pages that can come when they are first touched are not asked for.
    pub fn read(images: &Images, job: Option<(i32, i32)>, lazy: bool) -> Result<Tree> {
        let entries: Vec<PstreeEntry> = images.read_entries(ImageKind::Pstree, ())?;
        let lie = |what: String| Error::lie("pstree.img", what);
        let mut tree = Tree { nodes: Vec::with_capacity(entries.len()) };
        let mut index: BTreeMap<i32, usize> = BTreeMap::new();
        let mut taken: BTreeSet<i32> = BTreeSet::new();
        let kinds: Vec<Result<Kind>> = if entries.len() < MANY {
            entries.iter().map(|e| read_task(images, e, lazy)).collect()
        } else {
            entries.par_iter().map(|e| read_task(images, e, lazy)).collect()
        };
        for (e, kind) in entries.iter().zip(kinds) {
            let pid = id(e.pid).filter(|&p| p > 0).ok_or_else(|| lie(format!("process id {}", e.pid)))?;
            let parent = match index.get(&(e.ppid as i32)) {
                Some(&p) if e.ppid != 0 => Some(p),
                None if e.ppid == 0 && tree.nodes.is_empty() => None,
                _ if e.ppid == 0 => return Err(lie(format!("a second root, {pid}"))),
                _ => return Err(lie(format!("task {pid} comes before its parent {}", e.ppid))),
            };
            let kind = kind.task(pid)?;
            if let Kind::Alive(alive) = &kind {
                if let Some((tid, _)) = alive.threads.iter().find(|(tid, _)| !taken.insert(*tid)) {
                    return Err(lie(format!("thread id {tid}"))).task(pid);
                }
            }
            if index.insert(pid, tree.nodes.len()).is_some() {
                return Err(lie(format!("task {pid} is there twice")));
            }
            if let Some(p) = parent {
                let at = tree.nodes.len();
                if !matches!(tree.nodes[p].kind, Kind::Alive(_)) {
                    return Err(lie(format!("task {pid} has a dead parent")));
                }
                tree.nodes[p].children.push(at);
            }
            let (pgid, sid) = (id(e.pgid).unwrap_or(0), id(e.sid).unwrap_or(0));
            tree.nodes.push(Node {
                pid,
                parent,
                children: Vec::new(),
                pgid,
                sid,
                born_sid: None,
                orphans_to: None,
                kind,
            });
        }
        if tree.nodes.is_empty() {
            return Err(lie("no tasks".into()));
        }
        tree.join_job(job)?;
        tree.add_helpers(&taken)?;
        tree.born()?;
        Ok(tree)
    }

    /// Adds helpers for tasks that were dead already, and whose folders in /proc someone has open.
    #[must_use]
    pub fn with_dead(mut self, pids: &BTreeSet<i32>) -> Tree {
        for &pid in pids {
            if self.nodes.iter().all(|n| n.pid != pid) {
                let at = self.nodes.len();
                let (pgid, sid) = (self.nodes[0].pgid, self.nodes[0].sid);
                self.nodes[0].children.push(at);
                self.nodes.push(Node {
                    pid,
                    parent: Some(0),
                    children: Vec::new(),
                    pgid,
                    sid,
                    born_sid: None,
                    orphans_to: None,
                    kind: Kind::Helper,
                });
            }
        }
        self
    }

    /// The root.
    pub fn root(&self) -> &Node {
        &self.nodes[0]
    }

    /// All processes that run plans until the end, with their index.
    pub fn alive(&self) -> impl Iterator<Item = (usize, &Node, &Alive)> {
        self.nodes.iter().enumerate().filter_map(|(i, n)| match &n.kind {
            Kind::Alive(a) => Some((i, n, &**a)),
            Kind::Dead { .. } | Kind::Helper => None,
        })
    }

    /// All ids that the tree is to have: of processes, threads, groups and sessions.
    pub fn ids(&self) -> HashSet<i32> {
        let threads = self.alive().flat_map(|(_, _, a)| a.threads.iter().map(|(tid, _)| *tid));
        self.nodes.iter().flat_map(|n| [n.pid, n.pgid, n.sid]).chain(threads).collect()
    }

    /// A root that did not lead its session goes into ours, and all that were with it.
    fn join_job(&mut self, job: Option<(i32, i32)>) -> Result<()> {
        let (root, sid, pgid) = (self.root().pid, self.root().sid, self.root().pgid);
        if sid == root {
            return Ok(());
        }
        let Some((our_sid, our_pgid)) = job else {
            return Err(Error::Usage {
                what: format!("The root process {root} is not a session leader. Consider using --shell-job option"),
            });
        };
        for node in &mut self.nodes {
            if node.sid == sid {
                node.sid = our_sid;
            }
            if node.pgid == pgid && pgid != root {
                node.pgid = our_pgid;
            }
        }
        Ok(())
    }

    /// Helpers for sessions and groups whose leader is gone.
    fn add_helpers(&mut self, taken: &BTreeSet<i32>) -> Result<()> {
        let mut leaders: BTreeSet<i32> = self.nodes.iter().map(|n| n.pid).collect();
        let (root, job_sid, job_pgid) = (self.root().pid, self.root().sid, self.root().pgid);
        let ours = job_sid != root;
        // orphans of a session: its leader had them and ended, and whoever takes in orphans took them in
        for i in 1..self.nodes.len() {
            let (pid, sid) = (self.nodes[i].pid, self.nodes[i].sid);
            let Some(parent) = self.nodes[i].parent else { continue };
            if sid == 0 {
                continue;
            }
            let leader = self.nodes.iter().position(|n| n.pid == sid && !matches!(n.kind, Kind::Helper));
            if let Some(leader) = leader {
                if !self.descends(i, leader) && self.nodes[parent].sid != sid {
                    self.add_orphan(i, parent, leader)?;
                }
                continue;
            }
            if (ours && sid == job_sid) || self.nodes[parent].sid == sid {
                continue;
            }
            if taken.contains(&sid) {
                return Err(Error::lie("pstree.img", format!("session {sid} has the id of a thread"))).task(pid);
            }
            let known = self.nodes.iter().position(|n| n.pid == sid && n.parent == Some(parent));
            let helper = known.unwrap_or(self.nodes.len());
            if known.is_none() {
                if !leaders.insert(sid) {
                    return Err(Error::refused(
                        format!("a session ({sid}) in several places of the tree"),
                        "keep its leader alive",
                    ))
                    .task(pid);
                }
                self.nodes[parent].children.push(helper);
                self.nodes.push(Node {
                    pid: sid,
                    parent: Some(parent),
                    children: Vec::new(),
                    pgid: sid,
                    sid,
                    born_sid: None,
                    orphans_to: None,
                    kind: Kind::Helper,
                });
            }
            self.nodes[parent].children.retain(|&c| c != i);
            self.nodes[helper].children.push(i);
            self.nodes[i].parent = Some(helper);
        }
        for i in 0..self.nodes.len() {
            let (pgid, sid) = (self.nodes[i].pgid, self.nodes[i].sid);
            if pgid == 0 || leaders.contains(&pgid) || (ours && pgid == job_pgid) {
                continue;
            }
            leaders.insert(pgid);
            if taken.contains(&pgid) {
                return Err(Error::lie("pstree.img", format!("group {pgid} has the id of a thread")));
            }
            // the helper is made by the parent of the first member, in whose session it then is
            let parent = self.nodes[i].parent.filter(|&p| self.nodes[p].sid == sid).unwrap_or(0);
            let at = self.nodes.len();
            self.nodes[parent].children.push(at);
            self.nodes.push(Node {
                pid: pgid,
                parent: Some(parent),
                children: Vec::new(),
                pgid,
                sid,
                born_sid: None,
                orphans_to: None,
                kind: Kind::Helper,
            });
        }
        Ok(())
    }

    /// Whether node `i` is below node `above`, or is it.
    fn descends(&self, i: usize, above: usize) -> bool {
        let mut at = Some(i);
        while let Some(n) = at {
            if n == above {
                return true;
            }
            at = self.nodes[n].parent;
        }
        false
    }

    /// Node `i` is in the session of a task that is none of its ancestors: it was made below `leader`, by someone who ended,
    /// and whoever takes in orphans took it in. A helper does what that one did, or the leader itself, if it is a zombie.
    fn add_orphan(&mut self, i: usize, parent: usize, leader: usize) -> Result<()> {
        let sid = self.nodes[leader].pid;
        let known = self.nodes.iter().position(|n| n.parent == Some(leader) && n.orphans_to == Some(parent));
        let helper = match known {
            _ if matches!(self.nodes[leader].kind, Kind::Dead { .. }) => {
                self.nodes[leader].orphans_to = Some(parent);
                leader
            }
            Some(helper) => helper,
            None => {
                let helper = self.nodes.len();
                let pid = self.spare_id()?;
                self.nodes[leader].children.push(helper);
                self.nodes.push(Node {
                    pid,
                    parent: Some(leader),
                    children: Vec::new(),
                    pgid: 0,
                    sid,
                    born_sid: None,
                    orphans_to: Some(parent),
                    kind: Kind::Helper,
                });
                helper
            }
        };
        self.nodes[parent].children.retain(|&c| c != i);
        self.nodes[helper].children.push(i);
        self.nodes[i].parent = Some(helper);
        Ok(())
    }

    /// An id that nobody in the tree is to have, and nobody outside has.
    fn spare_id(&self) -> Result<i32> {
        pids::limit().and_then(|limit| pids::unused(limit, &self.ids())).ok_or(Error::Gone)
    }

    /// The task whose memory a node's is cloned from: helpers have none of their own.
    pub fn memory_parent(&self, i: usize) -> Option<usize> {
        let mut at = self.nodes[i].parent?;
        while !matches!(self.nodes[at].kind, Kind::Alive(_)) {
            at = self.nodes[at].parent?;
        }
        Some(at)
    }

    /// Tasks whose memory is cloned from that of node `i`: its children, and those of the helpers among them.
    pub fn heirs(&self, i: usize) -> Vec<usize> {
        let mut all = Vec::new();
        for &c in &self.nodes[i].children {
            all.push(c);
            if !matches!(self.nodes[c].kind, Kind::Alive(_)) {
                all.extend(&self.nodes[c].children);
            }
        }
        all
    }

    /// Tasks that a helper made, and that its parent takes in when the helper ends.
    pub fn adopts(&self, i: usize) -> bool {
        let mut makers = self.nodes.iter().filter(|n| !matches!(n.kind, Kind::Alive(_)) && !n.children.is_empty());
        makers.any(|n| n.orphans_to.or(n.parent) == Some(i))
    }

    /// Finds out who must be born in which session, children before parents.
    fn born(&mut self) -> Result<()> {
        // helpers stand at the end of the list, but their children do not: a few rounds settle the order
        for i in (0..self.nodes.len()).rev().chain((0..self.nodes.len()).rev()) {
            for c in self.nodes[i].children.clone() {
                let child = &self.nodes[c];
                let need = if child.sid == child.pid { child.born_sid } else { Some(child.sid) };
                let (child_pid, node) = (child.pid, &self.nodes[i]);
                let Some(need) = need.filter(|&s| s != node.sid && s != 0) else { continue };
                let possible = node.sid == node.pid && node.born_sid.is_none_or(|b| b == need);
                if !possible {
                    return Err(Error::refused(
                        format!("a task in session {need}, which its parent {} was never in,", node.pid),
                        "its session's leader must be an ancestor of it",
                    ))
                    .task(child_pid);
                }
                self.nodes[i].born_sid = Some(need);
            }
        }
        Ok(())
    }

    /// True if child `c` of node `i` must be made before `i` begins its own session.
    pub fn before_session(&self, i: usize, c: usize) -> bool {
        let (node, child) = (&self.nodes[i], &self.nodes[c]);
        let need = if child.sid == child.pid { child.born_sid } else { Some(child.sid) };
        node.sid == node.pid && need.is_some_and(|s| s != node.sid && s != 0)
    }
}

fn id(raw: u32) -> Option<i32> {
    i32::try_from(raw).ok().filter(|&p| p <= 1 << 22)
}

fn read_task(images: &Images, e: &PstreeEntry, lazy: bool) -> Result<Kind> {
    let leader: CoreEntry = images.read_one(ImageKind::Core, e.pid)?;
    let tc = leader.tc.as_ref().ok_or_else(|| Error::lie("core", "a process without its part"))?;
    match tc.task_state {
        core::DEAD | 6 => return Ok(Kind::Dead { status: tc.exit_code as i32, comm: tc.comm.clone() }),
        core::ALIVE | core::STOPPED => {}
        other => return Err(Error::lie("core", format!("task state {other}"))),
    }
    if e.threads.first() != Some(&e.pid) {
        return Err(Error::lie("pstree.img", format!("task {} does not lead its threads", e.pid)));
    }
    let thread = |&tid: &u32| -> Result<(i32, CoreEntry)> {
        let t = id(tid).filter(|&t| t > 0).ok_or_else(|| Error::lie("pstree.img", format!("thread id {tid}")))?;
        let entry = if tid == e.pid { leader.clone() } else { images.read_one(ImageKind::Core, tid)? };
        core::parts(&entry).task(t)?;
        Ok((t, entry))
    };
    let threads = if e.threads.len() < MANY {
        e.threads.iter().map(thread).collect::<Result<_>>()?
    } else {
        e.threads.par_iter().with_min_len(MANY / 2).map(thread).collect::<Result<_>>()?
    };
    let ids: TaskKobjIdsEntry = images.read_one(ImageKind::Ids, e.pid)?;
    let memory = Memory::read(images, e.pid, lazy)?;
    Ok(Kind::Alive(Box::new(Alive { threads, ids, memory })))
}
