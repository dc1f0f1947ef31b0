//! The one copy of a model's weights, in the layout the kernels read, and its parameters by name.
//!
//! Query, key and value projections are rows of one matrix, and so are gate and up projections; a
//! [`ParamSpec`] says which rows carry which Hugging Face name. Optimizer state is not kept here.

use std::ops::Range;

use kernels::{Dtype, Kernels, Matrix};

use crate::error::Result;
use crate::model::{ModelConfig, ModelSource};

/// The weights of one transformer layer. `H` hidden, `I` intermediate, `d` head size.
pub struct LayerWeights {
    /// `[H]`, of the norm before attention.
    pub attn_norm: Vec<f32>,
    /// `[(heads + 2 kv_heads) d, H]`: query, key and value rows.
    pub qkv: Matrix,
    /// `[(heads + 2 kv_heads) d]`, Qwen2's.
    pub qkv_bias: Option<Vec<f32>>,
    /// `[d]` each, Qwen3's norms of queries and keys.
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// `[H, heads d]`.
    pub o: Matrix,
    /// `[H]`, of the norm before the feed-forward part.
    pub mlp_norm: Vec<f32>,
    /// `[2 I, H]`: gate rows, then up rows.
    pub gate_up: Matrix,
    /// `[H, I]`.
    pub down: Matrix,
}

/// All weights of a model.
pub struct Weights {
    /// `[V, H]`; also the head when embeddings are tied.
    pub embed: Matrix,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// `[H]`, of the norm after the last layer.
    pub norm: Vec<f32>,
    /// `[V, H]`, unless tied.
    pub head: Option<Matrix>,
    dtype: Dtype,
}

/// One trainable parameter: a matrix or a vector, made of one or more named tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParamSpec {
    /// Hugging Face names with the rows they occupy, in order.
    pub tensors: Vec<(String, Range<usize>)>,
    /// Rows in all; 1 for a vector.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Whether it is a vector there (shape `[cols]`) or rows of one (biases: shape `[rows]`).
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

/// The trainable parameters of a model of this configuration, in the order of [`Weights::params_mut`].
pub fn param_specs(config: &ModelConfig) -> Vec<ParamSpec> {
    let (hidden, inter) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
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

/// One parameter, borrowed from the weights.
pub enum ParamMut<'a> {
    /// A matrix in tile layout.
    Matrix(&'a mut Matrix),
    /// A vector, holding only values that the compute format can represent.
    Vector(&'a mut Vec<f32>),
}

impl Weights {
    /// Zeroed weights of this shape.
    pub fn zeros(config: &ModelConfig, dtype: Dtype) -> Self {
        let (hidden, inter) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let qkv = q + 2 * kv;
        let layer = |_| LayerWeights {
            attn_norm: vec![0.0; hidden],
            qkv: Matrix::zeros(dtype, qkv, hidden),
            qkv_bias: config.qkv_bias.then(|| vec![0.0; qkv]),
            qk_norm: config
                .qk_norm
                .then(|| (vec![0.0; config.head_dim], vec![0.0; config.head_dim])),
            o: Matrix::zeros(dtype, hidden, q),
            mlp_norm: vec![0.0; hidden],
            gate_up: Matrix::zeros(dtype, 2 * inter, hidden),
            down: Matrix::zeros(dtype, hidden, inter),
        };
        Self {
            embed: Matrix::zeros(dtype, config.vocab_size, hidden),
            layers: (0..config.layers).map(layer).collect(),
            norm: vec![0.0; hidden],
            head: (!config.tied_embeddings)
                .then(|| Matrix::zeros(dtype, config.vocab_size, hidden)),
            dtype,
        }
    }

    /// Reads all tensors of `source`, a few rows at a time.
    ///
    /// # Errors
    /// `ErrorKind::Model` when a tensor is missing, has another shape or cannot be read.
    pub fn load(source: &ModelSource, dtype: Dtype) -> Result<Self> {
        const CHUNK_BYTES: usize = 8 << 20;
        let config = source.config();
        let mut weights = Self::zeros(config, dtype);
        let mut buffer = Vec::new();
        for (spec, param) in param_specs(config).iter().zip(weights.params_mut()) {
            match param {
                ParamMut::Vector(vector) => {
                    for (name, range) in &spec.tensors {
                        source.read_rows(name, 0..1, &mut vector[range.clone()])?;
                    }
                    round(dtype, vector);
                }
                ParamMut::Matrix(matrix) => {
                    // Whole tiles of 16 rows are written at once.
                    let step = (CHUNK_BYTES / 4 / spec.cols).next_multiple_of(16);
                    for (name, range) in &spec.tensors {
                        for from in (0..range.len()).step_by(step) {
                            let rows = from..(from + step).min(range.len());
                            buffer.resize(rows.len() * spec.cols, 0.0);
                            source.read_rows(name, rows.clone(), &mut buffer)?;
                            matrix.set_rows(range.start + rows.start, &buffer);
                        }
                    }
                }
            }
        }
        Ok(weights)
    }

    /// The format of the matrices.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The matrix that turns hidden states into logits.
    pub fn head(&self) -> &Matrix {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Bytes held.
    pub fn bytes(&mut self) -> u64 {
        self.params_mut()
            .map(|param| match param {
                ParamMut::Matrix(matrix) => matrix.bytes() as u64,
                ParamMut::Vector(vector) => 4 * vector.len() as u64,
            })
            .sum()
    }

    /// All parameters in the order of [`param_specs`].
    pub fn params_mut(&mut self) -> impl Iterator<Item = ParamMut<'_>> {
        let layers = self.layers.iter_mut().flat_map(|layer| {
            let (q_norm, k_norm) = match layer.qk_norm.as_mut() {
                Some((q, k)) => (Some(q), Some(k)),
                None => (None, None),
            };
            [
                Some(ParamMut::Vector(&mut layer.attn_norm)),
                Some(ParamMut::Matrix(&mut layer.qkv)),
                layer.qkv_bias.as_mut().map(ParamMut::Vector),
                q_norm.map(ParamMut::Vector),
                k_norm.map(ParamMut::Vector),
                Some(ParamMut::Matrix(&mut layer.o)),
                Some(ParamMut::Vector(&mut layer.mlp_norm)),
                Some(ParamMut::Matrix(&mut layer.gate_up)),
                Some(ParamMut::Matrix(&mut layer.down)),
            ]
            .into_iter()
            .flatten()
        });
        std::iter::once(ParamMut::Matrix(&mut self.embed))
            .chain(layers)
            .chain(std::iter::once(ParamMut::Vector(&mut self.norm)))
            .chain(self.head.as_mut().map(ParamMut::Matrix))
    }
}

impl ParamMut<'_> {
    /// Copies the parameter to `out`, row-major `[rows, cols]`.
    pub fn read(&self, out: &mut [f32]) {
        match self {
            Self::Vector(vector) => out.copy_from_slice(vector),
            Self::Matrix(matrix) => {
                for (row, out) in out.chunks_exact_mut(matrix.cols()).enumerate() {
                    matrix.get_row(row, out);
                }
            }
        }
    }

    /// Replaces the parameter by `values` (row-major), rounded to `dtype`.
    pub fn write(&mut self, kernels: &Kernels, dtype: Dtype, values: &[f32]) {
        match self {
            Self::Vector(vector) => {
                vector.copy_from_slice(values);
                round(dtype, vector);
            }
            Self::Matrix(matrix) => kernels.load_matrix(values, matrix),
        }
    }
}

/// Rounds to what `dtype` can represent, so that a saved and reloaded vector is the same.
fn round(dtype: Dtype, values: &mut [f32]) {
    if dtype == Dtype::Bf16 {
        values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
    }
}
