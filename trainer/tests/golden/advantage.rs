//! `grpo_advantage.json`.

use serde_json::Value;
use trainer::advantage::{Scale, grpo};

use crate::common::{
    REDUCED, SINGLE, TOKEN, cases, close, close_tokens, mask, matrix, required, rows,
};

#[test]
fn grpo_advantages() {
    for case in cases("grpo_advantage.json") {
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
