//! Draws the next tokens of a batch: the row-wise kernels where they do, the sampler where parameters
//! change the distribution, and a grammar's mask before either.
//!
//! Reports for each token the log-probability under the distribution it was drawn from and under the
//! model's own. A row's draw depends on that row, its parameters and its random stream alone.

use std::collections::HashMap;
use std::fmt;

use kernels::{Kernels, TokenStats};
use scheduler::{Scheduler, SeqId};

use crate::grammar;
use crate::random;
use crate::request::SamplingParams;
use crate::runner::Runner;
use crate::sampler::{self, Draw, RowContext};
use crate::sequence::Sample;

/// A slice's last row, from which its sequence's next token is drawn.
pub(crate) struct SampleRow {
    pub(crate) seq: SeqId,
    pub(crate) row: usize,
}

/// What was drawn for one sequence.
pub(crate) struct Drawn {
    pub(crate) token: u32,
    pub(crate) logprob: f32,
    pub(crate) raw_logprob: f32,
    pub(crate) entropy: f32,
    pub(crate) top: Vec<(u32, f32)>,
}

/// Why a row has no token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Undrawn {
    /// The model's logits of that row are not all finite numbers.
    NotFinite,
    /// Parameters or a grammar leave nothing to draw, or the grammar's limits are reached.
    Refused(String),
}

impl fmt::Display for Undrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite => f.write_str("the model's logits are not finite numbers"),
            Self::Refused(why) => f.write_str(why),
        }
    }
}

/// Draws a token for each row, or says why that row has none.
pub(crate) fn draw(
    runner: &mut Runner,
    scheduler: &Scheduler,
    samples: &HashMap<SeqId, Sample>,
    rows: &[SampleRow],
) -> Vec<Result<Drawn, Undrawn>> {
    let vocab = runner.decoder.config.vocab_size;
    let row_indices: Vec<usize> = rows.iter().map(|row| row.row).collect();
    let samples: Vec<(&Sample, &[u32])> =
        rows.iter().map(|row| (&samples[&row.seq], scheduler.tokens(row.seq))).collect();
    let (kernels, logits) = runner.logits(&row_indices);
    let mut tokens = draw_plain(kernels, logits, &samples);
    // What was drawn from a distribution that is not the model's own.
    let mut changed: Vec<Option<Result<Draw, String>>> = rows.iter().map(|_| None).collect();
    let mut scratch = Vec::new();
    for (i, (sample, known)) in samples.iter().enumerate() {
        if sample.is_plain_at(known.len() - sample.prompt_len) {
            continue;
        }
        scratch.clear();
        scratch.extend_from_slice(&logits[i * vocab..(i + 1) * vocab]);
        let drawn = draw_changed(kernels, &mut scratch, sample, known);
        tokens[i] = drawn.as_ref().map_or(tokens[i], |draw| draw.token);
        changed[i] = Some(drawn);
    }
    let raw = stats(kernels, logits, &vec![1.0; rows.len()], &tokens);
    let inv_t: Vec<f32> = samples.iter().map(|(s, _)| inv_temperature(&s.params)).collect();
    let scaled = match inv_t.iter().all(|t| *t == 1.0) {
        true => raw.clone(),
        false => stats(kernels, logits, &inv_t, &tokens),
    };
    let mut drawn = |i: usize| {
        if !raw[i].log_sum_exp.is_finite() {
            return Err(Undrawn::NotFinite);
        }
        let row = &logits[i * vocab..(i + 1) * vocab];
        let sample = samples[i].0;
        let top_of = |stats: &TokenStats, inv_t: f32, k: Option<usize>| {
            let chosen = (tokens[i], stats.log_prob);
            let top = |k| sampler::top_logprobs(row, (stats.log_sum_exp, inv_t), chosen, k);
            k.map_or_else(Vec::new, top)
        };
        let drawn = match changed[i].take() {
            Some(drawn) => drawn.map_err(Undrawn::Refused)?,
            None => Draw {
                token: tokens[i],
                logprob: scaled[i].log_prob,
                top: top_of(&scaled[i], inv_t[i], sample.processed_top()),
            },
        };
        Ok(Drawn {
            token: drawn.token,
            logprob: drawn.logprob,
            raw_logprob: raw[i].log_prob,
            entropy: scaled[i].entropy,
            top: match sample.processed_top() {
                Some(_) => drawn.top,
                None => top_of(&raw[i], 1.0, sample.params.logprobs),
            },
        })
    };
    (0..rows.len()).map(&mut drawn).collect()
}

/// A draw from a copy of the row's logits, of tokens that its grammar and its parameters allow.
fn draw_changed(
    kernels: &Kernels,
    logits: &mut [f32],
    sample: &Sample,
    known: &[u32],
) -> Result<Draw, String> {
    let banned = sample.banned(known.len() - sample.prompt_len);
    if let Some(grammar) = &sample.grammar {
        let allowed = grammar.allowed()?;
        grammar::apply(allowed, logits);
        if sample.params.is_plain() && banned.is_empty() {
            let token = draw_plain(kernels, logits, &[(sample, known)])[0];
            let inv_t = inv_temperature(&sample.params);
            // The kernels' exponential of a masked logit is tiny, not 0: what it may let slip is drawn
            // again below.
            if grammar::allows(allowed, token) {
                let stats = stats(kernels, logits, &[inv_t], &[token])[0];
                let (chosen, k) = ((token, stats.log_prob), sample.processed_top().unwrap_or(0));
                let at = (stats.log_sum_exp, inv_t);
                let mut top = sampler::top_logprobs(logits, at, chosen, k);
                top.retain(|(token, _)| grammar::allows(allowed, *token));
                return Ok(Draw { token, logprob: stats.log_prob, top });
            }
        }
    }
    let context = RowContext {
        params: &sample.params,
        tokens: known,
        prompt_len: sample.prompt_len,
        banned,
        uniform: uniform(sample, known.len()),
        top: sample.processed_top().unwrap_or(0),
    };
    sampler::draw(logits, &context).ok_or_else(|| "no token may be drawn here".to_owned())
}

/// One over the temperature that log-probabilities are taken at.
fn inv_temperature(params: &SamplingParams) -> f32 {
    if params.temperature == 0.0 { 1.0 } else { 1.0 / params.temperature }
}

/// The draw of the token at `position` of this sample.
fn uniform(sample: &Sample, position: usize) -> f64 {
    random::uniform(&[sample.seed, sample.index as u64, position as u64])
}

/// Statistics of each row of logits, with `tokens` as targets.
pub(crate) fn stats(
    kernels: &Kernels,
    logits: &[f32],
    inv_temperature: &[f32],
    tokens: &[u32],
) -> Vec<TokenStats> {
    let mut stats = vec![TokenStats::default(); tokens.len()];
    kernels.softmax_stats(logits, inv_temperature, Some(tokens), &mut stats);
    stats
}

/// For every row the token drawn from its softmax at its temperature, or the most likely one at
/// temperature 0; rows that need more than that are drawn again.
fn draw_plain(kernels: &Kernels, logits: &[f32], samples: &[(&Sample, &[u32])]) -> Vec<u32> {
    let inv_t: Vec<f32> = samples.iter().map(|(s, _)| inv_temperature(&s.params)).collect();
    let uniforms: Vec<f64> = samples.iter().map(|(s, tokens)| uniform(s, tokens.len())).collect();
    let mut tokens = vec![0; samples.len()];
    kernels.sample(logits, &inv_t, &uniforms, &mut tokens);
    let is_greedy = |sample: &Sample| sample.params.temperature == 0.0;
    if samples.iter().any(|(s, _)| is_greedy(s)) {
        let mut greedy = vec![0; samples.len()];
        kernels.argmax(logits, &mut greedy);
        for (i, (sample, _)) in samples.iter().enumerate() {
            if is_greedy(sample) {
                tokens[i] = greedy[i];
            }
        }
    }
    tokens
}
