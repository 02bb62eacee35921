//! Threads for one piece of work.

/// Runs `work` in a thread of its own and waits for it: what the kernel remembers of that thread (whom it traces, which
/// namespaces it is in) ends with it. A panic goes on in the caller.
pub fn apart<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// The same for work that changes whom the thread is: the kernel makes the whole process undumpable then (prctl(2)), which is
/// taken back.
pub fn as_another<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    use rustix::process::{dumpable_behavior, set_dumpable_behavior, DumpableBehavior};
    let before = dumpable_behavior();
    let result = apart(work);
    if matches!(before, Ok(DumpableBehavior::Dumpable)) {
        if let Err(e) = set_dumpable_behavior(DumpableBehavior::Dumpable) {
            tracing::warn!("the process stays undumpable: {e}");
        }
    }
    result
}
