//! The flags of `engine eval`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::args::{CommonArgs, DEFAULT_MODEL, EngineArgs};

/// Shown under `engine eval --help`.
pub(crate) const EVAL_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine eval\n",
    "  engine eval runs/kl_cov/checkpoints/step_50 --data builtin:arith --n 8 --k 1,2,4,8 --temperature 1\n",
    "  engine eval model.gguf --data aime24.jsonl math500.jsonl --n 32 --k 1 8 32 --output eval.json\n",
    "  engine eval model.gguf --data test.jsonl --reward math_dapo --samples responses.jsonl --json\n",
    "\n",
    "Printed, for each data source and for all rows: mean@n, the share of right responses; pass@k, the\n",
    "probability that some of k responses is right (unbiased); maj@k, that their vote is right; best@k,\n",
    "verl's biased form of pass@k. Sources that begin with aime or amc are sampled at temperature 0.6, others\n",
    "decoded greedily with 1 response a row; --temperature holds for all. Copies of a row count as rows:\n",
    "--deduplicate drops them.",
);

/// `engine eval`.
#[derive(Debug, Args)]
pub(crate) struct EvalArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// JSONL or Parquet files of tasks, builtin:arith, builtin:sum or builtin:countdown
    #[arg(long, value_name = "FILE", num_args = 1.., default_value = "builtin:arith")]
    pub(crate) data: Vec<String>,
    /// Responses to a row, where they are sampled
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) n: usize,
    /// Numbers of responses for pass@k, maj@k and best@k [default: 1, 2, 4 ... N]
    #[arg(long, value_name = "K", num_args = 1.., value_delimiter = ',')]
    pub(crate) k: Vec<usize>,
    /// Temperature for all sources, 0 is greedy [default: 0.6 for aime* and amc*, else 0]
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Share of probability to draw from
    #[arg(long, default_value_t = 1.0)]
    pub(crate) top_p: f32,
    /// Most likely tokens to draw from; 0 or -1 for all
    #[arg(long, allow_negative_numbers = true, default_value_t = -1)]
    pub(crate) top_k: i64,
    /// Most tokens of a response; the context may leave fewer
    #[arg(long, value_name = "TOKENS", default_value_t = 8192)]
    pub(crate) max_tokens: usize,
    /// Text that ends a response; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// How prompts become text
    #[arg(long, value_enum, default_value_t = TemplateArg::Chat)]
    pub(crate) prompt_template: TemplateArg,
    /// What judges: auto (by data source), a rule, command:./score.py or http://...; failures count as 0
    #[arg(long, value_name = "NAME", default_value = "auto")]
    pub(crate) reward: String,
    /// Longest time for a reward of a program or a server; the first of a program has 60 s at least
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    pub(crate) reward_timeout: f64,
    /// Keep the first row of each prompt
    #[arg(long)]
    pub(crate) deduplicate: bool,
    /// Leave out prompts that are too long instead of ending
    #[arg(long)]
    pub(crate) filter_overlong_prompts: bool,
    /// JSON file for the results
    #[arg(long, value_name = "FILE.json")]
    pub(crate) output: Option<PathBuf>,
    /// JSONL file for the responses and verdicts
    #[arg(long, value_name = "FILE.jsonl")]
    pub(crate) samples: Option<PathBuf>,
    /// Print the results as JSON instead of a table
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `--prompt-template`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum TemplateArg {
    /// The model's chat template
    Chat,
    /// R1-Zero's text around the last message
    #[value(name = "r1_zero")]
    R1Zero,
    /// The text as it is
    Raw,
}
