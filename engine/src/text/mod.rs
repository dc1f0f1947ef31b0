//! Everything between text and token ids: tokenizers, chat templates, incremental decoding, stop
//! strings.
//!
//! Nothing below this module sees text. A tokenizer comes from a `tokenizer.json`
//! ([`Tokenizer::from_json_bytes`]) or from GGUF metadata ([`GgufVocab`]); a chat template from
//! either through [`TokenizerConfig`]. What is left out: training tokenizers, SentencePiece
//! vocabularies in GGUF files, and Python's `clean_up_tokenization_spaces`.

mod chat;
mod controls;
mod detokenizer;
mod gguf_tokenizer;
mod methods;
mod python;
mod stop;
#[cfg(test)]
mod tests;
mod tokenizer;
mod tokenizer_config;

pub use chat::{
    ChatTemplate, GenerationPrompt, MAX_RENDERED_BYTES, MAX_TEMPLATE_BYTES, Message, RenderOptions,
};
pub use controls::{Controls, Spoken};
pub use detokenizer::Detokenizer;
pub use gguf_tokenizer::{GgufVocab, PRE_TOKENIZERS};
pub use stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS, StopMatcher, StopScan};
pub(crate) use stop::{StopPatterns, check_stop_strings};
pub use tokenizer::{AddSpecial, MAX_TOKEN_ID, SkipSpecial, Tokenizer};
pub use tokenizer_config::TokenizerConfig;

/// Folds a message of another library into one line.
fn one_line(message: impl std::fmt::Display) -> String {
    message.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}
