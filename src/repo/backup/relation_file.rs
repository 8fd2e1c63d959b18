//! Which files of a cluster hold pages with checksums, and of which relation. Pure.

use crate::pg::Fork;
use crate::pg::Oid;
use crate::pg::RelFile;

/// Blocks in each of the files that a relation is cut into, the last excepted: 1 GiB of 8 KiB pages (`RELSEG_SIZE`).
pub const SEGMENT_BLOCKS: u32 = 131_072;

/// `pg_default`, which lies in `base/`. (Postgres: `catalog/pg_tablespace.dat`.)
const DEFAULT_TABLESPACE: Oid = Oid(1663);
/// `pg_global`, which lies in `global/`.
const GLOBAL_TABLESPACE: Oid = Oid(1664);

/// One file of a fork of a relation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RelationFile {
    /// The relation's file number and where it lies.
    pub relation: RelFile,
    /// Which of its forks.
    pub fork: Fork,
    /// The number of the file's first block within the fork.
    pub first_block: u32,
}

/// What a member of a backup's tar holds: `Some` for a file of a permanent relation, whose pages have checksums.
/// `tablespace` is the tablespace whose tar it is, `None` for the data directory's.
///
/// (Postgres: `parse_filename_for_nontemp_relation` in `storage/file/reinit.c`, as `backup/basebackup.c` uses it.)
pub fn parse(path: &[u8], tablespace: Option<Oid>) -> Option<RelationFile> {
    let mut parts = std::str::from_utf8(path).ok()?.split('/');
    let first = parts.next()?;
    let (tablespace, database) = match tablespace {
        None if first == "global" => (GLOBAL_TABLESPACE, Oid(0)),
        None if first == "base" => (DEFAULT_TABLESPACE, Oid(number(parts.next()?)?)),
        Some(oid) if first.starts_with("PG_") => (oid, Oid(number(parts.next()?)?)),
        _ => return None,
    };
    let name = parts.next()?;
    if parts.next().is_some() {
        return None;
    }
    let (name, segment) = match name.split_once('.') {
        Some((name, segment)) => (name, number(segment).filter(|n| *n > 0)?),
        None => (name, 0),
    };
    let (name, fork) = match name.split_once('_') {
        None => (name, Fork::Main),
        Some((name, "fsm")) => (name, Fork::Fsm),
        Some((name, "vm")) => (name, Fork::Vm),
        Some((name, "init")) => (name, Fork::Init),
        Some(_) => return None,
    };
    let relation = RelFile { tablespace, database, number: number(name).filter(|n| *n > 0)? };
    Some(RelationFile { relation, fork, first_block: segment.checked_mul(SEGMENT_BLOCKS)? })
}

/// A decimal number as Postgres writes file names: digits only, no leading zero unless it is 0.
fn number(text: &str) -> Option<u32> {
    let plain = text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    plain.then(|| text.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_relations_are_told_from_all_others() {
        let relation = |tablespace, database, number| RelFile { tablespace, database: Oid(database), number };
        let file = |relation, fork, first_block| Some(RelationFile { relation, fork, first_block });
        let default = relation(DEFAULT_TABLESPACE, 5, 16_384);
        assert_eq!(parse(b"base/5/16384", None), file(default, Fork::Main, 0));
        assert_eq!(parse(b"base/5/16384.3", None), file(default, Fork::Main, 3 * 131_072));
        assert_eq!(parse(b"base/5/16384_fsm", None), file(default, Fork::Fsm, 0));
        assert_eq!(parse(b"base/5/16384_vm.1", None), file(default, Fork::Vm, 131_072));
        assert_eq!(parse(b"base/5/16384_init", None), file(default, Fork::Init, 0));
        assert_eq!(parse(b"global/1262", None), file(relation(GLOBAL_TABLESPACE, 0, 1262), Fork::Main, 0));
        let apart = relation(Oid(16_999), 5, 7);
        assert_eq!(parse(b"PG_15_202209061/5/7", Some(Oid(16_999))), file(apart, Fork::Main, 0));
    }

    #[test]
    fn other_files_have_no_checksums() {
        let others: [&[u8]; 16] = [
            b"",
            b"global",
            b"global/pg_control",
            b"global/pg_filenode.map",
            b"base/5/PG_VERSION",
            b"base/5/t3_16384",
            b"base/pgsql_tmp/5",
            b"base/5/16384_foo",
            b"base/5/16384.",
            b"base/5/16384.0",
            b"base/5/016384",
            b"base/5/+1",
            b"base/5/1/2",
            b"pg_xact/0000",
            b"base/5/99999999999",
            b"base/5/\xff",
        ];
        for path in others {
            assert_eq!(parse(path, None), None, "{}", String::from_utf8_lossy(path));
        }
        assert_eq!(parse(b"base/5/1", Some(Oid(16_999))), None);
    }
}
