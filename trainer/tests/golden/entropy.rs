//! `entropy.json`: the plain definition in f64, and the kernels' head in f32 with the unit matrix for
//! weights, so that hidden states are logits.

use kernels::{Dtype, HeadBackward, HeadScratch, Kernels, Level, Matrix, Operand, TokenStats};
use serde_json::Value;
use trainer::agg::{AggMode, reduce, weights};
use trainer::distribution::Distribution;

use crate::common::{
    REDUCED, SINGLE, TOKEN, Tolerance, close, close_tokens, indices, known, lengths, mask,
    required, rows,
};

/// One row of logits for each token, and what is asked of it.
struct Inputs {
    logits: Vec<Vec<f64>>,
    labels: Vec<usize>,
    mask: Vec<bool>,
    lengths: Vec<usize>,
    temperature: f64,
    /// Of each token in the mean of the entropies.
    weight: Vec<f64>,
}

/// What came out, flat over the tokens.
struct Results {
    entropy: Vec<f64>,
    log_prob: Vec<f64>,
    /// Of the mean entropy by the logits.
    gradient: Vec<Vec<f64>>,
}

pub(crate) fn entropies(cases: &[Value]) {
    for case in cases {
        known(case, &["name", "logits", "labels", "mask", "temperature", "expected", "note"]);
        let inputs = Inputs::new(case);
        let what = case["name"].as_str().unwrap();
        compare(&inputs, &inputs.plain(), &case["expected"], (TOKEN, REDUCED, what));
        for level in [Level::Reference, Level::detect()] {
            let kernels = Kernels::new(level, 1).unwrap();
            let what = format!("{what}, {level} kernels");
            compare(&inputs, &inputs.kernels(&kernels), &case["expected"], (SINGLE, SINGLE, &what));
        }
    }
}

impl Inputs {
    fn new(case: &Value) -> Self {
        let mask = mask(&case["mask"]);
        let lengths = lengths(&case["mask"]);
        let tokens = rows(&case["logits"]).iter().flat_map(rows);
        Self {
            logits: tokens.map(|row| rows(row).iter().map(required).collect()).collect(),
            labels: rows(&case["labels"]).iter().flat_map(indices).collect(),
            weight: weights(AggMode::TokenMean, &lengths, &mask, 1.0),
            mask,
            lengths,
            temperature: required(&case["temperature"]),
        }
    }

    fn plain(&self) -> Results {
        let all: Vec<Distribution> =
            self.logits.iter().map(|row| Distribution::new(row, self.temperature)).collect();
        let scaled =
            |d: &Distribution, w: f64| d.entropy_gradient().iter().map(|g| g * w).collect();
        Results {
            entropy: all.iter().map(|d| d.entropy).collect(),
            log_prob: all.iter().zip(&self.labels).map(|(d, l)| d.log_probs[*l]).collect(),
            gradient: all.iter().zip(&self.weight).map(|(d, w)| scaled(d, *w)).collect(),
        }
    }

    fn kernels(&self, kernels: &Kernels) -> Results {
        let (count, size) = (self.logits.len(), self.logits[0].len());
        let mut unit = Matrix::zeros(Dtype::F32, size, size);
        for i in 0..size {
            let mut row = vec![0.0; size];
            row[i] = 1.0;
            unit.set_row(i, &row);
        }
        let flat: Vec<f32> = self.logits.iter().flatten().map(|z| *z as f32).collect();
        let mut hidden = Operand::new(Dtype::F32);
        kernels.operand(&flat, size, &mut hidden);
        let targets: Vec<u32> = self.labels.iter().map(|l| *l as u32).collect();
        let inv_temperature = (1.0 / self.temperature) as f32;
        let (mut stats, mut scratch) = (vec![TokenStats::default(); count], HeadScratch::default());
        kernels.head_forward(&hidden, &unit, &targets, inv_temperature, &mut stats, &mut scratch);
        let dentropy: Vec<f32> = self.weight.iter().map(|w| *w as f32).collect();
        let (mut dh, mut dw) = (vec![0.0; count * size], vec![0.0; size * size]);
        let io = HeadBackward {
            h: &hidden,
            w: &unit,
            targets: &targets,
            inv_temperature,
            stats: &stats,
            dlogp: &vec![0.0; count],
            dentropy: Some(&dentropy),
            dh: &mut dh,
            dw: &mut dw,
        };
        kernels.head_backward(io, &mut scratch);
        Results {
            entropy: stats.iter().map(|s| f64::from(s.entropy)).collect(),
            log_prob: stats.iter().map(|s| f64::from(s.log_prob)).collect(),
            gradient: dh
                .chunks(size)
                .map(|row| row.iter().map(|g| f64::from(*g)).collect())
                .collect(),
        }
    }
}

/// The kernels keep the logarithm of the sum of exponentials in f32, from which the backward pass takes
/// probabilities: at logits of 1024 its last bit is 1.2e-4, and probabilities are off by as large a
/// share as it is.
fn tolerance_of_sum(inputs: &Inputs, tolerance: Tolerance) -> f64 {
    let largest = inputs.logits.iter().flatten().fold(0.0f64, |m, z| m.max(z.abs()));
    let exact = tolerance.relative < SINGLE.relative || largest < 100.0;
    if exact { 0.0 } else { f64::from(f32::EPSILON) * largest / inputs.temperature }
}

fn compare(
    inputs: &Inputs,
    got: &Results,
    want: &Value,
    (tolerance, reduced, what): (Tolerance, Tolerance, &str),
) {
    let mean = |mode| {
        let w = weights(mode, &inputs.lengths, &inputs.mask, 1.0);
        reduce(&w, &got.entropy)
    };
    let columns = inputs.lengths[0];
    let by_row = |row: usize| {
        let tokens = row * columns..(row + 1) * columns;
        let w = weights(AggMode::TokenMean, &[columns], &inputs.mask[tokens.clone()], 1.0);
        reduce(&w, &got.entropy[tokens])
    };
    for (name, want) in want.as_object().unwrap() {
        let what = format!("{what}, {name}");
        match name.as_str() {
            "entropy" => close_tokens(&got.entropy, want, &inputs.mask, tolerance, &what),
            "label_logprob" => close_tokens(&got.log_prob, want, &inputs.mask, tolerance, &what),
            "token_mean" => close(mean(AggMode::TokenMean), required(want), reduced, &what),
            "seq_token_mean" => {
                let rows = want.as_array().unwrap().iter().enumerate();
                rows.for_each(|(row, want)| close(by_row(row), required(want), reduced, &what));
            }
            // A row without tokens counts there as one of entropy 0, and not at all here.
            "seq_mean_of_token_mean" => {
                let rows = inputs.lengths.len();
                let some = |row: &usize| inputs.mask[row * columns..][..columns].contains(&true);
                let share = (0..rows).filter(some).count() as f64 / rows as f64;
                let got = mean(AggMode::SeqMeanTokenMean) * share;
                close(got, required(want), reduced, &what);
            }
            "grad_token_mean_wrt_logits" => {
                let wanted = rows(want).iter().flat_map(rows);
                let absolute = reduced.absolute + tolerance_of_sum(inputs, tolerance);
                let reduced = Tolerance { absolute, ..reduced };
                for (i, (got, want)) in got.gradient.iter().zip(wanted).enumerate() {
                    for (got, want) in got.iter().zip(rows(want)) {
                        close(*got, required(want), reduced, &format!("{what}, token {i}"));
                    }
                }
            }
            other => panic!("unknown result {other}"),
        }
    }
}
