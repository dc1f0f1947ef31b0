//! Times attention in the shapes of a 135M-parameter model: 30 layers, 9 query heads, 3 kv heads of 64.
//!
//! `cargo run --release -p kernels --example attention_bench [threads]`. Each figure is the best of
//! several runs, for all 30 layers. Printed with it: FLOP per second (4 or 10 per row, position and
//! element) and, for decoding, bytes of keys and values per second.

use kernels::{
    Attention, AttnBackward, AttnFamily, AttnScratch, AttnSeq, Dtype, Kernels, KvCache, Level,
};
use std::time::Instant;

const LAYERS: usize = 30;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const D: usize = 64;
const SCALE: f32 = 0.125;

fn numbers(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0).collect()
}

fn best_of(runs: usize, mut run: impl FnMut()) -> f64 {
    let time = |run: &mut dyn FnMut()| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(|_| time(&mut run)).fold(f64::INFINITY, f64::min)
}

/// `count` sequences of `context` tokens, the last `rows` of which are attended from.
fn forward(kernels: &Kernels, dtype: Dtype, count: usize, context: usize, rows: usize) {
    let blocks = context.div_ceil(16);
    let mut kv = KvCache::new(dtype, LAYERS, count * blocks, 16, KV_HEADS, D);
    // Block b of sequence s is b * count + s: sequences that grow side by side.
    let tables: Vec<Vec<u32>> =
        (0..count).map(|s| (0..blocks).map(|b| (b * count + s) as u32).collect()).collect();
    let slots = |from: usize| -> Vec<u32> {
        let slot = |table: &Vec<u32>, t: usize| table[t / 16] * 16 + (t % 16) as u32;
        tables.iter().flat_map(|table| (from..context).map(move |t| slot(table, t))).collect()
    };
    let all = slots(0);
    let k = numbers(all.len() * KV_HEADS * D);
    (0..LAYERS).for_each(|layer| kernels.kv_write(&mut kv, layer, &k, &k, &all));

    let seqs: Vec<AttnSeq<'_>> = tables
        .iter()
        .enumerate()
        .map(|(s, blocks)| AttnSeq { first_row: s * rows, rows, start: context - rows, blocks })
        .collect();
    let q = numbers(count * rows * HEADS * D);
    let mut out = vec![0.0; q.len()];
    let mut scratch = AttnScratch::new();
    let seconds = best_of(7, || {
        for layer in 0..LAYERS {
            let task = Attention { layer, q: &q, seqs: &seqs, heads: HEADS, scale: SCALE };
            kernels.attention(&kv, task, &mut out, &mut scratch);
        }
    });
    let new = slots(context - rows);
    let k = numbers(new.len() * KV_HEADS * D);
    let write = best_of(7, || {
        (0..LAYERS).for_each(|layer| kernels.kv_write(&mut kv, layer, &k, &k, &new));
    });
    let pairs: usize = (context - rows..context).map(|t| t + 1).sum();
    let flop = (LAYERS * count * pairs * HEADS * D * 4) as f64;
    let bytes = (LAYERS * count * context * KV_HEADS * D * 2 * dtype.size_bytes()) as f64;
    println!(
        "{:9} {:4} {count:3} x {rows:4} rows at context {context:5}: {:9.2} ms  {:6.1} GFLOP/s  {:5.1} GB/s of cache once; kv_write {:7.2} ms",
        kernels.level().name(),
        dtype.name(),
        seconds * 1e3,
        flop / seconds / 1e9,
        bytes / seconds / 1e9,
        write * 1e3,
    );
}

fn backward(kernels: &Kernels, dtype: Dtype, count: usize, len: usize) {
    let rows = count * len;
    let (q, k) = (numbers(rows * HEADS * D), numbers(rows * KV_HEADS * D));
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), k.clone());
    let families: Vec<_> =
        (0..count).map(|s| AttnFamily { prompt: s * len..(s + 1) * len, branches: &[] }).collect();
    let mut scratch = AttnScratch::new();
    let seconds = best_of(5, || {
        for _layer in 0..LAYERS {
            let task = AttnBackward {
                dtype,
                q: &q,
                k: &k,
                v: &k,
                out: &q,
                dout: &q,
                families: &families,
                heads: HEADS,
                kv_heads: KV_HEADS,
                head_dim: D,
                scale: SCALE,
                dq: &mut dq,
                dk: &mut dk,
                dv: &mut dv,
            };
            kernels.attention_backward(task, &mut scratch);
        }
    });
    let flop = (LAYERS * count * len * (len + 1) / 2 * HEADS * D * 10) as f64;
    println!(
        "{:9} {:4} {count:3} x {len:4} rows backward:            {:9.2} ms  {:6.1} GFLOP/s",
        kernels.level().name(),
        dtype.name(),
        seconds * 1e3,
        flop / seconds / 1e9,
    );
}

fn main() {
    let threads = std::env::args().nth(1).map_or(2, |n| n.parse().expect("a number of threads"));
    let kernels = Kernels::new(Level::detect(), threads).expect("the detected level is available");
    for dtype in [Dtype::Bf16, Dtype::F32] {
        forward(&kernels, dtype, 64, 200, 1);
        forward(&kernels, dtype, 1, 4096, 1);
        forward(&kernels, dtype, 16, 512, 512);
        backward(&kernels, dtype, 64, 250);
    }
    let portable = Kernels::new(Level::Portable, threads).expect("runs everywhere");
    forward(&portable, Dtype::Bf16, 64, 200, 1);
}
