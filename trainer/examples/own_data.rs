//! Training on rows of one's own, and a model to show for it.
//!
//! `cargo run --release -p trainer --example own_data` (seconds). The rows are made in memory, from
//! whatever there is; those of JSON lines and Parquet files are read by the same `Trainer`. Their
//! `data_source` names the rule that judges them. At the end the folder `own_data` has the model, as
//! `transformers` and `engine serve` read it.

use std::error::Error;
use std::path::Path;

use engine::model::{hub::Builtin, open_builtin};
use engine::{Engine, EngineConfig};
use trainer::data::{Prompt, Row};
use trainer::{Parts, RlConfig, Trainer};

/// Squares to learn, one of four kept back.
fn squares() -> (Vec<Row>, Vec<Row>) {
    let row = |n: u32| Row {
        data_source: Some("exact".to_owned()),
        prompt: Prompt::Text(format!("{n}*{n}=")),
        ground_truth: (n * n).to_string(),
        extra: serde_json::json!({ "index": n }),
    };
    (0..20).map(row).partition(|row| row.extra["index"].as_u64().is_some_and(|n| n % 4 != 1))
}

/// Trains, writes the model into `dir`, and returns the accuracy on the rows of training, which it has
/// seen, before and after.
pub(crate) fn train(dir: &Path) -> Result<[f64; 2], Box<dyn Error>> {
    let engine = Engine::load(&open_builtin(Builtin::Arith)?, &EngineConfig::default())?;
    let set = [("data.train_batch_size", "16"), ("optimizer.lr", "1e-4")];
    let set = set.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let config = RlConfig::resolve(Some("grpo"), None, &set)?;
    let (rows, kept_back) = squares();
    let parts = Parts::new().rows(rows.clone());
    let mut trainer = Trainer::with_parts(engine, config, parts)?;
    let before = trainer.validate(&rows)?.accuracy;
    for _ in 0..20 {
        trainer.step()?;
    }
    trainer.save_model(dir)?;
    let unseen = trainer.validate(&kept_back)?;
    println!("on {} squares that were kept back: {:.3}", unseen.rows, unseen.accuracy);
    Ok([before, trainer.validate(&rows)?.accuracy])
}

fn main() -> Result<(), Box<dyn Error>> {
    let [before, after] = train(Path::new("own_data"))?;
    println!("on those of training: {before:.3} before, {after:.3} after");
    Ok(())
}
