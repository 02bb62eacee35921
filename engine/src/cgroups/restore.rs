//! Makes the groups of a checkpoint, and moves its tasks into them.

use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use standstill_images::proto::{CgroupPerms, CoreEntry, InventoryEntry};
use standstill_images::{ImageKind, Images};

use super::image::{clean, Controller, Group, Image, Property, Set};
use super::{is_of, open_yard, roots};
use crate::error::{At, Call, Error, Place, Result};
use crate::guard::{Act, Guard, Held, List};
use crate::options::{CgroupMode, Options, Persona};
use crate::sys::cgroupfs;
use crate::tasks::tree::{Alive, Tree};

const IMAGE: &str = "cgroup.img";
/// How long the ends of tasks may take that are in groups which are to be removed.
const ENDS: Duration = Duration::from_secs(2);
/// Must be set before a task enters, or before a group has others below it.
const FIRST: &[&str] = &[
    "cpuset.cpus",
    "cpuset.mems",
    "devices.list",
    "memory.kmem.limit_in_bytes",
    "memory.swappiness",
    "memory.oom_control",
    "memory.use_hierarchy",
    "cgroup.type",
];

/// The groups of a restore. Those that it made are removed when this is dropped, unless they are to stay.
#[derive(Debug)]
pub struct Restored<'o> {
    opts: &'o Options,
    sets: Vec<Set>,
    controllers: Vec<Controller>,
    /// The set that the engine was in when it dumped.
    engine: u32,
    /// Each controller's hierarchy, when it is prepared.
    yard: Vec<OwnedFd>,
    made: Vec<(usize, String)>,
    /// What is written last of all.
    states: Vec<(usize, String, String)>,
}

/// The set of a thread; 0 if its entry says nothing.
fn set_of(entry: &CoreEntry) -> u32 {
    let own = entry.thread_core.as_ref().and_then(|c| c.cg_set);
    own.or_else(|| entry.tc.as_ref().and_then(|tc| tc.cg_set)).unwrap_or(0)
}

/// Where a thread is: hierarchies and paths. To move someone to where he is takes the kernel some time all the same.
fn groups_of(tid: i32) -> Result<Vec<(String, String)>> {
    let mut text = Vec::new();
    crate::proc::read_proc(format!("/proc/{tid}/cgroup").as_ref(), &mut text).call("read(/proc/PID/cgroup)")?;
    let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let all = crate::proc::cgroup::parse(&text)?.into_iter();
    Ok(all.map(|m| (lossy(&m.controllers.join(&b',')), lossy(&m.path))).collect())
}

fn below(path: &str, name: &str) -> String {
    match (path, name) {
        ("", name) => name.to_owned(),
        (path, "") => path.to_owned(),
        (path, name) => format!("{path}/{name}"),
    }
}

impl<'o> Restored<'o> {
    /// Reads and checks `cgroup.img`. Nothing if there is nothing to do.
    pub fn read(
        opts: &'o Options,
        images: &Images,
        inventory: &InventoryEntry,
        tree: &Tree,
    ) -> Result<Option<Restored<'o>>> {
        if inventory.root_cg_set == Some(0) {
            return Err(Error::lie("inventory.img", "root_cg_set is 0"));
        }
        if opts.manage_cgroups == CgroupMode::Ignore {
            return Ok(None);
        }
        let Some(entry) = images.read_one_if_there(ImageKind::Cgroup, ())? else { return Ok(None) };
        let mut image = Image::read(entry)?;
        roots::rewrite(&mut image, &opts.cgroup_roots)?;
        let Image { sets, controllers } = image;
        let engine = inventory.root_cg_set.unwrap_or(0);
        if sets.is_empty() {
            return Ok(None);
        }
        let (yard, made, states) = (Vec::new(), Vec::new(), Vec::new());
        let restored = Restored { opts, sets, controllers, engine, yard, made, states };
        for (_, node, alive) in tree.alive() {
            for id in alive.threads.iter().map(|(_, entry)| set_of(entry)) {
                if id != 0 && id != engine {
                    restored.set(id).task(node.pid)?;
                }
            }
        }
        Ok(Some(restored))
    }

    fn set(&self, id: u32) -> Result<&Set> {
        self.sets.iter().find(|s| s.id == id).ok_or_else(|| Error::lie(IMAGE, format!("No set {id} found")))
    }

    fn controller(&self, name: &str) -> Result<usize> {
        let found = self.controllers.iter().position(|c| is_of(&c.names, name));
        found.ok_or_else(|| Error::lie(IMAGE, format!("No cg_controller_entry found for {name}")))
    }

    /// Makes what is missing.
    pub fn prepare(&mut self, guard: &Guard<'_>) -> Result<()> {
        for controller in &self.controllers {
            let in_yard =
                self.opts.cgroup_yard.as_ref().map(|yard| open_yard(&self.opts.in_work_dir(yard), &controller.names));
            let files = match in_yard {
                Some(Err(e)) if e.errno() != libc::ENOENT => return Err(e),
                Some(Ok(files)) => files,
                Some(Err(_)) | None => cgroupfs::mount(controller.names.iter().map(String::as_str))
                    .at(Place::Path(controller.names.join(",").into()))?,
            };
            self.yard.push(files);
        }
        let mut controllers = std::mem::take(&mut self.controllers);
        let mut held = None;
        let done = controllers.iter_mut().enumerate().try_for_each(|(n, controller)| {
            held = None;
            let v2 = controller.names.iter().all(String::is_empty);
            self.groups(n, "", &mut controller.groups, v2, guard, &mut held)
        });
        self.controllers = controllers;
        done?;
        self.remove_by_guard(guard)
    }

    /// Should we die, tasks may still be there when the guard comes to their groups.
    fn remove_by_guard(&self, guard: &Guard<'_>) -> Result<()> {
        if self.made.is_empty() {
            return Ok(());
        }
        // what is registered last is done first
        for patience in [ENDS, ENDS / 10] {
            let mut held: Option<(usize, Held)> = None;
            for (n, path) in &self.made {
                let hierarchy = match held {
                    Some((of, hierarchy)) if of == *n => hierarchy,
                    _ => guard.hold(self.yard[*n].as_fd())?,
                };
                held = Some((*n, hierarchy));
                guard.register(List::Undo, &Act::RemoveIn(hierarchy, path.as_bytes(), true))?;
            }
            guard.register(List::Undo, &Act::Pause(patience))?;
        }
        Ok(())
    }

    fn groups(
        &mut self,
        n: usize,
        parent: &str,
        groups: &mut [Group],
        v2: bool,
        guard: &Guard<'_>,
        held: &mut Option<Held>,
    ) -> Result<()> {
        for group in groups {
            let path = below(parent, group.name.trim_matches('/'));
            self.group(n, &path, group, v2, guard, held).at(Place::Path(path.clone().into()))?;
            self.groups(n, &path, &mut group.groups, v2, guard, held)?;
        }
        Ok(())
    }

    /// One group, and those above it.
    fn group(
        &mut self,
        n: usize,
        path: &str,
        group: &mut Group,
        v2: bool,
        guard: &Guard<'_>,
        held: &mut Option<Held>,
    ) -> Result<()> {
        use CgroupMode::{Full, Ignore, None as Nothing, Props, Soft, Strict};
        let mode = self.opts.manage_cgroups;
        if self.exists(n, path)? {
            // the root of a hierarchy is always there
            if mode == Strict && (!path.is_empty() || self.opts.personality == Persona::Criu) {
                return Err(Error::Usage { what: "Abort restore of existing cgroups".into() });
            }
            match mode {
                Soft | Nothing => group.properties.clear(),
                Ignore | Props | Full | Strict => {}
            }
            if mode != Nothing {
                self.own(n, path, group.perms.as_ref())?;
            }
            return Ok(());
        }
        if matches!(mode, Nothing | Props) {
            return Err(Error::Usage { what: format!("Cgroup dir {path} doesn't exist") });
        }
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            self.make(n, &path[..end], guard, held)?;
        }
        self.own(n, path, group.perms.as_ref())?;
        for property in group.properties.iter().filter(|p| is_first(p, v2)) {
            self.set_first(n, path, property).at(Place::Path(property.name.clone().into()))?;
        }
        Ok(())
    }

    fn exists(&self, n: usize, path: &str) -> Result<bool> {
        let at = if path.is_empty() { "." } else { path };
        match rustix::fs::statat(&self.yard[n], at, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(e).call("stat"),
        }
    }

    fn make(&mut self, n: usize, path: &str, guard: &Guard<'_>, held: &mut Option<Held>) -> Result<()> {
        if self.exists(n, path)? {
            return Ok(());
        }
        let hierarchy = match *held {
            Some(hierarchy) => hierarchy,
            None => guard.hold(self.yard[n].as_fd())?,
        };
        *held = Some(hierarchy);
        guard.register(List::Undo, &Act::RemoveIn(hierarchy, path.as_bytes(), true))?;
        match rustix::fs::mkdirat(&self.yard[n], path, Mode::from_raw_mode(0o755)) {
            Ok(()) => self.made.push((n, path.to_owned())),
            Err(Errno::EXIST) => {}
            Err(e) => return Err(e).call("mkdir"),
        }
        tracing::info!("Created cgroup dir {path}");
        Ok(())
    }

    /// Gives a group its owner and mode.
    fn own(&self, n: usize, path: &str, perms: Option<&CgroupPerms>) -> Result<()> {
        let Some(perms) = perms else { return Ok(()) };
        let at = if path.is_empty() { "." } else { path };
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = rustix::fs::openat(&self.yard[n], at, flags, Mode::empty()).call("open")?;
        give(&folder, perms)
    }

    fn open(&self, n: usize, path: &str, name: &str, flags: OFlags) -> Result<OwnedFd> {
        let path = below(path, name);
        rustix::fs::openat(&self.yard[n], path.as_str(), flags | OFlags::CLOEXEC, Mode::empty())
            .call("open")
            .at(Place::Path(path.into()))
    }

    /// A setting that must be there before anyone enters.
    fn set_first(&self, n: usize, path: &str, property: &Property) -> Result<()> {
        let value = property.value.as_str();
        match property.name.as_str() {
            // what a new group has
            "memory.swappiness" if value == "60" => Ok(()),
            "memory.oom_control" if value == "0" => Ok(()),
            "devices.list" => {
                // the list is made of what may be done after nothing could; a line a write
                let perms = property.perms.map(|p| CgroupPerms { mode: 0o200, ..p });
                self.write(n, path, "devices.deny", perms.as_ref(), ["a"].into_iter())?;
                self.write(n, path, "devices.allow", perms.as_ref(), value.lines())
            }
            _ => self.set_property(n, path, property),
        }
    }

    fn set_property(&self, n: usize, path: &str, property: &Property) -> Result<()> {
        let perms = property.perms.as_ref();
        let value = property.value.as_str();
        let only = |value| Some(value).filter(|v: &&str| !v.is_empty()).into_iter();
        match property.name.as_str() {
            name @ ("cgroup.procs" | "tasks") => self.write(n, path, name, perms, std::iter::empty()),
            name @ "cgroup.type" if value != "threaded" => self.write(n, path, name, perms, std::iter::empty()),
            name @ "cgroup.subtree_control" => {
                let mut file = std::fs::File::from(self.open(n, path, name, OFlags::RDWR)?);
                perms.map_or(Ok(()), |perms| give(&file, perms))?;
                let mut now = Vec::new();
                crate::proc::read_all(&file, &mut now).call("read")?;
                let now = String::from_utf8_lossy(&now).into_owned();
                let less = now.split_whitespace().map(|name| format!("-{name}"));
                let words: Vec<String> = less.chain(value.split_whitespace().map(|name| format!("+{name}"))).collect();
                if words.is_empty() {
                    return Ok(());
                }
                file.write_all(words.join(" ").as_bytes()).call("write")
            }
            // networks differ: what is not there cannot be set
            name @ "net_prio.ifpriomap" => {
                let is_set = |l: &&str| l.split(' ').nth(1).is_some_and(|n| n.parse() != Ok(0));
                for line in value.lines().filter(is_set) {
                    if let Err(e) = self.write(n, path, name, perms, [line].into_iter()) {
                        tracing::warn!("{path}/{name}: {line}: {}", e.chain());
                    }
                }
                Ok(())
            }
            // what new kernels do not limit any more
            name @ "memory.kmem.limit_in_bytes" => match self.write(n, path, name, perms, only(value)) {
                Err(e) if e.errno() == libc::EOPNOTSUPP => Ok(()),
                other => other,
            },
            name => self.write(n, path, name, perms, only(value)),
        }
    }

    /// Opens a file of a group, gives it its owner and mode, and writes to it.
    fn write<'v>(
        &self,
        n: usize,
        path: &str,
        name: &str,
        perms: Option<&CgroupPerms>,
        values: impl Iterator<Item = &'v str>,
    ) -> Result<()> {
        let mut file = std::fs::File::from(self.open(n, path, name, OFlags::WRONLY)?);
        perms.map_or(Ok(()), |perms| give(&file, perms))?;
        for value in values {
            file.write_all(value.as_bytes()).call("write").at(Place::Path(value.into()))?;
        }
        Ok(())
    }

    /// Puts the root, which has just been born, where it is to be; `unshare` has it make a cgroup namespace.
    pub fn born(&self, pid: i32, alive: &Alive, unshare: impl FnOnce() -> Result<()>) -> Result<()> {
        let id = alive.threads.first().map_or(0, |(_, entry)| set_of(entry));
        if id == 0 || id == self.engine {
            return Ok(());
        }
        let set = self.set(id)?;
        let mut unshares = false;
        for member in &set.members {
            if member.prefix == 0 {
                continue;
            }
            let root = member.path.get(..member.prefix).unwrap_or("");
            self.enter(&member.name, root, "cgroup.procs", pid)?;
            unshares = true;
        }
        if unshares {
            unshare()?;
        }
        self.move_process(pid, set)
    }

    fn move_process(&self, pid: i32, set: &Set) -> Result<()> {
        let there = groups_of(pid)?;
        for member in set.members.iter().filter(|m| !there.contains(&(m.name.clone(), m.path.clone()))) {
            self.enter(&member.name, &member.path, "cgroup.procs", pid)?;
        }
        Ok(())
    }

    fn enter(&self, controller: &str, path: &str, file: &str, id: i32) -> Result<()> {
        let n = self.controller(controller)?;
        let text = id.to_string();
        let moved = self.write(n, &clean(path)?, file, None, [text.as_str()].into_iter());
        moved.at(Place::Path(format!("{controller}:{path}").into())).at(Place::Step("moving into a cgroup"))
    }

    /// Moves processes that are not where their parents are. `pid_of` tells their ids here.
    pub fn forked(&self, tree: &Tree, pid_of: impl Fn(i32) -> Result<i32>) -> Result<()> {
        let leaders: Vec<Option<u32>> = tree.nodes.iter().map(|_| None).collect();
        let mut sets = leaders;
        for (i, _, alive) in tree.alive() {
            sets[i] = alive.threads.first().map(|(_, entry)| set_of(entry)).filter(|&id| id != 0);
        }
        for (i, node, _) in tree.alive().skip(1) {
            let mut parent = node.parent;
            while let Some(p) = parent.filter(|&p| sets[p].is_none()) {
                parent = tree.nodes[p].parent;
            }
            let there = parent.and_then(|p| sets[p]).unwrap_or(self.engine);
            match sets[i] {
                Some(id) if id != there => {
                    let pid = pid_of(node.pid)?;
                    self.set(id).and_then(|set| self.move_process(pid, set)).task(node.pid)?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves threads that are not where their processes are.
    pub fn threads(&self, tree: &Tree, tid_of: impl Fn(i32) -> Result<i32>) -> Result<()> {
        for (_, _, alive) in tree.alive() {
            let leader = alive.threads.first().map_or(0, |(_, entry)| set_of(entry));
            for (tid, entry) in alive.threads.iter().skip(1) {
                let id = entry.thread_core.as_ref().and_then(|c| c.cg_set).unwrap_or(leader);
                if id != leader && id != 0 {
                    let here = tid_of(*tid)?;
                    self.set(id).and_then(|set| self.move_thread(here, set)).task(*tid)?;
                }
            }
        }
        Ok(())
    }

    /// Elsewhere than in hierarchies of threads, a thread is where its process is.
    fn move_thread(&self, tid: i32, set: &Set) -> Result<()> {
        let there = groups_of(tid)?;
        for member in set.members.iter().filter(|m| !there.contains(&(m.name.clone(), m.path.clone()))) {
            let controller = &self.controllers[self.controller(&member.name)?];
            if !controller.threaded {
                continue;
            }
            let v2 = controller.names.iter().all(String::is_empty);
            self.enter(&member.name, &member.path, if v2 { "cgroup.threads" } else { "tasks" }, tid)?;
        }
        Ok(())
    }

    /// The settings that groups get when all tasks are there.
    pub fn set_properties(&mut self) -> Result<()> {
        let controllers = std::mem::take(&mut self.controllers);
        let done = controllers.iter().enumerate().try_for_each(|(n, controller)| {
            let v2 = controller.names.iter().all(String::is_empty);
            self.properties(n, "", &controller.groups, v2)
        });
        self.controllers = controllers;
        done
    }

    fn properties(&mut self, n: usize, parent: &str, groups: &[Group], v2: bool) -> Result<()> {
        for group in groups {
            let path = below(parent, group.name.trim_matches('/'));
            // a hierarchy's root is not the tree's
            for property in group.properties.iter().filter(|p| !path.is_empty() && !is_first(p, v2)) {
                let name = property.name.as_str();
                if name == "freezer.state" || (name == "cgroup.freeze" && property.value == "1") {
                    self.states.push((n, below(&path, name), property.value.clone()));
                    continue;
                }
                self.set_property(n, &path, property)
                    .at(Place::Path(below(&path, name).into()))
                    .at(Place::Step("properties of a cgroup"))?;
            }
            self.properties(n, &path, &group.groups, v2)?;
        }
        Ok(())
    }

    /// Freezes what was frozen; all is about to go.
    pub fn set_states(&self) {
        for (n, path, value) in &self.states {
            if let Err(e) = self.write(*n, path, "", None, [value.as_str()].into_iter()) {
                tracing::error!("Unable to restore freezer state of {path}: {}", e.chain());
            }
        }
    }

    /// The restore worked: groups stay.
    pub fn keep(mut self) {
        self.made.clear();
    }
}

impl Drop for Restored<'_> {
    fn drop(&mut self) {
        let began = Instant::now();
        for (n, path) in self.made.iter().rev() {
            loop {
                match rustix::fs::unlinkat(&self.yard[*n], path.as_str(), AtFlags::REMOVEDIR) {
                    // tasks that were killed are on their way out
                    Err(Errno::BUSY) if began.elapsed() < ENDS => std::thread::sleep(Duration::from_millis(1)),
                    Err(e) if e != Errno::NOENT => {
                        tracing::error!("the cgroup {path} was made and cannot be removed: {e}");
                        break;
                    }
                    _ => break,
                }
            }
        }
        // a hierarchy that came with its groups goes with its mount, if the kernel is done with the groups by then
        if self.made.iter().any(|(n, _)| self.controllers.get(*n).is_none_or(|c| c.names[0].starts_with("name="))) {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn is_first(property: &Property, v2: bool) -> bool {
    // v2's settings are there only when the group above has handed its controllers down
    FIRST.contains(&property.name.as_str()) && (!v2 || property.name == "cgroup.type")
}

/// Owner and mode of a file or folder.
fn give(file: impl AsFd, perms: &CgroupPerms) -> Result<()> {
    let (uid, gid) = (Uid::from_raw_unchecked(perms.uid), Gid::from_raw_unchecked(perms.gid));
    rustix::fs::fchown(&file, Some(uid), Some(gid)).call("fchown")?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(perms.mode & 0o7777)).call("fchmod")
}
