//! Log-probabilities in the shapes of both APIs.
//!
//! By default those of the model's own distribution, at temperature 1 with nothing cut off, as vLLM
//! reports; else those of the distribution that was drawn from. A token and its alternatives are
//! comparable in both.

use engine::{LogprobsMode, PromptToken, Token, Tokenizer};
use serde::{Serialize, Serializer};

use crate::echo::Echoed;

/// Stands for minus infinity, which JSON cannot say.
pub(crate) const LEAST: f32 = -9999.0;

/// A chat answer's log-probabilities.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct ChatLogprobs {
    pub(crate) content: Vec<ChatToken>,
    pub(crate) refusal: Option<()>,
}

/// One token of a chat answer.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ChatToken {
    #[serde(flatten)]
    chosen: Alternative,
    top_logprobs: Vec<Alternative>,
}

#[derive(Clone, Debug, Serialize)]
struct Alternative {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// A completion's log-probabilities; all four run in parallel.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct TextLogprobs {
    text_offset: Vec<usize>,
    /// Nothing is known of the first token of a prompt.
    token_logprobs: Vec<Option<f32>>,
    tokens: Vec<String>,
    top_logprobs: Vec<Option<Alternatives>>,
}

/// Tokens with their log-probabilities, as one JSON object.
#[derive(Clone, Debug, Default)]
struct Alternatives(Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// Spells tokens, and picks the log-probability that is reported.
#[derive(Clone, Copy)]
pub(crate) struct Speller<'a> {
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    pub(crate) mode: LogprobsMode,
}

impl Speller<'_> {
    fn bytes(self, token: u32) -> Vec<u8> {
        self.tokenizer.map(|tokenizer| tokenizer.token_bytes(token).to_vec()).unwrap_or_default()
    }

    /// Characters that the token begins in the text.
    fn chars(self, token: u32) -> usize {
        match self.tokenizer {
            // A character that several tokens share counts for the one with its first byte.
            Some(tokenizer) => {
                let bytes = tokenizer.token_bytes(token).iter();
                bytes.filter(|byte| **byte & 0xc0 != 0x80).count()
            }
            None => self.text(token).chars().count(),
        }
    }

    fn logprob(self, token: &Token) -> f32 {
        match self.mode {
            LogprobsMode::Raw => token.raw_logprob,
            LogprobsMode::Processed => token.logprob,
        }
    }

    pub(crate) fn text(self, token: u32) -> String {
        match self.tokenizer {
            Some(_) => String::from_utf8_lossy(&self.bytes(token)).into_owned(),
            None => format!("token_id:{token}"),
        }
    }

    /// What a token is called where names have to tell tokens apart: its text, or, where it is a part of a
    /// character, its bytes in the form of OpenAI's first API, `bytes:\xf0\x9f`.
    fn name(self, token: u32) -> String {
        if self.tokenizer.is_none() {
            return self.text(token);
        }
        String::from_utf8(self.bytes(token)).unwrap_or_else(|part| {
            let hex = part.as_bytes().iter().map(|byte| format!("\\x{byte:02x}"));
            std::iter::once("bytes:".to_owned()).chain(hex).collect()
        })
    }

    fn alternative(self, token: u32, logprob: f32) -> Alternative {
        let bytes = self.bytes(token);
        Alternative { token: self.text(token), logprob: logprob.max(LEAST), bytes }
    }
}

/// `token` in a chat's shape.
pub(crate) fn chat_token(token: &Token, speller: Speller<'_>) -> ChatToken {
    let top = token.top.iter().map(|(id, logprob)| speller.alternative(*id, *logprob));
    ChatToken {
        chosen: speller.alternative(token.token, speller.logprob(token)),
        top_logprobs: top.collect(),
    }
}

impl TextLogprobs {
    /// Appends `token`, whose text begins at `offset` characters; returns where the next one begins.
    pub(crate) fn push(&mut self, token: &Token, offset: usize, speller: Speller<'_>) -> usize {
        let own = (token.token, speller.logprob(token));
        self.push_one(own, &token.top, (offset, speller));
        offset + speller.chars(token.token)
    }

    /// Appends `prompt`, of whose tokens but the first `told` tells, with `top` alternatives each.
    pub(crate) fn push_prompt(
        &mut self,
        prompt: &[u32],
        (told, top): (&[PromptToken], usize),
        (echoed, speller): (&Echoed, Speller<'_>),
    ) {
        for (place, (token, offset)) in prompt.iter().zip(&echoed.offsets).enumerate() {
            match place.checked_sub(1).and_then(|before| told.get(before)) {
                Some(told) => {
                    let alternatives = &told.top[..top.min(told.top.len())];
                    self.push_one((told.token, told.logprob), alternatives, (*offset, speller));
                }
                None => {
                    self.text_offset.push(*offset);
                    self.token_logprobs.push(None);
                    self.tokens.push(speller.name(*token));
                    self.top_logprobs.push(None);
                }
            }
        }
    }

    fn push_one(
        &mut self,
        (id, logprob): (u32, f32),
        top: &[(u32, f32)],
        (offset, speller): (usize, Speller<'_>),
    ) {
        let (text, logprob) = (speller.name(id), logprob.max(LEAST));
        // The token itself is always among them, even when it is not one of the most likely, and first: names
        // are unique, and where two tokens have one name, only one of them is told.
        let mut named = vec![(text.clone(), logprob)];
        for (other, logprob) in top.iter().filter(|(other, _)| *other != id) {
            let name = speller.name(*other);
            if named.iter().all(|(known, _)| *known != name) {
                named.push((name, logprob.max(LEAST)));
            }
        }
        self.text_offset.push(offset);
        self.token_logprobs.push(Some(logprob));
        self.tokens.push(text);
        self.top_logprobs.push((!top.is_empty()).then_some(Alternatives(named)));
    }
}
