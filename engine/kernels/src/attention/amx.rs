//! The products in AMX tiles, for keys and values in bf16 and heads of a multiple of 32 elements.
//!
//! ```text
//! scores:          tiles of x = rows of queries, 32 elements a line
//!                  tiles of w = the cache's own tiles of keys: 16 pairs of elements x 16 positions
//! mix:             tiles of x = rows of p rounded to bf16, 32 positions a line
//!                  tiles of w = pairs of positions x 16 elements: values, interleaved two by two
//! mix_transposed:  tiles of x = columns of p rounded to bf16, 32 rows a line
//!                  tiles of w = pairs of rows x 16 elements
//! ```
//! A sum goes over 32 positions at a time in one fixed order, and what fills up the last 32 is zero times
//! zero, so neither the rows of a product nor what comes behind a row's position can be seen in it. The
//! probabilities are rounded as in FlashAttention (arXiv 2205.14135); their sum is that before rounding.
//!
//! Values that are not finite would reach rows which do not see them, as zero times infinity: rows of such
//! a product are mixed one by one, each with what it sees.

use super::tiles::{Fetch, Panel, Products, ScoresOut, Weights};
use crate::Dtype;
use crate::cpu::{Amx, Avx512Bf16, Isa};
use crate::gemm::Write;
use crate::gemm::amx::tiles::Tiles;
use crate::gemm::amx::{Beside, Multiply, Rows, Target};
use crate::gemm::buffer::{Line, WORDS};
use crate::gemm::pack;
use crate::kv::TILE;
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

/// What products keep from one to the next.
#[derive(Default)]
pub(super) struct Buffers {
    /// Pairs of values, `[pair][d]` words.
    values: Vec<Line>,
    /// Positions among them, the last pair filled up with zeros, and those whose tiles they came from.
    positions: usize,
    /// The first position with a value that is not finite.
    broken: Option<usize>,
    /// Rounded weights.
    weights: Vec<Line>,
    /// The right operand of `mix_transposed`.
    pairs: Vec<Line>,
}

impl Buffers {
    /// Forgets the values: other ones come, or they have changed.
    pub(super) fn forget(&mut self) {
        (self.positions, self.broken) = (0, None);
    }
}

impl Tiled {
    /// For keys and values of `dtype` and heads of `d` elements, where these products compute them.
    pub(super) fn new(isa: Isa, dtype: Dtype, d: usize) -> Option<Self> {
        let Isa::Amx(token) = isa else { return None };
        let bf16 = token.avx512.bf16()?;
        (dtype == Dtype::Bf16 && d.is_multiple_of(STEP)).then_some(Self { token, bf16 })
    }

    /// `out[r] = sum over j of p_rj v_j` for rows that see the same values of `buffers`, or whose weights
    /// of the others are zero.
    fn mix_rows(self, p: Weights<'_>, d: usize, buffers: &mut Buffers, out: &mut [f32]) {
        let rows = p.lens.len();
        let depth = p.lens[rows - 1].div_ceil(STEP);
        let row_lines = depth + 1;
        grow(&mut buffers.weights, rows * row_lines);
        for (row, to) in buffers.weights.chunks_exact_mut(row_lines).take(rows).enumerate() {
            let weights = &p.rows[row * p.stride..][..p.lens[row]];
            self.round(weights, &mut to[..depth]);
        }
        let x = Rows { lines: &buffers.weights, row: row_lines, step: 1 };
        let held = Tiles::of_rows(self.token, rows);
        for column in (0..d).step_by(STEP) {
            let w = |column: usize| Rows {
                lines: &buffers.values[column / WORDS..],
                row: d / WORDS,
                step: d,
            };
            let w = [w(column), w(column + WORDS)];
            let out = &mut out[column..];
            assert!(out.len() >= (rows - 1) * d + STEP, "{} elements of output", out.len());
            let to = Target { to: out.as_mut_ptr(), stride: d, write: Write::Set };
            // SAFETY: the rows are there, by the assertion.
            unsafe { held.multiply(&Multiply::of(x, w, depth), &to) };
        }
    }

    /// Rounds values into lines, filled up with zeros.
    fn round(self, values: &[f32], to: &mut [Line]) {
        // SAFETY: the proofs of AVX-512 and its conversions are there.
        unsafe { round(self.bf16, values, to) }
    }

    /// Makes `buffers` hold the values of positions below `len`.
    fn values(self, values: Panel<'_>, len: usize, buffers: &mut Buffers, fetch: &mut Fetch<'_>) {
        let d = 2 * values.head_words;
        let pair_lines = d / WORDS;
        grow(&mut buffers.values, len.next_multiple_of(STEP) / 2 * pair_lines);
        if len <= buffers.positions {
            return;
        }
        for tile in buffers.positions / TILE..len.next_multiple_of(STEP) / TILE {
            let first = tile * TILE;
            let seen = len.saturating_sub(first).min(TILE);
            let to = &mut buffers.values[first / 2 * pair_lines..][..TILE / 2 * pair_lines];
            if seen == 0 {
                to.fill(Line::ZERO);
                continue;
            }
            let words = values.tile(tile);
            for (i, to) in to.chunks_exact_mut(pair_lines).enumerate() {
                let row = |i: usize| &words[i * values.head_words..][..values.head_words];
                let [even, odd] = [2 * i, 2 * i + 1].map(|i| (i < seen).then(|| row(i)));
                fetch.lines(values.head_words * 3 / 4 / (TILE / 2));
                // SAFETY: the proof of AVX-512 is there.
                let finite = unsafe { interleave(self.bf16, even, odd, to) };
                if !finite {
                    let at = first + 2 * i;
                    buffers.broken = Some(buffers.broken.map_or(at, |broken| broken.min(at)));
                }
            }
        }
        buffers.positions = len;
    }
}

impl Products for Tiled {
    const ROWS: usize = 32;

    fn pack(self, _dtype: Dtype, rows: &[f32], d: usize, out: &mut [u32]) {
        let lines = as_lines_mut(out).chunks_exact_mut(d / STEP);
        rows.chunks_exact(d).zip(lines).for_each(|(row, to)| self.round(row, to));
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
        p: Weights<'_>,
        values: Panel<'_>,
        out: &mut [f32],
        (buffers, fetch): (&mut Buffers, &mut Fetch<'_>),
    ) {
        let (rows, d) = (p.lens.len(), out.len() / p.lens.len());
        let last = p.lens[rows - 1];
        self.values(values, last, buffers, fetch);
        if buffers.broken.is_none_or(|at| at >= last) {
            return self.mix_rows(p, d, buffers, out);
        }
        for (row, out) in out.chunks_exact_mut(d).enumerate() {
            buffers.forget();
            self.values(values, p.lens[row], buffers, fetch);
            let p = Weights {
                rows: &p.rows[row * p.stride..],
                lens: &p.lens[row..=row],
                stride: p.stride,
            };
            self.mix_rows(p, d, buffers, out);
        }
        buffers.forget();
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

/// Rounds values into lines, filled up with zeros.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn round(_proof: Avx512Bf16, values: &[f32], to: &mut [Line]) {
    let mut left = values;
    for line in to {
        let (here, rest) = left.split_at(left.len().min(STEP));
        let (low, high) = here.split_at(here.len().min(TILE));
        let pairs = _mm512_cvtne2ps_pbh(load(high), load(low));
        // SAFETY: any 512 bits are a line.
        *line = unsafe { std::mem::transmute::<__m512bh, Line>(pairs) };
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

/// Words of two rows of pairs of elements become pairs of rows, one element a word; whether all are finite.
/// A row that is not there is zero.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn interleave(
    _proof: Avx512Bf16,
    even: Option<&[u32]>,
    odd: Option<&[u32]>,
    to: &mut [Line],
) -> bool {
    let exponent = _mm512_set1_epi16(0x7f80);
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    let first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    let mut broken = 0;
    for (i, to) in to.chunks_exact_mut(2).enumerate() {
        let words = |row: Option<&[u32]>| match row
            .and_then(|row| row[i * WORDS..].first_chunk::<WORDS>())
        {
            // SAFETY: sixteen words are there.
            Some(words) => unsafe { _mm512_loadu_si512(words.as_ptr().cast()) },
            None => _mm512_setzero_si512(),
        };
        let (a, b) = (words(even), words(odd));
        for x in [a, b] {
            broken |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
        }
        let low = _mm512_or_si512(_mm512_andnot_si512(upper, a), _mm512_slli_epi32::<16>(b));
        let high = _mm512_or_si512(_mm512_srli_epi32::<16>(a), _mm512_and_si512(b, upper));
        let lines = [
            _mm512_permutex2var_epi32(low, first, high),
            _mm512_permutex2var_epi32(low, second, high),
        ];
        for (to, line) in to.iter_mut().zip(lines) {
            // SAFETY: any 512 bits are a line.
            *to = unsafe { std::mem::transmute::<__m512i, Line>(line) };
        }
    }
    broken == 0
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
