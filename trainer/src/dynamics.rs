//! How the entropy of a policy moves: what is measured in a step, and what theory says of the next.
//!
//! Entropies are in nats, of the distribution each token was drawn from, as two means (verl's over
//! tokens, the paper's over responses). Covariances are those of [`crate::covariance`] over all tokens
//! of a step, under the weights that sampled them. The predictors are theorems 1 and 2 of arXiv
//! 2505.22617 with the configured learning rate `lr`:
//!
//! ```text
//! theorem 1 (policy gradient)           dH = -lr Cov(log pi, pi A)
//! theorem 2 (natural policy gradient)   dH = -lr Cov(log pi, A)
//! ```
//!
//! They hold for one small step of a tabular softmax policy, by state. Here they are estimated over
//! the tokens of a batch, each with the probability and advantage of the token that was sampled, and
//! AdamW takes several updates of another size a step. So they are right in sign and in proportion at
//! best: compare them with the measured change by correlation, never by value. The change from one step to
//! the next is of other prompts too; with `trainer.probe_entropy` a step measures it on its own tokens, in
//! the contexts they were sampled in (`entropy/probe_delta`), which is what the theorems are about.

use crate::covariance::{CovStats, token_covariances};
use crate::metrics::{Metrics, name};
use crate::rollout::Episode;

/// Covariance (divided by the number of pairs) of two equally long lists; `None` if they are empty.
///
/// # Panics
/// If the lengths differ.
pub fn covariance(x: &[f64], y: &[f64]) -> Option<f64> {
    assert_eq!(x.len(), y.len(), "each value needs a partner");
    if x.is_empty() {
        return None;
    }
    let n = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    Some(x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / n)
}

/// Pearson's correlation; `None` with fewer than two pairs or when one side does not vary.
///
/// # Panics
/// If the lengths differ.
pub fn correlation(x: &[f64], y: &[f64]) -> Option<f64> {
    let scale = (covariance(x, x)? * covariance(y, y)?).sqrt();
    (x.len() >= 2 && scale > 0.0).then(|| covariance(x, y).map(|c| c / scale)).flatten()
}

/// The predictors of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predictors {
    /// Cov(log pi, pi A): that of theorem 1.
    pub prob_weighted_cov: f64,
    /// Cov(log pi, A): that of theorem 2, the mean of the token covariances.
    pub cov: f64,
}

impl Predictors {
    /// From the log-probability and the advantage of each token; `None` if there is no token.
    ///
    /// # Panics
    /// If the lengths differ.
    ///
    /// ```
    /// use trainer::dynamics::Predictors;
    /// let p = Predictors::new(&[0.0, 0.25f64.ln()], &[1.0, -1.0]).unwrap();
    /// assert!((p.cov - 4f64.ln() / 2.0).abs() < 1e-12);
    /// assert!((p.prob_weighted_cov - 4f64.ln() / 2.0 * 0.625).abs() < 1e-12);
    /// ```
    pub fn new(log_prob: &[f64], advantage: &[f64]) -> Option<Self> {
        let weighted: Vec<f64> =
            log_prob.iter().zip(advantage).map(|(log_prob, a)| log_prob.exp() * a).collect();
        Some(Self {
            prob_weighted_cov: covariance(log_prob, &weighted)?,
            cov: covariance(log_prob, advantage)?,
        })
    }
}

/// Measures one step after another; remembers the entropy of the step before.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dynamics {
    /// In f32, which survives its way through `metrics.jsonl` to the bit.
    previous: Option<f32>,
}

impl Dynamics {
    /// Goes on after a step whose `actor/entropy` was `entropy`.
    pub fn after(entropy: Option<f64>) -> Self {
        Self { previous: entropy.map(|h| h as f32) }
    }

    /// Sets the entropies of a step's responses, and `entropy/delta`: the change since the step
    /// before, the one which that step's predictors are about. Responses without a token have no
    /// entropy; the first step has no change.
    pub fn record_entropies<'a>(
        &mut self,
        metrics: &mut Metrics,
        episodes: impl IntoIterator<Item = &'a Episode>,
    ) {
        let sum = |e: &Episode| e.entropies.iter().map(|h| f64::from(*h)).sum::<f64>();
        let spoken: Vec<&Episode> =
            episodes.into_iter().filter(|e| !e.entropies.is_empty()).collect();
        if spoken.is_empty() {
            self.previous = None;
            return;
        }
        let all = spoken.iter().flat_map(|e| &e.entropies);
        let (count, total) = all.fold((0u64, 0.0), |(n, sum), h| (n + 1, sum + f64::from(*h)));
        let mean = total / count as f64;
        metrics.set(name::ENTROPY, mean);
        let means = spoken.iter().map(|e| sum(e) / e.entropies.len() as f64);
        metrics.set(name::ENTROPY_PER_RESPONSE, means.sum::<f64>() / spoken.len() as f64);
        if let Some(previous) = self.previous.replace(mean as f32) {
            metrics.set(name::ENTROPY_DELTA, f64::from(mean as f32) - f64::from(previous));
        }
    }
}

/// Sets the statistics of the covariances of a step's tokens, before its first update, and both
/// predictors of the change of entropy from this step to the next. Each token has its log-probability
/// in nats and its advantage.
///
/// # Panics
/// If the lengths differ.
pub fn record_covariances(metrics: &mut Metrics, log_prob: &[f64], advantage: &[f64], lr: f64) {
    let mask = vec![true; log_prob.len()];
    let scope = 0..log_prob.len();
    let covariances = token_covariances(log_prob, advantage, &mask, std::slice::from_ref(&scope));
    if let Some(stats) = CovStats::new(&covariances) {
        stats.record(metrics);
    }
    if let Some(predictors) = Predictors::new(log_prob, advantage) {
        metrics.set(name::COV_PROB_WEIGHTED, predictors.prob_weighted_cov);
        metrics.set(name::ENTROPY_PREDICTED_1, -lr * predictors.prob_weighted_cov);
        metrics.set(name::ENTROPY_PREDICTED_2, -lr * predictors.cov);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::FinishReason;

    fn episode(entropies: &[f32]) -> Episode {
        Episode {
            prompt: 0,
            sample: 0,
            tokens: vec![0; entropies.len()],
            logprobs: vec![0.0; entropies.len()],
            entropies: entropies.to_vec(),
            text: String::new(),
            text_ends: vec![0; entropies.len()],
            finish: FinishReason::Stop,
            version: 0,
        }
    }

    #[test]
    fn entropies_are_meant_over_tokens_and_over_responses() {
        let mut dynamics = Dynamics::default();
        let mut first = Metrics::new();
        let responses = [episode(&[1.0, 1.0, 1.0]), episode(&[0.0]), episode(&[])];
        dynamics.record_entropies(&mut first, &responses);
        assert_eq!(first.get(name::ENTROPY), Some(0.75));
        assert_eq!(first.get(name::ENTROPY_PER_RESPONSE), Some(0.5));
        assert_eq!(first.get(name::ENTROPY_DELTA), None);
        let mut second = Metrics::new();
        dynamics.record_entropies(&mut second, &[episode(&[0.5])]);
        assert_eq!(second.get(name::ENTROPY_DELTA), Some(-0.25));
        let mut resumed = Metrics::new();
        Dynamics::after(first.get(name::ENTROPY))
            .record_entropies(&mut resumed, &[episode(&[0.5])]);
        assert_eq!(resumed, second);
        let mut silent = Metrics::new();
        dynamics.record_entropies(&mut silent, &[episode(&[])]);
        assert_eq!(silent, Metrics::new());
    }

    #[test]
    fn predictors_are_the_covariances_by_the_learning_rate() {
        let mut metrics = Metrics::new();
        let half = 0.5f32.ln();
        let l = f64::from(half);
        record_covariances(&mut metrics, &[0.0, l, l], &[1.0, 1.0, -2.0], 0.5);
        // log pi = 0, l, l; A = 1, 1, -2 with mean 0; pi A = 1, 0.5, -1.
        let theorem_2 = -0.5 * (l - 2.0 * l) / 3.0;
        let p = l.exp();
        let theorem_1 = -0.5 * (l * (p - 2.0 * p) / 3.0 - (2.0 * l / 3.0) * (1.0 - p) / 3.0);
        let close = |name: &str, want: f64| {
            let got = metrics.get(name).unwrap();
            assert!((got - want).abs() < 1e-12, "{name}: {got}, expected {want}");
        };
        close(name::ENTROPY_PREDICTED_2, theorem_2);
        close(name::ENTROPY_PREDICTED_1, theorem_1);
        close(name::COV_PROB_WEIGHTED, theorem_1 / -0.5);
        close(name::COV_MEAN, theorem_2 / -0.5);
        let mut none = Metrics::new();
        record_covariances(&mut none, &[], &[], 0.5);
        assert_eq!(none, Metrics::new());
    }

    #[test]
    fn correlations_of_lines_are_one_and_of_constants_none() {
        assert_eq!(correlation(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]), Some(1.0));
        assert_eq!(correlation(&[1.0, 2.0], &[3.0, 1.0]), Some(-1.0));
        assert_eq!(correlation(&[1.0, 2.0], &[3.0, 3.0]), None);
        assert_eq!(correlation(&[], &[]), None);
        assert_eq!(correlation(&[1.0], &[1.0]), None);
    }
}
