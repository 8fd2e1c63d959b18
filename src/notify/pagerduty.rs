//! PagerDuty's Events API, version 2: one alert for an incident, triggered, acknowledged and resolved by its `dedup_key`,
//! so that a repetition changes nothing. 202 means taken. (PagerDuty/api-schema, `reference/events-v2/openapiv3.json`.)

use serde_json::{Value, json};

use super::message::{Event, Message, Severity, State};
use super::secret::Secret;

/// Where events go unless `url` says otherwise; accounts in the EU have `https://events.eu.pagerduty.com/v2/enqueue`.
pub(super) const URL: &str = "https://events.pagerduty.com/v2/enqueue";

/// Characters of a summary; the service cuts longer ones at 1,024.
const SUMMARY_CHARS_MAX: usize = 1_000;

/// What is sent, in order: a test opens an alert and closes it at once.
pub(super) fn bodies(message: &Message, routing_key: &Secret) -> Vec<Value> {
    let action = action(message);
    let mut bodies = vec![event(message, routing_key, action)];
    if message.test {
        bodies.push(event(message, routing_key, "resolve"));
    }
    bodies
}

fn action(message: &Message) -> &'static str {
    match message.event {
        _ if message.test => "trigger",
        Event::Acknowledged => "acknowledge",
        Event::Resolved | Event::Aborted => "resolve",
        Event::Opened if matches!(message.state, State::Resolved | State::Aborted) => "resolve",
        Event::Opened | Event::Raised | Event::Grown | Event::Committed => "trigger",
    }
}

fn event(message: &Message, routing_key: &Secret, action: &str) -> Value {
    let mut body = json!({
        "routing_key": routing_key.expose(),
        "event_action": action,
        "dedup_key": message.dedup_key,
    });
    if action == "trigger" {
        body["client"] = json!("walguard");
        body["payload"] = json!({
            "summary": super::message::clean(&message.headline(), SUMMARY_CHARS_MAX),
            "timestamp": message.detected_at.to_string(),
            "severity": match message.severity {
                Severity::Critical => "critical",
                Severity::Warning => "warning",
                Severity::Info => "info",
            },
            "source": message.cluster,
            "component": "postgresql",
            "class": "walguard incident",
            "custom_details": {
                "message": message.text,
                "incident": message.incident,
                "who": message.who,
                "rows_lost": message.rows_lost,
                "committed": message.committed,
                "commands": message.commands.iter().map(|command| command.command.as_str()).collect::<Vec<_>>(),
            },
        });
    }
    body
}
