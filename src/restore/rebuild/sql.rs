//! A change of a row -> the statement that repeats it.
//!
//! Values are written as the server wrote them, as quoted literals without a type: the column's own input function reads
//! them, as it does for native logical replication.

use super::follow::Shape;
use crate::decode::pgoutput::{OldRow, ReplicaIdentity, Tuple, Value};

/// An identifier in quotes.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `"schema"."table"`.
pub(super) fn table_name(shape: &Shape) -> String {
    format!("{}.{}", quoted(&shape.schema), quoted(&shape.name))
}

/// A value as a literal. `Ok(None)` if it is one that an update left as it was.
fn literal(value: Value<'_>) -> Result<Option<String>, String> {
    match value {
        Value::Null => Ok(Some("NULL".to_owned())),
        Value::Unchanged => Ok(None),
        Value::Binary(_) => Err("a value in binary, which we never ask for".to_owned()),
        Value::Text(bytes) => {
            let text = std::str::from_utf8(bytes).map_err(|_| "a value that is not UTF-8".to_owned())?;
            if text.contains('\0') {
                return Err("a value with a zero byte".to_owned());
            }
            // With standard_conforming_strings a backslash is a character like any other.
            Ok(Some(format!("'{}'", text.replace('\'', "''"))))
        }
    }
}

/// What begins the statement that inserts rows, and one row of it.
///
/// # Errors
/// If the row does not fit its table.
pub(super) fn insert(shape: &Shape, new: Tuple<'_>) -> Result<(String, String), String> {
    let columns: Vec<_> = shape.columns.iter().map(|column| quoted(&column.name)).collect();
    let values: Vec<_> = new.iter().map(literal).collect::<Result<_, _>>()?;
    let values: Option<Vec<_>> = values.into_iter().collect();
    let values = values.ok_or("a new row without a value")?;
    if values.len() != columns.len() {
        return Err(format!("a row of {} values for {} columns", values.len(), columns.len()));
    }
    let name = table_name(shape);
    if columns.is_empty() {
        return Ok((format!("INSERT INTO {name} DEFAULT VALUES"), String::new()));
    }
    let head = format!("INSERT INTO {name} ({}) OVERRIDING SYSTEM VALUE VALUES ", columns.join(", "));
    Ok((head, format!("({})", values.join(", "))))
}

/// The statement that changes a row.
///
/// # Errors
/// If a row does not fit its table.
pub(super) fn update(shape: &Shape, old: Option<OldRow<'_>>, new: Tuple<'_>) -> Result<Option<String>, String> {
    let values: Vec<_> = new.iter().map(literal).collect::<Result<_, _>>()?;
    if values.len() != shape.columns.len() {
        return Err(format!("a row of {} values for {} columns", values.len(), shape.columns.len()));
    }
    // What stays as it was is left alone: an identity column, for example, may not be set at all.
    let before: Vec<Option<String>> = match old {
        Some(OldRow::Whole(row)) => row.iter().map(literal).collect::<Result<_, _>>()?,
        Some(OldRow::Key(_)) => Vec::new(),
        None => shape.columns.iter().zip(&values).map(|(c, value)| value.clone().filter(|_| c.is_key)).collect(),
    };
    let is_same = |place: usize, value: &String| before.get(place).and_then(Option::as_ref) == Some(value);
    let set: Vec<_> = shape
        .columns
        .iter()
        .zip(&values)
        .enumerate()
        .filter_map(|(place, (column, value))| {
            let value = value.as_ref().filter(|value| !is_same(place, value))?;
            Some(format!("{} = {value}", quoted(&column.name)))
        })
        .collect();
    if set.is_empty() {
        return Ok(None);
    }
    let filter = filter(shape, old, Some(new))?;
    Ok(Some(format!("UPDATE ONLY {} SET {} WHERE {filter}", table_name(shape), set.join(", "))))
}

/// The statement that deletes a row.
///
/// # Errors
/// If the row does not fit its table.
pub(super) fn delete(shape: &Shape, old: OldRow<'_>) -> Result<String, String> {
    Ok(format!("DELETE FROM ONLY {} WHERE {}", table_name(shape), filter(shape, Some(old), None)?))
}

/// What holds for the row, and no other.
fn filter(shape: &Shape, old: Option<OldRow<'_>>, new: Option<Tuple<'_>>) -> Result<String, String> {
    let (row, is_whole) = match (old, new) {
        (Some(OldRow::Whole(row)), _) => (row, true),
        (Some(OldRow::Key(row)), _) => (row, false),
        (None, Some(new)) => (new, false),
        (None, None) => return Err("nothing tells which row it is".to_owned()),
    };
    let mut terms = Vec::new();
    for (column, value) in shape.columns.iter().zip(row.iter()) {
        if !is_whole && !column.is_key {
            continue;
        }
        let name = quoted(&column.name);
        match (literal(value)?, value) {
            (None, _) if is_whole => {} // a large value that is not told; the others tell
            (None, _) => return Err("a key that is not told".to_owned()),
            (Some(_), Value::Null) => terms.push(format!("{name} IS NULL")),
            // Not every type can be compared, and some compare what is not the same; its text is what was told.
            (Some(text), _) if is_whole => terms.push(format!("pg_catalog.format('%s', {name}) = {text}")),
            (Some(text), _) => terms.push(format!("{name} = {text}")),
        }
    }
    if terms.is_empty() && shape.identity != ReplicaIdentity::Full {
        return Err("nothing tells which row it is".to_owned());
    }
    let all = if terms.is_empty() { "true".to_owned() } else { terms.join(" AND ") };
    if !is_whole {
        return Ok(all);
    }
    // Of rows that are the same in all columns one goes, whichever.
    Ok(format!("ctid = (SELECT ctid FROM ONLY {} WHERE {all} LIMIT 1)", table_name(shape)))
}

/// The columns by which rows are found, for an index; none if whole rows are compared.
pub(super) fn key_columns(shape: &Shape) -> Option<String> {
    if shape.identity == ReplicaIdentity::Full {
        return None;
    }
    let keys: Vec<_> = shape.columns.iter().filter(|column| column.is_key).map(|column| quoted(&column.name)).collect();
    (!keys.is_empty()).then(|| keys.join(", "))
}

#[cfg(test)]
mod tests {
    use super::super::follow::ShapeColumn;
    use super::*;
    use crate::decode::pgoutput::Message;
    use crate::pg::Oid;

    fn shape(identity: ReplicaIdentity) -> Shape {
        let column = |name: &str, is_key| ShapeColumn { name: name.into(), is_key, type_oid: Oid(25) };
        let is_full = identity == ReplicaIdentity::Full;
        let columns = vec![column("id", true), column("no\"te", is_full)];
        Shape { oid: Oid(1), schema: "public".into(), name: "o's".into(), columns, identity }
    }

    fn tuple(values: &[Option<&str>]) -> Vec<u8> {
        let mut bytes = u16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                None => bytes.push(b'n'),
                Some("<unchanged>") => bytes.push(b'u'),
                Some(text) => {
                    bytes.push(b't');
                    bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                    bytes.extend(text.as_bytes());
                }
            }
        }
        bytes
    }

    fn message(tag: u8, parts: &[(u8, &[Option<&str>])]) -> Vec<u8> {
        let mut bytes = vec![tag, 0, 0, 0, 1];
        for (kind, values) in parts {
            bytes.push(*kind);
            bytes.extend(tuple(values));
        }
        bytes
    }

    #[test]
    fn a_row_is_inserted_as_it_was_written() {
        let bytes = message(b'I', &[(b'N', &[Some("7"), Some("it's \\ all")])]);
        let Message::Insert { new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        let (head, row) = insert(&shape(ReplicaIdentity::Default), new).unwrap();
        assert_eq!(head, "INSERT INTO \"public\".\"o's\" (\"id\", \"no\"\"te\") OVERRIDING SYSTEM VALUE VALUES ");
        assert_eq!(row, "('7', 'it''s \\ all')");
    }

    #[test]
    fn an_update_names_the_row_by_its_old_key_and_leaves_what_is_not_told() {
        let shape = shape(ReplicaIdentity::Default);
        let bytes = message(b'U', &[(b'N', &[Some("7"), Some("b")])]);
        let Message::Update { old, new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        let told = update(&shape, old, new).unwrap().unwrap();
        assert_eq!(told, "UPDATE ONLY \"public\".\"o's\" SET \"no\"\"te\" = 'b' WHERE \"id\" = '7'");
        let bytes = message(b'U', &[(b'N', &[Some("7"), Some("<unchanged>")])]);
        let Message::Update { old, new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        assert_eq!(update(&shape, old, new).unwrap(), None, "nothing is told to be new");
        let bytes = message(b'U', &[(b'K', &[Some("6"), None]), (b'N', &[Some("7"), None])]);
        let Message::Update { old, new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        let told = update(&shape, old, new).unwrap().unwrap();
        assert_eq!(told, "UPDATE ONLY \"public\".\"o's\" SET \"id\" = '7', \"no\"\"te\" = NULL WHERE \"id\" = '6'");
        assert_eq!(key_columns(&shape).as_deref(), Some("\"id\""));
    }

    #[test]
    fn of_rows_that_are_the_same_one_goes() {
        let shape = shape(ReplicaIdentity::Full);
        let bytes = message(b'D', &[(b'O', &[Some("7"), None])]);
        let Message::Delete { old, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        assert_eq!(
            delete(&shape, old).unwrap(),
            "DELETE FROM ONLY \"public\".\"o's\" WHERE ctid = (SELECT ctid FROM ONLY \"public\".\"o's\" \
             WHERE pg_catalog.format('%s', \"id\") = '7' AND \"no\"\"te\" IS NULL LIMIT 1)"
        );
        assert_eq!(key_columns(&shape), None);
    }

    #[test]
    fn what_tells_no_row_is_an_error() {
        let mut shape = shape(ReplicaIdentity::Default);
        shape.columns[0].is_key = false;
        let bytes = message(b'D', &[(b'K', &[Some("7"), None])]);
        let Message::Delete { old, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        assert!(delete(&shape, old).is_err());
        let bytes = message(b'I', &[(b'N', &[Some("7")])]);
        let Message::Insert { new, .. } = Message::read(&bytes, false).unwrap() else { panic!() };
        assert!(insert(&shape, new).unwrap_err().contains("1 values for 2 columns"));
    }
}
