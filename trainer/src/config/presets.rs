//! The methods: vetted settings of `[algorithm]`, any of which can be overridden.
//!
//! | method | loss | settings | source |
//! |---|---|---|---|
//! | `grpo` | vanilla | clip 0.2 / 0.2 | 2402.03300 |
//! | `clip_higher` | vanilla | clip 0.2 / 0.28 | 2503.14476 |
//! | `clip_cov` | clip_cov | clip 1 / 1, ratio 2e-4, band (1, 5) | 2505.22617 |
//! | `kl_cov` | kl_cov | ratio 2e-3, coefficient 1, no clip | 2505.22617 |
//!
//! Common: GRPO advantages over the standard deviation, token-mean, 8 updates per rollout, AdamW
//! without decay, constant rate, no divergence term, no entropy bonus.

use serde::{Deserialize, Serialize};

use super::layers::{Layers, nearest};
use super::{
    AdvEstimator, AlgorithmConfig, CovScope, DataConfig, LossMode, ModelConfig, OnError,
    OptimizerConfig, OverlongConfig, PromptTemplate, RewardConfig, RlConfig, RolloutConfig,
    TrainerConfig,
};
use crate::agg::AggMode;
use crate::error::{Error, Result};
use crate::kl::{KlEstimator, KlGradient, KlValue};
use crate::schedule::LrShape;

/// A named setting of `[algorithm]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The baseline.
    Grpo,
    /// With a wider upper clip.
    ClipHigher,
    /// Clip-Cov.
    ClipCov,
    /// KL-Cov.
    KlCov,
}

/// Methods the documentation lists that do not exist yet.
const LATER: [&str; 12] = [
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "opo",
    "dapo",
    "gspo",
    "cispo",
    "gpg",
    "sapo",
    "gmpo",
];

impl Method {
    /// All methods.
    pub const ALL: [Self; 4] = [Self::Grpo, Self::ClipHigher, Self::ClipCov, Self::KlCov];

    /// The method's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpo => "grpo",
            Self::ClipHigher => "clip_higher",
            Self::ClipCov => "clip_cov",
            Self::KlCov => "kl_cov",
        }
    }

    /// The method of a name.
    ///
    /// # Errors
    /// If there is none, naming the nearest, or those available for one that is not there yet.
    ///
    /// ```
    /// use trainer::config::Method;
    /// assert_eq!(Method::parse("kl_cov")?, Method::KlCov);
    /// let error = Method::parse("klcov").unwrap_err().to_string();
    /// assert_eq!(error, "unknown method klcov, did you mean kl_cov?");
    /// # Ok::<(), trainer::error::Error>(())
    /// ```
    pub fn parse(name: &str) -> Result<Self> {
        if let Some(method) = Self::ALL.into_iter().find(|m| m.name() == name) {
            return Ok(method);
        }
        let names = Self::ALL.map(Self::name);
        if LATER.contains(&name) {
            return Err(Error::config(format!(
                "method {name} is not available yet; available: {}",
                names.join(", ")
            )));
        }
        let all = names.into_iter().chain(LATER);
        Err(Error::config(format!("unknown method {name}, did you mean {}?", nearest(name, all))))
    }
}

/// The method to start from: the given one, or the one in the layers, or `grpo`.
pub(super) fn choose(given: Option<&str>, layers: &Layers) -> Result<Method> {
    let overridden = layers.overridden("algorithm.method");
    if let (Some(given), Some(overridden)) = (given, overridden)
        && given != overridden
    {
        return Err(Error::config(format!(
            "method is {given}, but algorithm.method is set to {overridden}"
        )));
    }
    let in_file = layers.in_file("algorithm", "method");
    Method::parse(given.or(overridden).or(in_file).unwrap_or("grpo"))
}

impl RlConfig {
    /// The defaults under a method. `algorithm.mini_batch_size` is 0, which resolving replaces by an
    /// eighth of the batch.
    pub(super) fn preset(method: Method) -> Self {
        Self {
            model: ModelConfig { path: "builtin:arith".to_owned() },
            data: DataConfig {
                train_files: vec!["builtin:arith".to_owned()],
                val_files: vec!["builtin:arith".to_owned()],
                train_batch_size: 32,
                max_prompt_length: 512,
                max_response_length: 256,
                prompt_template: PromptTemplate::Chat,
                shuffle: true,
                seed: 1,
            },
            rollout: RolloutConfig {
                n: 8,
                temperature: 1.0,
                top_p: 1.0,
                top_k: -1,
                stop: Vec::new(),
            },
            algorithm: AlgorithmConfig::preset(method),
            optimizer: OptimizerConfig::default(),
            reward: RewardConfig {
                function: "auto".to_owned(),
                timeout_s: 10.0,
                on_error: OnError::Zero,
                error_value: 0.0,
                workers: 4,
            },
            trainer: TrainerConfig {
                total_steps: 50,
                save_freq: 0,
                test_freq: 10,
                val_before_train: true,
                max_tokens_per_microbatch: 4096,
                recompute: false,
                keep_checkpoints: 2,
                output: format!("runs/{}", method.name()),
                trackers: vec!["console".to_owned(), "jsonl".to_owned()],
                seed: 0,
            },
        }
    }
}

impl AlgorithmConfig {
    fn preset(method: Method) -> Self {
        let (loss_mode, clip_ratio_low, clip_ratio_high) = match method {
            Method::Grpo => (LossMode::Vanilla, 0.2, 0.2),
            Method::ClipHigher => (LossMode::Vanilla, 0.2, 0.28),
            Method::ClipCov => (LossMode::ClipCov, 1.0, 1.0),
            Method::KlCov => (LossMode::KlCov, 0.2, 0.2),
        };
        Self {
            method,
            adv_estimator: AdvEstimator::Grpo,
            loss_mode,
            norm_adv_by_std_in_grpo: true,
            loss_agg_mode: AggMode::TokenMean,
            mini_batch_size: 0,
            ppo_epochs: 1,
            clip_ratio_low,
            clip_ratio_high,
            clip_ratio_c: 3.0,
            clip_cov_ratio: 2e-4,
            clip_cov_lb: 1.0,
            clip_cov_ub: 5.0,
            kl_cov_ratio: 2e-3,
            ppo_kl_coef: 1.0,
            cov_scope: CovScope::Minibatch,
            entropy_coeff: 0.0,
            use_kl_loss: false,
            kl_loss_coef: 1e-3,
            kl_loss_type: KlEstimator { value: KlValue::K3, gradient: KlGradient::Own },
            filter_groups: false,
            overlong_buffer: OverlongConfig { enable: false, len: 64, penalty_factor: 1.0 },
        }
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-5,
            lr_schedule: LrShape::Constant,
            lr_warmup_steps: 0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            grad_clip: 1.0,
        }
    }
}
