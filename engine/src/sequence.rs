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
    /// Tokens it has.
    generated: usize,
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
#[derive(Default)]
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
            generated: 0,
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
        self.generated = generated;
        let ending = self.stops.tokens.contains(&token);
        let listed = ending && self.params.stop_token_ids.contains(&token);
        let has_text = !ending || (listed && self.params.stop_text == StopText::Include);
        let mut step = if has_text { self.push_text(token)? } else { Step::default() };
        if step.end.is_some() {
            return Ok(step);
        }
        let end = if ending {
            (FinishReason::Stop, listed.then_some(StopReason::Token(token)))
        } else if self.ends_grammar(token)? {
            (FinishReason::Stop, None)
        } else if room == 0 {
            (FinishReason::Length, None)
        } else {
            return Ok(step);
        };
        let rest = self.flush()?;
        step.text.push_str(&rest.text);
        // A stop string in text that was held counts as one that was seen in time.
        step.end = rest.end.or(Some(end));
        Ok(step)
    }

    fn ends_grammar(&mut self, token: u32) -> Result<bool> {
        self.grammar.as_mut().map_or(Ok(false), |grammar| grammar.advance(token))
    }

    fn push_text(&mut self, token: u32) -> Result<Step> {
        let Some(text) = &mut self.text else { return Ok(Step::default()) };
        let delta = text.detokenizer.push(token)?;
        Ok(show(&mut text.stops, delta, &self.params, self.generated))
    }

    /// Text that was held back, when nothing can follow any more, and the stop string that it has.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub(crate) fn flush(&mut self) -> Result<Step> {
        let Some(text) = &mut self.text else { return Ok(Step::default()) };
        let rest = text.detokenizer.finish()?;
        let mut step = show(&mut text.stops, &rest, &self.params, self.generated);
        if step.end.is_none() {
            step.text.push_str(&text.stops.finish());
        }
        Ok(step)
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

/// What may be shown once `delta` has come, with the sample's `generated`-th token.
fn show(stops: &mut StopMatcher, delta: &str, params: &SamplingParams, generated: usize) -> Step {
    let scan = match generated < params.min_tokens {
        // Too early to stop: what could end it is part of the answer.
        true => stops.pass(delta),
        false => stops.push(delta),
    };
    match scan {
        StopScan::None { text } | StopScan::Hold { text, .. } => Step { text, end: None },
        StopScan::Found { index, text_before } => {
            let stop = params.stop[index].clone();
            let text = match params.stop_text {
                StopText::Include => text_before + &stop,
                StopText::Exclude => text_before,
            };
            Step { text, end: Some((FinishReason::Stop, Some(StopReason::Text(stop)))) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of the tokenizer below: letters, the same letters as bytes, and the end.
    const A: u32 = 1;
    const B: u32 = 2;
    const BYTE_A: u32 = 3;
    const BYTE_B: u32 = 4;
    const EOS: u32 = 5;

    fn tokenizer() -> Arc<Tokenizer> {
        let json = br#"{"version": "1.0", "added_tokens": [{"id": 5, "content": "</s>", "single_word": false,
            "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
            "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "merges": [], "vocab":
            {"<unk>": 0, "a": 1, "b": 2, "<0x61>": 3, "<0x62>": 4, "</s>": 5}}}"#;
        Arc::new(Tokenizer::from_json_bytes(json).unwrap())
    }

    /// What is shown of these tokens, of which there may be `most`, piece by piece, and how it ends.
    fn run(
        params: &SamplingParams,
        tokens: &[u32],
        most: usize,
    ) -> (Vec<String>, Option<(FinishReason, Option<StopReason>)>) {
        let request = Request::new(vec![A], params.clone());
        let stops = Stops::new(params, &[EOS]).unwrap();
        let params = Arc::new(params.clone());
        let mut sample =
            Sample::new((RequestId(0), 0, 0), &request, &params, &stops, Some(&tokenizer()));
        let mut shown = Vec::new();
        for (token, generated) in tokens.iter().zip(1..) {
            let step = sample.push(*token, generated, most - generated).unwrap();
            shown.push(step.text);
            if step.end.is_some() {
                assert_eq!(generated, tokens.len(), "over too early: {shown:?}");
                return (shown, step.end);
            }
        }
        (shown, None)
    }

    fn stopped_by(text: &str) -> Option<(FinishReason, Option<StopReason>)> {
        Some((FinishReason::Stop, Some(StopReason::Text(text.to_owned()))))
    }

    #[test]
    fn a_stop_string_may_begin_before_the_fewest_tokens_are_out() {
        let params = |stop: &str, min_tokens| SamplingParams {
            stop: vec![stop.to_owned()],
            min_tokens,
            ..SamplingParams::default()
        };
        assert_eq!(run(&params("ab", 2), &[A, B], 9), (vec![String::new(); 2], stopped_by("ab")));
        let (shown, end) = run(&params("ab", 3), &[A, B, B, A, B], 9);
        assert_eq!((shown.concat(), end), ("abb".to_owned(), stopped_by("ab")));
        // The end of one that came too early begins another.
        let (shown, end) = run(&params("aba", 4), &[A, B, A, B, A], 9);
        assert_eq!(
            (shown, end),
            (["", "", "ab", "", ""].map(String::from).to_vec(), stopped_by("aba"))
        );
    }

    #[test]
    fn a_stop_string_in_held_text_ends_it_however_it_ended() {
        for (stop_text, expected) in [(StopText::Exclude, "b"), (StopText::Include, "bab")] {
            let stop = vec!["ab".to_owned()];
            let params = SamplingParams { stop, stop_text, ..SamplingParams::default() };
            for (tokens, most) in [
                (&[B, BYTE_A, BYTE_B, EOS][..], 9),
                (&[B, BYTE_A, BYTE_B][..], 3),
                (&[B, BYTE_A, BYTE_B, BYTE_B, EOS][..], 9),
                (&[B, BYTE_A, B][..], 9),
            ] {
                let (shown, end) = run(&params, tokens, most);
                assert_eq!((shown.concat().as_str(), end), (expected, stopped_by("ab")));
            }
            let (shown, end) = run(&params, &[B, BYTE_A, EOS], 9);
            assert_eq!((shown.concat().as_str(), end), ("ba", Some((FinishReason::Stop, None))));
            let (shown, end) = run(&params, &[B, BYTE_A], 2);
            assert_eq!((shown.concat().as_str(), end), ("ba", Some((FinishReason::Length, None))));
        }
    }

    #[test]
    fn a_stop_token_is_shown_where_stops_are() {
        for (tokens, excluded, included) in [
            (&[A, B][..], "a", "ab"),
            (&[BYTE_A, B][..], "a", "ab"),
            (&[A, BYTE_B][..], "a", "ab"),
            (&[BYTE_A, EOS][..], "a", "a"),
        ] {
            for (stop_text, expected) in
                [(StopText::Exclude, excluded), (StopText::Include, included)]
            {
                let stop_token_ids = vec![B, BYTE_B, EOS];
                let params =
                    SamplingParams { stop_token_ids, stop_text, ..SamplingParams::default() };
                let (shown, end) = run(&params, tokens, 9);
                let reason = StopReason::Token(*tokens.last().unwrap());
                assert_eq!(shown.concat(), expected, "{tokens:?} {stop_text:?}");
                assert_eq!(end, Some((FinishReason::Stop, Some(reason))));
            }
        }
        let both = SamplingParams {
            stop: vec!["ab".to_owned()],
            stop_token_ids: vec![B],
            stop_text: StopText::Include,
            ..SamplingParams::default()
        };
        let (shown, end) = run(&both, &[A, B], 9);
        assert_eq!((shown.concat().as_str(), end), ("ab", stopped_by("ab")));
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
