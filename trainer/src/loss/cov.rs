//! Which tokens Clip-Cov and KL-Cov choose (arXiv 2505.22617, as the authors' code computes it).
//!
//! Clip-Cov: candidates are valid tokens that the ratio does not clip and whose covariance lies
//! strictly between the bounds; a uniformly random subset of `max(1, floor(ratio N))` of them is
//! dropped. KL-Cov: the `max(1, floor(ratio N))` tokens of largest signed covariance, none if the
//! ratio is 0; of equal ones the earlier. `N` counts the valid tokens of the scope.

use std::ops::Range;

use super::{ChoiceKey, ClipCov, TokenBatch, ratio};
use crate::covariance::token_covariances;
use crate::random::{Purpose, Stream};

/// How many tokens Clip-Cov drops of `valid_tokens`, if there are as many candidates.
pub fn clip_cov_count(ratio: f64, valid_tokens: usize) -> usize {
    ((ratio * valid_tokens as f64) as usize).max(1)
}

/// How many of `valid_tokens` KL-Cov penalises.
pub fn kl_cov_count(ratio: f64, valid_tokens: usize) -> usize {
    if ratio == 0.0 || valid_tokens == 0 {
        return 0;
    }
    ((valid_tokens as f64 * ratio) as usize).clamp(1, valid_tokens)
}

/// The candidates of Clip-Cov in each scope, ascending.
///
/// # Panics
/// If the slices of `batch` differ in length or a scope reaches past them.
pub fn clip_cov_candidates<T: Copy + Into<f64>>(
    batch: &TokenBatch<'_, T>,
    settings: &ClipCov,
) -> Vec<Vec<usize>> {
    let cov = token_covariances(batch.log_prob, batch.advantage, batch.mask, batch.scopes);
    let is_candidate = |i: &usize| {
        let d = batch.log_prob[*i].into() - batch.old_log_prob[*i].into();
        let (ratio, _) = ratio(d, settings.log_ratio_clamp);
        let clipped = settings.range.clips(batch.advantage[*i].into(), ratio);
        batch.mask[*i] && !clipped && settings.lower < cov[*i] && cov[*i] < settings.upper
    };
    batch.scopes.iter().map(|scope| scope.clone().filter(is_candidate).collect()).collect()
}

/// The tokens that Clip-Cov drops: a function of the batch and of `key`.
///
/// # Panics
/// If the slices of `batch` differ in length or a scope reaches past them.
pub fn clip_cov_select<T: Copy + Into<f64>>(
    batch: &TokenBatch<'_, T>,
    settings: &ClipCov,
    key: ChoiceKey,
) -> Vec<usize> {
    let mut out = Vec::new();
    let scopes = clip_cov_candidates(batch, settings).into_iter().zip(batch.scopes);
    for (index, (mut candidates, scope)) in scopes.enumerate() {
        let count = clip_cov_count(settings.ratio, valid(batch.mask, scope).count());
        let words = [key.step, key.update, index as u64];
        let mut stream = Stream::keyed(key.seed, Purpose::ClipCov, &words);
        let taken = stream.choose(&mut candidates, count);
        out.extend_from_slice(&candidates[..taken]);
    }
    out.sort_unstable();
    out
}

/// The tokens that KL-Cov penalises, ascending.
///
/// # Panics
/// If the slices of `batch` differ in length or a scope reaches past them.
pub fn kl_cov_select<T: Copy + Into<f64>>(batch: &TokenBatch<'_, T>, ratio: f64) -> Vec<usize> {
    let cov = token_covariances(batch.log_prob, batch.advantage, batch.mask, batch.scopes);
    let mut out = Vec::new();
    for scope in batch.scopes {
        let mut ranked: Vec<usize> = valid(batch.mask, scope).collect();
        let count = kl_cov_count(ratio, ranked.len());
        ranked.sort_by(|a, b| cov[*b].total_cmp(&cov[*a]));
        out.extend_from_slice(&ranked[..count]);
    }
    out.sort_unstable();
    out
}

fn valid<'a>(mask: &'a [bool], scope: &Range<usize>) -> impl Iterator<Item = usize> + 'a {
    scope.clone().filter(|i| mask[*i])
}

#[cfg(test)]
mod tests {
    use super::super::ClipRange;
    use super::*;

    #[test]
    fn counts_follow_the_reference() {
        assert_eq!([0, 1, 4_999, 10_000].map(|n| clip_cov_count(2e-4, n)), [1, 1, 1, 2]);
        assert_eq!([0, 1, 499, 1_500].map(|n| kl_cov_count(2e-3, n)), [0, 1, 1, 3]);
        assert_eq!((kl_cov_count(0.0, 100), kl_cov_count(7.0, 100)), (0, 100));
    }

    /// Ten tokens of which the even ones are candidates; two are chosen.
    #[test]
    fn clip_cov_chooses_uniformly_and_by_its_key_alone() {
        let log_prob = [-0.5f64, -2.5, -0.5, -2.5, -0.5, -2.5, -0.5, -2.5, -0.5, -2.5];
        let advantage = [2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 0.0, 2.0, 6.0];
        let batch = TokenBatch {
            log_prob: &log_prob,
            old_log_prob: &log_prob,
            advantage: &advantage,
            mask: &[true; 10],
            weight: &[0.1; 10],
            scopes: std::slice::from_ref(&(0..10)),
            responses: &[],
        };
        let settings = ClipCov {
            range: ClipRange { low: 1.0, high: 1.0 },
            ratio: 0.2,
            lower: 0.1,
            upper: 1.0,
            log_ratio_clamp: None,
        };
        assert_eq!(clip_cov_candidates(&batch, &settings), [[0, 2, 4, 6, 8]]);
        let mut counts = [0u32; 10];
        for step in 0..2_000 {
            let key = ChoiceKey { seed: 1, step, update: 2 };
            let chosen = clip_cov_select(&batch, &settings, key);
            assert_eq!(chosen, clip_cov_select(&batch, &settings, key));
            assert_eq!(chosen.len(), 2);
            chosen.iter().for_each(|i| counts[*i] += 1);
        }
        for (i, count) in counts.iter().enumerate() {
            let expected = if i % 2 == 0 { 700..900 } else { 0..1 };
            assert!(expected.contains(count), "seed 1: token {i} chosen {count} times");
        }
    }
}
