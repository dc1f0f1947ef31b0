//! Settings that are legal and probably not meant.

use super::{AdvEstimator, LossMode, RlConfig, RolloutIs};
use crate::filter::MAX_BARREN_BATCHES;

impl RlConfig {
    /// Settings that make a method do nothing, or that are probably not meant; one line each.
    pub fn warnings(&self) -> Vec<String> {
        let mut out = Vec::new();
        out.extend(self.on_policy());
        out.extend(self.unused());
        out.extend(self.groups());
        out
    }

    /// What one update per rollout makes of the loss.
    fn on_policy(&self) -> Option<String> {
        let a = &self.algorithm;
        let acts = matches!(a.loss_mode, LossMode::ClipCov | LossMode::Gpg);
        (self.updates_per_step() == 1 && !acts && !a.filter_groups).then(|| {
            format!(
                "{} does nothing beyond plain policy gradient with one update per rollout; make \
                 algorithm.mini_batch_size smaller than data.train_batch_size",
                a.method.name()
            )
        })
    }

    /// Settings that have no effect, or one out of proportion.
    fn unused(&self) -> Vec<String> {
        let a = &self.algorithm;
        let mut out = Vec::new();
        let mut warn = |holds: bool, text: String| {
            if holds {
                out.push(text);
            }
        };
        warn(
            a.loss_mode == LossMode::KlCov && a.kl_cov_ratio > 0.05,
            format!(
                "algorithm.kl_cov_ratio is a fraction, and {} of all tokens is far above the \
                 paper's 0.002",
                a.kl_cov_ratio
            ),
        );
        warn(
            a.loss_mode == LossMode::KlCov && (a.kl_cov_ratio == 0.0 || a.ppo_kl_coef == 0.0),
            "kl_cov penalises nothing: algorithm.kl_cov_ratio or algorithm.ppo_kl_coef is 0".into(),
        );
        warn(
            a.loss_mode == LossMode::ClipCov && a.clip_cov_ratio > 0.05,
            format!(
                "algorithm.clip_cov_ratio is a fraction, and {} of all tokens is far above the \
                 paper's 0.0002",
                a.clip_cov_ratio
            ),
        );
        warn(
            a.loss_mode == LossMode::Gspo && a.clip_ratio_high > 0.05,
            format!(
                "gspo clips ratios of whole responses, which stay near 1: \
                 algorithm.clip_ratio_high of {} is far above the paper's 0.0004",
                a.clip_ratio_high
            ),
        );
        let truncated = self.rollout.top_p < 1.0 || self.rollout.top_k != -1;
        warn(
            a.rollout_correction.rollout_is != RolloutIs::None && !truncated,
            "algorithm.rollout_correction does nothing: what is sampled is what is trained, to the \
             bit, unless rollout.top_p or rollout.top_k truncate it"
                .into(),
        );
        warn(
            a.use_kl_loss && a.kl_loss_coef == 0.0,
            "algorithm.use_kl_loss costs a second set of weights and does nothing: \
             algorithm.kl_loss_coef is 0"
                .into(),
        );
        warn(
            a.use_kl_in_reward && a.kl_ctrl.kl_coef == 0.0,
            "algorithm.use_kl_in_reward costs a second set of weights and does nothing: \
             algorithm.kl_ctrl.kl_coef is 0"
                .into(),
        );
        warn(
            a.overlong_buffer.enable && a.overlong_buffer.penalty_factor == 0.0,
            "algorithm.overlong_buffer does nothing: its penalty_factor is 0".into(),
        );
        out
    }

    /// What a group of one makes of the advantages.
    fn groups(&self) -> Vec<String> {
        let a = &self.algorithm;
        let alone = self.rollout.n == 1;
        let compares =
            !matches!(a.adv_estimator, AdvEstimator::Remax | AdvEstimator::ReinforcePlusPlus);
        let mut out = Vec::new();
        if alone && compares {
            out.push("rollout.n is 1: a response has no group to be compared with".to_owned());
        }
        if alone && a.filter_groups {
            out.push("algorithm.filter_groups does nothing: groups of one are kept".to_owned());
        }
        if a.filter_groups && a.max_num_gen_batches == 0 {
            out.push(format!(
                "algorithm.max_num_gen_batches is 0: a step may sample very many batches; it ends after \
                 {MAX_BARREN_BATCHES} in a row without a group whose rewards differ"
            ));
        }
        out
    }
}
