//! The loop that tells people: incidents in, messages out, records of what was told behind them.
//!
//! It waits for an incident, an answer of a receiver, or the moment when something falls due, and then sends what is due,
//! one message at a time to each channel, so that a receiver that hangs keeps nobody else from hearing of it. It depends
//! on nothing but its channels: while the repository is away, incidents come from the detector and records stay on the
//! local disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::backoff::RetryPolicy;
use crate::detect::Incident;
use crate::notify::journal::{Entry, Journal, Progress};
use crate::notify::queue::{Next, Task};
use crate::notify::{Channel, Configs, Message, OpenError, Queue, SendError, Sending, Setting, Told};
use crate::repo::Repository;
use crate::serve::status::{Board, Trouble};

/// Incidents on their way here. The loop takes them at once, so that more would only hide that it hangs.
pub const INCIDENTS_WAITING_MAX: usize = 256;

/// Incidents of earlier days that are looked at when the agent starts: the newest ones.
const LOOKED_AT_MAX: usize = 500;
/// Whole incidents kept in memory: with a thousand tables one has some 200 KiB, most have 2. Others are read again.
const KEPT_MAX: usize = 128;
/// An incident that is younger than this, in its first revision, and was detected since this agent was started, was told
/// by nobody yet: it need not be looked up. An older one may have been told by an agent on another machine.
const YOUNG: jiff::SignedDuration = jiff::SignedDuration::from_secs(10);
/// How long the look-up of what was told may hold up an alarm; the local records are known without it.
const LOOK_UP_MAX: Duration = Duration::from_secs(3);
/// How often it is looked whether somebody has answered an incident: the recent ones, and one of the others each time.
const ANSWERS_EVERY: Duration = Duration::from_secs(5);
/// Incidents of which answers are looked for so often. A look is one request.
const ANSWERS_MAX: usize = 10;
/// The disk may take so long to note that a message is about to be sent: the message matters more than the note.
const NOTE_MAX: Duration = Duration::from_secs(2);
/// Messages under way get so long when the agent stops.
const STOP_MAX: Duration = Duration::from_secs(5);
/// The status is brought up to date at least so often: what is late becomes so by waiting.
const STATUS_EVERY: Duration = Duration::from_secs(5);

/// What the loop works with.
#[derive(Debug)]
pub struct Notifier {
    channels: Vec<Arc<Channel>>,
    repo: Repository,
    journal: Journal,
    setting: Arc<Setting>,
    board: Board,
}

/// How a try to send ended.
#[derive(Debug)]
struct Sent {
    task: Task,
    result: Result<(), SendError>,
    /// The incident could not be read, so that nothing was sent.
    unknown: bool,
}

/// An incident with what is known to have been told of it.
#[derive(Debug)]
struct Found {
    incident: Incident,
    told: Vec<Told>,
}

type Recording = Pin<Box<dyn Future<Output = Result<Told, (Told, String)>> + Send>>;

impl Notifier {
    /// Prepares the channels. `spool` is the cluster's folder of the spool.
    ///
    /// # Errors
    /// If a channel could never work as it is set.
    pub fn new(
        configs: &Configs,
        repo: Repository,
        spool: &Path,
        setting: Setting,
        board: Board,
    ) -> Result<Self, OpenError> {
        let channels = Channel::open_all(configs)?.into_iter().map(Arc::new).collect();
        Ok(Self { channels, repo, journal: Journal::new(spool), setting: Arc::new(setting), board })
    }

    /// Tells people of what comes in, and of what was not told before, until `stop` is cancelled. When `incidents` ends,
    /// it goes on with what is left.
    ///
    /// # Errors
    /// None: whatever goes wrong is tried again, and shown in the status.
    pub async fn run(self, incidents: mpsc::Receiver<Incident>, stop: CancellationToken) -> anyhow::Result<()> {
        if self.channels.is_empty() {
            return Self::forget(incidents, &stop).await;
        }
        let (found, finds) = mpsc::channel(INCIDENTS_WAITING_MAX);
        let queue = Queue::new(self.channels.iter().map(|channel| (channel.name(), channel.config())));
        let busy = vec![false; self.channels.len()];
        let mut state = Running {
            this: Arc::new(self),
            queue,
            busy,
            kept: BTreeMap::new(),
            local: BTreeMap::new(),
            unsure: BTreeSet::new(),
            began_at: Timestamp::now(),
            sending: JoinSet::new(),
            helpers: JoinSet::new(),
            found,
            unrecorded: VecDeque::new(),
            record_failures: 0,
            answers_turn: 0,
        };
        state.begin().await;
        state.follow(incidents, finds, &stop).await;
        Ok(())
    }
}

impl Notifier {
    /// Without a channel there is nobody to tell, and the detector must not wait for us.
    async fn forget(mut incidents: mpsc::Receiver<Incident>, stop: &CancellationToken) -> anyhow::Result<()> {
        while let Some(Some(incident)) = stop.run_until_cancelled(incidents.recv()).await {
            tracing::warn!(incident = incident.id, "no channel is set, so nobody is told: {}", incident.title);
        }
        stop.cancelled().await;
        Ok(())
    }
}

/// The loop's own state.
struct Running {
    this: Arc<Notifier>,
    queue: Queue,
    /// For each channel: a message is under way.
    busy: Vec<bool>,
    /// Whole incidents, by id.
    kept: BTreeMap<String, Arc<Incident>>,
    /// What the local disk knows to have been told, by incident.
    local: BTreeMap<String, Vec<Told>>,
    /// Messages of which nobody knows whether they were sent.
    unsure: BTreeSet<(String, String, String)>,
    began_at: Timestamp,
    sending: JoinSet<Sent>,
    helpers: JoinSet<()>,
    found: mpsc::Sender<Found>,
    /// Told, and not yet written into the repository.
    unrecorded: VecDeque<Told>,
    record_failures: u32,
    answers_turn: usize,
}

impl Running {
    /// Reads what the local disk knows, and begins to look what the repository knows.
    async fn begin(&mut self) {
        let journal = self.this.journal.clone();
        let entries = tokio::task::spawn_blocking(move || journal.read()).await.expect("reading does not panic");
        for Entry { progress, told } in entries.unwrap_or_else(|error| {
            tracing::warn!("failed to read what was told before, from the spool: {error}");
            Vec::new()
        }) {
            match progress {
                Progress::Sending => {
                    self.unsure.insert((told.incident.clone(), told.channel.clone(), told.key()));
                }
                Progress::Told => {
                    self.unrecorded.push_back(told.clone());
                    self.local.entry(told.incident.clone()).or_default().push(told);
                }
                Progress::Recorded => self.local.entry(told.incident.clone()).or_default().push(told),
            }
        }
        let (this, found) = (Arc::clone(&self.this), self.found.clone());
        self.helpers.spawn(async move { this.look_back(found).await });
    }

    async fn follow(
        &mut self,
        mut incidents: mpsc::Receiver<Incident>,
        mut finds: mpsc::Receiver<Found>,
        stop: &CancellationToken,
    ) {
        let mut recording: Option<Recording> = None;
        let mut detector_is_there = true;
        let mut answers = tokio::time::interval(ANSWERS_EVERY);
        answers.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let wait = self.send_what_is_due();
            if recording.is_none()
                && let Some(told) = self.unrecorded.pop_front()
            {
                let pause = match self.record_failures {
                    0 => Duration::ZERO,
                    failures => RetryPolicy::FOREVER.pause(failures),
                };
                recording = Some(Box::pin(Arc::clone(&self.this).record(told, pause)));
            }
            self.tell_status(recording.is_some());
            tokio::select! {
                () = stop.cancelled() => break,
                incident = incidents.recv(), if detector_is_there => match incident {
                    Some(incident) => self.arrive(incident),
                    None => detector_is_there = false,
                },
                Some(found) = finds.recv() => self.learn(found),
                Some(sent) = self.sending.join_next(), if !self.sending.is_empty() => self.sent(sent.expect("sending does not panic")),
                recorded = ended(&mut recording) => {
                    recording = None;
                    self.recorded(recorded);
                }
                _ = answers.tick() => self.look_for_answers(),
                Some(_) = self.helpers.join_next(), if !self.helpers.is_empty() => {}
                () = tokio::time::sleep(wait.min(STATUS_EVERY)) => {}
            }
        }
        // What a receiver has half of is better finished; what it took is noted.
        let last = async {
            while let Some(Ok(sent)) = self.sending.join_next().await {
                self.sent(sent);
            }
            for told in std::mem::take(&mut self.unrecorded) {
                self.this.note(Progress::Told, told).await;
            }
        };
        if tokio::time::timeout(STOP_MAX, last).await.is_err() {
            tracing::warn!("messages under way are dropped; they will be sent again, and say so");
        }
    }

    /// An incident from the detector.
    fn arrive(&mut self, incident: Incident) {
        let now = Timestamp::now();
        let is_young = now.duration_since(incident.detected_at) < YOUNG;
        let is_new = incident.revision <= 1 && is_young && incident.detected_at >= self.began_at;
        if is_new || self.queue.knows(&incident.id) {
            return self.learn(Found { incident, told: Vec::new() });
        }
        // Another agent, on another machine, may have told of it.
        let (this, found) = (Arc::clone(&self.this), self.found.clone());
        self.helpers.spawn(async move {
            let told = match tokio::time::timeout(LOOK_UP_MAX, this.repo.deliveries(&incident.id)).await {
                Ok(Ok(told)) => told,
                Ok(Err(error)) => {
                    let error = crate::backoff::Chain(&error);
                    tracing::warn!(incident = incident.id, "failed to look up what was told of it: {error}");
                    Vec::new()
                }
                Err(_) => {
                    tracing::warn!(incident = incident.id, "failed to look up what was told of it: no answer in time");
                    Vec::new()
                }
            };
            let _ = found.send(Found { incident, told }).await; // the loop has ended: the next start finds it
        });
    }

    fn learn(&mut self, found: Found) {
        let Found { incident, told } = found;
        let is_new = !self.queue.knows(&incident.id);
        self.queue.incident(&incident, Timestamp::now());
        let local = is_new.then(|| self.local.get(&incident.id).cloned()).flatten().unwrap_or_default();
        for told in told.into_iter().chain(local) {
            self.queue.told(told);
        }
        let known = self.kept.get(&incident.id);
        if known.is_none_or(|known| known.revision <= incident.revision) {
            self.kept.insert(incident.id.clone(), Arc::new(incident));
        }
        while self.kept.len() > KEPT_MAX {
            let oldest =
                self.kept.iter().min_by_key(|(_, incident)| (!incident.state.is_closed(), incident.detected_at));
            let Some(id) = oldest.map(|(id, _)| id.clone()) else { break };
            self.kept.remove(&id);
        }
    }

    /// Starts to send whatever is due to channels that are free; says how long nothing else will be.
    fn send_what_is_due(&mut self) -> Duration {
        let mut wait = STATUS_EVERY;
        for channel in 0..self.this.channels.len() {
            if self.busy[channel] {
                continue;
            }
            let now = Timestamp::now();
            match self.queue.next(channel, now) {
                Next::Idle => {}
                Next::Wait(at) => {
                    // A millisecond more, so that the clock is past it.
                    let span = Duration::try_from(at.duration_since(now)).unwrap_or_default();
                    wait = wait.min(span + Duration::from_millis(1));
                }
                Next::Send(task) => {
                    self.busy[channel] = true;
                    let name = self.this.channels[channel].name().to_owned();
                    let repeated = self.unsure.contains(&(task.incident.clone(), name, task.key()));
                    let incident = self.kept.get(&task.incident).cloned();
                    self.sending.spawn(Arc::clone(&self.this).send(*task, incident, repeated));
                }
            }
        }
        wait
    }

    fn sent(&mut self, sent: Sent) {
        let Sent { task, result, unknown } = sent;
        self.busy[task.channel] = false;
        let name = self.this.channels[task.channel].name().to_owned();
        let now = Timestamp::now();
        match result {
            Ok(()) => {
                self.unsure.remove(&(task.incident.clone(), name.clone(), task.key()));
                if let Some(told) = self.queue.delivered(&task, now) {
                    tracing::info!(
                        channel = name,
                        incident = told.incident,
                        event = told.key(),
                        attempts = told.attempts,
                        "told"
                    );
                    self.unrecorded.push_back(told);
                }
            }
            Err(error) => {
                if error.maybe_taken() && !task.repost {
                    self.unsure.insert((task.incident.clone(), name.clone(), task.key()));
                }
                self.queue.failed(&task, &error, now, fastrand::f64());
                let failures = self.queue.status(task.channel, now).map_or(1, |(_, status)| status.failures);
                if failures.is_power_of_two() {
                    let (incident, event, hint) = (&task.incident, task.key(), error.hint());
                    tracing::warn!(channel = name, incident, event, failures, hint, unknown, "failed to tell: {error}");
                }
            }
        }
    }

    fn recorded(&mut self, recorded: Result<Told, (Told, String)>) {
        match recorded {
            Ok(_) => {
                self.record_failures = 0;
                self.this.board.update(|s| s.notify.trouble = None);
            }
            Err((told, error)) => {
                self.record_failures = self.record_failures.saturating_add(1);
                if self.record_failures.is_power_of_two() {
                    tracing::warn!(failures = self.record_failures, "failed to record that people were told: {error}");
                }
                let now = Timestamp::now();
                self.this.board.update(|s| {
                    s.notify.trouble = Some(Trouble::again(s.notify.trouble.as_ref(), now, error, None));
                });
                self.unrecorded.push_front(told);
            }
        }
    }

    fn tell_status(&mut self, is_recording: bool) {
        let now = Timestamp::now();
        self.queue.sweep(now);
        let channels = (0..self.this.channels.len()).filter_map(|channel| {
            let (name, status) = self.queue.status(channel, now)?;
            Some((name.to_owned(), status))
        });
        let channels = channels.collect();
        let unrecorded = self.unrecorded.len() as u64 + u64::from(is_recording);
        self.this.board.update(|s| (s.notify.channels, s.notify.unrecorded) = (channels, unrecorded));
    }

    /// Looks whether somebody answered: the newest open incidents, and one older one, in turn.
    fn look_for_answers(&mut self) {
        let open = self.queue.open();
        let mut asked: Vec<String> = open.iter().take(ANSWERS_MAX).cloned().collect();
        let rest = open.get(ANSWERS_MAX..).unwrap_or_default();
        if !rest.is_empty() {
            self.answers_turn = (self.answers_turn + 1) % rest.len();
            asked.extend(rest.get(self.answers_turn).cloned());
        }
        // One look at a time: a repository that is away is not asked ever more.
        if asked.is_empty() || !self.helpers.is_empty() {
            return;
        }
        let asked: Vec<_> = asked.into_iter().map(|id| (self.queue.revision(&id).unwrap_or(0), id)).collect();
        let (this, found) = (Arc::clone(&self.this), self.found.clone());
        self.helpers.spawn(async move {
            for (revision, id) in asked {
                let (mut newest, mut at) = (None, revision);
                // An error is told by whoever else uses the repository.
                while let Some(next) = at.checked_add(1)
                    && let Ok(Some(incident)) = this.repo.incident_revision(&id, next).await
                {
                    (newest, at) = (Some(incident), next);
                }
                if let Some(incident) = newest
                    && found.send(Found { incident, told: Vec::new() }).await.is_err()
                {
                    return;
                }
            }
        });
    }
}

/// The end of what is being recorded; never, if nothing is.
async fn ended(recording: &mut Option<Recording>) -> Result<Told, (Told, String)> {
    match recording {
        Some(recording) => recording.await,
        None => std::future::pending().await,
    }
}

impl Notifier {
    /// Finds what was left untold: by an agent that was killed, or while every receiver was away.
    async fn look_back(&self, found: mpsc::Sender<Found>) {
        let mut failures = 0;
        let incidents = loop {
            match self.repo.incidents(Some(LOOKED_AT_MAX)).await {
                Ok(incidents) => break incidents,
                Err(error) => {
                    failures += 1;
                    let text = crate::backoff::Chain(&error).to_string();
                    tracing::warn!(failures, "failed to look for incidents that were not told, will try again: {text}");
                    tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
                }
            }
        };
        for (key, problem) in &incidents.damaged {
            tracing::error!(key, "nobody can be told of an incident that cannot be read: {problem}");
        }
        for incident in incidents.incidents {
            let told = loop {
                match self.repo.deliveries(&incident.id).await {
                    Ok(told) => break told,
                    Err(error) => {
                        failures += 1;
                        let text = crate::backoff::Chain(&error).to_string();
                        tracing::warn!(
                            incident = incident.id,
                            "failed to look up what was told, will try again: {text}"
                        );
                        tokio::time::sleep(RetryPolicy::FOREVER.pause(failures)).await;
                    }
                }
            };
            if found.send(Found { incident, told }).await.is_err() {
                return;
            }
        }
    }

    /// Sends a message, noted on the local disk before.
    async fn send(self: Arc<Self>, task: Task, incident: Option<Arc<Incident>>, repeated: bool) -> Sent {
        let channel = Arc::clone(&self.channels[task.channel]);
        let incident = match incident {
            Some(incident) => incident,
            None => match self.repo.incident(&task.incident).await {
                Ok(Some(incident)) => Arc::new(incident),
                Ok(None) => {
                    let problem = format!("incident {} is not in the repository any more", task.incident);
                    return Sent { task, result: Err(SendError::Refused { problem, hint: None }), unknown: true };
                }
                Err(error) => {
                    let problem = format!("read incident {}: {}", task.incident, crate::backoff::Chain(&error));
                    let result = Err(SendError::Unavailable { problem, retry_after: None, maybe_taken: false });
                    return Sent { task, result, unknown: true };
                }
            },
        };
        let now = Timestamp::now();
        if !task.repost {
            let told = Told {
                incident: task.incident.clone(),
                channel: channel.name().to_owned(),
                event: task.event,
                facts: task.facts.clone(),
                due_at: task.due_at,
                told_at: now,
                attempts: 0,
            };
            if tokio::time::timeout(NOTE_MAX, self.note(Progress::Sending, told)).await.is_err() {
                tracing::warn!("failed to note what is being sent: the disk does not answer");
            }
        }
        let sending = Sending {
            channel: channel.name().to_owned(),
            event: task.event,
            key: task.key(),
            due_at: task.due_at,
            late: task.late,
            repeated,
        };
        let message = Message::of_incident(&incident, &sending, &self.setting);
        let result = channel.send(&message, &self.setting, Timestamp::now()).await;
        Sent { task, result, unknown: false }
    }

    /// Writes down that somebody was told: here, then in the repository.
    async fn record(self: Arc<Self>, told: Told, pause: Duration) -> Result<Told, (Told, String)> {
        self.note(Progress::Told, told.clone()).await;
        tokio::time::sleep(pause).await;
        if let Err(error) = self.repo.put_delivery(&told).await {
            return Err((told, crate::backoff::Chain(&error).to_string()));
        }
        self.note(Progress::Recorded, told.clone()).await;
        Ok(told)
    }

    async fn note(&self, progress: Progress, told: Told) {
        let (journal, entry) = (self.journal.clone(), Entry { progress, told });
        let written = tokio::task::spawn_blocking(move || journal.write(&entry)).await.expect("writing does not panic");
        if let Err(error) = written {
            // The message goes out all the same; at worst it is sent again after a crash.
            tracing::warn!("failed to note on the local disk what is told: {error}");
        }
    }
}
