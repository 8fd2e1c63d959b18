//! What a server says of itself.

use std::fmt;

/// The version of a server, as in `server_version_num`: 150020 for 15.20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ServerVersion(u32);

impl ServerVersion {
    /// The oldest major that walguard works with.
    pub const MAJOR_MIN: u32 = 14;
    /// The newest major that walguard was tested with.
    pub const MAJOR_MAX: u32 = 18;

    /// From the number of `server_version_num`.
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// The number of `server_version_num`.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The major version: 15.
    pub const fn major(self) -> u32 {
        self.0 / 10_000
    }

    /// The minor version: 20 of 15.20.
    pub const fn minor(self) -> u32 {
        self.0 % 10_000
    }

    /// Reads the `server_version` parameter: `15.20 (Debian 15.20-0+deb12u1)`, `18beta1`.
    pub fn parse(text: &str) -> Option<Self> {
        let number = text.split([' ', '(']).next()?;
        let digits = |s: &str| {
            let end = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
            s.get(..end)?.parse::<u32>().ok()
        };
        let (major, minor) = number.split_once('.').unwrap_or((number, "0"));
        let number = digits(major)?.checked_mul(10_000)?.checked_add(digits(minor).unwrap_or(0))?;
        (number >= 10_000).then_some(Self(number))
    }

    /// True if walguard knows this major's protocol and WAL.
    pub const fn is_supported(self) -> bool {
        let major = self.major();
        major >= Self::MAJOR_MIN && major <= Self::MAJOR_MAX
    }
}

impl fmt::Display for ServerVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major(), self.minor())
    }
}

/// A cluster's identity, made by `initdb` and shared by its standbys. Two clusters never have the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SystemId(u64);

impl SystemId {
    /// From the number that `IDENTIFY_SYSTEM` answers.
    pub const fn new(number: u64) -> Self {
        Self(number)
    }

    /// The number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SystemId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

// As text: readers of JSON that hold numbers in doubles would round it.
impl serde::Serialize for SystemId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for SystemId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_as_servers_print_it() {
        let parsed = |text| ServerVersion::parse(text).map(ServerVersion::number);
        assert_eq!(parsed("15.20 (Debian 15.20-0+deb12u1)"), Some(150_020));
        assert_eq!(parsed("18beta1"), Some(180_000));
        assert_eq!(parsed("17.10"), Some(170_010));
        assert_eq!(parsed(""), None);
        assert_eq!(parsed("devel"), None);
        assert_eq!(parsed("99999999999.1"), None);
    }
}
