//! How long work tells how far it is. The library never prints: the program implements [`Progress`].

use std::fmt;

/// Hears how far a piece of work is. All methods may be called from any thread, and often: they must be cheap.
pub trait Progress: Send + Sync + fmt::Debug {
    /// A new phase begins ("fetch base backup"), with its size in bytes where that is known.
    fn begin(&self, phase: &str, bytes_total: Option<u64>);
    /// The phase's size became known, or changed.
    fn set_total(&self, bytes_total: u64);
    /// So many more bytes of the phase are done.
    fn advance(&self, bytes: u64);
    /// What is being done right now, for people: a file, a database time ("replaying 08:11:02").
    fn note(&self, text: &str);
    /// The phase is over.
    fn end(&self);
}

/// For callers that nobody watches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: Option<u64>) {}
    fn set_total(&self, _: u64) {}
    fn advance(&self, _: u64) {}
    fn note(&self, _: &str) {}
    fn end(&self) {}
}
