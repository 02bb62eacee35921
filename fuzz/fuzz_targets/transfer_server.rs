//! A page server, and whatever a client may send.
#![no_main]

use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use standstill::options::Options;
use standstill::transfer::link::{Link, Side};
use standstill::transfer::server::serve;
use standstill_images::{Images, MemoryStore};

fuzz_target!(|input: (bool, &[u8])| {
    use std::io::Write;
    let (lazy, bytes) = input;
    let Ok((mut client, server)) = UnixStream::pair() else { return };
    // all of it fits into the socket
    let bytes = &bytes[..bytes.len().min(64 << 10)];
    if client.write_all(bytes).is_err() || client.shutdown(std::net::Shutdown::Write).is_err() {
        return;
    }
    let options = Options { lazy_pages: lazy, ..Options::default() };
    let Ok(link) = Link::new(server.into(), &options, Side::Server) else { return };
    let _ = serve(&link, &Images::new(MemoryStore::new()), &options);
});
