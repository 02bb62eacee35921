//! CRIU's RPC: a client asks over a unix socket, and is answered.
//!
//! [`Session`] serves one connection: that of `swrk FD`, whose client started us and lets us be its hands, or one of the
//! service's. A request is decoded ([`wire`]), becomes [`Options`] ([`request`], [`folders`]) and a call of the engine, whose
//! stages are announced to the client ([`notify`]); then comes the answer ([`answer`]). Who the client is, and what it may,
//! is in [`peer`].
//!
//! One request is served a connection, unless it asks for more (`keep_open`) and is of a kind that leaves nothing behind.
//! PRE_DUMP may be followed by more of its kind, and by one DUMP. An error is answered with a number where CRIU has one (ESRCH:
//! no such process; EEXIST: a process id is in use; EBADRQC: a bad request), and one line; the log has what led to it. A
//! packet that is no request, which CRIU lets go without a word, is answered too.
//!
//! The client may be in the tree that it wants dumped: a DUMP without a process id means the client. It gets its answer only
//! if it lives on; if it is killed, it finds the answer in its socket when it is restored, and the answer says so
//! (`restored`).
//!
//! What the engine cannot do yet is refused by the engine's own list ([`crate::options::REFUSALS`]). A server for pages is
//! a process of its own.
//!
//! Man page: criu(8).

use std::os::fd::{BorrowedFd, OwnedFd};
use std::process::Child;

use standstill_images::proto::{CriuFeatures, CriuOpts, CriuReq, CriuReqType, CriuResp};
use standstill_images::Images;

use crate::check::{self, Category};
use crate::cpu;
use crate::error::Error;
use crate::options::Options;
use crate::stages::{Listener, Stages};
use crate::transfer::server::{self, Socket};

pub mod answer;
pub mod folders;
pub mod notify;
pub mod peer;
pub mod request;
pub mod wire;

use folders::{Prepared, ReadConfig};
use notify::Notifier;
use request::{Client, Purpose};
use wire::Connection;

/// Why a request was not served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The number that CRIU has for it, if it has one.
    pub errno: Option<i32>,
    /// What was wrong.
    pub text: String,
}

impl Fault {
    /// The request makes no sense.
    pub fn bad(text: String) -> Fault {
        Fault { errno: Some(libc::EBADRQC), text }
    }

    /// CRIU has no number for it.
    pub fn plain(text: String) -> Fault {
        Fault { errno: None, text }
    }

    /// From the engine.
    pub fn engine(e: &Error) -> Fault {
        let errno = match e.cause() {
            Error::NoProcess { .. } | Error::IdInUse { .. } => Some(e.errno()),
            _ => None,
        };
        Fault { errno, text: e.chain() }
    }
}

/// What one exits with: served, not served, not understood.
const SERVED: i32 = 0;
const FAILED: i32 = 1;
const NO_REQUEST: i32 = 255;

/// Starts a page server in a process of its own, with these options, for this socket.
pub type StartServer = fn(&Options, &Socket) -> Result<Child, String>;

/// One connection.
#[derive(Debug)]
pub struct Session {
    connection: Connection,
    base: Options,
    client: Client,
    config: ReadConfig,
    start: StartServer,
}

impl Session {
    /// A connection to a client that started us (`is_parent`) or came to the service. `base` is what configuration files say;
    /// `config` reads one more; `start` starts a page server.
    pub fn new(
        socket: OwnedFd,
        is_parent: bool,
        base: Options,
        config: ReadConfig,
        start: StartServer,
    ) -> Result<Session, Fault> {
        let connection = Connection::new(socket);
        let client = peer::client(connection.socket(), is_parent)?;
        Ok(Session { connection, base, client, config, start })
    }

    /// Serves it to its end; the result is an exit code.
    pub fn serve(&self) -> i32 {
        loop {
            let request = match self.connection.receive() {
                Ok(Some(request)) => request,
                Ok(None) => return NO_REQUEST,
                Err(fault) => return self.not_understood(fault),
            };
            let again = request.keep_open == Some(true);
            let code = self.one(request);
            if code != SERVED || !again {
                return code;
            }
        }
    }

    fn one(&self, request: CriuReq) -> i32 {
        use CriuReqType as Kind;
        let Ok(kind) = Kind::try_from(request.r#type) else {
            return self.not_understood(Fault::plain(format!("Invalid req: {} is no type", request.r#type)));
        };
        if request.keep_open == Some(true) && !may_keep_open(kind) {
            let text = format!("Invalid req: {} cannot be kept open", kind.as_str_name());
            return self.not_understood(Fault::plain(text));
        }
        tracing::info!("request {}", kind.as_str_name());
        let opts = request.opts.unwrap_or_default();
        match kind {
            Kind::Dump => self.dump(&opts),
            Kind::Restore => self.restore(&opts),
            Kind::Check => self.answer(answer::plain(kind, &self.check(&opts))),
            Kind::PreDump => self.pre_dumps(opts),
            Kind::SinglePreDump => self.pre_dump(kind, &opts),
            Kind::PageServer | Kind::PageServerChld => self.page_server(&opts, kind == Kind::PageServerChld),
            Kind::CpuinfoDump | Kind::CpuinfoCheck => {
                let done = self.cpuinfo(&opts, kind == Kind::CpuinfoDump);
                self.answer(answer::plain(kind, &done))
            }
            Kind::FeatureCheck => self.answer(features(request.features)),
            Kind::Version => self.answer(answer::version()),
            Kind::WaitPid => self.answer(wait_for(request.pid)),
            Kind::Empty | Kind::Notify => self.not_understood(Fault::plain("Invalid req".into())),
        }
    }

    fn answer(&self, answer: CriuResp) -> i32 {
        if let Some(text) = &answer.cr_errmsg {
            tracing::error!("{}", text.strip_prefix("Error: ").unwrap_or(text));
        }
        match self.connection.send(answer, None) {
            Ok(()) => SERVED,
            Err(fault) => {
                tracing::error!("{}", fault.text);
                FAILED
            }
        }
    }

    fn not_understood(&self, fault: Fault) -> i32 {
        self.answer(answer::plain(
            CriuReqType::Empty,
            &Err(Fault { text: format!("RPC error: {}", fault.text), ..fault }),
        ));
        NO_REQUEST
    }

    fn prepare(&self, opts: &CriuOpts, purpose: Purpose) -> Result<Prepared, Fault> {
        let mut prepared = folders::prepare(&self.base, opts, self.client, purpose, self.config)?;
        let socket = rustix::fs::fstat(self.connection.socket());
        let inode = socket.map_err(|e| Fault::plain(format!("Can't get socket stat: {e}")))?.st_ino;
        prepared.options.service_socket = u32::try_from(inode).ok();
        prepared.options.refuse_unsupported().map_err(|e| Fault::bad(e.to_string()))?;
        Ok(prepared)
    }

    /// Runs something of the engine's, with its stages announced if that was asked for.
    fn with_stages<T>(&self, options: &Options, run: impl FnOnce(&Stages<'_>) -> crate::Result<T>) -> Result<T, Fault> {
        let notifier = Notifier(&self.connection);
        let listener = options.notify_scripts.then_some(&notifier as &dyn Listener);
        run(&Stages::new(options, listener)).map_err(|e| Fault::engine(&e))
    }

    fn dump(&self, opts: &CriuOpts) -> i32 {
        let of_itself = opts.pid.unwrap_or(0) == 0;
        let done = self.prepare(opts, Purpose::Dump).and_then(|prepared| {
            let options = &prepared.options;
            self.with_stages(options, |stages| crate::dump::run_with(options, stages)).map(drop)
        });
        let failed = done.is_err();
        if !failed {
            tracing::info!("Dumping finished successfully");
        }
        // who had itself dumped and is dead reads its answer when it is restored
        let sent = if opts.leave_running == Some(true) || !of_itself || failed {
            self.answer(answer::dumped(&done))
        } else {
            SERVED
        };
        if failed {
            FAILED
        } else {
            sent
        }
    }

    fn restore(&self, opts: &CriuOpts) -> i32 {
        let prepared = self.prepare(opts, Purpose::Restore);
        let done = prepared.as_ref().map_err(Fault::clone).and_then(|prepared| {
            let options = &prepared.options;
            self.with_stages(options, |stages| crate::restore::run_with(options, stages)).map(|report| report.pid)
        });
        let failed = done.is_err();
        let sent = self.answer(answer::restored(&done));
        if failed || sent != SERVED {
            return FAILED;
        }
        tracing::info!("Restore finished successfully. Tasks resumed.");
        prepared.map_or(SERVED, |prepared| become_command(&prepared.options))
    }

    /// A server for pages. `child`: it stays our child, and the client waits for it through us.
    fn page_server(&self, opts: &CriuOpts, child: bool) -> i32 {
        let begun = self.prepare(opts, Purpose::PageServer).and_then(|prepared| {
            let (socket, port) = server::socket(&prepared.options).map_err(|e| Fault::engine(&e))?;
            let process = (self.start)(&prepared.options, &socket).map_err(Fault::plain)?;
            Ok((process, port))
        });
        let answer = match begun {
            Ok((mut process, port)) => {
                let answer = answer::page_server(process.id(), port);
                if !child {
                    // nothing of it stays when it ends
                    std::thread::spawn(move || process.wait());
                }
                answer
            }
            Err(fault) => answer::plain(CriuReqType::PageServer, &Err(fault)),
        };
        let failed = !answer.success;
        let sent = self.answer(answer);
        if failed {
            FAILED
        } else {
            sent
        }
    }

    fn cpuinfo(&self, opts: &CriuOpts, dumps: bool) -> Result<(), Fault> {
        let prepared = self.prepare(opts, Purpose::Cpuinfo)?;
        let options = &prepared.options;
        let images = Images::open_folder(&options.images_dir).map_err(crate::Error::from);
        let done = images.and_then(|images| if dumps { cpu::dump(&images) } else { cpu::check_all(options, &images) });
        done.map_err(|e| Fault::engine(&e))
    }

    fn check(&self, opts: &CriuOpts) -> Result<(), Fault> {
        self.prepare(opts, Purpose::Check)?;
        let required = check::FEATURES.iter().filter(|f| f.category == Category::Required);
        for feature in required {
            if let Err(lack) = (feature.probe)() {
                return Err(Fault::plain(format!("{} is missing: {}", feature.name, lack.reason())));
            }
        }
        Ok(())
    }

    fn pre_dump(&self, kind: CriuReqType, opts: &CriuOpts) -> i32 {
        let done = self
            .prepare(opts, Purpose::PreDump)
            .and_then(|prepared| crate::pre_dump::run(&prepared.options).map(drop).map_err(|e| Fault::engine(&e)));
        let failed = done.is_err();
        let sent = self.answer(answer::plain(kind, &done));
        if failed || sent != SERVED {
            NO_REQUEST
        } else {
            SERVED
        }
    }

    /// Pre-dumps of a series, and the dump that ends it.
    fn pre_dumps(&self, mut opts: CriuOpts) -> i32 {
        loop {
            let code = self.pre_dump(CriuReqType::PreDump, &opts);
            if code != SERVED {
                return code;
            }
            let next = match self.connection.receive() {
                Ok(Some(next)) => next,
                Ok(None) => return NO_REQUEST,
                Err(fault) => return self.not_understood(fault),
            };
            opts = next.opts.clone().unwrap_or_default();
            match CriuReqType::try_from(next.r#type) {
                Ok(CriuReqType::PreDump) => {}
                Ok(CriuReqType::Dump) => return self.dump(&opts),
                _ => return self.not_understood(Fault::plain("Bad req seq".into())),
            }
        }
    }
}

/// Kinds of requests that leave nothing behind that the next could stumble over.
fn may_keep_open(kind: CriuReqType) -> bool {
    use CriuReqType as Kind;
    match kind {
        Kind::PageServer
        | Kind::PageServerChld
        | Kind::CpuinfoDump
        | Kind::CpuinfoCheck
        | Kind::FeatureCheck
        | Kind::Version => true,
        Kind::Empty
        | Kind::Dump
        | Kind::Restore
        | Kind::Check
        | Kind::PreDump
        | Kind::Notify
        | Kind::WaitPid
        | Kind::SinglePreDump => false,
    }
}

/// Of the features that are asked for, those that kernel and engine have; all others are answered with no.
fn features(asked: Option<CriuFeatures>) -> CriuResp {
    let kind = CriuReqType::FeatureCheck;
    let Some(asked) = asked else {
        return answer::plain(kind, &Err(Fault::bad("no features were asked for".into())));
    };
    let has = |asked: Option<bool>, option: &str, feature: &str| {
        let works = crate::options::refusal(option).is_none();
        Some(asked == Some(true) && works && check::has(feature) == Some(true))
    };
    let features = CriuFeatures {
        mem_track: has(asked.mem_track, "track-mem", "mem_dirty_track"),
        lazy_pages: has(asked.lazy_pages, "lazy-pages", "uffd-noncoop"),
        pidfd_store: has(asked.pidfd_store, "track-mem", "pidfd_store"),
    };
    CriuResp { features: Some(features), ..answer::plain(kind, &Ok(())) }
}

/// Waits for a child of ours that an earlier request has made.
fn wait_for(pid: Option<u32>) -> CriuResp {
    let kind = CriuReqType::WaitPid;
    let pid = pid.and_then(|pid| i32::try_from(pid).ok()).filter(|&pid| pid > 0);
    let waited = match pid {
        Some(pid) => crate::sys::calls::wait_child(pid, libc::__WALL),
        None => return answer::plain(kind, &Err(Fault { errno: Some(libc::ECHILD), text: "Unable to wait 0".into() })),
    };
    match waited {
        Ok(Some((_, status))) => CriuResp { status: Some(status), ..answer::plain(kind, &Ok(())) },
        Ok(None) => answer::plain(kind, &Err(Fault::plain("Unable to wait".into()))),
        Err(e) => {
            let text = format!("Unable to wait {}: {}", pid.unwrap_or(0), e.chain());
            answer::plain(kind, &Err(Fault { errno: Some(e.errno()), text }))
        }
    }
}

/// The command that the request names takes our place, as the parent of what was restored; what it prints goes to the log.
fn become_command(options: &Options) -> i32 {
    use std::os::unix::process::CommandExt as _;
    let Some((program, args)) = options.exec_cmd.split_first() else { return SERVED };
    let mut command = std::process::Command::new(program);
    command.args(args).current_dir(options.work_dir());
    if let (Some(out), Some(err)) = (crate::log::file(), crate::log::file()) {
        command.stdout(out).stderr(err);
    }
    let error = crate::sys::calls::plain_signals(&mut command).exec();
    tracing::error!("Failed to exec cmd {}: {error}", std::path::Path::new(program).display());
    FAILED
}

/// The capabilities and ids of this process become those of the client at the other end. For a worker of the service, whose
/// process serves nobody else.
pub fn become_client(socket: BorrowedFd<'_>) -> Result<(), Fault> {
    peer::become_client(socket)
}
