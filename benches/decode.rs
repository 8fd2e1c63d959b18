//! How fast WAL is understood, beside `pg_waldump --stats` on the same files in the same run, each on one core.
//!
//! ```text
//! cargo bench --bench decode -- FOLDER [PG_WALDUMP [REPETITIONS]]
//! ```
//!
//! `FOLDER` holds consecutive segments of one timeline; `scripts/bench decode` makes some. Reading the files, which lie in
//! the page cache, is part of both. Without arguments (as in a test run) it does nothing.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use walguard::decode::{Change, Reader, Source, WalMajor};
use walguard::pg::{SegmentName, SegmentSize};

/// What is pushed at once: the read buffer of the scan.
const PUSH: usize = 128 << 10;

#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    bytes: u64,
    records: u64,
    rows: u64,
}

#[derive(Clone, Copy)]
enum Depth {
    /// Records, with their checksums.
    Records,
    /// What each means.
    Changes,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let Some(folder) = args.first().filter(|arg| !arg.starts_with('-')) else { return };
    let waldump = args.get(1).map_or("pg_waldump", String::as_str);
    let repetitions = args.get(2).map_or(5, |text| text.parse().expect("a number of repetitions"));
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("the folder").map(|f| f.expect("a file").path()).collect();
    files.sort();
    let mut times: [Vec<Duration>; 3] = Default::default();
    let mut seen = Seen::default();
    for _ in 0..repetitions {
        let start = Instant::now();
        let (first, last) = (files.first().expect("a segment"), files.last().expect("a segment"));
        // It reports an error at the end of the last file, where there is no more WAL.
        Command::new(waldump).arg("--stats").args([first, last]).output().expect("pg_waldump runs");
        times[0].push(start.elapsed());
        for (place, depth) in [(1, Depth::Records), (2, Depth::Changes)] {
            let start = Instant::now();
            seen = decode(&files, depth);
            times[place].push(start.elapsed());
        }
    }
    println!("{} MB, {} records, {} rows", seen.bytes / 1_000_000, seen.records, seen.rows);
    let theirs = median(&mut times[0]);
    for (name, times) in ["pg_waldump --stats", "walguard records", "walguard changes"].iter().zip(&mut times) {
        let time = median(times);
        println!(
            "{name:<22} {:>7.1} ms  {:>6.2} GB/s  {:>6.2} M records/s  {:>5.2} x pg_waldump",
            time.as_secs_f64() * 1e3,
            seen.bytes as f64 / time.as_secs_f64() / 1e9,
            seen.records as f64 / time.as_secs_f64() / 1e6,
            theirs.as_secs_f64() / time.as_secs_f64(),
        );
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn source(first: &Path) -> (Source, SegmentName) {
    let mut head = [0; 40];
    File::open(first).and_then(|mut file| file.read_exact(&mut head)).expect("a page header");
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
    let segment_size = SegmentSize::new(u64::from(word(32))).expect("a segment size");
    let magic = u16::from_le_bytes([head[0], head[1]]);
    let major = WalMajor::of_page_magic(magic).expect("a major version");
    let name = first.file_name().and_then(|name| name.to_str()).expect("a name");
    (Source { major, segment_size, system_id: None }, SegmentName::parse(name, segment_size).expect("a segment's name"))
}

fn decode(files: &[PathBuf], depth: Depth) -> Seen {
    let (source, first) = source(&files[0]);
    let mut reader = Reader::at_page(source, first.start());
    let mut seen = Seen::default();
    let mut buffer = vec![0; PUSH];
    for path in files {
        let mut file = File::open(path).expect("a segment");
        loop {
            let read = file.read(&mut buffer).expect("a segment's bytes");
            if read == 0 {
                break;
            }
            seen.bytes += read as u64;
            reader.push(&buffer[..read]);
            while let Ok(Some(record)) = reader.next_record() {
                seen.records += 1;
                if matches!(depth, Depth::Changes) {
                    let change = Change::read(&record).expect("a record of Postgres");
                    if let walguard::decode::change::Action::Rows(rows) = change.action {
                        seen.rows += u64::from(rows.rows);
                    }
                }
            }
        }
    }
    seen
}
