//! Speed of the matrix products on this machine, beside what its registers and memory allow.
//!
//! ```text
//! cargo run --release -p kernels --example gemm_bench [-- THREADS [LEVEL [DTYPE [SHAPE]]]]
//! ```
//!
//! Prints, per shape, the best of many runs: GFLOP/s of the forward product and of both backward
//! products, and the rate at which the forward product reads its weights. Leaves out statistics:
//! the best run is the one that other work on the machine disturbed least.

use std::hint::black_box;
use std::time::Instant;

use kernels::{Dtype, Kernels, Level, Matrix, Operand, Scratch, ThreadPool, Write};

/// Model, inputs K, outputs N.
const SHAPES: [(&str, usize, usize); 8] = [
    ("smollm2-135m qkv", 576, 960),
    ("smollm2-135m out", 576, 576),
    ("smollm2-135m gate+up", 576, 3072),
    ("smollm2-135m down", 1536, 576),
    ("smollm2-135m head", 576, 49152),
    ("qwen2.5-0.5b qkv", 896, 1152),
    ("qwen2.5-0.5b gate+up", 896, 9728),
    ("qwen2.5-0.5b down", 4864, 896),
];
const ROWS: [usize; 6] = [1, 8, 16, 64, 256, 1024];
/// Weights are read from this much memory in turn, so that small ones do not stay in the cache.
const COLD_BYTES: usize = 192 << 20;
/// Time spent on one figure, in seconds.
const SECONDS: f64 = 0.25;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |n| n.parse().expect("THREADS is a number"));
    let level = arguments.next().map(|name| Level::parse(&name).expect("LEVEL is a level's name"));
    let level = level.unwrap_or_else(Level::detect);
    let dtype = if arguments.next().as_deref() == Some("f32") { Dtype::F32 } else { Dtype::Bf16 };
    let kernels = Kernels::new(level, threads).expect("LEVEL runs here");
    println!("{level}, {threads} threads, weights {}", dtype.name());
    println!("register peak: {}", peak::describe(kernels.pool()));
    println!("read bandwidth: {:.1} GB/s", bandwidth(kernels.pool()));
    println!("{:24} {:>6} {:>8} {:>8} {:>8} {:>8}", "", "rows", "forward", "GB/s", "dx", "dw");
    let only = arguments.next();
    for (name, k, n) in SHAPES {
        if only.as_ref().is_some_and(|only| !name.contains(only)) {
            continue;
        }
        let copies = (COLD_BYTES / (n * k * dtype.size_bytes())).max(1);
        let weights: Vec<Matrix> = (0..copies).map(|_| filled(&kernels, dtype, n, k)).collect();
        for m in ROWS {
            shape(&kernels, &weights, m, name);
        }
    }
}

fn filled(kernels: &Kernels, dtype: Dtype, n: usize, k: usize) -> Matrix {
    let values: Vec<f32> = (0..n * k).map(|i| (i % 17) as f32 * 0.01 - 0.08).collect();
    let mut w = Matrix::zeros(dtype, n, k);
    kernels.load_matrix(&values, &mut w);
    w
}

fn shape(kernels: &Kernels, weights: &[Matrix], m: usize, name: &str) {
    let (n, k, dtype) = (weights[0].rows(), weights[0].cols(), weights[0].dtype());
    let values = |n: usize| (0..n).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect::<Vec<_>>();
    let (mut x, mut dyo) = (Operand::new(dtype), Operand::new(dtype));
    let dy = values(m * n);
    kernels.operand(&values(m * k), k, &mut x);
    kernels.operand(&dy, n, &mut dyo);
    let (mut y, mut dx, mut dw) = (vec![0.0; m * n], vec![0.0; m * k], vec![0.0; n * k]);
    let mut scratch = Scratch::new();
    let mut next = weights.iter().cycle();
    let forward = best(|| {
        let w = next.next().expect("a cycle");
        kernels.matmul(&x, w, 0..n, None, Write::Set, &mut y);
    });
    let giga = 2e-9 * (m * n * k) as f64;
    let bytes = 1e-9 * weights[0].bytes() as f64;
    print!("{name:24} {m:6} {:8.1} {:8.1}", giga / forward, bytes / forward);
    if m < 64 || n > 10_000 {
        println!();
        return;
    }
    let w = &weights[0];
    let dx = best(|| kernels.matmul_dx(&dyo, w, 0..n, Write::Set, &mut dx, &mut scratch));
    let dw = best(|| kernels.matmul_dw(&dy, &x, Write::Set, &mut dw, &mut scratch));
    println!(" {:8.1} {:8.1}", giga / dx, giga / dw);
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

/// GB/s of all threads reading memory once with plain loads.
fn bandwidth(pool: &ThreadPool) -> f64 {
    let words = vec![1_u64; COLD_BYTES / 8];
    let parts = pool.threads() * 8;
    let part = words.len() / parts;
    let seconds = best(|| {
        pool.run(parts, &|i| {
            let mut sums = [0_u64; 8];
            for line in words[i * part..][..part].chunks_exact(8) {
                sums.iter_mut().zip(line).for_each(|(sum, &word)| *sum ^= word);
            }
            black_box(sums);
        });
    });
    1e-9 * COLD_BYTES as f64 / seconds
}

#[cfg(target_arch = "x86_64")]
mod peak {
    //! What the multipliers do when nothing comes from memory.

    use super::{ThreadPool, best, black_box};
    use std::arch::x86_64::*;

    const CHAINS: usize = 24;
    const STEPS: usize = 100_000;

    pub(super) fn describe(pool: &ThreadPool) -> String {
        let mut text = Vec::new();
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were found.
            text.push(format!("{:.0} f32 (AVX2)", rate(pool, 16.0, &|| unsafe { fma_avx2() })));
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was found.
            text.push(format!("{:.0} f32 (AVX-512)", rate(pool, 32.0, &|| unsafe { fma() })));
        }
        if is_x86_feature_detected!("avx512bf16") {
            // SAFETY: the feature was found.
            text.push(format!("{:.0} bf16 (AVX-512)", rate(pool, 64.0, &|| unsafe { dot() })));
        }
        format!("GFLOP/s {}", text.join(", "))
    }

    fn rate(pool: &ThreadPool, flops: f64, f: &(dyn Fn() + Sync)) -> f64 {
        let seconds = best(|| pool.run(pool.threads(), &|_| f()));
        1e-9 * (pool.threads() * CHAINS * STEPS) as f64 * flops / seconds
    }

    #[target_feature(enable = "avx2,fma")]
    fn fma_avx2() {
        let x = _mm256_set1_ps(black_box(0.5));
        for _ in 0..CHAINS / 12 {
            let mut sums = [x; 12];
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

#[cfg(not(target_arch = "x86_64"))]
mod peak {
    //! Not measured on other processors.

    pub(super) fn describe(_pool: &super::ThreadPool) -> String {
        "not measured".to_owned()
    }
}
