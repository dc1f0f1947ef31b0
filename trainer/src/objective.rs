//! The loss of a mini-batch, all terms together, as a function of its log-probabilities: the policy loss under
//! importance weights, and the divergence from the reference. The entropy bonus is linear in the entropies,
//! so its derivative is the token's weight and it is added where the backward pass begins.

use std::ops::Range;

use crate::agg::{self, AggScope};
use crate::algorithm::{self, Algorithm};
use crate::config::{CovScope, LossMode, RlConfig};
use crate::correction::{CorrectionStats, by_response, importance_weights};
use crate::error::{Error, Result};
use crate::learner::Packed;
use crate::loss::{ChoiceKey, LossOutput, TokenBatch};
use crate::packing::pack;
use crate::update::MiniBatch;

/// What the terms came to.
pub(crate) struct Objective {
    /// The policy loss; its `dlogp` has the derivatives of all terms.
    pub(crate) loss: LossOutput,
    /// Each token's weight in an aggregated term.
    pub(crate) weights: Vec<f64>,
    /// The aggregated divergence from the reference, before its coefficient.
    pub(crate) kl: Option<f64>,
    /// Of the importance weights.
    pub(crate) correction: Option<CorrectionStats>,
}

/// Part of a mini-batch that passes at once: neighbouring sequences and their tokens.
pub(crate) struct Micro {
    pub(crate) sequences: Range<usize>,
    pub(crate) tokens: Range<usize>,
}

impl Micro {
    pub(crate) fn cut(mini: &MiniBatch<'_>, budget: usize) -> Vec<Self> {
        let mut end = 0;
        pack(&mini.sequences, budget)
            .into_iter()
            .map(|sequences| {
                let tokens =
                    mini.sequences[sequences.clone()].iter().map(Packed::targets).sum::<usize>();
                let start = end;
                end += tokens;
                Self { sequences, tokens: start..end }
            })
            .collect()
    }
}

/// The objective of `mini` where its log-probabilities are `new`.
///
/// # Errors
/// If a log-probability, the loss or a derivative is not finite.
pub(crate) fn evaluate(
    (config, algorithm): (&RlConfig, &dyn Algorithm),
    mini: &MiniBatch<'_>,
    micros: &[Micro],
    new: &[f32],
    key: ChoiceKey,
) -> Result<Objective> {
    if let Some(i) = new.iter().position(|x| !x.is_finite()) {
        return Err(Error::numeric(format!("log-probability {i} of the mini-batch is {}", new[i])));
    }
    let all = 0..mini.old.len();
    let scopes: Vec<Range<usize>> = match config.algorithm.cov_scope {
        CovScope::Minibatch => vec![all],
        CovScope::Microbatch => micros.iter().map(|micro| micro.tokens.clone()).collect(),
    };
    let responses = mini.responses();
    let weights = token_weights(config, mini, micros);
    let (policy_weights, correction) = corrected(config, mini, &responses, &weights);
    let batch = TokenBatch {
        log_prob: new,
        old_log_prob: &mini.old,
        advantage: &mini.advantages,
        mask: &mini.mask,
        weight: &policy_weights,
        scopes: &scopes,
        responses: &responses,
    };
    let mut loss = algorithm::loss(algorithm, &batch, key)?;
    let kl = mini
        .reference
        .as_ref()
        .filter(|_| config.algorithm.use_kl_loss)
        .map(|reference| add_divergence(config, (new, reference), &weights, &mut loss));
    Ok(Objective { loss, weights, kl, correction })
}

/// Adds the derivatives of the divergence to those of the loss; returns the divergence.
fn add_divergence(
    config: &RlConfig,
    (new, reference): (&[f32], &[f32]),
    weights: &[f64],
    loss: &mut LossOutput,
) -> f64 {
    let (estimator, coef) = (config.algorithm.kl_loss_type, config.algorithm.kl_loss_coef);
    let mut sum = 0.0;
    for i in (0..new.len()).filter(|i| weights[*i] != 0.0) {
        let (value, slope) = estimator.evaluate(f64::from(new[i]), f64::from(reference[i]));
        sum += value * weights[i];
        loss.dlogp[i] += coef * slope * weights[i];
    }
    sum
}

/// Weights under the importance weights, where those are asked for.
fn corrected(
    config: &RlConfig,
    mini: &MiniBatch<'_>,
    responses: &[Range<usize>],
    weights: &[f64],
) -> (Vec<f64>, Option<CorrectionStats>) {
    let Some(how) = config.algorithm.truncation() else { return (weights.to_vec(), None) };
    let mut is = importance_weights(&mini.old, &mini.sampled, &mini.mask, responses, how);
    if let LossMode::GeoMean = config.algorithm.loss_mode {
        by_response(&mut is.weights, responses);
    }
    let product = weights.iter().zip(&is.weights).map(|(w, is)| w * is).collect();
    (product, Some(is.stats))
}

/// Each token's weight in an aggregated term; 0 where masked.
fn token_weights(config: &RlConfig, mini: &MiniBatch<'_>, micros: &[Micro]) -> Vec<f64> {
    let lengths: Vec<usize> = mini.sequences.iter().map(Packed::targets).collect();
    let norm = config.data.max_response_length as f64;
    let mode = config.algorithm.loss_agg_mode;
    match config.algorithm.agg_scope {
        AggScope::Global => agg::weights(mode, &lengths, &mini.mask, norm),
        AggScope::Legacy => {
            let rows: Vec<Range<usize>> = micros.iter().map(|m| m.sequences.clone()).collect();
            agg::legacy_weights((mode, norm), &lengths, &mini.mask, &rows)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::update::WeightsAge;

    const TOKENS: [u32; 4] = [1, 2, 3, 4];

    /// Two responses of 3 and 1 tokens, the second behind a prompt of 3.
    fn mini(mask: [bool; 4], reference: Option<Vec<f32>>) -> MiniBatch<'static> {
        MiniBatch {
            sequences: vec![
                Packed { tokens: &TOKENS, prompt_len: 1 },
                Packed { tokens: &TOKENS, prompt_len: 3 },
            ],
            old: vec![-1.0; 4],
            sampled: vec![-0.5; 4],
            reference,
            advantages: vec![1.0; 4],
            mask: mask.to_vec(),
            weights: WeightsAge::Newer,
        }
    }

    fn objective(pairs: &[(&str, &str)], mini: &MiniBatch<'_>) -> Objective {
        let set: Vec<(String, String)> =
            pairs.iter().map(|(k, v)| (format!("algorithm.{k}"), (*v).to_owned())).collect();
        let config = RlConfig::resolve(None, None, &set).unwrap();
        let micros = Micro::cut(mini, 3);
        assert_eq!(micros.len(), 2);
        let key = ChoiceKey { seed: 0, step: 1, update: 0 };
        evaluate((&config, &config.algorithm), mini, &micros, &[-1.0; 4], key).unwrap()
    }

    #[test]
    fn denominators_are_global_or_those_of_micro_batches() {
        let mini = mini([true; 4], None);
        assert_eq!(objective(&[], &mini).loss.dlogp, [-0.25; 4]);
        let legacy = objective(&[("agg_scope", "legacy")], &mini);
        assert_eq!(legacy.loss.dlogp, [-1.0 / 6.0, -1.0 / 6.0, -1.0 / 6.0, -0.5]);
    }

    #[test]
    fn masked_responses_do_not_count_and_nothing_left_is_nothing_to_do() {
        let some = objective(&[], &mini([false, false, false, true], None));
        assert_eq!(some.loss.dlogp, [0.0, 0.0, 0.0, -1.0]);
        let none = objective(&[("agg_scope", "legacy")], &mini([false; 4], None));
        assert_eq!((none.loss.loss, none.loss.stats.tokens), (0.0, 0));
        assert_eq!(none.loss.dlogp, [0.0; 4]);
    }

    #[test]
    fn the_divergence_adds_its_derivative() {
        let mini = mini([true; 4], Some(vec![-1.0, -2.0, -1.0, 0.0]));
        let pairs = [("use_kl_loss", "true"), ("kl_loss_type", "k2"), ("kl_loss_coef", "0.5")];
        let out = objective(&pairs, &mini);
        assert_eq!(out.kl, Some(0.25));
        assert_eq!(out.loss.dlogp, [-0.25, -0.125, -0.25, -0.375]);
        assert_eq!(objective(&[], &mini).kl, None);
    }

    #[test]
    fn importance_weights_multiply_the_policy_loss_alone() {
        let mini = mini([true; 4], None);
        let out = objective(&[("rollout_correction.rollout_is", "token")], &mini);
        let want = -0.25 * (-0.5f64).exp();
        assert!(out.loss.dlogp.iter().all(|d| (d - want).abs() < 1e-12));
        assert_eq!(out.weights, [0.25; 4]);
        assert_eq!(out.correction.map(|c| c.truncated_tokens), Some(0));
    }
}
