//! How an engine is set up; resolved once, never changed afterwards.

use kernels::{Dtype, KvDtype, Level};
use scheduler::PrefixCache;

use crate::error::{Error, Result};

/// What becomes of quantised weights of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Quantization {
    /// They are expanded when the file is loaded: the weights can be trained.
    #[default]
    None,
    /// They stay as they are stored: less memory and faster decoding, for serving only.
    AsStored,
}

/// Which guesses are run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RunGuesses {
    /// Those that are worth their rows.
    #[default]
    Paying,
    /// All that there is room for: to measure, and to test.
    All,
}

/// How many tokens are guessed, and on what evidence. The default is the vetted one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Speculation {
    /// The most guesses of a sample in a step; 0 to 64, 0 for none.
    pub max_guesses: usize,
    /// Tokens at the end of a text that must have occurred before; 1 to `longest_match`.
    pub shortest_match: usize,
    /// Tokens at the end of a text that are compared with an earlier occurrence; up to 64.
    pub longest_match: usize,
    /// Which of the guesses are run.
    pub run: RunGuesses,
}

impl Default for Speculation {
    fn default() -> Self {
        let run = RunGuesses::Paying;
        Self { max_guesses: 8, shortest_match: 2, longest_match: 16, run }
    }
}

impl Speculation {
    /// No guesses.
    pub fn off() -> Self {
        Self { max_guesses: 0, ..Self::default() }
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// `ErrorKind::Config`, naming the setting in vLLM's words, its value and its limit.
    pub fn validate(&self) -> Result<()> {
        limit("num_speculative_tokens", self.max_guesses, 0, 64)?;
        limit("prompt_lookup_max", self.longest_match, 1, 64)?;
        limit("prompt_lookup_min", self.shortest_match, 1, self.longest_match)
    }
}

/// Settings of an engine. The default is the vetted one.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Longest sequence, prompt and output together, in tokens; `None` for the model's own, up to 8192.
    pub max_model_len: Option<usize>,
    /// Length that callers will not go beyond, in tokens, where `max_model_len` does not ask for more:
    /// saves memory without being a promise that the model can do it.
    pub useful_model_len: Option<usize>,
    /// Sequences that run at once; 1 to 65,536.
    pub max_num_seqs: usize,
    /// Rows of one step, in tokens; 1 to 1,048,576.
    pub max_num_batched_tokens: usize,
    /// Tokens of a KV block; a multiple of 16.
    pub block_size: usize,
    /// Bytes for the KV cache; `None` plans from free memory.
    pub kv_cache_memory_bytes: Option<u64>,
    /// Whether prompts reuse blocks of earlier ones.
    pub prefix_cache: PrefixCache,
    /// Compute threads; `None` for all cores.
    pub threads: Option<usize>,
    /// Kernels to use; `None` for the fastest this processor has.
    pub level: Option<Level>,
    /// Format of weights, products and KV cache; `None` for bf16.
    pub dtype: Option<Dtype>,
    /// Format of the KV cache alone, for serving; `None` for that of `dtype`.
    pub kv_dtype: Option<KvDtype>,
    /// Whether quantised weights of a file are expanded to `dtype` when it is loaded.
    pub quantization: Quantization,
    /// How much is guessed of what samples draw next: it changes how fast they are, and no bit.
    pub speculation: Speculation,
    /// Key of the random streams of requests without a seed of their own.
    pub seed: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_model_len: None,
            useful_model_len: None,
            max_num_seqs: 256,
            max_num_batched_tokens: 2048,
            block_size: 16,
            kv_cache_memory_bytes: None,
            prefix_cache: PrefixCache::On,
            threads: None,
            level: None,
            dtype: None,
            kv_dtype: None,
            quantization: Quantization::None,
            speculation: Speculation::default(),
            seed: 0,
        }
    }
}

impl EngineConfig {
    /// The format in use.
    pub fn resolved_dtype(&self) -> Dtype {
        self.dtype.unwrap_or(Dtype::Bf16)
    }

    /// The format of the KV cache in use.
    pub fn resolved_kv_dtype(&self) -> KvDtype {
        self.kv_dtype.unwrap_or(KvDtype::Plain(self.resolved_dtype()))
    }

    /// The number of compute threads in use.
    pub fn resolved_threads(&self) -> usize {
        self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    }

    /// The kernels in use.
    pub fn resolved_level(&self) -> Level {
        self.level.unwrap_or_else(Level::detect)
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// `ErrorKind::Config`, naming the setting, its value and its limit.
    pub fn validate(&self) -> Result<()> {
        limit("max_num_seqs", self.max_num_seqs, 1, 65_536)?;
        limit("max_num_batched_tokens", self.max_num_batched_tokens, 1, 1 << 20)?;
        limit("block_size", self.block_size, 16, 1024)?;
        if !self.block_size.is_multiple_of(16) {
            let size = self.block_size;
            return Err(Error::config(format!("block_size is {size}, limit is a multiple of 16")));
        }
        self.speculation.validate()?;
        limit("threads", self.resolved_threads(), 1, 1024)?;
        let level = self.resolved_level();
        if !level.available() {
            return Err(Error::unsupported(format!("this processor has no {level} kernels")));
        }
        Ok(())
    }
}

fn limit(name: &str, value: usize, low: usize, high: usize) -> Result<()> {
    if (low..=high).contains(&value) {
        return Ok(());
    }
    Err(Error::config(format!("{name} is {value}, limit is {low} to {high}")))
}
