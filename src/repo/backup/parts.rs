//! Uploads of parts: a few at once, retried, their buffers used again.

use std::collections::BTreeSet;

use bytes::Bytes;
use bytes::BytesMut;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::RetryPolicy;
use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::SameContent;

use super::BackupError;

/// Bytes of parts held in memory: the one being filled, and those on their way. With the frames in work and the WAL that
/// the agent archives meanwhile (64 MiB), this is what keeps it below 128 MiB.
const HELD_BYTES_MAX: usize = 32 << 20;

/// A store may be away for some minutes without losing hours of backup: the server waits as long as we do not read.
/// (60 pauses of 5 to 10 seconds.)
pub(super) const PATIENCE: RetryPolicy = RetryPolicy { attempts_max: Some(66), ..RetryPolicy::FOREVER };

#[derive(Debug)]
pub(super) struct Uploads {
    /// For removing: not stopped by `cancel`.
    repository: Repository,
    patient: Repository,
    cancel: CancellationToken,
    running: JoinSet<Result<(String, Bytes), BackupError>>,
    running_max: usize,
    part_bytes: usize,
    idle: Vec<BytesMut>,
    /// Keys that were begun and of which it is not known yet what became of them.
    begun: BTreeSet<String>,
    /// Keys that are ours and durable.
    durable: Vec<String>,
    /// Somebody else writes under our keys.
    conflict: bool,
}

impl Uploads {
    pub(super) fn new(repository: Repository, part_bytes: usize, cancel: CancellationToken) -> Self {
        let patient = repository.clone().with_retry(PATIENCE, cancel.clone());
        let running_max = (HELD_BYTES_MAX / part_bytes.max(1)).saturating_sub(1).clamp(1, 8);
        Self {
            repository,
            patient,
            cancel,
            running: JoinSet::new(),
            running_max,
            part_bytes,
            idle: Vec::new(),
            begun: BTreeSet::new(),
            durable: Vec::new(),
            conflict: false,
        }
    }

    /// An empty buffer for a part.
    pub(super) fn buffer(&mut self) -> BytesMut {
        self.idle.pop().unwrap_or_else(|| BytesMut::with_capacity(self.part_bytes))
    }

    /// Begins to upload an object. Waits first while as many as allowed are on their way.
    pub(super) async fn begin(&mut self, key: String, content: Bytes) -> Result<(), BackupError> {
        while self.running.len() >= self.running_max {
            self.settle_one().await?;
        }
        self.begun.insert(key.clone());
        let (repository, cancel) = (self.patient.clone(), self.cancel.clone());
        self.running.spawn(async move {
            put(&repository, &key, &content, &cancel).await?;
            Ok((key, content))
        });
        Ok(())
    }

    /// Waits until everything is durable.
    pub(super) async fn finish(&mut self) -> Result<(), BackupError> {
        while !self.running.is_empty() {
            self.settle_one().await?;
        }
        Ok(())
    }

    /// Stops, and removes what was uploaded as far as the store lets us.
    pub(super) async fn abandon(mut self) {
        self.running.shutdown().await;
        if !self.conflict {
            self.durable.extend(self.begun);
        }
        for key in &self.durable {
            if let Err(error) = self.repository.store().delete(key).await {
                // It is no backup without its manifest, and expiring removes it later.
                tracing::warn!(key, "failed to remove a part of a backup that was given up: {error}");
                return;
            }
        }
    }

    async fn settle_one(&mut self) -> Result<(), BackupError> {
        match self.running.join_next().await {
            Some(Ok(Ok((key, content)))) => {
                self.begun.remove(&key);
                self.durable.push(key);
                // A store that keeps the bytes (the one in memory) keeps the buffer too.
                if let Ok(mut buffer) = content.try_into_mut()
                    && buffer.capacity() >= self.part_bytes
                {
                    buffer.clear();
                    self.idle.push(buffer);
                }
                Ok(())
            }
            Some(Ok(Err(error))) => {
                // What is not known to be ours may be the other's: it must stay.
                self.conflict |= matches!(error, BackupError::Repo(RepoError::Conflict { .. }));
                Err(error)
            }
            Some(Err(failure)) if failure.is_panic() => std::panic::resume_unwind(failure.into_panic()),
            Some(Err(_)) => Err(BackupError::Cancelled),
            None => Ok(()),
        }
    }
}

/// Makes an object.
pub(super) async fn put(
    repository: &Repository,
    key: &str,
    content: &Bytes,
    cancel: &CancellationToken,
) -> Result<(), BackupError> {
    match repository.put_once(key, content.clone(), SameContent::Verbatim).await {
        Ok(_) => Ok(()),
        Err(_) if cancel.is_cancelled() => Err(BackupError::Cancelled),
        Err(error) => Err(error.into()),
    }
}
