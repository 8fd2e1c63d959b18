//! Why a message did not reach a channel, and whether it is worth another try.

use std::time::Duration;

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

    /// The same with every occurrence of a secret taken out.
    #[must_use]
    pub(super) fn without(self, secrets: &[&str]) -> Self {
        let clean = |mut text: String| {
            for secret in secrets.iter().filter(|secret| secret.len() >= 4) {
                text = text.replace(secret, "[secret]");
            }
            text
        };
        match self {
            Self::Unavailable { problem, retry_after, maybe_taken } => {
                Self::Unavailable { problem: clean(problem), retry_after, maybe_taken }
            }
            Self::Refused { problem, hint } => Self::Refused { problem: clean(problem), hint: hint.map(clean) },
        }
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
