//! [`ConnInfo`] -> a session: the right host, dialled, encrypted and authenticated.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::future::{Ready, ready};
use std::io;

use bytes::{Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::message::backend::{DataRowBody, Message};
use postgres_protocol::message::frontend;
use tokio_postgres::tls::{ChannelBinding as SqlChannelBinding, TlsConnect, TlsStream};

use super::authentication::Credentials;
use super::conninfo::{ChannelBinding, ConnInfo, Host, SslMode, TargetSessionAttrs};
use super::dial::{self, Address, Encryption, Transport, dial};
use super::wire::{Frame, Wire};
use super::{CaptureError, ServerError};

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// A walsender, physical replication.
    Replication,
    /// A walsender that hangs on a database. It does all that the other does, but `pg_hba.conf` lets it in by the lines of
    /// that database instead of those of `replication`.
    ReplicationByDatabase,
    /// Plain SQL.
    Sql,
}

enum Session {
    Walsender(Box<Connection>),
    Sql(tokio_postgres::Client, BTreeMap<&'static str, String>),
}

impl Session {
    fn parameter(&self, name: &str) -> Option<&str> {
        match self {
            Self::Walsender(connection) => connection.parameter(name),
            Self::Sql(_, parameters) => parameters.get(name).map(String::as_str),
        }
    }

    /// What kind of session this is, by the parameters that a server (14+) reports without being asked.
    fn suits(&self, wanted: TargetSessionAttrs) -> bool {
        let standby = self.parameter("in_hot_standby") == Some("on");
        let read_only = standby || self.parameter("default_transaction_read_only") == Some("on");
        match wanted {
            TargetSessionAttrs::Any => true,
            TargetSessionAttrs::ReadWrite => !read_only,
            TargetSessionAttrs::ReadOnly => read_only,
            TargetSessionAttrs::Primary => !standby,
            TargetSessionAttrs::Standby | TargetSessionAttrs::PreferStandby => standby,
        }
    }
}

/// Opens an SQL connection to the host that `info` asks for, with the credentials and TLS of the replication connection.
/// Its task ends with the client.
///
/// # Errors
/// As [`Walsender::connect`](super::Walsender::connect).
pub async fn connect_sql(info: &ConnInfo) -> Result<tokio_postgres::Client, CaptureError> {
    match first_suitable(info, Purpose::Sql).await? {
        Session::Sql(client, _) => Ok(client),
        Session::Walsender(_) => unreachable!("asked for SQL"),
    }
}

/// Tries the hosts in order, and each host's addresses in order, until one has the session that is wanted.
async fn first_suitable(info: &ConnInfo, purpose: Purpose) -> Result<Session, CaptureError> {
    let mut hosts: Vec<&Host> = info.hosts.iter().collect();
    if info.shuffle_hosts {
        fastrand::shuffle(&mut hosts);
    }
    let wanted = info.target_session_attrs;
    match try_hosts(info, &hosts, purpose, wanted).await {
        Err(CaptureError::NoSuitableHost { .. }) if wanted == TargetSessionAttrs::PreferStandby => {
            try_hosts(info, &hosts, purpose, TargetSessionAttrs::Any).await
        }
        result => result,
    }
}

async fn try_hosts(
    info: &ConnInfo,
    hosts: &[&Host],
    purpose: Purpose,
    wanted: TargetSessionAttrs,
) -> Result<Session, CaptureError> {
    let mut failures: Vec<CaptureError> = Vec::new();
    let mut unsuitable = Vec::new();
    for host in hosts {
        let addresses = match dial::addresses(host).await {
            Ok(addresses) => addresses,
            Err(error) => {
                failures.push(error);
                continue;
            }
        };
        for address in addresses {
            match open(info, host, &address, purpose).await {
                Ok(session) if session.suits(wanted) => return Ok(session),
                Ok(session) => {
                    let standby = session.parameter("in_hot_standby") == Some("on");
                    unsuitable.push(format!("{host} is {}", if standby { "a standby" } else { "a primary" }));
                    break; // another address of the same host is the same server
                }
                // The credentials are the same for all hosts: whoever refuses them ends the search, as in libpq.
                Err(error) if !error.is_transient() && !matches!(error, CaptureError::Tls { .. }) => return Err(error),
                Err(error) => failures.push(error),
            }
        }
    }
    if !unsuitable.is_empty() {
        unsuitable.extend(failures.iter().map(|error| crate::backoff::Chain(error).to_string()));
        return Err(CaptureError::NoSuitableHost { wanted: wanted.as_str(), found: unsuitable.join("; ") });
    }
    // The most telling one: what wants somebody, then what a server said, then all that the network said.
    let lasting = failures.iter().position(|error| !error.is_transient());
    if let Some(index) = lasting.or_else(|| failures.iter().position(|error| error.server().is_some())) {
        return Err(failures.swap_remove(index));
    }
    match failures.pop() {
        Some(only) if failures.is_empty() => Err(only),
        Some(last) => {
            failures.push(last);
            let all: Vec<String> = failures.iter().map(|error| crate::backoff::Chain(error).to_string()).collect();
            Err(CaptureError::Unreachable { what: all.join("; "), source: None })
        }
        None => Err(CaptureError::Unreachable { what: format!("{info}: no address"), source: None }),
    }
}

/// One address, with the encryptions that the mode allows.
async fn open(info: &ConnInfo, host: &Host, address: &Address, purpose: Purpose) -> Result<Session, CaptureError> {
    let mut first_failure = None;
    for &encryption in dial::encryptions(info.ssl_mode(host)) {
        let attempt = open_once(info, host, address, purpose, encryption);
        let result = match info.connect_timeout {
            Some(limit) => tokio::time::timeout(limit, attempt)
                .await
                .unwrap_or_else(|_| Err(CaptureError::silent(&host.to_string(), "let us in (connect_timeout)", limit))),
            None => attempt.await,
        };
        match result {
            Ok(session) => return Ok(session),
            // pg_hba.conf may tell `hostssl` from `hostnossl`, and TLS may fail where plain text will do.
            Err(error) if matches!(error, CaptureError::Tls { .. }) || is_hba_rejection(&error) => {
                first_failure.get_or_insert(error);
            }
            // What passes is the news: an earlier refusal would end the search for good.
            Err(error) if error.is_transient() => return Err(error),
            Err(error) => return Err(first_failure.unwrap_or(error)),
        }
    }
    Err(first_failure.unwrap_or_else(|| CaptureError::protocol("no way to connect")))
}

fn is_hba_rejection(error: &CaptureError) -> bool {
    matches!(error, CaptureError::Authentication { error, .. }
        if error.code == "28000" && (error.routine == "ClientAuthentication" || error.message.contains("pg_hba.conf")))
}

async fn open_once(
    info: &ConnInfo,
    host: &Host,
    address: &Address,
    purpose: Purpose,
    encryption: Encryption,
) -> Result<Session, CaptureError> {
    let transport = dial(info, host, address, encryption).await?;
    match purpose {
        Purpose::Sql => start_sql(info, host, transport).await,
        Purpose::Replication | Purpose::ReplicationByDatabase => {
            let by_database = purpose == Purpose::ReplicationByDatabase;
            let connection = Connection::start(info, host, transport, by_database).await?;
            Ok(Session::Walsender(Box::new(connection)))
        }
    }
}

/// The stream is dialled and encrypted already: this only tells tokio-postgres of the channel binding.
struct Encrypted {
    server_end_point: Option<Vec<u8>>,
}

/// A stream with its channel binding.
struct Bound {
    transport: Transport,
    server_end_point: Option<Vec<u8>>,
}

impl TlsConnect<Transport> for Encrypted {
    type Stream = Bound;
    type Error = Infallible;
    type Future = Ready<Result<Bound, Infallible>>;

    fn connect(self, transport: Transport) -> Self::Future {
        ready(Ok(Bound { transport, server_end_point: self.server_end_point }))
    }
}

impl TlsStream for Bound {
    fn channel_binding(&self) -> SqlChannelBinding {
        match &self.server_end_point {
            Some(hash) => SqlChannelBinding::tls_server_end_point(hash.clone()),
            None => SqlChannelBinding::none(),
        }
    }
}

impl tokio::io::AsyncRead for Bound {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buffer: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().transport).poll_read(cx, buffer)
    }
}

impl tokio::io::AsyncWrite for Bound {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        bytes: &[u8],
    ) -> std::task::Poll<io::Result<usize>> {
        std::pin::Pin::new(&mut self.get_mut().transport).poll_write(cx, bytes)
    }

    fn poll_flush(self: std::pin::Pin<&mut Self>, cx: &mut std::task::Context<'_>) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().transport).poll_flush(cx)
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<io::Result<()>> {
        std::pin::Pin::new(&mut self.get_mut().transport).poll_shutdown(cx)
    }
}

async fn start_sql(info: &ConnInfo, host: &Host, transport: Transport) -> Result<Session, CaptureError> {
    use tokio_postgres::config::{ChannelBinding as Binding, SslMode as Tls, SslNegotiation};
    let mut config = tokio_postgres::Config::new();
    config.user(&info.user).dbname(&info.dbname).application_name(&info.application_name);
    // "Direct" TLS: tokio-postgres then asks the server nothing and takes the stream that we made.
    config.ssl_mode(Tls::Require).ssl_negotiation(SslNegotiation::Direct);
    config.channel_binding(match info.tls.channel_binding {
        ChannelBinding::Disable => Binding::Disable,
        ChannelBinding::Prefer => Binding::Prefer,
        ChannelBinding::Require => Binding::Require,
    });
    if let Some(options) = &info.options {
        config.options(options);
    }
    if let Some(password) = info.password_for(host, &info.dbname)? {
        config.password(password.reveal());
    }
    let tls = Encrypted { server_end_point: transport.server_end_point() };
    let (client, connection) =
        config.connect_raw(transport, tls).await.map_err(|error| sql_error(&host.to_string(), error))?;
    let reported = ["in_hot_standby", "default_transaction_read_only"];
    let parameters = reported.iter().filter_map(|name| Some((*name, connection.parameter(name)?.to_owned()))).collect();
    let endpoint = host.to_string();
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            // Whoever uses the client is told the same: this is only for those who look closer.
            tracing::debug!("SQL connection to {endpoint} ended: {error}");
        }
    });
    Ok(Session::Sql(client, parameters))
}

/// Sorts an error of tokio-postgres like one of our own connection.
pub(crate) fn sql_error(endpoint: &str, error: tokio_postgres::Error) -> CaptureError {
    if let Some(told) = error.as_db_error() {
        return CaptureError::from_server(endpoint, ServerError::from(told));
    }
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(inner) = cause {
        if let Some(io) = inner.downcast_ref::<io::Error>() {
            if let Some(tls) = io.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                return CaptureError::Tls { endpoint: endpoint.to_owned(), problem: tls.to_string() };
            }
            let what = format!("the connection to {endpoint} broke: {inner}");
            return CaptureError::Unreachable { what, source: None };
        }
        cause = inner.source();
    }
    if error.is_closed() {
        return CaptureError::Unreachable { what: format!("the connection to {endpoint} was closed"), source: None };
    }
    let text = crate::backoff::Chain(&error).to_string();
    if text.contains("authentication") || text.contains("password") {
        let error = Box::new(ServerError { message: text, ..ServerError::default() });
        return CaptureError::Authentication { endpoint: endpoint.to_owned(), error };
    }
    CaptureError::protocol(text)
}

/// One row of a result: its columns as the server sent them, `None` for NULL.
pub(super) type Row = Vec<Option<Bytes>>;

/// Reads a DataRow.
pub(super) fn read_row(body: &DataRowBody) -> Result<Row, CaptureError> {
    let whole = body.buffer_bytes();
    body.ranges()
        .map(|range| Ok(range.map(|range| whole.slice(range))))
        .collect()
        .map_err(|error| CaptureError::protocol(format!("row: {error}")))
}

/// A replication connection: messages go out and come in.
pub(super) struct Connection {
    wire: Wire<Transport>,
    endpoint: String,
    encrypted: bool,
    parameters: BTreeMap<String, String>,
    /// The server let us in.
    started: bool,
    /// A command was sent and its ReadyForQuery has not come yet.
    busy: bool,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("endpoint", &self.endpoint).field("busy", &self.busy).finish_non_exhaustive()
    }
}

impl Connection {
    /// Opens a replication connection to the host that `info` asks for.
    pub(super) async fn open(info: &ConnInfo) -> Result<Self, CaptureError> {
        let session = match first_suitable(info, Purpose::Replication).await {
            // Managed services often have no `replication` line but let the same role in by database.
            Err(refused) if is_hba_rejection(&refused) => {
                match first_suitable(info, Purpose::ReplicationByDatabase).await {
                    Ok(session) => {
                        tracing::info!(dbname = info.dbname, "replicating through a database's pg_hba.conf line");
                        session
                    }
                    Err(_) => return Err(refused), // the line that is usually meant
                }
            }
            result => result?,
        };
        match session {
            Session::Walsender(connection) => Ok(*connection),
            Session::Sql(..) => unreachable!("asked for a walsender"),
        }
    }

    /// Opens a replication connection that hangs on the database of `info`: the only kind that decodes WAL.
    pub(super) async fn open_database(info: &ConnInfo) -> Result<Self, CaptureError> {
        match first_suitable(info, Purpose::ReplicationByDatabase).await? {
            Session::Walsender(mut connection) => {
                connection.wire.allow_rows();
                Ok(*connection)
            }
            Session::Sql(..) => unreachable!("asked for a walsender"),
        }
    }

    async fn start(
        info: &ConnInfo,
        host: &Host,
        transport: Transport,
        by_database: bool,
    ) -> Result<Self, CaptureError> {
        let password = info.password_for(host, if by_database { &info.dbname } else { "replication" })?;
        let explicitly_plain = info.tls.mode == Some(SslMode::Disable);
        let credentials = Credentials {
            user: &info.user,
            password: password.as_ref(),
            channel_binding: info.tls.channel_binding,
            server_end_point: transport.server_end_point(),
            clear_text_allowed: transport.is_encrypted() || host.is_local() || explicitly_plain,
        };
        let mut parameters = vec![
            ("user", info.user.as_str()),
            ("application_name", info.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        if by_database {
            parameters.extend([("replication", "database"), ("database", info.dbname.as_str())]);
        } else {
            parameters.push(("replication", "true"));
        }
        if let Some(options) = &info.options {
            parameters.push(("options", options));
        }
        let mut connection = Self {
            encrypted: transport.is_encrypted(),
            wire: Wire::new(transport),
            endpoint: host.to_string(),
            parameters: BTreeMap::new(),
            started: false,
            busy: true,
        };
        frontend::startup_message(parameters, connection.outgoing())
            .map_err(|error| CaptureError::conninfo(error.to_string()))?;
        connection.flush().await?;
        credentials.authenticate(&mut connection).await?;
        loop {
            match connection.receive().await? {
                Frame::Message(Message::BackendKeyData(_)) => {}
                Frame::Message(Message::ReadyForQuery(_)) => break,
                _ => return Err(CaptureError::protocol("expected ReadyForQuery after authentication")),
            }
        }
        connection.wire.allow_long_messages();
        connection.started = true;
        Ok(connection)
    }

    /// The host and port.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    pub(super) const fn is_encrypted(&self) -> bool {
        self.encrypted
    }

    /// A parameter that the server reports: `server_version`, `in_hot_standby`.
    pub(super) fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }

    /// Messages to send: append, then [`flush`](Self::flush).
    pub(super) fn outgoing(&mut self) -> &mut BytesMut {
        self.wire.outgoing()
    }

    /// Sends what is outgoing. Cancel safe.
    pub(super) async fn flush(&mut self) -> Result<(), CaptureError> {
        self.wire.flush().await.map_err(|source| self.broke(source))
    }

    /// Reads more bytes. Cancel safe.
    pub(super) async fn fill(&mut self) -> Result<(), CaptureError> {
        self.wire.fill().await.map_err(|source| self.broke(source))
    }

    fn broke(&self, source: io::Error) -> CaptureError {
        if self.started {
            CaptureError::lost(&self.endpoint, source)
        } else {
            CaptureError::lost_at_start(&self.endpoint, source)
        }
    }

    /// The next message that was read already; notices and parameters are dealt with here.
    ///
    /// # Errors
    /// What the server reports as an error, sorted; bytes that are not the protocol.
    pub(super) fn buffered(&mut self) -> Result<Option<Frame>, CaptureError> {
        loop {
            let Some(frame) = self.wire.buffered().map_err(CaptureError::Protocol)? else { return Ok(None) };
            match frame {
                Frame::Message(Message::ParameterStatus(body)) => {
                    if let (Ok(name), Ok(value)) = (body.name(), body.value()) {
                        self.set_parameter(name, value);
                    }
                }
                Frame::Message(Message::NoticeResponse(body)) => {
                    let mut message = String::new();
                    let mut fields = body.fields();
                    while let Ok(Some(field)) = fields.next() {
                        if field.type_() == b'M' {
                            message = String::from_utf8_lossy(field.value_bytes()).into_owned();
                        }
                    }
                    tracing::info!(server = self.endpoint, "the server says: {message}");
                }
                Frame::Message(Message::NotificationResponse(_)) => {}
                Frame::Message(Message::ErrorResponse(body)) => {
                    return Err(CaptureError::from_server(&self.endpoint, ServerError::read(&body)));
                }
                Frame::Message(Message::ReadyForQuery(body)) => {
                    self.busy = false;
                    return Ok(Some(Frame::Message(Message::ReadyForQuery(body))));
                }
                frame => return Ok(Some(frame)),
            }
        }
    }

    fn set_parameter(&mut self, name: &str, value: &str) {
        /// Servers report about 15; a peer that reports without end gets no memory for it.
        const PARAMETERS_MAX: usize = 100;
        if self.parameters.len() < PARAMETERS_MAX || self.parameters.contains_key(name) {
            self.parameters.insert(name.to_owned(), value.to_owned());
        }
    }

    /// The next message. Cancel safe.
    pub(super) async fn receive(&mut self) -> Result<Frame, CaptureError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            self.fill().await?;
        }
    }

    /// Sends a command, and leaves it to the caller to read the answer up to ReadyForQuery.
    pub(super) async fn send_query(&mut self, command: &str) -> Result<(), CaptureError> {
        self.settle().await?;
        frontend::query(command, self.outgoing()).map_err(|error| CaptureError::protocol(error.to_string()))?;
        self.busy = true;
        self.flush().await
    }

    /// Sends a command and collects its rows. If this is dropped before it is done, the next command skips the rest of
    /// the answer.
    pub(super) async fn query(&mut self, command: &str) -> Result<Vec<Row>, CaptureError> {
        self.send_query(command).await?;
        let mut rows = Vec::new();
        loop {
            match self.receive().await? {
                Frame::Message(Message::DataRow(_)) if rows.len() >= ROWS_MAX => {
                    return Err(CaptureError::protocol(format!("more than {ROWS_MAX} rows")));
                }
                Frame::Message(Message::DataRow(body)) => rows.push(read_row(&body)?),
                Frame::Message(Message::ReadyForQuery(_)) => return Ok(rows),
                Frame::Message(Message::RowDescription(_) | Message::CommandComplete(_)) => {}
                _ => return Err(CaptureError::protocol("an unexpected message in the answer to a command")),
            }
        }
    }

    /// Skips what is left of an earlier answer.
    pub(super) async fn settle(&mut self) -> Result<(), CaptureError> {
        while self.busy {
            match self.receive().await {
                Ok(_) => {}
                Err(error) if error.server().is_some() => {} // of the command that was given up
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// The longest result that a command of the replication protocol has: one row for each tablespace.
const ROWS_MAX: usize = 100_000;
