//! Finds a model's tokenizer, chat template and end tokens in whatever its files are.

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
    // Wherever it came from, a saved tokenizer carries it in its configuration. What came from there
    // stays as it is, for it may be one template of several.
    let mut config = tokenizer.config().clone();
    if config.chat_template("default") != Some(text.as_str()) {
        config.set_chat_template(text);
    }
    let template = ChatTemplate::from_config(&config)?;
    Ok((Some(tokenizer.with_config(config)?), Some(template)))
}

/// Tokens that end a text: what the model's files say, and after it what its tokenizer says, as far as the
/// model has such tokens. The first is what a text is ended with.
pub fn end_tokens(source: &ModelSource, tokenizer: Option<&Tokenizer>) -> Vec<u32> {
    let mut ends = source.eos().to_vec();
    for id in tokenizer.map_or(&[][..], Tokenizer::eos_ids) {
        if (*id as usize) < source.config().vocab_size && !ends.contains(id) {
            ends.push(*id);
        }
    }
    ends
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

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use serde_json::json;

    use super::*;
    use crate::text::{Message, RenderOptions};

    #[test]
    fn the_tokenizers_end_comes_after_the_models() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
        let source = ModelSource::open(&root.join("golden/models/tiny-llama")).unwrap();
        assert_eq!((source.eos(), source.config().vocab_size), (&[2][..], 512));
        let ends = |vocab: &str, eos: &str| {
            let json = format!(
                r#"{{"version":"1.0","decoder":null,"model":{{"type":"WordLevel","vocab":{vocab},"unk_token":"a"}}}}"#
            );
            let config = json!({"eos_token": eos}).to_string();
            let config = TokenizerConfig::from_json_bytes(config.as_bytes()).unwrap();
            let tokenizer = Tokenizer::from_json_bytes(json.as_bytes()).unwrap();
            end_tokens(&source, Some(&tokenizer.with_config(config).unwrap()))
        };
        assert_eq!(ends(r#"{"a":0,"b":7}"#, "b"), [2, 7]);
        assert_eq!(ends(r#"{"a":0,"b":2}"#, "b"), [2]);
        assert_eq!(ends(r#"{"a":0,"b":512}"#, "b"), [2], "the model has no such token");
        assert_eq!(end_tokens(&source, None), [2]);
    }

    #[test]
    fn tools_get_their_own_template_unless_a_file_replaces_all() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
        let folder = std::env::temp_dir().join(format!("engine-load-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["config.json", "model.safetensors"] {
            let from = root.join("golden/models/tiny-llama").join(name);
            std::fs::write(folder.join(name), std::fs::read(from).unwrap()).unwrap();
        }
        let json = std::fs::read(root.join("tiny-text/tokenizer.json")).unwrap();
        std::fs::write(folder.join("tokenizer.json"), json).unwrap();
        let config = json!({"chat_template": [{"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "tools"}]});
        std::fs::write(folder.join("tokenizer_config.json"), config.to_string()).unwrap();
        let tools = json!([]);
        let said = || {
            let (_, template) = load_text(&ModelSource::open(&folder).unwrap()).unwrap();
            let template = template.unwrap();
            let plain = RenderOptions::new(SystemTime::UNIX_EPOCH);
            let with_tools = RenderOptions { tools: Some(&tools), ..plain.clone() };
            let messages = [Message::new("user", "hi")];
            [plain, with_tools].map(|options| template.render(&messages, &options).unwrap())
        };
        assert_eq!(said(), ["plain", "tools"]);
        std::fs::write(folder.join("chat_template.jinja"), "file").unwrap();
        assert_eq!(said(), ["file", "file"]);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
