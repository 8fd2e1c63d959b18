//! Which base, up to which commit, and what that changes: the log is read once, and nothing else is done.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use futures_util::TryStreamExt as _;
use tokio_util::sync::CancellationToken;

use super::RebuildError;
use super::follow::{Change, Commit, Event, Follow, Shape};
use crate::capture::logical::{self, COVERAGE_PREFIX, Coverage, CoverageTold};
use crate::detect::DdlKind;
use crate::detect::logical::{DEFINITIONS_PREFIX, DefinitionsTold, EventTold};
use crate::guard::message::{self, GuardMessage};
use crate::pg::{Lsn, Oid, PgTime, Xid};
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::bases::{Manifest, Table};
use crate::repo::changes::walk::{Broken, follows};
use crate::repo::changes::{Header, Messages};
use crate::repo::index::chronicle::Pattern;
use crate::restore::target::Target;

/// Things said of what cannot be rebuilt: more is read by nobody.
const REMARKS_MAX: usize = 50;

/// How far behind the target the log is read for changes of definitions that happened before it.
const LOOKED_WITHIN_MICROS: i64 = 60_000_000;

/// Objects of a statement, and kinds of them, named in a note.
const OBJECTS_NAMED: usize = 12;

/// What somebody wants.
#[derive(Clone, Debug)]
pub struct Request {
    /// The moment.
    pub target: Target,
    /// Stop just before the transaction of `xid:...`, or before what ended at the very time.
    pub exclusive: bool,
    /// The database's name; if there are several.
    pub database: Option<String>,
    /// Begin with this base.
    pub base: Option<String>,
    /// What cannot be rebuilt may be missing.
    pub partial: bool,
    /// Only these tables get rows; all if there is none.
    pub only: Vec<Pattern>,
}

/// A transaction at the edge of what is rebuilt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Edge {
    /// Its id.
    pub xid: Xid,
    /// Where its commit record begins.
    pub lsn: Lsn,
    /// When it ended, by the server's clock.
    pub time: PgTime,
}

/// What will be done.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Plan {
    /// The base.
    pub base: Manifest,
    /// Transactions that commit before this place are rebuilt, and no others: the end of the last one, or the base's own place.
    pub stop: Lsn,
    /// The last transaction that is rebuilt from the log; `None` if it is the base alone.
    pub last_kept: Option<Edge>,
    /// The first that is not; `None` if there is none.
    pub first_lost: Option<Edge>,
    /// Transactions of the log that are repeated.
    pub transactions: u64,
    /// Changes of rows in them.
    pub changes: u64,
    /// Rows that each table will have, as `schema.table`.
    pub rows: BTreeMap<String, u64>,
    /// Tables that are made and get no rows, because nobody wants them.
    pub left_empty: Vec<String>,
    /// What will not be as it was, for people.
    pub remarks: Vec<String>,
    /// What else to know of definitions, for people: rows are as they were.
    pub notes: Vec<String>,
    /// Rows by table, for the proof.
    #[serde(skip)]
    pub(super) expected: BTreeMap<Oid, u64>,
}

/// What a transaction did to the number of a table's rows.
#[derive(Clone, Copy, Debug)]
enum Effect {
    Rows(i64),
    Emptied,
}

/// What a transaction did, in order, as far as the order matters.
#[derive(Debug, Default)]
struct Effects {
    list: Vec<(Xid, Oid, Effect)>,
    /// Where the rows of a table are counted since it was emptied last, by subtransaction.
    places: HashMap<(Xid, Oid), usize>,
}

impl Effects {
    fn note(&mut self, sub: Xid, table: Oid, effect: Effect) {
        let Effect::Rows(more) = effect else {
            self.places.retain(|(_, other), _| *other != table);
            self.list.push((sub, table, effect));
            return;
        };
        match self.places.get(&(sub, table)).and_then(|place| self.list.get_mut(*place)) {
            Some((_, _, Effect::Rows(sum))) => *sum += more,
            _ => {
                self.places.insert((sub, table), self.list.len());
                self.list.push((sub, table, effect));
            }
        }
    }

    fn undo(&mut self, sub: Xid) {
        self.list.retain(|(by, ..)| *by != sub);
        self.places.clear();
    }
}

/// What is known of the log between a base and the target.
struct Survey<'a> {
    base: &'a Manifest,
    tables: HashMap<Oid, &'a Table>,
    /// Tables that get no rows.
    left: HashSet<Oid>,
    rows: BTreeMap<Oid, i64>,
    open: BTreeMap<Xid, Effects>,
    /// Changes of rows of what is open.
    changes: HashMap<Xid, u64>,
    remarks: BTreeSet<String>,
    notes: Vec<String>,
    /// Tables as they were described last, and whether they are as they were in the base.
    checked: HashMap<Oid, (Arc<Shape>, bool)>,
    told: HashMap<Xid, Told>,
}

/// What an open transaction tells of definitions.
#[derive(Debug, Default)]
struct Told {
    remarks: Vec<String>,
    notes: Vec<String>,
    /// Messages of the guard: what it does, and to what.
    statements: Vec<String>,
}

/// Makes a plan.
///
/// # Errors
/// [`RebuildError`], if the target cannot be reached, or not whole.
pub async fn plan(
    repo: &Repository,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Plan, RebuildError> {
    let work = try_plan(repo, request, progress);
    cancel.run_until_cancelled(work).await.unwrap_or(Err(RebuildError::Cancelled))
}

async fn try_plan(repo: &Repository, request: &Request, progress: &dyn Progress) -> Result<Plan, RebuildError> {
    let database = database(repo, request.database.as_deref()).await?;
    let mut bases = repo.bases(database).await?;
    if let Some(label) = &request.base {
        bases.retain(|base| base.label == *label);
    }
    let oldest = bases.first().map(|base| base.consistent);
    let bound = bound(repo, request).await?;
    // Of bases before the target the last; a transaction's place is not known before it is found.
    let mut candidates: Vec<Manifest> = bases.into_iter().filter(|base| bound.may_begin_with(base)).collect();
    let mut last_problem = None;
    while let Some(base) = candidates.pop() {
        match survey(repo, base, &bound, request, progress).await {
            Err(error @ RebuildError::Unreachable { .. }) if !candidates.is_empty() => last_problem = Some(error),
            result => return result,
        }
    }
    let target = request.target.describe(&jiff::tz::TimeZone::UTC);
    Err(last_problem.unwrap_or(RebuildError::NoBase { target, oldest }))
}

/// The database of that name, or the only one.
pub(in crate::restore) async fn database(repo: &Repository, name: Option<&str>) -> Result<Oid, RebuildError> {
    let mut found = Vec::new();
    for oid in repo.changed_databases().await? {
        if let Some(last) = repo.last_changes(oid, Lsn::MAX).await? {
            found.push((oid, repo.changes(last).await?.header.database_name));
        }
    }
    let named: Vec<_> = found.iter().filter(|(_, found)| name.is_none_or(|name| name == found)).collect();
    match named.as_slice() {
        [(oid, _)] => Ok(*oid),
        [] if found.is_empty() => Err(RebuildError::Database("there is no change log".to_owned())),
        _ => {
            let names: Vec<_> = found.iter().map(|(_, name)| name.as_str()).collect();
            Err(RebuildError::Database(format!("the change logs are those of {}", names.join(", "))))
        }
    }
}

/// Where to stop.
#[derive(Clone, Copy, Debug)]
enum Bound {
    Latest,
    /// Before the first commit that ended later; with `true`, before the first that ended then or later.
    Time(PgTime, bool),
    /// Transactions whose commit records end here or before.
    End(Lsn),
    /// Transactions whose commit records begin before.
    Before(Lsn),
    /// With this transaction, or just before it.
    Xid(Xid, bool),
}

impl Bound {
    /// The time that was asked for.
    const fn time(self) -> Option<PgTime> {
        match self {
            Self::Time(time, _) => Some(time),
            _ => None,
        }
    }

    fn may_begin_with(self, base: &Manifest) -> bool {
        match self {
            Self::Latest | Self::Xid(..) => true,
            Self::Time(time, _) => PgTime::from(base.time) <= time,
            Self::End(lsn) | Self::Before(lsn) => base.consistent <= lsn,
        }
    }

    /// True if the transaction is behind the target.
    fn is_behind(self, commit: &Commit) -> bool {
        match self {
            Self::Latest => false,
            Self::Time(time, false) => commit.time > time,
            Self::Time(time, true) => commit.time >= time,
            Self::End(lsn) => commit.end > lsn,
            Self::Before(lsn) => commit.lsn >= lsn,
            Self::Xid(xid, exclusive) => exclusive && commit.xid == xid,
        }
    }
}

impl Bound {
    /// True if no transaction behind `end` is wanted: all that committed before was seen, and with it the one of `xid:...`.
    fn is_reached_at(self, end: Lsn, found_xid: bool) -> bool {
        match self {
            Self::Latest | Self::Time(..) => false,
            Self::End(lsn) | Self::Before(lsn) => lsn <= end,
            Self::Xid(..) => found_xid,
        }
    }
}

async fn bound(repo: &Repository, request: &Request) -> Result<Bound, RebuildError> {
    Ok(match &request.target {
        Target::Latest => Bound::Latest,
        Target::Time(time) => Bound::Time(*time, request.exclusive),
        Target::Lsn(lsn) => Bound::End(*lsn),
        Target::Xid(xid) => Bound::Xid(*xid, request.exclusive),
        Target::Name(_) => return Err(RebuildError::Target("restore points")),
        Target::Before(id) => {
            let incident = repo.incident(id).await?;
            let unreachable = |problem: String| RebuildError::Unreachable { problem, latest: None };
            let incident = incident.ok_or_else(|| unreachable(format!("there is no incident {id}")))?;
            let first = incident.first_harm;
            Bound::Before(first.ok_or_else(|| unreachable(format!("incident {id} has nothing that was committed")))?)
        }
    })
}

async fn survey(
    repo: &Repository,
    mut base: Manifest,
    bound: &Bound,
    request: &Request,
    progress: &dyn Progress,
) -> Result<Plan, RebuildError> {
    let left = leave_out(&mut base, &request.only)?;
    let mut survey = Survey::new(&base, left.iter().map(|table| table.oid).collect());
    let mut follow = Follow::default();
    let mut before: Option<Header> = None;
    let (mut last_kept, mut first_lost, mut found_xid) = (None, None, false);
    // By the last transaction that is rebuilt, and not by the log's end or by what follows: those change while it is rebuilt, and
    // whoever is killed must find the same again.
    let mut stop = base.consistent;
    let (mut transactions, mut changes) = (0, 0);
    let mut latest: Option<PgTime> = None;
    // Once it is reached, the log is read on for what happened to definitions before it and was found later.
    let mut behind: Option<PgTime> = None;
    let chain = repo.changes_since(base.database, base.consistent).await?;
    progress.begin("read changes", None);
    let mut objects = std::pin::pin!(chain.read(repo));
    'log: while let Some((name, read)) = objects.try_next().await? {
        let object = match read {
            Err(_) if first_lost.is_some() => break, // nobody needs it
            read => read?,
        };
        if let Err(Broken { after, .. }) = follows(before.as_ref(), name) {
            if first_lost.is_some() || bound.is_reached_at(after, found_xid) {
                break; // what is missing lies behind it
            }
            return Err(RebuildError::Missing { from: after, to: name.from });
        }
        if before.is_none() && name.from > base.consistent {
            return Err(RebuildError::Missing { from: base.consistent, to: name.from });
        }
        if behind.is_some_and(|target| is_far(&object.header, target)) {
            break;
        }
        progress.advance(object.messages.len() as u64);
        if follow.begin(&object.header) {
            survey.forget();
        }
        for sent in Messages::new(&object.messages) {
            let sent = sent.map_err(|error| RebuildError::Damaged { at: name.from, problem: error.to_string() })?;
            let event = match follow.see(sent) {
                Err(_) if behind.is_some() => break 'log,
                event => event?,
            };
            if let Some(target) = behind {
                if let Some(Event::Change { change, .. }) = event {
                    survey.beyond(change, target);
                }
                continue;
            }
            match event {
                Some(Event::Change { by, change }) => survey.change(&follow, (by.top, by.sub), change, sent.at)?,
                Some(Event::Abort { top, sub }) => survey.abort(top, sub),
                Some(Event::Commit(commit)) => {
                    latest = latest.max(Some(commit.time));
                    let edge = Edge { xid: commit.xid, lsn: commit.lsn, time: commit.time };
                    if commit.lsn < base.consistent {
                        survey.drop_transaction(commit.xid);
                        if matches!(bound, Bound::Xid(xid, _) if *xid == commit.xid) {
                            let problem = format!("transaction {} committed before base {}", commit.xid, base.label);
                            return Err(RebuildError::Unreachable { problem, latest });
                        }
                        continue;
                    }
                    let is_it = matches!(bound, Bound::Xid(xid, _) if *xid == commit.xid);
                    found_xid |= is_it;
                    if bound.is_behind(&commit) || found_xid && !is_it {
                        first_lost = Some(edge);
                        behind = Some(bound.time().unwrap_or(commit.time));
                        continue;
                    }
                    changes += survey.commit(commit.xid, commit.time);
                    transactions += 1;
                    last_kept = Some(edge);
                    stop = commit.end;
                }
                Some(Event::Begin { .. }) | None => {}
            }
        }
        before = Some(object.header);
    }
    progress.end();
    // The base by itself has everything up to its place.
    let end = before.as_ref().map_or(base.consistent, |header| header.to.max(base.consistent));
    if first_lost.is_none() {
        reached(repo, bound, end, latest, found_xid).await?;
    }
    let (rows, expected) = survey.rows();
    let (remarks, notes): (Vec<_>, _) = (survey.remarks.into_iter().collect(), survey.notes);
    if !request.partial && !remarks.is_empty() {
        return Err(RebuildError::Partial(remarks));
    }
    let left_empty = left.iter().map(Table::display_name).collect();
    Ok(Plan { stop, last_kept, first_lost, transactions, changes, rows, left_empty, remarks, notes, expected, base })
}

/// A change of definitions is found within a few seconds, or when an agent looks again: what is further behind the target tells
/// nothing of it.
fn is_far(header: &Header, target: PgTime) -> bool {
    let time = header.first_commit.unwrap_or_else(|| PgTime::from(header.made_at));
    time.micros().saturating_sub(target.micros()) > LOOKED_WITHIN_MICROS
}

/// The two looks at the catalogs between which something happened.
fn moments(told: &DefinitionsTold) -> String {
    let text = |at: jiff::Timestamp| at.strftime("%Y-%m-%d %H:%M:%S UTC");
    format!("{} and {}", text(told.since), text(told.at))
}

/// Takes the tables out of a base that nobody wants; gives them.
fn leave_out(base: &mut Manifest, only: &[Pattern]) -> Result<Vec<Table>, RebuildError> {
    if only.is_empty() {
        return Ok(Vec::new());
    }
    let is_meant = |pattern: &Pattern, table: &Table| pattern.fits_table(&table.schema, &table.name);
    if let Some(pattern) = only.iter().find(|pattern| !base.tables.iter().any(|table| is_meant(pattern, table))) {
        return Err(RebuildError::NoTable { label: base.label.clone(), pattern: pattern.as_str().to_owned() });
    }
    let is_left = |table: &mut Table| !only.iter().any(|pattern| is_meant(pattern, table));
    Ok(base.tables.extract_if(.., is_left).collect())
}

/// Nothing is lost behind the target: is it sure that nothing is missing before it?
async fn reached(
    repo: &Repository,
    bound: &Bound,
    end: Lsn,
    latest: Option<PgTime>,
    found_xid: bool,
) -> Result<(), RebuildError> {
    let unreachable = |problem: String| Err(RebuildError::Unreachable { problem, latest });
    match bound {
        Bound::Latest => Ok(()),
        Bound::Xid(_, _) if found_xid => Ok(()),
        Bound::Xid(xid, _) => unreachable(format!("no commit of transaction {xid} is in the change log")),
        Bound::End(lsn) | Bound::Before(lsn) if *lsn <= end => Ok(()),
        Bound::End(lsn) | Bound::Before(lsn) => unreachable(format!("changes are kept up to {end}, before {lsn}")),
        Bound::Time(time, _) => {
            let caught_up = repo.lease().await?.and_then(|lease| lease.caught_up);
            let proved = caught_up.filter(|caught_up| caught_up.position.lsn <= end).map(|caught_up| caught_up.time);
            if proved.max(latest).is_some_and(|known| known >= *time) {
                return Ok(());
            }
            unreachable(format!("it is not sure that everything up to {time} is kept"))
        }
    }
}

impl<'a> Survey<'a> {
    fn new(base: &'a Manifest, left: HashSet<Oid>) -> Self {
        let mut remarks: BTreeSet<String> = base.left_out.iter().cloned().collect();
        let without: Vec<_> = base.tables.iter().filter(|table| table.inserts_only).map(Table::display_name).collect();
        if !without.is_empty() {
            remarks.insert(format!(
                "updates and deletes of {} are not told by the server, as they have no replica identity",
                without.join(", ")
            ));
        }
        let unpublished: Vec<_> =
            base.tables.iter().filter(|table| table.unpublished).map(Table::display_name).collect();
        if !unpublished.is_empty() {
            remarks.insert(format!(
                "changes of {} behind base {} are not known, as no publication named all of it when the base was taken",
                unpublished.join(", "),
                base.label
            ));
        }
        Self {
            base,
            tables: base.tables.iter().map(|table| (table.oid, table)).collect(),
            left,
            rows: base.tables.iter().map(|table| (table.oid, i64::try_from(table.rows).unwrap_or(i64::MAX))).collect(),
            open: BTreeMap::new(),
            changes: HashMap::new(),
            remarks,
            notes: Vec::new(),
            checked: HashMap::new(),
            told: HashMap::new(),
        }
    }

    fn forget(&mut self) {
        self.open.clear();
        self.changes.clear();
        self.told.clear();
        self.checked.clear();
    }

    fn change(
        &mut self,
        follow: &Follow,
        (top, sub): (Xid, Xid),
        change: Change<'_>,
        at: Lsn,
    ) -> Result<(), RebuildError> {
        let (table, effect) = match change {
            Change::Insert { table, .. } => (table, Effect::Rows(1)),
            Change::Update { table, .. } => (table, Effect::Rows(0)),
            Change::Delete { table, .. } => (table, Effect::Rows(-1)),
            Change::Truncate { tables, .. } => {
                for table in tables.iter() {
                    self.note((top, sub), table, Effect::Emptied);
                }
                return Ok(());
            }
            Change::Message { prefix, content } if prefix == DEFINITIONS_PREFIX => {
                if let Ok(told) = serde_json::from_slice(content) {
                    let others = self.others_changed(&told, logical::rows_depend_on);
                    let remarks = self.changed(&told).into_iter().chain(others);
                    let remarks: Vec<_> =
                        remarks.map(|what| format!("{what}, after base {}", self.base.label)).collect();
                    let notes = self
                        .others_changed(&told, |kind| !logical::rows_depend_on(kind))
                        .map(|what| self.as_in_base(&what));
                    let open = self.told.entry(top).or_default();
                    if open.remarks.len() < REMARKS_MAX {
                        open.remarks.extend(remarks);
                        open.notes.extend(notes);
                    }
                }
                return Ok(());
            }
            Change::Message { prefix, content } if prefix == message::PREFIX => {
                if let Some(GuardMessage { what: message::Told::Definitions { command, objects, total, .. }, .. }) =
                    message::read(prefix, content)
                {
                    let named = objects.iter().map(|(kind, name)| format!("{kind} {name}"));
                    let mut named: Vec<_> = named.take(OBJECTS_NAMED).collect();
                    if total > named.len() as u64 {
                        named.push(format!("{} more", total - named.len() as u64));
                    }
                    let statements = &mut self.told.entry(top).or_default().statements;
                    if statements.len() < REMARKS_MAX {
                        statements.push(format!("{command} ({})", named.join(", ")));
                    }
                }
                return Ok(());
            }
            Change::Message { prefix, content } if prefix == COVERAGE_PREFIX => {
                if let Ok(told) = serde_json::from_slice::<CoverageTold>(content) {
                    let tables = told.tables.iter().filter(|table| !self.left.contains(&table.oid));
                    let texts = tables.map(|table| {
                        let what = match table.coverage {
                            Coverage::Nothing => "changes",
                            Coverage::Inserts | Coverage::All => "updates and deletes",
                        };
                        let (name, label) = (table.display_name(), &self.base.label);
                        format!("{what} of table {name} were no longer told from some time after base {label} on")
                    });
                    self.told.entry(top).or_default().remarks.extend(texts.take(REMARKS_MAX));
                }
                return Ok(());
            }
            Change::Message { .. } => return Ok(()),
        };
        *self.changes.entry(top).or_default() += 1;
        let shape = follow.table(table, at)?;
        let known = self.tables.get(&table).copied();
        let has_lost_identity = known.is_some_and(|known| !known.inserts_only) && !shape.has_identity();
        if known.is_some() && (!self.fits(shape) || has_lost_identity) {
            let what = if has_lost_identity { "lost its replica identity" } else { "was changed" };
            let remark = format!("table {} {what} after base {}", shape.display_name(), self.base.label);
            let told = &mut self.told.entry(top).or_default().remarks;
            if !told.contains(&remark) {
                told.push(remark);
            }
        }
        self.note((top, sub), table, effect);
        Ok(())
    }

    /// Whether a table is as it was in the base.
    fn fits(&mut self, shape: &Arc<Shape>) -> bool {
        if let Some((known, fits)) = self.checked.get(&shape.oid)
            && Arc::ptr_eq(known, shape)
        {
            return *fits;
        }
        let fits = self.tables.get(&shape.oid).is_some_and(|table| shape.is(table));
        self.checked.insert(shape.oid, (shape.clone(), fits));
        fits
    }

    /// Tables that are not as the base has them since what a message tells: a base may be taken between a change and the message
    /// that tells it.
    fn changed(&self, told: &DefinitionsTold) -> Vec<String> {
        let is_news = |event: &&EventTold| {
            !self.left.contains(&Oid(event.oid)) && event.digest != self.base.definitions.digest(Oid(event.oid))
        };
        let texts = told.events.iter().filter(is_news).map(|event| {
            let done = match event.kind {
                DdlKind::Create => "made",
                DdlKind::DropTable => "dropped",
                _ => "changed",
            };
            format!("table {}.{} was {done} between {}", event.schema, event.name, moments(told))
        });
        texts.take(REMARKS_MAX).collect()
    }

    /// Other kinds of definitions, of those that are meant, that are not as the base has them.
    fn others_changed(&self, told: &DefinitionsTold, is_meant: impl Fn(&str) -> bool) -> Option<String> {
        let is_news = |(kind, number): &(&String, &String)| {
            is_meant(kind) && self.base.definitions.others.get(*kind) != Some(number)
        };
        let kinds = told.others.iter().filter(is_news).map(|(kind, _)| kind.as_str()).take(OBJECTS_NAMED);
        let kinds: Vec<_> = kinds.collect();
        (!kinds.is_empty()).then(|| format!("{} changed between {}", kinds.join(", "), moments(told)))
    }

    fn as_in_base(&self, what: &str) -> String {
        format!("{what}; rebuilt as base {} has it", self.base.label)
    }

    /// Takes what is told behind the target: a change of definitions that was found there may have happened before it.
    fn beyond(&mut self, change: Change<'_>, target: PgTime) {
        let Change::Message { prefix: DEFINITIONS_PREFIX, content } = change else { return };
        let Ok(told) = serde_json::from_slice::<DefinitionsTold>(content) else { return };
        if PgTime::from(told.since) <= target {
            let changed = self.changed(&told).into_iter().chain(self.others_changed(&told, |_| true));
            let texts: Vec<_> = changed.map(|what| self.as_in_base(&format!("{what}, around the target"))).collect();
            texts.into_iter().for_each(|text| self.add_note(text));
        }
    }

    fn note(&mut self, (top, sub): (Xid, Xid), table: Oid, effect: Effect) {
        self.open.entry(top).or_default().note(sub, table, effect);
    }

    fn abort(&mut self, top: Xid, sub: Xid) {
        if top == sub {
            self.drop_transaction(top);
        } else if let Some(effects) = self.open.get_mut(&top) {
            effects.undo(sub);
        }
    }

    fn drop_transaction(&mut self, xid: Xid) {
        self.open.remove(&xid);
        self.changes.remove(&xid);
        self.told.remove(&xid);
    }

    /// A transaction counts. Gives its changes.
    fn commit(&mut self, xid: Xid, time: PgTime) -> u64 {
        for (_, table, effect) in self.open.remove(&xid).unwrap_or_default().list {
            if self.left.contains(&table) {
                continue;
            }
            if !self.tables.contains_key(&table) {
                self.remark(format!("rows of a table with OID {table}, which base {} does not have", self.base.label));
            }
            let rows = self.rows.entry(table).or_default();
            match effect {
                Effect::Rows(more) => *rows = rows.saturating_add(more),
                Effect::Emptied => *rows = 0,
            }
        }
        let Told { remarks, notes, statements } = self.told.remove(&xid).unwrap_or_default();
        remarks.into_iter().for_each(|text| self.remark(text));
        notes.into_iter().for_each(|text| self.add_note(text));
        for statement in statements {
            let what = format!("transaction {xid}, committed at {time}, did {statement}");
            self.add_note(self.as_in_base(&what));
        }
        self.changes.remove(&xid).unwrap_or_default()
    }

    fn remark(&mut self, text: String) {
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.insert(text);
        }
    }

    fn add_note(&mut self, text: String) {
        if self.notes.len() < REMARKS_MAX && !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Rows of each table that the base has: by name, and by OID.
    fn rows(&self) -> (BTreeMap<String, u64>, BTreeMap<Oid, u64>) {
        let known = |oid: &Oid| self.tables.get(oid).map(|table| table.display_name());
        let count = |rows: i64| u64::try_from(rows).unwrap_or_default();
        let expected = self.rows.iter().filter(|(oid, _)| self.tables.contains_key(oid));
        let expected = expected.map(|(oid, rows)| (*oid, count(*rows))).collect();
        let rows = self.rows.iter().filter_map(|(oid, rows)| Some((known(oid)?, count(*rows)))).collect();
        (rows, expected)
    }
}
