//! The restored server: started, watched until it stands at the target, and promoted, stopped or left paused.

use std::fs;
use std::fs::File;
use std::io::ErrorKind;
use std::io::Read as _;
use std::io::Seek as _;
use std::io::SeekFrom;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, NoTls};

use super::binaries::Binaries;
use super::error::RestoreError;
use super::recovery::HBA;
use crate::pg::{Lsn, PgTime};

/// How the restored server is reached while walguard watches it, and after.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listen {
    /// TCP port on the loopback interface; without one the server listens on its socket only.
    pub port: Option<u16>,
    /// Directory of the Unix socket; by default the data directory, or a private one if that path is too long.
    pub socket_dir: Option<PathBuf>,
}

impl Listen {
    /// Fails if another server listens there: the restored one could not start, and we would ask the wrong one how far
    /// it is.
    pub(super) fn check_free(&self, data_dir: &Path) -> Result<(), RestoreError> {
        let port = self.port.unwrap_or(DEFAULT_PORT);
        let socket = self.socket_dir.as_deref().unwrap_or(data_dir).join(format!(".s.PGSQL.{port}"));
        if UnixStream::connect(&socket).is_ok() {
            return Err(RestoreError::Option {
                problem: format!("another server listens on {}", socket.display()),
                hint: "choose another --port, or a directory of its own with --socket-dir".to_owned(),
            });
        }
        match self.port.map(|port| TcpListener::bind((Ipv4Addr::LOCALHOST, port))) {
            Some(Err(error)) if error.kind() == ErrorKind::AddrInUse => Err(RestoreError::Option {
                problem: format!("port {port} is in use"),
                hint: "choose another --port; without one the server listens on its socket only".to_owned(),
            }),
            _ => Ok(()), // anything else the server says better
        }
    }
}

/// The port in the name of a socket where nobody asked for one.
pub(super) const DEFAULT_PORT: u16 = 5432;

/// A Unix socket's path has at most 107 bytes (`sun_path`), of which its name takes up to 18.
pub(super) const SOCKET_DIR_BYTES_MAX: usize = 107 - 18;

/// The log of the restored server, in its data directory.
pub(super) const LOG: &str = "walguard-restore.log";

/// Lines of the log shown when the server dies.
const LOG_TAIL_LINES: usize = 15;

/// What is read of the log's end to find them.
const LOG_TAIL_BYTES: u64 = 16 << 10;

/// How long a server may take to stop: a shutdown writes all that is in memory.
pub(super) const STOP_DEADLINE: Duration = Duration::from_secs(600);

/// How often the server is asked how far it is.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A restored server that runs.
#[derive(Debug)]
pub(super) struct Instance {
    child: Child,
    data_dir: PathBuf,
    log: PathBuf,
    /// Where its log of this run begins.
    log_from: u64,
    pub(super) socket_dir: PathBuf,
    pub(super) port: u16,
    role: String,
}

/// How far a server in recovery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Replay {
    /// False once it was promoted.
    pub(super) in_recovery: bool,
    /// It waits at a place where it was told to wait.
    pub(super) paused: bool,
    /// The end of the last record replayed.
    pub(super) lsn: Option<Lsn>,
    /// When the last transaction replayed had ended.
    pub(super) time: Option<PgTime>,
}

impl Instance {
    /// Starts the server on a configured data directory, and does not wait. It goes on when this process ends. `more` are
    /// settings of this run alone.
    pub(super) fn start(
        binaries: &Binaries,
        data_dir: &Path,
        listen: &Listen,
        role: &str,
        more: &[(&'static str, String)],
    ) -> Result<Self, RestoreError> {
        let socket_dir = socket_dir(data_dir, listen)?;
        let log = data_dir.join(LOG);
        let output = File::options().create(true).append(true).open(&log).map_err(RestoreError::file("open", &log))?;
        let log_from = output.metadata().map(|meta| meta.len()).unwrap_or(0);
        let port = listen.port.unwrap_or(DEFAULT_PORT);
        let program = binaries.dir.join("postgres");
        let mut command = Command::new(&program);
        command.arg("-D").arg(data_dir).current_dir(data_dir);
        let in_data = |name: &str| data_dir.join(name).display().to_string();
        let mut settings = vec![
            ("data_directory", data_dir.display().to_string()),
            ("hba_file", in_data(HBA)),
            ("ident_file", in_data("pg_ident.conf")),
            ("listen_addresses", listen.port.map_or(String::new(), |_| "localhost".to_owned())),
            ("port", port.to_string()),
            ("unix_socket_directories", socket_dir.display().to_string()),
            ("unix_socket_permissions", "0700".to_owned()),
            ("unix_socket_group", String::new()),
            ("logging_collector", "off".to_owned()),
            ("log_destination", "stderr".to_owned()),
        ];
        if listen.port.is_none() {
            // Nobody comes over the network, and the certificates may not be here.
            settings.push(("ssl", "off".to_owned()));
        }
        settings.extend_from_slice(more);
        for (name, value) in settings {
            command.arg("-c").arg(format!("{name}={value}"));
        }
        let second = output.try_clone().map_err(RestoreError::file("open", &log))?;
        // Its own process group: what interrupts walguard on the terminal does not interrupt the server.
        command.stdin(Stdio::null()).stdout(output).stderr(second).process_group(0);
        let child = command.spawn().map_err(RestoreError::file("run", &program))?;
        let role = role.to_owned();
        Ok(Self { child, data_dir: data_dir.to_owned(), log, log_from, socket_dir, port, role })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// An error that tells the last lines of the log.
    pub(super) fn failure(&self, problem: impl Into<String>) -> RestoreError {
        RestoreError::server(problem.into(), &self.log_tail(), &self.log)
    }

    fn log_tail(&self) -> String {
        let read = || {
            let mut file = File::open(&self.log)?;
            let end = file.metadata()?.len();
            file.seek(SeekFrom::Start(self.log_from.max(end.saturating_sub(LOG_TAIL_BYTES))))?;
            let mut bytes = Vec::new();
            file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(String::from_utf8_lossy(&bytes).into_owned())
        };
        let text = read().unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines.get(lines.len().saturating_sub(LOG_TAIL_LINES)..).unwrap_or_default().join("\n")
    }

    /// Fails if the server has ended.
    pub(super) fn check_alive(&mut self) -> Result<(), RestoreError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(self.failure(format!("the restored server ended by itself ({status})"))),
            Err(error) => Err(self.failure(format!("the restored server cannot be watched: {error}"))),
        }
    }

    /// A connection over the socket; `None` as long as the server takes none.
    pub(super) async fn connect(&self) -> Option<Client> {
        for database in ["postgres", "template1"] {
            let mut config = tokio_postgres::Config::new();
            config.host_path(&self.socket_dir).port(self.port).user(&self.role).dbname(database);
            config.application_name("walguard restore").connect_timeout(Duration::from_secs(5));
            match config.connect(NoTls).await {
                Ok((client, connection)) => {
                    tokio::spawn(connection); // ends with the client, or when the server goes
                    return Some(client);
                }
                Err(error) => tracing::debug!("the restored server does not answer yet: {error}"),
            }
        }
        None
    }

    /// Asks the server how far it is.
    pub(super) async fn replay(client: &Client) -> Result<Replay, tokio_postgres::Error> {
        let sql = "SELECT r, CASE WHEN r THEN pg_get_wal_replay_pause_state() = 'paused' ELSE false END, \
                   pg_last_wal_replay_lsn()::text, pg_last_xact_replay_timestamp() FROM pg_is_in_recovery() r";
        let row = client.query_one(sql, &[]).await?;
        Ok(Replay {
            in_recovery: row.try_get(0)?,
            paused: row.try_get(1)?,
            lsn: row.try_get::<_, Option<String>>(2)?.and_then(|text| text.parse().ok()),
            time: row.try_get::<_, Option<jiff::Timestamp>>(3)?.map(PgTime::from),
        })
    }

    /// Relations that replay has locked exclusively (Postgres: `StandbyAcquireAccessExclusiveLock`); 0 if it does not answer.
    pub(super) async fn locked(&self) -> u64 {
        let sql = "SELECT count(DISTINCT (database, relation)) FROM pg_locks \
                   WHERE locktype = 'relation' AND mode = 'AccessExclusiveLock' AND granted \
                   AND pid = (SELECT pid FROM pg_stat_activity WHERE backend_type = 'startup')";
        let Some(client) = self.connect().await else { return 0 };
        let count = client.query_one(sql, &[]).await.and_then(|row| row.try_get::<_, i64>(0));
        count.ok().and_then(|count| u64::try_from(count).ok()).unwrap_or_default()
    }

    /// Makes the server a primary on a new timeline, as `pg_ctl promote` does (`do_promote` in `bin/pg_ctl/pg_ctl.c`).
    pub(super) fn promote(&self) -> Result<(), RestoreError> {
        let signal = self.data_dir.join("promote");
        fs::write(&signal, "").map_err(RestoreError::file("write", signal))?;
        self.signal(Signal::USR1);
        Ok(())
    }

    /// Has the server read its settings again.
    pub(super) fn reload(&self) {
        self.signal(Signal::HUP);
    }

    /// True if the server syncs what it writes; `None` if it cannot be asked now. A new session is asked, because it has what
    /// the server has read last.
    pub(super) async fn syncs(&self) -> Option<bool> {
        let client = self.connect().await?;
        let value: String = client.query_one("SHOW fsync", &[]).await.ok()?.try_get(0).ok()?;
        Some(value == "on")
    }

    /// True if the process that replays WAL waits for more of it, again and again.
    pub(super) async fn lacks_wal(client: &Client) -> bool {
        let sql = "SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'startup'";
        let waits = client.query_opt(sql, &[]).await.ok().flatten();
        let event = waits.and_then(|row| row.try_get::<_, Option<String>>(0).ok().flatten());
        event.is_some_and(|event| event == "RecoveryRetrieveRetryInterval")
    }

    /// Stops the server: sessions are ended, and all is written. Waits until it is gone.
    pub(super) async fn stop(&mut self) -> Result<ExitStatus, RestoreError> {
        self.signal(Signal::INT);
        let begin = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Ok(status),
                Ok(None) if begin.elapsed() < STOP_DEADLINE => tokio::time::sleep(POLL_INTERVAL).await,
                Ok(None) => return Err(self.failure("the restored server does not stop")),
                Err(error) => return Err(self.failure(format!("the restored server cannot be watched: {error}"))),
            }
        }
    }

    fn signal(&self, signal: Signal) {
        // Not reaped yet, so the id is still its own; if it has ended, whoever waits for it will see that.
        let _ = kill_process(Pid::from_child(&self.child), signal);
    }
}

/// The socket's directory: the one asked for, the data directory, or a private one.
fn socket_dir(data_dir: &Path, listen: &Listen) -> Result<PathBuf, RestoreError> {
    let bytes = |path: &Path| path.as_os_str().len();
    match &listen.socket_dir {
        Some(dir) if bytes(dir) > SOCKET_DIR_BYTES_MAX => Err(RestoreError::Directory {
            path: dir.clone(),
            problem: format!("is too long for a socket's directory: at most {SOCKET_DIR_BYTES_MAX} bytes"),
            hint: "choose a shorter one with --socket-dir".to_owned(),
        }),
        Some(dir) if !dir.is_dir() => Err(RestoreError::Directory {
            path: dir.clone(),
            problem: "is no directory".to_owned(),
            hint: "make it first, or choose another with --socket-dir".to_owned(),
        }),
        Some(dir) => Ok(dir.clone()),
        None if bytes(data_dir) <= SOCKET_DIR_BYTES_MAX => Ok(data_dir.to_owned()),
        None => {
            let dir = std::env::temp_dir().join(format!("walguard-{:08x}", fastrand::u32(..)));
            fs::DirBuilder::new().mode(0o700).create(&dir).map_err(RestoreError::file("make", &dir))?;
            Ok(dir)
        }
    }
}
