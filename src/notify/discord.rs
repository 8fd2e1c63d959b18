//! Discord: a webhook with one embed.
//!
//! Limits: 256 characters in a title, 4,096 in a description, 1,024 in a field, 6,000 in all, 25 fields (Discord's API
//! documentation, "Embed Limits"). Nobody is mentioned: `allowed_mentions` is empty.

use serde_json::{Value, json};

use super::message::{Event, Message, Setting, Severity};

/// Characters of a title.
const TITLE_CHARS_MAX: usize = 250;
/// Characters of a field's value.
const FIELD_CHARS_MAX: usize = 1_000;
/// Characters of the description: with the table, the commands and a title it stays below 6,000.
const DESCRIPTION_CHARS_MAX: usize = 1_700;
/// Commands, with a name and up to 350 characters each.
const COMMANDS_SHOWN: usize = 5;

pub(super) fn body(message: &Message, setting: &Setting) -> Value {
    let zone = &setting.zone;
    let mut description: Vec<String> =
        message.warnings(zone).iter().map(|text| format!("**{}**", escape(text))).collect();
    for (name, value) in message.facts(zone) {
        match name {
            "Query" => description.push(format!("**Query**\n{}", code(&[value], FIELD_CHARS_MAX))),
            name => description.push(format!("**{name}**  {}", escape(&value))),
        }
    }
    let mut fields = Vec::new();
    let mut field = |name: &str, value: String| fields.push(json!({"name": name, "value": value, "inline": false}));
    let tables = message.table_lines(15);
    if !tables.is_empty() {
        field("Tables, rows before -> after", code(&tables, FIELD_CHARS_MAX));
    }
    for command in message.commands.iter().take(COMMANDS_SHOWN) {
        let name = super::message::clean(&command.purpose, TITLE_CHARS_MAX);
        field(&name, code(std::slice::from_ref(&command.command), 350));
    }
    let headline = message.headline();
    json!({
        "username": "walguard",
        "allowed_mentions": {"parse": []},
        "embeds": [{
            "title": escape(&super::message::clean(&headline, TITLE_CHARS_MAX / 2)),
            "description": cut(&description.join("\n"), DESCRIPTION_CHARS_MAX),
            "color": color(message),
            "fields": fields,
            "footer": {"text": message.footer()},
            "timestamp": message.detected_at.to_string(),
        }],
    })
}

fn color(message: &Message) -> u32 {
    match (message.test, message.event, message.severity) {
        (true, ..) => 0x80_80_80,
        (_, Event::Resolved | Event::Aborted, _) => 0x2E_A0_43,
        (_, _, Severity::Critical) => 0xD0_21_1C,
        (_, _, Severity::Warning) => 0xE3_A0_08,
        (_, _, Severity::Info) => 0x80_80_80,
    }
}

/// Takes the meaning from what Markdown would take for its own.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if matches!(c, '\\' | '*' | '_' | '~' | '`' | '|' | '>' | '[' | ']' | '<') {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Lines in a fixed-width font, whole ones, as many as fit.
fn code(lines: &[String], chars_max: usize) -> String {
    let mut text = String::new();
    for line in lines {
        let line = line.replace('`', "'");
        if text.chars().count() + line.chars().count() + 12 > chars_max {
            if text.is_empty() {
                text = line.chars().take(chars_max.saturating_sub(12)).collect();
            }
            text.push_str("\n...");
            break;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&line);
    }
    format!("```\n{text}\n```")
}

fn cut(text: &str, chars_max: usize) -> String {
    if text.chars().count() <= chars_max {
        return text.to_owned();
    }
    text.chars().take(chars_max - 3).chain("...".chars()).collect()
}
