//! `walguard handover`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Context as _;
use walguard::restore::Listen;
use walguard::restore::handover::{self, HandedOver, Mark};
use walguard::restore::run::{Action, Start};

use crate::Outcome;
use crate::args::HandoverArgs;
use crate::context::Context;
use crate::render;
use crate::report::UsageError;

pub(crate) async fn run(context: Context, args: HandoverArgs) -> anyhow::Result<Outcome> {
    let start = Start {
        binaries: args.pg_bin_dir.clone(),
        path: std::env::var_os("PATH"),
        listen: Listen::default(),
        action: Action::Promote,
    };
    let restored = std::fs::canonicalize(&args.restored)
        .with_context(|| format!("find the directory {}", args.restored.display()))?;
    Mark::read(&restored)?; // before somebody is asked
    if !args.yes && !confirmed(&context, &restored, args.swap.as_deref())? {
        return Ok(Outcome::Failed(crate::report::FAILED));
    }
    let cancel = context.cancel_on_signals()?;
    let progress = context.progress();
    let handed = handover::hand_over(&restored, args.swap.as_deref(), &start, &*progress, &cancel)
        .await
        .with_context(|| format!("hand over {}", restored.display()))?;
    match context.json {
        true => render::print_json(&handed)?,
        false => render::print(&text(&handed))?,
    }
    Ok(Outcome::Done)
}

fn confirmed(context: &Context, restored: &Path, swap: Option<&Path>) -> anyhow::Result<bool> {
    let question = match swap {
        Some(old) => format!("Put {} in the place of {}, which is kept?", restored.display(), old.display()),
        None => format!("Promote and stop {}, and take the settings of the restore out of it?", restored.display()),
    };
    let answer = if context.json { None } else { render::ask(&question)? };
    answer.ok_or_else(|| {
        let hint = "give --yes";
        UsageError::with_hint("nobody is there to confirm this", hint).into()
    })
}

/// What was done, and what comes next.
pub(crate) fn text(handed: &HandedOver) -> String {
    let HandedOver { data_dir, kept, timeline, notes } = handed;
    let mut text = "Handed over\n".to_owned();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "  {name:<14}{value}"); // a String takes everything
    };
    let timeline = timeline.map(|timeline| format!(", on timeline {timeline}")).unwrap_or_default();
    let dir = data_dir.display();
    line("directory", format!("{dir}{timeline}, stopped"));
    if let Some(kept) = kept {
        line("original", format!("kept in {}", kept.display()));
    }
    for note in notes {
        line("note", note.clone());
    }
    match kept {
        Some(kept) => {
            line("start it", format!("as always: systemctl start postgresql, or pg_ctl -D {dir} start"));
            line("applications", "find it where the original was: same directory, settings and port".to_owned());
            line("archiving", "a running agent follows to the new timeline by itself".to_owned());
            line("undo", format!("stop the server; mv {dir} {dir}.undone && mv {} {dir}", kept.display()));
        }
        None => {
            line("start it", format!("pg_ctl -D {dir} start"));
            line(
                "applications",
                "it has the settings of the original: see that port and listen_addresses are free here".to_owned(),
            );
            line("", "(or change them), then point the applications, or the pooler, to this host".to_owned());
            line(
                "archiving",
                "stop the original for good first; then point the agent's `postgres.conninfo` here".to_owned(),
            );
        }
    }
    text
}
