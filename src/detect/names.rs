//! Which relation a file is, kept from the WAL: the rows of a few catalogs, as they come, change and go.
//!
//! What `SELECT` would show is mirrored row by row, by place: a `DELETE` in the WAL says only where a row lay, and here is
//! what it said. A row that an open transaction made or deleted is marked so; the transaction's end decides. So names are
//! those as of the record that was seen last, and a transaction's own definitions count for its own rows.
//!
//! The first rows come from elsewhere: from the server over SQL ([`Names::seed`]), or from a snapshot kept beside an index
//! ([`Names::export`]). Rows from SQL are newer than the WAL that is read first; those that were made by a transaction that
//! began after the one whose record is read are not what that record means.
//!
//! Where catalogs have their files is followed, too: through the file map, `VACUUM FULL` of a catalog, and databases made
//! from others. **Bounded**: so many rows are kept ([`NamesLimits`]); what found no room has no name.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use foldhash::{HashMap, HashMapExt as _};

use super::transaction::precedes;
use super::{Owner, Owners, Persistence, Relation, RelationKind, Running};
use crate::decode::catalog::{Catalog, CatalogRow, ClassRow};
use crate::decode::change::FIRST_NORMAL_OID;
use crate::decode::heap_page;
use crate::decode::rmgr::database::{DatabaseRecord, Directory};
use crate::decode::rmgr::relmap::MapUpdate;
use crate::decode::rmgr::standby::RelationLock;
use crate::decode::rmgr::xact::TransactionEnd;
use crate::decode::rows::{RowContent, RowEvent, RowPlace, row_events};
use crate::decode::{DecodeError, List, Record, WalMajor};
use crate::pg::{Fork, Oid, RelFile, Xid};

/// The tablespace of shared catalogs, and that of databases which name no other.
const GLOBAL_TABLESPACE: Oid = Oid(1664);
const DEFAULT_TABLESPACE: Oid = Oid(1663);

/// How much is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamesLimits {
    /// Rows of all catalogs but `pg_attribute`. A table takes four to six (itself, its TOAST table, their indexes).
    pub rows: usize,
    /// Columns of users' tables; they serve only to say which column was dropped.
    pub columns: usize,
}

impl Default for NamesLimits {
    /// Each row takes 150 to 300 bytes: 30 MiB at most, and as much again while a snapshot is made.
    fn default() -> Self {
        Self { rows: 100_000, columns: 30_000 }
    }
}

/// Marks of open transactions on rows, for each row that may be kept: one that makes it and one that deletes it.
const MARKS_PER_ROW: usize = 2;

/// Files of catalogs: ten for each of ten thousand databases.
const FILES_MAX: usize = 100_000;

/// Catalogs that one transaction locks, and files that it writes whole pages of: `VACUUM FULL` of a catalog after the other,
/// or a new database.
const LOCKED_EACH_MAX: usize = 1_024;

/// Transactions that lock catalogs, or write whole pages of them.
const LOCKING_MAX: usize = 65_536;

/// A place in a catalog's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    /// The file.
    pub file: RelFile,
    /// Where in it.
    pub place: RowPlace,
}

/// A row that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// Its first bytes, as many as the catalog needs.
    pub data: Box<[u8]>,
    /// How long all of it is; 0 if nobody knows.
    pub length: u32,
    /// The transaction that made it, where SQL told it; 0 otherwise.
    pub xmin: u32,
    /// The open transaction that made it.
    pub inserted_by: Option<Xid>,
    /// The open transaction that deleted it, or replaced it by another version.
    pub deleted_by: Option<Xid>,
}

/// Which catalog a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CatalogFile {
    /// The catalog.
    pub catalog: Catalog,
    /// The database, 0 for a shared one.
    pub database: Oid,
}

/// A row that SQL told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SeedRow {
    /// Where it lies.
    pub place: RowPlace,
    /// The transaction that made it.
    pub xmin: u32,
    /// What it says.
    pub row: CatalogRow,
}

/// What SQL told of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seed {
    /// Which catalog of which database.
    pub of: CatalogFile,
    /// Its file.
    pub file: RelFile,
    /// Its rows.
    pub rows: Vec<SeedRow>,
}

/// Everything that is known, to be kept and taken up again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamesSnapshot {
    /// The catalogs' files; the last of several of one catalog is the one in use.
    pub files: Vec<(RelFile, CatalogFile)>,
    /// The rows.
    pub rows: Vec<(RowKey, Row)>,
}

/// What became of a row of a catalog.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CatalogChange {
    /// The catalog.
    pub catalog: Catalog,
    /// Its database, 0 for a shared one.
    pub database: Oid,
    /// What it was; `None` of a new row, and of one that nobody knows.
    pub before: Option<CatalogRow>,
    /// What it is; `None` of a deleted row, and of one that could not be put together.
    pub after: Option<CatalogRow>,
    /// What happened.
    pub kind: CatalogChangeKind,
    /// The file that the relation has now was another relation's, which replaces this one's rows: the table is written
    /// anew, and what was written to the file so far are the rows that it had.
    pub takes_over: Option<RelFile>,
}

/// What can become of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum CatalogChangeKind {
    Insert,
    Update,
    Delete,
}

/// The names.
#[derive(Debug)]
pub struct Names {
    major: WalMajor,
    limits: NamesLimits,
    /// Which files are catalogs'.
    files: HashMap<RelFile, CatalogFile>,
    /// Which file a catalog has: the database and the catalog.
    bound: HashMap<(Oid, Catalog), RelFile>,
    /// Some catalog has a file with a high number.
    has_high_files: bool,
    rows: HashMap<RowKey, Row>,
    columns: usize,
    /// Rows of `pg_class` by the file that they name.
    by_file: HashMap<RelFile, VecDeque<RowKey>>,
    /// Rows by what they are about: of `pg_class`, `pg_namespace` and `pg_database` themselves, of `pg_index` the index,
    /// of `pg_inherits` the child.
    objects: HashMap<(Catalog, Oid, Oid), VecDeque<RowKey>>,
    /// Tables by their TOAST table.
    toast_of: HashMap<(Oid, Oid), Oid>,
    /// Rows that open transactions touched, and how many entries those are.
    pending: HashMap<u32, Vec<RowKey>>,
    marks: usize,
    /// Catalogs that open transactions lock: they may be about to get another file.
    locks: HashMap<u32, Vec<CatalogFile>>,
    /// Open transactions that write whole pages of catalogs, with the files.
    imaged: HashMap<u32, Vec<RelFile>>,
    /// What files are, once somebody asked.
    cache: Mutex<HashMap<RelFile, Owner>>,
    /// Databases of which something is missing that SQL could tell.
    incomplete: BTreeSet<Oid>,
    overflowed: bool,
}

impl Names {
    /// Nothing is known. Catalogs are looked for where `initdb` puts them.
    pub fn new(major: WalMajor, limits: NamesLimits) -> Self {
        let mut names = Self {
            major,
            limits,
            files: HashMap::new(),
            bound: HashMap::new(),
            has_high_files: false,
            rows: HashMap::new(),
            columns: 0,
            by_file: HashMap::new(),
            objects: HashMap::new(),
            toast_of: HashMap::new(),
            pending: HashMap::new(),
            marks: 0,
            locks: HashMap::new(),
            imaged: HashMap::new(),
            cache: Mutex::default(),
            incomplete: BTreeSet::new(),
            overflowed: false,
        };
        for catalog in Catalog::ALL.into_iter().filter(|catalog| catalog.is_shared()) {
            let file = RelFile { tablespace: GLOBAL_TABLESPACE, database: Oid(0), number: catalog.oid().0 };
            names.bind(CatalogFile { catalog, database: Oid(0) }, file);
        }
        names
    }

    /// True if nothing is known yet.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// True if something found no room.
    pub const fn has_overflowed(&self) -> bool {
        self.overflowed
    }

    /// Databases of which something is missing that SQL could tell, once: asking forgets them.
    pub fn take_incomplete(&mut self) -> Vec<Oid> {
        std::mem::take(&mut self.incomplete).into_iter().collect()
    }

    /// Takes what SQL told. Rows that are known already stay as they are: the WAL said more exactly when they came.
    pub fn seed(&mut self, seed: Seed) {
        self.bind_if_new(seed.of, seed.file);
        for SeedRow { place, xmin, row } in seed.rows {
            let key = RowKey { file: seed.file, place };
            if self.rows.contains_key(&key) {
                continue;
            }
            let (_, data) = row.write(self.major);
            let row = Row { data: data.into(), length: 0, xmin, inserted_by: None, deleted_by: None };
            self.insert(key, row);
        }
        self.incomplete.remove(&seed.of.database);
    }

    /// Looks for the catalogs of a database where `initdb` and `CREATE DATABASE` put them, unless it is known where they
    /// are. For those who can ask nobody: rows that come from now on are understood then.
    pub fn assume_catalogs(&mut self, database: Oid, tablespace: Oid) {
        for catalog in Catalog::ALL.into_iter().filter(|catalog| !catalog.is_shared()) {
            let file = RelFile { tablespace, database, number: catalog.oid().0 };
            if !self.bound.contains_key(&(database, catalog)) {
                self.bind(CatalogFile { catalog, database }, file);
            }
        }
    }

    /// Everything, in an order that depends on nothing else.
    pub fn export(&self) -> NamesSnapshot {
        let in_use = |file: &RelFile, of: &CatalogFile| self.bound.get(&(of.database, of.catalog)) == Some(file);
        let mut files: Vec<_> = self.files.iter().map(|(file, of)| (in_use(file, of), *file, *of)).collect();
        files.sort_by_key(|(in_use, file, _)| (*in_use, *file));
        let mut rows: Vec<_> = self.rows.iter().map(|(key, row)| (*key, row.clone())).collect();
        rows.sort_by_key(|(key, _)| *key);
        NamesSnapshot { files: files.into_iter().map(|(_, file, of)| (file, of)).collect(), rows }
    }

    /// What was exported.
    pub fn import(major: WalMajor, limits: NamesLimits, snapshot: NamesSnapshot) -> Self {
        let mut names = Self::new(major, limits);
        for (file, of) in snapshot.files {
            names.bind(of, file);
        }
        for (key, row) in snapshot.rows {
            let touched_by = [row.inserted_by, row.deleted_by];
            names.insert(key, row);
            for xid in touched_by.into_iter().flatten() {
                names.mark(xid, key);
            }
        }
        names
    }

    /// Whether rows of this file are a catalog's that is mirrored.
    #[inline]
    pub fn is_catalog(&self, file: RelFile) -> bool {
        (file.number < FIRST_NORMAL_OID || self.has_high_files) && self.files.contains_key(&file)
    }

    /// Whether images of pages may matter now.
    #[inline]
    pub fn wants_images(&self) -> bool {
        !self.imaged.is_empty()
    }

    /// Takes a record that changes rows of a catalog.
    ///
    /// # Errors
    /// If the record is not as Postgres writes it; nothing has changed then.
    pub fn see_rows(&mut self, record: &Record<'_>, xid: Option<Xid>) -> Result<Vec<CatalogChange>, DecodeError> {
        let Some((file, events)) = row_events(record)? else { return Ok(Vec::new()) };
        let Some(of) = self.files.get(&file).copied() else { return Ok(Vec::new()) };
        let changes = events.into_iter().map(|event| match event {
            RowEvent::Inserted(place, content) => self.row_inserted(of, RowKey { file, place }, &content, xid),
            RowEvent::Deleted(place) => self.row_deleted(of, RowKey { file, place }, xid),
            RowEvent::Updated { old, new, content } => {
                let (old, new) = (RowKey { file, place: old }, RowKey { file, place: new });
                self.row_updated(of, old, new, &content, xid)
            }
        });
        Ok(changes.collect::<Vec<_>>().into_iter().flatten().collect())
    }

    fn row_inserted(
        &mut self,
        of: CatalogFile,
        key: RowKey,
        content: &RowContent<'_>,
        xid: Option<Xid>,
    ) -> Option<CatalogChange> {
        let data = match content {
            RowContent::Whole(data) => data,
            RowContent::FromImage(data) => data.as_slice(),
            RowContent::Difference { .. } => return None, // of an update only
        };
        let after = self.keep(of, key, data, data.len(), xid)?;
        Some(self.change(of, CatalogChangeKind::Insert, None, Some(after)))
    }

    fn row_deleted(&mut self, of: CatalogFile, key: RowKey, xid: Option<Xid>) -> Option<CatalogChange> {
        let before = self.leave(of, key, xid);
        // Most columns are not kept.
        if before.is_none() && of.catalog == Catalog::Attribute {
            return None;
        }
        Some(self.change(of, CatalogChangeKind::Delete, before, None))
    }

    fn row_updated(
        &mut self,
        of: CatalogFile,
        old: RowKey,
        new: RowKey,
        content: &RowContent<'_>,
        xid: Option<Xid>,
    ) -> Option<CatalogChange> {
        let kept = self.rows.get(&old).filter(|row| is_meant(row, xid)).map(|row| (row.data.clone(), row.length));
        let before = self.leave(of, old, xid);
        let whole = match content {
            RowContent::Whole(data) => Some((data.to_vec(), data.len())),
            RowContent::FromImage(data) => Some((data.clone(), data.len())),
            RowContent::Difference { prefix, middle, suffix } => kept.and_then(|(old, length)| {
                let ends = (usize::from(*prefix), usize::from(*suffix));
                patched(&old, length as usize, ends, middle, of.catalog.bytes(self.major))
            }),
        };
        let takes_over = match &whole {
            Some((data, _)) => self.taken_over(of, before.as_ref(), data),
            None => None,
        };
        let after = whole.and_then(|(data, length)| self.keep(of, new, &data, length, xid));
        if after.is_none() && of.catalog == Catalog::Attribute {
            return None;
        }
        if after.is_none() {
            self.incomplete.insert(of.database);
        }
        let change = self.change(of, CatalogChangeKind::Update, before, after);
        Some(CatalogChange { takes_over, ..change })
    }

    /// The file that a relation takes over from a transient one.
    fn taken_over(&self, of: CatalogFile, before: Option<&CatalogRow>, data: &[u8]) -> Option<RelFile> {
        let Some(CatalogRow::Class(after)) = CatalogRow::read(of.catalog, self.major, data) else { return None };
        let Some(CatalogRow::Class(before)) = before else { return None };
        if before.file == after.file || after.rewrite != Oid(0) {
            return None;
        }
        let file = self.file_of(of.database, &after)?;
        self.classes(file).any(|class| class.rewrite != Oid(0)).then_some(file)
    }

    const fn change(
        &self,
        of: CatalogFile,
        kind: CatalogChangeKind,
        before: Option<CatalogRow>,
        after: Option<CatalogRow>,
    ) -> CatalogChange {
        CatalogChange { catalog: of.catalog, database: of.database, before, after, kind, takes_over: None }
    }

    /// Keeps a new row; gives what it says.
    fn keep(
        &mut self,
        of: CatalogFile,
        key: RowKey,
        data: &[u8],
        length: usize,
        xid: Option<Xid>,
    ) -> Option<CatalogRow> {
        let data = data.get(..of.catalog.bytes(self.major))?;
        let row = CatalogRow::read(of.catalog, self.major, data)?;
        self.remove(&key); // whatever lay there is long gone
        if let CatalogRow::Attribute { relation, number, .. } = &row
            && (relation.0 < FIRST_NORMAL_OID || *number <= 0)
        {
            return None;
        }
        let length = u32::try_from(length).unwrap_or_default();
        self.insert(key, Row { data: data.into(), length, xmin: 0, inserted_by: xid, deleted_by: None });
        if let Some(xid) = xid {
            self.mark(xid, key);
        }
        Some(row)
    }

    /// An open transaction touched a row that is kept. Without room for the mark the row stays as the transaction left it,
    /// also if that is rolled back.
    fn mark(&mut self, xid: Xid, key: RowKey) {
        if !self.rows.contains_key(&key) {
            return;
        }
        if self.marks >= MARKS_PER_ROW * (self.limits.rows + self.limits.columns) {
            self.overflowed = true;
            return;
        }
        self.marks += 1;
        self.pending.entry(xid.get()).or_default().push(key);
    }

    /// Marks a row as deleted; gives what it said.
    fn leave(&mut self, of: CatalogFile, key: RowKey, xid: Option<Xid>) -> Option<CatalogRow> {
        let row = self.rows.get_mut(&key).filter(|row| is_meant(row, xid))?;
        let read = CatalogRow::read(of.catalog, self.major, &row.data);
        row.deleted_by = xid;
        match xid {
            Some(xid) => self.mark(xid, key),
            None => self.remove(&key),
        }
        read
    }

    fn insert(&mut self, key: RowKey, row: Row) {
        let Some(of) = self.files.get(&key.file).copied() else { return };
        let is_column = of.catalog == Catalog::Attribute;
        let full = if is_column {
            self.columns >= self.limits.columns
        } else {
            self.rows.len() - self.columns >= self.limits.rows
        };
        if full {
            self.overflowed = true;
            return;
        }
        let Some(read) = CatalogRow::read(of.catalog, self.major, &row.data) else { return };
        self.remove(&key);
        self.columns += usize::from(is_column);
        self.rows.insert(key, row);
        self.enter(of, key, &read);
    }

    /// Enters a row in the lists that it is looked up by.
    fn enter(&mut self, of: CatalogFile, key: RowKey, row: &CatalogRow) {
        let Some(object) = object_of(row) else { return };
        self.objects.entry((of.catalog, of.database, object)).or_default().push_back(key);
        match row {
            CatalogRow::Class(class) => {
                if class.toast != Oid(0) {
                    self.toast_of.insert((of.database, class.toast), class.oid);
                }
                if let Some(file) = self.file_of(of.database, class) {
                    self.by_file.entry(file).or_default().push_back(key);
                    self.forget_cached(file);
                }
            }
            // Names of schemas and databases stand in many relations.
            _ => self.forget_all_cached(),
        }
    }

    fn remove(&mut self, key: &RowKey) {
        let Some(row) = self.rows.remove(key) else { return };
        let Some(of) = self.files.get(&key.file).copied() else { return };
        self.columns -= usize::from(of.catalog == Catalog::Attribute);
        let Some(read) = CatalogRow::read(of.catalog, self.major, &row.data) else { return };
        let Some(object) = object_of(&read) else { return };
        remove_from(&mut self.objects, &(of.catalog, of.database, object), key);
        match read {
            CatalogRow::Class(class) => {
                let is_gone = !self.objects.contains_key(&(Catalog::Class, of.database, class.oid));
                if is_gone && self.toast_of.get(&(of.database, class.toast)) == Some(&class.oid) {
                    self.toast_of.remove(&(of.database, class.toast));
                }
                if let Some(file) = self.file_of(of.database, &class) {
                    remove_from(&mut self.by_file, &file, key);
                    self.forget_cached(file);
                }
            }
            _ => self.forget_all_cached(),
        }
    }

    fn forget_cached(&mut self, file: RelFile) {
        self.cache.get_mut().unwrap_or_else(PoisonError::into_inner).remove(&file);
    }

    fn forget_all_cached(&mut self) {
        self.cache.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// A file is made. If its maker locks a catalog, it may become that one's.
    pub fn see_file(&mut self, file: RelFile, fork: Fork, xid: Option<Xid>) {
        let Some(xid) = xid.filter(|_| fork == Fork::Main) else { return };
        let locked = self.locks.get(&xid.get()).and_then(|locked| locked.last()).copied();
        if let Some(of) = locked.filter(|of| of.database == file.database) {
            self.know(file, of);
            self.see_imaged(xid, file);
        }
    }

    /// A transaction writes whole pages of a catalog's file.
    fn see_imaged(&mut self, xid: Xid, file: RelFile) {
        self.overflowed |= !add(&mut self.imaged, xid.get(), file);
    }

    /// Relations are locked.
    pub fn see_locks(&mut self, locks: List<'_, RelationLock>) {
        for RelationLock { xid, database, relation } in locks.iter() {
            if let Some(catalog) = Catalog::of_oid(relation) {
                self.overflowed |= !add(&mut self.locks, xid, CatalogFile { catalog, database });
            }
        }
    }

    /// Pages are written as a whole.
    ///
    /// # Errors
    /// If the record, or an image in it, is not as Postgres writes it.
    pub fn see_images(&mut self, record: &Record<'_>, xid: Option<Xid>) -> Result<(), DecodeError> {
        for block in record.parts()?.blocks() {
            let block = block?;
            let Some(of) = self.files.get(&block.relation).copied().filter(|_| block.fork == Fork::Main) else {
                continue;
            };
            let Some(image) = block.image else { continue };
            let page = image.page(record.lsn)?;
            for row in heap_page::rows(&page).filter(heap_page::PageRow::looks_alive) {
                let place = RowPlace { block: block.number, offset: row.offset };
                let key = RowKey { file: block.relation, place };
                if !self.rows.contains_key(&key) {
                    self.keep(of, key, row.data, row.data.len(), xid);
                }
            }
        }
        Ok(())
    }

    /// Catalogs have new files.
    pub fn see_map(&mut self, update: &MapUpdate<'_>) {
        for mapping in update.mappings.iter() {
            let Some(catalog) = Catalog::of_oid(mapping.catalog) else { continue };
            let file = RelFile { tablespace: update.tablespace, database: update.database, number: mapping.file };
            self.move_catalog(CatalogFile { catalog, database: update.database }, file);
        }
    }

    /// A database is made or dropped.
    pub fn see_database(&mut self, record: &DatabaseRecord<'_>, xid: Option<Xid>) {
        match record {
            DatabaseRecord::Create(Directory { database, tablespace }) => {
                for catalog in Catalog::ALL.into_iter().filter(|catalog| !catalog.is_shared()) {
                    let number = catalog.oid().0;
                    let file = RelFile { tablespace: *tablespace, database: *database, number };
                    self.bind_if_new(CatalogFile { catalog, database: *database }, file);
                    if let Some(xid) = xid {
                        self.see_imaged(xid, file);
                    }
                }
            }
            DatabaseRecord::Copy { to, from } => self.copy_database(*from, *to, xid),
            DatabaseRecord::Drop { database, tablespaces } => {
                let tablespaces: Vec<Oid> = tablespaces.iter().collect();
                self.drop_files(|file| file.database == *database && tablespaces.contains(&file.tablespace));
            }
        }
    }

    /// A database is copied file by file: each row lies in the copy where it lies in the original.
    fn copy_database(&mut self, from: Directory, to: Directory, xid: Option<Xid>) {
        let moved = |file: RelFile| RelFile { tablespace: to.tablespace, database: to.database, ..file };
        let is_from = |file: &RelFile| (file.database, file.tablespace) == (from.database, from.tablespace);
        let mut files: Vec<_> = self.files.iter().filter(|(file, _)| is_from(file)).map(|(f, of)| (*f, *of)).collect();
        if files.is_empty() {
            self.incomplete.insert(to.database);
        }
        files.sort_by_key(|(file, _)| *file);
        for (file, of) in files {
            self.move_catalog(CatalogFile { database: to.database, ..of }, moved(file));
        }
        // A database that only moves has nobody in it, and its rows are nobody's.
        let maker = xid.filter(|_| from.database != to.database);
        let alive = |(key, row): &(&RowKey, &Row)| is_from(&key.file) && row.inserted_by.is_none();
        let rows: Vec<_> = self.rows.iter().filter(alive).map(|(key, row)| (*key, row.clone())).collect();
        for (key, row) in rows {
            let key = RowKey { file: moved(key.file), ..key };
            self.insert(key, Row { inserted_by: maker, deleted_by: None, ..row });
            if let Some(maker) = maker {
                self.mark(maker, key);
            }
        }
    }

    /// The transactions that are open: what others that never ended did is undone.
    pub fn see_running(&mut self, running: &Running) {
        let known = self.pending.keys().chain(self.locks.keys()).chain(self.imaged.keys());
        let known = known.copied().filter_map(Xid::new);
        for xid in known.filter(|xid| running.is_gone(*xid)).collect::<BTreeSet<Xid>>() {
            self.finish(xid, false);
        }
    }

    /// A transaction ends, after everybody who wanted to know what its files were has asked.
    pub fn see_end(&mut self, end: &TransactionEnd<'_>) {
        if self.pending.is_empty() && self.locks.is_empty() && self.imaged.is_empty() {
            return;
        }
        for xid in end.xid.into_iter().chain(end.subxacts()) {
            self.finish(xid, end.committed);
        }
    }

    fn finish(&mut self, xid: Xid, committed: bool) {
        self.locks.remove(&xid.get());
        let mut imaged = self.imaged.remove(&xid.get()).unwrap_or_default();
        let touched = self.pending.remove(&xid.get()).unwrap_or_default();
        self.marks -= touched.len();
        for key in touched {
            let Some(row) = self.rows.get_mut(&key) else { continue };
            let (made, deleted) = (row.inserted_by == Some(xid), row.deleted_by == Some(xid));
            if (committed && deleted) || (!committed && made) {
                self.remove(&key);
                continue;
            }
            if made {
                row.inserted_by = None;
            }
            if deleted {
                row.deleted_by = None;
            }
            self.forget_cached_row(&key);
            if made && committed {
                self.committed(&key);
            }
        }
        // A file that became no catalog's is an index, or the transaction was rolled back.
        imaged.retain(|file| {
            self.files.get(file).is_some_and(|of| self.bound.get(&(of.database, of.catalog)) != Some(file))
        });
        if !imaged.is_empty() {
            self.drop_files(|file| imaged.contains(file));
        }
    }

    /// What a row was taken for may depend on whether its maker has ended.
    fn forget_cached_row(&mut self, key: &RowKey) {
        let Some(CatalogRow::Class(class)) = self.read(key) else { return };
        let Some(of) = self.files.get(&key.file).copied() else { return };
        if let Some(file) = self.file_of(of.database, &class) {
            self.forget_cached(file);
        }
    }

    /// What follows from a row that holds from now on.
    fn committed(&mut self, key: &RowKey) {
        let Some(of) = self.files.get(&key.file).copied() else { return };
        match self.read(key) {
            Some(CatalogRow::Class(class)) if class.file != 0 => {
                if let Some(catalog) = Catalog::of_oid(class.oid)
                    && let Some(file) = self.file_of(of.database, &class)
                {
                    self.move_catalog(CatalogFile { catalog, database: of.database }, file);
                }
            }
            // Where its tables lie that name no tablespace.
            Some(CatalogRow::Database { oid, .. }) => self.enter_files_anew(oid),
            _ => {}
        }
    }

    fn enter_files_anew(&mut self, database: Oid) {
        self.forget_all_cached();
        let classes: Vec<RowKey> = self.keys_of(Catalog::Class, database);
        self.by_file.retain(|_, keys| {
            keys.retain(|key| key.file.database != database);
            !keys.is_empty()
        });
        for key in classes {
            if let Some(CatalogRow::Class(class)) = self.read(&key)
                && let Some(file) = self.file_of(database, &class)
            {
                self.by_file.entry(file).or_default().push_back(key);
            }
        }
    }

    fn keys_of(&self, catalog: Catalog, database: Oid) -> Vec<RowKey> {
        let is_of = |key: &&RowKey| self.files.get(&key.file) == Some(&CatalogFile { catalog, database });
        let mut keys: Vec<RowKey> = self.rows.keys().filter(is_of).copied().collect();
        keys.sort();
        keys
    }

    fn bind(&mut self, of: CatalogFile, file: RelFile) {
        if self.know(file, of) {
            self.files.insert(file, of);
            self.bound.insert((of.database, of.catalog), file);
        }
    }

    /// A file may be a catalog's; what it is known to be it stays. False if there is no room for one more.
    fn know(&mut self, file: RelFile, of: CatalogFile) -> bool {
        let is_full = self.files.len() >= FILES_MAX && !self.files.contains_key(&file);
        if is_full {
            self.overflowed = true;
            return false;
        }
        self.files.entry(file).or_insert(of);
        self.has_high_files |= file.number >= FIRST_NORMAL_OID;
        true
    }

    fn bind_if_new(&mut self, of: CatalogFile, file: RelFile) {
        match self.bound.get(&(of.database, of.catalog)) {
            None => self.bind(of, file),
            Some(known) if *known == file => {}
            // The WAL will tell when it comes there; until then rows of both matter.
            Some(_) => {
                self.know(file, of);
            }
        }
    }

    /// A catalog has its rows in another file from now on.
    fn move_catalog(&mut self, of: CatalogFile, file: RelFile) {
        let before = self.bound.get(&(of.database, of.catalog)).copied();
        if before == Some(file) {
            return;
        }
        let is_empty = !self.rows.keys().any(|key| key.file == file);
        self.bind(of, file);
        if let Some(before) = before {
            if is_empty && self.rows.keys().any(|key| key.file == before) {
                self.incomplete.insert(of.database);
            }
            self.drop_files(|other| *other == before);
        }
    }

    /// Forgets rows and files.
    fn drop_files(&mut self, is_dropped: impl Fn(&RelFile) -> bool) {
        let gone: Vec<RowKey> = self.rows.keys().filter(|key| is_dropped(&key.file)).copied().collect();
        for key in gone {
            self.remove(&key);
        }
        self.files.retain(|file, _| !is_dropped(file));
        self.bound.retain(|_, file| !is_dropped(file));
        self.has_high_files = self.files.keys().any(|file| file.number >= FIRST_NORMAL_OID);
    }

    fn read(&self, key: &RowKey) -> Option<CatalogRow> {
        let of = self.files.get(&key.file)?;
        CatalogRow::read(of.catalog, self.major, &self.rows.get(key)?.data)
    }

    /// The file of a relation; `None` for one that has none, or whose file the map tells.
    fn file_of(&self, database: Oid, class: &ClassRow) -> Option<RelFile> {
        if class.file == 0 {
            return None;
        }
        let tablespace = if class.tablespace == Oid(0) { self.tablespace_of(database) } else { class.tablespace };
        let database = if tablespace == GLOBAL_TABLESPACE { Oid(0) } else { database };
        Some(RelFile { tablespace, database, number: class.file })
    }

    fn tablespace_of(&self, database: Oid) -> Oid {
        let bound = self.bound.get(&(database, Catalog::Class)).map(|file| file.tablespace);
        bound.unwrap_or_else(|| match self.object(Catalog::Database, Oid(0), database) {
            Some(CatalogRow::Database { tablespace, .. }) => tablespace,
            _ => DEFAULT_TABLESPACE,
        })
    }

    /// The newest version of a row about something.
    fn object(&self, catalog: Catalog, database: Oid, oid: Oid) -> Option<CatalogRow> {
        let keys = self.objects.get(&(catalog, database, oid))?;
        let is_there = |key: &&RowKey| self.rows.get(key).is_some_and(|row| row.deleted_by.is_none());
        keys.iter().rev().find(is_there).or_else(|| keys.back()).and_then(|key| self.read(key))
    }

    /// What `pg_class` says of a file, oldest version first.
    fn classes(&self, file: RelFile) -> impl Iterator<Item = ClassRow> {
        let keys = self.by_file.get(&file).into_iter().flatten();
        keys.filter_map(|key| match self.read(key)? {
            CatalogRow::Class(class) => Some(class),
            _ => None,
        })
    }

    /// A database's name.
    pub fn database_name(&self, database: Oid) -> Option<String> {
        match self.object(Catalog::Database, Oid(0), database)? {
            CatalogRow::Database { name, .. } => Some(name),
            _ => None,
        }
    }

    /// A schema's name.
    pub fn schema_name(&self, database: Oid, schema: Oid) -> Option<String> {
        match self.object(Catalog::Namespace, database, schema)? {
            CatalogRow::Namespace { name, .. } => Some(name),
            _ => None,
        }
    }

    /// A relation by its OID.
    pub fn relation(&self, database: Oid, oid: Oid) -> Option<Arc<Relation>> {
        match self.object(Catalog::Class, database, oid)? {
            CatalogRow::Class(class) => self.relation_of(database, &class).map(Arc::new),
            _ => None,
        }
    }

    /// What a row of `pg_class` says, in words.
    pub fn relation_of(&self, database: Oid, class: &ClassRow) -> Option<Relation> {
        let kind = RelationKind::of_letter(class.kind)?;
        let owner = match kind {
            RelationKind::Toast => self.toast_of.get(&(database, class.oid)).copied(),
            RelationKind::Index => match self.object(Catalog::Index, database, class.oid) {
                Some(CatalogRow::Index { table, .. }) => Some(table),
                _ => None,
            },
            _ if class.is_partition => match self.object(Catalog::Inherits, database, class.oid) {
                Some(CatalogRow::Inherits { parent, .. }) => Some(parent),
                _ => None,
            },
            _ => None,
        };
        Some(Relation {
            database,
            oid: class.oid,
            database_name: self.database_name(database).unwrap_or_default(),
            schema: self.schema_name(database, class.namespace).unwrap_or_default(),
            name: class.name.clone(),
            kind,
            persistence: Persistence::of_letter(class.persistence)?,
            owner,
        })
    }

    /// The relation that a file belongs to, catalogs, indexes and TOAST tables included.
    pub fn relation_of_file(&self, file: RelFile) -> Option<Arc<Relation>> {
        if let Some(of) = self.files.get(&file) {
            return self.relation(of.database, of.catalog.oid());
        }
        let class = self.classes(file).reduce(|before, class| if class.rewrite == Oid(0) { class } else { before })?;
        self.relation_of(file.database, &class).map(Arc::new)
    }

    /// Tables and partitions of users that have rows of their own, by database, in no order.
    pub fn tables(&self) -> impl Iterator<Item = (RelFile, Arc<Relation>)> {
        let of_users = |class: &ClassRow| {
            class.oid.0 >= FIRST_NORMAL_OID
                && class.kind == b'r'
                && class.persistence == b'p'
                && class.rewrite == Oid(0)
        };
        self.by_file.keys().filter_map(move |file| {
            let class = self.classes(*file).filter(of_users).last()?;
            Some((*file, Arc::new(self.relation_of(file.database, &class)?)))
        })
    }

    fn find_owner(&self, file: RelFile) -> Owner {
        if self.files.contains_key(&file) {
            return Owner::Hidden;
        }
        // A file that still belongs to a transient relation too holds rows that only come to lie anew.
        let mut found = None;
        let mut is_transient = false;
        for class in self.classes(file) {
            is_transient |= class.rewrite != Oid(0);
            if class.rewrite == Oid(0) {
                found = Some(class);
            }
        }
        let Some(class) = found else { return if is_transient { Owner::Hidden } else { Owner::Unknown } };
        let is_users = class.oid.0 >= FIRST_NORMAL_OID && !matches!(class.kind, b'i' | b'I' | b't');
        match self.relation_of(file.database, &class).filter(|_| is_users) {
            Some(relation) => Owner::Relation(Arc::new(relation)),
            None => Owner::Hidden,
        }
    }
}

impl Owners for Names {
    fn owner(&self, file: RelFile, _by: Option<Xid>) -> Owner {
        // A file that is not everybody's yet is its maker's alone: whoever asks is that transaction.
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(owner) = cache.get(&file) {
            return owner.clone();
        }
        let owner = self.find_owner(file);
        if owner != Owner::Unknown {
            cache.insert(file, owner.clone());
        }
        owner
    }
}

/// A row that SQL told is newer than its maker; a record of an older transaction is about another row, which lay there
/// before.
fn is_meant(row: &Row, xid: Option<Xid>) -> bool {
    row.xmin < 3 || xid.is_none_or(|xid| !precedes(xid.get(), row.xmin))
}

/// What a row is looked up by.
const fn object_of(row: &CatalogRow) -> Option<Oid> {
    match row {
        CatalogRow::Class(class) => Some(class.oid),
        CatalogRow::Namespace { oid, .. } | CatalogRow::Database { oid, .. } => Some(*oid),
        CatalogRow::Index { index, .. } => Some(*index),
        CatalogRow::Inherits { child, .. } => Some(*child),
        _ => None,
    }
}

/// Takes a version out of a list of them. A commit takes the oldest ones away and a rollback the newest: it is looked for
/// from both ends, so that a transaction of ten thousand versions of a row does not take a hundred million steps.
fn remove_from<K: std::hash::Hash + Eq>(map: &mut HashMap<K, VecDeque<RowKey>>, entry: &K, key: &RowKey) {
    if let Some(keys) = map.get_mut(entry) {
        let length = keys.len();
        let ends = (0..length.div_ceil(2)).flat_map(|step| [step, length - 1 - step]);
        if let Some(place) = ends.into_iter().find(|place| keys.get(*place) == Some(key)) {
            keys.remove(place);
        }
        if keys.is_empty() {
            map.remove(entry);
        }
    }
}

/// A new version out of the old one's first bytes and what differs; also how long it is. `None` if something is taken from
/// the old version that is not kept. `old_length` is 0 if nobody knows it.
fn patched(
    old: &[u8],
    old_length: usize,
    (prefix, suffix): (usize, usize),
    middle: &[u8],
    wanted: usize,
) -> Option<(Vec<u8>, usize)> {
    let length = prefix + middle.len() + suffix;
    // What the old version's end gives lies as far from the new one's end. If nobody knows how long the old one was, it was
    // as long: what changes a length are columns behind those that are kept, and then the beginning is all there.
    let shift = if old_length == 0 { 0 } else { i64::try_from(length).ok()? - i64::try_from(old_length).ok()? };
    let mut data = Vec::with_capacity(wanted);
    for at in 0..wanted.min(length) {
        let byte = if at < prefix {
            old.get(at)
        } else if at < prefix + middle.len() {
            middle.get(at - prefix)
        } else {
            usize::try_from(i64::try_from(at).ok()? - shift).ok().and_then(|at| old.get(at))
        };
        data.push(*byte?);
    }
    Some((data, length))
}

/// Adds what a transaction did last to what it did, each thing once; the last is the last. False if there is no room.
fn add<T: PartialEq>(all: &mut HashMap<u32, Vec<T>>, xid: u32, last: T) -> bool {
    if all.len() >= LOCKING_MAX && !all.contains_key(&xid) {
        return false;
    }
    let of_xid = all.entry(xid).or_default();
    if let Some(place) = of_xid.iter().position(|known| *known == last) {
        of_xid.remove(place);
    } else if of_xid.len() >= LOCKED_EACH_MAX {
        return false;
    }
    of_xid.push(last);
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Oid;

    const DATABASE: Oid = Oid(5);

    fn of_namespaces() -> CatalogFile {
        CatalogFile { catalog: Catalog::Namespace, database: DATABASE }
    }

    fn names(rows: usize) -> (Names, RelFile) {
        let mut names = Names::new(WalMajor::V15, NamesLimits { rows, columns: 0 });
        names.assume_catalogs(DATABASE, DEFAULT_TABLESPACE);
        let number = Catalog::Namespace.oid().0;
        (names, RelFile { tablespace: DEFAULT_TABLESPACE, database: DATABASE, number })
    }

    fn insert(names: &mut Names, file: RelFile, offset: u16, xid: u32) {
        let row = CatalogRow::Namespace { oid: Oid(20_000), name: "shop".to_owned() };
        let (_, data) = row.write(WalMajor::V15);
        let key = RowKey { file, place: RowPlace { block: 0, offset } };
        names.keep(of_namespaces(), key, &data, data.len(), Xid::new(xid));
    }

    #[test]
    fn what_open_transactions_touch_takes_no_more_room_than_the_rows() {
        let (mut names, file) = names(4);
        for round in 0..1_000 {
            insert(&mut names, file, 1 + round % 8, 700 + u32::from(round));
        }
        assert!(names.has_overflowed());
        assert!(names.pending.values().map(Vec::len).sum::<usize>() <= MARKS_PER_ROW * 4, "{:?}", names.pending);
        for xid in (700..1_700).filter_map(Xid::new) {
            names.finish(xid, true);
        }
        assert_eq!((names.marks, names.pending.len()), (0, 0));
    }

    #[test]
    fn what_a_transaction_locks_and_images_is_limited_however_much_it_says() {
        let (mut names, _) = names(4);
        for database in 0..2_000 {
            let directory = Directory { database: Oid(20_000 + database), tablespace: DEFAULT_TABLESPACE };
            names.see_database(&DatabaseRecord::Create(directory), Xid::new(700));
        }
        assert!(names.has_overflowed());
        assert_eq!(names.imaged.values().map(Vec::len).sum::<usize>(), LOCKED_EACH_MAX);
        assert!(names.files.len() <= FILES_MAX);
    }

    #[test]
    fn the_catalog_that_is_locked_last_is_the_one_that_gets_the_next_file() {
        let mut locks = HashMap::new();
        for catalog in [Catalog::Class, Catalog::Namespace, Catalog::Class] {
            assert!(add(&mut locks, 700, catalog));
        }
        assert_eq!(locks.get(&700).map(Vec::as_slice), Some(&[Catalog::Namespace, Catalog::Class][..]));
    }
}
