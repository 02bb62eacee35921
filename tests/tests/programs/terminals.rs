//! tmux with shells, stopped jobs, an editor and a pager, one terminal each.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use standstill_tests::engine::Engine;
use standstill_tests::process;
use standstill_tests::program::{eventually, folder, program, Program, LIMIT};

struct Tmux {
    path: PathBuf,
    folder: PathBuf,
    socket: PathBuf,
}

impl Tmux {
    fn say(&self, words: &[&str]) -> String {
        let mut command = Command::new(&self.path);
        command.arg("-S").arg(&self.socket).args(["-f", "/dev/null"]).args(words).current_dir(&self.folder);
        process::run(&mut command, Duration::from_secs(20)).map(|o| o.text).unwrap_or_default()
    }
    /// Keys, as somebody at the window would type them.
    fn keys(&self, window: u32, keys: &[&str]) {
        let target = format!("main:{window}");
        self.say(&[&["send-keys", "-t", &target], keys].concat());
    }
    fn screen(&self, window: u32) -> String {
        self.say(&["capture-pane", "-p", "-t", &format!("main:{window}")])
    }
    fn shows(&self, window: u32, text: &str) {
        let shown = process::within(LIMIT, || self.screen(window).contains(text));
        assert!(shown, "no {text:?} in window {window}:\n{}", self.screen(window));
    }
}

#[test]
fn tmux() {
    let (Some(path), Some(vim), Some(bash)) = (program("tmux"), program("vim.tiny"), program("bash")) else { return };
    let at = folder("tmux");
    let tmux = Tmux { path: path.clone(), folder: at.clone(), socket: at.join("socket") };
    let mut command = Command::new(&path);
    command.arg("-S").arg(&tmux.socket).args(["-f", "/dev/null", "-D"]);
    command.env("HOME", &at).env("TERM", "screen").env_remove("TMUX").env("SHELL", &bash);
    let mut server = Program::start("tmux", at.clone(), &mut command);
    eventually("tmux", || tmux.socket.exists());
    let shell = format!("{} --norc", bash.display());
    tmux.say(&["new-session", "-d", "-x", "91", "-y", "23", "-s", "main", &shell]);
    let file = at.join("text");
    tmux.say(&["new-window", "-t", "main:1", &format!("{} -n {}", vim.display(), file.display())]);
    tmux.say(&["new-window", "-t", "main:2", &shell]);
    // a variable, a job in the background, one that is stopped
    tmux.keys(0, &["PS1='ready> '; X=remembered; sleep 1000 &", "Enter"]);
    tmux.shows(0, "ready> ");
    // a line that comes before the shell has given the terminal away would not be a line
    tmux.keys(0, &["cat > kept", "Enter"]);
    eventually("cat", || at.join("kept").exists());
    std::thread::sleep(Duration::from_millis(100));
    tmux.keys(0, &["first line", "Enter"]);
    eventually("cat", || fs::read_to_string(at.join("kept")).is_ok_and(|t| t == "first line\n"));
    tmux.keys(0, &["C-z"]);
    tmux.shows(0, "Stopped");
    tmux.keys(1, &["i", "from before"]);
    tmux.shows(1, "from before");
    // a shell that prints all the time
    tmux.keys(2, &["for ((n=0;;n++)); do echo line $n; sleep 0.01; done", "Enter"]);
    tmux.shows(2, "line 3");
    for _ in 0..2 {
        let images = at.join("images");
        for _ in 0..9 {
            patiently(|| Engine::ours().dump(server.pid, &images, &["-R"]).map(drop));
        }
        patiently(|| server.try_dump(&[]));
        server.restore_restless(&[]);
        let now = tmux.screen(2);
        eventually("the shell that prints", || tmux.screen(2) != now);
    }
    tmux.keys(1, &["Enter", "from after", "Escape", ":wq", "Enter"]);
    eventually("the editor's file", || fs::read_to_string(&file).is_ok_and(|t| t == "from before\nfrom after\n"));
    tmux.keys(0, &["clear; echo $X; jobs; stty size", "Enter"]);
    tmux.shows(0, "remembered");
    tmux.shows(0, "23 91");
    let screen = tmux.screen(0);
    assert!(screen.contains("Running") && screen.contains("Stopped"), "{screen}");
    tmux.keys(0, &["clear; fg %2", "Enter"]);
    tmux.shows(0, "cat > kept");
    std::thread::sleep(Duration::from_millis(100));
    tmux.keys(0, &["second line", "Enter", "C-d"]);
    let kept = || fs::read_to_string(at.join("kept")).unwrap_or_default();
    eventually("the job that was stopped", || kept() == "first line\nsecond line\n");
    tmux.keys(0, &["clear; fg %1", "Enter"]);
    tmux.shows(0, "sleep 1000");
    tmux.keys(0, &["C-c"]);
    tmux.keys(0, &["echo status $?", "Enter"]);
    tmux.shows(0, "status 130");
    tmux.say(&["kill-server"]);
    server.gone();
}

/// A dump that comes upon bytes between the two ends of a terminal is made once more, as its message says.
fn patiently(mut dump: impl FnMut() -> Result<(), standstill_tests::engine::Failure>) {
    for _ in 0..20 {
        match dump() {
            Ok(()) => return,
            Err(e) if e.text.contains("under way in the terminal") => std::thread::sleep(Duration::from_millis(15)),
            Err(e) => panic!("{e}"),
        }
    }
    panic!("there are always bytes under way");
}
