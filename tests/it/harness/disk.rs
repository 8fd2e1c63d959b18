//! A disk that is too small.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Scratch, finish, give_away};

/// A file system in memory. It is unmounted with this value.
#[derive(Debug)]
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `options` are those of tmpfs. `None` for whoever may not mount anything.
    pub(crate) fn mount(scratch: &Scratch, options: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: needs root, to mount a small file system");
            return None;
        }
        let dir = scratch.dir("small-disk");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(&dir);
        finish(mount).expect(0);
        give_away(&dir);
        Some(Self(dir))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the agent of a test that failed still has files open there.
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
