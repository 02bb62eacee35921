//! Threads for one piece of work.

/// Runs `work` in a thread of its own and waits for it: what the kernel remembers of that thread (whom it traces, which
/// namespaces it is in) ends with it. A panic goes on in the caller.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}
