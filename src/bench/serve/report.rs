//! What a run of the load generator came to, as `vllm bench serve` prints and stores it.

use serde_json::{Map, Value, json};

use super::client::Outcome;
use super::load::Run;
use crate::bench::numbers::Values;
use crate::exit::{Failure, Result};

/// The four times that are reported: name, words, key.
const METRICS: [(&str, &str, &str); 4] = [
    ("ttft", "Time to First Token", "TTFT"),
    ("tpot", "Time per Output Token (excl. 1st token)", "TPOT"),
    ("itl", "Inter-token Latency", "ITL"),
    ("e2el", "End-to-end Latency", "E2EL"),
];
/// Width of the printed block.
const WIDTH: usize = 50;

/// What is asked of the report.
pub(super) struct Wanted {
    /// Names of metrics that are printed.
    pub(super) metrics: Vec<String>,
    pub(super) percentiles: Vec<f64>,
    /// Limits of a good answer in milliseconds, in the order of [`METRICS`].
    pub(super) goodput: [Option<f64>; 4],
}

impl Wanted {
    /// Checks names and numbers.
    pub(super) fn new(metrics: &[String], percentiles: &[f64], goodput: &[String]) -> Result<Self> {
        let known = |flag: &str, name: &str| {
            METRICS.iter().position(|(metric, ..)| *metric == name).ok_or_else(|| {
                Failure::usage(format!("{flag} has {name}, known are ttft, tpot, itl, e2el"))
            })
        };
        for metric in metrics {
            known("--percentile-metrics", metric)?;
        }
        for percent in percentiles {
            if !(0.0..=100.0).contains(percent) {
                let text = format!("--metric-percentiles has {percent}, limit is 0 to 100");
                return Err(Failure::usage(text));
            }
        }
        let mut limits = [None; 4];
        for text in goodput {
            let wrong = || Failure::usage(format!("--goodput {text} is not KEY:MS"));
            let (name, ms) = text.split_once(':').ok_or_else(wrong)?;
            let ms: f64 = ms.parse().map_err(|_| wrong())?;
            limits[known("--goodput", name)?] = Some(ms);
        }
        Ok(Self { metrics: metrics.to_vec(), percentiles: percentiles.to_vec(), goodput: limits })
    }
}

/// The figures of a run.
pub(super) struct Figures {
    completed: usize,
    failed: usize,
    input: usize,
    output: usize,
    /// Answers that kept all limits; none where there are no limits.
    good: Option<usize>,
    seconds: f64,
    peak_tokens_per_s: f64,
    peak_requests: usize,
    /// In milliseconds, in the order of [`METRICS`].
    times: [Values; 4],
}

impl Figures {
    /// Of a run.
    pub(super) fn new(run: &Run, wanted: &Wanted) -> Self {
        let done: Vec<&Outcome> = run.outcomes.iter().filter(|o| o.error.is_none()).collect();
        let mut times: [Vec<f64>; 4] = Default::default();
        let mut good = 0;
        for outcome in &done {
            let TimesMs { ttft, tpot, itl, e2el } = outcome.times_ms();
            let means = [ttft, tpot, Values::new(itl.clone()).mean(), e2el];
            let keeps = |(limit, ms): (&Option<f64>, f64)| limit.is_none_or(|limit| ms <= limit);
            good += usize::from(wanted.goodput.iter().zip(means).all(keeps));
            times[0].push(ttft);
            if outcome.output_tokens > 1 {
                times[1].push(tpot);
            }
            times[2].extend(itl);
            times[3].push(e2el);
        }
        let limited = wanted.goodput.iter().any(Option::is_some);
        let (peak_tokens_per_s, peak_requests) = peaks(&done);
        Self {
            completed: done.len(),
            failed: run.outcomes.len() - done.len(),
            input: done.iter().map(|o| o.input_tokens).sum(),
            output: done.iter().map(|o| o.output_tokens).sum(),
            good: limited.then_some(good),
            seconds: run.seconds,
            peak_tokens_per_s,
            peak_requests,
            times: times.map(Values::new),
        }
    }

    /// Requests that were answered.
    pub(super) fn completed(&self) -> usize {
        self.completed
    }

    fn rate(&self, count: usize) -> f64 {
        count as f64 / self.seconds
    }

    /// The printed block.
    pub(super) fn block(&self, run: &Run, wanted: &Wanted) -> String {
        let line =
            |label: &str, value: String| format!("{label:<40} {value:<10}").trim_end().to_owned();
        let count = |label: &str, value: usize| line(label, value.to_string());
        let number = |label: &str, value: f64| line(label, format!("{value:.2}"));
        let mut lines = vec![
            centred(" Serving Benchmark Result ", '='),
            count("Successful requests:", self.completed),
            count("Failed requests:", self.failed),
            number("Benchmark duration (s):", self.seconds),
            count("Total input tokens:", self.input),
            count("Total generated tokens:", self.output),
            number("Request throughput (req/s):", self.rate(self.completed)),
        ];
        if let Some(good) = self.good {
            lines.push(number("Request goodput (req/s):", self.rate(good)));
        }
        lines.extend([
            number("Output token throughput (tok/s):", self.rate(self.output)),
            number("Peak output token throughput (tok/s):", self.peak_tokens_per_s),
            count("Peak concurrent requests:", self.peak_requests),
            number("Total token throughput (tok/s):", self.rate(self.input + self.output)),
        ]);
        for ((name, words, key), values) in METRICS.iter().zip(&self.times) {
            if !wanted.metrics.iter().any(|metric| metric == name) {
                continue;
            }
            lines.push(centred(words, '-'));
            lines.push(number(&format!("Mean {key} (ms):"), values.mean()));
            lines.push(number(&format!("Median {key} (ms):"), values.median()));
            for percent in wanted.percentiles.iter().filter(|percent| **percent != 50.0) {
                let label = format!("P{percent} {key} (ms):");
                lines.push(number(&label, values.percentile(*percent)));
            }
        }
        lines.extend(run.idle.map(|idle| {
            let text = format!("{} of {}", idle.held, idle.opened);
            line("Idle connections held:", text)
        }));
        if let Some((first, most, last)) = memory(run) {
            let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
            let text = format!("{} {} {}", mib(first), mib(most), mib(last));
            lines.push(line("Server memory, first/peak/last (MiB):", text));
        }
        lines.push("=".repeat(WIDTH));
        lines.join("\n")
    }

    /// The keys of the results that come from the run.
    pub(super) fn record(&self, run: &Run, wanted: &Wanted, out: &mut Map<String, Value>) {
        let mut set = |key: &str, value: Value| out.insert(key.to_owned(), value);
        set("duration", json!(self.seconds));
        set("completed", json!(self.completed));
        set("failed", json!(self.failed));
        set("total_input_tokens", json!(self.input));
        set("total_output_tokens", json!(self.output));
        set("request_throughput", json!(self.rate(self.completed)));
        set("request_goodput", json!(self.good.map(|good| self.rate(good))));
        set("output_throughput", json!(self.rate(self.output)));
        set("total_token_throughput", json!(self.rate(self.input + self.output)));
        set("max_output_tokens_per_s", json!(self.peak_tokens_per_s));
        set("max_concurrent_requests", json!(self.peak_requests));
        if let Some(idle) = run.idle {
            set("idle_connections", json!({"opened": idle.opened, "held": idle.held}));
        }
        if let Some((first, most, last)) = memory(run) {
            let looks: Vec<Value> = run.memory.iter().map(|(s, bytes)| json!([s, bytes])).collect();
            let memory = json!({"first_bytes": first, "peak_bytes": most, "last_bytes": last,
                "samples": looks});
            set("server_memory", memory);
        }
        let mut percentiles = wanted.percentiles.clone();
        if !percentiles.contains(&50.0) {
            percentiles.insert(0, 50.0);
        }
        for ((name, ..), values) in METRICS.iter().zip(&self.times) {
            values.record(&format!("{name}_ms"), &percentiles, out);
        }
    }
}

impl Outcome {
    /// TTFT, TPOT and E2EL in milliseconds, and the gaps between pieces.
    fn times_ms(&self) -> TimesMs {
        let after = self.output_tokens.saturating_sub(1).max(1) as f64;
        let ms = |seconds: f64| 1e3 * seconds;
        TimesMs {
            ttft: ms(self.ttft_s),
            tpot: ms((self.latency_s - self.ttft_s) / after),
            itl: self.itl_s.iter().map(|s| ms(f64::from(*s))).collect(),
            e2el: ms(self.latency_s),
        }
    }
}

struct TimesMs {
    ttft: f64,
    tpot: f64,
    itl: Vec<f64>,
    e2el: f64,
}

/// Each request's own values, for `--save-detailed`.
pub(super) fn details(outcomes: &[Outcome], out: &mut Map<String, Value>) {
    let all = |of: &dyn Fn(&Outcome) -> Value| Value::Array(outcomes.iter().map(of).collect());
    out.insert("input_lens".to_owned(), all(&|o| json!(o.input_tokens)));
    out.insert("output_lens".to_owned(), all(&|o| json!(o.output_tokens)));
    out.insert("start_times".to_owned(), all(&|o| json!(o.start_s)));
    out.insert("ttfts".to_owned(), all(&|o| json!(o.ttft_s)));
    out.insert("itls".to_owned(), all(&|o| json!(o.itl_s)));
    out.insert("generated_texts".to_owned(), all(&|o| json!(o.text)));
    out.insert("errors".to_owned(), all(&|o| json!(o.error.as_deref().unwrap_or_default())));
}

/// Most pieces that came in a second, and most requests that ran at once.
fn peaks(done: &[&Outcome]) -> (f64, usize) {
    let end = done.iter().map(|o| o.start_s + o.latency_s).fold(0.0, f64::max);
    let mut pieces = vec![0_usize; end as usize + 1];
    let last = pieces.len() - 1;
    let mut changes = Vec::with_capacity(2 * done.len());
    for outcome in done {
        let mut at = outcome.start_s + outcome.ttft_s;
        pieces[(at as usize).min(last)] += 1;
        for gap in &outcome.itl_s {
            at += f64::from(*gap);
            pieces[(at as usize).min(last)] += 1;
        }
        changes.extend([(outcome.start_s, 1), (outcome.start_s + outcome.latency_s, -1)]);
    }
    // Those that end make room for those that begin at the same time.
    changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let running = changes.iter().scan(0_i64, |running, (_, change)| {
        *running += change;
        Some(*running)
    });
    let most = pieces.iter().copied().max().unwrap_or(0);
    (most as f64, usize::try_from(running.max().unwrap_or(0)).unwrap_or(0))
}

/// First, largest and last look at the server's memory.
fn memory(run: &Run) -> Option<(u64, u64, u64)> {
    let bytes = || run.memory.iter().map(|(_, bytes)| *bytes);
    Some((bytes().next()?, bytes().max()?, bytes().next_back()?))
}

fn centred(text: &str, fill: char) -> String {
    let left = WIDTH.saturating_sub(text.len()) / 2;
    let right = WIDTH.saturating_sub(text.len() + left);
    let side = |count: usize| fill.to_string().repeat(count);
    format!("{}{text}{}", side(left), side(right))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(start_s: f64, itl_s: Vec<f32>) -> Outcome {
        let latency_s = 0.5 + itl_s.iter().map(|s| f64::from(*s)).sum::<f64>();
        let output_tokens = itl_s.len() + 1;
        Outcome {
            start_s,
            input_tokens: 10,
            output_tokens,
            ttft_s: 0.5,
            itl_s,
            latency_s,
            ..Outcome::default()
        }
    }

    fn run() -> Run {
        let failed = Outcome { error: Some("no".to_owned()), ..Outcome::default() };
        let outcomes = vec![outcome(0.0, vec![0.25; 2]), outcome(0.5, vec![0.5; 2]), failed];
        Run { outcomes, seconds: 2.0, idle: None, memory: vec![(0.0, 5), (1.0, 9), (2.0, 7)] }
    }

    fn wanted(goodput: &[&str]) -> Result<Wanted> {
        let own = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Wanted::new(&own(&["ttft", "tpot"]), &[50.0, 99.0], &own(goodput))
    }

    #[test]
    fn figures_are_those_of_the_answers() {
        let wanted = wanted(&["tpot:300"]).unwrap();
        let figures = Figures::new(&run(), &wanted);
        let mut keys = Map::new();
        figures.record(&run(), &wanted, &mut keys);
        let number = |key: &str| keys[key].as_f64().unwrap();
        assert_eq!(
            [number("completed"), number("failed"), number("request_goodput")],
            [2.0, 1.0, 0.5]
        );
        assert_eq!([number("total_input_tokens"), number("output_throughput")], [20.0, 3.0]);
        assert_eq!([number("mean_ttft_ms"), number("p50_tpot_ms")], [500.0, 375.0]);
        assert_eq!([number("mean_itl_ms"), number("p99_e2el_ms")], [375.0, 1495.0]);
        assert_eq!(
            [number("max_output_tokens_per_s"), number("max_concurrent_requests")],
            [3.0, 2.0]
        );
        assert_eq!(keys["server_memory"]["peak_bytes"], 9);
    }

    #[test]
    fn the_block_is_as_wide_and_spelled_as_known() {
        let wanted = wanted(&[]).unwrap();
        let block = Figures::new(&run(), &wanted).block(&run(), &wanted);
        let lines: Vec<&str> = block.lines().collect();
        assert_eq!(lines[0], "============ Serving Benchmark Result ============");
        assert_eq!(lines[1], "Successful requests:                     2");
        assert!(lines.contains(&"---------------Time to First Token----------------"), "{block}");
        assert!(lines.contains(&"P99 TPOT (ms):                           497.50"), "{block}");
        assert!(!block.contains("ITL") && !block.contains("goodput"), "{block}");
    }

    #[test]
    fn wrong_wishes_are_refused() {
        assert!(wanted(&["tpot"]).is_err() && wanted(&["speed:5"]).is_err());
        assert!(Wanted::new(&["tft".to_owned()], &[], &[]).is_err());
        assert!(Wanted::new(&[], &[101.0], &[]).is_err());
    }
}
