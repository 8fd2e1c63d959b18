//! PostgreSQL's own readers of WAL judge ours: `pg_walinspect` on every major, `pg_waldump` where it is installed.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use jiff::Timestamp;
use walguard::decode::rmgr::xlog::XlogRecord;
use walguard::decode::rmgr::{xact, xlog};
use walguard::decode::{Reader, Source, WalMajor};
use walguard::pg::{Lsn, PgTime, SegmentName, SegmentSize, ServerVersion, SystemId, TimelineId};

use super::harness::{Cluster, Ledger, command, finish, majors};

/// A record as all the readers know it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Line {
    lsn: Lsn,
    previous: Lsn,
    xid: u32,
    rmgr: String,
    length: u32,
}

/// What we read between two positions of a cluster's WAL.
#[derive(Debug, Default)]
struct Read {
    lines: Vec<Line>,
    /// Main data and page images, in bytes, by record.
    parts: BTreeMap<Lsn, (usize, usize)>,
    commits: BTreeMap<u32, PgTime>,
    points: Vec<String>,
    /// Whatever else carries the server's clock.
    times: Vec<(Lsn, PgTime)>,
    switches: usize,
    end: Lsn,
}

async fn busy_cluster(major: u32) -> (Cluster, Ledger) {
    let builder = Cluster::builder().major(major).wal_segsize_mib(1).conf("max_prepared_transactions", "5");
    let builder = builder.conf("wal_keep_size", "512MB").conf("autovacuum", "off");
    let cluster = builder.conf("wal_compression", "on").start().await;
    let ledger = Ledger::create(&cluster, 11).await;
    (cluster, ledger)
}

/// Everything that makes WAL of a kind of its own.
async fn work(cluster: &Cluster, ledger: &mut Ledger) {
    let client = cluster.client().await;
    client.batch_execute("CREATE EXTENSION IF NOT EXISTS pg_walinspect").await.unwrap();
    for statement in [
        "CREATE TABLE wide AS SELECT g AS id, repeat(md5(g::text), 100) AS text FROM generate_series(1, 500) g",
        "CREATE INDEX ON wide (md5(text))",
        "CREATE INDEX ON wide USING hash (id)",
        "BEGIN; INSERT INTO wide VALUES (-1, 'prepared'); PREPARE TRANSACTION 'one'",
        "BEGIN; INSERT INTO wide VALUES (-2, 'undone'); PREPARE TRANSACTION 'two'",
        "COMMIT PREPARED 'one'",
        "ROLLBACK PREPARED 'two'",
        "SELECT pg_create_restore_point('before the switch')",
        "SELECT pg_switch_wal()",
        "UPDATE wide SET text = text || 'x' WHERE id % 3 = 0",
        "CREATE SEQUENCE numbers; SELECT nextval('numbers')",
        "CHECKPOINT",
        "DELETE FROM wide WHERE id % 5 = 0",
        "DROP TABLE IF EXISTS gone; CREATE TABLE gone (i int); INSERT INTO gone VALUES (1)",
        "TRUNCATE gone",
        "DROP TABLE gone",
    ] {
        client.batch_execute(statement).await.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
    for statement in ["VACUUM FREEZE wide", "DROP TABLE wide"] {
        client.simple_query(statement).await.unwrap();
    }
    ledger.run(20).await;
    // Records that cross many pages, and a segment.
    cluster.fill(3).await;
    ledger.run(1).await;
}

fn read(cluster: &Cluster, from: Lsn, to: Lsn, system_id: u64) -> Read {
    let size = SegmentSize::new(1 << 20).unwrap();
    let major = WalMajor::of_server(ServerVersion::new(cluster.major() * 10_000)).unwrap();
    let source = Source { major, segment_size: size, system_id: Some(SystemId::new(system_id)) };
    let mut reader = Reader::at_page(source, size.start_of(size.segment_of(from)));
    let mut read = Read::default();
    let mut segment = SegmentName::at(TimelineId::FIRST, from, size);
    while segment.start() < to {
        let bytes = fs::read(cluster.data_dir().join("pg_wal").join(segment.to_string())).unwrap();
        let valid = (to - segment.start()).min(size.bytes()) as usize;
        for slice in bytes[..valid].chunks(10_007) {
            reader.push(slice);
            while let Some(record) = reader.next_record().unwrap() {
                if record.lsn < from {
                    continue;
                }
                read.end = record.end;
                read.lines.push(Line {
                    lsn: record.lsn,
                    previous: record.header.previous,
                    xid: record.header.xid.map_or(0, |xid| xid.get()),
                    rmgr: record.header.rmgr.name().to_owned(),
                    length: record.header.total_length,
                });
                let parts = record.parts().unwrap();
                let images =
                    parts.blocks().map(|block| block.unwrap().image.map_or(0, |image| image.bytes.len())).sum();
                read.parts.insert(record.lsn, (parts.main_data.len(), images));
                let end = xact::read(&record).unwrap();
                read.times.extend(end.map(|end| (record.lsn, end.time)));
                if let Some(end) = end.filter(|end| end.committed) {
                    read.commits.insert(end.xid.unwrap().get(), end.time);
                }
                match xlog::read(&record).unwrap() {
                    Some(XlogRecord::Checkpoint(checkpoint)) => read.times.push((record.lsn, checkpoint.time)),
                    Some(XlogRecord::RestorePoint(point)) => {
                        read.times.push((record.lsn, point.time));
                        read.points.push(String::from_utf8(point.name.to_vec()).unwrap());
                    }
                    Some(XlogRecord::Switch) => read.switches += 1,
                    _ => {}
                }
            }
        }
        segment = segment.next();
    }
    read
}

fn assert_same(ours: &[Line], theirs: &[Line]) {
    for (ours, theirs) in ours.iter().zip(theirs) {
        assert_eq!(ours, theirs);
    }
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.len() > 500, "{} records are no test", ours.len());
}

#[tokio::test]
async fn every_record_is_read_as_pg_walinspect_reads_it_on_every_major() {
    for major in majors() {
        let (cluster, mut ledger) = busy_cluster(major).await;
        let from = cluster.text("SELECT redo_lsn FROM pg_control_checkpoint()").await.parse().unwrap();
        work(&cluster, &mut ledger).await;
        let to: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
        let client = cluster.client().await;
        let system_id: i64 =
            client.query_one("SELECT system_identifier FROM pg_control_system()", &[]).await.unwrap().get(0);
        let ours = read(&cluster, from, to, system_id as u64);

        let sql = format!(
            "SELECT start_lsn::text, prev_lsn::text, xid::text, resource_manager, record_length, main_data_length, \
             fpi_length FROM pg_get_wal_records_info('{from}', '{to}')"
        );
        let rows = client.query(&sql, &[]).await.unwrap();
        let lsn = |text: String| text.parse::<Lsn>().unwrap();
        let theirs: Vec<_> = rows
            .iter()
            .map(|row| Line {
                lsn: lsn(row.get(0)),
                previous: lsn(row.get(1)),
                xid: row.get::<_, String>(2).parse().unwrap(),
                rmgr: row.get(3),
                length: row.get::<_, i32>(4) as u32,
            })
            .collect();
        assert_same(&ours.lines, &theirs);
        for row in &rows {
            let (main, images) = ours.parts[&lsn(row.get(0))];
            assert_eq!((main as i32, images as i32), (row.get(5), row.get(6)), "parts at {}", row.get::<_, String>(0));
        }
        for (lsn, time) in &ours.times {
            // The first is of the checkpoint that ended initdb.
            let plausible =
                PgTime::from("2025-01-01T00:00:00Z".parse::<Timestamp>().unwrap())..=Timestamp::now().into();
            assert!(plausible.contains(time), "the record at {lsn} carries {time}");
        }
        for commit in ledger.commits() {
            assert_eq!(ours.commits[&commit.xid], PgTime::from(commit.time), "PostgreSQL {major}");
        }
        assert_eq!((ours.points, ours.switches, ours.end), (vec!["before the switch".to_owned()], 1, to));
    }
}

#[tokio::test]
async fn every_record_and_commit_time_is_read_as_pg_waldump_reads_it() {
    let (cluster, mut ledger) = busy_cluster(15).await;
    let from: Lsn = cluster.text("SELECT redo_lsn FROM pg_control_checkpoint()").await.parse().unwrap();
    work(&cluster, &mut ledger).await;
    let to: Lsn = cluster.text("SELECT pg_current_wal_flush_lsn()").await.parse().unwrap();
    let system_id = cluster.number("SELECT system_identifier FROM pg_control_system()").await as u64;
    let ours = read(&cluster, from, to, system_id);

    let mut waldump: Command = command(cluster.bin("pg_waldump"));
    waldump.env("TZ", "UTC").arg("-p").arg(cluster.data_dir().join("pg_wal"));
    waldump.args(["-s", &from.to_string(), "-e", &to.to_string()]);
    let dump = finish(waldump).expect(0).stdout();
    let field = |line: &str, name: &str| {
        let rest = line.split_once(name).unwrap_or_else(|| panic!("{name} in {line}")).1;
        rest.trim_start().split([',', ' ']).next().unwrap().to_owned()
    };
    let mut commits = BTreeMap::new();
    let theirs: Vec<_> = dump
        .lines()
        .map(|line| {
            // An ordinary commit; of a prepared one the header has no transaction id.
            if let Some((_, time)) = line.split_once("desc: COMMIT ") {
                let time = time.split(" UTC").next().unwrap();
                let time: Timestamp = format!("{time}Z").parse().unwrap();
                commits.insert(field(line, "tx:").parse::<u32>().unwrap(), PgTime::from(time));
            }
            Line {
                lsn: field(line, "lsn:").parse().unwrap(),
                previous: field(line, "prev").parse().unwrap(),
                xid: field(line, "tx:").parse().unwrap(),
                rmgr: field(line, "rmgr:"),
                length: field(line.split_once("len (rec/tot):").unwrap().1, "/").parse().unwrap(),
            }
        })
        .collect();
    assert_same(&ours.lines, &theirs);
    assert!(commits.len() > 30);
    for (xid, time) in commits {
        assert_eq!(ours.commits[&xid], time, "transaction {xid}");
    }
}
