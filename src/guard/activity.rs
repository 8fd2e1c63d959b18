//! Samples of the server's sessions in, who did transaction N out. Pure.
//!
//! The WAL names transactions by number; only the server knows whose they are, and only while they last. So every open
//! transaction that a sample shows is kept here for a while after its end: the WAL comes later.
//!
//! What ends between two samples is in none of them. Then a session whose statement began before the commit and ended
//! after it is likely, and is called so ([`WhoSource::Nearby`]); two such sessions that nothing tells apart are none.

use std::collections::VecDeque;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};

use crate::detect::{Actor, Who, WhoSource};
use crate::pg::{Lsn, Oid, PgTime, Xid};

/// Transactions that are remembered. A text of 1 KiB each makes 8 MiB.
const ENTRIES_MAX: usize = 8_192;

/// Statements that ended between two samples, as far as sessions still show them.
const GLIMPSES_MAX: usize = 2_048;

/// Transactions are remembered so long after they were last seen. Their numbers come again after four billion others:
/// not within an hour.
const REMEMBERED_MICROS: i64 = 3_600 * 1_000_000;

/// What the server showed at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Counts the samples of a [`Sessions`](super::Sessions), from 1; 0 is none.
    pub number: u64,
    /// When it was taken, by the server's clock.
    pub at: Option<PgTime>,
    /// The server is a standby: the transactions that its WAL tells of run elsewhere.
    pub standby: bool,
    /// The agent's role sees all sessions' statements, clients and times.
    pub sees_all: bool,
    /// Sessions that have a transaction with a number, lead one that does, or ended a statement since the last sample.
    pub sessions: Vec<Session>,
    /// Numbers of transactions and subtransactions, with the process that runs them.
    pub xids: Vec<(Xid, i32)>,
    /// Relations that are locked against everybody.
    pub locks: Vec<Lock>,
    /// Prepared transactions.
    pub prepared: Vec<Prepared>,
    /// End of the WAL that was inserted; `None` on a standby.
    pub inserted: Option<Lsn>,
    /// End of the WAL that was flushed; `None` on a standby.
    pub flushed: Option<Lsn>,
}

impl Sample {
    /// True if somebody has a transaction with a number: it may have written WAL that is not flushed. Automatic vacuum does
    /// not count.
    pub fn has_open_transaction(&self) -> bool {
        let is_people = |session: &&Session| session.actor.backend_type.as_deref() != Some("autovacuum worker");
        self.sessions.iter().filter(is_people).any(|session| session.xid.is_some())
    }
}

/// A session at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Session {
    /// Its process.
    pub pid: i32,
    /// Its top-level transaction, if that has a number.
    pub xid: Option<Xid>,
    /// The process that it works for, if it is a parallel worker.
    pub leader: Option<i32>,
    /// Who it is. Shared by all that speak of the session.
    pub actor: Arc<Actor>,
    /// When the statement began that runs, or ran last.
    pub query_start: Option<PgTime>,
    /// When it began or ended to run.
    pub state_change: Option<PgTime>,
    /// A statement runs.
    pub is_active: bool,
    /// The role does not show us its statement, client and times.
    pub is_hidden: bool,
}

/// A relation that somebody has locked against everybody: `TRUNCATE`, `DROP` and many an `ALTER` do, at once and before
/// anything is in the WAL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lock {
    /// The database.
    pub database: Oid,
    /// The relation.
    pub relation: Oid,
    /// The process that has it.
    pub pid: i32,
}

/// A prepared transaction: no session has it any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Its number.
    pub xid: Xid,
    /// The name it was given.
    pub name: String,
    /// The role that prepared it.
    pub role: String,
    /// The database's name.
    pub database: String,
    /// When it was prepared.
    pub at: PgTime,
}

/// Whose doing is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Question<'a> {
    /// The transaction or subtransaction.
    pub xid: Option<Xid>,
    /// When it ended; `None` if it is open.
    pub ended: Option<PgTime>,
    /// Its database's name, if known.
    pub database: Option<&'a str>,
    /// Names of tables that it touched, without schema: they tell statements apart.
    pub tables: &'a [&'a str],
}

/// What is remembered of a transaction.
#[derive(Clone, Debug)]
struct Entry {
    actor: Arc<Actor>,
    note: Option<&'static str>,
    seen: PgTime,
}

/// A statement that ended between two samples.
#[derive(Clone, Debug)]
struct Glimpse {
    actor: Arc<Actor>,
    begin: PgTime,
    end: PgTime,
    /// Since when its session may have run other statements that no sample shows: the sample before.
    unseen_from: PgTime,
}

/// What the samples told, for as long as somebody may ask.
#[derive(Debug)]
pub struct Activity {
    entries: HashMap<u32, Entry>,
    glimpses: VecDeque<Glimpse>,
    /// When the first sample was taken, and the last one.
    watched: Option<(PgTime, PgTime)>,
    standby: bool,
    is_hidden: bool,
}

const NOTE_HIDDEN: &str =
    "client, statement and times are not shown: the agent's role lacks pg_monitor (GRANT pg_monitor TO it)";
const NOTE_WORKER: &str = "a parallel worker did it for the session that is named";

impl Default for Activity {
    fn default() -> Self {
        Self::new()
    }
}

impl Activity {
    /// Nothing is known.
    pub fn new() -> Self {
        Self { entries: HashMap::new(), glimpses: VecDeque::new(), watched: None, standby: false, is_hidden: false }
    }

    /// Remembers what a sample shows.
    pub fn learn(&mut self, sample: &Sample) {
        let Some(at) = sample.at else { return };
        let before = self.watched.map_or(at, |(_, last)| last);
        self.watched = Some((self.watched.map_or(at, |(first, _)| first), at));
        self.standby = sample.standby;
        self.is_hidden = !sample.sees_all;
        let by_pid: HashMap<i32, &Session> = sample.sessions.iter().map(|session| (session.pid, session)).collect();
        for session in &sample.sessions {
            let (owner, note) = match session.leader.and_then(|leader| by_pid.get(&leader)) {
                Some(leader) => (*leader, Some(NOTE_WORKER)),
                None => (session, None),
            };
            if let Some(xid) = session.xid {
                let note = if session.is_hidden { Some(NOTE_HIDDEN) } else { note };
                self.remember(xid, &owner.actor, note, at);
            }
            self.glimpse(session, before, at);
        }
        // A process may have ended one transaction and begun another between the two queries of a sample: its
        // subtransactions are only believed together with the transaction that its session shows.
        let has_top = |pid: i32| {
            let top = by_pid.get(&pid).and_then(|session| session.xid);
            top.is_some_and(|top| sample.xids.contains(&(top, pid)))
        };
        let mut believed: HashMap<i32, bool> = HashMap::new();
        for &(xid, pid) in &sample.xids {
            if *believed.entry(pid).or_insert_with(|| has_top(pid))
                && let Some(session) = by_pid.get(&pid)
                && session.xid != Some(xid)
            {
                let leader = session.leader.and_then(|leader| by_pid.get(&leader));
                let note = if session.is_hidden { Some(NOTE_HIDDEN) } else { leader.map(|_| NOTE_WORKER) };
                self.remember(xid, &leader.unwrap_or(session).actor, note, at);
            }
        }
        for prepared in &sample.prepared {
            let known = self.entries.get(&prepared.xid.get());
            if known.is_some_and(|entry| entry.actor.prepared.as_deref() == Some(&prepared.name)) {
                if let Some(entry) = self.entries.get_mut(&prepared.xid.get()) {
                    entry.seen = at;
                }
                continue;
            }
            let mut actor = known.map(|entry| Actor::clone(&entry.actor)).unwrap_or_default();
            actor.prepared = Some(prepared.name.clone());
            actor.role = Some(prepared.role.clone());
            actor.database = Some(prepared.database.clone());
            let note = known.is_none().then_some("its session was not seen before it was prepared");
            self.entries.insert(prepared.xid.get(), Entry { actor: Arc::new(actor), note, seen: at });
        }
        self.forget(at);
    }

    fn remember(&mut self, xid: Xid, actor: &Arc<Actor>, note: Option<&'static str>, at: PgTime) {
        let entry = self.entries.entry(xid.get()).or_insert_with(|| Entry { actor: actor.clone(), note, seen: at });
        (entry.seen, entry.note) = (at, note);
        if Arc::ptr_eq(&entry.actor, actor) || *entry.actor == **actor {
            return;
        }
        let known = entry.actor.query.as_deref().map_or(0, telling);
        let is_same = entry.actor.pid == actor.pid && entry.actor.backend_start == actor.backend_start;
        // The last statement of a transaction is often `COMMIT`, or a `SELECT` that looks at the damage.
        if is_same && actor.query.as_deref().map_or(0, telling) < known {
            let query = entry.actor.query.clone();
            entry.actor = Arc::new(Actor { query, ..Actor::clone(actor) });
        } else {
            entry.actor = actor.clone();
        }
    }

    fn glimpse(&mut self, session: &Session, before: PgTime, at: PgTime) {
        let (Some(begin), Some(change)) = (session.query_start, session.state_change) else { return };
        let end = if session.is_active { at } else { change };
        let known = self.glimpses.iter_mut().rev().take(256).find(|glimpse| {
            glimpse.begin == begin
                && glimpse.actor.pid == Some(session.pid)
                && glimpse.actor.backend_start == session.actor.backend_start
        });
        match known {
            Some(known) => known.end = end,
            None => {
                if self.glimpses.len() == GLIMPSES_MAX {
                    self.glimpses.pop_front();
                }
                let unseen_from = session.actor.backend_start.map_or(before, |start| before.max(start));
                self.glimpses.push_back(Glimpse { actor: session.actor.clone(), begin, end, unseen_from });
            }
        }
    }

    fn forget(&mut self, now: PgTime) {
        if self.entries.len() <= ENTRIES_MAX {
            return;
        }
        let mut seen: Vec<PgTime> = self.entries.values().map(|entry| entry.seen).collect();
        seen.sort_unstable();
        let oldest = seen.get(seen.len() / 4).copied().unwrap_or(now);
        self.entries.retain(|_, entry| entry.seen > oldest);
        // All were seen at once: there is no older quarter, so chance decides.
        let excess = self.entries.len().saturating_sub(ENTRIES_MAX);
        let victims: Vec<u32> = self.entries.keys().copied().take(excess).collect();
        for xid in victims {
            self.entries.remove(&xid);
        }
    }

    /// Transactions that are remembered.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if none is.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// True if this transaction was in a sample, so that to ask the server once more would tell nothing new.
    pub fn has_seen(&self, xid: Xid) -> bool {
        self.entry(xid).is_some()
    }

    fn entry(&self, xid: Xid) -> Option<&Entry> {
        let entry = self.entries.get(&xid.get())?;
        let (_, last) = self.watched?;
        (last.micros().saturating_sub(entry.seen.micros()) <= REMEMBERED_MICROS).then_some(entry)
    }

    /// Who did it, as far as the samples tell. What they do not tell is said in [`Who::note`].
    pub fn who(&self, question: &Question<'_>) -> Who {
        if let Some(entry) = question.xid.and_then(|xid| self.entry(xid)) {
            return Who {
                actor: Actor::clone(&entry.actor),
                source: WhoSource::Activity,
                note: entry.note.map(str::to_owned),
            };
        }
        let unknown = |note: String| Who { note: Some(note), ..Who::default() };
        let Some((first, last)) = self.watched else {
            return unknown("the agent has no SQL connection, so it did not see who was at work".to_owned());
        };
        if self.standby {
            return unknown("WAL is streamed from a standby: only the primary knows who was at work".to_owned());
        }
        let Some(ended) = question.ended else {
            return unknown("no session shows this transaction".to_owned());
        };
        if ended < first || ended > last {
            return unknown("it ended while the agent could not ask the server who was at work".to_owned());
        }
        let hidden =
            if self.is_hidden { "; and the agent's role lacks pg_monitor, so statements are not shown" } else { "" };
        let candidates = self.nearby(question, |glimpse| glimpse.begin <= ended && ended <= glimpse.end);
        match candidates.as_slice() {
            [] => self
                .in_a_row(question, ended)
                .unwrap_or_else(|| unknown(format!("it was over before a sample of the sessions was taken{hidden}"))),
            [only] => Who {
                actor: Actor::clone(only),
                source: WhoSource::Nearby,
                note: Some(
                    "this session's statement ended with the transaction; no other is known that did".to_owned(),
                ),
            },
            several => {
                let pids: Vec<_> =
                    several.iter().take(8).filter_map(|actor| actor.pid).map(|pid| pid.to_string()).collect();
                let pids = pids.join(", ");
                unknown(format!("several sessions were at work when it ended: processes {pids}"))
            }
        }
    }

    /// Of a session that ran several statements between two samples only the last one shows. If it is the only one in the
    /// database that may have changed anything then, the others are likely its own, too.
    fn in_a_row(&self, question: &Question<'_>, ended: PgTime) -> Option<Who> {
        // Whoever only read did not do it; whoever shows a COMMIT may have.
        let telling_of = |actor: &Actor| telling(actor.query.as_deref().unwrap_or_default());
        let candidates = self.sessions_of(question, |glimpse| {
            glimpse.unseen_from <= ended && ended < glimpse.begin && telling_of(&glimpse.actor) != TELLS_OF_READING
        });
        let [only] = candidates.as_slice() else { return None };
        if telling_of(only) < TELLS_OF_CHANGE {
            return None;
        }
        Some(Who {
            // The statement shown is a later one.
            actor: Actor { query: None, ..Actor::clone(only) },
            source: WhoSource::Nearby,
            note: Some(
                "the only session that changed anything in this database just then; its statements were too quick to be \
                 seen one by one"
                    .to_owned(),
            ),
        })
    }

    /// Sessions of which there is such a glimpse; if several, those whose statement names what was touched.
    fn nearby(&self, question: &Question<'_>, is_meant: impl Fn(&Glimpse) -> bool) -> Vec<&Actor> {
        let found = self.sessions_of(question, is_meant);
        if found.len() > 1 {
            let names_it = |actor: &&Actor| {
                let query = actor.query.as_deref().unwrap_or_default().to_lowercase();
                telling(&query) >= TELLS_OF_CHANGE && question.tables.iter().any(|table| names(&query, table))
            };
            let named: Vec<&Actor> = found.iter().copied().filter(|actor| names_it(actor)).collect();
            if !named.is_empty() {
                return named;
            }
        }
        found
    }

    /// Sessions in the database of which there is such a glimpse.
    fn sessions_of(&self, question: &Question<'_>, is_meant: impl Fn(&Glimpse) -> bool) -> Vec<&Actor> {
        let mut found: Vec<&Actor> = Vec::new();
        for glimpse in self.glimpses.iter().filter(|glimpse| is_meant(glimpse)) {
            let is_elsewhere = match (question.database, glimpse.actor.database.as_deref()) {
                (Some(asked), Some(database)) => asked != database,
                _ => false,
            };
            let is_twin = found
                .iter()
                .any(|actor| actor.pid == glimpse.actor.pid && actor.backend_start == glimpse.actor.backend_start);
            if !is_elsewhere && !is_twin {
                found.push(&glimpse.actor);
            }
        }
        found
    }
}

/// True if a statement, in small letters, names a table: as a word, for a name may be as short as a letter.
fn names(query: &str, table: &str) -> bool {
    let table = table.to_lowercase();
    let name = table.rsplit('.').next().unwrap_or(&table);
    query.contains(&table) && !name.chars().all(|c| c.is_alphanumeric() || c == '_')
        || query.split(|c: char| !c.is_alphanumeric() && c != '_').any(|word| word == name)
}

/// What [`telling`] gives to a statement that reads.
const TELLS_OF_READING: u8 = 1;

/// The least that [`telling`] gives to a statement that may change rows.
const TELLS_OF_CHANGE: u8 = 2;

/// How much a statement tells of what a transaction did: 0 if it only begins or ends something, 1 if it reads, 2 if it may
/// write, 3 if it destroys.
fn telling(query: &str) -> u8 {
    let mut rest = query.trim_start();
    // Comments that tools put before a statement.
    loop {
        let skipped = match (rest.strip_prefix("--"), rest.strip_prefix("/*")) {
            (Some(comment), _) => comment.split_once('\n').map(|(_, rest)| rest),
            (_, Some(comment)) => comment.split_once("*/").map(|(_, rest)| rest),
            _ => None,
        };
        match skipped {
            Some(behind) => rest = behind.trim_start(),
            None => break,
        }
    }
    let word: String = rest.chars().take_while(char::is_ascii_alphabetic).collect::<String>().to_ascii_lowercase();
    match word.as_str() {
        "" | "begin" | "start" | "commit" | "end" | "rollback" | "abort" | "savepoint" | "release" | "set" | "show"
        | "discard" | "deallocate" | "listen" | "prepare" => 0,
        "select" | "fetch" | "values" | "table" | "declare" | "close" | "explain" | "analyze" | "lock" => 1,
        "delete" | "truncate" | "drop" => 3,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xid(number: u32) -> Xid {
        Xid::new(number).unwrap()
    }

    fn time(millis: i64) -> PgTime {
        PgTime::from_micros(800_000_000_000_000 + millis * 1_000)
    }

    fn session(pid: i32, number: u32, query: &str) -> Session {
        let actor = Actor {
            role: Some("shop".to_owned()),
            database: Some("store".to_owned()),
            pid: Some(pid),
            backend_start: Some(time(-1_000)),
            query: Some(query.to_owned()),
            ..Actor::default()
        };
        Session { pid, xid: Xid::new(number), actor: Arc::new(actor), ..Session::default() }
    }

    fn sample(at: i64, sessions: Vec<Session>) -> Sample {
        let xids = sessions.iter().filter_map(|s| Some((s.xid?, s.pid))).collect();
        Sample { number: 1, at: Some(time(at)), sees_all: true, sessions, xids, ..Sample::default() }
    }

    fn who(activity: &Activity, number: u32) -> Who {
        activity.who(&Question { xid: Some(xid(number)), ended: Some(time(10)), ..Question::default() })
    }

    #[test]
    fn a_transaction_is_known_after_its_end_with_the_statement_that_did_it() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![session(7, 100, "DELETE FROM users")]));
        activity.learn(&sample(250, vec![session(7, 100, "SELECT count(*) FROM users")]));
        activity.learn(&sample(500, vec![session(7, 100, "COMMIT")]));
        activity.learn(&sample(750, vec![session(7, 101, "INSERT INTO log VALUES (1)")]));
        let found = who(&activity, 100);
        assert_eq!(found.source, WhoSource::Activity);
        assert_eq!(found.actor.query.as_deref(), Some("DELETE FROM users"));
        assert_eq!(who(&activity, 101).actor.query.as_deref(), Some("INSERT INTO log VALUES (1)"));
        assert_eq!(who(&activity, 102).source, WhoSource::Unknown);
    }

    #[test]
    fn a_process_that_serves_another_client_is_not_taken_for_the_one_before() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![session(7, 100, "DELETE FROM users")]));
        let mut other = session(7, 200, "SELECT 1");
        Arc::make_mut(&mut other.actor).application = Some("reports".to_owned());
        Arc::make_mut(&mut other.actor).backend_start = Some(time(100));
        activity.learn(&sample(250, vec![other]));
        assert_eq!(who(&activity, 100).actor.application, None);
        assert_eq!(who(&activity, 200).actor.application.as_deref(), Some("reports"));
        assert_eq!(who(&activity, 200).actor.query.as_deref(), Some("SELECT 1"));
    }

    #[test]
    fn a_subtransaction_is_its_sessions() {
        let mut activity = Activity::new();
        let mut with_sub = sample(0, vec![session(7, 100, "DELETE FROM users")]);
        with_sub.xids.push((xid(101), 7));
        activity.learn(&with_sub);
        assert_eq!(who(&activity, 101).actor.pid, Some(7));
    }

    #[test]
    fn a_lock_of_a_transaction_that_is_over_is_not_laid_at_the_next_ones_door() {
        let mut activity = Activity::new();
        let mut torn = sample(0, vec![session(7, 200, "SELECT 1")]);
        torn.xids = vec![(xid(100), 7), (xid(101), 7)]; // taken before; the session has gone on since
        activity.learn(&torn);
        assert_eq!(who(&activity, 101).source, WhoSource::Unknown);
    }

    #[test]
    fn a_parallel_worker_is_its_leaders() {
        let mut activity = Activity::new();
        let leader = session(7, 0, "DELETE FROM users");
        let worker = Session { leader: Some(7), ..session(8, 100, "") };
        activity.learn(&sample(0, vec![leader, worker]));
        let found = who(&activity, 100);
        assert_eq!(found.actor.pid, Some(7));
        assert!(found.note.is_some());
    }

    #[test]
    fn a_prepared_transaction_keeps_the_session_that_prepared_it() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![session(7, 100, "DELETE FROM users")]));
        let prepared = Prepared {
            xid: xid(100),
            name: "two".to_owned(),
            role: "shop".to_owned(),
            database: "store".to_owned(),
            at: time(1),
        };
        let mut after = sample(250, vec![]);
        after.prepared = vec![prepared.clone(), Prepared { xid: xid(90), ..prepared }];
        activity.learn(&after);
        let found = who(&activity, 100);
        assert_eq!((found.actor.pid, found.actor.prepared.as_deref(), found.note), (Some(7), Some("two"), None));
        let older = who(&activity, 90);
        assert_eq!((older.actor.pid, older.actor.role.as_deref()), (None, Some("shop")));
        assert!(older.note.is_some());
    }

    /// A session that ended a statement.
    fn ended(pid: i32, begin: i64, end: i64, query: &str) -> Session {
        Session { query_start: Some(time(begin)), state_change: Some(time(end)), ..session(pid, 0, query) }
    }

    fn who_at(activity: &Activity, at: i64, tables: &[&str]) -> Who {
        let question = Question { xid: Some(xid(5)), ended: Some(time(at)), database: Some("store"), tables };
        activity.who(&question)
    }

    #[test]
    fn a_statement_that_ended_between_samples_is_likely_if_it_is_the_only_one() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![]));
        activity.learn(&sample(250, vec![ended(7, 100, 120, "DELETE FROM users"), ended(8, 130, 140, "SELECT 1")]));
        let found = who_at(&activity, 119, &["users"]);
        assert_eq!((found.source, found.actor.pid), (WhoSource::Nearby, Some(7)));
        assert_eq!(who_at(&activity, 125, &["users"]).source, WhoSource::Unknown);
    }

    #[test]
    fn of_statements_in_a_row_the_last_one_speaks_for_its_session_if_no_other_was_at_work() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![]));
        activity.learn(&sample(250, vec![ended(7, 200, 210, "DELETE FROM games"), ended(8, 130, 140, "SELECT 1")]));
        let found = who_at(&activity, 100, &["users"]);
        assert_eq!((found.source, found.actor.pid, found.actor.query), (WhoSource::Nearby, Some(7), None));
        // Another session that may have done it is one too many, and one that shows only its COMMIT may have.
        let mut busy = Activity::new();
        busy.learn(&sample(0, vec![]));
        busy.learn(&sample(250, vec![ended(7, 200, 210, "DELETE FROM games"), ended(8, 220, 230, "END")]));
        assert_eq!(who_at(&busy, 100, &["users"]).source, WhoSource::Unknown);
        activity.learn(&sample(500, vec![ended(7, 400, 410, "DELETE FROM a"), ended(9, 420, 430, "DELETE FROM b")]));
        assert_eq!(who_at(&activity, 300, &["users"]).source, WhoSource::Unknown);
    }

    #[test]
    fn of_several_statements_at_once_the_one_that_names_the_table_is_likely() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![]));
        let at_once = vec![
            ended(7, 100, 120, "DELETE FROM users"),
            ended(8, 100, 140, "DELETE FROM baskets"),
            ended(9, 100, 140, "SELECT * FROM users"),
        ];
        activity.learn(&sample(250, at_once));
        assert_eq!(who_at(&activity, 110, &["Users"]).actor.pid, Some(7));
        let open = who_at(&activity, 110, &["orders"]);
        assert_eq!(open.source, WhoSource::Unknown);
        assert!(open.note.unwrap().contains("several sessions"));
    }

    #[test]
    fn what_nobody_could_see_is_said() {
        let mut activity = Activity::new();
        assert!(who(&activity, 1).note.unwrap().contains("no SQL connection"));
        activity.learn(&sample(100, vec![]));
        assert!(who_at(&activity, 50, &[]).note.unwrap().contains("could not ask"));
        let mut hidden = session(7, 100, "");
        hidden.is_hidden = true;
        activity.learn(&Sample { sees_all: false, ..sample(200, vec![hidden]) });
        assert!(who(&activity, 100).note.unwrap().contains("pg_monitor"));
        assert!(who_at(&activity, 150, &[]).note.unwrap().contains("pg_monitor"));
        activity.learn(&Sample { standby: true, ..sample(300, vec![]) });
        assert!(who_at(&activity, 150, &[]).note.unwrap().contains("standby"));
    }

    #[test]
    fn memory_is_bounded_and_the_newest_stay() {
        let mut activity = Activity::new();
        let mut number = 1;
        for round in 0..40 {
            let sessions: Vec<_> = (0..1_000).map(|n| session(n, number + n as u32, "UPDATE a SET b = 1")).collect();
            activity.learn(&sample(round * 250, sessions));
            number += 1_000;
            assert!(activity.len() <= ENTRIES_MAX);
            assert!(activity.has_seen(xid(number - 1)));
        }
        let flood: Vec<_> = (0..20_000).map(|n| session(n, 1_000_000 + n as u32, "")).collect();
        activity.learn(&sample(20_000, flood));
        assert!(activity.len() <= ENTRIES_MAX);
    }

    #[test]
    fn a_number_that_comes_again_after_hours_is_another_transaction() {
        let mut activity = Activity::new();
        activity.learn(&sample(0, vec![session(7, 100, "DELETE FROM users")]));
        activity.learn(&sample(2 * 3_600_000, vec![]));
        assert!(!activity.has_seen(xid(100)));
    }

    #[test]
    fn a_statement_tells_by_its_first_word() {
        assert_eq!(telling("/* app:shop */ -- x\n DELETE FROM a"), 3);
        assert_eq!(telling("with gone as (delete from a returning 1) select 1 from gone"), 2);
        assert_eq!(telling(" COMMIT;"), 0);
        assert_eq!(telling("select wipe()"), 1);
        assert_eq!(telling("/* never closed"), 0);
    }
}
