//! Takes a base backup: the story of one.

use std::time::Duration;
use std::time::Instant;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::capture::BackupEvent;
use crate::capture::BackupStream;
use crate::capture::BaseBackupOptions;
use crate::capture::Walsender;
use crate::pg::BLOCK_SIZE;
use crate::pg::PgTime;
use crate::pg::Position;
use crate::progress::Progress;
use crate::proto;
use crate::repo::Repository;
use crate::repo::cluster;

use super::BackupError;
use super::BackupInfo;
use super::Config;
use super::Origin;
use super::label::choose_label;
use super::manifest;
use super::suspects;
use super::wait::wait_for_wal;
use super::writer::Format;
use super::writer::PostgresManifest;
use super::writer::Writer;

/// Bad pages named in the log. The manifest names a thousand; a log that is flooded hides the rest of the night.
const BAD_PAGES_LOGGED: usize = 20;

/// How long a backup with suspicious pages waits for its WAL, which tells torn pages from damaged ones.
const SUSPECTS_PATIENCE: Duration = Duration::from_secs(120);

/// What somebody wants to be backed up.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The backup's name; by default the time.
    pub label: Option<String>,
}

/// How a stream becomes a backup.
#[derive(Clone, Debug)]
pub struct BackupOptions {
    /// The backup's name, under which nothing may exist yet: see [`choose_label`].
    pub label: String,
    /// How it is stored.
    pub config: Config,
}

/// A backup that was taken.
#[derive(Clone, Debug)]
pub struct Taken {
    /// It in short.
    pub info: BackupInfo,
    /// Pages whose checksum is wrong, the first 1,000 of [`BackupInfo::bad_pages`].
    pub bad_pages: Vec<proto::BadPage>,
    /// How long it took.
    pub elapsed: Duration,
}

/// Takes a base backup over an idle replication connection, which is used up by it: asks the server what it is, checks
/// that the repository is this cluster's, chooses the label, and [`take`]s the stream.
///
/// # Errors
/// Of the server, of the repository, or if the label cannot be had. Nothing that looks like a backup is then left.
pub async fn run(
    repository: &Repository,
    mut walsender: Walsender,
    config: &Config,
    request: &Request,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Taken, BackupError> {
    let prepare = async {
        let origin = Origin::ask(&mut walsender).await?;
        repository.check_cluster(&origin.identity()).await?;
        let label = choose_label(repository, request.label.as_deref(), Timestamp::now()).await?;
        progress.begin("wait for the server's checkpoint", None);
        let options = BaseBackupOptions {
            label: label.clone(),
            checkpoint: config.checkpoint,
            max_rate_kib: config.max_rate.map(|rate| u32::try_from(rate.as_u64() / 1024).unwrap_or(u32::MAX)),
            verify_server_side: false,
            manifest: true,
        };
        let stream = walsender.base_backup(&options).await?;
        Ok::<_, BackupError>((origin, label, stream))
    };
    let (origin, label, stream) = cancel.run_until_cancelled(prepare).await.ok_or(BackupError::Cancelled)??;
    let options = BackupOptions { label, config: config.clone() };
    // Once per backup: an allocation is nothing beside it.
    Box::pin(take(repository, stream, &options, &origin, progress, cancel)).await
}

/// Puts the base backup that comes over `stream` into the repository. When this is cancelled or fails, what was
/// written is removed as far as the store lets us; if even that fails, it is no backup without its manifest.
///
/// The future must not be dropped to stop it: use `cancel`.
///
/// # Errors
/// Of the server or the repository; [`BackupError::Tar`] or [`BackupError::Stream`] for a server that sends nonsense.
pub async fn take(
    repository: &Repository,
    stream: BackupStream,
    options: &BackupOptions,
    origin: &Origin,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<Taken, BackupError> {
    let began = Instant::now();
    let mut backup = Backup { repository, options, origin, progress, cancel, stream, writer: None };
    let received = cancel.run_until_cancelled(backup.receive()).await.unwrap_or(Err(BackupError::Cancelled));
    // Not to be stopped half-way: nobody would know whether the backup exists.
    let result = match received {
        Ok(manifest) => backup.commit(&manifest).await.map(|()| manifest),
        Err(error) => Err(error),
    };
    progress.end();
    match result {
        Ok(manifest) => {
            let info = manifest::info(&repository.layout().manifest(&options.label), &manifest)?;
            Ok(Taken { info, bad_pages: manifest.bad_pages, elapsed: began.elapsed() })
        }
        Err(error) => {
            if let Some(writer) = backup.writer {
                writer.abandon().await;
            }
            Err(error)
        }
    }
}

struct Backup<'a> {
    repository: &'a Repository,
    options: &'a BackupOptions,
    origin: &'a Origin,
    progress: &'a dyn Progress,
    cancel: &'a CancellationToken,
    stream: BackupStream,
    writer: Option<Writer>,
}

/// The server's clock, as far as a replication connection shows it: the server stamps `backup_label`, which it sends
/// first, with its time in whole seconds.
#[derive(Clone, Copy)]
struct Clock {
    server: PgTime,
    seen: Instant,
}

impl Clock {
    /// What it showed, or will show, then.
    fn at(self, then: Instant) -> PgTime {
        let micros = |duration: Duration| i64::try_from(duration.as_micros()).unwrap_or(i64::MAX);
        let later = micros(then.saturating_duration_since(self.seen));
        let earlier = micros(self.seen.saturating_duration_since(then));
        PgTime::from_micros(self.server.micros().saturating_add(later).saturating_sub(earlier))
    }
}

impl Backup<'_> {
    async fn receive(&mut self) -> Result<proto::BackupManifest, BackupError> {
        let (mut start, mut clock) = (None, None);
        let mut postgres_manifest = PostgresManifest::new(self.options.config.compression_level)?;
        let mut began = Instant::now();
        let stop = loop {
            let event = self.stream.next().await?.ok_or(BackupError::Stream("it ends too early"))?;
            let writer = || BackupError::Stream("data before its beginning");
            match event {
                BackupEvent::Begin { start: at, tablespaces } => {
                    (start, began) = (Some(at), Instant::now());
                    let kib = tablespaces.iter().filter_map(|tablespace| tablespace.size_kib);
                    let bytes = kib.fold(0_u64, u64::saturating_add).saturating_mul(1024);
                    self.progress.end();
                    self.progress.begin("back up", Some(bytes));
                    self.writer = Some(self.start_writer(bytes));
                }
                BackupEvent::ArchiveBegin { name, location } => {
                    self.progress.note(&name.map_or("data directory".to_owned(), |oid| format!("tablespace {oid}")));
                    self.writer.as_mut().ok_or_else(writer)?.begin_archive(name, &location)?;
                }
                BackupEvent::Data(bytes) => {
                    self.writer.as_mut().ok_or_else(writer)?.data(&bytes).await?;
                    self.progress.advance(bytes.len() as u64);
                    if clock.is_none() {
                        clock = self
                            .writer
                            .as_ref()
                            .and_then(Writer::label_time)
                            .map(|server| Clock { server: PgTime::from_unix_seconds(server), seen: Instant::now() });
                    }
                }
                BackupEvent::Progress(_) => {}
                BackupEvent::ArchiveEnd => self.writer.as_mut().ok_or_else(writer)?.end_archive().await?,
                BackupEvent::ManifestBegin => {}
                BackupEvent::ManifestData(bytes) => postgres_manifest.write(&bytes)?,
                BackupEvent::End { stop } => break stop,
            }
        };
        let start = start.ok_or(BackupError::Stream("it ends before it begins"))?;
        if start.timeline != stop.timeline || start.lsn > stop.lsn {
            return Err(BackupError::Stream("it stops before it starts, or on another timeline"));
        }
        self.progress.note("put away the last parts");
        // Without the label's time our own clock has to do.
        let clock = clock.unwrap_or_else(|| Clock { server: Timestamp::now().into(), seen: Instant::now() });
        // Its seconds were cut off, so the end is told a second later: rather that than too early.
        let times = (clock.at(began), clock.at(Instant::now() + Duration::from_secs(1)));
        self.complete(start, stop, times, postgres_manifest).await
    }

    fn start_writer(&self, cluster_bytes: u64) -> Writer {
        let format = Format {
            level: self.options.config.compression_level,
            part_bytes: self.options.config.part_size.as_u64(),
            cluster_bytes,
            check_pages: self.checks_pages(),
        };
        Writer::new(self.repository, &self.options.label, format, self.cancel)
    }

    fn checks_pages(&self) -> bool {
        let page = self.origin.settings.get("block_size").map_or("", String::as_str);
        let known = page.is_empty() || page.parse() == Ok(BLOCK_SIZE);
        self.options.config.verify_page_checksums && self.origin.data_checksums && known
    }

    async fn complete(
        &mut self,
        start: Position,
        stop: Position,
        (start_time, stop_time): (PgTime, PgTime),
        postgres_manifest: PostgresManifest,
    ) -> Result<proto::BackupManifest, BackupError> {
        let writer = self.writer.as_mut().ok_or(BackupError::Stream("it is empty"))?;
        let mut written = writer.finish(postgres_manifest).await?;
        let mut manifest = proto::BackupManifest {
            format: cluster::FORMAT,
            label: self.options.label.clone(),
            walguard_version: env!("CARGO_PKG_VERSION").to_owned(),
            system_id: self.origin.system_id.get(),
            server_version: self.origin.server_version.number(),
            wal_segment_size: u32::try_from(self.origin.segment_size.bytes()).unwrap_or(u32::MAX), // at most 1 GiB
            timeline: start.timeline.get(),
            start_lsn: start.lsn.bytes(),
            stop_lsn: stop.lsn.bytes(),
            start_time: start_time.micros(),
            stop_time: stop_time.micros(),
            from_standby: self.origin.is_standby,
            page_checksums_verified: self.checks_pages(),
            settings: self.origin.settings.clone().into_iter().collect(),
            role: self.origin.role.clone(),
            content_bytes: written.archives.iter().map(|archive| archive.content_bytes).sum(),
            stored_bytes: written.stored_bytes(),
            compression_level: self.options.config.compression_level,
            archives: std::mem::take(&mut written.archives),
            postgres_manifest_bytes: written.postgres_manifest_bytes,
            postgres_manifest_blake3: written.postgres_manifest_blake3.to_vec(),
            ..proto::BackupManifest::default()
        };
        let mut suspects = written.suspects;
        suspects::drop_changed(&mut suspects, start.lsn, stop.lsn);
        if !suspects.is_empty() {
            let info = manifest::info(&self.options.label, &manifest)?;
            self.progress.note("wait for the WAL, which tells torn pages from damaged ones");
            let archived = wait_for_wal(self.repository, &info, Some(SUSPECTS_PATIENCE), self.cancel).await;
            match archived {
                Ok(()) => suspects::drop_torn(&mut suspects, self.repository, &info).await,
                Err(BackupError::WalMissing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        manifest.bad_pages_total = suspects.len() as u64 + written.suspects_unnamed;
        manifest.bad_pages = suspects::name(&suspects);
        for page in manifest.bad_pages.iter().take(BAD_PAGES_LOGGED) {
            tracing::warn!(file = page.file, block = page.block, "page has a wrong checksum");
        }
        if manifest.bad_pages_total > BAD_PAGES_LOGGED as u64 {
            tracing::warn!(pages = manifest.bad_pages_total, "more pages have wrong checksums than are shown here");
        }
        Ok(manifest)
    }

    async fn commit(&mut self, manifest: &proto::BackupManifest) -> Result<(), BackupError> {
        self.writer.as_mut().ok_or(BackupError::Stream("it is empty"))?.commit(manifest).await
    }
}
