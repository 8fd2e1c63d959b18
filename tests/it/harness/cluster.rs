//! Private PostgreSQL clusters.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};
use walguard::pg::Lsn;

use super::port::take_port;
use super::{Scratch, Watchdog, command, finish, give_away, shared_dir, wait_for};

/// How long a server may take to start or stop on a busy machine.
const SERVER_DEADLINE: Duration = Duration::from_secs(60);

/// Majors that are installed, with the directories of their programs.
fn installed() -> &'static BTreeMap<u32, PathBuf> {
    static INSTALLED: OnceLock<BTreeMap<u32, PathBuf>> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres-home");
        let output = finish(Command::new(script)).expect(0).stdout();
        let parse = |line: &str| {
            let (major, dir) = line.split_once(' ')?;
            Some((major.parse().ok()?, dir.into()))
        };
        let installed: BTreeMap<_, _> = output.lines().filter_map(parse).collect();
        assert!(!installed.is_empty(), "no PostgreSQL found; run scripts/install-postgres");
        installed
    })
}

/// The directory of a `pg_dump` that reads every major.
pub(crate) fn client_dir() -> &'static Path {
    static CLIENT: OnceLock<PathBuf> = OnceLock::new();
    CLIENT.get_or_init(|| {
        let output =
            finish(Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/postgres-home"))).expect(0).stdout();
        let found = output.lines().find_map(|line| line.strip_prefix("client "));
        found.expect("no pg_dump of the newest version; run scripts/install-postgres").into()
    })
}

/// The majors that are installed, oldest first.
pub(crate) fn majors() -> Vec<u32> {
    installed().keys().copied().collect()
}

/// How a server is stopped, as `pg_ctl stop --mode` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopMode {
    /// When all sessions have ended, and walsenders have sent everything.
    Smart,
    /// Sessions are ended; walsenders send everything, the shutdown checkpoint included.
    Fast,
    /// Without a checkpoint: the next start recovers.
    Immediate,
}

/// What a cluster is to be like.
#[derive(Clone, Debug)]
pub(crate) struct ClusterBuilder {
    major: u32,
    wal_segsize_mib: u32,
    checksums: bool,
    conf: String,
    hba: String,
}

impl ClusterBuilder {
    /// The major version; by default 15, which comes with all client programs.
    pub(crate) fn major(mut self, major: u32) -> Self {
        self.major = major;
        self
    }

    /// Size of a WAL segment; by default 16 MiB.
    pub(crate) fn wal_segsize_mib(mut self, mib: u32) -> Self {
        self.wal_segsize_mib = mib;
        self
    }

    /// Page checksums; by default on.
    pub(crate) fn checksums(mut self, on: bool) -> Self {
        self.checksums = on;
        self
    }

    /// A setting in `postgresql.conf`.
    pub(crate) fn conf(mut self, name: &str, value: &str) -> Self {
        self.conf += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        self
    }

    /// A line in `pg_hba.conf`, before those that trust every local connection.
    pub(crate) fn hba(mut self, line: &str) -> Self {
        self.hba += &format!("{line}\n");
        self
    }

    /// Makes the data directory, without starting a server.
    pub(crate) fn create(self) -> Cluster {
        let bin = installed()
            .get(&self.major)
            .unwrap_or_else(|| panic!("PostgreSQL {} is not installed; run scripts/install-postgres", self.major));
        let scratch = Scratch::new();
        let template = template(bin, &self);
        let data = scratch.join("data");
        copy_tree(&template, &data);
        let (port, port_lock) = take_port();
        let conf = data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).unwrap();
        text += &format!(
            "listen_addresses = '127.0.0.1'\nport = {port}\nunix_socket_directories = '{}'\n\
             fsync = off\nshared_buffers = 16MB\nmax_connections = 30\nmax_wal_senders = 10\nmax_replication_slots = 10\n\
             wal_level = replica\ntrack_commit_timestamp = on\ntimezone = 'UTC'\nlog_timezone = 'UTC'\n\
             log_line_prefix = '%m [%p] %q%a '\n{}",
            scratch.path().display(),
            self.conf
        );
        fs::write(&conf, text).unwrap();
        let hba = data.join("pg_hba.conf");
        let rest = fs::read_to_string(&hba).unwrap();
        fs::write(&hba, self.hba + &rest).unwrap();
        give_away(&conf);
        give_away(&hba);
        Cluster {
            major: self.major,
            bin: bin.clone(),
            scratch,
            data,
            port,
            _port_lock: port_lock,
            server: None,
            watchdog: None,
        }
    }

    /// Makes the cluster, starts its server, and creates the role `walguard` with what the README asks for.
    pub(crate) async fn start(self) -> Cluster {
        let mut cluster = self.create();
        cluster.start().await;
        cluster.sql("CREATE ROLE walguard LOGIN REPLICATION; GRANT pg_monitor TO walguard").await;
        cluster
    }
}

/// A private cluster. Its server is killed and its directory removed with this value; if the test fails, its log is shown
/// and the directory kept.
#[derive(Debug)]
pub(crate) struct Cluster {
    major: u32,
    bin: PathBuf,
    scratch: Scratch,
    data: PathBuf,
    port: u16,
    /// Locked as long as the number is ours.
    _port_lock: File,
    server: Option<Child>,
    watchdog: Option<Watchdog>,
}

impl Cluster {
    pub(crate) fn builder() -> ClusterBuilder {
        ClusterBuilder { major: 15, wal_segsize_mib: 16, checksums: true, conf: String::new(), hba: String::new() }
    }

    /// Takes over a data directory that a restore made, with its own port and socket directory, and starts its server.
    pub(crate) async fn adopt(major: u32, data: &Path) -> Self {
        let mut cluster = Self::around(major, data);
        cluster.start().await;
        cluster
    }

    /// As [`Cluster::adopt`], without starting the server.
    pub(crate) fn around(major: u32, data: &Path) -> Self {
        let bin = installed().get(&major).unwrap_or_else(|| panic!("PostgreSQL {major} is not installed")).clone();
        let scratch = Scratch::new();
        let (port, port_lock) = take_port();
        let conf = data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).unwrap();
        text += &format!("port = {port}\nunix_socket_directories = '{}'\n", scratch.path().display());
        fs::write(&conf, text).unwrap();
        Self { major, bin, scratch, data: data.to_owned(), port, _port_lock: port_lock, server: None, watchdog: None }
    }

    pub(crate) fn major(&self) -> u32 {
        self.major
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn data_dir(&self) -> &Path {
        &self.data
    }

    pub(crate) fn socket_dir(&self) -> &Path {
        self.scratch.path()
    }

    /// Connection string of the role `walguard` over TCP.
    pub(crate) fn conninfo(&self) -> String {
        self.conninfo_of("walguard")
    }

    /// Connection string of another role over TCP.
    pub(crate) fn conninfo_of(&self, user: &str) -> String {
        format!("host=127.0.0.1 port={} user={user} dbname=postgres", self.port)
    }

    /// Connection string of the role `walguard` over the Unix socket.
    pub(crate) fn conninfo_socket(&self) -> String {
        format!("host={} port={} user=walguard dbname=postgres", self.scratch.path().display(), self.port)
    }

    /// One of PostgreSQL's programs, of this major if it is there and of any other if not: npm's packages have servers
    /// only.
    pub(crate) fn bin(&self, program: &str) -> PathBuf {
        let own = self.bin.join(program);
        if own.exists() {
            return own;
        }
        let other = installed().values().map(|dir| dir.join(program)).find(|path| path.exists());
        other.unwrap_or_else(|| panic!("no PostgreSQL here has {program}"))
    }

    /// Directory of this major's programs.
    pub(crate) fn bin_dir(&self) -> &Path {
        &self.bin
    }

    /// Adds a line to `postgresql.conf`; for the next start or reload.
    pub(crate) fn set_conf(&self, name: &str, value: &str) {
        let conf = self.data.join("postgresql.conf");
        let mut text = fs::read_to_string(&conf).unwrap();
        text += &format!("{name} = '{}'\n", value.replace('\'', "''"));
        fs::write(&conf, text).unwrap();
        give_away(&conf);
    }

    /// Starts the server and waits until it answers.
    pub(crate) async fn start(&mut self) {
        self.launch();
        let begin = Instant::now();
        while let Err(error) = self.try_client("postgres").await {
            if let Some(status) = self.server.as_mut().and_then(|server| server.try_wait().unwrap()) {
                panic!("the server ended with {status}:\n{}", self.log());
            }
            assert!(begin.elapsed() < SERVER_DEADLINE, "the server does not answer: {error}\n{}", self.log());
            tokio::time::sleep(super::POLL_INTERVAL).await;
        }
    }

    /// Starts the server and does not wait.
    pub(crate) fn launch(&mut self) {
        assert!(self.server.is_none(), "the server runs already");
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        let mut server = command(self.bin.join("postgres"));
        server.arg("-D").arg(&self.data).stdin(std::process::Stdio::null());
        server.stdout(log.try_clone().unwrap()).stderr(log);
        let server = server.spawn().unwrap();
        self.watchdog = Some(Watchdog::over(server.id()));
        self.server = Some(server);
    }

    /// True as long as the server's process lives.
    pub(crate) fn is_running(&mut self) -> bool {
        self.server.as_mut().is_some_and(|server| server.try_wait().unwrap().is_none())
    }

    /// Stops the server and waits until it is gone.
    pub(crate) async fn stop(&mut self, mode: StopMode) {
        self.end(match mode {
            StopMode::Smart => Signal::TERM,
            StopMode::Fast => Signal::INT,
            StopMode::Immediate => Signal::QUIT,
        })
        .await;
    }

    /// Stops the server with a checkpoint and starts it again.
    pub(crate) async fn restart(&mut self) {
        self.stop(StopMode::Fast).await;
        self.start().await;
    }

    /// Kills the server as a machine that loses power does, its children included.
    pub(crate) async fn kill9(&mut self) {
        let Some(server) = &self.server else { return };
        let children = children_of(server.id());
        self.end(Signal::KILL).await;
        for pid in children {
            let _ = kill_process(pid, Signal::KILL); // gone already: they notice that the postmaster is
        }
        // Whoever comes next must not find the old server's children in shared memory or on the port.
        wait_for("the killed server's port", SERVER_DEADLINE, || async {
            TcpListener::bind(("127.0.0.1", self.port)).is_ok()
        })
        .await;
    }

    /// Kills the server and destroys its data directory, as a machine that burns down does.
    pub(crate) async fn destroy(&mut self) {
        self.kill9().await;
        fs::remove_dir_all(&self.data).unwrap();
    }

    async fn end(&mut self, signal: Signal) {
        let Some(mut server) = self.server.take() else { return };
        self.watchdog = None; // its number will soon be somebody else's
        kill_process(Pid::from_child(&server), signal).unwrap();
        let begin = Instant::now();
        while server.try_wait().unwrap().is_none() {
            if begin.elapsed() > SERVER_DEADLINE {
                self.server = Some(server);
                panic!("the server does not stop:\n{}", self.log());
            }
            tokio::time::sleep(super::POLL_INTERVAL).await;
        }
    }

    /// A connection of a role, over TCP.
    pub(crate) async fn try_client(&self, user: &str) -> Result<Client, tokio_postgres::Error> {
        let (client, connection) = tokio_postgres::connect(&self.conninfo_of(user), NoTls).await?;
        tokio::spawn(connection); // ends with the client, or when the server goes
        Ok(client)
    }

    /// A connection of the superuser.
    pub(crate) async fn client(&self) -> Client {
        self.try_client("postgres").await.unwrap_or_else(|error| panic!("connect: {error:?}\n{}", self.log()))
    }

    /// Runs statements as the superuser, as one transaction if there are several.
    pub(crate) async fn sql(&self, statements: &str) {
        let result = self.client().await.batch_execute(statements).await;
        result.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
    }

    /// Runs a query as the superuser and gives the first column of its first row as text; NULL and no row are empty.
    pub(crate) async fn text(&self, query: &str) -> String {
        let messages = self.client().await.simple_query(query).await;
        let messages = messages.unwrap_or_else(|error| panic!("{query}: {error:?}"));
        let first = messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        first.unwrap_or_default()
    }

    /// As [`Cluster::text`], for a number.
    pub(crate) async fn number(&self, query: &str) -> i64 {
        let text = self.text(query).await;
        text.parse().unwrap_or_else(|_| panic!("{query}: {text:?} is no number"))
    }

    /// The position up to which WAL was written by committed and other work.
    pub(crate) async fn lsn(&self) -> Lsn {
        self.text("SELECT pg_current_wal_insert_lsn()").await.parse().unwrap()
    }

    /// Makes WAL of some size, at least `mib` MiB of it.
    pub(crate) async fn fill(&self, mib: u32) {
        // Not compressible by TOAST, so that it is written as it is: a message of 1 MiB at a time.
        let sql = format!(
            "SELECT pg_logical_emit_message(false, 'fill', \
             (SELECT string_agg(md5(random()::text || i), '') FROM generate_series(1, 32768) i)) \
             FROM generate_series(1, {mib})"
        );
        self.client().await.simple_query(&sql).await.unwrap();
    }

    /// Runs `psql` as the superuser and gives its unaligned, headerless output.
    pub(crate) fn psql(&self, sql: &str) -> String {
        let mut psql = command(self.bin("psql"));
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &self.conninfo_of("postgres"), "-c", sql]);
        finish(psql).expect(0).stdout().trim_end().to_owned()
    }

    /// A streaming standby of this cluster, caught up with it. It has its own copy of the data, and needs no slot.
    pub(crate) async fn standby(&self) -> Self {
        let client = self.client().await;
        let (start, stop) = if self.major >= 15 {
            ("SELECT pg_backup_start('standby', true)", "SELECT labelfile FROM pg_backup_stop(false)")
        } else {
            ("SELECT pg_start_backup('standby', true, false)", "SELECT labelfile FROM pg_stop_backup(false, false)")
        };
        client.simple_query("ALTER SYSTEM SET wal_keep_size = '1GB'").await.unwrap();
        client.simple_query("SELECT pg_reload_conf()").await.unwrap();
        client.simple_query(start).await.unwrap();
        let scratch = Scratch::new();
        let data = scratch.join("data");
        copy_tree(&self.data, &data);
        let label: String = client.query_one(stop, &[]).await.unwrap().get(0);
        let _ = fs::remove_file(data.join("postmaster.pid"));
        let _ = fs::remove_file(data.join("postmaster.opts"));
        for folder in ["pg_wal", "pg_replslot"] {
            for entry in fs::read_dir(data.join(folder)).unwrap().flatten() {
                let _ = fs::remove_file(entry.path()).or_else(|_| fs::remove_dir_all(entry.path()));
            }
        }
        let status = data.join("pg_wal/archive_status");
        fs::create_dir(&status).unwrap();
        fs::write(data.join("backup_label"), label).unwrap();
        fs::write(data.join("standby.signal"), "").unwrap();
        let (port, port_lock) = take_port();
        let mut text = fs::read_to_string(data.join("postgresql.conf")).unwrap();
        text += &format!(
            "port = {port}\nunix_socket_directories = '{}'\nprimary_conninfo = '{} application_name=standby'\n",
            scratch.path().display(),
            self.conninfo_of("postgres")
        );
        fs::write(data.join("postgresql.conf"), text).unwrap();
        give_away(&data);
        let bin = self.bin.clone();
        let mut standby =
            Self { major: self.major, bin, scratch, data, port, _port_lock: port_lock, server: None, watchdog: None };
        standby.start().await;
        // After a segment switch the insert position lies past a page header that is only written with the next record:
        // an idle server writes one every 15 s. A commit writes one now.
        self.sql("SELECT pg_logical_emit_message(true, 'standby', '')").await;
        let flushed = self.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        standby.wait_replayed(flushed).await;
        standby
    }

    /// Waits until a standby has replayed up to a position.
    pub(crate) async fn wait_replayed(&self, lsn: Lsn) {
        let query = format!("SELECT pg_last_wal_replay_lsn() >= '{lsn}'");
        wait_for(&format!("replay up to {lsn}"), SERVER_DEADLINE, || async { self.text(&query).await == "t" }).await;
    }

    /// Promotes a standby and waits until it takes writes.
    pub(crate) async fn promote(&self) {
        assert_eq!(self.text("SELECT pg_promote(true, 60)").await, "t", "promotion:\n{}", self.log());
        wait_for("writes after the promotion", SERVER_DEADLINE, || async {
            self.text("SELECT pg_is_in_recovery()").await == "f"
        })
        .await;
    }

    fn log_path(&self) -> PathBuf {
        self.scratch.join("server.log")
    }

    /// The server's log.
    pub(crate) fn log(&self) -> String {
        fs::read(self.log_path()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.watchdog = None;
        if let Some(mut server) = self.server.take() {
            let children = children_of(server.id());
            let _ = server.kill();
            let _ = server.wait();
            for pid in children {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<_> = log.lines().collect();
            let tail = lines.get(lines.len().saturating_sub(60)..).unwrap_or_default().join("\n");
            eprintln!("-- end of the server's log on port {}\n{tail}\n--", self.port);
        }
    }
}

/// Processes whose parent is `pid`.
fn children_of(pid: u32) -> Vec<Pid> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        // The parent's number is the second field after the parenthesis that ends the command's name (`man 5 proc`).
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        let own = stat.split(' ').next().and_then(|own| own.parse().ok()).and_then(Pid::from_raw);
        if parent == Some(pid) {
            children.extend(own);
        }
    }
    children
}

/// A data directory as `initdb` makes it. Made once for each kind and kept for later runs.
fn template(bin: &Path, kind: &ClusterBuilder) -> PathBuf {
    let postgres = bin.join("postgres");
    let built = fs::metadata(&postgres).unwrap().modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    let checksums = if kind.checksums { "checksums" } else { "plain" };
    let name = format!("{}-{}-{}MiB-{checksums}", kind.major, built.as_secs(), kind.wal_segsize_mib);
    let dir = shared_dir().join("templates");
    fs::create_dir_all(&dir).unwrap();
    let template = dir.join(name);
    if template.exists() {
        return template;
    }
    let workshop = tempfile::tempdir_in(&dir).unwrap();
    fs::set_permissions(&workshop, fs::Permissions::from_mode(0o755)).unwrap();
    give_away(workshop.path());
    let draft = workshop.path().join("data");
    let mut initdb = command(bin.join("initdb"));
    initdb.args(["--no-sync", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C"]);
    initdb.arg(format!("--wal-segsize={}", kind.wal_segsize_mib)).arg("-D").arg(&draft);
    if kind.checksums {
        initdb.arg("--data-checksums");
    } else if kind.major >= 18 {
        initdb.arg("--no-data-checksums"); // 18 has them on by default
    }
    finish(initdb).expect(0);
    // Two tests may make it at once: the first one to rename wins, and they are alike.
    if let Err(error) = fs::rename(&draft, &template) {
        assert!(template.exists(), "{}: {error}", template.display());
    }
    template
}

/// Copies a directory with owners and modes. Files that vanish meanwhile (a running server's) do not matter.
fn copy_tree(from: &Path, to: &Path) {
    let mut cp = Command::new("cp");
    cp.args(["-a", "--reflink=auto"]).arg(from).arg(to);
    let done = finish(cp);
    let vanished = |line: &str| line.contains("No such file or directory");
    assert!(done.code() == 0 || done.stderr().lines().all(vanished), "{done}");
    fs::set_permissions(to, fs::Permissions::from_mode(0o700)).unwrap();
}
