//! The loop that puts indexes and names beside the WAL that they were made from.
//!
//! Who finds them never waits for it: what finds no room in its queue, because the store is away or slow, is noted
//! ([`Missed`]) and made from the archive once the queue is empty again.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::scan::Derived;
use crate::backoff::{Chain, RetryPolicy};
use crate::decode::WalMajor;
use crate::pg::{Position, SegmentName, TimelineId};
use crate::progress::Silent;
use crate::repo::catalog::LsnRange;
use crate::repo::index::rebuild::Options;
use crate::repo::{RepoError, Repository};
use crate::serve::status::Board;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Derive {
    pub(super) repo: Repository,
    pub(super) major: WalMajor,
    pub(super) board: Board,
    pub(super) archived: watch::Receiver<Option<Position>>,
    pub(super) derived: mpsc::Receiver<Derived>,
    pub(super) missed: Missed,
}

/// Where segments lie whose index found no room: of each timeline from the first of them to the last.
#[derive(Clone, Debug, Default)]
pub(super) struct Missed(Arc<Mutex<BTreeMap<TimelineId, LsnRange>>>);

impl Missed {
    /// The index of a segment is to be made from the archive.
    pub(super) fn add(&self, name: &SegmentName) {
        self.add_range(name.timeline, LsnRange { from: name.start(), to: name.end() });
    }

    /// The same of all segments in a range.
    pub(super) fn add_range(&self, timeline: TimelineId, more: LsnRange) {
        let mut missed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let range = missed.entry(timeline).or_insert(more);
        range.from = range.from.min(more.from);
        range.to = range.to.max(more.to);
    }

    fn take(&self) -> Option<(TimelineId, LsnRange)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).pop_first()
    }
}

impl Derive {
    /// Puts what comes until `stop`, each once its segment is archived. The store's trouble is waited out.
    pub(super) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        while let Some(Some(derived)) = stop.run_until_cancelled(self.derived.recv()).await {
            if stop.run_until_cancelled(self.put(&derived)).await.is_none() {
                return Ok(());
            }
            while self.derived.is_empty()
                && let Some((timeline, range)) = self.missed.take()
            {
                if stop.run_until_cancelled(self.make_up_for(timeline, range, &stop)).await.is_none() {
                    return Ok(());
                }
            }
        }
        stop.cancelled().await;
        Ok(())
    }

    /// Makes the indexes that found no room from the archive.
    async fn make_up_for(&mut self, timeline: TimelineId, range: LsnRange, stop: &CancellationToken) {
        let is_archived = |at: &Option<Position>| at.is_some_and(|at| at.lsn >= range.to || at.timeline > timeline);
        if self.archived.wait_for(is_archived).await.is_err() {
            return; // the archiver is gone, and its result tells why
        }
        let options = Options { range, timeline: Some(timeline), ..Options::default() };
        let mut failures = 0;
        loop {
            match self.repo.rebuild_indexes(options, &Silent, stop).await {
                Ok(rebuilt) => {
                    tracing::info!(%timeline, from = %range.from, to = %range.to, made = rebuilt.made, "indexes were made up for");
                    self.board.update(|s| {
                        s.scan.derived_total += rebuilt.made;
                        s.scan.unindexed_total += rebuilt.failed_total;
                    });
                    return self.board.clear("index");
                }
                Err(error) => {
                    failures += 1;
                    if !self.is_tried_again(failures, &error) {
                        return;
                    }
                    tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
                }
            }
        }
    }

    /// Tells of a failure; false if it is none that passes.
    fn is_tried_again(&self, failures: u32, error: &RepoError) -> bool {
        let is_given_up = !error.is_transient();
        if failures == 3 || is_given_up {
            let text = format!("the index cannot be written: {}", Chain(error));
            let hint = "mend that, and make what is missing with `walguard index rebuild`".to_owned();
            self.board.raise("index", text, error.hint().or(Some(hint)));
        }
        if is_given_up {
            tracing::warn!("a segment stays without its index or names: {}", Chain(error));
            self.board.update(|s| s.scan.unindexed_total += 1);
        }
        !is_given_up
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
            if !self.is_tried_again(failures, &error) {
                return;
            }
            tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
        }
    }
}
