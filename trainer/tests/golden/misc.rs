//! `extra_misc.json`: shaping, dynamic sampling, the entropy law, covariance statistics.

use serde_json::Value;
use trainer::advantage::has_signal;
use trainer::covariance::{CovStats, token_covariances, top_mean};
use trainer::filter::{GroupFilter, Next};
use trainer::fit::Fit;
use trainer::shaping::overlong_penalty;

use crate::common::{
    REDUCED, SINGLE, TOKEN, close, indices, known, mask, matrix, numbers, required, rounded,
};

pub(crate) fn kinds(cases: &[Value]) {
    for case in cases {
        match case["kind"].as_str().unwrap() {
            "overlong" => overlong(case),
            "filter_groups" => filter_groups(case),
            "entropy_fit" => entropy_fit(case),
            "cov_stats" => cov_stats(case),
            other => panic!("{}: unknown kind {other}", case["name"]),
        }
    }
}

fn overlong(case: &Value) {
    known(
        case,
        &["name", "kind", "max_resp_len", "buffer_len", "penalty_factor", "lengths", "expected"],
    );
    let count = |key: &str| required(&case[key]) as usize;
    let factor = required(&case["penalty_factor"]);
    for (length, want) in indices(&case["lengths"]).iter().zip(numbers(&case["expected"])) {
        let got = overlong_penalty(*length, count("max_resp_len"), count("buffer_len"), factor);
        close(got, want, TOKEN, &format!("{}, {length} tokens", case["name"]));
        close(f64::from(got as f32), want, SINGLE, &format!("{}, {length} tokens", case["name"]));
    }
}

fn filter_groups(case: &Value) {
    known(
        case,
        &[
            "name",
            "kind",
            "train_batch_size",
            "n",
            "max_num_gen_batches",
            "gen_batches",
            "expected",
        ],
    );
    let want = &case["expected"];
    known(want, &["status", "num_gen_batches", "kept_uids_before_truncation", "train_uids"]);
    let count = |key: &str| required(&case[key]) as usize;
    let mut filter =
        GroupFilter::new(count("train_batch_size"), count("max_num_gen_batches"), vec![]);
    let mut batches = case["gen_batches"].as_array().unwrap().iter();
    let status = loop {
        match filter.next() {
            Next::Train => break "ok",
            Next::Short => break "error_generated_too_many",
            Next::Generate => {}
        }
        let Some(batch) = batches.next() else { break "exhausted_input" };
        filter.offer(batch.as_array().unwrap().iter().map(|group| {
            known(group, &["uid", "acc"]);
            let right = group["acc"].as_array().unwrap().iter();
            let rewards: Vec<f64> = right.map(|acc| f64::from(acc.as_bool().unwrap())).collect();
            assert_eq!(rewards.len(), count("n"));
            (required(&group["uid"]) as usize, has_signal(&rewards))
        }));
    };
    let what = &case["name"];
    assert_eq!(status, want["status"], "{what}");
    assert_eq!(filter.batches() as f64, required(&want["num_gen_batches"]), "{what}");
    assert_eq!(filter.kept(), indices(&want["kept_uids_before_truncation"]), "{what}");
    if status == "ok" {
        assert_eq!(filter.take(), indices(&want["train_uids"]), "{what}");
    } else {
        assert!(want["train_uids"].is_null(), "{what}");
    }
}

fn entropy_fit(case: &Value) {
    known(case, &["name", "kind", "H", "R", "expected", "note"]);
    let want = &case["expected"];
    known(want, &["a", "b", "rmse", "ceiling_at_H0"]);
    let what = case["name"].as_str().unwrap();
    let points: Vec<(f64, f64)> =
        numbers(&case["H"]).into_iter().zip(numbers(&case["R"])).collect();
    let fit = Fit::new(&points).unwrap();
    close(fit.a.value, required(&want["a"]), TOKEN, what);
    close(fit.b.value, required(&want["b"]), TOKEN, what);
    close(fit.ceiling().value, required(&want["ceiling_at_H0"]), TOKEN, what);
    close(fit.rmse, required(&want["rmse"]), REDUCED, what);
    assert!((0.99..=1.0).contains(&fit.r2), "{what}: {}", fit.r2);
}

fn cov_stats(case: &Value) {
    known(case, &["name", "kind", "log_prob", "advantages", "response_mask", "expected", "note"]);
    let what = case["name"].as_str().unwrap();
    let mask = mask(&case["response_mask"]);
    let (log_prob, advantage) = (matrix(&case["log_prob"]), matrix(&case["advantages"]));
    let all = 0..mask.len();
    let cov = token_covariances(&log_prob, &advantage, &mask, std::slice::from_ref(&all));
    for (cov, tolerance) in [(cov.clone(), TOKEN), (rounded(&cov), SINGLE)] {
        let stats = CovStats::new(&cov).unwrap();
        let mut sorted: Vec<f64> = cov.into_iter().filter(|c| c.is_finite()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for (name, want) in case["expected"].as_object().unwrap() {
            let got = match name.as_str() {
                "mean" => stats.mean,
                "std_biased" => stats.std,
                "max" => stats.max,
                "min" => stats.min,
                "mean_top_10pct" => top_mean(&sorted, 10.0),
                "mean_top_2pct" => top_mean(&sorted, 2.0),
                "frac_gt_1" => stats.share_above_1,
                other => panic!("unknown statistic {other}"),
            };
            close(got, required(want), tolerance, &format!("{what}, {name}"));
        }
    }
}
