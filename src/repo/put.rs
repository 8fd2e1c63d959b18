//! Write once: the same key with the same content is success, with other content a conflict.

use bytes::Bytes;

use super::frame;
use super::store::{Created, StoreError};
use super::{RepoError, Repository};

/// How often an object is looked at that comes and goes: its writer and a deletion may cross once, hardly more often.
const READ_BACK_TRIES: u32 = 3;

/// How an object that is there already is compared with the one that should be put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameContent {
    /// Byte for byte.
    Verbatim,
    /// By what the zstd frames hold: two writers may compress differently.
    Compressed {
        /// The most bytes that the content can have.
        limit: usize,
    },
}

impl Repository {
    /// Makes the object `key`, which is never changed again. `Exists` means that it was there already with the same
    /// content: an earlier try of ours, or another writer with the same WAL.
    ///
    /// Up to the larger of both contents is held in memory if the key exists.
    ///
    /// # Errors
    /// [`RepoError::Conflict`] if the key holds something else; [`RepoError::Damaged`] if what it holds cannot be
    /// read; of the store.
    pub async fn put_once(&self, key: &str, stored: Bytes, same: SameContent) -> Result<Created, RepoError> {
        for _ in 0..READ_BACK_TRIES {
            if self.store().create(key, stored.clone()).await? == Created::New {
                return Ok(Created::New);
            }
            let there = match self.store().read(key, None).await {
                Ok(there) => there,
                Err(StoreError::NotFound { .. }) => continue, // somebody removed it between our two questions
                Err(error) => return Err(error.into()),
            };
            return match same_content(key, there, stored, same).await? {
                true => Ok(Created::Exists),
                false => Err(RepoError::Conflict { key: key.to_owned() }),
            };
        }
        Err(RepoError::Store(StoreError::Unavailable {
            op: "read back",
            key: key.to_owned(),
            source: "the store says that it exists, and that it does not".into(),
            retry_after: None,
        }))
    }
}

async fn same_content(key: &str, there: Bytes, ours: Bytes, same: SameContent) -> Result<bool, RepoError> {
    if there == ours {
        return Ok(true);
    }
    let SameContent::Compressed { limit } = same else { return Ok(false) };
    let compared = tokio::task::spawn_blocking(move || {
        let ours = frame::decompress(&ours, limit)?;
        // More content than ours is other content, so ours is the limit.
        match frame::decompress(&there, ours.len()) {
            Ok(there) => Ok(there == ours),
            Err(frame::FrameError::TooLarge { .. }) => Ok(false),
            Err(damaged) => Err(damaged),
        }
    });
    compared
        .await
        .expect("comparing does not panic")
        .map_err(|problem| RepoError::Damaged { key: key.to_owned(), problem: problem.to_string() })
}

#[cfg(test)]
mod tests {
    use super::super::tests::repository;
    use super::*;

    #[tokio::test]
    async fn the_same_content_twice_is_success_and_other_content_a_conflict() {
        let repo = repository();
        let same = SameContent::Compressed { limit: 1 << 20 };
        let put = |content: &'static [u8], level| repo.put_once("main/a", frame::compress(content, level).into(), same);
        assert_eq!(put(b"content content content content", 1).await.unwrap(), Created::New);
        assert_eq!(put(b"content content content content", 19).await.unwrap(), Created::Exists);
        for other in [&b"other"[..], b"content content content contenT", b"content content content content and more"] {
            let error = put(other, 1).await.unwrap_err();
            assert!(matches!(&error, RepoError::Conflict { key } if key == "main/a"), "{error:?}");
            assert!(error.hint().unwrap().contains("--cluster") && !error.is_transient());
        }
        repo.store().replace("main/a", "rubbish".into()).await.unwrap();
        assert!(matches!(put(b"content", 1).await, Err(RepoError::Damaged { .. })));
        assert!(matches!(
            repo.put_once("main/a", "other".into(), SameContent::Verbatim).await,
            Err(RepoError::Conflict { .. })
        ));
    }
}
