//! The products in AVX-512: with dot products of bf16 (`dots`), or here in f32.
//!
//! ```text
//! scores:  see `scores`
//! mix:     R rows x D vectors of 16 elements (R * D <= 24), lanes = elements
//!     for each position j, ascending: load (and widen) D vectors of the value; for each row
//!     broadcast p_rj; accumulate. Positions that not all rows see: the same, masked by row
//! mix_transposed:  4 positions x D vectors, lanes = elements; loop over rows
//! ```
//! An accumulator is one output's whole chain, so neither R nor D can be seen in the results.

/// `$kernel::<D>`, D = `$vectors`, at most [`MIX_VECTORS`]; called where arguments follow.
macro_rules! by_vectors {
    ($vectors:expr, $kernel:ident $($arguments:tt)?) => {
        match $vectors {
            1 => $kernel::<1> $($arguments)?,
            2 => $kernel::<2> $($arguments)?,
            3 => $kernel::<3> $($arguments)?,
            _ => $kernel::<MIX_VECTORS> $($arguments)?,
        }
    };
}

/// `$kernel::<R, ...>`, R = `$rows`, at most [`MIX_ROWS`].
macro_rules! by_rows {
    ($rows:expr, $kernel:ident, $($size:tt),*) => {
        match $rows {
            1 => $kernel::<1, $($size),*>,
            2 => $kernel::<2, $($size),*>,
            3 => $kernel::<3, $($size),*>,
            4 => $kernel::<4, $($size),*>,
            5 => $kernel::<5, $($size),*>,
            _ => $kernel::<MIX_ROWS, $($size),*>,
        }
    };
}

mod dots;
mod scores;

pub(super) use dots::Dots;

use super::tiles::{Buffers, Exact, Fetch, MixedOut, Panel, Products, ScoresOut, Weights};
use crate::Dtype;
use crate::cpu::Isa;
use crate::gemm::Write;
use crate::gemm::convert::per_word;
use crate::kv::TILE;
use crate::simd::avx512::broadcast;
use crate::split::even_parts;
use scores::Scores;
use std::arch::x86_64::*;

/// Most rows and vectors of one `mix`.
const MIX_ROWS: usize = 6;
const MIX_VECTORS: usize = 4;
/// Positions of one `mix_transposed`.
const POSITIONS: usize = 4;

/// The proof that these products may be used.
#[derive(Clone, Copy)]
pub(super) struct Fast {
    isa: Isa,
    scores: Scores,
}

impl Fast {
    /// For keys and values of `dtype`, where the level has AVX-512.
    pub(super) fn new(isa: Isa, dtype: Dtype) -> Option<Self> {
        Some(Self { isa, scores: Scores::new(isa.avx512()?, dtype) })
    }
}

impl Products for Fast {
    const ROWS: usize = Scores::ROWS;

    type Weighting = Exact;

    fn weighting(self) -> Exact {
        Exact(self.isa)
    }

    fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]) {
        self.scores.pack(rows, out);
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, fetch: &mut Fetch<'_>) {
        self.scores.compute(x, keys, out, fetch);
    }

    fn mix(self, p: Weights<'_>, values: Panel<'_>, out: MixedOut<'_>, fetch: &mut Fetch<'_>) {
        let MixedOut { to: out, write } = out;
        let rows = p.lens.len();
        let d = out.len() / rows;
        for part in even_parts(rows, MIX_ROWS) {
            let first = part.start * p.stride;
            let p = Weights { rows: &p.rows[first..], lens: &p.lens[part.clone()], ..p };
            let (rows, last) = (p.lens.len(), p.lens[p.lens.len() - 1]);
            assert!(p.rows.len() >= (rows - 1) * p.stride + last, "weights");
            assert!(values.tiles.len() >= last.div_ceil(TILE), "values");
            assert!(d == values.head_words * per_word(values.dtype), "values");
            let out = &mut out[part.start * d..part.end * d];
            for vectors in even_parts(d / TILE, MIX_VECTORS) {
                let kernel = by_vectors!(vectors.len(), of_rows(rows, values.dtype));
                let (first, out) = (vectors.start, &mut out[vectors.start * TILE..]);
                let task = MixTask { p, values, d, first, out, write, fetch: &mut *fetch };
                // SAFETY: `self` proves AVX-512; weights, values and columns are checked.
                unsafe { kernel(task) };
            }
        }
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], _buffers: &mut Buffers) {
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
                let kernel = by_vectors!(vectors.len(), outer);
                // SAFETY: `self` proves AVX-512; rows and positions are within p, x and out by the
                // checks above, columns by the split of d.
                unsafe { kernel(&at, x, out) };
            }
        }
    }
}

/// One product of `mix`, with weights in the form P: the vectors from `first` on of all rows.
struct MixTask<'a, 'f, P> {
    p: P,
    values: Panel<'a>,
    d: usize,
    first: usize,
    /// From the first vector on.
    out: &'a mut [f32],
    write: Write,
    fetch: &'a mut Fetch<'f>,
}

type MixKernel = unsafe fn(MixTask<'_, '_, Weights<'_>>);

fn of_rows<const D: usize>(rows: usize, dtype: Dtype) -> MixKernel {
    match dtype {
        Dtype::F32 => by_rows!(rows, mix, D, 1),
        Dtype::Bf16 => by_rows!(rows, mix, D, 2),
    }
}

/// R rows times D vectors; E elements in a word.
///
/// # Safety
/// AVX-512 exists, and weights and values reach as far as the last length.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn mix<const R: usize, const D: usize, const E: usize>(task: MixTask<'_, '_, Weights<'_>>) {
    let MixTask { p: Weights { rows, stride, lens }, values, d, first, out, write, fetch } = task;
    assert!(out.len() >= (R - 1) * d + D * TILE, "{} elements of output", out.len());
    let out = out.as_mut_ptr();
    let mut sums = [[_mm512_setzero_ps(); D]; R];
    if write == Write::Add {
        // SAFETY: by the assertion.
        sums = unsafe { load_sums(out, d) };
    }
    let (common, last) = (lens[0], lens[R - 1]);
    for tile in 0..last.div_ceil(TILE) {
        let base = tile * TILE;
        let p = rows.as_ptr().wrapping_add(base);
        let start = values.tile(tile).as_ptr().wrapping_add(first * TILE);
        let here = TILE.min(last - base);
        let all = here.min(common.saturating_sub(base));
        fetch.lines(values.head_words);
        for j in 0..all {
            // SAFETY: position j of the tile exists.
            let v = unsafe { load_value::<D, E>(start.wrapping_add(j / E * d), j % E) };
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
            let v = unsafe { load_value::<D, E>(start.wrapping_add(j / E * d), j % E) };
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
    // SAFETY: by the assertion.
    unsafe { store_sums(&sums, out, d) };
}

/// D vectors of a value, one element a word: part `lane` of the E in it.
///
/// # Safety
/// AVX-512 exists, and the D vectors do.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
#[inline]
unsafe fn load_value<const D: usize, const E: usize>(at: *const u32, lane: usize) -> [__m512; D] {
    // SAFETY: promised by the caller.
    let words = unsafe { load_words::<D>(at) };
    let mut v = [_mm512_setzero_ps(); D];
    for (v, words) in v.iter_mut().zip(words) {
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
    // SAFETY: promised by the caller.
    let mut sums: [[_; D]; POSITIONS] = unsafe { load_sums(out, at.d) };
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
    // SAFETY: promised by the caller.
    unsafe { store_sums(&sums, out, at.d) };
}

/// R rows of D vectors, `stride` elements apart.
///
/// # Safety
/// They can be read.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_sums<const R: usize, const D: usize>(
    from: *const f32,
    stride: usize,
) -> [[__m512; D]; R] {
    let mut sums = [[_mm512_setzero_ps(); D]; R];
    for (r, sums) in sums.iter_mut().enumerate() {
        for (c, sum) in sums.iter_mut().enumerate() {
            // SAFETY: promised by the caller.
            *sum = unsafe { _mm512_loadu_ps(from.wrapping_add(r * stride + c * TILE)) };
        }
    }
    sums
}

/// Stores what [`load_sums`] loads.
///
/// # Safety
/// They can be written.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn store_sums<const R: usize, const D: usize>(
    sums: &[[__m512; D]; R],
    to: *mut f32,
    stride: usize,
) {
    for (r, sums) in sums.iter().enumerate() {
        for (c, &sum) in sums.iter().enumerate() {
            // SAFETY: promised by the caller.
            unsafe { _mm512_storeu_ps(to.wrapping_add(r * stride + c * TILE), sum) };
        }
    }
}

/// D vectors of words.
///
/// # Safety
/// They can be read.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn load_words<const D: usize>(at: *const u32) -> [__m512i; D] {
    let mut v = [_mm512_setzero_si512(); D];
    for (c, v) in v.iter_mut().enumerate() {
        // SAFETY: promised by the caller.
        *v = unsafe { _mm512_loadu_si512(at.wrapping_add(c * TILE).cast()) };
    }
    v
}
