//! Changes of a table's rows, one after the other -> what they come to in the end, row by row.
//!
//! Nothing watches the rows while a database is rebuilt: no trigger, no foreign key, no index that must be unique. So of
//! changes to different rows any may come first, and of several to one row only the outcome matters. That is what makes it
//! quick: rows are compared with a table in sets, and a counter that was raised a thousand times is written once.

use std::collections::BTreeMap;

use foldhash::HashMap;

use super::follow::Shape;
use crate::decode::pgoutput::{OldRow, Tuple, Value};

/// A value, in the words of its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cell {
    Null,
    Text(Box<str>),
    /// What it was: a large value that an update left alone.
    Unchanged,
}

/// A row's values, as many as the table has columns.
pub(super) type Row = Vec<Cell>;

/// The values by which a row is found.
pub(super) type Key = Vec<Box<str>>;

/// What becomes of a row that is found by its key.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Net {
    Insert(Row),
    /// What was there goes, and another row of the same key comes.
    Replace(Row),
    /// Cells that are unchanged stay as they are.
    Update(Row),
    Delete,
}

/// Whether a change was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taken {
    Yes,
    /// A row gets another key and keeps a value that is not told: that only the server can do.
    Not,
}

/// Changes of one table.
#[derive(Clone, Debug, Default)]
pub(super) struct NetChanges {
    rows: HashMap<Key, Net>,
    /// New rows of a table without a key, which nothing finds again.
    nameless: Vec<Row>,
    bytes: usize,
}

/// What the changes come to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Keys of rows that go.
    pub(super) deletes: Vec<Key>,
    /// New values of rows, by which columns are told: true for each that is.
    pub(super) updates: BTreeMap<Vec<bool>, Vec<Row>>,
    /// New rows.
    pub(super) inserts: Vec<Row>,
}

/// What a row costs besides its text.
const ROW_BYTES: usize = 96;
const CELL_BYTES: usize = 24;

fn cell(value: Value<'_>) -> Result<Cell, String> {
    match value {
        Value::Null => Ok(Cell::Null),
        Value::Unchanged => Ok(Cell::Unchanged),
        Value::Binary(_) => Err("a value in binary, which we never ask for".to_owned()),
        Value::Text(bytes) => {
            let text = std::str::from_utf8(bytes).map_err(|_| "a value that is not UTF-8".to_owned())?;
            if text.contains('\0') {
                return Err("a value with a zero byte".to_owned());
            }
            Ok(Cell::Text(text.into()))
        }
    }
}

fn row(shape: &Shape, tuple: Tuple<'_>) -> Result<Row, String> {
    let cells: Row = tuple.iter().map(cell).collect::<Result<_, _>>()?;
    if cells.len() != shape.columns.len() {
        return Err(format!("a row of {} values for {} columns", cells.len(), shape.columns.len()));
    }
    Ok(cells)
}

fn key(shape: &Shape, row: &[Cell]) -> Result<Key, String> {
    let keys = shape.columns.iter().zip(row).filter(|(column, _)| column.is_key);
    let key: Key = keys
        .map(|(_, cell)| match cell {
            Cell::Text(text) => Ok(text.clone()),
            Cell::Null | Cell::Unchanged => Err("a key that is not told".to_owned()),
        })
        .collect::<Result<_, _>>()?;
    if key.is_empty() { Err("nothing tells which row it is".to_owned()) } else { Ok(key) }
}

/// What is told replaces what was.
fn lay_over(below: &mut Row, above: Row) {
    for (below, above) in below.iter_mut().zip(above) {
        if above != Cell::Unchanged {
            *below = above;
        }
    }
}

impl NetChanges {
    /// About how many bytes it takes.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.nameless.is_empty()
    }

    fn note(&mut self, row: &[Cell]) {
        let text = |cell: &Cell| if let Cell::Text(text) = cell { text.len() } else { 0 };
        self.bytes += ROW_BYTES + row.iter().map(|cell| CELL_BYTES + text(cell)).sum::<usize>();
    }

    /// # Errors
    /// If the row does not fit the table, or a row of its key is there already.
    pub(super) fn insert(&mut self, shape: &Shape, new: Tuple<'_>) -> Result<(), String> {
        let new = row(shape, new)?;
        if new.contains(&Cell::Unchanged) {
            return Err("a new row with a value that is not told".to_owned());
        }
        self.note(&new);
        if !shape.columns.iter().any(|column| column.is_key) {
            self.nameless.push(new);
            return Ok(());
        }
        self.put(key(shape, &new)?, new)
    }

    fn put(&mut self, key: Key, new: Row) -> Result<(), String> {
        let net = match self.rows.get(&key) {
            None => Net::Insert(new),
            Some(Net::Delete) => Net::Replace(new),
            Some(_) => return Err("a new row of a key that is there already".to_owned()),
        };
        self.rows.insert(key, net);
        Ok(())
    }

    /// # Errors
    /// If the row does not fit the table, or was deleted.
    pub(super) fn update(&mut self, shape: &Shape, old: Option<OldRow<'_>>, new: Tuple<'_>) -> Result<Taken, String> {
        let mut new = row(shape, new)?;
        let before = match old {
            None => None,
            Some(OldRow::Key(old) | OldRow::Whole(old)) => Some(key(shape, &row(shape, old)?)?),
        };
        let after = key(shape, &new)?;
        if let Some(before) = before.filter(|before| *before != after) {
            // What is known of the row may tell what this change does not.
            if let Some(Net::Insert(known) | Net::Replace(known) | Net::Update(known)) = self.rows.get(&before) {
                let mut whole = known.clone();
                lay_over(&mut whole, new);
                new = whole;
            }
            if new.contains(&Cell::Unchanged) {
                return Ok(Taken::Not);
            }
            self.note(&new);
            self.remove(before)?;
            self.put(after, new)?;
            return Ok(Taken::Yes);
        }
        self.note(&new);
        match self.rows.get_mut(&after) {
            Some(Net::Insert(known) | Net::Replace(known) | Net::Update(known)) => lay_over(known, new),
            Some(Net::Delete) => return Err("a change of a row that is gone".to_owned()),
            None => drop(self.rows.insert(after, Net::Update(new))),
        }
        Ok(Taken::Yes)
    }

    /// # Errors
    /// If the row does not fit the table, or was deleted already.
    pub(super) fn delete(&mut self, shape: &Shape, old: OldRow<'_>) -> Result<(), String> {
        let (OldRow::Key(old) | OldRow::Whole(old)) = old;
        let old = row(shape, old)?;
        self.note(&[]);
        self.remove(key(shape, &old)?)
    }

    fn remove(&mut self, key: Key) -> Result<(), String> {
        match self.rows.remove(&key) {
            // It came and went.
            Some(Net::Insert(_)) => {}
            None | Some(Net::Update(_) | Net::Replace(_)) => drop(self.rows.insert(key, Net::Delete)),
            Some(Net::Delete) => return Err("a row that is deleted twice".to_owned()),
        }
        Ok(())
    }

    /// What it all comes to; nothing is left.
    pub(super) fn take(&mut self) -> Outcome {
        let mut outcome = Outcome { inserts: std::mem::take(&mut self.nameless), ..Outcome::default() };
        self.bytes = 0;
        for (key, net) in self.rows.drain() {
            match net {
                Net::Delete => outcome.deletes.push(key),
                Net::Insert(row) => outcome.inserts.push(row),
                Net::Replace(row) => {
                    outcome.deletes.push(key);
                    outcome.inserts.push(row);
                }
                Net::Update(row) => {
                    let told = row.iter().map(|cell| *cell != Cell::Unchanged).collect();
                    outcome.updates.entry(told).or_default().push(row);
                }
            }
        }
        outcome
    }
}

/// Appends a line in the text format of `COPY`.
///
/// (Postgres: `CopyAttributeOutText` in `commands/copyto.c`.)
pub(super) fn copy_line<'a>(out: &mut String, cells: impl Iterator<Item = Option<&'a str>>) {
    for (place, cell) in cells.enumerate() {
        if place > 0 {
            out.push('\t');
        }
        let Some(text) = cell else {
            out.push_str("\\N");
            continue;
        };
        for c in text.chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                c => out.push(c),
            }
        }
    }
    out.push('\n');
}

/// The text of a cell that is told.
pub(super) fn text_of(cell: &Cell) -> Option<&str> {
    match cell {
        Cell::Text(text) => Some(text),
        Cell::Null | Cell::Unchanged => None,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::follow::ShapeColumn;
    use super::*;
    use crate::decode::pgoutput::{Message, ReplicaIdentity};
    use crate::pg::Oid;

    fn shape() -> Shape {
        let column = |name: &str, is_key| ShapeColumn { name: name.into(), is_key, type_oid: Oid(25) };
        let columns = vec![column("id", true), column("a", false), column("big", false)];
        let identity = ReplicaIdentity::Default;
        Shape { oid: Oid(1), schema: "public".into(), name: "t".into(), columns, identity }
    }

    fn message(tag: u8, parts: &[(u8, &[Option<String>])]) -> Vec<u8> {
        let mut bytes = vec![tag, 0, 0, 0, 1];
        for (kind, values) in parts {
            bytes.push(*kind);
            bytes.extend(u16::try_from(values.len()).unwrap().to_be_bytes());
            for value in *values {
                match value.as_deref() {
                    None => bytes.push(b'n'),
                    Some("<unchanged>") => bytes.push(b'u'),
                    Some(text) => {
                        bytes.push(b't');
                        bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                        bytes.extend(text.as_bytes());
                    }
                }
            }
        }
        bytes
    }

    fn values(id: u8, a: u8, big: &str) -> Vec<Option<String>> {
        vec![Some(id.to_string()), Some(a.to_string()), Some(big.to_owned())]
    }

    /// The rows of a table, by key, as they are after the outcome.
    fn apply(table: &mut BTreeMap<String, (String, String)>, outcome: Outcome) {
        let text = |cell: &Cell| text_of(cell).unwrap_or("NULL").to_owned();
        for key in outcome.deletes {
            assert!(table.remove(&*key[0]).is_some(), "a delete finds its row");
        }
        for (told, rows) in outcome.updates {
            for row in rows {
                let known = table.get_mut(&text(&row[0])).expect("an update finds its row");
                if told[1] {
                    known.0 = text(&row[1]);
                }
                if told[2] {
                    known.1 = text(&row[2]);
                }
            }
        }
        for row in outcome.inserts {
            let new = (text(&row[1]), text(&row[2]));
            assert_eq!(table.insert(text(&row[0]), new), None, "an insert is of a new row");
        }
    }

    proptest! {
        /// Whatever is done to a few rows, in whatever order: the outcome is what one after the other comes to.
        #[test]
        fn the_outcome_is_that_of_one_change_after_the_other(
            changes in prop::collection::vec((0..4_u8, 0..5_u8, 0..5_u8, any::<u8>(), any::<bool>()), 0..60),
            flushes in prop::collection::vec(any::<bool>(), 60),
        ) {
            let shape = shape();
            let mut net = NetChanges::default();
            let mut model: BTreeMap<String, (String, String)> = BTreeMap::new();
            let mut table = model.clone();
            for ((kind, id, other, a, unchanged), flush) in changes.into_iter().zip(flushes) {
                let (key, other_key) = (id.to_string(), other.to_string());
                match kind {
                    0 if !model.contains_key(&key) => {
                        let bytes = message(b'I', &[(b'N', &values(id, a, "new"))]);
                        let Message::Insert { new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
                        net.insert(&shape, new).unwrap();
                        model.insert(key, (a.to_string(), "new".to_owned()));
                    }
                    1 if model.contains_key(&key) => {
                        let bytes = message(b'D', &[(b'K', &[Some(key.clone()), None, None])]);
                        let Message::Delete { old, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
                        net.delete(&shape, old).unwrap();
                        model.remove(&key);
                    }
                    2 if model.contains_key(&key) => {
                        let big = if unchanged { "<unchanged>" } else { "other" };
                        let bytes = message(b'U', &[(b'N', &values(id, a, big))]);
                        let Message::Update { old, new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
                        prop_assert_eq!(net.update(&shape, old, new).unwrap(), Taken::Yes);
                        let known = model.get_mut(&key).unwrap();
                        known.0 = a.to_string();
                        if !unchanged {
                            known.1 = "other".to_owned();
                        }
                    }
                    3 if model.contains_key(&key) && !model.contains_key(&other_key) => {
                        let big = if unchanged { "<unchanged>" } else { "moved" };
                        let old_key = [Some(key.clone()), None, None];
                        let bytes = message(b'U', &[(b'K', &old_key), (b'N', &values(other, a, big))]);
                        let Message::Update { old, new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
                        let mut known = model.remove(&key).unwrap();
                        known.0 = a.to_string();
                        if !unchanged {
                            known.1 = "moved".to_owned();
                        }
                        if net.update(&shape, old, new).unwrap() == Taken::Not {
                            // As the writer does: what was before is done first, and this by itself.
                            prop_assert!(unchanged);
                            apply(&mut table, net.take());
                            table.remove(&key);
                            table.insert(other_key.clone(), known.clone());
                        }
                        model.insert(other_key, known);
                    }
                    _ => {}
                }
                if flush {
                    apply(&mut table, net.take());
                    prop_assert_eq!(&table, &model);
                    prop_assert_eq!(net.bytes(), 0);
                }
            }
            apply(&mut table, net.take());
            prop_assert_eq!(table, model);
        }
    }

    #[test]
    fn what_cannot_be_is_an_error_and_no_change() {
        let shape = shape();
        let insert = message(b'I', &[(b'N', &values(1, 2, "x"))]);
        let Message::Insert { new, .. } = Message::read(&insert, false).unwrap() else { panic!() };
        let mut net = NetChanges::default();
        net.insert(&shape, new).unwrap();
        assert!(net.insert(&shape, new).unwrap_err().contains("there already"));
        let gone = message(b'D', &[(b'K', &[Some("7".to_owned()), None, None])]);
        let Message::Delete { old, .. } = Message::read(&gone, false).unwrap() else { panic!() };
        net.delete(&shape, old).unwrap();
        assert!(net.delete(&shape, old).unwrap_err().contains("deleted twice"));
        let short = message(b'I', &[(b'N', &[Some("7".to_owned())])]);
        let Message::Insert { new, .. } = Message::read(&short, false).unwrap() else { panic!() };
        assert!(net.insert(&shape, new).unwrap_err().contains("1 values for 3 columns"));
    }

    #[test]
    fn a_line_is_read_back_as_it_was_written() {
        let mut out = String::new();
        copy_line(&mut out, [Some("a\tb\\N\n"), None, Some(""), Some("\r")].into_iter());
        assert_eq!(out, "a\\tb\\\\N\\n\t\\N\t\t\\r\n");
    }
}
