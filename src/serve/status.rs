//! What the agent is doing, as one value.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use jiff::Timestamp;

use crate::notify::queue::ChannelStatus;
use crate::pg::{Lsn, Position, SegmentSize, ServerVersion, SystemId};
use crate::repo::drills::Drill;

/// What the agent told at one moment. Also what `GET /status` answers, as JSON.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Status {
    /// walguard's version.
    pub version: String,
    /// The cluster's name in the repository.
    pub cluster: String,
    /// Where the repository is. Holds no secret.
    pub repository: String,
    /// The agent's machine; empty if no agent runs.
    pub host: String,
    /// The agent's process there.
    pub pid: u32,
    /// When the agent was started.
    pub started_at: Option<Timestamp>,
    /// When this was told.
    pub at: Option<Timestamp>,
    /// The server that is streamed from.
    pub server: Server,
    /// Everything before this was received.
    pub received: Option<Position>,
    /// Everything before this is synced in the spool.
    pub spooled: Option<Position>,
    /// Everything before this is durable in the repository.
    pub archived: Option<Position>,
    /// Whatever was committed by this moment, by the server's clock, is archived: it is proved now and then, when no
    /// transaction is under way. It rises on a quiet server, too.
    pub caught_up_to: Option<Timestamp>,
    /// Where that ends.
    pub caught_up_position: Option<Position>,
    /// What the server has flushed and the repository does not hold, in bytes.
    pub lag_bytes: Option<u64>,
    /// For how long the oldest WAL that is not archived has been waiting, in seconds; 0 if there is none.
    pub lag_seconds: Option<f64>,
    /// The spool.
    pub spool: SpoolStatus,
    /// The repository's store.
    pub store: StoreStatus,
    /// How far the WAL is understood.
    pub scan: ScanStatus,
    /// Base backups.
    pub backups: Backups,
    /// Proofs that a restore works.
    pub drills: Drills,
    /// Who is at work in the server.
    pub who: WhoStatus,
    /// What protects the tables.
    pub protection: ProtectionStatus,
    /// Telling people.
    pub notify: Notify,
    /// Snapshots that are held so that deleted rows stay readable.
    pub flashback: FlashbackStatus,
    /// The watch for damage.
    pub detect: DetectStatus,
    /// Holes in the archived WAL that this agent found, in the order in which it did.
    pub gaps: Vec<GapSeen>,
    /// What somebody must look at, by name.
    pub alarms: BTreeMap<String, Alarm>,
    /// Each database, where several are read by logical replication: then the places above are those where all of them are.
    pub databases: Vec<DatabaseStatus>,
}

/// A database whose changes are read besides others.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct DatabaseStatus {
    /// Its name.
    pub database: String,
    /// True while its changes are read.
    pub streaming: bool,
    /// Everything before this is durable in the repository.
    pub archived: Option<Position>,
    /// For how long the oldest change that is not archived has been waiting, in seconds.
    pub lag_seconds: Option<f64>,
    /// Its newest base.
    pub last_base: Option<LastBackup>,
    /// What is wrong now with reading its changes.
    pub trouble: Option<Trouble>,
    /// What is wrong now with taking bases of it.
    pub base_trouble: Option<Trouble>,
}

/// The server that is streamed from.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Server {
    /// True while WAL is streamed from it.
    pub streaming: bool,
    /// The cluster's identity.
    pub system_id: Option<SystemId>,
    /// Its version.
    pub version: Option<ServerVersion>,
    /// Its segment size in bytes.
    pub segment_size: Option<SegmentSize>,
    /// The end of its flushed WAL, as it last said.
    pub flushed: Option<Position>,
    /// When it last said anything, by our clock.
    pub heard_at: Option<Timestamp>,
    /// The replication slot that holds WAL back for us.
    pub slot: String,
    /// What `pg_replication_slots.wal_status` says: `reserved`, `extended`, `unreserved`, `lost`.
    pub slot_wal_status: Option<String>,
    /// Commits wait for us: `synchronous_standby_names` matches our name.
    pub synchronous: bool,
    /// Connections begun since the agent was started.
    pub connections: u64,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// The spool.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct SpoolStatus {
    /// WAL in it, in bytes.
    pub bytes: u64,
    /// The most that it may hold, in bytes.
    pub size_max: u64,
    /// It is full, and nothing is read from the server until segments have left it.
    pub full: bool,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// The repository's store.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct StoreStatus {
    /// It refuses by itself to overwrite an object; where it does not, walguard looks before it puts.
    pub enforces_create_once: bool,
    /// Objects on their way.
    pub uploads: u64,
    /// WAL objects made since the agent was started.
    pub objects_total: u64,
    /// WAL in them, in bytes.
    pub content_bytes_total: u64,
    /// The same compressed, in bytes.
    pub stored_bytes_total: u64,
    /// Calls that failed and were tried again, since the agent was started.
    pub failures_total: u64,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// What is seen of who is at work in the server.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct WhoStatus {
    /// True while samples of its sessions are taken.
    pub watching: bool,
    /// The agent's role sees all sessions' statements, clients and times: it has `pg_monitor`.
    pub sees_all: bool,
    /// Transactions with a number that were open at the last sample.
    pub open_transactions: u64,
    /// What the last sample took, in seconds.
    pub sample_seconds: f64,
    /// How often the server was made to flush WAL that it held back, since the agent was started.
    pub nudges_total: u64,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// Snapshots that are held so that deleted rows stay readable. Vacuum removes nothing that the oldest of them sees.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct FlashbackStatus {
    /// How many.
    pub snapshots: u64,
    /// Age of the oldest, in seconds.
    pub age_seconds: Option<f64>,
    /// Transactions that began since the oldest that a snapshot needs.
    pub xmin_age: Option<u64>,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// What protects the tables, as last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ProtectionStatus {
    /// Each database that could be looked at.
    pub databases: Vec<ProtectedDatabase>,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// What protects the tables of a database, as last seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ProtectedDatabase {
    /// The database's name.
    pub database: String,
    /// When it was looked at, by our clock.
    pub at: Option<Timestamp>,
    /// Triggers of tables, those of constraints not among them.
    pub triggers: InForce,
    /// Event triggers.
    pub event_triggers: InForce,
    /// Rules of tables.
    pub rules: InForce,
    /// Row security policies.
    pub policies: InForce,
    /// The guard's triggers and event triggers: those that are as they should be, of those that should be there. `None` if
    /// no guard was ever seen there.
    pub guard: Option<InForce>,
    /// What is wrong with the guard, the first of it.
    pub guard_problems: Vec<String>,
}

/// How many of something.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct InForce {
    /// That are in force.
    pub in_force: u64,
    /// That are there, or should be.
    pub there: u64,
}

/// How far the WAL is understood.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ScanStatus {
    /// Everything before this was decoded.
    pub position: Option<Position>,
    /// Transactions and subtransactions that are open there.
    pub open_transactions: u64,
    /// Processor time that reading and decoding took since the agent was started, in seconds.
    pub cpu_seconds: f64,
    /// Records or pages that could not be understood since the agent was started.
    pub faults_total: u64,
    /// Indexes and snapshots of names written since the agent was started.
    pub derived_total: u64,
    /// Segments that got no index since the agent was started.
    pub unindexed_total: u64,
    /// There are more relations than are kept names of.
    pub names_overflowed: bool,
}

/// Telling people of incidents.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Notify {
    /// How each channel is doing, by its name.
    pub channels: BTreeMap<String, ChannelStatus>,
    /// Messages that were told, and of which the repository does not know yet.
    pub unrecorded: u64,
    /// What is wrong with these records now.
    pub trouble: Option<Trouble>,
}

/// The watch for damage.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct DetectStatus {
    /// True while the WAL is watched.
    pub watching: bool,
    /// How far it was looked at when its end was reached last.
    pub looked_to: Option<Position>,
    /// Tables whose rows are known.
    pub tables: u64,
    /// Why rows cannot be counted, if they cannot.
    pub rows_trouble: Option<String>,
    /// Incidents found since the agent was started.
    pub incidents_total: u64,
    /// Incidents that wait to be written into the repository.
    pub unwritten: u64,
    /// The newest incidents that are not closed, by id.
    pub open: Vec<IncidentSeen>,
}

/// An incident in short.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IncidentSeen {
    /// Its id.
    pub id: String,
    /// What happened, without control characters.
    pub title: String,
    /// How bad it is.
    pub severity: String,
    /// How far it is.
    pub state: String,
    /// When it was noticed.
    pub at: Timestamp,
    /// Nobody has seen it, and somebody should.
    pub needs_attention: bool,
}

/// Open incidents in the status at most.
const INCIDENTS_SHOWN: usize = 100;

impl DetectStatus {
    /// An incident is new or has changed.
    pub fn see(&mut self, incident: IncidentSeen) {
        let is_closed = matches!(incident.state.as_str(), "resolved" | "aborted");
        self.open.retain(|known| known.id != incident.id);
        if !is_closed {
            self.open.push(incident);
            self.open.sort_by(|a, b| a.id.cmp(&b.id));
            let more = self.open.len().saturating_sub(INCIDENTS_SHOWN);
            self.open.drain(..more);
        }
    }

    /// Incidents that nobody has seen, and somebody should.
    pub fn unseen(&self) -> impl DoubleEndedIterator<Item = &IncidentSeen> {
        self.open.iter().filter(|incident| incident.needs_attention)
    }
}

/// Base backups.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Backups {
    /// The newest complete one.
    pub last: Option<LastBackup>,
    /// The one that is being taken.
    pub running: Option<RunningBackup>,
    /// When the next one is due; `None` if none is scheduled.
    pub next_at: Option<Timestamp>,
    /// What is wrong now.
    pub trouble: Option<Trouble>,
}

/// The newest complete base backup.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LastBackup {
    /// Its name.
    pub label: String,
    /// When it ended, by the server's clock.
    pub at: Timestamp,
    /// Its size in the repository, in bytes.
    pub stored_bytes: u64,
    /// Where it begins.
    pub start: Position,
    /// Pages with a wrong checksum in it.
    pub bad_pages: u64,
}

/// A base backup that is being taken.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RunningBackup {
    /// When it began, by our clock.
    pub since: Timestamp,
    /// Bytes read from the server.
    pub bytes_done: u64,
    /// Bytes that the server announced, about.
    pub bytes_total: Option<u64>,
}

/// Proofs that a restore works.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Drills {
    /// This agent makes drills.
    pub scheduled: bool,
    /// Why it cannot, though it should.
    pub impossible: Option<String>,
    /// The last one, whoever made it.
    pub last: Option<DrillSeen>,
    /// The last one that proved that a restore works.
    pub proven: Option<DrillSeen>,
    /// Since when one is being made, by our clock.
    pub running_since: Option<Timestamp>,
    /// When the next one is due; `None` if none is scheduled.
    pub next_at: Option<Timestamp>,
    /// Drills of this agent that proved nothing, since it was started.
    pub failures_total: u64,
    /// What is wrong with looking at their records now.
    pub trouble: Option<Trouble>,
}

/// A drill in short.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct DrillSeen {
    /// When it began, by its machine's clock.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// How long it took, in seconds.
    pub took_seconds: f64,
    /// What was restored.
    pub target: String,
    /// `proven`, `wrong`, `failed`.
    pub outcome: String,
    /// Why it is no proof.
    pub problem: Option<String>,
    /// What the operator can do about that.
    pub hint: Option<String>,
}

impl From<&Drill> for DrillSeen {
    fn from(drill: &Drill) -> Self {
        Self {
            started_at: drill.started_at,
            finished_at: drill.finished_at,
            took_seconds: drill.took_seconds(),
            target: drill.target.clone(),
            outcome: drill.outcome.as_str().to_owned(),
            problem: drill.problem(),
            hint: drill.hint.clone(),
        }
    }
}

/// WAL that is missing from the archive for good.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GapSeen {
    /// The first missing byte.
    pub from: Position,
    /// The byte after the last one.
    pub to: Lsn,
    /// Why.
    pub reason: String,
}

/// Something that fails and is being tried again.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Trouble {
    /// Since when.
    pub since: Timestamp,
    /// How often it has failed in a row.
    pub failures: u64,
    /// The last error.
    pub error: String,
    /// What the operator can do.
    pub hint: Option<String>,
}

impl Trouble {
    /// `before` with one more failure, or the first.
    pub fn again(before: Option<&Self>, at: Timestamp, error: String, hint: Option<String>) -> Self {
        Self { since: before.map_or(at, |b| b.since), failures: before.map_or(1, |b| b.failures + 1), error, hint }
    }
}

/// What somebody must look at.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Alarm {
    /// Since when.
    pub since: Timestamp,
    /// What is the matter.
    pub text: String,
    /// What the operator can do.
    pub hint: Option<String>,
}

/// Trouble that lasts longer than this is worth a person's time; most passes sooner.
const TROUBLE_MAX: Duration = Duration::from_secs(60);
/// WAL that waits longer than this endangers what the archive promises.
const LAG_MAX: Duration = Duration::from_secs(60);

impl Status {
    /// What somebody should look at, in words: alarms, and trouble that does not pass. Empty if all is well.
    pub fn attention(&self) -> Vec<String> {
        let now = self.at.unwrap_or(Timestamp::UNIX_EPOCH);
        let mut found: Vec<String> = self.alarms.values().map(|a| with_hint(&a.text, a.hint.as_deref())).collect();
        let troubles = [
            ("the server", &self.server.trouble),
            ("the repository", &self.store.trouble),
            ("the spool", &self.spool.trouble),
            ("base backups", &self.backups.trouble),
            ("the records of drills", &self.drills.trouble),
            ("the records of what people were told", &self.notify.trouble),
        ];
        for (what, trouble) in troubles {
            if let Some(trouble) = trouble
                && age(now, trouble.since) > TROUBLE_MAX
            {
                let text = format!("trouble with {what} since {:.0}: {}", trouble.since, trouble.error);
                found.push(with_hint(&text, trouble.hint.as_deref()));
            }
        }
        if let Some(seconds) = self.lag_seconds
            && seconds > LAG_MAX.as_secs_f64()
        {
            found.push(format!("WAL has been waiting for {seconds:.0} s to be archived"));
        }
        for (name, channel) in &self.notify.channels {
            found.extend(waiting(name, channel));
        }
        if self.spool.full {
            found.push("the spool is full: no WAL is read from the server".to_owned());
        }
        if let Some(last) = &self.backups.last
            && last.bad_pages > 0
        {
            found.push(format!("backup {} holds {} pages with a wrong checksum", last.label, last.bad_pages));
        }
        found
    }
}

impl Status {
    /// Adds what holds for databases that are read apart from each other: where all of them are, and what is wrong with any.
    fn take_together(&mut self, parts: Vec<(String, Self)>) {
        fn all<T: Ord + Copy>(parts: &[(String, Status)], what: impl Fn(&Status) -> Option<T>) -> Option<T> {
            parts.iter().map(|(_, part)| what(part)).min().flatten() // of which one knows nothing, nothing is known
        }
        self.received = all(&parts, |part| part.received);
        self.archived = all(&parts, |part| part.archived);
        self.scan.position = all(&parts, |part| part.scan.position);
        self.server.heard_at = all(&parts, |part| part.server.heard_at);
        self.server.streaming = parts.iter().all(|(_, part)| part.server.streaming);
        self.backups.next_at = parts.iter().filter_map(|(_, part)| part.backups.next_at).min();
        self.lag_seconds = parts.iter().filter_map(|(_, part)| part.lag_seconds).reduce(f64::max);
        for (database, part) in parts {
            let of_it = |trouble: Option<Trouble>| {
                trouble.map(|trouble| Trouble { error: format!("database {database}: {}", trouble.error), ..trouble })
            };
            let (trouble, base_trouble) = (of_it(part.server.trouble), of_it(part.backups.trouble));
            self.server.flushed = self.server.flushed.max(part.server.flushed);
            self.server.version = self.server.version.or(part.server.version);
            self.server.connections += part.server.connections;
            self.server.trouble = self.server.trouble.take().or_else(|| trouble.clone());
            self.store.uploads += part.store.uploads;
            self.store.objects_total += part.store.objects_total;
            self.store.content_bytes_total += part.store.content_bytes_total;
            self.store.stored_bytes_total += part.store.stored_bytes_total;
            self.store.failures_total += part.store.failures_total;
            self.store.trouble = self.store.trouble.take().or(part.store.trouble);
            self.scan.open_transactions += part.scan.open_transactions;
            self.scan.faults_total += part.scan.faults_total;
            self.backups.trouble = self.backups.trouble.take().or_else(|| base_trouble.clone());
            self.backups.running = self.backups.running.take().or(part.backups.running);
            if self.backups.last.as_ref().map(|last| last.at) < part.backups.last.as_ref().map(|last| last.at) {
                self.backups.last.clone_from(&part.backups.last);
            }
            self.gaps.extend(part.gaps);
            for (name, alarm) in part.alarms {
                let text = format!("database {database}: {}", alarm.text);
                self.alarms.insert(format!("{name} {database}"), Alarm { text, ..alarm });
            }
            self.databases.push(DatabaseStatus {
                database,
                streaming: part.server.streaming,
                archived: part.archived,
                lag_seconds: part.lag_seconds,
                last_base: part.backups.last,
                trouble,
                base_trouble,
            });
        }
        if let (Some(flushed), Some(archived)) = (self.server.flushed, self.archived) {
            self.lag_bytes = Some(flushed.lsn.saturating_sub(archived.lsn));
        }
    }
}

/// What waits for a channel, in words.
fn waiting(name: &str, channel: &ChannelStatus) -> Option<String> {
    if channel.given_up_total > 0 && channel.late == 0 {
        return Some(format!("{} alarms were never taken by {name} and are given up", channel.given_up_total));
    }
    let oldest = channel.oldest_due.filter(|_| channel.late > 0)?;
    let (verb, plural) = if channel.late == 1 { ("has", "") } else { ("have", "s") };
    let error = channel.error.as_deref().unwrap_or("it was not tried yet");
    let text = format!("{} alarm{plural} {verb} not reached {name}, since {oldest:.0}: {error}", channel.late);
    Some(with_hint(&text, channel.hint.as_deref()))
}

fn with_hint(text: &str, hint: Option<&str>) -> String {
    hint.map_or_else(|| text.to_owned(), |hint| format!("{text} ({hint})"))
}

fn age(now: Timestamp, then: Timestamp) -> Duration {
    Duration::try_from(now.duration_since(then)).unwrap_or_default()
}

/// Where the loops write down what they do. Clones are handles to one board.
#[derive(Clone, Debug, Default)]
pub struct Board {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    status: Status,
    /// When the server sent WAL up to a position that is not archived yet, oldest first.
    marks: VecDeque<(Position, Timestamp)>,
    /// Boards of databases that are read apart from each other.
    parts: Vec<(String, Board)>,
}

/// Marks kept: at ten a second and position, more than an hour; then every second one is dropped.
const MARKS_MAX: usize = 8192;
/// Marks are no closer than this: it bounds the error of `lag_seconds`.
const MARK_APART: Duration = Duration::from_millis(100);

impl Board {
    /// A board that says `status` to begin with.
    pub fn new(status: Status) -> Self {
        Self { inner: Arc::new(Mutex::new(Inner { status, marks: VecDeque::new(), parts: Vec::new() })) }
    }

    /// A board for one database of several, of which this one says what holds for all.
    pub fn part(&self, database: &str) -> Self {
        let part = Self::default();
        self.lock().parts.push((database.to_owned(), part.clone()));
        part
    }

    /// Changes what it says.
    pub fn update(&self, change: impl FnOnce(&mut Status)) {
        change(&mut self.lock().status);
    }

    /// WAL up to `position` came in, which the server sent at `sent_at` (by our clock).
    pub fn received(&self, position: Position, sent_at: Timestamp) {
        let mut inner = self.lock();
        inner.status.received = Some(position);
        inner.status.server.heard_at = Some(sent_at);
        let close = inner.marks.back().is_some_and(|(_, last)| age(sent_at, *last) < MARK_APART);
        if !close {
            inner.marks.push_back((position, sent_at));
        }
        if inner.marks.len() > MARKS_MAX {
            let mut keep = false;
            inner.marks.retain(|_| {
                keep = !keep;
                keep
            });
        }
    }

    /// Everything before `position` is durable in the repository.
    pub fn archived(&self, position: Position) {
        let mut inner = self.lock();
        inner.status.archived = Some(position);
        while inner.marks.front().is_some_and(|(mark, _)| *mark <= position) {
            inner.marks.pop_front();
        }
    }

    /// Raises an alarm; one of this name that is up already keeps its time.
    pub fn raise(&self, name: &str, text: String, hint: Option<String>) {
        let mut inner = self.lock();
        let since = inner.status.alarms.get(name).map_or_else(Timestamp::now, |a| a.since);
        let known =
            inner.status.alarms.insert(name.to_owned(), Alarm { since, text: text.clone(), hint: hint.clone() });
        drop(inner);
        if known.is_none_or(|k| k.text != text) {
            tracing::error!(alarm = name, hint, "{text}");
        }
    }

    /// Takes an alarm down.
    pub fn clear(&self, name: &str) {
        if self.lock().status.alarms.remove(name).is_some() {
            tracing::info!(alarm = name, "the alarm is over");
        }
    }

    /// What it says, at `now`.
    pub fn snapshot(&self, now: Timestamp) -> Status {
        let inner = self.lock();
        let mut status = inner.status.clone();
        status.at = Some(now);
        if !inner.parts.is_empty() {
            let parts = inner.parts.iter().map(|(name, part)| (name.clone(), part.snapshot(now))).collect();
            status.take_together(parts);
            return status;
        }
        if let (Some(flushed), Some(archived)) = (status.server.flushed, status.archived) {
            status.lag_bytes = Some(flushed.lsn.saturating_sub(archived.lsn));
        }
        // A position between two marks was received no later than the mark after it.
        let caught_up = status.archived >= status.received;
        let oldest = inner.marks.front().filter(|_| !caught_up);
        status.lag_seconds = status.received.map(|_| oldest.map_or(0.0, |(_, at)| age(now, *at).as_secs_f64()));
        status
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whoever panicked while writing left whole values behind: each change is one assignment.
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::TimelineId;

    fn at(lsn: u64) -> Position {
        Position { timeline: TimelineId::FIRST, lsn: Lsn::new(lsn) }
    }

    fn second(n: i64) -> Timestamp {
        Timestamp::from_second(n).unwrap()
    }

    #[test]
    fn lag_is_the_age_of_the_oldest_wal_that_is_not_archived() {
        let board = Board::default();
        assert_eq!(board.snapshot(second(0)).lag_seconds, None, "nothing is known yet");
        board.received(at(100), second(10));
        board.received(at(200), second(20));
        assert_eq!(board.snapshot(second(25)).lag_seconds, Some(15.0));
        board.archived(at(150));
        assert_eq!(board.snapshot(second(25)).lag_seconds, Some(5.0));
        board.archived(at(200));
        assert_eq!(board.snapshot(second(25)).lag_seconds, Some(0.0));
    }

    #[test]
    fn marks_stay_bounded_however_long_the_repository_is_away() {
        let board = Board::default();
        for n in 0..100_000 {
            board.received(at(n as u64 + 1), second(n));
        }
        assert!(board.lock().marks.len() <= MARKS_MAX);
        assert_eq!(board.snapshot(second(100_000)).lag_seconds, Some(100_000.0), "the oldest is remembered");
    }

    #[test]
    fn trouble_that_passes_soon_needs_nobody() {
        let trouble = Trouble::again(None, second(100), "away".to_owned(), None);
        let mut status = Status { at: Some(second(130)), ..Status::default() };
        status.store.trouble = Some(Trouble::again(Some(&trouble), second(120), "still away".to_owned(), None));
        assert_eq!(status.attention(), Vec::<String>::new());
        status.at = Some(second(161));
        assert!(status.attention().concat().contains("still away"));
    }

    #[test]
    fn of_several_databases_it_says_where_all_are_and_what_is_wrong_with_any() {
        let board = Board::default();
        let (shop, crm) = (board.part("shop"), board.part("crm"));
        for (part, lsn) in [(&shop, 300), (&crm, 100)] {
            part.received(at(lsn + 50), second(i64::try_from(lsn).unwrap()));
            part.update(|s| s.server.streaming = true);
        }
        shop.archived(at(350));
        assert_eq!(board.snapshot(second(500)).archived, None, "nothing is known of one");
        crm.archived(at(100));
        crm.raise("gap", "changes are lost".to_owned(), None);
        let trouble = Trouble::again(None, second(400), "no".to_owned(), None);
        crm.update(|s| s.backups.trouble = Some(trouble));
        board.update(|s| s.server.flushed = Some(at(400)));
        let status = board.snapshot(second(500));
        assert_eq!((status.archived, status.lag_bytes, status.lag_seconds), (Some(at(100)), Some(300), Some(400.0)));
        assert!(status.server.streaming);
        let attention = status.attention().concat();
        assert!(
            attention.contains("database crm: changes are lost") && attention.contains("database crm: no"),
            "{attention}"
        );
        let lags: Vec<_> = status.databases.iter().map(|one| (one.database.as_str(), one.lag_seconds)).collect();
        assert_eq!(lags, [("shop", Some(0.0)), ("crm", Some(400.0))]);
        shop.update(|s| s.server.streaming = false);
        assert!(!board.snapshot(second(500)).server.streaming);
    }

    #[test]
    fn a_status_survives_the_way_over_http() {
        let board = Board::default();
        board.received(at(100), second(10));
        board.raise("gap", "WAL is missing".to_owned(), Some("take a backup".to_owned()));
        board.update(|s| s.server.system_id = Some(SystemId::new(u64::MAX)));
        let status = board.snapshot(second(11));
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
    }
}
