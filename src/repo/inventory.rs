//! What is there: listings and small objects become a [`Catalog`].

use std::collections::BTreeMap;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::Timestamp;
use prost::Message as _;

use super::catalog::{BackupInfo, Catalog, CatalogScope, Damage, TimelineBuilder};
use super::gap::Gap;
use super::layout::Object;
use super::store::{Created, ObjectInfo, StoreError};
use super::{RepoError, Repository, SMALL_READS_MAX, SameContent, frame};
use crate::pg::{Lsn, SegmentName, TimelineHistory, TimelineId};
use crate::proto;

/// The content of a backup's manifest is at most this long: 262,144 frames and some millions of files.
pub const MANIFEST_BYTES_MAX: usize = 1 << 30;

/// What of a manifest is read to summarise it: its first frame, with everything but the lists of frames and files, is
/// shorter but for the strangest of clusters.
const MANIFEST_HEAD_BYTES: u64 = 256 << 10;

/// Parts of a base backup without a manifest: it is being taken, or was interrupted.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct UnfinishedBackup {
    /// Its name.
    pub label: String,
    /// Its objects.
    pub objects: u64,
    /// Their bytes.
    pub stored_bytes: u64,
    /// When the last of them was written, by the store's clock.
    pub newest_at: Timestamp,
}

impl Repository {
    /// Stores a timeline's history file as the server sent it.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read as one; as [`Repository::put_once`].
    pub async fn put_history(&self, timeline: TimelineId, verbatim: Bytes) -> Result<Created, RepoError> {
        let key = self.layout.history(timeline);
        parse_history(&key, timeline, &verbatim)?;
        self.put_once(&key, verbatim, SameContent::Verbatim).await
    }

    /// The histories that are there, by timeline.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if one cannot be read; of the store.
    pub async fn histories(&self) -> Result<Vec<TimelineHistory>, RepoError> {
        let (files, _) = self.children(self.layout.wal_folder()).await?;
        undamaged(self.read_histories(&files).await?)
    }

    async fn read_histories(&self, files: &[ObjectInfo]) -> Result<Readable<TimelineHistory>, RepoError> {
        let timelines: Vec<TimelineId> = files
            .iter()
            .filter_map(|file| match self.layout.parse(&file.key, crate::pg::SegmentSize::DEFAULT) {
                Some(Object::History(timeline)) => Some(timeline),
                _ => None,
            })
            .collect();
        let reads = stream::iter(timelines).map(|timeline| async move {
            let key = self.layout.history(timeline);
            let content = self.read_small(&key).await?;
            content.map(|content| parse_history(&key, timeline, &content)).transpose()
        });
        readable(reads.buffered(SMALL_READS_MAX)).await
    }

    /// Says that WAL is missing for good.
    ///
    /// # Errors
    /// Of the store. A gap that is there already is no error, whatever reason it gives.
    pub async fn put_gap(&self, gap: &Gap) -> Result<Created, RepoError> {
        let key = self.layout.gap(gap.timeline, gap.from, gap.to);
        let json = serde_json::to_vec_pretty(gap).expect("a gap becomes JSON");
        Ok(self.store.create(&key, json.into()).await?)
    }

    /// The gaps that are known, by timeline and position.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if one cannot be read; of the store.
    pub async fn gaps(&self) -> Result<Vec<Gap>, RepoError> {
        undamaged(self.read_gaps().await?)
    }

    async fn read_gaps(&self) -> Result<Readable<Gap>, RepoError> {
        let (files, _) = self.children(self.layout.gaps_folder()).await?;
        let reads = stream::iter(files).map(|file| async move {
            let Some(content) = self.read_small(&file.key).await? else { return Ok(None) };
            serde_json::from_slice(&content)
                .map(Some)
                .map_err(|error| RepoError::Damaged { key: file.key, problem: error.to_string() })
        });
        readable(reads.buffered(SMALL_READS_MAX)).await
    }

    /// The complete base backups, by start position.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if a manifest cannot be read; of the store.
    pub async fn backups(&self) -> Result<Vec<BackupInfo>, RepoError> {
        undamaged(self.read_backups().await?)
    }

    async fn read_backups(&self) -> Result<Readable<BackupInfo>, RepoError> {
        let labels = self.backup_labels().await?;
        let reads = stream::iter(labels).map(|label| async move { self.backup_info(&label).await });
        let mut read = readable(reads.buffered(SMALL_READS_MAX)).await?;
        read.0.sort_by(|a, b| (a.start, a.timeline, &a.label).cmp(&(b.start, b.timeline, &b.label)));
        Ok(read)
    }

    /// Base backups that have parts but no manifest, by label.
    ///
    /// # Errors
    /// Of the store; [`RepoError::Damaged`] if a manifest cannot be read.
    pub async fn unfinished_backups(&self) -> Result<Vec<UnfinishedBackup>, RepoError> {
        let mut unfinished = Vec::new();
        for label in self.backup_labels().await? {
            let folder = self.layout.backup_folder(&label);
            let manifest = self.layout.manifest(&label);
            let mut found = UnfinishedBackup { label, objects: 0, stored_bytes: 0, newest_at: Timestamp::MIN };
            let mut is_complete = false;
            let mut objects = std::pin::pin!(self.objects(folder, None));
            while let Some(object) = objects.try_next().await? {
                is_complete |= object.key == manifest;
                found.objects += 1;
                found.stored_bytes += object.size;
                found.newest_at = found.newest_at.max(object.modified);
            }
            if !is_complete && found.objects > 0 {
                unfinished.push(found);
            }
        }
        Ok(unfinished)
    }

    async fn backup_labels(&self) -> Result<Vec<String>, RepoError> {
        let (_, folders) = self.children(self.layout.backups_folder()).await?;
        Ok(folders.iter().filter_map(|folder| self.layout.parse_backup_folder(folder)).map(str::to_owned).collect())
    }

    /// What the manifest of the backup `label` says at its beginning; `None` if the backup has none. The lists of frames
    /// and files are neither read nor checked.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn backup_info(&self, label: &str) -> Result<Option<BackupInfo>, RepoError> {
        let key = self.layout.manifest(label);
        let damaged = |problem: &str| RepoError::Damaged { key: key.clone(), problem: problem.to_owned() };
        let mut head = match self.store.read(&key, Some(0..MANIFEST_HEAD_BYTES)).await {
            Ok(head) => manifest_head(&head),
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if head.is_none() {
            // Unusual: the part before the lists alone is longer than what was read, or the object is damaged.
            let whole = self.store.read(&key, None).await?;
            let content =
                frame::decompress_all(&whole, MANIFEST_BYTES_MAX).map_err(|error| damaged(&error.to_string()))?;
            head = proto::BackupManifest::decode(content.as_slice()).ok();
        }
        let manifest = head.ok_or_else(|| damaged("is not a manifest"))?;
        let info = BackupInfo::from_manifest(&manifest).map_err(damaged)?;
        if info.label != label {
            return Err(damaged("is the manifest of another backup"));
        }
        Ok(Some(info))
    }

    /// What the repository holds. A damaged history, manifest or gap is named in the catalog, and hinders nobody who
    /// does not need it.
    ///
    /// # Errors
    /// [`RepoError::NotInitialized`]; [`RepoError::Damaged`] if the identity cannot be read; of the store.
    pub async fn catalog(&self, scope: CatalogScope) -> Result<Catalog, RepoError> {
        let identity = self.require_identity().await?;
        let wal = async {
            let (files, folders) = self.children(self.layout.wal_folder()).await?;
            let (histories, damaged) = self.read_histories(&files).await?;
            let mut builders: BTreeMap<TimelineId, TimelineBuilder> =
                histories.iter().map(|history| (history.timeline(), TimelineBuilder::default())).collect();
            let from = match scope {
                CatalogScope::Everything => Some(Lsn::ZERO),
                CatalogScope::WalFrom(lsn) => Some(lsn),
                CatalogScope::WithoutWal => None,
            };
            for folder in &folders {
                let Some(timeline) = self.layout.parse_timeline_folder(folder) else { continue };
                let builder = builders.entry(timeline).or_default();
                if let Some(from) = from {
                    let first = SegmentName::at(timeline, from, identity.segment_size);
                    self.list_wal(builder, &first).await?;
                }
            }
            let mut timelines = BTreeMap::new();
            for (timeline, builder) in builders {
                let known = histories.iter().find(|history| history.timeline() == timeline).cloned();
                let root = || (timeline == TimelineId::FIRST).then(|| TimelineHistory::root(timeline));
                timelines.insert(timeline, builder.finish(known.or_else(root)));
            }
            Ok::<_, RepoError>((timelines, damaged))
        };
        let ((timelines, mut damaged), (backups, damaged_backups), (gaps, damaged_gaps)) =
            tokio::try_join!(wal, self.read_backups(), self.read_gaps())?;
        damaged.extend(damaged_backups);
        damaged.extend(damaged_gaps);
        Ok(Catalog { identity, timelines, backups, gaps, damaged })
    }

    /// Lists the WAL of one timeline, from a segment on.
    async fn list_wal(&self, builder: &mut TimelineBuilder, first: &SegmentName) -> Result<(), RepoError> {
        let folder = self.layout.timeline_folder(first.timeline);
        let mut objects = std::pin::pin!(self.objects(folder, Some(self.layout.before_segment(first))));
        while let Some(object) = objects.try_next().await? {
            if object.size == 0 {
                continue; // no frame is empty: nothing can be read from it
            }
            match self.layout.parse(&object.key, first.size) {
                Some(Object::Segment(segment)) => builder.segment(&segment, object.size, object.modified),
                Some(Object::Tail { segment, from, to }) => {
                    builder.tail(&segment, from, to, object.size, object.modified);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// What could be read, and what could not.
type Readable<T> = (Vec<T>, Vec<Damage>);

/// Sets damaged objects apart; `None` (gone meanwhile) is left out.
async fn readable<T>(
    reads: impl stream::Stream<Item = Result<Option<T>, RepoError>>,
) -> Result<Readable<T>, RepoError> {
    let mut reads = std::pin::pin!(reads);
    let (mut good, mut damaged) = (Vec::new(), Vec::new());
    while let Some(read) = reads.next().await {
        match read {
            Ok(value) => good.extend(value),
            Err(RepoError::Damaged { key, problem }) => damaged.push(Damage { key, problem }),
            Err(error) => return Err(error),
        }
    }
    Ok((good, damaged))
}

fn undamaged<T>((good, damaged): Readable<T>) -> Result<Vec<T>, RepoError> {
    match damaged.into_iter().next() {
        None => Ok(good),
        Some(Damage { key, problem }) => Err(RepoError::Damaged { key, problem }),
    }
}

fn parse_history(key: &str, timeline: TimelineId, content: &[u8]) -> Result<TimelineHistory, RepoError> {
    // The reasons may be in the server's encoding; all that matters is ASCII.
    TimelineHistory::parse(timeline, &String::from_utf8_lossy(content))
        .map_err(|error| RepoError::Damaged { key: key.to_owned(), problem: error.to_string() })
}

/// Reads a manifest's first frame, which holds what stands before its lists; `None` if these bytes do not hold all of it.
fn manifest_head(stored: &[u8]) -> Option<proto::BackupManifest> {
    let (head, _) = frame::split_first(stored).ok()?;
    let content = frame::decompress(head, MANIFEST_BYTES_MAX).ok()?;
    proto::BackupManifest::decode(content.as_slice()).ok()
}

#[cfg(test)]
mod tests {
    use super::super::catalog::LsnRange;
    use super::super::tests::{identity, repository, segment};
    use super::*;
    use crate::pg::SegmentNumber;

    #[tokio::test]
    async fn a_catalog_can_begin_at_a_position() {
        let repo = repository();
        repo.initialize(&identity()).await.unwrap();
        for number in 1..=6 {
            let name = SegmentName { number: SegmentNumber::new(number), ..segment() };
            repo.store().create(&repo.layout().segment(&name), "wal".into()).await.unwrap();
        }
        repo.store().create("main/wal/rubbish", "?".into()).await.unwrap();
        repo.put_history(TimelineId::new(2).unwrap(), "1\t0/300000\tpromoted\n".into()).await.unwrap();
        let range = |from: u64, to: u64| LsnRange { from: Lsn::new(from << 20), to: Lsn::new(to << 20) };
        let all = repo.catalog(CatalogScope::Everything).await.unwrap();
        assert_eq!(all.timelines[&TimelineId::FIRST].ranges.as_slice(), [range(1, 7)]);
        assert_eq!(all.timelines[&TimelineId::FIRST].segments, 6);
        assert_eq!(all.newest_timeline().unwrap().get(), 2);
        let late = repo.catalog(CatalogScope::WalFrom(Lsn::new((4 << 20) + 77))).await.unwrap();
        assert_eq!(late.timelines[&TimelineId::FIRST].ranges.as_slice(), [range(4, 7)]);
        let none = repo.catalog(CatalogScope::WithoutWal).await.unwrap();
        assert!(none.timelines[&TimelineId::FIRST].ranges.is_empty());
    }

    #[tokio::test]
    async fn a_damaged_history_is_named_and_hides_nothing_else() {
        let repo = repository();
        repo.initialize(&identity()).await.unwrap();
        let third = TimelineId::new(3).unwrap();
        assert!(matches!(repo.put_history(third, "nonsense".into()).await, Err(RepoError::Damaged { .. })));
        repo.store().create(&repo.layout().history(third), "nonsense".into()).await.unwrap();
        let catalog = repo.catalog(CatalogScope::Everything).await.unwrap();
        assert_eq!(catalog.damaged[0].key, "main/wal/00000003.history");
        assert!(matches!(repo.histories().await, Err(RepoError::Damaged { .. })));
    }

    #[tokio::test]
    async fn a_repository_of_a_later_format_is_left_alone() {
        let repo = repository();
        repo.store().create("main/cluster.json", r#"{"format": 2, "shape": "round"}"#.into()).await.unwrap();
        let error = repo.catalog(CatalogScope::Everything).await.unwrap_err();
        assert!(matches!(error, RepoError::UnknownFormat { format: 2, .. }), "{error:?}");
    }
}
