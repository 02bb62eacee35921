//! `migrate` and `receive`: a tree moves from one host to another. What they do is in [`crate::migrate`].

use std::ffi::OsString;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Parser, ValueEnum};
use serde_json::json;
use tracing::error;

use super::dump::human_size;
use super::metrics::{self, Figures};
use super::{outcome, parse_words, print};
use crate::error::{Call as _, Error, Result};
use crate::migrate::destination::{self, Receive};
use crate::migrate::source::{self, Migrate, Resumed};
use crate::migrate::{Report, Strategy, Told};
use crate::options::{External, NetworkLock, Options};

/// Move a running process tree to another host.
#[derive(Debug, Parser)]
#[command(name = "standstill migrate", bin_name = "standstill migrate")]
struct MigrateArguments {
    /// The root of the tree.
    #[arg(short = 't', long = "tree", value_name = "PID", required_unless_present = "resume")]
    pid: Option<i32>,
    /// Where `standstill receive` listens.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "resume")]
    to: Option<String>,
    /// A folder for images and the journal of this migration (a new one below the temporary folder by default).
    #[arg(short = 'D', long, value_name = "DIR")]
    images_dir: Option<PathBuf>,
    /// How memory gets there.
    #[arg(long, value_enum, default_value_t = Way::Auto)]
    strategy: Way,
    /// The most passes while the tree runs.
    #[arg(long, value_name = "N", default_value_t = 10)]
    passes: u32,
    /// Decide a migration that was broken off, by the journal in its folder.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["pid", "images_dir"])]
    resume: Option<PathBuf>,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
    /// Write figures of the migration for Prometheus.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    #[command(flatten)]
    dump: DumpArguments,
    #[command(flatten)]
    tls: TlsArguments,
}

/// What a dump is told, under the names that `dump` has.
#[derive(Debug, Args)]
struct DumpArguments {
    /// Carry established TCP connections.
    #[arg(long)]
    tcp_established: bool,
    /// Carry locks on files.
    #[arg(short = 'l', long)]
    file_locks: bool,
    /// The other end of a unix socket may be outside the tree.
    #[arg(short = 'x', long = "ext-unix-sk")]
    ext_unix_sk: bool,
    /// Deleted files that still have a name elsewhere may be linked back.
    #[arg(long)]
    link_remap: bool,
    /// Something outside the tree.
    #[arg(long, value_name = "KIND[ID]")]
    external: Vec<String>,
    /// A program to run at the stages of the dump.
    #[arg(long, value_name = "FILE")]
    action_script: Vec<PathBuf>,
    /// How much is logged, 0 to 4.
    #[arg(short = 'v', long, value_name = "LEVEL", default_value_t = 2)]
    verbosity: u32,
}

/// Encryption, under the names that page servers have.
#[derive(Debug, Args)]
struct TlsArguments {
    /// Encrypt the connection; both sides have certificates and check the other's.
    #[arg(long)]
    tls: bool,
    /// Who may sign the other's certificate.
    #[arg(long, value_name = "FILE")]
    tls_cacert: Option<PathBuf>,
    /// Which certificates are revoked.
    #[arg(long, value_name = "FILE")]
    tls_cacrl: Option<PathBuf>,
    /// Our certificate.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Our private key.
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Do not compare the name of the destination with its certificate.
    #[arg(long)]
    tls_no_cn_verify: bool,
}

impl TlsArguments {
    fn put_into(self, options: Options) -> Options {
        Options {
            tls: self.tls,
            tls_cacert: self.tls_cacert,
            tls_cacrl: self.tls_cacrl,
            tls_cert: self.tls_cert,
            tls_key: self.tls_key,
            tls_no_cn_verify: self.tls_no_cn_verify,
            ..options
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Way {
    /// By what is measured.
    Auto,
    /// All memory while the tree stands still.
    StopAndCopy,
    /// In passes while the tree runs.
    PreCopy,
    /// When it is touched at the destination, and in the background; a host that is lost before all is there takes the tree along.
    PostCopy,
    /// One pass while the tree runs, and the rest as post-copy does it.
    Hybrid,
}

/// Take trees that migrate.
#[derive(Debug, Parser)]
#[command(name = "standstill receive", bin_name = "standstill receive")]
struct ReceiveArguments {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:27100")]
    listen: String,
    /// A folder for images and journals.
    #[arg(short = 'D', long, value_name = "DIR", default_value = "/var/lib/standstill/receive")]
    images_dir: PathBuf,
    /// Take one tree, and end with it.
    #[arg(long)]
    once: bool,
    /// Print what happens as JSON, an object a line.
    #[arg(long)]
    json: bool,
    /// Listen where others than this host can reach us, though nothing is encrypted and nobody is asked who they are.
    #[arg(long)]
    insecure: bool,
    /// The root folder of trees.
    #[arg(short, long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// A program to run at the stages of a restore.
    #[arg(long, value_name = "FILE")]
    action_script: Vec<PathBuf>,
    /// How much is logged, 0 to 4.
    #[arg(short = 'v', long, value_name = "LEVEL", default_value_t = 2)]
    verbosity: u32,
    #[command(flatten)]
    tls: TlsArguments,
}

fn told() -> Told {
    Arc::new(|line: &str| print(&format!("{line}\n")))
}

fn end(result: Result<()>, what: &str) -> i32 {
    match result {
        Ok(()) => 0,
        Err(e) => {
            error!("{}", e.chain());
            error!("{what}");
            // who is in doubt is told apart: nothing runs before somebody decides
            if matches!(e.cause(), Error::InDoubt { .. }) {
                3
            } else {
                1
            }
        }
    }
}

/// Runs `migrate`; the exit status is 0 when the tree is over there, 1 when it is here as before, 3 when that is in doubt.
pub fn run(arguments: &[OsString]) -> i32 {
    let arguments: MigrateArguments = match parse_words("standstill migrate", arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    crate::log::set_level(arguments.dump.verbosity);
    crate::sys::calls::raise_limit_of_files();
    let (json, metrics) = (arguments.json, arguments.metrics.clone());
    let began = std::time::Instant::now();
    let result = migrate(arguments);
    let mut figures = Figures { total: began.elapsed(), ..Figures::default() };
    if let Ok(Moved::Done(report, _)) = &result {
        figures.frozen = Duration::try_from_secs_f64(report.downtime_seconds).ok();
        figures.bytes = Some(report.passes.iter().map(|pass| pass.bytes).sum());
    }
    if let Some(path) = metrics {
        metrics::tell(&path, "migrate", result.is_ok(), &figures);
    }
    match &result {
        Ok(moved) if json => outcome::say(&outcome::done("migrate", moved.as_json())),
        Ok(moved) => print(&moved.as_text()),
        Err(e) if json => {
            let in_doubt = matches!(e.cause(), Error::InDoubt { .. });
            outcome::say(&outcome::object("migrate", "failed", json!({ "error": e.links(), "in_doubt": in_doubt })));
        }
        Err(_) => {}
    }
    end(result.map(drop), "Migration FAILED.")
}

/// How a migration ended.
enum Moved {
    /// It is at the destination, which is called so.
    Done(Report, String),
    /// It was in doubt.
    Decided(Resumed),
}

impl Moved {
    fn as_text(&self) -> String {
        match self {
            Moved::Done(report, to) => table(report, to),
            Moved::Decided(Resumed::There(pid)) => format!("it runs at the destination, as process {pid}\n"),
            Moved::Decided(Resumed::Here) => "it runs here, the destination's is gone\n".to_owned(),
            Moved::Decided(Resumed::Nowhere) => "it has ended here by itself, the destination's is gone\n".to_owned(),
        }
    }

    fn as_json(&self) -> serde_json::Value {
        match self {
            Moved::Done(report, _) => serde_json::to_value(report).unwrap_or_default(),
            Moved::Decided(Resumed::There(pid)) => json!({ "runs": "there", "pid": pid }),
            Moved::Decided(Resumed::Here) => json!({ "runs": "here" }),
            Moved::Decided(Resumed::Nowhere) => json!({ "runs": "nowhere" }),
        }
    }
}

fn migrate(arguments: MigrateArguments) -> Result<Moved> {
    if let Some(folder) = &arguments.resume {
        let options = arguments.tls.put_into(Options::default());
        return source::resume(folder, arguments.to.as_deref(), &options).map(Moved::Decided);
    }
    let (to, pid) = (arguments.to.unwrap_or_default(), arguments.pid);
    let made = arguments.images_dir.is_none();
    let folder = arguments.images_dir.unwrap_or_else(|| {
        std::env::temp_dir().join(format!("standstill-migrate-{}-{}", pid.unwrap_or(0), std::process::id()))
    });
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).call("mkdir")?;
    let options = Options {
        pid,
        images_dir: folder.clone(),
        network_lock: NetworkLock::Nftables,
        tcp_established: arguments.dump.tcp_established,
        file_locks: arguments.dump.file_locks,
        ext_unix_sk: arguments.dump.ext_unix_sk,
        link_remap: arguments.dump.link_remap,
        external: arguments.dump.external.iter().map(|text| External::parse(text)).collect(),
        action_scripts: arguments.dump.action_script,
        log_level: arguments.dump.verbosity,
        ..Options::default()
    };
    let options = arguments.tls.put_into(options);
    let strategy = match arguments.strategy {
        Way::Auto => Strategy::Auto,
        Way::StopAndCopy => Strategy::StopAndCopy,
        Way::PreCopy => Strategy::PreCopy,
        Way::PostCopy => Strategy::PostCopy,
        Way::Hybrid => Strategy::Hybrid,
    };
    let quiet: Told = Arc::new(|_: &str| {});
    let told = if arguments.json { quiet } else { told() };
    let result =
        source::run(&Migrate { options, to: to.clone(), strategy, most_passes: arguments.passes.max(1) }, &told);
    if made && !matches!(&result, Err(e) if matches!(e.cause(), Error::InDoubt { .. })) {
        let _ = std::fs::remove_dir_all(&folder);
    }
    result.map(|report| Moved::Done(report, to))
}

fn table(report: &Report, to: &str) -> String {
    use std::fmt::Write as _;
    let ms = |seconds: f64| format!("{:.1} ms", seconds * 1000.0);
    let mut text = format!("{:<6}{:>12}{:>14}{:>14}\n", "pass", "sent", "took", "stood still");
    for (n, pass) in report.passes.iter().enumerate() {
        let name = if n + 1 == report.passes.len() { "last".to_owned() } else { (n + 1).to_string() };
        let (sent, took, still) = (human_size(pass.bytes), ms(pass.seconds), ms(pass.frozen_seconds));
        let _ = writeln!(text, "{name:<6}{sent:>12}{took:>14}{still:>14}");
    }
    let _ = writeln!(
        text,
        "process {} runs at {to}; nobody ran for {} ({} was predicted), all took {}",
        report.pid,
        ms(report.downtime_seconds),
        ms(report.predicted_seconds),
        ms(report.total_seconds)
    );
    text
}

/// Runs `receive`.
pub fn run_receive(arguments: &[OsString]) -> i32 {
    let arguments: ReceiveArguments = match parse_words("standstill receive", arguments) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    crate::log::set_level(arguments.verbosity);
    crate::sys::calls::raise_limit_of_files();
    let json = arguments.json;
    let result = receive(arguments);
    if let (true, Err(e)) = (json, &result) {
        outcome::say(&outcome::failed("receive", e));
    }
    end(result, "Receiving FAILED.")
}

fn told_as_json() -> Told {
    Arc::new(|line: &str| outcome::say(&outcome::object("receive", "told", json!({ "text": line }))))
}

fn receive(arguments: ReceiveArguments) -> Result<()> {
    let addresses: Vec<SocketAddr> = arguments.listen.to_socket_addrs().call("getaddrinfo")?.collect();
    if !arguments.insecure && !arguments.tls.tls && addresses.iter().any(|a| !a.ip().is_loopback()) {
        let what =
            "whoever reaches the port can start programs here: give certificates (--tls), listen on 127.0.0.1 behind a tunnel (ssh -L), \
                    or say --insecure if nobody else can reach it";
        return Err(Error::Usage { what: what.into() });
    }
    let listener = TcpListener::bind(addresses.as_slice()).call("bind")?;
    let at = listener.local_addr().call("getsockname")?;
    let options = Options {
        root: arguments.root,
        action_scripts: arguments.action_script,
        log_level: arguments.verbosity,
        ..Options::default()
    };
    let options = arguments.tls.put_into(options);
    let told = if arguments.json {
        outcome::say(&outcome::object("receive", "listening", json!({ "address": at.to_string() })));
        told_as_json()
    } else {
        let told = told();
        told(&format!("listening on {at}"));
        told
    };
    destination::run(&listener, &Receive { folder: arguments.images_dir, options, once: arguments.once }, &told)
}
