//! From a row of logits to a token: penalties, truncation, and one draw from the request's stream.
//!
//! The common case (no truncation, no penalty) is drawn from the logits by a kernel and does not come
//! here. Order of operations as in vLLM: bias and bans, penalties, temperature, min-p, top-k, top-p.

use std::collections::HashMap;

use crate::request::SamplingParams;

/// What a row is judged by besides its logits.
pub(crate) struct RowContext<'a> {
    pub(crate) params: &'a SamplingParams,
    /// Prompt and generated tokens.
    pub(crate) tokens: &'a [u32],
    /// Tokens of those that are the prompt's.
    pub(crate) prompt_len: usize,
    /// Tokens that may not be drawn at this position.
    pub(crate) banned: &'a [u32],
    /// Uniform number in [0, 1).
    pub(crate) uniform: f64,
    /// Alternatives to report.
    pub(crate) top: usize,
}

/// A drawn token and its log-probability under the distribution it was drawn from, with the most likely
/// tokens of that distribution.
pub(crate) struct Draw {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// Draws from `logits`, which are changed on the way. `None` when no token has a finite logit.
pub(crate) fn draw(logits: &mut [f32], row: &RowContext<'_>) -> Option<Draw> {
    apply_bias(logits, row);
    apply_penalties(logits, row);
    let params = row.params;
    if params.temperature == 0.0 {
        let (token, max) = argmax(logits)?;
        let sum: f64 = logits.iter().map(|z| f64::from(z - max).exp()).sum();
        let (logprob, log_sum_exp) = (-sum.ln() as f32, (f64::from(max) + sum.ln()) as f32);
        let mut top = top_logprobs(logits, (log_sum_exp, 1.0), (token, logprob), row.top);
        top.retain(|(_, logprob)| *logprob > f32::NEG_INFINITY);
        return Some(Draw { token, logprob, top });
    }
    let inv_temperature = 1.0 / params.temperature;
    logits.iter_mut().for_each(|z| *z *= inv_temperature);
    let candidates = truncate(logits, params)?;
    Some(pick(&candidates, row.uniform, row.top))
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

fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = None;
    for (token, z) in logits.iter().enumerate() {
        if *z > best.map_or(f32::NEG_INFINITY, |(_, max)| max) {
            best = Some((token as u32, *z));
        }
    }
    best
}

/// Tokens that survive min-p, top-k and top-p with their logits, most likely first (ties: lowest id).
fn truncate(logits: &[f32], params: &SamplingParams) -> Option<Vec<(u32, f32)>> {
    let (_, max) = argmax(logits)?;
    let floor = if params.min_p > 0.0 { max + params.min_p.ln() } else { f32::MIN };
    let mut candidates: Vec<(u32, f32)> = logits
        .iter()
        .enumerate()
        .filter(|(_, z)| **z >= floor)
        .map(|(token, z)| (token as u32, *z))
        .collect();
    let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    if let Some(k) = params.top_k.filter(|k| *k > 0 && *k < candidates.len()) {
        candidates.select_nth_unstable_by(k - 1, order);
        candidates.truncate(k);
    }
    if params.top_p < 1.0 {
        let total: f64 = candidates.iter().map(|(_, z)| f64::from(z - max).exp()).sum();
        keep_top_p(&mut candidates, (max, total * f64::from(params.top_p)), order);
    } else {
        candidates.sort_unstable_by(order);
    }
    Some(candidates)
}

/// Keeps the shortest prefix, in `order`, whose mass `exp(z - max)` reaches `mass`; sorts only as much
/// of the vocabulary as that takes.
fn keep_top_p(
    candidates: &mut Vec<(u32, f32)>,
    (max, mass): (f32, f64),
    order: impl Fn(&(u32, f32), &(u32, f32)) -> std::cmp::Ordering + Copy,
) {
    let mut sorted = 0;
    let mut reached = 0.0;
    let mut step = 256;
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
                return;
            }
        }
        sorted += step_now;
        step *= 8;
    }
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

    fn context(params: &SamplingParams, uniform: f64) -> RowContext<'_> {
        RowContext { params, tokens: &[0, 1, 1], prompt_len: 1, banned: &[], uniform, top: 2 }
    }

    fn drawn(logits: &[f32], params: &SamplingParams, uniform: f64) -> Draw {
        draw(&mut logits.to_vec(), &context(params, uniform)).expect("a finite logit")
    }

    #[test]
    fn a_banned_token_without_a_row_changes_nothing() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let row = RowContext { banned: &[1, 999_999], ..context(&greedy, 0.0) };
        assert_eq!(draw(&mut [0.0, 2.0, 1.0], &row).expect("a finite logit").token, 2);
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
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let logits = [1.0, 1.5, 0.9];
        let plain = drawn(&logits, &greedy, 0.0);
        assert_eq!((plain.token, plain.top.len()), (1, 2));
        assert_eq!(plain.top[0], (1, plain.logprob));
        let frequency = SamplingParams { frequency_penalty: 0.3, ..greedy.clone() };
        assert_eq!(drawn(&logits, &frequency, 0.0).token, 0, "token 1 was generated twice");
        let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy.clone() };
        assert_eq!(
            drawn(&logits, &repetition, 0.0).token,
            2,
            "0 is in the prompt, 1 in the output"
        );
        let bias = SamplingParams { logit_bias: vec![(2, 5.0)], ..greedy };
        assert_eq!(drawn(&logits, &bias, 0.0).token, 2);
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
    fn nothing_finite_draws_nothing() {
        let params = SamplingParams::default();
        assert!(draw(&mut [f32::NEG_INFINITY; 3], &context(&params, 0.5)).is_none());
    }

    #[test]
    fn top_logprobs_are_sorted_and_complete() {
        let top = top_logprobs(&[0.0, 3.0, 1.0, 3.0, 2.0], (1.0, 1.0), (3, 1.5), 3);
        assert_eq!(top, vec![(1, 2.0), (3, 1.5), (4, 1.0)]);
    }
}
