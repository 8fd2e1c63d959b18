//! Proof that what is kept is whole: every object is read and checked, and what is wrong is named together with the
//! moments that it makes unreachable.
//!
//! What was proved is written into the repository (`verify/<time>.json`), so that the next run can look at what is new
//! only.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::backup::BackupError;
use super::backup::manifest::{self, FrameAt};
use super::backup::reader::{Reader, Unpacker};
use super::catalog::{Catalog, CatalogScope, Damage, LsnRange, LsnRanges};
use super::cluster::{ClusterIdentity, FORMAT};
use super::frame;
use super::gap::Gap;
use super::index::Level;
use super::index::survey::Survey;
use super::layout::{ArchiveName, Layout, Object};
use super::store::{Created, ObjectInfo};
use super::{RepoError, Repository};
use crate::decode::{PageHeader, Source, WalMajor};
use crate::pg::{Lsn, PgTime, SegmentName, TimelineId};
use crate::progress::Progress;
use crate::proto;

/// Objects read at once unless the caller says otherwise. A segment or part of 16 MiB and its decompression cost at most
/// 25 MiB, so four stay within 100 MiB, and hide the latency of a store.
pub const JOBS_DEFAULT: usize = 4;

/// Problems listed by name; a repository with more is lost anyhow, and the report must stay readable.
const PROBLEMS_MAX: usize = 1000;

/// Files of a damaged part that are named.
const FILES_MAX: usize = 10;

/// Content is looked at in pieces of this size.
const PIECE_BYTES: usize = 256 << 10;

/// How a verification goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Leave out what the last verification, and those that it built on, found whole.
    pub only_new: bool,
    /// Objects read at once, at least 1.
    pub jobs: usize,
}

/// What a verification found.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verification {
    /// The format of this record: 1.
    pub format: u32,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// It left out what earlier ones had found whole.
    pub only_new: bool,
    /// False if it was stopped before its end: then only what it looked at is told.
    pub complete: bool,
    /// What was read.
    pub checked: Checked,
    /// What is wrong, the first thousand.
    pub problems: Vec<Problem>,
    /// How much is wrong in all.
    pub problems_total: u64,
    /// WAL that is missing and known to be, which is no news.
    pub gaps: Vec<Gap>,
    /// What is known to be whole, from this verification and those that it built on.
    pub verified: Verified,
}

/// How much was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Checked {
    /// Whole WAL segments.
    pub segments: u64,
    /// Tails of segments.
    pub tails: u64,
    /// Base backups.
    pub backups: u64,
    /// Parts of base backups.
    pub parts: u64,
    /// Indexes of segments, and merged ones.
    #[serde(default)]
    pub indexes: u64,
    /// Stored bytes.
    pub bytes: u64,
}

/// What was found whole.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Verified {
    /// Whole segments, by timeline.
    pub wal: BTreeMap<TimelineId, LsnRanges>,
    /// Labels of base backups.
    pub backups: BTreeSet<String>,
}

/// Something wrong, and what follows from it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Problem {
    /// What kind it is.
    pub kind: ProblemKind,
    /// The object; `None` where one is missing.
    pub key: Option<String>,
    /// What is wrong, for people.
    pub problem: String,
    /// Base backups that cannot be restored because of it.
    pub backups: Vec<String>,
    /// Positions that cannot be restored because of it alone.
    pub unreachable: Vec<Unreachable>,
    /// Files of the base backup that are touched, the first few.
    pub files: Vec<String>,
}

/// What kind of problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ProblemKind {
    /// An object is there and does not hold what it must.
    Damaged,
    /// WAL, or changes of a database, between a backup and the end of its timeline are not there, and no gap was recorded.
    MissingWal,
    /// An object is not there that another one names.
    MissingObject,
}

/// Positions `[from, to)` of a timeline that cannot be restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Unreachable {
    /// The timeline.
    pub timeline: TimelineId,
    /// The first position.
    pub from: Lsn,
    /// The position after the last.
    pub to: Lsn,
    /// When the first transaction in it ended, where an index was asked and knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_time: Option<PgTime>,
    /// When the last one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_time: Option<PgTime>,
}

impl Verification {
    /// True if nothing is wrong, as far as it looked.
    pub const fn is_clean(&self) -> bool {
        self.problems_total == 0
    }
}

/// One object to check.
#[derive(Debug)]
enum Task {
    Segment { name: SegmentName, object: ObjectInfo },
    Tail { name: SegmentName, from: u32, to: u32, object: ObjectInfo },
}

/// What became of a check.
#[derive(Debug)]
enum Verdict {
    Whole,
    /// It was listed, and is not there any more.
    Gone,
    Damaged(String),
}

/// What became of the index of a segment that is whole.
#[derive(Debug)]
enum IndexVerdict {
    /// There is none, which is no damage.
    Absent,
    Agrees,
    Wrong(String),
}

impl Repository {
    /// The record of the last verification, if there is one that can be read.
    ///
    /// # Errors
    /// Of the store.
    pub async fn last_verification(&self) -> Result<Option<Verification>, RepoError> {
        let records: Vec<ObjectInfo> = self.objects(self.layout().verifications_folder(), None).try_collect().await?;
        for record in records.iter().rev() {
            let Ok(json) = self.store().read(&record.key, None).await else { continue };
            match serde_json::from_slice::<Verification>(&json) {
                Ok(mut verification) if verification.format == FORMAT => {
                    // The ranges are only as well-formed as whoever wrote them.
                    for ranges in verification.verified.wal.values_mut() {
                        let mut sorted = LsnRanges::default();
                        ranges.as_slice().iter().for_each(|range| sorted.insert(*range));
                        *ranges = sorted;
                    }
                    return Ok(Some(verification));
                }
                Ok(_) => {}
                Err(error) => tracing::warn!(record.key, "a record of a verification cannot be read: {error}"),
            }
        }
        Ok(None)
    }

    /// Checks what is kept, and writes down what it found. Stops early, with `complete` false, when `cancel` is
    /// cancelled.
    ///
    /// # Errors
    /// [`RepoError::NotInitialized`]; of the store. Damage is no error: it is what the report is about.
    pub async fn verify(
        &self,
        options: Options,
        now: Timestamp,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<Verification, RepoError> {
        let catalog = self.catalog(CatalogScope::Everything).await?;
        let previous = if options.only_new { self.last_verification().await? } else { None };
        let mut run = Run {
            repo: self,
            jobs: options.jobs.max(1),
            known: previous.map(|previous| previous.verified).unwrap_or_default(),
            verified: Verified::default(),
            checked: Checked::default(),
            findings: Vec::new(),
            progress,
            cancel,
        };
        run.note_damaged(&catalog);
        run.check_wal(&catalog).await?;
        run.check_backups(&catalog).await?;
        run.check_coverage(&catalog);
        let Run { verified, checked, findings, .. } = run;
        let problems_total = findings.len() as u64;
        let verification = Verification {
            format: FORMAT,
            started_at: now,
            finished_at: Timestamp::now().max(now),
            only_new: options.only_new,
            complete: !cancel.is_cancelled(),
            checked,
            problems: findings.into_iter().take(PROBLEMS_MAX).map(|finding| finding.explain(&catalog)).collect(),
            problems_total,
            gaps: catalog.gaps,
            verified,
        };
        self.put_verification(&verification).await?;
        Ok(verification)
    }

    async fn put_verification(&self, verification: &Verification) -> Result<(), RepoError> {
        let json = Bytes::from(serde_json::to_vec_pretty(verification).expect("a verification becomes JSON"));
        // Keys have whole seconds: two verifications that began in the same one stand beside each other.
        for second in 0..60 {
            let at = verification.started_at.saturating_add(SignedDuration::from_secs(second));
            let key = self.layout().verification(at.unwrap_or(verification.started_at));
            if self.store().create(&key, json.clone()).await? == Created::New {
                return Ok(());
            }
        }
        Ok(())
    }
}

/// A problem before it is known what follows from it.
#[derive(Debug)]
struct Finding {
    kind: ProblemKind,
    key: Option<String>,
    problem: String,
    /// WAL that cannot be used because of it.
    wal: Option<(TimelineId, LsnRange)>,
    /// The backup that cannot be used because of it.
    backup: Option<String>,
    files: Vec<String>,
}

struct Run<'a> {
    repo: &'a Repository,
    jobs: usize,
    known: Verified,
    verified: Verified,
    checked: Checked,
    findings: Vec<Finding>,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
}

impl Run<'_> {
    fn find(&mut self, kind: ProblemKind, key: &str, problem: String) -> &mut Finding {
        let key = Some(key.to_owned());
        self.findings.push(Finding { kind, key, problem, wal: None, backup: None, files: Vec::new() });
        self.findings.last_mut().expect("it was just put there")
    }

    /// What the catalog could not read.
    fn note_damaged(&mut self, catalog: &Catalog) {
        let layout = self.repo.layout();
        self.findings.extend(catalog.damaged.iter().map(|damage| unreadable(layout, catalog, damage)));
    }

    async fn check_wal(&mut self, catalog: &Catalog) -> Result<(), RepoError> {
        let stored: u64 = catalog.timelines.values().map(|wal| wal.stored_bytes).sum();
        self.progress.begin("verify WAL", self.known.wal.is_empty().then_some(stored));
        let mut gone = Vec::new();
        for timeline in catalog.timelines.keys() {
            let (repo, identity, known) = (self.repo, &catalog.identity, self.known.wal.get(timeline).cloned());
            let known = known.unwrap_or_default();
            for range in known.as_slice() {
                self.verified.wal.entry(*timeline).or_default().insert(*range);
            }
            let listed = repo.objects(repo.layout().timeline_folder(*timeline), None);
            let mut checks = std::pin::pin!(
                listed
                    .try_filter_map(|object| {
                        std::future::ready(Ok(task(repo, identity, object).filter(|task| !is_known(task, &known))))
                    })
                    .take_while(|_| std::future::ready(!self.cancel.is_cancelled()))
                    .map_ok(|task| async move {
                        let (verdict, index) = check_wal_object(repo, identity, &task).await?;
                        Ok::<_, RepoError>((task, verdict, index))
                    })
                    .try_buffer_unordered(self.jobs)
            );
            let mut found = Vec::new();
            let mut wrong = Vec::new();
            while let Some((task, verdict, index)) = checks.try_next().await? {
                match (&task, index) {
                    (_, IndexVerdict::Absent) | (Task::Tail { .. }, _) => {}
                    (_, IndexVerdict::Agrees) => self.checked.indexes += 1,
                    (Task::Segment { name, .. }, IndexVerdict::Wrong(problem)) => {
                        self.checked.indexes += 1;
                        wrong.push((self.repo.layout().index(name), problem));
                    }
                }
                self.progress.advance(task.object().size);
                self.checked.bytes += task.object().size;
                let range = task.range();
                match (&task, verdict) {
                    (Task::Segment { .. }, Verdict::Whole) => {
                        self.checked.segments += 1;
                        self.verified.wal.entry(*timeline).or_default().insert(range);
                    }
                    (Task::Tail { .. }, Verdict::Whole) => self.checked.tails += 1,
                    // The whole segment has replaced it.
                    (Task::Tail { .. }, Verdict::Gone) => {}
                    (Task::Segment { name, object }, Verdict::Gone) => gone.push((*name, object.key.clone())),
                    (_, Verdict::Damaged(problem)) => found.push((task.object().key.clone(), problem, range)),
                }
            }
            for (key, problem, range) in found {
                self.find(ProblemKind::Damaged, &key, problem).wal = Some((*timeline, range));
            }
            // Indexes are derived: no moment becomes unreachable by them.
            for (key, problem) in wrong {
                self.find(ProblemKind::Damaged, &key, problem);
            }
            self.check_merged(*timeline, identity).await?;
        }
        // An expiry may have run beside us; what backups still need must not have gone with it.
        if !gone.is_empty() {
            let backups = self.repo.catalog(CatalogScope::WithoutWal).await?.backups;
            let needed_from = backups.iter().map(|backup| backup.start).min();
            for (name, key) in gone {
                if needed_from.is_some_and(|from| name.end() > from) {
                    let problem = "was there a moment ago and is gone".to_owned();
                    let range = LsnRange { from: name.start(), to: name.end() };
                    self.find(ProblemKind::MissingObject, &key, problem).wal = Some((name.timeline, range));
                }
            }
        }
        self.progress.end();
        Ok(())
    }

    /// Reads the merged indexes of a timeline. They are few.
    async fn check_merged(&mut self, timeline: TimelineId, identity: &ClusterIdentity) -> Result<(), RepoError> {
        let repo = self.repo;
        for level in Level::ALL {
            let listed = repo.objects(repo.layout().merged_folder(timeline, level), None);
            let mut checks = std::pin::pin!(
                listed
                    .try_filter_map(|object| {
                        std::future::ready(Ok(match repo.layout().parse(&object.key, identity.segment_size) {
                            Some(Object::Merged(group)) => Some((group, object)),
                            _ => None,
                        }))
                    })
                    .take_while(|_| std::future::ready(!self.cancel.is_cancelled()))
                    .map_ok(|(group, object)| async move {
                        match repo.merged_index(&group).await {
                            Ok(_) => Ok((object, None)),
                            Err(RepoError::Damaged { problem, .. }) => Ok((object, Some(problem))),
                            Err(error) => Err(error),
                        }
                    })
                    .try_buffer_unordered(self.jobs)
            );
            let mut wrong = Vec::new();
            while let Some((object, problem)) = checks.try_next().await? {
                self.checked.indexes += 1;
                self.checked.bytes += object.size;
                wrong.extend(problem.map(|problem| (object.key, problem)));
            }
            for (key, problem) in wrong {
                let problem = format!("{problem}; `walguard index rebuild --check` makes it anew");
                self.find(ProblemKind::Damaged, &key, problem);
            }
        }
        Ok(())
    }

    async fn check_backups(&mut self, catalog: &Catalog) -> Result<(), RepoError> {
        let (done, todo): (Vec<_>, Vec<_>) =
            catalog.backups.iter().partition(|backup| self.known.backups.contains(&backup.label));
        self.verified.backups.extend(done.into_iter().map(|backup| backup.label.clone()));
        self.progress.begin("verify backups", Some(todo.iter().map(|backup| backup.stored_bytes).sum()));
        for backup in todo {
            if self.cancel.is_cancelled() {
                break;
            }
            self.progress.note(&format!("backup {}", backup.label));
            let problems_before = self.findings.len();
            self.check_backup(&backup.label).await?;
            if !self.cancel.is_cancelled() {
                self.checked.backups += 1;
                if self.findings.len() == problems_before {
                    self.verified.backups.insert(backup.label.clone());
                }
            }
        }
        self.progress.end();
        Ok(())
    }

    async fn check_backup(&mut self, label: &str) -> Result<(), RepoError> {
        let manifest = match manifest::read(self.repo, label).await {
            Ok(manifest) => manifest,
            Err(BackupError::Damaged { key, problem }) => {
                self.find(ProblemKind::Damaged, &key, problem).backup = Some(label.to_owned());
                return Ok(());
            }
            Err(BackupError::NoBackup(_)) => return Ok(()), // expired meanwhile
            Err(BackupError::Repo(error)) => return Err(error),
            Err(other) => {
                let key = self.repo.layout().manifest(label);
                self.find(ProblemKind::Damaged, &key, other.to_string()).backup = Some(label.to_owned());
                return Ok(());
            }
        };
        self.check_postgres_manifest(label, &manifest).await?;
        for archive in &manifest.archives {
            let Some(name) = ArchiveName::parse(&archive.name) else { continue }; // `manifest::read` refuses others
            let frames: Vec<FrameAt> = match Reader::new(self.repo, label, archive) {
                Ok(reader) => reader.frames().to_vec(),
                Err(_) => continue,
            };
            let by_part: Vec<Vec<FrameAt>> =
                frames.chunk_by(|a, b| a.part == b.part).map(<[FrameAt]>::to_vec).collect();
            let repo = self.repo;
            let mut checks = stream::iter(by_part)
                .take_while(|_| std::future::ready(!self.cancel.is_cancelled()))
                .map(|frames| async move {
                    let number = frames.first().map_or(1, |frame| frame.part);
                    let key = repo.layout().part(label, name, number);
                    let (size, faults) = check_part(repo, &key, frames).await?;
                    Ok::<_, RepoError>((key, size, faults))
                })
                .buffer_unordered(self.jobs);
            let mut found = Vec::new();
            while let Some((key, size, faults)) = checks.try_next().await? {
                self.progress.advance(size);
                self.checked.bytes += size;
                self.checked.parts += 1;
                found.extend(faults.into_iter().map(|fault| (key.clone(), fault)));
            }
            for (key, fault) in found {
                let files = fault.range.map(|range| files_in(archive, range)).unwrap_or_default();
                let finding = self.find(fault.kind, &key, fault.problem);
                finding.backup = Some(label.to_owned());
                finding.files = files;
            }
        }
        Ok(())
    }

    async fn check_postgres_manifest(
        &mut self,
        label: &str,
        manifest: &proto::BackupManifest,
    ) -> Result<(), RepoError> {
        if manifest.postgres_manifest_blake3.is_empty() {
            return Ok(()); // the server was asked for none
        }
        let key = self.repo.layout().postgres_manifest(label);
        let (kind, problem) = match self.repo.store().read(&key, None).await {
            Ok(stored) => {
                self.checked.bytes += stored.len() as u64;
                let length = usize::try_from(manifest.postgres_manifest_bytes).unwrap_or(usize::MAX);
                let hash = manifest.postgres_manifest_blake3.clone();
                let problem = blocking(move || match frame::decompress(&stored, length) {
                    Err(error) => Some(error.to_string()),
                    Ok(content) if content.len() != length => {
                        Some(format!("holds {} of {length} bytes", content.len()))
                    }
                    Ok(content) if blake3::hash(&content).as_bytes() != hash.as_slice() => {
                        Some("its content has another BLAKE3 than was written".to_owned())
                    }
                    Ok(_) => None,
                })
                .await;
                (ProblemKind::Damaged, problem)
            }
            Err(error) if error.is_not_found() => {
                (ProblemKind::MissingObject, Some("the backup's manifest names it, and it is not there".to_owned()))
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(problem) = problem {
            // The data can be restored without it; what is lost is the server's own proof.
            self.find(kind, &key, problem);
        }
        Ok(())
    }

    /// WAL that should be there and is not.
    fn check_coverage(&mut self, catalog: &Catalog) {
        self.findings.extend(uncovered(self.repo.layout(), catalog));
    }
}

/// What a listing shows without any segment or part being read: histories, manifests and gaps that cannot be read, and
/// WAL behind the oldest backup that should be there and is not, in so far as no gap is recorded.
pub fn apparent(layout: &Layout, catalog: &Catalog) -> Vec<Problem> {
    let mut findings: Vec<_> = catalog.damaged.iter().map(|damage| unreadable(layout, catalog, damage)).collect();
    findings.extend(uncovered(layout, catalog));
    findings.into_iter().map(|finding| finding.explain(catalog)).collect()
}

/// A problem with what follows from it, for whoever came upon it: WAL that cannot be used because of it, and the backup
/// that cannot.
pub fn explain(
    catalog: &Catalog,
    kind: ProblemKind,
    (key, problem): (Option<String>, String),
    wal: Option<(TimelineId, LsnRange)>,
    backup: Option<String>,
) -> Problem {
    Finding { kind, key, problem, wal, backup, files: Vec::new() }.explain(catalog)
}

/// What the catalog could not read.
fn unreadable(layout: &Layout, catalog: &Catalog, damage: &Damage) -> Finding {
    let (mut wal, mut backup) = (None, None);
    match layout.parse(&damage.key, catalog.identity.segment_size) {
        Some(Object::Manifest { label }) => backup = Some(label),
        Some(Object::History(timeline)) => {
            let held = catalog.timelines.get(&timeline).map(|wal| wal.ranges.as_slice());
            let all = held.and_then(|held| Some(LsnRange { from: held.first()?.from, to: held.last()?.to }));
            wal = all.map(|all| (timeline, all));
        }
        _ => {}
    }
    let (key, problem) = (Some(damage.key.clone()), damage.problem.clone());
    Finding { kind: ProblemKind::Damaged, key, problem, wal, backup, files: Vec::new() }
}

/// WAL that should be there and is not.
fn uncovered(layout: &Layout, catalog: &Catalog) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (timeline, wal) in &catalog.timelines {
        let begin = wal.history.as_ref().and_then(|path| path.begin_of(*timeline)).unwrap_or(Lsn::ZERO);
        if wal.history.is_none() && !wal.ranges.is_empty() {
            let key = layout.history(*timeline);
            if !catalog.damaged.iter().any(|damage| damage.key == key) {
                let held = wal.ranges.as_slice();
                let all = held.first().zip(held.last()).map(|(a, b)| LsnRange { from: a.from, to: b.to });
                findings.push(Finding {
                    kind: ProblemKind::MissingObject,
                    key: Some(key),
                    problem: "the timeline's history is not there, so its WAL leads nowhere".to_owned(),
                    wal: all.map(|all| (*timeline, all)),
                    backup: None,
                    files: Vec::new(),
                });
            }
        }
        let Some(path) = &wal.history else { continue };
        let Some(oldest) = catalog.backups_on(path).map(|backup| backup.start).min() else { continue };
        let needed = oldest.max(begin);
        let Some(end) = wal.ranges.end() else { continue };
        let mut at = needed;
        while at < end {
            let reached = catalog.contiguous_to(path, at);
            if reached >= end {
                break;
            }
            let next = wal.ranges.as_slice().iter().map(|range| range.from).find(|from| *from > reached);
            let to = next.unwrap_or(end);
            let hole = LsnRange { from: reached, to };
            let is_recorded =
                catalog.gaps.iter().any(|gap| gap.timeline == *timeline && gap.from <= hole.from && gap.to >= hole.to);
            if !is_recorded {
                let problem = format!("WAL of timeline {timeline} is missing from {} to {}", hole.from, hole.to);
                findings.push(Finding {
                    kind: ProblemKind::MissingWal,
                    key: None,
                    problem,
                    wal: Some((*timeline, hole)),
                    backup: None,
                    files: Vec::new(),
                });
            }
            at = to;
        }
    }
    findings
}

impl Task {
    fn object(&self) -> &ObjectInfo {
        match self {
            Self::Segment { object, .. } | Self::Tail { object, .. } => object,
        }
    }

    fn range(&self) -> LsnRange {
        match self {
            Self::Segment { name, .. } => LsnRange { from: name.start(), to: name.end() },
            Self::Tail { name, from, to, .. } => {
                LsnRange { from: name.start() + u64::from(*from), to: name.start() + u64::from(*to) }
            }
        }
    }
}

fn task(repo: &Repository, identity: &ClusterIdentity, object: ObjectInfo) -> Option<Task> {
    match repo.layout().parse(&object.key, identity.segment_size)? {
        Object::Segment(name) => Some(Task::Segment { name, object }),
        Object::Tail { segment: name, from, to } => Some(Task::Tail { name, from, to, object }),
        _ => None,
    }
}

fn is_known(task: &Task, known: &LsnRanges) -> bool {
    matches!(task, Task::Segment { .. }) && known.contains(task.range())
}

async fn check_wal_object(
    repo: &Repository,
    identity: &ClusterIdentity,
    task: &Task,
) -> Result<(Verdict, IndexVerdict), RepoError> {
    let stored = match repo.store().read(&task.object().key, None).await {
        Ok(stored) => stored,
        Err(error) if error.is_not_found() => return Ok((Verdict::Gone, IndexVerdict::Absent)),
        Err(error) => return Err(error.into()),
    };
    let index = match task {
        Task::Tail { .. } => Ok(None),
        Task::Segment { name, .. } => match repo.index(name).await {
            Ok(index) => Ok(index.map(|index| (*name, index))),
            Err(RepoError::Damaged { problem, .. }) => {
                Err(format!("{problem}; `walguard index rebuild --check` makes it anew"))
            }
            Err(error) => return Err(error),
        },
    };
    let (range, timeline) = match task {
        Task::Segment { name, .. } | Task::Tail { name, .. } => (task.range(), name.timeline),
    };
    let identity = identity.clone();
    Ok(blocking(move || {
        // Records are read only where an index says what they should be.
        let source = WalMajor::of_server(identity.server_version).map(|major| Source {
            major,
            segment_size: identity.segment_size,
            system_id: Some(identity.system_id),
        });
        let indexed = index.as_ref().ok().and_then(Option::as_ref);
        let mut survey = indexed.zip(source).map(|((name, _), source)| Survey::new(source, *name));
        let verdict = match check_wal_bytes(&stored, range, timeline, &identity, survey.as_mut()) {
            Ok(()) => Verdict::Whole,
            Err(problem) => return (Verdict::Damaged(problem), IndexVerdict::Absent),
        };
        let index = match (&index, survey) {
            (Err(problem), _) => IndexVerdict::Wrong(problem.clone()),
            (Ok(Some((_, index))), Some(survey)) => match survey.contradiction(index) {
                Some(problem) => {
                    IndexVerdict::Wrong(format!("{problem}; `walguard index rebuild --all` makes it anew"))
                }
                None => IndexVerdict::Agrees,
            },
            _ => IndexVerdict::Absent,
        };
        (verdict, index)
    })
    .await)
}

/// Checks that `stored` holds exactly the WAL `range`: it decompresses, has the right length, and its first page (if the
/// range begins with one) is the one that belongs there.
fn check_wal_bytes(
    stored: &[u8],
    range: LsnRange,
    timeline: TimelineId,
    identity: &ClusterIdentity,
    mut survey: Option<&mut Survey>,
) -> Result<(), String> {
    let expected = range.to - range.from;
    let mut content = frame::reader(stored).map_err(|error| error.to_string())?;
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    let mut total = 0;
    loop {
        piece.clear();
        let count = content.by_ref().take(PIECE_BYTES as u64).read_to_end(&mut piece);
        let count = count.map_err(|error| format!("not a whole zstd frame: {error}"))? as u64;
        if count == 0 {
            break;
        }
        if total == 0 && identity.segment_size.offset_of(range.from) == 0 {
            check_first_page(&piece, range.from, timeline, identity)?;
        }
        total += count;
        if total > expected {
            return Err(format!("holds more than the {expected} bytes that it should"));
        }
        if let Some(survey) = &mut survey {
            survey.push(&piece);
        }
    }
    if total == expected { Ok(()) } else { Err(format!("holds {total} bytes instead of {expected}")) }
}

fn check_first_page(content: &[u8], at: Lsn, timeline: TimelineId, identity: &ClusterIdentity) -> Result<(), String> {
    let Some(major) = WalMajor::of_server(identity.server_version) else {
        return Ok(()); // a major that we cannot read yet; its bytes are whole, and that is what we can say
    };
    match PageHeader::read(content, at, major, identity.segment_size, Some(identity.system_id)) {
        // The copy of a segment that a promoted server makes keeps its ancestors' ids.
        Ok(Some(header)) if header.timeline <= timeline => Ok(()),
        Ok(Some(header)) => Err(format!("its first page is of timeline {}", header.timeline)),
        Ok(None) => Ok(()), // a tail shorter than a header
        Err(error) => Err(error.to_string()),
    }
}

/// Something wrong with a part.
struct PartFault {
    kind: ProblemKind,
    problem: String,
    /// Bytes of the tar that are touched.
    range: Option<std::ops::Range<u64>>,
}

/// Checks the frames of one part. Answers its stored size, too.
async fn check_part(repo: &Repository, key: &str, frames: Vec<FrameAt>) -> Result<(u64, Vec<PartFault>), RepoError> {
    let whole = frames
        .first()
        .zip(frames.last())
        .map(|(first, last)| first.content_offset..last.content_offset + u64::from(last.content_length));
    let stored = match repo.store().read(key, None).await {
        Ok(stored) => stored,
        Err(error) if error.is_not_found() => {
            let problem = "the backup's manifest names it, and it is not there".to_owned();
            return Ok((0, vec![PartFault { kind: ProblemKind::MissingObject, problem, range: whole }]));
        }
        Err(error) => return Err(error.into()),
    };
    let (size, key) = (stored.len() as u64, key.to_owned());
    let faults = blocking(move || {
        let fault = |problem, range| PartFault { kind: ProblemKind::Damaged, problem, range };
        let expected: u64 = frames.iter().map(|frame| u64::from(frame.stored_length)).sum();
        if expected != size {
            return vec![fault(format!("has {size} bytes instead of {expected}"), whole)];
        }
        let mut unpacker = match Unpacker::new() {
            Ok(unpacker) => unpacker,
            Err(error) => return vec![fault(error.to_string(), whole)],
        };
        let (mut content, mut faults) = (Vec::new(), Vec::new());
        for frame in &frames {
            let at = usize::try_from(frame.stored_offset).unwrap_or(usize::MAX);
            let place = at..at.saturating_add(frame.stored_length as usize);
            let bytes = stored.get(place).unwrap_or_default();
            if let Err(error) = unpacker.unpack(&key, bytes, frame, &mut content) {
                let problem = match error {
                    BackupError::Damaged { problem, .. } => problem,
                    other => other.to_string(),
                };
                let begin = frame.content_offset;
                faults.push(fault(problem, Some(begin..begin + u64::from(frame.content_length))));
            }
        }
        faults
    })
    .await;
    Ok((size, faults))
}

/// The files of an archive that lie in a range of its tar, the first few.
fn files_in(archive: &proto::Archive, range: std::ops::Range<u64>) -> Vec<String> {
    archive
        .entries
        .iter()
        .filter(|entry| entry.offset < range.end && entry.offset.saturating_add(entry.size) > range.start)
        .take(FILES_MAX)
        .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
        .collect()
}

impl Finding {
    /// Works out what cannot be restored because of it: what could be with it mended, less what can be with it there.
    fn explain(self, catalog: &Catalog) -> Problem {
        let (mut mended, mut broken) = (catalog.clone(), catalog.clone());
        if let Some((timeline, range)) = &self.wal {
            if let Some(wal) = broken.timelines.get_mut(timeline) {
                wal.ranges.remove(*range);
            }
            if let Some(wal) = mended.timelines.get_mut(timeline) {
                wal.ranges.insert(*range);
            }
        }
        if let Some(label) = &self.backup {
            broken.backups.retain(|backup| backup.label != *label);
        }
        let reachable = |catalog: &Catalog| {
            let mut positions: BTreeMap<TimelineId, LsnRanges> = BTreeMap::new();
            for window in catalog.windows() {
                positions.entry(window.timeline).or_default().insert(LsnRange { from: window.from, to: window.to });
            }
            positions
        };
        let usable = |catalog: &Catalog| -> BTreeSet<String> {
            catalog.windows().into_iter().flat_map(|window| window.backups).collect()
        };
        let mut lost = reachable(&mended);
        for (timeline, still) in reachable(&broken) {
            let Some(ranges) = lost.get_mut(&timeline) else { continue };
            still.as_slice().iter().for_each(|range| ranges.remove(*range));
        }
        let mut backups: Vec<String> = usable(&mended).difference(&usable(&broken)).cloned().collect();
        backups.extend(self.backup.clone().filter(|label| !backups.contains(label)));
        let unreachable = lost.into_iter().flat_map(|(timeline, ranges)| {
            let ranges = ranges.as_slice().to_vec();
            ranges.into_iter().map(move |range| Unreachable {
                timeline,
                from: range.from,
                to: range.to,
                from_time: None,
                to_time: None,
            })
        });
        Problem {
            kind: self.kind,
            key: self.key,
            problem: self.problem,
            backups,
            unreachable: unreachable.collect(),
            files: self.files,
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("checking does not panic")
}
