//! The products over the sixteen lanes of a level: plain Rust or AVX2.
//!
//! ```text
//! scores:          for each tile: R rows of sums, lanes = positions; loop over elements
//! mix:             for each tile, for each 16 elements: R rows of sums, lanes = elements; loop over
//!                  positions, past the shortest row only for those that see them
//! mix_transposed:  4 positions of sums, lanes = elements; loop over rows
//! ```
//! R is at most [`ROWS`]. An accumulator is one output's whole chain (from tile to tile it waits in the
//! output), so R cannot be seen in the results.

use super::tiles::{Buffers, Exact, Fetch, MixedOut, Panel, Products, ScoresOut, Weights};
use crate::Dtype;
use crate::cpu::Isa;
use crate::gemm::Write;
use crate::gemm::convert::{per_word, round_bf16};
use crate::kv::TILE;
use crate::simd::{Job, Simd};

/// Rows of sums that AVX2 holds in 12 of its 16 registers.
const ROWS: usize = 6;
/// Positions of one `mix_transposed`.
const POSITIONS: usize = 4;

/// The lanes of a level, for keys and values of a format. The packed operand is `[rows][d]` of rounded f32 bits.
#[derive(Clone, Copy)]
pub(super) struct Lanes(pub(super) Isa, pub(super) Dtype);

impl Products for Lanes {
    const ROWS: usize = 2 * ROWS;

    type Weighting = Exact;

    fn weighting(self) -> Exact {
        Exact(self.0)
    }

    fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]) {
        for (word, &x) in out.iter_mut().zip(rows.flatten()) {
            *word = match self.1 {
                Dtype::F32 => x.to_bits(),
                Dtype::Bf16 => round_bf16(x) << 16,
            };
        }
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, _fetch: &mut Fetch<'_>) {
        self.0.vectorize(Scores { x, keys, out });
    }

    fn mix(self, p: Weights<'_>, values: Panel<'_>, out: MixedOut<'_>, _fetch: &mut Fetch<'_>) {
        if out.write == Write::Set {
            out.to.fill(0.0);
        }
        self.0.vectorize(Mix { p, values, out: out.to });
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], _buffers: &mut Buffers) {
        self.0.vectorize(MixTransposed { p, x, out });
    }
}

/// Calls `$method::<R, S>` with R = `$rows`, 1 to [`ROWS`].
macro_rules! by_rows {
    ($rows:expr, $task:ident.$method:ident($($argument:expr),*)) => {
        match $rows {
            1 => $task.$method::<1, S>($($argument),*),
            2 => $task.$method::<2, S>($($argument),*),
            3 => $task.$method::<3, S>($($argument),*),
            4 => $task.$method::<4, S>($($argument),*),
            5 => $task.$method::<5, S>($($argument),*),
            _ => $task.$method::<ROWS, S>($($argument),*),
        }
    };
}

/// [`Products::scores`].
struct Scores<'a> {
    x: &'a [u32],
    keys: Panel<'a>,
    out: ScoresOut<'a>,
}

impl Job for Scores<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.out.rows;
        for tile in 0..self.keys.tiles.len() {
            for row in (0..rows).step_by(ROWS) {
                by_rows!(rows - row, self.rows(s, (row, tile)));
            }
        }
    }
}

impl Scores<'_> {
    #[inline(always)]
    fn rows<const R: usize, S: Simd>(&mut self, s: S, at: (usize, usize)) {
        let (row, tile) = at;
        let d = self.x.len() / self.out.rows;
        let x: [&[u32]; R] = std::array::from_fn(|r| &self.x[(row + r) * d..][..d]);
        let mut sums = [s.splat(0.0); R];
        let lines = self.keys.tile(tile).as_chunks::<TILE>().0;
        match self.keys.dtype {
            Dtype::F32 => {
                for (i, line) in lines.iter().enumerate() {
                    accumulate(s, &x, i, s.load(&line.map(f32::from_bits)), &mut sums);
                }
            }
            Dtype::Bf16 => {
                for (i, line) in lines.iter().enumerate() {
                    accumulate(s, &x, 2 * i, s.load_low(line), &mut sums);
                    accumulate(s, &x, 2 * i + 1, s.load_high(line), &mut sums);
                }
            }
        }
        for (r, &sum) in sums.iter().enumerate() {
            let at = (row + r) * self.out.stride + tile * TILE;
            s.write(&mut self.out.to[..at + TILE], at, sum);
        }
    }
}

/// Adds element `i` of each row times a line of keys.
#[inline(always)]
fn accumulate<const R: usize, S: Simd>(
    s: S,
    x: &[&[u32]; R],
    i: usize,
    line: S::V,
    sums: &mut [S::V; R],
) {
    for (sum, x) in sums.iter_mut().zip(x) {
        *sum = s.mul_add(s.splat(f32::from_bits(x[i])), line, *sum);
    }
}

/// [`Products::mix`], added.
struct Mix<'a> {
    p: Weights<'a>,
    values: Panel<'a>,
    out: &'a mut [f32],
}

impl Job for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.p.lens.len();
        let last = self.p.lens[rows - 1];
        for tile in 0..last.div_ceil(TILE) {
            for row in (0..rows).step_by(ROWS) {
                by_rows!(rows - row, self.rows(s, (row, tile)));
            }
        }
    }
}

impl Mix<'_> {
    #[inline(always)]
    fn rows<const R: usize, S: Simd>(&mut self, s: S, at: (usize, usize)) {
        let (row, tile) = at;
        let start = tile * TILE;
        let d = self.out.len() / self.p.lens.len();
        // How many positions of the tile each row sees, in ascending order.
        let seen: [usize; R] =
            std::array::from_fn(|r| self.p.lens[row + r].saturating_sub(start).min(TILE));
        let p: [&[f32; TILE]; R] =
            std::array::from_fn(|r| head(&self.p.rows[(row + r) * self.p.stride + start..]));
        let (words, dtype) = (self.values.tile(tile), self.values.dtype);
        for column in (0..d).step_by(TILE) {
            let mut sums = [s.splat(0.0); R];
            for (r, sum) in sums.iter_mut().enumerate() {
                *sum = s.read(self.out, (row + r) * d + column, 0.0);
            }
            let (common, last) = (seen[0], seen[R - 1]);
            for j in 0..common {
                let v = value(s, dtype, words, (j, d), column);
                for (sum, p) in sums.iter_mut().zip(&p) {
                    *sum = s.mul_add(s.splat(p[j]), v, *sum);
                }
            }
            for j in common..last {
                let v = value(s, dtype, words, (j, d), column);
                for ((sum, p), &seen) in sums.iter_mut().zip(&p).zip(&seen) {
                    if j < seen {
                        *sum = s.mul_add(s.splat(p[j]), v, *sum);
                    }
                }
            }
            for (r, &sum) in sums.iter().enumerate() {
                s.write(self.out, (row + r) * d + column, sum);
            }
        }
    }
}

/// [`Products::mix_transposed`].
struct MixTransposed<'a> {
    p: Weights<'a>,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Job for MixTransposed<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (p, d) = (self.p, self.x.len() / self.p.lens.len());
        let positions = p.lens.last().copied().unwrap_or(0).next_multiple_of(TILE);
        for position in (0..positions).step_by(POSITIONS) {
            let first = p.lens.partition_point(|&len| len <= position);
            for column in (0..d).step_by(TILE) {
                let mut sums = [s.splat(0.0); POSITIONS];
                for (j, sum) in sums.iter_mut().enumerate() {
                    *sum = s.read(self.out, (position + j) * d + column, 0.0);
                }
                for row in first..p.lens.len() {
                    let x = s.read(self.x, row * d + column, 0.0);
                    let p: &[f32; POSITIONS] = head(&p.rows[row * p.stride + position..]);
                    for (sum, &p) in sums.iter_mut().zip(p) {
                        *sum = s.mul_add(s.splat(p), x, *sum);
                    }
                }
                for (j, &sum) in sums.iter().enumerate() {
                    s.write(self.out, (position + j) * d + column, sum);
                }
            }
        }
    }
}

/// Sixteen of the `d` elements of the value at position `j` of a tile, from element `column` on.
#[inline(always)]
fn value<S: Simd>(
    s: S,
    dtype: Dtype,
    words: &[u32],
    (j, d): (usize, usize),
    column: usize,
) -> S::V {
    let words = head(&words[j / per_word(dtype) * d + column..]);
    match dtype {
        Dtype::F32 => s.load(&words.map(f32::from_bits)),
        Dtype::Bf16 if j % 2 == 0 => s.load_low(words),
        Dtype::Bf16 => s.load_high(words),
    }
}

/// The first N elements.
#[inline(always)]
fn head<T, const N: usize>(x: &[T]) -> &[T; N] {
    x.first_chunk().expect("tiles are whole")
}
