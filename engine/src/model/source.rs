//! Uniform access to a model's weights and side files, whatever they are stored in.
//!
//! Weights are asked for by their Hugging Face names and come back as f32 rows, dequantised and in
//! Hugging Face's row order. Opening checks that every weight the configuration asks for is present in
//! the right shape. Leaves out rounding to the compute dtype, which the caller does, and parsing the
//! tokenizer. Reading takes `&self` and keeps no cursor, so threads may read different rows at once.

use crate::error::{Error, Result};
use crate::model::config::{GenerationDefaults, ModelConfig, TensorSpec};
use crate::model::dequant::{self, Unpacked};
use crate::model::gguf::Gguf;
use crate::model::hub::is_later_part;
use crate::model::rope::RopeConfig;
use crate::model::safetensors::SafeTensors;
use crate::model::{config_gguf, config_hf};
use kernels::{QuantFormat, QuantRow};
use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Largest side file (configuration, tokenizer, template) that is read, in bytes.
const MAX_TEXT_BYTES: u64 = 256 << 20;

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
pub struct ModelSource {
    config: ModelConfig,
    generation: GenerationDefaults,
    weights: Weights,
    origin: Origin,
}

#[derive(Debug)]
enum Weights {
    SafeTensors(SafeTensors),
    Gguf(Gguf),
}

#[derive(Debug)]
enum Origin {
    Directory(PathBuf),
    File(PathBuf),
    Memory { name: &'static str, tokenizer: &'static str, template: Option<&'static str> },
}

impl ModelSource {
    /// Opens a Hugging Face directory, a `.gguf` file, or a directory that holds one `.gguf` file.
    ///
    /// # Errors
    /// When a file is missing, malformed or truncated, the architecture is unknown, or a weight is absent
    /// or of the wrong shape.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            return Err(Error::model("no such file or directory").in_file(path));
        }
        if !path.is_dir() {
            return Self::open_gguf(path);
        }
        if path.join("config.json").exists() {
            return Self::open_directory(path);
        }
        let message = match gguf_files(path)?.as_slice() {
            [one] => return Self::open_gguf(one),
            [] => "directory holds neither config.json nor a gguf file".to_owned(),
            many => format!("directory holds {} gguf files: name one", many.len()),
        };
        Err(Error::model(message).in_file(path))
    }

    fn open_directory(path: &Path) -> Result<Self> {
        let config_path = path.join("config.json");
        let text = read_text(&config_path, MAX_TEXT_BYTES)?;
        let config = ModelConfig::from_hf_json(&text).map_err(|e| e.in_file(&config_path))?;
        let generation_path = path.join("generation_config.json");
        let generation = match read_optional(&generation_path)? {
            None => GenerationDefaults::default(),
            Some(text) => config_hf::parse_generation(&text)
                .and_then(|read| config.validate_ids(read.eos.iter()).map(|()| read))
                .map_err(|e| e.in_file(&generation_path))?,
        };
        let single = path.join("model.safetensors");
        let index = path.join("model.safetensors.index.json");
        let weights = match (single.exists(), index.exists()) {
            (true, _) => SafeTensors::open(&single)?,
            (false, true) => SafeTensors::open_index(&index)?,
            (false, false) => {
                let message = "holds neither model.safetensors nor model.safetensors.index.json";
                return Err(Error::model(message).in_file(path));
            }
        };
        let origin = Origin::Directory(path.to_owned());
        Self { config, generation, weights: Weights::SafeTensors(weights), origin }.checked()
    }

    fn open_gguf(path: &Path) -> Result<Self> {
        Self::from_gguf(Gguf::open(path)?)
    }

    fn from_gguf(file: Gguf) -> Result<Self> {
        let config = config_gguf::parse(&file).map_err(|e| e.in_file(file.path()))?;
        let generation = config_gguf::generation(&config);
        let origin = Origin::File(file.path().to_owned());
        Self { config, generation, weights: Weights::Gguf(file), origin }.checked()
    }

    /// Opens a model compiled into the program.
    ///
    /// # Errors
    /// As [`ModelSource::open`].
    pub fn from_memory(model: MemoryModel) -> Result<Self> {
        let name = Path::new(model.name);
        let config = ModelConfig::from_hf_json(model.config_json).map_err(|e| e.in_file(name))?;
        let weights = Weights::SafeTensors(SafeTensors::from_memory(model.name, model.weights)?);
        let origin = Origin::Memory {
            name: model.name,
            tokenizer: model.tokenizer_json,
            template: model.chat_template,
        };
        Self { config, generation: GenerationDefaults::default(), weights, origin }.checked()
    }

    /// Settles whether the head is tied, then checks every weight's presence and shape.
    fn checked(mut self) -> Result<Self> {
        let said = self.config.original.get("tie_word_embeddings").and_then(|v| v.as_bool());
        if said.is_none() && !self.has("lm_head.weight") {
            self.config.tied_embeddings = true;
        }
        let path = PathBuf::from(self.name());
        self.config
            .tensors()
            .iter()
            .try_for_each(|t| self.check(t))
            .map_err(|e| e.in_file(&path))?;
        Ok(self)
    }

    fn check(&self, wanted: &TensorSpec) -> Result<()> {
        let found = self.stored_shape(&wanted.name);
        if found == Some(&wanted.shape) {
            return Ok(());
        }
        let (name, shape) = (&wanted.name, &wanted.shape);
        Err(Error::model(match found {
            None => format!("tensor {name:?} is missing, expected shape {shape:?}"),
            Some(found) => format!("tensor {name:?} has shape {found:?}, expected {shape:?}"),
        }))
    }

    /// The same model with another rotary embedding, for example to stretch its context.
    ///
    /// # Errors
    /// When the configuration is not valid with it.
    pub fn with_rope(mut self, rope: RopeConfig) -> Result<Self> {
        self.config.rope = rope;
        self.config.validate()?;
        Ok(self)
    }

    /// The checked configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Sampling settings the checkpoint recommends.
    pub fn generation(&self) -> &GenerationDefaults {
        &self.generation
    }

    /// Tokens that end a text: those of the generation defaults, else those of the configuration. The
    /// tokenizer may know another one, see [`crate::end_tokens`].
    pub fn eos(&self) -> &[u32] {
        if self.generation.eos.is_empty() { &self.config.eos } else { &self.generation.eos }
    }

    /// Path or name, for messages.
    pub fn name(&self) -> String {
        match &self.origin {
            Origin::Directory(path) | Origin::File(path) => path.display().to_string(),
            Origin::Memory { name, .. } => (*name).to_owned(),
        }
    }

    /// Whether a weight of this Hugging Face name is stored.
    pub fn has(&self, name: &str) -> bool {
        self.stored_shape(name).is_some()
    }

    /// Shape of a weight: `[rows, cols]` or `[n]`.
    ///
    /// # Errors
    /// When there is no such weight.
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        self.stored_shape(name).map(<[usize]>::to_vec).ok_or_else(|| self.missing(name))
    }

    fn stored_shape(&self, name: &str) -> Option<&[usize]> {
        match &self.weights {
            Weights::SafeTensors(file) => file.shape(name),
            Weights::Gguf(file) => file.shape(&config_gguf::gguf_name(name)?),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::model(format!("tensor {name:?} is missing")).in_file(Path::new(&self.name()))
    }

    /// Reads rows of a weight as f32; `out` holds `rows.len() * cols` numbers. A vector is one row.
    ///
    /// Uses a constant amount of memory besides `out`.
    ///
    /// # Errors
    /// When there is no such weight or row, or the file cannot be read.
    ///
    /// # Panics
    /// When `out` does not hold `rows.len()` rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let file = match &self.weights {
            Weights::SafeTensors(file) => return file.read_rows(name, rows, out),
            Weights::Gguf(file) => file,
        };
        let stored = config_gguf::gguf_name(name).ok_or_else(|| self.missing(name))?;
        if !config_gguf::is_interleaved(self.config.architecture, name) {
            return file.read_rows(&stored, rows, out);
        }
        let cols = self.config.hidden_size;
        assert_eq!(out.len(), rows.len() * cols, "output does not match the rows asked for");
        for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
            let row = config_gguf::gguf_row(row, self.config.head_dim);
            file.read_rows(&stored, row..row + 1, out)?;
        }
        Ok(())
    }

    /// What the integers of a quantised weight mean; `None` when it is stored in full.
    pub(crate) fn quant_format(&self, name: &str) -> Option<QuantFormat> {
        self.gguf()?.format(&config_gguf::gguf_name(name)?)?.quant_format()
    }

    /// Calls `each` with every row of a quantised weight, in Hugging Face's order.
    ///
    /// # Errors
    /// When there is no such weight, it is stored in full, or the file cannot be read.
    pub(crate) fn quantised_rows(
        &self,
        name: &str,
        each: &mut dyn FnMut(usize, QuantRow<'_>),
    ) -> Result<()> {
        let stored = config_gguf::gguf_name(name).ok_or_else(|| self.missing(name))?;
        let file = self.gguf().ok_or_else(|| self.missing(name))?;
        let format = file.format(&stored).ok_or_else(|| self.missing(name))?;
        let (Some(quant), &[rows, cols]) = (format.quant_format(), &self.shape(name)?[..]) else {
            let message = format!("tensor {name:?} is not a quantised matrix");
            return Err(Error::model(message).in_file(file.path()));
        };
        let interleaved = config_gguf::is_interleaved(self.config.architecture, name);
        let bytes = format.bytes(cols as u64).expect("checked when the file was opened");
        let mut bytes = vec![0; bytes as usize];
        let groups = cols / format.group_elements();
        let (mut q, mut scales, mut minima) = (vec![0; cols], vec![0.0; groups], vec![0.0; groups]);
        for row in 0..rows {
            let at =
                if interleaved { config_gguf::gguf_row(row, self.config.head_dim) } else { row };
            file.row_bytes(&stored, at, &mut bytes)?;
            let to = Unpacked { q: &mut q, scales: &mut scales, minima: &mut minima };
            dequant::unpack(format, &bytes, to);
            let minima = if quant.minimum() { &minima[..] } else { &[] };
            each(row, QuantRow { format: quant, q: &q, scales: &scales, minima });
        }
        Ok(())
    }

    /// The Hugging Face directory, if the model is one.
    pub fn hf_dir(&self) -> Option<&Path> {
        match &self.origin {
            Origin::Directory(path) => Some(path),
            _ => None,
        }
    }

    /// The GGUF file (metadata with the tokenizer), if the model is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.weights {
            Weights::Gguf(file) => Some(file),
            Weights::SafeTensors(_) => None,
        }
    }

    /// Text of `tokenizer.json`; `None` for GGUF, or when the directory has none.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn tokenizer_json(&self) -> Result<Option<Cow<'_, str>>> {
        match &self.origin {
            Origin::Directory(path) => {
                Ok(read_optional(&path.join("tokenizer.json"))?.map(Cow::Owned))
            }
            Origin::File(_) => Ok(None),
            Origin::Memory { tokenizer, .. } => Ok(Some(Cow::Borrowed(tokenizer))),
        }
    }

    /// Text of `tokenizer_config.json`, if there is one.
    ///
    /// # Errors
    /// When the file is there but cannot be read.
    pub fn tokenizer_config_json(&self) -> Result<Option<String>> {
        self.hf_dir().map_or(Ok(None), |path| read_optional(&path.join("tokenizer_config.json")))
    }

    /// Text of the chat template: `chat_template.jinja`, else the (default) template of
    /// `tokenizer_config.json`, else the one of the GGUF metadata.
    ///
    /// # Errors
    /// When a file is there but cannot be read.
    pub fn chat_template(&self) -> Result<Option<String>> {
        match &self.origin {
            Origin::Memory { template, .. } => Ok(template.map(str::to_owned)),
            Origin::File(_) => {
                let key = "tokenizer.chat_template";
                Ok(self.gguf().and_then(|file| file.string(key)).map(str::to_owned))
            }
            Origin::Directory(path) => {
                if let Some(text) = read_optional(&path.join("chat_template.jinja"))? {
                    return Ok(Some(text));
                }
                let Some(text) = self.tokenizer_config_json()? else { return Ok(None) };
                template_of(&text).map_err(|e| e.in_file(&path.join("tokenizer_config.json")))
            }
        }
    }
}

/// `chat_template` is a string, or a list of `{name, template}` of which `default` is meant.
fn template_of(tokenizer_config: &str) -> Result<Option<String>> {
    let config: serde_json::Value =
        serde_json::from_str(tokenizer_config).map_err(|e| Error::model(e.to_string()))?;
    let text = |v: &serde_json::Value| v.as_str().map(str::to_owned);
    match config.get("chat_template") {
        Some(serde_json::Value::Array(list)) => {
            let default = list.iter().find(|t| t["name"] == "default");
            Ok(default.and_then(|t| text(&t["template"])))
        }
        other => Ok(other.and_then(text)),
    }
}

/// The `.gguf` files of a directory that a model can be opened from (first parts of split ones), sorted.
pub(super) fn gguf_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(directory, e);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.ends_with(".gguf") && !is_later_part(&name) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn read_optional(path: &Path) -> Result<Option<String>> {
    if path.exists() { read_text(path, MAX_TEXT_BYTES).map(Some) } else { Ok(None) }
}

/// Reads a UTF-8 file of at most `limit` bytes.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
    if !meta.is_file() || meta.len() > limit {
        let message = format!("is not a file of at most {limit} bytes");
        return Err(Error::model(message).in_file(path));
    }
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    String::from_utf8(bytes).map_err(|_| Error::model("is not utf-8 text").in_file(path))
}

#[cfg(test)]
pub(super) mod tests;
