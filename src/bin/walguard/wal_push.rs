//! `walguard wal-push`.

use walguard::repo::wal_push::{self, Pushed};

use crate::Outcome;
use crate::args::WalPushArgs;
use crate::context::Context;
use crate::render;

pub(crate) async fn run(context: Context, args: WalPushArgs) -> anyhow::Result<Outcome> {
    let repo = context.repository().await?;
    let pushed = wal_push::push(&repo, &args.path, context.settings.archive.compression_level).await?;
    if context.json {
        let what = match pushed {
            Pushed::Stored => "stored",
            Pushed::Known => "known",
            Pushed::NotNeeded => "not needed",
        };
        render::print_json(&serde_json::json!({ "file": args.path, "result": what }))?;
    }
    // Otherwise silent: what archive_command prints goes to the server's log.
    Ok(Outcome::Done)
}
