//! Restores that are killed, and machines that go down: what is left never starts as something it is not, and the same
//! command goes on with it. And directories that hold much of what is wanted already: only the rest is fetched.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::harness::{
    Agent, Cluster, Ledger, Scratch, SmallDisk, StopMode, finish, restore, wait_for, walguard_command,
};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// How long a killed server may take to be gone.
const STOP_DEADLINE: Duration = Duration::from_secs(60);

/// A repository with a base backup of some tens of MiB and some WAL behind it.
struct World {
    cluster: Cluster,
    ledger: Ledger,
    agent: Agent,
    scratch: Scratch,
    random: fastrand::Rng,
}

impl World {
    async fn new() -> Self {
        let cluster = Cluster::builder().wal_segsize_mib(1).conf("autovacuum", "off").start().await;
        let scratch = Scratch::new();
        let mut ledger = Ledger::create(&cluster, 11).await;
        cluster
            .sql("CREATE TABLE large AS SELECT i, md5(i::text) a, md5((-i)::text) b FROM generate_series(1, 200000) i")
            .await;
        let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        ledger.run(2).await;
        let mut backup = walguard_command(&["backup"]);
        finish({
            backup.args(agent.flags());
            backup
        })
        .expect(0);
        for _ in 0..4 {
            ledger.run(3).await;
            cluster.fill(3).await;
        }
        ledger.run(2).await;
        agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
        // `latest` is the same moment from now on, so that the same command means the same restore.
        agent.stop().await;
        let seed = fastrand::u64(..);
        eprintln!("seed {seed}");
        Self { cluster, ledger, agent, scratch, random: fastrand::Rng::with_seed(seed) }
    }

    fn spawn(&self, dir: &Path, args: &[&str]) -> Child {
        let mut command = walguard_command(&["restore", "--yes", "--json", "--target-dir"]);
        command.arg(dir).args(args).args(self.agent.flags()).stdin(Stdio::null());
        command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    }

    /// The number of the last transaction of the ledger in the server of a finished restore, which is then stopped.
    async fn check_and_stop(&self, told: &serde_json::Value, dir: &Path) {
        let running = &told["restore"]["running"];
        let mut config = tokio_postgres::Config::new();
        config.host_path(running["socket_dir"].as_str().unwrap()).port(running["port"].as_u64().unwrap() as u16);
        let (client, connection) =
            config.user("postgres").dbname("postgres").connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection); // ends with the client
        self.ledger.assert_at(self.ledger.commits().len() as i64, &client).await;
        let fsync: String = client.query_one("SHOW fsync", &[]).await.unwrap().get(0);
        assert_eq!(fsync, "on", "a restore that is done left a server that does not sync");
        drop(client);
        stop_server(dir).await;
    }
}

/// The process of the server in a directory, if it lives.
fn server(dir: &Path) -> Option<Pid> {
    let text = fs::read_to_string(dir.join("postmaster.pid")).ok()?;
    let pid: i32 = text.lines().next()?.trim().parse().ok()?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let lives = !stat.rsplit_once(") ")?.1.starts_with('Z');
    Pid::from_raw(pid).filter(|_| lives)
}

async fn stop_server(dir: &Path) {
    if let Some(pid) = server(dir) {
        kill_process(pid, Signal::QUIT).unwrap();
        wait_for("the server's end", STOP_DEADLINE, || async { server(dir).is_none() }).await;
    }
}

fn control(dir: &Path) -> PathBuf {
    dir.join("global/pg_control")
}

/// Takes away what a power cut takes away: what was kept in memory.
fn cut_the_power(dir: &Path) {
    let Ok(memory) = fs::read_link(control(dir)) else { return };
    assert!(memory.starts_with("/dev/shm"), "{}", memory.display());
    fs::remove_dir_all(memory.parent().unwrap()).unwrap();
}

/// What `pg_ctl start` says of a directory in which no server must start.
fn refusal_to_start(cluster: &Cluster, dir: &Path) -> String {
    let mut postgres: Command = super::harness::command(cluster.bin("postgres"));
    postgres.arg("-D").arg(dir).args(["-c", "listen_addresses=", "-c", "unix_socket_directories="]);
    let begin = Instant::now();
    let ended = finish(postgres);
    assert!(begin.elapsed() < STOP_DEADLINE);
    assert_ne!(ended.code(), 0, "a server ran in a directory that was not finished");
    ended.stderr()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_that_is_killed_at_any_moment_leaves_nothing_that_lies_and_goes_on_when_run_again() {
    let mut world = World::new().await;
    let reference = world.scratch.join("reference");
    let begin = Instant::now();
    let told = restore(&reference, &world.agent.flags(), &["--to", "latest", "--action", "promote"]).expect(0).json();
    let mut took = begin.elapsed();
    world.check_and_stop(&told, &reference).await;
    assert!(fs::symlink_metadata(control(&reference)).unwrap().is_file());
    assert!(!reference.join("walguard-unfinished.json").exists());

    let (mut unfinished, mut cuts, mut resumed) = (0, 0, 0);
    // How long it takes depends on what else the machine does: what came too late is tried sooner.
    for round in 0..30 {
        if round >= 6 && unfinished >= 3 {
            break;
        }
        let dir = world.scratch.join(format!("killed-{round}"));
        let args: &[&str] =
            if round % 2 == 0 { &["--to", "latest"] } else { &["--to", "latest", "--action", "promote"] };
        for _ in 0..2 {
            let mut process = world.spawn(&dir, args);
            let pause = took.mul_f64(world.random.f64() * 0.9);
            tokio::time::sleep(pause).await;
            process.kill().unwrap();
            process.wait().unwrap();
            let note = dir.join("walguard-unfinished.json").exists();
            if !note {
                break; // nothing yet, or it was quicker than usual and is done
            }
            unfinished += 1;
            let is_done = fs::symlink_metadata(control(&dir)).is_ok_and(|file| file.is_file());
            if world.random.bool() && !is_done {
                stop_server(&dir).await;
                cut_the_power(&dir);
                let told = refusal_to_start(&world.cluster, &dir);
                assert!(!told.is_empty());
                cuts += 1;
            }
        }
        if !dir.join("walguard-unfinished.json").exists() && dir.join("PG_VERSION").exists() {
            stop_server(&dir).await;
            fs::remove_dir_all(&dir).unwrap();
            took = took.mul_f64(0.7);
            continue;
        }
        let told = restore(&dir, &world.agent.flags(), args).expect(0).json();
        resumed += u32::from(told["restore"]["extracted"]["kept_bytes"].as_u64().unwrap() > 0);
        world.check_and_stop(&told, &dir).await;
        assert!(fs::symlink_metadata(control(&dir)).unwrap().is_file());
        assert!(!dir.join("walguard-unfinished.json").exists());
    }
    eprintln!("killed before the end {unfinished} times, {cuts} power cuts, {resumed} went on with what was there");
    assert!(unfinished >= 3, "the kills came too late or too early to say anything");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_replayed_before_a_kill_is_gone_on_with_and_not_fetched_again() {
    let world = World::new().await;
    let dir = world.scratch.join("data");
    let mut process = world.spawn(&dir, &["--to", "latest"]);
    // As soon as the server is started.
    wait_for("the server", STOP_DEADLINE, || async { server(&dir).is_some() }).await;
    process.kill().unwrap();
    process.wait().unwrap();
    assert!(fs::symlink_metadata(control(&dir)).unwrap().is_symlink());
    // Another moment is another restore: the server is not stopped for it.
    let other = world.ledger.commits()[4].xid.to_string();
    let told = restore(&dir, &world.agent.flags(), &["--to-xid", &other]).expect(1).stderr();
    assert!(told.contains("unfinished restore to another moment") && told.contains("stop that server first"), "{told}");

    let told = restore(&dir, &world.agent.flags(), &["--to", "latest"]).expect(0).json();
    let extracted = &told["restore"]["extracted"];
    assert_eq!(extracted["stored_bytes"], 0, "{told}");
    assert_eq!(extracted["kept_bytes"], extracted["content_bytes"]);
    assert_eq!(told["restore"]["reached"]["lsn"], told["plan"]["stop"]["reached"]);
    world.check_and_stop(&told, &dir).await;
    // It is done: to the next it is a cluster like any other.
    let told = restore(&dir, &world.agent.flags(), &["--to", "latest"]).expect(1).stderr();
    assert!(told.contains("holds a cluster") && told.contains("--delta"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_to_the_latest_moment_goes_on_to_what_is_the_latest_by_then() {
    let mut world = World::new().await;
    let dir = world.scratch.join("data");
    let mut process = world.spawn(&dir, &["--to", "latest"]);
    wait_for("the server", STOP_DEADLINE, || async { server(&dir).is_some() }).await;
    // One restore at a time, whatever is meant.
    let first = Pid::from_raw(process.id().cast_signed()).unwrap();
    kill_process(first, Signal::STOP).unwrap();
    let told = restore(&dir, &world.agent.flags(), &["--to", "latest"]).expect(1).stderr();
    assert!(told.contains("being restored into by another process") && told.contains("HINT: "), "{told}");
    process.kill().unwrap();
    process.wait().unwrap();
    let orphan = server(&dir).expect("the server goes on without whoever started it");

    // Meanwhile more is archived.
    world.agent.spawn_again();
    world.agent.wait_streaming(&world.cluster).await;
    world.ledger.run(3).await;
    world.agent.wait_archived(&world.cluster, world.cluster.lsn().await, ARCHIVE_DEADLINE).await;
    let told = restore(&dir, &world.agent.flags(), &["--to", "latest"]).expect(0).json();
    let extracted = &told["restore"]["extracted"];
    assert_eq!(extracted["stored_bytes"], 0, "the base backup was there: {told}");
    assert_ne!(told["restore"]["running"]["pid"].as_i64(), Some(i64::from(orphan.as_raw_nonzero().get())));
    assert_eq!(told["restore"]["reached"]["lsn"], told["plan"]["stop"]["reached"]);
    world.check_and_stop(&told, &dir).await;
}

/// Files below a directory, with their content, but for those that a restore writes anew.
fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![PathBuf::new()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(dir.join(&folder)).unwrap().flatten() {
            let (kind, path) = (entry.file_type().unwrap(), folder.join(entry.file_name()));
            let name = entry.file_name().to_string_lossy().into_owned();
            assert!(!kind.is_fifo());
            if kind.is_dir() {
                files.insert(path.join(""), Vec::new());
                folders.push(path);
            } else if kind.is_symlink() {
                files.insert(path, b"a link".to_vec()); // to a tablespace
            } else if !name.starts_with("walguard-") && name != "postgresql.auto.conf" {
                files.insert(path, fs::read(entry.path()).unwrap());
            }
        }
    }
    files
}

/// A server that is promoted removes its signal file before it begins its new timeline. Ended in between, and started as it
/// is, it would write the timeline of the original.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ended_while_it_was_promoted_is_promoted_again() {
    let world = World::new().await;
    let (dir, args) = (world.scratch.join("data"), ["--to", "latest", "--action", "promote"]);
    let (note, signal) = (dir.join("walguard-unfinished.json"), dir.join("standby.signal"));
    for _ in 0..20 {
        let mut process = world.spawn(&dir, &args);
        let log = || fs::read_to_string(dir.join("walguard-restore.log")).unwrap_or_default();
        while !log().contains("redo starts at") && process.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        process.kill().unwrap();
        process.wait().unwrap();
        stop_server(&dir).await;
        if note.exists() && signal.exists() {
            break;
        }
        fs::remove_dir_all(&dir).unwrap(); // it was quicker
    }
    // What the two leave behind if they end then.
    let text = fs::read_to_string(&note).unwrap();
    assert!(text.contains("\"replay\""), "{text}");
    fs::write(&note, text.replace("\"replay\"", "\"promote\"")).unwrap();
    fs::remove_file(&signal).unwrap();
    let told = restore(&dir, &world.agent.flags(), &args).expect(0).json();
    assert!(told["restore"]["reached"]["timeline"].as_u64().unwrap() > 1, "{told:#}");
    world.check_and_stop(&told, &dir).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn over_a_stopped_cluster_only_what_differs_is_fetched_and_the_result_is_that_of_a_full_restore() {
    let mut world = World::new().await;
    let (full, delta) = (world.scratch.join("full"), world.scratch.join("delta"));
    let all = restore(&full, &world.agent.flags(), &["--to", "latest", "--no-start"]).expect(0).json();
    // The same cluster, some transactions later, and some damage.
    restore(&delta, &world.agent.flags(), &["--to", "latest", "--action", "shutdown"]).expect(0);
    let running = world.cluster.data_dir().to_owned();
    let told = restore(&running, &world.agent.flags(), &["--to", "latest", "--delta"]).expect(1).stderr();
    assert!(told.contains("belongs to a server that runs"), "{told}");
    fs::write(delta.join("base/left_behind"), "of nobody").unwrap();
    fs::create_dir(delta.join("base/4711")).unwrap();
    fs::write(delta.join("base/4711/1"), "of nobody").unwrap();
    fs::remove_file(delta.join("base/1/pg_filenode.map")).unwrap();
    let longer = fs::read(full.join("base/1/PG_VERSION")).unwrap();
    fs::write(delta.join("base/1/PG_VERSION"), [longer, b"more".to_vec()].concat()).unwrap();
    super::harness::give_away(&delta);

    let args = ["--to", "latest", "--no-start", "--delta"];
    let told = restore(&delta, &world.agent.flags(), &args).expect(0).json();
    let (part, whole) = (&told["restore"]["extracted"], &all["restore"]["extracted"]);
    let (fetched, everything) = (part["stored_bytes"].as_u64().unwrap(), whole["stored_bytes"].as_u64().unwrap());
    eprintln!("{fetched} bytes fetched instead of {everything}");
    assert!(fetched * 2 < everything, "{fetched} of {everything} bytes were fetched for a small change");
    assert!(part["kept_bytes"].as_u64().unwrap() > 0 && whole["kept_bytes"] == 0);
    let (expected, found) = (content(&full), content(&delta));
    let differing: Vec<_> = expected
        .iter()
        .filter(|(path, bytes)| found.get(*path) != Some(bytes))
        .map(|(path, _)| path)
        .chain(found.keys().filter(|path| !expected.contains_key(*path)))
        .collect();
    assert!(differing.is_empty(), "{differing:?}");

    // Another cluster's directory is not taken for this one's.
    let mut stranger = Cluster::builder().start().await;
    stranger.stop(StopMode::Fast).await;
    let told = restore(stranger.data_dir(), &world.agent.flags(), &args).expect(1).stderr();
    assert!(told.contains("holds another cluster") && told.contains("HINT: "), "{told}");
    world.ledger.run(1).await;
}

/// What lies outside of the data directory is kept, completed and cleaned up like what lies in it; others' files there stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_is_gone_on_with_and_brought_up_to_date_where_it_lies() {
    let cluster = Cluster::builder().wal_segsize_mib(1).conf("autovacuum", "off").start().await;
    let scratch = Scratch::new();
    let old = scratch.dir("old");
    let client = cluster.client().await;
    client.batch_execute(&format!("CREATE TABLESPACE side LOCATION '{}'", old.display())).await.unwrap();
    let rows = "SELECT i, md5(i::text) a, md5((-i)::text) b FROM generate_series(1, 200000) i";
    cluster.sql(&format!("CREATE TABLE beside TABLESPACE side AS {rows}")).await;
    cluster.sql("CREATE TABLE small TABLESPACE side AS SELECT 1 AS i").await;
    let small = cluster.text("SELECT pg_relation_filepath('small')").await;
    let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
    agent.wait_streaming(&cluster).await;
    let mut backup = walguard_command(&["backup"]);
    backup.args(agent.flags());
    finish(backup).expect(0);
    cluster.sql("INSERT INTO small VALUES (2)").await;
    agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
    agent.stop().await;
    let place = |name: &str| (scratch.join(name), scratch.join(format!("{name}-side")));
    let command = |name: &str, args: &[&str]| {
        let (dir, side) = place(name);
        let mut command = walguard_command(&["restore", "--yes", "--json", "--to", "latest", "--target-dir"]);
        command.arg(dir).args(args).args(agent.flags());
        command.args(["--tablespace", &format!("{}={}", old.display(), side.display())]);
        command
    };

    // A directory that has most of it, some damage, and what belongs to somebody else.
    finish(command("full", &["--no-start"])).expect(0);
    finish(command("delta", &["--action", "shutdown"])).expect(0);
    let (delta, delta_side) = place("delta");
    let in_side = small.strip_prefix("pg_tblspc/").unwrap().split_once('/').unwrap().1;
    fs::remove_file(delta_side.join(in_side)).unwrap();
    fs::write(delta_side.join(format!("{in_side}99")), "of nobody").unwrap();
    let others = delta_side.join("PG_9.6_201608131");
    fs::create_dir(&others).unwrap();
    fs::write(others.join("kept"), "of another server").unwrap();
    super::harness::give_away(&delta_side);
    let told = finish(command("delta", &["--no-start", "--delta"])).expect(0).json();
    let part = &told["restore"]["extracted"];
    let (kept, fetched) = (part["kept_bytes"].as_u64().unwrap(), part["stored_bytes"].as_u64().unwrap());
    assert!(kept > 20 << 20 && fetched < 10 << 20, "{kept} bytes kept, {fetched} fetched");
    assert_eq!(fs::read_to_string(others.join("kept")).unwrap(), "of another server");
    fs::remove_dir_all(&others).unwrap();
    let differing = |name: &str| {
        let (full, full_side) = place("full");
        let (dir, side) = place(name);
        let all = |dir: &Path, side: &Path| {
            let of_dir = content(dir).into_iter().filter(|(path, _)| !path.ends_with("tablespace_map"));
            of_dir.chain(content(side)).collect::<BTreeMap<_, _>>()
        };
        let (expected, found) = (all(&full, &full_side), all(&dir, &side));
        assert!(expected.keys().any(|path| path.ends_with(in_side)), "{:?}", expected.keys());
        let paths = expected.keys().chain(found.keys()).filter(|path| expected.get(*path) != found.get(*path));
        paths.cloned().collect::<Vec<_>>()
    };
    assert_eq!(differing("delta"), Vec::<PathBuf>::new());
    let map = fs::read_to_string(delta.join("tablespace_map")).unwrap();
    assert!(map.contains(delta_side.to_str().unwrap()), "{map}");

    // One that was killed on its way: as soon as it has begun, or a little later.
    let (killed, killed_side) = place("killed");
    let note = killed.join("walguard-unfinished.json");
    for round in 0..20 {
        let mut command = command("killed", &["--no-start"]);
        let mut process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !note.exists() && process.try_wait().unwrap().is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_millis(60 >> round)).await;
        process.kill().unwrap();
        process.wait().unwrap();
        if note.exists() {
            break;
        }
        fs::remove_dir_all(&killed).unwrap(); // it was quicker
        fs::remove_dir_all(&killed_side).unwrap();
    }
    assert!(note.exists(), "the kills came too late to say anything");
    finish(command("killed", &["--no-start"])).expect(0);
    assert_eq!(differing("killed"), Vec::<PathBuf>::new());
}

/// What the files of a backup take on a disk is not known before: each may waste the rest of a block, and WAL comes on top.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_gets_full_on_the_way_is_told_and_the_restore_goes_on_when_there_is_room() {
    let world = World::new().await;
    let Some(disk) = SmallDisk::mount(&world.scratch, "size=256m") else { return };
    let (dir, ballast) = (disk.path().join("data"), disk.path().join("ballast"));
    let plan = restore(&dir, &world.agent.flags(), &["--to", "latest", "--dry-run"]).expect(0).json();
    let needed = plan["plan"]["backup"]["content_bytes"].as_u64().unwrap();
    let free = rustix::fs::statvfs(disk.path()).map(|disk| disk.f_bavail * disk.f_frsize).unwrap();
    let taken = free - needed - (256 << 10);
    let file = fs::File::create(&ballast).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, taken).unwrap();

    let args = ["--to", "latest", "--action", "promote"];
    let told = restore(&dir, &world.agent.flags(), &args).expect(1).stderr();
    // Whoever comes to it first: the restore itself, or the server, which cannot even write that into its log.
    assert!(told.contains("No space left on device") || told.contains("HINT: its disk is full"), "{told}");
    assert!(told.contains("make room, and run the same command again: it goes on"), "{told}");
    drop(file);
    fs::remove_file(&ballast).unwrap();
    let told = restore(&dir, &world.agent.flags(), &args).expect(0).json();
    assert!(told["restore"]["extracted"]["kept_bytes"].as_u64().unwrap() > 0, "{told:#}");
    world.check_and_stop(&told, &dir).await;
}

/// Files of which the kernel has not written all to the disk: it has not even decided where. `None` where the file system does
/// not tell.
fn unwritten(dir: &Path) -> Option<Vec<PathBuf>> {
    const FILEFRAG: &str = "/usr/sbin/filefrag";
    let unwritten_of = |paths: Vec<PathBuf>| {
        let mut filefrag = super::harness::command(FILEFRAG);
        filefrag.arg("-v").args(&paths);
        let told = finish(filefrag).stdout();
        let (mut found, mut file) = (Vec::new(), PathBuf::new());
        for line in told.lines() {
            if let Some(name) = line.strip_prefix("File size of ") {
                file = name.rsplit_once(" is ").map_or(name, |(name, _)| name).into();
            } else if line.contains("delalloc") {
                found.push(file.clone());
            }
        }
        found
    };
    let probe = dir.join("walguard-probe");
    fs::write(&probe, vec![7; 100_000]).unwrap();
    super::harness::give_away(&probe);
    let tells = Path::new(FILEFRAG).exists() && unwritten_of(vec![probe.clone()]) == [probe.clone()];
    fs::remove_file(&probe).unwrap();
    let files = content(dir).into_keys().map(|path| dir.join(path)).filter(|path| path.is_file());
    tells.then(|| unwritten_of(files.collect()))
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_restore_is_done_all_of_it_is_on_the_disk() {
    let world = World::new().await;
    let dir = world.scratch.join("data");
    restore(&dir, &world.agent.flags(), &["--to", "latest", "--action", "shutdown"]).expect(0);
    assert!(fs::symlink_metadata(control(&dir)).unwrap().is_file());
    match unwritten(&dir) {
        Some(files) => assert_eq!(files, Vec::<PathBuf>::new(), "would be lost with the power"),
        None => eprintln!("this file system does not tell what is on the disk"),
    }
}
