//! Why a message did not reach a channel, and whether it is worth another try.

use std::time::Duration;

/// What is shorter is not looked for: it would be found in any text.
const SECRET_BYTES_MIN: usize = 4;

/// A delivery failed. Texts hold no secret: the channel takes them out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The receiver is away, overloaded or hangs: the same message may be taken later.
    #[error("{problem}")]
    Unavailable {
        /// What happened.
        problem: String,
        /// For how long the receiver asked to be left alone.
        retry_after: Option<Duration>,
        /// The message was sent, and only the answer is missing: it may have arrived.
        maybe_taken: bool,
    },
    /// The receiver refuses this message, or us: it will refuse the next try too, until somebody changes something.
    #[error("{problem}")]
    Refused {
        /// What happened.
        problem: String,
        /// What the operator can do.
        hint: Option<String>,
    },
}

impl SendError {
    /// A receiver that was not reached.
    pub(super) const fn away(problem: String) -> Self {
        Self::Unavailable { problem, retry_after: None, maybe_taken: false }
    }

    /// True if the same message may be taken later.
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable { .. })
    }

    /// True if the message may have arrived although nobody said so.
    pub const fn maybe_taken(&self) -> bool {
        matches!(self, Self::Unavailable { maybe_taken: true, .. })
    }

    /// For how long the receiver asked to be left alone.
    pub const fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Unavailable { retry_after, .. } => *retry_after,
            Self::Refused { .. } => None,
        }
    }

    /// What the operator can do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unavailable { .. } => None,
            Self::Refused { hint, .. } => hint.clone(),
        }
    }

    /// The same with every occurrence of a secret taken out, also of one that was cut at the text's end.
    #[must_use]
    pub(super) fn without(self, secrets: &[&str]) -> Self {
        let mut secrets: Vec<&str> =
            secrets.iter().copied().filter(|secret| secret.len() >= SECRET_BYTES_MIN).collect();
        // The longest first: one may be a part of another.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.len()));
        let clean = |mut text: String| {
            for secret in &secrets {
                text = text.replace(secret, "[secret]");
            }
            without_cut(text, &secrets)
        };
        match self {
            Self::Unavailable { problem, retry_after, maybe_taken } => {
                Self::Unavailable { problem: clean(problem), retry_after, maybe_taken }
            }
            Self::Refused { problem, hint } => Self::Refused { problem: clean(problem), hint: hint.map(clean) },
        }
    }
}

/// Takes out what a text ends with, before the dots of an abridgement, if a secret begins with it.
fn without_cut(text: String, secrets: &[&str]) -> String {
    let (said, dots) = text.strip_suffix("...").map_or((text.as_str(), ""), |said| (said, "..."));
    let begins = |secret: &str| {
        let ends = secret.char_indices().map(|(at, _)| at).rev().take_while(|at| *at >= SECRET_BYTES_MIN);
        ends.filter_map(|at| said.strip_suffix(secret.get(..at)?)).map(str::len).next()
    };
    match secrets.iter().filter_map(|secret| begins(secret)).min() {
        Some(rest) => format!("{}[secret]{dots}", said.get(..rest).unwrap_or_default()),
        None => text,
    }
}

/// A channel cannot be used as it is set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("notify.{channel}: {problem}")]
pub struct OpenError {
    /// The channel.
    pub channel: String,
    /// What is wrong.
    pub problem: String,
    /// What the operator can do.
    pub hint: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(text: &str, secrets: &[&str]) -> String {
        SendError::away(text.to_owned()).without(secrets).to_string()
    }

    #[test]
    fn a_secret_is_taken_out_wherever_it_stands_and_wherever_it_was_cut() {
        assert_eq!(clean("no key hush-hush: hush-hush", &["hush-hush"]), "no key [secret]: [secret]");
        assert_eq!(clean("no key hush-hush-2", &["hush-hush", "hush-hush-2"]), "no key [secret]");
        assert_eq!(clean("no key hush-h...", &["hush-hush"]), "no key [secret]...");
        assert_eq!(clean("no key h\u{FC}sh-h", &["h\u{FC}sh-h\u{FC}sh"]), "no key [secret]");
        assert_eq!(clean("no key hus...", &["hush-hush", "a"]), "no key hus...", "too little to tell");
    }
}
