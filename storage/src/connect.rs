//! From a URL and options to a storage.

use std::sync::Arc;

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreScheme, RetryConfig};
use url::Url;

use crate::runtime::Interrupted;
use crate::{RETRIES, RETRY_FOR};

/// How to reach a storage.
#[derive(Clone, Default)]
pub struct Settings {
    /// Keys and values of the `object_store` crate (`endpoint`, `region`, `allow_http`, `timeout`, …), and `retries`.
    pub options: Vec<(String, String)>,
    /// Asked while something is waited for: whether to give up.
    pub interrupted: Option<Interrupted>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // values may be secrets
        f.debug_list().entries(self.options.iter().map(|(key, _)| key)).finish()
    }
}

/// Why a storage cannot be asked at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The URL is none.
    #[error("{url} is not a URL")]
    Url {
        /// As it was given.
        url: String,
        /// What the parser said.
        #[source]
        source: url::ParseError,
    },
    /// A URL of something else.
    #[error("{url} is no storage that is known: s3://BUCKET/PREFIX, gs://…, az://CONTAINER/PREFIX or file:///FOLDER")]
    Scheme {
        /// As it was given.
        url: String,
    },
    /// An option that this storage does not have.
    #[error("--storage-option {key}: there is no such option for {scheme}://")]
    Option {
        /// The option.
        key: String,
        /// Of the URL.
        scheme: String,
    },
    /// An option has a value that it cannot have.
    #[error("--storage-option {key}={value}: a number is wanted")]
    Value {
        /// The option.
        key: &'static str,
        /// Its value.
        value: String,
    },
    /// Everything would go over the network in the clear.
    #[error("{endpoint} is not encrypted: say --storage-option allow_http=true if that is what you want")]
    Clear {
        /// The endpoint.
        endpoint: String,
    },
    /// The folder of a `file://` URL.
    #[error("cannot make the folder {path}")]
    Folder {
        /// Its path.
        path: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The crate said no.
    #[error("{url} cannot be used")]
    Storage {
        /// Where.
        url: String,
        /// Why not.
        #[source]
        source: object_store::Error,
    },
}

/// A storage, and the prefix in it.
pub(crate) fn connect(
    url: &str,
    settings: &Settings,
    writing: bool,
) -> Result<(Arc<dyn ObjectStore>, Path), ConnectError> {
    let parsed = Url::parse(url).map_err(|source| ConnectError::Url { url: url.to_owned(), source })?;
    let unknown = || ConnectError::Scheme { url: url.to_owned() };
    let (scheme, prefix) = ObjectStoreScheme::parse(&parsed).map_err(|_| unknown())?;
    let failed = |source| ConnectError::Storage { url: url.to_owned(), source };
    let (own, options) = own_options(settings)?;
    let retry = RetryConfig { max_retries: own.retries, retry_timeout: RETRY_FOR, ..RetryConfig::default() };
    let no_option = |key: &str| ConnectError::Option { key: key.to_owned(), scheme: parsed.scheme().to_owned() };
    let storage: Arc<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => {
            let mut builder =
                AmazonS3Builder::from_env().with_url(url).with_retry(retry).with_checksum_algorithm(Checksum::SHA256);
            for (key, value) in options {
                let key: AmazonS3ConfigKey = key.parse().map_err(|_| no_option(key))?;
                builder = builder.with_config(key, value);
            }
            let clear = builder.get_config_value(&AmazonS3ConfigKey::Client(object_store::ClientConfigKey::AllowHttp));
            refuse_clear(builder.get_config_value(&AmazonS3ConfigKey::Endpoint), clear)?;
            Arc::new(builder.build().map_err(failed)?)
        }
        ObjectStoreScheme::GoogleCloudStorage => {
            let mut builder = GoogleCloudStorageBuilder::from_env().with_url(url).with_retry(retry);
            for (key, value) in options {
                let key: GoogleConfigKey = key.parse().map_err(|_| no_option(key))?;
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.build().map_err(failed)?)
        }
        ObjectStoreScheme::MicrosoftAzure => {
            let mut builder = MicrosoftAzureBuilder::from_env().with_url(url).with_retry(retry);
            for (key, value) in options {
                let key: AzureConfigKey = key.parse().map_err(|_| no_option(key))?;
                builder = builder.with_config(key, value);
            }
            let clear = builder.get_config_value(&AzureConfigKey::Client(object_store::ClientConfigKey::AllowHttp));
            refuse_clear(builder.get_config_value(&AzureConfigKey::Endpoint), clear)?;
            Arc::new(builder.build().map_err(failed)?)
        }
        ObjectStoreScheme::Local => {
            if let Some((key, _)) = options.first() {
                return Err(no_option(key));
            }
            let path = parsed.to_file_path().map_err(|()| unknown())?;
            if writing {
                make_folder(&path)
                    .map_err(|source| ConnectError::Folder { path: path.display().to_string(), source })?;
            }
            let storage = LocalFileSystem::new_with_prefix(&path).map_err(failed)?;
            return Ok((Arc::new(storage), Path::default()));
        }
        _ => return Err(unknown()),
    };
    Ok((storage, prefix))
}

/// Objects are files that others may read: their folder is not for others.
fn make_folder(path: &std::path::Path) -> std::io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let mode = std::fs::metadata(path)?.permissions().mode();
    if mode & 0o077 != 0 {
        tracing::warn!("others than its owner can look into {}: images are the program's memory", path.display());
    }
    Ok(())
}

struct Own {
    retries: usize,
}

type Pairs<'a> = Vec<(&'a str, &'a str)>;

/// Those that are ours, and the others.
fn own_options(settings: &Settings) -> Result<(Own, Pairs<'_>), ConnectError> {
    let mut own = Own { retries: RETRIES };
    let mut others = Vec::new();
    for (key, value) in &settings.options {
        match key.as_str() {
            "retries" => {
                own.retries =
                    value.parse().map_err(|_| ConnectError::Value { key: "retries", value: value.clone() })?;
            }
            key => others.push((key, value.as_str())),
        }
    }
    Ok((own, others))
}

fn refuse_clear(endpoint: Option<String>, allowed: Option<String>) -> Result<(), ConnectError> {
    let allowed = allowed.is_some_and(|value| ["true", "1", "yes", "on"].contains(&value.to_lowercase().as_str()));
    match endpoint {
        Some(endpoint) if endpoint.starts_with("http://") && !allowed => Err(ConnectError::Clear { endpoint }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_it(url: &str, options: &[(&str, &str)]) -> Result<Path, ConnectError> {
        let options = options.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        connect(url, &Settings { options, ..Settings::default() }, false).map(|(_, prefix)| prefix)
    }

    #[test]
    fn urls() {
        let credentials = [("access_key_id", "a"), ("secret_access_key", "b")];
        assert_eq!(try_it("s3://bucket/some/prefix", &credentials).unwrap().as_ref(), "some/prefix");
        assert_eq!(try_it("s3://bucket", &credentials).unwrap().as_ref(), "");
        assert!(matches!(try_it("ftp://host/x", &[]), Err(ConnectError::Scheme { .. })));
        assert!(matches!(try_it("memory:///x", &[]), Err(ConnectError::Scheme { .. })));
        assert!(matches!(try_it("s3//", &[]), Err(ConnectError::Url { .. })));
        assert!(matches!(try_it("s3://b/p", &[("no_such", "x")]), Err(ConnectError::Option { .. })));
        assert!(matches!(try_it("s3://b/p", &[("retries", "many")]), Err(ConnectError::Value { .. })));
        assert!(matches!(try_it("file:///tmp", &[("region", "x")]), Err(ConnectError::Option { .. })));
        let clear = [credentials[0], credentials[1], ("endpoint", "http://127.0.0.1:1")];
        assert!(matches!(try_it("s3://b/p", &clear), Err(ConnectError::Clear { .. })));
        let allowed = [clear[0], clear[1], clear[2], ("allow_http", "true")];
        assert!(try_it("s3://b/p", &allowed).is_ok());
        assert!(try_it("file:///no/such/folder", &[]).is_err());
    }
}
