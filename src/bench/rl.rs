//! `engine bench rl`: one GRPO step with one update, split into its parts, each beside its own limit.
//!
//! Prompts are random tokens and end-of-text is ignored, so lengths are exact; the rule judges texts
//! against a number, and every other response counts as right. In training a prompt's rows run once for
//! its group. Leaves out data, validation and checkpoints: see `engine rl`.

use std::time::Instant;

use engine::{Engine, EosRule};
use serde_json::{Value, json};
use trainer::config::kept_for_backward;
use trainer::rollout::{Episode, RolloutSettings, generate};
use trainer::verifier::Verifier;

use crate::bench::args::RlBenchArgs;
use crate::bench::dataset::{Prompt, Shape};
use crate::bench::generation::Bench;
use crate::bench::limits::machine;
use crate::bench::numbers::Values;
use crate::bench::{positive, save};
use crate::exit::Result;
use crate::terminal::Terminal;
use crate::{model, output};

mod learning;

use learning::Learning;

/// The parts of a step, in their order.
const PARTS: [&str; 5] = ["generate", "reward", "forward", "backward", "optimizer"];

/// Runs the command.
pub(crate) fn run(args: &RlBenchArgs, terminal: &Terminal) -> Result<()> {
    let counts = [
        ("--prompts", args.prompts),
        ("--group", args.group),
        ("--prompt-len", args.prompt_len),
        ("--response-len", args.response_len),
        ("--repeats", args.repeats),
        ("--max-tokens-per-microbatch", args.max_tokens_per_microbatch),
    ];
    counts.into_iter().try_for_each(|(flag, value)| positive(flag, value))?;
    let config = model::training_config(&args.common, &args.engine, "engine bench rl")?;
    let config = model::measured(config, &args.engine);
    let source = model::open(&args.model, terminal)?;
    let longest = args.prompt_len + args.response_len;
    let sequences = args.prompts.saturating_mul(args.group);
    let mut bench = Bench::load(&source, &config, (sequences, longest), terminal)?;
    let shape = Shape {
        count: args.prompts,
        input: args.prompt_len,
        output: args.response_len,
        vocabulary: source.config().vocab_size,
        seed: args.common.seed,
    };
    let keep = kept_for_backward(args.recompute);
    let mut learning = Learning::new(&mut bench.engine, keep, args.max_tokens_per_microbatch)?;
    let mut steps: [Vec<f64>; 5] = Default::default();
    for run in 0..args.num_warmups + args.repeats {
        let prompts = shape.prompts(run as u64);
        let took = step(&mut bench.engine, &mut learning, &prompts, args)?;
        if run >= args.num_warmups {
            let all: f64 = took.iter().sum();
            terminal.info(&format!(
                "step {}/{}: {all:.2} s",
                run + 1 - args.num_warmups,
                args.repeats
            ));
            steps.iter_mut().zip(took).for_each(|(part, seconds)| part.push(seconds));
        }
    }
    let limits = limits(&bench, &shape.prompts(0), args);
    let mut results = report(args, &steps, &limits)?;
    if args.compare_unshared {
        let compared = learning.compare(&bench.engine, &shape, (args.group, args.repeats))?;
        results["shared_prompts"] = compared;
    }
    results["model"] = json!(args.model);
    results["machine"] = machine(&config, &bench.peaks);
    results["peak_resident_bytes"] =
        json!(engine::ResidentMemory::own().map(|memory| memory.peak_bytes));
    save(args.json.as_deref(), &results)
}

/// Seconds of each part of a step.
fn step(
    engine: &mut Engine,
    learning: &mut Learning,
    prompts: &[Prompt],
    args: &RlBenchArgs,
) -> Result<[f64; 5]> {
    let settings = RolloutSettings {
        samples: args.group,
        temperature: 1.0,
        top_p: 1.0,
        top_k: None,
        max_tokens: args.response_len,
        stop: Vec::new(),
        eos: EosRule::Ignore,
        seed: args.common.seed,
    };
    let prompts: Vec<Vec<u32>> = prompts.iter().map(|p| p.tokens().to_vec()).collect();
    let begun = Instant::now();
    let episodes = generate(&mut *engine, &prompts, &settings, &mut |_| {})?;
    let generated = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    judge(&episodes);
    let judged = begun.elapsed().as_secs_f64();
    let [forward, backward, optimizer] = learning.learn(engine, &prompts, &episodes)?;
    Ok([generated, judged, forward, backward, optimizer])
}

/// Judges each response; what a random one says is not worth looking at.
fn judge(episodes: &[Episode]) {
    for episode in episodes {
        std::hint::black_box(Verifier::Numeric.judge(&episode.text, "42"));
    }
}

/// What each part takes at least, in seconds.
fn limits(bench: &Bench, prompts: &[Prompt], args: &RlBenchArgs) -> [f64; 5] {
    let targets = args.prompts * args.group * args.response_len;
    // The last token of a response is not run.
    let own = args.prompts * args.group * (args.response_len - 1);
    let rows = args.prompts * args.prompt_len + own;
    let (params, dtype) = (bench.engine.model().parameters(), bench.engine.dtype());
    [
        bench.limit(prompts, args.group),
        0.0,
        bench.cost.forward(rows, targets),
        bench.cost.backward(rows, targets),
        bench.cost.optimizer(params, dtype.size_bytes()),
    ]
}

/// Prints the medians; they and all values as JSON.
fn report(args: &RlBenchArgs, steps: &[Vec<f64>; 5], limits: &[f64; 5]) -> Result<Value> {
    let whole: Vec<f64> =
        (0..steps[0].len()).map(|i| steps.iter().map(|part| part[i]).sum()).collect();
    let (whole, limit) = (Values::new(whole), limits.iter().sum::<f64>());
    let (low, high) = whole.spread();
    let mut lines = vec![
        format!(
            "GRPO step: {} prompts x {}, {} + {} tokens, one update; medians of {}",
            args.prompts,
            args.group,
            args.prompt_len,
            args.response_len,
            whole.len()
        ),
        format!("{:<10} {:>9} {:>9} {:>6}", "", "seconds", "limit", "share"),
    ];
    let mut parts = json!({});
    for ((name, seconds), limit) in PARTS.into_iter().zip(steps).zip(limits) {
        let seconds = Values::new(seconds.clone());
        lines.push(line(name, seconds.median(), *limit));
        let share = limit / seconds.median().max(f64::MIN_POSITIVE);
        parts[name] = json!({"seconds": seconds.median(), "limit_s": limit, "share_of_limit": share,
            "elapsed": seconds.to_json()});
    }
    lines.push(line("whole", whole.median(), limit));
    lines.push(format!("spread     {low:.3} to {high:.3} s"));
    output::print(&lines.join("\n"))?;
    let tokens = args.prompts * args.group * (args.prompt_len + args.response_len);
    Ok(json!({
        "elapsed_time": whole.median(), "limit_s": limit, "share_of_limit": limit / whole.median(),
        "tokens_per_second": tokens as f64 / whole.median(),
        "parts": parts, "elapsed": whole.to_json(),
        "prompts": args.prompts, "group": args.group, "prompt_len": args.prompt_len,
        "response_len": args.response_len, "recompute": args.recompute,
        "max_tokens_per_microbatch": args.max_tokens_per_microbatch,
    }))
}

fn line(name: &str, seconds: f64, limit: f64) -> String {
    let (limit, share) = match limit > 0.0 {
        true => (format!("{limit:.3}"), format!("{:.0} %", 100.0 * limit / seconds)),
        false => ("-".to_owned(), "-".to_owned()),
    };
    format!("{name:<10} {seconds:>9.3} {limit:>9} {share:>6}")
}
