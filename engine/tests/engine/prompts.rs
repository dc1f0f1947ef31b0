//! Log-probabilities of prompts beside other requests, and of the distribution that is drawn from.

use engine::{
    Continuation, Engine, Event, FinishReason, LogprobsMode, PromptToken, Request, SamplingParams,
};

use crate::DTYPES;
use crate::support::{Model, answer, drain, greedy, load, prompt, request_error, sampled};

/// A request that wants `top` alternatives beside each prompt token.
fn asking(text: &[u32], top: usize, params: SamplingParams) -> Request {
    Request { prompt_logprobs: Some(top), ..Request::new(text.to_vec(), params) }
}

/// Runs until nothing is left; what was told of prompts, in order.
fn told(engine: &mut Engine) -> Vec<Vec<PromptToken>> {
    let mut told = Vec::new();
    while engine.has_work() {
        for mut event in engine.step().unwrap() {
            told.extend(event.take_prompt());
        }
    }
    told
}

fn bits(tokens: &[PromptToken]) -> Vec<u32> {
    tokens.iter().map(|token| token.logprob.to_bits()).collect()
}

#[test]
fn a_prompt_has_the_bits_of_its_score_whatever_else_runs() {
    for dtype in DTYPES {
        // Chunks of 40 tokens, and room for no more than two of these prompts at once.
        let mut engine = load(Model::Qwen3, |c| {
            c.dtype = Some(dtype);
            c.max_num_batched_tokens = 40;
            c.kv_cache_memory_bytes = Some(c.kv_cache_memory_bytes.unwrap() / 8);
        });
        let text = prompt(1, 100);
        let score = engine.score(std::slice::from_ref(&text), 1.0).unwrap().remove(0);
        let expected: Vec<u32> = score.logprobs.iter().map(|x| x.to_bits()).collect();
        // Twice: the second time the prefix cache has the prompt, which is not taken from it.
        for _ in 0..2 {
            engine.add(Request::new(prompt(2, 70), sampled(9))).unwrap();
            engine.add(asking(&text, 3, SamplingParams { n: 2, ..sampled(5) })).unwrap();
            engine.add(asking(&text, 0, greedy(1))).unwrap();
            engine.add(Request::new(prompt(3, 50), sampled(9))).unwrap();
            let told = told(&mut engine);
            assert_eq!(told.len(), 2, "once a request");
            assert!(told.iter().all(|tokens| bits(tokens) == expected));
            for (token, id) in told[0].iter().zip(&text[1..]) {
                assert_eq!((token.token, token.top.len()), (*id, 3));
                assert!(token.top.is_sorted_by(|a, b| a.1 >= b.1));
                let place = token.top.iter().position(|(other, _)| other == id);
                assert_eq!(place.map(|place| place + 1), Some(token.rank).filter(|r| *r <= 3));
                if let Some(place) = place {
                    assert_eq!(token.top[place].1.to_bits(), token.logprob.to_bits());
                }
            }
            assert!(told[1].iter().all(|token| token.top.is_empty()));
        }
    }
}

#[test]
fn asking_for_a_prompt_changes_no_token_and_skips_the_cache() {
    let mut engine = load(Model::Llama, |_| {});
    let text = prompt(4, 70);
    let plain = answer(&mut engine, &text, &sampled(6));
    assert_eq!(answer(&mut engine, &text, &sampled(6)).finished.cached_tokens, 64);
    engine.add(asking(&text, 1, sampled(6))).unwrap();
    let asked = drain(&mut engine).into_values().next().unwrap();
    assert_eq!((asked.tokens(), asked.finished.cached_tokens), (plain.tokens(), 0));
    assert_eq!(asked.tokens[0].prompt.as_ref().unwrap().len(), 69);
    assert!(asked.tokens[1..].iter().all(|token| token.prompt.is_none()));
}

#[test]
fn a_prompt_can_be_read_without_an_answer() {
    let mut engine = load(Model::Llama, |c| c.max_num_batched_tokens = 64);
    let limit = engine.max_model_len();
    let omit = |len: usize, top| Request {
        prompt_logprobs: top,
        continuation: Continuation::Omit,
        ..Request::new(prompt(5, len), SamplingParams { n: 2, ..sampled(3) })
    };
    let score = engine.score(&[prompt(5, limit)], 1.0).unwrap().remove(0);
    engine.add(omit(limit, Some(0))).unwrap();
    let mut ends = Vec::new();
    while engine.has_work() {
        for event in engine.step().unwrap() {
            let Event::Finished(end) = event else { panic!("{event:?}") };
            ends.push(end);
        }
    }
    assert_eq!(ends.iter().map(|end| end.sample).collect::<Vec<_>>(), [0, 1]);
    assert!(ends.iter().all(|end| end.reason == FinishReason::Length));
    let expected: Vec<u32> = score.logprobs.iter().map(|x| x.to_bits()).collect();
    assert_eq!(bits(ends[0].prompt.as_ref().unwrap()), expected);
    assert_eq!(ends[1].prompt, None);
    assert_eq!(engine.stats().used_blocks, 0);
    // One token has nothing before it.
    engine.add(omit(1, Some(2))).unwrap();
    assert_eq!(told(&mut engine), [vec![]]);
    let error = request_error(engine.add(omit(limit + 1, None)));
    assert_eq!(error, format!("prompt has {} tokens, limit is {limit}", limit + 1));
    let error = request_error(engine.add(asking(&[5], 21, sampled(1))));
    assert_eq!(error, "prompt_logprobs is 21, limit is 20");
}

/// The first token of `params`, with its alternatives in `mode`.
fn first(engine: &mut Engine, mode: LogprobsMode, params: SamplingParams) -> engine::Token {
    let request = Request { logprobs_mode: mode, ..Request::new(prompt(6, 20), params) };
    engine.add(request).unwrap();
    drain(engine).into_values().next().unwrap().tokens.remove(0)
}

#[test]
fn alternatives_are_of_the_distribution_that_is_asked_for() {
    let mut engine = load(Model::Llama, |_| {});
    let base = SamplingParams { logprobs: Some(5), ..sampled(1) };
    let raw = first(&mut engine, LogprobsMode::Raw, base.clone());
    assert_eq!(first(&mut engine, LogprobsMode::Processed, base.clone()), {
        engine::Token { request: engine::RequestId(1), ..raw.clone() }
    });
    // Divided by the temperature: the distances grow with its inverse.
    let cold = SamplingParams { temperature: 0.5, ..base.clone() };
    let scaled = first(&mut engine, LogprobsMode::Processed, cold);
    let distances = |top: &[(u32, f32)]| -> Vec<f32> {
        top.iter().map(|(_, logprob)| top[0].1 - logprob).collect()
    };
    for (scaled, raw) in distances(&scaled.top).iter().zip(distances(&raw.top)) {
        assert!((scaled - 2.0 * raw).abs() < 1e-4, "{scaled} {raw}");
    }
    // Only what may be drawn is reported, and its probabilities are all there is.
    let cut = SamplingParams { top_k: Some(3), ..base.clone() };
    let cut = first(&mut engine, LogprobsMode::Processed, cut);
    assert_eq!(cut.top.len(), 3);
    let total: f32 = cut.top.iter().map(|(_, logprob)| logprob.exp()).sum();
    assert!((total - 1.0).abs() < 1e-5, "{total}");
    let own = cut.top.iter().find(|(token, _)| *token == cut.token).unwrap();
    assert_eq!(own.1.to_bits(), cut.logprob.to_bits());
    assert_eq!(
        cut.top.iter().map(|x| x.0).collect::<Vec<_>>(),
        raw.top[..3].iter().map(|x| x.0).collect::<Vec<_>>()
    );
    // A bias counts, at temperature 0 too.
    let biased = SamplingParams { logit_bias: vec![(9, 100.0)], temperature: 0.0, ..base };
    let biased = first(&mut engine, LogprobsMode::Processed, biased);
    assert_eq!((biased.token, biased.top[0].0), (9, 9));
    assert!(biased.top[0].1 > -1e-3 && biased.raw_logprob < -1.0);
}
