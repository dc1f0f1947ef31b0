//! The engine on its thread: concurrent callers, callers that leave, its end.

use std::sync::mpsc::{TryRecvError, channel};

use engine::{
    ErrorKind, Event, FinishReason, PrefixCache, Request, SamplingParams, Sent, Service, Sink,
};

use crate::support::{
    Answer, Model, answer, collect, greedy, load, load_with_text, prompt, request_error, sampled,
    sink,
};

/// What does not depend on the number a request has been given.
fn facts(answer: &Answer) -> (Vec<(u32, u32, String)>, String, FinishReason) {
    let tokens = answer.tokens.iter().map(|t| (t.token, t.logprob.to_bits(), t.text.clone()));
    (tokens.collect(), answer.text(), answer.finished.reason)
}

/// Request `i` of caller `caller`: lengths, parameters and prompts differ, some prompts are shared.
fn request(caller: u64, i: u64) -> Request {
    let mut params = match i % 3 {
        0 => sampled(20),
        1 => greedy(12),
        _ => SamplingParams { top_p: 0.8, stop: vec!["e".to_owned()], ..sampled(30) },
    };
    params.n = 1 + (i % 2) as usize;
    params.seed = Some(caller * 100 + i);
    Request::new(prompt(i, 10 + 11 * i as usize), params)
}

#[test]
fn eight_threads_get_what_the_synchronous_engine_gives() {
    const CALLERS: u64 = 8;
    const REQUESTS: u64 = 6;
    let service = Service::start(load_with_text(|c| c.max_num_batched_tokens = 96)).unwrap();
    let run = |caller: u64| {
        let receivers: Vec<_> = (0..REQUESTS)
            .map(|i| {
                let (sink, receiver) = sink();
                (service.submit(request(caller, i), sink).unwrap(), receiver)
            })
            .collect();
        let answers = receivers.into_iter().map(|(id, receiver)| {
            let answers = collect(receiver);
            assert!(answers.keys().all(|key| key.0 == id), "events of another request");
            answers.values().map(facts).collect::<Vec<_>>()
        });
        answers.collect::<Vec<_>>()
    };
    let all: Vec<_> = std::thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> = (0..CALLERS).map(|c| scope.spawn(move || run(c))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut engine = service.stop().unwrap();
    assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));
    let mut alone = load_with_text(|c| c.prefix_cache = PrefixCache::Off);
    for (caller, answers) in all.iter().enumerate() {
        for (i, samples) in answers.iter().enumerate() {
            let request = request(caller as u64, i as u64);
            assert_eq!(samples.len(), request.params.n);
            let id = alone.add(request).unwrap();
            let expected = crate::support::drain(&mut alone);
            for (sample, facts_) in samples.iter().enumerate() {
                assert_eq!(facts_, &facts(&expected[&(id, sample)]), "{caller} {i} {sample}");
            }
        }
    }
    // The engine that comes back goes on.
    let again = answer(&mut engine, &prompt(1, 21), &greedy(12));
    assert_eq!(again.tokens().len(), 12);
}

#[test]
fn bad_requests_are_answered_and_their_sink_is_dropped() {
    let service = Service::start(load(Model::Llama, |_| {})).unwrap();
    let (sink, events) = sink();
    let error = request_error(service.submit(Request::new(vec![], greedy(1)), sink));
    assert_eq!(error, "prompt has 0 tokens, limit is at least 1");
    assert_eq!(events.recv().ok(), None);
    let stops = SamplingParams { stop: vec!["x".to_owned()], ..greedy(1) };
    let error = request_error(service.submit(Request::new(vec![5], stops), self::sink().0));
    assert_eq!(error, "stop strings need a tokenizer, the model has none");
}

#[test]
fn a_sink_that_is_gone_aborts_its_request_only() {
    let service = Service::start(load(Model::Llama, |_| {})).unwrap();
    let long = SamplingParams { n: 2, ..sampled(200) };
    let (sender, leaver) = channel();
    let mut tokens = 0;
    let leave_after_two: Sink = Box::new(move |event| {
        tokens += usize::from(matches!(event, Event::Token(_)));
        sender.send(event).unwrap();
        if tokens < 2 { Sent::Ok } else { Sent::Gone }
    });
    let (sink, stayer) = sink();
    let stays = service.submit(Request::new(prompt(2, 20), sampled(100)), sink).unwrap();
    service.submit(Request::new(prompt(1, 20), long), leave_after_two).unwrap();
    let left = collect(leaver);
    assert_eq!(left.len(), 2);
    for answer in left.values() {
        assert_eq!((answer.finished.reason, &answer.finished.error), (FinishReason::Abort, &None));
        assert!(answer.tokens.len() <= 2, "{} tokens for nobody", answer.tokens.len());
    }
    let stayed = collect(stayer);
    assert_eq!(stayed[&(stays, 0)].tokens.len(), 100);
    assert_eq!(stayed[&(stays, 0)].finished.reason, FinishReason::Length);
    let stats = service.stop().unwrap().stats();
    assert_eq!((stats.used_blocks, stats.aborted, stats.finished), (0, 2, 1));
}

#[test]
fn a_caller_can_abort() {
    let service = Service::start(load(Model::Llama, |_| {})).unwrap();
    // The first token holds the thread up until the abort is on its way.
    let (go, wait) = channel();
    let (mut pass_on, events) = sink();
    let sink: Sink = Box::new(move |event| {
        // Sent once: later events find the channel closed.
        let _sent = wait.recv();
        pass_on(event)
    });
    let id = service.submit(Request::new(prompt(1, 20), sampled(236)), sink).unwrap();
    service.abort(engine::RequestId(id.0 + 1000));
    service.abort(id);
    go.send(()).unwrap();
    drop(go);
    let answers = collect(events);
    let answer = &answers[&(id, 0)];
    assert_eq!(answer.finished.reason, FinishReason::Abort);
    assert!(answer.tokens.len() <= 1, "{} tokens", answer.tokens.len());
    service.abort(id);
    assert_eq!(service.stop().unwrap().stats().aborted, 1);
}

#[test]
fn the_thread_ends_with_the_service() {
    let service = Service::start(load(Model::Llama, |c| c.max_num_seqs = 2)).unwrap();
    let params = SamplingParams { n: 3, ..sampled(236) };
    let submit = |_| {
        let (sink, events) = sink();
        (service.submit(Request::new(prompt(1, 20), params.clone()), sink).unwrap(), events)
    };
    // Far more than can be done before the service is dropped.
    let open: Vec<_> = (0..200).map(submit).collect();
    drop(service);
    let mut aborted = 0;
    for (id, events) in open {
        let mut got = Vec::new();
        // The thread owns the sinks: none is left the moment `drop` returns.
        let end = loop {
            match events.try_recv() {
                Ok(event) => got.push(event),
                Err(end) => break end,
            }
        };
        assert_eq!(end, TryRecvError::Disconnected, "the thread outlives its service");
        let answers = collect(got);
        assert_eq!(answers.len(), 3, "no sample is left without an end");
        for answer in answers.values() {
            assert_eq!(answer.finished.request, id);
            aborted += usize::from(answer.finished.reason == FinishReason::Abort);
        }
    }
    assert!(aborted > 0, "all was done before the service was dropped");

    let idle = Service::start(load(Model::Llama, |_| {})).unwrap();
    let mut engine = idle.stop().unwrap();
    engine.add(Request::new(prompt(1, 20), greedy(4))).unwrap();
    let error = engine.begin_update().err().unwrap();
    assert!(matches!(error.kind(), ErrorKind::Busy(_)));
}
