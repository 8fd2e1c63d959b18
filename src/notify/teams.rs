//! Microsoft Teams: an Adaptive Card for a workflow that starts "when a Teams webhook request is received".
//!
//! A message may have about 28 KB (learn.microsoft.com, Teams connector: known issues); people measured 21 KB. Data stands
//! in text runs, which are shown as they are: a `TextBlock` would read it as Markdown.

use serde_json::{Value, json};

use super::message::{Event, Message, Setting, Severity};

/// Bytes of the whole request.
const BYTES_MAX: usize = 20_000;

pub(super) fn body(message: &Message, setting: &Setting) -> Value {
    // Fewer tables until it fits: twenty of the longest names do not.
    for tables in [20, 10, 5, 0] {
        let body = card(message, setting, tables);
        if body.to_string().len() <= BYTES_MAX {
            return body;
        }
    }
    let short = json!([line(&message.headline(), &[("weight", "bolder")]), line(&message.footer(), &[])]);
    envelope(short)
}

fn card(message: &Message, setting: &Setting, tables: usize) -> Value {
    let zone = &setting.zone;
    let mut items = vec![json!({
        "type": "Container",
        "style": style(message),
        "bleed": true,
        "items": [line(&message.headline(), &[("weight", "bolder"), ("size", "large")])],
    })];
    for warning in message.warnings(zone) {
        items.push(line(&warning, &[("weight", "bolder"), ("color", "attention")]));
    }
    for (name, value) in message.facts(zone) {
        let mut inlines = vec![run(&format!("{name}  "), &[("weight", "bolder")])];
        let font: &[(&str, &str)] = if name == "Query" { &[("fontType", "monospace")] } else { &[] };
        inlines.push(run(&value, font));
        items.push(json!({"type": "RichTextBlock", "inlines": inlines}));
    }
    let lines = if tables > 0 { message.table_lines(tables) } else { Vec::new() };
    if !lines.is_empty() {
        items.push(line("Tables, rows before -> after", &[("weight", "bolder")]));
        items.push(line(&lines.join("\n"), &[("fontType", "monospace")]));
    }
    for command in &message.commands {
        items.push(line(&format!("{}:", command.purpose), &[("weight", "bolder")]));
        items.push(line(&command.command, &[("fontType", "monospace")]));
    }
    items.push(line(&message.footer(), &[("size", "small")]));
    envelope(Value::Array(items))
}

fn envelope(items: Value) -> Value {
    json!({
        "type": "message",
        "attachments": [{
            "contentType": "application/vnd.microsoft.card.adaptive",
            "contentUrl": null,
            "content": {
                "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
                "type": "AdaptiveCard",
                "version": "1.4",
                "msteams": {"width": "Full"},
                "body": items,
            },
        }],
    })
}

fn run(text: &str, style: &[(&str, &str)]) -> Value {
    let mut run = json!({"type": "TextRun", "text": text});
    for (key, value) in style {
        run[*key] = Value::from(*value);
    }
    run
}

fn line(text: &str, style: &[(&str, &str)]) -> Value {
    json!({"type": "RichTextBlock", "inlines": [run(text, style)]})
}

fn style(message: &Message) -> &'static str {
    match (message.test, message.event, message.severity) {
        (true, ..) => "emphasis",
        (_, Event::Resolved | Event::Aborted, _) => "good",
        (_, _, Severity::Critical) => "attention",
        (_, _, Severity::Warning) => "warning",
        (_, _, Severity::Info) => "emphasis",
    }
}
