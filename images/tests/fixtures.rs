//! Checkpoints that CRIU 4.2 made: every image says what crit says it does, and comes back byte for byte.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use standstill_images::json::{self, Style};
use standstill_images::{ImageKind, Images};

fn checkpoints() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoints");
    let mut folders: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 3);
    folders
}

/// Path, file name and bytes of every image of a checkpoint that has a header.
fn images(checkpoint: &Path) -> Vec<(String, Vec<u8>)> {
    let mut images = Vec::new();
    for entry in fs::read_dir(checkpoint.join("images")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        // runc leaves this one there.
        if name == "descriptors.json" {
            continue;
        }
        let (kind, _) = ImageKind::from_file_name(&name).unwrap_or_else(|| panic!("{name} is of no kind"));
        if !kind.is_raw() {
            images.push((name, fs::read(path).unwrap()));
        }
    }
    assert!(images.len() > 10);
    images
}

#[test]
fn decode_says_what_crit_says() {
    let mut seen = 0;
    for checkpoint in checkpoints() {
        for (name, bytes) in images(&checkpoint) {
            let path = checkpoint.join("json").join(format!("{name}.json"));
            let expected = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let image = json::decode(&name, &bytes, Style { pretty: true, payload: true }).unwrap();
            let data: Value = serde_json::from_str(&expected).unwrap();
            assert_eq!(image, data, "{}", path.display());
            assert_eq!(json::to_text(&image, true), expected.trim_end(), "{}", path.display());
            seen += 1;
        }
        let decoded = fs::read_dir(checkpoint.join("json")).unwrap().count();
        assert_eq!(decoded, images(&checkpoint).len(), "{}: every JSON file has its image", checkpoint.display());
    }
    assert!(seen > 60, "{seen}");
}

#[test]
fn encode_gives_the_same_bytes() {
    for checkpoint in checkpoints() {
        for (name, bytes) in images(&checkpoint) {
            for pretty in [true, false] {
                let image = json::decode(&name, &bytes, Style { pretty, payload: true }).unwrap();
                let text = json::to_text(&image, pretty);
                assert!(json::encode_text(&name, text.as_bytes()).unwrap() == bytes, "{name} pretty={pretty}");
            }
        }
    }
}

#[test]
fn truncated_at_every_byte() {
    for checkpoint in checkpoints() {
        for (name, bytes) in images(&checkpoint) {
            if bytes.len() > 1000 {
                continue;
            }
            let (kind, _) = ImageKind::from_file_name(&name).unwrap();
            for size in 0..bytes.len() {
                let style = Style { pretty: true, payload: true };
                let Ok(image) = json::decode(&name, &bytes[..size], style) else { continue };
                // What still decodes ended between two entries, or in a payload that is as long as the file is.
                let again = json::encode(&name, &image).unwrap();
                assert_eq!(again, &bytes[..size], "{name} {size}");
                let _ = json::info(&name, &bytes[..size]);
                assert!(size >= if kind == ImageKind::Inventory { 4 } else { 8 });
            }
        }
    }
}

#[test]
fn every_byte_changed() {
    for checkpoint in checkpoints() {
        for (name, bytes) in images(&checkpoint) {
            if bytes.len() > 300 {
                continue;
            }
            for place in 0..bytes.len() {
                for change in [0x01, 0x80, 0xff] {
                    let mut bytes = bytes.clone();
                    bytes[place] ^= change;
                    // Right or wrong, but never a panic, and what was read can be written.
                    if let Ok(image) = json::decode(&name, &bytes, Style { pretty: true, payload: true }) {
                        let again = json::encode(&name, &image).unwrap();
                        let second = json::decode(&name, &again, Style { pretty: true, payload: true }).unwrap();
                        assert_eq!(image, second, "{name} {place} {change}");
                    }
                }
            }
        }
    }
}

/// Reads every image into its Rust types and writes it again.
#[test]
fn typed_round_trip() {
    use standstill_images::{proto, Entry, Reader, WithPayload, Writer};

    fn plain<T: Entry>(reader: Reader<'_>) -> Vec<u8> {
        let mut out = Writer::new(reader.kind(), "test", Vec::new());
        for entry in reader.all::<T>().unwrap() {
            out.write(&entry).unwrap();
        }
        out.into_inner().unwrap()
    }

    fn with_payload<T: WithPayload>(reader: Reader<'_>) -> Vec<u8> {
        let mut out = Writer::new(reader.kind(), "test", Vec::new());
        for (entry, payload) in reader.all_with_payload::<T>().unwrap() {
            out.write_with_payload(&entry, &payload).unwrap();
        }
        out.into_inner().unwrap()
    }

    for checkpoint in checkpoints() {
        for (name, bytes) in images(&checkpoint) {
            let (kind, _) = ImageKind::from_file_name(&name).unwrap();
            let reader = Reader::new(kind, &name, &bytes).unwrap();
            let again = match kind {
                ImageKind::Inventory => plain::<proto::InventoryEntry>(reader),
                ImageKind::Core => plain::<proto::CoreEntry>(reader),
                ImageKind::Mm => plain::<proto::MmEntry>(reader),
                ImageKind::Files => plain::<proto::FileEntry>(reader),
                ImageKind::Fdinfo => plain::<proto::FdinfoEntry>(reader),
                ImageKind::Cgroup => plain::<proto::CgroupEntry>(reader),
                ImageKind::Mnts => plain::<proto::MntEntry>(reader),
                ImageKind::TtyInfo => plain::<proto::TtyInfoEntry>(reader),
                ImageKind::PipesData | ImageKind::FifoData => with_payload::<proto::PipeDataEntry>(reader),
                ImageKind::SkQueues => with_payload::<proto::SkPacketEntry>(reader),
                ImageKind::TcpStream => with_payload::<proto::TcpStreamEntry>(reader),
                ImageKind::IpcnsShm => with_payload::<proto::IpcShmEntry>(reader),
                ImageKind::IpcnsSem => with_payload::<proto::IpcSemEntry>(reader),
                ImageKind::IpcnsMsg => with_payload::<proto::IpcMsgEntry>(reader),
                ImageKind::Pagemap | ImageKind::ShmemPagemap => {
                    let (head, entries) = reader.pagemap().unwrap();
                    let mut out = Writer::new(kind, "test", Vec::new());
                    out.write(&head).unwrap();
                    for entry in &entries {
                        out.write(entry).unwrap();
                    }
                    out.into_inner().unwrap()
                }
                _ => continue,
            };
            assert!(again == bytes, "{name}");
        }
        let images = Images::open_folder(checkpoint.join("images")).unwrap();
        assert!(images.exists(ImageKind::Inventory, ()).unwrap());
        assert!(!images.exists(ImageKind::Core, 1_u32).unwrap() || checkpoint.ends_with("container"));
        let missing = images.read_one::<proto::CoreEntry>(ImageKind::Core, 4_000_000_u32).unwrap_err();
        assert!(missing.is_missing());
    }
}

/// What crit's `x` printed of these checkpoints lies beside them. (It stops with an error at a task that is dead; by then
/// it had printed all others.)
#[test]
fn views_are_those_of_crit() {
    use standstill_images::explore::{view, View};

    for checkpoint in checkpoints() {
        let images = Images::open_folder(checkpoint.join("images")).unwrap();
        for (what, name) in [(View::Ps, "ps"), (View::Fds, "fds"), (View::Mems, "mems"), (View::Rss, "rss")] {
            let checkpoint = checkpoint.file_name().unwrap().to_str().unwrap();
            let path = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../tests/fixtures/explore")
                .join(format!("{checkpoint}.{name}.txt"));
            let expected = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            assert_eq!(view(&images, what).unwrap(), expected, "{}", path.display());
        }
    }
}

#[test]
fn info_counts_entries() {
    let images = [
        ("process", "files.img", "FILES"),
        ("process", "pagemap-26694.img", "PAGEMAP"),
        ("sockets", "sk-queues.img", "SK_QUEUES"),
    ];
    for (checkpoint, name, magic) in images {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/checkpoints");
        let bytes = fs::read(path.join(checkpoint).join("images").join(name)).unwrap();
        let text = fs::read_to_string(path.join(checkpoint).join("json").join(format!("{name}.json"))).unwrap();
        let data: Value = serde_json::from_str(&text).unwrap();
        let entries = data["entries"].as_array().unwrap().len() - usize::from(magic == "PAGEMAP");
        assert_eq!(json::info(name, &bytes).unwrap(), serde_json::json!({"magic": magic, "count": entries}));
    }
}

/// An image of each kind that crit knows, with random values in all fields.
#[test]
fn all_fields_of_all_kinds() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/crit");
    let mut seen = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "img") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let name = path.display().to_string();
        let expected = fs::read_to_string(path.with_extension("json")).unwrap();
        let image = json::decode(&name, &bytes, Style { pretty: true, payload: true }).unwrap();
        assert_eq!(json::to_text(&image, true), expected, "{name}");
        assert!(json::encode_text(&name, expected.as_bytes()).unwrap() == bytes, "{name}");
        seen += 1;
    }
    assert!(seen > 50, "{seen}");
}
