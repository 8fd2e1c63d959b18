//! Slack: an incoming webhook with blocks.
//!
//! Limits: 150 characters in a header, 3,000 in a section's text, 50 blocks (docs.slack.dev, Block Kit reference); `&`, `<`
//! and `>` are escaped because they begin mentions and links.

use serde_json::{Value, json};

use super::message::{Message, Setting};

/// Characters of a header.
const HEADER_CHARS_MAX: usize = 150;
/// Characters of a section, less what escaping and cutting may add.
const SECTION_CHARS_MAX: usize = 2_900;

pub(super) fn body(message: &Message, setting: &Setting) -> Value {
    let zone = &setting.zone;
    let headline = message.headline();
    let mut blocks = vec![json!({
        "type": "header",
        "text": {"type": "plain_text", "text": super::message::clean(&headline, HEADER_CHARS_MAX - 3), "emoji": false},
    })];
    let mut section = |text: String| {
        if !text.is_empty() {
            blocks.push(json!({"type": "section", "text": {"type": "mrkdwn", "text": text, "verbatim": true}}));
        }
    };
    let warnings: Vec<_> = message.warnings(zone).iter().map(|warning| format!("*{}*", escape(warning))).collect();
    section(warnings.join("\n"));
    let facts = message.facts(zone);
    let facts = facts.iter().map(|(name, value)| match *name {
        "Query" => format!("*Query*\n{}", code(std::slice::from_ref(value))),
        name => format!("*{name}*  {}", escape(value)),
    });
    section(cut(&facts.collect::<Vec<_>>(), "\n"));
    let tables = message.table_lines(15);
    if !tables.is_empty() {
        section(format!("*Tables, rows before -> after*\n{}", code(&tables)));
    }
    for command in &message.commands {
        section(format!("{}:\n{}", escape(&command.purpose), code(std::slice::from_ref(&command.command))));
    }
    blocks.push(json!({
        "type": "context",
        "elements": [{"type": "mrkdwn", "text": escape(&message.footer()), "verbatim": true}],
    }));
    json!({"text": escape(&headline), "blocks": blocks, "unfurl_links": false, "unfurl_media": false})
}

fn escape(text: &str) -> String {
    // A mention would wake people, and a backtick would draw what follows into a block of code; a `*` or `_` changes no
    // more than how it looks.
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('`', "'")
}

/// Lines in a fixed-width font.
fn code(lines: &[String]) -> String {
    let lines: Vec<_> = lines.iter().map(|line| escape(line)).collect();
    format!("```{}```", cut(&lines, "\n"))
}

/// Whole parts, as many as fit.
fn cut(parts: &[String], between: &str) -> String {
    let mut text = String::new();
    for part in parts {
        if text.chars().count() + between.len() + part.chars().count() > SECTION_CHARS_MAX - 200 {
            text.push_str(between);
            text.push_str("...");
            break;
        }
        if !text.is_empty() {
            text.push_str(between);
        }
        text.push_str(part);
    }
    text
}
