//! `engine doctor`: what was detected, what will run, what a model takes, what can be hoped for.

use std::hint::black_box;
use std::thread;
use std::time::{Duration, Instant};

use engine::{EngineConfig, Level, MemoryPlan, ModelConfig, available_memory_bytes};

use crate::args::DoctorArgs;
use crate::exit::Result;
use crate::terminal::Terminal;
use crate::{model, output};

/// Processor features that decide which kernels run, as Linux spells them.
const FEATURES: [&str; 9] = [
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512dq",
    "avx512vl",
    "avx512_bf16",
    "amx_tile",
    "amx_bf16",
];
/// Memory that each thread reads to measure bandwidth: more than any cache holds.
const READ_BYTES: usize = 256 << 20;
/// How long the measurement goes on at least.
const READ_FOR: Duration = Duration::from_millis(250);

/// Runs the command.
pub(crate) fn run(args: &DoctorArgs, terminal: &Terminal) -> Result<()> {
    let config = model::engine_config(&args.common, &args.engine)?;
    output::print(&machine(&config))?;
    let source = model::open(&args.model, terminal)?;
    let plan = MemoryPlan::new(source.config(), &config)?;
    output::print(&format!("\nmodel        {}\n{}\n{plan}", args.model, shape(source.config())))?;
    terminal.info("measuring memory bandwidth");
    let bandwidth = read_bandwidth(config.resolved_threads());
    output::print(&estimate(&plan, bandwidth))
}

fn machine(config: &EngineConfig) -> String {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let memory = available_memory_bytes();
    let memory = memory.map_or("unknown".to_owned(), |bytes| format!("{:.1} GiB", gib(bytes)));
    let levels = Level::ALL.into_iter().filter(|level| level.available());
    let levels: Vec<&str> = levels.map(Level::name).collect();
    let (cpu, features) = processor();
    let candle = if cfg!(feature = "candle") { "cpu, candle-cpu" } else { "cpu" };
    [
        format!("processor    {cpu}"),
        format!("cpu features {features}"),
        format!("cores        {cores}, {} used", config.resolved_threads()),
        format!("memory       {memory} available"),
        format!("kernels      {} (available: {})", config.resolved_level(), levels.join(" ")),
        format!("dtype        {}", config.resolved_dtype().name()),
        format!("devices      {candle}"),
    ]
    .join("\n")
}

/// The processor's name and those of its features that kernels ask for, as the system reports them.
fn processor() -> (String, String) {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let value = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key));
        line.and_then(|line| line.split_once(':')).map_or("", |(_, value)| value.trim())
    };
    let or_unknown =
        |text: &str| if text.is_empty() { "unknown".to_owned() } else { text.to_owned() };
    let has: Vec<&str> = value("flags").split_whitespace().collect();
    let found = FEATURES.into_iter().filter(|feature| has.contains(feature));
    (or_unknown(value("model name")), or_unknown(&found.collect::<Vec<_>>().join(" ")))
}

fn shape(model: &ModelConfig) -> String {
    format!(
        "shape        {} layers of {}, {} heads of {} over {}, vocabulary {}, context {}",
        model.layers,
        model.hidden_size,
        model.heads,
        model.head_dim,
        model.kv_heads,
        model.vocab_size,
        model.max_position_embeddings
    )
}

/// Decoding one token for any number of sequences reads every weight once.
fn estimate(plan: &MemoryPlan, bandwidth: f64) -> String {
    let steps = bandwidth / plan.weights_bytes.max(1) as f64;
    format!(
        "\nbandwidth    {:.1} GB/s read (measured)\ndecode limit {steps:.0} steps/s by reading the weights",
        bandwidth / 1e9
    )
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Bytes a second that `threads` threads read from memory together.
fn read_bandwidth(threads: usize) -> f64 {
    let words = READ_BYTES / size_of::<u64>();
    let read = || {
        let memory = vec![1_u64; words];
        let (begun, mut bytes) = (Instant::now(), 0);
        while begun.elapsed() < READ_FOR {
            black_box(memory.iter().fold(0_u64, |sum, word| sum.wrapping_add(*word)));
            bytes += READ_BYTES;
        }
        bytes as f64 / begun.elapsed().as_secs_f64()
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..threads.min(16)).map(|_| scope.spawn(read)).collect();
        readers.into_iter().map(|reader| reader.join().unwrap_or(0.0)).sum()
    })
}
