//! `walguard wal-fetch` as a server uses it. The law behind all of these: nothing but the end of the archived WAL ever
//! looks like the end of the WAL.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use walguard::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

use super::harness::{
    Agent, Cluster, Fault, Finished, Ledger, S3, Scratch, StopMode, finish, give_away, restore, wait_for, walguard,
    walguard_command,
};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// How long a restore of some MiB may take on a busy machine.
const RESTORE_DEADLINE: Duration = Duration::from_secs(120);

const SEGMENT: usize = 1 << 20;

/// A cluster with archived WAL of some segments and a base backup in front of them.
struct World {
    cluster: Cluster,
    ledger: Ledger,
    agent: Agent,
    scratch: Scratch,
    env: Vec<(&'static str, String)>,
}

impl World {
    async fn new(repo: Option<&S3>, mib: u32) -> Self {
        let cluster = Cluster::builder().wal_segsize_mib(1).conf("wal_keep_size", "1GB").conf("autovacuum", "off");
        let cluster = cluster.start().await;
        let scratch = Scratch::new();
        let (url, env) = repo.map_or_else(|| (scratch.repo_url(), Vec::new()), |s3| (s3.repo_url(), s3.env()));
        let mut ledger = Ledger::create(&cluster, 3).await;
        let mut builder = Agent::builder(&cluster, &url).arg("--no-backups");
        for (name, value) in &env {
            builder = builder.env(name, value);
        }
        let mut agent = builder.spawn();
        agent.wait_streaming(&cluster).await;
        let mut backup = walguard_command(&["backup"]);
        finish({
            backup.args(agent.flags()).envs(env.iter().map(|(name, value)| (name, value)));
            backup
        })
        .expect(0);
        for _ in 0..mib {
            ledger.run(1).await;
            cluster.fill(1).await;
        }
        ledger.run(2).await;
        agent.wait_archived(&cluster, cluster.lsn().await, ARCHIVE_DEADLINE).await;
        Self { cluster, ledger, agent, scratch, env }
    }

    async fn segment(&self) -> SegmentName {
        SegmentName::at(TimelineId::FIRST, self.cluster.lsn().await, SegmentSize::new(SEGMENT as u64).unwrap())
    }

    fn object(&self, name: &SegmentName) -> PathBuf {
        self.scratch.join(format!("repo/main/wal/00000001/{name}.zst"))
    }

    fn fetch(&self, file: &str, path: &Path) -> Finished {
        self.fetch_with(file, path, &self.agent.flags())
    }

    fn fetch_with(&self, file: &str, path: &Path, flags: &[String]) -> Finished {
        let mut args = vec!["wal-fetch", "--no-prefetch", file, path.to_str().unwrap()];
        args.extend(flags.iter().map(String::as_str));
        walguard(&args)
    }

    /// What the server itself holds of a segment.
    fn original(&self, name: &SegmentName) -> Vec<u8> {
        fs::read(self.cluster.data_dir().join("pg_wal").join(name.to_string())).unwrap()
    }
}

fn back(name: &SegmentName, by: u64) -> SegmentName {
    SegmentName { number: walguard::pg::SegmentNumber::new(name.number.get() - by), ..*name }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_is_fetched_as_the_server_wrote_it_and_the_unfinished_one_is_filled_up_with_zeros() {
    let world = World::new(None, 3).await;
    let path = world.scratch.dir("pg_wal").join("RECOVERYXLOG");
    let last = world.segment().await;
    let whole = back(&last, 2);
    world.fetch(&whole.to_string(), &path).expect(0);
    assert!(fs::read(&path).unwrap() == world.original(&whole));

    world.fetch(&last.to_string(), &path).expect(0);
    let (fetched, original) = (fs::read(&path).unwrap(), world.original(&last));
    let end = (world.cluster.lsn().await - last.start()) as usize;
    assert_eq!(fetched.len(), SEGMENT);
    assert!(fetched[..end] == original[..end]);
    assert!(fetched[end.next_multiple_of(8192)..].iter().all(|byte| *byte == 0));
    assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a draft was left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_file_that_does_not_exist_looks_like_the_end_of_the_wal() {
    let world = World::new(None, 3).await;
    let path = world.scratch.dir("pg_wal").join("RECOVERYXLOG");
    let last = world.segment().await;
    for file in [last.next().to_string(), "00000002.history".into(), "backup_label.old".into()] {
        world.fetch(&file, &path).expect(1);
    }
    let wanted = back(&last, 2);
    let name = wanted.to_string();
    // What the settings or the command line say wrong.
    let broken = world.scratch.file("broken.toml", "cluster = 7\n");
    world.fetch_with(&name, &path, &["--config".into(), broken.to_str().unwrap().into()]).expect(126);
    world.fetch_with(&name, &path, &["--nonsense".into()]).expect(126);
    walguard(&["wal-fetch", "--help"]).expect(0);
    // A folder that is not mounted looks empty.
    let empty = format!("file://{}", world.scratch.dir("empty").display());
    let flags: Vec<String> = ["--repo", &empty, "--cluster", "main"].map(str::to_owned).into();
    let told = world.fetch_with(&name, &path, &flags).expect(126).stderr();
    assert!(told.contains("is not initialised"), "{told}");
    // A hole: later WAL is there.
    let object = world.object(&wanted);
    let intact = fs::read(&object).unwrap();
    fs::remove_file(&object).unwrap();
    let told = world.fetch(&name, &path).expect(126).stderr();
    assert!(told.contains("WAL is missing") && told.contains(&name), "{told}");
    // Damage, and WAL of another place.
    let mut flipped = intact.clone();
    flipped[intact.len() / 2] ^= 1;
    fs::write(&object, flipped).unwrap();
    world.fetch(&name, &path).expect(126);
    fs::copy(world.object(&back(&last, 1)), &object).unwrap();
    let told = world.fetch(&name, &path).expect(126).stderr();
    assert!(told.contains("is unusable") && told.contains("misplaced"), "{told}");
    assert!(!path.exists());
    // A place that cannot be written to.
    fs::write(&object, intact).unwrap();
    world.fetch(&name, Path::new("/nonexistent/RECOVERYXLOG")).expect(126);
    world.fetch(&name, &path).expect(0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_fetched_ahead_is_used_without_the_repository_and_never_if_it_is_damaged() {
    let world = World::new(None, 3).await;
    let pg_wal = world.scratch.dir("pg_wal");
    let (path, cache) = (pg_wal.join("RECOVERYXLOG"), pg_wal.join("walguard-prefetch"));
    fs::create_dir(&cache).unwrap();
    let wanted = back(&world.segment().await, 2);
    let content = world.original(&wanted);
    let cached = cache.join(format!("{wanted}.{:08x}", crc32c::crc32c(&content)));
    fs::write(&cached, &content).unwrap();
    give_away(&pg_wal);
    let nowhere = ["--repo", "file:///nonexistent", "--cluster", "main"].map(str::to_owned);
    world.fetch_with(&wanted.to_string(), &path, &nowhere).expect(0);
    assert!(fs::read(&path).unwrap() == content && !cached.exists());

    for damaged in [&content[..SEGMENT / 2], &[&content[..SEGMENT - 1], &[!content[SEGMENT - 1]]].concat()] {
        fs::write(&cached, damaged).unwrap();
        give_away(&pg_wal);
        world.fetch_with(&wanted.to_string(), &path, &nowhere).expect(126);
        fs::write(&cached, damaged).unwrap();
        give_away(&pg_wal);
        world.fetch(&wanted.to_string(), &path).expect(0);
        assert!(fs::read(&path).unwrap() == content && !cached.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_started_by_hand_recovers_by_itself_and_fetches_ahead() {
    let mut world = World::new(None, 12).await;
    assert!(world.agent.stop().await.success());
    let data = world.scratch.join("restored");
    let told = restore(&data, &world.agent.flags(), &["--to", "latest", "--no-start"]).expect(0).json();
    assert!(told["restore"]["running"].is_null());
    let mut server = Cluster::around(15, &data);
    server.start().await;
    let commits = world.ledger.commits().len() as i64;
    wait_for("the target", RESTORE_DEADLINE, || async {
        server.text("SELECT pg_get_wal_replay_pause_state()").await == "paused"
    })
    .await;
    world.ledger.assert_at(commits, &server.client().await).await;
    // The helper that the first fetch left behind had its part in it.
    assert!(data.join("pg_wal/walguard-prefetch/wanted").exists());
    server.stop(StopMode::Fast).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_goes_away_during_recovery_does_not_end_it() {
    let s3 = S3::start().await;
    let world = World::new(Some(&s3), 40).await;
    s3.fault(Fault::Slow(30));
    let scratch = Scratch::new();
    let data = scratch.join("data");
    let mut command = walguard_command(&["restore", "--yes", "--json", "--to", "latest", "--target-dir"]);
    command.arg(&data).args(["--action", "shutdown"]).args(world.agent.flags());
    command.envs(world.env.iter().map(|(name, value)| (name, value)));
    let output = fs::File::create(scratch.join("out")).unwrap();
    let errors = fs::File::create(scratch.join("err")).unwrap();
    let mut process = command.stdin(Stdio::null()).stdout(output).stderr(errors).spawn().unwrap();
    let text = |name: &str| fs::read_to_string(scratch.join(name)).unwrap_or_default();
    let log = data.join("walguard-restore.log");
    let begin = Instant::now();
    let placed = || fs::read_dir(data.join("pg_wal")).map_or(0, |files| files.flatten().filter(is_segment).count());
    while placed() < 3 {
        let ended = process.try_wait().unwrap();
        assert!(ended.is_none() && begin.elapsed() < RESTORE_DEADLINE, "{ended:?}\n{}{}", text("out"), text("err"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // Longer than what was fetched ahead lasts.
    s3.fault_for(Fault::Down, Duration::from_secs(6)).await;
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        assert!(begin.elapsed() < RESTORE_DEADLINE, "the restore does not end:\n{}", text("err"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    assert!(status.success(), "{}{}\n{}", text("out"), text("err"), fs::read_to_string(&log).unwrap_or_default());
    let told: serde_json::Value = serde_json::from_str(&text("out")).unwrap();
    assert_eq!(told["restore"]["reached"]["lsn"], told["plan"]["stop"]["reached"]);
    let waited = fs::read_to_string(&log).unwrap_or_default() + &text("err");
    assert!(waited.contains("will try again"), "the store was never away when somebody asked it:\n{waited}");
    let last = world.ledger.commits().last().unwrap();
    assert!(told["plan"]["stop"]["reached"].as_str().unwrap().parse::<Lsn>().unwrap() >= last.after);
}

fn is_segment(entry: &fs::DirEntry) -> bool {
    entry.file_name().len() == 24
}

#[tokio::test(flavor = "multi_thread")]
async fn damage_found_during_recovery_stops_it_instead_of_ending_it() {
    let mut world = World::new(None, 6).await;
    assert!(world.agent.stop().await.success());
    let data = world.scratch.join("restored");
    restore(&data, &world.agent.flags(), &["--to", "latest", "--no-start"]).expect(0);
    let object = world.object(&back(&world.segment().await, 3));
    fs::write(&object, "no zstd frame").unwrap();
    // A server with nothing to reach: for it any failure but this kind would be the end, and it would open.
    let auto = data.join("postgresql.auto.conf");
    let text = fs::read_to_string(&auto).unwrap();
    fs::write(&auto, text.replace("recovery_target_lsn = '", "#recovery_target_lsn = '")).unwrap();
    give_away(&auto);
    let mut server = Cluster::around(15, &data);
    server.launch();
    wait_for("the server's end", RESTORE_DEADLINE, || {
        let running = server.is_running();
        async move { !running }
    })
    .await;
    let log = server.log();
    assert!(log.contains("FATAL") && log.contains("could not restore file"), "{log}");
    assert!(!log.contains("archive recovery complete"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_through_s3_reaches_its_target() {
    let s3 = S3::start().await;
    let world = World::new(Some(&s3), 3).await;
    let commit = &world.ledger.commits()[2];
    for (name, value) in &world.env {
        assert!(!name.is_empty() && !value.is_empty());
    }
    let scratch = Scratch::new();
    let mut command = walguard_command(&["restore", "--yes", "--json", "--action", "shutdown", "--target-dir"]);
    command.arg(scratch.join("data")).args(["--to-xid", &commit.xid.to_string()]).args(world.agent.flags());
    command.envs(world.env.iter().map(|(name, value)| (name, value)));
    let told = finish(command).expect(0).json();
    assert_eq!(told["restore"]["reached"]["transaction"]["xid"].as_u64(), Some(commit.xid.into()));
    // Secrets are not written down.
    let settings = fs::read_to_string(scratch.join("data/walguard-restore.toml")).unwrap();
    for (name, value) in world.env.iter().filter(|(name, _)| name.contains("SECRET")) {
        assert!(!settings.contains(value.as_str()), "{name} is in {settings}");
    }
}
