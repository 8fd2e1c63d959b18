//! Proofs that restores work: the record of each drill, `drills/<time>.json`, written once.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};

use super::store::{Created, StoreError};
use super::verify::Problem;
use super::{RepoError, Repository, SMALL_READS_MAX};
use crate::pg::{Lsn, PgTime, TimelineId};

/// The version of a record; greater numbers only add fields that may be left out.
pub const FORMAT: u32 = 1;

/// Records that are kept: a year of weekly drills, or three months of daily ones.
const KEPT: usize = 100;

/// What became of one thing that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It is as it should be.
    Passed,
    /// It is not.
    Failed,
    /// It could not be looked at, or there is nothing to compare it with; the text says why.
    Unproved,
}

/// One thing that was looked at after a restore.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Point {
    /// What: `target`, `pages`, `rows of shop.public.users` ...
    pub name: String,
    /// What became of it.
    pub verdict: Verdict,
    /// In a sentence.
    pub told: String,
    /// What should have been found, where that is one value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected: Option<String>,
    /// What was found instead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub found: Option<String>,
    /// What the operator can do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Point {
    /// A point without values and without a hint.
    pub fn new(name: impl Into<String>, verdict: Verdict, told: impl Into<String>) -> Self {
        Self { name: name.into(), verdict, told: told.into(), expected: None, found: None, hint: None }
    }

    /// The same with what the operator can do.
    #[must_use]
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

/// How a drill ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The database of that moment is there, and everything that was looked at is as it should be.
    Proven,
    /// It is there, and something is not as it should be.
    Wrong,
    /// It could not be restored, or what is kept is damaged.
    Failed,
}

impl Outcome {
    /// Its name, as in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Proven => "proven",
            Self::Wrong => "wrong",
            Self::Failed => "failed",
        }
    }
}

/// The moment that a drill restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ReachedMoment {
    /// The timeline.
    pub timeline: TimelineId,
    /// The end of the last record replayed.
    pub lsn: Lsn,
    /// When the last transaction had committed that is kept; `None` if none did since the backup began.
    pub time: Option<PgTime>,
}

/// How long the parts of a drill took, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Seconds {
    /// Finding out what to restore.
    pub plan: f64,
    /// Fetching and writing the base backup, or copying its rows.
    pub extract: f64,
    /// Replaying WAL up to the target, or repeating changes.
    pub replay: f64,
    /// Everything that was looked at while the server ran.
    pub checks: f64,
    /// Making a primary of it, stopping that, and reading all pages; of a database, building indexes and constraints.
    pub finish: f64,
}

/// What a drill did and found.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Drill {
    /// The version of the record.
    pub format: u32,
    /// When it began.
    pub started_at: Timestamp,
    /// When it ended.
    pub finished_at: Timestamp,
    /// The machine that it ran on.
    pub host: String,
    /// What was to be restored: `latest`, `2025-12-17 ... (a random moment)`.
    pub target: String,
    /// The database that was rebuilt, where changes of databases are kept and not a cluster's WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// How it ended.
    pub outcome: Outcome,
    /// The base backup that it began with.
    #[serde(default)]
    pub backup: Option<String>,
    /// The moment that was reached.
    #[serde(default)]
    pub reached: Option<ReachedMoment>,
    /// Bytes of the base backup, unpacked.
    #[serde(default)]
    pub content_bytes: u64,
    /// Bytes of WAL that were to be replayed.
    #[serde(default)]
    pub wal_bytes: u64,
    /// Changes of rows that were to be repeated, of a database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes: Option<u64>,
    /// The most that it took of the disk, in bytes, as far as that was seen.
    #[serde(default)]
    pub scratch_bytes_max: u64,
    /// How long its parts took.
    #[serde(default)]
    pub seconds: Seconds,
    /// What was looked at.
    #[serde(default)]
    pub points: Vec<Point>,
    /// Damage of the repository, with the moments that are unreachable because of it.
    #[serde(default)]
    pub damage: Vec<Problem>,
    /// Why it failed.
    #[serde(default)]
    pub error: Option<String>,
    /// What the operator can do about that.
    #[serde(default)]
    pub hint: Option<String>,
}

impl Drill {
    /// How long it took, in seconds.
    pub fn took_seconds(&self) -> f64 {
        self.finished_at.duration_since(self.started_at).as_secs_f64().max(0.0)
    }

    /// Why it is no proof, in a line; `None` if it is one.
    pub fn problem(&self) -> Option<String> {
        let damage = || {
            let first = self.damage.first()?;
            Some(first.key.as_ref().map_or_else(|| first.problem.clone(), |key| format!("{key}: {}", first.problem)))
        };
        let wrong = || {
            let failed = |point: &&Point| point.verdict == Verdict::Failed;
            let first = self.points.iter().find(failed)?;
            let more = match self.points.iter().filter(failed).count() {
                1 => String::new(),
                number => format!(", and {} more", number - 1),
            };
            Some(format!("{}: {}{more}", first.name, first.told))
        };
        match self.outcome {
            Outcome::Proven => None,
            Outcome::Wrong | Outcome::Failed => {
                let told = self.error.clone().or_else(damage).or_else(wrong);
                Some(told.unwrap_or_else(|| self.outcome.as_str().to_owned()))
            }
        }
    }
}

impl Repository {
    /// Writes down what a drill found, and removes the records that are more than a hundred drills old. Gives the key.
    ///
    /// # Errors
    /// Of the store. An old record that cannot be removed stays.
    pub async fn put_drill(&self, drill: &Drill) -> Result<String, RepoError> {
        let mut json = serde_json::to_vec_pretty(drill).expect("a drill becomes JSON");
        json.push(b'\n');
        // Keys have whole seconds: two drills that began in the same one stand beside each other.
        for second in 0..60 {
            let at = drill.started_at.saturating_add(SignedDuration::from_secs(second));
            let key = self.layout().drill(at.unwrap_or(drill.started_at));
            let is_ours = match self.store().create(&key, json.clone().into()).await? {
                Created::New => true,
                // A try of ours whose answer was lost.
                Created::Exists => self.read_small(&key).await?.is_some_and(|there| there == json),
            };
            if is_ours {
                self.remove_old_drills().await;
                return Ok(key);
            }
        }
        Err(RepoError::Store(StoreError::Unavailable {
            op: "write the record of a drill",
            key: self.layout().drill(drill.started_at),
            source: "others write records all the time".into(),
            retry_after: None,
        }))
    }

    /// The newest records of drills, oldest first, at most so many. One that cannot be read is left out, and the log says so.
    ///
    /// # Errors
    /// Of the store.
    pub async fn drills(&self, newest: usize) -> Result<Vec<Drill>, RepoError> {
        let mut keys = self.drill_keys().await?;
        keys.drain(..keys.len().saturating_sub(newest));
        let reads = stream::iter(keys).map(|key| async move {
            let Some(json) = self.read_small(&key).await? else { return Ok::<_, RepoError>(None) };
            match serde_json::from_slice::<Drill>(&json) {
                Ok(drill) if drill.format <= FORMAT => Ok(Some(drill)),
                Ok(drill) => {
                    tracing::warn!(
                        key,
                        "a record of a drill has format {}, which this walguard cannot read",
                        drill.format
                    );
                    Ok(None)
                }
                Err(error) => {
                    tracing::warn!(key, "a record of a drill cannot be read: {error}");
                    Ok(None)
                }
            }
        });
        let read: Vec<_> = reads.buffered(SMALL_READS_MAX).try_collect().await?;
        Ok(read.into_iter().flatten().collect())
    }

    async fn drill_keys(&self) -> Result<Vec<String>, RepoError> {
        let prefix = self.layout().drills_folder();
        let (objects, _) = self.children(prefix).await?;
        let mut keys: Vec<_> = objects.into_iter().map(|object| object.key).collect();
        keys.retain(|key| key.ends_with(".json"));
        keys.sort_unstable();
        Ok(keys)
    }

    /// A store may forbid it (object lock): they are small.
    async fn remove_old_drills(&self) {
        let Ok(keys) = self.drill_keys().await else { return };
        for key in keys.iter().rev().skip(KEPT) {
            if let Err(error) = self.store().delete(key).await {
                tracing::debug!(key, "an old record of a drill stays: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;

    fn drill(second: i64) -> Drill {
        let at = Timestamp::from_second(1_700_000_000 + second).unwrap();
        Drill {
            format: FORMAT,
            started_at: at,
            finished_at: at + SignedDuration::from_secs(90),
            host: "db9".to_owned(),
            target: "latest".to_owned(),
            database: None,
            outcome: Outcome::Proven,
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
        }
    }

    #[tokio::test]
    async fn records_come_back_oldest_first_and_two_of_one_second_are_both_there() {
        let repo = repository();
        let other = Drill { target: "xid:7".to_owned(), ..drill(5) };
        for drill in [&drill(5), &drill(0), &other] {
            repo.put_drill(drill).await.unwrap();
        }
        assert_eq!(repo.put_drill(&drill(0)).await.unwrap(), repo.layout().drill(drill(0).started_at), "once");
        assert_eq!(repo.drills(10).await.unwrap(), [drill(0), drill(5), other.clone()]);
        assert_eq!(repo.drills(1).await.unwrap(), [other]);
        let broken = repo.layout().drill(drill(9).started_at);
        repo.store().create(&broken, "{".into()).await.unwrap();
        assert_eq!(repo.drills(10).await.unwrap().len(), 3, "what cannot be read hinders no other");
    }

    #[tokio::test]
    async fn only_the_newest_hundred_are_kept() {
        let repo = repository();
        for second in 0..105 {
            repo.put_drill(&drill(second)).await.unwrap();
        }
        let kept = repo.drills(1_000).await.unwrap();
        assert_eq!((kept.len(), &kept[0]), (100, &drill(5)));
    }

    #[test]
    fn what_keeps_it_from_being_a_proof_is_told_in_a_line() {
        assert_eq!(drill(0).problem(), None);
        let failed = Point::new("rows of t", Verdict::Failed, "5 rows, and 7 were there");
        let points = vec![Point::new("target", Verdict::Passed, "as planned"), failed.clone(), failed];
        let wrong = Drill { outcome: Outcome::Wrong, points, ..drill(0) };
        assert_eq!(wrong.problem().unwrap(), "rows of t: 5 rows, and 7 were there, and 1 more");
    }
}
