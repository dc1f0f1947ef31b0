//! Products with weights that stay quantised: small integers with a scale for each group.
//!
//! ```text
//! w[j, k] = scale[j, g] (q[j, k] - zero) + minimum[j, g]            g = k / group
//! x[m, k] = xs[m, k / 32] xq[m, k]                                  xq: 16-bit integers
//! y[m, j] = sum over g, ascending, of
//!               scale xs (sum_k xq q - zero sum_k xq)  +  minimum xs sum_k xq
//! ```
//!
//! The sums within a group are of integers and so exact in any order; the groups are joined by fused
//! multiply-adds in ascending order. A value's bits therefore depend on its own row and its own weights
//! only, and are the same at every level. Activations lose less than 2^-15 of the largest of their 32,
//! a hundredth of what rounding to bf16 costs. Every format of ggml's blocks and K blocks fits: see
//! [`QuantFormat`]. Leaves out the backward products: training needs the weights in full.

mod avx2;
mod avx512;
pub(crate) mod expand;
mod matrix;
mod operand;
mod product;
#[cfg(test)]
mod tests;

use crate::{Dtype, Kernels};
use matrix::Order;
pub use matrix::{QuantFormat, QuantMatrix, QuantRow, ScaleOutOfRange};
pub use operand::QuantOperand;

impl Kernels {
    /// Quantised weights, all zero, laid out for products with operands of format `dtype`.
    ///
    /// # Panics
    /// When `cols` is not a multiple of 32.
    pub fn quant_matrix(
        &self,
        dtype: Dtype,
        format: QuantFormat,
        rows: usize,
        cols: usize,
    ) -> QuantMatrix {
        let order = if self.expands(dtype) { Order::Rows } else { Order::Pairs };
        QuantMatrix::in_order(order, format, rows, cols)
    }
}

/// Inputs that share an activation scale.
pub(crate) const X_GROUP: usize = 32;
/// Inputs of the finest group of weights; sums of activations are kept for each.
pub(crate) const FINE_GROUP: usize = 16;
