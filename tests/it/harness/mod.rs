//! The world that the tests run in: private PostgreSQL clusters, the program, a proxy that breaks connections, and a
//! workload that knows what the database must contain.
//!
//! PostgreSQL refuses to run as root. Where the tests run as root, it and the program run as another user, so whatever
//! they read or write lies in a [`Scratch`].
#![allow(dead_code, unused_imports, reason = "a world offers more than any one of its inhabitants needs")]

mod agent;
mod cluster;
mod disk;
mod ledger;
mod port;
mod proxy;
mod receiver;
mod restored;
mod s3;
pub(crate) mod webhook;

use std::fs;
use std::future::Future;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

pub(crate) use agent::{Agent, AgentBuilder};
pub(crate) use cluster::{Cluster, ClusterBuilder, StopMode, client_dir, majors};
pub(crate) use disk::SmallDisk;
pub(crate) use ledger::{Commit, Ledger, read_number};
pub(crate) use proxy::Proxy;
pub(crate) use receiver::{Answer, Received, Receiver};
pub(crate) use restored::{Restored, restore, restore_command};
pub(crate) use s3::{Fault, S3};

/// How often a condition is looked at that a test waits for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until `condition` holds.
///
/// # Panics
/// If it does not within `deadline`; the message says what was waited for.
pub(crate) async fn wait_for<F, Fut>(what: &str, deadline: Duration, mut condition: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let begin = Instant::now();
    while !condition().await {
        assert!(begin.elapsed() < deadline, "waited {deadline:?} in vain for {what}");
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The user that PostgreSQL and the program run as.
#[derive(Clone, Copy, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

/// Another user if we are root, `None` if we can stay who we are.
fn unprivileged_user() -> Option<User> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let passwd = fs::read_to_string("/etc/passwd").expect("/etc/passwd is readable");
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        Some(User { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? })
    };
    Some(find("postgres").or_else(|| find("nobody")).expect("there is a user that is not root"))
}

/// A command that runs as the unprivileged user, in a directory that it can enter.
pub(crate) fn command(program: impl AsRef<Path>) -> Command {
    let mut command = Command::new(program.as_ref());
    command.current_dir("/");
    if let Some(user) = unprivileged_user() {
        command.uid(user.uid).gid(user.gid).env("HOME", "/nonexistent");
    }
    command
}

/// Makes a file or directory the unprivileged user's own, with all that is in it. An agent may be at work there: what
/// goes while we look is nobody's any more (a draft that was just renamed, a tail that its object replaced).
pub(crate) fn give_away(path: &Path) {
    let Some(user) = unprivileged_user() else { return };
    give_to(user, path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn give_to(user: User, path: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_symlink() {
        return Ok(());
    }
    chown(path, Some(user.uid), Some(user.gid))?;
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            match give_to(user, &entry?.path()) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                other => other?,
            }
        }
    }
    Ok(())
}

/// A directory of the unprivileged user, with a name short enough for a Unix socket in it. It goes when this value does,
/// unless the test fails: then its path is printed.
#[derive(Debug)]
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        let temp = std::env::temp_dir();
        // The path of a Unix socket has at most 107 bytes (`sun_path`).
        let parent = if temp.as_os_str().len() > 50 { Path::new("/tmp") } else { &temp };
        let dir = tempfile::Builder::new().prefix("wg-").tempdir_in(parent).expect("a temporary directory").keep();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        give_away(&dir);
        Self(dir)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A path in it.
    pub(crate) fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// Makes a directory in it.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let dir = self.0.join(name);
        fs::create_dir_all(&dir).unwrap();
        give_away(&dir);
        dir
    }

    /// Writes a file in it, which others may not read.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        give_away(&path);
        path
    }

    /// The URL of a repository in it.
    pub(crate) fn repo_url(&self) -> String {
        format!("file://{}", self.dir("repo").display())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("kept: {}", self.0.display());
        } else {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}

/// What tests of this user share between processes: templates, port numbers, the program.
fn shared_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let uid = rustix::process::geteuid().as_raw();
        let dir = std::env::temp_dir().join(format!("walguard-test-{uid}"));
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(fs::metadata(&dir).unwrap().uid(), uid, "{} belongs to somebody else", dir.display());
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        dir
    })
}

/// The program, where the unprivileged user can run it: the build directory may lie in a home that he cannot enter.
pub(crate) fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let built = Path::new(env!("CARGO_BIN_EXE_walguard"));
        if unprivileged_user().is_none() {
            return built.to_owned();
        }
        let meta = fs::metadata(built).unwrap();
        let dir = shared_dir().join("program");
        fs::create_dir_all(&dir).unwrap();
        let copy = dir.join(format!("walguard-{}-{}-{}", meta.ino(), meta.mtime(), meta.mtime_nsec()));
        if !copy.exists() {
            for old in fs::read_dir(&dir).unwrap().flatten() {
                let age = old.metadata().and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
                if age.is_some_and(|age| age > Duration::from_secs(3_600)) {
                    let _ = fs::remove_file(old.path()); // of an earlier build; whoever still runs it keeps it open
                }
            }
            let draft = dir.join(format!("draft-{}", std::process::id()));
            fs::copy(built, &draft).unwrap();
            fs::set_permissions(&draft, fs::Permissions::from_mode(0o755)).unwrap();
            fs::rename(&draft, &copy).unwrap();
        }
        copy
    })
}

/// The program with these arguments, as the unprivileged user and without the `WALGUARD_*` and `PG*` variables of
/// whoever runs the tests.
pub(crate) fn walguard_command(args: &[&str]) -> Command {
    let mut command = command(program());
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("WALGUARD_") || name.starts_with("PG") || name.starts_with("AWS_") {
            command.env_remove(name);
        }
    }
    command.args(args);
    command
}

/// Kills a process when this process is gone, however it ends: a test that is killed runs no destructors.
#[derive(Debug)]
struct Watchdog(Child);

impl Watchdog {
    fn over(pid: u32) -> Self {
        // The shell reads from a pipe whose other end is ours alone, so its end is ours.
        let mut shell = command("/bin/sh");
        shell.args(["-c", "read -r _; kill -KILL \"$0\"", &pid.to_string()]);
        shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        Self(shell.spawn().expect("there is a shell"))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the program to its end. Blocks the calling thread: servers of the test must run on others
/// (`#[tokio::test(flavor = "multi_thread")]`).
pub(crate) fn walguard(args: &[&str]) -> Finished {
    finish(walguard_command(args))
}

/// Runs a command to its end.
pub(crate) fn finish(mut command: Command) -> Finished {
    let output = command.output().unwrap_or_else(|error| panic!("run {command:?}: {error}"));
    Finished { command: format!("{command:?}"), output }
}

/// A program that has ended.
#[derive(Debug)]
pub(crate) struct Finished {
    command: String,
    output: Output,
}

impl Finished {
    /// Its exit code; a program that died of a signal has none and fails the test.
    pub(crate) fn code(&self) -> i32 {
        self.output.status.code().unwrap_or_else(|| panic!("died: {self}"))
    }

    pub(crate) fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.output.stdout).into_owned()
    }

    pub(crate) fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.output.stderr).into_owned()
    }

    /// Its standard output as JSON.
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.output.stdout).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// The same, if it ended with this code.
    pub(crate) fn expect(self, code: i32) -> Self {
        assert!(self.output.status.code() == Some(code), "exit code {code} expected: {self}");
        self
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { command, output } = self;
        write!(f, "{command}\n{}\n-- stdout\n{}-- stderr\n{}", output.status, self.stdout(), self.stderr())
    }
}
