//! Log-probabilities in the shapes of both APIs.
//!
//! Reported at temperature 1 with nothing cut off, as vLLM does by default, so that a token and its
//! alternatives are comparable.

use engine::{Token, Tokenizer};
use serde::{Serialize, Serializer};

/// Stands for minus infinity, which JSON cannot say.
const LEAST: f32 = -9999.0;

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
    token_logprobs: Vec<f32>,
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

/// Spells tokens.
#[derive(Clone, Copy)]
pub(crate) struct Speller<'a> {
    pub(crate) tokenizer: Option<&'a Tokenizer>,
}

impl Speller<'_> {
    fn bytes(self, token: u32) -> Vec<u8> {
        self.tokenizer.map(|tokenizer| tokenizer.token_bytes(token).to_vec()).unwrap_or_default()
    }

    fn text(self, token: u32) -> String {
        match self.tokenizer {
            Some(_) => String::from_utf8_lossy(&self.bytes(token)).into_owned(),
            None => format!("token_id:{token}"),
        }
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
        chosen: speller.alternative(token.token, token.raw_logprob),
        top_logprobs: top.collect(),
    }
}

impl TextLogprobs {
    /// Appends `token`, whose text begins at `offset` characters; returns where the next one begins.
    pub(crate) fn push(&mut self, token: &Token, offset: usize, speller: Speller<'_>) -> usize {
        let text = speller.text(token.token);
        let chars = text.chars().count();
        let logprob = token.raw_logprob.max(LEAST);
        let top = token.top.iter().map(|(id, logprob)| (speller.text(*id), logprob.max(LEAST)));
        let mut top: Vec<(String, f32)> = top.collect();
        // The sampled token is always among them, even when it is not one of the most likely.
        if token.top.iter().all(|(id, _)| *id != token.token) {
            top.push((text.clone(), logprob));
        }
        self.text_offset.push(offset);
        self.token_logprobs.push(logprob);
        self.tokens.push(text);
        self.top_logprobs.push((!token.top.is_empty()).then_some(Alternatives(top)));
        offset + chars
    }
}
