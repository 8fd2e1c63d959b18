//! Objects in an S3 bucket, or in one of the many stores that speak S3's protocol.
//!
//! Those differ in what they make of checksums and of conditional writes; so by default nothing is asked of them that S3
//! did not know twenty years ago, and whether a conditional write is honoured is found out by a probe.

use std::error::Error;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use aws_config::environment::region::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::region::ProfileFileRegionProvider;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    BehaviorVersion, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::put_object::PutObjectError;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ServerSideEncryption, StorageClass};
use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use md5::{Digest as _, Md5};

use super::{Created, ListPage, ListRequest, OBJECT_BYTES_MAX, ObjectInfo, Store, StoreError, check_key};

/// The slowest transfer that is still one: an attempt may take its timeout and besides the time that its bytes take at
/// this rate. 16 MiB get two minutes more.
const RATE_MIN_BYTES_PER_S: u64 = 128 << 10;

/// A store that asks for a longer pause than this is not waited for: the next try will tell.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);

/// How to get into an S3 bucket. Whatever is not set comes from where the AWS tools take it: the `AWS_*` variables, the
/// profile files, a web identity token, the container's or the machine's role.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct S3Config {
    /// The URL of an S3-compatible store. If not set: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, or AWS's own.
    pub endpoint: Option<String>,
    /// The bucket's region. Without it and without an `endpoint`, what the environment says; `us-east-1` at last.
    pub region: Option<String>,
    /// Bucket names in the path rather than in the host's name. True if an `endpoint` is set and this is not.
    pub path_style: Option<bool>,
    /// The profile of the AWS configuration files.
    pub profile: Option<String>,
    /// A file that holds the access key's id.
    pub access_key_id_file: Option<PathBuf>,
    /// A file that holds the secret access key.
    pub secret_access_key_file: Option<PathBuf>,
    /// A file that holds the session token, if the key needs one.
    pub session_token_file: Option<PathBuf>,
    /// Storage class of all objects but the lease; the bucket's default if not set.
    pub storage_class: Option<String>,
    /// Encryption by the store; the bucket's default if not set.
    pub encryption: Option<Encryption>,
    /// The key for `encryption = "aws:kms"`; the account's default key if not set.
    pub kms_key_id: Option<String>,
    /// What is sent along so that the store can tell a damaged upload.
    pub checksum: Checksum,
    /// Seconds to wait for a connection.
    pub connect_timeout_s: u32,
    /// Seconds to wait for an answer, besides the time that the bytes take at 128 KiB/s.
    pub attempt_timeout_s: u32,
}

impl Default for S3Config {
    fn default() -> Self {
        Self {
            endpoint: None,
            region: None,
            path_style: None,
            profile: None,
            access_key_id_file: None,
            secret_access_key_file: None,
            session_token_file: None,
            storage_class: None,
            encryption: None,
            kms_key_id: None,
            checksum: Checksum::default(),
            connect_timeout_s: 5,
            attempt_timeout_s: 15,
        }
    }
}

/// Encryption of objects by the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
pub enum Encryption {
    /// With keys that S3 manages.
    #[serde(rename = "AES256")]
    Aes256,
    /// With keys of the key management service.
    #[serde(rename = "aws:kms")]
    Kms,
}

/// What is sent along with an upload so that the store can tell whether it arrived undamaged. The signature covers the
/// content too (SHA-256); buckets with object lock demand one of these besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Checksum {
    /// `Content-MD5`: every store knows it.
    #[default]
    Md5,
    /// `x-amz-checksum-crc32c`: costs less; AWS and newer stores know it.
    Crc32c,
    /// Nothing, for stores that refuse both.
    None,
}

/// Settings that cannot work.
#[derive(Debug, thiserror::Error)]
#[error("{problem}")]
pub struct S3ConfigError {
    /// What is wrong.
    pub problem: String,
    /// What the user can do about it.
    pub hint: String,
}

/// Whether the store honours `If-None-Match: *` on a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum CreateOnce {
    /// Not found out yet: the header is sent, and not relied on.
    Unknown = 0,
    /// It refuses to write a key twice.
    Enforced = 1,
    /// It accepts the header and overwrites.
    Ignored = 2,
    /// It refuses requests with the header.
    Unsupported = 3,
}

/// A store in an S3 bucket, below a prefix.
pub struct S3Store {
    client: aws_sdk_s3::Client,
    bucket: String,
    /// Empty, or ends with a slash.
    prefix: String,
    storage_class: Option<StorageClass>,
    encryption: Option<ServerSideEncryption>,
    kms_key_id: Option<String>,
    checksum: Checksum,
    attempt_timeout: Duration,
    create_once: AtomicU8,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("S3Store")
            .field("url", &self.url())
            .field("create_once", &self.create_once())
            .finish_non_exhaustive()
    }
}

impl S3Store {
    /// A store below `prefix` in `bucket`. Reads key files and the AWS environment; asks the machine's metadata service
    /// for the region if nothing else tells it and no endpoint is set.
    ///
    /// # Errors
    /// If a file cannot be read, or the settings contradict each other.
    pub async fn connect(config: &S3Config, bucket: &str, prefix: &str) -> Result<Self, S3ConfigError> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest());
        if let Some(profile) = &config.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(credentials) = static_credentials(config)? {
            loader = loader.credentials_provider(credentials);
        }
        // The SDK would take these by itself; but whether there is one decides how buckets are addressed.
        let from_env = |name| std::env::var(name).ok().filter(|url| !url.is_empty());
        let endpoint = config.endpoint.clone();
        let endpoint = endpoint.or_else(|| from_env("AWS_ENDPOINT_URL_S3")).or_else(|| from_env("AWS_ENDPOINT_URL"));
        let region = RegionProviderChain::first_try(config.region.clone().map(Region::new));
        let region = if endpoint.is_some() {
            // Not the default chain: it would ask a metadata service that is not there, and wait for it.
            let mut files = ProfileFileRegionProvider::builder();
            if let Some(profile) = &config.profile {
                files = files.profile_name(profile);
            }
            region.or_else(EnvironmentVariableRegionProvider::new()).or_else(files.build())
        } else {
            region.or_default_provider()
        };
        let sdk = loader.region(region.or_else("us-east-1")).load().await;
        let mut builder = aws_sdk_s3::config::Builder::from(&sdk)
            .force_path_style(config.path_style.unwrap_or(endpoint.is_some()))
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired)
            // Retries and the time for a whole call are ours: `Retrying`, and `bounded` below.
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .timeout_config(
                TimeoutConfig::builder().connect_timeout(Duration::from_secs(config.connect_timeout_s.into())).build(),
            );
        if let Some(endpoint) = &endpoint {
            if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
                return Err(S3ConfigError {
                    problem: format!("the S3 endpoint `{endpoint}` is not a URL"),
                    hint: "give it with its scheme, for example https://s3.example.com".to_owned(),
                });
            }
            builder = builder.endpoint_url(endpoint);
        }
        let prefix = if prefix.is_empty() { String::new() } else { format!("{}/", prefix.trim_matches('/')) };
        Ok(Self {
            client: aws_sdk_s3::Client::from_conf(builder.build()),
            bucket: bucket.to_owned(),
            prefix,
            storage_class: config.storage_class.as_deref().map(StorageClass::from),
            encryption: config.encryption.map(|encryption| match encryption {
                Encryption::Aes256 => ServerSideEncryption::Aes256,
                Encryption::Kms => ServerSideEncryption::AwsKms,
            }),
            kms_key_id: config.kms_key_id.clone(),
            checksum: config.checksum,
            attempt_timeout: Duration::from_secs(config.attempt_timeout_s.max(1).into()),
            create_once: AtomicU8::new(CreateOnce::Unknown as u8),
        })
    }

    fn create_once(&self) -> CreateOnce {
        match self.create_once.load(Ordering::Relaxed) {
            1 => CreateOnce::Enforced,
            2 => CreateOnce::Ignored,
            3 => CreateOnce::Unsupported,
            _ => CreateOnce::Unknown,
        }
    }

    fn learn(&self, create_once: CreateOnce) {
        self.create_once.store(create_once as u8, Ordering::Relaxed);
    }

    fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Gives up a call that takes longer than its bytes can explain.
    async fn bounded<T>(
        &self,
        op: &'static str,
        key: &str,
        bytes: u64,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let limit = self.attempt_timeout + Duration::from_secs(bytes / RATE_MIN_BYTES_PER_S);
        // Boxed: the SDK's futures are large, and would be copied into every caller's.
        tokio::time::timeout(limit, Box::pin(call)).await.unwrap_or_else(|_| {
            let source = format!("no answer within {} s", limit.as_secs()).into();
            Err(StoreError::Unavailable { op, key: key.to_owned(), source, retry_after: None })
        })
    }

    /// Puts an object; `conditional` asks the store to refuse if the key exists. False if it refused for that.
    async fn put(&self, key: &str, content: Bytes, conditional: bool) -> Result<bool, StoreError> {
        let length = content.len() as u64;
        let mut request = self.client.put_object().bucket(&self.bucket).key(self.path(key));
        request = match self.checksum {
            Checksum::Md5 => request.content_md5(base64(&Md5::digest(&content))),
            Checksum::Crc32c => request.checksum_crc32_c(base64(&crc32c::crc32c(&content).to_be_bytes())),
            Checksum::None => request,
        };
        if conditional {
            request = request.if_none_match("*");
        }
        let request = request
            .set_storage_class(self.storage_class.clone())
            .set_server_side_encryption(self.encryption.clone())
            .set_ssekms_key_id(self.kms_key_id.clone())
            .body(ByteStream::from(content));
        self.bounded("write", key, length, async {
            match request.send().await {
                Ok(_) => Ok(true),
                Err(error) if conditional && is_precondition_failed(&error) => Ok(false),
                Err(error) => Err(self.classify("write", key, error)),
            }
        })
        .await
    }

    async fn exists(&self, key: &str) -> Result<bool, StoreError> {
        let request = self.client.head_object().bucket(&self.bucket).key(self.path(key));
        self.bounded("look for", key, 0, async {
            match request.send().await {
                Ok(_) => Ok(true),
                Err(error) => match self.classify("look for", key, error) {
                    StoreError::NotFound { .. } => Ok(false),
                    error => Err(error),
                },
            }
        })
        .await
    }

    /// For a store that may overwrite: looks first, and reads back what it wrote.
    async fn create_carefully(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        if self.exists(key).await? {
            return Ok(Created::Exists);
        }
        let conditional = self.create_once() == CreateOnce::Unknown;
        match self.put(key, content.clone(), conditional).await {
            Ok(true) => {}
            Ok(false) => return Ok(Created::Exists),
            Err(error) if conditional && is_unsupported(&error) => {
                self.learn(CreateOnce::Unsupported);
                self.put(key, content.clone(), false).await?;
            }
            Err(error) => return Err(error),
        }
        // Another writer may have written between our look and our write, or after: whoever reads back something else
        // than it wrote knows.
        let there = self.read(key, None).await?;
        Ok(if there == content { Created::New } else { Created::Exists })
    }

    fn classify<E>(&self, op: &'static str, key: &str, error: SdkError<E, HttpResponse>) -> StoreError
    where
        E: ProvideErrorMetadata + Error + Send + Sync + 'static,
    {
        let key = key.to_owned();
        let retry_after = error
            .raw_response()
            .and_then(|response| response.headers().get("retry-after")?.parse().ok())
            .map(|seconds| Duration::from_secs(seconds).min(RETRY_AFTER_MAX));
        let SdkError::ServiceError(service) = error else {
            return self.unanswered(op, key, error);
        };
        let status = service.raw().status().as_u16();
        let answer = service.err();
        let code = answer.code().unwrap_or_default().to_owned();
        let failure = S3Failure { status, message: answer.message().unwrap_or_default().to_owned(), code };
        let hint = match (status, failure.code.as_str()) {
            (_, "NoSuchKey") => return StoreError::NotFound { key },
            (_, "NoSuchBucket") => {
                format!("make the bucket `{}` first, or mend the URL given with `--repo`", self.bucket)
            }
            // A HEAD has no body, so there is no code; and no way to tell a missing bucket from a missing key.
            (404, "" | "NotFound") => return StoreError::NotFound { key },
            (_, "ExpiredToken" | "ExpiredTokenException" | "TokenRefreshRequired")
            | (408 | 409 | 425 | 429 | 500 | 502..=504 | 507, _)
            | (_, "SlowDown" | "RequestTimeout" | "Throttling" | "ThrottlingException" | "RequestLimitExceeded")
            | (_, "InternalError" | "QuotaExceeded" | "XMinioStorageFull") => {
                return StoreError::Unavailable { op, key, source: failure.into(), retry_after };
            }
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "UnrecognizedClientException") => {
                "check the access key and the secret: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the files that the \
                 settings name"
                    .to_owned()
            }
            (_, "RequestTimeTooSkewed") => {
                "this machine's clock is wrong: the store refuses what is signed more than 15 minutes off; run an NTP \
                 client"
                    .to_owned()
            }
            (301 | 307, _)
            | (_, "PermanentRedirect" | "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
                "the bucket lies in another region: set `region` in the settings, or AWS_REGION".to_owned()
            }
            (_, "InvalidObjectState") => {
                "the object is in a storage class that must be thawed first; keep backups in one that can be read at once"
                    .to_owned()
            }
            (401 | 403, _) => format!(
                "the credentials must allow s3:ListBucket on `{0}`, and s3:GetObject, s3:PutObject and s3:DeleteObject on \
                 `{0}/{1}*`",
                self.bucket, self.prefix
            ),
            (501, _) => "the store does not know this request; `checksum = \"none\"` may help".to_owned(),
            (400, "InvalidDigest" | "BadDigest") => return StoreError::Unavailable { op, key, source: failure.into(), retry_after },
            _ => "`walguard check` asks the store for everything that is needed, step by step".to_owned(),
        };
        StoreError::Refused { op, key, source: failure.into(), hint }
    }

    /// A call that got no answer: lost on the way, or never sent.
    fn unanswered<E>(&self, op: &'static str, key: String, error: SdkError<E, HttpResponse>) -> StoreError
    where
        E: Error + Send + Sync + 'static,
    {
        let is_dispatch = matches!(error, SdkError::DispatchFailure(_) | SdkError::ConstructionFailure(_));
        // The chain's own types are private; the words are what there is.
        let text = crate::backoff::Chain(&error).to_string();
        if is_dispatch && (text.contains("no providers in chain") || text.contains("not properly configured")) {
            return StoreError::Refused {
                op,
                key,
                source: "no credentials were found".into(),
                hint: "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or `access_key_id_file` and \
                       `secret_access_key_file` in the settings"
                    .to_owned(),
            };
        }
        StoreError::Unavailable { op, key, source: error.into(), retry_after: None }
    }
}

#[async_trait]
impl Store for S3Store {
    async fn create(&self, key: &str, content: Bytes) -> Result<Created, StoreError> {
        check_key("write", key)?;
        if self.create_once() != CreateOnce::Enforced {
            return self.create_carefully(key, content).await;
        }
        Ok(if self.put(key, content, true).await? { Created::New } else { Created::Exists })
    }

    async fn replace(&self, key: &str, content: Bytes) -> Result<(), StoreError> {
        check_key("write", key)?;
        self.put(key, content, false).await.map(drop)
    }

    async fn read(&self, key: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        check_key("read", key)?;
        let mut request = self.client.get_object().bucket(&self.bucket).key(self.path(key));
        let mut expected = OBJECT_BYTES_MAX;
        if let Some(range) = range {
            expected = range.end.saturating_sub(range.start);
            if expected == 0 {
                return Ok(Bytes::new());
            }
            request = request.range(format!("bytes={}-{}", range.start, range.end - 1));
        }
        let unavailable = |problem: String| StoreError::Unavailable {
            op: "read",
            key: key.to_owned(),
            source: problem.into(),
            retry_after: None,
        };
        let mut answer = self
            .bounded("read", key, 0, async {
                match request.send().await {
                    Ok(answer) => Ok(Some(answer)),
                    // The range begins behind the end.
                    Err(error) if error.raw_response().is_some_and(|r| r.status().as_u16() == 416) => Ok(None),
                    Err(error) => Err(self.classify("read", key, error)),
                }
            })
            .await?;
        let Some(answer) = &mut answer else { return Ok(Bytes::new()) };
        let length = answer.content_length().and_then(|length| u64::try_from(length).ok()).unwrap_or(0);
        let beyond = || super::too_large("read", key);
        if length > expected {
            return Err(beyond());
        }
        self.bounded("read", key, length, async {
            let mut content = BytesMut::with_capacity(usize::try_from(length).map_err(|_| beyond())?);
            while let Some(piece) = answer.body.next().await {
                content
                    .extend_from_slice(&piece.map_err(|error| unavailable(crate::backoff::Chain(&error).to_string()))?);
                if content.len() as u64 > expected {
                    return Err(beyond());
                }
            }
            if length > 0 && (content.len() as u64) < length {
                return Err(unavailable(format!("the answer ended after {} of {length} bytes", content.len())));
            }
            Ok(content.freeze())
        })
        .await
    }

    async fn list(&self, request: &ListRequest) -> Result<ListPage, StoreError> {
        let after = request.after.as_ref().map(|after| {
            // All that lies in a folder is behind us once the folder is.
            let end = if request.shallow && after.ends_with('/') { "~" } else { "" };
            format!("{}{end}", self.path(after))
        });
        let call = self
            .client
            .list_objects_v2()
            .bucket(&self.bucket)
            .prefix(self.path(&request.prefix))
            .set_start_after(after)
            .set_delimiter(request.shallow.then(|| "/".to_owned()));
        let answer = self
            .bounded("list", &request.prefix, 0, async {
                call.send().await.map_err(|error| match self.classify("list", &request.prefix, error) {
                    // A listing has no key that could be missing.
                    StoreError::NotFound { key } => StoreError::Refused {
                        op: "list",
                        key,
                        source: "not found".into(),
                        hint: format!("make the bucket `{}` first, or mend the URL given with `--repo`", self.bucket),
                    },
                    error => error,
                })
            })
            .await?;
        let relative = |path: &str| path.strip_prefix(&self.prefix).map(str::to_owned);
        let mut page = ListPage::default();
        for object in answer.contents() {
            let Some(key) = object.key().and_then(relative) else { continue };
            let size = object.size().and_then(|size| u64::try_from(size).ok()).unwrap_or(0);
            let modified = object.last_modified().and_then(|at| Timestamp::from_nanosecond(at.as_nanos()).ok());
            page.objects.push(ObjectInfo { key, size, modified: modified.unwrap_or(Timestamp::UNIX_EPOCH) });
        }
        page.folders = answer.common_prefixes().iter().filter_map(|folder| relative(folder.prefix()?)).collect();
        if let (true, Some(after)) = (request.shallow, &request.after) {
            page.folders.retain(|folder| folder > after);
        }
        // Not all stores sort as S3 does, and going on behind the last key relies on it.
        page.objects.sort_by(|a, b| a.key.cmp(&b.key));
        page.folders.sort();
        if answer.is_truncated() == Some(true) {
            let last = page.objects.last().map(|object| object.key.clone());
            page.next = last.max(page.folders.last().cloned());
            if page.next.is_none() || page.next <= request.after {
                return Err(StoreError::Unavailable {
                    op: "list",
                    key: request.prefix.clone(),
                    source: "the store says that there is more, and does not say what".into(),
                    retry_after: None,
                });
            }
        }
        Ok(page)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key("delete", key)?;
        let request = self.client.delete_object().bucket(&self.bucket).key(self.path(key));
        self.bounded("delete", key, 0, async {
            match request.send().await {
                Ok(_) => Ok(()),
                Err(error) => match self.classify("delete", key, error) {
                    StoreError::NotFound { .. } => Ok(()),
                    error => Err(error),
                },
            }
        })
        .await
    }

    fn enforces_create_once(&self) -> bool {
        self.create_once() == CreateOnce::Enforced
    }

    async fn probe_create_once(&self, key: &str) -> Result<bool, StoreError> {
        check_key("write", key)?;
        let first = match self.put(key, Bytes::from_static(b"first"), true).await {
            Ok(written) => written,
            Err(error) if is_unsupported(&error) => {
                self.learn(CreateOnce::Unsupported);
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        // The key is new: if even the first put is refused, an earlier try was performed and its answer lost.
        let enforced = !first || !self.put(key, Bytes::from_static(b"second"), true).await?;
        self.learn(if enforced { CreateOnce::Enforced } else { CreateOnce::Ignored });
        Ok(enforced)
    }

    fn url(&self) -> String {
        format!("s3://{}/{}", self.bucket, self.prefix).trim_end_matches('/').to_owned()
    }
}

/// What the store answered.
#[derive(Debug, thiserror::Error)]
#[error("the store answers {status} {code}: {message}")]
pub struct S3Failure {
    /// The HTTP status.
    pub status: u16,
    /// S3's name of the error; empty if the answer had none.
    pub code: String,
    /// For people.
    pub message: String,
}

fn is_precondition_failed(error: &SdkError<PutObjectError, HttpResponse>) -> bool {
    error.raw_response().is_some_and(|response| response.status().as_u16() == 412)
}

/// The store does not know conditional puts. (Some answer 501 `NotImplemented`, others 400 with the name of the header.)
fn is_unsupported(error: &StoreError) -> bool {
    let StoreError::Refused { source, .. } = error else { return false };
    source.downcast_ref::<S3Failure>().is_some_and(|failure| {
        failure.status == 501
            || failure.code == "NotImplemented"
            || (failure.status == 400 && failure.message.to_ascii_lowercase().contains("if-none-match"))
    })
}

fn base64(bytes: &[u8]) -> String {
    aws_smithy_types::base64::encode(bytes)
}

fn static_credentials(config: &S3Config) -> Result<Option<Credentials>, S3ConfigError> {
    match (&config.access_key_id_file, &config.secret_access_key_file) {
        (None, None) => Ok(None),
        (Some(id), Some(secret)) => {
            let token = config.session_token_file.as_deref().map(read_secret).transpose()?;
            Ok(Some(Credentials::new(read_secret(id)?, read_secret(secret)?, token, None, "walguard settings")))
        }
        _ => Err(S3ConfigError {
            problem: "only one half of the S3 access key is given".to_owned(),
            hint: "set both `access_key_id_file` and `secret_access_key_file`, or neither".to_owned(),
        }),
    }
}

fn read_secret(path: &Path) -> Result<String, S3ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| S3ConfigError {
        problem: format!("read S3 key file {}: {error}", path.display()),
        hint: "the file must be readable by the user that walguard runs as".to_owned(),
    })?;
    Ok(text.trim().to_owned())
}
