//! Guessed tokens change how many steps an answer takes, and nothing in it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::{
    Continuation, EngineConfig, Grammar, GrammarCompiler, LogprobsMode, PrefixCache, Request,
    RunGuesses, SamplingParams, Speculation, SpeculationStats, UnknownKeywords,
};
use serde_json::json;

use super::support::{
    Answer, Answers, collect, drain, drain_contained, greedy, load_with_text, prompt, sampled,
};

/// Guesses behind every token that has occurred before.
fn every_guess() -> Speculation {
    Speculation { shortest_match: 1, run: RunGuesses::All, ..Speculation::default() }
}

/// Requests of all kinds, on texts that repeat themselves.
fn requests() -> Vec<Request> {
    let text = |seed: u64| {
        let phrase = prompt(seed, 7);
        phrase.iter().cycle().take(20 + seed as usize).copied().collect::<Vec<_>>()
    };
    let penalised = SamplingParams {
        presence_penalty: 0.5,
        frequency_penalty: 0.3,
        repetition_penalty: 1.1,
        ..greedy(40)
    };
    let cold = SamplingParams { temperature: 0.3, logprobs: Some(3), ..sampled(40) };
    let biased = (3..10).map(|byte| (byte, 20.0)).collect();
    let all = [
        greedy(60),
        SamplingParams { n: 3, ..cold.clone() },
        SamplingParams { top_k: Some(3), top_p: 0.9, min_p: 0.05, ..cold.clone() },
        penalised,
        // Few tokens are ever drawn, one of which ends the answer, but not before the twelfth.
        SamplingParams {
            logit_bias: biased,
            stop_token_ids: vec![5],
            min_tokens: 12,
            ..sampled(50)
        },
        SamplingParams { stop: vec!["ab".into(), "e".into()], min_tokens: 5, ..greedy(50) },
        // To the end of the context.
        SamplingParams { max_tokens: None, ..greedy(1) },
        SamplingParams { max_tokens: Some(1), ..cold.clone() },
    ];
    let requests = (0..).zip(all).map(|(seed, params)| Request::new(text(seed), params));
    // Prompts that are scored beside guesses, in chunks where the budget is small.
    let asked = |seed: u64, len| Request {
        prompt_logprobs: Some(2),
        logprobs_mode: LogprobsMode::Processed,
        ..Request::new(prompt(seed, len), cold.clone())
    };
    let read = Request { continuation: Continuation::Omit, ..asked(41, 70) };
    requests.chain([asked(40, 90), read]).collect()
}

/// What the requests are answered under these settings, the steps it took, and the preemptions.
fn answers(change: impl FnOnce(&mut EngineConfig)) -> (Answers, SpeculationStats, [usize; 2]) {
    let mut engine = load_with_text(change);
    for request in requests() {
        engine.add(request).unwrap();
    }
    let (mut events, mut steps) = (Vec::new(), 0);
    while engine.has_work() {
        events.extend(engine.step().unwrap());
        steps += 1;
    }
    assert_eq!(engine.stats().used_blocks, 0);
    let preemptions = engine.stats().preemptions as usize;
    (collect(events), engine.speculation(), [steps, preemptions])
}

#[test]
fn an_answer_is_the_same_with_guesses_and_takes_fewer_steps() {
    let (want, none, [steps, _]) = answers(|c| c.speculation = Speculation::off());
    assert_eq!((none.guessed, want.len()), (0, 12));
    let (got, ..) = answers(|_| {});
    assert_eq!(got, want, "whatever is worth it on this processor");
    let settings: [fn(&mut EngineConfig); 4] = [
        |c| c.speculation.run = RunGuesses::All,
        |c| {
            c.speculation = Speculation { max_guesses: 64, ..every_guess() };
            c.max_num_seqs = 3;
        },
        |c| {
            c.speculation = every_guess();
            c.prefix_cache = PrefixCache::Off;
            c.max_num_batched_tokens = 17;
        },
        // Hardly more than the longest answer needs.
        |c| {
            c.speculation = every_guess();
            c.kv_cache_memory_bytes = Some(17 * 6 * 1024);
        },
    ];
    for (number, change) in settings.into_iter().enumerate() {
        let (got, guesses, [taken, preemptions]) = answers(change);
        let facts = |answers: &Answers| {
            let of = |a: &Answer| {
                let finished = (a.finished.reason, a.finished.stop_reason.clone());
                (a.tokens.clone(), a.finished.text.clone(), finished)
            };
            answers.values().map(of).collect::<Vec<_>>()
        };
        assert_eq!(facts(&got), facts(&want), "settings {number}");
        assert!(guesses.accepted < guesses.guessed, "settings {number}: {guesses:?}");
        assert!(guesses.accepted > 50, "settings {number}: {guesses:?}");
        // Where few run at once or memory is short, there are more steps than without limits.
        assert!(number > 0 || taken < steps, "{taken} steps, {steps} without guesses");
        assert!(number > 0 || got == want, "found in the cache, too");
        assert!(number < 3 || preemptions > 0, "nothing was preempted");
    }
}

#[test]
fn a_grammar_is_followed_to_the_same_token() {
    let answers = |speculation: Speculation| {
        let mut engine = load_with_text(|c| c.speculation = speculation);
        let tokenizer = engine.tokenizer().unwrap().clone();
        let (words, eos) = (engine.model().vocab_size, engine.eos().to_vec());
        let compiler = GrammarCompiler::new(&tokenizer, words, &eos).unwrap();
        let schema = json!({
            "type": "array",
            "items": {"type": "object", "properties": {"yes": {"type": "boolean"}},
                      "required": ["yes"], "additionalProperties": false},
        });
        let grammars = [
            Grammar::JsonSchema { schema, unknown: UnknownKeywords::Refuse },
            Grammar::Regex("(abc){3,20}".into()),
            Grammar::Choice(vec!["aaaa".into(), "aaab".into()]),
        ];
        for grammar in grammars {
            let constraint = Some(compiler.compile(&grammar).unwrap());
            for params in [greedy(70), SamplingParams { n: 2, logprobs: Some(2), ..sampled(70) }] {
                let request = Request::new(prompt(3, 9), params);
                engine.add(Request { constraint: constraint.clone(), ..request }).unwrap();
            }
        }
        (drain(&mut engine), engine.speculation())
    };
    let (want, _) = answers(Speculation::off());
    assert_eq!(want.len(), 9);
    assert!(want.values().all(|answer| answer.finished.error.is_none()), "{want:?}");
    assert_eq!(answers(Speculation::default()).0, want);
    let (got, guesses) = answers(every_guess());
    assert_eq!(got, want);
    assert!(guesses.accepted > 20 && guesses.accepted < guesses.guessed, "{guesses:?}");
}

#[test]
fn a_panic_beside_guesses_ends_its_own_request_only() {
    let run = |speculation: Speculation| {
        let mut engine = load_with_text(|c| c.speculation = speculation);
        let poison = prompt(90, 12);
        let mark = poison.clone();
        engine.inject_fault(move |batch| {
            assert!(!batch.iter().any(|tokens| tokens.starts_with(&mark) && tokens.len() > 15));
        });
        for request in requests() {
            engine.add(request).unwrap();
        }
        let bad = engine.add(Request::new(poison, greedy(20))).unwrap();
        let mut answers = drain_contained(&mut engine);
        let ended = answers.remove(&(bad, 0)).unwrap();
        assert!(ended.finished.error.is_some());
        (answers, engine.speculation().accepted)
    };
    let ((want, _), (got, accepted)) = (run(Speculation::off()), run(every_guess()));
    assert_eq!(got, want);
    assert!(accepted > 50);
}

#[test]
fn a_text_that_was_only_guessed_is_nobodys_fault() {
    let (want, ..) = answers(|c| c.speculation = Speculation::off());
    let mut engine = load_with_text(|c| c.speculation = every_guess());
    let mut texts: Vec<Vec<u32>> = Vec::new();
    for (number, request) in (0..).zip(requests()) {
        let id = engine.add(request.clone()).unwrap();
        assert_eq!(id.0, number);
        let samples = want.range((id, 0)..=(id, usize::MAX));
        texts.extend(samples.map(|(_, answer)| [&request.prompt[..], &answer.tokens()].concat()));
    }
    let faults = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&faults);
    engine.inject_fault(move |batch| {
        let real = |tokens: &[u32]| texts.iter().any(|text| text.starts_with(tokens));
        if !batch.iter().all(|tokens| real(tokens)) {
            counted.fetch_add(1, Ordering::Relaxed);
            panic!("a text that is nobody's");
        }
    });
    assert_eq!(drain_contained(&mut engine), want);
    assert!(faults.load(Ordering::Relaxed) > 10);
}
