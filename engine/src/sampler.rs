//! From a row of logits to a token where parameters change the distribution: bias, bans and penalties, which
//! change a copy of the row, and the cuts of min-p, top-k and top-p.
//!
//! What is changed but not cut is drawn by the kernels that draw the common case. Order of operations as in
//! vLLM: bias and bans, penalties, temperature, min-p, top-k, top-p.

use std::collections::HashMap;

use kernels::SoftmaxTotal;

use crate::request::SamplingParams;

/// How far below the largest, times the inverse temperature, logits are looked at first: e^-8 of its
/// probability. Where a cut keeps more than these, all are looked at.
const NEAR: f32 = 8.0;

/// What changes the logits of a row.
pub(crate) struct RowContext<'a> {
    pub(crate) params: &'a SamplingParams,
    /// Prompt and generated tokens.
    pub(crate) tokens: &'a [u32],
    /// Tokens of those that are the prompt's.
    pub(crate) prompt_len: usize,
    /// Tokens that may not be drawn at this position.
    pub(crate) banned: &'a [u32],
}

/// A drawn token and its log-probability under the distribution it was drawn from, with the most likely
/// tokens of that distribution.
pub(crate) struct Draw {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// Whether some tokens are cut off, where tokens are drawn at random.
pub(crate) fn cuts(params: &SamplingParams) -> bool {
    params.top_k.is_some_and(|k| k > 0) || params.top_p < 1.0 || params.min_p > 0.0
}

/// Applies bias, bans and penalties to the logits of a row.
pub(crate) fn change(logits: &mut [f32], row: &RowContext<'_>) {
    apply_bias(logits, row);
    apply_penalties(logits, row);
}

/// Draws by a uniform number in [0, 1) from what the cuts of `params` leave of `logits` times an inverse
/// temperature, of which `total` is known; reports the `top` most likely tokens.
pub(crate) fn draw_cut(
    logits: &[f32],
    (inv_temperature, total): (f32, SoftmaxTotal),
    params: &SamplingParams,
    uniform: f64,
    top: usize,
) -> Draw {
    pick(&cut(logits, (inv_temperature, total), params), uniform, top)
}

fn apply_bias(logits: &mut [f32], row: &RowContext<'_>) {
    for (token, bias) in &row.params.logit_bias {
        logits[*token as usize] += bias;
    }
    for token in row.banned {
        // A tokenizer may have more end tokens than the model has rows.
        if let Some(z) = logits.get_mut(*token as usize) {
            *z = f32::NEG_INFINITY;
        }
    }
}

/// Repetition penalty (arXiv 1909.05858) over prompt and output; presence and frequency over output.
fn apply_penalties(logits: &mut [f32], row: &RowContext<'_>) {
    let params = row.params;
    if params.repetition_penalty != 1.0 {
        let seen: std::collections::HashSet<u32> = row.tokens.iter().copied().collect();
        for token in seen {
            let z = &mut logits[token as usize];
            let penalty = params.repetition_penalty;
            *z = if *z > 0.0 { *z / penalty } else { *z * penalty };
        }
    }
    if params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 {
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for token in &row.tokens[row.prompt_len..] {
            *counts.entry(*token).or_default() += 1;
        }
        for (token, count) in counts {
            logits[token as usize] -=
                params.presence_penalty + params.frequency_penalty * count as f32;
        }
    }
}

/// Tokens that survive min-p, top-k and top-p with their logits times the inverse temperature, most likely
/// first (ties: lowest id).
fn cut(
    logits: &[f32],
    (inv_temperature, total): (f32, SoftmaxTotal),
    params: &SamplingParams,
) -> Vec<(u32, f32)> {
    let (near, lowest) = match params.min_p > 0.0 {
        true => [total.max + params.min_p.ln(); 2].into(),
        false => (total.max - NEAR, f32::MIN),
    };
    let mut candidates = above(logits, inv_temperature, near);
    if !keep(&mut candidates, near == lowest, total, params) {
        candidates = above(logits, inv_temperature, lowest);
        keep(&mut candidates, true, total, params);
    }
    candidates
}

/// The logits that, times the inverse temperature, are not below `floor`.
fn above(logits: &[f32], inv_temperature: f32, floor: f32) -> Vec<(u32, f32)> {
    const AT_ONCE: usize = 64;
    let mut found = Vec::new();
    for (part, logits) in logits.chunks(AT_ONCE).enumerate() {
        // Nearly all parts have none: counted without branches first.
        let count: u32 = logits.iter().map(|z| u32::from(z * inv_temperature >= floor)).sum();
        if count == 0 {
            continue;
        }
        let scaled = logits.iter().map(|z| z * inv_temperature);
        let numbered = scaled.enumerate().map(|(i, z)| ((part * AT_ONCE + i) as u32, z));
        found.extend(numbered.filter(|(_, z)| *z >= floor));
    }
    found
}

/// Sorts candidates, the most likely tokens of a row or `all` that may be drawn, and leaves those that top-k
/// and top-p keep. False if that takes more than these.
fn keep(
    candidates: &mut Vec<(u32, f32)>,
    all: bool,
    total: SoftmaxTotal,
    params: &SamplingParams,
) -> bool {
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let k = params.top_k.filter(|k| *k > 0);
    if !all && k.map_or(params.top_p >= 1.0, |k| k > candidates.len()) {
        return false;
    }
    if let Some(k) = k.filter(|k| *k < candidates.len()) {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    if params.top_p >= 1.0 {
        candidates.sort_unstable_by(order);
        return true;
    }
    let weight = |(_, z): &(u32, f32)| f64::from(z - total.max).exp();
    let sum = match k.is_some() || params.min_p > 0.0 {
        true => candidates.iter().map(weight).sum(),
        false => total.sum,
    };
    keep_top_p(candidates, (total.max, sum * f64::from(params.top_p)), order) || all
}

/// Keeps the shortest prefix, in `order`, whose mass `exp(z - max)` reaches `mass`, if there is one; sorts
/// only as much of the candidates as that takes.
fn keep_top_p(
    candidates: &mut Vec<(u32, f32)>,
    (max, mass): (f32, f64),
    order: impl Fn(&(u32, f32), &(u32, f32)) -> std::cmp::Ordering + Copy,
) -> bool {
    let mut sorted = 0;
    let mut reached = 0.0;
    let mut step = 2048;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let step_now = step.min(rest.len());
        if step_now < rest.len() {
            rest.select_nth_unstable_by(step_now - 1, order);
        }
        rest[..step_now].sort_unstable_by(order);
        for i in sorted..sorted + step_now {
            reached += f64::from(candidates[i].1 - max).exp();
            if reached >= mass {
                candidates.truncate(i + 1);
                return true;
            }
        }
        sorted += step_now;
        step *= 8;
    }
    false
}

/// Inverse of the cumulative distribution at `uniform`, over candidates in their order; `top` of them are
/// reported.
fn pick(candidates: &[(u32, f32)], uniform: f64, top: usize) -> Draw {
    let max = candidates[0].1;
    let total: f64 = candidates.iter().map(|(_, z)| f64::from(z - max).exp()).sum();
    let mut below = 0.0;
    let mut chosen = candidates[0];
    for candidate in candidates {
        chosen = *candidate;
        below += f64::from(candidate.1 - max).exp();
        if below > uniform * total {
            break;
        }
    }
    let logprob = |z: f32| (f64::from(z - max) - total.ln()) as f32;
    let top = candidates.iter().take(top).map(|(token, z)| (*token, logprob(*z))).collect();
    Draw { token: chosen.0, logprob: logprob(chosen.1), top }
}

/// The `k` largest logits as (token, log-probability at that inverse temperature), largest first, given
/// the log of the sum of exponentials at it.
/// The chosen token keeps the log-probability it is reported with, which is rounded once only.
pub(crate) fn top_logprobs(
    logits: &[f32],
    (log_sum_exp, inv_temperature): (f32, f32),
    (chosen, log_prob): (u32, f32),
    k: usize,
) -> Vec<(u32, f32)> {
    if k == 0 {
        return Vec::new();
    }
    let mut top: Vec<(u32, f32)> = Vec::with_capacity(k + 1);
    for (token, z) in logits.iter().enumerate() {
        if top.len() == k && top.last().is_none_or(|last| *z <= last.1) {
            continue;
        }
        let at = top.partition_point(|(_, other)| *other >= *z);
        top.insert(at, (token as u32, *z));
        top.truncate(k);
    }
    for (token, z) in &mut top {
        *z = if *token == chosen { log_prob } else { *z * inv_temperature - log_sum_exp };
    }
    top
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(logits: &[f32], params: &SamplingParams, banned: &[u32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        change(&mut logits, &RowContext { params, tokens: &[0, 1, 1], prompt_len: 1, banned });
        logits
    }

    fn drawn(logits: &[f32], params: &SamplingParams, uniform: f64) -> Draw {
        let inv = 1.0 / params.temperature;
        let max = logits.iter().fold(f32::MIN, |max, z| max.max(z * inv));
        let sum = logits.iter().map(|z| f64::from(z * inv - max).exp()).sum();
        draw_cut(logits, (inv, SoftmaxTotal { max, sum }), params, uniform, 2)
    }

    #[test]
    fn a_banned_token_without_a_row_changes_nothing() {
        let params = SamplingParams::default();
        let changed = changed(&[0.0, 2.0, 1.0], &params, &[1, 999_999]);
        assert_eq!(changed, [0.0, f32::NEG_INFINITY, 1.0]);
    }

    /// Whatever lies near the largest, a cut is that of the whole row in order.
    #[test]
    fn cuts_are_those_of_the_sorted_row() {
        let row = |spread: f32| -> Vec<f32> {
            (0..5000).map(|i| spread * (crate::random::uniform(&[7, i]) as f32)).collect()
        };
        let params =
            |top_k, top_p, min_p| SamplingParams { top_k, top_p, min_p, ..Default::default() };
        for (spread, params) in [
            (40.0, params(Some(50), 1.0, 0.0)),
            (400.0, params(Some(500), 0.95, 0.0)),
            (400.0, params(Some(6000), 0.999, 0.0)),
            (400.0, params(Some(6000), 1.0, 0.0)),
            (0.5, params(None, 0.9, 0.0)),
            (4000.0, params(None, 1.0 - f32::EPSILON, 0.0)),
            (40.0, params(Some(30), 0.5, 0.1)),
            (60.0, params(None, 1.0, 1e-12)),
        ] {
            let logits = row(spread);
            let mut sorted: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
            sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            let weight = |(_, z): &(u32, f32)| f64::from(z - sorted[0].1).exp();
            let total = SoftmaxTotal { max: sorted[0].1, sum: sorted.iter().map(weight).sum() };
            let mut want = sorted.clone();
            if params.min_p > 0.0 {
                want.retain(|(_, z)| *z >= sorted[0].1 + params.min_p.ln());
            }
            want.truncate(params.top_k.unwrap_or(usize::MAX));
            let mass = f64::from(params.top_p) * want.iter().map(weight).sum::<f64>();
            let mut reached = 0.0;
            let len = want.iter().position(|z| {
                reached += weight(z);
                reached >= mass
            });
            want.truncate(len.filter(|_| params.top_p < 1.0).map_or(want.len(), |at| at + 1));
            assert_eq!(cut(&logits, (1.0, total), &params), want, "{spread} {params:?}");
        }
    }

    #[test]
    fn top_k_keeps_the_k_most_likely_and_renormalises() {
        let params = SamplingParams { top_k: Some(2), ..SamplingParams::default() };
        let logits = [0.0, 2.0, 1.0, -1.0];
        let first = drawn(&logits, &params, 0.0);
        let last = drawn(&logits, &params, 0.999_999);
        assert_eq!((first.token, last.token), (1, 2));
        let total = first.logprob.exp() + last.logprob.exp();
        assert!((total - 1.0).abs() < 1e-6, "probabilities sum to {total}");
        assert_eq!(first.top, [(1, first.logprob), (2, last.logprob)]);
    }

    #[test]
    fn top_p_takes_the_smallest_set_that_reaches_it() {
        let logits: Vec<f32> = [0.5f32, 0.3, 0.15, 0.05].iter().map(|p| p.ln()).collect();
        for (top_p, want) in [(0.4, 0), (0.79, 1), (0.81, 2), (0.96, 3)] {
            let params = SamplingParams { top_p, ..SamplingParams::default() };
            assert_eq!(drawn(&logits, &params, 0.999_999).token, want, "top_p {top_p}");
        }
    }

    #[test]
    fn top_p_over_a_large_flat_vocabulary_keeps_its_share() {
        let params = SamplingParams { top_p: 0.5, ..SamplingParams::default() };
        let logits = vec![0.0; 10_000];
        assert_eq!(drawn(&logits, &params, 0.999_999).token, 4_999);
    }

    #[test]
    fn min_p_is_relative_to_the_most_likely() {
        let logits: Vec<f32> = [0.6f32, 0.3, 0.1].iter().map(|p| p.ln()).collect();
        let params = SamplingParams { min_p: 0.4, ..SamplingParams::default() };
        assert_eq!(drawn(&logits, &params, 0.999_999).token, 1);
    }

    #[test]
    fn penalties_act_on_the_tokens_they_name() {
        let none = SamplingParams::default();
        let logits = [1.0, 1.5, 0.9];
        assert_eq!(changed(&logits, &none, &[]), logits);
        let frequency = SamplingParams { frequency_penalty: 0.5, ..none.clone() };
        assert_eq!(changed(&logits, &frequency, &[]), [1.0, 0.5, 0.9], "1 was generated twice");
        let presence = SamplingParams { presence_penalty: 0.5, ..none.clone() };
        assert_eq!(changed(&logits, &presence, &[]), [1.0, 1.0, 0.9]);
        let repetition = SamplingParams { repetition_penalty: 2.0, ..none.clone() };
        let seen = [0.5, -3.0, 0.9];
        assert_eq!(changed(&[1.0, -1.5, 0.9], &repetition, &[]), seen, "0 is in the prompt");
        let bias = SamplingParams { logit_bias: vec![(2, 5.0)], ..none };
        assert_eq!(changed(&logits, &bias, &[]), [1.0, 1.5, 5.9]);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let params = SamplingParams { temperature: 0.5, top_k: Some(3), ..Default::default() };
        let logits = [0.1f32, 0.7, 0.4, -0.2];
        let mut counts = [0u32; 4];
        for i in 0..20_000u64 {
            let u = crate::random::uniform(&[11, i]);
            counts[drawn(&logits, &params, u).token as usize] += 1;
        }
        let weights: Vec<f64> = [0.1, 0.7, 0.4].iter().map(|z: &f64| (z / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        for token in 0..3 {
            let share = f64::from(counts[token]) / 20_000.0;
            assert!((share - weights[token] / total).abs() < 0.015, "{token}: {share}");
        }
        assert_eq!(counts[3], 0);
    }

    #[test]
    fn top_logprobs_are_sorted_and_complete() {
        let top = top_logprobs(&[0.0, 3.0, 1.0, 3.0, 2.0], (1.0, 1.0), (3, 1.5), 3);
        assert_eq!(top, vec![(1, 2.0), (3, 1.5), (4, 1.0)]);
    }
}
