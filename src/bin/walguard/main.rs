//! The `walguard` command.

mod args;
mod backup;
mod check;
mod choose;
mod completions;
mod context;
mod demo;
mod drill;
mod expire;
mod guard;
mod handover;
mod incident_report;
mod incidents;
mod index;
mod init;
mod list;
mod logging;
mod notify;
mod progress;
mod rebuild;
mod render;
mod report;
mod restore;
mod run;
mod silence;
mod status;
mod timeline;
mod verify;
mod wal;
mod wal_fetch;
mod wal_push;

use std::process::ExitCode;

use clap::Parser as _;
use tikv_jemalloc_ctl::{Access as _, AsName as _};
use walguard::restore::wal_fetch::STOP_RECOVERY;
use walguard::settings::Source;

use args::{Cli, Verb};
use context::Context;

/// Segments and parts are buffers of many megabytes. The C library's allocator keeps freed ones for each thread, which
/// doubled the memory in use when it was measured; this one gives buffers of 8 MiB and more back at once.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Arranges that freed memory goes back to the system at once. The allocator would keep it for ten seconds: a third of an
/// agent's memory was such leftovers while it archived WAL and took a base backup, and no CPU is saved by them, because
/// the large buffers are used again by those who own them. Call it before there are threads: each of them takes what is
/// arranged when it begins.
fn give_freed_memory_back_at_once() {
    for key in [&b"arenas.dirty_decay_ms\0"[..], b"arena.0.dirty_decay_ms\0"] {
        // It costs memory if it fails, and nothing else.
        let _ = key.name().write(0_isize);
    }
}

/// How a verb ended, other than by an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// All is done: exit code 0.
    Done,
    /// What was asked for is done and well, but somebody must look at something: exit code 3.
    Attention,
    /// The verb told what is wrong, in its own way: this exit code.
    Failed(u8),
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Attention => Self::from(report::ATTENTION),
            Outcome::Failed(code) => Self::from(code),
        }
    }
}

fn main() -> ExitCode {
    give_freed_memory_back_at_once();
    // A server that recovers takes any failure of `wal-fetch` as the end of its WAL, unless it is one of a special kind.
    let for_recovery = wal_fetch::is_meant(std::env::args_os());
    if for_recovery {
        wal_fetch::stop_recovery_on_panic();
    }
    let failed = |code: ExitCode| if for_recovery { ExitCode::from(STOP_RECOVERY) } else { code };
    let cli = match Cli::try_parse() {
        Ok(cli) => Cli { global: cli.global.without_empty(), ..cli },
        Err(error) if error.exit_code() == 0 => return report::usage(&error),
        Err(error) => return failed(report::usage(&error)),
    };
    if let Err(error) = logging::install(&cli.global) {
        return failed(report::failure(&error, cli.global.json));
    }
    if matches!(&cli.verb, Verb::WalFetch(args) if wal_fetch::is_in_cache(args)) {
        return ExitCode::SUCCESS;
    }
    let json = cli.global.json;
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| anyhow::Error::new(error).context("start the async runtime"))
        .and_then(|runtime| runtime.block_on(run(cli)));
    match result {
        Ok(outcome) => outcome.into(),
        Err(error) => failed(report::failure(&error, json)),
    }
}

async fn run(cli: Cli) -> anyhow::Result<Outcome> {
    // These need no settings file, and all but `init` must work where it is broken.
    let verb = match cli.verb {
        Verb::Completions(args) => return completions::run(&args),
        Verb::Demo(args) => return demo::run(Context::without_settings(&cli.global)?, args).await,
        Verb::Init(args) => return init::run(Context::load_or_begin(&cli.global)?, args).await,
        verb => verb,
    };
    let context = Context::load(&cli.global)?;
    refuse_without_wal(&context, &verb)?;
    match verb {
        Verb::Check(args) => check::run(context, args).await,
        Verb::Run(args) => Box::pin(run::run(context, args)).await,
        Verb::Backup(args) => backup::run(context, args).await,
        Verb::List(args) => list::run(context, args).await,
        Verb::Status(args) => Box::pin(status::run(context, args)).await,
        Verb::Incidents(args) => Box::pin(incidents::run(context, args)).await,
        Verb::Silence(args) => Box::pin(silence::run(context, args)).await,
        Verb::Restore(args) => Box::pin(restore::run(context, args)).await,
        Verb::Drill(args) => Box::pin(drill::run(context, args)).await,
        Verb::Handover(args) => handover::run(context, args).await,
        Verb::Verify(args) => verify::run(context, args).await,
        Verb::Expire(args) => expire::run(context, args).await,
        Verb::Guard(args) => guard::run(context, args).await,
        Verb::Notify(args) => notify::run(context, args).await,
        Verb::Timeline(args) => Box::pin(timeline::run(context, args)).await,
        Verb::Index(args) => Box::pin(index::run(context, args)).await,
        Verb::Wal(args) => Box::pin(wal::run(context, args)).await,
        Verb::WalPush(args) => wal_push::run(context, args).await,
        Verb::WalFetch(args) => wal_fetch::run(context, &cli.global, args).await,
        Verb::Completions(_) | Verb::Demo(_) | Verb::Init(_) => unreachable!("these ran above"),
    }
}

/// Verbs that work on WAL have nothing to do where changes come by logical replication.
fn refuse_without_wal(context: &Context, verb: &Verb) -> Result<(), report::UsageError> {
    let name = match verb {
        Verb::Index(_) => "index",
        Verb::Wal(_) => "wal explain",
        Verb::WalPush(_) => "wal-push",
        Verb::WalFetch(_) => "wal-fetch",
        _ => return Ok(()),
    };
    if context.settings.source == Source::Physical {
        return Ok(());
    }
    let hint = "what works with `source = \"logical\"` stands in the README, under \"Managed services\"";
    Err(report::UsageError::with_hint(format!("`{name}` needs the server's WAL, and this source is logical"), hint))
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory as _, Parser as _};

    use super::Cli;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_in_the_readme_and_in_the_help_is_understood() {
        let pages = [include_str!("../../../README.md"), include_str!("../../../docs/patroni.md")];
        let mut texts = pages.map(str::to_owned).to_vec();
        let command = Cli::command();
        let commands = command.get_subcommands().chain([&command]);
        texts.extend(commands.filter_map(|command| Some(command.get_after_help()?.to_string())));
        let mut seen = std::collections::BTreeSet::new();
        for line in texts.iter().flat_map(|text| text.lines()).flat_map(commands_in) {
            let words = split(&line);
            let verb = words.get(1).cloned().unwrap_or_default();
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}\n{error}");
            }
            seen.insert(verb);
        }
        let verbs: std::collections::BTreeSet<_> =
            Cli::command().get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
        assert_eq!(seen, verbs, "every verb has an example");
    }

    /// The commands that a line of text shows: in backquotes with an argument, or as the line itself.
    fn commands_in(line: &str) -> Vec<String> {
        let is_command = |text: &&str| text.starts_with("walguard ") && !text.starts_with("walguard --");
        let bare = line.trim().rsplit_once("WALGUARD_CLUSTER=main ").map_or(line.trim(), |(_, command)| command);
        if is_command(&bare) && !line.starts_with("walguard protects") {
            let end = [" | ", " > ", "   #"].iter().filter_map(|end| bare.find(end)).min().unwrap_or(bare.len());
            return vec![bare[..end].to_owned()];
        }
        // Quoted verbs without their arguments, as in "`walguard init` writes", are no examples.
        let quoted = line.split('`').skip(1).step_by(2).filter(is_command);
        quoted.filter(|text| line.starts_with('|') || text.contains(" --")).map(str::to_owned).collect()
    }

    /// Splits a command line at spaces, except within single quotes.
    fn split(line: &str) -> Vec<String> {
        let parts = line.split('\'').enumerate();
        let mut words = vec![String::new()];
        for (index, part) in parts {
            if index % 2 == 1 {
                words.last_mut().unwrap().push_str(part);
                continue;
            }
            for (index, piece) in part.split(' ').enumerate() {
                if index > 0 {
                    words.push(String::new());
                }
                words.last_mut().unwrap().push_str(piece);
            }
        }
        words.retain(|word| !word.is_empty());
        words
    }
}
