//! Every method takes steps on the embedded policy, and settings and inputs at their edges have defined
//! results.
#![allow(clippy::unwrap_used)]

use engine::model::hub::Builtin;
use engine::model::open_builtin;
use engine::{Engine, EngineConfig};
use trainer::config::Method;
use trainer::metrics::Metrics;
use trainer::samples::Sample;
use trainer::{ErrorKind, RlConfig, Rows, Trainer, train_rows};

/// Small sizes, under which a method is run.
const SMALL: [(&str, &str); 6] = [
    ("data.train_batch_size", "4"),
    ("data.max_prompt_length", "32"),
    ("data.max_response_length", "8"),
    ("rollout.n", "4"),
    ("algorithm.mini_batch_size", "2"),
    ("data.prompt_template", "chat"),
];

fn engine() -> Engine {
    let config = EngineConfig {
        threads: Some(1),
        kv_cache_memory_bytes: Some(8 << 20),
        max_model_len: Some(64),
        ..EngineConfig::default()
    };
    Engine::load(&open_builtin(Builtin::Arith).unwrap(), &config).unwrap()
}

/// The first few tasks: a trainer looks at all its rows when it is made.
fn rows() -> Rows {
    let mut rows = train_rows(&config("grpo", &[]).data).unwrap();
    rows.rows.truncate(64);
    rows
}

fn config(method: &str, pairs: &[(&str, &str)]) -> RlConfig {
    let set: Vec<(String, String)> =
        SMALL.iter().chain(pairs).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    RlConfig::resolve(Some(method), None, &set).unwrap()
}

fn trainer(method: &str, pairs: &[(&str, &str)]) -> Trainer {
    let config = config(method, pairs);
    let reference = config.algorithm.needs_reference();
    let mut trainer = Trainer::new(engine(), config, rows()).unwrap();
    if reference {
        trainer.set_reference(engine().into_decoder()).unwrap();
    }
    trainer
}

fn steps(method: &str, pairs: &[(&str, &str)], count: usize) -> Vec<(Metrics, Vec<Sample>)> {
    let mut trainer = trainer(method, pairs);
    (0..count).map(|_| trainer.step().unwrap()).collect()
}

fn get(metrics: &Metrics, name: &str) -> f64 {
    metrics.get(name).unwrap_or_else(|| panic!("no metric {name}"))
}

fn all_finite(metrics: &Metrics) -> bool {
    metrics.iter().all(|(_, value)| value.is_finite())
}

#[test]
fn every_method_learns_and_its_first_update_is_on_policy() {
    for method in Method::ALL {
        let fast = [
            ("optimizer.lr", "1e-3"),
            ("optimizer.lr_warmup_steps", "0"),
            ("algorithm.gen_batch_size", "8"),
            // The tasks have no boxed answers, which the scripts' presets judge by.
            ("reward.function", "exact"),
        ];
        for (metrics, samples) in steps(method.name(), &fast, 2) {
            let name = method.name();
            assert!(all_finite(&metrics), "{name}: {}", metrics.to_json());
            assert_eq!(get(&metrics, "mismatch/tokens_ne"), 0.0, "{name}");
            assert!(get(&metrics, "actor/updates") >= 1.0, "{name}");
            assert!(get(&metrics, "actor/valid_tokens") > 0.0, "{name}");
            assert!(get(&metrics, "actor/ppo_kl_abs") > 0.0, "{name}: a second update moves on");
            assert!(!samples.is_empty() && samples.iter().all(|s| s.advantage.is_finite()));
        }
    }
}

#[test]
fn the_reference_is_the_policy_at_the_start() {
    let pairs = [
        ("algorithm.use_kl_loss", "true"),
        ("algorithm.use_kl_in_reward", "true"),
        ("algorithm.kl_ctrl.type", "adaptive"),
        ("algorithm.kl_penalty", "k3"),
        ("optimizer.lr", "1e-3"),
    ];
    let steps = steps("reinforce_pp", &pairs, 2);
    let [(first, _), (second, _)] = &steps[..] else { panic!() };
    assert_eq!(get(first, "actor/reward_kl_penalty"), 0.0, "no divergence before the first update");
    let penalty = get(second, "actor/reward_kl_penalty");
    assert!(penalty > 0.0);
    let charged = |m: &Metrics| get(m, "critic/score/mean") - get(m, "critic/rewards/mean");
    assert_eq!(charged(first), 0.0);
    let most = 1e-3 * penalty * get(second, "response_length/max");
    assert!(charged(second) > 0.0 && charged(second) <= most, "rewards are after the divergence");
    assert!(get(first, "actor/kl_loss") > 0.0, "the second update of the step sees one");
    let beta = get(second, "actor/reward_kl_penalty_coeff");
    assert!((beta - 1e-3 * (1.0 - 0.2 * 16.0 / 10_000.0)).abs() < 1e-12, "{beta}");
    let mut without = Trainer::new(engine(), config("grpo", &pairs[..1]), rows()).unwrap();
    let e = without.step().unwrap_err();
    assert_eq!(e.to_string(), "a divergence is asked for, and no reference policy is set");
}

#[test]
fn what_is_cut_off_can_be_masked_and_nothing_left_changes_nothing() {
    // One token is no answer and its end: all responses are cut off.
    let cut = [("data.max_response_length", "1"), ("algorithm.mask_truncated", "true")];
    let mut trainer = trainer("kl_cov", &cut);
    let before = trainer.engine().score(&[vec![1, 2, 3]], 1.0).unwrap();
    let (metrics, _) = trainer.step().unwrap();
    assert_eq!(get(&metrics, "response_length/clip_ratio"), 1.0);
    assert_eq!(get(&metrics, "train/masked_responses"), 16.0);
    assert_eq!((get(&metrics, "actor/valid_tokens"), get(&metrics, "actor/updates")), (0.0, 0.0));
    assert_eq!(get(&metrics, "actor/updates_skipped"), 2.0);
    assert!(all_finite(&metrics), "{}", metrics.to_json());
    let after = trainer.engine().score(&[vec![1, 2, 3]], 1.0).unwrap();
    assert_eq!(before[0].logprobs, after[0].logprobs);
}

#[test]
fn dynamic_sampling_keeps_what_is_over_and_says_what_to_change() {
    let pairs = [("algorithm.filter_groups", "true"), ("algorithm.gen_batch_size", "16")];
    let steps = steps("grpo", &pairs, 2);
    let [(first, sampled), (second, samples)] = &steps[..] else { panic!() };
    for metrics in [first, second] {
        assert_eq!(get(metrics, "train/frac_zero_variance_groups"), 0.0);
        assert_eq!(get(metrics, "train/groups_short"), 0.0);
    }
    let left = get(first, "train/groups_surplus");
    assert!(left >= 4.0, "16 groups carry signal often enough: {left}");
    assert_eq!(get(second, "train/num_gen_batches"), 0.0, "those left over are enough");
    let version = sampled[0].weights_version;
    assert!(
        samples.iter().all(|s| s.weights_version == version),
        "sampled before the first update"
    );
    assert_eq!(get(second, "mismatch/tokens_ne"), 0.0);

    let flat = [
        ("algorithm.filter_groups", "true"),
        ("algorithm.max_num_gen_batches", "2"),
        ("data.max_response_length", "1"),
        ("algorithm.filter_groups_metric", "score"),
        ("reward.function", "math_dapo"),
    ];
    let e = trainer("grpo", &flat).step().unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Reward(_)));
    let text = e.to_string();
    assert!(
        text.starts_with(
            "all 8 groups of 2 batches have equal rewards: set algorithm.filter_groups to"
        ),
        "{text}"
    );
    let acc = [&flat[..], &[("algorithm.filter_groups_metric", "acc")]].concat();
    let text = trainer("grpo", &acc).step().unwrap_err().to_string();
    assert!(
        text.starts_with(
            "all 8 groups of 2 batches are all right or all wrong: set algorithm.filter_groups_metric to score"
        ),
        "{text}"
    );
}

#[test]
fn equal_rewards_and_groups_of_one_have_defined_results() {
    let wrong = [("reward.function", "math_dapo"), ("optimizer.lr", "1e-3")];
    let (metrics, samples) = steps("grpo", &wrong, 1).remove(0);
    assert_eq!(get(&metrics, "train/frac_zero_variance_groups"), 1.0);
    assert!(samples.iter().all(|s| s.reward == -1.0 && s.advantage == 0.0));
    assert_eq!((get(&metrics, "actor/grad_norm"), get(&metrics, "actor/pg_loss")), (0.0, 0.0));
    let alone = [("rollout.n", "1"), ("reward.function", "math_dapo")];
    let (metrics, samples) = steps("rloo", &alone, 1).remove(0);
    assert_eq!(get(&metrics, "train/frac_zero_variance_groups"), 0.0);
    assert!(
        samples.iter().all(|s| s.advantage == -1.0),
        "a reward has nothing to be compared with"
    );
}

#[test]
fn truncated_sampling_can_be_corrected_and_long_responses_penalised() {
    let pairs = [
        ("rollout.top_k", "2"),
        ("algorithm.rollout_correction.rollout_is", "token"),
        ("algorithm.overlong_buffer.enable", "true"),
        ("algorithm.overlong_buffer.len", "7"),
    ];
    let (metrics, samples) = steps("grpo", &pairs, 1).remove(0);
    let mean = get(&metrics, "rollout_corr/rollout_is_mean");
    assert!(0.0 < mean && mean < 1.0, "the two likeliest are drawn too often: {mean}");
    assert_eq!(get(&metrics, "mismatch/tokens_ne"), 0.0);
    for sample in &samples {
        let penalty = (sample.token_ids.len() as f64 - 1.0) / 7.0;
        let verdict = f64::from(u8::from(sample.correct));
        assert!((sample.reward - (verdict - penalty)).abs() < 1e-12, "{sample:?}");
    }
    assert!(get(&metrics, "reward/overlong_responses") > 0.0);
    // Whatever has a token is too long for this buffer; greedy responses are only compared with.
    let all =
        [("algorithm.overlong_buffer.enable", "true"), ("algorithm.overlong_buffer.len", "8")];
    let (metrics, samples) = steps("remax", &all, 1).remove(0);
    assert_eq!(get(&metrics, "reward/overlong_responses"), samples.len() as f64);
}
