//! Reads archives of a backup back: any range, by frames, each proved before it is believed.

use std::ops::Range;

use bytes::Bytes;

use crate::proto;
use crate::repo::RepoError;
use crate::repo::Repository;
use crate::repo::layout::ArchiveName;

use super::BackupError;
use super::manifest;
use super::manifest::FrameAt;

/// Random access to one archive.
#[derive(Debug)]
pub struct Reader<'a> {
    repository: &'a Repository,
    label: &'a str,
    name: ArchiveName,
    frames: Vec<FrameAt>,
}

impl<'a> Reader<'a> {
    /// A reader of one of the archives of the backup `label`.
    ///
    /// # Errors
    /// If the archive's name is none; a manifest that was [`manifest::read`] has no such archive.
    pub fn new(repository: &'a Repository, label: &'a str, archive: &'a proto::Archive) -> Result<Self, BackupError> {
        let name = ArchiveName::parse(&archive.name).ok_or_else(|| BackupError::Damaged {
            key: repository.layout().manifest(label),
            problem: format!("`{}` is no archive's name", archive.name),
        })?;
        Ok(Self { repository, label, name, frames: manifest::frames(archive).collect() })
    }

    /// The archive's frames, in order.
    pub fn frames(&self) -> &[FrameAt] {
        &self.frames
    }

    /// The key of part `number`, from 1.
    pub fn part_key(&self, number: u32) -> String {
        self.repository.layout().part(self.label, self.name, number)
    }

    /// A part as it is stored, or so many bytes of it.
    ///
    /// # Errors
    /// Of the store.
    pub async fn part(&self, number: u32, range: Option<Range<u64>>) -> Result<Bytes, BackupError> {
        Ok(self.repository.store().read(&self.part_key(number), range).await.map_err(RepoError::from)?)
    }

    /// Bytes of the tar, of which no more than the frames that hold them are fetched. A range that reaches past the end
    /// gives what is there. The range is held in memory as a whole.
    ///
    /// # Errors
    /// Of the store, and [`BackupError::Damaged`] if a frame is not what was written.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>, BackupError> {
        let end_of = |frame: &FrameAt| frame.content_offset + u64::from(frame.content_length);
        let first = self.frames.partition_point(|frame| end_of(frame) <= range.start);
        let mut content = Vec::new();
        let mut unpacker = Unpacker::new()?;
        let mut unpacked = Vec::new();
        for frame in self.frames.iter().skip(first).take_while(|frame| frame.content_offset < range.end) {
            let key = self.part_key(frame.part);
            let place = frame.stored_offset..frame.stored_offset + u64::from(frame.stored_length);
            let stored = self.repository.store().read(&key, Some(place)).await.map_err(RepoError::from)?;
            unpacker.unpack(&key, &stored, frame, &mut unpacked)?;
            let within = |at: u64| at.saturating_sub(frame.content_offset).min(frame.content_length.into()) as usize;
            content.extend_from_slice(&unpacked[within(range.start)..within(range.end)]);
        }
        Ok(content)
    }
}

/// Decompresses frames and proves them, with one context for many.
pub struct Unpacker {
    context: zstd::bulk::Decompressor<'static>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// A fresh context.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new() -> Result<Self, BackupError> {
        let context = zstd::bulk::Decompressor::new().map_err(|_| BackupError::Stream("no memory for zstd"))?;
        Ok(Self { context })
    }

    /// Replaces `content` by what the frame `stored`, which lies in the object `key`, holds.
    ///
    /// # Errors
    /// [`BackupError::Damaged`] if it is not exactly what was written.
    pub fn unpack(
        &mut self,
        key: &str,
        stored: &[u8],
        frame: &FrameAt,
        content: &mut Vec<u8>,
    ) -> Result<(), BackupError> {
        let damaged = |problem: String| {
            let problem = format!("the frame at byte {}: {problem}", frame.stored_offset);
            BackupError::Damaged { key: key.to_owned(), problem }
        };
        if stored.len() != frame.stored_length as usize {
            return Err(damaged(format!("{} of {} bytes are there", stored.len(), frame.stored_length)));
        }
        content.clear();
        content.reserve(frame.content_length.min(manifest::FRAME_BYTES_MAX) as usize);
        self.context.decompress_to_buffer(stored, content).map_err(|error| damaged(error.to_string()))?;
        if content.len() != frame.content_length as usize {
            return Err(damaged(format!("it holds {} bytes and should hold {}", content.len(), frame.content_length)));
        }
        if blake3::hash(content).as_bytes() != &frame.blake3 {
            return Err(damaged("its content has another BLAKE3 than was written".to_owned()));
        }
        Ok(())
    }
}
