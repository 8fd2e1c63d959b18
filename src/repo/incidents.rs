//! Incidents in the repository: each revision an object of its own, `incidents/<id>/<revision>.json`, written once.
//!
//! Several may write to one incident: the agent that finds more of it, somebody who acknowledges it. The revision's number
//! is the referee: of two writers of the same number one is told, reads what the other wrote, and writes the next.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::layout::check_name;
use super::store::{Created, StoreError};
use super::{RepoError, Repository, SMALL_READS_MAX};
use crate::detect::Incident;
use crate::detect::incident::FORMAT;

/// Writers that wrote before us, one after the other, before we give up.
const TRIES_MAX: u32 = 32;

/// The incidents that are there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Incidents {
    /// The newest revision of each, in the order of their ids: by timeline and place.
    pub incidents: Vec<Incident>,
    /// Those that cannot be read: the key and the problem.
    pub damaged: Vec<(String, String)>,
}

impl Repository {
    /// The newest revision of all incidents, or of the `newest` ones by id.
    ///
    /// # Errors
    /// Of the store. What cannot be read is named in the answer.
    pub async fn incidents(&self, newest: Option<usize>) -> Result<Incidents, RepoError> {
        let mut ids = self.incident_ids().await?;
        if let Some(newest) = newest {
            ids.drain(..ids.len().saturating_sub(newest));
        }
        let reads = stream::iter(ids).map(|id| async move { self.incident(&id).await });
        let mut found = Incidents::default();
        let mut reads = reads.buffered(SMALL_READS_MAX);
        while let Some(read) = reads.next().await {
            match read {
                Ok(incident) => found.incidents.extend(incident),
                Err(RepoError::Damaged { key, problem }) => found.damaged.push((key, problem)),
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }

    /// The ids of all incidents, sorted.
    ///
    /// # Errors
    /// Of the store.
    pub async fn incident_ids(&self) -> Result<Vec<String>, RepoError> {
        let prefix = self.layout().incidents_folder();
        let (_, folders) = self.children(prefix.clone()).await?;
        let ids = folders.iter().filter_map(|folder| folder.strip_prefix(&prefix)?.strip_suffix('/'));
        Ok(ids.filter(|id| check_name(id).is_ok()).map(str::to_owned).collect())
    }

    /// The newest revision of an incident; `None` if there is none of that id.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn incident(&self, id: &str) -> Result<Option<Incident>, RepoError> {
        match self.incident_revisions(id).await?.last() {
            Some(revision) => self.incident_revision(id, *revision).await,
            None => Ok(None),
        }
    }

    /// The numbers of an incident's revisions, rising; empty if there is none of that id.
    ///
    /// # Errors
    /// Of the store.
    pub async fn incident_revisions(&self, id: &str) -> Result<Vec<u32>, RepoError> {
        if check_name(id).is_err() {
            return Ok(Vec::new());
        }
        let prefix = format!("{}{id}/", self.layout().incidents_folder());
        let (objects, _) = self.children(prefix.clone()).await?;
        let number = |key: &str| -> Option<u32> {
            let digits = key.strip_prefix(&prefix)?.strip_suffix(".json")?;
            (digits.len() == 8).then(|| digits.parse().ok()).flatten().filter(|number| *number > 0)
        };
        let mut numbers: Vec<u32> = objects.iter().filter_map(|object| number(&object.key)).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// A revision of an incident; `None` if it is not there.
    ///
    /// # Errors
    /// [`RepoError::Damaged`] if it cannot be read; of the store.
    pub async fn incident_revision(&self, id: &str, revision: u32) -> Result<Option<Incident>, RepoError> {
        let key = self.layout().incident(id, revision);
        let Some(json) = self.read_small(&key).await? else { return Ok(None) };
        let incident: Incident = match serde_json::from_slice(&json) {
            Ok(incident) => incident,
            Err(error) => return Err(RepoError::Damaged { key, problem: error.to_string() }),
        };
        if incident.format > FORMAT {
            return Err(RepoError::UnknownFormat { key, format: incident.format });
        }
        if incident.id != id || incident.revision != revision {
            let problem = format!("it says that it is revision {} of {}", incident.revision, incident.id);
            return Err(RepoError::Damaged { key, problem });
        }
        Ok(Some(incident))
    }

    /// Writes the next revision of an incident. `change` is given the newest one, `None` if there is none yet, and answers
    /// what should be there instead, or `None` to leave it; it is asked again each time that somebody else was faster.
    /// Gives what is there now. The revision's number is set here.
    ///
    /// # Errors
    /// What `change` answers; as [`Repository::incident`]; [`StoreError::Unavailable`] if others were faster too often.
    pub async fn revise_incident<E: From<RepoError>>(
        &self,
        id: &str,
        change: impl FnMut(Option<Incident>) -> Result<Option<Incident>, E>,
    ) -> Result<Option<Incident>, E> {
        let newest = self.incident(id).await?;
        self.revise_incident_from(newest, id, change).await
    }

    /// As [`Repository::revise_incident`], beginning with what the caller takes for the newest revision. If that is right,
    /// which it is when nobody else wrote, a single request does.
    async fn revise_incident_from<E: From<RepoError>>(
        &self,
        mut newest: Option<Incident>,
        id: &str,
        mut change: impl FnMut(Option<Incident>) -> Result<Option<Incident>, E>,
    ) -> Result<Option<Incident>, E> {
        for _ in 0..TRIES_MAX {
            let revision = newest.as_ref().map_or(1, |newest| newest.revision.saturating_add(1));
            let Some(next) = change(newest.clone())? else { return Ok(newest) };
            let next = Incident { id: id.to_owned(), revision, ..next };
            let key = self.layout().incident(id, revision);
            let json = written(&next);
            match self.store().create(&key, json.clone().into()).await.map_err(RepoError::from)? {
                Created::New => return Ok(Some(next)),
                // A try of ours whose answer was lost.
                Created::Exists if self.read_small(&key).await?.is_some_and(|there| there == json) => {
                    return Ok(Some(next));
                }
                Created::Exists => newest = self.incident(id).await?,
            }
        }
        Err(RepoError::Store(StoreError::Unavailable {
            op: "revise incident",
            key: self.layout().incident(id, 0),
            source: "others write to it all the time".into(),
            retry_after: None,
        })
        .into())
    }

    /// Writes what the detector knows of an incident as its next revision, keeping what others wrote into it meanwhile.
    /// Nothing is written if nothing is new. Gives what is there now.
    ///
    /// # Errors
    /// As [`Repository::revise_incident`].
    pub async fn put_incident(&self, incident: &Incident) -> Result<Incident, RepoError> {
        self.put_incident_after(self.incident(&incident.id).await?, incident).await
    }

    /// As [`Repository::put_incident`] for a caller that remembers the newest revision, or takes the incident for new: a
    /// single request does, and people hear of it that much sooner. If others wrote meanwhile, it costs time, nothing else.
    ///
    /// # Errors
    /// As [`Repository::revise_incident`].
    pub async fn put_incident_after(
        &self,
        newest: Option<Incident>,
        incident: &Incident,
    ) -> Result<Incident, RepoError> {
        let change = |newest: Option<Incident>| -> Result<_, RepoError> {
            let Some(newest) = newest else { return Ok(Some(incident.clone())) };
            let mut next = incident.clone();
            next.take_answers(&newest);
            let same = Incident { revision: newest.revision, updated_at: newest.updated_at, ..next.clone() };
            Ok((same != newest).then_some(next))
        };
        let there = self.revise_incident_from(newest, &incident.id, change).await?;
        Ok(there.unwrap_or_else(|| incident.clone()))
    }

    /// Removes an incident with all that lies beside it: what was saved of it, what was told.
    ///
    /// # Errors
    /// Of the store.
    pub async fn remove_incident(&self, id: &str) -> Result<(), RepoError> {
        if check_name(id).is_err() {
            return Ok(());
        }
        let keys: Vec<_> =
            self.objects(format!("{}{id}/", self.layout().incidents_folder()), None).try_collect().await?;
        for object in keys {
            self.store().delete(&object.key).await?;
        }
        Ok(())
    }
}

fn written(incident: &Incident) -> Vec<u8> {
    let mut json = serde_json::to_vec_pretty(incident).expect("an incident becomes JSON");
    json.push(b'\n');
    json
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::super::tests::repository;
    use super::*;
    use crate::detect::State;
    use crate::detect::incident::{AnswerError, Signature, incident_id};
    use crate::pg::{Lsn, TimelineId};

    fn incident(lsn: u64) -> Incident {
        let id = incident_id(TimelineId::FIRST, Lsn::new(lsn));
        Incident { state: State::Committed, ..Incident::new(id, TimelineId::FIRST, Timestamp::UNIX_EPOCH) }
    }

    #[derive(Debug, thiserror::Error)]
    enum Error {
        #[error(transparent)]
        Repo(#[from] RepoError),
        #[error(transparent)]
        Answer(#[from] AnswerError),
    }

    fn signed(by: &str) -> Signature {
        Signature { by: by.to_owned(), at: Timestamp::UNIX_EPOCH, note: None }
    }

    #[tokio::test]
    async fn an_incident_is_there_once_however_often_it_is_put() {
        let repo = repository();
        let first = repo.put_incident(&incident(7)).await.unwrap();
        assert_eq!(repo.put_incident(&incident(7)).await.unwrap(), first);
        assert_eq!(repo.incident_revisions(&first.id).await.unwrap(), [1]);
        let found = repo.put_incident(&Incident { title: "more".into(), ..first.clone() }).await.unwrap();
        assert_eq!((found.revision, repo.incident(&first.id).await.unwrap()), (2, Some(found)));
        assert_eq!(repo.incident_revision(&first.id, 1).await.unwrap(), Some(first));
    }

    #[tokio::test]
    async fn whoever_remembers_a_revision_that_is_not_the_newest_any_more_overwrites_nothing() {
        let repo = repository();
        let first = repo.put_incident_after(None, &incident(7)).await.unwrap();
        assert_eq!(repo.put_incident_after(None, &incident(7)).await.unwrap(), first);
        let acknowledge = |newest: Option<Incident>| {
            let mut incident = newest.unwrap();
            incident.acknowledge(signed("ada"))?;
            Ok::<_, Error>(Some(incident))
        };
        repo.revise_incident(&first.id, acknowledge).await.unwrap();
        for (title, remembered, revision) in [("more", Some(first.clone()), 3), ("most", None, 4)] {
            let found = Incident { title: title.into(), ..incident(7) };
            let merged = repo.put_incident_after(remembered, &found).await.unwrap();
            assert_eq!((merged.revision, merged.state, merged.title.as_str()), (revision, State::Acknowledged, title));
        }
        assert_eq!(repo.incident_revisions(&first.id).await.unwrap(), [1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn incidents_are_listed_in_wal_order_and_the_newest_can_be_had_alone() {
        let repo = repository();
        for lsn in [0x30, 0x1_0000_0000, 0x20] {
            repo.put_incident(&incident(lsn)).await.unwrap();
        }
        let ids = |found: Incidents| found.incidents.into_iter().map(|i| i.id).collect::<Vec<_>>();
        let expected = [0x20, 0x30, 0x1_0000_0000].map(|lsn| incident(lsn).id);
        assert_eq!(ids(repo.incidents(None).await.unwrap()), expected);
        assert_eq!(ids(repo.incidents(Some(1)).await.unwrap()), expected[2..]);
        repo.remove_incident(&expected[0]).await.unwrap();
        assert_eq!(ids(repo.incidents(None).await.unwrap()), expected[1..]);
        assert_eq!(repo.incident("../lease.json").await.unwrap(), None);
    }

    #[tokio::test]
    async fn an_acknowledgement_and_a_new_finding_do_not_overwrite_each_other() {
        let repo = repository();
        let id = repo.put_incident(&incident(7)).await.unwrap().id;
        let answer = |newest: Option<Incident>| {
            let mut incident = newest.unwrap();
            incident.acknowledge(signed("ada"))?;
            Ok::<_, Error>(Some(incident))
        };
        repo.revise_incident(&id, answer).await.unwrap();
        let merged = repo.put_incident(&Incident { title: "18 tables".into(), ..incident(7) }).await.unwrap();
        assert_eq!((merged.revision, merged.state, merged.title.as_str()), (3, State::Acknowledged, "18 tables"));
        let resolve = |newest: Option<Incident>| {
            let mut incident = newest.unwrap();
            incident.resolve(signed("ada"))?;
            Ok::<_, Error>(Some(incident))
        };
        repo.revise_incident(&id, resolve).await.unwrap();
        let error = repo.revise_incident(&id, answer).await.unwrap_err();
        assert!(matches!(error, Error::Answer(AnswerError::Resolved { .. })), "{error}");
    }

    #[tokio::test]
    async fn whoever_is_slower_sees_what_the_faster_one_wrote() {
        let repo = repository();
        let id = repo.put_incident(&incident(7)).await.unwrap().id;
        let mut asked = 0;
        let faster = Incident { revision: 2, title: "faster".into(), ..incident(7) };
        let key = repo.layout().incident(&id, 2);
        let json = serde_json::to_vec(&faster).unwrap();
        let store = repo.store();
        let written = repo
            .revise_incident(&id, |newest| {
                asked += 1;
                if asked == 1 {
                    // Between our reading and our writing.
                    futures_util::FutureExt::now_or_never(store.create(&key, json.clone().into())).unwrap().unwrap();
                }
                let newest = newest.unwrap();
                let title = format!("{}, then slower", newest.title);
                Ok::<_, RepoError>(Some(Incident { title, ..newest }))
            })
            .await
            .unwrap()
            .unwrap();
        assert_eq!((asked, written.revision, written.title.as_str()), (2, 3, "faster, then slower"));
    }

    #[tokio::test]
    async fn what_cannot_be_read_is_named_and_hinders_no_other() {
        let repo = repository();
        let good = repo.put_incident(&incident(7)).await.unwrap();
        let wrong = repo.layout().incident(&incident(9).id, 1);
        repo.store().create(&wrong, serde_json::to_vec(&incident(8)).unwrap().into()).await.unwrap();
        let broken = repo.layout().incident(&incident(10).id, 1);
        repo.store().create(&broken, "{".into()).await.unwrap();
        let found = repo.incidents(None).await.unwrap();
        assert_eq!(found.incidents, [good]);
        let keys: Vec<_> = found.damaged.into_iter().map(|(key, _)| key).collect();
        assert_eq!(keys, [wrong, broken]);
    }
}
