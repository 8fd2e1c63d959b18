//! `walguard verify`.

use std::fmt::Write as _;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use walguard::repo::Repository;
use walguard::repo::bases::upkeep::VerifiedBases;
use walguard::repo::verify::{JOBS_DEFAULT, Options, Problem, Verification};
use walguard::settings::Source;

use crate::Outcome;
use crate::args::VerifyArgs;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

/// Problems shown to people. JSON has them all.
const PROBLEMS_SHOWN: usize = 50;

pub(crate) async fn run(context: Context, args: VerifyArgs) -> anyhow::Result<Outcome> {
    let repository = context.initialized_repository().await?;
    let cancel = context.cancel_on_signals()?;
    if context.settings.source == Source::Logical {
        return of_bases(context, args, &repository, &cancel).await;
    }
    let options = Options { only_new: args.new, jobs: args.jobs.unwrap_or(JOBS_DEFAULT) };
    let verification = repository.verify(options, Timestamp::now(), &*context.progress(), &cancel).await?;
    if context.json {
        render::print_json(&verification)?;
    } else {
        render::print(&text(&verification))?;
    }
    let is_well = verification.complete && verification.is_clean();
    Ok(if is_well { Outcome::Done } else { Outcome::Attention })
}

/// The same of bases and change logs, all of them.
async fn of_bases(
    context: Context,
    args: VerifyArgs,
    repository: &Repository,
    cancel: &CancellationToken,
) -> anyhow::Result<Outcome> {
    if args.new {
        let hint = "without it everything is read";
        return Err(UsageError::with_hint("--new needs `source = \"physical\"`", hint).into());
    }
    let verified = repository.verify_bases(&*context.progress(), cancel).await?;
    match context.json {
        true => render::print_json(&verified)?,
        false => render::print(&bases_text(&verified))?,
    }
    let is_well = verified.complete && verified.problems_total == 0;
    Ok(if is_well { Outcome::Done } else { Outcome::Attention })
}

fn bases_text(verified: &VerifiedBases) -> String {
    let mut text = format!(
        "read {} of {} databases: {} bases in {} objects, changes in {} objects\n",
        render::bytes(verified.bytes),
        verified.databases,
        verified.bases,
        verified.base_objects,
        verified.change_objects,
    );
    for problem in verified.problems.iter().take(PROBLEMS_SHOWN) {
        let _ = writeln!(text, "PROBLEM {}: {}\n        {}", problem.place, problem.problem, problem.means);
    }
    let hidden = verified.problems_total.saturating_sub(PROBLEMS_SHOWN as u64);
    if hidden > 0 {
        let _ = writeln!(text, "... and {hidden} more problems; --json shows up to a thousand");
    }
    text += match (verified.complete, verified.problems_total) {
        (false, _) => "stopped before the end\n",
        (true, 0) => "everything is whole\n",
        (true, _) => "NOT everything is whole\n",
    };
    text
}

fn text(verification: &Verification) -> String {
    let mut text = String::new();
    let checked = &verification.checked;
    let took = verification.finished_at.duration_since(verification.started_at);
    let _ = writeln!(
        text,
        "read {} in {}: {} segments, {} tails, {} indexes, {} backups in {} parts{}",
        render::bytes(checked.bytes),
        render::duration(took.unsigned_abs()),
        checked.segments,
        checked.tails,
        checked.indexes,
        checked.backups,
        checked.parts,
        if verification.only_new { ", only what is new" } else { "" },
    );
    for problem in verification.problems.iter().take(PROBLEMS_SHOWN) {
        text += &problem_text(problem);
    }
    let hidden = verification.problems_total.saturating_sub(PROBLEMS_SHOWN as u64);
    if hidden > 0 {
        let _ = writeln!(text, "... and {hidden} more problems; --json shows up to a thousand");
    }
    for gap in &verification.gaps {
        let _ =
            writeln!(text, "known gap on timeline {} from {} to {}: {}", gap.timeline, gap.from, gap.to, gap.reason);
    }
    text += match (verification.complete, verification.is_clean()) {
        (false, _) => "stopped before the end; `walguard verify --new` goes on from here\n",
        (true, true) => "everything is whole\n",
        (true, false) => "NOT everything is whole\n",
    };
    text
}

fn problem_text(problem: &Problem) -> String {
    let mut text = match &problem.key {
        Some(key) => format!("PROBLEM {key}: {}\n", problem.problem),
        None => format!("PROBLEM {}\n", problem.problem),
    };
    if !problem.files.is_empty() {
        let _ = writeln!(text, "        files touched: {}", problem.files.join(", "));
    }
    for label in &problem.backups {
        let _ = writeln!(text, "        backup {label} cannot be restored");
    }
    for lost in &problem.unreachable {
        let _ = writeln!(text, "        timeline {}: {} to {} cannot be reached", lost.timeline, lost.from, lost.to);
    }
    if problem.backups.is_empty() && problem.unreachable.is_empty() {
        text += "        nothing becomes unreachable by it\n";
    }
    text
}
