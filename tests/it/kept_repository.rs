//! What the tests of list, verify and expire share: a repository that an agent has filled, with two backups.

use std::fs;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use walguard::pg::Lsn;

use crate::archived_wal::{DEADLINE, small_cluster, write};
use crate::harness::{Agent, Finished, Scratch, give_away, walguard};

/// A repository in a folder, whose server and agent have ended.
pub(crate) struct Kept {
    _scratch: Scratch,
    folder: PathBuf,
    url: String,
    /// The end of the WAL that was archived for certain.
    pub(crate) end: Lsn,
    /// When the last commits were made.
    pub(crate) last_writes: RangeInclusive<Timestamp>,
}

impl Kept {
    /// WAL of 1 MiB segments: some, the backup `first`, some, the backup `second`, some.
    pub(crate) async fn new() -> Self {
        let cluster = small_cluster().await;
        let scratch = Scratch::new();
        let url = scratch.repo_url();
        let mut agent = Agent::builder(&cluster, &url).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        for label in ["first", "second"] {
            write(&cluster, 2 << 10).await;
            let flags = agent.flags();
            let mut args = vec!["backup", "--label", label];
            args.extend(flags.iter().map(String::as_str));
            walguard(&args).expect(0);
        }
        let begin = Timestamp::now();
        write(&cluster, 2 << 10).await;
        let last_writes = begin..=Timestamp::now();
        let end = cluster.lsn().await;
        agent.wait_archived(&cluster, end, DEADLINE).await;
        assert!(agent.stop().await.success());
        Self { folder: scratch.join("repo").join("main"), _scratch: scratch, url, end, last_writes }
    }

    /// Runs a verb on it.
    pub(crate) fn run(&self, verb: &[&str]) -> Finished {
        let mut args = verb.to_vec();
        args.extend(["--repo", &self.url, "--cluster", "main"]);
        walguard(&args)
    }

    /// The files below a folder of the repository, in key order.
    pub(crate) fn files(&self, below: &str) -> Vec<PathBuf> {
        let mut files = Vec::new();
        collect(&self.folder.join(below), &mut files);
        files.sort();
        files
    }

    /// The whole segments of timeline 1.
    pub(crate) fn segments(&self) -> Vec<PathBuf> {
        self.files("wal/00000001").into_iter().filter(|path| path.extension().is_some_and(|e| e == "zst")).collect()
    }
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() { collect(&path, files) } else { files.push(path) }
    }
}

/// Flips one bit in the middle of a file.
pub(crate) fn flip_a_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0x10;
    fs::write(path, bytes).unwrap();
    give_away(path);
}

/// Flips one bit near the beginning of a file.
pub(crate) fn flip_an_early_bit(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    bytes[40] ^= 0x04;
    fs::write(path, bytes).unwrap();
    give_away(path);
}

/// Cuts the last bytes of a file off.
pub(crate) fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 7]).unwrap();
    give_away(path);
}
