//! Speed of the matrix products on this machine, beside what its registers and memory allow.
//!
//! ```text
//! cargo run --release -p kernels --example gemm_bench [-- THREADS [LEVEL [DTYPE [SHAPE]]]]
//! ```
//!
//! Prints, per shape, the best of many runs: GFLOP/s of the forward product and of both backward
//! products, and the rate at which the forward product reads its weights. Leaves out statistics:
//! the best run is the one that other work on the machine disturbed least.

use std::time::Instant;

use kernels::{Dtype, Kernels, Level, Matrix, Operand, Scratch, Write, probe};

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
    match probe::multiply_peak(&kernels, dtype) {
        Some(flops) => println!("register peak: {:.0} GFLOP/s", flops / 1e9),
        None => println!("register peak: not measured"),
    }
    println!("read bandwidth: {:.1} GB/s", probe::read_bandwidth(kernels.pool()) / 1e9);
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
