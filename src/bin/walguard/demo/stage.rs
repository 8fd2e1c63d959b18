//! Where the demo plays: a directory with two servers and an agent in it, and their end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::process::{Child, Command};
use tokio_postgres::Client;
use walguard::capture::{self, ConnInfo, Environment};
use walguard::pg::ServerVersion;
use walguard::restore::binaries::{self, Binaries};

use super::{PATIENCE, POLL_INTERVAL, tail};

/// Time for a program to end well before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// The directory, and the processes that run in it.
#[derive(Debug)]
pub(super) struct Stage {
    dir: PathBuf,
    programs: Binaries,
    server: Option<Child>,
    agent: Option<Child>,
}

impl Stage {
    /// Makes the directory. Finds PostgreSQL's programs, the newest that walguard knows unless told.
    pub(super) fn set(given: Option<&Path>) -> anyhow::Result<Self> {
        let path = std::env::var_os("PATH");
        let majors = (ServerVersion::MAJOR_MIN..=ServerVersion::MAJOR_MAX).rev();
        let mut found = majors.map(|major| binaries::find(major, given, path.as_deref()));
        let programs = match found.find(Result::is_ok) {
            Some(programs) => programs?,
            None => binaries::find(ServerVersion::MAJOR_MAX, given, path.as_deref())?,
        };
        let dir = std::env::temp_dir().join(format!("walguard-demo-{}", std::process::id()));
        fs::create_dir(&dir).with_context(|| format!("make the directory {}", dir.display()))?;
        Ok(Self { dir, programs, server: None, agent: None })
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn version(&self) -> ServerVersion {
        self.programs.version
    }

    fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    fn restored(&self) -> PathBuf {
        self.dir.join("restored")
    }

    /// Makes a cluster and starts its server, which listens on a socket in the directory only.
    pub(super) async fn start_server(&mut self) -> anyhow::Result<()> {
        let log = self.dir.join("initdb.log");
        let mut initdb = Command::new(self.programs.dir.join("initdb"));
        initdb.args(["--username=postgres", "--auth=trust", "--data-checksums", "--no-sync", "-D"]).arg(self.data());
        let status = initdb.stdout(File::create(&log)?).stderr(File::options().append(true).open(&log)?).status().await;
        let status = status.context("run initdb")?;
        ensure!(status.success(), "initdb failed: {}", tail(&log));

        let log = File::create(self.dir.join("server.log"))?;
        let mut server = Command::new(self.programs.dir.join("postgres"));
        server.arg("-D").arg(self.data()).args(["-c", "listen_addresses="]);
        server.arg("-c").arg(format!("unix_socket_directories={}", self.dir.display()));
        // A group of its own: Ctrl-C ends the demo, which then ends the server in its turn.
        server.process_group(0).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        self.server = Some(server.spawn().context("start the server")?);
        let begin = Instant::now();
        while self.client().await.is_err() {
            let ended = self.server.as_mut().and_then(|server| server.try_wait().ok()).flatten();
            if ended.is_some() || begin.elapsed() > PATIENCE {
                bail!("the server does not come up");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Starts the agent as a process of its own.
    pub(super) fn start_agent(&mut self) -> anyhow::Result<()> {
        let log = File::create(self.dir.join("agent.log"))?;
        let mut agent = self.verb(&["run", "--no-backups", "--http", "127.0.0.1:0"])?;
        agent.process_group(0).stdout(log.try_clone()?).stderr(log);
        self.agent = Some(agent.spawn().context("start the agent")?);
        Ok(())
    }

    /// This program with the settings of the demo, and none from outside.
    fn verb(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        for (name, _) in std::env::vars_os() {
            if ["PG", "WALGUARD_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("WALGUARD_PG", format!("host={} user=walguard", self.dir.display()));
        command.env("WALGUARD_REPO", self.dir.join("repository"));
        command.env("WALGUARD_SPOOL", self.dir.join("spool"));
        command.env("WALGUARD_CLUSTER", "demo");
        command.args(args).stdin(Stdio::null()).kill_on_drop(true);
        Ok(command)
    }

    /// Runs a verb to its end and gives what it prints as JSON, if that is what it prints.
    pub(super) async fn walguard(&self, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let output = self.verb(args)?.process_group(0).output().await.context("run walguard")?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("error: "));
        }
        Ok(serde_json::from_slice(&output.stdout).unwrap_or_default())
    }

    /// Restores and starts what was restored, as a primary.
    pub(super) async fn restore(&self, target: &str) -> anyhow::Result<()> {
        let (restored, programs, dir) = (self.restored(), &self.programs.dir, &self.dir);
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let (restored, programs, sockets) = (text(&restored), text(programs), text(&dir.join("restored.sockets")));
        fs::create_dir(&sockets)?;
        let mut args = vec!["restore", "--to", target, "--target-dir", &restored, "--pg-bin-dir", &programs];
        args.extend(["--socket-dir", &sockets, "--action", "promote", "--yes", "--json"]);
        self.walguard(&args).await.map(drop)
    }

    /// A connection to the server.
    pub(super) async fn client(&self) -> anyhow::Result<Client> {
        self.connect(&self.dir, 5432).await
    }

    /// A connection to the restored server. It listens where the fourth and fifth line of its `postmaster.pid` say.
    pub(super) async fn restored_client(&self) -> anyhow::Result<Client> {
        let pid_file =
            fs::read_to_string(self.restored().join("postmaster.pid")).context("find the restored server")?;
        let mut lines = pid_file.lines().skip(3);
        let port = lines.next().and_then(|line| line.trim().parse().ok()).context("find the restored server's port")?;
        let sockets = lines.next().context("find the restored server's socket")?;
        self.connect(Path::new(sockets), port).await
    }

    async fn connect(&self, sockets: &Path, port: u16) -> anyhow::Result<Client> {
        let text = format!("host={} port={port} user=postgres dbname=postgres", sockets.display());
        let info = ConnInfo::parse(&text, &Environment::default())?;
        Ok(capture::connect_sql(&info).await?)
    }

    /// Logs the last lines of what servers and agent wrote: why something failed.
    pub(super) fn tell_logs(&self) {
        for name in ["server.log", "agent.log"] {
            let text = tail(&self.dir.join(name));
            if !text.is_empty() {
                tracing::error!("the end of {name}:\n{text}");
            }
        }
    }

    /// Ends all processes and removes the directory.
    pub(super) fn strike(&mut self) {
        let agent = self.agent.take();
        let server = self.server.take();
        // The agent first: the server then need not wait for its walsender.
        for (child, signal) in [(agent, Signal::TERM), (server, Signal::QUIT)] {
            if let Some(pid) = child.as_ref().and_then(Child::id).and_then(pid_of) {
                end(pid, signal);
            }
        }
        let pid_file = fs::read_to_string(self.restored().join("postmaster.pid")).unwrap_or_default();
        if let Some(pid) = pid_file.lines().next().and_then(|line| line.trim().parse().ok()).and_then(pid_of) {
            end(pid, Signal::QUIT);
        }
        let _ = fs::remove_dir_all(&self.dir); // there is nobody left who could be told
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.strike();
    }
}

fn pid_of(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

/// Asks a process to end, and kills it if it takes too long.
fn end(pid: Pid, signal: Signal) {
    let _ = kill_process(pid, signal);
    let begin = Instant::now();
    while is_running(pid) {
        if begin.elapsed() > GRACE {
            let _ = kill_process(pid, Signal::KILL);
            return;
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// A child that has ended but was not waited for still has its number: its state (`man 5 proc`) tells.
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    let zombie = stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
    test_kill_process(pid).is_ok() && !zombie
}
