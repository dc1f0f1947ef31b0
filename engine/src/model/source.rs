//! Uniform access to a model's weights and side files, whatever they are stored in.
//! (signatures only so far; the real file replaces this one)

use crate::error::Result;
use crate::model::config::{GenerationDefaults, ModelConfig};
use crate::model::gguf::Gguf;
use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

/// A model compiled into the program.
#[derive(Clone, Debug)]
pub struct MemoryModel {
    /// Shown in messages, for example `builtin:arith`.
    pub name: &'static str,
    /// Text of `config.json`.
    pub config_json: &'static str,
    /// Text of `tokenizer.json`.
    pub tokenizer_json: &'static str,
    /// Text of the chat template, if there is one.
    pub chat_template: Option<&'static str>,
    /// Bytes of a safetensors file.
    pub weights: Cow<'static, [u8]>,
}

/// An open model: configuration read and checked, every weight present in the right shape.
#[derive(Debug)]
pub struct ModelSource {}

impl ModelSource {
    /// Opens a Hugging Face directory, a `.gguf` file, or a directory that holds one `.gguf` file.
    pub fn open(path: &Path) -> Result<Self> { todo!() }
    /// Opens a model compiled into the program.
    pub fn from_memory(model: MemoryModel) -> Result<Self> { todo!() }
    /// The checked configuration.
    pub fn config(&self) -> &ModelConfig { todo!() }
    /// Sampling settings the checkpoint recommends.
    pub fn generation(&self) -> &GenerationDefaults { todo!() }
    /// Tokens that end a text: those of the generation defaults, else those of the configuration.
    pub fn eos(&self) -> &[u32] { todo!() }
    /// Path or name, for messages.
    pub fn name(&self) -> String { todo!() }
    /// Whether a weight of this Hugging Face name is stored.
    pub fn has(&self, name: &str) -> bool { todo!() }
    /// Shape of a weight: `[rows, cols]` or `[n]`.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> { todo!() }
    /// Reads rows of a weight as f32; `out` holds `rows.len() * cols` numbers. A vector is one row.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> { todo!() }
    /// The Hugging Face directory, if the model is one.
    pub fn hf_dir(&self) -> Option<&Path> { todo!() }
    /// The GGUF file (metadata with the tokenizer), if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> { todo!() }
    /// Text of `tokenizer.json`; `None` for GGUF.
    pub fn tokenizer_json(&self) -> Result<Option<Cow<'_, str>>> { todo!() }
    /// Text of `tokenizer_config.json`, if there is one.
    pub fn tokenizer_config_json(&self) -> Result<Option<String>> { todo!() }
    /// Text of the chat template: `chat_template.jinja`, else the (default) template of
    /// `tokenizer_config.json`, else the one of the GGUF metadata.
    pub fn chat_template(&self) -> Result<Option<String>> { todo!() }
}
