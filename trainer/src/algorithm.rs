//! An algorithm: two pure functions, from rewards to advantages and from log-probabilities to a loss.
//!
//! The trainer knows no more of a method than this trait. The configured methods implement it as one's own
//! does, and a pair of an estimator and a loss makes an algorithm too. Aggregation, importance weights, the
//! divergence from a reference policy and the entropy bonus are the trainer's, under any algorithm. Leaves
//! out state: what a step needs of earlier ones is not for an algorithm to remember.

use crate::advantage::{Estimated, Estimator, Outcomes, estimate};
use crate::config::AlgorithmConfig;
use crate::error::{Error, Result};
use crate::loss::{ChoiceKey, LossOutput, PolicyLoss, TokenBatch};

/// What a step learns by.
///
/// ```
/// use trainer::advantage::{Estimated, Estimator, Outcomes, Scale, estimate};
/// use trainer::loss::{ChoiceKey, LossOutput, PolicyLoss, TokenBatch, TokenLoss};
/// use trainer::{Algorithm, Result};
///
/// /// Dr.GRPO's advantages, and a loss that pulls the ratio back to 1.
/// struct Quadratic(f64);
///
/// impl Algorithm for Quadratic {
///     fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated> {
///         estimate(Estimator::Grpo(Scale::None), outcomes)
///     }
///
///     fn loss(&self, batch: &TokenBatch<'_, f32>, _: ChoiceKey) -> Result<LossOutput> {
///         let token = |i: usize| {
///             let (d, a) = (batch.log_ratio(i), f64::from(batch.advantage[i]));
///             let value = -a * d.exp() + self.0 * d * d;
///             TokenLoss { value, slope: -a * d.exp() + 2.0 * self.0 * d, ..TokenLoss::default() }
///         };
///         LossOutput::sum(batch, &(0..batch.mask.len()).map(token).collect::<Vec<_>>())
///     }
/// }
/// ```
pub trait Algorithm {
    /// The advantages of a step's responses, per response and per token, of the sizes of `outcomes`.
    ///
    /// # Errors
    /// If a reward is not finite.
    fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated>;

    /// The loss of a mini-batch and its derivative by each log-prob, 0 where masked, each with the token's
    /// weight. `key` names the update, for random choices that a seed repeats.
    ///
    /// # Errors
    /// If the loss or a derivative is not finite.
    fn loss(&self, batch: &TokenBatch<'_, f32>, key: ChoiceKey) -> Result<LossOutput>;
}

impl Algorithm for (Estimator, PolicyLoss) {
    fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated> {
        estimate(self.0, outcomes)
    }

    fn loss(&self, batch: &TokenBatch<'_, f32>, key: ChoiceKey) -> Result<LossOutput> {
        self.1.evaluate(batch, key)
    }
}

/// The method that a configuration describes.
impl Algorithm for AlgorithmConfig {
    fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated> {
        (self.estimator(), self.policy_loss()).advantages(outcomes)
    }

    fn loss(&self, batch: &TokenBatch<'_, f32>, key: ChoiceKey) -> Result<LossOutput> {
        (self.estimator(), self.policy_loss()).loss(batch, key)
    }
}

/// The advantages of `algorithm`, held to their sizes.
///
/// # Errors
/// As [`Algorithm::advantages`], and if there are too many or too few, or one is not finite.
pub(crate) fn advantages(algorithm: &dyn Algorithm, outcomes: &Outcomes<'_>) -> Result<Estimated> {
    let out = algorithm.advantages(outcomes)?;
    let tokens = outcomes.lengths.iter().sum::<usize>();
    for (what, got, wanted) in [
        ("responses", out.responses.values.len(), outcomes.scores.len()),
        ("tokens", out.tokens.len(), tokens),
        ("tokens", out.returns.as_ref().map_or(tokens, Vec::len), tokens),
    ] {
        if got != wanted {
            return Err(Error::config(format!(
                "the algorithm gave {got} advantages for {wanted} {what}"
            )));
        }
    }
    match out.tokens.iter().position(|a| !a.is_finite()) {
        Some(i) => Err(Error::numeric(format!("the advantage of token {i} is {}", out.tokens[i]))),
        None => Ok(out),
    }
}

/// The loss of `algorithm`, held to its sizes.
///
/// # Errors
/// As [`Algorithm::loss`], and if derivatives are too many or too few, or one is not finite.
pub(crate) fn loss(
    algorithm: &dyn Algorithm,
    batch: &TokenBatch<'_, f32>,
    key: ChoiceKey,
) -> Result<LossOutput> {
    let out = algorithm.loss(batch, key)?;
    let (got, wanted) = (out.dlogp.len(), batch.mask.len());
    if got != wanted {
        return Err(Error::config(format!(
            "the algorithm gave {got} derivatives for {wanted} tokens"
        )));
    }
    if let Some(i) = out.dlogp.iter().position(|d| !d.is_finite()) {
        return Err(Error::numeric(format!("the derivative of token {i} is {}", out.dlogp[i])));
    }
    Ok(out)
}
