//! The manifest of a base backup: written, read, and checked before anything believes it.

use prost::Message as _;

use crate::proto;
use crate::repo::Repository;
use crate::repo::catalog::BackupInfo;
use crate::repo::frame;
use crate::repo::layout::ArchiveName;
use crate::repo::store::StoreError;

use super::BackupError;

/// A manifest larger than this is not one: it would describe about ten million files.
const CONTENT_BYTES_MAX: usize = 1 << 30;

/// Frames are at most half of a part, and parts at most 1 GiB; a frame can be one page longer than was asked for.
pub(super) const FRAME_BYTES_MAX: u32 = (512 << 20) + 8192;

/// One frame of an archive, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameAt {
    /// Number of its part, from 1, as in the part's key.
    pub part: u32,
    /// Where the zstd frame begins in the part.
    pub stored_offset: u64,
    /// Bytes of the zstd frame.
    pub stored_length: u32,
    /// Where its content begins in the tar.
    pub content_offset: u64,
    /// Bytes of its content.
    pub content_length: u32,
    /// BLAKE3 of its content.
    pub blake3: [u8; 32],
}

/// The frames of an archive, in order. A manifest that was not checked may give fewer than it should.
pub fn frames(archive: &proto::Archive) -> impl Iterator<Item = FrameAt> {
    let (hashes, _) = archive.frame_blake3.as_chunks::<32>();
    let columns = archive.frame_content_lengths.iter().zip(&archive.frame_stored_lengths).zip(hashes);
    let parts = (1..).zip(&archive.parts).flat_map(|(number, part)| (0..part.frames).map(move |index| (number, index)));
    let (mut stored_offset, mut content_offset) = (0, 0);
    parts.zip(columns).map(move |((part, index), ((&content_length, &stored_length), &blake3))| {
        if index == 0 {
            stored_offset = 0;
        }
        let frame = FrameAt { part, stored_offset, stored_length, content_offset, content_length, blake3 };
        stored_offset += u64::from(stored_length);
        content_offset += u64::from(content_length);
        frame
    })
}

/// What a manifest says in short.
///
/// # Errors
/// [`BackupError::Damaged`] if it contradicts itself.
pub fn info(key: &str, manifest: &proto::BackupManifest) -> Result<BackupInfo, BackupError> {
    BackupInfo::from_manifest(manifest)
        .map_err(|problem| BackupError::Damaged { key: key.to_owned(), problem: problem.to_owned() })
}

/// The field that the lists of frames and files begin with.
const ARCHIVES_FIELD: u32 = 33;

/// The bytes that are stored as `manifest`: one frame with what stands before the lists of frames and files, and one with
/// the rest. The first alone says what backup this is, and carries a checksum of its own, so that a catalog need not
/// fetch the rest.
pub fn encode(manifest: &proto::BackupManifest) -> Vec<u8> {
    let content = manifest.encode_to_vec();
    let (head, lists) = content.split_at(head_length(&content).unwrap_or(content.len()));
    let mut compressor = frame::Compressor::new(frame::LEVEL_DEFAULT);
    let mut stored = compressor.compress(head);
    if !lists.is_empty() {
        stored.extend_from_slice(&compressor.compress(lists));
    }
    stored
}

/// Bytes of the fields before the lists; fields are encoded in the order of their numbers.
fn head_length(content: &[u8]) -> Option<usize> {
    let mut rest = content;
    while !rest.is_empty() {
        let at = content.len() - rest.len();
        let (field, wire) = prost::encoding::decode_key(&mut rest).ok()?;
        if field >= ARCHIVES_FIELD {
            return Some(at);
        }
        prost::encoding::skip_field(wire, field, &mut rest, prost::encoding::DecodeContext::default()).ok()?;
    }
    None
}

/// Reads the bytes of the object `key` and checks that they contradict themselves nowhere: frames fill parts and
/// archives exactly, and files lie within their archive, one behind the other.
///
/// # Errors
/// [`BackupError::Damaged`].
pub fn decode(key: &str, stored: &[u8]) -> Result<proto::BackupManifest, BackupError> {
    let fault = |problem: String| BackupError::Damaged { key: key.to_owned(), problem };
    let content = frame::decompress_all(stored, CONTENT_BYTES_MAX).map_err(|error| fault(error.to_string()))?;
    let manifest = proto::BackupManifest::decode(&content[..]).map_err(|error| fault(error.to_string()))?;
    drop(content); // both at once only as long as needed
    info(key, &manifest)?;
    for archive in &manifest.archives {
        check(archive).map_err(|problem| fault(format!("archive `{}`: {problem}", archive.name)))?;
    }
    let sum = |of: fn(&proto::Archive) -> u64| {
        manifest.archives.iter().try_fold(0_u64, |sum, archive| sum.checked_add(of(archive)))
    };
    if sum(|archive| archive.content_bytes) != Some(manifest.content_bytes) {
        return Err(fault("the archives' sizes do not add up".to_owned()));
    }
    match manifest.archives.last() {
        Some(last) if last.name == ArchiveName::Base.to_string() => Ok(manifest),
        _ => Err(fault("the data directory's archive is not the last".to_owned())),
    }
}

fn check(archive: &proto::Archive) -> Result<(), &'static str> {
    ArchiveName::parse(&archive.name).ok_or("neither `base` nor an OID")?;
    let count = archive.frame_content_lengths.len();
    if archive.frame_stored_lengths.len() != count || archive.frame_blake3.len() != count * 32 {
        return Err("its frames' columns differ in length");
    }
    if archive.parts.iter().map(|part| u64::from(part.frames)).sum::<u64>() != count as u64 {
        return Err("its parts hold another number of frames");
    }
    if archive.frame_content_lengths.iter().any(|length| *length == 0 || *length > FRAME_BYTES_MAX) {
        return Err("a frame has an impossible size");
    }
    let mut stored = vec![0_u64; archive.parts.len()];
    let mut content = 0_u64;
    for frame in frames(archive) {
        content += u64::from(frame.content_length);
        if let Some(sum) = stored.get_mut(frame.part as usize - 1) {
            *sum += u64::from(frame.stored_length);
        }
    }
    if archive.parts.iter().map(|part| part.stored_bytes).ne(stored) {
        return Err("its frames do not fill its parts");
    }
    if content != archive.content_bytes {
        return Err("its frames do not fill it");
    }
    let mut before = 0;
    for entry in &archive.entries {
        let end = entry.offset.checked_add(entry.size).filter(|end| *end <= archive.content_bytes);
        if entry.offset < before {
            return Err("its files overlap");
        }
        before = end.ok_or("a file reaches past its end")?;
    }
    Ok(())
}

/// Reads a backup's manifest.
///
/// # Errors
/// [`BackupError::NoBackup`] if there is none with this label, [`BackupError::Damaged`], and errors of the repository.
pub async fn read(repository: &Repository, label: &str) -> Result<proto::BackupManifest, BackupError> {
    let key = repository.layout().manifest(label);
    let stored = match repository.store().read(&key, None).await {
        Ok(stored) => stored,
        Err(StoreError::NotFound { .. }) => return Err(BackupError::NoBackup(label.to_owned())),
        Err(error) => return Err(crate::repo::RepoError::from(error).into()),
    };
    let manifest = decode(&key, &stored)?;
    if manifest.label == label {
        Ok(manifest)
    } else {
        let problem = format!("it is the manifest of `{}`", manifest.label);
        Err(BackupError::Damaged { key, problem })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(path: &str, offset: u64, size: u64) -> proto::Entry {
        proto::Entry { path: path.as_bytes().to_vec(), offset, size, mode: 0o600, ..proto::Entry::default() }
    }

    fn archive(name: &str) -> proto::Archive {
        proto::Archive {
            name: name.to_owned(),
            content_bytes: 3_000,
            parts: vec![proto::Part { stored_bytes: 150, frames: 2 }, proto::Part { stored_bytes: 70, frames: 1 }],
            frame_content_lengths: vec![1_024, 1_024, 952],
            frame_stored_lengths: vec![100, 50, 70],
            frame_blake3: vec![7; 96],
            entries: vec![entry("base/1", 512, 100), entry("base/2", 1_536, 0), entry("base/3", 1_536, 1_464)],
            ..proto::Archive::default()
        }
    }

    fn sample() -> proto::BackupManifest {
        proto::BackupManifest {
            format: 1,
            label: "label".to_owned(),
            wal_segment_size: 1 << 24,
            timeline: 1,
            start_lsn: 10,
            stop_lsn: 20,
            content_bytes: 6_000,
            archives: vec![archive("16385"), archive("base")],
            ..proto::BackupManifest::default()
        }
    }

    #[test]
    fn frames_lie_one_behind_the_other_in_their_parts() {
        let places: Vec<_> =
            frames(&archive("base")).map(|frame| (frame.part, frame.stored_offset, frame.content_offset)).collect();
        assert_eq!(places, [(1, 0, 0), (1, 100, 1_024), (2, 0, 2_048)]);
    }

    #[test]
    fn a_manifest_reads_back_as_it_was_written() {
        assert_eq!(decode("key", &encode(&sample())).unwrap(), sample());
    }

    #[test]
    fn a_manifest_that_contradicts_itself_is_damaged() {
        type Change = fn(&mut proto::BackupManifest);
        let changes: [Change; 17] = [
            |m| m.format = 2,
            |m| m.label = "../elsewhere".to_owned(),
            |m| m.timeline = 0,
            |m| m.stop_lsn = 9,
            |m| m.wal_segment_size = 3,
            |m| m.content_bytes += 1,
            |m| drop(m.archives.pop()),
            |m| m.archives[0].name = "a/b".to_owned(),
            |m| m.archives[0].frame_blake3.truncate(95),
            |m| m.archives[0].frame_stored_lengths.truncate(2),
            |m| m.archives[0].frame_content_lengths[1] = 0,
            |m| m.archives[0].frame_content_lengths[1] = u32::MAX,
            |m| m.archives[0].parts[0].stored_bytes += 1,
            |m| m.archives[0].parts[1].frames = u32::MAX,
            |m| m.archives[0].entries[0].size = 2_000,
            |m| m.archives[0].entries[2].size = u64::MAX,
            |m| m.archives[0].entries[2].offset = 3_001,
        ];
        for (index, change) in changes.into_iter().enumerate() {
            let mut manifest = sample();
            change(&mut manifest);
            let result = decode("key", &encode(&manifest));
            assert!(matches!(result, Err(BackupError::Damaged { .. })), "change {index}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_make_sense(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8)) {
            let mut content = sample().encode_to_vec();
            for (at, byte) in flips {
                let at = at.index(content.len());
                content[at] = byte;
            }
            if let Ok(manifest) = decode("key", &frame::compress(&content, 1)) {
                for archive in &manifest.archives {
                    let sum: u64 = frames(archive).map(|frame| u64::from(frame.content_length)).sum();
                    prop_assert_eq!(sum, archive.content_bytes);
                }
            }
        }
    }
}
