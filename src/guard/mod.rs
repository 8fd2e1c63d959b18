//! Who is at work in the server, what an owner may install there, and how a transaction is stopped.
//!
//! ```text
//! sessions   SQL, every 250 ms                -> a sample: open transactions, locks, end of WAL
//! activity   samples                          -> who did transaction N                           (pure)
//! nudge      end of inserted and flushed WAL  -> when to ask the server for the rest             (pure)
//! breaker    a transaction and its session    -> that session is ended, and no other
//! script     settings                         -> the SQL of the black box that an owner may install (pure)
//! install    that SQL                         -> a database; and what is there against what should be
//! message    the box's messages in the WAL    -> who did it                                      (pure)
//! flashback  a snapshot from before           -> rows that are gone
//! testimony  those messages, and a sample     -> who did it, and whether they agree             (pure)
//! protection triggers, rules, policies        -> what is gone since the last look
//! ```

pub mod activity;
pub mod breaker;
pub mod flashback;
pub mod install;
pub mod message;
pub mod nudge;
pub mod protection;
pub mod script;
pub mod sessions;
pub mod testimony;

use std::time::Duration;

pub use activity::{Question, Sample};
pub use breaker::Breaker;
pub use message::GuardMessage;
pub use protection::Losses;
pub use sessions::{Sampler, Sessions};

/// How the agent finds out who is at work: the `[who]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Sample open transactions, so that an incident says who did it.
    pub enabled: bool,
    /// How often. A server that takes long to answer is asked less often.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub interval: Duration,
    /// Make the server flush what an open transaction wrote, if it does not do so by itself within 100 ms.
    pub nudge: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { enabled: true, interval: Duration::from_millis(250), nudge: true }
    }
}

impl Config {
    /// Whether the numbers can be.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        let (min, max) = (Duration::from_millis(50), Duration::from_secs(60));
        if self.interval < min || self.interval > max {
            return Err(format!("who.interval = {:?} is not between 50 ms and 1 min", self.interval));
        }
        Ok(())
    }
}

/// The watch over what protects tables: the `[protection]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watch {
    /// Count triggers, event triggers, rules and policies, and tell which are gone.
    pub enabled: bool,
    /// How often.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::required")]
    pub interval: Duration,
}

impl Default for Watch {
    fn default() -> Self {
        Self { enabled: true, interval: Duration::from_secs(60) }
    }
}

impl Watch {
    /// Whether the numbers can be.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(&self) -> Result<(), String> {
        if self.interval < Duration::from_secs(1) {
            return Err(format!("protection.interval = {:?} is less than a second", self.interval));
        }
        Ok(())
    }
}
