//! The intermediate values of a forward pass: one layer's, used again, or what backward needs of all.

use kernels::{AttnScratch, Input};

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
#[derive(Default)]
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
    /// `[M, 2 I]`.
    pub(super) gate_up: Vec<f32>,
}

impl LayerTape {
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
        self.gate_up.resize(rows * 2 * config.intermediate_size, 0.0);
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
    /// `[M, I]`: the activated feed-forward values.
    pub(super) act: Vec<f32>,
    /// The left operand of the product at hand.
    pub(super) input: Input,
    /// That of the feed-forward's second product.
    pub(super) gated: Input,
    pub(super) attn: AttnScratch,
}

impl Tape {
    /// Empty buffers.
    pub fn new(config: &ModelConfig, dtype: kernels::Dtype, keep: Keep) -> Self {
        let layers = keep.whole_layers(config.layers);
        Self {
            keep,
            layers: (0..layers).map(|_| LayerTape::default()).collect(),
            inputs: vec![Vec::new(); keep.inputs(config.layers)],
            x: Vec::new(),
            work: Work {
                norm: Vec::new(),
                act: Vec::new(),
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
    pub fn bytes(config: &ModelConfig, keep: Keep, rows: usize) -> u64 {
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let norms = if config.qk_norm { q + kv } else { 0 };
        let layer = 2 * config.hidden_size + norms + 2 * q + 2 * kv + 2 * config.intermediate_size;
        let layers = keep.whole_layers(config.layers) * layer;
        let inputs = keep.inputs(config.layers) * config.hidden_size;
        let shared = 2 * config.hidden_size + 2 * config.intermediate_size;
        4 * (rows as u64) * (layers + inputs + shared) as u64
    }

    pub(super) fn resize(&mut self, config: &ModelConfig, rows: usize) {
        self.layers.iter_mut().for_each(|layer| layer.resize(config, rows));
        self.inputs.iter_mut().for_each(|x| x.resize(rows * config.hidden_size, 0.0));
        self.x.resize(rows * config.hidden_size, 0.0);
        self.work.norm.resize(rows * config.hidden_size, 0.0);
        self.work.act.resize(rows * config.intermediate_size, 0.0);
    }
}
