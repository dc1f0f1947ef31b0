//! A layer's weights, in full or quantised, and products with either.
//!
//! What a model runs with when nothing changes its weights. Training asks for [`Linear::full`]. Leaves
//! out the arithmetic: see `gemm` and `quant`.

use std::ops::Range;

use crate::{Dtype, Kernels, Matrix, Operand, QuantMatrix, QuantOperand, Write};

/// Weights `[rows, cols]` of a product `y = x W^T`.
pub enum Linear {
    /// Of a [`Dtype`], to train or to serve.
    Full(Matrix),
    /// As a file stores them, to serve.
    Quantised(QuantMatrix),
}

impl Linear {
    /// Number of outputs.
    pub fn rows(&self) -> usize {
        match self {
            Self::Full(w) => w.rows(),
            Self::Quantised(w) => w.rows(),
        }
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        match self {
            Self::Full(w) => w.cols(),
            Self::Quantised(w) => w.cols(),
        }
    }

    /// Memory held, padding included.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Full(w) => w.bytes(),
            Self::Quantised(w) => w.bytes(),
        }
    }

    /// Writes row `row` as f32 into `out`.
    ///
    /// # Panics
    /// When there is no such row or `out` is not `cols` long.
    pub fn get_row(&self, row: usize, out: &mut [f32]) {
        match self {
            Self::Full(w) => w.get_row(row, out),
            Self::Quantised(w) => w.get_row(row, out),
        }
    }

    /// The weights in full.
    ///
    /// # Panics
    /// When they are quantised.
    pub fn full(&self) -> &Matrix {
        match self {
            Self::Full(w) => w,
            Self::Quantised(_) => panic!("weights in full asked for, these are quantised"),
        }
    }

    /// The weights in full, to change them.
    ///
    /// # Panics
    /// When they are quantised.
    pub fn full_mut(&mut self) -> &mut Matrix {
        match self {
            Self::Full(w) => w,
            Self::Quantised(_) => panic!("weights in full asked for, these are quantised"),
        }
    }
}

/// The left operand of products with a [`Linear`], rounded as its weights want it.
pub struct Input {
    full: Operand,
    quantised: QuantOperand,
}

impl Input {
    /// No rows yet; `dtype` for weights in full.
    pub fn new(dtype: Dtype) -> Self {
        Self { full: Operand::new(dtype), quantised: QuantOperand::new() }
    }

    /// What weights in full were last given.
    pub fn full(&self) -> &Operand {
        &self.full
    }

    /// What quantised weights were last given.
    pub(crate) fn quantised(&self) -> &QuantOperand {
        &self.quantised
    }
}

impl Kernels {
    /// Rounds `x` `[rows, cols]` for products with `w`, or with others that are stored alike.
    ///
    /// # Panics
    /// When `x` is not whole rows of `w`'s columns.
    pub fn input(&self, x: &[f32], w: &Linear, out: &mut Input) {
        match w {
            Linear::Full(w) => self.operand(x, w.cols(), &mut out.full),
            Linear::Quantised(w) => self.quant_operand(x, w.cols(), &mut out.quantised),
        }
    }

    /// `out[m, j] = sum_k x[m, k] w[rows.start + j, k] + bias[j]`, set or added.
    ///
    /// `out` is `[M, rows.len()]`; a range of `w` gives the bits of the whole.
    ///
    /// # Panics
    /// When formats or shapes do not agree or `rows` does not start at a multiple of 16.
    pub fn linear(
        &self,
        x: &Input,
        w: &Linear,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        write: Write,
        out: &mut [f32],
    ) {
        match w {
            Linear::Full(w) => self.matmul(&x.full, w, rows, bias, write, out),
            Linear::Quantised(w) => self.quant_matmul(&x.quantised, w, rows, bias, write, out),
        }
    }

    /// Sets `out` to `silu(g) * u` of `[g | u] = x W^T`, rounded for products with `next`; what is in
    /// `buffers`, `[M, 2 I]` and `[M, I]`, is unspecified then.
    ///
    /// # Panics
    /// When formats or shapes do not agree.
    pub fn gated(
        &self,
        (x, w): (&Input, &Linear),
        next: &Linear,
        buffers: (&mut [f32], &mut [f32]),
        out: &mut Input,
    ) {
        if let (Linear::Full(w), Linear::Full(_)) = (w, next)
            && self.matmul_swiglu(&x.full, w, &mut out.full)
        {
            return;
        }
        let (gate_up, act) = buffers;
        self.linear(x, w, 0..w.rows(), None, Write::Set, gate_up);
        self.swiglu(gate_up, w.rows() / 2, act);
        self.input(act, next, out);
    }
}
