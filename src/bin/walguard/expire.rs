//! `walguard expire`.

use std::fmt::Write as _;

use jiff::Timestamp;
use serde::Serialize;
use tokio_util::sync::CancellationToken;
use walguard::repo::Repository;
use walguard::repo::bases::upkeep::ExpireBases;
use walguard::repo::retention::{ExpirePlan, Expired, Keep};
use walguard::settings::Source;

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
    let repository = context.initialized_repository().await?;
    let cancel = context.cancel_on_signals()?;
    if context.settings.source == Source::Logical {
        return of_bases(context, args, &repository, &keep, &cancel).await;
    }
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
        render::print(&expired_text(&expired, &cancel))?;
    }
    Ok(if plan.remarks.is_empty() && !cancel.is_cancelled() { Outcome::Done } else { Outcome::Attention })
}

fn expired_text(expired: &Expired, cancel: &CancellationToken) -> String {
    let stopped = if cancel.is_cancelled() { ", then stopped; the same command goes on" } else { "" };
    format!("deleted {} objects, {}{stopped}", expired.objects, render::bytes(expired.bytes))
}

/// The same of bases and change logs.
async fn of_bases(
    context: Context,
    args: ExpireArgs,
    repository: &Repository,
    keep: &Keep,
    cancel: &CancellationToken,
) -> anyhow::Result<Outcome> {
    let plans = repository.plan_expire_bases(keep, Timestamp::now()).await?;
    if !context.json {
        render::print(&bases_text(&plans, args.yes))?;
    }
    let expired = match args.yes && plans.iter().any(|plan| !plan.is_empty()) {
        true => Some(repository.expire_bases(&plans, &*context.progress(), cancel).await?),
        false => None,
    };
    if context.json {
        render::print_json(&ReportOfBases { databases: &plans, expired })?;
    } else if let Some(expired) = expired {
        render::print(&expired_text(&expired, cancel))?;
    }
    Ok(if cancel.is_cancelled() { Outcome::Attention } else { Outcome::Done })
}

#[derive(Debug, Serialize)]
struct ReportOfBases<'a> {
    databases: &'a [ExpireBases],
    /// `null` for a dry run.
    expired: Option<Expired>,
}

fn bases_text(plans: &[ExpireBases], yes: bool) -> String {
    let mut text = String::new();
    for plan in plans {
        let _ = writeln!(text, "database {}\n  keeps   base {}", plan.database_name, plan.kept.join(", "));
        if !plan.bases.is_empty() {
            let _ = writeln!(text, "  deletes base {}", plan.bases.join(", "));
        }
        if !plan.unfinished.is_empty() {
            let _ = writeln!(text, "  deletes unfinished base {}", plan.unfinished.join(", "));
        }
        if let Some(before) = plan.changes_before {
            let _ = writeln!(text, "  deletes changes before {before}: {} objects", plan.change_objects);
        }
    }
    let bytes: u64 = plans.iter().map(|plan| plan.bytes).sum();
    match (plans.iter().any(|plan| !plan.is_empty()), yes) {
        (false, _) if plans.is_empty() => text += "there is no base\n",
        (false, _) => text += "nothing goes\n",
        (true, true) => text += &format!("frees   {}\n", render::bytes(bytes)),
        (true, false) => {
            text += &format!("frees   {}\n", render::bytes(bytes));
            text += "this is a dry run: nothing was deleted; add --yes to do it\n";
        }
    }
    text
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
