//! How `pg_waldump` writes what many descriptions have in common.

use crate::decode::{DecodeError, Item, List, Record};
use crate::pg::{Fork, Lsn, PgTime, RelFile};

/// Writes to a [`String`], which takes everything.
macro_rules! put {
    ($out:expr, $($arg:tt)*) => {{
        let _ = std::fmt::Write::write_fmt($out, format_args!($($arg)*));
    }};
}
pub(in crate::decode) use put;

/// `T` or `F`.
pub(in crate::decode) const fn letter(yes: bool) -> char {
    if yes { 'T' } else { 'F' }
}

/// `tablespace/database/number`.
pub(in crate::decode) fn locator(file: RelFile) -> String {
    format!("{}/{}/{}", file.tablespace, file.database, file.number)
}

/// An LSN in a description, not padded.
pub(in crate::decode) fn lsn(lsn: Lsn) -> String {
    format!("{:X}/{:X}", lsn.bytes() >> 32, lsn.bytes() & 0xFFFF_FFFF)
}

/// A time as `pg_waldump` prints it where the time zone is UTC.
pub(in crate::decode) fn time(time: PgTime) -> String {
    time.timestamp().strftime("%Y-%m-%d %H:%M:%S%.6f UTC").to_string()
}

/// A full transaction id: epoch and xid.
pub(in crate::decode) fn full_xid(xid: u64) -> String {
    format!("{}:{}", xid >> 32, xid & 0xFFFF_FFFF)
}

/// `wal_level` by its number.
pub(in crate::decode) const fn wal_level(level: i32) -> &'static str {
    match level {
        0 => "minimal",
        1 => "replica",
        2 => "logical",
        _ => "?",
    }
}

/// The path of a file below the data directory (Postgres: `GetRelationPath` in `common/relpath.c`).
pub(in crate::decode) fn path(record: &Record<'_>, file: RelFile, fork: Fork) -> String {
    let suffix = match fork {
        Fork::Main => "",
        Fork::Fsm => "_fsm",
        Fork::Vm => "_vm",
        Fork::Init => "_init",
    };
    let RelFile { tablespace, database, number } = file;
    match tablespace.0 {
        1664 => format!("global/{number}{suffix}"),
        1663 => format!("base/{database}/{number}{suffix}"),
        _ => {
            let directory = record.major().tablespace_directory();
            format!("pg_tblspc/{tablespace}/{directory}/{database}/{number}{suffix}")
        }
    }
}

/// `: [1, 2, 3]` without the colon, as descriptions with keys have it since 16 (Postgres: `array_desc` in
/// `access/rmgrdesc/rmgrdesc_utils.c`).
pub(in crate::decode) fn array<T>(
    out: &mut String,
    items: impl Iterator<Item = T>,
    mut write: impl FnMut(&mut String, T),
) {
    out.push_str(" [");
    let mut separator = "";
    for item in items {
        out.push_str(separator);
        separator = ", ";
        write(out, item);
    }
    out.push(']');
}

/// `; label: one two three`, nothing for no items.
pub(in crate::decode) fn labelled<T: Item>(
    out: &mut String,
    label: &str,
    items: List<'_, T>,
    mut write: impl FnMut(&mut String, T),
) {
    if items.is_empty() {
        return;
    }
    put!(out, "; {label}:");
    for item in items.iter() {
        out.push(' ');
        write(out, item);
    }
}

/// Text of a server's encoding; what is not UTF-8 is shown as such.
pub(in crate::decode) fn text(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// What a `describe` function gives.
pub(in crate::decode) type Described = Result<(), DecodeError>;
