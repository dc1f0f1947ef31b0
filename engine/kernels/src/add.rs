//! The residual sum: x += y, element by element.

use crate::{
    Kernels,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
};

/// x += y.
pub(crate) struct AddInto<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) y: &'a [f32],
}

impl Job for AddInto<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for at in (0..self.x.len()).step_by(LANES) {
            let sum = s.add(s.read(self.x, at, 0.0), s.read(self.y, at, 0.0));
            s.write(self.x, at, sum);
        }
    }
}

impl Kernels {
    /// x = y, on all threads: one of them alone does not keep memory busy.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of copy and source");
        let x = Disjoint::new(x);
        self.split_elements(y.len(), &|range| {
            // SAFETY: the ranges of the tasks are disjoint.
            unsafe { x.part(range.start, range.end) }.copy_from_slice(&y[range]);
        });
    }

    /// x += y.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn add(&self, x: &mut [f32], y: &[f32]) {
        assert_eq!(x.len(), y.len(), "lengths of the two terms");
        if let Isa::Reference = self.isa {
            return x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
        }
        let x = Disjoint::new(x);
        self.split_elements(y.len(), &|range| {
            // SAFETY: the ranges of the tasks are disjoint.
            let x = unsafe { x.part(range.start, range.end) };
            self.isa.vectorize(AddInto { x, y: &y[range] });
        });
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{Random, bits, every_level};

    #[test]
    fn sums_are_exact_at_every_length() {
        let mut random = Random::new(3);
        for len in [0, 1, 15, 16, 17, 1000, 40_001] {
            let (x, y) = (random.vec(len, 2.0), random.vec(len, 2.0));
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            for kernels in every_level(2) {
                let mut sum = x.clone();
                kernels.add(&mut sum, &y);
                assert_eq!(bits(&sum), bits(&expected), "{} elements", len);
            }
        }
    }
}
