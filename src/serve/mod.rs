//! The window: what the agent is doing, for people, probes and Prometheus.
//!
//! ```text
//! status    what the loops know      -> one value that can be shown, compared and sent as JSON
//! metrics   that value               -> Prometheus text                                          (pure)
//! http      GET /status /metrics ... -> the two, on a loopback address
//! ```

pub mod http;
pub mod metrics;
pub mod status;
