//! The scores with AVX-512; bf16 by dot products where the processor has them.
//!
//! ```text
//! R rows x P tiles of accumulators (R * P <= 24), lanes = positions
//!     for each word w of a head: for each tile load 64 bytes of keys; for each row broadcast word w
//!     of the query; accumulate the R * P products
//! ```
//! An accumulator is one output's whole chain, so neither R nor P can be seen in the results.

use super::store_sums;
use crate::Dtype;
use crate::attention::tiles::{Fetch, Panel, ScoresOut};
use crate::cpu::Avx512;
use crate::gemm::convert::round_bf16;
use crate::kv::{MAX_HEAD_DIM, TILE};
use crate::simd::avx512::{broadcast, dot_bf16};
use std::arch::x86_64::*;

/// The proof that the scores may be computed, and how words of a query meet lines of keys.
///
/// The packed operand of R rows is `[w][R]` words for dot products, else `[d][R]` f32.
#[derive(Clone, Copy)]
pub(super) struct Scores {
    multiply: Multiply,
}

#[derive(Clone, Copy)]
enum Multiply {
    /// bf16 pairs, both products in one instruction.
    Dot,
    /// bf16 pairs widened to f32, even elements first.
    Widened,
    /// f32.
    Single,
}

impl Scores {
    /// Most rows of one product: with two tiles of keys they fill 24 of 32 registers.
    pub(super) const ROWS: usize = 12;

    /// For keys of `dtype`, by dot products where the processor has them.
    pub(super) fn new(token: Avx512, dtype: Dtype) -> Self {
        let multiply = match dtype {
            Dtype::F32 => Multiply::Single,
            Dtype::Bf16 if token.bf16().is_some() => Multiply::Dot,
            Dtype::Bf16 => Multiply::Widened,
        };
        Self { multiply }
    }

    /// See [`Products::pack`](crate::attention::tiles::Products::pack).
    pub(super) fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]) {
        let count = rows.len();
        for (row, x) in rows.enumerate() {
            // SAFETY: `self` proves AVX-512.
            unsafe { pack(self.multiply, x, (row, count), out) };
        }
    }

    /// See [`Products::scores`](crate::attention::tiles::Products::scores).
    pub(super) fn compute(
        self,
        x: &[u32],
        keys: Panel<'_>,
        out: ScoresOut<'_>,
        fetch: &mut Fetch<'_>,
    ) {
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
            Multiply::Dot => {
                assert!(x.len() >= words * R);
                // SAFETY: `self` proves AVX-512 with bf16; tiles, x and out are checked.
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

/// Row `row` of `count`: plain loops, compiled for AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn pack(multiply: Multiply, x: &[f32], (row, count): (usize, usize), out: &mut [u32]) {
    let mut half = [0u16; MAX_HEAD_DIM];
    if !matches!(multiply, Multiply::Single) {
        half.iter_mut().zip(x).for_each(|(half, &x)| *half = round_bf16(x) as u16);
    }
    let to = out.iter_mut().skip(row).step_by(count);
    match multiply {
        Multiply::Dot => to
            .zip(half[..x.len()].as_chunks::<2>().0)
            .for_each(|(to, half)| *to = u32::from(half[0]) | u32::from(half[1]) << 16),
        Multiply::Widened => {
            to.zip(&half[..x.len()]).for_each(|(to, &half)| *to = u32::from(half) << 16);
        }
        Multiply::Single => to.zip(x).for_each(|(to, x)| *to = x.to_bits()),
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
            // SAFETY: there is room for P lines in each row.
            unsafe { store_sums(&sums, at.to, at.stride) };
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
