//! `walguard drill`.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use walguard::repo::drills::{Drill, Outcome as DrillOutcome, Point, Verdict};
use walguard::repo::verify::Problem;
use walguard::restore::Target;
use walguard::restore::drill::{self, Kept, Moment, Report, Request};
use walguard::restore::run as execute;
use walguard::settings::Source;

use crate::Outcome;
use crate::args::{DrillArgs, DrillVerb};
use crate::context::Context;
use crate::render;
use crate::report::{FAILED, UsageError};
use crate::restore::fetch_command;

pub(crate) async fn run(context: Context, args: DrillArgs) -> anyhow::Result<Outcome> {
    if let Some(DrillVerb::List { newest }) = args.verb {
        return list(&context, newest).await;
    }
    let mut config = context.settings.drill.clone();
    let target = args.to.as_deref().map(|text| Target::parse(text, Timestamp::now(), &context.zone)).transpose()?;
    if args.random {
        config.moment = Moment::Random;
    }
    if let Some(dir) = args.scratch_dir {
        config.scratch_dir = std::path::absolute(dir)?;
    }
    config.max_bytes = args.max_bytes.or(config.max_bytes);
    config.max_time = args.max_time.unwrap_or(config.max_time);
    config.amcheck |= args.amcheck;
    config.pg_bin_dir = args.pg_bin_dir.or(config.pg_bin_dir);
    config.check().map_err(UsageError::new)?;
    execute::refuse_root()?;
    let request = Request {
        kept: kept(&context, args.database)?,
        config,
        target,
        keep: args.keep,
        fetch: fetch_command(&context)?,
        path: std::env::var_os("PATH"),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
    };
    let repo = context.initialized_repository().await?;
    let cancel = context.cancel_on_signals()?;
    let report = Box::pin(drill::run(&repo, &request, &*context.progress(), &cancel)).await?;
    match context.json {
        true => render::print_json(&report)?,
        false => render::print(&text(&report, &context.zone))?,
    }
    Ok(match report.drill.outcome {
        DrillOutcome::Proven => Outcome::Done,
        DrillOutcome::Wrong => Outcome::Attention,
        DrillOutcome::Failed => Outcome::Failed(FAILED),
    })
}

/// What is restored: the cluster, or one of the databases whose changes are kept.
fn kept(context: &Context, database: Option<String>) -> anyhow::Result<Kept> {
    match context.settings.source {
        Source::Physical if database.is_some() => {
            let hint = "a cluster's WAL restores all its databases";
            Err(UsageError::with_hint("--database needs `source = \"logical\"`", hint).into())
        }
        Source::Physical => Ok(Kept::Cluster),
        Source::Logical if database.is_none() && !context.settings.postgres.conninfo.is_empty() => {
            Ok(Kept::Database(Some(context.conninfo()?.dbname().to_owned())))
        }
        Source::Logical => Ok(Kept::Database(database)),
    }
}

async fn list(context: &Context, newest: usize) -> anyhow::Result<Outcome> {
    let drills = context.initialized_repository().await?.drills(newest).await?;
    if context.json {
        render::print_json(&drills)?;
        return Ok(Outcome::Done);
    }
    if drills.is_empty() {
        render::print("no drill was made yet: walguard drill")?;
        return Ok(Outcome::Done);
    }
    let mut table = render::table(["drill", "restored", "result", "took", "restored to", "host"]);
    for drill in &drills {
        let time = drill.reached.and_then(|reached| reached.time);
        table.add_row([
            render::time(render::whole_seconds(drill.started_at), &context.zone),
            render::printable(&match &drill.database {
                Some(database) => format!("{database}: {}", drill.target),
                None => drill.target.clone(),
            }),
            drill.problem().map_or_else(|| "proven".to_owned(), |problem| render::printable(&problem)),
            took(drill.took_seconds()),
            time.map_or_else(|| "-".to_owned(), |time| render::time(time.timestamp(), &context.zone)),
            render::printable(&drill.host),
        ]);
    }
    render::print(&render::table_text(&table))?;
    Ok(Outcome::Done)
}

fn took(seconds: f64) -> String {
    render::duration(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

/// What was looked at, a line for each, and what can be done about it.
pub(crate) fn points_text(points: &[Point]) -> String {
    let mut text = String::new();
    for point in points {
        let verdict = match point.verdict {
            Verdict::Passed => render::green("proved    "),
            Verdict::Failed => render::red("WRONG     "),
            Verdict::Unproved => render::yellow("not proved"),
        };
        let (name, told) = (render::printable(&point.name), render::printable(&point.told));
        let _ = writeln!(text, "  {verdict}  {name}: {told}"); // a String takes everything
        if let Some(hint) = &point.hint {
            let _ = writeln!(text, "  {:10}  HINT: {}", "", render::printable(hint));
        }
    }
    text
}

fn damage_text(damage: &Problem, zone: &TimeZone) -> String {
    let mut text = match &damage.key {
        Some(key) => format!("  {}  {key}: {}\n", render::red("DAMAGED   "), render::printable(&damage.problem)),
        None => format!("  {}  {}\n", render::red("DAMAGED   "), render::printable(&damage.problem)),
    };
    for label in &damage.backups {
        let _ = writeln!(text, "  {:10}  backup {label} cannot be restored", "");
    }
    for lost in &damage.unreachable {
        let times = lost.from_time.zip(lost.to_time).map(|(from, to)| {
            let show = |time: walguard::pg::PgTime| render::time(time.timestamp(), zone);
            format!(": what was committed from {} to {}", show(from), show(to))
        });
        let (from, to, times) = (lost.from, lost.to, times.unwrap_or_default());
        let _ = writeln!(text, "  {:10}  unreachable: LSN {from} to {to} of timeline {}{times}", "", lost.timeline);
    }
    if damage.backups.is_empty() && damage.unreachable.is_empty() {
        let _ = writeln!(text, "  {:10}  no moment is unreachable by it", "");
    }
    text
}

fn text(report: &Report, zone: &TimeZone) -> String {
    let Report { drill, record, kept } = report;
    let mut text = heading(drill);
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<10}  {value}");
    };
    line("target", render::printable(&drill.target));
    if let Some(database) = &drill.database {
        line("database", render::printable(database));
    }
    if let Some(backup) = &drill.backup {
        let (content, wal) = (render::bytes(drill.content_bytes), render::bytes(drill.wal_bytes));
        line(
            "from",
            match drill.changes {
                None => format!("backup {backup}, {content}, and {wal} of WAL"),
                Some(changes) => format!("base {backup}, {content}, and {changes} changes of rows"),
            },
        );
    }
    if let Some(reached) = &drill.reached {
        let time = reached.time.map(|time| format!(", last commit {}", render::time(time.timestamp(), zone)));
        line("reached", format!("LSN {} of timeline {}{}", reached.lsn, reached.timeline, time.unwrap_or_default()));
    }
    let seconds = drill.seconds;
    let parts = [
        ("plan", seconds.plan),
        ("extract", seconds.extract),
        ("replay", seconds.replay),
        ("checks", seconds.checks),
        ("finish", seconds.finish),
    ];
    let parts: Vec<_> =
        parts.iter().filter(|(_, s)| *s > 0.0).map(|(name, s)| format!("{name} {}", took(*s))).collect();
    line("took", format!("{} ({})", took(drill.took_seconds()), parts.join(", ")));
    if drill.scratch_bytes_max > 0 {
        line("disk", format!("{} at most", render::bytes(drill.scratch_bytes_max)));
    }
    text += &points_text(&drill.points);
    for damage in &drill.damage {
        text += &damage_text(damage, zone);
    }
    if let Some(error) = &drill.error {
        let _ = writeln!(text, "  {}  {}", render::red("ERROR     "), render::printable_lines(error));
    }
    if let Some(hint) = &drill.hint {
        let _ = writeln!(text, "  {:10}  HINT: {}", "", render::printable(hint));
    }
    match record {
        Some(key) => _ = writeln!(text, "  {:<10}  {key}", "recorded"),
        None => _ = writeln!(text, "  {:<10}  {}", "recorded", render::yellow("no: the repository does not take it")),
    }
    match kept {
        Some(dir) => _ = writeln!(text, "  {:<10}  {} (remove it when you have looked)", "kept", dir.display()),
        None => _ = writeln!(text, "  {:<10}  nothing", "left"),
    }
    text
}

fn heading(drill: &Drill) -> String {
    match drill.outcome {
        DrillOutcome::Proven => format!("{}\n", render::green("Proven: this moment can be restored")),
        DrillOutcome::Wrong => format!("{}\n", render::red("Restored, and something is wrong")),
        DrillOutcome::Failed => format!("{}\n", render::red("The drill FAILED")),
    }
}
