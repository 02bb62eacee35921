//! `standstill image`: images as JSON and back, and views of a checkpoint. Verbs and options are crit's.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Parser, Subcommand, ValueEnum};
use standstill_images::explore::{self, View};
use standstill_images::json::{self, Style};
use standstill_images::store::sealed::{self, Key, SealedStore};
use standstill_images::{FolderStore, Images, Store as _};

use crate::stores::keys::{self, KeyError};

/// Show, change and explore images.
#[derive(Debug, Parser)]
#[command(name = "standstill image", bin_name = "standstill image")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// The key of a sealed checkpoint.
    #[arg(long, value_name = "FILE", global = true)]
    key_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Convert an image to JSON.
    Decode {
        /// The image (standard input by default).
        #[arg(short, long = "in", value_name = "FILE")]
        input: Option<PathBuf>,
        /// Where to put the JSON (standard output by default).
        #[arg(short, long = "out", value_name = "FILE")]
        output: Option<PathBuf>,
        /// Several lines with indents, and numbers in the form that fits the field.
        #[arg(long)]
        pretty: bool,
        /// Of what follows an entry, show the size only.
        #[arg(long)]
        nopl: bool,
    },
    /// Convert JSON to an image.
    Encode {
        /// The JSON (standard input by default).
        #[arg(short, long = "in", value_name = "FILE")]
        input: Option<PathBuf>,
        /// Where to put the image (standard output by default).
        #[arg(short, long = "out", value_name = "FILE")]
        output: Option<PathBuf>,
    },
    /// Say of which kind an image is, and how many entries it has.
    Info {
        /// The image.
        #[arg(value_name = "FILE")]
        input: PathBuf,
    },
    /// Show an image as JSON for people.
    Show {
        /// The image.
        #[arg(value_name = "FILE")]
        input: PathBuf,
        /// Of what follows an entry, show the size only.
        #[arg(long)]
        nopl: bool,
    },
    /// Explore a folder of images.
    X {
        /// The folder.
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// What to show.
        what: What,
    },
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum What {
    /// The tree of tasks.
    Ps,
    /// Descriptors of each task.
    Fds,
    /// Memory of each task.
    Mems,
    /// Pages of each task that are in the checkpoint.
    Rss,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Image(#[from] standstill_images::Error),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("{} is sealed: give the key with --key-file", path.display())]
    Sealed { path: PathBuf },
    #[error("cannot {operation} {}", path.display())]
    File {
        operation: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Runs a verb; `arguments` are those after `image`. Returns the exit status.
pub fn run(arguments: &[OsString]) -> i32 {
    let program = std::iter::once(OsString::from("standstill image"));
    let arguments = match Arguments::try_parse_from(program.chain(arguments.iter().cloned())) {
        Ok(arguments) => arguments,
        Err(error) => {
            // If nobody reads what is wrong, the exit status still tells that something is.
            let _ = error.print();
            return error.exit_code();
        }
    };
    let done = match arguments.key_file.as_deref().map(keys::of_file).transpose() {
        Ok(key) => act(&arguments.verb, key.as_ref()),
        Err(e) => Err(e.into()),
    };
    match done {
        Ok(()) => 0,
        Err(Failure::File { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => 1,
        Err(failure) => {
            let mut message = format!("Error: {failure}");
            let mut cause = std::error::Error::source(&failure);
            while let Some(error) = cause {
                message.push_str(": ");
                message.push_str(&error.to_string());
                cause = error.source();
            }
            let _ = writeln!(io::stderr(), "{message}");
            1
        }
    }
}

fn act(verb: &Verb, key: Option<&Key>) -> Result<(), Failure> {
    match verb {
        Verb::Decode { input, output, pretty, nopl } => {
            decode(input.as_deref(), output.as_deref(), Style { pretty: *pretty, payload: !nopl }, key)
        }
        Verb::Encode { input, output } => {
            let (name, text) = read(input.as_deref(), None)?;
            write(output.as_deref(), &json::encode_text(&name, &text)?)
        }
        Verb::Info { input } => {
            let (name, bytes) = read(Some(input), key)?;
            let text = json::to_text(&json::info(&name, &bytes)?, true);
            write(None, format!("{text}\n").as_bytes())
        }
        Verb::Show { input, nopl } => decode(Some(input), None, Style { pretty: true, payload: !nopl }, key),
        Verb::X { folder, what } => {
            let view = match what {
                What::Ps => View::Ps,
                What::Fds => View::Fds,
                What::Mems => View::Mems,
                What::Rss => View::Rss,
            };
            let store = FolderStore::open(folder)?;
            let images = match key {
                Some(key) => Images::new(SealedStore::open(Arc::new(store), key.clone())?),
                None if sealed::is_sealed(&store)? => return Err(Failure::Sealed { path: folder.clone() }),
                None => Images::new(store),
            };
            write(None, explore::view(&images, view)?.as_bytes())
        }
    }
}

fn decode(input: Option<&Path>, output: Option<&Path>, style: Style, key: Option<&Key>) -> Result<(), Failure> {
    let (name, bytes) = read(input, key)?;
    let mut text = json::to_text(&json::decode(&name, &bytes, style)?, style.pretty);
    // As crit: a line on a terminal, the bare value in a file.
    if output.is_none() {
        text.push('\n');
    }
    write(output, text.as_bytes())
}

/// What to call the input in errors, and its content. A sealed image is opened with the others of its folder.
fn read(path: Option<&Path>, key: Option<&Key>) -> Result<(String, Vec<u8>), Failure> {
    let Some(path) = path else {
        let mut bytes = Vec::new();
        let failed = |source| Failure::File { operation: "read", path: "standard input".into(), source };
        io::stdin().lock().read_to_end(&mut bytes).map_err(failed)?;
        return Ok(("on standard input".to_owned(), bytes));
    };
    if let Some(key) = key {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let store = SealedStore::open(Arc::new(FolderStore::open(folder)?), key.clone())?;
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        return Ok((path.display().to_string(), store.read(name)?.to_vec()));
    }
    match fs::read(path) {
        Ok(bytes) if sealed::looks_sealed(&bytes) => Err(Failure::Sealed { path: path.to_owned() }),
        Ok(bytes) => Ok((path.display().to_string(), bytes)),
        Err(source) => Err(Failure::File { operation: "read", path: path.to_owned(), source }),
    }
}

fn write(path: Option<&Path>, bytes: &[u8]) -> Result<(), Failure> {
    let (path, written) = match path {
        Some(path) => (path, fs::write(path, bytes)),
        None => {
            let mut out = io::stdout().lock();
            (Path::new("standard output"), out.write_all(bytes).and_then(|()| out.flush()))
        }
    };
    written.map_err(|source| Failure::File { operation: "write", path: path.to_owned(), source })
}
