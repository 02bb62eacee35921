//! The programs that dump and restore: ours, and CRIU where there is one.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use crate::process;

/// Longer than any dump or restore of a guest takes on a machine that has other work too.
const LIMIT: Duration = Duration::from_secs(60);

/// A checkpoint program.
#[derive(Debug, Clone)]
pub struct Engine {
    /// Where it is.
    pub path: PathBuf,
    /// It is CRIU.
    pub is_criu: bool,
}

/// A dump or restore that failed.
#[derive(Debug)]
pub struct Failure {
    what: String,
    /// The exit code; `None`: it did not end.
    pub code: Option<i32>,
    /// What it printed, and its log.
    pub text: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => writeln!(f, "{} failed with {code}:", self.what)?,
            None => writeln!(f, "{} did not end within {} seconds:", self.what, LIMIT.as_secs())?,
        }
        // errors first, then how it came to them
        let lines: Vec<&str> = self.text.lines().collect();
        for line in lines.iter().filter(|l| l.contains("Error")).take(10) {
            writeln!(f, "  {line}")?;
        }
        writeln!(f, "  …")?;
        for line in &lines[lines.len().saturating_sub(12)..] {
            writeln!(f, "  {line}")?;
        }
        Ok(())
    }
}

/// The folder of the programs that were built with this test.
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().unwrap_or_default();
    let folder = own.parent().unwrap_or(Path::new("."));
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    folder.to_owned()
}

impl Engine {
    /// Ours: $STANDSTILL_BIN, or what was built beside this test.
    ///
    /// # Panics
    /// If it is in neither place.
    pub fn ours() -> Engine {
        let named = std::env::var_os("STANDSTILL_BIN").map(PathBuf::from);
        let beside = programs().join("standstill");
        let release = beside.parent().and_then(Path::parent).unwrap_or(Path::new(".")).join("release/standstill");
        let found = named.into_iter().chain([beside, release]).find(|p| p.is_file());
        let Some(path) = found else {
            panic!("there is no standstill: cargo build -p standstill, or say where it is with STANDSTILL_BIN")
        };
        Engine { path, is_criu: false }
    }

    /// CRIU: $CRIU, or the one that a shell would find.
    ///
    /// # Errors
    /// Why there is none.
    pub fn criu() -> Result<Engine, String> {
        static FOUND: OnceLock<Result<PathBuf, String>> = OnceLock::new();
        let found = FOUND.get_or_init(|| {
            let named = std::env::var_os("CRIU").map(PathBuf::from);
            let folders = std::env::var_os("PATH").unwrap_or_default();
            let on_path = || std::env::split_paths(&folders).map(|f| f.join("criu")).find(|p| p.is_file());
            let path = named.or_else(on_path).ok_or("no CRIU here ($CRIU, or criu on PATH)")?;
            let output = Command::new(&path).arg("--version").output();
            let text = output.map_err(|e| format!("{}: {e}", path.display()))?.stdout;
            let text = String::from_utf8_lossy(&text).into_owned();
            let version = text.lines().find_map(|l| l.strip_prefix("Version: ")).unwrap_or("").to_owned();
            let major: u32 = version.split('.').next().and_then(|m| m.parse().ok()).unwrap_or(0);
            if major < 4 {
                return Err(format!("{} is CRIU {version}, not 4 or newer", path.display()));
            }
            Ok(path)
        });
        found.clone().map(|path| Engine { path, is_criu: true })
    }

    /// The program.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn name(&self) -> &'static str {
        if self.is_criu {
            "CRIU"
        } else {
            "standstill"
        }
    }

    /// A command of this program, with the options that every test uses.
    pub fn command(&self, verb: &str, images: &Path, options: &[&str]) -> Command {
        let mut command = Command::new(&self.path);
        command.arg(verb).arg("-D").arg(images).args(["-o", &format!("{verb}.log"), "-v4"]).args(options);
        command
    }

    fn run(&self, verb: &str, images: &Path, options: &[&str]) -> Result<String, Failure> {
        let what = format!("{} {verb} {}", self.name(), options.join(" "));
        let output = match process::run(&mut self.command(verb, images, options), LIMIT) {
            Ok(output) => output,
            Err(e) => return Err(Failure { what, code: None, text: e.to_string() }),
        };
        if output.code == Some(0) {
            return Ok(output.text);
        }
        let log = std::fs::read(images.join(format!("{verb}.log"))).unwrap_or_default();
        let text = format!("{}\n{}", String::from_utf8_lossy(&log), output.text);
        Err(Failure { what, code: output.code, text })
    }

    /// Dumps a tree into a folder, which is made.
    ///
    /// # Errors
    /// What the program said.
    pub fn dump(&self, pid: i32, images: &Path, options: &[&str]) -> Result<String, Failure> {
        let pid = pid.to_string();
        let made = std::fs::create_dir_all(images);
        made.map_err(|e| Failure { what: "making a folder for images".into(), code: None, text: e.to_string() })?;
        let mut all = vec!["-t", &pid];
        all.extend(options);
        self.run("dump", images, &all)
    }

    /// Restores a tree, and lets it run. Its ids may be somebody else's by accident, for a moment: then once more.
    ///
    /// # Errors
    /// What the program said.
    pub fn restore(&self, images: &Path, options: &[&str]) -> Result<String, Failure> {
        let mut all = vec!["-d"];
        all.extend(options);
        let mut turns = 0;
        loop {
            match self.run("restore", images, &all) {
                Err(e) if e.text.contains("File exists") && turns < 5 => turns += 1,
                done => return done,
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
