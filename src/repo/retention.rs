//! What may go: a plan that can be read before anything is deleted.
//!
//! The rules, whatever the settings say:
//! - The last backup stays; and so does the newest one from which the newest timeline can be reached.
//! - WAL stays from the start of the oldest kept backup on, on every timeline; timeline histories always.
//! - A backup that cannot be restored (its WAL has a hole) or has bad pages does not count as one that is kept.
//! - If anything that says what depends on what is damaged, nothing goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::catalog::{BackupInfo, Catalog, CatalogScope};
use super::gap::Gap;
use super::index::Level;
use super::layout::Object;
use super::{RepoError, Repository, UnfinishedBackup};
use crate::pg::{Lsn, TimelineId};
use crate::progress::Progress;

/// Parts without a manifest that are younger than this may belong to a backup that is being taken right now.
const UNFINISHED_AGE_MIN: SignedDuration = SignedDuration::from_hours(24);

/// Deletions at once. They are small; more would only be throttled.
const DELETES_MAX: usize = 16;

/// Keys collected before they are deleted: some 100 KiB.
const DELETE_BATCH: usize = 1000;

/// What is kept. With both, whatever either keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Keep {
    /// So many of the newest restorable backups, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_backups: Option<u32>,
    /// Every moment of the last so long stays restorable: `30 days`, `36h`.
    #[serde(serialize_with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional::serialize")]
    #[serde(deserialize_with = "span", skip_serializing_if = "Option::is_none")]
    pub keep_for: Option<Duration>,
}

/// What would be deleted, and why that is safe.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ExpirePlan {
    /// Labels of the backups that stay, oldest first, and why each does.
    pub kept: Vec<Kept>,
    /// Backups that go, oldest first.
    pub backups: Vec<BackupInfo>,
    /// Interrupted backups that go.
    pub unfinished: Vec<UnfinishedBackup>,
    /// WAL that ends at or before this goes, on every timeline; `None` if all stays.
    pub wal_before: Option<Lsn>,
    /// WAL objects and indexes that go.
    pub wal_objects: u64,
    /// Their stored bytes.
    pub wal_bytes: u64,
    /// Records of gaps that nothing which is kept can meet.
    pub gaps: Vec<Gap>,
    /// What probes of the store left behind, by key.
    pub probes: Vec<String>,
    /// Why less goes than one might expect; for people.
    pub remarks: Vec<String>,
}

/// A backup that stays.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Kept {
    /// Its name.
    pub label: String,
    /// Why, for people.
    pub reason: String,
}

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Expired {
    /// Objects.
    pub objects: u64,
    /// Their stored bytes.
    pub bytes: u64,
}

impl ExpirePlan {
    /// True if there is nothing to do.
    pub fn is_empty(&self) -> bool {
        let nothing_else = self.wal_objects == 0 && self.gaps.is_empty() && self.probes.is_empty();
        self.backups.is_empty() && self.unfinished.is_empty() && nothing_else
    }

    /// Stored bytes that are freed.
    pub fn bytes(&self) -> u64 {
        let backups: u64 = self.backups.iter().map(|backup| backup.stored_bytes).sum();
        let unfinished: u64 = self.unfinished.iter().map(|backup| backup.stored_bytes).sum();
        backups + unfinished + self.wal_bytes
    }
}

impl fmt::Display for ExpirePlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Kept { label, reason } in &self.kept {
            writeln!(f, "keep    backup {label}: {reason}")?;
        }
        for backup in &self.backups {
            writeln!(f, "delete  backup {} of {}", backup.label, backup.stop_time)?;
        }
        for backup in &self.unfinished {
            writeln!(f, "delete  interrupted backup {}, last written to at {}", backup.label, backup.newest_at)?;
        }
        if let Some(before) = self.wal_before.filter(|_| self.wal_objects > 0) {
            writeln!(f, "delete  WAL before {before}: {} objects", self.wal_objects)?;
        }
        for gap in &self.gaps {
            writeln!(f, "delete  record of the gap on timeline {} from {} to {}", gap.timeline, gap.from, gap.to)?;
        }
        for key in &self.probes {
            writeln!(f, "delete  {key}, left behind by a probe of the store")?;
        }
        for remark in &self.remarks {
            writeln!(f, "note    {remark}")?;
        }
        if self.is_empty() {
            writeln!(f, "nothing to delete")?;
        }
        Ok(())
    }
}

/// Decides what goes. Pure: `catalog` must hold all WAL ([`CatalogScope::Everything`]); the counts of WAL objects are 0.
pub fn plan(catalog: &Catalog, unfinished: &[UnfinishedBackup], keep: &Keep, now: Timestamp) -> ExpirePlan {
    let mut plan = ExpirePlan {
        kept: Vec::new(),
        backups: Vec::new(),
        unfinished: Vec::new(),
        wal_before: None,
        wal_objects: 0,
        wal_bytes: 0,
        gaps: Vec::new(),
        probes: Vec::new(),
        remarks: Vec::new(),
    };
    if let Some(damage) = catalog.damaged.first() {
        let more = catalog.damaged.len() - 1;
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        let remark = format!("nothing goes while `{}`{more} is damaged: what depends on it is not known", damage.key);
        plan.remarks.push(remark);
        keep_all(catalog, &mut plan, "something else is damaged");
        return plan;
    }
    let unknown = catalog.timelines.iter().find(|(_, wal)| wal.history.is_none());
    if let Some((timeline, _)) = unknown {
        plan.remarks.push(format!("nothing goes while the history of timeline {timeline} is missing"));
        keep_all(catalog, &mut plan, "it is not known what depends on it");
        return plan;
    }
    plan.unfinished =
        unfinished.iter().filter(|parts| now.duration_since(parts.newest_at) > UNFINISHED_AGE_MIN).cloned().collect();
    if keep.keep_backups.is_none() && keep.keep_for.is_none() {
        keep_all(catalog, &mut plan, "the settings limit neither number nor age");
        return plan;
    }
    let reasons = reasons(catalog, keep, now);
    if reasons.is_empty() {
        if !catalog.backups.is_empty() {
            plan.remarks.push("no backup is provably restorable: everything stays".to_owned());
        }
        keep_all(catalog, &mut plan, "no backup is provably restorable");
        return plan;
    }
    let oldest_reason =
        catalog.backups.iter().filter(|b| reasons.contains_key(b.label.as_str())).map(|b| b.stop_time).min();
    let mut kept = Vec::new();
    for backup in by_age(&catalog.backups) {
        let reason = match reasons.get(backup.label.as_str()) {
            Some(reason) => reason.clone(),
            // Not restorable or with bad pages, but newer than one that stays: the settings had no reason to drop it.
            None if oldest_reason.is_some_and(|oldest| backup.stop_time > oldest) && !is_good(catalog, backup) => {
                "it does not count, and is not older than what is kept".to_owned()
            }
            None => {
                plan.backups.push(backup.clone());
                continue;
            }
        };
        plan.kept.push(Kept { label: backup.label.clone(), reason });
        kept.push(backup);
    }
    // A restore goes forwards only, so nothing before the first byte that a kept backup needs can ever be asked for.
    let size = catalog.identity.segment_size;
    plan.wal_before = kept.iter().map(|backup| size.start_of(size.segment_of(backup.start))).min();
    plan.gaps =
        catalog.gaps.iter().filter(|gap| plan.wal_before.is_some_and(|before| gap.to <= before)).cloned().collect();
    plan
}

fn keep_all(catalog: &Catalog, plan: &mut ExpirePlan, reason: &str) {
    plan.kept = by_age(&catalog.backups)
        .into_iter()
        .map(|backup| Kept { label: backup.label.clone(), reason: reason.to_owned() })
        .collect();
}

/// Oldest first. By the server's clock, because positions start again lower after a restore to an earlier moment; but on
/// one timeline by position, because clocks are set, and a backup's times are known to about a second.
fn by_age(backups: &[BackupInfo]) -> Vec<&BackupInfo> {
    let mut sorted: Vec<&BackupInfo> = backups.iter().collect();
    sorted.sort_by(|a, b| (a.timeline, a.start, &a.label).cmp(&(b.timeline, b.start, &b.label)));
    let mut latest: Option<&BackupInfo> = None;
    let mut aged: Vec<_> = sorted
        .into_iter()
        .map(|backup| {
            let before = latest.filter(|before| before.timeline == backup.timeline);
            let newest = before.filter(|before| before.stop_time > backup.stop_time).unwrap_or(backup);
            latest = Some(newest);
            (newest.stop_time, backup)
        })
        .collect();
    aged.sort_by_key(|(stop_time, _)| *stop_time); // stable: equal times keep the order of positions
    aged.into_iter().map(|(_, backup)| backup).collect()
}

/// True if the backup can be relied on: its WAL is there, and no page was bad.
fn is_good(catalog: &Catalog, backup: &BackupInfo) -> bool {
    let covered =
        catalog.history(backup.timeline).is_some_and(|path| catalog.covered(path, backup.start, backup.stop).is_ok());
    covered && backup.bad_pages == 0
}

/// Which backups the settings and the rules keep, and why.
fn reasons<'a>(catalog: &'a Catalog, keep: &Keep, now: Timestamp) -> BTreeMap<&'a str, String> {
    let good: Vec<&BackupInfo> =
        by_age(&catalog.backups).into_iter().filter(|backup| is_good(catalog, backup)).collect();
    let mut reasons: BTreeMap<&str, String> = BTreeMap::new();
    let mut because = |backup: &'a BackupInfo, reason: String| {
        reasons.entry(&backup.label).or_insert(reason);
    };
    if let Some(count) = keep.keep_backups {
        let count = count.max(1) as usize;
        for backup in good.iter().rev().take(count) {
            because(backup, format!("among the {count} newest"));
        }
    }
    if let Some(span) = keep.keep_for {
        let cutoff = now.saturating_sub(SignedDuration::try_from(span).unwrap_or(SignedDuration::MAX));
        let cutoff = cutoff.unwrap_or(Timestamp::MIN);
        for backup in good.iter().filter(|backup| backup.stop_time.timestamp() >= cutoff) {
            because(backup, "within the time to keep".to_owned());
        }
        // The first moments of that time are reached from the newest backup before it, on every timeline that has any.
        for (timeline, wal) in &catalog.timelines {
            let is_recent = wal.newest_at.is_some_and(|at| at >= cutoff);
            let (Some(path), true) = (&wal.history, is_recent) else { continue };
            let before = |backup: &&&BackupInfo| {
                backup.stop_time.timestamp() < cutoff && path.contains(backup.consistent_position())
            };
            if let Some(backup) = good.iter().rev().find(before) {
                because(backup, format!("reaches the beginning of the time to keep on timeline {timeline}"));
            }
        }
    }
    if let Some(newest) = good.last() {
        because(newest, "the last backup".to_owned());
    }
    let path = catalog.newest_timeline().and_then(|timeline| catalog.history(timeline));
    let reaches = |backup: &&&BackupInfo| path.is_some_and(|path| path.contains(backup.consistent_position()));
    if let Some(backup) = good.iter().rev().find(reaches) {
        because(backup, "the last from which the newest timeline can be reached".to_owned());
    }
    reasons
}

impl Repository {
    /// What would go: lists all WAL with its indexes, and counts what the plan covers.
    ///
    /// # Errors
    /// As [`Repository::catalog`].
    pub async fn plan_expire(&self, keep: &Keep, now: Timestamp) -> Result<ExpirePlan, RepoError> {
        let catalog = self.catalog(CatalogScope::Everything).await?;
        let unfinished = self.unfinished_backups().await?;
        let mut plan = plan(&catalog, &unfinished, keep, now);
        if let Some(before) = plan.wal_before {
            for prefix in self.wal_prefixes(&catalog) {
                let mut doomed = std::pin::pin!(self.wal_before(prefix, &catalog, before));
                while let Some((_, size)) = doomed.try_next().await? {
                    plan.wal_objects += 1;
                    plan.wal_bytes += size;
                }
            }
        }
        if let Some(before) = plan.wal_before {
            for (_, size) in self.names_before_all(&catalog, before).await? {
                plan.wal_objects += 1;
                plan.wal_bytes += size;
            }
        }
        // An agent that was killed between two requests leaves one; a young one may be in use right now.
        let mut probes = std::pin::pin!(self.objects(self.layout().probes_folder(), None));
        while let Some(object) = probes.try_next().await? {
            let is_ours = self.layout().parse(&object.key, catalog.identity.segment_size) == Some(Object::Probe);
            if is_ours && now.duration_since(object.modified) > UNFINISHED_AGE_MIN {
                plan.probes.push(object.key);
            }
        }
        Ok(plan)
    }

    /// Deletes what the plan says: first the manifests, so that what is half deleted does not look like a backup. Stops
    /// between two objects when `cancel` is cancelled; what is left then is deleted by the next plan.
    ///
    /// # Errors
    /// Of the store; what was deleted stays deleted.
    pub async fn expire(
        &self,
        plan: &ExpirePlan,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<Expired, RepoError> {
        let mut expired = Expired::default();
        progress.begin("delete", Some(plan.bytes()));
        let manifests = plan.backups.iter().map(|backup| (self.layout().manifest(&backup.label), 0)).collect();
        self.delete_all(manifests, &mut expired, progress, cancel).await?;
        let labels = plan.backups.iter().map(|backup| &backup.label);
        for label in labels.chain(plan.unfinished.iter().map(|backup| &backup.label)) {
            progress.note(&format!("backup {label}"));
            // A backup that was interrupted a day ago and has a manifest now is one: look again before it goes.
            if self.backup_info(label).await?.is_some() {
                continue;
            }
            let folder = self.layout().backup_folder(label);
            let parts = self.objects(folder, None).map_ok(|object| (object.key, object.size));
            self.delete_stream(parts, &mut expired, progress, cancel).await?;
        }
        if let Some(before) = plan.wal_before {
            progress.note(&format!("WAL before {before}"));
            let catalog = self.catalog(CatalogScope::WithoutWal).await?;
            for prefix in self.wal_prefixes(&catalog) {
                let doomed = self.wal_before(prefix, &catalog, before);
                self.delete_stream(doomed, &mut expired, progress, cancel).await?;
            }
            let names = self.names_before_all(&catalog, before).await?;
            self.delete_all(names, &mut expired, progress, cancel).await?;
        }
        let gaps = plan.gaps.iter().map(|gap| (self.layout().gap(gap.timeline, gap.from, gap.to), 0)).collect();
        self.delete_all(gaps, &mut expired, progress, cancel).await?;
        let probes = plan.probes.iter().map(|key| (key.clone(), 0)).collect();
        self.delete_all(probes, &mut expired, progress, cancel).await?;
        progress.end();
        Ok(expired)
    }

    /// The folders that hold objects of WAL segments.
    fn wal_prefixes(&self, catalog: &Catalog) -> Vec<String> {
        let timelines: BTreeSet<TimelineId> = catalog.timelines.keys().copied().collect();
        let folders = |timeline| {
            let merged = Level::ALL.into_iter().map(move |level| self.layout().merged_folder(timeline, level));
            [self.layout().timeline_folder(timeline), self.layout().index_folder(timeline)].into_iter().chain(merged)
        };
        timelines.into_iter().flat_map(folders).collect()
    }

    /// Snapshots of names that no WAL from `before` on is read with: whoever reads it begins with the newest at or before
    /// the place, on its timeline's history; and where a timeline was left before that, with the newest before it was left.
    async fn names_before_all(&self, catalog: &Catalog, before: Lsn) -> Result<Vec<(String, u64)>, RepoError> {
        let size = catalog.identity.segment_size;
        let mut doomed = Vec::new();
        for timeline in catalog.timelines.keys() {
            let left = catalog.timelines.values().filter_map(|wal| wal.history.as_ref()?.end_of(*timeline));
            let bounds: BTreeSet<Lsn> = left.filter(|end| *end < before).chain([before]).collect();
            let mut snapshots = Vec::new();
            let mut listed = std::pin::pin!(self.objects(self.layout().names_folder(*timeline), None));
            while let Some(object) = listed.try_next().await? {
                if let Some(Object::Names(name)) = self.layout().parse(&object.key, size) {
                    snapshots.push((name.start(), object.key, object.size));
                }
            }
            let newest = |bound: &Lsn| snapshots.iter().map(|(start, ..)| *start).filter(|start| start <= bound).max();
            let needed: BTreeSet<Lsn> = bounds.iter().filter_map(newest).collect();
            let is_doomed = |start: &Lsn| *start < before && !needed.contains(start);
            doomed.extend(
                snapshots.iter().filter(|(start, ..)| is_doomed(start)).map(|(_, key, size)| (key.clone(), *size)),
            );
        }
        Ok(doomed)
    }

    /// Objects of segments, and of groups of segments, that end at or before `before`, oldest first.
    fn wal_before<'a>(
        &'a self,
        prefix: String,
        catalog: &'a Catalog,
        before: Lsn,
    ) -> impl stream::Stream<Item = Result<(String, u64), RepoError>> + 'a {
        let size = catalog.identity.segment_size;
        let end = move |key: &str| -> Option<Lsn> {
            match self.layout().parse(key, size)? {
                Object::Segment(segment) | Object::Tail { segment, .. } | Object::Index(segment) => Some(segment.end()),
                Object::Merged(group) => size.bytes().checked_mul(group.span().to).map(Lsn::new),
                _ => None,
            }
        };
        self.objects(prefix, None)
            .try_filter_map(move |object| async move { Ok(end(&object.key).map(|end| (end, object.key, object.size))) })
            // In the order of segments: nothing after the first that stays goes.
            .try_take_while(move |(end, ..)| std::future::ready(Ok(*end <= before)))
            .map_ok(|(_, key, size)| (key, size))
    }

    async fn delete_stream(
        &self,
        objects: impl stream::Stream<Item = Result<(String, u64), RepoError>>,
        expired: &mut Expired,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let mut batches = std::pin::pin!(objects.try_chunks(DELETE_BATCH));
        while let Some(batch) = batches.try_next().await.map_err(|error| error.1)? {
            self.delete_all(batch, expired, progress, cancel).await?;
        }
        Ok(())
    }

    pub(super) async fn delete_all(
        &self,
        objects: Vec<(String, u64)>,
        expired: &mut Expired,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let mut deletions = stream::iter(objects)
            .take_while(|_| std::future::ready(!cancel.is_cancelled()))
            .map(|(key, size)| async move { self.store().delete(&key).await.map(|()| size) })
            .buffered(DELETES_MAX);
        while let Some(size) = deletions.try_next().await? {
            expired.objects += 1;
            expired.bytes += size;
            progress.advance(size);
        }
        Ok(())
    }
}

/// Reads `30 days`; a day is 24 hours, and months, which have no fixed length, are refused.
fn span<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    use serde::Deserialize as _;
    let text = String::deserialize(deserializer)?;
    let refused =
        || serde::de::Error::custom(format!("{text:?} is no span of time; one looks like \"30 days\" or \"36h\""));
    let span: jiff::Span = text.trim().parse().map_err(|_| refused())?;
    let span = span.to_duration(jiff::SpanRelativeTo::days_are_24_hours()).map_err(|_| refused())?;
    Duration::try_from(span).map(Some).map_err(|_| refused())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::super::catalog::tests::{MIB, backup, catalog, history, tli};
    use super::super::cluster::ClusterIdentity;
    use super::super::store::MemoryStore;
    use super::*;
    use crate::pg::{PgTime, SegmentName, ServerVersion, SystemId, TimelineHistory};
    use crate::progress::Silent;
    use crate::proto;

    const DAY: i64 = 86_400;

    fn day(number: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + number * DAY).unwrap()
    }

    fn taken(label: &str, timeline: u32, start: u64, at: i64) -> BackupInfo {
        let time = PgTime::from(day(at));
        BackupInfo { start_time: time, stop_time: time, ..backup(label, timeline, start, start + 100) }
    }

    fn count(number: u32) -> Keep {
        Keep { keep_backups: Some(number), keep_for: None }
    }

    fn days(number: u64) -> Keep {
        Keep { keep_backups: None, keep_for: Some(Duration::from_secs(number * DAY as u64)) }
    }

    fn labels(plan: &ExpirePlan) -> (Vec<&str>, Vec<&str>) {
        let kept = plan.kept.iter().map(|kept| kept.label.as_str()).collect();
        (kept, plan.backups.iter().map(|backup| backup.label.as_str()).collect())
    }

    /// Ten segments of one timeline, a backup in every second of them, one a day.
    fn ten_days() -> Catalog {
        let segments: Vec<_> = (1..=20).map(|number| (1, number)).collect();
        let mut catalog = catalog(vec![TimelineHistory::root(tli(1))], &segments, &[]);
        catalog.backups = (0..10).map(|n| taken(&format!("day{n}"), 1, (2 * n + 1) * MIB + 7, n as i64)).collect();
        catalog.timelines.get_mut(&tli(1)).unwrap().newest_at = Some(day(10));
        catalog
    }

    #[test]
    fn the_newest_stay_with_the_wal_that_the_oldest_of_them_needs() {
        let plan = plan(&ten_days(), &[], &count(3), day(10));
        assert_eq!(labels(&plan).0, ["day7", "day8", "day9"]);
        assert_eq!(plan.wal_before, Some(Lsn::new(15 * MIB)));
    }

    #[test]
    fn every_moment_of_the_time_to_keep_stays_restorable() {
        // Day 6.5 lies between two backups: the one before it must stay.
        let now = day(10);
        let keep = Keep { keep_backups: None, keep_for: Some(Duration::from_secs(7 * DAY as u64 / 2)) };
        assert_eq!(labels(&plan(&ten_days(), &[], &keep, now)).0, ["day6", "day7", "day8", "day9"]);
        // With both, whatever either keeps.
        let both = Keep { keep_backups: Some(6), ..keep };
        assert_eq!(labels(&plan(&ten_days(), &[], &both, now)).0.len(), 6);
    }

    #[test]
    fn the_last_backup_stays_however_old_it_is() {
        for keep in [count(0), count(1), days(1)] {
            assert_eq!(labels(&plan(&ten_days(), &[], &keep, day(1000))).0, ["day9"]);
        }
    }

    #[test]
    fn on_one_timeline_positions_tell_which_backup_is_newer() {
        let mut catalog = ten_days();
        let times: Vec<_> = catalog.backups.iter().map(|backup| backup.stop_time).collect();
        catalog.backups[8].stop_time = times[9]; // the clock was set back between the two
        catalog.backups[9].stop_time = times[8];
        assert_eq!(labels(&plan(&catalog, &[], &count(1), day(10))).0, ["day9"]);
    }

    #[test]
    fn without_a_limit_everything_stays() {
        let plan = plan(&ten_days(), &[], &Keep::default(), day(10));
        assert!(plan.is_empty());
        assert_eq!(plan.kept.len(), 10);
    }

    #[test]
    fn a_backup_that_cannot_be_restored_does_not_count() {
        let mut catalog = ten_days();
        let hole = super::super::catalog::LsnRange { from: Lsn::new(19 * MIB), to: Lsn::new(20 * MIB) };
        catalog.timelines.get_mut(&tli(1)).unwrap().ranges.remove(hole);
        catalog.backups[8].bad_pages = 1;
        assert_eq!(labels(&plan(&catalog, &[], &count(1), day(10))).0, ["day7", "day8", "day9"]);
    }

    #[test]
    fn after_a_restore_to_an_earlier_moment_its_timeline_stays_reachable() {
        // Timeline 2 branches off on day 3; timeline 1 went on to day 9, at greater positions.
        let mut catalog = ten_days();
        let path = history(2, &format!("1\t0/{:X}\t\n", 8 * MIB));
        catalog.timelines.extend(super::super::catalog::tests::catalog(vec![path], &[(2, 8), (2, 9)], &[]).timelines);
        let plan = plan(&catalog, &[], &count(1), day(10));
        assert_eq!(labels(&plan).0, ["day3", "day9"]);
        assert_eq!(plan.wal_before, Some(Lsn::new(7 * MIB)));
    }

    #[test]
    fn nothing_goes_while_something_is_damaged_or_unknown() {
        let mut damaged = ten_days();
        damaged
            .damaged
            .push(super::super::catalog::Damage { key: "main/base/x/manifest".into(), problem: "bits".into() });
        let mut unknown = ten_days();
        unknown.timelines.insert(tli(2), super::super::catalog::TimelineBuilder::default().finish(None));
        for catalog in [damaged, unknown] {
            let plan = plan(&catalog, &[], &count(1), day(1000));
            assert!(plan.is_empty() && plan.wal_before.is_none());
            assert_eq!(plan.remarks.len(), 1);
        }
    }

    #[test]
    fn parts_without_a_manifest_go_after_a_day() {
        let parts =
            |label: &str, at| UnfinishedBackup { label: label.into(), objects: 1, stored_bytes: 1, newest_at: at };
        let unfinished = [parts("old", day(8)), parts("running", day(10))];
        let plan = plan(&ten_days(), &unfinished, &count(100), day(10));
        assert_eq!(plan.unfinished, [parts("old", day(8))]);
    }

    #[test]
    fn a_plan_reads_well() {
        let mut plan = plan(&ten_days(), &[], &count(9), day(10));
        plan.wal_objects = 2;
        let text = plan.to_string();
        assert!(text.starts_with("keep    backup day1: among the 9 newest\n"), "{text}");
        assert!(
            text.ends_with(
                "delete  backup day0 of 2023-11-14T22:13:20.000000Z\ndelete  WAL before 0/300000: 2 objects\n"
            ),
            "{text}"
        );
    }

    proptest! {
        /// What a kept backup could reach before, it reaches afterwards, on every timeline.
        #[test]
        fn what_a_kept_backup_needs_is_never_deleted(
            segments in proptest::collection::btree_set((1u32..4, 0u64..24), 20..60),
            switches in (0u64..24, 0u64..24),
            starts in proptest::collection::vec((1u32..4, 0u64..24 * MIB, 0i64..30, any::<bool>()), 1..8),
            keep_backups in proptest::option::of(0u32..5),
            keep_days in proptest::option::of(0u64..30),
        ) {
            let (first, second) = (switches.0.min(switches.1) * MIB + 5, switches.0.max(switches.1) * MIB + 9);
            let lsn = |at: u64| Lsn::new(at).to_string();
            let histories = vec![
                TimelineHistory::root(tli(1)),
                history(2, &format!("1\t{}\t\n", lsn(first))),
                history(3, &format!("1\t{}\t\n2\t{}\t\n", lsn(first), lsn(second))),
            ];
            let whole: Vec<_> = segments.into_iter().collect();
            let mut before = catalog(histories, &whole, &[]);
            before.backups = starts
                .into_iter()
                .enumerate()
                .map(|(n, (timeline, start, at, bad))| BackupInfo {
                    bad_pages: bad.into(),
                    ..taken(&format!("b{n}"), timeline, start, at)
                })
                .collect();
            let keep = Keep { keep_backups, keep_for: keep_days.map(|d| Duration::from_secs(d * DAY as u64)) };
            let plan = plan(&before, &[], &keep, day(30));

            let mut after = before.clone();
            after.backups.retain(|backup| !plan.backups.contains(backup));
            if let Some(limit) = plan.wal_before {
                for wal in after.timelines.values_mut() {
                    wal.ranges.remove(super::super::catalog::LsnRange { from: Lsn::ZERO, to: limit });
                }
            }
            prop_assert_eq!(after.backups.len() + plan.backups.len(), before.backups.len());
            prop_assert!(!after.backups.is_empty(), "the last backup never goes");
            for backup in &after.backups {
                for wal in before.timelines.values() {
                    let path = wal.history.as_ref().unwrap();
                    prop_assert_eq!(
                        after.contiguous_to(path, backup.start),
                        before.contiguous_to(path, backup.start)
                    );
                }
            }
            // As long as any good backup could reach the newest timeline, one still can.
            let reaches = |catalog: &Catalog| {
                let path = catalog.history(tli(3)).unwrap().clone();
                catalog.backups.iter().any(|b| is_good(catalog, b) && path.contains(b.consistent_position()))
            };
            prop_assert_eq!(reaches(&after), reaches(&before));
            prop_assert_eq!(after.backups.iter().any(|b| is_good(&after, b)), before.backups.iter().any(|b| is_good(&before, b)));
        }
    }

    /// Puts a backup of one part into a repository.
    async fn put_backup(repo: &Repository, label: &str, start: u64, at: i64) {
        use prost::Message as _;
        let manifest = proto::BackupManifest {
            format: 1,
            label: label.to_owned(),
            system_id: 7,
            server_version: 170_000,
            wal_segment_size: MIB as u32,
            timeline: 1,
            start_lsn: start,
            stop_lsn: start + 100,
            stop_time: PgTime::from(day(at)).micros(),
            ..Default::default()
        };
        let stored = super::super::frame::compress(&manifest.encode_to_vec(), 1);
        let part = repo.layout().part(label, super::super::layout::ArchiveName::Base, 1);
        repo.store().create(&part, "part".into()).await.unwrap();
        repo.store().create(&repo.layout().manifest(label), stored.into()).await.unwrap();
    }

    #[tokio::test]
    async fn expired_objects_are_gone_and_no_others() {
        let repo = Repository::over(Arc::new(MemoryStore::new()), "main").unwrap();
        let identity = ClusterIdentity {
            format: 1,
            system_id: SystemId::new(7),
            server_version: ServerVersion::new(170_000),
            segment_size: crate::pg::SegmentSize::new(MIB).unwrap(),
            created_at: day(0),
        };
        repo.initialize(&identity).await.unwrap();
        for number in 1..=9 {
            let name = SegmentName::at(tli(1), Lsn::new(number * MIB), identity.segment_size);
            repo.store().create(&repo.layout().segment(&name), "wal".into()).await.unwrap();
            repo.store().create(&repo.layout().index(&name), "index".into()).await.unwrap();
        }
        put_backup(&repo, "one", MIB + 10, 1).await;
        put_backup(&repo, "two", 5 * MIB + 10, 2).await;
        repo.put_history(tli(2), "1\t0/900000\t\n".into()).await.unwrap();

        let plan = repo.plan_expire(&count(1), day(3)).await.unwrap();
        assert_eq!((labels(&plan).1, plan.wal_objects, plan.wal_bytes), (vec!["one"], 8, 4 * 3 + 4 * 5));
        let expired = repo.expire(&plan, &Silent, &CancellationToken::new()).await.unwrap();
        assert_eq!(expired.objects, 8 + 2);

        let left: Vec<String> =
            repo.objects(String::new(), None).map_ok(|object| object.key).try_collect().await.unwrap();
        assert_eq!(left.iter().filter(|key| key.contains("/base/one/")).count(), 0, "{left:?}");
        assert_eq!(left.iter().filter(|key| key.contains("/base/two/")).count(), 2);
        assert!(left.contains(&"main/wal/00000002.history".to_owned()));
        let catalog = repo.catalog(CatalogScope::Everything).await.unwrap();
        assert_eq!(catalog.timelines[&tli(1)].ranges.as_slice()[0].from, Lsn::new(5 * MIB));
        assert!(repo.plan_expire(&count(1), day(3)).await.unwrap().is_empty(), "nothing is left to do");
    }

    #[tokio::test]
    async fn merged_indexes_go_with_the_last_segment_that_they_tell_of_and_probes_when_they_are_old() {
        use super::super::index::{Group, Level};
        let repo = Repository::over(Arc::new(MemoryStore::new()), "main").unwrap();
        let identity = super::super::tests::identity();
        repo.initialize(&identity).await.unwrap();
        put_backup(&repo, "one", 20 * MIB + 10, 1).await;
        put_backup(&repo, "two", 40 * MIB + 10, 2).await;
        let name = |number: u64| SegmentName::at(tli(1), Lsn::new(number * MIB), identity.segment_size);
        for number in 20..60 {
            repo.store().create(&repo.layout().segment(&name(number)), "wal".into()).await.unwrap();
        }
        let groups: Vec<Group> = [(20, Level::ALL[0]), (32, Level::ALL[0]), (48, Level::ALL[0]), (20, Level::ALL[1])]
            .map(|(number, level)| Group::of(&name(number), level))
            .into();
        for group in &groups {
            repo.store().create(&repo.layout().merged(group), "merged".into()).await.unwrap();
        }
        repo.store().create(&repo.layout().probe("0123"), "left".into()).await.unwrap();
        // Timeline 2 branched off at 25 MiB, timeline 3 at 50 MiB, where the newest backup still leads to.
        repo.put_history(tli(2), format!("1\t{}\t\n", Lsn::new(25 * MIB)).into()).await.unwrap();
        repo.put_history(tli(3), format!("1\t{}\t\n", Lsn::new(50 * MIB)).into()).await.unwrap();
        for number in [20, 22, 24, 28, 36, 44] {
            repo.store().create(&repo.layout().names(&name(number)), "names".into()).await.unwrap();
        }

        let now = Timestamp::now() + SignedDuration::from_hours(1);
        let plan = repo.plan_expire(&count(1), now).await.unwrap();
        assert_eq!(plan.probes, [] as [String; 0], "an agent may be at it right now");
        let plan = repo.plan_expire(&count(1), now + SignedDuration::from_hours(48)).await.unwrap();
        assert_eq!(plan.wal_objects, 20 + 1 + 3);
        assert_eq!(plan.probes, ["main/probe/0123"]);
        let expired = repo.expire(&plan, &Silent, &CancellationToken::new()).await.unwrap();
        assert_eq!(expired.objects, 20 + 1 + 3 + 2 + 1);
        let left: Vec<u64> = repo
            .names_segments(&TimelineHistory::root(tli(1)), identity.segment_size)
            .await
            .unwrap()
            .iter()
            .map(|name| name.number.get())
            .collect();
        assert_eq!(left, [24, 36, 44], "the newest before the oldest WAL, and before the switch");
        for (group, is_left) in groups.iter().zip([false, true, true, true]) {
            let found = repo.store().read(&repo.layout().merged(group), None).await;
            assert_eq!(found.is_ok(), is_left, "{group:?}");
        }
    }

    #[test]
    fn the_settings_are_read_as_people_write_them() {
        let keep: Keep = toml::from_str("keep_backups = 7\nkeep_for = \"30 days\"").unwrap();
        assert_eq!(keep, Keep { keep_backups: Some(7), ..days(30) });
        for bad in ["keep_for = \"1 month\"", "keep_for = 30", "keep_for = \"-1 day\"", "keep_days = 3"] {
            assert!(toml::from_str::<Keep>(bad).is_err(), "{bad}");
        }
    }
}
