//! Model configuration from GGUF metadata, and the names of weights in GGUF files.
//!
//! Keys are those of ggml `docs/gguf.md` (`llama.block_count`, ...). llama.cpp's converter stores the
//! query and key rows of the `llama` architecture (Mistral included) reordered, so that the two halves of
//! a head are interleaved: GGUF row `2 j + h` of a head is row `h * head_dim / 2 + j` in Hugging Face's
//! order. [`gguf_row`] undoes it. Qwen2 and Qwen3 are stored as they are.

use crate::error::{Error, Result};
use crate::model::config::{Architecture, GenerationDefaults, ModelConfig};
use crate::model::gguf::{Gguf, Value};
use crate::model::rope::{RopeConfig, RopeScaling};
use serde_json::Map;
use std::collections::BTreeSet;

/// Control tokens that end a text, a turn or a message, whatever else a file names: llama.cpp's list
/// (`src/llama-vocab.cpp`), as far as the architectures here have them.
const END_NAMES: [&str; 11] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];
/// The type of control tokens in `tokenizer.ggml.token_type`.
const TYPE_CONTROL: i64 = 3;

/// The metadata of one file, with keys prefixed by its architecture.
struct Keys<'a> {
    file: &'a Gguf,
    prefix: &'a str,
}

pub(super) fn parse(file: &Gguf) -> Result<ModelConfig> {
    let prefix = file.string("general.architecture").unwrap_or_default();
    let architecture = Architecture::from_model_type(prefix)?;
    let keys = Keys { file, prefix };
    if keys.count("expert_count")?.unwrap_or(0) > 0 {
        return Err(Error::unsupported("mixture of experts is not implemented"));
    }
    let heads = keys.needed("attention.head_count")?;
    let hidden_size = keys.needed("embedding_length")?;
    let head_dim = match keys.count("attention.key_length")? {
        Some(n) => n,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let message =
                format!("embedding_length {hidden_size} does not divide over {heads} heads");
            return Err(Error::model(message));
        }
    };
    keys.must_be("attention.value_length", head_dim)?;
    keys.must_be("rope.dimension_count", head_dim)?;
    let config = ModelConfig {
        architecture,
        vocab_size: vocab_size(&keys)?,
        hidden_size,
        intermediate_size: keys.needed("feed_forward_length")?,
        layers: keys.needed("block_count")?,
        heads,
        kv_heads: keys.count("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        rms_eps: keys.float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5) as f32,
        rope: rope(&keys)?,
        max_position_embeddings: keys.needed("context_length")?,
        sliding_window: keys.count("attention.sliding_window")?.filter(|n| *n > 0),
        tied_embeddings: file.shape("output.weight").is_none(),
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
        bos: keys.token("bos_token_id")?,
        eos: end_tokens(&keys)?,
        pad: keys.token("padding_token_id")?,
        original: Map::new(),
    };
    config.validate()?;
    refuse_unread(file, &config)?;
    Ok(config)
}

/// GGUF has no sampling settings; the end tokens are all there is.
pub(super) fn generation(config: &ModelConfig) -> GenerationDefaults {
    GenerationDefaults { eos: config.eos.clone(), ..GenerationDefaults::default() }
}

/// Refuses weights of the decoder that it has no place for, such as biases: without them it would compute
/// something else.
fn refuse_unread(file: &Gguf, config: &ModelConfig) -> Result<()> {
    let read: BTreeSet<String> =
        config.tensors().iter().filter_map(|tensor| gguf_name(&tensor.name)).collect();
    let of_decoder = |name: &&str| {
        let parts = ["blk.", "output", "token_embd"];
        // Rotations that old files store beside their settings.
        parts.iter().any(|part| name.starts_with(part)) && !name.ends_with("attn_rot_embd.weight")
    };
    match file.names().filter(of_decoder).find(|name| !read.contains(*name)) {
        None => Ok(()),
        Some(name) => Err(Error::unsupported(format!("tensor {name:?} is not implemented"))),
    }
}

fn vocab_size(keys: &Keys<'_>) -> Result<usize> {
    if let Some(tokens) = keys.file.strings("tokenizer.ggml.tokens") {
        return Ok(tokens.len());
    }
    keys.needed("vocab_size")
}

/// The tokens that the file names, the end of a text first, then those that only their names give away: a chat
/// model's file names the end of a turn, and the model still ends texts that are no chats.
fn end_tokens(keys: &Keys<'_>) -> Result<Vec<u32>> {
    let mut eos = Vec::new();
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        eos.extend(keys.token(key)?.filter(|id| !eos.contains(id)));
    }
    let tokens = keys.file.strings("tokenizer.ggml.tokens").unwrap_or_default();
    let types = keys.file.integers("tokenizer.ggml.token_type").unwrap_or_default();
    for (id, (token, kind)) in (0_u32..).zip(tokens.iter().zip(types)) {
        let ends = *kind == TYPE_CONTROL && END_NAMES.contains(&token.as_str());
        if ends && !eos.contains(&id) {
            eos.push(id);
        }
    }
    Ok(eos)
}

fn rope(keys: &Keys<'_>) -> Result<RopeConfig> {
    let theta = keys.float("rope.freq_base").unwrap_or(10_000.0);
    let key = format!("{}.rope.scaling.type", keys.prefix);
    let factor = keys.float("rope.scaling.factor").or_else(|| keys.float("rope.scale_linear"));
    let scaling = match (keys.file.string(&key), factor) {
        (Some("none"), _) => RopeScaling::None,
        // As in llama.cpp, a factor alone is linear, and 0 is none.
        (None, None | Some(0.0 | 1.0)) => RopeScaling::None,
        (None | Some("linear"), Some(factor)) => RopeScaling::Linear { factor },
        (Some("linear"), None) => {
            return Err(Error::model("linear rope scaling lacks a factor"));
        }
        (Some(other), _) => {
            let message = format!("rope scaling {other:?}, supported are none and linear");
            return Err(Error::unsupported(message));
        }
    };
    let Some(shape) = keys.file.shape("rope_freqs.weight") else {
        return Ok(RopeConfig { theta, scaling });
    };
    let [n @ 1..=128] = *shape else {
        return Err(Error::model(format!("rope_freqs.weight has shape {shape:?}")));
    };
    if scaling != RopeScaling::None {
        return Err(Error::unsupported("rope_freqs.weight together with linear rope scaling"));
    }
    let mut factors = vec![0.0; n];
    keys.file.read_rows("rope_freqs.weight", 0..1, &mut factors)?;
    Ok(RopeConfig::from_factors(theta, factors))
}

impl Keys<'_> {
    fn float(&self, key: &str) -> Option<f64> {
        // Stored as f32: the shortest decimal is what was meant, 1e-6 and not 9.99999997e-7.
        let stored = self.file.float(&format!("{}.{key}", self.prefix))?;
        (stored as f32).to_string().parse().ok()
    }

    /// A count, or a list with one equal count per layer.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        let key = format!("{}.{key}", self.prefix);
        let Some(value) = self.file.metadata(&key) else { return Ok(None) };
        let count = match value {
            Value::Integers(list) if list.windows(2).all(|w| w[0] == w[1]) => {
                list.first().and_then(|n| usize::try_from(*n).ok())
            }
            Value::Integers(_) => {
                return Err(Error::unsupported(format!("{key} differs between layers")));
            }
            _ => self.file.unsigned(&key).and_then(|n| usize::try_from(n).ok()),
        };
        count.map(Some).ok_or_else(|| Error::model(format!("{key} is not a whole number")))
    }

    fn needed(&self, key: &str) -> Result<usize> {
        let missing = || Error::model(format!("metadata key {}.{key} is missing", self.prefix));
        self.count(key)?.ok_or_else(missing)
    }

    fn must_be(&self, key: &str, wanted: usize) -> Result<()> {
        match self.count(key)? {
            Some(n) if n != wanted => {
                Err(Error::unsupported(format!("{key} is {n}, supported is head_dim, {wanted}")))
            }
            _ => Ok(()),
        }
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}");
        let Some(id) = self.file.unsigned(&key) else { return Ok(None) };
        // Converters write the largest id for none.
        if id == u64::from(u32::MAX) {
            return Ok(None);
        }
        let id = u32::try_from(id);
        id.map(Some).map_err(|_| Error::model(format!("{key} is out of range")))
    }
}

/// GGUF's name of a weight, from Hugging Face's; `None` for a name no supported model has.
pub(super) fn gguf_name(name: &str) -> Option<String> {
    match name {
        "model.embed_tokens.weight" => return Some("token_embd.weight".into()),
        "model.norm.weight" => return Some("output_norm.weight".into()),
        "lm_head.weight" => return Some("output.weight".into()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let part = match part {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{part}.{kind}"))
}

/// Whether rows of this weight (Hugging Face's name) are stored interleaved.
pub(super) fn is_interleaved(architecture: Architecture, name: &str) -> bool {
    let rotated =
        name.ends_with("self_attn.q_proj.weight") || name.ends_with("self_attn.k_proj.weight");
    rotated && matches!(architecture, Architecture::Llama | Architecture::Mistral)
}

/// Row in an interleaved GGUF weight that holds row `row` of Hugging Face's order.
pub(super) fn gguf_row(row: usize, head_dim: usize) -> usize {
    let (head, r) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + r % half * 2 + r / half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_gguf() {
        let name = |n| gguf_name(n).unwrap_or_default();
        assert_eq!(name("model.embed_tokens.weight"), "token_embd.weight");
        assert_eq!(name("model.layers.12.self_attn.q_proj.bias"), "blk.12.attn_q.bias");
        assert_eq!(name("model.layers.3.post_attention_layernorm.weight"), "blk.3.ffn_norm.weight");
        assert_eq!(name("model.layers.0.self_attn.k_norm.weight"), "blk.0.attn_k_norm.weight");
        assert_eq!(gguf_name("model.layers.0.mlp.other.weight"), None);
        assert_eq!(gguf_name("visual.patch.weight"), None);
    }

    /// The converter's `reshape(heads, 2, d / 2, cols).swapaxes(1, 2)`, written out for row numbers.
    #[test]
    fn rows_return_to_their_place() {
        let (heads, d) = (3, 32);
        let mut stored = Vec::new();
        for head in 0..heads {
            for j in 0..d / 2 {
                for h in 0..2 {
                    stored.push(head * d + h * (d / 2) + j);
                }
            }
        }
        for row in 0..heads * d {
            assert_eq!(stored[gguf_row(row, d)], row);
        }
        assert_eq!(gguf_row(1, 32), 2);
        assert_eq!(gguf_row(16, 32), 1);
    }
}
