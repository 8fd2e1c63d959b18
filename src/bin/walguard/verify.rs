//! `walguard verify`.

use std::fmt::Write as _;

use jiff::Timestamp;
use walguard::repo::verify::{JOBS_DEFAULT, Options, Problem, Verification};

use crate::Outcome;
use crate::args::VerifyArgs;
use crate::context::Context;
use crate::render;

/// Problems shown to people. JSON has them all.
const PROBLEMS_SHOWN: usize = 50;

pub(crate) async fn run(context: Context, args: VerifyArgs) -> anyhow::Result<Outcome> {
    let repository = context.repository().await?;
    let cancel = context.cancel_on_signals()?;
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
