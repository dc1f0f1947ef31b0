//! What a [`Trainer`] is worth on held-out rows.

use crate::data::Row;
use crate::error::Result;
use crate::rollout::{self, Episode};
use crate::sampling::greedy;
use crate::trainer::Trainer;

/// Mean reward and accuracy on held-out rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    /// Mean of the rewards.
    pub reward: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Rows judged.
    pub rows: usize,
}

impl Trainer {
    /// Greedy accuracy on `rows`.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn validate(&mut self, rows: &[Row]) -> Result<Validation> {
        let prompts = self.encode(rows.iter())?;
        let settings =
            greedy(self.settings(1, 0));
        let mut sum = Validation { reward: 0.0, accuracy: 0.0, rows: rows.len() };
        let rules = self.rewards;
        let mut failed = None;
        let mut judge = |episode: &Episode| {
            let row = &rows[episode.prompt];
            match rules.verifier(row.data_source.as_deref()) {
                Ok(verifier) => {
                    let verdict = verifier.judge(&episode.text, &row.ground_truth);
                    sum.reward += verdict.score / rows.len() as f64;
                    sum.accuracy += f64::from(u8::from(verdict.correct)) / rows.len() as f64;
                }
                Err(error) => failed = Some(error),
            }
        };
        rollout::generate(&mut self.engine, &prompts, &settings, &mut judge)?;
        failed.map_or(Ok(sum), Err)
    }
}
