//! Root-mean-square norm over the last dimension (arXiv 1910.07467), forward and backward.
//!
//! ```text
//! r = 1 / sqrt(mean(x^2) + eps)          y  = x r w
//! dx += r w dy - x r^3 mean(w dy x)      dw += sum over rows of dy x r
//! ```
//! `x`, `y` and their gradients are `[rows, cols]`, `w` is `[cols]`. Leaves out the mean and the bias
//! of a layer norm. A row's sums run over 16 lanes in ascending order and then the fixed tree.

use crate::{
    Input, Kernels, Linear, Operand,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
    split::whole_rows,
};

/// What [`Kernels::rms_norm_backward`] reads and writes; all but the weights are `[rows, cols]`.
pub struct RmsNormBackward<'a> {
    /// The input of the forward pass.
    pub x: &'a [f32],
    /// The weights, one for each column.
    pub weight: &'a [f32],
    /// The number added to the mean square.
    pub eps: f32,
    /// The gradient of the output.
    pub dy: &'a [f32],
    /// The gradient of `x` is added here.
    pub dx: &'a mut [f32],
    /// The gradient of `weight` is added here.
    pub dweight: &'a mut [f32],
}

impl Kernels {
    /// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `weight.len()` elements.
    ///
    /// # Panics
    /// When `x` is not a whole number of rows or `out` has another length.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let cols = weight.len();
        let rows = whole_rows(x.len(), cols);
        assert_eq!(out.len(), x.len(), "output length against the input's");
        if let Isa::Reference = self.isa {
            return reference::forward(x, weight, eps, out);
        }
        let out = Disjoint::new(out);
        self.split_rows(rows, cols, &|range| {
            let (from, to) = (range.start * cols, range.end * cols);
            // SAFETY: every row belongs to one task.
            let out = unsafe { out.part(from, to) };
            self.isa.vectorize(Forward { x: &x[from..to], weight, eps, out });
        });
    }

    /// [`Kernels::rms_norm`] of `x`, rounded for products with `next` as [`Kernels::input`] does; what is in
    /// `norm`, as long as `x`, is unspecified then.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn normed_input(
        &self,
        (x, weight, eps): (&[f32], &[f32], f32),
        next: &Linear,
        norm: &mut [f32],
        out: &mut Input,
    ) {
        assert_eq!(next.cols(), weight.len(), "inputs of the product against the norm's");
        if self.takes_full(next, out) {
            self.normed_operand((x, weight, eps), &mut out.full);
        } else {
            self.rms_norm(x, weight, eps, norm);
            self.input(norm, next, out);
        }
    }

    /// [`Kernels::rms_norm`] of `x`, rounded.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn normed_operand(&self, (x, weight, eps): (&[f32], &[f32], f32), out: &mut Operand) {
        let cols = weight.len();
        let rows = whole_rows(x.len(), cols);
        let out = out.rounded_rows(rows, cols);
        self.split_rows(rows, cols, &|range| {
            let mut normed = vec![0.0; cols];
            for row in range {
                let x = &x[row * cols..][..cols];
                match self.isa {
                    Isa::Reference => reference::forward(x, weight, eps, &mut normed),
                    isa => isa.vectorize(Forward { x, weight, eps, out: &mut normed }),
                }
                // SAFETY: every row belongs to one task.
                unsafe { out.set(self.isa, row, &normed) };
            }
        });
    }

    /// Adds the gradients of [`Kernels::rms_norm`]; those of the weights over rows in ascending order.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn rms_norm_backward(&self, io: RmsNormBackward<'_>) {
        let RmsNormBackward { x, weight, eps, dy, dx, dweight } = io;
        let cols = weight.len();
        let rows = whole_rows(x.len(), cols);
        assert_eq!(dy.len(), x.len(), "gradient length against the input's");
        assert_eq!(dx.len(), x.len(), "input gradient length against the input's");
        assert_eq!(dweight.len(), cols, "weight gradient length against the weights'");
        if let Isa::Reference = self.isa {
            return reference::backward(RmsNormBackward { x, weight, eps, dy, dx, dweight });
        }
        let mut scales = vec![0.0; rows];
        let (dx, dweight, shared) =
            (Disjoint::new(dx), Disjoint::new(dweight), Disjoint::new(&mut scales));
        self.split_rows(rows, cols, &|range| {
            let (from, to) = (range.start * cols, range.end * cols);
            // SAFETY: every row belongs to one task.
            let dx = unsafe { dx.part(from, to) };
            // SAFETY: as above.
            let scales = unsafe { shared.part(range.start, range.end) };
            let (x, dy) = (&x[from..to], &dy[from..to]);
            self.isa.vectorize(BackwardRows { x, weight, eps, dy, dx, scales });
        });
        let scales = &scales[..];
        self.split_columns(cols, rows, &|range| {
            // SAFETY: every column belongs to one task.
            let dweight = unsafe { dweight.part(range.start, range.end) };
            let first = range.start;
            self.isa.vectorize(BackwardWeight { x, dy, scales, cols, first, dweight });
        });
    }
}

/// sum a b c, lane by lane over the row.
#[inline(always)]
fn dot3<S: Simd>(s: S, a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for at in (0..a.len()).step_by(LANES) {
        let ab = s.mul(s.read(a, at, 0.0), s.read(b, at, 0.0));
        sum = s.mul_add(ab, s.read(c, at, 0.0), sum);
    }
    s.sum(sum)
}

/// 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
fn scale<S: Simd>(s: S, x: &[f32], eps: f32) -> f32 {
    let mut sum = s.splat(0.0);
    for at in (0..x.len()).step_by(LANES) {
        let x = s.read(x, at, 0.0);
        sum = s.mul_add(x, x, sum);
    }
    1.0 / (s.sum(sum) / x.len() as f32 + eps).sqrt()
}

/// Some whole rows of the forward pass.
struct Forward<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    out: &'a mut [f32],
}

impl Job for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for (x, out) in self.x.chunks_exact(cols).zip(self.out.chunks_exact_mut(cols)) {
            let r = s.splat(scale(s, x, self.eps));
            for at in (0..cols).step_by(LANES) {
                let scaled = s.mul(s.read(x, at, 0.0), r);
                s.write(out, at, s.mul(scaled, s.read(self.weight, at, 0.0)));
            }
        }
    }
}

/// Some whole rows of the gradient of the input; leaves each row's r in `scales`.
struct BackwardRows<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    eps: f32,
    dy: &'a [f32],
    dx: &'a mut [f32],
    scales: &'a mut [f32],
}

impl Job for BackwardRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cols = self.weight.len();
        for (row, kept) in self.scales.iter_mut().enumerate() {
            let (x, dy) = (&self.x[row * cols..][..cols], &self.dy[row * cols..][..cols]);
            let dx = &mut self.dx[row * cols..][..cols];
            let r = scale(s, x, self.eps);
            *kept = r;
            let mean = dot3(s, self.weight, dy, x) / cols as f32;
            let (r, back) = (s.splat(r), s.splat(-(r * r * r * mean)));
            for at in (0..cols).step_by(LANES) {
                let wdy = s.mul(s.read(self.weight, at, 0.0), s.read(dy, at, 0.0));
                let sum = s.mul_add(wdy, r, s.read(dx, at, 0.0));
                s.write(dx, at, s.mul_add(s.read(x, at, 0.0), back, sum));
            }
        }
    }
}

/// Columns `first..first + dweight.len()` of the gradient of the weights, over all rows.
struct BackwardWeight<'a> {
    x: &'a [f32],
    dy: &'a [f32],
    scales: &'a [f32],
    cols: usize,
    first: usize,
    dweight: &'a mut [f32],
}

impl Job for BackwardWeight<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.dweight.len();
        for (row, &r) in self.scales.iter().enumerate() {
            let from = row * self.cols + self.first;
            let (x, dy) = (&self.x[from..][..width], &self.dy[from..][..width]);
            let r = s.splat(r);
            for at in (0..width).step_by(LANES) {
                let normal = s.mul(s.read(x, at, 0.0), r);
                let sum = s.mul_add(s.read(dy, at, 0.0), normal, s.read(self.dweight, at, 0.0));
                s.write(self.dweight, at, sum);
            }
        }
    }
}

/// The definitions, with sums in f64.
mod reference {
    use super::RmsNormBackward;

    fn mean(terms: impl ExactSizeIterator<Item = f64>) -> f64 {
        let count = terms.len() as f64;
        terms.sum::<f64>() / count
    }

    fn scale(x: &[f32], eps: f32) -> f64 {
        1.0 / (mean(x.iter().map(|&x| f64::from(x).powi(2))) + f64::from(eps)).sqrt()
    }

    pub(super) fn forward(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let cols = weight.len().max(1);
        for (x, out) in x.chunks(cols).zip(out.chunks_mut(cols)) {
            let r = scale(x, eps);
            for (i, out) in out.iter_mut().enumerate() {
                *out = (f64::from(x[i]) * r * f64::from(weight[i])) as f32;
            }
        }
    }

    pub(super) fn backward(io: RmsNormBackward<'_>) {
        let cols = io.weight.len().max(1);
        for (row, x) in io.x.chunks(cols).enumerate() {
            let dy = &io.dy[row * cols..][..cols];
            let r = scale(x, io.eps);
            let term = |i: usize| f64::from(io.weight[i]) * f64::from(dy[i]);
            let mean = mean((0..cols).map(|i| term(i) * f64::from(x[i])));
            for i in 0..cols {
                let dx = r * term(i) - f64::from(x[i]) * r.powi(3) * mean;
                io.dx[row * cols + i] += dx as f32;
                io.dweight[i] += (f64::from(dy[i]) * f64::from(x[i]) * r) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RmsNormBackward;
    use crate::{
        Kernels,
        testing::{Random, assert_close, bits, differences, every_level, reference},
    };

    const EPS: f32 = 1e-5;
    const SHAPES: [(usize, usize); 8] =
        [(0, 8), (3, 0), (1, 1), (2, 15), (3, 16), (5, 17), (4, 576), (67, 961)];

    fn forward(kernels: &Kernels, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; x.len()];
        kernels.rms_norm(x, weight, EPS, &mut out);
        out
    }

    fn backward(kernels: &Kernels, x: &[f32], weight: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (mut dx, mut dweight) = (vec![0.5; x.len()], vec![-0.25; weight.len()]);
        kernels.rms_norm_backward(RmsNormBackward {
            x,
            weight,
            eps: EPS,
            dy,
            dx: &mut dx,
            dweight: &mut dweight,
        });
        (dx, dweight)
    }

    #[test]
    fn every_level_agrees_with_the_definition() {
        let mut random = Random::new(11);
        for (rows, cols) in SHAPES {
            let (x, dy) = (random.vec(rows * cols, 3.0), random.vec(rows * cols, 1.0));
            let weight = random.vec(cols, 2.0);
            let y = forward(&reference(), &x, &weight);
            let (dx, dweight) = backward(&reference(), &x, &weight, &dy);
            for kernels in every_level(2) {
                assert_close(&forward(&kernels, &x, &weight), &y, 1e-6);
                let (dx2, dweight2) = backward(&kernels, &x, &weight, &dy);
                assert_close(&dx2, &dx, 2e-6);
                assert_close(&dweight2, &dweight, 1e-5);
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_definition() {
        let mut random = Random::new(12);
        let (rows, cols) = (3, 19);
        let (x, dy) = (random.vec(rows * cols, 2.0), random.vec(rows * cols, 1.0));
        let weight = random.vec(cols, 2.0);
        let loss = |x: &[f64], w: &[f64]| -> f64 {
            let row = |row: usize| -> f64 {
                let x = &x[row * cols..][..cols];
                let mean = x.iter().map(|x| x * x).sum::<f64>() / cols as f64;
                let r = (mean + f64::from(EPS)).sqrt();
                let term = |i: usize| x[i] / r * w[i] * f64::from(dy[row * cols + i]);
                (0..cols).map(term).sum()
            };
            (0..rows).map(row).sum()
        };
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let expected_dx = differences(&x, |x| loss(x, &wide(&weight)));
        let expected_dw = differences(&weight, |w| loss(&wide(&x), w));
        for kernels in every_level(1) {
            let (dx, dweight) = backward(&kernels, &x, &weight, &dy);
            let minus = |x: Vec<f32>, start: f32| -> Vec<f32> {
                x.into_iter().map(|x| x - start).collect()
            };
            assert_close(&minus(dx, 0.5), &expected_dx, 2e-6);
            assert_close(&minus(dweight, -0.25), &expected_dw, 2e-6);
        }
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_bit() {
        let mut random = Random::new(13);
        let (rows, cols) = (97, 577);
        let (x, dy) = (random.vec(rows * cols, 3.0), random.vec(rows * cols, 1.0));
        let weight = random.vec(cols, 2.0);
        for (one, three) in every_level(1).zip(every_level(3)) {
            let y = forward(&one, &x, &weight);
            let (dx, dweight) = backward(&one, &x, &weight, &dy);
            assert_eq!(bits(&forward(&three, &x, &weight)), bits(&y));
            let (dx3, dweight3) = backward(&three, &x, &weight, &dy);
            assert_eq!((bits(&dx3), bits(&dweight3)), (bits(&dx), bits(&dweight)));
            for row in [0, 50, 96] {
                let part = row * cols..(row + 1) * cols;
                let alone = forward(&three, &x[part.clone()], &weight);
                assert_eq!(bits(&alone), bits(&y[part.clone()]));
                let (alone, _) = backward(&three, &x[part.clone()], &weight, &dy[part.clone()]);
                assert_eq!(bits(&alone), bits(&dx[part]));
            }
        }
    }
}
