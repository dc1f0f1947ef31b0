//! AdamW (arXiv 1711.05101, as in `torch.optim.AdamW`) and the squared norm of gradients.
//!
//! ```text
//! g = grad_scale * grad       p = p (1 - lr wd)
//! m = m + (1 - b1) (g - m)    v = b2 v + (1 - b2) g^2
//! p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! ```
//! One pass over four f32 arrays, 28 bytes of memory traffic an element. Leaves out AMSGrad. Which
//! tensors decay, and the clipping of gradients (by `grad_scale`), are for the caller to choose.

use crate::{
    Kernels,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
};

/// Elements whose squares are summed by one task; the partial sums add in ascending order.
const SUM_CHUNK: usize = 1 << 16;

/// The numbers of one optimizer step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the corrected mean square.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
    /// The number of this step, from 1.
    pub step: u64,
    /// Multiplies every gradient before all else.
    pub grad_scale: f32,
}

/// The factors of one step, worked out in f64.
#[derive(Clone, Copy)]
struct Factors {
    grad_scale: f32,
    keep: f32,
    blend: f32,
    beta2: f32,
    fresh: f32,
    step_size: f32,
    correction: f32,
    eps: f32,
}

impl AdamW {
    fn factors(&self) -> Factors {
        let steps = self.step as f64;
        Factors {
            grad_scale: self.grad_scale,
            keep: (1.0 - self.lr * self.weight_decay) as f32,
            blend: (1.0 - self.beta1) as f32,
            beta2: self.beta2 as f32,
            fresh: (1.0 - self.beta2) as f32,
            step_size: (self.lr / (1.0 - self.beta1.powf(steps))) as f32,
            correction: (1.0 / (1.0 - self.beta2.powf(steps)).sqrt()) as f32,
            eps: self.eps as f32,
        }
    }
}

impl Kernels {
    /// One step on `weights` and the two moments `m` and `v`, element by element.
    ///
    /// # Panics
    /// When the lengths differ or the step is 0.
    pub fn adamw(
        &self,
        adamw: &AdamW,
        weights: &mut [f32],
        m: &mut [f32],
        v: &mut [f32],
        grads: &[f32],
    ) {
        let len = weights.len();
        assert_eq!([m.len(), v.len(), grads.len()], [len; 3], "lengths against {len} weights");
        assert!(adamw.step > 0, "steps count from 1");
        let factors = adamw.factors();
        if let Isa::Reference = self.isa {
            return reference(adamw, weights, m, v, grads);
        }
        let (weights, m, v) = (Disjoint::new(weights), Disjoint::new(m), Disjoint::new(v));
        self.split_elements(len, &|range| {
            // SAFETY: the ranges of the tasks are disjoint.
            let weights = unsafe { weights.part(range.start, range.end) };
            // SAFETY: as above.
            let m = unsafe { m.part(range.start, range.end) };
            // SAFETY: as above.
            let v = unsafe { v.part(range.start, range.end) };
            self.isa.vectorize(Step { factors, weights, m, v, grads: &grads[range] });
        });
    }

    /// The sum of the squares in f64, in an order that no number of threads changes.
    pub fn sum_squares(&self, x: &[f32]) -> f64 {
        if let Isa::Reference = self.isa {
            return x.iter().map(|&x| f64::from(x).powi(2)).sum();
        }
        let mut sums = vec![0.0f64; x.len().div_ceil(SUM_CHUNK)];
        self.fill(&mut sums, SUM_CHUNK, &|i| {
            let chunk = &x[i * SUM_CHUNK..x.len().min((i + 1) * SUM_CHUNK)];
            self.isa.vectorize(SumSquares(chunk))
        });
        sums.iter().sum()
    }
}

/// One step on some elements.
struct Step<'a> {
    factors: Factors,
    weights: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
    grads: &'a [f32],
}

impl Job for Step<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let f = self.factors;
        let (scale, keep) = (s.splat(f.grad_scale), s.splat(f.keep));
        let (blend, beta2, fresh) = (s.splat(f.blend), s.splat(f.beta2), s.splat(f.fresh));
        let (step, correction, eps) =
            (s.splat(-f.step_size), s.splat(f.correction), s.splat(f.eps));
        for at in (0..self.weights.len()).step_by(LANES) {
            let g = s.mul(s.read(self.grads, at, 0.0), scale);
            let m = s.read(self.m, at, 0.0);
            let m = s.mul_add(s.sub(g, m), blend, m);
            let v = s.mul(s.read(self.v, at, 0.0), beta2);
            let v = s.mul_add(s.mul(g, g), fresh, v);
            let denominator = s.mul_add(s.sqrt(v), correction, eps);
            let p = s.mul(s.read(self.weights, at, 0.0), keep);
            s.write(self.m, at, m);
            s.write(self.v, at, v);
            s.write(self.weights, at, s.mul_add(s.div(m, denominator), step, p));
        }
    }
}

/// Sixteen sums in f64, then the fixed tree.
struct SumSquares<'a>(&'a [f32]);

impl Job for SumSquares<'_> {
    type Output = f64;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> f64 {
        let mut sums = [0.0f64; LANES];
        let (whole, tail) = self.0.as_chunks::<LANES>();
        for x in whole {
            for (sum, &x) in sums.iter_mut().zip(x) {
                *sum += f64::from(x) * f64::from(x);
            }
        }
        for (sum, &x) in sums.iter_mut().zip(tail) {
            *sum += f64::from(x) * f64::from(x);
        }
        for width in [8, 4, 2, 1] {
            (0..width).for_each(|i| sums[i] += sums[i + width]);
        }
        sums[0]
    }
}

/// The definition, in f64 but for what is stored.
fn reference(adamw: &AdamW, weights: &mut [f32], m: &mut [f32], v: &mut [f32], grads: &[f32]) {
    let AdamW { lr, beta1, beta2, eps, weight_decay, step, grad_scale } = *adamw;
    let correction1 = 1.0 - beta1.powf(step as f64);
    let correction2 = 1.0 - beta2.powf(step as f64);
    for (i, p) in weights.iter_mut().enumerate() {
        let g = f64::from(grads[i]) * f64::from(grad_scale);
        let mean = beta1 * f64::from(m[i]) + (1.0 - beta1) * g;
        let square = beta2 * f64::from(v[i]) + (1.0 - beta2) * g * g;
        let decayed = f64::from(*p) * (1.0 - lr * weight_decay);
        let denominator = square.sqrt() / correction2.sqrt() + eps;
        *p = (decayed - lr / correction1 * mean / denominator) as f32;
        (m[i], v[i]) = (mean as f32, square as f32);
    }
}

#[cfg(test)]
mod tests {
    use super::AdamW;
    use crate::testing::{Random, assert_close, bits, every_level};

    const STEP: AdamW = AdamW {
        lr: 1e-2,
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        weight_decay: 0.1,
        step: 1,
        grad_scale: 0.5,
    };

    /// torch.optim.AdamW(lr=1e-2, weight_decay=0.1) from 1.0: the first step moves by lr against
    /// the sign of the gradient, whatever its size, after the decay.
    #[test]
    fn the_first_step_by_hand() {
        for kernels in every_level(1) {
            let (mut p, mut m, mut v) = ([1.0, 1.0, 1.0], [0.0; 3], [0.0; 3]);
            kernels.adamw(&STEP, &mut p, &mut m, &mut v, &[2.0, -0.02, 0.0]);
            assert_close(&p, &[0.999 - 0.01, 0.999 + 0.01, 0.999], 1e-6);
            assert_close(&m, &[0.1, -0.001, 0.0], 1e-7);
            assert_close(&v, &[1e-3, 1e-7, 0.0], 1e-8);
        }
    }

    #[test]
    fn ten_steps_agree_with_f64() {
        for len in [0, 1, 17, 1000] {
            for kernels in every_level(2) {
                let mut random = Random::new(51);
                let mut p = random.vec(len, 1.0);
                let (mut m, mut v) = (vec![0.0; len], vec![0.0; len]);
                let mut exact: Vec<[f64; 3]> =
                    p.iter().map(|&p| [f64::from(p), 0.0, 0.0]).collect();
                for step in 1..=10 {
                    let grads = random.vec(len, 3.0);
                    let adamw = AdamW { step, ..STEP };
                    kernels.adamw(&adamw, &mut p, &mut m, &mut v, &grads);
                    for ([p, m, v], &g) in exact.iter_mut().zip(&grads) {
                        let g = f64::from(g) * 0.5;
                        *p -= 1e-2 * 0.1 * *p;
                        *m = 0.9 * *m + 0.1 * g;
                        *v = 0.999 * *v + 0.001 * g * g;
                        let v_hat = *v / (1.0 - 0.999f64.powi(step as i32));
                        let m_hat = *m / (1.0 - 0.9f64.powi(step as i32));
                        *p -= 1e-2 * m_hat / (v_hat.sqrt() + 1e-8);
                    }
                }
                let column = |i: usize| exact.iter().map(|e| e[i] as f32).collect::<Vec<_>>();
                assert_close(&p, &column(0), 1e-6);
                assert_close(&m, &column(1), 1e-6);
                assert_close(&v, &column(2), 1e-6);
            }
        }
    }

    #[test]
    fn neither_threads_nor_the_place_change_a_bit() {
        let mut random = Random::new(52);
        let len = 100_003;
        let (start, grads) = (random.vec(len, 1.0), random.vec(len, 1.0));
        for (one, three) in every_level(1).zip(every_level(3)) {
            let run = |kernels: &crate::Kernels, from: usize| {
                let mut p = start[from..].to_vec();
                let (mut m, mut v) = (vec![0.1; len - from], vec![0.2; len - from]);
                let adamw = AdamW { step: 3, ..STEP };
                kernels.adamw(&adamw, &mut p, &mut m, &mut v, &grads[from..]);
                (bits(&p), bits(&m), bits(&v))
            };
            let whole = run(&one, 0);
            assert_eq!(run(&three, 0), whole);
            assert_eq!(run(&three, 5).0, whole.0[5..]);
            assert_eq!(one.sum_squares(&grads).to_bits(), three.sum_squares(&grads).to_bits());
        }
    }

    #[test]
    fn squares_are_summed_in_f64() {
        let mut random = Random::new(53);
        for len in [0, 1, 16, 17, 65_536, 200_001] {
            let x = random.vec(len, 10.0);
            let exact: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
            for kernels in every_level(2) {
                let sum = kernels.sum_squares(&x);
                assert!((sum - exact).abs() <= 1e-12 * exact, "{sum} is not {exact}");
            }
        }
    }
}
