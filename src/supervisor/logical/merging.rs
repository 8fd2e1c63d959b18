//! The loop that merges what is old of a change log.

use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::pg::Oid;
use crate::repo::Repository;
use crate::repo::changes::merge::{Done, Policy};

/// How often it is looked for something to merge.
const EVERY: Duration = Duration::from_secs(3_600);

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Merging {
    pub(super) database: Oid,
    pub(super) repo: Repository,
}

impl Merging {
    /// Works until `stop` is cancelled. What fails is tried again with the next round: it hurries nobody.
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let database = self.database;
        while !stop.is_cancelled() {
            match self.repo.merge_changes(database, &Policy::default(), Timestamp::now(), &stop).await {
                Ok(done) if done == Done::default() => {}
                Ok(Done { merged, held, deleted }) => {
                    tracing::info!(%database, merged, held, deleted, "merged objects of the change log");
                }
                Err(error) => {
                    tracing::warn!(%database, hint = error.hint(), "failed to merge changes, will try again: {}", Chain(&error));
                }
            }
            let _ = stop.run_until_cancelled(tokio::time::sleep(EVERY)).await;
        }
        Ok(())
    }
}
