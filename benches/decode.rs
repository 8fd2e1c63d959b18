//! How fast WAL is understood, beside `pg_waldump --stats` on the same files in the same run, each on one core.
//!
//! ```text
//! cargo bench --bench decode -- FOLDER [PG_WALDUMP [REPETITIONS]]
//! ```
//!
//! `FOLDER` holds consecutive segments of one timeline; `scripts/bench-decode` makes some of each kind. What is measured is
//! time on a processor, user's and system's together, as the scheduler counts it, so that others on the machine disturb
//! it less. Reading the files, which lie in the page cache, is part of both. The runs of all rows take turns. Without
//! arguments (as in a test run) it does nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use walguard::decode::catalog::{Catalog, CatalogRow, ClassRow};
use walguard::decode::change::{Action, FIRST_NORMAL_OID};
use walguard::decode::rows::RowPlace;
use walguard::decode::{Change, Reader, Record, Source, WalMajor};
use walguard::detect::names::{CatalogFile, Names, NamesLimits, Seed, SeedRow};
use walguard::detect::observer::Observer;
use walguard::detect::{Limits, Transaction, Transactions};
use walguard::pg::{Oid, RelFile, SegmentName, SegmentSize};

/// What is read at once, as the scan does.
const PUSH: usize = 128 << 10;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    records: u64,
    rows: u64,
    transactions: u64,
    /// Rows of finished transactions whose table is known.
    named: u64,
}

#[derive(Clone, Copy, Debug)]
enum Depth {
    /// Records, with their checksums.
    Records,
    /// What each means.
    Changes,
    /// Rows by transaction and table.
    Tallies,
    /// The same, names kept from the WAL, and what became of definitions: what the scan does.
    All,
}

const DEPTHS: [(Depth, &str); 4] = [
    (Depth::Records, "walguard, records"),
    (Depth::Changes, "walguard, changes"),
    (Depth::Tallies, "walguard, tallies"),
    (Depth::All, "walguard, names too"),
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let Some(folder) = args.first().filter(|arg| !arg.starts_with('-')) else { return };
    let waldump = args.get(1).map_or("pg_waldump", String::as_str);
    let repetitions = args.get(2).map_or(7, |text| text.parse().expect("a number of repetitions"));
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).expect("the folder").map(|f| f.expect("a file").path()).collect();
    files.sort();
    let tables = tables(&files);
    let mut theirs = Vec::new();
    let mut ours: [Vec<Duration>; DEPTHS.len()] = Default::default();
    let mut seen = Seen::default();
    for _ in 0..repetitions {
        theirs.push(run(waldump, &files));
        for ((depth, _), times) in DEPTHS.iter().zip(&mut ours) {
            let before = processor_time("self");
            seen = understand(&files, &tables, *depth);
            times.push(processor_time("self") - before);
        }
    }
    let Seen { bytes, records, rows, transactions, named } = seen;
    println!("{} MB, {records} records, {rows} rows, {named} of them named, {transactions} ends", bytes / 1_000_000);
    let (least, median) = least_and_median(&mut theirs);
    print("pg_waldump --stats", (least, median), (least, median), &seen);
    for ((_, name), times) in DEPTHS.iter().zip(&mut ours) {
        print(name, least_and_median(times), (least, median), &seen);
    }
}

/// Time that the first thread of a process, the only one here, has been on a processor.
fn processor_time(process: &str) -> Duration {
    let text = fs::read_to_string(format!("/proc/{process}/schedstat")).expect("the scheduler's figures");
    Duration::from_nanos(text.split(' ').next().and_then(|text| text.parse().ok()).expect("nanoseconds"))
}

/// Runs `pg_waldump --stats` on the files.
fn run(waldump: &str, files: &[PathBuf]) -> Duration {
    let (first, last) = (files.first().expect("a segment"), files.last().expect("a segment"));
    // It reports an error at the end of the last file, where there is no more WAL.
    let mut command = Command::new(waldump);
    command.arg("--stats").args([first, last]).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("pg_waldump runs");
    // Its figures are there as long as nobody has asked how it ended.
    let pid = Pid::from_child(&child);
    waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).expect("pg_waldump ends");
    let time = processor_time(&pid.to_string());
    child.wait().expect("pg_waldump ended");
    time
}

fn print(name: &str, time: (Duration, Duration), theirs: (Duration, Duration), seen: &Seen) {
    let ratio = |theirs: Duration, ours: Duration| theirs.as_secs_f64() / ours.as_secs_f64();
    println!(
        "{name:<20} least {:>6.1} ms, median {:>6.1} ms  {:>5.2} GB/s  {:>5.1} M records/s  {:>4.2} x pg_waldump ({:.2} by medians)",
        time.0.as_secs_f64() * 1e3,
        time.1.as_secs_f64() * 1e3,
        seen.bytes as f64 / time.0.as_secs_f64() / 1e9,
        seen.records as f64 / time.0.as_secs_f64() / 1e6,
        ratio(theirs.0, time.0),
        ratio(theirs.1, time.1),
    );
}

fn least_and_median(times: &mut [Duration]) -> (Duration, Duration) {
    times.sort();
    (times[0], times[times.len() / 2])
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

/// The files that rows of users' tables lie in.
fn tables(files: &[PathBuf]) -> BTreeSet<RelFile> {
    let mut tables = BTreeSet::new();
    each_record(files, |record| {
        if let Ok(Change { action: Action::Rows(rows), .. }) = Change::read(record)
            && !rows.is_surely_catalog()
        {
            tables.insert(rows.file);
        }
    });
    tables
}

/// Names as SQL tells them at start: those tables and as many of their kind as make a thousand, in each database.
fn names(major: WalMajor, tables: &BTreeSet<RelFile>) -> Names {
    let mut names = Names::new(major, NamesLimits::default());
    let databases: BTreeSet<Oid> = tables.iter().map(|file| file.database).collect();
    for database in databases {
        let own = tables.iter().filter(|file| file.database == database).map(|file| file.number);
        let others = (0..1000).map(|number| 3_000_000_000 + number);
        let classes = own.chain(others).map(|number| {
            CatalogRow::Class(ClassRow {
                oid: Oid(number),
                name: format!("table_{number}"),
                namespace: Oid(2200),
                file: number,
                tablespace: Oid(0),
                toast: Oid(0),
                persistence: b'p',
                kind: b'r',
                is_partition: false,
                rewrite: Oid(0),
            })
        });
        for catalog in Catalog::ALL {
            let rows: Vec<CatalogRow> = match catalog {
                Catalog::Class => classes.clone().collect(),
                Catalog::Namespace => vec![CatalogRow::Namespace { oid: Oid(2200), name: "public".to_owned() }],
                Catalog::Database => {
                    vec![CatalogRow::Database { oid: database, name: "bench".to_owned(), tablespace: Oid(1663) }]
                }
                _ => Vec::new(),
            };
            let (tablespace, of) = if catalog.is_shared() { (1664, Oid(0)) } else { (1663, database) };
            let file = RelFile { tablespace: Oid(tablespace), database: of, number: catalog.oid().0 };
            let place = |row: usize| RowPlace { block: row as u32, offset: 1 };
            let rows = rows.into_iter().enumerate();
            let rows = rows.map(|(index, row)| SeedRow { place: place(index), xmin: FIRST_NORMAL_OID, row }).collect();
            names.seed(Seed { of: CatalogFile { catalog, database: of }, file, rows });
        }
    }
    names
}

/// Gives each record to `see`. Lent all along: a record that is moved is copied.
fn each_record(files: &[PathBuf], mut see: impl FnMut(&Record<'_>)) -> Seen {
    let (source, first) = source(&files[0]);
    let mut reader = Reader::at_page(source, first.start());
    let mut seen = Seen::default();
    for path in files {
        let mut file = File::open(path).expect("a segment");
        loop {
            let read = reader.push_with(PUSH, |room| file.read(room)).expect("a segment's bytes");
            if read == 0 {
                break;
            }
            seen.bytes += read as u64;
            while let Ok(Some(record)) = &reader.next_record() {
                seen.records += 1;
                see(record);
            }
        }
    }
    seen
}

fn understand(files: &[PathBuf], tables: &BTreeSet<RelFile>, depth: Depth) -> Seen {
    let mut seen = Seen::default();
    let read = match depth {
        Depth::Records => each_record(files, |record| {
            black_box(record);
        }),
        Depth::Changes => each_record(files, |record| seen.change(&Change::read(record).expect("a known record"))),
        Depth::Tallies => {
            let names = names(source(&files[0]).0.major, tables);
            let mut transactions = Transactions::new(Limits::default(), true);
            each_record(files, |record| {
                let change = Change::read(record);
                let change = change.as_ref().expect("a known record");
                seen.change(change);
                if let Some(ended) = transactions.see(change, &names) {
                    seen.end(&ended);
                }
            })
        }
        Depth::All => {
            let names = names(source(&files[0]).0.major, tables);
            let mut observer = Observer::new(names, Limits::default(), true);
            each_record(files, |record| {
                let change = Change::read(record);
                let change = change.as_ref().expect("a known record");
                seen.change(change);
                if let Some(ended) = observer.see(record, change) {
                    seen.end(&ended);
                }
            })
        }
    };
    Seen { bytes: read.bytes, records: read.records, ..seen }
}

impl Seen {
    #[inline]
    fn change(&mut self, change: &Change<'_>) {
        if let Action::Rows(rows) = &change.action {
            self.rows += u64::from(rows.rows);
        }
    }

    fn end(&mut self, ended: &Transaction) {
        self.transactions += 1;
        for tally in ended.tallies.iter().filter(|tally| tally.relation.is_some()) {
            self.named += tally.counts.inserted + tally.counts.updated + tally.counts.deleted;
        }
    }
}
