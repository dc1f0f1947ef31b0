//! What a caller asks of the engine and what it hears back.
//!
//! Everything here speaks token ids; text appears only as stop strings and as the readable delta of a
//! token. Parsing JSON and rendering chats happens above.

use scheduler::WeightsVersion;

use crate::error::{Error, Result};
use crate::grammar::Constraint;
use crate::prompt::PromptToken;
use crate::text::check_stop_strings;
use std::fmt;

/// Most samples one request may ask for.
pub const MAX_SAMPLES: usize = 128;
/// Most alternatives (`logprobs`) reported per token.
pub const MAX_LOGPROBS: usize = 20;

/// Names one request for the life of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// Whether the model's end-of-text tokens end a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EosRule {
    /// They end it, once `min_tokens` are out.
    #[default]
    Stop,
    /// They are tokens like any other.
    Ignore,
}

/// Whether text shown to the caller includes what ended it: a stop string, or the text of a token of
/// `stop_token_ids`. Special tokens have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopText {
    /// It is cut off.
    #[default]
    Exclude,
    /// It is kept.
    Include,
}

/// Which distribution the alternatives beside a token are of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogprobsMode {
    /// The model's own, at temperature 1 with nothing cut off.
    #[default]
    Raw,
    /// The one that the token was drawn from: after bias, penalties, temperature, truncation and
    /// grammar. At temperature 0 as at 1, nothing truncated.
    Processed,
}

/// Whether tokens are drawn after the prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Continuation {
    /// As the parameters say.
    #[default]
    Sample,
    /// None are: the prompt is computed, and its samples end. `max_tokens` does not count.
    Omit,
}

/// How tokens are chosen. The default draws from the model's own distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 takes the most likely token. From 0 to 100.
    pub temperature: f32,
    /// Only the `k` most likely tokens; `None` for all.
    pub top_k: Option<usize>,
    /// Only the smallest set of most likely tokens whose probability reaches it; in (0, 1].
    pub top_p: f32,
    /// Only tokens at least this share as likely as the most likely one; in [0, 1].
    pub min_p: f32,
    /// Subtracted from the logit of each token generated before; in [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted once per earlier occurrence among generated tokens; in [-2, 2].
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; above 0.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens; each in [-100, 100].
    pub logit_bias: Vec<(u32, f32)>,
    /// Texts that end a sample.
    pub stop: Vec<String>,
    /// Whether the text keeps what ended it.
    pub stop_text: StopText,
    /// Further tokens that end a sample.
    pub stop_token_ids: Vec<u32>,
    /// Whether end-of-text ends a sample.
    pub eos: EosRule,
    /// Most tokens a sample may have; `None` for what the context leaves.
    pub max_tokens: Option<usize>,
    /// Neither end-of-text nor stop tokens are drawn before this many tokens are out.
    pub min_tokens: usize,
    /// Key of this request's random stream; `None` takes one from the engine's seed.
    pub seed: Option<u64>,
    /// Samples to draw; they share the prompt's blocks.
    pub n: usize,
    /// Report this many most likely alternatives beside each token.
    pub logprobs: Option<usize>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            stop: Vec::new(),
            stop_text: StopText::Exclude,
            stop_token_ids: Vec::new(),
            eos: EosRule::Stop,
            max_tokens: None,
            min_tokens: 0,
            seed: None,
            n: 1,
            logprobs: None,
        }
    }
}

impl SamplingParams {
    /// Checks every value against its range.
    ///
    /// # Errors
    /// `ErrorKind::Request`, naming the parameter, its value and its limit.
    pub fn validate(&self, vocab_size: usize) -> Result<()> {
        in_range("temperature", self.temperature, 0.0, 100.0)?;
        in_range("top_p", self.top_p, f32::MIN_POSITIVE, 1.0)?;
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        in_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        in_range("repetition_penalty", self.repetition_penalty, 1e-3, 1e3)?;
        if self.n == 0 || self.n > MAX_SAMPLES {
            return Err(Error::request(format!("n is {}, limit is 1 to {MAX_SAMPLES}", self.n)));
        }
        if self.max_tokens == Some(0) {
            return Err(Error::request("max_tokens is 0, limit is at least 1"));
        }
        if let Some(max) = self.max_tokens.filter(|max| *max < self.min_tokens) {
            let min = self.min_tokens;
            return Err(Error::request(format!("min_tokens is {min}, limit is max_tokens {max}")));
        }
        if let Some(k) = self.logprobs.filter(|k| *k > MAX_LOGPROBS) {
            return Err(Error::request(format!("logprobs is {k}, limit is {MAX_LOGPROBS}")));
        }
        check_stop_strings(&self.stop)?;
        self.validate_tokens(vocab_size)
    }

    fn validate_tokens(&self, vocab_size: usize) -> Result<()> {
        for (token, bias) in &self.logit_bias {
            in_range("logit_bias", *bias, -100.0, 100.0)?;
            token_in_vocabulary("logit_bias", *token, vocab_size)?;
        }
        for token in &self.stop_token_ids {
            token_in_vocabulary("stop_token_ids", *token, vocab_size)?;
        }
        Ok(())
    }

    /// Whether tokens are drawn from the unchanged softmax at `temperature` (no truncation, no
    /// penalty, no bias), which needs no copy of the logits.
    pub fn is_plain(&self) -> bool {
        self.top_k.is_none()
            && self.top_p >= 1.0
            && self.min_p <= 0.0
            && self.presence_penalty == 0.0
            && self.frequency_penalty == 0.0
            && self.repetition_penalty == 1.0
            && self.logit_bias.is_empty()
    }
}

fn in_range(name: &str, value: f32, low: f32, high: f32) -> Result<()> {
    if value.is_finite() && (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::request(format!("{name} is {value}, limit is {low} to {high}")))
}

/// Fails when `token` is not an id of a vocabulary of `vocab_size`.
pub(crate) fn token_in_vocabulary(name: &str, token: u32, vocab_size: usize) -> Result<()> {
    if (token as usize) < vocab_size {
        return Ok(());
    }
    Err(Error::request(format!("{name} has token {token}, vocabulary has {vocab_size}")))
}

/// Checks the tokens of a prompt against a model's vocabulary and the longest sequence, of which a
/// continuation needs one token.
///
/// # Errors
/// `ErrorKind::Request`, naming the length or the token and its limit.
pub fn check_prompt(
    prompt: &[u32],
    continuation: Continuation,
    (max_model_len, vocab_size): (usize, usize),
) -> Result<()> {
    let len = prompt.len();
    if len == 0 {
        return Err(Error::request("prompt has 0 tokens, limit is at least 1"));
    }
    let (limit, why) = match continuation {
        Continuation::Sample => (
            max_model_len.saturating_sub(1),
            format!(" (context of {max_model_len} less one to generate)"),
        ),
        Continuation::Omit => (max_model_len, String::new()),
    };
    if len > limit {
        return Err(Error::request(format!("prompt has {len} tokens, limit is {limit}{why}")));
    }
    prompt.iter().try_for_each(|token| token_in_vocabulary("prompt", *token, vocab_size))
}

/// One prompt and how to go on from it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Token ids; at least one.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// Keeps the prefix-cache entries of different users apart; 0 is shared.
    pub cache_salt: u64,
    /// What the answer must spell. A sample ends where nothing can follow, whatever `min_tokens` says.
    pub constraint: Option<Constraint>,
    /// Report the log-probabilities of the prompt's tokens, each with this many most likely alternatives,
    /// at most [`MAX_LOGPROBS`]. The prompt is then computed whole, whatever the prefix cache has.
    pub prompt_logprobs: Option<usize>,
    /// Which distribution [`Token::top`] is of.
    pub logprobs_mode: LogprobsMode,
    /// Whether tokens are drawn after the prompt.
    pub continuation: Continuation,
}

impl Request {
    /// A request for `prompt` with these parameters, the shared prefix cache and no constraint, which
    /// wants to know nothing of its prompt.
    pub fn new(prompt: Vec<u32>, params: SamplingParams) -> Self {
        Self {
            prompt,
            params,
            cache_salt: 0,
            constraint: None,
            prompt_logprobs: None,
            logprobs_mode: LogprobsMode::Raw,
            continuation: Continuation::Sample,
        }
    }

    /// Checks the number of alternatives beside prompt tokens.
    ///
    /// # Errors
    /// `ErrorKind::Request`, naming the parameter, its value and its limit.
    pub(crate) fn validate_prompt_logprobs(&self) -> Result<()> {
        match self.prompt_logprobs {
            Some(k) if k > MAX_LOGPROBS => {
                Err(Error::request(format!("prompt_logprobs is {k}, limit is {MAX_LOGPROBS}")))
            }
            _ => Ok(()),
        }
    }
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-text, a stop token or a stop string.
    Stop,
    /// `max_tokens`, or the end of the context.
    Length,
    /// The caller, or a failure, ended it.
    Abort,
}

impl FinishReason {
    /// OpenAI's word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::Abort => "abort",
        }
    }
}

/// What exactly stopped a sample; end-of-text is `None` in [`Finished::stop_reason`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// One of `stop_token_ids`.
    Token(u32),
    /// One of the stop strings.
    Text(String),
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// The request it belongs to.
    pub request: RequestId,
    /// Which of the request's `n` samples.
    pub sample: usize,
    /// The token's id.
    pub token: u32,
    /// Text that became certain with this token; may be empty (half a character, or text that may
    /// turn out to be a stop string).
    pub text: String,
    /// Log-probability in nats under the distribution it was drawn from (at temperature 0: as at 1).
    pub logprob: f32,
    /// Log-probability at temperature 1 with nothing cut off.
    pub raw_logprob: f32,
    /// Entropy in nats of the whole distribution at the request's temperature, nothing cut off.
    pub entropy: f32,
    /// The most likely tokens with their log-probabilities under the distribution that
    /// [`Request::logprobs_mode`] names, most likely first. Fewer than asked for where fewer can be drawn.
    pub top: Vec<(u32, f32)>,
    /// The weights that produced it.
    pub version: WeightsVersion,
    /// What was asked about the prompt: all its tokens but the first. Comes with the first event of the
    /// request's sample 0.
    pub prompt: Option<Vec<PromptToken>>,
}

/// The end of one sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// The request it belongs to.
    pub request: RequestId,
    /// Which of the request's `n` samples.
    pub sample: usize,
    /// Why it ended.
    pub reason: FinishReason,
    /// What exactly stopped it, unless end-of-text.
    pub stop_reason: Option<StopReason>,
    /// Text that was held back and belongs to the answer after all.
    pub text: String,
    /// Prompt tokens that were found in the prefix cache.
    pub cached_tokens: usize,
    /// Set when a failure ended it: what went wrong.
    pub error: Option<SampleError>,
    /// As [`Token::prompt`], where no token was drawn.
    pub prompt: Option<Vec<PromptToken>>,
}

/// Why a sample failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SampleError {
    /// What was asked for cannot go on: parameters or a grammar leave no token, or the grammar's limits are
    /// reached.
    Request(String),
    /// The fault is not the request's.
    Internal(String),
}

impl SampleError {
    /// What went wrong.
    pub fn why(&self) -> &str {
        match self {
            Self::Request(why) | Self::Internal(why) => why,
        }
    }
}

impl fmt::Display for SampleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.why())
    }
}

/// What happened in a step.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A token was sampled.
    Token(Token),
    /// A sample ended; no more of it follows.
    Finished(Finished),
}

impl Event {
    /// The request the event belongs to.
    pub fn request(&self) -> RequestId {
        match self {
            Self::Token(token) => token.request,
            Self::Finished(finished) => finished.request,
        }
    }

    /// Takes out what it says of its prompt's tokens.
    pub fn take_prompt(&mut self) -> Option<Vec<PromptToken>> {
        match self {
            Self::Token(token) => token.prompt.take(),
            Self::Finished(finished) => finished.prompt.take(),
        }
    }
}
