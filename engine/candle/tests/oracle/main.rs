//! The candle decoder against transformers' outputs and against the hand-written one.
#![allow(clippy::unwrap_used)]

mod fast;
mod golden;

use std::collections::BTreeMap;

use candle_backend::candle_core::{DType, Device, Result as CandleResult, Tensor};
use candle_backend::{
    AdamW, CandleEngine, CandleModel, Episode, GenerateSettings, Seed, StepSettings,
};
use engine::{
    Dtype, Engine, EngineConfig, EosRule, ErrorKind, Event, FinishReason, Request, SamplingParams,
};
use fast::Fast;
use golden::{Golden, PolicyStep, assert_close, flat, relative};

/// The model as the reference outputs were made.
fn model(golden: &Golden, dtype: DType) -> CandleModel {
    CandleModel::load_as(golden.config(), &golden.source, &Device::Cpu, dtype).unwrap()
}

fn reference_engine(golden: &Golden, dtype: DType) -> CandleEngine {
    CandleEngine::new(model(golden, dtype), &EngineConfig::default()).unwrap()
}

fn engine_with(golden: &Golden, config: &EngineConfig) -> CandleEngine {
    CandleEngine::load(&golden.source, &Device::Cpu, config).unwrap()
}

fn greedy(max_tokens: usize) -> GenerateSettings {
    GenerateSettings {
        samples: 1,
        temperature: 0.0,
        max_tokens,
        eos: Vec::new(),
        seed: Seed::Each(0),
    }
}

#[test]
fn log_probs_and_entropies_are_those_of_transformers_and_of_the_fast_decoder() {
    for golden in Golden::all() {
        let candle = reference_engine(&golden, DType::F32);
        let fast = Fast::load(golden.config(), &golden.source);
        for (tokens, log_probs, entropy) in golden.cases() {
            let what = format!("{} with {} tokens", golden.name, tokens.len());
            let score = candle.score(std::slice::from_ref(&tokens), 1.0).unwrap().remove(0);
            assert_close(&what, &score.logprobs, &log_probs, 1e-4);
            assert_close(&what, &score.entropy, &entropy, 1e-4);
            let recorded = candle.model().entropy(&tokens, 1.0).unwrap();
            assert_close(&what, &flat(&recorded), &entropy, 1e-4);
            if tokens.len() > 1 {
                let recorded = candle.model().log_probs(&tokens, 1.0).unwrap();
                assert_close(&what, &flat(&recorded), &log_probs, 1e-4);
                let (by_hand, _) = fast.pass(&tokens, 1, &|l| vec![0.0; l.len()]);
                assert_close(&what, &by_hand, &score.logprobs, 1e-4);
            }
        }
    }
}

/// The limit of single log-probabilities is that of random models with large logits: they move by up to
/// 0.17 here, and by up to 0.14 in the hand-written decoder.
#[test]
fn bf16_stays_close_to_f32() {
    for golden in Golden::all() {
        let candle = reference_engine(&golden, DType::BF16);
        let mut errors = Vec::new();
        for (tokens, log_probs, _) in golden.cases() {
            let score = candle.score(&[tokens], 1.0).unwrap().remove(0);
            errors.extend(
                score.logprobs.iter().zip(&log_probs).map(|(got, want)| (got - want).abs()),
            );
        }
        let mean = errors.iter().sum::<f32>() / errors.len() as f32;
        let largest = errors.iter().copied().fold(0.0, f32::max);
        assert!(mean < 5e-2 && largest < 0.25, "{}: mean {mean}, largest {largest}", golden.name);
        assert!(mean > 1e-4, "{}: bf16 has not rounded anything: {mean}", golden.name);
    }
}

/// The reference's loss in candle operations: mean over response tokens of
/// max(-A r, -A clamp(r, 0.8, 1.28)), r = exp(log p - old).
fn recorded_loss(model: &CandleModel, step: &PolicyStep) -> CandleResult<Tensor> {
    let log_probs = step.sequences.iter().map(|tokens| {
        let all = model.log_probs(tokens, 1.0).unwrap();
        all.narrow(0, step.prompt_len - 1, tokens.len() - step.prompt_len)
    });
    let log_probs = Tensor::cat(&log_probs.collect::<CandleResult<Vec<_>>>()?, 0)?;
    let old = Tensor::new(&step.old[..], &Device::Cpu)?;
    let minus = Tensor::new(&step.advantages[..], &Device::Cpu)?.neg()?;
    let ratio = (log_probs - old)?.exp()?;
    let clipped = (&minus * ratio.clamp(0.8f32, 1.28f32)?)?;
    (minus * ratio)?.maximum(&clipped)?.mean_all()
}

/// The same loss as a function of log-probabilities, with its derivatives.
fn policy_loss(step: &PolicyStep, log_probs: &[f32]) -> (f64, Vec<f32>) {
    let count = step.old.len() as f64;
    let (mut loss, mut derivatives) = (0.0, Vec::new());
    for (i, log_prob) in log_probs.iter().enumerate() {
        let (advantage, old) = (f64::from(step.advantages[i]), f64::from(step.old[i]));
        let ratio = (f64::from(*log_prob) - old).exp();
        let (plain, clipped) = (-advantage * ratio, -advantage * ratio.clamp(0.8, 1.28));
        loss += plain.max(clipped) / count;
        derivatives.push(if plain >= clipped { (plain / count) as f32 } else { 0.0 });
    }
    (loss, derivatives)
}

fn fast_gradients(golden: &Golden, step: &PolicyStep) -> BTreeMap<String, Vec<f32>> {
    let fast = Fast::load(golden.config(), &golden.source);
    let mut sums: BTreeMap<String, Vec<f32>> = BTreeMap::new();
    let mut first = 0;
    for tokens in &step.sequences {
        let len = tokens.len() - step.prompt_len;
        let part = |log_probs: &[f32]| {
            // The loss is a sum over tokens, so the other sequences' log-probabilities do not matter.
            let mut all = step.old.clone();
            all[first..first + len].copy_from_slice(log_probs);
            policy_loss(step, &all).1[first..first + len].to_vec()
        };
        for (name, gradient) in fast.pass(tokens, step.prompt_len, &part).1 {
            let sum = sums.entry(name).or_insert_with(|| vec![0.0; gradient.len()]);
            sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g);
        }
        first += len;
    }
    sums
}

#[test]
fn policy_gradients_agree_with_transformers_and_with_the_hand_written_backward() {
    for golden in Golden::all() {
        let candle = model(&golden, DType::F32);
        let step = golden.policy_step();
        let loss = recorded_loss(&candle, &step).unwrap();
        let want = golden.policy_numbers("losses")[0];
        assert_close(golden.name, &[loss.to_scalar().unwrap()], &[want], 1e-4);
        let gradients = candle.gradients(&loss).unwrap();
        let reference = golden.tensors("grads.safetensors");
        let by_hand = fast_gradients(&golden, &step);
        assert_eq!(reference.len(), candle.names().len(), "{}: tensors", golden.name);
        assert_eq!(by_hand.len(), candle.names().len(), "{}: tensors by hand", golden.name);
        for (name, gradient) in gradients.iter() {
            let gradient = flat(gradient);
            let against = [("transformers", &flat(&reference[name])), ("by hand", &by_hand[name])];
            for (whose, want) in against {
                let error = relative(&gradient, want);
                assert!(error < 1e-4, "{} {name} against {whose}: {error}", golden.name);
            }
        }
    }
}

#[test]
fn no_operation_drops_a_gradient() {
    for golden in Golden::all() {
        let candle = model(&golden, DType::BF16);
        let tokens = &golden.greedy().0;
        let recorded = candle.log_probs(tokens, 0.7).unwrap().sum_all().unwrap();
        // Fails by itself when a weight gets none.
        let gradients = candle.gradients(&recorded).unwrap();
        let names: Vec<String> =
            golden.source.config().tensors().into_iter().map(|t| t.name).collect();
        assert_eq!(candle.names(), names);
        for (name, gradient) in gradients.iter() {
            let norm: f32 = flat(gradient).iter().map(|x| x * x).sum();
            assert!(norm > 0.0 && norm.is_finite(), "{} {name}: {norm}", golden.name);
        }
        let detached = Tensor::new(1.0f32, &Device::Cpu).unwrap();
        let error = candle.gradients(&detached).unwrap_err();
        assert!(error.to_string().starts_with("no gradient reached tensor"), "{error}");
    }
}

#[test]
fn paged_greedy_generation_is_the_reference_continuation() {
    let plain = EngineConfig::default();
    for golden in Golden::all() {
        let (prompt, continuation) = golden.greedy();
        let mut candle = engine_with(&golden, &plain);
        let completions = candle.generate(&[prompt], &greedy(48)).unwrap();
        assert_eq!(completions[0].tokens, continuation, "{}", golden.name);
        assert_eq!(completions[0].finish, FinishReason::Length);
    }
}

#[test]
fn chunks_shared_blocks_and_preemption_change_no_token() {
    let golden = Golden::open("tiny-qwen3");
    let (prompt, continuation) = golden.greedy();
    // 40 tokens of prompt: two full blocks to share, three chunks.
    let long = [&prompt[..], &continuation[..24]].concat();
    let prompts = [prompt, long.clone(), long];
    let model = golden.source.config();
    let block_bytes = 2 * model.layers * 16 * model.kv_heads * model.head_dim * 4;
    let tight = EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        max_model_len: Some(64),
        kv_cache_memory_bytes: Some(6 * block_bytes as u64),
        ..EngineConfig::default()
    };
    let mut candle = engine_with(&golden, &tight);
    let settings = GenerateSettings { samples: 2, ..greedy(24) };
    let completions = candle.generate(&prompts, &settings).unwrap();
    assert_eq!(completions.len(), 6);
    for (i, completion) in completions.iter().enumerate() {
        assert_eq!((completion.prompt, completion.sample), (i / 2, i % 2));
        let want = if completion.prompt == 0 { &continuation[..24] } else { &continuation[24..] };
        assert_eq!(completion.tokens, want, "completion {i}");
        let given = &prompts[completion.prompt];
        let score = candle.score(&[[given, want].concat()], 1.0).unwrap().remove(0);
        assert_close("log-probs", &completion.logprobs, &score.logprobs[given.len() - 1..], 1e-4);
    }
    // Four samples that grow to four blocks each, in six.
    let settings = GenerateSettings { samples: 4, ..greedy(44) };
    for completion in candle.generate(&prompts[..1], &settings).unwrap() {
        assert_eq!(completion.tokens, continuation[..44], "sample {}", completion.sample);
    }
    let stats = candle.stats();
    assert!(stats.preemptions > 0 && stats.hit_tokens > 0, "{stats:?}");
    assert_eq!(stats.free_blocks, 6);
}

#[test]
fn sampled_tokens_are_those_of_the_fast_engine() {
    let golden = Golden::open("tiny-llama3-rope");
    let config = EngineConfig { dtype: Some(Dtype::F32), ..EngineConfig::default() };
    let (prompt, seed) = (golden.greedy().0, 20_251);
    let mut fast = Engine::load(
        &golden.source,
        &EngineConfig { kv_cache_memory_bytes: Some(1 << 22), ..config.clone() },
    )
    .unwrap();
    let params = SamplingParams {
        n: 3,
        temperature: 0.8,
        max_tokens: Some(24),
        eos: EosRule::Ignore,
        seed: Some(seed),
        ..SamplingParams::default()
    };
    fast.add(Request::new(prompt.clone(), params)).unwrap();
    let mut want = vec![(Vec::new(), Vec::new()); 3];
    while fast.has_work() {
        for event in fast.step().unwrap() {
            if let Event::Token(token) = event {
                want[token.sample].0.push(token.token);
                want[token.sample].1.push(token.logprob);
            }
        }
    }
    let settings =
        GenerateSettings { samples: 3, temperature: 0.8, seed: Seed::Each(seed), ..greedy(24) };
    let completions = engine_with(&golden, &config).generate(&[prompt], &settings).unwrap();
    for (completion, (tokens, logprobs)) in completions.iter().zip(&want) {
        assert_eq!(&completion.tokens, tokens, "sample {}, seed {seed}", completion.sample);
        assert_close("log-probs", &completion.logprobs, logprobs, 1e-4);
    }
}

#[test]
fn an_end_of_text_token_ends_a_completion() {
    let golden = Golden::open("tiny-llama");
    let (prompt, continuation) = golden.greedy();
    let eos = continuation[5];
    let len = 1 + continuation.iter().position(|token| *token == eos).unwrap();
    let settings = GenerateSettings { eos: vec![eos], ..greedy(48) };
    let mut candle = engine_with(&golden, &EngineConfig::default());
    let completion = candle.generate(&[prompt], &settings).unwrap().remove(0);
    assert_eq!(
        (&completion.tokens[..], completion.finish),
        (&continuation[..len], FinishReason::Stop)
    );
}

fn step_settings() -> StepSettings {
    let adamw = AdamW { lr: 1e-4, ..AdamW::default() };
    StepSettings { temperature: 1.0, max_grad_norm: 1.0, adamw }
}

#[test]
fn five_policy_steps_follow_the_reference() {
    for golden in Golden::all() {
        let mut candle = reference_engine(&golden, DType::F32);
        let step = golden.policy_step();
        let episodes: Vec<Episode<'_>> = step
            .sequences
            .iter()
            .map(|tokens| Episode { tokens, prompt_len: step.prompt_len })
            .collect();
        let loss = |log_probs: &[f32]| policy_loss(&step, log_probs);
        let (losses, norms) =
            (golden.policy_numbers("losses"), golden.policy_numbers("grad_norms"));
        for (i, (loss_want, norm_want)) in losses.iter().zip(&norms).enumerate() {
            let scores = candle.score_responses(&episodes, 1.0).unwrap();
            let report = candle.rl_step(&episodes, &step_settings(), &loss).unwrap();
            let scored: Vec<f32> = scores.iter().flat_map(|s| &s.log_probs).copied().collect();
            assert_eq!(
                scored, report.log_probs,
                "{}: a step starts where scoring ends",
                golden.name
            );
            let what = format!("{} step {i}", golden.name);
            assert_close(&what, &[report.loss as f32], &[*loss_want], 1e-4);
            assert_close(&what, &[report.grad_norm as f32], &[*norm_want], 1e-3 * norm_want);
        }
        assert!(losses[5] < losses[0]);
        assert_eq!(candle.version().0, 5);
        let after = golden.tensors("params_after_5_steps.safetensors");
        for (name, var) in candle.model().names().iter().zip(candle.model().vars()) {
            assert_close(name, &flat(var), &flat(&after[name]), 1e-4);
        }
        // Generation reads the weights that were trained: no copy is left behind.
        let mut tokens = step.sequences[0].clone();
        let recorded = flat(&candle.model().log_probs(&tokens, 1.0).unwrap());
        let prompt: Vec<u32> = tokens.drain(..step.prompt_len).collect();
        let first = candle.generate(std::slice::from_ref(&prompt), &greedy(1)).unwrap().remove(0);
        let score = candle.score(&[[&prompt[..], &first.tokens[..]].concat()], 1.0).unwrap();
        assert_close("log-prob", &first.logprobs, &score[0].logprobs[step.prompt_len - 1..], 1e-4);
        assert_close(
            "log-probs",
            &recorded[..step.prompt_len - 1],
            &score[0].logprobs[..step.prompt_len - 1],
            1e-5,
        );
    }
}

#[test]
fn a_step_that_cannot_be_taken_changes_no_weight() {
    let golden = Golden::open("tiny-qwen2");
    let mut candle = engine_with(&golden, &EngineConfig::default());
    let tokens = golden.greedy().0;
    let before: Vec<Vec<f32>> = candle.model().vars().iter().map(|var| flat(var)).collect();
    let episodes = [Episode { tokens: &tokens, prompt_len: 4 }];
    let error = candle
        .rl_step(&episodes, &step_settings(), &|l| (f64::NAN, vec![1.0; l.len()]))
        .unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Numeric(_)), "{error}");
    let bad = [Episode { tokens: &tokens, prompt_len: tokens.len() }];
    let error = candle.rl_step(&bad, &step_settings(), &|_| (0.0, Vec::new())).unwrap_err();
    assert_eq!(error.to_string(), "prompt has 16 of 16 tokens, limit is 1 to all but 1");
    let after: Vec<Vec<f32>> = candle.model().vars().iter().map(|var| flat(var)).collect();
    assert_eq!(before, after);
    assert_eq!(candle.generate(&[tokens], &greedy(1)).unwrap().len(), 1);
}

#[test]
fn what_a_user_gets_wrong_is_named() {
    let golden = Golden::open("tiny-llama");
    let small = EngineConfig { max_model_len: Some(32), ..EngineConfig::default() };
    let mut candle = engine_with(&golden, &small);
    let mut refused = |prompt: Vec<u32>, settings: GenerateSettings| {
        let error = candle.generate(&[vec![1, 2], prompt], &settings).unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Request(_)), "{error}");
        assert_eq!(candle.stats().used_blocks, 0);
        error.to_string()
    };
    assert_eq!(refused(vec![], greedy(1)), "prompt has 0 tokens, limit is at least 1");
    assert_eq!(refused(vec![512], greedy(1)), "prompt has token 512, vocabulary has 512");
    assert_eq!(
        refused(vec![1; 32], greedy(1)),
        "prompt has 32 tokens, limit is 31 (context of 32 less one to generate)"
    );
    assert_eq!(refused(vec![1], greedy(0)), "max_tokens is 0, limit is at least 1");
    let cold = GenerateSettings { temperature: -1.0, ..greedy(1) };
    assert_eq!(refused(vec![1], cold), "temperature is -1, limit is above 0");
    let block_bytes = 2 * 3 * 16 * 2 * 16 * 4;
    let tight = EngineConfig { kv_cache_memory_bytes: Some(2 * block_bytes), ..small };
    let mut tight = engine_with(&golden, &tight);
    let prompts = [vec![1, 2], vec![1; 30]];
    assert_eq!(tight.generate(&prompts, &greedy(2)).unwrap().len(), 2);
    let mut tiny = engine_with(
        &golden,
        &EngineConfig { kv_cache_memory_bytes: Some(block_bytes), ..EngineConfig::default() },
    );
    let error = tiny.generate(&prompts, &greedy(2)).unwrap_err();
    assert_eq!(error.to_string(), "sequence needs 2 blocks of kv memory, limit is 1");
    assert_eq!(tiny.generate(&prompts[..1], &greedy(2)).unwrap().len(), 1);
    let error = tiny.rl_step(&[], &step_settings(), &|_| (0.0, Vec::new())).unwrap_err();
    assert_eq!(error.to_string(), "step has 0 episodes, limit is at least 1");
    let error = candle.score(&[vec![1, 2]], f32::NAN).unwrap_err();
    assert_eq!(error.to_string(), "temperature is NaN, limit is above 0");
    let long = EngineConfig { max_model_len: Some(1 << 20), ..EngineConfig::default() };
    let error = CandleEngine::load(&golden.source, &Device::Cpu, &long).err().unwrap();
    assert_eq!(error.to_string(), "max_model_len is 1048576, limit is 1 to 4096");
    let error = CandleModel::load(&golden.source, &Device::Cpu, DType::F64).err().unwrap();
    assert_eq!(error.to_string(), "dtype is f64, limit is f32 or bf16");
}
