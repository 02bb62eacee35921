//! Encryption of a connection for pages: TLS 1.2 or 1.3, by rustls. Both sides have a certificate and check the other's.
//!
//! What is used is what CRIU uses: the certificate and its key (`--tls-cert`, `--tls-key`), who may sign the other's
//! (`--tls-cacert`; without it the system's authorities too), which are revoked (`--tls-cacrl`), each with a default below
//! /etc/pki. The other's certificate must be for the address of the options, on either side, unless `--tls-no-cn-verify`
//! says that it need not: one of its alternative names, or, if it has none, the common name of its subject, which is what
//! certificates made for CRIU have. What else a certificate may be used for is not looked at.
//!
//! Sources: RFC 5280 (4.1.2.4, subject), RFC 6125.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{ring, verify_tls12_signature, verify_tls13_signature, CryptoProvider};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName, TrustAnchor, UnixTime,
};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct, DistinguishedName,
    ServerConfig, ServerConnection, SignatureScheme,
};
use webpki::{
    CertRevocationList, EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, OwnedCertRevocationList,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::link::Side;
use crate::error::{Error, Result};
use crate::options::Options;

const CA_CERT: &str = "/etc/pki/CA/cacert.pem";
const CA_CRL: &str = "/etc/pki/CA/cacrl.pem";
const CERT: &str = "/etc/pki/criu/cert.pem";
const KEY: &str = "/etc/pki/criu/private/key.pem";
/// Where distributions keep the authorities that the whole system trusts.
const SYSTEM: &[&str] =
    &["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

fn wrong(what: String) -> Error {
    Error::Usage { what }
}

/// A connection that has not begun yet.
pub fn connection(opts: &Options, side: Side) -> Result<Connection> {
    let provider = Arc::new(ring::default_provider());
    let peer = Arc::new(Peer::new(opts, provider.clone())?);
    let (chain, key) = own(opts)?;
    let failed = |e: rustls::Error| wrong(format!("Failed to set certificate/private key pair: {e}"));
    if side == Side::Server {
        let config = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(failed)?.with_client_cert_verifier(peer).with_single_cert(chain, key);
        let mut config = config.map_err(failed)?;
        // CRIU takes a record without data for a failure
        config.send_tls13_tickets = 0;
        return Ok(ServerConnection::new(Arc::new(config)).map_err(failed)?.into());
    }
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(failed)?.dangerous().with_custom_certificate_verifier(peer);
    let mut config = config.with_client_auth_cert(chain, key).map_err(failed)?;
    config.enable_sni = false;
    // the name is checked by `Peer`
    let name = ServerName::try_from("page-server").map_err(|e| wrong(e.to_string()))?;
    Ok(ClientConnection::new(Arc::new(config), name).map_err(failed)?.into())
}

/// Our certificate, with those that lead to it, and its key.
fn own(opts: &Options) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let cert = opts.tls_cert.clone().unwrap_or_else(|| CERT.into());
    let key = opts.tls_key.clone().unwrap_or_else(|| KEY.into());
    let chain = certificates(&cert)
        .map_err(|e| wrong(format!("Failed to set certificate/private key pair: {}: {e}", cert.display())))?;
    let secret = PrivateKeyDer::from_pem_file(&key)
        .map_err(|e| wrong(format!("Failed to set certificate/private key pair: {}: {e}", key.display())))?;
    Ok((chain, secret))
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, rustls::pki_types::pem::Error> {
    let all: Vec<_> = CertificateDer::pem_file_iter(path)?.collect::<Result<_, _>>()?;
    if all.is_empty() {
        return Err(rustls::pki_types::pem::Error::NoItemsFound);
    }
    Ok(all)
}

/// Decides about the other side.
#[derive(Debug)]
struct Peer {
    provider: Arc<CryptoProvider>,
    anchors: Vec<TrustAnchor<'static>>,
    revoked: Vec<CertRevocationList<'static>>,
    name: Option<String>,
}

/// Any use will do.
struct AnyUse;

impl ExtendedKeyUsageValidator for AnyUse {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

impl Peer {
    fn new(opts: &Options, provider: Arc<CryptoProvider>) -> Result<Peer> {
        let mut anchors = Vec::new();
        let mut add = |path: &Path| -> Result<usize, String> {
            let before = anchors.len();
            for cert in certificates(path).map_err(|e| e.to_string())? {
                match webpki::anchor_from_trusted_cert(&cert) {
                    Ok(anchor) => anchors.push(anchor.to_owned()),
                    Err(e) => tracing::debug!("{}: {e}", path.display()),
                }
            }
            Ok(anchors.len() - before)
        };
        match &opts.tls_cacert {
            Some(path) => {
                let added = add(path).map_err(|e| wrong(format!("{}: {e}", path.display())))?;
                if added == 0 {
                    return Err(wrong(format!("No trusted CA certificates added ({})", path.display())));
                }
            }
            None => {
                for path in SYSTEM.iter().chain(&[CA_CERT]) {
                    if let Err(e) = add(Path::new(path)) {
                        tracing::info!("No trusted CA certificates added ({path}): {e}");
                    }
                }
            }
        }
        let revoked = revoked(opts)?;
        let name = opts.address.clone().filter(|_| !opts.tls_no_cn_verify);
        Ok(Peer { provider, anchors, revoked, name })
    }

    fn check(
        &self,
        cert: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), rustls::Error> {
        let refused = |e: webpki::Error| {
            tracing::error!("Invalid certificate: {e}");
            rustls::Error::InvalidCertificate(match e {
                webpki::Error::UnknownIssuer => CertificateError::UnknownIssuer,
                webpki::Error::CertRevoked => CertificateError::Revoked,
                webpki::Error::CertExpired { .. } => CertificateError::Expired,
                _ => CertificateError::ApplicationVerificationFailure,
            })
        };
        let parsed = EndEntityCert::try_from(cert).map_err(refused)?;
        let lists: Vec<&CertRevocationList<'_>> = self.revoked.iter().collect();
        let revocation = match RevocationOptionsBuilder::new(&lists) {
            Ok(builder) => Some(builder.with_status_policy(UnknownStatusPolicy::Allow).build()),
            // there are none
            Err(_) => None,
        };
        let algorithms = self.provider.signature_verification_algorithms.all;
        parsed
            .verify_for_usage(algorithms, &self.anchors, between, now, AnyUse, revocation, None)
            .map_err(refused)
            .map(drop)?;
        match &self.name {
            Some(name) if !is_for(&parsed, name) => {
                tracing::error!("Invalid certificate: it is not for {name}");
                Err(rustls::Error::InvalidCertificate(CertificateError::NotValidForName))
            }
            _ => Ok(()),
        }
    }
}

fn revoked(opts: &Options) -> Result<Vec<CertRevocationList<'static>>> {
    let path = opts.tls_cacrl.clone().unwrap_or_else(|| PathBuf::from(CA_CRL));
    if opts.tls_cacrl.is_none() && !path.exists() {
        return Ok(Vec::new());
    }
    let bad = |e: String| wrong(format!("Can't read certificate revocation list {}: {e}", path.display()));
    let mut lists = Vec::new();
    for list in CertificateRevocationListDer::pem_file_iter(&path).map_err(|e| bad(e.to_string()))? {
        let list = list.map_err(|e| bad(e.to_string()))?;
        lists.push(OwnedCertRevocationList::from_der(&list).map_err(|e| bad(e.to_string()))?.into());
    }
    Ok(lists)
}

/// Is a certificate for this host? For an address only alternative names count.
fn is_for(cert: &EndEntityCert<'_>, host: &str) -> bool {
    let Ok(name) = ServerName::try_from(host) else { return false };
    if cert.verify_is_valid_for_subject_name(&name).is_ok() {
        return true;
    }
    matches!(name, ServerName::DnsName(_))
        && cert.valid_dns_names().next().is_none()
        && common_names(cert.subject()).any(|common| common.eq_ignore_ascii_case(host.as_bytes()))
}

/// The common names (2.5.4.3) in what is within the sequence of a subject (RFC 5280).
pub fn common_names(subject: &[u8]) -> impl Iterator<Item = &[u8]> {
    const SET: u8 = 0x31;
    const SEQUENCE: u8 = 0x30;
    const OID: u8 = 0x06;
    let sets = items(subject).filter(|(tag, _)| *tag == SET);
    let pairs = sets.flat_map(|(_, set)| items(set)).filter(|(tag, _)| *tag == SEQUENCE);
    pairs.filter_map(|(_, pair)| {
        let mut parts = items(pair);
        let (kind, value) = (parts.next()?, parts.next()?);
        (kind == (OID, &[0x55, 4, 3])).then_some(value.1)
    })
}

/// The items of DER one after another: tag and content. What is no DER ends them.
fn items(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        let (&tag, after) = rest.split_first()?;
        let (&first, after) = after.split_first()?;
        let (len, after) = match first {
            0..=0x7f => (usize::from(first), after),
            0x81..=0x84 => {
                let (bytes, after) = after.split_at_checked(usize::from(first & 0x7f))?;
                (bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)), after)
            }
            _ => return None,
        };
        let (content, after) = after.split_at_checked(len)?;
        rest = after;
        Some((tag, content))
    })
}

impl ServerCertVerifier for Peer {
    fn verify_server_cert(
        &self,
        cert: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(cert, between, now).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Peer {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        cert: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(cert, between, now).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls12_signature(self, message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        ServerCertVerifier::verify_tls13_signature(self, message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ServerCertVerifier::supported_verify_schemes(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tagged(tag: u8, content: &[u8]) -> Vec<u8> {
        let mut all = vec![tag];
        match content.len() {
            len @ 0..128 => all.push(len as u8),
            len => all.extend([0x82, (len >> 8) as u8, len as u8]),
        }
        all.extend(content);
        all
    }

    fn part(oid: &[u8], value: &[u8]) -> Vec<u8> {
        let pair = [tagged(6, oid), tagged(0x0c, value)].concat();
        tagged(0x31, &tagged(0x30, &pair))
    }

    #[test]
    fn common_names_are_found() {
        let long = vec![b'x'; 300];
        let subject = [part(&[0x55, 4, 6], b"DE"), part(&[0x55, 4, 3], b"host"), part(&[0x55, 4, 3], &long)].concat();
        let found: Vec<_> = common_names(&subject).collect();
        assert_eq!(found, [b"host".as_slice(), &long]);
        for cut in 0..subject.len() {
            assert!(common_names(&subject[..cut]).count() <= 2);
        }
        assert_eq!(common_names(&[0x31, 0x84, 0xff, 0xff, 0xff, 0xff, 0]).count(), 0);
    }
}
