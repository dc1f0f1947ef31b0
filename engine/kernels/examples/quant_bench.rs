//! Speed of products with quantised weights, beside the memory's.
//!
//! ```text
//! cargo run --release -p kernels --example quant_bench [-- THREADS [LEVEL]]
//! ```
//!
//! Prints, per format, shape and number of rows, the best of many runs: GFLOP/s, and the rate at which
//! weights are read. Weights rotate through more memory than the caches hold. Leaves out statistics.

use std::time::Instant;

use kernels::{Kernels, Level, QuantFormat, QuantMatrix, QuantOperand, Write, probe};

/// Name, bits, group, minimum, zero.
const FORMATS: [(&str, u32, usize, bool, u8); 6] = [
    ("q4_0", 4, 32, false, 8),
    ("q4_1", 4, 32, true, 0),
    ("q5_0", 5, 32, false, 16),
    ("q4_k", 4, 32, true, 0),
    ("q6_k", 6, 16, false, 32),
    ("q8_0", 8, 32, false, 128),
];
/// Inputs K, outputs N.
const SHAPES: [(usize, usize); 3] = [(896, 9728), (4864, 896), (576, 49152)];
const ROWS: [usize; 4] = [1, 4, 32, 256];
/// Weights are read from this much memory in turn.
const COLD_BYTES: usize = 192 << 20;
/// Time spent on one figure, in seconds.
const SECONDS: f64 = 0.2;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let threads = arguments.next().map_or(2, |n| n.parse().expect("THREADS is a number"));
    let level = arguments.next().map(|name| Level::parse(&name).expect("LEVEL is a level's name"));
    let level = level.unwrap_or_else(Level::detect);
    let kernels = Kernels::new(level, threads).expect("LEVEL runs here");
    println!("{level}, {threads} threads");
    println!("read bandwidth: {:.1} GB/s", probe::read_bandwidth(kernels.pool()) / 1e9);
    println!("{:22} {:>6} {:>10} {:>8}", "", "rows", "GFLOP/s", "GB/s");
    for (name, bits, group, minimum, zero) in FORMATS {
        let format = QuantFormat::new(bits, group, minimum, zero, 0);
        for (k, n) in SHAPES {
            let copies = (COLD_BYTES as u64).div_ceil(format.bytes(n, k)).min(64);
            // All zero: no kernel looks at values.
            let weights: Vec<_> = (0..copies).map(|_| QuantMatrix::zeros(format, n, k)).collect();
            for m in ROWS {
                let (mut x, mut y) = (QuantOperand::new(), vec![0.0; m * n]);
                kernels.quant_operand(&vec![0.5; m * k], k, &mut x);
                let mut next = weights.iter().cycle();
                let seconds = best(|| {
                    let w = next.next().expect("a cycle");
                    kernels.quant_matmul(&x, w, 0..n, None, Write::Set, &mut y);
                });
                let flops = 2e-9 * (m * n * k) as f64 / seconds;
                let rate = 1e-9 * weights[0].bytes() as f64 / seconds;
                println!("{:22} {m:6} {flops:10.1} {rate:8.1}", format!("{name} {k} x {n}"));
            }
        }
    }
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
