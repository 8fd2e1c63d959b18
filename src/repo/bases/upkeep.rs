//! Looking after bases and change logs: what is no longer to be kept goes, and what is there is read and proved.

use std::collections::BTreeSet;

use futures_util::TryStreamExt as _;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Manifest, PART_BYTES, PART_BYTES_MAX, SCHEMA_BYTES_MAX};
use crate::pg::{Lsn, Oid};
use crate::progress::Progress;
use crate::repo::changes::walk::{Broken, follows};
use crate::repo::changes::{ChangesName, Header, Messages};
use crate::repo::retention::{Expired, Keep};
use crate::repo::{RepoError, Repository};

/// Problems that are named.
const PROBLEMS_MAX: usize = 1_000;

/// The beginning of a base that was not finished is left alone for so long: it may be in work.
const UNFINISHED_AGE_MIN: jiff::SignedDuration = jiff::SignedDuration::from_hours(24);

/// What would go of one database.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ExpireBases {
    /// The database's OID.
    pub database: Oid,
    /// Its name, as its newest base has it.
    pub database_name: String,
    /// Labels of the bases that stay, oldest first.
    pub kept: Vec<String>,
    /// Labels of the bases that go, oldest first.
    pub bases: Vec<String>,
    /// Bases that were begun and not finished, and go.
    pub unfinished: Vec<String>,
    /// Changes from before this go; `None` if all stay.
    pub changes_before: Option<Lsn>,
    /// Objects of the change log that go.
    pub change_objects: u64,
    /// Stored bytes of all that goes.
    pub bytes: u64,
    #[serde(skip)]
    keys: Vec<(String, u64)>,
}

impl ExpireBases {
    /// True if nothing goes.
    pub const fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }
}

/// The first base that stays: with both limits, whatever either keeps; the newest always.
fn first_kept(bases: &[Manifest], keep: &Keep, now: Timestamp) -> usize {
    let newest = bases.len().saturating_sub(1);
    let by_number = keep.keep_backups.map(|number| bases.len().saturating_sub(number.max(1) as usize));
    let by_age = keep.keep_for.map(|span| {
        let since = jiff::SignedDuration::try_from(span).ok().and_then(|span| now.checked_sub(span).ok());
        // Moments of all that time are reached from the last base before it.
        let since = since.unwrap_or(Timestamp::MIN);
        bases.iter().rposition(|base| base.time <= since).unwrap_or(0)
    });
    by_number.into_iter().chain(by_age).min().unwrap_or(0).min(newest)
}

impl Repository {
    /// What would go of bases and change logs, database by database; nothing goes that a base which stays is read with.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if a manifest, or the change at which a base begins, cannot be read: nothing goes then; of the
    /// store.
    pub async fn plan_expire_bases(&self, keep: &Keep, now: Timestamp) -> Result<Vec<ExpireBases>, RepoError> {
        let mut plans = Vec::new();
        for database in self.changed_databases().await? {
            let bases = self.bases(database).await?;
            let Some(newest) = bases.last() else { continue }; // without a base nobody knows what will be needed
            let first = first_kept(&bases, keep, now);
            let (gone, kept) = bases.split_at(first);
            let mut plan = ExpireBases {
                database,
                database_name: newest.database_name.clone(),
                kept: kept.iter().map(|base| base.label.clone()).collect(),
                bases: gone.iter().map(|base| base.label.clone()).collect(),
                unfinished: Vec::new(),
                changes_before: None,
                change_objects: 0,
                bytes: 0,
                keys: Vec::new(),
            };
            // Manifests first: what is half deleted must not look like a base.
            plan.keys.extend(gone.iter().map(|base| (self.layout().base_manifest(database, &base.label), 0)));
            for base in gone {
                self.add_folder(&mut plan, database, &base.label).await?;
            }
            self.add_unfinished(&mut plan, database, now).await?;
            if let Some(oldest) = kept.first().filter(|_| !gone.is_empty()) {
                // Of changes the base needs those from where the oldest transaction began that was open then.
                let chain = self.changes_since(database, oldest.consistent).await?;
                if let Some(needed) = chain.names().first() {
                    self.add_changes_before(&mut plan, database, *needed).await?;
                }
            }
            plans.push(plan);
        }
        Ok(plans)
    }

    async fn add_folder(&self, plan: &mut ExpireBases, database: Oid, label: &str) -> Result<(), RepoError> {
        let manifest = self.layout().base_manifest(database, label);
        let mut objects = std::pin::pin!(self.objects(self.layout().base_folder(database, label), None));
        while let Some(object) = objects.try_next().await? {
            plan.bytes += object.size;
            if object.key != manifest {
                plan.keys.push((object.key, object.size));
            }
        }
        Ok(())
    }

    async fn add_unfinished(&self, plan: &mut ExpireBases, database: Oid, now: Timestamp) -> Result<(), RepoError> {
        let folder = self.layout().bases_folder(database);
        let (_, labels) = self.children(folder.clone()).await?;
        let whole: BTreeSet<&String> = plan.kept.iter().chain(&plan.bases).collect();
        let labels: Vec<String> = labels
            .iter()
            .filter_map(|name| Some(name.strip_prefix(&folder)?.strip_suffix('/')?.to_owned()))
            .filter(|label| !whole.contains(label))
            .collect();
        for label in labels {
            let objects: Vec<_> = self.objects(self.layout().base_folder(database, &label), None).try_collect().await?;
            let is_old =
                |object: &crate::repo::store::ObjectInfo| now.duration_since(object.modified) > UNFINISHED_AGE_MIN;
            if !objects.is_empty() && objects.iter().all(is_old) {
                plan.bytes += objects.iter().map(|object| object.size).sum::<u64>();
                plan.keys.extend(objects.into_iter().map(|object| (object.key, object.size)));
                plan.unfinished.push(label);
            }
        }
        Ok(())
    }

    async fn add_changes_before(
        &self,
        plan: &mut ExpireBases,
        database: Oid,
        needed: ChangesName,
    ) -> Result<(), RepoError> {
        let needed_key = self.layout().changes(&needed);
        let mut objects = std::pin::pin!(self.objects(self.layout().changes_folder(database), None));
        while let Some(object) = objects.try_next().await? {
            if object.key >= needed_key {
                break; // keys sort as places do
            }
            // What begins before and goes on behind is held by nothing else once its parts are gone.
            let name = self.changes_name(&object.key);
            if name.and_then(|name| name.merged_to).is_some_and(|to| to > needed.from) {
                continue;
            }
            plan.change_objects += 1;
            plan.bytes += object.size;
            plan.changes_before = Some(needed.from);
            plan.keys.push((object.key, object.size));
        }
        Ok(())
    }

    /// Deletes what the plans say. Stops between two objects when `cancel` is cancelled; the next plan goes on.
    ///
    /// # Errors
    /// Of the store; what was deleted stays deleted.
    pub async fn expire_bases(
        &self,
        plans: &[ExpireBases],
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<Expired, RepoError> {
        let mut expired = Expired::default();
        progress.begin("delete", Some(plans.iter().map(|plan| plan.bytes).sum()));
        for plan in plans {
            self.delete_all(plan.keys.clone(), &mut expired, progress, cancel).await?;
        }
        progress.end();
        Ok(expired)
    }
}

/// What was read of bases and change logs, and what is wrong with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct VerifiedBases {
    /// False if it was stopped before its end.
    pub complete: bool,
    /// Databases.
    pub databases: u64,
    /// Bases.
    pub bases: u64,
    /// Objects of these, manifests not counted.
    pub base_objects: u64,
    /// Objects of the change log.
    pub change_objects: u64,
    /// Bytes of what was read, unpacked.
    pub bytes: u64,
    /// What is wrong, the first thousand.
    pub problems: Vec<ProblemOfBases>,
    /// How many problems there are.
    pub problems_total: u64,
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ProblemOfBases {
    /// The object, or where one is missing.
    pub place: String,
    /// What is wrong.
    pub problem: String,
    /// What cannot be rebuilt because of it.
    pub means: String,
}

impl VerifiedBases {
    fn add(&mut self, place: String, problem: String, means: String) {
        self.problems_total += 1;
        if self.problems.len() < PROBLEMS_MAX {
            self.problems.push(ProblemOfBases { place, problem, means });
        }
    }
}

impl Repository {
    /// Reads every base and every object of the change logs, and proves them whole: each unpacks, parts have the rows that
    /// their manifest says, messages can be told apart, and one object follows the other. A hole that is recorded as a gap
    /// is no problem.
    ///
    /// # Errors
    /// Of the store; what is damaged or missing is no error, but told.
    pub async fn verify_bases(
        &self,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<VerifiedBases, RepoError> {
        let mut found = VerifiedBases::default();
        for database in self.changed_databases().await? {
            found.databases += 1;
            progress.begin("read bases", None);
            let bases = self.bases(database).await?;
            for base in &bases {
                found.bases += 1;
                progress.note(&format!("base {}", base.label));
                self.verify_base(base, &mut found, progress, cancel).await?;
            }
            progress.end();
            progress.begin("read changes", None);
            self.verify_changes(database, &bases, &mut found, progress, cancel).await?;
            progress.end();
        }
        found.complete = !cancel.is_cancelled();
        Ok(found)
    }

    async fn verify_base(
        &self,
        base: &Manifest,
        found: &mut VerifiedBases,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let (database, label, layout) = (base.database, &base.label, self.layout());
        let schema = ["pre-data", "post-data"].map(|section| (layout.base_schema(database, label, section), None));
        let rows = base.tables.iter().flat_map(|table| {
            let parts = table.parts.iter().enumerate();
            parts.map(|(place, rows)| (layout.base_rows(database, label, table.oid, place + 1), Some(*rows)))
        });
        for (key, rows) in schema.into_iter().chain(rows) {
            if cancel.is_cancelled() {
                return Ok(());
            }
            found.base_objects += 1;
            let limit = if rows.is_some() { PART_BYTES_MAX + PART_BYTES } else { SCHEMA_BYTES_MAX };
            let problem = match self.base_object(key.clone(), limit).await {
                Ok(content) => {
                    found.bytes += content.len() as u64;
                    progress.advance(content.len() as u64);
                    let there = content.iter().filter(|byte| **byte == b'\n').count() as u64;
                    rows.filter(|rows| *rows != there).map(|rows| format!("holds {there} rows and should hold {rows}"))
                }
                Err(RepoError::Damaged { problem, .. }) => Some(problem),
                Err(error) if error.is_not_found() => Some("is missing".to_owned()),
                Err(error) => return Err(error),
            };
            if let Some(problem) = problem {
                found.add(key, problem, format!("base {label} cannot be rebuilt"));
            }
        }
        Ok(())
    }

    async fn verify_changes(
        &self,
        database: Oid,
        bases: &[Manifest],
        found: &mut VerifiedBases,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<(), RepoError> {
        let gaps = self.gaps().await?;
        let chain = self.changes_since(database, Lsn::ZERO).await?;
        let begin = chain.names().first().map_or(Lsn::MAX, |first| first.from);
        for base in bases.iter().filter(|base| base.consistent < begin) {
            let place = format!("changes from {} to {begin}", base.consistent);
            found.add(
                place,
                "are missing".to_owned(),
                format!("base {} can be rebuilt alone, and nothing behind it", base.label),
            );
        }
        let mut before: Option<Header> = None;
        let mut objects = std::pin::pin!(chain.read(self));
        while let Some((name, read)) = objects.try_next().await? {
            if cancel.is_cancelled() {
                return Ok(());
            }
            found.change_objects += 1;
            let key = self.layout().changes(&name);
            let means = |from: Lsn, to: Lsn| {
                format!("bases from before {from} reach no moment behind it; one behind {to} does")
            };
            if let Err(Broken { after, .. }) = follows(before.as_ref(), name) {
                let is_known = gaps.iter().any(|gap| gap.from == after && gap.to == name.from);
                if !is_known {
                    let place = format!("changes from {after} to {}", name.from);
                    found.add(place, "are missing".to_owned(), means(after, name.from));
                }
            }
            let object = match read {
                Ok(object) => object,
                Err(error) => {
                    let problem = match &error {
                        RepoError::Damaged { problem, .. } => problem.clone(),
                        _ => "is missing".to_owned(),
                    };
                    let from = before.as_ref().map_or(name.from, |before| before.to);
                    found.add(key, problem, means(from, from));
                    // What follows is compared with nothing: this is told already.
                    before = None;
                    continue;
                }
            };
            found.bytes += object.messages.len() as u64;
            progress.advance(object.messages.len() as u64);
            if let Some(Err(error)) = Messages::new(&object.messages).find(Result::is_err) {
                found.add(key, error.to_string(), means(name.from, object.header.to));
            }
            before = Some(object.header);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::bases::Locale;
    use std::collections::BTreeMap;

    use crate::capture::logical::Definitions;
    use crate::pg::{ServerVersion, TimelineId};

    fn base(hour: i64) -> Manifest {
        Manifest {
            format: 1,
            label: format!("hour-{hour}"),
            database: Oid(5),
            database_name: "shop".into(),
            locale: Locale {
                encoding: "UTF8".into(),
                collate: "C".into(),
                ctype: "C".into(),
                provider: "c".into(),
                locale: None,
            },
            server_version: ServerVersion::new(150_000),
            timeline: TimelineId::FIRST,
            consistent: Lsn::new(1_000 * u64::try_from(hour).unwrap()),
            time: Timestamp::from_second(3_600 * hour).unwrap(),
            ended_at: Timestamp::from_second(3_600 * hour).unwrap(),
            tables: Vec::new(),
            sequences: Vec::new(),
            roles: Vec::new(),
            definitions: Definitions { at: Timestamp::UNIX_EPOCH, tables: BTreeMap::new(), others: BTreeMap::new() },
            extensions: Vec::new(),
            left_out: Vec::new(),
            content_bytes: 0,
            stored_bytes: 0,
        }
    }

    #[tokio::test]
    async fn a_merged_object_that_goes_on_behind_what_is_needed_stays() {
        let repo = crate::repo::tests::repository();
        let one = |from: u64| ChangesName { database: Oid(5), from: Lsn::new(from), part: 0, merged_to: None };
        let merged = |from, to: u64| ChangesName { merged_to: Some(Lsn::new(to)), ..one(from) };
        let names = [merged(100, 300), one(100), one(200), merged(300, 500), one(300), one(400), one(500)];
        for name in &names {
            repo.store().create(&repo.layout().changes(name), "x".into()).await.unwrap();
        }
        let gone = async |needed: ChangesName| {
            let mut plan = ExpireBases {
                database: Oid(5),
                database_name: "shop".into(),
                kept: Vec::new(),
                bases: Vec::new(),
                unfinished: Vec::new(),
                changes_before: None,
                change_objects: 0,
                bytes: 0,
                keys: Vec::new(),
            };
            repo.add_changes_before(&mut plan, Oid(5), needed).await.unwrap();
            plan.keys.into_iter().map(|(key, _)| repo.changes_name(&key).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(gone(merged(300, 500)).await, names[..3]);
        // Its parts stand there still, and one of them is what is needed first.
        assert_eq!(gone(one(400)).await, [merged(100, 300), one(100), one(200), one(300)]);
        assert_eq!(gone(one(500)).await, names[..6]);
    }

    #[test]
    fn what_either_limit_keeps_stays_and_the_newest_always() {
        let bases: Vec<Manifest> = (1..=5).map(base).collect();
        let now = Timestamp::from_second(3_600 * 6).unwrap();
        let hours = |hours: u64| Some(std::time::Duration::from_secs(3_600 * hours));
        let first = |keep_backups, keep_for| first_kept(&bases, &Keep { keep_backups, keep_for }, now);
        assert_eq!(first(None, None), 0, "nobody said what may go");
        assert_eq!(first(Some(2), None), 3);
        assert_eq!(first(Some(0), None), 4, "the newest stays");
        assert_eq!(first(Some(9), None), 0);
        assert_eq!(first(None, hours(2)), 3, "what is two hours old is reached from the base of just then");
        assert_eq!(first(None, hours(100)), 0);
        assert_eq!(first(None, hours(0)), 4);
        assert_eq!(first(Some(1), hours(3)), 2);
        assert_eq!(first_kept(&[], &Keep::default(), now), 0);
    }
}
