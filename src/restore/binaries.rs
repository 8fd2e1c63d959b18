//! PostgreSQL's programs of the major version that a backup needs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::error::RestoreError;
use crate::pg::ServerVersion;

/// Programs of one major version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binaries {
    /// Their directory.
    pub dir: PathBuf,
    /// Their version.
    pub version: ServerVersion,
}

/// Finds the programs of `major`: in `given` and nowhere else if that is set, otherwise in the directories of `path` (the
/// variable `PATH`) and where Debian and PGDG put them.
///
/// # Errors
/// If there are none of that version; the error says what was found instead.
pub fn find(major: u32, given: Option<&Path>, path: Option<&OsStr>) -> Result<Binaries, RestoreError> {
    let places: Vec<PathBuf> = match given {
        Some(dir) => vec![dir.to_owned()],
        None => {
            let usual = [
                format!("/usr/lib/postgresql/{major}/bin"),
                format!("/usr/pgsql-{major}/bin"),
                format!("/opt/homebrew/opt/postgresql@{major}/bin"),
                "/usr/local/pgsql/bin".to_owned(),
            ];
            std::env::split_paths(path.unwrap_or_default()).chain(usual.map(PathBuf::from)).collect()
        }
    };
    let mut seen = Vec::new();
    for dir in places {
        match version_of(&dir) {
            Some(version) if version.major() == major => return Ok(Binaries { dir, version }),
            Some(version) => seen.push(format!("{} in {}", version, dir.display())),
            None => {}
        }
    }
    let problem = match (seen.is_empty(), given) {
        (true, Some(dir)) => format!("no `postgres` that runs is in {}", dir.display()),
        (true, None) => "no `postgres` is in PATH or in the usual directories".to_owned(),
        (false, _) => format!("found only {}", seen.join(", ")),
    };
    Err(RestoreError::Binaries { major, problem })
}

/// The version that `postgres` in this directory says it has.
fn version_of(dir: &Path) -> Option<ServerVersion> {
    let postgres = dir.join("postgres");
    if !postgres.is_file() {
        return None;
    }
    let output = Command::new(postgres).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    ServerVersion::parse(text.trim().strip_prefix("postgres (PostgreSQL) ")?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    fn install(dir: &Path, version: &str) -> PathBuf {
        let bin = dir.join(version);
        fs::create_dir(&bin).unwrap();
        let program = bin.join("postgres");
        fs::write(&program, format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version} (Some 1.2)'\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        bin
    }

    #[test]
    fn programs_of_another_major_are_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let (old, new) = (install(folder.path(), "14.3"), install(folder.path(), "99.7"));
        let path = std::env::join_paths([&old, &new]).unwrap();
        assert_eq!(find(99, None, Some(&path)).unwrap().dir, new);
        assert_eq!(find(14, Some(&old), Some(OsStr::new(""))).unwrap().version, ServerVersion::new(140_003));
        let error = find(98, Some(&old), Some(&path)).unwrap_err().to_string();
        assert!(error.contains("14.3 in"), "{error}");
        let error = find(98, Some(folder.path()), None).unwrap_err().to_string();
        assert!(error.contains("no `postgres` that runs"), "{error}");
    }
}
