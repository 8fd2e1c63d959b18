//! Which object lies where: names to keys and back.
//!
//! ```text
//! <cluster>/
//!   cluster.json                                     format, system identifier, major version, segment size
//!   wal/00000001/000000010000001600000037.zst        one whole segment
//!   wal/00000001/000000010000001600000037.tail/00000000-0001a2f8.zst   bytes [from, to) of an unfinished segment
//!   wal/00000002.history                             timeline history, verbatim
//!   index/00000001/000000010000001600000037          what that segment holds
//!   merged/00000001/00256/000000010000001600000000   what the 256 segments from that one on hold, in short
//!   names/00000001/000000010000001600000037          what relations are called where that segment begins
//!   changes/16384/0000001600000037-00000000.zst      what logical replication told of a database, from that place on
//!   changes/16384/0000001600000037-00000000-0000001600A00000.zst   the same up to there, many such in one
//!   bases/16384/<label>/pre-data.sql.zst             a logical base: the schema of a database without indexes ...
//!   bases/16384/<label>/16400-00001.copy.zst         ... a part of a table's rows ...
//!   bases/16384/<label>/post-data.sql.zst            ... its indexes, constraints, triggers ...
//!   bases/16384/<label>/manifest.json                ... and what it is, written last
//!   base/<label>/base.tar.zst.00001                  a part of the data directory's tar
//!   base/<label>/<tablespace oid>.tar.zst.00001      a part of a tablespace's tar
//!   base/<label>/backup_manifest.zst                 Postgres's own manifest, verbatim
//!   base/<label>/manifest                            written last: the backup exists when this does
//!   incidents/<id>/<revision>.json                   each revision a new object
//!   incidents/<id>/delivered-<channel>-<event>.json  that a channel was told of it
//!   incidents/<id>/evidence/<schema>.<table>.copy.zst   rows that it took away, as CSV
//!   silences/<id>.json   silences/<id>.lifted.json   what nobody wants to hear of for a while, and that it is over
//!   detect/00000001-0000001600000000.zst             what the detector has counted and learned
//!   gaps/00000001-0000001600000000-0000001700000000.json
//!   verify/20251217T081400Z.json                     what a verification found
//!   drills/20251217T081400Z.json                     what a drill proved
//!   restores/20251217T081400Z.json                   how long a restore took
//!   lease.json                                       the one mutable object
//!   probe/<nonce>                                    written, read and removed by the probe
//! ```
//!
//! Numbers have a fixed width, so a listing in key order is a listing in WAL order, and the tails of a segment stand
//! just before the segment.

use std::fmt;

use jiff::Timestamp;

use super::changes::ChangesName;
use super::index::{Group, Level};
use crate::pg::{Lsn, Oid, SegmentName, SegmentSize, TimelineId};

/// The longest name of a cluster or a backup, in bytes: keys stay far below the 1,024 that S3 allows.
const NAME_BYTES_MAX: usize = 128;

/// The keys of one cluster's objects. Pure; cheap to clone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    cluster: String,
}

/// A name that cannot be part of a key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` cannot be the name of a cluster or a backup: 1 to 128 of A-Z a-z 0-9 . _ -, and not a dot first")]
pub struct NameError(pub String);

/// Which tar of a base backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArchiveName {
    /// The data directory.
    Base,
    /// A tablespace.
    Tablespace(Oid),
}

impl fmt::Display for ArchiveName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base => f.write_str("base"),
            Self::Tablespace(oid) => oid.fmt(f),
        }
    }
}

impl ArchiveName {
    /// Reads `base` or an OID.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "base" => Some(Self::Base),
            digits => parse_plain::<u32>(digits).map(|oid| Self::Tablespace(Oid(oid))),
        }
    }
}

/// What a key says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// `cluster.json`.
    Identity,
    /// A whole segment.
    Segment(SegmentName),
    /// Bytes `[from, to)` of a segment.
    Tail {
        /// The segment.
        segment: SegmentName,
        /// First byte, counted from the segment's beginning.
        from: u32,
        /// The byte after the last; greater than `from`, at most the segment's size.
        to: u32,
    },
    /// A timeline's history file.
    History(TimelineId),
    /// A segment's index.
    Index(SegmentName),
    /// What the indexes of a group of segments say, in short.
    Merged(Group),
    /// What relations are called where a segment begins.
    Names(SegmentName),
    /// A part of a database's change log.
    Changes(ChangesName),
    /// A part of one archive of a base backup.
    Part {
        /// The backup.
        label: String,
        /// The tar.
        archive: ArchiveName,
        /// Counted from 1.
        number: u32,
    },
    /// Postgres's manifest of a base backup.
    PostgresManifest {
        /// The backup.
        label: String,
    },
    /// Our manifest of a base backup.
    Manifest {
        /// The backup.
        label: String,
    },
    /// A revision of an incident.
    Incident {
        /// The incident's id.
        id: String,
        /// Counted from 1.
        revision: u32,
    },
    /// The record that a channel was told of an incident.
    Delivery {
        /// The incident's id.
        incident: String,
        /// The channel.
        channel: String,
        /// What of it: `opened`, `grown7`; has no `-`.
        event: String,
    },
    /// Rows that an incident took away.
    Evidence {
        /// The incident's id.
        id: String,
        /// The table, as a name.
        name: String,
    },
    /// WAL that is missing, and known to be.
    Gap {
        /// The timeline.
        timeline: TimelineId,
        /// First missing byte.
        from: Lsn,
        /// The byte after the last one missing.
        to: Lsn,
    },
    /// The record of a verification.
    Verification(Timestamp),
    /// The record of a drill.
    Drill(Timestamp),
    /// The record of a restore.
    Restore(Timestamp),
    /// The lease.
    Lease,
    /// Left by a probe that was interrupted.
    Probe,
}

impl Layout {
    /// The keys of the cluster that the settings call `cluster`.
    ///
    /// # Errors
    /// If the name cannot be part of a key.
    pub fn new(cluster: &str) -> Result<Self, NameError> {
        check_name(cluster)?;
        Ok(Self { cluster: cluster.to_owned() })
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What all keys of the cluster begin with, `main/`.
    pub fn root(&self) -> String {
        format!("{}/", self.cluster)
    }

    /// `cluster.json`.
    pub fn identity(&self) -> String {
        format!("{}/cluster.json", self.cluster)
    }

    /// The folder of all WAL, `main/wal/`.
    pub fn wal_folder(&self) -> String {
        format!("{}/wal/", self.cluster)
    }

    /// The folder of a timeline's WAL, `main/wal/00000001/`.
    pub fn timeline_folder(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{}/", self.cluster, timeline.hex())
    }

    /// A whole segment.
    pub fn segment(&self, segment: &SegmentName) -> String {
        format!("{}/wal/{}/{segment}.zst", self.cluster, segment.timeline.hex())
    }

    /// What sorts just before everything kept of `segment`, tails included: pass it as `after` of a listing to begin
    /// there.
    pub fn before_segment(&self, segment: &SegmentName) -> String {
        format!("{}/wal/{}/{segment}", self.cluster, segment.timeline.hex())
    }

    /// The folder of a segment's tails.
    pub fn tail_folder(&self, segment: &SegmentName) -> String {
        format!("{}/wal/{}/{segment}.tail/", self.cluster, segment.timeline.hex())
    }

    /// Bytes `[from, to)` of a segment, counted from its beginning.
    pub fn tail(&self, segment: &SegmentName, from: u32, to: u32) -> String {
        format!("{}{from:08x}-{to:08x}.zst", self.tail_folder(segment))
    }

    /// A timeline's history file.
    pub fn history(&self, timeline: TimelineId) -> String {
        format!("{}/wal/{}", self.cluster, timeline.history_file_name())
    }

    /// A segment's index.
    pub fn index(&self, segment: &SegmentName) -> String {
        format!("{}/index/{}/{segment}", self.cluster, segment.timeline.hex())
    }

    /// The folder of a timeline's indexes.
    pub fn index_folder(&self, timeline: TimelineId) -> String {
        format!("{}/index/{}/", self.cluster, timeline.hex())
    }

    /// What sorts just before the index of `segment`.
    pub fn before_index(&self, segment: &SegmentName) -> String {
        let mut key = self.index(segment);
        key.pop(); // a proper prefix sorts before the whole; the segments it lets in besides are fewer than 16
        key
    }

    /// What the indexes of a group of segments say, in short.
    pub fn merged(&self, group: &Group) -> String {
        format!("{}{}", self.merged_folder(group.timeline, group.level), group.first())
    }

    /// The folder of the merged indexes of one level, in the order of their segments.
    pub fn merged_folder(&self, timeline: TimelineId, level: Level) -> String {
        format!("{}/merged/{}/{:05}/", self.cluster, timeline.hex(), level.segments())
    }

    /// What sorts just before the merged index of `group`.
    pub fn before_merged(&self, group: &Group) -> String {
        let mut key = self.merged(group);
        key.pop(); // as for an index
        key
    }

    /// What relations are called where a segment begins.
    pub fn names(&self, segment: &SegmentName) -> String {
        format!("{}{segment}", self.names_folder(segment.timeline))
    }

    /// The folder of a timeline's names.
    pub fn names_folder(&self, timeline: TimelineId) -> String {
        format!("{}/names/{}/", self.cluster, timeline.hex())
    }

    /// The folder of all change logs, `main/changes/`.
    pub fn all_changes_folder(&self) -> String {
        format!("{}/changes/", self.cluster)
    }

    /// The folder of a database's change log.
    pub fn changes_folder(&self, database: Oid) -> String {
        format!("{}{database}/", self.all_changes_folder())
    }

    /// A part of a database's change log. A merged object stands just before the first of those that it holds.
    pub fn changes(&self, name: &ChangesName) -> String {
        let end = name.merged_to.map(|to| format!("-{:016X}", to.bytes())).unwrap_or_default();
        format!("{}-{:08x}{end}.zst", self.before_changes(name.database, name.from), name.part)
    }

    /// What sorts just before the parts of a database's change log that begin at `from`.
    pub fn before_changes(&self, database: Oid, from: Lsn) -> String {
        format!("{}{:016X}", self.changes_folder(database), from.bytes())
    }

    /// The folder of a database's logical bases.
    pub fn bases_folder(&self, database: Oid) -> String {
        format!("{}/bases/{database}/", self.cluster)
    }

    /// The folder of a logical base.
    pub fn base_folder(&self, database: Oid, label: &str) -> String {
        format!("{}{label}/", self.bases_folder(database))
    }

    /// A section of the schema of a logical base: `pre-data` or `post-data`.
    pub fn base_schema(&self, database: Oid, label: &str, section: &str) -> String {
        format!("{}{section}.sql.zst", self.base_folder(database, label))
    }

    /// Part `number` (from 1) of the rows of a table of a logical base.
    pub fn base_rows(&self, database: Oid, label: &str, table: Oid, number: usize) -> String {
        format!("{}{table}-{number:05}.copy.zst", self.base_folder(database, label))
    }

    /// What a logical base is.
    pub fn base_manifest(&self, database: Oid, label: &str) -> String {
        format!("{}manifest.json", self.base_folder(database, label))
    }

    /// The folder of all base backups, `main/base/`.
    pub fn backups_folder(&self) -> String {
        format!("{}/base/", self.cluster)
    }

    /// The folder of one base backup.
    pub fn backup_folder(&self, label: &str) -> String {
        format!("{}/base/{label}/", self.cluster)
    }

    /// Part `number` (from 1) of one archive of a backup.
    pub fn part(&self, label: &str, archive: ArchiveName, number: u32) -> String {
        format!("{}/base/{label}/{archive}.tar.zst.{number:05}", self.cluster)
    }

    /// Postgres's own manifest of a backup.
    pub fn postgres_manifest(&self, label: &str) -> String {
        format!("{}/base/{label}/backup_manifest.zst", self.cluster)
    }

    /// Our manifest of a backup, which is written last.
    pub fn manifest(&self, label: &str) -> String {
        format!("{}/base/{label}/manifest", self.cluster)
    }

    /// The folder of all incidents.
    pub fn incidents_folder(&self) -> String {
        format!("{}/incidents/", self.cluster)
    }

    /// Rows of a table that an incident took away.
    pub fn evidence(&self, id: &str, name: &str) -> String {
        format!("{}/incidents/{id}/evidence/{name}.copy.zst", self.cluster)
    }

    /// A revision (from 1) of an incident.
    pub fn incident(&self, id: &str, revision: u32) -> String {
        format!("{}/incidents/{id}/{revision:08}.json", self.cluster)
    }

    /// The record that `channel` was told of `event` of an incident.
    pub fn delivery(&self, incident: &str, channel: &str, event: &str) -> String {
        format!("{}/incidents/{incident}/delivered-{channel}-{event}.json", self.cluster)
    }

    /// What the keys of all such records of an incident begin with.
    pub fn deliveries_prefix(&self, incident: &str) -> String {
        format!("{}/incidents/{incident}/delivered-", self.cluster)
    }

    /// The folder of all silences.
    pub fn silences_folder(&self) -> String {
        format!("{}/silences/", self.cluster)
    }

    /// A silence.
    pub fn silence(&self, id: &str) -> String {
        format!("{}/silences/{id}.json", self.cluster)
    }

    /// That a silence is ended before its time.
    pub fn lifted_silence(&self, id: &str) -> String {
        format!("{}/silences/{id}.lifted.json", self.cluster)
    }

    /// The folder of what detectors remember.
    pub fn memories_folder(&self) -> String {
        format!("{}/detect/", self.cluster)
    }

    /// What a detector remembers as of a place.
    pub fn memory(&self, timeline: TimelineId, lsn: Lsn) -> String {
        format!("{}/detect/{}-{:016X}.zst", self.cluster, timeline.hex(), lsn.bytes())
    }

    /// The folder of all gaps.
    pub fn gaps_folder(&self) -> String {
        format!("{}/gaps/", self.cluster)
    }

    /// WAL `[from, to)` of a timeline that is missing, and known to be.
    pub fn gap(&self, timeline: TimelineId, from: Lsn, to: Lsn) -> String {
        format!("{}/gaps/{}-{:016X}-{:016X}.json", self.cluster, timeline.hex(), from.bytes(), to.bytes())
    }

    /// The folder of all records of verifications.
    pub fn verifications_folder(&self) -> String {
        format!("{}/verify/", self.cluster)
    }

    /// The record of the verification that began at `at` (whole seconds).
    pub fn verification(&self, at: Timestamp) -> String {
        format!("{}/verify/{}.json", self.cluster, at.strftime(TIME_FORMAT))
    }

    /// The folder of all records of drills.
    pub fn drills_folder(&self) -> String {
        format!("{}/drills/", self.cluster)
    }

    /// The record of the drill that began at `at` (whole seconds).
    pub fn drill(&self, at: Timestamp) -> String {
        format!("{}/drills/{}.json", self.cluster, at.strftime(TIME_FORMAT))
    }

    /// The folder of all records of restores.
    pub fn restores_folder(&self) -> String {
        format!("{}/restores/", self.cluster)
    }

    /// The record of the restore that was done at `at` (whole seconds).
    pub fn restore(&self, at: Timestamp) -> String {
        format!("{}/restores/{}.json", self.cluster, at.strftime(TIME_FORMAT))
    }

    /// The lease.
    pub fn lease(&self) -> String {
        format!("{}/lease.json", self.cluster)
    }

    /// The folder of probes.
    pub fn probes_folder(&self) -> String {
        format!("{}/probe/", self.cluster)
    }

    /// An object that the probe writes and removes.
    pub fn probe(&self, nonce: &str) -> String {
        format!("{}/probe/{nonce}", self.cluster)
    }

    /// What the object at `key` is. `None` for keys that walguard does not write: they are left alone.
    pub fn parse(&self, key: &str, size: SegmentSize) -> Option<Object> {
        let path = key.strip_prefix(&self.cluster)?.strip_prefix('/')?;
        let parts: Vec<&str> = path.split('/').collect();
        let object = match *parts.as_slice() {
            ["cluster.json"] => Object::Identity,
            ["lease.json"] => Object::Lease,
            ["probe", _] => Object::Probe,
            ["wal", file] => Object::History(parse_timeline(file.strip_suffix(".history")?)?),
            ["wal", timeline, file] => Object::Segment(parse_segment(timeline, file.strip_suffix(".zst")?, size)?),
            ["wal", timeline, folder, file] => {
                let segment = parse_segment(timeline, folder.strip_suffix(".tail")?, size)?;
                let (from, to) = file.strip_suffix(".zst")?.split_once('-')?;
                let lower = !file.bytes().any(|b| b.is_ascii_uppercase());
                let (from, to) = (parse_hex(from, 8).filter(|_| lower)?, parse_hex(to, 8)?);
                (from < to && to <= size.bytes()).then_some(())?;
                Object::Tail { segment, from: u32::try_from(from).ok()?, to: u32::try_from(to).ok()? }
            }
            ["index", timeline, file] => Object::Index(parse_segment(timeline, file, size)?),
            ["merged", timeline, segments, file] => {
                let level = Level::of_segments(parse_padded(segments, 5)?.into())?;
                let first = parse_segment(timeline, file, size)?;
                let group = Group::of(&first, level);
                (group.first() == first).then_some(Object::Merged(group))?
            }
            ["names", timeline, file] => Object::Names(parse_segment(timeline, file, size)?),
            ["changes", database, file] => {
                let (from, part) = file.strip_suffix(".zst")?.split_once('-')?;
                let (part, to) = part.split_once('-').map_or((part, None), |(part, to)| (part, Some(to)));
                let place = |text: &str| {
                    let plain = !text.bytes().any(|b| b.is_ascii_lowercase());
                    Some(Lsn::new(parse_hex(text, 16).filter(|_| plain)?))
                };
                let (from, plain) = (place(from)?, !part.bytes().any(|b| b.is_ascii_uppercase()));
                let merged_to = match to {
                    Some(to) => Some(place(to).filter(|to| *to > from)?),
                    None => None,
                };
                Object::Changes(ChangesName {
                    database: Oid(parse_plain(database)?),
                    from,
                    part: u32::try_from(parse_hex(part, 8).filter(|_| plain)?).ok()?,
                    merged_to,
                })
            }
            ["base", label, "manifest"] => Object::Manifest { label: label.to_owned() },
            ["base", label, "backup_manifest.zst"] => Object::PostgresManifest { label: label.to_owned() },
            ["base", label, file] => {
                let (archive, number) = file.split_once(".tar.zst.")?;
                Object::Part {
                    label: label.to_owned(),
                    archive: ArchiveName::parse(archive)?,
                    number: parse_padded(number, 5)?,
                }
            }
            ["incidents", id, file] if file.starts_with("delivered-") => {
                let name = file.strip_prefix("delivered-")?.strip_suffix(".json")?;
                let (channel, event) = name.rsplit_once('-')?;
                check_name(channel).ok().filter(|()| check_name(event).is_ok())?;
                Object::Delivery { incident: id.to_owned(), channel: channel.to_owned(), event: event.to_owned() }
            }
            ["incidents", id, file] => {
                Object::Incident { id: id.to_owned(), revision: parse_padded(file.strip_suffix(".json")?, 8)? }
            }
            ["incidents", id, "evidence", file] => {
                let name = file.strip_suffix(".copy.zst")?;
                check_name(name).ok()?;
                Object::Evidence { id: id.to_owned(), name: name.to_owned() }
            }
            ["gaps", file] => {
                let mut fields = file.strip_suffix(".json")?.split('-');
                let timeline = parse_timeline(fields.next()?)?;
                let from = Lsn::new(parse_hex(fields.next()?, 16)?);
                let to = Lsn::new(parse_hex(fields.next()?, 16)?);
                let upper = !file.trim_end_matches(".json").bytes().any(|b| b.is_ascii_lowercase());
                (fields.next().is_none() && from < to && upper).then_some(())?;
                Object::Gap { timeline, from, to }
            }
            ["verify", file] => Object::Verification(parse_time(file.strip_suffix(".json")?)?),
            ["drills", file] => Object::Drill(parse_time(file.strip_suffix(".json")?)?),
            ["restores", file] => Object::Restore(parse_time(file.strip_suffix(".json")?)?),
            _ => return None,
        };
        if let Object::Manifest { label } | Object::PostgresManifest { label } | Object::Part { label, .. } = &object {
            check_name(label).ok()?;
        }
        Some(object)
    }

    /// The timeline of a folder below [`Layout::wal_folder`], `main/wal/00000001/`.
    pub fn parse_timeline_folder(&self, folder: &str) -> Option<TimelineId> {
        parse_timeline(folder.strip_prefix(&self.wal_folder())?.strip_suffix('/')?)
    }

    /// The label of a folder below [`Layout::backups_folder`], `main/base/<label>/`.
    pub fn parse_backup_folder<'a>(&self, folder: &'a str) -> Option<&'a str> {
        let label = folder.strip_prefix(&self.backups_folder())?.strip_suffix('/')?;
        check_name(label).ok()?;
        Some(label)
    }
}

/// Checks the name of a cluster or a backup, which becomes a part of keys and paths.
///
/// # Errors
/// If it is empty, too long, begins with a dot, or has other characters than `A-Z a-z 0-9 . _ -`.
pub fn check_name(name: &str) -> Result<(), NameError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let good = (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.starts_with('.') && name.bytes().all(plain);
    if good { Ok(()) } else { Err(NameError(name.to_owned())) }
}

fn parse_segment(timeline: &str, name: &str, size: SegmentSize) -> Option<SegmentName> {
    let segment = SegmentName::parse(name, size).ok()?;
    // The last segment that 64 bits can count ends past what an LSN can say.
    let ends = segment.number.next().get().checked_mul(size.bytes()).is_some();
    (ends && parse_timeline(timeline)? == segment.timeline).then_some(segment)
}

fn parse_timeline(text: &str) -> Option<TimelineId> {
    let upper = !text.bytes().any(|b| b.is_ascii_lowercase());
    TimelineId::new(u32::try_from(parse_hex(text, 8)?).ok()?).filter(|_| upper)
}

/// Exactly `width` hexadecimal digits (at most 16).
fn parse_hex(text: &str, width: usize) -> Option<u64> {
    let plain = text.len() == width && text.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(text, 16).ok()).flatten()
}

/// A decimal number as `{:0width}` prints it, from 1.
fn parse_padded(text: &str, width: usize) -> Option<u32> {
    let number: u32 = text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()?;
    (number > 0 && text == format!("{number:0width$}")).then_some(number)
}

/// How times stand in keys: in whole seconds of UTC, so that they sort.
const TIME_FORMAT: &str = "%Y%m%dT%H%M%SZ";

/// A decimal number without sign or leading zeros.
fn parse_plain<T: std::str::FromStr + fmt::Display>(text: &str) -> Option<T> {
    text.parse::<T>().ok().filter(|number| number.to_string() == text)
}

fn parse_time(text: &str) -> Option<Timestamp> {
    let civil = jiff::civil::DateTime::strptime(TIME_FORMAT, text).ok()?;
    let time = civil.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
    // `strptime` takes signs and spaces, too.
    (time.strftime(TIME_FORMAT).to_string() == text).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: SegmentSize = SegmentSize::DEFAULT;

    fn layout() -> Layout {
        Layout::new("main").unwrap()
    }

    fn segment(timeline: u32, number: u64) -> SegmentName {
        let number = crate::pg::SegmentNumber::new(number);
        SegmentName { timeline: TimelineId::new(timeline).unwrap(), number, size: SIZE }
    }

    #[test]
    fn keys_are_those_of_format_1() {
        let layout = layout();
        let segment = SegmentName::at(TimelineId::FIRST, Lsn::new(0x16_3700_0000), SIZE);
        assert_eq!(layout.segment(&segment), "main/wal/00000001/000000010000001600000037.zst");
        assert_eq!(
            layout.tail(&segment, 0, 0x1a2f8),
            "main/wal/00000001/000000010000001600000037.tail/00000000-0001a2f8.zst"
        );
        assert_eq!(layout.history(TimelineId::new(2).unwrap()), "main/wal/00000002.history");
        assert_eq!(
            layout.part("20251217T081400Z", ArchiveName::Base, 1),
            "main/base/20251217T081400Z/base.tar.zst.00001"
        );
        assert_eq!(layout.part("b", ArchiveName::Tablespace(Oid(16400)), 99999), "main/base/b/16400.tar.zst.99999");
    }

    fn any_object() -> impl Strategy<Value = Object> {
        let segments = || (1..u32::MAX, 0..1u64 << 40).prop_map(|(timeline, number)| segment(timeline, number));
        let label = || "[A-Za-z0-9_-][A-Za-z0-9._-]{0,30}";
        let size = u32::try_from(SIZE.bytes()).unwrap();
        prop_oneof![
            Just(Object::Identity),
            Just(Object::Lease),
            segments().prop_map(Object::Segment),
            segments().prop_map(Object::Index),
            (segments(), prop::sample::select(Level::ALL.to_vec()))
                .prop_map(|(segment, level)| Object::Merged(Group::of(&segment, level))),
            (segments(), 0..size, 1..=size).prop_filter_map("a tail has bytes", |(segment, from, to)| {
                (from < to).then_some(Object::Tail { segment, from, to })
            }),
            (1..u32::MAX).prop_map(|n| Object::History(TimelineId::new(n).unwrap())),
            (label(), any::<u32>(), 1u32..200_000).prop_map(|(label, oid, number)| Object::Part {
                label,
                archive: if oid % 2 == 0 { ArchiveName::Base } else { ArchiveName::Tablespace(Oid(oid)) },
                number
            }),
            label().prop_map(|label| Object::PostgresManifest { label }),
            label().prop_map(|label| Object::Manifest { label }),
            (label(), 1..u32::MAX).prop_map(|(id, revision)| Object::Incident { id, revision }),
            (label(), "[a-z0-9][a-z0-9_-]{0,20}", "[a-z]{5,12}[0-9]{0,3}")
                .prop_map(|(incident, channel, event)| { Object::Delivery { incident, channel, event } }),
            (label(), label()).prop_map(|(id, name)| Object::Evidence { id, name }),
            (1..u32::MAX, any::<u64>(), 1..u64::MAX).prop_filter_map("a gap has bytes", |(timeline, from, length)| {
                let (timeline, from) = (TimelineId::new(timeline).unwrap(), Lsn::new(from));
                Some(Object::Gap { timeline, from, to: from.checked_add(length)? })
            }),
            (any::<u32>(), any::<u64>(), any::<u32>(), any::<Option<u64>>()).prop_map(|(database, from, part, to)| {
                let merged_to = to.filter(|to| *to > from).map(Lsn::new);
                Object::Changes(ChangesName { database: Oid(database), from: Lsn::new(from), part, merged_to })
            }),
            (0i64..4_000_000_000).prop_map(|s| Object::Verification(Timestamp::from_second(s).unwrap())),
            (0i64..4_000_000_000).prop_map(|s| Object::Drill(Timestamp::from_second(s).unwrap())),
            (0i64..4_000_000_000).prop_map(|s| Object::Restore(Timestamp::from_second(s).unwrap())),
        ]
    }

    fn key_of(layout: &Layout, object: &Object) -> String {
        match object {
            Object::Identity => layout.identity(),
            Object::Segment(segment) => layout.segment(segment),
            Object::Tail { segment, from, to } => layout.tail(segment, *from, *to),
            Object::History(timeline) => layout.history(*timeline),
            Object::Index(segment) => layout.index(segment),
            Object::Merged(group) => layout.merged(group),
            Object::Names(segment) => layout.names(segment),
            Object::Changes(name) => layout.changes(name),
            Object::Part { label, archive, number } => layout.part(label, *archive, *number),
            Object::PostgresManifest { label } => layout.postgres_manifest(label),
            Object::Manifest { label } => layout.manifest(label),
            Object::Incident { id, revision } => layout.incident(id, *revision),
            Object::Delivery { incident, channel, event } => layout.delivery(incident, channel, event),
            Object::Evidence { id, name } => layout.evidence(id, name),
            Object::Gap { timeline, from, to } => layout.gap(*timeline, *from, *to),
            Object::Verification(at) => layout.verification(*at),
            Object::Drill(at) => layout.drill(*at),
            Object::Restore(at) => layout.restore(*at),
            Object::Lease => layout.lease(),
            Object::Probe => layout.probe("0123"),
        }
    }

    #[test]
    fn a_time_is_read_only_as_it_is_written() {
        for time in ["-9751011T000000Z", "+2025-1017T00000Z", " 9751011T000000Z"] {
            assert_eq!(layout().parse(&format!("main/restores/{time}.json"), SIZE), None, "{time}");
        }
    }

    proptest! {
        #[test]
        fn every_name_reads_back_from_its_key(object in any_object()) {
            let key = key_of(&layout(), &object);
            prop_assert_eq!(layout().parse(&key, SIZE), Some(object), "{}", key);
        }

        /// Whatever parses is written back the same: no two keys mean one object.
        #[test]
        fn no_other_key_means_the_same(object in any_object(), at in any::<prop::sample::Index>(), with in "[0-9A-Za-z./-]") {
            let mut key = key_of(&layout(), &object).into_bytes();
            let at = at.index(key.len());
            key[at] = with.as_bytes()[0];
            let key = String::from_utf8(key).unwrap();
            if let Some(parsed) = layout().parse(&key, SIZE) {
                prop_assert!(key_of(&layout(), &parsed) == key || parsed == Object::Probe, "{}", key);
            }
        }

        #[test]
        fn any_text_is_refused_or_parsed_and_never_panics(key in "\\PC{0,80}", shift in 20u32..=30) {
            let size = SegmentSize::new(1 << shift).unwrap();
            let _ = layout().parse(&key, size);
            let _ = layout().parse(&format!("main/{key}"), size);
        }

        #[test]
        fn keys_of_wal_sort_as_positions_do(timeline in 1u32..5, a in 0u64..1 << 36, b in 0u64..1 << 36) {
            let (layout, a, b) = (layout(), segment(timeline, a), segment(timeline, b));
            prop_assert_eq!(layout.segment(&a).cmp(&layout.segment(&b)), a.number.cmp(&b.number));
            for key in [layout.segment(&a), layout.tail(&a, 0, 1), layout.tail_folder(&a)] {
                prop_assert!(layout.before_segment(&a) < key);
                prop_assert!(key < layout.before_segment(&a.next()));
            }
            prop_assert!(layout.tail(&a, 5, 9) < layout.segment(&a), "tails stand before their segment");
        }
    }

    #[test]
    fn a_segment_at_the_very_end_of_all_positions_is_refused() {
        assert_eq!(layout().parse("main/wal/00000001/00000001FFFFFFFF000000FF.zst", SIZE), None);
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", ".", "..", ".hidden", "a/b", "a b", "ä", &"x".repeat(129)] {
            assert!(Layout::new(name).is_err(), "{name:?}");
        }
    }
}
