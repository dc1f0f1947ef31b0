//! Training by an algorithm of one's own: an advantage and a loss.
//!
//! `cargo run --release -p trainer --example own_algorithm` (seconds). The advantage of a response is its
//! reward less the median of its group. The loss of a token is that of SPO (arXiv 2401.16025), which has no
//! clip: -A r + |A| (r - 1)^2 / (2 eps), with r the ratio, so that the gain is largest at r = 1 +- eps. How tokens
//! are weighed, minibatches, optimizer, metrics and checkpoints are the trainer's, as for the methods built in.

use std::error::Error;

use engine::model::{hub::Builtin, open_builtin};
use engine::{Engine, EngineConfig};
use trainer::advantage::{Estimated, Outcomes, within_groups};
use trainer::loss::{ChoiceKey, LossOutput, TokenBatch, TokenLoss};
use trainer::metrics::Metrics;
use trainer::{Algorithm, Parts, RlConfig, Trainer};

/// Median baseline, and a quadratic in place of the clip.
struct MedianSpo {
    /// How far from 1 ratios may go; above 0.
    eps: f64,
}

impl Algorithm for MedianSpo {
    fn advantages(&self, outcomes: &Outcomes<'_>) -> trainer::Result<Estimated> {
        within_groups(outcomes, |rewards| {
            let mut sorted = rewards.to_vec();
            sorted.sort_by(f64::total_cmp);
            let median = (sorted[(sorted.len() - 1) / 2] + sorted[sorted.len() / 2]) / 2.0;
            rewards.iter().map(|reward| reward - median).collect()
        })
    }

    fn loss(&self, batch: &TokenBatch<'_, f32>, _: ChoiceKey) -> trainer::Result<LossOutput> {
        let token = |i: usize| {
            let (ratio, a) = (batch.log_ratio(i).exp(), f64::from(batch.advantage[i]));
            let off = ratio - 1.0;
            TokenLoss {
                value: -a * ratio + a.abs() * off * off / (2.0 * self.eps),
                // The derivative of the ratio by the log-probability is the ratio.
                slope: (-a + a.abs() * off / self.eps) * ratio,
                touched: off != 0.0,
                ..TokenLoss::default()
            }
        };
        LossOutput::sum(batch, &(0..batch.mask.len()).map(token).collect::<Vec<_>>())
    }
}

/// Trains, and returns the metrics of each step.
pub(crate) fn train() -> Result<Vec<Metrics>, Box<dyn Error>> {
    let engine = Engine::load(&open_builtin(Builtin::Arith)?, &EngineConfig::default())?;
    let set = [("optimizer.lr".to_owned(), "3e-5".to_owned())];
    let config = RlConfig::resolve(Some("grpo"), None, &set)?;
    let parts = Parts::new().algorithm(MedianSpo { eps: 0.2 });
    let mut trainer = Trainer::with_parts(engine, config, parts)?;
    let steps = (0..8).map(|_| trainer.step().map(|(metrics, _)| metrics));
    Ok(steps.collect::<trainer::Result<_>>()?)
}

fn main() -> Result<(), Box<dyn Error>> {
    train()?.iter().for_each(|metrics| println!("{}", metrics.progress(8)));
    Ok(())
}
