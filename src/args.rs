//! What stands on the command line: plain values, nothing resolved yet.
//!
//! Flags are spelled as vLLM spells them where the meaning is the same. Every flag has the environment
//! variable `ENGINE_<FLAG>` and the key of its name in `--config FILE.toml`; both are added in
//! [`crate::layers`], so no flag is required here and defaults are applied when resolving.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::{SamplingParams, Speculation};

use crate::args_api::DoorArgs;
use crate::args_eval::EvalArgs;
use crate::args_run::{RlArgs, SftArgs};
use crate::bench::args::BenchArgs;
use crate::device::DeviceArg;
use crate::exit::{Failure, Result};
use crate::plot::PlotArgs;

/// The model that is used where none is named.
pub(crate) const DEFAULT_MODEL: &str = "builtin:arith";

const AFTER: &str = concat!(
    "MODEL is a Hugging Face directory, a .gguf file, a hub id (Qwen/Qwen2.5-0.5B-Instruct, or\n",
    "org/name:file.gguf), or builtin:arith, the small policy that comes with the program. What the\n",
    "hub cache lacks of a hub id is downloaded: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN,\n",
    "HF_HUB_OFFLINE=1, HTTPS_PROXY and NO_PROXY are honoured.\n",
    "\n",
    "Every flag can also be set by an environment variable (--max-model-len: ENGINE_MAX_MODEL_LEN) or\n",
    "by a key of the file given with --config (max_model_len = 4096); the command line wins over the\n",
    "environment, the environment over the file. ENGINE_CPU=reference|portable|avx2|avx512|amx forces the\n",
    "kernels.\n",
    "\n",
    "Exit codes: 0 done, 1 failure while running, 2 usage or configuration, 3 model or data invalid,\n",
    "4 numerical failure, 5 reward failure, 75 interrupted with a resumable checkpoint,\n",
    "130 interrupted.",
);

/// Serves, trains and examines language models on one machine.
#[derive(Debug, Parser)]
#[command(name = "engine", version, after_help = AFTER, max_term_width = 100)]
#[command(disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a model over an OpenAI-compatible API
    #[command(after_help = SERVE_EXAMPLES)]
    Serve(ServeArgs),
    /// Generate from a file of prompts, offline
    #[command(after_help = GENERATE_EXAMPLES)]
    Generate(GenerateArgs),
    /// Log-probabilities of given tokens
    #[command(after_help = SCORE_EXAMPLES)]
    Score(ScoreArgs),
    /// Train a model by reinforcement learning
    #[command(after_help = crate::args_run::RL_EXAMPLES)]
    Rl(RlArgs),
    /// Train a model on given answers
    #[command(after_help = crate::args_run::SFT_EXAMPLES)]
    Sft(SftArgs),
    /// How often a model's responses are right
    #[command(after_help = crate::args_eval::EVAL_EXAMPLES)]
    Eval(EvalArgs),
    /// Draw the curves of training runs and fit reward against entropy
    #[command(after_help = crate::plot::EXAMPLES)]
    Plot(PlotArgs),
    /// Measure speed beside the limits of the machine
    #[command(after_help = crate::bench::args::EXAMPLES)]
    Bench(Box<BenchArgs>),
    /// Show what was detected and what a model will take
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(DoctorArgs),
}

const SERVE_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine serve\n",
    "  engine serve smollm2-135m.gguf --port 8080 --max-model-len 4096\n",
    "  engine serve ./checkpoints/step_30 --served-model-name policy --api-key $KEY\n",
);

const GENERATE_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine generate --prompts prompts.jsonl\n",
    "  engine generate smollm2-135m.gguf --prompts in.jsonl --output out.jsonl --n 4\n",
    "\n",
    "A line of the input has one of \"prompt\" (string), \"prompt_token_ids\" (array) or \"messages\"\n",
    "(chat), optionally \"id\" and any sampling parameter. When --output exists, prompts whose samples\n",
    "are all in it are skipped; it is refused if they are of another prompt, model, seed or other sampling\n",
    "parameters.",
);

const SCORE_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine score --input texts.jsonl\n",
    "  engine score model.gguf --input ids.jsonl --path train --output scores.jsonl\n",
    "\n",
    "A line of the input has \"token_ids\" (array) or \"text\" (string), optionally \"id\" and\n",
    "\"temperature\".",
);

const DOCTOR_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine doctor\n",
    "  engine doctor smollm2-135m.gguf --max-model-len 2048\n",
);

impl Command {
    /// The flags that every command has.
    pub(crate) fn common(&self) -> &CommonArgs {
        match self {
            Self::Serve(args) => &args.common,
            Self::Generate(args) => &args.common,
            Self::Score(args) => &args.common,
            Self::Rl(args) => &args.common,
            Self::Sft(args) => &args.common,
            Self::Eval(args) => &args.common,
            Self::Plot(args) => &args.common,
            Self::Bench(args) => args.common(),
            Self::Doctor(args) => &args.common,
        }
    }
}

/// Flags of every command.
#[derive(Clone, Debug, Args)]
pub(crate) struct CommonArgs {
    /// Compute threads [default: all cores]
    #[arg(long, value_name = "N")]
    pub(crate) threads: Option<usize>,
    /// Format of weights, products and KV cache; auto is bf16, on candle-cpu f32, and for a run that goes
    /// on what it began with
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    pub(crate) dtype: DtypeArg,
    /// Key of all randomness
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Form of log lines on standard error
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    pub(crate) log_format: LogFormat,
    /// No progress and no log lines, only errors
    #[arg(long)]
    pub(crate) quiet: bool,
    /// TOML file with values for flags that are not given
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

/// `--dtype`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum DtypeArg {
    Auto,
    #[value(alias = "float32")]
    F32,
    #[value(alias = "bfloat16")]
    Bf16,
}

/// `--log-format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Flags of every command that runs a model.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Engine")]
pub(crate) struct EngineArgs {
    /// Longest sequence, prompt and output together, in tokens [default: the model's, up to 8192]
    #[arg(long, value_name = "TOKENS", value_parser = crate::model::count)]
    pub(crate) max_model_len: Option<u64>,
    /// Sequences that run at once [default: 256]
    #[arg(long, value_name = "N")]
    pub(crate) max_num_seqs: Option<usize>,
    /// Tokens of one step [default: 2048]
    #[arg(long, value_name = "TOKENS", value_parser = crate::model::count)]
    pub(crate) max_num_batched_tokens: Option<u64>,
    /// Memory for the KV cache, e.g. 2G or 512MiB [default: planned from free memory]
    #[arg(long, value_name = "BYTES", value_parser = crate::model::count)]
    pub(crate) kv_cache_memory_bytes: Option<u64>,
    /// Tokens of a KV block, a multiple of 16 [default: 16]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) block_size: Option<usize>,
    /// Format of the KV cache; int8 halves its memory, for serving only; auto is that of --dtype
    #[arg(long, value_enum, default_value_t = KvCacheDtype::Auto)]
    pub(crate) kv_cache_dtype: KvCacheDtype,
    /// Compute every prompt anew
    #[arg(long)]
    pub(crate) no_enable_prefix_caching: bool,
    /// Keep a GGUF file's quantised weights as they are (gguf), or expand them (none); auto keeps them
    /// where a command only generates and --dtype is auto
    #[arg(long, value_enum, default_value_t = QuantizationArg::Auto)]
    pub(crate) quantization: QuantizationArg,
    /// What is guessed of coming tokens, as JSON, or off; it changes no token and no number [default:
    /// {"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 16};
    /// off in benchmarks]
    #[arg(long, value_name = "JSON", value_parser = crate::model::speculation)]
    pub(crate) speculative_config: Option<Speculation>,
}

/// `--kv-cache-dtype`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum KvCacheDtype {
    #[default]
    Auto,
    Int8,
}

/// `--quantization`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum QuantizationArg {
    #[default]
    Auto,
    None,
    Gguf,
}

/// `engine serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8000)]
    pub(crate) port: u16,
    /// Unix socket to listen on, instead of host and port
    #[arg(long, value_name = "PATH")]
    pub(crate) uds: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// Flags of every command that serves.
#[derive(Clone, Debug, Args)]
pub(crate) struct ApiArgs {
    /// Key a client must show; may be repeated
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Vec<String>,
    /// Name of the model in the API; may be repeated [default: MODEL]
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Vec<String>,
    /// Where sampling defaults come from
    #[arg(long, value_enum, default_value_t = GenerationConfig::Auto)]
    pub(crate) generation_config: GenerationConfig,
    /// Longest request body, e.g. 32MiB
    #[arg(long, value_name = "BYTES", value_parser = crate::model::count, default_value = "32MiB")]
    pub(crate) max_body_bytes: u64,
    /// Sequences that may wait; further requests get 429 [default: all may]
    #[arg(long, value_name = "N")]
    pub(crate) max_queued_requests: Option<usize>,
    /// Seconds that a request may take, queue included [default: any]
    #[arg(long, value_name = "SECONDS")]
    pub(crate) request_timeout: Option<f64>,
    /// Names under /metrics: engine_... (own), or vllm:... too
    #[arg(long, value_enum, default_value_t = MetricsCompat::Own)]
    pub(crate) metrics_compat: MetricsCompat,
    /// No line every 5 seconds of work about throughput, queue and cache
    #[arg(long)]
    pub(crate) disable_log_stats: bool,
    /// Seconds without a step, while there is work, after which /health says 503; 0 for never
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub(crate) heartbeat_timeout: u64,
    /// Seconds for running requests to finish after SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub(crate) shutdown_timeout: u64,
    /// Refuse requests with unknown fields, which else get one warning
    #[arg(long)]
    pub(crate) strict_params: bool,
    /// Distribution that reported log-probabilities are of
    #[arg(long, value_enum, default_value_t = LogprobsArg::Raw)]
    pub(crate) logprobs_mode: LogprobsArg,
    #[command(flatten)]
    pub(crate) door: DoorArgs,
}

/// `--logprobs-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogprobsArg {
    /// The model's own, at temperature 1 with nothing cut off
    #[value(name = "raw_logprobs")]
    Raw,
    /// The one that was sampled from
    #[value(name = "processed_logprobs")]
    Processed,
}

/// `--metrics-compat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum MetricsCompat {
    Own,
    Vllm,
}

/// `--generation-config`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum GenerationConfig {
    /// The model's generation_config.json
    Auto,
    /// Neutral values
    #[value(alias = "vllm")]
    None,
}

/// `engine generate`.
#[derive(Debug, Args)]
pub(crate) struct GenerateArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// JSONL file of prompts (required); - is standard input
    #[arg(long, value_name = "IN.jsonl")]
    pub(crate) prompts: Option<PathBuf>,
    /// JSONL file for the results, continued if it exists [default: standard output]
    #[arg(long, value_name = "OUT.jsonl")]
    pub(crate) output: Option<PathBuf>,
    /// What computes: this project's kernels (cpu), or slowly candle (candle-cpu, cuda:N) where the
    /// program has it
    #[arg(long, value_name = "NAME", default_value = "cpu", value_parser = crate::device::parse)]
    pub(crate) device: DeviceArg,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// Sampling where a line of the input gives none.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Sampling, where a line gives none")]
pub(crate) struct SamplingArgs {
    /// Samples of each prompt
    #[arg(long)]
    pub(crate) n: Option<usize>,
    /// Most tokens of a sample [default: what the context leaves]
    #[arg(long, value_name = "TOKENS")]
    pub(crate) max_tokens: Option<usize>,
    /// Fewest tokens of a sample
    #[arg(long, value_name = "TOKENS")]
    pub(crate) min_tokens: Option<usize>,
    #[command(flatten)]
    pub(crate) draw: DrawArgs,
    /// Text that ends a sample; may be repeated
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Token that ends a sample; may be repeated
    #[arg(long, value_name = "ID", num_args = 1..)]
    pub(crate) stop_token_ids: Vec<u32>,
    /// Treat end-of-text as any token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Report this many alternatives beside each token
    #[arg(long, value_name = "K")]
    pub(crate) logprobs: Option<usize>,
}

/// What tokens are drawn from.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct DrawArgs {
    /// 0 takes the most likely token
    #[arg(long)]
    pub(crate) temperature: Option<f32>,
    /// Share of probability to draw from
    #[arg(long)]
    pub(crate) top_p: Option<f32>,
    /// Most likely tokens to draw from; 0 or -1 for all
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) top_k: Option<i64>,
    /// Least probability, relative to the most likely token
    #[arg(long)]
    pub(crate) min_p: Option<f32>,
    /// Subtracted from logits of tokens generated before
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) presence_penalty: Option<f32>,
    /// Subtracted per earlier occurrence
    #[arg(long, allow_negative_numbers = true)]
    pub(crate) frequency_penalty: Option<f32>,
    /// Divides positive logits of tokens seen before
    #[arg(long)]
    pub(crate) repetition_penalty: Option<f32>,
}

impl DrawArgs {
    /// Changes what is given.
    pub(crate) fn apply(&self, params: &mut SamplingParams) -> Result<()> {
        let numbers = [
            (&mut params.temperature, self.temperature),
            (&mut params.top_p, self.top_p),
            (&mut params.min_p, self.min_p),
            (&mut params.presence_penalty, self.presence_penalty),
            (&mut params.frequency_penalty, self.frequency_penalty),
            (&mut params.repetition_penalty, self.repetition_penalty),
        ];
        for (value, flag) in numbers {
            *value = flag.unwrap_or(*value);
        }
        match self.top_k {
            None => {}
            Some(-1 | 0) => params.top_k = None,
            Some(k) => {
                let count = usize::try_from(k);
                let least = |_| Failure::usage(format!("--top-k is {k}, limit is at least -1"));
                params.top_k = Some(count.map_err(least)?);
            }
        }
        Ok(())
    }
}

/// `engine score`.
#[derive(Debug, Args)]
pub(crate) struct ScoreArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    /// JSONL file of texts or token ids (required); - is standard input
    #[arg(long, value_name = "IN.jsonl")]
    pub(crate) input: Option<PathBuf>,
    /// JSONL file for the results [default: standard output]
    #[arg(long, value_name = "OUT.jsonl")]
    pub(crate) output: Option<PathBuf>,
    /// Which code computes: that of rollouts (paged KV) or that of training
    #[arg(long, value_enum, default_value_t = ScorePath::Rollout)]
    pub(crate) path: ScorePath,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `--path`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ScorePath {
    Rollout,
    Train,
}

/// `engine doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Directory, .gguf file, hub id or builtin:arith
    #[arg(default_value = DEFAULT_MODEL)]
    pub(crate) model: String,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}
