//! A server of its own for a rebuild: made in an empty directory, reached over a socket in it, and left running or stopped.
//!
//! A note in the directory, written first and removed last, says that it is ours: what an interrupted run left there is gone on
//! with, and nothing else is touched. `initdb` works in a folder inside, which is moved up when it is complete.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tokio_postgres::Client;

use super::run::FORGET;
use super::sql;
use crate::atomic_file;
use crate::backoff::Chain;
use crate::capture::{ConnInfo, Environment, connect_sql, sql_error};
use crate::pg::{Lsn, ServerVersion};
use crate::repo::bases::{Locale, Manifest};
use crate::restore::binaries::{self, Binaries};
use crate::restore::directory::{self, Occupied};
use crate::restore::error::RestoreError;
use crate::restore::instance::{Instance, LOG, Listen, POLL_INTERVAL};
use crate::restore::proof::Reach;
use crate::restore::recovery::HBA;
use crate::restore::run::{make_directory, stop_server};

/// Says that the directory is that of a rebuild which has not come to its end.
const NOTE: &str = "walguard-rebuild.json";

/// How a folder's name begins where `initdb` works. Each has one of its own: the `initdb` of a run that was killed may be at work
/// still.
const DRAFT: &str = "walguard-initdb-";

/// How often a folder is emptied in which somebody is at work that was orphaned; it ends when it misses a file.
const CLEAR_TRIES: usize = 50;

/// What a rebuild keeps for a while.
const SPILL: &str = "walguard-rebuild-changes";

/// The superuser that `initdb` makes.
const ROLE: &str = "postgres";

/// Whoever can open the socket, which only the server's user can, is let in.
const LET_IN: &str = "local all all trust\n";

/// How long a new server may take until it answers; one that was killed recovers first.
const START_DEADLINE: Duration = Duration::from_secs(300);

/// While nobody else uses the server: less WAL, fewer checkpoints. Everything is synced all the same, so that a machine that
/// dies leaves what can be gone on with.
const TUNED: [(&str, &str); 5] = [
    ("wal_level", "minimal"),
    ("max_wal_senders", "0"),
    ("max_wal_size", "8GB"),
    ("checkpoint_timeout", "1h"),
    ("autovacuum", "off"),
];

/// Where and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// What becomes the data directory; absolute.
    pub data_dir: PathBuf,
    /// Directory of PostgreSQL's programs; if not set they are looked for.
    pub bin_dir: Option<PathBuf>,
    /// The `PATH` variable, where they are looked for.
    pub path: Option<OsString>,
    /// How the server is reached.
    pub listen: Listen,
}

/// The server, while the rebuild goes on.
#[derive(Debug)]
pub struct Private {
    options: Options,
    binaries: Binaries,
    instance: Instance,
    note: Note,
    _hold: directory::Hold,
}

/// The server as it was left.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Server {
    /// Its data directory.
    pub data_dir: PathBuf,
    /// Its version.
    pub version: ServerVersion,
    /// Its process; `None` if it was stopped.
    pub pid: Option<u32>,
    /// Directory of its Unix socket.
    pub socket_dir: PathBuf,
    /// Its port.
    pub port: u16,
    /// Its superuser.
    pub role: String,
    /// The database that was rebuilt.
    pub database: String,
    /// Its log.
    pub log: PathBuf,
    /// What is not as it was on the server that the base was taken of, for people.
    pub remarks: Vec<String>,
}

/// What is said of the directory.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Note {
    format: u32,
    /// The database of the base.
    database: String,
    /// See [`Server::remarks`].
    remarks: Vec<String>,
    /// The rebuild is done and proved up to here; what is left is to hand the server over.
    #[serde(default)]
    done: Option<Lsn>,
}

/// Looks whether a server can be made or gone on with, and changes nothing.
///
/// # Errors
/// If the directory is somebody else's, no programs are new enough, or another server listens there.
pub fn check(options: &Options, base: &Manifest) -> Result<Binaries, RestoreError> {
    match Note::read(&options.data_dir) {
        Some(note) if note.database == base.database_name => {}
        Some(note) => {
            return Err(RestoreError::Directory {
                path: options.data_dir.clone(),
                problem: format!("holds the beginning of another rebuild, of database {}", note.database),
                hint: "choose another place with --target-dir".to_owned(),
            });
        }
        None if directory::is_cluster(&options.data_dir) => {
            return Err(RestoreError::Directory {
                path: options.data_dir.clone(),
                problem: "holds a cluster".to_owned(),
                hint: "choose another place with --target-dir; what is there is never replaced".to_owned(),
            });
        }
        None if has_drafts_alone(&options.data_dir) => {}
        None => match directory::check(&options.data_dir, false)? {
            Occupied::Free => {}
            Occupied::StoppedCluster | Occupied::Unfinished => {
                return Err(RestoreError::Directory {
                    path: options.data_dir.clone(),
                    problem: "holds the beginning of a restore from WAL".to_owned(),
                    hint: "choose another place with --target-dir".to_owned(),
                });
            }
        },
    }
    if directory::server(&options.data_dir).is_none() {
        options.listen.check_free(&options.data_dir)?;
    }
    let oldest = match fs::read_to_string(options.data_dir.join("PG_VERSION")) {
        // What is there already is of one major.
        Ok(text) => return find(text.trim().parse().unwrap_or_default(), options),
        Err(_) => base.server_version.major(),
    };
    let mut first = None;
    for major in oldest..=ServerVersion::MAJOR_MAX.max(oldest) {
        match find(major, options) {
            Ok(binaries) => return Ok(binaries),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(RestoreError::Option {
        problem: first.map(|error| error.to_string()).unwrap_or_default(),
        hint: format!(
            "install PostgreSQL {oldest} or a newer one, name the directory of its programs with --pg-bin-dir or \
             WALGUARD_PG_BIN_DIR, or rebuild it in an empty database of a server: --into"
        ),
    })
}

fn find(major: u32, options: &Options) -> Result<Binaries, RestoreError> {
    binaries::find(major, options.bin_dir.as_deref(), options.path.as_deref())
}

/// True if nothing but drafts of the note are there, as a run leaves behind that was killed while it wrote the first.
fn has_drafts_alone(data_dir: &Path) -> bool {
    let Ok(entries) = fs::read_dir(data_dir) else { return false };
    let mut entries = entries.peekable();
    entries.peek().is_some() && entries.all(|entry| entry.is_ok_and(|entry| is_draft(&entry.file_name())))
}

fn is_draft(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(format!(".{NOTE}.").as_bytes())
}

impl Note {
    fn write(&self, data_dir: &Path) -> Result<(), RestoreError> {
        let path = data_dir.join(NOTE);
        let bytes = serde_json::to_vec(self).expect("names become JSON");
        atomic_file::write(&path, &bytes).map_err(RestoreError::file("write", path))
    }

    fn read(data_dir: &Path) -> Option<Self> {
        let bytes = fs::read(data_dir.join(NOTE)).ok()?;
        serde_json::from_slice(&bytes).ok().filter(|note: &Self| note.format == 1)
    }
}

impl Private {
    /// Makes the server, or goes on with what an interrupted run left, and gives it running with a database for the rebuild.
    ///
    /// # Errors
    /// [`RestoreError`]. What was made stays, and the same call goes on with it.
    pub async fn begin(options: Options, base: &Manifest) -> Result<Self, RestoreError> {
        let binaries = check(&options, base)?;
        let dir = options.data_dir.clone();
        make_directory(&dir)?;
        let hold = directory::hold(&dir)?;
        let mut note = Note::read(&dir).unwrap_or_else(|| Note {
            format: 1,
            database: base.database_name.clone(),
            remarks: Vec::new(),
            done: None,
        });
        note.write(&dir)?;
        stop_server(&dir).await?;
        if !dir.join("PG_VERSION").exists() {
            let draft;
            (draft, note.remarks) = initdb(&binaries, &dir, &base.locale).await?;
            note.write(&dir)?;
            complete(&draft, &dir)?;
        }
        fs::write(dir.join(HBA), LET_IN).map_err(RestoreError::file("write", dir.join(HBA)))?;
        let tuned = TUNED.map(|(name, value)| (name, value.to_owned()));
        let instance = Instance::start(&binaries, &dir, &options.listen, ROLE, &tuned)?;
        let mut private = Self { options, binaries, instance, note, _hold: hold };
        if let Err(error) = private.make_database().await {
            private.stop().await?;
            return Err(error);
        }
        Ok(private)
    }

    /// Its programs' version.
    pub const fn version(&self) -> ServerVersion {
        self.binaries.version
    }

    /// How its database is reached.
    ///
    /// # Errors
    /// None that a socket's path could cause.
    pub fn conninfo(&self) -> Result<ConnInfo, crate::capture::CaptureError> {
        let (dir, port) = (self.instance.socket_dir.display().to_string(), self.instance.port);
        let dir = dir.replace('\\', "\\\\").replace('\'', "\\'");
        let text = format!("host='{dir}' port={port} user={ROLE} dbname=postgres sslmode=disable");
        Ok(ConnInfo::parse(&text, &Environment::default())?.with_dbname(&self.note.database))
    }

    /// The same, for whoever asks it things.
    pub fn reach(&self) -> Reach {
        let (socket_dir, port) = (self.instance.socket_dir.clone(), self.instance.port);
        Reach { socket_dir, port, role: ROLE.to_owned() }
    }

    /// Up to where an earlier run has rebuilt everything, and proved it.
    pub const fn done(&self) -> Option<Lsn> {
        self.note.done
    }

    /// Where the rebuild keeps changes that find no room in memory.
    pub fn spill(&self) -> PathBuf {
        self.options.data_dir.join(SPILL)
    }

    /// Waits until it answers.
    async fn answer(&mut self) -> Result<Client, RestoreError> {
        let begun = Instant::now();
        loop {
            if let Some(client) = self.instance.connect().await {
                return Ok(client);
            }
            self.instance.check_alive()?;
            if begun.elapsed() > START_DEADLINE {
                return Err(self.instance.failure("the server does not answer"));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    /// Makes the database, unless it is one that every cluster has, or an earlier run made it.
    async fn make_database(&mut self) -> Result<(), RestoreError> {
        let client = self.answer().await?;
        let query = "SELECT FROM pg_catalog.pg_database WHERE datname = $1";
        let make = format!("CREATE DATABASE {} TEMPLATE template0", sql::quoted(&self.note.database));
        let made = match client.query_opt(query, &[&self.note.database]).await {
            Ok(None) => client.batch_execute(&make).await,
            is_there => is_there.map(|_| ()),
        };
        made.map_err(|error| {
            let told = error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().to_owned());
            self.instance.failure(format!("make database {}: {told}", self.note.database))
        })
    }

    /// Ends with a server that is like any other: started anew with plain settings, or stopped. The rebuild is done up to `stop`, and its
    /// notes in the database are there still, so that a run that is killed here goes on here.
    ///
    /// # Errors
    /// If it does not stop, or does not start again.
    pub async fn finish(mut self, stop: Lsn, keep_running: bool) -> Result<Server, RestoreError> {
        let dir = self.options.data_dir.clone();
        self.note.done = Some(stop);
        self.note.write(&dir)?;
        let forgotten = async {
            let client = connect_sql(&self.conninfo()?).await?;
            client.batch_execute(FORGET).await.map_err(|error| sql_error("the new server", error))
        };
        if let Err(error) = forgotten.await {
            return Err(self.instance.failure(format!("remove the notes of the rebuild: {}", Chain(&error))));
        }
        self.stop().await?;
        if keep_running {
            self.instance = Instance::start(&self.binaries, &dir, &self.options.listen, ROLE, &[])?;
            self.answer().await?;
        }
        let server = Server {
            version: self.binaries.version,
            pid: keep_running.then(|| self.instance.pid()),
            socket_dir: self.instance.socket_dir.clone(),
            port: self.instance.port,
            role: ROLE.to_owned(),
            database: self.note.database,
            log: self.instance.log().to_owned(),
            remarks: self.note.remarks,
            data_dir: dir.clone(),
        };
        // What runs left behind that were killed.
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let _ = match name.as_encoded_bytes() {
                bytes if bytes.starts_with(DRAFT.as_bytes()) || bytes == SPILL.as_bytes() => {
                    fs::remove_dir_all(entry.path())
                }
                _ if is_draft(&name) => fs::remove_file(entry.path()),
                _ => Ok(()),
            };
        }
        let removed = fs::remove_file(dir.join(NOTE)).and_then(|()| atomic_file::sync_folder_of(&dir.join(NOTE)));
        removed.map_err(RestoreError::file("remove", dir.join(NOTE)))?;
        Ok(server)
    }

    /// Stops the server; the same call goes on with it.
    ///
    /// # Errors
    /// If it does not stop.
    pub async fn stop(&mut self) -> Result<(), RestoreError> {
        self.instance.stop().await.map(|_| ())
    }
}

/// How `initdb` is told the locale: as it was, and then ever plainer ones.
fn likenesses(locale: &Locale) -> Vec<Vec<String>> {
    let Locale { collate, ctype, provider, locale, .. } = locale;
    let libc = |collate: &str, ctype: &str| vec![format!("--lc-collate={collate}"), format!("--lc-ctype={ctype}")];
    let named = locale.as_deref().unwrap_or_default();
    let mut same = libc(collate, ctype);
    match provider.as_str() {
        "i" => same.extend(["--locale-provider=icu".to_owned(), format!("--icu-locale={named}")]),
        "b" => same.extend(["--locale-provider=builtin".to_owned(), format!("--builtin-locale={named}")]),
        _ => {}
    }
    let mut all = vec![same, libc("C.UTF-8", "C.UTF-8"), libc("C", "C")];
    all.dedup();
    all
}

/// Has `initdb` make a cluster in a folder of the directory. Gives the folder, and what is not as it was in the original's.
async fn initdb(binaries: &Binaries, dir: &Path, locale: &Locale) -> Result<(PathBuf, Vec<String>), RestoreError> {
    let mut first_failure = None;
    for like in likenesses(locale) {
        clear(dir).await?;
        let draft = dir.join(format!("{DRAFT}{:08x}", fastrand::u32(..)));
        match try_initdb(binaries, &draft, &dir.join(LOG), &like) {
            Ok(()) if first_failure.is_none() => return Ok((draft, Vec::new())),
            Ok(()) => {
                let wanted = locale.locale.as_ref().unwrap_or(&locale.collate);
                let remark = format!("text sorts as with {}: locale {wanted} is not to be had here", like.join(" "));
                return Ok((draft, vec![remark]));
            }
            Err(error) => first_failure = first_failure.or(Some(error)),
        }
    }
    Err(first_failure.expect("there is always a likeness to try"))
}

/// Empties the directory but for the note: whatever lies there is ours, for a cluster that was complete has its version.
async fn clear(dir: &Path) -> Result<(), RestoreError> {
    for entry in fs::read_dir(dir).map_err(RestoreError::file("look into", dir))? {
        let path = entry.map_err(RestoreError::file("look into", dir))?.path();
        if path.file_name().is_some_and(|name| name == NOTE) {
            continue;
        }
        let mut tries = 0;
        while let Err(error) = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) } {
            match error.kind() {
                io::ErrorKind::NotFound => break, // whoever is orphaned removes its own, too
                io::ErrorKind::DirectoryNotEmpty if tries < CLEAR_TRIES => tries += 1,
                _ => return Err(RestoreError::file("remove", path)(error)),
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
    Ok(())
}

fn try_initdb(binaries: &Binaries, draft: &Path, log: &Path, like: &[String]) -> Result<(), RestoreError> {
    let output = File::create(log).map_err(RestoreError::file("make", log))?;
    let second = output.try_clone().map_err(RestoreError::file("open", log))?;
    let program = binaries.dir.join("initdb");
    let mut command = Command::new(&program);
    command.args([
        "--encoding=UTF8",
        "--locale=C",
        "--auth-local=peer",
        "--auth-host=scram-sha-256",
        "--data-checksums",
    ]);
    command.args(like).arg(format!("--username={ROLE}")).arg("-D").arg(draft);
    command.stdin(Stdio::null()).stdout(output).stderr(second);
    let status = command.status().map_err(RestoreError::file("run", &program))?;
    if status.success() {
        return Ok(());
    }
    let log_tail = fs::read_to_string(log).unwrap_or_default();
    Err(RestoreError::server(format!("initdb failed ({status})"), &log_tail, log))
}

/// Moves what `initdb` made to its place: it is complete when its version is there.
fn complete(draft: &Path, dir: &Path) -> Result<(), RestoreError> {
    let version = OsString::from("PG_VERSION");
    let moved = (|| {
        let up = |name: &OsString| fs::rename(draft.join(name), dir.join(name));
        for entry in fs::read_dir(draft)? {
            let name = entry?.file_name();
            if name != version {
                up(&name)?;
            }
        }
        atomic_file::sync_folder_of(&dir.join(&version))?;
        up(&version)?;
        fs::remove_dir(draft)?;
        atomic_file::sync_folder_of(&dir.join(&version))
    })();
    moved.map_err(|error: io::Error| RestoreError::file("move", draft)(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn locale(provider: &str, collate: &str, named: Option<&str>) -> Locale {
        let text = |text: &str| text.to_owned();
        let (collate, ctype) = (text(collate), text(collate));
        Locale { encoding: text("UTF8"), collate, ctype, provider: text(provider), locale: named.map(text) }
    }

    #[test]
    fn the_original_locale_comes_first_and_the_plainest_last() {
        let told = |provider, collate, named| -> Vec<String> {
            likenesses(&locale(provider, collate, named)).iter().map(|args| args.join(" ")).collect()
        };
        let plainest = ["--lc-collate=C.UTF-8 --lc-ctype=C.UTF-8", "--lc-collate=C --lc-ctype=C"];
        let german = told("c", "de_DE.UTF-8", None);
        assert_eq!(german[0], "--lc-collate=de_DE.UTF-8 --lc-ctype=de_DE.UTF-8");
        assert_eq!(german[1..], plainest);
        assert_eq!(told("c", "C.UTF-8", None), plainest);
        assert_eq!(
            told("i", "C", Some("de-AT"))[0],
            "--lc-collate=C --lc-ctype=C --locale-provider=icu --icu-locale=de-AT"
        );
        assert!(told("b", "C", Some("C.UTF-8"))[0].ends_with("--locale-provider=builtin --builtin-locale=C.UTF-8"));
    }

    #[test]
    fn a_directory_that_is_somebody_elses_is_refused_and_ours_is_gone_on_with() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        assert!(Note::read(folder.path()).is_none());
        for text in ["", "{", "{\"format\":2,\"database\":\"shop\",\"remarks\":[]}"] {
            fs::write(folder.path().join(NOTE), text).unwrap();
            assert!(Note::read(folder.path()).is_none(), "{text}");
        }
        fs::write(folder.path().join(NOTE), "{\"format\":1,\"database\":\"shop\",\"remarks\":[]}").unwrap();
        assert_eq!(Note::read(folder.path()).unwrap().database, "shop");
    }

    #[test]
    fn a_run_that_was_killed_while_it_wrote_its_first_note_leaves_nothing_that_is_in_the_way() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!has_drafts_alone(folder.path()), "there is nothing");
        fs::write(folder.path().join(format!(".{NOTE}.17-00000001.draft")), "{").unwrap();
        assert!(has_drafts_alone(folder.path()));
        fs::write(folder.path().join("thesis.tex"), "").unwrap();
        assert!(!has_drafts_alone(folder.path()));
    }
}
