//! Messages in, objects of the change log out, one behind the other.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Course, Logical};
use crate::backoff::{Chain, RetryPolicy};
use crate::decode::pgoutput::{Message, Preparation};
use crate::pg::{Lsn, PgTime, TimelineId};
use crate::repo::changes::{ChangesName, Header, Place, Sent, Within, format};
use crate::repo::{RepoError, Repository};
use crate::serve::status::{Board, Trouble};

/// An object is put when it holds so much: large enough for a store, and little to hold in memory.
const BATCH_BYTES: usize = 4 << 20;

/// While an object is on its way the next one grows to this, and then nothing more is read.
const BATCH_BYTES_MAX: usize = 16 << 20;

/// Descriptions of tables that are kept; of more an object says only what the server said within it.
const DESCRIPTIONS_BYTES_MAX: usize = 32 << 20;

/// Messages that wait for their object, and what they hold.
#[derive(Debug)]
pub(super) struct Batch {
    /// What the object will be called.
    name: ChangesName,
    messages: Vec<u8>,
    count: u64,
    commits: u64,
    first_commit: Option<PgTime>,
    last_commit: Option<PgTime>,
    to: Lsn,
    /// As the object begins.
    within: Within,
    open_from: Option<Place>,
    /// Tables that the object describes.
    described: HashSet<u32>,
    session: Session,
}

/// What is known of the messages of this connection so far.
#[derive(Debug, Default)]
struct Session {
    place: At,
    /// Transactions of which a part was sent, with the object in which that began.
    open: HashMap<u32, Place>,
    /// Tables as they were described last: without tag and transaction.
    descriptions: HashMap<u32, Box<[u8]>>,
    descriptions_bytes: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Nothing,
    Transaction(u32),
    Stream(u32),
}

impl At {
    const fn within(self) -> Within {
        match self {
            Self::Nothing => Within::Nothing,
            Self::Transaction(_) => Within::Transaction,
            Self::Stream(_) => Within::Stream,
        }
    }
}

/// What becomes an object.
#[derive(Debug)]
pub(super) struct Filled {
    name: ChangesName,
    messages: Vec<u8>,
    count: u64,
    commits: u64,
    first_commit: Option<PgTime>,
    last_commit: Option<PgTime>,
    to: Lsn,
    within: Within,
    open_from: Option<Place>,
}

impl Session {
    fn open_from(&self) -> Option<Place> {
        self.open.values().min().copied()
    }

    fn describe(&mut self, oid: u32, description: &[u8]) {
        let before = self.descriptions.get(&oid).map_or(0, |before| before.len());
        let bytes = self.descriptions_bytes - before + description.len();
        if bytes <= DESCRIPTIONS_BYTES_MAX {
            self.descriptions_bytes = bytes;
            self.descriptions.insert(oid, description.into());
        } else {
            // Better none than an old one.
            self.descriptions_bytes -= before;
            self.descriptions.remove(&oid);
        }
    }
}

impl Batch {
    /// Begins with the first message of a connection; everything committed before `from` is in the log, which goes on with
    /// `name`.
    pub(super) fn new(name: ChangesName, from: Lsn) -> Self {
        Self::go_on(name, from, Session::default())
    }

    fn go_on(name: ChangesName, to: Lsn, session: Session) -> Self {
        Self {
            name,
            messages: Vec::new(),
            count: 0,
            commits: 0,
            first_commit: None,
            last_commit: None,
            to,
            within: session.place.within(),
            open_from: session.open_from(),
            described: HashSet::new(),
            session,
        }
    }

    /// Takes a message.
    ///
    /// # Errors
    /// If one that begins or ends a transaction, or describes a table, cannot be read: without it nobody knows what is safe.
    pub(super) fn add(&mut self, at: Lsn, time: PgTime, message: &[u8]) -> Result<(), String> {
        let Some(tag) = message.first() else { return Err("an empty message".to_owned()) };
        let in_stream = matches!(self.session.place, At::Stream(_));
        let read = || Message::read(message, in_stream).map_err(|fault| fault.to_string());
        match tag {
            b'I' | b'U' | b'D' | b'T' => {
                for oid in tables_of(message, in_stream) {
                    self.say_again(oid, at, time);
                }
            }
            b'B' | b'S' | b'b' => match read()? {
                Message::Begin { xid, .. } | Message::BeginPrepare(Preparation { xid, .. }) => {
                    self.session.place = At::Transaction(xid.get());
                    self.session.open.insert(xid.get(), self.name.place());
                }
                Message::StreamStart { xid, .. } => {
                    self.session.place = At::Stream(xid.get());
                    self.session.open.entry(xid.get()).or_insert(self.name.place());
                }
                _ => {}
            },
            b'R' => {
                if let Message::Relation { relation, .. } = read()? {
                    let oid = relation.oid.0;
                    self.session.describe(oid, message.get(if in_stream { 5 } else { 1 }..).unwrap_or_default());
                    self.described.insert(oid);
                }
            }
            b'E' => self.session.place = At::Nothing,
            b'P' | b'p' | b'A' => match read()? {
                Message::StreamAbort { xid, subxid, .. } if xid == subxid => self.ended(xid.get()),
                Message::Prepare(Preparation { xid, .. }) | Message::StreamPrepare(Preparation { xid, .. }) => {
                    self.ended(xid.get());
                }
                _ => {}
            },
            b'C' | b'c' | b'K' | b'r' => self.end(read()?),
            _ => {}
        }
        self.push(Sent { at, time, message });
        Ok(())
    }

    fn push(&mut self, sent: Sent<'_>) {
        format::append(&mut self.messages, sent);
        self.count += 1;
    }

    /// The object says what a table looks like before its first change of it.
    fn say_again(&mut self, oid: u32, at: Lsn, time: PgTime) {
        if !self.described.insert(oid) {
            return;
        }
        let Some(description) = self.session.descriptions.get(&oid) else { return };
        let mut message = vec![b'R'];
        if let At::Stream(xid) = self.session.place {
            message.extend(xid.to_be_bytes());
        }
        message.extend_from_slice(description);
        self.push(Sent { at, time, message: &message });
    }

    fn ended(&mut self, xid: u32) {
        self.session.open.remove(&xid);
        if self.session.place == At::Transaction(xid) {
            self.session.place = At::Nothing;
        }
    }

    fn end(&mut self, message: Message<'_>) {
        match message {
            Message::Commit { end, time, .. } => {
                if let At::Transaction(xid) = self.session.place {
                    self.ended(xid);
                }
                self.committed(end, time);
            }
            Message::StreamCommit { xid, end, time, .. } => {
                self.ended(xid.get());
                self.committed(end, time);
            }
            Message::CommitPrepared { end, time, .. } => self.committed(end, time),
            Message::RollbackPrepared { end, .. } => self.to = self.to.max(end),
            _ => {}
        }
    }

    fn committed(&mut self, end: Lsn, time: PgTime) {
        self.commits += 1;
        self.first_commit = Some(self.first_commit.map_or(time, |first| first.min(time)));
        self.last_commit = self.last_commit.max(Some(time));
        self.to = self.to.max(end);
    }

    /// The server has sent every commit before this place.
    pub(super) fn reached(&mut self, server_end: Lsn) {
        if self.session.place == At::Nothing {
            self.to = self.to.max(server_end);
        }
    }

    /// Everything committed before this is in the log or here.
    pub(super) const fn to(&self) -> Lsn {
        self.to
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) const fn is_full(&self) -> bool {
        self.messages.len() >= BATCH_BYTES
    }

    pub(super) const fn is_overfull(&self) -> bool {
        self.messages.len() >= BATCH_BYTES_MAX
    }

    /// What there is, to become an object. What comes next goes into the one behind it.
    pub(super) fn take(&mut self) -> Filled {
        let next = self.name.followed_at(self.to);
        let rest = Self::go_on(next, self.to, std::mem::take(&mut self.session));
        let Self { name, messages, count, commits, first_commit, last_commit, to, within, open_from, .. } =
            std::mem::replace(self, rest);
        Filled { name, messages, count, commits, first_commit, last_commit, to, within, open_from }
    }
}

/// The tables that a change of rows, or a truncate, is about. What cannot be read is about none.
fn tables_of(message: &[u8], in_stream: bool) -> Vec<u32> {
    let Some((tag, rest)) = message.split_first() else { return Vec::new() };
    let Some(rest) = (if in_stream { rest.get(4..) } else { Some(rest) }) else { return Vec::new() };
    let oids = match tag {
        b'T' => rest.get(5..).unwrap_or_default(),
        _ => rest.get(..4).unwrap_or_default(),
    };
    oids.as_chunks::<4>().0.iter().map(|oid| u32::from_be_bytes(*oid)).collect()
}

/// An object on its way.
#[derive(Debug)]
struct Running {
    /// Gives its stored size.
    task: JoinHandle<Result<u64, RepoError>>,
    header: Header,
    /// Of its messages.
    bytes: u64,
}

/// Puts objects, one after the other.
#[derive(Debug)]
pub(super) struct Puts {
    repo: Repository,
    board: Board,
    level: i32,
    database_name: String,
    session: String,
    timeline: TimelineId,
    durable: Lsn,
    last_at: Instant,
    /// The object on its way, and where the log ends with it.
    running: Option<Running>,
}

impl Puts {
    /// Everything committed before the end of `course` is in the repository.
    pub(super) fn new(logical: &Logical, course: &Course) -> Self {
        Self {
            // Failures are told in the status, so the trying again happens here and not below.
            repo: logical.repo.clone().with_retry(RetryPolicy::ONCE, CancellationToken::new()),
            board: logical.board.clone(),
            level: logical.level,
            database_name: logical.origin.database_name.clone(),
            session: format!("{}-{:016x}", Timestamp::now().strftime("%Y%m%dT%H%M%SZ"), fastrand::u64(..)),
            timeline: course.timeline,
            durable: course.end,
            last_at: Instant::now(),
            running: None,
        }
    }

    pub(super) const fn is_idle(&self) -> bool {
        self.running.is_none()
    }

    /// When an object was made last.
    pub(super) const fn last_at(&self) -> Instant {
        self.last_at
    }

    /// Everything committed before this is in the repository.
    pub(super) const fn durable(&self) -> Lsn {
        self.durable
    }

    /// Sends an object on its way. None is.
    pub(super) fn begin(&mut self, filled: Filled) {
        assert!(self.running.is_none(), "two objects of one log on their way");
        let Filled { name, messages, count, commits, first_commit, last_commit, to, within, open_from } = filled;
        let header = Header {
            name,
            database_name: self.database_name.clone(),
            timeline: self.timeline,
            to,
            session: self.session.clone(),
            made_at: Timestamp::now(),
            within,
            open_from,
            messages: count,
            commits,
            first_commit,
            last_commit,
        };
        let bytes = messages.len() as u64;
        let put = put(self.repo.clone(), self.board.clone(), header.clone(), messages.into(), self.level);
        self.running = Some(Running { task: tokio::spawn(put), header, bytes });
    }

    /// Waits for the object on its way, for ever if there is none; gives what is durable then.
    ///
    /// # Errors
    /// What does not pass by itself.
    pub(super) async fn done(&mut self) -> Result<Lsn, RepoError> {
        let Some(Running { task, .. }) = &mut self.running else { return std::future::pending().await };
        let stored = task.await.expect("putting an object does not panic")?;
        if let Some(Running { header, bytes, .. }) = self.running.take() {
            self.durable = header.to;
            self.board.update(|s| {
                s.store.objects_total += 1;
                s.store.content_bytes_total += bytes;
                s.store.stored_bytes_total += stored;
                s.store.trouble = None;
                s.store.uploads = 0;
            });
        }
        self.last_at = Instant::now();
        Ok(self.durable)
    }
}

impl Drop for Puts {
    fn drop(&mut self) {
        // It may go on for ever. What it makes all the same the next session finds.
        if let Some(Running { task, .. }) = &self.running {
            task.abort();
        }
    }
}

/// Puts an object, however long the store is away; gives its stored size.
async fn put(
    repo: Repository,
    board: Board,
    header: Header,
    messages: Arc<[u8]>,
    level: i32,
) -> Result<u64, RepoError> {
    board.update(|s| s.store.uploads = 1);
    let mut failures = 0;
    loop {
        match repo.put_changes(&header, &messages, level).await {
            Ok((_, stored)) => return Ok(stored),
            Err(error) if error.is_transient() => {
                failures += 1;
                let (text, hint) = (Chain(&error).to_string(), error.hint());
                if failures == 1 {
                    tracing::warn!(hint, "failed to put changes, will try again: {text}");
                }
                board.update(|s| {
                    s.store.failures_total += 1;
                    s.store.trouble = Some(Trouble::again(s.store.trouble.as_ref(), Timestamp::now(), text, hint));
                });
                tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
            }
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Oid;
    use crate::repo::changes::Messages;

    fn commit(end: u64, time: i64) -> Vec<u8> {
        [&b"C\0"[..], &(end - 8).to_be_bytes(), &end.to_be_bytes(), &time.to_be_bytes()].concat()
    }

    fn begin(commit: u64) -> Vec<u8> {
        [&b"B"[..], &commit.to_be_bytes(), &5_i64.to_be_bytes(), &700_u32.to_be_bytes()].concat()
    }

    fn add(batch: &mut Batch, message: &[u8]) {
        batch.add(Lsn::new(1), PgTime::from_micros(0), message).unwrap();
    }

    fn batch() -> Batch {
        Batch::new(ChangesName { database: Oid(5), from: Lsn::new(100), part: 0, merged_to: None }, Lsn::new(100))
    }

    fn relation(in_stream: bool) -> Vec<u8> {
        let xid: &[u8] = if in_stream { &[0, 0, 2, 0xBC] } else { &[] };
        [&b"R"[..], xid, &16_400_u32.to_be_bytes(), b"public\0orders\0d", &0_u16.to_be_bytes()].concat()
    }

    fn insert(in_stream: bool) -> Vec<u8> {
        let xid: &[u8] = if in_stream { &[0, 0, 2, 0xBC] } else { &[] };
        [&b"I"[..], xid, &16_400_u32.to_be_bytes(), b"N\0\0"].concat()
    }

    fn stream_start() -> Vec<u8> {
        [&b"S"[..], &700_u32.to_be_bytes(), b"\x01"].concat()
    }

    fn tags(filled: &Filled) -> String {
        let sent = Messages::new(&filled.messages).map(|sent| char::from(sent.unwrap().message[0]));
        sent.collect()
    }

    #[test]
    fn only_whole_commits_move_the_end_and_a_keepalive_only_between_them() {
        let mut batch = batch();
        add(&mut batch, &begin(192));
        batch.reached(Lsn::new(500));
        assert_eq!(batch.to(), Lsn::new(100), "the transaction is half sent");
        add(&mut batch, &commit(200, 7));
        assert_eq!(batch.to(), Lsn::new(200));
        batch.reached(Lsn::new(500));
        assert_eq!(batch.to(), Lsn::new(500));
        batch.reached(Lsn::new(400));
        assert_eq!(batch.to(), Lsn::new(500));
    }

    #[test]
    fn objects_follow_each_other_and_each_says_where_what_is_open_began() {
        let mut batch = batch();
        add(&mut batch, &begin(192));
        add(&mut batch, &commit(200, 9));
        add(&mut batch, &begin(292));
        let first = batch.take();
        assert_eq!((first.count, first.commits, first.to), (3, 1, Lsn::new(200)));
        let time = Some(PgTime::from_micros(9));
        assert_eq!((first.first_commit, first.last_commit), (time, time));
        assert_eq!((first.within, first.open_from), (Within::Nothing, None));
        assert!(batch.is_empty());
        batch.reached(Lsn::new(900));
        let second = batch.take();
        assert_eq!((second.name.from, second.name.part, second.to), (Lsn::new(200), 0, Lsn::new(200)));
        let place = first.name.place();
        assert_eq!((second.within, second.open_from), (Within::Transaction, Some(place)));
        add(&mut batch, &commit(300, 8));
        let third = batch.take();
        assert_eq!((third.name.from, third.name.part, third.to), (Lsn::new(200), 1, Lsn::new(300)));
        assert_eq!((third.commits, third.within, third.open_from), (1, Within::Transaction, Some(place)));
        let fourth = batch.take();
        assert_eq!((fourth.name.from, fourth.within, fourth.open_from), (Lsn::new(300), Within::Nothing, None));
    }

    #[test]
    fn a_streamed_transaction_is_open_until_it_ends() {
        let mut batch = batch();
        add(&mut batch, &stream_start());
        add(&mut batch, b"E");
        let first = batch.take();
        batch.reached(Lsn::new(500));
        let second = batch.take();
        assert_eq!(
            (second.within, second.open_from, second.to),
            (Within::Nothing, Some(first.name.place()), Lsn::new(500))
        );
        add(&mut batch, &[&b"A"[..], &700_u32.to_be_bytes(), &701_u32.to_be_bytes()].concat());
        assert_eq!(batch.take().open_from, Some(first.name.place()));
        assert_eq!(batch.open_from, Some(first.name.place()), "only a subtransaction was rolled back");
        add(&mut batch, &[&b"A"[..], &700_u32.to_be_bytes(), &700_u32.to_be_bytes()].concat());
        batch.take();
        assert_eq!(batch.open_from, None);
    }

    #[test]
    fn each_object_describes_the_tables_whose_changes_it_holds() {
        let mut batch = batch();
        for message in [begin(192), relation(false), insert(false), insert(false)] {
            add(&mut batch, &message);
        }
        assert_eq!(tags(&batch.take()), "BRII");
        add(&mut batch, &insert(false));
        add(&mut batch, &insert(false));
        add(&mut batch, &commit(200, 7));
        let second = batch.take();
        assert_eq!(tags(&second), "RIIC");
        let said = Messages::new(&second.messages).next().unwrap().unwrap();
        assert_eq!(said.message, relation(false));
        // Within a stream it is said as of that.
        add(&mut batch, &stream_start());
        add(&mut batch, &insert(true));
        let third = batch.take();
        assert_eq!(tags(&third), "SRI");
        assert_eq!(Messages::new(&third.messages).nth(1).unwrap().unwrap().message, relation(true));
        // A truncate names its tables elsewhere.
        add(&mut batch, b"E");
        add(&mut batch, &begin(392));
        add(&mut batch, &[&b"T\0\0\0\x01\0"[..], &16_400_u32.to_be_bytes()].concat());
        assert_eq!(tags(&batch.take()), "EBRT");
    }

    #[test]
    fn an_end_that_cannot_be_read_is_an_error() {
        let mut batch = batch();
        for message in [&b""[..], b"C", b"c\0\0", b"B\0", b"R"] {
            assert!(batch.add(Lsn::new(1), PgTime::from_micros(0), message).is_err(), "{message:?}");
        }
    }
}
