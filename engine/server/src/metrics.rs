//! `GET /metrics`: what the server and its engine did, as Prometheus reads it (text format 0.0.4).
//!
//! Names are vLLM's under the prefix `engine_`, with its buckets and its label `model_name`, so that boards
//! need another prefix only; [`MetricsNames::Vllm`] adds the same series under `vllm:`, and those of HTTP
//! without a prefix, as they are there. Times are in seconds. Here: what is counted of requests;
//! `metrics/text.rs` writes the series, `metrics/http.rs` measures HTTP. Leaves out the series of features
//! that do not exist here.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{Event, Finished, Histogram, Service};

pub(crate) mod http;
mod text;

use http::HttpCounts;
use text::{Names, Sources};

/// Upper bounds of time to first token, in seconds.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Upper bounds of the time between two tokens of a sample, in seconds.
const BETWEEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Upper bounds of a whole request's time, in seconds.
const WHOLE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Upper bounds of token counts.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0,
    20_000.0, 50_000.0, 100_000.0,
];
/// Upper bounds of samples of a request.
const SAMPLES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Why a sample ended, as the label `finished_reason` says it: the engine's reasons, and failures.
const REASONS: [&str; 4] = ["stop", "length", "abort", "error"];

/// Under which names the series are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MetricsNames {
    /// `engine_...`.
    #[default]
    Own,
    /// `engine_...`, and `vllm:...` for boards and autoscalers made for vLLM.
    Vllm,
}

/// What has been counted since the start.
#[derive(Clone, Debug)]
struct Counts {
    prompt_tokens: u64,
    generated_tokens: u64,
    /// Samples, in the order of [`REASONS`].
    finished: [u64; 4],
    first_token: Histogram,
    between: Histogram,
    whole: Histogram,
    prompt_lengths: Histogram,
    generated_lengths: Histogram,
    /// Tokens of the longest sample of each request.
    longest: Histogram,
    samples: Histogram,
    /// Most tokens a sample may have, where a request or its API says so.
    max_tokens: Histogram,
}

/// The server's own counts.
pub(crate) struct Metrics {
    counts: Mutex<Counts>,
    http: Mutex<HttpCounts>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            counts: Mutex::new(Counts {
                prompt_tokens: 0,
                generated_tokens: 0,
                finished: [0; 4],
                first_token: Histogram::new(FIRST_TOKEN),
                between: Histogram::new(BETWEEN),
                whole: Histogram::new(WHOLE),
                prompt_lengths: Histogram::new(TOKENS),
                generated_lengths: Histogram::new(TOKENS),
                longest: Histogram::new(TOKENS),
                samples: Histogram::new(SAMPLES),
                max_tokens: Histogram::new(TOKENS),
            }),
            http: Mutex::default(),
        }
    }

    /// A prompt of so many tokens was taken in, of which `samples` samples of at most `max_tokens` are asked
    /// for.
    pub(crate) fn begun(&self, prompt_tokens: usize, samples: usize, max_tokens: Option<usize>) {
        let mut counts = self.locked();
        counts.prompt_tokens += prompt_tokens as u64;
        counts.prompt_lengths.add(prompt_tokens as f64);
        counts.samples.add(samples as f64);
        if let Some(max_tokens) = max_tokens {
            counts.max_tokens.add(max_tokens as f64);
        }
    }

    /// So many samples were given up because their client left, or their time was over.
    pub(crate) fn aborted(&self, samples: usize) {
        self.locked().finished[2] += samples as u64;
    }

    /// Tokens of prompts taken in, and tokens generated, since the start.
    pub(crate) fn tokens(&self) -> (u64, u64) {
        let counts = self.locked();
        (counts.prompt_tokens, counts.generated_tokens)
    }

    /// All series. `model` is the label of each but those of HTTP.
    pub(crate) fn text(&self, service: &Service, model: &str, names: MetricsNames) -> String {
        let counts = self.locked().clone();
        let http = self.http().clone();
        let (status, timings) = (service.status(), service.timings());
        let cache = text::cache_labels(service.memory_plan(), service.config());
        let all = Sources { counts: &counts, status: &status, timings: &timings, cache: &cache };
        let label = format!("model_name=\"{}\"", text::escaped(model));
        let mut out = String::new();
        text::write(&mut out, &Names { prefix: "engine_", label: &label }, &all);
        http.write(&mut out, "engine_", MetricsNames::Own);
        if names == MetricsNames::Vllm {
            let label = format!("{label},engine=\"0\"");
            text::write(&mut out, &Names { prefix: "vllm:", label: &label }, &all);
            http.write(&mut out, "", MetricsNames::Vllm);
        }
        out
    }

    fn locked(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn http(&self) -> MutexGuard<'_, HttpCounts> {
        self.http.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Times one request's samples as their events come.
pub(crate) struct Timer {
    begun: Instant,
    samples: Vec<Progress>,
    /// Samples of each prompt.
    of_prompt: usize,
}

/// How far a sample is.
#[derive(Clone, Copy, Debug, Default)]
struct Progress {
    /// When its last token came.
    last: Option<Instant>,
    tokens: u64,
    over: bool,
}

impl Timer {
    /// Of `prompts` prompts with `of_prompt` samples each, from now on.
    pub(crate) fn new(prompts: usize, of_prompt: usize) -> Self {
        let samples = vec![Progress::default(); prompts * of_prompt];
        Self { begun: Instant::now(), samples, of_prompt }
    }

    /// Counts an event of a sample.
    pub(crate) fn count(&mut self, sample: usize, event: &Event, metrics: &Metrics) {
        let now = Instant::now();
        let since = |then: Instant| now.saturating_duration_since(then);
        let Some(progress) = self.samples.get_mut(sample) else { return };
        let mut counts = metrics.locked();
        match event {
            Event::Token(_) => {
                match progress.last.replace(now) {
                    None => counts.first_token.add(since(self.begun).as_secs_f64()),
                    Some(then) => counts.between.add(since(then).as_secs_f64()),
                }
                counts.generated_tokens += 1;
                progress.tokens += 1;
            }
            Event::Finished(end) => {
                progress.over = true;
                let whole: Duration = since(self.begun);
                counts.whole.add(whole.as_secs_f64());
                counts.generated_lengths.add(progress.tokens as f64);
                counts.finished[reason(end)] += 1;
                let first = sample - sample % self.of_prompt;
                let request = &self.samples[first..first + self.of_prompt];
                if request.iter().all(|sample| sample.over) {
                    let longest = request.iter().map(|sample| sample.tokens).max().unwrap_or(0);
                    counts.longest.add(longest as f64);
                }
            }
        }
    }
}

/// The place in [`REASONS`] of an end.
fn reason(end: &Finished) -> usize {
    let name = if end.error.is_some() { "error" } else { end.reason.name() };
    REASONS.iter().position(|reason| *reason == name).unwrap_or(REASONS.len() - 1)
}
