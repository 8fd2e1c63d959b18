//! `walguard restore`.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use walguard::pg::{PgTime, Xid};
use walguard::restore::loss::{self, Loss, TableRows};
use walguard::restore::plan::{self, Request, RestorePlan, Transaction};
use walguard::restore::recovery::FetchCommand;
use walguard::restore::run::{self as execute, Options, RestoreReport, Start};
use walguard::restore::{Listen, Target};
use walguard::settings::Settings;

use crate::Outcome;
use crate::args::{Action, RestoreArgs};
use crate::choose;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(context: Context, args: RestoreArgs) -> anyhow::Result<Outcome> {
    let named = named_target(&context, &args)?;
    let options = options(&args)?;
    if !args.dry_run {
        execute::refuse_root()?; // before minutes are spent on a plan
    }
    let fetch = fetch_command(&context)?;
    let repo = context.repository().await?;
    let target = match named {
        Some(target) => target,
        None if context.json => return Err(no_target()),
        None => choose::target(&context, &repo).await?.ok_or_else(no_target)?,
    };
    let request = request(&args, target)?;
    let cancel = context.cancel_on_signals()?;
    let progress = context.progress();
    let began = Instant::now();
    if !context.json {
        eprint_target(&request.target, &context.zone);
    }
    let plan = plan::plan(&repo, &request, &*progress, &cancel).await.context("plan the restore")?;
    let planned = began.elapsed();
    // It is there to be looked at before somebody says yes.
    let loss = match args.dry_run || !args.yes {
        true => Some(loss::loss(&repo, &plan, &*progress, &cancel).await.context("count what would be lost")?),
        false => None,
    };
    if args.dry_run {
        match context.json {
            true => render::print_json(&Told { plan: &plan, loss: loss.as_ref(), restore: None })?,
            false => render::print(&plan_text(&plan, loss.as_ref(), &args, &context.zone))?,
        }
        return Ok(Outcome::Done);
    }
    let prepared = execute::prepare(&repo, &plan, &options).await?;
    if !context.json {
        render::print(&plan_text(&plan, loss.as_ref(), &args, &context.zone))?;
    }
    if !args.yes && !confirmed(&context, &args)? {
        return Ok(Outcome::Failed(crate::report::FAILED));
    }
    let report = execute::run(&repo, &plan, &prepared, &options, &fetch, &*progress, &cancel).await;
    let report = report.with_context(|| format!("restore into {}", options.target_dir.display()))?;
    match context.json {
        true => render::print_json(&Told { plan: &plan, loss: loss.as_ref(), restore: Some(&report) })?,
        false => render::print(&report_text(&plan, &report, &args, planned, &context.zone))?,
    }
    Ok(Outcome::Done)
}

/// Everything that happened, for programs.
#[derive(Debug, Serialize)]
struct Told<'a> {
    plan: &'a RestorePlan,
    /// What everything behind the moment changed; `null` if --yes left nobody to look at it.
    loss: Option<&'a Loss>,
    /// `null` for a dry run.
    restore: Option<&'a RestoreReport>,
}

/// The target that the arguments name.
fn named_target(context: &Context, args: &RestoreArgs) -> anyhow::Result<Option<Target>> {
    Ok(match (&args.to, args.to_xid, &args.to_name) {
        (Some(text), _, _) => Some(Target::parse(text, Timestamp::now(), &context.zone)?),
        (None, Some(xid), _) => {
            Some(Target::Xid(Xid::new(xid).ok_or_else(|| UsageError::new("transaction ids begin with 1"))?))
        }
        (None, None, Some(name)) => Some(Target::name(name)?),
        (None, None, None) => None,
    })
}

fn no_target() -> anyhow::Error {
    UsageError::with_hint("no target is named", "name it with --to, or choose it on a terminal").into()
}

fn request(args: &RestoreArgs, target: Target) -> anyhow::Result<Request> {
    if args.exclusive && !matches!(target, Target::Xid(_) | Target::Time(_)) {
        let hint = "everything before an LSN is what --to LSN means by itself";
        return Err(UsageError::with_hint("--exclusive needs a transaction or a time", hint).into());
    }
    Ok(Request {
        target,
        exclusive: args.exclusive,
        timeline: args.timeline,
        backup: args.backup.clone(),
        verify: args.verify,
    })
}

fn options(args: &RestoreArgs) -> anyhow::Result<Options> {
    let tablespaces = args.tablespace.iter().map(|text| {
        let (old, new) =
            text.split_once('=').filter(|(old, new)| !old.is_empty() && !new.is_empty()).ok_or_else(|| {
                UsageError::with_hint(format!("`{text}` places no tablespace"), "write it as --tablespace OLD=NEW")
            })?;
        Ok((old.to_owned(), absolute(new.as_ref())?))
    });
    let start = Start {
        binaries: args.pg_bin_dir.clone(),
        path: std::env::var_os("PATH"),
        listen: Listen { port: args.port, socket_dir: args.socket_dir.as_deref().map(absolute).transpose()? },
        action: match args.action {
            Action::Pause => execute::Action::Pause,
            Action::Promote => execute::Action::Promote,
            Action::Shutdown => execute::Action::Shutdown,
        },
    };
    Ok(Options {
        target_dir: absolute(&args.target_dir)?,
        tablespaces: tablespaces.collect::<anyhow::Result<_>>()?,
        overwrite: args.overwrite,
        start: (!args.no_start).then_some(start),
    })
}

fn absolute(path: &std::path::Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find the whole path of {}", path.display()))
}

/// How the restored server calls us: this program, and settings that name the repository and nothing else. Secrets stay
/// in the files that the settings name, or in the environment that the server inherits.
fn fetch_command(context: &Context) -> anyhow::Result<FetchCommand> {
    let mut repository = context.settings.repository.clone();
    // The server works in its data directory.
    for file in [
        &mut repository.s3.access_key_id_file,
        &mut repository.s3.secret_access_key_file,
        &mut repository.s3.session_token_file,
    ]
    .into_iter()
    .flatten()
    {
        *file = absolute(file)?;
    }
    let all = Settings { cluster: context.cluster()?.to_owned(), repository, ..Settings::default() };
    let mut table = toml::Table::try_from(&all).context("write the settings of wal-fetch")?;
    table.retain(|name, _| ["cluster", "repository"].contains(&name));
    Ok(FetchCommand {
        program: std::env::current_exe().context("find this program")?,
        settings: format!("# How `walguard wal-fetch` finds the WAL of this restored server.\n{table}"),
    })
}

fn confirmed(context: &Context, args: &RestoreArgs) -> anyhow::Result<bool> {
    let question = match args.overwrite {
        true => format!("Replace what is in {} by this?", args.target_dir.display()),
        false => "Restore this?".to_owned(),
    };
    let answer = if context.json { None } else { render::ask(&question)? };
    answer.ok_or_else(|| {
        let hint = "give --yes, or look at the plan first with --dry-run";
        UsageError::with_hint("nobody is there to confirm the plan", hint).into()
    })
}

/// What the target was understood to be, before anything is done about it.
fn eprint_target(target: &Target, zone: &TimeZone) {
    if let Target::Time(at) = target {
        tracing::info!("target: {}", render::time(at.timestamp(), zone));
    }
}

fn when(time: PgTime, zone: &TimeZone) -> String {
    render::time(time.timestamp(), zone)
}

fn target_text(target: &Target, zone: &TimeZone) -> String {
    match target {
        Target::Time(at) => when(*at, zone),
        other => other.describe(zone),
    }
}

fn transaction_text(transaction: Option<&Transaction>, none: &str, zone: &TimeZone) -> String {
    transaction.map_or_else(
        || none.to_owned(),
        |t| {
            let xid = t.xid.map_or_else(|| "?".to_owned(), |xid| xid.to_string());
            format!("{}  transaction {xid}, LSN {}", when(t.time, zone), t.lsn)
        },
    )
}

fn plan_text(plan: &RestorePlan, loss: Option<&Loss>, args: &RestoreArgs, zone: &TimeZone) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<14}{value}"); // a String takes everything
    };
    line("cluster", format!("{}, PostgreSQL {}", plan.cluster, plan.backup.server_version));
    line("target", target_text(&plan.target, zone));
    if let Some(incident) = &plan.incident {
        let began = when(incident.began_at.into(), zone);
        let title: String = incident.title.chars().filter(|c| !c.is_control()).collect();
        line("incident", format!("{began}: {title}"));
    }
    let backup = &plan.backup;
    line(
        "backup",
        format!("{}, ended {}, {}", backup.label, when(backup.stop_time, zone), render::bytes(backup.content_bytes)),
    );
    if backup.bad_pages > 0 {
        line("", format!("WARNING: {} pages of it failed their checksum", backup.bad_pages));
    }
    for passed in &plan.passed_over {
        line("", format!("not {}: {}", passed.label, passed.reason));
    }
    if let Some(next) = plan.alternatives.first() {
        let takes =
            |seconds: f64| render::duration(Duration::try_from_secs_f64(seconds.ceil()).unwrap_or(Duration::MAX));
        let (here, there) = (takes(plan.estimated_seconds), takes(next.estimated_seconds));
        let wal = render::bytes(next.wal_bytes);
        let weighed = format!("the nearest start: {here}; with {} and {wal} of WAL about {there}", next.label);
        line("", weighed);
    }
    let legs: Vec<_> = plan.path.iter().map(|leg| format!("{} to {}", leg.timeline, leg.to)).collect();
    line("timelines", legs.join(", then "));
    line(
        "WAL",
        format!(
            "{} in {} segments, from {} to {}",
            render::bytes(plan.wal_bytes),
            plan.wal_segments,
            backup.start,
            plan.stop.read_to
        ),
    );
    line(
        "looked at",
        match plan.wal_segments.saturating_sub(plan.segments_read) {
            0 => "all of that WAL".to_owned(),
            _ => format!("{} segments; the index tells of the others (--verify reads all)", plan.segments_read),
        },
    );
    line("to fetch", format!("about {}", render::bytes(plan.fetched_bytes)));
    let estimated = Duration::try_from_secs_f64(plan.estimated_seconds.ceil()).unwrap_or(Duration::MAX);
    line("takes", format!("about {}, longer from a slow store or onto a slow disk", render::duration(estimated)));
    line("last kept", transaction_text(plan.kept.as_ref(), "none since the backup began", zone));
    for rows in loss.and_then(|loss| loss.kept.as_deref()).unwrap_or_default().iter().take(TABLES_SHOWN) {
        line("", rows_text(rows));
    }
    line("first lost", transaction_text(plan.lost.as_ref(), "none that is archived", zone));
    for rows in loss.and_then(|loss| loss.lost.as_deref()).unwrap_or_default().iter().take(TABLES_SHOWN) {
        line("", rows_text(rows));
    }
    if let Some(loss) = loss {
        for (name, value) in loss_lines(loss, zone) {
            line(name, value);
        }
    }
    line("into", args.target_dir.display().to_string());
    let then = match (args.no_start, args.action) {
        (true, _) => "nothing is started",
        (false, Action::Pause) => "the server waits there, readable",
        (false, Action::Promote) => "the server becomes a writable primary",
        (false, Action::Shutdown) => "the server is stopped",
    };
    line("then", then.to_owned());
    format!("Restore plan\n{text}")
}

/// Tables of which a plan tells the rows; the JSON has all.
const TABLES_SHOWN: usize = 12;

fn rows_text(rows: &TableRows) -> String {
    let TableRows { table, inserted, updated, deleted, moved } = rows;
    let counts = [(inserted, "inserted"), (updated, "updated"), (deleted, "deleted"), (moved, "moved")];
    let counts = counts.into_iter().filter(|(count, _)| **count > 0).map(|(count, what)| format!("{count} {what}"));
    // A name may hold anything.
    let table: String = table.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
    format!("  {table}: {}", counts.collect::<Vec<_>>().join(", "))
}

/// What everything behind the moment changed.
fn loss_lines(loss: &Loss, zone: &TimeZone) -> Vec<(&'static str, String)> {
    let at_least = if loss.is_complete { "" } else { "at least " };
    let mut lines = vec![match (loss.transactions, loss.to) {
        (0, _) => ("lost in all", format!("{at_least}no transaction")),
        (count, Some(to)) => ("lost in all", format!("{at_least}{count} transactions, the last at {}", when(to, zone))),
        (count, None) => ("lost in all", format!("{at_least}{count} transactions")),
    }];
    lines.extend(loss.tables.iter().take(TABLES_SHOWN).map(|rows| ("", rows_text(rows))));
    if let Some(more) = loss.tables.len().checked_sub(TABLES_SHOWN).filter(|more| *more > 0) {
        lines.push(("", format!("  and {more} more tables")));
    }
    lines.extend(loss.notes.iter().map(|note| ("", format!("  ({note})"))));
    lines
}

fn report_text(
    plan: &RestorePlan,
    report: &RestoreReport,
    args: &RestoreArgs,
    planned: Duration,
    zone: &TimeZone,
) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<14}{value}");
    };
    let timings = &report.timings;
    let mut took = vec![format!("plan {}", render::duration(planned))];
    took.push(format!("extract {}", render::duration(timings.extract)));
    let Some(reached) = &report.reached else {
        line("directory", report.target_dir.display().to_string());
        line("took", took.join(", "));
        line("next", format!("start the server on it: it recovers to {} and waits there", plan.stop.reached));
        return format!("Prepared\n{text}");
    };
    line("last kept", transaction_text(reached.transaction.as_ref(), "none since the backup began", zone));
    line("stands at", format!("LSN {}, as planned", reached.lsn));
    if let Some(timeline) = reached.timeline {
        line("timeline", format!("{timeline}, new"));
    }
    took.push(format!("replay {}", render::duration(timings.replay)));
    if args.action != Action::Pause {
        took.push(format!(
            "{} {}",
            if args.action == Action::Promote { "promote" } else { "stop" },
            render::duration(timings.finish)
        ));
    }
    line("took", took.join(", "));
    match &report.running {
        Some(running) => {
            line("server", format!("process {}, log {}", running.pid, running.log.display()));
            line("connect", format!("psql -h {} -p {}", running.socket_dir.display(), running.port));
            if args.action == Action::Pause {
                line("to go on", format!("pg_ctl promote -D {}", report.target_dir.display()));
            }
        }
        None => line("server", format!("stopped; its data directory is {}", report.target_dir.display())),
    }
    if args.action == Action::Promote {
        line("archiving", "off: take walguard's block out of postgresql.auto.conf to turn it on".to_owned());
    }
    format!("Restored\n{text}")
}
