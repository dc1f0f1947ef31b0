//! What goes over rows or parameters once: norms, rotation, SwiGLU, the cache's writes, the optimizer.
//!
//! Each call takes the next part of more memory than caches hold.

use kernels::{AdamW, KvCache, RopeTable};

use super::{Ctx, Shape, Work, numbers};

/// Rows of a call.
const ROWS: usize = 1024;
/// Parameters of a call of the optimizer.
const PARAMS: usize = 1 << 22;

const NORM: &str = "rms norm";
const ROPE: &str = "rope";
const SWIGLU: &str = "swiglu";
const KV_WRITE: &str = "kv write";
const ADAMW: &str = "adamw";
const NORM_OF_GRADIENT: &str = "gradient norm";

/// Measures them for a model.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) {
    norm(ctx, shape);
    rope(ctx, shape);
    swiglu(ctx, shape);
    kv_write(ctx, shape);
    optimizer(ctx, shape);
}

/// Goes through parts of equal length, from the last to the first again.
struct Parts {
    len: usize,
    count: usize,
    next: usize,
}

impl Parts {
    fn new(shape: &Shape, len: usize) -> Self {
        Self { len, count: shape.copies(4 * len), next: 0 }
    }

    fn all(&self) -> usize {
        self.len * self.count
    }

    fn next(&mut self) -> std::ops::Range<usize> {
        self.next = (self.next + 1) % self.count;
        self.next * self.len..(self.next + 1) * self.len
    }
}

fn norm(ctx: &mut Ctx<'_>, shape: &Shape) {
    if !ctx.wants(NORM) {
        return;
    }
    let (kernels, width) = (ctx.kernels, shape.hidden);
    let mut parts = Parts::new(shape, ROWS * width);
    let (x, mut out) = (numbers(parts.all()), numbers(parts.all()));
    let weight = vec![1.0; width];
    let work = Work { bytes: 2 * 4 * parts.len, flop: 4 * parts.len };
    ctx.time((NORM, shape, format!("{ROWS} rows of {width}")), work, || {
        let part = parts.next();
        kernels.rms_norm(&x[part.clone()], &weight, 1e-5, &mut out[part]);
    });
}

fn rope(ctx: &mut Ctx<'_>, shape: &Shape) {
    if !ctx.wants(ROPE) {
        return;
    }
    let (kernels, width) = (ctx.kernels, shape.q_width());
    let half = shape.head_dim / 2;
    let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / (1.0 + i as f32)).collect();
    let table = RopeTable::new(shape.head_dim, ROWS, &frequencies, 1.0);
    let positions: Vec<u32> = (0..ROWS as u32).collect();
    let mut parts = Parts::new(shape, ROWS * width);
    let mut x = numbers(parts.all());
    let work = Work { bytes: 2 * 4 * parts.len, flop: 3 * parts.len };
    ctx.time((ROPE, shape, format!("{ROWS} rows, {} heads", shape.heads)), work, || {
        kernels.rope(&mut x[parts.next()], shape.heads, &positions, &table);
    });
}

fn swiglu(ctx: &mut Ctx<'_>, shape: &Shape) {
    if !ctx.wants(SWIGLU) {
        return;
    }
    let (kernels, inter) = (ctx.kernels, shape.inter);
    let mut parts = Parts::new(shape, ROWS * 2 * inter);
    let (x, mut out) = (numbers(parts.all()), numbers(parts.all() / 2));
    let work = Work { bytes: 3 * 4 * ROWS * inter, flop: 5 * ROWS * inter };
    ctx.time((SWIGLU, shape, format!("{ROWS} rows of 2 x {inter}")), work, || {
        let part = parts.next();
        let to = part.start / 2..part.end / 2;
        kernels.swiglu(&x[part], inter, &mut out[to]);
    });
}

fn kv_write(ctx: &mut Ctx<'_>, shape: &Shape) {
    if !ctx.wants(KV_WRITE) {
        return;
    }
    let (kernels, dtype, width) = (ctx.kernels, ctx.dtype, shape.kv_width());
    let bytes = 2 * ROWS * width * dtype.size_bytes();
    let layers = shape.copies(bytes).min(256);
    let mut kv = KvCache::new(dtype, layers, ROWS / 16, 16, shape.kv_heads, shape.head_dim);
    let (k, slots) = (numbers(ROWS * width), (0..ROWS as u32).collect::<Vec<_>>());
    // The system hands out the cache's memory when it is first written to.
    (0..layers).for_each(|layer| kernels.kv_write(&mut kv, layer, &k, &k, &slots));
    let mut layer = 0;
    let work = Work { bytes: bytes + 2 * 4 * k.len(), flop: 0 };
    ctx.time((KV_WRITE, shape, format!("{ROWS} rows of 2 x {width}")), work, || {
        kernels.kv_write(&mut kv, layer, &k, &k, &slots);
        layer = (layer + 1) % layers;
    });
}

fn optimizer(ctx: &mut Ctx<'_>, shape: &Shape) {
    let kernels = ctx.kernels;
    let len = PARAMS.min(shape.cold_bytes / 16);
    let mut parts = Parts::new(shape, len);
    let of = format!("{len} parameters");
    if ctx.wants(NORM_OF_GRADIENT) {
        let grads = numbers(parts.all());
        let work = Work { bytes: 4 * len, flop: 2 * len };
        ctx.time((NORM_OF_GRADIENT, shape, of.clone()), work, || {
            std::hint::black_box(kernels.sum_squares(&grads[parts.next()]));
        });
    }
    if ctx.wants(ADAMW) {
        let grads = numbers(parts.all());
        let mut state = [(); 3].map(|()| vec![0.5_f32; parts.all()]);
        let settings = AdamW {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 1,
            grad_scale: 1.0,
        };
        // Master and moments are read and written, the gradient is read.
        let work = Work { bytes: 7 * 4 * len, flop: 14 * len };
        ctx.time((ADAMW, shape, of), work, || {
            let part = parts.next();
            let [weights, m, v] = &mut state;
            let (weights, m, v) =
                (&mut weights[part.clone()], &mut m[part.clone()], &mut v[part.clone()]);
            kernels.adamw(&settings, weights, m, v, &grads[part]);
        });
    }
}
