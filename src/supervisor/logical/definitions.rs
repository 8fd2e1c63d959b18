//! The loop that looks for tables that came, changed or went, and writes what it found into the server's WAL.
//!
//! Logical replication tells nothing of definitions. A look at the catalogs every few seconds finds what became of them
//! between two looks; as a message in the WAL it comes back in its place among the changes, is kept with them, and is told
//! like any other damage. What was seen last is kept in the spool's directory, so that what happens while no agent looks is
//! found by the next one; on a new machine that begins with what the newest base saw.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::Wanted;
use crate::atomic_file;
use crate::backoff::Chain;
use crate::capture::logical::{self, TableCoverage, TableDefinition};
use crate::capture::{CaptureError, ConnInfo, sql_error};
use crate::detect::DdlKind;
use crate::detect::logical::{DEFINITIONS_PREFIX, DefinitionsTold, EventTold};
use crate::pg::Oid;
use crate::repo::{RepoError, Repository};

/// How often the catalogs are looked at.
const INTERVAL: Duration = Duration::from_secs(2);

/// A query that takes so long is too dear to be repeated every few seconds.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// Events of one message. A schema that is dropped with more tables makes several.
const EVENTS_MAX: usize = 100;

/// The longest such file that is read: of the most tables that are looked at, with a dozen columns each.
const FILE_BYTES_MAX: u64 = 128 << 20;

/// What the loop works with.
#[derive(Debug)]
pub(in crate::supervisor) struct Definitions {
    pub(in crate::supervisor) conninfo: ConnInfo,
    pub(in crate::supervisor) database: Oid,
    pub(in crate::supervisor) publications: logical::Config,
    pub(in crate::supervisor) repo: Repository,
    /// The spool's directory of the cluster.
    pub(in crate::supervisor) dir: PathBuf,
    /// Why a base is wanted before its time.
    pub(in crate::supervisor) wanted: watch::Sender<Option<Wanted>>,
}

/// The catalogs could not be looked at.
#[derive(Debug, thiserror::Error)]
enum LookError {
    #[error(transparent)]
    Server(#[from] CaptureError),
    #[error("see what the newest base saw")]
    Repo(#[from] RepoError),
}

type Tables = BTreeMap<Oid, TableDefinition>;

/// What one look saw.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Look {
    database: Oid,
    definitions: logical::Definitions,
    /// How much is told of each table with rows; `None` if only a base is known.
    told: Option<BTreeMap<Oid, TableCoverage>>,
}

impl Definitions {
    pub(in crate::supervisor) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut client = None;
        let mut before: Option<Look> = None;
        let mut failing = false;
        let mut pause = Duration::ZERO;
        while stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_some() {
            let begun = tokio::time::Instant::now();
            match stop.run_until_cancelled(self.look(&mut client, &mut before)).await {
                None => return Ok(()),
                Some(Ok(())) => failing = false,
                Some(Err(error)) => {
                    client = None;
                    if !std::mem::replace(&mut failing, true) {
                        tracing::info!("failed to look for changes of definitions: {}", Chain(&error));
                    }
                }
            }
            // No more than a twentieth of the time.
            pause = INTERVAL.max(begun.elapsed() * 20);
        }
        Ok(())
    }

    async fn look(&self, client: &mut Option<Client>, before: &mut Option<Look>) -> Result<(), LookError> {
        if before.is_none() {
            *before = self.remembered().await?;
        }
        if client.as_ref().is_none_or(Client::is_closed) {
            *client = Some(logical::connect(&self.conninfo).await?);
        }
        let Some(client) = client else { return Ok(()) };
        let wrong = |error| sql_error("the server", error);
        let looked = tokio::time::timeout(LOOK_MAX, logical::Definitions::look(client)).await;
        let definitions = looked.map_err(|_| CaptureError::Unreachable {
            what: "the server did not tell its tables in time".to_owned(),
            source: None,
        })??;
        let told = logical::coverage(client, &self.publications).await?;
        let told = Some(told.into_iter().map(|table| (table.oid, table)).collect());
        let now = Look { database: self.database, definitions, told };
        if before.as_ref().is_some_and(|before| before.is_as(&now)) {
            *before = Some(now); // as good as the one that is kept
            return Ok(());
        }
        if let Some(before) = before {
            let less = less(before, &now);
            for statement in logical::tell_coverage(&less) {
                client.batch_execute(&statement).await.map_err(wrong)?;
            }
            let found = tell(&before.definitions, &now.definitions);
            for told in &found {
                let content = serde_json::to_string(told).expect("events become JSON");
                let prefix = String::from_utf8_lossy(DEFINITIONS_PREFIX);
                let query = "SELECT pg_catalog.pg_logical_emit_message(true, $1, $2)";
                client.query(query, &[&&*prefix, &content]).await.map_err(wrong)?;
            }
            // Of what is told again, or more, a base must be taken before it can be rebuilt. An index can wait for the next one.
            let is_of_rows = |told: &DefinitionsTold| {
                !told.events.is_empty() || told.others.keys().any(|kind| logical::rows_depend_on(kind))
            };
            if found.iter().any(is_of_rows) || !less.is_empty() || !self::less(&now, before).is_empty() {
                let changed = Wanted::Definitions(Timestamp::now());
                self.wanted.send_if_modified(|wanted| {
                    let is_more = *wanted != Some(Wanted::Lost);
                    if is_more {
                        *wanted = Some(changed);
                    }
                    is_more
                });
            }
        }
        self.remember(&now);
        *before = Some(now);
        Ok(())
    }

    /// What an agent saw last: this machine's, or else whoever took the newest base.
    async fn remembered(&self) -> Result<Option<Look>, LookError> {
        let path = self.file();
        let is_small = std::fs::metadata(&path).is_ok_and(|meta| meta.len() <= FILE_BYTES_MAX);
        let read = is_small.then(|| std::fs::read(&path).ok()).flatten();
        let look = read.and_then(|bytes| serde_json::from_slice::<Look>(&bytes).ok());
        if let Some(look) = look.filter(|look| look.database == self.database) {
            return Ok(Some(look));
        }
        let base = self.repo.bases(self.database).await?.pop();
        Ok(base.map(|base| Look { database: self.database, definitions: base.definitions, told: None }))
    }

    /// What was seen last.
    fn file(&self) -> PathBuf {
        self.dir.join(format!("definitions-{}.json", self.database))
    }

    fn remember(&self, look: &Look) {
        let bytes = serde_json::to_vec(look).expect("definitions become JSON");
        if let Err(error) = atomic_file::write(&self.file(), &bytes) {
            tracing::info!("failed to note what tables look like: {error}"); // the newest base tells it too
        }
    }
}

impl Look {
    /// True if nothing is told differently, and nothing looks different.
    fn is_as(&self, now: &Self) -> bool {
        let (before, later) = (&self.definitions, &now.definitions);
        self.told == now.told && before.tables == later.tables && before.others == later.others
    }
}

/// The tables of which less is told than before.
fn less(before: &Look, now: &Look) -> Vec<TableCoverage> {
    let (Some(before), Some(now)) = (&before.told, &now.told) else { return Vec::new() };
    let is_less =
        |table: &&TableCoverage| before.get(&table.oid).is_some_and(|before| before.coverage > table.coverage);
    now.values().filter(is_less).cloned().collect()
}

/// What to write down of all that became of definitions between two looks; nothing if it is nothing.
fn tell(before: &logical::Definitions, now: &logical::Definitions) -> Vec<DefinitionsTold> {
    let events = compare(&before.tables, &now.tables);
    let mut others = now.others_since(before);
    if events.is_empty() && others.is_empty() {
        return Vec::new();
    }
    let mut parts: Vec<Vec<EventTold>> = events.chunks(EVENTS_MAX).map(<[_]>::to_vec).collect();
    if parts.is_empty() {
        parts.push(Vec::new());
    }
    let told = parts.into_iter().map(|events| {
        let others = std::mem::take(&mut others); // once is enough
        DefinitionsTold { v: 1, since: before.at, at: now.at, events, others }
    });
    told.collect()
}

/// What became of tables between two looks.
fn compare(before: &Tables, now: &Tables) -> Vec<EventTold> {
    let event = |oid: &Oid, seen: &TableDefinition, kind: DdlKind, object: Option<String>| EventTold {
        kind,
        oid: oid.0,
        schema: seen.schema.clone(),
        name: seen.name.clone(),
        object,
        digest: now.get(oid).map(TableDefinition::digest),
    };
    let mut events = Vec::new();
    for (oid, seen) in before {
        let Some(later) = now.get(oid) else {
            events.push(event(oid, seen, DdlKind::DropTable, None));
            continue;
        };
        if (&later.schema, &later.name) != (&seen.schema, &seen.name) {
            events.push(event(oid, later, DdlKind::Alter, Some(format!("{}.{}", seen.schema, seen.name))));
        }
        if (&later.columns, &later.types) == (&seen.columns, &seen.types) {
            continue;
        }
        let gone: Vec<_> = seen.columns.iter().filter(|column| !later.columns.contains(column)).collect();
        let came = later.columns.iter().filter(|column| !seen.columns.contains(column)).count();
        // As many as came have another name now; which ones nobody can tell.
        if gone.len() > came {
            events.extend(gone.iter().map(|column| event(oid, later, DdlKind::DropColumn, Some((*column).clone()))));
        } else {
            events.push(event(oid, later, DdlKind::Alter, None));
        }
    }
    for (oid, seen) in now.iter().filter(|(oid, _)| !before.contains_key(oid)) {
        events.push(event(oid, seen, DdlKind::Create, None));
    }
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(name: &str, columns: &[(&str, &str)]) -> TableDefinition {
        let (columns, types) = columns.iter().map(|(name, kind)| ((*name).to_owned(), (*kind).to_owned())).unzip();
        TableDefinition { schema: "public".into(), name: name.into(), columns, types }
    }

    fn seen(name: &str, columns: &[&str]) -> TableDefinition {
        typed(name, &columns.iter().map(|column| (*column, "23:-1")).collect::<Vec<_>>())
    }

    #[test]
    fn what_came_went_and_changed_between_two_looks_is_told() {
        let before: Tables = BTreeMap::from([
            (1, seen("gone", &["a"])),
            (2, seen("same", &["a"])),
            (3, seen("old_name", &["a"])),
            (4, seen("narrower", &["a", "b"])),
            (5, seen("wider", &["a"])),
            (6, seen("column_renamed", &["a"])),
            (8, typed("of_another_type", &[("a", "23:-1")])),
        ])
        .into_iter()
        .map(|(oid, table)| (Oid(oid), table))
        .collect();
        let now: Tables = BTreeMap::from([
            (2, seen("same", &["a"])),
            (3, seen("new_name", &["a"])),
            (4, seen("narrower", &["a"])),
            (5, seen("wider", &["a", "b"])),
            (6, seen("column_renamed", &["z"])),
            (7, seen("made", &[])),
            (8, typed("of_another_type", &[("a", "20:-1")])),
        ])
        .into_iter()
        .map(|(oid, table)| (Oid(oid), table))
        .collect();
        let told: Vec<_> =
            compare(&before, &now).into_iter().map(|event| (event.oid, event.kind, event.name, event.object)).collect();
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(
            told,
            [
                (1, DdlKind::DropTable, "gone".to_owned(), None),
                (3, DdlKind::Alter, "new_name".to_owned(), text("public.old_name")),
                (4, DdlKind::DropColumn, "narrower".to_owned(), text("b")),
                (5, DdlKind::Alter, "wider".to_owned(), None),
                (6, DdlKind::Alter, "column_renamed".to_owned(), None),
                (8, DdlKind::Alter, "of_another_type".to_owned(), None),
                (7, DdlKind::Create, "made".to_owned(), None),
            ]
        );
        assert_eq!(compare(&now, &now), []);
    }

    #[test]
    fn of_many_tables_several_messages_tell_and_of_other_kinds_the_first() {
        let look = |tables: u32, number: &str| logical::Definitions {
            at: Timestamp::UNIX_EPOCH,
            tables: (0..tables).map(|oid| (Oid(oid), seen("t", &["a"]))).collect(),
            others: BTreeMap::from([("indexes".to_owned(), number.to_owned())]),
        };
        let sizes = |before: &logical::Definitions, now: &logical::Definitions| -> Vec<_> {
            tell(before, now).iter().map(|told| (told.events.len(), told.others.len())).collect()
        };
        assert_eq!(sizes(&look(250, "1"), &look(0, "2")), [(100, 1), (100, 0), (50, 0)]);
        assert_eq!(sizes(&look(1, "1"), &look(1, "2")), [(0, 1)]);
        assert_eq!(sizes(&look(1, "1"), &look(1, "1")), []);
    }
}
