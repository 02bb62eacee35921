//! Restores that fail.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, io};

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::program::{free_port, program, Program, LIMIT};
use standstill_tests::skip::skip;

use crate::dumps::Small;
use crate::support::*;

/// A program that was dumped, and is dead.
fn dumped(code: &str, options: &[&str]) -> Program {
    let mut program = counting(code);
    program.dump(options);
    program
}

/// Now that the cause is gone it comes back.
fn comes_back(program: &Program, options: &[&str]) {
    program.restore_restless(options);
    program.moves(20);
}

/// Restored beside itself.
pub(crate) fn id_in_use() -> Option<String> {
    let program = counting("open(F, '>', 'gone'); print F 'x'; F->flush; unlink 'gone'");
    let images = images(&program);
    Engine::ours().dump(program.pid, &images, &["-R"]).ok()?;
    let text = restore_fails(&program, &[]);
    program.moves(20);
    Some(text)
}

/// Only the child's id is taken: by the child itself, which outlives its parent.
pub(crate) fn id_of_child_in_use() -> Option<String> {
    let mut program = counting("if (!($child = fork)) { sleep while 1 }");
    let child = process::children(program.pid).first().copied()?;
    Engine::ours().dump(program.pid, &images(&program), &["-R"]).ok()?;
    program.tree = vec![program.pid, child];
    process::end(&[program.pid]);
    let text = restore_fails(&program, &[]);
    assert!(process::alive(child), "who has the id was killed");
    process::end(&[child]);
    comes_back(&program, &[]);
    Some(text)
}

/// In a namespace whose ids end early.
pub(crate) fn ids_end_before() -> Option<String> {
    const PATH: &str = "/proc/sys/kernel/pid_max";
    let program = dumped("", &[]);
    let within = |command: &str| {
        let inside = format!("{command} > {PATH} && exec \"$0\" \"$@\"");
        ["unshare", "--pid", "--fork", "--mount-proc", "sh", "-c", &inside].map(str::to_owned)
    };
    // is it the namespace's own?
    let before = fs::read_to_string(PATH).ok()?;
    let less = before.trim().parse::<u32>().ok()? - 1;
    let mut ask = Command::new("true");
    wrapped(&mut ask, &within(&format!("echo {less}")).each_ref().map(String::as_str));
    let asked = process::run(&mut ask, LIMIT).ok()?;
    if asked.code != Some(0) || fs::read_to_string(PATH).ok()? != before || program.pid <= 301 {
        let _ = fs::write(PATH, before);
        skip("ids_end_before", "pid_max is not a namespace's own here");
        return None;
    }
    let text = restore_of_fails(&program, &[], |c| wrapped(c, &within("echo 301").each_ref().map(String::as_str)));
    comes_back(&program, &[]);
    Some(text)
}

/// Changes what an image says, as JSON.
pub(crate) fn edit(image: &Path, change: impl FnOnce(String) -> String) {
    let engine = Engine::ours();
    let json = image.with_extension("json");
    let call = |verb: &str, from: &Path, to: &Path| {
        let done = Command::new(engine.path()).args(["image", verb, "-i"]).arg(from).arg("-o").arg(to).status();
        assert!(done.is_ok_and(|s| s.success()), "image {verb}");
    };
    call("decode", image, &json);
    let text = fs::read_to_string(&json).unwrap_or_else(|e| panic!("{e}"));
    let changed = change(text.clone());
    assert_ne!(text, changed, "nothing was changed in {}", image.display());
    fs::write(&json, changed).unwrap_or_else(|e| panic!("{e}"));
    call("encode", &json, image);
    let _ = fs::remove_file(json);
}

type Change<'a> = &'a dyn Fn(&Path) -> io::Result<()>;

/// Something happens to a file that it has open, and is undone.
fn with_file(harm: Change<'_>, cure: Change<'_>) -> Option<String> {
    let program = dumped("open(O, '>', 'data'); print O 'content'; close O; open(F, '<', 'data')", &[]);
    let path = program.folder.join("data");
    harm(&path).ok()?;
    let text = restore_fails(&program, &[]);
    cure(&path).ok()?;
    comes_back(&program, &[]);
    Some(text)
}

pub(crate) fn file_missing() -> Option<String> {
    let kept = |p: &Path| p.with_extension("kept");
    with_file(&|p| fs::rename(p, kept(p)), &|p| fs::rename(kept(p), p))
}

pub(crate) fn file_grown() -> Option<String> {
    with_file(&|p| fs::write(p, "more content"), &|p| fs::write(p, "content"))
}

pub(crate) fn file_mode() -> Option<String> {
    let set = |p: &Path, mode| fs::set_permissions(p, fs::Permissions::from_mode(mode));
    with_file(&|p| set(p, 0o600), &|p| set(p, 0o644))
}

/// Its own copy of Perl, in a file of its own.
fn own_copy() -> Option<(Program, PathBuf)> {
    let perl = program("perl")?;
    let at =
        std::env::temp_dir().join(format!("standstill-{}-perl-{:?}", std::process::id(), std::thread::current().id()));
    fs::copy(perl, &at).ok()?;
    let mut program = counting_as("copy", "", |c| {
        let mut new = Command::new(&at);
        new.args(c.get_args());
        *c = new;
    });
    program.dump(&[]);
    Some((program, at))
}

pub(crate) fn other_build() -> Option<String> {
    let (program, at) = own_copy()?;
    let right = fs::read(&at).ok()?;
    // the note of the build-id: its name, then the id
    let note = right.windows(8).position(|w| w == b"\x03\0\0\0GNU\0")?;
    let mut other = right.clone();
    other[note + 8] ^= 0xff;
    replace(&at, &other);
    let text = restore_fails(&program, &[]);
    replace(&at, &right);
    comes_back(&program, &[]);
    fs::remove_file(&at).ok()?;
    Some(text)
}

pub(crate) fn other_program() -> Option<String> {
    let (program, at) = own_copy()?;
    let right = fs::read(&at).ok()?;
    replace(&at, &fs::read("/bin/sh").ok()?);
    let text = restore_fails(&program, &[]);
    replace(&at, &right);
    comes_back(&program, &[]);
    fs::remove_file(&at).ok()?;
    Some(text)
}

fn replace(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap_or_else(|e| panic!("{e}"));
}

/// A job of a shell, with and without the option.
pub(crate) fn no_shell_job_at_restore() -> Option<String> {
    let mut program = counting("if ($child = fork) { waitpid $child, 0; exit }");
    let child = process::children(program.pid).first().copied()?;
    Engine::ours().dump(child, &images(&program), &["-j", "-R"]).ok()?;
    program.tree = process::tree(program.pid);
    process::end(&program.tree);
    Some(restore_fails(&program, &[]))
}

pub(crate) fn connected_at_restore() -> Option<String> {
    let code = "use Socket; socket(L, PF_INET, SOCK_STREAM, 0); bind(L, sockaddr_in(0, inet_aton('127.0.0.1'))); \
                listen(L, 5); socket(C, PF_INET, SOCK_STREAM, 0); connect(C, getsockname(L)) or die; accept(A, L)";
    let program = dumped(code, &["--tcp-established"]);
    let text = restore_fails(&program, &[]);
    // it fails at last, when connections go on already: nothing of them may be in the way of the next
    let late = restore_fails(&program, &["--tcp-established", "--pidfile", "none/pid"]);
    assert!(late.contains("none/pid"), "{late}");
    comes_back(&program, &["--tcp-established"]);
    Some(text)
}

pub(crate) fn address_in_use() -> Option<String> {
    let port = free_port();
    let code = format!(
        "use Socket; socket(L, PF_INET, SOCK_STREAM, 0); bind(L, sockaddr_in({port}, inet_aton('127.0.0.1'))) or die; listen(L, 5)"
    );
    let program = dumped(&code, &[]);
    let taken = std::net::TcpListener::bind(("127.0.0.1", port)).ok()?;
    let text = restore_fails(&program, &[]);
    drop(taken);
    comes_back(&program, &[]);
    Some(text)
}

pub(crate) fn descriptor_above_limit() -> Option<String> {
    // its own limit is lower than that: prlimit(RLIMIT_NOFILE)
    let code = "require POSIX; POSIX::dup2(0, 700) or die; my $l = pack('QQ', 600, 600); syscall(302, 0, 7, $l, 0) == 0 or die";
    let program = dumped(code, &[]);
    let text = restore_of_fails(&program, &[], |c| wrapped(c, &["prlimit", "--nofile=600:600"]));
    comes_back(&program, &[]);
    Some(text)
}

/// Who has no CAP_SYS_RESOURCE can give no more than it has.
pub(crate) fn smaller_limit() -> Option<String> {
    let program = dumped("", &[]);
    let text = restore_of_fails(&program, &[], |c| {
        with_less_power(c, &["--bounding-set=-sys_resource", "--inh-caps=-sys_resource"]);
        wrapped(c, &["prlimit", "--memlock=8192:8192", "--nofile=600:600"]);
    });
    comes_back(&program, &[]);
    Some(text)
}

pub(crate) fn no_capability_at_restore() -> Option<String> {
    let program = dumped("", &[]);
    let text = restore_of_fails(&program, &[], |c| with_less_power(c, POWERLESS));
    comes_back(&program, &[]);
    Some(text)
}

pub(crate) fn another_user_at_restore() -> Option<String> {
    let mut program = counting("");
    for folder in [program.folder.clone(), images(&program)] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).ok()?;
    }
    program.dump(&[]);
    let copy = program.folder.join("engine");
    let text = restore_of_fails(&program, &[], |c| as_nobody(c, &copy));
    comes_back(&program, &[]);
    Some(text)
}

pub(crate) fn no_folder_at_restore() -> Option<String> {
    let missing = std::env::temp_dir().join("standstill-there-is-no-such-folder");
    Some(fails(&mut Engine::ours().command("restore", &missing, &[]), &missing))
}

pub(crate) fn no_work_folder_at_restore() -> Option<String> {
    let program = dumped("", &[]);
    let missing = program.folder.join("missing").display().to_string();
    let text = restore_fails(&program, &["-W", &missing]);
    comes_back(&program, &[]);
    Some(text)
}

/// A deleted file of the program is to come back where there is no room.
pub(crate) fn no_room_for_deleted() -> Option<String> {
    drop(Small::mount(std::env::temp_dir().join(format!("standstill-{}-room", std::process::id())), "size=1m")?);
    let code =
        "mkdir 'small'; system('mount', '-t', 'tmpfs', '-o', 'size=1m', 'standstill-small', 'small') == 0 or die; \
                open(F, '+>', 'small/gone') or die; print F 'x' x 300000; F->flush; unlink 'small/gone'";
    let program = dumped(code, &[]);
    let small = Small(program.folder.join("small"));
    let filler = small.0.join("filler");
    let full = fs::write(&filler, vec![1; 2 << 20]);
    assert!(full.is_err_and(|e| e.kind() == io::ErrorKind::StorageFull));
    let text = restore_fails(&program, &[]);
    let left: Vec<_> = fs::read_dir(&small.0).ok()?.flatten().map(|e| e.path()).collect();
    assert_eq!(left, std::slice::from_ref(&filler), "names were left behind");
    fs::remove_file(&filler).ok()?;
    comes_back(&program, &[]);
    Some(text)
}

/// A file that `--external` named at dump, and nobody gives.
pub(crate) fn nothing_given() -> Option<String> {
    use std::os::unix::fs::MetadataExt as _;
    let mut program = counting("open(O, '>', 'data'); print O 'content'; close O; open(F, '<', 'data')");
    let path = program.folder.join("data");
    let fds = fs::read_dir(format!("/proc/{}/fd", program.pid)).ok()?.flatten();
    let fd = fds.into_iter().find(|fd| fs::read_link(fd.path()).is_ok_and(|to| to == path))?.file_name();
    let info = fs::read_to_string(format!("/proc/{}/fdinfo/{}", program.pid, fd.display())).ok()?;
    let mount: u32 = info.lines().find_map(|l| l.strip_prefix("mnt_id:"))?.trim().parse().ok()?;
    let key = format!("file[{mount:x}:{:x}]", fs::metadata(&path).ok()?.ino());
    program.dump(&["--external", &key]);
    let text = restore_fails(&program, &[]);
    let file = fs::File::open(&path).ok()?;
    rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).ok()?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    comes_back(&program, &["--inherit-fd", &format!("fd[{number}]:{key}")]);
    Some(text)
}

/// Names that a dump with `--link-remap` made stay until the program is back, a failed restore in between or not; a failed
/// dump leaves none.
pub(crate) fn names_of_link_remap() {
    let code =
        "open(F, '>', 'gone'); print F 'x'; F->flush; link 'gone', 'other'; unlink 'gone'; open(O, '>', 'data'); \
                print O 'content'; close O; open(D, '<', 'data')";
    let mut program = counting(code);
    let links = |program: &Program| {
        let names = fs::read_dir(&program.folder).into_iter().flatten().flatten().map(|e| e.file_name());
        names.filter(|n| n.to_string_lossy().starts_with("link_remap.")).count()
    };
    let script = program.folder.join("says-no");
    let no = "#!/bin/sh\n[ $CRTOOLS_SCRIPT_ACTION != post-dump ]\n";
    let written = fs::write(&script, no).and_then(|()| fs::set_permissions(&script, fs::Permissions::from_mode(0o755)));
    written.unwrap_or_else(|e| panic!("{e}"));
    let (pid, script) = (program.pid.to_string(), script.display().to_string());
    let options = ["-t", &pid, "--link-remap", "--action-script", &script];
    fails(&mut Engine::ours().command("dump", &images(&program), &options), &images(&program).join("dump.log"));
    program.moves(20);
    assert_eq!(links(&program), 0, "a dump that failed at its very end left names");
    program.dump(&["--link-remap"]);
    assert_eq!(links(&program), 1);
    let data = program.folder.join("data");
    fs::write(&data, "more content").unwrap_or_else(|e| panic!("{e}"));
    restore_fails(&program, &["--link-remap"]);
    assert_eq!(links(&program), 1, "the checkpoint is of no use without it");
    fs::write(&data, "content").unwrap_or_else(|e| panic!("{e}"));
    comes_back(&program, &["--link-remap"]);
    assert_eq!(links(&program), 0, "the program is back, and so is the name");
}

/// The log has no room: that hinders nobody.
pub(crate) fn full_log() {
    let mut program = counting("");
    let Some(small) = Small::mount(program.folder.join("small"), "size=64k") else { return };
    let _ = fs::write(small.0.join("filler"), vec![1; 128 << 10]);
    let folder = small.0.display().to_string();
    program.dump(&["-W", &folder]);
    comes_back(&program, &["-W", &folder]);
}

/// Bound registers, which no CPU has any more.
pub(crate) fn cpu_lacks_feature() -> Option<String> {
    let program = dumped("", &[]);
    let core = images(&program).join(format!("core-{}.img", program.pid));
    let whole = fs::read(&core).ok()?;
    edit(&core, |text| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let xsave = &mut json["entries"][0]["thread_info"]["fpregs"]["xsave"];
        let features = xsave["xstate_bv"].as_u64().unwrap_or(0);
        xsave["xstate_bv"] = (features | 1 << 3).into();
        xsave["bndreg_state"] = vec![0u64; 8].into();
        json.to_string()
    });
    let text = restore_fails(&program, &[]);
    fs::write(&core, whole).ok()?;
    comes_back(&program, &[]);
    Some(text)
}

/// Instructions of AMD's and Intel's, which no CPU has both.
pub(crate) fn cpu_lacks_instructions() -> Option<String> {
    let program = dumped("", &[]);
    let image = images(&program).join("cpuinfo.img");
    edit(&image, |text| {
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let words = &mut json["entries"][0]["x86_entry"][0]["capability"];
        for (word, bits) in [(6, 1 << 21 | 1 << 16), (18, 1 << 2)] {
            words[word] = (words[word].as_u64().unwrap_or(0) | bits).into();
        }
        json.to_string()
    });
    let text = restore_fails(&program, &[]);
    assert!(text.contains("this CPU lacks fma4, tbm, avx512_4vnniw"), "{text}");
    comes_back(&program, &["--cpu-cap=none"]);
    Some(text)
}
