//! What a training run holds in memory at its peak, planned before anything is allocated, and how many
//! tokens a training pass may have for it to fit.
//!
//! ```text
//! engine      weights, KV cache, the values of a step, logits
//! training    f32 masters and two moments, gradients, a pass's activations, buffers of its backward
//!             pass and of the head
//! reference   a second set of weights and the values of a pass, where one is kept
//! program     code, tokenizer and what else is there before a model is loaded
//! ```
//!
//! A pass's buffers grow with its rows: the budget of tokens, or fewer where a whole mini-batch has fewer.
//! Not counted: data, texts and metrics, and the file pages that reading a model maps for a while.

use std::fmt;

use engine::decoder::{Keep, Tape};
use engine::model::param_specs;
use engine::{Dtype, LOGIT_ROWS, MemoryPlan, ModelConfig, ResidentMemory, available_memory_bytes};
use kernels::{ROW_BLOCK, VOCAB_CHUNK};

use crate::config::{RlConfig, SftConfig, kept_for_backward};

/// Tokens of a training pass where memory allows it and nothing else is asked for: enough that reading and
/// writing the sums of the gradients once a pass is small beside its multiplications.
pub const MAX_PLANNED_TOKENS: usize = 1536;
/// Fewest tokens that are planned.
const MIN_PLANNED_TOKENS: usize = 256;
/// Share of the free memory that a plan may fill.
const FILL: f64 = 0.9;

/// What a run does that memory depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand {
    /// What a pass keeps for its backward pass.
    pub keep: Keep,
    /// Rows of the largest pass, in tokens: see [`Demand::with_budget`].
    pub pass_rows: usize,
    /// Most rows that a mini-batch has, in tokens.
    pub batch_rows: usize,
    /// Rows of the longest sequence, which passes even if the budget is smaller.
    pub longest: usize,
    /// Most rows of a step of generation, in tokens.
    pub step_rows: usize,
    /// Sequences that generate at once.
    pub sequences: usize,
    /// Whether a reference policy is kept.
    pub reference: Reference,
}

/// Whether a run holds the policy at the start beside the one it trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reference {
    /// It does not.
    None,
    /// A second set of weights.
    Kept,
}

impl Demand {
    /// Of a reinforcement learning run on an engine of these settings.
    pub fn rl(config: &RlConfig, engine: &engine::EngineConfig) -> Self {
        let (data, samples) = (&config.data, config.rollout.n);
        let (prompt, response) = (data.max_prompt_length, data.max_response_length);
        let group = prompt.saturating_add(samples.saturating_mul(response));
        let sequences = data.train_batch_size.saturating_mul(samples);
        Self {
            keep: kept_for_backward(config.trainer.recompute),
            batch_rows: config.algorithm.mini_batch_size.saturating_mul(group),
            longest: prompt.saturating_add(response),
            step_rows: sequences.saturating_mul(prompt).min(engine.max_num_batched_tokens),
            sequences: sequences.min(engine.max_num_seqs),
            reference: match config.algorithm.needs_reference() {
                true => Reference::Kept,
                false => Reference::None,
            },
            pass_rows: 0,
        }
        .with_budget(config.trainer.max_tokens_per_microbatch)
    }

    /// Of a supervised run on an engine of these settings.
    pub fn sft(config: &SftConfig, engine: &engine::EngineConfig) -> Self {
        let (count, longest) = (config.data.train_batch_size, config.data.max_length);
        Self {
            keep: kept_for_backward(config.trainer.recompute),
            batch_rows: count.saturating_mul(longest),
            longest,
            step_rows: engine.max_num_batched_tokens,
            sequences: engine.max_num_seqs,
            reference: Reference::None,
            pass_rows: 0,
        }
        .with_budget(config.trainer.max_tokens_per_microbatch)
    }

    /// The same with passes of up to `tokens` tokens.
    #[must_use]
    pub fn with_budget(self, tokens: usize) -> Self {
        Self { pass_rows: tokens.max(self.longest).min(self.batch_rows), ..self }
    }
}

/// The memory of a run, part by part, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrainingPlan {
    /// Rows of the largest pass, in tokens.
    pub pass_rows: usize,
    /// The weights in the compute format.
    pub weights_bytes: u64,
    /// The KV cache.
    pub kv_bytes: u64,
    /// What generation needs besides: the values of a step, logits, the rotary table.
    pub generation_bytes: u64,
    /// f32 masters and both moments.
    pub optimizer_bytes: u64,
    /// f32 sums of gradients.
    pub gradient_bytes: u64,
    /// What a forward pass keeps.
    pub activation_bytes: u64,
    /// Buffers of the backward pass.
    pub backward_bytes: u64,
    /// Rows that enter the head, and chunks of logits.
    pub head_bytes: u64,
    /// The reference policy with its pass.
    pub reference_bytes: u64,
    /// What the process holds before.
    pub program_bytes: u64,
}

impl TrainingPlan {
    /// Plans for `model` on an engine that holds what `engine` says.
    pub fn new(model: &ModelConfig, dtype: Dtype, engine: &MemoryPlan, demand: &Demand) -> Self {
        let (params, rows) = (model.parameters(), demand.pass_rows);
        let logits = demand.sequences.min(LOGIT_ROWS) * model.vocab_size;
        let rope = engine.max_model_len * model.head_dim;
        let reference = match demand.reference {
            Reference::None => 0,
            Reference::Kept => {
                engine.weights_bytes
                    + Tape::bytes(model, dtype, Keep::OneLayer, rows)
                    + head_bytes(model, dtype, rows)
            }
        };
        Self {
            pass_rows: rows,
            weights_bytes: engine.weights_bytes,
            kv_bytes: engine.kv_bytes,
            generation_bytes: Tape::bytes(model, dtype, Keep::OneLayer, demand.step_rows)
                + 4 * (logits + rope) as u64,
            optimizer_bytes: 12 * params,
            gradient_bytes: 4 * params,
            activation_bytes: Tape::bytes(model, dtype, demand.keep, rows)
                + pass_kv(model, dtype, rows),
            backward_bytes: backward_bytes(model, dtype, rows),
            // The forward and the backward pass have chunks of their own.
            head_bytes: 2 * head_bytes(model, dtype, rows),
            reference_bytes: reference,
            program_bytes: ResidentMemory::own().map_or(0, |memory| memory.now_bytes),
        }
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.parts().iter().map(|(_, bytes, _)| bytes).sum()
    }

    fn parts(&self) -> [(&'static str, u64, String); 10] {
        let tokens = || format!("{} tokens a pass", self.pass_rows);
        [
            ("weights", self.weights_bytes, String::new()),
            ("kv cache", self.kv_bytes, String::new()),
            ("generation", self.generation_bytes, "a step's values and logits".to_owned()),
            ("optimizer", self.optimizer_bytes, "f32 masters and two moments".to_owned()),
            ("gradients", self.gradient_bytes, "f32 sums".to_owned()),
            ("activations", self.activation_bytes, tokens()),
            ("backward", self.backward_bytes, "buffers of a layer".to_owned()),
            ("head", self.head_bytes, "rows and chunks of logits".to_owned()),
            ("reference", self.reference_bytes, "weights of the policy at the start".to_owned()),
            ("program", self.program_bytes, "code, tokenizer, threads".to_owned()),
        ]
    }
}

impl fmt::Display for TrainingPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        for (name, bytes, note) in self.parts().into_iter().filter(|(_, bytes, _)| *bytes > 0) {
            let line = format!("{name:<12} {:>10.1} MiB  {note}", mib(bytes));
            writeln!(f, "{}", line.trim_end())?;
        }
        write!(f, "peak         {:>10.1} MiB", mib(self.total_bytes()))
    }
}

/// The tokens of a training pass for which a run of `demand` fits into `free` bytes: the most that is
/// useful, halved until it does. `planned` are the bytes for a demand.
fn fitting(demand: &Demand, free: Option<u64>, planned: &dyn Fn(&Demand) -> u64) -> usize {
    let room = free.map_or(u64::MAX, |free| (free as f64 * FILL) as u64);
    let mut tokens = MAX_PLANNED_TOKENS;
    while tokens > MIN_PLANNED_TOKENS && planned(&demand.with_budget(tokens)) > room {
        tokens = (tokens / 2).max(MIN_PLANNED_TOKENS);
    }
    tokens
}

/// The tokens of a training pass before anything of the run is in memory.
pub fn planned_tokens(
    model: &ModelConfig,
    dtype: Dtype,
    engine: &MemoryPlan,
    demand: &Demand,
) -> usize {
    let planned = |demand: &Demand| TrainingPlan::new(model, dtype, engine, demand).total_bytes();
    fitting(demand, available_memory_bytes(), &planned)
}

/// The same when the engine and the reference are loaded.
pub(crate) fn planned_tokens_beside(engine: &engine::Engine, demand: &Demand) -> usize {
    let (model, dtype, plan) = (engine.model(), engine.dtype(), engine.memory_plan());
    let planned = |demand: &Demand| {
        let all = TrainingPlan::new(model, dtype, plan, demand);
        // Weights are there; the system hands out the cache when it is written to.
        all.total_bytes() - all.weights_bytes - all.program_bytes - all.reference_bytes
    };
    fitting(demand, available_memory_bytes(), &planned)
}

/// Keys and values of one layer for a pass of `rows` rows, in blocks of 16.
fn pass_kv(model: &ModelConfig, dtype: Dtype, rows: usize) -> u64 {
    let width = 2 * model.kv_heads * model.head_dim;
    (rows.next_multiple_of(16) * width * dtype.size_bytes()) as u64
}

/// Buffers of the backward pass of a layer: gradients of its values in f32, rounded operands, and the right
/// operand of a product transposed.
fn backward_bytes(model: &ModelConfig, dtype: Dtype, rows: usize) -> u64 {
    let (hidden, inter) = (model.hidden_size, model.intermediate_size);
    let (q, kv) = (model.heads * model.head_dim, model.kv_heads * model.head_dim);
    let norms = if model.qk_norm { q } else { 0 };
    let values = 4 * (hidden + inter + 2 * q + 2 * kv + norms);
    let left = inter.max(hidden);
    let operands = dtype.size_bytes() * (2 * left + hidden.max(q + 2 * kv) + 2 * inter);
    let largest = param_specs(model)
        .iter()
        .filter(|spec| spec.rows < model.vocab_size)
        .map(|spec| spec.len())
        .max()
        .unwrap_or(0);
    (rows * (values + operands) + dtype.size_bytes() * largest) as u64
}

/// The head's share of a pass: its rows in f32 and rounded, and a chunk of logits with its gradient.
fn head_bytes(model: &ModelConfig, dtype: Dtype, rows: usize) -> u64 {
    let (size, hidden) = (dtype.size_bytes(), model.hidden_size);
    let chunk = rows.min(ROW_BLOCK) * model.vocab_size.min(VOCAB_CHUNK);
    let logits = chunk * (4 + size);
    let transposed = size * hidden * (VOCAB_CHUNK.min(model.vocab_size) + rows.min(ROW_BLOCK));
    (rows * hidden * (2 * 4 + size) + logits + transposed) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEMAND: Demand = Demand {
        keep: Keep::AllLayers,
        pass_rows: 0,
        batch_rows: 3000,
        longest: 700,
        step_rows: 1,
        sequences: 1,
        reference: Reference::None,
    };

    #[test]
    fn a_pass_has_the_budget_or_the_longest_sequence_or_the_whole_batch() {
        let rows = |tokens| DEMAND.with_budget(tokens).pass_rows;
        assert_eq!([rows(1024), rows(256), rows(4096)], [1024, 700, 3000]);
    }

    #[test]
    fn the_budget_is_halved_until_it_fits() {
        let planned = |demand: &Demand| 1000 * demand.pass_rows as u64;
        let tokens = |free| fitting(&DEMAND, free, &planned);
        assert_eq!(tokens(None), 1536);
        assert_eq!(tokens(Some(2_000_000)), 1536);
        assert_eq!(tokens(Some(1_500_000)), 768);
        // Nothing fits: the least is tried.
        assert_eq!(tokens(Some(0)), 256);
    }

    #[test]
    fn a_demand_is_read_from_the_configuration() {
        let set = |pairs: &[(&str, &str)]| {
            let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
            let set: Vec<_> = pairs.iter().map(own).collect();
            let config = RlConfig::resolve(Some("grpo"), None, &set).expect("it resolves");
            Demand::rl(&config, &engine::EngineConfig::default())
        };
        let demand = set(&[
            ("data.train_batch_size", "8"),
            ("algorithm.mini_batch_size", "2"),
            ("data.max_prompt_length", "10"),
            ("data.max_response_length", "5"),
            ("trainer.max_tokens_per_microbatch", "64"),
        ]);
        assert_eq!((demand.batch_rows, demand.longest, demand.step_rows), (2 * 50, 15, 640));
        assert_eq!((demand.pass_rows, demand.sequences), (64, 64));
        assert_eq!((demand.reference, demand.keep), (Reference::None, Keep::AllLayers));
        let kept = set(&[("algorithm.use_kl_loss", "true"), ("trainer.recompute", "true")]);
        assert_eq!((kept.reference, kept.keep), (Reference::Kept, Keep::Inputs));
    }
}
