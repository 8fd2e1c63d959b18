//! `walguard restore`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use walguard::pg::{PgTime, Xid};
use walguard::progress::Progress;
use walguard::restore::handover::{self, HandedOver};
use walguard::restore::loss::{self, Loss, TableRows};
use walguard::restore::plan::{self, Request, RestorePlan, Transaction};
use walguard::restore::proof::{self, Point, Reach, Verdict, Wanted};
use walguard::restore::recovery::FetchCommand;
use walguard::restore::run::{self as execute, Options, RestoreReport, Running, Start};
use walguard::restore::{Listen, RestoreError, Target};
use walguard::settings::Source;

use crate::Outcome;
use crate::args::{Action, RestoreArgs};
use crate::choose;
use crate::context::Context;
use crate::drill::points_text;
use crate::rebuild;
use crate::render;
use crate::report::UsageError;

/// How long the commit with which an incident began is waited for, where it is not archived yet.
const ARCHIVE_PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn run(context: Context, args: RestoreArgs) -> anyhow::Result<Outcome> {
    let named = named_target(&context, &args)?;
    if args.into.is_some() || context.settings.source == Source::Logical {
        return Box::pin(rebuild::run(context, &args, named.ok_or_else(no_target)?)).await;
    }
    if args.partial || !args.only.is_empty() || args.database.is_some() {
        let hint = "with the server's WAL a restore brings back the whole cluster; copy tables out of it then";
        return Err(UsageError::with_hint("--partial, --only and --database need `source = \"logical\"`", hint).into());
    }
    let options = options(&args)?;
    if !args.dry_run {
        execute::refuse_root()?; // before minutes are spent on a plan
        if let Some(old) = &args.swap {
            handover::check_before(&options.target_dir, old)?;
        }
    }
    let fetch = fetch_command(&context)?;
    let repo = context.initialized_repository().await?;
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
    let plan = loop {
        match plan::plan(&repo, &request, &*progress, &cancel).await {
            // An alarm is there within a moment of the commit, and somebody may be as fast; the archive is a second behind.
            Err(error @ RestoreError::Unreachable { not_yet: true, .. })
                if matches!(request.target, Target::Before(_)) && began.elapsed() < ARCHIVE_PATIENCE =>
            {
                tracing::info!("waits for the archive: {error}");
                let pause = tokio::time::sleep(Duration::from_millis(500));
                cancel.run_until_cancelled(pause).await.ok_or(RestoreError::Cancelled)?;
            }
            plan => break plan.context("plan the restore")?,
        }
    };
    let planned = began.elapsed();
    // It is there to be looked at before somebody says yes.
    let loss = match args.dry_run || !args.yes {
        true => Some(loss::loss(&repo, &plan, &*progress, &cancel).await.context("count what would be lost")?),
        false => None,
    };
    if args.dry_run {
        match context.json {
            true => render::print_json(&Told {
                plan: &plan,
                loss: loss.as_ref(),
                restore: None,
                proof: None,
                handover: None,
            })?,
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
    let proof = Box::pin(proof_of(&plan, &report, args.amcheck, &*progress, &cancel)).await;
    if !context.json {
        let text = report_text(&plan, &report, &args, planned, &context.zone);
        render::print(&format!("{text}Proof\n{}", points_text(&proof)))?;
    }
    let is_wrong = proof.iter().any(|point| point.verdict == Verdict::Failed);
    let handed = match (&args.swap, &options.start) {
        (Some(_), Some(_)) if is_wrong => {
            tracing::warn!("what was restored is not handed over, because it is not proved");
            None
        }
        (Some(old), Some(start)) => {
            let handed = handover::hand_over(&options.target_dir, Some(old), start, &*progress, &cancel).await;
            Some(handed.with_context(|| format!("put {} in its place", options.target_dir.display()))?)
        }
        _ => None,
    };
    match (&handed, context.json) {
        (handed, true) => {
            let (restore, proof, handover) = (Some(&report), Some(proof.as_slice()), handed.as_ref());
            render::print_json(&Told { plan: &plan, loss: loss.as_ref(), restore, proof, handover })?;
        }
        (Some(handed), false) => render::print(&crate::handover::text(handed))?,
        (None, false) => {}
    }
    Ok(if is_wrong { Outcome::Attention } else { Outcome::Done })
}

/// What is proved of a restore. That the server cannot be asked leaves it where it is.
async fn proof_of(
    plan: &RestorePlan,
    report: &RestoreReport,
    amcheck: bool,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Vec<Point> {
    let mut points = proof::of_restore(plan, report);
    let is_asked = amcheck || plan.incident.is_some();
    let not = |problem: String| {
        let hint = "the restored server runs all the same: ask it yourself before the application does";
        Point::new("questions to the server", Verdict::Unproved, problem).with_hint(hint)
    };
    match &report.running {
        Some(running) if is_asked => {
            let Running { socket_dir, port, role, .. } = running.clone();
            let wanted = Wanted { amcheck, checks: &[] };
            let (reach, incident) = (Reach { socket_dir, port, role }, plan.incident.as_deref());
            match proof::of_server(&reach, incident, wanted, progress, cancel).await {
                Ok(found) => points.extend(found),
                Err(error) => points.push(not(error.to_string())),
            }
        }
        None if is_asked => points.push(Point::new("questions to the server", Verdict::Unproved, "it does not run")),
        _ => {}
    }
    points
}

/// The directory, which is named unless the database is.
fn target_dir(args: &RestoreArgs) -> &Path {
    args.target_dir.as_deref().unwrap_or(Path::new("."))
}

/// Everything that happened, for programs.
#[derive(Debug, Serialize)]
struct Told<'a> {
    plan: &'a RestorePlan,
    /// What everything behind the moment changed; `null` if --yes left nobody to look at it.
    loss: Option<&'a Loss>,
    /// `null` for a dry run.
    restore: Option<&'a RestoreReport>,
    /// What was proved of it; `null` for a dry run.
    proof: Option<&'a [Point]>,
    /// `null` without --swap.
    handover: Option<&'a HandedOver>,
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
            _ if args.swap.is_some() => execute::Action::Promote,
            Action::Pause => execute::Action::Pause,
            Action::Promote => execute::Action::Promote,
            Action::Shutdown => execute::Action::Shutdown,
        },
    };
    Ok(Options {
        target_dir: absolute(target_dir(args))?,
        tablespaces: tablespaces.collect::<anyhow::Result<_>>()?,
        overwrite: args.overwrite,
        delta: args.delta,
        wal_ahead: args.wal_ahead.map(|size| size.as_u64()),
        start: (!args.no_start && !args.bare).then_some(start),
        bare: args.bare,
    })
}

fn absolute(path: &std::path::Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("find the whole path of {}", path.display()))
}

/// How the restored server calls us.
pub(crate) fn fetch_command(context: &Context) -> anyhow::Result<FetchCommand> {
    let program = std::env::current_exe().context("find this program")?;
    let fetch = FetchCommand::new(program, &context.settings.repository, context.cluster()?);
    fetch.context("write the settings of wal-fetch")
}

fn confirmed(context: &Context, args: &RestoreArgs) -> anyhow::Result<bool> {
    let question = match args.overwrite || args.delta {
        true => format!("Replace what is in {} by this?", target_dir(args).display()),
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
    let by = match plan.rates.measured {
        0 => "a guess for an idle machine: no restore of this repository was measured yet".to_owned(),
        1 => "as fast as the last restore".to_owned(),
        count => format!("as fast as the last {count} restores"),
    };
    line("takes", format!("about {}, {by}", render::duration(estimated)));
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
    line("into", target_dir(args).display().to_string());
    let then = match (args.no_start || args.bare, args.action) {
        _ if args.swap.is_some() => "it takes the place of the original, which is kept beside it",
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
        line(
            "next",
            match args.bare {
                true => {
                    "recovery is yours to arrange: restore_command is `walguard wal-fetch ... \"%f\" \"%p\"`".to_owned()
                }
                false => format!("start the server on it: it recovers to {} and waits there", plan.stop.reached),
            },
        );
        return format!("Prepared\n{text}");
    };
    line("last kept", transaction_text(reached.transaction.as_ref(), "none since the backup began", zone));
    line("stands at", format!("LSN {}, as planned", reached.lsn));
    if reached.locked > 0 {
        let what = "tables and indexes are locked by a transaction that was open then: reading them waits until";
        line("LOCKED", format!("{} {what} the", reached.locked));
        line("", "server is promoted (walguard handover, or pg_ctl promote)".to_owned());
    }
    if let Some(timeline) = reached.timeline {
        line("timeline", format!("{timeline}, new"));
    }
    took.push(format!("replay {}", render::duration(timings.replay)));
    if args.action != Action::Pause || args.swap.is_some() {
        took.push(format!(
            "{} {}",
            if args.action == Action::Shutdown { "stop" } else { "promote" },
            render::duration(timings.finish)
        ));
    }
    line("took", took.join(", "));
    match &report.running {
        Some(running) => {
            line("server", format!("process {}, log {}", running.pid, running.log.display()));
            if args.swap.is_none() {
                let socket = running.socket_dir.display();
                line("look at it", format!("psql -h {socket} -p {} -U {} DATABASE", running.port, running.role));
            }
        }
        None => line("server", format!("stopped; its data directory is {}", report.target_dir.display())),
    }
    if args.swap.is_none() {
        let dir = report.target_dir.display();
        line("", "it archives nothing, connects nowhere and runs no jobs".to_owned());
        line("hand over", format!("walguard handover {dir}   (promotes and stops it; then start it as your own)"));
        if let Some(original) = &report.original {
            let original = original.display();
            line("", "or, on the original's host, with the original stopped, in its place:".to_owned());
            line("", format!("walguard handover {dir} --swap {original}"));
        }
    }
    format!("Restored\n{text}")
}
