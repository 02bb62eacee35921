//! With `file://`: order, what is there at which time, what is left. Faults of servers are tested beside a server, in
//! `tests/tests/storage.rs`.

use super::*;
use standstill_images::store::sealed::{Key, SealedStore};
use standstill_images::Store;
use std::path::PathBuf;
use std::sync::Arc;

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("standstill-storage-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Self(path)
    }

    fn url(&self) -> String {
        format!("file://{}", self.0.display())
    }

    fn create(&self) -> ObjectStorage {
        ObjectStorage::create(&self.url(), &Settings::default()).unwrap()
    }

    fn open(&self) -> standstill_images::Result<ObjectStorage> {
        ObjectStorage::open(&self.url(), &Settings::default())
    }

    fn files(&self) -> Vec<String> {
        let mut names: Vec<String> =
            std::fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn content(size: usize) -> Vec<u8> {
    (0..size as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect()
}

fn put(store: &dyn Store, name: &str, size: usize) {
    let mut image = store.create(name).unwrap();
    image.write_all(&content(size)).unwrap();
    image.finish().unwrap();
}

const SIZES: [(&str, usize); 5] =
    [("empty.img", 0), ("small.img", 5), ("part.img", PART), ("parts.img", PART + PIECE + 3), ("inventory.img", 77)];

fn check_content(store: &dyn Store) {
    for (name, size) in SIZES {
        assert!(store.read(name).unwrap() == content(size), "{name}");
        let image = store.open(name).unwrap();
        assert_eq!(image.len(), size as u64);
        let middle = size / 3..size - size / 5;
        let mut part = vec![0; middle.len()];
        image.read_exact_at(&mut part, middle.start as u64).unwrap();
        assert!(part == content(size)[middle]);
        assert!(image.read_exact_at(&mut [0], size as u64).is_err());
    }
}

#[test]
fn the_inventory_is_last() {
    let place = Place::new("order");
    let store = place.create();
    assert_eq!(place.files(), [MARKER]);
    for (name, size) in SIZES {
        put(&store, name, size);
    }
    // read back while it is written
    check_content(&store);
    assert!(!place.files().contains(&INVENTORY.to_owned()) && !place.files().contains(&MANIFEST.to_owned()));
    assert!(place.open().is_err());
    store.commit().unwrap();
    drop(store);
    assert_eq!(place.files(), ["empty.img", "inventory.img", MANIFEST, "part.img", "parts.img", "small.img"]);
    let store = place.open().unwrap();
    check_content(&store);
    assert_eq!(store.list().unwrap().len(), SIZES.len());
    assert!(store.read("none").unwrap_err().is_missing() && !store.exists("none").unwrap());
    assert!(store.create("more.img").is_err());
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&place.0).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700);
}

#[test]
fn what_is_not_committed_goes_and_an_old_one_is_none_from_the_begin() {
    let place = Place::new("dropped");
    let store = place.create();
    put(&store, "small.img", 5);
    put(&store, "old.img", 9);
    put(&store, INVENTORY, 7);
    store.commit().unwrap();
    drop(store);
    let store = place.create();
    assert_eq!(place.files(), ["old.img", "small.img", MARKER]);
    assert_eq!(store.list().unwrap(), ["old.img", "small.img"], "so that they can be removed");
    store.remove("old.img").unwrap();
    store.remove("none.img").unwrap();
    put(&store, "parts.img", PART + 1);
    put(&store, INVENTORY, 7);
    let mut open = store.create("open.img").unwrap();
    open.write_all(&content(2 * PART + 1)).unwrap();
    drop(open);
    drop(store);
    assert_eq!(place.files(), ["small.img"], "it was not ours");
}

#[test]
fn what_was_changed_is_found() {
    let place = Place::new("changed");
    let store = place.create();
    put(&store, "a.img", PIECE + 9);
    put(&store, "b.img", 9);
    put(&store, INVENTORY, 7);
    store.commit().unwrap();
    drop(store);
    for name in ["a.img", "b.img", INVENTORY] {
        let path = place.0.join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let store = place.open().unwrap();
        let error = writing::text(&store.read(name).unwrap_err());
        assert!(error.contains("are not those that were written"), "{error}");
        assert!(store.open(name).unwrap().read_exact_at(&mut [0], whole.len() as u64 - 1).is_err());
        std::fs::write(&path, &whole[1..]).unwrap();
        let error = writing::text(&place.open().err().unwrap());
        assert!(error.contains(name) && error.contains("instead of"), "{error}");
        std::fs::remove_file(&path).unwrap();
        let error = writing::text(&place.open().err().unwrap());
        assert!(error.contains(name) && error.contains("not in the storage"), "{error}");
        std::fs::write(&path, &whole).unwrap();
    }
    std::fs::write(place.0.join(MANIFEST), b"{}").unwrap();
    assert!(place.open().is_err());
    std::fs::remove_file(place.0.join(MANIFEST)).unwrap();
    let error = writing::text(&place.open().err().unwrap());
    assert!(error.contains("not written to its end"), "{error}");
}

#[test]
fn sealed_in_storage() {
    let place = Place::new("sealed");
    let key = Key::new([3; 32]);
    let store = SealedStore::create(Arc::new(place.create()), key.clone()).unwrap();
    for (name, size) in SIZES {
        put(&store, name, size);
    }
    store.commit().unwrap();
    drop(store);
    let store = SealedStore::open(Arc::new(place.open().unwrap()), key).unwrap();
    assert_eq!(store.verify().unwrap(), SIZES.iter().map(|(_, size)| *size as u64).sum::<u64>());
    check_content(&store);
    assert!(SealedStore::open(Arc::new(place.open().unwrap()), Key::new([4; 32])).is_err());
}

#[test]
fn an_interrupt_ends_waiting() {
    // nobody answers: a listener that accepts nothing
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    let options = vec![
        pair("endpoint", &endpoint),
        pair("allow_http", "true"),
        pair("access_key_id", "a"),
        pair("secret_access_key", "b"),
    ];
    let settings = Settings { options, interrupted: Some(Arc::new(|| true)) };
    let error = writing::text(&ObjectStorage::create("s3://bucket/p", &settings).err().unwrap());
    assert!(error.contains("interrupted"), "{error}");
}
