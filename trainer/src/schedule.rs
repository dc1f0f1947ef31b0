//! The learning rate of a training step.
//!
//! Linear warm-up `step / warmup_steps`, then constant or a half cosine towards 0. Steps count from 1
//! and the rate changes once per training step, not per optimizer update, as in verl. Differs from
//! the paper's code, whose first step runs at rate 0: here every step learns.

use serde::{Deserialize, Serialize};

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LrShape {
    /// Stays at the base rate.
    Constant,
    /// Falls along half a cosine; the step after the last would have rate 0.
    Cosine,
}

/// A learning rate for every step of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The rate reached after the warm-up.
    pub base: f64,
    /// The shape after it.
    pub shape: LrShape,
    /// Steps of the warm-up; 0 for none.
    pub warmup_steps: u64,
    /// Steps of the run.
    pub total_steps: u64,
}

impl Schedule {
    /// The rate of training step `step`, from 1.
    ///
    /// ```
    /// use trainer::schedule::{LrShape, Schedule};
    /// let s = Schedule { base: 1.0, shape: LrShape::Cosine, warmup_steps: 2, total_steps: 4 };
    /// assert_eq!([1, 2, 3].map(|step| s.rate(step)), [0.5, 1.0, 1.0]);
    /// assert!((s.rate(4) - 0.5).abs() < 1e-12);
    /// ```
    pub fn rate(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.base * step as f64 / self.warmup_steps as f64;
        }
        match self.shape {
            LrShape::Constant => self.base,
            LrShape::Cosine => {
                let done = (step - self.warmup_steps - 1) as f64;
                let all = self.total_steps.saturating_sub(self.warmup_steps).max(1) as f64;
                let angle = std::f64::consts::PI * (done / all).min(1.0);
                self.base * 0.5 * (1.0 + angle.cos())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constant_without_warmup_is_the_base_rate_from_the_first_step() {
        let s = Schedule { base: 3e-5, shape: LrShape::Constant, warmup_steps: 0, total_steps: 2 };
        assert_eq!([1, 2, 99].map(|step| s.rate(step)), [3e-5; 3]);
    }

    #[test]
    fn cosine_falls_and_stays_at_zero_after_the_end() {
        let s = Schedule { base: 1.0, shape: LrShape::Cosine, warmup_steps: 0, total_steps: 10 };
        assert!((1..10).all(|step| s.rate(step) > s.rate(step + 1)));
        assert!(s.rate(10) > 0.0);
        assert_eq!(s.rate(50), 0.0);
    }
}
