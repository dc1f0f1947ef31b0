//! `grpo_advantage.json`, `extra_advantages.json`.

use serde_json::Value;
use trainer::advantage::{Estimator, Outcomes, Scale, estimate, gae, grpo};

use crate::common::{
    REDUCED, SINGLE, TOKEN, Tolerance, close, close_tokens, indices, known, mask, matrix, numbers,
    required, rounded, rows,
};

const GRPO_FIELDS: [&str; 9] = [
    "name",
    "token_level_rewards",
    "response_mask",
    "group_index",
    "norm_by_std",
    "epsilon",
    "expected",
    "note",
    "fp_sensitive",
];

pub(crate) fn grpo_advantages(cases: &[Value]) {
    for case in cases {
        known(case, &GRPO_FIELDS);
        let name = case["name"].as_str().unwrap();
        let expected = &case["expected"];
        let columns = rows(&case["response_mask"])[0].as_array().unwrap().len();
        let sums: Vec<f64> =
            matrix(&case["token_level_rewards"]).chunks(columns).map(|r| r.iter().sum()).collect();
        let flat = |v: &Value| -> Vec<f64> { v.as_array().unwrap().iter().map(required).collect() };
        for (got, want) in sums.iter().zip(flat(&expected["scores"])) {
            close(*got, want, TOKEN, name);
        }
        let groups: Vec<usize> = flat(&case["group_index"]).iter().map(|g| *g as usize).collect();
        let scale =
            if case["norm_by_std"].as_bool().unwrap() { Scale::GroupStd } else { Scale::None };
        let epsilon = required(&case["epsilon"]);
        let got = grpo(&sums, &groups, scale, epsilon).unwrap();
        let sensitive = case["fp_sensitive"] == true;
        let tolerance = if sensitive { REDUCED } else { TOKEN };
        for (got, want) in got.values.iter().zip(flat(&expected["advantage_per_sequence"])) {
            close(*got, want, tolerance, name);
        }
        let mask = mask(&case["response_mask"]);
        let per_token: Vec<f64> =
            (0..mask.len()).map(|i| got.values[i / columns] * f64::from(mask[i])).collect();
        close_tokens(&per_token, &expected["advantages"], &vec![true; mask.len()], tolerance, name);
        let rounded: Vec<f64> = per_token.iter().map(|a| f64::from(*a as f32)).collect();
        close_tokens(&rounded, &expected["advantages"], &mask, SINGLE, name);
    }
}

const OTHER_FIELDS: [&str; 9] = [
    "name",
    "token_level_rewards",
    "response_mask",
    "group_index",
    "reward_baselines",
    "values",
    "gamma",
    "lam",
    "expected",
];

/// The whitened estimators have +1e-8 in the denominators of their means.
pub(crate) fn other_estimators(cases: &[Value]) {
    for case in cases {
        known(case, &OTHER_FIELDS);
        let valid = mask(&case["response_mask"]);
        let columns = valid.len() / rows(&case["response_mask"]).len();
        let flat = |key: &str| -> Vec<f64> {
            let all = matrix(&case[key]);
            all.iter().zip(&valid).filter(|(_, m)| **m).map(|(v, _)| *v).collect()
        };
        let lengths: Vec<usize> =
            valid.chunks(columns).map(|row| row.iter().filter(|m| **m).count()).collect();
        let token_rewards = flat("token_level_rewards");
        let outcomes = Outcomes {
            scores: &vec![0.0; lengths.len()],
            groups: &indices(&case["group_index"]),
            lengths: &lengths,
            baselines: &numbers(&case["reward_baselines"]),
            token_rewards: &token_rewards,
        };
        let padded = |tokens: &[f64]| -> Vec<f64> {
            let mut tokens = tokens.iter();
            valid.iter().map(|m| if *m { *tokens.next().unwrap() } else { 0.0 }).collect()
        };
        let compare = |got: &[f64], name: &str, tolerance: Tolerance| {
            let (got, want) = (padded(got), &case["expected"][name]);
            let what = format!("{}, {name}", case["name"]);
            close_tokens(&got, want, &valid, tolerance, &what);
            close_tokens(&rounded(&got), want, &valid, SINGLE, &what);
        };
        let expected = case["expected"].as_object().unwrap();
        for name in expected.keys() {
            let of = |estimator| estimate(estimator, &outcomes).unwrap().tokens;
            let discount = [required(&case["gamma"]), required(&case["lam"])];
            let gae = || gae(&token_rewards, &flat("values"), &lengths, discount);
            match name.as_str() {
                "rloo" => compare(&of(Estimator::Rloo), name, TOKEN),
                "opo" => compare(&of(Estimator::Opo), name, TOKEN),
                "remax" => compare(&of(Estimator::Remax), name, TOKEN),
                "reinforce_plus_plus" => compare(&of(Estimator::ReinforcePp), name, REDUCED),
                "reinforce_plus_plus_baseline" => {
                    compare(&of(Estimator::ReinforcePpBaseline), name, REDUCED);
                }
                // ReMax without a baseline.
                "reinforce_plus_plus_returns" => {
                    let baselines = vec![0.0; lengths.len()];
                    let plain = Outcomes { baselines: &baselines, ..outcomes };
                    let got = estimate(Estimator::Remax, &plain).unwrap().tokens;
                    compare(&got, name, TOKEN);
                }
                "gae" => compare(&gae().0, name, REDUCED),
                "gae_returns" => compare(&gae().1, name, TOKEN),
                other => panic!("unknown estimator {other}"),
            }
        }
    }
}
