//! `extra_policy_losses_tis.json`: weights of truncated importance sampling and their statistics.

use serde_json::Value;
use trainer::correction::{CorrectionStats, Level, Norm, Truncation, importance_weights};

use crate::common::{
    REDUCED, SINGLE, TOKEN, close, close_tokens, known, lengths, mask, matrix, required, rounded,
    row_ranges, single,
};

pub(crate) fn weights(case: &Value) {
    let (old, sampled) = (matrix(&case["old_log_prob"]), matrix(&case["rollout_log_prob"]));
    let mask = mask(&case["response_mask"]);
    let responses = row_ranges(&lengths(&case["response_mask"]));
    let threshold = required(&case["rollout_is_threshold"]);
    for (name, want) in case["tis"].as_object().unwrap() {
        let (level, norm) = match name.as_str() {
            "token" => (Level::Token, Norm::None),
            "token_batchnorm" => (Level::Token, Norm::Batch),
            "sequence" => (Level::Sequence, Norm::None),
            "sequence_batchnorm" => (Level::Sequence, Norm::Batch),
            other => panic!("unknown correction {other}"),
        };
        known(want, &["weights", "metrics"]);
        let what = format!("{}, {name}", case["name"]);
        let how = Truncation { level, threshold, norm };
        let got = importance_weights(&old, &sampled, &mask, &responses, how);
        // The means that weights are divided by carry +1e-8.
        let tolerance = if norm == Norm::None { TOKEN } else { REDUCED };
        let all = vec![true; mask.len()];
        close_tokens(&got.weights, &want["weights"], &all, tolerance, &what);
        let f32s =
            importance_weights(&single(&old), &single(&sampled), &mask, &responses, how).weights;
        close_tokens(&rounded(&f32s), &want["weights"], &all, SINGLE, &what);
        for (metric, value) in want["metrics"].as_object().unwrap() {
            let got = statistic(&got.stats, metric);
            close(got, required(value), REDUCED, &format!("{what}, {metric}"));
        }
    }
}

fn statistic(stats: &CorrectionStats, metric: &str) -> f64 {
    match metric.strip_prefix("rollout_is_").unwrap_or(metric) {
        "mean" => stats.mean,
        "max" => stats.max,
        "min" => stats.min,
        "std" => stats.std,
        "eff_sample_size" => stats.effective_sample_size,
        "ratio_fraction_high" => stats.fraction_high,
        "ratio_fraction_low" => stats.fraction_low,
        "seq_mean" => stats.seq_mean,
        "seq_std" => stats.seq_std,
        "seq_max" => stats.seq_max,
        "seq_min" => stats.seq_min,
        "seq_max_deviation" => stats.seq_max_deviation,
        "seq_fraction_high" => stats.seq_fraction_high,
        "seq_fraction_low" => stats.seq_fraction_low,
        "batch_norm_factor" => stats.batch_norm_factor,
        _ => panic!("unknown metric {metric}"),
    }
}
