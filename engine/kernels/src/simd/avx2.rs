//! The lanes on AVX2: two registers of eight. Every operation rounds as its AVX-512 twin does, so both
//! give the same bits.

use super::{EXP_HIGH, EXP_LOW, EXP_POLY, Job, LANES, LN2_HIGH, LN2_LOW, Simd};
use crate::cpu::Avx2;
use std::arch::x86_64::*;

/// Compiles `job` for AVX2 and runs it.
pub(super) fn vectorize<J: Job>(token: Avx2, job: J) -> J::Output {
    #[target_feature(enable = "avx2,fma")]
    fn inner<J: Job>(token: Avx2, job: J) -> J::Output {
        job.run(token)
    }
    // SAFETY: the token proves the features.
    unsafe { inner(token, job) }
}

/// Lanes 0 to 7 and lanes 8 to 15.
#[derive(Clone, Copy)]
pub(crate) struct Pair(__m256, __m256);

/// e^x within 2 units in the last place; 0 at -infinity, NaN at NaN.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn exp(x: __m256) -> __m256 {
    // A lane whose result is 0 is 0 from here on: rounding it there costs more than the whole function.
    let seen = _mm256_cmp_ps::<_CMP_NLE_UQ>(x, _mm256_set1_ps(EXP_LOW));
    // The second operand wins when either is NaN, so NaN passes both clamps.
    let x = _mm256_max_ps(_mm256_set1_ps(EXP_LOW), x);
    let x = _mm256_min_ps(_mm256_set1_ps(EXP_HIGH), x);
    let n = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(_mm256_mul_ps(
        x,
        _mm256_set1_ps(std::f32::consts::LOG2_E),
    ));
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_HIGH), x);
    let r = _mm256_fnmadd_ps(n, _mm256_set1_ps(LN2_LOW), r);
    let one = _mm256_set1_ps(1.0);
    let mut p = _mm256_set1_ps(EXP_POLY[0]);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_POLY[1]));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_POLY[2]));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_POLY[3]));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(EXP_POLY[4]));
    p = _mm256_fmadd_ps(p, r, one);
    p = _mm256_fmadd_ps(p, r, one);
    // 2^n in two factors: of a result below the normal numbers only the last product is rounded.
    let n = _mm256_cvtps_epi32(n);
    let half = _mm256_srai_epi32::<1>(n);
    let p = _mm256_mul_ps(_mm256_and_ps(seen, p), power_of_two(half));
    _mm256_mul_ps(p, power_of_two(_mm256_sub_epi32(n, half)))
}

/// 2^n for n from -126 to 127.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn power_of_two(n: __m256i) -> __m256 {
    let biased = _mm256_add_epi32(n, _mm256_set1_epi32(127));
    _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
}

/// The sum of the lanes: lane i + lane i+8, then i+4, i+2, i+1.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn sum(v: Pair) -> f32 {
    let v = _mm256_add_ps(v.0, v.1);
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// The largest lane; where NaN meets a number the upper lane of the pair wins.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn max_lane(v: Pair) -> f32 {
    let v = _mm256_max_ps(v.0, v.1);
    let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
    let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
}

/// The lower bf16 of eight words.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn widen_low(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
}

/// The upper bf16 of eight words.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn widen_high(words: __m256i) -> __m256 {
    let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
    _mm256_castsi256_ps(_mm256_and_si256(words, upper))
}

/// The lanes of `v` whose bit is set; `fill` in the others.
#[target_feature(enable = "avx2,fma")]
#[inline]
fn keep(v: __m256, lanes: u16, fill: __m256) -> __m256 {
    let bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let set = _mm256_and_si256(_mm256_set1_epi32(lanes.into()), bits);
    _mm256_blendv_ps(fill, v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, bits)))
}

#[target_feature(enable = "avx2,fma")]
#[inline]
fn weigh(p: __m256, x: __m256) -> __m256 {
    let nonzero = _mm256_cmp_ps::<_CMP_NEQ_UQ>(p, _mm256_setzero_ps());
    _mm256_and_ps(nonzero, _mm256_mul_ps(p, x))
}

/// Sixteen words.
#[inline(always)]
fn load_words(_proof: Avx2, words: &[u32; LANES]) -> (__m256i, __m256i) {
    let (low, high) = words.split_at(LANES / 2);
    // SAFETY: the proof of the features is there, and so are eight words.
    let low = unsafe { _mm256_loadu_si256(low.as_ptr().cast()) };
    // SAFETY: as above.
    (low, unsafe { _mm256_loadu_si256(high.as_ptr().cast()) })
}

/// One method per line: name, arguments, function of one register. The token in `self` is the proof.
macro_rules! lanes {
    ($($name:ident($($arg:ident),*) = $call:path;)*) => {$(
        #[inline(always)]
        fn $name(self, $($arg: Pair),*) -> Pair {
            // SAFETY: `self` proves the features.
            let low = unsafe { $call($($arg.0),*) };
            // SAFETY: as above.
            Pair(low, unsafe { $call($($arg.1),*) })
        }
    )*};
}

impl Simd for Avx2 {
    type V = Pair;

    lanes! {
        add(a, b) = _mm256_add_ps;
        sub(a, b) = _mm256_sub_ps;
        mul(a, b) = _mm256_mul_ps;
        div(a, b) = _mm256_div_ps;
        sqrt(a) = _mm256_sqrt_ps;
        max(a, b) = _mm256_max_ps;
        mul_add(a, b, c) = _mm256_fmadd_ps;
        exp(x) = exp;
        weigh(p, x) = weigh;
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Pair {
        // SAFETY: `self` proves the features.
        let v = unsafe { _mm256_set1_ps(x) };
        Pair(v, v)
    }

    #[inline(always)]
    fn keep(self, v: Pair, lanes: u16, fill: Pair) -> Pair {
        // SAFETY: `self` proves the features.
        let low = unsafe { keep(v.0, lanes, fill.0) };
        // SAFETY: as above.
        Pair(low, unsafe { keep(v.1, lanes >> (LANES / 2), fill.1) })
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Pair {
        let (low, high) = x.split_at(LANES / 2);
        // SAFETY: `self` proves the features; eight elements are there.
        let low = unsafe { _mm256_loadu_ps(low.as_ptr()) };
        // SAFETY: as above.
        Pair(low, unsafe { _mm256_loadu_ps(high.as_ptr()) })
    }

    #[inline(always)]
    fn load_low(self, words: &[u32; LANES]) -> Pair {
        let (low, high) = load_words(self, words);
        // SAFETY: `self` proves the features.
        let low = unsafe { widen_low(low) };
        // SAFETY: as above.
        Pair(low, unsafe { widen_low(high) })
    }

    #[inline(always)]
    fn load_high(self, words: &[u32; LANES]) -> Pair {
        let (low, high) = load_words(self, words);
        // SAFETY: `self` proves the features.
        let low = unsafe { widen_high(low) };
        // SAFETY: as above.
        Pair(low, unsafe { widen_high(high) })
    }

    #[inline(always)]
    fn load_tail(self, x: &[f32], fill: f32) -> Pair {
        let mut lanes = [fill; LANES];
        lanes.iter_mut().zip(x).for_each(|(lane, &x)| *lane = x);
        self.load(&lanes)
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Pair) {
        let (low, high) = to.split_at_mut(LANES / 2);
        // SAFETY: `self` proves the features; eight elements are there.
        unsafe { _mm256_storeu_ps(low.as_mut_ptr(), v.0) };
        // SAFETY: as above.
        unsafe { _mm256_storeu_ps(high.as_mut_ptr(), v.1) };
    }

    #[inline(always)]
    fn store_tail(self, to: &mut [f32], v: Pair) {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        to.iter_mut().zip(lanes).for_each(|(to, x)| *to = x);
    }

    #[inline(always)]
    fn sum(self, v: Pair) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { sum(v) }
    }

    #[inline(always)]
    fn max_lane(self, v: Pair) -> f32 {
        // SAFETY: `self` proves the features.
        unsafe { max_lane(v) }
    }
}
