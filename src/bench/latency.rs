//! `engine bench latency`: one batch from its first prompt token to its last output token.

use engine::SamplingParams;
use serde_json::{Map, Value, json};

use crate::bench::args::LatencyArgs;
use crate::bench::dataset::Shape;
use crate::bench::generation::{Bench, Sampling};
use crate::bench::limits::{Peaks, machine};
use crate::bench::numbers::Values;
use crate::bench::{positive, save};
use crate::exit::Result;
use crate::terminal::Terminal;
use crate::{model, output};

/// The percentiles that `vllm bench latency` prints.
const PERCENTILES: [f64; 6] = [10.0, 25.0, 50.0, 75.0, 90.0, 99.0];

/// Runs the command.
pub(crate) fn run(args: &LatencyArgs, terminal: &Terminal) -> Result<()> {
    let counts = [
        ("--batch-size", args.batch_size),
        ("--input-len", args.input_len),
        ("--output-len", args.output_len),
        ("--num-iters", args.num_iters),
    ];
    counts.into_iter().try_for_each(|(flag, value)| positive(flag, value))?;
    let config = model::serving_config(&args.common, &args.engine)?;
    let config = model::measured(config, &args.engine);
    let source = model::open(&args.model, terminal)?;
    let longest = args.input_len + args.output_len;
    let mut bench = Bench::load(&source, &config, (args.batch_size, longest), terminal)?;
    let shape = Shape {
        count: args.batch_size,
        input: args.input_len,
        output: args.output_len,
        vocabulary: source.config().vocab_size,
        seed: args.common.seed,
    };
    let seed = args.common.seed;
    let sampling = Sampling { params: SamplingParams::default(), constraint: None, seed };
    let mut seconds = Vec::new();
    for run in 0..args.num_iters_warmup + args.num_iters {
        let took = bench.generate(&shape.prompts(run as u64), &sampling)?;
        if run >= args.num_iters_warmup {
            seconds.push(took);
        }
    }
    let mut results = report(args, (bench.limit(&shape.prompts(0), 1), &bench.peaks), seconds)?;
    results["machine"] = machine(&config, &bench.peaks);
    save(args.json.as_deref(), &results)
}

/// Prints mean and percentiles of the runs; they and more as JSON.
fn report(args: &LatencyArgs, (limit, peaks): (f64, &Peaks), latencies: Vec<f64>) -> Result<Value> {
    let seconds = Values::new(latencies.clone());
    let mut lines = vec![format!("Avg latency: {:.6} seconds", seconds.mean())];
    let mut percentiles = Map::new();
    for percent in PERCENTILES {
        let value = seconds.percentile(percent);
        lines.push(format!("{percent}% percentile latency: {value:.6} seconds"));
        percentiles.insert(percent.to_string(), json!(value));
    }
    let share = limit / seconds.median();
    lines.push(format!(
        "Limit: {limit:.6} seconds ({}); {:.0} % of it reached",
        peaks.describe(),
        100.0 * share
    ));
    output::print(&lines.join("\n"))?;
    Ok(json!({
        "avg_latency": seconds.mean(),
        "latencies": latencies,
        "percentiles": Value::Object(percentiles),
        "limit_s": limit, "share_of_limit": share,
        "batch_size": args.batch_size, "input_len": args.input_len, "output_len": args.output_len,
        "model": args.model,
    }))
}
