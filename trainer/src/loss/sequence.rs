//! Losses in which the tokens of a response share one ratio.

use std::ops::Range;

use super::token::ClipRange;
use super::{TokenBatch, TokenLoss};
use crate::kl::sign;

/// verl's limit on the mean log-ratio of a response.
const MEAN_LOG_RATIO_LIMIT: f64 = 10.0;

/// GSPO, in its token form: each token has the response's ratio, the geometric mean of the tokens' ratios,
/// and the derivative that this ratio would have if it were the token's own.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gspo {
    /// Where the response's ratio is clipped; the paper's distances are 3e-4 and 4e-4.
    pub range: ClipRange,
}

/// GMPO: as [`Gspo`] without its clip, each log-ratio clipped before the mean where that makes the gain
/// smaller.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GeoMean {
    /// Lowest log-ratio, negated.
    pub low: f64,
    /// Highest log-ratio.
    pub high: f64,
}

impl Gspo {
    pub(super) fn tokens<T: Copy + Into<f64>>(&self, batch: &TokenBatch<'_, T>) -> Vec<TokenLoss> {
        let mut out = vec![TokenLoss::default(); batch.mask.len()];
        for response in responses(batch) {
            let mean = mean(batch, &response, |i| batch.log_ratio(i));
            let ratio = mean.min(MEAN_LOG_RATIO_LIMIT).exp();
            let slope = if mean < MEAN_LOG_RATIO_LIMIT { ratio } else { 0.0 };
            for i in response {
                let token = self.range.token(batch.advantage[i].into(), ratio, slope);
                let other_ratio = batch.log_ratio(i) != mean;
                out[i] = TokenLoss { touched: token.touched || other_ratio, ..token };
            }
        }
        out
    }
}

impl GeoMean {
    pub(super) fn tokens<T: Copy + Into<f64>>(&self, batch: &TokenBatch<'_, T>) -> Vec<TokenLoss> {
        let mut out = vec![TokenLoss::default(); batch.mask.len()];
        let kept = |i: usize| {
            let (d, side) = (batch.log_ratio(i), sign(batch.advantage[i].into()));
            side * (side * d).min(side * self.clamp(d))
        };
        for response in responses(batch) {
            let ratio = mean(batch, &response, kept).exp();
            let advantage = mean(batch, &response, |i| batch.advantage[i].into());
            for i in response {
                let (d, own) = (batch.log_ratio(i), batch.advantage[i].into());
                let outside = d != self.clamp(d);
                let stopped = kept(i) != d;
                out[i] = TokenLoss {
                    value: -advantage * ratio,
                    slope: if stopped { 0.0 } else { -advantage * ratio },
                    clipped: outside && own > 0.0,
                    dual_clipped: outside && own < 0.0,
                    touched: stopped || ratio != d.exp(),
                };
            }
        }
        out
    }

    /// Between -low and high; written out because `f64::clamp` panics on bounds out of order.
    fn clamp(&self, d: f64) -> f64 {
        d.max(-self.low).min(self.high)
    }
}

/// The responses of a batch; tokens outside of all are responses of one token.
fn responses<T>(batch: &TokenBatch<'_, T>) -> Vec<Range<usize>> {
    let mut named = vec![false; batch.mask.len()];
    batch.responses.iter().for_each(|range| named[range.clone()].fill(true));
    let alone = (0..named.len()).filter(|i| !named[*i]).map(|i| i..i + 1);
    batch.responses.iter().cloned().chain(alone).collect()
}

/// Mean over the valid tokens of a response; 0 if there is none.
fn mean<T>(
    batch: &TokenBatch<'_, T>,
    response: &Range<usize>,
    value: impl Fn(usize) -> f64,
) -> f64 {
    let valid = || response.clone().filter(|i| batch.mask[*i]);
    valid().map(value).sum::<f64>() / valid().count().max(1) as f64
}
