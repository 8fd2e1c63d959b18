//! `walguard notify test` and `walguard notify list`.

use std::time::Duration;

use comfy_table::Cell;
use jiff::Timestamp;
use serde::Serialize;
use walguard::notify::{Channel, Config, Event, Message, SendError, Setting};

use crate::Outcome;
use crate::args::{NotifyArgs, NotifyTestArgs, NotifyVerb};
use crate::context::Context;
use crate::render;
use crate::report::{FAILED, TRY_AGAIN, UsageError};

pub(crate) async fn run(context: Context, args: NotifyArgs) -> anyhow::Result<Outcome> {
    match args.verb {
        NotifyVerb::Test(args) => test(&context, args).await,
        NotifyVerb::List(_) => list(&context),
    }
}

/// What came of trying a channel.
#[derive(Debug, Serialize)]
struct Tried<'a> {
    channel: &'a str,
    kind: &'static str,
    ok: bool,
    seconds: f64,
    error: Option<String>,
    hint: Option<String>,
    #[serde(skip)]
    is_transient: bool,
}

async fn test(context: &Context, args: NotifyTestArgs) -> anyhow::Result<Outcome> {
    let chosen = chosen(context, args.channel.as_deref())?;
    let setting = Setting {
        // What it is called in the message; a channel can be tried before there is a cluster.
        cluster: context.cluster().unwrap_or("unnamed").to_owned(),
        reach: context.reach(),
        zone: context.zone.clone(),
    };
    let mut tried = Vec::new();
    for (name, config) in chosen {
        let begin = std::time::Instant::now();
        let result = match Channel::open(name, config) {
            Ok(channel) => {
                let now = Timestamp::now();
                let message = Message::test(name, now, fastrand::u64(..), &setting);
                channel.send(&message, &setting, now).await
            }
            Err(error) => Err(SendError::Refused { problem: error.problem, hint: error.hint }),
        };
        let error = result.err();
        let row = Tried {
            channel: name,
            kind: config.kind.name(),
            ok: error.is_none(),
            seconds: begin.elapsed().as_secs_f64(),
            hint: error.as_ref().and_then(SendError::hint),
            is_transient: error.as_ref().is_some_and(SendError::is_transient),
            error: error.map(|error| error.to_string()),
        };
        if !context.json {
            render::print(&line(&row))?;
        }
        tried.push(row);
    }
    if context.json {
        render::print_json(&tried)?;
    }
    let failed: Vec<_> = tried.iter().filter(|row| !row.ok).collect();
    Ok(match failed.as_slice() {
        [] => Outcome::Done,
        failed if failed.iter().all(|row| row.is_transient) => Outcome::Failed(TRY_AGAIN),
        _ => Outcome::Failed(FAILED),
    })
}

fn line(row: &Tried<'_>) -> String {
    let took = render::duration(Duration::try_from_secs_f64(row.seconds).unwrap_or_default());
    match &row.error {
        None => format!("{}  {} ({}) took the test message in {took}", render::green("ok"), row.channel, row.kind),
        Some(error) => {
            let hint = row.hint.as_ref().map(|hint| format!("\n        HINT: {hint}")).unwrap_or_default();
            format!("{}  {} ({}): {error}{hint}", render::red("FAILED"), row.channel, row.kind)
        }
    }
}

fn chosen<'a>(context: &'a Context, name: Option<&str>) -> anyhow::Result<Vec<(&'a String, &'a Config)>> {
    let channels = &context.settings.notify;
    if channels.is_empty() {
        let hint =
            "add a table [notify.NAME] to the settings file; `walguard init --print-settings` shows one of each kind";
        return Err(UsageError::with_hint("no channel is set: nobody is told of incidents", hint).into());
    }
    let chosen: Vec<_> = channels.iter().filter(|(known, _)| name.is_none_or(|name| name == *known)).collect();
    if chosen.is_empty() {
        let known: Vec<_> = channels.keys().map(String::as_str).collect();
        let problem = format!("there is no channel {}", name.unwrap_or_default());
        return Err(UsageError::with_hint(problem, format!("the settings have: {}", known.join(", "))).into());
    }
    Ok(chosen)
}

/// A channel as `list` shows it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    channel: &'a str,
    kind: &'static str,
    severity_min: &'static str,
    after_seconds: u64,
    events: Vec<&'static str>,
    /// Why it could not be used now.
    problem: Option<String>,
}

fn list(context: &Context) -> anyhow::Result<Outcome> {
    let rows: Vec<_> = chosen(context, None)?
        .into_iter()
        .map(|(name, config)| Row {
            channel: name,
            kind: config.kind.name(),
            severity_min: config.severity_min.as_str(),
            after_seconds: config.after.as_secs(),
            events: config.events.iter().map(|event| event.name()).collect(),
            problem: Channel::open(name, config).err().map(|error| error.problem),
        })
        .collect();
    if context.json {
        render::print_json(&rows)?;
    } else {
        let mut table = render::table(["channel", "kind", "from", "when", "events", "problem"]);
        for row in &rows {
            let when = match row.after_seconds {
                0 => "at once".to_owned(),
                after => format!("after {}, unless acknowledged", render::duration(Duration::from_secs(after))),
            };
            let events = if row.events.len() == Event::all().len() { "all".to_owned() } else { row.events.join(", ") };
            let problem = row.problem.as_deref().map(render::red).unwrap_or_default();
            table.add_row([row.channel, row.kind, row.severity_min, &when, &events, &problem].map(Cell::new));
        }
        render::print(&render::table_text(&table))?;
    }
    Ok(if rows.iter().all(|row| row.problem.is_none()) { Outcome::Done } else { Outcome::Attention })
}
