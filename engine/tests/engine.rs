//! Behaviour at the engine's doors, on the golden tiny models with random weights.
//!
//! Here: the phase lock around the weights, blocks, aborts, failures, scoring. `engine/sampling.rs` has
//! what parameters do to an answer, `engine/guesses.rs` that guesses change none, `engine/prompts.rs`
//! what is told of a prompt, `engine/service.rs` the thread, `engine/guests.rs` an engine that serves
//! beside its owner, `engine/panics.rs` panics in a step, `engine/signs.rs` what a service says of
//! itself. Leaves out that bits do not depend on the batch, which the trainer's tests compare with
//! training at the same time.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "engine/guesses.rs"]
mod guesses;
#[path = "engine/guests.rs"]
mod guests;
#[path = "engine/panics.rs"]
mod panics;
#[path = "engine/prompts.rs"]
mod prompts;
#[path = "engine/sampling.rs"]
mod sampling;
#[path = "engine/service.rs"]
mod service;
#[path = "engine/signs.rs"]
mod signs;
#[path = "engine/support.rs"]
mod support;

use engine::decoder::ParamMut;
use engine::{
    Dtype, Engine, ErrorKind, Event, FinishReason, PrefixCache, Request, SamplingParams,
    WeightsVersion,
};

use support::{Model, drain, greedy, load, load_with_text, prompt, request_error, sampled};

/// Both formats that weights can have.
const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];

/// Runs one request alone: its answer's tokens and how many of its prompt's were in the cache.
fn run_one(engine: &mut Engine, prompt: &[u32]) -> (Vec<u32>, usize) {
    engine.add(Request::new(prompt.to_vec(), greedy(4))).unwrap();
    let answers = drain(engine);
    assert_eq!(answers.len(), 1);
    let answer = answers.into_values().next().unwrap();
    (answer.tokens(), answer.finished.cached_tokens)
}

#[test]
fn an_update_waits_for_requests_and_empties_the_prefix_cache() {
    for dtype in DTYPES {
        let mut engine = load(Model::Llama, |c| c.dtype = Some(dtype));
        let text = prompt(1, 70);
        let (tokens, cached) = run_one(&mut engine, &text);
        assert_eq!(cached, 0);
        assert_eq!(run_one(&mut engine, &text), (tokens.clone(), 64), "the same prompt is found");

        let id = engine.add(Request::new(text.clone(), greedy(4))).unwrap();
        for state in ["waits", "runs"] {
            let error = engine.begin_update().err().expect("an update while a request lives");
            assert!(matches!(error.kind(), ErrorKind::Busy(_)), "{state}: {error}");
            engine.step().unwrap();
        }
        assert_eq!(engine.version(), WeightsVersion(0), "a refusal changes nothing");
        assert!(engine.abort(id));
        drain(&mut engine);
        assert_eq!(
            run_one(&mut engine, &text),
            (tokens.clone(), 64),
            "nor does it empty the cache"
        );

        drop(engine.begin_update().unwrap());
        assert_eq!(engine.version(), WeightsVersion(1));
        assert_eq!(engine.stats().cached_blocks, 0);
        assert_eq!(run_one(&mut engine, &text), (tokens.clone(), 0), "nothing is found");
        assert_eq!(run_one(&mut engine, &text), (tokens, 64), "and it fills again");
        engine.add(Request::new(text, greedy(1))).unwrap();
        for answer in drain(&mut engine).values() {
            assert!(answer.tokens.iter().all(|token| token.version == WeightsVersion(1)));
        }
    }
}

#[test]
fn written_weights_are_used() {
    for dtype in DTYPES {
        let mut engine = load(Model::Qwen3, |c| c.dtype = Some(dtype));
        let text = prompt(2, 9);
        // A head that knows one token only: all other rows are zero.
        let mut update = engine.begin_update().unwrap();
        let (decoder, _) = update.decoder();
        let head = decoder.weights.head.as_mut().unwrap();
        let (rows, mut row) = (head.rows(), vec![0.0; head.cols()]);
        head.get_row(5, &mut row);
        let zeros = vec![0.0; row.len()];
        (0..rows).for_each(|i| head.full_mut().set_row(i, &zeros));
        drop(update);
        engine.add(Request::new(text.clone(), sampled(1))).unwrap();
        let answers = drain(&mut engine);
        let token = &answers.values().next().unwrap().tokens[0];
        assert!((token.logprob + 512_f32.ln()).abs() < 1e-5, "all are equally likely: {token:?}");
        assert!((token.entropy - 512_f32.ln()).abs() < 1e-5, "{token:?}");
    }
}

#[test]
fn an_abort_returns_all_blocks_within_one_step() {
    for dtype in DTYPES {
        let mut engine = load(Model::Llama, |c| {
            c.dtype = Some(dtype);
            c.max_num_batched_tokens = 32;
        });
        let idle = engine.stats().free_blocks;
        let other = engine.add(Request::new(prompt(3, 20), greedy(2))).unwrap();
        let params = SamplingParams { n: 3, ..sampled(200) };
        // One is aborted half way through its prompt, one while it generates.
        for steps in [2, 8] {
            let id = engine.add(Request::new(prompt(4, 100), params.clone())).unwrap();
            for _ in 0..steps {
                engine.step().unwrap();
            }
            assert!(engine.stats().used_blocks > 0);
            assert!(engine.abort(id));
            assert!(!engine.abort(id), "it is over");
            let events = engine.step().unwrap();
            let ends: Vec<usize> = events
                .iter()
                .filter_map(|event| match event {
                    Event::Finished(end) if end.request == id => {
                        assert_eq!((end.reason, &end.error), (FinishReason::Abort, &None));
                        Some(end.sample)
                    }
                    _ => None,
                })
                .collect();
            assert_eq!(ends, [0, 1, 2]);
            assert!(events.iter().all(|e| e.request() != id || matches!(e, Event::Finished(_))));
        }
        assert!(!engine.abort(other), "it has long ended");
        assert_eq!((engine.stats().used_blocks, engine.stats().free_blocks), (0, idle));
        assert!(!engine.has_work());
    }
}

#[test]
fn samples_of_a_group_share_the_blocks_of_their_prompt() {
    let text = prompt(5, 40);
    let after_prefill = |prefix_cache| {
        let mut engine = load(Model::Llama, |c| c.prefix_cache = prefix_cache);
        let params = SamplingParams { n: 4, temperature: 3.0, ..sampled(6) };
        engine.add(Request::new(text.clone(), params)).unwrap();
        engine.step().unwrap();
        let stats = engine.stats();
        (stats.used_blocks, stats.hit_tokens, drain(&mut engine))
    };
    // 40 tokens: two full blocks and a begun one, which each sample needs for itself.
    let (used, hits, shared) = after_prefill(PrefixCache::On);
    assert_eq!((used, hits), (2 + 4, 3 * 32));
    let (used, hits, apart) = after_prefill(PrefixCache::Off);
    assert_eq!((used, hits), (4 * 3, 0));
    let cached: Vec<usize> = shared.values().map(|a| a.finished.cached_tokens).collect();
    assert_eq!(cached, [0, 32, 32, 32]);
    for (key, answer) in &shared {
        // The first step's events went by above.
        assert_eq!(answer.tokens.len(), 5);
        assert_eq!(answer.tokens, apart[key].tokens, "sharing changes no number");
    }
    let different: std::collections::HashSet<Vec<u32>> =
        shared.values().map(|answer| answer.tokens()).collect();
    assert_eq!(different.len(), 4, "each sample has its own random stream");
}

/// Puts `value` into row `row` of the embeddings; returns the row as it was.
fn spoil(engine: &mut Engine, row: usize, value: f32) -> Vec<f32> {
    let mut update = engine.begin_update().unwrap();
    let (decoder, _) = update.decoder();
    let embed = &mut decoder.weights.embed;
    let mut before = vec![0.0; embed.cols()];
    embed.get_row(row, &mut before);
    let mut after = before.clone();
    after[3] = value;
    embed.full_mut().set_row(row, &after);
    before
}

#[test]
fn numbers_that_are_not_end_a_request_and_the_engine_lives_on() {
    for dtype in DTYPES {
        // Head and embeddings are apart: a bad row reaches only those whose prompt has its token.
        let mut engine = load(Model::Qwen3, |c| c.dtype = Some(dtype));
        let (good, bad) = (vec![20, 21, 22], vec![20, 77, 22]);
        let params = SamplingParams { logit_bias: vec![(77, -100.0)], ..sampled(8) };
        let run = |engine: &mut Engine| {
            for text in [&good, &bad] {
                let params = SamplingParams { n: 2, ..params.clone() };
                engine.add(Request::new(text.clone(), params)).unwrap();
            }
            let answers: Vec<_> = drain(engine).into_values().collect();
            assert_eq!(engine.stats().used_blocks, 0);
            answers
        };
        let before = run(&mut engine);
        let row = spoil(&mut engine, 77, f32::NAN);
        let spoilt = run(&mut engine);
        assert_eq!(engine.nan_logits(), 2);
        for (a, b) in spoilt[..2].iter().zip(&before) {
            assert_eq!((a.tokens(), a.finished.error.as_ref()), (b.tokens(), None));
        }
        for answer in &spoilt[2..] {
            let end = &answer.finished;
            assert_eq!((answer.tokens.len(), end.reason), (0, FinishReason::Abort));
            let error = end.error.as_ref().unwrap().why();
            assert_eq!(error, "the model's logits are not finite numbers");
        }
        let error = engine.score(&[good.clone(), bad.clone()], 1.0).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Numeric(_)), "{error}");
        engine.begin_update().unwrap().decoder().0.weights.embed.full_mut().set_row(77, &row);
        let healed = run(&mut engine);
        assert!(healed.iter().zip(&before).all(|(a, b)| a.tokens() == b.tokens()));
        engine.score(&[good, bad], 1.0).unwrap();
    }
}

#[test]
fn no_value_in_the_weights_stops_the_engine() {
    for (dtype, value) in DTYPES.into_iter().flat_map(|d| [(d, f32::NAN), (d, f32::INFINITY)]) {
        let mut engine = load(Model::Llama, |c| c.dtype = Some(dtype));
        let mut update = engine.begin_update().unwrap();
        let (decoder, kernels) = update.decoder();
        let params: Vec<ParamMut<'_>> = decoder.weights.params_mut().collect();
        for mut param in params {
            let len = match &param {
                ParamMut::Matrix(matrix) => matrix.rows() * matrix.cols(),
                ParamMut::Quantised(matrix) => matrix.rows() * matrix.cols(),
                ParamMut::Vector(vector) => vector.len(),
            };
            param.write(kernels, dtype, &vec![value; len]);
        }
        drop(update);
        let all = [
            greedy(4),
            sampled(4),
            SamplingParams { top_k: Some(5), top_p: 0.5, min_p: 0.1, ..sampled(4) },
            SamplingParams { logprobs: Some(20), repetition_penalty: 1.5, ..greedy(4) },
            SamplingParams { min_tokens: 2, stop_token_ids: vec![9], ..sampled(4) },
        ];
        for params in all {
            engine.add(Request::new(prompt(6, 30), params)).unwrap();
        }
        let answers = drain(&mut engine);
        assert_eq!(answers.len(), 5);
        for answer in answers.values() {
            assert_eq!(answer.tokens.len(), 0);
            assert!(answer.finished.error.is_some(), "{:?}", answer.finished);
        }
        assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));
    }
}

#[test]
fn a_refused_request_names_value_and_limit_and_changes_nothing() {
    let mut engine = load_with_text(|c| c.max_model_len = Some(64));
    let base = || SamplingParams { max_tokens: Some(4), ..SamplingParams::default() };
    let text = |len: usize| prompt(7, len);
    let cases: Vec<(Vec<u32>, SamplingParams, &str)> = vec![
        (vec![], base(), "prompt has 0 tokens, limit is at least 1"),
        (text(64), base(), "prompt has 64 tokens, limit is 63"),
        (text(900), base(), "prompt has 900 tokens, limit is 63"),
        (vec![1, 512], base(), "prompt has token 512, vocabulary has 512"),
        (vec![u32::MAX], base(), "prompt has token 4294967295, vocabulary has 512"),
        (
            text(3),
            SamplingParams { temperature: -0.5, ..base() },
            "temperature is -0.5, limit is 0",
        ),
        (text(3), SamplingParams { temperature: f32::NAN, ..base() }, "temperature is NaN"),
        (text(3), SamplingParams { temperature: f32::INFINITY, ..base() }, "temperature is inf"),
        (text(3), SamplingParams { top_p: 0.0, ..base() }, "top_p is 0"),
        (text(3), SamplingParams { top_p: 1.5, ..base() }, "top_p is 1.5"),
        (text(3), SamplingParams { min_p: 2.0, ..base() }, "min_p is 2, limit is 0 to 1"),
        (text(3), SamplingParams { presence_penalty: 3.0, ..base() }, "presence_penalty is 3"),
        (text(3), SamplingParams { frequency_penalty: -3.0, ..base() }, "frequency_penalty is -3"),
        (text(3), SamplingParams { repetition_penalty: 0.0, ..base() }, "repetition_penalty is 0"),
        (text(3), SamplingParams { n: 0, ..base() }, "n is 0, limit is 1 to 128"),
        (text(3), SamplingParams { n: 129, ..base() }, "n is 129, limit is 1 to 128"),
        (text(3), SamplingParams { max_tokens: Some(0), ..base() }, "max_tokens is 0"),
        (
            text(3),
            SamplingParams { min_tokens: 5, ..base() },
            "min_tokens is 5, limit is max_tokens 4",
        ),
        (text(3), SamplingParams { logprobs: Some(21), ..base() }, "logprobs is 21, limit is 20"),
        (
            text(3),
            SamplingParams { logit_bias: vec![(1, 101.0)], ..base() },
            "logit_bias is 101, limit is -100 to 100",
        ),
        (
            text(3),
            SamplingParams { logit_bias: vec![(512, 1.0)], ..base() },
            "logit_bias has token 512, vocabulary has 512",
        ),
        (
            text(3),
            SamplingParams { stop_token_ids: vec![7, 600], ..base() },
            "stop_token_ids has token 600, vocabulary has 512",
        ),
        (text(3), SamplingParams { stop: vec![String::new()], ..base() }, "stop string 0 is empty"),
        (
            text(3),
            SamplingParams { stop: vec!["x".to_owned(); 65], n: 3, ..base() },
            "stop has 65 strings, limit is 64",
        ),
    ];
    let before = engine.stats();
    let id = engine.add(Request::new(text(63), base())).unwrap();
    for (text, params, message) in cases {
        let error = request_error(engine.add(Request::new(text, params)));
        assert!(error.starts_with(message), "{error:?} does not say {message:?}");
        assert_eq!((engine.stats(), engine.load_counts()), (before, (0, 1)), "{message}");
    }
    let next = engine.add(Request::new(text(3), base())).unwrap();
    assert_eq!(next.0, id.0 + 1, "no number was spent");
    assert_eq!(drain(&mut engine).len(), 2);
}

#[test]
fn sequences_that_do_not_fit_together_take_turns() {
    let mut engine = load(Model::Llama, |c| {
        c.dtype = Some(Dtype::F32);
        c.max_model_len = Some(64);
        c.kv_cache_memory_bytes = Some(1 << 17);
    });
    // 3 layers of keys and values of 2 heads of 16: 12 KiB a block, so ten.
    assert_eq!(engine.stats().total_blocks, 10);
    for seed in 8..14 {
        engine.add(Request::new(prompt(seed, 20), greedy(40))).unwrap();
    }
    let answers = drain(&mut engine);
    assert!(engine.stats().preemptions > 0, "{:?}", engine.stats());
    for (seed, answer) in (8..14).zip(answers.values()) {
        let mut roomy = load(Model::Llama, |c| c.dtype = Some(Dtype::F32));
        roomy.add(Request::new(prompt(seed, 20), greedy(40))).unwrap();
        let alone = drain(&mut roomy);
        assert_eq!(answer.tokens(), alone.values().next().unwrap().tokens());
    }
}

#[test]
fn scoring_refuses_while_busy_and_repeats_what_sampling_said() {
    for dtype in DTYPES {
        let mut engine = load(Model::Qwen2, |c| c.dtype = Some(dtype));
        let text = prompt(10, 21);
        let params = SamplingParams { temperature: 0.5, ..sampled(30) };
        let id = engine.add(Request::new(text.clone(), params)).unwrap();
        let error = engine.score(std::slice::from_ref(&text), 1.0).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Busy(_)), "{error}");
        let answer = drain(&mut engine).remove(&(id, 0)).unwrap();
        let whole = [text.clone(), answer.tokens()].concat();
        let score = engine.score(std::slice::from_ref(&whole), 0.5).unwrap().remove(0);
        assert_eq!((score.logprobs.len(), score.entropy.len()), (50, 51));
        for (i, token) in answer.tokens.iter().enumerate() {
            assert_eq!(token.logprob.to_bits(), score.logprobs[20 + i].to_bits(), "token {i}");
            assert_eq!(token.entropy.to_bits(), score.entropy[20 + i].to_bits(), "token {i}");
        }
        let raw = engine.score(&[whole.clone(), whole], 1.0).unwrap().remove(1);
        for (i, token) in answer.tokens.iter().enumerate() {
            assert_eq!(token.raw_logprob.to_bits(), raw.logprobs[20 + i].to_bits(), "token {i}");
        }
        for (texts, temperature, message) in [
            (vec![vec![]], 1.0, "text has 0 tokens"),
            (vec![vec![1; 257]], 1.0, "text has 257 tokens, limit is 1 to 256"),
            (vec![vec![512]], 1.0, "text has token 512"),
            (vec![vec![1]], 0.0, "temperature is 0, limit is above 0"),
        ] {
            let error = request_error(engine.score(&texts, temperature));
            assert!(error.starts_with(message), "{error:?} does not say {message:?}");
        }
        assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));
    }
}
