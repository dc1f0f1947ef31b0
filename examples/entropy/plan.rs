//! What is run: methods, settings, sizes.
//!
//! The settings were chosen after trials on `builtin:arith` with one seed, which the README's results name. Mini-batches
//! here have about a hundred tokens, so the paper's shares of 2e-4 and 2e-3 would be less than one token.

use std::error::Error;
use std::path::PathBuf;

use trainer::config::Method;
use trainer::{Parts, RlConfig, Rows, train_rows, val_rows};

use super::Args;

/// Settings of all runs of `builtin:arith`: 8 updates a rollout, so that ratios move.
const ARITH: [(&str, &str); 7] = [
    ("data.max_prompt_length", "32"),
    ("data.max_response_length", "16"),
    ("optimizer.lr", "3e-5"),
    ("trainer.total_steps", "150"),
    ("trainer.test_freq", "3"),
    ("trainer.save_freq", "50"),
    ("trainer.probe_entropy", "true"),
];

/// Settings of all runs of a model of one's own.
const OWN: [(&str, &str); 6] = [
    ("data.train_batch_size", "16"),
    ("algorithm.mini_batch_size", "2"),
    ("data.max_response_length", "64"),
    ("trainer.total_steps", "30"),
    ("trainer.test_freq", "5"),
    ("trainer.save_freq", "10"),
];

/// The methods compared, with what they have other than their presets on `builtin:arith`.
const METHODS: [(Method, &[(&str, &str)]); 4] = [
    (Method::Grpo, &[]),
    (Method::ClipHigher, &[]),
    (
        Method::ClipCov,
        &[
            ("algorithm.clip_cov_ratio", "0.05"),
            ("algorithm.clip_cov_lb", "0.2"),
            ("algorithm.clip_cov_ub", "10"),
        ],
    ),
    (Method::KlCov, &[("algorithm.kl_cov_ratio", "0.05"), ("algorithm.ppo_kl_coef", "3")]),
];

/// Highest level of `builtin:arith` that is trained and validated on.
const LEVEL: u64 = 4;

/// All there is to run.
pub(crate) struct Plan {
    pub(crate) methods: Vec<Method>,
    pub(crate) seeds: Vec<u64>,
    /// Runs at a time.
    pub(crate) jobs: usize,
    /// Threads of each.
    pub(crate) threads: usize,
    /// Samples of a held-out task.
    pub(crate) samples: usize,
    pub(crate) output: PathBuf,
    model: String,
    files: Vec<(String, String)>,
    overrides: Vec<(String, String)>,
}

impl Plan {
    pub(crate) fn new(args: &Args) -> Result<Self, Box<dyn Error>> {
        let cores = std::thread::available_parallelism()?.get();
        let built_in = args.model == "builtin:arith";
        if built_in != args.train_files.is_empty() {
            return Err("--model of your own and --train-files go together".into());
        }
        let named: trainer::Result<Vec<Method>> =
            args.methods.iter().map(|name| Method::parse(name)).collect();
        let mut methods = named?;
        if methods.is_empty() {
            methods = METHODS.map(|(method, _)| method).to_vec();
        }
        let jobs = args.jobs.unwrap_or(if built_in { cores } else { 1 }).max(1);
        let set = |text: &String| {
            let pair = text.split_once('=').ok_or(format!("--set {text} has no value"))?;
            Ok::<_, String>((pair.0.to_owned(), pair.1.to_owned()))
        };
        let list = |files: &[String]| files.join(",");
        let mut files = Vec::new();
        if !built_in {
            files.push(("data.train_files".to_owned(), list(&args.train_files)));
            files.push(("data.val_files".to_owned(), list(&args.val_files)));
        }
        Ok(Self {
            methods,
            seeds: (0..args.seeds.max(1)).collect(),
            jobs,
            threads: (cores / jobs).max(1),
            samples: args.samples.into(),
            output: args.output.clone(),
            model: args.model.clone(),
            files,
            overrides: args.set.iter().map(set).collect::<Result<_, _>>()?,
        })
    }

    /// The folder of a run.
    pub(crate) fn folder(&self, method: Method, seed: u64) -> PathBuf {
        self.output.join(format!("{}-{seed}", method.name()))
    }

    /// Whether the policy is the one that ships with the program.
    pub(crate) fn is_built_in(&self) -> bool {
        self.files.is_empty()
    }

    pub(crate) fn config(&self, method: Method, seed: u64) -> trainer::Result<RlConfig> {
        let own = |(key, value): &(&str, &str)| ((*key).to_owned(), (*value).to_owned());
        let mut set: Vec<(String, String)> = match self.is_built_in() {
            true => {
                let of = METHODS.iter().find(|(known, _)| *known == method);
                ARITH.iter().chain(of.map_or(&[][..], |(_, set)| *set)).map(own).collect()
            }
            false => OWN.iter().map(own).collect(),
        };
        set.extend(self.files.iter().cloned());
        set.push(("model.path".to_owned(), self.model.clone()));
        set.push(("trainer.output".to_owned(), self.folder(method, seed).display().to_string()));
        // Another seed samples differently and sees the tasks in another order.
        set.push(("trainer.seed".to_owned(), seed.to_string()));
        set.push(("data.seed".to_owned(), (seed + 1).to_string()));
        set.extend(self.overrides.iter().cloned());
        RlConfig::resolve(Some(method.name()), None, &set)
    }

    /// The rows to train and to validate on.
    pub(crate) fn rows(&self, config: &RlConfig) -> trainer::Result<[Rows; 2]> {
        let mut rows = [train_rows(&config.data)?, val_rows(&config.data)?];
        if self.is_built_in() {
            rows = rows.map(|rows| {
                let low = |row: &trainer::data::Row| {
                    row.extra["level"].as_u64().is_some_and(|level| level <= LEVEL)
                };
                Rows::new(rows.rows.into_iter().filter(low).collect())
            });
        }
        Ok(rows)
    }

    pub(crate) fn parts(&self, config: &RlConfig) -> trainer::Result<Parts> {
        let [train, validation] = self.rows(config)?;
        Ok(Parts::new().rows(train).validation(validation))
    }
}
