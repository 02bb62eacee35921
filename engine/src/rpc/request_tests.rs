use super::*;
use standstill_images::proto::{
    CgroupRoot as RpcCgroupRoot, CriuPageServerInfo, CriuVethPair, ExtMountMap, InheritFd as RpcInheritFd,
    JoinNamespace, UnixSk,
};

const CHILD: Client = Client { pid: 77, is_parent: true };
const STRANGER: Client = Client { pid: 77, is_parent: false };

fn ask(change: impl FnOnce(&mut CriuOpts)) -> Result<Options, Fault> {
    let mut req = CriuOpts::default();
    change(&mut req);
    options(&Options::default(), &req, CHILD, Purpose::Restore)
}

fn shown(o: &Options) -> String {
    format!("{o:?}")
}

type Change = Box<dyn FnOnce(&mut CriuOpts)>;

/// Every field that stands for an option changes something.
#[test]
fn every_field_arrives() {
    let plain = shown(&ask(|_| {}).unwrap());
    let all: Vec<(&str, Change)> = vec![
        ("pid", Box::new(|r| r.pid = Some(5))),
        ("leave_running", Box::new(|r| r.leave_running = Some(true))),
        ("leave_stopped", Box::new(|r| r.leave_stopped = Some(true))),
        ("ext_unix_sk", Box::new(|r| r.ext_unix_sk = Some(true))),
        ("tcp_established", Box::new(|r| r.tcp_established = Some(true))),
        ("evasive_devices", Box::new(|r| r.evasive_devices = Some(true))),
        ("shell_job", Box::new(|r| r.shell_job = Some(true))),
        ("file_locks", Box::new(|r| r.file_locks = Some(true))),
        ("log_level", Box::new(|r| r.log_level = Some(4))),
        ("log_file", Box::new(|r| r.log_file = Some("l".into()))),
        ("ps", Box::new(|r| r.ps = Some(CriuPageServerInfo::default()))),
        ("notify_scripts", Box::new(|r| r.notify_scripts = Some(true))),
        ("root", Box::new(|r| r.root = Some("/r".into()))),
        ("parent_img", Box::new(|r| r.parent_img = Some("../0".into()))),
        ("track_mem", Box::new(|r| r.track_mem = Some(true))),
        ("auto_dedup", Box::new(|r| r.auto_dedup = Some(true))),
        ("link_remap", Box::new(|r| r.link_remap = Some(true))),
        ("veths", Box::new(|r| r.veths = vec![CriuVethPair { if_in: "a".into(), if_out: "b".into() }])),
        ("cpu_cap", Box::new(|r| r.cpu_cap = Some(1))),
        ("force_irmap", Box::new(|r| r.force_irmap = Some(true))),
        ("exec_cmd", Box::new(|r| r.exec_cmd = vec!["ls".into()])),
        ("ext_mnt", Box::new(|r| r.ext_mnt = vec![ExtMountMap { key: "/a".into(), val: "b".into() }])),
        ("manage_cgroups", Box::new(|r| r.manage_cgroups = Some(false))),
        ("cg_root", Box::new(|r| r.cg_root = vec![RpcCgroupRoot { ctrl: None, path: "/c".into() }])),
        ("rst_sibling", Box::new(|r| r.rst_sibling = Some(true))),
        ("inherit_fd", Box::new(|r| r.inherit_fd = vec![RpcInheritFd { key: "pipe:[1]".into(), fd: 4 }])),
        ("auto_ext_mnt", Box::new(|r| r.auto_ext_mnt = Some(true))),
        ("ext_sharing", Box::new(|r| r.ext_sharing = Some(true))),
        ("ext_masters", Box::new(|r| r.ext_masters = Some(true))),
        ("skip_mnt", Box::new(|r| r.skip_mnt = vec!["/m".into()])),
        ("enable_fs", Box::new(|r| r.enable_fs = vec!["fuse,nfs".into()])),
        ("manage_cgroups_mode", Box::new(|r| r.manage_cgroups_mode = Some(CriuCgMode::Strict.into()))),
        ("ghost_limit", Box::new(|r| r.ghost_limit = Some(5))),
        ("irmap_scan_paths", Box::new(|r| r.irmap_scan_paths = vec!["/s".into()])),
        ("external", Box::new(|r| r.external = vec!["mnt[]:sm".into(), "unix[5]".into()])),
        ("empty_ns", Box::new(|r| r.empty_ns = Some(libc::CLONE_NEWNET as u32))),
        (
            "join_ns",
            Box::new(|r| r.join_ns = vec![JoinNamespace { ns: "net".into(), ns_file: "5".into(), extra_opt: None }]),
        ),
        ("cgroup_props", Box::new(|r| r.cgroup_props = Some("p".into()))),
        ("cgroup_props_file", Box::new(|r| r.cgroup_props_file = Some("f".into()))),
        ("cgroup_dump_controller", Box::new(|r| r.cgroup_dump_controller = vec!["cpu".into()])),
        ("freeze_cgroup", Box::new(|r| r.freeze_cgroup = Some("/f".into()))),
        ("timeout", Box::new(|r| r.timeout = Some(3))),
        ("tcp_skip_in_flight", Box::new(|r| r.tcp_skip_in_flight = Some(true))),
        ("weak_sysctls", Box::new(|r| r.weak_sysctls = Some(true))),
        ("lazy_pages", Box::new(|r| r.lazy_pages = Some(true))),
        ("status_fd", Box::new(|r| r.status_fd = Some(3))),
        ("orphan_pts_master", Box::new(|r| r.orphan_pts_master = Some(true))),
        ("tcp_close", Box::new(|r| r.tcp_close = Some(true))),
        ("lsm_profile", Box::new(|r| r.lsm_profile = Some("apparmor:x".into()))),
        ("tls_cacert", Box::new(|r| r.tls_cacert = Some("c".into()))),
        ("tls_cacrl", Box::new(|r| r.tls_cacrl = Some("c".into()))),
        ("tls_cert", Box::new(|r| r.tls_cert = Some("c".into()))),
        ("tls_key", Box::new(|r| r.tls_key = Some("c".into()))),
        ("tls", Box::new(|r| r.tls = Some(true))),
        ("tls_no_cn_verify", Box::new(|r| r.tls_no_cn_verify = Some(true))),
        ("cgroup_yard", Box::new(|r| r.cgroup_yard = Some("/y".into()))),
        ("pre_dump_mode", Box::new(|r| r.pre_dump_mode = Some(CriuPreDumpMode::VmRead.into()))),
        ("pidfd_store_sk", Box::new(|r| r.pidfd_store_sk = Some(4))),
        ("lsm_mount_context", Box::new(|r| r.lsm_mount_context = Some("x".into()))),
        ("network_lock", Box::new(|r| r.network_lock = Some(CriuNetworkLockMethod::Skip.into()))),
        ("mntns_compat_mode", Box::new(|r| r.mntns_compat_mode = Some(true))),
        ("skip_file_rwx_check", Box::new(|r| r.skip_file_rwx_check = Some(true))),
        ("unprivileged", Box::new(|r| r.unprivileged = Some(true))),
        ("display_stats", Box::new(|r| r.display_stats = Some(true))),
        ("log_to_stderr", Box::new(|r| r.log_to_stderr = Some(true))),
    ];
    // images_dir, images_dir_fd, work_dir_fd and config_file are opened elsewhere, unix_sk_ino belongs to ext_unix_sk
    assert_eq!(all.len(), 70 - 5);
    for (name, change) in all {
        let options = ask(change).unwrap_or_else(|e| panic!("{name}: {}", e.text));
        assert_ne!(shown(&options), plain, "{name} changes nothing");
    }
}

#[test]
fn defaults_and_who_asks() {
    let o = ask(|_| {}).unwrap();
    assert_eq!((o.pid, o.log_level, o.restore_detach, o.swrk), (Some(77), 2, true, true));
    let before = Options { tcp_close: true, log_level: 4, ..Options::default() };
    let o = options(&before, &CriuOpts::default(), STRANGER, Purpose::Dump).unwrap();
    assert!(o.tcp_close && o.log_level == 2 && !o.restore_detach && !o.swrk);
    let off = CriuOpts { tcp_close: Some(false), ..CriuOpts::default() };
    assert!(!options(&before, &off, STRANGER, Purpose::Dump).unwrap().tcp_close);
}

#[test]
fn what_makes_no_sense_is_a_bad_request() {
    let no = |req: CriuOpts, client| {
        let fault = options(&Options::default(), &req, client, Purpose::Restore).expect_err("it makes no sense");
        assert_eq!(fault.errno, Some(libc::EBADRQC), "{}", fault.text);
    };
    no(CriuOpts { rst_sibling: Some(false), ..CriuOpts::default() }, STRANGER);
    no(CriuOpts { inherit_fd: vec![RpcInheritFd { key: "a".into(), fd: 1 }], ..CriuOpts::default() }, STRANGER);
    no(CriuOpts { inherit_fd: vec![RpcInheritFd { key: "a".into(), fd: -1 }], ..CriuOpts::default() }, CHILD);
    no(CriuOpts { empty_ns: Some(1), ..CriuOpts::default() }, CHILD);
    no(CriuOpts { network_lock: Some(9), ..CriuOpts::default() }, CHILD);
    no(CriuOpts { pre_dump_mode: Some(0), ..CriuOpts::default() }, CHILD);
    no(CriuOpts { manage_cgroups_mode: Some(-1), ..CriuOpts::default() }, CHILD);
    no(CriuOpts { log_file: Some("a/b".into()), ..CriuOpts::default() }, CHILD);
    no(CriuOpts { external: vec!["mnt[]:x".into()], ..CriuOpts::default() }, CHILD);
    let sockets = CriuOpts { ext_unix_sk: Some(true), unix_sk_ino: vec![UnixSk { inode: 0 }], ..CriuOpts::default() };
    no(sockets, CHILD);
    let ps = CriuPageServerInfo { fd: Some(3), ..CriuPageServerInfo::default() };
    no(CriuOpts { ps: Some(ps), ..CriuOpts::default() }, STRANGER);
}
