//! The loops of one database: its changes, its publications, its definitions, its bases. Further databases of the server, besides
//! the one that the agent cannot begin without, are waited for.

use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{Bases, Definitions, Logical, Merging, Origin, Publications, origin};
use crate::backoff::{Chain, RetryPolicy};
use crate::capture::{CaptureError, ConnInfo, logical};
use crate::repo::Repository;
use crate::repo::retention::Keep;
use crate::serve::status::{Board, Trouble};
use crate::supervisor::loops::Loops;
use crate::supervisor::scan::Observed;
use crate::supervisor::schedule::Schedule;
use crate::supervisor::source::SourceError;

/// A database, and what its loops work with.
#[derive(Clone, Debug)]
pub(in crate::supervisor) struct Database {
    /// To this database.
    pub(in crate::supervisor) conninfo: ConnInfo,
    pub(in crate::supervisor) slot: String,
    pub(in crate::supervisor) config: logical::Config,
    pub(in crate::supervisor) repo: Repository,
    /// How long changes wait for their object.
    pub(in crate::supervisor) interval: Duration,
    /// Compression level.
    pub(in crate::supervisor) level: i32,
    /// `None`: the agent takes no bases.
    pub(in crate::supervisor) bases: Option<Schedule>,
    pub(in crate::supervisor) keep: Keep,
    pub(in crate::supervisor) bin_dir: Option<PathBuf>,
    /// The spool's directory of the cluster.
    pub(in crate::supervisor) dir: PathBuf,
    pub(in crate::supervisor) board: Board,
    pub(in crate::supervisor) observed: mpsc::Sender<Observed>,
}

impl Database {
    /// Starts its loops.
    pub(in crate::supervisor) fn start(self, loops: &mut Loops, origin: Origin) {
        let wanted = watch::Sender::new(None);
        let database = origin.database;
        if let Some(schedule) = self.bases.clone() {
            let bases = Bases {
                conninfo: self.beside("base"),
                repo: self.repo.clone(),
                database,
                schedule,
                level: self.level,
                publications: self.config.clone(),
                bin_dir: self.bin_dir.clone(),
                keep: self.keep,
                board: self.board.clone(),
                wanted: wanted.clone(),
            };
            loops.start("bases", |stop| bases.run(stop));
        }
        let publishing = Publications {
            conninfo: self.beside("publications"),
            config: self.config.clone(),
            board: self.board.clone(),
        };
        loops.start("publications", |stop| publishing.run(stop));
        let looking = Definitions {
            conninfo: self.beside("definitions"),
            database,
            publications: self.config.clone(),
            repo: self.repo.clone(),
            dir: self.dir.clone(),
            wanted: wanted.clone(),
        };
        loops.start("definitions", |stop| looking.run(stop));
        let merging = Merging { database, repo: self.repo.clone() };
        loops.start("merging", |stop| merging.run(stop));
        let reading = Logical {
            conninfo: self.conninfo,
            slot: self.slot,
            config: self.config,
            repo: self.repo,
            origin,
            interval: self.interval,
            level: self.level,
            board: self.board,
            observed: self.observed,
            wanted,
        };
        loops.start("logical", |stop| reading.run(stop));
    }

    /// Waits until the database can be asked, and runs its loops until `stop` is cancelled. The first database's slot is known,
    /// this one has one of its own.
    pub(in crate::supervisor) async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut failures = 0;
        let origin = loop {
            let Some(asked) = stop.run_until_cancelled(origin(&self.conninfo)).await else { return Ok(()) };
            match asked {
                Ok(origin) => break origin,
                Err(error) => {
                    failures += 1;
                    let pause = RetryPolicy::FOREVER.pause(failures);
                    self.tell(&error, failures, pause);
                    if stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
                        return Ok(());
                    }
                }
            }
        };
        self.board.clear("database");
        self.board.update(|s| s.server.trouble = None);
        self.slot = logical::slot_of(&self.slot, origin.database);
        let mut loops = Loops::new(stop.child_token());
        self.start(&mut loops, origin);
        loops.run().await
    }

    fn tell(&self, error: &SourceError, failures: u32, pause: Duration) {
        let (database, text) = (self.conninfo.dbname(), Chain(error).to_string());
        if failures.is_power_of_two() {
            tracing::warn!(database, failures, ?pause, hint = error.hint(), "failed to begin, will try again: {text}");
        }
        self.board.update(|s| {
            let trouble = Trouble::again(s.server.trouble.as_ref(), Timestamp::now(), text.clone(), error.hint());
            s.server.trouble = Some(trouble);
        });
        // What passes by itself is told when it does not.
        if !matches!(error, SourceError::Capture(CaptureError::Unreachable { .. })) {
            self.board.raise("database", format!("its changes cannot be read: {text}"), error.hint());
        }
    }

    /// How a connection beside the stream is made, under a name of its own.
    fn beside(&self, purpose: &str) -> ConnInfo {
        self.conninfo.clone().with_application_name(&format!("{}-{purpose}", self.conninfo.application_name()))
    }
}
