//! A channel: what of an incident goes there, and how it is sent.

use std::fmt;

use jiff::Timestamp;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use serde_json::Value;

use super::config::{Config, Configs, Kind};
use super::email::Email;
use super::error::{OpenError, SendError};
use super::http::{Http, Request};
use super::message::{Message, Setting};
use super::secret::{Secret, SecretPlace};
use super::{alertmanager, command, discord, http, pagerduty, slack, teams, webhook};

/// A channel that can be sent to.
pub struct Channel {
    name: String,
    config: Config,
    sender: Sender,
}

enum Sender {
    Http(Http),
    Email(Box<Email>),
    Command,
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channel").field("name", &self.name).field("kind", &self.config.kind).finish_non_exhaustive()
    }
}

impl Channel {
    /// Prepares a channel. Secrets are read once now, so that a missing one shows at the start and not at night, and
    /// again at each message, so that they can be rotated.
    ///
    /// # Errors
    /// If it could never work as it is set.
    pub fn open(name: &str, config: &Config) -> Result<Self, OpenError> {
        let fault = |problem: String, hint: Option<String>| OpenError { channel: name.to_owned(), problem, hint };
        config.check(name).map_err(|problem| fault(problem, None))?;
        for place in [config.url_place(), config.secret_place(), config.token_place()].into_iter().flatten() {
            place.read().map_err(|error| {
                let hint = format!("put it into {place}, readable for the user that runs walguard and nobody else");
                fault(crate::backoff::Chain(&error).to_string(), Some(hint))
            })?;
        }
        let sender = match config.kind {
            Kind::Email => Email::open(config).map(Box::new).map(Sender::Email),
            Kind::Command => Ok(Sender::Command),
            _ => Http::open(config).map(Sender::Http),
        };
        let sender = sender.map_err(|problem| fault(problem, None))?;
        Ok(Self { name: name.to_owned(), config: config.clone(), sender })
    }

    /// Prepares all channels.
    ///
    /// # Errors
    /// Of the first that could never work.
    pub fn open_all(configs: &Configs) -> Result<Vec<Self>, OpenError> {
        configs.iter().map(|(name, config)| Self::open(name, config)).collect()
    }

    /// Its name in the settings.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its settings.
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// Sends a message once.
    ///
    /// # Errors
    /// Why it was not taken, without any secret in it.
    pub async fn send(&self, message: &Message, setting: &Setting, now: Timestamp) -> Result<(), SendError> {
        let secret = read(self.config.secret_place())?;
        let token = read(self.config.token_place())?;
        let url = read(self.config.url_place())?;
        let set = self.config.url.as_ref().map(|url| url.0.as_str());
        let hidden: Vec<_> = url.as_ref().map(Secret::expose).or(set).map(http::secret_parts).unwrap_or_default();
        let mut exposed: Vec<_> = [&secret, &token].into_iter().flatten().map(Secret::expose).collect();
        exposed.extend(hidden.iter().map(String::as_str));
        let sent = match &self.sender {
            Sender::Email(email) => email.send(message, secret.as_ref()).await,
            Sender::Command => command::run(&self.config.command, message, self.config.timeout).await,
            Sender::Http(http) => {
                let base = url.as_ref().map(Secret::expose).or(set);
                let url = match self.config.kind {
                    Kind::PagerDuty => base.unwrap_or(pagerduty::URL).to_owned(),
                    Kind::Alertmanager => alertmanager::url(base.unwrap_or_default()),
                    _ => base.unwrap_or_default().to_owned(),
                };
                self.post(http, &url, self.requests(message, setting, now, secret.as_ref()), token.as_ref(), now).await
            }
        };
        sent.map_err(|error| error.without(&exposed))
    }

    fn requests(&self, message: &Message, setting: &Setting, now: Timestamp, secret: Option<&Secret>) -> Vec<Request> {
        match self.config.kind {
            Kind::Webhook => vec![webhook::request(message, secret, now)],
            Kind::Slack => vec![json(&slack::body(message, setting))],
            Kind::Teams => vec![json(&teams::body(message, setting))],
            Kind::Discord => vec![json(&discord::body(message, setting))],
            Kind::PagerDuty => match secret {
                Some(key) => pagerduty::bodies(message, key).iter().map(json).collect(),
                None => Vec::new(),
            },
            Kind::Alertmanager => {
                let mut request = json(&alertmanager::body(message, now));
                if let (Some(user), Some(password)) = (&self.config.user, secret) {
                    request.basic = Some((user.clone(), password.clone()));
                }
                vec![request]
            }
            Kind::Email | Kind::Command => Vec::new(),
        }
    }

    async fn post(
        &self,
        http: &Http,
        url: &str,
        requests: Vec<Request>,
        token: Option<&Secret>,
        now: Timestamp,
    ) -> Result<(), SendError> {
        for mut request in requests {
            request.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
            if let Some(token) = token {
                authorize(&mut request.headers, &format!("Bearer {}", token.expose()));
            }
            http.post(url, request, now).await?;
        }
        Ok(())
    }
}

fn json(body: &Value) -> Request {
    Request { headers: HeaderMap::new(), basic: None, body: body.to_string().into() }
}

fn authorize(headers: &mut HeaderMap, value: &str) {
    // What a header cannot carry was no token; the receiver says so.
    if let Ok(mut value) = HeaderValue::from_str(value) {
        value.set_sensitive(true);
        headers.insert(AUTHORIZATION, value);
    }
}

fn read(place: Option<SecretPlace>) -> Result<Option<Secret>, SendError> {
    // It was there at the start; while it is being rotated it may be gone for a moment.
    place
        .map(|place| place.read())
        .transpose()
        .map_err(|error| SendError::away(crate::backoff::Chain(&error).to_string()))
}
