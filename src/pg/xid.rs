//! Transaction ids.

use std::fmt;
use std::num::NonZero;

/// A transaction id as the WAL carries it: 32 bits, reused after four billion transactions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Xid(NonZero<u32>);

impl Xid {
    /// The transaction with this id; `None` for 0, which means "no transaction".
    pub const fn new(number: u32) -> Option<Self> {
        match NonZero::new(number) {
            None => None,
            Some(number) => Some(Self(number)),
        }
    }

    /// Its number, 1 or greater.
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for Xid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
