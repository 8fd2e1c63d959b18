//! Prometheus Alertmanager's API, version 2: an alert that is posted again while the incident is open.
//!
//! Labels name the alert, so posting it again changes nothing but its end: it lasts until `endsAt`, which each post moves
//! (prometheus.io, "Alerts API": clients re-send active alerts every 30 seconds to 3 minutes).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::message::{Message, State};

/// How often an open alert is posted again.
pub(super) const REPEAT_EVERY: Duration = Duration::from_secs(60);
/// How long after a post an alert that is not posted again ends: four posts may be lost.
const LASTS: SignedDuration = SignedDuration::from_secs(300);
/// A test is over soon.
const TEST_LASTS: SignedDuration = SignedDuration::from_secs(60);

/// The path below the server's URL.
const PATH: &str = "api/v2/alerts";

/// Where alerts go: the server's URL, or the API's own.
pub(super) fn url(base: &str) -> String {
    if base.trim_end_matches('/').ends_with(PATH) {
        base.to_owned()
    } else {
        format!("{}/{PATH}", base.trim_end_matches('/'))
    }
}

pub(super) fn body(message: &Message, now: Timestamp) -> Value {
    let is_over = matches!(message.state, State::Resolved | State::Aborted) && !message.test;
    let lasts = match (message.test, is_over) {
        (true, _) => TEST_LASTS,
        (false, true) => SignedDuration::ZERO,
        (false, false) => LASTS,
    };
    // An alert ends after it begins, whatever our clock and the server's say.
    let ends_at = now.saturating_add(lasts).unwrap_or(now);
    let starts_at = message.detected_at.min(ends_at.saturating_sub(SignedDuration::from_secs(1)).unwrap_or(ends_at));
    let commands: Vec<_> =
        message.commands.iter().map(|command| format!("{}: {}", command.purpose, command.command)).collect();
    json!([{
        "labels": {
            "alertname": if message.test { "WalguardTest" } else { "WalguardIncident" },
            "cluster": message.cluster,
            "incident": message.incident,
            "severity": message.severity.as_str(),
        },
        "annotations": {
            "summary": message.headline(),
            "description": message.text,
            "commands": commands.join("\n"),
        },
        "startsAt": starts_at.to_string(),
        "endsAt": ends_at.to_string(),
    }])
}
