//! The loop that proves that a restore works: on schedule, as a process of its own, and with an alarm where that proved
//! nothing or is long ago.
//!
//! A drill unpacks and replays whole databases: it needs memory and processors that the agent promises not to take. So it is
//! `walguard drill`, a process with a lower priority, and what it found is read from the repository, where a drill that
//! somebody made elsewhere counts as much. Databases whose changes are kept apart have drills apart: each is due by itself, and
//! that another was proved says nothing of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};
use rustix::process::{Pid, Signal, kill_process, setpriority_process};
use tokio_util::sync::CancellationToken;

use super::schedule::Schedule;
use crate::backoff::{Chain, RetryPolicy};
use crate::repo::drills::{Drill, Outcome};
use crate::repo::{RepoError, Repository};
use crate::restore::drill::Config;
use crate::serve::status::{Board, DrillSeen, Trouble};

/// The name of the alarm.
pub(super) const DRILL_ALARM: &str = "drill";

/// How often the records are looked at: somebody else may have made a drill.
const LOOK_EVERY: Duration = Duration::from_secs(5 * 60);

/// How often the clock is looked at: it may be set meanwhile.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How often it is looked whether there is a base backup yet that can be restored.
const WAIT_MIN: Duration = Duration::from_secs(2);

/// After a drill that could not be made for now. What it waits for is the repository, or another drill in its place.
const RETRY: RetryPolicy =
    RetryPolicy { attempts_max: None, pause_min: Duration::from_secs(60), pause_max: Duration::from_secs(3600) };

/// Records that are read of each subject: others may have made some since the last look.
const RECORDS_READ_EACH: usize = 2;

/// Records in which the last proof is looked for.
const RECORDS_READ: usize = 100;

/// What a drill gives others way by (`nice`).
const PRIORITY: i32 = 10;

/// A drill that was asked to stop removes what it made. It goes on with that if it takes longer, and we end without it.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// The exit code of a drill that may work later.
const TRY_LATER: i32 = 75;

/// What the loop works with.
#[derive(Debug)]
pub(super) struct Drills {
    pub(super) repo: Repository,
    pub(super) config: Config,
    /// Of `drill.at`.
    pub(super) zone: TimeZone,
    /// The settings file.
    pub(super) settings: Option<PathBuf>,
    /// URL of the repository.
    pub(super) repository: String,
    /// The cluster's name in it.
    pub(super) cluster: String,
    /// The databases whose changes are kept; none if it is the cluster's WAL.
    pub(super) databases: Vec<String>,
    pub(super) board: Board,
}

/// What a drill restores: a database, or with `None` the cluster.
type Subject = Option<String>;

/// What the loop remembers.
#[derive(Debug, Default)]
struct Memory {
    /// When the records were last looked at.
    looked_at: Option<tokio::time::Instant>,
    /// Old records were looked at, too.
    has_looked_far: bool,
    /// The last drill of each.
    last: BTreeMap<Subject, DrillSeen>,
    /// The last that proved something.
    proven: BTreeMap<Subject, DrillSeen>,
    /// When the last drill was begun, whether there is a record of it or not.
    began_at: BTreeMap<Subject, Timestamp>,
    /// Drills that could not even begin: what they said.
    refused: BTreeMap<Subject, (String, Option<String>)>,
    /// Drills in a row that could not be made for now.
    postponed: u32,
    /// Not before this.
    not_before: Option<Timestamp>,
}

impl Memory {
    /// Takes note of a record; of a later one after those before it.
    fn note(&mut self, drill: &Drill) {
        if drill.outcome == Outcome::Proven {
            self.proven.insert(drill.database.clone(), drill.into());
        }
        self.last.insert(drill.database.clone(), drill.into());
    }

    /// The drill that people should know of: the newest of those that failed, or else the newest.
    fn shown<'a>(&'a self, subjects: &'a [Subject]) -> Option<&'a DrillSeen> {
        let last = || subjects.iter().filter_map(|subject| self.last.get(subject));
        let failed = last().filter(|drill| drill.problem.is_some()).max_by_key(|drill| drill.started_at);
        failed.or_else(|| last().max_by_key(|drill| drill.started_at))
    }

    /// The proof of which it can be said that everything was proved since; `None` if something never was.
    fn proof<'a>(&'a self, subjects: &'a [Subject]) -> Option<&'a DrillSeen> {
        let proofs: Option<Vec<_>> = subjects.iter().map(|subject| self.proven.get(subject)).collect();
        proofs?.into_iter().min_by_key(|drill| drill.finished_at)
    }
}

impl Drills {
    pub(super) async fn run(self, stop: CancellationToken) -> anyhow::Result<()> {
        let is_scheduled = !self.config.every.is_zero();
        // Nobody else makes drills with these settings: it is a mistake, and seen at once.
        let impossible = (is_scheduled && rustix::process::geteuid().is_root())
            .then(|| "no drill can be made: this agent runs as root, and PostgreSQL does not run as root".to_owned());
        self.board.update(|s| {
            s.drills.scheduled = is_scheduled && impossible.is_none();
            s.drills.impossible.clone_from(&impossible);
        });
        let begun = Timestamp::now();
        let mut memory = Memory::default();
        while !stop.is_cancelled() {
            self.look(&mut memory, &stop).await;
            let now = Timestamp::now();
            self.judge(&memory, impossible.as_deref(), begun, now);
            let due = if impossible.is_none() { self.due(&memory, now) } else { None };
            self.board.update(|s| s.drills.next_at = due.as_ref().map(|(due, _)| *due));
            if let Some((at, subject)) = &due
                && *at <= now
                && memory.looked_at.is_some()
                && self.can_restore(subject).await
            {
                self.make(subject, &mut memory, &stop).await?;
                continue;
            }
            let left = due.map(|(due, _)| Duration::try_from(due.duration_since(now)).unwrap_or_default());
            let wait = left.map_or(WAIT_MAX, |left| left.clamp(WAIT_MIN, WAIT_MAX));
            let _ = stop.run_until_cancelled(tokio::time::sleep(wait)).await;
        }
        Ok(())
    }

    /// What has drills.
    fn subjects(&self) -> Vec<Subject> {
        match self.databases.as_slice() {
            [] => vec![None],
            names => names.iter().cloned().map(Some).collect(),
        }
    }

    /// Reads what the repository says of drills, now and then.
    async fn look(&self, memory: &mut Memory, stop: &CancellationToken) {
        if memory.looked_at.is_some_and(|at| at.elapsed() < LOOK_EVERY) {
            return;
        }
        let Some(read) = stop.run_until_cancelled(self.read(memory)).await else { return };
        match read {
            Ok(drills) => {
                memory.looked_at = Some(tokio::time::Instant::now());
                drills.iter().for_each(|drill| memory.note(drill));
                self.board.update(|s| s.drills.trouble = None);
                self.show(memory);
            }
            Err(error) => {
                let (text, hint) = (Chain(&error).to_string(), error.hint());
                self.board.update(|s| {
                    s.drills.trouble = Some(Trouble::again(s.drills.trouble.as_ref(), Timestamp::now(), text, hint));
                });
            }
        }
    }

    /// The newest records, and once so many that the last proof of each is among them.
    async fn read(&self, memory: &mut Memory) -> Result<Vec<Drill>, RepoError> {
        let subjects = self.subjects();
        let newest = self.repo.drills(subjects.len().saturating_mul(RECORDS_READ_EACH)).await?;
        let is_proven = |subject: &Subject| {
            let is_it = |drill: &Drill| drill.outcome == Outcome::Proven && drill.database == *subject;
            memory.proven.contains_key(subject) || newest.iter().any(is_it)
        };
        if newest.is_empty() || memory.has_looked_far || subjects.iter().all(is_proven) {
            return Ok(newest);
        }
        let all = self.repo.drills(RECORDS_READ).await?;
        memory.has_looked_far = true;
        Ok(all)
    }

    /// Tells people what is known.
    fn show(&self, memory: &Memory) {
        let subjects = self.subjects();
        self.board.update(|s| {
            s.drills.last = memory.shown(&subjects).cloned();
            s.drills.proven = memory.proof(&subjects).cloned();
        });
    }

    /// Raises the alarm, or takes it down.
    fn judge(&self, memory: &Memory, impossible: Option<&str>, begun: Timestamp, now: Timestamp) {
        if memory.looked_at.is_none() {
            return;
        }
        let age_max = self.config.age_max().and_then(|max| SignedDuration::try_from(max).ok());
        let found = self.subjects().into_iter().find_map(|subject| {
            let (last, proven) = (memory.last.get(&subject), memory.proven.get(&subject));
            let (text, hint) = alarm(last, proven, memory.refused.get(&subject), (impossible, age_max), begun, now)?;
            Some((subject.map_or_else(|| text.clone(), |name| format!("database {name}: {text}")), hint))
        });
        match found {
            Some((text, hint)) => self.board.raise(DRILL_ALARM, text, Some(hint)),
            None => self.board.clear(DRILL_ALARM),
        }
    }

    /// When the next drill is due, and of what; `None` if none is scheduled.
    fn due(&self, memory: &Memory, now: Timestamp) -> Option<(Timestamp, Subject)> {
        let every = Some(self.config.every).filter(|every| !every.is_zero())?;
        let schedule = Schedule { every: Some(every), at: self.config.at, zone: self.zone.clone() };
        let due = |subject: Subject| {
            let recorded = memory.last.get(&subject).map(|last| last.started_at);
            let last = memory.began_at.get(&subject).copied().max(recorded).or_else(|| {
                // The first one waits for its time of day, too.
                let every = SignedDuration::try_from(every).ok()?;
                self.config.at.and_then(|_| now.checked_sub(every).ok())
            });
            Some((schedule.next(last, now)?, subject))
        };
        let (at, subject) = self.subjects().into_iter().filter_map(due).min()?;
        Some((memory.not_before.map_or(at, |not_before| not_before.max(at)), subject))
    }

    /// There is something to begin with: a base, or a backup whose WAL is archived. A repository that is away is told by others.
    async fn can_restore(&self, subject: &Subject) -> bool {
        let Some(name) = subject else {
            let archived = self.board.snapshot(Timestamp::now()).archived;
            let backups = self.repo.backups().await.unwrap_or_default();
            return backups.iter().any(|backup| Some(backup.consistent_position()) <= archived);
        };
        for database in self.repo.changed_databases().await.unwrap_or_default() {
            let bases = self.repo.bases(database).await.unwrap_or_default();
            if bases.iter().any(|base| base.database_name == *name) {
                return true;
            }
        }
        false
    }

    /// Makes a drill, and takes note of what came of it.
    async fn make(&self, subject: &Subject, memory: &mut Memory, stop: &CancellationToken) -> anyhow::Result<()> {
        let began_at = Timestamp::now();
        tracing::info!(directory = %self.config.scratch_dir.display(), database = subject, "a drill begins");
        self.board.update(|s| s.drills.running_since = Some(began_at));
        let ended = self.start(subject, stop).await;
        self.board.update(|s| s.drills.running_since = None);
        memory.looked_at = None; // its record is news
        let Some(output) = ended? else { return Ok(()) };
        memory.began_at.insert(subject.clone(), began_at);
        memory.refused.remove(subject);
        memory.not_before = None;
        let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        let text = |name: &str| told.get(name).and_then(serde_json::Value::as_str).map(str::to_owned);
        if output.status.code() == Some(TRY_LATER) {
            memory.postponed += 1;
            let pause = RETRY.pause(memory.postponed);
            tracing::warn!(
                ?pause,
                "the drill could not be made, it is tried again: {}",
                text("error").unwrap_or_default()
            );
            memory.began_at.remove(subject);
            memory.not_before = SignedDuration::try_from(pause).ok().and_then(|pause| began_at.checked_add(pause).ok());
            return Ok(());
        }
        memory.postponed = 0;
        match serde_json::from_value::<Drill>(told.clone()) {
            Ok(drill) => {
                let problem = drill.problem();
                match &problem {
                    None => tracing::info!(seconds = drill.took_seconds(), "the drill proved that a restore works"),
                    Some(problem) => tracing::error!(hint = drill.hint, "the drill failed: {problem}"),
                }
                self.board.update(|s| s.drills.failures_total += u64::from(problem.is_some()));
                // The repository may not have taken the record.
                memory.note(&Drill { database: subject.clone(), ..drill });
                self.show(memory);
            }
            Err(_) => {
                let said = text("error").unwrap_or_else(|| format!("it said nothing and ended with {}", output.status));
                let hint = text("hint");
                tracing::error!(hint, "the drill could not be made: {said}");
                self.board.update(|s| s.drills.failures_total += 1);
                memory.refused.insert(subject.clone(), (said, hint));
            }
        }
        Ok(())
    }

    /// Runs the process; `None` if somebody asked to stop meanwhile.
    async fn start(&self, subject: &Subject, stop: &CancellationToken) -> anyhow::Result<Option<Output>> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = tokio::process::Command::new(program);
        command.args(["drill", "--json", "--repo", &self.repository, "--cluster", &self.cluster]);
        if let Some(database) = subject {
            command.args(["--database", database]);
        }
        if let Some(settings) = &self.settings {
            command.arg("--config").arg(settings);
        }
        // A terminal's interrupt is for the agent, who then asks the drill to stop.
        command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let child = command.spawn().context("start a drill")?;
        let pid = child.id().and_then(|id| Pid::from_raw(id.try_into().ok()?));
        if let Some(pid) = pid.filter(|_| is_unfiltered()) {
            let _ = setpriority_process(Some(pid), PRIORITY); // a courtesy
        }
        let mut ending = Box::pin(child.wait_with_output());
        tokio::select! {
            output = &mut ending => return output.context("wait for a drill").map(Some),
            () = stop.cancelled() => {}
        }
        if let Some(pid) = pid {
            let _ = kill_process(pid, Signal::TERM); // it has ended meanwhile
        }
        if tokio::time::timeout(STOP_PATIENCE, ending).await.is_err() {
            tracing::warn!("the drill still removes what it made; it ends by itself");
        }
        Ok(None)
    }
}

/// No filter of system calls is over us: one as in `deploy/walguard.service` would kill us for changing a priority.
fn is_unfiltered() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status.lines().any(|line| line.split_whitespace().eq(["Seccomp:", "0"]))
}

/// What is wrong, and what can be done.
fn alarm(
    last: Option<&DrillSeen>,
    proven: Option<&DrillSeen>,
    refused: Option<&(String, Option<String>)>,
    (impossible, age_max): (Option<&str>, Option<SignedDuration>),
    begun: Timestamp,
    now: Timestamp,
) -> Option<(String, String)> {
    let look = "see it with `walguard drill list`, and make one with `walguard drill`";
    if let Some(text) = impossible {
        let hint = "run the agent as the user that PostgreSQL runs as, or set `drill.every` to \"0s\" and let that user's \
                    timer run `walguard drill`";
        return Some((text.to_owned(), hint.to_owned()));
    }
    if let Some((text, hint)) = refused {
        return Some((format!("a drill could not be made: {text}"), hint.clone().unwrap_or_else(|| look.to_owned())));
    }
    if let Some((drill, problem)) = last.and_then(|drill| Some((drill, drill.problem.as_ref()?))) {
        let text = format!(
            "the drill of {:.0} {}: {problem}",
            drill.started_at,
            match drill.outcome.as_str() {
                "wrong" => "restored, and something is wrong",
                _ => "failed",
            }
        );
        return Some((text, drill.hint.clone().unwrap_or_else(|| look.to_owned())));
    }
    let age_max = age_max?;
    let since = proven.map_or(begun, |proven| proven.finished_at);
    if now.duration_since(since) <= age_max {
        return None;
    }
    let text = match proven {
        Some(_) => format!("no restore was proved to work since {since:.0}, and one should be every {age_max:#}"),
        None => format!("no restore was ever proved to work, and one should be every {age_max:#}"),
    };
    Some((text, look.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn second(n: i64) -> Timestamp {
        Timestamp::from_second(n).unwrap()
    }

    fn seen(at: i64, problem: Option<&str>) -> Option<DrillSeen> {
        Some(DrillSeen {
            started_at: second(at),
            finished_at: second(at + 5),
            took_seconds: 5.0,
            target: "latest".to_owned(),
            outcome: if problem.is_some() { "failed" } else { "proven" }.to_owned(),
            problem: problem.map(str::to_owned),
            hint: None,
        })
    }

    #[test]
    fn a_failed_drill_is_an_alarm_until_one_proves_something_and_so_is_an_old_proof() {
        let max = Some(SignedDuration::from_secs(100));
        let at = |last: Option<DrillSeen>, proven: Option<DrillSeen>, now| {
            alarm(last.as_ref(), proven.as_ref(), None, (None, max), second(0), second(now))
        };
        assert_eq!(at(seen(10, None), seen(10, None), 115), None);
        assert!(at(seen(10, None), seen(10, None), 116).unwrap().0.contains("since 1970-01-01T00:00:15Z"));
        assert!(at(seen(50, Some("part 7 is damaged")), seen(10, None), 60).unwrap().0.contains("part 7 is damaged"));
        assert_eq!(at(None, None, 100), None, "it began a moment ago");
        assert!(at(None, None, 101).unwrap().0.contains("ever"));
        let never = alarm(None, None, None, (None, None), second(0), second(1 << 32));
        assert_eq!(never, None, "nobody wants to know");
        let root = alarm(seen(10, None).as_ref(), None, None, (Some("root"), None), second(0), second(11)).unwrap();
        assert!(root.0.contains("root") && root.1.contains("timer"));
    }
}
