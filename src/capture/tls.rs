//! TLS as libpq's `sslmode` means it, on rustls; and what channel binding needs.

use std::path::Path;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use tokio_rustls::TlsConnector;
use x509_cert::Certificate;
use x509_cert::der::asn1::{Ia5StringRef, PrintableStringRef, Utf8StringRef};
use x509_cert::der::oid::AssociatedOid;
use x509_cert::der::oid::ObjectIdentifier;
use x509_cert::der::oid::db::{rfc4519, rfc5912};
use x509_cert::der::{Decode, Tagged};
use x509_cert::ext::pkix::SubjectAltName;
use x509_cert::ext::pkix::name::GeneralName;

use super::CaptureError;
use super::conninfo::{ConnInfo, Host, PemFile, RootCert, SslMode};

/// What PostgreSQL 17+ wants to hear when TLS begins without an SSLRequest.
const ALPN: &[u8] = b"postgresql";

/// Makes the TLS client for one host. Reads the certificate files now: they rotate.
pub(super) fn connector(info: &ConnInfo, host: &Host) -> Result<TlsConnector, CaptureError> {
    let fault = |problem: String| CaptureError::Tls { endpoint: host.to_string(), problem };
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Verifier::new(info, host, &provider).map_err(fault)?;
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| fault(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match client_certificate(info).map_err(fault)? {
        Some((chain, key)) => builder
            .with_client_auth_cert(chain, key)
            .map_err(|error| fault(format!("client certificate (sslcert, sslkey): {error}")))?,
        None => builder.with_no_client_auth(),
    };
    config.enable_sni = info.tls.sni;
    if info.tls.direct {
        config.alpn_protocols = vec![ALPN.to_vec()];
    }
    Ok(TlsConnector::from(Arc::new(config)))
}

/// The name that the certificate is checked against.
pub(super) fn server_name(host: &Host) -> Result<ServerName<'static>, CaptureError> {
    ServerName::try_from(host.name.clone()).map_err(|_| CaptureError::Tls {
        endpoint: host.to_string(),
        problem: format!("`{}` is not a name that a certificate can carry", host.name),
    })
}

/// `tls-server-end-point` of RFC 5929: the hash of the server's certificate by its signature's own algorithm, with
/// SHA-256 in place of MD5 and SHA-1. `None` if the algorithm has no hash of its own (Ed25519): no binding is possible.
pub(super) fn server_end_point(certificate: &CertificateDer<'_>) -> Option<Vec<u8>> {
    use rfc5912::{
        ECDSA_WITH_SHA_224, ECDSA_WITH_SHA_256, ECDSA_WITH_SHA_384, ECDSA_WITH_SHA_512, ID_SHA_224, ID_SHA_384,
        ID_SHA_512, SHA_1_WITH_RSA_ENCRYPTION, SHA_224_WITH_RSA_ENCRYPTION, SHA_256_WITH_RSA_ENCRYPTION,
        SHA_384_WITH_RSA_ENCRYPTION, SHA_512_WITH_RSA_ENCRYPTION,
    };
    const MD5_WITH_RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.4");
    const ECDSA_WITH_SHA_1: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.4.1");
    const RSA_PSS: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.10");
    let algorithm = &Certificate::from_der(certificate).ok()?.signature_algorithm;
    let hash = match algorithm.oid {
        // The hash is a parameter; the first object identifier in it names it (absent: SHA-1, hence SHA-256).
        RSA_PSS => pss_hash(algorithm.parameters.as_ref().map(|any| any.value())),
        oid => oid,
    };
    let digest = match hash {
        ECDSA_WITH_SHA_384 | SHA_384_WITH_RSA_ENCRYPTION | ID_SHA_384 => Sha384::digest(certificate).to_vec(),
        ECDSA_WITH_SHA_512 | SHA_512_WITH_RSA_ENCRYPTION | ID_SHA_512 => Sha512::digest(certificate).to_vec(),
        MD5_WITH_RSA
        | ECDSA_WITH_SHA_1
        | SHA_1_WITH_RSA_ENCRYPTION
        | SHA_256_WITH_RSA_ENCRYPTION
        | ECDSA_WITH_SHA_256
        | rfc5912::ID_SHA_256 => Sha256::digest(certificate).to_vec(),
        ECDSA_WITH_SHA_224 | SHA_224_WITH_RSA_ENCRYPTION | ID_SHA_224 => Sha224::digest(certificate).to_vec(),
        _ => return None,
    };
    Some(digest)
}

/// The hash of RSASSA-PSS parameters: SEQUENCE { `[0]` { SEQUENCE { OBJECT IDENTIFIER ... } } ... } (RFC 4055).
fn pss_hash(parameters: Option<&[u8]>) -> ObjectIdentifier {
    // [0] length, SEQUENCE length, OBJECT IDENTIFIER length, content: all lengths are short here.
    let read = |bytes: &[u8]| {
        let [0xA0, _, 0x30, _, 0x06, length, rest @ ..] = bytes else { return None };
        ObjectIdentifier::from_bytes(rest.get(..usize::from(*length))?).ok()
    };
    parameters.and_then(read).unwrap_or(rfc5912::ID_SHA_256)
}

fn read_certificates(path: &Path, key: &str) -> Result<Vec<CertificateDer<'static>>, String> {
    let pem = std::fs::read(path).map_err(|error| format!("read {key} {}: {error}", path.display()))?;
    let chain: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let chain = chain.map_err(|error| format!("read {key} {}: {error}", path.display()))?;
    if chain.is_empty() {
        return Err(format!("read {key} {}: no certificate in it (PEM is expected)", path.display()));
    }
    Ok(chain)
}

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Our own certificate and key. A default file that does not exist means that we have none.
fn client_certificate(info: &ConnInfo) -> Result<Option<Identity>, String> {
    let usable = |file: &&PemFile| file.named || file.path.exists();
    let Some(cert) = info.tls.cert.as_ref().filter(usable) else { return Ok(None) };
    let Some(key) = info.tls.key.as_ref().filter(usable) else {
        return Err(format!("certificate {} has no key: name it with sslkey", cert.path.display()));
    };
    let chain = read_certificates(&cert.path, "sslcert")?;
    check_key_permissions(&key.path)?;
    let pem = std::fs::read(&key.path).map_err(|error| format!("read sslkey {}: {error}", key.path.display()))?;
    let private = PrivateKeyDer::from_pem_slice(&pem)
        .map_err(|error| format!("read sslkey {}: {error} (an unencrypted PEM key is expected)", key.path.display()))?;
    Ok(Some((chain, private)))
}

/// As libpq: nobody but the owner may read the key, or root's group if root owns it.
fn check_key_permissions(path: &Path) -> Result<(), String> {
    use std::os::unix::fs::MetadataExt;
    let metadata = std::fs::metadata(path).map_err(|error| format!("read sslkey {}: {error}", path.display()))?;
    let forbidden = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & forbidden != 0 {
        return Err(format!("sslkey {} can be read by others: chmod 0600 it", path.display()));
    }
    Ok(())
}

/// Verifies a server's certificate as far as the mode asks.
#[derive(Debug)]
struct Verifier {
    supported: WebPkiSupportedAlgorithms,
    trust: Trust,
}

#[derive(Debug)]
enum Trust {
    /// Any certificate: the connection is private but the other side unproven.
    Anyone,
    /// A chain to a root, and the host's name if `name` is set.
    Chain { inner: Arc<WebPkiServerVerifier>, pinned: Vec<CertificateDer<'static>>, name: bool },
}

impl Verifier {
    fn new(info: &ConnInfo, host: &Host, provider: &Arc<CryptoProvider>) -> Result<Self, String> {
        let mode = info.ssl_mode(host);
        let name = mode == SslMode::VerifyFull;
        let verified = mode >= SslMode::VerifyCa;
        let file = match &info.tls.root {
            Some(RootCert::File(path)) => Some(path),
            Some(RootCert::Default(path)) if path.exists() => Some(path),
            _ => None,
        };
        let trust = match file {
            // libpq: a root certificate makes `require` verify the chain; weaker modes never do.
            Some(path) if mode >= SslMode::Require => {
                let pinned = read_certificates(path, "sslrootcert")?;
                let mut roots = RootCertStore::empty();
                for certificate in &pinned {
                    roots.add(certificate.clone()).map_err(|e| format!("sslrootcert {}: {e}", path.display()))?;
                }
                Trust::chain(roots, pinned, name, provider)?
            }
            None if name => {
                let loaded = rustls_native_certs::load_native_certs();
                let mut roots = RootCertStore::empty();
                roots.add_parsable_certificates(loaded.certs);
                if roots.is_empty() {
                    return Err("the system has no root certificates; name the CA's file with sslrootcert".to_owned());
                }
                Trust::chain(roots, Vec::new(), name, provider)?
            }
            None if verified => {
                return Err(
                    "sslmode=verify-ca needs sslrootcert (with the system's roots, anybody's certificate would \
                            pass; sslmode=verify-full can use them)"
                        .to_owned(),
                );
            }
            _ => Trust::Anyone,
        };
        Ok(Self { supported: provider.signature_verification_algorithms, trust })
    }
}

impl Trust {
    fn chain(
        roots: RootCertStore,
        pinned: Vec<CertificateDer<'static>>,
        name: bool,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Self, String> {
        let inner = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .build()
            .map_err(|error| error.to_string())?;
        Ok(Self::Chain { inner, pinned, name })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Trust::Chain { inner, pinned, name } = &self.trust else { return Ok(ServerCertVerified::assertion()) };
        // PostgreSQL's manual has people make one self-signed certificate and give it to clients as the root. It is a CA
        // certificate in form, which webpki refuses at the end of a chain; being the very one that is trusted, it is fine.
        if pinned.iter().any(|root| root.as_ref() == end_entity.as_ref()) {
            check_validity(end_entity, now)?;
            return if !name || carries_name(end_entity, server_name) {
                Ok(ServerCertVerified::assertion())
            } else {
                Err(CertificateError::NotValidForName.into())
            };
        }
        // The name is the last thing that webpki looks at: if only that fails, the chain is good.
        match inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !name || carries_name(end_entity, server_name) => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.supported)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.supported)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.supported.supported_schemes()
    }
}

fn check_validity(certificate: &CertificateDer<'_>, now: UnixTime) -> Result<(), rustls::Error> {
    let parsed = Certificate::from_der(certificate).map_err(|_| CertificateError::BadEncoding)?;
    let validity = &parsed.tbs_certificate.validity;
    if now.as_secs() > validity.not_after.to_unix_duration().as_secs() {
        return Err(CertificateError::Expired.into());
    }
    if now.as_secs() < validity.not_before.to_unix_duration().as_secs() {
        return Err(CertificateError::NotValidYet.into());
    }
    Ok(())
}

/// True if the certificate is for this host by libpq's rules: an alternative name of the right kind, or, if it has no
/// alternative names of that kind, the common name. Webpki never looks at the common name, but PostgreSQL's manual makes
/// certificates that have nothing else. (Postgres: `pgtls_verify_peer_name_matches_certificate_guts`.)
fn carries_name(certificate: &CertificateDer<'_>, server: &ServerName<'_>) -> bool {
    let Ok(parsed) = Certificate::from_der(certificate) else { return false };
    let extensions = parsed.tbs_certificate.extensions.iter().flatten();
    let alternatives: Vec<GeneralName> = extensions
        .filter(|extension| extension.extn_id == SubjectAltName::OID)
        .filter_map(|extension| SubjectAltName::from_der(extension.extn_value.as_bytes()).ok())
        .flat_map(|names| names.0)
        .collect();
    let common_names = || {
        let attributes = parsed.tbs_certificate.subject.0.iter().flat_map(|rdn| rdn.0.iter());
        attributes.filter(|attribute| attribute.oid == rfc4519::CN).filter_map(|attribute| {
            let any = &attribute.value;
            Utf8StringRef::try_from(any)
                .map(|s| s.as_str().to_owned())
                .or_else(|_| PrintableStringRef::try_from(any).map(|s| s.as_str().to_owned()))
                .or_else(|_| Ia5StringRef::try_from(any).map(|s| s.as_str().to_owned()))
                .inspect_err(|_| tracing::debug!("a common name of type {} is not read", any.tag()))
                .ok()
        })
    };
    match server {
        ServerName::DnsName(name) => {
            let mut dns = alternatives.iter().filter_map(|name| match name {
                GeneralName::DnsName(dns) => Some(dns.as_str()),
                _ => None,
            });
            if alternatives.iter().any(|name| matches!(name, GeneralName::DnsName(_))) {
                dns.any(|pattern| dns_matches(pattern, name.as_ref()))
            } else {
                common_names().any(|pattern| dns_matches(&pattern, name.as_ref()))
            }
        }
        ServerName::IpAddress(ip) => {
            let octets = match std::net::IpAddr::from(*ip) {
                std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
                std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
            };
            let text = std::net::IpAddr::from(*ip).to_string();
            let mut addresses = alternatives.iter().filter_map(|name| match name {
                GeneralName::IpAddress(bytes) => Some(bytes.as_bytes()),
                _ => None,
            });
            if alternatives.iter().any(|name| matches!(name, GeneralName::IpAddress(_))) {
                addresses.any(|bytes| bytes == octets)
            } else {
                common_names().any(|name| name == text)
            }
        }
        _ => false,
    }
}

/// `db1.example.com` matches itself and `*.example.com`: the star is the whole first label and matches one.
fn dns_matches(pattern: &str, name: &str) -> bool {
    if let Some(suffix) = pattern.strip_prefix("*.") {
        return suffix.contains('.')
            && name
                .split_once('.')
                .is_some_and(|(label, rest)| !label.is_empty() && rest.eq_ignore_ascii_case(suffix));
    }
    pattern.eq_ignore_ascii_case(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stands_for_one_whole_label() {
        for (pattern, name, matches) in [
            ("db1.example.com", "DB1.example.com", true),
            ("*.example.com", "db1.example.com", true),
            ("*.example.com", "a.db1.example.com", false),
            ("*.example.com", "example.com", false),
            ("*.com", "example.com", false),
            ("*", "localhost", false),
            ("db*.example.com", "db1.example.com", false),
        ] {
            assert_eq!(dns_matches(pattern, name), matches, "{pattern} {name}");
        }
    }

    #[test]
    fn what_is_not_a_certificate_binds_nothing_and_has_no_name() {
        for bytes in [&[][..], &[0x30, 0x82, 0xFF, 0xFF], b"certificate"] {
            let certificate = CertificateDer::from(bytes);
            assert_eq!(server_end_point(&certificate), None);
            assert!(!carries_name(&certificate, &ServerName::try_from("localhost").unwrap()));
        }
        assert_eq!(pss_hash(Some(&[0xA0, 9, 0x30, 9, 0x06, 200])), rfc5912::ID_SHA_256);
    }
}
