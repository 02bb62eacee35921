//! `cgroup.img` as it is read: its names are text, and lead nowhere else.

use std::collections::HashSet;

use standstill_images::proto::{CgControllerEntry, CgroupDirEntry, CgroupEntry, CgroupPerms};

use super::is_of;
use crate::error::{Error, Result};

const IMAGE: &str = "cgroup.img";

/// A combination of groups that some thread is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Set {
    /// What core entries call it.
    pub id: u32,
    /// One group a hierarchy.
    pub members: Vec<Member>,
}

/// A group that threads are in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// The hierarchy, as /proc/PID/cgroup names it.
    pub name: String,
    /// The group.
    pub path: String,
    /// How much of the path is the root of the cgroup namespace.
    pub prefix: usize,
}

/// A hierarchy.
#[derive(Debug, Clone, PartialEq)]
pub struct Controller {
    /// Its controllers.
    pub names: Vec<String>,
    /// Groups that belong to the tree.
    pub groups: Vec<Group>,
    /// Threads of a process may be in different groups.
    pub threaded: bool,
}

/// A group, and those in it.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Below the group that it is in.
    pub name: String,
    /// Owner and mode.
    pub perms: Option<CgroupPerms>,
    /// Settings.
    pub properties: Vec<Property>,
    /// Groups in it.
    pub groups: Vec<Group>,
}

/// A setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Property {
    /// Its file.
    pub name: String,
    /// What is written to it.
    pub value: String,
    /// Owner and mode of the file.
    pub perms: Option<CgroupPerms>,
}

/// All that the image says.
#[derive(Debug, Clone, PartialEq)]
pub struct Image {
    /// Sets.
    pub sets: Vec<Set>,
    /// Hierarchies.
    pub controllers: Vec<Controller>,
}

fn lie(what: String) -> Error {
    Error::lie(IMAGE, what)
}

fn text(bytes: Vec<u8>) -> Result<String> {
    match String::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => Ok(text),
        Ok(text) => Err(lie(format!("the name {text:?}"))),
        Err(e) => Err(lie(format!("the name {:?}", String::from_utf8_lossy(e.as_bytes())))),
    }
}

/// A path without slashes at its ends that leads nowhere else.
pub fn clean(path: &str) -> Result<String> {
    let path = path.trim_matches('/');
    if path.split('/').any(|part| part == "..") {
        return Err(lie(format!("the path {path:?}")));
    }
    Ok(path.to_owned())
}

impl Image {
    /// Checks an image: names that lead elsewhere, ids that are there twice, prefixes of nothing.
    pub fn read(entry: CgroupEntry) -> Result<Image> {
        let controllers = entry.controllers.into_iter().map(controller).collect::<Result<Vec<_>>>()?;
        let mut sets: Vec<Set> = Vec::new();
        let mut ids = HashSet::new();
        for set in entry.sets {
            if set.id == 0 || !ids.insert(set.id) {
                return Err(lie(format!("set {} is there twice, or no set", set.id)));
            }
            let mut members = Vec::new();
            for member in set.ctls {
                let (name, path) = (text(member.name)?, text(member.path)?);
                if !controllers.iter().any(|c| is_of(&c.names, &name)) {
                    return Err(lie(format!("No cg_controller_entry found for {name}/{path}")));
                }
                clean(&path)?;
                let prefix = member.cgns_prefix.unwrap_or(0) as usize;
                let whole = path.get(prefix..).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
                if !path.starts_with('/') || !whole {
                    return Err(lie(format!("the path {path} with a prefix of {prefix}")));
                }
                members.push(Member { name, path, prefix });
            }
            sets.push(Set { id: set.id, members });
        }
        Ok(Image { sets, controllers })
    }
}

fn controller(entry: CgControllerEntry) -> Result<Controller> {
    let names = entry.cnames.into_iter().map(text).collect::<Result<Vec<_>>>()?;
    if names.is_empty() {
        return Err(lie("Each cg_controller_entry must have at least 1 controller".into()));
    }
    if let Some(name) = names.iter().find(|n| n.contains('/') || *n == ".." || *n == ".") {
        return Err(lie(format!("the controller {name:?}")));
    }
    let groups = entry.dirs.into_iter().map(group).collect::<Result<_>>()?;
    Ok(Controller { names, groups, threaded: entry.is_threaded == Some(true) })
}

fn group(entry: CgroupDirEntry) -> Result<Group> {
    let mut properties = Vec::new();
    for property in entry.properties {
        let (name, value) = (text(property.name)?, text(property.value)?);
        if name.is_empty() || name.contains('/') || name.starts_with("..") {
            return Err(lie(format!("the property {name:?}")));
        }
        properties.push(Property { name, value, perms: property.perms });
    }
    Ok(Group {
        name: clean(&text(entry.dir_name)?)?,
        perms: entry.dir_perms,
        properties,
        groups: entry.children.into_iter().map(group).collect::<Result<_>>()?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use standstill_images::proto::{CgMemberEntry, CgSetEntry, CgroupPropEntry};

    use super::*;

    fn image() -> CgroupEntry {
        let member = CgMemberEntry { name: "cpu".into(), path: "/a/b".into(), cgns_prefix: Some(2) };
        let property = CgroupPropEntry { name: "cpu.shares".into(), value: "1".into(), perms: None };
        let child = CgroupDirEntry { dir_name: "b".into(), properties: vec![property], ..Default::default() };
        let head = CgroupDirEntry { dir_name: "a".into(), children: vec![child], ..Default::default() };
        CgroupEntry {
            sets: vec![CgSetEntry { id: 2, ctls: vec![member] }],
            controllers: vec![CgControllerEntry { cnames: vec!["cpu".into()], dirs: vec![head], is_threaded: None }],
        }
    }

    #[test]
    fn lying_images() {
        assert!(Image::read(image()).is_ok());
        let spoil: [fn(&mut CgroupEntry); 14] = [
            |i| i.sets[0].id = 0,
            |i| i.sets.push(i.sets[0].clone()),
            |i| i.sets[0].ctls[0].path = "/a/../../b".into(),
            |i| i.sets[0].ctls[0].path = "a".into(),
            |i| i.sets[0].ctls[0].path = b"/\xff".to_vec(),
            |i| i.sets[0].ctls[0].name = "memory".into(),
            |i| i.sets[0].ctls[0].cgns_prefix = Some(3),
            |i| i.sets[0].ctls[0].cgns_prefix = Some(9),
            |i| i.controllers[0].cnames.clear(),
            |i| i.controllers[0].cnames.push("../x".into()),
            |i| i.controllers[0].dirs[0].dir_name = "..".into(),
            |i| i.controllers[0].dirs[0].dir_name = "a\0".into(),
            |i| i.controllers[0].dirs[0].children[0].dir_name = "b/../..".into(),
            |i| i.controllers[0].dirs[0].children[0].properties[0].name = "../cpu.shares".into(),
        ];
        for (n, spoil) in spoil.iter().enumerate() {
            let mut image = image();
            spoil(&mut image);
            assert!(Image::read(image).is_err(), "{n}");
        }
    }
}
