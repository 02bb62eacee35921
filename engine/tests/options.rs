//! Every option of criu(8), and the few more that CRIU 4.2's program knows, is tried: it changes what is asked for, or has
//! another effect that this test knows of, or is refused by name.
#![cfg(feature = "cli")]

use standstill::cli::parse::{command_line, Stop};
use standstill::cli::table;
use standstill::options::{refusal, Options, Persona, REFUSALS};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, Output};

/// Option, a value that it takes, and whether it can be negated.
const CRIU: &[(&str, Option<&str>, bool)] = &[
    ("action-script", Some("/bin/true"), false),
    ("address", Some("127.0.0.1"), false),
    ("all", None, false),
    ("allow-uprobes", None, true),
    ("auto-dedup", None, true),
    ("cgroup-dump-controller", Some("cpu"), false),
    ("cgroup-props", Some("\"c\":\n - \"strategy\": \"merge\""), false),
    ("cgroup-props-file", Some("/p"), false),
    ("cgroup-root", Some("cpu:/new"), false),
    ("cgroup-yard", Some("/yard"), false),
    ("close", Some("1000"), false),
    ("config", Some("/dev/null"), false),
    ("cpu-cap", Some("cpu"), false),
    ("daemon", None, true),
    ("deprecated", None, true),
    ("display-stats", None, true),
    ("empty-ns", Some("net"), false),
    ("enable-external-masters", None, false),
    ("enable-external-sharing", None, false),
    ("enable-fs", Some("fuse,nfs"), false),
    ("evasive-devices", None, true),
    ("exec-cmd", None, false),
    ("experimental", None, true),
    ("ext-mount-map", Some("/data:data"), false),
    ("ext-unix-sk", Some("17"), false),
    ("external", Some("unix[4711]"), false),
    ("extra", None, true),
    ("feature", Some("timens"), false),
    ("file-locks", None, true),
    ("file-validation", Some("filesize"), false),
    ("force-irmap", None, true),
    ("freeze-cgroup", Some("/sys/fs/cgroup/x"), false),
    ("ghost-fiemap", None, true),
    ("ghost-limit", Some("3M"), false),
    ("help", None, false),
    ("images-dir", Some("/i"), false),
    ("inherit-fd", Some("fd[0]:pipe:[5]"), false),
    ("irmap-scan-path", Some("/s"), false),
    ("join-ns", Some("mnt:/proc/self/ns/mnt"), false),
    ("lazy-pages", None, false),
    ("leave-running", None, false),
    ("leave-stopped", None, false),
    ("libdir", Some("/l"), false),
    ("link-remap", None, true),
    ("log-file", Some("l"), false),
    ("log-pid", None, true),
    ("lsm-mount-context", Some("c"), false),
    ("lsm-profile", Some("apparmor:p"), false),
    ("manage-cgroups", Some("full"), false),
    ("mntns-compat-mode", None, true),
    ("ms", None, false),
    ("network-lock", Some("nftables"), false),
    ("no-default-config", None, false),
    ("page-server", None, true),
    ("pidfile", Some("p"), false),
    ("port", Some("4242"), false),
    ("pre-dump-mode", Some("read"), false),
    ("prev-images-dir", Some("../0"), false),
    ("ps-socket", Some("5"), false),
    ("restore-detached", None, true),
    ("restore-sibling", None, true),
    ("root", Some("/r"), false),
    ("shell-job", None, true),
    ("skip-file-rwx-check", None, true),
    ("skip-in-flight", None, true),
    ("skip-mnt", Some("/m"), false),
    ("status-fd", Some("7"), false),
    ("stream", None, true),
    ("tcp-close", None, true),
    ("tcp-established", None, true),
    ("timeout", Some("30"), false),
    ("tls", None, true),
    ("tls-cacert", Some("f"), false),
    ("tls-cacrl", Some("f"), false),
    ("tls-cert", Some("f"), false),
    ("tls-key", Some("f"), false),
    ("tls-no-cn-verify", None, false),
    ("track-mem", None, true),
    ("tree", Some("71"), false),
    ("unprivileged", None, true),
    ("verbosity", Some("4"), false),
    ("version", None, false),
    ("veth-pair", Some("eth0=veth9"), false),
    ("weak-sysctls", None, true),
    ("work-dir", Some("/w"), false),
];

/// Letter, its long form, and a value.
const LETTERS: &[(char, &str, &str)] = &[
    ('t', "tree", "71"),
    ('s', "leave-stopped", ""),
    ('R', "leave-running", ""),
    ('d', "restore-detached", ""),
    ('S', "restore-sibling", ""),
    ('D', "images-dir", "/i"),
    ('W', "work-dir", "/w"),
    ('o', "log-file", "l"),
    ('J', "join-ns", "net:/proc/self/ns/net"),
    ('r', "root", "/r"),
    ('x', "ext-unix-sk", "17"),
    ('v', "verbosity", "4"),
    ('j', "shell-job", ""),
    ('l', "file-locks", ""),
    ('L', "libdir", "/l"),
    ('M', "ext-mount-map", "auto"),
];

fn parse(persona: &str, words: &[String]) -> Result<Options, Stop> {
    let fixed = [persona, "--no-default-config", "check"].map(str::to_owned);
    let args: Vec<OsString> = fixed.iter().chain(words).map(OsString::from).collect();
    command_line(&args).map(|line| line.options)
}

/// Options as text, which is how two of them are compared here.
fn shown(o: &Options) -> String {
    format!("{o:?}")
}

fn plain() -> Options {
    Options { personality: Persona::Criu, ..Options::default() }
}

fn word(name: &str, value: Option<&str>) -> String {
    value.map_or(format!("--{name}"), |v| format!("--{name}={v}"))
}

#[test]
fn every_option_works_or_is_refused_by_name() {
    for (name, value, _) in CRIU {
        let result = parse("criu", &[word(name, *value)]);
        match (*name, result) {
            ("help", r) => assert_eq!(r.err(), Some(Stop::Help)),
            ("version", r) => assert_eq!(r.err(), Some(Stop::Version)),
            // CRIU 4.2 has no --ms any more either
            ("ms", r) => assert_eq!(r.err(), Some(Stop::Failed)),
            ("close" | "config" | "no-default-config" | "exec-cmd", r) => {
                assert_eq!(shown(&r.unwrap_or_else(|e| panic!("--{name}: {e:?}"))), shown(&plain()), "--{name}");
            }
            // on already
            ("ghost-fiemap", r) => assert!(r.is_ok_and(|o| o.ghost_fiemap)),
            (_, Err(e)) => panic!("--{name} cannot be read: {e:?}"),
            (_, Ok(options)) => {
                assert_ne!(shown(&options), shown(&plain()), "--{name} changes nothing");
                if let Some(r) = refusal(name) {
                    assert!((r.asked)(&options), "--{name} should be refused");
                    let text = options.refuse_unsupported().expect_err("it is refused").to_string();
                    assert!(text.contains(&format!("--{} ", r.option)), "{text}");
                }
            }
        }
    }
}

#[test]
fn negation() {
    let prefixes_another = |name: &str| CRIU.iter().any(|(other, _, n)| *n && other.starts_with(name));
    for (name, value, negatable) in CRIU {
        let result = parse("criu", &[word(name, *value), format!("--no-{name}")]);
        if *negatable {
            let options = result.unwrap_or_else(|e| panic!("--no-{name}: {e:?}"));
            let expected = Options { ghost_fiemap: *name != "ghost-fiemap", ..plain() };
            assert_eq!(shown(&options), shown(&expected), "--no-{name}");
        } else if !prefixes_another(name) {
            assert!(result.is_err(), "--no-{name} should not be known");
        }
    }
}

#[test]
fn letters_mean_their_long_forms() {
    for (letter, long, value) in LETTERS {
        let value = if value.is_empty() { None } else { Some(*value) };
        let short = parse("criu", &[format!("-{letter}{}", value.unwrap_or(""))]);
        let short = short.unwrap_or_else(|e| panic!("-{letter}: {e:?}"));
        let long = parse("criu", &[word(long, value)]).unwrap_or_else(|e| panic!("--{long}: {e:?}"));
        assert_eq!(shown(&short), shown(&long), "-{letter}");
        assert_ne!(shown(&short), shown(&plain()), "-{letter}");
    }
}

#[test]
fn the_table_is_that_list_and_ours() {
    let mut known: Vec<_> = table::TABLE.iter().filter(|o| o.is_crius()).map(|o| o.spelling.long).collect();
    known.sort_unstable();
    let listed: Vec<_> = CRIU.iter().map(|(name, ..)| *name).collect();
    assert_eq!(known, listed);
    for opt in table::TABLE {
        let negatable = CRIU.iter().find(|(name, ..)| *name == opt.spelling.long).map(|(.., n)| *n);
        assert!(negatable.is_none_or(|n| n == opt.spelling.negatable), "--no-{}", opt.spelling.long);
    }
}

#[test]
fn our_own_options_belong_to_our_own_name() {
    // options of keys read them
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("key-{}", std::process::id()));
    std::fs::write(&path, [7; 32]).expect("a key");
    let file = std::fs::File::open(&path).expect("a key");
    let (path, number) = (path.display().to_string(), std::os::fd::AsRawFd::as_raw_fd(&file).to_string());
    for opt in table::TABLE.iter().filter(|o| !o.is_crius()) {
        let value = match opt.meta {
            _ if opt.spelling.long == "key-file" => Some(path.as_str()),
            _ if opt.spelling.long == "key-fd" => Some(number.as_str()),
            "" => None,
            "KEY=VALUE" => Some("region=here"),
            "SIZE" => Some("8K"),
            "HOW" => Some("json"),
            "OLD=NEW" => Some("GPU-00000000-0000-0000-0000-000000000001=GPU-00000000-0000-0000-0000-000000000002"),
            _ => Some("2"),
        };
        let words = [word(opt.spelling.long, value)];
        assert_eq!(parse("criu", &words).err(), Some(Stop::Usage), "--{}", opt.spelling.long);
        assert!(parse("standstill", &words).is_ok(), "--{}", opt.spelling.long);
    }
    std::fs::remove_file(path).expect("the key goes");
}

#[test]
fn refusals_name_options_that_exist() {
    assert!(plain().refuse_unsupported().is_ok());
    for r in REFUSALS {
        assert!(table::TABLE.iter().any(|o| o.spelling.long == r.option), "--{} is no option", r.option);
        assert!(!(r.asked)(&plain()), "--{} is refused though nobody asked", r.option);
    }
}

/// The program under the name `criu`.
fn criu(args: &[&str]) -> Output {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("name-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a folder for the name");
    let link = dir.join("criu");
    // two tests may make it at the same time
    let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_standstill"), &link);
    Command::new(link).args(args).current_dir(&dir).output().expect("the program starts")
}

#[test]
fn texts_and_exit_codes_that_callers_know() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: capabilities are asked for before these texts, and this is not root");
        return;
    }
    let cases: &[(&[&str], i32, &str, &str)] = &[
        (&["-V"], 0, "Version: 4.2\n", ""),
        (&["dump"], 1, "", "): pid not specified\n"),
        (&["dump", "-t", "x"], 1, "", "): invalid argument for -t: x\n"),
        (
            &["dump", "--tr"],
            1,
            "Try -h|--help",
            ": option '--tr' is ambiguous; possibilities: '--tree' '--track-mem'\n",
        ),
        (&["dump", "-D", "/nonexistent"], 1, "", "): Can't open dir /nonexistent: No such file or directory\n"),
        (&["nothing"], 1, "Usage:", "): unknown command: nothing\n"),
        (&["check", "--feature", "nothing"], 1, "", "): Unknown feature nothing\n"),
        (&["check", "--feature", "external_net_ns"], 0, "external_net_ns is supported\n", ""),
        (&["check", "-verbosity=0", "--feature", "external_net_ns"], 0, "external_net_ns is supported\n", ""),
        (&["exec"], 255, "", "is deprecated by the Compel library.\n"),
        (&["restore", "-S"], 1, "", "): --restore-sibling only makes sense with --restore-detached\n"),
    ];
    for (args, code, out, err) in cases {
        let o = criu(args);
        let (stdout, stderr) = (String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
        assert_eq!(o.status.code(), Some(*code), "{args:?}: {stdout}{stderr}");
        assert!(stdout.contains(out), "{args:?}: {stdout}");
        assert!(stderr.contains(err) && (err.is_empty() == stderr.is_empty()), "{args:?}: {stderr}");
    }
}
