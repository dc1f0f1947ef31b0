//! Panics in a step: who is ended, who goes on, and when the engine is given up.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use engine::{
    Engine, Event, FinishReason, Request, SampleError, SamplingParams, Sent, Service, Sink,
};

use crate::support::{
    Model, answer, collect, drain, drain_contained, greedy, load, load_with_text, prompt, sampled,
};

/// A token that only prompts which make a step panic begin with.
const POISON: u32 = 300;
const ALONE: &str = "a step panicked on this request";

/// Panics for each batch that holds a sequence beginning with [`POISON`].
fn poisonous(batch: &[&[u32]]) {
    assert!(batch.iter().all(|tokens| tokens[0] != POISON), "poison");
}

/// `len` tokens that begin with [`POISON`].
fn poison(seed: u64, len: usize) -> Vec<u32> {
    [&[POISON], &prompt(seed, len - 1)[..]].concat()
}

/// Good requests, some of which share a prefix, and where poison joins them.
fn good(i: u64) -> Request {
    let text = [prompt(i / 2, 40), prompt(100 + i, 7 * i as usize)].concat();
    let params = SamplingParams { seed: Some(i), n: 1 + (i % 2) as usize, ..sampled(24) };
    Request::new(text, params)
}

/// Adds the good requests, a few steps apart, each followed by `bad` if it gives one.
fn run(engine: &mut Engine, bad: impl Fn(u64) -> Option<Request>) -> Vec<Event> {
    let mut events = Vec::new();
    for i in 0..8 {
        engine.add(good(i)).unwrap();
        if let Some(bad) = bad(i) {
            engine.add(bad).unwrap();
        }
        events.extend(engine.step_contained().unwrap());
        events.extend(engine.step_contained().unwrap());
    }
    while engine.has_work() {
        events.extend(engine.step_contained().unwrap());
    }
    events
}

#[test]
fn a_panic_ends_its_requests_and_the_others_get_the_same_tokens() {
    // Little memory and little budget: preemptions, chunked prompts, prefixes shared within a step.
    let small = || {
        load(Model::Llama, |c| {
            c.max_num_batched_tokens = 48;
            c.kv_cache_memory_bytes = Some(1 << 18);
        })
    };
    let mut engine = small();
    let bits = |events: Vec<Event>| {
        let answers = collect(events).into_values();
        let bits = answers.filter(|a| a.finished.error.is_none()).map(|a| {
            let tokens = a.tokens.iter().map(|t| (t.token, t.logprob.to_bits()));
            (tokens.collect::<Vec<_>>(), a.finished.reason, a.finished.sample)
        });
        bits.collect::<Vec<_>>()
    };
    let expected = bits(run(&mut small(), |_| None));
    assert_eq!(expected.len(), 12);
    engine.inject_fault(poisonous);
    let events = run(&mut engine, |i| {
        let params = SamplingParams { n: 1 + (i % 3) as usize, ..sampled(9) };
        (i % 3 == 1).then(|| Request::new(poison(i, 30), params))
    });
    let failed: Vec<_> = events
        .iter()
        .filter_map(|event| match event {
            Event::Finished(end) => end.error.as_ref().map(|error| (end.reason, error.why())),
            Event::Token(_) => None,
        })
        .collect();
    assert_eq!(failed, [(FinishReason::Abort, ALONE); 6]);
    assert_eq!(bits(events), expected);
    assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));
    drop(engine.begin_update().unwrap());
}

#[test]
fn a_panic_that_does_not_come_again_ends_nobody() {
    let mut engine = load(Model::Llama, |_| {});
    let expected = answer(&mut engine, &prompt(1, 30), &greedy(6));
    let mut calls = 0;
    engine.inject_fault(move |_| {
        calls += 1;
        assert!(calls != 3, "once");
    });
    let id = engine.add(Request::new(prompt(1, 30), greedy(6))).unwrap();
    let again = drain_contained(&mut engine).remove(&(id, 0)).unwrap();
    assert_eq!((again.tokens(), again.finished.error), (expected.tokens(), None));
}

#[test]
fn panics_that_no_request_is_to_blame_for_end_the_engine() {
    for (bad, why) in [
        // Only together.
        (2, "a step panicked twice"),
        (1, "a step panicked for each of its requests"),
    ] {
        let mut engine = load(Model::Llama, |_| {});
        engine.inject_fault(move |batch| assert!(batch.len() < bad, "too many"));
        for seed in 0..3 {
            engine.add(Request::new(prompt(seed, 30), greedy(6))).unwrap();
        }
        assert_eq!(engine.step_contained().unwrap_err().to_string(), why);
    }
}

/// A sink that hands every event on, and the other end of it.
fn sink() -> (Sink, std::sync::mpsc::Receiver<Event>) {
    let (sender, receiver) = channel();
    let sink = move |event| match sender.send(event) {
        Ok(()) => Sent::Ok,
        Err(_) => Sent::Gone,
    };
    (Box::new(sink), receiver)
}

#[test]
fn a_service_lives_on_after_contained_panics() {
    let mut engine = load_with_text(|_| {});
    engine.inject_fault(poisonous);
    let service = Service::start(engine).unwrap();
    for round in 0..3 {
        let (good_sink, good_events) = sink();
        let (bad_sink, bad_events) = sink();
        let good = service.submit(Request::new(prompt(1, 30), greedy(40)), good_sink).unwrap();
        let bad = service.submit(Request::new(poison(round, 30), greedy(40)), bad_sink).unwrap();
        let answers = collect(good_events);
        assert_eq!(answers[&(good, 0)].tokens.len(), 40);
        let end = &collect(bad_events)[&(bad, 0)].finished;
        assert_eq!(
            (end.reason, end.error.as_ref().map(SampleError::why)),
            (FinishReason::Abort, Some(ALONE))
        );
        assert_eq!(service.status().failure, None);
    }
    let mut engine = service.stop().unwrap();
    assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));
    let whole = answer(&mut engine, &prompt(1, 30), &greedy(40));
    assert_eq!(whole.tokens.len(), 40);
    assert!(drain(&mut engine).is_empty());
}

#[test]
fn a_service_whose_engine_is_at_fault_says_so_and_ends() {
    let mut engine = load(Model::Llama, |_| {});
    let mut calls = 0;
    engine.inject_fault(move |batch| {
        calls += 1;
        assert!(batch.len() < 2 || calls < 6, "from the sixth run on");
    });
    let service = Service::start(engine).unwrap();
    let (sink, events) = sink();
    let params = SamplingParams { n: 3, ..sampled(50) };
    service.submit(Request::new(prompt(1, 30), params), sink).unwrap();
    let got: Vec<_> = events.iter().collect();
    // The sinks are dropped without ends: nothing of the answer is certain any more.
    assert!(got.iter().all(|event| matches!(event, Event::Token(_))), "{got:?}");
    let begin = Instant::now();
    while service.status().failure.is_none() {
        assert!(begin.elapsed() < Duration::from_secs(30), "no failure is reported");
    }
    assert_eq!(service.status().failure.as_deref(), Some("a step panicked twice"));
    let late = service.submit(Request::new(prompt(1, 30), greedy(1)), self::sink().0);
    assert_eq!(late.unwrap_err().to_string(), "the engine has stopped");
    assert_eq!(service.stop().err().unwrap().to_string(), "a step panicked twice");
}
