//! What a [`Trainer`] is worth on held-out rows.

use engine::Host;

use crate::data::Row;
use crate::error::Result;
use crate::eval::{EvalSettings, Evaluation, Judge, evaluate};
use crate::metrics::{Metrics, name};
use crate::trainer::Trainer;
use crate::verifier::Counts;

/// Keys the random streams of validations apart from those of steps. They are the same in every
/// validation, so that a curve moves with the weights alone.
const STREAM: u64 = u64::MAX;

/// Mean reward and accuracy on held-out rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    /// Mean of the rewards.
    pub reward: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Rows judged.
    pub rows: usize,
    /// Rewards that could not be had.
    pub failed: Counts,
    /// All verdicts, by source; empty after supervised training.
    pub evaluation: Evaluation,
}

impl Validation {
    /// Writes `val/accuracy`, `val/reward`, `val/reward_failures`, `val/reward_timeouts` and verl's
    /// metrics of each source.
    pub fn record(&self, metrics: &mut Metrics) {
        metrics.set(name::VAL_ACCURACY, self.accuracy);
        metrics.set("val/reward", self.reward);
        metrics.set("val/reward_failures", self.failed.failures as f64);
        metrics.set("val/reward_timeouts", self.failed.timeouts as f64);
        self.evaluation.record(metrics);
    }
}

impl Trainer {
    /// Judges responses to `rows`, sampled as `[validation]` says.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn validate(&mut self, rows: &[Row]) -> Result<Validation> {
        let validation = &self.config.validation;
        let settings = EvalSettings {
            samples: validation.n,
            temperature: (validation.temperature >= 0.0).then_some(validation.temperature as f32),
            top_p: validation.top_p as f32,
            top_k: usize::try_from(validation.top_k).ok(),
            max_tokens: self.config.data.max_response_length,
            stop: self.config.rollout.stop.clone(),
            seed: engine::random::hash(&[self.config.trainer.seed, STREAM]),
        };
        let judge = Judge { encoder: &self.encoder, rewards: &self.rewards, rows };
        let host = Host::new(&mut self.engine, self.guests.as_mut());
        let responses = evaluate(host, judge, &settings, &mut |_| {})?;
        let failed = self.rewards.take_counts();
        let verdicts = responses.iter().map(|response| &response.verdict);
        self.failure = self.rewards.first_failure(verdicts)?;
        let evaluation = Evaluation::of(rows, &responses);
        let (reward, accuracy) =
            evaluation.overall(&[]).map_or((0.0, 0.0), |all| (all.reward, all.mean));
        Ok(Validation { reward, accuracy, rows: rows.len(), failed, evaluation })
    }
}
