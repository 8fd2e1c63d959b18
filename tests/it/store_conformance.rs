//! Every store keeps the same promises: one suite over all of them, and over S3 that fails.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio_util::sync::CancellationToken;
use walguard::backoff::RetryPolicy;
use walguard::repo::store::{Created, ListRequest, LocalStore, MemoryStore, Retrying, S3Store, Store, StoreError};

use crate::harness::{Fault, S3};

/// Patient, and quick: the faults of these tests pass at once.
const RETRY: RetryPolicy =
    RetryPolicy { attempts_max: Some(50), pause_min: Duration::from_millis(1), pause_max: Duration::from_millis(20) };

async fn s3_store(s3: &S3) -> S3Store {
    S3Store::connect(&s3.config().s3, "walguard", "it").await.unwrap()
}

fn retrying(store: impl Store + 'static) -> Retrying {
    Retrying::new(Arc::new(store), RETRY, CancellationToken::new())
}

#[tokio::test]
async fn memory_conforms() {
    conforms(&MemoryStore::new()).await;
    creates_once(Arc::new(MemoryStore::new())).await;
}

#[tokio::test]
async fn a_folder_conforms() {
    let folder = tempfile::tempdir().unwrap();
    // Not there yet: the store makes it.
    let store = LocalStore::new(folder.path().join("below/repo"));
    conforms(&store).await;
    creates_once(Arc::new(store)).await;
    let store = LocalStore::new(folder.path().join("marked")).marked_by("mark".to_owned());
    store.create("mark", Bytes::from_static(b"x")).await.unwrap();
    conforms(&store).await;
    creates_once(Arc::new(store)).await;
}

/// Whatever is asked for: a folder in which nothing is, because its file system is not mounted, does not say that.
#[tokio::test]
async fn a_folder_without_its_mark_is_away_and_not_empty() {
    let folder = tempfile::tempdir().unwrap();
    let (place, away) = (folder.path().join("below/repo"), folder.path().join("away"));
    let store = LocalStore::new(&place).marked_by("main/cluster.json".to_owned());
    let key = |number: u32| format!("main/{number}/object");
    let request = ListRequest { prefix: "main/".to_owned(), ..ListRequest::default() };
    let (word, wanted) = (|| Bytes::from_static(b"x"), "the repository is not where it was");
    let refuses = || async {
        let refused = [
            store.create(&key(1), word()).await.map(drop),
            store.create(&key(2), word()).await.map(drop),
            store.replace(&key(1), word()).await,
            store.read(&key(1), None).await.map(drop),
            store.list(&request).await.map(drop),
            store.delete(&key(1)).await,
        ];
        for refused in refused {
            let error = refused.unwrap_err();
            assert!(error.is_transient() && error.hint().unwrap().contains("mounted"), "{error:?}");
            assert!(walguard::backoff::Chain(&error).to_string().contains(wanted), "{error:?}");
        }
        assert!(store.read("main/cluster.json", None).await.unwrap_err().is_not_found());
    };
    refuses().await;
    assert!(!place.exists(), "nothing was made");
    assert_eq!(store.create("main/cluster.json", word()).await.unwrap(), Created::New);
    store.create(&key(1), word()).await.unwrap();
    std::fs::rename(&place, &away).unwrap();
    refuses().await;
    std::fs::create_dir(&place).unwrap();
    refuses().await;
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0, "a mount point stays empty");
    std::fs::remove_dir(&place).unwrap();
    std::fs::rename(&away, &place).unwrap();
    assert_eq!(store.read(&key(1), None).await.unwrap(), word());
    assert_eq!(store.list(&request).await.unwrap().objects.len(), 2);
    assert!(store.read(&key(2), None).await.unwrap_err().is_not_found());
}

#[tokio::test]
async fn s3_conforms() {
    let s3 = S3::start().await;
    let store = s3_store(&s3).await;
    assert!(!store.enforces_create_once(), "not known before the probe");
    assert!(store.probe_create_once("main/probe/1").await.unwrap());
    store.delete("main/probe/1").await.unwrap();
    assert!(store.enforces_create_once());
    conforms(&store).await;
    creates_once(Arc::new(store)).await;
}

#[tokio::test]
async fn s3_conforms_before_it_was_probed() {
    let s3 = S3::start().await;
    conforms(&s3_store(&s3).await).await;
}

#[tokio::test]
async fn s3_that_overwrites_conforms_and_is_found_out() {
    let s3 = S3::start().await;
    s3.ignore_conditional_puts(true);
    let store = s3_store(&s3).await;
    assert!(!store.probe_create_once("main/probe/1").await.unwrap());
    store.delete("main/probe/1").await.unwrap();
    assert!(!store.enforces_create_once());
    conforms(&store).await;
}

#[tokio::test]
async fn s3_that_rejects_a_third_conforms_with_patience() {
    let s3 = S3::start().await;
    s3.fault(Fault::Reject(0.3));
    conforms(&retrying(s3_store(&s3).await)).await;
    assert!(s3.failed() > 10, "the fault was there: {}", s3.failed());
}

#[tokio::test]
async fn s3_that_loses_a_third_of_its_answers_keeps_what_it_was_given() {
    let s3 = S3::start().await;
    s3.fault(Fault::FailAfterWrite(0.3));
    let store = retrying(s3_store(&s3).await);
    let nonce = "main/probe/1";
    assert!(store.probe_create_once(nonce).await.unwrap(), "an answer that was lost does not fool the probe");
    store.delete(nonce).await.unwrap();
    for number in 0..40 {
        let (key, content) = (format!("main/{number:03}"), Bytes::from(format!("content {number}")));
        // Either: our own first try may have been performed.
        store.create(&key, content.clone()).await.unwrap();
        assert_eq!(store.read(&key, None).await.unwrap(), content);
    }
    assert!(s3.failed() > 5, "the fault was there: {}", s3.failed());
    assert_eq!(list_all(&store, "main/", None, false).await.0.len(), 40);
}

#[tokio::test]
async fn s3_that_was_down_is_there_again() {
    let s3 = S3::start().await;
    let store = retrying(s3_store(&s3).await);
    store.create("main/a", Bytes::from_static(b"a")).await.unwrap();
    s3.fault(Fault::Down);
    let error = s3_store(&s3).await.read("main/a", None).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    let (read, ()) = tokio::join!(store.read("main/a", None), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        s3.heal();
    });
    assert_eq!(read.unwrap(), "a");
}

#[tokio::test]
async fn s3_that_does_not_answer_is_given_up_and_tried_again() {
    let s3 = S3::start().await;
    let mut config = s3.config().s3;
    config.attempt_timeout_s = 1;
    let store = S3Store::connect(&config, "walguard", "it").await.unwrap();
    store.create("main/a", Bytes::from_static(b"a")).await.unwrap();
    s3.fault(Fault::Hold);
    let error = store.read("main/a", None).await.unwrap_err();
    assert!(error.is_transient(), "{error:?}");
    s3.heal();
    assert_eq!(store.read("main/a", None).await.unwrap(), "a");
}

#[tokio::test]
async fn a_refusal_says_what_to_do() {
    let s3 = S3::start().await;
    let config = s3.config().s3;
    let missing_bucket = S3Store::connect(&config, "not-there", "it").await.unwrap();
    let request = ListRequest { prefix: "main/".into(), ..ListRequest::default() };
    let error = missing_bucket.list(&request).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("`not-there`"), "{error:?}");
    let mut wrong_secret = config.clone();
    std::fs::write(config.secret_access_key_file.as_ref().unwrap().with_extension("wrong"), "wrong").unwrap();
    wrong_secret.secret_access_key_file = config.secret_access_key_file.map(|path| path.with_extension("wrong"));
    let store = S3Store::connect(&wrong_secret, "walguard", "it").await.unwrap();
    let error = store.read("main/a", None).await.unwrap_err();
    assert!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    assert!(error.hint().unwrap().contains("secret"), "{error:?}");
}

/// Two writers of one key, on a store that overwrites: both may believe in the end that they wrote it only if they wrote
/// the same.
#[tokio::test]
async fn s3_that_overwrites_does_not_hide_a_conflict_that_is_there_to_see() {
    let s3 = S3::start().await;
    s3.ignore_conditional_puts(true);
    let store = s3_store(&s3).await;
    store.probe_create_once("main/probe/1").await.unwrap();
    assert_eq!(store.create("main/a", Bytes::from_static(b"ours")).await.unwrap(), Created::New);
    assert_eq!(store.create("main/a", Bytes::from_static(b"theirs")).await.unwrap(), Created::Exists);
    assert_eq!(store.read("main/a", None).await.unwrap(), "ours");
}

async fn list_all(store: &dyn Store, prefix: &str, after: Option<&str>, shallow: bool) -> (Vec<String>, Vec<String>) {
    let mut request = ListRequest { prefix: prefix.to_owned(), after: after.map(str::to_owned), shallow };
    let (mut objects, mut folders) = (Vec::new(), Vec::new());
    loop {
        let page = store.list(&request).await.unwrap();
        objects.extend(page.objects.into_iter().map(|object| object.key));
        folders.extend(page.folders);
        request.after = page.next;
        if request.after.is_none() {
            return (objects, folders);
        }
    }
}

pub(crate) async fn conforms(store: &dyn Store) {
    writes_once_and_reads_back(store).await;
    reads_ranges(store).await;
    replaces(store).await;
    lists_in_key_order(store).await;
    deletes(store).await;
    turns_pages(store).await;
    refuses_paths(store).await;
}

async fn writes_once_and_reads_back(store: &dyn Store) {
    let content = Bytes::from((0..300_000u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    assert!(store.read("main/wal/a", None).await.unwrap_err().is_not_found());
    store.create("main/wal/a", content.clone()).await.unwrap();
    assert_eq!(store.create("main/wal/a", Bytes::from_static(b"other")).await.unwrap(), Created::Exists);
    assert_eq!(store.read("main/wal/a", None).await.unwrap(), content);
    store.create("main/wal/empty", Bytes::new()).await.unwrap();
    assert_eq!(store.read("main/wal/empty", None).await.unwrap(), Bytes::new());
    store.delete("main/wal/a").await.unwrap();
    store.delete("main/wal/empty").await.unwrap();
}

async fn reads_ranges(store: &dyn Store) {
    store.create("main/range", Bytes::from_static(b"0123456789")).await.unwrap();
    for (range, expected) in
        [(0..10, "0123456789"), (2..5, "234"), (8..100, "89"), (10..20, ""), (50..60, ""), (3..3, "")]
    {
        assert_eq!(store.read("main/range", Some(range.clone())).await.unwrap(), expected, "{range:?}");
    }
    assert!(store.read("main/absent", Some(0..5)).await.unwrap_err().is_not_found());
    store.delete("main/range").await.unwrap();
}

async fn replaces(store: &dyn Store) {
    store.replace("main/lease.json", Bytes::from_static(b"one")).await.unwrap();
    store.replace("main/lease.json", Bytes::from_static(b"two")).await.unwrap();
    assert_eq!(store.read("main/lease.json", None).await.unwrap(), "two");
    store.delete("main/lease.json").await.unwrap();
}

async fn lists_in_key_order(store: &dyn Store) {
    // A folder's name sorts with its slash: `b.zst` before `b/`, and `b-` before both.
    let keys = ["main/a", "main/b-x", "main/b.zst", "main/b/1", "main/b/2", "main/b/c/3", "main/d"];
    for key in keys {
        store.create(key, Bytes::from(key.to_owned())).await.unwrap();
    }
    store.create("mainly/other", Bytes::from_static(b"x")).await.unwrap();
    let nothing: Vec<String> = Vec::new();
    assert_eq!(list_all(store, "main/", None, false).await.0, keys);
    assert_eq!(list_all(store, "main/b", None, false).await.0, keys[1..6]);
    assert_eq!(list_all(store, "main/", Some("main/b/1"), false).await.0, keys[4..]);
    assert_eq!(list_all(store, "main/", Some("main/b"), false).await.0, keys[1..]);
    assert_eq!(list_all(store, "main/b/", Some("main/a"), false).await.0, keys[3..6]);
    assert_eq!(list_all(store, "main/nothing/", None, false).await.0, nothing);
    let (objects, folders) = list_all(store, "main/", None, true).await;
    assert_eq!(objects, ["main/a", "main/b-x", "main/b.zst", "main/d"]);
    assert_eq!(folders, ["main/b/"]);
    let (objects, folders) = list_all(store, "main/b/", None, true).await;
    assert_eq!(
        (objects.as_slice(), folders.as_slice()),
        (&["main/b/1".to_owned(), "main/b/2".into()][..], &["main/b/c/".to_owned()][..])
    );
    assert_eq!(list_all(store, "main/", Some("main/b/"), true).await.1, nothing);
    let page = store.list(&ListRequest { prefix: "main/d".into(), ..ListRequest::default() }).await.unwrap();
    assert_eq!(page.objects[0].size, 6);
    let age = jiff::Timestamp::now().duration_since(page.objects[0].modified);
    assert!(age.as_secs().abs() < 120, "{age}");
    for key in keys.into_iter().chain(["mainly/other"]) {
        store.delete(key).await.unwrap();
    }
    assert_eq!(list_all(store, "main", None, true).await, (nothing.clone(), nothing));
}

async fn deletes(store: &dyn Store) {
    store.create("main/x/y/z", Bytes::from_static(b"z")).await.unwrap();
    store.delete("main/x/y/z").await.unwrap();
    store.delete("main/x/y/z").await.unwrap();
    assert!(store.read("main/x/y/z", None).await.unwrap_err().is_not_found());
    // `Exists` of our own object is allowed, to a store that tries again what it had done already.
    store.create("main/x/y/z", Bytes::from_static(b"again")).await.unwrap();
    assert_eq!(store.read("main/x/y/z", None).await.unwrap(), "again");
    store.delete("main/x/y/z").await.unwrap();
}

/// More objects than a page of S3 has. (Not of a folder: that has a test of its own beside its code.)
async fn turns_pages(store: &dyn Store) {
    let keys: BTreeSet<String> = (0..240).map(|n| format!("main/{}/{n:04}", n % 3)).collect();
    for batch in keys.iter().collect::<Vec<_>>().chunks(24) {
        let creates = batch.iter().map(|key| store.create(key, Bytes::from_static(b"x")));
        for result in futures_util::future::join_all(creates).await {
            result.unwrap();
        }
    }
    assert!(list_all(store, "main/", None, false).await.0.iter().eq(&keys));
    for batch in keys.iter().collect::<Vec<_>>().chunks(24) {
        for result in futures_util::future::join_all(batch.iter().map(|key| store.delete(key))).await {
            result.unwrap();
        }
    }
}

async fn refuses_paths(store: &dyn Store) {
    for key in ["", "/etc/passwd", "main/../../x", "main//a", "main/", "main/a b", "main/\0", "main/ä", "./main", ".."]
    {
        let error = store.create(key, Bytes::new()).await.unwrap_err();
        assert!(matches!(error, StoreError::Refused { .. }), "{key:?}: {error:?}");
        assert!(store.read(key, None).await.is_err(), "{key:?}");
        assert!(store.delete(key).await.is_err(), "{key:?}");
    }
}

/// Of many writers of one key, with contents of their own, exactly one wins, and it is its content that stays.
async fn creates_once(store: Arc<dyn Store>) {
    for round in 0..10 {
        let key = format!("main/race/{round}");
        let writers = (0..8).map(|writer| {
            let (store, key) = (Arc::clone(&store), key.clone());
            tokio::spawn(
                async move { (writer, store.create(&key, Bytes::from(format!("writer {writer}"))).await.unwrap()) },
            )
        });
        let results = futures_util::future::join_all(writers).await;
        let winners: Vec<i32> =
            results.into_iter().map(Result::unwrap).filter(|(_, c)| *c == Created::New).map(|(w, _)| w).collect();
        assert_eq!(winners.len(), 1, "{winners:?}");
        assert_eq!(store.read(&key, None).await.unwrap(), format!("writer {}", winners[0]));
        store.delete(&key).await.unwrap();
    }
}
