//! A prompt in its answer: its text before the completion's (`echo`), and the log-probabilities of its
//! tokens in vLLM's shape (`prompt_logprobs`).

use std::collections::HashMap;
use std::sync::Arc;

use engine::text::{Detokenizer, SkipSpecial};
use engine::{Event, PromptToken, Tokenizer};
use serde::{Serialize, Serializer};

use crate::api_error::ApiError;
use crate::completions::{self, TextChoice};
use crate::job::{Job, unprocessable};
use crate::logprobs::{LEAST, Speller};

/// The text of a prompt, as its tokens spell it, without a leading begin-of-text token.
#[derive(Clone, Debug, Default)]
pub(crate) struct Echoed {
    pub(crate) text: String,
    /// Where each token begins, in characters.
    pub(crate) offsets: Vec<usize>,
    /// Where the answer begins, in characters.
    pub(crate) chars: usize,
}

impl Echoed {
    /// Spells `prompt`; without a tokenizer there is no text.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub(crate) fn new(
        tokenizer: Option<&Arc<Tokenizer>>,
        prompt: &[u32],
    ) -> Result<Self, ApiError> {
        let mut echoed = Self::default();
        let Some(tokenizer) = tokenizer else {
            echoed.offsets = vec![0; prompt.len()];
            return Ok(echoed);
        };
        let bad = |error| unprocessable("prompt", &error);
        let mut spelled = Detokenizer::new(Arc::clone(tokenizer), SkipSpecial::No);
        for (place, token) in prompt.iter().enumerate() {
            echoed.offsets.push(echoed.chars);
            if place > 0 || tokenizer.bos_id() != Some(*token) {
                echoed.push(spelled.push(*token).map_err(bad)?);
            }
        }
        echoed.push(&spelled.finish().map_err(bad)?);
        Ok(echoed)
    }

    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.chars += text.chars().count();
    }
}

/// Log-probabilities of a prompt, in vLLM's shape: `null`, then for each further token an object that has
/// the token itself and the most likely ones by their ids.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PromptLogprobs(Vec<Option<Entries>>);

#[derive(Clone, Debug)]
struct Entries(Vec<(u32, Entry)>);

#[derive(Clone, Debug, Serialize)]
struct Entry {
    logprob: f32,
    rank: usize,
    decoded_token: String,
}

impl Serialize for Entries {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, entry)| (token, entry)))
    }
}

impl PromptLogprobs {
    /// All tokens of a prompt but the first, with `top` alternatives each.
    pub(crate) fn new(tokens: &[PromptToken], top: usize, speller: Speller<'_>) -> Self {
        let entry = |id: u32, logprob: f32, rank| {
            let decoded_token = speller.text(id);
            (id, Entry { logprob: logprob.max(LEAST), rank, decoded_token })
        };
        let one = |token: &PromptToken| {
            let own = entry(token.token, token.logprob, token.rank);
            let top = token.top.iter().take(top).zip(1..);
            let others = top.filter(|((id, _), _)| *id != token.token);
            let others = others.map(|((id, logprob), rank)| entry(*id, *logprob, rank));
            Some(Entries([own].into_iter().chain(others).collect()))
        };
        Self([None].into_iter().chain(tokens.iter().map(one)).collect())
    }
}

/// Puts the prompt before the first piece of each choice of a stream.
#[derive(Debug, Default)]
pub(crate) struct Opener {
    /// What the engine has told of each prompt, for choices that have not begun.
    told: HashMap<usize, Vec<PromptToken>>,
    begun: Vec<bool>,
}

impl Opener {
    pub(crate) fn new(job: &Job) -> Self {
        let begun = if job.echo.is_empty() { 0 } else { job.choices() };
        Self { told: HashMap::new(), begun: vec![false; begun] }
    }

    /// The piece that comes before that of `event`, if one does; sets the `offset` that the answer begins
    /// at. The first sample of a prompt is always the first to be heard of, and tells of the prompt.
    pub(crate) fn open(
        &mut self,
        job: &Job,
        (index, event): (usize, &mut Event),
        offset: &mut usize,
    ) -> Option<TextChoice> {
        let begun = self.begun.get_mut(index)?;
        if std::mem::replace(begun, true) {
            return None;
        }
        let prompt = index / job.samples;
        if let Some(told) = event.take_prompt() {
            self.told.insert(prompt, told);
        }
        let none = Vec::new();
        let told = self.told.get(&prompt).unwrap_or(&none);
        *offset = job.echo[prompt].chars;
        Some(completions::opening(job, index, told))
    }
}
