//! Sixteen f32 lanes, on plain Rust, on AVX2 and on AVX-512, behind one trait.
//!
//! A kernel is written once over [`Simd`] and run by [`Isa::vectorize`] with the best lanes of the
//! chosen level. The value that implements the trait is the proof that its instructions exist, so
//! every method is safe. Sums across lanes follow one fixed tree: lane i + lane i+8, then i+4, i+2,
//! i+1. Leaves out the matrix products, which have their own layouts.
//!
//! `exp` is 2^n * p(r) with n = round(x / ln 2), r = x - n ln 2 and p a polynomial of degree 6 fitted
//! by the Remez exchange for the least relative error (3.1e-9 before rounding) on |r| <= ln 2 / 2.

use crate::cpu::Isa;
use crate::gemm::convert::{high, low};

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Lanes of one vector.
pub(crate) const LANES: usize = 16;

/// Below this e^x rounds to 0 and above the next it rounds to infinity.
const EXP_LOW: f32 = -104.0;
const EXP_HIGH: f32 = 89.0;
/// ln 2 in two parts; a small integer times the first is exact.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// Coefficients of r^6 down to r^2; those of r and 1 are 1.
const EXP_POLY: [f32; 5] = [0.001_381_432, 0.008_368_851, 0.041_668_4, 0.166_665_2, 0.499_999_93];

/// The largest magnitude of whole groups of sixteen numbers, and a zero, or not a number where one of them
/// is not finite.
///
/// Lane by lane, which hangs on no order and which the compiler makes vectors of.
#[inline(always)]
pub(crate) fn magnitude(x: &[f32]) -> (f32, f32) {
    let (mut largest, mut faults) = ([0.0f32; LANES], [0.0f32; LANES]);
    for x in x.as_chunks::<LANES>().0 {
        for ((largest, fault), x) in largest.iter_mut().zip(&mut faults).zip(x) {
            *largest = if x.abs() > *largest { x.abs() } else { *largest };
            *fault += x * 0.0;
        }
    }
    (largest.into_iter().fold(0.0, f32::max), faults.into_iter().sum())
}

/// Sixteen-lane arithmetic; the implementing value proves that it may be used here.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Sixteen f32.
    type V: Copy;

    fn splat(self, x: f32) -> Self::V;
    fn load(self, x: &[f32; LANES]) -> Self::V;
    /// The even-indexed (lower) bf16 of sixteen words.
    fn load_low(self, words: &[u32; LANES]) -> Self::V;
    /// The odd-indexed (upper) bf16 of sixteen words.
    fn load_high(self, words: &[u32; LANES]) -> Self::V;
    /// Up to sixteen elements, the missing lanes filled with `fill`.
    fn load_tail(self, x: &[f32], fill: f32) -> Self::V;
    fn store(self, to: &mut [f32; LANES], v: Self::V);
    /// The first `to.len()` lanes, at most sixteen.
    fn store_tail(self, to: &mut [f32], v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    fn sqrt(self, a: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a * b + c, rounded once or twice.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The lanes of `v` whose bit is set; `fill` in the others.
    fn keep(self, v: Self::V, lanes: u16, fill: Self::V) -> Self::V;
    /// p * x, but 0 where p is 0 even when x is infinite.
    fn weigh(self, p: Self::V, x: Self::V) -> Self::V;
    /// e^x within 2 units in the last place; 0 at -infinity, NaN at NaN.
    fn exp(self, x: Self::V) -> Self::V;
    /// The sum of the lanes, by the fixed tree.
    fn sum(self, v: Self::V) -> f32;
    /// The largest lane.
    fn max_lane(self, v: Self::V) -> f32;

    /// The sixteen elements of `x` from `at` on, or what there is of them and then `fill`.
    #[inline(always)]
    fn read(self, x: &[f32], at: usize, fill: f32) -> Self::V {
        match x[at..].first_chunk() {
            Some(whole) => self.load(whole),
            None => self.load_tail(&x[at..], fill),
        }
    }

    /// Writes the lanes to `to` from `at` on, as many as fit.
    #[inline(always)]
    fn write(self, to: &mut [f32], at: usize, v: Self::V) {
        match to[at..].first_chunk_mut() {
            Some(whole) => self.store(whole, v),
            None => self.store_tail(&mut to[at..], v),
        }
    }
}

/// A kernel written over any lanes. Mark `run` with `#[inline(always)]`.
pub(crate) trait Job {
    /// What the kernel returns.
    type Output;

    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

impl Isa {
    /// Runs `job` with the lanes of this level.
    pub(crate) fn vectorize<J: Job>(self, job: J) -> J::Output {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = self.avx512() {
            return avx512::vectorize(token, job);
        }
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = self.avx2() {
            return avx2::vectorize(token, job);
        }
        job.run(Portable)
    }
}

/// e^x in plain arithmetic: the scalar twin of the portable lanes.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Adding and subtracting 1.5 * 2^23 rounds to an integer, which stays in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x > EXP_HIGH { EXP_HIGH } else { x };
    let x = if x < EXP_LOW { EXP_LOW } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let q = EXP_POLY[1..].iter().fold(EXP_POLY[0], |q, c| q * r + c);
    let p = q * (r * r) + r + 1.0;
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n.wrapping_sub(half))
}

/// 2^n for n from -126 to 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// Lanes in plain Rust, which the compiler turns into the baseline's vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// Sixteen f32 for [`Portable`].
#[derive(Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Wide([f32; LANES]);

impl Wide {
    #[inline(always)]
    fn map(self, f: impl Fn(f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i])))
    }

    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }

    #[inline(always)]
    fn tree(mut self, f: impl Fn(f32, f32) -> f32) -> f32 {
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                self.0[i] = f(self.0[i], self.0[i + width]);
            }
        }
        self.0[0]
    }
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

impl Simd for Portable {
    type V = Wide;

    #[inline(always)]
    fn splat(self, x: f32) -> Wide {
        Wide([x; LANES])
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Wide {
        Wide(*x)
    }

    #[inline(always)]
    fn load_low(self, words: &[u32; LANES]) -> Wide {
        Wide(words.map(low))
    }

    #[inline(always)]
    fn load_high(self, words: &[u32; LANES]) -> Wide {
        Wide(words.map(high))
    }

    #[inline(always)]
    fn load_tail(self, x: &[f32], fill: f32) -> Wide {
        Wide(std::array::from_fn(|i| x.get(i).copied().unwrap_or(fill)))
    }

    #[inline(always)]
    fn store(self, to: &mut [f32; LANES], v: Wide) {
        *to = v.0;
    }

    #[inline(always)]
    fn store_tail(self, to: &mut [f32], v: Wide) {
        to.iter_mut().zip(v.0).for_each(|(to, x)| *to = x);
    }

    #[inline(always)]
    fn add(self, a: Wide, b: Wide) -> Wide {
        a.zip(b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Wide, b: Wide) -> Wide {
        a.zip(b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Wide, b: Wide) -> Wide {
        a.zip(b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Wide, b: Wide) -> Wide {
        a.zip(b, |a, b| a / b)
    }

    #[inline(always)]
    fn sqrt(self, a: Wide) -> Wide {
        a.map(f32::sqrt)
    }

    #[inline(always)]
    fn max(self, a: Wide, b: Wide) -> Wide {
        a.zip(b, larger)
    }

    #[inline(always)]
    fn mul_add(self, a: Wide, b: Wide, c: Wide) -> Wide {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn keep(self, v: Wide, lanes: u16, fill: Wide) -> Wide {
        Wide(std::array::from_fn(|i| if lanes >> i & 1 == 1 { v.0[i] } else { fill.0[i] }))
    }

    #[inline(always)]
    fn weigh(self, p: Wide, x: Wide) -> Wide {
        p.zip(x, |p, x| if p == 0.0 { 0.0 } else { p * x })
    }

    #[inline(always)]
    fn exp(self, x: Wide) -> Wide {
        x.map(exp)
    }

    #[inline(always)]
    fn sum(self, v: Wide) -> f32 {
        v.tree(|a, b| a + b)
    }

    #[inline(always)]
    fn max_lane(self, v: Wide) -> f32 {
        v.tree(larger)
    }
}

/// The AVX-512 lanes, and the same functions for kernels that hold the registers themselves.
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512 {
    use super::{EXP_HIGH, EXP_LOW, EXP_POLY, Job, LANES, LN2_HIGH, LN2_LOW, Simd};
    use crate::cpu::Avx512;
    use std::arch::x86_64::*;

    /// Compiles `job` for AVX-512 and runs it.
    pub(super) fn vectorize<J: Job>(token: Avx512, job: J) -> J::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
        fn inner<J: Job>(token: Avx512, job: J) -> J::Output {
            job.run(token)
        }
        // SAFETY: the token proves the features.
        unsafe { inner(token, job) }
    }

    /// e^x within 1 unit in the last place; 0 at -infinity, NaN at NaN.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    pub(crate) fn exp(x: __m512) -> __m512 {
        // A lane whose result is 0 takes no part in the scaling: rounding it there costs the processor
        // more than the whole function.
        let seen = _mm512_cmp_ps_mask::<_CMP_NLE_UQ>(x, _mm512_set1_ps(EXP_LOW));
        // The second operand wins when either is NaN, so NaN passes both clamps.
        let x = _mm512_max_ps(_mm512_set1_ps(EXP_LOW), x);
        let x = _mm512_min_ps(_mm512_set1_ps(EXP_HIGH), x);
        let n = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(
            _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)),
        );
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_HIGH), x);
        let r = _mm512_fnmadd_ps(n, _mm512_set1_ps(LN2_LOW), r);
        let one = _mm512_set1_ps(1.0);
        let mut p = _mm512_set1_ps(EXP_POLY[0]);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_POLY[1]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_POLY[2]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_POLY[3]));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(EXP_POLY[4]));
        p = _mm512_fmadd_ps(p, r, one);
        p = _mm512_fmadd_ps(p, r, one);
        _mm512_maskz_scalef_ps(seen, p, n)
    }

    /// One number in all lanes.
    ///
    /// # Safety
    /// It can be read.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) unsafe fn broadcast(at: *const f32) -> __m512 {
        // SAFETY: promised by the caller.
        _mm512_set1_ps(unsafe { at.read() })
    }

    /// Adds the products of the two bf16 in each word of `x` with those of `w`.
    #[target_feature(enable = "avx512f,avx512bf16")]
    #[inline]
    pub(crate) fn dot_bf16(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
        // SAFETY: both are 512 bits without invalid values.
        let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(x) };
        // SAFETY: as above.
        let w = unsafe { std::mem::transmute::<__m512i, __m512bh>(w) };
        _mm512_dpbf16_ps(sum, x, w)
    }

    /// The sum of the lanes: lane i + lane i+8, then i+4, i+2, i+1.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    pub(crate) fn sum(v: __m512) -> f32 {
        let v = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }

    /// The largest lane; where NaN meets a number the upper lane of the pair wins.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    pub(crate) fn max_lane(v: __m512) -> f32 {
        let v = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v));
        let v = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps::<1>(v));
        let v = _mm_max_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_max_ss(v, _mm_movehdup_ps(v)))
    }

    /// The mask of the first `len` lanes.
    #[inline(always)]
    pub(crate) fn mask(len: usize) -> __mmask16 {
        if len >= LANES { !0 } else { (1 << len) - 1 }
    }

    /// One method per line: name, arguments, instruction. The token in `self` is the proof.
    macro_rules! lanes {
        ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty = $call:path;)*) => {$(
            #[inline(always)]
            fn $name(self, $($arg: $type),*) -> $out {
                // SAFETY: `self` proves the features.
                unsafe { $call($($arg),*) }
            }
        )*};
    }

    impl Simd for Avx512 {
        type V = __m512;

        lanes! {
            splat(x: f32) -> __m512 = _mm512_set1_ps;
            add(a: __m512, b: __m512) -> __m512 = _mm512_add_ps;
            sub(a: __m512, b: __m512) -> __m512 = _mm512_sub_ps;
            mul(a: __m512, b: __m512) -> __m512 = _mm512_mul_ps;
            div(a: __m512, b: __m512) -> __m512 = _mm512_div_ps;
            sqrt(a: __m512) -> __m512 = _mm512_sqrt_ps;
            max(a: __m512, b: __m512) -> __m512 = _mm512_max_ps;
            mul_add(a: __m512, b: __m512, c: __m512) -> __m512 = _mm512_fmadd_ps;
            exp(x: __m512) -> __m512 = exp;
            sum(v: __m512) -> f32 = sum;
            max_lane(v: __m512) -> f32 = max_lane;
            weigh(p: __m512, x: __m512) -> __m512 = weigh;
        }

        #[inline(always)]
        fn keep(self, v: __m512, lanes: u16, fill: __m512) -> __m512 {
            // SAFETY: `self` proves the features.
            unsafe { _mm512_mask_mov_ps(fill, lanes, v) }
        }

        #[inline(always)]
        fn load(self, x: &[f32; LANES]) -> __m512 {
            // SAFETY: `self` proves the features; sixteen elements are there.
            unsafe { _mm512_loadu_ps(x.as_ptr()) }
        }

        #[inline(always)]
        fn load_low(self, words: &[u32; LANES]) -> __m512 {
            // SAFETY: `self` proves the features; sixteen words are there.
            let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
            // SAFETY: `self` proves the features.
            unsafe { widen_low(words) }
        }

        #[inline(always)]
        fn load_high(self, words: &[u32; LANES]) -> __m512 {
            // SAFETY: `self` proves the features; sixteen words are there.
            let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast()) };
            // SAFETY: `self` proves the features.
            unsafe { widen_high(words) }
        }

        #[inline(always)]
        fn load_tail(self, x: &[f32], fill: f32) -> __m512 {
            let fill = self.splat(fill);
            // SAFETY: `self` proves the features; masked-out lanes are not read.
            unsafe { _mm512_mask_loadu_ps(fill, mask(x.len()), x.as_ptr()) }
        }

        #[inline(always)]
        fn store(self, to: &mut [f32; LANES], v: __m512) {
            // SAFETY: `self` proves the features; sixteen elements are there.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), v) }
        }

        #[inline(always)]
        fn store_tail(self, to: &mut [f32], v: __m512) {
            // SAFETY: `self` proves the features; masked-out lanes are not written.
            unsafe { _mm512_mask_storeu_ps(to.as_mut_ptr(), mask(to.len()), v) }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    fn widen_low(words: __m512i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    fn widen_high(words: __m512i) -> __m512 {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        _mm512_castsi512_ps(_mm512_and_si512(words, upper))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    #[inline]
    fn weigh(p: __m512, x: __m512) -> __m512 {
        let nonzero = _mm512_cmp_ps_mask::<_CMP_NEQ_UQ>(p, _mm512_setzero_ps());
        _mm512_maskz_mul_ps(nonzero, p, x)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Level;

    fn levels() -> impl Iterator<Item = Isa> {
        Level::ALL.into_iter().filter_map(Level::isa)
    }

    /// One vector operation on sixteen numbers.
    struct Exp([f32; LANES]);

    impl Job for Exp {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [0.0; LANES];
            s.store(&mut out, s.exp(s.load(&self.0)));
            out
        }
    }

    fn ulps(x: f32, exact: f64) -> f64 {
        let near = exact as f32;
        let unit = f64::from(near.abs().next_up()) - f64::from(near.abs());
        (f64::from(x) - exact).abs() / unit
    }

    #[test]
    fn exp_is_accurate_to_two_units() {
        for isa in levels() {
            let mut worst: f64 = 0.0;
            let mut x = -103.5f32;
            while x < 88.7 {
                let xs: [f32; LANES] = std::array::from_fn(|i| x + i as f32 * 1.7e-5);
                for (x, y) in xs.into_iter().zip(isa.vectorize(Exp(xs))) {
                    worst = worst.max(ulps(y, f64::from(x).exp()));
                }
                x += 2.9e-3;
            }
            assert!(worst < 2.0, "{isa:?}: {worst} units");
        }
    }

    #[test]
    fn exp_handles_the_edges() {
        for isa in levels() {
            let mut xs = [0.0; LANES];
            xs[..8].copy_from_slice(&[
                f32::NEG_INFINITY,
                f32::INFINITY,
                f32::NAN,
                0.0,
                -1e30,
                1e30,
                -200.0,
                -100.0,
            ]);
            let y = isa.vectorize(Exp(xs));
            assert_eq!(y[0], 0.0);
            assert_eq!(y[1], f32::INFINITY);
            assert!(y[2].is_nan());
            assert_eq!(y[3], 1.0);
            assert_eq!(y[4], 0.0);
            assert_eq!(y[5], f32::INFINITY);
            assert_eq!(y[6], 0.0);
            assert!(y[7] > 0.0 && y[7] < 1e-43, "{isa:?}: denormal {}", y[7]);
        }
    }

    /// The two ways of reading bf16.
    struct Halves<'a>(&'a [u32; LANES]);

    impl Job for Halves<'_> {
        type Output = [[f32; LANES]; 2];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [[0.0; LANES]; 2];
            s.store(&mut out[0], s.load_low(self.0));
            s.store(&mut out[1], s.load_high(self.0));
            out
        }
    }

    #[test]
    fn bf16_is_widened_in_order() {
        let element = |i: usize| (i as u32 * 0x1_0203 + 0x3f80_0000) >> 16;
        let words: [u32; LANES] =
            std::array::from_fn(|w| element(2 * w) | element(2 * w + 1) << 16);
        let wide = |i: usize| f32::from_bits(element(i) << 16);
        for isa in levels() {
            let [low, high] = isa.vectorize(Halves(&words));
            assert_eq!(low, std::array::from_fn(|i| wide(2 * i)));
            assert_eq!(high, std::array::from_fn(|i| wide(2 * i + 1)));
        }
    }

    /// Some lanes of ones, sevens in the others.
    struct Keep(u16);

    impl Job for Keep {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [0.0; LANES];
            s.store(&mut out, s.keep(s.splat(1.0), self.0, s.splat(7.0)));
            out
        }
    }

    #[test]
    fn lanes_are_kept_by_their_bits() {
        for (isa, lanes) in levels().flat_map(|isa| [0, 1, 0x8001, 0x5aa5, !0].map(|l| (isa, l))) {
            let expected = std::array::from_fn(|i| if lanes >> i & 1 == 1 { 1.0 } else { 7.0 });
            assert_eq!(isa.vectorize(Keep(lanes)), expected, "{isa:?} {lanes:x}");
        }
    }

    /// Sum, maximum, a weighed vector, and a tail read and written.
    struct Lanes<'a>(&'a [f32]);

    impl Job for Lanes<'_> {
        type Output = (f32, f32, Vec<f32>);

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let v = s.load_tail(self.0, -3.0);
            let mut out = vec![7.0; self.0.len()];
            s.store_tail(&mut out, s.weigh(v, s.splat(f32::INFINITY)));
            (s.sum(v), s.max_lane(v), out)
        }
    }

    #[test]
    fn lanes_follow_the_tree_and_the_tail() {
        for isa in levels() {
            for len in 0..=LANES {
                let x: Vec<f32> = (0..len).map(|i| (i as f32 - 4.0) * 1.1).collect();
                let mut tree: Vec<f32> = x.clone();
                tree.resize(LANES, -3.0);
                let max = tree.iter().copied().fold(f32::MIN, f32::max);
                for width in [8, 4, 2, 1] {
                    (0..width).for_each(|i| tree[i] += tree[i + width]);
                }
                let weighed: Vec<f32> =
                    x.iter().map(|&x| if x == 0.0 { 0.0 } else { x * f32::INFINITY }).collect();
                assert_eq!(isa.vectorize(Lanes(&x)), (tree[0], max, weighed));
            }
        }
    }
}
