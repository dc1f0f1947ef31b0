//! `engine bench throughput`: a batch that is there from the beginning, as fast as it goes.
//!
//! Printed as `vllm bench throughput` prints it, then the limit of the job and the share of it.

use engine::{SamplingParams, SpeculationStats};
use serde_json::{Value, json};

use crate::bench::args::ThroughputArgs;
use crate::bench::dataset::Prompt;
use crate::bench::generation::{Bench, Sampling, open};
use crate::bench::limits::machine;
use crate::bench::numbers::Values;
use crate::bench::{positive, save};
use crate::exit::Result;
use crate::terminal::Terminal;
use crate::{model, output};

/// Runs the command.
pub(crate) fn run(args: &ThroughputArgs, terminal: &Terminal) -> Result<()> {
    positive("--n", args.n)?;
    positive("--repeats", args.repeats)?;
    let config = model::serving_config(&args.common, &args.engine)?;
    let config = model::measured(config, &args.engine);
    let seed = args.common.seed;
    let (source, dataset) = open(&args.model, &args.dataset, (args.num_prompts, seed), terminal)?;
    let sequences = args.num_prompts.saturating_mul(args.n);
    let mut bench = Bench::load(&source, &config, (sequences, dataset.longest()), terminal)?;
    let constraint = args.json_schema.as_deref().map(|text| bench.constraint(text)).transpose()?;
    let mut params =
        SamplingParams { n: args.n, logprobs: args.logprobs, ..SamplingParams::default() };
    args.draw.apply(&mut params)?;
    params.validate(source.config().vocab_size)?;
    let sampling = Sampling { params, constraint, seed };
    let (mut seconds, mut last) = (Vec::new(), Vec::new());
    for run in 0..args.num_warmups + args.repeats {
        last = dataset.prompts(run as u64);
        let took = bench.generate(&last, &sampling)?;
        if run >= args.num_warmups {
            seconds.push(took);
            terminal.info(&format!("run {}/{}: {took:.2} s", seconds.len(), args.repeats));
        }
    }
    let mut results = report(args, (&bench, &sampling.params), &last, &Values::new(seconds))?;
    results["machine"] = machine(&config, &bench.peaks);
    save(args.json.as_deref(), &results)
}

/// Prints the rates of runs of `seconds` on prompts like these; they and more as JSON.
fn report(
    args: &ThroughputArgs,
    (bench, params): (&Bench, &SamplingParams),
    prompts: &[Prompt],
    seconds: &Values,
) -> Result<Value> {
    let (limit, median) = (bench.limit(prompts, args.n), seconds.median());
    let requests = args.num_prompts * args.n;
    let input: usize = prompts.iter().map(|p| p.tokens().len()).sum();
    let made = args.n * prompts.iter().map(|p| p.output).sum::<usize>();
    let rate = |count: usize| count as f64 / median;
    let (low, high) = seconds.spread();
    output::print(&format!(
        "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s\n\
         Elapsed: {median:.3} s, median of {}, {low:.3} to {high:.3}\n\
         Limit: {limit:.3} s, {:.2} output tokens/s ({}); {:.0} % of it reached",
        rate(requests),
        rate(input + made),
        rate(made),
        seconds.len(),
        made as f64 / limit,
        bench.peaks.describe(),
        100.0 * limit / median
    ))?;
    let SpeculationStats { drafts, guessed, accepted } = bench.engine.speculation();
    if guessed > 0 {
        output::print(&format!(
            "Guesses, warm-ups included: {guessed} run, {accepted} came true; the limit is without them"
        ))?;
    }
    Ok(json!({
        "elapsed_time": median,
        "num_requests": requests,
        "total_num_tokens": input + made,
        "requests_per_second": rate(requests),
        "tokens_per_second": rate(input + made),
        "output_tokens_per_second": rate(made),
        "num_prompts": args.num_prompts, "n": args.n, "total_input_tokens": input,
        "total_output_tokens": made, "logprobs": args.logprobs,
        "json_schema": args.json_schema, "temperature": params.temperature,
        "top_k": params.top_k, "top_p": params.top_p, "min_p": params.min_p,
        "presence_penalty": params.presence_penalty, "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "spec_decode_num_drafts": drafts, "spec_decode_num_draft_tokens": guessed,
        "spec_decode_num_accepted_tokens": accepted,
        "limit_s": limit, "share_of_limit": limit / median,
        "elapsed": seconds.to_json(),
        "model": args.model,
    }))
}
