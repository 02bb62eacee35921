//! The command-line program: what CRIU does in every text, default and exit code under the name `criu`, and what we think
//! better under any other name.
//!
//! [`main`] is the order of steps that CRIU's callers can observe: options, verb, capabilities, folders, log, conflicts,
//! then the verb's own file. Errors are events; they reach the log, or standard error if there is no log yet.

use crate::log;
use crate::options::{Options, Persona};
use crate::stores::Channel;
use std::ffi::{OsStr, OsString};
use std::os::fd::IntoRawFd as _;
use std::path::Path;
use tracing::{error, info, warn};

pub mod bars;
pub mod capabilities;
pub mod check;
pub mod config_files;
pub mod cpuinfo;
pub mod demo;
pub mod dump;
pub mod getopt;
pub mod image;
pub mod keep;
pub mod lazy_pages;
pub mod metrics;
pub mod migrate;
pub mod outcome;
pub mod page_server;
pub mod parse;
pub mod restore;
pub mod service;
pub mod swrk;
pub mod table;
pub mod usage;
mod values;
pub mod verify;

use parse::{CommandLine, Stop};

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // their names are the verbs
pub enum Verb {
    Dump,
    PreDump,
    Restore,
    LazyPages,
    Check,
    PageServer,
    PageServerWorker,
    LazyPagesWorker,
    Service,
    Swrk,
    ServiceLoop,
    ServiceWorker,
    Dedup,
    Untrack,
    Verify,
    CpuinfoDump,
    CpuinfoCheck,
    Exec,
    Show,
}

/// Runs the program; the result is its exit code.
pub fn main(args: Vec<OsString>) -> i32 {
    log::install(crate::options::DEFAULT_LOG_LEVEL);
    let code = run(&args);
    log::finish();
    code
}

/// A verb has said what was wrong; the usage text follows.
struct UsageError;

fn run(args: &[OsString]) -> i32 {
    let persona = args.first().map_or(Persona::default(), |a| Persona::from_program_name(a));
    if persona == Persona::Standstill {
        // these have options of their own
        match args.get(1).and_then(|verb| verb.to_str()) {
            Some("image") => return image::run(&args[2..]),
            Some("x") => return image::run(&args[1..]),
            Some(crate::gpu::guard::VERB) => return crate::gpu::guard::run(&args[2..]),
            Some(crate::migrate::late::VERB) => return crate::migrate::late::run(&args[2..]),
            Some("demo") => return demo::run(&args[2..]),
            Some("keygen") => return keygen(&args[2..]),
            Some("migrate") => return migrate::run(&args[2..]),
            Some("list") => return keep::run_list(&args[2..]),
            Some("prune") => return keep::run_prune(&args[2..]),
            Some("receive") => return migrate::run_receive(&args[2..]),
            Some("version") => return stop(Stop::Version, persona),
            Some("help") => return stop(Stop::Help, persona),
            _ => {}
        }
    }
    if args.len() < 2 {
        return stop(Stop::Usage, persona);
    }
    let line = match parse::command_line(args) {
        Ok(line) => line,
        Err(reason) => return stop(reason, persona),
    };
    log::set_level(line.options.log_level);
    let program = args.first().map(OsString::as_os_str).unwrap_or_default();
    match perform(line, program) {
        Ok(code) => code,
        Err(UsageError) => stop(Stop::Usage, persona),
    }
}

/// The words behind a verb that has a parser of its own; the exit status if they are wrong, or ask for help.
fn parse_words<A: clap::Parser>(name: &str, arguments: &[OsString]) -> std::result::Result<A, i32> {
    let program = std::iter::once(OsString::from(name));
    A::try_parse_from(program.chain(arguments.iter().cloned())).map_err(|error| {
        // if nobody reads what is wrong, the exit status still tells that something is
        let _ = error.print();
        error.exit_code()
    })
}

/// Makes a key for --key-file.
fn keygen(words: &[OsString]) -> i32 {
    let [file] = words else {
        error!("usage: standstill keygen FILE");
        return 1;
    };
    match crate::stores::keys::generate(Path::new(file)) {
        Ok(()) => {
            print(&format!("a new key is in {}; who loses it loses the checkpoints sealed with it\n", shown(file)));
            0
        }
        Err(e) => {
            error!("{}", e.chain());
            1
        }
    }
}

fn stop(reason: Stop, persona: Persona) -> i32 {
    match reason {
        Stop::Failed => 1,
        Stop::Usage => {
            print(&(usage::short(persona) + usage::HINT));
            1
        }
        Stop::Help => {
            print(&usage::long(persona));
            0
        }
        Stop::Version => {
            print(&usage::version(persona));
            0
        }
    }
}

/// Prints to standard output; a reader that went away is no reason to panic.
pub fn print(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints the GPUs of the checkpoint.
fn print_gpus(options: &Options) {
    let images = standstill_images::Images::open_folder(&options.images_dir).map_err(crate::Error::from);
    match images.and_then(|images| crate::gpu::describe(&images)) {
        Ok(text) if text.is_empty() => print("no GPUs in this checkpoint\n"),
        Ok(text) => print(&text),
        Err(e) => warn!("{}", e.chain()),
    }
}

fn perform(line: CommandLine, program: &OsStr) -> Result<i32, UsageError> {
    let CommandLine { mut options, words, exec_cmd } = line;
    let Some(name) = words.first() else {
        error!("command is required");
        return Err(UsageError);
    };
    let (verb, rest) = verb(name, &words[1..], options.personality)?;
    crate::sys::calls::raise_limit_of_files();
    match verb {
        Verb::Swrk => return Ok(swrk::run(rest, options)),
        Verb::ServiceWorker => return Ok(service::run_worker(rest, options)),
        Verb::PageServerWorker => return Ok(page_server::run_worker(rest, &options)),
        Verb::LazyPagesWorker => return Ok(lazy_pages::run_worker(rest, &options)),
        Verb::ServiceLoop => return Ok(service::run_loop(rest)),
        _ => {}
    }
    if !capabilities::enough(verb, &options, program) {
        return Ok(1);
    }
    command_to_become(&mut options, verb, name, rest, exec_cmd)?;
    let has_images = matches!(verb, Verb::Dump | Verb::PreDump | Verb::Restore | Verb::CpuinfoDump);
    if options.stream && !has_images {
        error!("--stream cannot be used with the {} command", shown(name));
        return Err(UsageError);
    }
    let of_others =
        [(options.to.is_some() && verb != Verb::Dump, "to"), (options.from.is_some() && verb != Verb::Restore, "from")];
    if let Some((_, option)) = of_others.iter().find(|(wrong, _)| *wrong) {
        error!("--{option} cannot be used with the {} command", shown(name));
        return Err(UsageError);
    }
    if !streams(&mut options) || !folders(&options, verb) || !open_log(&options, verb) || !agree(&mut options, verb) {
        return Ok(1);
    }
    Ok(match verb {
        Verb::Dump => dump::run(&options),
        Verb::PreDump => dump::run_pre_dump(&options),
        Verb::Restore => restore::run(&options),
        Verb::Check => check::run(&options),
        Verb::CpuinfoDump => cpuinfo::run_dump(&options),
        Verb::CpuinfoCheck => cpuinfo::run_check(&options),
        Verb::PageServer => page_server::run(&options),
        Verb::LazyPages => lazy_pages::run(&options),
        Verb::Service => service::run(&options),
        Verb::Swrk | Verb::ServiceLoop | Verb::ServiceWorker | Verb::PageServerWorker | Verb::LazyPagesWorker => 1,
        Verb::Dedup => dump::run_dedup(&options),
        Verb::Untrack => dump::run_untrack(&options),
        Verb::Verify => verify::run(&options),
        Verb::Exec => {
            error!("The \"exec\" action is deprecated by the Compel library.");
            255
        }
        Verb::Show => {
            error!("The \"show\" action is deprecated by the CRIT utility.");
            error!("To view an image use the \"crit decode -i $name --pretty\" command.");
            255
        }
    })
}

/// The verb, and the words after it.
fn verb<'a>(name: &OsStr, rest: &'a [OsString], persona: Persona) -> Result<(Verb, &'a [OsString]), UsageError> {
    let verb = match name.to_str().unwrap_or_default() {
        "dump" => Verb::Dump,
        "pre-dump" => Verb::PreDump,
        "restore" => Verb::Restore,
        "lazy-pages" => Verb::LazyPages,
        "check" => Verb::Check,
        "page-server" => Verb::PageServer,
        "lazy-pages-worker" => Verb::LazyPagesWorker,
        "page-server-worker" => Verb::PageServerWorker,
        "service" => Verb::Service,
        "swrk" => Verb::Swrk,
        "service-loop" => Verb::ServiceLoop,
        "service-worker" => Verb::ServiceWorker,
        "dedup" => Verb::Dedup,
        "untrack" if persona == Persona::Standstill => Verb::Untrack,
        "verify" if persona == Persona::Standstill => Verb::Verify,
        "exec" => Verb::Exec,
        "show" => Verb::Show,
        "cpuinfo" => match rest.split_first() {
            None => {
                error!("cpuinfo requires an action: dump or check");
                return Err(UsageError);
            }
            Some((action, rest)) if action == "dump" => return Ok((Verb::CpuinfoDump, rest)),
            Some((action, rest)) if action == "check" => return Ok((Verb::CpuinfoCheck, rest)),
            Some((action, _)) => {
                error!("unknown cpuinfo sub-command: {}", shown(action));
                return Err(UsageError);
            }
        },
        _ => {
            error!("unknown command: {}", shown(name));
            return Err(UsageError);
        }
    };
    Ok((verb, rest))
}

/// What --exec-cmd needs; without it there must be no more words.
fn command_to_become(
    options: &mut Options,
    verb: Verb,
    name: &OsStr,
    rest: &[OsString],
    exec_cmd: bool,
) -> Result<(), UsageError> {
    if let (Verb::Verify, false, [folder]) = (verb, exec_cmd, rest) {
        options.images_dir = folder.into();
        return Ok(());
    }
    let problem = match (exec_cmd, rest.len()) {
        (false, 0) => return Ok(()),
        (false, n) => {
            let plural = if n > 1 { "s" } else { "" };
            format!("excessive parameter{plural} for command {}", shown(name))
        }
        (true, 0) => "--exec-cmd requires a command".to_owned(),
        (true, _) if verb != Verb::Restore => "--exec-cmd is available for the restore command only".to_owned(),
        (true, _) if options.restore_detach => "--restore-detached and --exec-cmd cannot be used together".to_owned(),
        (true, _) => {
            options.exec_cmd = rest.to_vec();
            return Ok(());
        }
    };
    error!("{problem}");
    Err(UsageError)
}

/// If standard output is for images, nothing else may be written there.
fn streams(options: &mut Options) -> bool {
    use std::io::IsTerminal as _;
    if options.to == Some(Channel::Standard) && !std::io::stdout().is_terminal() {
        match crate::sys::calls::set_stdout_aside() {
            Ok(images) => options.to = Some(Channel::Fd(images.into_raw_fd())),
            Err(e) => {
                error!("{}", e.chain());
                return false;
            }
        }
    }
    true
}

/// Are the folders there? They are only looked at: the engine never changes its current folder.
fn folders(options: &Options, verb: Verb) -> bool {
    if verb != Verb::Service {
        if let Err(e) = std::fs::File::open(&options.images_dir) {
            error!("Can't open dir {}: {}", options.images_dir.display(), reason(&e));
            error!("Couldn't open image dir {}", options.images_dir.display());
            return false;
        }
    }
    let entered = std::fs::metadata(options.work_dir().join("."));
    if let Err(e) = entered {
        error!("Can't change directory to {}: {}", options.work_dir().display(), reason(&e));
        return false;
    }
    if verb == Verb::Restore && options.restore_detach && options.leave_stopped() && options.shell_job {
        warn!("Stopped and detached shell job will get SIGHUP from OS.");
    }
    true
}

fn open_log(options: &Options, verb: Verb) -> bool {
    let file = options.log_file.as_deref().map(|f| if f == Path::new("-") { f.into() } else { options.in_work_dir(f) });
    let shown = options.log_file.clone().unwrap_or_default();
    // only a restore has tasks of its own
    let per_pid = options.log_pid && verb == Verb::Restore;
    let target = log::Target { file, per_pid, mirror_errors: true };
    if let Err(e) = log::open(target) {
        error!("Can't create log file {}: {}", shown.display(), reason(&e));
        return false;
    }
    info!("Version: {} (gitid standstill-{})", usage::CRIU_VERSION, env!("CARGO_PKG_VERSION"));
    if let Ok(u) = nix::sys::utsname::uname() {
        let names = [u.nodename(), u.sysname(), u.release(), u.version(), u.machine()];
        info!("Running on {}", names.map(|n| n.to_string_lossy().into_owned()).join(" "));
    }
    true
}

/// Options that exclude each other, and the few that are said out loud.
fn agree(o: &mut Options, verb: Verb) -> bool {
    let said = [
        (o.tcp_established, "Will dump/restore TCP connections"),
        (o.tcp_skip_in_flight, "Will skip in-flight TCP connections"),
        (o.tcp_close, "Will drop all TCP connections on restore"),
        (o.link_remap, "Will allow link remaps on FS"),
        (o.weak_sysctls, "Will skip non-existent sysctls on restore"),
    ];
    for (_, text) in said.iter().filter(|(on, _)| *on) {
        info!("{text}");
    }
    if !o.deprecated && std::env::var_os("CRIU_DEPRECATED").is_some() {
        info!("Turn deprecated stuff ON via env");
        o.deprecated = true;
    }
    if o.ps_socket.is_some() && (o.address.is_some() || o.port.is_some()) {
        warn!("Using --address or --port in combination with --ps-socket is obsolete");
    }
    if let Some(text) = o.conflict(verb == Verb::Restore) {
        error!("{text}");
        if text.starts_with("Conflicting") {
            error!("Error: namespace flags conflict");
        }
        return false;
    }
    for inherited in &o.inherit_fds {
        if std::fs::symlink_metadata(format!("/proc/self/fd/{}", inherited.fd)).is_err() {
            error!("Can't fstat inherit fd {}: Bad file descriptor", inherited.fd);
            return false;
        }
        info!("Inherit fd {} -> {}", inherited.fd, inherited.id);
    }
    if verb == Verb::Restore && o.pid.is_some() {
        warn!("Using -t with criu restore is obsoleted");
    }
    if let Some(parent) = &o.prev_images_dir {
        info!("Will do snapshot from {}", parent.display());
    }
    true
}

/// Is all that was asked for something that can be done? The verbs that carry something ask this first; the others only
/// look, whatever else is on their command line.
pub fn supported(options: &Options) -> bool {
    options.refuse_unsupported().inspect_err(|e| error!("{e}")).is_ok()
}

/// A word of the command line, as a message shows it.
pub fn shown(word: &OsStr) -> std::path::Display<'_> {
    Path::new(word).display()
}

/// An error of the system in the C library's words, which is what callers of CRIU know.
pub fn reason(e: &std::io::Error) -> String {
    match e.raw_os_error() {
        Some(n) => nix::errno::Errno::from_raw(n).desc().to_owned(),
        None => e.to_string(),
    }
}
