//! Failures -> `error:` and `HINT:` lines, and exit codes.

use std::io::{self, Write as _};
use std::process::ExitCode;

use walguard::capture::CaptureError;
use walguard::capture::spool::SpoolError;
use walguard::notify::OpenError;
use walguard::repo::RepoError;
use walguard::repo::archiver::ArchiveError;
use walguard::repo::backup::BackupError;
use walguard::repo::bases::BaseError;
use walguard::repo::index::walk::WalkError;
use walguard::repo::lease::LeaseError;
use walguard::repo::store::StoreError;
use walguard::repo::wal_push::PushError;
use walguard::restore::error::RestoreError;
use walguard::restore::extract::ExtractError;
use walguard::restore::rebuild::RebuildError;
use walguard::restore::target::TargetError;
use walguard::restore::wal_fetch::FetchError;
use walguard::settings::SettingsError;

use crate::render::{self, PrintError};

/// Exit code: failed.
pub(crate) const FAILED: u8 = 1;
/// Exit code: wrong usage or settings.
pub(crate) const USAGE: u8 = 2;
/// Exit code: finished, but attention needed.
pub(crate) const ATTENTION: u8 = 3;
/// Exit code: the same command may work later (`EX_TEMPFAIL` of `sysexits.h`).
pub(crate) const TRY_AGAIN: u8 = 75;

/// The command line or the settings ask for something that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub(crate) struct UsageError {
    problem: String,
    hint: Option<String>,
}

impl UsageError {
    pub(crate) fn new(problem: impl Into<String>) -> Self {
        Self { problem: problem.into(), hint: None }
    }

    pub(crate) fn with_hint(problem: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { problem: problem.into(), hint: Some(hint.into()) }
    }
}

/// What an error means for the one who called: exit code and what he can do.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    code: u8,
    hint: Option<String>,
}

impl Verdict {
    /// Of an error that can only pass or stay.
    const fn passing(is_transient: bool, hint: Option<String>) -> Self {
        Self { code: if is_transient { TRY_AGAIN } else { FAILED }, hint }
    }
}

/// Asks each stage's error in the chain, the outermost first: it knows most about what was being done.
fn judge(error: &anyhow::Error) -> Verdict {
    let verdicts = error.chain().filter_map(verdict);
    verdicts.fold(Verdict::passing(false, None), |before, next| Verdict {
        code: if before.code == FAILED { next.code } else { before.code },
        hint: before.hint.or(next.hint),
    })
}

/// What one error of a chain means, if it is one of ours.
fn verdict(cause: &(dyn std::error::Error + 'static)) -> Option<Verdict> {
    if let Some(error) = cause.downcast_ref::<UsageError>() {
        return Some(Verdict { code: USAGE, hint: error.hint.clone() });
    }
    if let Some(error) = cause.downcast_ref::<SettingsError>() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    if let Some(error) = cause.downcast_ref::<TargetError>() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    if let Some(error) = cause.downcast_ref::<OpenError>() {
        return Some(Verdict { code: USAGE, hint: error.hint.clone() });
    }
    if let Some(error @ CaptureError::Conninfo { .. }) = cause.downcast_ref() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    if let Some(error @ RepoError::Config { .. }) = cause.downcast_ref() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    if let Some(error @ (BackupError::Label(_) | BackupError::LabelTaken(_))) = cause.downcast_ref() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    if let Some(error @ (WalkError::NoTimeline(_) | WalkError::Version(_))) = cause.downcast_ref() {
        return Some(Verdict { code: USAGE, hint: error.hint() });
    }
    // All stages' errors answer the same two questions.
    macro_rules! judged {
        ($($error:ty),+) => {
            $(if let Some(error) = cause.downcast_ref::<$error>() {
                return Some(Verdict::passing(error.is_transient(), error.hint()));
            })+
        };
    }
    judged!(CaptureError, SpoolError, StoreError, RepoError, LeaseError, BackupError, ExtractError, RestoreError);
    judged!(ArchiveError, PushError, FetchError, BaseError, RebuildError);
    None
}

/// Tells a failure and gives its exit code. With `json` the failure is an object on standard output too, so that a
/// program need not read text.
pub(crate) fn failure(error: &anyhow::Error, json: bool) -> ExitCode {
    if error.downcast_ref::<PrintError>().is_some_and(PrintError::is_reader_gone) {
        return ExitCode::SUCCESS;
    }
    let verdict = judge(error);
    let hint = verdict.hint.as_ref().map(|hint| format!("HINT: {hint}\n")).unwrap_or_default();
    let _ = write!(io::stderr(), "error: {error:#}\n{hint}"); // the exit code still tells
    if json {
        let value = serde_json::json!({
            "error": format!("{error:#}"), "hint": verdict.hint, "exit_code": verdict.code,
        });
        let _ = render::print_json(&value); // if nobody reads it, nobody misses it
    }
    ExitCode::from(verdict.code)
}

/// Tells what clap has to say: help and version are no errors.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE))
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    #[test]
    fn a_hint_is_found_below_the_context() {
        let result: Result<(), _> = Err(UsageError::with_hint("no such thing", "try this"));
        let error = result.context("read the settings").unwrap_err();
        assert_eq!(judge(&error), Verdict { code: USAGE, hint: Some("try this".into()) });
    }

    #[test]
    fn what_no_stage_explains_is_a_plain_failure() {
        assert_eq!(judge(&anyhow::anyhow!("something")), Verdict { code: FAILED, hint: None });
    }
}
