//! What the guard said of a transaction and what the agent saw of it, together. Pure.

use std::sync::Arc;

use super::message::{self, GuardMessage, Operation, Told};
use crate::detect::definitions::MESSAGE_PREFIX;
use crate::detect::{Actor, Who, WhoSource};

/// Reads the messages that a transaction wrote ([`Transaction::messages`](crate::detect::Transaction)); those that are not
/// the guard's are left out.
pub fn read(messages: &[Arc<[u8]>]) -> Vec<GuardMessage> {
    messages.iter().filter_map(|content| message::read(MESSAGE_PREFIX, content)).collect()
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
    let seen = is_same.then(|| "the agent saw the same session with it in pg_stat_activity".to_owned());
    let reason = best.reason.as_ref().map(|reason| format!("the session gave a reason: {reason}"));
    let notes: Vec<String> = seen.into_iter().chain(reason).collect();
    Who { actor, source: WhoSource::Guard, note: (!notes.is_empty()).then(|| notes.join("; ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(operation: &str, rows: u64, pid: i32) -> String {
        format!(
            r#"{{"v":1,"role":"shop","pid":{pid},"query":"{operation} {rows}","what":{{"op":"{operation}","table":"t","rows":{rows}}}}}"#
        )
    }

    fn said(operation: &str, rows: u64, pid: i32) -> GuardMessage {
        message::read(message::PREFIX, text(operation, rows, pid).as_bytes()).unwrap()
    }

    fn seen(source: WhoSource, pid: Option<i32>) -> Who {
        let actor =
            Actor { pid, role: Some("app".into()), backend_type: Some("client backend".into()), ..Actor::default() };
        Who { actor, source, note: None }
    }

    #[test]
    fn of_several_messages_the_one_that_tells_of_most_loss_counts() {
        let (update, delete) = (text("update", 500, 7), text("delete", 9, 7));
        let raw: Vec<Arc<[u8]>> = [update.as_str(), "no JSON", &delete].map(|text| text.as_bytes().into()).into();
        let who = agree(&read(&raw), seen(WhoSource::Unknown, None));
        assert_eq!((who.source, who.actor.query.as_deref()), (WhoSource::Guard, Some("delete 9")));
    }

    #[test]
    fn the_guard_is_believed_where_the_agent_saw_the_same_or_nothing() {
        let said = [said("delete", 9, 7)];
        let who = agree(&said, seen(WhoSource::Activity, Some(7)));
        assert_eq!((who.source, who.actor.role.as_deref()), (WhoSource::Guard, Some("shop")));
        assert_eq!(who.actor.backend_type.as_deref(), Some("client backend"));
        assert!(who.note.unwrap().contains("saw the same session"));
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
}
