//! `walguard guard`: SQL that tells, in the WAL, who deletes, empties and drops.

use std::fmt::Write as _;

use anyhow::Context as _;
use walguard::capture;
use walguard::guard::install::{self, Report};
use walguard::guard::script;

use crate::Outcome;
use crate::args::{GuardArgs, GuardChoice, GuardVerb};
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(context: Context, args: GuardArgs) -> anyhow::Result<Outcome> {
    match args.verb {
        GuardVerb::Sql(args) => {
            let config = config(&context, &args.choice)?;
            let text = if args.uninstall { script::Config::uninstall() } else { config.install() };
            render::print(&text)?;
            Ok(Outcome::Done)
        }
        GuardVerb::Install(args) => {
            let config = config(&context, &args.choice)?;
            let client = connect(&context, args.database.as_deref()).await?;
            install::install(&client, &config).await.context("install the guard")?;
            tell(&context, &install::inspect(&client, &config).await.context("look at the guard")?)
        }
        GuardVerb::Uninstall(args) => {
            let client = connect(&context, args.database.as_deref()).await?;
            install::uninstall(&client).await.context("take the guard out")?;
            if context.json {
                render::print_json(&serde_json::json!({ "installed": false }))?;
            } else {
                render::print("the guard is gone from this database")?;
            }
            Ok(Outcome::Done)
        }
        GuardVerb::Status(args) => {
            let config = config(&context, &args.choice)?;
            let client = connect(&context, args.database.as_deref()).await?;
            tell(&context, &install::inspect(&client, &config).await.context("look at the guard")?)
        }
    }
}

/// The settings, with the flags laid over them.
fn config(context: &Context, choice: &GuardChoice) -> anyhow::Result<script::Config> {
    let mut config = context.settings.guard.clone();
    if !choice.tables.is_empty() {
        config.tables.clone_from(&choice.tables);
    }
    if !choice.exclude.is_empty() {
        config.exclude.clone_from(&choice.exclude);
    }
    config.updates |= choice.updates;
    config.protect |= choice.protect;
    config.definitions &= !choice.no_definitions;
    config.row_counts &= !choice.no_row_counts;
    config.check().map_err(UsageError::new)?;
    Ok(config)
}

async fn connect(context: &Context, database: Option<&str>) -> anyhow::Result<tokio_postgres::Client> {
    let info = context.conninfo()?;
    let info = match database {
        Some(name) => info.with_dbname(name),
        None => info,
    };
    capture::connect_sql(&info).await.context("connect to the server")
}

fn tell(context: &Context, report: &Report) -> anyhow::Result<Outcome> {
    if context.json {
        render::print_json(report)?;
    } else {
        render::print(&text(report))?;
    }
    Ok(if report.is_whole() { Outcome::Done } else { Outcome::Attention })
}

fn text(report: &Report) -> String {
    let mut text = format!("database        {}\n", report.database);
    if !report.installed {
        text += "guard           is not installed; see: walguard guard sql\n";
        return text;
    }
    let counts = [
        ("triggers", report.triggers_ok, report.triggers),
        ("event triggers", report.event_triggers_ok, report.event_triggers),
    ];
    for (what, there, wanted) in counts {
        let count = format!("{there} of {wanted} are there");
        let count = if there == wanted { render::green(&count) } else { render::red(&count) };
        let _ = writeln!(text, "{what:14}  {count}");
    }
    for problem in &report.problems {
        let _ = writeln!(text, "{}  {} {} {}", render::red("wrong"), problem.kind, problem.name, problem.problem);
    }
    let more = report.problems_total.saturating_sub(report.problems.len() as u64);
    if more > 0 {
        let _ = writeln!(text, "and {more} more");
    }
    if !report.is_whole() {
        text += "HINT: walguard guard install puts it right\n";
    }
    text
}
