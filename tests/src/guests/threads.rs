//! Threads: thread-local memory, ids, names, masks, stacks, sums in progress.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use super::support::*;

thread_local! { static MARK: Cell<u64> = const { Cell::new(0) }; }

/// Eight threads that work all the time.
pub(super) fn threads() {
    let stop = Arc::new(AtomicBool::new(false));
    let turns: Arc<Vec<AtomicU64>> = Arc::new((0..8).map(|_| AtomicU64::new(0)).collect());
    let mut all = Vec::new();
    for n in 0..8u64 {
        let (stop, turns) = (stop.clone(), turns.clone());
        let work = move || {
            MARK.set(0x5eed_0000 + n);
            let tid = gettid();
            let mut mask: libc::sigset_t = unsafe { std::mem::zeroed() };
            unsafe {
                libc::sigaddset(&raw mut mask, libc::SIGRTMIN() + n as i32);
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const mask, std::ptr::null_mut());
            }
            let before = status(&["Name", "SigBlk"]);
            let (mut sum, mut exact) = (0.0f64, 0u64);
            while !stop.load(Ordering::Relaxed) {
                sum += 0.5 + n as f64;
                exact += 1;
                turns[n as usize].store(exact, Ordering::Relaxed);
                match n % 3 {
                    0 => std::thread::sleep(Duration::from_micros(700)),
                    1 => std::thread::yield_now(),
                    _ => {
                        if exact % 4096 == 0 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    }
                }
            }
            check_eq!(MARK.get(), 0x5eed_0000 + n);
            check_eq!(gettid(), tid);
            check_eq!(status(&["Name", "SigBlk"]), before);
            check_eq!(sum, exact as f64 * (0.5 + n as f64));
        };
        all.push(did(std::thread::Builder::new().name(format!("worker-{n}")).spawn(work)));
    }
    eventually("threads that work", || turns.iter().all(|t| t.load(Ordering::Relaxed) > 2));
    ready();
    let seen: Vec<u64> = turns.iter().map(|t| t.load(Ordering::Relaxed)).collect();
    eventually("threads that go on", || turns.iter().zip(&seen).all(|(t, s)| t.load(Ordering::Relaxed) > *s));
    stop.store(true, Ordering::Relaxed);
    for thread in all {
        check!(thread.join().is_ok());
    }
}

/// Five hundred threads that wait.
pub(super) fn many() {
    let gate = Arc::new((Mutex::new((0u32, false)), Condvar::new()));
    let mut all = Vec::new();
    for _ in 0..500 {
        let gate = gate.clone();
        let wait = move || {
            let tid = gettid();
            let (lock, turn) = &*gate;
            let Ok(mut state) = lock.lock() else { fail("poisoned") };
            state.0 += 1;
            while !state.1 {
                state = match turn.wait(state) {
                    Ok(s) => s,
                    Err(_) => fail("poisoned"),
                };
            }
            check_eq!(gettid(), tid);
        };
        all.push(did(std::thread::Builder::new().stack_size(65536).spawn(wait)));
    }
    eventually("all threads wait", || gate.0.lock().is_ok_and(|s| s.0 == 500));
    ready();
    check_eq!(did(std::fs::read_dir("/proc/self/task")).count(), 501);
    match gate.0.lock() {
        Ok(mut s) => s.1 = true,
        Err(_) => fail("poisoned"),
    }
    gate.1.notify_all();
    for thread in all {
        check!(thread.join().is_ok());
    }
}
