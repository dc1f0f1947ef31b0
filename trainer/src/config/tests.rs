//! Resolution, presets, limits and messages.

use super::*;
use crate::agg::{AggMode, AggScope};
use crate::error::ErrorKind;
use crate::loss::PolicyLoss;

fn set(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
}

fn with(pairs: &[(&str, &str)]) -> Result<RlConfig> {
    RlConfig::resolve(None, None, &set(pairs))
}

fn error(pairs: &[(&str, &str)]) -> String {
    let e = with(pairs).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Config(_)));
    e.to_string()
}

#[test]
fn presets_are_the_papers() {
    let clip = |method: &str| {
        let config = RlConfig::resolve(Some(method), None, &[]).unwrap();
        assert_eq!(config.updates_per_step(), 8, "{method}");
        assert!(config.warnings().is_empty(), "{method}: {:?}", config.warnings());
        config.algorithm
    };
    let (grpo, higher) = (clip("grpo"), clip("clip_higher"));
    assert_eq!((grpo.clip_ratio_low, grpo.clip_ratio_high, grpo.clip_ratio_c), (0.2, 0.2, 3.0));
    assert_eq!((higher.clip_ratio_low, higher.clip_ratio_high), (0.2, 0.28));
    let PolicyLoss::ClipCov(c) = clip("clip_cov").policy_loss() else { panic!() };
    assert_eq!((c.range.low, c.range.high, c.ratio), (1.0, 1.0, 2e-4));
    assert_eq!((c.lower, c.upper, c.log_ratio_clamp), (1.0, 5.0, Some(20.0)));
    let PolicyLoss::KlCov(k) = clip("kl_cov").policy_loss() else { panic!() };
    assert_eq!((k.ratio, k.coef), (2e-3, 1.0));
}

#[test]
fn dynamic_sampling_without_a_limit_is_warned_of() {
    let pairs = [("algorithm.filter_groups", "true"), ("algorithm.max_num_gen_batches", "0")];
    let warnings = with(&pairs).unwrap().warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].starts_with("algorithm.max_num_gen_batches is 0: "), "{warnings:?}");
}

#[test]
fn every_method_resolves_reads_back_and_warns_of_nothing() {
    for method in Method::ALL {
        let config = RlConfig::resolve(Some(method.name()), None, &[]).unwrap();
        assert_eq!(config.updates_per_step(), 8, "{method:?}");
        assert!(config.warnings().is_empty(), "{method:?}: {:?}", config.warnings());
        assert_eq!(RlConfig::resolve(None, Some(&config.to_toml()), &[]).unwrap(), config);
        assert_eq!(Method::parse(method.name()).unwrap(), method);
    }
}

#[test]
fn the_scripts_presets_have_their_values() {
    let resolve = |name| RlConfig::resolve(Some(name), None, &[]).unwrap();
    for (name, ratio, lr, tokens, gen_batch) in [
        ("paper-7b", 2e-3, 5e-7, 30_720, 0),
        ("paper-32b", 2e-4, 1e-6, 20_480, 0),
        ("verl", 2e-3, 1e-6, 30_720, 768),
    ] {
        let c = resolve(name);
        let PolicyLoss::KlCov(k) = c.algorithm.policy_loss() else { panic!() };
        assert_eq!((k.ratio, k.coef, k.log_ratio_clamp), (ratio, 1.0, None), "{name}");
        assert_eq!((c.optimizer.lr, c.optimizer.weight_decay), (lr, 0.0), "{name}");
        assert_eq!(
            (c.trainer.max_tokens_per_microbatch, c.algorithm.gen_batch_size),
            (tokens, gen_batch)
        );
        assert_eq!(
            (c.data.train_batch_size, c.algorithm.mini_batch_size, c.rollout.n),
            (256, 32, 8)
        );
        assert_eq!((c.data.max_prompt_length, c.data.max_response_length), (2048, 8192));
        assert_eq!(c.reward.function, "prime_math");
        assert_eq!(
            (c.algorithm.agg_scope, c.algorithm.cov_scope),
            (AggScope::Legacy, CovScope::Microbatch)
        );
        assert!(c.algorithm.filter_groups && !c.algorithm.overlong_buffer.enable);
    }
    let dapo = resolve("dapo");
    let PolicyLoss::Clip(clip) = dapo.algorithm.policy_loss() else { panic!() };
    assert_eq!((clip.range.low, clip.range.high, clip.dual), (0.2, 0.28, Some(10.0)));
    assert!(dapo.algorithm.filter_groups && dapo.algorithm.overlong_buffer.enable);
    assert_eq!((dapo.optimizer.weight_decay, dapo.optimizer.lr_warmup_steps), (0.1, 10));
}

#[test]
fn later_layers_win_and_a_stored_configuration_reads_back() {
    let file = "[algorithm]\nmethod = \"kl_cov\"\nppo_kl_coef = 2\n[data]\ntrain_batch_size = 64\n\
                train_files = \"a.jsonl, b.jsonl\"";
    let overrides = set(&[("data.train_batch_size", "16"), ("trainer.output", "2024")]);
    let config = RlConfig::resolve(None, Some(file), &overrides).unwrap();
    assert_eq!((config.algorithm.method, config.algorithm.ppo_kl_coef), (Method::KlCov, 2.0));
    assert_eq!((config.data.train_batch_size, config.algorithm.mini_batch_size), (16, 2));
    assert_eq!(config.data.train_files, ["a.jsonl", "b.jsonl"]);
    assert_eq!(config.trainer.output, "2024");
    let stored = config.to_toml();
    let again = RlConfig::resolve(None, Some(&stored), &[]).unwrap();
    assert_eq!((again.hash(), &again), (config.hash(), &config));
    let other = RlConfig::resolve(Some("clip_cov"), Some("[algorithm]\nmethod = \"grpo\""), &[]);
    let other = other.unwrap().algorithm;
    assert_eq!((other.method, other.loss_mode), (Method::ClipCov, LossMode::ClipCov));
}

#[test]
fn values_of_overrides_are_toml_or_bare_words() {
    let config = with(&[
        ("rollout.stop", "[\"\\n\", \"###\"]"),
        ("data.val_files", "x.jsonl,y.jsonl"),
        ("data.prompt_template", "r1_zero"),
        ("algorithm.loss_agg_mode", "\"seq-mean-token-sum-norm\""),
        ("algorithm.kl_loss_type", "low_var_kl"),
        ("optimizer.betas", "[0, 0.99]"),
        ("optimizer.grad_clip", "inf"),
        ("algorithm.method", "clip_higher"),
        ("data.shuffle", "false"),
    ])
    .unwrap();
    assert_eq!(config.rollout.stop, ["\n", "###"]);
    assert_eq!(config.data.val_files, ["x.jsonl", "y.jsonl"]);
    assert_eq!(config.data.prompt_template, PromptTemplate::R1Zero);
    assert_eq!(config.algorithm.loss_agg_mode, AggMode::SeqMeanTokenSumNorm);
    assert_eq!(config.optimizer.betas, [0.0, 0.99]);
    assert_eq!(config.optimizer.grad_clip, f64::INFINITY);
    assert_eq!((config.algorithm.clip_ratio_high, config.data.shuffle), (0.28, false));
    assert_eq!(RlConfig::resolve(None, Some(&config.to_toml()), &[]).unwrap(), config);
}

#[test]
fn unknown_keys_and_methods_name_the_nearest() {
    let near = |key| error(&[(key, "1")]);
    assert_eq!(near("rollout.m"), "unknown key rollout.m, did you mean rollout.n?");
    assert_eq!(
        near("kl_cov_ratio"),
        "unknown key kl_cov_ratio, did you mean algorithm.kl_cov_ratio?"
    );
    assert_eq!(near("optimiser.lr"), "unknown key optimiser.lr, did you mean optimizer.lr?");
    let file = |text| RlConfig::resolve(None, Some(text), &[]).unwrap_err().to_string();
    assert_eq!(
        file("[algorithm.overlong_buffer]\nlenn = 3"),
        "unknown key algorithm.overlong_buffer.lenn, did you mean algorithm.overlong_buffer.len?"
    );
    assert_eq!(file("data = 3"), "data is 3, expected a section");
    assert!(file("[data]\nseed = = 3").starts_with("line 2 of the file is not TOML: "));
    let method = |name| RlConfig::resolve(Some(name), None, &[]).unwrap_err().to_string();
    assert_eq!(method("clipcov"), "unknown method clipcov, did you mean clip_cov?");
    let clash = set(&[("algorithm.method", "grpo")]);
    let e = RlConfig::resolve(Some("kl_cov"), None, &clash).unwrap_err().to_string();
    assert_eq!(e, "method is kl_cov, but algorithm.method is set to grpo");
}

#[test]
fn values_outside_their_limits_are_refused_with_value_and_limit() {
    for (key, value, message) in [
        ("rollout.n", "0", "rollout.n is 0, limit is 1 or more"),
        ("rollout.n", "-2", "rollout.n is -2, limit is 0 or more"),
        ("rollout.n", "many", "rollout.n is \"many\", expected an integer"),
        ("rollout.n", "1.5", "rollout.n is 1.5, expected an integer"),
        ("rollout.temperature", "0", "rollout.temperature is 0, limit is above 0"),
        ("rollout.top_p", "nan", "rollout.top_p is NaN, limit is above 0, up to 1"),
        ("rollout.top_k", "0", "rollout.top_k is 0, limit is 1 or more, or -1"),
        ("rollout.n", "129", "rollout.n is 129, limit is 1 to 128"),
        ("rollout.temperature", "200", "rollout.temperature is 200, limit is 0 to 100"),
        ("rollout.stop", "[\"a\", \"\"]", "rollout.stop string 1 is empty"),
        ("optimizer.lr", "fast", "optimizer.lr is \"fast\", expected a number"),
        (
            "reward.start_timeout_s",
            "0",
            "reward.start_timeout_s is 0, limit is above 0, up to 86400",
        ),
        ("optimizer.lr", "-1", "optimizer.lr is -1, limit is 0 or more"),
        ("algorithm.clip_ratio_c", "1", "algorithm.clip_ratio_c is 1, limit is above 1"),
        ("algorithm.kl_cov_ratio", "2", "algorithm.kl_cov_ratio is 2, limit is 0 to 1"),
        ("data.shuffle", "1", "data.shuffle is 1, expected true or false"),
        ("data.train_files", "[]", "data.train_files is empty, limit is 1 file or more"),
        ("algorithm.tau_neg", "0", "algorithm.tau_neg is 0, limit is above 0"),
        (
            "trainer.trackers",
            "wandb",
            "trainer.trackers is wandb, limit is console, jsonl, tensorboard",
        ),
    ] {
        assert_eq!(error(&[(key, value)]), message);
    }
    let buffer = |pairs: &[(&str, &str)]| with(pairs).unwrap().algorithm.overlong_buffer.len;
    let dapo = ("algorithm.method", "dapo");
    assert_eq!(buffer(&[dapo]), 51);
    assert_eq!(buffer(&[dapo, ("data.max_response_length", "1000")]), 200);
    assert_eq!(buffer(&[dapo, ("data.max_response_length", "4")]), 1);
    let long = [("data.max_response_length", "16"), ("algorithm.overlong_buffer.len", "17")];
    assert_eq!(buffer(&long), 17, "it is not in use");
    assert_eq!(
        error(&[dapo, long[0], long[1]]),
        "algorithm.overlong_buffer.len is 17, limit is data.max_response_length (16)"
    );
    let e = error(&[("algorithm.mini_batch_size", "64")]);
    assert_eq!(e, "algorithm.mini_batch_size is 64, limit is data.train_batch_size (32)");
    assert!(error(&[("algorithm.loss_mode", "gspu")]).contains("algorithm.loss_mode"));
    assert!(error(&[("algorithm.kl_loss_type", "k9")]).contains("\"k9\""));
    assert!(error(&[("optimizer.betas", "[0.9]")]).contains("betas"));
}

#[test]
fn weights_and_validation_are_numbers_within_limits() {
    let files = ("data.train_files", "a.jsonl,b.jsonl");
    for weights in ["1,2.5", "[1, 2.5]"] {
        let config = with(&[files, ("data.weights", weights)]).unwrap();
        assert_eq!(config.data.weights, [1.0, 2.5], "{weights}");
        assert_eq!(RlConfig::resolve(None, Some(&config.to_toml()), &[]).unwrap(), config);
    }
    let file =
        "[data]\ntrain_files = [\"a\", \"b\"]\nweights = [3, 1]\n[validation]\nn = 8\ntop_k = -1";
    let config = RlConfig::resolve(None, Some(file), &[]).unwrap();
    assert_eq!((config.data.weights, config.validation.n), (vec![3.0, 1.0], 8));
    for (weights, message) in [
        ("1", "data.weights is 1, expected a list"),
        ("a b", "data.weights is \"a b\", expected numbers"),
        ("1,2,3", "data.weights is 3 numbers, limit is one for each of the 2 data.train_files"),
        ("1,-2", "data.weights is -2, limit is 0 or more"),
        ("0,0", "data.weights is 0 for every file, limit is above 0 for one or more"),
        ("[1, \"b\"]", "data.weights is \"b\", expected a number"),
    ] {
        assert_eq!(error(&[files, ("data.weights", weights)]), message);
    }
    for (key, value, message) in [
        ("validation.n", "129", "validation.n is 129, limit is 128"),
        ("validation.temperature", "-2", "validation.temperature is -2, limit is 0 to 100, or -1"),
        ("validation.top_k", "0", "validation.top_k is 0, limit is 1 or more, or -1"),
        ("validation.top_p", "0", "validation.top_p is 0, limit is above 0, up to 1"),
    ] {
        assert_eq!(error(&[(key, value)]), message);
    }
}

#[test]
fn settings_that_make_a_method_a_no_op_are_pointed_out() {
    let overrides = set(&[("algorithm.mini_batch_size", "32"), ("algorithm.kl_cov_ratio", "0.2")]);
    let warnings = RlConfig::resolve(Some("kl_cov"), None, &overrides).unwrap().warnings();
    assert_eq!(warnings.len(), 2);
    assert!(warnings[0].contains("one update per rollout"), "{}", warnings[0]);
    for (method, pairs, part) in [
        ("clip_cov", [("algorithm.clip_cov_ratio", "0.2"), ("rollout.n", "4")], "far above"),
        ("gspo", [("algorithm.clip_ratio_high", "0.2"), ("rollout.n", "4")], "whole responses"),
        ("kl_cov", [("algorithm.ppo_kl_coef", "0"), ("rollout.n", "4")], "penalises nothing"),
        (
            "grpo",
            [("algorithm.use_kl_loss", "true"), ("algorithm.kl_loss_coef", "0")],
            "second set of weights",
        ),
        (
            "grpo",
            [("algorithm.rollout_correction.rollout_is", "token"), ("rollout.n", "4")],
            "to the bit",
        ),
        ("grpo", [("rollout.n", "1"), ("data.seed", "2")], "no group"),
    ] {
        let warnings = RlConfig::resolve(Some(method), None, &set(&pairs)).unwrap().warnings();
        assert_eq!(warnings.len(), 1, "{pairs:?}: {warnings:?}");
        assert!(warnings[0].contains(part), "{}", warnings[0]);
    }
}

#[test]
fn supervised_settings_resolve_the_same_way() {
    let config = SftConfig::resolve(None, &set(&[("optimizer.lr", "0.01")])).unwrap();
    assert_eq!(SftConfig::resolve(Some(&config.to_toml()), &[]).unwrap(), config);
    let e = SftConfig::resolve(None, &set(&[("data.batch_size", "1")])).unwrap_err();
    assert_eq!(e.to_string(), "unknown key data.batch_size, did you mean data.train_batch_size?");
}
