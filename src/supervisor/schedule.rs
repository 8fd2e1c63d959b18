//! When the next base backup is due. Pure.

use std::time::Duration;

use jiff::civil::Time;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan as _};

/// When backups are taken.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    /// How long after one the next is due; `None` for never.
    pub(super) every: Option<Duration>,
    /// The time of day to wait for.
    pub(super) at: Option<Time>,
    /// The zone of that time.
    pub(super) zone: TimeZone,
}

impl Schedule {
    /// When the backup after the one that began at `last` is due; `None` for never. Without a last one: now.
    pub(super) fn next(&self, last: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
        let every = SignedDuration::try_from(self.every?).unwrap_or(SignedDuration::MAX);
        let Some(last) = last else { return Some(now) };
        let due = last.checked_add(every).unwrap_or(Timestamp::MAX);
        let Some(at) = self.at else { return Some(due) };
        // The one that begins at 02:30 takes a moment to begin: without this, the next day's would be due at 02:30:05
        // and wait for the day after.
        let due = due.checked_sub(SLACK).unwrap_or(due).to_zoned(self.zone.clone());
        let same_day = due.with().time(at).build().ok()?;
        let day =
            if same_day >= due { same_day } else { due.checked_add(1.day()).ok()?.with().time(at).build().ok()? };
        Some(day.timestamp())
    }
}

/// A backup that falls due so little after the time of day is taken at that time. More than an hour: where clocks go
/// forward, the time of day may come an hour late.
const SLACK: SignedDuration = SignedDuration::from_hours(2);

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::civil::time;

    fn schedule(hours: u64, at: Option<Time>) -> Schedule {
        let every = (hours > 0).then(|| Duration::from_secs(hours * 3600));
        Schedule { every, at, zone: TimeZone::get("Europe/Berlin").unwrap() }
    }

    fn moment(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_first_backup_is_due_at_once_and_the_next_after_the_interval() {
        let now = moment("2025-12-17T08:00:00Z");
        assert_eq!(schedule(24, None).next(None, now), Some(now));
        assert_eq!(schedule(24, None).next(Some(now), now), Some(moment("2025-12-18T08:00:00Z")));
        assert_eq!(schedule(0, None).next(None, now), None);
    }

    #[test]
    fn a_time_of_day_is_kept_from_day_to_day_and_through_the_change_of_clocks() {
        let nightly = schedule(24, Some(time(2, 30, 0, 0)));
        let next = |last: &str| nightly.next(Some(moment(last)), moment(last)).unwrap().to_string();
        assert_eq!(next("2025-12-17T01:30:05Z"), "2025-12-18T01:30:00Z");
        assert_eq!(next("2025-12-17T10:00:00Z"), "2025-12-19T01:30:00Z");
        // 02:30 does not exist on that day: an hour later on the clock is the same distance from midnight.
        assert_eq!(next("2026-03-28T01:30:05Z"), "2026-03-29T01:30:00Z");
        assert_eq!(next("2026-03-29T01:30:05Z"), "2026-03-30T00:30:00Z");
    }
}
