//! Cuts a tar into frames as it passes, and notes which pages of which relations each of them holds. Pure.

use crate::pg::BLOCK_SIZE;
use crate::pg::Oid;
use crate::proto;

use super::BackupError;
use super::relation_file;
use super::relation_file::RelationFile;
use super::tar_index::Piece;
use super::tar_index::TarIndex;

/// Content of a frame. Small enough that one file, or a page of it, is cheap to fetch; large enough to compress as well
/// as the whole.
const FRAME_BYTES: u64 = 1 << 20;

/// More frames than this make manifests that do not fit comfortably in memory (40 bytes a frame): larger clusters get
/// larger frames.
const FRAMES_MAX: u64 = 262_144;

/// Bytes of content per frame for a cluster of so many bytes: 1 MiB up to 256 GiB, then doubled as often as needed, but
/// never more than half of a part, so that a frame fits into one however badly it compresses.
pub(super) fn frame_bytes(cluster_bytes: u64, part_bytes: u64) -> usize {
    let mut bytes = FRAME_BYTES;
    while cluster_bytes / bytes > FRAMES_MAX {
        bytes *= 2;
    }
    bytes.min(part_bytes / 2) as usize // parts are at most 1 GiB
}

/// Bytes of a tar, and the pages among them.
#[derive(Debug, Default)]
pub(super) struct Frame {
    pub(super) content: Vec<u8>,
    pub(super) pages: Vec<PageRun>,
}

impl Frame {
    /// Room for a frame of about so many bytes.
    pub(super) fn with_room(frame_bytes: usize) -> Self {
        Self { content: Vec::with_capacity(frame_bytes + BLOCK_SIZE), pages: Vec::new() }
    }

    pub(super) fn clear(&mut self) {
        self.content.clear();
        self.pages.clear();
    }
}

/// Pages of one relation that lie one behind the other in a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageRun {
    /// Which entry of the archive.
    pub(super) entry: usize,
    pub(super) file: RelationFile,
    /// Block number of the first page, within the relation.
    pub(super) first_block: u32,
    /// Where the first page begins in the frame.
    pub(super) at: usize,
    /// The last page may be partial.
    pub(super) length: usize,
}

/// Fills frames with a tar.
///
/// A page never straddles two frames: a frame that would end inside of a page takes the rest of it too. So pages can be
/// checked by frame, and one page can be read back with one frame.
#[derive(Debug)]
pub(super) struct Cutter {
    tar: TarIndex,
    tablespace: Option<Oid>,
    /// Where to cut.
    frame_bytes: usize,
    /// The relation whose file is passing.
    file: Option<RelationFile>,
    /// Entries looked at.
    entries_seen: usize,
    /// Bytes until the page that is passing ends; 0 between pages and outside of them.
    page_left: usize,
}

impl Cutter {
    pub(super) fn new(name: &str, tablespace: Option<Oid>, frame_bytes: usize) -> Self {
        let tar = TarIndex::new(name);
        Self { tar, tablespace, frame_bytes, file: None, entries_seen: 0, page_left: 0 }
    }

    pub(super) const fn tar(&self) -> &TarIndex {
        &self.tar
    }

    /// True if the frame should be cut off here.
    pub(super) const fn is_full(&self, frame: &Frame) -> bool {
        frame.content.len() >= self.frame_bytes && self.page_left == 0
    }

    /// Moves the beginning of `bytes` into the frame, until it is full, and answers the rest.
    pub(super) fn fill<'a>(&mut self, frame: &mut Frame, bytes: &'a [u8]) -> Result<&'a [u8], BackupError> {
        let mut rest = bytes;
        while !rest.is_empty() && !self.is_full(frame) {
            let room = match self.frame_bytes.saturating_sub(frame.content.len()) {
                0 => self.page_left,
                room => room,
            };
            let piece = self.tar.read(&rest[..room.min(rest.len())])?;
            if let Piece::Body { length, at } = piece {
                self.note_pages(frame, length, at);
            }
            let (taken, left) = rest.split_at(piece.length());
            frame.content.extend_from_slice(taken);
            rest = left;
        }
        Ok(rest)
    }

    /// The archive's members, once all of it has passed.
    pub(super) fn finish(self) -> Result<Vec<proto::Entry>, BackupError> {
        self.tar.finish()
    }

    fn note_pages(&mut self, frame: &mut Frame, length: usize, at: u64) {
        let entries = self.tar.entries();
        let Some(entry) = entries.last() else { return };
        if entries.len() != self.entries_seen {
            self.entries_seen = entries.len();
            self.file = relation_file::parse(&entry.path, self.tablespace);
        }
        let Some(file) = self.file else { return };
        let end = at + length as u64;
        let into_page = (end % BLOCK_SIZE as u64) as usize; // less than a page
        let page_rest = if into_page == 0 { 0 } else { BLOCK_SIZE - into_page };
        self.page_left = usize::try_from(entry.size - end).unwrap_or(usize::MAX).min(page_rest);
        match frame.pages.last_mut() {
            Some(run) if run.entry + 1 == entries.len() => run.length += length,
            _ => {
                let block = u32::try_from(at / BLOCK_SIZE as u64).unwrap_or(u32::MAX);
                let first_block = file.first_block.saturating_add(block);
                let at = frame.content.len();
                frame.pages.push(PageRun { entry: entries.len() - 1, file, first_block, at, length });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tar_of(files: &[(&str, usize)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, size) in files {
            let mut header = tar::Header::new_ustar();
            header.set_mode(0o600);
            header.set_mtime(0);
            header.set_size(*size as u64);
            let body: Vec<u8> = (0..*size).map(|at| (at / BLOCK_SIZE) as u8 + 1).collect();
            builder.append_data(&mut header, name, &body[..]).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn cut(tar: &[u8], slice: usize, frame_bytes: usize) -> Vec<Frame> {
        let mut cutter = Cutter::new("base", None, frame_bytes);
        let mut frames = vec![Frame::with_room(frame_bytes)];
        for bytes in tar.chunks(slice) {
            let mut rest = bytes;
            while !rest.is_empty() {
                if cutter.is_full(frames.last().unwrap()) {
                    frames.push(Frame::with_room(frame_bytes));
                }
                rest = cutter.fill(frames.last_mut().unwrap(), rest).unwrap();
            }
        }
        cutter.finish().unwrap();
        frames
    }

    #[test]
    fn frames_put_together_are_the_tar() {
        let tar = tar_of(&[("base/5/1", 100_000), ("other", 70_000), ("base/5/2", 3 * BLOCK_SIZE)]);
        for slice in [1, 511, 8192, 1 << 20] {
            for frame_bytes in [4096, 10_000, 65_536] {
                let frames = cut(&tar, slice, frame_bytes);
                let whole: Vec<u8> = frames.iter().flat_map(|f| f.content.iter().copied()).collect();
                assert!(whole == tar, "slices of {slice}, frames of {frame_bytes}");
                assert!(frames.iter().all(|f| f.content.len() < frame_bytes + BLOCK_SIZE));
            }
        }
    }

    #[test]
    fn a_page_never_straddles_two_frames() {
        let tar =
            tar_of(&[("a", 700), ("base/5/1", 20 * BLOCK_SIZE), ("b", 70_000), ("base/5/2.1", 2 * BLOCK_SIZE + 9)]);
        for slice in [100, 8192, 1 << 20] {
            let mut seen = Vec::new();
            for frame in cut(&tar, slice, 30_000) {
                for run in &frame.pages {
                    for (index, page) in frame.content[run.at..run.at + run.length].chunks(BLOCK_SIZE).enumerate() {
                        let block = run.first_block + index as u32;
                        assert!(page.iter().all(|b| u32::from(*b) == block % relation_file::SEGMENT_BLOCKS + 1));
                        seen.push((run.entry, block, page.len()));
                    }
                }
            }
            let first = (0..20).map(|block| (1, block, BLOCK_SIZE));
            let second = [(3, 131_072, BLOCK_SIZE), (3, 131_073, BLOCK_SIZE), (3, 131_074, 9)];
            assert_eq!(seen, first.chain(second).collect::<Vec<_>>());
        }
    }

    #[test]
    fn frames_grow_with_the_cluster_so_that_the_manifest_does_not() {
        assert_eq!(frame_bytes(0, 16 << 20), 1 << 20);
        assert_eq!(frame_bytes(256 << 30, 16 << 20), 1 << 20);
        assert_eq!(frame_bytes(1 << 40, 16 << 20), 4 << 20);
        assert_eq!(frame_bytes(u64::MAX, 16 << 20), 8 << 20);
        assert_eq!(frame_bytes(0, 1 << 20), 1 << 19);
    }
}
