//! Finds a model's tokenizer and chat template in whatever its files are.

use crate::error::Result;
use crate::model::ModelSource;
use crate::text::{ChatTemplate, GgufVocab, Tokenizer, TokenizerConfig};

/// Tokenizer and chat template of `source`; `None` for what it does not have.
///
/// # Errors
/// `ErrorKind::Model` when one is there but cannot be used.
pub fn load_text(source: &ModelSource) -> Result<(Option<Tokenizer>, Option<ChatTemplate>)> {
    let Some(tokenizer) = load_tokenizer(source)? else { return Ok((None, None)) };
    let Some(text) = source.chat_template()? else { return Ok((Some(tokenizer), None)) };
    // Wherever it came from, a saved tokenizer carries it in its configuration.
    let mut config = tokenizer.config().clone();
    config.set_chat_template(text);
    let template = ChatTemplate::from_config(&config)?;
    Ok((Some(tokenizer.with_config(config)?), Some(template)))
}

fn load_tokenizer(source: &ModelSource) -> Result<Option<Tokenizer>> {
    if let Some(gguf) = source.gguf() {
        return Ok(Some(Tokenizer::from_gguf(GgufVocab::read(gguf)?)?));
    }
    let Some(json) = source.tokenizer_json()? else { return Ok(None) };
    let tokenizer = Tokenizer::from_json_bytes(json.as_bytes())?;
    Ok(Some(match source.tokenizer_config_json()? {
        Some(config) => {
            tokenizer.with_config(TokenizerConfig::from_json_bytes(config.as_bytes())?)?
        }
        None => tokenizer,
    }))
}
