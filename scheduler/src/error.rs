//! The error of the crate: what was refused, with the value and its limit.

use std::fmt;

use crate::ids::SeqId;

/// A call that was refused. Whatever is refused changes nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error {
    kind: ErrorKind,
}

impl Error {
    /// What was refused, for callers who decide by it.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The block size is no positive multiple of 16.
    BlockSize {
        /// The block size in tokens.
        value: usize,
    },
    /// A value is below its least.
    TooSmall {
        /// The field.
        name: &'static str,
        /// What was asked for.
        value: usize,
        /// The least that is possible.
        limit: usize,
    },
    /// A value is above its most.
    TooLarge {
        /// The field.
        name: &'static str,
        /// What was asked for.
        value: usize,
        /// The most that is possible.
        limit: usize,
    },
    /// A sequence has no token to begin with.
    EmptyPrompt,
    /// A prompt is longer than the model can read.
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// The most tokens of a sequence.
        limit: usize,
    },
    /// A sequence would not fit the KV memory even alone.
    NeverFits {
        /// Blocks the sequence needs at its end.
        blocks: usize,
        /// Blocks of the KV memory.
        limit: usize,
    },
    /// The weights are being updated.
    Updating,
    /// The last plan was neither committed nor rolled back.
    PlanInFlight,
    /// There is no plan to commit or to roll back.
    NoPlan,
    /// A token was given for a sequence that never was.
    UnknownSequence(SeqId),
    /// A token was given for a sequence that does not sample in this plan.
    NotSampling(SeqId),
    /// A sequence was given a token behind one that was not guessed, or behind all its guesses.
    NotGuessed {
        /// The sequence.
        seq: SeqId,
        /// The token before.
        after: u32,
    },
    /// A sequence that samples in this plan was given no token.
    MissingSample(SeqId),
    /// An update was asked for while there is work.
    Busy {
        /// Sequences that run.
        running: usize,
        /// Sequences that wait.
        waiting: usize,
    },
}

impl From<ErrorKind> for Error {
    fn from(kind: ErrorKind) -> Self {
        Self { kind }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            ErrorKind::BlockSize { value } => {
                write!(f, "block_size is {value}, must be a multiple of 16")
            }
            ErrorKind::TooSmall { name, value, limit } => {
                write!(f, "{name} is {value}, minimum is {limit}")
            }
            ErrorKind::TooLarge { name, value, limit } => {
                write!(f, "{name} is {value}, limit is {limit}")
            }
            ErrorKind::EmptyPrompt => write!(f, "prompt is empty"),
            ErrorKind::PromptTooLong { tokens, limit } => {
                write!(f, "prompt has {tokens} tokens, limit is {limit}")
            }
            ErrorKind::NeverFits { blocks, limit } => {
                write!(f, "sequence needs {blocks} blocks of kv memory, limit is {limit}")
            }
            ErrorKind::Updating => write!(f, "the weights are being updated"),
            ErrorKind::PlanInFlight => {
                write!(f, "the last plan was neither committed nor rolled back")
            }
            ErrorKind::NoPlan => write!(f, "there is no plan to commit or roll back"),
            ErrorKind::UnknownSequence(id) => write!(f, "sequence {} does not exist", id.0),
            ErrorKind::NotSampling(id) => {
                write!(f, "sequence {} does not sample in this plan", id.0)
            }
            ErrorKind::NotGuessed { seq, after } => {
                write!(f, "sequence {} was given a token after {after}, not guessed there", seq.0)
            }
            ErrorKind::MissingSample(id) => write!(f, "sequence {} was given no token", id.0),
            ErrorKind::Busy { running, waiting } => write!(
                f,
                "weights cannot be updated while {running} sequences run and {waiting} wait"
            ),
        }
    }
}

impl std::error::Error for Error {}
