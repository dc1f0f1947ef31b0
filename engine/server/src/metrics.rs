//! `GET /metrics`: what the server and its engine did, as Prometheus reads it (text format 0.0.4).
//!
//! Names are vLLM's under the prefix `engine_`, with its buckets and its label `model_name`, so that boards
//! need another prefix only; [`MetricsNames::Vllm`] adds the same series under `vllm:`. Times are in
//! seconds. Leaves out sizes of HTTP messages and the series of features that do not exist here.

use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::{Event, FinishReason, Status};

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

/// Under which names the series are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MetricsNames {
    /// `engine_...`.
    #[default]
    Own,
    /// `engine_...`, and `vllm:...` for boards and autoscalers made for vLLM.
    Vllm,
}

/// A count of values by upper bound, and their sum.
#[derive(Clone, Debug)]
struct Histogram {
    bounds: &'static [f64],
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], count: 0, sum: 0.0 }
    }

    fn add(&mut self, value: f64) {
        if let Some(count) = self.counts.get_mut(self.bounds.partition_point(|b| *b < value)) {
            *count += 1;
        }
        self.count += 1;
        self.sum += value;
    }
}

/// What has been counted since the start.
#[derive(Clone, Debug)]
struct Counts {
    prompt_tokens: u64,
    generated_tokens: u64,
    finished: [u64; 3],
    first_token: Histogram,
    between: Histogram,
    whole: Histogram,
    prompt_lengths: Histogram,
    generated_lengths: Histogram,
    samples: Histogram,
}

/// The reasons in the order of [`Counts::finished`].
const REASONS: [FinishReason; 3] = [FinishReason::Stop, FinishReason::Length, FinishReason::Abort];

/// The server's own counts.
pub(crate) struct Metrics {
    counts: Mutex<Counts>,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        Self {
            counts: Mutex::new(Counts {
                prompt_tokens: 0,
                generated_tokens: 0,
                finished: [0; 3],
                first_token: Histogram::new(FIRST_TOKEN),
                between: Histogram::new(BETWEEN),
                whole: Histogram::new(WHOLE),
                prompt_lengths: Histogram::new(TOKENS),
                generated_lengths: Histogram::new(TOKENS),
                samples: Histogram::new(SAMPLES),
            }),
        }
    }

    /// A request with a prompt of so many tokens was taken in.
    pub(crate) fn begun(&self, prompt_tokens: usize, samples: usize) {
        let mut counts = self.locked();
        counts.prompt_tokens += prompt_tokens as u64;
        counts.prompt_lengths.add(prompt_tokens as f64);
        counts.samples.add(samples as f64);
    }

    /// So many samples were given up because their client left, or their time was over.
    pub(crate) fn aborted(&self, samples: usize) {
        self.locked().finished[2] += samples as u64;
    }

    /// All series. `model` is the label of each.
    pub(crate) fn text(&self, status: &Status, model: &str, names: MetricsNames) -> String {
        let counts = self.locked().clone();
        let label = format!("model_name=\"{}\"", escaped(model));
        let mut out = String::new();
        write_all(&mut out, "engine_", &label, (&counts, status));
        if names == MetricsNames::Vllm {
            write_all(&mut out, "vllm:", &format!("{label},engine=\"0\""), (&counts, status));
        }
        out
    }

    fn locked(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Times one request's samples as their events come.
pub(crate) struct Timer {
    begun: Instant,
    /// When the last token of each sample came, and how many have.
    samples: Vec<(Option<Instant>, u64)>,
}

impl Timer {
    pub(crate) fn new(samples: usize) -> Self {
        Self { begun: Instant::now(), samples: vec![(None, 0); samples] }
    }

    /// Counts an event of a sample.
    pub(crate) fn count(&mut self, sample: usize, event: &Event, metrics: &Metrics) {
        let now = Instant::now();
        let since = |then: Instant| now.saturating_duration_since(then);
        let Some((last, tokens)) = self.samples.get_mut(sample) else { return };
        let mut counts = metrics.locked();
        match event {
            Event::Token(_) => {
                match last {
                    None => counts.first_token.add(since(self.begun).as_secs_f64()),
                    Some(then) => counts.between.add(since(*then).as_secs_f64()),
                }
                counts.generated_tokens += 1;
                (*last, *tokens) = (Some(now), *tokens + 1);
            }
            Event::Finished(end) => {
                let whole: Duration = since(self.begun);
                counts.whole.add(whole.as_secs_f64());
                counts.generated_lengths.add(*tokens as f64);
                if let Some(place) = REASONS.iter().position(|reason| *reason == end.reason) {
                    counts.finished[place] += 1;
                }
            }
        }
    }
}

/// Label values escape backslashes, quotes and line ends.
fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

fn write_all(out: &mut String, prefix: &str, label: &str, (counts, status): (&Counts, &Status)) {
    let stats = &status.stats;
    let usage = stats.used_blocks as f64 / stats.total_blocks.max(1) as f64;
    let gauges = [
        ("num_requests_running", "Sequences that run.", status.running as f64),
        ("num_requests_waiting", "Sequences that wait.", status.waiting as f64),
        ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", usage),
        ("weights_version", "How often the weights have changed.", status.version.0 as f64),
    ];
    for (name, help, value) in gauges {
        head(out, (prefix, name), "gauge", help);
        line(out, (prefix, name, ""), label, value);
    }
    let totals = [
        ("prompt_tokens_total", "Tokens of prompts taken in.", counts.prompt_tokens),
        ("generation_tokens_total", "Tokens generated for requests.", counts.generated_tokens),
        ("num_preemptions_total", "Sequences that gave up their blocks.", stats.preemptions),
        ("prefix_cache_queries_total", "Tokens looked up in the prefix cache.", stats.query_tokens),
        ("prefix_cache_hits_total", "Tokens taken from the prefix cache.", stats.hit_tokens),
    ];
    for (name, help, value) in totals {
        head(out, (prefix, name), "counter", help);
        line(out, (prefix, name, ""), label, value as f64);
    }
    head(out, (prefix, "request_success_total"), "counter", "Samples ended, by reason.");
    for (reason, count) in REASONS.iter().zip(counts.finished) {
        let label = format!("{label},finished_reason=\"{}\"", reason.name());
        line(out, (prefix, "request_success_total", ""), &label, count as f64);
    }
    let histograms = [
        ("time_to_first_token_seconds", "Until a sample's first token.", &counts.first_token),
        ("inter_token_latency_seconds", "Between two tokens of a sample.", &counts.between),
        ("e2e_request_latency_seconds", "Until a sample's end.", &counts.whole),
        ("request_prompt_tokens", "Tokens of a prompt.", &counts.prompt_lengths),
        ("request_generation_tokens", "Tokens of a sample.", &counts.generated_lengths),
        ("request_params_n", "Samples asked for.", &counts.samples),
    ];
    for (name, help, histogram) in histograms {
        head(out, (prefix, name), "histogram", help);
        let mut below = 0;
        for (bound, count) in histogram.bounds.iter().zip(&histogram.counts) {
            below += count;
            line(out, (prefix, name, "_bucket"), &format!("{label},le=\"{bound}\""), below as f64);
        }
        let all = format!("{label},le=\"+Inf\"");
        line(out, (prefix, name, "_bucket"), &all, histogram.count as f64);
        line(out, (prefix, name, "_sum"), label, histogram.sum);
        line(out, (prefix, name, "_count"), label, histogram.count as f64);
    }
}

fn head(out: &mut String, (prefix, name): (&str, &str), kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}");
}

fn line(out: &mut String, (prefix, name, suffix): (&str, &str, &str), label: &str, value: f64) {
    // As above.
    let _ = writeln!(out, "{prefix}{name}{suffix}{{{label}}} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_up_to_and_including_its_bounds() {
        let mut histogram = Histogram::new(SAMPLES);
        for value in [1.0, 1.5, 2.0, 20.0, 21.0] {
            histogram.add(value);
        }
        assert_eq!(histogram.counts, [1, 2, 0, 0, 1]);
        assert_eq!((histogram.count, histogram.sum), (5, 45.5));
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
