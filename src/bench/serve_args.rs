//! The flags of `engine bench serve`, spelled as `vllm bench serve` spells them.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::args::{CommonArgs, EngineArgs};
use crate::bench::args::DatasetArgs;

/// Shown under `engine bench serve --help`.
pub(crate) const SERVE_EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine bench serve\n",
    "  engine bench serve smollm2-135m.gguf --num-prompts 200 --request-rate 4 --save-result\n",
    "  engine bench serve --base-url http://127.0.0.1:8000 --model arith --max-concurrency 32\n",
    "  engine bench serve --idle-connections 1000 --max-concurrency 256 --duration 600 --json soak.json\n",
    "\n",
    "Without --base-url, --host or --port it serves MODEL itself and loads that server over HTTP.\n",
    "Requests that fail are counted and do not end the run. TTFT: time to the first token. TPOT: time\n",
    "per token after it. ITL: time between pieces of an answer. E2EL: time of a whole answer.",
);

/// `engine bench serve`.
#[derive(Debug, Args)]
pub(crate) struct ServeBenchArgs {
    /// Model to serve here and to load [default: builtin:arith, unless a server is named]
    #[arg(value_name = "MODEL")]
    pub(crate) serve_model: Option<String>,
    #[command(flatten)]
    pub(crate) server: TargetArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    #[command(flatten)]
    pub(crate) dataset: DatasetArgs,
    #[command(flatten)]
    pub(crate) report: ReportArgs,
    #[command(flatten)]
    pub(crate) engine: EngineArgs,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// `--backend`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backend {
    /// /v1/completions
    #[value(alias = "vllm")]
    Openai,
    /// /v1/chat/completions
    #[value(name = "openai-chat")]
    OpenaiChat,
}

/// Which server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Server")]
pub(crate) struct TargetArgs {
    /// Address of a running server, http://HOST:PORT
    #[arg(long, value_name = "URL")]
    pub(crate) base_url: Option<String>,
    /// Host of a running server
    #[arg(long)]
    pub(crate) host: Option<String>,
    /// Port of a running server
    #[arg(long)]
    pub(crate) port: Option<u16>,
    /// Which API is spoken
    #[arg(long, value_enum, default_value_t = Backend::Openai)]
    pub(crate) backend: Backend,
    /// Path of the API [default: that of the backend]
    #[arg(long, value_name = "PATH")]
    pub(crate) endpoint: Option<String>,
    /// Name of the model in requests [default: the first that the server lists]
    #[arg(long, value_name = "NAME")]
    pub(crate) model: Option<String>,
    /// Key to show
    #[arg(long, value_name = "KEY", hide_env_values = true)]
    pub(crate) api_key: Option<String>,
    /// Process whose memory is recorded [default: this one, if it serves itself]
    #[arg(long, value_name = "PID")]
    pub(crate) server_pid: Option<u32>,
}

/// How it is loaded.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Load")]
pub(crate) struct LoadArgs {
    /// Requests [default: 64; with --duration as many as fit]
    #[arg(long, value_name = "N")]
    pub(crate) num_prompts: Option<usize>,
    /// Requests a second, inf for all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY)]
    pub(crate) request_rate: f64,
    /// Shape of the gaps between requests: 1 is a Poisson process, more is steadier, less burstier
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0)]
    pub(crate) burstiness: f64,
    /// Most requests at once
    #[arg(long, value_name = "N")]
    pub(crate) max_concurrency: Option<usize>,
    /// Requests before the run, which do not count
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) num_warmups: usize,
    /// Temperature [default: the server's]
    #[arg(long)]
    pub(crate) temperature: Option<f64>,
    /// Treat end-of-text as any token; random prompts do so anyway
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// Connections that are opened before and say nothing
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) idle_connections: usize,
    /// Send requests until so many seconds have passed
    #[arg(long, value_name = "SECONDS")]
    pub(crate) duration: Option<f64>,
    /// Longest time for one answer, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub(crate) request_timeout: f64,
}

/// What is said of it.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Report")]
pub(crate) struct ReportArgs {
    /// Among ttft, tpot, itl and e2el, what is printed
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "ttft,tpot,itl")]
    pub(crate) percentile_metrics: Vec<String>,
    /// Percentiles that are reported
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "50,90,99")]
    pub(crate) metric_percentiles: Vec<f64>,
    /// Limits that a good answer keeps, in milliseconds, e.g. ttft:500 tpot:50; may be repeated
    #[arg(long, value_name = "KEY:MS", num_args = 1..)]
    pub(crate) goodput: Vec<String>,
    /// JSON file for the results
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Write the results to a file named by what was run
    #[arg(long)]
    pub(crate) save_result: bool,
    /// Add them to the file as a line instead of replacing it
    #[arg(long)]
    pub(crate) append_result: bool,
    /// Also write each request's times, lengths, text and error
    #[arg(long)]
    pub(crate) save_detailed: bool,
    /// Folder of that file
    #[arg(long, value_name = "DIR")]
    pub(crate) result_dir: Option<PathBuf>,
    /// Name of that file
    #[arg(long, value_name = "NAME")]
    pub(crate) result_filename: Option<String>,
    /// First part of that file's name [default: the backend]
    #[arg(long, value_name = "TEXT")]
    pub(crate) label: Option<String>,
    /// Further keys of the results; may be repeated
    #[arg(long, value_name = "KEY=VALUE", num_args = 1..)]
    pub(crate) metadata: Vec<String>,
}
