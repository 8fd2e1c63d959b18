//! `walguard backup`.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;
use walguard::capture::{Checkpoint, Walsender};
use walguard::repo::backup::{self, BackupError, BackupInfo, Config, Request, Taken};
use walguard::settings::Source;

use crate::Outcome;
use crate::args::{BackupArgs, CheckpointMode};
use crate::context::Context;
use crate::rebuild;
use crate::render;
use crate::report::UsageError;

/// How long to wait for the backup's WAL. The agent takes a second; an `archive_command` may take `archive_timeout`.
const WAL_PATIENCE: Duration = Duration::from_secs(600);

/// Bad pages shown to people. JSON has them all.
const BAD_PAGES_SHOWN: usize = 20;

pub(crate) async fn run(context: Context, args: BackupArgs) -> anyhow::Result<Outcome> {
    if context.settings.source == Source::Logical {
        return Box::pin(rebuild::bases(context, args)).await;
    }
    if args.database.is_some() {
        let hint = "a copy of a server's files holds all its databases";
        return Err(UsageError::with_hint("--database needs `source = \"logical\"`", hint).into());
    }
    let config = config(&context, &args)?;
    let repository = context.repository().await?;
    let conninfo = context.conninfo()?;
    let cancel = context.cancel_on_signals()?;
    let progress = context.progress();
    let walsender = Walsender::connect(&conninfo).await.context("connect to the server")?;
    let request = Request { label: args.label };
    let taken = Box::pin(backup::run(&repository, walsender, &config, &request, &*progress, &cancel)).await;
    let taken = taken.context("take a base backup")?;
    let wal_archived = if args.no_wait {
        None
    } else {
        progress.begin("wait for its WAL", None);
        let waited = backup::wait_for_wal(&repository, &taken.info, Some(WAL_PATIENCE), &cancel).await;
        progress.end();
        match waited {
            Ok(()) => Some(true),
            Err(error @ BackupError::WalMissing { .. }) => {
                tracing::warn!(hint = error.hint(), "{error}");
                Some(false)
            }
            // The backup is there: who stops us now stops the waiting.
            Err(BackupError::Cancelled) => Some(false),
            Err(error) => return Err(error).context("wait for the backup's WAL"),
        }
    };
    let summary = Summary::new(&taken, wal_archived);
    if context.json {
        render::print_json(&summary)?;
    } else {
        render::print(&summary.text())?;
    }
    Ok(if summary.is_well() { Outcome::Done } else { Outcome::Attention })
}

/// The settings with the flags laid over them.
fn config(context: &Context, args: &BackupArgs) -> anyhow::Result<Config> {
    let mut config = context.settings.backup.clone();
    if let Some(mode) = args.checkpoint {
        config.checkpoint = match mode {
            CheckpointMode::Fast => Checkpoint::Fast,
            CheckpointMode::Spread => Checkpoint::Spread,
        };
    }
    config.max_rate = args.max_rate.or(config.max_rate);
    config.check().map_err(UsageError::new)?;
    Ok(config)
}

#[derive(Debug, Serialize)]
struct Summary<'a> {
    #[serde(flatten)]
    backup: &'a BackupInfo,
    elapsed_seconds: f64,
    /// `null` if nobody waited for it.
    wal_archived: Option<bool>,
    damaged_pages: Vec<DamagedPage<'a>>,
}

#[derive(Debug, Serialize)]
struct DamagedPage<'a> {
    file: &'a str,
    block: u64,
}

impl<'a> Summary<'a> {
    fn new(taken: &'a Taken, wal_archived: Option<bool>) -> Self {
        let damaged_pages = taken.bad_pages.iter().map(|page| DamagedPage { file: &page.file, block: page.block });
        Self {
            backup: &taken.info,
            elapsed_seconds: taken.elapsed.as_secs_f64(),
            wal_archived,
            damaged_pages: damaged_pages.collect(),
        }
    }

    fn is_well(&self) -> bool {
        self.backup.bad_pages == 0 && self.wal_archived != Some(false)
    }

    fn text(&self) -> String {
        let backup = self.backup;
        let ratio = backup.content_bytes as f64 / backup.stored_bytes.max(1) as f64;
        let mut text = format!(
            "backup {} done in {}: {} of files in {} ({ratio:.1} : 1)\n",
            backup.label,
            render::duration(Duration::from_secs_f64(self.elapsed_seconds)),
            render::bytes(backup.content_bytes),
            render::bytes(backup.stored_bytes),
        );
        let checked = match (backup.page_checksums_verified, backup.bad_pages) {
            (false, _) => "page checksums not checked".to_owned(),
            (true, 0) => "all page checksums right".to_owned(),
            (true, bad) => format!("{bad} PAGES WITH WRONG CHECKSUMS"),
        };
        let wal = match self.wal_archived {
            Some(true) => "its WAL is archived",
            Some(false) => "ITS WAL IS NOT ARCHIVED YET: it cannot be restored before",
            None => "its WAL was not waited for",
        };
        // Writing to a string does not fail.
        let _ = writeln!(text, "WAL {} to {} of timeline {}; {wal}", backup.start, backup.stop, backup.timeline);
        let _ = writeln!(text, "{checked}");
        for page in self.damaged_pages.iter().take(BAD_PAGES_SHOWN) {
            let _ = writeln!(text, "  {} block {}", page.file, page.block);
        }
        if backup.bad_pages > BAD_PAGES_SHOWN as u64 {
            let _ = writeln!(text, "  ... ({} in all; --json names up to 1,000)", backup.bad_pages);
        }
        if backup.bad_pages > 0 {
            text += "HINT: check disk and memory of the server; restore the tables from a backup taken before, \
                     or see what pg_amcheck says of them\n";
        }
        text
    }
}
