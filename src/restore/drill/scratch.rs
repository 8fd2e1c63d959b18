//! The place of a drill: a directory that goes with it, and how much of the disk and of time it may take.

use std::fs;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytesize::ByteSize;
use rustix::process::{Pid, Signal, kill_process};

use super::Config;
use crate::atomic_file;
use crate::restore::control;
use crate::restore::directory;
use crate::restore::error::RestoreError;
use crate::restore::instance::SOCKET_DIR_BYTES_MAX;

/// What a directory of a drill is called, behind which a random number follows.
const PREFIX: &str = "walguard-drill-";

/// The same of one that is kept: no later drill removes it.
const PREFIX_KEPT: &str = "walguard-kept-";

/// Without a limit in the settings, a drill takes at most this share of what is free on its disk, in percent.
const FREE_SHARE: u64 = 90;

/// How often the disk is looked at. A look that takes longer than a tenth of this is taken less often.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A server that was asked to stop at once has ended by then, or is killed.
const QUIT_PATIENCE: Duration = Duration::from_secs(6);

/// How much a drill may take.
#[derive(Debug)]
pub(super) struct Limits {
    bytes: Option<u64>,
    /// The limit was set, and does not come from what is free.
    is_set: bool,
    began: Instant,
    time: Duration,
}

impl Limits {
    pub(super) fn of(config: &Config, scratch: &Scratch, began: Instant) -> Self {
        let free = directory::free_bytes(&scratch.dir).map(|free| free / 100 * FREE_SHARE);
        let set = config.max_bytes.map(|bytes| bytes.as_u64());
        let bytes = [free, set].into_iter().flatten().min();
        Self { bytes, is_set: set.is_some() && bytes == set, began, time: config.max_time }
    }

    fn too_much(&self, what: String) -> RestoreError {
        let hint = match self.is_set {
            true => "raise --max-bytes, or `drill.max_bytes`, if the disk has the room",
            false => "make room, or choose another disk with --scratch-dir or `drill.scratch_dir`",
        };
        RestoreError::Limit { problem: what, hint: hint.to_owned() }
    }

    /// The base backup must fit, before any of it is fetched.
    pub(super) fn check(&self, needed: u64) -> Result<(), RestoreError> {
        match self.bytes {
            Some(bytes) if needed > bytes => Err(self.too_much(format!(
                "the base backup takes {} of disk, and the drill may take {}",
                ByteSize::b(needed).display().iec(),
                ByteSize::b(bytes).display().iec()
            ))),
            _ => Ok(()),
        }
    }

    /// Waits until a limit is passed. Tells in `most` what the directory took at most.
    pub(super) async fn watch(&self, dir: &Path, most: &AtomicU64) -> RestoreError {
        let mut pause = LOOK_EVERY;
        loop {
            let left = self.time.saturating_sub(self.began.elapsed());
            if left.is_zero() {
                let problem = format!("the drill took longer than {} s", self.time.as_secs());
                let hint = "raise --max-time, or `drill.max_time`; more frequent base backups leave less WAL to replay";
                return RestoreError::Limit { problem, hint: hint.to_owned() };
            }
            let (place, looking) = (dir.to_owned(), Instant::now());
            let used = tokio::task::spawn_blocking(move || disk_usage(&place)).await.unwrap_or_default();
            most.fetch_max(used, Ordering::Relaxed);
            if let Some(bytes) = self.bytes.filter(|bytes| used > *bytes) {
                return self.too_much(format!(
                    "the drill took {} of disk, and may take {}",
                    ByteSize::b(used).display().iec(),
                    ByteSize::b(bytes).display().iec()
                ));
            }
            pause = pause.max(looking.elapsed().saturating_mul(10));
            tokio::time::sleep(pause.min(left)).await;
        }
    }
}

/// What a directory takes of its disk, in bytes. What goes meanwhile is not counted.
fn disk_usage(dir: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let size = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => disk_usage(&path),
        Ok(meta) => meta.blocks().saturating_mul(512),
        Err(_) => 0,
    };
    entries.flatten().map(|entry| size(entry.path())).sum()
}

/// The directory of a drill: `data`, tablespaces, and a socket. With this value servers in it end and it goes, unless it is
/// kept.
#[derive(Debug)]
pub(super) struct Scratch {
    /// The directory that is given; made if it was not there.
    root: PathBuf,
    was_made: bool,
    pub(super) dir: PathBuf,
    pub(super) socket_dir: PathBuf,
    keep: bool,
    /// Held as long as this drill is the only one here.
    lock: Option<File>,
}

impl Scratch {
    pub(super) fn make(root: &Path, keep: bool) -> Result<Self, RestoreError> {
        let refuse = |problem: String, hint: &str| RestoreError::Directory {
            path: root.to_owned(),
            problem,
            hint: hint.to_owned(),
        };
        let other = "make it first, for the user that runs the drill, or choose another with --scratch-dir or \
                     `drill.scratch_dir`";
        if !root.is_absolute() {
            return Err(refuse("is no absolute path".to_owned(), "give the whole path with --scratch-dir"));
        }
        let was_made = match DirBuilder::new().mode(0o700).create(root) {
            Ok(()) => true,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
            Err(error) => return Err(refuse(format!("cannot be made: {error}"), other)),
        };
        let mut made =
            Self { root: root.to_owned(), was_made, dir: PathBuf::new(), socket_dir: PathBuf::new(), keep, lock: None };
        let lock = File::open(root).map_err(|error| refuse(format!("cannot be used: {error}"), other))?;
        if !atomic_file::lock(&lock).unwrap_or(false) {
            return Err(refuse(
                "is in use: another drill runs there".to_owned(),
                "wait until it has ended, or choose another place with --scratch-dir",
            ));
        }
        made.lock = Some(lock);
        for leftover in directories(root, PREFIX) {
            tracing::warn!(directory = %leftover.display(), "removing what an earlier drill left behind");
            sweep(&leftover);
        }
        let prefix = if keep { PREFIX_KEPT } else { PREFIX };
        made.dir = root.join(format!("{prefix}{:08x}", fastrand::u32(..)));
        let make = |path: &Path| DirBuilder::new().mode(0o700).create(path);
        make(&made.dir).map_err(|error| refuse(format!("cannot be written: {error}"), other))?;
        made.socket_dir = made.dir.join("s");
        if made.socket_dir.as_os_str().len() > SOCKET_DIR_BYTES_MAX {
            // The path of a socket is short. What lies elsewhere is found by a link.
            let elsewhere = std::env::temp_dir().join(format!("{PREFIX}{:08x}", fastrand::u32(..)));
            std::os::unix::fs::symlink(&elsewhere, &made.socket_dir).map_err(RestoreError::file("make", &elsewhere))?;
            made.socket_dir = elsewhere;
        }
        make(&made.socket_dir).map_err(RestoreError::file("make", &made.socket_dir))?;
        Ok(made)
    }

    pub(super) fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    /// Removes everything; gives the directory if it is kept.
    pub(super) async fn remove(self) -> Option<PathBuf> {
        let kept = self.keep.then(|| self.dir.clone());
        let _ = tokio::task::spawn_blocking(move || drop(self)).await; // a panic in it is shown by itself
        kept
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.dir.as_os_str().is_empty() {
            if self.keep {
                end_servers(&self.dir.join("data"));
            } else {
                sweep(&self.dir);
            }
            if !self.socket_dir.starts_with(&self.dir) {
                let _ = fs::remove_dir_all(&self.socket_dir);
            }
        }
        if self.was_made && self.lock.is_some() {
            let _ = fs::remove_dir(&self.root); // unless somebody put something else there
        }
    }
}

/// The directories in `root` whose names begin so.
fn directories(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(root) else { return Vec::new() };
    let is_ours = |entry: &fs::DirEntry| {
        entry.file_name().to_string_lossy().starts_with(prefix) && entry.file_type().is_ok_and(|kind| kind.is_dir())
    };
    entries.flatten().filter(is_ours).map(|entry| entry.path()).collect()
}

/// Ends servers in a drill's directory and removes it.
fn sweep(dir: &Path) {
    end_servers(&dir.join("data"));
    let _ = control::remove(&dir.join("data")); // it may lie in memory; the directory goes next
    if let Ok(elsewhere) = fs::read_link(dir.join("s"))
        && elsewhere.file_name().is_some_and(|name| name.to_string_lossy().starts_with(PREFIX))
    {
        let _ = fs::remove_dir_all(&elsewhere);
    }
    if let Err(error) = fs::remove_dir_all(dir) {
        tracing::error!(directory = %dir.display(), "failed to remove the directory of a drill: {error}");
    }
}

/// Ends all processes that work in a data directory, as all of a server do: at once, for nothing of it is needed.
fn end_servers(data_dir: &Path) {
    let began = Instant::now();
    let mut asked = false;
    loop {
        let pids = directory::all_working_in(data_dir);
        if pids.is_empty() {
            return;
        }
        let signal = if began.elapsed() > QUIT_PATIENCE { Signal::KILL } else { Signal::QUIT };
        if !asked || signal == Signal::KILL {
            asked = true;
            for pid in pids.into_iter().filter_map(Pid::from_raw) {
                let _ = kill_process(pid, signal); // it has ended meanwhile
            }
        }
        if began.elapsed() > QUIT_PATIENCE * 2 {
            tracing::error!(directory = %data_dir.display(), "a server of a drill does not end");
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_goes_with_the_drill_and_what_a_killed_one_left_goes_with_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("scratch");
        let scratch = Scratch::make(&root, false).unwrap();
        let data = scratch.data_dir();
        fs::create_dir(&data).unwrap();
        let busy = Scratch::make(&root, false).unwrap_err();
        assert!(busy.to_string().contains("another drill runs there") && busy.hint().is_some(), "{busy}");
        assert!(data.exists(), "whoever was refused removes nothing");
        drop(scratch);
        assert!(!root.exists());

        fs::create_dir(&root).unwrap();
        let left = root.join("walguard-drill-0badcafe");
        fs::create_dir_all(left.join("data/base")).unwrap();
        fs::create_dir_all(left.join("data/global")).unwrap();
        control::keep_in_memory(&left.join("data"), b"control").unwrap();
        let memory = control::in_memory(&left.join("data")).unwrap();
        let mut server = std::process::Command::new("sleep").arg("60").current_dir(left.join("data")).spawn().unwrap();
        // It is reaped by us, so it is waited for beside.
        let ended = std::thread::spawn(move || server.wait().unwrap());
        let kept = Scratch::make(&root, true).unwrap();
        assert!(!ended.join().unwrap().success(), "its server was ended");
        assert!(!left.exists() && !memory.exists());
        let dir = kept.dir.clone();
        drop(kept);
        assert!(dir.exists(), "what is to be kept stays");
        drop(Scratch::make(&root, false).unwrap());
        assert!(dir.exists(), "also by the next");
    }

    #[test]
    fn a_path_that_is_too_long_for_a_socket_has_its_socket_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        let root =
            folder.path().join("a-name-that-is-so-long-that-the-path-of-a-socket-in-it-would-have-too-many-bytes");
        let scratch = Scratch::make(&root, false).unwrap();
        let socket = scratch.socket_dir.clone();
        assert!(socket.is_dir() && socket.as_os_str().len() <= SOCKET_DIR_BYTES_MAX, "{}", socket.display());
        drop(scratch);
        assert!(!socket.exists());
    }

    #[tokio::test(start_paused = true)]
    async fn limits_of_time_and_disk_end_a_drill() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("file"), vec![1; 100_000]).unwrap();
        let most = AtomicU64::new(0);
        let limits = |bytes, seconds| Limits {
            bytes: Some(bytes),
            is_set: true,
            began: Instant::now(),
            time: Duration::from_secs(seconds),
        };
        let over = limits(50_000, 60).watch(folder.path(), &most).await;
        assert!(over.to_string().contains("of disk") && over.hint().unwrap().contains("max_bytes"), "{over}");
        assert!(most.load(Ordering::Relaxed) >= 100_000);
        let over = limits(1 << 30, 0).watch(folder.path(), &most).await;
        assert!(over.to_string().contains("longer than 0 s") && over.hint().unwrap().contains("max_time"), "{over}");
        assert!(limits(50_000, 60).check(50_001).is_err() && limits(50_000, 60).check(50_000).is_ok());
    }
}
