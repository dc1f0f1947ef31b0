//! From a row's prompt to token ids, by the configured template.
//!
//! The ids made here are the ones sampled from and trained on; text is never encoded again.

use std::time::UNIX_EPOCH;

use engine::text::{AddSpecial, GenerationPrompt, RenderOptions};
use engine::{ChatTemplate, Tokenizer};
use std::sync::Arc;

use crate::config::PromptTemplate;
use crate::data::{Message, Prompt};
use crate::error::{Error, Result};
use crate::source::{Rows, none_left};

/// The text that R1-Zero puts around a question (arXiv 2501.12948, table 1), as TinyZero spells it.
const R1_ZERO: [&str; 2] = [
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. \
     The assistant first thinks about the reasoning process in the mind and then provides the user \
     with the answer. The reasoning process and answer are enclosed within <think> </think> and \
     <answer> </answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> \
     answer here </answer>. User: ",
    ".\nAssistant: Let me solve this step by step.\n<think>",
];

/// Turns prompts into tokens of one model.
pub struct PromptEncoder {
    tokenizer: Arc<Tokenizer>,
    template: PromptTemplate,
    chat: Option<Arc<ChatTemplate>>,
    max_tokens: usize,
    /// What the context leaves before the response, in tokens.
    room: Option<usize>,
}

/// What becomes of a row whose prompt is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// It is an error.
    Refuse,
    /// It is dropped and counted.
    Drop,
}

impl PromptEncoder {
    /// An encoder for prompts of at most `max_tokens` tokens, with what the model has of the two.
    ///
    /// # Errors
    /// When the model has no tokenizer, or no chat template although one is asked for.
    pub fn new(
        (tokenizer, chat): (Option<&Arc<Tokenizer>>, Option<&Arc<ChatTemplate>>),
        template: PromptTemplate,
        max_tokens: usize,
    ) -> Result<Self> {
        let tokenizer = tokenizer.cloned().ok_or_else(|| {
            Error::engine(engine::Error::model("the model has no tokenizer, training needs one"))
        })?;
        let chat = chat.cloned();
        if template == PromptTemplate::Chat && chat.is_none() {
            return Err(Error::config(
                "data.prompt_template is chat, and the model has no chat template; choose raw or r1_zero",
            ));
        }
        Ok(Self { tokenizer, template, chat, max_tokens, room: None })
    }

    /// The same for a model whose context leaves `room` tokens before the response.
    pub fn within(self, room: usize) -> Self {
        Self { room: Some(room), ..self }
    }

    /// The tokens of a prompt.
    ///
    /// # Errors
    /// When the template fails, or there are more tokens than allowed.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let tokens = self.tokens(prompt)?;
        match self.fault(tokens.len()) {
            None => Ok(tokens),
            Some(message) => Err(Error::config(message)),
        }
    }

    /// Drops the rows whose prompts are too long, or fails at the first one.
    ///
    /// # Errors
    /// `ErrorKind::Data`, naming the row, its tokens and the limit, for a prompt that is empty or, under
    /// [`Overlong::Refuse`], too long, or when no row is left.
    pub fn fit(&self, rows: &mut Rows, overlong: Overlong) -> Result<()> {
        let mut long = Vec::with_capacity(rows.rows.len());
        for (index, row) in rows.rows.iter().enumerate() {
            let len = self.tokens(&row.prompt)?.len();
            long.push(match self.fault(len) {
                None => false,
                Some(_) if len > 0 && overlong == Overlong::Drop => true,
                Some(message) => {
                    let message = format!("row {}: {message}", index + 1);
                    return Err(Error::data(&rows.name, None, message));
                }
            });
        }
        if long.contains(&true) {
            rows.drop_overlong(&long);
        }
        match rows.rows.is_empty() && !long.is_empty() {
            true => Err(none_left(&rows.name, &rows.report)),
            false => Ok(()),
        }
    }

    /// What is wrong with a prompt of `len` tokens.
    fn fault(&self, len: usize) -> Option<String> {
        let limit = self.max_tokens;
        if len == 0 || len > limit {
            return Some(format!("prompt has {len} tokens, data.max_prompt_length is {limit}"));
        }
        let room = self.room.filter(|room| len > *room)?;
        Some(format!("prompt has {len} tokens, the context leaves {room} before the response"))
    }

    /// The tokens of a prompt, however many.
    pub(crate) fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let text = match (self.template, prompt) {
            // A chat template writes its own special tokens.
            (PromptTemplate::Chat, prompt) => return self.chat_tokens(prompt),
            (PromptTemplate::Raw, Prompt::Text(text)) => text.clone(),
            (PromptTemplate::Raw, Prompt::Messages(messages)) => {
                messages.iter().map(|m| m.content.as_str()).collect::<Vec<_>>().join("\n")
            }
            (PromptTemplate::R1Zero, prompt) => {
                let question = match prompt {
                    Prompt::Text(text) => text,
                    Prompt::Messages(messages) => messages.last().map_or("", |m| &m.content),
                };
                format!("{}{question}{}", R1_ZERO[0], R1_ZERO[1])
            }
        };
        self.tokenizer.encode(&text, AddSpecial::Yes).map_err(Error::engine)
    }

    /// The tokens of a completion, without end of text.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on it.
    pub fn encode_completion(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, AddSpecial::No).map_err(Error::engine)
    }

    fn chat_tokens(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        let chat = self.chat.as_ref().expect("checked when the encoder was made");
        let messages = match prompt {
            Prompt::Text(text) => vec![engine::Message::new("user", text)],
            Prompt::Messages(messages) => messages
                .iter()
                .map(|m: &Message| engine::Message::new(&m.role, &m.content))
                .collect(),
        };
        // A prompt must not depend on the day it is made.
        let mut options = RenderOptions::new(UNIX_EPOCH);
        options.generation_prompt = GenerationPrompt::Add;
        chat.encode(&messages, &options, &self.tokenizer).map_err(Error::engine)
    }
}

#[cfg(test)]
mod tests {
    use engine::text::TokenizerConfig;

    use super::*;

    #[test]
    fn a_chat_that_spells_a_control_token_is_text() {
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/tiny-text/");
        let read = |name: &str| std::fs::read_to_string(format!("{data}{name}")).unwrap();
        let config =
            TokenizerConfig::from_json_bytes(read("tokenizer_config.json").as_bytes()).unwrap();
        let tokenizer = Tokenizer::from_json_bytes(read("tokenizer.json").as_bytes()).unwrap();
        let tokenizer = Arc::new(tokenizer.with_config(config).unwrap());
        let chat = ChatTemplate::new(&read("chat_template.jinja"), Default::default());
        let chat = Arc::new(chat.unwrap());
        let tokens = |template, prompt: &Prompt| {
            let encoder = PromptEncoder::new((Some(&tokenizer), Some(&chat)), template, 99);
            encoder.unwrap().encode(prompt).unwrap()
        };
        let bytes = |text: &str| text.bytes().map(|byte| u32::from(byte) + 3).collect::<Vec<u32>>();
        let (role, content) = ("user".to_owned(), "a</s>".to_owned());
        let text = Prompt::Text(content.clone());
        for prompt in [&text, &Prompt::Messages(vec![Message { role, content }])] {
            assert_eq!(tokens(PromptTemplate::Chat, prompt), bytes("[user] a</s>\n[assistant] "));
        }
        assert_eq!(tokens(PromptTemplate::Raw, &text).last(), Some(&2));
    }
}
