//! Log lines on standard error.

use std::io::{self, IsTerminal as _};

use anyhow::Context as _;
use tracing_subscriber::EnvFilter;

use crate::args::{GlobalArgs, LogFormat};

/// What is logged without `--verbose` and `WALGUARD_LOG`: our own doings; of libraries only what is wrong.
const DEFAULT: &str = "warn,walguard=info";

/// Sets up logging. `WALGUARD_LOG` takes the directives of `tracing-subscriber`'s `EnvFilter` and wins over `--verbose`.
pub(crate) fn install(args: &GlobalArgs) -> anyhow::Result<()> {
    let directives = match (std::env::var("WALGUARD_LOG"), args.verbose) {
        (Ok(directives), _) if !directives.is_empty() => directives,
        (_, 0) => DEFAULT.to_owned(),
        (_, 1) => "info,walguard=debug".to_owned(),
        (_, _) => "debug,walguard=trace".to_owned(),
    };
    let filter = EnvFilter::try_new(&directives).with_context(|| format!("read WALGUARD_LOG={directives}"))?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match args.log_format {
        LogFormat::Json => lines.json().flatten_event(true).init(),
        LogFormat::Text => lines.with_target(false).with_ansi(io::stderr().is_terminal()).init(),
    }
    Ok(())
}
