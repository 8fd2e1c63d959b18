//! The guard's messages in the WAL -> who did it. Pure; whoever can run SQL can write such a message, so nothing in it is
//! trusted.

use crate::detect::{Actor, Who, WhoSource};
use crate::pg::{Oid, PgTime};

/// The prefix of the guard's messages.
pub const PREFIX: &[u8] = b"walguard";

/// The guard's own messages have 3 KiB at most, and 13 KiB with a list of objects; what is longer is not its.
const BYTES_MAX: usize = 64 << 10;

/// Characters that are kept of a text.
const TEXT_MAX: usize = 2_048;

/// Objects that are kept of a list.
const OBJECTS_MAX: usize = 64;

/// What the guard told of a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardMessage {
    /// What it did.
    pub what: Told,
    /// Who did it, with [`WhoSource::Guard`].
    pub who: Who,
    /// The reason that the session gave (`SET walguard.reason = '...'`).
    pub reason: Option<String>,
}

/// What a statement did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// It changed rows of a table.
    Rows {
        /// How.
        operation: Operation,
        /// The table's schema.
        schema: String,
        /// The table's name.
        table: String,
        /// The table's OID; 0 if it is not told.
        oid: Oid,
        /// How many rows; `None` if they were not counted.
        rows: Option<u64>,
    },
    /// It changed or dropped definitions.
    Definitions {
        /// They are gone.
        dropped: bool,
        /// The command: `DROP TABLE`.
        command: String,
        /// Kind and name of each object, the first of them.
        objects: Vec<(String, String)>,
        /// How many there were in all.
        total: u64,
    },
}

/// What was done with rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `DELETE`.
    Delete,
    /// `UPDATE`.
    Update,
    /// `TRUNCATE`.
    Truncate,
}

#[derive(serde::Deserialize)]
struct Message {
    v: u32,
    role: Option<String>,
    session_user: Option<String>,
    database: Option<String>,
    application: Option<String>,
    client: Option<String>,
    port: Option<i32>,
    pid: Option<i32>,
    backend_start: Option<i64>,
    transaction_start: Option<i64>,
    query: Option<String>,
    reason: Option<String>,
    what: What,
}

#[derive(serde::Deserialize)]
struct What {
    op: String,
    #[serde(default)]
    schema: String,
    #[serde(default)]
    table: String,
    #[serde(default)]
    oid: u32,
    rows: Option<u64>,
    #[serde(default)]
    tag: String,
    #[serde(default)]
    objects: Vec<(Option<String>, Option<String>)>,
    #[serde(default)]
    objects_total: u64,
}

/// Reads a message of the WAL; `None` if it is not the guard's, or not one that this version understands.
pub fn read(prefix: &[u8], content: &[u8]) -> Option<GuardMessage> {
    if prefix != PREFIX || content.len() > BYTES_MAX {
        return None;
    }
    let message: Message = serde_json::from_str(&String::from_utf8_lossy(content)).ok()?;
    if message.v != 1 {
        return None;
    }
    let What { op, schema, table, oid, rows, tag, objects, objects_total } = message.what;
    let rows_of = |operation| Told::Rows { operation, schema: cut(schema), table: cut(table), oid: Oid(oid), rows };
    let what = match op.as_str() {
        "delete" => rows_of(Operation::Delete),
        "update" => rows_of(Operation::Update),
        "truncate" => rows_of(Operation::Truncate),
        "ddl" | "drop" => Told::Definitions {
            dropped: op == "drop",
            command: cut(tag),
            total: objects_total.max(objects.len() as u64),
            objects: objects
                .into_iter()
                .take(OBJECTS_MAX)
                .map(|(kind, name)| (cut(kind.unwrap_or_default()), cut(name.unwrap_or_default())))
                .collect(),
        },
        _ => return None,
    };
    let client = match (message.client.map(cut), message.port) {
        (Some(address), Some(port)) if address.contains(':') => format!("[{address}]:{port}"),
        (Some(address), Some(port)) => format!("{address}:{port}"),
        (Some(address), None) => address,
        (None, _) => "local".to_owned(),
    };
    let actor = Actor {
        role: message.role.map(cut),
        session_user: message.session_user.map(cut),
        database: message.database.map(cut),
        application: message.application.map(cut),
        client: Some(client),
        pid: message.pid,
        backend_type: None,
        backend_start: message.backend_start.map(PgTime::from_micros),
        transaction_start: message.transaction_start.map(PgTime::from_micros),
        query: message.query.map(cut),
        prepared: None,
    };
    let reason = message.reason.map(cut);
    Some(GuardMessage { what, who: Who { actor, source: WhoSource::Guard, note: None }, reason })
}

fn cut(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(TEXT_MAX) {
        text.truncate(end);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DELETE: &str = r#"{"v":1,"role":"app","session_user":"bob","database":"shop","application":"till",
        "client":"10.0.0.7","port":5123,"pid":18129,"backend_start":848962471813045,"transaction_start":848962471826832,
        "query":"delete from users where n<40","more":[1],"what":{"op":"delete","schema":"public","table":"users","oid":16387,"rows":39}}"#;

    #[test]
    fn a_message_tells_who_did_what() {
        let read = read(b"walguard", DELETE.as_bytes()).unwrap();
        assert_eq!(read.who.source, WhoSource::Guard);
        assert_eq!(read.who.actor.role.as_deref(), Some("app"));
        assert_eq!(read.who.actor.session_user.as_deref(), Some("bob"));
        assert_eq!(read.who.actor.client.as_deref(), Some("10.0.0.7:5123"));
        assert_eq!(read.who.actor.pid, Some(18129));
        let (schema, table) = ("public".to_owned(), "users".to_owned());
        let told = Told::Rows { operation: Operation::Delete, schema, table, oid: Oid(16_387), rows: Some(39) };
        assert_eq!((read.what, read.reason), (told, None));
    }

    #[test]
    fn dropped_objects_are_told_as_far_as_they_are_named() {
        let text = r#"{"v":1,"what":{"op":"drop","tag":"DROP TABLE","objects":[["table","public.r"],["GRANT",null]],"objects_total":70}}"#;
        let Told::Definitions { dropped: true, command, objects, total: 70 } =
            read(b"walguard", text.as_bytes()).unwrap().what
        else {
            panic!("{text}")
        };
        assert_eq!((command.as_str(), objects.len()), ("DROP TABLE", 2));
        assert_eq!(objects[0], ("table".to_owned(), "public.r".to_owned()));
    }

    #[test]
    fn what_is_not_the_guards_is_left_alone() {
        assert_eq!(read(b"walguard.nudge", b""), None);
        assert_eq!(read(b"other", DELETE.as_bytes()), None);
        assert_eq!(read(b"walguard", DELETE.replace("\"v\":1", "\"v\":2").as_bytes()), None);
        assert_eq!(read(b"walguard", DELETE.replace("delete\",", "explode\",").as_bytes()), None);
    }

    #[test]
    fn nothing_in_it_is_unbounded() {
        let long = DELETE.replace("delete from users", &"é".repeat(9_000));
        let read_long = read(b"walguard", long.as_bytes()).unwrap();
        assert_eq!(read_long.who.actor.query.unwrap().chars().count(), TEXT_MAX);
        let objects = vec![r#"["a","b"]"#; 5_000].join(",");
        let many = format!(r#"{{"v":1,"what":{{"op":"ddl","objects":[{objects}]}}}}"#);
        let Told::Definitions { objects, total, .. } = read(b"walguard", many.as_bytes()).unwrap().what else {
            panic!()
        };
        assert_eq!((objects.len(), total), (OBJECTS_MAX, 5_000));
        assert_eq!(read(b"walguard", &vec![b'['; BYTES_MAX + 1]), None);
        assert_eq!(read(b"walguard", &vec![b'['; BYTES_MAX]), None, "deep nesting does not end us");
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0..DELETE.len()) {
            let mut damaged = DELETE.as_bytes().to_vec();
            damaged.splice(at..at, bytes.iter().copied());
            let _ = read(b"walguard", &damaged);
            let _ = read(b"walguard", &bytes);
        }
    }
}
