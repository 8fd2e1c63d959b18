//! A TCP proxy that breaks connections as networks do.

use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the proxy does to connections.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Behaviour {
    /// New connections are closed at once.
    refuse: bool,
    /// Bytes are taken and kept: connections stay open and silent.
    stall: bool,
    /// Counted up to cut all connections that are open at that time.
    cuts: u64,
    /// A connection is cut after this many bytes from the server.
    cut_after: Option<u64>,
    /// Where connections lead.
    target: SocketAddr,
}

/// A proxy on loopback. It ends with this value.
#[derive(Debug)]
pub(crate) struct Proxy {
    address: SocketAddr,
    behaviour: watch::Sender<Behaviour>,
    end: CancellationToken,
}

impl Proxy {
    /// Starts a proxy in front of a port on loopback. It runs on the test's own runtime: whoever blocks that blocks the
    /// proxy.
    pub(crate) async fn start(port: u16) -> Self {
        let target = SocketAddr::from(([127, 0, 0, 1], port));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (behaviour, changes) =
            watch::channel(Behaviour { refuse: false, stall: false, cuts: 0, cut_after: None, target });
        let end = CancellationToken::new();
        tokio::spawn(end.clone().run_until_cancelled_owned(accept(listener, changes, end.clone())));
        Self { address, behaviour, end }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Cuts all connections that are open.
    pub(crate) fn cut(&self) {
        self.behaviour.send_modify(|behaviour| behaviour.cuts += 1);
    }

    /// Cuts each new connection after this many bytes from the server; `None` ends that.
    pub(crate) fn cut_after(&self, bytes: Option<u64>) {
        self.behaviour.send_modify(|behaviour| behaviour.cut_after = bytes);
    }

    /// Closes new connections at once, or no longer.
    pub(crate) fn refuse(&self, on: bool) {
        self.behaviour.send_modify(|behaviour| behaviour.refuse = on);
    }

    /// Lets connections live but passes no bytes on, or passes them again.
    pub(crate) fn stall(&self, on: bool) {
        self.behaviour.send_modify(|behaviour| behaviour.stall = on);
    }

    /// Leads new connections to another port, as a failover does.
    pub(crate) fn redirect(&self, port: u16) {
        self.behaviour.send_modify(|behaviour| behaviour.target.set_port(port));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

async fn accept(listener: TcpListener, behaviour: watch::Receiver<Behaviour>, end: CancellationToken) {
    while let Ok((client, _)) = listener.accept().await {
        if behaviour.borrow().refuse {
            continue; // dropping it closes it
        }
        tokio::spawn(end.clone().run_until_cancelled_owned(serve(client, behaviour.clone())));
    }
}

/// Passes bytes both ways until one side ends or the connection is cut.
async fn serve(client: TcpStream, mut behaviour: watch::Receiver<Behaviour>) {
    let now = behaviour.borrow_and_update().clone();
    let Ok(server) = TcpStream::connect(now.target).await else { return };
    let _ = client.set_nodelay(true);
    let _ = server.set_nodelay(true);
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let cut = async {
        // An error means that the proxy has ended.
        let _ = behaviour.clone().wait_for(|new| new.cuts > now.cuts).await;
    };
    tokio::select! {
        () = cut => {}
        _ = pass(from_client, to_server, None, behaviour.clone()) => {}
        _ = pass(from_server, to_client, now.cut_after, behaviour.clone()) => {}
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    bytes_max: Option<u64>,
    mut behaviour: watch::Receiver<Behaviour>,
) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut left = bytes_max.unwrap_or(u64::MAX);
    while left > 0 {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        if behaviour.wait_for(|now| !now.stall).await.is_err() {
            return Ok(());
        }
        let take = usize::try_from(left).map_or(read, |left| left.min(read));
        to.write_all(&buffer[..take]).await?;
        left -= take as u64;
    }
    Ok(())
}
