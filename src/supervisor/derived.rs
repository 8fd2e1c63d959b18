//! The loop that puts indexes and names beside the WAL that they were made from.

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::scan::Derived;
use crate::backoff::{Chain, RetryPolicy};
use crate::decode::WalMajor;
use crate::pg::Position;
use crate::repo::Repository;
use crate::serve::status::Board;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Derive {
    pub(super) repo: Repository,
    pub(super) major: WalMajor,
    pub(super) board: Board,
    pub(super) archived: watch::Receiver<Option<Position>>,
    pub(super) derived: mpsc::Receiver<Derived>,
}

impl Derive {
    /// Puts what comes until `stop`, each once its segment is archived. The store's trouble is waited out.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        while let Some(Some(derived)) = stop.run_until_cancelled(self.derived.recv()).await {
            if stop.run_until_cancelled(self.put(&derived)).await.is_none() {
                return Ok(());
            }
        }
        stop.cancelled().await;
        Ok(())
    }

    async fn put(&mut self, derived: &Derived) {
        // Names are as of the beginning of their segment, which need not be there yet.
        let (timeline, durable) = match derived {
            Derived::Index(name, _) => (name.timeline, name.end()),
            Derived::Names(name, _) => (name.timeline, name.start()),
        };
        let is_archived = |at: &Option<Position>| at.is_some_and(|at| at.lsn >= durable || at.timeline > timeline);
        if self.archived.wait_for(is_archived).await.is_err() {
            return; // the archiver is gone, and its result tells why
        }
        let mut failures = 0;
        loop {
            let put = match derived {
                // The indexes of a group of segments are merged when the last of them is there.
                Derived::Index(name, index) => match self.repo.put_index(name, index).await {
                    Ok(created) => self.repo.merge_indexes_after(name).await.map(|()| created),
                    refused => refused,
                },
                Derived::Names(name, names) => self.repo.put_names(name, names, self.major).await,
            };
            let Err(error) = put else {
                self.board.clear("index");
                self.board.update(|s| s.scan.derived_total += 1);
                return;
            };
            failures += 1;
            if failures == 3 {
                let text = format!("the index cannot be written: {}", Chain(&error));
                self.board.raise("index", text, error.hint());
            }
            if !error.is_transient() {
                return;
            }
            tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
        }
    }
}
