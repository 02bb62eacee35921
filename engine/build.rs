//! Builds the executor (restorer/src/executor.rs) for the target into one flat piece, and refuses what it cannot place:
//! relocations, data, an entry that is not the first byte.

use std::path::PathBuf;
use std::process::Command;
use std::{env, fs};

fn main() {
    let source = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../restorer/src");
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    for file in ["executor.rs", "plan.rs", "executor.ld"] {
        println!("cargo:rerun-if-changed={}", source.join(file).display());
    }
    let elf = out.join("executor.elf");
    let script = source.join("executor.ld");
    let status = Command::new(env::var("RUSTC").expect("cargo sets it"))
        .args(["--edition", "2021", "--crate-name", "executor", "--crate-type", "bin"])
        .args(["--target", &env::var("TARGET").expect("cargo sets it")])
        .args(["-C", "panic=abort", "-C", "opt-level=2", "-C", "relocation-model=pic"])
        .args(["-C", "linker=ld", "-C", "linker-flavor=ld"])
        .args([
            "-C",
            &format!(
                "link-args=-T {} --gc-sections -static --no-dynamic-linker --no-pie -z noexecstack --build-id=none",
                script.display()
            ),
        ])
        .arg("-o")
        .arg(&elf)
        .arg(source.join("executor.rs"))
        .status()
        .expect("rustc runs");
    assert!(status.success(), "the executor does not build");
    let bytes = fs::read(&elf).expect("the executor was built");
    fs::write(out.join("executor.bin"), flat(&bytes)).expect("OUT_DIR can be written");
}

fn flat(bytes: &[u8]) -> &[u8] {
    let elf = goblin::elf::Elf::parse(bytes).expect("the linker makes ELF files");
    let relocations = elf.dynrels.len() + elf.dynrelas.len() + elf.pltrelocs.len() + elf.shdr_relocs.len();
    assert_eq!(relocations, 0, "the executor has relocations, which nobody would apply");
    assert_eq!(elf.header.e_entry, 0, "the executor is not entered at its first byte");
    let loads: Vec<_> = elf
        .program_headers
        .iter()
        .filter(|p| p.p_type == goblin::elf::program_header::PT_LOAD && p.p_memsz > 0)
        .collect();
    assert!(
        loads.len() == 1 && loads[0].p_vaddr == 0 && loads[0].p_filesz == loads[0].p_memsz && !loads[0].is_write(),
        "the executor is not one read-only piece"
    );
    &bytes[loads[0].file_range()]
}
