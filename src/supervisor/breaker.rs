//! The loop that ends sessions where a rule asks for it, and writes into the incident what came of it.

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::Chain;
use crate::detect::detector::Break;
use crate::detect::incident::{Action, Incident, TransactionState};
use crate::detect::{State, Who};
use crate::guard::breaker::{Outcome, Target};
use crate::guard::{Breaker, Question, Sessions};
use crate::repo::{RepoError, Repository};

/// A transaction that nobody has seen yet is looked for so long; every moment counts.
const LOOK_MAX: Duration = Duration::from_secs(1);

/// What became of the transaction is waited for so long: a rollback takes as long as what it takes back, and the WAL tells
/// its end.
const SETTLE_MAX: Duration = Duration::from_secs(15 * 60);

/// Actions that wait for that.
const UNSETTLED_MAX: usize = 256;

/// How often incidents are looked at for it.
const TICK: Duration = Duration::from_secs(1);

/// What the loop works with.
#[derive(Debug)]
pub struct Breaking {
    /// What ends sessions.
    pub breaker: Breaker,
    /// Who is at work, for transactions whose session is not known well enough.
    pub sessions: Sessions,
    /// Where incidents are.
    pub repo: Repository,
    /// Whose session should end, with the session as far as it is known.
    pub wanted: mpsc::Receiver<(Break, Who)>,
}

/// Something that was done and is not yet written down, or whose effect is not known yet.
#[derive(Debug)]
struct Unsettled {
    incident: String,
    action: Action,
    is_written: bool,
    since: Instant,
}

impl Breaking {
    /// Ends sessions until `stop`.
    ///
    /// # Errors
    /// None: what fails is written into the incident.
    pub async fn run(mut self, stop: CancellationToken) -> anyhow::Result<()> {
        // So that nobody has to wait for it; if it fails, it is tried again when it matters.
        let _ = stop.run_until_cancelled(self.breaker.prepare()).await;
        let mut unsettled: Vec<Unsettled> = Vec::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = stop.cancelled() => return Ok(()),
                wanted = self.wanted.recv() => match wanted {
                    Some((wanted, who)) => {
                        let action = self.end(&wanted, who).await;
                        let incident = wanted.incident;
                        tracing::warn!(incident, xid = %wanted.xid, rule = %wanted.rule, "breaker: {}", action.outcome);
                        if unsettled.len() == UNSETTLED_MAX {
                            unsettled.remove(0);
                        }
                        unsettled.push(Unsettled { incident, action, is_written: false, since: Instant::now() });
                    }
                    None => {
                        stop.cancelled().await;
                        return Ok(());
                    }
                },
                _ = tick.tick(), if !unsettled.is_empty() => {
                    let mut left = Vec::new();
                    for mut one in unsettled.drain(..) {
                        let is_done = self.settle(&mut one).await.unwrap_or_else(|error| {
                            tracing::debug!("failed to write down what the breaker did: {}", Chain(&error));
                            false
                        });
                        if !is_done && one.since.elapsed() < SETTLE_MAX {
                            left.push(one);
                        }
                    }
                    unsettled = left;
                }
            }
        }
    }

    async fn end(&mut self, wanted: &Break, mut who: Who) -> Action {
        if Target::of(wanted.xid, &who.actor).is_none() {
            let question = Question { xid: Some(wanted.xid), ..Question::default() };
            who = self.sessions.look_up(&question, LOOK_MAX).await;
        }
        let now = Timestamp::now();
        let Some(target) = Target::of(wanted.xid, &who.actor) else {
            let why = who.note.unwrap_or_else(|| "its session is not known".to_owned());
            let outcome = format!("nothing was done: {why}");
            return Action { at: now, kind: KIND.to_owned(), xid: Some(wanted.xid), pid: None, outcome, aborted: None };
        };
        let record = self.breaker.terminate(&target, now).await;
        Action {
            at: record.at,
            kind: KIND.to_owned(),
            xid: Some(record.xid),
            pid: Some(record.pid),
            outcome: in_words(&record.outcome),
            aborted: record.aborted,
        }
    }

    /// Writes down what was done, and whether the transaction was aborted; true if there is nothing more to write.
    async fn settle(&self, one: &mut Unsettled) -> Result<bool, RepoError> {
        let Some(incident) = self.repo.incident(&one.incident).await? else { return Ok(false) };
        let aborted = aborted(&incident, &one.action);
        let is_settled = aborted.is_some();
        if !one.is_written || is_settled {
            one.action.aborted = aborted;
            let action = one.action.clone();
            self.repo
                .revise_incident::<RepoError>(&one.incident, |newest| {
                    let Some(mut next) = newest else { return Ok(None) };
                    let is_same =
                        |there: &Action| there.at == action.at && there.xid == action.xid && there.kind == KIND;
                    match next.actions.iter_mut().find(|there| is_same(there)) {
                        Some(there) if *there == action => return Ok(None),
                        Some(there) => *there = action.clone(),
                        None => next.actions.push(action.clone()),
                    }
                    next.updated_at = Timestamp::now();
                    Ok(Some(next))
                })
                .await?;
            one.is_written = true;
        }
        Ok(is_settled)
    }
}

/// The kind of our actions.
const KIND: &str = "terminate";

/// Whether the transaction was really rolled back, as far as the incident tells.
fn aborted(incident: &Incident, action: &Action) -> Option<bool> {
    let its = incident.transactions.iter().find(|transaction| transaction.xid == action.xid);
    match its.map(|transaction| transaction.state) {
        Some(TransactionState::Committed) => Some(false),
        Some(TransactionState::Aborted) => Some(true),
        Some(TransactionState::Open | TransactionState::Prepared) => None,
        // It was known by a subtransaction: then only the incident as a whole tells.
        None => (incident.state == State::Aborted).then_some(true),
    }
}

fn in_words(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Terminated => "terminated".to_owned(),
        Outcome::AlreadyGone => "already gone: the transaction had ended, or its session had".to_owned(),
        Outcome::NotPermitted(why) => format!("not permitted: {why}"),
        Outcome::CapReached => "cap reached: no more sessions are ended within this hour (breaker.per_hour)".to_owned(),
        Outcome::Spared => "spared: sessions of this role are not ended (breaker.spare)".to_owned(),
        Outcome::Failed(why) => format!("failed: {why}"),
    }
}
