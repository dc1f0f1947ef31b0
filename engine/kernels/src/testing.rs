//! What the tests of several operations share: random numbers, kernels of every level, comparisons.

use crate::{Kernels, Level};

/// A splitmix64 stream.
pub(crate) struct Random(u64);

impl Random {
    /// The stream of `seed`, which is printed for the report of a failing test.
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In [0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// In 0..n.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// `len` numbers in [-scale, scale).
    pub(crate) fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| (self.uniform() as f32 * 2.0 - 1.0) * scale).collect()
    }

    /// `len` roughly normal numbers, mean 0 and deviation 1.
    pub(crate) fn normal(&mut self, len: usize) -> Vec<f32> {
        let number = |_| 1.7 * (0..4).map(|_| self.uniform() as f32 - 0.5).sum::<f32>();
        (0..len).map(number).collect()
    }

    /// The numbers below `len` in any order.
    pub(crate) fn shuffled(&mut self, len: usize) -> Vec<u32> {
        let mut items: Vec<u32> = (0..len as u32).collect();
        (1..len).for_each(|i| items.swap(i, self.below(i + 1)));
        items
    }
}

/// Kernels of every level that this processor can run, on `threads` threads.
pub(crate) fn every_level(threads: usize) -> impl Iterator<Item = Kernels> {
    Level::ALL.into_iter().filter_map(move |level| Kernels::new(level, threads))
}

/// The naive definitions.
pub(crate) fn reference() -> Kernels {
    Kernels::new(Level::Reference, 1).expect("the reference runs everywhere")
}

/// The bit patterns, for comparisons that must be exact.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// Each element agrees within `tolerance * (1 + |expected|)`.
#[track_caller]
pub(crate) fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len());
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        assert!((a - e).abs() <= tolerance * (1.0 + e.abs()), "element {i}: {a} is not {e}");
    }
}

/// The gradient of `loss` at `x` by central differences in f64.
pub(crate) fn differences(x: &[f32], loss: impl Fn(&[f64]) -> f64) -> Vec<f32> {
    const STEP: f64 = 1e-5;
    let mut x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + STEP;
            let above = loss(&x);
            x[i] = at - STEP;
            let below = loss(&x);
            x[i] = at;
            ((above - below) / (2.0 * STEP)) as f32
        })
        .collect()
}
