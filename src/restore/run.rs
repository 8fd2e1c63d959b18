//! A plan -> a restored server that stands exactly where the plan says, or an error that says why not.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::ahead::{Ahead, PlacedWal, segment_being_replayed};
use super::binaries::{self, Binaries};
use super::control;
use super::directory::{self, Occupied};
use super::disk::{Disk, Flushing};
use super::error::RestoreError;
use super::extract::{self, ExtractReport, Extracted, Placement};
use super::handover::Mark;
use super::instance::{Instance, Listen, POLL_INTERVAL, Replay, STOP_DEADLINE};
use super::plan::{RestorePlan, Transaction};
use super::recovery::{self, FetchCommand};
use super::standby;
use super::state::{self, Stage, Unfinished};
use super::tuning::{Machine, Tuning};
use super::wal_fetch::FetchError;
use crate::backoff::Chain;
use crate::pg::{Lsn, Oid, PgTime, TimelineHistory, TimelineId};
use crate::progress::Progress;
use crate::proto;
use crate::repo::Repository;
use crate::repo::backup::manifest;
use crate::repo::restores::RestoreRecord;

/// All WAL is there, and the server does not get on: it is asked after this whether it finds any.
const STALL_ASKED_AFTER: Duration = Duration::from_secs(5);

/// A server that takes no connections yet cannot be asked, and may work on one segment for long.
const STALL_MAX: Duration = Duration::from_secs(120);

/// How long a server may take to sync what it writes once it is told to.
const SYNCS_DEADLINE: Duration = Duration::from_secs(20);

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
    /// A stopped cluster may be turned into what is restored; what differs is fetched.
    pub delta: bool,
    /// Bytes of WAL that may lie in `pg_wal` ahead of replay; by default as memory and room allow.
    pub wal_ahead: Option<u64>,
    /// Starts the server; without it, the directory is only prepared.
    pub start: Option<Start>,
    /// Nothing is written for recovery: whoever starts the server arranges that. Only without `start`.
    pub bare: bool,
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
    begin: Begin,
    pub(super) binaries: Option<Binaries>,
}

/// What a restore begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Begin {
    /// Nothing.
    Fresh,
    /// A cluster that is removed.
    Replace,
    /// Files that are compared with the backup.
    Compare,
    /// Files that are all there, of the same restore, which was interrupted, or of one to an earlier moment, which this one
    /// passes. Its WAL is there up to that moment.
    GoOn(Stage, Lsn),
}

/// How long the parts of a restore took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Timings {
    /// Fetching and writing the base backup.
    pub extract: Duration,
    /// Replaying WAL up to the target.
    pub replay: Duration,
    /// Promoting or stopping the server, and waiting until everything is on disk.
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
    /// Tables and indexes that nobody can read while the server waits: a transaction that was open at the target had locked
    /// them to change or drop them.
    pub locked: u64,
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
    /// A role that can log in over the socket: that of the base backup.
    pub role: String,
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
    /// The WAL that was placed ahead of the server; `None` if the server was not started.
    pub placed: Option<PlacedWal>,
    /// What was reached; `None` if the server was not started.
    pub reached: Option<Reached>,
    /// The server, if it runs.
    pub running: Option<Running>,
    /// The original's data directory, if it is known.
    pub original: Option<PathBuf>,
    /// How long it took.
    pub timings: Timings,
}

/// Checks everything that can be known before anything is written: user, directory, room, tablespaces, programs.
///
/// # Errors
/// The first thing that keeps the plan from being carried out here.
pub async fn prepare(repo: &Repository, plan: &RestorePlan, options: &Options) -> Result<Prepared, RestoreError> {
    refuse_root()?;
    let begin = begin(plan, options)?;
    let binaries = match &options.start {
        None => None,
        Some(start) => {
            // The server of an interrupted restore is stopped first.
            if directory::server(&options.target_dir).is_none() {
                start.listen.check_free(&options.target_dir)?;
            }
            let major = plan.backup.server_version.major();
            Some(binaries::find(major, start.binaries.as_deref(), start.path.as_deref())?)
        }
    };
    let manifest = Arc::new(manifest::read(repo, &plan.backup.label).await?);
    let placement = Placement {
        data_dir: options.target_dir.clone(),
        tablespaces: tablespaces(&manifest, &options.tablespaces)?,
        over_existing: begin == Begin::Compare,
        durable_later: options.start.is_some(),
    };
    if matches!(begin, Begin::Fresh | Begin::Compare) {
        extract::check(&manifest, &placement)?;
    }
    // What is replaced makes room that cannot be counted beforehand.
    if begin == Begin::Fresh {
        check_room(&options.target_dir, plan)?;
    }
    Ok(Prepared { manifest, placement, begin, binaries })
}

/// Decides what to do about what is there, and changes nothing.
fn begin(plan: &RestorePlan, options: &Options) -> Result<Begin, RestoreError> {
    let target_dir = &options.target_dir;
    let refuse = |problem: &str, hint: &str| {
        let (path, problem, hint) = (target_dir.clone(), problem.to_owned(), hint.to_owned());
        Err(RestoreError::Directory { path, problem, hint })
    };
    match directory::check(target_dir, options.overwrite || options.delta)? {
        Occupied::Free => return Ok(Begin::Fresh),
        Occupied::StoppedCluster if options.overwrite => return Ok(Begin::Replace),
        Occupied::StoppedCluster => {
            // A slip of the keyboard must not turn one cluster into another.
            return match control::read(target_dir) {
                Some(control) if control.system_id != plan.system_id() => refuse(
                    "holds another cluster than the repository's",
                    "choose another place with --target-dir; --overwrite replaces that cluster, for good",
                ),
                _ => Ok(Begin::Compare),
            };
        }
        Occupied::Unfinished => {}
    }
    let Some(unfinished) = Unfinished::read(target_dir) else { return Ok(Begin::Compare) };
    let (this, stage) = (Unfinished::of(plan, unfinished.stage), unfinished.stage);
    if unfinished.system_id != this.system_id {
        return refuse(
            "holds the unfinished restore of another cluster",
            "remove it, or choose another place with --target-dir",
        );
    }
    let has_control = control::read(target_dir).is_some();
    if stage == Stage::Replay && has_control && !is_in_recovery(target_dir) {
        return refuse(
            "holds a restore that was not finished, and was promoted by somebody since",
            "if it is not used, remove it; choose another place with --target-dir otherwise",
        );
    }
    let (is_same, is_beyond) = (unfinished.is_same(&this), this.is_beyond(&unfinished));
    let is_further = is_beyond && stage == Stage::Replay && unfinished.label == this.label;
    if stage != Stage::Extract && has_control && (is_same || is_further) && options.start.is_some() {
        return Ok(Begin::GoOn(stage, unfinished.stop));
    }
    // A moment that was meant to be later by now, as `latest` is, takes the place of the one before.
    if let Some(pid) = directory::server(target_dir).filter(|_| !is_beyond) {
        return refuse(
            &format!(
                "holds an unfinished restore to another moment, LSN {}, and its server runs (process {})",
                unfinished.stop,
                pid.as_raw_nonzero()
            ),
            "run the command of that restore again to finish it; or stop that server first, or choose another place with \
             --target-dir",
        );
    }
    Ok(Begin::Compare)
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
    let (report, _goes_on) = run_and_hold(repo, plan, prepared, options, fetch, progress, cancel).await?;
    Ok(report)
}

/// As [`run`]; also gives the server, if it is left running.
pub(super) async fn run_and_hold(
    repo: &Repository,
    plan: &RestorePlan,
    prepared: &Prepared,
    options: &Options,
    fetch: &FetchCommand,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(RestoreReport, Option<Instance>), RestoreError> {
    let target_dir = &options.target_dir;
    // Two at a time would take each other's server for one that was left behind.
    make_directory(target_dir)?;
    let _hold = directory::hold(target_dir)?;
    // Looked at again: minutes may have passed before somebody said yes.
    let begin = self::begin(plan, options)?;
    if begin != prepared.begin {
        return Err(RestoreError::Directory {
            path: target_dir.clone(),
            problem: "has changed since it was looked at".to_owned(),
            hint: "run the command again".to_owned(),
        });
    }
    if matches!(begin, Begin::GoOn(..) | Begin::Compare) {
        stop_server(target_dir).await?;
    }
    // One that ended while it was promoted has no signal file, and would go on writing the timeline of the original.
    let is_recovering = is_in_recovery(target_dir) || directory::was_recovering(target_dir);
    let is_promoted = matches!(begin, Begin::GoOn(..)) && !is_recovering;
    let extracted = match begin {
        Begin::GoOn(..) => Extracted::as_it_is(&prepared.manifest, &prepared.placement)?,
        _ => {
            Unfinished::of(plan, Stage::Extract).write(target_dir)?;
            if begin == Begin::Replace {
                directory::clear(target_dir)?;
            }
            extract::extract_and_hold(repo, &prepared.manifest, &prepared.placement, progress, cancel).await?
        }
    };
    // What was extracted goes to the disk while the server replays.
    let flushing = options.start.is_some().then(|| extracted.disk.flush_in_background());
    if let Begin::GoOn(Stage::Replay, _) = begin {
        // Before the server is told to go further than it was.
        Unfinished::of(plan, Stage::Replay).write_unsynced(target_dir)?;
    }
    if !is_promoted && !matches!(begin, Begin::GoOn(Stage::Promote, _)) {
        let settings = prepared.manifest.settings.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        recovery::configure(target_dir, plan, &settings, fetch, options.bare)?;
    }
    let mark = mark(&prepared.manifest, plan);
    let mut report = RestoreReport {
        target_dir: target_dir.clone(),
        extracted: extracted.report,
        placed: None,
        reached: None,
        running: None,
        original: mark.original.clone(),
        timings: Timings { extract: extracted.report.elapsed, ..Timings::default() },
    };
    let (Some(start), Some(binaries)) = (&options.start, &prepared.binaries) else {
        state::remove(target_dir)?;
        return Ok((report, None));
    };
    let replaying = Instant::now();
    let sizes = (plan.backup.content_bytes, plan.wal_bytes);
    let major = plan.backup.server_version.major();
    // While the control file is in memory, nothing need be synced.
    let syncs = control::in_memory(target_dir).is_none();
    let tuning = Tuning::of(Machine::here(target_dir), major, sizes, options.wal_ahead, syncs);
    let mut wal = match is_promoted {
        true => Wal::none(plan, cancel),
        false => {
            standby::begin(target_dir, &tuning)?;
            // What was placed since the machine was started is still what it was.
            let keeps_to = match begin {
                Begin::GoOn(_, stop) if !syncs => stop,
                _ => Lsn::ZERO,
            };
            if !matches!(begin, Begin::GoOn(..)) {
                Unfinished::of(plan, Stage::Replay).write_unsynced(target_dir)?;
            }
            Wal::place(repo, plan, target_dir, extracted.file_mode, &tuning, keeps_to, cancel).await?
        }
    };
    let instance = Instance::start(binaries, target_dir, &start.listen, &prepared.manifest.role, &[])?;
    let mut watch =
        Watch { plan, target_dir, instance, wal: &mut wal, disk: extracted.disk, flushing, progress, cancel };
    let result = watch.watch_to_the_end(start, replaying, extracted.file_mode, &mut report.timings).await;
    match result {
        Ok(reached) => {
            report.reached = Some(reached);
            report.running = (start.action != Action::Shutdown).then(|| watch.running(start, &prepared.manifest.role));
            mark.write(target_dir)?;
            let held = report.running.is_some().then_some(watch.instance);
            report.placed = wal.all;
            if !matches!(begin, Begin::GoOn(..)) {
                record(repo, plan, &report).await;
            }
            Ok((report, held))
        }
        Err(error) => {
            let _ = watch.instance.stop().await; // the first error is the one to tell
            wal.stop().await;
            Err(error)
        }
    }
}

/// Writes down how long it took, for the next plan. Whoever restores may not be allowed to write, and need not be.
async fn record(repo: &Repository, plan: &RestorePlan, report: &RestoreReport) {
    let Timings { extract, replay, finish } = report.timings;
    let extracted = &report.extracted;
    let record = RestoreRecord {
        at: jiff::Timestamp::now(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        label: plan.backup.label.clone(),
        // What was there already says nothing of how long it takes to fetch it.
        extracted_bytes: if extracted.kept_bytes == 0 { extracted.content_bytes } else { 0 },
        extract_seconds: extract.as_secs_f64(),
        replayed_bytes: plan.wal_bytes,
        replay_seconds: replay.as_secs_f64(),
        finish_seconds: finish.as_secs_f64(),
    };
    if let Err(error) = repo.put_restore(&record).await {
        tracing::info!("how long this restore took is not written down: {}", Chain(&error));
    }
}

/// True if a server that starts there goes on recovering.
fn is_in_recovery(target_dir: &Path) -> bool {
    ["standby.signal", "recovery.signal"].iter().any(|signal| target_dir.join(signal).exists())
}

/// Stops the server that an interrupted restore left behind.
pub(super) async fn stop_server(target_dir: &Path) -> Result<(), RestoreError> {
    let Some(pid) = directory::server(target_dir) else { return Ok(()) };
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT); // if it has ended, that is seen below
    let begin = Instant::now();
    while directory::server(target_dir) == Some(pid) {
        if begin.elapsed() > STOP_DEADLINE {
            return Err(RestoreError::Directory {
                path: target_dir.to_owned(),
                problem: format!("holds a server that does not stop (process {})", pid.as_raw_nonzero()),
                hint: "stop it, and run the same command again".to_owned(),
            });
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// The directory, which nobody but its owner looks into.
pub(super) fn make_directory(target_dir: &Path) -> Result<(), RestoreError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(target_dir);
    made.map_err(RestoreError::file("make directory", target_dir))
}

/// WAL on its way into `pg_wal`.
struct Wal {
    /// How far the server is.
    replayed: watch::Sender<Lsn>,
    placing: Option<JoinHandle<Result<PlacedWal, FetchError>>>,
    /// What was placed, once that is all.
    all: Option<PlacedWal>,
    stop: CancellationToken,
}

impl Wal {
    /// None is needed.
    fn none(plan: &RestorePlan, cancel: &CancellationToken) -> Self {
        let (replayed, _) = watch::channel(plan.backup.start);
        Self { replayed, placing: None, all: Some(PlacedWal::default()), stop: cancel.child_token() }
    }

    /// Begins to place WAL, and returns when the server can begin with it.
    async fn place(
        repo: &Repository,
        plan: &RestorePlan,
        target_dir: &Path,
        file_mode: u32,
        tuning: &Tuning,
        keeps_to: Lsn,
        cancel: &CancellationToken,
    ) -> Result<Self, RestoreError> {
        let from = needed_from(plan, target_dir);
        let ahead = Ahead::new(repo, plan, from, target_dir, file_mode, tuning.wal_ahead, keeps_to)?;
        ahead.place_histories().await?;
        let stop = cancel.child_token();
        let (replayed, position) = watch::channel(from);
        let (placed, mut first) = watch::channel(from);
        let placing = tokio::spawn(ahead.run(position, placed, stop.clone()));
        let mut this = Self { replayed, placing: Some(placing), all: None, stop };
        // An error means that the other end is gone: what was placed is all, or there is an error to tell.
        let _ = first.wait_for(|placed| *placed > from).await;
        this.check().await?;
        Ok(this)
    }

    /// Fails if placing WAL has failed.
    async fn check(&mut self) -> Result<(), RestoreError> {
        let Some(placing) = self.placing.take_if(|placing| placing.is_finished()) else { return Ok(()) };
        match placing.await {
            Ok(Ok(all)) => self.all = Some(all),
            Ok(Err(FetchError::Cancelled)) => return Err(RestoreError::Cancelled),
            Ok(Err(error)) => return Err(error.into()),
            Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
        }
        Ok(())
    }

    /// Places no more.
    async fn stop(&mut self) {
        self.stop.cancel();
        if let Some(placing) = self.placing.take() {
            let _ = placing.await; // there is another error to tell
        }
    }
}

/// `40 s`, `3 min`, `2 h 5 min`: an estimate has no need of more.
fn in_words(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match (seconds / 3600, seconds.div_ceil(60), seconds) {
        (0, _, seconds) if seconds < 90 => format!("{seconds} s"),
        (0, minutes, _) => format!("{minutes} min"),
        (hours, _, seconds) => format!("{hours} h {} min", seconds % 3600 / 60),
    }
}

/// Where the WAL begins that the server needs: where the backup's does, or where it made its last restartpoint.
fn needed_from(plan: &RestorePlan, target_dir: &Path) -> Lsn {
    // As long as the label is there, the server begins with it.
    let redo =
        control::read(target_dir).filter(|_| !target_dir.join("backup_label").exists()).map(|control| control.redo);
    redo.filter(|redo| (plan.backup.start..=plan.stop.reached).contains(redo)).unwrap_or(plan.backup.start)
}

/// What a handover needs to know.
fn mark(manifest: &proto::BackupManifest, plan: &RestorePlan) -> Mark {
    let setting = |name: &str| manifest.settings.get(name).filter(|value| !value.is_empty());
    Mark {
        reached: plan.stop.reached,
        role: manifest.role.clone(),
        archives: setting("archive_mode").is_some_and(|mode| mode != "off"),
        original: setting("data_directory").map(PathBuf::from),
    }
}

struct Watch<'a> {
    plan: &'a RestorePlan,
    target_dir: &'a Path,
    instance: Instance,
    wal: &'a mut Wal,
    disk: Disk,
    flushing: Option<Flushing>,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
}

impl Watch<'_> {
    async fn watch_to_the_end(
        &mut self,
        start: &Start,
        replaying: Instant,
        file_mode: u32,
        timings: &mut Timings,
    ) -> Result<Reached, RestoreError> {
        let replay = self.replay().await?;
        let mut reached = self.prove(&replay).await?;
        timings.replay = replaying.elapsed();
        let finishing = Instant::now();
        match start.action {
            Action::Pause if replay.in_recovery => {
                self.take_settings_back().await?;
                self.make_durable(file_mode).await?;
                reached.locked = self.instance.locked().await;
            }
            Action::Pause => return Err(self.promoted_by_itself()),
            Action::Promote => {
                // The process that replays looks at its settings before it looks whether it is to promote
                // (`recoveryPausesHere` in `access/transam/xlogrecovery.c`), so what it writes from there on is synced.
                // That takes it up to a second, in which what was written before goes to the disk.
                standby::end(self.target_dir, false)?;
                self.instance.reload();
                self.progress.begin("promote the restored server", None);
                if replay.in_recovery {
                    Unfinished::of(self.plan, Stage::Promote).write_unsynced(self.target_dir)?;
                    self.instance.promote()?;
                }
                self.sync().await?;
                reached.timeline = Some(self.wait_promoted().await?);
                self.take_settings_back().await?;
                self.make_durable(file_mode).await?;
            }
            Action::Shutdown => {
                self.progress.begin("stop the restored server", None);
                self.instance.stop().await?;
                standby::end(self.target_dir, false)?;
                standby::end_as_recovery(self.target_dir)?;
                self.make_durable(file_mode).await?;
                self.progress.end();
            }
        }
        state::remove(self.target_dir)?;
        timings.finish = finishing.elapsed();
        Ok(reached)
    }

    /// The server gets the settings of the original again, and syncs what it writes from here on.
    async fn take_settings_back(&mut self) -> Result<(), RestoreError> {
        standby::end(self.target_dir, false)?;
        self.instance.reload();
        let begin = Instant::now();
        let mut insists = false;
        loop {
            if self.cancel.is_cancelled() {
                return Err(RestoreError::Cancelled);
            }
            self.instance.check_alive()?;
            if self.instance.syncs().await == Some(true) {
                return Ok(());
            }
            if !insists && begin.elapsed() > SYNCS_DEADLINE / 10 {
                insists = true; // the original runs without
                standby::end(self.target_dir, true)?;
                self.instance.reload();
            }
            if begin.elapsed() > SYNCS_DEADLINE {
                return Err(self.instance.failure("the restored server does not turn fsync on"));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Waits until everything that was written is on disk, and then lets the control file appear there.
    async fn make_durable(&mut self, file_mode: u32) -> Result<(), RestoreError> {
        self.sync().await?;
        let target_dir = self.target_dir.to_owned();
        let settled = tokio::task::spawn_blocking(move || control::settle(&target_dir, file_mode));
        let settled = settled.await.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
        settled.map_err(RestoreError::file("put into place", self.target_dir.join("global/pg_control")))
    }

    async fn sync(&mut self) -> Result<(), RestoreError> {
        self.flushing = None;
        self.progress.note("wait for the disk");
        let disk = self.disk.clone();
        let synced = tokio::task::spawn_blocking(move || disk.sync()).await;
        let synced = synced.unwrap_or_else(|panicked| std::panic::resume_unwind(panicked.into_panic()));
        synced.map_err(|(path, error)| RestoreError::file("sync the file system of", path)(error))
    }

    /// Waits until recovery stands still.
    async fn replay(&mut self) -> Result<Replay, RestoreError> {
        let (from, to) = (self.plan.backup.start, self.plan.stop.reached);
        self.progress.begin("replay WAL", Some(to.saturating_sub(from)));
        let mut told = from;
        let mut client = None;
        let began = Instant::now();
        let mut moved = began;
        loop {
            if self.cancel.is_cancelled() {
                return Err(RestoreError::Cancelled);
            }
            self.instance.check_alive()?;
            self.wal.check().await?;
            if client.is_none() {
                client = self.instance.connect().await;
                self.instance.check_alive()?; // so that it was ours that answered
            }
            let replay = match &client {
                Some(connection) => match Instance::replay(connection).await {
                    Ok(replay) => Some(replay),
                    Err(_) => {
                        client = None; // it went away; the next turn sees whether the server did
                        continue;
                    }
                },
                None => None, // not consistent yet: it takes no connections
            };
            let size = self.plan.segment_size();
            let lsn = match &replay {
                Some(replay) => replay.lsn,
                None => segment_being_replayed(self.instance.pid(), size).map(|segment| segment.start()),
            };
            if let Some(lsn) = lsn.map(|lsn| lsn.min(to)).filter(|lsn| *lsn > told) {
                self.progress.advance(lsn.saturating_sub(told));
                (told, moved) = (lsn, Instant::now());
                self.wal.replayed.send_replace(lsn);
            }
            if let Some(time) = replay.and_then(|replay| replay.time) {
                let rate = told.saturating_sub(from) as f64 / began.elapsed().as_secs_f64().max(0.001);
                let left = to.saturating_sub(told) as f64 / rate.max(1.0);
                let clock = time.timestamp().strftime("%H:%M:%S");
                self.progress.note(&format!("replaying {clock} UTC, {} to go", in_words(left)));
            }
            if let Some(replay) = replay.filter(|replay| replay.paused || !replay.in_recovery) {
                self.progress.end();
                return Ok(replay);
            }
            self.check_stall(client.as_ref(), told, moved).await?;
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Fails if the server waits for WAL although all of it is there: it cannot read on.
    async fn check_stall(&self, client: Option<&Client>, at: Lsn, moved: Instant) -> Result<(), RestoreError> {
        let stalled = match client {
            _ if self.wal.all.is_none() => false,
            Some(client) => moved.elapsed() > STALL_ASKED_AFTER && Instance::lacks_wal(client).await,
            None => moved.elapsed() > STALL_MAX,
        };
        if !stalled {
            return Ok(());
        }
        let problem = format!("the server cannot read the WAL behind {at}, although all of it is there");
        Err(self.instance.failure(problem))
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
        Ok(Reached { lsn: plan.stop.reached, transaction: plan.kept, timeline: None, locked: 0 })
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

    async fn wait_promoted(&mut self) -> Result<TimelineId, RestoreError> {
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

    fn running(&self, start: &Start, role: &str) -> Running {
        Running {
            pid: self.instance.pid(),
            socket_dir: self.instance.socket_dir.clone(),
            port: self.instance.port,
            tcp: start.listen.port.is_some(),
            role: role.to_owned(),
            log: self.instance.log().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_is_told_in_words() {
        let told: Vec<_> = [0.2, 59.0, 89.6, 170.0, 3_599.0, 7_500.0].map(in_words).into();
        assert_eq!(told, ["0 s", "59 s", "2 min", "3 min", "60 min", "2 h 5 min"]);
    }
}
