//! Estimators of KL(policy || reference) at a token sampled from the policy, x = logp - ref.
//!
//! k1, k2, k3 are Schulman's ("Approximating KL divergence", 2020); names as in verl:
//!
//! | name | value | derivative |
//! |---|---|---|
//! | `k1` (`kl`) | x | 1 |
//! | `abs` | \|x\| | sign(x), 0 at 0 |
//! | `k2` (`mse`) | x^2 / 2 | x |
//! | `k3` (`low_var_kl`) | e^-x + x - 1, -x clamped to +-20, value to +-10 | 1 - e^-x, 0 where clamped |
//!
//! A `+` after a name keeps the value and takes the derivative of k2, whose expectation is the
//! gradient of the divergence (verl accepts these names and then fails on them).

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// Which estimator gives the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KlValue {
    /// x.
    K1,
    /// |x|.
    Abs,
    /// x^2 / 2.
    K2,
    /// e^-x + x - 1, clamped.
    K3,
}

/// Where the derivative comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KlGradient {
    /// The derivative of the value.
    Own,
    /// The derivative of k2 (a `+` in the name).
    K2,
}

/// An estimator: value and derivative.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KlEstimator {
    /// The value.
    pub value: KlValue,
    /// The derivative.
    pub gradient: KlGradient,
}

impl KlEstimator {
    /// The estimate and its derivative with respect to `log_prob`.
    pub fn evaluate(self, log_prob: f64, reference: f64) -> (f64, f64) {
        let x = log_prob - reference;
        let (value, own) = match self.value {
            KlValue::K1 => (x, 1.0),
            KlValue::Abs => (x.abs(), sign(x)),
            KlValue::K2 => (0.5 * x * x, x),
            KlValue::K3 => k3(x),
        };
        match self.gradient {
            KlGradient::Own => (value, own),
            KlGradient::K2 => (value, x),
        }
    }
}

/// The coefficient that follows `coefficient` after `responses` responses of mean divergence `current`,
/// where `target` is aimed at over `horizon` responses (Ziegler et al., 1909.08593, section 2.2).
///
/// ```
/// use trainer::kl::adapted_coefficient;
/// assert_eq!(adapted_coefficient(0.5, 0.3, 0.1, (1_000.0, 10_000.0)), 0.5 * 1.02);
/// assert_eq!(adapted_coefficient(0.5, 0.1, 0.1, (1_000.0, 10_000.0)), 0.5);
/// ```
pub fn adapted_coefficient(
    coefficient: f64,
    current: f64,
    target: f64,
    (responses, horizon): (f64, f64),
) -> f64 {
    let error = (current / target - 1.0).clamp(-0.2, 0.2);
    coefficient * (1.0 + error * responses / horizon)
}

/// -1, 0 or 1; 0 at 0, unlike `f64::signum`.
pub(crate) fn sign(x: f64) -> f64 {
    if x == 0.0 { 0.0 } else { x.signum() }
}

fn k3(x: f64) -> (f64, f64) {
    let minus_x = (-x).clamp(-20.0, 20.0);
    let raw = minus_x.exp() - minus_x - 1.0;
    let clamped = raw.clamp(-10.0, 10.0);
    let inside = raw == clamped && minus_x == -x;
    (clamped, if inside { 1.0 - minus_x.exp() } else { 0.0 })
}

impl FromStr for KlEstimator {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let (base, gradient) = match name.strip_suffix('+') {
            Some(base) => (base, KlGradient::K2),
            None => (name, KlGradient::Own),
        };
        let value = match base {
            "k1" | "kl" => KlValue::K1,
            "abs" => KlValue::Abs,
            "k2" | "mse" => KlValue::K2,
            "k3" | "low_var_kl" => KlValue::K3,
            _ => {
                return Err(Error::config(format!(
                    "the divergence estimator is {name:?}, expected k1, k2, k3 or abs, with or without a +"
                )));
            }
        };
        Ok(Self { value, gradient })
    }
}

impl TryFrom<String> for KlEstimator {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl From<KlEstimator> for String {
    fn from(kl: KlEstimator) -> Self {
        let base = match kl.value {
            KlValue::K1 => "k1",
            KlValue::Abs => "abs",
            KlValue::K2 => "k2",
            KlValue::K3 => "k3",
        };
        let plus = if kl.gradient == KlGradient::K2 { "+" } else { "" };
        format!("{base}{plus}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_nonsense_is_refused() {
        for name in ["k1", "k2", "k3", "abs", "k3+"] {
            assert_eq!(String::from(name.parse::<KlEstimator>().unwrap()), name);
        }
        assert_eq!("low_var_kl".parse::<KlEstimator>().unwrap(), "k3".parse().unwrap());
        assert!("k4".parse::<KlEstimator>().is_err());
    }
}
