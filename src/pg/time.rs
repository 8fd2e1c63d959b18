//! Postgres's clock.

use std::fmt;

use jiff::{SignedDuration, Timestamp};

/// A moment as the WAL and the replication protocol carry it: microseconds since 2000-01-01 00:00 UTC.
/// Printed in RFC 3339, in UTC, with microseconds.
///
/// (Postgres: `TimestampTz` in `datatype/timestamp.h`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PgTime(i64);

/// Seconds from 1970-01-01 to 2000-01-01.
const EPOCH: i64 = 946_684_800;

impl PgTime {
    /// From microseconds since 2000-01-01 00:00 UTC.
    pub const fn from_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 2000-01-01 00:00 UTC.
    pub const fn micros(self) -> i64 {
        self.0
    }

    /// From seconds since 1970-01-01, the unit of a checkpoint's time; saturates at the ends of the range.
    pub const fn from_unix_seconds(seconds: i64) -> Self {
        Self(seconds.saturating_sub(EPOCH).saturating_mul(1_000_000))
    }

    /// The same moment as a [`Timestamp`]; moments that it cannot hold (damaged WAL can carry any number) become its
    /// earliest or latest.
    pub fn timestamp(self) -> Timestamp {
        let clamp = if self.0 < 0 { Timestamp::MIN } else { Timestamp::MAX };
        self.0
            .checked_add(EPOCH * 1_000_000)
            .and_then(|micros| Timestamp::from_microsecond(micros).ok())
            .unwrap_or(clamp)
    }

    /// Time from `earlier` to this, negative if `earlier` is really later.
    pub fn since(self, earlier: Self) -> SignedDuration {
        SignedDuration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

impl From<Timestamp> for PgTime {
    /// Rounds down to the microsecond.
    fn from(timestamp: Timestamp) -> Self {
        let floor = timestamp.as_nanosecond().div_euclid(1_000);
        Self(i64::try_from(floor).expect("a Timestamp's microseconds fit 64 bits") - EPOCH * 1_000_000)
    }
}

impl fmt::Display for PgTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.6}", self.timestamp())
    }
}

impl serde::Serialize for PgTime {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PgTime {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let timestamp = Timestamp::deserialize(deserializer)?;
        Ok(timestamp.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postgres_counts_from_the_year_2000() {
        assert_eq!(PgTime::from_micros(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!(PgTime::from_unix_seconds(1_765_958_400).to_string(), "2025-12-17T08:00:00.000000Z");
    }

    #[test]
    fn a_time_survives_the_way_there_and_back() {
        for micros in [-1, 0, 1, 819_273_600_123_456] {
            let time = PgTime::from_micros(micros);
            assert_eq!(PgTime::from(time.timestamp()), time);
        }
    }

    #[test]
    fn a_time_from_damaged_wal_is_clamped() {
        assert_eq!(PgTime::from_micros(i64::MAX).timestamp(), Timestamp::MAX);
        assert_eq!(PgTime::from_micros(i64::MIN).timestamp(), Timestamp::MIN);
    }
}
