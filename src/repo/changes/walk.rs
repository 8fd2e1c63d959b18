//! Where to begin to read a change log, and what happened in a stretch of time.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{Changes, ChangesName, Header, Messages, Within, once};
use crate::backoff;
use crate::decode::pgoutput::{Message, RelationInfo};
use crate::detect::LogicalObserver;
use crate::pg::{Lsn, Oid, PgTime};
use crate::progress::Progress;
use crate::repo::catalog::LsnRange;
use crate::repo::index::chronicle::Chronicle;
use crate::repo::index::walk::{Coverage, Unread};
use crate::repo::{RepoError, Repository};

/// Objects fetched ahead of the one that is read: they hide a store's latency, and each has a few MiB.
pub(super) const AHEAD: usize = 8;

/// Commits come a little out of the order of their times, and the clocks of agent and server differ.
const LATE_MICROS: i64 = 600_000_000;

/// Long work is told from so many objects on.
const TOLD_FROM: usize = 64;

/// Follows the order of the log's messages: where a session begins, and which messages belong to something whose beginning
/// was not read.
#[derive(Debug, Default)]
pub struct Order {
    session: Option<String>,
    skipping: Within,
}

impl Order {
    /// The next object begins. True if whatever is open must be forgotten, because it comes over another connection.
    pub fn begin(&mut self, header: &Header) -> bool {
        if self.session.as_ref() == Some(&header.session) {
            return false;
        }
        self.session = Some(header.session.clone());
        self.skipping = header.within;
        true
    }

    /// The next message: true if it is to be read.
    pub fn takes(&mut self, message: &[u8]) -> bool {
        if self.skipping == Within::Nothing {
            return true;
        }
        if matches!(message.first(), Some(b'C' | b'E' | b'P')) {
            self.skipping = Within::Nothing;
        }
        false
    }

    /// What of a message is to be read all the same that is passed over: the description of a table, which holds for what
    /// follows, too.
    pub fn description<'a>(&self, message: &'a [u8]) -> Option<RelationInfo<'a>> {
        if message.first() != Some(&b'R') {
            return None;
        }
        match Message::read(message, self.skipping == Within::Stream) {
            Ok(Message::Relation { relation, .. }) => Some(relation),
            _ => None,
        }
    }
}

/// The objects of a log, in order, each checked to follow the one before.
#[derive(Debug)]
pub struct Chain {
    names: Vec<ChangesName>,
}

/// A place where the chain is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Broken {
    /// Where the object before it ends.
    pub after: Lsn,
    /// What should follow.
    pub expected: ChangesName,
    /// What does.
    pub found: ChangesName,
}

impl Chain {
    /// The objects of these names, in this order.
    pub(super) fn of(names: Vec<ChangesName>) -> Self {
        Self { names }
    }

    /// Their names.
    pub fn names(&self) -> &[ChangesName] {
        &self.names
    }

    /// Reads them. In place of a merged object that cannot be read come those that it holds, as long as they are there.
    pub fn read<'a>(&'a self, repo: &'a Repository) -> impl stream::Stream<Item = Result<Read, RepoError>> + 'a {
        let objects = stream::iter(self.names.iter().copied()).map(|name| repo.read_changes(name)).buffered(AHEAD);
        objects.map_ok(|objects| stream::iter(objects.into_iter().map(Ok))).try_flatten()
    }
}

/// An object of the log, or why it cannot be read: it is damaged, or not there.
pub type Read = (ChangesName, Result<Changes, RepoError>);

/// What is damaged or missing is for whoever reads to tell; other errors are the store's, and end the reading.
fn readable(read: Result<Changes, RepoError>) -> Result<Result<Changes, RepoError>, RepoError> {
    match read {
        Err(error) if !error.is_not_found() && !matches!(error, RepoError::Damaged { .. }) => Err(error),
        read => Ok(read),
    }
}

/// Whether an object follows the one before it.
pub fn follows(before: Option<&Header>, name: ChangesName) -> Result<(), Broken> {
    match before {
        // A merged object begins where the first did that it holds.
        Some(before) if before.next().place() != name.place() => {
            Err(Broken { after: before.to, expected: before.next(), found: name })
        }
        _ => Ok(()),
    }
}

/// Reads a database's log object by object, and goes on as more is kept.
#[derive(Debug)]
pub struct Follower {
    repo: Repository,
    database: Oid,
    order: Order,
    observer: LogicalObserver,
    /// The object before, as far as it could be read.
    before: Option<Header>,
    /// The last object that was looked at.
    last: Option<ChangesName>,
    coverage: Coverage,
}

/// An object that was read.
struct Taken {
    header: Header,
    /// Of its messages.
    bytes: u64,
}

impl Follower {
    fn new(repo: Repository, database: Oid) -> Self {
        let observer = LogicalObserver::new(database, "");
        let (order, coverage) = (Order::default(), Coverage::default());
        Self { repo, database, order, observer, before: None, last: None, coverage }
    }

    /// Tells `chronicle` of what was kept since the last time. Gives what could not be read of it.
    ///
    /// # Errors
    /// Of the store; the next round may work.
    pub async fn go_on(&mut self, chronicle: &mut Chronicle) -> Result<Vec<Unread>, RepoError> {
        let repo = self.repo.clone();
        let chain = Chain::of(repo.changes_after(self.database, self.last).await?);
        let mut objects = std::pin::pin!(chain.read(&repo));
        while let Some((name, read)) = objects.try_next().await? {
            self.take(name, read, chronicle);
        }
        Ok(std::mem::take(&mut self.coverage).unread)
    }

    /// Takes the next object; `None` if it cannot be read.
    fn take(
        &mut self,
        name: ChangesName,
        read: Result<Changes, RepoError>,
        chronicle: &mut Chronicle,
    ) -> Option<Taken> {
        self.last = Some(name);
        let unread = |problem: String| Unread { range: LsnRange { from: name.from, to: name.from }, problem };
        let Changes { header, messages } = match read {
            Ok(changes) => changes,
            Err(error) => {
                self.coverage.unread.push(unread(error.to_string()));
                self.before = None;
                self.order = Order::default();
                return None;
            }
        };
        if let Err(Broken { after, .. }) = follows(self.before.as_ref(), name) {
            let range = LsnRange { from: after, to: name.from.max(after) };
            self.coverage.unread.push(Unread { range, problem: "changes are missing".to_owned() });
        }
        if self.order.begin(&header) {
            self.observer = LogicalObserver::new(self.database, &header.database_name);
        }
        self.coverage.read_from = self.coverage.read_from.or(Some(name.from));
        self.coverage.decoded += 1;
        for sent in Messages::new(&messages).flatten() {
            if !self.order.takes(sent.message) {
                if let Some(relation) = self.order.description(sent.message) {
                    self.observer.describe(&relation);
                }
                continue;
            }
            match self.observer.see(sent.at, sent.time, sent.message) {
                Ok(Some(transaction)) => chronicle.add_transaction(&transaction),
                Ok(None) => {}
                Err(error) => {
                    self.coverage.unread.push(unread(error.to_string()));
                    self.order = Order::default();
                    break;
                }
            }
        }
        self.coverage.read_to = Some(header.to);
        self.before = Some(header.clone());
        Some(Taken { header, bytes: messages.len() as u64 })
    }
}

/// Takes out what comes before the object that holds `begin`. If there is none, `begin` itself comes first, so that whoever
/// reads is told that it is missing.
fn begin_at(names: &mut Vec<ChangesName>, begin: ChangesName) {
    let not_behind = names.partition_point(|name| name.place() <= begin.place());
    match not_behind.checked_sub(1) {
        Some(before) => _ = names.drain(..before),
        None => names.insert(0, begin),
    }
}

impl Repository {
    /// An object, or in its place those that it holds.
    async fn read_changes(&self, name: ChangesName) -> Result<Vec<Read>, RepoError> {
        let error = match readable(self.changes(name).await)? {
            Ok(changes) => return Ok(vec![(name, Ok(changes))]),
            Err(error) => error,
        };
        let Some(held) = self.held(name).await? else { return Ok(vec![(name, Err(error))]) };
        tracing::warn!("what a merged object holds is read in its place: {}", backoff::Chain(&error));
        Ok(held.into_iter().map(|changes| (changes.header.name, Ok(changes))).collect())
    }

    /// What a merged object holds, from the objects that were merged into it; `None` if they do not give all of it any more.
    async fn held(&self, merged: ChangesName) -> Result<Option<Vec<Changes>>, RepoError> {
        if merged.merged_to.is_none() {
            return Ok(None);
        }
        let mut names = self.changes_within(merged).await?;
        names.retain(|name| merged.covers(name));
        let mut objects = stream::iter(once(names)).map(|name| self.changes(name)).buffered(AHEAD);
        let (mut held, mut next) = (Vec::<Changes>::new(), merged.place());
        while let Some(read) = objects.next().await {
            let Ok(changes) = readable(read)? else { return Ok(None) };
            if changes.header.name.place() != next {
                return Ok(None);
            }
            next = changes.header.next().place();
            held.push(changes);
        }
        let is_all = held.last().is_some_and(|last| Some(last.header.to) == merged.merged_to);
        Ok(is_all.then_some(held))
    }

    /// The objects that hold all transactions of a database which commit at or behind `from`, from their first message on.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if the first cannot be read; of the store.
    pub async fn changes_since(&self, database: Oid, from: Lsn) -> Result<Chain, RepoError> {
        let Some(last) = self.last_changes(database, from).await? else {
            return Ok(Chain::of(self.changes_after(database, None).await?));
        };
        let first = self.changes(last).await?.header.open_from.unwrap_or(last.place());
        // It may be held by an object that begins earlier, and it may have earlier parts.
        let begin = match first.from < last.from {
            true => self.last_changes(database, first.from).await?.map_or(first.from, |begin| begin.from),
            false => last.from,
        };
        let key = self.layout().before_changes(database, begin);
        let mut names = once(self.all_changes_after(database, Some(key)).await?);
        begin_at(&mut names, last.at(first));
        Ok(Chain::of(names))
    }

    /// Up to when things are known of a database: the time of its last commit, or up to when the agent proved that nothing
    /// else was committed.
    ///
    /// # Errors
    /// Of the store.
    pub async fn changes_known_to(&self, database: Oid) -> Result<Option<PgTime>, RepoError> {
        let caught_up = self.lease().await?.and_then(|lease| lease.caught_up).map(|caught_up| caught_up.time);
        let names = self.changes_after(database, None).await?;
        for name in names.iter().rev().take(AHEAD * AHEAD) {
            let last = self.changes(*name).await?.header.last_commit;
            if last.is_some() {
                return Ok(last.max(caught_up));
            }
        }
        Ok(caught_up)
    }

    /// Tells `chronicle` what happened in its buckets to a database. Gives what was read, and whoever goes on behind it.
    ///
    /// # Errors
    /// Of the store. What is missing or damaged is told in the coverage.
    pub async fn tell_changes(
        &self,
        database: Oid,
        chronicle: &mut Chronicle,
        progress: &dyn Progress,
    ) -> Result<(Coverage, Follower), RepoError> {
        let (from, to) = (chronicle.buckets().from(), chronicle.buckets().to());
        let names = self.changes_after(database, None).await?;
        let first =
            self.first_made_since(&names, PgTime::from_micros(from.micros().saturating_sub(LATE_MICROS))).await?;
        let mut follower = Follower::new(self.clone(), database);
        let Some(begin) = names.get(first).or(names.last()) else { return Ok((Coverage::default(), follower)) };
        let begin = match self.changes(*begin).await {
            Ok(changes) => changes.header.open_from.map_or(*begin, |open| begin.at(open)),
            Err(_) => *begin, // told below
        };
        let mut names = names;
        begin_at(&mut names, begin);
        let chain = Chain::of(names);
        let long = chain.names.len() >= TOLD_FROM;
        if long {
            progress.begin("read changes", None);
        }
        let mut objects = std::pin::pin!(chain.read(self));
        while let Some((name, read)) = objects.try_next().await? {
            let is_first = follower.last.is_none();
            let Some(Taken { header, bytes }) = follower.take(name, read, chronicle) else { continue };
            if is_first && header.first_commit.is_some_and(|commit| commit > from) && first == 0 {
                follower.coverage.begins = header.first_commit;
            }
            if long {
                progress.advance(bytes);
            }
            let is_over =
                header.first_commit.is_some_and(|first| first.micros() > to.micros().saturating_add(LATE_MICROS));
            if is_over {
                break;
            }
        }
        if long {
            progress.end();
        }
        Ok((std::mem::take(&mut follower.coverage), follower))
    }

    /// Whoever reads a database's log from its first object on.
    pub fn follow_changes(&self, database: Oid) -> Follower {
        Follower::new(self.clone(), database)
    }

    /// The first of the objects that was made at or behind a time.
    async fn first_made_since(&self, names: &[ChangesName], time: PgTime) -> Result<usize, RepoError> {
        let (mut low, mut high) = (0, names.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let made = match names.get(middle) {
                Some(name) => match self.changes(*name).await {
                    Ok(changes) => PgTime::from(changes.header.made_at),
                    Err(RepoError::Damaged { .. }) => time, // it is told when it is read
                    Err(error) => return Err(error),
                },
                None => time,
            };
            if made < time {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        Ok(low)
    }
}

#[cfg(test)]
mod tests {
    use super::super::format::{Place, Sent, append};
    use super::*;
    use crate::pg::TimelineId;

    fn header(from: u64, to: u64, session: &str, within: Within) -> Header {
        Header {
            name: ChangesName { database: Oid(5), from: Lsn::new(from), part: 0, merged_to: None },
            database_name: "shop".into(),
            timeline: TimelineId::FIRST,
            to: Lsn::new(to),
            session: session.into(),
            made_at: jiff::Timestamp::UNIX_EPOCH,
            within,
            open_from: None,
            messages: 0,
            commits: 0,
            first_commit: None,
            last_commit: None,
        }
    }

    #[test]
    fn what_began_before_the_first_object_is_passed_over_and_a_new_session_forgets() {
        let mut order = Order::default();
        assert!(order.begin(&header(100, 200, "a", Within::Transaction)));
        let taken: Vec<bool> = [b"I", b"C", b"B", b"I"].iter().map(|message| order.takes(*message)).collect();
        assert_eq!(taken, [false, false, true, true]);
        assert!(!order.begin(&header(200, 300, "a", Within::Transaction)));
        assert!(order.takes(b"C"));
        assert!(order.begin(&header(300, 400, "b", Within::Nothing)));
        assert!(order.takes(b"B"));
        // Within a stream messages say whose they are; what a table looks like holds for what follows.
        assert!(order.begin(&header(400, 500, "c", Within::Stream)));
        let relation = [&b"R\0\0\x02\xBC"[..], &16_400_u32.to_be_bytes(), b"public\0orders\0d", &[0, 0]].concat();
        assert!(!order.takes(&relation));
        assert_eq!(order.description(&relation).map(|relation| relation.name), Some(&b"orders"[..]));
        assert!(!order.takes(b"E") && order.takes(b"B"));
    }

    #[tokio::test]
    async fn reading_begins_where_the_oldest_open_transaction_does() {
        let repo = crate::repo::tests::repository();
        let mut messages = Vec::new();
        append(&mut messages, Sent { at: Lsn::new(1), time: PgTime::from_micros(0), message: b"E" });
        let open = Place { from: Lsn::new(200), part: 0 };
        let headers = [
            header(100, 200, "a", Within::Nothing),
            header(200, 300, "a", Within::Nothing),
            header(300, 400, "a", Within::Nothing),
            Header { open_from: Some(open), ..header(400, 500, "a", Within::Nothing) },
            header(500, 600, "a", Within::Nothing),
        ];
        for header in &headers {
            repo.put_changes(header, &messages, 1).await.unwrap();
        }
        let places = |chain: Chain| chain.names().iter().map(|name| name.from.bytes()).collect::<Vec<_>>();
        assert_eq!(places(repo.changes_since(Oid(5), Lsn::new(450)).await.unwrap()), [200, 300, 400, 500]);
        assert_eq!(places(repo.changes_since(Oid(5), Lsn::new(399)).await.unwrap()), [300, 400, 500]);
        assert_eq!(places(repo.changes_since(Oid(5), Lsn::new(50)).await.unwrap()).len(), 5);
        assert_eq!(follows(Some(&headers[0]), headers[1].name), Ok(()));
        assert_eq!(follows(Some(&headers[0]), headers[2].name).unwrap_err().after, Lsn::new(200));
    }
}
