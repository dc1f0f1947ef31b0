//! The flags of the training commands; their configuration files belong to the trainer.

use std::path::PathBuf;

use clap::Args;

use crate::args::{ApiArgs, CommonArgs, EngineArgs};
use crate::device::DeviceArg;

/// Shown under `engine rl --help`.
pub(crate) const RL_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine rl --method kl_cov\n",
    "  engine rl --method grpo --model smollm2-135m.gguf --train-files train.jsonl --output runs/add\n",
    "  engine rl --train-files train.jsonl --reward command:./score.py\n",
    "  engine rl --output runs/add --serve 127.0.0.1:8000 --api-key $KEY\n",
    "  engine rl --config run.toml --set optimizer.lr=1e-6 --set rollout.n=16 --dry-run\n",
    "\n",
    "Methods: grpo dr_grpo rloo reinforce_pp reinforce_pp_baseline remax opo dapo clip_higher clip_cov\n",
    "kl_cov gspo cispo gpg sapo gmpo; with the sizes and rates of published scripts as well: paper-7b\n",
    "paper-32b verl. --dry-run prints all that a method sets; any key can be overridden.\n",
    "\n",
    "The file of --config has the sections model, data, rollout, algorithm, optimizer, reward and\n",
    "trainer. The environment wins over it, the command line over both; in each of these, flags win over\n",
    "--set.",
);

/// Shown under `engine sft --help`.
pub(crate) const SFT_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine sft --model smollm2-135m.gguf --train-files answers.jsonl --output runs/sft\n",
    "  engine sft --config-json tiny.json --train-files answers.jsonl\n",
    "\n",
    "The same command again goes on from the newest checkpoint; --resume never begins anew.\n",
);

/// `engine rl`.
#[derive(Debug, Args)]
pub(crate) struct RlArgs {
    /// Vetted preset of the algorithm, e.g. grpo, dapo, clip_cov or kl_cov; all are listed below
    #[arg(long, value_name = "NAME")]
    pub(crate) method: Option<String>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    /// What judges: auto (by data source), a rule such as prime_math, command:./score.py or http://...
    #[arg(long, value_name = "FUNCTION")]
    pub(crate) reward: Option<String>,
    /// What computes: this project's kernels (cpu), or slowly candle (candle-cpu, cuda:N) where the
    /// program has it
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = crate::device::parse)]
    pub(crate) device: DeviceArg,
    /// Answer OpenAI requests from the weights in training, at this address; port 0 takes a free one
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) serve: Option<String>,
    #[command(flatten, next_help_heading = "Serving, with --serve")]
    pub(crate) api: ApiArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `engine sft`.
#[derive(Debug, Args)]
pub(crate) struct SftArgs {
    /// Begin with random weights of this shape instead of a model
    #[arg(long, value_name = "FILE", conflicts_with = "model")]
    pub(crate) config_json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) run: RunArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// Flags of every training command.
#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(long)]
    pub(crate) model: Option<String>,
    /// Data to train on
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) train_files: Vec<PathBuf>,
    /// Data to validate on
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub(crate) val_files: Vec<PathBuf>,
    /// Folder for everything the run writes
    #[arg(long, value_name = "DIR")]
    pub(crate) output: Option<PathBuf>,
    /// Where to begin: at the newest checkpoint if there is one, anew, or at a checkpoint
    #[arg(long, value_name = "auto|never|DIR", default_value = "auto")]
    pub(crate) resume: String,
    /// Value for a key of the configuration, e.g. optimizer.lr=1e-6; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Print the resolved configuration and the memory plan, and stop
    #[arg(long)]
    pub(crate) dry_run: bool,
}
