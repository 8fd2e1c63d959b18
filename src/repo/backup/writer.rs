//! Puts a base backup into the repository while it comes.

use std::collections::VecDeque;
use std::io::Write as _;

use bytes::Bytes;
use bytes::BytesMut;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::pg::Oid;
use crate::proto;
use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::layout::ArchiveName;

use super::BackupError;
use super::compress;
use super::compress::Compressed;
use super::compress::Compressors;
use super::frames;
use super::frames::Cutter;
use super::frames::Frame;
use super::manifest;
use super::parts;
use super::parts::Uploads;
use super::suspects::Suspect;

/// Part numbers have five digits, so that `cat base.tar.zst.*` puts them in order.
const PARTS_MAX: u64 = 99_999;

/// More failed pages than this are counted, but not named: the disk is broken, and everybody knows by then.
const SUSPECTS_MAX: usize = 10_000;

/// How a backup is stored.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format {
    /// zstd level.
    pub(super) level: i32,
    /// Bytes of a part at most.
    pub(super) part_bytes: u64,
    /// What the server announced.
    pub(super) cluster_bytes: u64,
    /// Pages carry checksums, and are checked.
    pub(super) check_pages: bool,
}

/// Everything but what only the caller knows.
#[derive(Debug, Default)]
pub(super) struct Written {
    pub(super) archives: Vec<proto::Archive>,
    pub(super) postgres_manifest_bytes: u64,
    pub(super) postgres_manifest_blake3: [u8; 32],
    pub(super) suspects: Vec<Suspect>,
    /// Failed pages for which `suspects` had no room.
    pub(super) suspects_unnamed: u64,
}

impl Written {
    /// Bytes of all parts.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.archives.iter().flat_map(|archive| &archive.parts).map(|part| part.stored_bytes).sum()
    }
}

/// Takes the archives of a base backup one after the other, then Postgres's manifest, then our own.
///
/// Memory stays within about 50 MiB: a fixed number of frames ([`Compressors::in_flight_max`]) and of parts.
#[derive(Debug)]
pub(super) struct Writer {
    repository: Repository,
    label: String,
    part_bytes: usize,
    frame_bytes: usize,
    cancel: CancellationToken,
    compressors: Compressors,
    uploads: Uploads,
    /// The frame that is being filled.
    filling: Frame,
    /// Frames handed in, in order.
    compressing: VecDeque<oneshot::Receiver<Compressed>>,
    /// Buffers to use again.
    idle: Vec<(Frame, Vec<u8>)>,
    archive: Option<Open>,
    written: Written,
    /// The manifest was begun to be written.
    committing: bool,
}

/// The archive that is being written.
#[derive(Debug)]
struct Open {
    name: ArchiveName,
    cutter: Cutter,
    described: proto::Archive,
    part: BytesMut,
    part_frames: u32,
}

impl Writer {
    pub(super) fn new(repository: &Repository, label: &str, format: Format, cancel: &CancellationToken) -> Self {
        let mut part_bytes = format.part_bytes;
        while format.cluster_bytes / part_bytes > PARTS_MAX * 9 / 10 {
            part_bytes *= 2; // if nothing can be compressed, the numbers of parts must still do
        }
        let frame_bytes = frames::frame_bytes(format.cluster_bytes, part_bytes);
        let part_bytes = part_bytes as usize; // at most 1 GiB, unless the cluster has more than 90 TB
        Self {
            repository: repository.clone(),
            label: label.to_owned(),
            part_bytes,
            frame_bytes,
            cancel: cancel.clone(),
            compressors: Compressors::start(format.level, format.check_pages, frame_bytes),
            uploads: Uploads::new(repository.clone(), part_bytes, cancel.clone()),
            filling: Frame::with_room(frame_bytes),
            compressing: VecDeque::new(),
            idle: Vec::new(),
            archive: None,
            written: Written::default(),
            committing: false,
        }
    }

    /// The next archive: a tablespace, or at last the data directory.
    pub(super) fn begin_archive(&mut self, tablespace: Option<Oid>, location: &str) -> Result<(), BackupError> {
        if self.archive.is_some() {
            return Err(BackupError::Stream("an archive begins within another"));
        }
        let name = tablespace.map_or(ArchiveName::Base, ArchiveName::Tablespace);
        let described =
            proto::Archive { name: name.to_string(), location: location.to_owned(), ..proto::Archive::default() };
        let cutter = Cutter::new(&described.name, tablespace, self.frame_bytes);
        let part = self.uploads.buffer();
        self.archive = Some(Open { name, cutter, described, part, part_frames: 0 });
        Ok(())
    }

    /// More bytes of the archive's tar.
    pub(super) async fn data(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        let mut rest = bytes;
        loop {
            let archive = self.archive.as_mut().ok_or(BackupError::Stream("data outside of an archive"))?;
            rest = archive.cutter.fill(&mut self.filling, rest)?;
            if rest.is_empty() {
                return Ok(());
            }
            self.hand_in_frame().await?;
        }
    }

    /// What the server's clock showed when it wrote `backup_label`, in seconds since 1970, once that has passed.
    pub(super) fn label_time(&self) -> Option<i64> {
        let entries = self.archive.as_ref()?.cutter.tar().entries();
        entries.first().filter(|first| first.path == b"backup_label").map(|label| label.modified)
    }

    /// The archive is complete, trailer included.
    pub(super) async fn end_archive(&mut self) -> Result<(), BackupError> {
        if !self.filling.content.is_empty() {
            self.hand_in_frame().await?;
        }
        while let Some(oldest) = self.compressing.pop_front() {
            self.put_away(compress::result(oldest).await).await?;
        }
        let mut archive = self.archive.take().ok_or(BackupError::Stream("an archive ends that never began"))?;
        ship(&mut archive, &mut self.uploads, &self.repository, &self.label).await?;
        archive.described.content_bytes = archive.cutter.tar().offset();
        archive.described.entries = archive.cutter.finish()?;
        self.written.archives.push(archive.described);
        Ok(())
    }

    /// Puts Postgres's own manifest there, and waits until everything is durable.
    pub(super) async fn finish(&mut self, postgres_manifest: PostgresManifest) -> Result<Written, BackupError> {
        let (stored, bytes, hash) = postgres_manifest.finish()?;
        self.uploads.begin(self.repository.layout().postgres_manifest(&self.label), stored.into()).await?;
        self.uploads.finish().await?;
        self.written.postgres_manifest_bytes = bytes;
        self.written.postgres_manifest_blake3 = hash;
        Ok(std::mem::take(&mut self.written))
    }

    /// Makes the backup exist.
    pub(super) async fn commit(&mut self, manifest: &proto::BackupManifest) -> Result<(), BackupError> {
        let stored = Bytes::from(manifest::encode(manifest));
        let repository = self.repository.clone().with_retry(parts::PATIENCE, self.cancel.clone());
        self.committing = true;
        let key = self.repository.layout().manifest(&self.label);
        let result = parts::put(&repository, &key, &stored, &self.cancel).await;
        if matches!(result, Err(BackupError::Repo(RepoError::Conflict { .. }))) {
            self.committing = false; // what is there is somebody else's
        }
        result
    }

    /// Removes what was written so far.
    pub(super) async fn abandon(self) {
        if self.committing {
            // The manifest may be there although its writing failed: an answer can get lost. It goes first, or all stays.
            let key = self.repository.layout().manifest(&self.label);
            if let Err(error) = self.repository.store().delete(&key).await {
                tracing::warn!(key, "failed to remove a manifest that may exist; the backup may be whole: {error}");
                return;
            }
        }
        self.uploads.abandon().await;
    }

    async fn hand_in_frame(&mut self) -> Result<(), BackupError> {
        while self.compressing.len() >= self.compressors.in_flight_max {
            let Some(oldest) = self.compressing.pop_front() else { break };
            self.put_away(compress::result(oldest).await).await?;
        }
        let (empty, stored) = self.idle.pop().unwrap_or_else(|| (Frame::with_room(self.frame_bytes), Vec::new()));
        let full = std::mem::replace(&mut self.filling, empty);
        self.compressing.push_back(self.compressors.submit(full, stored));
        Ok(())
    }

    /// Appends a compressed frame to the part.
    async fn put_away(&mut self, done: Compressed) -> Result<(), BackupError> {
        let Some(archive) = &mut self.archive else { return Err(BackupError::Stream("a frame outside of an archive")) };
        if archive.part.len() + done.stored.len() > self.part_bytes {
            ship(archive, &mut self.uploads, &self.repository, &self.label).await?;
            archive.part = self.uploads.buffer();
        }
        archive.part.extend_from_slice(&done.stored);
        archive.part_frames += 1;
        archive.described.frame_content_lengths.push(done.frame.content.len() as u32); // at most half a part
        archive.described.frame_stored_lengths.push(done.stored.len() as u32);
        archive.described.frame_blake3.extend_from_slice(&done.hash);
        for page in &done.failed_pages {
            if self.written.suspects.len() < SUSPECTS_MAX {
                let path = archive.cutter.tar().entries().get(page.entry).map(|entry| &entry.path[..]);
                self.written.suspects.push(Suspect {
                    path: server_path(archive.name, path.unwrap_or_default()),
                    file: page.file,
                    block: page.block,
                    lsn: page.lsn,
                });
            } else {
                self.written.suspects_unnamed += 1;
            }
        }
        let Compressed { mut frame, stored, .. } = done;
        frame.clear();
        self.idle.push((frame, stored));
        Ok(())
    }
}

/// Uploads the part as it is, if anything is in it.
async fn ship(
    archive: &mut Open,
    uploads: &mut Uploads,
    repository: &Repository,
    label: &str,
) -> Result<(), BackupError> {
    if archive.part.is_empty() {
        return Ok(());
    }
    let content = std::mem::take(&mut archive.part).freeze();
    let frames = std::mem::take(&mut archive.part_frames);
    archive.described.parts.push(proto::Part { stored_bytes: content.len() as u64, frames });
    let number = archive.described.parts.len() as u32; // a part is megabytes long
    uploads.begin(repository.layout().part(label, archive.name, number), content).await
}

/// The path that the server uses for a member.
fn server_path(archive: ArchiveName, path: &[u8]) -> String {
    let path = String::from_utf8_lossy(path);
    match archive {
        ArchiveName::Base => path.into_owned(),
        ArchiveName::Tablespace(oid) => format!("pg_tblspc/{oid}/{path}"),
    }
}

/// Postgres's own manifest, compressed as it comes: it has a line per file.
pub(super) struct PostgresManifest {
    encoder: zstd::stream::write::Encoder<'static, Vec<u8>>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl PostgresManifest {
    pub(super) fn new(level: i32) -> Result<Self, BackupError> {
        let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), level).map_err(no_memory)?;
        encoder.include_checksum(true).map_err(no_memory)?;
        Ok(Self { encoder, hasher: blake3::Hasher::new(), bytes: 0 })
    }

    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.encoder.write_all(bytes).map_err(no_memory)
    }

    fn finish(self) -> Result<(Vec<u8>, u64, [u8; 32]), BackupError> {
        Ok((self.encoder.finish().map_err(no_memory)?, self.bytes, self.hasher.finalize().into()))
    }
}

/// Writing to memory fails for this reason only.
fn no_memory(_: std::io::Error) -> BackupError {
    BackupError::Stream("no memory for compressing Postgres's manifest")
}
