//! The forward pass of the decoder (Llama: arXiv 2302.13971; Qwen2: 2407.10671; Qwen3: 2505.09388).
//!
//! ```text
//! x = embed(ids)
//! for each layer:  x += W_o attention(rope(norm?(W_q n)), rope(norm?(W_k n)), W_v n),  n = rms_norm(x)
//!                  x += W_down (silu(W_gate m) * W_up m),                              m = rms_norm(x)
//! logits = W_head rms_norm(x)
//! ```

use kernels::{Attention, AttnSeq, Dtype, Input, Kernels, KvCache, Part, RopeTable, Write};

use super::tape::{Keep, LayerTape, Tape, Work};
use super::weights::{LayerWeights, Weights};
use crate::model::ModelConfig;

/// The rows of one forward pass; `M` of them.
pub struct Batch<'a> {
    /// `[M]` token ids.
    pub tokens: &'a [u32],
    /// `[M]` positions in their sequences.
    pub positions: &'a [u32],
    /// `[M]` where key and value of a row are kept: block x block size + offset.
    pub slots: &'a [u32],
    /// Slots whose key and value are needed at a second slot too, from and to: sequences that share
    /// rows which do not fill a block copy the beginning of that block.
    pub copies: &'a [(u32, u32)],
    /// The sequences that the rows belong to, in order of rows.
    pub seqs: &'a [AttnSeq<'a>],
}

/// Which layer of the cache a layer of the model writes and reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvLayers {
    /// Its own: later passes go on from it.
    Own,
    /// Layer 0, overwritten by the next layer: all positions are in this very pass.
    Shared,
}

/// The rows that enter the head; `R` of them. Buffers that are used again.
pub struct HeadInput {
    /// `[R, H]`: the residual stream before the final norm.
    pub gathered: Vec<f32>,
    /// `[R, H]`: after it.
    normed: Vec<f32>,
    /// `[R, H]`: rounded for the head.
    pub input: Input,
}

/// Gives `to` the residual stream that is in `from`, which keeps it only where the tape does.
fn hand_on(kernels: &Kernels, keep: Keep, from: &mut Vec<f32>, to: &mut Vec<f32>) {
    match keep {
        Keep::AllLayers => kernels.copy(to, from),
        Keep::OneLayer | Keep::Inputs => std::mem::swap(from, to),
    }
}

impl HeadInput {
    /// Empty buffers.
    pub fn new(dtype: Dtype) -> Self {
        Self { gathered: Vec::new(), normed: Vec::new(), input: Input::new(dtype) }
    }
}

/// A model: its shape, its weights and its rotary table.
pub struct Decoder {
    /// The shape.
    pub config: ModelConfig,
    /// The weights.
    pub weights: Weights,
    pub(super) rope: RopeTable,
    pub(super) scale: f32,
}

impl Decoder {
    /// A decoder for positions below `max_positions`.
    pub fn new(config: ModelConfig, weights: Weights, max_positions: usize) -> Self {
        let rope = RopeTable::new(config.head_dim, max_positions, &config.inv_freq(), 1.0);
        let scale = 1.0 / (config.head_dim as f32).sqrt();
        Self { config, weights, rope, scale }
    }

    /// Width of all query heads.
    pub(super) fn q_width(&self) -> usize {
        self.config.heads * self.config.head_dim
    }

    /// Width of all key heads, and of all value heads.
    pub(super) fn kv_width(&self) -> usize {
        self.config.kv_heads * self.config.head_dim
    }

    /// Runs the layers over `batch`, writing its keys and values into `kv`; the residual stream after
    /// the last layer is [`Tape::output`].
    ///
    /// # Panics
    /// When slices disagree in length or a token, position or slot is out of range.
    pub fn forward(
        &self,
        kernels: &Kernels,
        batch: &Batch<'_>,
        kv: (&mut KvCache, KvLayers),
        tape: &mut Tape,
    ) {
        let (kv, kv_layers) = kv;
        tape.resize(&self.config, batch.tokens.len());
        kernels.embed(&self.weights.embed, batch.tokens, &mut tape.x);
        for (l, weights) in self.weights.layers.iter().enumerate() {
            let kept = if tape.keep() == Keep::AllLayers { l } else { 0 };
            let kv_layer = if kv_layers == KvLayers::Own { l } else { 0 };
            let keep = tape.keep();
            let Tape { layers, inputs, x, work, .. } = tape;
            let layer = &mut layers[kept];
            if let Some(input) = inputs.get_mut(l) {
                kernels.copy(input, x);
            }
            hand_on(kernels, keep, x, &mut layer.x);
            self.attention(kernels, weights, batch, (kv, kv_layer), (layer, work, keep));
            let kept = (keep == Keep::AllLayers).then_some(&mut layer.gate_up);
            let Work { input, gated, gate_buffers, .. } = work;
            let first = (&*input, &weights.gate_up);
            kernels.gated(first, &weights.down, gate_buffers, kept, gated);
            hand_on(kernels, keep, &mut layer.mid, x);
            let all = 0..weights.down.rows();
            kernels.linear(gated, &weights.down, all, None, Write::Add, x);
        }
    }

    /// A layer from what enters it, `layer.x`, up to what its feed-forward activates: everything that
    /// its backward reads.
    pub(super) fn layer(
        &self,
        kernels: &Kernels,
        weights: &LayerWeights,
        batch: &Batch<'_>,
        kv: (&mut KvCache, usize),
        (layer, work): (&mut LayerTape, &mut Work),
    ) {
        self.attention(kernels, weights, batch, kv, (layer, work, Keep::AllLayers));
        let Work { input, gated, gate_buffers, .. } = work;
        let (first, kept) = ((&*input, &weights.gate_up), Some(&mut layer.gate_up));
        kernels.gated(first, &weights.down, gate_buffers, kept, gated);
    }

    /// A layer from what enters it, `layer.x`, up to its feed-forward's left operand, `work.input`.
    fn attention(
        &self,
        kernels: &Kernels,
        weights: &LayerWeights,
        batch: &Batch<'_>,
        (kv, kv_layer): (&mut KvCache, usize),
        (layer, work, keep): (&mut LayerTape, &mut Work, Keep),
    ) {
        let Work { norm, input, attn, .. } = work;
        let eps = self.config.rms_eps;
        kernels.normed_input((&layer.x, &weights.attn_norm, eps), &weights.qkv, norm, input);
        self.project_qkv(kernels, weights, input, batch.positions, layer);
        kernels.kv_write(kv, kv_layer, &layer.k, &layer.v, batch.slots);
        batch.copies.iter().for_each(|(from, to)| kv.copy_slot(kv_layer, *from, *to));
        let task = Attention {
            layer: kv_layer,
            q: &layer.q,
            seqs: batch.seqs,
            heads: self.config.heads,
            scale: self.scale,
        };
        kernels.attention(kv, task, &mut layer.attn, attn);
        kernels.input(&layer.attn, &weights.o, input);
        hand_on(kernels, keep, &mut layer.x, &mut layer.mid);
        let all = 0..weights.o.rows();
        kernels.linear(input, &weights.o, all, None, Write::Add, &mut layer.mid);
        kernels.normed_input((&layer.mid, &weights.mlp_norm, eps), &weights.gate_up, norm, input);
    }

    /// Queries, keys and values of the normed rows in `input`, rotated to their positions.
    fn project_qkv(
        &self,
        kernels: &Kernels,
        weights: &LayerWeights,
        input: &Input,
        positions: &[u32],
        layer: &mut LayerTape,
    ) {
        let (q, kv) = (self.q_width(), self.kv_width());
        let LayerTape { q: q_out, k: k_out, v: v_out, q_in, k_in, .. } = layer;
        let (q_to, k_to) = match &weights.qk_norm {
            None => (&mut *q_out, &mut *k_out),
            Some(_) => (&mut *q_in, &mut *k_in),
        };
        let part = |rows: std::ops::Range<usize>, out| {
            let bias = weights.qkv_bias.as_ref().map(|bias| &bias[rows.clone()]);
            Part { rows, bias, out }
        };
        let parts = [part(0..q, q_to), part(q..q + kv, k_to), part(q + kv..q + 2 * kv, v_out)];
        kernels.linear_parts(input, &weights.qkv, parts);
        if let Some((q_norm, k_norm)) = &weights.qk_norm {
            kernels.rms_norm(q_in, q_norm, self.config.rms_eps, q_out);
            kernels.rms_norm(k_in, k_norm, self.config.rms_eps, k_out);
        }
        kernels.rope(&mut layer.q, self.config.heads, positions, &self.rope);
        kernels.rope(&mut layer.k, self.config.kv_heads, positions, &self.rope);
    }

    /// Norms and rounds the rows `rows` of a pass for the head.
    pub fn head_input(&self, kernels: &Kernels, tape: &Tape, rows: &[usize], out: &mut HeadInput) {
        let hidden = self.config.hidden_size;
        out.gathered.clear();
        for row in rows {
            out.gathered.extend_from_slice(&tape.x[row * hidden..(row + 1) * hidden]);
        }
        out.normed.resize(out.gathered.len(), 0.0);
        let eps = self.config.rms_eps;
        kernels.rms_norm(&out.gathered, &self.weights.norm, eps, &mut out.normed);
        kernels.input(&out.normed, self.weights.head(), &mut out.input);
    }
}
