//! A host -> a byte stream to it, encrypted as far as the mode asks.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::client::TlsStream;

use super::CaptureError;
use super::conninfo::{ConnInfo, Host, Keepalives, SslMode};
use super::tls;

/// Where one try goes to.
#[derive(Clone, Debug)]
pub(super) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// How one try is encrypted. A mode may allow two tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encryption {
    /// Plain.
    None,
    /// TLS if the server offers it.
    IfOffered,
    /// TLS or nothing.
    Required,
}

/// The tries that `mode` allows, in order. The second is made if the first fails for a reason that encryption may change.
/// (libpq: `select_next_encryption_method`.)
pub(super) fn encryptions(mode: SslMode) -> &'static [Encryption] {
    match mode {
        SslMode::Disable => &[Encryption::None],
        SslMode::Allow => &[Encryption::None, Encryption::Required],
        SslMode::Prefer => &[Encryption::IfOffered, Encryption::None],
        SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => &[Encryption::Required],
    }
}

/// The places where `host` may be: its socket, its address, or all addresses of its name.
pub(super) async fn addresses(host: &Host) -> Result<Vec<Address>, CaptureError> {
    if let Some(socket) = host.socket() {
        return Ok(vec![Address::Unix(socket)]);
    }
    if let Some(ip) = host.address {
        return Ok(vec![Address::Tcp(SocketAddr::new(ip, host.port))]);
    }
    let looked_up = tokio::net::lookup_host((host.name.as_str(), host.port)).await;
    let found = looked_up.map_err(|source| CaptureError::Unreachable {
        what: format!("{host}: the name cannot be looked up"),
        source: Some(source),
    })?;
    Ok(found.map(Address::Tcp).collect())
}

/// A connection's bytes.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A connection's bytes, encrypted or not.
#[derive(Debug)]
pub(super) enum Transport {
    Plain(Socket),
    Tls(Box<TlsStream<Socket>>),
}

impl Transport {
    pub(super) fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls(_))
    }

    /// The server's certificate, as channel binding wants it; `None` without TLS.
    pub(super) fn server_end_point(&self) -> Option<Vec<u8>> {
        let Self::Tls(stream) = self else { return None };
        stream.get_ref().1.peer_certificates()?.first().and_then(tls::server_end_point)
    }
}

/// Connects and encrypts. The caller bounds the time.
pub(super) async fn dial(
    info: &ConnInfo,
    host: &Host,
    address: &Address,
    encryption: Encryption,
) -> Result<Transport, CaptureError> {
    let lost = |source| CaptureError::lost(&host.to_string(), source);
    let mut socket = match address {
        Address::Tcp(address) => TcpStream::connect(address).await.and_then(|stream| {
            stream.set_nodelay(true)?;
            keep_alive(&stream, info.keepalives)?;
            Ok(Socket::Tcp(stream))
        }),
        Address::Unix(path) => UnixStream::connect(path).await.map(Socket::Unix),
    }
    .map_err(|source| CaptureError::Unreachable { what: format!("{host} cannot be reached"), source: Some(source) })?;
    if encryption == Encryption::None {
        return Ok(Transport::Plain(socket));
    }
    if !info.tls.direct {
        let mut request = BytesMut::new();
        frontend::ssl_request(&mut request);
        socket.write_all(&request).await.map_err(lost)?;
        // One byte exactly: what came after it in plain text could be an attacker's (CVE-2021-23222).
        match socket.read_u8().await.map_err(lost)? {
            b'S' => {}
            b'N' if encryption == Encryption::IfOffered => return Ok(Transport::Plain(socket)),
            b'N' => {
                let problem = "the server does not offer TLS".to_owned();
                return Err(CaptureError::Tls { endpoint: host.to_string(), problem });
            }
            // A server that cannot start a process for us says so before it looks at the request.
            b'E' => {
                let what = format!("{host} answered the request for TLS with an error");
                return Err(CaptureError::Unreachable { what, source: None });
            }
            other => {
                let answer = other.escape_ascii();
                return Err(CaptureError::protocol(format!("{host} answered `{answer}` when asked for TLS")));
            }
        }
    }
    let handshake = tls::connector(info, host)?.connect(tls::server_name(host)?, socket);
    let stream = handshake.await.map_err(|source| CaptureError::lost_at_start(&host.to_string(), source))?;
    Ok(Transport::Tls(Box::new(stream)))
}

fn keep_alive(stream: &TcpStream, keepalives: Keepalives) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    if keepalives.enabled {
        let parameters = socket2::TcpKeepalive::new()
            .with_time(keepalives.idle)
            .with_interval(keepalives.interval)
            .with_retries(keepalives.count);
        socket.set_tcp_keepalive(&parameters)?;
    }
    #[cfg(target_os = "linux")]
    if let Some(timeout) = keepalives.user_timeout {
        socket.set_tcp_user_timeout(Some(timeout))?;
    }
    Ok(())
}

/// Forwards to whichever stream it is.
macro_rules! forward {
    ($self:ident, $method:ident, $cx:ident $(, $argument:ident)*) => {
        match $self.get_mut() {
            Self::Tcp(stream) => Pin::new(stream).$method($cx $(, $argument)*),
            Self::Unix(stream) => Pin::new(stream).$method($cx $(, $argument)*),
        }
    };
    (transport $self:ident, $method:ident, $cx:ident $(, $argument:ident)*) => {
        match $self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).$method($cx $(, $argument)*),
            Self::Tls(stream) => Pin::new(stream).$method($cx $(, $argument)*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_read, cx, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, poll_write, cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_shutdown, cx)
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(transport self, poll_read, cx, buffer)
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        forward!(transport self, poll_write, cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(transport self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(transport self, poll_shutdown, cx)
    }
}
