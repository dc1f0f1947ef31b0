//! What a run is made of, where it is not what the configuration names: rows, rewards, an algorithm.
//!
//! Whatever is left out is as configured. Leaves out the engine, which every run is given.

use crate::algorithm::Algorithm;
use crate::data::Row;
use crate::source::Rows;
use crate::verifier::{Answered, OwnReward};

/// Parts of one's own.
///
/// ```
/// use trainer::Parts;
/// use trainer::data::{Prompt, Row};
/// let row = |n: u32| Row {
///     data_source: None,
///     prompt: Prompt::Text(format!("{n}+{n}=")),
///     ground_truth: (n + n).to_string(),
///     extra: serde_json::Value::Null,
/// };
/// let parts = Parts::new()
///     .rows((0..50).map(row).collect::<Vec<_>>())
///     .reward(|row, response| f64::from(u8::from(response == row.ground_truth)));
/// # let _ = parts;
/// ```
#[derive(Default)]
pub struct Parts {
    pub(crate) rows: Option<Rows>,
    pub(crate) validation: Option<Rows>,
    pub(crate) reward: Option<OwnReward>,
    pub(crate) algorithm: Option<Box<dyn Algorithm>>,
}

impl Parts {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Rows to train on, in place of those of `data.train_files`. A run that goes on wants the same ones.
    #[must_use]
    pub fn rows(self, rows: impl Into<Rows>) -> Self {
        Self { rows: Some(rows.into()), ..self }
    }

    /// Rows to validate on, in place of those of `data.val_files`.
    #[must_use]
    pub fn validation(self, rows: impl Into<Rows>) -> Self {
        Self { validation: Some(rows.into()), ..self }
    }

    /// A reward for each response, in place of `reward.function`: a number, or `None` where there is none
    /// ([`OwnReward::each`]).
    #[must_use]
    pub fn reward<R: Into<Option<f64>>>(
        self,
        reward: impl Fn(&Row, &str) -> R + Send + Sync + 'static,
    ) -> Self {
        Self { reward: Some(OwnReward::each(reward)), ..self }
    }

    /// The rewards of all responses of a rollout at a time ([`OwnReward::batch`]).
    #[must_use]
    pub fn reward_batch(
        self,
        reward: impl Fn(&[Answered]) -> Vec<Option<f64>> + Send + Sync + 'static,
    ) -> Self {
        Self { reward: Some(OwnReward::batch(reward)), ..self }
    }

    /// An algorithm, in place of the advantages and the loss of `[algorithm]`.
    #[must_use]
    pub fn algorithm(self, algorithm: impl Algorithm + 'static) -> Self {
        Self { algorithm: Some(Box::new(algorithm)), ..self }
    }
}
