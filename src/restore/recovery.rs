//! What a restored data directory needs so that its server recovers to exactly the planned place, and to no other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::RestoreError;
use super::handover::MARK;
use super::plan::RestorePlan;
use crate::atomic_file;
use crate::decode::rmgr::xlog::Parameters;
use crate::repo;

/// How the server calls `walguard wal-fetch`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FetchCommand {
    /// The program, by its absolute path.
    pub program: PathBuf,
    /// Settings that name the repository, as TOML. They are put into a file that only the server's user can read.
    pub settings: String,
}

impl FetchCommand {
    /// How `program` is called: with settings that name the repository and nothing else. Secrets stay in the files that
    /// these name, or in the environment that the server inherits.
    ///
    /// # Errors
    /// If a path cannot be made absolute: the server works in its data directory.
    pub fn new(program: PathBuf, repository: &repo::Config, cluster: &str) -> io::Result<Self> {
        let mut repository = repository.clone();
        let files = [
            &mut repository.s3.access_key_id_file,
            &mut repository.s3.secret_access_key_file,
            &mut repository.s3.session_token_file,
        ];
        for file in files.into_iter().flatten() {
            *file = std::path::absolute(&*file)?;
        }
        let repository = toml::Value::try_from(&repository).map_err(io::Error::other)?;
        let mut table = toml::Table::new();
        table.insert("cluster".to_owned(), cluster.into());
        table.insert("repository".to_owned(), repository);
        let settings = format!("# How `walguard wal-fetch` finds the WAL of this restored server.\n{table}");
        Ok(Self { program, settings })
    }
}

/// The settings file of `wal-fetch`, in the data directory.
pub const FETCH_SETTINGS: &str = "walguard-restore.toml";

/// What was added to the settings, in the data directory: `ALTER SYSTEM` keeps the settings and not the marks around them.
const ADDED: &str = "walguard-restore.conf";

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

/// Libraries that start jobs by themselves as soon as a server takes writes: mails would be sent twice, rows deleted that
/// somebody is looking for. Nothing that is stored needs them.
const JOB_LIBRARIES: [&str; 4] = ["pg_cron", "pg_net", "pg_partman_bgw", "pgagent"];

/// Writes everything that recovery needs into an extracted data directory. `settings` are those of the backup's manifest.
/// A `bare` one gets nothing for recovery: whoever starts the server arranges that.
///
/// # Errors
/// Of the file system.
pub fn configure(
    data_dir: &Path,
    plan: &RestorePlan,
    settings: &BTreeMap<String, String>,
    fetch: &FetchCommand,
    bare: bool,
) -> Result<(), RestoreError> {
    for leftover in ["standby.signal", "recovery.signal", "postmaster.pid", "postmaster.opts", "promote", MARK] {
        let path = data_dir.join(leftover);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(RestoreError::file("remove", path)(error));
            }
            _ => {}
        }
    }
    let original_hba = read_if_there(&data_dir.join("pg_hba.conf"))?;
    // First match wins: whoever can open the socket, which only the server's user can, is let in.
    let hba = format!("local all all trust\n{}", original_hba.as_deref().unwrap_or_default());
    if !bare {
        write_private(&data_dir.join(FETCH_SETTINGS), &fetch.settings)?;
        write_private(&data_dir.join(HBA), &hba)?;
    }
    if original_hba.is_none() {
        write_private(&data_dir.join("pg_hba.conf"), MINIMAL_HBA)?;
    }
    if read_if_there(&data_dir.join("pg_ident.conf"))?.is_none() {
        write_private(&data_dir.join("pg_ident.conf"), "")?;
    }
    let conf = data_dir.join("postgresql.conf");
    let original_conf = read_if_there(&conf)?;
    let has_conf = original_conf.is_some();
    match original_conf {
        None => write_private(&conf, &minimal_conf(settings))?,
        Some(text) => {
            let plain = if text.contains(BEGIN) { without_block(&text) } else { text.clone() };
            let mended = keep_in(data_dir, &plain).unwrap_or(plain);
            if mended != text {
                write_private(&conf, &mended)?;
            }
        }
    }
    let auto = data_dir.join("postgresql.auto.conf");
    let old = without_block(&read_if_there(&auto)?.unwrap_or_default());
    if bare {
        return write_private(&auto, &old);
    }
    let loads = has_conf || value_of(&old, "shared_preload_libraries").is_some();
    let libraries = settings.get("shared_preload_libraries").filter(|_| loads).and_then(|all| without_jobs(all));
    let added = block(data_dir, plan, settings, fetch, libraries.as_deref());
    write_private(&data_dir.join(ADDED), &added)?;
    write_private(&auto, &format!("{old}{added}"))?;
    write_private(&data_dir.join("recovery.signal"), "")
}

/// Takes out of a data directory's settings what [`configure`] added: from now on its server is like any other.
///
/// # Errors
/// Of the file system.
pub(super) fn settle(data_dir: &Path) -> Result<(), RestoreError> {
    let added = read_if_there(&data_dir.join(ADDED))?.unwrap_or_default();
    for name in ["postgresql.conf", "postgresql.auto.conf"] {
        let path = data_dir.join(name);
        let Some(text) = read_if_there(&path)? else { continue };
        let mut plain = without_block(&text);
        if name == "postgresql.auto.conf" && !text.contains(BEGIN) {
            let is_ours = |line: &&str| !line.starts_with('#') && added.lines().any(|ours| ours == *line);
            plain = plain.lines().filter(|line| !is_ours(line)).map(|line| format!("{line}\n")).collect();
        }
        if plain != text {
            write_private(&path, &plain)?;
        }
    }
    for name in ["recovery.signal", "standby.signal", "promote"] {
        remove_if_there(&data_dir.join(name))?;
    }
    Ok(())
}

/// Removes what a restore left behind besides: it is none any more.
///
/// # Errors
/// Of the file system.
pub(super) fn forget(data_dir: &Path) -> Result<(), RestoreError> {
    for name in [FETCH_SETTINGS, HBA, ADDED, MARK] {
        remove_if_there(&data_dir.join(name))?;
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> Result<(), RestoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RestoreError::file("remove", path)(error)),
        _ => Ok(()),
    }
}

/// The last value that a configuration gives a setting, without its quotes; those of files that it includes are not seen.
pub(super) fn value_of(text: &str, name: &str) -> Option<String> {
    let mut values = text.lines().filter_map(|line| {
        let line = line.trim_start();
        let rest = line.get(..name.len()).filter(|head| head.eq_ignore_ascii_case(name)).and(line.get(name.len()..))?;
        let rest = rest.starts_with([' ', '\t', '=']).then_some(rest)?.trim_start_matches([' ', '\t', '=']);
        Some(match rest.strip_prefix('\'') {
            // Up to the quote that is not doubled.
            Some(quoted) => {
                let doubled = quoted.replace("\'\'", "\0");
                doubled.split('\'').next().unwrap_or_default().replace('\0', "'")
            }
            None => rest.split(['#', ' ', '\t']).next().unwrap_or_default().to_owned(),
        })
    });
    values.next_back()
}

/// The libraries without those that start jobs; `None` if there are none of these.
fn without_jobs(libraries: &str) -> Option<String> {
    let name = |library: &str| {
        let plain = library.trim().trim_matches('"');
        let plain = plain.rsplit('/').next().unwrap_or_default();
        plain.strip_suffix(".so").unwrap_or(plain).to_owned()
    };
    let all: Vec<&str> = libraries.split(',').map(str::trim).filter(|library| !library.is_empty()).collect();
    let kept: Vec<&str> = all.iter().filter(|one| !JOB_LIBRARIES.contains(&name(one).as_str())).copied().collect();
    (kept.len() < all.len()).then(|| kept.join(", "))
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
pub(super) fn without_block(text: &str) -> String {
    without_marked(text, BEGIN, END)
}

/// The lines that do not stand between a line `begin` and a line `end`, nor are one of these.
pub(super) fn without_marked(text: &str, begin: &str, end: &str) -> String {
    let mut kept = String::new();
    let mut inside = false;
    for line in text.lines() {
        if line == begin {
            inside = true;
        } else if line == end {
            inside = false;
        } else if !inside {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

/// The settings of the restored server. The last word on a setting wins, so they stand behind the original's.
fn block(
    data_dir: &Path,
    plan: &RestorePlan,
    settings: &BTreeMap<String, String>,
    fetch: &FetchCommand,
    libraries: Option<&str>,
) -> String {
    let mut text = format!(
        "{BEGIN}\n# Recovery to what was asked for. The restored server must never archive over the original's WAL, nor\n\
         # connect to anybody, nor run jobs. `walguard handover` takes this block out and makes it a server of its own.\n"
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
    // A subscription would go on, and use up what the original's has not got yet.
    set("max_logical_replication_workers", "0");
    if let Some(libraries) = libraries {
        set("shared_preload_libraries", libraries);
    }
    // Nobody confirms this server's commits: they must not wait for it.
    set("synchronous_standby_names", "");
    // Whoever archives it once it is handed over must find its timeline whole, and no slot holds it until then.
    set("wal_keep_size", "1GB");
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
    fn what_a_restore_added_is_taken_out_even_after_alter_system() {
        let folder = tempfile::tempdir().unwrap();
        let auto = folder.path().join("postgresql.auto.conf");
        let added = format!("{BEGIN}\n# why\narchive_mode = 'off'\nrestore_command = 'x'\n{END}\n");
        fs::write(folder.path().join(ADDED), &added).unwrap();
        fs::write(folder.path().join("postgresql.conf"), format!("port = 1\n{added}")).unwrap();
        // As `ALTER SYSTEM SET work_mem` leaves it.
        let warning = "# Do not edit this file manually!\n";
        let after = "archive_command = 'cp'\narchive_mode = 'off'\nrestore_command = 'x'\nwork_mem = '1MB'\n";
        fs::write(&auto, format!("{warning}{after}")).unwrap();
        settle(folder.path()).unwrap();
        let left = fs::read_to_string(&auto).unwrap();
        assert_eq!(left, format!("{warning}archive_command = 'cp'\nwork_mem = '1MB'\n"));
        assert_eq!(fs::read_to_string(folder.path().join("postgresql.conf")).unwrap(), "port = 1\n");
        settle(folder.path()).unwrap();
        assert_eq!(fs::read_to_string(&auto).unwrap(), left, "a second time changes nothing");
    }

    #[test]
    fn the_last_value_of_a_setting_counts() {
        let text = "#a = 0\n a = 1\nab = 2\nA = 'it''s' # new\n";
        assert_eq!(value_of(text, "a").as_deref(), Some("it's"));
        assert_eq!(value_of("a 5 # five\n", "a").as_deref(), Some("5"));
        assert_eq!(value_of("ab = 2\n", "a"), None);
    }

    #[test]
    fn only_libraries_that_start_jobs_are_left_out() {
        assert_eq!(without_jobs("pg_stat_statements, pg_cron,pgaudit").as_deref(), Some("pg_stat_statements, pgaudit"));
        assert_eq!(without_jobs("$libdir/pg_cron.so").as_deref(), Some(""));
        assert_eq!(without_jobs("timescaledb, auto_explain"), None);
        assert_eq!(without_jobs(""), None);
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
