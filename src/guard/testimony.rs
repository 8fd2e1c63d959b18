//! What the guard said of transactions that are open, until they end; and how that goes together with what the agent saw.
//! Pure.

use std::collections::VecDeque;

use foldhash::{HashMap, HashMapExt as _};

use super::message::{self, GuardMessage, Operation, Told};
use crate::decode::Change;
use crate::decode::change::Action;
use crate::detect::{Actor, Who, WhoSource};
use crate::pg::Xid;

/// Transactions and subtransactions of which something is kept. Whoever ends without that being asked for (the WAL tells of
/// aborted subtransactions only sometimes) makes room in his turn.
const XIDS_MAX: usize = 4_096;

/// Messages that are kept of one; each has 3 KiB at most. The first says who it is, and those that destroy most follow.
const MESSAGES_MAX: usize = 8;

/// The guard's messages of open transactions.
#[derive(Debug, Default)]
pub struct Testimony {
    heard: HashMap<u32, Vec<GuardMessage>>,
    order: VecDeque<u32>,
}

impl Testimony {
    /// Nothing was said.
    pub fn new() -> Self {
        Self { heard: HashMap::new(), order: VecDeque::new() }
    }

    /// Listens to a change; only the guard's messages matter. Gives the message, if it is one: it says at once what happens
    /// in a transaction that is open.
    pub fn hear(&mut self, change: &Change<'_>) -> Option<&GuardMessage> {
        let Action::Message(logical) = &change.action else { return None };
        let xid = change.xid.filter(|_| logical.transactional)?;
        let read = message::read(logical.prefix, logical.content)?;
        self.keep(xid, read)
    }

    fn keep(&mut self, xid: Xid, message: GuardMessage) -> Option<&GuardMessage> {
        if !self.heard.contains_key(&xid.get()) {
            if self.order.len() >= XIDS_MAX
                && let Some(oldest) = self.order.pop_front()
            {
                self.heard.remove(&oldest);
            }
            self.order.push_back(xid.get());
        }
        let messages = self.heard.entry(xid.get()).or_default();
        if messages.len() < MESSAGES_MAX {
            messages.push(message);
            return messages.last();
        }
        let (place, least) = messages.iter().enumerate().min_by_key(|(_, kept)| weight(kept))?;
        if weight(least) < weight(&message) {
            let kept = messages.get_mut(place)?;
            *kept = message;
            return Some(kept);
        }
        None
    }

    /// What was said of a transaction so far, given its id and those of its subtransactions.
    pub fn of(&self, xids: &[Xid]) -> Vec<&GuardMessage> {
        xids.iter().filter_map(|xid| self.heard.get(&xid.get())).flatten().collect()
    }

    /// The same, of a transaction that has ended: it is forgotten.
    pub fn take(&mut self, xids: &[Xid]) -> Vec<GuardMessage> {
        let taken: Vec<_> = xids.iter().filter_map(|xid| self.heard.remove(&xid.get())).flatten().collect();
        if !taken.is_empty() {
            self.order.retain(|xid| self.heard.contains_key(xid));
        }
        taken
    }
}

/// How much a message says of a loss.
fn weight(message: &GuardMessage) -> (u8, u64) {
    match &message.what {
        Told::Definitions { dropped: true, total, .. } => (4, *total),
        Told::Rows { operation: Operation::Truncate, rows, .. } => (3, rows.unwrap_or_default()),
        Told::Rows { operation: Operation::Delete, rows, .. } => (2, rows.unwrap_or_default()),
        Told::Rows { operation: Operation::Update, rows, .. } => (1, rows.unwrap_or_default()),
        Told::Definitions { dropped: false, .. } => (0, 0),
    }
}

/// Who did it, by what the guard said and what the agent saw. The guard's word counts, because it is exact for the fastest
/// statement; but whoever can run SQL can write such a message, so where the agent saw another process with this very
/// transaction, what it saw counts, and the contradiction is told.
pub fn agree<'a>(said: impl IntoIterator<Item = &'a GuardMessage>, seen: Who) -> Who {
    let Some(best) = said.into_iter().max_by_key(|message| weight(message)) else { return seen };
    let told = &best.who.actor;
    if seen.source == WhoSource::Activity && seen.actor.pid.is_some() && seen.actor.pid != told.pid {
        let named = told.pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string());
        let note = format!(
            "a message in the WAL that looks like the guard's names process {named} and role {}; the server showed another: \
             somebody may have forged it",
            told.role.as_deref().unwrap_or("nobody")
        );
        return Who { note: Some(seen.note.map_or(note.clone(), |before| format!("{before}; {note}"))), ..seen };
    }
    let is_same = seen.source == WhoSource::Activity;
    let actor = Actor {
        backend_type: seen.actor.backend_type.filter(|_| is_same),
        prepared: seen.actor.prepared.filter(|_| is_same),
        ..told.clone()
    };
    let note = best.reason.as_ref().map(|reason| format!("the session gave a reason: {reason}"));
    Who { actor, source: WhoSource::Guard, note }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn xid(number: u32) -> Xid {
        Xid::new(number).unwrap()
    }

    fn said(operation: &str, rows: u64, pid: i32) -> GuardMessage {
        let text = format!(
            r#"{{"v":1,"role":"shop","pid":{pid},"query":"{operation} {rows}","what":{{"op":"{operation}","table":"t","rows":{rows}}}}}"#
        );
        message::read(message::PREFIX, text.as_bytes()).unwrap()
    }

    fn seen(source: WhoSource, pid: Option<i32>) -> Who {
        let actor = Actor { pid, role: Some("app".into()), backend_type: Some("client backend".into()), ..Actor::default() };
        Who { actor, source, note: None }
    }

    #[test]
    fn what_was_said_in_subtransactions_belongs_to_the_transaction() {
        let mut testimony = Testimony::new();
        testimony.keep(xid(1), said("update", 5, 7));
        testimony.keep(xid(2), said("delete", 9, 7));
        testimony.keep(xid(3), said("delete", 1, 8));
        assert_eq!(testimony.of(&[xid(1), xid(2)]).len(), 2);
        let taken = testimony.take(&[xid(1), xid(2)]);
        let who = agree(&taken, seen(WhoSource::Unknown, None));
        assert_eq!((who.source, who.actor.query.as_deref()), (WhoSource::Guard, Some("delete 9")));
        assert!(testimony.of(&[xid(1), xid(2)]).is_empty());
        assert_eq!(testimony.of(&[xid(3)]).len(), 1);
    }

    #[test]
    fn the_guard_is_believed_where_the_agent_saw_the_same_or_nothing() {
        let said = [said("delete", 9, 7)];
        let who = agree(&said, seen(WhoSource::Activity, Some(7)));
        assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Guard, Some("shop")));
        assert_eq!(who.actor.backend_type.as_deref(), Some("client backend"));
        let who = agree(&said, seen(WhoSource::Nearby, Some(9)));
        assert_eq!((who.source, who.actor.pid, who.actor.backend_type), (WhoSource::Guard, Some(7), None));
        assert_eq!(agree(&[], seen(WhoSource::Nearby, Some(9))), seen(WhoSource::Nearby, Some(9)));
    }

    #[test]
    fn a_message_that_contradicts_what_the_server_showed_is_not_believed_and_told() {
        let who = agree(&[said("delete", 9, 666)], seen(WhoSource::Activity, Some(7)));
        assert_eq!((who.source, who.actor.pid), (WhoSource::Activity, Some(7)));
        assert!(who.note.unwrap().contains("666"));
    }

    #[test]
    fn memory_is_bounded_and_the_heaviest_messages_stay() {
        let mut testimony = Testimony::new();
        for rows in 0..100 {
            testimony.keep(xid(1), said("delete", rows, 7));
        }
        let kept = testimony.of(&[xid(1)]);
        assert_eq!(kept.len(), MESSAGES_MAX);
        assert!(kept.iter().any(|kept| weight(kept) == (2, 99)));
        for number in 2..20_000 {
            testimony.keep(xid(number), said("delete", 1, 7));
        }
        assert_eq!(testimony.heard.len(), XIDS_MAX);
        assert_eq!(testimony.order.len(), XIDS_MAX);
        assert!(testimony.of(&[xid(1)]).is_empty());
    }
}
