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

use super::avx512::{MIX_ROWS, MIX_VECTORS};
use super::rounded::{Buffers, Rounded, Rounding, grow};
use super::tiles::{Fetch, MixedOut, Panel, Weights};
use crate::gemm::Write;
use crate::gemm::buffer::{Line, WORDS};
use crate::kv::TILE;
use crate::simd::avx512::dot_bf16;
use crate::split::even_parts;
use std::arch::x86_64::*;

/// Pairs of positions in a tile.
const PAIRS: usize = TILE / 2;
/// Positions of one product of `mix_transposed`.
const POSITIONS: usize = 4;

/// `out[r] = sum over j of p_rj v_j`.
pub(super) fn mix(
    _proof: Rounding,
    p: Rounded<'_>,
    values: Panel<'_>,
    out: MixedOut<'_>,
    fetch: &mut Fetch<'_>,
) {
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
            let first = vectors.start;
            let kernel = match vectors.len() {
                1 => of_rows::<1>(p.lens.len()),
                2 => of_rows::<2>(p.lens.len()),
                3 => of_rows::<3>(p.lens.len()),
                _ => of_rows::<4>(p.lens.len()),
            };
            let out = &mut out[first * TILE..];
            let task = MixTask { p, values, tiles, d, first, out, write, fetch: &mut *fetch };
            // SAFETY: the proof is there; weights, values and columns are checked.
            unsafe { kernel(task) };
        }
    }
}

/// The vectors from `first` on of all rows.
struct MixTask<'a, 'f> {
    p: Rounded<'a>,
    values: Panel<'a>,
    tiles: usize,
    d: usize,
    first: usize,
    /// From the first vector on.
    out: &'a mut [f32],
    write: Write,
    fetch: &'a mut Fetch<'f>,
}

fn of_rows<const D: usize>(rows: usize) -> unsafe fn(MixTask<'_, '_>) {
    match rows {
        1 => mix_rows::<1, D>,
        2 => mix_rows::<2, D>,
        3 => mix_rows::<3, D>,
        4 => mix_rows::<4, D>,
        5 => mix_rows::<5, D>,
        6 => mix_rows::<6, D>,
        n => unreachable!("{n} rows in a part"),
    }
}

/// R rows times D vectors.
///
/// # Safety
/// AVX-512 with bf16 exists, rows have weights and values have vectors for all tiles.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
unsafe fn mix_rows<const R: usize, const D: usize>(task: MixTask<'_, '_>) {
    let MixTask { p, values, tiles, d, first, out, write, fetch } = task;
    assert!(out.len() >= (R - 1) * d + D * TILE, "{} elements of output", out.len());
    let out = out.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); D]; R];
    if write == Write::Add {
        for (r, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                // SAFETY: by the assertion.
                *sum = unsafe { _mm512_loadu_ps(out.wrapping_add(r * d + c * TILE)) };
            }
        }
    }
    let weights = p.lines.as_ptr().cast::<i32>();
    for tile in 0..tiles {
        let v = values.tile(tile).as_ptr().wrapping_add(first * TILE);
        let p_words = weights.wrapping_add(tile * PAIRS);
        fetch.lines(values.head_words);
        for pair in 0..PAIRS {
            // SAFETY: the tile has this pair of positions.
            let v = unsafe { load::<D>(v.wrapping_add(pair * d)) };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: the row has lines to the end of the last tile.
                let word = unsafe { *p_words.wrapping_add(r * p.row * WORDS + pair) };
                accumulate(sums, word, &v);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        for (c, &sum) in sums.iter().enumerate() {
            // SAFETY: by the assertion.
            unsafe { _mm512_storeu_ps(out.wrapping_add(r * d + c * TILE), sum) };
        }
    }
}

/// `out[j] += sum over r with lens[r] > j of p_rj x_r`.
pub(super) fn mix_transposed(
    rounding: Rounding,
    p: Weights<'_>,
    x: &[f32],
    out: &mut [f32],
    buffers: &mut Buffers,
) {
    let rows = p.lens.len();
    let (d, pairs) = (x.len() / rows, rows.div_ceil(2));
    rounding.pairs(x, d, pairs, &mut buffers.pairs);
    grow(&mut buffers.weights, pairs);
    let positions = p.lens[rows - 1].next_multiple_of(TILE);
    for first in (0..positions).step_by(TILE) {
        let from = p.lens.partition_point(|&len| len <= first) / 2;
        let weights = &mut buffers.weights[from..pairs];
        // SAFETY: the proof is there.
        unsafe { weight_pairs(rounding, p, (from, first), weights) };
        let x = &buffers.pairs[from * d / TILE..pairs * d / TILE];
        let out = &mut out[first * d..(first + TILE) * d];
        for vectors in even_parts(d / TILE, MIX_VECTORS) {
            let kernel = match vectors.len() {
                1 => outer::<1>,
                2 => outer::<2>,
                3 => outer::<3>,
                _ => outer::<4>,
            };
            // SAFETY: the proof is there; as many pairs of rows as of weights, columns by the split of d.
            unsafe { kernel(weights, x, (d, vectors.start), out) };
        }
    }
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
        let mut sums = [[_mm512_setzero_ps(); D]; POSITIONS];
        for (j, sums) in sums.iter_mut().enumerate() {
            for (c, sum) in sums.iter_mut().enumerate() {
                // SAFETY: promised by the caller.
                *sum = unsafe { _mm512_loadu_ps(out.wrapping_add(j * d + c * TILE)) };
            }
        }
        let mut x = x.as_ptr().wrapping_add(column).cast::<u32>();
        for line in weights {
            // SAFETY: promised by the caller.
            let v = unsafe { load::<D>(x) };
            for (j, sums) in sums.iter_mut().enumerate() {
                accumulate(sums, line.0[position + j] as i32, &v);
            }
            x = x.wrapping_add(d);
        }
        for (j, sums) in sums.iter().enumerate() {
            for (c, &sum) in sums.iter().enumerate() {
                // SAFETY: promised by the caller.
                unsafe { _mm512_storeu_ps(out.wrapping_add(j * d + c * TILE), sum) };
            }
        }
    }
}

/// D vectors of pairs.
///
/// # Safety
/// They can be read.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load<const D: usize>(at: *const u32) -> [__m512i; D] {
    let mut v = [_mm512_setzero_si512(); D];
    for (c, v) in v.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *v = unsafe { _mm512_loadu_si512(at.wrapping_add(c * TILE).cast()) };
    }
    v
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
