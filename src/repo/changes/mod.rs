//! The change log: what logical replication told of a database, `changes/<database>/<from>-<part>.zst`.
//!
//! It is to a managed server what archived WAL is to another: a chain of objects, each written once, that holds every
//! committed change behind the place where it begins ([`mod@format`]).

pub mod format;
pub mod merge;
pub mod walk;

use std::cmp::Reverse;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};

pub use format::{ChangesError, ChangesName, Header, Messages, Place, Sent, Within};

use super::frame;
use super::layout::Object;
use super::store::ListRequest;
use super::{Created, RepoError, Repository, SameContent};
use crate::pg::{Lsn, Oid, SegmentSize};

/// The most content that an object can have: one row of the size that Postgres can send (1 GiB), and what goes with it.
pub const CONTENT_BYTES_MAX: usize = (1 << 30) + (32 << 20);

/// An object of the log, read.
#[derive(Clone, Debug)]
pub struct Changes {
    /// What it says of itself.
    pub header: Header,
    /// Its messages ([`Messages`]).
    pub messages: Bytes,
}

/// The names in the order of the chain, each change in one of them: a merged object stands for those that it holds.
fn once(mut names: Vec<ChangesName>) -> Vec<ChangesName> {
    // Of two that begin at one place the longer comes first.
    names.sort_unstable_by_key(|name| (name.place(), Reverse(name.merged_to)));
    let mut held_to = None;
    names.retain(|name| {
        let is_held = held_to.is_some_and(|to| name.from < to);
        if !is_held {
            held_to = name.merged_to;
        }
        !is_held
    });
    names
}

impl Repository {
    /// Puts an object of the change log; the same again is success.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if another agent put other changes there; of the store.
    pub async fn put_changes(&self, header: &Header, messages: &[u8], level: i32) -> Result<(Created, u64), RepoError> {
        let content = format::encode(header, messages);
        let stored = tokio::task::spawn_blocking(move || frame::compress(&content, level)).await;
        let stored: Bytes = stored.expect("compressing does not panic").into();
        let size = stored.len() as u64;
        let key = self.layout().changes(&header.name);
        let created = self.put_once(&key, stored, SameContent::Compressed { limit: CONTENT_BYTES_MAX }).await?;
        Ok((created, size))
    }

    /// An object of the change log.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn changes(&self, name: ChangesName) -> Result<Changes, RepoError> {
        let key = self.layout().changes(&name);
        let stored = self.store().read(&key, None).await?;
        let read = tokio::task::spawn_blocking(move || {
            let content = frame::decompress(&stored, CONTENT_BYTES_MAX).map_err(|error| error.to_string())?;
            let (header, at) = format::read_header(&content, name).map_err(|error| error.to_string())?;
            let messages = Bytes::from(content).slice(at..);
            match Messages::new(&messages).find_map(Result::err) {
                Some(error) => Err(error.to_string()),
                None => Ok(Changes { header, messages }),
            }
        });
        read.await.expect("reading changes does not panic").map_err(|problem| RepoError::Damaged { key, problem })
    }

    /// The databases that have a change log, by their OIDs.
    ///
    /// # Errors
    /// Of the store.
    pub async fn changed_databases(&self) -> Result<Vec<Oid>, RepoError> {
        let root = self.layout().all_changes_folder();
        let (_, folders) = self.children(root.clone()).await?;
        let oid = |folder: &String| folder.strip_prefix(&root)?.strip_suffix('/')?.parse().ok().map(Oid);
        Ok(folders.iter().filter_map(oid).collect())
    }

    /// The names of a database's objects behind `after`, or all, in the order of the chain. What a merged object holds is not
    /// among them, once more.
    ///
    /// # Errors
    /// Of the store.
    pub async fn changes_after(
        &self,
        database: Oid,
        after: Option<ChangesName>,
    ) -> Result<Vec<ChangesName>, RepoError> {
        let mut names = self.all_changes_after(database, after.map(|name| self.layout().changes(&name))).await?;
        names.retain(|name| !after.is_some_and(|after| after.covers(name)));
        Ok(once(names))
    }

    /// The names behind a key, in the order of the keys; those that are held by merged objects, too.
    fn names_after(&self, database: Oid, after: Option<String>) -> impl Stream<Item = Result<ChangesName, RepoError>> {
        let named = self.objects(self.layout().changes_folder(database), after);
        named.try_filter_map(|object| std::future::ready(Ok(self.changes_name(&object.key))))
    }

    async fn all_changes_after(&self, database: Oid, after: Option<String>) -> Result<Vec<ChangesName>, RepoError> {
        self.names_after(database, after).try_collect().await
    }

    /// The names that begin where a merged object begins, or between there and its end.
    async fn changes_within(&self, merged: ChangesName) -> Result<Vec<ChangesName>, RepoError> {
        let behind = self.layout().before_changes(merged.database, merged.from);
        let is_within = |name: &ChangesName| std::future::ready(Ok(Some(name.from) < merged.merged_to));
        self.names_after(merged.database, Some(behind)).try_take_while(is_within).try_collect().await
    }

    /// The first page of the names behind the key `after`, and whether there are more.
    async fn changes_page(&self, database: Oid, after: String) -> Result<(Vec<ChangesName>, bool), RepoError> {
        let prefix = self.layout().changes_folder(database);
        let page = self.store().list(&ListRequest { prefix, after: Some(after), shallow: false }).await?;
        let names = page.objects.iter().filter_map(|object| self.changes_name(&object.key)).collect();
        Ok((names, page.next.is_some()))
    }

    pub(in crate::repo) fn changes_name(&self, key: &str) -> Option<ChangesName> {
        match self.layout().parse(key, SegmentSize::DEFAULT) {
            Some(Object::Changes(name)) => Some(name),
            _ => None,
        }
    }

    /// The last object of a database's log whose `from` is not behind `bound`. Found with some dozens of listings, however
    /// long the log is.
    ///
    /// # Errors
    /// Of the store.
    pub async fn last_changes(&self, database: Oid, bound: Lsn) -> Result<Option<ChangesName>, RepoError> {
        // What is looked for is `found`, or begins at or behind `low` and before `high`.
        let (mut low, mut high) = (0, bound.bytes().saturating_add(1));
        let mut middle = 0;
        let mut found: Option<ChangesName> = None;
        while low < high {
            let after = self.layout().before_changes(database, Lsn::new(middle));
            let (page, more) = self.changes_page(database, after).await?;
            let within = page.partition_point(|name| name.from <= bound);
            match within.checked_sub(1).and_then(|last| page.get(last)) {
                Some(last) => {
                    found = Some(*last);
                    if within < page.len() || !more {
                        return Ok(found);
                    }
                    low = last.from.bytes();
                }
                // A page that holds nothing of ours says nothing of what comes behind it.
                None if more && page.is_empty() => low = middle,
                None => high = middle,
            }
            middle = low + high.saturating_sub(low) / 2;
            if middle == low {
                break;
            }
        }
        // More objects with one `from` than a page has.
        let Some(mut last) = found else { return Ok(None) };
        loop {
            let (page, more) = self.changes_page(database, self.layout().changes(&last)).await?;
            let within = page.partition_point(|name| name.from <= bound);
            if let Some(later) = within.checked_sub(1).and_then(|last| page.get(last)) {
                last = *later;
            }
            if within < page.len() || !more {
                return Ok(Some(last));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;
    use crate::pg::{PgTime, TimelineId};

    fn header(from: u64, part: u32, to: u64) -> Header {
        Header {
            name: ChangesName { database: Oid(5), from: Lsn::new(from), part, merged_to: None },
            database_name: "shop".into(),
            timeline: TimelineId::FIRST,
            to: Lsn::new(to),
            session: "a".into(),
            made_at: jiff::Timestamp::UNIX_EPOCH,
            within: Within::Nothing,
            open_from: None,
            messages: 1,
            commits: 1,
            first_commit: None,
            last_commit: None,
        }
    }

    #[tokio::test]
    async fn an_object_is_read_back_and_another_in_its_place_is_a_conflict() {
        let repo = repository();
        let mut messages = Vec::new();
        format::append(&mut messages, Sent { at: Lsn::new(1), time: PgTime::from_micros(2), message: b"C" });
        let header = header(100, 0, 200);
        assert_eq!(repo.put_changes(&header, &messages, 1).await.unwrap().0, Created::New);
        assert_eq!(repo.put_changes(&header, &messages, 3).await.unwrap().0, Created::Exists);
        let read = repo.changes(header.name).await.unwrap();
        assert_eq!((&read.header, &*read.messages), (&header, &*messages));
        let other = Header { session: "b".into(), ..header };
        assert!(matches!(repo.put_changes(&other, &messages, 1).await, Err(RepoError::Conflict { .. })));
        assert_eq!(repo.changed_databases().await.unwrap(), [Oid(5)]);
    }

    #[test]
    fn what_a_merged_object_holds_is_named_once_and_nothing_else_is_left_out() {
        let one = |from| header(from, 0, 0).name;
        let parts = |from, part| header(from, part, 0).name;
        let merged = |from, to| ChangesName { merged_to: Some(Lsn::new(to)), ..one(from) };
        let all = vec![one(100), parts(100, 1), one(200), one(300), one(500)];
        assert_eq!(once(all.clone()), all);
        let with = |more: &[ChangesName]| once([all.as_slice(), more].concat());
        assert_eq!(with(&[merged(100, 300)]), [merged(100, 300), one(300), one(500)]);
        assert_eq!(with(&[merged(100, 300), merged(100, 500)]), [merged(100, 500), one(500)], "the longer");
        assert_eq!(with(&[merged(100, 300), merged(200, 500)]), [merged(100, 300), one(300), one(500)], "no overlap");
        assert_eq!(with(&[merged(200, 300)]), [one(100), parts(100, 1), merged(200, 300), one(300), one(500)]);
        assert_eq!(once(vec![merged(100, 300), one(500)]), [merged(100, 300), one(500)], "a hole stays one");
        assert!(merged(100, 300).covers(&parts(100, 1)) && merged(100, 300).covers(&merged(100, 200)));
        assert!(!merged(100, 300).covers(&one(300)) && !merged(100, 300).covers(&merged(200, 500)));
        assert!(!merged(100, 300).covers(&merged(100, 300)) && !one(100).covers(&one(100)));
    }

    #[tokio::test]
    async fn the_last_object_before_a_place_is_found_in_a_log_of_any_length() {
        let repo = repository();
        assert_eq!(repo.last_changes(Oid(5), Lsn::MAX).await.unwrap(), None);
        // More than two pages, unevenly spread, and one place with more parts than a page has.
        let mut names = Vec::new();
        for n in 0..1_500_u64 {
            names.push(header(0x1000 + n * n, 0, 0).name);
        }
        names.extend((0..1_100).map(|part| header(0x1_0000_0000, part, 0).name));
        names.push(header(0x7FFF_FFFF_FFFF_0000, 0, 0).name);
        for name in &names {
            repo.store().create(&repo.layout().changes(name), "x".into()).await.unwrap();
        }
        for bound in [0, 0xFFF, 0x1000, 0x1001, 0x1002, 0x5000, 0x22_0000, 0x1_0000_0000, 0x2_0000_0000, u64::MAX] {
            let bound = Lsn::new(bound);
            let expected = names.iter().copied().filter(|name| name.from <= bound).max();
            assert_eq!(repo.last_changes(Oid(5), bound).await.unwrap(), expected, "{bound}");
        }
        let all = repo.changes_after(Oid(5), None).await.unwrap();
        assert_eq!(all, names);
        assert_eq!(repo.changes_after(Oid(5), Some(names[2_000])).await.unwrap(), names[2_001..]);
    }
}
