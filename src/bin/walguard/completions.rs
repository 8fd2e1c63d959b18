//! `walguard completions`: the command line as a script for a shell.

use clap::CommandFactory as _;

use crate::Outcome;
use crate::args::{Cli, CompletionsArgs};
use crate::render;

/// Prints the script. (Into memory first: `clap_complete` panics if its writer fails.)
pub(crate) fn run(args: &CompletionsArgs) -> anyhow::Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "walguard", &mut script);
    render::print(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Done)
}
