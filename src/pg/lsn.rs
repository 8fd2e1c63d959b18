//! Log sequence numbers.

use std::fmt;
use std::ops::{Add, Sub};
use std::str::FromStr;

/// A byte position in the WAL stream. Printed as Postgres prints it: `16/B374D848`.
///
/// A position says nothing about its timeline; where that matters, see [`Position`](super::Position).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

impl Lsn {
    /// `0/0`, which Postgres uses for "no position" (`InvalidXLogRecPtr`).
    pub const ZERO: Self = Self(0);
    /// The greatest position that can be written down.
    pub const MAX: Self = Self(u64::MAX);

    /// The position `bytes` bytes after the beginning of the WAL.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// Bytes since the beginning of the WAL.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// True for `0/0`, which is never the position of a record.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// The distance from `earlier`, or `None` if `earlier` is really later.
    pub const fn checked_sub(self, earlier: Self) -> Option<u64> {
        self.0.checked_sub(earlier.0)
    }

    /// The distance from `earlier`, or 0 if `earlier` is really later: a lag never runs backwards.
    pub const fn saturating_sub(self, earlier: Self) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The position `bytes` further on, or `None` past the end of what 64 bits can address.
    pub fn checked_add(self, bytes: u64) -> Option<Self> {
        self.0.checked_add(bytes).map(Self)
    }

    /// The greatest multiple of `unit` at or before this position.
    ///
    /// # Panics
    /// If `unit` is 0.
    pub const fn align_down(self, unit: u64) -> Self {
        Self(self.0 - self.0 % unit)
    }
}

impl Add<u64> for Lsn {
    type Output = Self;

    fn add(self, bytes: u64) -> Self {
        Self(self.0.checked_add(bytes).expect("an LSN stays within 64 bits"))
    }
}

impl Sub for Lsn {
    type Output = u64; // bytes: subtracting two places gives a distance, not a place

    fn sub(self, earlier: Self) -> u64 {
        self.0.checked_sub(earlier.0).expect("LSN distance is taken forwards")
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF))
    }
}

/// The text is not an LSN of the form `16/B374D848`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an LSN; one looks like 16/B374D848")]
pub struct ParseLsnError(String);

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, ParseLsnError> {
        let half = |digits: &str| {
            let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u64::from_str_radix(digits, 16).ok()).flatten()
        };
        text.split_once('/')
            .and_then(|(high, low)| Some(Self(half(high)? << 32 | half(low)?)))
            .ok_or_else(|| ParseLsnError(text.to_owned()))
    }
}

impl serde::Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_back_as_it_was_printed() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF", "0/1"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn text_that_is_not_an_lsn_is_refused() {
        for text in ["", "/", "1", "1/", "/1", "1/2/3", "123456789/0", "+1/0", "1/-2", "x/y", "1 /2"] {
            assert!(text.parse::<Lsn>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn distances_are_taken_forwards_or_not_at_all() {
        let (a, b) = (Lsn::new(10), Lsn::new(30));
        assert_eq!(b - a, 20);
        assert_eq!(a.checked_sub(b), None);
        assert_eq!(a.saturating_sub(b), 0);
    }
}
