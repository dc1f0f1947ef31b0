//! How much memory an engine takes, planned before anything is allocated.
//!
//! Counts what the engine itself reserves; the trainer adds its own part. Nothing here allocates.

use std::fmt;

use kernels::KvCache;

use crate::config::{EngineConfig, Quantization};
use crate::decoder::{Keep, Tape, Weights};
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelSource};

/// Rows of logits that generation holds at once.
pub const LOGIT_ROWS: usize = 64;
/// Rows of logits of which changed copies are held at once.
pub(crate) const CHANGED_ROWS: usize = 16;
/// Share of the memory left after weights that a planned KV cache may take.
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
        let useful = (config.max_num_seqs as u64)
            .saturating_mul(wanted_len.div_ceil(config.block_size) as u64)
            .saturating_mul(block_bytes);
        let kv_budget = config.kv_cache_memory_bytes.unwrap_or_else(|| {
            let free = available_memory_bytes().unwrap_or(4 << 30);
            let rest = free.saturating_sub(weights_bytes) as f64 * KV_SHARE;
            (rest as u64).min(useful).max(block_bytes)
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
        let rows = config.max_num_batched_tokens;
        Ok(Self {
            weights_bytes,
            kv_bytes: kv_blocks as u64 * block_bytes,
            kv_blocks,
            block_size: config.block_size,
            activation_bytes: Tape::bytes(model, config.resolved_dtype(), Keep::OneLayer, rows),
            logits_bytes: 4 * (logit_rows(config) * model.vocab_size) as u64,
            max_model_len,
        })
    }

    /// Asks the system for the cache, which is its one large piece, and gives it back.
    ///
    /// # Errors
    /// When the system refuses: to be told at the start, as a failed allocation ends the process.
    pub(crate) fn check_room(&self) -> Result<()> {
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

/// Memory that can be taken without swapping; `None` where the system does not say.
pub fn available_memory_bytes() -> Option<u64> {
    bytes_of("MemAvailable:", &std::fs::read_to_string("/proc/meminfo").ok()?)
}

/// What the line of a file in `/proc` that begins with `key` says.
fn bytes_of(key: &str, text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

/// Memory of a process that is in RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidentMemory {
    /// At the moment, in bytes.
    pub now_bytes: u64,
    /// The most at any time so far, in bytes.
    pub peak_bytes: u64,
}

impl ResidentMemory {
    /// That of this process; `None` where the system does not say.
    ///
    /// ```
    /// if let Some(memory) = engine::ResidentMemory::own() {
    ///     assert!(memory.peak_bytes >= memory.now_bytes);
    /// }
    /// ```
    pub fn own() -> Option<Self> {
        Self::read("/proc/self/status")
    }

    /// That of the process `id`; `None` if it is gone or the system does not say.
    pub fn of(id: u32) -> Option<Self> {
        Self::read(&format!("/proc/{id}/status"))
    }

    fn read(path: &str) -> Option<Self> {
        let text = std::fs::read_to_string(path).ok()?;
        let bytes = |key| bytes_of(key, &text);
        Some(Self { now_bytes: bytes("VmRSS:")?, peak_bytes: bytes("VmHWM:")? })
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
