//! How long the samples of a service waited, read their prompts and wrote their answers, and how large
//! steps were.
//!
//! The engine itself has no clock: whoever steps it says when a step began, and notes what came of it.
//! Bounds are those of vLLM's series of the same names, in seconds and tokens.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;

use crate::histogram::Histogram;
use crate::request::{Event, RequestId};

/// Upper bounds of a sample's times, in seconds.
const SECONDS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Upper bounds of a step's tokens.
const STEP_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// What has been measured since the start, of a service's own requests; times in seconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Timings {
    /// From asking to the beginning of the first step that computed something of the sample.
    pub queue: Histogram,
    /// From there to its first token.
    pub prefill: Histogram,
    /// From its first to its last token.
    pub decode: Histogram,
    /// From the beginning of its first step to its last token.
    pub inference: Histogram,
    /// Tokens a step computed, those of prompts too; steps of a host's requests are counted as well.
    pub step_tokens: Histogram,
}

impl Timings {
    pub(crate) fn new() -> Self {
        Self {
            queue: Histogram::new(SECONDS),
            prefill: Histogram::new(SECONDS),
            decode: Histogram::new(SECONDS),
            inference: Histogram::new(SECONDS),
            step_tokens: Histogram::new(STEP_TOKENS),
        }
    }
}

/// What a step computed.
pub(crate) struct Batch<'a> {
    /// Samples that it computed something of for the first time.
    pub(crate) begun: &'a [(RequestId, usize)],
    /// Tokens, those of prompts too; 0 when nothing ran.
    pub(crate) tokens: usize,
}

/// What is known of a sample that has not ended.
#[derive(Clone, Copy, Debug)]
struct SampleTimes {
    asked: Instant,
    begun: Option<Instant>,
    /// When its first and its last token came.
    tokens: Option<(Instant, Instant)>,
}

/// Measures the samples of a service's requests.
pub(crate) struct Stopwatch {
    timings: Arc<Mutex<Timings>>,
    samples: HashMap<(RequestId, usize), SampleTimes>,
}

impl Stopwatch {
    /// Measures into `timings`.
    pub(crate) fn new(timings: Arc<Mutex<Timings>>) -> Self {
        Self { timings, samples: HashMap::new() }
    }

    /// A request of so many samples was handed in at `asked`.
    pub(crate) fn asked(&mut self, id: RequestId, samples: usize, asked: Instant) {
        let sample = SampleTimes { asked, begun: None, tokens: None };
        self.samples.extend((0..samples).map(|index| ((id, index), sample)));
    }

    /// A step that began at `begun` computed this.
    pub(crate) fn step(&mut self, begun: Instant, batch: &Batch<'_>) {
        if batch.tokens > 0 {
            self.timings.lock().step_tokens.add(batch.tokens as f64);
        }
        for key in batch.begun {
            if let Some(sample) = self.samples.get_mut(key) {
                sample.begun.get_or_insert(begun);
            }
        }
    }

    /// An event came at `now`. What a sample has not reached when it ends is not counted.
    pub(crate) fn event(&mut self, event: &Event, now: Instant) {
        match event {
            Event::Token(token) => {
                if let Some(sample) = self.samples.get_mut(&(token.request, token.sample)) {
                    sample.tokens = Some((sample.tokens.map_or(now, |(first, _)| first), now));
                }
            }
            Event::Finished(end) => {
                if let Some(sample) = self.samples.remove(&(end.request, end.sample)) {
                    self.ended(&sample);
                }
            }
        }
    }

    fn ended(&self, sample: &SampleTimes) {
        let Some(begun) = sample.begun else { return };
        let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        let mut timings = self.timings.lock();
        timings.queue.add(seconds(sample.asked, begun));
        if let Some((first, last)) = sample.tokens {
            timings.prefill.add(seconds(begun, first));
            timings.decode.add(seconds(first, last));
            timings.inference.add(seconds(begun, last));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use scheduler::WeightsVersion;

    use super::*;
    use crate::request::{FinishReason, Finished, Token};

    const REQUEST: RequestId = RequestId(4);

    fn token(sample: usize) -> Event {
        Event::Token(Token {
            request: REQUEST,
            sample,
            token: 1,
            text: String::new(),
            logprob: 0.0,
            raw_logprob: 0.0,
            entropy: 0.0,
            top: Vec::new(),
            version: WeightsVersion(0),
            prompt: None,
        })
    }

    fn end(sample: usize) -> Event {
        Event::Finished(Finished {
            request: REQUEST,
            sample,
            reason: FinishReason::Length,
            stop_reason: None,
            text: String::new(),
            cached_tokens: 0,
            error: None,
            prompt: None,
        })
    }

    #[test]
    fn times_are_those_between_the_stations_of_a_sample() {
        let timings = Arc::new(Mutex::new(Timings::new()));
        let mut watch = Stopwatch::new(Arc::clone(&timings));
        let start = Instant::now();
        let at = |seconds: u64| start + Duration::from_secs(seconds);
        watch.asked(REQUEST, 3, at(0));
        watch.step(at(2), &Batch { begun: &[(REQUEST, 0), (REQUEST, 1)], tokens: 40 });
        watch.event(&token(0), at(5));
        watch.step(at(5), &Batch { begun: &[], tokens: 1 });
        // Computed anew after a preemption: the wait was over before.
        watch.step(at(6), &Batch { begun: &[(REQUEST, 0)], tokens: 0 });
        watch.event(&token(0), at(9));
        (0..3).for_each(|sample| watch.event(&end(sample), at(12)));
        let timings = timings.lock().clone();
        let figures = |h: &Histogram| (h.count(), h.sum());
        // Sample 1 had no token, sample 2 never ran.
        assert_eq!(figures(&timings.queue), (2, 4.0));
        assert_eq!(figures(&timings.prefill), (1, 3.0));
        assert_eq!(figures(&timings.decode), (1, 4.0));
        assert_eq!(figures(&timings.inference), (1, 7.0));
        assert_eq!(figures(&timings.step_tokens), (2, 41.0));
        assert!(watch.samples.is_empty());
    }
}
