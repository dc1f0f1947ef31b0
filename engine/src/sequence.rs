//! The engine's side of a running sample: its text, its stops, its place in its request.

use std::sync::Arc;

use crate::error::Result;
use crate::grammar::GrammarState;
use crate::guess::Guesses;
use crate::prompt::PromptScore;
use crate::request::{
    Continuation, EosRule, FinishReason, Finished, LogprobsMode, Request, RequestId,
    SamplingParams, StopReason, StopText,
};
use crate::text::{Detokenizer, SkipSpecial, StopMatcher, StopPatterns, StopScan, Tokenizer};

/// Prompt tokens that a detokenizer is shown, so that it knows what the answer joins on to.
const CONTEXT_TOKENS: usize = 8;

/// What ends the samples of a request, in one copy for all of them.
#[derive(Clone)]
pub(crate) struct Stops {
    /// Tokens that may not come before `min_tokens`.
    tokens: Arc<[u32]>,
    strings: StopPatterns,
}

impl Stops {
    /// What `params` say, of a model whose texts end with `eos`.
    ///
    /// # Errors
    /// When there are too many stop strings, or one is empty or too long.
    pub(crate) fn new(params: &SamplingParams, eos: &[u32]) -> Result<Self> {
        let eos = if params.eos == EosRule::Stop { eos } else { &[] };
        let tokens = params.stop_token_ids.iter().chain(eos).copied().collect();
        Ok(Self { tokens, strings: StopPatterns::new(&params.stop)? })
    }
}

/// One sample of a request while it waits or runs.
pub(crate) struct Sample {
    pub(crate) request: RequestId,
    pub(crate) index: usize,
    pub(crate) params: Arc<SamplingParams>,
    pub(crate) prompt_len: usize,
    pub(crate) seed: u64,
    /// Whether a step has computed something of it.
    pub(crate) begun: bool,
    stops: Stops,
    text: Option<SampleText>,
    /// What its tokens must spell.
    pub(crate) grammar: Option<GrammarState>,
    /// The log-probabilities of its prompt. Only the first sample of a request gathers them.
    pub(crate) prompt: PromptScore,
    pub(crate) continuation: Continuation,
    /// What is expected of its next tokens.
    pub(crate) guesses: Guesses,
    logprobs_mode: LogprobsMode,
}

struct SampleText {
    detokenizer: Detokenizer,
    stops: StopMatcher,
}

/// What a new token does to its sample.
pub(crate) struct Step {
    /// Text that may be shown.
    pub(crate) text: String,
    /// Set when the sample is over.
    pub(crate) end: Option<(FinishReason, Option<StopReason>)>,
}

impl Sample {
    pub(crate) fn new(
        (request_id, index, seed): (RequestId, usize, u64),
        request: &Request,
        params: &Arc<SamplingParams>,
        stops: &Stops,
        tokenizer: Option<&Arc<Tokenizer>>,
    ) -> Self {
        let text = tokenizer.map(|tokenizer| {
            let tail = &request.prompt[request.prompt.len().saturating_sub(CONTEXT_TOKENS)..];
            let tokenizer = Arc::clone(tokenizer);
            SampleText {
                detokenizer: Detokenizer::after_prompt(tokenizer, SkipSpecial::Yes, tail),
                stops: StopMatcher::of(stops.strings.clone()),
            }
        });
        Self {
            request: request_id,
            index,
            params: Arc::clone(params),
            prompt_len: request.prompt.len(),
            seed,
            begun: false,
            stops: stops.clone(),
            text,
            grammar: request.constraint.as_ref().map(crate::grammar::Constraint::start),
            prompt: match request.prompt_logprobs.filter(|_| index == 0) {
                Some(top) => PromptScore::Gathering { top, tokens: Vec::new() },
                None => PromptScore::Unwanted,
            },
            continuation: request.continuation,
            guesses: Guesses::new(),
            logprobs_mode: request.logprobs_mode,
        }
    }

    /// Tokens that may not be drawn as the `generated`-th token.
    pub(crate) fn banned(&self, generated: usize) -> &[u32] {
        if generated < self.params.min_tokens { &self.stops.tokens } else { &[] }
    }

    /// Whether parameters leave the distribution of the `generated`-th token, but for its temperature, as it
    /// is; a grammar is not looked at.
    pub(crate) fn is_plain_at(&self, generated: usize) -> bool {
        self.params.is_plain() && self.banned(generated).is_empty()
    }

    /// How many alternatives of the distribution that is drawn from are reported; the others are of the
    /// model's own.
    pub(crate) fn processed_top(&self) -> Option<usize> {
        self.params.logprobs.filter(|_| self.logprobs_mode == LogprobsMode::Processed)
    }

    /// Takes in `token`, the sample's `generated`-th (from 1), after which `room` more may follow.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens, or the grammar's limits are reached.
    pub(crate) fn push(&mut self, token: u32, generated: usize, room: usize) -> Result<Step> {
        if self.stops.tokens.contains(&token) {
            let listed = self.params.stop_token_ids.contains(&token);
            let end = Some((FinishReason::Stop, listed.then_some(StopReason::Token(token))));
            return Ok(Step { text: self.flush()?, end });
        }
        let mut step = self.push_text(token, generated)?;
        if let Some(grammar) = &mut self.grammar
            && step.end.is_none()
            && grammar.advance(token)?
        {
            step.text.push_str(&self.flush()?);
            step.end = Some((FinishReason::Stop, None));
        }
        if step.end.is_none() && room == 0 {
            step.text.push_str(&self.flush()?);
            step.end = Some((FinishReason::Length, None));
        }
        Ok(step)
    }

    fn push_text(&mut self, token: u32, generated: usize) -> Result<Step> {
        let Some(text) = &mut self.text else {
            return Ok(Step { text: String::new(), end: None });
        };
        let delta = text.detokenizer.push(token)?;
        if generated < self.params.min_tokens {
            // Too early to stop: what could end it is part of the answer.
            return Ok(Step { text: delta.to_owned(), end: None });
        }
        Ok(match text.stops.push(delta) {
            StopScan::None { text } | StopScan::Hold { text, .. } => Step { text, end: None },
            StopScan::Found { index, text_before } => {
                let stop = self.params.stop[index].clone();
                let shown = match self.params.stop_text {
                    StopText::Include => text_before + &stop,
                    StopText::Exclude => text_before,
                };
                let end = Some((FinishReason::Stop, Some(StopReason::Text(stop))));
                Step { text: shown, end }
            }
        })
    }

    /// Text that was held back, when nothing can follow any more.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub(crate) fn flush(&mut self) -> Result<String> {
        let Some(text) = &mut self.text else { return Ok(String::new()) };
        let rest = text.detokenizer.finish()?;
        Ok(match text.stops.push(&rest) {
            StopScan::None { text } => text,
            StopScan::Hold { text: shown, .. } => shown + &text.stops.finish(),
            StopScan::Found { text_before, .. } => text_before,
        })
    }

    /// The event that says this sample has ended.
    pub(crate) fn finished(&self, reason: FinishReason, cached_tokens: usize) -> Finished {
        Finished {
            request: self.request,
            sample: self.index,
            reason,
            stop_reason: None,
            text: String::new(),
            cached_tokens,
            error: None,
            prompt: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of the tokenizer below: letters, the same letters as bytes, and the end.
    const A: u32 = 1;
    const B: u32 = 2;
    const EOS: u32 = 5;

    fn tokenizer() -> Arc<Tokenizer> {
        let json = br#"{"version": "1.0", "added_tokens": [{"id": 5, "content": "</s>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "merges": [], "vocab":
            {"<unk>": 0, "a": 1, "b": 2, "<0x61>": 3, "<0x62>": 4, "</s>": 5}}}"#;
        Arc::new(Tokenizer::from_json_bytes(json).unwrap())
    }

    #[test]
    fn samples_of_a_request_share_what_ends_them() {
        let params = SamplingParams {
            stop: vec!["x".repeat(1024); 64],
            stop_token_ids: vec![B; 1024],
            ..SamplingParams::default()
        };
        let stops = Stops::new(&params, &[EOS]).unwrap();
        let request = Request::new(vec![A], params.clone());
        let params = Arc::new(params);
        let samples: Vec<Sample> = (0..3)
            .map(|i| {
                Sample::new((RequestId(0), i, 0), &request, &params, &stops, Some(&tokenizer()))
            })
            .collect();
        assert!(samples.iter().all(|sample| Arc::ptr_eq(&sample.stops.tokens, &stops.tokens)));
    }
}
