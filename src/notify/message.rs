//! An incident as it is told to a person who was asleep a minute ago: what, which tables, who, when, whether it is
//! committed, and the command that brings it back. Pure: every channel lays out the same parts.

use std::fmt::Write as _;
use std::path::PathBuf;

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, Unit};

use crate::detect::incident::{Incident, Rows, TableDamage, TransactionState, grouped};
pub use crate::detect::incident::{Severity, State};
use crate::detect::{Who, WhoSource};

/// The version of the JSON of a message; greater numbers only add fields.
pub const FORMAT: u32 = 1;

/// Tables told one by one: a screen of a phone.
const TABLES_SHOWN: usize = 20;
/// Tables in the JSON: some 20 KiB at most with the longest names.
const TABLES_MAX: usize = 100;
/// Findings told one by one.
const FINDINGS_SHOWN: usize = 8;
/// Characters of a statement: enough to recognise it.
const QUERY_CHARS_MAX: usize = 500;
/// Characters of a name or a sentence. Postgres's own names have 63 bytes.
const NAME_CHARS_MAX: usize = 220;
/// Characters of what is said of how sure it is who did it: two sentences.
const NOTE_CHARS_MAX: usize = 400;
/// Characters of a title.
const TITLE_CHARS_MAX: usize = 200;

/// What of an incident is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Event {
    /// It was noticed.
    Opened,
    /// It is worse than what was told before.
    Raised,
    /// It concerns more tables, or twice the rows, than what was told before.
    Grown,
    /// What was a suspicion is committed.
    Committed,
    /// Its transaction was rolled back.
    Aborted,
    /// Somebody has seen it.
    Acknowledged,
    /// It is over.
    Resolved,
}

impl Event {
    /// Every one.
    pub fn all() -> Vec<Self> {
        use Event::{Aborted, Acknowledged, Committed, Grown, Opened, Raised, Resolved};
        vec![Opened, Raised, Grown, Committed, Aborted, Acknowledged, Resolved]
    }

    /// The name in settings, keys and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Opened => "opened",
            Self::Raised => "raised",
            Self::Grown => "grown",
            Self::Committed => "committed",
            Self::Aborted => "aborted",
            Self::Acknowledged => "acknowledged",
            Self::Resolved => "resolved",
        }
    }
}

/// What is sent: the parts of a message, and its JSON for the generic webhook and for commands.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Message {
    /// The version of this structure.
    pub format: u32,
    /// Names this message: the same for every try, so that a receiver can tell a repetition.
    pub delivery: String,
    /// Names the incident for receivers that keep one alert for it.
    pub dedup_key: String,
    /// True for `walguard notify test`: nothing has happened.
    pub test: bool,
    /// The cluster's name in the repository.
    pub cluster: String,
    /// The incident's id.
    pub incident: String,
    /// Which revision of it is told.
    pub revision: u32,
    /// What of it is told.
    pub event: Event,
    /// How bad it is.
    pub severity: Severity,
    /// How far it is.
    pub state: State,
    /// Whether data or definitions are really gone. `null` for what is no transaction's doing.
    pub committed: Option<bool>,
    /// What happened, in a line.
    pub title: String,
    /// What the rules say, a sentence each.
    pub findings: Vec<String>,
    /// What became of which table, the worst first.
    pub tables: Vec<Table>,
    /// Tables that were too many.
    pub tables_more: u64,
    /// Rows missing now, of all tables.
    pub rows_lost: u64,
    /// Who did it, in a sentence.
    pub who: String,
    /// How that is known.
    pub who_source: WhoSource,
    /// The statement.
    pub query: Option<String>,
    /// When the first of it was committed, by the server's clock, or noticed.
    pub began_at: Timestamp,
    /// When the last of it was.
    pub ended_at: Timestamp,
    /// When the agent noticed it.
    pub detected_at: Timestamp,
    /// What was done against it, a sentence each.
    pub actions: Vec<String>,
    /// Who acknowledged or resolved it, and what he said.
    pub answer: Option<String>,
    /// What could not be found out.
    pub notes: Vec<String>,
    /// What can be done now.
    pub commands: Vec<Command>,
    /// Seconds between the moment when this should have been told and the sending, if it is late.
    pub late_seconds: Option<u64>,
    /// It may have been sent before: nobody knows whether it arrived.
    pub repeated: bool,
    /// The whole message as plain text.
    pub text: String,
}

/// A table of an incident.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Table {
    /// `database.schema.table`.
    pub name: String,
    /// Rows before.
    pub before: Option<Rows>,
    /// Rows after.
    pub after: Option<Rows>,
    /// What happened to it: `24 deleted`, `truncated`, `dropped` ...
    pub what: String,
}

/// A command and what it is good for.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Command {
    /// What it does.
    pub purpose: String,
    /// The line to type.
    pub command: String,
}

/// What a message needs to know beside the incident.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The cluster's name in the repository.
    pub cluster: String,
    /// How whoever reads it reaches the same repository.
    pub reach: Reach,
    /// The zone in which times are shown beside UTC.
    pub zone: TimeZone,
}

/// What a command in a message needs so that it works as it stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Flags that name the settings file, and what was not in it but on the command line or in the environment: the
    /// repository, the cluster. One word each.
    pub flags: Vec<String>,
    /// Where restored clusters go, each in a directory of its own.
    pub restore_dir: PathBuf,
    /// Changes come by logical replication: what is restored goes into an empty database.
    pub is_logical: bool,
}

impl Reach {
    /// A command with these flags behind it.
    fn command(&self, words: &[&str]) -> String {
        let words = ["walguard"].into_iter().chain(words.iter().copied());
        words.chain(self.flags.iter().map(String::as_str)).map(quote).collect::<Vec<_>>().join(" ")
    }
}

/// How and when a message is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sending {
    /// To which channel.
    pub channel: String,
    /// What of the incident is told.
    pub event: Event,
    /// The event in names: `opened`, `grown7`.
    pub key: String,
    /// When it should have been told.
    pub due_at: Timestamp,
    /// For how long it has been due, if that is worth a word.
    pub late: Option<SignedDuration>,
    /// It may have been sent before.
    pub repeated: bool,
}

impl Message {
    /// What is told of an incident.
    pub fn of_incident(incident: &Incident, sending: &Sending, setting: &Setting) -> Self {
        let mut tables: Vec<&TableDamage> = incident.tables.iter().collect();
        tables.sort_by_key(|table| std::cmp::Reverse(lost(table)));
        let more = incident.tables_more.saturating_add(tables.len().saturating_sub(TABLES_MAX) as u64);
        let unknown = Who::default();
        let who = incident.who().unwrap_or(&unknown);
        let mut message = Self {
            format: FORMAT,
            delivery: format!("{}/{}/{}/{}", setting.cluster, incident.id, sending.channel, sending.key),
            dedup_key: format!("walguard/{}/{}", setting.cluster, incident.id),
            test: false,
            cluster: setting.cluster.clone(),
            incident: incident.id.clone(),
            revision: incident.revision,
            event: sending.event,
            severity: incident.severity,
            state: incident.state,
            committed: (!incident.is_condition()).then(|| incident.is_committed()),
            title: clean(&incident.title, TITLE_CHARS_MAX),
            findings: findings(incident),
            tables: tables.into_iter().take(TABLES_MAX).map(Table::of).collect(),
            tables_more: more,
            rows_lost: incident.rows_lost(),
            who: if incident.is_condition() { String::new() } else { who_text(who) },
            who_source: who.source,
            query: who.actor.query.as_deref().map(|query| clean(query, QUERY_CHARS_MAX)).filter(|q| !q.is_empty()),
            began_at: incident.began_at,
            ended_at: incident.ended_at,
            detected_at: incident.detected_at,
            actions: actions(incident),
            answer: answer(incident),
            notes: incident.notes.iter().take(FINDINGS_SHOWN).map(|note| clean(note, NAME_CHARS_MAX)).collect(),
            commands: commands(incident, who, setting),
            late_seconds: sending.late.map(|late| u64::try_from(late.as_secs()).unwrap_or(0)),
            repeated: sending.repeated,
            text: String::new(),
        };
        message.text = message.to_text(&setting.zone);
        message
    }

    /// A message that says that nothing has happened: for trying a channel.
    pub fn test(channel: &str, now: Timestamp, nonce: u64, setting: &Setting) -> Self {
        let mut message = Self {
            format: FORMAT,
            delivery: format!("{}/test-{nonce:016x}/{channel}/opened", setting.cluster),
            dedup_key: format!("walguard/{}/test-{nonce:016x}", setting.cluster),
            test: true,
            cluster: setting.cluster.clone(),
            incident: format!("test-{nonce:016x}"),
            revision: 1,
            event: Event::Opened,
            severity: Severity::Info,
            state: State::Resolved,
            committed: None,
            title: "this is a test, nothing has happened".to_owned(),
            findings: vec![format!("walguard can reach you through the channel {channel}")],
            tables: Vec::new(),
            tables_more: 0,
            rows_lost: 0,
            who: String::new(),
            who_source: WhoSource::Unknown,
            query: None,
            began_at: now,
            ended_at: now,
            detected_at: now,
            actions: Vec::new(),
            answer: None,
            notes: Vec::new(),
            commands: Vec::new(),
            late_seconds: None,
            repeated: false,
            text: String::new(),
        };
        message.text = message.to_text(&setting.zone);
        message
    }

    /// The first words: how bad, or that it is over.
    pub fn label(&self) -> &'static str {
        match (self.test, self.event, self.severity) {
            (true, ..) => "TEST",
            (_, Event::Resolved, _) => "RESOLVED",
            (_, Event::Aborted, _) => "ROLLED BACK",
            (_, Event::Acknowledged, _) => "ACKNOWLEDGED",
            (_, _, Severity::Critical) => "CRITICAL",
            (_, _, Severity::Warning) => "WARNING",
            (_, _, Severity::Info) => "INFO",
        }
    }

    /// One line that says it all: the subject of an e-mail, the summary of an alert.
    pub fn headline(&self) -> String {
        let is_open = self.committed == Some(false) && self.state == State::Open;
        let open = if is_open { " - NOT COMMITTED YET" } else { "" };
        let after = match self.event {
            _ if self.test => "",
            Event::Committed => " - now COMMITTED",
            Event::Aborted => " - nothing was lost",
            Event::Raised => " - worse than told before",
            Event::Grown => " - more than told before",
            Event::Opened if self.state == State::Resolved => " - already resolved",
            Event::Opened if self.state == State::Aborted => " - already rolled back, nothing was lost",
            Event::Opened | Event::Acknowledged | Event::Resolved => "",
        };
        let late = if self.late_seconds.is_some() { "LATE: " } else { "" };
        format!("{late}{} {}: {}{after}{open}", self.label(), self.cluster, self.title)
    }

    /// What must be said before all else: that the message is late, or perhaps a repetition.
    pub fn warnings(&self, zone: &TimeZone) -> Vec<String> {
        let mut said = Vec::new();
        if let Some(seconds) = self.late_seconds {
            said.push(format!(
                "This message is late by {}. It was detected at {} and could not be delivered before.",
                span_text(seconds),
                time_text(self.detected_at, zone)
            ));
        }
        if self.repeated {
            said.push(
                "You may have got this message before: walguard was interrupted while it was sending it.".to_owned(),
            );
        }
        said
    }

    /// The facts, each with its name, in the order in which one asks for them.
    pub fn facts(&self, zone: &TimeZone) -> Vec<(&'static str, String)> {
        let mut facts = Vec::new();
        if let Some(answer) = &self.answer {
            facts.push(("Answer", answer.clone()));
        }
        if !self.findings.is_empty() {
            facts.push(("What", self.findings.join("\n")));
        }
        match self.committed {
            Some(true) if self.ended_at == self.began_at => {
                facts.push(("Committed", format!("yes, at {}", time_text(self.began_at, zone))));
            }
            Some(true) => facts.push((
                "Committed",
                format!("yes, from {} to {}", time_text(self.began_at, zone), time_text(self.ended_at, zone)),
            )),
            Some(false) if self.state == State::Aborted => {
                facts.push(("Committed", "no, it was rolled back".to_owned()));
            }
            Some(false) => facts.push(("Committed", "not yet: the transaction is still open".to_owned())),
            None => {}
        }
        facts.push(("Detected", self.detected_text(zone)));
        if !self.who.is_empty() {
            facts.push(("Who", self.who.clone()));
        }
        if let Some(query) = &self.query {
            facts.push(("Query", query.clone()));
        }
        if !self.actions.is_empty() {
            facts.push(("Done", self.actions.join("\n")));
        }
        if !self.notes.is_empty() {
            facts.push(("Unknown", self.notes.join("\n")));
        }
        facts
    }

    fn detected_text(&self, zone: &TimeZone) -> String {
        let at = time_text(self.detected_at, zone);
        let after = self.detected_at.duration_since(self.began_at);
        match self.committed {
            // Before or after within a clock's error is not worth a word.
            Some(true) if after > SignedDuration::from_secs(2) => {
                format!("{at}, {} after the first commit", span_text(u64::try_from(after.as_secs()).unwrap_or(0)))
            }
            _ => at,
        }
    }

    /// The tables with their rows before and after, in columns; at most `lines` of them, and a line for the rest.
    pub fn table_lines(&self, lines: usize) -> Vec<String> {
        let shown = self.tables.len().min(lines).min(TABLES_SHOWN);
        let rows = self.tables.iter().take(shown).map(|table| (table.name.as_str(), table.rows_text(), &table.what));
        let rows: Vec<_> = rows.collect();
        let width = |text: &str| text.chars().count();
        let name_width = rows.iter().map(|(name, ..)| width(name)).max().unwrap_or(0);
        let rows_width = rows.iter().map(|(_, rows, _)| width(rows)).max().unwrap_or(0);
        let mut said: Vec<String> = rows
            .iter()
            .map(|(name, rows, what)| {
                let (name_pad, rows_pad) = (name_width - width(name), rows_width - width(rows));
                format!("{name}{:name_pad$}  {rows}{:rows_pad$}  {what}", "", "").trim_end().to_owned()
            })
            .collect();
        let more = self.tables_more.saturating_add((self.tables.len() - shown) as u64);
        if more > 0 {
            said.push(format!("and {} more", grouped(more)));
        }
        said
    }

    /// What stands at the end: where it is from.
    pub fn footer(&self) -> String {
        if self.test {
            return format!("walguard, cluster {}", self.cluster);
        }
        format!("walguard, cluster {}, incident {}, revision {}", self.cluster, self.incident, self.revision)
    }

    /// The whole message as text for a fixed-width font.
    fn to_text(&self, zone: &TimeZone) -> String {
        let mut text = self.headline() + "\n";
        for warning in self.warnings(zone) {
            let _ = write!(text, "\n{warning}\n"); // writing into a String does not fail
        }
        text.push('\n');
        for (name, value) in self.facts(zone) {
            for (index, line) in value.lines().enumerate() {
                let name = if index == 0 { name } else { "" };
                let _ = writeln!(text, "{name:<10} {line}");
            }
        }
        let tables = self.table_lines(TABLES_SHOWN);
        if !tables.is_empty() {
            text += "\nTables, rows before -> after:\n";
            for line in tables {
                let _ = writeln!(text, "  {line}");
            }
        }
        for command in &self.commands {
            let _ = write!(text, "\n{}:\n  {}\n", command.purpose, command.command);
        }
        let _ = write!(text, "\n{}\n", self.footer());
        text
    }
}

impl Table {
    fn of(table: &TableDamage) -> Self {
        let mut what = Vec::new();
        if table.dropped {
            what.push("dropped".to_owned());
        }
        if table.truncated {
            what.push("truncated".to_owned());
        }
        if table.replaced {
            what.push("replaced by another table".to_owned());
        }
        if let Some(formerly) = &table.formerly {
            what.push(format!("was {}", clean(formerly, NAME_CHARS_MAX)));
        }
        for (count, verb) in [(table.deleted, "deleted"), (table.updated, "updated"), (table.inserted, "inserted")] {
            if count > 0 {
                what.push(format!("{} {verb}", grouped(count)));
            }
        }
        let name = clean(&table.name, NAME_CHARS_MAX);
        Self { name, before: table.before, after: table.after, what: what.join(", ") }
    }

    /// `24 -> 0`.
    fn rows_text(&self) -> String {
        let text = |rows: Option<Rows>| rows.map_or_else(|| "?".to_owned(), |rows| rows.to_string());
        format!("{} -> {}", text(self.before), text(self.after))
    }
}

/// Rows that a table lost; a dropped one whose rows nobody counted stands before those that lost few.
fn lost(table: &TableDamage) -> (u64, bool) {
    let gone = match (table.before, table.after) {
        (Some(before), Some(after)) => before.count.saturating_sub(after.count),
        _ => table.deleted.saturating_sub(table.inserted),
    };
    (gone, table.dropped || table.truncated)
}

fn findings(incident: &Incident) -> Vec<String> {
    let mut findings: Vec<_> = incident.findings.iter().filter(|finding| !finding.silenced).collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity)); // stable: otherwise as they were found
    let more = incident.findings_more.saturating_add(findings.len().saturating_sub(FINDINGS_SHOWN) as u64);
    let mut said: Vec<_> =
        findings.into_iter().take(FINDINGS_SHOWN).map(|finding| clean(&finding.text, NAME_CHARS_MAX)).collect();
    if more > 0 {
        said.push(format!("and {} more findings", grouped(more)));
    }
    said
}

fn actions(incident: &Incident) -> Vec<String> {
    let said = incident.actions.iter().take(FINDINGS_SHOWN).map(|action| {
        let of = action.pid.map(|pid| format!(" of process {pid}")).unwrap_or_default();
        let result = match action.aborted {
            Some(true) => "; the transaction was rolled back",
            Some(false) => "; the transaction was NOT rolled back",
            None => "",
        };
        format!("{}{of}: {}{result}", clean(&action.kind, NAME_CHARS_MAX), clean(&action.outcome, NAME_CHARS_MAX))
    });
    let mut said: Vec<_> = said.collect();
    if !incident.evidence.is_empty() {
        let rows = incident.evidence.iter().map(|evidence| evidence.rows).fold(0, u64::saturating_add);
        said.push(format!("{} deleted rows were saved beside the incident", grouped(rows)));
    }
    said
}

fn answer(incident: &Incident) -> Option<String> {
    let (verb, signature) = match (&incident.resolved, &incident.acknowledged) {
        (Some(signature), _) => ("resolved", signature),
        (None, Some(signature)) => ("acknowledged", signature),
        (None, None) => return None,
    };
    let note = signature.note.as_deref().map(|note| format!(": {}", clean(note, NAME_CHARS_MAX))).unwrap_or_default();
    Some(format!("{verb} by {}{note}", clean(&signature.by, NAME_CHARS_MAX)))
}

/// Who did it, and how sure that is, in a sentence.
fn who_text(who: &Who) -> String {
    let actor = &who.actor;
    let mut parts = Vec::new();
    let mut part = |name: &str, value: Option<&str>| {
        if let Some(value) = value.map(|value| clean(value, NAME_CHARS_MAX)).filter(|value| !value.is_empty()) {
            parts.push(format!("{name} {value}"));
        }
    };
    part("role", actor.role.as_deref());
    part("logged in as", actor.session_user.as_deref().filter(|user| actor.role.as_deref() != Some(*user)));
    part("database", actor.database.as_deref());
    part("application", actor.application.as_deref());
    part("from", actor.client.as_deref());
    part("process", actor.pid.map(|pid| pid.to_string()).as_deref());
    part("", actor.backend_type.as_deref().filter(|kind| *kind != "client backend"));
    part("prepared transaction", actor.prepared.as_deref());
    let sure = match who.source {
        WhoSource::Guard => "certain: written into the WAL by the same transaction",
        WhoSource::Activity => "seen in pg_stat_activity with this transaction",
        WhoSource::Nearby => "likely, not certain: seen about then, but not with this transaction",
        WhoSource::Unknown => "nobody saw it",
    };
    let note = who.note.as_deref().map(|note| format!("; {}", clean(note, NOTE_CHARS_MAX))).unwrap_or_default();
    if parts.is_empty() { format!("unknown ({sure}{note})") } else { format!("{} ({sure}{note})", parts.join(", ")) }
}

fn commands(incident: &Incident, who: &Who, setting: &Setting) -> Vec<Command> {
    let mut commands = Vec::new();
    let mut push = |purpose: &str, command: String| commands.push(Command { purpose: purpose.to_owned(), command });
    let is_open = |state: TransactionState| matches!(state, TransactionState::Open);
    if incident.state == State::Open
        && incident.transactions.iter().any(|transaction| is_open(transaction.state))
        && let Some(pid) = who.actor.pid
        && who.source >= WhoSource::Activity
    {
        push("Stop it before it commits, in psql", format!("SELECT pg_terminate_backend({pid});"));
    }
    let reach = &setting.reach;
    if !incident.state.is_closed() {
        way_back(incident, reach).into_iter().for_each(|Command { purpose, command }| push(&purpose, command));
    }
    push("See all of it", reach.command(&["incidents", "show", &incident.id]));
    if incident.acknowledged.is_none() && !incident.state.is_closed() {
        push("Say that you have it", reach.command(&["incidents", "ack", &incident.id]));
    }
    commands
}

/// The commands that bring back what an incident took; none if nothing of it is committed. They need nothing but to be
/// run, by the user that PostgreSQL runs as.
pub fn way_back(incident: &Incident, reach: &Reach) -> Vec<Command> {
    if incident.first_harm.is_none() {
        return Vec::new();
    }
    let target = format!("before:{}", incident.id);
    let place = reach.restore_dir.join(&incident.id).display().to_string();
    if reach.is_logical {
        let with = |last: &str| reach.command(&["restore", "--to", &target, "--target-dir", &place, last]);
        let purposes = [
            ("See what can be rebuilt; this writes nothing", with("--dry-run")),
            (
                "Get back what was there just before, in a new server in that directory, as any user but root. The running \
                 database is not touched",
                with("--yes"),
            ),
        ];
        let commands = purposes.map(|(purpose, command)| Command { purpose: purpose.to_owned(), command });
        return commands.into_iter().chain(put_back(incident, reach)).collect();
    }
    // Promoted, because a server that waits keeps what the harmful transaction had locked, so that nobody could look.
    let restore = ["restore", "--to", &target, "--target-dir", &place, "--action", "promote"];
    let with = |last: &str| reach.command(&[restore.as_slice(), &[last]].concat());
    [
        ("See what going back keeps and what it costs; this writes nothing", with("--dry-run")),
        (
            "Get back what was there just before, in a new directory, as the user that PostgreSQL runs as. The running \
             database is not touched; what comes next is said at the end",
            with("--yes"),
        ),
    ]
    .map(|(purpose, command)| Command { purpose: purpose.to_owned(), command })
    .into_iter()
    .chain(put_back(incident, reach))
    .collect()
}

/// The command that puts rows back that were saved beside the incident.
fn put_back(incident: &Incident, reach: &Reach) -> Option<Command> {
    let rows = incident.evidence.iter().map(|saved| saved.rows).fold(0, u64::saturating_add);
    let tables = incident.evidence.iter().filter(|saved| saved.rows > 0).count();
    let rows_of = if tables == 1 { "1 table".to_owned() } else { format!("{tables} tables") };
    (rows > 0).then(|| Command {
        purpose: format!(
            "Or put the {} saved rows of {rows_of} back into the running database, as a role that may insert there (PGHOST, \
             PGUSER)",
            grouped(rows)
        ),
        command: format!(
            "{} | psql -X -v ON_ERROR_STOP=1 -d postgres",
            reach.command(&["incidents", "rows", &incident.id])
        ),
    })
}

/// A word for a shell.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | ':');
    if !text.is_empty() && text.chars().all(plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// A text that came from a database, for one line: no control characters, none that turn the direction of writing, and
/// not longer than `chars_max` characters.
pub(super) fn clean(text: &str, chars_max: usize) -> String {
    let turns = |c: char| matches!(c, '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}');
    // Four bytes are the longest character, and what is cut is cut before it is looked at: it may be very long.
    let mut out = String::new();
    let mut count = 0;
    for c in text.chars() {
        if count == chars_max {
            out.push_str("...");
            break;
        }
        let c = match c {
            c if turns(c) => continue,
            c if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') => ' ',
            c => c,
        };
        if c == ' ' && out.ends_with(' ') {
            continue;
        }
        out.push(c);
        count += 1;
    }
    out.trim().to_owned()
}

/// `2025-12-17 06:14:59.12 UTC (08:14:59.12 Asia/Jerusalem)`, to the millisecond.
pub(super) fn time_text(time: Timestamp, zone: &TimeZone) -> String {
    let time = time.round(Unit::Millisecond).unwrap_or(time);
    let (utc, local) = (time.to_zoned(TimeZone::UTC), time.to_zoned(zone.clone()));
    let digits = if time.subsec_nanosecond() == 0 { "" } else { "%.f" };
    let text = utc.strftime(&format!("%Y-%m-%d %H:%M:%S{digits} UTC")).to_string();
    if local.offset() == jiff::tz::Offset::UTC {
        return text;
    }
    let date = if local.date() == utc.date() { "" } else { "%Y-%m-%d " };
    let name = zone.iana_name().map_or_else(|| local.strftime("%:z").to_string(), str::to_owned);
    format!("{text} ({} {name})", local.strftime(&format!("{date}%H:%M:%S{digits}")))
}

/// `45 s`, `12 min`, `3 h 05 min`.
pub(super) fn span_text(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        _ => format!("{} h {:02} min", seconds / 3_600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{incident, open, second};
    use super::*;
    use crate::detect::incident::Signature;

    fn setting() -> Setting {
        Setting {
            cluster: "main".to_owned(),
            reach: Reach {
                flags: ["--config", "/etc/walguard.toml"].map(str::to_owned).into(),
                restore_dir: "/srv/restored".into(),
                is_logical: false,
            },
            zone: TimeZone::get("Asia/Jerusalem").unwrap(),
        }
    }

    fn sending(event: Event) -> Sending {
        let (channel, key) = ("oncall".to_owned(), event.name().to_owned());
        Sending { channel, event, key, due_at: second(0), late: None, repeated: false }
    }

    fn told(incident: &Incident, event: Event) -> Message {
        Message::of_incident(incident, &sending(event), &setting())
    }

    fn at() -> Timestamp {
        "2025-12-17T06:14:59.12Z".parse().unwrap()
    }

    /// The example of the README is what a message really looks like.
    #[test]
    fn a_message_says_what_which_tables_who_when_and_the_way_back() {
        let text = told(&incident(0, at()), Event::Opened).text;
        let readme = include_str!("../../README.md");
        let example = readme.split("```\nCRITICAL main").nth(1).unwrap().split("```").next().unwrap();
        assert!(text.starts_with(&format!("CRITICAL main{example}")), "{text}");
        assert!(text.contains("\n  walguard incidents ack 00000001-000000001A2B3C40 --config /etc/walguard.toml\n"));
        assert!(text.ends_with("\nwalguard, cluster main, incident 00000001-000000001A2B3C40, revision 1\n"));
    }

    #[test]
    fn what_comes_by_logical_replication_goes_back_into_a_new_server() {
        let mut setting = setting();
        setting.reach.is_logical = true;
        let text = Message::of_incident(&incident(0, at()), &sending(Event::Opened), &setting).text;
        let line = "  walguard restore --to before:00000001-000000001A2B3C40 --target-dir /srv/restored/00000001-000000001A2B3C40 \
                    --yes --config /etc/walguard.toml\n";
        assert!(text.contains(line) && !text.contains("--action"), "{text}");
    }

    #[test]
    fn a_suspicion_says_that_it_is_not_committed_and_how_to_stop_it() {
        let message = told(&open(incident(0, at())), Event::Opened);
        assert!(message.headline().ends_with("NOT COMMITTED YET"), "{}", message.headline());
        assert_eq!(message.committed, Some(false));
        assert!(message.text.contains("not yet: the transaction is still open"));
        assert!(message.text.contains("SELECT pg_terminate_backend(4242);"));
        assert!(!message.text.contains("walguard restore"), "nothing is lost yet");
    }

    #[test]
    fn nobody_is_told_to_kill_a_session_that_is_only_likely() {
        let mut incident = open(incident(0, at()));
        incident.transactions[0].who.source = WhoSource::Nearby;
        let message = told(&incident, Event::Opened);
        assert!(message.who.contains("likely, not certain"));
        assert!(!message.text.contains("pg_terminate_backend"));
    }

    #[test]
    fn the_headline_says_how_it_goes_on() {
        let first = incident(0, at());
        let signature = Signature { by: "ada".to_owned(), at: at(), note: Some("mine".to_owned()) };
        let over = Incident { state: State::Resolved, resolved: Some(signature), ..first.clone() };
        let aborted = Incident { state: State::Aborted, first_harm: None, transactions: Vec::new(), ..first.clone() };
        for (incident, event, headline) in [
            (&first, Event::Opened, "CRITICAL main: 4 tables emptied, 95 rows gone"),
            (&first, Event::Committed, "CRITICAL main: 4 tables emptied, 95 rows gone - now COMMITTED"),
            (&first, Event::Grown, "CRITICAL main: 4 tables emptied, 95 rows gone - more than told before"),
            (&aborted, Event::Aborted, "ROLLED BACK main: 4 tables emptied, 95 rows gone - nothing was lost"),
            (&over, Event::Resolved, "RESOLVED main: 4 tables emptied, 95 rows gone"),
        ] {
            assert_eq!(told(incident, event).headline(), headline);
        }
        assert!(told(&over, Event::Resolved).text.contains("Answer     resolved by ada: mine"));
    }

    #[test]
    fn a_late_message_says_so_first_and_when_it_was_detected() {
        let late = Some(SignedDuration::from_secs(3_725));
        let message = Message::of_incident(
            &incident(0, at()),
            &Sending { late, repeated: true, ..sending(Event::Opened) },
            &setting(),
        );
        assert_eq!(message.late_seconds, Some(3_725));
        assert!(message.headline().starts_with("LATE: CRITICAL"));
        let warning = "This message is late by 62 min. It was detected at 2025-12-17 06:14:59.12 UTC";
        assert!(message.text.contains(warning), "{}", message.text);
        assert!(message.text.contains("You may have got this message before"));
    }

    #[test]
    fn what_is_no_transactions_doing_has_no_author_and_no_restore() {
        let mut incident = Incident::new("i".to_owned(), crate::pg::TimelineId::FIRST, at());
        incident.title = "the newest backup is 76 % smaller than the one before".to_owned();
        let message = told(&incident, Event::Opened);
        assert_eq!((message.committed, message.who.as_str()), (None, ""));
        assert!(!message.headline().contains("COMMITTED") && !message.text.contains("Who"), "{}", message.text);
    }

    #[test]
    fn nothing_that_a_database_says_breaks_a_line_or_turns_the_writing() {
        let mut incident = incident(0, at());
        incident.title = "a\r\nBcc: x@y\u{202E}\u{0}\u{1b}[31m".to_owned();
        incident.tables[0].name = format!("shop.public.\"evil\ntable\u{7}\"{}", "x".repeat(9_000));
        incident.transactions[0].who.actor.query = Some("DELETE\n\n  FROM users -- ".repeat(1_000));
        let message = told(&incident, Event::Opened);
        assert_eq!(message.title, "a Bcc: x@y [31m");
        assert!(message.text.len() < 8_000, "{}", message.text.len());
        let is_plain = |c: char| c == '\n' || !c.is_control();
        assert!(message.text.chars().all(is_plain));
    }

    #[test]
    fn a_thousand_tables_give_a_message_that_one_can_read() {
        let mut incident = incident(0, at());
        let table = incident.tables[0].clone();
        incident.tables = (0..1_000)
            .map(|n| TableDamage {
                name: format!("shop.public.t{n}"),
                before: Some(Rows { count: n, exact: n % 2 == 0 }),
                ..table.clone()
            })
            .collect();
        incident.tables_more = 7;
        let message = told(&incident, Event::Opened);
        assert_eq!((message.tables.len(), message.tables_more), (TABLES_MAX, 907));
        let lines = message.table_lines(10);
        assert_eq!((lines.len(), lines[10].as_str()), (11, "and 997 more"));
        assert!(lines[0].starts_with("shop.public.t999  about 999 -> 0"), "the worst first: {lines:?}");
    }

    #[test]
    fn the_settings_file_is_named_as_a_shell_needs_it() {
        assert_eq!(quote("/etc/walguard.toml"), "/etc/walguard.toml");
        assert_eq!(quote("/srv/my db's.toml"), "'/srv/my db'\\''s.toml'");
        assert_eq!(quote(""), "''");
    }
}
