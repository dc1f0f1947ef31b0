//! What a job takes at least on this machine: its peaks, measured, and the bytes and operations of a job.
//!
//! A step's limit is the longer of reading the weights once and of the multiplications of its rows; a
//! row multiplies with every weight of the layers, and with the head where its next token is asked for.
//! Attention, norms, caches and everything else count as nothing, so no implementation gets there.

use engine::{EngineConfig, Kernels, MemoryPlan, ModelConfig, probe};
use serde_json::{Value, json};

use crate::doctor::processor;
use crate::exit::{Failure, Result};

/// The machine's peaks under the kernels in use.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Peaks {
    /// Operations a second, a multiplication and an addition counting as two; infinite where the
    /// level's instruction is not measured.
    pub(crate) flops: f64,
    /// Bytes a second read from memory.
    pub(crate) bytes: f64,
}

impl Peaks {
    /// Measures both, in about half a second.
    pub(crate) fn measure(kernels: &Kernels, dtype: engine::Dtype) -> Self {
        Self {
            flops: probe::multiply_peak(kernels, dtype).unwrap_or(f64::INFINITY),
            bytes: probe::read_bandwidth(kernels.pool()),
        }
    }

    /// Both for people.
    pub(crate) fn describe(&self) -> String {
        let flops = match self.flops.is_finite() {
            true => format!("{:.0} GFLOP/s", self.flops / 1e9),
            false => "multiplications not measured".to_owned(),
        };
        format!("{flops}, {:.1} GB/s", self.bytes / 1e9)
    }
}

/// What one pass over a model costs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct ModelCost {
    peaks: Peaks,
    /// Weights of the layers.
    layers: f64,
    /// Weights of the head.
    head: f64,
    /// Bytes of both, as they are held.
    bytes: f64,
}

/// A job of generation: what is asked of each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Generation<'a> {
    /// Tokens of each prompt.
    pub(crate) prompts: &'a [usize],
    /// Samples of each prompt.
    pub(crate) samples: usize,
    /// Tokens of each sample, by prompt.
    pub(crate) outputs: &'a [usize],
}

impl ModelCost {
    /// Of `model`, whose weights take what `plan` says.
    pub(crate) fn new(peaks: Peaks, model: &ModelConfig, plan: &MemoryPlan) -> Self {
        let all = model.parameters() as f64;
        let head = (model.vocab_size * model.hidden_size) as f64;
        let embedding = if model.tied_embeddings { 0.0 } else { head };
        // A table that is only looked up in is not read.
        let read = 1.0 - embedding / all;
        let bytes = plan.weights_bytes as f64 * read;
        Self { peaks, layers: all - head - embedding, head, bytes }
    }

    /// Seconds of a step of `rows` rows, of which `sampled` enter the head.
    fn step(&self, rows: usize, sampled: usize) -> f64 {
        let flop = 2.0 * (self.layers * rows as f64 + self.head * sampled as f64);
        (self.bytes / self.peaks.bytes).max(flop / self.peaks.flops)
    }

    /// Seconds of a generation in which all sequences run together: every prompt once, then a token
    /// of each sequence a step.
    pub(crate) fn generation(&self, job: &Generation<'_>) -> f64 {
        let sequences = job.prompts.len() * job.samples;
        let longest = job.outputs.iter().copied().max().unwrap_or(0);
        let decode = |token: usize| {
            let rows = job.samples * job.outputs.iter().filter(|len| **len > token).count();
            self.step(rows, rows)
        };
        self.step(job.prompts.iter().sum(), sequences) + (1..longest).map(decode).sum::<f64>()
    }

    /// Seconds of the forward pass of training, `rows` rows with `targets` targets.
    pub(crate) fn forward(&self, rows: usize, targets: usize) -> f64 {
        2.0 * (self.layers * rows as f64 + self.head * targets as f64) / self.peaks.flops
    }

    /// Seconds of the backward pass: two products for each of the forward pass.
    pub(crate) fn backward(&self, rows: usize, targets: usize) -> f64 {
        2.0 * self.forward(rows, targets)
    }

    /// Seconds of clipping and AdamW: the gradient read twice, master and moments read and written, the
    /// weight written.
    pub(crate) fn optimizer(&self, params: u64, weight_bytes: usize) -> f64 {
        params as f64 * (2 * 4 + 3 * 8 + weight_bytes) as f64 / self.peaks.bytes
    }
}

/// The machine and what runs on it, as JSON.
pub(crate) fn machine(config: &EngineConfig, peaks: &Peaks) -> Value {
    let flops = peaks.flops.is_finite().then_some(peaks.flops);
    json!({
        "processor": processor(),
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
        "features": engine::features(),
        "kernels": config.resolved_level().name(),
        "threads": config.resolved_threads(),
        "dtype": config.resolved_dtype().name(),
        "multiply_flops": flops,
        "read_bytes_per_second": peaks.bytes,
        "version": env!("CARGO_PKG_VERSION"),
    })
}

/// The kernels that a configuration asks for.
pub(crate) fn kernels(config: &EngineConfig) -> Result<Kernels> {
    config.validate()?;
    let level = config.resolved_level();
    Kernels::new(level, config.resolved_threads())
        .ok_or_else(|| Failure::running(format!("{level} kernels do not run here")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 1000 weights in the layers, 100 in the head, 2200 bytes; 1 GFLOP/s and 1 MB/s.
    const COST: ModelCost = ModelCost {
        peaks: Peaks { flops: 1e9, bytes: 1e6 },
        layers: 1000.0,
        head: 100.0,
        bytes: 2200.0,
    };

    #[test]
    fn a_step_takes_the_longer_of_bytes_and_multiplications() {
        assert_eq!(COST.step(1, 1), 2.2e-3);
        assert_eq!(COST.step(10_000, 0), 20e-3);
        assert_eq!(COST.step(10_000, 10_000), 22e-3);
    }

    #[test]
    fn a_generation_is_a_prefill_and_a_step_for_each_further_token() {
        // 20,000 rows of prompts; then 8 sequences, of which 4 end after 2 tokens.
        let job = Generation { prompts: &[10_000; 2], samples: 4, outputs: &[2, 4] };
        let expected = 2e-9 * (1000.0 * 20_000.0 + 100.0 * 8.0) + 3.0 * 2.2e-3;
        assert!((COST.generation(&job) - expected).abs() < 1e-12);
    }

    #[test]
    fn training_counts_targets_for_the_head_and_backward_twice() {
        assert!((COST.forward(10, 5) - 2e-9 * (1000.0 * 10.0 + 100.0 * 5.0)).abs() < 1e-12);
        assert_eq!(COST.backward(10, 5), 2.0 * COST.forward(10, 5));
        assert!((COST.optimizer(1000, 2) - 34e-3).abs() < 1e-12);
    }
}
