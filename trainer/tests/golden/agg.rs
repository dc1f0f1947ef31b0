//! `agg_loss.json`: verl's values with global denominators, and 0 where verl divides 0 by 0.

use std::ops::Range;

use serde_json::{Value, from_value};
use trainer::agg::{AggMode, legacy_weights, reduce, weights};

use crate::common::{REDUCED, SINGLE, close, known, lengths, mask, matrix, required};

const FIELDS: [&str; 9] = [
    "name",
    "loss_mat",
    "loss_mask",
    "expected",
    "note",
    "microbatches",
    "microbatch_expected",
    "loss_scale_factor",
    "expected_scaled",
];

pub(crate) fn aggregation_modes(cases: &[Value]) {
    for case in cases {
        known(case, &FIELDS);
        known(&case["expected"], &["prime_rl", "verl"]);
        let name = case["name"].as_str().unwrap();
        let (mask, lengths) = (mask(&case["loss_mask"]), lengths(&case["loss_mask"]));
        let losses = matrix(&case["loss_mat"]);
        let columns = lengths[0] as f64;
        let verl = case["expected"]["verl"].as_object().unwrap();
        assert_eq!(verl.len(), 4, "{name}");
        for (mode_name, want) in verl {
            let mode: AggMode = from_value(Value::from(mode_name.as_str())).unwrap();
            let w = weights(mode, &lengths, &mask, columns);
            let want = if name == "all_masked" { 0.0 } else { required(want) };
            let what = format!("{name}, {mode_name}");
            close(reduce(&w, &losses), want, REDUCED, &what);
            let rounded: Vec<f64> = w.iter().map(|w| f64::from(*w as f32)).collect();
            close(reduce(&rounded, &losses), want, SINGLE, &what);
            // A fully masked row makes the original's mean over rows differ or NaN: not compared.
            let original = required(&case["expected"]["prime_rl"][mode_name]);
            if original.is_finite() && name != "one_fully_masked_row" {
                close(reduce(&w, &losses), original, REDUCED, &what);
            }
        }
        if let Some(scale) = case.get("loss_scale_factor") {
            let w = weights(AggMode::SeqMeanTokenSumNorm, &lengths, &mask, required(scale));
            close(reduce(&w, &losses), required(&case["expected_scaled"]), REDUCED, name);
        }
        if let Some(by_mode) = case.get("microbatch_expected") {
            micro_batches(case, by_mode, &losses);
        }
    }
}

/// The sum over micro-batches, each with the weights of the whole, is the whole; with weights of their
/// own it is what the references optimise.
fn micro_batches(case: &Value, by_mode: &Value, losses: &[f64]) {
    let (mask, lengths) = (mask(&case["loss_mask"]), lengths(&case["loss_mask"]));
    let columns = lengths[0];
    let batches: Vec<Vec<usize>> = from_value(case["microbatches"].clone()).unwrap();
    for (mode_name, values) in by_mode.as_object().unwrap() {
        let mode: AggMode = from_value(Value::from(mode_name.as_str())).unwrap();
        let w = weights(mode, &lengths, &mask, columns as f64);
        let rows = batches.iter().flatten().map(|row| row * columns..(row + 1) * columns);
        let sum: f64 = rows.map(|row| reduce(&w[row.clone()], &losses[row])).sum();
        close(sum, required(&values["global_correct"]), REDUCED, mode_name);
        known(values, &["global_correct", "legacy_dynamic_bsz"]);
        let neighbours: Vec<Range<usize>> =
            batches.iter().map(|rows| rows[0]..rows[rows.len() - 1] + 1).collect();
        let w = legacy_weights((mode, columns as f64), &lengths, &mask, &neighbours);
        close(reduce(&w, losses), required(&values["legacy_dynamic_bsz"]), REDUCED, mode_name);
        let single: Vec<f64> = w.iter().map(|w| f64::from(*w as f32)).collect();
        let legacy = required(&values["legacy_dynamic_bsz"]);
        close(reduce(&single, losses), legacy, SINGLE, mode_name);
    }
}
