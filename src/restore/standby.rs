//! The settings of a restored server while WAL is placed for it, and only then: they stand behind all others in
//! `postgresql.auto.conf`, where the last word on a setting wins, and are taken out again.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use super::error::RestoreError;
use super::tuning::Tuning;

const BEGIN: &str = "# --- walguard replay: begin ---";
const END: &str = "# --- walguard replay: end ---";

/// The file that the settings stand in.
const AUTO: &str = "postgresql.auto.conf";

/// Turns a directory that is configured for recovery (see `recovery`) into one whose server replays what is placed in
/// `pg_wal`, waits for what is not, and is tuned for that.
///
/// # Errors
/// Of the file system.
pub(super) fn begin(data_dir: &Path, tuning: &Tuning) -> Result<(), RestoreError> {
    let auto = data_dir.join(AUTO);
    let text = read(&auto)?;
    write(&auto, &format!("{}{}", without_block(&text), block(tuning)))?;
    // A standby does not take the end of what is there for the end of the WAL. It stays one: the server wants to
    // remove this very file when it is promoted.
    let (recovery, standby) = (data_dir.join("recovery.signal"), data_dir.join("standby.signal"));
    match fs::rename(&recovery, &standby) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => write(&standby, ""),
        result => result.map_err(RestoreError::file("rename", recovery)),
    }
}

/// Takes the settings out again. With `syncs`, the server is told to sync what it writes, whatever the original does.
///
/// # Errors
/// Of the file system.
pub(super) fn end(data_dir: &Path, syncs: bool) -> Result<(), RestoreError> {
    let auto = data_dir.join(AUTO);
    let text = read(&auto)?;
    let kept = without_block(&text);
    let rest = if syncs {
        format!("{BEGIN}\n# Where this stands the original says otherwise.\nfsync = 'on'\n{END}\n")
    } else {
        String::new()
    };
    write(&auto, &format!("{kept}{rest}"))
}

/// Makes a stopped server one that recovers to its target, and is no standby: with a `restore_command` both do the same.
///
/// # Errors
/// Of the file system.
pub(super) fn end_as_recovery(data_dir: &Path) -> Result<(), RestoreError> {
    let (recovery, standby) = (data_dir.join("recovery.signal"), data_dir.join("standby.signal"));
    match fs::rename(&standby, recovery) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RestoreError::file("rename", standby)(error)),
        _ => Ok(()),
    }
}

fn block(tuning: &Tuning) -> String {
    let mut text = format!(
        "{BEGIN}\n# The server replays WAL that `walguard restore` places in pg_wal. Both are under way: run the same \
         command again\n# if it ended before it was done.\n"
    );
    let mut set = |name: &str, value: &str| text += &format!("{name} = '{value}'\n");
    set("restore_command", "");
    // What the original may say as a standby.
    set("recovery_min_apply_delay", "0");
    if tuning.major <= 15 {
        set("promote_trigger_file", "");
    }
    for (name, value) in tuning.settings() {
        set(name, &value);
    }
    text + END + "\n"
}

fn without_block(text: &str) -> String {
    super::recovery::without_marked(text, BEGIN, END)
}

fn read(path: &Path) -> Result<String, RestoreError> {
    match fs::read(path) {
        // Comments may be in any encoding; what matters is ASCII.
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(RestoreError::file("read", path)(error)),
    }
}

/// Replaces a file. Not synced: everything is, before the restore is done.
fn write(path: &Path, text: &str) -> Result<(), RestoreError> {
    let draft = path.with_extension("walguard-draft");
    fs::write(&draft, text)
        .and_then(|()| fs::set_permissions(&draft, fs::Permissions::from_mode(0o600)))
        .and_then(|()| fs::rename(&draft, path))
        .map_err(RestoreError::file("write", path))
}

#[cfg(test)]
mod tests {
    use super::super::tuning::Machine;
    use super::*;

    #[test]
    fn what_is_set_for_the_replay_is_taken_back_and_all_else_stays() {
        let folder = tempfile::tempdir().unwrap();
        let auto = folder.path().join(AUTO);
        let before = "# caf\u{e9}\nwork_mem = '7MB'\nrestore_command = 'fetch'\n";
        fs::write(&auto, before).unwrap();
        fs::write(folder.path().join("recovery.signal"), "").unwrap();
        let machine = Machine { memory: 1 << 34, room: 1 << 40 };
        let tuning = Tuning::of(machine, 15, (1 << 30, 1 << 30), None, false);
        for _ in 0..2 {
            begin(folder.path(), &tuning).unwrap();
            let text = fs::read_to_string(&auto).unwrap();
            assert!(text.starts_with(before) && text.matches("restore_command = ''").count() == 1, "{text}");
            assert!(text.contains("fsync = 'off'\n") && text.contains("promote_trigger_file = ''\n"));
            assert!(!folder.path().join("recovery.signal").exists() && folder.path().join("standby.signal").exists());
        }
        end(folder.path(), false).unwrap();
        assert_eq!(fs::read_to_string(&auto).unwrap(), before);
        end(folder.path(), true).unwrap();
        assert!(fs::read_to_string(&auto).unwrap().contains("fsync = 'on'\n"));
        begin(folder.path(), &tuning).unwrap();
        end(folder.path(), false).unwrap();
        assert_eq!(fs::read_to_string(&auto).unwrap(), before);
    }
}
