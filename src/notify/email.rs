//! E-mail over SMTP: one message to each receiver, so that one bad address keeps the alarm from nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};

use lettre::message::header::{ContentType, HeaderName, HeaderValue};
use lettre::message::{Mailbox, MultiPart, SinglePart};
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{AsyncSmtpTransport, AsyncTransport as _, Tokio1Executor};

use super::config::{Config, SmtpTls};
use super::error::SendError;
use super::message::{Event, Message, Severity};
use super::secret::Secret;

/// Messages of which it is remembered who got them already: those under way, of which there is one a channel.
const REMEMBERED_MAX: usize = 64;

/// The sender of one channel.
#[derive(Debug)]
pub(super) struct Email {
    host: String,
    port: u16,
    tls: Tls,
    timeout: std::time::Duration,
    user: Option<String>,
    from: Mailbox,
    to: Vec<Mailbox>,
    /// Who got a message whose delivery to others failed.
    got: Mutex<BTreeMap<String, BTreeSet<String>>>,
}

impl Email {
    /// # Errors
    /// What is wrong with the settings, in words.
    pub(super) fn open(config: &Config) -> Result<Self, String> {
        let host = config.host.clone().unwrap_or_default();
        let mailbox = |text: &str| -> Result<Mailbox, String> {
            text.parse().map_err(|error| format!("{text:?} is no address: {error}"))
        };
        let mode = config.tls.unwrap_or_default();
        let tls = match mode {
            SmtpTls::None => Tls::None,
            SmtpTls::Starttls => Tls::Required(parameters(config, &host)?),
            SmtpTls::Implicit => Tls::Wrapper(parameters(config, &host)?),
        };
        let port = config.port.unwrap_or(match mode {
            SmtpTls::Starttls => 587,
            SmtpTls::Implicit => 465,
            SmtpTls::None => 25,
        });
        Ok(Self {
            host,
            port,
            tls,
            timeout: config.timeout,
            user: config.user.clone(),
            from: mailbox(config.from.as_deref().unwrap_or_default())?,
            to: config.to.iter().map(|to| mailbox(to)).collect::<Result<_, _>>()?,
            got: Mutex::default(),
        })
    }

    /// Sends to everybody who has not got it yet.
    ///
    /// # Errors
    /// Of the first receiver that failed; the others got it, and will not get it again from this process.
    pub(super) async fn send(&self, message: &Message, password: Option<&Secret>) -> Result<(), SendError> {
        let mut builder = AsyncSmtpTransport::<Tokio1Executor>::builder_dangerous(self.host.as_str())
            .port(self.port)
            .tls(self.tls.clone())
            .timeout(Some(self.timeout));
        if let (Some(user), Some(password)) = (&self.user, password) {
            builder = builder.credentials(Credentials::new(user.clone(), password.expose().to_owned()));
        }
        let transport = builder.build();
        let mut failed: Option<SendError> = None;
        for to in &self.to {
            let address = to.email.to_string();
            if self.has(&message.delivery, &address) {
                continue;
            }
            let letter = self.letter(message, to)?;
            match tokio::time::timeout(self.timeout * 2, transport.send(letter)).await {
                Ok(Ok(_)) => self.remember(&message.delivery, address),
                Ok(Err(error)) => failed = worse(failed, self.explain(&address, &error)),
                Err(_) => {
                    let problem = format!("{}:{} did not answer in time", self.host, self.port);
                    let late = SendError::Unavailable { problem, retry_after: None, maybe_taken: true };
                    failed = worse(failed, late);
                }
            }
        }
        match failed {
            Some(error) => Err(error),
            None => {
                self.got.lock().unwrap_or_else(PoisonError::into_inner).remove(&message.delivery);
                Ok(())
            }
        }
    }

    fn has(&self, delivery: &str, address: &str) -> bool {
        let got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        got.get(delivery).is_some_and(|addresses| addresses.contains(address))
    }

    fn remember(&self, delivery: &str, address: String) {
        let mut got = self.got.lock().unwrap_or_else(PoisonError::into_inner);
        if got.len() >= REMEMBERED_MAX && !got.contains_key(delivery) {
            got.pop_first();
        }
        got.entry(delivery.to_owned()).or_default().insert(address);
    }

    fn explain(&self, address: &str, error: &lettre::transport::smtp::Error) -> SendError {
        let problem = format!("{}:{} for {address}: {}", self.host, self.port, crate::backoff::Chain(error));
        if error.is_permanent() {
            let hint = "check the channel's user, secret, `from` and `to` with whoever runs the mail server".to_owned();
            return SendError::Refused { problem, hint: Some(hint) };
        }
        // Once the server has answered anything but success to our message, it did not take it.
        let maybe_taken = !error.is_transient() && !error.is_tls() && !error.is_client();
        SendError::Unavailable { problem, retry_after: None, maybe_taken }
    }

    fn letter(&self, message: &Message, to: &Mailbox) -> Result<lettre::Message, SendError> {
        let refused = |error: lettre::error::Error| SendError::Refused {
            problem: format!("make the e-mail: {error}"),
            hint: None,
        };
        let domain = self.from.email.domain();
        let id = |delivery: &str| format!("<{}@{domain}>", delivery.replace(['/', '@'], "."));
        // The first message of an incident begins a thread, and all of them answer it.
        let thread = format!("<{}@{domain}>", message.dedup_key.replace(['/', '@'], "."));
        let mut builder = lettre::Message::builder()
            .from(self.from.clone())
            .to(to.clone())
            .subject(message.headline())
            .message_id(Some(id(&message.delivery)))
            .references(thread);
        // RFC 3834: no out-of-office answers.
        builder = builder.raw_header(raw("Auto-Submitted", "auto-generated"));
        if message.severity == Severity::Critical && !matches!(message.event, Event::Resolved | Event::Aborted) {
            builder = builder.raw_header(raw("Importance", "high"));
        }
        let plain = SinglePart::builder().header(ContentType::TEXT_PLAIN).body(message.text.clone());
        let html = SinglePart::builder().header(ContentType::TEXT_HTML).body(html(&message.text));
        builder.multipart(MultiPart::alternative().singlepart(plain).singlepart(html)).map_err(refused)
    }
}

fn raw(name: &'static str, value: &str) -> HeaderValue {
    HeaderValue::new(HeaderName::new_from_ascii_str(name), value.to_owned())
}

/// What passes weighs more: it is tried again soon, and those who got it do not get it again.
fn worse(before: Option<SendError>, next: SendError) -> Option<SendError> {
    match before {
        Some(before) if before.is_transient() => Some(before),
        _ => Some(next),
    }
}

/// The text in a fixed-width font: its columns are made for one.
fn html(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    format!(
        "<!DOCTYPE html><html><body><pre style=\"font-family: monospace; white-space: pre-wrap\">{text}</pre></body></html>\n"
    )
}

fn parameters(config: &Config, host: &str) -> Result<TlsParameters, String> {
    let mut builder = TlsParameters::builder(host.to_owned());
    if let Some(path) = &config.ca_file {
        let told = |problem: String| format!("ca_file {}: {problem}", path.display());
        let pem = std::fs::read(path).map_err(|error| told(error.to_string()))?;
        builder = builder.add_root_certificate(Certificate::from_pem(&pem).map_err(|error| told(error.to_string()))?);
    }
    builder.build().map_err(|error| format!("prepare TLS for {host}: {error}"))
}
