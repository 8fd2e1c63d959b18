//! A restored directory -> a cluster of its own, and that in the place of the original.
//!
//! What a restore leaves behind must neither archive nor connect anywhere ([`super::recovery`]). Handing it over
//! ends that: the server leaves recovery and is stopped, and what walguard wrote into its settings is taken out.
//!
//! # What a crash leaves behind
//!
//! | interrupted | left behind | what to do |
//! |---|---|---|
//! | before the directories are exchanged | the original in its place, the restored one beside it | the same command again |
//! | between the exchange and the rename of the original | the restored cluster in place, the original whole under the restored one's name | nothing has to be done; rename the original by hand |
//! | where the file system cannot exchange two directories: between the two renames | the original under its dated name, nothing in its place | the same two renames by hand; nothing starts before |

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::fs::{Access, CWD, RenameFlags};
use rustix::process::{Pid, Signal, kill_process};
use tokio_util::sync::CancellationToken;

use super::binaries;
use super::directory;
use super::error::RestoreError;
use super::instance::{Instance, POLL_INTERVAL};
use super::recovery;
use super::run::{self, Start};
use super::standby;
use super::state;
use crate::atomic_file;
use crate::pg::{Lsn, SystemId, TimelineId};
use crate::progress::Progress;

/// In a restored directory: the restore came to its planned end, and that was proved.
pub const MARK: &str = "walguard-restored.json";

/// A server may take so long to leave recovery, or to stop: both write all that is in memory.
const SERVER_DEADLINE: Duration = Duration::from_secs(600);

/// A server that was started again may take so long to be at the target again.
const TARGET_DEADLINE: Duration = Duration::from_secs(60);

/// What a finished restore says of itself, in its directory.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Mark {
    /// Where it stands.
    pub reached: Lsn,
    /// A role that can log in.
    pub role: String,
    /// The original archives with `archive_command` or a library.
    #[serde(default)]
    pub archives: bool,
    /// The original's data directory.
    #[serde(default)]
    pub original: Option<PathBuf>,
}

/// What was handed over.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct HandedOver {
    /// The data directory, where it is now.
    pub data_dir: PathBuf,
    /// Where the original was before it was replaced, is now; `None` without a swap.
    pub kept: Option<PathBuf>,
    /// The timeline that it writes.
    pub timeline: Option<TimelineId>,
    /// Things to know, a sentence each.
    pub notes: Vec<String>,
}

impl Mark {
    /// Writes it: the restore is whole.
    ///
    /// # Errors
    /// Of the file system.
    pub(super) fn write(&self, data_dir: &Path) -> Result<(), RestoreError> {
        let path = data_dir.join(MARK);
        let json = serde_json::to_vec_pretty(self).expect("a mark becomes JSON");
        atomic_file::write(&path, &json).map_err(RestoreError::file("write", path))
    }

    /// Reads that of a directory.
    ///
    /// # Errors
    /// If there is none: the directory is no restore of ours, or an unfinished one.
    pub fn read(data_dir: &Path) -> Result<Self, RestoreError> {
        let path = data_dir.join(MARK);
        if data_dir.join(state::FILE).exists() {
            let hint = "run the same `walguard restore` again: it goes on";
            return Err(refused(data_dir, "holds a restore that was not finished", hint));
        }
        let refuse = |problem: &str, hint: &str| RestoreError::Directory {
            path: data_dir.to_owned(),
            problem: problem.to_owned(),
            hint: hint.to_owned(),
        };
        match fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map_err(|error| {
                refuse(&format!("{MARK} in it cannot be read: {error}"), "restore again, into another directory")
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(refuse(
                "holds no finished restore",
                "name a directory in which `walguard restore` came to its end; one that was handed over is none any more",
            )),
            Err(error) => Err(RestoreError::file("read", path)(error)),
        }
    }
}

/// Makes a restored directory a cluster of its own: what waits in recovery becomes a primary, the server is stopped, and
/// the settings of the restore are taken out. With `in_place_of` it then takes the place of that stopped cluster, which is
/// kept beside it under a dated name. Everything that can stand in the way is looked for before anything is changed.
///
/// # Errors
/// What stands in the way, of either directory; of the server; of the file system. Nothing is in another place then.
pub async fn hand_over(
    restored: &Path,
    in_place_of: Option<&Path>,
    start: &Start,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<HandedOver, RestoreError> {
    run::refuse_root()?;
    let restored = real(restored)?;
    let mark = Mark::read(&restored)?;
    let swap = in_place_of.map(|old| Swap::check(&restored, old)).transpose()?;
    let place = swap.as_ref().map_or(&restored, |swap| &swap.old);
    check_own_directory(&restored, place)?;
    let mut notes = Vec::new();
    make_primary(&restored, &mark, start, progress, cancel).await?;
    let control = Control::read(&restored)?;
    if control.state != Control::SHUT_DOWN {
        return Err(refused(&restored, "was not shut down as a primary", "start it, promote it, and stop it"));
    }
    standby::end(&restored, false)?;
    recovery::settle(&restored)?;
    if mark.archives {
        // While archiving was off nobody took note of the history, and nobody restores across it without it.
        mark_history(&restored, control.timeline)?;
    }
    let mut handed =
        HandedOver { data_dir: restored.clone(), kept: None, timeline: control.timeline, notes: Vec::new() };
    if let Some(swap) = &swap {
        // Looked at again: stopping a server takes a while.
        let swap = Swap::check(&restored, &swap.old)?;
        notes.extend(swap.notes.iter().cloned());
        handed.kept = Some(swap.exchange()?);
        handed.data_dir.clone_from(&swap.old);
    }
    recovery::forget(&handed.data_dir)?;
    handed.notes = notes;
    Ok(handed)
}

/// Looks before a restore into `target_dir` whether it could then take the place of `old`, as far as that can be known.
///
/// # Errors
/// What stands in the way.
pub fn check_before(target_dir: &Path, old: &Path) -> Result<(), RestoreError> {
    let old = check_original(old)?;
    let there = target_dir.ancestors().find(|path| path.is_dir()).unwrap_or(target_dir);
    if real(there)?.starts_with(&old) {
        return Err(refused(&old, "would hold the restored directory", "restore into a directory beside it"));
    }
    check_devices(there, &old)
}

/// The original: a cluster, and stopped.
fn check_original(old: &Path) -> Result<PathBuf, RestoreError> {
    let old = real(old)?;
    if !directory::is_cluster(&old) {
        return Err(refused(&old, "is no PostgreSQL cluster", "name the data directory of the original with --swap"));
    }
    if let Some(pid) = directory::running_server(&old)? {
        let hint = "stop its server first (`systemctl stop postgresql`, or `pg_ctl stop -D` it) and keep it stopped";
        return Err(refused(&old, &format!("belongs to a server that runs (process {pid})"), hint));
    }
    Ok(old)
}

/// Directories are renamed within a file system only.
fn check_devices(restored: &Path, old: &Path) -> Result<(), RestoreError> {
    if device(restored)? == device(old)? {
        return Ok(());
    }
    let hint =
        format!("restore into a directory on that one: --target-dir {}", parent(old)?.join("restored").display());
    Err(refused(old, &format!("lies on another file system than {}", restored.display()), &hint))
}

/// Two directories that can change places.
#[derive(Debug)]
struct Swap {
    restored: PathBuf,
    old: PathBuf,
    notes: Vec<String>,
}

impl Swap {
    fn check(restored: &Path, old: &Path) -> Result<Self, RestoreError> {
        let old = check_original(old)?;
        if old == restored {
            return Err(refused(&old, "is the restored directory itself", "leave --swap out"));
        }
        if old.starts_with(restored) || restored.starts_with(&old) {
            let hint = "restore into a directory beside it";
            return Err(refused(&old, &format!("and {} lie within each other", restored.display()), hint));
        }
        let [ours, theirs] = [restored, &old].map(Control::read);
        let (ours, theirs) = (ours?, theirs?);
        if ours.system_id != theirs.system_id {
            let (ours, theirs) = (ours.system_id, theirs.system_id);
            let problem = format!("is another cluster (system identifier {theirs}) than the restored one ({ours})");
            return Err(refused(&old, &problem, "name the data directory of the original with --swap"));
        }
        for dir in [restored, &old] {
            let (parent, hint) = (parent(dir)?, "move the directories by hand, or hand over without --swap");
            if device(dir)? != device(parent)? {
                return Err(refused(dir, "is the root of a file system, which cannot be renamed", hint));
            }
            if rustix::fs::access(parent, Access::WRITE_OK | Access::EXEC_OK).is_err() {
                let problem = format!("cannot be renamed, because {} is not ours to write in", parent.display());
                return Err(refused(dir, &problem, "run this as the owner of that directory, or move both by hand"));
            }
        }
        check_devices(restored, &old)?;
        let mut notes = Vec::new();
        check_tablespaces(restored, &old)?;
        if fs::symlink_metadata(old.join("pg_wal")).is_ok_and(|meta| meta.is_symlink()) {
            notes.push(format!(
                "the original kept its WAL elsewhere, by a link at {}; the restored cluster has it in the data directory",
                old.join("pg_wal").display()
            ));
        }
        Ok(Self { restored: restored.to_owned(), old, notes })
    }

    /// Puts the restored directory in the other's place. Gives where that is now.
    fn exchange(&self) -> Result<PathBuf, RestoreError> {
        let Self { restored, old, .. } = self;
        let kept = free_name(old)?;
        let fail = |path: &Path| RestoreError::file("rename", path.to_owned());
        match rustix::fs::renameat_with(CWD, restored, CWD, old, RenameFlags::EXCHANGE) {
            // At no moment is there nothing in the original's place, or half of something.
            Ok(()) => {
                sync_parents([restored, old])?;
                fs::rename(restored, &kept).map_err(fail(restored))?;
            }
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => {
                fs::rename(old, &kept).map_err(fail(old))?;
                sync_parents([&kept, &kept])?;
                if let Err(error) = fs::rename(restored, old) {
                    // As it was; if even that fails, both are there, and the error names the one that is not in its place.
                    fs::rename(&kept, old).map_err(fail(&kept))?;
                    return Err(fail(restored)(error));
                }
            }
            Err(error) => return Err(fail(old)(error.into())),
        }
        sync_parents([restored, &kept])?;
        Ok(kept)
    }
}

/// `main.before-20251217T081500Z`, or with a number behind it if that is taken.
fn free_name(old: &Path) -> Result<PathBuf, RestoreError> {
    let name = old.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let now = Timestamp::now().to_zoned(TimeZone::UTC).strftime("%Y%m%dT%H%M%SZ").to_string();
    let names = (1..100).map(|n| if n == 1 { String::new() } else { format!("-{n}") });
    let mut paths = names.map(|more| old.with_file_name(format!("{name}.before-{now}{more}")));
    let free = paths.find(|path| fs::symlink_metadata(path).is_err());
    free.ok_or_else(|| refused(old, "has no free name beside it", "remove directories that were kept by earlier swaps"))
}

/// A tablespace that both use would be another's the next day; one within a directory that is renamed would be lost.
fn check_tablespaces(restored: &Path, old: &Path) -> Result<(), RestoreError> {
    let (ours, theirs) = (tablespaces(restored), tablespaces(old));
    for (dir, places) in [(restored, &ours), (old, &theirs)] {
        if let Some(place) = places.iter().find(|place| place.starts_with(restored) || place.starts_with(old)) {
            let problem = format!("has a tablespace within a directory that is renamed: {}", place.display());
            return Err(refused(dir, &problem, "restore again with --tablespace OLD=NEW, to a place outside"));
        }
    }
    match ours.iter().find(|place| theirs.contains(place)) {
        Some(place) => {
            let problem = format!("shares the tablespace in {} with {}", place.display(), old.display());
            Err(refused(restored, &problem, "restore again with --tablespace OLD=NEW, to a place of its own"))
        }
        None => Ok(()),
    }
}

/// The real directories behind the links.
fn tablespaces(data_dir: &Path) -> Vec<PathBuf> {
    let links = fs::read_dir(data_dir.join("pg_tblspc")).into_iter().flatten().flatten();
    links.filter_map(|link| fs::canonicalize(link.path()).ok()).collect()
}

/// A configuration that names a data directory must name the one where it will lie, or another cluster would be started.
fn check_own_directory(restored: &Path, place: &Path) -> Result<(), RestoreError> {
    let conf = fs::read(restored.join("postgresql.conf")).unwrap_or_default();
    let text = recovery::without_block(&String::from_utf8_lossy(&conf));
    let Some(named) = recovery::value_of(&text, "data_directory") else { return Ok(()) };
    let is_it = fs::canonicalize(&named).is_ok_and(|named| named == place);
    if is_it {
        return Ok(());
    }
    let problem = format!("its postgresql.conf says that the data directory is {named}, and not {}", place.display());
    Err(refused(restored, &problem, "take `data_directory` out of that file, or name that directory with --swap"))
}

/// Ends recovery where it waits, and stops the server.
async fn make_primary(
    data_dir: &Path,
    mark: &Mark,
    start: &Start,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(), RestoreError> {
    if let Some(server) = server_of(data_dir)? {
        let pid = server.pid;
        if Control::read(data_dir)?.state == Control::IN_ARCHIVE_RECOVERY {
            progress.begin("promote the restored server", None);
            let begin = Instant::now();
            while !server.stands_at(mark).await {
                if cancel.is_cancelled() {
                    return Err(RestoreError::Cancelled);
                }
                if begin.elapsed() > TARGET_DEADLINE {
                    let problem = format!("belongs to a server that does not say that it stands at {}", mark.reached);
                    let hint =
                        "stop it (pg_ctl stop), and run this again: it is then started in a way that it can be asked";
                    return Err(refused(data_dir, &problem, hint));
                }
                tokio::time::sleep(POLL_INTERVAL).await;
            }
            let signal = data_dir.join("promote");
            fs::write(&signal, "").map_err(RestoreError::file("write", signal))?;
            let _ = kill_process(pid, Signal::USR1); // if it is gone, that shows below
            wait(data_dir, cancel, "leaves recovery", || {
                Ok(Control::read(data_dir)?.state == Control::IN_PRODUCTION || server_of(data_dir)?.is_none())
            })
            .await?;
            progress.end();
        }
        progress.begin("stop the restored server", None);
        let _ = kill_process(pid, Signal::INT);
        wait(data_dir, cancel, "stops", || Ok(server_of(data_dir)?.is_none())).await?;
        progress.end();
        return Ok(());
    }
    if Control::read(data_dir)?.state == Control::SHUT_DOWN {
        return Ok(());
    }
    // It was stopped in recovery, or died: it goes on to where it was, and from there.
    let version = fs::read_to_string(data_dir.join("PG_VERSION")).map_err(RestoreError::file("read", data_dir))?;
    let major = version.trim().parse().map_err(|_| refused(data_dir, "has no version", "restore again"))?;
    let binaries = binaries::find(major, start.binaries.as_deref(), start.path.as_deref())?;
    progress.begin("start the restored server and promote it", None);
    let mut instance = Instance::start(&binaries, data_dir, &start.listen, &mark.role, &[])?;
    let promoted = promote(&mut instance, cancel).await;
    let stopped = instance.stop().await;
    promoted?;
    stopped?;
    progress.end();
    Ok(())
}

async fn promote(instance: &mut Instance, cancel: &CancellationToken) -> Result<(), RestoreError> {
    let mut is_asked = false;
    loop {
        if cancel.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        instance.check_alive()?;
        if let Some(client) = instance.connect().await
            && let Ok(replay) = Instance::replay(&client).await
        {
            match replay.in_recovery {
                false => return Ok(()),
                true if replay.paused && !is_asked => {
                    instance.promote()?;
                    is_asked = true;
                }
                true => {}
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// Waits for a condition.
async fn wait(
    data_dir: &Path,
    cancel: &CancellationToken,
    what: &str,
    condition: impl Fn() -> Result<bool, RestoreError>,
) -> Result<(), RestoreError> {
    let begin = Instant::now();
    while !condition()? {
        if cancel.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        if begin.elapsed() > SERVER_DEADLINE {
            let log = data_dir.join(super::instance::LOG);
            let problem = format!("belongs to a server that never {what}");
            return Err(refused(data_dir, &problem, &format!("look into its log, {}", log.display())));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    Ok(())
}

/// The server that runs on a directory, and where it listens. Never another process: it is going to get signals.
fn server_of(data_dir: &Path) -> Result<Option<Server>, RestoreError> {
    let path = data_dir.join("postmaster.pid");
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(RestoreError::file("read", path)(error)),
    };
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let number = |line: usize| lines.get(line).and_then(|line| line.parse::<i32>().ok());
    let Some(pid) = number(0).and_then(Pid::from_raw) else { return Ok(None) };
    // All of a server's processes work in its data directory. Whoever has its number after a crash does not.
    match fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero())) {
        Ok(working) if working == data_dir => {}
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let problem = format!("may belong to a server that another user runs (process {})", pid.as_raw_nonzero());
            return Err(refused(data_dir, &problem, "run this as that user"));
        }
        _ => return Ok(None),
    }
    let port = number(3).and_then(|port| u16::try_from(port).ok());
    let socket_dir = lines.get(4).filter(|dir| !dir.is_empty()).map(PathBuf::from);
    Ok(Some(Server { pid, socket: socket_dir.zip(port) }))
}

#[derive(Debug)]
struct Server {
    pid: Pid,
    socket: Option<(PathBuf, u16)>,
}

impl Server {
    /// True once it waits at the restore's target. Only then may it be promoted: before, that would be an earlier moment.
    async fn stands_at(&self, mark: &Mark) -> bool {
        let Some((socket_dir, port)) = &self.socket else { return false };
        let mut config = tokio_postgres::Config::new();
        config.host_path(socket_dir).port(*port).user(&mark.role).dbname("postgres");
        config.application_name("walguard handover").connect_timeout(Duration::from_secs(5));
        let Ok((client, connection)) = config.connect(tokio_postgres::NoTls).await else { return false };
        tokio::spawn(connection); // ends with the client
        Instance::replay(&client)
            .await
            .is_ok_and(|replay| !replay.in_recovery || replay.paused && replay.lsn == Some(mark.reached))
    }
}

/// Has the archiver take the history of a timeline that began while it was off (Postgres: `XLogArchiveNotify` in
/// `access/transam/xlogarchive.c`).
fn mark_history(data_dir: &Path, timeline: Option<TimelineId>) -> Result<(), RestoreError> {
    let Some(timeline) = timeline else { return Ok(()) };
    let (wal, name) = (data_dir.join("pg_wal"), timeline.history_file_name());
    let status = wal.join("archive_status");
    if !wal.join(&name).exists() || status.join(format!("{name}.done")).exists() {
        return Ok(());
    }
    let ready = status.join(format!("{name}.ready"));
    atomic_file::write(&ready, b"").map_err(RestoreError::file("write", ready))
}

/// What `pg_control` says.
///
/// (Postgres: `ControlFileData` in `catalog/pg_control.h`; these offsets are the same in 14 to 18.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Control {
    system_id: SystemId,
    state: u32,
    timeline: Option<TimelineId>,
}

impl Control {
    const SHUT_DOWN: u32 = 1;
    const IN_ARCHIVE_RECOVERY: u32 = 5;
    const IN_PRODUCTION: u32 = 6;

    fn read(data_dir: &Path) -> Result<Self, RestoreError> {
        let path = data_dir.join("global/pg_control");
        let bytes = fs::read(&path).map_err(RestoreError::file("read", &path))?;
        Self::parse(&bytes).ok_or_else(|| refused(data_dir, "has a pg_control that is cut", "restore again"))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let number = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let system_id = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
        Some(Self { system_id: SystemId::new(system_id), state: number(16)?, timeline: TimelineId::new(number(48)?) })
    }
}

fn refused(path: &Path, problem: &str, hint: &str) -> RestoreError {
    RestoreError::Directory { path: path.to_owned(), problem: problem.to_owned(), hint: hint.to_owned() }
}

/// The directory itself, without links on the way.
fn real(path: &Path) -> Result<PathBuf, RestoreError> {
    fs::canonicalize(path).map_err(RestoreError::file("find the directory", path))
}

fn parent(path: &Path) -> Result<&Path, RestoreError> {
    path.parent().ok_or_else(|| refused(path, "is the root directory", "name a data directory"))
}

fn device(path: &Path) -> Result<u64, RestoreError> {
    Ok(fs::symlink_metadata(path).map_err(RestoreError::file("look at", path))?.dev())
}

fn sync_parents(paths: [&Path; 2]) -> Result<(), RestoreError> {
    for path in paths {
        let parent = parent(path)?;
        fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(RestoreError::file("sync", parent))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What two clusters of one server look like from outside, stopped.
    fn cluster(path: &Path, system_id: u64) {
        for folder in ["base", "global", "pg_tblspc", "pg_wal/archive_status"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        fs::write(path.join("PG_VERSION"), "15\n").unwrap();
        let mut control = vec![0; 8192];
        control[..8].copy_from_slice(&system_id.to_le_bytes());
        control[16..20].copy_from_slice(&Control::SHUT_DOWN.to_le_bytes());
        control[48..52].copy_from_slice(&2_u32.to_le_bytes());
        fs::write(path.join("global/pg_control"), control).unwrap();
    }

    fn pair() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let (restored, old) = (root.join("restored"), root.join("main"));
        cluster(&restored, 7);
        cluster(&old, 7);
        fs::write(restored.join("new"), "").unwrap();
        (folder, restored, old)
    }

    fn problem(restored: &Path, old: &Path) -> String {
        Swap::check(restored, old).unwrap_err().to_string()
    }

    #[test]
    fn two_directories_change_places_and_the_old_one_is_kept() {
        let (_folder, restored, old) = pair();
        let kept = Swap::check(&restored, &old).unwrap().exchange().unwrap();
        assert!(old.join("new").exists() && !kept.join("new").exists() && !restored.exists());
        assert!(kept.file_name().unwrap().to_str().unwrap().starts_with("main.before-2"));
        // By hand, as is said: it is as it was.
        fs::rename(&old, &restored).unwrap();
        fs::rename(&kept, &old).unwrap();
        assert!(!old.join("new").exists());
        let again = Swap::check(&restored, &old).unwrap().exchange().unwrap();
        assert!(again.exists() && old.join("new").exists());
    }

    #[test]
    fn what_is_another_cluster_or_runs_or_shares_a_place_is_not_swapped() {
        let (_folder, restored, old) = pair();
        assert!(problem(&restored, &restored).contains("itself"));
        assert!(problem(&restored, &restored.join("base")).contains("no PostgreSQL cluster"));
        cluster(&old, 8);
        assert!(problem(&restored, &old).contains("another cluster"));
        cluster(&old, 7);
        let inner = old.join("restored");
        cluster(&inner, 7);
        assert!(problem(&inner, &old).contains("within each other"));
        fs::remove_dir_all(&inner).unwrap();
        let space = old.with_file_name("space");
        fs::create_dir(&space).unwrap();
        for dir in [&restored, &old] {
            symlink(&space, dir.join("pg_tblspc/16400")).unwrap();
        }
        assert!(problem(&restored, &old).contains("shares the tablespace"));
        fs::remove_file(restored.join("pg_tblspc/16400")).unwrap();
        symlink(old.join("base"), restored.join("pg_tblspc/16400")).unwrap();
        assert!(problem(&restored, &old).contains("within a directory that is renamed"));
        fs::remove_file(restored.join("pg_tblspc/16400")).unwrap();
        let mut worker = std::process::Command::new("sleep").arg("60").current_dir(&old).spawn().unwrap();
        let refused = problem(&restored, &old);
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert!(refused.contains("a server that runs"), "{refused}");
        Swap::check(&restored, &old).unwrap();
    }

    #[test]
    fn only_a_server_of_this_directory_is_ever_signalled() {
        let (_folder, restored, _) = pair();
        let pid_file = |pid: u32| format!("{pid}\n{}\n1\n5433\n/tmp\nlocalhost\n", restored.display());
        fs::write(restored.join("postmaster.pid"), pid_file(std::process::id())).unwrap();
        assert!(server_of(&restored).unwrap().is_none(), "that is us, and we are no server");
        let mut worker = std::process::Command::new("sleep").arg("60").current_dir(&restored).spawn().unwrap();
        fs::write(restored.join("postmaster.pid"), pid_file(worker.id())).unwrap();
        let server = server_of(&restored).unwrap();
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert_eq!(server.unwrap().socket, Some((PathBuf::from("/tmp"), 5433)));
    }

    #[test]
    fn a_history_is_archived_once_and_a_directory_that_names_another_is_refused() {
        let (_folder, restored, old) = pair();
        let status = restored.join("pg_wal/archive_status");
        mark_history(&restored, TimelineId::new(2)).unwrap();
        assert!(!status.join("00000002.history.ready").exists(), "there is no history");
        fs::write(restored.join("pg_wal/00000002.history"), "").unwrap();
        mark_history(&restored, TimelineId::new(2)).unwrap();
        assert!(status.join("00000002.history.ready").exists());
        fs::write(restored.join("postgresql.conf"), format!("data_directory = '{}'\n", old.display())).unwrap();
        check_own_directory(&restored, &old).unwrap();
        assert!(
            check_own_directory(&restored, &restored)
                .unwrap_err()
                .to_string()
                .contains("says that the data directory is")
        );
    }
}
