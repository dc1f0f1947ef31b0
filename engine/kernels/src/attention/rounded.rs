//! Weights of positions rounded to bf16, for products that take them two at a time.
//!
//! ```text
//! a row of weights:   32 positions a line, 2 a word          meets values, which lie in pairs of positions
//! pairs of rows:      16 positions a line, 2 rows a word     and pairs of rows of x, 16 elements a line
//! ```
//! The probabilities are rounded as in FlashAttention (arXiv 2205.14135); their sum is that before rounding.
//! What fills up a line is zero, and meets something finite, so nothing of it can be seen in a product. Leaves
//! out the products: see `amx` and `dots`.

use super::tiles::{Softmax, Softmaxed, Weighting, Weights, largest};
use crate::cpu::Avx512;
use crate::gemm::buffer::{Line, WORDS};
use crate::kv::TILE;
use crate::simd::Simd;
use std::arch::x86_64::*;

/// What one line holds of bf16.
pub(super) const STEP: usize = 2 * WORDS;

/// What products work in.
#[derive(Default)]
pub(in crate::attention) struct Buffers {
    /// Rounded weights.
    pub(super) weights: Vec<Line>,
    /// The right operand of `mix_transposed`.
    pub(super) pairs: Vec<Line>,
}

/// Rows of rounded weights, `row` lines apart. Row r has `lens[r]` of them, in ascending order; what follows
/// is zero, to the end of the last row's last line.
#[derive(Clone, Copy)]
pub(super) struct Rounded<'a> {
    pub(super) lines: &'a [Line],
    pub(super) row: usize,
    pub(super) lens: &'a [usize],
}

/// The proof that AVX-512 and its bf16 part may be used.
#[derive(Clone, Copy)]
pub(super) struct Rounding {
    avx512: Avx512,
}

impl Rounding {
    /// Where the processor has both.
    pub(super) fn new(avx512: Avx512) -> Option<Self> {
        avx512.bf16().map(|_| Self { avx512 })
    }

    /// Rounds values into lines, filled up with zeros.
    pub(super) fn round(self, values: &[f32], to: &mut [Line]) {
        // SAFETY: the proof is there.
        unsafe { round(self, values, to) }
    }

    /// Rows of `d` elements two and two, zero where one is not there: so many pairs of `d / 16` lines.
    pub(super) fn pairs(self, x: &[f32], d: usize, count: usize, to: &mut Vec<Line>) {
        grow(to, count * d / TILE);
        // SAFETY: the proofs of AVX-512 and its conversions are there.
        unsafe { pairs(self, (x, d), &mut to[..count * d / TILE]) };
    }
}

impl Weighting for Rounding {
    type Rows<'a> = Rounded<'a>;

    fn softmax(self, task: Softmax<'_, '_>, buffers: &mut Buffers) {
        grow(&mut buffers.weights, task.lens.len() * row_lines(task.stride));
        // SAFETY: the proof is there.
        unsafe { softmax(self, task, &mut buffers.weights) };
    }

    fn of_softmax<'a>(self, p: Softmaxed<'a>, buffers: &'a Buffers) -> Rounded<'a> {
        assert!(p.start.is_multiple_of(STEP), "weights begin inside a line at {}", p.start);
        let row = row_lines(p.stride);
        let lines = &buffers.weights[p.row * row + p.start / STEP..];
        Rounded { lines, row, lens: p.lens }
    }

    fn of<'a>(self, p: Weights<'a>, buffers: &'a mut Buffers) -> Rounded<'a> {
        let rows = p.lens.len();
        let row = row_lines(p.lens[rows - 1]);
        grow(&mut buffers.weights, rows * row);
        for (i, to) in buffers.weights.chunks_exact_mut(row).take(rows).enumerate() {
            self.round(&p.rows[i * p.stride..][..p.lens[i]], to);
        }
        Rounded { lines: &buffers.weights, row, lens: p.lens }
    }
}

impl Weights<'_> {
    /// Rows `2 pair` and the next at the sixteen positions from `first` on, which the rows that end before are
    /// zero at.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn pair(&self, proof: Rounding, pair: usize, first: usize) -> Line {
        let mut rows = [None; 2];
        for (i, to) in rows.iter_mut().enumerate() {
            let row = 2 * pair + i;
            if self.lens.get(row).is_some_and(|&len| len > first) {
                *to = self.rows[row * self.stride + first..].first_chunk();
            }
        }
        pair_rows(proof, rows)
    }
}

/// The words as lines.
pub(super) fn as_lines(words: &[u32]) -> &[Line] {
    // SAFETY: a line is sixteen words, on a line; any words are valid.
    let (before, lines, _) = unsafe { words.align_to::<Line>() };
    assert!(before.is_empty(), "words do not begin on a line");
    lines
}

pub(super) fn as_lines_mut(words: &mut [u32]) -> &mut [Line] {
    // SAFETY: as in `as_lines`.
    let (before, lines, _) = unsafe { words.align_to_mut::<Line>() };
    assert!(before.is_empty(), "words do not begin on a line");
    lines
}

/// At least `len` lines with anything in them.
pub(super) fn grow(lines: &mut Vec<Line>, len: usize) {
    if lines.len() < len {
        lines.resize(len, Line::ZERO);
    }
}

/// Lines of a row of so many weights; an odd number, so that rows do not meet in a set of the cache.
fn row_lines(weights: usize) -> usize {
    weights.div_ceil(STEP) | 1
}

/// [`Softmax`], rounded into rows of `row_lines(stride)` lines, and zero to the end of the longest row.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
fn softmax(proof: Rounding, task: Softmax<'_, '_>, weights: &mut [Line]) {
    let s = proof.avx512;
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
            *to = round_pair(proof, p);
        }
        if !rest.is_empty() {
            let (low, high) = rest.split_at(rest.len().min(TILE));
            let p = [low, high].map(|scores| weight(s.load_tail(scores, f32::NEG_INFINITY)));
            totals = [s.add(totals[0], p[0]), s.add(totals[1], p[1])];
            to[full.len()] = round_pair(proof, p);
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
fn round_pair(_proof: Rounding, [low, high]: [__m512; 2]) -> Line {
    let pairs = _mm512_cvtne2ps_pbh(high, low);
    // SAFETY: any 512 bits are a line.
    unsafe { std::mem::transmute::<__m512bh, Line>(pairs) }
}

/// Rounds values into lines, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn round(proof: Rounding, values: &[f32], to: &mut [Line]) {
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

/// See [`Rounding::pairs`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn pairs(proof: Rounding, (x, d): (&[f32], usize), to: &mut [Line]) {
    for (pair, to) in to.chunks_exact_mut(d / TILE).enumerate() {
        let rows = [2 * pair, 2 * pair + 1];
        for (i, to) in to.iter_mut().enumerate() {
            let part = |row: usize| x.get(row * d + i * TILE..)?.first_chunk();
            *to = pair_rows(proof, rows.map(part));
        }
    }
}

/// Sixteen values of two rows, rounded, one of both a word. A row that is not there is zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
#[inline]
fn pair_rows(_proof: Rounding, rows: [Option<&[f32; TILE]>; 2]) -> Line {
    let mut values = [_mm512_setzero_ps(); 2];
    for (values, row) in values.iter_mut().zip(rows) {
        if let Some(row) = row {
            // SAFETY: sixteen values are there.
            *values = unsafe { _mm512_loadu_ps(row.as_ptr()) };
        }
    }
    let halves = _mm512_cvtne2ps_pbh(values[1], values[0]);
    // SAFETY: any 512 bits are halves, or words.
    let halves = unsafe { std::mem::transmute::<__m512bh, __m512i>(halves) };
    /// Halves i and i + 16 next to each other.
    const ORDER: [u16; STEP] = {
        let mut order = [0; STEP];
        let mut i = 0;
        while i < STEP {
            order[i] = (i / 2 + i % 2 * TILE) as u16;
            i += 1;
        }
        order
    };
    // SAFETY: they are 64 bytes.
    let order = unsafe { _mm512_loadu_si512(ORDER.as_ptr().cast()) };
    let pair = _mm512_permutexvar_epi16(order, halves);
    // SAFETY: any 512 bits are a line.
    unsafe { std::mem::transmute::<__m512i, Line>(pair) }
}
