//! How long restores took: a record of each, `restores/<time>.json`, written once. From these the next plan says how long it
//! will take, and which backup is the nearest start.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};

use super::store::{Created, ObjectInfo};
use super::{RepoError, Repository, SMALL_READS_MAX};

/// Records that are kept, and those that rates are made of: machines and disks change.
const KEPT: usize = 32;
const COUNTED: usize = 5;

/// What takes less than this many bytes, or seconds, tells more of how long it takes to begin than of how fast it is.
const BYTES_MIN: u64 = 64 << 20;
const SECONDS_MIN: f64 = 0.05;

/// How long the parts of one restore took.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RestoreRecord {
    /// When it was done.
    pub at: Timestamp,
    /// The name of the machine, for people.
    pub host: String,
    /// The backup.
    pub label: String,
    /// Bytes of the backup's archives that were fetched, unpacked and written.
    pub extracted_bytes: u64,
    /// How long that took, in seconds.
    pub extract_seconds: f64,
    /// Bytes of WAL that were fetched and replayed, both at once.
    pub replayed_bytes: u64,
    /// How long that took, from the server's start to the target, in seconds.
    pub replay_seconds: f64,
    /// Promoting or stopping the server, and waiting until everything was on disk, in seconds.
    pub finish_seconds: f64,
}

/// How fast restores are.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Rates {
    /// Bytes of a base backup in a second.
    pub extracted_per_second: f64,
    /// Bytes of WAL in a second.
    pub replayed_per_second: f64,
    /// Starting the server, and finishing, in seconds.
    pub fixed_seconds: f64,
    /// So many restores were measured for it, the latest of this repository; none: it is a guess.
    pub measured: usize,
}

impl Default for Rates {
    /// A guess for an idle machine with a quick disk, until a restore of the repository was measured. On the busy two cores
    /// of `benches/RESULTS.md` a third to a half of it was reached.
    fn default() -> Self {
        Self { extracted_per_second: 600e6, replayed_per_second: 350e6, fixed_seconds: 2.0, measured: 0 }
    }
}

impl Rates {
    /// The middle of what was measured; of what no record tells enough, the default.
    pub fn of(records: &[RestoreRecord]) -> Self {
        let default = Self::default();
        let is_enough = |bytes: u64, seconds: f64| bytes >= BYTES_MIN && seconds >= SECONDS_MIN;
        let rate = |bytes: u64, seconds: f64| is_enough(bytes, seconds).then(|| bytes as f64 / seconds);
        let extracted = records.iter().filter_map(|record| rate(record.extracted_bytes, record.extract_seconds));
        let replayed = records.iter().filter_map(|record| rate(record.replayed_bytes, record.replay_seconds));
        let (extracted, replayed) = (middle(extracted), middle(replayed));
        let is_told = |record: &&RestoreRecord| {
            is_enough(record.extracted_bytes, record.extract_seconds)
                || is_enough(record.replayed_bytes, record.replay_seconds)
        };
        let fixed = records.iter().filter(is_told).map(|record| record.finish_seconds);
        let fixed = fixed.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
        Self {
            extracted_per_second: extracted.unwrap_or(default.extracted_per_second),
            replayed_per_second: replayed.unwrap_or(default.replayed_per_second),
            fixed_seconds: middle(fixed).unwrap_or(default.fixed_seconds),
            measured: records.iter().filter(is_told).count(),
        }
    }

    /// About how long it takes to restore a backup of so many bytes and to replay so much WAL, in seconds.
    pub fn estimate(&self, content_bytes: u64, wal_bytes: u64) -> f64 {
        let extract = content_bytes as f64 / self.extracted_per_second;
        extract + wal_bytes as f64 / self.replayed_per_second + self.fixed_seconds
    }
}

fn middle(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

impl Repository {
    /// How fast the latest restores from this repository were. Records that cannot be read are left out.
    ///
    /// # Errors
    /// Of the store.
    pub async fn restore_rates(&self) -> Result<Rates, RepoError> {
        let mut keys = self.restore_keys().await?;
        keys.drain(..keys.len().saturating_sub(COUNTED));
        let reads = stream::iter(keys).map(|key| async move {
            let json = self.read_small(&key).await.ok().flatten()?;
            serde_json::from_slice(&json).ok()
        });
        let records: Vec<Option<RestoreRecord>> = reads.buffered(SMALL_READS_MAX).collect().await;
        Ok(Rates::of(&records.into_iter().flatten().collect::<Vec<_>>()))
    }

    /// Writes down how long a restore took, and removes the oldest records.
    ///
    /// # Errors
    /// Of the store: whoever restores may not be allowed to write. An old record that cannot be removed stays.
    pub async fn put_restore(&self, record: &RestoreRecord) -> Result<(), RepoError> {
        let json = serde_json::to_vec_pretty(record).expect("a record becomes JSON");
        // Keys have whole seconds: two restores that ended in the same one stand beside each other.
        for second in 0..60 {
            let at = record.at.saturating_add(SignedDuration::from_secs(second)).unwrap_or(record.at);
            if self.store().create(&self.layout().restore(at), json.clone().into()).await? == Created::New {
                break;
            }
        }
        let keys = self.restore_keys().await?;
        for key in keys.iter().take(keys.len().saturating_sub(KEPT)) {
            if self.store().delete(key).await.is_err() {
                break; // locked, or forbidden
            }
        }
        Ok(())
    }

    async fn restore_keys(&self) -> Result<Vec<String>, RepoError> {
        let objects: Vec<ObjectInfo> = self.objects(self.layout().restores_folder(), None).try_collect().await?;
        let mut keys: Vec<_> = objects.into_iter().map(|object| object.key).collect();
        keys.retain(|key| key.ends_with(".json"));
        keys.sort_unstable();
        Ok(keys)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;

    fn record(second: i64, extracted_mib: u64, replayed_mib: u64) -> RestoreRecord {
        RestoreRecord {
            at: Timestamp::from_second(1_800_000_000 + second).unwrap(),
            host: "db2".to_owned(),
            label: "b".to_owned(),
            extracted_bytes: extracted_mib << 20,
            extract_seconds: 10.0,
            replayed_bytes: replayed_mib << 20,
            replay_seconds: 10.0,
            finish_seconds: 0.5,
        }
    }

    #[test]
    fn rates_are_the_middle_of_what_was_measured_and_small_restores_say_nothing() {
        assert_eq!(Rates::of(&[]), Rates::default());
        assert_eq!(Rates::of(&[record(0, 1, 1)]), Rates::default());
        let rates = Rates::of(&[record(0, 1_000, 10), record(1, 3_000, 10), record(2, 90_000, 10), record(3, 0, 0)]);
        assert_eq!(rates.extracted_per_second, 300.0 * f64::from(1 << 20));
        assert_eq!(rates.replayed_per_second, Rates::default().replayed_per_second);
        assert_eq!((rates.fixed_seconds, rates.measured), (0.5, 3));
        assert!((rates.estimate(600 << 20, 0) - 2.5).abs() < 1e-9);
        let broken = RestoreRecord { extract_seconds: f64::NAN, finish_seconds: f64::NAN, ..record(0, 1_000, 0) };
        assert_eq!(Rates::of(&[broken]), Rates { measured: 0, ..Rates::default() });
    }

    #[tokio::test]
    async fn the_latest_restores_count_and_the_oldest_are_removed() {
        let repo = repository();
        assert_eq!(repo.restore_rates().await.unwrap(), Rates::default());
        for second in 0..40 {
            repo.put_restore(&record(second, 1_000 * (second as u64 + 1), 0)).await.unwrap();
        }
        repo.put_restore(&record(39, 1_000, 0)).await.unwrap();
        assert_eq!(repo.restore_keys().await.unwrap().len(), KEPT);
        let rates = repo.restore_rates().await.unwrap();
        assert_eq!((rates.measured, rates.extracted_per_second), (COUNTED, 3_800.0 * f64::from(1 << 20)));
    }
}
