//! Transactions in, incidents out.
//!
//! ```text
//! transaction -> damage per table -> what the rules say -> joined to an incident, or a new one -> what is new of it
//!                (live rows)         (window, baseline)     (same session, related tables,
//!                                                            within a minute)
//! ```
//!
//! Nothing here is told to anybody: [`Detector::take_changed`] gives what must be written down first.
//!
//! **A replay alarms nobody twice.** After a restart the WAL is read again from some place before the last incident.
//! Whatever ends at or before the last place that an incident holds was judged already ([`Detector::restore`]); it is
//! counted, and not judged again.

use std::time::Duration;

use foldhash::{HashMap, HashMapExt as _, HashSet};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use super::baseline::Baseline;
use super::damage::{Damage, Work, damages};
use super::incident::{
    DdlFinding, Finding, IncidentTransaction, LINES_MAX, Moment, Rows, Signature, TABLES_MAX, TRANSACTIONS_MAX,
    TableDamage, TransactionState, WHO_UNKNOWN, condition_id, grouped, incident_id,
};
use super::judge::{Draft, Judge, tables_of};
use super::judged::Judged;
use super::live_rows::{LiveRows, TableKey, is_partial, key_of};
use super::rule::{Breaker, Config};
use super::silence::Silence;
use super::window::{Touch, WindowSum, Windows};
use super::{DdlEvent, Incident, RuleName, Running, Severity, State, Tally, Transaction, Who, WhoSource};
use crate::pg::{Lsn, Oid, PgTime, TimelineId, Xid};

/// Incidents that something may still be added to; of more, the oldest are left as they are.
const ACTIVE_MAX: usize = 256;

/// Small losses that may turn out to be the beginning of an incident.
const LEADS_MAX: usize = 256;

/// An incident that only grows is given again after so long; one with a new finding or table sooner, and at once what is new,
/// worse than before, or in another state.
const GROWTH_PAUSE: SignedDuration = SignedDuration::from_secs(5);

/// See [`GROWTH_PAUSE`]: eighteen tables within a second are three revisions, not eighteen.
const NEWS_PAUSE: SignedDuration = SignedDuration::from_millis(500);

/// A database is wiped if at least so many of its tables, and half of those with rows, are lost.
const WIPE_TABLES_MIN: usize = 3;

/// The watch.
#[derive(Debug)]
pub struct Detector {
    config: Config,
    zone: TimeZone,
    timeline: TimelineId,
    live: LiveRows,
    windows: Windows,
    baseline: Baseline,
    silences: Vec<Silence>,
    parents: HashMap<TableKey, String>,
    active: Vec<Active>,
    leads: Vec<Lead>,
    /// What ends here or before was judged by an agent before us.
    judged_to: Judged,
    /// What ends here or before is in what was learned.
    learned_to: Lsn,
    /// The latest end of a transaction, by the server's clock.
    clock: Option<PgTime>,
    breaks: Vec<Break>,
}

/// A transaction that is still open, as far as its records were read.
#[derive(Clone, Copy, Debug)]
pub struct OpenWork<'a> {
    /// Its id; of a subtransaction that one's own.
    pub xid: Xid,
    /// Where its first record begins.
    pub begin: Lsn,
    /// It is prepared.
    pub is_prepared: bool,
    /// False if its beginning was not seen.
    pub is_complete: bool,
    /// Rows by relation so far; catalogs', indexes' and TOAST tables' not among them.
    pub tallies: &'a [Tally],
    /// What it did to definitions so far.
    pub ddl: &'a [DdlEvent],
    /// How far the WAL was read.
    pub lsn: Lsn,
}

/// A transaction whose session should be terminated before it commits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Break {
    /// The incident.
    pub incident: String,
    /// The transaction.
    pub xid: Xid,
    /// The rule that asks for it.
    pub rule: RuleName,
}

/// Something that is wrong and no transaction's doing: the lag of the archive, the size of a backup, a trigger that is
/// missing by count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// The rule.
    pub rule: RuleName,
    /// How bad it is by itself.
    pub severity: Severity,
    /// In a sentence.
    pub text: String,
    /// How far the WAL is.
    pub lsn: Lsn,
}

/// An incident that something may be added to.
#[derive(Debug)]
struct Active {
    incident: Incident,
    /// Its tables, schemas and sessions: whose findings belong to it.
    tables: HashSet<TableKey>,
    schemas: HashSet<(Oid, String)>,
    sessions: HashSet<Session>,
    /// What its open transactions did so far.
    open: Vec<OpenPart>,
    change: Option<Change>,
    given_at: Option<Timestamp>,
    /// When something was added last.
    touched_at: Timestamp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Change {
    Growth,
    News,
    Urgent,
}

impl Change {
    /// How long it may wait after the incident was given last.
    const fn pause(self) -> SignedDuration {
        match self {
            Self::Growth => GROWTH_PAUSE,
            Self::News => NEWS_PAUSE,
            Self::Urgent => SignedDuration::ZERO,
        }
    }
}

#[derive(Clone, Debug)]
struct OpenPart {
    xid: Xid,
    begin: Lsn,
    tables: Vec<TableDamage>,
}

/// A session for good: process id and beginning.
type Session = (i32, PgTime);

/// A loss that no rule speaks of by itself.
#[derive(Clone, Debug)]
struct Lead {
    xid: Option<Xid>,
    begin: Lsn,
    lsn: Lsn,
    time: PgTime,
    is_complete: bool,
    damages: Vec<Damage>,
}

/// Who is asked for a transaction's author.
pub type Witness<'a> = &'a mut dyn FnMut(&Asked) -> Who;

/// Whose author is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The transaction.
    pub xid: Option<Xid>,
    /// When it ended; `None` if it is open.
    pub ended: Option<PgTime>,
    /// Its database's name, if that is known.
    pub database: Option<String>,
    /// Some of the tables that it touched, by name alone.
    pub tables: Vec<String>,
}

impl Asked {
    fn of(xid: Option<Xid>, ended: Option<PgTime>, damages: &[Damage], ddl: &[DdlEvent]) -> Self {
        let relations = damages.iter().map(|damage| &damage.relation);
        let mut relations = relations.chain(ddl.iter().filter_map(|event| event.relation.as_ref())).peekable();
        let database = relations.peek().map(|relation| relation.database_name.clone()).filter(|name| !name.is_empty());
        let tables = relations.map(|relation| relation.name.clone()).filter(|name| !name.is_empty());
        Self { xid, ended, database, tables: tables.take(TABLES_ASKED_MAX).collect() }
    }

    fn known(transaction: &IncidentTransaction, tables: &[TableDamage]) -> Self {
        let relations = tables.iter().filter_map(|table| table.relation.as_ref());
        Self {
            xid: transaction.xid,
            ended: transaction.time,
            database: relations.clone().map(|relation| relation.database_name.clone()).find(|name| !name.is_empty()),
            tables: relations.map(|relation| relation.name.clone()).take(TABLES_ASKED_MAX).collect(),
        }
    }
}

/// Names that tell a statement apart from others.
const TABLES_ASKED_MAX: usize = 16;

/// A witness may know more for so long: the sample that is being taken, and the next one.
const WITNESS_PATIENCE: SignedDuration = SignedDuration::from_secs(3);

/// Whose findings these are, for grouping.
#[derive(Debug, Default)]
struct Ties {
    tables: HashSet<TableKey>,
    schemas: HashSet<(Oid, String)>,
    session: Option<Session>,
}

impl Detector {
    /// Knows nothing yet; sees the WAL of `timeline`. Times of day in the settings are those of `zone`.
    pub fn new(config: Config, zone: TimeZone, timeline: TimelineId) -> Self {
        Self {
            windows: Windows::new(config.window),
            config,
            zone,
            timeline,
            live: LiveRows::new(),
            baseline: Baseline::new(),
            silences: Vec::new(),
            parents: HashMap::new(),
            active: Vec::new(),
            leads: Vec::new(),
            judged_to: Judged::default(),
            learned_to: Lsn::ZERO,
            clock: None,
            breaks: Vec::new(),
        }
    }

    /// Databases are streamed apart from each other: how far one was judged says nothing of another.
    pub fn apart(&mut self) {
        self.judged_to.is_apart = true;
    }

    /// Takes the newest revisions of the incidents that are kept: what they hold is not reported again.
    pub fn restore(&mut self, incidents: Vec<Incident>) {
        let timeline = self.timeline;
        for incident in incidents.into_iter().filter(|incident| incident.timeline == timeline) {
            if !incident.is_condition() {
                self.judged_to.restore(&incident);
            }
            if incident.state != State::Resolved {
                self.activate(Active::of(incident));
            }
        }
    }

    /// The WAL goes on on another timeline.
    pub fn follow(&mut self, timeline: TimelineId) {
        self.timeline = timeline;
        self.judged_to.forget(Lsn::ZERO);
        for active in &mut self.active {
            active.end_with_timeline(timeline);
        }
    }

    /// The server was restored to a moment of its past, and goes on from `fork`. What was counted of its rows is no longer
    /// so; what ended before was judged.
    pub fn go_back(&mut self, fork: Lsn) {
        self.judged_to.forget(fork);
        self.live = LiveRows::new();
        self.windows = Windows::new(self.config.window);
        self.leads.clear();
        self.learned_to = Lsn::ZERO;
        self.clock = None;
    }

    /// Live row counts, to be seeded.
    pub const fn live(&mut self) -> &mut LiveRows {
        &mut self.live
    }

    /// What holds now.
    pub fn set_silences(&mut self, silences: Vec<Silence>) {
        self.silences = silences;
    }

    /// Tables that are partitions, with the full name of the table that they are a part of.
    pub fn set_parents(&mut self, parents: impl IntoIterator<Item = (TableKey, String)>) {
        self.parents = parents.into_iter().take(65_536).collect();
    }

    /// Asks again who it was where that is not certain and may still come to light.
    pub fn ask_again(&mut self, who: Witness<'_>, now: Timestamp) {
        for active in &mut self.active {
            if now.duration_since(active.touched_at) > WITNESS_PATIENCE || active.incident.is_condition() {
                continue;
            }
            let mut is_better = false;
            let Incident { transactions, tables, .. } = &mut active.incident;
            for transaction in transactions.iter_mut().filter(|known| known.who.source < WhoSource::Activity) {
                let found = who(&Asked::known(transaction, tables));
                if found.source == transaction.who.source && found.note.is_some() {
                    transaction.who.note = found.note; // why it is not known is known better by now
                } else if found.source > transaction.who.source {
                    active.sessions.extend(session_of(&found));
                    transaction.who = found;
                    is_better = true;
                }
            }
            if is_better {
                active.change = Some(Change::News);
            }
        }
    }

    /// The ids of the incidents that somebody may have answered meanwhile.
    pub fn unanswered(&self) -> Vec<String> {
        let open = self.active.iter().map(|active| &active.incident);
        open.filter(|incident| incident.state != State::Resolved).map(|incident| incident.id.clone()).collect()
    }

    /// Whether a rule spoke of something by that name lately.
    pub fn spoke_of(&self, rule: RuleName, name: &str) -> bool {
        let mut findings = self.active.iter().flat_map(|active| &active.incident.findings);
        findings.any(|finding| finding.rule == rule && finding.text.contains(name))
    }

    /// The first place in the WAL that is seen. If that is behind what was remembered, row counts are estimates from now on.
    pub fn begins_at(&mut self, lsn: Lsn) {
        if self.learned_to != Lsn::ZERO && lsn > self.learned_to {
            self.live.doubt_all();
        }
    }

    /// Somebody answered an incident: it is as it is in the repository.
    pub fn answered(&mut self, incident: &Incident) {
        if let Some(active) = self.active.iter_mut().find(|active| active.incident.id == incident.id) {
            active.incident.take_answers(incident);
        }
        self.active.retain(|active| active.incident.state != State::Resolved || active.change.is_some());
    }

    /// A transaction has ended. `who` is asked only if there is something to tell.
    pub fn transaction(&mut self, transaction: &Transaction, who: Witness<'_>, now: Timestamp) {
        self.clock = Some(self.clock.map_or(transaction.time, |clock| clock.max(transaction.time)));
        let suspicion = self.suspicion_of(transaction);
        if !transaction.committed {
            if let Some(place) = suspicion {
                self.roll_back(place, transaction);
            }
            return;
        }
        if transaction.tallies.is_empty() && transaction.ddl.is_empty() {
            if let Some(place) = suspicion {
                self.roll_back(place, transaction);
            }
            return;
        }
        let work = Work {
            tallies: &transaction.tallies,
            ddl: &transaction.ddl,
            is_complete: !is_partial(transaction),
            lsn: transaction.lsn,
        };
        let damages = damages(&work, &self.live);
        let sums = self.count(transaction, &damages);
        let is_judged = self.judged_to.holds(transaction) && suspicion.is_none();
        let known = (!is_judged).then(|| self.author_if_asked(transaction, &damages, &work, who)).flatten();
        let author = known.unwrap_or_default();
        let judge = Judge {
            config: &self.config,
            zone: &self.zone,
            live: &self.live,
            baseline: &self.baseline,
            sums: &sums,
            who: &author,
            time: transaction.time,
        };
        let drafts = if is_judged { Vec::new() } else { judge.drafts(&work, &damages) };
        self.learn(transaction, &damages, &sums, &drafts);
        self.apply(transaction, &damages);
        if is_judged {
            return;
        }
        let ended = Ended { transaction, damages: &damages, drafts, who: author, now };
        self.group(ended, suspicion, who);
    }

    /// Asks who it was, where a rule or an exception could want to know.
    fn author_if_asked(
        &self,
        transaction: &Transaction,
        damages: &[Damage],
        work: &Work<'_>,
        who: Witness<'_>,
    ) -> Option<Who> {
        let may_matter = |damage: &Damage| {
            let rows = damage.counts.deleted.saturating_add(damage.counts.updated).saturating_add(damage.counts.moved);
            let few = self.config.rows_updated_min.min(self.config.rows_deleted_min);
            damage.truncated || damage.step.dropped || damage.counts.deleted > 0 && damage.lost() > 0 || rows >= few
        };
        let matters = damages.iter().any(may_matter) || work.ddl.iter().any(|event| event.kind.is_destructive());
        // Looked up on suspicion only: whole streams of small deletes would ask each time.
        let is_needed =
            matters && (self.asks_people() || !self.active.is_empty() || damages.iter().any(|d| d.lost() > 0));
        is_needed.then(|| who(&Asked::of(transaction.xid, Some(transaction.time), damages, work.ddl)))
    }

    fn asks_people(&self) -> bool {
        let people = |adjust: &super::rule::Adjust| !adjust.roles.is_empty() || !adjust.applications.is_empty();
        self.config.adjust.iter().any(people)
    }

    /// Adds a committed transaction to the windows; gives their sums.
    fn count(&mut self, transaction: &Transaction, damages: &[Damage]) -> HashMap<TableKey, WindowSum> {
        let mut sums = HashMap::new();
        for damage in damages {
            let touch = Touch {
                xid: transaction.xid,
                begin: transaction.begin,
                lsn: transaction.lsn,
                time: transaction.time,
                inserted: damage.counts.inserted,
                deleted: damage.counts.deleted,
            };
            self.windows.add(damage.key(), touch);
            if damage.counts.deleted > 0 {
                sums.insert(damage.key(), self.windows.sum(damage.key()));
            }
        }
        sums
    }

    fn learn(
        &mut self,
        transaction: &Transaction,
        damages: &[Damage],
        sums: &HashMap<TableKey, WindowSum>,
        drafts: &[Draft],
    ) {
        if !self.config.learn || transaction.lsn <= self.learned_to {
            return;
        }
        let told = tables_of(drafts);
        for damage in damages.iter().filter(|damage| !damage.step.created && !damage.step.dropped) {
            let alone = if damage.truncated { damage.lost() } else { damage.counts.deleted };
            if alone == 0 {
                continue;
            }
            let lost = damage.lost().max(sums.get(&damage.key()).map_or(0, WindowSum::lost));
            let deletion = super::baseline::Deletion {
                time: transaction.time,
                in_window: lost,
                in_transaction: alone,
                emptied: damage.is_emptied(),
            };
            self.baseline.learn(damage.key(), &deletion, told.contains(&damage.key()));
        }
    }

    fn apply(&mut self, transaction: &Transaction, damages: &[Damage]) {
        for damage in damages {
            self.live.apply(damage.key(), transaction.lsn, &damage.step);
            if damage.step.dropped {
                self.baseline.forget(damage.key());
                self.windows.forget(damage.key());
            } else if damage.truncated {
                self.windows.forget(damage.key());
            }
        }
        for event in transaction.ddl.iter().filter(|event| event.kind == super::DdlKind::DropDatabase) {
            self.live.forget_database(event.database);
        }
    }

    /// Where the incident is that announced this transaction while it was open.
    fn suspicion_of(&self, transaction: &Transaction) -> Option<usize> {
        let is_it = |part: &OpenPart| {
            Some(part.xid) == transaction.xid
                // A subtransaction was seen by its own id: it began within, and touched nothing else.
                || transaction.subtransactions > 0
                    && (transaction.begin..transaction.lsn).contains(&part.begin)
                    && part.tables.iter().all(|table| {
                        let same = |tally: &&Tally| {
                            let ours = tally.relation.as_ref().map(|relation| key_of(relation));
                            ours == table.relation.as_ref().map(key_of)
                        };
                        let rows: u64 = transaction.tallies.iter().filter(same).map(|tally| tally.counts.deleted).sum();
                        rows >= table.deleted
                    })
        };
        self.active.iter().position(|active| active.open.iter().any(is_it))
    }

    fn roll_back(&mut self, place: usize, transaction: &Transaction) {
        let Some(active) = self.active.get_mut(place) else { return };
        let parts: Vec<OpenPart> = active.open.extract_if(.., |part| Some(part.xid) == transaction.xid).collect();
        let state = if transaction.committed { TransactionState::Committed } else { TransactionState::Aborted };
        for part in parts {
            active.end_transaction(&part, transaction, state);
            if active.incident.tables.is_empty() {
                // What was tried is still worth telling.
                active.incident.tables = part.tables;
            }
        }
        for action in &mut active.incident.actions {
            if action.xid == transaction.xid {
                action.aborted = action.aborted.or(Some(!transaction.committed));
            }
        }
        let text = format!("transaction {} rolled back", name_of(transaction.xid));
        active.incident.moment(Moment { at: transaction.time.timestamp(), lsn: Some(transaction.lsn), text });
        active.change = Some(Change::Urgent);
    }

    /// The server wrote down which transactions are open: a suspicion of one that is gone is over. Its end was not seen,
    /// because the server stopped without writing it.
    pub fn see_running(&mut self, running: &Running, now: Timestamp) {
        for active in &mut self.active {
            let is_gone = |part: &mut OpenPart| part.begin < running.lsn && running.is_gone(part.xid);
            for part in active.open.extract_if(.., is_gone).collect::<Vec<_>>() {
                active.give_up(part, running.lsn, now);
            }
        }
    }

    /// Finds the incident that findings belong to, or begins one.
    fn group(&mut self, ended: Ended<'_>, suspicion: Option<usize>, who: Witness<'_>) {
        let Ended { transaction, damages, .. } = &ended;
        let mut ties = Ties::of(damages, &transaction.ddl, &ended.who);
        ties.schemas.extend(ended.drafts.iter().filter_map(whole_database));
        let losses: Vec<&Damage> = damages.iter().filter(|damage| is_small_loss(damage)).collect();
        let place = suspicion.or_else(|| self.related(&ties, transaction.time));
        if ended.drafts.is_empty() && suspicion.is_none() {
            if losses.is_empty() {
                return;
            }
            // More of the same, or of what belongs to it; or the beginning of something.
            let is_quiet = |damage: &Damage| self.live.is_churning(damage.key()) || self.is_routine(damage, &ended);
            let losses: Vec<&Damage> = losses.into_iter().filter(|damage| !is_quiet(damage)).collect();
            if losses.is_empty() {
                return;
            }
            match place {
                // What others lose beside a transaction that is still open does not make that one committed.
                Some(place)
                    if self.has_harm(place)
                        && losses.iter().any(|damage| damage.is_emptied() || self.holds(place, damage.key())) =>
                {
                    let kept: Vec<Damage> = losses.into_iter().cloned().collect();
                    let ended = Ended { damages: &kept, ..ended };
                    self.join(place, &ended, who);
                }
                _ => {
                    let lead = Lead {
                        xid: transaction.xid,
                        begin: transaction.begin,
                        lsn: transaction.lsn,
                        time: transaction.time,
                        is_complete: transaction.is_complete,
                        damages: losses.into_iter().filter(|damage| damage.is_emptied()).cloned().collect(),
                    };
                    self.lead(lead, &ended, &ties, who);
                }
            }
            return;
        }
        let place = place.unwrap_or_else(|| {
            ties.tables.extend(tables_of(&ended.drafts));
            self.begin(transaction.lsn, transaction.time, ended.now)
        });
        self.join(place, &ended, who);
        self.absorb_leads(place, transaction.time, who);
    }

    /// Whether the settings say of such a loss of this table that nothing is to be said of it.
    fn is_routine(&self, damage: &Damage, ended: &Ended<'_>) -> bool {
        let rule = match damage {
            damage if damage.step.dropped => RuleName::DropTable,
            damage if damage.truncated => RuleName::Truncate,
            _ => RuleName::TableEmptied,
        };
        let case = super::rule::Case {
            rule,
            table: Some(&damage.relation),
            who: &ended.who,
            at: ended.transaction.time.timestamp(),
            zone: &self.zone,
        };
        !self.config.is_watched(&damage.relation) || self.config.judge(&case, Severity::Critical).is_none()
    }

    fn has_harm(&self, place: usize) -> bool {
        self.active.get(place).is_some_and(Active::is_committed)
    }

    fn holds(&self, place: usize, table: TableKey) -> bool {
        self.active.get(place).is_some_and(|active| active.tables.contains(&table))
    }

    /// Keeps a small loss in mind; several tables emptied within the span of an incident are one.
    fn lead(&mut self, lead: Lead, ended: &Ended<'_>, ties: &Ties, who: Witness<'_>) {
        if lead.damages.is_empty() {
            return;
        }
        let span = micros(self.config.group_within);
        self.leads.retain(|other| lead.time.micros().saturating_sub(other.time.micros()) <= span);
        if self.leads.len() >= LEADS_MAX {
            self.leads.remove(0);
        }
        self.leads.push(lead);
        let is_related =
            |damage: &&Damage| ties.schemas.contains(&(damage.relation.database, damage.relation.schema.clone()));
        let emptied: HashMap<TableKey, u64> = self
            .leads
            .iter()
            .flat_map(|lead| &lead.damages)
            .filter(is_related)
            .map(|damage| (damage.key(), damage.lost()))
            .collect();
        let rows = emptied.values().fold(0_u64, |sum, rows| sum.saturating_add(*rows));
        let is_enough = emptied.len() >= self.config.tables_emptied_min.max(1) as usize
            && rows >= self.config.table_emptied_rows_min;
        if !is_enough {
            return;
        }
        let judge = super::rule::Case {
            rule: RuleName::TablesEmptied,
            table: None,
            who: &ended.who,
            at: ended.transaction.time.timestamp(),
            zone: &self.zone,
        };
        let Some(judged) = self.config.judge(&judge, Severity::Critical) else { return };
        let draft = Draft {
            rule: RuleName::TablesEmptied,
            severity: judged.severity,
            text: format!("{} tables emptied", emptied.len()),
            relation: None,
            is_harm: true,
            is_loss: true,
            window: None,
            breaker: judged.breaker,
        };
        let place = self.begin(ended.transaction.lsn, ended.transaction.time, ended.now);
        let ended = Ended {
            transaction: ended.transaction,
            damages: &[],
            drafts: vec![draft],
            who: ended.who.clone(),
            now: ended.now,
        };
        if let Some(active) = self.active.get_mut(place) {
            active.tables.extend(emptied.keys());
            active.schemas.extend(ties.schemas.iter().cloned());
        }
        self.join(place, &ended, who);
        self.absorb_leads(place, ended.transaction.time, who);
    }

    /// Takes the small losses just before into an incident that they belong to.
    fn absorb_leads(&mut self, place: usize, time: PgTime, who: Witness<'_>) {
        let span = micros(self.config.group_within);
        let Some(active) = self.active.get_mut(place) else { return };
        let belongs = |lead: &mut Lead| {
            let is_near = time.micros().saturating_sub(lead.time.micros()) <= span;
            is_near && lead.damages.iter().any(|damage| active.is_about(&damage.relation))
        };
        let leads: Vec<Lead> = self.leads.extract_if(.., belongs).collect();
        for lead in leads {
            let who = who(&Asked::of(lead.xid, Some(lead.time), &lead.damages, &[]));
            active.add_transaction(
                IncidentTransaction {
                    xid: lead.xid,
                    begin: lead.begin,
                    lsn: Some(lead.lsn),
                    time: Some(lead.time),
                    state: TransactionState::Committed,
                    is_complete: lead.is_complete,
                    inserted: lead.damages.iter().map(|damage| damage.counts.inserted).sum(),
                    updated: 0,
                    deleted: lead.damages.iter().map(|damage| damage.counts.deleted).sum(),
                    who,
                },
                true,
                true,
            );
            for damage in &lead.damages {
                active.add_damage(damage, None, &self.parents, lead.lsn);
            }
        }
    }

    /// The incident that findings with these ties belong to.
    fn related(&self, ties: &Ties, time: PgTime) -> Option<usize> {
        let span = SignedDuration::try_from(self.config.group_within).unwrap_or(SignedDuration::MAX);
        let at = time.timestamp();
        let is_near = |active: &Active| {
            let incident = &active.incident;
            !incident.is_condition()
                && incident.timeline == self.timeline // its places mean nothing on another
                && incident.state != State::Resolved
                && !active.came_to_nothing()
                && at.duration_since(incident.ended_at) <= span
                && incident.began_at.duration_since(at) <= span
        };
        let mut candidates = self.active.iter().enumerate().rev().filter(|(_, active)| is_near(active));
        candidates.find(|(_, active)| active.is_tied(ties)).map(|(place, _)| place)
    }

    fn begin(&mut self, lsn: Lsn, time: PgTime, now: Timestamp) -> usize {
        let mut incident = Incident::new(incident_id(self.timeline, lsn), self.timeline, now);
        incident.began_at = time.timestamp();
        incident.ended_at = time.timestamp();
        self.activate(Active::of(incident))
    }

    fn activate(&mut self, active: Active) -> usize {
        if self.active.len() >= ACTIVE_MAX
            && let Some(place) = self.active.iter().position(|active| active.change.is_none() && active.open.is_empty())
        {
            self.active.remove(place);
        }
        self.active.push(active);
        self.active.len() - 1
    }

    /// Adds an ended transaction to an incident.
    fn join(&mut self, place: usize, ended: &Ended<'_>, who: Witness<'_>) {
        let Ended { transaction, damages, drafts, now, .. } = ended;
        let Some(active) = self.active.get_mut(place) else { return };
        let is_news = active.tie(damages, &transaction.ddl, drafts, &ended.who);
        let mut part = None;
        active.open.retain(|open| {
            let is_it = Some(open.xid) == transaction.xid
                || transaction.subtransactions > 0 && (transaction.begin..transaction.lsn).contains(&open.begin);
            if is_it {
                part.get_or_insert_with(|| open.clone());
            }
            !is_it
        });
        // What earlier transactions of the window did is a part of it.
        for draft in drafts.iter().filter(|draft| draft.window.is_some()) {
            let Some(relation) = &draft.relation else { continue };
            let table = key_of(relation);
            let (first, transactions) = draft.window.as_ref().map_or((None, 0), |sum| (sum.first, sum.transactions));
            let name = relation.full_name();
            // Those that are told of already are a part of it already.
            if !active.incident.findings.iter().any(|finding| finding.table.as_ref() == Some(&name)) {
                let touches: Vec<Touch> = self.windows.touches(table).copied().collect();
                active.incident.transactions_more += transactions.saturating_sub(touches.len() as u64);
                for touch in touches.into_iter().filter(|touch| touch.lsn != transaction.lsn) {
                    let who = who(&Asked::of(touch.xid, Some(touch.time), damages, &[]));
                    active.add_transaction(touch.told(who), true, true);
                }
            }
            if let Some((lsn, time)) = first {
                active.begins(lsn, time, true);
            }
        }
        let rows = transaction.rows();
        let is_harm = drafts.iter().any(|draft| draft.is_harm) || !damages.is_empty();
        let is_loss = drafts.iter().any(|draft| draft.is_loss) || damages.iter().any(is_small_loss);
        let told = IncidentTransaction {
            xid: transaction.xid,
            begin: transaction.begin,
            lsn: Some(transaction.lsn),
            time: Some(transaction.time),
            state: TransactionState::Committed,
            is_complete: !is_partial(transaction),
            inserted: rows.inserted,
            updated: rows.updated,
            deleted: rows.deleted,
            who: ended.who.clone(),
        };
        if !active.is_committed() {
            active.incident.tables.clear(); // they were what open transactions had done so far
        }
        if let Some(part) = &part {
            active.incident.transactions.retain(|known| known.begin != part.begin || known.xid != Some(part.xid));
            let text = format!("transaction {} committed", name_of(transaction.xid));
            active.incident.moment(Moment { at: transaction.time.timestamp(), lsn: Some(transaction.lsn), text });
        }
        active.add_transaction(told, is_harm, is_loss);
        for damage in damages.iter().filter(|damage| is_told(damage, drafts)) {
            let window = drafts
                .iter()
                .filter(|draft| draft.relation.as_ref().is_some_and(|relation| key_of(relation) == damage.key()))
                .find_map(|draft| draft.window.as_ref());
            active.add_damage(damage, window, &self.parents, transaction.lsn);
        }
        active.add_ddl(transaction.xid, &transaction.ddl);
        active.add_findings(drafts, transaction.xid, Some(transaction.lsn), *now);
        active.summarise_emptied(&self.config, &self.zone, transaction, *now);
        let texts: Vec<&str> = drafts.iter().map(|draft| draft.text.as_str()).take(20).collect();
        if is_news && !texts.is_empty() {
            let at = transaction.time.timestamp();
            active.incident.moment(Moment { at, lsn: Some(transaction.lsn), text: texts.join("; ") });
        }
        active.touched_at = *now;
        let worst = drafts.iter().map(|draft| draft.severity).max().unwrap_or_default();
        let change = match is_news {
            _ if part.is_some() || worst > active.incident.severity => Change::Urgent,
            true => Change::News,
            false => Change::Growth,
        };
        active.change = active.change.max(Some(change));
    }

    /// Looks at the transactions that are open. Give all that did something; those that are no longer given have ended, or
    /// never will.
    pub fn open(&mut self, open: &[OpenWork<'_>], who: Witness<'_>, now: Timestamp) {
        for work in open {
            self.suspect(work, who, now);
        }
    }

    fn suspect(&mut self, open: &OpenWork<'_>, who: Witness<'_>, now: Timestamp) {
        let work = Work { tallies: open.tallies, ddl: open.ddl, is_complete: open.is_complete, lsn: open.lsn };
        let mut damages = damages(&work, &self.live);
        // WAL of the past, read at the start: whoever counted the rows since knows how it ended, and so shall we soon.
        damages.retain(|damage| !self.live.is_counted_behind(damage.key(), open.lsn));
        let known = self
            .active
            .iter()
            .position(|active| active.open.iter().any(|part| part.xid == open.xid && part.begin == open.begin));
        if let Some(place) = known {
            self.grow_suspicion(place, open, &damages);
        }
        // By the server's clock, as far as it is known.
        let time = self.clock.unwrap_or_else(|| now.into());
        let sums = HashMap::new();
        let nobody = Who::default();
        let judge = Judge {
            config: &self.config,
            zone: &self.zone,
            live: &self.live,
            baseline: &self.baseline,
            sums: &sums,
            who: &nobody,
            time,
        };
        // Asked only once there is something to ask about, unless the answer decides that.
        if !self.asks_people() && judge.drafts(&work, &damages).is_empty() {
            return;
        }
        let author = who(&Asked::of(Some(open.xid), None, &damages, open.ddl));
        let drafts = Judge { who: &author, ..judge }.drafts(&work, &damages);
        if drafts.is_empty() {
            return;
        }
        let place = known.unwrap_or_else(|| {
            let ties = Ties::of(&damages, open.ddl, &author);
            self.related(&ties, time).unwrap_or_else(|| self.begin(open.begin, time, now))
        });
        let Some(active) = self.active.get_mut(place) else { return };
        let is_news = active.tie(&damages, open.ddl, &drafts, &author);
        if known.is_none() {
            let rows = sum(&damages);
            active.incident.transactions.push(IncidentTransaction {
                xid: Some(open.xid),
                begin: open.begin,
                lsn: None,
                time: None,
                state: if open.is_prepared { TransactionState::Prepared } else { TransactionState::Open },
                is_complete: open.is_complete,
                inserted: rows.inserted,
                updated: rows.updated,
                deleted: rows.deleted,
                who: author,
            });
            active.open.push(OpenPart {
                xid: open.xid,
                begin: open.begin,
                tables: told(&damages, &drafts, &self.parents),
            });
            let text = format!("seen while transaction {} is open: {}", open.xid, texts(&drafts));
            active.incident.moment(Moment { at: now, lsn: Some(open.lsn), text });
        }
        active.add_findings(&drafts, Some(open.xid), None, now);
        active.incident.seen_to = active.incident.seen_to.max(open.lsn);
        if is_news || known.is_none() {
            active.change = Some(Change::News);
            active.touched_at = now;
        }
        let id = active.incident.id.clone();
        let wanted = drafts.iter().find(|draft| draft.breaker == Breaker::Terminate);
        if let Some(draft) = wanted.filter(|_| known.is_none() && !open.is_prepared) {
            self.breaks.push(Break { incident: id, xid: open.xid, rule: draft.rule });
        }
    }

    fn grow_suspicion(&mut self, place: usize, open: &OpenWork<'_>, damages: &[Damage]) {
        let Some(active) = self.active.get_mut(place) else { return };
        let Some(part) = active.open.iter_mut().find(|part| part.xid == open.xid) else { return };
        let tables = told(damages, &[], &self.parents);
        if tables == part.tables {
            return;
        }
        part.tables = tables;
        let rows = sum(damages);
        let is_it = |known: &&mut IncidentTransaction| known.xid == Some(open.xid) && known.begin == open.begin;
        if let Some(known) = active.incident.transactions.iter_mut().find(is_it) {
            (known.inserted, known.updated, known.deleted) = (rows.inserted, rows.updated, rows.deleted);
            if open.is_prepared {
                known.state = TransactionState::Prepared;
            }
        }
        active.change = active.change.max(Some(Change::Growth));
    }

    /// Something is wrong that is no transaction's doing. Said again while it lasts, it is one incident.
    pub fn condition(&mut self, condition: Condition, now: Timestamp) {
        let Condition { rule, severity, text, lsn } = condition;
        let who = Who::default();
        let case = super::rule::Case { rule, table: None, who: &who, at: now, zone: &self.zone };
        let Some(judged) = self.config.judge(&case, severity) else { return };
        let is_it = |active: &Active| {
            let incident = &active.incident;
            incident.is_condition() && incident.findings.first().is_some_and(|finding| finding.rule == rule)
        };
        let place = match self.active.iter().position(is_it) {
            Some(place) => place,
            None => {
                let id = condition_id(self.timeline, lsn, rule);
                self.activate(Active::of(Incident::new(id, self.timeline, now)))
            }
        };
        let silenced = self.silences.iter().any(|silence| silence.covers(rule, None, &who, now));
        let Some(active) = self.active.get_mut(place) else { return };
        let incident = &mut active.incident;
        let worse = incident.findings.first().is_none_or(|finding| finding.severity < judged.severity);
        let same = incident.findings.first().is_some_and(|finding| finding.text == text);
        if same && !worse {
            return;
        }
        let at = incident.findings.first().map_or(now, |finding| finding.at);
        let finding = Finding {
            rule,
            severity: judged.severity,
            text: text.clone(),
            table: None,
            xid: None,
            lsn: Some(lsn),
            at,
            silenced,
        };
        incident.findings = vec![finding];
        incident.seen_to = incident.seen_to.max(lsn);
        incident.ended_at = now;
        if worse {
            incident.note(now, text);
        }
        active.change = active.change.max(Some(if worse { Change::Urgent } else { Change::Growth }));
    }

    /// What was wrong is well again.
    pub fn condition_over(&mut self, rule: RuleName, now: Timestamp) {
        for active in &mut self.active {
            let incident = &mut active.incident;
            let is_it =
                incident.is_condition() && incident.findings.first().is_some_and(|finding| finding.rule == rule);
            if is_it && incident.resolved.is_none() {
                let note = Some("it is over".to_owned());
                // A condition can always be resolved once.
                let _ = incident.resolve(Signature { by: "walguard".to_owned(), at: now, note });
                incident.ended_at = now;
                active.change = Some(Change::Urgent);
            }
        }
    }

    /// The incidents that are new or changed since they were last given, the first one first. What only grows waits a little.
    pub fn take_changed(&mut self, now: Timestamp) -> Vec<Incident> {
        let mut changed = Vec::new();
        for active in &mut self.active {
            let is_due = active.change.is_some_and(|change| {
                active.given_at.is_none_or(|given| now.duration_since(given) >= change.pause() || now < given)
            });
            if is_due {
                active.change = None;
                active.given_at = Some(now);
                active.refresh(&self.live, &self.silences, now);
                active.incident.updated_at = now;
                changed.push(active.incident.clone());
            }
        }
        self.forget_old(now);
        // Whoever writes them down in this order can be killed in between: what the last one written has seen, those before
        // it have, too.
        changed.sort_by_key(|incident| incident.seen_to);
        changed
    }

    /// When [`Detector::take_changed`] must be asked although nothing comes; `None` if nothing waits.
    pub fn wake_at(&self) -> Option<Timestamp> {
        let due = |active: &Active| {
            let change = active.change?;
            Some(active.given_at.map_or(Timestamp::MIN, |given| given.saturating_add(change.pause()).unwrap_or(given)))
        };
        self.active.iter().filter_map(due).min()
    }

    /// The transactions whose sessions should be terminated now, each given once.
    pub fn take_breaks(&mut self) -> Vec<Break> {
        std::mem::take(&mut self.breaks)
    }

    /// Incidents to which nothing can be added any more are left as they are.
    fn forget_old(&mut self, now: Timestamp) {
        let span = SignedDuration::try_from(self.config.group_within).unwrap_or(SignedDuration::MAX);
        self.active.retain(|active| {
            let incident = &active.incident;
            let is_fresh = now.duration_since(incident.ended_at) <= span + span
                || active.given_at.is_none_or(|given| now.duration_since(given) <= span + span);
            active.change.is_some()
                || !active.open.is_empty()
                || incident.is_condition() && incident.state != State::Resolved
                || incident.state != State::Resolved && is_fresh
        });
    }

    /// What must survive a restart besides the incidents: row counts and what is normal, as of `lsn`.
    pub fn memory(&self, lsn: Lsn) -> Memory {
        Memory {
            format: MEMORY_FORMAT,
            timeline: self.timeline,
            lsn,
            live: self.live.export(),
            baseline: self.baseline.export(),
        }
    }

    /// Takes what an agent before us remembered.
    pub fn remember(&mut self, memory: Memory) {
        if memory.format != MEMORY_FORMAT {
            return;
        }
        self.baseline.import(memory.baseline);
        // On another timeline the server may have gone back: its rows are counted anew.
        if memory.timeline == self.timeline {
            self.live.import(memory.live);
            self.learned_to = memory.lsn;
        }
    }
}

/// The version of [`Memory`].
const MEMORY_FORMAT: u32 = 1;

/// What a detector remembers. Becomes JSON of at most some megabytes.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Memory {
    format: u32,
    timeline: TimelineId,
    /// As of here.
    pub lsn: Lsn,
    live: Vec<(TableKey, super::live_rows::Live)>,
    baseline: Vec<(TableKey, super::baseline::Learned)>,
}

/// A transaction that ended, with what is said of it.
struct Ended<'a> {
    transaction: &'a Transaction,
    damages: &'a [Damage],
    drafts: Vec<Draft>,
    who: Who,
    now: Timestamp,
}

/// Rows are gone, if only a few.
fn is_small_loss(damage: &Damage) -> bool {
    !damage.step.created && damage.lost() > 0 && (damage.counts.deleted > 0 || damage.truncated || damage.step.dropped)
}

/// Whether an incident shows a table: a rule spoke of it, or it lost rows in the same breath.
fn is_told(damage: &Damage, drafts: &[Draft]) -> bool {
    let is_found =
        drafts.iter().any(|draft| draft.relation.as_ref().is_some_and(|relation| key_of(relation) == damage.key()));
    is_found || is_small_loss(damage)
}

fn told(damages: &[Damage], drafts: &[Draft], parents: &HashMap<TableKey, String>) -> Vec<TableDamage> {
    let told = damages.iter().filter(|damage| is_told(damage, drafts) || damage.counts.updated > 0).take(TABLES_MAX);
    told.map(|damage| TableDamage { partition_of: parents.get(&damage.key()).cloned(), ..damage.told() }).collect()
}

fn sum(damages: &[Damage]) -> crate::decode::change::RowCounts {
    let mut sum = crate::decode::change::RowCounts::default();
    for damage in damages {
        sum += damage.counts;
    }
    sum
}

fn texts(drafts: &[Draft]) -> String {
    drafts.iter().map(|draft| draft.text.as_str()).take(20).collect::<Vec<_>>().join("; ")
}

fn name_of(xid: Option<Xid>) -> String {
    xid.map_or_else(|| "of unknown id".to_owned(), |xid| xid.to_string())
}

fn micros(span: Duration) -> i64 {
    i64::try_from(span.as_micros()).unwrap_or(i64::MAX)
}

/// The history of migrations tells of all tables of its database: what is lost there just then belongs to it.
fn whole_database(draft: &Draft) -> Option<(Oid, String)> {
    let relation = draft.relation.as_ref().filter(|_| draft.rule == RuleName::MigrationHistory)?;
    Some((relation.database, String::new()))
}

/// The session that did it, if that is certain: one that was merely at work just then would tie together what many did.
fn session_of(who: &Who) -> Option<Session> {
    who.actor.pid.zip(who.actor.backend_start).filter(|_| who.source >= WhoSource::Activity)
}

impl Ties {
    fn of(damages: &[Damage], ddl: &[DdlEvent], who: &Who) -> Self {
        let mut ties = Self { session: session_of(who), ..Self::default() };
        for damage in damages.iter().filter(|damage| is_small_loss(damage) || damage.counts.updated > 0) {
            ties.tables.insert(damage.key());
            ties.schemas.insert((damage.relation.database, damage.relation.schema.clone()));
        }
        for event in ddl.iter().filter(|event| event.kind.is_destructive()) {
            match &event.relation {
                Some(relation) => {
                    ties.tables.insert(key_of(relation));
                    ties.schemas.insert((relation.database, relation.schema.clone()));
                }
                // An event trigger belongs to the whole database.
                None => {
                    ties.schemas.insert((event.database, String::new()));
                }
            }
        }
        ties
    }
}

impl Touch {
    fn told(&self, who: Who) -> IncidentTransaction {
        IncidentTransaction {
            xid: self.xid,
            begin: self.begin,
            lsn: Some(self.lsn),
            time: Some(self.time),
            state: TransactionState::Committed,
            is_complete: true,
            inserted: self.inserted,
            updated: 0,
            deleted: self.deleted,
            who,
        }
    }
}

impl Active {
    fn is_committed(&self) -> bool {
        self.incident.transactions.iter().any(|transaction| transaction.state == TransactionState::Committed)
    }

    /// All of it was rolled back. What comes later is something else.
    fn came_to_nothing(&self) -> bool {
        let mut transactions = self.incident.transactions.iter();
        !self.incident.transactions.is_empty()
            && transactions.all(|transaction| transaction.state == TransactionState::Aborted)
    }

    fn of(incident: Incident) -> Self {
        let mut active = Self {
            tables: HashSet::default(),
            schemas: HashSet::default(),
            sessions: HashSet::default(),
            open: Vec::new(),
            change: None,
            given_at: None,
            touched_at: incident.updated_at,
            incident,
        };
        for relation in active.incident.tables.iter().filter_map(|table| table.relation.as_ref()) {
            active.tables.insert(key_of(relation));
            active.schemas.insert((relation.database, relation.schema.clone()));
        }
        for transaction in &active.incident.transactions {
            active.sessions.extend(session_of(&transaction.who));
            let is_open = matches!(transaction.state, TransactionState::Open | TransactionState::Prepared);
            if let Some(xid) = transaction.xid.filter(|_| is_open) {
                let part = OpenPart { xid, begin: transaction.begin, tables: active.incident.tables.clone() };
                active.open.push(part);
            }
        }
        active
    }

    /// Whatever was open when its timeline ended was rolled back by that; only what was prepared is still there.
    fn end_with_timeline(&mut self, next: TimelineId) {
        let Self { incident, open, .. } = self;
        if incident.timeline == next {
            return;
        }
        let is_left = |known: &IncidentTransaction| known.state == TransactionState::Open;
        let left: Vec<_> = incident.transactions.iter_mut().filter(|known| is_left(known)).collect();
        if left.is_empty() {
            return;
        }
        for known in left {
            known.state = TransactionState::Aborted;
            open.retain(|part| (Some(part.xid), part.begin) != (known.xid, known.begin));
        }
        let (at, timeline) = (incident.ended_at, incident.timeline);
        incident.note(at, format!("what was open was rolled back: timeline {timeline} ended, {next} goes on"));
        self.change = Some(Change::Urgent);
    }

    fn is_about(&self, relation: &super::Relation) -> bool {
        self.tables.contains(&key_of(relation)) || self.schemas.contains(&(relation.database, relation.schema.clone()))
    }

    /// Whether findings belong here: of the same session, on the same tables, or, where sessions cannot tell, in the same
    /// schema.
    fn is_tied(&self, ties: &Ties) -> bool {
        if ties.session.is_some_and(|session| self.sessions.contains(&session)) {
            return true;
        }
        if self.tables.iter().any(|table| ties.tables.contains(table)) {
            return true;
        }
        let cannot_tell = ties.session.is_none() || self.sessions.is_empty();
        let in_database =
            |database: Oid, schemas: &HashSet<(Oid, String)>| schemas.iter().any(|(other, _)| *other == database);
        let whole = |schemas: &HashSet<(Oid, String)>, others: &HashSet<(Oid, String)>| {
            schemas.iter().any(|(database, schema)| schema.is_empty() && in_database(*database, others))
        };
        cannot_tell
            && (self.schemas.iter().any(|schema| ties.schemas.contains(schema))
                || whole(&self.schemas, &ties.schemas)
                || whole(&ties.schemas, &self.schemas))
    }

    /// Remembers whose findings these are; true if a rule or a table is new here.
    fn tie(&mut self, damages: &[Damage], ddl: &[DdlEvent], drafts: &[Draft], who: &Who) -> bool {
        let is_known = |draft: &Draft| {
            let table = draft.relation.as_ref().map(|relation| relation.full_name());
            self.incident.findings.iter().any(|finding| finding.rule == draft.rule && finding.table == table)
        };
        let is_news = drafts.iter().any(|draft| !is_known(draft))
            || damages.iter().any(|damage| damage.is_emptied() && !self.tables.contains(&damage.key()));
        let ties = Ties::of(damages, ddl, who);
        for relation in drafts.iter().filter_map(|draft| draft.relation.as_ref()) {
            self.tables.insert(key_of(relation));
            self.schemas.insert((relation.database, relation.schema.clone()));
        }
        self.tables.extend(ties.tables);
        self.schemas.extend(ties.schemas);
        self.schemas.extend(drafts.iter().filter_map(whole_database));
        self.sessions.extend(ties.session);
        is_news
    }

    /// The incident reaches back to here.
    fn begins(&mut self, lsn: Lsn, time: PgTime, is_loss: bool) {
        let incident = &mut self.incident;
        incident.first_harm = Some(incident.first_harm.map_or(lsn, |first| first.min(lsn)));
        if is_loss {
            incident.first_loss = Some(incident.first_loss.map_or(lsn, |first| first.min(lsn)));
        }
        incident.began_at = incident.began_at.min(time.timestamp());
    }

    fn add_transaction(&mut self, transaction: IncidentTransaction, is_harm: bool, is_loss: bool) {
        self.sessions.extend(session_of(&transaction.who));
        if let (Some(lsn), Some(time)) = (transaction.lsn, transaction.time) {
            if is_harm {
                self.begins(lsn, time, is_loss);
            }
            self.incident.ended_at = self.incident.ended_at.max(time.timestamp());
            self.incident.seen_to = self.incident.seen_to.max(lsn);
        }
        let incident = &mut self.incident;
        if incident.transactions.iter().any(|known| known.lsn.is_some() && known.lsn == transaction.lsn) {
            return;
        }
        if incident.transactions.len() < TRANSACTIONS_MAX {
            incident.transactions.push(transaction);
            incident.transactions.sort_by_key(|transaction| transaction.lsn.unwrap_or(Lsn::MAX));
        } else {
            incident.transactions_more += 1;
        }
    }

    /// A suspicious transaction ended.
    fn end_transaction(&mut self, part: &OpenPart, transaction: &Transaction, state: TransactionState) {
        let is_it = |known: &&mut IncidentTransaction| known.xid == Some(part.xid) && known.begin == part.begin;
        if let Some(known) = self.incident.transactions.iter_mut().find(is_it) {
            known.state = state;
            known.lsn = Some(transaction.lsn);
            known.time = Some(transaction.time);
        }
        self.incident.seen_to = self.incident.seen_to.max(transaction.lsn);
        self.incident.ended_at = self.incident.ended_at.max(transaction.time.timestamp());
    }

    /// A suspicious transaction is open no more, and nothing ended it.
    fn give_up(&mut self, part: OpenPart, lsn: Lsn, now: Timestamp) {
        let is_it = |known: &&mut IncidentTransaction| known.xid == Some(part.xid) && known.begin == part.begin;
        let incident = &mut self.incident;
        if let Some(known) = incident.transactions.iter_mut().find(is_it) {
            known.state = TransactionState::Aborted;
        }
        for action in incident.actions.iter_mut().filter(|action| action.xid == Some(part.xid)) {
            action.aborted.get_or_insert(true);
        }
        if incident.tables.is_empty() {
            incident.tables = part.tables;
        }
        let text = format!("transaction {} is gone without a commit: its server stopped", part.xid);
        incident.moment(Moment { at: now, lsn: Some(lsn), text });
        incident.seen_to = incident.seen_to.max(lsn);
        self.change = Some(Change::Urgent);
    }

    fn add_damage(
        &mut self,
        damage: &Damage,
        window: Option<&WindowSum>,
        parents: &HashMap<TableKey, String>,
        lsn: Lsn,
    ) {
        let told = damage.told();
        let is_it =
            |table: &&mut TableDamage| table.relation.as_ref().is_some_and(|relation| key_of(relation) == damage.key());
        if let Some(table) = self.incident.tables.iter_mut().find(is_it) {
            // An earlier loss that is added later, as leads are, does not say how the table is now.
            if lsn >= self.incident.seen_to || table.after.is_none() {
                table.after = told.after;
            }
            table.before = match (table.before, told.before) {
                (Some(known), Some(other)) if other.count > known.count && lsn < self.incident.seen_to => Some(other),
                (known, other) => known.or(other),
            };
            table.inserted = table.inserted.saturating_add(told.inserted);
            table.updated = table.updated.saturating_add(told.updated);
            table.deleted = table.deleted.saturating_add(told.deleted);
            table.truncated |= told.truncated;
            table.dropped |= told.dropped;
            table.replaced |= told.replaced;
            table.name = told.name;
            return;
        }
        if self.incident.tables.len() >= TABLES_MAX {
            self.incident.tables_more += 1;
            return;
        }
        let mut told = TableDamage { partition_of: parents.get(&damage.key()).cloned(), ..told };
        if let Some(sum) = window {
            told.deleted = sum.deleted;
            told.inserted = sum.inserted;
            told.before = told.after.map(|after| Rows { count: after.count.saturating_add(sum.lost()), ..after });
        }
        self.incident.tables.push(told);
    }

    fn add_ddl(&mut self, xid: Option<Xid>, ddl: &[DdlEvent]) {
        for event in ddl.iter().filter(|event| event.kind.is_destructive()) {
            if self.incident.ddl.len() >= LINES_MAX {
                self.incident.ddl_more += 1;
                continue;
            }
            let table = event.relation.as_ref().map(|relation| relation.full_name());
            let (kind, lsn, object) = (event.kind, event.lsn, event.object.clone());
            self.incident.ddl.push(DdlFinding { kind, lsn, xid, table, object });
        }
    }

    fn add_findings(&mut self, drafts: &[Draft], xid: Option<Xid>, lsn: Option<Lsn>, now: Timestamp) {
        for draft in drafts {
            let table = draft.relation.as_ref().map(|relation| relation.full_name());
            // Two triggers of one table are two findings; a table that goes on losing rows is one.
            let is_counted = draft.relation.is_some() && draft.is_loss && draft.rule != RuleName::DropColumn
                || draft.rule == RuleName::TablesEmptied
                || draft.rule == RuleName::MassUpdate;
            let is_it = |finding: &&mut Finding| {
                // A table whose rows go and go is empty in the end.
                let is_same = finding.rule == draft.rule
                    || (finding.rule, draft.rule) == (RuleName::RowsDeleted, RuleName::TableEmptied);
                is_same && finding.table == table && (is_counted || finding.text == draft.text)
            };
            if let Some(finding) = self.incident.findings.iter_mut().find(is_it) {
                finding.rule = draft.rule;
                finding.text.clone_from(&draft.text);
                finding.severity = finding.severity.max(draft.severity);
                (finding.xid, finding.lsn) = (xid, lsn);
                continue;
            }
            if self.incident.findings.len() >= LINES_MAX {
                self.incident.findings_more += 1;
                continue;
            }
            let (rule, severity, text) = (draft.rule, draft.severity, draft.text.clone());
            self.incident.findings.push(Finding { rule, severity, text, table, xid, lsn, at: now, silenced: false });
        }
    }

    /// Several tables that have no rows left are more than each of them.
    fn summarise_emptied(&mut self, config: &Config, zone: &TimeZone, transaction: &Transaction, now: Timestamp) {
        let emptied = self.incident.tables.iter().filter(|table| is_lost(table)).count();
        if emptied < config.tables_emptied_min.max(1) as usize {
            return;
        }
        let who = self.incident.who().cloned().unwrap_or_default();
        let case = super::rule::Case {
            rule: RuleName::TablesEmptied,
            table: None,
            who: &who,
            at: transaction.time.timestamp(),
            zone,
        };
        let Some(judged) = config.judge(&case, Severity::Critical) else { return };
        let draft = Draft {
            rule: RuleName::TablesEmptied,
            severity: judged.severity,
            text: format!("{emptied} tables emptied"),
            relation: None,
            is_harm: true,
            is_loss: true,
            window: None,
            breaker: judged.breaker,
        };
        self.add_findings(&[draft], transaction.xid, Some(transaction.lsn), now);
    }

    /// Brings what follows from the rest up to date.
    fn refresh(&mut self, live: &LiveRows, silences: &[Silence], now: Timestamp) {
        let (tables, open) = (self.tables_with_open(), !self.open.is_empty());
        let author = self.incident.who().cloned().unwrap_or_default();
        let incident = &mut self.incident;
        let is_wipe = is_database_wipe(incident, &tables, live);
        let relation_of = |name: Option<&String>| {
            let of_name = |table: &&TableDamage| Some(&table.name) == name;
            tables.iter().find(of_name).and_then(|table| table.relation.as_ref())
        };
        let mut silenced_by = None;
        let findings = if silences.is_empty() { &mut [] } else { incident.findings.as_mut_slice() };
        for finding in findings {
            let relation = relation_of(finding.table.as_ref());
            let silence = silences.iter().find(|silence| silence.covers(finding.rule, relation, &author, now));
            finding.silenced |= silence.is_some();
            if let Some(silence) = silence {
                silenced_by = Some(silence.name());
            }
        }
        let all_silenced = incident.findings.iter().all(|finding| finding.silenced);
        incident.silenced_by = match all_silenced && !is_wipe && !incident.findings.is_empty() {
            true => silenced_by.or_else(|| incident.silenced_by.take()),
            false => None,
        };
        incident.severity = incident.findings.iter().map(|finding| finding.severity).max().unwrap_or_default();
        if incident.findings.is_empty() {
            incident.severity = Severity::Info;
        }
        if open && !incident.transactions.iter().any(|t| t.state == TransactionState::Committed) {
            incident.tables.clone_from(&tables);
        }
        if !matches!(incident.state, State::Acknowledged | State::Resolved) && !incident.is_condition() {
            let any = |state| incident.transactions.iter().any(|transaction| transaction.state == state);
            incident.state = if any(TransactionState::Committed) {
                State::Committed
            } else if any(TransactionState::Open) || any(TransactionState::Prepared) {
                State::Open
            } else {
                State::Aborted
            };
        }
        if author.source == super::WhoSource::Unknown && !incident.is_condition() {
            let note = author.note.unwrap_or_else(|| "nobody saw the session that did it".to_owned());
            let note = format!("{WHO_UNKNOWN}: {note}");
            if let Some(there) = incident.notes.iter_mut().find(|note| note.starts_with(WHO_UNKNOWN)) {
                *there = note;
            } else if incident.notes.len() < LINES_MAX {
                incident.notes.push(note);
            }
        } else {
            incident.notes.retain(|note| !note.starts_with(WHO_UNKNOWN));
        }
        incident.title = title(incident, &tables);
    }

    /// The tables, with what open transactions did to them so far.
    fn tables_with_open(&self) -> Vec<TableDamage> {
        if !self.is_committed() && !self.open.is_empty() {
            return self.open.iter().flat_map(|part| part.tables.iter().cloned()).take(TABLES_MAX).collect();
        }
        self.incident.tables.clone()
    }
}

/// It had rows, and has none, or is gone.
fn is_lost(table: &TableDamage) -> bool {
    let had_rows = table.before.map_or(table.deleted > 0 || table.truncated || table.dropped, |rows| rows.count > 0);
    had_rows && (table.dropped && !table.replaced || table.after.is_some_and(|rows| rows.count == 0))
}

/// Half of a database's tables or more are lost, or all of it. No silence is about that.
fn is_database_wipe(incident: &Incident, tables: &[TableDamage], live: &LiveRows) -> bool {
    if incident.findings.iter().any(|finding| finding.rule == RuleName::DropDatabase) {
        return true;
    }
    let lost: Vec<_> = tables.iter().filter(|table| is_lost(table)).collect();
    let Some(database) = lost.iter().find_map(|table| table.relation.as_ref()).map(|relation| relation.database) else {
        return false;
    };
    lost.len() >= WIPE_TABLES_MIN && lost.len() >= live.tables_with_rows(database)
}

/// What happened, in a line.
fn title(incident: &Incident, tables: &[TableDamage]) -> String {
    let what = what(incident, tables);
    match incident.state {
        State::Open if !incident.is_condition() => format!("not committed yet: {what}"),
        State::Aborted => format!("rolled back: {what}"),
        _ => what,
    }
}

fn what(incident: &Incident, tables: &[TableDamage]) -> String {
    let worst = incident.findings.iter().max_by(|a, b| a.severity.cmp(&b.severity).then(std::cmp::Ordering::Greater));
    let count = |is: fn(&TableDamage) -> bool| tables.iter().filter(|table| is(table)).count();
    let mut parts = Vec::new();
    let dropped = count(|table| table.dropped && !table.replaced);
    let truncated = count(|table| table.truncated && !table.dropped && is_lost(table));
    let emptied = count(|table| is_lost(table) && !table.dropped && !table.truncated);
    for (number, what) in [(dropped, "dropped"), (truncated, "truncated"), (emptied, "emptied")] {
        match number {
            0 => {}
            1 => parts.push(format!("1 table {what}")),
            _ => parts.push(format!("{number} tables {what}")),
        }
    }
    let protections = incident.findings.iter().filter(|finding| is_protection(finding.rule)).count();
    let others = incident.findings.iter().filter(|finding| !is_protection(finding.rule)).count();
    if protections > 1 {
        parts.push(format!("{protections} protections removed"));
    }
    let is_one = others <= 1 && tables.len() <= 1 && protections == 0 || others == 0 && protections == 1;
    if is_one || parts.is_empty() {
        let more = incident.findings.len().saturating_sub(1);
        let first = worst.map_or_else(|| "something happened".to_owned(), |finding| finding.text.clone());
        return if more == 0 { first } else { format!("{first}, and {more} more") };
    }
    let lost = tables.iter().fold(0_u64, |sum, table| sum.saturating_add(lost_rows(table)));
    let rows = if lost > 0 { format!(", {} rows gone", grouped(lost)) } else { String::new() };
    let place = common_place(tables).map(|place| format!(" in {place}")).unwrap_or_default();
    format!("{}{place}{rows}", parts.join(", "))
}

fn lost_rows(table: &TableDamage) -> u64 {
    match (table.before, table.after) {
        (Some(before), Some(after)) => before.count.saturating_sub(after.count),
        _ => table.deleted.saturating_sub(table.inserted),
    }
}

const fn is_protection(rule: RuleName) -> bool {
    matches!(
        rule,
        RuleName::TriggerRemoved
            | RuleName::EventTriggerRemoved
            | RuleName::RuleRemoved
            | RuleName::PolicyRemoved
            | RuleName::GuardRemoved
    )
}

/// The database, and the schema if there is only one.
fn common_place(tables: &[TableDamage]) -> Option<String> {
    let mut relations = tables.iter().filter_map(|table| table.relation.as_ref());
    let first = relations.next()?;
    let (mut same_database, mut same_schema) = (true, true);
    for relation in relations {
        same_database &= relation.database == first.database;
        same_schema &= relation.schema == first.schema;
    }
    let is_known = same_database && !first.database_name.is_empty();
    is_known.then(|| match same_schema {
        true => format!("{}.{}", first.database_name, first.schema),
        false => first.database_name.clone(),
    })
}
