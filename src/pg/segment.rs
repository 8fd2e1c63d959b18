//! WAL segments: the files that Postgres cuts its WAL into.

use std::fmt;
use std::str::FromStr;

use super::{Lsn, TimelineId};

/// The size of a cluster's WAL segments: a power of two from 1 MiB to 1 GiB, fixed by `initdb --wal-segsize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct SegmentSize(u32);

/// Not a size that WAL segments can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} bytes is not a WAL segment size: it is a power of two from 1 MiB to 1 GiB")]
pub struct SegmentSizeError(pub u64);

impl SegmentSize {
    /// The size that `initdb` chooses: 16 MiB.
    pub const DEFAULT: Self = Self(16 << 20);

    /// A size in bytes.
    ///
    /// # Errors
    /// If it is not a power of two from 1 MiB to 1 GiB.
    pub const fn new(bytes: u64) -> Result<Self, SegmentSizeError> {
        if bytes.is_power_of_two() && bytes >= 1 << 20 && bytes <= 1 << 30 {
            Ok(Self(bytes as u32)) // at most 2^30
        } else {
            Err(SegmentSizeError(bytes))
        }
    }

    /// The size in bytes.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// The segment that holds the byte at `lsn`.
    pub const fn segment_of(self, lsn: Lsn) -> SegmentNumber {
        SegmentNumber(lsn.bytes() / self.bytes())
    }

    /// Where `segment` begins.
    pub const fn start_of(self, segment: SegmentNumber) -> Lsn {
        Lsn::new(segment.0 * self.bytes())
    }

    /// Where `segment` ends: the first byte of the next.
    pub const fn end_of(self, segment: SegmentNumber) -> Lsn {
        Lsn::new((segment.0 + 1) * self.bytes())
    }

    /// Bytes from the beginning of its segment to `lsn`, less than the size.
    pub const fn offset_of(self, lsn: Lsn) -> u64 {
        lsn.bytes() % self.bytes()
    }
}

impl TryFrom<u64> for SegmentSize {
    type Error = SegmentSizeError;

    fn try_from(bytes: u64) -> Result<Self, SegmentSizeError> {
        Self::new(bytes)
    }
}

impl From<SegmentSize> for u64 {
    fn from(size: SegmentSize) -> Self {
        size.bytes()
    }
}

/// The how-manieth segment since the beginning of the WAL, counted from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentNumber(u64);

impl SegmentNumber {
    /// The segment with this number.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// Its number.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The segment after it.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }

    /// The segment before it, if there is one.
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }
}

/// A segment of one timeline, printed as its file name: `000000010000001600000037`.
///
/// Names of one timeline sort in WAL order. (Postgres: `XLogFileName` in `access/xlog_internal.h`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SegmentName {
    /// The timeline that wrote the file.
    pub timeline: TimelineId,
    /// Which segment.
    pub number: SegmentNumber,
    /// The cluster's segment size, which decides how the number is written.
    pub size: SegmentSize,
}

impl SegmentName {
    /// The segment of `timeline` that holds the byte at `lsn`.
    pub const fn at(timeline: TimelineId, lsn: Lsn, size: SegmentSize) -> Self {
        Self { timeline, number: size.segment_of(lsn), size }
    }

    /// Reads a file name of 24 hexadecimal digits, given the cluster's segment size.
    ///
    /// # Errors
    /// If the text is something else, or names a segment that this size cannot have.
    pub fn parse(text: &str, size: SegmentSize) -> Result<Self, ParseSegmentNameError> {
        let fault = || ParseSegmentNameError(text.to_owned());
        let upper_hex = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
        if text.len() != 24 || !text.bytes().all(upper_hex) {
            return Err(fault());
        }
        let part = |at: usize| text.get(at..at + 8).and_then(|s| u32::from_str_radix(s, 16).ok()).ok_or_else(fault);
        let (timeline, high, low) = (part(0)?, u64::from(part(8)?), u64::from(part(16)?));
        let timeline = TimelineId::new(timeline).ok_or_else(fault)?;
        let per_file = (1 << 32) / size.bytes();
        if low >= per_file {
            return Err(fault());
        }
        Ok(Self { timeline, number: SegmentNumber::new(high * per_file + low), size })
    }

    /// Where the segment begins.
    pub const fn start(&self) -> Lsn {
        self.size.start_of(self.number)
    }

    /// Where it ends: the first byte of the next.
    pub const fn end(&self) -> Lsn {
        self.size.end_of(self.number)
    }

    /// The next segment of the same timeline.
    pub const fn next(&self) -> Self {
        Self { timeline: self.timeline, number: self.number.next(), size: self.size }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let per_file = (1 << 32) / self.size.bytes();
        let number = self.number.get();
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.get(), number / per_file, number % per_file)
    }
}

/// The text is not the name of a WAL segment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not the name of a WAL segment; one looks like 000000010000001600000037")]
pub struct ParseSegmentNameError(String);

impl FromStr for SegmentSize {
    type Err = SegmentSizeError;

    /// Reads what `SHOW wal_segment_size` answers: `16MB`, `1GB`.
    fn from_str(text: &str) -> Result<Self, SegmentSizeError> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "B" | "" => 1,
            "kB" => 1 << 10,
            "MB" => 1 << 20,
            "GB" => 1 << 30,
            _ => 0,
        };
        Self::new(digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit)).unwrap_or(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_segment_name_reads_back_at_every_size() {
        for shift in 20..=30 {
            let size = SegmentSize::new(1 << shift).unwrap();
            for lsn in [0, 1, 0xFFFF_FFFF, 1 << 32, 0x16_B374_D848] {
                let name = SegmentName::at(TimelineId::FIRST, Lsn::new(lsn), size);
                assert_eq!(SegmentName::parse(&name.to_string(), size).unwrap(), name);
                assert!(name.start() <= Lsn::new(lsn) && Lsn::new(lsn) < name.end());
            }
        }
    }

    #[test]
    fn a_name_is_the_one_that_postgres_gives() {
        let name = SegmentName::at(TimelineId::FIRST, Lsn::new(0x16_B374_D848), SegmentSize::DEFAULT);
        assert_eq!(name.to_string(), "0000000100000016000000B3");
    }

    #[test]
    fn names_that_postgres_cannot_give_are_refused() {
        let names = [
            "",
            "000000010000001600000037.partial",
            "000000010000000000000100", // 256 segments of 16 MiB make up 4 GiB
            "000000000000000000000001", // there is no timeline 0
            "00000001000000000000000g",
            "0000000é000000000000000",
        ];
        for name in names {
            assert!(SegmentName::parse(name, SegmentSize::DEFAULT).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_segment_size_is_read_as_the_server_shows_it() {
        assert_eq!("16MB".parse(), SegmentSize::new(16 << 20));
        assert_eq!("1GB".parse(), SegmentSize::new(1 << 30));
        for text in ["", "3MB", "2GB", "512kB", "MB", "16 apples"] {
            assert!(text.parse::<SegmentSize>().is_err(), "{text:?}");
        }
    }
}
