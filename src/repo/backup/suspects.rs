//! Pages whose checksum is wrong: which of them are damaged, and which were only read while they were being written.
//!
//! The server reads files while it writes them. A page that is caught in the middle (half old, half new) has a wrong
//! checksum and is no damage: whatever is written after the backup's start has its first change since then in the WAL
//! as a full image of the page (`full_page_writes` is forced while a backup runs; hint bits are logged likewise where
//! there are checksums), and replay puts that image in its place. So a page with a wrong checksum is
//!
//! - *torn*, if it says that it was last changed within the backup, or if the WAL of the backup holds a reference to
//!   the block, whose first is the full image;
//! - *damaged* otherwise. That includes a page that claims to be from after the backup's end: nothing is.
//!
//! The server's own verification reads a failed page twice and hopes; we have the WAL and can know.
//! (Postgres: `verify_page_checksum` in `backup/basebackup.c`.)

use std::collections::HashSet;

use crate::backoff::Chain;
use crate::decode::DecodeError;
use crate::decode::Reader;
use crate::decode::Record;
use crate::decode::RmgrId;
use crate::decode::Source;
use crate::decode::WalMajor;
use crate::pg::Fork;
use crate::pg::Lsn;
use crate::pg::Oid;
use crate::pg::RelFile;
use crate::pg::SegmentName;
use crate::proto;
use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::catalog::BackupInfo;

use super::relation_file::RelationFile;

/// Failed pages that a manifest names; the others it counts.
const NAMED_MAX: usize = 1_000;

/// A page whose checksum is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Suspect {
    /// The file as the server sees it.
    pub(super) path: String,
    pub(super) file: RelationFile,
    /// Block within the relation.
    pub(super) block: u32,
    /// Its last change, by what it says.
    pub(super) lsn: Lsn,
}

/// Drops the pages that say of themselves that they were changed between the backup's start and its stop.
pub(super) fn drop_changed(suspects: &mut Vec<Suspect>, start: Lsn, stop: Lsn) {
    suspects.retain(|page| page.lsn < start || page.lsn > stop);
}

/// For the manifest.
pub(super) fn name(suspects: &[Suspect]) -> Vec<proto::BadPage> {
    let named = suspects.iter().take(NAMED_MAX);
    named.map(|page| proto::BadPage { file: page.path.clone(), block: page.block.into() }).collect()
}

/// Drops the pages that the backup's WAL replaces as a whole. If that WAL cannot be read, all stay: better a warning too
/// many.
pub(super) async fn drop_torn(suspects: &mut Vec<Suspect>, repository: &Repository, backup: &BackupInfo) {
    match replaced(repository, backup, suspects).await {
        Ok(replaced) => suspects.retain(|page| !replaced.contains(page)),
        Err(error) => tracing::warn!(
            "failed to read the backup's WAL, which would tell torn pages from damaged ones: {}",
            Chain(&error)
        ),
    }
}

/// What replay replaces.
#[derive(Debug, Default)]
struct Replaced {
    /// Those of the suspects of which there is a full image.
    pages: HashSet<Block>,
    /// Databases (tablespace, database) that are copied again, file by file.
    databases: HashSet<(Oid, Oid)>,
}

type Block = (RelFile, Fork, u32);

impl Replaced {
    fn contains(&self, page: &Suspect) -> bool {
        let relation = page.file.relation;
        self.pages.contains(&(relation, page.file.fork, page.block))
            || self.databases.contains(&(relation.tablespace, relation.database))
    }

    /// Looks for images of `wanted` pages, and for `CREATE DATABASE ... STRATEGY FILE_COPY`, whose record begins with the
    /// OIDs of database and tablespace. (Postgres: `xl_dbase_create_rec` in `commands/dbcommands_xlog.h`.)
    fn note(&mut self, record: &Record<'_>, wanted: &HashSet<Block>) -> Result<(), DecodeError> {
        const DATABASE: RmgrId = RmgrId(4);
        const CREATE_BY_COPY: u8 = 0;
        if !record.is_whole() {
            return Ok(()); // a giant logical message: it touches no page
        }
        let parts = record.parts()?;
        for block in parts.blocks() {
            let block = block?;
            let key = (block.relation, block.fork, block.number);
            if (block.will_init || block.image.is_some_and(|image| image.apply)) && wanted.contains(&key) {
                self.pages.insert(key);
            }
        }
        if record.header.rmgr == DATABASE
            && record.operation() == CREATE_BY_COPY
            && let ([database, tablespace, ..], _) = parts.main_data.as_chunks::<4>()
        {
            self.databases.insert((Oid(u32::from_le_bytes(*tablespace)), Oid(u32::from_le_bytes(*database))));
        }
        Ok(())
    }
}

#[derive(Debug, thiserror::Error)]
enum ReplayError {
    #[error(transparent)]
    Repo(#[from] RepoError),
    #[error(transparent)]
    Decode(#[from] DecodeError),
    #[error("the WAL of version {0} is unknown")]
    Version(u32),
}

async fn replaced(repository: &Repository, backup: &BackupInfo, suspects: &[Suspect]) -> Result<Replaced, ReplayError> {
    let major = backup.server_version.major();
    let major = WalMajor::of_server(backup.server_version).ok_or(ReplayError::Version(major))?;
    let source = Source { major, segment_size: backup.segment_size, system_id: Some(backup.system_id) };
    let wanted = suspects.iter().map(|page| (page.file.relation, page.file.fork, page.block)).collect();
    let mut scan = Scan { reader: Reader::at_record(source, backup.start), wanted, replaced: Replaced::default() };
    let mut segment = SegmentName::at(backup.timeline, backup.start, backup.segment_size);
    while segment.start() < backup.stop {
        let bytes = repository.read_segment(&segment).await?.bytes;
        let from = backup.segment_size.offset_of(segment.start().max(backup.start)) as usize; // at most 1 GiB
        let to = (backup.stop.min(segment.end()) - segment.start()) as usize;
        let scanning = tokio::task::spawn_blocking(move || {
            scan.read(bytes.get(from..to).unwrap_or_default())?;
            Ok::<_, DecodeError>(scan)
        });
        scan = scanning.await.expect("scanning WAL does not panic")?;
        segment = segment.next();
    }
    Ok(scan.replaced)
}

struct Scan {
    reader: Reader,
    wanted: HashSet<Block>,
    replaced: Replaced,
}

impl Scan {
    fn read(&mut self, wal: &[u8]) -> Result<(), DecodeError> {
        for slice in wal.chunks(1 << 20) {
            self.reader.push(slice);
            while let Some(record) = self.reader.next_record()? {
                self.replaced.note(&record, &self.wanted)?;
            }
        }
        Ok(())
    }
}
