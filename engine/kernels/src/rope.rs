//! Rotary position embedding (arXiv 2104.09864) in the half-split convention, and its inverse.
//!
//! ```text
//! c, s = scale cos(p f_i), scale sin(p f_i)        i in 0..d/2
//! y_i = x_i c - x_{i+d/2} s                        y_{i+d/2} = x_{i+d/2} c + x_i s
//! ```
//! The convention of Hugging Face (`rotate_half`), not the interleaved one of GGUF's Llama files.
//! Which frequencies f a model uses (plain, `llama3`, ...) is for the caller to work out. The angle
//! p f is rounded to f32, as in transformers; its sine and cosine are correctly rounded.

use crate::{
    Kernels,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
};

/// The sines and cosines of every position.
///
/// ```
/// let table = kernels::RopeTable::new(4, 128, &[1.0, 0.01], 1.0);
/// assert_eq!((table.head_dim(), table.max_positions()), (4, 128));
/// ```
pub struct RopeTable {
    half: usize,
    max_positions: usize,
    /// For each position `half` cosines and then `half` sines.
    values: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..max_positions`; `inv_freq` holds radians per position.
    ///
    /// # Panics
    /// When `inv_freq` does not hold `head_dim / 2` frequencies.
    pub fn new(
        head_dim: usize,
        max_positions: usize,
        inv_freq: &[f32],
        attention_scale: f32,
    ) -> Self {
        let half = inv_freq.len();
        assert_eq!(head_dim, 2 * half, "head size against two elements for each frequency");
        let mut values = Vec::with_capacity(max_positions * head_dim);
        for position in 0..max_positions {
            let angle = |f: &f32| f64::from(position as f32 * f);
            let scaled = |x: f64| (x * f64::from(attention_scale)) as f32;
            values.extend(inv_freq.iter().map(|f| scaled(angle(f).cos())));
            values.extend(inv_freq.iter().map(|f| scaled(angle(f).sin())));
        }
        Self { half, max_positions, values }
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        2 * self.half
    }

    /// Positions the table covers.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// The cosines and the sines of one position.
    #[inline(always)]
    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        self.values[position as usize * 2 * self.half..][..2 * self.half].split_at(self.half)
    }
}

/// Which way to turn.
#[derive(Clone, Copy)]
enum Turn {
    Forward,
    Inverse,
}

impl Turn {
    #[inline(always)]
    fn sign(self) -> f32 {
        match self {
            Self::Forward => 1.0,
            Self::Inverse => -1.0,
        }
    }
}

impl Kernels {
    /// Rotates every head of `x` `[rows, heads * d]` in place by the position of its row.
    ///
    /// # Panics
    /// When `x` is not `positions.len()` rows of that width or a position lies beyond the table.
    pub fn rope(&self, x: &mut [f32], heads: usize, positions: &[u32], table: &RopeTable) {
        self.turn(x, heads, positions, table, Turn::Forward);
    }

    /// Turns the gradient of the rotated heads into that of the heads, in place.
    ///
    /// # Panics
    /// As [`Kernels::rope`].
    pub fn rope_backward(
        &self,
        dx: &mut [f32],
        heads: usize,
        positions: &[u32],
        table: &RopeTable,
    ) {
        self.turn(dx, heads, positions, table, Turn::Inverse);
    }

    fn turn(&self, x: &mut [f32], heads: usize, positions: &[u32], table: &RopeTable, turn: Turn) {
        let cols = heads * table.head_dim();
        let rows = positions.len();
        assert_eq!(x.len(), rows * cols, "values against {rows} rows of {cols}");
        let last = positions.iter().copied().max().unwrap_or(0) as usize;
        let limit = table.max_positions;
        assert!(rows == 0 || last < limit, "position {last} in a table of {limit}");
        if let Isa::Reference = self.isa {
            return reference(x, heads, positions, table, turn);
        }
        let x = Disjoint::new(x);
        self.split_rows(rows, cols, &|range| {
            // SAFETY: every row belongs to one task.
            let x = unsafe { x.part(range.start * cols, range.end * cols) };
            self.isa.vectorize(Rotate { x, heads, positions: &positions[range], table, turn });
        });
    }
}

/// Some whole rows.
struct Rotate<'a> {
    x: &'a mut [f32],
    heads: usize,
    positions: &'a [u32],
    table: &'a RopeTable,
    turn: Turn,
}

impl Job for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let half = self.table.half;
        let sign = s.splat(self.turn.sign());
        for (row, &position) in self.positions.iter().enumerate() {
            let (cos, sin) = self.table.at(position);
            let row = &mut self.x[row * self.heads * 2 * half..][..self.heads * 2 * half];
            for head in row.chunks_exact_mut(2 * half) {
                let (low, high) = head.split_at_mut(half);
                for at in (0..half).step_by(LANES) {
                    let c = s.read(cos, at, 0.0);
                    let sine = s.mul(s.read(sin, at, 0.0), sign);
                    let (a, b) = (s.read(low, at, 0.0), s.read(high, at, 0.0));
                    s.write(low, at, s.sub(s.mul(a, c), s.mul(b, sine)));
                    s.write(high, at, s.mul_add(b, c, s.mul(a, sine)));
                }
            }
        }
    }
}

/// The definition, in f64 from the table on.
fn reference(x: &mut [f32], heads: usize, positions: &[u32], table: &RopeTable, turn: Turn) {
    let half = table.half;
    for (row, &position) in positions.iter().enumerate() {
        let (cos, sin) = table.at(position);
        for head in 0..heads {
            let at = (row * heads + head) * 2 * half;
            for i in 0..half {
                let (a, b) = (f64::from(x[at + i]), f64::from(x[at + half + i]));
                let (c, s) = (f64::from(cos[i]), f64::from(turn.sign() * sin[i]));
                x[at + i] = (a * c - b * s) as f32;
                x[at + half + i] = (b * c + a * s) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::RopeTable;
    use crate::testing::{Random, assert_close, bits, every_level, reference};

    fn table(head_dim: usize, positions: usize, scale: f32) -> RopeTable {
        let freqs: Vec<f32> =
            (0..head_dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        RopeTable::new(head_dim, positions, &freqs, scale)
    }

    #[test]
    fn a_quarter_turn_by_hand() {
        let table = RopeTable::new(2, 3, &[std::f32::consts::FRAC_PI_2], 2.0);
        for kernels in every_level(1) {
            let mut x = [3.0, 5.0, 3.0, 5.0, 3.0, 5.0];
            kernels.rope(&mut x, 1, &[0, 1, 2], &table);
            assert_close(&x, &[6.0, 10.0, -10.0, 6.0, -6.0, -10.0], 1e-6);
        }
    }

    #[test]
    fn every_level_agrees_with_the_definition() {
        let mut random = Random::new(31);
        for (rows, heads, dim) in
            [(0, 2, 8), (3, 0, 8), (1, 1, 2), (5, 3, 30), (7, 9, 64), (90, 4, 128)]
        {
            let table = table(dim, 500, 1.25);
            let positions: Vec<u32> = (0..rows).map(|_| random.below(500) as u32).collect();
            let x = random.vec(rows * heads * dim, 3.0);
            let (mut y, mut dx) = (x.clone(), x.clone());
            reference().rope(&mut y, heads, &positions, &table);
            reference().rope_backward(&mut dx, heads, &positions, &table);
            for kernels in every_level(2) {
                let (mut y2, mut dx2) = (x.clone(), x.clone());
                kernels.rope(&mut y2, heads, &positions, &table);
                kernels.rope_backward(&mut dx2, heads, &positions, &table);
                assert_close(&y2, &y, 1e-6);
                assert_close(&dx2, &dx, 1e-6);
            }
        }
    }

    /// The map is linear, so its transpose satisfies <dy, rope x> = <rope_backward dy, x>.
    #[test]
    fn the_backward_pass_is_the_transpose() {
        let mut random = Random::new(32);
        let (rows, heads, dim) = (6, 2, 22);
        let table = table(dim, 40, 1.5);
        let positions: Vec<u32> = (0..rows).map(|i| i * 7 % 40).collect();
        let len = rows as usize * heads * dim;
        let (x, dy) = (random.vec(len, 1.0), random.vec(len, 1.0));
        let dot =
            |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
        for kernels in every_level(2) {
            let (mut y, mut dx) = (x.clone(), dy.clone());
            kernels.rope(&mut y, heads, &positions, &table);
            kernels.rope_backward(&mut dx, heads, &positions, &table);
            assert!((dot(&dy, &y) - dot(&dx, &x)).abs() < 1e-4);
        }
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_bit() {
        let mut random = Random::new(33);
        let (rows, heads, dim) = (200, 3, 64);
        let table = table(dim, 300, 1.0);
        let positions: Vec<u32> = (0..rows).map(|_| random.below(300) as u32).collect();
        let x = random.vec(rows * heads * dim, 1.0);
        for (one, three) in every_level(1).zip(every_level(3)) {
            let (mut a, mut b) = (x.clone(), x.clone());
            one.rope(&mut a, heads, &positions, &table);
            three.rope(&mut b, heads, &positions, &table);
            assert_eq!(bits(&a), bits(&b));
            let part = 9 * heads * dim..10 * heads * dim;
            let mut alone = x[part.clone()].to_vec();
            one.rope(&mut alone, heads, &positions[9..10], &table);
            assert_eq!(bits(&alone), bits(&a[part]));
        }
    }

    #[test]
    #[should_panic(expected = "position 8 in a table of 8")]
    fn a_position_beyond_the_table_is_refused() {
        reference().rope(&mut [0.0; 4], 1, &[8], &table(4, 8, 1.0));
    }
}
