//! Images that are not what a dump wrote.

use std::path::PathBuf;
use std::{fs, io};

use standstill_tests::program::Program;

use crate::restores::edit;
use crate::support::*;

/// A program that was dumped, with what makes images of several kinds.
fn dumped() -> Program {
    let mut program =
        counting("pipe(R, W); syswrite(W, 'abc'); open(F, '>', 'gone'); print F 'x'; F->flush; unlink 'gone'");
    program.dump(&[]);
    program
}

/// Harms an image, and mends it.
fn with_image(program: &Program, path: PathBuf, harm: impl FnOnce(&PathBuf) -> io::Result<()>) -> Option<String> {
    let whole = fs::read(&path).ok()?;
    harm(&path).ok()?;
    let text = restore_fails(program, &[]);
    fs::write(&path, whole).ok()?;
    program.restore_restless(&[]);
    program.moves(20);
    Some(text)
}

pub(crate) fn no_inventory() -> Option<String> {
    let program = dumped();
    let path = images(&program).join("inventory.img");
    with_image(&program, path, |p| fs::remove_file(p))
}

pub(crate) fn newer_version() -> Option<String> {
    let program = dumped();
    let path = images(&program).join("inventory.img");
    with_image(&program, path, |p| {
        edit(p, |text| {
            text.replace("\"img_version\": 1", "\"img_version\": 99")
                .replace("\"img_version\": 2", "\"img_version\": 99")
        });
        Ok(())
    })
}

pub(crate) fn no_image() -> Option<String> {
    let program = dumped();
    let path = images(&program).join(format!("core-{}.img", program.pid));
    with_image(&program, path, |p| fs::remove_file(p))
}

/// Each image in turn is cut, at its end and in its middle.
pub(crate) fn truncated() -> Option<String> {
    let program = dumped();
    let mut last = None;
    let mut paths: Vec<PathBuf> = fs::read_dir(images(&program)).ok()?.flatten().map(|e| e.path()).collect();
    paths.sort();
    // a stats image is for people, and one that says nothing can lack its end
    paths.retain(|p| p.extension().is_some_and(|e| e == "img"));
    for path in paths {
        let whole = fs::read(&path).ok()?;
        for len in [whole.len() - 1, whole.len() / 2, 3] {
            if len <= 8 && whole.len() <= 8 && len != 3 {
                continue;
            }
            fs::write(&path, &whole[..len]).ok()?;
            let text = restore_fails(&program, &[]);
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            // a deleted file that is too short is found out when it has been made
            let named = text.contains(name.trim_end_matches(".img"))
                || text.contains("has bad size")
                || text.contains("past the end of the pages image");
            assert!(named, "{name}, {len} of {} bytes: {text}", whole.len());
            if name.starts_with("core") {
                last = Some(text);
            }
        }
        fs::write(&path, &whole).ok()?;
    }
    program.restore_restless(&[]);
    program.moves(20);
    last
}

pub(crate) fn not_an_image() -> Option<String> {
    let program = dumped();
    let path = images(&program).join("pstree.img");
    with_image(&program, path, |p| fs::write(p, "this is no image at all"))
}
