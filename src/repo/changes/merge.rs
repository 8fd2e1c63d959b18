//! Merging old objects of a change log, so that a year of it is listed and read in reasonable time.
//!
//! Nothing is lost at any moment, whoever is killed: the merged object is written and read back before anything goes, and what
//! it holds goes a day later, after it was read once more. Until then readers that listed the log earlier find what they saw.
//! What it holds is deleted from its beginning, so that behind any object that is there the others are, too.

use std::collections::{HashMap, HashSet};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use jiff::{SignedDuration, Timestamp};
use tokio_util::sync::CancellationToken;

use super::walk::AHEAD;
use super::{Changes, ChangesName, Header, once};
use crate::backoff::Chain;
use crate::pg::Oid;
use crate::repo::{RepoError, Repository};

/// The most bytes of messages that a merged object has. Larger objects stay alone.
const CONTENT_BYTES_MAX: usize = 16 << 20;

/// When objects are old enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Objects are merged when they have been there for so long.
    pub age_min: SignedDuration,
    /// They are deleted when the merged one has been there for so long.
    pub grace: SignedDuration,
    /// The most objects that are merged into one.
    pub objects_max: usize,
    /// How hard the merged object is compressed.
    pub level: i32,
}

impl Default for Policy {
    fn default() -> Self {
        // A busy server has a thousand objects in a quarter of an hour.
        Self {
            age_min: SignedDuration::from_hours(1),
            grace: SignedDuration::from_hours(24),
            objects_max: 1_024,
            level: 3,
        }
    }
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Done {
    /// Merged objects that were written.
    pub merged: u64,
    /// Objects that they hold.
    pub held: u64,
    /// Objects that were deleted, because a merged one holds them.
    pub deleted: u64,
}

/// Objects that follow each other over one connection.
struct Run {
    headers: Vec<Header>,
    messages: Vec<u8>,
    /// So many of its objects, and bytes, end between two places: a merged object does not end within a transaction that has
    /// several objects.
    whole: (usize, usize),
}

impl Run {
    fn begin(changes: Changes) -> Self {
        let mut run = Self { headers: Vec::new(), messages: Vec::new(), whole: (0, 0) };
        run.add(changes);
        run
    }

    fn add(&mut self, Changes { header, messages }: Changes) {
        self.messages.extend_from_slice(&messages);
        let is_whole = header.next().part == 0;
        self.headers.push(header);
        if is_whole {
            self.whole = (self.headers.len(), self.messages.len());
        }
    }

    /// True if that object continues this run, however long it is already.
    fn goes_on_with(&self, header: &Header) -> bool {
        self.headers.last().is_some_and(|last| {
            last.next().place() == header.name.place()
                && last.session == header.session
                && last.timeline == header.timeline
                && last.database_name == header.database_name
        })
    }

    fn has_room_for(&self, changes: &Changes, objects_max: usize) -> bool {
        self.headers.len() < objects_max && self.messages.len() + changes.messages.len() <= CONTENT_BYTES_MAX
    }

    /// The merged object, and how many it holds; `None` if there is nothing to merge.
    fn finish(mut self) -> Option<(Header, Vec<u8>, usize)> {
        let (objects, bytes) = self.whole;
        self.messages.truncate(bytes);
        let held = self.headers.get(..objects).filter(|held| held.len() > 1)?;
        let (first, last) = (held.first()?, held.last()?);
        let header = Header {
            name: ChangesName { merged_to: Some(last.to), ..first.name },
            to: last.to,
            made_at: last.made_at,
            messages: held.iter().map(|header| header.messages).sum(),
            commits: held.iter().map(|header| header.commits).sum(),
            first_commit: held.iter().filter_map(|header| header.first_commit).min(),
            last_commit: held.iter().filter_map(|header| header.last_commit).max(),
            ..first.clone()
        };
        Some((header, self.messages, objects))
    }
}

impl Repository {
    /// Merges what is old of a database's change log, and deletes what merged objects have held for long enough.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if a merged object is not read back as it was written; of the store. What was done stays, and the
    /// next call goes on.
    pub async fn merge_changes(
        &self,
        database: Oid,
        policy: &Policy,
        now: Timestamp,
        cancel: &CancellationToken,
    ) -> Result<Done, RepoError> {
        let mut done = Done::default();
        let listing: Vec<_> = self.objects(self.layout().changes_folder(database), None).try_collect().await?;
        let mut listed: Vec<_> =
            listing.into_iter().filter_map(|object| Some((self.changes_name(&object.key)?, object.modified))).collect();
        listed.sort_unstable();
        self.merge_old(&listed, policy, now, &mut done, cancel).await?;
        self.delete_held(&listed, policy, now, &mut done, cancel).await?;
        Ok(done)
    }

    async fn merge_old(
        &self,
        listed: &[(ChangesName, Timestamp)],
        policy: &Policy,
        now: Timestamp,
        done: &mut Done,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let chain = once(listed.iter().map(|(name, _)| *name).collect());
        let ages: HashMap<_, _> = listed.iter().copied().collect();
        let is_old = |name: &ChangesName| ages.get(name).is_some_and(|at| now.duration_since(*at) >= policy.age_min);
        // The newest stays what it is: whoever writes the log finds there where it goes on.
        let (_, older) = chain.split_last().unzip();
        let old: Vec<_> = older.unwrap_or_default().iter().copied().take_while(is_old).collect();
        let mut reads = stream::iter(old).map(|name| self.alone(name)).buffered(AHEAD);
        let mut run: Option<Run> = None;
        while let Some(read) = reads.try_next().await? {
            if cancel.is_cancelled() {
                return Ok(());
            }
            run = match (run.take(), read) {
                (Some(mut run), Some(changes))
                    if run.goes_on_with(&changes.header) && run.has_room_for(&changes, policy.objects_max) =>
                {
                    run.add(changes);
                    Some(run)
                }
                (ended, read) => {
                    if let Some(ended) = ended {
                        self.put_merged(ended, policy, done).await?;
                    }
                    read.map(Run::begin)
                }
            };
        }
        // What may still grow waits until it is full, or until a session ends it.
        Ok(())
    }

    /// An object that can be part of a run; `None` if it is merged, or cannot be read, which `verify` tells.
    async fn alone(&self, name: ChangesName) -> Result<Option<Changes>, RepoError> {
        if name.merged_to.is_some() {
            return Ok(None);
        }
        match self.changes(name).await {
            Ok(changes) => Ok(Some(changes)),
            Err(RepoError::Damaged { .. }) => Ok(None),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn put_merged(&self, run: Run, policy: &Policy, done: &mut Done) -> Result<(), RepoError> {
        let Some((header, messages, objects)) = run.finish() else { return Ok(()) };
        self.put_changes(&header, &messages, policy.level).await?;
        let there = self.changes(header.name).await?;
        if there.header != header || there.messages != messages {
            let key = self.layout().changes(&header.name);
            return Err(RepoError::Damaged { key, problem: "does not hold what was merged into it".to_owned() });
        }
        done.merged += 1;
        done.held += objects as u64;
        Ok(())
    }

    /// Deletes what merged objects hold, from their beginning.
    async fn delete_held(
        &self,
        listed: &[(ChangesName, Timestamp)],
        policy: &Policy,
        now: Timestamp,
        done: &mut Done,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let chain: HashSet<_> = once(listed.iter().map(|(name, _)| *name).collect()).into_iter().collect();
        // Only what readers take in place of its parts may stand for them.
        let stands = |(name, at): &&(ChangesName, Timestamp)| {
            name.merged_to.is_some() && chain.contains(name) && now.duration_since(*at) >= policy.grace
        };
        for (merged, _) in listed.iter().filter(stands) {
            let behind = listed.partition_point(|(name, _)| name.place() < merged.place());
            let from_there = listed.iter().skip(behind).map(|(name, _)| *name);
            let within = from_there.take_while(|name| Some(name.from) < merged.merged_to);
            let mut held: Vec<_> = within.filter(|name| merged.covers(name)).collect();
            let Some(first) = held.first() else { continue };
            match self.changes(*merged).await {
                Ok(_) => {}
                // What it holds is there from its beginning, and so to its end: that serves again.
                Err(error @ RepoError::Damaged { .. }) if first.place() == merged.place() => {
                    tracing::error!("a merged object goes, what it should hold is there still: {}", Chain(&error));
                    held = vec![*merged];
                }
                Err(RepoError::Damaged { .. }) => continue, // `verify` tells
                Err(error) => return Err(error),
            }
            for name in held {
                if cancel.is_cancelled() {
                    return Ok(());
                }
                self.store().delete(&self.layout().changes(&name)).await?;
                done.deleted += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::TryStreamExt as _;
    use proptest::prelude::*;

    use super::super::format::{Sent, append};
    use super::super::walk;
    use super::super::{Place, Within};
    use super::*;
    use crate::pg::{Lsn, PgTime, TimelineId};
    use crate::repo::tests::repository;

    const DATABASE: Oid = Oid(5);
    const AT_ONCE: Policy =
        Policy { age_min: SignedDuration::ZERO, grace: SignedDuration::ZERO, objects_max: 7, level: 1 };

    /// What comes next in a log.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        /// An object that goes on from the last one, over the same connection.
        Same,
        /// One within a transaction that does not end in it.
        Part,
        /// One over another connection.
        Session,
        /// One behind a hole.
        Hole,
    }

    /// Writes a log; gives the headers.
    async fn write(repo: &Repository, steps: &[Step]) -> Vec<Header> {
        let mut name = ChangesName { database: DATABASE, from: Lsn::new(100), part: 0, merged_to: None };
        let (mut session, mut headers) = (0, Vec::new());
        for (number, step) in (0_i64..).zip(steps) {
            match step {
                Step::Session => session += 1,
                Step::Hole => name = name.followed_at(Lsn::new(name.from.bytes() + 7)),
                Step::Same | Step::Part => {}
            }
            let to = if matches!(step, Step::Part) { name.from } else { Lsn::new(name.from.bytes() + 100) };
            let mut messages = Vec::new();
            append(&mut messages, Sent { at: to, time: PgTime::from_micros(number), message: &number.to_be_bytes() });
            let header = Header {
                name,
                database_name: "shop".into(),
                timeline: TimelineId::FIRST,
                to,
                session: session.to_string(),
                made_at: Timestamp::from_second(number).unwrap(),
                within: Within::Nothing,
                open_from: (number % 5 == 4).then(|| headers.last().map_or(name, |h: &Header| h.name).place()),
                messages: 1,
                commits: 1,
                first_commit: Some(PgTime::from_micros(number)),
                last_commit: Some(PgTime::from_micros(number + 1)),
            };
            repo.put_changes(&header, &messages, 1).await.unwrap();
            name = header.next();
            headers.push(header);
        }
        headers
    }

    /// What whoever reads from a place is told: sessions and messages, in order, and where something is missing.
    async fn told(repo: &Repository, from: u64) -> Vec<(String, Vec<u8>)> {
        let chain = repo.changes_since(DATABASE, Lsn::new(from)).await.unwrap();
        let mut objects = std::pin::pin!(chain.read(repo));
        let (mut before, mut told) = (None::<Header>, Vec::new());
        while let Some((name, read)) = objects.try_next().await.unwrap() {
            let read = read.unwrap();
            if let Err(broken) = walk::follows(before.as_ref(), name) {
                told.push((format!("hole at {}", broken.after), Vec::new()));
            }
            for sent in super::super::Messages::new(&read.messages) {
                told.push((read.header.session.clone(), sent.unwrap().message.to_vec()));
            }
            before = Some(read.header);
        }
        told
    }

    /// The objects that whoever reads the whole log gets, and whether each was read.
    async fn tell_all(repo: &Repository) -> Vec<(ChangesName, bool)> {
        let chain = walk::Chain::of(repo.changes_after(DATABASE, None).await.unwrap());
        chain.read(repo).map_ok(|(name, read)| (name, read.is_ok())).try_collect().await.unwrap()
    }

    async fn merge(repo: &Repository) -> Done {
        let now = Timestamp::now() + SignedDuration::from_secs(60);
        repo.merge_changes(DATABASE, &AT_ONCE, now, &CancellationToken::new()).await.unwrap()
    }

    #[tokio::test]
    async fn old_objects_become_one_that_says_the_same_and_go_later() {
        let repo = repository();
        let headers = write(&repo, &[Step::Same, Step::Same, Step::Part, Step::Part, Step::Same, Step::Session]).await;
        let last = write_more(&repo, &headers).await;
        let before = told(&repo, 100).await;
        assert_eq!(merge(&repo).await, Done { merged: 1, held: 5, deleted: 0 });
        let names = repo.changes_after(DATABASE, None).await.unwrap();
        let merged = ChangesName { merged_to: Some(Lsn::new(400)), ..headers[0].name };
        assert_eq!(names, [merged, headers[5].name, last.name]);
        let header = repo.changes(merged).await.unwrap().header;
        assert_eq!((header.messages, header.commits, header.to), (5, 5, Lsn::new(400)));
        assert_eq!((header.first_commit, header.last_commit), (headers[0].first_commit, headers[4].last_commit));
        assert_eq!(header.made_at, headers[4].made_at, "whoever looks for what was made later passes it over");
        assert_eq!(told(&repo, 100).await, before);
        assert_eq!(merge(&repo).await, Done { merged: 0, held: 0, deleted: 5 });
        assert_eq!(merge(&repo).await, Done::default());
        assert_eq!((told(&repo, 100).await, told(&repo, 350).await), (before.clone(), before.clone()));
        assert_eq!(told(&repo, 450).await, before[5..]);
        assert_eq!(told(&repo, 550).await, before, "the object comes, too, that holds the beginning of what is open");
        let found = repo.last_changes(DATABASE, Lsn::new(399)).await.unwrap();
        assert_eq!(found, Some(merged));
    }

    /// One more over the same connection as the last, which has a transaction open since the last.
    async fn write_more(repo: &Repository, headers: &[Header]) -> Header {
        let before = headers.last().unwrap();
        let to = Lsn::new(before.to.bytes() + 100);
        let open = Some(headers[4].name.place());
        let header = Header { name: before.next(), to, open_from: open, ..before.clone() };
        let mut messages = Vec::new();
        append(&mut messages, Sent { at: to, time: PgTime::from_micros(9), message: b"last" });
        repo.put_changes(&header, &messages, 1).await.unwrap();
        header
    }

    #[tokio::test]
    async fn what_is_young_waits_and_a_damaged_merged_object_goes_before_its_parts() {
        let repo = repository();
        let headers = write(&repo, &[Step::Same, Step::Same, Step::Same, Step::Session, Step::Same]).await;
        let young = Policy { age_min: SignedDuration::from_hours(1), ..AT_ONCE };
        let none = repo.merge_changes(DATABASE, &young, Timestamp::now(), &CancellationToken::new()).await.unwrap();
        assert_eq!(none, Done::default());
        let before = told(&repo, 100).await;
        assert_eq!(merge(&repo).await.held, 3);
        let patient = Policy { grace: SignedDuration::from_hours(24), ..AT_ONCE };
        let now = Timestamp::now() + SignedDuration::from_hours(23);
        let done = repo.merge_changes(DATABASE, &patient, now, &CancellationToken::new()).await.unwrap();
        assert_eq!(done.deleted, 0, "readers may have listed what it holds");
        let merged = repo.changes_after(DATABASE, None).await.unwrap()[0];
        let key = repo.layout().changes(&merged);
        repo.store().delete(&key).await.unwrap();
        repo.store().create(&key, "broken".into()).await.unwrap();
        assert_eq!(told(&repo, 100).await, before, "readers take what it holds");
        assert_eq!(told(&repo, 250).await, before[1..]);
        for lost in &headers[..3] {
            let key = repo.layout().changes(&lost.name);
            let content = repo.store().read(&key, None).await.unwrap();
            repo.store().delete(&key).await.unwrap();
            let chain = repo.changes_since(DATABASE, Lsn::new(500)).await.unwrap();
            assert!(chain.names().iter().all(|name| *name != merged), "it is not needed");
            let read = tell_all(&repo).await;
            assert_eq!(read.iter().filter(|(_, is_read)| !is_read).count(), 1, "{lost:?}: some is not all: {read:?}");
            repo.store().create(&key, content).await.unwrap();
        }
        assert_eq!(merge(&repo).await.deleted, 1);
        assert_eq!(told(&repo, 100).await, before);
        merge(&repo).await;
        assert_eq!(merge(&repo).await.deleted, 3);
        assert_eq!(told(&repo, 100).await, before);
        let place = Place { from: Lsn::new(150), part: 0 };
        assert!(repo.changes(merged.at(place)).await.is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn whoever_reads_is_told_the_same_however_much_was_merged(
            steps in proptest::collection::vec(
                prop_oneof![6 => Just(Step::Same), 2 => Just(Step::Part), 1 => Just(Step::Session), 1 => Just(Step::Hole)],
                1..40,
            ),
            deleted in 0_usize..40,
            from in 0_u64..4_000,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                let repo = repository();
                let headers = write(&repo, &steps).await;
                let place = Lsn::new(from);
                // From a place on everything is told; before the object that holds it, other things may be.
                let before = told(&repo, from).await;
                merge(&repo).await;
                let is_end = |told: &[(String, Vec<u8>)]| told.ends_with(&before);
                assert!(is_end(&told(&repo, from).await), "{steps:?} from {place}");
                // A pass that was killed has deleted some, from the beginning of each.
                let merged = repo.changes_after(DATABASE, None).await.unwrap();
                let held = headers.iter().filter(|h| merged.iter().any(|m| m.covers(&h.name)));
                for header in held.take(deleted) {
                    repo.store().delete(&repo.layout().changes(&header.name)).await.unwrap();
                }
                assert!(is_end(&told(&repo, from).await), "{steps:?} from {place}");
                merge(&repo).await;
                merge(&repo).await;
                assert!(is_end(&told(&repo, from).await), "{steps:?} from {place}");
            });
        }
    }
}
