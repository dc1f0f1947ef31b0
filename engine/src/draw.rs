//! Draws the next tokens of a batch by row-wise kernels: from the model's logits, also under a grammar's mask,
//! or from copies where parameters change them; what top-k, top-p and min-p leave of a row the sampler
//! draws from.
//!
//! Reports for each token the log-probability under the distribution it was drawn from and under the
//! model's own. A row's draw depends on that row, its parameters and its random stream alone.

use std::collections::HashMap;
use std::fmt;

use kernels::{Kernels, SoftmaxSums, SoftmaxTotal, TokenMask, TokenStats};
use parking_lot::Mutex;
use scheduler::{Scheduler, SeqId};

use crate::grammar;
use crate::memory::CHANGED_ROWS;
use crate::random;
use crate::request::SamplingParams;
use crate::runner::{Logits, Runner};
use crate::sampler::{self, Draw, RowContext};
use crate::sequence::Sample;

/// A row from which a token of its sequence is drawn: that of the last known token, or of a guess.
pub(crate) struct SampleRow {
    pub(crate) seq: SeqId,
    pub(crate) row: usize,
    /// How many guesses are behind the last known token, up to this row.
    pub(crate) guessed: usize,
}

/// Where a sample is to go on, the guesses before it taken for its text.
#[derive(Clone, Copy)]
struct Place<'a> {
    sample: &'a Sample,
    /// Prompt, output so far, and guesses.
    text: &'a [u32],
    guessed: usize,
}

impl<'a> Place<'a> {
    fn of(row: &SampleRow, scheduler: &'a Scheduler, samples: &'a HashMap<SeqId, Sample>) -> Self {
        let known = scheduler.tokens(row.seq).len();
        let text = &scheduler.tokens_and_guesses(row.seq)[..known + row.guessed];
        Self { sample: &samples[&row.seq], text, guessed: row.guessed }
    }

    /// Tokens of the output so far.
    fn generated(&self) -> usize {
        self.text.len() - self.sample.prompt_len
    }

    /// Whether parameters leave the distribution of the next token as it is.
    fn is_plain(&self) -> bool {
        self.sample.is_plain_at(self.generated())
    }

    /// What a grammar allows, if there is one.
    fn allowed(&self) -> Option<Result<&'a [u32], String>> {
        self.sample.grammar.as_ref().map(|grammar| grammar.allowed(self.guessed))
    }

    /// What a grammar allows, where that is all that keeps the sample from the model's own distribution.
    fn only_mask(&self) -> Option<TokenMask<'a>> {
        let drawn_plainly = self.is_plain() && self.sample.params.temperature > 0.0;
        self.allowed().filter(|_| drawn_plainly)?.ok().map(TokenMask)
    }

    /// The random number of the next token.
    fn uniform(&self) -> f64 {
        let (seed, index) = (self.sample.seed, self.sample.index as u64);
        random::uniform(&[seed, index, self.text.len() as u64])
    }
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
    let places: Vec<Place<'_>> =
        rows.iter().map(|row| Place::of(row, scheduler, samples)).collect();
    let Logits { kernels, rows: logits, changed: copies } = runner.logits(&row_indices);
    let masks: Vec<Option<TokenMask<'_>>> = places.iter().map(Place::only_mask).collect();
    let masked = masks.iter().any(Option::is_some);
    let mut plain = draw_plain(kernels, logits, &places, if masked { &masks } else { &[] });
    let tokens = &mut plain.tokens;
    let changed_rows: Vec<usize> = (0..rows.len())
        .filter(|&i| match masks[i] {
            // A mask may leave nothing to draw.
            Some(mask) => !mask.allows(tokens[i] as usize),
            None => places[i].sample.grammar.is_some() || !places[i].is_plain(),
        })
        .collect();
    // What was drawn from a distribution that is not the model's own.
    let mut changed: Vec<Option<Result<Draw, String>>> = rows.iter().map(|_| None).collect();
    for part in changed_rows.chunks(CHANGED_ROWS) {
        let rows: Vec<ChangedRow<'_>> = part
            .iter()
            .map(|&i| ChangedRow::new(places[i], &logits[i * vocab..(i + 1) * vocab]))
            .collect();
        for (&i, drawn) in part.iter().zip(draw_changed(kernels, &rows, copies)) {
            tokens[i] = drawn.as_ref().map_or(tokens[i], |draw| draw.token);
            changed[i] = Some(drawn);
        }
    }
    let inv_t: Vec<f32> = places.iter().map(|at| inv_temperature(&at.sample.params)).collect();
    let scaled = plain.stats(kernels, logits, false);
    let raw = match (inv_t.iter().all(|t| *t == 1.0), masked) {
        (true, false) => scaled.clone(),
        (true, true) => plain.stats(kernels, logits, true),
        (false, _) => stats(kernels, logits, &vec![1.0; rows.len()], &plain.tokens),
    };
    let tokens = plain.tokens;
    let mut drawn = |i: usize| {
        if !raw[i].log_sum_exp.is_finite() {
            return Err(Undrawn::NotFinite);
        }
        let row = &logits[i * vocab..(i + 1) * vocab];
        let sample = places[i].sample;
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
                top: match (masks[i], sample.processed_top()) {
                    (Some(mask), Some(k)) => {
                        masked_top(row, mask, (&scaled[i], inv_t[i]), tokens[i], k)
                    }
                    (_, k) => top_of(&scaled[i], inv_t[i], k),
                },
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

/// The `k` most likely tokens that a mask allows, and `token`.
fn masked_top(
    logits: &[f32],
    mask: TokenMask<'_>,
    (stats, inv_temperature): (&TokenStats, f32),
    token: u32,
    k: usize,
) -> Vec<(u32, f32)> {
    let mut copy = logits.to_vec();
    grammar::apply(mask.0, &mut copy);
    let at = (stats.log_sum_exp, inv_temperature);
    let mut top = sampler::top_logprobs(&copy, at, (token, stats.log_prob), k);
    top.retain(|(token, _)| mask.allows(*token as usize));
    top
}

/// A row of logits that is changed before its token is drawn.
struct ChangedRow<'a> {
    place: Place<'a>,
    logits: &'a [f32],
    /// What the grammar allows, or why it allows nothing.
    allowed: Option<Result<&'a [u32], String>>,
}

impl<'a> ChangedRow<'a> {
    fn new(place: Place<'a>, logits: &'a [f32]) -> Self {
        Self { place, logits, allowed: place.allowed() }
    }

    /// The logits as the grammar and the parameters change them.
    fn copy_to(&self, copy: &mut [f32]) {
        copy.copy_from_slice(self.logits);
        if let Some(Ok(allowed)) = self.allowed {
            grammar::apply(allowed, copy);
        }
        let Place { sample, text, .. } = self.place;
        let context = RowContext {
            params: &sample.params,
            tokens: text,
            prompt_len: sample.prompt_len,
            banned: sample.banned(self.place.generated()),
        };
        sampler::change(copy, &context);
    }

    /// What is drawn from the changed logits: the token that the kernels drew, or one that the cuts leave.
    fn drawn(
        &self,
        logits: &[f32],
        (token, stats, total): (u32, &TokenStats, SoftmaxTotal),
    ) -> Result<Draw, String> {
        if let Some(Err(why)) = &self.allowed {
            return Err(why.clone());
        }
        if !stats.log_prob.is_finite() {
            return Err("no token may be drawn here".to_owned());
        }
        let sample = self.place.sample;
        let (params, top) = (&*sample.params, sample.processed_top().unwrap_or(0));
        let inv_temperature = inv_temperature(params);
        if params.temperature > 0.0 && sampler::cuts(params) {
            let scaled = (inv_temperature, total);
            return Ok(sampler::draw_cut(logits, scaled, params, self.place.uniform(), top));
        }
        let (at, chosen) = ((stats.log_sum_exp, inv_temperature), (token, stats.log_prob));
        let mut top = sampler::top_logprobs(logits, at, chosen, top);
        top.retain(|(_, logprob)| *logprob > f32::NEG_INFINITY);
        Ok(Draw { token, logprob: stats.log_prob, top })
    }
}

/// Draws from changed copies of these rows' logits.
fn draw_changed(
    kernels: &Kernels,
    rows: &[ChangedRow<'_>],
    copies: &mut Vec<f32>,
) -> Vec<Result<Draw, String>> {
    let Some(vocab) = rows.first().map(|row| row.logits.len()) else { return Vec::new() };
    if copies.len() < rows.len() * vocab {
        copies.resize(rows.len() * vocab, 0.0);
    }
    let logits = &mut copies[..rows.len() * vocab];
    let copying = rows.iter().zip(logits.chunks_exact_mut(vocab));
    on_all_threads(kernels, copying, |(row, copy)| row.copy_to(copy));
    let places: Vec<Place<'_>> = rows.iter().map(|row| row.place).collect();
    let plain = draw_plain(kernels, logits, &places, &[]);
    let stats = plain.stats(kernels, logits, true);
    let totals = kernels.totals_of(logits, &plain.sums);
    let drawn = rows.iter().zip(logits.chunks_exact(vocab)).enumerate();
    on_all_threads(kernels, drawn, |(i, (row, logits))| {
        row.drawn(logits, (plain.tokens[i], &stats[i], totals[i]))
    })
}

/// `f` of each item, in their order.
pub(crate) fn on_all_threads<T: Send, U: Send>(
    kernels: &Kernels,
    items: impl Iterator<Item = T>,
    f: impl Fn(T) -> U + Sync,
) -> Vec<U> {
    let items: Vec<Mutex<Option<T>>> = items.map(|item| Mutex::new(Some(item))).collect();
    let results: Vec<Mutex<Option<U>>> = items.iter().map(|_| Mutex::new(None)).collect();
    kernels.pool().run(items.len(), &|i| {
        let item = items[i].lock().take();
        *results[i].lock() = item.map(&f);
    });
    results.into_iter().filter_map(Mutex::into_inner).collect()
}

/// One over the temperature that log-probabilities are taken at.
fn inv_temperature(params: &SamplingParams) -> f32 {
    if params.temperature == 0.0 { 1.0 } else { 1.0 / params.temperature }
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

/// The tokens of rows, drawn from the softmax as it is or among what masks allow.
struct Plain<'a> {
    tokens: Vec<u32>,
    /// The sums that they were drawn by.
    sums: SoftmaxSums<'a>,
}

impl Plain<'_> {
    /// Statistics of each row, with the tokens as targets; of `all` tokens, whatever the masks.
    fn stats(&self, kernels: &Kernels, logits: &[f32], all: bool) -> Vec<TokenStats> {
        let mut stats = vec![TokenStats::default(); self.tokens.len()];
        kernels.stats_of(logits, (&self.sums, all), Some(&self.tokens), &mut stats);
        stats
    }
}

/// For every row the token drawn from its softmax at its temperature, or the most likely one at
/// temperature 0; rows that need more than that are drawn again.
fn draw_plain<'a>(
    kernels: &Kernels,
    logits: &[f32],
    places: &[Place<'_>],
    masks: &'a [Option<TokenMask<'a>>],
) -> Plain<'a> {
    let inv_t: Vec<f32> = places.iter().map(|at| inv_temperature(&at.sample.params)).collect();
    let uniforms: Vec<f64> = places.iter().map(Place::uniform).collect();
    let mut tokens = vec![0; places.len()];
    let sums = kernels.softmax_sums(logits, &inv_t, masks);
    kernels.sample_of(logits, &sums, &uniforms, &mut tokens);
    let is_greedy = |at: &Place<'_>| at.sample.params.temperature == 0.0;
    if places.iter().any(is_greedy) {
        let mut greedy = vec![0; places.len()];
        kernels.argmax(logits, &mut greedy);
        for (i, place) in places.iter().enumerate() {
            if is_greedy(place) {
                tokens[i] = greedy[i];
            }
        }
    }
    Plain { tokens, sums }
}
