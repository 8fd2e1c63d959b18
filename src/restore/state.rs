//! The note that a restore leaves in the directory that it fills, until it is done: what is unfinished is known as that, and
//! the same restore goes on with it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::Path;

use super::error::RestoreError;
use super::plan::RestorePlan;
use crate::atomic_file;
use crate::pg::{Lsn, SystemId, TimelineId};

/// The note's name, in the data directory.
pub(super) const FILE: &str = "walguard-unfinished.json";

/// True for the note, and for drafts of it that a kill left.
pub(super) fn is_note(name: &OsStr) -> bool {
    name == FILE || name.as_encoded_bytes().starts_with(format!(".{FILE}.").as_bytes())
}

/// A note larger than this is none.
const BYTES_MAX: u64 = 64 << 10;

/// How far a restore has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    /// Files of the base backup are being written.
    Extract,
    /// All of them are there; the server replays WAL.
    Replay,
    /// The target is reached and proved, and the server was told to become a primary.
    Promote,
}

/// What is being restored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
pub(super) struct Unfinished {
    pub(super) system_id: SystemId,
    pub(super) label: String,
    pub(super) stop: Lsn,
    pub(super) inclusive: bool,
    pub(super) timeline: TimelineId,
    pub(super) stage: Stage,
}

impl Unfinished {
    pub(super) fn of(plan: &RestorePlan, stage: Stage) -> Self {
        Self {
            system_id: plan.system_id(),
            label: plan.backup.label.clone(),
            stop: plan.stop.lsn,
            inclusive: plan.stop.inclusive,
            timeline: plan.timeline,
            stage,
        }
    }

    /// The note in a directory; `None` if there is none, or one that cannot be read.
    pub(super) fn read(data_dir: &Path) -> Option<Self> {
        let path = data_dir.join(FILE);
        let length = fs::symlink_metadata(&path).ok().filter(fs::Metadata::is_file)?.len();
        if length > BYTES_MAX {
            return None;
        }
        serde_json::from_slice(&fs::read(&path).ok()?).ok()
    }

    /// Leaves the note, durably.
    pub(super) fn write(&self, data_dir: &Path) -> Result<(), RestoreError> {
        let path = data_dir.join(FILE);
        let json = serde_json::to_vec_pretty(self).expect("a note is plain data");
        atomic_file::write(&path, &json).map_err(RestoreError::file("write", path))
    }

    /// Leaves the note where an earlier one is; everything else that it speaks of is in memory, too.
    pub(super) fn write_unsynced(&self, data_dir: &Path) -> Result<(), RestoreError> {
        let (path, draft) = (data_dir.join(FILE), data_dir.join(format!(".{FILE}.draft")));
        let json = serde_json::to_vec_pretty(self).expect("a note is plain data");
        fs::write(&draft, json).and_then(|()| fs::rename(&draft, &path)).map_err(RestoreError::file("write", path))
    }

    /// True if what `before` has replayed is on the way here: it stops no later, on the same timeline.
    pub(super) fn is_beyond(&self, before: &Self) -> bool {
        let stop = |this: &Self| (this.stop, this.inclusive);
        self.system_id == before.system_id && self.timeline == before.timeline && stop(self) >= stop(before)
    }

    /// True if this is the same restore, however far it is.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        Self { stage: other.stage, ..self.clone() } == *other
    }
}

/// The restore is done: removes the note, durably.
pub(super) fn remove(data_dir: &Path) -> Result<(), RestoreError> {
    let path = data_dir.join(FILE);
    for entry in fs::read_dir(data_dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if is_note(&name) && name != FILE {
            let _ = fs::remove_file(entry.path()); // a draft disturbs nobody
        }
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RestoreError::file("remove", path)(error)),
        _ => atomic_file::sync_folder_of(&path).map_err(RestoreError::file("sync the folder of", path)),
    }
}
