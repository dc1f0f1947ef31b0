//! The load: when requests are sent, how many at once, and what else the server has to bear meanwhile.
//!
//! Gaps between requests are gamma distributed (at burstiness 1 exponential: a Poisson process), drawn
//! from the seed. A fixed number of requests is stretched to last its number over the rate.

use std::f64::consts::PI;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::ResidentMemory;
use engine::random::uniform;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::sleep;

use super::client::{Outcome, Target};
use crate::bench::dataset::Dataset;

/// Time between two looks at the server's memory.
const MEMORY_EVERY: Duration = Duration::from_millis(500);
/// Most looks that are kept.
const MAX_LOOKS: usize = 4096;

/// What a run does.
pub(super) struct Plan {
    pub(super) requests: Requests,
    /// Requests a second; infinite for all at once.
    pub(super) rate: f64,
    pub(super) burstiness: f64,
    /// Most requests at once.
    pub(super) concurrency: usize,
    pub(super) idle_connections: usize,
    /// The process whose memory is looked at.
    pub(super) process: Option<u32>,
    pub(super) seed: u64,
    /// Whether texts of answers are kept.
    pub(super) keep: Keep,
}

/// How many requests a run has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Requests {
    Count(usize),
    /// As many as are sent in so many seconds.
    For(f64),
}

/// Whether texts and gaps of answers are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    Everything,
    Times,
}

/// What a run came to.
pub(super) struct Run {
    pub(super) outcomes: Vec<Outcome>,
    pub(super) seconds: f64,
    pub(super) idle: Option<Idle>,
    /// Seconds from the beginning and resident bytes.
    pub(super) memory: Vec<(f64, u64)>,
}

/// Connections that say nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Idle {
    pub(super) opened: usize,
    /// Still open at the end.
    pub(super) held: usize,
}

impl Plan {
    /// Sends everything and waits for the answers.
    pub(super) async fn run(&self, target: &Arc<Target>, dataset: &Dataset) -> Run {
        let connections = self.open_idle(&target.address).await;
        let begun = Instant::now();
        let over = Arc::new(AtomicBool::new(false));
        let memory = self.process.map(|id| watch_memory(id, begun, Arc::clone(&over)));
        let outcomes = self.send(target, dataset, begun).await;
        let seconds = begun.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        let memory = match memory {
            Some(memory) => memory.await.unwrap_or_default(),
            None => Vec::new(),
        };
        let held = connections.iter().filter(|stream| is_open(stream)).count();
        let idle = Idle { opened: connections.len(), held };
        let idle = (self.idle_connections > 0).then_some(idle);
        Run { outcomes, seconds, idle, memory }
    }

    /// Opens the idle connections; those that are refused are missing.
    async fn open_idle(&self, address: &str) -> Vec<TcpStream> {
        let mut connections = Vec::with_capacity(self.idle_connections);
        for _ in 0..self.idle_connections {
            match TcpStream::connect(address).await {
                Ok(stream) => connections.push(stream),
                Err(_) => break,
            }
        }
        connections
    }

    async fn send(&self, target: &Arc<Target>, dataset: &Dataset, begun: Instant) -> Vec<Outcome> {
        let room = Arc::new(Semaphore::new(self.concurrency.min(Semaphore::MAX_PERMITS)));
        let mut running = JoinSet::new();
        let mut outcomes = Vec::new();
        let mut due = self.due();
        for run in 0.. {
            for prompt in dataset.prompts(run) {
                let Some(at) = due.next() else { break };
                sleep(Duration::from_secs_f64(at).saturating_sub(begun.elapsed())).await;
                let permit = Arc::clone(&room).acquire_owned().await;
                if let Requests::For(seconds) = self.requests
                    && begun.elapsed().as_secs_f64() >= seconds
                {
                    due.over = true;
                    break;
                }
                let (target, keep) = (Arc::clone(target), self.keep);
                running.spawn(async move {
                    let mut outcome = target.stream(&prompt, begun).await;
                    if keep == Keep::Times {
                        outcome.text = String::new();
                    }
                    drop(permit);
                    outcome
                });
                while let Some(outcome) = running.try_join_next() {
                    outcomes.extend(outcome);
                }
            }
            if due.over {
                break;
            }
        }
        while let Some(outcome) = running.join_next().await {
            outcomes.extend(outcome);
        }
        outcomes.sort_by(|a, b| a.start_s.total_cmp(&b.start_s));
        outcomes
    }

    /// The times at which requests are due.
    fn due(&self) -> Due {
        let mut due = Due {
            gaps: Gaps { shape: self.burstiness, seed: self.seed, drawn: 0 },
            mean: if self.rate.is_finite() { 1.0 / self.rate } else { 0.0 },
            at: 0.0,
            left: match self.requests {
                Requests::Count(count) => Some(count),
                Requests::For(_) => None,
            },
            over: false,
        };
        if let Requests::Count(count) = self.requests {
            let mut gaps = due.gaps.clone();
            let total: f64 = (1..count).map(|_| gaps.next()).sum();
            // The mean of the gaps that are drawn becomes what the rate asks for.
            due.mean *= if total > 0.0 { count as f64 / total } else { 1.0 };
        }
        due
    }
}

struct Due {
    gaps: Gaps,
    /// Mean gap in seconds.
    mean: f64,
    at: f64,
    left: Option<usize>,
    over: bool,
}

impl Iterator for Due {
    type Item = f64;

    fn next(&mut self) -> Option<f64> {
        if let Some(left) = &mut self.left {
            let Some(fewer) = left.checked_sub(1) else {
                self.over = true;
                return None;
            };
            *left = fewer;
        }
        let at = self.at;
        if self.mean > 0.0 {
            self.at += self.mean * self.gaps.next();
        }
        Some(at)
    }
}

/// Gamma distributed numbers of mean 1 (Marsaglia and Tsang, "A simple method for generating gamma
/// variables", 2000).
#[derive(Clone, Debug)]
struct Gaps {
    shape: f64,
    seed: u64,
    drawn: u64,
}

impl Gaps {
    fn uniform(&mut self) -> f64 {
        self.drawn += 1;
        // In (0, 1].
        1.0 - uniform(&[self.seed, 0x6761_7073, self.drawn])
    }

    fn next(&mut self) -> f64 {
        // A shape below 1 is that of one more, times a power of a uniform number.
        let (shape, factor) = match self.shape < 1.0 {
            true => (self.shape + 1.0, self.uniform().powf(1.0 / self.shape)),
            false => (self.shape, 1.0),
        };
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let normal = (-2.0 * self.uniform().ln()).sqrt() * (2.0 * PI * self.uniform()).cos();
            let v = (1.0 + c * normal).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * normal * normal + d * (1.0 - v + v.ln()) {
                return factor * d * v / self.shape;
            }
        }
    }
}

/// Looks at a process's memory until it is `over`; where there are too many looks, every other one goes.
fn watch_memory(id: u32, begun: Instant, over: Arc<AtomicBool>) -> JoinHandle<Vec<(f64, u64)>> {
    tokio::spawn(async move {
        let (mut looks, mut every) = (Vec::new(), MEMORY_EVERY);
        loop {
            let ended = over.load(Ordering::Relaxed);
            if let Some(memory) = ResidentMemory::of(id) {
                looks.push((begun.elapsed().as_secs_f64(), memory.now_bytes));
            }
            if ended {
                return looks;
            }
            if looks.len() >= MAX_LOOKS {
                let mut index = 0;
                looks.retain(|_| {
                    index += 1;
                    index % 2 == 1
                });
                every *= 2;
            }
            let until = Instant::now() + every;
            while Instant::now() < until && !over.load(Ordering::Relaxed) {
                sleep(Duration::from_millis(20)).await;
            }
        }
    })
}

/// Whether the other side has not closed it.
fn is_open(stream: &TcpStream) -> bool {
    let mut byte = [0];
    match stream.try_read(&mut byte) {
        Ok(read) => read > 0,
        Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(requests: Requests, rate: f64) -> Plan {
        Plan {
            requests,
            rate,
            burstiness: 1.0,
            concurrency: 1,
            idle_connections: 0,
            process: None,
            seed: 0,
            keep: Keep::Times,
        }
    }

    #[test]
    fn gaps_have_mean_1_and_the_deviation_of_their_shape() {
        for shape in [0.5, 1.0, 4.0] {
            let mut gaps = Gaps { shape, seed: 3, drawn: 0 };
            let values: Vec<f64> = (0..20_000).map(|_| gaps.next()).collect();
            let mean = values.iter().sum::<f64>() / 20_000.0;
            let variance = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 20_000.0;
            assert!((mean - 1.0).abs() < 0.05, "shape {shape}: mean {mean}");
            let error = (variance * shape - 1.0).abs();
            assert!(error < 0.1, "shape {shape}: variance {variance}");
        }
    }

    #[test]
    fn a_number_of_requests_lasts_its_number_over_the_rate() {
        let due: Vec<f64> = plan(Requests::Count(50), 10.0).due().collect();
        assert_eq!((due.len(), due[0]), (50, 0.0));
        assert!((due[49] - 5.0).abs() < 1e-9, "{}", due[49]);
        assert!(due.is_sorted());
        let at_once: Vec<f64> = plan(Requests::Count(3), f64::INFINITY).due().collect();
        assert_eq!(at_once, [0.0; 3]);
        assert_eq!(plan(Requests::For(1.0), f64::INFINITY).due().take(9).count(), 9);
    }
}
