use super::*;
use crate::store::MemoryStore;

fn key(byte: u8) -> Key {
    Key::new([byte; 32])
}

fn content(size: usize) -> Vec<u8> {
    (0..size as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect()
}

fn put(store: &dyn Store, name: &str, content: &[u8]) {
    let mut image = store.create(name).unwrap();
    image.write_all(content).unwrap();
    image.finish().unwrap();
}

/// A store with these images, sealed and committed.
fn checkpoint(images: &[(&str, usize)]) -> MemoryStore {
    let inner = MemoryStore::new();
    let store = SealedStore::create(Arc::new(inner.clone()), key(1)).unwrap();
    for (name, size) in images {
        put(&store, name, &content(*size));
    }
    store.commit().unwrap();
    inner
}

fn open(inner: &MemoryStore) -> Result<SealedStore> {
    SealedStore::open(Arc::new(inner.clone()), key(1))
}

/// The fault that opening and reading everything ends with.
fn fault(inner: &MemoryStore) -> Option<(String, SealFault)> {
    match open(inner).and_then(|store| store.verify()) {
        Ok(_) => None,
        Err(Error::Sealed { image, source }) => Some((image, source)),
        Err(other) => panic!("{other}"),
    }
}

#[test]
fn keys() {
    let digits = b"000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";
    let raw: Vec<u8> = (0..32).collect();
    let of_digits = Key::parse(digits).unwrap();
    assert_eq!(**of_digits.0, *raw);
    assert_eq!(**Key::parse(&[digits.as_slice(), b"\n"].concat()).unwrap().0, *raw);
    assert_eq!(**Key::parse(&raw).unwrap().0, *raw);
    let bad: [&[u8]; 7] = [b"", b"\n", &raw[1..], &digits[1..], &[b'g'; 64], &[b'0'; 66], b"secret\n"];
    for bad in bad {
        assert!(Key::parse(bad).is_none(), "{bad:?}");
    }
    let (one, two) = (Key::generate().unwrap(), Key::generate().unwrap());
    assert!(*one != *two && Key::parse(one.as_bytes()).is_some());
    assert_eq!(format!("{:?}", key(7)), "Key");
}

#[test]
fn sizes() {
    for size in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7] {
        let sealed = sealed_size(size as u64);
        assert_eq!(plain_size(sealed), Some(size as u64));
    }
    // no image is so long
    for sealed in [0, 79, 80, 95, (HEAD + SEALED_CHUNK + 1) as u64, (HEAD + SEALED_CHUNK + TAG) as u64] {
        assert_eq!(plain_size(sealed), None, "{sealed}");
    }
}

#[test]
fn what_was_sealed_comes_back_from_anywhere() {
    let sizes =
        [0, 1, 100, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, BATCH * CHUNK, BATCH * CHUNK + 1, 3 * BATCH * CHUNK + 5];
    for size in sizes {
        let inner = checkpoint(&[("a.img", size)]);
        let plain = content(size);
        let sealed = inner.read("a.img").unwrap();
        assert_eq!(sealed.len() as u64, sealed_size(size as u64));
        assert!(size < 100 || !sealed.windows(16).any(|part| plain.starts_with(part)), "it can be read");
        let store = open(&inner).unwrap();
        assert_eq!(store.verify().unwrap(), size as u64);
        assert_eq!(store.list().unwrap(), ["a.img"]);
        assert_eq!(store.read("a.img").unwrap(), plain);
        let image = store.open("a.img").unwrap();
        assert_eq!(image.len(), size as u64);
        let edges = [0, 1, 77, CHUNK - 1, CHUNK, CHUNK + 1, BATCH * CHUNK - 3, BATCH * CHUNK, size];
        for from in edges.into_iter().filter(|from| *from <= size) {
            for to in edges.into_iter().filter(|to| (from..=size).contains(to)) {
                let mut part = vec![0; to - from];
                image.read_exact_at(&mut part, from as u64).unwrap();
                assert_eq!(part, plain[from..to], "{size}: {from}..{to}");
            }
        }
        for (offset, length) in [(size as u64, 1), (size as u64 + 1, 0), (u64::MAX, 1), (0, size + 1)] {
            assert!(image.read_exact_at(&mut vec![0; length], offset).is_err());
        }
    }
}

#[test]
fn written_in_pieces_of_any_size() {
    let inner = MemoryStore::new();
    let store = SealedStore::create(Arc::new(inner.clone()), key(1)).unwrap();
    let plain = content(BATCH * CHUNK + 3 * CHUNK);
    let mut image = store.create("a.img").unwrap();
    let mut rest = plain.as_slice();
    for size in (1..).map(|n| n * 31_337 % 200_000 + 1) {
        let (part, after) = rest.split_at(size.min(rest.len()));
        image.write_all(part).unwrap();
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    assert!(!store.exists("a.img").unwrap(), "not finished");
    image.finish().unwrap();
    // read before it is committed
    assert_eq!(store.read("a.img").unwrap(), plain);
    assert!(open(&inner).is_err(), "not committed");
    store.commit().unwrap();
    assert_eq!(open(&inner).unwrap().read("a.img").unwrap(), plain);
}

#[test]
fn every_flipped_bit_is_found() {
    let inner = checkpoint(&[("a.img", 300), ("b.img", 0), ("c.img", CHUNK + 9)]);
    assert_eq!(fault(&inner), None);
    for name in inner.list().unwrap() {
        let whole = inner.read(&name).unwrap();
        // all bits of what is short, and some in the middle of what is long
        let places = (0..whole.len()).filter(|at| whole.len() < 1000 || at % 997 == 0 || *at + 30 > whole.len());
        for at in places {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1 << (at % 8);
            inner.insert(&name, bytes).unwrap();
            assert_eq!(fault(&inner).map(|(image, _)| image), Some(name.clone()), "byte {at} of {name}");
        }
        for size in (0..whole.len()).filter(|at| whole.len() < 1000 || at % 9973 == 0) {
            inner.insert(&name, whole.slice(..size)).unwrap();
            assert!(fault(&inner).is_some(), "{size} bytes of {name}");
        }
        inner.insert(&name, [&whole[..], b"0"].concat()).unwrap();
        assert!(fault(&inner).is_some());
        inner.insert(&name, whole).unwrap();
    }
    assert_eq!(fault(&inner), None);
}

#[test]
fn what_was_moved_is_found() {
    let inner = checkpoint(&[("a.img", 3 * CHUNK), ("b.img", 3 * CHUNK), ("empty.img", 0)]);
    let a = inner.read("a.img").unwrap();
    let chunk = |n: usize| HEAD + n * SEALED_CHUNK..HEAD + (n + 1) * SEALED_CHUNK;
    let changed = |name: &str, bytes: Vec<u8>| {
        let before = inner.read(name).unwrap();
        inner.insert(name, bytes).unwrap();
        let found = fault(&inner);
        inner.insert(name, before).unwrap();
        found
    };
    let mut swapped = a.to_vec();
    swapped[chunk(0)].copy_from_slice(&a[chunk(1)]);
    swapped[chunk(1)].copy_from_slice(&a[chunk(0)]);
    assert_eq!(changed("a.img", swapped), Some(("a.img".into(), SealFault::Chunk { number: 0 })));
    // the same content under another name, and chunks of another image under this one's head
    assert_eq!(changed("b.img", a.to_vec()), Some(("b.img".into(), SealFault::Checkpoint)));
    let mut mixed = inner.read("b.img").unwrap().to_vec();
    mixed[HEAD..].copy_from_slice(&a[HEAD..]);
    assert_eq!(changed("b.img", mixed), Some(("b.img".into(), SealFault::Chunk { number: 0 })));
    // the last chunk cut off, at a place where a chunk ends
    assert_eq!(changed("a.img", a[..chunk(1).end].to_vec()), Some(("a.img".into(), SealFault::Size)));
    // of another checkpoint with the same key, which is the same otherwise
    let other = checkpoint(&[("a.img", 3 * CHUNK)]);
    assert_eq!(changed("a.img", other.read("a.img").unwrap().to_vec()), Some(("a.img".into(), SealFault::Checkpoint)));
    // missing: also one that a checkpoint may be without
    let gone = inner.read("empty.img").unwrap();
    inner.remove("empty.img").unwrap();
    assert_eq!(fault(&inner), Some(("empty.img".into(), SealFault::Gone)));
    inner.insert("empty.img", gone).unwrap();
    // what is not listed is not there
    inner.insert("more.img", a).unwrap();
    let store = open(&inner).unwrap();
    assert!(!store.exists("more.img").unwrap() && store.read("more.img").unwrap_err().is_missing());
    inner.remove(MANIFEST).unwrap();
    assert_eq!(fault(&inner).map(|(_, fault)| fault), Some(SealFault::NotSealed));
}

#[test]
fn an_older_image_of_the_same_name_is_found() {
    let inner = MemoryStore::new();
    let store = SealedStore::create(Arc::new(inner.clone()), key(1)).unwrap();
    put(&store, "a.img", b"old");
    let old = inner.read("a.img").unwrap();
    put(&store, "a.img", b"new");
    store.commit().unwrap();
    assert_eq!(open(&inner).unwrap().read("a.img").unwrap().as_ref(), b"new");
    inner.insert("a.img", old).unwrap();
    assert_eq!(fault(&inner), Some(("a.img".into(), SealFault::Checkpoint)));
}

#[test]
fn another_key_opens_nothing() {
    let inner = checkpoint(&[("a.img", 10)]);
    let error = SealedStore::open(Arc::new(inner.clone()), key(2)).err().unwrap();
    assert!(matches!(error, Error::Sealed { source: SealFault::Key, .. }), "{error}");
    // what is not sealed is not taken for it
    let plain = MemoryStore::new();
    plain.insert("a.img", b"plain".as_slice()).unwrap();
    assert_eq!(fault(&plain).map(|(_, fault)| fault), Some(SealFault::NotSealed));
    // a new checkpoint in the place of an old one: that is none from the begin on
    let again = SealedStore::create(Arc::new(inner.clone()), key(2)).unwrap();
    assert!(!is_sealed(&inner).unwrap());
    assert_eq!(again.list().unwrap(), ["a.img"], "so that it can be removed");
    again.remove("a.img").unwrap();
    assert!(again.create(MANIFEST).is_err());
    again.commit().unwrap();
    let empty = SealedStore::open(Arc::new(inner), key(2)).unwrap();
    assert_eq!(empty.list().unwrap(), [""; 0]);
    assert!(empty.create("b.img").is_err(), "it is committed");
}

#[test]
fn chains_have_one_key_and_stay_together() {
    let below = checkpoint(&[("a.img", 100)]);
    let inner = MemoryStore::new().on(below.clone());
    let error = SealedStore::create(Arc::new(inner.clone()), key(2)).err().unwrap();
    assert!(matches!(error, Error::Sealed { source: SealFault::Key, .. }), "{error}");
    let store = SealedStore::create(Arc::new(inner.clone()), key(1)).unwrap();
    put(&store, "b.img", b"top");
    store.commit().unwrap();
    let store = open(&inner).unwrap();
    assert_eq!(store.parent().unwrap().unwrap().read("a.img").unwrap(), content(100));
    assert_eq!(store.verify().unwrap(), 103);
    // another parent, and none
    for (name, bytes) in checkpoint(&[("a.img", 100)]).list().unwrap().into_iter().map(|name| {
        let bytes = checkpoint(&[("a.img", 100)]).read(&name).unwrap();
        (name, bytes)
    }) {
        let before = below.read(&name).unwrap();
        below.insert(&name, bytes).unwrap();
        assert!(fault(&inner).is_some());
        below.insert(&name, before).unwrap();
    }
    let plain = MemoryStore::new();
    for name in inner.list().unwrap() {
        plain.insert(&name, inner.read(&name).unwrap()).unwrap();
    }
    assert_eq!(fault(&plain), Some(("the parent".into(), SealFault::Gone)));
    let other = checkpoint(&[("a.img", 100)]);
    let moved = plain.on(other);
    assert_eq!(fault(&moved), Some(("the parent".into(), SealFault::Checkpoint)));
    // one that is not sealed is not built on
    let unsealed = MemoryStore::new().on(MemoryStore::new());
    assert!(SealedStore::create(Arc::new(unsealed), key(1)).is_err());
}
