//! A stopped server's data directory -> whether every page of it has its right checksum, as `pg_checksums --check` proves it.

use std::fs;
use std::fs::File;
use std::io;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt as _, stream};
use tokio_util::sync::CancellationToken;

use super::error::RestoreError;
use crate::pg::{BLOCK_SIZE, Oid};
use crate::progress::Progress;
use crate::repo::backup::{page_checksum, relation_file};

/// Pages read at once: a megabyte hides the cost of a call.
const PAGES_READ: usize = 128;

/// Files read at once, at most: more wait for the disk only.
const THREADS_MAX: usize = 8;

/// Wrong pages that are named.
const NAMED_MAX: usize = 10;

/// What was read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Pages {
    /// Files of relations.
    pub(super) files: u64,
    /// Pages in them.
    pub(super) pages: u64,
    /// Pages with a wrong checksum.
    pub(super) wrong: u64,
    /// The first of these: file and block.
    pub(super) named: Vec<String>,
}

/// Reads all pages of all permanent relations. The server must be stopped, and must have written everything.
///
/// # Errors
/// Of the file system, and if it is cancelled.
pub(super) async fn check(
    data_dir: &Path,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Pages, RestoreError> {
    let root = data_dir.to_owned();
    let files = tokio::task::spawn_blocking(move || relation_files(&root)).await.expect("listing does not panic")?;
    progress.begin("read all pages", Some(files.iter().map(|file| file.bytes).sum()));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let mut reading = stream::iter(files)
        .map(|file| {
            let cancel = cancel.clone();
            tokio::task::spawn_blocking(move || (file.bytes, read(&file, &cancel)))
        })
        .buffer_unordered(threads);
    let mut all = Pages::default();
    while let Some(done) = reading.next().await {
        let (bytes, read) = done.expect("reading does not panic");
        let read = read?;
        progress.advance(bytes);
        all.files += read.files;
        all.pages += read.pages;
        all.wrong += read.wrong;
        let room = NAMED_MAX.saturating_sub(all.named.len());
        all.named.extend(read.named.into_iter().take(room));
    }
    progress.end();
    Ok(all)
}

/// A file of a relation.
struct RelationFile {
    path: PathBuf,
    /// Its path in the data directory, for people.
    shown: String,
    bytes: u64,
    first_block: u32,
}

/// The files whose pages have checksums, of the data directory and of all tablespaces.
fn relation_files(data_dir: &Path) -> Result<Vec<RelationFile>, RestoreError> {
    let mut files = Vec::new();
    for below in ["global", "base"] {
        collect(data_dir, below, None, &mut files)?;
    }
    for space in children(&data_dir.join("pg_tblspc"))? {
        let name = space.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let Some(oid) = name.parse().ok().map(Oid) else { continue };
        for version in children(&space)? {
            let below = version.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if below.starts_with("PG_") {
                collect(&space, &below, Some(oid), &mut files)?;
            }
        }
    }
    Ok(files)
}

/// Adds the files below `root`/`below`, which has databases in it, or relations.
fn collect(root: &Path, below: &str, space: Option<Oid>, files: &mut Vec<RelationFile>) -> Result<(), RestoreError> {
    for child in children(&root.join(below))? {
        let is_folder = fs::symlink_metadata(&child).is_ok_and(|meta| meta.is_dir());
        let members = if is_folder { children(&child)? } else { vec![child] };
        for path in members {
            let Ok(inner) = path.strip_prefix(root) else { continue };
            let Some(inner) = inner.to_str() else { continue };
            let Some(relation) = relation_file::parse(inner.as_bytes(), space) else { continue };
            let meta = fs::metadata(&path).map_err(RestoreError::file("look at", &path))?;
            let shown = space.map_or_else(|| inner.to_owned(), |oid| format!("pg_tblspc/{oid}/{inner}"));
            files.push(RelationFile { path, shown, bytes: meta.len(), first_block: relation.first_block });
        }
    }
    Ok(())
}

fn children(folder: &Path) -> Result<Vec<PathBuf>, RestoreError> {
    let fail = || RestoreError::file("look into", folder);
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry.map_err(fail())?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(fail()(error)),
    }
}

fn read(file: &RelationFile, cancel: &CancellationToken) -> Result<Pages, RestoreError> {
    let fail = |source| RestoreError::File { action: "read", path: file.path.clone(), source };
    let mut open = File::open(&file.path).map_err(fail)?;
    let mut found = Pages { files: 1, ..Pages::default() };
    let mut bytes = Vec::with_capacity(PAGES_READ * BLOCK_SIZE);
    let mut block = file.first_block;
    loop {
        if cancel.is_cancelled() {
            return Err(RestoreError::Cancelled);
        }
        bytes.clear();
        open.by_ref().take((PAGES_READ * BLOCK_SIZE) as u64).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.is_empty() {
            return Ok(found);
        }
        let (pages, rest) = bytes.as_chunks::<BLOCK_SIZE>();
        for page in pages {
            found.pages += 1;
            if !page_checksum::is_intact(page, block) {
                found.note(&format!("{} block {block}", file.shown));
            }
            block = block.saturating_add(1);
        }
        if !rest.is_empty() {
            found.note(&format!("{}: ends within block {block}", file.shown));
            return Ok(found);
        }
    }
}

impl Pages {
    fn note(&mut self, what: &str) {
        self.wrong += 1;
        if self.named.len() < NAMED_MAX {
            self.named.push(what.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::Silent;

    /// A page that has something in it and its right checksum at this block.
    fn page(block: u32) -> [u8; BLOCK_SIZE] {
        let mut page = [0; BLOCK_SIZE];
        page[14] = 1;
        page[100..104].copy_from_slice(&block.to_le_bytes());
        let sum = page_checksum::compute(&page, block);
        page[8..10].copy_from_slice(&sum.to_le_bytes());
        page
    }

    #[tokio::test]
    async fn a_page_that_is_wrong_misplaced_or_cut_is_named_and_other_files_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let data = folder.path().join("data");
        let space = folder.path().join("space/PG_15_202209061/5");
        for dir in [&data.join("base/5"), &data.join("global"), &data.join("pg_tblspc"), &space] {
            fs::create_dir_all(dir).unwrap();
        }
        std::os::unix::fs::symlink(folder.path().join("space"), data.join("pg_tblspc/16400")).unwrap();
        fs::write(data.join("base/5/1249"), [page(0), [0; BLOCK_SIZE], page(2)].concat()).unwrap();
        fs::write(data.join("base/5/1249.1"), page(131_072)).unwrap();
        fs::write(data.join("global/pg_control"), "no pages").unwrap();
        fs::write(data.join("base/5/PG_VERSION"), "15\n").unwrap();
        fs::write(space.join("16401"), page(0)).unwrap();
        let cancel = CancellationToken::new();
        let good = check(&data, &Silent, &cancel).await.unwrap();
        assert_eq!((good.files, good.pages, good.wrong), (3, 5, 0), "{good:?}");

        let mut flipped = page(0);
        flipped[5000] ^= 4;
        fs::write(space.join("16401"), flipped).unwrap();
        fs::write(data.join("base/5/1249.1"), page(0)).unwrap();
        fs::write(data.join("global/1262"), &page(0)[..100]).unwrap();
        let mut bad = check(&data, &Silent, &cancel).await.unwrap();
        bad.named.sort();
        let named = [
            "base/5/1249.1 block 131072",
            "global/1262: ends within block 0",
            "pg_tblspc/16400/PG_15_202209061/5/16401 block 0",
        ];
        assert_eq!((bad.wrong, bad.named), (3, named.map(str::to_owned).to_vec()));
    }
}
