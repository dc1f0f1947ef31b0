//! `config.json` and `generation_config.json` of Hugging Face transformers, versions 4 and 5.
//!
//! Version 4 writes `rope_theta`, `rope_scaling` and `torch_dtype`, version 5 `rope_parameters` and
//! `dtype`; both are read, and both are written so that either version loads a checkpoint. What a model
//! asks for and the decoder lacks (other activations, biases elsewhere, quantised weights, other rotary
//! scalings) is refused by name.

use crate::error::{Error, Result};
use crate::model::config::{Architecture, GenerationDefaults, ModelConfig};
use crate::model::rope::{RopeConfig, RopeScaling};
use kernels::Dtype;
use serde_json::{Map, Value, json};

pub(super) fn parse(text: &str) -> Result<ModelConfig> {
    let keys = Keys(object(text)?);
    let architecture = architecture(&keys)?;
    refuse(&keys)?;
    let heads = keys.needed("num_attention_heads")?;
    let hidden_size = keys.needed("hidden_size")?;
    let max_position_embeddings = keys.needed("max_position_embeddings")?;
    let config = ModelConfig {
        architecture,
        vocab_size: keys.needed("vocab_size")?,
        hidden_size,
        intermediate_size: keys.needed("intermediate_size")?,
        layers: keys.needed("num_hidden_layers")?,
        heads,
        kv_heads: keys.count("num_key_value_heads")?.unwrap_or(heads),
        head_dim: match keys.count("head_dim")? {
            Some(n) => n,
            None => derived_head_dim(architecture, hidden_size, heads)?,
        },
        rms_eps: keys.float("rms_norm_eps")?.unwrap_or(1e-6) as f32,
        rope: rope(&keys, max_position_embeddings)?,
        max_position_embeddings,
        sliding_window: sliding_window(&keys, architecture)?,
        tied_embeddings: keys.boolean("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: architecture == Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
        bos: keys.ids("bos_token_id")?.first().copied(),
        eos: keys.ids("eos_token_id")?,
        pad: keys.ids("pad_token_id")?.first().copied(),
        original: keys.0,
    };
    config.validate()?;
    Ok(config)
}

/// Reads `generation_config.json`.
pub(super) fn parse_generation(text: &str) -> Result<GenerationDefaults> {
    let keys = Keys(object(text)?);
    let number = |key: &str| keys.float(key).map(|x| x.map(|x| x as f32));
    Ok(GenerationDefaults {
        eos: keys.ids("eos_token_id")?,
        temperature: number("temperature")?,
        top_p: number("top_p")?,
        top_k: match keys.float("top_k")? {
            // Some say -1 for no limit.
            Some(k) if k < 0.0 => None,
            _ => keys.count("top_k")?.and_then(|k| u32::try_from(k).ok()),
        },
        min_p: number("min_p")?,
        repetition_penalty: number("repetition_penalty")?,
        max_new_tokens: keys.count("max_new_tokens")?,
    })
}

pub(super) fn write(config: &ModelConfig, dtype: Dtype) -> Result<String> {
    let dtype = match dtype {
        Dtype::F32 => "float32",
        Dtype::Bf16 => "bfloat16",
    };
    let scaling = rope_scaling_json(&config.rope)?;
    let mut rope = match &scaling {
        Value::Object(map) => map.clone(),
        _ => Map::from_iter([("rope_type".to_owned(), json!("default"))]),
    };
    rope.insert("rope_theta".into(), json!(config.rope.theta));
    let mut map = config.original.clone();
    let mut set = |key: &str, value: Value| map.insert(key.to_owned(), value);
    set("architectures", json!([config.architecture.class_name()]));
    set("model_type", json!(config.architecture.model_type()));
    set("vocab_size", json!(config.vocab_size));
    set("hidden_size", json!(config.hidden_size));
    set("intermediate_size", json!(config.intermediate_size));
    set("num_hidden_layers", json!(config.layers));
    set("num_attention_heads", json!(config.heads));
    set("num_key_value_heads", json!(config.kv_heads));
    set("head_dim", json!(config.head_dim));
    set("hidden_act", json!("silu"));
    set("rms_norm_eps", shortest(config.rms_eps));
    set("max_position_embeddings", json!(config.max_position_embeddings));
    set("rope_theta", json!(config.rope.theta));
    set("rope_scaling", scaling);
    set("rope_parameters", Value::Object(rope));
    set("tie_word_embeddings", json!(config.tied_embeddings));
    set("torch_dtype", json!(dtype));
    set("dtype", json!(dtype));
    set("bos_token_id", json!(config.bos));
    set("eos_token_id", ids_json(&config.eos));
    set("pad_token_id", json!(config.pad));
    if config.architecture == Architecture::Mistral || config.sliding_window.is_some() {
        set("sliding_window", json!(config.sliding_window));
    }
    Ok(format!("{:#}\n", Value::Object(map)))
}

/// The shortest decimal that is this f32, so that 1e-6 stays 1e-6.
fn shortest(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, |x| json!(x))
}

fn ids_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [id] => json!(id),
        _ => json!(ids),
    }
}

fn rope_scaling_json(rope: &RopeConfig) -> Result<Value> {
    match &rope.scaling {
        RopeScaling::None => Ok(Value::Null),
        RopeScaling::Linear { factor } => Ok(json!({"rope_type": "linear", "factor": factor})),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => Ok(json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position,
        })),
        RopeScaling::Factors(_) => Err(Error::unsupported(
            "the rope factors of this gguf file cannot be expressed in a config.json",
        )),
    }
}

fn object(text: &str) -> Result<Map<String, Value>> {
    serde_json::from_str(text).map_err(|e| Error::model(format!("not a json object: {e}")))
}

fn architecture(keys: &Keys) -> Result<Architecture> {
    if let Some(Value::Array(names)) = keys.get("architectures")
        && let Some(name) = names.first()
    {
        return Architecture::from_class_name(name.as_str().unwrap_or_default());
    }
    Architecture::from_model_type(keys.text("model_type")?.unwrap_or_default())
}

/// Refuses what would be computed wrongly.
fn refuse(keys: &Keys) -> Result<()> {
    let act = keys.text("hidden_act")?.unwrap_or("silu");
    if !matches!(act, "silu" | "swish") {
        return Err(Error::unsupported(format!("hidden_act {act:?}, supported is silu")));
    }
    for key in ["attention_bias", "mlp_bias"] {
        if keys.boolean(key)? == Some(true) {
            return Err(Error::unsupported(format!("{key} is true, which is not implemented")));
        }
    }
    let partial = keys.float("partial_rotary_factor")?.unwrap_or(1.0);
    if partial != 1.0 {
        return Err(Error::unsupported(format!("partial_rotary_factor {partial}, supported is 1")));
    }
    if keys.get("quantization_config").is_some() {
        let message = "quantised hugging face weights (quantization_config), supported are f32, \
                       f16 and bf16; quantised models load from gguf";
        return Err(Error::unsupported(message));
    }
    Ok(())
}

fn derived_head_dim(architecture: Architecture, hidden: usize, heads: usize) -> Result<usize> {
    if architecture == Architecture::Qwen3 {
        return Ok(128);
    }
    if heads == 0 || !hidden.is_multiple_of(heads) {
        return Err(Error::model(format!(
            "hidden_size {hidden} does not divide over {heads} attention heads"
        )));
    }
    Ok(hidden / heads)
}

fn rope(keys: &Keys, max_position: usize) -> Result<RopeConfig> {
    let parameters = keys.section("rope_parameters")?;
    let scaling = keys.section("rope_scaling")?;
    let own_theta = parameters.as_ref().map(|p| p.float("rope_theta")).transpose()?.flatten();
    let theta = own_theta.or(keys.float("rope_theta")?).unwrap_or(10_000.0);
    let scaling = match parameters.or(scaling) {
        Some(section) => rope_scaling(&section, max_position)?,
        None => RopeScaling::None,
    };
    Ok(RopeConfig { theta, scaling })
}

fn rope_scaling(section: &Keys, max_position: usize) -> Result<RopeScaling> {
    let kind = section.text("rope_type")?.or(section.text("type")?).unwrap_or("default");
    if let Some(partial) = section.float("partial_rotary_factor")?
        && partial != 1.0
    {
        return Err(Error::unsupported(format!("partial_rotary_factor {partial}, supported is 1")));
    }
    let number = |key: &str| {
        section.float(key)?.ok_or_else(|| Error::model(format!("{kind} rope scaling lacks {key}")))
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_max_position: section
                .count("original_max_position_embeddings")?
                .unwrap_or(max_position),
        }),
        other => Err(Error::unsupported(format!(
            "rope scaling {other:?}, supported are default, linear and llama3"
        ))),
    }
}

/// Qwen configurations name a window that `use_sliding_window` or `layer_types` may leave unused.
fn sliding_window(keys: &Keys, architecture: Architecture) -> Result<Option<usize>> {
    if architecture == Architecture::Mistral && !keys.0.contains_key("sliding_window") {
        // The default of transformers; checkpoints without a window say null.
        return Ok(Some(4096));
    }
    let Some(window) = keys.count("sliding_window")? else { return Ok(None) };
    if let Some(Value::Array(types)) = keys.get("layer_types") {
        let used = types.iter().any(|t| t != "full_attention");
        return Ok(used.then_some(window));
    }
    Ok(match architecture {
        Architecture::Llama => None,
        Architecture::Mistral => Some(window),
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let used = keys.boolean("use_sliding_window")?.unwrap_or(false);
            let first = keys.count("max_window_layers")?.unwrap_or(0);
            let layers = keys.count("num_hidden_layers")?.unwrap_or(0);
            (used && first < layers).then_some(window)
        }
    })
}

/// A JSON object whose values are asked for by type; `null` counts as absent.
struct Keys(Map<String, Value>);

impl Keys {
    fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match read(value) {
            Some(x) => Ok(Some(x)),
            None => {
                let shown: String = value.to_string().chars().take(60).collect();
                Err(Error::model(format!("{key} is {shown}, must be {wanted}")))
            }
        }
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        self.typed(key, "a whole number", |v| {
            // Some tools write 4096.0.
            let float = || v.as_f64().filter(|x| x.fract() == 0.0 && (0.0..1e15).contains(x));
            v.as_u64().or_else(|| float().map(|x| x as u64)).and_then(|n| usize::try_from(n).ok())
        })
    }

    fn needed(&self, key: &str) -> Result<usize> {
        self.count(key)?.ok_or_else(|| Error::model(format!("{key} is missing")))
    }

    fn float(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn boolean(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", Value::as_str)
    }

    fn section(&self, key: &str) -> Result<Option<Self>> {
        self.typed(key, "an object", |v| v.as_object().map(|map| Self(map.clone())))
    }

    /// One token id or a list of them; -1 means none (old converters wrote it).
    fn ids(&self, key: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let read = |v: &Value| match v {
            Value::Array(list) => list.iter().map(id).collect(),
            Value::Number(n) if n.as_i64() == Some(-1) => Some(Vec::new()),
            one => id(one).map(|id| vec![id]),
        };
        Ok(self.typed(key, "a token id or a list of them", read)?.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests;
