//! What people were told: `incidents/<id>/delivered-<channel>-<event>.json`, written once, after a channel took it.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::layout::check_name;
use super::store::Created;
use super::{RepoError, Repository, SMALL_READS_MAX};
use crate::notify::Told;

/// Records of one incident that are read: seven events and the times that it grew, for each of 32 channels.
const RECORDS_MAX: usize = 2048;

impl Repository {
    /// Writes down that a channel was told. `Exists` means that it was written down before, by us or by the agent before
    /// us: told is told, so what it says does not matter.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_delivery(&self, told: &Told) -> Result<Created, RepoError> {
        let key = self.layout().delivery(&told.incident, &told.channel, &told.key());
        let mut json = serde_json::to_vec_pretty(told).expect("a record becomes JSON");
        json.push(b'\n');
        Ok(self.store().create(&key, json.into()).await?)
    }

    /// What was told of an incident. A record that cannot be read is left out and logged: at worst something is told
    /// twice.
    ///
    /// # Errors
    /// Of the store.
    pub async fn deliveries(&self, incident: &str) -> Result<Vec<Told>, RepoError> {
        if check_name(incident).is_err() {
            return Ok(Vec::new());
        }
        let listed = self.objects(self.layout().deliveries_prefix(incident), None).take(RECORDS_MAX);
        let keys: Vec<String> = listed.map_ok(|object| object.key).try_collect().await?;
        let read = |key: String| async move {
            let Some(json) = self.read_small(&key).await? else { return Ok(None) };
            match serde_json::from_slice::<Told>(&json) {
                Ok(told) if told.incident == incident => Ok(Some(told)),
                Ok(told) => {
                    tracing::warn!(key, "the record of a delivery is of incident {}", told.incident);
                    Ok(None)
                }
                Err(error) => {
                    tracing::warn!(key, "failed to read the record of a delivery: {error}");
                    Ok::<_, RepoError>(None)
                }
            }
        };
        stream::iter(keys)
            .map(read)
            .buffered(SMALL_READS_MAX)
            .try_filter_map(|told| async { Ok(told) })
            .try_collect()
            .await
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::tests::repository;
    use super::*;
    use crate::detect::Severity;
    use crate::notify::Event;
    use crate::notify::queue::Facts;

    fn told(channel: &str, event: Event, revision: u32) -> Told {
        let facts = Facts {
            revision,
            severity: Severity::Critical,
            committed: true,
            aborted: false,
            acknowledged: false,
            resolved: false,
            tables: 18,
            rows: 354,
        };
        let at = Timestamp::UNIX_EPOCH;
        let (incident, channel) = ("00000001-000000001A2B3C40".to_owned(), channel.to_owned());
        Told { incident, channel, event, facts, due_at: at, told_at: at, attempts: 1 }
    }

    #[tokio::test]
    async fn what_was_told_is_read_back_and_told_once() {
        let repo = repository();
        let records =
            [told("on-call", Event::Grown, 7), told("on-call", Event::Opened, 1), told("slack", Event::Opened, 1)];
        for record in &records {
            assert_eq!(repo.put_delivery(record).await.unwrap(), Created::New);
        }
        let again = Told { told_at: Timestamp::MAX, ..records[1].clone() };
        assert_eq!(repo.put_delivery(&again).await.unwrap(), Created::Exists);
        assert_eq!(repo.deliveries(&records[0].incident).await.unwrap(), records);
        assert_eq!(repo.deliveries("00000001-000000001A2B3C4").await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_record_that_cannot_be_read_hinders_no_other() {
        let repo = repository();
        let good = told("slack", Event::Opened, 1);
        repo.put_delivery(&good).await.unwrap();
        let broken = repo.layout().delivery(&good.incident, "mail", "opened");
        repo.store().create(&broken, "{".into()).await.unwrap();
        assert_eq!(repo.deliveries(&good.incident).await.unwrap(), [good]);
    }
}
