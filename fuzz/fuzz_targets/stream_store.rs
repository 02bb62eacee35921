//! A stream of images: no panic, nothing past the limit, and what arrived can be sent on. The sum at its end is always right.
#![no_main]

use std::io::Write;
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use standstill_images::store::stream::{receive, StreamStore};
use standstill_images::{MemoryStore, Store};

const LIMIT: u64 = 1 << 20;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("one thread").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn content(store: &MemoryStore) -> Vec<(String, Vec<u8>)> {
    let names = store.list().expect("memory").into_iter();
    names.map(|name| (name.clone(), store.read(&name).expect("it is there").to_vec())).collect()
}

fuzz_target!(|data: &[u8]| {
    let arrived = MemoryStore::new();
    let sum = crc32fast::hash(data).to_le_bytes();
    let Ok(received) = receive([data, &sum].concat().as_slice(), &arrived, LIMIT) else { return };
    assert!(received.bytes <= LIMIT);
    let images = content(&arrived);
    assert_eq!(images.len(), usize::try_from(received.images).expect("few"));

    let sink = Sink::default();
    let sender = StreamStore::new(sink.clone()).expect("memory takes all");
    for (name, bytes) in &images {
        let mut image = sender.create(name).expect("it had that name");
        image.write_all(bytes).expect("memory takes all");
        image.finish().expect("memory takes all");
    }
    sender.commit().expect("all are finished");
    let again = MemoryStore::new();
    let sent = sink.0.lock().expect("one thread").clone();
    assert_eq!(receive(sent.as_slice(), &again, LIMIT).expect("what was sent arrives"), received);
    assert_eq!(images, content(&again));
});
