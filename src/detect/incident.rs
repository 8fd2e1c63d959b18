//! What happened, as it is kept, told and answered: an incident with its transactions, tables, and what was done about it.
//!
//! An incident is a value that is written whole, revision by revision. Everything in it that came from a database (names,
//! statements, roles) is bounded here and escaped by whoever shows it.

use jiff::Timestamp;

use super::rule::RuleName;
use super::{DdlKind, Relation, Who, WhoSource};
use crate::pg::{Lsn, PgTime, TimelineId, Xid};

/// Transactions kept one by one in an incident; a wipe in single rows has many more, which are counted.
pub const TRANSACTIONS_MAX: usize = 200;

/// Tables kept one by one in an incident.
pub const TABLES_MAX: usize = 1_000;

/// Findings, changes of definitions and moments kept in an incident, each.
pub const LINES_MAX: usize = 1_000;

/// How a note begins that says why nobody knows who did it. There is one at most, the detector's own.
pub(super) const WHO_UNKNOWN: &str = "who did it is not known";

/// The version of this structure; greater numbers only add fields that may be left out.
pub const FORMAT: u32 = 1;

/// Something that people are told about.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Incident {
    /// The version of the structure.
    pub format: u32,
    /// Its name, the same however often the WAL is read again: timeline and the place of the first transaction's end, in
    /// hexadecimal, `00000001-000000001A2B3C40`. Of an incident that was announced while its transaction was open the
    /// place is that of the transaction's beginning; of one that is no transaction's doing, a rule's name follows.
    pub id: String,
    /// Counted from 1; each is an object of its own.
    pub revision: u32,
    /// How far it is.
    pub state: State,
    /// How bad it is: the worst of its findings.
    pub severity: Severity,
    /// What happened, in a line.
    pub title: String,
    /// The timeline of all places in it.
    pub timeline: TimelineId,
    /// Where the commit record of the first transaction that destroyed something begins, a dropped or disabled trigger
    /// being something: what `before:<incident>` restores. `None` while nothing is committed, and of what is no
    /// transaction's doing.
    #[serde(default)]
    pub first_harm: Option<Lsn>,
    /// The same of the first transaction by which rows or tables were lost.
    #[serde(default)]
    pub first_loss: Option<Lsn>,
    /// The greatest place that was looked at for it.
    pub seen_to: Lsn,
    /// When the first of it ended, by the server's clock; until then, and of what is no transaction's doing, when it was
    /// noticed.
    pub began_at: Timestamp,
    /// When the last of it ended, likewise.
    pub ended_at: Timestamp,
    /// When the agent noticed it, by the agent's clock.
    pub detected_at: Timestamp,
    /// When this revision was made, by its writer's clock.
    pub updated_at: Timestamp,
    /// Which rules spoke, in the order in which they did.
    #[serde(default)]
    pub findings: Vec<Finding>,
    /// Findings that were too many.
    #[serde(default)]
    pub findings_more: u64,
    /// Whose doing it is, in WAL order.
    #[serde(default)]
    pub transactions: Vec<IncidentTransaction>,
    /// Transactions that were too many.
    #[serde(default)]
    pub transactions_more: u64,
    /// What became of which table.
    #[serde(default)]
    pub tables: Vec<TableDamage>,
    /// Tables that were too many.
    #[serde(default)]
    pub tables_more: u64,
    /// What became of definitions, in WAL order.
    #[serde(default)]
    pub ddl: Vec<DdlFinding>,
    /// Changes of definitions that were too many.
    #[serde(default)]
    pub ddl_more: u64,
    /// What happened when, to it and about it.
    #[serde(default)]
    pub moments: Vec<Moment>,
    /// What was done against it.
    #[serde(default)]
    pub actions: Vec<Action>,
    /// Rows that were saved.
    #[serde(default)]
    pub evidence: Vec<Evidence>,
    /// Nobody is told, because of this silence.
    #[serde(default)]
    pub silenced_by: Option<SilencedBy>,
    /// Who has seen it.
    #[serde(default)]
    pub acknowledged: Option<Signature>,
    /// Who closed it.
    #[serde(default)]
    pub resolved: Option<Signature>,
    /// What could not be found out, in sentences.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// How far an incident is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// A suspicion: its transaction is still open.
    Open,
    /// It happened.
    Committed,
    /// It was rolled back: nothing is lost.
    Aborted,
    /// Somebody has seen it.
    Acknowledged,
    /// It is over.
    Resolved,
}

impl State {
    /// Its name, as in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Committed => "committed",
            Self::Aborted => "aborted",
            Self::Acknowledged => "acknowledged",
            Self::Resolved => "resolved",
        }
    }

    /// Nobody needs to look at it any more.
    pub const fn is_closed(self) -> bool {
        matches!(self, Self::Resolved | Self::Aborted)
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// For the record.
    Info,
    /// Somebody should look when there is time.
    #[default]
    Warning,
    /// Somebody must look now.
    Critical,
}

impl Severity {
    /// Its name, as in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// What a rule says.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Finding {
    /// The rule.
    pub rule: RuleName,
    /// How bad it finds it.
    pub severity: Severity,
    /// In a sentence: `56 of 56 rows deleted from shop.public.tracks`.
    pub text: String,
    /// The table's full name, if it is about one.
    #[serde(default)]
    pub table: Option<String>,
    /// The transaction, if it is one's doing; of several the last.
    #[serde(default)]
    pub xid: Option<Xid>,
    /// Where that ended, or what is known of it while it is open.
    #[serde(default)]
    pub lsn: Option<Lsn>,
    /// When it was noticed, by the agent's clock.
    pub at: Timestamp,
    /// Nobody wanted to hear of it.
    #[serde(default)]
    pub silenced: bool,
}

/// A transaction of an incident.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IncidentTransaction {
    /// Its id.
    #[serde(default)]
    pub xid: Option<Xid>,
    /// Where its first record begins, as far as that was seen.
    pub begin: Lsn,
    /// Where the record that ends it begins; `None` while it is open.
    #[serde(default)]
    pub lsn: Option<Lsn>,
    /// When it ended, by the server's clock.
    #[serde(default)]
    pub time: Option<PgTime>,
    /// How far it is.
    pub state: TransactionState,
    /// False if its counts are only at least these.
    pub is_complete: bool,
    /// Rows inserted, of all tables.
    pub inserted: u64,
    /// Rows updated, of all tables.
    pub updated: u64,
    /// Rows deleted, of all tables.
    pub deleted: u64,
    /// Whose.
    #[serde(default)]
    pub who: Who,
}

/// How far a transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TransactionState {
    /// It has not ended.
    Open,
    /// It has not ended, and waits for `COMMIT PREPARED` or `ROLLBACK PREPARED`.
    Prepared,
    /// It is committed.
    Committed,
    /// It is rolled back.
    Aborted,
}

/// A number of rows and how sure it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Rows {
    /// How many.
    pub count: u64,
    /// False if it goes back to an estimate.
    pub exact: bool,
}

impl std::fmt::Display for Rows {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.exact {
            f.write_str("about ")?;
        }
        f.write_str(&grouped(self.count))
    }
}

/// What became of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TableDamage {
    /// Its full name, `database.schema.table`, for people.
    pub name: String,
    /// The table; `None` if nobody knows whose file it was.
    #[serde(default)]
    pub relation: Option<Relation>,
    /// Rows before the first transaction of the incident.
    #[serde(default)]
    pub before: Option<Rows>,
    /// Rows after the last one.
    #[serde(default)]
    pub after: Option<Rows>,
    /// Rows inserted meanwhile by the incident's transactions.
    #[serde(default)]
    pub inserted: u64,
    /// Rows updated.
    #[serde(default)]
    pub updated: u64,
    /// Rows deleted.
    #[serde(default)]
    pub deleted: u64,
    /// It was truncated.
    #[serde(default)]
    pub truncated: bool,
    /// It was dropped.
    #[serde(default)]
    pub dropped: bool,
    /// Another table has its name now, and fewer rows.
    #[serde(default)]
    pub replaced: bool,
    /// The full name that it had before it was renamed and the other took it.
    #[serde(default)]
    pub formerly: Option<String>,
    /// The partitioned table that it is a part of.
    #[serde(default)]
    pub partition_of: Option<String>,
}

/// What became of a definition.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DdlFinding {
    /// What was done.
    pub kind: DdlKind,
    /// Where.
    pub lsn: Lsn,
    /// By which transaction.
    #[serde(default)]
    pub xid: Option<Xid>,
    /// The full name of the table that it was done to, or that the object belongs to.
    #[serde(default)]
    pub table: Option<String>,
    /// The trigger, column, schema ..., where it is not the table itself.
    #[serde(default)]
    pub object: Option<String>,
}

/// Something that happened, to the data or about the incident.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Moment {
    /// When: of a transaction by the server's clock, otherwise by the writer's.
    pub at: Timestamp,
    /// Where in the WAL.
    #[serde(default)]
    pub lsn: Option<Lsn>,
    /// What, in a sentence.
    pub text: String,
}

/// Something that was done against an incident.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Action {
    /// When, by the agent's clock.
    pub at: Timestamp,
    /// What: `terminate` ...
    pub kind: String,
    /// Against which transaction.
    #[serde(default)]
    pub xid: Option<Xid>,
    /// The backend's process id.
    #[serde(default)]
    pub pid: Option<i32>,
    /// What came of it, in words: `terminated`, `already gone`, `not permitted`, `cap reached` ...
    pub outcome: String,
    /// Whether the transaction was really rolled back; `None` while that is not known.
    #[serde(default)]
    pub aborted: Option<bool>,
}

/// Rows that were saved beside the incident.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Evidence {
    /// The object's key in the repository.
    pub key: String,
    /// The table's full name.
    pub table: String,
    /// How many rows.
    pub rows: u64,
    /// Bytes of the object.
    pub bytes: u64,
    /// How they are written: `csv`, `binary copy` ...
    pub format: String,
    /// When they were read.
    pub taken_at: Timestamp,
    /// What is missing of them, in a sentence.
    #[serde(default)]
    pub note: Option<String>,
}

/// The silence because of which nobody is told.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SilencedBy {
    /// The silence's id.
    pub id: String,
    /// Why it was asked for.
    pub reason: String,
    /// Until when it holds.
    pub until: Timestamp,
}

/// Who answered, and when.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Signature {
    /// Who, as he called himself.
    pub by: String,
    /// When, by his clock.
    pub at: Timestamp,
    /// What he said.
    #[serde(default)]
    pub note: Option<String>,
}

/// An incident cannot go where somebody wants it to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AnswerError {
    /// It is closed already.
    #[error("incident {id} is resolved already, by {by}")]
    Resolved {
        /// The incident.
        id: String,
        /// By whom.
        by: String,
    },
    /// Its transaction has not ended.
    #[error("incident {id} is still open: its transaction has not ended")]
    StillOpen {
        /// The incident.
        id: String,
    },
}

/// The id of an incident whose first transaction ends (or, while it is open, begins) at `lsn`.
pub fn incident_id(timeline: TimelineId, lsn: Lsn) -> String {
    format!("{}-{:016X}", timeline.hex(), lsn.bytes())
}

/// The id of an incident that is no transaction's doing, noticed by `rule` when the WAL reached `lsn`.
pub fn condition_id(timeline: TimelineId, lsn: Lsn, rule: RuleName) -> String {
    format!("{}-{rule}", incident_id(timeline, lsn))
}

impl Incident {
    /// An incident that nothing is known of yet.
    pub fn new(id: String, timeline: TimelineId, at: Timestamp) -> Self {
        Self {
            format: FORMAT,
            id,
            revision: 1,
            state: State::Open,
            severity: Severity::Info,
            title: String::new(),
            timeline,
            first_harm: None,
            first_loss: None,
            seen_to: Lsn::ZERO,
            began_at: at,
            ended_at: at,
            detected_at: at,
            updated_at: at,
            findings: Vec::new(),
            findings_more: 0,
            transactions: Vec::new(),
            transactions_more: 0,
            tables: Vec::new(),
            tables_more: 0,
            ddl: Vec::new(),
            ddl_more: 0,
            moments: Vec::new(),
            actions: Vec::new(),
            evidence: Vec::new(),
            silenced_by: None,
            acknowledged: None,
            resolved: None,
            notes: Vec::new(),
        }
    }

    /// True if some of it is committed: data or definitions are really gone, or changed.
    pub fn is_committed(&self) -> bool {
        self.first_harm.is_some() || self.transactions.iter().any(|t| t.state == TransactionState::Committed)
    }

    /// True if it is no transaction's doing: the size of a backup, the lag of the archive ...
    pub const fn is_condition(&self) -> bool {
        self.transactions.is_empty()
    }

    /// True if somebody should be told of it.
    pub const fn is_told(&self) -> bool {
        self.silenced_by.is_none()
    }

    /// The best known author of its destructive transactions: the surest source, the earliest of these.
    pub fn who(&self) -> Option<&Who> {
        let mut best: Option<&Who> = None;
        for who in self.transactions.iter().map(|transaction| &transaction.who) {
            if best.is_none_or(|best| who.source > best.source) {
                best = Some(who);
            }
        }
        best
    }

    /// Rows deleted, truncated and dropped, as far as they are known: those that are missing now.
    pub fn rows_lost(&self) -> u64 {
        let lost = |table: &TableDamage| match (table.before, table.after) {
            (Some(before), Some(after)) => before.count.saturating_sub(after.count),
            _ => table.deleted.saturating_sub(table.inserted),
        };
        self.tables.iter().map(lost).fold(0, u64::saturating_add)
    }

    /// Somebody has seen it.
    ///
    /// # Errors
    /// If it is resolved. One that is acknowledged already gets the new signature.
    pub fn acknowledge(&mut self, signature: Signature) -> Result<(), AnswerError> {
        if let Some(resolved) = &self.resolved {
            return Err(AnswerError::Resolved { id: self.id.clone(), by: resolved.by.clone() });
        }
        self.note(signature.at, answered("acknowledged", &signature));
        if !matches!(self.state, State::Open) {
            self.state = State::Acknowledged;
        }
        self.acknowledged = Some(signature);
        Ok(())
    }

    /// It is over.
    ///
    /// # Errors
    /// If it is resolved already, or if its transaction has not ended.
    pub fn resolve(&mut self, signature: Signature) -> Result<(), AnswerError> {
        if let Some(resolved) = &self.resolved {
            return Err(AnswerError::Resolved { id: self.id.clone(), by: resolved.by.clone() });
        }
        if self.state == State::Open && !self.is_condition() {
            return Err(AnswerError::StillOpen { id: self.id.clone() });
        }
        self.note(signature.at, answered("resolved", &signature));
        self.state = State::Resolved;
        self.resolved = Some(signature);
        Ok(())
    }

    /// Adds a moment to its story.
    pub fn note(&mut self, at: Timestamp, text: String) {
        self.moment(Moment { at, lsn: None, text });
    }

    /// Adds a moment to its story. Beyond [`LINES_MAX`] it is left out.
    pub fn moment(&mut self, moment: Moment) {
        if self.moments.len() < LINES_MAX && !self.moments.contains(&moment) {
            self.moments.push(moment);
        }
    }

    /// Takes over what others wrote into `other`, another revision of the same incident, meanwhile: answers, actions,
    /// evidence, moments. What the detector found stays as it is here.
    pub fn take_answers(&mut self, other: &Self) {
        if self.acknowledged.is_none() {
            self.acknowledged.clone_from(&other.acknowledged);
        }
        if self.resolved.is_none() {
            self.resolved.clone_from(&other.resolved);
        }
        if self.resolved.is_some() {
            self.state = State::Resolved;
        } else if self.acknowledged.is_some() && self.state != State::Open {
            self.state = State::Acknowledged;
        }
        for action in &other.actions {
            let same = |ours: &Action| (ours.at, &ours.kind, ours.xid) == (action.at, &action.kind, action.xid);
            if let Some(ours) = self.actions.iter_mut().find(|ours| same(ours)) {
                ours.aborted = ours.aborted.or(action.aborted);
            } else if self.actions.len() < LINES_MAX {
                self.actions.push(action.clone());
            }
        }
        for evidence in &other.evidence {
            if self.evidence.len() < LINES_MAX && !self.evidence.iter().any(|ours| ours.key == evidence.key) {
                self.evidence.push(evidence.clone());
            }
        }
        for note in &other.notes {
            // Who did it may be known by now, or better why it is not.
            let is_ours = note.starts_with(WHO_UNKNOWN);
            if !is_ours && self.notes.len() < LINES_MAX && !self.notes.contains(note) {
                self.notes.push(note.clone());
            }
        }
        for moment in &other.moments {
            self.moment(moment.clone());
        }
        self.moments.sort_by_key(|moment| moment.at);
        for theirs in &other.transactions {
            let same = |ours: &&mut IncidentTransaction| ours.begin == theirs.begin && ours.xid == theirs.xid;
            if let Some(ours) = self.transactions.iter_mut().find(same)
                && ours.who.source < WhoSource::Activity
                && theirs.who.source > ours.who.source
            {
                ours.who = theirs.who.clone();
            }
        }
    }
}

fn answered(what: &str, signature: &Signature) -> String {
    let note = signature.note.as_ref().map(|note| format!(": {note}")).unwrap_or_default();
    format!("{what} by {}{note}", signature.by)
}

/// A number for people, `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn incident() -> Incident {
        let id = incident_id(TimelineId::FIRST, Lsn::new(0x1A2B_3C40));
        Incident { state: State::Committed, ..Incident::new(id, TimelineId::FIRST, Timestamp::UNIX_EPOCH) }
    }

    fn signed(by: &str) -> Signature {
        Signature { by: by.to_owned(), at: Timestamp::UNIX_EPOCH, note: Some("looking".to_owned()) }
    }

    fn transaction(state: TransactionState) -> IncidentTransaction {
        IncidentTransaction {
            xid: Xid::new(7),
            begin: Lsn::new(1),
            lsn: None,
            time: None,
            state,
            is_complete: true,
            inserted: 0,
            updated: 0,
            deleted: 0,
            who: Who::default(),
        }
    }

    #[test]
    fn ids_sort_in_wal_order_and_tell_conditions_apart() {
        assert_eq!(incident().id, "00000001-000000001A2B3C40");
        let condition = condition_id(TimelineId::FIRST, Lsn::new(0x1A2B_3C40), RuleName::ArchiveLag);
        assert_eq!(condition, "00000001-000000001A2B3C40-archive-lag");
        assert!(incident_id(TimelineId::FIRST, Lsn::new(0xFFFF)) < incident().id);
    }

    #[test]
    fn an_answer_moves_an_incident_on_and_is_told() {
        let mut incident = incident();
        incident.acknowledge(signed("ada")).unwrap();
        assert_eq!(incident.state, State::Acknowledged);
        incident.resolve(signed("bob")).unwrap();
        assert_eq!((incident.state, incident.moments[1].text.as_str()), (State::Resolved, "resolved by bob: looking"));
        let refused = incident.acknowledge(signed("eve")).unwrap_err();
        assert_eq!(refused.to_string(), format!("incident {} is resolved already, by bob", incident.id));
    }

    #[test]
    fn what_is_still_open_can_be_seen_but_not_closed() {
        let mut incident = Incident { state: State::Open, ..incident() };
        incident.transactions.push(transaction(TransactionState::Open));
        incident.acknowledge(signed("ada")).unwrap();
        assert_eq!(incident.state, State::Open);
        assert!(matches!(incident.resolve(signed("ada")), Err(AnswerError::StillOpen { .. })));
    }

    #[test]
    fn two_writers_lose_nothing_of_each_other() {
        let mut ours = incident();
        ours.note(Timestamp::UNIX_EPOCH, "one more table".to_owned());
        let mut theirs = incident();
        theirs.acknowledge(signed("ada")).unwrap();
        theirs.actions.push(Action {
            at: Timestamp::UNIX_EPOCH,
            kind: "terminate".into(),
            xid: Xid::new(7),
            pid: Some(1),
            outcome: "terminated".into(),
            aborted: None,
        });
        theirs.notes = vec![format!("{WHO_UNKNOWN}: the sample is still to come"), "no rows were saved".to_owned()];
        ours.take_answers(&theirs);
        ours.take_answers(&theirs);
        assert_eq!(ours.notes, ["no rows were saved"], "what was said of who did it is the detector's to say");
        assert_eq!((ours.state, ours.actions.len(), ours.moments.len()), (State::Acknowledged, 1, 2));
    }

    #[test]
    fn the_surest_witness_is_believed() {
        let mut incident = incident();
        for source in [WhoSource::Unknown, WhoSource::Guard, WhoSource::Activity] {
            let who = Who { source, ..Who::default() };
            incident.transactions.push(IncidentTransaction { who, ..transaction(TransactionState::Committed) });
        }
        assert_eq!(incident.who().unwrap().source, WhoSource::Guard);
    }

    #[test]
    fn an_incident_is_read_as_it_was_written_and_may_lack_what_came_later() {
        let mut incident = incident();
        incident.transactions.push(transaction(TransactionState::Committed));
        incident.tables.push(TableDamage { name: "a.b.c".into(), ..TableDamage::default() });
        let json = serde_json::to_string(&incident).unwrap();
        assert_eq!(serde_json::from_str::<Incident>(&json).unwrap(), incident);
        let old = json
            .replace("\"notes\":[],", "")
            .replace(",\"notes\":[]", "")
            .replace("\"format\"", "\"new\":1,\"format\"");
        assert_eq!(serde_json::from_str::<Incident>(&old).unwrap(), incident);
    }

    #[test]
    fn rows_are_told_with_their_certainty() {
        assert_eq!(Rows { count: 1_234_567, exact: false }.to_string(), "about 1,234,567");
        assert_eq!(Rows { count: 12, exact: true }.to_string(), "12");
    }
}
