//! The running agent, as a process of its own.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use walguard::pg::Lsn;

use super::port::take_port;
use super::{Cluster, Scratch, Watchdog, wait_for, walguard_command};

/// How long an agent may take to come up or go down on a busy machine.
const AGENT_DEADLINE: Duration = Duration::from_secs(60);

/// What an agent is to work with. It can be spawned again and again: the spool stays.
#[derive(Debug)]
pub(crate) struct AgentBuilder {
    conninfo: String,
    repo: String,
    cluster: String,
    settings: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    spool: Option<PathBuf>,
}

impl AgentBuilder {
    /// The cluster's name in the repository; by default `main`.
    pub(crate) fn cluster(mut self, name: &str) -> Self {
        name.clone_into(&mut self.cluster);
        self
    }

    /// Another connection string than the role `walguard` over TCP: through a proxy, for example.
    pub(crate) fn conninfo(mut self, conninfo: &str) -> Self {
        conninfo.clone_into(&mut self.conninfo);
        self
    }

    /// Lines of the settings file.
    pub(crate) fn settings(mut self, toml: &str) -> Self {
        self.settings += toml;
        self.settings += "\n";
        self
    }

    /// A further argument.
    pub(crate) fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// An environment variable.
    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Keeps the spool elsewhere: on a small file system, for example.
    pub(crate) fn spool(mut self, dir: PathBuf) -> Self {
        self.spool = Some(dir);
        self
    }

    /// Starts the agent and does not wait for anything.
    pub(crate) fn spawn(self) -> Agent {
        let scratch = Scratch::new();
        let spool = self.spool.clone().unwrap_or_else(|| scratch.dir("spool"));
        let (http, http_lock) = take_port();
        let config = scratch.file("walguard.toml", &self.settings);
        let mut agent =
            Agent { wants: self, scratch, spool, config, http, _http_lock: http_lock, process: None, watchdog: None };
        agent.spawn_again();
        agent
    }
}

/// A running (or ended) agent. It is killed with this value; if the test fails, its output is shown.
#[derive(Debug)]
pub(crate) struct Agent {
    wants: AgentBuilder,
    scratch: Scratch,
    spool: PathBuf,
    config: PathBuf,
    http: u16,
    _http_lock: File,
    process: Option<Child>,
    watchdog: Option<Watchdog>,
}

impl Agent {
    /// An agent for `cluster` that archives into `repo`.
    pub(crate) fn builder(cluster: &Cluster, repo: &str) -> AgentBuilder {
        AgentBuilder {
            conninfo: cluster.conninfo(),
            repo: repo.to_owned(),
            cluster: "main".to_owned(),
            settings: String::new(),
            args: Vec::new(),
            env: Vec::new(),
            spool: None,
        }
    }

    /// Starts an agent with nothing special about it.
    pub(crate) fn spawn(cluster: &Cluster, repo: &str) -> Self {
        Self::builder(cluster, repo).spawn()
    }

    /// The flags that name the same settings file, server, repository and cluster to another verb.
    pub(crate) fn flags(&self) -> Vec<String> {
        let Self { wants, config, spool, .. } = self;
        let pairs = [
            ("--config", config.to_str().unwrap()),
            ("--pg", &wants.conninfo),
            ("--repo", &wants.repo),
            ("--cluster", &wants.cluster),
            ("--spool", spool.to_str().unwrap()),
        ];
        pairs.iter().flat_map(|(flag, value)| [(*flag).to_owned(), (*value).to_owned()]).collect()
    }

    /// Starts the agent again after its end, on the same spool.
    pub(crate) fn spawn_again(&mut self) {
        assert!(self.process.is_none(), "the agent runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut command = walguard_command(&["run", "--http"]);
        command.arg(format!("127.0.0.1:{}", self.http)).args(self.flags()).args(&self.wants.args);
        command.envs(self.wants.env.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let process = command.spawn().unwrap();
        self.watchdog = Some(Watchdog::over(process.id()));
        self.process = Some(process);
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.as_ref().expect("the agent runs").id()
    }

    pub(crate) fn spool(&self) -> &PathBuf {
        &self.spool
    }

    /// URL of a page of its HTTP service.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.http)
    }

    /// The HTTP service's address.
    pub(crate) fn http(&self) -> String {
        format!("127.0.0.1:{}", self.http)
    }

    /// Everything it has written, of all its lives.
    pub(crate) fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.join("agent.log")
    }

    /// Kills it as a crash does.
    pub(crate) fn sigkill(&mut self) {
        self.watchdog = None; // its number will soon be somebody else's
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    /// Asks it to stop, and waits until it has.
    pub(crate) async fn stop(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(self.process.as_ref().expect("the agent runs")), Signal::TERM).unwrap();
        self.ended(AGENT_DEADLINE).await
    }

    /// Waits until it has ended.
    pub(crate) async fn ended(&mut self, deadline: Duration) -> ExitStatus {
        let process = self.process.as_mut().expect("the agent runs");
        let begin = Instant::now();
        loop {
            if let Some(status) = process.try_wait().unwrap() {
                (self.process, self.watchdog) = (None, None);
                return status;
            }
            assert!(begin.elapsed() < deadline, "the agent does not end:\n{}", self.log());
            tokio::time::sleep(super::POLL_INTERVAL).await;
        }
    }

    /// True as long as it runs.
    pub(crate) fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_none())
    }

    /// Waits until the server has heard from the agent that everything up to `lsn` is durable in the repository (with
    /// `durability = "spool"`: in the spool). What the server believes is what it will act upon.
    pub(crate) async fn wait_archived(&mut self, cluster: &Cluster, lsn: Lsn, deadline: Duration) {
        let client = cluster.client().await;
        let query = format!(
            "SELECT 1 FROM pg_stat_replication WHERE application_name = 'walguard' AND flush_lsn >= '{lsn}' LIMIT 1"
        );
        let begin = Instant::now();
        loop {
            let rows = client.query(&query, &[]).await.unwrap_or_else(|error| panic!("{error:?}\n{}", cluster.log()));
            if !rows.is_empty() {
                return;
            }
            assert!(self.is_running(), "the agent ended:\n{}", self.log());
            assert!(
                begin.elapsed() < deadline,
                "waited {deadline:?} in vain for {lsn} to be archived:\n{}",
                self.log()
            );
            tokio::time::sleep(super::POLL_INTERVAL).await;
        }
    }

    /// Waits until the server shows the agent's stream.
    pub(crate) async fn wait_streaming(&mut self, cluster: &Cluster) {
        let query = "SELECT count(*) > 0 FROM pg_stat_replication WHERE application_name = 'walguard' \
                     AND state = 'streaming'";
        wait_for("the agent's stream", AGENT_DEADLINE, || async { cluster.text(query).await == "t" }).await;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.sigkill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(80)..).unwrap_or_default().join("\n");
            eprintln!("-- end of the agent's output\n{tail}\n--");
        }
    }
}
