//! `math_dapo.json`.

use trainer::verifier::{Verifier, normalize_final_answer, strict_box};

use crate::common::{cases, required};

#[test]
fn math_dapo() {
    for case in cases("math_dapo.json") {
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
