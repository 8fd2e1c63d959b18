//! `walguard incidents`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use jiff::Timestamp;
use walguard::detect::incident::{AnswerError, Incident, Rows, Signature, State, TableDamage, grouped};
use walguard::detect::{Relation, Severity, Who, WhoSource};
use walguard::notify::message::{self, Command};
use walguard::repo::evidence;
use walguard::repo::{RepoError, Repository};

use crate::Outcome;
use crate::args::{AnswerArgs, IncidentArgs, IncidentsArgs, IncidentsVerb, ReportArgs, RowsArgs};
use crate::context::Context;
use crate::incident_report;
use crate::render;
use crate::report::UsageError;

/// How often `--follow` looks.
const FOLLOW_EVERY: Duration = Duration::from_secs(1);

/// Tables and transactions shown to people. JSON has them all.
const LINES_SHOWN: usize = 40;

/// An answer could not be written down.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Answer(#[from] AnswerError),
    #[error("there is no incident {0}")]
    Unknown(String),
}

pub(crate) async fn run(context: Context, args: IncidentsArgs) -> anyhow::Result<Outcome> {
    let repository = context.initialized_repository().await?;
    match args.verb {
        None if args.follow => follow(&context, &repository, &args).await,
        None | Some(IncidentsVerb::List) => list(&context, &repository, &args).await,
        Some(IncidentsVerb::Show(args)) => show(&context, &repository, args).await,
        Some(IncidentsVerb::Ack(args)) => answer(&context, &repository, args, Incident::acknowledge).await,
        Some(IncidentsVerb::Resolve(args)) => answer(&context, &repository, args, Incident::resolve).await,
        Some(IncidentsVerb::Report(args)) => report(&context, &repository, args).await,
        Some(IncidentsVerb::Rows(args)) => rows(&repository, args).await,
    }
}

/// Who signs: `--by`, or the user of this shell.
pub(crate) fn signer(by: Option<String>) -> String {
    let user = || std::env::var("USER").ok().filter(|user| !user.is_empty());
    by.or_else(user).unwrap_or_else(|| "somebody".to_owned())
}

async fn list(context: &Context, repository: &Repository, args: &IncidentsArgs) -> anyhow::Result<Outcome> {
    let found = repository.incidents(Some(args.limit)).await?;
    let shown: Vec<_> = found.incidents.into_iter().filter(|incident| is_shown(incident, args)).collect();
    if context.json {
        render::print_json(&shown)?;
    } else if shown.is_empty() {
        render::print("no incidents")?;
    } else {
        let mut table = render::table(["incident", "when", "state", "severity", "what", "who"]);
        for incident in shown.iter().rev() {
            table.add_row(row(incident, context));
        }
        render::print(&render::table_text(&table))?;
    }
    for (key, problem) in &found.damaged {
        tracing::warn!(key, "an incident cannot be read: {problem}");
    }
    Ok(if found.damaged.is_empty() { Outcome::Done } else { Outcome::Attention })
}

/// By default what somebody may have to look at.
fn is_shown(incident: &Incident, args: &IncidentsArgs) -> bool {
    args.all || incident.is_told() && incident.severity > Severity::Info && !incident.state.is_closed()
}

fn row(incident: &Incident, context: &Context) -> [String; 6] {
    let severity = incident.severity.as_str();
    let severity = match incident.severity {
        Severity::Critical if !incident.state.is_closed() => render::red(severity),
        Severity::Warning if !incident.state.is_closed() => render::yellow(severity),
        _ => severity.to_owned(),
    };
    let state = match &incident.silenced_by {
        Some(_) => format!("{}, silenced", incident.state.as_str()),
        None => incident.state.as_str().to_owned(),
    };
    [
        incident.id.clone(),
        render::time(render::whole_seconds(incident.began_at), &context.zone),
        state,
        severity,
        render::printable(&incident.title),
        incident.who().map(brief).unwrap_or_default(),
    ]
}

/// `app@10.0.0.7 (psql)`.
fn brief(who: &Who) -> String {
    let Who { actor, source, .. } = who;
    if *source == WhoSource::Unknown {
        return "not known".to_owned();
    }
    let mut text = actor.role.clone().unwrap_or_else(|| "?".to_owned());
    if let Some(client) = &actor.client {
        let _ = write!(text, "@{client}");
    }
    if let Some(application) = actor.application.as_ref().filter(|name| !name.is_empty()) {
        let _ = write!(text, " ({application})");
    }
    if *source == WhoSource::Nearby {
        text += ", perhaps";
    }
    render::printable(&text)
}

async fn follow(context: &Context, repository: &Repository, args: &IncidentsArgs) -> anyhow::Result<Outcome> {
    let cancel = context.cancel_on_signals()?;
    let mut told: BTreeMap<String, u32> = BTreeMap::new();
    let mut lines = render::Lines::new();
    loop {
        let found = repository.incidents(Some(args.limit)).await?;
        for incident in &found.incidents {
            if told.get(&incident.id) == Some(&incident.revision) {
                continue;
            }
            told.insert(incident.id.clone(), incident.revision);
            if context.json {
                lines.print_json(incident)?;
            } else if is_shown(incident, args) || incident.revision > 1 {
                lines.print(&row(incident, context).join("  "))?;
            }
        }
        lines.flush()?;
        while told.len() > 10 * args.limit.max(1) {
            told.pop_first();
        }
        if cancel.run_until_cancelled(tokio::time::sleep(FOLLOW_EVERY)).await.is_none() {
            return Ok(Outcome::Done);
        }
    }
}

/// The incident of that id; `last` is the newest.
async fn find(repository: &Repository, id: &str, revision: Option<u32>) -> anyhow::Result<Incident> {
    let id = match id {
        "last" => repository.incident_ids().await?.pop().unwrap_or_else(|| id.to_owned()),
        id => id.to_owned(),
    };
    let found = match revision {
        Some(revision) => repository.incident_revision(&id, revision).await?,
        None => repository.incident(&id).await?,
    };
    found.ok_or_else(|| unknown(&id, revision))
}

fn unknown(id: &str, revision: Option<u32>) -> anyhow::Error {
    let revision = revision.map(|revision| format!(" with revision {revision}")).unwrap_or_default();
    let hint = "`walguard incidents --all` lists those that there are";
    UsageError::with_hint(format!("there is no incident {id}{revision}"), hint).into()
}

async fn show(context: &Context, repository: &Repository, args: IncidentArgs) -> anyhow::Result<Outcome> {
    let incident = find(repository, &args.id, args.revision).await?;
    if context.json {
        render::print_json(&incident)?;
    } else {
        render::print(&text(&incident, context))?;
    }
    Ok(Outcome::Done)
}

async fn answer(
    context: &Context,
    repository: &Repository,
    args: AnswerArgs,
    how: fn(&mut Incident, Signature) -> Result<(), AnswerError>,
) -> anyhow::Result<Outcome> {
    let id = find(repository, &args.id, None).await?.id;
    let signature = Signature { by: signer(args.by), at: Timestamp::now(), note: args.note };
    let answered = repository
        .revise_incident(&id, |newest| {
            let mut incident = newest.ok_or_else(|| Refused::Unknown(id.clone()))?;
            how(&mut incident, signature.clone())?;
            incident.updated_at = signature.at;
            Ok::<_, Refused>(Some(incident))
        })
        .await;
    let incident = match answered {
        Ok(incident) => incident.ok_or_else(|| unknown(&id, None))?,
        Err(Refused::Repo(error)) => return Err(error.into()),
        Err(refused) => return Err(UsageError::new(refused.to_string()).into()),
    };
    if context.json {
        render::print_json(&incident)?;
    } else {
        render::print(&format!("incident {} is {}", incident.id, incident.state.as_str()))?;
    }
    Ok(Outcome::Done)
}

async fn report(context: &Context, repository: &Repository, args: ReportArgs) -> anyhow::Result<Outcome> {
    let incident = find(repository, &args.id, None).await?;
    let place = incident_report::Place {
        cluster: &context.settings.cluster,
        reach: context.reach(),
        zone: &context.zone,
        at: Timestamp::now(),
    };
    let document = incident_report::document(&incident, &place);
    let text = if args.html { document.html() } else { document.markdown() };
    match &args.output {
        Some(path) => std::fs::write(path, &text)
            .map_err(|error| anyhow::Error::new(error).context(format!("write {}", path.display())))?,
        None => render::print(&text)?,
    }
    Ok(Outcome::Done)
}

/// Prints the rows that were saved as a script for psql.
async fn rows(repository: &Repository, args: RowsArgs) -> anyhow::Result<Outcome> {
    let incident = find(repository, &args.id, None).await?;
    let is_wanted = |name: &str| args.table.is_empty() || args.table.iter().any(|table| table == name);
    let mut databases: BTreeMap<&str, Vec<&Relation>> = BTreeMap::new();
    let mut wanted = 0;
    for saved in incident.evidence.iter().filter(|saved| saved.rows > 0 && is_wanted(&saved.table)) {
        wanted += 1;
        let mut relations = incident.tables.iter().filter_map(|table| table.relation.as_ref());
        let is_it = |one: &&Relation| saved.table == format!("{}.{}.{}", one.database_name, one.schema, one.name);
        let relation =
            relations.find(is_it).with_context(|| format!("find the table {} in the incident", saved.table))?;
        databases.entry(&relation.database_name).or_default().push(relation);
    }
    if wanted == 0 {
        let hint = "`walguard incidents report` says of which tables rows were saved, and why not of others";
        let id = &incident.id;
        return Err(UsageError::with_hint(format!("no rows of incident {id} were saved"), hint).into());
    }
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let broken = |error| anyhow::Error::from(render::PrintError::from(error));
    writeln!(out, "-- Rows that incident {} took, in one transaction for each database. For psql.", incident.id)
        .map_err(broken)?;
    for (database, relations) in databases {
        // A line's end in a name would begin a command of its own.
        anyhow::ensure!(!database.contains(['\n', '\r']), "the database {database:?} cannot be named in a script");
        let name = database.replace('"', "\"\"");
        writeln!(out, "\\connect \"{name}\"\nSET client_encoding = 'UTF8';\nBEGIN;").map_err(broken)?;
        // What refers to others was deleted before them, and comes back behind them.
        for relation in relations.iter().rev() {
            let Relation { schema, name, .. } = relation;
            let stored = repository.evidence(&incident.id, schema, name).await?;
            let stored = stored.with_context(|| format!("the rows of {} are gone", relation.full_name()))?;
            let decoder = zstd::stream::read::Decoder::with_buffer(&stored[..]).context("decompress saved rows")?;
            let mut csv = std::io::BufReader::new(decoder);
            evidence::write_copy(&mut csv, schema, name, &mut out)
                .with_context(|| format!("print the rows of {}", relation.full_name()))?;
        }
        writeln!(out, "COMMIT;").map_err(broken)?;
    }
    out.flush().map_err(broken)?;
    Ok(Outcome::Done)
}

/// Everything that a person at work on it wants to see at once.
fn text(incident: &Incident, context: &Context) -> String {
    let mut text = String::new();
    let time = |at| render::time(at, &context.zone);
    let _ = writeln!(text, "{}\n", render::bold(&render::printable(&incident.title)));
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(text, "{name:<14}{}", render::printable(value));
    };
    line("incident", &format!("{}, revision {}", incident.id, incident.revision));
    line("state", incident.state.as_str());
    line("severity", incident.severity.as_str());
    line("began", &time(incident.began_at));
    if incident.ended_at != incident.began_at {
        line("ended", &time(incident.ended_at));
    }
    line("noticed", &time(incident.detected_at));
    if let Some(lsn) = incident.first_harm {
        line("first harm", &format!("timeline {}, {lsn}", incident.timeline));
    }
    if let Some(silence) = &incident.silenced_by {
        line("silenced by", &format!("{} until {}: {}", silence.id, time(silence.until), silence.reason));
    }
    for (what, signature) in [("acknowledged", &incident.acknowledged), ("resolved", &incident.resolved)] {
        if let Some(Signature { by, at, note }) = signature {
            let note = note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
            line(what, &format!("by {by}, {}{note}", time(*at)));
        }
    }
    if let Some(who) = incident.who() {
        line("who", &incident_report::who_in_words(who));
        if let Some(query) = &who.actor.query {
            line("statement", query);
        }
    }
    text.push('\n');
    text += &tables_text(incident);
    if !incident.ddl.is_empty() {
        for ddl in incident.ddl.iter().take(LINES_SHOWN) {
            let object = ddl.object.as_ref().map(|object| format!(" {object}")).unwrap_or_default();
            let table = ddl.table.as_ref().map(|table| format!(" of {table}")).unwrap_or_default();
            let what = incident_report::ddl_in_words(ddl.kind);
            let _ = writeln!(text, "{}", render::printable(&format!("{}  {what}{object}{table}", ddl.lsn)));
        }
        text += &more(incident.ddl.len(), incident.ddl_more);
        text.push('\n');
    }
    for moment in incident.moments.iter().take(LINES_SHOWN) {
        let _ = writeln!(text, "{}  {}", time(moment.at), render::printable(&moment.text));
    }
    for note in &incident.notes {
        let _ = writeln!(text, "note: {}", render::printable(note));
    }
    for Command { purpose, command } in message::way_back(incident, &context.reach()) {
        let _ = writeln!(text, "\n{purpose}:\n  {command}");
    }
    text
}

fn more(all: usize, left_out: u64) -> String {
    let more = left_out + all.saturating_sub(LINES_SHOWN) as u64;
    if more == 0 { String::new() } else { format!("... and {} more\n", grouped(more)) }
}

fn tables_text(incident: &Incident) -> String {
    if incident.tables.is_empty() {
        return String::new();
    }
    let mut table = render::table(["table", "before", "after", "deleted", "updated", "inserted", ""]);
    for damage in incident.tables.iter().take(LINES_SHOWN) {
        let rows = |rows: Option<Rows>| rows.map_or_else(|| "?".to_owned(), |rows| rows.to_string());
        table.add_row([
            render::printable(&damage.name),
            rows(damage.before),
            rows(damage.after),
            grouped(damage.deleted),
            grouped(damage.updated),
            grouped(damage.inserted),
            fate(damage),
        ]);
    }
    render::table_text(&table) + &more(incident.tables.len(), incident.tables_more) + "\n"
}

/// What became of a table besides its rows.
pub(crate) fn fate(damage: &TableDamage) -> String {
    let mut words = Vec::new();
    for (is, word) in [(damage.truncated, "truncated"), (damage.dropped, "dropped"), (damage.replaced, "replaced")] {
        if is {
            words.push(word.to_owned());
        }
    }
    if let Some(formerly) = &damage.formerly {
        words.push(render::printable(&format!("was {formerly}")));
    }
    if let Some(parent) = &damage.partition_of {
        words.push(render::printable(&format!("partition of {parent}")));
    }
    words.join(", ")
}

/// What a state means, for people who see it for the first time.
pub(crate) const fn state_in_words(state: State) -> &'static str {
    match state {
        State::Open => "its transaction has not ended yet",
        State::Committed => "committed: it really happened",
        State::Aborted => "rolled back: nothing was changed",
        State::Acknowledged => "somebody is looking at it",
        State::Resolved => "closed",
    }
}
