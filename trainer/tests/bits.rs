//! The promise of the engine: the log-probability of a sampled token is the one that training computes,
//! bit for bit, whatever else ran beside it.
//!
//! Runs on a tiny random model always, and on SmolLM2 in bf16 when `models/` has it.
#![allow(clippy::unwrap_used)]

use std::io::Write;
use std::path::{Path, PathBuf};

use engine::{
    Dtype, Engine, EngineConfig, EosRule, Event, Kernels, KvDtype, Level, ModelSource, PrefixCache,
    Quantization, Request, RunGuesses, SamplingParams, Speculation,
};
use trainer::score_train_path;

/// One way of running the same requests.
#[derive(Clone, Debug)]
struct Setup {
    name: &'static str,
    config: EngineConfig,
    reversed: bool,
}

fn setups(base: &EngineConfig, small_kv_bytes: u64) -> Vec<Setup> {
    let setup = |name, config| Setup { name, config, reversed: false };
    vec![
        setup("one at a time", EngineConfig { max_num_seqs: 1, ..base.clone() }),
        setup("five at a time", EngineConfig { max_num_seqs: 5, ..base.clone() }),
        setup("one thread", EngineConfig { threads: Some(1), ..base.clone() }),
        setup("chunks of 7", EngineConfig { max_num_batched_tokens: 7, ..base.clone() }),
        setup("chunks of 100", EngineConfig { max_num_batched_tokens: 100, ..base.clone() }),
        setup("no prefix cache", EngineConfig { prefix_cache: PrefixCache::Off, ..base.clone() }),
        setup("blocks of 32", EngineConfig { block_size: 32, ..base.clone() }),
        setup(
            "little memory",
            EngineConfig {
                kv_cache_memory_bytes: Some(small_kv_bytes),
                speculation: Speculation::off(),
                ..base.clone()
            },
        ),
        setup(
            "every guess in little memory",
            EngineConfig {
                kv_cache_memory_bytes: Some(small_kv_bytes / 2),
                speculation: every_guess(),
                ..base.clone()
            },
        ),
        setup("no guesses", EngineConfig { speculation: Speculation::off(), ..base.clone() }),
        setup("every guess", EngineConfig { speculation: every_guess(), ..base.clone() }),
        setup(
            "every guess in chunks",
            EngineConfig {
                speculation: every_guess(),
                max_num_batched_tokens: 100,
                max_num_seqs: 9,
                ..base.clone()
            },
        ),
        Setup { name: "reversed", config: base.clone(), reversed: true },
    ]
}

/// Guesses behind every token that has occurred before, most of which are wrong.
fn every_guess() -> Speculation {
    Speculation { shortest_match: 1, run: RunGuesses::All, ..Speculation::default() }
}

/// A sampled sequence: its tokens with the prompt, and the log-probabilities of the sampled ones.
#[derive(Clone, Debug, PartialEq)]
struct Sampled {
    tokens: Vec<u32>,
    logprob_bits: Vec<u32>,
}

/// 16 prompts of different lengths, some sharing a beginning, 4 samples each.
fn requests(vocab_size: u32, new_tokens: usize) -> Vec<Request> {
    (0..16u64)
        .map(|i| {
            let shared = (0..20).map(|k| engine::random::hash(&[1, k]));
            let own = (0..3 + i * 3).map(|k| engine::random::hash(&[2, i, k]));
            let prompt =
                if i % 3 == 0 { own.collect() } else { shared.chain(own).collect::<Vec<_>>() };
            let prompt = prompt.iter().map(|h| (h % u64::from(vocab_size)) as u32).collect();
            let params = SamplingParams {
                n: 4,
                max_tokens: Some(new_tokens),
                eos: EosRule::Ignore,
                seed: Some(1000 + i),
                // The coldest repeat themselves, so that guesses come true.
                temperature: [1.0, 0.7, 1.0, 0.02][i as usize % 4],
                ..SamplingParams::default()
            };
            Request::new(prompt, params)
        })
        .collect()
}

fn sample(source: &ModelSource, setup: &Setup, requests: &[Request]) -> (Vec<Sampled>, Engine) {
    let mut engine = Engine::load(source, &setup.config).unwrap();
    let mut order: Vec<usize> = (0..requests.len()).collect();
    if setup.reversed {
        order.reverse();
    }
    let mut sampled: Vec<Sampled> = requests
        .iter()
        .flat_map(|r| vec![Sampled { tokens: r.prompt.clone(), logprob_bits: vec![] }; r.params.n])
        .collect();
    let mut index = std::collections::HashMap::new();
    for i in order {
        index.insert(engine.add(requests[i].clone()).unwrap(), i);
    }
    while engine.has_work() {
        for event in engine.step().unwrap() {
            if let Event::Token(token) = event {
                let sequence = &mut sampled[index[&token.request] * 4 + token.sample];
                sequence.tokens.push(token.token);
                sequence.logprob_bits.push(token.logprob.to_bits());
            }
        }
    }
    (sampled, engine)
}

fn assert_train_path_agrees(engine: &Engine, sampled: &[Sampled], requests: &[Request]) {
    for (i, request) in requests.iter().enumerate() {
        let group = &sampled[4 * i..4 * i + 4];
        let tokens: Vec<Vec<u32>> = group.iter().map(|s| s.tokens.clone()).collect();
        let scores = score_train_path(engine, &tokens, request.params.temperature).unwrap();
        for (sequence, score) in group.iter().zip(&scores) {
            let bits: Vec<u32> =
                score.logprobs[request.prompt.len() - 1..].iter().map(|x| x.to_bits()).collect();
            assert_eq!(bits, sequence.logprob_bits, "request {i}: training and rollout differ");
        }
    }
}

fn check(source: &ModelSource, base: &EngineConfig, small_kv_bytes: u64, new_tokens: usize) {
    let requests = requests(source.config().vocab_size as u32, new_tokens);
    let all = Setup { name: "all at once", config: base.clone(), reversed: false };
    let (want, engine) = sample(source, &all, &requests);
    assert_eq!(want.len(), 64);
    assert!(want.iter().all(|s| s.logprob_bits.len() == new_tokens));
    assert_train_path_agrees(&engine, &want, &requests);
    assert!(engine.stats().hit_tokens > 0, "no prompt was taken from the prefix cache");
    for setup in setups(base, small_kv_bytes) {
        let (got, engine) = sample(source, &setup, &requests);
        let same = got == want;
        assert!(same, "{}: tokens or log-probabilities differ", setup.name);
        if setup.name == "little memory" {
            assert!(engine.stats().preemptions > 0, "nothing was preempted");
        }
        if setup.name.contains("every guess") {
            let guesses = engine.speculation();
            let both = guesses.accepted > 0 && guesses.accepted < guesses.guessed;
            assert!(both, "{}: {guesses:?}", setup.name);
        }
        if setup.name == "one thread" {
            assert_train_path_agrees(&engine, &got, &requests);
        }
    }
}

fn level() -> Option<Level> {
    std::env::var("ENGINE_CPU").ok().map(|name| Level::parse(&name).unwrap())
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn rollout_and_training_agree_on_tiny_models() {
    for (model, dtype) in [("tiny-qwen2", Dtype::Bf16), ("tiny-qwen3", Dtype::F32)] {
        let folder = workspace().join("tests/data/golden/models").join(model);
        let source = ModelSource::open(&folder).unwrap();
        let base = EngineConfig {
            dtype: Some(dtype),
            level: level(),
            threads: Some(2),
            max_model_len: Some(160),
            kv_cache_memory_bytes: Some(16 << 20),
            ..EngineConfig::default()
        };
        // 2 x 3 layers x 2 heads x 16 = 192 numbers a token: room for about four long sequences.
        let token_bytes = 192 * dtype.size_bytes() as u64;
        check(&source, &base, 640 * token_bytes, 24);
    }
}

/// SmolLM2 with quantised weights, if `models/` has it.
fn smollm2() -> Option<ModelSource> {
    let models =
        std::env::var_os("ENGINE_MODELS_DIR").map_or(workspace().join("models"), PathBuf::from);
    let path = models.join("smollm2-135m.gguf");
    if path.exists() {
        return Some(ModelSource::open(&path).unwrap());
    }
    // Written past the harness, which keeps the output of tests that pass to itself.
    let line = format!("left out: {} is missing; scripts/fetch-models.sh gets it", path.display());
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
    None
}

fn smollm2_config() -> EngineConfig {
    EngineConfig {
        dtype: Some(Dtype::Bf16),
        level: level(),
        threads: Some(2),
        max_model_len: Some(256),
        kv_cache_memory_bytes: Some(1 << 30),
        ..EngineConfig::default()
    }
}

#[test]
fn rollout_and_training_agree_on_smollm2() {
    let Some(source) = smollm2() else { return };
    // 2 x 30 layers x 3 heads x 64 numbers of 2 bytes a token.
    check(&source, &smollm2_config(), 560 * 23_040, 40);
}

#[test]
fn quantised_weights_keep_the_promise_and_stay_close_to_full_ones() {
    let Some(source) = smollm2() else { return };
    let config = EngineConfig { quantization: Quantization::AsStored, ..smollm2_config() };
    check(&source, &config, 560 * 23_040, 40);

    let sequences: Vec<Vec<u32>> =
        requests(source.config().vocab_size as u32, 0).into_iter().map(|r| r.prompt).collect();
    let score = |config: &EngineConfig| {
        let mut engine = Engine::load(&source, config).unwrap();
        let scores = engine.score(&sequences, 1.0).unwrap();
        scores.into_iter().flat_map(|s| s.logprobs).collect::<Vec<f32>>()
    };
    let stored = score(&config);
    let level = config.resolved_level();
    if Kernels::new(level, 1).unwrap().expands(Dtype::Bf16) {
        // Then they are only stored otherwise.
        let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&stored), bits(&score(&smollm2_config())), "weights in full at {level}");
        return;
    }
    let full = score(&EngineConfig { dtype: Some(Dtype::F32), ..smollm2_config() });
    let errors = full.iter().zip(&stored).map(|(full, got)| f64::from((full - got).abs()));
    let mean = errors.sum::<f64>() / full.len() as f64;
    println!("{} tokens, mean absolute difference {mean:.4}", full.len());
    assert!(full.len() > 400 && mean < 0.02, "mean difference is {mean}, limit is 0.02");
}

#[test]
fn keys_and_values_of_8_bits_change_little_and_never_with_the_batch() {
    let Some(source) = smollm2() else { return };
    let requests = &requests(source.config().vocab_size as u32, 8)[..4];
    let config = EngineConfig { kv_dtype: Some(KvDtype::Int8), ..smollm2_config() };
    let run = |config: &EngineConfig, reversed: bool| {
        let setup = Setup { name: "8 bits", config: config.clone(), reversed };
        sample(&source, &setup, requests)
    };
    let (want, mut engine) = run(&config, false);
    for changed in [
        EngineConfig { max_num_seqs: 1, ..config.clone() },
        EngineConfig { speculation: every_guess(), ..config.clone() },
        EngineConfig { max_num_batched_tokens: 7, block_size: 32, ..config },
    ] {
        assert!(run(&changed, true).0 == want, "{changed:?}");
    }
    let sequences: Vec<Vec<u32>> = want.iter().map(|s| s.tokens.clone()).collect();
    let got = engine.score(&sequences, 1.0).unwrap();
    let full = Engine::load(&source, &smollm2_config()).unwrap().score(&sequences, 1.0).unwrap();
    let pairs = got.iter().zip(&full).flat_map(|(a, b)| a.logprobs.iter().zip(&b.logprobs));
    let errors: Vec<f64> = pairs.map(|(a, b)| f64::from((a - b).abs())).collect();
    let mean = errors.iter().sum::<f64>() / errors.len() as f64;
    println!("{} tokens, mean absolute difference {mean:.4}", errors.len());
    // 0.058 with AVX2 kernels, 0.052 with AVX-512, which sample other tokens.
    assert!(errors.len() > 200 && mean > 0.0 && mean < 0.07, "mean difference is {mean}");
}
