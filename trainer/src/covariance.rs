//! The covariance of a token: how much it, by itself, drives the entropy down.
//!
//! `cov_i = (logp_i - mean logp) (A_i - mean A)`, over the valid tokens of a scope (arXiv 2505.22617,
//! section 3; their mean is Cov(log pi, A) of its theorem 2). Means are plain means in f64, in token
//! order. The scope is the caller's: the whole mini-batch by default, each micro-batch to reproduce
//! the reference code.

use std::ops::Range;

use crate::metrics::{Metrics, name};

/// The covariance of each token, given the scopes over which means are taken (disjoint ranges of
/// tokens); minus infinity where `mask` is false and outside every scope.
///
/// # Panics
/// If the slices differ in length or a scope reaches past them.
pub fn token_covariances<T: Copy + Into<f64>>(
    log_prob: &[T],
    advantage: &[T],
    mask: &[bool],
    scopes: &[Range<usize>],
) -> Vec<f64> {
    assert_eq!(log_prob.len(), mask.len(), "each log-prob needs a mask");
    assert_eq!(advantage.len(), mask.len(), "each advantage needs a mask");
    let mut out = vec![f64::NEG_INFINITY; mask.len()];
    for scope in scopes {
        let valid = || scope.clone().filter(|i| mask[*i]);
        let n = valid().count() as f64;
        let mean_log_prob = valid().map(|i| log_prob[i].into()).sum::<f64>() / n;
        let mean_advantage = valid().map(|i| advantage[i].into()).sum::<f64>() / n;
        for i in valid() {
            out[i] = (advantage[i].into() - mean_advantage) * (log_prob[i].into() - mean_log_prob);
        }
    }
    out
}

/// What is reported of the covariances of a step or update.
#[derive(Clone, Debug, PartialEq)]
pub struct CovStats {
    /// Tokens that have a covariance.
    pub tokens: usize,
    /// Mean over all: Cov(log pi, A).
    pub mean: f64,
    /// Standard deviation (divided by the number of tokens).
    pub std: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
    /// The value that 99 % of the tokens do not exceed (nearest rank).
    pub p99: f64,
    /// Means of the largest 0.02, 0.2, 2, 20 and 50 % of the tokens (at least one each), the groups
    /// of the paper's table.
    pub top_means: [f64; 5],
    /// Share of the tokens above 1.
    pub share_above_1: f64,
    /// Share of the tokens in [1, 5], the band from which Clip-Cov chooses.
    pub share_1_to_5: f64,
}

/// The groups of [`CovStats::top_means`], in per cent.
pub const TOP_PERCENT: [f64; 5] = [0.02, 0.2, 2.0, 20.0, 50.0];

/// Mean of the first `percent` of values that are sorted downwards, rounded down but at least one.
///
/// # Panics
/// If there are no values, or `percent` is above 100.
pub fn top_mean(sorted: &[f64], percent: f64) -> f64 {
    let count = ((sorted.len() as f64 * percent / 100.0) as usize).max(1);
    sorted[..count].iter().sum::<f64>() / count as f64
}

impl CovStats {
    /// Statistics of `covariances`; infinite entries (masked tokens) are left out. `None` if nothing
    /// is left.
    pub fn new(covariances: &[f64]) -> Option<Self> {
        let sorted = largest_first(covariances);
        let n = sorted.len();
        let (max, min) = (*sorted.first()?, *sorted.last()?);
        let above_1 = sorted.iter().filter(|c| **c > 1.0).count();
        let in_band = sorted.iter().filter(|c| (1.0..=5.0).contains(*c)).count();
        let mean = sorted.iter().sum::<f64>() / n as f64;
        let square = sorted.iter().map(|c| (c - mean) * (c - mean)).sum::<f64>();
        Some(Self {
            tokens: n,
            mean,
            std: (square / n as f64).sqrt(),
            min,
            max,
            p99: sorted[n - (0.99 * n as f64).ceil() as usize],
            top_means: TOP_PERCENT.map(|percent| top_mean(&sorted, percent)),
            share_above_1: above_1 as f64 / n as f64,
            share_1_to_5: in_band as f64 / n as f64,
        })
    }

    /// Writes the statistics under `cov/`.
    pub fn record(&self, metrics: &mut Metrics) {
        metrics.set(name::COV_MEAN, self.mean);
        metrics.set(name::COV_P99, self.p99);
        metrics.set(name::COV_MAX, self.max);
        metrics.set("cov/min", self.min);
        metrics.set("cov/std", self.std);
        for (percent, mean) in TOP_PERCENT.iter().zip(self.top_means) {
            metrics.set(&format!("cov/top_{percent}pct_mean"), mean);
        }
        metrics.set("cov/share_above_1", self.share_above_1);
        metrics.set(name::COV_SHARE_1_TO_5, self.share_1_to_5);
    }
}

/// What is not masked, in descending order.
fn largest_first(covariances: &[f64]) -> Vec<f64> {
    let mut sorted: Vec<f64> =
        covariances.iter().copied().filter(|c| *c != f64::NEG_INFINITY).collect();
    sorted.sort_by(|a, b| b.total_cmp(a));
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_have_their_own_means_and_masked_tokens_none() {
        let log_prob = [-1.0, -3.0, -9.0, 0.0, -2.0];
        let advantage = [1.0, -1.0, 7.0, 2.0, 0.0];
        let mask = [true, true, false, true, true];
        let cov = token_covariances(&log_prob, &advantage, &mask, &[0..3, 3..5]);
        assert_eq!(cov, [1.0, 1.0, f64::NEG_INFINITY, 1.0, 1.0]);
        let whole = token_covariances(&log_prob, &advantage, &mask, std::slice::from_ref(&(0..5)));
        assert_eq!(whole, [0.25, 2.25, f64::NEG_INFINITY, 2.25, 0.25]);
    }

    #[test]
    fn statistics_of_a_known_list() {
        let covariances: Vec<f64> = (1..=100).map(f64::from).chain([f64::NEG_INFINITY]).collect();
        let s = CovStats::new(&covariances).unwrap();
        assert_eq!((s.tokens, s.mean, s.min, s.max, s.p99), (100, 50.5, 1.0, 100.0, 99.0));
        assert_eq!(s.top_means, [100.0, 100.0, 99.5, 90.5, 75.5]);
        assert_eq!((s.share_1_to_5, s.share_above_1), (0.05, 0.99));
        assert!((s.std - 833.25f64.sqrt()).abs() < 1e-12);
        assert_eq!(CovStats::new(&[f64::NEG_INFINITY]), None);
        let mut metrics = Metrics::new();
        s.record(&mut metrics);
        assert_eq!(metrics.get("cov/top_0.2pct_mean"), Some(100.0));
    }
}
