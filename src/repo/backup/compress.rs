//! Compresses, hashes and checks frames on all cores.

use std::num::NonZero;
use std::panic;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::pg::BLOCK_SIZE;
use crate::pg::Lsn;
use crate::repo::frame;

use super::frames::Frame;
use super::page_checksum;
use super::relation_file::RelationFile;

/// More compressors than this outrun any server and any store, and each holds buffers.
const COMPRESSORS_MAX: usize = 16;

/// Content of frames on their way through the compressors: enough to keep a few cores busy, little beside the parts.
const IN_FLIGHT_BYTES_MAX: usize = 24 << 20;

/// A frame, done. Its buffers are to be used again.
#[derive(Debug, Default)]
pub(super) struct Compressed {
    pub(super) frame: Frame,
    /// The zstd frame.
    pub(super) stored: Vec<u8>,
    /// BLAKE3 of the content.
    pub(super) hash: [u8; 32],
    pub(super) failed_pages: Vec<FailedPage>,
}

/// A page whose checksum is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FailedPage {
    /// Which entry of the archive.
    pub(super) entry: usize,
    pub(super) file: RelationFile,
    /// Within the relation.
    pub(super) block: u32,
    /// What the page says of its last change.
    pub(super) lsn: Lsn,
}

/// Threads that compress frames, each with a context of its own. They end when this is dropped.
#[derive(Debug)]
pub(super) struct Compressors {
    jobs: mpsc::Sender<Job>,
    /// Frames that may be submitted and not yet done.
    pub(super) in_flight_max: usize,
}

struct Job {
    frame: Frame,
    stored: Vec<u8>,
    done: oneshot::Sender<Compressed>,
}

impl Compressors {
    /// Starts as many as there are cores. They check pages if `check_pages`.
    pub(super) fn start(level: i32, check_pages: bool, frame_bytes: usize) -> Self {
        let count = std::thread::available_parallelism().map_or(1, NonZero::get).min(COMPRESSORS_MAX);
        let (jobs, queue) = mpsc::channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..count {
            let queue = Arc::clone(&queue);
            tokio::task::spawn_blocking(move || {
                let mut compressor = frame::Compressor::new(level);
                loop {
                    let Ok(next) = queue.lock().map(|queue| queue.recv()) else { return };
                    let Ok(job) = next else { return };
                    let done = compress(&mut compressor, job.frame, job.stored, check_pages);
                    let _ = job.done.send(done); // nobody waits any more: the backup was given up
                }
            });
        }
        // Each core has one frame in work and one waiting, and one is being put away.
        let in_flight_max = (2 * count + 1).min(IN_FLIGHT_BYTES_MAX / frame_bytes.max(1)).max(2);
        Self { jobs, in_flight_max }
    }

    /// Hands a frame in. `stored` is a buffer to use.
    pub(super) fn submit(&self, frame: Frame, stored: Vec<u8>) -> oneshot::Receiver<Compressed> {
        let (done, result) = oneshot::channel();
        // If all threads are gone, they panicked, and so will whoever waits for the result.
        let _ = self.jobs.send(Job { frame, stored, done });
        result
    }
}

/// The result of a frame handed in earlier.
///
/// # Panics
/// If the thread that had it panicked.
pub(super) async fn result(waiting: oneshot::Receiver<Compressed>) -> Compressed {
    match waiting.await {
        Ok(done) => done,
        Err(_) => panic::resume_unwind(Box::new("a thread that compresses frames panicked")),
    }
}

fn compress(compressor: &mut frame::Compressor, frame: Frame, mut stored: Vec<u8>, check_pages: bool) -> Compressed {
    stored.clear();
    compressor.compress_into(&frame.content, &mut stored);
    let hash = blake3::hash(&frame.content).into();
    let failed_pages = if check_pages { failed_pages(&frame) } else { Vec::new() };
    Compressed { frame, stored, hash, failed_pages }
}

/// Pages whose checksum is wrong, whatever may be the reason.
fn failed_pages(frame: &Frame) -> Vec<FailedPage> {
    let mut failed = Vec::new();
    for run in &frame.pages {
        let bytes = frame.content.get(run.at..run.at + run.length).unwrap_or_default();
        // A partial page at the end of a file was being written when the server read it; replay makes it whole.
        let (pages, _) = bytes.as_chunks::<BLOCK_SIZE>();
        for (page, block) in pages.iter().zip(run.first_block..) {
            if !page_checksum::is_intact(page, block) {
                failed.push(FailedPage { entry: run.entry, file: run.file, block, lsn: page_checksum::lsn(page) });
            }
        }
    }
    failed
}
