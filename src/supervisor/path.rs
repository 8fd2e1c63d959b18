//! Where to stream from next, on a server with a given history. Pure.

use crate::pg::{Position, SegmentSize, TimelineHistory, TimelineId};

/// What a server means for WAL that reaches to some position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Course {
    /// Stream from here on. If it is not where our WAL ends, it is the beginning of the segment in which the next
    /// timeline branched off.
    From(Position),
    /// The server is on an older timeline than our WAL: an old primary that came back. Following it would archive WAL
    /// that the cluster has left behind.
    Stale,
    /// Our timeline is not among the server's ancestors: it was promoted from a server that never was on it.
    Elsewhere,
}

/// Where to go on from `have`, the end of the WAL that we hold.
pub(super) fn course(path: &TimelineHistory, have: Position, size: SegmentSize) -> Course {
    if path.timeline() < have.timeline {
        return Course::Stale;
    }
    match path.end_of(have.timeline) {
        None => Course::Elsewhere,
        Some(end) if have.lsn < end => Course::From(have),
        // WAL past the switch point is WAL that the new primary never had. It stays on the old timeline.
        Some(end) => match child(path, have.timeline) {
            Some(timeline) => Course::From(Position { timeline, lsn: end.align_down(size.bytes()) }),
            None => Course::Elsewhere, // no timeline ends at the end of all WAL
        },
    }
}

/// The timeline that followed `timeline` on `path`.
fn child(path: &TimelineHistory, timeline: TimelineId) -> Option<TimelineId> {
    let ancestors = path.ancestors().iter().map(|a| a.timeline);
    ancestors.chain([path.timeline()]).find(|t| *t > timeline)
}

/// True if `synchronous_standby_names` lets commits wait for `name`. Whether they do now, `pg_stat_replication` says.
///
/// (Postgres: `syncrep_gram.y`, `syncrep_scanner.l`: names are case-insensitive, `*` matches all.)
pub(super) fn waits_for(synchronous_standby_names: &str, name: &str) -> bool {
    let list = match (synchronous_standby_names.find('('), synchronous_standby_names.rfind(')')) {
        (Some(open), Some(close)) if open < close => synchronous_standby_names.get(open + 1..close).unwrap_or_default(),
        _ => synchronous_standby_names,
    };
    list.split(',').map(|n| n.trim().trim_matches('"')).any(|n| n == "*" || n.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Lsn;

    const MIB: u64 = 1 << 20;

    fn at(timeline: u32, lsn: u64) -> Position {
        Position { timeline: TimelineId::new(timeline).unwrap(), lsn: Lsn::new(lsn) }
    }

    fn path(timeline: u32, content: &str) -> TimelineHistory {
        TimelineHistory::parse(TimelineId::new(timeline).unwrap(), content).unwrap()
    }

    fn go(path: &TimelineHistory, have: Position) -> Course {
        course(path, have, SegmentSize::new(MIB).unwrap())
    }

    #[test]
    fn a_timeline_is_followed_to_its_end_and_then_its_child() {
        let path = path(3, "1\t0/200100\t\n2\t0/500000\t\n");
        assert_eq!(go(&path, at(1, 0x10_0000)), Course::From(at(1, 0x10_0000)));
        assert_eq!(go(&path, at(1, 0x20_0100)), Course::From(at(2, 0x20_0000)));
        assert_eq!(go(&path, at(2, 0x50_0000)), Course::From(at(3, 0x50_0000)));
        assert_eq!(go(&path, at(3, 0x90_0000)), Course::From(at(3, 0x90_0000)));
    }

    #[test]
    fn wal_that_the_new_primary_never_had_is_left_on_the_old_timeline() {
        let path = path(2, "1\t0/200100\t\n");
        assert_eq!(go(&path, at(1, 0x70_0000)), Course::From(at(2, 0x20_0000)));
    }

    #[test]
    fn an_old_primary_that_came_back_is_not_followed() {
        assert_eq!(go(&TimelineHistory::root(TimelineId::FIRST), at(2, 0x20_0000)), Course::Stale);
    }

    #[test]
    fn a_server_that_never_was_on_our_timeline_is_elsewhere() {
        assert_eq!(go(&path(3, "1\t0/200100\t\n"), at(2, 0x30_0000)), Course::Elsewhere);
    }

    #[test]
    fn synchronous_standby_names_are_read_as_postgres_reads_them() {
        for setting in ["walguard", "a, walguard", "FIRST 1 (a, \"walguard\")", "ANY 2 (WalGuard,b)", "2 (a, *)", "*"] {
            assert!(waits_for(setting, "walguard"), "{setting}");
        }
        for setting in ["", "a", "FIRST 1 (a, b)", "walguard2"] {
            assert!(!waits_for(setting, "walguard"), "{setting}");
        }
    }
}
