//! `GET /status`, `/metrics`, `/healthz` and `/readyz` on a loopback address.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use jiff::Timestamp;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::metrics;
use super::status::Board;

/// Where the agent answers: the `[http]` table of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port. Without it: `127.0.0.1:9847`, or any free port if that is taken. There is no authentication:
    /// choose an address that only those reach who may see the status.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
}

/// The port without a setting.
pub const PORT_DEFAULT: u16 = 9847;

/// Opens the port.
///
/// # Errors
/// If the address in the settings cannot be used.
pub async fn bind(config: &Config) -> io::Result<TcpListener> {
    if let Some(address) = config.listen {
        return TcpListener::bind(address).await;
    }
    let address = (Ipv4Addr::LOCALHOST, PORT_DEFAULT);
    match TcpListener::bind(address).await {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
            let instead = listener.local_addr()?;
            tracing::warn!(%instead, "port {PORT_DEFAULT} is taken; set `http.listen` to choose one");
            Ok(listener)
        }
        result => result,
    }
}

/// Answers until `stop` is cancelled.
///
/// # Errors
/// If the listener fails for good.
pub async fn serve(listener: TcpListener, board: Board, stop: CancellationToken) -> io::Result<()> {
    let service = router(board);
    axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await
}

fn router(board: Board) -> Router {
    Router::new()
        .route("/status", get(status))
        .route("/metrics", get(render_metrics))
        .route("/healthz", get(alive))
        .route("/readyz", get(well))
        .with_state(board)
}

async fn status(State(board): State<Board>) -> Response {
    Json(board.snapshot(Timestamp::now())).into_response()
}

async fn render_metrics(State(board): State<Board>) -> Response {
    match metrics::render(&board.snapshot(Timestamp::now())) {
        Ok(text) => ([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// For whoever restarts an agent that hangs: restarting mends no store, so only being able to answer counts.
async fn alive() -> &'static str {
    "ok\n"
}

/// For whoever watches: 503 while something needs attention, with a line for each thing.
async fn well(State(board): State<Board>) -> Response {
    let attention = board.snapshot(Timestamp::now()).attention();
    if attention.is_empty() {
        return "ok\n".into_response();
    }
    (StatusCode::SERVICE_UNAVAILABLE, attention.join("\n") + "\n").into_response()
}
