//! Every failure that a user can provoke: what it says, that the program goes on unharmed or that nothing is left of the
//! restore, and that the remedy helps. README's table "When something does not work" is made from the list in here, and
//! compared with it: `STANDSTILL_README=write cargo test -p standstill-tests --test failures` writes it anew.

mod dumps;
mod images;
mod restores;
mod support;

use std::fs;
use std::path::Path;

/// One row of the table.
struct Row {
    /// What the last error line has; `…` stands for what differs.
    message: &'static str,
    cause: &'static str,
    remedy: &'static str,
}

/// Are the parts of a pattern in a line, in this order?
fn matches(line: &str, pattern: &str) -> bool {
    let mut rest = line;
    pattern.split('…').all(|part| match rest.find(part.trim()) {
        Some(at) => {
            rest = &rest[at + part.trim().len()..];
            true
        }
        None => false,
    })
}

/// Provokes it, and looks for the message. Nothing to provoke it with is a test that was skipped.
fn said(row: &Row, provoke: fn() -> Option<String>) {
    let Some(text) = provoke() else { return };
    let found = text.lines().any(|line| line.contains("Error") && matches(line, row.message));
    assert!(found, "no line has {:?}:\n{text}", row.message);
}

macro_rules! failures {
    ($($file:ident::$name:ident: $message:literal, $cause:literal, $remedy:literal;)*) => {
        $(
            #[test]
            fn $name() {
                let row = Row { message: $message, cause: $cause, remedy: $remedy };
                said(&row, $file::$name);
            }
        )*
        const ROWS: &[Row] = &[$(Row { message: $message, cause: $cause, remedy: $remedy }),*];
    };
}

failures! {
    dumps::not_a_session_leader: "The root process … is not a session leader. Consider using --shell-job option",
        "it was started from a shell",
        "dump and restore it with `-j`; or start it with `setsid`, its standard streams on files or `/dev/null`";
    dumps::terminal_outside: "Found slave peer index … without correspond master peer; --shell-job …",
        "the other end of its terminal is held by a program outside of the tree",
        "`-j`; or dump that program (tmux, sshd), too; or start it without a terminal";
    dumps::socket_outside: "unix socket …, connected to unix socket … outside the tree, cannot be carried",
        "another program has the other end",
        "dump that program, too; or close the connection; or `--ext-unix-sk` where it has a name";
    dumps::connected: "TCP socket … cannot be carried: Connected TCP socket, consider using --tcp-established option.",
        "a connection would have to be carried, and packets be held up until it is restored",
        "`--tcp-established` at dump and restore, or `--tcp-close`";
    dumps::unaccepted: "TCP socket … connections in flight cannot be carried",
        "somebody has connected, and the program has not called accept yet",
        "dump again a moment later; or `--skip-in-flight`, and those connections are lost";
    dumps::locked: "Some file locks are hold by dumping tasks! You can try --file-locks to dump them.",
        "while it is dead others could take the lock",
        "`--file-locks`, and keep others from the file";
    dumps::linked_elsewhere: "Can't create link remap for …. Use --link-remap option.",
        "a file was deleted under the name that the program knows, and has another one",
        "`--link-remap`: the file gets a name beside the old one until it is restored";
    dumps::large_and_deleted: "Can't dump ghost file … of … size, increase limit (--ghost-limit)",
        "a deleted file must go into the checkpoint, and is large",
        "`--ghost-limit 1G`, or as much as it takes";
    dumps::traced: "a task that process … traces cannot be carried",
        "a debugger or strace is attached",
        "detach it";
    dumps::nested_namespace: "a nested … namespace cannot be carried",
        "a process of the tree has a namespace of its own that its root is not in",
        "dump that process alone, or end it";
    dumps::no_such_process: "there is no process …",
        "it has ended, or has another id in this PID namespace",
        "`pgrep NAME`";
    dumps::kernel_thread: "a kernel thread cannot be carried",
        "it belongs to the kernel",
        "name a process";
    dumps::ourselves: "The criu itself is within dumped tree: process … started it",
        "a dump cannot stop the one who makes it",
        "start it from another session";
    dumps::thread: "… is a thread of process …: name the process",
        "`-t` was given the id of a thread",
        "the id of the process";
    dumps::no_capability: "CAP_CHECKPOINT_RESTORE is missing",
        "Standstill was not started by root, or a container has taken the capability away",
        "as the message says; in a container `--cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE`";
    dumps::another_user: "CAP_CHECKPOINT_RESTORE is missing",
        "Standstill was not started by root, or a container has taken the capability away",
        "as the message says; in a container `--cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE`";
    dumps::no_folder: "Couldn't open image dir …",
        "the folder is not there",
        "`mkdir` it; is `-D` right?";
    dumps::no_work_folder: "Can't change directory to …: No such file or directory",
        "the folder of `-W` is not there",
        "`mkdir` it";
    dumps::read_only: "…: Read-only file system",
        "images cannot be written there",
        "another `-D`";
    dumps::disk_full: "…: No space left on device",
        "the checkpoint takes about as much room as the program has memory. The program runs on",
        "another `-D`, or `--compress`; what lies in the folder is no checkpoint and can go";
    dumps::interrupted: "interrupted",
        "somebody pressed ^C, or sent SIGTERM. The program runs on",
        "dump again";
    dumps::never_stops: "its stop (it is in a system call that no signal interrupts: …) did not happen within … s",
        "a dead NFS server, or a child of vfork that does not end. Nothing has been changed",
        "end the cause; `--timeout` says how long to try";
    restores::id_in_use: "Can't fork for …: File exists; the id is in use",
        "the process id belongs to somebody, maybe to a zombie, or is that of a session or group; or the program is still there (`-R`)",
        "wait, or restore in a new PID namespace (above)";
    restores::id_of_child_in_use: "Can't fork for …: File exists; the id is in use",
        "the process id belongs to somebody, maybe to a zombie, or is that of a session or group; or the program is still there (`-R`)",
        "wait, or restore in a new PID namespace (above)";
    restores::ids_end_before: "Can't fork for …: Invalid argument; ids end before it here",
        "the process id is not below `pid_max`",
        "raise `/proc/sys/kernel/pid_max`";
    restores::file_missing: "…: open: No such file or directory",
        "the program has the file open or mapped, and it is gone",
        "bring it back; of what you dump with `-R` keep the files, too";
    restores::file_grown: "File … has bad size … (expect …)",
        "the file was changed, or replaced (an update of a package, say)",
        "bring back the one that was there at the dump";
    restores::other_program: "File … has bad size … (expect …)",
        "the file was changed, or replaced (an update of a package, say)",
        "bring back the one that was there at the dump";
    restores::file_mode: "File … has bad mode … (expect …)",
        "its mode was changed",
        "`chmod` it back, or `--skip-file-rwx-check`";
    restores::other_build: "File … has bad build-ID",
        "the program or a library is another build",
        "bring back the build that was dumped";
    restores::no_shell_job_at_restore: "The root process … is not a session leader. Consider using --shell-job option",
        "it was started from a shell",
        "dump and restore it with `-j`; or start it with `setsid`, its standard streams on files or `/dev/null`";
    restores::connected_at_restore: "TCP socket … cannot be carried: Connected TCP socket in image",
        "it was dumped with `--tcp-established`",
        "the same option, or `--tcp-close`";
    restores::address_in_use: "the port of TCP socket … is in use",
        "another program listens there, or the program itself was started anew",
        "end the other one";
    restores::descriptor_above_limit: "descriptor … of the checkpoint is not below …, the limit of open files here",
        "the hard limit is lower than where it was dumped",
        "`ulimit -Hn`, or `LimitNOFILE=` of the service";
    restores::smaller_limit: "its limit \"…\" is …, and ours …",
        "who restores may not give more than it has itself",
        "raise the hard limit, or give it CAP_SYS_RESOURCE";
    restores::no_capability_at_restore: "CAP_CHECKPOINT_RESTORE is missing",
        "Standstill was not started by root, or a container has taken the capability away",
        "as the message says; in a container `--cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE`";
    restores::another_user_at_restore: "CAP_CHECKPOINT_RESTORE is missing",
        "Standstill was not started by root, or a container has taken the capability away",
        "as the message says; in a container `--cap-add CHECKPOINT_RESTORE --cap-add SYS_PTRACE`";
    restores::no_folder_at_restore: "Couldn't open image dir …",
        "the folder is not there",
        "`mkdir` it; is `-D` right?";
    restores::no_work_folder_at_restore: "Can't change directory to …: No such file or directory",
        "the folder of `-W` is not there",
        "`mkdir` it";
    restores::no_room_for_deleted: "…: No space left on device",
        "a deleted file of the program comes back where it was, and there is no room",
        "make room there";
    restores::nothing_given: "… is external: say which file it is with --inherit-fd fd[N]:…",
        "`--external` named it at the dump, so the checkpoint has nothing of it",
        "open one, and give its number: `--inherit-fd 'fd[5]:file[1b:2c]' 5<data`";
    restores::cpu_lacks_feature: "…, which the checkpoint has in use and this CPU lacks, cannot be carried",
        "it was dumped on a newer CPU",
        "restore on a CPU that has it; next time start the program where it finds less";
    restores::cpu_lacks_instructions: "CPU instruction capabilities do not match run time: this CPU lacks …",
        "it was dumped on a newer CPU, whose instructions the program may use",
        "restore on a CPU that has them; or `--cpu-cap=none` if you know that the program does not use them";
    images::no_inventory: "image inventory.img is missing",
        "the dump failed or was killed, or the folder is another one",
        "dump again";
    images::no_image: "image … is missing",
        "the folder was copied in part",
        "copy all of it";
    images::truncated: "image …, entry …",
        "an image was cut or changed",
        "copy it again; `standstill image info` finds out which are whole";
    images::not_an_image: "image …: magic … instead of …",
        "the file is not what its name says",
        "copy it again";
    images::newer_version: "Not supported images version …",
        "a newer program made the checkpoint",
        "restore with that one";
}

#[test]
fn names_of_link_remap() {
    restores::names_of_link_remap();
}

#[test]
fn a_full_log() {
    restores::full_log();
}

const BEGIN: &str = "<!-- made by tests/tests/failures -->\n";

/// The table in README is what is tested here.
#[test]
fn table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../README.md");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{e}"));
    let mut table = format!("{BEGIN}| message | why | what helps |\n|---|---|---|\n");
    let mut seen = std::collections::HashSet::new();
    for row in ROWS.iter().filter(|r| seen.insert((r.message, r.cause))) {
        table += &format!("| `{}` | {} | {} |\n", row.message, row.cause, row.remedy);
    }
    let Some(begin) = text.find(BEGIN) else { panic!("README has no table of failures") };
    let end = text[begin..].find("\n\n").map_or(text.len(), |n| begin + n + 1);
    if text[begin..end] == table {
        return;
    }
    assert!(std::env::var_os("STANDSTILL_README").is_some(), "README's table should be:\n{table}");
    fs::write(&path, text[..begin].to_owned() + &table + &text[end..]).unwrap_or_else(|e| panic!("{e}"));
}
