//! What this machine's memory and multipliers can do at most, measured: the limits beside which speeds
//! are reported.
//!
//! Each figure is the best of many short runs, as that is the one other work disturbed least, and takes
//! about a quarter of a second. Leaves out caches, latency and writing.

use std::hint::black_box;
use std::time::Instant;

use crate::{Dtype, Kernels, ThreadPool, kv, prefetch};

/// Memory that is read: more than caches hold.
const READ_BYTES: usize = 192 << 20;
/// Bytes that a thread has asked for ahead of those it adds up: more than a page, which the processor's
/// own prefetching does not cross.
const AHEAD_BYTES: usize = 8 << 10;
/// Time spent on one figure, in seconds.
const SECONDS: f64 = 0.25;

/// Bytes a second that all threads read from memory together.
pub fn read_bandwidth(pool: &ThreadPool) -> f64 {
    let (mut memory, lead) = kv::zeroed(READ_BYTES / 4);
    memory.fill(1);
    let words = &memory[lead..][..READ_BYTES / 4];
    let parts = pool.threads() * 8;
    let part = words.len() / parts / 16 * 16;
    let seconds = best(|| {
        pool.run(parts, &|i| {
            let mut sums = [0_u32; 16];
            for line in words[i * part..][..part].chunks_exact(16) {
                prefetch::near(line.as_ptr().wrapping_byte_add(AHEAD_BYTES));
                sums.iter_mut().zip(line).for_each(|(sum, &word)| *sum ^= word);
            }
            black_box(sums);
        });
    });
    (4 * parts * part) as f64 / seconds
}

/// Floating-point operations a second (a multiplication and an addition count as two) of the instruction
/// with which these kernels multiply weights of `dtype`, on all threads, when nothing comes from memory;
/// `None` for levels whose instruction is not measured.
///
/// ```
/// # use kernels::{Dtype, Kernels, Level, probe};
/// let kernels = Kernels::new(Level::Reference, 1).expect("it runs everywhere");
/// assert_eq!(probe::multiply_peak(&kernels, Dtype::F32), None);
/// ```
pub fn multiply_peak(kernels: &Kernels, dtype: Dtype) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    return multiply::peak(kernels, dtype);
    #[cfg(not(target_arch = "x86_64"))]
    return None;
}

/// Seconds of the fastest call.
fn best(mut f: impl FnMut()) -> f64 {
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while start.elapsed().as_secs_f64() < SECONDS {
        let call = Instant::now();
        f();
        best = best.min(call.elapsed().as_secs_f64());
    }
    best
}

#[cfg(target_arch = "x86_64")]
mod multiply {
    //! Chains of one instruction, as many as hide its latency.

    use std::arch::x86_64::*;

    use super::{best, black_box, tiles};
    use crate::cpu::Isa;
    use crate::{Dtype, Kernels};

    const CHAINS: usize = 24;
    pub(super) const STEPS: usize = 100_000;
    /// Of a step of tiles: four products of 16 x 32 and 32 x 16.
    const TILE_FLOPS: usize = 4 * 2 * 16 * 16 * 32;

    pub(super) fn peak(kernels: &Kernels, dtype: Dtype) -> Option<f64> {
        if let Some(_proof) = kernels.isa.avx2() {
            // Weights of both formats meet this instruction as f32.
            // SAFETY: the token proves AVX2 and FMA.
            return Some(rate(kernels, 16.0, &|| unsafe { fma_avx2() }));
        }
        let token = kernels.isa.avx512()?;
        match dtype {
            Dtype::F32 => {
                // SAFETY: the token proves AVX-512 F.
                Some(rate(kernels, 32.0, &|| unsafe { fma() }))
            }
            Dtype::Bf16 if let Isa::Amx(proof) = kernels.isa => {
                Some(rate_of(kernels, STEPS * TILE_FLOPS, &|| tiles::products(proof)))
            }
            Dtype::Bf16 => match token.bf16() {
                Some(_proof) => {
                    // SAFETY: the tokens prove AVX-512 F and BF16.
                    Some(rate(kernels, 64.0, &|| unsafe { dot() }))
                }
                // SAFETY: the token proves AVX-512 F; without dot products bf16 is widened to f32.
                None => Some(rate(kernels, 32.0, &|| unsafe { fma() })),
            },
        }
    }

    fn rate(kernels: &Kernels, flops: f64, f: &(dyn Fn() + Sync)) -> f64 {
        rate_of(kernels, CHAINS * STEPS * flops as usize, f)
    }

    /// Operations a second of `f`, which does `flops` of them, on all threads.
    fn rate_of(kernels: &Kernels, flops: usize, f: &(dyn Fn() + Sync)) -> f64 {
        let pool = kernels.pool();
        let seconds = best(|| pool.run(pool.threads(), &|_| f()));
        (pool.threads() * flops) as f64 / seconds
    }

    /// Half of the chains at a time: there are sixteen registers.
    #[target_feature(enable = "avx2,fma")]
    fn fma_avx2() {
        let x = _mm256_set1_ps(black_box(0.5));
        for _ in 0..2 {
            let mut sums = [x; CHAINS / 2];
            for _ in 0..STEPS {
                sums.iter_mut().for_each(|sum| *sum = _mm256_fmadd_ps(x, x, *sum));
            }
            black_box(sums);
        }
    }

    #[target_feature(enable = "avx512f")]
    fn fma() {
        let x = _mm512_set1_ps(black_box(0.5));
        let mut sums = [x; CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_fmadd_ps(x, x, *sum));
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn dot() {
        let x = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(0.25));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..STEPS {
            sums.iter_mut().for_each(|sum| *sum = _mm512_dpbf16_ps(*sum, x, x));
        }
        black_box(sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod tiles {
    //! Four chains of AMX tile products, as many as hide their latency.
    //!
    //! ```text
    //! four tiles of sums, two of x, two of w = 0
    //! repeat: each of the sums += one of x times one of w     the data changes no instruction's time
    //! ```

    use std::arch::asm;

    use super::multiply::STEPS;
    use crate::cpu::Amx;
    use crate::gemm::amx::tiles::Tiles;

    /// Runs [`STEPS`] steps of four products on this thread.
    pub(super) fn products(proof: Amx) {
        let _configured = Tiles::new(proof);
        // SAFETY: this thread holds the tiles, no compiled code uses them, and no memory is touched.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {steps}", "jnz 2b",
                steps = inout(reg) STEPS => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, nomem),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;

    #[test]
    #[cfg_attr(miri, ignore = "measures time")]
    fn figures_are_within_what_machines_can_do() {
        let kernels = Kernels::new(Level::detect(), 1).expect("it was found");
        let bandwidth = read_bandwidth(kernels.pool());
        assert!((1e8..1e13).contains(&bandwidth), "{bandwidth}");
        for dtype in [Dtype::F32, Dtype::Bf16] {
            if let Some(peak) = multiply_peak(&kernels, dtype) {
                assert!((1e9..1e14).contains(&peak), "{}: {peak}", dtype.name());
            }
        }
    }
}
