//! The programs that are compared.

use anyhow::{bail, ensure, Context as _, Result};
use std::path::{Path, PathBuf};
use std::process::Command;

/// One of them.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    /// For the table.
    pub(crate) name: String,
    /// What is run.
    pub(crate) path: PathBuf,
}

/// `standstill` of the profile that this program was built in. Cargo does not build it along with us, so it is asked to.
pub(crate) fn ours() -> Result<Program> {
    let me = std::env::current_exe().context("readlink /proc/self/exe")?;
    let path = me.with_file_name("standstill");
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut build = Command::new(cargo);
        build.args(["build", "--quiet", "--package", "standstill", "--bin", "standstill"]);
        build.arg("--manifest-path").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml"));
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        // the folder of the profile lies in the target folder
        if let Some(target) = me.ancestors().nth(2) {
            build.arg("--target-dir").arg(target);
        }
        ensure!(build.status().context("cargo")?.success(), "standstill does not build");
    }
    ensure!(path.exists(), "{} is missing: cargo build --release", path.display());
    if cfg!(debug_assertions) {
        println!("This is a debug build; its figures say nothing. Use --release.\n");
    }
    Ok(Program { name: "standstill".to_owned(), path })
}

/// CRIU of $CRIU or the PATH, if it is version 4 or newer. One that was named must do.
pub(crate) fn criu() -> Result<Option<Program>> {
    if let Some(named) = std::env::var_os("CRIU") {
        let path = PathBuf::from(named);
        let version = version(&path).with_context(|| format!("$CRIU is {}", path.display()))?;
        ensure!(major(&version) >= Some(4), "$CRIU is version {version}, older than 4");
        return Ok(Some(Program { name: format!("CRIU {version}"), path }));
    }
    let folders = std::env::var_os("PATH").unwrap_or_default();
    for path in std::env::split_paths(&folders).map(|f| f.join("criu")).filter(|p| p.exists()) {
        match version(&path) {
            Ok(version) if major(&version) >= Some(4) => {
                return Ok(Some(Program { name: format!("CRIU {version}"), path }))
            }
            Ok(version) => println!("{} is version {version}, older than 4", path.display()),
            Err(e) => println!("{}: {e:#}", path.display()),
        }
    }
    Ok(None)
}

fn version(criu: &Path) -> Result<String> {
    let output = Command::new(criu).arg("--version").output().context("it does not start")?;
    let text = String::from_utf8_lossy(&output.stdout);
    // ours under the name criu says so here
    if text.contains("GitID: standstill") {
        bail!("this is Standstill, and no CRIU");
    }
    let version = text.lines().find_map(|l| l.strip_prefix("Version: ")).context("it does not tell its version")?;
    Ok(version.trim().to_owned())
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::major;

    #[test]
    fn versions() {
        assert_eq!(major("4.2"), Some(4));
        assert_eq!(major("10"), Some(10));
        assert_eq!(major("v4"), None);
        assert!(major("3.17.1") < Some(4));
    }
}
