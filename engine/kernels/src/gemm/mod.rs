//! Matrix products, forward and both of the backward: `y = x W^T`, `dx = dy W`, `dW = dy^T x`.
//!
//! An output is always one chain over the reduced index in ascending order, whatever the shape of
//! the rest, the blocking and the number of threads: within a level its bits depend on its own row
//! of the left operand and its own weights only. Sums are in f32. Quantised weights are multiplied
//! here where they are expanded to bf16 first, else in `quant`. Leaves out the transposed product of two
//! activations (attention has its own kernels).

pub(crate) mod amx;
mod avx2;
mod avx512;
pub(crate) mod buffer;
pub(crate) mod convert;
mod gated;
mod operand;
pub(crate) mod pack;
mod portable;
mod product;
mod reference;

use std::ops::Range;

pub use operand::Operand;

use crate::split::whole_rows;
use crate::{Dtype, Kernels, Level, Linear, Matrix, QuantMatrix};
use buffer::WORDS;
use product::Product;

/// What happens to the values that were in an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// They are replaced.
    Set,
    /// The result is added to them.
    Add,
}

impl Write {
    /// Writes one value.
    #[inline(always)]
    pub(crate) fn apply(self, target: &mut f32, value: f32) {
        match self {
            Self::Set => *target = value,
            Self::Add => *target += value,
        }
    }
}

/// A range of a product's weights, and where its outputs go.
pub struct Part<'a> {
    /// Rows of the weights, from a multiple of 16 on.
    pub rows: Range<usize>,
    /// One number for each of them.
    pub bias: Option<&'a [f32]>,
    /// `[M, rows.len()]`.
    pub out: &'a mut [f32],
}

/// Reusable memory of the backward products: the right operand, transposed, and of the left one what each
/// thread is at.
pub struct Scratch {
    left: Vec<Operand>,
    right: Matrix,
}

impl Scratch {
    /// Empty; grows to what the largest product needs.
    pub fn new() -> Self {
        Self { left: Vec::new(), right: Matrix::zeros(Dtype::F32, 0, 0) }
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Kernels {
    /// Rounds `x` `[rows, cols]` to the format of `out`, as the left operand of products.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows.
    pub fn operand(&self, x: &[f32], cols: usize, out: &mut Operand) {
        let rows = whole_rows(x.len(), cols);
        let dtype = out.dtype();
        out.reshape(dtype, rows, cols);
        let stride = out.stride();
        let lines = out.disjoint();
        self.split_rows(rows, cols, &|range| {
            // SAFETY: every row belongs to one task.
            let target = unsafe { lines.part(range.start * stride, range.end * stride) };
            let values = &x[range.start * cols..range.end * cols];
            pack::pack_rows(self.isa, dtype, values, cols, stride, target);
        });
    }

    /// [`Kernels::operand`] of several arrays of as many rows, side by side.
    ///
    /// # Panics
    /// When they are not a whole number of rows of `cols`, or not equally many.
    pub fn operand_beside<const N: usize>(&self, parts: [(&[f32], usize); N], out: &mut Operand) {
        let cols = parts.iter().map(|(_, cols)| cols).sum();
        let rows = parts.first().map_or(0, |(x, cols)| whole_rows(x.len(), *cols));
        for (x, cols) in &parts {
            assert_eq!(x.len(), rows * cols, "values against {rows} rows of {cols}");
        }
        let out = out.rounded_rows(rows, cols);
        self.split_rows(rows, cols, &|range| {
            let mut whole = Vec::with_capacity(cols);
            for row in range {
                whole.clear();
                parts
                    .iter()
                    .for_each(|(x, cols)| whole.extend_from_slice(&x[row * cols..][..*cols]));
                // SAFETY: every row belongs to one task.
                unsafe { out.set(self.isa, row, &whole) };
            }
        });
    }

    /// `out[m, j] = sum_k x[m, k] w[rows.start + j, k] + bias[j]`, set or added.
    ///
    /// `x` is `[M, K]`, `out` `[M, rows.len()]`; a range of `w` gives the bits of the whole.
    ///
    /// # Panics
    /// When formats or shapes do not agree or `rows` does not start at a multiple of 16.
    pub fn matmul(
        &self,
        x: &Operand,
        w: &Matrix,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        write: Write,
        out: &mut [f32],
    ) {
        self.matmul_parts(x, w, write, [Part { rows, bias, out }]);
    }

    /// [`Kernels::matmul`] with several ranges of the weights as one operation.
    ///
    /// # Panics
    /// As there.
    pub(crate) fn matmul_parts<const N: usize>(
        &self,
        x: &Operand,
        w: &Matrix,
        write: Write,
        parts: [Part<'_>; N],
    ) {
        assert_eq!(x.dtype(), w.dtype(), "format of the left operand against the weights'");
        assert_eq!(x.cols(), w.cols(), "columns of the left operand against the weights'");
        check_parts(x, w.rows(), &parts);
        if self.level() == Level::Reference {
            return parts.into_iter().for_each(|Part { rows, bias, out }| {
                reference::matmul(x, w, rows, bias, write, out);
            });
        }
        let products = parts.map(|Part { rows, bias, out }| {
            (Product { bias, write, ..Product::new(x, w, rows) }, out)
        });
        Product::run_all(self, products);
    }

    /// Whether products with quantised weights are, in this format, those of the same weights in full,
    /// which are expanded as they are multiplied.
    pub fn expands(&self, dtype: Dtype) -> bool {
        product::tiles(self.isa, dtype).is_some()
    }

    /// [`Kernels::matmul_parts`] with quantised weights, where the kernels expand them.
    pub(crate) fn matmul_stored<const N: usize>(
        &self,
        x: &Operand,
        w: &QuantMatrix,
        write: Write,
        parts: [Part<'_>; N],
    ) {
        assert!(self.expands(x.dtype()), "weights that are not expanded");
        check_parts(x, w.rows(), &parts);
        let products = parts.map(|Part { rows, bias, out }| {
            (Product { bias, write, ..Product::of_stored(x, w, rows) }, out)
        });
        Product::run_all(self, products);
    }

    /// Sets `out` to the rounded `silu(g) * u` of `[g | u] = x W^T`, to the bits of [`Kernels::matmul`],
    /// [`Kernels::swiglu`] and [`Kernels::operand`], and `kept` to the rounded `[g | u]`, without writing g
    /// and u anywhere else; `false`, and nothing done, where no kernel does so.
    pub(crate) fn matmul_swiglu(
        &self,
        x: &Operand,
        w: &Linear,
        kept: Option<&mut Operand>,
        out: &mut Operand,
    ) -> bool {
        let product = match w {
            Linear::Full(w) => Product::new(x, w, 0..w.rows()),
            Linear::Quantised(w) if self.expands(x.dtype()) => {
                Product::of_stored(x, w, 0..w.rows())
            }
            Linear::Quantised(_) => return false,
        };
        match product.gates(self.isa) {
            Some(gates) if x.rows() > 0 => product.run_gated(self, gates, kept, out),
            _ => return false,
        }
        true
    }

    /// `dx[m, k] = sum_j dy[m, j] w[rows.start + j, k]`, set or added.
    ///
    /// `dy` is `[M, rows.len()]` in the format of `w`, `dx` `[M, K]`.
    ///
    /// # Panics
    /// When formats or shapes do not agree or `rows` does not start at a multiple of 16.
    pub fn matmul_dx(
        &self,
        dy: &Operand,
        w: &Matrix,
        rows: Range<usize>,
        write: Write,
        dx: &mut [f32],
        scratch: &mut Scratch,
    ) {
        check_range(w.rows(), &rows);
        assert_eq!(dy.dtype(), w.dtype(), "format of the left operand against the weights'");
        assert_eq!(dy.cols(), rows.len(), "columns of the left operand against the range");
        let (m, k) = (dy.rows(), w.cols());
        assert_eq!(dx.len(), m * k, "output length against {m} rows of {k}");
        if self.level() == Level::Reference {
            return reference::matmul_dx(dy, w, rows, write, dx);
        }
        pack::transpose_weights(self, w, rows, &mut scratch.right);
        Product { write, ..Product::new(dy, &scratch.right, 0..k) }.run(self, dx);
    }

    /// `dw[j, k] = sum_m dy[m, j] x[m, k]`, set or added.
    ///
    /// `dy` is `[M, n]` in the format of `x`, `x` `[M, K]`, `dw` `[n, K]`, row-major f32.
    ///
    /// # Panics
    /// When formats or shapes do not agree.
    pub fn matmul_dw(
        &self,
        dy: &Operand,
        x: &Operand,
        write: Write,
        dw: &mut [f32],
        scratch: &mut Scratch,
    ) {
        assert_eq!(dy.dtype(), x.dtype(), "format of the gradient against the inputs'");
        assert_eq!(dy.rows(), x.rows(), "rows of the gradient against the inputs'");
        let (n, k) = (dy.cols(), x.cols());
        assert_eq!(dw.len(), n * k, "output length against {n} rows of {k}");
        if self.level() == Level::Reference {
            return reference::matmul_dw(dy, x, write, dw);
        }
        pack::transpose_rows(self, x, &mut scratch.right);
        product::transposed(self, dy, (&scratch.right, write), dw, &mut scratch.left);
    }
}

/// Checks parts of a product of `x` with so many weight rows.
fn check_parts(x: &Operand, weight_rows: usize, parts: &[Part<'_>]) {
    for Part { rows, bias, out } in parts {
        check_range(weight_rows, rows);
        let n = rows.len();
        assert_eq!(out.len(), x.rows() * n, "output length against {} rows of {n}", x.rows());
        let biases = bias.map_or(n, <[f32]>::len);
        assert_eq!(biases, n, "bias length against {n} outputs");
    }
}

fn check_range(weight_rows: usize, rows: &Range<usize>) {
    let (start, end) = (rows.start, rows.end);
    assert!(start <= end && end <= weight_rows, "rows {start}..{end} of {weight_rows}");
    assert!(start.is_multiple_of(WORDS), "range start {start} is not a multiple of {WORDS}");
}
