//! Rows that an incident took away, saved beside it, and the way back into their table.

use std::io::{self, BufRead, Write};

use bytes::Bytes;

use super::layout::check_name;
use super::put::SameContent;
use super::store::StoreError;
use super::{RepoError, Repository};

impl Repository {
    /// Saves the rows of a table beside an incident: `incidents/<id>/evidence/<schema>.<table>.copy.zst`. Gives the key. What
    /// was saved before stays: the first look saw most.
    ///
    /// # Errors
    /// Of the store.
    pub async fn put_evidence(&self, id: &str, schema: &str, table: &str, stored: Bytes) -> Result<String, RepoError> {
        let key = self.layout().evidence(id, &evidence_name(schema, table));
        match self.put_once(&key, stored, SameContent::Verbatim).await {
            Ok(_) | Err(RepoError::Conflict { .. }) => Ok(key),
            Err(error) => Err(error),
        }
    }

    /// What was saved of a table: CSV as [`write_copy`] reads it, in one zstd frame; `None` if nothing was.
    ///
    /// # Errors
    /// Of the store.
    pub async fn evidence(&self, id: &str, schema: &str, table: &str) -> Result<Option<Bytes>, RepoError> {
        if check_name(id).is_err() {
            return Ok(None);
        }
        match self.store().read(&self.layout().evidence(id, &evidence_name(schema, table)), None).await {
            Ok(stored) => Ok(Some(stored)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Turns saved rows, CSV with a header as the server writes it, into a `COPY` with its data, as `psql` reads a script. In
/// CSV a line of data could look like the end of all data to `psql`, so the data is written in the text format. Gives how
/// many rows there are; none of them is held in memory.
///
/// # Errors
/// If the CSV is not whole, or cannot be read; of `out`.
pub fn write_copy(csv: &mut impl BufRead, schema: &str, table: &str, out: &mut impl Write) -> io::Result<u64> {
    let mut parser = Csv::default();
    let mut columns: Option<Vec<String>> = None;
    let (mut header, mut name, mut rows, mut is_first) = (Vec::new(), Vec::new(), 0, true);
    loop {
        let chunk = csv.fill_buf()?;
        if chunk.is_empty() {
            break;
        }
        for byte in chunk {
            let piece = parser.push(*byte)?;
            if columns.is_none() {
                match piece {
                    Piece::None => {}
                    Piece::Byte(byte) if name.len() < NAME_BYTES_MAX => name.push(byte),
                    Piece::End { is_row, .. } if header.len() < COLUMNS_MAX => {
                        header.push(quoted(&String::from_utf8_lossy(&std::mem::take(&mut name))));
                        if is_row {
                            let names = header.join(", ");
                            writeln!(out, "COPY {}.{} ({names}) FROM STDIN;", quoted(schema), quoted(table))?;
                            columns = Some(std::mem::take(&mut header));
                        }
                    }
                    Piece::Byte(_) | Piece::End { .. } => return Err(damaged("its header is no list of columns")),
                }
                continue;
            }
            match piece {
                Piece::None => {}
                Piece::Byte(byte) => {
                    is_first = false;
                    match byte {
                        b'\\' => out.write_all(br"\\")?,
                        b'\n' => out.write_all(br"\n")?,
                        b'\r' => out.write_all(br"\r")?,
                        b'\t' => out.write_all(br"\t")?,
                        byte => out.write_all(&[byte])?,
                    }
                }
                Piece::End { is_null, is_row } => {
                    if is_null {
                        out.write_all(br"\N")?;
                    }
                    out.write_all(if is_row { b"\n" } else { b"\t" })?;
                    rows += u64::from(is_row);
                    is_first = is_row;
                }
            }
        }
        let length = chunk.len();
        csv.consume(length);
    }
    if columns.is_none() || !is_first || !parser.is_between_rows() {
        return Err(damaged("it is cut"));
    }
    out.write_all(b"\\.\n")?;
    Ok(rows)
}

/// Bytes of a column's name; Postgres's have 63.
const NAME_BYTES_MAX: usize = 1_024;

/// Columns of a table; Postgres's have at most 1,600.
const COLUMNS_MAX: usize = 2_000;

fn damaged(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the saved rows are damaged: {problem}"))
}

fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// CSV as the server writes it: only an empty field without quotes is null.
#[derive(Debug, Default)]
struct Csv {
    at: At,
    /// A field of this row has ended already.
    is_within_row: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum At {
    #[default]
    Begin,
    Plain,
    Quoted,
    /// Behind a quote within quotes: the end of the field, or the first half of a quote that is meant.
    Quote,
}

enum Piece {
    None,
    Byte(u8),
    End { is_null: bool, is_row: bool },
}

impl Csv {
    fn push(&mut self, byte: u8) -> io::Result<Piece> {
        let (next, piece) = match (self.at, byte) {
            (At::Begin, b'"') | (At::Quoted, b'"') => {
                (if self.at == At::Begin { At::Quoted } else { At::Quote }, Piece::None)
            }
            (At::Quote, b'"') => (At::Quoted, Piece::Byte(b'"')),
            (At::Quoted, byte) => (At::Quoted, Piece::Byte(byte)),
            (at, b',' | b'\n') => {
                self.is_within_row = byte == b',';
                (At::Begin, Piece::End { is_null: at == At::Begin, is_row: byte == b'\n' })
            }
            (At::Quote, _) => return Err(damaged("a quote stands alone")),
            (At::Begin | At::Plain, byte) => (At::Plain, Piece::Byte(byte)),
        };
        self.at = next;
        Ok(piece)
    }

    fn is_between_rows(&self) -> bool {
        self.at == At::Begin && !self.is_within_row
    }
}

/// `schema.table`, as far as it can be a part of a key; otherwise what is left of it, and a hash so that no two tables share
/// it.
fn evidence_name(schema: &str, table: &str) -> String {
    let name = format!("{schema}.{table}");
    if check_name(&name).is_ok() {
        return name;
    }
    let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-') { c } else { '_' };
    let readable: String = name.chars().map(plain).take(40).collect();
    let hash = blake3::hash(format!("{schema}\0{table}").as_bytes()).to_hex();
    format!("t{}-{}", readable, hash.get(..12).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;

    #[test]
    fn every_table_has_a_name_of_its_own_that_can_be_a_key() {
        assert_eq!(evidence_name("public", "users"), "public.users");
        let odd =
            [("public", "a/b"), ("public", "a b"), ("publi", "c.a b"), (".x", "y"), ("s", &"t".repeat(200)), ("", "é")];
        let names: std::collections::BTreeSet<_> =
            odd.iter().map(|(schema, table)| evidence_name(schema, table)).collect();
        assert_eq!(names.len(), odd.len());
        assert!(names.iter().all(|name| check_name(name).is_ok()), "{names:?}");
    }

    fn copied(csv: &[u8]) -> io::Result<(u64, String)> {
        let mut out = Vec::new();
        // Small pieces: a field may begin in one and end in another.
        let rows = write_copy(&mut io::BufReader::with_capacity(3, csv), "public", "us\"ers", &mut out)?;
        Ok((rows, String::from_utf8(out).unwrap()))
    }

    #[test]
    fn saved_rows_become_a_script_that_holds_every_value_as_it_was() {
        let csv = b"id,\"a,b\"\n1,plain\n2,\n3,\"\"\n4,\"say \"\"hi\"\",\nend\"\n\"\\.\",back\\slash\ttab\n";
        let (rows, script) = copied(csv).unwrap();
        let head = "COPY \"public\".\"us\"\"ers\" (\"id\", \"a,b\") FROM STDIN;\n";
        let data = "1\tplain\n2\t\\N\n3\t\n4\tsay \"hi\",\\nend\n\\\\.\tback\\\\slash\\ttab\n\\.\n";
        assert_eq!((rows, script), (5, format!("{head}{data}")));
        assert_eq!(copied(b"a\n\n").unwrap().1.lines().nth(1), Some("\\N"), "a row of one null");
        assert_eq!(copied(b"a\n").unwrap().0, 0);
    }

    #[test]
    fn rows_that_are_cut_or_no_csv_are_refused() {
        for csv in [&b""[..], b"id", b"id,n\n1", b"id,n\n1,", b"id\n\"1", b"id\n\"1\"2\n"] {
            assert!(copied(csv).is_err(), "{}", String::from_utf8_lossy(csv));
        }
        assert!(copied(&[b"x".repeat(5_000), b"\n".to_vec()].concat()).is_err());
    }

    #[tokio::test]
    async fn what_was_saved_first_stays() {
        let repo = repository();
        let id = "00000001-0000000000000010";
        let key = repo.put_evidence(id, "public", "users", Bytes::from_static(b"one")).await.unwrap();
        assert_eq!(repo.put_evidence(id, "public", "users", Bytes::from_static(b"two")).await.unwrap(), key);
        assert_eq!(&repo.store().read(&key, None).await.unwrap()[..], b"one");
        assert!(key.ends_with("/evidence/public.users.copy.zst"));
        assert_eq!(repo.evidence(id, "public", "users").await.unwrap().as_deref(), Some(&b"one"[..]));
        assert_eq!(repo.evidence(id, "public", "games").await.unwrap(), None);
    }
}
