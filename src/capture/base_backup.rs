//! `BASE_BACKUP` -> the tar archives of a base backup, the same for both framings of the protocol.
//!
//! 15 and newer send everything in one COPY whose messages begin with a kind; 14 sends one COPY for each tablespace, with
//! bare tar bytes and without the two zero blocks that end a tar archive, and one for the manifest.
//! (PostgreSQL: `backup/basebackup_copy.c`; in 14 `replication/basebackup.c`.)

use bytes::{Buf, Bytes};
use postgres_protocol::message::backend::Message;
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::time::Duration;

use super::CaptureError;
use super::connection::{Row, read_row};
use super::walsender::{Walsender, parse, parse_timeline};
use super::wire::Frame;
use crate::pg::{Oid, Position};

/// What kind of checkpoint begins the backup.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Checkpoint {
    /// At once, with all the I/O that it takes.
    #[default]
    Fast,
    /// Spread over time like a scheduled one; the backup waits for it, up to minutes.
    Spread,
}

/// What to ask the server for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// The backup's label, at most 1024 bytes; it is written into `backup_label`.
    pub label: String,
    /// How it begins.
    pub checkpoint: Checkpoint,
    /// The most that the server sends, in KiB per second (32 to 1048576); `None` is unlimited.
    pub max_rate_kib: Option<u32>,
    /// Whether the server verifies page checksums: it then reports the first failures and fails the backup at its end.
    pub verify_server_side: bool,
    /// Whether the server sends its `backup_manifest`.
    pub manifest: bool,
}

impl Default for BaseBackupOptions {
    /// A fast checkpoint, no limit, with a manifest; checksums are verified on our side.
    fn default() -> Self {
        Self {
            label: "walguard".to_owned(),
            checkpoint: Checkpoint::Fast,
            max_rate_kib: None,
            verify_server_side: false,
            manifest: true,
        }
    }
}

impl BaseBackupOptions {
    /// The command for a server of this major version.
    fn command(&self, major: u32) -> String {
        let label = self.label.replace('\'', "''").replace('\0', "");
        let yes_no = |flag| if flag { "yes" } else { "no" };
        if major < 15 {
            let mut command = format!("BASE_BACKUP LABEL '{label}' PROGRESS NOWAIT TABLESPACE_MAP");
            if self.checkpoint == Checkpoint::Fast {
                command.push_str(" FAST");
            }
            if let Some(rate) = self.max_rate_kib {
                let _ = write!(command, " MAX_RATE {rate}");
            }
            if !self.verify_server_side {
                command.push_str(" NOVERIFY_CHECKSUMS");
            }
            let _ = write!(command, " MANIFEST '{}'", yes_no(self.manifest));
            return command;
        }
        let checkpoint = match self.checkpoint {
            Checkpoint::Fast => "fast",
            Checkpoint::Spread => "spread",
        };
        let mut command = format!(
            "BASE_BACKUP (LABEL '{label}', PROGRESS true, WAIT false, TABLESPACE_MAP true, CHECKPOINT '{checkpoint}', \
             VERIFY_CHECKSUMS {}, MANIFEST '{}'",
            self.verify_server_side,
            yes_no(self.manifest)
        );
        if let Some(rate) = self.max_rate_kib {
            let _ = write!(command, ", MAX_RATE {rate}");
        }
        command.push(')');
        command
    }
}

/// One tablespace of a backup.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Tablespace {
    /// Its OID; `None` is the data directory itself.
    pub oid: Option<Oid>,
    /// Its absolute path on the server; empty for the data directory.
    pub location: String,
    /// Its size when the backup began, in KiB.
    pub size_kib: Option<u64>,
}

/// What comes over a base backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupEvent {
    /// The checkpoint is done and the files follow.
    Begin {
        /// Where recovery of the backup begins.
        start: Position,
        /// What it consists of, in the order in which it comes; the data directory is last.
        tablespaces: Vec<Tablespace>,
    },
    /// A tar archive begins.
    ArchiveBegin {
        /// Its tablespace; `None` is the data directory.
        name: Option<Oid>,
        /// The tablespace's path on the server; empty for the data directory.
        location: String,
    },
    /// Bytes of the tar archive, its trailer (two zero blocks) included.
    Data(Bytes),
    /// So many bytes of all archives were sent (not from 14).
    Progress(u64),
    /// The tar archive is complete.
    ArchiveEnd,
    /// The server's `backup_manifest` begins.
    ManifestBegin,
    /// Bytes of it. It ends with [`End`](Self::End).
    ManifestData(Bytes),
    /// The backup is complete.
    End {
        /// Where its WAL ends: recovery is consistent from here on.
        stop: Position,
    },
}

/// The server sends nothing while it makes the checkpoint, but once files flow, a silence of this length means that the
/// connection is dead. The server may legitimately be quiet while it reads a large sparse directory or is throttled to
/// 32 KiB/s (a message a second).
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// A running base backup.
#[derive(Debug)]
pub struct BackupStream {
    walsender: Walsender,
    reader: Reader,
    ready: VecDeque<BackupEvent>,
    done: bool,
}

impl BackupStream {
    pub(super) async fn start(mut walsender: Walsender, options: &BaseBackupOptions) -> Result<Self, CaptureError> {
        let major = walsender.server_version().major();
        walsender.connection().send_query(&options.command(major)).await?;
        Ok(Self { walsender, reader: Reader::new(major >= 15), ready: VecDeque::new(), done: false })
    }

    /// The next event; `None` after [`BackupEvent::End`]. Cancel safe.
    ///
    /// # Errors
    /// What the server reports, or a connection that broke: the backup is void.
    pub async fn next(&mut self) -> Result<Option<BackupEvent>, CaptureError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            if self.done {
                return Ok(None);
            }
            let connection = self.walsender.connection();
            let frame = if self.reader.begun() {
                tokio::time::timeout(SILENCE_MAX, connection.receive()).await.unwrap_or_else(|_| {
                    let what = format!("the server sent nothing of the backup for {} s", SILENCE_MAX.as_secs());
                    Err(CaptureError::Unreachable { what, source: None })
                })?
            } else {
                connection.receive().await?
            };
            self.done = self.reader.take(frame, &mut self.ready)?;
        }
    }

    /// The server's version.
    pub const fn server_version(&self) -> crate::pg::ServerVersion {
        self.walsender.server_version()
    }
}

/// Where in a backup we are.
#[derive(Debug, PartialEq, Eq)]
enum Stage {
    /// Before the row with the start position.
    Start,
    /// Before the rows of tablespaces.
    Tablespaces,
    /// Within the rows of tablespaces, or between them and the first COPY.
    ListingTablespaces,
    /// 15+: inside the COPY.
    Copy { inside: Inside },
    /// 14: between two COPYs, or before the row with the stop position; so many archives have come.
    Between { archives: usize },
    /// 14: inside the COPY of this archive, or of the manifest.
    Archive { index: usize },
    /// After the last COPY.
    Stop,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Inside {
    Nothing,
    Archive,
    Manifest,
}

/// Messages in, events out.
#[derive(Debug)]
struct Reader {
    one_copy: bool,
    stage: Stage,
    start: Option<Position>,
    stop: Option<Position>,
    tablespaces: Vec<Tablespace>,
}

/// The blocks that end a tar archive.
static TAR_TRAILER: [u8; 1024] = [0; 1024];

impl Reader {
    const fn new(one_copy: bool) -> Self {
        Self { one_copy, stage: Stage::Start, start: None, stop: None, tablespaces: Vec::new() }
    }

    /// The checkpoint is over.
    fn begun(&self) -> bool {
        self.stage != Stage::Start
    }

    /// Takes one message; true when the answer is complete.
    fn take(&mut self, frame: Frame, events: &mut VecDeque<BackupEvent>) -> Result<bool, CaptureError> {
        let message = match frame {
            Frame::CopyData(payload) => return self.take_data(payload, events).map(|()| false),
            Frame::CopyBoth => return Err(unexpected()),
            Frame::Message(message) => message,
        };
        match message {
            Message::RowDescription(_) => {
                self.stage = match self.stage {
                    Stage::Start => Stage::Start,
                    Stage::Tablespaces => Stage::ListingTablespaces,
                    Stage::Between { .. } | Stage::Stop => Stage::Stop,
                    _ => return Err(unexpected()),
                };
            }
            Message::DataRow(body) => self.take_row(&read_row(&body)?)?,
            Message::CopyOutResponse(_) => self.begin_copy(events)?,
            Message::CopyDone => self.end_copy(events)?,
            Message::CommandComplete(_) => {}
            Message::ReadyForQuery(_) => {
                let stop = self.stop.ok_or_else(|| CaptureError::protocol("the backup has no end position"))?;
                events.push_back(BackupEvent::End { stop });
                return Ok(true);
            }
            _ => return Err(unexpected()),
        }
        Ok(false)
    }

    fn take_row(&mut self, row: &Row) -> Result<(), CaptureError> {
        /// A cluster with more would list them in more than the 16 MiB that a message may have.
        const TABLESPACES_MAX: usize = 100_000;
        match self.stage {
            Stage::Start => {
                self.start = Some(position(row)?);
                self.stage = Stage::Tablespaces;
            }
            Stage::ListingTablespaces if self.tablespaces.len() < TABLESPACES_MAX => {
                let text = |index: usize| row.get(index).cloned().flatten();
                let oid = text(0).map(|_| parse(row, 0, "spcoid").map(Oid)).transpose()?;
                let location = text(1).map(|_| parse(row, 1, "spclocation")).transpose()?.unwrap_or_default();
                let size_kib = text(2).map(|_| parse(row, 2, "size")).transpose()?;
                self.tablespaces.push(Tablespace { oid, location, size_kib });
            }
            Stage::Stop => self.stop = Some(position(row)?),
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    fn begin(&mut self, events: &mut VecDeque<BackupEvent>) -> Result<(), CaptureError> {
        let start = self.start.ok_or_else(|| CaptureError::protocol("the backup has no start position"))?;
        events.push_back(BackupEvent::Begin { start, tablespaces: self.tablespaces.clone() });
        Ok(())
    }

    fn begin_copy(&mut self, events: &mut VecDeque<BackupEvent>) -> Result<(), CaptureError> {
        match self.stage {
            Stage::ListingTablespaces if self.one_copy => {
                self.begin(events)?;
                self.stage = Stage::Copy { inside: Inside::Nothing };
                Ok(())
            }
            Stage::ListingTablespaces => {
                self.begin(events)?;
                self.begin_archive(0, events);
                Ok(())
            }
            Stage::Between { archives } if archives <= self.tablespaces.len() => {
                self.begin_archive(archives, events);
                Ok(())
            }
            _ => Err(unexpected()),
        }
    }

    /// 14: the archives come in the order of their rows; the manifest, if any, comes after the last.
    fn begin_archive(&mut self, index: usize, events: &mut VecDeque<BackupEvent>) {
        events.push_back(match self.tablespaces.get(index) {
            Some(tablespace) => {
                BackupEvent::ArchiveBegin { name: tablespace.oid, location: tablespace.location.clone() }
            }
            None => BackupEvent::ManifestBegin,
        });
        self.stage = Stage::Archive { index };
    }

    fn end_copy(&mut self, events: &mut VecDeque<BackupEvent>) -> Result<(), CaptureError> {
        match self.stage {
            Stage::Copy { inside } => {
                if inside == Inside::Archive {
                    events.push_back(BackupEvent::ArchiveEnd);
                }
                self.stage = Stage::Stop;
            }
            Stage::Archive { index } => {
                if index < self.tablespaces.len() {
                    events.push_back(BackupEvent::Data(Bytes::from_static(&TAR_TRAILER)));
                    events.push_back(BackupEvent::ArchiveEnd);
                }
                self.stage = Stage::Between { archives: index + 1 };
            }
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    fn take_data(&mut self, mut payload: Bytes, events: &mut VecDeque<BackupEvent>) -> Result<(), CaptureError> {
        let inside = match self.stage {
            Stage::Archive { index } if index < self.tablespaces.len() => {
                events.push_back(BackupEvent::Data(payload));
                return Ok(());
            }
            Stage::Archive { .. } => {
                events.push_back(BackupEvent::ManifestData(payload));
                return Ok(());
            }
            Stage::Copy { inside } => inside,
            _ => return Err(unexpected()),
        };
        let kind = payload.try_get_u8().map_err(|_| unexpected())?;
        match (kind, inside) {
            (b'd', Inside::Archive) => events.push_back(BackupEvent::Data(payload)),
            (b'd', Inside::Manifest) => events.push_back(BackupEvent::ManifestData(payload)),
            (b'p', _) => events.push_back(BackupEvent::Progress(payload.try_get_u64().map_err(|_| unexpected())?)),
            (b'n' | b'm', Inside::Archive) => {
                events.push_back(BackupEvent::ArchiveEnd);
                self.stage = Stage::Copy { inside: Inside::Nothing };
                self.open(kind, payload, events)?;
            }
            (b'n' | b'm', Inside::Nothing) => self.open(kind, payload, events)?,
            _ => return Err(unexpected()),
        }
        Ok(())
    }

    /// 15+: an archive (`n`, file name, location) or the manifest (`m`) begins.
    fn open(&mut self, kind: u8, payload: Bytes, events: &mut VecDeque<BackupEvent>) -> Result<(), CaptureError> {
        if kind == b'm' {
            events.push_back(BackupEvent::ManifestBegin);
            self.stage = Stage::Copy { inside: Inside::Manifest };
            return Ok(());
        }
        let mut strings = payload.split(|&byte| byte == 0);
        let mut string = || strings.next().and_then(|s| std::str::from_utf8(s).ok());
        let (Some(file), Some(location)) = (string(), string()) else { return Err(unexpected()) };
        let name = match file.strip_suffix(".tar") {
            Some("base") => None,
            Some(oid) => Some(Oid(oid.parse().map_err(|_| archive_name(file))?)),
            None => return Err(archive_name(file)),
        };
        events.push_back(BackupEvent::ArchiveBegin { name, location: location.to_owned() });
        self.stage = Stage::Copy { inside: Inside::Archive };
        Ok(())
    }
}

fn archive_name(file: &str) -> CaptureError {
    CaptureError::protocol(format!("the backup holds an archive of the name `{file}`"))
}

fn position(row: &Row) -> Result<Position, CaptureError> {
    Ok(Position { lsn: parse(row, 0, "recptr")?, timeline: parse_timeline(row, 1)? })
}

fn unexpected() -> CaptureError {
    CaptureError::protocol("an unexpected message in a base backup")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::wire;
    use crate::pg::{Lsn, TimelineId};
    use bytes::BytesMut;
    use proptest::prelude::*;

    fn message(tag: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len() + 4).unwrap();
        [&[tag], length.to_be_bytes().as_slice(), body].concat()
    }

    fn row(columns: &[Option<&str>]) -> Vec<u8> {
        let mut body = u16::try_from(columns.len()).unwrap().to_be_bytes().to_vec();
        for column in columns {
            match column {
                Some(text) => {
                    body.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    body.extend(text.as_bytes());
                }
                None => body.extend((-1_i32).to_be_bytes()),
            }
        }
        message(b'D', &body)
    }

    const DESCRIPTION: &[u8] = &[0, 0];
    const COPY_OUT: &[u8] = &[0, 0, 0];

    fn head() -> Vec<u8> {
        [
            message(b'T', DESCRIPTION),
            row(&[Some("0/2000028"), Some("1")]),
            message(b'C', b"SELECT\0"),
            message(b'T', DESCRIPTION),
            row(&[Some("16400"), Some("/srv/fast"), Some("12")]),
            row(&[None, None, Some("30000")]),
            message(b'C', b"SELECT\0"),
        ]
        .concat()
    }

    fn tail() -> Vec<u8> {
        [
            message(b'T', DESCRIPTION),
            row(&[Some("0/2000138"), Some("1")]),
            message(b'C', b"SELECT\0"),
            message(b'C', b"BASE_BACKUP\0"),
            message(b'Z', b"I"),
        ]
        .concat()
    }

    fn read(one_copy: bool, bytes: &[u8]) -> Result<Vec<BackupEvent>, CaptureError> {
        let (mut buffer, mut reader) = (BytesMut::from(bytes), Reader::new(one_copy));
        let mut events = VecDeque::new();
        while let Some(frame) = wire::parse(&mut buffer, 1 << 20).map_err(CaptureError::Protocol)? {
            if reader.take(frame, &mut events)? {
                break;
            }
        }
        Ok(events.into())
    }

    /// Without progress, and with neighbouring data joined: what both framings have in common.
    fn essence(events: Vec<BackupEvent>) -> Vec<BackupEvent> {
        let mut joined: Vec<BackupEvent> = Vec::new();
        for event in events {
            match (joined.last_mut(), event) {
                (_, BackupEvent::Progress(_)) => {}
                (Some(BackupEvent::Data(before)), BackupEvent::Data(data)) => {
                    *before = [before.as_ref(), data.as_ref()].concat().into();
                }
                (_, event) => joined.push(event),
            }
        }
        joined
    }

    fn of_14() -> Vec<u8> {
        let copy = |data: &[u8]| [message(b'H', COPY_OUT), message(b'd', data), message(b'c', b"")].concat();
        [head(), copy(b"fast"), copy(b"base"), copy(b"{manifest}"), tail()].concat()
    }

    fn of_15() -> Vec<u8> {
        let data = |bytes: &[u8]| message(b'd', &[b"d", bytes].concat());
        [
            head(),
            message(b'H', COPY_OUT),
            message(b'd', b"n16400.tar\0/srv/fast\0"),
            data(b"fast"),
            message(b'd', &[b"p".as_slice(), &4_u64.to_be_bytes()].concat()),
            data(&[0; 1024]),
            message(b'd', b"nbase.tar\0\0"),
            data(b"base"),
            data(&[0; 1024]),
            message(b'd', b"m"),
            data(b"{manifest}"),
            message(b'c', b""),
            tail(),
        ]
        .concat()
    }

    #[test]
    fn both_framings_give_the_same_events() {
        let at = |lsn| Position { timeline: TimelineId::FIRST, lsn: Lsn::new(lsn) };
        let fast = Tablespace { oid: Some(Oid(16400)), location: "/srv/fast".to_owned(), size_kib: Some(12) };
        let base = Tablespace { oid: None, location: String::new(), size_kib: Some(30000) };
        let with_trailer = |data: &[u8]| BackupEvent::Data([data, &[0; 1024]].concat().into());
        let expected = [
            BackupEvent::Begin { start: at(0x200_0028), tablespaces: vec![fast, base] },
            BackupEvent::ArchiveBegin { name: Some(Oid(16400)), location: "/srv/fast".to_owned() },
            with_trailer(b"fast"),
            BackupEvent::ArchiveEnd,
            BackupEvent::ArchiveBegin { name: None, location: String::new() },
            with_trailer(b"base"),
            BackupEvent::ArchiveEnd,
            BackupEvent::ManifestBegin,
            BackupEvent::ManifestData(Bytes::from_static(b"{manifest}")),
            BackupEvent::End { stop: at(0x200_0138) },
        ];
        assert_eq!(essence(read(false, &of_14()).unwrap()), expected);
        assert_eq!(essence(read(true, &of_15()).unwrap()), expected);
    }

    #[test]
    fn a_backup_without_its_end_position_is_no_backup() {
        let cut: Vec<u8> = [head(), message(b'H', COPY_OUT), message(b'c', b""), message(b'Z', b"I")].concat();
        assert!(read(true, &cut).is_err());
        assert!(read(false, &[head(), message(b'Z', b"I")].concat()).is_err());
    }

    #[test]
    fn the_command_is_in_the_grammar_of_its_version() {
        let options = BaseBackupOptions {
            label: "it's".to_owned(),
            checkpoint: Checkpoint::Spread,
            max_rate_kib: Some(1024),
            ..BaseBackupOptions::default()
        };
        assert_eq!(
            options.command(14),
            "BASE_BACKUP LABEL 'it''s' PROGRESS NOWAIT TABLESPACE_MAP MAX_RATE 1024 NOVERIFY_CHECKSUMS MANIFEST 'yes'"
        );
        assert_eq!(
            options.command(18),
            "BASE_BACKUP (LABEL 'it''s', PROGRESS true, WAIT false, TABLESPACE_MAP true, CHECKPOINT 'spread', \
             VERIFY_CHECKSUMS false, MANIFEST 'yes', MAX_RATE 1024)"
        );
    }

    proptest! {
        #[test]
        fn no_damaged_backup_panics_the_reader(at in 0_usize..2000, with: u8, one_copy: bool) {
            let mut bytes = if one_copy { of_15() } else { of_14() };
            let length = bytes.len();
            if let Some(byte) = bytes.get_mut(at % length) {
                *byte = with;
            }
            let _ = read(one_copy, &bytes);
        }
    }
}
