//! The products of a decoder: forward, in full and quantised, and both of the backward, with different
//! weights in each call.

use kernels::{Input, Linear, Matrix, Operand, QuantFormat, Scratch, Write};

use super::{Ctx, Shape, Work, numbers};

/// Rows from which there is a backward pass: decoding has none.
const BACKWARD_ROWS: usize = 64;

const FORWARD: &str = "product forward";
const BACKWARD_X: &str = "product backward, inputs";
const BACKWARD_W: &str = "product backward, weights";

/// Quantised weights: operation, bits, group, minimum, zero.
const QUANTISED: [(&str, u32, usize, bool, u8); 5] = [
    ("product forward, q4_0", 4, 32, false, 8),
    ("product forward, q4_k", 4, 32, true, 0),
    ("product forward, q5_0", 5, 32, false, 16),
    ("product forward, q6_k", 6, 16, false, 32),
    ("product forward, q8_0", 8, 32, false, 128),
];

/// Measures all products of a layer.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) {
    let full = [FORWARD, BACKWARD_X, BACKWARD_W].iter().any(|name| ctx.wants(name));
    let products = [
        ("qkv", shape.q_width() + 2 * shape.kv_width(), shape.hidden),
        ("out", shape.hidden, shape.q_width()),
        ("gate+up", 2 * shape.inter, shape.hidden),
        ("down", shape.hidden, shape.inter),
    ];
    for (name, n, k) in products {
        if full {
            let weights = weights(ctx, shape, n, k);
            for m in ctx.rows.iter().copied() {
                one(ctx, shape, (name, m), &weights);
            }
        }
        for (operation, bits, group, minimum, zero) in QUANTISED {
            let format = QuantFormat::new(bits, group, minimum, zero, 0);
            if ctx.wants(operation) {
                quantised(ctx, shape, (operation, name), (format, n, k));
            }
        }
    }
}

/// The forward product with quantised weights, all of them zero: no kernel looks at values.
fn quantised(
    ctx: &mut Ctx<'_>,
    shape: &Shape,
    (operation, name): (&'static str, &str),
    (format, n, k): (QuantFormat, usize, usize),
) {
    let bytes = format.bytes(n, k) as usize;
    let zeros = |_| Linear::Quantised(ctx.kernels.quant_matrix(ctx.dtype, format, n, k));
    let weights: Vec<Linear> = (0..shape.copies(bytes)).map(zeros).collect();
    let kernels = ctx.kernels;
    for m in ctx.rows.iter().copied() {
        let (mut x, mut y) = (Input::new(ctx.dtype), vec![0.0; m * n]);
        kernels.input(&numbers(m * k), &weights[0], &mut x);
        let mut next = weights.iter().cycle();
        let of = format!("{name}, M {m}, N {n}, K {k}");
        ctx.time((operation, shape, of), Work { bytes, flop: 2 * m * n * k }, || {
            let w = next.next().expect("a cycle has no end");
            kernels.linear(&x, w, 0..n, None, Write::Set, &mut y);
        });
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
    let (mut dy, mut scratch) = (Operand::new(dtype), Scratch::new());
    kernels.operand(&numbers(m * n), n, &mut dy);
    if ctx.wants(BACKWARD_X) {
        let mut dx = vec![0.0; m * k];
        let work = Work { bytes: weights[0].bytes(), flop };
        ctx.time((BACKWARD_X, shape, of.clone()), work, || {
            let w = next.next().expect("a cycle has no end");
            kernels.matmul_dx(&dy, w, 0..n, Write::Set, &mut dx, &mut scratch);
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
