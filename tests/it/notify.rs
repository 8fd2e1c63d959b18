//! Messages as real receivers get them: what each kind is sent, and what becomes of an answer that is late, wrong or none.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use walguard::detect::incident::{
    Incident, IncidentTransaction, Rows, Severity, Signature, State, TableDamage, TransactionState, incident_id,
};
use walguard::detect::{Actor, Who, WhoSource};
use walguard::notify::queue::{Next, Task};
use walguard::notify::{Channel, Config, Event, Message, Queue, Reach, SendError, Sending, Setting};
use walguard::pg::{Lsn, TimelineId, Xid};

use crate::harness::{Answer, Receiver, Scratch, walguard_command};

/// What a secret looks like that must be seen nowhere.
const HUSH: &str = "hush-hush-hush-0123456789abcdef";

pub(crate) fn setting() -> Setting {
    Setting { cluster: "main".to_owned(), reach: Reach::default(), zone: TimeZone::UTC }
}

/// A committed wipe of 18 tables, with names that every form of escaping must survive.
pub(crate) fn wipe(number: u64, at: Timestamp) -> Incident {
    let lsn = Lsn::new(0x1A2B_3C40 + number);
    let mut incident = Incident::new(incident_id(TimelineId::FIRST, lsn), TimelineId::FIRST, at);
    incident.state = State::Committed;
    incident.severity = Severity::Critical;
    incident.title = "18 tables emptied <!channel> & @everyone".to_owned();
    incident.first_harm = Some(lsn);
    incident.seen_to = lsn;
    for n in 0..18u64 {
        incident.tables.push(TableDamage {
            name: format!("shop.public.\"t{n} <b>`*_&\""),
            before: Some(Rows { count: 10 + n, exact: true }),
            after: Some(Rows { count: 0, exact: true }),
            deleted: 10 + n,
            ..TableDamage::default()
        });
    }
    let actor = Actor {
        role: Some("app_owner".to_owned()),
        application: Some("```<@U123>".to_owned()),
        pid: Some(4242),
        query: Some("DELETE FROM users -- ``` $(touch /tmp/x) `id`".to_owned()),
        ..Actor::default()
    };
    incident.transactions.push(IncidentTransaction {
        xid: Xid::new(4711),
        begin: lsn,
        lsn: Some(lsn),
        time: None,
        state: TransactionState::Committed,
        is_complete: true,
        inserted: 0,
        updated: 0,
        deleted: 333,
        who: Who { actor, source: WhoSource::Activity, note: None },
    });
    incident
}

fn message_of(incident: &Incident, event: Event) -> Message {
    let sending = Sending {
        channel: "oncall".to_owned(),
        event,
        key: event.name().to_owned(),
        due_at: incident.detected_at,
        late: None,
        repeated: false,
    };
    Message::of_incident(incident, &sending, &setting())
}

fn now() -> Timestamp {
    "2025-12-17T06:14:59.12Z".parse().unwrap()
}

pub(crate) fn open(toml: &str) -> Channel {
    Channel::open("oncall", &toml::from_str::<Config>(toml).unwrap()).unwrap()
}

async fn send(channel: &Channel, message: &Message) -> Result<(), SendError> {
    channel.send(message, &setting(), now()).await
}

#[tokio::test]
async fn a_webhook_is_signed_so_that_another_program_agrees() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let (key, token) = (scratch.file("key", HUSH), scratch.file("token", "bearer-token-1"));
    let channel = open(&format!(
        "kind = \"webhook\"\nurl = \"{}/hook?a=b\"\nsecret_file = {key:?}\ntoken_file = {token:?}",
        receiver.url()
    ));
    let message = message_of(&wipe(0, now()), Event::Opened);
    send(&channel, &message).await.unwrap();
    let received = receiver.received().remove(0);
    assert_eq!((received.path.as_str(), received.header("authorization")), ("/hook?a=b", "Bearer bearer-token-1"));
    assert_eq!(received.header("content-type"), "application/json");
    let delivery = "main/00000001-000000001A2B3C40/oncall/opened";
    assert_eq!((received.header("x-walguard-delivery"), received.header("idempotency-key")), (delivery, delivery));

    let signature = received.header("x-walguard-signature").to_owned();
    let (second, digest) = signature.strip_prefix("t=").unwrap().split_once(",v1=").unwrap();
    assert_eq!(second, now().as_second().to_string());
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-hmac", HUSH, "-r"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut openssl = openssl.spawn().unwrap();
    let mut stdin = openssl.stdin.take().unwrap();
    stdin.write_all(format!("{second}.").as_bytes()).unwrap();
    stdin.write_all(&received.body).unwrap();
    drop(stdin);
    let output = openssl.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap().split(' ').next(), Some(digest));
}

#[tokio::test]
async fn the_webhooks_json_has_what_the_readme_says_and_nothing_else() {
    let receiver = Receiver::start().await;
    let channel = open(&format!("kind = \"webhook\"\nurl = \"{}\"", receiver.url()));
    send(&channel, &message_of(&wipe(0, now()), Event::Opened)).await.unwrap();
    let json = receiver.received()[0].json();
    assert_eq!(
        (&json["severity"], &json["state"], &json["event"]),
        (&"critical".into(), &"committed".into(), &"opened".into())
    );
    assert_eq!((&json["committed"], &json["rows_lost"]), (&true.into(), &333.into()));
    assert_eq!(json["tables"].as_array().unwrap().len(), 18);
    assert_eq!(json["tables"][0]["before"]["count"], 27, "the worst first");
    assert!(json["commands"][0]["command"].as_str().unwrap().starts_with("walguard restore --to before:00000001-"));
    let readme = include_str!("../../README.md");
    let documented = readme.split("**The webhook's JSON**").nth(1).unwrap().split("and `text`").next().unwrap();
    for key in json.as_object().unwrap().keys().filter(|key| *key != "text") {
        assert!(documented.contains(&format!("`{key}`")), "the README does not tell of {key}");
    }
}

#[tokio::test]
async fn slack_is_mentioned_to_nobody_and_stays_within_its_limits() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let url = scratch.file("url", format!("{}/services/{HUSH}", receiver.url()));
    send(&open(&format!("kind = \"slack\"\nurl_file = {url:?}")), &message_of(&wipe(0, now()), Event::Opened))
        .await
        .unwrap();
    let received = receiver.received().remove(0);
    assert_eq!(received.path, format!("/services/{HUSH}"));
    let json = received.json();
    assert!(json["text"].as_str().unwrap().contains("&lt;!channel&gt; &amp; @everyone"));
    let blocks = json["blocks"].as_array().unwrap();
    assert!(blocks.len() <= 50);
    let header = blocks[0]["text"]["text"].as_str().unwrap();
    assert!(header.starts_with("CRITICAL main: 18 tables emptied") && header.chars().count() <= 150);
    for block in &blocks[1..] {
        let text = block["text"]["text"].as_str().or(block["elements"][0]["text"].as_str()).unwrap();
        assert!(text.chars().count() <= 3_000, "{}", text.len());
        assert!(!text.contains("<!channel>") && !text.contains("<@U123>"), "{text}");
        assert_eq!(text.matches("```").count() % 2, 0, "{text}");
    }
    let all = json.to_string();
    assert!(all.contains("27 -&gt; 0") && all.contains("walguard restore --to before:") && all.contains("app_owner"));
}

#[tokio::test]
async fn discord_is_mentioned_to_nobody_and_stays_within_its_limits() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    receiver.answer(Answer::status(204));
    let url = scratch.file("url", receiver.url());
    let channel = open(&format!("kind = \"discord\"\nurl_file = {url:?}"));
    let mut incident = wipe(0, now());
    incident.title = "*".repeat(190);
    incident.transactions[0].who.actor.query = Some("_".repeat(5_000));
    send(&channel, &message_of(&incident, Event::Opened)).await.unwrap();
    let json = receiver.received()[0].json();
    assert_eq!(json["allowed_mentions"]["parse"], serde_json::json!([]));
    let embed = &json["embeds"][0];
    let length = |value: &Value| value.as_str().unwrap().chars().count();
    assert!(length(&embed["title"]) <= 256 && length(&embed["description"]) <= 4_096);
    let fields = embed["fields"].as_array().unwrap();
    let mut sum = length(&embed["title"]) + length(&embed["description"]) + length(&embed["footer"]["text"]);
    for field in fields {
        assert!(length(&field["name"]) <= 256 && length(&field["value"]) <= 1_024);
        sum += length(&field["name"]) + length(&field["value"]);
    }
    assert!(fields.len() <= 25 && sum <= 6_000, "{sum}");
}

#[tokio::test]
async fn teams_gets_a_card_whose_data_is_no_markdown_and_that_is_small_enough() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    receiver.answer(Answer::status(202));
    let url = scratch.file("url", receiver.url());
    let channel = open(&format!("kind = \"teams\"\nurl_file = {url:?}"));
    let mut incident = wipe(0, now());
    for table in &mut incident.tables {
        table.name = format!("shop.public.{}", "\u{1F4A5}".repeat(200));
    }
    send(&channel, &message_of(&incident, Event::Opened)).await.unwrap();
    let received = receiver.received().remove(0);
    assert!(received.body.len() <= 21_000, "{}", received.body.len());
    let json = received.json();
    assert_eq!(json["type"], "message");
    let attachment = &json["attachments"][0];
    assert_eq!(attachment["contentType"], "application/vnd.microsoft.card.adaptive");
    let card = &attachment["content"];
    assert_eq!((&card["type"], card["version"].as_str()), (&"AdaptiveCard".into(), Some("1.4")));
    assert!(json.to_string().contains("\"RichTextBlock\""));
    assert!(!json.to_string().contains("\"TextBlock\""), "a TextBlock reads Markdown");
    assert!(json.to_string().contains("walguard restore --to before:"));
}

#[tokio::test]
async fn pagerduty_has_one_alert_for_an_incident_from_trigger_to_resolve() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    receiver.answer(Answer::Status(202, Vec::new(), "{\"status\":\"success\"}".to_owned()));
    let key = scratch.file("key", HUSH);
    let channel =
        open(&format!("kind = \"pagerduty\"\nurl = \"{}/v2/enqueue\"\nsecret_file = {key:?}", receiver.url()));
    let first = wipe(0, now());
    let signature = Signature { by: "ada".to_owned(), at: now(), note: None };
    let seen = Incident { state: State::Acknowledged, acknowledged: Some(signature.clone()), ..first.clone() };
    let over = Incident { state: State::Resolved, resolved: Some(signature), ..seen.clone() };
    for (incident, event) in [(&first, Event::Opened), (&seen, Event::Acknowledged), (&over, Event::Resolved)] {
        send(&channel, &message_of(incident, event)).await.unwrap();
    }
    let events: Vec<_> = receiver.received().iter().map(|received| received.json()).collect();
    let actions: Vec<_> = events.iter().map(|event| event["event_action"].as_str().unwrap()).collect();
    assert_eq!(actions, ["trigger", "acknowledge", "resolve"]);
    for event in &events {
        assert_eq!(event["dedup_key"], "walguard/main/00000001-000000001A2B3C40");
        assert_eq!(event["routing_key"], HUSH);
    }
    let payload = &events[0]["payload"];
    assert_eq!((&payload["severity"], &payload["source"]), (&"critical".into(), &"main".into()));
    assert!(payload["summary"].as_str().unwrap().chars().count() <= 1_024);
    assert!(payload["custom_details"]["message"].as_str().unwrap().contains("walguard restore"));
}

#[tokio::test]
async fn alertmanager_has_an_alert_that_lasts_a_while_and_ends_when_it_is_over() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let password = scratch.file("password", HUSH);
    let channel = open(&format!(
        "kind = \"alertmanager\"\nurl = \"{}/\"\nuser = \"walguard\"\nsecret_file = {password:?}",
        receiver.url()
    ));
    let first = wipe(0, now() - SignedDuration::from_secs(10));
    let signature = Signature { by: "ada".to_owned(), at: now(), note: None };
    let over = Incident { state: State::Resolved, resolved: Some(signature), ..first.clone() };
    send(&channel, &message_of(&first, Event::Opened)).await.unwrap();
    send(&channel, &message_of(&over, Event::Resolved)).await.unwrap();
    let received = receiver.received();
    assert_eq!(received[0].path, "/api/v2/alerts");
    assert!(received[0].header("authorization").starts_with("Basic "));
    let alerts: Vec<_> = received.iter().map(|received| received.json()[0].clone()).collect();
    assert_eq!(alerts[0]["labels"], alerts[1]["labels"], "labels name the alert");
    assert_eq!(alerts[0]["labels"]["severity"], "critical");
    let at = |alert: &Value, key: &str| alert[key].as_str().unwrap().parse::<Timestamp>().unwrap();
    assert_eq!(at(&alerts[0], "startsAt"), first.detected_at);
    assert_eq!(at(&alerts[0], "endsAt"), now() + SignedDuration::from_mins(5));
    assert_eq!(at(&alerts[1], "endsAt"), now(), "over");
}

#[tokio::test]
async fn what_an_answer_means() {
    let receiver = Receiver::start().await;
    let channel = open(&format!("kind = \"webhook\"\nurl = \"{}\"", receiver.url()));
    let message = message_of(&wipe(0, now()), Event::Opened);
    for status in [200, 201, 202, 204] {
        receiver.answer(Answer::status(status));
        send(&channel, &message).await.unwrap();
    }
    for status in [408, 429, 500, 502, 503, 504] {
        receiver.answer(Answer::Status(status, vec![("retry-after", "7".to_owned())], "busy\n\u{7}now".to_owned()));
        let error = send(&channel, &message).await.unwrap_err();
        assert!(error.is_transient() && !error.maybe_taken(), "{error:?}");
        assert_eq!(error.retry_after(), Some(Duration::from_secs(7)));
        assert!(
            error.to_string().contains(&status.to_string()) && error.to_string().ends_with(": busy now"),
            "{error}"
        );
    }
    for status in [301, 302, 400, 401, 403, 404, 410, 413, 422] {
        receiver.answer(Answer::Status(status, vec![("location", "http://127.0.0.1:1/".to_owned())], String::new()));
        let error = send(&channel, &message).await.unwrap_err();
        assert!(matches!(error, SendError::Refused { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_receiver_that_hangs_or_breaks_off_may_have_taken_it_and_one_that_is_away_has_not() {
    let mut receiver = Receiver::start().await;
    let channel = open(&format!("kind = \"webhook\"\ntimeout = \"1s\"\nurl = \"{}\"", receiver.url()));
    let message = message_of(&wipe(0, now()), Event::Opened);
    for answer in [Answer::Hang, Answer::Cut] {
        receiver.answer(answer);
        let begin = Instant::now();
        let error = send(&channel, &message).await.unwrap_err();
        assert!(error.is_transient() && error.maybe_taken(), "{error:?}");
        assert!(begin.elapsed() < Duration::from_secs(30));
    }
    let sent: Vec<_> = receiver.received().iter().map(|r| r.header("x-walguard-delivery").to_owned()).collect();
    assert_eq!(sent.len(), 2, "no hidden repetition");
    assert_eq!(sent[0], sent[1], "the receiver can tell the repetition");
    receiver.down().await;
    let error = send(&channel, &message).await.unwrap_err();
    assert!(error.is_transient() && !error.maybe_taken(), "{error:?}");
}

/// The real receiver, the real channel, and a clock that is an argument.
#[tokio::test]
async fn a_webhook_that_is_down_for_an_hour_gets_the_alarm_once_and_late() {
    let mut receiver = Receiver::start().await;
    let channel = open(&format!("kind = \"webhook\"\nurl = \"{}\"", receiver.url()));
    let mut queue = Queue::new([(channel.name(), channel.config())]);
    let begin = now();
    let incident = wipe(0, begin);
    queue.incident(&incident, begin);
    receiver.down().await;
    let (mut at, back, mut is_down, mut tries) = (begin, begin + SignedDuration::from_hours(1), true, 0);
    let end = begin + SignedDuration::from_hours(3);
    let mut told = Vec::new();
    while at < end {
        if is_down && at >= back {
            receiver.up().await;
            is_down = false;
        }
        match queue.next(0, at) {
            Next::Idle => break,
            Next::Wait(until) => at = until.max(at + SignedDuration::from_millis(1)),
            Next::Send(task) => {
                tries += 1;
                let Task { event, due_at, late, .. } = *task.clone();
                let (channel_name, key) = ("oncall".to_owned(), task.key());
                let sending = Sending { channel: channel_name, event, key, due_at, late, repeated: false };
                let message = Message::of_incident(&incident, &sending, &setting());
                match channel.send(&message, &setting(), at).await {
                    Ok(()) => told.extend(queue.delivered(&task, at)),
                    Err(error) => queue.failed(&task, &error, at, 0.5),
                }
            }
        }
    }
    assert!(tries > 50, "{tries}");
    assert_eq!((receiver.received().len(), told.len()), (1, 1));
    let json = receiver.received()[0].json();
    let late = json["late_seconds"].as_u64().unwrap();
    assert!((3_600..3_700).contains(&late), "{late}");
    let text = json["text"].as_str().unwrap();
    assert!(text.starts_with("LATE: CRITICAL main: 18 tables emptied"), "{text}");
    assert!(text.contains("It was detected at 2025-12-17 06:14:59.12 UTC and could not be delivered before."));
}

#[tokio::test]
async fn no_error_holds_a_secret_whatever_the_receiver_says() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let secret = scratch.file("secret", HUSH);
    let url = scratch.file("url", format!("{}/{HUSH}", receiver.url()));
    let gone = scratch.file("gone", format!("http://127.0.0.1:1/{HUSH}"));
    let channels = [
        format!("kind = \"slack\"\nurl_file = {url:?}"),
        format!("kind = \"slack\"\nurl_file = {gone:?}"),
        format!("kind = \"webhook\"\nurl = \"{}/{HUSH}\"\nsecret_file = {secret:?}", receiver.url()),
        format!("kind = \"webhook\"\nurl = \"{}\"\ntoken_file = {secret:?}", receiver.url()),
        format!("kind = \"pagerduty\"\nurl = \"{}\"\nsecret_file = {secret:?}", receiver.url()),
    ];
    let message = message_of(&wipe(0, now()), Event::Opened);
    for toml in channels {
        let channel = open(&toml);
        let says = |text: String| Answer::Status(400, Vec::new(), text);
        // Where an answer is abridged, the secret may be cut.
        let cut = format!("{}{HUSH}", "x".repeat(280));
        for answer in [says(format!("bad key {HUSH}")), says(cut), Answer::Cut, Answer::status(302)] {
            receiver.answer(answer);
            let error = send(&channel, &message).await.unwrap_err();
            let said = format!("{error} {error:?} {channel:?} {:?}", channel.config());
            assert!(!said.contains(HUSH) && !said.contains(&HUSH[..16]), "{said}");
        }
    }
}

#[tokio::test]
async fn a_secret_can_be_rotated_while_the_agent_runs() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let token = scratch.file("token", "old-token");
    let channel = open(&format!("kind = \"webhook\"\nurl = \"{}\"\ntoken_file = {token:?}", receiver.url()));
    let message = message_of(&wipe(0, now()), Event::Opened);
    send(&channel, &message).await.unwrap();
    scratch.file("token", "new-token");
    send(&channel, &message).await.unwrap();
    let tokens: Vec<_> = receiver.received().iter().map(|r| r.header("authorization").to_owned()).collect();
    assert_eq!(tokens, ["Bearer old-token", "Bearer new-token"]);
    std::fs::remove_file(&token).unwrap();
    assert!(send(&channel, &message).await.unwrap_err().is_transient(), "it may be there again in a moment");
}

/// A shell script as a channel's program.
fn script(scratch: &Scratch, name: &str, text: &str) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    // Another process writes what will be run: a file that is open for writing here would be so in each process that
    // another test starts at this moment, and cannot be run as long as it is.
    let (source, path) = (scratch.file(&format!("{name}.sh"), format!("#!/bin/sh\n{text}\n")), scratch.join(name));
    assert!(Command::new("cp").args([&source, &path]).status().unwrap().success());
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("{path:?}")
}

#[tokio::test]
async fn a_program_gets_the_message_and_no_shell_reads_it() {
    let scratch = Scratch::new();
    let out = scratch.join("out");
    let text = format!("cat > {0}.json; env > {0}.env; printf '%s\\n' \"$@\" > {0}.args", out.display());
    let program = script(&scratch, "alarm", &text);
    let channel = open(&format!("kind = \"command\"\ncommand = [{program}, \"$(touch x)\", \"a b\"]"));
    let message = message_of(&wipe(0, now()), Event::Opened);
    send(&channel, &message).await.unwrap();
    let read = |name: &str| std::fs::read_to_string(format!("{}.{name}", out.display())).unwrap();
    assert_eq!(read("args"), "$(touch x)\na b\n");
    let json: Value = serde_json::from_str(&read("json")).unwrap();
    assert_eq!(json["title"], "18 tables emptied <!channel> & @everyone");
    let env: BTreeMap<String, String> =
        read("env").lines().filter_map(|line| line.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect();
    assert_eq!(env["WALGUARD_SEVERITY"], "critical");
    assert_eq!(env["WALGUARD_INCIDENT"], "00000001-000000001A2B3C40");
    assert!(env["WALGUARD_RESTORE_COMMAND"].starts_with("walguard restore --to before:"));
    let ours: Vec<_> = env.keys().filter(|key| key.starts_with("CARGO")).collect();
    assert!(ours.is_empty(), "the agent's own variables may hold secrets: {ours:?}");
}

#[tokio::test]
async fn what_the_end_of_a_program_means() {
    let scratch = Scratch::new();
    let message = message_of(&wipe(0, now()), Event::Opened);
    let channel = |name: &str, text: &str| {
        let program = script(&scratch, name, text);
        open(&format!("kind = \"command\"\ntimeout = \"1s\"\ncommand = [{program}]"))
    };
    let error = send(&channel("wrong", "echo no such pager >&2; exit 3"), &message).await.unwrap_err();
    assert!(!error.is_transient() && error.to_string().ends_with(": no such pager"), "{error}");
    assert!(send(&channel("later", "exit 75"), &message).await.unwrap_err().is_transient());
    let deaf = "exec 0<&-; head -c 1000000 /dev/zero >&2; exit 0";
    send(&channel("deaf", deaf), &message).await.expect("a program need not read, and may say a lot");
    let replaced = channel("replaced", "exit 0");
    let writes = std::fs::File::options().append(true).open(scratch.join("replaced")).unwrap();
    assert!(send(&replaced, &message).await.unwrap_err().is_transient(), "it will be whole in a moment");
    drop(writes);
    let missing = open("kind = \"command\"\ncommand = [\"/nowhere/alarm\"]");
    assert!(!send(&missing, &message).await.unwrap_err().is_transient());
}

#[tokio::test]
async fn a_program_that_hangs_is_ended_with_all_that_it_started() {
    let scratch = Scratch::new();
    let pid = scratch.join("pid");
    let program = script(&scratch, "hang", &format!("sleep 1000 & echo $! > {}; wait", pid.display()));
    let channel = open(&format!("kind = \"command\"\ntimeout = \"1s\"\ncommand = [{program}]"));
    let error = send(&channel, &message_of(&wipe(0, now()), Event::Opened)).await.unwrap_err();
    assert!(error.is_transient() && error.maybe_taken(), "{error:?}");
    let child: i32 = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    let is_gone = || async {
        // A zombie that nobody waits for yet is gone, too.
        let stat = std::fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
        stat.is_empty() || stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
    };
    crate::harness::wait_for("the end of what the program started", Duration::from_secs(10), is_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn notify_test_tries_each_channel_and_says_what_came_of_it() {
    let (receiver, scratch) = (Receiver::start().await, Scratch::new());
    let key = scratch.file("key", HUSH);
    let settings = format!(
        "cluster = \"main\"\n[notify.hook]\nkind = \"webhook\"\nurl = \"{0}/hook\"\nsecret_file = {key:?}\n\
         severity_min = \"critical\"\nafter = \"10m\"\n\
         [notify.pager]\nkind = \"pagerduty\"\nurl = \"{0}/pager\"\nsecret_file = {key:?}\n",
        receiver.url()
    );
    let config = scratch.file("walguard.toml", &settings);
    let run = |args: Vec<String>| async {
        let output = tokio::task::spawn_blocking(move || {
            walguard_command(&args.iter().map(String::as_str).collect::<Vec<_>>()).output().unwrap()
        });
        let output = output.await.unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let args = |more: &[&str]| -> Vec<String> {
        let mut args = vec!["notify".to_owned()];
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args.extend(["--config".to_owned(), config.display().to_string()]);
        args
    };
    let (code, out, err) = run(args(&["test"])).await;
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("ok  hook (webhook)") && out.contains("ok  pager (pagerduty)"), "{out}");
    let received = receiver.received();
    let paths: Vec<_> = received.iter().map(|received| received.path.as_str()).collect();
    assert_eq!(paths, ["/hook", "/pager", "/pager"], "a test opens an alert and closes it");
    assert_eq!(received[0].json()["test"], true);
    assert_eq!(received[2].json()["event_action"], "resolve");

    receiver.answer(Answer::Status(401, Vec::new(), format!("who is {HUSH}?")));
    let (code, out, err) = run(args(&["test", "--channel", "hook"])).await;
    assert_eq!(code, 1);
    assert!(out.contains("FAILED  hook (webhook)") && out.contains("HINT: check the secret"), "{out}");
    assert!(!out.contains(HUSH) && !err.contains(HUSH));
    receiver.answer(Answer::status(503));
    let (code, out, _) = run(args(&["test", "--channel", "hook", "--json"])).await;
    let json: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &json[0]["ok"]), (75, &false.into()));
    let (code, _, err) = run(args(&["test", "--channel", "nobody"])).await;
    assert!(code == 2 && err.contains("HINT: the settings have: hook, pager"), "{err}");

    let (code, out, _) = run(args(&["list"])).await;
    assert_eq!(code, 0);
    assert!(out.contains("hook") && out.contains("after 10 min 00 s, unless acknowledged"), "{out}");
    std::fs::remove_file(&key).unwrap();
    let (code, out, _) = run(args(&["list"])).await;
    assert!(code == 3 && out.contains("read the secret in"), "{out}");
}
