//! The tiny reference models and what transformers computed with them.

use std::collections::HashMap;
use std::path::PathBuf;

use candle_backend::candle_core::{self, Device, Tensor};
use engine::model::{RopeConfig, RopeScaling};
use engine::{ModelConfig, ModelSource};
use half::bf16;
use serde_json::Value;

/// Names of the complete models.
pub(crate) const TINY: [&str; 4] = ["tiny-llama", "tiny-llama3-rope", "tiny-qwen2", "tiny-qwen3"];

/// A model and its reference outputs.
pub(crate) struct Golden {
    pub(crate) name: &'static str,
    pub(crate) source: ModelSource,
    reference: Value,
}

/// The policy step of a reference.
pub(crate) struct PolicyStep {
    pub(crate) sequences: Vec<Vec<u32>>,
    pub(crate) prompt_len: usize,
    /// `[R]`: each response token's advantage and log-probability when it was sampled.
    pub(crate) advantages: Vec<f32>,
    pub(crate) old: Vec<f32>,
}

impl Golden {
    pub(crate) fn all() -> Vec<Self> {
        TINY.map(Self::open).into()
    }

    pub(crate) fn open(name: &'static str) -> Self {
        let text = std::fs::read_to_string(directory(name).join("reference.json")).unwrap();
        let source = ModelSource::open(&directory(name)).unwrap();
        Self { name, source, reference: serde_json::from_str(&text).unwrap() }
    }

    /// The model's configuration with the rotary frequencies that the reference outputs were made with.
    ///
    /// Those were rounded to bf16, as happens to the buffers of a transformers model that is cast after it
    /// was made. A model that is loaded from its files keeps them in f32, as the engine does.
    pub(crate) fn config(&self) -> ModelConfig {
        let mut config = self.source.config().clone();
        let plain = RopeConfig { theta: config.rope.theta, scaling: RopeScaling::None };
        let rounded = config.inv_freq().into_iter().map(|f| bf16::from_f32(f).to_f32());
        let factors = plain.inv_freq(config.head_dim).into_iter().zip(rounded).map(|(p, f)| p / f);
        config.rope = RopeConfig { scaling: RopeScaling::Factors(factors.collect()), ..plain };
        config
    }

    /// Token ids, log-probabilities and entropies of the cases.
    pub(crate) fn cases(&self) -> Vec<(Vec<u32>, Vec<f32>, Vec<f32>)> {
        let case = |c: &Value| {
            (ids(&c["input_ids"]), floats(&c["next_token_logprobs"]), floats(&c["entropy"]))
        };
        self.reference["cases"].as_array().unwrap().iter().map(case).collect()
    }

    /// A prompt and the tokens that follow it greedily.
    pub(crate) fn greedy(&self) -> (Vec<u32>, Vec<u32>) {
        let greedy = &self.reference["greedy"];
        (ids(&greedy["prompt"]), ids(&greedy["continuation"]))
    }

    pub(crate) fn policy_step(&self) -> PolicyStep {
        let step = &self.reference["policy_step"];
        let prompt_len = step["prompt_len"].as_u64().unwrap() as usize;
        let sequences: Vec<Vec<u32>> =
            step["sequences"].as_array().unwrap().iter().map(ids).collect();
        let advantages = floats(&step["advantages"]);
        let per_token = sequences.iter().zip(&advantages);
        let per_token = per_token.flat_map(|(s, a)| vec![*a; s.len() - prompt_len]).collect();
        let old = step["old_logprobs"].as_array().unwrap().iter().flat_map(floats).collect();
        PolicyStep { sequences, prompt_len, advantages: per_token, old }
    }

    /// A list of numbers of the policy step.
    pub(crate) fn policy_numbers(&self, key: &str) -> Vec<f32> {
        floats(&self.reference["policy_step"][key])
    }

    /// Tensors of a safetensors file beside the model.
    pub(crate) fn tensors(&self, file: &str) -> HashMap<String, Tensor> {
        candle_core::safetensors::load(directory(self.name).join(file), &Device::Cpu).unwrap()
    }
}

fn directory(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/golden/models");
    PathBuf::from(root).join(name)
}

fn ids(list: &Value) -> Vec<u32> {
    list.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
}

fn floats(list: &Value) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Fails unless the numbers agree within `limit`.
pub(crate) fn assert_close(what: &str, got: &[f32], want: &[f32], limit: f32) {
    assert_eq!(got.len(), want.len(), "{what}: lengths");
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert!((got - want).abs() <= limit, "{what}[{i}] is {got}, want {want}");
    }
}

/// Norm of the difference over the norm of `want`.
pub(crate) fn relative(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths");
    let square = |x: f32| f64::from(x).powi(2);
    let difference: f64 = got.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    (difference / want.iter().map(|x| square(*x)).sum::<f64>()).sqrt()
}

/// All numbers of a tensor in row-major order.
pub(crate) fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}
