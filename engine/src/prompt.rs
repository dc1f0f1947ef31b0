//! Log-probabilities of a prompt's own tokens, from the pass that computes the prompt anyway.
//!
//! The rows of a prompt go through the head like those that are drawn from, with the next prompt token as
//! target: bit for bit what [`Engine::score`](crate::Engine::score) gives. Whoever does not ask for them
//! has no further rows. Leaves out the prompt's last position, from which the answer is drawn.

use std::collections::HashMap;

use scheduler::{Scheduler, SeqId, Slice};

use crate::draw::{Undrawn, stats};
use crate::runner::{Logits, Runner};
use crate::sampler::top_logprobs;
use crate::sequence::Sample;

/// What is known of a token of a prompt, given the tokens before it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptToken {
    /// The token's id.
    pub token: u32,
    /// Log-probability in nats at temperature 1 with nothing cut off.
    pub logprob: f32,
    /// Its place among all tokens, most likely first and of equals the lowest id first; from 1.
    pub rank: usize,
    /// The most likely tokens of its place with their log-probabilities, most likely first.
    pub top: Vec<(u32, f32)>,
}

/// How far the log-probabilities of a sample's prompt are known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum PromptScore {
    /// Nobody wants them, or nobody does any more.
    Unwanted,
    /// Those of the first tokens are known; each with `top` alternatives.
    Gathering { top: usize, tokens: Vec<PromptToken> },
}

impl PromptScore {
    /// Takes in `tokens`, whose first is the successor of the token at `start`. Positions that come again,
    /// after a preemption, replace what was known of them.
    pub(crate) fn take(&mut self, start: usize, tokens: Vec<PromptToken>) {
        if let Self::Gathering { tokens: known, .. } = self {
            known.truncate(start);
            known.extend(tokens);
        }
    }

    /// Gives out what is known, once.
    pub(crate) fn give(&mut self) -> Option<Vec<PromptToken>> {
        match std::mem::replace(self, Self::Unwanted) {
            Self::Gathering { tokens, .. } => Some(tokens),
            Self::Unwanted => None,
        }
    }
}

/// What came of a slice: the position of its first row and what is known of the tokens after its rows, or
/// why nothing is.
pub(crate) type Scored = (SeqId, usize, Result<Vec<PromptToken>, Undrawn>);

/// Scores the prompt tokens of those of `slices` whose samples want it. The slices are all of the last
/// pass, in their order; at most `max_rows` rows of logits are held at once.
pub(crate) fn score(
    runner: &mut Runner,
    scheduler: &Scheduler,
    samples: &HashMap<SeqId, Sample>,
    (slices, max_rows): (&[Slice], usize),
) -> Vec<Scored> {
    let mut scored = Vec::new();
    let mut first_row = 0;
    for slice in slices {
        let row = first_row;
        first_row += slice.rows();
        let Some(sample) = samples.get(&slice.seq) else { continue };
        let PromptScore::Gathering { top, .. } = sample.prompt else { continue };
        // Each position tells of the token after it; the last has none.
        let end = (slice.start + slice.len).min(sample.prompt_len - 1);
        if slice.start >= end {
            continue;
        }
        let targets = &scheduler.tokens(slice.seq)[slice.start + 1..=end];
        let mut tokens = Ok(Vec::with_capacity(targets.len()));
        for (i, targets) in targets.chunks(max_rows).enumerate() {
            let found = score_rows(runner, row + i * max_rows, targets, top);
            tokens = tokens.and_then(|mut tokens| {
                tokens.extend(found?);
                Ok(tokens)
            });
        }
        scored.push((slice.seq, slice.start, tokens));
    }
    scored
}

/// The rows of the last pass from `first` on, against the tokens that follow them.
fn score_rows(
    runner: &mut Runner,
    first: usize,
    targets: &[u32],
    top: usize,
) -> Result<Vec<PromptToken>, Undrawn> {
    let vocab = runner.decoder.config.vocab_size;
    let rows: Vec<usize> = (first..first + targets.len()).collect();
    let Logits { kernels, rows: logits, .. } = runner.logits(&rows);
    let stats = stats(kernels, logits, &vec![1.0; rows.len()], targets);
    let rows = logits.chunks_exact(vocab).zip(targets).zip(stats);
    rows.map(|((row, token), stats)| {
        if !stats.log_sum_exp.is_finite() {
            return Err(Undrawn::NotFinite);
        }
        let chosen = (*token, stats.log_prob);
        Ok(PromptToken {
            token: *token,
            logprob: stats.log_prob,
            rank: rank(row, *token),
            top: top_logprobs(row, (stats.log_sum_exp, 1.0), chosen, top),
        })
    })
    .collect()
}

/// The place of `token` among `logits`, from 1.
fn rank(logits: &[f32], token: u32) -> usize {
    let (before, own) = (token as usize, logits[token as usize]);
    let ahead = |(i, z): &(usize, &f32)| **z > own || (**z == own && *i < before);
    1 + logits.iter().enumerate().filter(ahead).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equals_the_lowest_id_comes_first() {
        let logits = [0.5, 2.0, 0.5, -1.0];
        assert_eq!([0, 1, 2, 3].map(|token| rank(&logits, token)), [2, 1, 3, 4]);
    }

    #[test]
    fn positions_that_come_again_replace_what_was_known() {
        let token = |token| PromptToken { token, logprob: -1.0, rank: 1, top: Vec::new() };
        let mut score = PromptScore::Gathering { top: 0, tokens: Vec::new() };
        score.take(0, vec![token(5), token(6)]);
        score.take(0, vec![token(7)]);
        score.take(1, vec![token(8)]);
        assert_eq!(score.give(), Some(vec![token(7), token(8)]));
        assert_eq!(score.give(), None);
    }
}
