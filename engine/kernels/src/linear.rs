//! A layer's weights, in full or quantised, and products with either.
//!
//! What a model runs with when nothing changes its weights. Training asks for [`Linear::full`]. Leaves
//! out the arithmetic: see `gemm` and `quant`.

use std::ops::Range;

use crate::{Dtype, Kernels, Matrix, Operand, Part, QuantMatrix, QuantOperand, Write};

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

/// What [`Kernels::gated`] works in where it is several operations; grows to what they need.
#[derive(Default)]
pub struct GatedBuffers {
    gate_up: Vec<f32>,
    act: Vec<f32>,
}

/// The left operand of products with a [`Linear`], rounded as its weights want it.
pub struct Input {
    /// For weights in full, and for quantised ones that are expanded to them.
    pub(crate) full: Operand,
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
    /// Whether `w` is multiplied by what weights in full are, too.
    pub(crate) fn takes_full(&self, w: &Linear, x: &Input) -> bool {
        matches!(w, Linear::Full(_)) || self.expands(x.full.dtype())
    }

    /// Rounds `x` `[rows, cols]` for products with `w`, or with others that are stored alike.
    ///
    /// # Panics
    /// When `x` is not whole rows of `w`'s columns.
    pub fn input(&self, x: &[f32], w: &Linear, out: &mut Input) {
        if self.takes_full(w, out) {
            self.operand(x, w.cols(), &mut out.full);
        } else {
            self.quant_operand(x, w.cols(), &mut out.quantised);
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
            Linear::Quantised(w) if self.expands(x.full.dtype()) => {
                self.matmul_stored(&x.full, w, write, [Part { rows, bias, out }]);
            }
            Linear::Quantised(w) => self.quant_matmul(&x.quantised, w, rows, bias, write, out),
        }
    }

    /// [`Kernels::linear`] with several ranges of `w`, set, as one operation.
    ///
    /// # Panics
    /// As there.
    pub fn linear_parts<const N: usize>(&self, x: &Input, w: &Linear, parts: [Part<'_>; N]) {
        match w {
            Linear::Full(w) => self.matmul_parts(&x.full, w, Write::Set, parts),
            Linear::Quantised(w) if self.expands(x.full.dtype()) => {
                self.matmul_stored(&x.full, w, Write::Set, parts);
            }
            Linear::Quantised(w) => parts.into_iter().for_each(|Part { rows, bias, out }| {
                self.quant_matmul(&x.quantised, w, rows, bias, Write::Set, out);
            }),
        }
    }

    /// Sets `out` to `silu(g) * u` of `[g | u] = x W^T`, rounded for products with `next`, and `kept` to the
    /// rounded `[g | u]`.
    ///
    /// # Panics
    /// When formats or shapes do not agree.
    pub fn gated(
        &self,
        (x, w): (&Input, &Linear),
        next: &Linear,
        buffers: &mut GatedBuffers,
        mut kept: Option<&mut Operand>,
        out: &mut Input,
    ) {
        let full = self.takes_full(w, x);
        if full
            && self.takes_full(next, out)
            && self.matmul_swiglu(&x.full, w, kept.as_deref_mut(), &mut out.full)
        {
            return;
        }
        let rows = if full { x.full.rows() } else { x.quantised.rows() };
        let inter = next.cols();
        let GatedBuffers { gate_up, act } = buffers;
        gate_up.resize(rows * 2 * inter, 0.0);
        act.resize(rows * inter, 0.0);
        self.linear(x, w, 0..w.rows(), None, Write::Set, gate_up);
        self.swiglu(gate_up, inter, act);
        self.input(act, next, out);
        if let Some(kept) = kept {
            self.operand(gate_up, 2 * inter, kept);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;
    use crate::testing::{Random, bits, every_level};

    /// Also checks that a row read at once is what its elements are.
    fn bits_of(x: &Operand) -> Vec<u32> {
        let mut all = vec![0.0; x.rows() * x.cols()];
        let isa = Level::Portable.isa().expect("a level of every processor");
        for (row, to) in all.chunks_exact_mut(x.cols()).enumerate() {
            x.expand(isa, row, to);
            let mut one_by_one = to.to_vec();
            x.row_to_f32(row, &mut one_by_one);
            assert_eq!(bits(to), bits(&one_by_one), "row {row}");
        }
        bits(&all)
    }

    /// What a layer has in one operation gives the bits of the operations it is made of.
    #[test]
    fn fused_operations_give_the_bits_of_their_parts() {
        let mut random = Random::new(5);
        for (m, hidden, inter) in [(1, 48, 64), (40, 96, 32), (150, 40, 96), (3, 32, 48)] {
            let (x, scale) = (random.vec(m * hidden, 2.0), random.vec(hidden, 1.0));
            let wide = random.vec(2 * inter * hidden, 1.0);
            for (kernels, dtype) in every_level(2)
                .flat_map(|k| [Dtype::F32, Dtype::Bf16].map(|dtype| (k.level(), dtype)))
            {
                let kernels = Kernels::new(kernels, 2).expect("an available level");
                let mut w = Matrix::zeros(dtype, 2 * inter, hidden);
                kernels.load_matrix(&wide, &mut w);
                let (w, next) =
                    (Linear::Full(w), Linear::Full(Matrix::zeros(dtype, hidden, inter)));
                let mut norm = vec![0.0; x.len()];
                let (mut whole, mut parts) = (Input::new(dtype), Input::new(dtype));
                kernels.normed_input((&x, &scale, 1e-5), &w, &mut norm, &mut whole);
                kernels.rms_norm(&x, &scale, 1e-5, &mut norm);
                kernels.input(&norm, &w, &mut parts);
                assert_eq!(
                    bits_of(whole.full()),
                    bits_of(parts.full()),
                    "norm {} {m}",
                    kernels.level()
                );

                let (mut gate_up, mut act) = (vec![0.0; m * 2 * inter], vec![0.0; m * inter]);
                let (input, mut gated) = (parts, Input::new(dtype));
                let (mut buffers, mut kept) = (GatedBuffers::default(), Operand::new(dtype));
                let keep = Some(&mut kept);
                kernels.gated((&input, &w), &next, &mut buffers, keep, &mut gated);
                let both = (bits_of(gated.full()), bits_of(&kept));
                kernels.gated((&input, &w), &next, &mut buffers, None, &mut gated);
                kernels.linear(&input, &w, 0..2 * inter, None, Write::Set, &mut gate_up);
                kernels.swiglu(&gate_up, inter, &mut act);
                let mut expected = Input::new(dtype);
                kernels.input(&act, &next, &mut expected);
                let mut rounded = Operand::new(dtype);
                kernels.operand(&gate_up, 2 * inter, &mut rounded);
                let what = format!("gates {} {} {m}", kernels.level(), dtype.name());
                assert_eq!(bits_of(gated.full()), bits_of(expected.full()), "{what}");
                assert_eq!(both, (bits_of(expected.full()), bits_of(&rounded)), "{what}, kept");
            }
        }
    }
}
