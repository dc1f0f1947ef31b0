//! The methods: vetted settings of `[algorithm]`, any of which can be overridden.
//!
//! | method | advantages | loss | settings | source |
//! |---|---|---|---|---|
//! | `grpo` | grpo | vanilla | clip 0.2 / 0.2 | 2402.03300 |
//! | `dr_grpo` | grpo, no std | vanilla | seq-mean-token-sum-norm | 2503.20783 |
//! | `rloo` | rloo | vanilla | clip 0.2 / 0.2 | 2402.14740 |
//! | `reinforce_pp` | reinforce_plus_plus | vanilla | clip 0.2 / 0.2 | 2501.03262 |
//! | `reinforce_pp_baseline` | reinforce_plus_plus_baseline | vanilla | clip 0.2 / 0.2 | 2501.03262 |
//! | `remax` | remax | vanilla | clip 0.2 / 0.2 | 2310.10505 |
//! | `opo` | opo | vanilla | clip 0.2 / 0.2 | 2505.23585 |
//! | `dapo` | grpo | vanilla | clip 0.2 / 0.28, c 10, dynamic sampling by accuracy, overlong buffer a fifth of the longest response, decay 0.1, warm-up 10 | 2503.14476, its script |
//! | `clip_higher` | grpo | vanilla | clip 0.2 / 0.28 | 2503.14476 |
//! | `clip_cov` | grpo | clip_cov | clip 1 / 1, ratio 2e-4, band (1, 5) | 2505.22617 |
//! | `kl_cov` | grpo | kl_cov | ratio 2e-3, coefficient 1, no clip | 2505.22617 |
//! | `gspo` | grpo | gspo | clip 3e-4 / 4e-4, seq-mean-token-mean | 2507.18071 |
//! | `cispo` | grpo | cispo | clip 10 (none) / 0.2 | 2506.13585, verl |
//! | `gpg` | gpg | gpg | | 2504.02546 |
//! | `sapo` | grpo | sapo | tau 1 / 1.05, seq-mean-token-mean | 2511.20347 |
//! | `gmpo` | grpo | geo_mean | log-ratios clipped at 0.4 / 0.4, seq-mean-token-mean | 2507.20673 |
//!
//! Common: 8 updates per rollout, AdamW without decay, constant rate, no divergence term, no entropy bonus.
//!
//! Three more set sizes and rates as well, and need a model of a context they fit:
//!
//! | preset | values | script |
//! |---|---|---|
//! | `paper-7b` | `kl_cov`, ratio 2e-3, coefficient 1; 256 prompts x 8, 32 an update; prompts up to 2048, responses up to 8192 tokens; rate 5e-7; 30720 tokens a micro-batch, over which covariances and denominators are taken; R1-Zero template; dynamic sampling by accuracy, 10 batches of 256; no clamp of the log-ratio; rewards by `prime_math` for every data source, which wants a boxed answer; no validation before the first step, then every 4, checkpoints every 32 | the paper's `recipe/dapo/7b_kl_cov.sh` and `data.zero` of its configuration |
//! | `paper-32b` | the same with ratio 2e-4, rate 1e-6, 20480 tokens | `recipe/dapo/32b_kl_cov.sh` |
//! | `verl` | as `paper-7b` with rate 1e-6, batches of 768 prompts, the chat template | `entropy/7b_kl_cov.sh` of verl's recipes |
//!
//! The paper's other methods at its sizes: `--method paper-7b` with `algorithm.loss_mode` and the clip ratios
//! of the table above. The first step of its code is at a rate of 0 by mistake, which no preset repeats.

use serde::{Deserialize, Serialize};

use super::layers::{Layers, nearest};
use super::{
    AdvEstimator, AlgorithmConfig, CorrectionConfig, CovScope, DataConfig, FilterMetric, KlControl,
    KlCtrlConfig, LossMode, ModelConfig, OnError, OptimizerConfig, OverlongConfig, PromptTemplate,
    RewardConfig, RlConfig, RolloutConfig, RolloutIs, TrainerConfig, ValidationConfig,
};
use crate::agg::{AggMode, AggScope};
use crate::error::{Error, Result};
use crate::kl::{KlEstimator, KlGradient, KlValue};
use crate::loss::LOG_RATIO_CLAMP;
use crate::schedule::LrShape;

/// A named setting of `[algorithm]`, and for some of the sizes and rates around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// The baseline.
    Grpo,
    /// Without the division by the standard deviation, and by a constant length.
    DrGrpo,
    /// Leave one out.
    Rloo,
    /// REINFORCE++.
    ReinforcePp,
    /// REINFORCE++ with the group as baseline.
    ReinforcePpBaseline,
    /// ReMax.
    Remax,
    /// OPO.
    Opo,
    /// DAPO.
    Dapo,
    /// With a wider upper clip.
    ClipHigher,
    /// Clip-Cov.
    ClipCov,
    /// KL-Cov.
    KlCov,
    /// GSPO.
    Gspo,
    /// CISPO.
    Cispo,
    /// GPG.
    Gpg,
    /// SAPO.
    Sapo,
    /// GMPO.
    Gmpo,
    /// KL-Cov as in the paper's script for 7B.
    #[serde(rename = "paper-7b")]
    Paper7b,
    /// KL-Cov as in the paper's script for 32B.
    #[serde(rename = "paper-32b")]
    Paper32b,
    /// KL-Cov as in verl's script for 7B.
    Verl,
}

impl Method {
    /// All methods.
    pub const ALL: [Self; 19] = [
        Self::Grpo,
        Self::DrGrpo,
        Self::Rloo,
        Self::ReinforcePp,
        Self::ReinforcePpBaseline,
        Self::Remax,
        Self::Opo,
        Self::Dapo,
        Self::ClipHigher,
        Self::ClipCov,
        Self::KlCov,
        Self::Gspo,
        Self::Cispo,
        Self::Gpg,
        Self::Sapo,
        Self::Gmpo,
        Self::Paper7b,
        Self::Paper32b,
        Self::Verl,
    ];

    /// The method's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpo => "grpo",
            Self::DrGrpo => "dr_grpo",
            Self::Rloo => "rloo",
            Self::ReinforcePp => "reinforce_pp",
            Self::ReinforcePpBaseline => "reinforce_pp_baseline",
            Self::Remax => "remax",
            Self::Opo => "opo",
            Self::Dapo => "dapo",
            Self::ClipHigher => "clip_higher",
            Self::ClipCov => "clip_cov",
            Self::KlCov => "kl_cov",
            Self::Gspo => "gspo",
            Self::Cispo => "cispo",
            Self::Gpg => "gpg",
            Self::Sapo => "sapo",
            Self::Gmpo => "gmpo",
            Self::Paper7b => "paper-7b",
            Self::Paper32b => "paper-32b",
            Self::Verl => "verl",
        }
    }

    /// The method of a name.
    ///
    /// # Errors
    /// If there is none, naming the nearest.
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
        let near = nearest(name, Self::ALL.map(Self::name));
        Err(Error::config(format!("unknown method {name}, did you mean {near}?")))
    }

    /// The optimizer that belongs to the method.
    fn optimizer(self) -> OptimizerConfig {
        let default = OptimizerConfig::default();
        match self {
            Self::Dapo => OptimizerConfig { weight_decay: 0.1, lr_warmup_steps: 10, ..default },
            Self::Paper7b => OptimizerConfig { lr: 5e-7, ..default },
            Self::Paper32b | Self::Verl => OptimizerConfig { lr: 1e-6, ..default },
            _ => default,
        }
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
    /// The defaults under a method. `algorithm.mini_batch_size` and `algorithm.overlong_buffer.len` are 0,
    /// which resolving replaces by an eighth of the batch and a fifth of the longest response.
    pub(super) fn preset(method: Method) -> Self {
        let mut config = Self::small(method);
        if let Method::Paper7b | Method::Paper32b | Method::Verl = method {
            config.enlarge(method);
        }
        config
    }

    /// The sizes and the schedule of the paper's scripts.
    fn enlarge(&mut self, method: Method) {
        self.data.train_batch_size = 256;
        self.data.max_prompt_length = 2048;
        self.data.max_response_length = 8192;
        self.data.prompt_template = match method {
            Method::Verl => PromptTemplate::Chat,
            _ => PromptTemplate::R1Zero,
        };
        self.trainer.max_tokens_per_microbatch = match method {
            Method::Paper32b => 20_480,
            _ => 30_720,
        };
        self.reward.function = "prime_math".to_owned();
        self.trainer.val_before_train = false;
        self.trainer.test_freq = 4;
        self.trainer.save_freq = 32;
    }

    fn small(method: Method) -> Self {
        Self {
            model: ModelConfig { path: "builtin:arith".to_owned() },
            data: DataConfig {
                train_files: vec!["builtin:arith".to_owned()],
                val_files: vec!["builtin:arith".to_owned()],
                weights: Vec::new(),
                deduplicate: false,
                drop_cjk_prompts: false,
                filter_overlong_prompts: false,
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
            optimizer: method.optimizer(),
            reward: RewardConfig {
                function: "auto".to_owned(),
                timeout_s: 10.0,
                start_timeout_s: 60.0,
                on_error: OnError::Zero,
                error_value: 0.0,
                workers: 4,
            },
            validation: ValidationConfig::default(),
            trainer: TrainerConfig {
                total_steps: 50,
                save_freq: 10,
                test_freq: 10,
                val_before_train: true,
                max_tokens_per_microbatch: 0,
                recompute: false,
                probe_entropy: false,
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
        let base = Self::grpo(method);
        let vanilla =
            |low, high| Self { clip_ratio_low: low, clip_ratio_high: high, ..base.clone() };
        let estimated = |adv_estimator| Self { adv_estimator, ..base.clone() };
        let loss = |loss_mode| Self { loss_mode, ..base.clone() };
        let by_sequence = AggMode::SeqMeanTokenMean;
        match method {
            Method::Grpo => base,
            Method::DrGrpo => Self {
                norm_adv_by_std_in_grpo: false,
                loss_agg_mode: AggMode::SeqMeanTokenSumNorm,
                ..base
            },
            Method::Rloo => estimated(AdvEstimator::Rloo),
            Method::ReinforcePp => estimated(AdvEstimator::ReinforcePlusPlus),
            Method::ReinforcePpBaseline => estimated(AdvEstimator::ReinforcePlusPlusBaseline),
            Method::Remax => estimated(AdvEstimator::Remax),
            Method::Opo => estimated(AdvEstimator::Opo),
            Method::Dapo => Self {
                clip_ratio_c: 10.0,
                filter_groups: true,
                overlong_buffer: OverlongConfig { enable: true, len: 0, penalty_factor: 1.0 },
                ..vanilla(0.2, 0.28)
            },
            Method::ClipHigher => vanilla(0.2, 0.28),
            Method::ClipCov => Self { loss_mode: LossMode::ClipCov, ..vanilla(1.0, 1.0) },
            Method::KlCov => loss(LossMode::KlCov),
            Method::Gspo => Self {
                loss_mode: LossMode::Gspo,
                loss_agg_mode: by_sequence,
                ..vanilla(3e-4, 4e-4)
            },
            Method::Cispo => Self { loss_mode: LossMode::Cispo, ..vanilla(10.0, 0.2) },
            Method::Gpg => Self { adv_estimator: AdvEstimator::Gpg, ..loss(LossMode::Gpg) },
            Method::Sapo => Self { loss_agg_mode: by_sequence, ..loss(LossMode::Sapo) },
            Method::Gmpo => Self {
                loss_mode: LossMode::GeoMean,
                loss_agg_mode: by_sequence,
                ..vanilla(0.4, 0.4)
            },
            Method::Paper7b => base.scripted(2e-3, 0),
            Method::Paper32b => base.scripted(2e-4, 0),
            Method::Verl => base.scripted(2e-3, 768),
        }
    }

    /// KL-Cov as the scripts run it.
    fn scripted(self, kl_cov_ratio: f64, gen_batch_size: usize) -> Self {
        Self {
            loss_mode: LossMode::KlCov,
            kl_cov_ratio,
            gen_batch_size,
            mini_batch_size: 32,
            agg_scope: AggScope::Legacy,
            cov_scope: CovScope::Microbatch,
            log_ratio_clamp: f64::INFINITY,
            filter_groups: true,
            ..self
        }
    }

    /// The baseline; what all methods have in common.
    fn grpo(method: Method) -> Self {
        let own = |value| KlEstimator { value, gradient: KlGradient::Own };
        Self {
            method,
            adv_estimator: AdvEstimator::Grpo,
            loss_mode: LossMode::Vanilla,
            norm_adv_by_std_in_grpo: true,
            loss_agg_mode: AggMode::TokenMean,
            agg_scope: AggScope::Global,
            mini_batch_size: 0,
            ppo_epochs: 1,
            clip_ratio_low: 0.2,
            clip_ratio_high: 0.2,
            clip_ratio_c: 3.0,
            log_ratio_clamp: LOG_RATIO_CLAMP,
            tau_pos: 1.0,
            tau_neg: 1.05,
            clip_cov_ratio: 2e-4,
            clip_cov_lb: 1.0,
            clip_cov_ub: 5.0,
            kl_cov_ratio: 2e-3,
            ppo_kl_coef: 1.0,
            cov_scope: CovScope::Minibatch,
            entropy_coeff: 0.0,
            use_kl_loss: false,
            kl_loss_coef: 1e-3,
            kl_loss_type: own(KlValue::K3),
            use_kl_in_reward: false,
            kl_penalty: own(KlValue::K1),
            mask_truncated: false,
            filter_groups: false,
            filter_groups_metric: FilterMetric::Acc,
            max_num_gen_batches: 10,
            gen_batch_size: 0,
            overlong_buffer: OverlongConfig { enable: false, len: 0, penalty_factor: 1.0 },
            kl_ctrl: KlCtrlConfig {
                r#type: KlControl::Fixed,
                kl_coef: 1e-3,
                horizon: 10_000.0,
                target_kl: 0.1,
            },
            rollout_correction: CorrectionConfig {
                rollout_is: RolloutIs::None,
                rollout_is_threshold: 2.0,
                rollout_is_batch_normalize: false,
            },
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
