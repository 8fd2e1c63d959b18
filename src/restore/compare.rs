//! What lies in a directory already, compared with a backup frame by frame, so that only what differs is fetched.
//!
//! The manifest has a checksum (BLAKE3) of each frame of the tar. A frame is put together again from the files that it holds
//! bytes of; if the checksum agrees, what is there is what the backup holds, to the byte. Between files lie tar headers.
//! What stands in them follows from the manifest but for the owner, which is the same in all: it is taken from the first
//! header, with which the first frame is fetched. A header that some other server writes otherwise costs only that frame.
//!
//! (Postgres: `tarCreateHeader` in `port/tar.c`.)

use std::ffi::OsStr;
use std::fs::File;
use std::num::NonZero;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::progress::Progress;
use crate::proto;
use crate::proto::entry::Kind;
use crate::repo::Repository;
use crate::repo::backup::BackupError;
use crate::repo::backup::manifest::FrameAt;
use crate::repo::backup::reader::Reader;

use super::extract::ExtractError;
use super::extract::THREADS_MAX;
use super::extract::blocking;

/// A tar consists of blocks.
const BLOCK: usize = 512;

/// Which frames of the archive with this index must be fetched, how many bytes of content need not be, and how many bytes
/// were fetched to find out. Files that `is_held` says so of are not in the directory. Uses all cores.
///
/// # Errors
/// Of the repository; what cannot be read in the directory differs.
pub(super) async fn compare(
    repository: &Repository,
    manifest: &Arc<proto::BackupManifest>,
    index: usize,
    root: &Path,
    is_held: fn(&proto::Archive, &proto::Entry) -> bool,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<(Vec<bool>, u64, u64), ExtractError> {
    let archive = &manifest.archives[index];
    let reader = Reader::new(repository, &manifest.label, archive)?;
    let frames: Arc<[FrameAt]> = reader.frames().into();
    let learned = cancel.run_until_cancelled(template(&reader, archive)).await.ok_or(ExtractError::Cancelled)??;
    let (template, stored_bytes) = learned;
    let (done, mut advanced) = mpsc::unbounded_channel::<u64>();
    let stop = Arc::new(AtomicBool::new(false));
    let comparing = {
        let (manifest, frames, root, stop) = (Arc::clone(manifest), Arc::clone(&frames), root.to_owned(), stop.clone());
        blocking(move || {
            let archive = &manifest.archives[index];
            let existing = Existing { archive, root: &root, template, is_held };
            Ok(existing.compare_all(&frames, &stop, &done))
        })
    };
    let follow = async {
        loop {
            tokio::select! {
                bytes = advanced.recv() => match bytes {
                    Some(bytes) => progress.advance(bytes),
                    None => return,
                },
                () = cancel.cancelled(), if !stop.load(Ordering::Relaxed) => stop.store(true, Ordering::Relaxed),
            }
        }
    };
    let (needed, ()) = tokio::join!(comparing, follow);
    let needed = needed?;
    if cancel.is_cancelled() {
        return Err(ExtractError::Cancelled);
    }
    let kept = frames.iter().zip(&needed).filter(|(_, needed)| !**needed);
    let kept_bytes = kept.map(|(frame, _)| u64::from(frame.content_length)).sum();
    Ok((needed, kept_bytes, stored_bytes))
}

/// The archive's first header, and how many bytes were fetched for it. `None` if it is none that we can learn from.
async fn template(
    reader: &Reader<'_>,
    archive: &proto::Archive,
) -> Result<(Option<Box<[u8; BLOCK]>>, u64), BackupError> {
    let (Some(frame), Some(first)) = (reader.frames().first(), archive.entries.first()) else { return Ok((None, 0)) };
    if first.offset != BLOCK as u64 {
        return Ok((None, 0)); // an extended header: another tool wrote it
    }
    let content = reader.read(0..BLOCK as u64).await?;
    let header = content.try_into().ok().map(|header: [u8; BLOCK]| Box::new(header));
    Ok((header, frame.stored_length.into()))
}

/// An archive, and the directory that may hold its files.
struct Existing<'a> {
    archive: &'a proto::Archive,
    root: &'a Path,
    template: Option<Box<[u8; BLOCK]>>,
    is_held: fn(&proto::Archive, &proto::Entry) -> bool,
}

impl Existing<'_> {
    fn compare_all(&self, frames: &[FrameAt], stop: &AtomicBool, done: &mpsc::UnboundedSender<u64>) -> Vec<bool> {
        let needed: Vec<AtomicBool> = frames.iter().map(|_| AtomicBool::new(true)).collect();
        let next = AtomicUsize::new(0);
        let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(THREADS_MAX);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let (mut content, mut open) = (Vec::new(), None);
                    while !stop.load(Ordering::Relaxed) {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        let Some(frame) = frames.get(at) else { break };
                        let is_there = self.put_together(frame, &mut content, &mut open).is_some()
                            && blake3::hash(&content).as_bytes() == &frame.blake3;
                        needed[at].store(!is_there, Ordering::Relaxed);
                        let _ = done.send(frame.content_length.into()); // nobody follows any more
                    }
                });
            }
        });
        needed.into_iter().map(AtomicBool::into_inner).collect()
    }

    /// Replaces `content` by what the frame should hold, as far as files and headers tell; `None` if they do not.
    fn put_together(&self, frame: &FrameAt, content: &mut Vec<u8>, open: &mut Option<(usize, File)>) -> Option<()> {
        let (from, length) = (frame.content_offset, frame.content_length as usize);
        let to = from + length as u64;
        content.clear();
        content.resize(length, 0);
        let entries = &self.archive.entries;
        // The first whose bytes, padding included, end behind the frame's beginning.
        let first = entries.partition_point(|entry| padded_end(entry) <= from);
        for (index, entry) in entries.iter().enumerate().skip(first) {
            let header = entry.offset.checked_sub(BLOCK as u64)?;
            if header >= to {
                break;
            }
            let before = index.checked_sub(1).map_or(0, |before| padded_end(&entries[before]));
            if before != header {
                return None; // extended headers lie in between
            }
            if entry.offset > from {
                let header_bytes = self.header(entry)?;
                overlay(content, from, header, &header_bytes);
            }
            let (begin, end) = (entry.offset.max(from), (entry.offset + entry.size).min(to));
            if entry.kind() != Kind::File || begin >= end {
                continue;
            }
            if (self.is_held)(self.archive, entry) {
                return None;
            }
            let file = self.file(index, open)?;
            let place = content.get_mut((begin - from) as usize..(end - from) as usize)?;
            file.read_exact_at(place, begin - entry.offset).ok()?;
        }
        Some(())
    }

    fn file<'a>(&self, index: usize, open: &'a mut Option<(usize, File)>) -> Option<&'a File> {
        if open.as_ref().is_none_or(|(at, _)| *at != index) {
            let path: PathBuf = self.root.join(OsStr::from_bytes(&self.archive.entries[index].path));
            let no_link = rustix::fs::OFlags::NOFOLLOW.bits();
            #[allow(clippy::cast_possible_wrap, reason = "a flag far below the sign")]
            let file = File::options().read(true).custom_flags(no_link as i32).open(path).ok()?;
            *open = Some((index, file));
        }
        open.as_ref().map(|(_, file)| file)
    }

    /// The header that Postgres writes before this member.
    fn header(&self, entry: &proto::Entry) -> Option<[u8; BLOCK]> {
        let mut header = **self.template.as_ref()?;
        header[..100].fill(0);
        let is_file = entry.kind() == Kind::File;
        let name = header.get_mut(..entry.path.len() + usize::from(!is_file)).filter(|name| name.len() < 100)?;
        name[..entry.path.len()].copy_from_slice(&entry.path);
        if !is_file {
            name[entry.path.len()] = b'/';
        }
        number(&mut header[100..108], entry.mode.into());
        number(&mut header[124..136], if is_file { entry.size } else { 0 });
        number(&mut header[136..148], u64::try_from(entry.modified).ok()?);
        header[156] = match entry.kind() {
            Kind::File => b'0',
            Kind::Symlink => b'2',
            Kind::Directory => b'5',
        };
        header[157..257].fill(0);
        if entry.kind() == Kind::Symlink {
            header[157..256].get_mut(..entry.target.len())?.copy_from_slice(&entry.target);
        }
        // The sum is of a header that has blanks in the sum's place.
        header[148..156].fill(b' ');
        let sum = header.iter().map(|byte| u64::from(*byte)).sum();
        number(&mut header[148..156], sum);
        Some(header)
    }
}

/// Where the next member's header begins.
fn padded_end(entry: &proto::Entry) -> u64 {
    (entry.offset + entry.size).next_multiple_of(BLOCK as u64)
}

/// Lays the bytes that begin at `at` over the part of `content`, which begins at `from`, that they fall on.
fn overlay(content: &mut [u8], from: u64, at: u64, bytes: &[u8]) {
    for (offset, byte) in (at..).zip(bytes) {
        let place = offset.checked_sub(from).and_then(|place| content.get_mut(usize::try_from(place).ok()?));
        if let Some(place) = place {
            *place = *byte;
        }
    }
}

/// Octal digits and a blank, or, if they are too few, the number itself behind a marker. (Postgres: `print_tar_number`.)
fn number(place: &mut [u8], value: u64) {
    let digits = place.len() - 1;
    if value < 1 << (digits * 3) {
        place[digits] = b' ';
        let mut rest = value;
        for digit in place[..digits].iter_mut().rev() {
            *digit = b'0' + (rest & 7) as u8; // below 8
            rest >>= 3;
        }
    } else {
        let bytes = value.to_be_bytes();
        place.fill(0);
        for (byte, value) in place.iter_mut().rev().zip(bytes.into_iter().rev()) {
            *byte = value;
        }
        place[0] = 0x80;
    }
}
