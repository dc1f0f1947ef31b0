//! The intermediate values of a forward pass: one layer's, used again, or what backward needs of all.

use kernels::{AttnScratch, Dtype, GatedBuffers, Input, Operand};

use crate::model::ModelConfig;

/// Whether a forward pass keeps what its backward needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Only the layer at work: there will be no backward.
    OneLayer,
    /// What entered each layer; a layer runs again, to the same bits, when its backward needs the rest.
    Inputs,
    /// Every layer.
    AllLayers,
}

impl Keep {
    /// Layers whose intermediate values are held, of `layers`.
    fn whole_layers(self, layers: usize) -> usize {
        match self {
            Self::OneLayer | Self::Inputs => 1,
            Self::AllLayers => layers,
        }
    }

    /// Further inputs of layers that are held, of `layers`.
    fn inputs(self, layers: usize) -> usize {
        if self == Self::Inputs { layers } else { 0 }
    }
}

/// What one layer's backward reads; `M` rows. Everything else is computed again from these.
pub(super) struct LayerTape {
    /// `[M, H]`: the residual stream entering the layer.
    pub(super) x: Vec<f32>,
    /// `[M, heads d]` and `[M, kv_heads d]` before their norms; empty without them.
    pub(super) q_in: Vec<f32>,
    pub(super) k_in: Vec<f32>,
    /// `[M, heads d]`, after norm and rope.
    pub(super) q: Vec<f32>,
    /// `[M, kv_heads d]`, after norm and rope.
    pub(super) k: Vec<f32>,
    /// `[M, kv_heads d]`.
    pub(super) v: Vec<f32>,
    /// `[M, heads d]`: what attention returned.
    pub(super) attn: Vec<f32>,
    /// `[M, H]`: the residual stream between attention and feed-forward.
    pub(super) mid: Vec<f32>,
    /// `[M, 2 I]`, rounded; written where all of the layer is kept.
    pub(super) gate_up: Operand,
}

impl LayerTape {
    fn new(dtype: Dtype) -> Self {
        Self {
            x: Vec::new(),
            q_in: Vec::new(),
            k_in: Vec::new(),
            q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            attn: Vec::new(),
            mid: Vec::new(),
            gate_up: Operand::new(dtype),
        }
    }

    fn resize(&mut self, config: &ModelConfig, rows: usize) {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        self.x.resize(rows * config.hidden_size, 0.0);
        if config.qk_norm {
            self.q_in.resize(rows * q, 0.0);
            self.k_in.resize(rows * kv, 0.0);
        }
        self.q.resize(rows * q, 0.0);
        self.k.resize(rows * kv, 0.0);
        self.v.resize(rows * kv, 0.0);
        self.attn.resize(rows * q, 0.0);
        self.mid.resize(rows * config.hidden_size, 0.0);
    }
}

/// Buffers of a forward pass. They grow to the largest batch seen and are used again.
pub struct Tape {
    keep: Keep,
    pub(super) layers: Vec<LayerTape>,
    /// `[M, H]` each: what entered the layers, where they are to run again.
    pub(super) inputs: Vec<Vec<f32>>,
    /// `[M, H]`: the residual stream, after the last layer when the pass is done.
    pub(super) x: Vec<f32>,
    pub(super) work: Work,
}

/// Values that nothing reads after the layer at work.
pub(super) struct Work {
    /// `[M, H]`: a norm's output.
    pub(super) norm: Vec<f32>,
    pub(super) gate_buffers: GatedBuffers,
    /// The left operand of the product at hand.
    pub(super) input: Input,
    /// That of the feed-forward's second product.
    pub(super) gated: Input,
    pub(super) attn: AttnScratch,
}

impl Tape {
    /// Empty buffers.
    pub fn new(config: &ModelConfig, dtype: Dtype, keep: Keep) -> Self {
        let layers = keep.whole_layers(config.layers);
        Self {
            keep,
            layers: (0..layers).map(|_| LayerTape::new(dtype)).collect(),
            inputs: vec![Vec::new(); keep.inputs(config.layers)],
            x: Vec::new(),
            work: Work {
                norm: Vec::new(),
                gate_buffers: GatedBuffers::default(),
                input: Input::new(dtype),
                gated: Input::new(dtype),
                attn: AttnScratch::new(),
            },
        }
    }

    /// What is kept.
    pub fn keep(&self) -> Keep {
        self.keep
    }

    /// `[M, H]`: the residual stream after the last layer, before the final norm.
    pub fn output(&self) -> &[f32] {
        &self.x
    }

    /// Bytes of the buffers for `rows` rows.
    pub fn bytes(config: &ModelConfig, dtype: Dtype, keep: Keep, rows: usize) -> u64 {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let norms = if config.qk_norm { q + kv } else { 0 };
        let values = 2 * config.hidden_size + norms + 2 * q + 2 * kv;
        let rounded = if keep == Keep::OneLayer { 0 } else { 2 * config.intermediate_size };
        let layers = keep.whole_layers(config.layers);
        let inputs = keep.inputs(config.layers) * config.hidden_size;
        // The residual stream, a norm's output and what the feed-forward works in.
        let shared = 2 * config.hidden_size + 4 * config.intermediate_size;
        let row = 4 * (layers * values + inputs + shared) + dtype.size_bytes() * layers * rounded;
        rows as u64 * row as u64
    }

    pub(super) fn resize(&mut self, config: &ModelConfig, rows: usize) {
        self.layers.iter_mut().for_each(|layer| layer.resize(config, rows));
        self.inputs.iter_mut().for_each(|x| x.resize(rows * config.hidden_size, 0.0));
        self.x.resize(rows * config.hidden_size, 0.0);
        self.work.norm.resize(rows * config.hidden_size, 0.0);
    }
}
