//! Training by a reward of one's own: part of it for an answer that is near.
//!
//! `cargo run --release -p trainer --example own_reward` (seconds). The reward is a closure of the row and the
//! response's text; everything else is the configured KL-Cov on `builtin:arith`. A reward for whole batches
//! at a time goes in by `Parts::reward_batch`.

use std::error::Error;

use engine::model::{hub::Builtin, open_builtin};
use engine::{Engine, EngineConfig};
use trainer::data::Row;
use trainer::{Parts, RlConfig, Trainer};

/// 1 for the right number, less the further off it is, 0 for no number; none for a row without a number.
fn nearness(row: &Row, response: &str) -> Option<f64> {
    let truth: f64 = row.ground_truth.parse().ok()?;
    let answer: Option<f64> = response.trim().parse().ok();
    Some(answer.map_or(0.0, |answer| 1.0 / (1.0 + (answer - truth).abs())))
}

/// Trains, and returns the mean reward of each step.
pub(crate) fn train() -> Result<Vec<f64>, Box<dyn Error>> {
    let engine = Engine::load(&open_builtin(Builtin::Arith)?, &EngineConfig::default())?;
    let set = [("optimizer.lr".to_owned(), "3e-5".to_owned())];
    let config = RlConfig::resolve(Some("kl_cov"), None, &set)?;
    let mut trainer = Trainer::with_parts(engine, config, Parts::new().reward(nearness))?;
    let mut rewards = Vec::new();
    for _ in 0..8 {
        let (metrics, _) = trainer.step()?;
        rewards.extend(metrics.get("critic/score/mean"));
    }
    Ok(rewards)
}

fn main() -> Result<(), Box<dyn Error>> {
    for (index, reward) in train()?.into_iter().enumerate() {
        println!("step {}: mean reward {reward:.3}", index + 1);
    }
    Ok(())
}
