//! The products of a decoder: forward, and both of the backward, with different weights in each call.

use kernels::{Matrix, Operand, Scratch, Write};

use super::{Ctx, Shape, Work, numbers};

/// Rows from which there is a backward pass: decoding has none.
const BACKWARD_ROWS: usize = 64;

const FORWARD: &str = "product forward";
const BACKWARD_X: &str = "product backward, inputs";
const BACKWARD_W: &str = "product backward, weights";

/// Measures all products of a layer.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) {
    if ![FORWARD, BACKWARD_X, BACKWARD_W].iter().any(|name| ctx.wants(name)) {
        return;
    }
    let products = [
        ("qkv", shape.q_width() + 2 * shape.kv_width(), shape.hidden),
        ("out", shape.hidden, shape.q_width()),
        ("gate+up", 2 * shape.inter, shape.hidden),
        ("down", shape.hidden, shape.inter),
    ];
    for (name, n, k) in products {
        let weights = weights(ctx, shape, n, k);
        for m in ctx.rows.iter().copied() {
            one(ctx, shape, (name, m), &weights);
        }
    }
}

/// So many matrices that each is gone from the caches when it comes again.
pub(super) fn weights(ctx: &Ctx<'_>, shape: &Shape, n: usize, k: usize) -> Vec<Matrix> {
    let values = numbers(n * k);
    let copy = |_| {
        let mut w = Matrix::zeros(ctx.dtype, n, k);
        ctx.kernels.load_matrix(&values, &mut w);
        w
    };
    (0..shape.copies(n * k * ctx.dtype.size_bytes())).map(copy).collect()
}

fn one(ctx: &mut Ctx<'_>, shape: &Shape, (name, m): (&str, usize), weights: &[Matrix]) {
    let (kernels, dtype) = (ctx.kernels, ctx.dtype);
    let (n, k) = (weights[0].rows(), weights[0].cols());
    let of = format!("{name}, M {m}, N {n}, K {k}");
    let flop = 2 * m * n * k;
    let mut x = Operand::new(dtype);
    kernels.operand(&numbers(m * k), k, &mut x);
    let mut next = weights.iter().cycle();
    if ctx.wants(FORWARD) {
        let mut y = vec![0.0; m * n];
        let work = Work { bytes: weights[0].bytes(), flop };
        ctx.time((FORWARD, shape, of.clone()), work, || {
            let w = next.next().expect("a cycle has no end");
            kernels.matmul(&x, w, 0..n, None, Write::Set, &mut y);
        });
    }
    if m < BACKWARD_ROWS {
        return;
    }
    let (dy, mut scratch) = (numbers(m * n), Scratch::new());
    if ctx.wants(BACKWARD_X) {
        let mut rounded = Operand::new(dtype);
        kernels.operand(&dy, n, &mut rounded);
        let mut dx = vec![0.0; m * k];
        let work = Work { bytes: weights[0].bytes(), flop };
        ctx.time((BACKWARD_X, shape, of.clone()), work, || {
            let w = next.next().expect("a cycle has no end");
            kernels.matmul_dx(&rounded, w, 0..n, Write::Set, &mut dx, &mut scratch);
        });
    }
    if ctx.wants(BACKWARD_W) {
        let mut dw = vec![0.0; n * k];
        let work = Work { bytes: 2 * 4 * n * k, flop };
        ctx.time((BACKWARD_W, shape, of), work, || {
            kernels.matmul_dw(&dy, &x, Write::Add, &mut dw, &mut scratch);
        });
    }
}
