//! `walguard run`.

use walguard::supervisor::Agent;

use crate::Outcome;
use crate::args::RunArgs;
use crate::context::{self, Context};

pub(crate) async fn run(context: Context, args: RunArgs) -> anyhow::Result<Outcome> {
    let stop = context.cancel_on_signals()?;
    context.cluster()?;
    let mut settings = context.settings.clone();
    if args.http.is_some() {
        settings.http.listen = args.http;
    }
    let agent = Agent {
        conninfo: context.conninfo()?,
        repo: context.repository().await?,
        settings,
        zone: context.zone.clone(),
        config: context.config.clone(),
        flags: context.flags.clone(),
        backups: !args.no_backups,
        pg_bin_dir: context::pg_bin_dir(),
    };
    agent.run(stop).await?;
    Ok(Outcome::Done)
}
