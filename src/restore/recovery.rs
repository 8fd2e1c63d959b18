//! What a restored data directory needs so that its server recovers to exactly the planned place, and to no other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::RestoreError;
use super::plan::RestorePlan;
use crate::atomic_file;
use crate::decode::rmgr::xlog::Parameters;

/// How the server calls `walguard wal-fetch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchCommand {
    /// The program, by its absolute path.
    pub program: PathBuf,
    /// Settings that name the repository, as TOML. They are put into a file that only the server's user can read.
    pub settings: String,
}

/// The settings file of `wal-fetch`, in the data directory.
pub const FETCH_SETTINGS: &str = "walguard-restore.toml";

/// `pg_hba.conf` of the restored server while walguard watches it, in the data directory.
pub(super) const HBA: &str = "walguard-restore-hba.conf";

const BEGIN: &str = "# --- walguard restore: begin ---";
const END: &str = "# --- walguard restore: end ---";

/// A standby needs at least as much of these as its primary has.
const AT_LEAST: [&str; 5] = [
    "max_connections",
    "max_worker_processes",
    "max_wal_senders",
    "max_prepared_transactions",
    "max_locks_per_transaction",
];

/// Writes everything that recovery needs into an extracted data directory. `settings` are those of the backup's manifest.
///
/// # Errors
/// Of the file system.
pub fn configure(
    data_dir: &Path,
    plan: &RestorePlan,
    settings: &BTreeMap<String, String>,
    fetch: &FetchCommand,
) -> Result<(), RestoreError> {
    for leftover in ["standby.signal", "postmaster.pid", "postmaster.opts", "promote"] {
        let path = data_dir.join(leftover);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(RestoreError::file("remove", path)(error));
            }
            _ => {}
        }
    }
    write_private(&data_dir.join(FETCH_SETTINGS), &fetch.settings)?;
    let original_hba = read_if_there(&data_dir.join("pg_hba.conf"))?;
    // First match wins: whoever can open the socket, which only the server's user can, is let in.
    let hba = format!("local all all trust\n{}", original_hba.as_deref().unwrap_or_default());
    write_private(&data_dir.join(HBA), &hba)?;
    if original_hba.is_none() {
        write_private(&data_dir.join("pg_hba.conf"), MINIMAL_HBA)?;
    }
    if read_if_there(&data_dir.join("pg_ident.conf"))?.is_none() {
        write_private(&data_dir.join("pg_ident.conf"), "")?;
    }
    let conf = data_dir.join("postgresql.conf");
    match read_if_there(&conf)? {
        None => write_private(&conf, &minimal_conf(settings))?,
        Some(text) => {
            if let Some(mended) = keep_in(data_dir, &text) {
                write_private(&conf, &mended)?;
            }
        }
    }
    let auto = data_dir.join("postgresql.auto.conf");
    let old = read_if_there(&auto)?.unwrap_or_default();
    write_private(&auto, &format!("{}{}", without_block(&old), block(data_dir, plan, settings, fetch)))?;
    write_private(&data_dir.join("recovery.signal"), "")
}

const MINIMAL_HBA: &str = "\
# The backup held no pg_hba.conf: the server kept it elsewhere. This one lets in local users under their own names.
local all all peer
local replication all peer
";

fn minimal_conf(settings: &BTreeMap<String, String>) -> String {
    let was = settings.get("config_file").map(|path| format!(" It was {path}.")).unwrap_or_default();
    let mut text = format!("# The backup held no postgresql.conf: the server kept it elsewhere.{was}\n");
    for name in ["shared_preload_libraries", "cluster_name"] {
        if let Some(value) = settings.get(name).filter(|value| !value.is_empty()) {
            // Not set: the libraries may not be here, and the server would not start.
            text += &format!("#{name} = {}\n", quoted(value));
        }
    }
    text
}

/// A `postgresql.conf` that points at files of the original server is made to point at those of this directory. `None`
/// if it points nowhere.
fn keep_in(data_dir: &Path, text: &str) -> Option<String> {
    const ELSEWHERE: [&str; 4] = ["data_directory", "hba_file", "ident_file", "external_pid_file"];
    let sets = |name: &str| {
        text.lines().any(|line| {
            let rest = line.trim_start().strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with([' ', '\t', '=']))
        })
    };
    let named: Vec<_> = ELSEWHERE.into_iter().filter(|name| sets(name)).collect();
    if named.is_empty() {
        return None;
    }
    let mut mended = format!("{}\n{BEGIN}\n", text.trim_end());
    for name in named {
        let value = match name {
            "data_directory" => data_dir.display().to_string(),
            "hba_file" => data_dir.join("pg_hba.conf").display().to_string(),
            "ident_file" => data_dir.join("pg_ident.conf").display().to_string(),
            _ => data_dir.join("external.pid").display().to_string(), // an empty one cannot be set
        };
        mended += &format!("{name} = {}\n", quoted(&value));
    }
    Some(mended + END + "\n")
}

/// What an earlier restore wrote is taken out: the backup may be one of a restored server.
fn without_block(text: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.lines() {
        match line {
            BEGIN => inside = true,
            END => inside = false,
            line if !inside => {
                kept += line;
                kept.push('\n');
            }
            _ => {}
        }
    }
    kept
}

/// The settings of the restored server. The last word on a setting wins, so they stand behind the original's.
fn block(data_dir: &Path, plan: &RestorePlan, settings: &BTreeMap<String, String>, fetch: &FetchCommand) -> String {
    let mut text = format!(
        "{BEGIN}\n# Recovery to what was asked for. The restored server must never archive over the original's WAL, nor\n\
         # connect to it; take this block out to make it a server of its own that archives again.\n"
    );
    let mut set = |name: &str, value: &str| text += &format!("{name} = {}\n", quoted(value));
    set("restore_command", &restore_command(data_dir, fetch));
    for name in ["recovery_target", "recovery_target_name", "recovery_target_time", "recovery_target_xid"] {
        set(name, "");
    }
    set("recovery_target_lsn", &plan.stop.lsn.to_string());
    set("recovery_target_inclusive", if plan.stop.inclusive { "on" } else { "off" });
    set("recovery_target_timeline", &plan.timeline.to_string());
    set("recovery_target_action", "pause");
    set("hot_standby", "on");
    for name in ["archive_cleanup_command", "recovery_end_command", "archive_command"] {
        set(name, "");
    }
    if plan.backup.server_version.major() >= 15 {
        set("archive_library", "");
    }
    set("archive_mode", "off");
    set("primary_conninfo", "");
    set("primary_slot_name", "");
    // Nobody confirms this server's commits: they must not wait for it.
    set("synchronous_standby_names", "");
    for (name, value) in at_least(settings, plan.parameters.as_ref()) {
        set(name, &value.to_string());
    }
    text + END + "\n"
}

/// The settings that a hot standby must not have smaller than its primary had, now or when the WAL was written.
fn at_least<'a>(settings: &BTreeMap<String, String>, wal: Option<&Parameters>) -> impl Iterator<Item = (&'a str, i32)> {
    let wal = wal.copied().unwrap_or_default();
    let wal = [
        wal.max_connections,
        wal.max_worker_processes,
        wal.max_wal_senders,
        wal.max_prepared_transactions,
        wal.max_locks_per_transaction,
    ];
    let manifest = AT_LEAST.map(|name| settings.get(name).and_then(|value| value.parse::<i32>().ok()).unwrap_or(0));
    AT_LEAST
        .into_iter()
        .zip(manifest.into_iter().zip(wal))
        .map(|(name, (a, b))| (name, a.max(b)))
        .filter(|(_, value)| *value > 0)
}

fn restore_command(data_dir: &Path, fetch: &FetchCommand) -> String {
    let program = shell_quoted(&fetch.program.display().to_string());
    let settings = shell_quoted(&data_dir.join(FETCH_SETTINGS).display().to_string());
    format!("{program} wal-fetch --config {settings} \"%f\" \"%p\"")
}

/// A word for the shell, in a command in which Postgres replaces `%` sequences.
fn shell_quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''").replace('%', "%%"))
}

/// A value for `postgresql.conf` (Postgres: `GUC_scanstr` in `utils/misc/guc-file.l`).
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', r"\\").replace('\'', "''"))
}

fn read_if_there(path: &Path) -> Result<Option<String>, RestoreError> {
    match fs::read(path) {
        // Comments may be in any encoding; what matters is ASCII.
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RestoreError::file("read", path)(error)),
    }
}

fn write_private(path: &Path, text: &str) -> Result<(), RestoreError> {
    use std::os::unix::fs::PermissionsExt as _;
    atomic_file::write(path, text.as_bytes()).map_err(RestoreError::file("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(RestoreError::file("protect", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_an_earlier_restore_is_replaced_and_other_settings_stay() {
        let old = format!("work_mem = '64MB'\n{BEGIN}\nrestore_command = 'old'\n{END}\nport = 1\n");
        assert_eq!(without_block(&old), "work_mem = '64MB'\nport = 1\n");
    }

    #[test]
    fn values_and_paths_survive_both_quotings() {
        assert_eq!(quoted(r"it's a\b"), r"'it''s a\\b'");
        assert_eq!(shell_quoted("/a b/100%'s"), r"'/a b/100%%'\''s'");
    }

    #[test]
    fn a_configuration_that_points_at_the_original_server_is_turned_to_this_directory() {
        let text = "work_mem = 1\n data_directory = '/var/lib/original'\n#hba_file = 'x'\nident_file='/etc/ident'\n";
        let mended = keep_in(Path::new("/srv/restored"), text).unwrap();
        assert!(mended.starts_with(text));
        assert!(mended.contains("data_directory = '/srv/restored'\n"));
        assert!(mended.contains("ident_file = '/srv/restored/pg_ident.conf'\n"));
        assert!(!mended.contains("hba_file = '/srv"));
        assert_eq!(keep_in(Path::new("/srv/restored"), "data_directory_mode = 1\n#data_directory = 'x'\n"), None);
    }

    #[test]
    fn the_greater_of_manifest_and_wal_counts() {
        let settings = BTreeMap::from([("max_connections".to_owned(), "30".to_owned())]);
        let wal = Parameters { max_connections: 20, max_wal_senders: 7, ..Parameters::default() };
        let found: Vec<_> = at_least(&settings, Some(&wal)).collect();
        assert_eq!(found, [("max_connections", 30), ("max_wal_senders", 7)]);
    }
}
