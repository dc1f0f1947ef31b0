//! The definition of the three products: naive loops over row-major views, one thread.
//!
//! ```text
//! forward  out[m, n] (+)= sum_k x[m, k] w[n, k] + bias[n]      k ascending
//! dx       dx[m, k]  (+)= sum_n dy[m, n] w[n, k]               n ascending
//! dw       dw[n, k]  (+)= sum_m round(dy[m, n]) x[m, k]        m ascending
//! ```
//!
//! All sums are in f32, of operands already rounded to the compute format.

use std::ops::Range;

use super::{Operand, Write};
use crate::Matrix;

pub(super) fn matmul(
    x: &Operand,
    w: &Matrix,
    rows: Range<usize>,
    bias: Option<&[f32]>,
    write: Write,
    out: &mut [f32],
) {
    for m in 0..x.rows() {
        for (j, n) in rows.clone().enumerate() {
            let mut sum = 0.0;
            for k in 0..x.cols() {
                sum += x.get(m, k) * w.get(n, k);
            }
            let sum = bias.map_or(sum, |bias| sum + bias[j]);
            write.apply(&mut out[m * rows.len() + j], sum);
        }
    }
}

pub(super) fn matmul_dx(
    dy: &Operand,
    w: &Matrix,
    rows: Range<usize>,
    write: Write,
    dx: &mut [f32],
) {
    for m in 0..dy.rows() {
        for k in 0..w.cols() {
            let mut sum = 0.0;
            for (j, n) in rows.clone().enumerate() {
                sum += dy.get(m, j) * w.get(n, k);
            }
            write.apply(&mut dx[m * w.cols() + k], sum);
        }
    }
}

pub(super) fn matmul_dw(dy: &Operand, x: &Operand, write: Write, dw: &mut [f32]) {
    let (rows, outputs, cols) = (x.rows(), dy.cols(), x.cols());
    for n in 0..outputs {
        for k in 0..cols {
            let mut sum = 0.0;
            for m in 0..rows {
                sum += dy.get(m, n) * x.get(m, k);
            }
            write.apply(&mut dw[n * cols + k], sum);
        }
    }
}
