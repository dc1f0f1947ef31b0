//! What a service says of itself: that it lives, how long its samples took, and numbers that were none.

use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use engine::{
    Histogram, Host, Phase, Request, SampleError, SamplingParams, Service, Speculation, Status,
};

use crate::support::{Model, answer, collect, greedy, load, prompt, sampled, sink};

/// Waits until the service says so.
fn wait_for(service: &Service, what: impl Fn(&Status) -> bool) -> Status {
    let begun = Instant::now();
    loop {
        let status = service.status();
        if what(&status) {
            return status;
        }
        assert!(begun.elapsed() < Duration::from_secs(30), "{status:?}");
        std::thread::yield_now();
    }
}

#[test]
fn the_heart_stops_while_a_step_hangs_and_beats_again_after_it() {
    let mut engine = load(Model::Llama, |_| {});
    let (release, released) = channel::<()>();
    let (entered, hangs) = channel();
    let mut first = true;
    engine.inject_fault(move |_| {
        if std::mem::replace(&mut first, false) {
            entered.send(()).unwrap();
            released.recv().unwrap();
        }
    });
    let service = Service::start(engine).unwrap();
    assert_eq!(service.status().phase, Phase::Serving);
    let (sink, events) = sink();
    let id = service.submit(Request::new(prompt(1, 20), greedy(3)), sink).unwrap();
    hangs.recv().unwrap();
    let stopped = service.status().heartbeat;
    let status = wait_for(&service, |status| status.heartbeat.elapsed().as_millis() >= 30);
    assert_eq!((status.heartbeat, status.phase), (stopped, Phase::Serving));
    release.send(()).unwrap();
    assert_eq!(collect(events)[&(id, 0)].tokens.len(), 3);
    wait_for(&service, |status| status.heartbeat > stopped);
}

#[test]
fn the_driver_of_an_attached_engine_is_away_unless_it_steps() {
    let mut engine = load(Model::Llama, |_| {});
    let (service, mut guests) = Service::attach(&engine);
    let phase = || service.status().phase;
    assert_eq!(phase(), Phase::Away, "nobody has driven it yet");
    let mut host = Host::new(&mut engine, Some(&mut guests));
    let before = Instant::now();
    assert_eq!(host.step().unwrap(), []);
    assert_eq!(phase(), Phase::Serving);
    assert!(service.status().heartbeat >= before, "time away is no time without a beat");
    host.reborrow().serve_for(Duration::from_millis(1)).unwrap();
    host.step().unwrap();
    assert_eq!(phase(), Phase::Serving);
    let update = host.begin_update().unwrap();
    assert_eq!(phase(), Phase::Away, "an update may take minutes");
    drop(update);
    assert_eq!(phase(), Phase::Away, "a checkpoint too");
    guests.step(&mut engine).unwrap();
    assert_eq!(phase(), Phase::Serving);
    drop(Host::new(&mut engine, Some(&mut guests)));
    assert_eq!(phase(), Phase::Away);
}

#[test]
fn timings_count_each_sample_and_steps_their_tokens() {
    let engine = load(Model::Llama, |c| {
        c.max_num_batched_tokens = 16;
        // Wrong guesses are computed too.
        c.speculation = Speculation::off();
    });
    let service = Service::start(engine).unwrap();
    let begun = Instant::now();
    let (sink, events) = sink();
    let params = SamplingParams { n: 2, ..sampled(5) };
    service.submit(Request::new(prompt(3, 40), params), sink).unwrap();
    assert_eq!(collect(events).len(), 2);
    let timings = service.timings();
    let whole = begun.elapsed().as_secs_f64();
    let phases = [&timings.queue, &timings.prefill, &timings.decode, &timings.inference];
    assert_eq!(phases.map(Histogram::count), [2; 4]);
    let [queue, prefill, decode, inference] = phases.map(Histogram::sum);
    assert!((prefill + decode - inference).abs() < 1e-6, "{prefill} {decode} {inference}");
    assert!(queue > 0.0 && queue + inference <= 2.0 * whole, "{queue} {inference} {whole}");
    // Every position but the last of each sample is computed: the prompt's two whole blocks for both.
    let tokens = timings.step_tokens.sum();
    let computed = 40.0 + 2.0 * 4.0 + 8.0;
    assert!(tokens == computed || tokens == computed + 32.0, "{tokens} tokens");
    let largest = timings.step_tokens.cumulative().find(|(_, below)| *below > 0).unwrap();
    assert!(timings.step_tokens.count() >= 7 && largest.0 <= 16.0, "{timings:?}");
}

#[test]
fn numbers_that_are_none_are_counted_and_do_not_stay_in_the_blocks() {
    let few = || {
        load(Model::Qwen3, |c| {
            c.max_model_len = Some(160);
            c.kv_cache_memory_bytes = Some(1 << 17);
        })
    };
    let mut engine = few();
    let blocks = engine.stats().total_blocks;
    assert_eq!(blocks, 10);
    crate::spoil(&mut engine, 77, f32::NAN);
    let mut bad = prompt(5, 16 * blocks - 8);
    bad[3] = 77;
    let service = Service::start(engine).unwrap();
    let (sink, events) = sink();
    let params = SamplingParams { n: 1, ..greedy(4) };
    let id = service.submit(Request::new(bad, params.clone()), sink).unwrap();
    let failed = collect(events).remove(&(id, 0)).unwrap();
    assert_eq!(
        failed.finished.error.as_ref().map(SampleError::why),
        Some("the model's logits are not finite numbers")
    );
    let status = wait_for(&service, |status| status.running == 0);
    assert_eq!((status.nan_logits, status.failure), (1, None));
    // Every block held what was computed from the bad row.
    let mut engine = service.stop().unwrap();
    let mut good = prompt(6, 16 * blocks - 8);
    good.iter_mut().for_each(|token| *token %= 77);
    let bias = SamplingParams { logit_bias: vec![(77, -100.0)], ..params };
    let bits = |engine: &mut engine::Engine| {
        let answer = answer(engine, &good, &bias);
        answer.tokens.iter().map(|t| (t.token, t.logprob.to_bits())).collect::<Vec<_>>()
    };
    let got = bits(&mut engine);
    assert_eq!((got.len(), &got), (4, &bits(&mut few())));
    assert_eq!(engine.nan_logits(), 1);
}
