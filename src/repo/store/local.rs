//! Objects as files below a folder: each written whole, fsynced, and then given its name.

use std::collections::BinaryHeap;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use bytes::Bytes;
use jiff::Timestamp;

use super::{Created, ListPage, ListRequest, OBJECT_BYTES_MAX, ObjectInfo, Store, StoreError, check_key};
use crate::atomic_file;

/// Objects on a page of a listing. Every page reads its folder anew, so a year of WAL (a million files) should take few;
/// and 20,000 keys cost about 3 MB.
const PAGE_OBJECTS_MAX: usize = 20_000;

/// How often a write begins anew because a concurrent deletion removed its still empty folder.
const FOLDER_TRIES: u32 = 8;

/// Folders are for the owner and its group: a base backup holds everything that the database holds.
const FOLDER_MODE: u32 = 0o750;

/// A store in a folder of this machine (or of a mounted file system).
#[derive(Clone, Debug)]
pub struct LocalStore {
    root: PathBuf,
    /// The key of the object without which this is not the store that was initialised.
    mark: Option<String>,
}

impl LocalStore {
    /// A store below `root`, an absolute path. It is made with the first object.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), mark: None }
    }

    /// The same, but begun with one object: as long as `mark` is not there, nothing else is written, and nothing is taken
    /// for absent. A folder that was moved away, or whose file system is not mounted, is thus never taken for an empty
    /// store, nor made anew on the disk below the mount point.
    #[must_use]
    pub fn marked_by(self, mark: String) -> Self {
        Self { mark: Some(mark), ..self }
    }

    /// The file that must be there for this to be the store, unless `key` is that file itself.
    fn mark_for(&self, key: &str) -> Option<PathBuf> {
        self.mark.as_ref().filter(|mark| *mark != key).map(|mark| self.root.join(mark))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        op: &'static str,
        key: &str,
        work: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (path, mark) = (self.root.join(key), self.mark_for(key));
        let work = move || match work(&path) {
            // What is missing may be all of it.
            Err(error) if error.kind() == ErrorKind::NotFound => require(mark.as_deref()).and(Err(error)),
            result => result,
        };
        let result = tokio::task::spawn_blocking(work).await.unwrap_or_else(|e| Err(io::Error::other(e)));
        result.map_err(|error| classify(op, key, error))
    }

    async fn write(&self, key: &str, content: Bytes, replace: bool) -> Result<Created, StoreError> {
        check_key("write", key)?;
        let mark = self.mark_for(key);
        self.blocking("write", key, move |path| {
            require(mark.as_deref())?;
            // The folder of the mark is made with it, and never again.
            let made = mark.as_deref().and_then(Path::parent);
            let mut tries = 0;
            loop {
                // Making a folder can meet the deletion of the one above it, too.
                let result = make_folder_of(path, made).and_then(|()| {
                    if replace {
                        atomic_file::write(path, &content).map(|()| true)
                    } else if path.exists() {
                        Ok(false) // the usual case of a repeated put, told without writing a draft
                    } else {
                        atomic_file::create(path, &content)
                    }
                });
                tries += 1;
                match result {
                    Ok(true) => return Ok(Created::New),
                    Ok(false) => return Ok(Created::Exists),
                    Err(error) if error.kind() == ErrorKind::NotFound && tries < FOLDER_TRIES => {}
                    Err(error) => return Err(error),
                }
            }
        })
        .await
    }
}

#[async_trait]
impl Store for LocalStore {
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        self.write(key, content, false).await
    }

    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        self.write(key, content, true).await.map(drop)
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        check_key("read", key)?;
        self.blocking("read", key, move |path| {
            let file = fs::File::open(path)?;
            let (size, range) = (file.metadata()?.len(), range.unwrap_or(0..u64::MAX));
            let end = size.min(range.end);
            if end.saturating_sub(range.start) > OBJECT_BYTES_MAX {
                return Err(ErrorKind::FileTooLarge.into());
            }
            let length = usize::try_from(end.saturating_sub(range.start)).map_err(io::Error::other)?;
            let mut content = vec![0; length];
            file.read_exact_at(&mut content, range.start)?;
            Ok(content.into())
        })
        .await
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        // The prefix may end within a name: begin at the folder that it lies in.
        let folder = request.prefix.rfind('/').map_or("", |slash| &request.prefix[..=slash]).to_owned();
        if !folder.is_empty() {
            check_key("list", folder.trim_end_matches('/'))?;
        }
        let (root, owned, mark) = (self.root.clone(), request.clone(), self.mark_for(""));
        let walked = tokio::task::spawn_blocking(move || {
            let mut page = ListPage::default();
            page.next = walk(&root, &folder, &owned, PAGE_OBJECTS_MAX, &mut page)?;
            // After the walk: it may have gone while we were on our way.
            require(mark.as_deref())?;
            Ok(page)
        });
        let result = walked.await.unwrap_or_else(|e| Err(io::Error::other(e)));
        result.map_err(|error| classify("list", &request.prefix, error))
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key("delete", key)?;
        let (root, mark) = (self.root.clone(), self.mark_for(key));
        self.blocking("delete", key, move |path| {
            require(mark.as_deref())?;
            match fs::remove_file(path) {
                Ok(()) => match atomic_file::sync_folder_of(path) {
                    // Another deletion has emptied the folder meanwhile, and removed it.
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    synced => synced?,
                },
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            // Folders that became empty go too, up to the root; the first that is not empty ends it.
            for folder in path.ancestors().skip(1).take_while(|folder| *folder != root) {
                if fs::remove_dir(folder).is_err() {
                    break;
                }
            }
            Ok(())
        })
        .await
    }

    fn enforces_create_once(&self) -> bool {
        true
    }

    fn url(&self) -> String {
        format!("file://{}", self.root.display())
    }
}

/// The store that was initialised is not at its place.
#[derive(Debug, thiserror::Error)]
#[error("the repository is not where it was: {} is missing", .0.display())]
struct Away(PathBuf);

/// Fails if the file by which the store is known is not there.
fn require(mark: Option<&Path>) -> io::Result<()> {
    match mark.map(|mark| (mark, fs::metadata(mark))) {
        Some((mark, Err(error))) if error.kind() == ErrorKind::NotFound => {
            Err(io::Error::new(ErrorKind::NotFound, Away(mark.to_owned())))
        }
        Some((_, Err(error))) => Err(error),
        _ => Ok(()),
    }
}

/// Makes the folder of `path` and its ancestors, each durably; not `made` nor what lies above it.
fn make_folder_of(path: &Path, made: Option<&Path>) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if folder.is_dir() {
        return Ok(());
    }
    if made.is_some_and(|made| made.starts_with(folder)) {
        return Err(ErrorKind::NotFound.into());
    }
    make_folder_of(folder, made)?;
    match fs::DirBuilder::new().mode(FOLDER_MODE).create(folder) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(error),
        _ => atomic_file::sync_folder_of(folder),
    }
}

/// Adds what lies in the folder `folder` (a key that ends with a slash, or empty) to `page`. Answers where to go on if
/// that was not everything.
fn walk(
    root: &Path,
    folder: &str,
    request: &ListRequest,
    objects_max: usize,
    page: &mut ListPage,
) -> io::Result<Option<String>> {
    let room = |page: &ListPage| objects_max.saturating_sub(page.objects.len() + page.folders.len());
    let entries = match fs::read_dir(root.join(folder)) {
        Ok(entries) => entries,
        // Not there, or removed while we were on our way.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Only the smallest names that still fit are kept: a folder may hold millions. The name of a folder counts with its
    // slash, so that `a.b` stands before `a/c`, as keys do.
    let names_max = room(page).max(1);
    let mut smallest: BinaryHeap<String> = BinaryHeap::new();
    let mut is_cut = false;
    for entry in entries {
        let entry = entry?;
        let Ok(mut name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') && name.ends_with(".draft") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            name.push('/');
        }
        if !concerns(&format!("{folder}{name}"), request) {
            continue;
        }
        smallest.push(name);
        if smallest.len() > names_max {
            smallest.pop();
            is_cut = true;
        }
    }
    let mut done = request.after.clone().max(Some(folder.to_owned()));
    for name in smallest.into_sorted_vec() {
        if room(page) == 0 {
            return Ok(done);
        }
        let key = format!("{folder}{name}");
        if !name.ends_with('/') {
            done = Some(key.clone());
            let metadata = match fs::metadata(root.join(&key)) {
                Ok(metadata) => metadata,
                Err(error) if error.kind() == ErrorKind::NotFound => continue, // deleted meanwhile
                Err(error) => return Err(error),
            };
            let modified = metadata.modified().ok().and_then(|time| Timestamp::try_from(time).ok());
            let modified = modified.unwrap_or(Timestamp::UNIX_EPOCH);
            page.objects.push(ObjectInfo { key, size: metadata.len(), modified });
            continue;
        }
        done = Some(format!("{key}~")); // sorts after every key in the folder
        if request.shallow && key.len() > request.prefix.len() {
            page.folders.push(key);
        } else if let Some(inside) = walk(root, &key, request, objects_max, page)? {
            return Ok(Some(inside));
        }
    }
    Ok(done.filter(|_| is_cut))
}

/// True if `key` is, or (for a folder) may hold, something that the request asks for.
fn concerns(key: &str, request: &ListRequest) -> bool {
    let is_folder = key.ends_with('/');
    if !key.starts_with(&request.prefix) {
        return is_folder && request.prefix.starts_with(key);
    }
    let Some(after) = request.after.as_deref() else { return true };
    // Within the folder that `after` lies in there may be more, unless `after` says that it is done with.
    let is_inside = || after.strip_prefix(key).is_some_and(|rest| !rest.starts_with('~'));
    key > after || (is_folder && !request.shallow && is_inside())
}

fn classify(op: &'static str, key: &str, error: io::Error) -> StoreError {
    let key = key.to_owned();
    if error.get_ref().is_some_and(|inner| inner.is::<Away>()) {
        return StoreError::Unavailable { op, key, source: error.into(), retry_after: None };
    }
    let hint = match error.kind() {
        ErrorKind::NotFound if op == "read" => return StoreError::NotFound { key },
        ErrorKind::PermissionDenied => "let the user that walguard runs as write to the repository's folder",
        ErrorKind::ReadOnlyFilesystem => "the repository lies on a file system that is mounted read-only",
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::NotFound => {
            "something else lies where the repository's folders should: give it a folder of its own"
        }
        ErrorKind::FileTooLarge if op == "read" => return super::too_large(op, &key),
        ErrorKind::InvalidFilename => "the file system cannot hold this name",
        // Full disks get room, network file systems come back; EIO may be one of the latter.
        _ => return StoreError::Unavailable { op, key, source: error.into(), retry_after: None },
    };
    StoreError::Refused { op, key, source: error.into(), hint: hint.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn store() -> (tempfile::TempDir, LocalStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = LocalStore::new(folder.path().join("repo"));
        (folder, store)
    }

    async fn put(store: &LocalStore, key: &str) {
        assert_eq!(store.create(key, Bytes::from_static(b"x")).await.unwrap(), Created::New);
    }

    fn everything_after(after: &str) -> ListRequest {
        ListRequest { prefix: "main/".to_owned(), after: Some(after.to_owned()), shallow: false }
    }

    #[tokio::test]
    async fn what_a_crash_left_half_written_is_not_listed() {
        let (folder, store) = store();
        put(&store, "main/a").await;
        fs::write(folder.path().join("repo/main/.b.4711-0badcafe.draft"), "half").unwrap();
        let page = store.list(&everything_after("")).await.unwrap();
        let keys: Vec<_> = page.objects.iter().map(|object| object.key.as_str()).collect();
        assert_eq!(keys, ["main/a"]);
    }

    #[tokio::test]
    async fn empty_folders_go_with_their_last_object() {
        let (folder, store) = store();
        put(&store, "main/wal/1/a").await;
        put(&store, "main/b").await;
        store.delete("main/wal/1/a").await.unwrap();
        assert!(!folder.path().join("repo/main/wal").exists());
        store.delete("main/b").await.unwrap();
        assert!(folder.path().join("repo").exists(), "the root stays: it may be a mount point");
    }

    /// Tails of one segment are deleted at once, while the next segment's are written beside them.
    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn deletions_and_writes_side_by_side_do_not_see_folders_go_as_trouble() {
        let (_folder, store) = store();
        for round in 0..40 {
            let key = |number: usize| format!("main/wal/{}.tail/{number}", round % 2);
            let others = |number: usize| format!("main/wal/{}.tail/{number}", (round + 1) % 2);
            for number in 0..6 {
                store.create(&key(number), Bytes::from_static(b"x")).await.unwrap();
            }
            let deletions = (0..6).map(|number| {
                let (store, key) = (store.clone(), key(number));
                tokio::spawn(async move { store.delete(&key).await })
            });
            let writes = (0..2).map(|number| {
                let (store, key) = (store.clone(), others(number));
                tokio::spawn(async move { store.create(&key, Bytes::from_static(b"x")).await.map(drop) })
            });
            for result in futures_util::future::join_all(deletions.chain(writes).collect::<Vec<_>>()).await {
                result.unwrap().unwrap();
            }
            for number in 0..2 {
                store.delete(&others(number)).await.unwrap();
            }
        }
    }

    #[tokio::test]
    async fn others_cannot_look_into_the_repository() {
        let (folder, store) = store();
        put(&store, "main/base/b/manifest").await;
        for part in ["repo", "repo/main", "repo/main/base"] {
            let mode = fs::metadata(folder.path().join(part)).unwrap().permissions().mode();
            assert_eq!(mode & 0o007, 0, "{part}: {mode:o}");
        }
    }

    #[tokio::test]
    async fn a_page_that_is_full_says_where_to_go_on() {
        let (folder, store) = store();
        // One object in each of many folders, and many in one.
        for number in 0..300 {
            fs::create_dir_all(folder.path().join(format!("repo/main/{:03}", number / 2))).unwrap();
            fs::write(folder.path().join(format!("repo/main/{:03}/{number}", number / 2)), "x").unwrap();
        }
        let mut expected: Vec<String> = (0..300).map(|n| format!("main/{:03}/{n}", n / 2)).collect();
        expected.sort();
        for room in [1, 2, 7, 299, 300, 301] {
            let (mut found, mut after) = (Vec::new(), String::new());
            loop {
                let mut page = ListPage::default();
                let request = ListRequest { after: Some(after.clone()), ..everything_after("") };
                page.next = walk(&store.root, "main/", &request, room, &mut page).unwrap();
                assert!(page.objects.len() <= room);
                found.extend(page.objects.into_iter().map(|object| object.key));
                match page.next {
                    Some(next) => {
                        assert!(next > after, "a page leads on");
                        after = next;
                    }
                    None => break,
                }
            }
            assert_eq!(found, expected, "{room} on a page");
        }
    }

    #[test]
    fn a_full_disk_is_waited_for_and_says_what_helps() {
        let error = classify("write", "main/a", ErrorKind::StorageFull.into());
        assert!(error.is_transient());
        assert!(error.hint().unwrap().contains("walguard expire"), "{error:?}");
        let error = classify("write", "main/a", ErrorKind::PermissionDenied.into());
        assert!(!error.is_transient() && error.hint().is_some());
    }
}
