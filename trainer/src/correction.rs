//! Truncated importance sampling: weights for what was sampled from another distribution than the one
//! that is trained (Yao et al., "Your efficient RL framework secretly brings you off-policy RL training",
//! 2025; verl's rollout correction).
//!
//! With `x = old - sampled`, the log-prob under the sampling weights' whole distribution less that of the
//! distribution drawn from, a token's weight is `min(exp(x), threshold)`; by response, `x` is summed over
//! its tokens first. `x` is clamped to +-20. In this engine the two distributions are the same to the bit
//! unless sampling was truncated (`top_p`, `top_k`), so all weights are 1 without truncation. Leaves out
//! rejection: a weight is never 0 for a valid token.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::loss::LOG_RATIO_CLAMP;
use crate::metrics::Metrics;

/// What has a ratio of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Each token.
    Token,
    /// Each response.
    Sequence,
}

/// Whether weights are divided by their mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// They are not.
    None,
    /// They are: over tokens, or over responses, by level.
    Batch,
}

/// How weights are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Truncation {
    /// What has a ratio.
    pub level: Level,
    /// Largest weight; above 0.
    pub threshold: f64,
    /// Whether they are divided by their mean.
    pub norm: Norm,
}

/// Importance weights and what is reported of them.
#[derive(Clone, Debug, PartialEq)]
pub struct Correction {
    /// One per token; 0 where masked.
    pub weights: Vec<f64>,
    /// Statistics of the ratios before truncation.
    pub stats: CorrectionStats,
}

/// Statistics over valid tokens, and over responses that have any; 0 where there are none.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CorrectionStats {
    /// Mean over tokens.
    pub mean: f64,
    /// Largest.
    pub max: f64,
    /// Smallest.
    pub min: f64,
    /// Standard deviation over tokens, of ratios clamped to `1 / threshold` and `threshold`.
    pub std: f64,
    /// Effective sample size as a share, of ratios clamped likewise.
    pub effective_sample_size: f64,
    /// Share above the threshold: of tokens, or of responses, by level.
    pub fraction_high: f64,
    /// Share below one over the threshold.
    pub fraction_low: f64,
    /// The same over responses, each with the mean of its tokens: mean, unbiased standard deviation,
    /// largest, smallest, largest distance from 1.
    pub seq_mean: f64,
    /// Unbiased standard deviation over responses.
    pub seq_std: f64,
    /// Largest of a response.
    pub seq_max: f64,
    /// Smallest of a response.
    pub seq_min: f64,
    /// Largest distance of a response from 1.
    pub seq_max_deviation: f64,
    /// Share of responses above the threshold.
    pub seq_fraction_high: f64,
    /// Share of responses below one over the threshold.
    pub seq_fraction_low: f64,
    /// What the weights were divided by; 1 for nothing.
    pub batch_norm_factor: f64,
    /// Tokens whose weight was truncated.
    pub truncated_tokens: usize,
}

/// The weights of the tokens of a step or mini-batch. `responses` are disjoint ranges of tokens that
/// cover every valid one.
///
/// # Panics
/// If the slices differ in length or a range reaches past them.
///
/// ```
/// use trainer::correction::{Level, Norm, Truncation, importance_weights};
/// let how = Truncation { level: Level::Token, threshold: 2.0, norm: Norm::None };
/// let old = [-1.0f64, -1.0];
/// let sampled = [-1.0, -4.0];
/// let one = 0..2;
/// let out = importance_weights(&old, &sampled, &[true; 2], std::slice::from_ref(&one), how);
/// assert_eq!(out.weights, [1.0, 2.0]);
/// assert_eq!(out.stats.truncated_tokens, 1);
/// ```
pub fn importance_weights<T: Copy + Into<f64>>(
    old: &[T],
    sampled: &[T],
    mask: &[bool],
    responses: &[Range<usize>],
    how: Truncation,
) -> Correction {
    assert_eq!([old.len(), sampled.len()], [mask.len(); 2], "one entry per token");
    let log_ratio = |i: usize| old[i].into() - sampled[i].into();
    let ratio = |x: f64| x.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp();
    let mut ratios = vec![0.0; mask.len()];
    for response in responses {
        let valid = || response.clone().filter(|i| mask[*i]);
        let sum: f64 = valid().map(log_ratio).sum();
        for i in valid() {
            ratios[i] = match how.level {
                Level::Token => ratio(log_ratio(i)),
                Level::Sequence => ratio(sum),
            };
        }
    }
    let mut stats = CorrectionStats::new(&ratios, mask, responses, how);
    let mut weights: Vec<f64> = ratios.iter().map(|r| r.min(how.threshold)).collect();
    stats.batch_norm_factor = match how.norm {
        Norm::None => 1.0,
        Norm::Batch => norm(&weights, mask, responses, how.level),
    };
    weights.iter_mut().for_each(|w| *w /= stats.batch_norm_factor);
    Correction { weights, stats }
}

/// The mean weight over tokens or responses; 1 where that would be no divisor.
fn norm(weights: &[f64], mask: &[bool], responses: &[Range<usize>], level: Level) -> f64 {
    let mean = match level {
        Level::Token => mean_of(&valid_values(weights, mask)),
        Level::Sequence => mean_of(&response_means(weights, mask, responses)),
    };
    if mean > 0.0 { mean } else { 1.0 }
}

impl CorrectionStats {
    fn new(ratios: &[f64], mask: &[bool], responses: &[Range<usize>], how: Truncation) -> Self {
        let tokens = valid_values(ratios, mask);
        if tokens.is_empty() {
            return Self::default();
        }
        let by_response = response_means(ratios, mask, responses);
        let (high, low) = (how.threshold, how.threshold.recip());
        let share = |values: &[f64], of: &dyn Fn(f64) -> bool| {
            values.iter().filter(|v| of(**v)).count() as f64 / values.len() as f64
        };
        let units = if how.level == Level::Token { &tokens } else { &by_response };
        let clamped: Vec<f64> = tokens.iter().map(|r| r.max(low).min(high)).collect();
        let center = mean_of(&clamped);
        let squares: Vec<f64> = clamped.iter().map(|r| (r - center).powi(2)).collect();
        let relative: Vec<f64> = clamped.iter().map(|r| (r / center).powi(2)).collect();
        let (seq_mean, count) = (mean_of(&by_response), by_response.len() as f64);
        let deviations = by_response.iter().map(|r| (r - seq_mean).powi(2)).sum::<f64>();
        Self {
            mean: mean_of(&tokens),
            max: largest(&tokens),
            min: smallest(&tokens),
            std: mean_of(&squares).sqrt(),
            effective_sample_size: mean_of(&relative).recip(),
            fraction_high: share(units, &|r| r > high),
            fraction_low: share(units, &|r| r < low),
            seq_mean,
            seq_std: (deviations / (count - 1.0).max(1.0)).sqrt(),
            seq_max: largest(&by_response),
            seq_min: smallest(&by_response),
            seq_max_deviation: by_response.iter().fold(0.0, |m, r| (r - 1.0).abs().max(m)),
            seq_fraction_high: share(&by_response, &|r| r > high),
            seq_fraction_low: share(&by_response, &|r| r < low),
            batch_norm_factor: 1.0,
            truncated_tokens: tokens.iter().filter(|r| **r > high).count(),
        }
    }

    /// Writes the statistics under verl's names, `rollout_corr/`.
    pub fn record(&self, metrics: &mut Metrics) {
        for (name, value) in [
            ("rollout_is_mean", self.mean),
            ("rollout_is_max", self.max),
            ("rollout_is_min", self.min),
            ("rollout_is_std", self.std),
            ("rollout_is_eff_sample_size", self.effective_sample_size),
            ("rollout_is_ratio_fraction_high", self.fraction_high),
            ("rollout_is_ratio_fraction_low", self.fraction_low),
            ("rollout_is_seq_mean", self.seq_mean),
            ("rollout_is_seq_std", self.seq_std),
            ("rollout_is_seq_max", self.seq_max),
            ("rollout_is_seq_min", self.seq_min),
            ("rollout_is_seq_max_deviation", self.seq_max_deviation),
            ("rollout_is_seq_fraction_high", self.seq_fraction_high),
            ("rollout_is_seq_fraction_low", self.seq_fraction_low),
            ("rollout_is_batch_norm_factor", self.batch_norm_factor),
            ("truncated_tokens", self.truncated_tokens as f64),
        ] {
            metrics.set(&format!("rollout_corr/{name}"), value);
        }
    }
}

/// The geometric mean of the weights of each response in place of its tokens' weights: what a loss that has
/// one ratio per response is weighed by (verl's choice for GMPO).
///
/// ```
/// let mut weights = [1.0, 4.0, 3.0];
/// trainer::correction::by_response(&mut weights, &[0..2, 2..3]);
/// assert_eq!(weights[0], weights[1]);
/// assert!((weights[0] - 2.0).abs() < 1e-12 && (weights[2] - 3.0).abs() < 1e-12);
/// ```
pub fn by_response(weights: &mut [f64], responses: &[Range<usize>]) {
    for response in responses {
        let row = &mut weights[response.clone()];
        let valid = row.iter().filter(|w| **w > 0.0).count().max(1) as f64;
        let logs: f64 = row.iter().filter(|w| **w > 0.0).map(|w| w.ln()).sum();
        let mean = (logs / valid).exp();
        row.iter_mut().filter(|w| **w > 0.0).for_each(|w| *w = mean);
    }
}

fn valid_values(values: &[f64], mask: &[bool]) -> Vec<f64> {
    values.iter().zip(mask).filter(|(_, m)| **m).map(|(v, _)| *v).collect()
}

/// The mean over the valid tokens of each response that has any.
fn response_means(values: &[f64], mask: &[bool], responses: &[Range<usize>]) -> Vec<f64> {
    responses
        .iter()
        .map(|range| valid_values(&values[range.clone()], &mask[range.clone()]))
        .filter(|row| !row.is_empty())
        .map(|row| mean_of(&row))
        .collect()
}

/// 0 for none.
fn mean_of(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len().max(1) as f64
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn smallest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_distributions_have_weights_of_one_and_nothing_has_none() {
        for level in [Level::Token, Level::Sequence] {
            for norm in [Norm::None, Norm::Batch] {
                let how = Truncation { level, threshold: 2.0, norm };
                let old = [-1.5f32, -0.25, -9.0];
                let out = importance_weights(&old, &old, &[true; 3], &[0..2, 2..2, 2..3], how);
                assert_eq!(out.weights, [1.0; 3]);
                assert_eq!((out.stats.effective_sample_size, out.stats.std), (1.0, 0.0));
                let out = importance_weights(&old, &old, &[false; 3], &[0..2, 2..3], how);
                assert_eq!(out.weights, [0.0; 3]);
                assert_eq!(out.stats, CorrectionStats { batch_norm_factor: 1.0, ..out.stats });
                assert_eq!((out.stats.mean, out.stats.max), (0.0, 0.0));
            }
        }
    }
}
