//! The gated activation of a decoder's feed-forward layer (arXiv 2002.05202), forward and backward.
//!
//! ```text
//! s = 1 / (1 + e^-g)           y  = g s u
//! dg = dy u s (1 + g (1 - s))  du = dy g s
//! ```
//! Gate g and up u come as one `[rows, 2 I]` array, the gate first in each row; y is `[rows, I]`.
//! Leaves out other activations: the supported families all use SiLU.

use crate::{
    Kernels, Operand,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
    split::whole_rows,
};

impl Kernels {
    /// `out[m, i] = silu(gate_up[m, i]) * gate_up[m, inter + i]`.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn swiglu(&self, gate_up: &[f32], inter: usize, out: &mut [f32]) {
        let rows = whole_rows(out.len(), inter);
        assert_eq!(gate_up.len(), 2 * out.len(), "gate and up against the output's length");
        if let Isa::Reference = self.isa {
            return reference::forward(gate_up, inter, out);
        }
        let out = Disjoint::new(out);
        self.split_rows(rows, 2 * inter, &|range| {
            // SAFETY: every row belongs to one task.
            let out = unsafe { out.part(range.start * inter, range.end * inter) };
            let gate_up = &gate_up[2 * range.start * inter..2 * range.end * inter];
            self.isa.vectorize(Forward { gate_up, inter, out });
        });
    }

    /// Sets `dgate_up` to the gradient of `gate_up`, given that of the output, and `y` to the output, both
    /// rounded.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn swiglu_backward(
        &self,
        gate_up: &Operand,
        dy: &[f32],
        (y, dgate_up): (&mut Operand, &mut Operand),
    ) {
        let inter = gate_up.cols() / 2;
        let rows = whole_rows(dy.len(), inter);
        assert_eq!(gate_up.rows(), rows, "rows of gate and up against the gradient's");
        let (y, out) = (y.rounded_rows(rows, inter), dgate_up.rounded_rows(rows, 2 * inter));
        self.split_rows(rows, 4 * inter, &|range| {
            let [mut expanded, mut dgate_up] = [0; 2].map(|_| vec![0.0; 2 * inter]);
            let mut activated = vec![0.0; inter];
            for row in range {
                gate_up.expand(self.isa, row, &mut expanded);
                let gate_up = &expanded[..];
                let dy = &dy[row * inter..][..inter];
                let (y_row, dgate_up) = (&mut activated[..], &mut dgate_up[..]);
                match self.isa {
                    Isa::Reference => {
                        reference::forward(gate_up, inter, y_row);
                        reference::backward(gate_up, inter, dy, dgate_up);
                    }
                    isa => isa.vectorize(Backward { gate_up, dy, y: y_row, dgate_up }),
                }
                // SAFETY: every row belongs to one task.
                unsafe { y.set(self.isa, row, y_row) };
                // SAFETY: as above.
                unsafe { out.set(self.isa, row, dgate_up) };
            }
        });
    }
}

/// 1 / (1 + e^-x).
#[inline(always)]
fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    s.div(one, s.add(one, s.exp(s.sub(s.splat(0.0), x))))
}

/// g s u.
#[inline(always)]
pub(crate) fn swiglu<S: Simd>(s: S, g: S::V, u: S::V) -> S::V {
    s.mul(s.mul(g, sigmoid(s, g)), u)
}

/// Some whole rows of the forward pass.
struct Forward<'a> {
    gate_up: &'a [f32],
    inter: usize,
    out: &'a mut [f32],
}

impl Job for Forward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.gate_up.chunks_exact(2 * self.inter);
        for (gate_up, out) in rows.zip(self.out.chunks_exact_mut(self.inter)) {
            let (gate, up) = gate_up.split_at(self.inter);
            for at in (0..self.inter).step_by(LANES) {
                s.write(out, at, swiglu(s, s.read(gate, at, 0.0), s.read(up, at, 0.0)));
            }
        }
    }
}

/// A row of the backward pass, and of the forward one again.
struct Backward<'a> {
    gate_up: &'a [f32],
    dy: &'a [f32],
    y: &'a mut [f32],
    dgate_up: &'a mut [f32],
}

impl Job for Backward<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { gate_up, dy, y, dgate_up } = self;
        let one = s.splat(1.0);
        let (gate, up) = gate_up.split_at(dy.len());
        let (dgate, dup) = dgate_up.split_at_mut(dy.len());
        for at in (0..dy.len()).step_by(LANES) {
            let (g, u) = (s.read(gate, at, 0.0), s.read(up, at, 0.0));
            let dy = s.read(dy, at, 0.0);
            let sig = sigmoid(s, g);
            let silu = s.mul(g, sig);
            let slope = s.mul(sig, s.mul_add(g, s.sub(one, sig), one));
            s.write(y, at, s.mul(silu, u));
            s.write(dgate, at, s.mul(s.mul(dy, u), slope));
            s.write(dup, at, s.mul(dy, silu));
        }
    }
}

/// The definitions, in f64.
mod reference {
    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    pub(super) fn forward(gate_up: &[f32], inter: usize, out: &mut [f32]) {
        for (i, out) in out.iter_mut().enumerate() {
            let gate = i / inter * 2 * inter + i % inter;
            let (g, u) = (f64::from(gate_up[gate]), f64::from(gate_up[gate + inter]));
            *out = (g * sigmoid(g) * u) as f32;
        }
    }

    pub(super) fn backward(gate_up: &[f32], inter: usize, dy: &[f32], dgate_up: &mut [f32]) {
        for (i, &dy) in dy.iter().enumerate() {
            let gate = i / inter * 2 * inter + i % inter;
            let (g, u) = (f64::from(gate_up[gate]), f64::from(gate_up[gate + inter]));
            let (sig, dy) = (sigmoid(g), f64::from(dy));
            dgate_up[gate] = (dy * u * sig * (1.0 + g * (1.0 - sig))) as f32;
            dgate_up[gate + inter] = (dy * g * sig) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::{
        Dtype, Kernels, Operand,
        testing::{Random, assert_close, bits, differences, every_level, reference},
    };

    fn forward(kernels: &Kernels, gate_up: &[f32], inter: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; gate_up.len() / 2];
        kernels.swiglu(gate_up, inter, &mut out);
        out
    }

    /// The gradient; also checks that the output is that of the forward pass.
    fn backward(kernels: &Kernels, gate_up: &[f32], inter: usize, dy: &[f32]) -> Vec<f32> {
        let (mut y, mut out) = (Operand::new(Dtype::F32), Operand::new(Dtype::F32));
        let mut x = Operand::new(Dtype::F32);
        kernels.operand(gate_up, 2 * inter, &mut x);
        kernels.swiglu_backward(&x, dy, (&mut y, &mut out));
        let values = |x: &Operand| -> Vec<f32> {
            let at = |i: usize| x.get(i / x.cols(), i % x.cols());
            (0..x.rows() * x.cols()).map(at).collect()
        };
        assert_eq!(bits(&values(&y)), bits(&forward(kernels, gate_up, inter)), "output again");
        values(&out)
    }

    #[test]
    fn every_level_agrees_with_the_definition() {
        let mut random = Random::new(21);
        for (rows, inter) in [(0, 4), (2, 0), (1, 1), (3, 15), (2, 16), (5, 33), (40, 1536)] {
            let (gate_up, dy) = (random.vec(rows * inter * 2, 9.0), random.vec(rows * inter, 1.0));
            let y = forward(&reference(), &gate_up, inter);
            let grad = backward(&reference(), &gate_up, inter, &dy);
            for kernels in every_level(2) {
                assert_close(&forward(&kernels, &gate_up, inter), &y, 1e-6);
                assert_close(&backward(&kernels, &gate_up, inter, &dy), &grad, 2e-6);
            }
        }
    }

    #[test]
    fn extreme_gates_stay_finite() {
        for kernels in every_level(1) {
            let gate_up = [-1e4, 1e4, 2.0, 3.0];
            assert_eq!(forward(&kernels, &gate_up, 2), [0.0, 3e4]);
            assert_eq!(backward(&kernels, &gate_up, 2, &[1.0, 1.0]), [0.0, 3.0, 0.0, 1e4]);
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_definition() {
        let mut random = Random::new(22);
        let (rows, inter) = (2, 21);
        let (x, dy) = (random.vec(rows * inter * 2, 4.0), random.vec(rows * inter, 1.0));
        let expected = differences(&x, |x| {
            (0..rows * inter)
                .map(|i| {
                    let gate = i / inter * 2 * inter + i % inter;
                    x[gate] / (1.0 + (-x[gate]).exp()) * x[gate + inter] * f64::from(dy[i])
                })
                .sum()
        });
        for kernels in every_level(1) {
            assert_close(&backward(&kernels, &x, inter, &dy), &expected, 2e-6);
        }
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_bit() {
        let mut random = Random::new(23);
        let (rows, inter) = (50, 1001);
        let (x, dy) = (random.vec(rows * inter * 2, 4.0), random.vec(rows * inter, 1.0));
        for (one, three) in every_level(1).zip(every_level(3)) {
            let (y, grad) = (forward(&one, &x, inter), backward(&one, &x, inter, &dy));
            assert_eq!(bits(&forward(&three, &x, inter)), bits(&y));
            assert_eq!(bits(&backward(&three, &x, inter, &dy)), bits(&grad));
            let alone = forward(&one, &x[7 * 2 * inter..8 * 2 * inter], inter);
            assert_eq!(bits(&alone), bits(&y[7 * inter..8 * inter]));
        }
    }
}
