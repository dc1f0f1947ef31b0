//! `tokenizer_config.json`: chat templates and the names of the special tokens.
//!
//! The file is kept whole, so that a checkpoint passes on what this project does not use. Source:
//! the files written by Hugging Face `transformers`.

use serde_json::{Map, Value};

use super::one_line;
use crate::error::{Error, Result};

/// The special tokens a chat template may name.
const TOKEN_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Classes whose flags decide what is put around a text. transformers 4 replaced what `tokenizer.json` says
/// by it, which DeepSeek-R1-Distill-Qwen is made for; transformers 5 reads no flags beside a `tokenizer.json`.
const CLASSES_WITH_ENDS: [&str; 4] =
    ["LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast"];

/// Which tokens are put around a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct EndFlags {
    pub(super) bos: bool,
    pub(super) eos: bool,
}

/// The content of a `tokenizer_config.json`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TokenizerConfig {
    fields: Map<String, Value>,
}

impl TokenizerConfig {
    /// Reads a `tokenizer_config.json`.
    ///
    /// ```
    /// let text = br#"{"eos_token": {"content": "</s>"}, "chat_template": "{{ eos_token }}"}"#;
    /// let config = engine::text::TokenizerConfig::from_json_bytes(text)?;
    /// assert_eq!(config.token("eos_token"), Some("</s>"));
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When it is not a JSON object.
    pub fn from_json_bytes(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes)
            .map(|fields| Self { fields })
            .map_err(|error| Error::model(format!("tokenizer_config.json: {}", one_line(error))))
    }

    /// A configuration of these fields.
    pub fn from_fields(fields: Map<String, Value>) -> Self {
        Self { fields }
    }

    /// The text of a special token by its field name, e.g. `eos_token`.
    pub fn token(&self, name: &str) -> Option<&str> {
        let value = self.fields.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }

    /// Names and texts of the special tokens that are set.
    pub fn special_tokens(&self) -> Map<String, Value> {
        TOKEN_NAMES
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), Value::from(self.token(name)?))))
            .collect()
    }

    /// `add_bos_token`, when it is set.
    pub fn add_bos_token(&self) -> Option<bool> {
        self.flag("add_bos_token")
    }

    /// What is put around a text, whatever `tokenizer.json` says; `None` where that decides: without flags, and
    /// for classes that have none.
    pub(super) fn ends(&self) -> Option<EndFlags> {
        let class = self.fields.get("tokenizer_class")?.as_str()?;
        let (bos, eos) = (self.flag("add_bos_token"), self.flag("add_eos_token"));
        if !CLASSES_WITH_ENDS.contains(&class) || (bos, eos) == (None, None) {
            return None;
        }
        // The defaults of the classes.
        Some(EndFlags { bos: bos.unwrap_or(true), eos: eos.unwrap_or(false) })
    }

    fn flag(&self, name: &str) -> Option<bool> {
        self.fields.get(name)?.as_bool()
    }

    /// The chat template of this name; a single unnamed template is called `default`.
    pub fn chat_template(&self, name: &str) -> Option<&str> {
        match self.fields.get("chat_template")? {
            Value::String(source) => (name == "default").then_some(source.as_str()),
            Value::Array(named) => named
                .iter()
                .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
                .and_then(|entry| entry.get("template")?.as_str()),
            _ => None,
        }
    }

    /// Replaces the chat templates by one (newer models keep it in `chat_template.jinja`).
    pub fn set_chat_template(&mut self, source: impl Into<String>) {
        self.fields.insert("chat_template".to_owned(), Value::String(source.into()));
    }

    /// The file's text.
    pub fn to_json(&self) -> String {
        let fields = Value::Object(self.fields.clone());
        format!("{fields:#}\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_strings_objects_and_named_templates() {
        let text = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false},
            "pad_token": null, "add_bos_token": true, "extra": [1],
            "chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}"#;
        let mut config = TokenizerConfig::from_json_bytes(text.as_bytes()).unwrap();
        assert_eq!(config.token("bos_token"), Some("<s>"));
        assert_eq!(config.token("eos_token"), Some("</s>"));
        assert_eq!(config.token("pad_token"), None);
        assert_eq!(config.add_bos_token(), Some(true));
        assert_eq!(config.special_tokens().len(), 2);
        assert_eq!(config.chat_template("default"), Some("a"));
        assert_eq!(config.chat_template("tool_use"), Some("b"));
        assert_eq!(config.chat_template("rag"), None);
        config.set_chat_template("c");
        assert_eq!(config.chat_template("default"), Some("c"));
        assert_eq!(config.chat_template("tool_use"), None);
        let again = TokenizerConfig::from_json_bytes(config.to_json().as_bytes()).unwrap();
        assert_eq!(again, config);
        assert!(config.to_json().contains("\"extra\""), "unknown fields are passed on");
    }

    #[test]
    fn refuses_what_is_no_object() {
        let error = TokenizerConfig::from_json_bytes(b"[1]").unwrap_err().to_string();
        assert!(error.starts_with("tokenizer_config.json: invalid type"), "{error}");
    }
}
