use super::*;

fn behaves(store: &dyn Store) {
    assert_eq!(store.list().unwrap(), [""; 0]);
    assert!(store.read("a.img").unwrap_err().is_missing());
    assert!(store.open("a.img").err().is_some_and(|error| error.is_missing()));
    let mut image = store.create("a.img").unwrap();
    image.write_all(b"some").unwrap();
    image.write_all(b"thing").unwrap();
    image.finish().unwrap();
    store.commit().unwrap();
    assert!(store.exists("a.img").unwrap());
    assert_eq!(store.read("a.img").unwrap().as_ref(), b"something");
    let part = store.open("a.img").unwrap();
    let mut buffer = [0; 5];
    part.read_exact_at(&mut buffer, 4).unwrap();
    assert_eq!((&buffer, part.len()), (b"thing", 9));
    assert!(part.read_exact_at(&mut buffer, 5).is_err());
    assert!(part.read_exact_at(&mut buffer, u64::MAX).is_err());
    store.create("a.img").unwrap().finish().unwrap();
    assert_eq!(store.read("a.img").unwrap().len(), 0);
    assert_eq!(store.list().unwrap(), ["a.img"]);
    for name in ["", ".", "..", "a/b", "/a", "a\0b", &"x".repeat(256)] {
        assert!(matches!(store.create(name), Err(Error::Name { .. })), "{name:?}");
        assert!(matches!(store.read(name), Err(Error::Name { .. })), "{name:?}");
    }
    store.remove("a.img").unwrap();
    store.remove("a.img").unwrap();
    assert!(!store.exists("a.img").unwrap());
    assert!(store.parent().unwrap().is_none());
}

#[test]
fn memory() {
    behaves(&MemoryStore::new());
    behaves(&held::HeldStore::new());
    behaves(&held::GatheredStore::new(Arc::new(MemoryStore::new())));
}

#[test]
fn folder() {
    use std::os::unix::fs::PermissionsExt;
    let path = std::env::temp_dir().join(format!("standstill-images-store-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap();
    behaves(&FolderStore::open(&path).unwrap());
    let store = FolderStore::open(&path).unwrap().durable(true);
    store.create("a.img").unwrap().finish().unwrap();
    store.commit().unwrap();
    assert_eq!(std::fs::metadata(path.join("a.img")).unwrap().permissions().mode() & 0o777, 0o600);

    // What is no file is not read, and what is elsewhere is not written.
    std::fs::create_dir(path.join("folder.img")).unwrap();
    assert!(store.read("folder.img").is_err());
    std::os::unix::fs::symlink("/tmp/standstill-elsewhere", path.join("link.img")).unwrap();
    assert!(matches!(store.create("link.img"), Err(Error::Io { .. })));

    store.set_parent(Some(Path::new("."))).unwrap();
    assert!(store.parent().unwrap().unwrap().exists("a.img").unwrap());
    std::fs::remove_dir_all(&path).unwrap();
    assert!(FolderStore::open(&path).is_err());
}
