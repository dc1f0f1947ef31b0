//! The backward pass of the decoder: what [`Decoder::forward`] did, in reverse.
//!
//! Gradients are summed in f32, row-major, one buffer per parameter. A layer's norms, activations and
//! rounded operands are computed again from its tape rather than kept.

use kernels::{
    AttnBackward, AttnFamily, AttnScratch, HeadBackward, HeadScratch, Kernels, KvCache, Operand,
    RmsNormBackward, Scratch, TokenStats, Write,
};

use super::forward::{Batch, Decoder, HeadInput};
use super::tape::{Keep, LayerTape, Tape};
use super::weights::LayerWeights;
use crate::model::ModelConfig;
use crate::model::{ParamSpec, param_specs};

/// Sums of gradients, one buffer per parameter in the order of [`param_specs`], and the backward
/// pass's own buffers.
pub struct Gradients {
    specs: Vec<ParamSpec>,
    sums: Vec<Vec<f32>>,
    buffers: Buffers,
}

struct Buffers {
    scratch: Scratch,
    head_scratch: HeadScratch,
    attn: AttnScratch,
    /// The left operand of a product of the forward pass, and the gradients of its outputs.
    operand: Operand,
    dy: Operand,
    /// `[M, 2 I]`.
    d_gate_up: Operand,
    /// `[M, H]`.
    d_norm: Vec<f32>,
    /// `[M, I]`.
    d_act: Vec<f32>,
    /// `[M, heads d]` twice, `[M, kv_heads d]` twice, and what the norms of Qwen3 need.
    d_attn: Vec<f32>,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
    d_in: Vec<f32>,
}

/// Where the parameters of a layer start, and which of the optional ones exist.
struct LayerIndex {
    attn_norm: usize,
    qkv: usize,
    qkv_bias: Option<usize>,
    qk_norm: Option<usize>,
    o: usize,
}

impl LayerIndex {
    fn new(config: &ModelConfig, layer: usize) -> Self {
        let (bias, norm) = (usize::from(config.qkv_bias), 2 * usize::from(config.qk_norm));
        // The embedding comes first.
        let attn_norm = 1 + layer * (6 + bias + norm);
        let qkv = attn_norm + 1;
        Self {
            attn_norm,
            qkv,
            qkv_bias: config.qkv_bias.then_some(qkv + 1),
            qk_norm: config.qk_norm.then_some(qkv + 1 + bias),
            o: qkv + 1 + bias + norm,
        }
    }
}

impl Gradients {
    /// Zero sums for a model of this shape.
    pub fn new(config: &ModelConfig, dtype: kernels::Dtype) -> Self {
        let specs = param_specs(config);
        let sums = specs.iter().map(|spec| vec![0.0; spec.len()]).collect();
        let buffers = Buffers {
            scratch: Scratch::default(),
            head_scratch: HeadScratch::default(),
            attn: AttnScratch::new(),
            operand: Operand::new(dtype),
            dy: Operand::new(dtype),
            d_gate_up: Operand::new(dtype),
            d_norm: Vec::new(),
            d_act: Vec::new(),
            d_attn: Vec::new(),
            dq: Vec::new(),
            dk: Vec::new(),
            dv: Vec::new(),
            d_in: Vec::new(),
        };
        Self { specs, sums, buffers }
    }

    /// The parameters, in order.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The sums, in the order of the parameters.
    pub fn sums(&self) -> &[Vec<f32>] {
        &self.sums
    }

    /// Sets every sum to zero.
    pub fn clear(&mut self) {
        self.sums.iter_mut().for_each(|sum| sum.fill(0.0));
    }
}

/// The head's part of a backward pass: which rows entered it and what the loss wants of them.
pub struct HeadGradient<'a> {
    /// Rows of the pass whose next token is a target; `R` of them.
    pub rows: &'a [usize],
    /// Those rows, as [`Decoder::head_input`] left them.
    pub input: &'a HeadInput,
    /// `[R]` target tokens.
    pub targets: &'a [u32],
    /// One over the temperature.
    pub inv_temperature: f32,
    /// `[R]`, from the forward pass of the head.
    pub stats: &'a [TokenStats],
    /// `[R]`: derivative of the loss by each log-probability.
    pub dlogp: &'a [f32],
    /// `[R]`: derivative of the loss by each entropy, if it depends on them.
    pub dentropy: Option<&'a [f32]>,
}

/// A forward pass over whole sequences, as its backward needs it.
pub struct PackedPass<'a> {
    /// Its rows.
    pub batch: &'a Batch<'a>,
    /// The rows of its sequences, which all start at position 0.
    pub families: &'a [AttnFamily<'a>],
    /// The one layer's worth of cache it ran over; layers that run again do so over it too.
    pub kv: &'a mut KvCache,
}

impl Decoder {
    /// Adds the gradient of a loss that depends on the head's log-probabilities to `grads`. `tape` is
    /// that of the forward pass.
    ///
    /// # Panics
    /// When the tape kept one layer only, or lengths disagree.
    pub fn backward(
        &self,
        kernels: &Kernels,
        pass: PackedPass<'_>,
        head: &HeadGradient<'_>,
        tape: &mut Tape,
        grads: &mut Gradients,
    ) {
        assert!(tape.keep() != Keep::OneLayer, "backward needs a tape that kept the layers");
        let PackedPass { batch, families, kv } = pass;
        let mut dx = std::mem::take(&mut tape.x);
        self.head_backward(kernels, head, &mut dx, grads);
        for l in (0..self.config.layers).rev() {
            let index = LayerIndex::new(&self.config, l);
            let weights = &self.weights.layers[l];
            let layer = match tape.inputs.get(l) {
                None => &tape.layers[l],
                Some(input) => {
                    let layer = &mut tape.layers[0];
                    kernels.copy(&mut layer.x, input);
                    let to = (&mut *layer, &mut tape.work);
                    self.layer(kernels, weights, batch, (&mut *kv, 0), to);
                    layer
                }
            };
            self.mlp_backward(kernels, weights, layer, (&index, &mut dx), grads);
            self.attention_backward(
                kernels,
                weights,
                (layer, batch.positions, families),
                (&index, &mut dx),
                grads,
            );
        }
        kernels.embed_backward(&dx, batch.tokens, &mut grads.sums[0]);
        tape.x = dx;
    }

    /// From the loss to the residual stream: `dx` becomes `[M, H]`, zero for rows outside the head.
    fn head_backward(
        &self,
        kernels: &Kernels,
        head: &HeadGradient<'_>,
        dx: &mut [f32],
        grads: &mut Gradients,
    ) {
        let hidden = self.config.hidden_size;
        // Behind all layers.
        let norm_index = LayerIndex::new(&self.config, self.config.layers).attn_norm;
        let last = grads.sums.len() - 1;
        let head_index = if self.config.tied_embeddings { 0 } else { last };
        let mut dh = vec![0.0; head.input.gathered.len()];
        kernels.head_backward(
            HeadBackward {
                h: head.input.input.full(),
                w: self.weights.head().full(),
                targets: head.targets,
                inv_temperature: head.inv_temperature,
                stats: head.stats,
                dlogp: head.dlogp,
                dentropy: head.dentropy,
                dh: &mut dh,
                dw: &mut grads.sums[head_index],
            },
            &mut grads.buffers.head_scratch,
        );
        let mut d_gathered = vec![0.0; dh.len()];
        kernels.rms_norm_backward(RmsNormBackward {
            x: &head.input.gathered,
            weight: &self.weights.norm,
            eps: self.config.rms_eps,
            dy: &dh,
            dx: &mut d_gathered,
            dweight: &mut grads.sums[norm_index],
        });
        dx.fill(0.0);
        for (row, d) in head.rows.iter().zip(d_gathered.chunks_exact(hidden)) {
            let target = &mut dx[row * hidden..(row + 1) * hidden];
            target.iter_mut().zip(d).for_each(|(t, d)| *t += d);
        }
    }

    /// `x_out = mid + W_down swiglu(W_gate_up rms_norm(mid))`, backwards: `dx` goes from out to mid.
    fn mlp_backward(
        &self,
        kernels: &Kernels,
        weights: &LayerWeights,
        layer: &LayerTape,
        (index, dx): (&LayerIndex, &mut Vec<f32>),
        grads: &mut Gradients,
    ) {
        let (hidden, inter) = (self.config.hidden_size, self.config.intermediate_size);
        let (eps, rows) = (self.config.rms_eps, dx.len() / hidden);
        let (mlp_norm, gate_up, down) = (index.o + 1, index.o + 2, index.o + 3);
        let Gradients { sums, buffers: b, .. } = grads;
        b.d_act.resize(rows * inter, 0.0);
        b.d_norm.resize(rows * hidden, 0.0);
        let s = &mut b.scratch;
        kernels.operand(dx, hidden, &mut b.dy);
        let all = 0..weights.down.rows();
        kernels.matmul_dx(&b.dy, weights.down.full(), all, Write::Set, &mut b.d_act, s);
        let gradients = (&mut b.operand, &mut b.d_gate_up);
        kernels.swiglu_backward(&layer.gate_up, &b.d_act, gradients);
        kernels.matmul_dw(&b.dy, &b.operand, Write::Add, &mut sums[down], s);
        kernels.normed_operand((&layer.mid, &weights.mlp_norm, eps), &mut b.operand);
        kernels.matmul_dw(&b.d_gate_up, &b.operand, Write::Add, &mut sums[gate_up], s);
        let all = 0..weights.gate_up.rows();
        kernels.matmul_dx(&b.d_gate_up, weights.gate_up.full(), all, Write::Set, &mut b.d_norm, s);
        kernels.rms_norm_backward(RmsNormBackward {
            x: &layer.mid,
            weight: &weights.mlp_norm,
            eps,
            dy: &b.d_norm,
            dx,
            dweight: &mut sums[mlp_norm],
        });
    }

    /// `mid = x + W_o attention(..)`, backwards: `dx` goes from mid to x.
    fn attention_backward(
        &self,
        kernels: &Kernels,
        weights: &LayerWeights,
        (layer, positions, families): (&LayerTape, &[u32], &[AttnFamily<'_>]),
        (index, dx): (&LayerIndex, &mut Vec<f32>),
        grads: &mut Gradients,
    ) {
        let (hidden, q, kv) = (self.config.hidden_size, self.q_width(), self.kv_width());
        let rows = dx.len() / hidden;
        let Gradients { sums, buffers: b, .. } = grads;
        b.d_attn.resize(rows * q, 0.0);
        b.dq.resize(rows * q, 0.0);
        b.dk.resize(rows * kv, 0.0);
        b.dv.resize(rows * kv, 0.0);
        let s = &mut b.scratch;
        kernels.operand(dx, hidden, &mut b.dy);
        kernels.operand(&layer.attn, q, &mut b.operand);
        kernels.matmul_dw(&b.dy, &b.operand, Write::Add, &mut sums[index.o], s);
        let all = 0..weights.o.rows();
        kernels.matmul_dx(&b.dy, weights.o.full(), all, Write::Set, &mut b.d_attn, s);
        let task = AttnBackward {
            dtype: self.weights.dtype(),
            q: &layer.q,
            k: &layer.k,
            v: &layer.v,
            dout: &b.d_attn,
            families,
            heads: self.config.heads,
            kv_heads: self.config.kv_heads,
            head_dim: self.config.head_dim,
            scale: self.scale,
            dq: &mut b.dq,
            dk: &mut b.dk,
            dv: &mut b.dv,
        };
        kernels.attention_backward(task, &mut b.attn);
        kernels.rope_backward(&mut b.dq, self.config.heads, positions, &self.rope);
        kernels.rope_backward(&mut b.dk, self.config.kv_heads, positions, &self.rope);
        if let (Some((q_norm, k_norm)), Some(at)) = (&weights.qk_norm, index.qk_norm) {
            let [dq_norm, dk_norm] = &mut sums[at..at + 2] else { unreachable!("two norms") };
            self.head_norm_backward(
                kernels,
                (&layer.q_in, q_norm),
                (&mut b.dq, dq_norm),
                &mut b.d_in,
            );
            self.head_norm_backward(
                kernels,
                (&layer.k_in, k_norm),
                (&mut b.dk, dk_norm),
                &mut b.d_in,
            );
        }
        self.qkv_backward(kernels, (weights, layer), (index, dx), grads);
    }

    /// Turns `dy`, the derivative of a normed query or key, into that of its input.
    fn head_norm_backward(
        &self,
        kernels: &Kernels,
        (x, weight): (&[f32], &[f32]),
        (dy, dweight): (&mut Vec<f32>, &mut Vec<f32>),
        buffer: &mut Vec<f32>,
    ) {
        buffer.clear();
        buffer.resize(dy.len(), 0.0);
        let eps = self.config.rms_eps;
        kernels.rms_norm_backward(RmsNormBackward { x, weight, eps, dy, dx: buffer, dweight });
        dy.copy_from_slice(buffer);
    }

    /// The projections and the norm before attention; reads dq, dk, dv from the buffers.
    fn qkv_backward(
        &self,
        kernels: &Kernels,
        (weights, layer): (&LayerWeights, &LayerTape),
        (index, dx): (&LayerIndex, &mut Vec<f32>),
        grads: &mut Gradients,
    ) {
        let (q, kv) = (self.q_width(), self.kv_width());
        let Gradients { sums, buffers: b, .. } = grads;
        let eps = self.config.rms_eps;
        b.d_norm.resize(dx.len(), 0.0);
        kernels.normed_operand((&layer.x, &weights.attn_norm, eps), &mut b.operand);
        if let Some(bias) = index.qkv_bias {
            let (q_bias, rest) = sums[bias].split_at_mut(q);
            let (k_bias, v_bias) = rest.split_at_mut(kv);
            for (dy, bias) in [(&b.dq, q_bias), (&b.dk, k_bias), (&b.dv, v_bias)] {
                kernels.bias_backward(dy, bias);
            }
        }
        kernels.operand_beside([(&b.dq, q), (&b.dk, kv), (&b.dv, kv)], &mut b.dy);
        let s = &mut b.scratch;
        kernels.matmul_dw(&b.dy, &b.operand, Write::Add, &mut sums[index.qkv], s);
        let all = 0..weights.qkv.rows();
        kernels.matmul_dx(&b.dy, weights.qkv.full(), all, Write::Set, &mut b.d_norm, s);
        kernels.rms_norm_backward(RmsNormBackward {
            x: &layer.x,
            weight: &weights.attn_norm,
            eps,
            dy: &b.d_norm,
            dx,
            dweight: &mut sums[index.attn_norm],
        });
    }
}
