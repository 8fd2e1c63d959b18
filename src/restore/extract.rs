//! A base backup -> files: fetched part by part, unpacked and written on all cores, proved and durable.
//!
//! Frames are independent of each other, and the manifest says which files each of them holds bytes of. So there is no
//! tar to be read in order: directories and files are made first, then every core takes the next frame, proves it, and
//! writes its bytes to their places. `global/pg_control` is written last, when everything else is durable: without it
//! no server starts, so a part of a backup cannot be mistaken for the whole.
//!
//! Where files are already, those of another cluster or of an extraction that was interrupted, they are compared with what
//! the manifest says of each frame, and only frames that differ are fetched. See `compare`.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::fs::DirBuilder;
use std::fs::File;
use std::fs::OpenOptions;
use std::fs::Permissions;
use std::io;
use std::io::Write as _;
use std::num::NonZero;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::panic;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::Semaphore;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::pg::Oid;
use crate::pg::ServerVersion;
use crate::progress::Progress;
use crate::proto;
use crate::proto::entry::Kind;
use crate::repo::Repository;
use crate::repo::backup::BackupError;
use crate::repo::backup::manifest::FrameAt;
use crate::repo::backup::reader::Reader;
use crate::repo::backup::reader::Unpacker;
use crate::repo::layout::ArchiveName;

use super::compare;
use super::control;
use super::disk::Disk;
use super::error::MAKE_ROOM;
use super::state;

/// The file without which no server starts. It is written last.
const PG_CONTROL: &[u8] = b"global/pg_control";

/// Says where tablespaces lie. It is written anew for a backup whose tablespaces move.
const TABLESPACE_MAP: &[u8] = b"tablespace_map";

/// The two are kept in memory until all else is written: some kilobytes. More is not Postgres's.
const HELD_FILE_BYTES_MAX: u64 = 16 << 20;

/// Parts held in memory: what is being fetched ahead, and what is being unpacked.
const HELD_BYTES_MAX: u64 = 32 << 20;

/// More threads than this wait for the disk only.
pub(super) const THREADS_MAX: usize = 16;

/// Frames of a part that are not needed are fetched all the same if they lie between others and have no more than so many
/// bytes: another request costs about as much.
const GAP_BYTES_MAX: u64 = 256 << 10;

/// Where a backup goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The data directory: absent, or empty.
    pub data_dir: PathBuf,
    /// Where tablespaces go: absolute paths of directories that are absent or empty. One that is not named here goes to
    /// where it was, if that place is free.
    pub tablespaces: BTreeMap<Oid, PathBuf>,
    /// What is there already is compared with the backup and used, and what the backup does not have is removed: in the data
    /// directory, and in the tablespaces that it links to.
    pub over_existing: bool,
    /// Nothing is synced, and the control file is kept in memory: the caller goes on, and makes all of it durable at the
    /// end. Until then no server starts on the directory once the machine went down. Has no effect where there is no
    /// memory file system.
    pub durable_later: bool,
}

/// What was extracted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct ExtractReport {
    /// Files written.
    pub files: u64,
    /// Directories made, besides the data directory and the tablespaces.
    pub directories: u64,
    /// Bytes of the archives.
    pub content_bytes: u64,
    /// Bytes fetched from the repository.
    pub stored_bytes: u64,
    /// Bytes of the archives that were there already, compared with the manifest's checksums, and kept.
    pub kept_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
    /// How much of that was waiting until everything is on disk.
    pub sync_elapsed: Duration,
}

/// A backup could not be extracted. What was written so far is left where it is, without `global/pg_control`.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// The backup cannot be read, or is damaged.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// A file could not be written.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried, a verb.
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// There is something already where the backup should go.
    #[error("{} is not empty", .0.display())]
    NotEmpty(PathBuf),
    /// A tablespace's own place is not free, or is not on this machine, and no other was named.
    #[error("tablespace {oid} cannot go back to {location}: {problem}")]
    TablespacePlace {
        /// The tablespace.
        oid: Oid,
        /// Where it was.
        location: String,
        /// Why not.
        problem: String,
    },
    /// A place was named for a tablespace that the backup does not have, or one that is no absolute path.
    #[error("tablespace {oid} cannot go to {}: {problem}", path.display())]
    Mapping {
        /// The tablespace.
        oid: Oid,
        /// The place.
        path: PathBuf,
        /// Why not.
        problem: &'static str,
    },
    /// The backup holds a path that no backup of Postgres holds; whoever made it wants to write elsewhere.
    #[error("the backup holds a forbidden member, {path:?}: {problem}")]
    Forbidden {
        /// The path.
        path: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Somebody asked to stop.
    #[error("the extraction was stopped on request")]
    Cancelled,
}

impl ExtractError {
    /// What the operator can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Backup(error) => error.hint(),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull => Some(MAKE_ROOM.to_owned()),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                Some("run it as the user that owns the directory above the target, usually postgres".to_owned())
            }
            Self::Io { .. } | Self::Cancelled => None,
            Self::NotEmpty(path) => {
                Some(format!("choose another place, or look at what {} holds and move it away", path.display()))
            }
            Self::TablespacePlace { oid, .. } => Some(format!("name another place: --tablespace {oid}=/absolute/path")),
            Self::Mapping { .. } => {
                Some("see the backup's tablespaces and where they were: walguard list --json".to_owned())
            }
            Self::Forbidden { .. } => Some("do not use this backup; see what walguard verify says of it".to_owned()),
        }
    }

    /// True if the same extraction, into empty directories, may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Backup(error) if error.is_transient())
    }
}

/// Extracts all of a backup and makes it durable, `global/pg_control` last. Uses all cores and about 100 MiB.
///
/// The data directory gets the permissions that Postgres asks for (0700, or 0750 if the cluster allows its group in).
/// `backup_label` stays, and `tablespace_map` tells where the tablespaces are now.
///
/// # Panics
/// If a thread that unpacks does.
///
/// # Errors
/// Nothing is written if the places are not free or the manifest holds a forbidden path. After other errors, and if
/// `cancel` is cancelled, a part of the files is left, without `global/pg_control`: no server starts on them.
pub async fn extract(
    repository: &Repository,
    manifest: &Arc<proto::BackupManifest>,
    to: &Placement,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<ExtractReport, ExtractError> {
    Ok(extract_and_hold(repository, manifest, to, progress, cancel).await?.report)
}

/// Looks whether all of a backup may go where it should, and changes nothing.
///
/// # Errors
/// As those of [`extract`] before it writes.
pub(super) fn check(manifest: &proto::BackupManifest, to: &Placement) -> Result<(), ExtractError> {
    Layout::plan(manifest, to).map(drop)
}

/// What was extracted, and what it lies on.
#[derive(Debug)]
pub(super) struct Extracted {
    pub(super) report: ExtractReport,
    /// The file systems, open since before anything was written to them.
    pub(super) disk: Disk,
    /// Permissions of a file in the data directory.
    pub(super) file_mode: u32,
}

impl Extracted {
    /// What an earlier extraction wrote.
    pub(super) fn as_it_is(manifest: &proto::BackupManifest, to: &Placement) -> Result<Self, ExtractError> {
        let to = Placement { over_existing: true, ..to.clone() };
        let layout = Layout::plan(manifest, &to)?;
        let content_bytes = manifest.content_bytes;
        let report = ExtractReport { content_bytes, kept_bytes: content_bytes, ..ExtractReport::default() };
        Ok(Self { report, disk: layout.disk()?, file_mode: layout.mode & 0o666 })
    }
}

/// As [`extract`]; also gives what is needed to make everything durable later.
pub(super) async fn extract_and_hold(
    repository: &Repository,
    manifest: &Arc<proto::BackupManifest>,
    to: &Placement,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Extracted, ExtractError> {
    let began = Instant::now();
    let layout = Arc::new(Layout::plan(manifest, to)?);
    let mut report = {
        let (layout, manifest) = (Arc::clone(&layout), Arc::clone(manifest));
        blocking(move || make_all(&layout, &manifest)).await?
    };
    let disk = layout.disk()?;
    let mut needed = vec![None; manifest.archives.len()];
    if layout.over_existing {
        progress.begin("compare with what is there", Some(manifest.content_bytes));
        for (index, needed) in needed.iter_mut().enumerate() {
            let compared =
                compare::compare(repository, manifest, index, &layout.roots[index], is_held, progress, cancel);
            let (differing, kept_bytes, stored_bytes) = compared.await?;
            report.kept_bytes += kept_bytes;
            report.stored_bytes += stored_bytes;
            *needed = Some(differing);
        }
        progress.end();
    }
    progress.begin("extract base backup", Some(manifest.content_bytes.saturating_sub(report.kept_bytes)));
    let held = Arc::new(Mutex::new(Held::default()));
    for (index, needed) in needed.into_iter().enumerate() {
        let writing =
            Writing { manifest: Arc::clone(manifest), index, layout: Arc::clone(&layout), held: Arc::clone(&held) };
        report.stored_bytes += writing.run(repository, needed, progress, cancel).await?;
    }
    report.content_bytes = manifest.content_bytes;
    let syncing = Instant::now();
    if !layout.durable_later {
        progress.note("wait for the disk");
    }
    let file_mode = layout.mode & 0o666;
    let finishing = disk.clone();
    blocking(move || finish(&layout, &finishing, &mut held.lock().unwrap_or_else(PoisonError::into_inner))).await?;
    progress.end();
    report.sync_elapsed = syncing.elapsed();
    report.elapsed = began.elapsed();
    Ok(Extracted { report, disk, file_mode })
}

/// Runs what waits for the disk where it does not hold up others.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ExtractError> + Send + 'static,
) -> Result<T, ExtractError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(failure) => panic::resume_unwind(failure.into_panic()),
    }
}

/// Where everything goes, checked.
#[derive(Debug)]
struct Layout {
    data_dir: PathBuf,
    /// The root of each archive, in the manifest's order.
    roots: Vec<PathBuf>,
    /// Where tablespaces outside of the data directory go.
    tablespaces: BTreeMap<Oid, PathBuf>,
    /// Permissions of the data directory and the tablespaces.
    mode: u32,
    over_existing: bool,
    durable_later: bool,
    /// The folder of this server's version in a tablespace's directory, `PG_15_202209061`, begins with this.
    version_prefix: String,
}

impl Layout {
    /// Decides where everything goes, and refuses what cannot or must not be written. Looks at the file system, but
    /// changes nothing.
    fn plan(manifest: &proto::BackupManifest, to: &Placement) -> Result<Self, ExtractError> {
        if !to.over_existing && !is_free(&to.data_dir)? {
            return Err(ExtractError::NotEmpty(to.data_dir.clone()));
        }
        let major = ServerVersion::new(manifest.server_version).major();
        let mut layout = Self {
            data_dir: to.data_dir.clone(),
            roots: Vec::new(),
            tablespaces: BTreeMap::new(),
            mode: 0o700,
            over_existing: to.over_existing && !is_free(&to.data_dir)?,
            durable_later: to.durable_later && control::is_possible(),
            version_prefix: format!("PG_{major}_"),
        };
        for archive in &manifest.archives {
            let root = match ArchiveName::parse(&archive.name) {
                Some(ArchiveName::Tablespace(oid)) => layout.place(oid, &archive.location, to)?,
                _ => to.data_dir.clone(),
            };
            layout.roots.push(root);
            for entry in &archive.entries {
                check_entry(archive, entry)?;
                if entry.kind() == Kind::Directory && entry.path == b"global" && entry.mode & 0o050 == 0o050 {
                    layout.mode = 0o750;
                }
            }
        }
        let known: BTreeSet<_> = manifest.archives.iter().filter_map(|a| ArchiveName::parse(&a.name)).collect();
        for (oid, path) in &to.tablespaces {
            if !known.contains(&ArchiveName::Tablespace(*oid)) {
                let problem = "the backup has no such tablespace outside of the data directory";
                return Err(ExtractError::Mapping { oid: *oid, path: path.clone(), problem });
            }
        }
        Ok(layout)
    }

    fn disk(&self) -> Result<Disk, ExtractError> {
        let roots = std::iter::once(self.data_dir.as_path()).chain(self.tablespaces.values().map(PathBuf::as_path));
        Disk::open(roots).map_err(|(path, source)| ExtractError::Io { op: "open", path, source })
    }

    /// Where a tablespace goes.
    fn place(&mut self, oid: Oid, location: &str, to: &Placement) -> Result<PathBuf, ExtractError> {
        if location == format!("pg_tblspc/{oid}") {
            return Ok(to.data_dir.join(location)); // made with `allow_in_place_tablespaces`
        }
        let path = match to.tablespaces.get(&oid) {
            Some(path) => {
                let refuse = |problem| ExtractError::Mapping { oid, path: path.clone(), problem };
                if !path.is_absolute() {
                    return Err(refuse("the path must be absolute"));
                }
                if path.starts_with(&to.data_dir) {
                    return Err(refuse("that is within the data directory"));
                }
                if !is_free(path)? && !layout_owns(to, oid, path) {
                    return Err(refuse("it is not empty"));
                }
                path.clone()
            }
            None => {
                let refuse =
                    |problem: String| ExtractError::TablespacePlace { oid, location: location.to_owned(), problem };
                let path = PathBuf::from(location);
                if !path.is_absolute() {
                    return Err(refuse("that is no absolute path".to_owned()));
                }
                match is_free(&path) {
                    Ok(true) => path,
                    Ok(false) if layout_owns(to, oid, &path) => path,
                    Ok(false) => return Err(refuse("it is not empty".to_owned())),
                    Err(ExtractError::Io { source, .. }) => return Err(refuse(source.to_string())),
                    Err(error) => return Err(error),
                }
            }
        };
        if self.tablespaces.values().any(|other| *other == path) {
            return Err(ExtractError::Mapping { oid, path, problem: "another tablespace goes there" });
        }
        self.tablespaces.insert(oid, path.clone());
        Ok(path)
    }
}

/// True if what is there belongs to the cluster that is in the data directory now, and may be used: its link leads there. A
/// place that is merely full may be another server's.
fn layout_owns(to: &Placement, oid: Oid, path: &Path) -> bool {
    let link = fs::read_link(to.data_dir.join(format!("pg_tblspc/{oid}")));
    to.over_existing && link.is_ok_and(|target| target == path)
}

/// True if there is nothing, or an empty directory, but for the note of an unfinished restore.
fn is_free(path: &Path) -> Result<bool, ExtractError> {
    match fs::read_dir(path) {
        // A note of what is going to be here is nothing yet.
        Ok(mut entries) => Ok(entries.all(|entry| entry.is_ok_and(|entry| state::is_note(&entry.file_name())))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(source) => Err(ExtractError::Io { op: "look into", path: path.to_owned(), source }),
    }
}

/// Paths stay below the archive's root, and the only links are those of tablespaces.
fn check_entry(archive: &proto::Archive, entry: &proto::Entry) -> Result<(), ExtractError> {
    let refuse =
        |problem| Err(ExtractError::Forbidden { path: String::from_utf8_lossy(&entry.path).into_owned(), problem });
    if entry.path.is_empty() && entry.kind() == Kind::Directory {
        return Ok(()); // the root itself
    }
    if entry.path.contains(&0) {
        return refuse("a name with a zero byte");
    }
    if entry.path.split(|byte| *byte == b'/').any(|part| part.is_empty() || part == b"." || part == b"..") {
        return refuse("a path that leaves its directory");
    }
    let tablespace = entry.path.strip_prefix(b"pg_tblspc/").is_some_and(|oid| oid.iter().all(u8::is_ascii_digit));
    match entry.kind() {
        Kind::Symlink if !(tablespace && archive.location.is_empty()) => refuse("a link that is no tablespace's"),
        Kind::File if is_held(archive, entry) && entry.size > HELD_FILE_BYTES_MAX => refuse("it is far too large"),
        _ => Ok(()),
    }
}

/// True for the files that are written when all else is. (Without tablespaces, `tablespace_map` is empty: a file like
/// any other.)
fn is_held(archive: &proto::Archive, entry: &proto::Entry) -> bool {
    archive.location.is_empty() && entry.size > 0 && (entry.path == PG_CONTROL || entry.path == TABLESPACE_MAP)
}

/// The files that are written when all else is.
#[derive(Debug, Default)]
struct Held(BTreeMap<Vec<u8>, (u32, Vec<u8>)>);

/// Makes directories, links of tablespaces, and files without content. What is there and not in the backup is removed, the
/// control file first.
fn make_all(layout: &Layout, manifest: &proto::BackupManifest) -> Result<ExtractReport, ExtractError> {
    let mut report = ExtractReport::default();
    if layout.over_existing {
        control::remove(&layout.data_dir).map_err(|source| ExtractError::Io {
            op: "remove the control file of",
            path: layout.data_dir.clone(),
            source,
        })?;
    }
    // The data directory, which is last, may hold tablespaces; so it comes first here.
    for (archive, root) in manifest.archives.iter().zip(&layout.roots).rev() {
        let fault = |op, path: &Path| {
            let path = path.to_owned();
            move |source| ExtractError::Io { op, path, source }
        };
        DirBuilder::new().recursive(true).mode(layout.mode).create(root).map_err(fault("make directory", root))?;
        set_mode(root, layout.mode)?;
        if layout.over_existing {
            remove_others(layout, archive, root).map_err(|(path, source)| fault("remove", &path)(source))?;
        }
        for entry in &archive.entries {
            let path = root.join(OsStr::from_bytes(&entry.path));
            match entry.kind() {
                Kind::Directory if entry.path.is_empty() => {}
                Kind::Directory => {
                    match DirBuilder::new().mode(entry.mode).create(&path) {
                        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && is_directory(&path) => {}
                        result => result.map_err(fault("make directory", &path))?,
                    }
                    set_mode(&path, entry.mode)?;
                    report.directories += 1;
                }
                Kind::File => {
                    report.files += 1;
                    if is_held(archive, entry) {
                        continue;
                    }
                    let mut options = OpenOptions::new();
                    options.write(true).create_new(!layout.over_existing).create(true).mode(entry.mode);
                    let file = options.open(&path).map_err(fault("make file", &path))?;
                    if layout.over_existing {
                        let length = file.metadata().map_err(fault("look at", &path))?.len();
                        if length > entry.size {
                            file.set_len(entry.size).map_err(fault("cut off", &path))?;
                        }
                        set_mode(&path, entry.mode)?;
                    } else if entry.mode & 0o077 != 0 {
                        set_mode(&path, entry.mode)?; // the umask may have taken the group's part away
                    }
                }
                Kind::Symlink => {} // of a tablespace
            }
        }
        if archive.location.is_empty() {
            // Before anything is written there: the links tell what belongs to this directory.
            for (oid, path) in &layout.tablespaces {
                let link = layout.data_dir.join(format!("pg_tblspc/{oid}"));
                if fs::read_link(&link).is_ok_and(|target| target == *path) {
                    continue;
                }
                std::os::unix::fs::symlink(path, &link).map_err(fault("link", &link))?;
            }
        }
    }
    Ok(report)
}

/// Removes what the archive does not have: of a tablespace's directory only in the folder of this server's version.
fn remove_others(layout: &Layout, archive: &proto::Archive, root: &Path) -> Result<(), (PathBuf, io::Error)> {
    let kinds: BTreeMap<&[u8], Kind> =
        archive.entries.iter().map(|entry| (entry.path.as_slice(), entry.kind())).collect();
    let is_base = archive.location.is_empty();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let whole = root.join(&folder);
        let entries = fs::read_dir(&whole).map_err(|error| (whole.clone(), error))?;
        for entry in entries {
            let entry = entry.map_err(|error| (whole.clone(), error))?;
            let (path, name) = (entry.path(), entry.file_name());
            let fault = |error| (path.clone(), error);
            let relative = folder.join(&name);
            let bytes = relative.as_os_str().as_bytes();
            let kind = entry.file_type().map_err(fault)?;
            let is_top = folder.as_os_str().is_empty();
            if is_top && !is_base && !name.to_string_lossy().starts_with(&layout.version_prefix) {
                continue; // another server's, or somebody's
            }
            if is_base && is_top && state::is_note(&name) {
                continue;
            }
            let stays = match kinds.get(bytes) {
                Some(Kind::Directory) => kind.is_dir(),
                Some(Kind::File) => kind.is_file(),
                Some(Kind::Symlink) | None => {
                    let oid = bytes.strip_prefix(b"pg_tblspc/").and_then(|oid| std::str::from_utf8(oid).ok());
                    let place = oid.and_then(|oid| layout.tablespaces.get(&Oid(oid.parse().ok()?)));
                    let is_link =
                        is_base && place.is_some_and(|place| fs::read_link(&path).is_ok_and(|to| to == *place));
                    let is_in_place = is_base && kind.is_dir() && layout.roots.contains(&path);
                    if is_in_place {
                        continue; // a tablespace within the data directory: looked at by itself
                    }
                    is_link
                }
            };
            if !stays {
                let removed = if kind.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
                removed.map_err(fault)?;
            } else if kind.is_dir() {
                folders.push(relative);
            }
        }
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir())
}

fn set_mode(path: &Path, mode: u32) -> Result<(), ExtractError> {
    let permissions = Permissions::from_mode(mode & 0o777);
    fs::set_permissions(path, permissions).map_err(|source| ExtractError::Io {
        op: "set permissions of",
        path: path.to_owned(),
        source,
    })
}

/// One archive on its way to the disk.
struct Writing {
    manifest: Arc<proto::BackupManifest>,
    index: usize,
    layout: Arc<Layout>,
    held: Arc<Mutex<Held>>,
}

/// A part, or a piece of one, in memory, for as long as one of its frames is needed.
struct Part {
    key: String,
    /// Where the piece begins in the part.
    from: u64,
    stored: Bytes,
    _room: OwnedSemaphorePermit,
}

/// What is fetched with one request.
struct Piece {
    part: u32,
    /// The place in the part; all of it if it is not said.
    range: Option<Range<u64>>,
    /// The frames that are needed of it.
    frames: Vec<FrameAt>,
}

/// A frame to be written.
struct Job {
    part: Arc<Part>,
    frame: FrameAt,
}

impl Writing {
    /// Fetches parts ahead, in order, and hands their frames to as many threads as there are cores. Answers how many
    /// bytes were fetched.
    async fn run(
        self,
        repository: &Repository,
        needed: Option<Vec<bool>>,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<u64, ExtractError> {
        let this = Arc::new(self);
        let archive = &this.manifest.archives[this.index];
        progress.note(&archive.name);
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
        let (jobs, queue) = mpsc::channel(2 * threads);
        let (done, mut advanced) = mpsc::unbounded_channel();
        let queue = Arc::new(Mutex::new(queue));
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (this, queue, done) = (Arc::clone(&this), Arc::clone(&queue), done.clone());
                tokio::task::spawn_blocking(move || this.work(&queue, &done))
            })
            .collect();
        drop(done);
        let feed = async {
            let result = this.feed(repository, needed.as_deref(), &jobs).await;
            drop(jobs); // the threads end when they have done what is there
            result
        };
        let follow = async {
            while let Some(bytes) = advanced.recv().await {
                progress.advance(bytes);
            }
        };
        let fed = cancel.run_until_cancelled(async { tokio::join!(feed, follow).0 }).await;
        let mut failure = None;
        for worker in workers {
            match worker.await {
                Ok(result) => failure = failure.or(result.err()),
                Err(panicked) => panic::resume_unwind(panicked.into_panic()),
            }
        }
        match (fed, failure) {
            (None, _) => Err(ExtractError::Cancelled),
            (_, Some(error)) | (Some(Err(error)), None) => Err(error),
            (Some(Ok(stored_bytes)), None) => Ok(stored_bytes),
        }
    }

    async fn feed(
        &self,
        repository: &Repository,
        needed: Option<&[bool]>,
        jobs: &mpsc::Sender<Job>,
    ) -> Result<u64, ExtractError> {
        let archive = &self.manifest.archives[self.index];
        let reader = Reader::new(repository, &self.manifest.label, archive)?;
        let largest = archive.parts.iter().map(|part| part.stored_bytes).max().unwrap_or(0).max(1);
        let ahead = usize::try_from(HELD_BYTES_MAX / largest).unwrap_or(usize::MAX).clamp(2, 8);
        let room = Arc::new(Semaphore::new(ahead));
        let fetch = |piece: Piece| {
            let (reader, room) = (&reader, Arc::clone(&room));
            async move {
                let room = room.acquire_owned().await.expect("the semaphore is never closed");
                let stored = reader.part(piece.part, piece.range.clone()).await?;
                let from = piece.range.map_or(0, |range| range.start);
                let part = Part { key: reader.part_key(piece.part), from, stored, _room: room };
                Ok::<_, BackupError>((Arc::new(part), piece.frames))
            }
        };
        let pieces = pieces(reader.frames(), needed);
        let mut parts = stream::iter(pieces).map(fetch).buffered(ahead);
        let mut fetched = 0;
        while let Some((part, frames)) = parts.next().await.transpose()? {
            fetched += part.stored.len() as u64;
            for frame in frames {
                if jobs.send(Job { part: Arc::clone(&part), frame }).await.is_err() {
                    return Ok(fetched); // a thread failed and says why
                }
            }
        }
        Ok(fetched)
    }

    /// Unpacks and writes frames until there are no more.
    fn work(&self, queue: &Mutex<mpsc::Receiver<Job>>, done: &mpsc::UnboundedSender<u64>) -> Result<(), ExtractError> {
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).blocking_recv();
        let mut scribe = Scribe { writing: self, open: None };
        let result = (|| {
            let mut unpacker = Unpacker::new()?;
            let mut content = Vec::new();
            while let Some(Job { part, frame }) = next() {
                let from = frame.stored_offset.checked_sub(part.from).map_or(usize::MAX, |from| from as usize);
                let (stored, length) = (part.stored.get(from..).unwrap_or_default(), frame.stored_length as usize);
                unpacker.unpack(&part.key, &stored[..length.min(stored.len())], &frame, &mut content)?;
                drop(part);
                scribe.write(frame.content_offset, &content)?;
                let _ = done.send(content.len() as u64); // nobody follows any more
            }
            Ok(())
        })();
        if result.is_err() {
            queue.lock().unwrap_or_else(PoisonError::into_inner).close();
        }
        result
    }
}

/// What to fetch: whole parts where all of them is needed, and otherwise the frames that are, with what lies between those
/// that are near to each other.
fn pieces(frames: &[FrameAt], needed: Option<&[bool]>) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for part in frames.chunk_by(|a, b| a.part == b.part) {
        let first = part[0].part;
        let Some(needed) = needed else {
            pieces.push(Piece { part: first, range: None, frames: part.to_vec() });
            continue;
        };
        let begin = frames.partition_point(|frame| frame.part < first);
        let is_needed = |at: usize| needed.get(begin + at).copied().unwrap_or(true);
        let begin_of_part = pieces.len();
        for (_, frame) in part.iter().enumerate().filter(|(at, _)| is_needed(*at)) {
            let end = frame.stored_offset + u64::from(frame.stored_length);
            match pieces.get_mut(begin_of_part..).and_then(|pieces| pieces.last_mut()) {
                Some(Piece { range: Some(range), frames, .. }) if frame.stored_offset <= range.end + GAP_BYTES_MAX => {
                    range.end = end;
                    frames.push(*frame);
                }
                _ => {
                    let range = Some(frame.stored_offset..end);
                    pieces.push(Piece { part: first, range, frames: vec![*frame] });
                }
            }
        }
    }
    pieces
}

/// Puts bytes of the tar into the files that they belong to.
struct Scribe<'a> {
    writing: &'a Writing,
    /// The entry that was written to last: large files have many frames.
    open: Option<(usize, File)>,
}

impl Scribe<'_> {
    fn write(&mut self, offset: u64, content: &[u8]) -> Result<(), ExtractError> {
        let archive = &self.writing.manifest.archives[self.writing.index];
        let end = offset + content.len() as u64;
        let first = archive.entries.partition_point(|entry| entry.offset + entry.size <= offset);
        let overlapping = archive.entries.iter().enumerate().skip(first).take_while(|(_, entry)| entry.offset < end);
        for (index, entry) in overlapping {
            if entry.kind() != Kind::File || entry.size == 0 {
                continue;
            }
            let (from, to) = (entry.offset.max(offset), (entry.offset + entry.size).min(end));
            let bytes = &content[(from - offset) as usize..(to - offset) as usize];
            let at = from - entry.offset;
            if is_held(archive, entry) {
                self.hold(entry, at, bytes);
            } else {
                let path = self.writing.layout.roots[self.writing.index].join(OsStr::from_bytes(&entry.path));
                self.write_at(index, &path, at, bytes).map_err(|source| ExtractError::Io {
                    op: "write",
                    path,
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn hold(&self, entry: &proto::Entry, at: u64, bytes: &[u8]) {
        let mut held = self.writing.held.lock().unwrap_or_else(PoisonError::into_inner);
        let size = entry.size as usize; // some MiB at most: checked before
        let (_, file) = held.0.entry(entry.path.clone()).or_insert_with(|| (entry.mode, vec![0; size]));
        let at = at as usize;
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn write_at(&mut self, index: usize, path: &Path, at: u64, bytes: &[u8]) -> io::Result<()> {
        let file = match &mut self.open {
            Some((open, file)) if *open == index => file,
            open => &mut open.insert((index, OpenOptions::new().write(true).open(path)?)).1,
        };
        file.write_all_at(bytes, at)
    }
}

/// Writes what is written last, the control file as the very last and when all else is durable, or into memory.
fn finish(layout: &Layout, disk: &Disk, held: &mut Held) -> Result<(), ExtractError> {
    let fault = |op, path: &Path| {
        let path = path.to_owned();
        move |source| ExtractError::Io { op, path, source }
    };
    if let Some((mode, map)) = held.0.remove(TABLESPACE_MAP) {
        let path = layout.data_dir.join(OsStr::from_bytes(TABLESPACE_MAP));
        write_anew(&path, mode, &moved_map(&map, &layout.tablespaces)).map_err(fault("write", &path))?;
    }
    if layout.durable_later
        && let Some((_, content)) = held.0.get(PG_CONTROL)
    {
        match control::keep_in_memory(&layout.data_dir, content) {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::warn!("{} is made durable now, which takes longer: {error}", layout.data_dir.display())
            }
        }
    }
    disk.sync().map_err(|(path, source)| fault("sync the file system of", &path)(source))?;
    for (name, (mode, content)) in &held.0 {
        let path = layout.data_dir.join(OsStr::from_bytes(name));
        write_anew(&path, *mode, content)
            .and_then(|()| File::open(&path)?.sync_all())
            .and_then(|()| crate::atomic_file::sync_folder_of(&path))
            .map_err(fault("write", &path))?;
    }
    Ok(())
}

fn write_anew(path: &Path, mode: u32, content: &[u8]) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.set_permissions(Permissions::from_mode(mode & 0o777))?;
    file.write_all(content)
}

/// `tablespace_map` with the places where tablespaces are now. A line holds an OID, a space, and a path in which
/// newlines, carriage returns and backslashes follow a backslash.
///
/// (Postgres: `do_pg_backup_start` writes and `read_tablespace_map` reads it, both in `access/transam/`.)
fn moved_map(map: &[u8], places: &BTreeMap<Oid, PathBuf>) -> Vec<u8> {
    let mut moved = Vec::new();
    let mut rest = map;
    while !rest.is_empty() {
        let mut escaped = false;
        let end = rest.iter().position(|byte| {
            let ends = *byte == b'\n' && !escaped;
            escaped = *byte == b'\\' && !escaped;
            ends
        });
        let (line, next) = rest.split_at(end.map_or(rest.len(), |end| end + 1));
        rest = next;
        let oid = line.split(|byte| *byte == b' ').next().and_then(|oid| std::str::from_utf8(oid).ok()?.parse().ok());
        match oid.and_then(|oid| Some((oid, places.get(&Oid(oid))?))) {
            None => moved.extend_from_slice(line),
            Some((oid, path)) => {
                moved.extend_from_slice(format!("{oid} ").as_bytes());
                for byte in path.as_os_str().as_bytes() {
                    if matches!(byte, b'\n' | b'\r' | b'\\') {
                        moved.push(b'\\');
                    }
                    moved.push(*byte);
                }
                moved.push(b'\n');
            }
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_of_tablespaces_tells_where_they_are_now() {
        let places =
            BTreeMap::from([(Oid(16385), PathBuf::from("/new/place")), (Oid(16387), PathBuf::from("/odd\\\n"))]);
        let map = b"16385 /old/place\n16386 /stays \\\\ with\\\nnewline\n16387 /old\\\nother\n";
        let moved = moved_map(map, &places);
        let expected = b"16385 /new/place\n16386 /stays \\\\ with\\\nnewline\n16387 /odd\\\\\\\n\n";
        assert_eq!(String::from_utf8_lossy(&moved), String::from_utf8_lossy(expected));
        assert_eq!(moved_map(b"", &places), b"");
        assert_eq!(moved_map(b"no map", &places), b"no map");
    }
}
