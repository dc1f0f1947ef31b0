//! How the losses of single tokens become one number: a weight per token.
//!
//! Every mode of verl is a weighted sum, so the gradient of the whole is the token's gradient times
//! its weight. Denominators are those of the whole mini-batch (`m` the mask, `n_i` the valid tokens
//! of response `i`, `N` their sum, `B` the responses with a valid token), which makes the result
//! independent of how the mini-batch is cut into micro-batches:
//!
//! | mode | weight of a valid token of response i |
//! |---|---|
//! | `token-mean` | 1 / N |
//! | `seq-mean-token-sum` | 1 / B |
//! | `seq-mean-token-mean` | 1 / (B n_i) |
//! | `seq-mean-token-sum-norm` | 1 / L, L a constant (the longest response allowed) |
//!
//! Responses without a valid token are left out; without any valid token the loss is 0.
//!
//! [`legacy_weights`] reproduces what verl's and the paper's actors optimise instead: each micro-batch is
//! aggregated by itself and weighs as much as its share of the responses, so `token-mean` is no mean over
//! the tokens of the mini-batch.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The modes, by verl's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AggMode {
    /// Every token counts the same (DAPO; the paper's scripts).
    TokenMean,
    /// Sum over a response, mean over responses.
    SeqMeanTokenSum,
    /// Mean over a response, mean over responses (the original GRPO).
    SeqMeanTokenMean,
    /// Sum of all, over a constant (Dr.GRPO).
    SeqMeanTokenSumNorm,
}

/// The weight of each token of a mini-batch.
///
/// `lengths` are the tokens of each response, which lie one after the other in `mask`. `norm` is the
/// constant of [`AggMode::SeqMeanTokenSumNorm`], in tokens.
///
/// # Panics
/// If `lengths` do not add up to the length of `mask`.
///
/// ```
/// use trainer::agg::{AggMode, weights};
/// let mask = [true, true, false, true];
/// assert_eq!(weights(AggMode::SeqMeanTokenMean, &[3, 1], &mask, 4.0), [0.25, 0.25, 0.0, 0.5]);
/// ```
pub fn weights(mode: AggMode, lengths: &[usize], mask: &[bool], norm: f64) -> Vec<f64> {
    assert_eq!(lengths.iter().sum::<usize>(), mask.len(), "lengths must cover the mask");
    let mut rest = mask;
    let valid: Vec<usize> = lengths
        .iter()
        .map(|n| {
            let (row, tail) = rest.split_at(*n);
            rest = tail;
            row.iter().filter(|m| **m).count()
        })
        .collect();
    let total = valid.iter().sum::<usize>() as f64;
    let rows = valid.iter().filter(|n| **n > 0).count() as f64;
    let mut out = Vec::with_capacity(mask.len());
    for (length, n) in lengths.iter().zip(&valid) {
        let weight = match mode {
            AggMode::TokenMean => 1.0 / total,
            AggMode::SeqMeanTokenSum => 1.0 / rows,
            AggMode::SeqMeanTokenMean => 1.0 / (rows * *n as f64),
            AggMode::SeqMeanTokenSumNorm => 1.0 / norm,
        };
        let row = out.len()..out.len() + length;
        out.extend(mask[row].iter().map(|m| if *m { weight } else { 0.0 }));
    }
    out
}

/// Over what the denominators of a loss are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AggScope {
    /// The whole mini-batch ([`weights`]).
    Global,
    /// Each micro-batch ([`legacy_weights`]).
    Legacy,
}

/// As [`weights`], with the denominators of each micro-batch: `micro_batches` are ranges of responses
/// that cover all of them in order.
///
/// # Panics
/// If `lengths` do not add up to the length of `mask`, or the ranges do not cover the responses.
///
/// ```
/// use trainer::agg::{AggMode, legacy_weights};
/// let mask = [true; 4];
/// let each = [0..1, 1..2];
/// let w = legacy_weights((AggMode::TokenMean, 4.0), &[3, 1], &mask, &each);
/// assert_eq!(w[3], 3.0 * w[0]);
/// ```
pub fn legacy_weights(
    (mode, norm): (AggMode, f64),
    lengths: &[usize],
    mask: &[bool],
    micro_batches: &[Range<usize>],
) -> Vec<f64> {
    let covered: usize = micro_batches.iter().map(Range::len).sum();
    assert_eq!(covered, lengths.len(), "micro-batches must cover the responses");
    let (mut out, mut rest) = (Vec::with_capacity(mask.len()), mask);
    for rows in micro_batches {
        let lengths_here = &lengths[rows.clone()];
        let (own, tail) = rest.split_at(lengths_here.iter().sum());
        rest = tail;
        let share = rows.len() as f64 / lengths.len() as f64;
        out.extend(weights(mode, lengths_here, own, norm).into_iter().map(|w| w * share));
    }
    assert!(rest.is_empty(), "lengths must cover the mask");
    out
}

/// The weighted sum of `values`; a value under weight 0 does not enter, whatever it holds.
pub fn reduce(weights: &[f64], values: &[f64]) -> f64 {
    weights.iter().zip(values).filter(|(w, _)| **w != 0.0).map(|(w, v)| w * v).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_valid_gives_zero_and_padding_may_hold_anything() {
        for mode in [AggMode::TokenMean, AggMode::SeqMeanTokenSum, AggMode::SeqMeanTokenMean] {
            let w = weights(mode, &[2, 0], &[false, false], 8.0);
            assert_eq!(reduce(&w, &[f64::NAN, f64::INFINITY]), 0.0);
        }
        let w = weights(AggMode::TokenMean, &[2], &[true, false], 8.0);
        assert_eq!(reduce(&w, &[3.0, f64::NAN]), 3.0);
    }
}
