//! CRIU's RPC: every kind of request over `swrk` and over the service, stages in CRIU's order, errors, and packets that are
//! no requests. What CRIU 4.2 answers was written down from watching it.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use prost::Message as _;
use standstill_images::proto::{CriuFeatures, CriuOpts, CriuReq, CriuReqType as Kind};
use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::rpc::{options, request, Client, Service};
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

fn bare(kind: Kind) -> CriuReq {
    CriuReq { r#type: kind.into(), ..CriuReq::default() }
}

fn folder(name: &str) -> PathBuf {
    let folder = process::scratch(name);
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    folder
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
}

/// The names alone, and which of them came with a process id.
fn names(stages: &[(String, Option<i32>)]) -> Vec<&str> {
    stages.iter().map(|(name, _)| name.as_str()).collect()
}

#[test]
fn version_and_features() {
    let client = Client::swrk(&Engine::ours(), &[]);
    let open = |kind| CriuReq { keep_open: Some(true), ..bare(kind) };
    let answer = client.call(&open(Kind::Version));
    assert!(answer.success && answer.r#type() == Kind::Version);
    let version = answer.version.unwrap_or_default();
    assert_eq!((version.major_number, version.minor_number, version.gitid), (4, 2, None));

    // all three are answered, those that nobody asked for with no
    let asked = CriuFeatures { pidfd_store: Some(false), ..CriuFeatures::default() };
    let answer = client.call(&CriuReq { features: Some(asked), ..open(Kind::FeatureCheck) });
    let none = CriuFeatures { mem_track: Some(false), lazy_pages: Some(false), pidfd_store: Some(false) };
    assert!(answer.success && answer.features == Some(none), "{answer:?}");

    // the last of the connection
    assert!(client.call(&bare(Kind::Version)).success);
    assert_eq!(client.receive(), None);
    assert_eq!(client.finish(), Some(0));

    let client = Client::swrk(&Engine::ours(), &[]);
    let answer = client.call(&bare(Kind::FeatureCheck));
    assert!(!answer.success && answer.r#type() == Kind::FeatureCheck);
}

#[test]
fn check_and_what_is_not_there_yet() {
    let engine = Engine::ours();
    let folder = folder("rpc-check");
    let answer = Client::swrk(&engine, &[]).call(&bare(Kind::Check));
    assert!(answer.success && answer.r#type() == Kind::Check, "{answer:?}");
    assert!(Client::swrk(&engine, &[]).call(&request(Kind::Check, options(&folder))).success);
    assert!(folder.join("rpc.log").exists());

    for (kind, works) in [(Kind::CpuinfoCheck, false), (Kind::CpuinfoDump, true), (Kind::CpuinfoCheck, true)] {
        let answer = Client::swrk(&engine, &[]).call(&request(kind, options(&folder)));
        assert!(answer.success == works && answer.r#type() == kind, "{answer:?}");
        assert!(works || answer.cr_errmsg.unwrap_or_default().contains("No cpuinfo image"));
    }
    assert!(folder.join("cpuinfo.img").exists());
    let label = CriuOpts { lsm_profile: Some("apparmor:x".into()), pid: Some(i32::MAX), ..options(&folder) };
    let answer = Client::swrk(&engine, &[]).call(&request(Kind::Restore, label));
    assert!(!answer.success && answer.cr_errmsg.unwrap_or_default().contains("--lsm-profile"));

    let answer = Client::swrk(&engine, &[]).call(&CriuReq { pid: Some(1), ..bare(Kind::WaitPid) });
    assert!(!answer.success && answer.r#type() == Kind::WaitPid && answer.cr_errno == Some(libc::ECHILD), "{answer:?}");
    let _ = fs::remove_dir_all(folder);
}

/// Neither an answer with success nor a worker that hangs or panics.
#[test]
fn packets_that_are_no_requests() {
    let engine = Engine::ours();
    let whole = request(Kind::Dump, CriuOpts { pid: Some(5), images_dir: Some("/".into()), ..CriuOpts::default() });
    let whole = whole.encode_to_vec();
    let packets: Vec<Vec<u8>> = vec![
        vec![0xff; 5],
        vec![0; 60_000],
        vec![0x08, 0x63],
        vec![0x12, 0xff, 0xff, 0xff, 0xff, 0x0f],
        whole[..whole.len() - 3].to_vec(),
        [0x12, 0x02].repeat(4000),
        bare(Kind::Empty).encode_to_vec(),
        bare(Kind::Notify).encode_to_vec(),
        CriuReq { keep_open: Some(true), ..bare(Kind::Dump) }.encode_to_vec(),
    ];
    for packet in &packets {
        let client = Client::swrk(&engine, &[]);
        client.send(packet);
        let answer = client.receive().unwrap_or_else(|| panic!("{:?}: no answer", &packet[..2]));
        assert!(!answer.success && answer.r#type() == Kind::Empty && answer.cr_errmsg.is_some(), "{answer:?}");
        assert_eq!(client.receive(), None);
        assert_eq!(client.finish(), Some(255));
    }
    // one that says nothing
    assert_eq!(Client::swrk(&engine, &[]).finish(), Some(255));
}

/// Without namespaces of its own, a tree has these stages, in this order, and the process id with one of them.
#[test]
fn stages_in_order() {
    let engine = Engine::ours();
    let mut run = Run::start("tree");
    let images = run.images("images");
    let asked = CriuOpts { pid: Some(run.pid), notify_scripts: Some(true), ..options(&images) };
    run.look();
    let client = Client::swrk(&engine, &[]);
    let (stages, answer) = client.call_with_stages(&request(Kind::Dump, asked.clone()), "");
    assert!(answer.success && answer.dump.and_then(|d| d.restored) == Some(false), "{answer:?}");
    assert_eq!(names(&stages), ["pre-dump", "query-ext-files", "post-dump"]);
    assert!(stages.iter().all(|(_, pid)| pid.is_none()));
    assert_eq!(client.finish(), Some(0));
    process::wait_gone(&run.tree, std::time::Duration::from_secs(60)).unwrap_or_else(|p| panic!("{p:?} live"));

    for rejected in ["pre-restore", "post-restore", ""] {
        let opts = CriuOpts { notify_scripts: Some(true), rst_sibling: Some(true), ..options(&images) };
        let client = Client::swrk(&engine, &[]);
        let (stages, answer) = client.call_with_stages(&request(Kind::Restore, opts), rejected);
        let pid = answer.restore.map(|r| r.pid);
        let all = ["pre-restore", "post-restore", "pre-resume", "post-resume"];
        if rejected.is_empty() {
            assert!(answer.success, "{answer:?}");
            assert_eq!((names(&stages), pid), (all.to_vec(), Some(run.pid)));
            assert_eq!(stages.iter().map(|(_, pid)| *pid).collect::<Vec<_>>(), [None, Some(run.pid), None, None]);
            assert_eq!(client.finish(), Some(0));
        } else {
            assert!(!answer.success && pid == Some(-1), "{answer:?}");
            assert!(answer.cr_errmsg.unwrap_or_default().contains(rejected));
            assert_eq!(names(&stages).last(), Some(&rejected));
            assert_eq!(client.finish(), Some(1));
            // they were killed, and are our children: their ends take a moment, and are ours to learn of
            let left = process::wait_gone(&run.tree, std::time::Duration::from_secs(5));
            assert!(left.is_ok(), "after a no to {rejected} {left:?} are there");
        }
    }
    run.check(How::Restored);
}

/// The worker becomes the command that the request names: it is the parent of what was restored, and writes to the log.
#[test]
fn a_command_after_the_restore() {
    let engine = Engine::ours();
    let mut run = Run::start("eventfd");
    let images = run.images("images");
    run.dump(&engine, &images);
    let script = format!("cut -d' ' -f4 /proc/{}/stat; echo me $$; exec grep SigBlk /proc/self/status", run.pid);
    let exec_cmd = vec!["sh".into(), "-c".into(), script];
    let client = Client::swrk(&engine, &[]);
    let answer = client.call(&request(Kind::Restore, CriuOpts { exec_cmd, ..options(&images) }));
    assert!(answer.success, "{answer:?}");
    assert_eq!(client.finish(), Some(0));
    let log = fs::read_to_string(images.join("rpc.log")).unwrap_or_default();
    let said: Vec<&str> = log.lines().rev().take(3).collect();
    assert_eq!(said[0], "SigBlk:\t0000000000000000");
    assert_eq!(said[1], format!("me {}", said[2]), "{log}");
    run.check(How::Restored);
}

/// What the client counts to the outside when it is asked for it: here one end of a connection whose other end is nobody's,
/// without which the dump is refused.
#[test]
fn external_files_by_answer() {
    let engine = Engine::ours();
    let mut run = Run::start("refused_outside_pipe");
    let images = run.images("images");
    let links = fs::read_dir(format!("/proc/{}/fd", run.pid)).unwrap_or_else(|e| panic!("{e}"));
    let links = links.flatten().filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.display().to_string()));
    let sockets: Vec<String> = links.filter_map(|l| Some(l.strip_prefix("socket:")?.to_owned())).collect();
    assert_eq!(sockets.len(), 1);
    for known in [false, true] {
        let notify_scripts = Some(true);
        let leave_running = Some(true);
        let opts = CriuOpts { pid: Some(run.pid), notify_scripts, leave_running, ..options(&images) };
        let client = Client::swrk(&engine, &[]);
        let mut answer = client.call(&request(Kind::Dump, opts));
        while let (Kind::Notify, Some(stage)) = (answer.r#type(), &answer.notify) {
            let external = if known { vec![format!("unix{}", sockets[0])] } else { Vec::new() };
            let asked = stage.script.as_deref() == Some("query-ext-files");
            let opts = asked.then(|| CriuOpts { external, ..CriuOpts::default() });
            answer = client.call(&CriuReq { notify_success: Some(true), opts, ..bare(Kind::Notify) });
        }
        assert_eq!(answer.success, known, "{answer:?}");
    }
    run.check(How::Running);
}

/// A no before the end of a dump ends the dump, not the program; a no around the moment of going comes too late.
#[test]
fn who_says_no() {
    let engine = Engine::ours();
    let mut run = Run::start("threads");
    let images = run.images("images");
    for rejected in ["pre-dump", "query-ext-files", "post-dump"] {
        let opts = CriuOpts { pid: Some(run.pid), notify_scripts: Some(true), ..options(&images) };
        let (stages, answer) = Client::swrk(&engine, &[]).call_with_stages(&request(Kind::Dump, opts), rejected);
        assert!(!answer.success && names(&stages).last() == Some(&rejected), "{stages:?} {answer:?}");
        assert!(process::alive(run.pid), "{rejected}");
    }
    // nor does a client that goes away end it
    let opts = CriuOpts { pid: Some(run.pid), notify_scripts: Some(true), ..options(&images) };
    let client = Client::swrk(&engine, &[]);
    let stage = client.call(&request(Kind::Dump, opts));
    assert_eq!(stage.r#type(), Kind::Notify);
    assert_eq!(client.finish(), Some(1));
    assert!(process::alive(run.pid));

    run.dump(&engine, &images);
    let opts = CriuOpts { notify_scripts: Some(true), ..options(&images) };
    let client = Client::swrk(&engine, &[]);
    let (_, answer) = client.call_with_stages(&request(Kind::Restore, opts), "pre-resume");
    assert!(answer.success, "{answer:?}");
    run.check(How::Restored);
}

#[test]
fn errors_have_crius_numbers() {
    let engine = Engine::ours();
    let mut run = Run::start("eventfd");
    let images = run.images("images");
    let ask = |kind, opts: CriuOpts| Client::swrk(&engine, &[]).call(&request(kind, opts));
    let nobody = fs::read_to_string("/proc/sys/kernel/pid_max").ok().and_then(|t| t.trim().parse::<i32>().ok());
    let nobody = nobody.unwrap_or(4_194_304) - 1;
    let answer = ask(Kind::Dump, CriuOpts { pid: Some(nobody), ..options(&images) });
    assert_eq!((answer.success, answer.cr_errno), (false, Some(libc::ESRCH)), "{answer:?}");
    assert_eq!(answer.dump.and_then(|d| d.restored), Some(false));

    run.dump_running(&engine, &images);
    let answer = ask(Kind::Restore, options(&images));
    assert_eq!((answer.success, answer.cr_errno), (false, Some(libc::EEXIST)), "{answer:?}");

    let fine = || CriuOpts { pid: Some(run.pid), ..options(&images) };
    let config = images.join("broken.conf");
    write(&config, "tcp-established\nno-such-option\n");
    let bad = [
        CriuOpts { empty_ns: Some(1), ..fine() },
        CriuOpts { log_file: Some("a/b".into()), ..fine() },
        CriuOpts { images_dir: None, ..fine() },
        CriuOpts { images_dir: Some("/nonexistent".into()), ..fine() },
        CriuOpts { rst_sibling: Some(true), ..fine() },
        CriuOpts { config_file: Some(config.display().to_string()), ..fine() },
        CriuOpts { external: vec!["mnt[]:?".into()], ..fine() },
    ];
    for opts in bad {
        let answer = ask(Kind::Dump, opts.clone());
        assert_eq!((answer.success, answer.cr_errno), (false, Some(libc::EBADRQC)), "{opts:?}: {answer:?}");
        assert!(answer.cr_errmsg.is_some_and(|text| !text.is_empty()));
    }
    // we are among those who would be dumped
    let answer = ask(Kind::Dump, CriuOpts { pid: None, shell_job: Some(true), ..options(&images) });
    let text = answer.cr_errmsg.unwrap_or_default();
    assert!(!answer.success && text.contains("The criu itself is within dumped tree"), "{text}");
    run.check(How::Running);
}

/// The file that a request names wins over the request, which wins over the others; one that is not there is none.
#[test]
fn configuration_files() {
    let engine = Engine::ours();
    let mut run = Run::start("eventfd");
    let images = run.images("images");
    let (first, last) = (images.with_extension("first"), images.with_extension("last"));
    write(&first, "log-file first.log\nleave-running\n");
    write(&last, "log-file=last.log\n");
    let ask = |opts: CriuOpts| {
        let client = Client::swrk(&engine, &[("CRIU_CONFIG_FILE", &first.display().to_string())]);
        let answer = client.call(&request(Kind::Dump, CriuOpts { pid: Some(run.pid), ..opts }));
        assert!(answer.success, "{answer:?}");
        assert!(process::alive(run.pid), "the first file says that it goes on");
    };
    ask(CriuOpts { log_file: None, ..options(&images) });
    ask(CriuOpts { config_file: Some("/nonexistent/x.conf".into()), ..options(&images) });
    ask(CriuOpts { config_file: Some(last.display().to_string()), ..options(&images) });
    for log in ["first.log", "rpc.log", "last.log"] {
        let text = fs::read_to_string(images.join(log)).unwrap_or_default();
        assert!(text.contains("Dumping finished successfully"), "{log}: {text}");
    }
    write(&first, "no-such-option\n");
    let env = first.display().to_string();
    // swrk reads it before it is asked anything
    assert_eq!(Client::swrk(&engine, &[("CRIU_CONFIG_FILE", &env)]).finish(), Some(1));
    run.check(How::Running);
}

#[test]
fn a_service() {
    let engine = Engine::ours();
    let folder = folder("rpc-service");
    let service = Service::start(&engine, &folder);
    let pid = fs::read_to_string(folder.join("service.pid")).unwrap_or_default();
    assert_eq!(pid, service.pid().to_string());
    let connect = || Client::connect(&service.socket).unwrap_or_else(|e| panic!("{e}"));
    assert!(connect().call(&bare(Kind::Version)).success);
    assert!(connect().call(&bare(Kind::Check)).success);
    connect().send(&[0xff; 100]);

    // who has itself dumped goes on, and learns that it was not restored
    let mut run = Run::start("rpc_self");
    let images = run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let text = |word: &str| format!("{}\n{}\n{word}\n", service.socket.display(), images.display());
    write(&run.file("ask.new"), &text("running"));
    fs::rename(run.file("ask.new"), run.file("ask")).unwrap_or_else(|e| panic!("{e}"));
    let stats = images.join("stats-dump");
    wait_for(|| stats.exists());
    run.check(How::Running);

    // … or is dead, and learns that it was
    let mut run = Run::start("rpc_self");
    let images = run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let text = format!("{}\n{}\n", service.socket.display(), images.display());
    write(&run.file("ask.new"), &text);
    fs::rename(run.file("ask.new"), run.file("ask")).unwrap_or_else(|e| panic!("{e}"));
    process::wait_gone(&run.tree, std::time::Duration::from_secs(60)).unwrap_or_else(|p| panic!("{p:?} live"));
    let refused = CriuOpts { rst_sibling: Some(true), ..options(&images) };
    let answer = connect().call(&request(Kind::Restore, refused));
    assert_eq!((answer.success, answer.cr_errno), (false, Some(libc::EBADRQC)), "{answer:?}");
    let answer = connect().call(&request(Kind::Restore, options(&images)));
    assert!(answer.success, "{answer:?}");
    run.check(How::Restored);
    drop(service);
    let _ = fs::remove_dir_all(folder);
}

fn wait_for(done: impl FnMut() -> bool) {
    assert!(process::within(std::time::Duration::from_secs(60), done), "not in time");
}

/// Another user gets from root's service what that user could do itself: not root's processes, nor files that it may not read.
#[test]
#[allow(unsafe_code)]
fn a_service_gives_no_rights() {
    // SAFETY: no memory is involved.
    if unsafe { libc::geteuid() } != 0 {
        return skip("the service's clients", "this is not root");
    }
    let engine = Engine::ours();
    let folder = folder("rpc-rights");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).unwrap_or_else(|e| panic!("{e}"));
    let service = Service::start(&engine, &folder);
    let mut run = Run::start("eventfd");
    let (socket, pid) = (service.socket.clone(), run.pid);
    let (open, closed) = (folder.join("open"), folder.join("closed"));
    for (path, mode) in [(&open, 0o777), (&closed, 0o700)] {
        fs::create_dir_all(path).unwrap_or_else(|e| panic!("{e}"));
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap_or_else(|e| panic!("{e}"));
    }
    let answers = std::thread::spawn(move || {
        // SAFETY: the raw calls change this thread alone, which ends here.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()), 0);
            assert_eq!(libc::syscall(libc::SYS_setresgid, 65534, 65534, 65534), 0);
            assert_eq!(libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534), 0);
        }
        let ask = |images: &Path, pid| {
            let opts = CriuOpts {
                images_dir: Some(images.display().to_string()),
                pid: Some(pid),
                leave_running: Some(true),
                log_level: Some(4),
                log_file: Some("rpc.log".into()),
                ..CriuOpts::default()
            };
            let client = Client::connect(&socket).unwrap_or_else(|e| panic!("{e}"));
            client.call(&request(Kind::Dump, opts))
        };
        [ask(&open, pid), ask(&closed, pid), ask(&open, 1)]
    })
    .join()
    .unwrap_or_else(|e| std::panic::resume_unwind(e));
    for answer in &answers {
        assert!(!answer.success && answer.cr_errmsg.is_some(), "{answer:?}");
    }
    let text = answers[0].cr_errmsg.as_deref().unwrap_or("");
    assert!(text.contains("Operation not permitted") || text.contains("Permission denied"), "{text}");
    assert!(!folder.join("open/inventory.img").exists());
    run.check(How::Running);
    drop(service);
    let _ = fs::remove_dir_all(folder);
}

/// Scripts of the command line: which stages, in which order, with which environment; and what a no does.
#[test]
fn action_scripts() {
    let engine = Engine::ours();
    let mut run = Run::start("tree");
    let images = run.images("images");
    fs::create_dir_all(&images).unwrap_or_else(|e| panic!("{e}"));
    let (script, said) = (run.images("script"), run.images("said"));
    let text = format!(
        "#!/bin/sh\necho $CRTOOLS_SCRIPT_ACTION ${{CRTOOLS_INIT_PID-none}} \
         $(test $CRTOOLS_IMAGE_DIR -ef {} && echo images) >>{}\ntest $CRTOOLS_SCRIPT_ACTION != \"$(cat {}.no)\"\n",
        images.display(),
        said.display(),
        script.display()
    );
    write(&script, &text);
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap_or_else(|e| panic!("{e}"));
    let no = script.with_extension("no");
    let option = ["--action-script", &script.display().to_string()];
    for word in ["pre-dump", "post-dump"] {
        write(&no, word);
        let failed = engine.dump(run.pid, &images, &option).expect_err("the script says no");
        assert!(failed.text.contains(word), "{failed}");
        assert!(process::alive(run.pid));
    }
    write(&no, "");
    run.look();
    engine.dump(run.pid, &images, &option).unwrap_or_else(|e| panic!("{e}"));
    process::wait_gone(&run.tree, std::time::Duration::from_secs(60)).unwrap_or_else(|p| panic!("{p:?} live"));
    write(&no, "post-restore");
    let failed = engine.restore(&images, &option).expect_err("the script says no");
    assert!(failed.text.contains("post-restore"), "{failed}");
    process::wait_gone(&run.tree, std::time::Duration::from_secs(60)).unwrap_or_else(|p| panic!("{p:?}"));
    write(&no, "");
    write(&said, "");
    engine.restore(&images, &option).unwrap_or_else(|e| panic!("{e}"));
    let pid = run.pid;
    let lines = format!(
        "pre-restore none images\npost-restore {pid} images\npre-resume {pid} images\npost-resume {pid} images\n"
    );
    assert_eq!(fs::read_to_string(&said).unwrap_or_default(), lines);
    run.check(How::Restored);
}
