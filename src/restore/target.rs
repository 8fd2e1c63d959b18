//! What somebody wants back, in words -> a [`Target`].
//!
//! Pure: the present moment and the zone of times that name none are arguments.

use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, Offset, TimeZone};
use jiff::{Span, Timestamp, Zoned};

use crate::pg::{Lsn, PgTime, Xid};
use crate::repo::layout::check_name;

/// The moment to restore.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Target {
    /// Everything that is archived.
    Latest,
    /// All transactions up to the first, in the order of the WAL, that ended later than this.
    Time(PgTime),
    /// Everything that the WAL holds before this position.
    Lsn(Lsn),
    /// Everything up to and with the end of this transaction (also found by one of its subtransactions).
    Xid(Xid),
    /// Everything up to and with this restore point (`pg_create_restore_point`).
    Name(String),
    /// Everything that committed before the first transaction of the incident of this id that destroyed something.
    Before(String),
}

impl Target {
    /// Reads a target:
    ///
    /// - `latest`
    /// - a time: RFC 3339 (`2025-12-17T06:14:00Z`), or `2025-12-17 08:14[:59[.123]]` followed by a zone's name or an offset
    ///   or, without one, read in `zone`; `today` and `yesterday` may stand for the date
    /// - `10 minutes ago`, counted from `now`
    /// - an LSN, `16/B374D848`, also `lsn:16/B374D848`
    /// - `xid:4711`
    /// - `name:before_upgrade`
    /// - `before:00000001-000000001A2B3C40`, with the id of an incident
    ///
    /// # Errors
    /// If it is none of these, or a local time that does not name exactly one moment: the error shows both readings.
    pub fn parse(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Self, TargetError> {
        let text = text.trim();
        let not_understood = || TargetError::NotUnderstood { text: text.to_owned() };
        if text.eq_ignore_ascii_case("latest") {
            return Ok(Self::Latest);
        }
        if let Some(xid) = text.strip_prefix("xid:") {
            let number = xid.trim().parse::<u32>().ok().and_then(Xid::new);
            return number.map(Self::Xid).ok_or_else(|| TargetError::NotAnXid { text: xid.trim().to_owned() });
        }
        if let Some(name) = text.strip_prefix("name:") {
            return Self::name(name);
        }
        if let Some(id) = text.strip_prefix("before:") {
            return Self::before(id.trim());
        }
        if let Some(lsn) = text.strip_prefix("lsn:") {
            return lsn.trim().parse().map(Self::Lsn).map_err(|_| not_understood());
        }
        if let Ok(lsn) = text.parse() {
            return Ok(Self::Lsn(lsn));
        }
        let time = match text.strip_suffix("ago") {
            Some(_) => ago(text, now, zone).ok_or_else(not_understood)?,
            None => moment(text, now, zone)?,
        };
        Ok(Self::Time(time.into()))
    }

    /// The restore point with this name.
    ///
    /// # Errors
    /// If Postgres cannot have one of this name: it is empty or longer than 63 bytes.
    pub fn name(name: &str) -> Result<Self, TargetError> {
        match name.len() {
            1..=63 => Ok(Self::Name(name.to_owned())),
            _ => Err(TargetError::NotAName { name: name.to_owned() }),
        }
    }

    /// Just before the incident of this id.
    ///
    /// # Errors
    /// If no incident can have this id.
    pub fn before(id: &str) -> Result<Self, TargetError> {
        match check_name(id) {
            Ok(()) => Ok(Self::Before(id.to_owned())),
            Err(_) => Err(TargetError::NotAnIncident { id: id.to_owned() }),
        }
    }

    /// The target for people; a time in UTC and in `zone`.
    pub fn describe(&self, zone: &TimeZone) -> String {
        match self {
            Self::Latest => "latest".to_owned(),
            Self::Time(time) => {
                let local = time.timestamp().to_zoned(zone.clone());
                format!("{time} ({})", local.strftime("%Y-%m-%d %H:%M:%S%.f %Z"))
            }
            Self::Lsn(lsn) => format!("LSN {lsn}"),
            Self::Xid(xid) => format!("transaction {xid}"),
            Self::Name(name) => format!("restore point {name:?}"),
            Self::Before(id) => format!("just before incident {id}"),
        }
    }
}

/// `10 minutes ago`.
fn ago(text: &str, now: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
    let span: Span = text.parse().ok()?;
    // Days and months are those of the zone's calendar.
    now.to_zoned(zone.clone()).checked_add(span).ok().map(|zoned| zoned.timestamp())
}

/// A date and a time of day, with or without a zone.
fn moment(text: &str, now: Timestamp, zone: &TimeZone) -> Result<Timestamp, TargetError> {
    if let Ok(zoned) = text.parse::<Zoned>() {
        return Ok(zoned.timestamp());
    }
    if let Ok(timestamp) = text.parse::<Timestamp>() {
        return Ok(timestamp);
    }
    let not_understood = || TargetError::NotUnderstood { text: text.to_owned() };
    let (date, rest) = text.split_once([' ', 'T']).ok_or_else(not_understood)?;
    let (time, zone_name) = rest.trim_start().split_once(' ').unwrap_or((rest.trim_start(), ""));
    let zone_name = zone_name.trim();
    let today = now.to_zoned(zone.clone()).date();
    let date = match date {
        "today" => today,
        "yesterday" => today.yesterday().map_err(|_| not_understood())?,
        date => date.parse().map_err(|_| not_understood())?,
    };
    // A date alone would mean midnight, which nobody who types a date thinks of.
    if !time.contains(':') {
        return Err(not_understood());
    }
    if zone_name.starts_with(['+', '-']) {
        return format!("{date}T{time}{zone_name}").parse().map_err(|_| not_understood());
    }
    let zone = match zone_name {
        "" => zone.clone(),
        "Z" => TimeZone::UTC,
        name => TimeZone::get(name).map_err(|_| TargetError::UnknownZone { name: name.to_owned() })?,
    };
    let local: DateTime = format!("{date}T{time}").parse().map_err(|_| not_understood())?;
    only_reading(local, &zone)
}

/// The moment that a local time names, if it names exactly one.
fn only_reading(local: DateTime, zone: &TimeZone) -> Result<Timestamp, TargetError> {
    let zone_name = || zone.iana_name().unwrap_or("the local zone").to_owned();
    let reading = |offset: Offset| {
        let timestamp = offset.to_timestamp(local).map_err(|_| TargetError::NotUnderstood { text: local.to_string() });
        timestamp.map(|timestamp| Reading { timestamp, local, offset })
    };
    let ambiguous = zone.to_ambiguous_timestamp(local);
    match ambiguous.offset() {
        AmbiguousOffset::Unambiguous { offset } => Ok(reading(offset)?.timestamp),
        AmbiguousOffset::Fold { before, after } => Err(TargetError::Ambiguous {
            local,
            zone: zone_name(),
            earlier: Box::new(reading(before)?),
            later: Box::new(reading(after)?),
        }),
        AmbiguousOffset::Gap { before, after } => Err(TargetError::Skipped {
            local,
            zone: zone_name(),
            // Read with the offset after the jump, the same clock face is the earlier moment.
            earlier: Box::new(reading(after)?),
            later: Box::new(reading(before)?),
        }),
    }
}

/// One way to read a local time. Printed as what to type to mean just this one: `2025-10-26T01:30:00+03:00`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reading {
    /// The moment.
    pub timestamp: Timestamp,
    local: DateTime,
    offset: Offset,
}

impl std::fmt::Display for Reading {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let seconds = self.offset.seconds();
        let sign = if seconds < 0 { '-' } else { '+' };
        let (hours, minutes) = (seconds.abs() / 3600, seconds.abs() / 60 % 60);
        write!(f, "{}{sign}{hours:02}:{minutes:02}", self.local)
    }
}

/// Words that name no target.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// Not one of the forms.
    #[error("`{text}` is no target that walguard understands")]
    NotUnderstood {
        /// What was given.
        text: String,
    },
    /// `xid:` is not followed by a transaction id.
    #[error("`{text}` is no transaction id: a number from 1 to 4294967295")]
    NotAnXid {
        /// What followed.
        text: String,
    },
    /// No restore point can have this name.
    #[error("`{name}` cannot be the name of a restore point: it has 1 to 63 bytes")]
    NotAName {
        /// The name.
        name: String,
    },
    /// No incident can have this id.
    #[error("`{id}` cannot be the id of an incident")]
    NotAnIncident {
        /// The id.
        id: String,
    },
    /// No zone has this name.
    #[error("there is no time zone `{name}`")]
    UnknownZone {
        /// The name.
        name: String,
    },
    /// The clocks were put back: the local time came twice.
    #[error("{local} came twice in {zone}, when the clocks were put back: {earlier} ({}) and {later} ({})", .earlier.timestamp, .later.timestamp)]
    Ambiguous {
        /// The local time.
        local: DateTime,
        /// The zone's name.
        zone: String,
        /// The first time.
        earlier: Box<Reading>,
        /// The second.
        later: Box<Reading>,
    },
    /// The clocks were put forward: the local time never came.
    #[error("{local} was skipped in {zone}, when the clocks were put forward; it may mean {earlier} ({}) or {later} ({})", .earlier.timestamp, .later.timestamp)]
    Skipped {
        /// The local time.
        local: DateTime,
        /// The zone's name.
        zone: String,
        /// Read as if the clocks had been put forward before.
        earlier: Box<Reading>,
        /// Read as if they had not been.
        later: Box<Reading>,
    },
}

impl TargetError {
    /// What to type instead.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotUnderstood { .. } => "a target is `latest`, a time (`2025-12-17 08:14`, `2025-12-17T06:14:00Z`, \
                `2025-12-17 08:14 Asia/Jerusalem`, `10 minutes ago`), an LSN (`16/B374D848`), `xid:4711`, \
                `name:before_upgrade` or `before:` and an incident's id"
                .to_owned(),
            Self::NotAnXid { .. } => {
                "pg_current_xact_id() counts further than 32 bits; pass its value modulo 4294967296".to_owned()
            }
            Self::NotAName { .. } => "names are those given to pg_create_restore_point()".to_owned(),
            Self::NotAnIncident { .. } => "`walguard incidents list` shows them with their ids".to_owned(),
            Self::UnknownZone { .. } => {
                "zones have IANA names, for example Europe/Berlin; an offset such as +02:00 works too".to_owned()
            }
            Self::Ambiguous { earlier, later, .. } | Self::Skipped { earlier, later, .. } => {
                format!("say which one: --to {earlier} or --to {later}")
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Target, TargetError> {
        let zone = TimeZone::get("Asia/Jerusalem").unwrap();
        Target::parse(text, "2025-12-17T08:20:00Z".parse().unwrap(), &zone)
    }

    fn time(text: &str) -> Target {
        Target::Time(text.parse::<Timestamp>().unwrap().into())
    }

    #[test]
    fn a_time_is_read_in_the_zone_that_it_names_or_else_in_that_of_the_settings() {
        for text in [
            "2025-12-17T06:14:59Z",
            "2025-12-17 06:14:59Z",
            "2025-12-17 06:14:59 Z",
            "2025-12-17 06:14:59+00",
            "2025-12-17 08:14:59",
            "2025-12-17T08:14:59",
            " 2025-12-17 08:14:59  Asia/Jerusalem ",
            "2025-12-17 01:14:59 America/New_York",
            "2025-12-17 06:14:59 UTC",
            "2025-12-17 08:14:59 +02:00",
            "2025-12-17T08:14:59+02:00",
            "2025-12-17T08:14:59+02:00[Asia/Jerusalem]",
            "today 08:14:59",
        ] {
            assert_eq!(parse(text), Ok(time("2025-12-17T06:14:59Z")), "{text}");
        }
        assert_eq!(parse("2025-12-17 08:14"), Ok(time("2025-12-17T06:14:00Z")));
        assert_eq!(parse("yesterday 08:14"), Ok(time("2025-12-16T06:14:00Z")));
        assert_eq!(parse("2025-12-17 08:14:59.123456"), Ok(time("2025-12-17T06:14:59.123456Z")));
    }

    #[test]
    fn a_span_is_counted_back_from_now() {
        assert_eq!(parse("10 minutes ago"), Ok(time("2025-12-17T08:10:00Z")));
        assert_eq!(parse("1h 30m ago"), Ok(time("2025-12-17T06:50:00Z")));
        assert_eq!(parse("1 day ago"), Ok(time("2025-12-16T08:20:00Z")));
    }

    #[test]
    fn other_forms_are_read() {
        assert_eq!(parse("latest"), Ok(Target::Latest));
        assert_eq!(parse("Latest"), Ok(Target::Latest));
        assert_eq!(parse("16/B374D848"), Ok(Target::Lsn(Lsn::new(0x16_B374_D848))));
        assert_eq!(parse("lsn:16/B374D848"), Ok(Target::Lsn(Lsn::new(0x16_B374_D848))));
        assert_eq!(parse("xid:4711"), Ok(Target::Xid(Xid::new(4711).unwrap())));
        assert_eq!(parse("name:before upgrade"), Ok(Target::Name("before upgrade".into())));
        let id = "00000001-000000001A2B3C40";
        assert_eq!(parse(&format!("before:{id}")), Ok(Target::Before(id.into())));
    }

    #[test]
    fn what_is_no_target_is_refused() {
        for text in [
            "",
            "now",
            "soon",
            "2025-12-17",
            "10 minutes",
            "ago",
            "08:14",
            "2025-13-01 08:14",
            "1/2/3",
            "16/XYZ",
            "lsn:1",
        ] {
            assert!(matches!(parse(text), Err(TargetError::NotUnderstood { .. })), "{text}: {:?}", parse(text));
        }
        assert!(matches!(parse("xid:0"), Err(TargetError::NotAnXid { .. })));
        assert!(matches!(parse("xid:4294967296"), Err(TargetError::NotAnXid { .. })));
        assert!(matches!(parse("name:"), Err(TargetError::NotAName { .. })));
        assert!(matches!(parse("before:../lease"), Err(TargetError::NotAnIncident { .. })));
        assert!(matches!(parse("2025-12-17 08:14 Mars/Olympus"), Err(TargetError::UnknownZone { .. })));
    }

    #[test]
    fn a_local_time_that_came_twice_is_refused_with_both_readings() {
        let error = parse("2025-10-26 01:30").unwrap_err();
        let text = error.to_string();
        assert!(text.contains("2025-10-26T01:30:00+03:00 (2025-10-25T22:30:00Z)"), "{text}");
        assert!(text.contains("2025-10-26T01:30:00+02:00 (2025-10-25T23:30:00Z)"), "{text}");
        // What the hint proposes is understood, and is what it says.
        assert_eq!(parse("2025-10-26T01:30:00+03:00"), Ok(time("2025-10-25T22:30:00Z")));
        assert_eq!(parse("2025-10-26T01:30:00+02:00"), Ok(time("2025-10-25T23:30:00Z")));
        assert!(matches!(parse("2025-10-26 01:30 Europe/Paris"), Ok(Target::Time(_))));
    }

    #[test]
    fn a_local_time_that_never_came_is_refused_with_both_readings() {
        let error = parse("2025-03-28 02:30").unwrap_err();
        let TargetError::Skipped { earlier, later, .. } = &error else { panic!("{error}") };
        assert_eq!(earlier.timestamp, "2025-03-27T23:30:00Z".parse().unwrap());
        assert_eq!(later.timestamp, "2025-03-28T00:30:00Z".parse().unwrap());
    }

    #[test]
    fn a_time_is_shown_in_utc_and_in_the_zone() {
        let zone = TimeZone::get("Asia/Jerusalem").unwrap();
        let shown = parse("2025-12-17 08:14:59").unwrap().describe(&zone);
        assert_eq!(shown, "2025-12-17T06:14:59.000000Z (2025-12-17 08:14:59 IST)");
    }
}
