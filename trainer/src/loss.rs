//! The policy losses and their derivatives, token by token.
//!
//! With `d = logp - old` (clamped to +-[`LOG_RATIO_CLAMP`] inside the exponential, derivative 0 where
//! clamped), `r = exp(d)`, advantage `A`, and bars for means over a response:
//!
//! | loss | of a token | source |
//! |---|---|---|
//! | [`Clip`] | max(-A r, -A clamp(r, 1-low, 1+high)), for A < 0 at most -A c | PPO, 1707.06347; dual clip, 1912.09729; clip-higher, 2503.14476 |
//! | [`ClipCov`] | as clip without c, 0 for a random few tokens of middling covariance | 2505.22617 |
//! | [`KlCov`] | -A r, plus coef \|d\| for the tokens of largest covariance | 2505.22617 |
//! | [`Gspo`] | as clip without c, with mean d of the response for d | 2507.18071 |
//! | [`Cispo`] | -A clamp(r, 1-low, 1+high) logp, the clamped ratio held constant | 2506.13585 |
//! | [`PolicyLoss::Gpg`] | -A logp | 2504.02546 |
//! | [`Sapo`] | -A (4 / tau) sigmoid(tau (r - 1)), tau by the sign of A | 2511.20347 |
//! | [`GeoMean`] | -mean A exp(mean of d clipped where that lowers the gain) | GMPO, 2507.20673 |
//!
//! Inputs are flat over the tokens of a mini-batch; sums are in f64. Clip-Cov and KL-Cov take means,
//! counts and ranks over each of the given scopes, the whole mini-batch by default (the reference
//! code takes them per micro-batch). Log-probs feed the covariance without a derivative. GSPO's and
//! GMPO's loss of a response is that of each of its tokens, so that every aggregation of
//! [`crate::agg`] applies; their papers' is `seq-mean-token-mean`. Leaves out: entropy bonus and
//! reference KL, which are other terms of the total.

mod cov;
mod sequence;
mod token;

use std::ops::Range;

use crate::error::{Error, Result};

pub use cov::{clip_cov_candidates, clip_cov_count, clip_cov_select, kl_cov_count, kl_cov_select};
pub use sequence::{GeoMean, Gspo};
pub use token::{Cispo, Clip, ClipCov, ClipRange, KlCov, Sapo};

use token::ratio;

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
    /// Disjoint ranges of tokens, one for each response; what lies outside is a response of its own.
    /// Only [`Gspo`] and [`GeoMean`] look at them.
    pub responses: &'a [Range<usize>],
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
    /// PPO's clip of the response's ratio.
    Gspo(Gspo),
    /// A clipped ratio that weighs the log-prob.
    Cispo(Cispo),
    /// Plain policy gradient without a ratio.
    Gpg,
    /// A soft gate in place of the clip.
    Sapo(Sapo),
    /// GMPO: the geometric mean of the response's ratios.
    GeoMean(GeoMean),
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
    /// Share clipped: by the ratio ([`Clip`], [`Gspo`], [`Cispo`]; [`GeoMean`] where A > 0) or by
    /// covariance ([`ClipCov`], where tokens clipped by the ratio do not count); 0 for the others.
    pub pg_clipfrac: f64,
    /// Share at the dual clip; for [`GeoMean`] the share clipped where A < 0.
    pub pg_clipfrac_lower: f64,
    /// Mean of -d, the k1 estimate of KL(old || new).
    pub ppo_kl: f64,
    /// Mean of |d|; what verl calls `ppo_kl` under KL-Cov.
    pub ppo_kl_abs: f64,
    /// Largest |d|: 0 exactly on the first update after a rollout.
    pub max_abs_log_ratio: f64,
    /// Tokens whose derivative the method changed from plain -A r: clipped, dropped, penalised with
    /// d != 0, or given another ratio than their own.
    pub touched_tokens: usize,
}

/// One token's loss, its derivative, and which of the mechanisms acted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenLoss {
    /// The loss, before its weight in the aggregate.
    pub value: f64,
    /// Its derivative by the token's log-prob.
    pub slope: f64,
    /// Whether it was clipped: what [`LossStats::pg_clipfrac`] counts.
    pub clipped: bool,
    /// Whether it was clipped the other way: what [`LossStats::pg_clipfrac_lower`] counts.
    pub dual_clipped: bool,
    /// Whether the slope is another than that of plain policy gradient: [`LossStats::touched_tokens`].
    pub touched: bool,
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
    ///         responses: &[],
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
            Self::ClipCov(p) => clip_cov_select(batch, p, key),
            Self::KlCov(p) => kl_cov_select(batch, p.ratio),
            _ => Vec::new(),
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
        batch.check();
        selected.sort_unstable();
        let mut chosen = vec![false; batch.mask.len()];
        selected.iter().for_each(|i| chosen[*i] = true);
        Ok(LossOutput { selected, ..LossOutput::sum(batch, &self.tokens(batch, &chosen))? })
    }

    /// Every token's loss; what is masked holds nothing of use.
    fn tokens<T: Copy + Into<f64>>(
        &self,
        batch: &TokenBatch<'_, T>,
        chosen: &[bool],
    ) -> Vec<TokenLoss> {
        let each = |one: &dyn Fn(usize, f64, f64) -> TokenLoss| {
            let token = |i: usize| one(i, batch.log_ratio(i), batch.advantage[i].into());
            (0..batch.mask.len()).map(token).collect()
        };
        match self {
            Self::Clip(p) => each(&|_, d, a| p.token(d, a)),
            Self::ClipCov(p) => each(&|i, d, a| p.token(d, a, chosen[i])),
            Self::KlCov(p) => each(&|i, d, a| p.token(d, a, chosen[i])),
            Self::Cispo(p) => each(&|i, d, a| p.token(d, a, batch.log_prob[i].into())),
            Self::Gpg => each(&|i, d, a| token::gpg(d, a, batch.log_prob[i].into())),
            Self::Sapo(p) => each(&|_, d, a| p.token(d, a)),
            Self::Gspo(p) => p.tokens(batch),
            Self::GeoMean(p) => p.tokens(batch),
        }
    }
}

impl<T: Copy + Into<f64>> TokenBatch<'_, T> {
    /// d of a token: its log-prob less the old one, in nats.
    ///
    /// # Panics
    /// If there is no such token.
    pub fn log_ratio(&self, i: usize) -> f64 {
        self.log_prob[i].into() - self.old_log_prob[i].into()
    }

    fn check(&self) {
        let n = self.mask.len();
        let lengths = [self.log_prob.len(), self.old_log_prob.len(), self.advantage.len()];
        assert_eq!((lengths, self.weight.len()), ([n; 3], n), "one entry per token");
    }
}

impl LossOutput {
    /// The aggregate of the losses of `tokens`, one for each token of `batch`; those of masked tokens do
    /// not count.
    ///
    /// # Errors
    /// If a loss or a weighted derivative is not finite.
    ///
    /// # Panics
    /// If the slices differ in length.
    pub fn sum<T: Copy + Into<f64>>(
        batch: &TokenBatch<'_, T>,
        tokens: &[TokenLoss],
    ) -> Result<Self> {
        batch.check();
        let n = batch.mask.len();
        assert_eq!(tokens.len(), n, "one loss per token");
        let mut out = Self {
            loss: 0.0,
            token_loss: vec![0.0; n],
            dlogp: vec![0.0; n],
            selected: Vec::new(),
            stats: LossStats::default(),
        };
        for (i, token) in tokens.iter().enumerate().filter(|(i, _)| batch.mask[*i]) {
            let d = batch.log_ratio(i);
            out.loss += token.value * batch.weight[i];
            out.token_loss[i] = token.value;
            out.dlogp[i] = token.slope * batch.weight[i];
            if !(token.value.is_finite() && out.dlogp[i].is_finite()) {
                return Err(Error::numeric(format!(
                    "loss of token {i} is {} with slope {} at log-ratio {d}",
                    token.value, token.slope
                )));
            }
            out.stats.add(token, d);
        }
        out.stats.finish();
        Ok(out)
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

#[cfg(test)]
mod tests;
