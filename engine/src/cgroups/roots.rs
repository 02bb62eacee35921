//! `--cgroup-root [CONTROLLER:]PATH` at restore: groups are somewhere else than they were.
//!
//! The head of what was dumped of a hierarchy becomes PATH. With a cgroup namespace it is the namespace's root that becomes
//! PATH, and what lies below keeps its place there.

use super::image::{Controller, Image};
use super::is_of;
use crate::error::{Error, Result};
use crate::options::CgroupRoot;

/// Rewrites paths in an image.
pub fn rewrite(image: &mut Image, roots: &[CgroupRoot]) -> Result<()> {
    let mut controllers = std::mem::take(&mut image.controllers);
    let done = controllers.iter_mut().try_for_each(|controller| {
        let Some(root) = root_of(controller, roots)? else { return Ok(()) };
        for n in 0..controller.groups.len() {
            if let Some(name) = head(image, controller, n, root) {
                controller.groups[n].name = name;
            }
        }
        Ok(())
    });
    image.controllers = controllers;
    done
}

/// The new root of a hierarchy.
fn root_of<'r>(controller: &Controller, roots: &'r [CgroupRoot]) -> Result<Option<&'r str>> {
    let mut root: Option<&str> = None;
    for new in roots {
        let Some(name) = &new.controller else { continue };
        if !controller.names.iter().any(|c| name.split(',').any(|n| n == c)) {
            continue;
        }
        match root {
            Some(other) if other != new.path => {
                return Err(Error::Usage { what: format!("CG paths mismatch: {other} {}", new.path) })
            }
            _ => root = Some(&new.path),
        }
    }
    let general = || roots.iter().rev().find(|r| r.controller.is_none()).map(|r| r.path.as_str());
    Ok(root.or_else(general))
}

/// Moves the members of one head to the new root; the head's new name, if there were some.
fn head(image: &mut Image, controller: &Controller, n: usize, root: &str) -> Option<String> {
    let name = controller.groups[n].name.trim_matches('/').to_owned();
    let mut new = None;
    for member in image.sets.iter_mut().flat_map(|set| &mut set.members) {
        if !is_of(&controller.names, &member.name) {
            continue;
        }
        let Some(below) = below(&member.path, &name) else { continue };
        match member.prefix {
            0 => {
                member.path = join(root, below);
                new.get_or_insert_with(|| root.to_owned());
            }
            prefix => {
                let inside = member.path.get(prefix..).unwrap_or("");
                // the head is in the namespace, or is what the namespace is in
                let head = format!("/{name}").get(prefix..).unwrap_or("").to_owned();
                member.path = join(root, inside);
                new.get_or_insert_with(|| join(root, &head));
                member.prefix = root.trim_end_matches('/').len();
            }
        }
    }
    new
}

/// What of a path lies below a head (`a/b`), if it does.
fn below<'p>(path: &'p str, head: &str) -> Option<&'p str> {
    let rest = path.strip_prefix('/')?.strip_prefix(head)?;
    (head.is_empty() || rest.is_empty() || rest.starts_with('/')).then_some(rest)
}

fn join(root: &str, rest: &str) -> String {
    let (root, rest) = (root.trim_end_matches('/'), rest.trim_start_matches('/'));
    if rest.is_empty() && !root.is_empty() {
        root.to_owned()
    } else {
        format!("{root}/{rest}")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cgroups::image::{Group, Member, Set};

    fn image(path: &str, prefix: usize, head: &str) -> Image {
        let member = Member { name: "cpu,cpuacct".into(), path: path.into(), prefix };
        let head = Group { name: head.into(), perms: None, properties: Vec::new(), groups: Vec::new() };
        Image {
            sets: vec![Set { id: 2, members: vec![member] }],
            controllers: vec![Controller {
                names: vec!["cpu".into(), "cpuacct".into()],
                groups: vec![head],
                threaded: true,
            }],
        }
    }

    fn moved(path: &str, prefix: usize, head: &str, root: &str) -> (String, usize, String) {
        let mut image = image(path, prefix, head);
        rewrite(&mut image, &[CgroupRoot::parse(root)]).unwrap();
        let member = &image.sets[0].members[0];
        (member.path.clone(), member.prefix, image.controllers[0].groups[0].name.clone())
    }

    #[test]
    fn heads_move() {
        let is = |path: &str, head: &str| (path.to_owned(), 0, head.to_owned());
        assert_eq!(moved("/prefix/old", 0, "prefix/old", "/new"), is("/new", "/new"));
        assert_eq!(moved("/prefix/old", 0, "prefix", "cpu:/prefix"), is("/prefix/old", "/prefix"));
        assert_eq!(moved("/prefix/old", 0, "prefix", "memory:/x"), is("/prefix/old", "prefix"));
        assert_eq!(moved("/prefixed", 0, "prefix", "/x"), is("/prefixed", "prefix"));
        assert_eq!(moved("/", 0, "", "/new"), is("/new", "/new"));
        assert_eq!(moved("/a", 0, "", "/new"), is("/new/a", "/new"));
        assert_eq!(moved("/a/b", 0, "a", "/"), is("/b", "/"));
    }

    #[test]
    fn namespaces_move_with_their_roots() {
        assert_eq!(moved("/ct/a", 3, "ct", "/new/ct"), ("/new/ct/a".into(), 7, "/new/ct".into()));
        assert_eq!(moved("/ct/a", 3, "ct/a", "/n"), ("/n/a".into(), 2, "/n/a".into()));
    }

    #[test]
    fn roots_must_agree() {
        let roots = ["cpu:/a", "cpuacct:/b"].map(CgroupRoot::parse);
        assert!(rewrite(&mut image("/", 0, ""), &roots).unwrap_err().to_string().contains("mismatch"));
        let roots = ["cpu:/a", "cpuacct:/a", "/c"].map(CgroupRoot::parse);
        let mut image = image("/", 0, "");
        rewrite(&mut image, &roots).unwrap();
        assert_eq!(image.sets[0].members[0].path, "/a");
    }
}
