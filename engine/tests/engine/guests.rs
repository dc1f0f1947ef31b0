//! An engine that its owner drives and that serves others meanwhile.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use engine::decoder::ParamMut;
use engine::{
    Dtype, Engine, Event, FinishReason, Guests, Host, Request, RequestId, SamplingParams, Sent,
    Service, Sink, Speculation, Token, WeightsUpdate,
};

use crate::support::{Answers, Model, answer, collect, greedy, load, prompt, sampled, sink};

/// Submits from another thread, as a server does, while the engine is driven here.
fn submit(
    service: &Service,
    (guests, engine): (&mut Guests, &mut Engine),
    request: Request,
) -> (RequestId, Receiver<Event>) {
    let (sink, events) = sink();
    let known = |engine: &Engine| engine.load_counts().0 + engine.load_counts().1;
    let before = known(engine);
    let id = std::thread::scope(|scope| {
        let asked = scope.spawn(|| service.submit(request, sink).unwrap());
        // Taken in by one step; more would run ahead while the other thread is slow to return.
        while !asked.is_finished() {
            match known(engine) > before {
                true => std::thread::yield_now(),
                false => assert_eq!(guests.step(engine).unwrap(), []),
            }
        }
        asked.join().unwrap()
    });
    (id, events)
}

/// Writes other norms, which changes keys, values and logits.
fn disturb(mut update: WeightsUpdate<'_>) {
    let (decoder, kernels) = update.decoder();
    let params: Vec<ParamMut<'_>> = decoder.weights.params_mut().collect();
    for mut param in params {
        if let ParamMut::Vector(vector) = &param {
            let values: Vec<f32> = (0..vector.len()).map(|i| 0.5 + (i % 5) as f32 / 4.0).collect();
            param.write(kernels, Dtype::F32, &values);
        }
    }
}

fn bits(tokens: &[Token]) -> Vec<(u32, u32)> {
    tokens.iter().map(|t| (t.token, t.logprob.to_bits())).collect()
}

#[test]
fn a_guest_goes_on_with_the_new_weights_and_reads_nothing_of_the_old() {
    let f32s = || load(Model::Llama, |c| c.dtype = Some(Dtype::F32));
    let mut engine = f32s();
    let (service, mut guests) = Service::attach(&engine);
    let text = prompt(1, 50);
    let asked = Request::new(text.clone(), sampled(40));
    let (id, events) = submit(&service, (&mut guests, &mut engine), asked.clone());
    let mut got = Vec::new();
    while got.len() < 10 {
        guests.step(&mut engine).unwrap();
        got.extend(events.try_iter());
    }
    let old = got.len();
    // Two updates in a row, with no step between.
    let host = Host::new(&mut engine, Some(&mut guests));
    drop(host.begin_update().unwrap());
    disturb(Host::new(&mut engine, Some(&mut guests)).begin_update().unwrap());
    let (second_id, second) = submit(&service, (&mut guests, &mut engine), asked);
    while engine.has_work() {
        guests.step(&mut engine).unwrap();
    }
    assert_eq!((service.status().version.0, service.status().stats.used_blocks), (2, 0));
    got.extend(events.try_iter());
    let whole = collect(got).remove(&(id, 0)).unwrap();
    assert_eq!((whole.tokens.len(), whole.finished.reason), (40, FinishReason::Length));
    let versions: Vec<u64> = whole.tokens.iter().map(|token| token.version.0).collect();
    assert_eq!(versions, [vec![0; old], vec![2; 40 - old]].concat());

    let mut fresh = f32s();
    let before = answer(&mut fresh, &text, &sampled(40));
    assert_eq!(bits(&whole.tokens[..old]), bits(&before.tokens[..old]));
    let mut fresh = f32s();
    disturb(fresh.begin_update().unwrap());
    let known = [text.clone(), whole.tokens().drain(..old).collect()].concat();
    let rest = answer(&mut fresh, &known, &sampled(40 - old));
    assert_eq!(bits(&whole.tokens[old..]), bits(&rest.tokens));
    assert_ne!(bits(&whole.tokens[old..]), bits(&before.tokens[old..]), "nothing was written");
    let second = collect(second.try_iter()).remove(&(second_id, 0)).unwrap();
    assert_eq!(bits(&second.tokens), bits(&answer(&mut fresh, &text, &sampled(40)).tokens));
}

/// The owner's requests, with seeds as a trainer gives them.
fn own(engine: &mut Engine) -> Vec<RequestId> {
    let params = |seed| SamplingParams { seed: Some(seed), n: 3, ..sampled(30) };
    let add = |seed| engine.add(Request::new(prompt(seed, 30), params(seed))).unwrap();
    (0..4).map(add).collect()
}

#[test]
fn the_owner_gets_its_own_events_and_the_same_tokens_as_alone() {
    let small = || load(Model::Llama, |c| c.kv_cache_memory_bytes = Some(1 << 18));
    let tokens = |answers: Answers| -> Vec<_> {
        answers.values().map(|answer| bits(&answer.tokens)).collect()
    };
    let mut alone = small();
    own(&mut alone);
    let expected = tokens(crate::support::drain(&mut alone));

    let mut engine = small();
    let (service, mut guests) = Service::attach(&engine);
    let params = SamplingParams { n: 4, ..sampled(60) };
    let (guest, events) =
        submit(&service, (&mut guests, &mut engine), Request::new(prompt(9, 20), params));
    let ids = own(&mut engine);
    // Nobody outside can end what is the owner's.
    service.abort(ids[0]);
    let mut got = Vec::new();
    while engine.has_work() {
        got.extend(Host::new(&mut engine, Some(&mut guests)).step().unwrap());
    }
    assert!(got.iter().all(|event| ids.contains(&event.request())));
    assert_eq!(tokens(collect(got)), expected);
    let served = collect(events.try_iter());
    assert!(served.keys().all(|key| key.0 == guest));
    assert!(served.len() == 4 && served.values().all(|answer| answer.tokens.len() == 60));
}

#[test]
fn a_guest_that_makes_a_step_panic_is_ended_and_the_owner_goes_on() {
    let mut engine = load(Model::Llama, |_| {});
    own(&mut engine);
    let expected =
        collect(std::iter::from_fn(|| engine.has_work().then(|| engine.step().unwrap())).flatten());
    let expected: Vec<_> = expected.values().map(|answer| bits(&answer.tokens)).collect();
    engine.inject_fault(|batch| assert!(batch.iter().all(|tokens| tokens[0] != 300), "poison"));
    let (service, mut guests) = Service::attach(&engine);
    own(&mut engine);
    let (sink, events) = sink();
    let mut got = Vec::new();
    let id = std::thread::scope(|scope| {
        let bad = Request::new(vec![300, 4, 5], greedy(9));
        let asked = scope.spawn(|| service.submit(bad, sink).unwrap());
        while engine.has_work() || !asked.is_finished() {
            got.extend(Host::new(&mut engine, Some(&mut guests)).step().unwrap());
        }
        asked.join().unwrap()
    });
    while engine.has_work() {
        got.extend(Host::new(&mut engine, Some(&mut guests)).step().unwrap());
    }
    let got: Vec<_> = collect(got).values().map(|answer| bits(&answer.tokens)).collect();
    assert_eq!(got, expected);
    let end = &collect(events.try_iter())[&(id, 0)].finished;
    assert!(end.error.is_some() && end.reason == FinishReason::Abort, "{end:?}");
    assert_eq!(service.status().failure, None);
}

#[test]
fn lingering_ends_with_the_service_and_submitting_with_the_guests() {
    let mut engine = load(Model::Llama, |_| {});
    let (service, mut guests) = Service::attach(&engine);
    let answered = std::thread::spawn(move || {
        let (sink, events) = sink();
        service.submit(Request::new(prompt(1, 20), greedy(25)), sink).unwrap();
        let answers = collect(events.iter());
        // Aborted when the service goes; the first token holds the engine up until it has gone.
        let (gone, wait) = channel::<()>();
        let (mut pass_on, events) = self::sink();
        let sink: Sink = Box::new(move |event| {
            // Nothing is ever sent: it ends when the other end is dropped.
            let _gone = wait.recv();
            pass_on(event)
        });
        service.submit(Request::new(prompt(1, 20), sampled(200)), sink).unwrap();
        drop(service);
        drop(gone);
        (answers, collect(events.iter()))
    });
    guests.linger(&mut engine).unwrap();
    drop(guests);
    let (answers, late) = answered.join().unwrap();
    assert_eq!(answers.values().next().unwrap().tokens.len(), 25);
    assert_eq!(late.values().next().unwrap().finished.reason, FinishReason::Abort);
    assert_eq!((engine.stats().used_blocks, engine.has_work()), (0, false));

    let (service, guests) = Service::attach(&engine);
    drop(guests);
    let error = service.submit(Request::new(prompt(1, 20), greedy(1)), sink().0).unwrap_err();
    assert_eq!(error.to_string(), "the engine has stopped");
    let error = service.stop().err().unwrap();
    assert_eq!(error.to_string(), "the engine belongs to whoever drives it");
}

#[test]
fn the_end_of_a_step_is_told_once_and_after_all_its_events() {
    // A token a sample and step.
    let mut engine = load(Model::Llama, |c| c.speculation = Speculation::off());
    let (service, mut guests) = Service::attach(&engine);
    let events = [1, 2].map(|n| {
        let request = Request::new(prompt(n as u64, 20), SamplingParams { n, ..sampled(40) });
        submit(&service, (&mut guests, &mut engine), request).1
    });
    guests.step(&mut engine).unwrap();
    let tokens = move || -> usize {
        let new = events.iter().flat_map(Receiver::try_iter);
        new.filter(|event| matches!(event, Event::Token(_))).count()
    };
    assert!(tokens() > 2);
    let (tell, told) = channel();
    service.after_events(Box::new(move || {
        tell.send(tokens()).unwrap();
        Sent::Ok
    }));
    let held = Arc::new(());
    let hold = Arc::clone(&held);
    service.after_events(Box::new(move || {
        let _hold = &hold;
        Sent::Gone
    }));
    for _ in 0..10 {
        // The first request may have ended while the second was handed in.
        let running = engine.load_counts().0;
        assert!(running >= 2);
        guests.step(&mut engine).unwrap();
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [running]);
        assert_eq!(Arc::strong_count(&held), 1, "one that has gone is dropped");
    }
    drop(guests);
    assert!(told.recv().is_err(), "dropped with the guests");
}

#[test]
fn requests_whose_owner_has_left_before_they_are_taken_in_end_at_once() {
    let mut engine = load(Model::Llama, |_| {});
    let (service, mut guests) = Service::attach(&engine);
    let (one, events) = sink();
    let (tell, told) = channel();
    // Waits for nobody, though nobody drives the engine.
    service.submit_all_then(
        vec![(Request::new(prompt(1, 20), greedy(10)), one)],
        Box::new(move |taken| {
            tell.send(taken.unwrap().len()).unwrap();
            Sent::Gone
        }),
    );
    guests.step(&mut engine).unwrap();
    assert_eq!(told.recv(), Ok(1));
    let answers = collect(events.iter());
    let answer = answers.values().next().unwrap();
    assert_eq!((answer.tokens.len(), answer.finished.reason), (0, FinishReason::Abort));
    assert!(!engine.has_work());
    drop(guests);
    service.submit_all_then(
        Vec::new(),
        Box::new(|_taken| unreachable!("it is dropped with the engine")),
    );
}
