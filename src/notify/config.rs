//! `[notify.<name>]` of the settings: whom to tell, of what, and how.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::message::{Event, Severity};
use super::secret::SecretPlace;

/// All channels by name.
pub type Configs = BTreeMap<String, Config>;

/// Channels in all: each has a queue and a connection of its own.
const CHANNELS_MAX: usize = 32;
/// The longest name of a channel, in bytes: it is a part of keys and file names.
const NAME_BYTES_MAX: usize = 40;
/// How long one delivery may take at least and at most.
const TIMEOUT_MIN: Duration = Duration::from_secs(1);
const TIMEOUT_MAX: Duration = Duration::from_secs(300);
/// The longest wait before a channel is told: an alarm of last week wakes nobody usefully.
const AFTER_MAX: Duration = Duration::from_secs(24 * 3_600);

/// What kind of receiver a channel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Our own JSON, signed, to any URL.
    Webhook,
    /// A Slack incoming webhook.
    Slack,
    /// A Microsoft Teams workflow ("when a Teams webhook request is received").
    Teams,
    /// A Discord webhook.
    Discord,
    /// PagerDuty's Events API, version 2.
    PagerDuty,
    /// Prometheus Alertmanager's API, version 2.
    Alertmanager,
    /// E-mail over SMTP.
    Email,
    /// A program on this machine.
    Command,
}

impl Kind {
    /// The name in the settings.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Webhook => "webhook",
            Self::Slack => "slack",
            Self::Teams => "teams",
            Self::Discord => "discord",
            Self::PagerDuty => "pagerduty",
            Self::Alertmanager => "alertmanager",
            Self::Email => "email",
            Self::Command => "command",
        }
    }

    /// True where a message opens or closes something at the receiver, so that telling of what is over already would
    /// page somebody for nothing.
    pub const fn is_stateful(self) -> bool {
        matches!(self, Self::PagerDuty | Self::Alertmanager)
    }
}

/// A URL to post to. It is not printed: people put tokens into URLs.
#[derive(Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct PostUrl(pub String);

impl fmt::Debug for PostUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PostUrl(..)")
    }
}

/// How an SMTP connection is encrypted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SmtpTls {
    /// Begins in the clear and must be encrypted before anything is said. Port 587 by default.
    #[default]
    Starttls,
    /// Encrypted from the first byte. Port 465 by default.
    Implicit,
    /// Not at all: only for a relay on this machine. Port 25 by default.
    None,
}

/// One channel: the table `[notify.<name>]` of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What kind of receiver.
    pub kind: Kind,
    /// Incidents below this are not told here.
    #[serde(default = "severity_min")]
    pub severity_min: Severity,
    /// What about an incident is told here. Default: everything.
    #[serde(default = "Event::all", skip_serializing_if = "is_every_event")]
    pub events: Vec<Event>,
    /// Escalation: told here only if nobody has acknowledged the incident for so long. Default: at once.
    #[serde(default, with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub after: Duration,
    /// How long one delivery may take before it is given up and tried again.
    #[serde(default = "timeout", with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub timeout: Duration,

    /// Where to post, for `webhook`, `alertmanager` and `pagerduty` (default there: PagerDuty's own).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<PostUrl>,
    /// A file that holds the URL, where the URL itself is the secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_file: Option<PathBuf>,
    /// An environment variable that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url_env: Option<String>,
    /// A file that holds the secret: the signing key of a `webhook`, the routing key of `pagerduty`, the password of
    /// `email` or `alertmanager`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_file: Option<PathBuf>,
    /// An environment variable that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_env: Option<String>,
    /// A file that holds a bearer token, for `webhook` and `alertmanager`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,
    /// An environment variable that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_env: Option<String>,
    /// Certificates (PEM) to trust beside the machine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,

    /// `email`: the SMTP server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// `email`: its port. Default: by `tls`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// `email`: how the connection is encrypted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<SmtpTls>,
    /// `email` and `alertmanager`: the user that the password belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// `email`: the sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// `email`: the receivers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub to: Vec<String>,

    /// `command`: the program and its arguments. No shell reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub command: Vec<String>,
}

const fn severity_min() -> Severity {
    Severity::Warning
}

const fn timeout() -> Duration {
    Duration::from_secs(10)
}

fn is_every_event(events: &[Event]) -> bool {
    events == Event::all()
}

impl Config {
    /// A channel of this kind with every default; what the kind needs is missing yet.
    pub fn new(kind: Kind) -> Self {
        Self {
            kind,
            severity_min: severity_min(),
            events: Event::all(),
            after: Duration::ZERO,
            timeout: timeout(),
            url: None,
            url_file: None,
            url_env: None,
            secret_file: None,
            secret_env: None,
            token_file: None,
            token_env: None,
            ca_file: None,
            host: None,
            port: None,
            tls: None,
            user: None,
            from: None,
            to: Vec::new(),
            command: Vec::new(),
        }
    }

    /// Where the URL is kept, if it is a secret.
    pub fn url_place(&self) -> Option<SecretPlace> {
        SecretPlace::of(self.url_file.as_ref(), self.url_env.as_ref())
    }

    /// Where the secret is kept.
    pub fn secret_place(&self) -> Option<SecretPlace> {
        SecretPlace::of(self.secret_file.as_ref(), self.secret_env.as_ref())
    }

    /// Where the bearer token is kept.
    pub fn token_place(&self) -> Option<SecretPlace> {
        SecretPlace::of(self.token_file.as_ref(), self.token_env.as_ref())
    }

    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// What is wrong, beginning with the setting's name.
    pub fn check(&self, name: &str) -> Result<(), String> {
        let fault = |key: &str, problem: &str| Err(format!("notify.{name}.{key} {problem}"));
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        if !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(plain) || name.starts_with('-') {
            return Err(format!(
                "notify.{name:?} is no name for a channel: 1 to 40 of A-Z a-z 0-9 _ -, and not - first"
            ));
        }
        if !(TIMEOUT_MIN..=TIMEOUT_MAX).contains(&self.timeout) {
            return fault("timeout", "must be between 1s and 5m");
        }
        if self.after > AFTER_MAX {
            return fault("after", "must be at most 24h");
        }
        if !self.events.contains(&Event::Opened) {
            return fault(
                "events",
                "must hold \"opened\": whoever was not told of an incident is not told how it goes on",
            );
        }
        self.check_places(&fault)?;
        self.check_meant(&fault)?;
        self.check_needed(&fault)
    }

    fn check_places(&self, fault: &dyn Fn(&str, &str) -> Result<(), String>) -> Result<(), String> {
        let twice = [
            ("url_file", self.url_file.is_some() && self.url_env.is_some(), "url_env"),
            ("url", self.url.is_some() && self.url_place().is_some(), "url_file or url_env"),
            ("secret_file", self.secret_file.is_some() && self.secret_env.is_some(), "secret_env"),
            ("token_file", self.token_file.is_some() && self.token_env.is_some(), "token_env"),
        ];
        for (key, is_twice, other) in twice {
            if is_twice {
                return fault(key, &format!("and {other} cannot both be set"));
            }
        }
        if self.url.as_ref().is_some_and(|url| super::http::parse_url(&url.0).is_none()) {
            return fault("url", "is neither an https:// nor an http:// URL");
        }
        Ok(())
    }

    /// A setting that this kind does not know is a mistake: it would be ignored.
    fn check_meant(&self, fault: &dyn Fn(&str, &str) -> Result<(), String>) -> Result<(), String> {
        use Kind::{Alertmanager, Command, Discord, Email, PagerDuty, Slack, Teams, Webhook};
        let set: [(&str, bool, &[Kind]); 14] = [
            ("url", self.url.is_some(), &[Webhook, PagerDuty, Alertmanager]),
            ("url_file", self.url_file.is_some(), &[Webhook, Slack, Teams, Discord, Alertmanager]),
            ("url_env", self.url_env.is_some(), &[Webhook, Slack, Teams, Discord, Alertmanager]),
            ("secret_file", self.secret_file.is_some(), &[Webhook, PagerDuty, Alertmanager, Email]),
            ("secret_env", self.secret_env.is_some(), &[Webhook, PagerDuty, Alertmanager, Email]),
            ("token_file", self.token_file.is_some(), &[Webhook, Alertmanager]),
            ("token_env", self.token_env.is_some(), &[Webhook, Alertmanager]),
            ("ca_file", self.ca_file.is_some(), &[Webhook, Slack, Teams, Discord, PagerDuty, Alertmanager, Email]),
            ("host", self.host.is_some(), &[Email]),
            ("port", self.port.is_some(), &[Email]),
            ("tls", self.tls.is_some(), &[Email]),
            ("user", self.user.is_some(), &[Email, Alertmanager]),
            ("from", self.from.is_some(), &[Email]),
            ("to", !self.to.is_empty(), &[Email]),
        ];
        for (key, is_set, kinds) in set {
            if is_set && !kinds.contains(&self.kind) {
                let more = match (key, self.kind) {
                    ("url", Slack | Teams | Discord) => {
                        ": the URL is a secret, so put it in a file and name that with url_file"
                    }
                    _ => "",
                };
                return fault(key, &format!("means nothing for kind = \"{}\"{more}", self.kind.name()));
            }
        }
        if !self.command.is_empty() && self.kind != Command {
            return fault("command", &format!("means nothing for kind = \"{}\"", self.kind.name()));
        }
        Ok(())
    }

    fn check_needed(&self, fault: &dyn Fn(&str, &str) -> Result<(), String>) -> Result<(), String> {
        let has_url = self.url.is_some() || self.url_place().is_some();
        match self.kind {
            Kind::Webhook | Kind::Alertmanager if !has_url => fault("url", "is missing"),
            Kind::Slack | Kind::Teams | Kind::Discord if !has_url => {
                fault("url_file", "is missing: a file whose first line is the webhook's URL")
            }
            Kind::PagerDuty if self.secret_place().is_none() => {
                fault("secret_file", "is missing: a file whose first line is the integration's routing key")
            }
            Kind::Alertmanager if self.user.is_some() != self.secret_place().is_some() => {
                fault("user", "and a secret go together")
            }
            Kind::Alertmanager if self.user.is_some() && self.token_place().is_some() => {
                fault("user", "and a token cannot both be set")
            }
            Kind::Email if self.host.is_none() => fault("host", "is missing: the SMTP server"),
            Kind::Email if self.from.is_none() => fault("from", "is missing: the sender's address"),
            Kind::Email if self.to.is_empty() => fault("to", "is missing: the receivers' addresses"),
            Kind::Email if self.user.is_some() != self.secret_place().is_some() => {
                fault("user", "and a secret (the password) go together")
            }
            Kind::Email if self.user.is_some() && self.tls == Some(SmtpTls::None) => {
                fault("tls", "= \"none\" would send the password in the clear")
            }
            Kind::Command if self.command.first().is_none_or(String::is_empty) => {
                fault("command", "is missing: the program and its arguments, as a list")
            }
            _ => Ok(()),
        }
    }
}

/// Checks all channels.
///
/// # Errors
/// What is wrong with the first that is.
pub fn check(configs: &Configs) -> Result<(), String> {
    if configs.len() > CHANNELS_MAX {
        return Err(format!("notify has {} channels; {CHANNELS_MAX} is the most", configs.len()));
    }
    configs.iter().try_for_each(|(name, config)| config.check(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|error| error.to_string())?;
        config.check("oncall").map(|()| config)
    }

    #[test]
    fn a_channel_needs_little() {
        for text in [
            "kind = \"webhook\"\nurl = \"https://example.com/hook\"",
            "kind = \"slack\"\nurl_file = \"/etc/walguard/slack\"",
            "kind = \"teams\"\nurl_env = \"TEAMS_URL\"",
            "kind = \"discord\"\nurl_file = \"/etc/walguard/discord\"",
            "kind = \"pagerduty\"\nsecret_file = \"/etc/walguard/pagerduty\"",
            "kind = \"alertmanager\"\nurl = \"http://alertmanager:9093\"",
            "kind = \"email\"\nhost = \"mail\"\nfrom = \"walguard@example.com\"\nto = [\"oncall@example.com\"]",
            "kind = \"command\"\ncommand = [\"/usr/local/bin/page\"]",
        ] {
            let config = parse(text).unwrap();
            assert_eq!((config.severity_min, config.after), (Severity::Warning, Duration::ZERO), "{text}");
        }
    }

    #[test]
    fn a_setting_that_would_be_ignored_or_is_missing_is_refused_by_name() {
        for (text, name) in [
            ("kind = \"slack\"", "notify.oncall.url_file is missing"),
            ("kind = \"slack\"\nurl = \"https://hooks.slack.com/x\"", "notify.oncall.url means nothing"),
            ("kind = \"webhook\"\nurl = \"ftp://example.com\"", "notify.oncall.url is neither"),
            ("kind = \"webhook\"\nurl = \"https://a\"\nurl_file = \"b\"", "notify.oncall.url and url_file"),
            ("kind = \"webhook\"\nurl = \"https://a\"\nuser = \"b\"", "notify.oncall.user means nothing"),
            ("kind = \"webhook\"\nurl = \"https://a\"\ntimeout = \"0s\"", "notify.oncall.timeout"),
            ("kind = \"webhook\"\nurl = \"https://a\"\nafter = \"30h\"", "notify.oncall.after"),
            ("kind = \"webhook\"\nurl = \"https://a\"\nevents = []", "notify.oncall.events"),
            ("kind = \"pagerduty\"", "notify.oncall.secret_file is missing"),
            ("kind = \"email\"\nhost = \"mail\"\nfrom = \"a@b\"", "notify.oncall.to is missing"),
            (
                "kind = \"email\"\nhost = \"m\"\nfrom = \"a@b\"\nto = [\"c@d\"]\ntls = \"none\"\nuser = \"u\"\nsecret_env = \"P\"",
                "notify.oncall.tls",
            ),
            ("kind = \"command\"", "notify.oncall.command is missing"),
        ] {
            let problem = parse(text).unwrap_err();
            assert!(problem.starts_with(name), "{text}\n{problem}");
        }
    }

    #[test]
    fn a_secret_cannot_be_written_into_the_settings() {
        for key in ["secret", "token", "password", "routing_key"] {
            let problem = parse(&format!("kind = \"webhook\"\nurl = \"https://a\"\n{key} = \"hush\"")).unwrap_err();
            assert!(problem.contains("unknown field"), "{problem}");
        }
    }

    #[test]
    fn a_url_is_not_printed_whatever_somebody_puts_into_it() {
        let config = parse("kind = \"webhook\"\nurl = \"https://example.com/?token=hush\"").unwrap();
        assert!(!format!("{config:?}").contains("hush"));
    }

    #[test]
    fn a_name_that_cannot_be_a_part_of_a_key_is_refused() {
        let config: Config = toml::from_str("kind = \"command\"\ncommand = [\"true\"]").unwrap();
        for name in ["", "a/b", "a b", "a.b", "-a", "\u{e4}", &"x".repeat(41)] {
            assert!(config.check(name).is_err(), "{name}");
        }
        assert_eq!(config.check("on-call_2"), Ok(()));
    }
}
