//! The forward pass of the decoder (Llama: arXiv 2302.13971; Qwen2: 2407.10671; Qwen3: 2505.09388), out
//! of candle operations that all have a backward.
//!
//! ```text
//! x = embed(ids)
//! for each layer:  x += W_o attention(rope(norm?(W_q n)), rope(norm?(W_k n)), W_v n),  n = rms_norm(x)
//!                  x += W_down (silu(W_gate m) * W_up m),                              m = rms_norm(x)
//! logits = W_head rms_norm(x)
//! ```
//! One sequence at a time; `n` new rows at positions `start..start + n`, which attend to `t = start + n`
//! keys. Norms, rotation, softmax, logits and the residual stream are f32; with bf16, the operands of
//! products and the keys and values are rounded. Leaves out sliding windows and any fused operation.

use candle_core::{D, DType, Device, Result, Tensor};
use engine::ModelConfig;

use crate::pool::Kv;

/// The tensors of one layer. `H` hidden, `I` intermediate, `d` head size.
struct Layer {
    /// `[H]`.
    attn_norm: Tensor,
    /// `[heads d, H]`, `[kv_heads d, H]` twice.
    qkv: [Tensor; 3],
    /// `[heads d]`, `[kv_heads d]` twice; Qwen2's.
    qkv_bias: Option<[Tensor; 3]>,
    /// `[d]` each; Qwen3's.
    qk_norm: Option<[Tensor; 2]>,
    /// `[H, heads d]`.
    o: Tensor,
    /// `[H]`.
    mlp_norm: Tensor,
    /// `[I, H]`.
    gate: Tensor,
    up: Tensor,
    /// `[H, I]`.
    down: Tensor,
}

/// The decoder over tensors that are variables (their use is recorded) or detached views of them.
pub(crate) struct Net {
    config: ModelConfig,
    dtype: DType,
    inv_freq: Vec<f32>,
    /// `[V, H]`.
    embed: Tensor,
    layers: Vec<Layer>,
    /// `[H]`.
    norm: Tensor,
    /// `[V, H]`; the embedding where it is tied.
    head: Tensor,
}

/// What depends on positions only, made once for all layers of a pass.
struct Positions {
    /// `[n, 1, d / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// `[n, t]`: 0 where a row may look, minus infinity elsewhere; `None` for a single row.
    mask: Option<Tensor>,
}

impl Net {
    /// A decoder that computes in `dtype` (f32 or bf16), over the tensors that `tensor` has by name.
    pub(crate) fn new(config: &ModelConfig, dtype: DType, tensor: &dyn Fn(&str) -> Tensor) -> Self {
        let layer = |l: usize| {
            let part = |part: &str| tensor(&format!("model.layers.{l}.{part}"));
            let projections =
                |kind: &str| ["q", "k", "v"].map(|p| part(&format!("self_attn.{p}_proj.{kind}")));
            let norms = || ["q", "k"].map(|p| part(&format!("self_attn.{p}_norm.weight")));
            Layer {
                attn_norm: part("input_layernorm.weight"),
                qkv: projections("weight"),
                qkv_bias: config.qkv_bias.then(|| projections("bias")),
                qk_norm: config.qk_norm.then(norms),
                o: part("self_attn.o_proj.weight"),
                mlp_norm: part("post_attention_layernorm.weight"),
                gate: part("mlp.gate_proj.weight"),
                up: part("mlp.up_proj.weight"),
                down: part("mlp.down_proj.weight"),
            }
        };
        let embed = tensor("model.embed_tokens.weight");
        let head = if config.tied_embeddings { embed.clone() } else { tensor("lm_head.weight") };
        Self {
            config: config.clone(),
            dtype,
            inv_freq: config.inv_freq(),
            embed,
            layers: (0..config.layers).map(layer).collect(),
            norm: tensor("model.norm.weight"),
            head,
        }
    }

    /// Format of products, keys and values.
    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[n, H]`: normed hidden states of `tokens`, the first of which is at position `start`. With paged
    /// KV, writes their keys and values there.
    pub(crate) fn hidden(&self, tokens: &[u32], start: usize, kv: &Kv<'_>) -> Result<Tensor> {
        let device = self.embed.device();
        let at = self.positions(tokens.len(), start, device)?;
        let mut x = self.round(&self.embed.index_select(&Tensor::new(tokens, device)?, 0)?)?;
        for (l, layer) in self.layers.iter().enumerate() {
            let normed = self.rms_norm(&x, &layer.attn_norm)?;
            let [q, k, v] = self.project(layer, &normed, &at)?;
            let (k, v) = kv.exchange(l, &k, &v)?;
            let mixed = self.attention(&q, &k, &v, at.mask.as_ref())?;
            x = (x + self.product(&mixed, &layer.o)?)?;
            let normed = self.rms_norm(&x, &layer.mlp_norm)?;
            let gate = self.product(&normed, &layer.gate)?.silu()?;
            let act = (gate * self.product(&normed, &layer.up)?)?;
            x = (x + self.product(&act, &layer.down)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// `[n, V]`: f32 logits of hidden states.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.round(hidden)?.matmul(&self.round(&self.head)?.t()?)
    }

    fn positions(&self, rows: usize, start: usize, device: &Device) -> Result<Positions> {
        let half = self.inv_freq.len();
        let angles: Vec<f64> = (start..start + rows)
            .flat_map(|p| self.inv_freq.iter().map(move |f| f64::from(p as f32 * f)))
            .collect();
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|a| f(*a) as f32).collect();
            Tensor::from_vec(values, (rows, 1, half), device)
        };
        let mask = (rows > 1).then(|| causal_mask(rows, start, device)).transpose()?;
        Ok(Positions { cos: table(f64::cos)?, sin: table(f64::sin)?, mask })
    }

    /// Queries `[n, heads, d]`, keys and values `[n, kv_heads, d]`; keys and values in the compute format.
    fn project(&self, layer: &Layer, x: &Tensor, at: &Positions) -> Result<[Tensor; 3]> {
        let (rows, d) = (x.dim(0)?, self.config.head_dim);
        let heads = [self.config.heads, self.config.kv_heads, self.config.kv_heads];
        let part = |i: usize| {
            let y = self.product(x, &layer.qkv[i])?;
            let y = match &layer.qkv_bias {
                Some(bias) => y.broadcast_add(&self.round(&bias[i])?)?,
                None => y,
            };
            y.reshape((rows, heads[i], d))
        };
        let rotated = |i: usize| {
            let y = part(i)?;
            let y = match &layer.qk_norm {
                Some(weights) => self.rms_norm(&y, &weights[i])?,
                None => y,
            };
            rope(&y, at)
        };
        let (q, k, v) = (rotated(0)?, rotated(1)?, part(2)?);
        Ok([q, k.to_dtype(self.dtype)?, v.to_dtype(self.dtype)?])
    }

    /// `[n, heads d]`: softmax(q k^T / sqrt(d)) v. Query heads of a group share their key head, so they
    /// are rows of one product.
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let (rows, keys) = (q.dim(0)?, k.dim(0)?);
        let group = heads / kv_heads * rows;
        let by_head = |x: &Tensor| x.to_dtype(DType::F32)?.transpose(0, 1)?.contiguous();
        let q = by_head(q)?.reshape((kv_heads, group, head_dim))?;
        let scale = 1.0 / (head_dim as f64).sqrt();
        let scores = (q.matmul(&by_head(k)?.t()?)? * scale)?.reshape((heads, rows, keys))?;
        let scores = match mask {
            Some(mask) => scores.broadcast_add(mask)?,
            None => scores,
        };
        let weights = softmax(&scores)?.reshape((kv_heads, group, keys))?;
        let mixed = weights.matmul(&by_head(v)?)?.reshape((heads, rows, head_dim))?;
        mixed.transpose(0, 1)?.contiguous()?.reshape((rows, heads * head_dim))
    }

    /// `x W^T` in f32 or over bf16 operands; `x` is `[n, K]`, `w` `[N, K]`.
    ///
    /// On the CPU candle widens bf16 operands and rounds the result; widening here spares the rounding.
    fn product(&self, x: &Tensor, w: &Tensor) -> Result<Tensor> {
        if x.device().is_cpu() {
            return self.round(x)?.matmul(&self.round(w)?.t()?);
        }
        let y = x.to_dtype(self.dtype)?.matmul(&w.to_dtype(self.dtype)?.t()?)?;
        y.to_dtype(DType::F32)
    }

    /// `x` as f32, with only values that the compute format has.
    fn round(&self, x: &Tensor) -> Result<Tensor> {
        x.to_dtype(self.dtype)?.to_dtype(DType::F32)
    }

    /// `w x / sqrt(mean(x^2) + eps)` over the last dimension.
    fn rms_norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean + f64::from(self.config.rms_eps))?.sqrt()?;
        x.broadcast_div(&scale)?.broadcast_mul(&self.round(weight)?)
    }
}

/// Rotates the pairs `(i, i + d/2)` of each head of `x`, `[n, heads, d]`.
fn rope(x: &Tensor, at: &Positions) -> Result<Tensor> {
    let half = x.dim(D::Minus1)? / 2;
    let (a, b) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
    let first = (a.broadcast_mul(&at.cos)? - b.broadcast_mul(&at.sin)?)?;
    let second = (b.broadcast_mul(&at.cos)? + a.broadcast_mul(&at.sin)?)?;
    Tensor::cat(&[first, second], D::Minus1)
}

fn causal_mask(rows: usize, start: usize, device: &Device) -> Result<Tensor> {
    let keys = start + rows;
    let may = |row: usize, key: usize| if key <= start + row { 0.0 } else { f32::NEG_INFINITY };
    let values: Vec<f32> =
        (0..rows).flat_map(|row| (0..keys).map(move |key| may(row, key))).collect();
    Tensor::from_vec(values, (rows, keys), device)
}

/// Softmax over the last dimension. It does not depend on what is subtracted, so the maximum needs no
/// gradient.
fn softmax(x: &Tensor) -> Result<Tensor> {
    let weights = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)
}

/// Log-softmax over the last dimension.
pub(crate) fn log_softmax(x: &Tensor) -> Result<Tensor> {
    let shifted = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
    shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
}
