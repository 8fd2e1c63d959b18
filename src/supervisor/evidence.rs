//! The loop that has the rows of an incident saved: a snapshot when it is suspected, the rows when it has happened.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::flashback::Flashback;
use crate::backoff::Chain;
use crate::detect::RelationKind;
use crate::detect::incident::{Evidence, Incident, TransactionState};
use crate::guard::flashback::Wanted;
use crate::pg::Xid;
use crate::repo::{RepoError, Repository};

/// Incidents that are remembered, so that rows are saved once.
const INCIDENTS_MAX: usize = 1_024;

/// What the loop works with.
#[derive(Debug)]
pub struct Saving {
    /// What holds snapshots.
    pub flashback: Flashback,
    /// Where incidents are.
    pub repo: Repository,
    /// Each revision of each incident, once it is in the repository.
    pub incidents: mpsc::Receiver<Incident>,
}

/// What was done for an incident.
#[derive(Debug, Default)]
struct Done {
    suspected: BTreeSet<String>,
    saved: BTreeSet<String>,
}

impl Saving {
    /// Saves rows until `stop`.
    ///
    /// # Errors
    /// None: what cannot be saved is noted in the incident.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        let mut done: BTreeMap<String, Done> = BTreeMap::new();
        let mut order: VecDeque<String> = VecDeque::new();
        while let Some(Some(incident)) = stop.run_until_cancelled(self.incidents.recv()).await {
            if !done.contains_key(&incident.id) {
                if order.len() == INCIDENTS_MAX
                    && let Some(oldest) = order.pop_front()
                {
                    done.remove(&oldest);
                }
                order.push_back(incident.id.clone());
            }
            let its = done.entry(incident.id.clone()).or_default();
            if stop.run_until_cancelled(self.consider(&incident, its)).await.is_none() {
                break;
            }
        }
        stop.cancelled().await;
        Ok(())
    }

    async fn consider(&self, incident: &Incident, done: &mut Done) {
        let is_open = |state| matches!(state, TransactionState::Open | TransactionState::Prepared);
        let is_any_open = incident.transactions.iter().any(|transaction| is_open(transaction.state));
        if is_any_open {
            let databases: BTreeSet<String> = incident
                .tables
                .iter()
                .filter_map(|table| {
                    table
                        .relation
                        .as_ref()
                        .map(|relation| relation.database_name.clone())
                        .filter(|name| !name.is_empty())
                })
                .collect();
            for database in databases {
                if done.suspected.insert(database.clone()) {
                    self.flashback.suspect(&database).await;
                }
            }
        }
        let committed =
            incident.transactions.iter().filter(|transaction| transaction.state == TransactionState::Committed);
        let (mut xids, mut first): (Vec<Xid>, Option<Timestamp>) = (Vec::new(), None);
        for transaction in committed {
            xids.extend(transaction.xid);
            let at = transaction.time.map(|time| time.timestamp());
            first = match (first, at) {
                (Some(first), Some(at)) => Some(first.min(at)),
                (first, at) => first.or(at),
            };
        }
        let Some(first) = first else { return };
        let mut wanted: BTreeMap<String, Vec<Wanted>> = BTreeMap::new();
        for table in &incident.tables {
            let Some(relation) = &table.relation else { continue };
            let rows = table.deleted + table.updated;
            let is_readable = relation.kind == RelationKind::Table && !table.dropped && !relation.name.is_empty();
            if rows == 0 || !is_readable || relation.database_name.is_empty() || !done.saved.insert(table.name.clone())
            {
                continue;
            }
            wanted.entry(relation.database_name.clone()).or_default().push(Wanted {
                schema: relation.schema.clone(),
                table: relation.name.clone(),
                xids: xids.clone(),
                rows: Some(rows),
            });
        }
        for (database, tables) in wanted {
            let evidence = self.flashback.save(&incident.id, &database, &tables, Some(first)).await;
            if let Err(error) = self.write_down(&incident.id, evidence).await {
                tracing::warn!(incident = incident.id, "failed to note which rows were saved: {}", Chain(&error));
            }
        }
    }

    /// Notes in the incident what was saved, and why the rest was not.
    async fn write_down(&self, id: &str, evidence: Vec<Evidence>) -> Result<(), RepoError> {
        if evidence.is_empty() {
            return Ok(());
        }
        self.repo
            .revise_incident::<RepoError>(id, |newest| {
                let Some(mut next) = newest else { return Ok(None) };
                let before = (next.evidence.len(), next.notes.len());
                for one in &evidence {
                    if one.key.is_empty() {
                        let why = one.note.as_deref().unwrap_or("nobody knows why");
                        let note = format!("The rows of {} were not saved: {why}.", one.table);
                        if !next.notes.contains(&note) && next.notes.len() < NOTES_MAX {
                            next.notes.push(note);
                        }
                    } else if !next.evidence.iter().any(|there| there.key == one.key) {
                        next.evidence.push(one.clone());
                    }
                }
                if before == (next.evidence.len(), next.notes.len()) {
                    return Ok(None);
                }
                next.updated_at = Timestamp::now();
                Ok(Some(next))
            })
            .await
            .map(drop)
    }
}

/// Notes of an incident, whoever wrote them.
const NOTES_MAX: usize = 256;
