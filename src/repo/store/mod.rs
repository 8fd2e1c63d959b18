//! Where objects are kept: one small trait, and its three homes.
//!
//! Every object fits in memory: there are no streams and no resumable uploads, and a retry is the same call again.

use std::fmt;
use std::io::ErrorKind;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

mod local;
mod memory;
mod retrying;
mod s3;

pub use local::LocalStore;
pub use memory::MemoryStore;
pub use retrying::Retrying;
pub use s3::{Checksum, Encryption, S3Config, S3ConfigError, S3Failure, S3Store};

/// A place for objects. Keys are relative (`main/wal/00000001/...`), in `[A-Za-z0-9._/-]`, without empty, `.` or `..` parts.
///
/// Implementations retry nothing that they cannot repeat, time out rather than hang, and may be called concurrently.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// Makes an object that must not exist yet, durably and whole or not at all. Where the store cannot refuse an
    /// existing key by itself (see [`Store::enforces_create_once`]), this looks before it puts.
    ///
    /// An existing object is no error here: the caller decides whether it is the same one.
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError>;

    /// Makes or replaces an object. Only for the lease; everything else is written once.
    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError>;

    /// Reads an object, or a range of it. A range that reaches past the end gives what is there.
    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError>;

    /// One page of objects below a prefix, in byte order of their keys. An absent folder is an empty page; an absent store
    /// is [`StoreError::Unavailable`], where that can be told.
    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError>;

    /// Removes an object. One that is not there is no error.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;

    /// True if [`Store::create`] is atomic: of two writers of one key exactly one is told [`Created::New`]. False also
    /// while that is not known yet.
    fn enforces_create_once(&self) -> bool;

    /// Finds out whether [`Store::create`] is atomic, where that is not known by itself, by writing `key` twice. What
    /// is then at `key` is the caller's to remove.
    async fn probe_create_once(&self, _key: &str) -> Result<bool, StoreError> {
        Ok(self.enforces_create_once())
    }

    /// The place as a URL, for people. Holds no secret.
    fn url(&self) -> String;

    /// For a decorator: the store that it calls.
    fn undecorated(&self) -> Option<Arc<dyn Store>> {
        None
    }
}

/// What [`Store::create`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is there now and was not before.
    New,
    /// An object with this key was there already; it is untouched.
    Exists,
}

/// Which objects to list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListRequest {
    /// Only keys that begin with this. Usually ends with `/`.
    pub prefix: String,
    /// Only keys greater than this (the whole key, prefix included): where to begin, or where the last page ended.
    pub after: Option<String>,
    /// Do not go below the next `/`: answer its folders instead of what they hold.
    pub shallow: bool,
}

/// A part of a listing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ListPage {
    /// Objects, sorted by key.
    pub objects: Vec<ObjectInfo>,
    /// For a shallow listing: folders (whole keys, each ending with `/`), sorted.
    pub folders: Vec<String>,
    /// Pass this as `after` to go on; `None` at the end.
    pub next: Option<String>,
}

/// What a listing says of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its whole key.
    pub key: String,
    /// Its length in bytes.
    pub size: u64,
    /// When the store wrote it, by the store's clock.
    pub modified: jiff::Timestamp,
}

/// A store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("`{key}` is not in the repository")]
    NotFound {
        /// The key asked for.
        key: String,
    },
    /// Trouble that may pass: network, throttling, an error of the server, a full disk.
    #[error("{op} `{key}`")]
    Unavailable {
        /// What was tried, a verb.
        op: &'static str,
        /// The key or prefix.
        key: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// How long the store asked us to wait, if it did.
        retry_after: Option<Duration>,
    },
    /// The store refuses, and will refuse again: credentials, permissions, a bucket that does not exist.
    #[error("{op} `{key}`")]
    Refused {
        /// What was tried, a verb.
        op: &'static str,
        /// The key or prefix.
        key: String,
        /// What the store said.
        source: Box<dyn std::error::Error + Send + Sync>,
        /// What the user can do about it.
        hint: String,
    },
}

impl StoreError {
    /// True if the same call may succeed later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// True if the object asked for does not exist.
    pub const fn is_not_found(&self) -> bool {
        matches!(self, Self::NotFound { .. })
    }

    /// What the user can do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::NotFound { .. } => None,
            Self::Refused { hint, .. } => Some(hint.clone()),
            Self::Unavailable { source, .. } => {
                if source.downcast_ref::<S3Failure>().is_some_and(|failure| failure.code.contains("Token")) {
                    return Some("renew the session token of the S3 credentials".to_owned());
                }
                let kind = source.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
                let hint = match kind {
                    Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge) => {
                        "make room where the repository lies; old backups are removed by `walguard expire`"
                    }
                    // Whoever moved it on purpose names the new place; only a place that was given up is made anew.
                    Some(ErrorKind::NotFound) => {
                        "look whether its file system is mounted, or the folder was moved; whatever waits for it goes on \
                         when it is back. A new repository is made by `walguard init`"
                    }
                    Some(_) => "look whether the directory is mounted and healthy; the same command can be repeated",
                    None => {
                        "look whether the store answers (URL or `repository.s3.endpoint`, name service, proxy, \
                         firewall); the same command can be repeated"
                    }
                };
                Some(hint.to_owned())
            }
        }
    }
}

/// The largest object that is read: a segment of 1 GiB that did not compress, and its frame's own bytes.
pub(super) const OBJECT_BYTES_MAX: u64 = (1 << 30) + (16 << 20);

/// An object that walguard cannot have written.
fn too_large(op: &'static str, key: &str) -> StoreError {
    StoreError::Refused {
        op,
        key: key.to_owned(),
        source: "the object is larger than any that walguard writes".into(),
        hint: "something else was put there; look at it with the store's own tools".to_owned(),
    }
}

/// Checks a key before it becomes a path or a request: parts of `[A-Za-z0-9._-]`, none of them empty, `.` or `..`.
pub(super) fn check_key(op: &'static str, key: &str) -> Result<(), StoreError> {
    let good = |part: &str| {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain)
    };
    if key.split('/').all(good) {
        return Ok(());
    }
    Err(StoreError::Refused {
        op,
        key: key.to_owned(),
        source: "not a key that walguard writes".into(),
        hint: "keys have parts of A-Z a-z 0-9 . _ - divided by single slashes".to_owned(),
    })
}
