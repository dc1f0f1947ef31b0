//! The policy losses and their derivatives, token by token.
//!
//! With `d = logp - old` (clamped to +-[`LOG_RATIO_CLAMP`] inside the exponential, derivative 0 where
//! clamped), `r = exp(d)` and advantage `A`:
//!
//! | loss | of a token | source |
//! |---|---|---|
//! | [`Clip`] | max(-A r, -A clamp(r, 1-low, 1+high)), for A < 0 at most -A c | PPO, 1707.06347; dual clip, 1912.09729; clip-higher, 2503.14476 |
//! | [`ClipCov`] | as clip without c, 0 for a random few tokens of middling covariance | 2505.22617 |
//! | [`KlCov`] | -A r, plus coef \|d\| for the tokens of largest covariance | 2505.22617 |
//!
//! Inputs are flat over the tokens of a mini-batch; sums are in f64. Clip-Cov and KL-Cov take means,
//! counts and ranks over each of the given scopes, the whole mini-batch by default (the reference
//! code takes them per micro-batch). Log-probs feed the covariance without a derivative. Leaves out:
//! entropy bonus and reference KL, which are other terms of the total.

mod cov;

use std::ops::Range;

use crate::error::{Error, Result};
use crate::kl::sign;

pub use cov::{clip_cov_candidates, clip_cov_count, clip_cov_select, kl_cov_count, kl_cov_select};

/// Log-ratios beyond this are treated as this: e^20 is 5e8. verl has it in its vanilla loss only.
pub const LOG_RATIO_CLAMP: f64 = 20.0;

/// The tokens of a mini-batch. All slices have one entry per token.
#[derive(Clone, Copy, Debug)]
pub struct TokenBatch<'a, T> {
    /// Log-prob under the weights being trained.
    pub log_prob: &'a [T],
    /// Log-prob under the weights that sampled.
    pub old_log_prob: &'a [T],
    /// Advantage of the token's response.
    pub advantage: &'a [T],
    /// Whether the token counts.
    pub mask: &'a [bool],
    /// Weight in the aggregated loss ([`crate::agg::weights`]).
    pub weight: &'a [f64],
    /// Disjoint ranges of tokens over which covariances, counts and ranks are taken: one range for
    /// the mini-batch, or one for each micro-batch.
    pub scopes: &'a [Range<usize>],
}

/// The range a ratio may move in, as distances from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipRange {
    /// Below 1.
    pub low: f64,
    /// Above 1.
    pub high: f64,
}

/// The clipped loss of PPO.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clip {
    /// Where the ratio is clipped.
    pub range: ClipRange,
    /// The dual clip's c > 1; `None` for no dual clip.
    pub dual: Option<f64>,
    /// Clamp of the log-ratio; `None` for none.
    pub log_ratio_clamp: Option<f64>,
}

/// Clip-Cov.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ClipCov {
    /// Where the ratio is clipped.
    pub range: ClipRange,
    /// Share of the valid tokens whose loss is dropped; at least one token is.
    pub ratio: f64,
    /// Candidates have a covariance above this,
    pub lower: f64,
    /// and below this (both strict).
    pub upper: f64,
    /// Clamp of the log-ratio; `None` for none.
    pub log_ratio_clamp: Option<f64>,
}

/// KL-Cov.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlCov {
    /// Share of the valid tokens that are penalised; at least one, unless this is 0.
    pub ratio: f64,
    /// The penalty per unit of |log-ratio|.
    pub coef: f64,
    /// Clamp of the log-ratio; `None` for none.
    pub log_ratio_clamp: Option<f64>,
}

/// A policy loss with its settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum PolicyLoss {
    /// PPO's clip, symmetric or not.
    Clip(Clip),
    /// Clip-Cov.
    ClipCov(ClipCov),
    /// KL-Cov.
    KlCov(KlCov),
}

/// Names the random choice of Clip-Cov in one update.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChoiceKey {
    /// Seed of the run.
    pub seed: u64,
    /// Training step.
    pub step: u64,
    /// Update within the step.
    pub update: u64,
}

/// The loss of a mini-batch and how it depends on each log-prob.
#[derive(Clone, Debug, PartialEq)]
pub struct LossOutput {
    /// The aggregated loss.
    pub loss: f64,
    /// The loss of each token before aggregation; 0 where masked.
    pub token_loss: Vec<f64>,
    /// d loss / d logp of each token, its weight included; 0 where masked.
    pub dlogp: Vec<f64>,
    /// Tokens chosen by Clip-Cov or KL-Cov, ascending; empty for the others.
    pub selected: Vec<usize>,
    /// What is reported.
    pub stats: LossStats,
}

/// Statistics over the valid tokens of a mini-batch.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossStats {
    /// Valid tokens.
    pub tokens: usize,
    /// Share clipped: by the ratio ([`Clip`]) or by covariance ([`ClipCov`], where tokens clipped by
    /// the ratio do not count); 0 for [`KlCov`].
    pub pg_clipfrac: f64,
    /// Share at the dual clip.
    pub pg_clipfrac_lower: f64,
    /// Mean of -d, the k1 estimate of KL(old || new).
    pub ppo_kl: f64,
    /// Mean of |d|; what verl calls `ppo_kl` under KL-Cov.
    pub ppo_kl_abs: f64,
    /// Largest |d|: 0 exactly on the first update after a rollout.
    pub max_abs_log_ratio: f64,
    /// Tokens whose derivative the method changed from plain -A r: clipped, dropped, or penalised
    /// with d != 0.
    pub touched_tokens: usize,
}

/// One token's loss, its derivative, and which of the mechanisms acted.
#[derive(Clone, Copy, Default)]
struct TokenLoss {
    value: f64,
    slope: f64,
    clipped: bool,
    dual_clipped: bool,
    touched: bool,
}

impl PolicyLoss {
    /// Loss, derivatives and statistics of a mini-batch. `key` decides Clip-Cov's random choice.
    ///
    /// # Errors
    /// If the loss or a derivative is not finite.
    ///
    /// # Panics
    /// If the slices of `batch` differ in length or a scope reaches past them.
    ///
    /// ```
    /// use trainer::loss::{ChoiceKey, Clip, ClipRange, PolicyLoss, TokenBatch};
    /// let loss = PolicyLoss::Clip(Clip {
    ///     range: ClipRange { low: 0.2, high: 0.28 },
    ///     dual: Some(3.0),
    ///     log_ratio_clamp: Some(20.0),
    /// });
    /// let out = loss.evaluate(
    ///     &TokenBatch {
    ///         log_prob: &[-1.0f32, -1.0],
    ///         old_log_prob: &[-1.0, -2.0],
    ///         advantage: &[1.0, 1.0],
    ///         mask: &[true, true],
    ///         weight: &[0.5, 0.5],
    ///         scopes: &[],
    ///     },
    ///     ChoiceKey { seed: 0, step: 1, update: 0 },
    /// )?;
    /// assert_eq!(out.dlogp, [-0.5, 0.0]);
    /// assert_eq!(out.stats.pg_clipfrac, 0.5);
    /// # Ok::<(), trainer::error::Error>(())
    /// ```
    pub fn evaluate<T: Copy + Into<f64>>(
        &self,
        batch: &TokenBatch<'_, T>,
        key: ChoiceKey,
    ) -> Result<LossOutput> {
        let selected = match self {
            Self::Clip(_) => Vec::new(),
            Self::ClipCov(p) => clip_cov_select(batch, p, key),
            Self::KlCov(p) => kl_cov_select(batch, p.ratio),
        };
        self.apply(batch, selected)
    }

    /// As [`Self::evaluate`], with the tokens chosen by Clip-Cov or KL-Cov given.
    ///
    /// # Errors
    /// If the loss or a derivative is not finite.
    ///
    /// # Panics
    /// If the slices of `batch` differ in length or a selected token does not exist.
    pub fn apply<T: Copy + Into<f64>>(
        &self,
        batch: &TokenBatch<'_, T>,
        mut selected: Vec<usize>,
    ) -> Result<LossOutput> {
        let n = batch.mask.len();
        let lengths = [batch.log_prob.len(), batch.old_log_prob.len(), batch.advantage.len()];
        assert_eq!((lengths, batch.weight.len()), ([n; 3], n), "one entry per token");
        selected.sort_unstable();
        let mut chosen = vec![false; n];
        selected.iter().for_each(|i| chosen[*i] = true);
        let mut out = LossOutput {
            loss: 0.0,
            token_loss: vec![0.0; n],
            dlogp: vec![0.0; n],
            selected,
            stats: LossStats::default(),
        };
        for i in (0..n).filter(|i| batch.mask[*i]) {
            let d = batch.log_prob[i].into() - batch.old_log_prob[i].into();
            let token = self.token(d, batch.advantage[i].into(), chosen[i]);
            out.loss += token.value * batch.weight[i];
            out.token_loss[i] = token.value;
            out.dlogp[i] = token.slope * batch.weight[i];
            if !(token.value.is_finite() && out.dlogp[i].is_finite()) {
                return Err(Error::numeric(format!(
                    "loss of token {i} is {} with slope {} at log-ratio {d}",
                    token.value, token.slope
                )));
            }
            out.stats.add(&token, d);
        }
        out.stats.finish();
        Ok(out)
    }

    fn token(&self, d: f64, advantage: f64, chosen: bool) -> TokenLoss {
        match self {
            Self::Clip(p) => p.token(d, advantage),
            Self::ClipCov(p) => p.token(d, advantage, chosen),
            Self::KlCov(p) => p.token(d, advantage, chosen),
        }
    }
}

impl Clip {
    fn token(&self, d: f64, advantage: f64) -> TokenLoss {
        let (ratio, slope) = ratio(d, self.log_ratio_clamp);
        let mut out = self.range.token(advantage, ratio, slope);
        let Some(c) = self.dual else { return out };
        let cap = -advantage * c;
        if advantage < 0.0 && out.value > cap {
            out = TokenLoss { value: cap, slope: 0.0, dual_clipped: true, touched: true, ..out };
        }
        out
    }
}

impl ClipCov {
    fn token(&self, d: f64, advantage: f64, chosen: bool) -> TokenLoss {
        if chosen {
            return TokenLoss { clipped: true, touched: true, ..TokenLoss::default() };
        }
        let (ratio, slope) = ratio(d, self.log_ratio_clamp);
        TokenLoss { clipped: false, ..self.range.token(advantage, ratio, slope) }
    }
}

impl KlCov {
    /// The penalty takes the log-ratio itself, not the clamped one, so that it keeps pulling back.
    fn token(&self, d: f64, advantage: f64, chosen: bool) -> TokenLoss {
        let (ratio, slope) = ratio(d, self.log_ratio_clamp);
        let mut out = TokenLoss {
            value: -advantage * ratio,
            slope: -advantage * slope,
            ..TokenLoss::default()
        };
        if chosen {
            out.value += self.coef * d.abs();
            out.slope += self.coef * sign(d);
            out.touched = d != 0.0;
        }
        out
    }
}

impl ClipRange {
    /// max(-A r, -A clamp(r)), with the derivative of the larger; `slope` is dr/dlogp.
    fn token(&self, advantage: f64, ratio: f64, slope: f64) -> TokenLoss {
        if self.clips(advantage, ratio) {
            TokenLoss {
                value: -advantage * self.clamp(ratio),
                clipped: true,
                touched: true,
                ..TokenLoss::default()
            }
        } else {
            TokenLoss {
                value: -advantage * ratio,
                slope: -advantage * slope,
                ..TokenLoss::default()
            }
        }
    }

    /// Whether the clipped branch is the larger one, strictly.
    fn clips(&self, advantage: f64, ratio: f64) -> bool {
        -advantage * self.clamp(ratio) > -advantage * ratio
    }

    /// Between 1-low and 1+high; written out because `f64::clamp` panics on bounds out of order.
    fn clamp(&self, ratio: f64) -> f64 {
        ratio.max(1.0 - self.low).min(1.0 + self.high)
    }
}

impl LossStats {
    fn add(&mut self, token: &TokenLoss, d: f64) {
        self.tokens += 1;
        self.pg_clipfrac += f64::from(token.clipped);
        self.pg_clipfrac_lower += f64::from(token.dual_clipped);
        self.ppo_kl -= d;
        self.ppo_kl_abs += d.abs();
        self.max_abs_log_ratio = self.max_abs_log_ratio.max(d.abs());
        self.touched_tokens += usize::from(token.touched);
    }

    /// Sums to means; all stay 0 when no token is valid.
    fn finish(&mut self) {
        let n = self.tokens.max(1) as f64;
        self.pg_clipfrac /= n;
        self.pg_clipfrac_lower /= n;
        self.ppo_kl /= n;
        self.ppo_kl_abs /= n;
    }
}

/// exp of the clamped log-ratio, and its derivative.
fn ratio(d: f64, clamp: Option<f64>) -> (f64, f64) {
    match clamp {
        Some(limit) if d.abs() >= limit => (limit.copysign(d).exp(), 0.0),
        _ => (d.exp(), d.exp()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::random::{Purpose, Stream};

    const KEY: ChoiceKey = ChoiceKey { seed: 3, step: 1, update: 0 };

    fn losses() -> [PolicyLoss; 3] {
        let range = ClipRange { low: 0.2, high: 0.28 };
        let log_ratio_clamp = Some(LOG_RATIO_CLAMP);
        [
            PolicyLoss::Clip(Clip { range, dual: Some(3.0), log_ratio_clamp }),
            PolicyLoss::ClipCov(ClipCov {
                range,
                ratio: 0.2,
                lower: 0.1,
                upper: 5.0,
                log_ratio_clamp,
            }),
            PolicyLoss::KlCov(KlCov { ratio: 0.2, coef: 1.0, log_ratio_clamp }),
        ]
    }

    /// Slopes against central differences, the selection held fixed.
    #[test]
    fn slopes_agree_with_finite_differences() {
        let mut random = Stream::keyed(11, Purpose::Tasks, &[]);
        let n = 60;
        let old: Vec<f64> = (0..n).map(|_| -3.0 * random.uniform()).collect();
        let log_prob: Vec<f64> = old.iter().map(|o| o + 0.4 * random.normal()).collect();
        let advantage: Vec<f64> = (0..n).map(|_| random.normal()).collect();
        let mask: Vec<bool> = (0..n).map(|i| i % 7 != 0).collect();
        let weight = vec![1.0 / n as f64; n];
        let whole = 0..n;
        let batch = TokenBatch {
            log_prob: &log_prob[..],
            old_log_prob: &old,
            advantage: &advantage,
            mask: &mask,
            weight: &weight,
            scopes: std::slice::from_ref(&whole),
        };
        for loss in losses() {
            let out = loss.evaluate(&batch, KEY).unwrap();
            for i in 0..n {
                let at = |step: f64| {
                    let mut moved = log_prob.clone();
                    moved[i] += step;
                    let batch = TokenBatch { log_prob: &moved, ..batch };
                    loss.apply(&batch, out.selected.clone()).unwrap().loss
                };
                let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
                assert!((slope - out.dlogp[i]).abs() < 1e-7, "seed 11, {loss:?}, token {i}");
            }
        }
    }

    #[test]
    fn on_policy_every_loss_is_plain_policy_gradient_but_for_dropped_tokens() {
        let log_prob = [-0.1f32, -2.0, -0.5, -1.0];
        let advantage = [1.0f32, -1.0, 0.5, 2.0];
        for loss in losses() {
            let batch = TokenBatch {
                log_prob: &log_prob,
                old_log_prob: &log_prob,
                advantage: &advantage,
                mask: &[true; 4],
                weight: &[1.0; 4],
                scopes: &[0..2, 2..4],
            };
            let out = loss.evaluate(&batch, KEY).unwrap();
            assert_eq!(out.stats.max_abs_log_ratio, 0.0);
            for (i, a) in advantage.iter().enumerate() {
                let dropped = matches!(loss, PolicyLoss::ClipCov(_)) && out.selected.contains(&i);
                assert_eq!(out.dlogp[i], if dropped { 0.0 } else { f64::from(-a) });
            }
        }
    }

    #[test]
    fn beyond_the_clamp_only_the_penalty_pulls_and_nan_is_refused() {
        let batch = |log_prob| TokenBatch {
            log_prob,
            old_log_prob: &[-30.0f64],
            advantage: &[1.0],
            mask: &[true],
            weight: &[1.0],
            scopes: &[],
        };
        let [clip, _, kl_cov] = losses();
        let out = kl_cov.apply(&batch(&[-5.0]), vec![0]).unwrap();
        assert_eq!((out.token_loss[0], out.dlogp[0]), (25.0 - 20f64.exp(), 1.0));
        let e = clip.apply(&batch(&[f64::NAN]), vec![]).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Numeric(_)), "{e}");
    }

    #[test]
    fn an_empty_batch_has_loss_zero() {
        let none: [f32; 0] = [];
        let batch = TokenBatch {
            log_prob: &none,
            old_log_prob: &none,
            advantage: &none,
            mask: &[],
            weight: &[],
            scopes: &[],
        };
        for loss in losses() {
            let out = loss.evaluate(&batch, KEY).unwrap();
            assert_eq!((out.loss, out.stats), (0.0, LossStats::default()));
        }
    }
}
