//! The commands of the replication protocol, between streams.

use bytes::Bytes;
use postgres_protocol::message::backend::Message;

use super::base_backup::{BackupStream, BaseBackupOptions};
use super::connection::{Connection, Row, read_row};
use super::stream::WalStream;
use super::wire::Frame;
use super::{CaptureError, ConnInfo};
use crate::pg::{Lsn, Position, ServerVersion, SystemId, TimelineId};

/// What `IDENTIFY_SYSTEM` answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SystemInfo {
    /// The cluster.
    pub system_id: SystemId,
    /// The timeline that the server is on.
    pub timeline: TimelineId,
    /// How far its WAL is flushed (on a standby: replayed).
    pub flush_lsn: Lsn,
}

/// A physical replication slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SlotInfo {
    /// The oldest WAL that the slot holds; `None` if it holds none, because nothing was reserved or it was invalidated.
    pub restart: Option<Position>,
}

/// How long a logical slot lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotLife {
    /// As long as the connection, whose next command ends the export of its snapshot.
    Temporary,
    /// Until it is dropped. With `failover` it is handed on to standbys, from 17 on; before, it is as without.
    Kept {
        /// Handed on.
        failover: bool,
    },
}

/// A logical slot that was just made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogicalSlot {
    /// Transactions that commit at or behind this place are decoded; those that committed before it are what the snapshot
    /// sees.
    pub consistent: Lsn,
    /// The exported snapshot, for `SET TRANSACTION SNAPSHOT`, of a temporary slot.
    pub snapshot: Option<String>,
}

/// Whether something was made or was there before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// Made just now.
    New,
    /// There before.
    Exists,
}

/// How `START_REPLICATION` went.
#[derive(Debug)]
pub enum Start {
    /// WAL comes.
    Streaming(WalStream),
    /// The timeline ends where the stream should begin.
    EndOfTimeline {
        /// The connection, idle.
        walsender: Walsender,
        /// The next timeline, and where it branched off.
        next: Position,
    },
}

/// One replication connection, idle: no stream runs on it.
#[derive(Debug)]
pub struct Walsender {
    connection: Connection,
    version: ServerVersion,
    receive_timeout: std::time::Duration,
}

impl Walsender {
    /// Opens a replication connection: to the first host, in order, that answers and has the session that
    /// `target_session_attrs` asks for.
    ///
    /// # Errors
    /// [`CaptureError::Unreachable`] and [`CaptureError::Unavailable`] pass; [`CaptureError::Authentication`],
    /// [`CaptureError::NotPermitted`] and [`CaptureError::Tls`] want somebody; [`CaptureError::Unsupported`] for a
    /// server older than 14.
    pub async fn connect(config: &ConnInfo) -> Result<Self, CaptureError> {
        Self::of(Connection::open(config).await?, config)
    }

    fn of(connection: Connection, config: &ConnInfo) -> Result<Self, CaptureError> {
        let text = connection.parameter("server_version").unwrap_or_default();
        let version = ServerVersion::parse(text)
            .ok_or_else(|| CaptureError::protocol(format!("the server reports version `{text}`")))?;
        if version.major() < ServerVersion::MAJOR_MIN {
            return Err(CaptureError::Unsupported(format!("the server is PostgreSQL {version}, which is too old")));
        }
        Ok(Self { connection, version, receive_timeout: config.receive_timeout })
    }

    /// Opens a replication connection to the database of `config`, which can decode that database's WAL.
    ///
    /// # Errors
    /// As [`Walsender::connect`].
    pub async fn connect_to_database(config: &ConnInfo) -> Result<Self, CaptureError> {
        Self::of(Connection::open_database(config).await?, config)
    }

    /// The server's version.
    pub const fn server_version(&self) -> ServerVersion {
        self.version
    }

    /// The host and port that we are connected to.
    pub fn endpoint(&self) -> &str {
        self.connection.endpoint()
    }

    /// True if the connection is encrypted.
    pub const fn is_encrypted(&self) -> bool {
        self.connection.is_encrypted()
    }

    /// A parameter that the server reports without being asked, such as `in_hot_standby`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.connection.parameter(name)
    }

    /// Which cluster this is, and how far its WAL goes.
    ///
    /// # Errors
    /// If the connection breaks or the answer cannot be read.
    pub async fn identify_system(&mut self) -> Result<SystemInfo, CaptureError> {
        let rows = self.query("IDENTIFY_SYSTEM").await?;
        let row = only_row(&rows)?;
        let system_id: u64 = parse(row, 0, "systemid")?;
        Ok(SystemInfo {
            system_id: SystemId::new(system_id),
            timeline: parse_timeline(row, 1)?,
            flush_lsn: parse(row, 2, "xlogpos")?,
        })
    }

    /// The value of a setting, as `SHOW` prints it.
    ///
    /// # Errors
    /// [`CaptureError::Server`] if there is no such setting.
    pub async fn show(&mut self, name: &str) -> Result<String, CaptureError> {
        if name.is_empty() || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'.') {
            return Err(CaptureError::conninfo(format!("`{name}` is not the name of a setting")));
        }
        let rows = self.query(&format!("SHOW {name}")).await?;
        text(only_row(&rows)?, 0, name).map(str::to_owned)
    }

    /// The slot's state; `None` if there is no such slot.
    ///
    /// # Errors
    /// [`CaptureError::Unsupported`] before 15: ask `pg_replication_slots` over SQL instead. [`CaptureError::Server`] if
    /// the slot is a logical one.
    pub async fn read_slot(&mut self, slot: &str) -> Result<Option<SlotInfo>, CaptureError> {
        check_slot_name(slot)?;
        if self.version.major() < 15 {
            return Err(CaptureError::Unsupported(format!(
                "PostgreSQL {} cannot read a slot without SQL",
                self.version
            )));
        }
        let rows = self.query(&format!("READ_REPLICATION_SLOT {slot}")).await?;
        let row = only_row(&rows)?;
        match optional_text(row, 0, "slot_type")? {
            None => Ok(None),
            Some("physical") => {
                let restart = match optional_text(row, 1, "restart_lsn")? {
                    Some(_) => Some(Position { timeline: parse_timeline(row, 2)?, lsn: parse(row, 1, "restart_lsn")? }),
                    None => None,
                };
                Ok(Some(SlotInfo { restart }))
            }
            Some(other) => Err(CaptureError::Unsupported(format!("slot {slot} is {other}, not physical"))),
        }
    }

    /// Makes a physical slot that holds WAL from now on.
    ///
    /// # Errors
    /// [`CaptureError::NotPermitted`] without the REPLICATION attribute; [`CaptureError::Server`] with `53400` if
    /// `max_replication_slots` are in use.
    pub async fn create_physical_slot(&mut self, slot: &str) -> Result<Created, CaptureError> {
        check_slot_name(slot)?;
        match self.query(&format!("CREATE_REPLICATION_SLOT {slot} PHYSICAL RESERVE_WAL")).await {
            Ok(_) => Ok(Created::New),
            Err(CaptureError::Server(error)) if error.code == "42710" => Ok(Created::Exists),
            Err(error) => Err(error),
        }
    }

    /// Makes a slot that decodes the WAL of this connection's database with `pgoutput`. This waits until the transactions
    /// that are open now have ended, however long that takes.
    ///
    /// # Errors
    /// [`CaptureError::NotPermitted`] without the REPLICATION attribute; [`CaptureError::Server`] with `53400` if
    /// `max_replication_slots` are in use, with `42710` if there is such a slot, with `55000` if `wal_level` is not
    /// `logical`.
    pub async fn create_logical_slot(&mut self, slot: &str, life: SlotLife) -> Result<LogicalSlot, CaptureError> {
        check_slot_name(slot)?;
        // The words before 15, as far as they do; later servers know them, too.
        let (kind, options) = match life {
            SlotLife::Temporary => ("TEMPORARY LOGICAL", "EXPORT_SNAPSHOT"),
            SlotLife::Kept { failover: true } if self.knows_failover() => ("LOGICAL", "(SNAPSHOT 'nothing', FAILOVER)"),
            SlotLife::Kept { .. } => ("LOGICAL", "NOEXPORT_SNAPSHOT"),
        };
        let command = format!("CREATE_REPLICATION_SLOT {slot} {kind} pgoutput {options}");
        // No limit: a transaction that somebody forgot is waited for.
        let rows = self.connection.query(&command).await?;
        let row = only_row(&rows)?;
        Ok(LogicalSlot {
            consistent: parse(row, 1, "consistent_point")?,
            snapshot: optional_text(row, 2, "snapshot_name")?.map(str::to_owned),
        })
    }

    /// True if the server hands logical slots on to its standbys.
    pub fn knows_failover(&self) -> bool {
        self.server_version().major() >= 17
    }

    /// Has a logical slot handed on to standbys, or no longer, where the server can.
    ///
    /// # Errors
    /// [`CaptureError::NotPermitted`], [`CaptureError::SlotInUse`], [`CaptureError::Server`].
    pub async fn set_failover(&mut self, slot: &str, failover: bool) -> Result<(), CaptureError> {
        check_slot_name(slot)?;
        self.query(&format!("ALTER_REPLICATION_SLOT {slot} (FAILOVER {failover})")).await.map(drop)
    }

    /// Starts to stream decoded changes of the transactions that commit at or behind `from`, or behind what the slot has
    /// been told before if that is later. The messages are those of `pgoutput`, protocol 2, with the changes of large
    /// transactions before their commit.
    ///
    /// # Errors
    /// [`CaptureError::SlotInUse`] passes; [`CaptureError::SlotMissing`] and [`CaptureError::WalRemoved`] (the slot was
    /// invalidated) want a decision.
    pub async fn start_logical(
        mut self,
        slot: &str,
        from: Lsn,
        publications: &[String],
    ) -> Result<WalStream, CaptureError> {
        check_slot_name(slot)?;
        let quoted = |name: &String| format!("\"{}\"", name.replace('"', "\"\""));
        let names = publications.iter().map(quoted).collect::<Vec<_>>().join(",").replace('\'', "''");
        let command = format!(
            "START_REPLICATION SLOT {slot} LOGICAL {from} (proto_version '2', streaming 'on', messages 'true', \
             publication_names '{names}')"
        );
        let limit = self.receive_timeout;
        match tokio::time::timeout(limit, self.begin_stream(&command)).await {
            Ok(Ok(None)) => Ok(WalStream::of_changes(self, from)),
            Ok(Ok(Some(_))) => Err(CaptureError::protocol("a stream of changes ends with a timeline")),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(CaptureError::silent(self.endpoint(), "start the stream", limit)),
        }
    }

    /// Drops a slot: the server no longer holds WAL for it.
    ///
    /// # Errors
    /// [`CaptureError::SlotMissing`], [`CaptureError::SlotInUse`].
    pub async fn drop_slot(&mut self, slot: &str) -> Result<(), CaptureError> {
        check_slot_name(slot)?;
        self.query(&format!("DROP_REPLICATION_SLOT {slot}")).await.map(drop)
    }

    /// The history file of a timeline: its name and its content, verbatim. Timeline 1 has none.
    ///
    /// # Errors
    /// [`CaptureError::Server`] if the server has no such file.
    pub async fn timeline_history(&mut self, timeline: TimelineId) -> Result<(String, Bytes), CaptureError> {
        let rows = self.query(&format!("TIMELINE_HISTORY {timeline}")).await?;
        let row = only_row(&rows)?;
        let content = row.get(1).cloned().flatten().ok_or_else(|| missing("content"))?;
        Ok((text(row, 0, "filename")?.to_owned(), content))
    }

    /// Starts to stream WAL from a position on its timeline, which may be an older one than the server's. With a slot, the
    /// slot is held by this connection and advances with the feedback.
    ///
    /// # Errors
    /// [`CaptureError::SlotInUse`] passes. [`CaptureError::SlotMissing`], [`CaptureError::WalRemoved`] (the slot was
    /// invalidated) and [`CaptureError::Diverged`] want a decision. The server looks at the WAL itself only after it said
    /// that the stream begins: [`CaptureError::AheadOfServer`], and [`CaptureError::WalRemoved`] for segments that are
    /// gone, come from the stream's first [`next`](WalStream::next).
    pub async fn start_physical(mut self, slot: Option<&str>, from: Position) -> Result<Start, CaptureError> {
        let slot = match slot {
            Some(slot) => {
                check_slot_name(slot)?;
                format!("SLOT {slot} ")
            }
            None => String::new(),
        };
        let command = format!("START_REPLICATION {slot}PHYSICAL {} TIMELINE {}", from.lsn, from.timeline);
        let limit = self.receive_timeout;
        let next = match tokio::time::timeout(limit, self.begin_stream(&command)).await {
            Ok(result) => result?,
            Err(_) => return Err(CaptureError::silent(self.endpoint(), "start the stream", limit)),
        };
        Ok(match next {
            None => Start::Streaming(WalStream::new(self, from)),
            Some(next) => Start::EndOfTimeline { walsender: self, next },
        })
    }

    /// Sends the command; `None` if WAL comes, or the next timeline if there is none left of this one.
    async fn begin_stream(&mut self, command: &str) -> Result<Option<Position>, CaptureError> {
        self.connection.send_query(command).await?;
        let mut next = None;
        loop {
            match self.connection.receive().await? {
                Frame::CopyBoth => return Ok(None),
                Frame::Message(Message::DataRow(body)) => next = Some(next_timeline(&read_row(&body)?)?),
                Frame::Message(Message::RowDescription(_) | Message::CommandComplete(_)) => {}
                Frame::Message(Message::ReadyForQuery(_)) => {
                    let ended = CaptureError::protocol("START_REPLICATION ended without a stream");
                    return next.ok_or(ended).map(Some);
                }
                _ => return Err(CaptureError::protocol("an unexpected message in the answer to START_REPLICATION")),
            }
        }
    }

    /// Starts a base backup. The first event comes when the server's checkpoint is done.
    ///
    /// # Errors
    /// [`CaptureError::Server`] if the server cannot (`wal_level`, a backup's label that is too long).
    pub async fn base_backup(self, options: &BaseBackupOptions) -> Result<BackupStream, CaptureError> {
        BackupStream::start(self, options).await
    }

    pub(super) const fn receive_timeout(&self) -> std::time::Duration {
        self.receive_timeout
    }

    pub(super) fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// A command with a short answer: a server that leaves it open is gone.
    async fn query(&mut self, command: &str) -> Result<Vec<Row>, CaptureError> {
        let limit = self.receive_timeout;
        match tokio::time::timeout(limit, self.connection.query(command)).await {
            Ok(result) => result,
            Err(_) => Err(CaptureError::silent(self.endpoint(), "answer", limit)),
        }
    }
}

/// The row that ends a timeline: `next_tli int8, next_tli_startpos text`.
pub(super) fn next_timeline(row: &Row) -> Result<Position, CaptureError> {
    Ok(Position { timeline: parse_timeline(row, 0)?, lsn: parse(row, 1, "next_tli_startpos")? })
}

/// `[a-z0-9_]{1,63}`, the names that Postgres allows (`ReplicationSlotValidateName`): they need no quotes.
fn check_slot_name(slot: &str) -> Result<(), CaptureError> {
    let plain = slot.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if plain && (1..=63).contains(&slot.len()) {
        return Ok(());
    }
    Err(CaptureError::conninfo(format!(
        "slot = \"{slot}\": a slot's name has 1 to 63 lower-case letters, digits and underscores"
    )))
}

fn only_row(rows: &[Row]) -> Result<&Row, CaptureError> {
    match rows {
        [row] => Ok(row),
        _ => Err(CaptureError::protocol(format!("expected one row, got {}", rows.len()))),
    }
}

fn missing(column: &str) -> CaptureError {
    CaptureError::protocol(format!("column {column} is missing or NULL"))
}

fn optional_text<'a>(row: &'a Row, index: usize, column: &str) -> Result<Option<&'a str>, CaptureError> {
    match row.get(index).ok_or_else(|| missing(column))? {
        None => Ok(None),
        Some(bytes) => std::str::from_utf8(bytes)
            .map(Some)
            .map_err(|_| CaptureError::protocol(format!("column {column} is not UTF-8"))),
    }
}

pub(super) fn text<'a>(row: &'a Row, index: usize, column: &str) -> Result<&'a str, CaptureError> {
    optional_text(row, index, column)?.ok_or_else(|| missing(column))
}

pub(super) fn parse<T: std::str::FromStr>(row: &Row, index: usize, column: &str) -> Result<T, CaptureError> {
    let text = text(row, index, column)?;
    text.parse().map_err(|_| CaptureError::protocol(format!("column {column} has the value `{text}`")))
}

pub(super) fn parse_timeline(row: &Row, index: usize) -> Result<TimelineId, CaptureError> {
    let number: u32 = parse(row, index, "timeline")?;
    TimelineId::new(number).ok_or_else(|| CaptureError::protocol("timeline 0"))
}
