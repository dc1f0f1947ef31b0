//! `engine doctor`: what was detected, what will run, what a model takes, what can be hoped for.

use std::thread;

use engine::{EngineConfig, Level, MemoryPlan, ModelConfig, available_memory_bytes, features};

use crate::args::DoctorArgs;
use crate::bench::limits::{self, Peaks};
use crate::exit::Result;
use crate::terminal::Terminal;
use crate::{model, output};

/// Runs the command.
pub(crate) fn run(args: &DoctorArgs, terminal: &Terminal) -> Result<()> {
    let config = model::serving_config(&args.common, &args.engine)?;
    output::print(&machine(&config))?;
    let source = model::open(&args.model, terminal)?;
    let plan = MemoryPlan::for_source(&source, &config)?;
    output::print(&format!("\nmodel        {}\n{}\n{plan}", args.model, shape(source.config())))?;
    if let Err(why) = plan.check_free() {
        output::print(&format!("does not fit {why}"))?;
    }
    terminal.info("measuring memory and multipliers");
    output::print(&estimate(&plan, source.config(), &config)?)
}

fn machine(config: &EngineConfig) -> String {
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let memory = available_memory_bytes();
    let memory = memory.map_or("unknown".to_owned(), |bytes| format!("{:.1} GiB", gib(bytes)));
    let levels = Level::ALL.into_iter().filter(|level| level.available());
    let levels: Vec<&str> = levels.map(Level::name).collect();
    let features = match features().as_slice() {
        [] => "none that kernels ask for".to_owned(),
        found => found.join(" "),
    };
    let candle = if cfg!(feature = "candle") { "cpu, candle-cpu" } else { "cpu" };
    [
        format!("processor    {}", processor()),
        format!("cpu features {features}"),
        format!("cores        {cores}, {} used", config.resolved_threads()),
        format!("memory       {memory} available"),
        format!("kernels      {} (available: {})", config.resolved_level(), levels.join(" ")),
        format!(
            "dtype        {}, kv cache {}",
            config.resolved_dtype().name(),
            config.resolved_kv_dtype().name()
        ),
        format!("devices      {candle}"),
    ]
    .join("\n")
}

/// The processor's name, as the system reports it.
pub(crate) fn processor() -> String {
    // Without the file there is no name to show.
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("model name"));
    let name = line.and_then(|line| line.split_once(':')).map(|(_, name)| name.trim());
    name.unwrap_or("unknown").to_owned()
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

/// Decoding one token for any number of sequences reads every weight once; a prompt's token multiplies
/// with every weight once.
fn estimate(plan: &MemoryPlan, model: &ModelConfig, config: &EngineConfig) -> Result<String> {
    let peaks = Peaks::measure(&limits::kernels(config)?, config.resolved_dtype());
    let steps = peaks.bytes / plan.weights_bytes.max(1) as f64;
    let mut lines = vec![
        format!("\nbandwidth    {:.1} GB/s read (measured)", peaks.bytes / 1e9),
        format!("decode limit {steps:.0} steps/s by reading the weights"),
    ];
    if peaks.flops.is_finite() {
        let tokens = peaks.flops / (2.0 * model.parameters().max(1) as f64);
        lines.push(format!("multiply     {:.0} GFLOP/s (measured)", peaks.flops / 1e9));
        lines.push(format!("prompt limit {tokens:.0} tokens/s by multiplying with the weights"));
    }
    Ok(lines.join("\n"))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}
