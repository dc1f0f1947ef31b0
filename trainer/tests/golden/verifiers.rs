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

/// The reference asks a computer algebra system; at least 95 % of its verdicts have to be ours, and
/// nothing that it calls wrong may be right here.
pub(crate) fn prime_math(list: &[Value]) {
    let (mut agreed, mut all) = (0, 0);
    for case in list {
        let text = |key: &str| case[key].as_str().unwrap();
        let what = format!("case {}, {}", case["id"], case["tag"]);
        let want = &case["expected"];
        let got = Verifier::PrimeMath.judge(text("model_response"), text("ground_truth"));
        let score = required(&want["score"]);
        assert!(got.score <= score, "{what}: a false positive");
        assert_eq!(got.predicted, want["extracted"].as_str().unwrap_or(""), "{what}");
        all += 1;
        agreed += usize::from(got.score == score);
        if got.score != score {
            println!("{what}: {} here, {score} in the reference", got.score);
        }
    }
    println!("{agreed} of {all} verdicts agree");
    assert!(all >= 59 && agreed * 100 >= all * 95, "{agreed} of {all}");
}
