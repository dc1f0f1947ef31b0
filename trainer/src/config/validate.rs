//! The limits of the values, and what is known but not there yet.

use engine::SamplingParams;

use super::{OptimizerConfig, RlConfig};
use crate::error::{Error, Result};
use crate::verifier::RewardRule;

/// Seeds are TOML integers.
const MAX_SEED: u64 = i64::MAX as u64;

/// The longest time limit, a day.
const MAX_TIMEOUT_S: f64 = 86_400.0;
/// The same, for messages.
const TIMEOUT_S: &str = "above 0, up to 86400";

/// Fails with `key is value, limit is ...` unless `holds`.
pub(super) fn limit(
    holds: bool,
    key: &str,
    value: impl std::fmt::Display,
    limit: &str,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::config(format!("{key} is {value}, limit is {limit}")))
}

/// A count that has to be at least 1.
pub(super) fn positive(key: &str, value: usize) -> Result<()> {
    limit(value >= 1, key, value, "1 or more")
}

/// A number in a closed range.
fn within(key: &str, value: f64, range: std::ops::RangeInclusive<f64>) -> Result<()> {
    let text = format!("{} to {}", range.start(), range.end());
    limit(range.contains(&value), key, value, &text)
}

/// A finite number that is at least 0.
fn at_least_0(key: &str, value: f64) -> Result<()> {
    limit(value >= 0.0 && value.is_finite(), key, value, "0 or more")
}

/// A number above 0, or infinity.
fn above_0(key: &str, value: f64) -> Result<()> {
    limit(value > 0.0, key, value, "above 0")
}

impl RlConfig {
    pub(super) fn validate(&self) -> Result<()> {
        self.validate_data()?;
        self.validate_algorithm()?;
        self.optimizer.validate()?;
        self.validation.validate()?;
        RewardRule::named(&self.reward.function)?;
        for (key, timeout) in [
            ("reward.timeout_s", self.reward.timeout_s),
            ("reward.start_timeout_s", self.reward.start_timeout_s),
        ] {
            limit(timeout > 0.0 && timeout <= MAX_TIMEOUT_S, key, timeout, TIMEOUT_S)?;
        }
        let value = self.reward.error_value;
        limit(value.is_finite(), "reward.error_value", value, "a finite number")?;
        let workers = self.reward.workers;
        limit((1..=256).contains(&workers), "reward.workers", workers, "1 to 256")?;
        let t = &self.trainer;
        limit(t.total_steps >= 1, "trainer.total_steps", t.total_steps, "1 or more")?;
        limit(t.seed <= MAX_SEED, "trainer.seed", t.seed, &MAX_SEED.to_string())?;
        limit(!t.output.is_empty(), "trainer.output", "\"\"", "a folder")?;
        for tracker in &t.trackers {
            let known = ["console", "jsonl", "tensorboard"].contains(&tracker.as_str());
            limit(known, "trainer.trackers", tracker, "console, jsonl, tensorboard")?;
        }
        Ok(())
    }

    fn validate_data(&self) -> Result<()> {
        let (d, r) = (&self.data, &self.rollout);
        limit(!self.model.path.is_empty(), "model.path", "\"\"", "a model")?;
        limit(!d.train_files.is_empty(), "data.train_files", "empty", "1 file or more")?;
        let (weights, files) = (d.weights.len(), d.train_files.len());
        let text = format!("one for each of the {files} data.train_files");
        let one_each = weights == 0 || weights == files;
        limit(one_each, "data.weights", format!("{weights} numbers"), &text)?;
        d.weights.iter().try_for_each(|weight| at_least_0("data.weights", *weight))?;
        let some = weights == 0 || d.weights.iter().any(|weight| *weight > 0.0);
        limit(some, "data.weights", "0 for every file", "above 0 for one or more")?;
        positive("data.train_batch_size", d.train_batch_size)?;
        positive("data.max_prompt_length", d.max_prompt_length)?;
        positive("data.max_response_length", d.max_response_length)?;
        limit(d.seed <= MAX_SEED, "data.seed", d.seed, &MAX_SEED.to_string())?;
        positive("rollout.n", r.n)?;
        let t = r.temperature;
        limit(t > 0.0 && t.is_finite(), "rollout.temperature", t, "above 0")?;
        limit(r.top_p > 0.0 && r.top_p <= 1.0, "rollout.top_p", r.top_p, "above 0, up to 1")?;
        limit(r.top_k >= 1 || r.top_k == -1, "rollout.top_k", r.top_k, "1 or more, or -1")?;
        // The engine's own limits, which would else end a run once it samples.
        let params = SamplingParams {
            n: r.n,
            temperature: t as f32,
            top_p: r.top_p as f32,
            stop: r.stop.clone(),
            ..SamplingParams::default()
        };
        params.validate(usize::MAX).map_err(|error| Error::config(format!("rollout.{error}")))
    }

    fn validate_algorithm(&self) -> Result<()> {
        let a = &self.algorithm;
        let batch = self.data.train_batch_size;
        limit(
            a.mini_batch_size <= batch,
            "algorithm.mini_batch_size",
            a.mini_batch_size,
            &format!("data.train_batch_size ({batch})"),
        )?;
        positive("algorithm.ppo_epochs", a.ppo_epochs)?;
        // CISPO's lower bound of 10 means none: ratios are never below -9.
        at_least_0("algorithm.clip_ratio_low", a.clip_ratio_low)?;
        at_least_0("algorithm.clip_ratio_high", a.clip_ratio_high)?;
        let c = a.clip_ratio_c;
        limit(c > 1.0, "algorithm.clip_ratio_c", c, "above 1")?;
        above_0("algorithm.log_ratio_clamp", a.log_ratio_clamp)?;
        above_0("algorithm.tau_pos", a.tau_pos)?;
        above_0("algorithm.tau_neg", a.tau_neg)?;
        within("algorithm.clip_cov_ratio", a.clip_cov_ratio, 0.0..=1.0)?;
        let (lower, upper) = (a.clip_cov_lb, a.clip_cov_ub);
        let below = format!("below algorithm.clip_cov_ub ({upper})");
        limit(lower < upper, "algorithm.clip_cov_lb", lower, &below)?;
        within("algorithm.kl_cov_ratio", a.kl_cov_ratio, 0.0..=1.0)?;
        at_least_0("algorithm.ppo_kl_coef", a.ppo_kl_coef)?;
        let entropy = a.entropy_coeff;
        limit(entropy.is_finite(), "algorithm.entropy_coeff", entropy, "a finite number")?;
        at_least_0("algorithm.kl_loss_coef", a.kl_loss_coef)?;
        at_least_0("algorithm.kl_ctrl.kl_coef", a.kl_ctrl.kl_coef)?;
        above_0("algorithm.kl_ctrl.horizon", a.kl_ctrl.horizon)?;
        above_0("algorithm.kl_ctrl.target_kl", a.kl_ctrl.target_kl)?;
        let threshold = a.rollout_correction.rollout_is_threshold;
        above_0("algorithm.rollout_correction.rollout_is_threshold", threshold)?;
        let (buffer, longest) = (&a.overlong_buffer, self.data.max_response_length);
        limit(
            buffer.len <= longest || !buffer.enable,
            "algorithm.overlong_buffer.len",
            buffer.len,
            &format!("data.max_response_length ({longest})"),
        )?;
        let factor = buffer.penalty_factor;
        at_least_0("algorithm.overlong_buffer.penalty_factor", factor)
    }
}

impl OptimizerConfig {
    pub(super) fn validate(&self) -> Result<()> {
        at_least_0("optimizer.lr", self.lr)?;
        for beta in self.betas {
            limit((0.0..1.0).contains(&beta), "optimizer.betas", beta, "0 up to but not 1")?;
        }
        limit(self.eps > 0.0 && self.eps.is_finite(), "optimizer.eps", self.eps, "above 0")?;
        at_least_0("optimizer.weight_decay", self.weight_decay)?;
        limit(self.grad_clip > 0.0, "optimizer.grad_clip", self.grad_clip, "above 0")
    }
}
