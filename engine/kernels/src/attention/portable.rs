//! The products in plain loops that the compiler turns into the baseline's vectors.

use super::tiles::{Panel, Products, ScoresOut, Weights};
use crate::Dtype;
use crate::gemm::convert::{element, high, low, round_bf16};
use crate::kv::{MAX_HEAD_DIM, TILE};

/// Products without any special instruction. The packed operand is `[rows][d]` of rounded f32 bits.
#[derive(Clone, Copy)]
pub(super) struct Plain;

/// A tile as f32: `[d][16]` of keys, `[16][d]` of values.
type Wide = [f32; TILE * MAX_HEAD_DIM];

impl Products for Plain {
    fn pack(self, dtype: Dtype, rows: &[f32], _d: usize, out: &mut [u32]) {
        for (word, &x) in out.iter_mut().zip(rows) {
            *word = match dtype {
                Dtype::F32 => x.to_bits(),
                Dtype::Bf16 => round_bf16(x) << 16,
            };
        }
    }

    fn scores(self, x: &[u32], keys: Panel<'_>, scale: f32, out: ScoresOut<'_>) {
        let d = x.len() / out.rows;
        let mut wide: Wide = [0.0; TILE * MAX_HEAD_DIM];
        for tile in 0..keys.tiles.len() {
            widen_keys(&keys, tile, &mut wide);
            for (row, x) in x.chunks_exact(d).enumerate() {
                let mut sums = [0.0f32; TILE];
                for (line, &x) in wide.as_chunks::<TILE>().0.iter().zip(x) {
                    let x = f32::from_bits(x);
                    sums.iter_mut().zip(line).for_each(|(sum, k)| *sum += x * k);
                }
                let to = &mut out.to[row * out.stride + tile * TILE..][..TILE];
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum * scale);
            }
        }
    }

    fn mix(self, p: Weights<'_>, values: Panel<'_>, out: &mut [f32]) {
        let d = out.len() / p.lens.len();
        let mut wide: Wide = [0.0; TILE * MAX_HEAD_DIM];
        out.fill(0.0);
        for tile in 0..values.tiles.len() {
            let first = tile * TILE;
            widen_values(&values, tile, &mut wide);
            for ((row, out), &len) in out.chunks_exact_mut(d).enumerate().zip(p.lens) {
                let p = &p.rows[row * p.stride + first..][..len.saturating_sub(first).min(TILE)];
                for (&p, v) in p.iter().zip(wide.chunks_exact(d)) {
                    out.iter_mut().zip(v).for_each(|(out, v)| *out += p * v);
                }
            }
        }
    }

    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32]) {
        let d = x.len() / p.lens.len();
        for ((row, x), &len) in x.chunks_exact(d).enumerate().zip(p.lens) {
            for (&p, out) in p.rows[row * p.stride..][..len].iter().zip(out.chunks_exact_mut(d)) {
                out.iter_mut().zip(x).for_each(|(out, x)| *out += p * x);
            }
        }
    }
}

fn widen_keys(keys: &Panel<'_>, tile: usize, wide: &mut Wide) {
    let lines = keys.tile(tile).as_chunks::<TILE>().0;
    let (to, _) = wide.as_chunks_mut::<TILE>();
    match keys.dtype {
        Dtype::F32 => {
            to.iter_mut().zip(lines).for_each(|(to, line)| *to = line.map(f32::from_bits))
        }
        Dtype::Bf16 => {
            for ([even, odd], line) in to.as_chunks_mut::<2>().0.iter_mut().zip(lines) {
                *even = line.map(low);
                *odd = line.map(high);
            }
        }
    }
}

fn widen_values(values: &Panel<'_>, tile: usize, wide: &mut Wide) {
    let words = values.tile(tile);
    let elements = words.len() * if values.dtype == Dtype::Bf16 { 2 } else { 1 };
    for (i, to) in wide[..elements].iter_mut().enumerate() {
        *to = element(values.dtype, |w| words[w], i);
    }
}
