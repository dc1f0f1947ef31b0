//! The products in AVX-512; bf16 by its dot products where the processor has them (`dots`).
//!
//! ```text
//! scores:  R rows x P tiles of accumulators (R * P <= 24), lanes = positions
//!     for each word w of a head: for each tile load 64 bytes of keys; for each row broadcast word w
//!     of the query; accumulate the R * P products
//! mix:     R rows x D vectors of 16 elements (R * D <= 24), lanes = elements
//!     for each position j, ascending: load (and widen) D vectors of the value; for each row
//!     broadcast p_rj; accumulate. Positions that not all rows see: the same, masked by row
//! mix_transposed:  4 positions x D vectors, lanes = elements; loop over rows
//! ```
//! An accumulator is one output's whole chain, so neither R, P nor D can be seen in the results.

use super::dots;
use super::rounded::{Buffers, Rounding};
use super::tiles::{Fetch, MixedOut, Panel, Products, ScoresOut, Softmax, Softmaxed, Weights};
use crate::Dtype;
use crate::cpu::{Avx512, Isa};
use crate::gemm::Write;
use crate::gemm::convert::{per_word, round_bf16};
use crate::kv::{MAX_HEAD_DIM, TILE};
use crate::simd::avx512::{broadcast, dot_bf16};
use crate::split::even_parts;
use std::arch::x86_64::*;

/// Most rows and vectors of one `mix`.
pub(super) const MIX_ROWS: usize = 6;
pub(super) const MIX_VECTORS: usize = 4;
/// Positions of one `mix_transposed`.
const POSITIONS: usize = 4;

/// The proof that these products may be used, and how words of a query meet lines of keys.
///
/// The packed operand of R rows is `[w][R]` words where dot products exist, else `[d][R]` f32.
#[derive(Clone, Copy)]
pub(super) struct Fast {
    multiply: Multiply,
}

#[derive(Clone, Copy)]
enum Multiply {
    /// bf16 pairs, both products in one instruction; weights of values are rounded.
    Dot(Rounding),
    /// bf16 pairs widened to f32, even elements first.
    Widened,
    /// f32.
    Single,
}

impl Fast {
    /// For keys and values of `dtype`.
    pub(super) fn new(token: Avx512, dtype: Dtype) -> Self {
        let multiply = match (dtype, Rounding::new(token)) {
            (Dtype::F32, _) => Multiply::Single,
            (Dtype::Bf16, Some(rounding)) => Multiply::Dot(rounding),
            (Dtype::Bf16, None) => Multiply::Widened,
        };
        Self { multiply }
    }

    /// All tiles for R rows: P at a time, then the rest by halves.
    fn score_rows<const R: usize, const P: usize>(self, task: &mut ScoreTask<'_, '_>) {
        let tiles = task.keys.tiles.len();
        let mut first = 0;
        while first + P <= tiles {
            self.score_tiles::<R, P>(task, first);
            first += P;
        }
        while first < tiles {
            match tiles - first {
                4.. if P > 4 => {
                    self.score_tiles::<R, 4>(task, first);
                    first += 4;
                }
                2.. if P > 2 => {
                    self.score_tiles::<R, 2>(task, first);
                    first += 2;
                }
                _ => {
                    self.score_tiles::<R, 1>(task, first);
                    first += 1;
                }
            }
        }
    }

    fn score_tiles<const R: usize, const P: usize>(
        self,
        task: &mut ScoreTask<'_, '_>,
        first: usize,
    ) {
        let keys = std::array::from_fn(|p| task.keys.tile(first + p).as_ptr());
        let words = task.keys.head_words;
        let out = &mut task.out.to[first * TILE..];
        assert!(out.len() >= (R - 1) * task.out.stride + P * TILE);
        let to = out.as_mut_ptr();
        let at = ScoreAt { keys, words, to, stride: task.out.stride };
        let x = task.x;
        match self.multiply {
            Multiply::Dot(_) => {
                assert!(x.len() >= words * R);
                // SAFETY: the proof of the dot product is there; tiles, x and out are checked.
                unsafe { score_dot::<R, P>(x, at, task.fetch) }
            }
            Multiply::Widened => {
                assert!(x.len() >= 2 * words * R);
                // SAFETY: `self` proves AVX-512; tiles, x and out are checked above.
                unsafe { score_widened::<R, P>(x, at, task.fetch) }
            }
            Multiply::Single => {
                assert!(x.len() >= words * R);
                // SAFETY: `self` proves AVX-512; tiles, x and out are checked above.
                unsafe { score_single::<R, P>(x, at, task.fetch) }
            }
        }
    }
}

struct ScoreTask<'a, 'f> {
    x: &'a [u32],
    keys: Panel<'a>,
    out: ScoresOut<'a>,
    fetch: &'a mut Fetch<'f>,
}

/// P whole tiles of `words` lines, and room for P lines of output in each row.
struct ScoreAt<const P: usize> {
    keys: [*const u32; P],
    words: usize,
    to: *mut f32,
    stride: usize,
}

impl Products for Fast {
    /// With two tiles of keys they fill 24 of 32 registers.
    const ROWS: usize = 12;

    fn pack<'x>(
        self,
        _dtype: Dtype,
        rows: impl ExactSizeIterator<Item = &'x [f32]>,
        out: &mut [u32],
    ) {
        let count = rows.len();
        for (row, x) in rows.enumerate() {
            // SAFETY: `self` proves AVX-512.
            unsafe { pack(self.multiply, x, (row, count), out) };
        }
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, fetch: &mut Fetch<'_>) {
        let rows = out.rows;
        let task = &mut ScoreTask { x, keys, out, fetch };
        match rows {
            1 => self.score_rows::<1, 8>(task),
            2 => self.score_rows::<2, 8>(task),
            3 => self.score_rows::<3, 8>(task),
            4 => self.score_rows::<4, 4>(task),
            5 => self.score_rows::<5, 4>(task),
            6 => self.score_rows::<6, 4>(task),
            7 => self.score_rows::<7, 2>(task),
            8 => self.score_rows::<8, 2>(task),
            9 => self.score_rows::<9, 2>(task),
            10 => self.score_rows::<10, 2>(task),
            11 => self.score_rows::<11, 2>(task),
            12 => self.score_rows::<12, 2>(task),
            n => unreachable!("{n} rows in a tile"),
        }
    }

    fn softmax(self, isa: Isa, task: Softmax<'_, '_>, buffers: &mut Buffers) {
        match self.multiply {
            Multiply::Dot(rounding) => rounding.softmax(task, buffers),
            Multiply::Widened | Multiply::Single => isa.vectorize(task),
        }
    }

    fn mix_softmax(
        self,
        p: Softmaxed<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        (buffers, fetch): (&mut Buffers, &mut Fetch<'_>),
    ) {
        match self.multiply {
            Multiply::Dot(rounding) => dots::mix(rounding, p.rounded(buffers), values, out, fetch),
            _ => self.mix(p.weights(), values, out, (buffers, fetch)),
        }
    }

    fn mix(
        self,
        p: Weights<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        (buffers, fetch): (&mut Buffers, &mut Fetch<'_>),
    ) {
        if let Multiply::Dot(rounding) = self.multiply {
            return dots::mix(rounding, rounding.weights(p, buffers), values, out, fetch);
        }
        let rows = p.lens.len();
        assert!(rows <= Self::ROWS);
        let MixedOut { to: out, write } = out;
        let d = out.len() / rows;
        for part in even_parts(rows, MIX_ROWS) {
            let first = part.start * p.stride;
            let p = Weights { rows: &p.rows[first..], lens: &p.lens[part.clone()], ..p };
            let out = &mut out[part.start * d..part.end * d];
            for vectors in even_parts(d / TILE, MIX_VECTORS) {
                let (out, fetch) = (&mut *out, &mut *fetch);
                let task = &mut MixTask { p, values, d, first: vectors.start, out, write, fetch };
                match vectors.len() {
                    1 => task.vectors::<1>(self),
                    2 => task.vectors::<2>(self),
                    3 => task.vectors::<3>(self),
                    _ => task.vectors::<4>(self),
                }
            }
        }
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], buffers: &mut Buffers) {
        if let Multiply::Dot(rounding) = self.multiply {
            return dots::mix_transposed(rounding, p, x, out, buffers);
        }
        let d = x.len() / p.lens.len();
        let positions = p.lens.last().copied().unwrap_or(0).next_multiple_of(TILE);
        assert!(out.len() >= positions * d);
        assert!(p.rows.len() >= (p.lens.len() - 1) * p.stride + positions);
        for position in (0..positions).step_by(POSITIONS) {
            let first = p.lens.partition_point(|&len| len <= position);
            let at =
                OuterAt { p: &p.rows[position..], stride: p.stride, rows: first..p.lens.len(), d };
            for vectors in even_parts(d / TILE, MIX_VECTORS) {
                let x = &x[vectors.start * TILE..];
                let out = &mut out[position * d + vectors.start * TILE..];
                let kernel = match vectors.len() {
                    1 => outer::<1>,
                    2 => outer::<2>,
                    3 => outer::<3>,
                    _ => outer::<4>,
                };
                // SAFETY: `self` proves AVX-512; rows and positions are within p, x and out by the
                // checks above, columns by the split of d.
                unsafe { kernel(&at, x, out) };
            }
        }
    }
}

/// Row `row` of `count`: plain loops, compiled for AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn pack(multiply: Multiply, x: &[f32], (row, count): (usize, usize), out: &mut [u32]) {
    let mut half = [0u16; MAX_HEAD_DIM];
    if !matches!(multiply, Multiply::Single) {
        half.iter_mut().zip(x).for_each(|(half, &x)| *half = round_bf16(x) as u16);
    }
    let to = out.iter_mut().skip(row).step_by(count);
    match multiply {
        Multiply::Dot(_) => to
            .zip(half[..x.len()].as_chunks::<2>().0)
            .for_each(|(to, half)| *to = u32::from(half[0]) | u32::from(half[1]) << 16),
        Multiply::Widened => {
            to.zip(&half[..x.len()]).for_each(|(to, &half)| *to = u32::from(half) << 16);
        }
        Multiply::Single => to.zip(x).for_each(|(to, x)| *to = x.to_bits()),
    }
}

/// One product of `mix`: the vectors from `first` on of all rows.
struct MixTask<'a, 'f> {
    p: Weights<'a>,
    values: Panel<'a>,
    d: usize,
    first: usize,
    out: &'a mut [f32],
    write: Write,
    fetch: &'a mut Fetch<'f>,
}

impl MixTask<'_, '_> {
    fn vectors<const D: usize>(&mut self, _proof: Fast) {
        let last = self.p.lens[self.p.lens.len() - 1];
        assert!(self.p.rows.len() >= (self.p.lens.len() - 1) * self.p.stride + last);
        assert!(self.values.tiles.len() * TILE >= last && (self.first + D) * TILE <= self.d);
        assert!(self.d == self.values.head_words * per_word(self.values.dtype));
        let kernel = match self.values.dtype {
            Dtype::F32 => Self::kernel::<D, 1>(self.p.lens.len()),
            Dtype::Bf16 => Self::kernel::<D, 2>(self.p.lens.len()),
        };
        // SAFETY: the proof of AVX-512 is there; weights, tiles and columns are checked above.
        unsafe { kernel(self) };
    }

    fn kernel<const D: usize, const E: usize>(rows: usize) -> unsafe fn(&mut MixTask<'_, '_>) {
        match rows {
            1 => mix::<1, D, E>,
            2 => mix::<2, D, E>,
            3 => mix::<3, D, E>,
            4 => mix::<4, D, E>,
            5 => mix::<5, D, E>,
            6 => mix::<6, D, E>,
            n => unreachable!("{n} rows in a part"),
        }
    }
}

/// R rows times D vectors; E elements in a word.
///
/// # Safety
/// AVX-512 exists, and weights and tiles reach as far as the last length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn mix<const R: usize, const D: usize, const E: usize>(task: &mut MixTask<'_, '_>) {
    let mut sums = [[_mm512_setzero_ps(); D]; R];
    if task.write == Write::Add {
        for (r, sums) in sums.iter_mut().enumerate() {
            let out = &task.out[r * task.d + task.first * TILE..][..D * TILE];
            for (out, sum) in out.as_chunks::<TILE>().0.iter().zip(sums) {
                // SAFETY: sixteen elements are there.
                *sum = unsafe { _mm512_loadu_ps(out.as_ptr()) };
            }
        }
    }
    let Weights { rows, stride, lens } = task.p;
    let (common, last) = (lens[0], lens[R - 1]);
    let words = task.values.head_words;
    for tile in 0..last.div_ceil(TILE) {
        let base = tile * TILE;
        let p = rows.as_ptr().wrapping_add(base);
        let start = task.values.tile(tile).as_ptr().wrapping_add(task.first * TILE);
        let here = TILE.min(last - base);
        let all = here.min(common.saturating_sub(base));
        task.fetch.lines(words);
        for j in 0..all {
            // SAFETY: position j of the tile exists.
            let v = unsafe { load_value::<D, E>(start.wrapping_add(j / E * task.d), j % E) };
            for (r, sums) in sums.iter_mut().enumerate() {
                // SAFETY: each row has weights up to the last length.
                let p = unsafe { broadcast(p.wrapping_add(r * stride + j)) };
                for (sum, &v) in sums.iter_mut().zip(&v) {
                    *sum = _mm512_fmadd_ps(p, v, *sum);
                }
            }
        }
        for j in all..here {
            // SAFETY: position j of the tile exists.
            let v = unsafe { load_value::<D, E>(start.wrapping_add(j / E * task.d), j % E) };
            for (r, sums) in sums.iter_mut().enumerate() {
                let seen: __mmask16 = if lens[r] > base + j { !0 } else { 0 };
                // SAFETY: each row has room for weights up to the last length.
                let p = unsafe { broadcast(p.wrapping_add(r * stride + j)) };
                for (sum, &v) in sums.iter_mut().zip(&v) {
                    *sum = _mm512_mask3_fmadd_ps(p, v, *sum, seen);
                }
            }
        }
    }
    for (r, sums) in sums.iter().enumerate() {
        let out = &mut task.out[r * task.d + task.first * TILE..][..D * TILE];
        for (out, &sum) in out.as_chunks_mut::<TILE>().0.iter_mut().zip(sums) {
            // SAFETY: sixteen elements are there.
            unsafe { _mm512_storeu_ps(out.as_mut_ptr(), sum) };
        }
    }
}

/// D vectors of a value, one element a word: part `lane` of the E in it.
///
/// # Safety
/// AVX-512 exists, and the D vectors do.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline]
unsafe fn load_value<const D: usize, const E: usize>(at: *const u32, lane: usize) -> [__m512; D] {
    let mut v = [_mm512_setzero_ps(); D];
    for (c, v) in v.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        let words = unsafe { _mm512_loadu_si512(at.wrapping_add(c * TILE).cast()) };
        *v = _mm512_castsi512_ps(if E == 1 {
            words
        } else {
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let shift = if lane == 0 { 16 } else { 0 };
            _mm512_and_si512(_mm512_sll_epi32(words, _mm_cvtsi32_si128(shift)), upper)
        });
    }
    v
}

/// Some rows of weights from one position on.
struct OuterAt<'a> {
    p: &'a [f32],
    stride: usize,
    rows: std::ops::Range<usize>,
    d: usize,
}

/// Adds to D vectors of [`POSITIONS`] positions; rows of `x` and of `out` are `d` apart.
///
/// # Safety
/// AVX-512 exists, and rows, positions and vectors lie within the slices.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn outer<const D: usize>(at: &OuterAt<'_>, x: &[f32], out: &mut [f32]) {
    let out = out.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); D]; POSITIONS];
    for (j, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *sum = unsafe { _mm512_loadu_ps(out.wrapping_add(j * at.d + c * TILE)) };
        }
    }
    for row in at.rows.clone() {
        // SAFETY: promised by the caller.
        let x = unsafe { load_value::<D, 1>(x.as_ptr().wrapping_add(row * at.d).cast(), 0) };
        for (j, sums) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            let p = unsafe { broadcast(at.p.as_ptr().wrapping_add(row * at.stride + j)) };
            for (sum, &x) in sums.iter_mut().zip(&x) {
                *sum = _mm512_fmadd_ps(p, x, *sum);
            }
        }
    }
    for (j, sums) in sums.iter().enumerate() {
        for (c, &sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(out.wrapping_add(j * at.d + c * TILE), sum) };
        }
    }
}

/// R rows, P tiles, by the given function that adds the products of one word.
///
/// # Safety
/// The features exist; `x` and what `at` points to are as large as they say.
macro_rules! score_kernel {
    ($name:ident, $step:ident, $features:literal) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const R: usize, const P: usize>(
            x: &[u32],
            at: ScoreAt<P>,
            fetch: &mut Fetch<'_>,
        ) {
            let mut sums = [[_mm512_setzero_ps(); P]; R];
            for word in 0..at.words {
                let mut keys = [_mm512_setzero_si512(); P];
                for (keys, tile) in keys.iter_mut().zip(at.keys) {
                    // SAFETY: the tile has this line.
                    *keys = unsafe { _mm512_loadu_si512(tile.wrapping_add(word * TILE).cast()) };
                }
                fetch.lines(P);
                // SAFETY: x has R rows of words.
                unsafe { $step(x.as_ptr(), word, &keys, &mut sums) };
            }
            for (r, sums) in sums.iter().enumerate() {
                for (p, &sum) in sums.iter().enumerate() {
                    let to = at.to.wrapping_add(r * at.stride + p * TILE);
                    // SAFETY: there is room for P lines in each row.
                    unsafe { _mm512_storeu_ps(to, sum) };
                }
            }
        }
    };
}

score_kernel!(score_dot, step_dot, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16");
score_kernel!(score_widened, step_widened, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");
score_kernel!(score_single, step_single, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma");

/// # Safety
/// AVX-512 with bf16 exists, and word `word` of the R rows of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
#[inline]
unsafe fn step_dot<const R: usize, const P: usize>(
    x: *const u32,
    word: usize,
    keys: &[__m512i; P],
    sums: &mut [[__m512; P]; R],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        let x = unsafe { broadcast(x.wrapping_add(word * R + r).cast()) };
        for (sum, &key) in sums.iter_mut().zip(keys) {
            *sum = dot_bf16(*sum, key, _mm512_castps_si512(x));
        }
    }
}

/// # Safety
/// AVX-512 exists, and elements `2 * word` and the next of the R rows of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline]
unsafe fn step_widened<const R: usize, const P: usize>(
    x: *const u32,
    word: usize,
    keys: &[__m512i; P],
    sums: &mut [[__m512; P]; R],
) {
    let mut even = *keys;
    even.iter_mut().for_each(|key| *key = _mm512_slli_epi32::<16>(*key));
    // SAFETY: promised by the caller.
    unsafe { step_single(x, 2 * word, &even, sums) };
    let mut odd = *keys;
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    odd.iter_mut().for_each(|key| *key = _mm512_and_si512(*key, upper));
    // SAFETY: promised by the caller.
    unsafe { step_single(x, 2 * word + 1, &odd, sums) };
}

/// # Safety
/// AVX-512 exists, and element `i` of the R rows of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline]
unsafe fn step_single<const R: usize, const P: usize>(
    x: *const u32,
    i: usize,
    keys: &[__m512i; P],
    sums: &mut [[__m512; P]; R],
) {
    for (r, sums) in sums.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        let x = unsafe { broadcast(x.wrapping_add(i * R + r).cast()) };
        for (sum, &key) in sums.iter_mut().zip(keys) {
            *sum = _mm512_fmadd_ps(_mm512_castsi512_ps(key), x, *sum);
        }
    }
}
