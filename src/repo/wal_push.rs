//! `archive_command`: one WAL file of a server's `pg_wal` -> the repository.
//!
//! Postgres hands over whole segments, timeline history files, backup labels, and after a promotion the old timeline's
//! last segment as `.partial`. It may hand over one file several times, and it recycles a file as soon as this succeeds.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{Created, RepoError, Repository, SameContent, frame};
use crate::pg::{SegmentName, SegmentSize, SystemId, TimelineId};

/// What became of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It is in the repository now.
    Stored,
    /// It was there already, with the same content.
    Known,
    /// It is of a kind that the repository has no use for: a backup label (base backups carry their own).
    NotNeeded,
}

/// A file could not be archived. Postgres keeps it and asks again.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The repository failed, or holds something else under this name.
    #[error(transparent)]
    Repo(#[from] RepoError),
    /// The file cannot be read.
    #[error("read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The name is none that Postgres gives to a file that it wants archived.
    #[error("`{0}` is not the name of a WAL file")]
    Name(String),
    /// The file is not what its name says.
    #[error("{} is not segment {name}: {problem}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What it should be.
        name: SegmentName,
        /// What is wrong.
        problem: String,
    },
    /// The old timeline's last segment, after a promotion, and no history in the repository tells how far it is valid.
    #[error(
        "{0}.partial is valid up to where its timeline ended, and no history in the repository tells where that was"
    )]
    Partial(SegmentName),
}

impl PushError {
    /// True if the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Repo(error) if error.is_transient())
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Repo(error) => error.hint(),
            Self::Read { .. } => {
                Some("archive_command takes %p, a path below the data directory: walguard wal-push %p".to_owned())
            }
            Self::Name(_) => Some("archive_command = 'walguard wal-push --config FILE %p'".to_owned()),
            Self::Content { .. } => {
                Some("is this the cluster that the repository belongs to? `walguard check` compares the two".to_owned())
            }
            Self::Partial(name) => {
                Some(format!("nothing is lost: {name}.partial can be archived by `walguard run` only"))
            }
        }
    }
}

/// What a file name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Segment(SegmentName),
    Partial(SegmentName),
    History(TimelineId),
    BackupLabel,
}

fn kind(name: &str, size: SegmentSize) -> Option<Kind> {
    if let Some(timeline) = name.strip_suffix(".history") {
        let hex = timeline.len() == 8 && timeline.bytes().all(|b| b.is_ascii_hexdigit());
        let number = u32::from_str_radix(timeline, 16).ok().filter(|_| hex)?;
        return TimelineId::new(number).map(Kind::History);
    }
    if let Some(segment) = name.strip_suffix(".partial") {
        return SegmentName::parse(segment, size).ok().map(Kind::Partial);
    }
    if let Some((segment, _)) = name.strip_suffix(".backup").and_then(|stem| stem.split_once('.')) {
        return SegmentName::parse(segment, size).ok().map(|_| Kind::BackupLabel);
    }
    SegmentName::parse(name, size).ok().map(Kind::Segment)
}

/// Archives one file, and returns when it is durable in the repository. Blocks the thread while it reads and compresses.
///
/// # Errors
/// If the file is not in the repository afterwards, or something else is there under its name.
pub async fn push(repo: &Repository, path: &Path, level: i32) -> Result<Pushed, PushError> {
    let identity = repo.require_identity().await?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let created = match kind(&name, identity.segment_size).ok_or_else(|| PushError::Name(name.clone().into_owned()))? {
        Kind::BackupLabel => return Ok(Pushed::NotNeeded),
        Kind::Partial(name) => {
            // Behind the switch point it holds what its file held before, or WAL that never became valid.
            let histories = repo.histories().await?;
            let ends = histories.iter().flat_map(|h| h.ancestors()).filter(|a| a.timeline == name.timeline);
            let mut ends = ends.map(|a| a.switch).filter(|end| *end > name.start() && *end < name.end());
            let valid = ends.next().ok_or(PushError::Partial(name))? - name.start();
            let mut content = read(path, identity.segment_size.bytes() + 1)?;
            check(path, &name, &content, identity.system_id)?;
            let limit = usize::try_from(valid).expect("a segment fits into memory");
            content.truncate(limit);
            let stored = Bytes::from(frame::compress(&content, level));
            let to = u32::try_from(valid).expect("a segment is at most 1 GiB");
            repo.put_once(&repo.layout().tail(&name, 0, to), stored, SameContent::Compressed { limit }).await?
        }
        Kind::History(timeline) => repo.put_history(timeline, read(path, HISTORY_BYTES_MAX)?.into()).await?,
        Kind::Segment(name) => {
            let size = identity.segment_size.bytes();
            let content = read(path, size + 1)?;
            check(path, &name, &content, identity.system_id)?;
            let limit = content.len();
            let stored = Bytes::from(frame::compress(&content, level));
            drop(content);
            repo.put_once(&repo.layout().segment(&name), stored, SameContent::Compressed { limit }).await?
        }
    };
    Ok(match created {
        Created::New => Pushed::Stored,
        Created::Exists => Pushed::Known,
    })
}

/// Real ones have some hundred bytes.
const HISTORY_BYTES_MAX: u64 = 4 << 20;

fn read(path: &Path, limit: u64) -> Result<Vec<u8>, PushError> {
    let failed = |source| PushError::Read { path: path.to_owned(), source };
    let mut content = Vec::new();
    let file = File::open(path).map_err(failed)?;
    content.reserve_exact(usize::try_from(file.metadata().map_err(failed)?.len().min(limit)).unwrap_or_default());
    file.take(limit).read_to_end(&mut content).map_err(failed)?;
    Ok(content)
}

/// Checks the long header of the first page.
///
/// (Postgres: `XLogLongPageHeaderData` in `access/xlog_internal.h`.)
fn check(path: &Path, name: &SegmentName, content: &[u8], system_id: SystemId) -> Result<(), PushError> {
    let refuse = |problem: String| PushError::Content { path: path.to_owned(), name: *name, problem };
    let number = |at: usize| {
        let bytes = content.get(at..at + 8)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    if content.len() as u64 != name.size.bytes() {
        return Err(refuse(format!("it has {} bytes instead of {}", content.len(), name.size.bytes())));
    }
    match (number(8), number(24)) {
        (Some(address), _) if address != name.start().bytes() => {
            Err(refuse(format!("its first page says that it is at {}", crate::pg::Lsn::new(address))))
        }
        (_, Some(id)) if id != system_id.get() => {
            Err(refuse(format!("it was written by cluster {id}, and the repository belongs to {system_id}")))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_names() {
        let kind = |name| kind(name, SegmentSize::DEFAULT);
        let segment = SegmentName::parse("000000010000001600000037", SegmentSize::DEFAULT).unwrap();
        assert_eq!(kind("000000010000001600000037"), Some(Kind::Segment(segment)));
        assert_eq!(kind("000000010000001600000037.partial"), Some(Kind::Partial(segment)));
        assert_eq!(kind("000000010000001600000037.00000028.backup"), Some(Kind::BackupLabel));
        assert_eq!(kind("0000000A.history"), TimelineId::new(10).map(Kind::History));
        for name in ["", "postgresql.conf", "00000000.history", "+0000001.history", "000000010000001600000037.zst"] {
            assert_eq!(kind(name), None, "{name}");
        }
    }
}
