//! Incidents in, messages to people out.
//!
//! ```text
//!  incident ----> queue      what is to be told to whom next (pure; time is an argument)
//!                   |  ^
//!                   v  |     told, or failed
//!   message ---> channel     webhook  slack  teams  discord  pagerduty  alertmanager  email  command
//!                   |
//!                journal     what was told, on the local disk; the repository keeps it too
//! ```
//!
//! An alarm that nobody took is tried again for as long as it takes, says that it is late when it arrives, and arrives
//! once: a record is written after the receiver has taken it, and before it is sent a note that it is about to be. Where
//! an agent dies between the two, nobody knows, and it is sent again, under the same name, and says so: an alarm twice is
//! better than none.

mod alertmanager;
pub mod channel;
mod command;
pub mod config;
mod discord;
mod email;
pub mod error;
mod http;
pub mod journal;
pub mod message;
mod pagerduty;
pub mod queue;
pub mod secret;
mod slack;
mod teams;
#[cfg(test)]
mod testing;
pub mod webhook;

pub use channel::Channel;
pub use config::{Config, Configs, Kind};
pub use error::{OpenError, SendError};
pub use message::{Event, Message, Reach, Sending, Setting};
pub use queue::{Queue, Told};
