//! How much memory an engine takes, planned before anything is allocated.
//!
//! Counts what the engine itself reserves; the trainer adds its own part. Nothing here allocates.

use std::fmt;

use kernels::KvCache;

use crate::available::{available_memory_bytes, memory_and_swap_bytes};
use crate::config::{EngineConfig, Quantization};
use crate::decoder::{Keep, Tape, Weights};
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelSource};

/// Rows of logits that generation holds at once.
pub const LOGIT_ROWS: usize = 64;
/// Rows of logits of which changed copies are held at once.
pub(crate) const CHANGED_ROWS: usize = 16;
/// Share of the memory left after all else that a planned KV cache may take.
const KV_SHARE: f64 = 0.5;
/// Longest context taken from a model when nothing is asked for: more costs memory few need.
const DEFAULT_MAX_MODEL_LEN: usize = 8192;

/// What an engine will hold in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// The weights.
    pub weights_bytes: u64,
    /// The KV cache: `kv_blocks` blocks of `block_size` tokens.
    pub kv_bytes: u64,
    /// Blocks in it.
    pub kv_blocks: usize,
    /// Tokens a block holds.
    pub block_size: usize,
    /// Intermediate values of the largest step.
    pub activation_bytes: u64,
    /// Logits held at once.
    pub logits_bytes: u64,
    /// Longest sequence, prompt and output together.
    pub max_model_len: usize,
}

/// Rows of logits, changed copies included, that sampling holds at once.
fn logit_rows(config: &EngineConfig) -> usize {
    let guesses = config.speculation.max_guesses;
    let drawn = config.max_num_seqs.saturating_mul(1 + guesses).min(config.max_num_batched_tokens);
    LOGIT_ROWS.min(drawn) + CHANGED_ROWS.min(drawn)
}

impl MemoryPlan {
    /// Plans for `model` under `config` on this machine.
    ///
    /// # Errors
    /// When the KV cache cannot hold one sequence of the longest length, or a setting is out of range.
    pub fn new(model: &ModelConfig, config: &EngineConfig) -> Result<Self> {
        Self::with_weights(model, config, model.weights_bytes(config.resolved_dtype()))
    }

    /// As [`MemoryPlan::new`], with weights that stay quantised where `config` says so.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`].
    pub fn for_source(source: &ModelSource, config: &EngineConfig) -> Result<Self> {
        match config.quantization {
            Quantization::None => Self::new(source.config(), config),
            Quantization::AsStored => {
                let bytes = Weights::bytes_as_stored(source, config.resolved_dtype());
                Self::with_weights(source.config(), config, bytes)
            }
        }
    }

    fn with_weights(
        model: &ModelConfig,
        config: &EngineConfig,
        weights_bytes: u64,
    ) -> Result<Self> {
        let block_bytes = KvCache::bytes_per_block(
            config.resolved_kv_dtype(),
            model.layers,
            config.block_size,
            model.kv_heads,
            model.head_dim,
        ) as u64;
        let wanted_len = config.max_model_len.unwrap_or_else(|| {
            let useful = config.useful_model_len.unwrap_or(DEFAULT_MAX_MODEL_LEN);
            model.max_context().min(useful.max(1))
        });
        if wanted_len == 0 || wanted_len > model.max_context() {
            return Err(Error::config(format!(
                "max_model_len is {wanted_len}, limit is 1 to the model's {}",
                model.max_context()
            )));
        }
        let sequence_bytes =
            (wanted_len.div_ceil(config.block_size) as u64).saturating_mul(block_bytes);
        let useful = (config.max_num_seqs as u64).saturating_mul(sequence_bytes);
        let rows = config.max_num_batched_tokens;
        let activation_bytes = Tape::bytes(model, config.resolved_dtype(), Keep::OneLayer, rows);
        let logits_bytes = 4 * (logit_rows(config) * model.vocab_size) as u64;
        let kv_budget = config.kv_cache_memory_bytes.unwrap_or_else(|| {
            let free = available_memory_bytes().unwrap_or(4 << 30);
            let others = weights_bytes.saturating_add(activation_bytes + logits_bytes);
            let rest = free.saturating_sub(others) as f64 * KV_SHARE;
            (rest as u64).min(useful).max(sequence_bytes)
        });
        let kv_blocks = usize::try_from(kv_budget / block_bytes).unwrap_or(usize::MAX);
        let room = kv_blocks.saturating_mul(config.block_size);
        let max_model_len = match config.max_model_len {
            Some(len) if len > room => {
                return Err(Error::config(format!(
                    "kv cache of {kv_budget} bytes holds {room} tokens, max_model_len is {len}"
                )));
            }
            Some(len) => len,
            None => wanted_len.min(room),
        };
        if max_model_len == 0 {
            return Err(Error::config(format!(
                "kv cache has {kv_budget} bytes, limit is at least {block_bytes} for one block"
            )));
        }
        Ok(Self {
            weights_bytes,
            kv_bytes: kv_blocks as u64 * block_bytes,
            kv_blocks,
            block_size: config.block_size,
            activation_bytes,
            logits_bytes,
            max_model_len,
        })
    }

    /// Whether it fits into the memory that is free now, swap included.
    ///
    /// # Errors
    /// `ErrorKind::Config` when it does not, with all its parts.
    pub fn check_free(&self) -> Result<()> {
        if let Some(free) = memory_and_swap_bytes().filter(|free| *free < self.total_bytes()) {
            return Err(Error::config(format!(
                "weights take {} bytes, keys and values {} for sequences of up to {} tokens, activations {}, logits \
                 {}: {} in all, free are {free}; a shorter max_model_len, fewer max_num_batched_tokens or less \
                 kv_cache_memory_bytes take less",
                self.weights_bytes,
                self.kv_bytes,
                self.max_model_len,
                self.activation_bytes,
                self.logits_bytes,
                self.total_bytes()
            )));
        }
        Ok(())
    }

    /// Whether it fits; asks the system for the cache, which is its one large piece, and gives it back.
    ///
    /// # Errors
    /// As [`MemoryPlan::check_free`], and when the system refuses: to be told at the start, as a failed
    /// allocation ends the process.
    pub(crate) fn check_room(&self) -> Result<()> {
        self.check_free()?;
        let mut cache = Vec::<u8>::new();
        let bytes = usize::try_from(self.kv_bytes).unwrap_or(usize::MAX);
        cache.try_reserve_exact(bytes).map_err(|_refused| {
            let free = available_memory_bytes().map_or("unknown".to_owned(), |b| b.to_string());
            Error::config(format!(
                "kv_cache_memory_bytes is {bytes} and the system refuses it, free bytes are {free}; \
                 weights take {}, activations {}, logits {}",
                self.weights_bytes, self.activation_bytes, self.logits_bytes
            ))
        })
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.weights_bytes + self.kv_bytes + self.activation_bytes + self.logits_bytes
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        writeln!(f, "weights      {:>10.1} MiB", mib(self.weights_bytes))?;
        writeln!(
            f,
            "kv cache     {:>10.1} MiB  {} blocks of {} tokens",
            mib(self.kv_bytes),
            self.kv_blocks,
            self.block_size
        )?;
        writeln!(f, "activations  {:>10.1} MiB", mib(self.activation_bytes))?;
        writeln!(f, "logits       {:>10.1} MiB", mib(self.logits_bytes))?;
        writeln!(f, "total        {:>10.1} MiB", mib(self.total_bytes()))?;
        write!(f, "longest sequence {} tokens", self.max_model_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{hub::Builtin, open_builtin};

    #[test]
    fn a_model_larger_than_memory_keeps_its_context_and_is_refused() {
        let source = open_builtin(Builtin::Arith).expect("the model");
        let (model, config) = (source.config(), EngineConfig::default());
        let small = MemoryPlan::new(model, &config).expect("a plan");
        assert!(small.check_free().is_ok(), "{small}");
        let plan = MemoryPlan::with_weights(model, &config, 1 << 50).expect("a plan");
        assert_eq!(plan.max_model_len, model.max_context().min(DEFAULT_MAX_MODEL_LEN));
        assert!(plan.kv_blocks * plan.block_size >= plan.max_model_len, "{plan}");
        let error = plan.check_free().expect_err("no machine has that").to_string();
        assert!(error.starts_with("weights take 1125899906842624 bytes, "), "{error}");
        // A cache of a size that is asked for holds what it holds.
        let tiny = EngineConfig { kv_cache_memory_bytes: Some(100_000), ..config };
        let plan = MemoryPlan::new(model, &tiny).expect("a plan");
        assert_eq!(plan.max_model_len, plan.kv_blocks * plan.block_size);
    }
}
