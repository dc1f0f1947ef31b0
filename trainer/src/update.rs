//! One optimizer update: a mini-batch of episodes, packed, forward, loss, backward, clip, AdamW.
//!
//! The loss sees the whole mini-batch at once, so its selections and the gradient do not depend on how
//! it is cut into micro-batches.

use std::ops::Range;

use engine::decoder::{Decoder, Gradients, Keep};
use kernels::{Kernels, TokenStats};

use crate::algorithm::Algorithm;
use crate::config::RlConfig;
use crate::error::{Error, Result};
use crate::learner::{Learner, LossGradient, Packed};
use crate::loss::ChoiceKey;
use crate::objective::{Micro, Objective, evaluate};
use crate::optimizer::{Optimizer, global_norm};

/// Episodes of one update; per-token values lie one response after the other.
pub(crate) struct MiniBatch<'a> {
    pub(crate) sequences: Vec<Packed<'a>>,
    /// Log-probability of each response token under the weights that sampled it.
    pub(crate) old: Vec<f32>,
    /// The same under the distribution it was drawn from.
    pub(crate) sampled: Vec<f32>,
    /// The same under the reference policy, if there is one.
    pub(crate) reference: Option<Vec<f32>>,
    /// Advantage of each response token.
    pub(crate) advantages: Vec<f32>,
    /// Whether each response token counts.
    pub(crate) mask: Vec<bool>,
    /// Whether the weights are still those that sampled it.
    pub(crate) weights: WeightsAge,
}

impl MiniBatch<'_> {
    /// The tokens of each response.
    pub(crate) fn responses(&self) -> Vec<Range<usize>> {
        let mut end = 0;
        let range = |sequence: &Packed<'_>| {
            let start = end;
            end += sequence.targets();
            start..end
        };
        self.sequences.iter().map(range).collect()
    }
}

/// Whether the weights have changed since a mini-batch was sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WeightsAge {
    /// They have not: the ratio of every token is exactly 1.
    Same,
    /// They have.
    Newer,
}

/// What an update did.
pub(crate) struct UpdateReport {
    pub(crate) objective: Objective,
    pub(crate) grad_norm: f64,
    /// False when the norm was not finite or no token counted, and the weights were left alone.
    pub(crate) applied: bool,
    /// Largest difference between old and new log-probability, where they must be equal.
    pub(crate) mismatch_max: f64,
    /// How many were not equal to the bit.
    pub(crate) mismatch_tokens: usize,
}

/// Everything an update changes besides the weights.
pub(crate) struct UpdateState {
    pub(crate) learner: Learner,
    pub(crate) grads: Gradients,
    pub(crate) optimizer: Optimizer,
}

impl UpdateState {
    pub(crate) fn new(decoder: &mut Decoder, keep: Keep) -> Self {
        let dtype = decoder.weights.dtype();
        Self {
            learner: Learner::new(decoder, keep),
            grads: Gradients::new(&decoder.config, dtype),
            optimizer: Optimizer::new(decoder),
        }
    }

    /// Runs one update of `mini` at learning rate `lr`.
    pub(crate) fn run(
        &mut self,
        (decoder, kernels): (&mut Decoder, &Kernels),
        (config, algorithm): (&RlConfig, &dyn Algorithm),
        mini: &MiniBatch<'_>,
        (key, lr): (ChoiceKey, f64),
    ) -> Result<UpdateReport> {
        let inv_temperature = (1.0 / config.rollout.temperature) as f32;
        let micros = Micro::cut(mini, config.trainer.max_tokens_per_microbatch);
        let (first, new) = self.new_log_probs((decoder, kernels), mini, &micros, inv_temperature);
        let objective = evaluate((config, algorithm), mini, &micros, &new, key)?;
        self.grads.clear();
        let mut report = UpdateReport {
            objective,
            grad_norm: 0.0,
            applied: false,
            mismatch_max: 0.0,
            mismatch_tokens: 0,
        };
        let mut first = first;
        for micro in &micros {
            let stats = match first.take() {
                Some(stats) => stats,
                None => {
                    let sequences = &mini.sequences[micro.sequences.clone()];
                    self.learner.forward(decoder, kernels, sequences, inv_temperature)
                }
            };
            if mini.weights == WeightsAge::Same {
                report.compare(&mini.old[micro.tokens.clone()], &stats);
            }
            let dlogp: Vec<f32> = report.objective.loss.dlogp[micro.tokens.clone()]
                .iter()
                .map(|d| *d as f32)
                .collect();
            let bonus = config.algorithm.entropy_coeff;
            let dentropy: Option<Vec<f32>> = (bonus != 0.0).then(|| {
                let weights = &report.objective.weights[micro.tokens.clone()];
                weights.iter().map(|w| (-bonus * w) as f32).collect()
            });
            let gradient = LossGradient {
                stats: &stats,
                inv_temperature,
                dlogp: &dlogp,
                dentropy: dentropy.as_deref(),
            };
            self.learner.backward(decoder, kernels, &gradient, &mut self.grads);
        }
        report.check()?;
        self.apply((decoder, kernels), config, lr, &mut report);
        Ok(report)
    }

    /// Log-probabilities of all tokens under the present weights. With one micro-batch its forward
    /// pass is handed on to the backward pass; while the weights are those that sampled, the sampled
    /// values are the present ones.
    fn new_log_probs(
        &mut self,
        (decoder, kernels): (&Decoder, &Kernels),
        mini: &MiniBatch<'_>,
        micros: &[Micro],
        inv_temperature: f32,
    ) -> (Option<Vec<TokenStats>>, Vec<f32>) {
        if let [_] = micros {
            let stats = self.learner.forward(decoder, kernels, &mini.sequences, inv_temperature);
            let new = stats.iter().map(|s| s.log_prob).collect();
            return (Some(stats), new);
        }
        if mini.weights == WeightsAge::Same {
            return (None, mini.old.clone());
        }
        let new = micros
            .iter()
            .flat_map(|micro| {
                let sequences = &mini.sequences[micro.sequences.clone()];
                self.learner.forward(decoder, kernels, sequences, inv_temperature)
            })
            .map(|stats| stats.log_prob)
            .collect();
        (None, new)
    }

    /// Clips the gradients and takes the step, unless their norm is not finite or they are of no token.
    fn apply(
        &mut self,
        (decoder, kernels): (&mut Decoder, &Kernels),
        config: &RlConfig,
        lr: f64,
        report: &mut UpdateReport,
    ) {
        report.grad_norm = global_norm(kernels, &self.grads);
        report.applied = report.grad_norm.is_finite() && report.objective.loss.stats.tokens > 0;
        if !report.applied {
            return;
        }
        let settings = config.optimizer.adamw(lr, report.grad_norm);
        self.optimizer.apply(decoder, kernels, &self.grads, &settings);
    }
}

impl UpdateReport {
    /// Fails unless weights that have not changed gave exactly the numbers of the rollout.
    fn check(&self) -> Result<()> {
        if self.mismatch_tokens == 0 {
            return Ok(());
        }
        Err(Error::numeric(format!(
            "{} log-probabilities of training differ from those of sampling, by up to {:e}",
            self.mismatch_tokens, self.mismatch_max
        )))
    }

    fn compare(&mut self, old: &[f32], new: &[TokenStats]) {
        for (old, new) in old.iter().zip(new) {
            self.mismatch_tokens += usize::from(old.to_bits() != new.log_prob.to_bits());
            self.mismatch_max = self.mismatch_max.max(f64::from((old - new.log_prob).abs()));
        }
    }
}
