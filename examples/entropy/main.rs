//! The paper's findings, small: what four methods do to entropy and to reward (arXiv 2505.22617).
//!
//! `cargo run --release --example entropy` trains `builtin:arith` by GRPO, Clip-higher, Clip-Cov and KL-Cov with
//! three seeds each and the same budget, and writes into `runs/entropy`: `results.md` (the table), `report.html`
//! (each method's mean over its seeds: curves, the fit R = -a exp(H) + b), `charts/*.svg`, `curves.csv`, and a
//! folder for each run. Called again, it goes on where it was stopped, and makes the report anew.
//!
//! Tasks are those of levels 1 to 4 of 5: the small policy never solves a task of level 5, a group of wrong answers
//! has no advantage, and so no method moves the entropy of those tasks, which is most of what is left at the end.
//! A real model, with files in verl's or TRL's schema (hours on two cores; `--seeds 1` for a first look):
//!
//! ```sh
//! cargo run --release --example entropy -- --model models/smollm2-135m.gguf \
//!     --train-files add_train.jsonl --val-files add_test.jsonl --output runs/entropy-smollm2
//! ```
#![allow(clippy::print_stdout, reason = "an example reports to the terminal")]

mod measure;
mod plan;
mod report;
mod runs;
#[cfg(test)]
mod tests;

use std::error::Error;
use std::path::PathBuf;

use clap::Parser;

use plan::Plan;

/// Compare how GRPO, Clip-higher, Clip-Cov and KL-Cov move entropy and reward.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// Folder for runs and report
    #[arg(long, default_value = "runs/entropy")]
    output: PathBuf,
    /// Model folder, GGUF file or builtin:arith
    #[arg(long, default_value = "builtin:arith")]
    model: String,
    /// Training tasks of a model that is not built in
    #[arg(long, num_args = 1.., requires = "val_files")]
    train_files: Vec<String>,
    /// Its validation tasks
    #[arg(long, num_args = 1.., requires = "train_files")]
    val_files: Vec<String>,
    /// Runs of each method, with seeds 0, 1 ...
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Samples of a held-out task at the end
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    samples: u16,
    /// Only these of the four methods
    #[arg(long, num_args = 1.., value_name = "METHOD")]
    methods: Vec<String>,
    /// Runs at a time, a thread each; default: a thread for each core, or one run on all for a model of your own
    #[arg(long)]
    jobs: Option<usize>,
    /// Another value for a key of the configuration, in all runs
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    println!("{}", compare(&args)?);
    println!("report {}", args.output.join("report.html").display());
    Ok(())
}

/// Trains, measures and reports; returns the table.
fn compare(args: &Args) -> Result<String, Box<dyn Error>> {
    let plan = Plan::new(args)?;
    let runs = runs::train_all(&plan)?;
    report::write(&plan, &runs)
}
