//! What a dump notes of cgroups.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;
use standstill_images::proto::{
    CgControllerEntry, CgMemberEntry, CgSetEntry, CgroupDirEntry, CgroupEntry, CgroupPerms, CgroupPropEntry,
};
use standstill_images::{ImageKind, Images};

use super::props::{Props, CONTROLLERS_V2, GLOBAL, GLOBAL_V2};
use super::{is_of, open_yard};
use crate::error::{At, Call, Error, Place, Result};
use crate::options::{CgroupMode, Options, Persona};
use crate::proc;
use crate::{namespaces, sys};

/// Where a thread is in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Member {
    name: String,
    path: String,
    /// How much of the path is the root of the tree's cgroup namespace.
    prefix: usize,
}

/// A hierarchy.
#[derive(Debug)]
struct Controller {
    names: Vec<String>,
    heads: Vec<Group>,
    threaded: bool,
}

/// A group, and those in it.
#[derive(Debug)]
struct Group {
    path: String,
    perms: CgroupPerms,
    properties: Vec<CgroupPropEntry>,
    groups: Vec<Group>,
}

/// Sets and groups, as far as they are known.
#[derive(Debug)]
pub struct Dumped<'o> {
    opts: &'o Options,
    props: Props,
    /// Each is a combination of groups that some thread is in; the first is ours. Ids count from 1.
    sets: Vec<Vec<Member>>,
    /// Is our own set one of the tree's, too?
    shared: bool,
    controllers: Vec<Controller>,
    /// Texts that were read, and the sets that they are.
    known: HashMap<Vec<u8>, u32>,
    /// The tree's cgroup namespace, by hierarchy.
    prefixes: Vec<(String, usize)>,
    /// What a freezer cgroup was before the dump.
    pub freezer_state: Option<&'static str>,
    /// The tree has a cgroup namespace of its own.
    pub own_namespace: bool,
}

impl<'o> Dumped<'o> {
    /// Learns which hierarchies there are, and where we are in them.
    pub fn new(opts: &'o Options) -> Result<Dumped<'o>> {
        let mut props = Props::default();
        if let Some(text) = &opts.cgroup_props {
            props.change(text)?;
        }
        if let Some(path) = &opts.cgroup_props_file {
            let path = &opts.in_work_dir(path);
            let text = std::fs::read_to_string(path).call("read").at(Place::Path(path.clone()))?;
            props.change(&text).at(Place::Path(path.clone()))?;
        }
        let mut dumped = Dumped {
            opts,
            props,
            sets: Vec::new(),
            shared: false,
            controllers: Vec::new(),
            known: HashMap::new(),
            prefixes: Vec::new(),
            freezer_state: None,
            own_namespace: false,
        };
        let text = own_text()?;
        for member in proc::cgroup::parse(&text)? {
            let name = dumped.name(&member)?;
            let names: Vec<String> = name.split(',').filter(|n| !n.starts_with("name=")).map(str::to_owned).collect();
            if !names.is_empty() && dumped.carries(&name) {
                dumped.controllers.push(Controller { names, heads: Vec::new(), threaded: false });
            }
        }
        let own = dumped.members(&text)?;
        dumped.sets.push(own);
        Ok(dumped)
    }

    fn name(&self, member: &proc::cgroup::Membership) -> Result<String> {
        utf8(member.controllers.join(&b','))
    }

    /// May this hierarchy be carried (`--cgroup-dump-controller`)?
    fn carries(&self, name: &str) -> bool {
        let only = &self.opts.cgroup_dump_controllers;
        only.is_empty() || only.iter().any(|n| n == name)
    }

    /// The groups that a text of /proc names, in the order of images.
    fn members(&self, text: &[u8]) -> Result<Vec<Member>> {
        let mut members = Vec::new();
        for member in proc::cgroup::parse(text)? {
            let name = self.name(&member)?;
            if self.carries(&name) {
                members.push(Member { name, path: utf8(member.path)?, prefix: 0 });
            }
        }
        members.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(members)
    }

    /// The set of a thread. The first one that is asked for is the root of the tree.
    pub fn thread(&mut self, pid: i32, tid: i32) -> Result<u32> {
        if self.opts.unprivileged {
            return Ok(1);
        }
        let mut text = Vec::new();
        let path = format!("/proc/{pid}/task/{tid}/cgroup");
        proc::read_proc(path.as_ref(), &mut text).call("read(/proc/PID/task/TID/cgroup)")?;
        if let Some(&id) = self.known.get(&text) {
            return Ok(id);
        }
        let mut members = self.members(&text)?;
        self.see_own_beside(&members)?;
        if self.known.is_empty() {
            self.prefixes = self.namespace(pid, &path, &members)?;
        }
        for member in &mut members {
            let prefix = self.prefixes.iter().find(|(name, _)| *name == member.name).map_or(0, |(_, prefix)| *prefix);
            if member.path.len() < prefix {
                let what = format!("the cgroup {} outside of its cgroup namespace", member.path);
                return Err(Error::refused(what, "move its processes into the namespace's own groups"));
            }
            member.prefix = prefix;
        }
        let id = match self.sets.iter().position(|set| *set == members) {
            Some(n) => {
                self.shared |= n == 0;
                n
            }
            None => {
                members.iter().try_for_each(|member| self.collect(member).at(Place::Path((&member.path).into())))?;
                self.sets.push(members);
                self.sets.len() - 1
            }
        };
        let id = u32::try_from(id).unwrap_or(u32::MAX) + 1;
        self.known.insert(text, id);
        Ok(id)
    }

    /// Whoever mounts a hierarchy puts everybody into it, us too: if there are others than when we looked, we look again.
    fn see_own_beside(&mut self, members: &[Member]) -> Result<()> {
        let same = |own: &Vec<Member>| own.iter().map(|m| &m.name).eq(members.iter().map(|m| &m.name));
        if !self.sets.first().is_some_and(same) {
            let own = self.members(&own_text()?)?;
            if let Some(first) = self.sets.first_mut().filter(|_| same(&own)) {
                *first = own;
            }
        }
        Ok(())
    }

    /// How much of each path is the root of the cgroup namespace of a process.
    fn namespace(&self, pid: i32, path: &str, outside: &[Member]) -> Result<Vec<(String, usize)>> {
        if !self.own_namespace {
            return Ok(Vec::new());
        }
        let text = namespaces::inside(pid, namespaces::Kind::Cgroup, || {
            let mut text = Vec::new();
            proc::read_proc(path.as_ref(), &mut text).call("read(/proc/PID/task/TID/cgroup)")?;
            Ok(text)
        })?;
        let mut prefixes = Vec::new();
        for inside in self.members(&text)? {
            let Some(out) = outside.iter().find(|m| m.name == inside.name) else { continue };
            if out.path == inside.path {
                continue;
            }
            let Some(prefix) = out.path.strip_suffix(inside.path.trim_start_matches('/')) else {
                let what = format!("invalid cgroup configuration, {} is not a suffix of {}", inside.path, out.path);
                return Err(Error::Usage { what });
            };
            prefixes.push((inside.name, prefix.trim_end_matches('/').len()));
        }
        Ok(prefixes)
    }

    /// Notes the groups of one hierarchy that belong to the tree.
    fn collect(&mut self, member: &Member) -> Result<()> {
        let at = match self.controllers.iter().position(|c| is_of(&c.names, &member.name)) {
            Some(at) => at,
            None if member.name.starts_with("name=") => {
                let names = vec![member.name.clone()];
                self.controllers.push(Controller { names, heads: Vec::new(), threaded: false });
                self.controllers.len() - 1
            }
            None => return Err(Error::Usage { what: format!("controller {} not found", member.name) }),
        };
        if self.opts.manage_cgroups == CgroupMode::Ignore {
            return Ok(());
        }
        let root = self.root(&member.name);
        if member.path.split('/').any(|part| part == "..") && root.is_none() {
            return Err(Error::refused(
                "a cgroup outside of the cgroup namespace that the dump runs in",
                "run it outside of that namespace, or with --manage-cgroups=ignore",
            ));
        }
        let files = match &self.opts.cgroup_yard {
            Some(yard) => open_yard(&self.opts.in_work_dir(yard), std::slice::from_ref(&member.name))?,
            None => sys::cgroupfs::mount(member.name.split(','))?,
        };
        let start = root.unwrap_or(&member.path).trim_matches('/').to_owned();
        // all that is below the root of a hierarchy belongs to anyone
        let deep = !start.is_empty() || root.is_some();
        let path = if start.is_empty() { String::new() } else { format!("/{start}") };
        let folder = open_folder(files.as_fd(), &start).call("open").at(Place::Path(format!("/{start}").into()))?;
        let controller = &mut self.controllers[at];
        walk(&self.props, self.opts, &folder, &path, deep, controller)?;
        if member.name.split(',').any(|n| n == "freezer") {
            if let (Some(state), Some(head)) = (self.freezer_state, controller.heads.first_mut()) {
                let perms = CgroupPerms { mode: u32::from(libc::S_IFREG as u16) | 0o644, uid: 0, gid: 0 };
                if !head.properties.iter().any(|p| p.name == b"freezer.state") {
                    head.properties.push(property("freezer.state", state.to_owned(), perms));
                }
            }
        }
        Ok(())
    }

    /// Where the walk of a hierarchy begins, if that was said.
    fn root(&self, name: &str) -> Option<&'o str> {
        let roots = &self.opts.cgroup_roots;
        let own = roots.iter().find(|r| r.controller.as_deref() == Some(name));
        own.or_else(|| roots.iter().rev().find(|r| r.controller.is_none())).map(|r| r.path.as_str())
    }

    /// Writes `cgroup.img`, unless all of the tree is where we are.
    pub fn finish(&self, images: &Images) -> Result<()> {
        if self.sets.len() == 1 {
            tracing::info!("All tasks in criu's cgroups. Nothing to dump.");
            return Ok(());
        }
        let own = usize::from(!self.shared);
        let sets = self.sets.iter().enumerate().skip(own).map(|(n, set)| CgSetEntry {
            id: u32::try_from(n).unwrap_or(u32::MAX) + 1,
            ctls: set.iter().map(Member::entry).collect(),
        });
        let entry =
            CgroupEntry { sets: sets.collect(), controllers: self.controllers.iter().map(Controller::entry).collect() };
        Ok(images.write_one(ImageKind::Cgroup, (), &entry)?)
    }
}

impl Member {
    fn entry(&self) -> CgMemberEntry {
        CgMemberEntry {
            name: self.name.clone().into_bytes(),
            path: self.path.clone().into_bytes(),
            cgns_prefix: u32::try_from(self.prefix).ok().filter(|&p| p > 0),
        }
    }
}

impl Controller {
    fn entry(&self) -> CgControllerEntry {
        CgControllerEntry {
            cnames: self.names.iter().map(|n| n.clone().into_bytes()).collect(),
            dirs: self.heads.iter().map(|g| g.entry("")).collect(),
            is_threaded: Some(self.threaded),
        }
    }
}

impl Group {
    fn entry(&self, parent: &str) -> CgroupDirEntry {
        CgroupDirEntry {
            dir_name: self.path[parent.len()..].trim_start_matches('/').into(),
            children: self.groups.iter().map(|g| g.entry(&self.path)).collect(),
            properties: self.properties.clone(),
            dir_perms: Some(self.perms),
        }
    }
}

/// Where this thread is.
fn own_text() -> Result<Vec<u8>> {
    let mut text = Vec::new();
    proc::read_proc("/proc/thread-self/cgroup".as_ref(), &mut text).call("read(/proc/self/cgroup)")?;
    Ok(text)
}

fn utf8(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        let what = format!("the cgroup \"{}\"", String::from_utf8_lossy(e.as_bytes()));
        Error::refused(what, "images hold names in UTF-8 only: rename it")
    })
}

fn open_folder(at: BorrowedFd<'_>, path: &str) -> std::result::Result<OwnedFd, Errno> {
    let path = if path.is_empty() { "." } else { path };
    rustix::fs::openat(at, path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

fn perms(stat: &rustix::fs::Stat) -> CgroupPerms {
    CgroupPerms { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid }
}

fn property(name: &str, value: String, perms: CgroupPerms) -> CgroupPropEntry {
    CgroupPropEntry { name: name.into(), value: value.into_bytes(), perms: Some(perms) }
}

/// Gone since its name was read: somebody else's, then.
fn is_gone(e: &Error) -> bool {
    [libc::ENOENT, libc::ENODEV].contains(&e.errno())
}

/// Notes a group and, if `deep`, those in it, unless they are known.
fn walk(
    props: &Props,
    opts: &Options,
    folder: &OwnedFd,
    path: &str,
    deep: bool,
    controller: &mut Controller,
) -> Result<()> {
    let stat = rustix::fs::fstat(folder).call("fstat")?;
    if !is_known(&controller.heads, path) {
        let properties = properties(props, opts, folder, &controller.names).at(Place::Path(path.into()));
        let properties = match properties {
            Err(e) if is_gone(&e) => return Ok(()),
            other => other?,
        };
        controller.threaded |=
            properties.iter().any(|p| p.name == b"tasks" || (p.name == b"cgroup.type" && p.value == b"threaded"));
        let group = Group { path: path.to_owned(), perms: perms(&stat), properties, groups: Vec::new() };
        siblings(&mut controller.heads, path).push(group);
    }
    if !deep {
        return Ok(());
    }
    let mut names = Vec::new();
    for entry in Dir::read_from(folder).call("getdents")? {
        let entry = entry.call("getdents")?;
        let name = entry.file_name().to_bytes();
        if entry.file_type().is_dir() && name != b"." && name != b".." {
            names.push(utf8(name.to_vec())?);
        }
    }
    names.sort_unstable();
    for name in names {
        match open_folder(folder.as_fd(), &name) {
            Ok(inner) => walk(props, opts, &inner, &format!("{path}/{name}"), true, controller)?,
            Err(Errno::NOENT) => {}
            Err(e) => return Err(e).call("open").at(Place::Path(format!("{path}/{name}").into())),
        }
    }
    Ok(())
}

fn contains(group: &Group, path: &str) -> bool {
    path.strip_prefix(group.path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn is_known(groups: &[Group], path: &str) -> bool {
    groups.iter().find(|g| contains(g, path)).is_some_and(|g| g.path == path || is_known(&g.groups, path))
}

/// The groups that a new one is put beside.
fn siblings<'g>(groups: &'g mut Vec<Group>, path: &str) -> &'g mut Vec<Group> {
    match groups.iter().position(|g| contains(g, path)) {
        Some(n) => siblings(&mut groups[n].groups, path),
        None => groups,
    }
}

/// The properties of a group that are there on this kernel.
fn properties(props: &Props, opts: &Options, folder: &OwnedFd, names: &[String]) -> Result<Vec<CgroupPropEntry>> {
    let v2 = names.iter().all(String::is_empty);
    let mut wanted: Vec<&str> = names.iter().flat_map(|n| props.of(n)).map(String::as_str).collect();
    wanted.extend_from_slice(if v2 { GLOBAL_V2 } else { GLOBAL });
    if v2 && opts.personality == Persona::Standstill {
        wanted.extend_from_slice(CONTROLLERS_V2);
    }
    let mut found = Vec::new();
    for name in wanted {
        let file = match rustix::fs::openat(folder, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Err(Errno::NOENT) => {
                tracing::debug!("Couldn't open {name}. This cgroup property may not exist on this kernel");
                continue;
            }
            // a file for writing only, which a list asked for by name
            other => other.call("open").at(Place::Path(name.into()))?,
        };
        let perms = perms(&rustix::fs::fstat(&file).call("fstat")?);
        // of these, only their permissions matter
        let mut value = String::new();
        if !["cgroup.procs", "tasks"].contains(&name) {
            let mut text = Vec::new();
            proc::read_all(file, &mut text).call("read").at(Place::Path(name.into()))?;
            value = as_written(name, &String::from_utf8_lossy(&text));
        }
        found.push(property(name, value, perms));
    }
    Ok(found)
}

/// A value as it is written, from what is read.
fn as_written(name: &str, text: &str) -> String {
    let text = text.strip_suffix('\n').unwrap_or(text);
    if name == "memory.oom_control" {
        let disabled = text.lines().find_map(|l| l.strip_prefix("oom_kill_disable "));
        return disabled.unwrap_or("0").trim().to_owned();
    }
    // no limit reads as a number that cannot be written
    if text.split(' ').next().and_then(|word| word.parse::<i64>().ok()) == Some(i64::MAX) {
        return "-1".to_owned();
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(path: &str) -> Group {
        Group {
            path: path.into(),
            perms: CgroupPerms { mode: 0o40755, uid: 0, gid: 0 },
            properties: Vec::new(),
            groups: Vec::new(),
        }
    }

    #[test]
    fn groups_are_put_below_their_parents() {
        let mut heads = Vec::new();
        for path in ["/a/b", "/a/b/c", "/ab", "/a", "/a/b/c/d"] {
            assert!(!is_known(&heads, path));
            siblings(&mut heads, path).push(group(path));
            assert!(is_known(&heads, path));
        }
        let names: Vec<Vec<u8>> = heads.iter().map(|g| g.entry("").dir_name).collect();
        assert_eq!(names, [&b"a/b"[..], b"ab", b"a"]);
        let entry = heads[0].entry("");
        assert_eq!(entry.children[0].dir_name, b"c");
        assert_eq!(entry.children[0].children[0].dir_name, b"d");
        let mut all = vec![group("")];
        siblings(&mut all, "/a").push(group("/a"));
        assert_eq!(all[0].entry("").children[0].dir_name, b"a");
    }

    #[test]
    fn values_can_be_written_again() {
        assert_eq!(as_written("memory.oom_control", "oom_kill_disable 1\nunder_oom 0\n"), "1");
        assert_eq!(as_written("memory.limit_in_bytes", "9223372036854775807\n"), "-1");
        assert_eq!(as_written("memory.limit_in_bytes", "9223372036854771712\n"), "9223372036854771712");
        assert_eq!(as_written("devices.list", "c 1:3 rwm\nc 1:5 rwm\n"), "c 1:3 rwm\nc 1:5 rwm");
    }
}
