//! A drill: the newest state, or a random moment, is restored into scratch space, looked at, and thrown away.
//!
//! The scratch server has no TCP port, only a socket in a private directory. It stays in recovery while it is asked, so it
//! starts no subscription, no job of an extension and no archiver, and cannot be written to. Then it is stopped, and
//! PostgreSQL in single-user mode, which starts no other process either, replays what was not on disk, ends recovery and
//! shuts down: the proof that a primary would come of it. After that everything is on disk, and every page of it is read.
//!
//! Nothing is left behind, however the drill ends; what one that was killed left is removed by the next.

use std::ffi::OsString;
use std::fs;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use jiff::{SignedDuration, Timestamp};
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use tokio_util::sync::CancellationToken;

use super::binaries::Binaries;
use super::control;
use super::directory;
use super::error::RestoreError;
use super::extract::ExtractError;
use super::instance::{LOG, Listen, SOCKET_DIR_BYTES_MAX};
use super::pages;
use super::plan::{self, RestorePlan, cancellable};
use super::proof::{self, Check, Point, Reach, Verdict};
use super::recovery::FetchCommand;
use super::run::{self, Action, Options, Start};
use super::standby;
use super::target::Target;
use crate::backoff::Chain;
use crate::pg::{Lsn, PgTime, SegmentName};
use crate::progress::Progress;
use crate::repo::backup::{BackupError, manifest};
use crate::repo::catalog::{Catalog, CatalogScope, LsnRange};
use crate::repo::drills::{Drill, FORMAT, Outcome, ReachedMoment, Seconds};
use crate::repo::store::StoreError;
use crate::repo::verify::{self, Problem, ProblemKind};
use crate::repo::{RepoError, Repository};

/// What a directory of a drill is called, behind which a random number follows.
const PREFIX: &str = "walguard-drill-";

/// The same of one that is kept: no later drill removes it.
const PREFIX_KEPT: &str = "walguard-kept-";

/// Without a limit in the settings, a drill takes at most this share of what is free on its disk, in percent.
const FREE_SHARE: u64 = 90;

/// How often the disk is looked at. A look that takes longer than a tenth of this is taken less often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How often another random moment is chosen where none can be restored, because of a gap that is known.
const RANDOM_TRIES: u32 = 20;

/// A commit within this of the newest archived moment may not be archived yet.
const RANDOM_MARGIN: Duration = Duration::from_secs(2);

/// A server that was asked to stop at once has ended by then, or is killed.
const QUIT_PATIENCE: Duration = Duration::from_secs(6);

/// The `[drill]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The agent makes a drill when the last is older than this; with 0, none.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub every: Duration,
    /// The time of day, in the zone of the settings, at which the agent begins a drill that falls due that day.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<jiff::civil::Time>,
    /// What the agent restores.
    pub moment: Moment,
    /// Where: a directory of its own is made in it for each drill.
    pub scratch_dir: PathBuf,
    /// The most that a drill may take of the disk; by default nine tenths of what is free.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<ByteSize>,
    /// The longest that a drill may take.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub max_time: Duration,
    /// The agent raises an alarm when the last proven restore is older than this. By default, with `every`: when two drills
    /// in a row have proved nothing.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_age: Option<Duration>,
    /// Check tables and indexes by the `amcheck` extension, in the databases that have it.
    pub amcheck: bool,
    /// Directory with PostgreSQL's programs of the cluster's major version; by default they are looked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pg_bin_dir: Option<PathBuf>,
    /// What is asked of the restored database.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
}

/// Which moment a drill restores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// The newest that is archived.
    #[default]
    Newest,
    /// Any since the oldest backup.
    Random,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            every: Duration::ZERO,
            at: None,
            moment: Moment::Newest,
            scratch_dir: "/var/lib/walguard/drill".into(),
            max_bytes: None,
            max_time: Duration::from_secs(6 * 3600),
            max_age: None,
            amcheck: false,
            pg_bin_dir: None,
            checks: Vec::new(),
        }
    }
}

impl Config {
    /// Checks what cannot be told from the types.
    ///
    /// # Errors
    /// What is wrong, with the setting's name.
    pub fn check(&self) -> Result<(), String> {
        if self.every != Duration::ZERO && self.every < Duration::from_secs(60) {
            return Err(format!("drill.every = {:?} is less than a minute (\"0s\": no drills)", self.every));
        }
        if self.max_time < Duration::from_secs(1) {
            return Err(format!("drill.max_time = {:?} is less than a second", self.max_time));
        }
        if !self.scratch_dir.is_absolute() {
            return Err(format!("drill.scratch_dir = {:?} is no absolute path", self.scratch_dir));
        }
        for check in &self.checks {
            if check.database.is_empty() || check.sql.trim().is_empty() {
                return Err("drill.checks: each needs a database and sql".to_owned());
            }
        }
        Ok(())
    }

    /// From which age on the last proven restore is an alarm; `None` for never.
    pub fn age_max(&self) -> Option<Duration> {
        let by_schedule = (!self.every.is_zero()).then(|| self.every.saturating_mul(2).saturating_add(self.max_time));
        self.max_age.filter(|age| !age.is_zero()).or(by_schedule)
    }
}

/// What a drill is to do.
#[derive(Clone, Debug)]
pub struct Request {
    /// Where, within which limits, and what is asked.
    pub config: Config,
    /// What to restore instead of the moment that the settings name.
    pub target: Option<Target>,
    /// The directory stays.
    pub keep: bool,
    /// How the restored server fetches WAL.
    pub fetch: FetchCommand,
    /// The `PATH` variable, where PostgreSQL's programs are looked for.
    pub path: Option<OsString>,
    /// This machine's name.
    pub host: String,
}

/// What a drill came to.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// Its record.
    #[serde(flatten)]
    pub drill: Drill,
    /// The key of the record; `None` if it could not be written.
    pub record: Option<String>,
    /// The directory, if it was kept.
    pub kept: Option<PathBuf>,
}

/// Makes a drill, and writes down what it found.
///
/// # Errors
/// If there was none: it cannot run here, the repository is away, or somebody asked to stop. That it proved nothing is no
/// error.
pub async fn run(
    repo: &Repository,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Report, RestoreError> {
    run::refuse_root()?;
    let began = Instant::now();
    let mut drill = Drill {
        format: FORMAT,
        started_at: Timestamp::now(),
        finished_at: Timestamp::now(),
        host: request.host.clone(),
        target: String::new(),
        outcome: Outcome::Failed,
        backup: None,
        reached: None,
        content_bytes: 0,
        wal_bytes: 0,
        scratch_bytes_max: 0,
        seconds: Seconds::default(),
        points: Vec::new(),
        damage: Vec::new(),
        error: None,
        hint: None,
    };
    let mut target = None;
    let scratch = Scratch::make(&request.config.scratch_dir, request.keep)?;
    let limits = Limits::of(&request.config, &scratch, began);
    let most = Arc::new(AtomicU64::new(0));
    let ended = {
        let ends = cancel.child_token();
        let found = (&mut drill, &mut target);
        let mut work = Box::pin(carry_out(repo, request, (&scratch, &limits), found, progress, &ends));
        tokio::select! {
            done = &mut work => done,
            over = limits.watch(&scratch.dir, &most) => {
                ends.cancel();
                match work.await {
                    // It ended for that reason, or for one of its own in the same moment.
                    Err(error) if error.is_cancelled() => Err(over),
                    other => other,
                }
            }
        }
    };
    let kept = scratch.remove().await;
    drill.scratch_bytes_max = most.load(Ordering::Relaxed);
    drill.finished_at = Timestamp::now();
    match ended {
        Ok(()) => {}
        Err(error) if cancel.is_cancelled() || is_no_drill(&error) => return Err(error),
        Err(error) => {
            drill.damage.extend(named(repo, (target, &drill.backup), &error, progress, cancel).await?);
            drill.error = Some(Chain(&error).to_string());
            drill.hint = match (&error, &kept) {
                // The log that it names is gone.
                (RestoreError::Server { .. } | RestoreError::NotAsPlanned { .. }, None) => {
                    Some("look at the server and its log with `walguard drill --keep`".to_owned())
                }
                _ => error.hint(),
            };
        }
    }
    tell_times(repo, &mut drill.damage).await;
    let has_failed = drill.points.iter().any(|point| point.verdict == Verdict::Failed);
    drill.outcome = match (&drill.error, drill.damage.is_empty(), has_failed) {
        (None, true, false) => Outcome::Proven,
        (None, true, true) => Outcome::Wrong,
        _ => Outcome::Failed,
    };
    let record = match repo.put_drill(&drill).await {
        Ok(key) => Some(key),
        Err(error) => {
            tracing::warn!(hint = error.hint(), "the record of the drill cannot be written: {}", Chain(&error));
            None
        }
    };
    Ok(Report { drill, record, kept })
}

/// What says nothing about the repository: the drill cannot be made here, or not now.
fn is_no_drill(error: &RestoreError) -> bool {
    error.is_transient()
        || matches!(
            error,
            RestoreError::Root
                | RestoreError::Directory { .. }
                | RestoreError::Option { .. }
                | RestoreError::Binaries { .. }
                | RestoreError::Target(_)
        )
}

/// The drill itself, without what comes before and after.
async fn carry_out(
    repo: &Repository,
    request: &Request,
    (scratch, limits): (&Scratch, &Limits),
    (drill, target): (&mut Drill, &mut Option<Target>),
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    let config = &request.config;
    let began = Instant::now();
    let catalog = cancellable(cancel, repo.catalog(CatalogScope::Everything)).await??;
    drill.damage = verify::apparent(repo.layout(), &catalog);
    drill.damage.extend(lost_end(repo, &catalog, cancel).await?);
    let plan = choose(repo, request, &catalog, (&mut drill.target, target), progress, cancel).await?;
    drill.seconds.plan = began.elapsed().as_secs_f64();
    drill.backup = Some(plan.backup.label.clone());
    (drill.content_bytes, drill.wal_bytes) = (plan.backup.content_bytes, plan.wal_bytes);
    limits.check(plan.backup.content_bytes)?;

    let options = Options {
        target_dir: scratch.data_dir(),
        tablespaces: scratch.tablespaces(repo, &plan, cancel).await?,
        overwrite: false,
        delta: false,
        wal_ahead: None,
        start: Some(Start {
            binaries: config.pg_bin_dir.clone(),
            path: request.path.clone(),
            listen: Listen { port: None, socket_dir: Some(scratch.socket_dir.clone()) },
            action: Action::Pause,
        }),
        bare: false,
    };
    let prepared = run::prepare(repo, &plan, &options).await?;
    let restored =
        Box::pin(run::run_and_hold(repo, &plan, &prepared, &options, &request.fetch, progress, cancel)).await?;
    let (report, Some(mut instance)) = restored else { return Err(RestoreError::Cancelled) };
    drill.seconds.extract = report.timings.extract.as_secs_f64();
    drill.seconds.replay = report.timings.replay.as_secs_f64();
    let position = plan.reached();
    let time = plan.kept.map(|kept| kept.time);
    drill.reached = Some(ReachedMoment { timeline: position.timeline, lsn: position.lsn, time });
    drill.points = proof::of_restore(&plan, &report);

    let checking = Instant::now();
    let role = report.running.map(|running| running.role).unwrap_or_default();
    let reach = Reach { socket_dir: instance.socket_dir.clone(), port: instance.port, role };
    let wanted = proof::Wanted { amcheck: config.amcheck, checks: &config.checks };
    let asked = async {
        let found = Box::pin(proof::of_server(&reach, &plan, wanted, progress, cancel)).await?;
        Ok::<_, RestoreError>((found, cancellable(cancel, proof::has_page_checksums(&reach)).await??))
    };
    let asked = asked.await;
    drill.seconds.checks = checking.elapsed().as_secs_f64();
    let finishing = Instant::now();
    progress.begin("stop the restored server", None);
    instance.stop().await?;
    progress.end();
    let (found, has_checksums) = asked?;
    drill.points.extend(found);
    if let Some(binaries) = &prepared.binaries {
        let point = end_recovery(binaries, &options.target_dir, progress, cancel).await?;
        let is_primary = point.verdict == Verdict::Passed;
        drill.points.push(point);
        drill.points.push(match (is_primary, has_checksums) {
            (true, true) => pages_point(pages::check(&options.target_dir, progress, cancel).await?),
            (true, false) => Point::new("pages", Verdict::Unproved, "not checked: the cluster has no page checksums")
                .with_hint("`pg_checksums --enable` adds them to a stopped cluster"),
            (false, _) => Point::new("pages", Verdict::Unproved, "not checked: not all of them were written"),
        });
    }
    drill.seconds.finish = finishing.elapsed().as_secs_f64();
    Ok(())
}

fn pages_point(read: pages::Pages) -> Point {
    let pages::Pages { files, pages, wrong, named } = read;
    if wrong == 0 {
        return Point::new(
            "pages",
            Verdict::Passed,
            format!("all {pages} pages in {files} files have their right checksum"),
        );
    }
    let text = format!("{wrong} of {pages} pages have a wrong checksum: {}", named.join(", "));
    let hint = "if `walguard verify` finds the backup whole, the original is damaged, too: run `pg_amcheck` there";
    Point::new("pages", Verdict::Failed, text).with_hint(hint)
}

/// Everything up to what the agent proved to be archived must be there: an end that is gone leaves no hole.
async fn lost_end(
    repo: &Repository,
    catalog: &Catalog,
    cancel: &CancellationToken,
) -> Result<Option<Problem>, RestoreError> {
    let Some(proof) = cancellable(cancel, repo.lease()).await??.and_then(|lease| lease.caught_up) else {
        return Ok(None);
    };
    let timeline = proof.position.timeline;
    let end = catalog.timelines.get(&timeline).and_then(|wal| wal.ranges.end()).unwrap_or(Lsn::ZERO);
    // A timeline that was left ends where it was left.
    if end >= proof.position.lsn || catalog.newest_timeline() != Some(timeline) {
        return Ok(None);
    }
    let text = format!(
        "the end of the WAL is gone: it ends at {end}, and the agent had archived it up to {}, everything of {}",
        proof.position.lsn, proof.time
    );
    let range = LsnRange { from: end, to: proof.position.lsn };
    Ok(Some(verify::explain(catalog, ProblemKind::MissingWal, (None, text), Some((timeline, range)), None)))
}

/// The plan of what is to be restored.
async fn choose(
    repo: &Repository,
    request: &Request,
    catalog: &Catalog,
    (told, chosen): (&mut String, &mut Option<Target>),
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<RestorePlan, RestoreError> {
    let planned = |target: Target| {
        let request = plan::Request { target, exclusive: false, timeline: None, backup: None, verify: false };
        async move { plan::plan(repo, &request, progress, cancel).await }
    };
    let named = match (&request.target, request.config.moment) {
        (Some(target), _) => Some(target.clone()),
        (None, Moment::Newest) => Some(Target::Latest),
        (None, Moment::Random) => None,
    };
    if let Some(target) = named {
        *told = target.describe(&jiff::tz::TimeZone::UTC);
        *chosen = Some(target.clone());
        return planned(target).await;
    }
    let Some((from, to)) = span(repo, catalog, cancel).await? else {
        *told = "latest (no span of time to choose from yet)".to_owned();
        *chosen = Some(Target::Latest);
        return planned(Target::Latest).await;
    };
    let mut tried = 0;
    loop {
        tried += 1;
        let at = PgTime::from_micros(fastrand::i64(from.micros()..=to.micros()));
        *told = format!("{at} (a random moment)");
        *chosen = Some(Target::Time(at));
        match planned(Target::Time(at)).await {
            // What is known to be lost is no news, and what was not proved to be archived is no loss.
            Err(RestoreError::MissingWal { missing, .. }) if tried < RANDOM_TRIES && is_recorded(catalog, missing) => {}
            Err(RestoreError::Unreachable { .. }) if tried < RANDOM_TRIES => {}
            other => return other,
        }
    }
}

fn is_recorded(catalog: &Catalog, missing: crate::repo::catalog::Missing) -> bool {
    let covers = |gap: &crate::repo::gap::Gap| {
        gap.timeline == missing.timeline && gap.from <= missing.from && gap.to >= missing.to
    };
    catalog.gaps.iter().any(covers)
}

/// The times from which a random moment is chosen: from the end of the oldest backup to what is surely archived.
async fn span(
    repo: &Repository,
    catalog: &Catalog,
    cancel: &CancellationToken,
) -> Result<Option<(PgTime, PgTime)>, RestoreError> {
    let windows = catalog.windows();
    let Some(from) = windows.iter().map(|window| window.from_time).min() else { return Ok(None) };
    let proved = cancellable(cancel, repo.lease()).await??.and_then(|lease| lease.caught_up).map(|proof| proof.time);
    let stored = windows.iter().filter_map(|window| window.to_time).max();
    let margin = SignedDuration::try_from(RANDOM_MARGIN).unwrap_or_default();
    let stored = stored.and_then(|at| at.checked_sub(margin).ok()).map(PgTime::from);
    let to = proved.max(stored);
    Ok(to.filter(|to| *to > from).map(|to| (from, to)))
}

/// Replays the rest in single-user mode, ends recovery, and shuts down. No other process is started, so no job of an
/// extension runs and nothing is written by anybody else.
///
/// Nobody could connect to look, so recovery does not wait at the target; and from 17 on a process that serves somebody and
/// prepares for readers of a standby at once finds its own slot for cache messages taken (Postgres: `SharedInvalBackendInit`
/// in `storage/ipc/sinvaladt.c`).
async fn end_recovery(
    binaries: &Binaries,
    data_dir: &Path,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Point, RestoreError> {
    progress.begin("make a primary of it", None);
    standby::end_as_recovery(data_dir)?; // a server in single-user mode cannot be a standby
    let name = "primary";
    let log = data_dir.join(LOG);
    let open = || File::options().create(true).append(true).open(&log).map_err(RestoreError::file("open", &log));
    let begin = open()?.metadata().map(|meta| meta.len()).unwrap_or_default();
    let program = binaries.dir.join("postgres");
    let mut command = tokio::process::Command::new(&program);
    command.arg("--single").arg("-D").arg(data_dir).current_dir(data_dir);
    let settings = [
        ("data_directory", data_dir.display().to_string()),
        ("ident_file", data_dir.join("pg_ident.conf").display().to_string()),
        ("recovery_target_action", "promote".to_owned()),
        ("hot_standby", "off".to_owned()),
        ("logging_collector", "off".to_owned()),
        ("log_destination", "stderr".to_owned()),
        ("ssl", "off".to_owned()),
    ];
    for (setting, value) in settings {
        command.arg("-c").arg(format!("{setting}={value}"));
    }
    command.arg("template1");
    command.stdin(Stdio::null()).stdout(open()?).stderr(open()?).kill_on_drop(true);
    let mut child = command.spawn().map_err(RestoreError::file("run", &program))?;
    let status = cancellable(cancel, child.wait()).await?.map_err(RestoreError::file("wait for", &program))?;
    progress.end();
    if status.success() && directory::was_shut_down(data_dir) {
        let text = "recovery was ended, a new timeline begun, and the server shut down cleanly";
        return Ok(Point::new(name, Verdict::Passed, text));
    }
    let text = fs::read(&log).unwrap_or_default();
    let text = text.get(usize::try_from(begin).unwrap_or_default()..).unwrap_or_default();
    let text = String::from_utf8_lossy(text.get(text.len().saturating_sub(2_000)..).unwrap_or_default()).into_owned();
    let text = format!("recovery could not be ended ({status}); the end of the log: {}", text.trim());
    Ok(Point::new(name, Verdict::Failed, text).with_hint("look at it with `walguard drill --keep`"))
}

/// Which damage an error speaks of, and what is unreachable because of it. A server that ended by itself does not say, and
/// of WAL it is not known what follows; then all that was to be replayed is read.
async fn named(
    repo: &Repository,
    (target, backup): (Option<Target>, &Option<String>),
    error: &RestoreError,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Option<Problem>, RestoreError> {
    let catalog = match cancellable(cancel, repo.catalog(CatalogScope::Everything)).await? {
        Ok(catalog) => catalog,
        Err(error) => {
            tracing::warn!("what follows from the damage is not known: {}", Chain(&error));
            return Ok(None);
        }
    };
    if let Some(problem) = problem_of(repo, &catalog, backup.as_deref(), error) {
        return Ok(Some(problem));
    }
    if !matches!(error, RestoreError::Server { .. } | RestoreError::NotAsPlanned { .. } | RestoreError::Wal(_)) {
        return Ok(None);
    }
    let Some(target) = target else { return Ok(None) };
    let again = plan::Request { target, exclusive: false, timeline: None, backup: backup.clone(), verify: true };
    match Box::pin(plan::plan(repo, &again, progress, cancel)).await {
        Err(RestoreError::Cancelled) => Err(RestoreError::Cancelled),
        Err(found) => Ok(problem_of(repo, &catalog, backup.as_deref(), &found)),
        Ok(_) => Ok(None),
    }
}

fn problem_of(repo: &Repository, catalog: &Catalog, backup: Option<&str>, error: &RestoreError) -> Option<Problem> {
    let of_backup = |key: &str, kind, problem: String| {
        let label = backup.map(str::to_owned);
        verify::explain(catalog, kind, (Some(key.to_owned()), problem), None, label)
    };
    let gone = |key: &str| {
        of_backup(key, ProblemKind::MissingObject, "the backup's manifest names it, and it is not there".to_owned())
    };
    match error {
        RestoreError::MissingWal { missing, .. } => {
            // What a listing shows was told already.
            let range = LsnRange { from: missing.from, to: missing.to };
            let wal = Some((missing.timeline, range));
            let problem = verify::explain(catalog, ProblemKind::MissingWal, (None, missing.to_string()), wal, None);
            let known = verify::apparent(repo.layout(), catalog);
            (!known.iter().any(|known| known.unreachable == problem.unreachable)).then_some(problem)
        }
        RestoreError::DamagedWal { segment, problem, .. } => {
            let name = SegmentName::parse(segment, catalog.identity.segment_size).ok()?;
            let range = LsnRange { from: name.start(), to: name.end() };
            let key = repo.layout().segment(&name);
            let wal = Some((name.timeline, range));
            Some(verify::explain(catalog, ProblemKind::Damaged, (Some(key), problem.clone()), wal, None))
        }
        RestoreError::Backup(error) | RestoreError::Extract(ExtractError::Backup(error)) => match error {
            BackupError::Damaged { key, problem } => Some(of_backup(key, ProblemKind::Damaged, problem.clone())),
            BackupError::Repo(RepoError::Damaged { key, problem }) => {
                Some(of_backup(key, ProblemKind::Damaged, problem.clone()))
            }
            BackupError::Repo(RepoError::Store(StoreError::NotFound { key })) => Some(gone(key)),
            _ => None,
        },
        _ => None,
    }
}

/// Looks up when the transactions ended that cannot be restored: indexes outlive the WAL that they tell of.
async fn tell_times(repo: &Repository, damage: &mut [Problem]) {
    let Ok(catalog) = repo.catalog(CatalogScope::WithoutWal).await else { return };
    for unreachable in damage.iter_mut().flat_map(|problem| &mut problem.unreachable) {
        let Some(path) = catalog.history(unreachable.timeline) else { continue };
        let lookup = repo.lookup(path.clone(), catalog.identity.segment_size);
        let range = LsnRange { from: unreachable.from, to: unreachable.to };
        if let Ok((summary, _)) = lookup.summary(range).await {
            (unreachable.from_time, unreachable.to_time) =
                summary.end_times.map_or((None, None), |(from, to)| (Some(from), Some(to)));
        }
    }
}

/// How much a drill may take.
#[derive(Debug)]
struct Limits {
    bytes: Option<u64>,
    /// The limit was set, and does not come from what is free.
    is_set: bool,
    began: Instant,
    time: Duration,
}

impl Limits {
    fn of(config: &Config, scratch: &Scratch, began: Instant) -> Self {
        let free = directory::free_bytes(&scratch.dir).map(|free| free / 100 * FREE_SHARE);
        let set = config.max_bytes.map(|bytes| bytes.as_u64());
        let bytes = [free, set].into_iter().flatten().min();
        Self { bytes, is_set: set.is_some() && bytes == set, began, time: config.max_time }
    }

    fn too_much(&self, what: String) -> RestoreError {
        let hint = match self.is_set {
            true => "raise --max-bytes, or `drill.max_bytes`, if the disk has the room",
            false => "make room, or choose another disk with --scratch-dir or `drill.scratch_dir`",
        };
        RestoreError::Limit { problem: what, hint: hint.to_owned() }
    }

    /// The base backup must fit, before any of it is fetched.
    fn check(&self, needed: u64) -> Result<(), RestoreError> {
        match self.bytes {
            Some(bytes) if needed > bytes => Err(self.too_much(format!(
                "the base backup takes {} of disk, and the drill may take {}",
                ByteSize::b(needed).display().iec(),
                ByteSize::b(bytes).display().iec()
            ))),
            _ => Ok(()),
        }
    }

    /// Waits until a limit is passed. Tells in `most` what the directory took at most.
    async fn watch(&self, dir: &Path, most: &AtomicU64) -> RestoreError {
        let mut pause = LOOK_EVERY;
        loop {
            let left = self.time.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                let problem = format!("the drill took longer than {} s", self.time.as_secs());
                let hint = "raise --max-time, or `drill.max_time`; more frequent base backups leave less WAL to replay";
                return RestoreError::Limit { problem, hint: hint.to_owned() };
            }
            let (place, looking) = (dir.to_owned(), Instant::now());
            let used = tokio::task::spawn_blocking(move || disk_usage(&place)).await.unwrap_or_default();
            most.fetch_max(used, Ordering::Relaxed);
            if let Some(bytes) = self.bytes.filter(|bytes| used > *bytes) {
                return self.too_much(format!(
                    "the drill took {} of disk, and may take {}",
                    ByteSize::b(used).display().iec(),
                    ByteSize::b(bytes).display().iec()
                ));
            }
            pause = pause.max(looking.elapsed().saturating_mul(10));
            tokio::time::sleep(pause.min(left)).await;
        }
    }
}

/// What a directory takes of its disk, in bytes. What goes meanwhile is not counted.
fn disk_usage(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => disk_usage(&path),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    };
    entries.flatten().map(|entry| size(entry.path())).sum()
}

/// The directory of a drill: `data`, tablespaces, and a socket. With this value servers in it end and it goes, unless it is
/// kept.
#[derive(Debug)]
struct Scratch {
    /// The directory that is given; made if it was not there.
    root: PathBuf,
    was_made: bool,
    dir: PathBuf,
    socket_dir: PathBuf,
    keep: bool,
    /// Held as long as this drill is the only one here.
    lock: Option<File>,
}

impl Scratch {
    fn make(root: &Path, keep: bool) -> Result<Self, RestoreError> {
        let refuse = |problem: String, hint: &str| RestoreError::Directory {
            path: root.to_owned(),
            problem,
            hint: hint.to_owned(),
        };
        let other = "make it first, for the user that runs the drill, or choose another with --scratch-dir or \
                     `drill.scratch_dir`";
        if !root.is_absolute() {
            return Err(refuse("is no absolute path".to_owned(), "give the whole path with --scratch-dir"));
        }
        let was_made = match DirBuilder::new().mode(0o700).create(root) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(refuse(format!("cannot be made: {error}"), other)),
        };
        let mut made =
            Self { root: root.to_owned(), was_made, dir: PathBuf::new(), socket_dir: PathBuf::new(), keep, lock: None };
        let lock = File::open(root).map_err(|error| refuse(format!("cannot be used: {error}"), other))?;
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return Err(refuse(
                "is in use: another drill runs there".to_owned(),
                "wait until it has ended, or choose another place with --scratch-dir",
            ));
        }
        made.lock = Some(lock);
        for leftover in directories(root, PREFIX) {
            tracing::warn!(directory = %leftover.display(), "removing what an earlier drill left behind");
            sweep(&leftover);
        }
        let prefix = if keep { PREFIX_KEPT } else { PREFIX };
        made.dir = root.join(format!("{prefix}{:08x}", fastrand::u32(..)));
        let make = |path: &Path| DirBuilder::new().mode(0o700).create(path);
        make(&made.dir).map_err(|error| refuse(format!("cannot be written: {error}"), other))?;
        made.socket_dir = made.dir.join("s");
        if made.socket_dir.as_os_str().len() > SOCKET_DIR_BYTES_MAX {
            // The path of a socket is short. What lies elsewhere is found by a link.
            let elsewhere = std::env::temp_dir().join(format!("{PREFIX}{:08x}", fastrand::u32(..)));
            std::os::unix::fs::symlink(&elsewhere, &made.socket_dir).map_err(RestoreError::file("make", &elsewhere))?;
            made.socket_dir = elsewhere;
        }
        make(&made.socket_dir).map_err(RestoreError::file("make", &made.socket_dir))?;
        Ok(made)
    }

    fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Every tablespace has its place in the scratch directory.
    async fn tablespaces(
        &self,
        repo: &Repository,
        plan: &RestorePlan,
        cancel: &CancellationToken,
    ) -> Result<Vec<(String, PathBuf)>, RestoreError> {
        let manifest = cancellable(cancel, manifest::read(repo, &plan.backup.label)).await??;
        let outside = manifest.archives.iter().filter(|archive| {
            archive.name.parse::<u32>().is_ok() && archive.location != format!("pg_tblspc/{}", archive.name)
        });
        let places: Vec<_> =
            outside.map(|archive| (archive.name.clone(), self.dir.join(format!("space-{}", archive.name)))).collect();
        Ok(places)
    }

    /// Removes everything; gives the directory if it is kept.
    async fn remove(self) -> Option<PathBuf> {
        let kept = self.keep.then(|| self.dir.clone());
        let _ = tokio::task::spawn_blocking(move || drop(self)).await; // a panic in it is shown by itself
        kept
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.dir.as_os_str().is_empty() {
            if self.keep {
                end_servers(&self.dir.join("data"));
            } else {
                sweep(&self.dir);
            }
            if !self.socket_dir.starts_with(&self.dir) {
                let _ = fs::remove_dir_all(&self.socket_dir);
            }
        }
        if self.was_made && self.lock.is_some() {
            let _ = fs::remove_dir(&self.root); // unless somebody put something else there
        }
    }
}

/// The directories in `root` whose names begin so.
fn directories(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let is_ours = |entry: &fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with(prefix) && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    entries.flatten().filter(is_ours).map(|entry| entry.path()).collect()
}

/// Ends servers in a drill's directory and removes it.
fn sweep(dir: &Path) {
    end_servers(&dir.join("data"));
    let _ = control::remove(&dir.join("data")); // it may lie in memory; the directory goes next
    if let Ok(elsewhere) = fs::read_link(dir.join("s"))
        && elsewhere.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
    {
        let _ = fs::remove_dir_all(&elsewhere);
    }
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::error!(directory = %dir.display(), "failed to remove the directory of a drill: {error}");
    }
}

/// Ends all processes that work in a data directory, as all of a server do: at once, for nothing of it is needed.
fn end_servers(data_dir: &Path) {
    let began = Instant::now();
    let mut asked = false;
    loop {
        let pids = directory::all_working_in(data_dir);
        if pids.is_empty() {
            return;
        }
        let signal = if began.elapsed() > QUIT_PATIENCE { Signal::KILL } else { Signal::QUIT };
        if !asked || signal == Signal::KILL {
            asked = true;
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, signal); // it has ended meanwhile
            }
        }
        if began.elapsed() > QUIT_PATIENCE * 2 {
            tracing::error!(directory = %data_dir.display(), "a server of a drill does not end");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_with_the_drill_and_what_a_killed_one_left_goes_with_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("scratch");
        let scratch = Scratch::make(&root, false).unwrap();
        let data = scratch.data_dir();
        fs::create_dir(&data).unwrap();
        let busy = Scratch::make(&root, false).unwrap_err();
        assert!(busy.to_string().contains("another drill runs there") && busy.hint().is_some(), "{busy}");
        assert!(data.exists(), "whoever was refused removes nothing");
        drop(scratch);
        assert!(!root.exists());

        fs::create_dir(&root).unwrap();
        let left = root.join("walguard-drill-0badcafe");
        fs::create_dir_all(left.join("data/base")).unwrap();
        fs::create_dir_all(left.join("data/global")).unwrap();
        control::keep_in_memory(&left.join("data"), b"control").unwrap();
        let memory = control::in_memory(&left.join("data")).unwrap();
        let mut server = std::process::Command::new("sleep").arg("60").current_dir(left.join("data")).spawn().unwrap();
        // It is reaped by us, so it is waited for beside.
        let ended = std::thread::spawn(move || server.wait().unwrap());
        let kept = Scratch::make(&root, true).unwrap();
        assert!(!ended.join().unwrap().success(), "its server was ended");
        assert!(!left.exists() && !memory.exists());
        let dir = kept.dir.clone();
        drop(kept);
        assert!(dir.exists(), "what is to be kept stays");
        drop(Scratch::make(&root, false).unwrap());
        assert!(dir.exists(), "also by the next");
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_has_its_socket_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let root =
            folder.path().join("a-name-that-is-so-long-that-the-path-of-a-socket-in-it-would-have-too-many-bytes");
        let scratch = Scratch::make(&root, false).unwrap();
        let socket = scratch.socket_dir.clone();
        assert!(socket.is_dir() && socket.as_os_str().len() <= SOCKET_DIR_BYTES_MAX, "{}", socket.display());
        drop(scratch);
        assert!(!socket.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn limits_of_time_and_disk_end_a_drill() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), vec![1; 100_000]).unwrap();
        let most = AtomicU64::new(0);
        let limits = |bytes, seconds| Limits {
            bytes: Some(bytes),
            is_set: true,
            began: Instant::now(),
            time: Duration::from_secs(seconds),
        };
        let over = limits(50_000, 60).watch(folder.path(), &most).await;
        assert!(over.to_string().contains("of disk") && over.hint().unwrap().contains("max_bytes"), "{over}");
        assert!(most.load(Ordering::Relaxed) >= 100_000);
        let over = limits(1 << 30, 0).watch(folder.path(), &most).await;
        assert!(over.to_string().contains("longer than 0 s") && over.hint().unwrap().contains("max_time"), "{over}");
        assert!(limits(50_000, 60).check(50_001).is_err() && limits(50_000, 60).check(50_000).is_ok());
    }

    #[test]
    fn the_age_of_an_alarm_follows_the_schedule_unless_it_is_set() {
        let config = Config { max_time: Duration::from_secs(60), ..Config::default() };
        assert_eq!(config.age_max(), None);
        let daily = Config { every: Duration::from_secs(86_400), ..config };
        assert_eq!(daily.age_max(), Some(Duration::from_secs(2 * 86_400 + 60)));
        let set = Config { max_age: Some(Duration::from_secs(7)), ..daily };
        assert_eq!(set.age_max(), Some(Duration::from_secs(7)));
    }
}
