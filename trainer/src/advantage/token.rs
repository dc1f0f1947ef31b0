//! Advantages that differ from token to token: returns, whitening, and generalised advantages.

use super::{Outcomes, ROUNDING};

/// The values of each response.
pub(super) fn rows<'a>(values: &'a [f64], lengths: &'a [usize]) -> impl Iterator<Item = &'a [f64]> {
    assert_eq!(values.len(), lengths.iter().sum::<usize>(), "lengths must cover the tokens");
    let mut rest = values;
    lengths.iter().map(move |n| {
        let (row, tail) = rest.split_at(*n);
        rest = tail;
        row
    })
}

/// The sum of the rewards from each token on, without discount; the outcome comes with the last token.
pub(super) fn returns(outcomes: &Outcomes<'_>) -> Vec<f64> {
    let mut out = Vec::with_capacity(outcomes.lengths.iter().sum());
    for (score, length) in outcomes.scores.iter().zip(outcomes.lengths) {
        let first = out.len();
        out.resize(first + length, 0.0);
        let mut sum = *score;
        for i in (first..first + length).rev() {
            sum += outcomes.token_rewards.get(i).copied().unwrap_or(0.0);
            out[i] = sum;
        }
    }
    out
}

/// Takes each response's baseline from its tokens.
pub(super) fn subtract(tokens: &mut [f64], outcomes: &Outcomes<'_>) {
    let responses = outcomes.lengths.len();
    assert_eq!(outcomes.baselines.len(), responses, "each response needs a baseline");
    let mut rest = tokens;
    for (baseline, length) in outcomes.baselines.iter().zip(outcomes.lengths) {
        let (row, tail) = rest.split_at_mut(*length);
        row.iter_mut().for_each(|v| *v -= baseline);
        rest = tail;
    }
}

/// The mean over each response's tokens; 0 for a response without any.
pub(super) fn means(tokens: &[f64], lengths: &[usize]) -> Vec<f64> {
    rows(tokens, lengths)
        .map(|row| match row {
            [] => 0.0,
            [first, rest @ ..] if rest.iter().all(|v| v == first) => *first,
            _ => row.iter().sum::<f64>() / row.len() as f64,
        })
        .collect()
}

/// Shifts and scales to mean 0 and (unbiased) variance 1, with 1e-8 added to the variance as in verl;
/// equal values, rounding aside, become exactly 0.
///
/// ```
/// let mut values = [0.1, 0.1, 0.1];
/// trainer::advantage::whiten(&mut values);
/// assert_eq!(values, [0.0; 3]);
/// ```
pub fn whiten(values: &mut [f64]) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    let variance = squares / (n - 1.0).max(1.0);
    let largest = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if variance.sqrt() <= ROUNDING * largest {
        values.fill(0.0);
        return;
    }
    let scale = (variance + 1e-8).sqrt().recip();
    values.iter_mut().for_each(|v| *v = (*v - mean) * scale);
}

/// Generalised advantages (arXiv 1506.02438) from each token's reward and predicted value, one
/// response after the other: whitened advantages, and returns to fit the values to.
///
/// # Panics
/// If the slices differ in length or `lengths` do not cover them.
///
/// ```
/// let (advantages, returns) = trainer::advantage::gae(&[0.0, 1.0], &[0.5, 0.5], &[2], [1.0, 1.0]);
/// assert_eq!(returns, [1.0, 1.0]);
/// assert_eq!(advantages, [0.0, 0.0]);
/// ```
pub fn gae(
    rewards: &[f64],
    values: &[f64],
    lengths: &[usize],
    [gamma, lambda]: [f64; 2],
) -> (Vec<f64>, Vec<f64>) {
    assert_eq!(rewards.len(), values.len(), "each reward needs a value");
    assert_eq!(values.len(), lengths.iter().sum::<usize>(), "lengths must cover the tokens");
    let mut advantages = vec![0.0; values.len()];
    let mut first = 0;
    for length in lengths {
        let (mut next_value, mut next_advantage) = (0.0, 0.0);
        for i in (first..first + length).rev() {
            let delta = rewards[i] + gamma * next_value - values[i];
            next_advantage = delta + gamma * lambda * next_advantage;
            next_value = values[i];
            advantages[i] = next_advantage;
        }
        first += length;
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    whiten(&mut advantages);
    (advantages, returns)
}
