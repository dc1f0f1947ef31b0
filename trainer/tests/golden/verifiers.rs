//! `math_dapo.json`, `prime_math.json`.

use serde_json::Value;
use trainer::verifier::{Verifier, normalize_final_answer, strict_box};

use crate::common::{known, required};

pub(crate) fn math_dapo(cases: &[Value]) {
    for case in cases {
        known(case, &["id", "tag", "solution_str", "ground_truth", "expected", "strict_box"]);
        let text = |key: &str| case[key].as_str().unwrap();
        let (response, truth) = (text("solution_str"), text("ground_truth"));
        let what = format!("case {}, {}", case["id"], case["tag"]);
        let want = &case["expected"];
        let got = Verifier::MathDapo.judge(response, truth);
        assert_eq!(got.score, required(&want["score"]), "{what}");
        assert_eq!(got.correct, want["acc"].as_bool().unwrap(), "{what}");
        assert_eq!(got.predicted, want["pred"].as_str().unwrap(), "{what}");
        assert_eq!(normalize_final_answer(truth), want["normalized_ground_truth"], "{what}");
        assert_eq!(
            normalize_final_answer(want["extracted"].as_str().unwrap()),
            got.predicted,
            "{what}"
        );
        let (want, got) = (&case["strict_box"], strict_box(response, truth));
        assert_eq!(got.score, required(&want["score"]), "{what}, strict");
        assert_eq!(got.correct, want["acc"].as_bool().unwrap(), "{what}, strict");
        assert_eq!(got.predicted.as_deref(), want["pred"].as_str(), "{what}, strict");
    }
}

/// Only the shape of the cases: there is no verifier of this name yet.
pub(crate) fn prime_math(cases: &[Value]) {
    for case in cases {
        known(case, &["id", "tag", "model_response", "ground_truth", "expected"]);
        let want = &case["expected"];
        known(want, &["score", "format_score", "acc", "acc_fast", "extracted", "stages"]);
        assert!(case["model_response"].is_string() && case["ground_truth"].is_string());
        assert!([0.0, 1.0].contains(&required(&want["score"])));
    }
}
