//! The loop that brings the spool's WAL to the repository.

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::pg::Position;
use crate::repo::archiver::{Archiver, Report};
use crate::serve::status::{Board, Trouble};

/// Archives until `stop`, and then what is left; tells the board.
pub(super) async fn run(
    archiver: Archiver,
    mut archived: watch::Receiver<Option<Position>>,
    mut report: watch::Receiver<Report>,
    board: Board,
    stop: CancellationToken,
    spool_closed: CancellationToken,
) -> anyhow::Result<()> {
    let tell = async {
        loop {
            if let Some(archived) = *archived.borrow_and_update() {
                board.archived(archived);
            }
            let told = report.borrow_and_update().clone();
            board.update(|s| {
                s.store.uploads = told.in_flight as u64;
                s.store.objects_total = told.objects;
                s.store.content_bytes_total = told.content_bytes;
                s.store.stored_bytes_total = told.stored_bytes;
                s.store.failures_total = told.failures;
                s.store.trouble = told.trouble.map(|t| Trouble {
                    since: t.since,
                    failures: t.failures,
                    error: t.error,
                    hint: t.hint,
                });
            });
            let changed = tokio::select! {
                changed = archived.changed() => changed,
                changed = report.changed() => changed,
            };
            if changed.is_err() {
                return std::future::pending::<()>().await; // the archiver is gone, and its result tells why
            }
        }
    };
    tokio::select! {
        result = archiver.run(stop, spool_closed) => {
            if let Err(error) = result {
                board.raise("archive", crate::backoff::Chain(&error).to_string(), error.hint());
                board.update(|s| s.at = Some(Timestamp::now()));
                return Err(error.into());
            }
            Ok(())
        }
        () = tell => Ok(()),
    }
}
