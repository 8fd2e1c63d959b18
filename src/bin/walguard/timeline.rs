//! `walguard timeline`: what happened when, as a chart, as tables, and as JSON.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::{Offset, TimeZone};
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use walguard::detect::{DdlKind, Incident, RelationKind, Severity, State};
use walguard::pg::{Lsn, Oid, PgTime, Position, TimelineId};
use walguard::progress::Progress;
use walguard::repo::index::chronicle::{
    Bucket, Buckets, Chronicle, Event, Filter, Pattern, Table, TableCount, TableTotal, Told, TransactionTold, Width,
};
use walguard::repo::index::walk::{Coverage, Followed, Follower, Walk};
use walguard::repo::{RepoError, Repository, changes};
use walguard::restore::target::Target;
use walguard::settings::Source;

use crate::Outcome;
use crate::args::TimelineArgs;
use crate::context::Context;
use crate::render::{self, PrintError};
use crate::report::UsageError;

/// What is shown if no time is named.
const SHOWN: Duration = Duration::from_secs(3_600);

/// The same for who follows: what comes is wanted, not what was.
const SHOWN_BEFORE_FOLLOWING: Duration = Duration::from_secs(300);

/// Lines of a chart where no terminal says how many it has; also the fewest that a small one is given, since an hour is
/// looked at by the minute.
const LINES: usize = 61;

/// Tables listed below the chart.
const TABLES_SHOWN: usize = 25;

/// Transactions listed by `--transactions`.
const TRANSACTIONS_SHOWN: usize = 25;

/// How often the repository is asked for more: tails come as often.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Buckets that who follows keeps in memory.
const FOLLOWED_BUCKETS_MAX: usize = 1_000;

/// A bucket is over when it ended so long ago: its last commits must reach the repository first.
const LATE: Duration = Duration::from_secs(3);

pub(crate) async fn run(context: Context, args: TimelineArgs) -> anyhow::Result<Outcome> {
    let now = Timestamp::now();
    let from = args.from.as_deref().map(|text| moment("--from", text, now, &context.zone)).transpose()?.flatten();
    let to = args.to.as_deref().map(|text| moment("--to", text, now, &context.zone)).transpose()?.flatten();
    in_order(from, to, &context.zone)?;
    if let Some(from) = from.filter(|from| *from > PgTime::from(now)) {
        let [from, now] = [from.timestamp(), now].map(|time| render::time(time, &context.zone));
        let hint = "look at the year and at the zone: a time without one is read in the zone of the settings";
        return Err(
            UsageError::with_hint(format!("that time is yet to come: from {from}; now it is {now}"), hint).into()
        );
    }
    let width = args.bucket.map(bucket_width).transpose()?;
    let filter = Filter {
        tables: args.table.iter().map(|text| Pattern::new(text)).collect(),
        databases: args.database.iter().map(|text| Pattern::new(text)).collect(),
    };

    let repository = context.initialized_repository().await?;
    if context.settings.source == Source::Logical {
        let asked = Asked { from, to, width, filter };
        return of_changes(context, args, &repository, asked).await;
    }
    let shown = if args.follow { SHOWN_BEFORE_FOLLOWING } else { SHOWN };
    let mut walk = Walk::open(&repository, args.timeline, from.or_else(|| to.map(|to| before(to, shown)))).await?;
    let known_to = walk.known_to().await?;
    let to = to.or(known_to).unwrap_or_else(|| PgTime::from(now));
    let to = if args.follow { to.max(PgTime::from(now)) } else { to };
    let from = match from {
        Some(from) => from,
        None => {
            let from = before(to, shown);
            // The last backup may be younger than what is shown.
            walk = Walk::open(&repository, args.timeline, Some(from)).await?;
            from
        }
    };
    // What is asked for may lie behind the archive's end: then there is nothing to show.
    let end = if args.follow { to } else { to.min(known_to.map_or(to, after)).max(after(from)) };
    let width = width.unwrap_or_else(|| match args.follow {
        true => Width::TEN_SECONDS,
        false => Width::fitting(from, end, render::height().unwrap_or(0).saturating_sub(6).max(LINES)),
    });
    let buckets = Buckets::new(from, end, width, &context.zone).map_err(|error| {
        let wanted = format!("a line for each {width} of that time: {error}");
        UsageError::with_hint(wanted, "ask for a shorter time, or for more of it in a line with --bucket")
    })?;

    let mut chronicle = Chronicle::new(buckets.clone(), filter.clone());
    let progress: Arc<dyn Progress> = context.progress();
    let walked = walk.tell(&mut chronicle, &*progress).await?;
    let report = Report {
        cluster: context.cluster()?.to_owned(),
        timeline: walk.timeline(),
        from: buckets.from(),
        to: buckets.to(),
        known_to,
        bucket_seconds: width.length().as_secs(),
        transactions_are_largest: walked.coverage.indexed > 0,
        incidents: incidents(&repository, &walk, &walked.coverage, &buckets, &filter).await?,
        told: chronicle.tell(args.min_rows),
        coverage: walked.coverage.clone(),
    };
    let view = View::new(&report, buckets.width(), &filter, &context.zone);
    let attention = !report.coverage.unread.is_empty() || !report.coverage.damaged_indexes.is_empty();
    if args.follow {
        let follower = Followers::Wal(Box::new(Follower::behind(&walk, walked).await?));
        let stop = context.cancel_on_signals()?;
        let follow = Following { context, view, follower, chronicle, filter, rows_min: args.min_rows };
        return follow.run(&report, stop).await;
    }
    match (context.json, args.transactions) {
        (true, _) => render::print_json(&report)?,
        (false, true) => render::print(&view.transactions(&report))?,
        (false, false) => render::print(&view.chart(&report))?,
    }
    Ok(if attention { Outcome::Attention } else { Outcome::Done })
}

/// What was asked for.
struct Asked {
    from: Option<PgTime>,
    to: Option<PgTime>,
    width: Option<Width>,
    filter: Filter,
}

/// The same of what logical replication told.
async fn of_changes(
    context: Context,
    args: TimelineArgs,
    repository: &Repository,
    Asked { from, to, width, filter }: Asked,
) -> anyhow::Result<Outcome> {
    let databases = repository.changed_databases().await?;
    let mut known_to = None;
    for database in &databases {
        known_to = known_to.max(repository.changes_known_to(*database).await?);
    }
    let now = PgTime::from(Timestamp::now());
    let to = to.or(known_to).unwrap_or(now);
    let to = if args.follow { to.max(now) } else { to };
    let shown = if args.follow { SHOWN_BEFORE_FOLLOWING } else { SHOWN };
    let from = from.unwrap_or_else(|| before(to, shown));
    let end = if args.follow { to } else { to.min(known_to.map_or(to, after)).max(after(from)) };
    let width = width.unwrap_or_else(|| match args.follow {
        true => Width::TEN_SECONDS,
        false => Width::fitting(from, end, render::height().unwrap_or(0).saturating_sub(6).max(LINES)),
    });
    let buckets = Buckets::new(from, end, width, &context.zone).map_err(|error| {
        let wanted = format!("a line for each {width} of that time: {error}");
        UsageError::with_hint(wanted, "ask for a shorter time, or for more of it in a line with --bucket")
    })?;
    let mut chronicle = Chronicle::new(buckets.clone(), filter.clone());
    let progress: Arc<dyn Progress> = context.progress();
    let mut coverage = Coverage::default();
    let mut timeline = TimelineId::FIRST;
    let mut followers = BTreeMap::new();
    for database in databases {
        let (told, follower) = repository.tell_changes(database, &mut chronicle, &*progress).await?;
        followers.insert(database, follower);
        if let Some(last) = repository.last_changes(database, Lsn::MAX).await? {
            timeline = timeline.max(repository.changes(last).await?.header.timeline);
        }
        coverage.read_from = coverage.read_from.into_iter().chain(told.read_from).min();
        coverage.read_to = coverage.read_to.max(told.read_to);
        coverage.decoded += told.decoded;
        coverage.unread.extend(told.unread);
        coverage.begins = coverage.begins.into_iter().chain(told.begins).min();
    }
    let mut marks = Vec::new();
    for incident in repository.incidents(None).await?.incidents {
        if buckets.find(incident.began_at.into()).is_some() && is_about(&filter, &incident) {
            marks.push(IncidentMark::of(&incident));
        }
    }
    marks.sort_by_key(|mark| mark.began_at);
    let report = Report {
        cluster: context.cluster()?.to_owned(),
        timeline,
        from: buckets.from(),
        to: buckets.to(),
        known_to,
        bucket_seconds: width.length().as_secs(),
        transactions_are_largest: coverage.indexed > 0,
        incidents: marks,
        told: chronicle.tell(args.min_rows),
        coverage,
    };
    let view = View::new(&report, buckets.width(), &filter, &context.zone);
    if args.follow {
        let stop = context.cancel_on_signals()?;
        let follower = Followers::Changes(repository.clone(), followers);
        let follow = Following { context, view, follower, chronicle, filter, rows_min: args.min_rows };
        return follow.run(&report, stop).await;
    }
    match (context.json, args.transactions) {
        (true, _) => render::print_json(&report)?,
        (false, true) => render::print(&view.transactions(&report))?,
        (false, false) => render::print(&view.chart(&report))?,
    }
    Ok(if report.coverage.unread.is_empty() { Outcome::Done } else { Outcome::Attention })
}

/// The incidents of that time. One that cannot be read is named in the log, and `walguard incidents` tells of it.
async fn incidents(
    repository: &Repository,
    walk: &Walk<'_>,
    coverage: &Coverage,
    buckets: &Buckets,
    filter: &Filter,
) -> anyhow::Result<Vec<IncidentMark>> {
    let (Some(from), Some(to)) = (coverage.read_from, coverage.read_to) else { return Ok(Vec::new()) };
    let mut marks = Vec::new();
    for id in repository.incident_ids().await? {
        // An id begins with the place: most need not be read.
        let place = id.get(9..25).and_then(|digits| u64::from_str_radix(digits, 16).ok()).map(Lsn::new);
        if place.is_some_and(|place| place < from || to < place) {
            continue;
        }
        let incident = match repository.incident(&id).await {
            Ok(Some(incident)) => incident,
            Ok(None) => continue,
            Err(error @ RepoError::Damaged { .. }) => {
                tracing::warn!("passed over an incident: {error}");
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let position = Position { timeline: incident.timeline, lsn: incident.first_harm.unwrap_or(incident.seen_to) };
        let is_shown = buckets.find(incident.began_at.into()).is_some() && is_about(filter, &incident);
        if is_shown && walk.contains(position) {
            marks.push(IncidentMark::of(&incident));
        }
    }
    marks.sort_by_key(|mark| mark.began_at);
    Ok(marks)
}

/// Whether an incident is about one of the tables asked for. One that names no table may be about all of a database.
fn is_about(filter: &Filter, incident: &Incident) -> bool {
    let tables = incident.tables.iter().map(|table| table.name.as_str());
    let findings = incident.findings.iter().filter_map(|finding| finding.table.as_deref());
    let mut names = tables.chain(findings).peekable();
    match names.peek() {
        Some(_) => names.any(|name| filter.is_about(name)),
        None => filter.tables.is_empty(),
    }
}

/// A time as `restore --to` reads it; `None` for `latest`.
fn moment(flag: &str, text: &str, now: Timestamp, zone: &TimeZone) -> anyhow::Result<Option<PgTime>> {
    match Target::parse(text, now, zone)? {
        Target::Time(time) => Ok(Some(time)),
        Target::Latest if flag == "--to" => Ok(None),
        _ => {
            let hint = "a time is `2025-12-17 08:14`, `2025-12-17T06:14:00Z`, `2025-12-17 08:14 Asia/Jerusalem` or \
                        `10 minutes ago`; `walguard wal explain` takes LSNs";
            Err(UsageError::with_hint(format!("{flag} takes a time, which `{text}` is not"), hint).into())
        }
    }
}

fn in_order(from: Option<PgTime>, to: Option<PgTime>, zone: &TimeZone) -> Result<(), UsageError> {
    let (Some(from), Some(to)) = (from, to) else { return Ok(()) };
    if from < to {
        return Ok(());
    }
    let [from, to] = [from, to].map(|time| render::time(time.timestamp(), zone));
    let hint = "give the earlier time with --from and the later one with --to";
    Err(UsageError::with_hint(format!("that time ends before it begins: from {from} to {to}"), hint))
}

fn bucket_width(length: Duration) -> Result<Width, UsageError> {
    Width::new(length).ok_or_else(|| {
        let hint = "for example 10s, 1m, 15m, 1h, 6h, '1 day' or '7 days'";
        UsageError::with_hint("--bucket takes whole seconds, and whole days from a day on", hint)
    })
}

fn before(time: PgTime, span: Duration) -> PgTime {
    let micros = i64::try_from(span.as_micros()).unwrap_or(i64::MAX);
    PgTime::from_micros(time.micros().saturating_sub(micros))
}

/// The moment after: a range ends before its end.
fn after(time: PgTime) -> PgTime {
    PgTime::from_micros(time.micros().saturating_add(1))
}

/// All that is known, for programs.
#[derive(Debug, Serialize)]
struct Report {
    cluster: String,
    timeline: TimelineId,
    /// Where the first bucket begins.
    from: PgTime,
    /// Where the last ends.
    to: PgTime,
    /// Up to when the archive knows what happened.
    known_to: Option<PgTime>,
    bucket_seconds: u64,
    /// Some of `transactions` come from indexes, which know the sixteen largest of each segment: smaller ones are missing.
    transactions_are_largest: bool,
    incidents: Vec<IncidentMark>,
    #[serde(flatten)]
    told: Told,
    coverage: Coverage,
}

/// An incident, as far as it marks a time.
#[derive(Debug, Serialize)]
struct IncidentMark {
    id: String,
    state: State,
    severity: Severity,
    title: String,
    began_at: PgTime,
    ended_at: PgTime,
    /// What `restore --to before:<incident>` goes back to.
    first_harm: Option<Lsn>,
    rows_lost: u64,
}

impl IncidentMark {
    fn of(incident: &Incident) -> Self {
        Self {
            id: incident.id.clone(),
            state: incident.state,
            severity: incident.severity,
            title: incident.title.clone(),
            began_at: incident.began_at.into(),
            ended_at: incident.ended_at.into(),
            first_harm: incident.first_harm,
            rows_lost: incident.rows_lost(),
        }
    }
}

/// How it is shown to people.
#[derive(Debug)]
struct View {
    zone: TimeZone,
    /// Name of the zone's column; `None` if it would say what the one of UTC says.
    local: Option<String>,
    /// `strftime` of a bucket's beginning.
    format: &'static str,
    is_days: bool,
    bucket: String,
    columns: Columns,
    /// All tables are in this database, which need not be said again and again.
    database: Option<String>,
    filtered: bool,
    screen: usize,
}

/// Widths of the chart's columns.
#[derive(Clone, Copy, Debug, Default)]
struct Columns {
    time: usize,
    numbers: [usize; 4],
    /// Cells of the bar of inserts and updates, and of that of deletes.
    bars: [usize; 2],
    /// What fills these bars.
    most: [u64; 2],
}

const HEADERS: [&str; 4] = ["COMMITS", "INSERTED", "UPDATED", "DELETED"];
const SHORT_HEADERS: [&str; 4] = ["TX", "INS", "UPD", "DEL"];

/// The heaviest is what went: it is seen without colours, too.
const INSERTED: &str = "░";
const UPDATED: &str = "▒";
const DELETED: &str = "█";

impl View {
    fn new(report: &Report, width: Width, filter: &Filter, zone: &TimeZone) -> Self {
        let screen = render::width().max(60);
        let (from, to) = (report.from.timestamp(), report.to.timestamp());
        let is_utc = [from, to].iter().all(|time| zone.to_offset(*time) == Offset::UTC);
        let local = (!is_utc).then(|| zone.to_offset_info(from).abbreviation().to_owned());
        let seconds = width.length().as_secs();
        let one_day = from.to_zoned(zone.clone()).date()
            == before(report.to, Duration::from_secs(1)).timestamp().to_zoned(zone.clone()).date();
        let format = match (width.is_days(), one_day, seconds.is_multiple_of(60)) {
            (true, ..) => "%Y-%m-%d",
            (_, true, true) => "%H:%M",
            (_, true, false) => "%H:%M:%S",
            (_, false, true) => "%m-%d %H:%M",
            (_, false, false) => "%m-%d %H:%M:%S",
        };
        let databases: BTreeSet<_> = report.told.tables.iter().map(|total| &total.table.database_name).collect();
        let database = databases.first().filter(|name| databases.len() == 1 && !name.is_empty());
        let time = from.strftime(format).to_string().len();
        let columns = Columns::new(&report.told.buckets, Room { screen, time, has_local: local.is_some() });
        Self {
            zone: zone.clone(),
            local,
            format,
            is_days: width.is_days(),
            bucket: width.to_string(),
            columns,
            database: database.map(|name| (*name).clone()),
            filtered: !(filter.tables.is_empty() && filter.databases.is_empty()),
            screen,
        }
    }

    /// The beginning of a bucket, in UTC and in the zone.
    fn time(&self, time: PgTime) -> String {
        let utc = time.timestamp().strftime(self.format).to_string();
        let local = || time.timestamp().to_zoned(self.zone.clone()).strftime(self.format).to_string();
        match (&self.local, self.is_days) {
            (None, _) => utc,
            (Some(_), true) => local(), // a day of the zone
            (Some(_), false) => format!("{utc}  {}", local()),
        }
    }

    /// The beginning of a bucket, in UTC; of a day, in the zone.
    fn short_time(&self, time: PgTime) -> String {
        let zone = if self.is_days { self.zone.clone() } else { TimeZone::UTC };
        time.timestamp().to_zoned(zone).strftime(self.format).to_string()
    }

    fn heading(&self, report: &Report) -> String {
        let Report { cluster, timeline, from, to, .. } = report;
        let [from, to] = [from, to].map(|time| render::time(time.timestamp(), &self.zone));
        let database = self.database.as_ref().map_or(String::new(), |name| format!(", database {name}"));
        format!(
            "{}{database}, timeline {timeline}\nfrom {from}\n  to {to}, a line for each {}\n",
            render::bold(cluster),
            self.bucket
        )
    }

    fn chart_header(&self) -> String {
        let Columns { time, numbers, bars, .. } = self.columns;
        let mut line = match (&self.local, self.is_days) {
            (Some(zone), false) => format!("{:<time$}  {zone:<time$}", "UTC"),
            (Some(zone), true) => format!("{zone:<time$}"),
            (None, _) => format!("{:<time$}", "UTC"),
        };
        let names = if self.columns.is_short() { SHORT_HEADERS } else { HEADERS };
        for (name, width) in names.into_iter().zip(numbers) {
            let _ = write!(line, "  {name:>width$}");
        }
        let changes = format!("{INSERTED} inserted {UPDATED} updated");
        let deletes = format!("{DELETED} deleted");
        let _ =
            write!(line, "  {:<first$}  {deletes}", changes.chars().take(bars[0]).collect::<String>(), first = bars[0]);
        render::bold(line.trim_end()) + "\n"
    }

    fn chart(&self, report: &Report) -> String {
        let told = &report.told;
        let mut text = self.heading(report) + "\n";
        if told.buckets.iter().all(Bucket::is_empty) && report.incidents.is_empty() {
            text += &self.nothing(report);
            return text + &self.remarks(report);
        }
        text += &self.chart_header();
        let standing_out = standing_out(&told.buckets);
        let begins = report.coverage.begins;
        let mut quiet = Quiet::default();
        for (bucket, stands_out) in told.buckets.iter().zip(standing_out) {
            let began = |mark: &&IncidentMark| bucket.from <= mark.began_at && mark.began_at < bucket.to;
            let incidents: Vec<_> = report.incidents.iter().filter(began).collect();
            if bucket.is_empty() && incidents.is_empty() {
                quiet.add(bucket, begins);
                continue;
            }
            Self::gap(&mut text, &mut quiet);
            text += &self.line(bucket, stands_out);
            for IncidentMark { id, state, severity, title, .. } in incidents {
                let line = format!("INCIDENT {id} ({}, {}): {title}", severity.as_str(), state.as_str());
                let paint = if state.is_closed() { render::dim } else { render::red };
                let _ = writeln!(text, "  {}", render::bold(&paint(&line)));
            }
            text += &self.details(bucket, stands_out, &told.transactions);
        }
        Self::gap(&mut text, &mut quiet);
        text += "\n";
        text += &self.tables(&told.tables);
        text + &self.remarks(report)
    }

    /// Lines for buckets in which nothing happened, or of which nobody knows what did.
    fn gap(text: &mut String, quiet: &mut Quiet) {
        let Quiet { unknown, silent } = std::mem::take(quiet);
        for (seconds, what) in [(unknown, "from before the archive begins"), (silent, "without a commit")] {
            if seconds > 0 {
                let line = format!("·  {} {what}", span(seconds));
                *text += &(render::dim(&line) + "\n");
            }
        }
    }

    fn line(&self, bucket: &Bucket, stands_out: bool) -> String {
        let Columns { numbers, bars, most, .. } = self.columns;
        let rows = &bucket.rows;
        let shown = [bucket.transactions, rows.statement_inserts(), rows.statement_updates(), rows.deleted];
        let mut line = self.time(bucket.from);
        for (place, (value, width)) in shown.into_iter().zip(numbers).enumerate() {
            let text = format!("  {:>width$}", render::number(value));
            line += &match (place, value, stands_out) {
                (_, 0, _) => render::dim(&text),
                (3, _, true) => render::red(&render::bold(&text)),
                _ => text,
            };
        }
        let [_, inserted, updated, deleted] = shown;
        let changes = render::bar(inserted.saturating_add(updated), most[0], bars[0]);
        let mut of_updates = render::bar(updated, inserted.saturating_add(updated), changes);
        if inserted > 0 && of_updates == changes {
            of_updates = of_updates.saturating_sub(1);
        }
        let of_inserts = changes - of_updates;
        let drawn =
            format!("{}{}", render::green(&INSERTED.repeat(of_inserts)), render::yellow(&UPDATED.repeat(of_updates)));
        let deletes = DELETED.repeat(render::bar(deleted, most[1], bars[1]));
        if !deletes.is_empty() {
            let _ = write!(line, "  {drawn}{}  {}", " ".repeat(bars[0] - changes), render::red(&deletes));
        } else if changes > 0 {
            let _ = write!(line, "  {drawn}");
        }
        line.trim_end().to_owned() + "\n"
    }

    /// What must be known of a bucket beside its numbers.
    fn details(&self, bucket: &Bucket, stands_out: bool, transactions: &[TransactionTold]) -> String {
        let mut text = self.events(&bucket.events);
        if stands_out {
            let lost = bucket.tables.iter().filter(|table| table.rows.deleted > 0);
            let lost = lost.map(|table| format!("{} {}", self.name(&table.table), render::number(table.rows.deleted)));
            text += &self.mark("deleted", lost, render::red);
        }
        let is_ours = |told: &&TransactionTold| bucket.from <= told.time && told.time < bucket.to;
        let is_harm = |told: &&TransactionTold| {
            told.is_destructive() || (stands_out && told.rows.deleted.saturating_mul(10) >= bucket.rows.deleted)
        };
        let harmful = transactions.iter().filter(is_ours).filter(is_harm).min_by_key(|told| told.commit_lsn);
        if let Some(told) = harmful {
            let at = told.time.timestamp().strftime("%H:%M:%S%.3f");
            let xid = told.xid.map_or_else(|| "one".to_owned(), |xid| xid.to_string());
            let line = format!("as it was before transaction {xid} ({at} UTC): restore --to {}", told.commit_lsn);
            text += &format!("  {}\n", render::bold(&line));
        }
        text
    }

    fn events(&self, events: &[Event]) -> String {
        let mut text = String::new();
        for kind in DdlKind::ALL {
            let of_kind: Vec<_> = events.iter().filter(|event| event.kind == kind).collect();
            if of_kind.is_empty() {
                continue;
            }
            let mut seen = BTreeSet::new();
            let names = of_kind.iter().map(|event| self.event(event)).filter(|name| seen.insert(name.clone()));
            text += &self.mark(verb(kind), names, if kind.is_destructive() { render::red } else { render::dim });
        }
        text
    }

    fn event(&self, event: &Event) -> String {
        let table = event.table.as_ref().map(|table| format!("{}{}", kind_word(table.kind), self.name(table)));
        match (event.kind, table, event.object.as_deref().map(render::printable)) {
            (DdlKind::DropColumn, Some(table), Some(column)) => format!("{table}.{column}"),
            (DdlKind::Alter, Some(table), Some(former)) => format!("{former}, now {table}"),
            (_, Some(table), Some(object)) => format!("{object} ON {table}"),
            (_, Some(table), None) => table,
            (_, None, Some(object)) => object,
            (_, None, None) => "of unknown name".to_owned(),
        }
    }

    /// A line below a bucket: a word and as many names as there is room for.
    fn mark(&self, word: &str, names: impl Iterator<Item = String>, paint: fn(&str) -> String) -> String {
        let names: Vec<_> = names.collect();
        format!(
            "  {}\n",
            paint(&format!("{word} {}", fold(&names, self.screen.saturating_sub(word.chars().count() + 4))))
        )
    }

    fn name(&self, table: &Table) -> String {
        render::printable(if self.database.is_some() { &table.in_database } else { &table.name })
    }

    fn tables(&self, totals: &[TableTotal]) -> String {
        if totals.is_empty() {
            return String::new();
        }
        let mut table =
            render::table(["table", "tx", "inserted", "updated", "deleted", "trunc", "ddl", "most deleted (utc)"]);
        for column in 1..7 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(comfy_table::CellAlignment::Right);
            }
        }
        for total in totals.iter().take(TABLES_SHOWN) {
            let TableTotal { rows, .. } = total;
            let or_none = |count: u64| if count == 0 { String::new() } else { render::number(count) };
            let most = match total.most_deleted {
                0 => String::new(),
                most => format!("{} at {}", render::number(most), self.short_time(total.most_deleted_in)),
            };
            table.add_row([
                self.name(&total.table),
                or_none(total.transactions),
                or_none(rows.inserted),
                or_none(rows.statement_updates()),
                or_none(rows.deleted),
                or_none(total.truncates),
                or_none(total.ddl),
                most,
            ]);
        }
        let mut text = render::table_text(&table);
        if let Some(more) = totals.len().checked_sub(TABLES_SHOWN).filter(|more| *more > 0) {
            let _ = writeln!(text, "and {} more tables; --json shows all", render::number(more as u64));
        }
        text + "\n"
    }

    fn nothing(&self, report: &Report) -> String {
        let mut text = match self.filtered {
            true => "nothing of what was asked for was committed in that time\n".to_owned(),
            false => "nothing was committed in that time\n".to_owned(),
        };
        if self.filtered && !report.told.others.is_empty() {
            let names = fold(&report.told.others, self.screen.saturating_mul(3));
            let _ = writeln!(text, "what was touched: {names}");
        }
        text
    }

    /// What limits what is shown.
    fn remarks(&self, report: &Report) -> String {
        let Report { told, coverage, known_to, .. } = report;
        let mut text = String::new();
        let time = |time: PgTime| render::time(render::whole_seconds(time.timestamp()), &self.zone);
        match known_to {
            None => text += "nothing is archived\n",
            Some(known) if *known < report.from => {
                let line = format!("the archive ends before that, at {}", time(*known));
                let _ = writeln!(text, "{}", render::yellow(&line));
                text += "HINT: without --from the last hour of the archive is shown; walguard status says how far behind it is\n";
            }
            Some(known) => {
                let _ = writeln!(text, "archived to {}", render::time(known.timestamp(), &self.zone));
            }
        }
        if let Some(begins) = coverage.begins.filter(|begins| *begins > report.from) {
            let _ = writeln!(text, "{}", render::yellow(&format!("the archive begins at {}", time(begins))));
        }
        for unread in &coverage.unread {
            let (from, to) = (unread.range.from, unread.range.to);
            let line = format!("NOT READ: WAL from {from} to {to}: {}", unread.problem);
            let _ = writeln!(text, "{}", render::red(&line));
        }
        for index in &coverage.damaged_indexes {
            let _ = writeln!(text, "{}", render::yellow(&format!("index passed over, WAL read instead: {index}")));
            text += "HINT: walguard index rebuild --check\n";
        }
        if told.incomplete > 0 {
            let count = render::number(told.incomplete);
            let line = format!("{count} transactions began before what was read: their rows are at least those shown");
            let _ = writeln!(text, "{}", render::yellow(&line));
        }
        if told.left_out > 0 {
            let line = format!("{} counts found no room and are not shown", render::number(told.left_out));
            let _ = writeln!(text, "{}", render::yellow(&line));
        }
        if self.filtered && told.tables.len() > 1 {
            text += "a transaction that touched several of these tables counts once for each\n";
        }
        text
    }

    fn transactions(&self, report: &Report) -> String {
        let mut text = self.heading(report) + "\n";
        if report.told.transactions.is_empty() && !(self.filtered && report.transactions_are_largest) {
            text += &self.nothing(report);
        }
        for told in report.told.transactions.iter().take(TRANSACTIONS_SHOWN) {
            let xid = told.xid.map_or_else(|| "-".to_owned(), |xid| xid.to_string());
            let time = render::time(told.time.timestamp(), &self.zone);
            let at_least = if told.complete { "" } else { "  at least:" };
            let _ =
                writeln!(text, "{}  {time}  LSN {}{at_least}", render::bold(&format!("xid {xid}")), told.commit_lsn);
            text += &self.events(&told.events);
            for table in told.tables.iter().take(TABLES_SHOWN) {
                let _ = writeln!(text, "  {}", self.table_line(table));
            }
            if let Some(more) = told.tables.len().checked_sub(TABLES_SHOWN).filter(|more| *more > 0) {
                let _ = writeln!(text, "  and {more} more tables; --json shows all");
            }
        }
        if self.filtered && report.transactions_are_largest {
            text += "\nthe index of a segment knows its sixteen largest transactions: smaller ones that touched these tables are \
                     not shown; --bucket 1s reads the WAL\n";
        }
        let more = report.told.transactions.len().saturating_sub(TRANSACTIONS_SHOWN);
        if more > 0 {
            let _ = writeln!(text, "\nand {} smaller ones; --json shows more", render::number(more as u64));
        }
        text + "\n" + &self.remarks(report)
    }

    fn table_line(&self, table: &TableCount) -> String {
        let rows = &table.rows;
        let parts = [
            (rows.inserted, "inserted"),
            (rows.updated, "updated"),
            (rows.moved, "moved away"),
            (rows.deleted, "deleted"),
        ];
        let parts = parts.into_iter().filter(|(count, _)| *count > 0);
        let parts: Vec<_> = parts
            .map(|(count, word)| {
                let text = format!("{} {word}", render::number(count));
                if word == "deleted" { render::red(&text) } else { text }
            })
            .collect();
        format!("{}: {}", self.name(&table.table), parts.join(", "))
    }
}

/// Time in which nothing happened, in seconds.
#[derive(Clone, Copy, Debug, Default)]
struct Quiet {
    /// Before the archive begins.
    unknown: u64,
    silent: u64,
}

impl Quiet {
    fn add(&mut self, bucket: &Bucket, begins: Option<PgTime>) {
        let seconds = u64::try_from(bucket.to.since(bucket.from).as_secs()).unwrap_or_default();
        match begins {
            Some(begins) if bucket.to <= begins => self.unknown += seconds,
            _ => self.silent += seconds,
        }
    }
}

/// `59 minutes`, `10 seconds`, `3 h 20 min`, `2 d 4 h`.
fn span(seconds: u64) -> String {
    let many = |count: u64, unit: &str| format!("{count} {unit}{}", if count == 1 { "" } else { "s" });
    match seconds {
        ..60 => many(seconds, "second"),
        60..3_600 if seconds.is_multiple_of(60) => many(seconds / 60, "minute"),
        seconds if seconds.is_multiple_of(86_400) => many(seconds / 86_400, "day"),
        seconds => render::duration(Duration::from_secs(seconds)),
    }
}

/// What a chart must fit into.
#[derive(Clone, Copy, Debug)]
struct Room {
    screen: usize,
    time: usize,
    has_local: bool,
}

impl Columns {
    fn new(buckets: &[Bucket], room: Room) -> Self {
        let most_of = |of: fn(&Bucket) -> u64| buckets.iter().map(of).max().unwrap_or_default();
        let values = [
            most_of(|bucket| bucket.transactions),
            most_of(|bucket| bucket.rows.statement_inserts()),
            most_of(|bucket| bucket.rows.statement_updates()),
            most_of(|bucket| bucket.rows.deleted),
        ];
        let widths = |headers: [&str; 4]| {
            let mut widths = [0; 4];
            for ((width, header), value) in widths.iter_mut().zip(headers).zip(values) {
                *width = header.len().max(render::number(value).len());
            }
            widths
        };
        let times = if room.has_local { 2 * room.time + 2 } else { room.time };
        let left =
            |numbers: [usize; 4]| room.screen.saturating_sub(times + numbers.iter().sum::<usize>() + 2 * 4 + 2 * 2);
        let mut numbers = widths(HEADERS);
        if left(numbers) < 44 {
            numbers = widths(SHORT_HEADERS);
        }
        let bars = left(numbers).clamp(12, 120);
        let deletes = bars * 2 / 5;
        let most = [
            most_of(|bucket| bucket.rows.statement_inserts().saturating_add(bucket.rows.statement_updates())),
            values[3],
        ];
        Self { time: room.time, numbers, bars: [bars - deletes, deletes], most }
    }

    fn is_short(&self) -> bool {
        self.numbers.iter().zip(HEADERS).any(|(width, header)| *width < header.len())
    }
}

/// The buckets in which far more rows were deleted than in others; at most three.
fn standing_out(buckets: &[Bucket]) -> Vec<bool> {
    // Hours in which nothing happens say nothing about what is usual when something does.
    let busy = buckets.iter().filter(|bucket| !bucket.is_empty());
    let mut deletes: Vec<u64> = busy.map(|bucket| bucket.rows.deleted).collect();
    deletes.sort_unstable_by(|a, b| b.cmp(a));
    let (most, others) = deletes.split_first().map_or((0, &[][..]), |(most, others)| (*most, others));
    let usual = others.get(others.len() / 2).copied().unwrap_or_default();
    let third = others.get(1).copied().unwrap_or_default();
    let least = most.div_ceil(2).max(usual.saturating_mul(3)).max(1);
    let stands_out = |deleted: u64| deleted >= least && deleted >= third;
    let mut left = 3;
    buckets
        .iter()
        .map(|bucket| {
            let is_one = left > 0 && stands_out(bucket.rows.deleted);
            left -= usize::from(is_one);
            is_one
        })
        .collect()
}

/// As many names as fit into `room` columns, and how many others there are.
fn fold(names: &[String], room: usize) -> String {
    let mut text = String::new();
    for (place, name) in names.iter().enumerate() {
        let left = names.len() - place;
        let more = format!(" and {left} more");
        let separator = if place == 0 { "" } else { ", " };
        let needed = text.chars().count() + separator.len() + name.chars().count();
        let reserve = if left == 1 { 0 } else { more.len() + 2 };
        if place > 0 && needed + reserve > room {
            return text + &more;
        }
        text += separator;
        text += name;
    }
    text
}

/// What stands before the name of what is no table.
const fn kind_word(kind: Option<RelationKind>) -> &'static str {
    match kind {
        None | Some(RelationKind::Table | RelationKind::PartitionedTable | RelationKind::Toast) => "",
        Some(RelationKind::Index) => "index ",
        Some(RelationKind::Sequence) => "sequence ",
        Some(RelationKind::View) => "view ",
        Some(RelationKind::MaterializedView) => "materialized view ",
        Some(RelationKind::CompositeType) => "type ",
        Some(RelationKind::ForeignTable) => "foreign table ",
    }
}

const fn verb(kind: DdlKind) -> &'static str {
    match kind {
        DdlKind::Truncate => "TRUNCATE",
        DdlKind::DropTable => "DROP TABLE",
        DdlKind::DropOther => "DROP",
        DdlKind::DropSchema => "DROP SCHEMA",
        DdlKind::DropDatabase => "DROP DATABASE",
        DdlKind::DropColumn => "DROP COLUMN",
        DdlKind::DropTrigger => "DROP TRIGGER",
        DdlKind::DisableTrigger => "DISABLE TRIGGER",
        DdlKind::DropRule => "DROP RULE",
        DdlKind::DropPolicy => "DROP POLICY",
        DdlKind::DropEventTrigger => "DROP EVENT TRIGGER",
        DdlKind::DisableEventTrigger => "DISABLE EVENT TRIGGER",
        DdlKind::Create => "CREATE",
        DdlKind::Rewrite => "REWRITE",
        DdlKind::Alter => "ALTER",
    }
}

/// Whoever reads on.
enum Followers<'a> {
    Wal(Box<Follower<'a>>),
    /// Of each database whose changes are kept.
    Changes(Repository, BTreeMap<Oid, changes::walk::Follower>),
}

impl Followers<'_> {
    async fn go_on(&mut self, chronicle: &mut Chronicle) -> anyhow::Result<Followed> {
        match self {
            Self::Wal(follower) => Ok(follower.go_on(chronicle).await?),
            Self::Changes(repository, followers) => {
                // Another one may have begun.
                for database in repository.changed_databases().await? {
                    followers.entry(database).or_insert_with(|| repository.follow_changes(database));
                }
                let mut followed = Followed::default();
                for follower in followers.values_mut() {
                    followed.unread.extend(follower.go_on(chronicle).await?);
                }
                Ok(followed)
            }
        }
    }
}

/// Goes on as more is archived.
struct Following<'a> {
    context: Context,
    view: View,
    follower: Followers<'a>,
    chronicle: Chronicle,
    filter: Filter,
    rows_min: u64,
}

impl Following<'_> {
    async fn run(mut self, report: &Report, stop: CancellationToken) -> anyhow::Result<Outcome> {
        let mut lines = render::Lines::new();
        let is_terminal = render::is_terminal() && !self.context.json;
        if !self.context.json {
            render::print(&(self.view.heading(report) + "\n" + self.view.chart_header().trim_end()))?;
        }
        let mut next = report.from;
        // What was said of the bucket that is not over yet.
        let mut said = BTreeSet::new();
        let mut rounds = tokio::time::interval(POLL_INTERVAL);
        rounds.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while stop.run_until_cancelled(rounds.tick()).await.is_some() {
            let now = PgTime::from(Timestamp::now());
            if self.chronicle.buckets().iter().len() > FOLLOWED_BUCKETS_MAX {
                self.begin_anew(next)?;
            }
            self.chronicle.extend(after(now), &self.context.zone);
            let Some(followed) = stop.run_until_cancelled(self.follower.go_on(&mut self.chronicle)).await else {
                break;
            };
            // A store that is away is waited for: whoever looks on wants to go on looking on.
            let followed = followed.unwrap_or_else(|error| {
                tracing::warn!("read on: {error:#}");
                Followed::default()
            });
            for unread in &followed.unread {
                tracing::warn!("WAL from {} to {} not read: {}", unread.range.from, unread.range.to, unread.problem);
            }
            if let Some(timeline) = followed.timeline {
                tracing::warn!("a server was promoted: following timeline {timeline}");
            }
            let (told, begin) = (self.chronicle.tell(self.rows_min), next);
            for bucket in told.buckets.iter().skip_while(|bucket| bucket.from < begin) {
                let is_over = before(now, LATE) >= bucket.to;
                if self.context.json {
                    if is_over {
                        lines.print_json(bucket)?;
                    }
                } else {
                    self.show(bucket, &told.transactions, &mut said, Moment { is_over, is_terminal })?;
                }
                if !is_over {
                    break;
                }
                next = bucket.to;
            }
            lines.flush()?;
        }
        if is_terminal {
            render::print("")?;
        }
        Ok(Outcome::Done)
    }

    fn show(
        &self,
        bucket: &Bucket,
        transactions: &[TransactionTold],
        said: &mut BTreeSet<String>,
        moment: Moment,
    ) -> Result<(), PrintError> {
        let line = self.view.line(bucket, false);
        let line = line.trim_end();
        let details = self.view.details(bucket, false, transactions);
        let new: Vec<_> = details.lines().filter(|line| !said.contains(*line)).map(str::to_owned).collect();
        if moment.is_terminal {
            render::reprint_line(line)?;
        }
        if !new.is_empty() {
            // At once, and not when the bucket is over.
            render::print(&format!("{}{}", if moment.is_terminal { "\n" } else { "" }, new.join("\n")))?;
            said.extend(new);
        }
        if !moment.is_over {
            return Ok(());
        }
        said.clear();
        match (moment.is_terminal, bucket.is_empty()) {
            (true, true) => render::reprint_line(""),
            (true, false) => {
                render::reprint_line(line)?;
                render::print("")
            }
            (false, true) => Ok(()),
            (false, false) => render::print(line),
        }
    }

    /// Forgets what was shown.
    fn begin_anew(&mut self, from: PgTime) -> anyhow::Result<()> {
        let buckets = Buckets::new(from, after(from), self.chronicle.buckets().width(), &self.context.zone)?;
        self.chronicle = Chronicle::new(buckets, self.filter.clone());
        Ok(())
    }
}

/// How a bucket is shown to who follows.
#[derive(Clone, Copy, Debug)]
struct Moment {
    is_over: bool,
    is_terminal: bool,
}
