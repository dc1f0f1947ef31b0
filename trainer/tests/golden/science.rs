//! `extra_misc.json`, the kinds about entropy: statistics of token covariances, and the fit of reward.

use serde_json::Value;
use trainer::covariance::{CovStats, token_covariances, top_mean};
use trainer::fit::{Fit, Point};

use crate::common::{REDUCED, TOKEN, cases, close, mask, matrix, required};

fn of_kind(kind: &str) -> Vec<Value> {
    let cases: Vec<Value> =
        cases("extra_misc.json").into_iter().filter(|c| c["kind"] == kind).collect();
    assert!(!cases.is_empty(), "{kind}");
    cases
}

#[test]
fn statistics_of_covariances() {
    for case in of_kind("cov_stats") {
        let name = case["name"].as_str().unwrap();
        let mask = mask(&case["response_mask"]);
        let (log_prob, advantage) = (matrix(&case["log_prob"]), matrix(&case["advantages"]));
        let scope = 0..mask.len();
        let covariances =
            token_covariances(&log_prob, &advantage, &mask, std::slice::from_ref(&scope));
        let stats = CovStats::new(&covariances).unwrap();
        let mut sorted: Vec<f64> = covariances.into_iter().filter(|c| c.is_finite()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        let above = sorted.iter().filter(|c| **c > 1.0).count() as f64 / sorted.len() as f64;
        for (key, got) in [
            ("mean", stats.mean),
            ("std_biased", stats.std),
            ("max", stats.max),
            ("min", stats.min),
            ("mean_top_10pct", top_mean(&sorted, 10.0)),
            ("mean_top_2pct", stats.top_means[2]),
            ("frac_gt_1", above),
        ] {
            close(got, required(&case["expected"][key]), TOKEN, &format!("{name}, {key}"));
        }
    }
}

#[test]
fn fits_of_reward_against_entropy() {
    for case in of_kind("entropy_fit") {
        let name = case["name"].as_str().unwrap();
        let list = |key: &str| -> Vec<f64> {
            case[key].as_array().unwrap().iter().map(required).collect()
        };
        let points: Vec<Point> = list("H").into_iter().zip(list("R")).collect();
        let fit = Fit::new(&points).unwrap();
        for (key, got) in [
            ("a", fit.a.value),
            ("b", fit.b.value),
            ("rmse", fit.rmse),
            ("ceiling_at_H0", fit.ceiling().value),
        ] {
            close(got, required(&case["expected"][key]), REDUCED, &format!("{name}, {key}"));
        }
    }
}
