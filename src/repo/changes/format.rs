//! The change log's objects: messages of logical replication, as they came, with a header that says where they belong. Pure.
//!
//! An object is one zstd frame. Its content begins with two lines of text, the magic and a JSON header ([`Header`]), each
//! with its line feed. Then come messages, one behind the other, each as
//!
//! ```text
//! u32  length of what follows the first 20 bytes      numbers are big-endian
//! u64  place of the record that it tells of (LSN)
//! i64  when the server sent it, in microseconds since 2000-01-01 UTC
//! ...  the message, as `pgoutput` wrote it (protocol 2, texts in UTF-8)
//! ```
//!
//! # The chain
//!
//! Commits follow each other in the order of their places. An object holds all commits whose records end behind `from` and
//! not behind `to`; `from` is where its predecessor ended, so a listing shows that none is missing. While a transaction is
//! too large for one object, `from` and `to` are the same, and `part` counts on.
//!
//! A session is one connection to the server, which sends whole transactions: what a session left half sent, streamed parts
//! of open transactions included, the next one sends again from its beginning. Whoever reads forgets what is open when
//! `session` changes.
//!
//! One can begin to read with any object. The server describes a table once in a session; an object that has changes of the
//! table says it again before the first of them. Where the transactions began that are open when the object begins stands in
//! its header (`open_from`).
//!
//! # Merged objects
//!
//! A busy server's log has an object for each second. When they are old, a run of them of one session is merged: the same
//! messages behind a header of their own, under a name that also says where it ends (`merged_to`). It stands for all objects
//! from its place to that end, which are deleted a day later; whoever lists sees only one of both.

use jiff::Timestamp;

use crate::pg::{Lsn, Oid, PgTime, TimelineId};

/// The first line of an object.
pub const MAGIC: &str = "walguard changes 1";

/// The most bytes that a header can have: real ones have some four hundred.
const HEADER_BYTES_MAX: usize = 64 << 10;

/// What stands before each message.
pub const FRAME_BYTES: usize = 20;

/// What of a database's changes an object holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct ChangesName {
    /// The database's OID.
    pub database: Oid,
    /// Where its predecessor ended.
    pub from: Lsn,
    /// Counts objects with the same `from`, from 0.
    pub part: u32,
    /// It is a merged object, and ends here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged_to: Option<Lsn>,
}

/// An object of the same database.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct Place {
    /// Where its predecessor ended.
    pub from: Lsn,
    /// Counts objects with the same `from`.
    pub part: u32,
}

impl ChangesName {
    /// Without the database.
    pub const fn place(&self) -> Place {
        Place { from: self.from, part: self.part }
    }

    /// What follows it if it ends at `to`.
    #[must_use]
    pub const fn followed_at(&self, to: Lsn) -> Self {
        let Self { database, from, part, merged_to: _ } = *self;
        match to.bytes() > from.bytes() {
            true => Self { database, from: to, part: 0, merged_to: None },
            false => Self { database, from, part: part.saturating_add(1), merged_to: None },
        }
    }

    /// True if a merged object holds all of another one.
    pub fn covers(&self, other: &Self) -> bool {
        let within = |to: Lsn| match other.merged_to {
            Some(other) => other <= to,
            None => other.from < to,
        };
        self != other && self.place() <= other.place() && self.merged_to.is_some_and(within)
    }

    /// The object at that place of the same database's log.
    #[must_use]
    pub const fn at(&self, place: Place) -> Self {
        Self { database: self.database, from: place.from, part: place.part, merged_to: None }
    }
}

/// What is half sent where an object begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Within {
    /// Nothing.
    #[default]
    Nothing,
    /// A transaction, which ends with its commit.
    Transaction,
    /// A part of a transaction that has not committed; messages say in it whose they are.
    Stream,
}

/// What an object says of itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Header {
    /// Its name.
    #[serde(flatten)]
    pub name: ChangesName,
    /// The database's name.
    pub database_name: String,
    /// The server's timeline.
    pub timeline: TimelineId,
    /// All commits whose records end here or before are in this object or its predecessors.
    pub to: Lsn,
    /// The connection that it came over: a name that no other connection has.
    pub session: String,
    /// When the object was made, by the agent's clock.
    pub made_at: Timestamp,
    /// What the first messages belong to.
    pub within: Within,
    /// The object in which the oldest transaction began that is open where this one begins.
    pub open_from: Option<Place>,
    /// Messages in it.
    pub messages: u64,
    /// Commits in it.
    pub commits: u64,
    /// The earliest and the latest time of these commits.
    pub first_commit: Option<PgTime>,
    /// See [`Header::first_commit`].
    pub last_commit: Option<PgTime>,
}

impl Header {
    /// The name of the object that follows.
    pub const fn next(&self) -> ChangesName {
        self.name.followed_at(self.to)
    }
}

/// A message with what came with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent<'a> {
    /// The place of the record that it tells of.
    pub at: Lsn,
    /// When the server sent it, by its clock.
    pub time: PgTime,
    /// The message.
    pub message: &'a [u8],
}

/// Adds a message to the messages of an object.
///
/// # Panics
/// If the message is longer than any that Postgres can send (4 GiB).
pub fn append(messages: &mut Vec<u8>, sent: Sent<'_>) {
    let length = u32::try_from(sent.message.len()).expect("a message is shorter than 4 GiB");
    messages.reserve(FRAME_BYTES + sent.message.len());
    messages.extend(length.to_be_bytes());
    messages.extend(sent.at.bytes().to_be_bytes());
    messages.extend(sent.time.micros().to_be_bytes());
    messages.extend_from_slice(sent.message);
}

/// The content of an object.
pub fn encode(header: &Header, messages: &[u8]) -> Vec<u8> {
    let json = serde_json::to_vec(header).expect("a header becomes JSON");
    let mut content = Vec::with_capacity(MAGIC.len() + json.len() + messages.len() + 2);
    content.extend(MAGIC.as_bytes());
    content.push(b'\n');
    content.extend(json);
    content.push(b'\n');
    content.extend_from_slice(messages);
    content
}

/// An object's content is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChangesError {
    /// It does not begin as one.
    #[error("does not begin with `{MAGIC}` and a header")]
    Magic,
    /// Its header cannot be read.
    #[error("the header cannot be read: {0}")]
    Header(String),
    /// It says that it is another object.
    #[error("it says that it is the object from {} part {}", .0.from, .0.part)]
    OtherName(ChangesName),
    /// It ends before it begins.
    #[error("it goes from {from} back to {to}")]
    Backwards {
        /// Where its predecessor ended.
        from: Lsn,
        /// Where it ends.
        to: Lsn,
    },
    /// It ends within a message.
    #[error("it ends within a message")]
    Cut,
}

/// The header of an object's content, and where the messages begin.
///
/// # Errors
/// If the content is not that of the object `name`.
pub fn read_header(content: &[u8], name: ChangesName) -> Result<(Header, usize), ChangesError> {
    let rest = content.strip_prefix(MAGIC.as_bytes()).and_then(|rest| rest.strip_prefix(b"\n"));
    let rest = rest.ok_or(ChangesError::Magic)?;
    let length = rest.iter().take(HEADER_BYTES_MAX).position(|byte| *byte == b'\n').ok_or(ChangesError::Magic)?;
    let json = rest.get(..length).ok_or(ChangesError::Magic)?;
    let header: Header = serde_json::from_slice(json).map_err(|error| ChangesError::Header(error.to_string()))?;
    if header.name != name || name.merged_to.is_some_and(|to| header.to != to) {
        return Err(ChangesError::OtherName(header.name));
    }
    if header.to < name.from {
        return Err(ChangesError::Backwards { from: name.from, to: header.to });
    }
    Ok((header, MAGIC.len() + 1 + length + 1))
}

/// The messages of an object, in order, as [`append`] put them.
#[derive(Clone, Debug)]
pub struct Messages<'a> {
    rest: &'a [u8],
}

impl<'a> Messages<'a> {
    /// Of what follows the header.
    pub const fn new(messages: &'a [u8]) -> Self {
        Self { rest: messages }
    }

    fn split(&mut self) -> Option<Sent<'a>> {
        let (length, rest) = self.rest.split_first_chunk::<4>()?;
        let (at, rest) = rest.split_first_chunk::<8>()?;
        let (time, rest) = rest.split_first_chunk::<8>()?;
        let (message, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        self.rest = rest;
        Some(Sent {
            at: Lsn::new(u64::from_be_bytes(*at)),
            time: PgTime::from_micros(i64::from_be_bytes(*time)),
            message,
        })
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<Sent<'a>, ChangesError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let sent = self.split();
        if sent.is_none() {
            self.rest = &[];
        }
        Some(sent.ok_or(ChangesError::Cut))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(from: u64, to: u64, part: u32) -> Header {
        Header {
            name: ChangesName { database: Oid(5), from: Lsn::new(from), part, merged_to: None },
            database_name: "shop\n".into(),
            timeline: TimelineId::FIRST,
            to: Lsn::new(to),
            session: "a".into(),
            made_at: Timestamp::UNIX_EPOCH,
            within: Within::Nothing,
            open_from: Some(Place { from: Lsn::new(50), part: 1 }),
            messages: 2,
            commits: 1,
            first_commit: Some(PgTime::from_micros(7)),
            last_commit: Some(PgTime::from_micros(8)),
        }
    }

    #[test]
    fn the_successor_is_where_the_object_ends_or_its_next_part() {
        let next = |header: &Header| (header.next().from.bytes(), header.next().part);
        assert_eq!(next(&header(100, 200, 3)), (200, 0));
        assert_eq!(next(&header(100, 100, 3)), (100, 4), "a transaction goes on in the next object");
    }

    #[test]
    fn an_object_of_another_name_is_refused() {
        let content = encode(&header(100, 200, 0), b"");
        let other = ChangesName { part: 1, ..header(100, 200, 0).name };
        assert_eq!(read_header(&content, other), Err(ChangesError::OtherName(header(100, 200, 0).name)));
        let back = header(100, 99, 0);
        assert!(matches!(read_header(&encode(&back, b""), back.name), Err(ChangesError::Backwards { .. })));
        assert_eq!(read_header(b"walguard changes 2\n{}\n", other), Err(ChangesError::Magic));
    }

    proptest! {
        #[test]
        fn messages_come_back_as_they_were_put(
            sent in proptest::collection::vec((any::<u64>(), any::<i64>(), proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut messages = Vec::new();
            for (at, time, message) in &sent {
                append(&mut messages, Sent { at: Lsn::new(*at), time: PgTime::from_micros(*time), message });
            }
            let header = header(100, 200, 0);
            let content = encode(&header, &messages);
            let (read, at) = read_header(&content, header.name).unwrap();
            prop_assert_eq!(&read, &header);
            let back: Result<Vec<_>, _> = Messages::new(&content[at..]).collect();
            let back: Vec<_> = back.unwrap().into_iter().map(|s| (s.at.bytes(), s.time.micros(), s.message.to_vec())).collect();
            prop_assert_eq!(&back, &sent);
            // Cut anywhere but between two messages, it says so.
            let length = cut.index(messages.len() + 1);
            let whole = Messages::new(&messages[..length]).all(|message| message.is_ok());
            let ends = sent.iter().scan(0, |end, (_, _, message)| { *end += FRAME_BYTES + message.len(); Some(*end) });
            prop_assert_eq!(whole, length == 0 || ends.into_iter().any(|end| end == length));
        }

        #[test]
        fn no_bytes_panic_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let name = header(100, 200, 0).name;
            let _ = read_header(&bytes, name);
            let _ = read_header(&[MAGIC.as_bytes(), b"\n", &bytes].concat(), name);
            let _ = Messages::new(&bytes).count();
        }
    }
}
