//! `walguard wal-fetch`, the `restore_command` of a restored server.
//!
//! Whatever goes wrong must not look like the end of the WAL to the server: only "there is no such file" exits with 1.
//! See [`walguard::restore::wal_fetch`].

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use tokio_util::sync::CancellationToken;
use walguard::restore::wal_fetch::{self, Cache, Fetched, STOP_RECOVERY};

use crate::Outcome;
use crate::args::{GlobalArgs, WalFetchArgs};
use crate::context::Context;

/// True if this is a call of `wal-fetch`, even one that cannot be understood.
pub(crate) fn is_meant(mut args: impl Iterator<Item = OsString>) -> bool {
    args.any(|arg| arg == "wal-fetch")
}

/// From here on a panic of this process stops recovery instead of ending it.
pub(crate) fn stop_recovery_on_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        tell(info);
        std::process::exit(STOP_RECOVERY.into());
    }));
}

/// What was fetched ahead costs a rename, and no settings are read for it.
pub(crate) fn is_in_cache(args: &WalFetchArgs) -> bool {
    !args.prefetch && Cache::beside(&args.path).take(&args.file, &args.path)
}

pub(crate) async fn run(context: Context, global: &GlobalArgs, args: WalFetchArgs) -> anyhow::Result<Outcome> {
    let cache = Cache::beside(&args.path);
    let repo = context.repository().await?;
    // A server that is stopped kills its restore_command; there is nothing to end well.
    let never = CancellationToken::new();
    if args.prefetch {
        wal_fetch::prefetch(&repo, &cache, false, &never).await;
        return Ok(Outcome::Done);
    }
    match wal_fetch::fetch(&repo, &args.file, &args.path, &never).await? {
        Fetched::Placed => {
            if !args.no_prefetch && !cache.is_watched() {
                leave_helper(global, &args);
            }
            Ok(Outcome::Done)
        }
        Fetched::NotThere => {
            tracing::info!(file = args.file, "is not in the repository");
            Ok(Outcome::Failed(wal_fetch::NOT_THERE))
        }
    }
}

/// Leaves a process behind that fetches what the server will ask for next. If it cannot be, each file is fetched when it
/// is asked for.
fn leave_helper(global: &GlobalArgs, args: &WalFetchArgs) {
    let Ok(program) = std::env::current_exe() else { return };
    let mut command = Command::new(program);
    command.args(["wal-fetch", "--prefetch"]).arg(&args.file).arg(absolute(&args.path));
    let flags = [
        ("--config", global.config.as_deref().map(|path| absolute(path).into_os_string())),
        ("--repo", global.repo.clone().map(OsString::from)),
        ("--cluster", global.cluster.clone().map(OsString::from)),
    ];
    for (flag, value) in flags {
        if let Some(value) = value {
            command.arg(flag).arg(value);
        }
    }
    // Its own process group and no open streams: neither the server nor its log waits for it.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    if let Err(error) = command.spawn() {
        tracing::warn!("failed to start fetching WAL ahead: {error}");
    }
}

fn absolute(path: &Path) -> std::path::PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}
