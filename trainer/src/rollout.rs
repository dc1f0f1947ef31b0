//! Rollouts: groups of samples drawn by the engine that also serves, and what they were drawn with.
//!
//! Rewards are not known here; a finished episode is handed to the caller while others still run.

use std::collections::HashMap;

use engine::{EosRule, Event, FinishReason, Host, Request, RequestId, SamplingParams};

use crate::error::{Error, Result};

/// One sampled response.
#[derive(Clone, Debug, PartialEq)]
pub struct Episode {
    /// Index of its prompt in the batch.
    pub prompt: usize,
    /// Which sample of the group.
    pub sample: usize,
    /// The response's tokens, the end-of-text token included if it was drawn.
    pub tokens: Vec<u32>,
    /// Their log-probabilities in nats, under the distribution they were drawn from.
    pub logprobs: Vec<f32>,
    /// Entropy in nats of the distribution each token was drawn from, before any truncation.
    pub entropies: Vec<f32>,
    /// The response's text, without special tokens.
    pub text: String,
    /// Where the text of each token ends, in bytes of UTF-8; a token whose characters are not whole yet
    /// adds none, the next one has them.
    pub text_ends: Vec<usize>,
    /// Why it ended.
    pub finish: FinishReason,
    /// The weights that produced it.
    pub version: u64,
}

/// How responses are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct RolloutSettings {
    /// Samples per prompt.
    pub samples: usize,
    /// Temperature; 0 for greedy.
    pub temperature: f32,
    /// Nucleus; 1 for none.
    pub top_p: f32,
    /// Only the most likely; `None` for all.
    pub top_k: Option<usize>,
    /// Most tokens of a response.
    pub max_tokens: usize,
    /// Texts that end a response.
    pub stop: Vec<String>,
    /// Whether end-of-text ends a response.
    pub eos: EosRule,
    /// Key of the random streams; a prompt's stream is keyed by it and the prompt's index.
    pub seed: u64,
}

impl RolloutSettings {
    /// Whether the distribution drawn from is the model's own at this temperature, so that the
    /// sampled log-probabilities are those the trainer computes.
    pub fn is_untruncated(&self) -> bool {
        self.top_p >= 1.0 && self.top_k.is_none() && self.temperature > 0.0
    }

    fn params(&self, prompt: usize) -> SamplingParams {
        SamplingParams {
            n: self.samples,
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            max_tokens: Some(self.max_tokens),
            stop: self.stop.clone(),
            eos: self.eos,
            seed: Some(engine::random::hash(&[self.seed, prompt as u64])),
            ..SamplingParams::default()
        }
    }
}

/// Draws `settings.samples` responses to each prompt, calling `done` as each one ends; returns them by
/// prompt, then sample. An engine's guests share its batches, and change nothing of the responses.
///
/// # Errors
/// When the engine refuses a prompt, or the model's numbers are not finite.
pub fn generate<'a>(
    engine: impl Into<Host<'a>>,
    prompts: &[Vec<u32>],
    settings: &RolloutSettings,
    done: &mut dyn FnMut(&Episode),
) -> Result<Vec<Episode>> {
    let mut host = engine.into();
    let mut by_request: HashMap<RequestId, usize> = HashMap::new();
    let mut open: Vec<Episode> = Vec::with_capacity(prompts.len() * settings.samples);
    for (prompt, tokens) in prompts.iter().enumerate() {
        let request = Request::new(tokens.clone(), settings.params(prompt));
        let id = host.engine.add(request).map_err(|error| {
            by_request.keys().for_each(|id| {
                host.engine.abort(*id);
            });
            Error::engine(error)
        })?;
        by_request.insert(id, prompt);
        open.extend((0..settings.samples).map(|sample| Episode::new(prompt, sample)));
    }
    let mut unfinished = open.len();
    while unfinished > 0 && host.engine.has_work() {
        for event in host.step().map_err(Error::engine)? {
            let prompt = by_request[&event.request()];
            let episode = |sample: usize| prompt * settings.samples + sample;
            match event {
                Event::Token(token) => {
                    let episode = &mut open[episode(token.sample)];
                    episode.tokens.push(token.token);
                    episode.logprobs.push(token.logprob);
                    episode.entropies.push(token.entropy);
                    episode.text.push_str(&token.text);
                    episode.text_ends.push(episode.text.len());
                    episode.version = token.version.0;
                }
                Event::Finished(finished) => {
                    if let Some(error) = finished.error {
                        by_request.keys().for_each(|id| {
                            host.engine.abort(*id);
                        });
                        return Err(Error::numeric(error.to_string()));
                    }
                    let episode = &mut open[episode(finished.sample)];
                    episode.text.push_str(&finished.text);
                    episode.finish = finished.reason;
                    unfinished -= 1;
                    done(episode);
                }
            }
        }
    }
    Ok(open)
}

impl Episode {
    fn new(prompt: usize, sample: usize) -> Self {
        Self {
            prompt,
            sample,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            entropies: Vec::new(),
            text: String::new(),
            text_ends: Vec::new(),
            finish: FinishReason::Abort,
            version: 0,
        }
    }
}
