//! Attention as it is defined: one row after the other, in f64, nothing saved.

use super::{Attention, AttnBackward, AttnFamily};
use crate::Dtype;
use crate::kv::KvCache;
use half::bf16;

/// A vector as the kernels see it after rounding.
pub(super) fn rounded(dtype: Dtype, x: &[f32]) -> Vec<f64> {
    let round = |&x: &f32| match dtype {
        Dtype::F32 => f64::from(x),
        Dtype::Bf16 => bf16::from_f32(x).to_f64(),
    };
    x.iter().map(round).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The probabilities of the positions whose keys are given.
fn probabilities(q: &[f64], keys: &[Vec<f64>], scale: f32) -> Vec<f64> {
    let scores: Vec<f64> = keys.iter().map(|k| dot(q, k) * f64::from(scale)).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.into_iter().map(|e| e / sum).collect()
}

pub(super) fn forward(kv: &KvCache, task: &Attention<'_>, out: &mut [f32]) {
    let (d, group) = (kv.head_dim(), task.heads / kv.kv_heads());
    for seq in task.seqs {
        let slot = |j: usize| {
            seq.blocks[j / kv.block_size()] * kv.block_size() as u32 + (j % kv.block_size()) as u32
        };
        for head in 0..task.heads {
            let slots = 0..seq.start + seq.rows;
            let read = |x: Vec<f32>| x.into_iter().map(f64::from).collect();
            let keys: Vec<Vec<f64>> =
                slots.clone().map(|j| read(kv.key(task.layer, slot(j), head / group))).collect();
            let values: Vec<Vec<f64>> =
                slots.map(|j| read(kv.value(task.layer, slot(j), head / group))).collect();
            for row in 0..seq.rows {
                let place = ((seq.first_row + row) * task.heads + head) * d;
                let q = rounded(kv.dtype().multiplied(), &task.q[place..place + d]);
                let p = probabilities(&q, &keys[..=seq.start + row], task.scale);
                for i in 0..d {
                    let sum: f64 = p.iter().zip(&values).map(|(p, v)| p * v[i]).sum();
                    out[place + i] = sum as f32;
                }
            }
        }
    }
}

pub(super) fn backward(task: AttnBackward<'_>) {
    let AttnBackward { dtype, heads, kv_heads, .. } = task;
    let (d, group) = (task.head_dim, heads / kv_heads);
    let (mut dk, mut dv) = (vec![0.0; task.k.len()], vec![0.0; task.v.len()]);
    for (before, rows) in task.families.iter().flat_map(AttnFamily::pieces) {
        for (row, head) in rows.clone().flat_map(|row| (0..heads).map(move |head| (row, head))) {
            let places: Vec<usize> = before
                .clone()
                .chain(rows.start..=row)
                .map(|seen| (seen * kv_heads + head / group) * d)
                .collect();
            let of = |x: &[f32]| -> Vec<Vec<f64>> {
                places.iter().map(|&place| rounded(dtype, &x[place..place + d])).collect()
            };
            let (keys, values) = (of(task.k), of(task.v));
            let at = (row * heads + head) * d;
            let q = rounded(dtype, &task.q[at..at + d]);
            let dout = rounded(Dtype::F32, &task.dout[at..at + d]);
            let dp: Vec<f64> = values.iter().map(|value| dot(&dout, value)).collect();
            let p = probabilities(&q, &keys, task.scale);
            let delta = dot(&p, &dp);
            let mut dq = vec![0.0; d];
            for (j, (p, place)) in p.into_iter().zip(&places).enumerate() {
                let ds = p * (dp[j] - delta) * f64::from(task.scale);
                for i in 0..d {
                    dq[i] += ds * keys[j][i];
                    dk[place + i] += ds * q[i];
                    dv[place + i] += p * dout[i];
                }
            }
            task.dq[at..at + d].iter_mut().zip(dq).for_each(|(to, x)| *to = x as f32);
        }
    }
    for (_, rows) in task.families.iter().flat_map(AttnFamily::pieces) {
        for i in rows.start * kv_heads * d..rows.end * kv_heads * d {
            task.dk[i] = dk[i] as f32;
            task.dv[i] = dv[i] as f32;
        }
    }
}
