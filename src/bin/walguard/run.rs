//! `walguard run`.

use walguard::supervisor::Agent;

use crate::Outcome;
use crate::args::RunArgs;
use crate::context::Context;

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
        backups: !args.no_backups,
    };
    agent.run(stop).await?;
    Ok(Outcome::Done)
}
