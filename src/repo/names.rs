//! What relations are called, kept beside the index so that an archive can be read without its cluster.
//!
//! A snapshot (`names/<timeline>/<segment>`) holds the catalogs' rows as of the first record that begins in its segment.
//! From there on the WAL itself tells what changes. Snapshots are derived and few: the agent writes one now and then, and
//! whoever wants names at some place begins with the newest snapshot before it and reads the WAL in between.

use futures_util::TryStreamExt as _;

use super::layout::Object;
use super::store::{Created, StoreError};
use super::{RepoError, Repository, frame};
use crate::decode::WalMajor;
use crate::decode::catalog::Catalog;
use crate::decode::rows::RowPlace;
use crate::detect::NamesSnapshot;
use crate::detect::names::{CatalogFile, Row, RowKey};
use crate::pg::{Oid, RelFile, SegmentName, SegmentSize, TimelineHistory, Xid};
use crate::proto;

/// The format that this code writes and reads.
const FORMAT: u32 = 1;

/// The most that a snapshot holds when it is decompressed: more than [`NamesLimits`](crate::detect::NamesLimits) lets in.
const SNAPSHOT_BYTES_MAX: usize = 128 << 20;

/// Why bytes are no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Not a whole, undamaged frame of a bearable size.
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    /// Not the message that it should be.
    #[error("not a snapshot of names: {0}")]
    Proto(#[from] prost::DecodeError),
    /// Of a later walguard, or of another major version of Postgres.
    #[error("a snapshot of names in format {format} of PostgreSQL {major}")]
    Other {
        /// Its format.
        format: u32,
        /// The major version.
        major: u32,
    },
    /// A message that no walguard writes.
    #[error("impossible snapshot of names: {0}")]
    Impossible(&'static str),
}

/// The object's bytes.
pub fn encode(snapshot: &NamesSnapshot, major: WalMajor) -> Vec<u8> {
    use prost::Message as _;
    let files = snapshot.files.iter().map(|(file, of)| {
        let mut rows = proto::CatalogRows {
            tablespace: file.tablespace.0,
            database: file.database.0,
            file_number: file.number,
            catalog: Catalog::ALL.iter().position(|catalog| *catalog == of.catalog).unwrap_or_default() as u32, // of 10
            of_database: of.database.0,
            ..proto::CatalogRows::default()
        };
        // Rows are sorted by file.
        let from = snapshot.rows.partition_point(|(key, _)| key.file < *file);
        let own = snapshot.rows.iter().skip(from).take_while(|(key, _)| key.file == *file);
        let mut before = 0;
        for (key, row) in own {
            rows.block.push(key.place.block.wrapping_sub(before));
            before = key.place.block;
            rows.offset.push(key.place.offset.into());
            rows.length.push(row.length);
            rows.xmin.push(row.xmin);
            rows.inserted_by.push(row.inserted_by.map_or(0, Xid::get));
            rows.deleted_by.push(row.deleted_by.map_or(0, Xid::get));
            rows.data.extend_from_slice(&row.data);
        }
        rows
    });
    let message = proto::NamesSnapshot { format: FORMAT, major: major.number(), files: files.collect() };
    frame::compress(&message.encode_to_vec(), frame::LEVEL_DEFAULT)
}

/// The snapshot in an object's bytes, which are not trusted.
///
/// # Errors
/// If they are damaged, of another format or major version, or say what cannot be.
pub fn decode(stored: &[u8], major: WalMajor) -> Result<NamesSnapshot, SnapshotError> {
    use prost::Message as _;
    let content = frame::decompress(stored, SNAPSHOT_BYTES_MAX)?;
    let message = proto::NamesSnapshot::decode(content.as_slice())?;
    if (message.format, message.major) != (FORMAT, major.number()) {
        return Err(SnapshotError::Other { format: message.format, major: message.major });
    }
    let mut snapshot = NamesSnapshot::default();
    for rows in message.files {
        let catalog = usize::try_from(rows.catalog).ok().and_then(|place| Catalog::ALL.get(place)).copied();
        let catalog = catalog.ok_or(SnapshotError::Impossible("a catalog that there is not"))?;
        let file = RelFile { tablespace: Oid(rows.tablespace), database: Oid(rows.database), number: rows.file_number };
        snapshot.files.push((file, CatalogFile { catalog, database: Oid(rows.of_database) }));
        let proto::CatalogRows { block, offset, length, xmin, inserted_by, deleted_by, data, .. } = rows;
        let each = catalog.bytes(major);
        let count = block.len();
        let counts = [offset.len(), length.len(), xmin.len(), inserted_by.len(), deleted_by.len()];
        if counts != [count; 5] || data.len() != count * each {
            return Err(SnapshotError::Impossible("its columns have different lengths"));
        }
        let mut at = 0_u32;
        let columns = block.into_iter().zip(offset).zip(length).zip(xmin).zip(inserted_by).zip(deleted_by);
        for ((((((block, offset), length), xmin), inserted_by), deleted_by), data) in
            columns.zip(data.chunks_exact(each))
        {
            at = at.wrapping_add(block);
            let offset = u16::try_from(offset).map_err(|_| SnapshotError::Impossible("a line pointer"))?;
            let (inserted_by, deleted_by) = (Xid::new(inserted_by), Xid::new(deleted_by));
            let row = Row { data: data.into(), length, xmin, inserted_by, deleted_by };
            snapshot.rows.push((RowKey { file, place: RowPlace { block: at, offset } }, row));
        }
    }
    snapshot.rows.sort_by_key(|(key, _)| *key);
    Ok(snapshot)
}

impl Repository {
    /// Puts a snapshot as of the first record that begins in `segment`. One that is there already stays: it was made from
    /// the same WAL.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_names(
        &self,
        segment: &SegmentName,
        snapshot: &NamesSnapshot,
        major: WalMajor,
    ) -> Result<Created, RepoError> {
        let key = self.layout.names(segment);
        Ok(self.store.create(&key, encode(snapshot, major).into()).await?)
    }

    /// The newest snapshot at or before `segment` along a timeline's history, with its segment. One that cannot be read
    /// is passed over for an older one, and said in the log.
    ///
    /// # Errors
    /// Of the store.
    pub async fn names_before(
        &self,
        path: &TimelineHistory,
        segment: &SegmentName,
        major: WalMajor,
    ) -> Result<Option<(SegmentName, NamesSnapshot)>, RepoError> {
        for name in self.names_segments(path, segment.size).await?.into_iter().rev() {
            if name.number > segment.number {
                continue;
            }
            let key = self.layout.names(&name);
            let stored = match self.store.read(&key, None).await {
                Ok(stored) => stored,
                Err(StoreError::NotFound { .. }) => continue, // just expired
                Err(error) => return Err(error.into()),
            };
            match decode(&stored, major) {
                Ok(snapshot) => return Ok(Some((name, snapshot))),
                Err(error) => tracing::warn!("{key} cannot be read, an older one is used: {error}"),
            }
        }
        Ok(None)
    }

    /// The segments that have a snapshot along a timeline's history, oldest first.
    ///
    /// # Errors
    /// Of the store.
    pub async fn names_segments(
        &self,
        path: &TimelineHistory,
        size: SegmentSize,
    ) -> Result<Vec<SegmentName>, RepoError> {
        let mut found = Vec::new();
        let timelines = path.ancestors().iter().map(|ancestor| ancestor.timeline).chain([path.timeline()]);
        for timeline in timelines {
            let mut objects = std::pin::pin!(self.objects(self.layout.names_folder(timeline), None));
            while let Some(object) = objects.try_next().await? {
                if let Some(Object::Names(name)) = self.layout.parse(&object.key, size)
                    && path.end_of(timeline).is_none_or(|end| name.start() < end)
                {
                    found.push(name);
                }
            }
        }
        found.sort_by_key(|name| (name.number, name.timeline));
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_written_is_what_is_read(
            rows in prop::collection::vec((0..3_u32, any::<u32>(), any::<u16>(), any::<[u32; 3]>()), 0..40),
        ) {
            for major in [WalMajor::V14, WalMajor::V15, WalMajor::V18] {
                let file = |number| RelFile { tablespace: Oid(1663), database: Oid(5), number };
                let catalogs = [Catalog::Class, Catalog::Namespace, Catalog::Trigger];
                let files = (0..3_u32).zip(catalogs).map(|(number, catalog)| {
                    (file(number), CatalogFile { catalog, database: Oid(5) })
                });
                let mut snapshot = NamesSnapshot { files: files.collect(), rows: Vec::new() };
                for (number, block, offset, [length, made, deleted]) in &rows {
                    let bytes = catalogs[*number as usize].bytes(major);
                    let row = Row {
                        data: (0..bytes).map(|at| (at as u32 ^ length) as u8).collect(),
                        length: *length,
                        xmin: *made,
                        inserted_by: Xid::new(*made),
                        deleted_by: Xid::new(*deleted),
                    };
                    let place = RowPlace { block: *block, offset: *offset };
                    snapshot.rows.push((RowKey { file: file(*number), place }, row));
                }
                snapshot.rows.sort_by_key(|(key, _)| *key);
                prop_assert_eq!(&decode(&encode(&snapshot, major), major).unwrap(), &snapshot);
                prop_assert!(decode(&encode(&snapshot, major), WalMajor::V16).is_err());
            }
        }

        #[test]
        fn garbage_is_no_snapshot(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&frame::compress(&bytes, 1), WalMajor::V15);
            prop_assert!(decode(&bytes, WalMajor::V15).is_err());
        }
    }
}
