//! From a request's options to [`Options`]: every field of the message has one line here.
//!
//! Nothing is opened or looked up, so that this can be fuzzed: descriptors of the client's are numbers still
//! ([`super::folders`] opens them), and what cannot be done yet is an option that the engine refuses by name.
//!
//! Order, later ones win: configuration files that are read at the start, the request, the file that the request names
//! (`config_file`).

use std::ffi::OsString;
use std::path::PathBuf;

use standstill_images::proto::{CriuCgMode, CriuNetworkLockMethod, CriuOpts, CriuPreDumpMode};

use super::Fault;
use crate::options::{
    CgroupMode, CgroupRoot, CpuCap, EmptyNamespaces, External, FinalState, InheritFd, JoinNs, NetworkLock, OptionError,
    Options, PreDumpMode,
};

/// What is asked for, as far as options depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // their names say it
pub enum Purpose {
    Dump,
    PreDump,
    Restore,
    Check,
    PageServer,
    Cpuinfo,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client {
    /// Its process id.
    pub pid: i32,
    /// It started us (`swrk`), so we have its descriptors and can be what its child is.
    pub is_parent: bool,
}

fn fault(e: OptionError) -> Fault {
    Fault::bad(e.to_string())
}

fn set<T: Copy>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn path(field: &mut Option<PathBuf>, value: Option<&String>) {
    if let Some(value) = value {
        *field = Some(PathBuf::from(value));
    }
}

fn text(field: &mut Option<String>, value: Option<&String>) {
    if let Some(value) = value {
        *field = Some(value.clone());
    }
}

/// The options that a request asks for on top of `base`.
pub fn options(base: &Options, req: &CriuOpts, client: Client, purpose: Purpose) -> Result<Options, Fault> {
    let mut o = base.clone();
    o.swrk = client.is_parent;
    o.restore_detach |= purpose == Purpose::Restore;
    general(&mut o, req, client)?;
    switches(&mut o, req);
    memory(&mut o, req, client)?;
    outside(&mut o, req, client)?;
    namespaces(&mut o, req)?;
    cgroups(&mut o, req)?;
    security(&mut o, req);
    Ok(o)
}

/// What is dumped, what becomes of it, and the log.
fn general(o: &mut Options, req: &CriuOpts, client: Client) -> Result<(), Fault> {
    o.pid = Some(req.pid.unwrap_or(client.pid));
    if req.leave_running == Some(true) {
        o.final_state = FinalState::Run;
    }
    if req.leave_stopped == Some(true) {
        o.final_state = FinalState::Stop;
    }
    if let Some(sibling) = req.rst_sibling {
        if !client.is_parent {
            return Err(Fault::bad("rst_sibling is not allowed in standalone service".into()));
        }
        o.restore_sibling = sibling;
    }
    // the request's level counts even where it says nothing
    o.log_level = u32::try_from(req.log_level.unwrap_or(2)).unwrap_or(0);
    if let Some(name) = &req.log_file {
        if name.contains('/') {
            return Err(Fault::bad("No subdirs are allowed in log_file name".into()));
        }
        o.log_file = Some(PathBuf::from(name));
    }
    set(&mut o.log_to_stderr, req.log_to_stderr);
    set(&mut o.display_stats, req.display_stats);
    set(&mut o.timeout, req.timeout);
    set(&mut o.unprivileged, req.unprivileged);
    o.notify_scripts = req.notify_scripts == Some(true);
    o.orphan_pts_master |= req.orphan_pts_master == Some(true);
    if !req.exec_cmd.is_empty() {
        o.exec_cmd = req.exec_cmd.iter().map(OsString::from).collect();
    }
    path(&mut o.root, req.root.as_ref());
    path(&mut o.freeze_cgroup, req.freeze_cgroup.as_ref());
    if req.status_fd.is_some() {
        tracing::warn!("status_fd is obsoleted; use status-ready notification instead");
        o.status_fd = req.status_fd;
    }
    Ok(())
}

fn switches(o: &mut Options, req: &CriuOpts) {
    set(&mut o.tcp_established, req.tcp_established);
    set(&mut o.tcp_skip_in_flight, req.tcp_skip_in_flight);
    set(&mut o.tcp_close, req.tcp_close);
    set(&mut o.weak_sysctls, req.weak_sysctls);
    set(&mut o.evasive_devices, req.evasive_devices);
    set(&mut o.shell_job, req.shell_job);
    set(&mut o.skip_file_rwx_check, req.skip_file_rwx_check);
    set(&mut o.file_locks, req.file_locks);
    set(&mut o.link_remap, req.link_remap);
    set(&mut o.force_irmap, req.force_irmap);
    o.irmap_scan_paths.extend(req.irmap_scan_paths.iter().map(PathBuf::from));
    set(&mut o.ghost_limit, req.ghost_limit.map(u64::from));
    o.mntns_compat_mode |= req.mntns_compat_mode == Some(true);
    if let Some(caps) = req.cpu_cap {
        o.cpu_cap = CpuCap(caps | CpuCap::IMAGE.0);
    }
}

/// Pages, and servers for them.
fn memory(o: &mut Options, req: &CriuOpts, client: Client) -> Result<(), Fault> {
    set(&mut o.track_mem, req.track_mem);
    set(&mut o.auto_dedup, req.auto_dedup);
    set(&mut o.lazy_pages, req.lazy_pages);
    path(&mut o.prev_images_dir, req.parent_img.as_ref());
    set(&mut o.tls, req.tls.filter(|on| *on));
    set(&mut o.tls_no_cn_verify, req.tls_no_cn_verify.filter(|on| *on));
    path(&mut o.tls_cacert, req.tls_cacert.as_ref());
    path(&mut o.tls_cacrl, req.tls_cacrl.as_ref());
    path(&mut o.tls_cert, req.tls_cert.as_ref());
    path(&mut o.tls_key, req.tls_key.as_ref());
    if req.pidfd_store_sk.is_some() {
        o.pidfd_store_sk = req.pidfd_store_sk;
    }
    if let Some(mode) = req.pre_dump_mode {
        let mode = CriuPreDumpMode::try_from(mode).map_err(|_| fault(OptionError::PreDumpMode))?;
        o.pre_dump_mode = match mode {
            CriuPreDumpMode::Splice => PreDumpMode::Splice,
            CriuPreDumpMode::VmRead => PreDumpMode::Read,
        };
    }
    let Some(ps) = &req.ps else { return Ok(()) };
    // a port is 16 bits in whatever number it comes
    o.port = ps.port.map(|port| (port & 0xffff) as u16);
    if !o.lazy_pages {
        o.use_page_server = true;
        o.address = ps.address.clone();
        if ps.fd.is_some() {
            if !client.is_parent {
                return Err(Fault::bad("a socket for pages is not allowed in standalone service".into()));
            }
            o.ps_socket = ps.fd;
        }
    }
    Ok(())
}

/// What is outside the tree.
fn outside(o: &mut Options, req: &CriuOpts, client: Client) -> Result<(), Fault> {
    if let Some(on) = req.ext_unix_sk {
        o.ext_unix_sk = on;
        for socket in &req.unix_sk_ino {
            if socket.inode == 0 {
                return Err(fault(OptionError::UnixSocketInode("0".into())));
            }
            o.external.push(External { key: format!("unix[{}]", socket.inode), value: None });
        }
    }
    o.external.extend(req.veths.iter().map(|veth| External::new("veth", &veth.if_in, &veth.if_out)));
    o.external.extend(req.ext_mnt.iter().map(|mount| External::new("mnt", &mount.key, &mount.val)));
    if !req.inherit_fd.is_empty() && !client.is_parent {
        return Err(Fault::bad("inherit_fd is not allowed in standalone service".into()));
    }
    for inherited in &req.inherit_fd {
        if inherited.fd < 0 || inherited.key.is_empty() {
            return Err(fault(OptionError::InheritFd(format!("fd[{}]:{}", inherited.fd, inherited.key))));
        }
        o.inherit_fds.push(InheritFd { fd: inherited.fd, id: inherited.key.clone() });
    }
    for external in &req.external {
        o.add_external(external).map_err(fault)?;
    }
    Ok(())
}

fn namespaces(o: &mut Options, req: &CriuOpts) -> Result<(), Fault> {
    for join in &req.join_ns {
        o.join_ns.push(JoinNs::new(&join.ns, &join.ns_file, join.extra_opt.as_deref()).map_err(fault)?);
    }
    if let Some(kinds) = req.empty_ns {
        if kinds & !(libc::CLONE_NEWNET as u32) != 0 {
            return Err(fault(OptionError::EmptyNamespace(format!("{kinds:#x}"))));
        }
        o.empty_ns = EmptyNamespaces { net: kinds != 0 };
    }
    set(&mut o.autodetect_ext_mounts, req.auto_ext_mnt);
    set(&mut o.enable_external_sharing, req.ext_sharing);
    set(&mut o.enable_external_masters, req.ext_masters);
    o.skip_mnt.extend(req.skip_mnt.iter().map(PathBuf::from));
    o.enable_fs.extend(req.enable_fs.iter().flat_map(|list| list.split(',')).map(str::to_owned));
    if let Some(method) = req.network_lock {
        let bad = |_| fault(OptionError::NetworkLock(method.to_string()));
        o.network_lock = match CriuNetworkLockMethod::try_from(method).map_err(bad)? {
            CriuNetworkLockMethod::Iptables => NetworkLock::Iptables,
            CriuNetworkLockMethod::Nftables => NetworkLock::Nftables,
            CriuNetworkLockMethod::Skip => NetworkLock::Skip,
        };
    }
    Ok(())
}

fn cgroups(o: &mut Options, req: &CriuOpts) -> Result<(), Fault> {
    set(&mut o.manage_cgroups, req.manage_cgroups.map(|on| if on { CgroupMode::Soft } else { CgroupMode::Ignore }));
    if let Some(mode) = req.manage_cgroups_mode {
        let bad = |_| fault(OptionError::CgroupMode(mode.to_string()));
        o.manage_cgroups = match CriuCgMode::try_from(mode).map_err(bad)? {
            CriuCgMode::Ignore => CgroupMode::Ignore,
            CriuCgMode::CgNone => CgroupMode::None,
            CriuCgMode::Props => CgroupMode::Props,
            CriuCgMode::Soft | CriuCgMode::Default => CgroupMode::Soft,
            CriuCgMode::Full => CgroupMode::Full,
            CriuCgMode::Strict => CgroupMode::Strict,
        };
    }
    o.cgroup_roots
        .extend(req.cg_root.iter().map(|root| CgroupRoot { controller: root.ctrl.clone(), path: root.path.clone() }));
    text(&mut o.cgroup_props, req.cgroup_props.as_ref());
    path(&mut o.cgroup_props_file, req.cgroup_props_file.as_ref());
    o.cgroup_dump_controllers.extend(req.cgroup_dump_controller.iter().cloned());
    path(&mut o.cgroup_yard, req.cgroup_yard.as_ref());
    Ok(())
}

fn security(o: &mut Options, req: &CriuOpts) {
    text(&mut o.lsm_profile, req.lsm_profile.as_ref());
    text(&mut o.lsm_mount_context, req.lsm_mount_context.as_ref());
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
