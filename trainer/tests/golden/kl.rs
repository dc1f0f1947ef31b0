//! `kl_estimators.json`.

use serde_json::Value;
use trainer::agg::{AggMode, reduce, weights};
use trainer::kl::KlEstimator;

use crate::common::{
    REDUCED, SINGLE, TOKEN, close, close_tokens, known, lengths, mask, matrix, required,
};

pub(crate) fn kl_estimators(cases: &[Value]) {
    for case in cases {
        known(case, &["name", "log_prob", "ref_log_prob", "mask", "expected", "note"]);
        let (log_prob, reference) = (matrix(&case["log_prob"]), matrix(&case["ref_log_prob"]));
        let mask = mask(&case["mask"]);
        let expected = case["expected"].as_object().unwrap();
        assert_eq!(expected.len(), 6, "{}", case["name"]);
        for (name, want) in expected {
            let estimator: KlEstimator = match name.as_str() {
                "k3_verl" | "k3_prime_rl" => "k3".parse().unwrap(),
                "k3+_intended" => "k3+".parse().unwrap(),
                other => other.parse().unwrap(),
            };
            known(want, &["value", "grad_logprob", "token_mean"]);
            let what = format!("{}, {name}", case["name"]);
            let both: Vec<(f64, f64)> =
                log_prob.iter().zip(&reference).map(|(l, r)| estimator.evaluate(*l, *r)).collect();
            let (values, grads): (Vec<f64>, Vec<f64>) = both.into_iter().unzip();
            let all = vec![true; mask.len()];
            close_tokens(&values, &want["value"], &all, TOKEN, &what);
            close_tokens(&grads, &want["grad_logprob"], &all, TOKEN, &what);
            let single = |v: &[f64]| v.iter().map(|v| f64::from(*v as f32)).collect::<Vec<_>>();
            close_tokens(&single(&values), &want["value"], &all, SINGLE, &what);
            close_tokens(&single(&grads), &want["grad_logprob"], &all, SINGLE, &what);
            if want.get("token_mean").is_some() {
                let w = weights(AggMode::TokenMean, &lengths(&case["mask"]), &mask, 1.0);
                close(reduce(&w, &values), required(&want["token_mean"]), REDUCED, &what);
            }
        }
    }
}
