//! A plan -> a restored server that stands exactly where the plan says, or an error that says why not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::binaries::{self, Binaries};
use super::directory::{self, Occupied};
use super::error::RestoreError;
use super::extract::{self, ExtractReport, Placement};
use super::instance::{Instance, Listen, POLL_INTERVAL, Replay};
use super::plan::{RestorePlan, Transaction};
use super::recovery::{self, FetchCommand};
use super::wal_fetch::{self, Cache};
use crate::pg::{Lsn, Oid, PgTime, TimelineHistory, TimelineId};
use crate::progress::Progress;
use crate::proto;
use crate::repo::Repository;
use crate::repo::backup::manifest;

/// What happens once the target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The server stays in recovery, readable.
    Pause,
    /// It becomes a writable primary on a new timeline.
    Promote,
    /// It is stopped.
    Shutdown,
}

/// Where and how to restore.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What becomes the data directory; absolute.
    pub target_dir: PathBuf,
    /// Places of tablespaces: the directory at backup time or the OID, and the new directory.
    pub tablespaces: Vec<(String, PathBuf)>,
    /// A stopped cluster may be replaced.
    pub overwrite: bool,
    /// Starts the server; without it, the directory is only prepared.
    pub start: Option<Start>,
}

/// How the restored server is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Directory of PostgreSQL's programs; if not set they are looked for.
    pub binaries: Option<PathBuf>,
    /// The `PATH` variable, where they are looked for.
    pub path: Option<std::ffi::OsString>,
    /// How the server is reached.
    pub listen: Listen,
    /// What happens at the target.
    pub action: Action,
}

/// A plan that can be carried out here: everything that can be checked beforehand was, and nothing was written.
#[derive(Debug)]
pub struct Prepared {
    manifest: Arc<proto::BackupManifest>,
    placement: Placement,
    occupied: Occupied,
    binaries: Option<Binaries>,
}

/// How long the parts of a restore took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Timings {
    /// Fetching and writing the base backup.
    pub extract: Duration,
    /// Replaying WAL up to the target.
    pub replay: Duration,
    /// Promoting or stopping the server.
    pub finish: Duration,
}

/// The place that was reached and proved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Reached {
    /// The end of the last record replayed.
    pub lsn: Lsn,
    /// The last transaction that committed; `None` if none did since the backup began.
    pub transaction: Option<Transaction>,
    /// The new timeline, once promoted.
    pub timeline: Option<TimelineId>,
}

/// A server that was left running.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Running {
    /// The server's process.
    pub pid: u32,
    /// Directory of its socket.
    pub socket_dir: PathBuf,
    /// Its port.
    pub port: u16,
    /// It listens on the loopback interface too.
    pub tcp: bool,
    /// Its log.
    pub log: PathBuf,
}

/// What a restore did.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct RestoreReport {
    /// The data directory.
    pub target_dir: PathBuf,
    /// What was extracted.
    pub extracted: ExtractReport,
    /// What was reached; `None` if the server was not started.
    pub reached: Option<Reached>,
    /// The server, if it runs.
    pub running: Option<Running>,
    /// How long it took.
    pub timings: Timings,
}

/// Checks everything that can be known before anything is written: user, directory, room, tablespaces, programs.
///
/// # Errors
/// The first thing that keeps the plan from being carried out here.
pub async fn prepare(repo: &Repository, plan: &RestorePlan, options: &Options) -> Result<Prepared, RestoreError> {
    refuse_root()?;
    let occupied = directory::check(&options.target_dir, options.overwrite)?;
    let binaries = match &options.start {
        None => None,
        Some(start) => {
            start.listen.check_free(&options.target_dir)?;
            let major = plan.backup.server_version.major();
            Some(binaries::find(major, start.binaries.as_deref(), start.path.as_deref())?)
        }
    };
    let manifest = Arc::new(manifest::read(repo, &plan.backup.label).await?);
    let placement =
        Placement { data_dir: options.target_dir.clone(), tablespaces: tablespaces(&manifest, &options.tablespaces)? };
    // What is replaced makes room that cannot be counted beforehand.
    if occupied == Occupied::Free {
        check_room(&options.target_dir, plan)?;
    }
    Ok(Prepared { manifest, placement, occupied, binaries })
}

/// PostgreSQL refuses to run as root, and what root extracts is not the server's own.
///
/// # Errors
/// If this process runs as root.
pub fn refuse_root() -> Result<(), RestoreError> {
    if rustix::process::geteuid().is_root() { Err(RestoreError::Root) } else { Ok(()) }
}

/// The base backup must fit, and the segments that are there at one time.
fn check_room(target_dir: &Path, plan: &RestorePlan) -> Result<(), RestoreError> {
    let needed = plan.backup.content_bytes;
    match directory::free_bytes(target_dir) {
        Some(free) if free < needed => Err(RestoreError::Directory {
            path: target_dir.to_owned(),
            problem: format!("the base backup needs {needed} bytes, and {free} are free there"),
            hint: "make room, or choose another place with --target-dir".to_owned(),
        }),
        _ => Ok(()),
    }
}

/// Tablespaces by OID, named by OID or by the directory that they had.
fn tablespaces(
    manifest: &proto::BackupManifest,
    given: &[(String, PathBuf)],
) -> Result<BTreeMap<Oid, PathBuf>, RestoreError> {
    let known =
        manifest.archives.iter().filter_map(|archive| Some((Oid(archive.name.parse().ok()?), &archive.location)));
    let known: Vec<_> = known.collect();
    let mut places = BTreeMap::new();
    for (old, new) in given {
        let is_it = |(oid, location): &&(Oid, &String)| oid.to_string() == *old || *location == old;
        let Some((oid, _)) = known.iter().find(is_it) else {
            let names: Vec<_> = known.iter().map(|(oid, location)| format!("{oid} ({location})")).collect();
            return Err(RestoreError::Option {
                problem: format!("the backup has no tablespace `{old}`"),
                hint: match names.as_slice() {
                    [] => "it has none besides the data directory: leave --tablespace out".to_owned(),
                    names => format!("it has {}", names.join(", ")),
                },
            });
        };
        places.insert(*oid, new.clone());
    }
    Ok(places)
}

/// Carries out a plan. With a server to start, it is an error if the server ends up anywhere else than planned; it is
/// then stopped and the directory left for inspection.
///
/// # Errors
/// If anything fails; what was written stays, and no server of ours is left running.
pub async fn run(
    repo: &Repository,
    plan: &RestorePlan,
    prepared: &Prepared,
    options: &Options,
    fetch: &FetchCommand,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<RestoreReport, RestoreError> {
    let target_dir = &options.target_dir;
    if prepared.occupied == Occupied::StoppedCluster {
        // Looked at again: minutes may have passed before somebody said yes.
        directory::check(target_dir, true)?;
        directory::clear(target_dir)?;
    }
    let extracted = extract::extract(repo, &prepared.manifest, &prepared.placement, progress, cancel).await?;
    let settings = prepared.manifest.settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    recovery::configure(target_dir, plan, &settings, fetch)?;
    let mut report = RestoreReport {
        target_dir: target_dir.clone(),
        extracted,
        reached: None,
        running: None,
        timings: Timings { extract: extracted.elapsed, ..Timings::default() },
    };
    let (Some(start), Some(binaries)) = (&options.start, &prepared.binaries) else { return Ok(report) };
    let instance = Instance::start(binaries, target_dir, &start.listen, &prepared.manifest.role)?;
    let mut watch = Watch { repo, plan, target_dir, instance, progress, cancel };
    match watch.watch_to_the_end(start, &mut report.timings).await {
        Ok(reached) => {
            report.reached = Some(reached);
            report.running = (start.action != Action::Shutdown).then(|| watch.running(start));
            Ok(report)
        }
        Err(error) => {
            let _ = watch.instance.stop().await; // the first error is the one to tell
            Err(error)
        }
    }
}

struct Watch<'a> {
    repo: &'a Repository,
    plan: &'a RestorePlan,
    target_dir: &'a Path,
    instance: Instance,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
}

impl Watch<'_> {
    async fn watch_to_the_end(&mut self, start: &Start, timings: &mut Timings) -> Result<Reached, RestoreError> {
        let replaying = Instant::now();
        let cache = Cache::of_server(self.target_dir);
        let ahead = CancellationToken::new();
        let prefetch = {
            let (repo, cache, ahead) = (self.repo.clone(), cache.clone(), ahead.clone());
            tokio::spawn(async move { wal_fetch::prefetch(&repo, &cache, true, &ahead).await })
        };
        let replayed = self.replay().await;
        ahead.cancel();
        let _ = prefetch.await; // it has nothing to tell
        cache.remove();
        let replay = replayed?;
        let mut reached = self.prove(&replay).await?;
        timings.replay = replaying.elapsed();
        let finishing = Instant::now();
        match start.action {
            Action::Pause if replay.in_recovery => {}
            Action::Pause => return Err(self.promoted_by_itself()),
            Action::Promote => reached.timeline = Some(self.promote(replay.in_recovery).await?),
            Action::Shutdown => {
                self.progress.begin("stop the restored server", None);
                self.instance.stop().await?;
                self.progress.end();
            }
        }
        timings.finish = finishing.elapsed();
        Ok(reached)
    }

    /// Waits until recovery stands still.
    async fn replay(&mut self) -> Result<Replay, RestoreError> {
        let (from, to) = (self.plan.backup.start, self.plan.stop.reached);
        self.progress.begin("replay WAL", Some(to.saturating_sub(from)));
        let mut told = from;
        let mut client = None;
        loop {
            if self.cancel.is_cancelled() {
                return Err(RestoreError::Cancelled);
            }
            self.instance.check_alive()?;
            if client.is_none() {
                client = self.instance.connect().await;
                self.instance.check_alive()?; // so that it was ours that answered
            }
            let replay = match &client {
                Some(connection) => Instance::replay(connection).await,
                None => {
                    // Not consistent yet: it takes no connections.
                    tokio::time::sleep(POLL_INTERVAL).await;
                    continue;
                }
            };
            let Ok(replay) = replay else {
                client = None; // it went away; the next turn sees whether the server did
                continue;
            };
            if let Some(lsn) = replay.lsn {
                self.progress.advance(lsn.min(to).saturating_sub(told));
                told = told.max(lsn.min(to));
            }
            if let Some(time) = replay.time {
                self.progress.note(&format!("replaying {time}"));
            }
            if replay.paused || !replay.in_recovery {
                self.progress.end();
                return Ok(replay);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// The server stands where the plan says, or it is an error.
    async fn prove(&self, replay: &Replay) -> Result<Reached, RestoreError> {
        let plan = self.plan;
        let differs = |problem: String| RestoreError::NotAsPlanned { problem, log: self.instance.log().to_owned() };
        // A server that promoted itself has gone on writing; where it left the old timeline is in its history.
        let lsn = if replay.in_recovery { replay.lsn } else { self.switch_point().await };
        if lsn != Some(plan.stop.reached) {
            let found = lsn.map_or("nowhere".to_owned(), |lsn| format!("at {lsn}"));
            return Err(differs(format!("the server stands {found}, planned was {}", plan.stop.reached)));
        }
        // A server told to stop behind a record stops before it has taken note of that record's time
        // (`recoveryStopsAfter` in `access/transam/xlogrecovery.c`).
        let unnoted = plan.stop.inclusive && plan.ends_with_transaction;
        let expected = if unnoted { plan.last_ends[1] } else { plan.last_ends[0] };
        if replay.in_recovery && replay.time != expected {
            let show = |time: Option<PgTime>| time.map_or("none".to_owned(), |time| time.to_string());
            let problem = "the last transaction replayed ended at";
            return Err(differs(format!("{problem} {}, planned was {}", show(replay.time), show(expected))));
        }
        Ok(Reached { lsn: plan.stop.reached, transaction: plan.kept, timeline: None })
    }

    /// Where the timeline that the server writes now begins.
    async fn switch_point(&self) -> Option<Lsn> {
        let timeline = self.timeline().await?;
        let file = self.target_dir.join("pg_wal").join(timeline.history_file_name());
        let history = TimelineHistory::parse(timeline, &std::fs::read_to_string(file).ok()?).ok()?;
        history.begin_of(timeline)
    }

    async fn timeline(&self) -> Option<TimelineId> {
        let client = self.instance.connect().await?;
        let sql = "SELECT substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)";
        let hex: String = client.query_one(sql, &[]).await.ok()?.try_get(0).ok()?;
        u32::from_str_radix(&hex, 16).ok().and_then(TimelineId::new)
    }

    fn promoted_by_itself(&self) -> RestoreError {
        self.instance.failure(
            "the server reached the target but could not wait there, because no snapshot was ready for readers; it \
             promoted itself (restore with --action promote)",
        )
    }

    async fn promote(&mut self, in_recovery: bool) -> Result<TimelineId, RestoreError> {
        self.progress.begin("promote the restored server", None);
        if in_recovery {
            self.instance.promote()?;
        }
        loop {
            if self.cancel.is_cancelled() {
                return Err(RestoreError::Cancelled);
            }
            self.instance.check_alive()?;
            if let Some(client) = self.instance.connect().await
                && Instance::replay(&client).await.is_ok_and(|replay| !replay.in_recovery)
                && let Some(timeline) = self.timeline().await
            {
                self.progress.end();
                return Ok(timeline);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn running(&self, start: &Start) -> Running {
        Running {
            pid: self.instance.pid(),
            socket_dir: self.instance.socket_dir.clone(),
            port: self.instance.port,
            tcp: start.listen.port.is_some(),
            log: self.instance.log().to_owned(),
        }
    }
}
