//! Which properties of a group are carried: the files in its folder, by controller.
//!
//! There is a list of them, which `--cgroup-props` and `--cgroup-props-file` add to or replace, in CRIU's notation:
//!
//! ```text
//! "cpu":
//!  - "strategy": "replace"
//!  - "properties": ["cpu.shares", "cpu.cfs_period_us"]
//! ```
//!
//! Order counts: a limit that another one must not exceed comes before it.
//!
//! Man page: criu(8). Kernel: Documentation/admin-guide/cgroup-v1/, cgroup-v2.rst.

use crate::error::{Error, Result};

/// What every group of a v1 hierarchy has.
pub const GLOBAL: &[&str] = &["cgroup.clone_children", "notify_on_release", "cgroup.procs", "tasks"];
/// What every group of the v2 hierarchy has.
pub const GLOBAL_V2: &[&str] =
    &["cgroup.subtree_control", "cgroup.max.descendants", "cgroup.max.depth", "cgroup.freeze", "cgroup.type"];
/// Settings of v2's controllers, which CRIU does not know: the ones that a single write sets again as a read shows them.
pub const CONTROLLERS_V2: &[&str] = &[
    "cpu.weight",
    "cpu.max",
    "cpuset.cpus",
    "cpuset.mems",
    "memory.min",
    "memory.low",
    "memory.high",
    "memory.max",
    "memory.swap.max",
    "memory.oom.group",
    "pids.max",
    "io.weight",
];

#[rustfmt::skip]
const KNOWN: &[(&str, &[&str])] = &[
    ("cpu", &["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.rt_period_us", "cpu.rt_runtime_us"]),
    ("memory", &[
        "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness", "memory.soft_limit_in_bytes",
        "memory.move_charge_at_immigrate", "memory.oom_control", "memory.use_hierarchy", "memory.kmem.limit_in_bytes",
        "memory.kmem.tcp.limit_in_bytes",
    ]),
    ("cpuset", &[
        "cpuset.cpus", "cpuset.mems", "cpuset.memory_migrate", "cpuset.cpu_exclusive", "cpuset.mem_exclusive",
        "cpuset.mem_hardwall", "cpuset.memory_spread_page", "cpuset.memory_spread_slab", "cpuset.sched_load_balance",
        "cpuset.sched_relax_domain_level",
    ]),
    ("blkio", &["blkio.weight"]),
    ("net_cls", &["net_cls.classid"]),
    ("net_prio", &["net_prio.ifpriomap"]),
    ("pids", &["pids.max"]),
    ("devices", &["devices.list"]),
];

/// Properties by controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Props {
    lists: Vec<(String, Vec<String>)>,
}

impl Default for Props {
    fn default() -> Props {
        let owned = |list: &[&str]| list.iter().map(|&p| p.to_owned()).collect();
        Props { lists: KNOWN.iter().map(|&(name, list)| (name.to_owned(), owned(list))).collect() }
    }
}

impl Props {
    /// Those of a controller.
    pub fn of(&self, controller: &str) -> &[String] {
        self.lists.iter().find(|(name, _)| name == controller).map_or(&[], |(_, list)| list)
    }

    /// Adds to the lists, or replaces them, what a text says. An error says what was expected.
    pub fn change(&mut self, text: &str) -> Result<()> {
        let mut text = Text(text);
        while !text.0.is_empty() {
            self.controller(&mut text).map_err(|what| Error::Usage { what: format!("cgroup properties: {what}") })?;
        }
        Ok(())
    }

    fn controller(&mut self, text: &mut Text<'_>) -> std::result::Result<(), String> {
        let name = text.quoted().ok_or("Expecting controller name")?.to_owned();
        let sequence = |sign: &str| format!("Expected '{sign}' sequence in controller's {name} stream");
        let keyword = |word: &str| format!("Expected '{word}' keyword in controller's {name} stream");
        text.skip_spaces();
        text.eat(":\n - ").ok_or_else(|| sequence(":\\n - "))?;
        text.skip_spaces();
        text.eat("\"strategy\":").ok_or_else(|| keyword("strategy:"))?;
        text.skip_spaces();
        let merges = match text.quoted() {
            Some("merge") => true,
            Some("replace") => false,
            Some(other) => return Err(format!("Unknown strategy \"{other}\" in controller's {name} stream")),
            None => return Err(format!("Expected strategy in controller's {name} stream")),
        };
        text.skip_spaces();
        text.eat("\n - ").ok_or_else(|| sequence("\\n - "))?;
        text.skip_spaces();
        text.eat("\"properties\":").ok_or_else(|| keyword("properties:"))?;
        text.skip_spaces();
        text.eat("[").ok_or_else(|| sequence("["))?;
        let mut list = Vec::new();
        loop {
            text.skip_spaces();
            let Some(property) = text.quoted() else { break };
            list.push(property.to_owned());
            text.skip_spaces();
            if text.eat(",").is_none() {
                break;
            }
        }
        text.skip_spaces();
        text.eat("]").ok_or_else(|| format!("Expected ']' in controller's {name} stream"))?;
        text.skip_spaces();
        if text.eat("\n").is_none() && !text.0.is_empty() {
            return Err(format!("Expected '\\n' symbol in controller's {name} stream"));
        }
        match self.lists.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) if merges => known.extend(list),
            Some((_, known)) => *known = list,
            None => self.lists.push((name, list)),
        }
        Ok(())
    }
}

/// What is left of a text.
struct Text<'t>(&'t str);

impl<'t> Text<'t> {
    fn skip_spaces(&mut self) {
        self.0 = self.0.trim_start_matches(' ');
    }

    fn eat(&mut self, sign: &str) -> Option<()> {
        self.0 = self.0.strip_prefix(sign)?;
        Some(())
    }

    /// What stands in quotes, if that is something.
    fn quoted(&mut self) -> Option<&'t str> {
        let (word, rest) = self.0.strip_prefix('"')?.split_once('"')?;
        if word.is_empty() {
            return None;
        }
        self.0 = rest;
        Some(word)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn lists_are_changed() {
        let mut props = Props::default();
        assert_eq!(props.of("pids"), ["pids.max"]);
        assert!(props.of("freezer").is_empty());
        let text = "\"pids\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"pids.x\",  \"pids.y\" ]\n\
                    \"cpu\":\n - \"strategy\": \"replace\"\n - \"properties\": []\n\
                    \"new\":\n  -";
        let cut = text.find("\"new\"").unwrap();
        props.change(&text[..cut]).unwrap();
        assert_eq!(props.of("pids"), ["pids.max", "pids.x", "pids.y"]);
        assert!(props.of("cpu").is_empty());
        assert!(props.change(&text[cut..]).is_err());
        props.change("\"new\":\n - \"strategy\": \"merge\"\n - \"properties\": [ \"a\" ]").unwrap();
        assert_eq!(props.of("new"), ["a"]);
    }

    #[test]
    fn errors_say_what_was_expected() {
        for (text, word) in [
            ("cpu", "controller name"),
            ("\"\":", "controller name"),
            ("\"cpu\" - ", "':\\n - '"),
            ("\"cpu\":\n - \"x\"", "strategy"),
            ("\"cpu\":\n - \"strategy\": \"append\"", "append"),
            ("\"cpu\":\n - \"strategy\": \"merge\"", "'\\n - '"),
            ("\"cpu\":\n - \"strategy\": \"merge\"\n - \"properties\": \"a\"", "'['"),
            ("\"cpu\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"a\"", "']'"),
            ("\"cpu\":\n - \"strategy\": \"merge\"\n - \"properties\": [\"a\"] x", "symbol"),
        ] {
            let error = Props::default().change(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
