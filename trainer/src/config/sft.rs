//! The configuration of supervised training.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::validate::{limit, positive};
use super::{OptimizerConfig, PromptTemplate, layers::Layers};
use crate::error::Result;

/// Everything that decides how a supervised run goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftConfig {
    /// What is trained.
    pub model: SftModelConfig,
    /// On which pairs.
    pub data: SftDataConfig,
    /// By which optimizer; default as for reinforcement learning, with rate 1e-3.
    pub optimizer: OptimizerConfig,
    /// How long, what is saved and reported.
    pub trainer: SftTrainerConfig,
}

/// `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftModelConfig {
    /// A model to start from; default `builtin:arith`.
    pub path: String,
    /// A `config.json` to start from random weights instead; empty (default): none.
    pub config_json: String,
}

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftDataConfig {
    /// JSON lines files, or `builtin:arith` (default).
    pub train_files: Vec<String>,
    /// The same, for validation; default `builtin:arith`.
    pub val_files: Vec<String>,
    /// Pairs a step; default 64.
    pub train_batch_size: usize,
    /// Longest pair, in tokens; default 1024.
    pub max_length: usize,
    /// How prompts become text; default `chat`.
    pub prompt_template: PromptTemplate,
    /// Whether each epoch has a new order; default true.
    pub shuffle: bool,
    /// Seed of that order and of generated pairs; default 1.
    pub seed: u64,
    /// Share of generated answers that repeat their last digit, in [0, 1]; default 0.
    pub stutter: f64,
}

/// `[trainer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SftTrainerConfig {
    /// Steps of the run; default 1000.
    pub total_steps: u64,
    /// Steps between checkpoints, from which a run that is killed goes on; 0: only after the last; default 100.
    pub save_freq: u64,
    /// Steps between validations; 0: none; default 100.
    pub test_freq: u64,
    /// Tokens a forward and backward pass holds at once; a longer sequence passes alone. 0
    /// (default): 1536, or less where memory is short; the number in use is written to `config.toml`.
    pub max_tokens_per_microbatch: usize,
    /// Whether layers run again in the backward pass, to save memory; default false.
    pub recompute: bool,
    /// Checkpoints kept; 0: all; default 1.
    pub keep_checkpoints: usize,
    /// The folder of the run; default `runs/sft`.
    pub output: String,
    /// Seed of initial weights; default 0.
    pub seed: u64,
}

impl Default for SftConfig {
    fn default() -> Self {
        let builtin = || "builtin:arith".to_owned();
        Self {
            model: SftModelConfig { path: builtin(), config_json: String::new() },
            data: SftDataConfig {
                train_files: vec![builtin()],
                val_files: vec![builtin()],
                train_batch_size: 64,
                max_length: 1024,
                prompt_template: PromptTemplate::Chat,
                shuffle: true,
                seed: 1,
                stutter: 0.0,
            },
            optimizer: OptimizerConfig { lr: 1e-3, ..OptimizerConfig::default() },
            trainer: SftTrainerConfig {
                total_steps: 1000,
                save_freq: 100,
                test_freq: 100,
                max_tokens_per_microbatch: 0,
                recompute: false,
                keep_checkpoints: 1,
                output: "runs/sft".to_owned(),
                seed: 0,
            },
        }
    }
}

impl SftConfig {
    /// Resolves a configuration: the defaults, then the text of a TOML file, then overrides of dotted
    /// keys, as [`super::RlConfig::resolve`] does.
    ///
    /// # Errors
    /// If a key is unknown, or a value is of the wrong type or outside its limits.
    ///
    /// ```
    /// use trainer::config::SftConfig;
    /// let config = SftConfig::resolve(Some("[trainer]\ntotal_steps = 5"), &[])?;
    /// assert_eq!(config.trainer.total_steps, 5);
    /// # Ok::<(), trainer::error::Error>(())
    /// ```
    pub fn resolve(file: Option<&str>, overrides: &[(String, String)]) -> Result<Self> {
        let config: Self = Layers::new(file, overrides)?.resolve(&Self::default())?;
        limit(!config.data.train_files.is_empty(), "data.train_files", "empty", "1 file or more")?;
        positive("data.train_batch_size", config.data.train_batch_size)?;
        limit(config.data.max_length >= 2, "data.max_length", config.data.max_length, "2 or more")?;
        let stutter = config.data.stutter;
        limit((0.0..=1.0).contains(&stutter), "data.stutter", stutter, "0 to 1")?;
        let t = &config.trainer;
        limit(t.total_steps >= 1, "trainer.total_steps", t.total_steps, "1 or more")?;
        limit(!t.output.is_empty(), "trainer.output", "\"\"", "a folder")?;
        config.optimizer.validate()?;
        Ok(config)
    }

    /// Every key with its value, as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("the sections hold only what TOML can say")
    }

    /// SHA-256 of [`Self::to_toml`], in hex.
    pub fn hash(&self) -> String {
        format!("{:x}", Sha256::digest(self.to_toml()))
    }
}
