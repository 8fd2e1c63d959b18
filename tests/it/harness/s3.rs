//! An S3 store over real HTTP, in this process, that can be made to fail from outside.
//!
//! Storage and protocol are `s3s` and `s3s-fs`; the faults sit between them and the network. The server has a thread and
//! a runtime of its own, so that tests may block, and child processes may use it.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use s3s::access::S3Access;
use s3s::auth::SimpleAuth;
use s3s::dto::PutObjectInput;
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Request, S3Result};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use walguard::repo;

const BUCKET: &str = "walguard";
const ACCESS_KEY: &str = "test-key";
const SECRET_KEY: &str = "test-secret";

/// Puts of one key are done one after the other, because the storage looks for the key and writes it in two steps.
/// Keys share this many locks.
const KEY_LOCKS: usize = 64;

/// What can be wrong with a store. Several can be wrong at once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fault {
    /// This share of all requests is answered `503 SlowDown`, and not performed.
    Reject(f64),
    /// This share of all writes and deletions is performed, but the connection breaks before the answer.
    FailAfterWrite(f64),
    /// Requests wait until the store is healed, and are performed then.
    Hold,
    /// Every request waits for so many milliseconds first.
    Slow(u64),
    /// Connections are refused, and existing ones broken.
    Down,
}

#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    reject: f64,
    fail_after_write: f64,
    hold: bool,
    slow_ms: u64,
    down: bool,
}

impl Faults {
    fn with(mut self, fault: Fault) -> Self {
        match fault {
            Fault::Reject(share) => self.reject = share,
            Fault::FailAfterWrite(share) => self.fail_after_write = share,
            Fault::Hold => self.hold = true,
            Fault::Slow(ms) => self.slow_ms = ms,
            Fault::Down => self.down = true,
        }
        self
    }
}

struct Shared {
    faults: watch::Sender<Faults>,
    /// Accepts `If-None-Match` and overwrites all the same, as some stores do.
    ignores_conditions: AtomicBool,
    requests: AtomicU64,
    failed: AtomicU64,
    by_method: Mutex<std::collections::HashMap<Method, u64>>,
    key_locks: [tokio::sync::Mutex<()>; KEY_LOCKS],
}

/// A running store with one bucket. It goes with this value.
pub(crate) struct S3 {
    shared: Arc<Shared>,
    address: SocketAddr,
    root: tempfile::TempDir,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for S3 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("S3").field("endpoint", &self.endpoint()).finish_non_exhaustive()
    }
}

impl S3 {
    /// Starts a healthy store with an empty bucket.
    #[expect(clippy::unused_async, reason = "the other parts of the world start asynchronously, too")]
    pub(crate) async fn start() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(BUCKET)).unwrap();
        let shared = Arc::new(Shared {
            faults: watch::Sender::new(Faults::default()),
            ignores_conditions: AtomicBool::new(false),
            requests: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            by_method: Mutex::default(),
            key_locks: std::array::from_fn(|_| tokio::sync::Mutex::new(())),
        });
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(root.path()).unwrap());
        builder.set_auth(SimpleAuth::from_single(ACCESS_KEY, SECRET_KEY));
        builder.set_access(Gate(Arc::clone(&shared)));
        let service = builder.build();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                tokio::select! {
                    () = serve(listener, address, service, served) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Self { shared, address, root, stop: Some(stop), thread: Some(thread) }
    }

    /// From now on this is wrong, besides what is wrong already.
    pub(crate) fn fault(&self, fault: Fault) {
        self.shared.faults.send_modify(|faults| *faults = faults.with(fault));
    }

    /// From now on nothing is wrong. Requests that were held go on.
    pub(crate) fn heal(&self) {
        self.shared.faults.send_replace(Faults::default());
    }

    /// This is wrong for so long; then nothing is.
    pub(crate) async fn fault_for(&self, fault: Fault, time: Duration) {
        self.fault(fault);
        tokio::time::sleep(time).await;
        self.heal();
    }

    /// From now on (or no longer) the store accepts `If-None-Match`, and overwrites all the same.
    pub(crate) fn ignore_conditional_puts(&self, ignore: bool) {
        self.shared.ignores_conditions.store(ignore, Ordering::Relaxed);
    }

    /// Requests that arrived, whatever became of them.
    pub(crate) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Requests of this method that arrived.
    pub(crate) fn requests_of(&self, method: &Method) -> u64 {
        self.shared.by_method.lock().unwrap().get(method).copied().unwrap_or(0)
    }

    /// Requests that a fault spoilt.
    pub(crate) fn failed(&self) -> u64 {
        self.shared.failed.load(Ordering::Relaxed)
    }

    /// What `--repo` takes.
    pub(crate) fn repo_url(&self) -> String {
        format!("s3://{BUCKET}/it")
    }

    /// Where it answers, `http://127.0.0.1:port`.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The environment that a process needs to get in.
    pub(crate) fn env(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.endpoint()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
        ]
    }

    /// What this process needs to get in. The keys lie in files beside the bucket.
    pub(crate) fn config(&self) -> repo::Config {
        let secret = |name: &str, text: &str| {
            let path = self.root.path().join(name);
            fs::write(&path, text).unwrap();
            Some(path)
        };
        let mut config = repo::Config { url: self.repo_url(), ..repo::Config::default() };
        config.s3.endpoint = Some(self.endpoint());
        config.s3.region = Some("us-east-1".to_owned());
        config.s3.access_key_id_file = secret("key-id", ACCESS_KEY);
        config.s3.secret_access_key_file = secret("key-secret", SECRET_KEY);
        config
    }

    /// The folder in which the repository's objects lie as files, to damage them.
    pub(crate) fn folder(&self) -> PathBuf {
        self.root.path().join(BUCKET).join("it")
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // a panic there was printed there
        }
    }
}

/// Accepts connections, as long as the store is not down.
async fn serve(listener: TcpListener, address: SocketAddr, service: S3Service, shared: Arc<Shared>) {
    let mut faults = shared.faults.subscribe();
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        if faults.borrow_and_update().down {
            listener = None;
            connections.shutdown().await;
            faults.wait_for(|faults| !faults.down).await.expect("the sender lives with the server");
        }
        let open = match &mut listener {
            Some(open) => open,
            None => match listen_again(address) {
                Ok(again) => listener.insert(again),
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                    continue;
                }
            },
        };
        tokio::select! {
            accepted = open.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                stream.set_nodelay(true).unwrap();
                let (service, shared) = (service.clone(), Arc::clone(&shared));
                let answer = service_fn(move |request| answer(request, service.clone(), Arc::clone(&shared)));
                connections.spawn(async move {
                    let served = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer);
                    let _ = served.await; // broken by the client, or by a fault
                });
            }
            _ = faults.changed() => {}
        }
        while connections.try_join_next().is_some() {}
    }
}

fn listen_again(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(1024)
}

/// Sees a request after its signature was checked, and before it is performed.
struct Gate(Arc<Shared>);

#[async_trait::async_trait]
impl S3Access for Gate {
    async fn put_object(&self, request: &mut S3Request<PutObjectInput>) -> S3Result<()> {
        if self.0.ignores_conditions.load(Ordering::Relaxed) {
            request.input.if_none_match = None;
        }
        Ok(())
    }
}

/// The connection breaks instead of an answer.
#[derive(Debug, thiserror::Error)]
#[error("the answer is lost")]
struct Lost;

async fn answer(
    request: Request<Incoming>,
    service: S3Service,
    shared: Arc<Shared>,
) -> Result<Response<s3s::Body>, Lost> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    *shared.by_method.lock().unwrap().entry(request.method().clone()).or_default() += 1;
    let faults = *shared.faults.borrow();
    if faults.slow_ms > 0 {
        tokio::time::sleep(Duration::from_millis(faults.slow_ms)).await;
    }
    if faults.hold {
        let _ = shared.faults.subscribe().wait_for(|faults| !faults.hold).await;
    }
    if fastrand::f64() < faults.reject {
        shared.failed.fetch_add(1, Ordering::Relaxed);
        let body = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
                    <Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>";
        let answer = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE).body(s3s::Body::from(body.to_owned()));
        return Ok(answer.unwrap());
    }
    let is_write = matches!(*request.method(), Method::PUT | Method::POST | Method::DELETE);
    let _one_by_one = if is_write {
        let hash = request.uri().path().bytes().fold(7usize, |hash, byte| hash.wrapping_mul(31) ^ usize::from(byte));
        Some(shared.key_locks[hash % KEY_LOCKS].lock().await)
    } else {
        None
    };
    let response = service.call(request.map(s3s::Body::from)).await.map_err(|_| Lost)?;
    if is_write && fastrand::f64() < faults.fail_after_write {
        shared.failed.fetch_add(1, Ordering::Relaxed);
        return Err(Lost);
    }
    Ok(response)
}
