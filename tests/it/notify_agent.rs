//! People are told once, whatever dies, and whatever is away: the loop with its journal, its records and its channels.

use std::fs;
use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use walguard::detect::incident::{Incident, Signature};
use walguard::notify::Configs;
use walguard::repo::RepoError;
use walguard::serve::status::{Board, Status};
use walguard::supervisor::notify::Notifier;

use crate::archived_wal::bare_repository;
use crate::harness::{Agent, Answer, Cluster, Receiver, Scratch, wait_for};
use crate::notify::{setting, wipe};

const DEADLINE: Duration = Duration::from_secs(60);

/// A running loop.
struct Running {
    incidents: mpsc::Sender<Incident>,
    board: Board,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn start(settings: &str, repo: &Path, spool: &Path) -> Self {
        let configs: Configs = toml::from_str(settings).unwrap();
        let board = Board::default();
        let notifier = Notifier::new(&configs, bare_repository(repo), spool, setting(), board.clone()).unwrap();
        let (incidents, told) = mpsc::channel(16);
        let stop = CancellationToken::new();
        let ends = stop.clone();
        let task = tokio::spawn(async move { notifier.run(told, ends).await.unwrap() });
        Self { incidents, board, stop, task }
    }

    fn channel(&self, name: &str) -> walguard::notify::queue::ChannelStatus {
        self.board.snapshot(Timestamp::now()).notify.channels.get(name).cloned().unwrap_or_default()
    }

    /// Everything that was told is recorded in the repository.
    async fn is_recorded(&self, channel: &str, count: u64) {
        let is = || async {
            self.channel(channel).delivered_total == count
                && self.board.snapshot(Timestamp::now()).notify.unrecorded == 0
        };
        wait_for("the records of what was told", DEADLINE, is).await;
    }

    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// As a process that is killed: nothing is finished.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await; // that it was aborted
    }
}

fn hook(receiver: &Receiver) -> String {
    format!("[hook]\nkind = \"webhook\"\ntimeout = \"1s\"\nurl = \"{}\"\n", receiver.url())
}

async fn wait_until(what: &str, receiver: &Receiver, count: usize) {
    wait_for(what, DEADLINE, || async { receiver.received().len() >= count }).await;
}

fn deliveries(receiver: &Receiver) -> Vec<String> {
    receiver.received().iter().map(|received| received.header("x-walguard-delivery").to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incident_is_told_once_over_restarts_and_on_a_machine_without_the_spool() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    let incident = bare_repository(&repo).put_incident(&wipe(0, Timestamp::now())).await.unwrap();
    for (number, spool) in [spool.clone(), spool, scratch.dir("another-machine")].into_iter().enumerate() {
        let running = Running::start(&hook(&receiver), &repo, &spool);
        // The detector reads the WAL again, and comes to the same incident.
        running.incidents.send(incident.clone()).await.unwrap();
        if number == 0 {
            running.is_recorded("hook", 1).await;
        } else {
            // A second incident comes after whatever would be told of the first.
            let next = bare_repository(&repo).put_incident(&wipe(number as u64, Timestamp::now())).await.unwrap();
            running.incidents.send(next).await.unwrap();
            running.is_recorded("hook", 1).await;
        }
        running.stop().await;
    }
    let mut told = deliveries(&receiver);
    told.sort();
    let expected = [0, 1, 2].map(|n| format!("main/{}/hook/opened", wipe(n, Timestamp::now()).id));
    assert_eq!(told, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_that_was_killed_had_not_told_is_told_by_the_next_and_is_late() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    // Detected an hour ago, written, and then the agent was killed.
    let detected_at = Timestamp::now() - SignedDuration::from_hours(1);
    bare_repository(&repo).put_incident(&wipe(0, detected_at)).await.unwrap();
    let running = Running::start(&hook(&receiver), &repo, &spool);
    running.is_recorded("hook", 1).await;
    running.stop().await;
    assert_eq!(receiver.received().len(), 1);
    let json = receiver.received()[0].json();
    assert!(json["late_seconds"].as_u64().unwrap() >= 3_600, "{json}");
    assert_eq!(json["repeated"], false);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_may_have_been_sent_when_the_agent_was_killed_is_sent_again_and_says_so() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    let incident = bare_repository(&repo).put_incident(&wipe(0, Timestamp::now())).await.unwrap();
    receiver.answer(Answer::Hang);
    let settings = hook(&receiver).replace("1s", "60s");
    let running = Running::start(&settings, &repo, &spool);
    running.incidents.send(incident).await.unwrap();
    wait_until("the first message", &receiver, 1).await;
    running.kill().await;
    receiver.answer(Answer::status(200));
    let running = Running::start(&settings, &repo, &spool);
    running.is_recorded("hook", 1).await;
    running.stop().await;
    let received = receiver.received();
    let repeated: Vec<_> = received.iter().map(|received| received.json()["repeated"].clone()).collect();
    assert_eq!(repeated, [Value::from(false), Value::from(true)]);
    assert_eq!(deliveries(&receiver)[0], deliveries(&receiver)[1], "under the same name");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_cut_after_the_message_was_taken_gives_a_repetition_that_can_be_told() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    receiver.answer(Answer::Cut);
    let running = Running::start(&hook(&receiver), &repo, &spool);
    let incident = bare_repository(&repo).put_incident(&wipe(0, Timestamp::now())).await.unwrap();
    running.incidents.send(incident).await.unwrap();
    wait_until("the first message", &receiver, 1).await;
    receiver.answer(Answer::status(200));
    running.is_recorded("hook", 1).await;
    running.stop().await;
    let received = receiver.received();
    let last = received.last().unwrap();
    assert_eq!(last.json()["repeated"], true);
    assert!(deliveries(&receiver).windows(2).all(|pair| pair[0] == pair[1]));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_alarm_goes_out_at_once_while_the_repository_is_away_and_once_when_it_is_back() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let spool = scratch.dir("spool");
    // A file where the folder should be.
    let repo = scratch.file("repo", "in the way");
    let incident = wipe(0, Timestamp::now());
    let running = Running::start(&hook(&receiver), &repo, &spool);
    running.incidents.send(incident.clone()).await.unwrap();
    wait_until("the message", &receiver, 1).await;
    let is_shown = || async { running.board.snapshot(Timestamp::now()).notify.trouble.is_some() };
    wait_for("the trouble in the status", DEADLINE, is_shown).await;
    assert_eq!(running.board.snapshot(Timestamp::now()).notify.unrecorded, 1);
    running.kill().await;

    // Killed, and the repository is still away: the local disk knows.
    let running = Running::start(&hook(&receiver), &repo, &spool);
    running.incidents.send(incident.clone()).await.unwrap();
    fs::remove_file(&repo).unwrap();
    let back = bare_repository(&scratch.dir("repo"));
    let is_recorded = || async { back.deliveries(&incident.id).await.is_ok_and(|told| told.len() == 1) };
    wait_for("the record in the repository", DEADLINE, is_recorded).await;
    running.incidents.send(wipe(1, Timestamp::now())).await.unwrap();
    wait_until("the next incident", &receiver, 2).await;
    running.stop().await;
    let told: Vec<_> = deliveries(&receiver);
    assert_eq!(told.len(), 2, "{told:?}");
    assert_ne!(told[0], told[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_hangs_keeps_nobody_else_from_hearing() {
    let (hangs, works, scratch) = (Receiver::start().await, Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    hangs.answer(Answer::Hang);
    let settings =
        format!("{}[other]\nkind = \"webhook\"\nurl = \"{}\"\n", hook(&hangs).replace("1s", "60s"), works.url());
    let running = Running::start(&settings, &repo, &spool);
    let repo = bare_repository(&repo);
    for number in 0..5 {
        let incident = repo.put_incident(&wipe(number, Timestamp::now())).await.unwrap();
        running.incidents.send(incident).await.unwrap();
    }
    running.is_recorded("other", 5).await;
    assert_eq!((hangs.received().len(), running.channel("hook").delivered_total), (1, 0));
    running.kill().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_somebody_wrote_into_the_repository_is_told_and_stops_the_escalation() {
    let (first, boss, scratch) = (Receiver::start().await, Receiver::start().await, Scratch::new());
    let (repo, spool) = (scratch.dir("repo"), scratch.dir("spool"));
    let escalation = format!("[boss]\nkind = \"webhook\"\nafter = \"20s\"\nurl = \"{}\"\n", boss.url());
    let running = Running::start(&(hook(&first) + &escalation), &repo, &spool);
    let repo = bare_repository(&repo);
    let [answered, ignored] = [0, 1].map(|number| wipe(number, Timestamp::now()));
    for incident in [&answered, &ignored] {
        let incident = repo.put_incident(incident).await.unwrap();
        running.incidents.send(incident).await.unwrap();
    }
    running.is_recorded("hook", 2).await;
    // As `walguard incidents ack` does.
    let acknowledge = |incident: Option<Incident>| {
        let mut incident = incident.unwrap();
        incident.acknowledge(Signature { by: "ada".into(), at: Timestamp::now(), note: None }).unwrap();
        Ok::<_, RepoError>(Some(incident))
    };
    repo.revise_incident(&answered.id, acknowledge).await.unwrap();
    running.is_recorded("hook", 3).await;
    assert_eq!(first.received()[2].json()["event"], "acknowledged");
    running.is_recorded("boss", 1).await;
    running.stop().await;
    assert_eq!(deliveries(&boss), [format!("main/{}/boss/opened", ignored.id)]);
}

/// What the agent says of itself, once it answers.
async fn status(agent: &Agent) -> Option<Status> {
    reqwest::get(agent.url("/status")).await.ok()?.json().await.ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_agent_tells_what_was_left_untold_and_its_status_says_what_is_late() {
    let cluster = Cluster::builder().start().await;
    let mut receiver = Receiver::start().await;
    receiver.down().await;
    let scratch = Scratch::new();
    let repo_folder = scratch.dir("repo");
    let builder = Agent::builder(&cluster, &format!("file://{}", repo_folder.display()));
    let settings = format!("[notify.hook]\nkind = \"webhook\"\nurl = \"{}\"\n", receiver.url());
    // Found by an agent that was killed before it could tell.
    let detected_at = Timestamp::now() - SignedDuration::from_mins(10);
    let incident = bare_repository(&repo_folder).put_incident(&wipe(0, detected_at)).await.unwrap();
    crate::harness::give_away(&repo_folder);
    let agent = builder.settings(&settings).arg("--no-backups").spawn();
    let is_late = || async {
        let Some(status) = status(&agent).await else { return false };
        status.attention().iter().any(|text| text.starts_with("1 alarm has not reached hook, since "))
    };
    wait_for("the status to say that an alarm is late", DEADLINE, is_late).await;
    receiver.up().await;
    wait_until("the message", &receiver, 1).await;
    let json = receiver.received()[0].json();
    assert_eq!(json["incident"], incident.id.as_str());
    assert!(json["late_seconds"].as_u64().unwrap() >= 600);
    let is_well = || async { status(&agent).await.is_some_and(|status| status.notify.channels["hook"].late == 0) };
    wait_for("the status to be well again", DEADLINE, is_well).await;
}
