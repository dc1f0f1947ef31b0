//! The examples of the library run, and do what they say.
#![allow(clippy::unwrap_used)]

#[path = "../examples/own_algorithm.rs"]
#[allow(dead_code, reason = "an example's main is not called here")]
mod own_algorithm;
#[path = "../examples/own_data.rs"]
#[allow(dead_code, reason = "an example's main is not called here")]
mod own_data;
#[path = "../examples/own_reward.rs"]
#[allow(dead_code, reason = "an example's main is not called here")]
mod own_reward;

#[test]
fn a_reward_of_ones_own_is_what_is_trained_by() {
    let rewards = own_reward::train().unwrap();
    assert_eq!(rewards.len(), 8);
    assert!(rewards.iter().all(|reward| (0.3..1.0).contains(reward)), "{rewards:?}");
    assert!(rewards[7] > rewards[0], "{rewards:?}");
}

#[test]
fn rows_of_ones_own_are_learned_and_the_model_is_written() {
    let dir = std::env::temp_dir().join(format!("trainer-own-data-{}", std::process::id()));
    let [before, after] = own_data::train(&dir).unwrap();
    assert!(after > before, "{before} before, {after} after");
    let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
    assert!(config.contains("hidden_size") && dir.join("model.safetensors").is_file());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_algorithm_of_ones_own_learns_on_policy_first() {
    let steps = own_algorithm::train().unwrap();
    assert_eq!(steps.len(), 8);
    for metrics in &steps {
        let get = |name: &str| metrics.get(name).unwrap();
        assert_eq!((get("mismatch/tokens_ne"), get("actor/updates")), (0.0, 8.0));
        // Its penalty acts on every token once the ratio has moved, and nothing is clipped.
        assert!(get("actor/touched_tokens") > 0.5 * get("actor/valid_tokens"));
        assert_eq!(get("actor/pg_clipfrac"), 0.0);
        // Of binary rewards the median is 0, 0.5 or 1.
        assert!((-1.0..=1.0).contains(&get("critic/advantages/min")));
    }
}
