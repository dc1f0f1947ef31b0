//! The trainable parameters of a model and the named tensors that a checkpoint holds of them.
//!
//! Query, key and value projections are rows of one matrix, and so are gate and up projections; a
//! [`ParamSpec`] says which rows carry which Hugging Face name. This file is the one place that knows names
//! and shapes. Leaves out ggml's names: see `source`.

use super::{ModelConfig, TensorSpec};
use std::ops::Range;

/// One trainable parameter: a matrix or a vector, made of one or more named tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Hugging Face names with the rows they occupy, in order.
    pub tensors: Vec<(String, Range<usize>)>,
    /// Rows in all; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// How its tensors are shaped in a checkpoint.
    pub shape: ParamShape,
}

/// How a parameter's tensors are shaped in a checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamShape {
    /// `[rows, cols]`.
    Matrix,
    /// `[cols]`; `rows` is 1 and ranges count columns.
    Vector,
}

impl ParamSpec {
    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a checkpoint holds of it, in order.
    pub fn specs(&self) -> impl Iterator<Item = TensorSpec> + '_ {
        self.tensors.iter().map(|(name, range)| TensorSpec {
            name: name.clone(),
            shape: match self.shape {
                ParamShape::Matrix => vec![range.len(), self.cols],
                ParamShape::Vector => vec![range.len()],
            },
        })
    }

    fn matrix(tensors: &[(String, usize)], cols: usize) -> Self {
        let (tensors, rows) = ranges(tensors);
        Self { tensors, rows, cols, shape: ParamShape::Matrix }
    }

    fn vector(tensors: &[(String, usize)]) -> Self {
        let (tensors, cols) = ranges(tensors);
        Self { tensors, rows: 1, cols, shape: ParamShape::Vector }
    }
}

fn ranges(tensors: &[(String, usize)]) -> (Vec<(String, Range<usize>)>, usize) {
    let mut end = 0;
    let ranges = tensors
        .iter()
        .map(|(name, rows)| {
            let range = end..end + rows;
            end = range.end;
            (name.clone(), range)
        })
        .collect();
    (ranges, end)
}

/// The trainable parameters of a model of this configuration, in the order of
/// [`Weights::params_mut`](crate::decoder::Weights::params_mut).
pub fn param_specs(config: &ModelConfig) -> Vec<ParamSpec> {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.q_size(), config.kv_size());
    let one = |name: &str, rows| (name.to_owned(), rows);
    let mut specs =
        vec![ParamSpec::matrix(&[one("model.embed_tokens.weight", config.vocab_size)], hidden)];
    for layer in 0..config.layers {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let projections = |kind: &str| {
            [("q", q), ("k", kv), ("v", kv)]
                .map(|(p, rows)| (name(&format!("self_attn.{p}_proj.{kind}")), rows))
        };
        specs.push(ParamSpec::vector(&[(name("input_layernorm.weight"), hidden)]));
        specs.push(ParamSpec::matrix(&projections("weight"), hidden));
        if config.qkv_bias {
            specs.push(ParamSpec::vector(&projections("bias")));
        }
        if config.qk_norm {
            let head = config.head_dim;
            specs.push(ParamSpec::vector(&[(name("self_attn.q_norm.weight"), head)]));
            specs.push(ParamSpec::vector(&[(name("self_attn.k_norm.weight"), head)]));
        }
        specs.push(ParamSpec::matrix(&[(name("self_attn.o_proj.weight"), hidden)], q));
        specs.push(ParamSpec::vector(&[(name("post_attention_layernorm.weight"), hidden)]));
        let gate_up = ["gate", "up"].map(|p| (name(&format!("mlp.{p}_proj.weight")), inter));
        specs.push(ParamSpec::matrix(&gate_up, hidden));
        specs.push(ParamSpec::matrix(&[(name("mlp.down_proj.weight"), hidden)], inter));
    }
    specs.push(ParamSpec::vector(&[one("model.norm.weight", hidden)]));
    if !config.tied_embeddings {
        specs.push(ParamSpec::matrix(&[one("lm_head.weight", config.vocab_size)], hidden));
    }
    specs
}
