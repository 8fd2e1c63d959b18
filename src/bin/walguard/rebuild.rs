//! `walguard restore` and `walguard backup` with a logical source.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::tz::TimeZone;
use serde::Serialize;
use walguard::capture::{ConnInfo, Environment};
use walguard::repo::Repository;
use walguard::repo::bases::{self, Manifest};
use walguard::repo::index::chronicle::Pattern;
use walguard::restore::rebuild::RebuildError;
use walguard::restore::rebuild::plan::{self, Edge, Plan, Request};
use walguard::restore::rebuild::private::{self, Private, Server};
use walguard::restore::rebuild::run::{self as execute, Options, Report};
use walguard::restore::run::refuse_root;
use walguard::restore::{Listen, Target};
use walguard::settings::Source;

use crate::Outcome;
use crate::args::{Action, BackupArgs, RestoreArgs};
use crate::context::{self, Context};
use crate::render;
use crate::report::UsageError;

/// By which sessions of a rebuild are told apart from others.
const APPLICATION_NAME: &str = "walguard-rebuild";

/// Tables named to people.
const TABLES_SHOWN: usize = 20;

/// Where it goes.
enum Place {
    Database(Box<ConnInfo>),
    /// A server that is made for it.
    Directory(private::Options),
}

pub(crate) async fn run(context: Context, args: &RestoreArgs, target: Target) -> anyhow::Result<Outcome> {
    check_flags(&context, args, &target)?;
    let place = place(args)?;
    if matches!(place, Place::Directory(_)) && !args.dry_run {
        refuse_root()?; // before minutes are spent on a plan
    }
    let repo = context.initialized_repository().await?;
    let cancel = context.cancel_on_signals()?;
    let progress = context.progress();
    let database = database(&context, &repo, args, &target).await?;
    let request = Request {
        target,
        exclusive: args.exclusive,
        database,
        base: args.backup.clone(),
        partial: args.partial,
        only: args.only.iter().map(|text| Pattern::new(text)).collect(),
    };
    let planned = plan::plan(&repo, &request, &*progress, &cancel).await.context("plan the restore")?;
    let into_name = match &place {
        Place::Database(into) => format!("database {}", into.dbname()),
        Place::Directory(options) => {
            let programs = private::check(options, &planned.base)?;
            format!("a new server of PostgreSQL {}, in {}", programs.version, options.data_dir.display())
        }
    };
    if args.dry_run {
        match context.json {
            true => render::print_json(&Told { plan: &planned, restore: None, server: None })?,
            false => render::print(&plan_text(&planned, &into_name, &context.zone))?,
        }
        return Ok(Outcome::Done);
    }
    if !context.json {
        render::print(&plan_text(&planned, &into_name, &context.zone))?;
    }
    if !args.yes {
        let answer = if context.json { None } else { render::ask(&format!("Rebuild it in {into_name}?"))? };
        let answer = answer.ok_or_else(|| {
            UsageError::with_hint(
                "nobody is there to confirm the plan",
                "give --yes, or look at the plan first with --dry-run",
            )
        })?;
        if !answer {
            return Ok(Outcome::Failed(crate::report::FAILED));
        }
    }
    let begun = Instant::now();
    let (report, server) = match place {
        Place::Database(into) => {
            let spill = context.settings.spool.dir.join(&context.settings.cluster).join("rebuild");
            let options =
                Options { into: *into, jobs: usize::from(args.jobs), spill, partial: args.partial, keep_notes: false };
            let report = execute::run(&repo, &planned, &options, &*progress, &cancel).await;
            (report.with_context(|| format!("rebuild {into_name}"))?, None)
        }
        Place::Directory(options) => {
            progress.begin("make a server", None);
            let made = Private::begin(options, &planned.base).await;
            progress.end();
            let mut server = made.context("make a server")?;
            let into = server.conninfo()?.with_application_name(APPLICATION_NAME);
            let (jobs, spill) = (usize::from(args.jobs), server.spill());
            let options = Options { into, jobs, spill, partial: args.partial, keep_notes: true };
            let report = match server.done() {
                None => execute::run(&repo, &planned, &options, &*progress, &cancel).await,
                Some(stop) if stop == planned.stop => {
                    execute::prove(&repo, &planned, &options, &*progress, &cancel).await
                }
                Some(stop) => {
                    let (database, label) = (planned.base.database_name.clone(), planned.base.label.clone());
                    Err(RebuildError::Other { database, label, stop: stop.to_string() })
                }
            };
            if report.is_err() {
                server.stop().await.context("stop the new server")?;
            }
            let report = report.with_context(|| format!("rebuild {into_name}"))?;
            let server =
                server.finish(planned.stop, args.action != Action::Shutdown).await.context("start the new server")?;
            (report, Some(server))
        }
    };
    match context.json {
        true => render::print_json(&Told { plan: &planned, restore: Some(&report), server: server.as_ref() })?,
        false => {
            let text = report_text(&planned, &report, begun.elapsed());
            render::print(&(text + &server.as_ref().map(server_text).unwrap_or_default()))?;
        }
    }
    let is_whole = planned.remarks.is_empty() && report.not_made.is_empty();
    Ok(if is_whole { Outcome::Done } else { Outcome::Attention })
}

/// The database that is meant: the one that is named, the incident's, or that of the connection string.
async fn database(
    context: &Context,
    repo: &Repository,
    args: &RestoreArgs,
    target: &Target,
) -> anyhow::Result<Option<String>> {
    if args.database.is_some() {
        return Ok(args.database.clone());
    }
    if let Target::Before(id) = target
        && let Some(incident) = repo.incident(id).await?
        && let Some(harmed) = incident.tables.iter().find_map(|table| table.relation.as_ref())
    {
        return Ok(Some(harmed.database_name.clone()));
    }
    match context.settings.postgres.conninfo.is_empty() {
        true => Ok(None),
        false => Ok(Some(context.conninfo()?.dbname().to_owned())),
    }
}

/// Refuses what a rebuild does not know.
fn check_flags(context: &Context, args: &RestoreArgs, target: &Target) -> Result<(), UsageError> {
    if context.settings.source == Source::Physical {
        let hint = "with the server's WAL, a restore makes a data directory: --target-dir DIR";
        return Err(UsageError::with_hint("--into needs `source = \"logical\"`", hint));
    }
    if args.exclusive && !matches!(target, Target::Xid(_) | Target::Time(_)) {
        let hint = "everything before an LSN is what --to LSN means by itself";
        return Err(UsageError::with_hint("--exclusive needs a transaction or a time", hint));
    }
    let of_wal = [
        ("--to-name", args.to_name.is_some()),
        ("--timeline", args.timeline.is_some()),
        ("--verify", args.verify),
        ("--no-start", args.no_start),
        ("--bare", args.bare),
        ("--swap", args.swap.is_some()),
        ("--overwrite", args.overwrite),
        ("--delta", args.delta),
        ("--tablespace", !args.tablespace.is_empty()),
        ("--wal-ahead", args.wal_ahead.is_some()),
        ("--amcheck", args.amcheck),
    ];
    if let Some((flag, _)) = of_wal.iter().find(|(_, is_given)| *is_given) {
        let hint = "a rebuild makes a new server, and repeats rows in it";
        return Err(UsageError::with_hint(format!("{flag} needs `source = \"physical\"`"), hint));
    }
    Ok(())
}

fn place(args: &RestoreArgs) -> anyhow::Result<Place> {
    if let Some(into) = &args.into {
        let into = ConnInfo::parse(into, &Environment::from_process())?.with_application_name(APPLICATION_NAME);
        return Ok(Place::Database(Box::new(into)));
    }
    let dir = args.target_dir.clone().unwrap_or_default();
    Ok(Place::Directory(private::Options {
        data_dir: std::path::absolute(&dir).with_context(|| format!("find {}", dir.display()))?,
        bin_dir: args.pg_bin_dir.clone(),
        path: std::env::var_os("PATH"),
        listen: Listen { port: args.port, socket_dir: args.socket_dir.clone() },
    }))
}

/// Everything that happened, for programs.
#[derive(Debug, Serialize)]
struct Told<'a> {
    plan: &'a Plan,
    /// `null` for a dry run.
    restore: Option<&'a Report>,
    /// The server that was made for it; `null` if a database was named, and for a dry run.
    server: Option<&'a Server>,
}

fn plan_text(plan: &Plan, into: &str, zone: &TimeZone) -> String {
    let Plan { base, last_kept, first_lost, transactions, changes, rows, remarks, notes, .. } = plan;
    let edge = |edge: &Edge| {
        format!("transaction {}, committed at {} ({})", edge.xid, edge.lsn, render::time(edge.time.timestamp(), zone))
    };
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    line("database", format!("{} of PostgreSQL {}, into {into}", base.database_name, base.server_version));
    let taken = render::time(render::whole_seconds(base.time), zone);
    line("base", format!("{} of {taken}, at {}", base.label, base.consistent));
    line("changes", format!("{} in {} transactions", render::number(*changes), render::number(*transactions)));
    line("last kept", last_kept.as_ref().map_or_else(|| "the base alone".to_owned(), edge));
    line("first lost", first_lost.as_ref().map_or_else(|| "none".to_owned(), edge));
    let all: u64 = rows.values().sum();
    line("then", format!("{} rows in {} tables", render::number(all), rows.len()));
    let mut largest: Vec<_> = rows.iter().collect();
    largest.sort_by_key(|(name, rows)| (std::cmp::Reverse(**rows), (*name).clone()));
    for (name, rows) in largest.into_iter().take(TABLES_SHOWN) {
        line("", format!("{name} {}", render::number(*rows)));
    }
    if !plan.left_empty.is_empty() {
        line("empty", format!("{}, as --only does not name them", listed(&plan.left_empty)));
    }
    for note in notes {
        line("note", note.clone());
    }
    for remark in remarks {
        line("NOT WHOLE", remark.clone());
    }
    text
}

fn report_text(plan: &Plan, report: &Report, elapsed: Duration) -> String {
    let mut text = String::from("\n");
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    let went_on = if report.resumed { ", going on with what was there" } else { "" };
    line("done", format!("in {}{went_on}", render::duration(elapsed)));
    line("copied", format!("{} rows of the base", render::number(report.rows_copied)));
    let transactions = render::number(report.transactions);
    line("repeated", format!("{} changes in {transactions} transactions", render::number(report.changes)));
    let rows = render::number(report.rows_verified);
    line("proved", format!("{rows} rows in {} tables, as many as there should be", report.tables_verified));
    if !report.foreign_keys_left.is_empty() {
        let keys = listed(&report.foreign_keys_left);
        line("NOT MADE", format!("foreign keys to rows that are not there: {keys}"));
    }
    for what in &report.not_made {
        line("NOT MADE", what.clone());
    }
    if !report.roles_made.is_empty() {
        line("roles", format!("made, and may not log in: {}", report.roles_made.join(", ")));
    }
    if !plan.base.sequences.is_empty() {
        line("sequences", "at least where the base or the columns are that they number".to_owned());
    }
    text
}

fn server_text(server: &Server) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    let dir = server.data_dir.display();
    match server.pid {
        Some(pid) => {
            line("server", format!("process {pid}, log {}", server.log.display()));
            let database = &server.database;
            line(
                "look at it",
                format!("psql -h {} -p {} -U {} {database}", server.socket_dir.display(), server.port, server.role),
            );
            line("stop it", format!("pg_ctl stop -D {dir}"));
        }
        None => line("server", format!("stopped; its data directory is {dir}")),
    }
    for remark in &server.remarks {
        line("note", remark.clone());
    }
    text
}

/// Some names, and how many others there are.
fn listed(names: &[String]) -> String {
    let more = names.len().saturating_sub(TABLES_SHOWN);
    let shown = names.iter().take(TABLES_SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// `walguard backup` with a logical source.
pub(crate) async fn bases(context: Context, args: BackupArgs) -> anyhow::Result<Outcome> {
    if args.checkpoint.is_some() || args.max_rate.is_some() {
        let hint = "they are for the copy of a server's files";
        return Err(UsageError::with_hint("--checkpoint and --max-rate need `source = \"physical\"`", hint).into());
    }
    let repo = context.initialized_repository().await?;
    let conninfo = context.conninfo()?;
    let conninfo = conninfo.clone().with_application_name(&format!("{}-base", conninfo.application_name()));
    let databases: Vec<String> = match &args.database {
        Some(database) => vec![database.clone()],
        None => context.databases(&conninfo),
    };
    let cancel = context.cancel_on_signals()?;
    let progress = context.progress();
    let request = bases::Request {
        label: args.label,
        bin_dir: context::pg_bin_dir(),
        jobs: 2,
        level: context.settings.archive.compression_level,
        publications: context.settings.logical.clone(),
    };
    let mut all = Vec::new();
    for database in &databases {
        let begun = Instant::now();
        let conninfo = conninfo.clone().with_dbname(database);
        let taken = bases::take(&repo, &conninfo, &request, &*progress, &cancel).await;
        let taken = taken.with_context(|| format!("take a base of {database}"))?;
        if !context.json {
            render::print(&base_text(&taken, begun.elapsed()))?;
        }
        all.push(taken);
    }
    if context.json {
        match all.as_slice() {
            [one] => render::print_json(one)?,
            several => render::print_json(&several)?,
        }
    }
    Ok(if all.iter().all(|taken| taken.left_out.is_empty()) { Outcome::Done } else { Outcome::Attention })
}

fn base_text(base: &Manifest, elapsed: Duration) -> String {
    let rows: u64 = base.tables.iter().map(|table| table.rows).sum();
    let mut text = format!(
        "base {} of {} done in {}: {} rows of {} tables, {} of text in {}, as of {}\n",
        base.label,
        base.database_name,
        render::duration(elapsed),
        render::number(rows),
        base.tables.len(),
        render::bytes(base.content_bytes),
        render::bytes(base.stored_bytes),
        base.consistent,
    );
    for left_out in &base.left_out {
        let _ = writeln!(text, "NOT IN IT: {left_out}");
    }
    text
}
