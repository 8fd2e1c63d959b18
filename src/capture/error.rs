//! What can go wrong between us and the server, and what to do about it.

use std::fmt;
use std::io;

use postgres_protocol::message::backend::ErrorResponseBody;

use crate::pg::SystemId;

/// An error as the server told it.
///
/// (PostgreSQL's documentation, "Error and Notice Message Fields".)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`, not translated.
    pub severity: String,
    /// The SQLSTATE, five characters.
    pub code: String,
    /// What happened, in the server's language.
    pub message: String,
    /// More about it; may be empty.
    pub detail: String,
    /// The server's own advice; may be empty.
    pub hint: String,
    /// The C function that raised it: the one field that tells errors of one SQLSTATE apart in any language.
    pub routine: String,
}

impl fmt::Display for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.detail.is_empty() {
            write!(f, " ({})", self.detail)?;
        }
        if !self.code.is_empty() {
            write!(f, " [{}]", self.code)?;
        }
        Ok(())
    }
}

impl ServerError {
    /// Reads an ErrorResponse. Fields that cannot be read stay empty: half an error is better than none.
    pub(super) fn read(body: &ErrorResponseBody) -> Self {
        use fallible_iterator::FallibleIterator;
        let mut error = Self::default();
        let mut fields = body.fields();
        while let Ok(Some(field)) = fields.next() {
            let value = String::from_utf8_lossy(field.value_bytes()).into_owned();
            match field.type_() {
                b'V' => error.severity = value,
                b'S' if error.severity.is_empty() => error.severity = value,
                b'C' => error.code = value,
                b'M' => error.message = value,
                b'D' => error.detail = value,
                b'H' => error.hint = value,
                b'R' => error.routine = value,
                _ => {}
            }
        }
        error
    }
}

impl From<&tokio_postgres::error::DbError> for ServerError {
    fn from(error: &tokio_postgres::error::DbError) -> Self {
        Self {
            severity: error.severity().to_owned(),
            code: error.code().code().to_owned(),
            message: error.message().to_owned(),
            detail: error.detail().unwrap_or_default().to_owned(),
            hint: error.hint().unwrap_or_default().to_owned(),
            routine: error.routine().unwrap_or_default().to_owned(),
        }
    }
}

/// Why the cluster could not be reached, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The connection string, or a file that it names, cannot be used.
    #[error("{problem}")]
    Conninfo {
        /// What is wrong, with the key's name.
        problem: String,
    },
    /// No connection, or the connection broke. Passes when the network or the server is back.
    #[error("{what}")]
    Unreachable {
        /// Who could not be reached, and how it failed.
        what: String,
        /// What the operating system said.
        source: Option<io::Error>,
    },
    /// The server is there but does not serve us now: it starts, stops, has no free place, or is not the kind of session
    /// that `target_session_attrs` asks for. Passes.
    #[error("{0}")]
    Unavailable(Box<ServerError>),
    /// No host of the list offers the session that `target_session_attrs` asks for. Passes after a failover.
    #[error("no host offers a session with target_session_attrs={wanted}: {found}")]
    NoSuitableHost {
        /// The value of `target_session_attrs`.
        wanted: &'static str,
        /// What each host was.
        found: String,
    },
    /// The server does not let us in: password, `pg_hba.conf`, unknown role.
    #[error("{endpoint}: {error}")]
    Authentication {
        /// The host and port.
        endpoint: String,
        /// What the server said, or what we found.
        error: Box<ServerError>,
    },
    /// We are in, but the role may not do this.
    #[error("{0}")]
    NotPermitted(Box<ServerError>),
    /// Another connection streams from the slot. Passes when it ends: a connection of a killed agent lives on in the
    /// server until `wal_sender_timeout`.
    #[error("{0}")]
    SlotInUse(Box<ServerError>),
    /// There is no such slot.
    #[error("{0}")]
    SlotMissing(Box<ServerError>),
    /// The WAL that we ask for is gone from the server, or the slot no longer holds it: there will be a gap.
    #[error("{0}")]
    WalRemoved(Box<ServerError>),
    /// We ask for WAL past the server's end: it lost what it had sent before, or it is another server.
    #[error("{0}")]
    AheadOfServer(Box<ServerError>),
    /// Our timeline and position are not in the server's history: it was promoted from a point before what we hold.
    #[error("{0}")]
    Diverged(Box<ServerError>),
    /// The connection leads to another cluster than before.
    #[error("connected to cluster {found}, but this is the archive of cluster {expected}")]
    WrongServer {
        /// The cluster whose WAL we keep.
        expected: SystemId,
        /// The cluster that answered.
        found: SystemId,
    },
    /// What came over the connection is not the protocol.
    #[error("protocol: {0}")]
    Protocol(String),
    /// TLS could not be set up, or the certificate does not prove that this is the server.
    #[error("TLS with {endpoint}: {problem}")]
    Tls {
        /// The host and port.
        endpoint: String,
        /// What failed.
        problem: String,
    },
    /// This server version cannot do it.
    #[error("{0}")]
    Unsupported(String),
    /// Any other error of the server.
    #[error("{0}")]
    Server(Box<ServerError>),
}

impl CaptureError {
    pub(super) fn protocol(problem: impl Into<String>) -> Self {
        Self::Protocol(problem.into())
    }

    pub(super) fn conninfo(problem: impl Into<String>) -> Self {
        Self::Conninfo { problem: problem.into() }
    }

    pub(super) fn lost(endpoint: &str, source: io::Error) -> Self {
        Self::Unreachable { what: format!("the connection to {endpoint} broke"), source: Some(source) }
    }

    /// A connection that was lost before the server let us in: if it was TLS that ended it, it will again. (Later, a TLS
    /// error is damage on the way, and passes.)
    pub(super) fn lost_at_start(endpoint: &str, source: io::Error) -> Self {
        match source.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(error) => Self::Tls { endpoint: endpoint.to_owned(), problem: error.to_string() },
            None => Self::lost(endpoint, source),
        }
    }

    /// Nothing was heard for too long.
    pub(super) fn silent(endpoint: &str, doing: &str, limit: std::time::Duration) -> Self {
        Self::Unreachable { what: format!("{endpoint} did not {doing} within {} s", limit.as_secs_f32()), source: None }
    }

    /// Sorts an error of the server by what a caller does about it.
    pub(super) fn from_server(endpoint: &str, error: ServerError) -> Self {
        let error = Box::new(error);
        let says = |text: &str| error.message.contains(text);
        match error.code.as_str() {
            // invalid_password, invalid_authorization_specification
            "28P01" | "28000" => Self::Authentication { endpoint: endpoint.to_owned(), error },
            "42501" => Self::NotPermitted(error),
            // cannot_connect_now, admin_shutdown, crash_shutdown, too_many_connections
            "57P03" | "57P01" | "57P02" | "53300" => Self::Unavailable(error),
            "55006" => Self::SlotInUse(error),
            "42704" => Self::SlotMissing(error),
            // object_not_in_prerequisite_state: a slot that max_slot_wal_keep_size or a timeout invalidated
            "55000" if error.routine == "ReplicationSlotAcquire" || says("invalidated") => Self::WalRemoved(error),
            "58P01" | "XX000" if error.routine == "WalSndSegmentOpen" || says("has already been removed") => {
                Self::WalRemoved(error)
            }
            // Both are raised by StartReplication without an SQLSTATE; only the second has a detail.
            "XX000" if says("is ahead of the WAL flush position") => Self::AheadOfServer(error),
            "XX000" if says("is not in this server's history") => Self::Diverged(error),
            "XX000" if error.routine == "StartReplication" && error.detail.is_empty() => Self::AheadOfServer(error),
            "XX000" if error.routine == "StartReplication" => Self::Diverged(error),
            _ => Self::Server(error),
        }
    }

    /// True if the same attempt may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. } | Self::Unavailable(_) | Self::NoSuitableHost { .. } | Self::SlotInUse(_)
        )
    }

    /// What the server said, if it was the server that refused.
    pub fn server(&self) -> Option<&ServerError> {
        match self {
            Self::Unavailable(error)
            | Self::Authentication { error, .. }
            | Self::NotPermitted(error)
            | Self::SlotInUse(error)
            | Self::SlotMissing(error)
            | Self::WalRemoved(error)
            | Self::AheadOfServer(error)
            | Self::Diverged(error)
            | Self::Server(error) => Some(error),
            _ => None,
        }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        let text = match self {
            Self::Conninfo { .. } => {
                "a connection string looks like postgresql://walguard@db1:5432/?sslmode=verify-full or \
                 \"host=db1 user=walguard\""
            }
            Self::Unreachable { .. } => {
                "check that the server runs and listens there (listen_addresses, port, firewall): \
                 pg_isready -h HOST -p PORT"
            }
            Self::Unavailable(error) => match error.code.as_str() {
                "53300" if error.routine == "InitWalSenderSlot" || error.message.contains("wal_senders") => {
                    "raise max_wal_senders (needs a restart), or end a stale walsender: \
                     SELECT pid, application_name, client_addr, state FROM pg_stat_replication"
                }
                "53300" => "raise max_connections or superuser_reserved_connections, or end idle sessions",
                _ => "the server starts or stops; walguard goes on when it is ready",
            },
            Self::NoSuitableHost { .. } => {
                "wait for the promotion of a standby, list all hosts of the cluster, or ask for another session with \
                 target_session_attrs"
            }
            Self::Authentication { error, .. } => return Some(authentication_hint(error)),
            Self::NotPermitted(error) => {
                if error.message.contains("pg_") || error.routine.starts_with("aclcheck") {
                    "grant what `walguard init --print-sql` prints"
                } else {
                    "give the role the attribute: ALTER ROLE <role> REPLICATION"
                }
            }
            Self::SlotInUse(_) => {
                "another agent or a dying connection streams from this slot; see \
                 SELECT slot_name, active_pid FROM pg_replication_slots; one slot serves one agent"
            }
            Self::SlotMissing(_) => {
                "create the slot with `walguard init`, or name the existing one as `slot` in [postgres]"
            }
            Self::WalRemoved(_) => {
                "take a new base backup (`walguard backup`); to keep it from happening again, let the slot hold more WAL \
                 (max_slot_wal_keep_size)"
            }
            Self::AheadOfServer(_) => {
                "the server is behind what is archived: was it restored from a backup, or is this a standby that lags? Point \
                 walguard at the primary, or give a restored cluster its own name (--cluster)"
            }
            Self::Diverged(_) => {
                "the server was promoted from a point before what is archived; the archive follows the new timeline from \
                 the switch point. If this is a cluster restored from a backup, give it its own name (--cluster)"
            }
            Self::WrongServer { .. } => {
                "check the connection string; another cluster needs another name (--cluster), so that it gets its own place \
                 in the repository"
            }
            Self::Protocol(_) => {
                "is this a PostgreSQL server, without a connection pooler in between? Poolers do not pass replication on"
            }
            Self::Tls { problem, .. } if problem.contains("does not offer TLS") => {
                "switch TLS on in the server (ssl = on), or say sslmode=disable if the network is trusted"
            }
            Self::Tls { problem, .. } if problem.contains("fatal alert") => {
                "the server refuses what we offer; if it is our certificate (sslcert), the CA that signed it must be in the \
                 server's ssl_ca_file"
            }
            Self::Tls { .. } => {
                "name the CA that signed the server's certificate with sslrootcert=FILE; sslmode=verify-ca leaves the host \
                 name out, sslmode=require leaves verification out"
            }
            Self::Unsupported(_) => "walguard works with PostgreSQL 14 to 18",
            Self::Server(error) => match error.code.as_str() {
                "53400" => "raise max_replication_slots (needs a restart), or drop a slot that nobody uses",
                "55000" if error.message.contains("wal_level") || error.routine == "CheckSlotRequirements" => {
                    "set wal_level = replica (needs a restart)"
                }
                "3D000" => "name an existing database in the connection string (dbname=postgres)",
                _ if !error.hint.is_empty() => return Some(error.hint.clone()),
                _ => return None,
            },
        };
        Some(text.to_owned())
    }
}

fn authentication_hint(error: &ServerError) -> String {
    if error.code == "28P01" {
        return "check the password (password_file in [postgres], PGPASSWORD, ~/.pgpass) and the role's: \\password <role>"
            .to_owned();
    }
    // pg_hba.conf is decided in ClientAuthentication, before the role is looked at.
    if error.routine == "ClientAuthentication" || error.message.contains("pg_hba.conf") {
        return "add a line to pg_hba.conf and reload: hostssl replication <role> <address>/32 scram-sha-256 \
                (replication is a keyword of its own: `all` does not cover it)"
            .to_owned();
    }
    "create the role: CREATE ROLE <role> LOGIN REPLICATION PASSWORD '...'; `walguard init --print-sql` prints it"
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(code: &str, routine: &str, message: &str, detail: &str) -> CaptureError {
        let [code, routine, message, detail] = [code, routine, message, detail].map(str::to_owned);
        let error = ServerError { code, routine, message, detail, ..ServerError::default() };
        CaptureError::from_server("db1:5432", error)
    }

    #[test]
    fn errors_are_told_apart_in_any_language() {
        let gone = sorted("58P01", "WalSndSegmentOpen", "das angeforderte WAL-Segment wurde schon entfernt", "");
        assert!(matches!(gone, CaptureError::WalRemoved(_)));
        let ahead = sorted("XX000", "StartReplication", "angeforderter Startpunkt ist vor der WAL-Flush-Position", "");
        assert!(matches!(ahead, CaptureError::AheadOfServer(_)));
        let forked = sorted("XX000", "StartReplication", "nicht in der History dieses Servers", "ab Zeitleiste 1");
        assert!(matches!(forked, CaptureError::Diverged(_)));
        let hba = sorted("28000", "ClientAuthentication", "kein pg_hba-Eintrag", "");
        assert!(hba.hint().is_some_and(|hint| hint.contains("replication <role>")));
        assert!(matches!(sorted("58P01", "BasicOpenFile", "no such file", ""), CaptureError::Server(_)));
    }

    #[test]
    fn what_passes_is_tried_again_and_what_stays_is_not() {
        for code in ["57P01", "57P02", "57P03", "53300", "55006"] {
            assert!(sorted(code, "", "", "").is_transient(), "{code}");
        }
        for code in ["28P01", "28000", "42501", "42704", "53400", "XX000"] {
            assert!(!sorted(code, "", "", "").is_transient(), "{code}");
        }
    }
}
