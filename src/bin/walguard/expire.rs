//! `walguard expire`.

use jiff::Timestamp;
use serde::Serialize;
use walguard::repo::retention::{ExpirePlan, Expired, Keep};

use crate::Outcome;
use crate::args::ExpireArgs;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(context: Context, args: ExpireArgs) -> anyhow::Result<Outcome> {
    // A flag replaces the settings as a whole: who asks for three backups does not mean "or thirty days".
    let keep = if args.keep_backups.is_some() || args.keep_for.is_some() {
        Keep { keep_backups: args.keep_backups, keep_for: args.keep_for }
    } else {
        context.settings.retention
    };
    if keep.keep_backups.is_none() && keep.keep_for.is_none() {
        let hint = "say it with --keep-backups N or --keep-for SPAN, or with `keep_backups` or `keep_for` in the table \
                    [retention] of the settings file";
        return Err(UsageError::with_hint("nothing says how much to keep", hint).into());
    }
    let repository = context.repository().await?;
    let cancel = context.cancel_on_signals()?;
    let plan = repository.plan_expire(&keep, Timestamp::now()).await?;
    if !context.json {
        render::print(&plan_text(&plan, args.yes))?;
    }
    let expired = if args.yes && !plan.is_empty() {
        Some(repository.expire(&plan, &*context.progress(), &cancel).await?)
    } else {
        None
    };
    if context.json {
        render::print_json(&Report { plan: &plan, expired })?;
    } else if let Some(expired) = expired {
        let stopped = if cancel.is_cancelled() { ", then stopped; the same command goes on" } else { "" };
        let bytes = render::bytes(expired.bytes);
        render::print(&format!("deleted {} objects, {bytes}{stopped}", expired.objects))?;
    }
    Ok(if plan.remarks.is_empty() && !cancel.is_cancelled() { Outcome::Done } else { Outcome::Attention })
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    plan: &'a ExpirePlan,
    /// `null` for a dry run.
    expired: Option<Expired>,
}

fn plan_text(plan: &ExpirePlan, yes: bool) -> String {
    let mut text = plan.to_string();
    if !plan.is_empty() {
        text += &format!("frees   {}\n", render::bytes(plan.bytes()));
        if !yes {
            text += "this is a dry run: nothing was deleted; add --yes to do it\n";
        }
    }
    text
}
