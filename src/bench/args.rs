//! The flags of `engine bench`, spelled as `vllm bench` spells them where the meaning is the same.
//!
//! Those of the load generator are next door, in [`crate::bench::serve_args`].

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::args::{CommonArgs, DEFAULT_MODEL, DrawArgs, EngineArgs};
use crate::bench::serve_args::{SERVE_EXAMPLES, ServeBenchArgs};

/// Shown under `engine bench --help`.
pub(crate) const EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench throughput\n",
    "  engine bench serve smollm2-135m.gguf --num-prompts 64 --request-rate 4\n",
    "  engine bench kernels --json kernels.json\n",
    "\n",
    "A share of the limit compares with what this machine's memory and multipliers, measured first,\n",
    "allow at most: step by step the longer of reading the weights once and of the multiplications;\n",
    "attention and everything else count as nothing.",
);

const THROUGHPUT_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench throughput\n",
    "  engine bench throughput model.gguf --num-prompts 64 --random-input-len 128 --random-output-len 64\n",
    "  engine bench throughput model.gguf --num-prompts 8 --n 8 --random-output-len 128 --logprobs 0\n",
    "  engine bench throughput model.gguf --dataset-name sharegpt --dataset-path sharegpt.json\n",
    "  engine bench throughput model.gguf --json-schema '{\"type\": \"array\", \"items\": {}, \"minItems\": 999}'\n",
    "\n",
    "Prompts are new in every repetition, so nothing comes from the prefix cache, but those of a data\n",
    "set are the same: --no-enable-prefix-caching computes them anew. Random prompts ignore\n",
    "end-of-text, so their lengths are exact.",
);

const LATENCY_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench latency\n",
    "  engine bench latency model.gguf --batch-size 1 --input-len 128 --output-len 64 --num-iters 5\n",
);

const RL_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench rl\n",
    "  engine bench rl smollm2-135m.gguf --prompts 8 --group 8 --prompt-len 120 --response-len 128\n",
    "  engine bench rl smollm2-135m.gguf --prompts 2 --response-len 16 --compare-unshared\n",
    "\n",
    "One GRPO step: generate, judge, forward, backward, clip and AdamW, with prompts of random tokens.\n",
    "--compare-unshared also times a pass in which no sample shares its prompt's rows.",
);

const KERNELS_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench kernels\n",
    "  engine bench kernels --only product --models smollm2-135m --seconds 1\n",
    "  engine bench kernels --compare-threads --json kernels.json\n",
    "\n",
    "Each operation at the shapes of two real models: bytes it has to move and FLOP it has to do, the\n",
    "time this takes at most by the measured peaks, the time it took (median), and the share.",
);

/// `engine bench`.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub(crate) what: BenchCommand,
}

/// What `engine bench` measures.
#[derive(Debug, Subcommand)]
pub(crate) enum BenchCommand {
    /// Requests and tokens a second, offline
    #[command(after_help = THROUGHPUT_EXAMPLES)]
    Throughput(ThroughputArgs),
    /// Time of one batch from beginning to end
    #[command(after_help = LATENCY_EXAMPLES)]
    Latency(LatencyArgs),
    /// A server under load, over HTTP
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(Box<ServeBenchArgs>),
    /// A step of reinforcement learning, split into its parts
    #[command(after_help = RL_EXAMPLES)]
    Rl(RlBenchArgs),
    /// Each operation beside the limits of the machine
    #[command(after_help = KERNELS_EXAMPLES)]
    Kernels(KernelsArgs),
}

impl BenchArgs {
    /// The flags that every command has.
    pub(crate) fn common(&self) -> &CommonArgs {
        match &self.what {
            BenchCommand::Throughput(args) => &args.common,
            BenchCommand::Latency(args) => &args.common,
            BenchCommand::Serve(args) => &args.common,
            BenchCommand::Rl(args) => &args.common,
            BenchCommand::Kernels(args) => &args.common,
        }
    }
}

/// `--dataset-name`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DatasetName {
    /// Random tokens of fixed lengths
    Random,
    /// JSON: a list of conversations
    Sharegpt,
    /// JSONL: an object with "prompt" a line
    Custom,
}

/// Where prompts come from.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Prompts")]
pub(crate) struct DatasetArgs {
    /// Kind of prompts
    #[arg(long, value_enum, default_value_t = DatasetName::Random)]
    pub(crate) dataset_name: DatasetName,
    /// File of a data set
    #[arg(long, value_name = "FILE")]
    pub(crate) dataset_path: Option<PathBuf>,
    /// Tokens of a random prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) random_input_len: usize,
    /// Tokens of the output to a random prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub(crate) random_output_len: usize,
    /// Tokens of the output to a data set's prompt [default: the recorded answer's, else 128]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) output_len: Option<usize>,
}

/// `engine bench throughput`.
#[derive(Debug, Args)]
pub(crate) struct ThroughputArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Prompts, all there from the beginning
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) num_prompts: usize,
    /// Samples of each prompt
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) n: usize,
    /// Also report this many alternatives to each token; 0 for the token's own log-probability
    #[arg(long, value_name = "K")]
    pub(crate) logprobs: Option<usize>,
    /// JSON schema that every sample has to follow, with room for all its tokens: what masks cost
    #[arg(long, value_name = "JSON")]
    pub(crate) json_schema: Option<String>,
    /// Runs of which the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Runs before those, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) num_warmups: usize,
    #[command(flatten)]
    pub(crate) draw: DrawArgs,
    #[command(flatten)]
    pub(crate) dataset: DatasetArgs,
    /// JSON file for the results
    #[arg(long, value_name = "FILE", alias = "output-json")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `engine bench latency`.
#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Sequences that run together
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) batch_size: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 32)]
    pub(crate) input_len: usize,
    /// Tokens of an output
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) output_len: usize,
    /// Runs
    #[arg(long, value_name = "N", default_value_t = 30)]
    pub(crate) num_iters: usize,
    /// Runs before those, which do not count
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub(crate) num_iters_warmup: usize,
    /// JSON file for the results
    #[arg(long, value_name = "FILE", alias = "output-json")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `engine bench rl`.
#[derive(Debug, Args)]
pub(crate) struct RlBenchArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Prompts of a step
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) prompts: usize,
    /// Samples of each prompt
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub(crate) group: usize,
    /// Tokens of a prompt
    #[arg(long, value_name = "TOKENS", default_value_t = 120)]
    pub(crate) prompt_len: usize,
    /// Tokens of a response
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub(crate) response_len: usize,
    /// Tokens that a training pass holds at once
    #[arg(long, value_name = "TOKENS", default_value_t = trainer::memory::MAX_PLANNED_TOKENS)]
    pub(crate) max_tokens_per_microbatch: usize,
    /// Run layers again in the backward pass instead of keeping their activations
    #[arg(long)]
    pub(crate) recompute: bool,
    /// Steps of which the median counts
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(crate) repeats: usize,
    /// Steps before those, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) num_warmups: usize,
    /// Also time forward and backward with each sample's prompt run by itself
    #[arg(long)]
    pub(crate) compare_unshared: bool,
    /// JSON file for the results
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `engine bench kernels`.
#[derive(Debug, Args)]
pub(crate) struct KernelsArgs {
    /// Only operations whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub(crate) only: Option<String>,
    /// Models whose shapes are measured: smollm2-135m, qwen2.5-0.5b, tiny [default: the first two]
    #[arg(long, value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub(crate) models: Vec<String>,
    /// Rows of products [default: 1, 8, 128, 1024]
    #[arg(long, value_name = "M", num_args = 1.., value_delimiter = ',')]
    pub(crate) rows: Vec<usize>,
    /// Time spent on a figure
    #[arg(long, value_name = "SECONDS", default_value_t = 0.2)]
    pub(crate) seconds: f64,
    /// Also run on one thread, and print how much faster all are
    #[arg(long)]
    pub(crate) compare_threads: bool,
    /// JSON file for the results
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}
