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
//! position can be seen in it. The probabilities are rounded as in FlashAttention (arXiv 2205.14135);
//! their sum is that before rounding.

use super::tiles::{
    Fetch, MixedOut, Panel, Products, ScoresOut, Softmax, Softmaxed, Weights, largest,
};
use crate::Dtype;
use crate::cpu::{Amx, Avx512, Avx512Bf16, Isa};
use crate::gemm::Write;
use crate::gemm::amx::tiles::Tiles;
use crate::gemm::amx::{Beside, Multiply, Rows, Target};
use crate::gemm::buffer::{Line, WORDS};
use crate::gemm::pack;
use crate::kv::TILE;
use crate::simd::Simd;
use std::arch::x86_64::*;

/// What one line of a tile holds of bf16, and one step of a product sums over.
const STEP: usize = 2 * WORDS;
/// Positions of one product of `mix_transposed`.
const POSITIONS: usize = 2 * TILE;

/// The proofs of what these products use.
#[derive(Clone, Copy)]
pub(super) struct Tiled {
    token: Amx,
    bf16: Avx512Bf16,
}

/// What products work in.
#[derive(Default)]
pub(super) struct Buffers {
    /// Rounded weights.
    weights: Vec<Line>,
    /// The right operand of `mix_transposed`.
    pairs: Vec<Line>,
}

impl Tiled {
    /// For keys and values of `dtype` and heads of `d` elements, where these products compute them.
    pub(super) fn new(isa: Isa, dtype: Dtype, d: usize) -> Option<Self> {
        let Isa::Amx(token) = isa else { return None };
        let bf16 = token.avx512.bf16()?;
        (dtype == Dtype::Bf16 && d.is_multiple_of(STEP)).then_some(Self { token, bf16 })
    }

    /// Rounds values into lines, filled up with zeros.
    fn round(self, values: &[f32], to: &mut [Line]) {
        // SAFETY: the proofs of AVX-512 and its conversions are there.
        unsafe { round(self.bf16, values, to) }
    }
}

impl Products for Tiled {
    const ROWS: usize = 32;

    fn pack<'x>(
        self,
        _dtype: Dtype,
        rows: impl ExactSizeIterator<Item = &'x [f32]>,
        out: &mut [u32],
    ) {
        let row_lines = out.len() / rows.len() / STEP;
        let lines = as_lines_mut(out).chunks_exact_mut(row_lines);
        rows.zip(lines).for_each(|(row, to)| self.round(row, to));
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

    fn softmax(self, _isa: Isa, task: Softmax<'_, '_>, buffers: &mut Buffers) {
        let row_lines = row_lines(task.stride);
        grow(&mut buffers.weights, task.lens.len() * row_lines);
        // SAFETY: the proofs of AVX-512 and its conversions are there.
        unsafe { rounded_softmax((self.token.avx512, self.bf16), task, &mut buffers.weights) };
    }

    fn mix_softmax(
        self,
        p: Softmaxed<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        (buffers, fetch): (&mut Buffers, &mut Fetch<'_>),
    ) {
        assert!(p.start.is_multiple_of(STEP), "weights begin inside a line at {}", p.start);
        let row = row_lines(p.stride);
        let lines = &buffers.weights[p.row * row + p.start / STEP..];
        self.mix_rounded((Rows { lines, row, step: 1 }, p.lens), values, out, fetch);
    }

    fn mix(
        self,
        p: Weights<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        (buffers, fetch): (&mut Buffers, &mut Fetch<'_>),
    ) {
        let rows = p.lens.len();
        let row_lines = row_lines(p.lens[rows - 1]);
        grow(&mut buffers.weights, rows * row_lines);
        for (row, to) in buffers.weights.chunks_exact_mut(row_lines).take(rows).enumerate() {
            self.round(&p.rows[row * p.stride..][..p.lens[row]], to);
        }
        let x = Rows { lines: &buffers.weights, row: row_lines, step: 1 };
        self.mix_rounded((x, p.lens), values, out, fetch);
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], buffers: &mut Buffers) {
        let (rows, d) = (p.lens.len(), x.len() / p.lens.len());
        let (depth, pair_lines) = (rows.div_ceil(STEP), d / WORDS);
        grow(&mut buffers.pairs, depth * WORDS * pair_lines);
        for (pair, to) in buffers.pairs.chunks_exact_mut(pair_lines).take(depth * WORDS).enumerate()
        {
            let row = |row: usize| x.get(row * d..(row + 1) * d);
            // SAFETY: the proof of AVX-512 is there.
            unsafe { pair_rows(self.bf16, row(2 * pair), row(2 * pair + 1), to) };
        }
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
    /// `mix` of rounded weights, which are zero from each row's end to that of the last one.
    fn mix_rounded(
        self,
        (x, lens): (Rows<'_>, &[usize]),
        values: Panel<'_>,
        out: MixedOut<'_>,
        fetch: &mut Fetch<'_>,
    ) {
        let MixedOut { to: out, write } = out;
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

    /// Columns `position` to `position + 32` of `p` rounded into rows of `depth` lines, 32 rows of `p` a
    /// line. A row counts as zero behind the tile where it ends.
    fn columns(self, p: Weights<'_>, position: usize, depth: usize, to: &mut [Line]) {
        for (half, to) in to.chunks_exact_mut(TILE * depth).take(2).enumerate() {
            let first = position + half * TILE;
            for step in 0..depth {
                let mut square = [Line::ZERO; WORDS];
                for (i, line) in square.iter_mut().enumerate() {
                    let row = |row: usize| {
                        let seen = p.lens.get(row).is_some_and(|&len| len > first);
                        seen.then(|| &p.rows[row * p.stride + first..][..TILE])
                    };
                    let pair = step * STEP + 2 * i;
                    let to = std::slice::from_mut(line);
                    // SAFETY: the proof of AVX-512 is there.
                    unsafe { pair_rows(self.bf16, row(pair), row(pair + 1), to) };
                }
                let square = pack::transpose(Isa::Amx(self.token), &square);
                for (to, line) in to[step..].iter_mut().step_by(depth).zip(&square) {
                    *to = *line;
                }
            }
        }
    }
}

/// The words as lines.
fn as_lines(words: &[u32]) -> &[Line] {
    // SAFETY: a line is sixteen words, on a line; any words are valid.
    let (before, lines, _) = unsafe { words.align_to::<Line>() };
    assert!(before.is_empty(), "words do not begin on a line");
    lines
}

fn as_lines_mut(words: &mut [u32]) -> &mut [Line] {
    // SAFETY: as in `as_lines`.
    let (before, lines, _) = unsafe { words.align_to_mut::<Line>() };
    assert!(before.is_empty(), "words do not begin on a line");
    lines
}

/// At least `len` lines with anything in them.
fn grow(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line::ZERO);
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

/// Lines of a row of so many weights; an odd number, so that rows do not meet in a set of the cache.
fn row_lines(weights: usize) -> usize {
    weights.div_ceil(STEP) | 1
}

/// [`Softmax`], rounded into rows of `row_lines(stride)` lines, and zero to the end of the longest row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
fn rounded_softmax((s, bf16): (Avx512, Avx512Bf16), task: Softmax<'_, '_>, weights: &mut [Line]) {
    let Softmax { scale, scores, stride, lens, sums, fetch: (fetch, lines), before_row } = task;
    let used = lens.iter().copied().max().unwrap_or(0).div_ceil(STEP);
    let factor = scale * std::f32::consts::LOG2_E;
    let rows = scores.chunks(stride).zip(weights.chunks_exact_mut(row_lines(stride)));
    for (r, (((row, to), &len), sum)) in rows.zip(lens).zip(sums).enumerate() {
        before_row(r);
        let max = s.splat(largest(s, &row[..len]) * factor);
        let factor = s.splat(factor);
        let weight = |score| exp2(_mm512_fmsub_ps(score, factor, max));
        // Of even and of odd tiles.
        let mut totals = [s.splat(0.0); 2];
        let (full, rest) = row[..len].as_chunks::<STEP>();
        for (scores, to) in full.iter().zip(&mut *to) {
            fetch.lines(2 * lines);
            let p = [0, 1].map(|half| weight(s.load(&scores.as_chunks().0[half])));
            totals = [s.add(totals[0], p[0]), s.add(totals[1], p[1])];
            *to = round_pair(bf16, p);
        }
        if !rest.is_empty() {
            let (low, high) = rest.split_at(rest.len().min(TILE));
            let p = [low, high].map(|scores| weight(s.load_tail(scores, f32::NEG_INFINITY)));
            totals = [s.add(totals[0], p[0]), s.add(totals[1], p[1])];
            to[full.len()] = round_pair(bf16, p);
        }
        to[len.div_ceil(STEP)..used].fill(Line::ZERO);
        *sum = s.sum(s.add(totals[0], totals[1]));
    }
}

/// 2^x for x up to 127 within 2 units in the last place, 0 below 2^-126, NaN at NaN.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline]
fn exp2(x: __m512) -> __m512 {
    /// Minimax polynomial of 2^f - 1 over f from 0 to 1 without constant term, highest power first.
    const POLY: [f32; 5] = [0.001_867_13, 0.009_017_031, 0.055_799_913, 0.240_164_44, 0.693_151_3];
    /// Rounding down, no exceptions.
    const DOWN: i32 = 0x09;
    // A lane that is not seen takes no part in the scaling, which is slow where its result is denormal.
    let seen = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, _mm512_set1_ps(-126.0));
    let f = _mm512_reduce_ps::<DOWN>(x);
    let mut p = _mm512_set1_ps(POLY[0]);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(POLY[1]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(POLY[2]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(POLY[3]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(POLY[4]));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0));
    _mm512_maskz_scalef_ps(seen, p, x)
}

/// Thirty-two values as a line.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn round_pair(_proof: Avx512Bf16, [low, high]: [__m512; 2]) -> Line {
    let pairs = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: any 512 bits are a line.
    unsafe { std::mem::transmute::<__m512bh, Line>(pairs) }
}

/// Rounds values into lines, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn round(proof: Avx512Bf16, values: &[f32], to: &mut [Line]) {
    let mut left = values;
    for line in to {
        let (here, rest) = left.split_at(left.len().min(STEP));
        let (low, high) = here.split_at(here.len().min(TILE));
        *line = round_pair(proof, [load(low), load(high)]);
        left = rest;
    }
}

/// Up to sixteen values, then zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn load(values: &[f32]) -> __m512 {
    let mask = ((1_u32 << values.len()) - 1) as __mmask16;
    // SAFETY: masked to the values that are there.
    unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr()) }
}

/// Rounds two rows of values into pairs, one element of both a word. A row that is not there is zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pair_rows(_proof: Avx512Bf16, even: Option<&[f32]>, odd: Option<&[f32]>, to: &mut [Line]) {
    for (i, to) in to.iter_mut().enumerate() {
        let values =
            |row: Option<&[f32]>| match row.and_then(|row| row[i * TILE..].first_chunk::<TILE>()) {
                // SAFETY: sixteen values are there.
                Some(values) => unsafe { _mm512_loadu_ps(values.as_ptr()) },
                None => _mm512_setzero_ps(),
            };
        let [even, odd] = [even, odd].map(|row| {
            let halves = _mm512_cvtneps_pbh(values(row));
            // SAFETY: any 256 bits are halves.
            unsafe { std::mem::transmute::<__m256bh, __m256i>(halves) }
        });
        let pair = _mm512_or_si512(
            _mm512_cvtepu16_epi32(even),
            _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(odd)),
        );
        // SAFETY: any 512 bits are a line.
        *to = unsafe { std::mem::transmute::<__m512i, Line>(pair) };
    }
}
