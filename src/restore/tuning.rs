//! What a server is tuned to while it does nothing but replay WAL, from the machine's memory and room. Pure but for
//! [`Machine::here`].
//!
//! Why each is safe:
//!
//! - `fsync = off`: only while the control file lies in memory (see `control`), so that a directory of which only some pages
//!   reached the disk never starts. It is on again, and everything synced, before a restore is called done.
//! - Restartpoints only make room: an interrupted replay begins again at the last one, or at the backup's start. They come
//!   when `max_wal_size` is replayed, so that WAL which is not needed any more goes, and never by the clock.
//! - `wal_recycle = off`: a segment that was replayed is removed and not renamed to one to come, which might be taken for that.
//! - `bgwriter_lru_maxpages = 0`: writing pages early only writes them twice.
//! - `full_page_writes` is left alone: a server in recovery writes no WAL, and when it is promoted the original's setting
//!   must hold.
//! - `wal_retrieve_retry_interval`: how soon a segment that was just placed is seen.
//!
//! `shared_buffers` and `wal_decode_buffer_size` stay as they are until the server is started anew; all others are taken
//! back while it runs.

use std::path::Path;

use super::directory;

/// Of the memory that is free, the server's buffers take one part in this many.
const BUFFERS_SHARE: u64 = 4;

/// PostgreSQL's own default is not more; a small machine bears it.
const BUFFERS_MIN: u64 = 128 << 20;

/// More than this is of no use to a replay that a restore waits for, and takes long to set up.
const BUFFERS_MAX: u64 = 16 << 30;

/// Of the room that the base backup leaves, WAL takes one part in this many: once ahead of replay, and once behind it.
const ROOM_SHARE: u64 = 4;

/// WAL further ahead than this share of the memory is read from the disk again.
const AHEAD_MEMORY_SHARE: u64 = 4;

/// PostgreSQL takes at least two segments; less than this makes a restartpoint of every checkpoint.
const WAL_BEHIND_MIN: u64 = 2 << 30;

/// What the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Machine {
    /// Bytes of memory that can be had without taking them from others.
    pub(super) memory: u64,
    /// Bytes of room where the data directory is, the base backup already in it.
    pub(super) room: u64,
}

impl Machine {
    /// Looks at this machine.
    pub(super) fn here(data_dir: &Path) -> Self {
        Self { memory: memory_free(), room: directory::free_bytes(data_dir).unwrap_or(u64::MAX) }
    }
}

/// `MemAvailable` of the kernel or what the control group leaves, whichever is less. 1 GiB if neither can be read.
fn memory_free() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let meminfo = read("/proc/meminfo").unwrap_or_default();
    let available = meminfo.lines().find_map(|line| {
        let kib = line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB")?.trim();
        Some(kib.parse::<u64>().ok()? * 1024)
    });
    let number = |path: &str| read(path)?.trim().parse::<u64>().ok();
    let group = number("/sys/fs/cgroup/memory.max")
        .map(|max| max.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    available.into_iter().chain(group).min().unwrap_or(1 << 30)
}

/// How a server is tuned, and how far WAL is placed ahead of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tuning {
    /// The server syncs what it writes.
    pub(super) syncs: bool,
    /// PostgreSQL's major version.
    pub(super) major: u32,
    buffers: u64,
    wal_behind: u64,
    /// Bytes of WAL that may lie in `pg_wal` before they are replayed.
    pub(super) wal_ahead: u64,
}

impl Tuning {
    /// For a base backup of `content_bytes` and `wal_bytes` of WAL. `wal_ahead` is what somebody asked for.
    pub(super) fn of(
        machine: Machine,
        major: u32,
        (content_bytes, wal_bytes): (u64, u64),
        wal_ahead: Option<u64>,
        syncs: bool,
    ) -> Self {
        // What is replayed touches pages of the backup, and makes new ones.
        let useful = content_bytes.saturating_add(wal_bytes).max(BUFFERS_MIN);
        let buffers = (machine.memory / BUFFERS_SHARE).clamp(BUFFERS_MIN, BUFFERS_MAX).min(useful);
        let ahead = (machine.room / ROOM_SHARE).min(machine.memory / AHEAD_MEMORY_SHARE);
        // If all of it fits, no restartpoint is needed.
        let wal_behind = match machine.room / ROOM_SHARE {
            share if wal_bytes <= share => u64::MAX,
            share => share.max(WAL_BEHIND_MIN),
        };
        Self { syncs, major, buffers, wal_behind, wal_ahead: wal_ahead.unwrap_or(ahead) }
    }

    /// The settings, names and values.
    pub(super) fn settings(&self) -> Vec<(&'static str, String)> {
        // `max_wal_size` is a number of MiB of 31 bits.
        let wal_behind_mib = (self.wal_behind >> 20).clamp(64, i32::MAX as u64 / 2);
        let mut settings = vec![
            ("fsync", if self.syncs { "on" } else { "off" }.to_owned()),
            ("shared_buffers", format!("{}MB", self.buffers >> 20)),
            ("max_wal_size", format!("{wal_behind_mib}MB")),
            ("checkpoint_timeout", "1d".to_owned()),
            ("wal_recycle", "off".to_owned()),
            ("bgwriter_lru_maxpages", "0".to_owned()),
            ("maintenance_io_concurrency", "100".to_owned()),
            ("wal_retrieve_retry_interval", "5ms".to_owned()),
            ("update_process_title", "on".to_owned()),
        ];
        if self.major >= 15 {
            settings.push(("recovery_prefetch", "try".to_owned()));
            settings.push(("wal_decode_buffer_size", "4MB".to_owned()));
        }
        settings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn what_fits_is_placed_without_restartpoints_and_what_does_not_makes_room_for_itself() {
        let machine = Machine { memory: 16 * GIB, room: 100 * GIB };
        let small = Tuning::of(machine, 15, (2 * GIB, 2 * GIB), None, false);
        assert_eq!((small.wal_behind, small.wal_ahead, small.buffers), (u64::MAX, 4 * GIB, 4 * GIB));
        let large = Tuning::of(machine, 15, (60 * GIB, 500 * GIB), None, false);
        assert_eq!((large.wal_behind, large.wal_ahead), (25 * GIB, 4 * GIB));
        let tight = Tuning::of(Machine { memory: GIB / 4, room: 0 }, 15, (GIB, GIB), None, false);
        assert_eq!((tight.wal_ahead, tight.buffers, tight.wal_behind), (0, BUFFERS_MIN, 2 * GIB));
        assert_eq!(Tuning::of(machine, 15, (GIB, GIB), Some(7), false).wal_ahead, 7);
    }

    #[test]
    fn settings_are_those_that_the_version_knows_and_take_numbers_it_takes() {
        let machine = Machine { memory: 16 * GIB, room: u64::MAX };
        let of = |major| Tuning::of(machine, major, (GIB, GIB), None, true).settings();
        assert!(of(14).iter().all(|(name, _)| *name != "recovery_prefetch"));
        assert!(of(15).contains(&("recovery_prefetch", "try".to_owned())));
        assert!(of(15).contains(&("fsync", "on".to_owned())));
        assert!(of(15).contains(&("max_wal_size", "1073741823MB".to_owned())));
    }
}
