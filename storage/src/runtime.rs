//! The thread in which requests run.

use std::future::Future;
use std::io;
use std::sync::mpsc::{sync_channel, RecvTimeoutError};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::SigSet;
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// How often who waits asks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// Says whether who waits is to give up.
pub(crate) type Interrupted = Arc<dyn Fn() -> bool + Send + Sync>;

pub(crate) struct Runtime {
    handle: Handle,
    interrupted: Interrupted,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Runtime {
    pub(crate) fn start(interrupted: Interrupted) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().max_blocking_threads(4).build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new().name("storage".into()).spawn(move || {
            // signals belong to others; threads that are started for file:// and for names of hosts have them blocked, too
            let _ = SigSet::all().thread_block();
            let _ = runtime.block_on(stopped);
            runtime.shutdown_timeout(Duration::from_millis(100));
        })?;
        Ok(Self { handle, interrupted, stop: Some(stop), thread: Some(thread) })
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Waits for something that is done in the thread.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
        let (send, receive) = sync_channel(1);
        let task = self.handle.spawn(async move {
            let _ = send.send(work.await);
        });
        loop {
            match receive.recv_timeout(LOOK) {
                Ok(value) => return Ok(value),
                Err(RecvTimeoutError::Timeout) if (self.interrupted)() => {
                    task.abort();
                    return Err(io::Error::other("interrupted by a signal"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(io::Error::other("the request was not finished")),
            }
        }
    }

    /// The same for a while at most, whatever else happens.
    pub(crate) fn run_for(&self, limit: Duration, work: impl Future<Output = ()> + Send + 'static) {
        let (send, receive) = sync_channel(1);
        self.handle.spawn(async move {
            let _ = send.send(tokio::time::timeout(limit, work).await.is_ok());
        });
        let _ = receive.recv_timeout(limit + Duration::from_secs(1));
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
