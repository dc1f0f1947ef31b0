//! Mixing by bf16 dot products, which take two positions or two rows at a time.
//!
//! ```text
//! mix:             R rows x D vectors of 16 elements (R * D <= 24), lanes = elements
//!     for each pair of positions, ascending: load D vectors of values; for each row broadcast a word of
//!     its weights; accumulate
//! mix_transposed:  4 positions x D vectors, lanes = elements
//!     for each pair of rows, ascending: load D vectors of x; for each position broadcast a word
//! ```
//! An accumulator is one output's whole chain, so neither R, D nor the number of positions can be seen in the
//! results.

use super::scores::Scores;
use super::{MIX_ROWS, MIX_VECTORS, MixTask, POSITIONS, load_sums, load_words, store_sums};
use crate::Dtype;
use crate::attention::rounded::{Buffers, Rounded, Rounding, grow};
use crate::attention::tiles::{Fetch, MixedOut, Panel, Products, ScoresOut, Weights};
use crate::cpu::Isa;
use crate::gemm::Write;
use crate::gemm::buffer::{Line, WORDS};
use crate::kv::TILE;
use crate::simd::avx512::dot_bf16;
use crate::split::even_parts;
use std::arch::x86_64::*;

/// Pairs of positions in a tile.
const PAIRS: usize = TILE / 2;

/// The proof that these products may be used.
#[derive(Clone, Copy)]
pub(in crate::attention) struct Dots {
    scores: Scores,
    rounding: Rounding,
}

impl Dots {
    /// For keys and values of `dtype`, where these products compute them.
    pub(in crate::attention) fn new(isa: Isa, dtype: Dtype) -> Option<Self> {
        let token = isa.avx512()?;
        let rounding = Rounding::new(token)?;
        (dtype == Dtype::Bf16).then(|| Self { scores: Scores::new(token, dtype), rounding })
    }
}

impl Products for Dots {
    const ROWS: usize = Scores::ROWS;

    type Weighting = Rounding;

    fn weighting(self) -> Rounding {
        self.rounding
    }

    fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]) {
        self.scores.pack(rows, out);
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, fetch: &mut Fetch<'_>) {
        self.scores.compute(x, keys, out, fetch);
    }

    fn mix(self, p: Rounded<'_>, values: Panel<'_>, out: MixedOut<'_>, fetch: &mut Fetch<'_>) {
        let MixedOut { to: out, write } = out;
        let rows = p.lens.len();
        let d = out.len() / rows;
        for part in even_parts(rows, MIX_ROWS) {
            let lines = &p.lines[part.start * p.row..];
            let p = Rounded { lines, row: p.row, lens: &p.lens[part.clone()] };
            let tiles = p.lens[p.lens.len() - 1].div_ceil(TILE);
            assert!(p.lines.len() >= (p.lens.len() - 1) * p.row + tiles.div_ceil(2), "weights");
            assert!(values.tiles.len() >= tiles && d == 2 * values.head_words, "values");
            let out = &mut out[part.start * d..part.end * d];
            for vectors in even_parts(d / TILE, MIX_VECTORS) {
                let kernel = by_vectors!(vectors.len(), of_rows(p.lens.len()));
                let (first, out) = (vectors.start, &mut out[vectors.start * TILE..]);
                let task = MixTask { p, values, d, first, out, write, fetch: &mut *fetch };
                // SAFETY: the proof is there; weights, values and columns are checked.
                unsafe { kernel(task) };
            }
        }
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], buffers: &mut Buffers) {
        let rows = p.lens.len();
        let (d, pairs) = (x.len() / rows, rows.div_ceil(2));
        self.rounding.pairs(x, d, pairs, &mut buffers.pairs);
        grow(&mut buffers.weights, pairs);
        let positions = p.lens[rows - 1].next_multiple_of(TILE);
        for first in (0..positions).step_by(TILE) {
            let from = p.lens.partition_point(|&len| len <= first) / 2;
            let weights = &mut buffers.weights[from..pairs];
            // SAFETY: the proof is there.
            unsafe { weight_pairs(self.rounding, p, (from, first), weights) };
            let x = &buffers.pairs[from * d / TILE..pairs * d / TILE];
            let out = &mut out[first * d..(first + TILE) * d];
            for vectors in even_parts(d / TILE, MIX_VECTORS) {
                let kernel = by_vectors!(vectors.len(), outer);
                // SAFETY: the proof is there; as many pairs of rows as of weights, columns by the split of d.
                unsafe { kernel(weights, x, (d, vectors.start), out) };
            }
        }
    }
}

type MixKernel = unsafe fn(MixTask<'_, '_, Rounded<'_>>);

fn of_rows<const D: usize>(rows: usize) -> MixKernel {
    by_rows!(rows, mix, D)
}

/// R rows times D vectors.
///
/// # Safety
/// AVX-512 with bf16 exists, rows have weights and values vectors for all tiles up to the last length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
unsafe fn mix<const R: usize, const D: usize>(task: MixTask<'_, '_, Rounded<'_>>) {
    let MixTask { p, values, d, first, out, write, fetch } = task;
    assert!(out.len() >= (R - 1) * d + D * TILE, "{} elements of output", out.len());
    let out = out.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); D]; R];
    if write == Write::Add {
        // SAFETY: by the assertion.
        sums = unsafe { load_sums(out, d) };
    }
    let weights = p.lines.as_ptr().cast::<i32>();
    for tile in 0..p.lens[R - 1].div_ceil(TILE) {
        let v = values.tile(tile).as_ptr().wrapping_add(first * TILE);
        let p_words = weights.wrapping_add(tile * PAIRS);
        fetch.lines(values.head_words);
        for pair in 0..PAIRS {
            // SAFETY: the tile has this pair of positions.
            let v = unsafe { load_words::<D>(v.wrapping_add(pair * d)) };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the row has lines to the end of the last tile.
                let word = unsafe { *p_words.wrapping_add(r * p.row * WORDS + pair) };
                accumulate(sums, word, &v);
            }
        }
    }
    // SAFETY: by the assertion.
    unsafe { store_sums(&sums, out, d) };
}

/// Weights of pairs of rows, from pair `from` on, at the tile of positions from `first` on.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn weight_pairs(proof: Rounding, p: Weights<'_>, (from, first): (usize, usize), to: &mut [Line]) {
    to.iter_mut().enumerate().for_each(|(i, to)| *to = p.pair(proof, from + i, first));
}

/// Adds to D vectors of a tile of positions; `x` has `d / 16` lines for each line of weights.
///
/// # Safety
/// AVX-512 with bf16 exists, and `x` and `out` have the vectors.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
unsafe fn outer<const D: usize>(
    weights: &[Line],
    x: &[Line],
    (d, column): (usize, usize),
    out: &mut [f32],
) {
    for position in (0..TILE).step_by(POSITIONS) {
        let out = out[position * d + column * TILE..].as_mut_ptr();
        // SAFETY: promised by the caller.
        let mut sums: [[_; D]; POSITIONS] = unsafe { load_sums(out, d) };
        let mut x = x.as_ptr().wrapping_add(column).cast::<u32>();
        for line in weights {
            // SAFETY: promised by the caller.
            let v = unsafe { load_words::<D>(x) };
            for (j, sums) in sums.iter_mut().enumerate() {
                accumulate(sums, line.0[position + j] as i32, &v);
            }
            x = x.wrapping_add(d);
        }
        // SAFETY: promised by the caller.
        unsafe { store_sums(&sums, out, d) };
    }
}

/// Adds the products of a pair of weights with D vectors of pairs.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn accumulate<const D: usize>(sums: &mut [__m512; D], word: i32, v: &[__m512i; D]) {
    let word = _mm512_set1_epi32(word);
    for (sum, &v) in sums.iter_mut().zip(v) {
        *sum = dot_bf16(*sum, word, v);
    }
}
