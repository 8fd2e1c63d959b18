//! The loop that turns what the WAL tells into incidents, and the one that writes them down and tells of them.
//!
//! ```text
//! scan -> Watch: detector, who, row counts, conditions -> Keeper: repository, then whoever tells people
//! ```
//!
//! An incident is in the repository before anybody is told, unless that takes longer than people should wait: then they
//! hear of it all the same, and it is written as soon as that is possible. Its id comes from the WAL, so that an agent that
//! is killed between the two finds the same incident again, and its journal says that it was told.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::pin::Pin;
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::drills::DRILL_ALARM;
use super::rows::{self, Counted, RowsError};
use super::scan::Observed;
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::ConnInfo;
use crate::detect::detector::{Asked, Break, Condition, Detector, OpenWork};
use crate::detect::silence::Silence;
use crate::detect::{Config, DdlKind, Incident, RuleName, Severity, State, Who, WhoSource};
use crate::guard::message::GuardMessage;
use crate::guard::testimony;
use crate::guard::{Losses, Question, Sessions};
use crate::pg::{Lsn, Oid, Position, TimelineId, Xid};
use crate::repo::{RepoError, Repository};
use crate::serve::status::{Board, IncidentSeen};

/// How often the detector is asked for what waits, and whether witnesses know more by now.
const TICK: Duration = Duration::from_millis(250);

/// How often conditions, silences and answers are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// How often what was learned is kept.
const REMEMBER_EVERY: Duration = Duration::from_secs(600);

/// Incidents of the repository that are looked at when the agent starts.
const INCIDENTS_RESTORED: usize = 1_000;

/// Writing to the repository may hold up an alarm so long, waiting for those before it included. A store answers a put of a
/// few KiB within 100 ms; an alarm within half a second of the commit is the promise.
const TELL_PATIENCE: Duration = Duration::from_millis(200);

/// A repository that does not answer for so long is given up until the next try.
const WRITE_PATIENCE: Duration = Duration::from_secs(10);

/// Incidents of which the newest revision is remembered, so that the next one is written without a look.
const REMEMBERED_MAX: usize = 64;

/// The repository is waited for so long when it is read, and when the agent stops.
const READ_PATIENCE: Duration = Duration::from_secs(2);

/// Incidents that wait to be written; of more, those that were found first wait.
const UNWRITTEN_MAX: usize = 1_024;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Watch {
    pub(super) repo: Repository,
    pub(super) config: Config,
    pub(super) zone: TimeZone,
    pub(super) timeline: TimelineId,
    /// For row counts; under a name of its own.
    pub(super) conninfo: ConnInfo,
    pub(super) sessions: Sessions,
    pub(super) board: Board,
    /// Databases that are streamed apart from each other; 0 if it is the whole WAL that is.
    pub(super) apart: usize,
    pub(super) observed: mpsc::Receiver<Observed>,
    pub(super) found: mpsc::Sender<Incident>,
    /// What the watch over SQL finds lost of what protects tables.
    pub(super) losses: Losses,
    /// Whose session should end, with the session as far as it is known.
    pub(super) breaks: mpsc::Sender<(Break, Who)>,
}

type Counting = JoinHandle<Result<Vec<Counted>, RowsError>>;

/// What people wrote into the repository meanwhile.
struct Answers {
    /// `None` if they could not be read.
    silences: Option<Vec<Silence>>,
    /// Those of the incidents asked for that could be read.
    incidents: Vec<Incident>,
}

/// What the loop knows.
struct Work {
    detector: Detector,
    timeline: TimelineId,
    /// How far the WAL was looked at.
    at: Lsn,
    /// How far each database's changes were, where they are streamed apart.
    at_each: HashMap<Oid, Position>,
    /// What was seen from its beginning on: the WAL, or each database.
    is_continuous: HashSet<Option<Oid>>,
    counting: Option<Counting>,
    looking: Option<JoinHandle<Answers>>,
    /// Size of the newest base backup.
    backup: Option<(String, u64)>,
    /// The last loss over SQL that was looked at.
    loss: u64,
}

impl Watch {
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let Some(mut work) = stop.run_until_cancelled(self.begin()).await else { return Ok(()) };
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked_at: Option<Instant> = None;
        let mut remembered_at = Instant::now();
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                observed = self.observed.recv() => match observed {
                    Some(observed) => self.see(&mut work, observed),
                    None => {
                        // Whoever told us is gone, and its own result tells why.
                        stop.cancelled().await;
                        break;
                    }
                },
                _ = tick.tick() => {
                    let sessions = self.sessions.clone();
                    work.detector.ask_again(&mut |asked| who(&sessions, asked), Timestamp::now());
                    self.take_counts(&mut work).await;
                    self.take_answers(&mut work).await;
                    if work.looking.is_none() && looked_at.is_none_or(|at| at.elapsed() >= LOOK_EVERY) {
                        looked_at = Some(Instant::now());
                        self.look(&mut work);
                    }
                    if remembered_at.elapsed() >= REMEMBER_EVERY {
                        remembered_at = Instant::now();
                        tokio::spawn(self.remember(&work));
                    }
                }
            }
            if !self.hand_over(&mut work).await {
                stop.cancelled().await;
                break;
            }
        }
        // A clean end costs nobody what was learned.
        let _ = tokio::time::timeout(READ_PATIENCE, self.remember(&work)).await;
        Ok(())
    }

    /// What was known before: incidents, silences, what was learned.
    async fn begin(&self) -> Work {
        let mut failures = 0;
        loop {
            match self.try_begin().await {
                Ok(work) => return work,
                Err(error) => {
                    failures += 1;
                    if failures == 1 {
                        tracing::warn!("failed to read the incidents, will try again: {}", Chain(&error));
                    }
                    tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
                }
            }
        }
    }

    async fn try_begin(&self) -> Result<Work, RepoError> {
        let mut detector = Detector::new(self.config.clone(), self.zone.clone(), self.timeline);
        if self.apart > 1 {
            detector.apart();
        }
        if let Some(memory) = self.repo.newest_memory().await? {
            detector.remember(memory);
        }
        let found = self.repo.incidents(Some(INCIDENTS_RESTORED)).await?;
        for (key, problem) in &found.damaged {
            tracing::warn!(key, "an incident cannot be read: {problem}");
        }
        for incident in &found.incidents {
            self.board.update(|s| s.detect.see(seen(incident)));
        }
        detector.restore(found.incidents);
        detector.set_silences(self.repo.silences().await?);
        let newest = self.repo.backups().await?.pop();
        self.board.update(|s| s.detect.watching = true);
        Ok(Work {
            detector,
            timeline: self.timeline,
            at: Lsn::ZERO,
            at_each: HashMap::new(),
            is_continuous: HashSet::new(),
            counting: Some(self.count(None)),
            backup: newest.map(|backup| (backup.label, backup.stored_bytes)),
            loss: 0,
            looking: None,
        })
    }

    fn count(&self, only: Option<Oid>) -> Counting {
        let conninfo = self.conninfo.clone();
        tokio::spawn(async move { rows::read(&conninfo, only).await })
    }

    fn see(&self, work: &mut Work, observed: Observed) {
        let now = Timestamp::now();
        let sessions = self.sessions.clone();
        match observed {
            Observed::Ended { transaction, timeline } => {
                self.follow(work, timeline);
                let of = if self.apart > 1 { transaction.database() } else { None };
                if work.is_continuous.insert(of) {
                    work.detector.begins_at(transaction.begin);
                }
                work.at = work.at.max(transaction.end);
                let told = testimony::read(&transaction.messages);
                let mut witness = |asked: &Asked| {
                    let told = if asked.xid == transaction.xid { told.as_slice() } else { &[] };
                    testimony::agree(told, who(&sessions, asked))
                };
                work.detector.transaction(&transaction, &mut witness, now);
            }
            Observed::Open { timeline, transactions } => {
                self.follow(work, timeline);
                let open: Vec<OpenWork<'_>> = transactions
                    .iter()
                    .map(|open| OpenWork {
                        xid: open.xid,
                        begin: open.begin,
                        is_prepared: open.is_prepared,
                        is_complete: open.is_complete,
                        tallies: &open.tallies,
                        ddl: &open.ddl,
                        lsn: work.at.max(open.begin),
                    })
                    .collect();
                let told: HashMap<Xid, Vec<GuardMessage>> =
                    transactions.iter().map(|open| (open.xid, testimony::read(&open.messages))).collect();
                let mut witness = |asked: &Asked| {
                    let told = asked.xid.and_then(|xid| told.get(&xid)).map(Vec::as_slice).unwrap_or_default();
                    testimony::agree(told, who(&sessions, asked))
                };
                work.detector.open(&open, &mut witness, now);
            }
            Observed::Running { running, timeline } => {
                self.follow(work, timeline);
                work.detector.see_running(&running, now);
            }
            Observed::Tables(tables) => {
                // A database that is new to us is counted as a whole.
                let mut unknown = tables.iter().filter(|(_, relation)| {
                    relation.kind == crate::detect::RelationKind::Table
                        && !work.detector.live().is_seeded(relation.database)
                });
                if work.counting.is_none() && unknown.next().is_some() {
                    work.counting = Some(self.count(None));
                }
            }
            Observed::WentBack(fork) => {
                self.follow(work, fork.timeline);
                // It has the rows that it had then, and not those that were counted since.
                work.detector.go_back(fork.lsn);
                work.at = fork.lsn;
                work.counting = Some(self.count(None));
            }
            Observed::CaughtUp { position, database } => {
                self.follow(work, position.timeline);
                work.at = work.at.max(position.lsn);
                let Some(database) = database.filter(|_| self.apart > 1) else {
                    self.board.update(|s| s.detect.looked_to = Some(position));
                    return;
                };
                work.at_each.insert(database, position);
                // Where each of them was looked at.
                let all = work.at_each.values().copied().min().filter(|_| work.at_each.len() == self.apart);
                self.board.update(|s| s.detect.looked_to = all);
            }
        }
    }

    fn follow(&self, work: &mut Work, timeline: TimelineId) {
        // Of databases that are streamed apart one may be on the old timeline still.
        if timeline != work.timeline && !(self.apart > 1 && timeline < work.timeline) {
            tracing::info!(from = %work.timeline, to = %timeline, "incidents are looked for on another timeline");
            work.timeline = timeline;
            work.detector.follow(timeline);
        }
    }

    /// Takes counts that have arrived.
    async fn take_counts(&self, work: &mut Work) {
        if !work.counting.as_ref().is_some_and(JoinHandle::is_finished) {
            return;
        }
        let Some(counting) = work.counting.take() else { return };
        match counting.await {
            Ok(Ok(counted)) => {
                self.board.update(|s| s.detect.rows_trouble = None);
                let mut parents = Vec::new();
                let live = work.detector.live();
                for table in counted {
                    if let Some(rows) = table.rows {
                        live.seed_between(table.table, rows, table.from, table.to);
                    }
                    live.seed_history(table.table, table.inserted, table.deleted);
                    live.note_seeded(table.table.0);
                    parents.extend(table.parent.map(|parent| (table.table, parent)));
                }
                work.detector.set_parents(parents);
                let known = work.detector.live().len() as u64;
                self.board.update(|s| s.detect.tables = known);
            }
            Ok(Err(error)) => {
                let text = Chain(&error).to_string();
                tracing::info!("rows are not counted: {text}");
                self.board.update(|s| s.detect.rows_trouble = Some(text));
                let again = self.conninfo.clone();
                work.counting = Some(tokio::spawn(async move {
                    tokio::time::sleep(LOOK_EVERY).await;
                    rows::read(&again, None).await
                }));
            }
            Err(error) => tracing::warn!("rows are not counted: {error}"),
        }
    }

    /// Silences, answers, and what is wrong besides transactions. A repository that is slow must not keep anybody from being
    /// told of what comes meanwhile, so it is read beside this loop.
    fn look(&self, work: &mut Work) {
        let (repo, ids) = (self.repo.clone(), work.detector.unanswered());
        work.looking = Some(tokio::spawn(async move {
            let silences = match tokio::time::timeout(READ_PATIENCE, repo.silences()).await {
                Ok(Ok(silences)) => Some(silences),
                Ok(Err(error)) => {
                    tracing::debug!("silences cannot be read: {}", Chain(&error));
                    None
                }
                Err(_) => {
                    tracing::debug!("silences cannot be read: the repository does not answer");
                    None
                }
            };
            let mut incidents = Vec::new();
            for id in ids.into_iter().take(16) {
                if let Ok(Ok(Some(incident))) = tokio::time::timeout(READ_PATIENCE, repo.incident(&id)).await {
                    incidents.push(incident);
                }
            }
            Answers { silences, incidents }
        }));
        let now = Timestamp::now();
        self.conditions(work, now);
        self.lost_protection(work, now);
        raise_unseen(&self.board);
    }

    /// Takes what was read of the repository, once it is there.
    async fn take_answers(&self, work: &mut Work) {
        let Some(looking) = work.looking.take_if(|looking| looking.is_finished()) else { return };
        let Ok(answers) = looking.await else { return };
        if let Some(silences) = answers.silences {
            work.detector.set_silences(silences);
        }
        for incident in answers.incidents {
            work.detector.answered(&incident);
            self.board.update(|s| s.detect.see(seen(&incident)));
        }
        raise_unseen(&self.board);
    }

    /// What the WAL did not tell, or not with a name, is told by SQL a minute later.
    fn lost_protection(&self, work: &mut Work, now: Timestamp) {
        let losses: Vec<_> = self.losses.subscribe().borrow().iter().filter(|(n, _)| *n > work.loss).cloned().collect();
        for (number, loss) in losses {
            work.loss = number;
            let rule = match loss.kind {
                _ if loss.name.starts_with("walguard") => RuleName::GuardRemoved,
                DdlKind::DropTrigger | DdlKind::DisableTrigger => RuleName::TriggerRemoved,
                DdlKind::DropEventTrigger | DdlKind::DisableEventTrigger => RuleName::EventTriggerRemoved,
                DdlKind::DropRule => RuleName::RuleRemoved,
                _ => RuleName::PolicyRemoved,
            };
            if !work.detector.spoke_of(rule, &loss.name) {
                let severity = if rule == RuleName::GuardRemoved { Severity::Critical } else { Severity::Warning };
                let text = format!("{} (in database {}, seen over SQL)", loss.text(), loss.database_name);
                work.detector.condition(Condition { rule, severity, text, lsn: work.at }, now);
            }
        }
    }

    fn conditions(&self, work: &mut Work, now: Timestamp) {
        let status = self.board.snapshot(now);
        let lsn = status.archived.map_or(work.at, |archived| archived.lsn);
        let mut say = |rule, severity, problem: Option<String>| match problem {
            Some(text) => work.detector.condition(Condition { rule, severity, text, lsn }, now),
            None => work.detector.condition_over(rule, now),
        };
        let late = status.lag_seconds.filter(|seconds| *seconds > self.config.archive_lag_max.as_secs_f64());
        let late = late.map(|seconds| format!("WAL has been waiting for {:.0} minutes to be archived", seconds / 60.0));
        say(RuleName::ArchiveLag, Severity::Warning, late);
        let slot = status.server.slot_wal_status.as_deref();
        let danger = slot.filter(|slot| matches!(*slot, "unreserved" | "lost"));
        let danger = danger
            .map(|slot| format!("the replication slot is {slot}: the server may remove WAL that is not archived"));
        say(RuleName::Slot, Severity::Critical, danger);
        let scan = status.alarms.get("scan").map(|alarm| alarm.text.clone());
        say(RuleName::UnreadableWal, Severity::Critical, scan);
        let drill = status.alarms.get(DRILL_ALARM).map(|alarm| alarm.text.clone());
        say(RuleName::Drill, Severity::Warning, drill);
        // A hole stays a hole.
        if let Some(gap) = status.gaps.last() {
            let text = format!("WAL from {} to {} is missing for good: {}", gap.from, gap.to, gap.reason);
            say(RuleName::Gap, Severity::Critical, Some(text));
        }
        if let Some(last) = status.backups.last {
            let before = work.backup.replace((last.label.clone(), last.stored_bytes));
            let before = before.filter(|(label, _)| *label != last.label);
            if let Some((label, bytes)) = before {
                let odd = odd_size(bytes, last.stored_bytes, self.config.backup_size_percent_max);
                let text = odd.map(|(severity, change)| {
                    let sizes = format!("{} and {} bytes", bytes, last.stored_bytes);
                    (severity, format!("backup {} is {change} than {label} before it: {sizes}", last.label))
                });
                match text {
                    Some((severity, text)) => {
                        let condition = Condition { rule: RuleName::BackupSize, severity, text, lsn };
                        work.detector.condition(condition, now);
                    }
                    None => work.detector.condition_over(RuleName::BackupSize, now),
                }
            }
        }
    }

    /// Gives what changed to whoever writes it down; false if that one is gone.
    async fn hand_over(&self, work: &mut Work) -> bool {
        for wanted in work.detector.take_breaks() {
            let asked = Asked { xid: Some(wanted.xid), ..Asked::default() };
            let who = who(&self.sessions, &asked);
            // Somebody who cannot keep up hits nobody by mistake later.
            if self.breaks.try_send((wanted, who)).is_err() {
                tracing::warn!("nobody is there to end a suspicious session");
            }
        }
        for incident in work.detector.take_changed(Timestamp::now()) {
            self.look_who(&incident);
            if self.found.send(incident).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Has the sessions looked at now, and not with the next sample: whose transaction is open is known for certain only while
    /// it is. The answer is asked for by the next tick.
    fn look_who(&self, incident: &Incident) {
        let open = incident.transactions.iter().rev().find(|known| known.lsn.is_none());
        if let Some(xid) = open.filter(|known| known.who.source < WhoSource::Activity).and_then(|known| known.xid) {
            let sessions = self.sessions.clone();
            tokio::spawn(async move {
                sessions.look_up(&Question { xid: Some(xid), ..Question::default() }, READ_PATIENCE).await;
            });
        }
    }

    /// Keeps what was learned so far.
    fn remember(&self, work: &Work) -> impl Future<Output = ()> + Send + use<> {
        let (repo, timeline) = (self.repo.clone(), work.timeline);
        // Where databases are streamed apart, what lies before is in what was learned of each.
        let at = match self.apart > 1 {
            true => work.at_each.values().map(|at| at.lsn).min().unwrap_or(Lsn::ZERO),
            false => work.at,
        };
        let memory = (at != Lsn::ZERO).then(|| work.detector.memory(at));
        async move {
            let Some(memory) = memory else { return };
            if let Err(error) = repo.put_memory(timeline, at, &memory).await {
                tracing::warn!("what was learned cannot be kept, will try again: {}", Chain(&error));
            }
        }
    }
}

/// How a backup's size differs too much, and how bad that is: a smaller one has lost something.
fn odd_size(before: u64, now: u64, percent: u32) -> Option<(Severity, String)> {
    let apart = u128::from(before.abs_diff(now)) * 100;
    if before == 0 || apart <= u128::from(before) * u128::from(percent) {
        return None;
    }
    let share = apart / u128::from(before);
    Some(match now < before {
        true => (Severity::Critical, format!("{share} % smaller")),
        false => (Severity::Warning, format!("{share} % larger")),
    })
}

fn who(sessions: &Sessions, asked: &Asked) -> Who {
    let tables: Vec<&str> = asked.tables.iter().map(String::as_str).collect();
    sessions.who(&Question { xid: asked.xid, ended: asked.ended, database: asked.database.as_deref(), tables: &tables })
}

fn seen(incident: &Incident) -> IncidentSeen {
    IncidentSeen {
        id: incident.id.clone(),
        title: incident.title.chars().map(|c| if c.is_control() { '?' } else { c }).collect(),
        severity: incident.severity.as_str().to_owned(),
        state: incident.state.as_str().to_owned(),
        at: incident.detected_at,
        needs_attention: incident.is_told()
            && incident.severity > Severity::Info
            && !matches!(incident.state, State::Acknowledged | State::Resolved | State::Aborted),
    }
}

/// The newest incident that nobody has seen is an alarm.
fn raise_unseen(board: &Board) {
    let detect = board.snapshot(Timestamp::now()).detect;
    match detect.unseen().next_back() {
        Some(newest) => {
            let more = detect.unseen().count() - 1;
            let more = if more > 0 { format!(", and {more} more incidents") } else { String::new() };
            let hint = format!("walguard incidents show {}", newest.id);
            board.raise("incident", format!("{}{more}", newest.title), Some(hint));
        }
        None => board.clear("incident"),
    }
}

/// Writes incidents down, and passes them on.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) repo: Repository,
    pub(super) board: Board,
    pub(super) found: mpsc::Receiver<Incident>,
    /// Whoever tells people.
    pub(super) told: mpsc::Sender<Incident>,
    /// Whoever saves the rows that are gone, if somebody does.
    pub(super) evidence: Option<mpsc::Sender<Incident>>,
}

impl Keeper {
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut desk = Desk::default();
        let mut put: Option<Put> = None;
        let (mut failures, mut try_at) = (0, Instant::now());
        loop {
            if put.is_none() && try_at <= Instant::now() {
                put = desk.next().map(|(incident, newest)| Box::pin(write(self.repo.clone(), incident, newest)) as Put);
            }
            let mut wake_at = desk.patience_ends_at().unwrap_or_else(|| Instant::now() + LOOK_EVERY);
            if put.is_none() && !desk.waiting.is_empty() {
                wake_at = wake_at.min(try_at);
            }
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                written = ended(&mut put) => {
                    put = None;
                    match written {
                        Ok(incident) => {
                            failures = 0;
                            let is_told = desk.wrote(&incident);
                            self.board.update(|s| s.detect.incidents_total += u64::from(incident.revision == 1));
                            self.tell(incident, is_told).await;
                        }
                        Err(problem) => {
                            failures += 1;
                            try_at = Instant::now() + RetryPolicy::FOREVER.pause(failures);
                            let id = desk.failed();
                            if failures.is_power_of_two() {
                                tracing::warn!(failures, incident = id, "failed to write an incident, will try again: {problem}");
                            }
                        }
                    }
                }
                found = self.found.recv() => match found {
                    Some(incident) => desk.take(incident),
                    None => break,
                },
                () = tokio::time::sleep_until(wake_at) => {}
            }
            for incident in desk.patience_ended(Instant::now()) {
                self.tell(incident, false).await;
            }
            let waiting = desk.len() as u64;
            self.board.update(|s| s.detect.unwritten = waiting);
        }
        Ok(())
    }

    /// Passes an incident on. `again`: it was told as it is, and only its revision is new.
    async fn tell(&self, incident: Incident, again: bool) {
        let seen = seen(&incident);
        if !again {
            let (severity, state, title) = (&seen.severity, &seen.state, &seen.title);
            tracing::warn!(incident = incident.id, revision = incident.revision, severity, state, "{title}");
        }
        self.board.update(|s| s.detect.see(seen));
        raise_unseen(&self.board);
        if !again
            && let Some(evidence) = &self.evidence
            && evidence.try_send(incident.clone()).is_err()
        {
            tracing::warn!(incident = incident.id, "rows are not saved: too many incidents wait for that");
        }
        let _ = self.told.send(incident).await; // whoever tells people ends the agent if it is gone
    }
}

/// A put under way: what is there now, or the problem.
type Put = Pin<Box<dyn Future<Output = Result<Incident, String>> + Send>>;

async fn write(repo: Repository, incident: Incident, newest: Newest) -> Result<Incident, String> {
    let put = async {
        match newest {
            Newest::Known(newest) => repo.put_incident_after(newest.map(|newest| *newest), &incident).await,
            Newest::Unknown => repo.put_incident(&incident).await,
        }
    };
    match tokio::time::timeout(WRITE_PATIENCE, put).await {
        Ok(written) => written.map_err(|error| Chain(&error).to_string()),
        Err(_) => Err(format!("the repository did not answer for {} s", WRITE_PATIENCE.as_secs())),
    }
}

/// What a put gives; if none is under way, nothing ever.
async fn ended(put: &mut Option<Put>) -> Result<Incident, String> {
    match put {
        Some(put) => put.await,
        None => std::future::pending().await,
    }
}

/// What is known of an incident's newest revision in the repository.
#[derive(Debug)]
enum Newest {
    /// `None`: there is none.
    Known(Option<Box<Incident>>),
    Unknown,
}

/// Incidents on their way into the repository, one after the other in the order of what they have seen: a restart takes
/// whatever lies before the last one for judged.
#[derive(Debug, Default)]
struct Desk {
    waiting: BTreeMap<Turn, Waiting>,
    writing: Option<(Turn, Waiting)>,
    /// The newest revisions, as far as this agent wrote them.
    newest: BTreeMap<String, Incident>,
}

/// What an incident had seen when it began to wait, and its id.
type Turn = (Lsn, String);

#[derive(Clone, Debug)]
struct Waiting {
    incident: Incident,
    since: Instant,
    /// People heard of it as it is here.
    is_told: bool,
}

impl Desk {
    fn len(&self) -> usize {
        self.waiting.len() + usize::from(self.writing.is_some())
    }

    /// A newer state of an incident takes the place of the one that waits, and keeps its turn.
    fn take(&mut self, incident: Incident) {
        let turn = self.waiting.keys().find(|(_, id)| *id == incident.id).cloned();
        let turn = turn.unwrap_or_else(|| (incident.seen_to, incident.id.clone()));
        let before = self.waiting.get(&turn);
        if before.is_none() && self.waiting.len() >= UNWRITTEN_MAX {
            tracing::error!(incident = incident.id, "too many incidents wait to be written: this one is left out");
            return;
        }
        let since = before.filter(|before| !before.is_told).map_or_else(Instant::now, |before| before.since);
        self.waiting.insert(turn, Waiting { incident, since, is_told: false });
    }

    /// The one whose turn it is, to be written now.
    fn next(&mut self) -> Option<(Incident, Newest)> {
        let (turn, waiting) = self.waiting.pop_first()?;
        let incident = waiting.incident.clone();
        self.writing = Some((turn, waiting));
        let newest = match self.newest.get(&incident.id) {
            Some(newest) => Newest::Known(Some(Box::new(newest.clone()))),
            // Should there be one all the same, its first revision is in the way, and is found.
            None if incident.revision <= 1 => Newest::Known(None),
            None => Newest::Unknown,
        };
        Some((incident, newest))
    }

    /// The one whose turn it was is written; true if people had heard of it as it was.
    fn wrote(&mut self, incident: &Incident) -> bool {
        self.newest.insert(incident.id.clone(), incident.clone());
        while self.newest.len() > REMEMBERED_MAX {
            self.newest.pop_first(); // the oldest: ids are in WAL order
        }
        self.writing.take().is_some_and(|(_, written)| written.is_told)
    }

    /// The one whose turn it was is not written, and has its turn again, with what was found of it meanwhile. Gives its id.
    fn failed(&mut self) -> String {
        let Some((turn, waiting)) = self.writing.take() else { return String::new() };
        let id = waiting.incident.id.clone();
        self.newest.remove(&id);
        let newer = self.waiting.keys().find(|(_, other)| *other == id).cloned();
        let waiting = newer.and_then(|newer| self.waiting.remove(&newer)).unwrap_or(waiting);
        self.waiting.insert(turn, waiting);
        id
    }

    fn untold(&mut self) -> impl Iterator<Item = &mut Waiting> {
        let writing = self.writing.as_mut().map(|(_, waiting)| waiting);
        writing.into_iter().chain(self.waiting.values_mut()).filter(|waiting| !waiting.is_told)
    }

    /// When the first of those that nobody heard of has waited long enough.
    fn patience_ends_at(&mut self) -> Option<Instant> {
        self.untold().map(|waiting| waiting.since + TELL_PATIENCE).min()
    }

    /// Those that people are to hear of now.
    fn patience_ended(&mut self, now: Instant) -> Vec<Incident> {
        let ended = self.untold().filter(|waiting| waiting.since + TELL_PATIENCE <= now);
        ended
            .map(|waiting| {
                waiting.is_told = true;
                waiting.incident.clone()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incident(lsn: u64, title: &str) -> Incident {
        let id = crate::detect::incident::incident_id(TimelineId::FIRST, Lsn::new(lsn));
        let incident = Incident::new(id, TimelineId::FIRST, Timestamp::UNIX_EPOCH);
        Incident { seen_to: Lsn::new(lsn), title: title.to_owned(), ..incident }
    }

    fn titles(incidents: Vec<Incident>) -> Vec<String> {
        incidents.into_iter().map(|incident| incident.title).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn people_hear_of_an_incident_that_cannot_be_written_once_for_each_state() {
        let mut desk = Desk::default();
        desk.take(incident(7, "first"));
        assert!(matches!(desk.next(), Some((_, Newest::Known(None)))));
        assert_eq!(titles(desk.patience_ended(Instant::now())), Vec::<String>::new());
        desk.take(incident(9, "second"));
        tokio::time::advance(TELL_PATIENCE).await;
        assert_eq!(titles(desk.patience_ended(Instant::now())), ["first", "second"]);
        assert_eq!(desk.failed(), incident(7, "").id);
        desk.take(incident(7, "first, and more"));
        assert_eq!((desk.len(), titles(desk.patience_ended(Instant::now()))), (2, Vec::new()));
        tokio::time::advance(TELL_PATIENCE).await;
        assert_eq!(titles(desk.patience_ended(Instant::now())), ["first, and more"]);
        assert_eq!(desk.patience_ends_at(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn incidents_are_written_in_the_order_of_what_they_have_seen_whatever_fails_meanwhile() {
        let mut desk = Desk::default();
        desk.take(incident(9, "later"));
        desk.take(incident(7, "first"));
        assert_eq!(desk.next().unwrap().0.title, "first");
        desk.take(Incident { seen_to: Lsn::new(20), ..incident(7, "first, and more") });
        desk.failed();
        let (written, newest) = desk.next().unwrap();
        assert_eq!((written.title.as_str(), desk.len()), ("first, and more", 2));
        assert!(matches!(newest, Newest::Known(None)));
        assert!(!desk.wrote(&written));
        desk.take(Incident { seen_to: Lsn::new(30), ..incident(7, "first, and still more") });
        assert_eq!(desk.next().unwrap().0.title, "later");
        desk.wrote(&incident(9, "later"));
        let newest = desk.next().unwrap().1;
        assert!(matches!(newest, Newest::Known(Some(known)) if known.title == "first, and more"));
    }

    #[test]
    fn a_backup_of_half_the_size_has_lost_something() {
        assert_eq!(odd_size(174, 42, 50), Some((Severity::Critical, "75 % smaller".to_owned())));
        assert_eq!(odd_size(100, 151, 50), Some((Severity::Warning, "51 % larger".to_owned())));
        assert_eq!(odd_size(100, 50, 50), None);
        assert_eq!(odd_size(0, 50, 50), None);
    }
}
