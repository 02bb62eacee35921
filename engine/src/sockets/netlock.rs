//! Keeping packets away from connections while nobody is there who could answer them.
//!
//! A connection is locked before it is put into repair mode: what came in after its queue was read would be acknowledged
//! by the kernel and be in no image. It stays locked when the dump ends its tasks, until a restore has made it again:
//! without its socket, the host would answer a packet with a reset. It does not stay locked when the tasks go on, when the
//! dump fails, or when the engine is killed (the guard sees to that); and when a restore fails behind the point where it
//! lifted the lock, or is killed there, the lock is back.
//!
//! Locks are such that CRIU lifts ours and we lift CRIU's: a table of nftables, named by the run of the dump
//! (`dump_criu_run_id` of the inventory, cut), or two rules of iptables for each connection. Packets with CRIU's mark pass.
//! The inventory has the method (`network_lock_method`: 0 iptables, 1 nftables, 2 none), which counts at restore.
//!
//! A network namespace of the tree's own is locked as a whole, as CRIU does it: all who are in it are strangers to each other
//! while the tree is away. In one that a restore makes, there are no packets to be kept away before its links come up.
//!
//! nftables is spoken by netlink ([`crate::sys::nftables`]); for iptables its own programs are run, since there is more than
//! one thing by that name in the kernel.
//!
//! Man pages: nft(8), iptables(8), iptables-restore(8).

use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use standstill_images::proto::InventoryEntry;

use crate::error::{Call, Error, Result};
use crate::guard::{Act, Guard, List};
use crate::network::inside;
use crate::options::NetworkLock;
use crate::sys::nftables::{self, Nftables, MARK};
use crate::sys::spawn;

/// The longest name that a table has.
const NAME: usize = 26;

/// The two ends of a connection: ours, and the peer.
pub type Ends = (SocketAddr, SocketAddr);

/// What a dump has locked; it is open again when this is dropped.
#[derive(Debug)]
pub struct Lock {
    method: NetworkLock,
    table: String,
    way: Option<Way>,
    /// The tree's own network namespace, which is locked as a whole.
    namespace: Option<OwnedFd>,
}

#[derive(Debug)]
enum Way {
    Table(Nftables),
    /// Connections that have rules, and a script for the guard, which takes them away.
    Rules(Vec<Ends>, Option<File>),
    /// Rules for all packets of the namespace.
    RulesForAll,
}

fn table_of(run: &str) -> String {
    let name = format!("CRIU-{run}");
    name.get(..NAME).map(str::to_owned).unwrap_or(name)
}

/// The number that an inventory has for a method.
pub fn number(method: NetworkLock) -> u32 {
    match method {
        NetworkLock::Iptables => 0,
        NetworkLock::Nftables => 1,
        NetworkLock::Skip => 2,
    }
}

impl Lock {
    /// Nothing is locked yet. `run` is the name of this dump.
    pub fn new(method: NetworkLock, run: &str) -> Lock {
        Lock { method, table: table_of(run), way: None, namespace: None }
    }

    /// What is locked is the tree's own network namespace, as a whole.
    pub fn set_namespace(&mut self, namespace: OwnedFd) {
        self.namespace = Some(namespace);
    }

    /// Is there something to be locked even without connections?
    pub fn is_of_namespace(&self) -> bool {
        self.namespace.is_some() && self.method != NetworkLock::Skip
    }

    /// How connections are locked: not always as was asked for, and not at all where there are none. A restore then has
    /// nothing to lift: even a table that is not there takes the kernel some ten milliseconds.
    pub fn method(&self) -> NetworkLock {
        match self.way {
            Some(_) => self.method,
            None => NetworkLock::Skip,
        }
    }

    /// Says that connections will be locked, before the guard hears of anything else.
    pub fn prepare(&mut self, guard: &Guard<'_>) -> Result<()> {
        if self.method == NetworkLock::Iptables {
            if let Some(namespace) = &self.namespace {
                let mut script = script(guard, Some(namespace.as_fd()))?;
                let undo: Vec<String> =
                    PROGRAMS.iter().flat_map(|p| UNLOCK_ALL.map(|c| format!("{p} -w {c}\n"))).collect();
                script.write_all(undo.concat().as_bytes()).call("write(memfd)")?;
                self.way = Some(Way::RulesForAll);
                return inside(namespace.as_fd(), lock_all_by_rules);
            }
            self.way = Some(Way::Rules(Vec::new(), Some(script(guard, None)?)));
        }
        if self.method == NetworkLock::Nftables {
            match self.make_table(guard) {
                Ok(nftables) => self.way = Some(Way::Table(nftables)),
                Err(e) if [libc::EOPNOTSUPP, libc::EPROTONOSUPPORT, libc::EAFNOSUPPORT].contains(&e.errno()) => {
                    tracing::warn!("nftables: {e}: connections are locked by iptables instead");
                    self.method = NetworkLock::Iptables;
                    return self.prepare(guard);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Locks a connection.
    pub fn add(&mut self, ends: Ends) -> Result<()> {
        match &mut self.way {
            None | Some(Way::RulesForAll) => Ok(()),
            Some(Way::Table(_)) if self.namespace.is_some() => Ok(()),
            Some(Way::Table(nftables)) => nftables.run(&nftables::add(&self.table, &[ends])),
            Some(Way::Rules(all, script)) => {
                if let Some(script) = script {
                    // before there is something to undo
                    let commands = rules(ends, "-D").map(|rule| format!("{} -w {rule}\n", program(ends)));
                    script.write_all(commands.concat().as_bytes()).call("write(memfd)")?;
                }
                all.push(ends);
                restore_rules(ends, "-I").map_err(|e| Error::Usage {
                    what: format!("Can't lock the connection {} - {} with iptables: {e}", ends.0, ends.1),
                })
            }
        }
    }

    fn make_table(&self, guard: &Guard<'_>) -> Result<Nftables> {
        let nftables = open_in(self.namespace.as_ref().map(AsFd::as_fd))?;
        let held = guard.hold(nftables.socket())?;
        guard.register(List::Undo, &Act::Send(held, nftables::delete(&self.table).bytes()))?;
        nftables.run(&match self.namespace {
            Some(_) => nftables::create_for_all(&self.table),
            None => nftables::create(&self.table),
        })?;
        Ok(nftables)
    }

    /// Opens the network again.
    pub fn lift(&mut self) -> Result<()> {
        match self.way.take() {
            None => Ok(()),
            Some(Way::Table(nftables)) => match nftables.run(&nftables::delete(&self.table)) {
                Err(e) if e.errno() != libc::ENOENT => Err(e),
                _ => Ok(()),
            },
            Some(Way::Rules(all, _)) => {
                remove_rules(&all);
                Ok(())
            }
            Some(Way::RulesForAll) => match &self.namespace {
                Some(namespace) => inside(namespace.as_fd(), unlock_all_by_rules),
                None => Ok(()),
            },
        }
    }

    /// The tasks are gone: a restore opens the network again.
    pub fn keep(&mut self) {
        self.way = None;
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        if let Err(e) = self.lift() {
            tracing::error!("the network lock {} cannot be lifted: {e}", self.table);
        }
    }
}

/// Locks that a restore has lifted; if it does not come to its end, they are back.
#[derive(Debug, Default)]
pub struct Lifted {
    table: Option<(Nftables, String)>,
    rules: Vec<Ends>,
    all: Vec<Ends>,
    /// What was lifted is the lock of a whole network namespace: which one.
    of_all: Option<OwnedFd>,
    /// … by iptables.
    by_rules: bool,
}

impl Lifted {
    /// Lifts the locks of a dump from these connections, just before they go on.
    /// `namespace`: the tree's own network namespace, which is locked as a whole.
    pub fn lift(
        inventory: &InventoryEntry,
        all: Vec<Ends>,
        guard: Option<&Guard<'_>>,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Lifted> {
        let mut lifted = Lifted::default();
        if let Some(namespace) = namespace {
            lifted.lift_all(inventory, guard, namespace)?;
            return Ok(lifted);
        }
        match inventory.network_lock_method {
            Some(1) => {
                lifted.all = all;
                lifted.lift_table(table_in(inventory), guard)?;
            }
            Some(2) => {}
            _ => {
                if all.iter().any(|&ends| find(program(ends)).is_some()) {
                    remove_rules(&all);
                    lifted.rules = all;
                }
            }
        }
        Ok(lifted)
    }

    fn lift_all(
        &mut self,
        inventory: &InventoryEntry,
        guard: Option<&Guard<'_>>,
        namespace: BorrowedFd<'_>,
    ) -> Result<()> {
        match inventory.network_lock_method {
            Some(1) => {
                let table = table_in(inventory);
                let Ok(nftables) = open_in(Some(namespace)) else { return Ok(()) };
                if let Some(guard) = guard {
                    let held = guard.hold(nftables.socket())?;
                    guard.register(List::Undo, &Act::Send(held, nftables::create_for_all(&table).bytes()))?;
                }
                match nftables.run(&nftables::delete(&table)) {
                    Ok(()) => self.table = Some((nftables, table)),
                    Err(e) if e.errno() == libc::ENOENT => {}
                    Err(e) => return Err(e),
                }
                self.of_all = Some(namespace.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?);
            }
            Some(2) => {}
            _ if find(PROGRAMS[0]).is_some() => {
                inside(namespace, unlock_all_by_rules)?;
                self.by_rules = true;
                self.of_all = Some(namespace.try_clone_to_owned().call("fcntl(F_DUPFD_CLOEXEC)")?);
            }
            _ => {}
        }
        Ok(())
    }

    fn lift_table(&mut self, table: String, guard: Option<&Guard<'_>>) -> Result<()> {
        let nftables = match Nftables::open() {
            Ok(nftables) => nftables,
            // not here, so nothing is locked by it
            Err(_) => return Ok(()),
        };
        if !self.all.is_empty() {
            // they are in it already, if there is one
            match nftables.run(&nftables::add(&table, &self.all)) {
                Err(e) if e.errno() == libc::ENOENT => return Ok(()),
                other => other?,
            }
        }
        // with a guard, the table returns should we die; the last of these is done first
        let held = match guard.filter(|_| !self.all.is_empty()) {
            Some(guard) => Some((guard, guard.hold(nftables.socket())?)),
            None => None,
        };
        if let Some((guard, held)) = held {
            guard.register(List::Undo, &Act::Send(held, nftables::add(&table, &self.all).bytes()))?;
            guard.register(List::Undo, &Act::Send(held, nftables::create(&table).bytes()))?;
            // what is there, if we were not so far
            guard.register(List::Undo, &Act::Send(held, nftables::delete(&table).bytes()))?;
        }
        match nftables.run(&nftables::delete(&table)) {
            Ok(()) => self.table = Some((nftables, table)),
            Err(e) if e.errno() == libc::ENOENT || self.all.is_empty() => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// The connections go on.
    pub fn done(mut self) {
        self.table = None;
        self.of_all = None;
        self.rules.clear();
    }
}

impl Drop for Lifted {
    fn drop(&mut self) {
        let again = match (&self.table, &self.of_all) {
            (Some((nftables, table)), Some(_)) => nftables.run(&nftables::create_for_all(table)),
            (None, Some(namespace)) if self.by_rules => inside(namespace.as_fd(), lock_all_by_rules),
            (None, Some(_)) => Ok(()),
            (Some((nftables, table)), None) => {
                nftables.run(&nftables::create(table)).and_then(|()| nftables.run(&nftables::add(table, &self.all)))
            }
            (None, None) => self.rules.iter().try_for_each(|&ends| restore_rules(ends, "-I")),
        };
        if let Err(e) = again {
            tracing::error!("connections are not locked any more: {e}");
        }
    }
}

/// The table that the dump of an image locked with.
fn table_in(inventory: &InventoryEntry) -> String {
    table_of(&inventory.dump_criu_run_id.as_deref().map(String::from_utf8_lossy).unwrap_or_default())
}

/// Locks the network namespace that we are in, for a restore: nobody is there yet who could answer. If it is locked, it stays so.
pub fn lock_here(inventory: &InventoryEntry) -> Result<()> {
    match inventory.network_lock_method {
        Some(1) => match Nftables::open()?.run(&nftables::create_for_all(&table_in(inventory))) {
            Err(e) if e.errno() == libc::EEXIST => Ok(()),
            other => other,
        },
        Some(2) => Ok(()),
        _ => lock_all_by_rules(),
    }
}

/// Takes that lock away, if it is there.
pub fn unlock_here(inventory: &InventoryEntry) -> Result<()> {
    match inventory.network_lock_method {
        Some(1) => match Nftables::open()?.run(&nftables::delete(&table_in(inventory))) {
            Err(e) if e.errno() == libc::ENOENT => Ok(()),
            other => other,
        },
        Some(2) => Ok(()),
        _ => unlock_all_by_rules(),
    }
}

fn open_in(namespace: Option<BorrowedFd<'_>>) -> Result<Nftables> {
    match namespace {
        Some(namespace) => inside(namespace, Nftables::open),
        None => Nftables::open(),
    }
}

/// Programs of iptables.
const PROGRAMS: [&str; 2] = ["iptables", "ip6tables"];

/// Commands that take the lock of a whole namespace away.
const UNLOCK_ALL: [&str; 4] = ["-D INPUT -j CRIU", "-D OUTPUT -j CRIU", "-F CRIU", "-X CRIU"];

/// Drops every packet without our mark, in the network namespace that we are in.
fn lock_all_by_rules() -> Result<()> {
    let rules = format!(
        "*filter\n:CRIU - [0:0]\n-I INPUT -j CRIU\n-I OUTPUT -j CRIU\n-A CRIU -m mark --mark {MARK:#x} -j ACCEPT\n-A CRIU -j \
         DROP\nCOMMIT\n"
    );
    PROGRAMS
        .iter()
        .try_for_each(|program| restore_text(program, &rules))
        .map_err(|e| Error::Usage { what: format!("Can't lock the network namespace with iptables: {e}") })
}

/// Takes that away, as often as it is there.
fn unlock_all_by_rules() -> Result<()> {
    const OFTEN: usize = 8;
    for program in PROGRAMS {
        let jumps = "*filter\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\nCOMMIT\n";
        let _ = (0..OFTEN).try_for_each(|_| restore_text(program, jumps));
        if let Err(e) = restore_text(program, "*filter\n-F CRIU\n-X CRIU\nCOMMIT\n") {
            tracing::info!("{program}: the network is not locked: {e}");
        }
    }
    Ok(())
}

/// The program for the family of a connection.
fn program(ends: Ends) -> &'static str {
    if ends.0.ip().to_canonical().is_ipv4() {
        "iptables"
    } else {
        "ip6tables"
    }
}

/// Rules that keep packets away, both ways; `how`: `-I` or `-D`.
fn rules((own, peer): Ends, how: &str) -> [String; 2] {
    let one = |chain: &str, from: SocketAddr, to: SocketAddr| {
        let ip = |at: SocketAddr| -> IpAddr { at.ip().to_canonical() };
        format!(
            "{how} {chain} -s {} -d {} -p tcp -m mark ! --mark {MARK:#x} -m tcp --sport {} --dport {} -j DROP",
            ip(from),
            ip(to),
            from.port(),
            to.port()
        )
    };
    [one("INPUT", peer, own), one("OUTPUT", own, peer)]
}

/// Where a program is that only root runs.
pub(crate) fn find(program: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(Into::into));
    folders.map(|folder| folder.join(program)).find(|path| path.is_file())
}

/// Hands rules to the system's iptables, both or none.
fn restore_rules(ends: Ends, how: &str) -> Result<()> {
    restore_text(program(ends), &format!("*filter\n{}\nCOMMIT\n", rules(ends, how).join("\n")))
}

fn restore_text(program: &str, text: &str) -> Result<()> {
    let name = format!("{program}-restore");
    let missing =
        || Error::Usage { what: format!("there is no {name}: install iptables, or use --network-lock nftables") };
    let path = find(&name).ok_or_else(missing)?;
    let mut child = Command::new(path)
        .args(["-w", "-n"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .call("execve(iptables-restore)")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(text.as_bytes()).call("write(iptables-restore)")?;
    }
    let output = child.wait_with_output().call("wait(iptables-restore)")?;
    if output.status.success() {
        Ok(())
    } else {
        let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
        Err(Error::Usage { what: format!("{name} failed ({}): {said}", output.status) })
    }
}

/// Takes rules away, as far as they are there.
fn remove_rules(all: &[Ends]) {
    for &ends in all {
        if let Err(e) = restore_rules(ends, "-D") {
            // they were taken away by somebody, or went with the host
            tracing::info!("the rules for {} - {} are not taken away: {e}", ends.0, ends.1);
        }
    }
}

/// A script that the guard becomes when it has done all else, with nothing to do yet.
fn script(guard: &Guard<'_>, namespace: Option<BorrowedFd<'_>>) -> Result<File> {
    let mut script = File::from(spawn::memfd(c"standstill-rules", 0)?);
    script.write_all(b"exec </dev/null >/dev/null 2>&1\nPATH=$PATH:/usr/sbin:/sbin\n").call("write(memfd)")?;
    let held = guard.hold(script.as_fd())?;
    guard.register(List::Undo, &Act::Script(held))?;
    if let Some(namespace) = namespace {
        let held = guard.hold(namespace)?;
        guard.register(List::Undo, &Act::EnterNetwork(held))?;
    }
    Ok(script)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_are_cut_as_criu_cuts_them() {
        assert_eq!(table_of("9d6b8ef1-8697-4d4d-9f00-000000000000"), "CRIU-9d6b8ef1-8697-4d4d-9f");
        assert_eq!(table_of("short"), "CRIU-short");
    }

    #[test]
    fn rules_are_for_both_ways() {
        let ends = ("[::ffff:10.0.0.1]:80".parse().unwrap(), "10.0.0.2:4000".parse().unwrap());
        assert_eq!(program(ends), "iptables");
        assert_eq!(
            rules(ends, "-I")[0],
            "-I INPUT -s 10.0.0.2 -d 10.0.0.1 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 4000 --dport 80 -j DROP"
        );
        assert_eq!(
            rules(ends, "-D")[1],
            "-D OUTPUT -s 10.0.0.1 -d 10.0.0.2 -p tcp -m mark ! --mark 0xc114 -m tcp --sport 80 --dport 4000 -j DROP"
        );
    }
}
