//! A drill: the newest state, or a random moment, is restored into scratch space, looked at, and thrown away.
//!
//! The scratch server has no TCP port, only a socket in a private directory. Restored from a cluster's WAL, it stays in recovery while it is asked, so it
//! starts no subscription, no job of an extension and no archiver, and cannot be written to. Then it is stopped, and
//! PostgreSQL in single-user mode, which starts no other process either, replays what was not on disk, ends recovery and
//! shuts down: the proof that a primary would come of it. After that everything is on disk, and every page of it is read.
//!
//! Nothing is left behind, however the drill ends; what one that was killed left is removed by the next.

mod logical;
mod physical;
mod scratch;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use self::scratch::{Limits, Scratch};
use super::error::RestoreError;
use super::proof::{Check, Verdict};
use super::rebuild::RebuildError;
use super::recovery::FetchCommand;
use super::run;
use super::target::Target;
use crate::backoff::Chain;
use crate::progress::Progress;
use crate::repo::Repository;
use crate::repo::drills::{Drill, FORMAT, Outcome, Seconds};

/// How often another random moment is chosen where none can be restored, because of a gap that is known.
const RANDOM_TRIES: u32 = 20;

/// A commit within this of the newest archived moment may not be archived yet.
const RANDOM_MARGIN: Duration = Duration::from_secs(2);

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

/// What the repository keeps of the original, and a drill restores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// Base backups and WAL of a cluster.
    Cluster,
    /// Bases and changes of a database, by its name; of the only one, if that is not given.
    Database(Option<String>),
}

/// What a drill is to do.
#[derive(Clone, Debug)]
pub struct Request {
    /// Of what.
    pub kept: Kept,
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
        database: None,
        outcome: Outcome::Failed,
        backup: None,
        reached: None,
        content_bytes: 0,
        wal_bytes: 0,
        changes: None,
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
        let place = (&scratch, &limits);
        let mut work = Box::pin(async {
            match &request.kept {
                Kept::Cluster => {
                    let found = (&mut drill, &mut target);
                    physical::carry_out(repo, request, place, found, progress, &ends).await
                }
                Kept::Database(name) => {
                    let wanted = (request, name.as_deref());
                    logical::carry_out(repo, wanted, place, &mut drill, progress, &ends).await
                }
            }
        });
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
            if request.kept == Kept::Cluster {
                let wanted = (target, &drill.backup);
                drill.damage.extend(physical::named(repo, wanted, &error, progress, cancel).await?);
            }
            drill.error = Some(Chain(&error).to_string());
            drill.hint = match (&error, &kept) {
                // The log that it names is gone.
                (RestoreError::Server { is_disk_full: false, .. } | RestoreError::NotAsPlanned { .. }, None) => {
                    Some("look at the server and its log with `walguard drill --keep`".to_owned())
                }
                _ => error.hint(),
            };
        }
    }
    if request.kept == Kept::Cluster {
        physical::tell_times(repo, &mut drill.damage).await;
    }
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
        || matches!(
            error,
            RestoreError::Rebuild(error) if matches!(**error, RebuildError::Database(_) | RebuildError::Target(_))
        )
}

#[cfg(test)]
mod tests {
    use super::*;

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
