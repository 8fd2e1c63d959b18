//! Where the demo plays: a directory with two servers and an agent in it, and their end.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::process::{Child, Command};
use tokio_postgres::Client;
use walguard::capture::{self, ConnInfo, Environment};
use walguard::pg::ServerVersion;
use walguard::restore::binaries::{self, Binaries};
use walguard::serve::status::Status;

use super::{DATABASE, PATIENCE, POLL_INTERVAL, tail};

/// Time for a program to end well before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// The directory, and the processes that run in it.
#[derive(Debug)]
pub(super) struct Stage {
    dir: PathBuf,
    programs: Binaries,
    /// Port of the agent's status.
    http: u16,
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
        // Nobody takes it in the moment before the agent does.
        let http = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr());
        let http = http.context("find a free port")?.port();
        Ok(Self { dir, programs, http, server: None, agent: None })
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
        while self.client("postgres", "postgres").await.is_err() {
            let ended = self.server.as_mut().and_then(|server| server.try_wait().ok()).flatten();
            if ended.is_some() || begin.elapsed() > PATIENCE {
                bail!("the server does not come up");
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// Writes the settings file. Alarms go to a program, which keeps each in a file of its own.
    pub(super) fn write_settings(&self) -> anyhow::Result<()> {
        fs::create_dir(self.alarms())?;
        fs::create_dir(self.restored())?;
        // A file has its name once all of it is there.
        let keep = r#"f=$(mktemp "$0/XXXXXX") && cat > "$f" && mv "$f" "$f.json""#;
        let path = |path: PathBuf| toml::Value::from(path.display().to_string());
        let text = format!(
            "cluster = \"demo\"\n[postgres]\nconninfo = {}\n[repository]\nurl = {}\n[spool]\ndir = {}\n\
             [http]\nlisten = \"127.0.0.1:{}\"\n[restore]\ntarget_dir = {}\n\
             [notify.demo]\nkind = \"command\"\ncommand = [\"/bin/sh\", \"-c\", {}, {}]\n",
            toml::Value::from(format!("host={} user=walguard dbname={DATABASE}", self.dir.display())),
            toml::Value::from(format!("file://{}", self.dir.join("repository").display())),
            path(self.dir.join("spool")),
            self.http,
            path(self.restored()),
            toml::Value::from(keep),
            path(self.alarms()),
        );
        fs::write(self.settings(), text).context("write the settings")
    }

    fn settings(&self) -> PathBuf {
        self.dir.join("walguard.toml")
    }

    fn alarms(&self) -> PathBuf {
        self.dir.join("alarms")
    }

    /// Starts the agent as a process of its own.
    pub(super) fn start_agent(&mut self) -> anyhow::Result<()> {
        let log = File::create(self.dir.join("agent.log"))?;
        let mut agent = self.verb(&["run", "--no-backups"])?;
        agent.process_group(0).stdout(log.try_clone()?).stderr(log);
        self.agent = Some(agent.spawn().context("start the agent")?);
        Ok(())
    }

    /// What the agent says of itself.
    pub(super) async fn status(&self) -> Option<Status> {
        let url = format!("http://127.0.0.1:{}/status", self.http);
        let client = reqwest::Client::builder().timeout(GRACE).no_proxy().build().ok()?;
        client.get(url).send().await.ok()?.json().await.ok()
    }

    /// The alarms that came, in the order in which they did, and when.
    pub(super) fn told(&self) -> Vec<Told> {
        let entries = fs::read_dir(self.alarms()).into_iter().flatten().flatten();
        let entries = entries.filter(|entry| entry.path().extension().is_some_and(|end| end == "json"));
        let read = entries.filter_map(|entry| {
            let at = entry.metadata().and_then(|meta| meta.modified()).ok()?;
            let message = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            Some(Told { at, message })
        });
        let mut told: Vec<_> = read.collect();
        told.sort_by_key(|told| told.message["revision"].as_u64());
        told
    }

    /// This program with the settings of the demo, and none from outside.
    fn verb(&self, args: &[&str]) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.arg("--config").arg(self.settings()).args(args);
        Ok(self.alone(command))
    }

    /// A command that sees nothing of our own settings.
    fn alone(&self, mut command: Command) -> Command {
        for (name, _) in std::env::vars_os() {
            if ["PG", "WALGUARD_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
                command.env_remove(name);
            }
        }
        command.env("WALGUARD_PG_BIN_DIR", &self.programs.dir);
        command.stdin(Stdio::null()).kill_on_drop(true).process_group(0);
        command
    }

    /// Runs a verb to its end and gives what it prints as JSON, if that is what it prints.
    pub(super) async fn walguard(&self, args: &[&str]) -> anyhow::Result<serde_json::Value> {
        let printed = ended(self.verb(args)?).await?;
        Ok(serde_json::from_slice(&printed).unwrap_or_default())
    }

    /// The report of an incident; kept in a file if one is named.
    pub(super) async fn report(&self, incident: &str, file: Option<&Path>) -> anyhow::Result<String> {
        let text = ended(self.verb(&["incidents", "report", incident])?).await.context("write the report")?;
        let text = String::from_utf8_lossy(&text).into_owned();
        if let Some(file) = file {
            fs::write(file, &text).with_context(|| format!("write {}", file.display()))?;
        }
        Ok(text)
    }

    /// Runs a command as somebody types it into a shell, who has this program in his path as `walguard`.
    pub(super) async fn shell(&self, line: &str) -> anyhow::Result<()> {
        let bin = self.dir.join("bin");
        fs::create_dir_all(&bin)?;
        let link = bin.join("walguard");
        if !link.exists() {
            std::os::unix::fs::symlink(std::env::current_exe().context("find this program")?, link)?;
        }
        let rest = std::env::var("PATH").unwrap_or_default();
        let mut shell = self.alone(Command::new("/bin/sh"));
        shell.args(["-c", line]).env("PATH", format!("{}:{rest}", bin.display())).current_dir("/");
        ended(shell).await.map(drop)
    }

    /// A connection to the server.
    pub(super) async fn client(&self, role: &str, database: &str) -> anyhow::Result<Client> {
        connect(&self.dir, 5432, role, database, "walguard demo").await
    }

    /// A connection of the program that does what it should not.
    pub(super) async fn culprit(&self) -> anyhow::Result<Client> {
        connect(&self.dir, 5432, "game_owner", DATABASE, "migrate.py").await
    }

    /// A connection to the restored server. It listens where the fourth and fifth line of its `postmaster.pid` say.
    pub(super) async fn restored_client(&self) -> anyhow::Result<Client> {
        let pid_file = self.restored_pid_file().context("find the restored server")?;
        let mut lines = pid_file.lines().skip(3);
        let port = lines.next().and_then(|line| line.trim().parse().ok()).context("find the restored server's port")?;
        let sockets = lines.next().context("find the restored server's socket")?;
        connect(Path::new(sockets), port, "postgres", DATABASE, "walguard demo").await
    }

    /// `postmaster.pid` of the one server that was restored.
    fn restored_pid_file(&self) -> Option<String> {
        let mut entries = fs::read_dir(self.restored()).ok()?.flatten();
        entries.find_map(|entry| fs::read_to_string(entry.path().join("postmaster.pid")).ok())
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
        let pid_file = self.restored_pid_file().unwrap_or_default();
        if let Some(pid) = pid_file.lines().next().and_then(|line| line.trim().parse().ok()).and_then(pid_of) {
            end(pid, Signal::QUIT);
        }
        let _ = fs::remove_dir_all(&self.dir); // there is nobody left who could be told
    }
}

/// An alarm.
#[derive(Clone, Debug)]
pub(super) struct Told {
    /// When it was there.
    pub(super) at: SystemTime,
    /// The message.
    pub(super) message: serde_json::Value,
}

impl Told {
    /// A text of it.
    pub(super) fn text(&self, field: &str) -> &str {
        self.message[field].as_str().unwrap_or_default()
    }

    /// The command in it that restores.
    pub(super) fn restore_command(&self) -> Option<String> {
        let commands = self.message["commands"].as_array()?.iter().filter_map(|one| one["command"].as_str());
        let restores = |line: &&str| line.starts_with("walguard restore ") && !line.contains(" --dry-run");
        commands.into_iter().find(restores).map(str::to_owned)
    }
}

async fn connect(sockets: &Path, port: u16, role: &str, database: &str, application: &str) -> anyhow::Result<Client> {
    let text = format!("host={} port={port} user={role} dbname={database}", sockets.display());
    let info = ConnInfo::parse(&text, &Environment::default())?.with_application_name(application);
    Ok(capture::connect_sql(&info).await?)
}

/// What a command printed that ended well.
async fn ended(mut command: Command) -> anyhow::Result<Vec<u8>> {
    let output = command.output().await.context("run walguard")?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim().trim_start_matches("error: "));
    }
    Ok(output.stdout)
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
