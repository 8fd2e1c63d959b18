//! `walguard silence`.

use jiff::Timestamp;
use walguard::detect::silence::Silence;
use walguard::detect::{RuleName, pattern::Pattern};

use crate::Outcome;
use crate::args::SilenceArgs;
use crate::context::Context;
use crate::incidents::signer;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(context: Context, args: SilenceArgs) -> anyhow::Result<Outcome> {
    let repository = context.initialized_repository().await?;
    let now = Timestamp::now();
    if let Some(id) = &args.lift {
        if !repository.lift_silence(id, now, &signer(args.by)).await? {
            let hint = "`walguard silence --list` shows those that there are";
            return Err(UsageError::with_hint(format!("there is no silence {id}"), hint).into());
        }
        if context.json {
            render::print_json(&serde_json::json!({ "lifted": id, "at": now }))?;
        } else {
            render::print(&format!("silence {id} is lifted"))?;
        }
        return Ok(Outcome::Done);
    }
    let Some(span) = args.span else {
        let mut silences = repository.silences().await?;
        silences.retain(|silence| now < silence.until && silence.lifted_at.is_none());
        if context.json {
            render::print_json(&silences)?;
        } else {
            render::print(&listed(&silences, &context))?;
        }
        return Ok(Outcome::Done);
    };
    let reason = args.reason.unwrap_or_default();
    if reason.trim().is_empty() {
        return Err(UsageError::with_hint("a silence needs a reason", "give it with --reason 'why'").into());
    }
    let parsed = |error: &dyn std::fmt::Display| UsageError::new(error.to_string());
    let rules = args.rule.iter().map(|rule| rule.parse::<RuleName>().map_err(|error| parsed(&error)));
    let tables = args.table.iter().map(|table| table.parse::<Pattern>().map_err(|error| parsed(&error)));
    let until = now.checked_add(span).map_err(|_| UsageError::new("the silence would never end"))?;
    let silence = Silence {
        id: format!("{}-{:04x}", now.strftime("%Y%m%dT%H%M%SZ"), fastrand::u16(..)),
        from: now,
        until,
        reason,
        by: signer(args.by),
        rules: rules.collect::<Result<_, _>>()?,
        tables: tables.collect::<Result<_, _>>()?,
        roles: args.role,
        applications: args.application,
        lifted_at: None,
    };
    repository.put_silence(&silence).await?;
    if context.json {
        render::print_json(&silence)?;
    } else {
        let until = render::time(render::whole_seconds(until), &context.zone);
        render::print(&format!(
            "silence {} holds until {until}: {}\na wiped database is told all the same; end it with: walguard silence --lift {}",
            silence.id,
            about(&silence),
            silence.id
        ))?;
    }
    Ok(Outcome::Done)
}

/// What a silence is about.
fn about(silence: &Silence) -> String {
    let rules: Vec<_> = silence.rules.iter().map(|rule| rule.as_str().to_owned()).collect();
    let tables: Vec<_> = silence.tables.iter().map(Pattern::to_string).collect();
    let parts =
        [("rules", &rules), ("tables", &tables), ("roles", &silence.roles), ("applications", &silence.applications)];
    let parts = parts.iter().filter(|(_, names)| !names.is_empty());
    let told: Vec<_> = parts.map(|(what, names)| format!("{what} {}", names.join(", "))).collect();
    if told.is_empty() { "everything".to_owned() } else { render::printable(&told.join("; ")) }
}

fn listed(silences: &[Silence], context: &Context) -> String {
    if silences.is_empty() {
        return "no silence holds".to_owned();
    }
    let mut table = render::table(["silence", "until", "by", "about", "reason"]);
    for silence in silences {
        table.add_row([
            silence.id.clone(),
            render::time(render::whole_seconds(silence.until), &context.zone),
            render::printable(&silence.by),
            about(silence),
            render::printable(&silence.reason),
        ]);
    }
    render::table_text(&table)
}
