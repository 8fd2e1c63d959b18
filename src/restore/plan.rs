//! Catalog, request and archived WAL -> a plan: what will be fetched, where recovery stops, what is kept and what is lost.
//!
//! A plan is a proof. Every byte of WAL from the backup's start to the stop is in the repository; the place to stop was
//! found in the records themselves, and the restored server is held to it. Segments whose index says that recovery does
//! not stop in them are not read, so what is damaged in them is found when the server replays them, unless the request
//! is to verify. What cannot be proved is refused, with what is missing and which moments can be reached.
//!
//! **Archived up to.** A time behind the last commit is reachable if it is proved that nothing was committed in between:
//! if some archived record (the end of a transaction, a checkpoint, a restore point) carries that time or a later one,
//! then whatever was committed before it lies before that record, and is archived. On a server that has been idle since,
//! the agent's [`CaughtUp`] proves it. The time at which the store received its newest object would prove less: a commit
//! may have been on its way to the store at that very moment. What neither proves is "not yet archived".

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::error::{Moment, Nearest, RestoreError};
use super::path;
use super::scan::{Goal, Scanned, padded};
pub use super::scan::{Stop, Transaction};
use super::search::{Found, Search};
use super::target::Target;
use crate::backoff::Chain;
use crate::decode::rmgr::xlog::Parameters;
use crate::detect::Incident;
use crate::pg::{Lsn, PgTime, Position, SegmentName, SegmentSize, SystemId, TimelineHistory, TimelineId};
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::catalog::{BackupInfo, Catalog, CatalogScope, Missing};
use crate::repo::lease::CaughtUp;
use crate::repo::restores::Rates;

/// A checkpoint's time is cut to whole seconds, and taken just before the place is fixed where its WAL begins.
const CHECKPOINT_TIME_SLACK: i64 = 2_000_000;

/// What somebody wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The moment.
    pub target: Target,
    /// Stop just before the target's transaction or time instead of just behind it.
    pub exclusive: bool,
    /// Follow the history of this timeline; by default that of the newest.
    pub timeline: Option<TimelineId>,
    /// Begin with the backup of this label; by default with the newest that serves.
    pub backup: Option<String>,
    /// Read all WAL that the restore needs, also where indexes tell what is in it: damage is then told by the plan, and
    /// not by the restored server on its way.
    pub verify: bool,
}

/// What a restore will do. Same catalog and request, same plan.
#[derive(Clone, Debug, serde::Serialize)]
pub struct RestorePlan {
    /// The cluster's name in the repository.
    pub cluster: String,
    /// What was asked for.
    pub target: Target,
    /// The incident before which the restore stops, if that was asked for.
    pub incident: Option<Box<Incident>>,
    /// The backup that is extracted: the one from which the moment is reached soonest.
    pub backup: BackupInfo,
    /// Backups that would serve too, the quickest first.
    pub alternatives: Vec<Alternative>,
    /// Newer backups before the target that are not used, and why.
    pub passed_over: Vec<PassedOver>,
    /// The timelines that are followed, each with the place where it is left; the last is where recovery stops.
    pub path: Vec<Leg>,
    /// Given to the server as `recovery_target_timeline`.
    pub timeline: TimelineId,
    /// Where recovery stops.
    pub stop: Stop,
    /// The last transaction that is kept; `None` if none committed between the backup's start and the stop.
    pub kept: Option<Transaction>,
    /// The first transaction that is lost; `None` if none is archived.
    pub lost: Option<Transaction>,
    /// How far the WAL of the path is archived, without a hole from the backup on.
    pub archived: Moment,
    /// Bytes of WAL that recovery reads.
    pub wal_bytes: u64,
    /// Segments that these lie in.
    pub wal_segments: u64,
    /// Segments that were read, whole, to find the stop. The indexes told what is in the others; these are known to be
    /// there, but not to be undamaged.
    pub segments_read: u64,
    /// About so many bytes of WAL and backup are fetched from the repository.
    pub fetched_bytes: u64,
    /// About so many seconds will pass until the moment is reached, by these rates.
    pub estimated_seconds: f64,
    /// How fast the last restores from this repository were; or, if there were none, those of `benches/RESULTS.md`.
    pub rates: Rates,
    /// The time of the last transaction's end, commit or abort, that the server will have replayed, and of the one
    /// before it.
    #[serde(skip)]
    pub(super) last_ends: [Option<PgTime>; 2],
    /// The last record replayed is the end of a transaction.
    #[serde(skip)]
    pub(super) ends_with_transaction: bool,
    /// What the WAL says of settings that the restored server must not have smaller.
    #[serde(skip)]
    pub(super) parameters: Option<Parameters>,
    /// The timelines that were searched, also behind the stop.
    #[serde(skip)]
    pub(super) whole_path: TimelineHistory,
    /// What the repository held.
    #[serde(skip)]
    pub(super) catalog: Option<Arc<Catalog>>,
}

/// A backup that would serve too.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Alternative {
    /// Its name.
    pub label: String,
    /// Bytes of WAL that recovery would read.
    pub wal_bytes: u64,
    /// About so many seconds would pass until the moment is reached.
    pub estimated_seconds: f64,
}

/// A backup that is not used.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PassedOver {
    /// Its name.
    pub label: String,
    /// Why.
    pub reason: String,
}

/// A stretch of one timeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Leg {
    /// The timeline.
    pub timeline: TimelineId,
    /// Where it is entered.
    pub from: Lsn,
    /// Where it is left.
    pub to: Lsn,
}

/// Makes a plan. Looks through the archived WAL from the backup's start to the target and, where one was committed, to the
/// first transaction behind it; writes nothing.
///
/// # Errors
/// If the target cannot be reached, or not provably.
pub async fn plan(
    repo: &Repository,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<RestorePlan, RestoreError> {
    let catalog = Arc::new(cancellable(cancel, repo.catalog(CatalogScope::Everything)).await??);
    let harm = match &request.target {
        Target::Before(id) => Some(cancellable(cancel, Harm::of(repo, id)).await??),
        _ => None,
    };
    let path = choose_path(&catalog, request.timeline, harm.as_ref())?;
    let rates = cancellable(cancel, repo.restore_rates()).await?.unwrap_or_else(|error| {
        tracing::debug!("failed to read how long earlier restores took: {}", Chain(&error));
        Rates::default() // no reason not to restore
    });
    let caught_up = cancellable(cancel, repo.lease()).await??.and_then(|lease| lease.caught_up);
    let target = harm.as_ref().map(|harm| Target::Lsn(harm.at.lsn));
    let resolved = Request { target: target.unwrap_or_else(|| request.target.clone()), ..request.clone() };
    let planner = Planner {
        repo,
        catalog: &catalog,
        path: &path,
        caught_up,
        rates,
        request: &resolved,
        is_before: harm.is_some(),
        progress,
        cancel,
    };
    let mut plan = planner.plan().await?;
    if let Some(harm) = harm {
        // Only that transaction's own record is the right place: an LSN alone might lie in the WAL of another past.
        if plan.stop.lsn > harm.at.lsn || plan.lost.is_none_or(|lost| lost.lsn != harm.at.lsn) {
            let what = format!("the commit at {} with which incident {} began", harm.at.lsn, harm.incident.id);
            if plan.lost.is_none() {
                // An alarm can be faster than the archive.
                let before = Moment { lsn: plan.stop.reached, time: plan.kept.map(|kept| kept.time) };
                let nearest = Nearest { before: Some(before), after: None };
                let problem = format!("{what} is not archived yet");
                return Err(RestoreError::Unreachable { problem, nearest, not_yet: true });
            }
            return Err(RestoreError::NotInWal { what, from: plan.backup.start, to: plan.archived.lsn });
        }
        plan.target = request.target.clone();
        plan.incident = Some(harm.incident);
    }
    plan.whole_path = path;
    plan.catalog = Some(catalog);
    Ok(plan)
}

/// What `before:` stands before.
struct Harm {
    incident: Box<Incident>,
    /// Where the commit record of the first transaction that destroyed something begins.
    at: Position,
}

impl Harm {
    async fn of(repo: &Repository, id: &str) -> Result<Self, RestoreError> {
        let refuse = |problem: String, hint: &str| RestoreError::Option { problem, hint: hint.to_owned() };
        let Some(incident) = repo.incident(id).await? else {
            let hint = "`walguard incidents list` shows those that there are";
            return Err(refuse(format!("there is no incident `{id}`"), hint));
        };
        let Some(lsn) = incident.first_harm else {
            let problem =
                format!("incident {id} is {}: none of its transactions is committed", incident.state.as_str());
            return Err(refuse(problem, "nothing is lost by it so far: --to latest keeps everything"));
        };
        let at = Position { timeline: incident.timeline, lsn };
        Ok(Self { incident: Box::new(incident), at })
    }

    /// True if the transaction happened on this path.
    fn is_on(&self, path: &TimelineHistory) -> bool {
        path.contains(Position { lsn: self.at.lsn + 1, ..self.at })
    }
}

pub(super) async fn cancellable<T>(
    cancel: &CancellationToken,
    work: impl Future<Output = T>,
) -> Result<T, RestoreError> {
    cancel.run_until_cancelled(work).await.ok_or(RestoreError::Cancelled)
}

/// The history of the timeline asked for, or of the newest; that of the harm's own if the newest did not come from it.
fn choose_path(
    catalog: &Catalog,
    wanted: Option<TimelineId>,
    harm: Option<&Harm>,
) -> Result<TimelineHistory, RestoreError> {
    let refuse =
        |problem: String| RestoreError::Timeline { problem, known: catalog.timelines.keys().copied().collect() };
    let newest = catalog.newest_timeline();
    let elsewhere = |harm: &&Harm| newest.and_then(|t| catalog.history(t)).is_some_and(|path| !harm.is_on(path));
    let abandoned = harm.filter(elsewhere).map(|harm| harm.at.timeline);
    let Some(timeline) = wanted.or(abandoned).or(newest) else {
        return Err(RestoreError::NoBackup { problem: "the repository holds no WAL".to_owned() });
    };
    if !catalog.timelines.contains_key(&timeline) {
        return Err(refuse(format!("there is no timeline {timeline} in the repository")));
    }
    let history = catalog.history(timeline).cloned();
    let history =
        history.ok_or_else(|| refuse(format!("the history of timeline {timeline} is not in the repository")))?;
    match harm.filter(|harm| !harm.is_on(&history)) {
        None => Ok(history),
        Some(harm) => {
            let Harm { incident, at } = harm;
            Err(refuse(format!(
                "incident {} is not in the past of timeline {timeline}, but of {}",
                incident.id, at.timeline
            )))
        }
    }
}

/// The backups that a restore along `path` may begin with, in the order in which they are tried: those without damaged
/// pages before the others, newer before older.
fn candidates<'a>(
    catalog: &'a Catalog,
    path: &'a TimelineHistory,
    label: Option<&str>,
) -> Result<Vec<&'a BackupInfo>, RestoreError> {
    let refuse = |problem: String| RestoreError::NoBackup { problem };
    if catalog.backups.is_empty() {
        return Err(refuse("the repository holds no complete base backup".to_owned()));
    }
    let mut candidates: Vec<_> = catalog.backups_on(path).collect();
    if let Some(label) = label {
        let backup = catalog.backup(label).ok_or_else(|| refuse(format!("there is no backup `{label}`")))?;
        if !candidates.contains(&backup) {
            let problem = "was not taken on the history of timeline";
            return Err(refuse(format!("backup `{label}` {problem} {}", path.timeline())));
        }
        candidates.retain(|candidate| candidate.label == label);
    }
    if candidates.is_empty() {
        return Err(refuse(format!("no backup was taken on the history of timeline {}", path.timeline())));
    }
    if let Some(hole) = candidates.iter().find_map(|b| catalog.covered(path, b.start, b.stop).err()) {
        candidates.retain(|backup| catalog.covered(path, backup.start, backup.stop).is_ok());
        if candidates.is_empty() {
            return Err(refuse(format!("no backup is usable yet, because {hole}")));
        }
    }
    candidates.sort_by_key(|backup| (backup.bad_pages > 0, std::cmp::Reverse(backup.stop)));
    Ok(candidates)
}

struct Planner<'a> {
    repo: &'a Repository,
    catalog: &'a Catalog,
    path: &'a TimelineHistory,
    /// What the agent proved last.
    caught_up: Option<CaughtUp>,
    rates: Rates,
    request: &'a Request,
    /// The request's LSN is the commit that `before:` leaves out.
    is_before: bool,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
}

/// What came of one backup.
enum Tried {
    /// It serves.
    Plan(Box<RestorePlan>),
    /// The target lies before its consistent point: this is where what is to be kept ends.
    TooEarly(Lsn),
    /// What was looked for is not behind its start.
    NotThere,
}

impl Planner<'_> {
    async fn plan(&self) -> Result<RestorePlan, RestoreError> {
        let candidates = candidates(self.catalog, self.path, self.request.backup.as_deref())?;
        // A transaction or a name is looked for behind the newest backup first, then between it and the one before, and
        // so on: what was meant is more likely new than old.
        let mut searched_from: Option<Lsn> = None;
        let mut kept_to: Option<Lsn> = None;
        for backup in &candidates {
            if self.is_too_late(backup, kept_to) {
                continue;
            }
            let until = if kept_to.is_none() { searched_from } else { None };
            if until.is_some_and(|until| until <= backup.start) {
                continue;
            }
            match self.try_backup(backup, until, &candidates).await? {
                Tried::Plan(plan) => return self.soonest(plan, &candidates).await,
                Tried::TooEarly(lsn) => kept_to = Some(lsn),
                Tried::NotThere => searched_from = Some(backup.start),
            }
        }
        Err(self.refusal(&candidates, searched_from, kept_to))
    }

    /// True if the backup is surely consistent only behind the target.
    fn is_too_late(&self, backup: &BackupInfo, kept_to: Option<Lsn>) -> bool {
        match (kept_to, &self.request.target) {
            (Some(kept_to), _) => backup.stop > kept_to,
            // A backup that ended behind the target may still serve: nothing may have been committed in between.
            (None, Target::Time(time)) => backup.start_time > *time,
            (None, Target::Lsn(lsn)) => backup.stop > *lsn,
            // `before:` was resolved to its place.
            (None, Target::Latest | Target::Xid(_) | Target::Name(_) | Target::Before(_)) => false,
        }
    }

    fn goal(&self, backup: &BackupInfo) -> Goal {
        let exclusive = self.request.exclusive;
        match &self.request.target {
            Target::Lsn(lsn) if self.is_before => Goal::Before { lsn: *lsn, floor: backup.stop },
            Target::Latest | Target::Before(_) => Goal::End,
            Target::Time(at) => Goal::Time { at: *at, exclusive },
            Target::Lsn(lsn) => Goal::Lsn(*lsn),
            Target::Xid(xid) => Goal::Xid { xid: *xid, exclusive },
            Target::Name(name) => Goal::Name(name.clone()),
        }
    }

    async fn try_backup(
        &self,
        backup: &BackupInfo,
        until: Option<Lsn>,
        candidates: &[&BackupInfo],
    ) -> Result<Tried, RestoreError> {
        let end = self.catalog.contiguous_to(self.path, backup.start);
        let hole = self.catalog.covered(self.path, backup.start, path::known_end(self.catalog, self.path)).err();
        let behind = |before: Moment| self.behind_the_end(before, hole, candidates);
        match self.request.target {
            Target::Latest if hole.is_some() => return Err(behind(Moment { lsn: end, time: None })),
            Target::Lsn(lsn) if lsn > padded(end) => return Err(behind(Moment { lsn: end, time: None })),
            _ => {}
        }
        let mut read = self.read(backup, until.unwrap_or(end), candidates).await?;
        if read.scanned.stop.is_some() && until.is_some() {
            // Found in what lies before a newer backup: what is lost may lie behind that one's start.
            read = self.read(backup, end, candidates).await?;
        }
        let Found { scanned: found, to, segments_read, .. } = &read;
        let archived = found.everything.map_or(*to, |stop| stop.reached);
        let latest = found.latest.max(self.proved(archived));
        let stop = match (found.stop, &self.request.target) {
            (Some(stop), _) => Some(stop),
            (None, Target::Latest | Target::Before(_)) => found.everything,
            (None, Target::Lsn(lsn)) if *lsn <= padded(*to) => found.everything,
            (None, Target::Time(time)) if latest >= Some(*time) => found.everything,
            (None, Target::Lsn(_) | Target::Time(_)) => {
                return Err(behind(Moment { lsn: archived, time: latest }));
            }
            (None, Target::Xid(_) | Target::Name(_)) => return Ok(Tried::NotThere),
        };
        let Some(stop) = stop else { return Ok(Tried::NotThere) };
        if stop.reached < backup.stop || !self.began_before_the_target(found) {
            return Ok(Tried::TooEarly(stop.reached.min(Lsn::new(backup.stop.bytes().saturating_sub(1)))));
        }
        if let (Target::Name(name), [_, _, ..]) = (&self.request.target, found.named.as_slice()) {
            let places = found.named.iter().map(|(lsn, time)| Moment { lsn: *lsn, time: Some(*time) }).collect();
            return Err(RestoreError::AmbiguousName { name: name.clone(), places });
        }
        let at_end = found.everything.is_some();
        let archived = Moment { lsn: archived.max(end), time: latest.filter(|_| at_end) };
        Ok(Tried::Plan(Box::new(self.make_plan(backup, candidates, &stop, found, archived, *segments_read))))
    }

    /// Up to when everything committed is proved to lie before `archived`, by the agent's word.
    fn proved(&self, archived: Lsn) -> Option<PgTime> {
        let CaughtUp { position: Position { timeline, lsn }, time } = self.caught_up?;
        // On an older timeline of the path the proof holds too; records of the newer one say more.
        let is_on_path = self.path.begin_of(timeline)? <= lsn && lsn <= self.path.end_of(timeline)?;
        (is_on_path && lsn <= padded(archived)).then_some(time)
    }

    /// Proves that nothing that the backup itself holds was committed behind a target time: what was committed before the
    /// backup's WAL begins cannot be left out any more.
    ///
    /// A transaction that ended behind that beginning and not behind the target proves it, and so does the time of the
    /// checkpoint that the WAL begins with. The manifest's times do not: they are those of the backup's command, which
    /// may wait for another checkpoint first.
    fn began_before_the_target(&self, found: &Scanned) -> bool {
        let Target::Time(target) = self.request.target else { return true };
        let began = found.began.map(|began| PgTime::from_micros(began.micros().saturating_add(CHECKPOINT_TIME_SLACK)));
        found.last_ends[0].is_some() || began.is_some_and(|began| began <= target)
    }

    fn make_plan(
        &self,
        backup: &BackupInfo,
        candidates: &[&BackupInfo],
        stop: &Stop,
        found: &Scanned,
        archived: Moment,
        segments_read: u64,
    ) -> RestorePlan {
        let size = self.catalog.identity.segment_size;
        let last = size.segment_of(Lsn::new(stop.read_to.bytes().saturating_sub(1)));
        let wal_segments = last.get() + 1 - size.segment_of(backup.start).get();
        let (stored, segments) = self
            .catalog
            .timelines
            .values()
            .fold((0, 0), |(stored, segments), wal| (stored + wal.stored_bytes, segments + wal.segments));
        RestorePlan {
            cluster: self.repo.layout().cluster().to_owned(),
            target: self.request.target.clone(),
            incident: None,
            backup: backup.clone(),
            alternatives: Vec::new(),
            passed_over: self.passed_over(backup, candidates, stop.reached),
            path: legs(self.path, backup, stop),
            timeline: path::recovery_timeline(self.catalog, self.path, stop.lsn, stop.read_to),
            stop: *stop,
            kept: found.kept,
            lost: found.lost,
            archived,
            wal_bytes: stop.read_to.saturating_sub(backup.start),
            wal_segments,
            segments_read,
            fetched_bytes: backup.stored_bytes + wal_segments * (stored / segments.max(1)),
            estimated_seconds: self.rates.estimate(backup.content_bytes, stop.read_to.saturating_sub(backup.start)),
            rates: self.rates,
            last_ends: found.last_ends,
            ends_with_transaction: found.ends_with_transaction,
            parameters: found.parameters,
            whole_path: self.path.clone(),
            catalog: None,
        }
    }

    /// The plan with the backup from which the moment is reached soonest: one with more WAL behind it may be so much smaller
    /// that it is quicker.
    async fn soonest(
        &self,
        mut plan: Box<RestorePlan>,
        candidates: &[&BackupInfo],
    ) -> Result<RestorePlan, RestoreError> {
        let Stop { reached, read_to, .. } = plan.stop;
        let serves = |backup: &&&BackupInfo| {
            backup.stop <= reached
                && backup.bad_pages <= plan.backup.bad_pages
                && padded(self.catalog.contiguous_to(self.path, backup.start)) >= read_to
        };
        let weigh = |backup: &&BackupInfo| {
            let wal_bytes = read_to.saturating_sub(backup.start);
            let estimated_seconds = self.rates.estimate(backup.content_bytes, wal_bytes);
            Alternative { label: backup.label.clone(), wal_bytes, estimated_seconds }
        };
        let mut weighed: Vec<_> = candidates.iter().filter(serves).map(weigh).collect();
        weighed.sort_by(|a, b| a.estimated_seconds.total_cmp(&b.estimated_seconds));
        let quicker = weighed.iter().take_while(|other| other.estimated_seconds < plan.estimated_seconds);
        for label in quicker.map(|other| other.label.as_str()).collect::<Vec<_>>() {
            let backup = candidates.iter().find(|backup| backup.label == label);
            if let Some(backup) = backup
                && let Tried::Plan(other) = self.try_backup(backup, None, candidates).await?
                && other.stop == plan.stop
            {
                plan = other;
                break;
            }
        }
        weighed.retain(|other| other.label != plan.backup.label);
        plan.alternatives = weighed;
        Ok(*plan)
    }

    /// Newer backups that the target lies behind, and why none of them was taken.
    fn passed_over(&self, chosen: &BackupInfo, candidates: &[&BackupInfo], reached: Lsn) -> Vec<PassedOver> {
        let newer = |backup: &&BackupInfo| backup.stop > chosen.stop && backup.stop <= reached;
        let reason = |backup: &BackupInfo| match self.catalog.covered(self.path, backup.start, backup.stop) {
            Err(missing) => missing.to_string(),
            Ok(()) if self.request.backup.is_some() => "another was asked for".to_owned(),
            Ok(()) => format!("{} pages failed their checksum", backup.bad_pages),
        };
        let damaged = |backup: &&BackupInfo| backup.bad_pages > chosen.bad_pages || !candidates.contains(backup);
        self.catalog
            .backups_on(self.path)
            .filter(newer)
            .filter(damaged)
            .map(|backup| PassedOver { label: backup.label.clone(), reason: reason(backup) })
            .collect()
    }

    /// The first moment that a backup behind `lsn` reaches.
    fn first_behind(&self, lsn: Lsn, candidates: &[&BackupInfo]) -> Option<Moment> {
        let behind = candidates.iter().filter(|backup| backup.start >= lsn).min_by_key(|backup| backup.stop)?;
        Some(Moment { lsn: behind.stop, time: Some(behind.stop_time) })
    }

    /// The target lies behind all that is archived, or in a hole.
    fn behind_the_end(&self, before: Moment, hole: Option<Missing>, candidates: &[&BackupInfo]) -> RestoreError {
        let after = self.first_behind(before.lsn, candidates);
        let nearest = Nearest { before: Some(before), after };
        if let Some(missing) = hole {
            return RestoreError::MissingWal { missing, nearest };
        }
        let problem = match self.request.target {
            Target::Time(time) => format!("that everything committed before {time} is archived is not proved yet"),
            Target::Lsn(lsn) => format!("WAL up to {lsn} is not archived yet"),
            _ => "the WAL is not archived yet".to_owned(),
        };
        RestoreError::Unreachable { problem, nearest, not_yet: true }
    }

    /// No backup serves.
    fn refusal(&self, candidates: &[&BackupInfo], searched: Option<Lsn>, kept_to: Option<Lsn>) -> RestoreError {
        let first = candidates.iter().min_by_key(|backup| backup.stop);
        if let (Some(from), None) = (searched, kept_to) {
            let what = match &self.request.target {
                Target::Name(name) => format!("restore point `{name}`"),
                Target::Xid(xid) => format!("the end of transaction {xid}"),
                other => format!("{other:?}"),
            };
            return RestoreError::NotInWal { what, from, to: self.catalog.contiguous_to(self.path, from) };
        }
        let after = first.map(|backup| Moment { lsn: backup.stop, time: Some(backup.stop_time) });
        let problem = match self.request.backup {
            Some(_) => "the target lies before the backup is consistent".to_owned(),
            None => "the target lies before the first backup is consistent".to_owned(),
        };
        RestoreError::Unreachable { problem, nearest: Nearest { before: None, after }, not_yet: false }
    }

    /// Looks through the WAL from a backup's start to `to`, or to what is looked for.
    async fn read(&self, backup: &BackupInfo, to: Lsn, candidates: &[&BackupInfo]) -> Result<Found, RestoreError> {
        let &Self { repo, catalog, path, progress, cancel, .. } = self;
        let search = Search { repo, catalog, path, everything: self.request.verify, progress, cancel };
        let found = search.run(self.goal(backup), backup.start, to).await?;
        match &found.problem {
            // Damage behind the target does not keep anybody from it.
            Some((name, problem)) if found.scanned.stop.is_none() => {
                Err(self.damaged(name, problem.clone(), backup, &found.scanned, candidates))
            }
            _ => Ok(found),
        }
    }

    fn damaged(
        &self,
        name: &SegmentName,
        problem: String,
        backup: &BackupInfo,
        found: &Scanned,
        candidates: &[&BackupInfo],
    ) -> RestoreError {
        let before = found.everything.filter(|stop| stop.reached >= backup.stop);
        let before = before.map(|stop| Moment { lsn: stop.reached, time: found.latest });
        let nearest = Nearest { before, after: self.first_behind(name.end(), candidates) };
        RestoreError::DamagedWal { segment: name.to_string(), problem, nearest }
    }
}

/// The timelines from the backup's to the one on which the last record that is kept lies.
fn legs(path: &TimelineHistory, backup: &BackupInfo, stop: &Stop) -> Vec<Leg> {
    let timelines = path.ancestors().iter().map(|ancestor| ancestor.timeline).chain([path.timeline()]);
    timelines
        .filter(|timeline| *timeline >= backup.timeline)
        .filter_map(|timeline| {
            let from = path.begin_of(timeline)?.max(backup.start);
            let to = path.end_of(timeline)?.min(stop.reached);
            (from < to).then_some(Leg { timeline, from, to })
        })
        .collect()
}

impl RestorePlan {
    /// Whose backup it is.
    pub(super) fn system_id(&self) -> SystemId {
        self.catalog.as_ref().map_or(SystemId::new(0), |catalog| catalog.identity.system_id)
    }

    /// Bytes of a WAL segment.
    pub(super) fn segment_size(&self) -> SegmentSize {
        self.catalog.as_ref().map_or(SegmentSize::DEFAULT, |catalog| catalog.identity.segment_size)
    }

    /// Where recovery ends: what is kept ends here.
    pub fn reached(&self) -> Position {
        let timeline = self.path.last().map_or(self.timeline, |leg| leg.timeline);
        Position { timeline, lsn: self.stop.reached }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use bytes::Bytes;

    use super::*;
    use crate::decode::testing::{WalWriter, Written, main_data, source};
    use crate::decode::{RmgrId, WalMajor};
    use crate::detect::Observer;
    use crate::pg::{ServerVersion, Xid};
    use crate::progress::Silent;
    use crate::proto;
    use crate::repo::RepoError;
    use crate::repo::backup::manifest;
    use crate::repo::cluster::{ClusterIdentity, FORMAT};
    use crate::repo::frame;
    use crate::repo::index::Indexer;
    use crate::repo::lease::Claim;
    use crate::repo::store::{Created, ListPage, ListRequest, MemoryStore, Store, StoreError};

    /// A store that keeps the keys that were read.
    #[derive(Debug, Default)]
    struct Watched {
        store: MemoryStore,
        reads: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl Store for Watched {
        async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
            self.store.create(key, content).await
        }

        async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
            self.store.replace(key, content).await
        }

        async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
            self.reads.lock().unwrap().push(key.to_owned());
            self.store.read(key, range).await
        }

        async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
            self.store.list(request).await
        }

        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            self.store.delete(key).await
        }

        fn enforces_create_once(&self) -> bool {
            self.store.enforces_create_once()
        }

        fn url(&self) -> String {
            self.store.url()
        }
    }

    /// Microseconds of a second.
    const SECOND: i64 = 1_000_000;

    /// A repository whose WAL is made by hand: one commit a second, in segments of 1 MiB.
    struct World {
        store: Arc<Watched>,
        repo: Repository,
        wal: WalWriter,
        start: Lsn,
        /// Of the backups to come.
        content_bytes: u64,
    }

    impl World {
        async fn new() -> Self {
            let store = Arc::new(Watched::default());
            let repo = Repository::over(store.clone(), "main").unwrap();
            let source = source(WalMajor::V15);
            let identity = ClusterIdentity {
                format: FORMAT,
                system_id: source.system_id.unwrap(),
                server_version: ServerVersion::new(150_018),
                segment_size: source.segment_size,
                created_at: jiff::Timestamp::UNIX_EPOCH,
            };
            repo.initialize(&identity).await.unwrap();
            let start = Lsn::new(4 << 20);
            Self { store, repo, wal: WalWriter::new(source, start), start, content_bytes: 0 }
        }

        fn commit(&mut self, xid: u32, seconds: i64) -> Written {
            self.wal.record(RmgrId::XACT, 0, xid, &main_data(&(seconds * SECOND).to_le_bytes()))
        }

        fn end(&mut self, info: u8, xid: u32, seconds: i64) -> Written {
            self.wal.record(RmgrId::XACT, info, xid, &main_data(&(seconds * SECOND).to_le_bytes()))
        }

        fn point(&mut self, name: &str, seconds: i64) -> Written {
            let mut data = (seconds * SECOND).to_le_bytes().to_vec();
            data.extend(name.as_bytes());
            data.resize(72, 0);
            self.wal.record(RmgrId::XLOG, 0x70, 0, &main_data(&data))
        }

        fn parameters(&mut self, connections: i32) -> Written {
            let settings = [connections, 8, 10, 0, 64, 1].map(i32::to_le_bytes).concat();
            self.wal.record(RmgrId::XLOG, 0x60, 0, &main_data(&[settings.as_slice(), &[0; 2]].concat()))
        }

        /// Enough rows that the next record lies in a later segment.
        fn fill(&mut self) {
            for _ in 0..2 {
                self.wal.record(RmgrId::GENERIC, 0, 9, &main_data(&[1; 700_000]));
            }
        }

        /// A base backup, from its checkpoint's redo point to where it is consistent.
        async fn backup(&mut self, label: &str, seconds: i64, bad_pages: u64) -> Written {
            let redo = self.wal.record(RmgrId::GENERIC, 0, 9, &main_data(b"first"));
            let mut checkpoint = vec![0; 88];
            checkpoint[..8].copy_from_slice(&redo.lsn.bytes().to_le_bytes());
            checkpoint[8] = 1;
            checkpoint[12] = 1;
            let unix = seconds + 946_684_800;
            checkpoint[64..72].copy_from_slice(&unix.to_le_bytes());
            self.wal.record(RmgrId::XLOG, 0x10, 0, &main_data(&checkpoint));
            let end = self.wal.record(RmgrId::XLOG, 0x50, 0, &main_data(&redo.lsn.bytes().to_le_bytes()));
            let manifest = proto::BackupManifest {
                format: FORMAT,
                label: label.to_owned(),
                system_id: SystemId::new(42).get(),
                server_version: 150_018,
                wal_segment_size: 1 << 20,
                timeline: 1,
                start_lsn: redo.lsn.bytes(),
                stop_lsn: end.end.bytes(),
                start_time: seconds * SECOND,
                stop_time: (seconds + 1) * SECOND,
                bad_pages_total: bad_pages,
                content_bytes: self.content_bytes,
                ..proto::BackupManifest::default()
            };
            let key = self.repo.layout().manifest(label);
            self.repo.store().create(&key, manifest::encode(&manifest).into()).await.unwrap();
            end
        }

        /// Archives everything: whole segments, and the last as a tail.
        async fn archive(&self) {
            let size = self.wal.source.segment_size;
            for (index, bytes) in self.wal.bytes().chunks(1 << 20).enumerate() {
                let name = SegmentName::at(TimelineId::FIRST, self.start + ((index as u64) << 20), size);
                let key = match bytes.len() {
                    0x10_0000 => self.repo.layout().segment(&name),
                    length => self.repo.layout().tail(&name, 0, length as u32),
                };
                let stored = Bytes::from(frame::compress(bytes, 1));
                self.repo.store().create(&key, stored).await.unwrap();
            }
        }

        /// Puts the indexes of those whole segments that `wanted` names by their place, 0 being the first.
        async fn index(&self, wanted: impl Fn(usize) -> bool) {
            let first = SegmentName::at(TimelineId::FIRST, self.start, self.wal.source.segment_size);
            let mut indexer =
                Indexer::new(self.wal.source, &first, Observer::without_names(self.wal.source.major, true));
            for (place, bytes) in (0_u64..).zip(self.wal.bytes().chunks_exact(1 << 20)) {
                let name = SegmentName::at(TimelineId::FIRST, self.start + (place << 20), first.size);
                for (name, index) in indexer.take(name, bytes).unwrap() {
                    if wanted((name.number.get() - first.number.get()) as usize) {
                        self.repo.put_index(&name, &index.unwrap()).await.unwrap();
                        self.repo.merge_indexes_after(&name).await.unwrap();
                    }
                }
            }
        }

        /// The objects of WAL, and all, read since this was asked last.
        fn reads(&self) -> (usize, usize) {
            let reads = std::mem::take(&mut *self.store.reads.lock().unwrap());
            (reads.iter().filter(|key| key.contains("/wal/")).count(), reads.len())
        }

        /// The plan by the indexes, which must be the one that all WAL gives; and its refusal as text.
        async fn same_plan(&self, target: Target, exclusive: bool) -> Result<RestorePlan, String> {
            let mut request = Request { target, exclusive, timeline: None, backup: None, verify: true };
            let cancel = CancellationToken::new();
            let expected = plan(&self.repo, &request, &Silent, &cancel).await;
            request.verify = false;
            let found = plan(&self.repo, &request, &Silent, &cancel).await;
            let text = |plan: &Result<RestorePlan, RestoreError>| match plan {
                Ok(plan) => format!("{:?}", RestorePlan { segments_read: 0, catalog: None, ..plan.clone() }),
                Err(error) => format!("{error:?}"),
            };
            assert_eq!(text(&found), text(&expected), "{request:?}");
            found.map_err(|error| error.to_string())
        }

        async fn remove(&self, lsn: Lsn) {
            let name = SegmentName::at(TimelineId::FIRST, lsn, self.wal.source.segment_size);
            self.repo.store().delete(&self.repo.layout().segment(&name)).await.unwrap();
        }

        async fn plan(&self, target: Target) -> Result<RestorePlan, RestoreError> {
            let request = Request { target, exclusive: false, timeline: None, backup: None, verify: false };
            plan(&self.repo, &request, &Silent, &CancellationToken::new()).await
        }
    }

    fn time(seconds: i64) -> Target {
        Target::Time(PgTime::from_micros(seconds * SECOND))
    }

    fn xid(number: u32) -> Target {
        Target::Xid(Xid::new(number).unwrap())
    }

    #[tokio::test]
    async fn the_newest_backup_before_the_target_is_taken_and_everything_after_it_is_proved() {
        let mut world = World::new().await;
        world.backup("old", 10, 0).await;
        let first = world.commit(3, 20);
        world.fill();
        world.backup("new", 30, 0).await;
        let second = world.commit(4, 40);
        let third = world.commit(5, 50);
        world.archive().await;
        for (target, label, kept, lost) in [
            (time(25), "old", &first, Some(&second)),
            (time(45), "new", &second, Some(&third)),
            (xid(3), "old", &first, Some(&second)),
            (xid(4), "new", &second, Some(&third)),
            (Target::Lsn(second.lsn), "new", &first, Some(&second)),
            (Target::Latest, "new", &third, None),
        ] {
            let plan = world.plan(target.clone()).await.unwrap();
            assert_eq!(plan.backup.label, label, "{target:?}");
            if plan.kept.is_some() || label == "old" {
                assert_eq!(plan.kept.map(|t| t.lsn), Some(kept.lsn), "{target:?}");
            }
            assert_eq!(plan.lost.map(|t| t.lsn), lost.map(|t| t.lsn), "{target:?}");
        }
    }

    /// WAL of all that plans look at, in which commits do not come in the order of their times.
    async fn random_world(random: &mut fastrand::Rng) -> (World, Vec<(Target, bool)>) {
        let mut world = World::new().await;
        let mut targets = vec![(Target::Latest, false)];
        world.commit(3, 1);
        world.backup("first", 2, 0).await;
        for step in 10..random.i64(20..80) {
            let seconds = step + random.i64(-4..4);
            let number = step as u32 * 10;
            match random.u8(..16) {
                0..5 => {
                    let commit = world.commit(number, seconds);
                    targets.push((Target::Lsn(commit.lsn), false));
                    targets.push((Target::Lsn(commit.end), false));
                }
                5 => {
                    world.end(0x20, number, seconds);
                }
                6 => {
                    world.point(random.choice(&["once", "often"]).unwrap(), seconds);
                }
                7 => {
                    world.parameters(random.i32(1..1000));
                }
                8 if random.bool() => {
                    world.backup(&format!("at-{step}"), seconds, random.u64(..4) / 3).await;
                }
                9 if random.bool() => {
                    world.wal.switch();
                }
                10 if random.bool() => {
                    world.wal.record(RmgrId::GENERIC, 0, 9, &main_data(&vec![1; random.usize(1_000_000..2_500_000)]));
                }
                11..13 => {
                    world.wal.record(RmgrId::GENERIC, 0, 9, &main_data(&vec![1; random.usize(400_000..900_000)]));
                }
                _ => {
                    world.wal.record(RmgrId::GENERIC, 0, 9, &main_data(&vec![1; random.usize(1..20_000)]));
                }
            }
            targets.push((time(seconds), random.bool()));
            targets.push((xid(number), random.bool()));
        }
        targets.extend([(Target::Name("once".into()), false), (Target::Name("often".into()), false)]);
        targets.push((Target::Lsn(world.wal.at() + 1), false));
        world.archive().await;
        (world, targets)
    }

    #[tokio::test]
    async fn whichever_indexes_are_there_the_plan_is_that_of_all_wal() {
        let mut random = fastrand::Rng::with_seed(5);
        let (mut plans, mut read, mut all) = (0, 0, 0);
        for round in 0..24 {
            let (world, mut targets) = random_world(&mut random).await;
            let share = [10, 10, 7, 3][round % 4];
            let there: Vec<bool> = (0..300).map(|_| random.u8(..10) < share).collect();
            world.index(|place| there.get(place).copied().unwrap_or(true)).await;
            random.shuffle(&mut targets);
            for (target, exclusive) in targets.into_iter().take(20) {
                if let Ok(plan) = world.same_plan(target, exclusive).await {
                    plans += 1;
                    read += plan.segments_read;
                    all += plan.wal_segments;
                }
            }
        }
        assert!(plans > 200 && read < all, "{plans} plans read {read} of {all} segments");
    }

    #[tokio::test]
    async fn a_time_between_commits_out_of_order_is_found_in_the_segment_of_the_first_later_one() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        let kept = world.commit(3, 20);
        world.fill();
        let early = world.commit(4, 50); // its clock was ahead of those of the segments behind it
        world.fill();
        world.fill();
        world.commit(5, 30);
        world.fill();
        world.fill();
        let last = world.commit(6, 60);
        world.fill();
        world.archive().await;
        world.index(|_| true).await;
        for (seconds, kept, lost) in [(20, &kept, &early), (35, &kept, &early), (49, &kept, &early)] {
            let plan = world.same_plan(time(seconds), false).await.unwrap();
            assert_eq!((plan.kept.unwrap().lsn, plan.lost.unwrap().lsn), (kept.lsn, lost.lsn), "{seconds}");
            assert_eq!((plan.stop.lsn, plan.stop.inclusive), (early.lsn, false), "{seconds}");
        }
        assert_eq!(world.same_plan(time(50), false).await.unwrap().stop.lsn, last.lsn);
    }

    #[tokio::test]
    async fn with_indexes_a_plan_reads_the_segments_at_its_stop_however_many_lie_before() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        for step in 0..60 {
            world.fill();
            world.commit(20 + step as u32, 100 + step);
        }
        world.point("here", 200);
        world.commit(7, 210);
        world.fill();
        world.commit(8, 220);
        world.archive().await;
        world.reads();
        let segments = world.plan(Target::Latest).await.unwrap().wal_segments;
        assert!(segments > 80 && world.reads().0 as u64 >= segments);
        world.index(|_| true).await;
        world.reads();
        let targets = [time(100), time(130), time(159), xid(40), Target::Name("here".into()), Target::Latest];
        for target in targets.into_iter().chain([Target::Lsn(world.start + (30 << 20))]) {
            let plan = world.plan(target.clone()).await.unwrap();
            let (reads, objects) = world.reads();
            // The stop's segment, and where a record goes on in the next; the end, of which there is no index.
            assert!(reads <= 4 && plan.segments_read <= 3, "{target:?} read {reads} objects of WAL");
            // All indexes before the stop are merged but for the last few; restore points are asked one by one.
            let is_name = matches!(target, Target::Name(_));
            assert!(is_name || objects < 45, "{target:?} read {objects} objects for {segments} segments");
            world.same_plan(target, false).await.unwrap();
            world.reads();
        }
    }

    #[tokio::test]
    async fn damage_that_an_index_hides_is_told_if_asked_to_verify_and_a_damaged_index_hides_nothing() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        world.commit(3, 20);
        for _ in 0..3 {
            world.fill();
        }
        let damaged = SegmentName::at(TimelineId::FIRST, world.start + (2 << 20), world.wal.source.segment_size);
        world.commit(4, 30);
        world.fill();
        world.fill();
        world.archive().await;
        world.index(|_| true).await;
        let key = world.repo.layout().segment(&damaged);
        world.repo.store().replace(&key, Bytes::from_static(b"rot")).await.unwrap();
        assert!(world.plan(Target::Latest).await.unwrap().segments_read < 5);
        let mut request =
            Request { target: Target::Latest, exclusive: false, timeline: None, backup: None, verify: true };
        let cancel = CancellationToken::new();
        let error = plan(&world.repo, &request, &Silent, &cancel).await.unwrap_err().to_string();
        assert!(error.contains(&damaged.to_string()), "{error}");
        let key = world.repo.layout().index(&damaged);
        world.repo.store().replace(&key, Bytes::from_static(b"rot")).await.unwrap();
        request.verify = false;
        let error = plan(&world.repo, &request, &Silent, &cancel).await.unwrap_err().to_string();
        assert!(error.contains(&damaged.to_string()), "{error}");
    }

    #[tokio::test]
    async fn a_time_between_a_backups_command_and_its_beginning_is_left_to_the_backup_before() {
        let mut world = World::new().await;
        world.backup("old", 10, 0).await;
        let kept = world.commit(3, 20);
        let lost = world.commit(4, 60);
        // Its command came at 55 by the manifest, but its WAL begins behind the commit of 60.
        let end = world.backup("new", 55, 0).await;
        world.commit(5, 70);
        world.archive().await;
        let plan = world.plan(time(56)).await.unwrap();
        assert_eq!((plan.backup.label.as_str(), plan.kept.unwrap().lsn), ("old", kept.lsn));
        assert_eq!(plan.lost.unwrap().lsn, lost.lsn);
        assert!(plan.stop.reached < end.lsn);
    }

    #[tokio::test]
    async fn a_backup_with_damaged_pages_is_avoided_if_another_serves() {
        let mut world = World::new().await;
        world.backup("whole", 10, 0).await;
        world.commit(3, 20);
        world.backup("damaged", 30, 2).await;
        world.commit(4, 40);
        world.archive().await;
        let plan = world.plan(Target::Latest).await.unwrap();
        assert_eq!(plan.backup.label, "whole");
        assert_eq!(plan.passed_over.len(), 1);
        assert!(plan.passed_over[0].reason.contains("2 pages"));
    }

    #[tokio::test]
    async fn the_backup_from_which_the_moment_is_reached_soonest_is_taken_and_the_others_are_told() {
        let mut world = World::new().await;
        world.backup("small", 10, 0).await;
        let first = world.commit(3, 20);
        world.fill();
        world.content_bytes = 10 << 30;
        world.backup("grown", 30, 0).await;
        let last = world.commit(4, 40);
        world.archive().await;
        let plan = world.plan(Target::Latest).await.unwrap();
        assert_eq!((plan.backup.label.as_str(), plan.stop.reached), ("small", last.end));
        let others: Vec<_> = plan.alternatives.iter().map(|other| other.label.as_str()).collect();
        assert_eq!(others, ["grown"]);
        assert!(plan.alternatives[0].estimated_seconds > plan.estimated_seconds + 10.0);
        // A restore to a moment before the other is consistent has only the one.
        assert_eq!(world.plan(Target::Lsn(first.end)).await.unwrap().alternatives, []);
        let asked = Request {
            target: Target::Latest,
            exclusive: false,
            timeline: None,
            backup: Some("grown".into()),
            verify: false,
        };
        let plan = super::plan(&world.repo, &asked, &Silent, &CancellationToken::new()).await.unwrap();
        assert_eq!((plan.backup.label.as_str(), plan.alternatives.len()), ("grown", 0));
    }

    #[tokio::test]
    async fn before_an_incident_means_its_own_commit_and_no_other_place() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        let kept = world.commit(3, 20);
        let row = world.wal.record(RmgrId::GENERIC, 0, 9, &main_data(b"row"));
        let harm = world.commit(4, 30);
        world.commit(5, 40);
        world.archive().await;
        for (lsn, timeline, state) in
            [(Some(harm.lsn), 1, "committed"), (Some(row.lsn), 1, "committed"), (None, 1, "open")]
        {
            let id = format!("00000001-{:016X}", lsn.unwrap_or_default().bytes());
            let incident: Incident = serde_json::from_value(serde_json::json!({
                "format": 1, "id": id, "revision": 1, "state": state, "severity": "critical", "title": "wiped",
                "timeline": timeline, "first_harm": lsn, "seen_to": world.wal.at(),
                "began_at": "2000-01-01T00:00:30Z", "ended_at": "2000-01-01T00:00:30Z",
                "detected_at": "2000-01-01T00:00:31Z", "updated_at": "2000-01-01T00:00:31Z",
            }))
            .unwrap();
            world.repo.revise_incident(&id, |_| Ok::<_, RepoError>(Some(incident.clone()))).await.unwrap();
            let plan = world.plan(Target::Before(id.clone())).await;
            match lsn {
                Some(lsn) if lsn == harm.lsn => {
                    let plan = plan.unwrap();
                    assert_eq!((plan.stop.lsn, plan.lost.unwrap().lsn), (row.lsn, harm.lsn));
                    assert_eq!((plan.stop.reached, plan.kept.unwrap().lsn), (kept.end, kept.lsn));
                    assert_eq!((plan.incident.unwrap().id, plan.target), (id.clone(), Target::Before(id)));
                }
                Some(_) => assert!(matches!(plan.unwrap_err(), RestoreError::NotInWal { .. })),
                None => assert!(plan.unwrap_err().to_string().contains("is open")),
            }
        }
        let error = world.plan(Target::Before("nonesuch".into())).await.unwrap_err();
        assert!(error.to_string().contains("no incident") && error.hint().is_some());
    }

    #[tokio::test]
    async fn a_hole_is_told_with_both_of_its_sides_and_what_lies_outside_is_reached() {
        let mut world = World::new().await;
        world.backup("old", 10, 0).await;
        let first = world.commit(3, 20);
        world.fill();
        world.fill();
        let hole = world.wal.at();
        world.fill();
        world.fill();
        let end = world.backup("new", 30, 0).await;
        world.commit(4, 40);
        world.archive().await;
        world.remove(hole).await;
        let RestoreError::MissingWal { nearest, .. } = world.plan(time(25)).await.unwrap_err() else {
            panic!("no hole")
        };
        assert!(nearest.before.unwrap().lsn >= first.end && nearest.before.unwrap().lsn <= hole);
        assert_eq!(nearest.after.unwrap().lsn, end.end);
        assert_eq!(world.plan(Target::Latest).await.unwrap().backup.label, "new");
        assert_eq!(world.plan(Target::Lsn(first.end)).await.unwrap().kept.unwrap().lsn, first.lsn);
        assert_eq!(world.plan(nearest.before.map(|m| Target::Lsn(m.lsn)).unwrap()).await.unwrap().backup.label, "old");
    }

    #[tokio::test]
    async fn a_quiet_time_is_reached_as_far_as_the_agent_proved_it_of_wal_that_is_there() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        let last = world.commit(3, 20);
        world.archive().await;
        let claim = Claim {
            holder: "a".to_owned(),
            host: "here".to_owned(),
            pid: 1,
            time_to_live: std::time::Duration::from_secs(60),
        };
        let now = jiff::Timestamp::UNIX_EPOCH;
        let mut held = world.repo.acquire_lease(&claim, now, |_| false).await.unwrap();
        let mut proves = async |timeline, lsn, seconds| {
            let position = Position { timeline: TimelineId::new(timeline).unwrap(), lsn };
            let proof = CaughtUp { position, time: PgTime::from_micros(seconds * SECOND) };
            held.caught_up = None;
            held = world.repo.renew_lease(&claim, &held, now, Some(proof)).await.unwrap();
        };
        for (timeline, lsn) in [(1, last.end + 8), (2, last.end)] {
            proves(timeline, lsn, 30).await;
            let error = world.plan(time(25)).await.unwrap_err();
            assert!(error.is_transient(), "{timeline}:{lsn}: {error}");
        }
        proves(1, last.end, 30).await;
        for seconds in [25, 30] {
            let plan = world.plan(time(seconds)).await.unwrap();
            assert_eq!((plan.stop.reached, plan.archived.time), (last.end, Some(PgTime::from_micros(30 * SECOND))));
        }
        assert!(world.plan(time(31)).await.unwrap_err().to_string().contains("not proved yet"));
    }

    #[tokio::test]
    async fn what_is_not_proved_to_be_archived_is_refused_for_now() {
        let mut world = World::new().await;
        world.backup("only", 10, 0).await;
        let last = world.commit(3, 20);
        world.archive().await;
        for target in [time(21), Target::Lsn(Lsn::new(last.end.bytes() + 1))] {
            let error = world.plan(target).await.unwrap_err();
            assert!(error.is_transient(), "{error}");
        }
        // The exact end is there.
        assert_eq!(world.plan(Target::Lsn(last.end)).await.unwrap().stop.reached, last.end);
        assert_eq!(world.plan(time(20)).await.unwrap().stop.reached, last.end);
        let early = world.plan(time(5)).await.unwrap_err();
        assert!(!early.is_transient() && early.to_string().contains("before the first backup"), "{early}");
    }
}
