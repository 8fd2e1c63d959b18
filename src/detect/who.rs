//! Who did it, how we know, and how sure that is.

use crate::pg::PgTime;

/// The session behind a transaction, as far as it is known. Texts are the server's own; a field that nobody could tell
/// is `None`.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Actor {
    /// The role in force (`current_user` of a guard's message, `usename` of the activity).
    pub role: Option<String>,
    /// The role that logged in, where it is told apart (`session_user`).
    pub session_user: Option<String>,
    /// The database's name.
    pub database: Option<String>,
    /// `application_name`.
    pub application: Option<String>,
    /// Address and port of the client; `local` for a Unix socket. Behind a pooler it is the pooler's.
    pub client: Option<String>,
    /// The backend's process id.
    pub pid: Option<i32>,
    /// `backend_type`: `client backend`, `logical replication worker` ...
    pub backend_type: Option<String>,
    /// When the session began: with the process id it names a session for good.
    pub backend_start: Option<PgTime>,
    /// When the transaction began.
    pub transaction_start: Option<PgTime>,
    /// The statement that ran, or the last one that did; cut at `track_activity_query_size`.
    pub query: Option<String>,
    /// The name of the prepared transaction.
    pub prepared: Option<String>,
}

/// How it is known who did it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhoSource {
    /// Nobody saw it.
    #[default]
    Unknown,
    /// A session of this kind was seen about then, but not with this very transaction: likely, not certain.
    Nearby,
    /// The session was seen in `pg_stat_activity` or `pg_prepared_xacts` with this transaction.
    Activity,
    /// The guard's message lies in the WAL, in the same transaction.
    Guard,
}

/// Who did it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Who {
    /// The session.
    pub actor: Actor,
    /// How it is known.
    pub source: WhoSource,
    /// What limits it, in a sentence: that the role lacks `pg_monitor`, that the transaction was over too soon ...
    pub note: Option<String>,
}
