//! Spool files to zstd frames: read once, in pieces that stay in the processor's cache, with contexts and buffers that
//! are used again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation as _, OutBuffer};

/// Read and compressed at once. Fits the second-level cache of any server beside zstd's own tables, so that the bytes
/// are read from memory once.
const PIECE: usize = 256 << 10;

/// Compresses in any number of threads.
#[derive(Clone, Debug)]
pub(super) struct Compressors {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    level: i32,
    idle: Mutex<Vec<Worker>>,
    /// Output buffers whose objects are stored. There are as many as objects were ever on their way at once.
    buffers: Mutex<Vec<Vec<u8>>>,
}

struct Worker {
    encoder: Encoder<'static>,
    piece: Box<[u8]>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").finish_non_exhaustive()
    }
}

impl Compressors {
    pub(super) fn new(level: i32) -> Self {
        Self { inner: Arc::new(Inner { level, idle: Mutex::default(), buffers: Mutex::default() }) }
    }

    /// One frame, with content size and checksum, of `length` bytes of `file` from `from` on. Blocks.
    ///
    /// # Errors
    /// Of the file system; if the file is shorter than that; if there is no memory.
    pub(super) fn compress(&self, file: &File, from: u64, length: u64) -> io::Result<Bytes> {
        let idle = lock(&self.inner.idle).pop();
        let mut worker = match idle {
            Some(worker) => worker,
            None => Worker::new(self.inner.level)?,
        };
        let mut buffer = Buffer { bytes: lock(&self.inner.buffers).pop().unwrap_or_default(), home: self.clone() };
        buffer.bytes.clear();
        worker.compress(file, from, length, &mut buffer.bytes)?;
        lock(&self.inner.idle).push(worker);
        Ok(Bytes::from_owner(buffer))
    }
}

impl Worker {
    fn new(level: i32) -> io::Result<Self> {
        let mut encoder = Encoder::new(level)?;
        encoder.set_parameter(CParameter::ChecksumFlag(true))?;
        encoder.set_parameter(CParameter::ContentSizeFlag(true))?;
        Ok(Self { encoder, piece: vec![0; PIECE].into_boxed_slice() })
    }

    fn compress(&mut self, file: &File, from: u64, length: u64, out: &mut Vec<u8>) -> io::Result<()> {
        self.encoder.reinit()?;
        self.encoder.set_pledged_src_size(Some(length))?;
        let mut done = 0;
        while done < length {
            let piece = usize::try_from(length - done).unwrap_or(PIECE).min(PIECE);
            let (piece, _) = self.piece.split_at_mut(piece);
            file.read_exact_at(piece, from + done)?;
            done += piece.len() as u64;
            let mut input = InBuffer::around(piece);
            while input.pos() < input.src.len() {
                let at = make_room(out);
                self.encoder.run(&mut input, &mut OutBuffer::around_pos(out, at))?;
            }
        }
        loop {
            let at = make_room(out);
            if self.encoder.finish(&mut OutBuffer::around_pos(out, at), true)? == 0 {
                return Ok(());
            }
        }
    }
}

/// Leaves room behind the content of `out`, and answers where that begins.
fn make_room(out: &mut Vec<u8>) -> usize {
    if out.capacity() - out.len() < PIECE / 2 {
        out.reserve(PIECE); // at least doubles
    }
    out.len()
}

/// An output buffer that goes home when the last user of its bytes is done.
struct Buffer {
    bytes: Vec<u8>,
    home: Compressors,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        lock(&self.home.inner.buffers).push(std::mem::take(&mut self.bytes));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner) // each holder pushes or pops and does nothing else
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo::frame;
    use std::io::Write as _;

    #[test]
    fn any_part_of_a_file_becomes_one_plain_frame() {
        let mut file = tempfile::tempfile().unwrap();
        // Half of it compresses well, half not at all.
        let noise = std::iter::repeat_with(|| fastrand::u8(..)).take(1_500_000);
        let content: Vec<u8> = (0..1_500_000u32).map(|n| (n >> 12) as u8).chain(noise).collect();
        file.write_all(&content).unwrap();
        let compressors = Compressors::new(1);
        for range in [0..3_000_000, 0..1, 0..PIECE, 5..PIECE + 6, 1_499_000..2_999_999, 0..0] {
            let stored = compressors.compress(&file, range.start as u64, range.len() as u64).unwrap();
            assert_eq!(frame::content_size(&stored).unwrap(), Some(range.len() as u64));
            assert_eq!(frame::decompress(&stored, range.len()).unwrap(), &content[range]);
        }
        assert_eq!(lock(&compressors.inner.buffers).len(), 1, "one after the other, they need one buffer");
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"short").unwrap();
        let error = Compressors::new(1).compress(&file, 0, 6).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
