//! A client of the RPC: what libcriu and container engines do, as far as tests need it.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use prost::Message as _;
use standstill_images::proto::{CriuOpts, CriuReq, CriuReqType, CriuResp};

use crate::engine::Engine;
use crate::process::{within, Patience};

const LIMIT: Duration = Duration::from_secs(60);

/// A connection, and the program at its other end if it is our child.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
    worker: Option<Child>,
}

fn check(r: libc::c_int) -> io::Result<libc::c_int> {
    if r < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(r)
    }
}

/// A request of this kind, with options.
pub fn request(kind: CriuReqType, opts: CriuOpts) -> CriuReq {
    CriuReq { r#type: kind.into(), opts: Some(opts), ..CriuReq::default() }
}

/// Options with a folder for images.
pub fn options(images: &Path) -> CriuOpts {
    std::fs::create_dir_all(images).unwrap_or_else(|e| panic!("{}: {e}", images.display()));
    CriuOpts {
        images_dir: Some(images.display().to_string()),
        log_level: Some(4),
        log_file: Some("rpc.log".into()),
        ..CriuOpts::default()
    }
}

impl Client {
    /// Starts `swrk`, with these variables in its environment.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn swrk(engine: &Engine, env: &[(&str, &str)]) -> Client {
        let mut pair = [0; 2];
        // SAFETY: a place for two numbers, which are ours alone then.
        let (ours, theirs) = unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
            check(libc::socketpair(libc::AF_UNIX, kind, 0, pair.as_mut_ptr())).unwrap_or_else(|e| panic!("{e}"));
            (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1]))
        };
        let mut command = Command::new(&engine.path);
        command.arg("swrk").arg(theirs.as_raw_fd().to_string()).envs(env.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let number = theirs.as_raw_fd();
        // SAFETY: between fork and exec only this system call is made.
        unsafe {
            command.pre_exec(move || check(libc::fcntl(number, libc::F_SETFD, 0)).map(drop));
        }
        let worker = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", engine.path.display()));
        let client = Client { socket: ours, worker: Some(worker) };
        client.wait_no_longer();
        client
    }

    /// Connects to a service.
    ///
    /// # Errors
    /// Those of connect(2).
    pub fn connect(path: &Path) -> io::Result<Client> {
        // SAFETY: the address is a plain struct that lives across the call; the number is ours alone.
        unsafe {
            let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
            let socket = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_UNIX, kind, 0))?);
            let mut address: libc::sockaddr_un = std::mem::zeroed();
            address.sun_family = libc::AF_UNIX as libc::sa_family_t;
            for (to, from) in address.sun_path.iter_mut().zip(path.as_os_str().as_bytes()) {
                *to = *from as libc::c_char;
            }
            let size = size_of::<libc::sockaddr_un>() as libc::socklen_t;
            check(libc::connect(socket.as_raw_fd(), (&raw const address).cast(), size))?;
            let client = Client { socket, worker: None };
            client.wait_no_longer();
            Ok(client)
        }
    }

    /// An answer that does not come is an error, not a test that hangs.
    fn wait_no_longer(&self) {
        let limit = libc::timeval { tv_sec: 60, tv_usec: 0 };
        // SAFETY: the size is that of the struct.
        let r = unsafe {
            libc::setsockopt(
                self.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        };
        assert_eq!(r, 0);
    }

    /// Sends bytes.
    ///
    /// # Panics
    /// If they cannot be sent.
    pub fn send(&self, bytes: &[u8]) {
        // SAFETY: the length is that of the slice.
        let r = unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
        assert_eq!(usize::try_from(r).ok(), Some(bytes.len()), "{}", io::Error::last_os_error());
    }

    /// The next answer; `None`: the other end is closed.
    ///
    /// # Panics
    /// If what comes is too long for clients, or is none.
    pub fn receive(&self) -> Option<CriuResp> {
        let mut buffer = vec![0u8; 8192];
        let len = loop {
            // SAFETY: the length is that of the buffer.
            let r = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            match usize::try_from(r) {
                Ok(0) => return None,
                Ok(len) => break len,
                Err(_) => match io::Error::last_os_error() {
                    // a receive with a limit is not begun again (signal(7)), and even a signal that nobody waits for wakes it
                    // while another thread is just being made, with all signals blocked
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e if e.kind() == io::ErrorKind::ConnectionReset => return None,
                    e => panic!("no answer: {e}"),
                },
            }
        };
        assert!(len < 1024, "an answer of {len} bytes");
        let answer = CriuResp::decode(&buffer[..len]).unwrap_or_else(|e| panic!("{e}"));
        let text = answer.cr_errmsg.as_deref().unwrap_or("");
        assert!(!text.contains('\n'), "{text}");
        Some(answer)
    }

    /// Sends a request, and receives its answer.
    ///
    /// # Panics
    /// If there is none.
    pub fn call(&self, request: &CriuReq) -> CriuResp {
        self.send(&request.encode_to_vec());
        self.receive().unwrap_or_else(|| panic!("no answer to {request:?}"))
    }

    /// Sends a request whose stages are announced; says yes to all but one. What was announced, and the answer.
    pub fn call_with_stages(&self, request: &CriuReq, no: &str) -> (Vec<(String, Option<i32>)>, CriuResp) {
        let mut stages = Vec::new();
        let mut answer = self.call(request);
        while let (CriuReqType::Notify, Some(stage)) = (answer.r#type(), &answer.notify) {
            let name = stage.script.clone().unwrap_or_default();
            stages.push((name.clone(), stage.pid));
            let yes =
                CriuReq { r#type: CriuReqType::Notify.into(), notify_success: Some(name != no), ..CriuReq::default() };
            answer = self.call(&yes);
        }
        (stages, answer)
    }

    /// Waits for the program at the other end; its exit code.
    ///
    /// # Panics
    /// If it does not end.
    pub fn finish(mut self) -> Option<i32> {
        drop(self.socket);
        let mut worker = self.worker.take()?;
        let mut patience = Patience::of(LIMIT);
        loop {
            if let Some(status) = worker.try_wait().unwrap_or_else(|e| panic!("{e}")) {
                return status.code();
            }
            assert!(!patience.over(), "swrk does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A service that runs, until this goes away.
#[derive(Debug)]
pub struct Service {
    /// Where it listens.
    pub socket: PathBuf,
    child: Child,
}

impl Service {
    /// Starts one in a folder.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start(engine: &Engine, folder: &Path) -> Service {
        let socket = folder.join("service.socket");
        let ready = folder.join("service.ready");
        let status = File::create(&ready).unwrap_or_else(|e| panic!("{}: {e}", ready.display()));
        let number = status.as_raw_fd();
        let mut command = Command::new(&engine.path);
        command.args([
            "service",
            "-v4",
            "-o",
            "service.log",
            "--address",
            "service.socket",
            "--pidfile",
            "service.pid",
        ]);
        command.arg("-W").arg(folder).args(["--status-fd", &number.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // SAFETY: between fork and exec only this system call is made.
        unsafe {
            command.pre_exec(move || check(libc::fcntl(number, libc::F_SETFD, 0)).map(drop));
        }
        let child = command.spawn().unwrap_or_else(|e| panic!("{}: {e}", engine.path.display()));
        let service = Service { socket, child };
        let up = within(LIMIT, || std::fs::read(&ready).unwrap_or_default() == [0]);
        assert!(up, "the service does not come up");
        service
    }

    /// The process that listens.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
