//! `[algorithm]`: what is optimised, key by key, and the pure functions its settings describe.

use serde::{Deserialize, Serialize};

use super::Method;
use crate::advantage::{Estimator, Scale};
use crate::agg::{AggMode, AggScope};
use crate::correction::{Level, Norm, Truncation};
use crate::kl::KlEstimator;
use crate::loss::{Cispo, Clip, ClipCov, ClipRange, GeoMean, Gspo, KlCov, PolicyLoss, Sapo};

/// `[algorithm]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlgorithmConfig {
    /// The preset this section started from.
    pub method: Method,
    /// Default by method.
    pub adv_estimator: AdvEstimator,
    /// Default by method.
    pub loss_mode: LossMode,
    /// Whether `grpo` and `grpo_passk` divide by the group's standard deviation; default true.
    pub norm_adv_by_std_in_grpo: bool,
    /// Default by method, mostly `token-mean`.
    pub loss_agg_mode: AggMode,
    /// Whether denominators are those of the mini-batch or, as in the reference code, of each micro-batch;
    /// default `global`.
    pub agg_scope: AggScope,
    /// Prompts an optimizer update; 0 or left out: an eighth of `data.train_batch_size`, at least 1.
    #[serde(default)]
    pub mini_batch_size: usize,
    /// Passes over a step's responses; default 1.
    pub ppo_epochs: usize,
    /// Distance below 1 at which ratios are clipped (of log-ratios, below 0, under `geo_mean`); at least 0;
    /// default by method, mostly 0.2.
    pub clip_ratio_low: f64,
    /// The same above; default by method, mostly 0.2.
    pub clip_ratio_high: f64,
    /// Dual clip of `vanilla`, above 1 (`inf`: none); default 3, as in verl.
    pub clip_ratio_c: f64,
    /// Log-ratios beyond this are treated as this, but under `gspo` and `geo_mean`; above 0 (`inf`: none);
    /// default 20.
    pub log_ratio_clamp: f64,
    /// Steepness of SAPO's gate where the advantage is positive, above 0; default 1.
    pub tau_pos: f64,
    /// And where it is not; default 1.05.
    pub tau_neg: f64,
    /// Share of tokens that Clip-Cov drops, in [0, 1]; default 2e-4.
    pub clip_cov_ratio: f64,
    /// Candidates of Clip-Cov have a covariance above this; default 1.
    pub clip_cov_lb: f64,
    /// And below this; default 5.
    pub clip_cov_ub: f64,
    /// Share of tokens that KL-Cov penalises, in [0, 1]; default 2e-3 (the paper's 7B; 32B: 2e-4).
    pub kl_cov_ratio: f64,
    /// Their penalty; default 1, as in the paper (verl: 0.1).
    pub ppo_kl_coef: f64,
    /// Over which tokens covariances, counts and ranks are taken; default `minibatch`.
    pub cov_scope: CovScope,
    /// Weight of the entropy bonus; default 0.
    pub entropy_coeff: f64,
    /// Whether divergence from a reference policy is part of the loss; default false.
    pub use_kl_loss: bool,
    /// Its weight; default 1e-3.
    pub kl_loss_coef: f64,
    /// Its estimator; default `k3`.
    pub kl_loss_type: KlEstimator,
    /// Whether the divergence is taken from the reward of each token; default false.
    pub use_kl_in_reward: bool,
    /// The estimator there; default `k1`.
    pub kl_penalty: KlEstimator,
    /// Whether responses that were cut off at the longest length are left out of the loss; default false.
    pub mask_truncated: bool,
    /// Whether groups whose responses do not differ in `filter_groups_metric` are sampled anew; default false.
    pub filter_groups: bool,
    /// By what groups are compared then; default `acc`.
    pub filter_groups_metric: FilterMetric,
    /// Batches sampled for one step at most; 0 for no limit but that of 100 in a row which bring nothing;
    /// default 10.
    pub max_num_gen_batches: usize,
    /// Prompts of such a batch; 0 (default): `data.train_batch_size`.
    pub gen_batch_size: usize,
    /// Penalty on long responses.
    pub overlong_buffer: OverlongConfig,
    /// The coefficient of the divergence in the reward.
    pub kl_ctrl: KlCtrlConfig,
    /// Importance weights for what was sampled from a truncated distribution.
    pub rollout_correction: CorrectionConfig,
}

/// Advantage estimators, by verl's names ([`crate::advantage`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvEstimator {
    /// Group-relative.
    Grpo,
    /// The best of a group by its lead.
    GrpoPassk,
    /// Leave one out.
    Rloo,
    /// Whitened returns.
    ReinforcePlusPlus,
    /// Group-relative, whitened over the step.
    ReinforcePlusPlusBaseline,
    /// Against the greedy response, of which one is sampled for each prompt.
    Remax,
    /// Against the mean weighted by length.
    Opo,
    /// Group-relative, scaled up by the share of rewards that are 0.
    Gpg,
}

/// Policy losses, by verl's names ([`crate::loss`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossMode {
    /// PPO's clip with dual clip.
    Vanilla,
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
    GeoMean,
}

/// The scope of covariances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CovScope {
    /// All tokens of an update: the result does not depend on how it is cut.
    Minibatch,
    /// The tokens of a micro-batch, as the reference code has it.
    Microbatch,
}

/// By what dynamic sampling compares the responses of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FilterMetric {
    /// Whether they are right.
    Acc,
    /// Their rewards as judged, before any shaping.
    Score,
}

/// `[algorithm.overlong_buffer]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OverlongConfig {
    /// Default false.
    pub enable: bool,
    /// Tokens before the longest response in which the penalty grows, at most
    /// `data.max_response_length`; 0 or left out: a fifth of that, at least 1.
    pub len: usize,
    /// The penalty at the longest response; default 1.
    pub penalty_factor: f64,
}

/// `[algorithm.kl_ctrl]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KlCtrlConfig {
    /// Default `fixed`.
    pub r#type: KlControl,
    /// The coefficient, or the first one; default 1e-3.
    pub kl_coef: f64,
    /// Responses over which an adaptive coefficient moves, above 0; default 10000.
    pub horizon: f64,
    /// The divergence an adaptive coefficient aims at, above 0; default 0.1.
    pub target_kl: f64,
}

/// How the coefficient of the divergence goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlControl {
    /// It stays.
    Fixed,
    /// It follows the divergence ([`crate::kl::adapted_coefficient`]).
    Adaptive,
}

/// `[algorithm.rollout_correction]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CorrectionConfig {
    /// Default `none`.
    pub rollout_is: RolloutIs,
    /// Largest weight, above 0; default 2.
    pub rollout_is_threshold: f64,
    /// Whether weights are divided by their mean over the mini-batch; default false.
    pub rollout_is_batch_normalize: bool,
}

/// What has an importance weight of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RolloutIs {
    /// Nothing: all weights are 1.
    None,
    /// Each token.
    Token,
    /// Each response.
    Sequence,
}

impl AlgorithmConfig {
    /// The policy loss these settings describe.
    pub fn policy_loss(&self) -> PolicyLoss {
        let range = ClipRange { low: self.clip_ratio_low, high: self.clip_ratio_high };
        let log_ratio_clamp = finite(self.log_ratio_clamp);
        match self.loss_mode {
            LossMode::Vanilla => {
                PolicyLoss::Clip(Clip { range, dual: finite(self.clip_ratio_c), log_ratio_clamp })
            }
            LossMode::ClipCov => PolicyLoss::ClipCov(ClipCov {
                range,
                ratio: self.clip_cov_ratio,
                lower: self.clip_cov_lb,
                upper: self.clip_cov_ub,
                log_ratio_clamp,
            }),
            LossMode::KlCov => PolicyLoss::KlCov(KlCov {
                ratio: self.kl_cov_ratio,
                coef: self.ppo_kl_coef,
                log_ratio_clamp,
            }),
            LossMode::Gspo => PolicyLoss::Gspo(Gspo { range }),
            LossMode::Cispo => PolicyLoss::Cispo(Cispo { range, log_ratio_clamp }),
            LossMode::Gpg => PolicyLoss::Gpg,
            LossMode::Sapo => PolicyLoss::Sapo(Sapo {
                tau_pos: self.tau_pos,
                tau_neg: self.tau_neg,
                log_ratio_clamp,
            }),
            LossMode::GeoMean => PolicyLoss::GeoMean(GeoMean { low: range.low, high: range.high }),
        }
    }

    /// The advantage estimator these settings describe.
    pub fn estimator(&self) -> Estimator {
        let scale = match self.norm_adv_by_std_in_grpo {
            true => Scale::GroupStd,
            false => Scale::None,
        };
        match self.adv_estimator {
            AdvEstimator::Grpo => Estimator::Grpo(scale),
            AdvEstimator::GrpoPassk => Estimator::GrpoPassK(scale),
            AdvEstimator::Rloo => Estimator::Rloo,
            AdvEstimator::ReinforcePlusPlus => Estimator::ReinforcePp,
            AdvEstimator::ReinforcePlusPlusBaseline => Estimator::ReinforcePpBaseline,
            AdvEstimator::Remax => Estimator::Remax,
            AdvEstimator::Opo => Estimator::Opo,
            AdvEstimator::Gpg => Estimator::Gpg,
        }
    }

    /// Whether a second set of weights is needed, for the policy at the start.
    pub fn needs_reference(&self) -> bool {
        self.use_kl_loss || self.use_kl_in_reward
    }

    /// How importance weights are made, if they are.
    pub fn truncation(&self) -> Option<Truncation> {
        let c = &self.rollout_correction;
        let level = match c.rollout_is {
            RolloutIs::None => return None,
            RolloutIs::Token => Level::Token,
            RolloutIs::Sequence => Level::Sequence,
        };
        let norm = if c.rollout_is_batch_normalize { Norm::Batch } else { Norm::None };
        Some(Truncation { level, threshold: c.rollout_is_threshold, norm })
    }
}

/// `None` for infinity.
fn finite(limit: f64) -> Option<f64> {
    limit.is_finite().then_some(limit)
}
