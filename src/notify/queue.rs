//! What is to be told next: incidents, what was told of them, and the clock -> messages to send. Pure: no socket, file,
//! clock or chance; whoever drives it sends, and says how that went.
//!
//! Nothing is queued in the sense of a list that could be lost: what is due follows from the newest revision of an
//! incident and from what a channel was [told](Told) of it. So an agent that starts anew, or was down while things
//! happened, tells what was not told, once, and says that it is late.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::config::{Config, Kind};
use super::message::{Event, Severity, State};
use crate::backoff::RetryPolicy;
use crate::detect::incident::Incident;

/// A message that is sent so long after it was due says that it is late.
const LATE: SignedDuration = SignedDuration::from_secs(30);
/// An incident that nobody was told of for so long is not news: a channel that is set anew tells no old stories, and one
/// that was down for a long weekend still tells all.
const TELL_MAX: SignedDuration = SignedDuration::from_hours(4 * 24);
/// Incidents looked at: each is some hundred bytes. The oldest go first, the closed ones before the open ones.
const INCIDENTS_MAX: usize = 4096;
/// Pauses between messages that an incident has grown: from here, doubling, to there. A wipe of a thousand tables gives
/// some ten messages in its first hour.
const GROWN_PAUSE_MIN: SignedDuration = SignedDuration::from_secs(10);
const GROWN_PAUSE_MAX: SignedDuration = SignedDuration::from_secs(600);
/// An alarm is tried again from once a second to once a minute, for as long as it takes.
const RETRY: RetryPolicy =
    RetryPolicy { attempts_max: None, pause_min: Duration::from_secs(1), pause_max: Duration::from_secs(60) };
/// What the receiver refuses waits for somebody to change a setting.
const REFUSED_PAUSE: SignedDuration = SignedDuration::from_secs(120);

/// What of an incident decides what is told.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Facts {
    /// The revision that they are of.
    pub revision: u32,
    /// How bad it is.
    pub severity: Severity,
    /// Something of it is committed, or it is no transaction's doing.
    pub committed: bool,
    /// Its transaction was rolled back.
    pub aborted: bool,
    /// Somebody has seen it.
    pub acknowledged: bool,
    /// It is over.
    pub resolved: bool,
    /// Tables that it concerns.
    pub tables: u64,
    /// Rows that are missing because of it.
    pub rows: u64,
}

impl Facts {
    /// Those of an incident.
    pub fn of(incident: &Incident) -> Self {
        Self {
            revision: incident.revision,
            severity: incident.severity,
            committed: incident.is_committed() || incident.is_condition(),
            aborted: incident.state == State::Aborted,
            acknowledged: incident.acknowledged.is_some() || incident.state == State::Acknowledged,
            resolved: incident.resolved.is_some() || incident.state == State::Resolved,
            tables: incident.tables_more.saturating_add(incident.tables.len() as u64),
            rows: incident.rows_lost(),
        }
    }

    const fn is_closed(&self) -> bool {
        self.resolved || self.aborted
    }
}

/// What a channel was told: the record that makes it once.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Told {
    /// The incident.
    pub incident: String,
    /// The channel.
    pub channel: String,
    /// What of it.
    pub event: Event,
    /// The incident as it was told.
    pub facts: Facts,
    /// When it should have been told.
    pub due_at: Timestamp,
    /// When the receiver took it.
    pub told_at: Timestamp,
    /// How often it was tried.
    pub attempts: u32,
}

impl Told {
    /// The event in names: `opened`; `grown7`, because an incident may grow more than once.
    pub fn key(&self) -> String {
        key(self.event, self.facts.revision)
    }
}

fn key(event: Event, revision: u32) -> String {
    match event {
        Event::Raised | Event::Grown => format!("{}{revision}", event.name()),
        event => event.name().to_owned(),
    }
}

/// A message to send now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Number of the channel.
    pub channel: usize,
    /// The incident.
    pub incident: String,
    /// What of it; for a `repost` what was told last.
    pub event: Event,
    /// The incident as it will be told.
    pub facts: Facts,
    /// When it should have been told.
    pub due_at: Timestamp,
    /// How long ago that is, if it is worth a word.
    pub late: Option<SignedDuration>,
    /// Says again what is known, so that the receiver does not take it for over: no record is written.
    pub repost: bool,
}

impl Task {
    /// The event in names.
    pub fn key(&self) -> String {
        key(self.event, self.facts.revision)
    }
}

/// What is to be done for a channel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Send this.
    Send(Box<Task>),
    /// Nothing before this moment, unless something happens.
    Wait(Timestamp),
    /// Nothing until something happens.
    Idle,
}

/// How a channel is doing.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct ChannelStatus {
    /// Messages that are due and not told.
    pub pending: u64,
    /// Of these, those that are late.
    pub late: u64,
    /// Since when the oldest of them is due.
    pub oldest_due: Option<Timestamp>,
    /// Messages told since the agent was started.
    pub delivered_total: u64,
    /// Tries that failed since the agent was started.
    pub failed_total: u64,
    /// Messages that were given up: nobody took them for four days.
    pub given_up_total: u64,
    /// Failures in a row.
    pub failures: u32,
    /// When a message was told last.
    pub delivered_at: Option<Timestamp>,
    /// The last error, until a message is told.
    pub error: Option<String>,
    /// What the operator can do about it.
    pub hint: Option<String>,
}

/// The planner.
#[derive(Debug)]
pub struct Queue {
    channels: Vec<Rule>,
    incidents: BTreeMap<String, Tracked>,
}

/// A channel as the planner sees it.
#[derive(Debug)]
struct Rule {
    name: String,
    kind: Kind,
    severity_min: Severity,
    events: Vec<Event>,
    after: SignedDuration,
    repost_every: Option<SignedDuration>,
    /// The receiver is left alone until then.
    not_before: Option<Timestamp>,
    status: ChannelStatus,
}

#[derive(Debug)]
struct Tracked {
    facts: Facts,
    silenced: bool,
    detected_at: Timestamp,
    /// When the newest revision came.
    changed_at: Timestamp,
    /// For each channel.
    told: Vec<Vec<Told>>,
    /// For each channel: not before this moment, after so many tries.
    tried: Vec<Tries>,
    /// For each channel: when it was posted last.
    posted_at: Vec<Option<Timestamp>>,
}

#[derive(Clone, Debug, Default)]
struct Tries {
    key: String,
    count: u32,
    not_before: Option<Timestamp>,
    given_up: bool,
}

impl Queue {
    /// A planner for these channels, by name; their numbers are their places here.
    pub fn new<'a>(channels: impl IntoIterator<Item = (&'a str, &'a Config)>) -> Self {
        let rule = |(name, config): (&str, &Config)| Rule {
            name: name.to_owned(),
            kind: config.kind,
            severity_min: config.severity_min,
            events: config.events.clone(),
            after: SignedDuration::try_from(config.after).unwrap_or(SignedDuration::MAX),
            repost_every: (config.kind == Kind::Alertmanager)
                .then(|| SignedDuration::try_from(super::alertmanager::REPEAT_EVERY).unwrap_or(SignedDuration::MAX)),
            not_before: None,
            status: ChannelStatus::default(),
        };
        Self { channels: channels.into_iter().map(rule).collect(), incidents: BTreeMap::new() }
    }

    /// True if it knows an incident of this id: what was told of it need not be looked up again.
    pub fn knows(&self, incident: &str) -> bool {
        self.incidents.contains_key(incident)
    }

    /// An incident, or a newer revision of one. An older one is ignored.
    pub fn incident(&mut self, incident: &Incident, now: Timestamp) {
        let facts = Facts::of(incident);
        let silenced = incident.silenced_by.is_some();
        match self.incidents.get_mut(&incident.id) {
            Some(known) if facts.revision < known.facts.revision => {}
            Some(known) => {
                if known.facts != facts {
                    known.changed_at = now;
                }
                (known.facts, known.silenced) = (facts, silenced);
            }
            None => {
                self.make_room();
                let tracked = Tracked {
                    facts,
                    silenced,
                    detected_at: incident.detected_at,
                    changed_at: incident.updated_at.min(now),
                    told: vec![Vec::new(); self.channels.len()],
                    tried: vec![Tries::default(); self.channels.len()],
                    posted_at: vec![None; self.channels.len()],
                };
                self.incidents.insert(incident.id.clone(), tracked);
            }
        }
    }

    fn make_room(&mut self) {
        if self.incidents.len() < INCIDENTS_MAX {
            return;
        }
        let oldest = self.incidents.iter().min_by_key(|(_, known)| (!known.facts.is_closed(), known.detected_at));
        if let Some(id) = oldest.map(|(id, _)| id.clone()) {
            self.incidents.remove(&id);
        }
    }

    /// What a channel was told before: read from the records. Of a channel or an incident that is not known nothing is
    /// kept, so give the incident first.
    pub fn told(&mut self, told: Told) {
        let Some(channel) = self.channels.iter().position(|rule| rule.name == told.channel) else { return };
        let Some(known) = self.incidents.get_mut(&told.incident) else { return };
        if let Some(list) = known.told.get_mut(channel)
            && !list.iter().any(|other| other.key() == told.key())
        {
            list.push(told);
            list.sort_by_key(|told| told.told_at);
        }
    }

    /// What is to be done for a channel now.
    pub fn next(&self, channel: usize, now: Timestamp) -> Next {
        let Some(rule) = self.channels.get(channel) else { return Next::Idle };
        let mut best: Option<(std::cmp::Reverse<Severity>, Timestamp, Task)> = None;
        let mut wait: Option<Timestamp> = None;
        for (id, known) in &self.incidents {
            let Some((event, due_at, repost)) = known.due(channel, rule, now) else { continue };
            let task = Task {
                channel,
                incident: id.clone(),
                event,
                facts: known.facts.clone(),
                due_at,
                late: Some(now.duration_since(due_at)).filter(|late| *late >= LATE && !repost),
                repost,
            };
            let held = known.tried.get(channel).filter(|tries| tries.key == task.key()).and_then(|t| t.not_before);
            let from = [Some(due_at), held, rule.not_before].into_iter().flatten().max().unwrap_or(due_at);
            if from > now {
                wait = Some(wait.map_or(from, |wait| wait.min(from)));
                continue;
            }
            let rank = (std::cmp::Reverse(known.facts.severity), due_at);
            if best.as_ref().is_none_or(|(severity, due, _)| rank < (*severity, *due)) {
                best = Some((rank.0, rank.1, task));
            }
        }
        match (best, wait) {
            (Some((.., task)), _) => Next::Send(Box::new(task)),
            (None, Some(at)) => Next::Wait(at),
            (None, None) => Next::Idle,
        }
    }

    /// The receiver took it. Gives the record to keep, `None` for a repost.
    pub fn delivered(&mut self, task: &Task, now: Timestamp) -> Option<Told> {
        let rule = self.channels.get_mut(task.channel)?;
        rule.not_before = None;
        let status = &mut rule.status;
        (status.failures, status.error, status.hint) = (0, None, None);
        status.delivered_at = Some(now);
        status.delivered_total += u64::from(!task.repost);
        let channel = rule.name.clone();
        let known = self.incidents.get_mut(&task.incident);
        let mut attempts = 1;
        if let Some(known) = known {
            if let Some(posted) = known.posted_at.get_mut(task.channel) {
                *posted = Some(now);
            }
            if let Some(tries) = known.tried.get_mut(task.channel) {
                attempts += if tries.key == task.key() { tries.count } else { 0 };
                *tries = Tries::default();
            }
        }
        if task.repost {
            return None;
        }
        let told = Told {
            incident: task.incident.clone(),
            channel,
            event: task.event,
            facts: task.facts.clone(),
            due_at: task.due_at,
            told_at: now,
            attempts,
        };
        self.told(told.clone());
        Some(told)
    }

    /// It was not taken. `chance` is between 0 and 1: half of a pause is left to it.
    pub fn failed(&mut self, task: &Task, failure: &super::error::SendError, now: Timestamp, chance: f64) {
        let Some(rule) = self.channels.get_mut(task.channel) else { return };
        rule.status.failures = rule.status.failures.saturating_add(1);
        rule.status.failed_total += 1;
        rule.status.error = Some(failure.to_string());
        rule.status.hint = failure.hint();
        let after = |span: SignedDuration| now.saturating_add(span).unwrap_or(now);
        let tries = self.incidents.get_mut(&task.incident).and_then(|known| known.tried.get_mut(task.channel));
        let mut count = 1;
        if let Some(tries) = tries {
            if tries.key != task.key() {
                *tries = Tries { key: task.key(), ..Tries::default() };
            }
            tries.count = tries.count.saturating_add(1);
            count = tries.count;
            // What is refused holds up no other message: it may be this one only.
            tries.not_before = (!failure.is_transient()).then(|| after(REFUSED_PAUSE));
        }
        if failure.is_transient() {
            let failures = rule.status.failures.max(count);
            let pause = RETRY.pause_at(failures, chance).max(failure.retry_after().unwrap_or_default());
            rule.not_before = Some(after(SignedDuration::try_from(pause).unwrap_or(SignedDuration::ZERO)));
        }
    }

    /// Forgets what is over and told, and gives up what is too old. Call it now and then.
    pub fn sweep(&mut self, now: Timestamp) {
        for known in self.incidents.values_mut() {
            for (channel, rule) in self.channels.iter_mut().enumerate() {
                let is_old = now.duration_since(known.detected_at) > TELL_MAX + rule.after;
                let never = known.told.get(channel).is_none_or(Vec::is_empty);
                let tried = known.tried.get_mut(channel).filter(|tries| tries.count > 0 && !tries.given_up);
                if let Some(tries) = tried.filter(|_| is_old && never) {
                    tries.given_up = true;
                    rule.status.given_up_total += 1;
                }
            }
        }
        self.incidents.retain(|_, known| !known.facts.is_closed() || now.duration_since(known.changed_at) <= TELL_MAX);
    }

    /// How a channel is doing.
    pub fn status(&self, channel: usize, now: Timestamp) -> Option<(&str, ChannelStatus)> {
        let rule = self.channels.get(channel)?;
        let mut status = rule.status.clone();
        for known in self.incidents.values() {
            let Some((_, due_at, false)) = known.due(channel, rule, now) else { continue };
            if due_at > now {
                continue;
            }
            status.pending += 1;
            status.late += u64::from(now.duration_since(due_at) >= LATE);
            status.oldest_due = Some(status.oldest_due.map_or(due_at, |oldest| oldest.min(due_at)));
        }
        Some((&rule.name, status))
    }

    /// The newest revision of an incident that it knows.
    pub fn revision(&self, incident: &str) -> Option<u32> {
        self.incidents.get(incident).map(|known| known.facts.revision)
    }

    /// The ids of the incidents that are not closed, the newest first: somebody may have answered them elsewhere.
    pub fn open(&self) -> Vec<String> {
        let mut open: Vec<_> = self.incidents.iter().filter(|(_, known)| !known.facts.is_closed()).collect();
        open.sort_by_key(|(_, known)| std::cmp::Reverse(known.detected_at));
        open.into_iter().map(|(id, _)| id.clone()).collect()
    }
}

impl Tracked {
    /// What is next to be told to a channel, when that is or was due, and whether it is only said again.
    fn due(&self, channel: usize, rule: &Rule, now: Timestamp) -> Option<(Event, Timestamp, bool)> {
        if self.silenced {
            return None;
        }
        let told = self.told.get(channel)?;
        let is_wanted = |event: Event| rule.events.contains(&event);
        let Some(last) = told.last() else { return self.first_due(rule, now) };
        let is_told = |event: Event| told.iter().any(|told| told.event == event);
        let (now_is, was) = (&self.facts, &last.facts);
        // The first of these says it all: each message tells the whole incident.
        let changed = [
            (Event::Resolved, now_is.resolved && !was.resolved),
            (Event::Aborted, now_is.aborted && !was.aborted),
            (Event::Committed, now_is.committed && !was.committed),
            (Event::Acknowledged, now_is.acknowledged && !was.acknowledged),
        ];
        for (event, is_new) in changed {
            if is_new && is_wanted(event) && !is_told(event) {
                return Some((event, self.changed_at, false));
            }
        }
        // That rows are gone now is no growth: until then something looked dangerous, or was about to happen.
        let is_first_loss = now_is.rows > 0 && was.rows == 0;
        let is_worse = now_is.severity > was.severity || is_first_loss;
        if is_worse && !now_is.is_closed() && is_wanted(Event::Raised) {
            return Some((Event::Raised, self.changed_at, false));
        }
        let is_more = now_is.tables > was.tables || now_is.rows > was.rows.saturating_mul(2);
        if is_more && !now_is.is_closed() && !now_is.acknowledged && is_wanted(Event::Grown) {
            let grown = told.iter().filter(|told| told.event == Event::Grown).count();
            let pause = GROWN_PAUSE_MIN.saturating_mul(1 << grown.min(10)).min(GROWN_PAUSE_MAX);
            let quiet_until = last.told_at.saturating_add(pause).unwrap_or(last.told_at);
            return Some((Event::Grown, quiet_until.max(self.changed_at), false));
        }
        let every = rule.repost_every.filter(|_| !now_is.is_closed() && now_is.severity >= rule.severity_min)?;
        // An agent that was started anew does not know when: at once, then.
        let posted_at = self.posted_at.get(channel).copied().flatten();
        let at = posted_at.map_or(last.told_at, |posted| posted.saturating_add(every).unwrap_or(posted));
        Some((last.event, at, true))
    }

    /// When a channel that was told nothing yet is to be told.
    fn first_due(&self, rule: &Rule, now: Timestamp) -> Option<(Event, Timestamp, bool)> {
        let facts = &self.facts;
        let due_at = self.detected_at.saturating_add(rule.after).unwrap_or(self.detected_at);
        let is_for_it = facts.severity >= rule.severity_min && rule.events.contains(&Event::Opened);
        let is_escalation = !rule.after.is_zero();
        let is_in_hands = facts.acknowledged || facts.is_closed();
        let would_page = match rule.kind {
            Kind::PagerDuty => is_in_hands,
            kind => kind.is_stateful() && facts.is_closed(),
        };
        let is_old = now.duration_since(due_at) > TELL_MAX;
        let is_moot = is_escalation && is_in_hands;
        let is_due = is_for_it && !is_moot && !would_page && !is_old;
        is_due.then_some((Event::Opened, due_at, false))
    }
}

#[cfg(test)]
mod tests {
    use super::super::error::SendError;
    use super::super::testing::{incident, second};
    use super::*;
    use crate::detect::incident::Signature;

    fn config(text: &str) -> Config {
        toml::from_str(&format!("kind = \"webhook\"\nurl = \"http://h\"\n{text}")).unwrap()
    }

    fn pager() -> Config {
        toml::from_str("kind = \"pagerduty\"\nsecret_env = \"KEY\"").unwrap()
    }

    fn queue(configs: &[Config]) -> Queue {
        let names = ["a", "b", "c"];
        Queue::new(names.into_iter().zip(configs))
    }

    /// What is sent to channel 0 now, if anything, and taken.
    fn take(queue: &mut Queue, at: i64) -> Option<(Event, Task)> {
        let Next::Send(task) = queue.next(0, second(at)) else { return None };
        queue.delivered(&task, second(at));
        Some((task.event, *task))
    }

    fn events(queue: &mut Queue, at: i64) -> Vec<Event> {
        std::iter::from_fn(|| take(queue, at).map(|(event, _)| event)).take(20).collect()
    }

    fn away() -> SendError {
        SendError::Unavailable { problem: "away".to_owned(), retry_after: None, maybe_taken: false }
    }

    fn refused() -> SendError {
        SendError::Refused { problem: "no".to_owned(), hint: None }
    }

    fn signed() -> Option<Signature> {
        Some(Signature { by: "ada".to_owned(), at: second(0), note: None })
    }

    #[test]
    fn an_incident_is_told_at_once_and_once() {
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(1, second(100)), second(100));
        let (event, task) = take(&mut queue, 100).unwrap();
        assert_eq!((event, task.late, task.key().as_str()), (Event::Opened, None, "opened"));
        queue.incident(&incident(1, second(100)), second(101));
        assert_eq!(queue.next(0, second(1_000)), Next::Idle);
    }

    #[test]
    fn what_the_records_say_was_told_is_not_told_again() {
        let mut first = queue(&[config("")]);
        first.incident(&incident(1, second(100)), second(100));
        let Next::Send(task) = first.next(0, second(100)) else { panic!() };
        let told = first.delivered(&task, second(100)).unwrap();
        let json = serde_json::to_string(&told).unwrap();

        let mut next = queue(&[config("")]);
        next.incident(&incident(1, second(100)), second(200));
        next.told(serde_json::from_str(&json).unwrap());
        assert_eq!(next.next(0, second(200)), Next::Idle);
    }

    #[test]
    fn an_alarm_that_nobody_took_for_an_hour_arrives_once_and_is_late() {
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(1, second(0)), second(0));
        let (mut at, mut tries) = (0, 0);
        while at < 3_600 {
            match queue.next(0, second(at)) {
                Next::Send(task) => {
                    tries += 1;
                    queue.failed(&task, &away(), second(at), 0.5);
                }
                Next::Wait(until) => at = until.as_second().max(at + 1),
                Next::Idle => panic!("an alarm was forgotten"),
            }
            assert!(queue.open().len() == 1 && tries < 200, "{tries} tries by second {at}");
        }
        let (_, status) = queue.status(0, second(3_600)).unwrap();
        assert_eq!((status.pending, status.late, status.oldest_due), (1, 1, Some(second(0))));
        assert_eq!(status.error.as_deref(), Some("away"));
        assert!((60..120).contains(&tries), "{tries}");
        // It is taken within a minute after the receiver is back.
        let until = match queue.next(0, second(3_600)) {
            Next::Wait(until) => until.as_second() + 1,
            _ => 3_600,
        };
        assert!(until <= 3_661, "{until}");
        let (event, task) = take(&mut queue, until).unwrap();
        assert_eq!((event, task.late), (Event::Opened, Some(SignedDuration::from_secs(until))));
        assert_eq!(queue.next(0, second(10_000)), Next::Idle);
        let (_, status) = queue.status(0, second(10_000)).unwrap();
        assert_eq!((status.pending, status.delivered_total, status.error), (0, 1, None));
    }

    #[test]
    fn a_receiver_that_asks_for_time_gets_it() {
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(1, second(0)), second(0));
        let Next::Send(task) = queue.next(0, second(0)) else { panic!() };
        let busy = SendError::Unavailable {
            problem: "429".to_owned(),
            retry_after: Some(Duration::from_secs(120)),
            maybe_taken: false,
        };
        queue.failed(&task, &busy, second(0), 0.0);
        assert_eq!(queue.next(0, second(1)), Next::Wait(second(120)));
    }

    #[test]
    fn a_message_that_is_refused_holds_up_no_other_and_one_that_is_not_taken_does() {
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(1, second(0)), second(0));
        queue.incident(&incident(2, second(1)), second(1));
        let Next::Send(first) = queue.next(0, second(1)) else { panic!() };
        queue.failed(&first, &refused(), second(1), 0.0);
        let Next::Send(second_one) = queue.next(0, second(1)) else { panic!("the other message waits") };
        assert_ne!(first.incident, second_one.incident);
        queue.failed(&second_one, &away(), second(1), 0.0);
        assert!(matches!(queue.next(0, second(1)), Next::Wait(_)), "the receiver is left alone for a moment");
    }

    #[test]
    fn the_worst_is_told_first() {
        let mut queue = queue(&[config("severity_min = \"info\"")]);
        for (number, severity) in [(1, Severity::Info), (2, Severity::Critical), (3, Severity::Warning)] {
            let incident = Incident { severity, ..incident(number, second(number as i64)) };
            queue.incident(&incident, second(10));
        }
        let mut order = Vec::new();
        while let Some((_, task)) = take(&mut queue, 10) {
            order.push(task.facts.severity);
        }
        assert_eq!(order, [Severity::Critical, Severity::Warning, Severity::Info]);
    }

    #[test]
    fn a_channel_hears_only_of_what_is_bad_enough_for_it() {
        let mut queue = queue(&[config("severity_min = \"critical\"")]);
        let mild = Incident { severity: Severity::Warning, ..incident(1, second(0)) };
        queue.incident(&mild, second(0));
        assert_eq!(queue.next(0, second(9)), Next::Idle);
        queue.incident(&Incident { severity: Severity::Critical, revision: 2, ..mild }, second(5));
        assert_eq!(events(&mut queue, 9), [Event::Opened]);
    }

    #[test]
    fn a_suspicion_that_is_committed_is_told_again_at_once_and_one_that_is_rolled_back_too() {
        for (end, event) in [(State::Committed, Event::Committed), (State::Aborted, Event::Aborted)] {
            let mut queue = queue(&[config("")]);
            let suspicion = Incident { first_harm: None, state: State::Open, ..incident(1, second(0)) };
            let suspicion = super::super::testing::open(suspicion);
            queue.incident(&suspicion, second(0));
            assert_eq!(events(&mut queue, 0), [Event::Opened]);
            let ended = Incident { revision: 2, state: end, ..suspicion };
            let ended =
                if end == State::Committed { Incident { first_harm: Some(ended.seen_to), ..ended } } else { ended };
            queue.incident(&ended, second(3));
            assert_eq!(events(&mut queue, 3), [event]);
        }
    }

    #[test]
    fn an_answer_and_the_end_are_told_once_each() {
        let mut queue = queue(&[config("")]);
        let first = incident(1, second(0));
        queue.incident(&first, second(0));
        assert_eq!(events(&mut queue, 0), [Event::Opened]);
        let seen = Incident { revision: 2, state: State::Acknowledged, acknowledged: signed(), ..first };
        queue.incident(&seen, second(60));
        assert_eq!(events(&mut queue, 60), [Event::Acknowledged]);
        let over = Incident { revision: 3, state: State::Resolved, resolved: signed(), ..seen };
        queue.incident(&over, second(90));
        assert_eq!(events(&mut queue, 90), [Event::Resolved]);
        assert_eq!(queue.next(0, second(9_000)), Next::Idle);
    }

    #[test]
    fn what_grows_worse_is_told_at_once_and_what_only_grows_now_and_then() {
        let mut queue = queue(&[config("")]);
        let mut incident = Incident { severity: Severity::Warning, ..incident(1, second(0)) };
        incident.tables.truncate(1);
        queue.incident(&incident, second(0));
        assert_eq!(events(&mut queue, 0), [Event::Opened]);
        incident.severity = Severity::Critical;
        incident.revision = 2;
        queue.incident(&incident, second(1));
        assert_eq!(events(&mut queue, 1), [Event::Raised]);
        // Each second a table more, for an hour.
        let mut said = Vec::new();
        for at in 2..3_600 {
            incident.revision += 1;
            incident.tables_more += 1;
            queue.incident(&incident, second(at));
            said.extend(events(&mut queue, at).into_iter().map(|event| (at, event)));
        }
        assert!(said.iter().all(|(_, event)| *event == Event::Grown));
        assert_eq!(said[0].0, 11, "the first after ten seconds");
        assert!((5..15).contains(&said.len()), "{said:?}");
    }

    #[test]
    fn the_first_rows_that_are_gone_are_told_at_once_whatever_was_told_before() {
        let mut queue = queue(&[config("")]);
        let lost = incident(1, second(0));
        let triggers = Incident { tables: Vec::new(), ..lost.clone() };
        queue.incident(&triggers, second(0));
        assert_eq!(events(&mut queue, 0), [Event::Opened]);
        queue.incident(&Incident { revision: 2, ..lost }, second(1));
        assert_eq!(events(&mut queue, 1), [Event::Raised]);
    }

    #[test]
    fn an_escalation_waits_and_an_answer_stops_it() {
        let mut queue = queue(&[config("after = \"10m\"")]);
        let first = incident(1, second(0));
        queue.incident(&first, second(0));
        assert_eq!(queue.next(0, second(0)), Next::Wait(second(600)));
        let (_, status) = queue.status(0, second(599)).unwrap();
        assert_eq!(status.pending, 0, "it is not due yet");
        let mut other = super::Queue::new([("a", &config("after = \"10m\""))]);
        other.incident(&first, second(0));
        assert_eq!(events(&mut other, 600), [Event::Opened], "nobody answered");
        queue.incident(
            &Incident { revision: 2, acknowledged: signed(), state: State::Acknowledged, ..first },
            second(300),
        );
        assert_eq!(queue.next(0, second(700)), Next::Idle, "somebody did");
    }

    #[test]
    fn nobody_is_paged_for_what_is_over_and_the_others_still_hear_of_it() {
        let over = Incident { state: State::Resolved, resolved: signed(), ..incident(1, second(0)) };
        let mut queue = queue(&[config(""), pager()]);
        queue.incident(&over, second(60));
        assert!(matches!(queue.next(0, second(60)), Next::Send(_)));
        assert_eq!(queue.next(1, second(60)), Next::Idle);
    }

    #[test]
    fn a_silenced_incident_is_told_to_nobody() {
        let by = crate::detect::incident::SilencedBy { id: "s".into(), reason: "planned".into(), until: second(9) };
        let mut queue = queue(&[config("")]);
        queue.incident(&Incident { silenced_by: Some(by), ..incident(1, second(0)) }, second(0));
        assert_eq!(queue.next(0, second(99)), Next::Idle);
    }

    #[test]
    fn a_new_channel_tells_no_old_stories_and_what_is_given_up_is_counted() {
        let day = 86_400;
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(1, second(0)), second(5 * day));
        assert_eq!(queue.next(0, second(5 * day)), Next::Idle);
        queue.sweep(second(5 * day));
        assert_eq!(queue.status(0, second(5 * day)).unwrap().1.given_up_total, 0, "it was never tried");
        queue.incident(&incident(2, second(5 * day)), second(5 * day));
        let Next::Send(task) = queue.next(0, second(5 * day)) else { panic!() };
        queue.failed(&task, &away(), second(5 * day), 0.0);
        queue.sweep(second(10 * day));
        queue.sweep(second(10 * day));
        assert_eq!(queue.status(0, second(10 * day)).unwrap().1.given_up_total, 1);
    }

    #[test]
    fn an_alert_that_must_be_repeated_is_until_it_is_over() {
        let config: Config = toml::from_str("kind = \"alertmanager\"\nurl = \"http://h\"").unwrap();
        let mut queue = queue(std::slice::from_ref(&config));
        let first = incident(1, second(0));
        queue.incident(&first, second(0));
        let mut posts = Vec::new();
        for at in 0..=300 {
            while let Next::Send(task) = queue.next(0, second(at)) {
                assert_eq!(task.repost, at > 0);
                assert_eq!(queue.delivered(&task, second(at)).is_some(), at == 0, "only the first is recorded");
                posts.push(at);
            }
        }
        assert_eq!(posts, [0, 60, 120, 180, 240, 300]);
        queue.incident(&Incident { revision: 2, state: State::Resolved, resolved: signed(), ..first }, second(310));
        assert_eq!(events(&mut queue, 310), [Event::Resolved]);
        assert_eq!(queue.next(0, second(9_000)), Next::Idle);
    }

    #[test]
    fn memory_stays_bounded_and_open_incidents_stay_longest() {
        let mut queue = queue(&[config("")]);
        queue.incident(&incident(0, second(0)), second(0));
        for number in 1..6_000 {
            let over =
                Incident { state: State::Resolved, resolved: signed(), ..incident(number, second(number as i64)) };
            queue.incident(&over, second(6_000));
        }
        assert_eq!(queue.incidents.len(), INCIDENTS_MAX);
        assert_eq!(queue.open(), [incident(0, second(0)).id]);
    }
}
