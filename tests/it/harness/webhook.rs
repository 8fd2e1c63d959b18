//! Whoever is told of incidents: a webhook that keeps what it gets, and can be away.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
use serde_json::Value;
use tokio_util::sync::DropGuard;

use super::wait_for;

/// What was posted, and when it came.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) at: SystemTime,
    pub(crate) body: Value,
}

impl Told {
    /// A text of the message.
    pub(crate) fn text(&self, field: &str) -> &str {
        self.body[field].as_str().unwrap_or_default()
    }
}

#[derive(Clone, Debug, Default)]
struct Kept {
    told: Arc<Mutex<Vec<Told>>>,
    away: Arc<AtomicBool>,
}

/// A webhook on loopback.
#[derive(Debug)]
pub(crate) struct Webhook {
    kept: Kept,
    port: u16,
    _stop: DropGuard,
}

impl Webhook {
    pub(crate) async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let kept = Kept::default();
        let router = Router::new().route("/", post(take)).with_state(kept.clone());
        let stop = tokio_util::sync::CancellationToken::new();
        let stopped = stop.clone();
        tokio::spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(stopped.cancelled_owned());
            serving.await.unwrap();
        });
        Self { kept, port, _stop: stop.drop_guard() }
    }

    /// The settings of a channel that posts here.
    pub(crate) fn settings(&self) -> String {
        format!("[notify.test]\nkind = \"webhook\"\nurl = \"http://127.0.0.1:{}/\"\n", self.port)
    }

    /// Refuses everything from now on, or no longer.
    pub(crate) fn set_away(&self, away: bool) {
        self.kept.away.store(away, Ordering::SeqCst);
    }

    pub(crate) fn told(&self) -> Vec<Told> {
        self.kept.told.lock().unwrap().clone()
    }

    /// Waits for a message that is like this, and gives it.
    pub(crate) async fn wait(&self, what: &str, is_meant: impl Fn(&Told) -> bool) -> Told {
        let find = || self.told().into_iter().find(|told| is_meant(told));
        wait_for(what, Duration::from_secs(60), || async { find().is_some() }).await;
        find().unwrap()
    }
}

async fn take(State(kept): State<Kept>, body: axum::body::Bytes) -> StatusCode {
    if kept.away.load(Ordering::SeqCst) {
        return StatusCode::SERVICE_UNAVAILABLE;
    }
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    kept.told.lock().unwrap().push(Told { at: SystemTime::now(), body });
    StatusCode::NO_CONTENT
}
