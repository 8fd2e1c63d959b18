//! Posting a message over HTTP, and what the answer means. No URL is ever part of an error: it may be a secret.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{StatusCode, Url};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

use super::config::Config;
use super::error::SendError;
use super::secret::Secret;

/// How long a connection may take: most of a delivery's time is for the receiver to think.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// An idle connection is kept so long: the messages of one incident come close together, and an older connection is often
/// closed by the other side just when it is needed.
const IDLE_MAX: Duration = Duration::from_secs(15);
/// Of an answer that refuses, so many bytes are read, and so many characters told.
const ANSWER_BYTES_MAX: usize = 4096;
const ANSWER_CHARS_MAX: usize = 300;
/// A receiver may ask to be left alone for so long; an alarm does not wait longer.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(600);

/// A client for one channel.
#[derive(Clone, Debug)]
pub(super) struct Http {
    client: reqwest::Client,
}

/// A request to be sent: everything but the URL.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub(super) headers: HeaderMap,
    /// User and password.
    pub(super) basic: Option<(String, Secret)>,
    pub(super) body: Bytes,
}

/// An http:// or https:// URL.
pub(super) fn parse_url(text: &str) -> Option<Url> {
    Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
}

/// The machine's certificates and those of `ca_file`.
///
/// # Errors
/// What is wrong with them, in words.
fn roots(config: &Config) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    // A machine without certificates can still reach receivers with a `ca_file`, and plain ones on the loopback.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = &config.ca_file {
        let told = |problem: String| format!("ca_file {}: {problem}", path.display());
        let pem = fs::read(path).map_err(|error| told(error.to_string()))?;
        let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
        let certificates = certificates.map_err(|error| told(error.to_string()))?;
        if certificates.is_empty() {
            return Err(told("no certificate in it (PEM is expected)".to_owned()));
        }
        for certificate in certificates {
            roots.add(certificate).map_err(|error| told(error.to_string()))?;
        }
    }
    Ok(roots)
}

impl Http {
    /// # Errors
    /// What is wrong with the settings, in words.
    pub(super) fn open(config: &Config) -> Result<Self, String> {
        let tls = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .with_root_certificates(roots(config)?)
            .with_no_client_auth();
        let client = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .user_agent(concat!("walguard/", env!("CARGO_PKG_VERSION")))
            .timeout(config.timeout)
            .connect_timeout(CONNECT_MAX.min(config.timeout))
            .pool_idle_timeout(IDLE_MAX)
            .pool_max_idle_per_host(1)
            // A receiver that moved must be set anew: a message, or a secret in its URL, is not for whoever it names.
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .build()
            .map_err(|error| error.without_url().to_string())?;
        Ok(Self { client })
    }

    /// Posts once.
    ///
    /// # Errors
    /// What the receiver said, or that it said nothing.
    pub(super) async fn post(&self, url: &str, request: Request, now: Timestamp) -> Result<(), SendError> {
        let refused =
            |problem: String, hint: Option<&str>| SendError::Refused { problem, hint: hint.map(str::to_owned) };
        let Some(url) = parse_url(url) else {
            return Err(refused("what is set as its URL is neither an https:// nor an http:// URL".to_owned(), None));
        };
        let place = place(&url);
        let mut post = self.client.post(url).headers(request.headers).body(request.body);
        if let Some((user, password)) = request.basic {
            post = post.basic_auth(user, Some(password.expose()));
        }
        let mut answer = post.send().await.map_err(|error| unanswered(&place, error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let retry_after = retry_after(answer.headers(), now);
        let mut said = Vec::new();
        while said.len() < ANSWER_BYTES_MAX
            && let Ok(Some(chunk)) = answer.chunk().await
        {
            said.extend_from_slice(chunk.get(..chunk.len().min(ANSWER_BYTES_MAX)).unwrap_or_default());
        }
        let said = super::message::clean(&String::from_utf8_lossy(&said), ANSWER_CHARS_MAX);
        let said = if said.is_empty() { String::new() } else { format!(": {said}") };
        let problem = format!("{place} answered {status}{said}");
        if is_passing(status) {
            return Err(SendError::Unavailable { problem, retry_after, maybe_taken: false });
        }
        let hint = match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => "check the secret or token of this channel",
            StatusCode::NOT_FOUND | StatusCode::GONE => {
                "check the channel's URL: the receiver does not know it (any more)"
            }
            status if status.is_redirection() => "it is elsewhere now: set the new URL",
            _ => return Err(refused(problem, None)),
        };
        Err(refused(problem, Some(hint)))
    }
}

/// What of a URL may be a secret, whole and in its parts, as a receiver may repeat them: all but [`place`].
pub(super) fn secret_parts(text: &str) -> Vec<String> {
    /// Shorter parts are the words of a path.
    const PART_BYTES_MIN: usize = 8;
    let Some(url) = parse_url(text) else { return vec![text.to_owned()] };
    let (path, query) = (url.path(), url.query().unwrap_or_default());
    let mut parts: Vec<String> = path.split('/').map(str::to_owned).collect();
    for (key, value) in url.query_pairs() {
        parts.extend([key.into_owned(), value.into_owned()]);
    }
    parts.extend(query.split(['&', '=']).map(str::to_owned));
    parts.extend([path.to_owned(), query.to_owned(), url.username().to_owned()]);
    parts.retain(|part| part.len() >= PART_BYTES_MIN);
    // A password is one however short it is.
    parts.extend(url.password().map(str::to_owned));
    parts
}

/// Scheme, host and port: what may be told of a URL.
fn place(url: &Url) -> String {
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{}://{}{port}", url.scheme(), url.host_str().unwrap_or_default())
}

/// Whether the same request may be taken later.
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error()
        || matches!(status, StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY | StatusCode::TOO_MANY_REQUESTS)
}

fn unanswered(place: &str, error: reqwest::Error) -> SendError {
    // What failed to connect was not sent; of anything else nobody knows.
    let maybe_taken = !error.is_connect() && !error.is_builder();
    let error = error.without_url();
    let problem = match error.is_timeout() {
        true => format!("{place} did not answer in time"),
        false => format!("{place} did not answer: {}", crate::backoff::Chain(&error)),
    };
    SendError::Unavailable { problem, retry_after: None, maybe_taken }
}

/// `Retry-After`: seconds, or a date (RFC 9110, 10.2.3).
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let span = match text.parse::<f64>() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok()?,
        Err(_) => {
            let date = jiff::fmt::rfc2822::parse(text).ok()?.timestamp();
            Duration::try_from(date.duration_since(now)).unwrap_or_default()
        }
    };
    Some(span.min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(text: &str) -> Option<Duration> {
        let now: Timestamp = "2025-12-17T06:14:00Z".parse().unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, text.parse().unwrap());
        retry_after(&headers, now)
    }

    #[test]
    fn a_receiver_may_ask_for_time_in_seconds_or_by_a_date_and_not_without_end() {
        assert_eq!(asked("30"), Some(Duration::from_secs(30)));
        assert_eq!(asked("0.5"), Some(Duration::from_millis(500)));
        assert_eq!(asked("Wed, 17 Dec 2025 06:15:00 GMT"), Some(Duration::from_secs(60)));
        assert_eq!(asked("Wed, 17 Dec 2025 05:15:00 GMT"), Some(Duration::ZERO));
        assert_eq!(asked("86400"), Some(RETRY_AFTER_MAX));
        for nonsense in ["soon", "-1", "NaN", "inf", ""] {
            assert_eq!(asked(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn whatever_of_a_url_may_be_a_secret_is_known_and_its_host_is_not_one() {
        let parts = secret_parts("https://user:pw@hooks.example.com/services/T0/hush-in-path?sig=hush%2Fin%2Fquery");
        for part in ["/services/T0/hush-in-path", "hush-in-path", "hush%2Fin%2Fquery", "hush/in/query", "pw"] {
            assert!(parts.iter().any(|known| known == part), "{part} in {parts:?}");
        }
        assert!(!parts.iter().any(|part| part.contains("example") || part == "T0" || part == "/"), "{parts:?}");
        assert_eq!(secret_parts("https://hooks.example.com/"), Vec::<String>::new());
        assert_eq!(secret_parts("hush-hush"), ["hush-hush"], "what is no URL is a secret all the same");
    }

    #[test]
    fn of_a_url_no_more_than_the_host_is_told() {
        let url = parse_url("https://user:hush@hooks.example.com:8443/services/hush?token=hush").unwrap();
        assert_eq!(place(&url), "https://hooks.example.com:8443");
        for text in ["", "hooks.example.com", "file:///etc/passwd", "https://"] {
            assert!(parse_url(text).is_none(), "{text}");
        }
    }
}
