//! The configuration of a run: sections, keys and their defaults.
//!
//! A configuration is resolved once, from a preset (the method), a file and overrides, and never
//! changed after: [`RlConfig::resolve`]. Keys are verl's where verl has one; an unknown key is an
//! error that names the nearest. [`RlConfig::to_toml`] writes every key with its value; read back, it
//! gives the same configuration. Leaves out what the engine needs to run a model (memory, threads).

mod algorithm;
mod layers;
mod presets;
mod sft;
mod validate;
mod validation;
mod warnings;

use std::ops::Range;

use engine::decoder::Keep;
use kernels::AdamW;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::encode::Overlong;
use crate::error::Result;
use crate::optimizer::clip_scale;
use crate::schedule::{LrShape, Schedule};

pub use algorithm::{
    AdvEstimator, AlgorithmConfig, CorrectionConfig, CovScope, FilterMetric, KlControl,
    KlCtrlConfig, LossMode, OverlongConfig, RolloutIs,
};
pub use presets::Method;
pub use sft::{SftConfig, SftDataConfig, SftModelConfig, SftTrainerConfig};
pub use validation::ValidationConfig;

/// Everything that decides how a reinforcement learning run goes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RlConfig {
    /// What is trained.
    pub model: ModelConfig,
    /// On which tasks.
    pub data: DataConfig,
    /// How responses are sampled.
    pub rollout: RolloutConfig,
    /// What is optimised.
    pub algorithm: AlgorithmConfig,
    /// By which optimizer.
    pub optimizer: OptimizerConfig,
    /// How responses are judged.
    pub reward: RewardConfig,
    /// How responses are sampled to validate.
    pub validation: ValidationConfig,
    /// How long, what is saved and reported.
    pub trainer: TrainerConfig,
}

/// `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// A model folder, a GGUF file, a hub id or `builtin:arith` (default).
    pub path: String,
}

/// `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// JSON lines or Parquet files, `builtin:arith` (default), `builtin:sum` or `builtin:countdown`.
    pub train_files: Vec<String>,
    /// The same, for validation; default `builtin:arith`. Built-in tasks are none that training sees.
    pub val_files: Vec<String>,
    /// The share of each of `train_files` in an epoch, relative to the others; empty (default): every row
    /// once. An epoch is as long as all rows together.
    pub weights: Vec<f64>,
    /// Whether the first row of a prompt is kept and its copies dropped; default false.
    pub deduplicate: bool,
    /// Whether prompts with a Chinese, Japanese or Korean character are dropped; default false.
    pub drop_cjk_prompts: bool,
    /// Whether prompts that are too long are dropped; default false: they end the run before it begins.
    pub filter_overlong_prompts: bool,
    /// Prompts a step; default 32 (the paper: 256).
    pub train_batch_size: usize,
    /// Longest prompt, in tokens; default 512 (the paper: 2048).
    pub max_prompt_length: usize,
    /// Longest response, in tokens; default 256 (the paper: 8192).
    pub max_response_length: usize,
    /// How prompts become text; default `chat`.
    pub prompt_template: PromptTemplate,
    /// Whether each epoch has a new order; default true.
    pub shuffle: bool,
    /// Seed of that order; default 1, as in verl.
    pub seed: u64,
}

/// How a row's prompt becomes the text a model sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptTemplate {
    /// The model's chat template.
    Chat,
    /// The text template of R1-Zero, around the last message.
    R1Zero,
    /// The text as it is; messages joined.
    Raw,
}

/// `[rollout]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RolloutConfig {
    /// Responses a prompt, at least 1; default 8.
    pub n: usize,
    /// Above 0; log-probs and entropy are of logits over this; default 1.
    pub temperature: f64,
    /// In (0, 1]; default 1.
    pub top_p: f64,
    /// At least 1, or -1 for no limit (default).
    pub top_k: i64,
    /// Texts that end a response; default none.
    pub stop: Vec<String>,
}

/// `[optimizer]`: AdamW.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Learning rate; default 1e-5, for models up to a billion parameters (the paper: 5e-7 at 7B).
    pub lr: f64,
    /// `constant` (default) or `cosine`.
    pub lr_schedule: LrShape,
    /// Steps over which the rate rises; default 0.
    pub lr_warmup_steps: u64,
    /// Each in [0, 1); default 0.9, 0.999.
    pub betas: [f64; 2],
    /// Above 0; default 1e-8.
    pub eps: f64,
    /// Decoupled, at least 0; default 0.
    pub weight_decay: f64,
    /// Global norm gradients are scaled down to, above 0 (`inf`: never); default 1.
    pub grad_clip: f64,
}

/// `[reward]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// `auto` (by data source, default), a built-in rule as [`Verifier::named`] reads it,
    /// `command:PROGRAM`, or an address `http://...` or `https://...`.
    ///
    /// [`Verifier::named`]: crate::verifier::Verifier::named
    pub function: String,
    /// Limit for one reward, in seconds; default 10. Built-in rules need none.
    pub timeout_s: f64,
    /// Limit for the first reward of a program that has just been started, in seconds; default 60; where it is
    /// below `timeout_s`, that.
    pub start_timeout_s: f64,
    /// What a failed reward does; default `zero`.
    pub on_error: OnError,
    /// The reward of a failed one under `value`, finite; default 0.
    pub error_value: f64,
    /// Requests to a program or a server at a time, 1 to 256; a program runs that often; default 4.
    pub workers: usize,
}

/// What happens when a reward function fails. Whatever it is, a program or a server that fails on all of several
/// responses of a rollout ends the run, which goes on from there when it is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnError {
    /// The response gets 0, and the failure is counted.
    Zero,
    /// The response gets `reward.error_value`, and the failure is counted.
    Value,
    /// The run ends.
    Fail,
}

/// `[trainer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainerConfig {
    /// Steps of the run; default 50.
    pub total_steps: u64,
    /// Steps between checkpoints, from which a run that is killed goes on; 0: only after the last; default 10.
    pub save_freq: u64,
    /// Steps between validations; 0: none after the start; default 10.
    pub test_freq: u64,
    /// Whether to validate before the first step; default true.
    pub val_before_train: bool,
    /// Tokens a forward and backward pass holds at once, a prompt counted once for its samples; a longer
    /// sequence passes alone. 0 (default): 1536, or less where memory is short
    /// ([`planned_tokens`](crate::memory::planned_tokens)). How gradients are summed depends on it, so
    /// the number in use is written to the run's `config.toml`, and a resumed run goes on with that.
    pub max_tokens_per_microbatch: usize,
    /// Whether layers run again in the backward pass, to the same bits, so that a pass holds their inputs
    /// instead of all activations; default false.
    pub recompute: bool,
    /// Whether a step's tokens are scored once more after its updates, to measure how their entropy changed
    /// (`entropy/probe_delta`); a forward pass more a step; default false.
    pub probe_entropy: bool,
    /// Checkpoints kept; 0: all; default 2.
    pub keep_checkpoints: usize,
    /// The folder of the run; default `runs/METHOD`.
    pub output: String,
    /// Where the numbers of a step go, among `console` (a line on the terminal), `jsonl` (`metrics.jsonl`,
    /// which is written whether it is named or not: resuming and the report read it) and `tensorboard`;
    /// default the first two.
    pub trackers: Vec<String>,
    /// Seed of sampling and of Clip-Cov's choice; default 0.
    pub seed: u64,
}

impl RlConfig {
    /// The responses of each update on those of `prompts` prompts, groups together: mini-batches of whole
    /// groups, as often as `algorithm.ppo_epochs` says.
    pub fn mini_batches(&self, prompts: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let (size, n) = (self.algorithm.mini_batch_size, self.rollout.n);
        let epoch =
            (0..prompts).step_by(size).map(move |from| from * n..(from + size).min(prompts) * n);
        (0..self.algorithm.ppo_epochs).flat_map(move |_| epoch.clone())
    }

    /// Resolves a configuration: the preset of the method, then the text of a TOML file, then
    /// overrides of dotted keys. The method is the given one, or else the one in the overrides, the
    /// file, or `grpo`. Values of overrides are TOML; a bare word is text, a list may be written
    /// with commas.
    ///
    /// # Errors
    /// If a key or method is unknown, a value is of the wrong type or outside its limits, or the
    /// given method contradicts an override.
    ///
    /// ```
    /// use trainer::config::RlConfig;
    /// let set = [("algorithm.kl_cov_ratio".to_owned(), "0.02".to_owned())];
    /// let config = RlConfig::resolve(Some("kl_cov"), Some("[rollout]\nn = 4"), &set)?;
    /// assert_eq!((config.rollout.n, config.algorithm.kl_cov_ratio), (4, 0.02));
    /// assert_eq!(RlConfig::resolve(None, Some(&config.to_toml()), &[])?, config);
    /// let set = [("algorithm.kl_cov_ration".to_owned(), "1".to_owned())];
    /// let error = RlConfig::resolve(None, None, &set).unwrap_err();
    /// assert_eq!(
    ///     error.to_string(),
    ///     "unknown key algorithm.kl_cov_ration, did you mean algorithm.kl_cov_ratio?"
    /// );
    /// # Ok::<(), trainer::error::Error>(())
    /// ```
    pub fn resolve(
        method: Option<&str>,
        file: Option<&str>,
        overrides: &[(String, String)],
    ) -> Result<Self> {
        let layers = layers::Layers::new(file, overrides)?;
        let method = presets::choose(method, &layers)?;
        let mut config: Self = layers.resolve(&Self::preset(method))?;
        config.algorithm.method = method;
        if config.algorithm.mini_batch_size == 0 {
            config.algorithm.mini_batch_size = (config.data.train_batch_size / 8).max(1);
        }
        if config.algorithm.overlong_buffer.len == 0 {
            config.algorithm.overlong_buffer.len = (config.data.max_response_length / 5).max(1);
        }
        config.validate()?;
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

    /// Optimizer updates a step makes.
    pub fn updates_per_step(&self) -> usize {
        let batches = self.data.train_batch_size.div_ceil(self.algorithm.mini_batch_size);
        batches * self.algorithm.ppo_epochs
    }
}

impl TrainerConfig {
    /// Whether `trackers` has this one.
    pub fn tracks(&self, tracker: &str) -> bool {
        self.trackers.iter().any(|named| named == tracker)
    }
}

/// What the forward passes of training keep, by the key `trainer.recompute`.
pub fn kept_for_backward(recompute: bool) -> Keep {
    if recompute { Keep::Inputs } else { Keep::AllLayers }
}

impl DataConfig {
    /// What becomes of prompts that are too long.
    pub fn overlong(&self) -> Overlong {
        if self.filter_overlong_prompts { Overlong::Drop } else { Overlong::Refuse }
    }
}

impl OptimizerConfig {
    /// One step at rate `lr` on gradients of norm `norm`, clipped; the optimizer counts its steps.
    pub(crate) fn adamw(&self, lr: f64, norm: f64) -> AdamW {
        AdamW {
            lr,
            beta1: self.betas[0],
            beta2: self.betas[1],
            eps: self.eps,
            weight_decay: self.weight_decay,
            step: 0,
            grad_scale: clip_scale(norm, self.grad_clip),
        }
    }

    /// The learning rate over `total_steps` steps.
    pub fn schedule(&self, total_steps: u64) -> Schedule {
        Schedule {
            base: self.lr,
            shape: self.lr_schedule,
            warmup_steps: self.lr_warmup_steps,
            total_steps,
        }
    }
}

#[cfg(test)]
mod tests;
