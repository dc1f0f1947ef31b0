//! The products in AMX tiles, for keys and values in bf16 and heads of a multiple of 32 elements.
//!
//! ```text
//! scores:          tiles of x = rows of queries, 32 elements a line
//!                  tiles of w = the cache's own tiles of keys: 16 pairs of elements x 16 positions
//! mix:             tiles of x = rows of p rounded to bf16, 16 positions a tile
//!                  tiles of w = the cache's own tiles of values: 8 pairs of positions x 16 elements
//! mix_transposed:  tiles of x = columns of p rounded to bf16, 32 rows a line
//!                  tiles of w = pairs of rows x 16 elements
//! ```
//! A sum goes over 32 elements, 16 positions or 32 rows at a time in one fixed order, and what fills up the
//! last ones is zero times something finite, so neither the rows of a product nor what comes behind a row's
//! position can be seen in it.

use super::rounded::{Buffers, Rounded, Rounding, STEP, as_lines, as_lines_mut, grow};
use super::tiles::{Fetch, MixedOut, Panel, Products, ScoresOut, Weights};
use crate::Dtype;
use crate::cpu::{Amx, Isa};
use crate::gemm::Write;
use crate::gemm::amx::tiles::Tiles;
use crate::gemm::amx::{Beside, Multiply, Rows, Target};
use crate::gemm::buffer::{Line, WORDS};
use crate::gemm::pack;
use crate::kv::TILE;

/// Positions of one product of `mix_transposed`.
const POSITIONS: usize = 2 * TILE;

/// The proofs of what these products use.
#[derive(Clone, Copy)]
pub(super) struct Tiled {
    token: Amx,
    rounding: Rounding,
}

impl Tiled {
    /// For keys and values of `dtype` and heads of `d` elements, where these products compute them.
    pub(super) fn new(isa: Isa, dtype: Dtype, d: usize) -> Option<Self> {
        let Isa::Amx(token) = isa else { return None };
        let rounding = Rounding::new(token.avx512)?;
        (dtype == Dtype::Bf16 && d.is_multiple_of(STEP)).then_some(Self { token, rounding })
    }
}

impl Products for Tiled {
    const ROWS: usize = 32;

    type Weighting = Rounding;

    fn weighting(self) -> Rounding {
        self.rounding
    }

    fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]) {
        let row_lines = out.len() / rows.len() / STEP;
        let lines = as_lines_mut(out).chunks_exact_mut(row_lines);
        rows.zip(lines).for_each(|(row, to)| self.rounding.round(row, to));
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, fetch: &mut Fetch<'_>) {
        let d = 2 * keys.head_words;
        let tiles = keys.tiles.len();
        let needed = (out.rows - 1) * out.stride + tiles.next_multiple_of(2) * TILE;
        assert!(out.to.len() >= needed, "{} scores, {needed} are written", out.to.len());
        let held = Tiles::of_rows(self.token, out.rows);
        let x = Rows { lines: as_lines(x), row: d / STEP, step: 1 };
        // As many lines as two tiles have; a part is left for the softmax.
        let mut beside = FetchLines(fetch, 2 * keys.head_words * 5 / 8 / (d / STEP));
        for tile in (0..tiles).step_by(2) {
            let w = |tile: usize| {
                let tile = tile.min(tiles - 1);
                Rows { lines: as_lines(keys.tile(tile)), row: 1, step: WORDS }
            };
            let multiply = Multiply::of(x, [w(tile), w(tile + 1)], d / STEP);
            let to = out.to[tile * TILE..].as_mut_ptr();
            let to = Target { to, stride: out.stride, write: Write::Set };
            // SAFETY: rows have room for an even number of tiles, by the assertion.
            unsafe { held.multiply_beside(&multiply, &to, &mut beside) };
        }
    }

    fn mix(
        self,
        Rounded { lines, row, lens }: Rounded<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        fetch: &mut Fetch<'_>,
    ) {
        let MixedOut { to: out, write } = out;
        let x = Rows { lines, row, step: 1 };
        let (rows, d) = (lens.len(), out.len() / lens.len());
        let tiles = lens[rows - 1].div_ceil(TILE);
        let held = Tiles::of_pairs(self.token, rows);
        let mut beside = FetchLines(fetch, values.head_words / (d / STEP));
        for column in (0..d).step_by(STEP) {
            let out = &mut out[column..];
            assert!(out.len() >= (rows - 1) * d + STEP, "{} elements of output", out.len());
            let to = Target { to: out.as_mut_ptr(), stride: d, write };
            let w = (0..tiles).map(|tile| &values.tile(tile)[column..]);
            // SAFETY: the rows are there, by the assertion.
            unsafe { held.multiply_pairs(x, (w, d), &to, &mut beside) };
        }
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], buffers: &mut Buffers) {
        let (rows, d) = (p.lens.len(), x.len() / p.lens.len());
        let (depth, pair_lines) = (rows.div_ceil(STEP), d / WORDS);
        self.rounding.pairs(x, d, depth * WORDS, &mut buffers.pairs);
        let positions = p.lens[rows - 1].next_multiple_of(TILE);
        grow(&mut buffers.weights, POSITIONS * depth);
        for position in (0..positions).step_by(POSITIONS) {
            self.columns(p, position, depth, &mut buffers.weights);
            let x = Rows { lines: &buffers.weights, row: depth, step: 1 };
            let here = POSITIONS.min(positions - position);
            let held = Tiles::of_rows(self.token, here);
            for column in (0..d).step_by(STEP) {
                let w = |column: usize| Rows {
                    lines: &buffers.pairs[column / WORDS..],
                    row: pair_lines,
                    step: d,
                };
                let multiply = Multiply::of(x, [w(column), w(column + WORDS)], depth);
                let out = &mut out[position * d + column..];
                assert!(out.len() >= (here - 1) * d + STEP, "{} elements of output", out.len());
                let to = Target { to: out.as_mut_ptr(), stride: d, write: Write::Add };
                // SAFETY: the rows are there, by the assertion.
                unsafe { held.multiply(&multiply, &to) };
            }
        }
    }
}

impl Tiled {
    /// Columns `position` to `position + 32` of `p` rounded into rows of `depth` lines, 32 rows of `p` a
    /// line. A row counts as zero behind the tile where it ends.
    fn columns(self, p: Weights<'_>, position: usize, depth: usize, to: &mut [Line]) {
        for (half, to) in to.chunks_exact_mut(TILE * depth).take(2).enumerate() {
            let first = position + half * TILE;
            for step in 0..depth {
                let mut square = [Line::ZERO; WORDS];
                for (i, line) in square.iter_mut().enumerate() {
                    // SAFETY: the proof of AVX-512 is there.
                    *line = unsafe { p.pair(self.rounding, step * WORDS + i, first) };
                }
                let square = pack::transpose(Isa::Amx(self.token), &square);
                for (to, line) in to[step..].iter_mut().step_by(depth).zip(&square) {
                    *to = *line;
                }
            }
        }
    }
}

/// What is asked for at each step of a product.
struct FetchLines<'a, 'f>(&'a mut Fetch<'f>, usize);

impl Beside for FetchLines<'_, '_> {
    #[inline(always)]
    fn step(&mut self) {
        self.0.lines(self.1);
    }
}
