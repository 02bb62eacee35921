//! Packed pages: guests that were made for other things, in blocks of several sizes; and images that lie.

use std::process::Stdio;
use std::time::{Duration, Instant};

use standstill_tests::engine::Engine;
use standstill_tests::guests::support::How;
use standstill_tests::process;
use standstill_tests::run::Run;
use standstill_tests::skip::skip;

fn restored(name: &str, options: &[&str]) {
    let mut run = Run::start(name);
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump_with(&engine, &images, options);
    run.restore(&engine, &images);
    run.check(How::Restored);
}

macro_rules! packed {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                restored(stringify!($name), &["--compress"]);
            }
        )*
    };
}

packed! {
    memfd
    memfd_sealed
    memory_advice
    memory_brk
    memory_cow
    memory_file
    memory_file_deleted
    memory_layout
    memory_private
    memory_shared
    memory_sparse
    memory_stack
    threads
    tree
    tree_100
    tree_orphans
    tree_zombies
}

#[test]
fn blocks_of_any_size() {
    for size in ["4K", "12K", "4M"] {
        for name in ["packed_kinds", "packed_family", "memory_cow"] {
            restored(name, &["--compress", "--compress-block", size]);
        }
    }
}

#[test]
fn not_packed_after_all() {
    let mut run = Run::start("packed_kinds");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump_with(&engine, &images, &["--no-compress"]);
    let inventory = std::fs::read(images.join("inventory.img")).unwrap_or_default();
    let image = standstill_images::json::decode(
        "inventory.img",
        &inventory,
        standstill_images::json::Style { pretty: false, payload: false },
    );
    let entry = image.map(|image| image["entries"][0].clone()).unwrap_or_default();
    assert_eq!((entry["img_version"].as_u64(), entry.get("compress")), (Some(2), None));
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// Bytes of blocks that were changed: an error with a name and a place, or other memory, never a hang or half a task.
#[test]
fn a_lie_is_refused() {
    let mut run = Run::start("packed_kinds");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    let path = images.join("pages-1.img");
    let good = std::fs::read(&path).unwrap_or_default();
    // all blocks become nonsense
    std::fs::write(&path, vec![0xff; good.len()]).unwrap_or_default();
    match engine.restore(&images, &[]) {
        Ok(_) => panic!("nonsense was restored"),
        Err(e) => assert!(e.text.contains("pages-1.img, entry ") && e.text.contains("does not unpack"), "{e}"),
    }
    std::fs::write(&path, &good[..good.len() - 5000]).unwrap_or_default();
    match engine.restore(&images, &[]) {
        Ok(_) => panic!("half of the pages were restored"),
        Err(e) => assert!(e.text.contains("end past the end of the pages image"), "{e}"),
    }
    std::fs::write(&path, good).unwrap_or_default();
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// CRIU 4.2 says that it does not know such images, and makes nothing of them.
#[test]
fn criu_refuses_them() {
    let criu = match Engine::criu() {
        Ok(criu) => criu,
        Err(why) => return skip("packed::criu_refuses_them", &why),
    };
    let mut run = Run::start("packed_kinds");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    match criu.restore(&images, &[]) {
        Ok(_) => panic!("CRIU restored packed pages"),
        Err(e) => assert!(e.text.contains("version"), "{e}"),
    }
    run.restore(&engine, &images);
    run.check(How::Restored);
}

/// An engine that is killed while it unpacks: the tasks that wait for it end, or they were whole by then.
#[test]
fn a_killed_engine_leaves_nothing() {
    let mut run = Run::start("packed_family");
    let (engine, images) = (Engine::ours(), run.images("images"));
    run.dump(&engine, &images);
    let began = Instant::now();
    run.restore(&engine, &images);
    let took = began.elapsed();
    let limit = Duration::from_secs(20);
    for n in 0..30 {
        process::end(&run.tree);
        let mut command = engine.command("restore", &images, &["-d"]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{e}"));
        std::thread::sleep(took * n / 30);
        let _ = child.kill();
        let _ = child.wait();
        let of_guest = |pid: &i32| {
            let exe = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            exe.ends_with("guest")
        };
        let began = Instant::now();
        loop {
            let there: Vec<i32> =
                run.tree.iter().copied().filter(|&p| process::reap(p).is_none() && process::exists(p)).collect();
            if there.is_empty() || (there.len() == run.tree.len() && there.iter().all(of_guest)) {
                break;
            }
            let texts = || there.iter().map(|p| process::describe(*p)).collect::<String>();
            assert!(began.elapsed() < limit, "round {n}: left behind:\n{}", texts());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    process::end(&run.tree);
    run.restore(&engine, &images);
    run.check(How::Restored);
}
