//! Checkpoints in object storage, beside a server of our own on the loopback ([`standstill_tests::s3`]): all there and back,
//! and all that servers do wrong.

mod figures;
mod guests;

use std::io::Write as _;
use std::time::{Duration, Instant};

use standstill_images::Store;
use standstill_storage::{ObjectStorage, Settings, PART, PIECE};
use standstill_tests::s3::{Fault, S3};

const URL: &str = "s3://bucket/some/prefix";

fn settings(server: &S3, more: &[(&str, &str)]) -> Settings {
    let mut options = server.options();
    options.extend(more.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
    Settings { options, ..Settings::default() }
}

fn content(size: usize) -> Vec<u8> {
    (0..size as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect()
}

fn put(store: &dyn Store, name: &str, size: usize) -> standstill_images::Result<()> {
    let mut image = store.create(name)?;
    for part in content(size).chunks(1 << 20) {
        image.write_all(part).map_err(|source| standstill_images::Error::Io {
            image: name.to_owned(),
            operation: "write",
            source,
        })?;
    }
    image.finish()
}

const SIZES: [(&str, usize); 4] =
    [("empty.img", 0), ("pages-1.img", 2 * PART + 5), ("small.img", 100), ("inventory.img", 50)];

fn write(store: &ObjectStorage) -> standstill_images::Result<()> {
    for (name, size) in SIZES {
        put(store, name, size)?;
    }
    store.commit()
}

/// The whole error, in one line.
fn text(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Writes all, or says why not.
fn try_to_write(server: &S3, more: &[(&str, &str)]) -> Result<(), String> {
    let store = ObjectStorage::create(URL, &settings(server, more)).map_err(|e| text(&e))?;
    write(&store).map_err(|e| text(&e))
}

/// Reads all, or says why not.
fn try_to_read(server: &S3, more: &[(&str, &str)]) -> Result<(), String> {
    let store = ObjectStorage::open(URL, &settings(server, more)).map_err(|e| text(&e))?;
    for (name, size) in SIZES {
        let all = store.read(name).map_err(|e| text(&e))?;
        assert!(all == content(size), "{name} is another one, and nobody said so");
    }
    Ok(())
}

/// Nothing that was begun is left, and there is no checkpoint.
fn nothing_is_left(server: &S3) {
    assert_eq!(server.uploads(), 0, "uploads in parts");
    let left: Vec<String> = server.objects().into_keys().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn there_and_back() {
    let server = S3::start();
    try_to_write(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
    let puts: Vec<String> =
        server.requests().into_iter().filter(|r| r.starts_with("PUT") && !r.contains("partNumber")).collect();
    assert!(puts.last().is_some_and(|r| r.contains("inventory.img")), "{puts:?}");
    assert!(puts[puts.len() - 2].contains("manifest.json"), "{puts:?}");
    let names: Vec<String> = server.objects().into_keys().collect();
    assert_eq!(
        names,
        ["empty.img", "inventory.img", "manifest.json", "pages-1.img", "small.img"].map(|n| format!("some/prefix/{n}"))
    );
    assert_eq!(server.uploads(), 0);
    assert_eq!(server.objects()["some/prefix/pages-1.img"].len(), 2 * PART + 5);
    try_to_read(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
    // in parts, several side by side, each fetched once
    let before = server.requests().len();
    let store = ObjectStorage::open(URL, &settings(&server, &[])).unwrap_or_else(|e| panic!("{e}"));
    let image = store.open("pages-1.img").unwrap_or_else(|e| panic!("{e}"));
    let wanted = content(2 * PART + 5);
    std::thread::scope(|scope| {
        for first in 0..4 {
            let (image, wanted) = (&image, &wanted);
            scope.spawn(move || {
                for (number, part) in wanted.chunks(1 << 20).enumerate().filter(|(n, _)| n % 4 == first) {
                    let mut found = vec![0; part.len()];
                    image.read_exact_at(&mut found, (number << 20) as u64).unwrap_or_else(|e| panic!("{e}"));
                    assert!(found == part);
                }
            });
        }
    });
    let fetched = server.requests()[before..].iter().filter(|r| r.contains("pages-1.img")).count();
    assert!(fetched <= (2 * PART + 5).div_ceil(PIECE) + 4, "{fetched} requests");
    // another one in the same place
    try_to_write(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
    try_to_read(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn what_passes_is_tried_again() {
    for (method, part, fault) in [
        ("PUT", "partNumber=2", Fault::Status(503)),
        ("PUT", "partNumber=1", Fault::Cut),
        ("PUT", "small.img", Fault::Status(500)),
        ("POST", "uploads", Fault::Status(503)),
        ("POST", "uploadId", Fault::Status(503)),
        ("GET", "list-type", Fault::Status(503)),
        ("PUT", "inventory.img", Fault::Cut),
    ] {
        let server = S3::start();
        server.fail(method, part, 0, 1, fault);
        try_to_write(&server, &[]).unwrap_or_else(|e| panic!("{method} {part} {fault:?}: {e}"));
        try_to_read(&server, &[]).unwrap_or_else(|e| panic!("{method} {part} {fault:?}: {e}"));
    }
    let server = S3::start();
    try_to_write(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
    for fault in [Fault::Status(503), Fault::Cut, Fault::WrongByte] {
        server.heal();
        server.fail("GET", "pages-1.img", 1, 1, fault);
        try_to_read(&server, &[]).unwrap_or_else(|e| panic!("{fault:?}: {e}"));
    }
}

#[test]
fn what_does_not_pass_is_one_error_and_leaves_nothing() {
    let always = usize::MAX;
    for (method, part, fault, said) in [
        ("PUT", "partNumber=2", Fault::Status(503), "503"),
        ("PUT", "partNumber=2", Fault::Status(403), "AccessDenied"),
        ("PUT", "partNumber", Fault::Cut, ""),
        ("PUT", "small.img", Fault::Status(500), "500"),
        ("PUT", "small.img", Fault::Shorter, "instead of 100"),
        ("POST", "uploadId", Fault::Status(503), "503"),
        ("POST", "uploadId", Fault::Shorter, "instead of"),
        ("PUT", "manifest.json", Fault::Status(503), "503"),
        ("PUT", "inventory.img", Fault::Status(503), "503"),
    ] {
        let server = S3::start();
        server.fail(method, part, 0, always, fault);
        let begun = Instant::now();
        let error = try_to_write(&server, &[]).err();
        let error = error.unwrap_or_else(|| panic!("{method} {part} {fault:?} was not noticed"));
        assert!(error.contains(said), "{method} {part} {fault:?}: {error}");
        assert!(error.len() < 1000, "it is long: {error}");
        assert!(begun.elapsed() < Duration::from_secs(60), "{method} {part} {fault:?} took {:?}", begun.elapsed());
        nothing_is_left(&server);
    }
}

#[test]
fn what_is_wrong_from_the_begin_is_said_at_once() {
    let server = S3::start();
    let denied = [("secret_access_key", "x"), ("access_key_id", "somebody")];
    let begun = |url: &str, more: &[(&str, &str)]| {
        let error = ObjectStorage::create(url, &settings(&server, more)).err();
        text(&error.unwrap_or_else(|| panic!("{url} {more:?}")))
    };
    assert!(begun(URL, &denied).contains("403"), "{}", begun(URL, &denied));
    assert!(begun("s3://other/prefix", &[]).contains("NoSuchBucket"), "{}", begun("s3://other/prefix", &[]));
    assert!(begun(URL, &[("no_such", "1")]).contains("no_such"));
    assert!(begun(URL, &[("endpoint", "http://127.0.0.1:1")]).contains("127.0.0.1:1"));
    // listing is allowed, writing is not
    server.fail("PUT", "", 0, usize::MAX, Fault::Status(403));
    assert!(begun(URL, &[]).contains("AccessDenied"));
    server.heal();
    nothing_is_left(&server);
    let error = try_to_read(&server, &[]).err().unwrap_or_default();
    assert!(error.contains("there is no checkpoint"), "{error}");
}

#[test]
fn a_server_that_is_slow() {
    let server = S3::start();
    server.fail("PUT", "small.img", 0, 1, Fault::Late(Duration::from_secs(2)));
    try_to_write(&server, &[]).unwrap_or_else(|e| panic!("slow is not wrong: {e}"));
    // longer than one waits for an answer, each time
    server.heal();
    server.fail("GET", "small.img", 0, usize::MAX, Fault::Late(Duration::from_secs(4)));
    let begun = Instant::now();
    let error = try_to_read(&server, &[("timeout", "500ms"), ("retries", "1")]).err();
    assert!(error.is_some(), "nobody waits so long");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn what_was_changed_is_found() {
    let server = S3::start();
    try_to_write(&server, &[]).unwrap_or_else(|e| panic!("{e}"));
    for (name, _) in SIZES.into_iter().filter(|(_, size)| *size > 0) {
        let name = format!("some/prefix/{name}");
        let whole = server.objects()[&name].to_vec();
        let mut changed = whole.clone();
        changed[whole.len() / 2] ^= 0x10;
        server.set(&name, Some(changed));
        let error = try_to_read(&server, &[]).err().unwrap_or_default();
        assert!(error.contains("are not those that were written"), "{name}: {error}");
        server.set(&name, Some(whole[1..].to_vec()));
        let error = try_to_read(&server, &[]).err().unwrap_or_default();
        assert!(error.contains("instead of"), "{name}: {error}");
        server.set(&name, None);
        let error = try_to_read(&server, &[]).err().unwrap_or_default();
        assert!(error.contains("not in the storage"), "{name}: {error}");
        server.set(&name, Some(whole));
    }
    server.fail("GET", "small.img", 0, usize::MAX, Fault::WrongByte);
    let error = try_to_read(&server, &[]).err().unwrap_or_default();
    assert!(error.contains("are not those that were written"), "{error}");
}

#[test]
fn an_upload_that_is_given_up_is_aborted() {
    let server = S3::start();
    let store = ObjectStorage::create(URL, &settings(&server, &[])).unwrap_or_else(|e| panic!("{e}"));
    put(&store, "small.img", 10).unwrap_or_else(|e| panic!("{e}"));
    let mut image = store.create("pages-1.img").unwrap_or_else(|e| panic!("{e}"));
    image.write_all(&content(2 * PART + 1)).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(server.uploads(), 1);
    drop(image);
    drop(store);
    nothing_is_left(&server);
}
