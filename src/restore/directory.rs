//! Where a restore may write: nowhere, into an empty directory, or over a cluster that is provably stopped.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, test_kill_process};

use super::control;
use super::error::RestoreError;
use super::state;
use crate::atomic_file;

/// What lies at the target now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Occupied {
    /// Nothing, or an empty directory.
    Free,
    /// A cluster that does not run.
    StoppedCluster,
    /// What a restore left that did not come to its end. Its server may run.
    Unfinished,
}

/// Looks at the target directory and changes nothing.
///
/// With `overwrite` a cluster may lie there whose server provably does not run: the directory has what every cluster has,
/// the process that `postmaster.pid` names does not live, and no process works in the directory. Where processes cannot
/// be seen, `pg_control` must say that the server was shut down.
///
/// # Errors
/// If anything else is there.
pub fn check(path: &Path, overwrite: bool) -> Result<Occupied, RestoreError> {
    let refuse = |problem: &str, hint: &str| {
        Err(RestoreError::Directory { path: path.to_owned(), problem: problem.to_owned(), hint: hint.to_owned() })
    };
    if !path.is_absolute() {
        return refuse("is no absolute path", "give the whole path with --target-dir");
    }
    let mut entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return check_parent(path),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return refuse("is not a directory", "choose another place with --target-dir");
        }
        Err(error) => return Err(RestoreError::file("look into", path)(error)),
    };
    let is_draft = |name: &std::ffi::OsStr| state::is_note(name) && name != state::FILE;
    if entries.all(|entry| entry.is_ok_and(|entry| is_draft(&entry.file_name()))) {
        return Ok(Occupied::Free);
    }
    if state::Unfinished::read(path).is_some() {
        return Ok(Occupied::Unfinished);
    }
    if !is_cluster(path) {
        return refuse(
            "is not empty, and what it holds is no PostgreSQL cluster",
            "choose an empty or absent directory with --target-dir; walguard never removes what it does not know",
        );
    }
    if let Some(pid) = running_server(path)? {
        return refuse(
            &format!("belongs to a server that runs (process {pid})"),
            "stop that server first, or choose another place with --target-dir",
        );
    }
    if !overwrite {
        return refuse(
            "holds a cluster",
            "choose another place with --target-dir; --overwrite replaces the cluster, for good, and --delta turns it into \
             what is restored",
        );
    }
    Ok(Occupied::StoppedCluster)
}

/// Holds a directory, so that no other restore works there; until it is dropped, or its process ends.
#[derive(Debug)]
pub(super) struct Hold {
    _folder: fs::File,
}

/// Takes hold of a directory that is there.
///
/// # Errors
/// If another restore works there. A file system without locks holds nobody up.
pub(super) fn hold(path: &Path) -> Result<Hold, RestoreError> {
    let folder = fs::File::open(path).map_err(RestoreError::file("open", path))?;
    match atomic_file::lock(&folder) {
        Ok(false) => Err(RestoreError::Directory {
            path: path.to_owned(),
            problem: "is being restored into by another process".to_owned(),
            hint: "wait until it is done, or end it; the same command goes on then with what it left".to_owned(),
        }),
        _ => Ok(Hold { _folder: folder }),
    }
}

/// The directory that the target is made in must be there.
fn check_parent(path: &Path) -> Result<Occupied, RestoreError> {
    let parent = path.parent().unwrap_or(path);
    if parent.is_dir() {
        return Ok(Occupied::Free);
    }
    Err(RestoreError::Directory {
        path: path.to_owned(),
        problem: format!("cannot be made, because {} is not there", parent.display()),
        hint: format!("make it first: mkdir -p {}", parent.display()),
    })
}

/// What every cluster has, even one whose restore was interrupted.
pub(super) fn is_cluster(path: &Path) -> bool {
    let version = fs::read_to_string(path.join("PG_VERSION"));
    version.is_ok_and(|text| text.trim().parse::<u32>().is_ok())
        && ["base", "global"].iter().all(|d| path.join(d).is_dir())
}

/// The server that works in the directory, by `postmaster.pid`, if it lives. A process that has got its number since works
/// elsewhere.
pub(super) fn server(path: &Path) -> Option<Pid> {
    let text = fs::read_to_string(path.join("postmaster.pid")).ok()?;
    let pid = Pid::from_raw(text.lines().next()?.trim().parse().ok()?)?;
    let works_in = fs::read_link(format!("/proc/{}/cwd", pid.as_raw_nonzero()));
    let works_elsewhere = works_in.is_ok_and(|folder| fs::canonicalize(path).is_ok_and(|path| folder != path));
    let lives = test_kill_process(pid) != Err(rustix::io::Errno::SRCH) && !is_dead(pid);
    (lives && !works_elsewhere).then_some(pid)
}

/// The process that works in the directory, if there is one or if it cannot be proved that there is none.
pub(super) fn running_server(path: &Path) -> Result<Option<String>, RestoreError> {
    let pid_file = path.join("postmaster.pid");
    match fs::read_to_string(&pid_file) {
        Ok(text) => {
            let pid = text.lines().next().and_then(|line| line.trim().parse::<i32>().ok()).and_then(Pid::from_raw);
            let Some(pid) = pid else { return Ok(Some("postmaster.pid names none".to_owned())) };
            // Not permitted to signal it is alive too.
            if test_kill_process(pid) != Err(rustix::io::Errno::SRCH) && !is_dead(pid) {
                return Ok(Some(pid.as_raw_nonzero().to_string()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(RestoreError::file("read", pid_file)(error)),
    }
    match working_in(path) {
        Some(found) => Ok(found),
        None if was_shut_down(path) => Ok(None),
        None => Ok(Some("pg_control does not say that it was shut down".to_owned())),
    }
}

/// It has ended, but whoever started it has not taken note (state `Z`, behind the name in parentheses).
fn is_dead(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
    stat.is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')))
}

/// A process whose working directory this is: all of a server's have it. `None` if processes cannot be seen.
fn working_in(path: &Path) -> Option<Option<String>> {
    let path = fs::canonicalize(path).ok()?;
    let mut seen = false;
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let name = entry.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else { continue };
        // Those of other users cannot be looked at; a server that runs as another user has a directory that is not ours.
        let Ok(working) = fs::read_link(entry.path().join("cwd")) else { continue };
        seen = true;
        if working == path && pid != std::process::id().to_string() {
            return Some(Some(pid.to_owned()));
        }
    }
    seen.then_some(None)
}

/// All processes whose working directory this is.
pub(super) fn all_working_in(path: &Path) -> Vec<i32> {
    let Ok(path) = fs::canonicalize(path) else { return Vec::new() };
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let is_there = |entry: &fs::DirEntry| fs::read_link(entry.path().join("cwd")).is_ok_and(|working| working == path);
    let pids = entries.flatten().filter(is_there).filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|pid| u32::try_from(*pid) != Ok(std::process::id())).collect()
}

/// `pg_control` says that the server was shut down, as a primary or as a standby.
pub(super) fn was_shut_down(path: &Path) -> bool {
    matches!(state(path), Some(1 | 2))
}

/// `pg_control` says that the server was in recovery when it ended. Its signal file may be gone by then: a server that is
/// promoted removes that first.
pub(super) fn was_recovering(path: &Path) -> bool {
    matches!(state(path), Some(2 | 5))
}

/// What `pg_control` says of the server.
///
/// (Postgres: `ControlFileData.state` and `DBState` in `catalog/pg_control.h`; its offset is the same in 14 to 18.)
fn state(path: &Path) -> Option<u32> {
    let control = fs::read(path.join("global/pg_control")).ok()?;
    control.get(16..20)?.try_into().ok().map(u32::from_le_bytes)
}

/// Removes a stopped cluster from its directory, and what it has in its tablespaces' directories. The directories stay, and so
/// does the note of what is going to be there.
///
/// # Errors
/// Of the file system.
pub(super) fn clear(path: &Path) -> Result<(), RestoreError> {
    let fail = |path: &Path| RestoreError::file("remove", path.to_owned());
    // A crash in between must not leave something that starts: the control file goes first.
    control::remove(path).map_err(fail(&path.join("global/pg_control")))?;
    for link in entries(&path.join("pg_tblspc")) {
        let Ok(target) = fs::read_link(&link) else { continue };
        // A tablespace's directory holds one folder for each major version that uses it: `PG_15_202209061`.
        let version = fs::read_to_string(path.join("PG_VERSION")).unwrap_or_default();
        let prefix = format!("PG_{}_", version.trim());
        for folder in entries(&target) {
            if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)) {
                fs::remove_dir_all(&folder).map_err(fail(&folder))?;
            }
        }
    }
    for entry in entries(path).into_iter().filter(|entry| !entry.file_name().is_some_and(state::is_note)) {
        let is_folder = fs::symlink_metadata(&entry).is_ok_and(|meta| meta.is_dir());
        let removed = if is_folder { fs::remove_dir_all(&entry) } else { fs::remove_file(&entry) };
        removed.map_err(fail(&entry))?;
    }
    Ok(())
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

/// Bytes free for us on the file system that `path` is on, or will be.
pub(super) fn free_bytes(path: &Path) -> Option<u64> {
    let there = path.ancestors().find(|path| path.is_dir())?;
    let fs = rustix::fs::statvfs(there).ok()?;
    fs.f_bavail.checked_mul(fs.f_frsize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cluster(path: &Path, state: u32) {
        for folder in ["base", "global", "pg_tblspc"] {
            fs::create_dir_all(path.join(folder)).unwrap();
        }
        fs::write(path.join("PG_VERSION"), "15\n").unwrap();
        let mut control = vec![0; 8192];
        control[16..20].copy_from_slice(&state.to_le_bytes());
        fs::write(path.join("global/pg_control"), control).unwrap();
    }

    fn problem(path: &Path, overwrite: bool) -> String {
        check(path, overwrite).unwrap_err().to_string()
    }

    #[test]
    fn nothing_and_an_empty_directory_are_free() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(check(folder.path(), false).unwrap(), Occupied::Free);
        assert_eq!(check(&folder.path().join("new"), false).unwrap(), Occupied::Free);
        assert!(problem(&folder.path().join("no/parent"), false).contains("is not there"));
        assert!(problem(Path::new("relative"), false).contains("absolute"));
    }

    #[test]
    fn what_is_no_cluster_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        assert!(problem(folder.path(), true).contains("no PostgreSQL cluster"));
        assert!(problem(&folder.path().join("thesis.tex"), true).contains("not a directory"));
    }

    #[test]
    fn a_cluster_is_overwritten_only_if_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        cluster(folder.path(), 1);
        assert!(problem(folder.path(), false).contains("holds a cluster"));
        assert_eq!(check(folder.path(), true).unwrap(), Occupied::StoppedCluster);
        clear(folder.path()).unwrap();
        assert_eq!(check(folder.path(), false).unwrap(), Occupied::Free);
    }

    #[test]
    fn a_cluster_whose_server_may_run_is_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        cluster(folder.path(), 6);
        fs::write(folder.path().join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert!(problem(folder.path(), true).contains("a server that runs"));
        // A process that works in the directory, whatever `postmaster.pid` says.
        fs::remove_file(folder.path().join("postmaster.pid")).unwrap();
        let mut worker = std::process::Command::new("sleep").arg("60").current_dir(folder.path()).spawn().unwrap();
        let refused = check(folder.path(), true);
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert!(refused.unwrap_err().to_string().contains("a server that runs"));
        // A crashed one does not run.
        assert_eq!(check(folder.path(), true).unwrap(), Occupied::StoppedCluster);
    }

    #[test]
    fn a_process_that_got_the_number_of_a_dead_server_is_not_taken_for_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("postmaster.pid"), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(server(folder.path()), None, "this test does not work there");
        let mut worker = std::process::Command::new("sleep").arg("60").current_dir(folder.path()).spawn().unwrap();
        fs::write(folder.path().join("postmaster.pid"), format!("{}\n", worker.id())).unwrap();
        let found = server(folder.path());
        worker.kill().unwrap();
        worker.wait().unwrap();
        assert_eq!(found.map(|pid| pid.as_raw_nonzero().get().cast_unsigned()), Some(worker.id()));
    }

    #[test]
    fn a_directory_is_restored_into_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let held = hold(folder.path()).unwrap();
        assert!(hold(folder.path()).unwrap_err().to_string().contains("another process"));
        drop(held);
        hold(folder.path()).unwrap();
    }

    #[test]
    fn only_this_versions_folder_of_a_tablespace_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        let (data, space) = (folder.path().join("data"), folder.path().join("space"));
        cluster(&data, 1);
        for name in ["PG_15_202209061", "PG_14_202107181", "mine"] {
            fs::create_dir_all(space.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(&space, data.join("pg_tblspc/16400")).unwrap();
        clear(&data).unwrap();
        let left: Vec<_> = entries(&space).iter().map(|p| p.file_name().unwrap().to_owned()).collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }
}
