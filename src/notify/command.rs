//! A program on this machine: the message as JSON on its standard input, the main facts as variables. No shell reads
//! anything of it, so what a table is called cannot be a command.

use std::io::ErrorKind;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::error::SendError;
use super::message::{Message, clean};

/// Bytes of what the program says on standard error that are kept.
const SAID_BYTES_MAX: u64 = 4096;
/// Characters of it that are told.
const SAID_CHARS_MAX: usize = 300;

/// `EX_TEMPFAIL` of `sysexits.h`.
const TRY_AGAIN: i32 = 75;

/// Variables of the agent that the program gets; the others may hold secrets of ours.
const INHERITED: [&str; 6] = ["PATH", "HOME", "LANG", "LC_ALL", "TZ", "USER"];

pub(super) async fn run(command: &[String], message: &Message, timeout: Duration) -> Result<(), SendError> {
    let [program, args @ ..] = command else {
        return Err(SendError::Refused { problem: "no program is set".to_owned(), hint: None });
    };
    let mut child = tokio::process::Command::new(program);
    child.args(args).env_clear().envs(variables(message));
    child.envs(INHERITED.iter().filter_map(|name| Some((*name, std::env::var_os(name)?))));
    // A group of its own, so that what it started can be ended with it.
    child.process_group(0).kill_on_drop(true);
    child.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = child.spawn().map_err(|error| {
        let problem = format!("start {program}: {error}");
        match error.kind() {
            // Somebody is just writing a new version of it.
            ErrorKind::ExecutableFileBusy => SendError::away(problem),
            _ => SendError::Refused {
                problem,
                hint: Some("the agent's user must be able to run it; give its whole path".to_owned()),
            },
        }
    })?;
    let group = Group(child.id());
    let (mut stdin, stderr) = (child.stdin.take(), child.stderr.take());
    let json = serde_json::to_vec(message).expect("a message becomes JSON");
    let talk = async {
        let feed = async {
            if let Some(mut stdin) = stdin.take() {
                let _ = stdin.write_all(&json).await; // a program that does not read it may still succeed
            }
        };
        let listen = async {
            let mut said = Vec::new();
            if let Some(mut stderr) = stderr {
                let _ = (&mut stderr).take(SAID_BYTES_MAX).read_to_end(&mut said).await; // the exit code is what counts
                // The rest is read and forgotten: a program that waits for a reader would never end.
                let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            }
            said
        };
        let (_, said, status) = tokio::join!(feed, listen, child.wait());
        (said, status)
    };
    let Ok((said, status)) = tokio::time::timeout(timeout, talk).await else {
        drop(group);
        let problem = format!("{program} did not end within {timeout:?} and was killed");
        return Err(SendError::Unavailable { problem, retry_after: None, maybe_taken: true });
    };
    let status = status.map_err(|error| SendError::away(format!("wait for {program}: {error}")))?;
    group.ended();
    if status.success() {
        return Ok(());
    }
    let said = clean(&String::from_utf8_lossy(&said), SAID_CHARS_MAX);
    let said = if said.is_empty() { String::new() } else { format!(": {said}") };
    let problem = format!("{program} ended with {status}{said}");
    match status.code() {
        Some(TRY_AGAIN) | None => {
            Err(SendError::Unavailable { problem, retry_after: None, maybe_taken: status.code().is_none() })
        }
        Some(_) => Err(SendError::Refused { problem, hint: None }),
    }
}

fn variables(message: &Message) -> Vec<(&'static str, String)> {
    // The one that restores, not the one that only shows the plan.
    let restores = |text: &str| text.starts_with("walguard restore ") && !text.contains(" --dry-run");
    let restore = message.commands.iter().find(|command| restores(&command.command));
    vec![
        ("WALGUARD_CLUSTER", message.cluster.clone()),
        ("WALGUARD_COMMITTED", message.committed.map_or_else(String::new, |committed| committed.to_string())),
        ("WALGUARD_DEDUP_KEY", message.dedup_key.clone()),
        ("WALGUARD_DELIVERY", message.delivery.clone()),
        ("WALGUARD_EVENT", message.event.name().to_owned()),
        ("WALGUARD_HEADLINE", message.headline()),
        ("WALGUARD_INCIDENT", message.incident.clone()),
        ("WALGUARD_RESTORE_COMMAND", restore.map_or_else(String::new, |c| c.command.clone())),
        ("WALGUARD_REVISION", message.revision.to_string()),
        ("WALGUARD_ROWS_LOST", message.rows_lost.to_string()),
        ("WALGUARD_SEVERITY", message.severity.as_str().to_owned()),
        ("WALGUARD_STATE", message.state.as_str().to_owned()),
        ("WALGUARD_TEST", message.test.to_string()),
        ("WALGUARD_WHO", message.who.clone()),
    ]
}

/// Kills the program and whatever it started, unless it ended by itself.
struct Group(Option<u32>);

impl Group {
    /// The program ended: what it left running on purpose is its own affair, and the number may be another's soon.
    fn ended(mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let pid = self.0.and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        if let Some(pid) = pid {
            let _ = kill_process_group(pid, Signal::KILL); // it may be gone
        }
    }
}
