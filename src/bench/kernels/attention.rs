//! Attention over the paged cache: decoding, prompts, and the backward pass; of one layer.

use kernels::{Attention, AttnBackward, AttnFamily, AttnScratch, AttnSeq, KvCache};

use super::{Ctx, Shape, Work, numbers};

/// Positions of a block.
const BLOCK: usize = 16;

const DECODE: &str = "attention decode";
const PREFILL: &str = "attention prefill";
const BACKWARD: &str = "attention backward";

/// Sequences, their context, and its last rows that attend.
#[derive(Clone, Copy)]
struct Job {
    count: usize,
    context: usize,
    rows: usize,
}

/// Measures attention of a model.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) {
    for (count, context) in [(1, 512), (1, 4096), (64, 192), (256, 192)] {
        forward(ctx, shape, DECODE, Job { count, context, rows: 1 });
    }
    for (count, context) in [(16, 512), (1, 4096)] {
        forward(ctx, shape, PREFILL, Job { count, context, rows: context });
    }
    backward(ctx, shape, 16, 256);
}

/// Pairs of a row and a position it sees.
fn pairs(job: Job) -> usize {
    (job.context - job.rows..job.context).map(|t| t + 1).sum::<usize>() * job.count
}

fn forward(ctx: &mut Ctx<'_>, shape: &Shape, operation: &'static str, job: Job) {
    if !ctx.wants(operation) {
        return;
    }
    let (kernels, dtype) = (ctx.kernels, ctx.dtype);
    let Job { count, context, rows } = job;
    let (blocks, width) = (context.div_ceil(BLOCK), shape.kv_width());
    let bytes = 2 * count * context * width * dtype.size_bytes();
    // Other layers are what is read in between.
    let layers = shape.copies(bytes).min(64);
    let mut kv = KvCache::new(dtype, layers, count * blocks, BLOCK, shape.kv_heads, shape.head_dim);
    // Block b of sequence s is b * count + s: sequences that grow side by side.
    let tables: Vec<Vec<u32>> =
        (0..count).map(|s| (0..blocks).map(|b| (b * count + s) as u32).collect()).collect();
    let slot = |table: &Vec<u32>, t: usize| table[t / BLOCK] * BLOCK as u32 + (t % BLOCK) as u32;
    let slots: Vec<u32> =
        tables.iter().flat_map(|table| (0..context).map(move |t| slot(table, t))).collect();
    let k = numbers(slots.len() * width);
    (0..layers).for_each(|layer| kernels.kv_write(&mut kv, layer, &k, &k, &slots));
    let seq = |(s, blocks)| AttnSeq { first_row: s * rows, rows, start: context - rows, blocks };
    let seqs: Vec<AttnSeq<'_>> = tables.iter().map(Vec::as_slice).enumerate().map(seq).collect();
    let q = numbers(count * rows * shape.q_width());
    let (mut out, mut scratch) = (vec![0.0; q.len()], AttnScratch::new());
    let scale = 1.0 / (shape.head_dim as f32).sqrt();
    let mut layer = 0;
    let of = format!("{count} x {rows} rows at {context}");
    let work = Work { bytes, flop: 4 * pairs(job) * shape.q_width() };
    ctx.time((operation, shape, of), work, || {
        let task = Attention { layer, q: &q, seqs: &seqs, heads: shape.heads, scale };
        kernels.attention(&kv, task, &mut out, &mut scratch);
        layer = (layer + 1) % layers;
    });
}

fn backward(ctx: &mut Ctx<'_>, shape: &Shape, count: usize, len: usize) {
    if !ctx.wants(BACKWARD) {
        return;
    }
    let (kernels, dtype, rows) = (ctx.kernels, ctx.dtype, count * len);
    let (q, k) = (numbers(rows * shape.q_width()), numbers(rows * shape.kv_width()));
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), k.clone());
    let families: Vec<AttnFamily<'_>> =
        (0..count).map(|s| AttnFamily { prompt: s * len..(s + 1) * len, branches: &[] }).collect();
    let mut scratch = AttnScratch::new();
    // Queries, their gradients and those of outputs; keys, values and theirs.
    let bytes = 4 * (3 * q.len() + 4 * k.len());
    let pairs = pairs(Job { count, context: len, rows: len });
    let work = Work { bytes, flop: 10 * pairs * shape.q_width() };
    ctx.time((BACKWARD, shape, format!("{count} x {len} rows")), work, || {
        let task = AttnBackward {
            dtype,
            q: &q,
            k: &k,
            v: &k,
            dout: &q,
            families: &families,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            scale: 1.0 / (shape.head_dim as f32).sqrt(),
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        kernels.attention_backward(task, &mut scratch);
    });
}
