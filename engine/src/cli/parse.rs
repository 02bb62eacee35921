//! From words to [`Options`]: the configuration files in their order, then the command line.
//!
//! Each option takes effect where it stands, and the first mistake ends the reading, as in CRIU: what was asked by earlier
//! options (`--version`, say) has happened by then.

use super::config_files::{self, Choice, ConfigError};
use super::getopt::{Given, Scanner};
use super::table::{self, Effect};
use super::values;
use crate::options::{NetworkLock, OptionError, Options, Persona};
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use tracing::{error, info, warn};

/// A command line that could be read.
#[derive(Debug)]
pub struct CommandLine {
    /// What was asked.
    pub options: Options,
    /// The words that are no options: a verb, and what belongs to it.
    pub words: Vec<OsString>,
    /// Was --exec-cmd among them?
    pub exec_cmd: bool,
}

/// Why there is nothing to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// A mistake that has been reported.
    Failed,
    /// A mistake that has been reported; the usage text follows.
    Usage,
    /// The usage text was asked for.
    Help,
    /// The version was asked for.
    Version,
}

/// Reads everything. `args` begins with the program's name.
pub fn command_line(args: &[OsString]) -> Result<CommandLine, Stop> {
    let program = args.first().cloned().unwrap_or_default();
    let words = args.get(1..).unwrap_or_default();
    let personality = Persona::from_program_name(&program);
    // help comes before everything, even before mistakes in configuration files
    if words.iter().take_while(|w| *w != "--").any(|w| w == "--help" || w == "-h") {
        return Err(Stop::Help);
    }
    let network_lock = match personality {
        Persona::Criu => NetworkLock::Iptables,
        Persona::Standstill => NetworkLock::Nftables,
    };
    let options = Options { personality, network_lock, ..Options::default() };
    let mut reader = Reader { options, exec_cmd: false, lock_given: false };
    for (path, required) in config_files::files(&choice(words, personality), |name| std::env::var_os(name)) {
        match config_files::read(&path) {
            // a file that cannot be opened is none; one that was named must be there, though CRIU does not mind
            Err(ConfigError::Read { source, .. }) if required && personality == Persona::Standstill => {
                error!("Can't read configuration file {}: {}", path.display(), super::reason(&source));
                return Err(Stop::Failed);
            }
            Err(e @ ConfigError::Read { .. }) => info!("{e}"),
            Err(e @ ConfigError::Format { .. }) => {
                error!("{e}");
                return Err(Stop::Failed);
            }
            Ok(words) => {
                let whose = match personality {
                    Persona::Criu => OsString::from("criu"),
                    Persona::Standstill => path.into_os_string(),
                };
                reader.read(&whose, &words)?;
            }
        }
    }
    let words = reader.read(&program, words)?;
    if reader.lock_given && words.first().is_some_and(|verb| verb == "restore") {
        warn!("--network-lock will be ignored in restore command");
        info!("Network lock method from dump will be used in restore");
    }
    Ok(CommandLine { options: reader.options, words, exec_cmd: reader.exec_cmd })
}

/// Applies one more configuration file to options that are there already, as CRIU's RPC can ask for.
pub fn apply_config_file(options: Options, path: &std::path::Path) -> Result<Options, Stop> {
    let mut reader = Reader { options, exec_cmd: false, lock_given: false };
    match config_files::read(path) {
        Err(e @ ConfigError::Read { .. }) => info!("{e}"),
        Err(e @ ConfigError::Format { .. }) => {
            error!("{e}");
            return Err(Stop::Failed);
        }
        Ok(words) => {
            reader.read(path.as_os_str(), &words)?;
        }
    }
    Ok(reader.options)
}

/// What the command line says about configuration files, mistakes aside: those are found later, in their turn.
fn choice(words: &[OsString], persona: Persona) -> Choice {
    let (opts, spellings) = table::known(persona);
    let mut choice = Choice::default();
    for given in Scanner::new(words, &spellings).flatten() {
        match opts[given.index].effect {
            Effect::Config => choice.file = given.value.map(PathBuf::from),
            Effect::NoDefaultConfig => choice.no_default = true,
            _ => {}
        }
    }
    choice
}

struct Reader {
    options: Options,
    exec_cmd: bool,
    lock_given: bool,
}

impl Reader {
    /// Applies the options among the words, and returns the others.
    fn read(&mut self, program: &OsStr, words: &[OsString]) -> Result<Vec<OsString>, Stop> {
        let (opts, spellings) = table::known(self.options.personality);
        let mut scanner = Scanner::new(words, &spellings);
        for given in scanner.by_ref() {
            let given = given.map_err(|e| {
                eprintln!("{}: {e}", super::shown(program));
                Stop::Usage
            })?;
            let opt = opts[given.index];
            self.lock_given |= opt.spelling.long == "network-lock";
            self.apply(opt, &given)?;
        }
        Ok(scanner.rest)
    }

    fn apply(&mut self, opt: &table::Opt, given: &Given) -> Result<(), Stop> {
        let options = &mut self.options;
        let value = given.value.as_deref();
        let done = match opt.effect {
            Effect::Switch(field) => {
                *field(options) = given.on;
                Ok(())
            }
            Effect::Say(say) => {
                say(options);
                Ok(())
            }
            Effect::Value(set) => set(options, value.unwrap_or_default()),
            Effect::Maybe(set) => set(options, value),
            Effect::ExecCmd => {
                self.exec_cmd = true;
                Ok(())
            }
            Effect::Close => {
                let fd = values::atoi(value.unwrap_or_default().as_encoded_bytes());
                info!("Closing fd {fd}");
                // a descriptor that is not open is no error in CRIU either
                let _ = nix::unistd::close(fd);
                Ok(())
            }
            Effect::Config | Effect::NoDefaultConfig => Ok(()),
            Effect::Gone(text) => {
                error!("{text}");
                return Err(Stop::Failed);
            }
            Effect::Version => return Err(Stop::Version),
            Effect::Help => return Err(Stop::Help),
        };
        let Err(e) = done else { return Ok(()) };
        let letter = opt.spelling.short.map(char::from).filter(|_| given.short);
        report(&e, opt.spelling.long, letter, value);
        // these three are followed by the usage text in CRIU
        match e {
            OptionError::CpuCap(_) | OptionError::CgroupMode(_) | OptionError::FileValidation(_) => Err(Stop::Usage),
            _ => Err(Stop::Failed),
        }
    }
}

/// Says what is wrong, in the one or two lines in which CRIU says it.
fn report(e: &OptionError, long: &str, letter: Option<char>, value: Option<&OsStr>) {
    let value = super::shown(value.unwrap_or_default());
    match e {
        OptionError::Invalid { .. } if long == "external" => {
            error!("Could not add external resource when initializing config: {value}");
            return;
        }
        OptionError::Invalid { .. } => {}
        OptionError::UnixSocketInode(list) => {
            error!("unix: {e}");
            error!("Failed to parse unix socket inode from optarg: {list}");
            return;
        }
        OptionError::JoinPidNs | OptionError::NamespaceKind(_) | OptionError::UserNamespaceIds(_) => error!("{e}"),
        _ => {
            error!("{e}");
            return;
        }
    }
    match letter {
        Some(letter) => error!("invalid argument for -{letter}: {value}"),
        None => error!("invalid argument for --{long}: {value}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::FinalState;

    fn parse(line: &str) -> Result<CommandLine, Stop> {
        let mut args = vec![OsString::from("/x/criu"), OsString::from("--no-default-config")];
        args.extend(line.split(' ').filter(|w| !w.is_empty()).map(OsString::from));
        command_line(&args)
    }

    fn options(line: &str) -> Options {
        parse(line).map(|c| c.options).unwrap_or_else(|e| panic!("{line}: {e:?}"))
    }

    #[test]
    fn values_arrive() {
        let o = options("dump -t 12 -D /i -R -vvv --no-ghost-fiemap --ghost-limit 2M -x5,6 --external veth[a]:b@c");
        assert_eq!((o.pid, o.final_state, o.log_level, o.ghost_limit), (Some(12), FinalState::Run, 5, 2 << 20));
        assert!(o.ext_unix_sk && o.external_has("unix[6]") && !o.ghost_fiemap);
        assert_eq!(o.external_value("veth[a]"), Some(Some("b@c")));
        assert_eq!(options("check -verbosity=0 --feature x").log_level, 0);
        assert_eq!(options("check --verbosity=4 -v").log_level, 5);
        assert!(options("restore --external mnt[]:m").enable_external_masters);
    }

    #[test]
    fn how_it_ends() {
        for (line, stop) in [
            ("dump --foo", Stop::Usage),
            ("dump -t x", Stop::Failed),
            ("dump --cpu-cap=x", Stop::Usage),
            ("--version --foo", Stop::Version),
            ("--foo --version", Stop::Usage),
            ("--foo -h", Stop::Help),
            ("dump --port 0", Stop::Failed),
            ("dump --jobs 2", Stop::Usage),
        ] {
            assert_eq!(parse(line).err(), Some(stop), "{line}");
        }
        let line = parse("restore --exec-cmd -- ls -h").expect("the command's own options are not ours");
        assert_eq!((line.exec_cmd, line.words.len()), (true, 3));
    }
}
