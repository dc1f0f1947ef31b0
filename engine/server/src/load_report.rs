//! The line that says every few seconds how busy the server is, in vLLM's words; silent while it is idle.

use std::convert::Infallible;
use std::fmt;
use std::time::{Duration, Instant};

use engine::Status;
use tokio::time::sleep;

use crate::app::{App, LogEvent};

/// How busy a server was since the report before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadReport {
    /// Tokens of prompts that were taken in, a second.
    pub prompt_tokens_per_s: f64,
    /// Tokens that were generated for requests, a second.
    pub generation_tokens_per_s: f64,
    /// Sequences that run.
    pub running: usize,
    /// Sequences that wait.
    pub waiting: usize,
    /// Share of the KV blocks in use, 0 to 1.
    pub kv_usage: f64,
    /// Share of the tokens looked up in the prefix cache that were there, 0 to 1, since the start.
    pub prefix_hit_rate: f64,
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Avg prompt throughput: {:.1} tokens/s, Avg generation throughput: {:.1} tokens/s, \
             Running: {} reqs, Waiting: {} reqs, KV cache usage: {:.1}%, Prefix cache hit rate: {:.1}%",
            self.prompt_tokens_per_s,
            self.generation_tokens_per_s,
            self.running,
            self.waiting,
            100.0 * self.kv_usage,
            100.0 * self.prefix_hit_rate
        )
    }
}

/// What had been served at some time.
#[derive(Clone, Copy, Debug)]
struct Served {
    at: Instant,
    prompt_tokens: u64,
    generated_tokens: u64,
}

impl Served {
    fn now(app: &App) -> Self {
        let (prompt_tokens, generated_tokens) = app.metrics.tokens();
        Self { at: Instant::now(), prompt_tokens, generated_tokens }
    }

    /// What came to it since `before`, while `open` requests are being served; `None` where nothing did
    /// and none is.
    fn since(&self, before: &Self, status: &Status, open: usize) -> Option<LoadReport> {
        let prompt = self.prompt_tokens - before.prompt_tokens;
        let generated = self.generated_tokens - before.generated_tokens;
        if open == 0 && prompt + generated == 0 {
            return None;
        }
        let seconds = self.at.saturating_duration_since(before.at).as_secs_f64().max(1e-9);
        let stats = &status.stats;
        Some(LoadReport {
            prompt_tokens_per_s: prompt as f64 / seconds,
            generation_tokens_per_s: generated as f64 / seconds,
            running: status.running,
            waiting: status.waiting,
            kv_usage: status.kv_usage(),
            prefix_hit_rate: stats.hit_tokens as f64 / stats.query_tokens.max(1) as f64,
        })
    }
}

/// Reports for ever, or never where no interval is set.
pub(crate) async fn reports(app: &App) -> Infallible {
    let Some(every) = app.config.log_stats else { return std::future::pending().await };
    let mut before = Served::now(app);
    loop {
        sleep(every.max(Duration::from_millis(1))).await;
        let now = Served::now(app);
        let open = app.live.named.running();
        if let Some(report) = now.since(&before, &app.service.status(), open) {
            app.log(&LogEvent::Load(report));
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::{Engine, EngineConfig, ModelSource};

    #[test]
    fn a_report_has_rates_of_its_interval_and_none_when_idle() {
        let start = Instant::now();
        let at = |seconds, prompt_tokens, generated_tokens| Served {
            at: start + Duration::from_secs(seconds),
            prompt_tokens,
            generated_tokens,
        };
        let mut status = status();
        (status.running, status.waiting) = (3, 2);
        (status.stats.used_blocks, status.stats.total_blocks) = (10, 40);
        (status.stats.hit_tokens, status.stats.query_tokens) = (30, 400);
        let report = at(5, 200, 120).since(&at(0, 100, 20), &status, 0).unwrap();
        assert_eq!(
            report.to_string(),
            "Avg prompt throughput: 20.0 tokens/s, Avg generation throughput: 20.0 tokens/s, \
             Running: 3 reqs, Waiting: 2 reqs, KV cache usage: 25.0%, Prefix cache hit rate: 7.5%"
        );
        let stuck = at(10, 200, 120).since(&at(5, 200, 120), &status, 1).unwrap();
        assert_eq!((stuck.prompt_tokens_per_s, stuck.generation_tokens_per_s), (0.0, 0.0));
        assert_eq!(at(15, 200, 120).since(&at(10, 200, 120), &status, 0), None);
    }

    /// That of an engine that has done nothing.
    fn status() -> Status {
        let config = EngineConfig {
            kv_cache_memory_bytes: Some(16 << 20),
            threads: Some(1),
            ..EngineConfig::default()
        };
        let model =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/golden/models/tiny-llama");
        let engine =
            Engine::load(&ModelSource::open(std::path::Path::new(model)).unwrap(), &config)
                .unwrap();
        engine::Service::attach(&engine).0.status()
    }
}
