//! Base backups: what `BASE_BACKUP` sends becomes seekable, checked, compressed objects, and back.
//!
//! ```text
//!            tar_index        frames          compress             parts
//!  server -> members and  -> ~1 MiB, pages -> all cores: zstd,  -> 8 MiB,    -> repository, manifest last
//!            where they lie   never cut       BLAKE3, page sums    uploaded
//!
//!  repository -> reader: one frame, any frame -> its content, proved
//! ```
//!
//! [`take()`] drives this from a stream, [`run`] from a connection. What the server says of itself is in [`Origin`], what
//! the backup is made of in its [`manifest`].

mod compress;
mod error;
mod frames;
mod label;
pub mod manifest;
mod origin;
pub mod page_checksum;
mod parts;
pub mod reader;
pub mod relation_file;
mod suspects;
mod take;
mod tar_index;
mod wait;
mod writer;

use std::time::Duration;

use bytesize::ByteSize;

use crate::capture::Checkpoint;

pub use crate::repo::catalog::BackupInfo;
pub use error::BackupError;
pub use label::choose_label;
pub use origin::Origin;
pub use take::BackupOptions;
pub use take::Request;
pub use take::Taken;
pub use take::run;
pub use take::take;
pub use wait::wait_for_wal;

/// How base backups are taken and stored: the `[backup]` table of the settings.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The agent takes a base backup when the newest is older than this; with 0, only when WAL was lost.
    #[serde(with = "jiff::fmt::serde::unsigned_duration::friendly::compact::optional")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub interval: Option<Duration>,
    /// The time of day, in the zone of the settings, at which the agent begins a backup that falls due that day:
    /// `02:30`. Without it, when it falls due.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at: Option<jiff::civil::Time>,
    /// zstd level, 1 to 19. On the pages of tables, 1 is faster than 3 and not larger.
    pub compression_level: i32,
    /// Bytes of an object at most, from 1 MiB to 1 GiB. 32 MiB of them are held in memory: by default, one is being filled
    /// while three are on their way. Of larger ones, two.
    pub part_size: ByteSize,
    /// How the server's checkpoint at the beginning is made: `fast` (at once) or `spread` (without a burst of writes).
    pub checkpoint: Checkpoint,
    /// Bytes that the server sends in a second at most, from 32 KiB to 1 GiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rate: Option<ByteSize>,
    /// Check the checksum of every page, where the cluster has them.
    pub verify_page_checksums: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            interval: Some(Duration::from_secs(24 * 3600)),
            at: None,
            compression_level: crate::repo::frame::LEVEL_DEFAULT,
            part_size: ByteSize::mib(8),
            checkpoint: Checkpoint::Fast,
            max_rate: None,
            verify_page_checksums: true,
        }
    }
}

impl Config {
    /// Checks what cannot be told from the types.
    ///
    /// # Errors
    /// What is wrong, with the setting's name.
    pub fn check(&self) -> Result<(), String> {
        let part = self.part_size.as_u64();
        if !(1..=19).contains(&self.compression_level) {
            return Err(format!("backup.compression_level = {} is not from 1 to 19", self.compression_level));
        }
        if !((1 << 20)..=(1 << 30)).contains(&part) {
            return Err(format!("backup.part_size = \"{}\" is not from 1 MiB to 1 GiB", self.part_size));
        }
        match self.max_rate.map(|rate| rate.as_u64()) {
            Some(rate) if !((32 << 10)..=(1 << 30)).contains(&rate) => {
                Err(format!("backup.max_rate = {rate} bytes is not from 32 KiB to 1 GiB"))
            }
            _ => Ok(()),
        }
    }
}
