//! Losses in which a token's derivative depends on that token alone.

use super::TokenLoss;
use crate::kl::sign;

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

/// CISPO: the ratio, clipped and held constant, weighs the log-prob. Its paper clips above alone, for
/// which `range.low` of 10 serves, as in verl.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cispo {
    /// Where the ratio is clipped.
    pub range: ClipRange,
    /// Clamp of the log-ratio; `None` for none.
    pub log_ratio_clamp: Option<f64>,
}

/// SAPO: a sigmoid of the ratio in place of the clip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sapo {
    /// Steepness of the gate where A > 0; above 0.
    pub tau_pos: f64,
    /// Steepness elsewhere; above 0.
    pub tau_neg: f64,
    /// Clamp of the log-ratio; `None` for none.
    pub log_ratio_clamp: Option<f64>,
}

impl Clip {
    pub(super) fn token(&self, d: f64, advantage: f64) -> TokenLoss {
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
    pub(super) fn token(&self, d: f64, advantage: f64, chosen: bool) -> TokenLoss {
        if chosen {
            return TokenLoss { clipped: true, touched: true, ..TokenLoss::default() };
        }
        let (ratio, slope) = ratio(d, self.log_ratio_clamp);
        TokenLoss { clipped: false, ..self.range.token(advantage, ratio, slope) }
    }
}

impl KlCov {
    /// The penalty takes the log-ratio itself, not the clamped one, so that it keeps pulling back.
    pub(super) fn token(&self, d: f64, advantage: f64, chosen: bool) -> TokenLoss {
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
    pub(super) fn token(&self, advantage: f64, ratio: f64, slope: f64) -> TokenLoss {
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
    pub(super) fn clips(&self, advantage: f64, ratio: f64) -> bool {
        -advantage * self.clamp(ratio) > -advantage * ratio
    }

    /// Between 1-low and 1+high; written out because `f64::clamp` panics on bounds out of order.
    pub(super) fn clamp(&self, ratio: f64) -> f64 {
        ratio.max(1.0 - self.low).min(1.0 + self.high)
    }
}

impl Cispo {
    pub(super) fn token(&self, d: f64, advantage: f64, log_prob: f64) -> TokenLoss {
        let (ratio, _) = ratio(d, self.log_ratio_clamp);
        let weight = self.range.clamp(ratio);
        let clipped = weight != ratio;
        TokenLoss {
            value: -weight * advantage * log_prob,
            slope: -weight * advantage,
            clipped,
            touched: clipped,
            ..TokenLoss::default()
        }
    }
}

/// -A logp.
pub(super) fn gpg(d: f64, advantage: f64, log_prob: f64) -> TokenLoss {
    TokenLoss {
        value: -advantage * log_prob,
        slope: -advantage,
        touched: d != 0.0,
        ..TokenLoss::default()
    }
}

impl Sapo {
    pub(super) fn token(&self, d: f64, advantage: f64) -> TokenLoss {
        let (ratio, slope) = ratio(d, self.log_ratio_clamp);
        let tau = if advantage > 0.0 { self.tau_pos } else { self.tau_neg };
        let gate = 1.0 / (1.0 + (-tau * (ratio - 1.0)).exp());
        TokenLoss {
            value: -advantage * gate * 4.0 / tau,
            slope: -advantage * 4.0 * gate * (1.0 - gate) * slope,
            touched: d != 0.0,
            ..TokenLoss::default()
        }
    }
}

/// exp of the clamped log-ratio, and its derivative.
pub(super) fn ratio(d: f64, clamp: Option<f64>) -> (f64, f64) {
    match clamp {
        Some(limit) if d.abs() >= limit => (limit.copysign(d).exp(), 0.0),
        _ => (d.exp(), d.exp()),
    }
}
