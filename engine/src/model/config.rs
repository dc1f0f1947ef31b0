//! What a decoder needs to know about a model, whatever file it came from.
//!
//! One shape for four families: RMS norm, rotary half-split attention with grouped key/value heads, SwiGLU.
//! Families differ in biases (Qwen2), norms of query and key heads (Qwen3) and tied embeddings. Reading
//! Hugging Face `config.json` and GGUF metadata is next door; this file holds the result and its checks.

use crate::error::{Error, Result};
use crate::model::params::{ParamSpec, param_specs};
use crate::model::rope::{RopeConfig, RopeScaling};
use kernels::Dtype;
use serde_json::{Map, Value};

/// The families of models that are implemented.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2 and everything stored in their form.
    Llama,
    /// Mistral 7B and its descendants without experts.
    Mistral,
    /// Qwen2 and Qwen2.5: biases on query, key and value.
    Qwen2,
    /// Qwen3: RMS norm over each query and key head.
    Qwen3,
}

/// A validated model configuration. All counts are positive and bounded, see [`ModelConfig::validate`].
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub architecture: Architecture,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Numbers per head; not always `hidden_size / heads`.
    pub head_dim: usize,
    /// Added to the mean square inside every RMS norm.
    pub rms_eps: f32,
    /// Rotary embedding.
    pub rope: RopeConfig,
    /// Longest sequence the checkpoint says it was made for, in tokens.
    pub max_position_embeddings: usize,
    /// Width of sliding-window attention where the model uses it; see [`ModelConfig::max_context`].
    pub sliding_window: Option<usize>,
    /// The head is the embedding matrix.
    pub tied_embeddings: bool,
    /// Query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Query and key heads are normalised before rotation.
    pub qk_norm: bool,
    /// Token put before a text, if any.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// Padding token, if any.
    pub pad: Option<u32>,
    /// The `config.json` this came from, kept so that checkpoints lose no key; empty for GGUF.
    pub original: Map<String, Value>,
}

/// Sampling settings a checkpoint recommends (`generation_config.json`); `None` where it is silent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end a text; empty when not given.
    pub eos: Vec<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus mass.
    pub top_p: Option<f32>,
    /// Number of candidates kept.
    pub top_k: Option<u32>,
    /// Smallest probability kept, relative to the largest.
    pub min_p: Option<f32>,
    /// Divisor of the logits of tokens seen before.
    pub repetition_penalty: Option<f32>,
    /// Longest answer, in tokens.
    pub max_new_tokens: Option<usize>,
}

/// Name and shape of a weight, in Hugging Face's naming.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[rows, cols]` of a matrix, `[n]` of a vector.
    pub shape: Vec<usize>,
}

impl Architecture {
    /// All of them, in the order error messages list them.
    pub const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// Hugging Face's `model_type`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// Hugging Face's class name, as in `architectures`.
    pub const fn class_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    pub(crate) fn from_model_type(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|a| a.model_type() == name).ok_or_else(|| unknown(name))
    }

    pub(crate) fn from_class_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|a| a.class_name() == name).ok_or_else(|| unknown(name))
    }
}

fn unknown(name: &str) -> Error {
    let known = Architecture::ALL.map(Architecture::model_type).join(", ");
    Error::model(format!("unknown architecture {name:?}, supported are {known}"))
}

impl ModelConfig {
    /// Reads a Hugging Face `config.json`, in the spelling of transformers 4 or 5.
    ///
    /// ```
    /// # use engine::model::ModelConfig;
    /// let config = ModelConfig::from_hf_json(r#"{"model_type": "llama", "vocab_size": 32,
    ///     "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    ///     "num_attention_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128}"#)?;
    /// assert_eq!((config.head_dim, config.kv_heads), (16, 4));
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When it is not JSON, a needed key is missing or out of range, or it asks for what is not
    /// implemented.
    pub fn from_hf_json(text: &str) -> Result<Self> {
        super::config_hf::parse(text)
    }

    /// The `config.json` of a checkpoint with weights in `dtype`, for transformers 4 and 5 alike.
    ///
    /// # Errors
    /// When the rotary scaling came as a list of divisors that no Hugging Face setting expresses.
    pub fn to_hf_json(&self, dtype: Dtype) -> Result<String> {
        super::config_hf::write(self, dtype)
    }

    /// Longest sequence that is computed as the checkpoint means it, in tokens.
    ///
    /// Sliding windows are not implemented; up to the width of the window they change nothing.
    pub fn max_context(&self) -> usize {
        self.sliding_window
            .map_or(self.max_position_embeddings, |window| window.min(self.max_position_embeddings))
    }

    /// Rotation per position of each of the `head_dim / 2` pairs, see [`RopeConfig::inv_freq`].
    pub fn inv_freq(&self) -> Vec<f32> {
        self.rope.inv_freq(self.head_dim)
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Every weight of the model: the embedding, the layers in order, the final norm, the head if it is
    /// not tied.
    pub fn tensors(&self) -> Vec<TensorSpec> {
        param_specs(self).iter().flat_map(ParamSpec::specs).collect()
    }

    /// Number of weights; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.tensors().iter().map(TensorSpec::elements).sum()
    }

    /// Bytes of the weights with matrices in `dtype` and vectors (norms, biases) in f32.
    pub fn weights_bytes(&self, dtype: Dtype) -> u64 {
        let size = |t: &TensorSpec| if t.shape.len() == 1 { 4 } else { dtype.size_bytes() as u64 };
        self.tensors().iter().map(|t| t.elements() * size(t)).sum()
    }

    /// Checks every number against the limits of the implementation.
    ///
    /// # Errors
    /// Names the first value that is out of range, with its limits.
    pub fn validate(&self) -> Result<()> {
        within("vocab_size", self.vocab_size, 1..=1 << 22)?;
        within("hidden_size", self.hidden_size, 1..=1 << 16)?;
        within("intermediate_size", self.intermediate_size, 1..=1 << 20)?;
        within("num_hidden_layers", self.layers, 1..=1024)?;
        within("num_attention_heads", self.heads, 1..=1024)?;
        within("num_key_value_heads", self.kv_heads, 1..=self.heads)?;
        within("head_dim", self.head_dim, 16..=256)?;
        within("max_position_embeddings", self.max_position_embeddings, 1..=1 << 28)?;
        if let Some(window) = self.sliding_window {
            within("sliding_window", window, 1..=1 << 28)?;
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            let message = format!("{heads} attention heads do not divide over {kv_heads} kv heads");
            return Err(Error::model(message));
        }
        if !self.head_dim.is_multiple_of(16) {
            return Err(Error::model(format!(
                "head_dim {} is not a multiple of 16",
                self.head_dim
            )));
        }
        if !(self.rms_eps >= 0.0 && self.rms_eps < 1.0) {
            return Err(Error::model(format!("rms_norm_eps {} is not in 0..1", self.rms_eps)));
        }
        self.validate_rope()?;
        // Padding is never fed to the model, so a padding id may be anything.
        self.validate_ids(self.bos.iter().chain(&self.eos))
    }

    fn validate_rope(&self) -> Result<()> {
        sane("rope_theta", self.rope.theta)?;
        match &self.rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => sane("rope factor", *factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position,
            } => {
                sane("rope factor", *factor)?;
                sane("low_freq_factor", *low)?;
                sane("high_freq_factor", *high)?;
                if high <= low {
                    let message =
                        format!("high_freq_factor {high} is not above low_freq_factor {low}");
                    return Err(Error::model(message));
                }
                within("original_max_position_embeddings", *original_max_position, 1..=1 << 28)
            }
            RopeScaling::Factors(factors) => {
                if factors.len() != self.head_dim / 2 {
                    let (n, want) = (factors.len(), self.head_dim / 2);
                    return Err(Error::model(format!("{n} rope factors, expected {want}")));
                }
                factors.iter().try_for_each(|f| sane("rope factor", f64::from(*f)))
            }
        }
    }

    /// Checks that special tokens are tokens of the model.
    pub(super) fn validate_ids<'a>(&self, mut ids: impl Iterator<Item = &'a u32>) -> Result<()> {
        match ids.find(|id| **id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(Error::model(format!(
                "special token id {id} is outside the vocabulary of {}",
                self.vocab_size
            ))),
        }
    }
}

impl TensorSpec {
    /// Product of the shape.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|n| *n as u64).product()
    }
}

fn sane(name: &str, value: f64) -> Result<()> {
    if (1e-3..=1e12).contains(&value) {
        return Ok(());
    }
    Err(Error::model(format!("{name} {value} is not in 0.001..1e12")))
}

fn within(name: &str, value: usize, range: std::ops::RangeInclusive<usize>) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let (low, high) = range.into_inner();
    Err(Error::model(format!("{name} is {value}, must be {low} to {high}")))
}

#[cfg(test)]
mod tests;
