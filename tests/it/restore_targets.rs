//! What cannot be restored is refused before anything is written: with what is wrong, what can be reached, and the right
//! exit code.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use jiff::Timestamp;
use walguard::pg::{Lsn, SegmentName, SegmentSize, TimelineId};

use super::harness::{
    Agent, Cluster, Finished, Ledger, Restored, Scratch, command, finish, give_away, program, restore, walguard,
};

/// How long the agent may take to archive what was just written, on a busy machine.
const ARCHIVE_DEADLINE: Duration = Duration::from_secs(60);

/// A repository with one base backup and the WAL of a ledger, and its server.
struct World {
    cluster: Cluster,
    ledger: Ledger,
    agent: Agent,
    scratch: Scratch,
    flags: Vec<String>,
    /// Before anything was written.
    before: Timestamp,
}

impl World {
    async fn new() -> Self {
        let before = Timestamp::now();
        let cluster = Cluster::builder().wal_segsize_mib(1).conf("autovacuum", "off").start().await;
        let scratch = Scratch::new();
        let mut ledger = Ledger::create(&cluster, 7).await;
        let mut agent = Agent::builder(&cluster, &scratch.repo_url()).arg("--no-backups").spawn();
        agent.wait_streaming(&cluster).await;
        let flags = agent.flags();
        ledger.run(3).await;
        let mut world = Self { cluster, ledger, agent, scratch, flags, before };
        world.backup();
        world.ledger.run(5).await;
        world
    }

    fn backup(&self) {
        let flags: Vec<&str> = self.flags.iter().map(String::as_str).collect();
        walguard(&[&["backup"], flags.as_slice()].concat()).expect(0);
    }

    /// Everything written so far is archived, and nothing more.
    async fn archive(&mut self) {
        let lsn = self.cluster.lsn().await;
        self.agent.wait_archived(&self.cluster, lsn, ARCHIVE_DEADLINE).await;
    }

    fn target_dir(&self) -> PathBuf {
        self.scratch.join("restored")
    }

    /// A restore that must be refused, with nothing written.
    fn refused(&self, args: &[&str], code: i32) -> String {
        let finished = restore(&self.target_dir(), &self.flags, args).expect(code);
        assert!(!self.target_dir().exists(), "something was written: {finished}");
        assert!(finished.stderr().contains("HINT: "), "no hint: {finished}");
        finished.stderr()
    }

    fn dry_run(&self, args: &[&str]) -> Finished {
        let mut all = args.to_vec();
        all.push("--dry-run");
        restore(&self.target_dir(), &self.flags, &all)
    }

    /// The object of the segment that holds a position of timeline 1.
    fn segment(&self, lsn: Lsn) -> (String, PathBuf) {
        let name = SegmentName::at(TimelineId::FIRST, lsn, SegmentSize::new(1 << 20).unwrap()).to_string();
        let path = self.scratch.join("repo/main/wal/00000001").join(format!("{name}.zst"));
        (name, path)
    }
}

fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_outside_of_what_is_archived_is_refused_with_the_nearest_reachable_moment() {
    let mut world = World::new().await;
    world.archive().await;
    let last = world.ledger.commits().last().unwrap().clone();

    let told = world.refused(&["--to", &world.before.to_string()], 1);
    assert_contains(&told, &["before the first backup is consistent", "the nearest reachable moment is 20"]);
    let told = world.refused(&["--to", "0/100000"], 1);
    assert_contains(&told, &["before the first backup is consistent", "HINT: --to 0/"]);

    let told = world.refused(&["--to", &(Timestamp::now() + Duration::from_secs(3_600)).to_string()], 75);
    assert_contains(&told, &["is not proved yet", "--to latest", &format!("{:.6}", last.time)]);
    let told = world.refused(&["--to", "F/0"], 75);
    assert_contains(&told, &["WAL up to F/0 is not archived yet"]);

    let xid = (last.xid + 1000).to_string();
    let told = world.refused(&["--to-xid", &xid], 1);
    assert_contains(&told, &[&format!("the end of transaction {xid} is not in the archived WAL")]);
    let told = world.refused(&["--to", "name:nowhere"], 1);
    assert_contains(&told, &["restore point `nowhere` is not in the archived WAL"]);
    let told = world.refused(&["--to", "latest", "--timeline", "9"], 1);
    assert_contains(&told, &["there is no timeline 9"]);
    let told = world.refused(&["--to", "latest", "--backup", "nonesuch"], 1);
    assert_contains(&told, &["there is no backup `nonesuch`"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_is_not_one_moment_is_wrong_usage_and_shows_both_readings() {
    let scratch = Scratch::new();
    let settings = scratch.file("walguard.toml", "cluster = \"main\"\n[time]\nzone = \"Asia/Jerusalem\"\n");
    let flags = ["--config", settings.to_str().unwrap(), "--repo", &scratch.repo_url()].map(str::to_owned);
    let told = |to: &str| restore(&scratch.join("restored"), &flags, &["--to", to]).expect(2).stderr();
    let ambiguous = told("2025-10-26 01:30");
    assert_contains(
        &ambiguous,
        &["came twice", "2025-10-26T01:30:00+03:00", "2025-10-26T01:30:00+02:00", "HINT: say which"],
    );
    assert_contains(&told("2025-03-28 02:30"), &["was skipped in Asia/Jerusalem", "HINT: say which"]);
    assert_contains(&told("yesterday"), &["no target that walguard understands", "HINT: "]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_given_twice_is_refused_with_its_places_and_once_is_reached() {
    let mut world = World::new().await;
    world.cluster.text("SELECT pg_create_restore_point('once')").await;
    let kept = world.ledger.commits().len() as i64;
    world.cluster.text("SELECT pg_create_restore_point('twice')").await;
    world.ledger.run(1).await;
    world.cluster.text("SELECT pg_create_restore_point('twice')").await;
    world.ledger.run(1).await;
    world.archive().await;
    let told = world.refused(&["--to-name", "twice"], 1);
    assert_contains(&told, &["there are 2 restore points `twice`", "HINT: say which one by its position: --to 0/"]);
    let mut restored = Restored::run(&world.flags, &["--to", "name:once"]);
    world.ledger.assert_at(kept, &restored.client().await).await;
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_behind_the_last_commit_is_reached_once_a_later_record_proves_that_nothing_was_committed() {
    let mut world = World::new().await;
    // While a transaction is under way nobody can say that the server is quiet.
    let open = world.cluster.client().await;
    open.batch_execute("BEGIN; SELECT txid_current()").await.unwrap();
    world.archive().await;
    // The server's clock goes on, and a checkpoint tells of it.
    let target = pass_a_moment().await;
    world.refused(&["--to", &target.to_string()], 75);
    world.cluster.sql("SELECT txid_current(); CHECKPOINT").await;
    world.archive().await;
    let commits = world.ledger.commits().len() as i64;
    let mut restored = Restored::run(&world.flags, &["--to", &target.to_string()]);
    world.ledger.assert_at(commits, &restored.client().await).await;
    restored.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_time_at_which_the_server_was_quiet_is_reached_without_another_record() {
    let mut world = World::new().await;
    world.archive().await;
    let target = pass_a_moment().await;
    let now = |world: &World| world.dry_run(&["--to", &target.to_string()]).code();
    super::harness::wait_for("the proof that the server was quiet", ARCHIVE_DEADLINE, || async { now(&world) == 0 })
        .await;
    // What was proved outlives the agent, whether it ends well or not.
    world.agent.sigkill();
    assert_eq!(now(&world), 0);
    world.agent.spawn_again();
    world.agent.wait_streaming(&world.cluster).await;
    assert!(world.agent.stop().await.success());
    let commits = world.ledger.commits().len() as i64;
    let mut restored = Restored::run(&world.flags, &["--to", &target.to_string()]);
    world.ledger.assert_at(commits, &restored.client().await).await;
    restored.stop().await;
}

/// A moment from now on, which is past when this returns.
async fn pass_a_moment() -> Timestamp {
    let target = Timestamp::now() + Duration::from_millis(500);
    super::harness::wait_for("the target's time", ARCHIVE_DEADLINE, || async {
        Timestamp::now() > target + Duration::from_secs(1)
    })
    .await;
    target
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_or_missing_wal_is_named_and_refused_and_what_lies_before_it_is_reached() {
    let mut world = World::new().await;
    let before = world.ledger.commits().last().unwrap().clone();
    world.cluster.fill(2).await;
    let (hole, after) = (world.cluster.lsn().await, world.cluster.fill(2));
    after.await;
    world.ledger.run(2).await;
    world.archive().await;
    world.cluster.text("SELECT pg_switch_wal()").await;
    world.ledger.run(1).await;
    world.archive().await;
    let (name, path) = world.segment(hole);
    // Without its tails, too, which would stand in for it.
    let tails = path.with_file_name(format!("{name}.tail"));
    let is_alone = || path.exists() && fs::read_dir(&tails).map_or(0, Iterator::count) == 0;
    super::harness::wait_for("the segment to be there as a whole", ARCHIVE_DEADLINE, || async { is_alone() }).await;
    assert_eq!(world.dry_run(&["--to", "latest"]).code(), 0);

    let intact = fs::read(&path).unwrap();
    let mut flipped = intact.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    fs::write(&path, &flipped).unwrap();
    // An index would let a plan pass over the segment: whoever asks to verify is told of damage before anything is done.
    let told = world.refused(&["--to", "latest", "--verify"], 1);
    assert_contains(&told, &["is unusable", &name, "the nearest reachable moment is"]);
    fs::write(&path, &intact[..intact.len() / 3]).unwrap();
    assert_contains(&world.refused(&["--to", "latest", "--verify"], 1), &["is unusable", &name]);

    fs::remove_file(&path).unwrap();
    let told = world.refused(&["--to", "latest"], 1);
    assert_contains(&told, &["WAL of timeline 1 is missing from", "HINT: --to 0/"]);

    let mut restored = Restored::run(&world.flags, &["--to", &before.after.to_string()]);
    world.ledger.assert_at(before.number, &restored.client().await).await;
    restored.stop().await;

    // A backup behind the hole makes the rest reachable, and the hole has two sides.
    world.backup();
    world.ledger.run(1).await;
    world.archive().await;
    assert_eq!(world.dry_run(&["--to", "latest"]).code(), 0);
    let inside = (hole.bytes() + (1 << 20)).to_string();
    let inside = Lsn::new(inside.parse().unwrap()).to_string();
    assert_contains(
        &world.refused(&["--to", &inside], 1),
        &["is missing from", "the nearest reachable moments are", " and "],
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn only_a_free_directory_or_a_stopped_cluster_is_written_to() {
    let mut world = World::new().await;
    world.archive().await;
    let target = world.target_dir();
    let told = |args: &[&str]| restore(&target, &world.flags, args).expect(1).stderr();

    fs::create_dir(&target).unwrap();
    fs::write(target.join("thesis.tex"), "mine").unwrap();
    give_away(&target);
    assert_contains(&told(&["--to", "latest", "--overwrite"]), &["no PostgreSQL cluster", "HINT: "]);
    assert_eq!(fs::read_to_string(target.join("thesis.tex")).unwrap(), "mine");
    fs::remove_dir_all(&target).unwrap();

    // The running server itself.
    let data = world.cluster.data_dir().to_owned();
    let refused = restore(&data, &world.flags, &["--to", "latest", "--overwrite"]).expect(1).stderr();
    assert_contains(&refused, &["belongs to a server that runs"]);

    // A restored and stopped one: only if asked for.
    let args = ["--to", "latest", "--action", "shutdown"];
    restore(&target, &world.flags, &args).expect(0);
    fs::write(target.join("old"), "").unwrap();
    assert_contains(&told(&args), &["holds a cluster", "--overwrite"]);
    restore(&target, &world.flags, &["--to", "latest", "--action", "shutdown", "--overwrite"]).expect(0);
    assert!(!target.join("old").exists());

    // Programs of another major version.
    fs::remove_dir_all(&target).unwrap();
    let bin = world.scratch.dir("bin");
    let told = world.refused(&["--to", "latest", "--pg-bin-dir", bin.to_str().unwrap()], 1);
    assert_contains(&told, &["the programs of PostgreSQL 15 are not found", "--pg-bin-dir"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_server_is_not_put_where_another_one_listens() {
    let mut world = World::new().await;
    world.archive().await;
    let sockets = world.cluster.socket_dir().to_str().unwrap().to_owned();
    let port = world.cluster.port().to_string();
    let told = world.refused(&["--to", "latest", "--socket-dir", &sockets, "--port", &port], 1);
    assert_contains(&told, &["another server listens on", &sockets, "--socket-dir"]);
    let told = world.refused(&["--to", "latest", "--port", &port], 1);
    assert_contains(&told, &["is in use", "--port"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_restored_as_root_or_without_a_yes() {
    let mut world = World::new().await;
    world.archive().await;
    if rustix::process::geteuid().is_root() {
        let mut as_root = Command::new(program());
        as_root.args(["restore", "--to", "latest", "--yes", "--target-dir"]).arg(world.target_dir()).args(&world.flags);
        let finished = finish(as_root).expect(1);
        assert_contains(&finished.stderr(), &["cannot run as root", "HINT: run it as the user"]);
        assert!(!world.target_dir().exists());
    }
    let mut unasked = command(program());
    unasked.args(["restore", "--to", "latest", "--target-dir"]).arg(world.target_dir()).args(&world.flags);
    let finished = finish(unasked).expect(2);
    assert_contains(&finished.stderr(), &["nobody is there to confirm", "HINT: give --yes"]);
    assert!(!world.target_dir().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_tells_what_is_kept_and_what_is_lost() {
    let mut world = World::new().await;
    world.archive().await;
    let [kept, lost] = &world.ledger.commits()[5..7] else { panic!("two commits behind the backup") };
    let plan = world.dry_run(&["--to-xid", &kept.xid.to_string()]).expect(0).json()["plan"].clone();
    assert_eq!(
        (plan["kept"]["xid"].as_u64(), plan["lost"]["xid"].as_u64()),
        (Some(kept.xid.into()), Some(lost.xid.into()))
    );
    let exclusive = world.dry_run(&["--to-xid", &lost.xid.to_string(), "--exclusive"]).expect(0).json()["plan"].clone();
    assert_eq!(exclusive["kept"], plan["kept"]);
    assert_eq!(exclusive["lost"], plan["lost"]);
    let at = |time: &Timestamp, extra: &[&str]| {
        let to = format!("{time:.6}");
        let mut args = vec!["--to", &to];
        args.extend(extra);
        world.dry_run(&args).expect(0).json()["plan"]["kept"].clone()
    };
    assert_eq!(at(&kept.time, &[]), plan["kept"]);
    assert_eq!(at(&lost.time, &["--exclusive"]), plan["kept"]);
    assert!(!world.target_dir().exists());
}
