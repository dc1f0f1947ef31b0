//! Finds a model's tokenizer and chat template in whatever its files are.

use crate::error::{Error, Result};
use crate::model::{ModelSource, gguf::Gguf};
use crate::text::{ChatTemplate, GgufVocab, Tokenizer, TokenizerConfig};

/// Tokenizer and chat template of `source`; `None` for what it does not have.
///
/// # Errors
/// `ErrorKind::Model` when one is there but cannot be used.
pub(crate) fn load_text(source: &ModelSource) -> Result<(Option<Tokenizer>, Option<ChatTemplate>)> {
    let Some(tokenizer) = load_tokenizer(source)? else { return Ok((None, None)) };
    let template = match source.chat_template()? {
        Some(text) => Some(ChatTemplate::new(&text, tokenizer.config().special_tokens())?),
        None => None,
    };
    Ok((Some(tokenizer), template))
}

fn load_tokenizer(source: &ModelSource) -> Result<Option<Tokenizer>> {
    if let Some(gguf) = source.gguf() {
        return Ok(Some(Tokenizer::from_gguf(gguf_vocab(gguf)?)?));
    }
    let Some(json) = source.tokenizer_json()? else { return Ok(None) };
    let tokenizer = Tokenizer::from_json_bytes(json.as_bytes())?;
    Ok(Some(match source.tokenizer_config_json()? {
        Some(config) => tokenizer.with_config(TokenizerConfig::from_json_bytes(config.as_bytes())?)?,
        None => tokenizer,
    }))
}

/// The `tokenizer.ggml.*` metadata, as the GGUF specification names it.
fn gguf_vocab(gguf: &Gguf) -> Result<GgufVocab> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let list = |name: &str| gguf.strings(&key(name)).map(<[String]>::to_vec);
    let id = |name: &str| {
        gguf.unsigned(&key(&format!("{name}_token_id"))).and_then(|id| u32::try_from(id).ok())
    };
    let missing = |name: &str| {
        Error::model(format!("metadata has no {}", key(name))).in_file(gguf.path())
    };
    Ok(GgufVocab {
        model: gguf.string(&key("model")).ok_or_else(|| missing("model"))?.to_owned(),
        pre: gguf.string(&key("pre")).map(str::to_owned),
        tokens: list("tokens").ok_or_else(|| missing("tokens"))?,
        merges: list("merges").unwrap_or_default(),
        token_types: gguf
            .integers(&key("token_type"))
            .unwrap_or_default()
            .iter()
            .map(|kind| i32::try_from(*kind).unwrap_or(0))
            .collect(),
        bos: id("bos"),
        eos: id("eos"),
        eot: id("eot"),
        unk: id("unknown"),
        pad: id("padding"),
        add_bos: gguf.boolean(&key("add_bos_token")),
        add_eos: gguf.boolean(&key("add_eos_token")),
        chat_template: gguf.string("tokenizer.chat_template").map(str::to_owned),
    })
}
