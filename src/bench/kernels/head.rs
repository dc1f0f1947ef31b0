//! The head: logits, their softmax's statistics and the draw, as decoding does it; and fused with the
//! log-probability of a target, as training does it.

use kernels::{HeadBackward, HeadScratch, Operand, TokenStats, Write};

use super::products::weights;
use super::{Ctx, Shape, Work, numbers};

/// Rows of a decode step.
const DECODE_ROWS: usize = 64;
/// Rows of a training pass: more than enough for the multiplications to be what takes the time.
const TRAIN_ROWS: usize = 256;

const PRODUCT: &str = "head product";
const STATS: &str = "softmax statistics";
const SAMPLE: &str = "sampling";
const TRAIN: &str = "head with log-probability";
const BACKWARD: &str = "head backward";

/// Measures the head of a model.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) {
    decode(ctx, shape);
    train(ctx, shape);
}

fn decode(ctx: &mut Ctx<'_>, shape: &Shape) {
    let (kernels, vocab) = (ctx.kernels, shape.vocab);
    if ctx.wants(PRODUCT) {
        let weights = weights(ctx, shape, vocab, shape.hidden);
        for m in [1, DECODE_ROWS] {
            let mut next = weights.iter().cycle();
            let mut x = Operand::new(ctx.dtype);
            kernels.operand(&numbers(m * shape.hidden), shape.hidden, &mut x);
            let mut logits = vec![0.0; m * vocab];
            let work = Work { bytes: weights[0].bytes(), flop: 2 * m * vocab * shape.hidden };
            let of = format!("M {m}, N {vocab}, K {}", shape.hidden);
            ctx.time((PRODUCT, shape, of), work, || {
                let w = next.next().expect("a cycle has no end");
                kernels.matmul(&x, w, 0..vocab, None, Write::Set, &mut logits);
            });
        }
    }
    let logits = numbers(DECODE_ROWS * vocab);
    let (scale, targets) = (vec![1.0; DECODE_ROWS], vec![7; DECODE_ROWS]);
    let of = format!("{DECODE_ROWS} rows of {vocab}");
    if ctx.wants(STATS) {
        let mut stats = vec![TokenStats::default(); DECODE_ROWS];
        let work = Work { bytes: 4 * logits.len(), flop: 5 * logits.len() };
        ctx.time((STATS, shape, of.clone()), work, || {
            kernels.softmax_stats(&logits, &scale, Some(&targets), &mut stats);
        });
    }
    if ctx.wants(SAMPLE) {
        let uniform: Vec<f64> = (0..DECODE_ROWS).map(|i| i as f64 / DECODE_ROWS as f64).collect();
        let mut drawn = vec![0; DECODE_ROWS];
        let work = Work { bytes: 4 * logits.len(), flop: 3 * logits.len() };
        ctx.time((SAMPLE, shape, of), work, || {
            kernels.sample(&logits, &scale, &uniform, &mut drawn);
        });
    }
}

fn train(ctx: &mut Ctx<'_>, shape: &Shape) {
    if !(ctx.wants(TRAIN) || ctx.wants(BACKWARD)) {
        return;
    }
    let (kernels, rows, hidden) = (ctx.kernels, TRAIN_ROWS, shape.hidden);
    let weights = weights(ctx, shape, shape.vocab, hidden);
    let w = &weights[0];
    let mut h = Operand::new(ctx.dtype);
    kernels.operand(&numbers(rows * hidden), hidden, &mut h);
    let targets: Vec<u32> = (0..rows).map(|i| (i * 31 % shape.vocab) as u32).collect();
    let (mut stats, mut scratch) = (vec![TokenStats::default(); rows], HeadScratch::new());
    kernels.head_forward(&h, w, &targets, 1.0, &mut stats, &mut scratch);
    let of = format!("{rows} rows, {} words, K {hidden}", shape.vocab);
    let flop = 2 * rows * shape.vocab * hidden;
    if ctx.wants(TRAIN) {
        let work = Work { bytes: w.bytes(), flop };
        ctx.time((TRAIN, shape, of.clone()), work, || {
            kernels.head_forward(&h, w, &targets, 1.0, &mut stats, &mut scratch);
        });
    }
    if ctx.wants(BACKWARD) {
        let (mut dh, mut dw) = (vec![0.0; rows * hidden], vec![0.0; shape.vocab * hidden]);
        let dlogp = numbers(rows);
        // Logits again, then both products; the gradient read and written.
        let work = Work { bytes: w.bytes() + 2 * 4 * dw.len(), flop: 3 * flop };
        ctx.time((BACKWARD, shape, of), work, || {
            let io = HeadBackward {
                h: &h,
                w,
                targets: &targets,
                inv_temperature: 1.0,
                stats: &stats,
                dlogp: &dlogp,
                dentropy: None,
                dh: &mut dh,
                dw: &mut dw,
            };
            kernels.head_backward(io, &mut scratch);
        });
    }
}
