//! Servers that `walguard restore` left running.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, NoTls};

use super::{Finished, Scratch, finish, wait_for, walguard_command};

/// How long a restored server may take to stop.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// A restored data directory, and its server if it runs. Both go with this value.
#[derive(Debug)]
pub(crate) struct Restored {
    scratch: Scratch,
    /// What the program told, as JSON.
    pub(crate) told: serde_json::Value,
    pid: Option<Pid>,
}

impl Restored {
    /// Runs `walguard restore --yes --json` with these arguments into a directory of its own.
    pub(crate) fn run(flags: &[String], args: &[&str]) -> Self {
        Self::run_with(&[], flags, args)
    }

    /// As [`Restored::run`], with variables in the program's environment: the way into an S3 store.
    pub(crate) fn run_with(env: &[(&str, String)], flags: &[String], args: &[&str]) -> Self {
        let scratch = Scratch::new();
        let mut command = restore_command(&scratch.join("data"), flags, args);
        command.envs(env.iter().map(|(name, value)| (name, value)));
        let finished = finish(command).expect(0);
        let told = finished.json();
        let pid = running(&told)["pid"].as_i64().and_then(|pid| Pid::from_raw(pid as i32));
        Self { scratch, told, pid }
    }

    pub(crate) fn data_dir(&self) -> PathBuf {
        self.scratch.join("data")
    }

    /// A connection of the superuser over the socket.
    pub(crate) async fn client(&self) -> Client {
        self.client_of("postgres").await
    }

    /// The same to another database.
    pub(crate) async fn client_of(&self, database: &str) -> Client {
        let running = running(&self.told);
        let mut config = tokio_postgres::Config::new();
        config.host_path(running["socket_dir"].as_str().unwrap()).port(running["port"].as_u64().unwrap() as u16);
        let (client, connection) = config.user("postgres").dbname(database).connect(NoTls).await.unwrap();
        tokio::spawn(connection); // ends with the client
        client
    }

    /// Stops the server and waits until it is gone.
    pub(crate) async fn stop(&mut self) {
        let pid = self.pid.take().expect("the restored server runs");
        kill_process(pid, Signal::INT).unwrap();
        wait_for("the restored server's end", STOP_DEADLINE, || async { is_gone(pid) }).await;
    }
}

/// What is told of the server that runs, restored from WAL or made for a rebuild.
fn running(told: &serde_json::Value) -> &serde_json::Value {
    if told["server"].is_object() { &told["server"] } else { &told["restore"]["running"] }
}

impl Drop for Restored {
    fn drop(&mut self) {
        if let Some(pid) = self.pid {
            let _ = kill_process(pid, Signal::QUIT); // its directory goes next
        }
    }
}

/// It has ended. Nobody may have taken note of that yet: its parent, the program, is gone too.
fn is_gone(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.map_or(true, |stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

/// Runs `walguard restore --yes --json` with these arguments.
pub(crate) fn restore(data_dir: &Path, flags: &[String], args: &[&str]) -> Finished {
    finish(restore_command(data_dir, flags, args))
}

/// The command of [`restore`].
pub(crate) fn restore_command(data_dir: &Path, flags: &[String], args: &[&str]) -> Command {
    let mut all = vec!["restore", "--yes", "--json", "--target-dir", data_dir.to_str().unwrap()];
    all.extend(flags.iter().map(String::as_str));
    all.extend(args);
    walguard_command(&all)
}
