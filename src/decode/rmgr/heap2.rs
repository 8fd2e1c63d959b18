//! Records of tables that concern several rows, or none: bulk inserts, pruning, freezing, visibility.
//!
//! (Postgres: `access/heapam_xlog.h`. 14 renumbered the operations, 16 changed how freezing is logged, 17 made pruning,
//! vacuuming and freezing one record.)

use super::heap::{INIT_PAGE, OPERATION, TupleLock, describe_lock};
use super::text::{self, Described, letter, put};
use crate::decode::cursor::Cursor;
use crate::decode::layout::Heap2Operation;
use crate::decode::{DecodeError, Fault, Item, List, Record, RmgrId};
use crate::pg::RelFile;

const PRUNE_IS_CATALOG: u8 = 0x02;
const PRUNE_HAS_CONFLICT: u8 = 0x08;
const PRUNE_HAS_PLANS: u8 = 0x10;
const PRUNE_HAS_REDIRECTIONS: u8 = 0x20;
const PRUNE_HAS_DEAD: u8 = 0x40;
const PRUNE_HAS_UNUSED: u8 = 0x80;

/// What a record of the Heap2 manager says. The page, and with it the relation, is block reference 0, but for
/// [`Heap2Record::Visible`], where it is reference 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heap2Record<'a> {
    /// Where rewritten rows of a catalog went, for logical decoding.
    Rewrite,
    /// Line pointers of rows that nobody can see any more are freed, and, since 17, rows frozen.
    Prune(Prune<'a>),
    /// Dead line pointers are given free (before 17).
    Vacuum(Vacuum<'a>),
    /// Old transaction ids are removed from rows (before 17).
    Freeze(Freeze<'a>),
    /// All rows of a page are visible to everybody.
    Visible(Visible),
    /// Rows came, several on one page.
    MultiInsert(MultiInsert<'a>),
    /// The lock of a row follows it to its newer versions.
    LockUpdated(TupleLock),
    /// A catalog row's command numbers, for logical decoding.
    NewCid(NewCid),
}

/// (Postgres: `xl_heap_prune`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prune<'a> {
    /// Queries of a standby that see less than this transaction must end; `None` if none must (17 and later).
    pub conflict: Option<u32>,
    /// The relation is a catalog; `None` before 16.
    pub is_catalog: Option<bool>,
    /// Line pointers redirected, as far as the main data says it (before 17).
    pub redirected: Option<u16>,
    /// Line pointers found dead, as far as the main data says it (before 17).
    pub dead: Option<u16>,
    /// What happens to which line pointer; `None` if the record holds an image of the page instead.
    pub items: Option<PruneItems<'a>>,
}

/// What happens to the line pointers of a page (Postgres: `xlhp_prune_items`, `xlhp_freeze_plans`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PruneItems<'a> {
    /// How rows are frozen.
    pub plans: List<'a, FreezePlan>,
    /// Which rows are frozen: as many for each plan as it says.
    pub frozen: List<'a, u16>,
    /// From which to which line pointer.
    pub redirected: List<'a, Redirection>,
    /// Line pointers whose row is gone, but to which indexes may still point.
    pub dead: List<'a, u16>,
    /// Line pointers that are free again.
    pub unused: List<'a, u16>,
}

/// A line pointer that leads to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirection {
    /// The line pointer.
    pub from: u16,
    /// Where it leads.
    pub to: u16,
}

impl Item for Redirection {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (from, to) = bytes.split_first_chunk()?;
        Some(Self { from: u16::from_le_bytes(*from), to: u16::of(to)? })
    }
}

/// What some rows' headers become (Postgres: `xlhp_freeze_plan`, `xl_heap_freeze_plan` in 16).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FreezePlan {
    /// Their xmax.
    pub xmax: u32,
    /// Their `t_infomask2`.
    pub infomask2: u16,
    /// Their `t_infomask`.
    pub infomask: u16,
    /// How many rows.
    pub rows: u16,
}

impl FreezePlan {
    const BYTES: usize = 12;
}

impl Item for FreezePlan {
    fn of(bytes: &[u8]) -> Option<Self> {
        let (xmax, rest) = bytes.split_first_chunk()?;
        let (infomask2, rest) = rest.split_first_chunk()?;
        let (infomask, rest) = rest.split_first_chunk()?;
        // One byte of flags and one of padding come before the count.
        let (_, rest) = rest.split_first_chunk::<2>()?;
        Some(Self {
            xmax: u32::from_le_bytes(*xmax),
            infomask2: u16::from_le_bytes(*infomask2),
            infomask: u16::from_le_bytes(*infomask),
            rows: u16::of(rest)?,
        })
    }
}

/// (Postgres: `xl_heap_vacuum`, up to 16.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vacuum<'a> {
    /// Line pointers given free.
    pub count: u16,
    /// Which; empty if the record holds an image of the page instead.
    pub unused: List<'a, u16>,
}

/// (Postgres: `xl_heap_freeze_page`, up to 16.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Freeze<'a> {
    /// Queries of a standby that see less than this transaction must end.
    pub conflict: u32,
    /// In 16 the number of plans, before that of rows.
    pub count: u16,
    /// The relation is a catalog; `None` before 16.
    pub is_catalog: Option<bool>,
    /// Plans and rows; `None` before 16, and if the record holds an image of the page instead.
    pub items: Option<PruneItems<'a>>,
}

/// (Postgres: `xl_heap_visible`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visible {
    /// Queries of a standby that see less than this transaction must end.
    pub conflict: u32,
    /// `VISIBILITYMAP_*`.
    pub flags: u8,
}

/// (Postgres: `xl_heap_multi_insert`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MultiInsert<'a> {
    /// `XLH_INSERT_*`.
    pub flags: u8,
    /// How many rows.
    pub rows: u16,
    /// Their line pointers; empty if the page is new, then they are 1, 2, 3 ...
    pub offsets: List<'a, u16>,
}

impl MultiInsert<'_> {
    /// The rows are pieces of another relation's values; said at `wal_level = logical` only.
    pub const fn is_on_toast(&self) -> bool {
        self.flags & 0x10 != 0
    }
}

/// (Postgres: `xl_heap_new_cid`.)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewCid {
    /// The top-level transaction.
    pub top_xid: u32,
    /// Command that made the row.
    pub cmin: u32,
    /// Command that deleted it.
    pub cmax: u32,
    /// Both in one number.
    pub combo: u32,
    /// The catalog.
    pub relation: RelFile,
    /// The row's page.
    pub block: u32,
    /// The row's line pointer.
    pub offset: u16,
}

/// What a record says; `None` if it is another resource manager's.
///
/// # Errors
/// If its operation is unknown, or if it is shorter than Postgres writes it.
pub fn read<'a>(record: &Record<'a>) -> Result<Option<Heap2Record<'a>>, DecodeError> {
    match record.header.rmgr {
        RmgrId::HEAP2 => read_main(record, record.main_data()?).map(Some),
        _ => Ok(None),
    }
}

pub(in crate::decode) fn read_main<'a>(record: &Record<'a>, main: &'a [u8]) -> Result<Heap2Record<'a>, DecodeError> {
    let mut main = record.cursor(main);
    let operation = record.operation() & OPERATION;
    Ok(match record.major().heap2_operation(operation) {
        Heap2Operation::Rewrite => Heap2Record::Rewrite,
        Heap2Operation::Prune => Heap2Record::Prune(read_prune(record, &mut main)?),
        Heap2Operation::PruneOnAccess | Heap2Operation::PruneVacuumScan | Heap2Operation::PruneVacuumCleanup => {
            Heap2Record::Prune(read_prune_and_freeze(record, &mut main)?)
        }
        Heap2Operation::Vacuum => {
            let count = main.u16("number of freed line pointers")?;
            Heap2Record::Vacuum(Vacuum { count, unused: List::new(page_data(record)?, 2) })
        }
        Heap2Operation::FreezePage => Heap2Record::Freeze(read_freeze(record, &mut main)?),
        Heap2Operation::Visible => {
            Heap2Record::Visible(Visible { conflict: main.u32("conflict")?, flags: main.u8("visibility flags")? })
        }
        Heap2Operation::MultiInsert => {
            let flags = main.u8("insert flags")?;
            main.skip(1, "padding")?;
            let rows = main.u16("number of rows")?;
            let listed = if record.operation() & INIT_PAGE != 0 { 0 } else { usize::from(rows) };
            let offsets = main.list(listed, 2, "line pointers")?;
            Heap2Record::MultiInsert(MultiInsert { flags, rows, offsets })
        }
        Heap2Operation::LockUpdated => Heap2Record::LockUpdated(TupleLock {
            xmax: main.u32("xmax")?,
            offset: main.u16("line pointer")?,
            infobits: main.u8("row flags")?,
            flags: main.u8("lock flags")?,
        }),
        Heap2Operation::NewCid => Heap2Record::NewCid(NewCid {
            top_xid: main.u32("top-level transaction")?,
            cmin: main.u32("cmin")?,
            cmax: main.u32("cmax")?,
            combo: main.u32("combo cid")?,
            relation: main.relation("catalog")?,
            block: {
                let (high, low) = (main.u16("page")?, main.u16("page")?);
                u32::from(high) << 16 | u32::from(low)
            },
            offset: main.u16("line pointer")?,
        }),
        Heap2Operation::Unknown => return Err(main.fault(Fault::UnknownOperation(operation))),
    })
}

/// The data of block reference 0.
fn page_data<'a>(record: &Record<'a>) -> Result<&'a [u8], DecodeError> {
    Ok(record.block(0)?.map_or(&[][..], |block| block.data))
}

/// (Postgres: `heap_xlog_prune` in `access/heap/heapam.c`, up to 16.)
fn read_prune<'a>(record: &Record<'a>, main: &mut Cursor<'a>) -> Result<Prune<'a>, DecodeError> {
    let conflict = Some(main.u32("conflict")?);
    let (redirected, dead) = (main.u16("redirected line pointers")?, main.u16("dead line pointers")?);
    let is_catalog = match record.major().conflicts_name_catalogs() {
        true => Some(main.bool("catalog")?),
        false => None,
    };
    let data = page_data(record)?;
    let items = match data.is_empty() {
        true => None,
        false => {
            let mut data = record.cursor(data);
            Some(PruneItems {
                redirected: data.list(usize::from(redirected), 4, "redirected line pointers")?,
                dead: data.list(usize::from(dead), 2, "dead line pointers")?,
                unused: List::new(data.rest(), 2),
                ..PruneItems::default()
            })
        }
    };
    Ok(Prune { conflict, is_catalog, redirected: Some(redirected), dead: Some(dead), items })
}

/// (Postgres: `heap_xlog_deserialize_prune_and_freeze` in `access/rmgrdesc/heapdesc.c`, since 17.)
fn read_prune_and_freeze<'a>(record: &Record<'a>, main: &mut Cursor<'a>) -> Result<Prune<'a>, DecodeError> {
    main.skip(1, "reason")?; // never set: garbage
    let flags = main.u8("prune flags")?;
    let conflict = if flags & PRUNE_HAS_CONFLICT != 0 { Some(main.u32("conflict")?) } else { None };
    let data = page_data(record)?;
    let mut items = None;
    if !data.is_empty() {
        let mut data = record.cursor(data);
        let has = |flag| flags & flag != 0;
        let mut found = PruneItems::default();
        if has(PRUNE_HAS_PLANS) {
            let count = usize::from(data.u16("number of freeze plans")?);
            data.skip(2, "padding")?;
            found.plans = data.list(count, FreezePlan::BYTES, "freeze plans")?;
        }
        if has(PRUNE_HAS_REDIRECTIONS) {
            let count = usize::from(data.u16("number of redirected line pointers")?);
            found.redirected = data.list(count, 4, "redirected line pointers")?;
        }
        if has(PRUNE_HAS_DEAD) {
            let count = usize::from(data.u16("number of dead line pointers")?);
            found.dead = data.list(count, 2, "dead line pointers")?;
        }
        if has(PRUNE_HAS_UNUSED) {
            let count = usize::from(data.u16("number of freed line pointers")?);
            found.unused = data.list(count, 2, "freed line pointers")?;
        }
        found.frozen = frozen_rows(found.plans, &mut data)?;
        items = Some(found);
    }
    Ok(Prune { conflict, is_catalog: Some(flags & PRUNE_IS_CATALOG != 0), redirected: None, dead: None, items })
}

fn read_freeze<'a>(record: &Record<'a>, main: &mut Cursor<'a>) -> Result<Freeze<'a>, DecodeError> {
    let (conflict, count) = (main.u32("conflict")?, main.u16("number of freeze plans")?);
    let is_catalog = match record.major().conflicts_name_catalogs() {
        true => Some(main.bool("catalog")?),
        false => None,
    };
    let data = page_data(record)?;
    let mut items = None;
    if record.major().freezes_by_plan() && !data.is_empty() {
        let mut data = record.cursor(data);
        let plans = data.list(usize::from(count), FreezePlan::BYTES, "freeze plans")?;
        items = Some(PruneItems { plans, frozen: frozen_rows(plans, &mut data)?, ..PruneItems::default() });
    }
    Ok(Freeze { conflict, count, is_catalog, items })
}

/// The rows that the plans freeze, which stand behind everything else.
fn frozen_rows<'a>(plans: List<'a, FreezePlan>, data: &mut Cursor<'a>) -> Result<List<'a, u16>, DecodeError> {
    let rows = plans.iter().map(|plan| usize::from(plan.rows)).sum();
    data.list(rows, 2, "frozen rows")
}

pub(super) fn name(record: &Record<'_>) -> Option<&'static str> {
    let init = record.operation() & INIT_PAGE != 0;
    Some(match (record.major().heap2_operation(record.operation() & OPERATION), init) {
        (Heap2Operation::MultiInsert, true) => "MULTI_INSERT+INIT",
        (_, true) => return None,
        (Heap2Operation::Rewrite, _) => "REWRITE",
        (Heap2Operation::Prune, _) => "PRUNE",
        (Heap2Operation::Vacuum, _) => "VACUUM",
        (Heap2Operation::FreezePage, _) => "FREEZE_PAGE",
        (Heap2Operation::PruneOnAccess, _) => "PRUNE_ON_ACCESS",
        (Heap2Operation::PruneVacuumScan, _) => "PRUNE_VACUUM_SCAN",
        (Heap2Operation::PruneVacuumCleanup, _) => "PRUNE_VACUUM_CLEANUP",
        (Heap2Operation::Visible, _) => "VISIBLE",
        (Heap2Operation::MultiInsert, _) => "MULTI_INSERT",
        (Heap2Operation::LockUpdated, _) => "LOCK_UPDATED",
        (Heap2Operation::NewCid, _) => "NEW_CID",
        (Heap2Operation::Unknown, _) => return None,
    })
}

/// (Postgres: `heap2_desc` in `access/rmgrdesc/heapdesc.c`.)
pub(super) fn describe(record: &Record<'_>, out: &mut String) -> Described {
    let major = record.major();
    let keys = major.describes_with_keys();
    match read_main(record, record.main_data()?)? {
        Heap2Record::Rewrite => {}
        Heap2Record::Prune(prune) => describe_prune(&prune, keys, out),
        Heap2Record::Vacuum(Vacuum { count, unused }) => {
            put!(out, "nunused{} {count}", if keys { ":" } else { "" });
            if keys && !unused.is_empty() {
                out.push_str(", unused:");
                describe_offsets(unused, out);
            }
        }
        Heap2Record::Freeze(freeze) => describe_freeze(&freeze, keys, out),
        Heap2Record::Visible(Visible { conflict, flags }) if keys => {
            put!(out, "snapshotConflictHorizon: {conflict}, flags: 0x{flags:02X}");
        }
        Heap2Record::Visible(Visible { conflict, flags }) => put!(out, "cutoff xid {conflict} flags 0x{flags:02X}"),
        Heap2Record::MultiInsert(MultiInsert { flags, rows, .. }) if !keys => {
            put!(out, "{rows} tuples flags 0x{flags:02X}");
        }
        Heap2Record::MultiInsert(MultiInsert { flags, rows, offsets }) => {
            put!(out, "ntuples: {rows}, flags: 0x{flags:02X}");
            if !page_data(record)?.is_empty() && record.operation() & INIT_PAGE == 0 {
                out.push_str(", offsets:");
                describe_offsets(offsets, out);
            }
        }
        Heap2Record::LockUpdated(lock) => describe_lock(&lock, "xmax", keys, out),
        Heap2Record::NewCid(cid) => {
            let NewCid { cmin, cmax, combo, block, offset, .. } = cid;
            let relation = text::locator(cid.relation);
            match keys {
                true => put!(out, "rel: {relation}, tid: {block}/{offset}, "),
                false => put!(out, "rel {relation}; tid {block}/{offset}; "),
            }
            put!(out, "cmin: {cmin}, cmax: {cmax}, combo: {combo}");
        }
    }
    Ok(())
}

fn describe_prune(prune: &Prune<'_>, keys: bool, out: &mut String) {
    if let (Some(redirected), Some(dead)) = (prune.redirected, prune.dead) {
        let conflict = prune.conflict.unwrap_or(0);
        if !keys {
            put!(out, "latestRemovedXid {conflict} nredirected {redirected} ndead {dead}");
            return;
        }
        put!(out, "snapshotConflictHorizon: {conflict}, nredirected: {redirected}, ndead: {dead}");
        if let Some(items) = &prune.items {
            put!(out, ", nunused: {}", items.unused.len());
            out.push_str(", redirected:");
            text::array(out, items.redirected.iter(), |out, Redirection { from, to }| put!(out, "{from}->{to}"));
            out.push_str(", dead:");
            describe_offsets(items.dead, out);
            out.push_str(", unused:");
            describe_offsets(items.unused, out);
        }
        return;
    }
    if let Some(conflict) = prune.conflict {
        put!(out, "snapshotConflictHorizon: {conflict}");
    }
    put!(out, ", isCatalogRel: {}", letter(prune.is_catalog == Some(true)));
    let Some(items) = &prune.items else { return };
    let (plans, redirected) = (items.plans.len(), items.redirected.len());
    put!(out, ", nplans: {plans}, nredirected: {redirected}, ");
    put!(out, "ndead: {}, nunused: {}", items.dead.len(), items.unused.len());
    if !items.plans.is_empty() {
        describe_plans(items, out);
    }
    if !items.redirected.is_empty() {
        out.push_str(", redirected:");
        text::array(out, items.redirected.iter(), |out, Redirection { from, to }| put!(out, "{from}->{to}"));
    }
    if !items.dead.is_empty() {
        out.push_str(", dead:");
        describe_offsets(items.dead, out);
    }
    if !items.unused.is_empty() {
        out.push_str(", unused:");
        describe_offsets(items.unused, out);
    }
}

fn describe_freeze(freeze: &Freeze<'_>, keys: bool, out: &mut String) {
    let Freeze { conflict, count, .. } = *freeze;
    if !keys {
        put!(out, "cutoff xid {conflict} ntuples {count}");
        return;
    }
    put!(out, "snapshotConflictHorizon: {conflict}, nplans: {count}");
    if let Some(items) = &freeze.items {
        describe_plans(items, out);
    }
}

fn describe_plans(items: &PruneItems<'_>, out: &mut String) {
    let mut frozen = items.frozen.iter();
    out.push_str(", plans:");
    text::array(out, items.plans.iter(), |out, plan| {
        let FreezePlan { xmax, infomask2, infomask, rows } = plan;
        put!(out, "{{ xmax: {xmax}, infomask: {infomask}, infomask2: {infomask2}, ntuples: {rows}, offsets:");
        text::array(out, frozen.by_ref().take(usize::from(rows)), |out, offset| put!(out, "{offset}"));
        out.push_str(" }");
    });
}

fn describe_offsets(offsets: List<'_, u16>, out: &mut String) {
    text::array(out, offsets.iter(), |out, offset| put!(out, "{offset}"));
}
